// What the policy wrote: the members of one group side by side, each token coloured by one of its figures.

const COLOURINGS = {
  "log-prob": { scale: "heat", low: "certain", high: "unlikely", strength: (t) => -t.logprob / 4 },
  entropy: { scale: "cool", low: "0 nats", high: "3 nats and more", strength: (t) => t.entropy / 3 },
  advantage: { scale: "", low: "discouraged", high: "encouraged", strength: (t) => t.credit },
  "kept set": { scale: "kept", low: "1 token", high: "64 and more", strength: (t) => Math.log2(t.kept || 1) / 6 },
};
const view = { source: 0, step: 0, group: 0, colouring: "log-prob", prompts: false };

function showRollouts() {
  if (!data.rollouts.length) {
    byId("rollout-members").append(make("p", { class: "empty" }, "No trajectories have been stored yet."));
    return;
  }
  view.source = Math.max(0, data.rollouts.findIndex((source) => source.steps.length > 1));
  view.step = data.rollouts[view.source].steps.length - 1;
  readAddress();
  drawRollouts();
}

function readAddress() {
  const match = /^#rollouts\/(\d+)\/(\d+)\/(\d+)$/.exec(location.hash);
  if (!match) return;
  [view.source, view.step, view.group] = match.slice(1).map(Number);
}

function current() {
  view.source = Math.min(view.source, data.rollouts.length - 1);
  const source = data.rollouts[view.source];
  view.step = Math.min(view.step, source.steps.length - 1);
  const step = source.steps[view.step];
  view.group = Math.min(view.group, step.groups.length - 1);
  return { source, step, group: step.groups[view.group] };
}

function choose(changes) {
  Object.assign(view, changes);
  current();
  history.replaceState(null, "", `#rollouts/${view.source}/${view.step}/${view.group}`);
  drawRollouts();
}

function drawRollouts() {
  const { source, step, group } = current();
  byId("rollout-controls").replaceChildren(
    picker("from", data.rollouts.map((s) => s.source), view.source, (i) => choose({ source: i, group: 0 })),
    ...(source.steps.length > 1
      ? [picker("step", source.steps.map((s) => String(s.step)), view.step, (i) => choose({ step: i }))] : []),
    picker("group", step.groups.map((g) => groupName(g)), view.group, (i) => choose({ group: i })),
    picker("colour", Object.keys(COLOURINGS), Object.keys(COLOURINGS).indexOf(view.colouring),
      (i) => choose({ colouring: Object.keys(COLOURINGS)[i] })),
    promptSwitch(),
  );
  byId("rollout-question").textContent = group.question;
  byId("rollout-scale").replaceChildren(scaleBar());
  const largest = Math.max(1e-9, ...group.members.map((member) => Math.abs(member.advantage || 0)));
  byId("rollout-members").replaceChildren(...group.members.map((member) => memberCard(member, largest)));
}

function groupName(group) {
  const rewards = group.members.map((member) => member.reward);
  const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const shown = group.members.length < group.size ? `, ${group.members.length} of ${group.size} shown` : "";
  return `${group.task} (mean reward ${short(mean)}${shown})`;
}

function picker(label, options, selected, onChoice) {
  const select = make("select", {}, options.map((text, i) => make("option", { value: i, selected: i === selected ? "" : null }, text)));
  select.addEventListener("change", () => onChoice(Number(select.value)));
  return make("label", {}, [label, select]);
}

function promptSwitch() {
  const box = make("input", { type: "checkbox", checked: view.prompts ? "" : null });
  box.addEventListener("change", () => choose({ prompts: box.checked }));
  return make("label", { class: "check" }, [box, "show the prompt"]);
}

function scaleBar() {
  const { scale, low, high } = COLOURINGS[view.colouring];
  const stops = scale ? [tint(scale, 0), tint(scale, 1)] : [tint("down", 1), tint("down", 0), tint("up", 1)];
  const bar = make("i", { style: { background: `linear-gradient(to right, ${stops.join(", ")})` } });
  return make("div", { class: "scale" }, [low, bar, high]);
}

function memberCard(member, largest) {
  const masked = Object.entries(member.training).some(([name, value]) => name.includes("mask") && value > 0);
  const advantage = member.advantage === null ? [] : [make("span",
    { class: `advantage ${member.advantage > 0 ? "up" : member.advantage < 0 ? "down" : "level"}` },
    `advantage ${signed(member.advantage)}`)];
  const header = make("header", {}, [
    make("div", { class: "top" }, [make("span", { class: "reward" }, short(member.reward)), ...advantage]),
    make("div", { class: "chips" }, memberChips(member, masked)),
  ]);
  const body = make("div", { class: "tokens" });
  member.segments.forEach((segment, i) => {
    if (i > 0) body.append(make("div", { class: "break" }, `new context: ${segment.break_reason || "unstated"}`));
    body.append(...segmentSpans(segment, (member.advantage || 0) / largest));
  });
  if (!member.segments.length) body.append(make("span", { class: "given" }, "nothing was sampled"));
  return make("article", { class: masked ? "member masked" : "member" }, [header, body]);
}

function memberChips(member, masked) {
  const chips = Object.entries(member.parts).map(([name, value]) => chip(`${name} ${short(value)}`));
  chips.push(chip(`${member.num_tokens} tokens`), chip(member.end, member.end !== "stop"));
  if (member.answer !== null) chips.push(chip(`answer ${member.answer}`));
  if (masked) chips.push(chip("masked: not trained on", true));
  for (const [name, value] of Object.entries(member.training)) {
    if (!name.includes("mask")) chips.push(chip(`${name.replaceAll("_", " ")} ${short(value)}`));
  }
  if (member.problem) chips.push(chip(member.problem, true));
  return chips;
}

function chip(text, alert = false) {
  return make("span", { class: alert ? "chip alert" : "chip" }, text);
}

function segmentSpans(segment, credit) {
  const spans = [];
  let place = 0, drawnSoFar = 0;
  segment.sampled.forEach((length, run) => {
    const sampled = run % 2 === 1;
    for (let i = 0; i < length; i++, place++) {
      const token = { id: segment.ids[place], sampled, credit, place, version: segment.weight_version };
      if (sampled) {
        token.logprob = segment.logprobs[drawnSoFar];
        token.entropy = segment.entropies[drawnSoFar];
        token.kept = segment.kept ? segment.kept[drawnSoFar] : null;
        drawnSoFar++;
      }
      if (sampled || view.prompts) spans.push(tokenSpan(token));
    }
  });
  return spans;
}

function tokenSpan(token) {
  const text = data.tokens[token.id];
  const span = make("span", { class: token.sampled ? "" : "given" });
  for (const piece of text.split(/(\n)|(<｜.*?｜>)/).filter(Boolean)) {
    if (piece === "\n") span.append(make("i", { class: "newline" }, "↵"), "\n");
    else if (piece.startsWith("<｜")) span.append(make("i", { class: "special", title: piece }, specialName(piece)));
    else if (piece) span.append(piece);
  }
  if (token.sampled) span.style.background = tokenColour(token);
  span.token = token;
  return span;
}

/** A control token by a short word: `<｜end▁of▁sentence｜>` is "end of sentence", which every font can draw. */
function specialName(text) {
  return text.slice(2, -2).replaceAll("▁", " ");
}

function tokenColour(token) {
  const { scale, strength } = COLOURINGS[view.colouring];
  const value = strength(token);
  return scale ? tint(scale, value) : tint(value < 0 ? "down" : "up", Math.abs(value));
}

/** What the tooltip says of the token under the pointer; null where there is none. */
function tokenTooltip(event) {
  const span = event.target.closest ? event.target.closest(".tokens span") : null;
  if (!span || !span.token) return null;
  const token = span.token;
  const rows = [["id", token.id], ["place", token.place]];
  if (token.sampled) {
    rows.push(["log-prob", token.logprob.toFixed(3)], ["probability", percent(Math.exp(token.logprob))],
      ["entropy", `${token.entropy.toFixed(3)} nats`], ["kept set", token.kept === null ? "whole vocabulary" : token.kept],
      ["weights", `version ${token.version}`]);
  } else {
    rows.push(["sampled", "no, given"]);
  }
  return [make("b", {}, JSON.stringify(data.tokens[token.id])), definitions(rows)];
}
