// Details of one step of a run: the reason it runs, its progress and its result.

import { h } from "./dom.js";
import { clock, count, duration, figure, percent } from "./format.js";
import { bar, empty, icon } from "./parts.js";
import { scoreTable } from "./scores.js";

/** The step shown by default: the running one, else the one that failed, else the last one that started. */
export function interesting(steps) {
  const find = (...states) => steps.find((step) => states.includes(step.state))?.key;
  return (
    find("started", "waiting") ||
    find("failed", "lost", "cancelled") ||
    steps.filter((step) => step.state !== "pending").pop()?.key ||
    steps[0]?.key ||
    ""
  );
}

/** The panel below the graph for the selected step. */
export function stepDetail(step) {
  if (!step) return empty("The steps of this recipe cannot be read.");
  const at = step.progress;
  const facts = [
    ["Why", step.why],
    ["Outcome", step.outcome],
    [
      "Took",
      ["succeeded", "failed", "cancelled", "lost"].includes(step.state) && step.seconds ? duration(step.seconds) : "",
    ],
    [
      "Inputs",
      Object.entries(step.inputs)
        .map(([name, from]) => `${name} from ${from}`)
        .join(", "),
    ],
    ["Uses", step.uses === step.key ? "" : step.uses],
    [
      "Artifact",
      step.fingerprint ? h("code", { title: step.fingerprint }, `${step.uses}/${step.fingerprint.slice(0, 12)}`) : "",
    ],
  ].filter(([, value]) => value);
  const counts = Object.entries(step.counts);
  return [
    h(
      "div",
      { class: "detail-head" },
      icon(step.state),
      h("h2", {}, step.key),
      h(
        "span",
        { class: "dim" },
        step.state === "started" && step.began ? ["running for ", clock("elapsed", step.began)] : step.state,
      ),
    ),
    at
      ? h(
          "div",
          { class: "progress" },
          bar(at.total ? at.done / at.total : 0, `${step.key}: ${at.phase}`),
          h(
            "p",
            {},
            h("b", {}, at.total ? percent(at.done / at.total) : ""),
            ` ${at.phase} · ${count(at.done)} of ${count(at.total)} ${at.unit}`,
            at.rate ? ` · ${count(at.rate)} ${at.unit}/s` : "",
            at.eta !== null ? ` · about ${duration(at.eta)} left` : "",
            at.detail ? ` · ${at.detail}` : "",
          ),
        )
      : null,
    h(
      "dl",
      { class: "facts-list" },
      facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
      counts.length
        ? h(
            "div",
            {},
            h("dt", {}, "Counts"),
            h(
              "dd",
              { class: "counts" },
              counts.map(([name, value]) => h("span", {}, h("b", {}, figure(value)), ` ${spoken(name)}`)),
            ),
          )
        : null,
    ),
    step.scores.length ? scoreTable(step.scores) : null,
    step.notes.length
      ? h(
          "ul",
          { class: "notes" },
          step.notes.map((note) =>
            h(
              "li",
              { class: note.level },
              h("span", { class: "dim" }, note.level === "warning" ? "warning" : "note", " "),
              note.text,
            ),
          ),
        )
      : null,
    !at && !facts.length && step.state === "pending" ? empty("Not started.") : null,
  ];
}

const spoken = (name) => name.replace(/^(in|out):(.*)$/, "$2 $1").replaceAll("_", " ");
