// One job: the states of its steps, its curves, its expert load and its log.

import { curveCards } from "./curves.js";
import { dag } from "./dag.js";
import { h, patch } from "./dom.js";
import { clock, count, duration, setClock } from "./format.js";
import { heatmap } from "./heatmap.js";
import { call, follow } from "./live.js";
import { logs } from "./logs.js";
import { chip, confirm, empty, priority, problem } from "./parts.js";
import { interesting, stepDetail } from "./step.js";

const ENDED = ["succeeded", "failed", "cancelled"];

export function run(place, id) {
  const part = (name, props) => place.appendChild(h("div", { class: name, ...props }));
  const head = part("run-head"),
    steps = part("card dag-card", { role: "group", "aria-label": "Steps" }),
    curves = part("curves"),
    load = h("div", { class: "card heat-card", hidden: true }),
    log = part("card");
  const graph = steps.appendChild(h("div", { class: "dag scroll" })),
    detail = steps.appendChild(h("div", { class: "detail" }));
  const view = { chosen: "", picked: false, attempt: null, error: "", why: [] };
  let state = null,
    endLog = () => {},
    logged,
    endStream = () => {};
  patch(head, empty("Waiting for the controller…"));

  const choose = (key) => {
    view.picked = view.chosen !== key || !view.picked;
    view.chosen = key;
    show();
  };
  const showSteps = dag(graph, choose),
    showCurves = curveCards(curves, load);
  const heat = { shown: null };

  const show = () => {
    if (!place.isConnected) return; // a response after the view was closed
    const { job } = state;
    if (!view.picked) view.chosen = interesting(state.steps);
    document.title = `${job.name} · ${job.state} · Moray`;
    patch(head, ...heading(state, view, stop, watch));
    showSteps(state.steps, view.chosen);
    patch(detail, stepDetail(state.steps.find((step) => step.key === view.chosen)));
    showCurves(state);
    load.hidden = !state.expert_load;
    if (state.expert_load) (heat.shown ||= heatmap(load)).update(state.expert_load);
    const number = job.attempts.find((one) => one.id === state.attempt)?.number;
    if (logged !== number) {
      endLog();
      logged = number;
      endLog = logged ? logs(log, job.id, logged) : () => {};
    }
    log.hidden = !logged;
  };
  const stop = async () => {
    if (
      !(await confirm(
        `Stop ${state.job.name}?`,
        "This stops the running step. Finished steps are kept, and a new run reuses them.",
        "Stop the job",
        "Keep the job",
      ))
    )
      return;
    view.error = await call("POST", `/api/jobs/${encodeURIComponent(id)}/stop`).then(
      () => "",
      (error) => error.message,
    );
    show();
  };
  const explain = async () => {
    const waiting = ["queued", "starting"].includes(state.job.state);
    view.why = waiting
      ? (await call("GET", `/api/jobs/${encodeURIComponent(id)}/why`).catch(() => ({ lines: [] }))).lines
      : [];
  };
  const watch = (attempt) => {
    endStream();
    const base = `/api/jobs/${encodeURIComponent(id)}`,
      query = attempt ? `?attempt=${attempt}` : "";
    let last = "";
    const opened = async () => {
      try {
        await call("GET", `${base}/run${query}`); // a stream cannot report that the job does not exist
      } catch (error) {
        patch(
          head,
          h("h1", {}, "Run not found"),
          problem(error.message),
          h("p", {}, h("a", { href: "/" }, "Back to the overview")),
        );
        for (const node of [steps, curves, log]) node.hidden = true;
        return () => {};
      }
      return follow(`${base}/stream${query}`, "run", async (fresh) => {
        state = fresh;
        setClock(fresh.now);
        show();
        if (last !== fresh.job.state) await explain().then(show);
        last = fresh.job.state;
      });
    };
    const ending = opened();
    endStream = () => ending.then((end) => end());
  };
  watch(null);
  return () => {
    endStream();
    endLog();
    heat.shown?.end();
  };
}

function heading(state, view, stop, watch) {
  const { job } = state;
  const over = ENDED.includes(job.state);
  const reason = [job.reason, state.detail].filter((text, i, all) => text && all.indexOf(text) === i);
  const facts = [
    h("code", { class: "id" }, job.id),
    priority(job.priority),
    job.schedule ? h("span", {}, "from schedule ", h("a", { href: "/schedules" }, job.schedule)) : null,
    job.started ? null : h("span", {}, "submitted ", clock("ago", job.created)),
    job.started && over ? h("span", {}, "started ", clock("ago", job.started)) : null,
    job.started && over ? h("span", {}, "took ", duration(job.ended - job.started)) : null,
    job.started && !over ? h("span", {}, "running for ", clock("elapsed", job.started)) : null,
    job.set.length ? h("span", {}, "with ", h("code", {}, job.set.join(" "))) : null,
  ];
  return [
    h("p", { class: "crumbs" }, h("a", { href: "/" }, "Overview"), " / ", job.recipe),
    h(
      "div",
      { class: "heading" },
      h("h1", {}, job.name),
      chip(job.state),
      job.attempts.length > 1 ? attempts(job, state.attempt, watch) : null,
      over
        ? null
        : h(
            "button",
            { class: "button end danger", type: "button", onclick: stop, disabled: job.state === "stopping" },
            job.state === "stopping" ? "Stopping…" : "Stop",
          ),
    ),
    h("p", { class: "facts" }, facts),
    view.error ? problem(view.error) : null,
    reason.length
      ? h(
          "div",
          { class: job.state === "failed" || state.state === "failed" ? "problem" : "notice" },
          reason.map((text) => h("p", {}, text)),
        )
      : null,
    view.why.length
      ? h(
          "div",
          { class: "notice" },
          h("b", {}, "Why this job is waiting"),
          view.why.map((line) => h("p", {}, line)),
        )
      : null,
    state.unreadable
      ? h(
          "p",
          { class: "notice" },
          `${count(state.unreadable)} ${state.unreadable === 1 ? "event" : "events"} could not be read. Another version of Moray may have written them.`,
        )
      : null,
  ];
}

function attempts(job, shown, watch) {
  return h(
    "label",
    { class: "attempts" },
    "Attempt ",
    h(
      "select",
      { onchange: (event) => watch(event.target.value) },
      job.attempts.map((one) =>
        h("option", { value: one.number, selected: one.id === shown }, `${one.number}: ${one.state}`),
      ),
    ),
  );
}
