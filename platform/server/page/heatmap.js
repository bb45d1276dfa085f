// Expert load: one row per MoE layer, one column per training step or moment. Drawn on a canvas, because a large model
// has sixty layers.

import { STEPS } from "./axes.js";
import { h, patch } from "./dom.js";

// cividis: perceptually uniform, also for colour-blind readers (Nuñez et al. 2018)
const STOPS = [
  [0, 34, 78],
  [54, 69, 108],
  [108, 109, 114],
  [164, 154, 116],
  [217, 203, 100],
  [254, 232, 56],
];

/** `along`: what the columns are, as for a chart. */
export function heatmap(place, along = STEPS) {
  const canvas = h("canvas", { tabindex: 0, role: "img" });
  const value = h("span", { class: "chart-value" }),
    legend = h("div", { class: "legend" });
  const labels = h("div", { class: "heat-labels", "aria-hidden": "true" }),
    axis = h("div", { class: "heat-axis", "aria-hidden": "true" });
  patch(
    place,
    h(
      "figure",
      { class: "chart" },
      h(
        "figcaption",
        {},
        h("span", { class: "chart-title" }, "Expert load per MoE layer (max/mean)"),
        value,
      ),
      h("div", { class: "heat" }, labels, canvas, axis),
      legend,
    ),
  );
  let load = null,
    at = null;

  const row = () => Math.max(5, Math.min(26, Math.floor(300 / load.layers.length)));
  const draw = () => {
    const width = canvas.clientWidth;
    if (!load || !width) return;
    const rows = load.layers.length,
      columns = load.steps.length,
      ratio = devicePixelRatio || 1,
      high = row() * rows;
    canvas.style.height = `${high}px`;
    [canvas.width, canvas.height] = [width * ratio, high * ratio];
    const pen = canvas.getContext("2d"),
      most = top();
    pen.scale(ratio, ratio);
    const gap = row() > 8 ? 1 : 0;
    for (let c = 0; c < columns; c++) {
      const left = Math.round((c * width) / columns),
        right = Math.round(((c + 1) * width) / columns);
      for (let r = 0; r < rows; r++) {
        const found = load.values[c][r];
        if (found === null) continue;
        pen.fillStyle = colour((found - 1) / (most - 1));
        pen.fillRect(left, r * row(), right - left, row() - gap);
      }
    }
    if (at) {
      pen.strokeStyle = "#fff";
      pen.lineWidth = 1.5;
      pen.strokeRect((at[0] * width) / columns, at[1] * row(), Math.max(2, width / columns), row() - gap);
    }
    showValue();
  };
  const top = () => Math.max(1.5, ...load.values.flat().filter((found) => found !== null));
  const showValue = () => {
    const [c, r] = at || [load.steps.length - 1, worst(load.values[load.steps.length - 1])];
    const found = load.values[c][r];
    const where = `layer ${load.layers[r]}, ${along.name(load.steps[c])}`;
    patch(value, h("b", {}, found === null ? "-" : `${found.toFixed(2)} ×`), h("span", { class: "dim" }, ` ${where}`));
    canvas.setAttribute(
      "aria-label",
      `Expert load: ${found === null ? "unknown" : found.toFixed(2)} times the mean, ${where}. Arrow keys move the cursor.`,
    );
  };
  const worst = (values) => values.reduce((best, found, i) => ((found ?? 0) > (values[best] ?? 0) ? i : best), 0);

  canvas.onpointermove = (event) => {
    if (!load) return;
    const box = canvas.getBoundingClientRect();
    const inside = (share, all) => Math.min(all - 1, Math.max(0, Math.floor(share * all)));
    at = [
      inside((event.clientX - box.left) / box.width, load.steps.length),
      inside((event.clientY - box.top) / box.height, load.layers.length),
    ];
    draw();
  };
  canvas.onpointerleave = canvas.onblur = () => ((at = null), draw());
  canvas.onkeydown = (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by || !load) return;
    event.preventDefault();
    const [c, r] = at || [load.steps.length - 1, 0];
    at = [
      Math.min(load.steps.length - 1, Math.max(0, c + by[0])),
      Math.min(load.layers.length - 1, Math.max(0, r + by[1])),
    ];
    draw();
  };
  const watch = new ResizeObserver(draw);
  watch.observe(canvas);
  return {
    end: () => watch.disconnect(),
    update(fresh) {
      load = fresh;
      const every = Math.ceil(16 / row());
      patch(
        labels,
        load.layers.map((layer, i) =>
          h("span", { style: { height: `${row()}px` } }, i % every === 0 ? `${i === 0 ? "layer " : ""}${layer}` : ""),
        ),
      );
      patch(
        axis,
        h("span", {}, along.name(load.steps[0])),
        h("span", {}, along.texts([load.steps.at(-1)])[0]),
      );
      patch(
        legend,
        h("span", {}, "1 (uniform)"),
        h("i", { style: { background: `linear-gradient(90deg, ${STOPS.map((stop) => `rgb(${stop})`).join(",")})` } }),
        h("span", {}, top().toFixed(1)),
      );
      draw();
    },
  };
}

function colour(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (STOPS.length - 1),
    i = Math.floor(place);
  return `rgb(${STOPS[i].map((from, k) => Math.round(from + (STOPS[i + 1][k] - from) * (place - i)))})`;
}
