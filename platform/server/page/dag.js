// The steps of a recipe as a graph, from left to right (on narrow screens from top to bottom).
//
// A step is placed in the column after its last input. If possible, it takes the row of its nearest input, so that a
// chain is a straight line. An edge that skips columns runs in a lane below all rows. All edges of one source step
// share a lane, so no edge crosses a step.

import { h, patch, svg } from "./dom.js";
import { duration, percent } from "./format.js";
import { icon } from "./parts.js";

const EDGE = 3; // margin for the outline of the selected step
const LANE = 13,
  WIDE = { main: 150, least: 88, gap: 17, cross: 50, space: 12 },
  TALL = { main: 42, least: 42, gap: 22, cross: 230, space: 12 };

/** Positions of steps and edges in columns, rows and lanes. */
export function layout(steps) {
  const byKey = new Map(steps.map((step) => [step.key, step]));
  const inputs = (step) => [...new Set(Object.values(step.inputs))].filter((key) => byKey.has(key) && key !== step.key);
  const column = new Map();
  const columnOf = (key, above = new Set()) => {
    if (column.has(key)) return column.get(key);
    if (above.has(key)) return 0; // a cycle: recipes have none, but the page must not hang
    const before = inputs(byKey.get(key)).map((input) => columnOf(input, new Set([...above, key])));
    column.set(key, before.length ? Math.max(...before) + 1 : 0);
    return column.get(key);
  };
  steps.forEach((step) => columnOf(step.key));
  const taken = new Set(),
    row = new Map();
  for (const step of [...steps].sort((a, b) => column.get(a.key) - column.get(b.key))) {
    const near = inputs(step).sort((a, b) => column.get(b) - column.get(a))[0];
    let place = near === undefined ? 0 : (row.get(near) ?? 0);
    while (taken.has(`${column.get(step.key)} ${place}`)) place++;
    taken.add(`${column.get(step.key)} ${place}`);
    row.set(step.key, place);
  }
  const edges = steps.flatMap((step) => inputs(step).map((from) => ({ from, to: step.key })));
  const long = new Map(); // source step -> last column of its lane
  for (const edge of edges) {
    edge.long = column.get(edge.to) - column.get(edge.from) > 1;
    if (edge.long) long.set(edge.from, Math.max(long.get(edge.from) ?? 0, column.get(edge.to)));
  }
  const lanes = [],
    lane = new Map();
  const shortFirst = [...long].sort(([a, endA], [b, endB]) => endA - column.get(a) - (endB - column.get(b)));
  for (const [from, end] of shortFirst) {
    const start = column.get(from);
    let free = lanes.findIndex((used) => used.every(([s, e]) => end < s || start > e));
    if (free < 0) free = lanes.push([]) - 1;
    lanes[free].push([start, end]);
    lane.set(from, free);
  }
  return {
    column,
    row,
    edges,
    lane,
    columns: Math.max(0, ...column.values()) + 1,
    rows: Math.max(0, ...row.values()) + 1,
    lanes: lanes.length,
  };
}

/** Draws into `place`; calls `choose(key)` when a step is clicked. Returns a function that updates the steps. */
export function dag(place, choose) {
  let steps = [],
    chosen = "";
  const draw = () => {
    const width = place.clientWidth - 2 * EDGE;
    if (steps.length && width > 0) patch(place, ...drawn(steps, chosen, width, choose));
  };
  new ResizeObserver(draw).observe(place);
  return (fresh, selected) => {
    [steps, chosen] = [fresh, selected];
    draw();
  };
}

function drawn(steps, chosen, width, choose) {
  const plan = layout(steps);
  const tall = width < 640;
  const size = tall ? TALL : WIDE;
  const fit = tall
    ? size.main
    : Math.min(size.main, Math.floor((width - (plan.columns - 1) * size.gap) / plan.columns));
  const main = Math.max(size.least, fit),
    gap = size.gap;
  const cross = tall
    ? Math.min(size.cross, Math.floor((width - plan.lanes * LANE - 16) / plan.rows) - size.space)
    : size.cross;
  const start = (key) => plan.column.get(key) * (main + gap);
  const middle = (key) => plan.row.get(key) * (cross + size.space) + cross / 2;
  const bottom = plan.rows * (cross + size.space);
  const length = plan.columns * (main + gap) - gap,
    depth = bottom + plan.lanes * LANE;
  const point = (m, c) => (tall ? `${c} ${m}` : `${m} ${c}`);

  const path = ({ from, to, long }) => {
    const [a, b, c, d] = [start(from) + main, start(to), middle(from), middle(to)];
    if (!long)
      return c === d
        ? `M${point(a, c)}L${point(b, d)}`
        : `M${point(a, c)}C${point(a + gap / 2, c)} ${point(b - gap / 2, d)} ${point(b, d)}`;
    const way = bottom + plan.lane.get(from) * LANE,
      bend = 5,
      out = a + gap / 2 - 4,
      back = b - gap / 2 + 3;
    return [
      `M${point(a, c)}`,
      `L${point(out - bend, c)}`,
      `Q${point(out, c)} ${point(out, c + bend)}`,
      `L${point(out, way - bend)}`,
      `Q${point(out, way)} ${point(out + bend, way)}`,
      `L${point(back - bend, way)}`,
      `Q${point(back, way)} ${point(back, way - bend)}`,
      `L${point(back, d + bend)}`,
      `Q${point(back, d)} ${point(back + bend, d)}`,
      `L${point(b, d)}`,
    ].join("");
  };
  const state = new Map(steps.map((step) => [step.key, step.state]));
  const live = (edge) => (["succeeded", "reused"].includes(state.get(edge.from)) ? "passed" : "");
  const touches = (edge) => (edge.from === chosen || edge.to === chosen ? "touched" : "");
  const [w, tallness] = tall ? [depth, length] : [length, depth];
  return [
    svg(
      "svg",
      { class: "edges", width: w, height: tallness, "aria-hidden": "true" },
      [...plan.edges]
        .sort((x, y) => touches(x).length - touches(y).length)
        .map((edge) => svg("path", { d: path(edge), class: `${live(edge)} ${touches(edge)}` })),
    ),
    h(
      "div",
      { class: "nodes", style: { width: `${w}px`, height: `${tallness}px` } },
      steps.map((step) => {
        const [x, y] = [start(step.key), middle(step.key) - cross / 2];
        const box = tall ? [y, x, cross, main] : [x, y, main, cross];
        return node(step, step.key === chosen, box, choose);
      }),
    ),
  ];
}

function node(step, chosen, [x, y, width, height], choose) {
  const at = step.progress;
  const share = at && at.total ? at.done / at.total : null;
  const below =
    share !== null
      ? percent(share)
      : step.state === "reused"
        ? "reused"
        : step.seconds
          ? duration(step.seconds)
          : step.state;
  const px = { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` };
  return h(
    "button",
    {
      type: "button",
      class: `node ${step.state}`,
      "data-key": step.key,
      "aria-pressed": String(chosen),
      style: px,
      title: step.key,
      "aria-label": `${step.key}: ${step.state}${share !== null ? `, ${percent(share)}` : ""}`,
      onclick: () => choose(step.key),
    },
    h("span", { class: "node-name" }, step.key),
    h("span", { class: "node-below" }, icon(step.state), h("span", {}, below)),
    share !== null ? h("i", { class: "node-bar", style: { width: `${100 * Math.min(1, share)}%` } }) : null,
  );
}
