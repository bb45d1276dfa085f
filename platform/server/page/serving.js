// What a deployment does now, as curves and expert load over the time since its view was opened. The controller reports
// what is, not what was, so the curves grow on the page.

import { TIMES } from "./axes.js";
import { charts } from "./chart.js";
import { h } from "./dom.js";
import { heatmap } from "./heatmap.js";

const MOST = 800; // points of a curve, and columns of the expert load
const RATE_SECONDS = 10; // over which requests are counted, because replicas report every two seconds
const LEAST_SECONDS = 4; // of a first rate

// Title, unit, explanation, names of the curves, their values. `requests`: per second.
const CURVES = [
  ["Requests", "requests/s", "Requests that ended, over the last 10 seconds", [""], (_, requests) => [requests]],
  ["Throughput", "tokens/s", "Generated tokens of all replicas", [""], (served) => [served.tokens_per_second]],
  [
    "First token",
    "s",
    "Time from a request to its first token in the last minute: median and 95th percentile of the slowest replica",
    ["p50", "p95"],
    (served) => served.first_token ?? [null, null],
  ],
  [
    "Sequences",
    "",
    "Sequences that generate tokens, and those that wait for room",
    ["running", "waiting"],
    (served) => [served.running, served.waiting],
  ],
];

/** Adds the curves and the expert load to `place`. Returns {update(served, at), end()}. */
export function servingCharts(place) {
  const group = charts(TIMES);
  const made = CURVES.map(([title, unit, help, names, read]) => ({
    ...group.add(title, unit, help, 150, names),
    title,
    read,
    points: [],
  }));
  const requests = rate(),
    heat = loads(h("div", { class: "card heat-card", hidden: true }));
  place.append(
    h("div", { class: "grid two" }, made.map((one) => h("div", { class: "card", "data-curve": one.title }, one.node))),
    heat.place,
  );
  return {
    update(served, at) {
      const now = requests(served.requests, at);
      for (const one of made) {
        one.points = thinned([...one.points, [at, ...one.read(served, now)]]);
        one.update(one.points);
      }
      heat.update(served.expert_load, at);
    },
    end() {
      for (const one of made) one.end();
      heat.end();
    },
  };
}

/** Turns a count that grows into a rate; null until it has been seen for some seconds. */
function rate() {
  let seen = [];
  return (total, at) => {
    if (seen.length && total < seen.at(-1)[0]) seen = []; // the deployment was removed and made again
    seen.push([total, at]);
    while (seen.length > 2 && at - seen[1][1] >= RATE_SECONDS) seen.shift();
    const [before, from] = seen[0];
    return at - from >= LEAST_SECONDS ? (total - before) / (at - from) : null;
  };
}

/** The heat map of the expert load, hidden until there is one. A model with other layers begins a new one. */
function loads(place) {
  const map = heatmap(place, TIMES);
  let columns = [];
  return {
    place,
    end: map.end,
    update(load, at) {
      if (!load.length) return;
      if (columns.length && columns[0][1].length !== load.length) columns = [];
      columns = thinned([...columns, [at, load]]);
      place.hidden = false;
      map.update({
        steps: columns.map(([at]) => at),
        layers: load.map((_, i) => i + 1),
        values: columns.map(([, values]) => values),
      });
    },
  };
}

/** Keeps every second point when there are too many, and always the last. */
const thinned = (points) =>
  points.length > MOST ? points.filter((_, i) => (points.length - 1 - i) % 2 === 0) : points;
