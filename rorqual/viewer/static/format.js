// Small helpers: elements, numbers, colours.

const data = JSON.parse(document.getElementById("data").textContent);

/** A new element. `content` is text, an element, or a list of both; text never becomes markup. */
function make(tag, attributes = {}, content = []) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...(Array.isArray(content) ? content : [content]));
  return element;
}

/** A list of names and what they are. */
function definitions(rows) {
  return make("dl", {}, rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

function table(element, columns, rows) {
  const head = make("thead", {}, make("tr", {}, columns.map(([name]) => make("th", {}, name))));
  const body = rows.map((row, index) => make("tr", {}, columns.map(([, show]) => make("td", {}, show(row, index)))));
  element.replaceChildren(head, make("tbody", {}, body));
}

const byId = (id) => document.getElementById(id);
const capital = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);
const percent = (share) => (share === null || share === undefined ? "–" : (100 * share).toFixed(1) + "%");
const points = (share) => (share > 0 ? "+" : share < 0 ? "−" : "±") + Math.abs(100 * share).toFixed(1);
const relative = (share) => (share > 5e-5 ? "+" : share < -5e-5 ? "−" : "±") + Math.abs(100 * share).toFixed(2) + "%";
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(3);
const range = (interval) => (interval ? `${percent(interval.low)} – ${percent(interval.high)}` : "–");

function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1000 || size < 0.001 ? value.toExponential(2) : value.toPrecision(3);
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const LINE_COLOURS = ["--accent", "--third", "--fourth"];

/** The variable that holds the colour of a stage or policy: what was trained, its control and its base differ at sight. */
function colourOf(name, names) {
  if (/control/.test(name)) return "--second";
  if (/^(base|pretrain)/.test(name)) return "--base";
  const others = names.filter((other) => !/control|^base|^pretrain/.test(other));
  return LINE_COLOURS[others.indexOf(name) % LINE_COLOURS.length];
}

/** `rgba(...)` of one of the token scales (heat, cool, up, down, kept); strength runs from 0 to 1. */
function tint(scale, strength) {
  const [r, g, b] = ["r", "g", "b"].map((channel) => style(`--${scale}-${channel}`));
  return `rgba(${r}, ${g}, ${b}, ${(0.62 * Math.max(0, Math.min(1, strength))).toFixed(3)})`;
}
