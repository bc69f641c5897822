// Shows the Server-Timing header of a request as a bar.

import { h } from "./dom.js";
import { latency } from "./format.js";
import { t } from "./words.js";

/** Parses a header: `load;dur=0.0, tokenize;dur=0.4` → [["load", 0], ["tokenize", 0.0004]], in seconds. */
export function parseTimings(header) {
  return [...header.matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms) / 1000]);
}

/** `seconds`: duration measured in the browser; the part outside the server's timings is shown as the rest. */
export function timingsBar(header, seconds) {
  const parts = parseTimings(header);
  const rest = Math.max(0, seconds - parts.reduce((sum, [, part]) => sum + part, 0));
  const all = [...parts, ["rest", rest]];
  const bar = h("div", { class: "timings", "aria-hidden": "true" }, all.map(([name, part]) => {
    const block = h("div", { class: `time ${name}` });
    block.style.flexGrow = part / Math.max(seconds, 1e-9);
    return block;
  }));
  const list = h("dl", { class: "timing-list" }, all.map(([name, part]) =>
    h("div", {}, h("dt", {}, h("i", { class: `swatch time ${name}`, "aria-hidden": "true" }), t(`time.${name}`)), h("dd", {}, latency(part)))));
  return h("div", {}, h("h3", {}, t("play.timings")), bar, list);
}
