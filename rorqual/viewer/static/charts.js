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
  "policy/loss": "Surrogate loss, nats a token",
  "policy/loss/kl": "KL term of the loss, nats a token",
  "policy/zero_advantage_sequences": "Sequences without advantage",
  "policy/num_tokens": "Tokens trained on",
  "indexer/kl": "KL of the indexers, nats a token",
  "indexer/uniform": "KL of an indexer that knows nothing",
  "cross_entropy": "Cross-entropy, nats a token",
  "num_tokens": "Tokens trained on",
  "sampling/num_tokens": "Tokens sampled",
  "gradient_norm": "Gradient norm",
  "learning_rate": "Learning rate",
  "seconds": "Seconds a step",
  "first_update/mismatch": "Mismatch of engine and trainer, first update",
  "first_update/ratio": "Importance ratio, first update",
  "policy/gradient_norm": "Gradient norm",
  "policy/learning_rate": "Learning rate",
  "loss": "Loss, nats a token",
};
const OPEN_GROUPS = ["reward", "length", "form", "sampling", "policy", "loss", "indexer", "pretrain"];
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
const STAGE_NOTES = {
  pretrain: data.recipe === "pretrain_text" ? "trained from random weights" : "the base is pre-trained from random weights",
  base: "what training starts from",
  rl: "trained from the base by reinforcement learning",
  dense: "what training starts from",
  warmup: "the indexers alone learn, and attention is still dense",
  sparse: "everything learns, and attention sees the selected keys alone",
  control: data.recipe === "sparsify"
    ? "the dense base, trained on for the sparse stage's texts"
    : "the same training with its rewards shuffled within the batch, so what it gains does not come from them",
};

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
  byId("curve-notes").textContent = notesOn(stages);
}

/** One sentence on what the names of stages or policies mean; names that are not known are left out. */
function notesOn(names) {
  const known = names.filter((name) => STAGE_NOTES[name]).map((name) => `${name}: ${STAGE_NOTES[name]}`);
  return known.length ? `${known.join("; ")}.` : "";
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
  const named = new Set();
  const traces = plot.chart.series.map((series) => {
    const first = !named.has(series.line);
    named.add(series.line);
    return {
      x: series.steps,
      y: series.values,
      name: series.line || series.stage,
      legendgroup: series.line,
      showlegend: first && series.line !== "",
      mode: series.steps.length > 1 ? "lines" : "markers",
      line: { color: stageColour(series.stage), width: 1.8, dash: DASHES[lines.indexOf(series.line) % DASHES.length] },
      hovertemplate: `%{y:.4~g}<extra>${[stages.length > 1 ? series.stage : "", series.line].filter(Boolean).join(" · ")}</extra>`,
    };
  });
  Plotly.react(plot, traces, chartLayout(plot.chart, lines.length > 1), { displayModeBar: false, responsive: true });
}

/** Room around a constant, which has no spread of its own: the scale begins at 0 and the line lies in the middle, or at its foot. */
function constantRange(chart) {
  const values = chart.series.flatMap((series) => series.values).filter((value) => value !== null);
  const low = Math.min(...values), high = Math.max(...values);
  if (!values.length || high - low > 1e-6 * Math.max(Math.abs(low), Math.abs(high))) return null;
  if (high === 0) return [-0.05, 1];
  return high > 0 ? [0, 2 * high] : [2 * low, 0];
}

function chartLayout(chart, withLegend) {
  const negative = chart.series.some((series) => series.values.some((value) => value < 0));
  const constant = constantRange(chart);
  const scale = constant ? { range: constant } : { rangemode: negative ? "normal" : "nonnegative" };
  const axis = { gridcolor: style("--line"), zeroline: false, tickfont: { size: 10.5 }, linecolor: style("--line") };
  return {
    margin: { l: 46, r: 8, t: 10, b: 28 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--sans"), color: style("--muted"), size: 11 },
    xaxis: { ...axis, showgrid: false, nticks: 6 },
    yaxis: { ...axis, nticks: 5, exponentformat: "power", ...scale },
    hovermode: "x unified",
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink"), size: 11 } },
    showlegend: withLegend,
    legend: { orientation: "h", y: -0.16, font: { size: 9.5 }, bgcolor: "rgba(0,0,0,0)" },
  };
}

function redrawCharts() {
  for (const plot of drawn.keys()) drawChart(plot, true);
}
