// What training did to held-out text: figures that matter, a table with a row for each measured model, and charts.

const heldOutPlots = [];

function showHeldOut() {
  const rows = data.held_out, known = rows.length > 0;
  byId("held-out").hidden = !known;
  hideLink("held-out", !known);
  if (!known) return;
  for (const [id, shown] of [["results", data.results], ["rollouts", data.rollouts]]) {
    byId(id).hidden = !shown.length;
    hideLink(id, !shown.length);
  }
  const sparse = rows.some((row) => row.recall !== null);
  if (!sparse) {
    byId("held-out-title").textContent = "Held-out text";
    byId("held-out-lead").textContent = "Text that the model was not trained on.";
  }
  byId("held-out-notes").textContent = notesOn(rows.map((row) => row.label));
  byId("held-out-cards").append(...heldOutCards(rows));
  table(byId("held-out-table"), heldOutColumns(rows), rows);
  if (sparse) addHeldOutChart("Attention found by layer", recallTraces, { title: "layer", dtick: layerStep(rows) });
  if (rows.some((row) => row.needles !== null)) addHeldOutChart("Needles recalled by depth", needleTraces, { title: "depth, % of the text", dtick: 25 });
  if (sparse) showRecallTable(rows);
}

function hideLink(id, hidden) {
  document.querySelector(`nav a[href="#${id}"]`).hidden = hidden;
}

/** The figures of the model with a selection that was measured last. */
function heldOutCards(rows) {
  const indexed = rows.filter((row) => row.recall !== null);
  if (!indexed.length) return [];
  const last = indexed[indexed.length - 1], first = indexed[0];
  const before = (show) => (last === first ? "" : `; ${show(first)} after ${first.label}`);
  const cards = [[nats(last.difference), `${relative(last.gap)} of the loss: ${last.label} against the dense base`]];
  if (last.control_difference !== null) {
    cards.push([nats(last.control_difference), `${relative(last.control_gap)} of the loss: ${last.label} against the control, trained on as many tokens`]);
  }
  cards.push([last.kl_over_uniform.toFixed(2), `KL over uniform's, 0 is best${before((row) => row.kl_over_uniform.toFixed(2))}`]);
  cards.push([percent(last.recall), `of dense attention found, mean over layers${before((row) => percent(row.recall))}`]);
  return cards.map(([figure, words]) => make("li", {}, [make("b", {}, figure), make("span", {}, words)]));
}

function heldOutColumns(rows) {
  const columns = [["model", (row) => row.label], ["nats a token", (row) => row.cross_entropy.toFixed(4)]];
  if (rows.length > 1) {
    columns.push(["minus dense, nats", (row, index) => (index ? fourDigits(row.difference) : "–")],
      ["against dense", (row, index) => (index ? relative(row.gap) : "–")]);
  }
  if (rows.some((row) => row.control_gap !== null)) {
    columns.push(["minus control, nats", (row) => (row.control_gap === null ? "–" : fourDigits(row.control_difference))],
      ["against control", (row) => (row.control_gap === null ? "–" : relative(row.control_gap))]);
  }
  if (rows.some((row) => row.recall !== null)) {
    columns.push(["KL over uniform's", (row) => (row.kl_over_uniform === null ? "–" : row.kl_over_uniform.toFixed(2))],
      ["attention found", (row) => percent(row.recall)]);
  }
  if (rows.some((row) => row.needles !== null)) columns.push(["needles recalled", (row) => percent(row.needles)]);
  return columns;
}

const fourDigits = (value) => (value > 5e-5 ? "+" : value < -5e-5 ? "−" : "±") + Math.abs(value).toFixed(4);
const nats = (value) => `${fourDigits(value)} nats`;
const layerStep = (rows) => Math.ceil(Math.max(...rows.map((row) => row.recall_by_layer.length)) / 16);

function showRecallTable(rows) {
  const indexed = rows.filter((row) => row.recall !== null);
  const layers = indexed[0].recall_by_layer.map((_, layer) => layer);
  const columns = [["indexer", (layer) => String(layer)], ...indexed.map((row) => [row.label, (layer) => percent(row.recall_by_layer[layer])])];
  const element = make("table");
  table(element, columns, layers);
  byId("held-out-details").append(make("details", {}, [
    make("summary", {}, "Attention found by layer, as a table"), make("div", { class: "scroll" }, element),
  ]));
}

function heldOutColour(label) {
  return style(colourOf(label === "dense" ? "base" : label, data.held_out.map((row) => row.label).filter((name) => name !== "dense")));
}

function recallTraces() {
  return data.held_out.filter((row) => row.recall !== null).map((row) => ({
    type: "bar", name: row.label, x: row.recall_by_layer.map((_, layer) => layer), y: row.recall_by_layer,
    marker: { color: heldOutColour(row.label) }, hovertemplate: `%{y:.1%}<extra>${row.label}</extra>`,
  }));
}

function needleTraces() {
  return data.held_out.filter((row) => row.needles !== null).map((row) => ({
    mode: "lines+markers", name: row.label, x: row.needles_by_depth.map(([depth]) => depth), y: row.needles_by_depth.map(([, share]) => share),
    line: { color: heldOutColour(row.label), width: 1.8 }, hovertemplate: `%{y:.1%}<extra>${row.label}</extra>`,
  }));
}

function addHeldOutChart(title, traces, horizontal) {
  const plot = make("div", { class: "plot" });
  byId("held-out-charts").append(make("figure", { class: "chart" }, [make("figcaption", {}, title), plot]));
  heldOutPlots.push({ plot, traces, horizontal });
  drawHeldOut(heldOutPlots[heldOutPlots.length - 1]);
}

function drawHeldOut({ plot, traces, horizontal }) {
  const layout = chartLayout({ series: [] }, true);
  layout.margin = { l: 46, r: 8, t: 10, b: 34 };
  layout.xaxis = { ...layout.xaxis, title: { text: horizontal.title, standoff: 4, font: { size: 10.5 } }, dtick: horizontal.dtick };
  layout.yaxis = { ...layout.yaxis, tickformat: ".0%", range: [0, 1.03] };
  layout.legend = { orientation: "h", y: 1.02, yanchor: "bottom", font: { size: 10.5 }, bgcolor: "rgba(0,0,0,0)" };
  Plotly.react(plot, traces(), { ...layout, bargap: 0.3 }, { displayModeBar: false, responsive: true });
}

function redrawHeldOut() {
  heldOutPlots.forEach(drawHeldOut);
}
