// How it was learned: small multiples, one for each metric, the stages laid over one another.

const TITLES = {
  "reward/total": "Reward",
  "reward/accuracy": "Accuracy while training",
  "reward/format": "Format reward",
  "reward/errors": "Rewards that failed",
  "length/mean": "Tokens a response",
  "length/max": "Longest response, tokens",
  "length/truncated": "Share cut off",
  "form/well_formed": "Share well-formed",
  "form/corrects_itself": "Share that corrects itself",
  "sampling/entropy": "Entropy of the sampler, nats",
  "sampling/kept_mass": "Mass kept by truncation",
  "policy/kl": "KL to the reference, nats a token",
  "policy/clip_fraction": "Share of tokens clipped",
  "policy/sequence_mask_rate": "Share of sequences masked",
  "policy/drift": "Drift of a sequence, nats a token",
  "policy/mismatch": "Mismatch of engine and trainer",
  "policy/ratio": "Importance ratio, quantiles",
  "policy/gradient_norm": "Gradient norm",
  "policy/learning_rate": "Learning rate",
  "loss": "Loss, nats a token",
};
const OPEN_GROUPS = ["reward", "length", "form", "sampling", "policy", "loss", "pretrain"];
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];

const stages = [...new Set(data.curves.flatMap((g) => g.charts.flatMap((c) => c.series.map((s) => s.stage))))];
const drawn = new Map();

function stageColour(stage) {
  return style(colourOf(stage, stages));
}

function showCurves() {
  if (!data.curves.length) {
    byId("curve-groups").append(make("p", { class: "empty" }, "No metrics have been written yet."));
    return;
  }
  const onSight = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) drawChart(entry.target);
  }, { rootMargin: "300px" });
  for (const group of data.curves) {
    const grid = make("div", { class: "chart-grid" }, group.charts.map((chart) => chartFrame(chart, onSight)));
    const open = OPEN_GROUPS.includes(group.prefix);
    const title = `${group.prefix} (${group.charts.length})`;
    byId("curve-groups").append(open
      ? make("div", {}, [make("h3", {}, group.prefix), grid])
      : make("details", {}, [make("summary", {}, title), grid]));
  }
  showStageLegend();
}

function showStageLegend() {
  const items = stages.map((stage) => make("span", { class: "legend" }, [
    make("i", { style: { borderTopColor: `var(${colourOf(stage, stages)})` } }), stage,
  ]));
  byId("curve-legend").append(...items);
}

function chartFrame(chart, onSight) {
  const title = TITLES[chart.key] || chart.key.split("/").slice(-1)[0].replaceAll("_", " ");
  const plot = make("div", { class: "plot" });
  plot.chart = chart;
  onSight.observe(plot);
  return make("figure", { class: "chart" }, [make("figcaption", {}, [capital(title), make("code", {}, chart.key)]), plot]);
}

function drawChart(plot, again = false) {
  if (drawn.has(plot) && !again) return;
  drawn.set(plot, true);
  const lines = [...new Set(plot.chart.series.map((series) => series.line))];
  const traces = plot.chart.series.map((series) => ({
    x: series.steps,
    y: series.values,
    name: [stages.length > 1 ? series.stage : "", series.line].filter(Boolean).join(" · ") || series.stage,
    mode: series.steps.length > 1 ? "lines" : "markers",
    line: { color: stageColour(series.stage), width: 1.8, dash: DASHES[lines.indexOf(series.line) % DASHES.length] },
    hovertemplate: "%{y:.4~g}",
  }));
  Plotly.react(plot, traces, chartLayout(plot.chart, lines.length > 1), { displayModeBar: false, responsive: true });
}

function chartLayout(chart, withLegend) {
  const negative = chart.series.some((series) => series.values.some((value) => value < 0));
  const axis = { gridcolor: style("--line"), zeroline: false, tickfont: { size: 10.5 }, linecolor: style("--line") };
  return {
    margin: { l: 46, r: 8, t: 10, b: 28 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--sans"), color: style("--muted"), size: 11 },
    xaxis: { ...axis, showgrid: false, nticks: 6 },
    yaxis: { ...axis, nticks: 5, exponentformat: "power", rangemode: negative ? "normal" : "nonnegative" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink"), size: 11 } },
    showlegend: withLegend,
    legend: { orientation: "h", y: -0.16, font: { size: 9.5 }, bgcolor: "rgba(0,0,0,0)" },
  };
}

function redrawCharts() {
  for (const plot of drawn.keys()) drawChart(plot, true);
}
