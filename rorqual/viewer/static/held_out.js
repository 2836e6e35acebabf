// What sparse attention costs: a table with a row for each stage that was measured on held-out text.

function showHeldOut() {
  if (!data.held_out.length) return;
  byId("held-out").hidden = false;
  for (const [id, rows] of [["results", data.results], ["rollouts", data.rollouts]]) {
    byId(id).hidden = !rows.length;
    document.querySelector(`nav a[href="#${id}"]`).hidden = !rows.length;
  }
  byId("held-out-notes").textContent = notesOn(data.held_out.map((row) => row.label));
  const layers = Math.max(...data.held_out.map((row) => row.recall_by_layer.length));
  const columns = [
    ["model", (row) => row.label],
    ["nats a token", (row) => row.cross_entropy.toFixed(4)],
    ["against dense", (row, index) => (index ? relative(row.gap) : "–")],
    ["KL over uniform's", (row) => (row.kl_over_uniform === null ? "–" : row.kl_over_uniform.toFixed(2))],
    ["attention found", (row) => percent(row.recall)],
    ...Array.from({ length: layers }, (_, layer) => [`layer ${layer}`, (row) => percent(row.recall_by_layer[layer])]),
  ];
  const head = make("thead", {}, make("tr", {}, columns.map(([name]) => make("th", {}, name))));
  const rows = data.held_out.map((row, index) => make("tr", {}, columns.map(([, show]) => make("td", {}, show(row, index)))));
  byId("held-out-table").append(head, make("tbody", {}, rows));
}
