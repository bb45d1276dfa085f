// One job: its steps and how they stand, its curves, its expert load, its log.

import { charts } from "./chart.js";
import { dag } from "./dag.js";
import { h, patch } from "./dom.js";
import { clock, count, duration, figure, percent, setClock } from "./format.js";
import { heatmap } from "./heatmap.js";
import { call, follow } from "./live.js";
import { logs } from "./logs.js";
import { bar, chip, confirm, empty, icon, priority, problem } from "./parts.js";

const ENDED = ["succeeded", "failed", "cancelled"];
const LARGE = 2; // how many curves are drawn large: loss and throughput
const STRAIGHT = "train_tokens"; // a straight line, and in the progress already
const TITLES = {
  train_loss: "Loss", train_tokens_per_second: "Throughput", train_grad_norm: "Gradient norm", train_learning_rate: "Learning rate",
  train_bias_speed: "Router bias speed", train_tokens: "Tokens trained on", train_data_wait: "Waiting for data", train_max_violation: "Worst expert overload (MaxVio)",
  train_checkpoint_seconds: "Checkpoint pause", eval_bits_per_byte: "Held-out bits per byte",
};

export function run(place, id) {
  const part = (name, props) => place.appendChild(h("div", { class: name, ...props }));
  const head = part("run-head"), steps = part("card dag-card", { role: "group", "aria-label": "Steps" }), curves = part("curves"), load = h("div", { class: "card heat-card", hidden: true }), log = part("card");
  const graph = steps.appendChild(h("div", { class: "dag scroll" })), detail = steps.appendChild(h("div", { class: "detail" }));
  const view = { chosen: "", picked: false, attempt: null, said: "", why: [] };
  let state = null, endLog = () => {}, logged, endStream = () => {};
  patch(head, empty("Waiting for the controller…"));

  const choose = (key) => {
    view.picked = view.chosen !== key || !view.picked;
    view.chosen = key;
    show();
  };
  const showSteps = dag(graph, choose), showCurves = curveCards(curves, load);
  const heat = { shown: null };

  const show = () => {
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
    if (!(await confirm(`Stop ${state.job.name}?`, "The step at work ends; what finished stays, and a new run reuses it.", "Stop the job"))) return;
    view.said = await call("POST", `/api/jobs/${encodeURIComponent(id)}/stop`).then(() => "", (error) => error.message);
    show();
  };
  const explain = async () => {
    const waits = ["queued", "starting"].includes(state.job.state);
    view.why = waits ? (await call("GET", `/api/jobs/${encodeURIComponent(id)}/why`).catch(() => ({ lines: [] }))).lines : [];
  };
  const watch = (attempt) => {
    endStream();
    const base = `/api/jobs/${encodeURIComponent(id)}`, query = attempt ? `?attempt=${attempt}` : "";
    let last = "";
    const opened = async () => {
      try {
        await call("GET", `${base}/run${query}`); // a stream cannot say that there is no such job
      } catch (error) {
        patch(head, h("h1", {}, "No such run"), problem(error.message), h("p", {}, h("a", { href: "/" }, "Back to the overview")));
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

/** The step to look at when nobody chose one: at work, else what went wrong, else the last that was done. */
function interesting(steps) {
  const find = (...states) => steps.find((step) => states.includes(step.state))?.key;
  return find("started", "waiting") || find("failed", "lost", "cancelled") || steps.filter((step) => step.state !== "pending").pop()?.key || steps[0]?.key || "";
}

function heading(state, view, stop, watch) {
  const { job } = state;
  const over = ENDED.includes(job.state);
  const reason = [job.reason, state.detail].filter((text, i, all) => text && all.indexOf(text) === i);
  const facts = [
    h("code", { class: "id" }, job.id), priority(job.priority),
    job.schedule ? h("span", {}, "by schedule ", h("a", { href: "/schedules" }, job.schedule)) : null,
    job.started ? h("span", {}, "started ", clock("ago", job.started)) : h("span", {}, "submitted ", clock("ago", job.created)),
    job.started && over ? h("span", {}, "took ", duration(job.ended - job.started)) : null,
    job.started && !over ? h("span", {}, "for ", clock("elapsed", job.started)) : null,
    job.set.length ? h("span", {}, "with ", h("code", {}, job.set.join(" "))) : null,
  ];
  return [
    h("p", { class: "crumbs" }, h("a", { href: "/" }, "Overview"), " / ", job.recipe),
    h("div", { class: "heading" }, h("h1", {}, job.name), chip(job.state), job.attempts.length > 1 ? attempts(job, state.attempt, watch) : null,
      over ? null : h("button", { class: "button end danger", type: "button", onclick: stop, disabled: job.state === "stopping" }, job.state === "stopping" ? "Stopping…" : "Stop")),
    h("p", { class: "facts" }, facts),
    view.said ? problem(view.said) : null,
    reason.length ? h("div", { class: job.state === "failed" || state.state === "failed" ? "problem" : "notice" }, reason.map((text) => h("p", {}, text))) : null,
    view.why.length ? h("div", { class: "notice" }, h("b", {}, "Why it waits"), view.why.map((line) => h("p", {}, line))) : null,
    state.unreadable ? h("p", { class: "notice" }, `${count(state.unreadable)} ${state.unreadable === 1 ? "event" : "events"} could not be read: another version of Moray may have written them.`) : null,
  ];
}

function attempts(job, shown, watch) {
  return h("label", { class: "attempts" }, "Attempt ",
    h("select", { onchange: (event) => watch(event.target.value) }, job.attempts.map((one) => h("option", { value: one.number, selected: one.id === shown }, `${one.number}: ${one.state}`))));
}

function stepDetail(step) {
  if (!step) return empty("This recipe has no steps that can be read.");
  const at = step.progress;
  const facts = [
    ["Why", step.why], ["Outcome", step.outcome],
    ["Took", ["succeeded", "failed", "cancelled", "lost"].includes(step.state) && step.seconds ? duration(step.seconds) : ""],
    ["Inputs", Object.entries(step.inputs).map(([name, from]) => `${name} from ${from}`).join(", ")],
    ["Uses", step.uses === step.key ? "" : step.uses],
    ["Artifact", step.fingerprint ? h("code", { title: step.fingerprint }, `${step.uses}/${step.fingerprint.slice(0, 12)}`) : ""],
  ].filter(([, value]) => value);
  const counts = Object.entries(step.counts);
  return [
    h("div", { class: "detail-head" }, icon(step.state), h("h2", {}, step.key), h("span", { class: "dim" }, step.state,
      step.state === "started" && step.began ? [" ", clock("elapsed", step.began)] : null)),
    at ? h("div", { class: "progress" }, bar(at.total ? at.done / at.total : 0, `${step.key}: ${at.phase}`),
      h("p", {}, h("b", {}, at.total ? percent(at.done / at.total) : ""), ` ${at.phase} · ${count(at.done)} of ${count(at.total)} ${at.unit}`,
        at.rate ? ` · ${count(at.rate)} ${at.unit}/s` : "", at.eta !== null ? ` · about ${duration(at.eta)} left` : "", at.detail ? ` · ${at.detail}` : "")) : null,
    h("dl", { class: "facts-list" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
      counts.length ? h("div", {}, h("dt", {}, "Counts"), h("dd", { class: "counts" }, counts.map(([name, value]) => h("span", {}, h("b", {}, figure(value)), ` ${spoken(name)}`)))) : null),
    step.notes.length ? h("ul", { class: "notes" }, step.notes.map((note) => h("li", { class: note.level }, h("span", { class: "dim" }, note.level === "warning" ? "warning" : "note", " "), note.text))) : null,
    !at && !facts.length && step.state === "pending" ? empty("Not begun.") : null,
  ];
}

const spoken = (name) => name.replace(/^(in|out):(.*)$/, "$2 $1").replaceAll("_", " ");

/** Charts are made when a curve first has points, and kept: their cursor and size live on. */
function curveCards(place, load) {
  const made = new Map(), group = charts();
  const title = h("h2", { class: "section", hidden: true }, "Curves"), large = h("div", { class: "grid two" }), small = h("div", { class: "grid three" }), figures = h("dl", { class: "figures" });
  place.append(title, large, load, small, figures);
  return (state) => {
    const names = Object.keys(state.curves).filter((name) => state.curves[name].length > 1 && name !== STRAIGHT);
    const alone = Object.entries(state.curves).filter(([name, curve]) => curve.length === 1 && name !== STRAIGHT).map(([name, [[, value]]]) => [name, value]);
    title.hidden = !Object.keys(state.curves).length && !Object.keys(state.figures).length;
    for (const name of [...made.keys()]) if (!names.includes(name)) (made.get(name).end(), made.get(name).card.remove(), made.delete(name));
    names.forEach((name, i) => {
      if (!made.has(name)) {
        const [base, ...labels] = name.split("/"), known = state.metrics[base] || {};
        const chart = group.add([TITLES[base] || base.replaceAll("_", " "), ...labels].join(" · "), known.unit || "", known.help || "", i < LARGE ? 210 : 112);
        const holder = h("div", { class: "card", "data-curve": name }, chart.node);
        made.set(name, { ...chart, card: holder });
      }
      const { card, update } = made.get(name), home = i < LARGE ? large : small;
      if (card.parentNode !== home) home.append(card);
      update(state.curves[name]);
    });
    patch(figures, [...Object.entries(state.figures), ...alone].map(([name, value]) => {
      const [base, ...labels] = name.split("/");
      return h("div", { class: "card" }, h("dt", {}, TITLES[base] || base.replaceAll("_", " "), labels.map((label) => ` · ${label}`)), h("dd", {}, figure(value), state.metrics[base]?.unit ? h("span", { class: "unit" }, ` ${state.metrics[base].unit}`) : null));
    }));
  };
}
