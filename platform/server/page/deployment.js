// One deployment: its state, what it does now, a box to try it, its replicas, versions and history.

import { h, patch } from "./dom.js";
import { clock, setClock } from "./format.js";
import { call, follow } from "./live.js";
import { confirm, empty, problem, serviceChip } from "./parts.js";
import { promptBox } from "./prompt.js";
import { servingCharts } from "./serving.js";
import { addressCard, historyCard, replicasCard, versionsCard } from "./versions.js";

export function deployment(place, name) {
  const base = `/api/deployments/${encodeURIComponent(name)}`;
  const head = place.appendChild(h("div", { class: "deployment-head" })),
    rail = h("div", { class: "stack rail" }),
    work = h("div", {}),
    box = h("section", { class: "card", "aria-label": "Try it" });
  const body = place.appendChild(
    h("div", { class: "columns", hidden: true }, h("div", { class: "stack" }, work, box), rail),
  );
  const curves = servingCharts(work),
    endBox = promptBox(box, name);
  const view = { error: "", copied: false, history: [], changes: "" };
  let state = null,
    over = false;
  patch(head, empty("Waiting for the controller…"));

  const show = () => {
    if (over) return;
    document.title = `${name} · ${state.state} · Moray`;
    body.hidden = false;
    box.hidden = work.hidden = state.state === "stopped";
    patch(head, heading(state, view, stop, rollBack));
    patch(
      rail,
      addressCard(state, view.copied, copy),
      replicasCard(state),
      versionsCard(state),
      historyCard(view.history),
    );
  };
  const act = async (what) => {
    try {
      state = await call("POST", `${base}/${what}`);
      view.error = "";
    } catch (error) {
      view.error = error.message;
    }
    await remember();
    show();
  };
  const stop = async () => {
    const text = "Open requests are finished first. Its versions and history are kept.";
    if (await confirm(`Stop ${name}?`, text, "Stop the deployment", "Keep it running")) await act("stop");
  };
  const rollBack = async () => {
    const [from, to] = [desired(state)?.version, state.previous];
    const text = `Version ${to} serves again.${from > to ? ` Version ${from} counts as failed.` : ""}`;
    if (await confirm(`Roll ${name} back?`, text, `Back to version ${to}`, "Keep it as it is")) await act("rollback");
  };
  const copy = async (command) => {
    // Browsers allow this only to pages of this machine and of HTTPS. Otherwise the command is selected.
    view.copied = await navigator.clipboard?.writeText(command).then(
      () => true,
      () => false,
    );
    if (!view.copied) getSelection().selectAllChildren(rail.querySelector(".command"));
    show();
  };
  /** Reads the history when something has changed that belongs to it. */
  const remember = async () => {
    const changes = JSON.stringify([state.state, state.versions.map((one) => [one.version, one.state, one.since])]);
    if (changes === view.changes) return;
    view.changes = changes;
    try {
      view.history = await call("GET", `${base}/history`);
    } catch {
      view.changes = ""; // asked again with the next update
    }
  };
  const receive = async (overview) => {
    setClock(overview.now);
    // The overview has the first thirty deployments.
    state = overview.deployments.find((one) => one.name === name) ?? (await call("GET", base));
    if (over) return;
    if (state.served) curves.update(state.served, overview.now);
    show();
    await remember();
    show();
  };
  const missing = (error) => {
    if (over) return;
    end();
    body.hidden = true;
    patch(
      head,
      h("h1", {}, "Deployment not found"),
      problem(error.message),
      h("p", {}, h("a", { href: "/deployments" }, "Back to the deployments")),
    );
  };
  const endStream = follow("/api/stream", "overview", (overview) => receive(overview).catch(missing));
  const end = () => {
    over = true;
    endStream();
    endBox();
    curves.end();
  };
  return end;
}

/** The version that is to serve: the one that starts, or else the live one. */
const desired = (one) => latest(one, "starting") ?? latest(one, "live");
const latest = (one, state) => one.versions.findLast((each) => each.state === state);

function heading(one, view, stop, rollBack) {
  const live = latest(one, "live");
  const elsewhere = one.cluster === "local" ? "" : ` --cluster ${one.cluster}`;
  return [
    h("p", { class: "crumbs" }, h("a", { href: "/deployments" }, "Deployments")),
    h(
      "div",
      { class: "heading" },
      h("h1", {}, one.name),
      serviceChip(one.state),
      one.state === "stopped" ? null : h("div", { class: "acts end" }, acts(one, stop, rollBack)),
    ),
    h(
      "p",
      { class: "facts" },
      h("span", {}, "serves ", h("code", {}, one.model)),
      live ? h("span", {}, `version ${live.version}`) : null,
      h("span", {}, one.cluster === "local" ? "on this machine" : `on cluster ${one.cluster}`),
      h("span", {}, `${one.state} for `, clock("elapsed", one.changed)),
    ),
    view.error ? problem(view.error) : null,
    one.reason ? h("p", { class: one.state === "failed" ? "problem" : "notice" }, one.reason) : null,
    one.state === "stopped"
      ? empty("Start it again:", `moray deploy ${one.model} --name ${one.name}${elsewhere}`)
      : null,
  ];
}

function acts(one, stop, rollBack) {
  const ends = one.wanted === "stopped";
  return [
    one.previous && !ends ? h("button", { class: "button", type: "button", onclick: rollBack }, "Roll back") : null,
    h(
      "button",
      { class: "button danger", type: "button", onclick: stop, disabled: ends },
      ends ? "Stopping…" : "Stop",
    ),
  ];
}
