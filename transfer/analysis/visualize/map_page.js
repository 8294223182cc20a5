"use strict";
// Shows rows of attention maps over an image; the maps are bytes in #data, written by map_page.py.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const TOP = 127;

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

const colours = { heat: bytes(data.heat), signed: bytes(data.signed) };

// Decoded when an image is first shown: all images at once may be many megabytes.
function decoded(model) {
  if (!model.rows) {
    model.rows = new Int8Array(bytes(model.weights).buffer);
    model.scale = new Float32Array(bytes(model.scales).buffer);
    model.tokens = model.prefix.length + model.grid[0] * model.grid[1];
  }
  return model;
}

// The row of `token` in one map; maps of a layer are its heads and then the rollout.
function mapRow(model, layer, map, token) {
  const { rows, scale, tokens, heads } = decoded(model);
  const line = (layer * (heads + 1) + map) * tokens + token;
  return Array.from(rows.subarray(line * tokens, (line + 1) * tokens), (part) => (part / TOP) * scale[line]);
}

function headRow(model, layer, head, token) {
  if (head === "rollout") return mapRow(model, layer, model.heads, token);
  if (head !== "mean") return Number(head) < model.heads ? mapRow(model, layer, Number(head), token) : null;
  const sum = new Array(decoded(model).tokens).fill(0);
  for (let map = 0; map < model.heads; map++) {
    mapRow(model, layer, map, token).forEach((weight, key) => (sum[key] += weight / model.heads));
  }
  return sum;
}

// What is shown. `token` is the number of a patch, or the name of a prefix token: models differ in their prefix.
const state = { image: 0, layer: 0, head: "mean", token: 0, opacity: 0.8, shared: false };
const panels = new Map();

const models = () => data.images[state.image].models;

function tokenOf(model) {
  const prefix = model.prefix.indexOf(state.token);
  return typeof state.token === "number" ? state.token + model.prefix.length : prefix < 0 ? null : prefix;
}

// The row on show of a model, over all its tokens; null where it has no such head or token.
function shownRow(name) {
  const model = models()[name];
  const token = tokenOf(model);
  return token === null ? null : headRow(model, state.layer, state.head, token);
}

function element(tag, attributes, parent) {
  const made = Object.assign(document.createElement(tag), attributes);
  if (parent) parent.append(made);
  return made;
}

function buildPanels() {
  $("panels").replaceChildren();
  panels.clear();
  const { models: shown, url, size } = data.images[state.image];
  for (const name of Object.keys(shown).sort().reverse()) {
    const model = decoded(shown[name]);
    const [rows, columns] = model.grid;
    const section = element("section", { id: `panel-${name}` }, $("panels"));
    element("h3", { textContent: Object.keys(shown).length > 1 ? name : "attention" }, section);
    const stage = element("div", { className: "stage", tabIndex: 0 }, section);
    stage.setAttribute("role", "application");
    stage.setAttribute("aria-label", `${name}: ${rows} by ${columns} patches; arrow keys choose the patch that asks`);
    stage.style.aspectRatio = `${size[1]} / ${size[0]}`;
    stage.style.width = `min(100%, ${(68 * size[1]) / size[0]}vh)`;
    const image = element("img", { src: url, alt: data.images[state.image].name, draggable: false }, stage);
    image.className = size[1] > 160 ? "smooth" : "";
    const heat = element("canvas", { width: columns, height: rows }, stage);
    const mark = element("div", { className: "mark" }, stage);
    stage.addEventListener("pointerdown", (event) => choosePatch(event, stage, model));
    stage.addEventListener("keydown", (event) => pressKey(event, model));
    const bar = element("div", { className: "bar" }, section);
    const low = element("span", {}, bar);
    const ramp = element("canvas", { width: 256, height: 1 }, bar);
    const high = element("span", {}, bar);
    const buttons = element("div", { className: "prefix" }, section);
    for (const token of model.prefix) {
      element("button", { type: "button", textContent: token, onclick: () => ask(token) }, buttons);
    }
    const told = element("div", { className: "told" }, section);
    told.setAttribute("aria-live", "polite");
    panels.set(name, { model, heat, mark, low, ramp, high, buttons, told });
  }
}

function choosePatch(event, stage, model) {
  const box = stage.getBoundingClientRect();
  const [rows, columns] = model.grid;
  const place = (offset, length, count) => Math.min(count - 1, Math.max(0, Math.floor((offset / length) * count)));
  const row = place(event.clientY - box.top, box.height, rows);
  ask(row * columns + place(event.clientX - box.left, box.width, columns));
}

function pressKey(event, model) {
  const [rows, columns] = model.grid;
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const turn = { PageUp: -1, PageDown: 1 }[event.key];
  if (event.key in moves) {
    const from = typeof state.token === "number" ? state.token : 0;
    const row = Math.floor(from / columns) + moves[event.key][0];
    const column = (from % columns) + moves[event.key][1];
    if (row >= 0 && row < rows && column >= 0 && column < columns) ask(row * columns + column);
  } else if (turn) {
    $("layer").selectedIndex = Math.min(data.layers.length - 1, Math.max(0, state.layer + turn));
    change();
  } else return;
  event.preventDefault();
}

function ask(token) {
  state.token = token;
  draw();
}

function draw() {
  const rows = new Map([...panels.keys()].map((name) => [name, shownRow(name)]));
  const tops = [...rows].map(([name, row]) => (row ? strongest(row, panels.get(name).model) : 0));
  [...panels].forEach(([name, panel], index) => {
    drawPanel(panel, rows.get(name), state.shared ? Math.max(...tops) : tops[index]);
  });
}

// The weight that has the strongest colour, among patches. In a rollout the query's own residual outshines the others.
function strongest(row, model) {
  const skipped = state.head === "rollout" ? tokenOf(model) : null;
  return row.reduce((most, weight, key) =>
    (key < model.prefix.length || key === skipped ? most : Math.max(most, Math.abs(weight))), 0);
}

function drawPanel(panel, row, top) {
  const { model, heat } = panel;
  const [, columns] = model.grid;
  const signed = state.head !== "rollout" && model.signed[state.layer];
  const table = signed ? colours.signed : colours.heat;
  const patches = row ? row.slice(model.prefix.length) : [];
  paint(heat, table, patches.map((weight) => part(weight, top, signed)));
  heat.style.opacity = state.opacity;
  paint(panel.ramp, table, Array.from({ length: 256 }, (_, step) => step / 255));
  panel.low.textContent = signed ? (-top).toPrecision(2) : "0";
  panel.high.textContent = top.toPrecision(2);
  placeMark(panel.mark, model.grid);
  for (const button of panel.buttons.children) {
    button.setAttribute("aria-pressed", String(button.textContent === state.token));
  }
  panel.told.textContent = row ? told(row, model, columns) : "This model has no such head or token.";
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

function placeMark(mark, [rows, columns]) {
  mark.hidden = typeof state.token !== "number";
  mark.style.display = mark.hidden ? "none" : "block";
  if (mark.hidden) return;
  mark.style.left = `${(100 * (state.token % columns)) / columns}%`;
  mark.style.top = `${(100 * Math.floor(state.token / columns)) / rows}%`;
  mark.style.width = `${100 / columns}%`;
  mark.style.height = `${100 / rows}%`;
}

function patchName(patch, columns) {
  return `patch ${patch} (row ${Math.floor(patch / columns)}, column ${patch % columns})`;
}

function told(row, model, columns) {
  const asks = typeof state.token === "number" ? `Patch ${patchName(state.token, columns).slice(6)}` : `The ${state.token}`;
  const name = (key) => model.prefix[key] ?? patchName(key - model.prefix.length, columns);
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
  if (image !== state.image) {
    state.image = image;
    buildPanels();
  }
  draw();
}

function start() {
  const first = data.images[0].models;
  const heads = Math.max(...Object.values(first).map((model) => model.heads));
  fill($("image"), data.images.map((image, index) => [index, image.name]));
  fill($("layer"), data.layers.map((layer, index) => [index, `layer ${layer}`]));
  fill($("head"), [["mean", "mean of the heads"], ["rollout", "rollout up to the layer"],
    ...Array.from({ length: heads }, (_, head) => [head, `head ${head}`])]);
  $("layer").selectedIndex = state.layer = data.layers.length - 1;
  $("shared").style.display = Object.keys(first).length > 1 ? "" : "none";
  const prefix = first.student.prefix;
  state.token = prefix[data.query] ?? data.query - prefix.length;
  for (const id of ["image", "layer", "head", "opacity", "scale"]) $(id).addEventListener("input", change);
  buildPanels();
  draw();
}

start();
