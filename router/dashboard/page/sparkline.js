// A sparkline of the last minute. The numbers are beside it, so it has only a label.

import { set, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [96, 22];

export function sparkline() {
  const area = svg("path", { class: "spark-area" });
  const line = svg("path", { class: "spark-line" });
  const node = svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none", hidden: true }, area, line);
  const update = (points, words) => {
    const top = Math.max(...points, 1e-9);
    const step = WIDTH / Math.max(1, points.length - 1);
    const shown = points.length === 1 ? [points[0], points[0]] : points;
    const path = shown.map((value, index) => `${(index * step).toFixed(1)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1)}`);
    set(line, "d", `M${path.join("L")}`);
    set(area, "d", `M0,${HEIGHT}L${path.join("L")}L${WIDTH},${HEIGHT}Z`);
    set(node, "aria-label", words);
  };
  return { node, update };
}
