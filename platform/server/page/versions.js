// The cards beside the curves of a deployment: its address, its replicas, its versions and its history.

import { h } from "./dom.js";
import { clock, count } from "./format.js";
import { card, empty, icon, serviceIcon } from "./parts.js";
import { replicas } from "./deployments.js";

const SHOWN = 12; // replicas, and entries of the history

// What was under way no longer turns.
const PAST = { running: "up", starting: "queued", rolling: "queued", stopping: "queued" };

/** How a program reaches the model. `copied`: whether the command has just been copied. */
export function addressCard(one, copied, copy) {
  if (!one.urls.length) return card("Address", null, empty("It has no address while it does not run."));
  const command = curl(one);
  return card(
    "Address",
    h("button", { class: "button end", type: "button", onclick: () => copy(command) }, copied ? "Copied" : "Copy"),
    one.urls.map((url) => h("p", { class: "address" }, h("code", {}, url))),
    h("pre", { class: "log command", tabindex: 0, "aria-label": "Command" }, command),
  );
}

const curl = (one) =>
  [
    `curl ${one.urls[0]}/completions`,
    "-H 'Content-Type: application/json'",
    `-d '${JSON.stringify({ model: one.name, prompt: "In the beginning", max_tokens: 40 })}'`,
  ].join(" \\\n  ");

export function replicasCard(one) {
  const seen = one.replicas_seen;
  return card(
    "Replicas",
    h("span", { class: "dim" }, `${replicas(one)} ready`),
    seen.length
      ? h(
          "ul",
          { class: "rows small" },
          seen.slice(0, SHOWN).map((each) =>
            row(
              each.id,
              serviceIcon(each.state),
              [h("span", {}, each.host || "not placed yet"), end(h("span", {}, each.id))],
              each.state === "running" ? null : h("span", { class: "dim" }, each.state),
            ),
          ),
        )
      : empty("No replicas."),
    more(seen.length, "replicas"),
  );
}

/** The versions, the newest first, with the requests that each has answered. */
export function versionsCard(one) {
  const served = new Map((one.served?.by_version ?? []).map((each) => [each.version, each]));
  const newest = [...one.versions].reverse();
  return card(
    "Versions",
    null,
    h(
      "ul",
      { class: "rows small" },
      newest.map((each) =>
        row(
          String(each.version),
          icon(each.state),
          [h("span", {}, h("b", {}, `Version ${each.version}`), ` ${each.state}`), end(clock("ago", each.since))],
          h("code", { class: "dim" }, each.reference),
          answered(served.get(each.version)),
          each.reason ? h("span", { class: each.state === "failed" ? "bad" : "dim" }, each.reason) : null,
        ),
      ),
    ),
  );
}

function answered(served) {
  if (!served?.requests) return null;
  return h(
    "span",
    { class: "dim" },
    `${count(served.requests)} ${served.requests === 1 ? "request" : "requests"}`,
    served.failed ? [", ", h("span", { class: "bad" }, `${count(served.failed)} failed`)] : ", none failed",
  );
}

/** What happened to the deployment and its versions, the newest first. */
export function historyCard(history) {
  const newest = [...history].reverse();
  return card(
    "History",
    null,
    h(
      "ul",
      { class: "rows small" },
      newest.slice(0, SHOWN).map((each, place) =>
        row(
          String(history.length - place),
          icon(each.state, PAST[each.state]),
          [
            h("span", {}, `${each.version === null ? "Deployment" : `Version ${each.version}`} ${each.state}`),
            end(clock("ago", each.time)),
          ],
          each.reason ? h("span", { class: "dim" }, each.reason) : null,
        ),
      ),
    ),
    more(history.length, "changes"),
  );
}

const row = (key, sign, head, ...below) =>
  h(
    "li",
    { class: "row", "data-key": key },
    sign,
    h(
      "div",
      { class: "row-main" },
      h("div", { class: "line" }, head),
      below.filter(Boolean).map((each) => h("div", { class: "line" }, each)),
    ),
  );

const end = (shown) => h("span", { class: "end dim" }, shown);

const more = (all, what) =>
  all > SHOWN ? h("p", { class: "dim" }, `and ${count(all - SHOWN)} more ${what}`) : null;
