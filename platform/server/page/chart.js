// A curve over training steps, drawn as SVG. All charts of a page share one cursor, so values of one step line up.

import { h, patch, svg } from "./dom.js";
import { count, figure } from "./format.js";

const PAD = { left: 48, right: 12, top: 8, bottom: 22 };

/** The charts of one view. */
export function charts() {
  const all = new Set();
  let cursor = null;
  const point = (at) => {
    cursor = at;
    for (const chart of all) chart.draw();
  };
  return {
    /** Adds a chart; returns {node, update(points), end()}. */
    add(title, unit, help, height) {
      const chart = one(title, unit, help, height, () => cursor, point);
      all.add(chart);
      return { ...chart, end: () => (chart.end(), all.delete(chart)) };
    },
  };
}

function one(title, unit, help, height, cursor, point) {
  let points = [],
    width = 0;
  const value = h("span", { class: "chart-value" }),
    plot = svg("svg", { height, "aria-hidden": "true" });
  const frame = h("div", { class: "plot", tabindex: 0, role: "img" }, plot);
  const node = h(
    "figure",
    { class: "chart" },
    h("figcaption", { title: help }, h("span", { class: "chart-title" }, title), value),
    frame,
  );

  const share = unit === "share",
    shownUnit = share ? "%" : unit;
  const reading = (v) => `${figure(v)}${shownUnit ? ` ${shownUnit}` : ""}`;

  const scale = () => {
    const values = points.map((found) => found[1]).filter((found) => found !== null);
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const marks = nice(low, high, 4);
    [low, high] = [Math.min(low, marks[0]), Math.max(high, marks[marks.length - 1])];
    const [first, last] = [points[0][0], points[points.length - 1][0]];
    const x = (at) => PAD.left + ((at - first) / (last - first || 1)) * (width - PAD.left - PAD.right);
    const y = (v) => height - PAD.bottom - ((v - low) / (high - low)) * (height - PAD.top - PAD.bottom);
    return { x, y, marks, first, last };
  };

  const nearest = (at) =>
    points.reduce((best, found) => (Math.abs(found[0] - at) < Math.abs(best[0] - at) ? found : best), points[0]);

  const draw = () => {
    if (!points.length || !width) return;
    if (points.every((found) => found[1] === null)) {
      patch(plot);
      patch(value, h("span", { class: "dim" }, "not a number"));
      return;
    }
    const { x, y, marks, first, last } = scale();
    const drawn = points.filter((found) => found[1] !== null);
    const line = drawn.map(([at, v], i) => `${i ? "L" : "M"}${x(at).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const floor = height - PAD.bottom;
    const area = drawn.length
      ? `${line}L${x(drawn[drawn.length - 1][0]).toFixed(1)} ${floor}L${x(drawn[0][0]).toFixed(1)} ${floor}Z`
      : "";
    const shown = cursor() === null ? points[points.length - 1] : nearest(cursor());
    plot.setAttribute("width", width);
    patch(
      plot,
      marks.map((mark) => [
        svg("line", { class: "rule", x1: PAD.left, x2: width - PAD.right, y1: y(mark), y2: y(mark) }),
        svg("text", { class: "mark", x: PAD.left - 8, y: y(mark) + 3.5, "text-anchor": "end" }, short(mark)),
      ]),
      nice(first, last, width < 420 ? 5 : 6)
        .filter((mark) => mark >= first && mark <= last && Number.isInteger(mark))
        .map((mark) => svg("text", { class: "mark", x: x(mark), y: height - 6, "text-anchor": "middle" }, short(mark))),
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
      `${title}: ${reading(shown[1])} at step ${shown[0]}. Arrow keys move along the curve.`,
    );
  };

  frame.onpointermove = (event) => {
    if (!points.length) return;
    const { first, last } = scale();
    const part = (event.clientX - frame.getBoundingClientRect().left - PAD.left) / (width - PAD.left - PAD.right);
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
  return {
    node,
    draw,
    end: () => watch.disconnect(),
    update: (fresh) => ((points = share ? fresh.map(([at, v]) => [at, v === null ? v : 100 * v]) : fresh), draw()),
  };
}

/** About `most` round numbers from `low` to `high`. */
export function nice(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= 0.8 * rough) || 10);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    marks.push(Number((i * step).toPrecision(12)));
  return marks.length ? marks : [low];
}

const short = (value) =>
  Math.abs(value) >= 10000
    ? `${Number((value / 1000).toPrecision(4))}k`
    : value !== 0 && Math.abs(value) < 0.001
      ? value.toExponential()
      : String(value);
