// Curves over training steps or time, drawn as SVG. All charts of a view share one cursor, which shows the values of
// one step or moment.

import { nice, STEPS } from "./axes.js";
import { h, patch, svg } from "./dom.js";
import { figure, scaleOf, tickTexts } from "./format.js";

const PAD = { top: 8, bottom: 22, right: 12, gap: 8 }; // gap: between a tick label and the plot

/** The charts of one view. `axis`: what they are drawn over. */
export function charts(axis = STEPS) {
  const all = new Set();
  let cursor = null;
  const point = (at) => {
    cursor = at;
    for (const chart of all) chart.draw();
  };
  return {
    /** Adds a chart and returns {node, update(points), end()}. `unit`: as in platform/core/metrics.py. `names`: of its
     * curves, if it has several. A point is [at, value, value of the second curve...]; a value may be null. */
    add(title, unit, help, height, names = [""]) {
      const chart = one({ title, unit, help, height, names, axis }, () => cursor, point);
      all.add(chart);
      return { ...chart, end: () => (chart.end(), all.delete(chart)) };
    },
  };
}

function one({ title, unit, help, height, names, axis }, cursor, point) {
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

  const reading = (v) => (v === null ? axis.missing : `${figure(v)}${scale.unit ? ` ${scale.unit}` : ""}`);
  const readings = (values) => names.map((name, i) => `${name} ${reading(values[i])}`.trim()).join(", ");
  const known = () => points.flatMap(([, ...values]) => values).filter((v) => v !== null);

  /** Ticks and the maps from values to pixels. The margins fit the widest tick labels. */
  const axes = () => {
    const values = known();
    let [low, high] = [Math.min(...values, ...(axis.zero ? [0] : [])), Math.max(...values)];
    if (low === high && axis.zero) high = low + 1;
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const whole = values.every(Number.isInteger); // of three sequences, no half is marked
    const marks = nice(low, high, 4).filter((mark) => !whole || Number.isInteger(mark));
    [low, high] = [Math.min(low, marks[0]), Math.max(high, marks[marks.length - 1])];
    const [first, last] = [points[0][0], points[points.length - 1][0]];
    const steps = axis.marks(first, last, width < 420 ? 5 : 6);
    const yTicks = tickTexts(marks, scale.suffix),
      xTicks = axis.texts(steps);
    const half = Math.ceil(widest(plot, xTicks) / 2) + 2;
    const left = Math.max(Math.ceil(widest(plot, yTicks)) + PAD.gap + 2, half),
      right = Math.max(PAD.right, half);
    const x = (at) => left + ((at - first) / (last - first || 1)) * (width - left - right);
    const y = (v) => height - PAD.bottom - ((v - low) / (high - low)) * (height - PAD.top - PAD.bottom);
    return { x, y, marks, yTicks, steps, xTicks, first, last, left, right };
  };

  const nearest = (at) =>
    points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best), points[0]);

  const draw = () => {
    if (!points.length || !width || !frame.isConnected) return;
    if (!known().length) {
      patch(plot);
      patch(value, h("span", { class: "dim" }, axis.missing));
      return;
    }
    const { x, y, marks, yTicks, steps, xTicks, left, right } = axes();
    const floor = height - PAD.bottom;
    const curves = names.map((_, i) => stretches(points, i).map((part) => part.map(([at, v]) => [x(at), y(v)])));
    const shown = cursor() === null ? points[points.length - 1] : nearest(cursor());
    const values = shown.slice(1);
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
      svg("path", { class: "area", d: curves[0].map((part) => area(part, floor)).join("") }),
      curves.map((parts, i) => svg("path", { class: `curve nr${i}`, d: parts.map(line).join("") })),
      cursor() !== null
        ? svg("line", { class: "cursor", x1: x(shown[0]), x2: x(shown[0]), y1: PAD.top, y2: floor })
        : null,
      values.map((v, i) =>
        v === null ? null : svg("circle", { class: `dot nr${i}`, cx: x(shown[0]), cy: y(v), r: 3.5 }),
      ),
    );
    patch(
      value,
      names.map((name, i) => [
        name ? h("span", { class: `key nr${i}` }, `${name} `) : null,
        h("b", {}, reading(values[i])),
        name ? "  " : null,
      ]),
      h("span", { class: "dim" }, `${names[0] ? "" : " "}at ${axis.name(shown[0])}`),
    );
    frame.setAttribute(
      "aria-label",
      `${title}: ${readings(values)} at ${axis.name(shown[0])}. Arrow keys move the cursor.`,
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
        fresh.flatMap(([, ...values]) => values),
      );
      points = fresh.map(([at, ...values]) => [at, ...values.map((v) => (v === null ? v : v * scale.by))]);
      draw();
    },
  };
}

/** The stretches of one curve between its missing values. */
function stretches(points, curve) {
  const found = [[]];
  for (const [at, ...values] of points)
    if (values[curve] === null) found.push([]);
    else found.at(-1).push([at, values[curve]]);
  return found.filter((part) => part.length);
}

// A stretch of one point is drawn as a dot, by its round end.
const line = (part) => part.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") + "h0";

const area = (part, floor) =>
  `M${part[0][0].toFixed(1)} ${floor}` +
  part.map(([x, y]) => `L${x.toFixed(1)} ${y.toFixed(1)}`).join("") +
  `L${part.at(-1)[0].toFixed(1)} ${floor}Z`;

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
