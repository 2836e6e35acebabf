// What the indexers select: two maps a layer, dense attention and selection of one document, on one scale of colours.

const LEAST_SHOWN = 1e-3;
const CELL = 4;
const mapCanvases = [];
const mapView = { label: null };

function showMaps() {
  const known = data.selection_maps.length > 0;
  byId("selection").hidden = !known;
  hideLink("selection", !known);
  if (!known) return;
  mapView.label = data.selection_maps[data.selection_maps.length - 1].label;
  if (data.selection_maps.length > 1) byId("selection-controls").append(labelChoice());
  drawMaps();
}

function labelChoice() {
  const options = data.selection_maps.map((maps) => make("option", { value: maps.label, selected: maps.label === mapView.label }, maps.label));
  const choice = make("select", {}, options);
  choice.addEventListener("change", () => { mapView.label = choice.value; drawMaps(); });
  return make("label", {}, ["model", choice]);
}

function drawMaps() {
  const maps = data.selection_maps.find((each) => each.label === mapView.label);
  const width = Math.round(maps.num_tokens / (maps.edges.length - 1));
  const left_out = maps.num_layers - maps.layers.length;
  byId("selection-lead").textContent =
    `One held-out document of ${maps.num_tokens.toLocaleString("en")} tokens: queries run down, keys across, and a cell is about ` +
    `${width} by ${width} tokens. Left, where dense attention looks: the share of it, averaged over heads, that falls on the keys of ` +
    "a cell; a row adds up to 100%. Right, what the indexer selects: of the pairs of query and key in a cell, the share that is " +
    `selected; a query selects ${maps.top_k.toLocaleString("en")} keys. Where the left map is strong, the right one should be. Above ` +
    "the dashed line a query sees no more keys than that, and selects them all." +
    (left_out ? ` ${maps.layers.length} of ${maps.num_layers} layers are shown.` : "");
  byId("selection-maps").replaceChildren(...maps.layers.map((layer) => layerFigure(maps, layer)));
  mapCanvases.length = 0;
  mapCanvases.push(...document.querySelectorAll("#selection-maps canvas"));
  redrawMaps();
}

function layerFigure(maps, layer) {
  const found = maps.num_tokens > maps.top_k ? `${percent(layer.recall)} of the attention found` : "all keys selected";
  const last = (maps.num_tokens - 1).toLocaleString("en");
  const pair = [["Dense attention", layer.attention], ["Selected", layer.selected]].map(([title, values]) => {
    const size = CELL * values.length;
    const canvas = make("canvas", { width: size, height: size, role: "img", "aria-label": `Layer ${layer.layer}, ${title}` });
    canvas.map = { maps, layer, values };
    return make("div", { class: "map" }, [make("p", {}, title), canvas, make("div", { class: "ends" }, [make("span", {}, "key 0"), make("span", {}, last)])]);
  });
  return make("figure", { class: "map-pair" }, [
    make("figcaption", {}, [`Layer ${layer.layer}`, make("span", {}, found)]), make("div", { class: "maps" }, pair),
  ]);
}

function redrawMaps() {
  if (!data.selection_maps.length) return;
  const colours = mapColours();
  for (const canvas of mapCanvases) drawMap(canvas, colours);
  drawScale(colours);
}

function drawMap(canvas, colours) {
  const { maps, values } = canvas.map, pen = canvas.getContext("2d"), size = canvas.width;
  pen.clearRect(0, 0, size, size);
  values.forEach((row, i) => row.forEach((value, j) => {
    pen.fillStyle = colours[Math.round(255 * strengthOf(value))];
    pen.fillRect(CELL * j, CELL * i, CELL, CELL);
  }));
  if (maps.top_k >= maps.num_tokens) return;
  const y = Math.round((size * maps.top_k) / maps.num_tokens);
  pen.strokeStyle = style("--second");
  pen.lineWidth = 2;
  pen.setLineDash([7, 5]);
  pen.beginPath();
  pen.moveTo(0, y);
  pen.lineTo(size, y);
  pen.stroke();
}

/** From 0, for what is at most LEAST_SHOWN, to 1 for all of it: logarithmic, since both maps span three orders. */
function strengthOf(value) {
  return value <= LEAST_SHOWN ? 0 : 1 - Math.log(Math.min(value, 1)) / Math.log(LEAST_SHOWN);
}

/** 256 colours from the least shown to all. */
function mapColours() {
  const [low, middle, high] = ["--map-low", "--map-middle", "--map-high"].map((name) => style(name).split(",").map(Number));
  return Array.from({ length: 256 }, (_, i) => {
    const place = i / 127.5;
    const [from, to, share] = place <= 1 ? [low, middle, place] : [middle, high, place - 1];
    return `rgb(${from.map((value, channel) => Math.round(value + (to[channel] - value) * share)).join(", ")})`;
  });
}

function drawScale(colours) {
  const canvas = make("canvas", { width: 256, height: 1 }), pen = canvas.getContext("2d");
  colours.forEach((colour, i) => { pen.fillStyle = colour; pen.fillRect(i, 0, 1, 1); });
  byId("selection-scale").replaceChildren(
    make("span", {}, `${100 * LEAST_SHOWN}% or less`), canvas, make("span", {}, "100%, for both maps; steps of colour are equal ratios"),
  );
}

/** What the tooltip says of the cell under the pointer; null where there is none. */
function mapTooltip(event) {
  const canvas = event.target;
  if (!canvas.map) return null;
  const { maps, layer } = canvas.map, box = canvas.getBoundingClientRect();
  const cell = (offset, extent) => Math.min(maps.edges.length - 2, Math.max(0, Math.floor((offset / extent) * (maps.edges.length - 1))));
  const i = cell(event.clientY - box.top, box.height), j = cell(event.clientX - box.left, box.width);
  if (j > i) return null;
  return [make("b", {}, `layer ${layer.layer}`), definitions([
    ["queries", binText(maps, i)], ["keys", binText(maps, j)],
    ["attention", exactly(layer.attention[i][j])], ["selected", exactly(layer.selected[i][j])],
  ])];
}

const exactly = (share) => (share > 0 && share < 1e-3 ? "less than 0.1%" : percent(share));

function binText(maps, bin) {
  const [first, last] = [maps.edges[bin], maps.edges[bin + 1] - 1];
  const text = maps.beginnings[bin].map((id) => data.tokens[id]).join("");
  return `${first.toLocaleString("en")}–${last.toLocaleString("en")} ${JSON.stringify(text.slice(0, 40))}`;
}
