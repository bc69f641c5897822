// Shows vectors and their cosine similarities.

import { h } from "./dom.js";
import { number } from "./format.js";
import { t } from "./words.js";

const MAX_CELLS = 24; // texts in the heat map; more would be unreadable

export function cosine(a, b) {
  let [dot, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return dot / Math.sqrt(aa * bb);
}

/** Builds the heat map as a table, so that it is readable without colours. */
export function heatMap(texts, vectors) {
  const shown = vectors.slice(0, MAX_CELLS);
  const head = h("tr", {}, h("td"), shown.map((_, index) => h("th", { scope: "col", title: texts[index] }, index + 1)));
  const rows = shown.map((row, i) => h("tr", {},
    h("th", { scope: "row", title: texts[i] }, h("span", { class: "index" }, i + 1), h("span", { class: "excerpt" }, texts[i])),
    shown.map((column, j) => heatCell(i === j ? 1 : cosine(row, column)))));
  return h("div", {}, h("h3", {}, t("play.heat")),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": t("play.heat") },
      h("table", { class: "heat" }, h("thead", {}, head), h("tbody", {}, rows))));
}

function heatCell(value) {
  const cell = h("td", { class: "warmth" }, number(Math.round(value * 100) / 100 || 0, 2)); // no -0.00
  cell.style.setProperty("--heat", Math.max(0, Math.min(1, value)).toFixed(3));
  return cell;
}

export function vectorList(texts, vectors) {
  const entries = vectors.map((vector, index) => {
    const strip = h("canvas", { "aria-hidden": "true", width: vector.length, height: "1" });
    paint(strip, vector);
    const all = h("pre", { tabindex: "0", "aria-label": t("play.vector", { index: index + 1, text: texts[index] }) });
    const details = h("details", {}, h("summary", {}, h("span", { class: "index" }, index + 1),
      h("span", { class: "numbers" }, `${vector.slice(0, 4).map((value) => value.toFixed(4)).join("  ")}  …`)), all);
    details.addEventListener("toggle", () => (all.textContent = details.open ? JSON.stringify(vector) : ""));
    return h("li", {}, strip, details);
  });
  return h("div", {}, h("h3", {}, t("play.vectors")), h("ol", { class: "vectors" }, entries));
}

/** Draws one pixel per component: accent colour above 0, grey below, faint near 0. */
function paint(canvas, vector) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(vector.length, 1);
  const top = vector.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-12);
  vector.forEach((value, index) => {
    const colour = value > 0 ? [47, 143, 117] : [128, 128, 128];
    image.data.set([...colour, Math.round(255 * Math.sqrt(Math.abs(value) / top))], index * 4);
  });
  context.putImageData(image, 0, 0);
}
