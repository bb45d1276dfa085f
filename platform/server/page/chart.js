// A curve over training steps, drawn as SVG. All charts of a view share one cursor, which shows the values of one step.

import { h, patch, svg } from "./dom.js";
import { count, figure, scaleOf, tickTexts } from "./format.js";

const PAD = { top: 8, bottom: 22, right: 12, gap: 8 }; // gap: between a tick label and the plot

/** The charts of one view. */
export function charts() {
  const all = new Set();
  let cursor = null;
  const point = (at) => {
    cursor = at;
    for (const chart of all) chart.draw();
  };
  return {
    /** Adds a chart and returns {node, update(points), end()}. `unit`: as in platform/core/metrics.py. */
    add(title, unit, help, height) {
      const chart = one(title, unit, help, height, () => cursor, point);
      all.add(chart);
      return { ...chart, end: () => (chart.end(), all.delete(chart)) };
    },
  };
}

function one(title, unit, help, height, cursor, point) {
  let points = [],
    width = 0,
    scale = scaleOf(unit, []);
  const value = h("span", { class: "chart-value" }),
    plot = svg("svg", { height, "aria-hidden": "true" });
  const frame = h("div", { class: "plot", tabindex: 0, role: "img" }, plot);
  const node = h(
    "figure",
    { class: "chart" },
    h("figcaption", { title: help }, h("span", { class: "chart-title" }, title), value),
    frame,
  );

  const reading = (v) => `${figure(v)}${scale.unit ? ` ${scale.unit}` : ""}`;

  /** Ticks and the maps from values to pixels. The margins fit the widest tick labels. */
  const axes = () => {
    const values = points.map(([, v]) => v).filter((v) => v !== null);
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const marks = nice(low, high, 4);
    [low, high] = [Math.min(low, marks[0]), Math.max(high, marks[marks.length - 1])];
    const [first, last] = [points[0][0], points[points.length - 1][0]];
    const steps = nice(first, last, width < 420 ? 5 : 6).filter(
      (mark) => mark >= first && mark <= last && Number.isInteger(mark),
    );
    const yTicks = tickTexts(marks, scale.suffix),
      xTicks = tickTexts(steps);
    const left = Math.ceil(widest(plot, yTicks)) + PAD.gap + 2,
      right = Math.max(PAD.right, Math.ceil(widest(plot, xTicks) / 2) + 2);
    const x = (at) => left + ((at - first) / (last - first || 1)) * (width - left - right);
    const y = (v) => height - PAD.bottom - ((v - low) / (high - low)) * (height - PAD.top - PAD.bottom);
    return { x, y, marks, yTicks, steps, xTicks, first, last, left, right };
  };

  const nearest = (at) =>
    points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best), points[0]);

  const draw = () => {
    if (!points.length || !width || !frame.isConnected) return;
    if (points.every(([, v]) => v === null)) {
      patch(plot);
      patch(value, h("span", { class: "dim" }, "not a number"));
      return;
    }
    const { x, y, marks, yTicks, steps, xTicks, left, right } = axes();
    const drawn = points.filter(([, v]) => v !== null);
    const line = drawn.map(([at, v], i) => `${i ? "L" : "M"}${x(at).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const floor = height - PAD.bottom;
    const area = drawn.length
      ? `${line}L${x(drawn[drawn.length - 1][0]).toFixed(1)} ${floor}L${x(drawn[0][0]).toFixed(1)} ${floor}Z`
      : "";
    const shown = cursor() === null ? points[points.length - 1] : nearest(cursor());
    plot.setAttribute("width", width);
    patch(
      plot,
      marks.map((mark, i) => [
        svg("line", { class: "rule", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }),
        svg("text", { class: "mark", x: left - PAD.gap, y: y(mark) + 3.5, "text-anchor": "end" }, yTicks[i]),
      ]),
      steps.map((mark, i) =>
        svg("text", { class: "mark", x: x(mark), y: height - 6, "text-anchor": "middle" }, xTicks[i]),
      ),
      svg("path", { class: "area", d: area }),
      svg("path", { class: "curve", d: line }),
      cursor() !== null
        ? svg("line", { class: "cursor", x1: x(shown[0]), x2: x(shown[0]), y1: PAD.top, y2: floor })
        : null,
      shown[1] !== null ? svg("circle", { class: "dot", cx: x(shown[0]), cy: y(shown[1]), r: 3.5 }) : null,
    );
    patch(value, h("b", {}, reading(shown[1])), h("span", { class: "dim" }, ` at step ${count(shown[0])}`));
    frame.setAttribute(
      "aria-label",
      `${title}: ${reading(shown[1])} at step ${shown[0]}. Arrow keys move the cursor.`,
    );
  };

  frame.onpointermove = (event) => {
    if (!points.length) return;
    const { first, last, left, right } = axes();
    const part = (event.clientX - frame.getBoundingClientRect().left - left) / (width - left - right);
    point(nearest(first + Math.min(1, Math.max(0, part)) * (last - first))[0]);
  };
  frame.onpointerleave = () => point(null);
  frame.onblur = () => point(null);
  frame.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || !points.length) return;
    event.preventDefault();
    const place = points.indexOf(cursor() === null ? points[points.length - 1] : nearest(cursor()));
    point(points[Math.min(points.length - 1, Math.max(0, place + by))][0]);
  };
  const watch = new ResizeObserver(() => {
    width = frame.clientWidth;
    draw();
  });
  watch.observe(frame);
  document.fonts.ready.then(() => (widths.clear(), draw())); // labels measured in another font have another width
  return {
    node,
    draw,
    end: () => watch.disconnect(),
    update(fresh) {
      scale = scaleOf(
        unit,
        fresh.map(([, v]) => v),
      );
      points = fresh.map(([at, v]) => [at, v === null ? v : v * scale.by]);
      draw();
    },
  };
}

const widths = new Map(); // tick label -> pixels

/** The width in pixels of the widest of `texts` as tick labels in `plot`. */
function widest(plot, texts) {
  const fresh = texts.filter((text) => !widths.has(text));
  if (fresh.length) {
    const ruler = plot.appendChild(svg("text", { class: "mark" }));
    for (const text of fresh) {
      ruler.textContent = text;
      widths.set(text, ruler.getComputedTextLength());
    }
    ruler.remove();
  }
  return Math.max(0, ...texts.map((text) => widths.get(text)));
}

/** About `most` round numbers between `low` and `high`. */
export function nice(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= 0.8 * rough) || 10);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    marks.push(Number((i * step).toPrecision(12)));
  return marks.length ? marks : [low];
}
