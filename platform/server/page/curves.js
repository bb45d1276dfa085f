// The curves of a run as cards: loss and throughput large, the others small, single figures below.

import { charts } from "./chart.js";
import { h, patch } from "./dom.js";
import { figure } from "./format.js";

const LARGE = 2; // how many curves are drawn large: loss and throughput
const STRAIGHT = "train_tokens"; // a straight line, and in the progress already
const TITLES = {
  train_loss: "Loss",
  train_tokens_per_second: "Throughput",
  train_grad_norm: "Gradient norm",
  train_learning_rate: "Learning rate",
  train_bias_speed: "Router bias speed",
  train_tokens: "Tokens trained on",
  train_data_wait: "Waiting for data",
  train_max_violation: "Worst expert overload (MaxVio)",
  train_checkpoint_seconds: "Checkpoint pause",
  eval_bits_per_byte: "Held-out bits per byte",
};

/** Charts are made when a curve first has points, and kept: their cursor and size live on. */
export function curveCards(place, load) {
  const made = new Map(),
    group = charts();
  const title = h("h2", { class: "section", hidden: true }, "Curves"),
    large = h("div", { class: "grid two" }),
    small = h("div", { class: "grid three" }),
    figures = h("dl", { class: "figures" });
  place.append(title, large, load, small, figures);
  return (state) => {
    const names = Object.keys(state.curves).filter((name) => state.curves[name].length > 1 && name !== STRAIGHT);
    const alone = Object.entries(state.curves)
      .filter(([name, curve]) => curve.length === 1 && name !== STRAIGHT)
      .map(([name, [[, value]]]) => [name, value]);
    title.hidden = !Object.keys(state.curves).length && !Object.keys(state.figures).length;
    for (const name of [...made.keys()])
      if (!names.includes(name)) (made.get(name).end(), made.get(name).card.remove(), made.delete(name));
    names.forEach((name, i) => {
      if (!made.has(name)) {
        const [base, ...labels] = name.split("/"),
          known = state.metrics[base] || {};
        const chart = group.add(
          [TITLES[base] || base.replaceAll("_", " "), ...labels].join(" · "),
          known.unit || "",
          known.help || "",
          i < LARGE ? 210 : 112,
        );
        const holder = h("div", { class: "card", "data-curve": name }, chart.node);
        made.set(name, { ...chart, card: holder });
      }
      const { card, update } = made.get(name),
        home = i < LARGE ? large : small;
      if (card.parentNode !== home) home.append(card);
      update(state.curves[name]);
    });
    patch(
      figures,
      [...Object.entries(state.figures), ...alone].map(([name, value]) => {
        const [base, ...labels] = name.split("/");
        return h(
          "div",
          { class: "card" },
          h(
            "dt",
            {},
            TITLES[base] || base.replaceAll("_", " "),
            labels.map((label) => ` · ${label}`),
          ),
          h(
            "dd",
            {},
            figure(value),
            state.metrics[base]?.unit ? h("span", { class: "unit" }, ` ${state.metrics[base].unit}`) : null,
          ),
        );
      }),
    );
  };
}
