// What was learned: a bar with two whiskers for each evaluation, differences, and the table.

function showResults() {
  if (!data.results.length) {
    byId("result-plot").append(make("p", { class: "empty" }, "No evaluation has finished yet."));
    return;
  }
  const protocols = [...new Set(data.results.map((result) => result.protocol.name))];
  for (const protocol of protocols) byId("result-plot").append(resultSet(protocol));
  byId("result-notes").textContent = notesOn(labelsInOrder());
  if (data.comparisons.length) byId("result-differences").append(differenceList());
  fillResultTable();
}

function resultSet(protocol) {
  const sampling = data.results.find((result) => result.protocol.name === protocol).protocol;
  const how = `${protocol}: ${sampling.num_samples} sample${sampling.num_samples > 1 ? "s" : ""} a problem, temperature ` +
    `${sampling.sampling.temperature}` + (sampling.sampling.top_p < 1 ? `, top-p ${sampling.sampling.top_p}` : "");
  const rows = data.results.filter((result) => result.protocol.name === protocol).map((result) => resultRow(result));
  const axis = make("div", { class: "axis" }, [0, 25, 50, 75, 100].map((tick) => make("span", {}, `${tick}%`)));
  return make("div", { class: "result-set" }, [make("h3", {}, how), ...rows, make("div", { class: "result-row" }, axis)]);
}

function labelsInOrder() {
  return [...new Set(data.results.map((result) => result.label))];
}

function resultRow(result) {
  const colour = `var(${colourOf(result.label, labelsInOrder())})`;
  const track = make("div", { class: "track" }, [
    make("div", { class: "fill", style: { width: `${100 * result.mean}%`, background: colour } }),
  ]);
  for (const [name, interval] of [["wide", result.over_problems], ["narrow", result.fixed_set]]) {
    if (!interval) continue;
    const place = { left: `${100 * interval.low}%`, width: `${100 * (interval.high - interval.low)}%` };
    track.append(make("div", { class: name, style: place }));
  }
  return make("div", { class: "result-row" }, [
    make("div", { class: "label" }, result.label),
    track,
    make("div", { class: "value" }, percent(result.mean)),
  ]);
}

function differenceList() {
  const items = data.comparisons.map((difference) => {
    const clear = difference.low !== null && (difference.low > 0 || difference.high < 0);
    const direction = !clear ? "level" : difference.mean > 0 ? "up" : "down";
    const interval = difference.low === null ? "" : `, 95% interval ${points(difference.low)} to ${points(difference.high)}`;
    return make("li", {}, [
      make("b", { class: direction }, `${points(difference.mean)} points`),
      make("span", {}, `${difference.second} against ${difference.first}${interval}`),
    ]);
  });
  return make("ul", { class: "differences" }, items);
}

function fillResultTable() {
  const ks = [...new Set(data.results.flatMap((result) => Object.keys(result.pass_at)))].filter((k) => k !== "1");
  ks.sort((a, b) => a - b);
  const columns = [
    ["evaluation", (r) => r.name],
    ["accuracy", (r) => percent(r.mean)],
    ["other problems", (r) => range(r.over_problems)],
    ["these problems", (r) => range(r.fixed_set)],
    ...ks.map((k) => [`pass@${k}`, (r) => percent(r.pass_at[k])]),
    ["well-formed", (r) => percent(r.well_formed_rate)],
    ["corrects itself", (r) => percent(r.corrects_itself_rate)],
    ["no answer", (r) => percent(r.parse_failure_rate)],
    ["cut off", (r) => percent(r.truncation_rate)],
    ["tokens", (r) => r.mean_tokens.toFixed(1)],
    ["samples", (r) => `${r.samples_obtained} of ${r.samples_requested}`],
  ];
  const head = make("thead", {}, make("tr", {}, columns.map(([name]) => make("th", {}, name))));
  const rows = data.results.map((result) => make("tr", {}, columns.map(([name, show]) => {
    const short_of = name === "samples" && result.samples_obtained !== result.samples_requested;
    return make("td", short_of ? { class: "warn", title: JSON.stringify(result.missing) } : {}, show(result));
  })));
  byId("result-table").append(head, make("tbody", {}, rows));
}
