// The deployments: what each serves, its state with the reason, and what it does now.

import { h, patch } from "./dom.js";
import { count, latency, setClock } from "./format.js";
import { follow } from "./live.js";
import { card, empty, serviceChip, serviceIcon } from "./parts.js";

export function deployments(place) {
  document.title = "Deployments · Moray";
  patch(place, h("h1", {}, "Deployments"), empty("Waiting for the controller…"));
  return follow("/api/stream", "overview", (state) => {
    setClock(state.now);
    const found = state.deployments || [];
    patch(place, heading(found), found.length ? table(found) : welcome());
  });
}

function heading(found) {
  const states = [...new Set(found.map((one) => one.state))];
  return h(
    "div",
    { class: "heading" },
    h("h1", {}, "Deployments"),
    h(
      "p",
      { class: "sum" },
      states.map((state) => h("span", {}, h("b", {}, found.filter((one) => one.state === state).length), ` ${state}`)),
    ),
  );
}

const welcome = () =>
  h(
    "section",
    { class: "card welcome" },
    h("h2", {}, "Nothing is deployed yet"),
    h("p", {}, "A deployment serves a model until you stop it. Deploy the model of the quickstart:"),
    h("pre", {}, "moray deploy quickstart"),
    h("p", { class: "dim" }, "It follows its alias: when a run exports a newer model, that one is served instead."),
  );

// Title of a column, the words for it on a phone's single column, what a cell shows.
const COLUMNS = [
  ["Deployment", "", (one) => [link(one), h("span", { class: "dim clamped", title: one.model }, one.model)]],
  ["State", "", (one) => [serviceChip(one.state), reason(one)]],
  ["Version", "Version", (one) => one.live ?? "–"],
  ["Replicas", "Replicas", replicas],
  ["Cluster", "Cluster", (one) => one.cluster],
  ["Requests", "Requests", (one) => (one.served ? count(one.served.requests) : "–")],
  ["Tokens/s", "Tokens/s", (one) => (one.served ? count(one.served.tokens_per_second) : "–")],
  ["First token", "First token (median)", firstToken],
];

function table(found) {
  return h(
    "div",
    { class: "card" },
    h(
      "table",
      { class: "deployed" },
      h("thead", {}, h("tr", {}, COLUMNS.map(([title, label]) => h("th", { scope: "col", title: label }, title)))),
      h(
        "tbody",
        {},
        found.map((one) =>
          h(
            "tr",
            { "data-key": one.name },
            COLUMNS.map(([, label, show]) => h("td", { "data-label": label }, h("div", {}, show(one)))),
          ),
        ),
      ),
    ),
  );
}

/** The deployments that are not stopped, for the overview; null if there are none. */
export function deploymentsCard(all) {
  const found = all.filter((one) => one.state !== "stopped");
  if (!found.length) return null;
  return card(
    "Deployments",
    h("a", { href: "/deployments" }, "All"),
    h("ul", { class: "rows small" }, found.map(row)),
  );
}

function row(one) {
  return h(
    "li",
    { class: "row", "data-key": one.name },
    serviceIcon(one.state),
    h(
      "div",
      { class: "row-main" },
      h(
        "div",
        { class: "line" },
        link(one),
        one.state === "running" ? null : h("span", { class: "dim" }, one.state),
        one.ready && one.served
          ? h("span", { class: "end dim" }, `${count(one.served.tokens_per_second)} tokens/s`)
          : null,
      ),
      one.reason ? h("div", { class: "line" }, reason(one)) : null,
    ),
  );
}

const link = (one) => h("a", { class: "name", href: `/deployments/${encodeURIComponent(one.name)}` }, one.name);

/** Why a deployment has its state, cut after some lines. */
function reason(one) {
  const tone = one.state === "failed" ? "bad" : one.state === "running" ? "warn" : "dim";
  return one.reason ? h("span", { class: `clamped ${tone}`, title: one.reason }, one.reason) : null;
}

/** Ready replicas and those that are wanted: a number, or the range of an autoscaled deployment. */
export function replicas(one) {
  return `${one.ready} of ${one.most_replicas ? `${one.replicas}..${one.most_replicas}` : one.replicas}`;
}

function firstToken(one) {
  return one.served?.first_token ? latency(one.served.first_token[0]) : "–";
}
