"use strict";
// Shows rows of attention maps over an image; the maps are bytes in #data, written by map_page.py.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const TOP = 127;

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

const colours = { heat: bytes(data.heat), signed: bytes(data.signed) };

// Decoded when a layer is first shown: all images at once may be many megabytes.
function decoded(map) {
  if (!map.rows) {
    map.rows = new Int8Array(bytes(map.weights).buffer);
    map.scale = new Float32Array(bytes(map.scales).buffer);
  }
  return map;
}

// The weights that `token` gives to the keys of a map.
function mapRow(map, token) {
  const { rows, scale, keys } = decoded(map);
  return Array.from(rows.subarray(token * keys, (token + 1) * keys), (part) => (part / TOP) * scale[token]);
}

// The weights of a window's keys among all tokens of the grid; keys of padding have the place -1.
function overGrid(layer, row, token) {
  const { keys, grid } = layer;
  if (!keys.windows) return row;
  if (!keys.tokens) keys.tokens = new Int32Array(bytes(keys.windows).buffer);
  const whole = new Array(grid[0] * grid[1]).fill(0);
  row.forEach((weight, key) => {
    const place = keys.tokens[token * row.length + key];
    if (place >= 0) whole[place] += weight;
  });
  return whole;
}

// The maps of a head of the student: of a teacher those that it learned from, whose mean is shown.
function headsOf(layer, head) {
  return layer.groups ? (layer.groups[head] ?? []).map((each) => layer.heads[each]) : layer.heads.slice(head, head + 1);
}

// The row of a head, of the mean of the heads, or of the rollout; null where the layer has no such head.
function headRow(layer, head, token) {
  if (head === "rollout") return layer.rollout && mapRow(layer.rollout, token);
  const heads = head === "mean" ? layer.heads : headsOf(layer, Number(head));
  if (!heads.length) return null;
  const rows = heads.map((map) => mapRow(map, token));
  const mean = rows[0].map((_, key) => rows.reduce((sum, row) => sum + row[key], 0) / rows.length);
  return overGrid(layer, mean, token);
}

// What is shown. `asking` is a place in the image, down and to the right in parts of its sides, or the word of a prefix
// token: layers differ in their grids, and models in their prefix.
const state = { image: 0, layer: 0, head: "mean", asking: [0, 0], opacity: 0.8, shared: true, merge: "" };
const panels = new Map();

const models = () => data.images[state.image].models;
const layerOf = (name) => models()[name][state.layer];

// The patch at the place that asks, [row, column]; null for a prefix token.
function patchOf(layer) {
  if (typeof state.asking === "string") return null;
  return state.asking.map((part, side) => Math.min(layer.grid[side] - 1, Math.floor(part * layer.grid[side])));
}

function tokenOf(layer) {
  const patch = patchOf(layer);
  if (patch) return layer.prefix.length + patch[0] * layer.grid[1] + patch[1];
  const prefix = layer.words.indexOf(state.asking);
  return prefix < 0 ? null : prefix;
}

// The row on show of a model: prefix tokens, then the grid of the keys; null where it has no such head or token.
function shownRow(name) {
  const layer = layerOf(name);
  const token = tokenOf(layer);
  return token === null ? null : headRow(layer, state.head, token);
}

// The grid that the row on show lies on, and the parts of the image that it covers. A rollout is over tokens.
function shownGrid(layer) {
  return state.head === "rollout" ? { grid: layer.grid, extent: [1, 1] } : layer.keys;
}

function element(tag, attributes, parent) {
  const made = Object.assign(document.createElement(tag), attributes);
  if (parent) parent.append(made);
  return made;
}

function buildPanels() {
  $("panels").replaceChildren();
  panels.clear();
  const { models: shown, seen } = data.images[state.image];
  for (const name of Object.keys(shown).sort().reverse()) {
    const { url, size } = seen[name];
    const section = element("section", { id: `panel-${name}` }, $("panels"));
    element("h3", { textContent: Object.keys(shown).length > 1 ? `${name}: ${data.names[name]}` : "attention" }, section);
    const stage = element("div", { className: "stage", tabIndex: 0 }, section);
    stage.setAttribute("role", "application");
    stage.style.aspectRatio = `${size[1]} / ${size[0]}`;
    stage.style.width = `min(100%, ${(68 * size[1]) / size[0]}vh)`;
    const image = element("img", { src: url, alt: data.images[state.image].name, draggable: false }, stage);
    image.className = size[1] > 160 ? "smooth" : "";
    const heat = element("canvas", {}, stage);
    const mark = element("div", { className: "mark" }, stage);
    const dots = buildDots(stage);
    stage.addEventListener("pointerdown", (event) => choosePlace(event, stage, layerOf(name)));
    stage.addEventListener("keydown", (event) => pressKey(event, layerOf(name)));
    const bar = element("div", { className: "bar" }, section);
    const low = element("span", {}, bar);
    const ramp = element("canvas", { width: 256, height: 1 }, bar);
    const high = element("span", {}, bar);
    const buttons = element("div", { className: "prefix" }, section);
    const told = element("div", { className: "told" }, section);
    told.setAttribute("aria-live", "polite");
    panels.set(name, { stage, heat, mark, dots, low, ramp, high, buttons, told });
  }
}

// Ask the patch at a place, from its middle: another layer may have smaller patches.
function askPatch(layer, row, column) {
  ask([(row + 0.5) / layer.grid[0], (column + 0.5) / layer.grid[1]]);
}

function choosePlace(event, stage, layer) {
  const box = stage.getBoundingClientRect();
  const [rows, columns] = layer.grid;
  const place = (offset, length, count) => Math.min(count - 1, Math.max(0, Math.floor((offset / length) * count)));
  const row = place(event.clientY - box.top, box.height, rows);
  askPatch(layer, row, place(event.clientX - box.left, box.width, columns));
}

function pressKey(event, layer) {
  const [rows, columns] = layer.grid;
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const turn = { PageUp: -1, PageDown: 1 }[event.key];
  if (event.key in moves) {
    const from = patchOf(layer) ?? [0, 0];
    const [row, column] = from.map((at, side) => at + moves[event.key][side]);
    if (row >= 0 && row < rows && column >= 0 && column < columns) askPatch(layer, row, column);
  } else if (turn) {
    $("layer").selectedIndex = Math.min(data.layers.length - 1, Math.max(0, state.layer + turn));
    change();
  } else return;
  event.preventDefault();
}

function ask(place) {
  state.asking = place;
  draw();
}

function draw() {
  const rows = new Map([...panels.keys()].map((name) => [name, shownRow(name)]));
  const tops = [...rows].map(([name, row]) => (row ? strongest(row, layerOf(name)) : 0));
  [...panels].forEach(([name, panel], index) => {
    drawPanel(name, panel, rows.get(name), state.shared ? Math.max(...tops) : tops[index]);
  });
}

// The weight that has the strongest colour, among patches. In a rollout the query's own residual outshines the others.
function strongest(row, layer) {
  const skipped = state.head === "rollout" ? tokenOf(layer) : null;
  return row.reduce((most, weight, key) =>
    (key < layer.prefix.length || key === skipped ? most : Math.max(most, Math.abs(weight))), 0);
}

function drawPanel(name, panel, row, top) {
  const { heat } = panel;
  const layer = layerOf(name);
  const signed = state.head !== "rollout" && layer.signed;
  const table = signed ? colours.signed : colours.heat;
  const { grid, extent } = shownGrid(layer);
  [heat.height, heat.width] = grid;
  [heat.style.height, heat.style.width] = extent.map((part) => `${100 * part}%`);
  const patches = row ? row.slice(layer.prefix.length) : [];
  paint(heat, table, patches.map((weight) => part(weight, top, signed)));
  heat.style.opacity = state.opacity;
  paint(panel.ramp, table, Array.from({ length: 256 }, (_, step) => step / 255));
  panel.low.textContent = signed ? (-top).toPrecision(2) : "0";
  panel.high.textContent = top.toPrecision(2);
  placeMark(panel.mark, layer);
  drawMerge(panel.dots, data.images[state.image].merges[name]);
  const [rows, columns] = layer.grid;
  panel.stage.setAttribute("aria-label", `${name}: ${rows} by ${columns} patches; arrow keys choose the patch that asks`);
  fillButtons(panel.buttons, layer);
  panel.told.textContent = row ? told(row, layer, grid[1]) : `This ${layer.alone ? "layer has no partner" : layer.heads.length ? "model has no such head or token" : "layer has no attention"}.`;
}

function fillButtons(buttons, layer) {
  buttons.replaceChildren();
  layer.prefix.forEach((textContent, index) => {
    const word = layer.words[index];
    const button = element("button", { type: "button", textContent, onclick: () => ask(word) }, buttons);
    button.setAttribute("aria-pressed", String(word === state.asking));
  });
}

// Where a weight lies on the colour scale, 0 to 1.
function part(weight, top, signed) {
  const place = top > 0 ? weight / top : 0;
  return signed ? (place + 1) / 2 : place;
}

function paint(canvas, table, parts) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  parts.forEach((value, index) => {
    const colour = 3 * Math.round(255 * Math.min(1, Math.max(0, value)));
    pixels.data.set([table[colour], table[colour + 1], table[colour + 2], 255], 4 * index);
  });
  context.putImageData(pixels, 0, 0);
}

function placeMark(mark, layer) {
  const patch = patchOf(layer);
  mark.hidden = patch === null;
  mark.style.display = mark.hidden ? "none" : "block";
  if (mark.hidden) return;
  const [rows, columns] = layer.grid;
  mark.style.left = `${(100 * patch[1]) / columns}%`;
  mark.style.top = `${(100 * patch[0]) / rows}%`;
  mark.style.width = `${100 / columns}%`;
  mark.style.height = `${100 / rows}%`;
}

function patchName(patch, columns) {
  return `patch ${patch} (row ${Math.floor(patch / columns)}, column ${patch % columns})`;
}

function told(row, layer, columns) {
  const prefix = layer.prefix;
  const patch = patchOf(layer);
  const asks = patch
    ? `Patch ${patchName(patch[0] * layer.grid[1] + patch[1], layer.grid[1]).slice(6)}`
    : `The ${prefix[layer.words.indexOf(state.asking)]}`;
  const reduced = row.length < prefix.length + layer.grid[0] * layer.grid[1];
  const name = (key) =>
    prefix[key] ?? patchName(key - prefix.length, columns).replace("patch", reduced ? "reduced key" : "patch");
  const order = row.map((_, key) => key).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a]));
  const most = order.slice(0, 3).map((key) => `${name(key)} ${row[key].toPrecision(2)}`);
  return `${asks} attends most to: ${most.join("; ")}.`;
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function change() {
  const image = Number($("image").value);
  state.layer = $("layer").selectedIndex;
  state.head = $("head").value;
  state.opacity = Number($("opacity").value) / 100;
  state.shared = $("scale").checked;
  state.merge = $("merge").value;
  if (image !== state.image) {
    state.image = image;
    buildPanels();
  }
  draw();
}

function start() {
  const layers = Object.values(data.images[0].models).flat();
  const heads = Math.max(...layers.map((layer) => layer.heads.length));
  fill($("image"), data.images.map((image, index) => [index, image.name]));
  fill($("layer"), data.layers.map((layer, index) => [index, layer]));
  const stages = new Set(layers.map((layer) => String(layer.grid))).size > 1;
  const rollout = ["rollout", `rollout ${stages ? "in the stage " : ""}up to the layer`];
  fill($("head"), [["mean", "mean of the heads"], ...(layers.some((layer) => layer.rollout) ? [rollout] : []),
    ...Array.from({ length: heads }, (_, head) => [head, `head ${head}`])]);
  $("layer").selectedIndex = state.layer = data.layers.length - 1;
  $("shared").style.display = Object.keys(data.images[0].models).length > 1 ? "" : "none";
  const merges = Object.values(data.images[0].merges).sort((a, b) => b.length - a.length)[0];
  fill($("merge"), mergeOptions(merges));
  $("merges").style.display = merges.length ? "" : "none";
  state.asking = data.query;
  for (const id of ["image", "layer", "head", "opacity", "scale", "merge"]) $(id).addEventListener("input", change);
  buildPanels();
  draw();
}

start();
