"use strict";
// Shows the places of the image that deformable merges read; part of map_page.js, whose `state` and `bytes` it uses.

function buildDots(stage) {
  const paths = '<path class="area"/><path class="places"/>';
  stage.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 1 1" preserveAspectRatio="none">${paths}</svg>`);
  return stage.lastElementChild;
}

// The four places that a merged token reads, [down, right] in parts of the image.
function placesOf(merge, row, column) {
  merge.read ??= new Float32Array(bytes(merge.places).buffer);
  const start = 8 * (row * merge.grid[1] + column);
  return [0, 2, 4, 6].map((at) => [merge.read[start + at], merge.read[start + at + 1]]);
}

// The token of a merge over the image's place that asks; null where there is none.
function mergedToken(merge) {
  if (typeof state.asking === "string") return null;
  const token = state.asking.map((part, side) => Math.floor(part / (2 * merge.token[side])));
  return token.every((at, side) => at < merge.grid[side]) ? token : null;
}

// The places that a token reads, and those of the tokens there, down to the first merge of `merges`.
function traced(merges, token) {
  let tokens = [token];
  let places = [];
  for (const merge of [...merges].reverse()) {
    const inside = tokens.filter((at) => at.every((index, side) => index >= 0 && index < merge.grid[side]));
    places = inside.flatMap(([row, column]) => placesOf(merge, row, column));
    tokens = places.map((place) => place.map((part, side) => Math.floor(part / merge.token[side])));
  }
  return places;
}

function everyPlace(merge) {
  const [rows, columns] = merge.grid;
  return Array.from({ length: rows * columns }, (_, at) => placesOf(merge, Math.floor(at / columns), at % columns)).flat();
}

// Draw the places of the chosen merge, and the area that an ordinary merge would read for the token that asks.
function drawMerge(svg, merges) {
  const [number, what] = state.merge.split(":");
  const merge = (state.merge && merges[Number(number)]) || null;
  const token = merge ? mergedToken(merge) : null;
  let places = [];
  if (what === "all" && merge) places = everyPlace(merge);
  else if (token) places = what === "one" ? placesOf(merge, ...token) : traced(merges.slice(0, Number(number) + 1), token);
  svg.lastChild.setAttribute("d", places.map(([down, right]) => `M${right} ${down}h0`).join(""));
  const [tall, wide] = merge ? merge.token.map((part) => 2 * part) : [0, 0];
  svg.firstChild.setAttribute("d", token && what !== "all"
    ? `M${token[1] * wide} ${token[0] * tall}h${wide}v${tall}h${-wide}z` : "");
}

// What the control of merges offers; `merges` are those of the model that has most.
function mergeOptions(merges) {
  const words = (merge, number) => [
    [`${number}:all`, `${merge.name}, all tokens`],
    [`${number}:one`, `${merge.name}, the token`],
    ...(number ? [[`${number}:down`, `${merge.name}, the token down to stage 1`]] : []),
  ];
  return [["", "not shown"], ...merges.flatMap(words)];
}
