// Small components shared by several views.

import { h, svg } from "./dom.js";

// A state is shown by a shape and a word as well as by a colour.
const SHAPES = {
  pending: [["circle", { cx: 8, cy: 8, r: 5.5, "stroke-dasharray": "2 2.3" }]],
  queued: [["circle", { cx: 8, cy: 8, r: 5.5 }]],
  waiting: [
    ["circle", { cx: 8, cy: 8, r: 5.5 }],
    ["path", { d: "M8 5v3l2 1.5" }],
  ],
  running: [
    ["circle", { cx: 8, cy: 8, r: 5.5, class: "rest" }],
    ["path", { d: "M8 2.500a5.5 5.5 0 0 1 5.5 5.5", class: "turn" }],
  ],
  succeeded: [
    ["circle", { cx: 8, cy: 8, r: 6.5, class: "full" }],
    ["path", { d: "M5.2 8.2 7.2 10.2 10.9 6", class: "in" }],
  ],
  reused: [
    ["circle", { cx: 8, cy: 8, r: 5.5 }],
    ["path", { d: "M5.8 6.800h4.400M5.8 9.200h4.4" }],
  ],
  failed: [
    ["circle", { cx: 8, cy: 8, r: 6.5, class: "full" }],
    ["path", { d: "m5.8 5.8 4.4 4.400m0-4.4-4.4 4.4", class: "in" }],
  ],
  cancelled: [
    ["circle", { cx: 8, cy: 8, r: 5.5 }],
    ["path", { d: "m4.2 11.8 7.6-7.6" }],
  ],
  lost: [
    ["circle", { cx: 8, cy: 8, r: 5.5, "stroke-dasharray": "4 2.9" }],
    ["path", { d: "M8 5v3.500M8 10.900v.1" }],
  ],
  up: [["circle", { cx: 8, cy: 8, r: 3.5, class: "full" }]],
  paused: [
    ["circle", { cx: 8, cy: 8, r: 5.5 }],
    ["path", { d: "M6.5 6v4M9.5 6v4" }],
  ],
};
const LOOKS = {
  started: "running",
  starting: "running",
  stopping: "running",
  submitted: "running",
  created: "queued",
  skipped: "cancelled",
  run: "succeeded",
  stopped: "cancelled",
  restarting: "lost",
  rolling: "running",
  updating: "running",
  live: "up",
  replaced: "queued",
};

export const look = (state) => (SHAPES[state] ? state : LOOKS[state] || "pending");

/** The icon of a state, with the state as its accessible name. */
export function icon(state, shown = look(state)) {
  const shape = SHAPES[shown].map(([tag, props]) => svg(tag, props));
  return svg("svg", { class: `icon ${shown}`, viewBox: "0 0 16 16", role: "img", "aria-label": state }, shape);
}

/** How a service looks. A running service is the normal case, so it is only a dot. */
const serviceLook = (state) => (state === "running" ? "up" : look(state));

export const serviceIcon = (state) => icon(state, serviceLook(state));

export const chip = (state, shown = look(state)) =>
  h("span", { class: `chip ${shown}` }, icon(state, shown), h("span", {}, state));

export const serviceChip = (state) => chip(state, serviceLook(state));

export const priority = (name) => h("span", { class: `tag ${name}` }, name);

/** A progress bar for `share` in 0..1. */
export function bar(share, label) {
  const shown = Math.round(1000 * Math.min(1, Math.max(0, share || 0))) / 10;
  const props = {
    class: "bar",
    role: "progressbar",
    "aria-label": label,
    "aria-valuemin": 0,
    "aria-valuemax": 100,
    "aria-valuenow": Math.floor(shown),
  };
  return h("div", props, h("i", { style: { width: `${shown}%` } }));
}

export const card = (title, aside, ...body) =>
  h(
    "section",
    { class: "card", "aria-label": title },
    h("div", { class: "card-head" }, h("h2", {}, title), aside),
    body,
  );

/** The text of an empty list, with a command that helps. */
export const empty = (text, command) =>
  h("p", { class: "empty" }, text, command ? [" ", h("code", {}, command)] : null);

export const problem = (text) => h("p", { class: "problem", role: "alert" }, text);

/** Asks for confirmation; resolves to true or false. */
export function confirm(title, text, yes, no) {
  const dialog = document.getElementById("confirm");
  dialog.querySelector("h2").textContent = title;
  dialog.querySelector("p").textContent = text;
  dialog.querySelector("[value=yes]").textContent = yes;
  dialog.querySelector("[value=no]").textContent = no;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
  );
}
