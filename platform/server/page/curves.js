// The curves of a run as cards: loss and throughput large, the others small, single values below. Titles and units come
// from the controller (platform/core/metrics.py).

import { charts } from "./chart.js";
import { h, patch } from "./dom.js";
import { figure, scaleOf } from "./format.js";

const LARGE = 2; // number of large curves: loss and throughput
const HIDDEN = "train_tokens"; // a straight line; the progress shows the value

/** A chart is created when its curve has two points, and kept, so that its cursor and size persist. */
export function curveCards(place, load) {
  const made = new Map(),
    group = charts();
  const title = h("h2", { class: "section", hidden: true }, "Curves"),
    large = h("div", { class: "grid two" }),
    small = h("div", { class: "grid three" }),
    figures = h("dl", { class: "figures" });
  place.append(title, large, load, small, figures);
  return (state) => {
    const names = Object.keys(state.curves).filter((name) => state.curves[name].length > 1 && name !== HIDDEN);
    const alone = Object.entries(state.curves)
      .filter(([name, curve]) => curve.length === 1 && name !== HIDDEN)
      .map(([name, [[, value]]]) => [name, value]);
    title.hidden = !Object.keys(state.curves).length && !Object.keys(state.figures).length;
    for (const name of [...made.keys()])
      if (!names.includes(name)) (made.get(name).end(), made.get(name).card.remove(), made.delete(name));
    names.forEach((name, i) => {
      if (!made.has(name)) {
        const { unit, help } = metricOf(state, name);
        const chart = group.add(state.titles[name], unit, help, i < LARGE ? 210 : 112);
        const holder = h("div", { class: "card", "data-curve": name }, chart.node);
        made.set(name, { ...chart, card: holder });
      }
      const { card, update } = made.get(name),
        row = i < LARGE ? large : small;
      if (card.parentNode !== row) row.append(card);
      update(state.curves[name]);
    });
    patch(
      figures,
      [...Object.entries(state.figures), ...alone].map(([name, value]) => {
        const { unit, help } = metricOf(state, name),
          scale = scaleOf(unit, [value]);
        return h(
          "div",
          { class: "card" },
          h("dt", { title: help }, state.titles[name]),
          h(
            "dd",
            {},
            figure(value === null ? null : value * scale.by),
            scale.unit ? h("span", { class: "unit" }, ` ${scale.unit}`) : null,
          ),
        );
      }),
    );
  };
}

const metricOf = (state, name) => state.metrics[name.split("/")[0]];
