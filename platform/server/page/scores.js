// Results of an evaluation: each with its interval, as numbers and on a scale from 0 to 1.

import { h } from "./dom.js";
import { count, figure } from "./format.js";

const share = (value) => value >= 0 && value <= 1;
const told = (value) => (share(value) ? `${(100 * value).toFixed(1)} %` : figure(value));

/** The table of a step's scores: task, metric, value with its 95 % interval, number of items. */
export function scoreTable(scores) {
  const head = ["Task", "Score", "", "95 % interval", "0 to 1", "Items"];
  return h(
    "div",
    { class: "scores" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, scores.map(row)),
    ),
  );
}

function row(score) {
  const range = score.interval;
  return h(
    "tr",
    {},
    h("td", {}, score.task),
    h("td", { class: "dim" }, score.metric.replaceAll("_", " ")),
    h("td", { class: "num" }, told(score.value)),
    h("td", { class: "num dim" }, range ? `${told(range[0])} to ${told(range[1])}` : "unknown"),
    h("td", {}, share(score.value) ? scale(score.value, range) : null),
    h("td", { class: "num" }, count(score.n)),
  );
}

function scale(value, range) {
  const [low, high] = (range || [value, value]).map((edge) => Math.min(1, Math.max(0, edge)));
  return h(
    "div",
    { class: "interval", "aria-hidden": "true" },
    h("i", { style: { left: `${100 * low}%`, width: `${100 * (high - low)}%` } }),
    h("b", { style: { left: `${100 * value}%` } }),
  );
}
