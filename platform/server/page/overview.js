// The overview: running, queued and recent jobs, the cluster, the deployments, the services and the next ticks.

import { deploymentsCard } from "./deployments.js";
import { h, patch } from "./dom.js";
import { bytes, clock, count, duration, percent, setClock, stamp } from "./format.js";
import { follow } from "./live.js";
import { bar, card, empty, icon, priority, serviceIcon } from "./parts.js";

export function overview(place) {
  document.title = "Moray";
  patch(place, h("h1", {}, "Overview"), h("p", { class: "empty" }, "Waiting for the controller…"));
  return follow("/api/stream", "overview", (state) => {
    setClock(state.now);
    document.title = state.active ? `${state.active} running · Moray` : "Moray";
    patch(
      place,
      heading(state),
      h(
        "div",
        { class: "columns" },
        h("div", { class: "stack" }, work(state)),
        h("div", { class: "stack rail" }, rail(state)),
      ),
    );
  });
}

function heading(state) {
  const shown = ["succeeded", "failed", "cancelled"].filter((name) => state.counts[name]);
  return h(
    "div",
    { class: "heading" },
    h("h1", {}, "Overview"),
    h(
      "p",
      { class: "sum" },
      h("span", {}, h("b", {}, state.active), " running"),
      h("span", {}, h("b", {}, state.waiting), " queued"),
      shown.length ? h("span", { class: "sum-label" }, "last 24 h") : null,
      shown.map((name) => h("span", {}, icon(name), h("b", {}, state.counts[name]), ` ${name}`)),
    ),
  );
}

function work(state) {
  const nothing = !state.running.length && !state.queued.length && !state.recent.length;
  if (nothing) {
    return h(
      "section",
      { class: "card welcome" },
      h("h2", {}, "Nothing has run yet"),
      h("p", {}, "Submit a first job. It turns raw text into a served model within minutes on two cores:"),
      h("pre", {}, "moray submit quickstart"),
      h(
        "p",
        { class: "dim" },
        "It appears here at once. To run a recipe at regular times, use ",
        h("code", {}, "moray schedule add"),
        ".",
      ),
    );
  }
  const local = state.clusters.find((one) => one.name === "local") ?? { running: 0 };
  const slots =
    state.slots === undefined
      ? null
      : h(
          "span",
          { class: "dim" },
          `${local.running} of ${count(state.slots)} ${state.slots === 1 ? "slot" : "slots"} of this machine`,
        );
  return [
    card(
      "Running",
      slots,
      state.running.length
        ? h("ul", { class: "rows" }, state.running.map(running))
        : empty("No job is running. Start one:", "moray submit quickstart"),
    ),
    state.queued.length
      ? card(
          "Queue",
          h(
            "span",
            { class: "dim" },
            state.waiting > state.queued.length ? `first ${state.queued.length} of ${state.waiting}` : "next job on top",
          ),
          h("ol", { class: "rows" }, state.queued.map(queued)),
        )
      : null,
    card(
      "Recent",
      null,
      state.recent.length ? h("ul", { class: "rows" }, state.recent.map(recent)) : empty("No job has finished yet."),
    ),
  ];
}

const link = (job) => h("a", { class: "name", href: `/jobs/${encodeURIComponent(job.id)}` }, job.name);
const placed = (job) =>
  job.cluster && job.cluster !== "local" ? h("span", { class: "tag", title: "Cluster" }, job.cluster) : null;
const from = (job) =>
  job.schedule
    ? h(
        "span",
        { class: "tag", title: `Submitted by schedule ${job.schedule}` },
        job.schedule === job.name ? "scheduled" : `schedule ${job.schedule}`,
      )
    : null;

function running(job) {
  const run = job.run,
    at = run?.progress;
  const where = !run
    ? job.state
    : run.step
      ? `${run.step}${at ? ` · ${at.phase}` : ""}`
      : job.state === "running"
        ? "between steps"
        : job.state;
  const rate = at?.rate ? `${count(at.rate)} ${at.unit}/s` : "";
  const eta = at?.eta !== null && at?.eta !== undefined ? `about ${duration(at.eta)} left` : "";
  return h(
    "li",
    { class: "row running", "data-key": job.id },
    icon(job.state),
    h(
      "div",
      { class: "row-main" },
      h(
        "div",
        { class: "line" },
        link(job),
        priority(job.priority),
        placed(job),
        from(job),
        h("span", { class: "end dim" }, clock("elapsed", job.started || job.created)),
      ),
      run?.steps
        ? h(
            "div",
            { class: "beads", "aria-hidden": "true" },
            Array.from({ length: run.steps }, (_, i) =>
              h(
                "i",
                { class: i < run.done ? "done" : i === run.done && run.step ? "now" : "" },
                i === run.done && at?.total
                  ? h("b", { style: { width: percent(at.done / at.total).replace(" ", "") } })
                  : null,
              ),
            ),
          )
        : null,
      h(
        "div",
        { class: "line dim" },
        h("span", {}, where, at?.total ? ` · ${percent(at.done / at.total)}` : ""),
        h("span", {}, [rate, eta].filter(Boolean).join(" · ")),
        run?.steps ? h("span", { class: "end" }, `${run.done} of ${run.steps} steps`) : null,
      ),
    ),
  );
}

function queued(job, place) {
  return h(
    "li",
    { class: "row", "data-key": job.id },
    h("span", { class: "position", title: "Position in the queue" }, place + 1),
    h(
      "div",
      { class: "row-main" },
      h(
        "div",
        { class: "line" },
        link(job),
        priority(job.priority),
        placed(job),
        from(job),
        h("span", { class: "end dim" }, h("span", {}, "queued for ", clock("elapsed", job.created))),
      ),
      job.reason ? h("div", { class: "line dim" }, job.reason) : null,
    ),
  );
}

function recent(job) {
  const took = job.started && job.ended ? duration(job.ended - job.started) : "";
  return h(
    "li",
    { class: "row recent", "data-key": job.id },
    icon(job.state),
    h(
      "div",
      { class: "row-main" },
      h(
        "div",
        { class: "line" },
        link(job),
        from(job),
        h("span", { class: "end dim" }, took && h("span", { class: "took" }, took), clock("ago", job.ended)),
      ),
      job.reason ? h("div", { class: `line ${job.state === "failed" ? "bad" : "dim"}` }, job.reason) : null,
    ),
  );
}

function rail(state) {
  return [
    cluster(state.cluster),
    clusters(state.clusters),
    deploymentsCard(state.deployments || []),
    services(state.services || []),
    ticks(state.schedules || []),
  ];
}

function cluster(found) {
  if (!found || !found.alive) {
    return card(
      "Cluster",
      h("span", { class: "end" }, icon("lost")),
      empty(found?.detail || "The cluster is unreachable.", "moray status"),
    );
  }
  return card(
    "Cluster",
    h("span", { class: "dim" }, ...nodes(found)),
    meters(found),
    found.detail ? h("p", { class: "dim" }, found.detail) : null,
  );
}

/** How many nodes live, and how many are dead. */
function nodes(use) {
  return [
    `${use.nodes} ${use.nodes === 1 ? "node" : "nodes"}`,
    use.dead_nodes ? h("span", { class: "warn" }, `, ${use.dead_nodes} dead`) : null,
  ];
}

/** How much of each resource is in use. Of the other clusters, the memory in use is not known. */
function meters(use) {
  const rows = [
    ["CPU", use.cpus_used, use.cpus, count],
    ["GPU", use.gpus_used, use.gpus, count],
    ["Memory", use.memory_used_bytes, use.memory_bytes, bytes],
  ];
  return h(
    "dl",
    { class: "meters" },
    rows
      .filter(([, used, all]) => all && used !== undefined)
      .map(([name, used, all, form]) =>
        h(
          "div",
          {},
          h("dt", {}, name),
          h("dd", {}, `${form(used)} of ${form(all)}`),
          bar(used / all, `${name} in use`),
        ),
      ),
  );
}

/** The clusters other than this machine: their hosts, what runs there, and why one does not respond. */
function clusters(all) {
  const found = all.filter((one) => one.name !== "local");
  if (!found.length) return null;
  return card(
    "Other clusters",
    null,
    h(
      "ul",
      { class: "rows small" },
      found.map((one) =>
        h(
          "li",
          { class: "row", "data-key": one.name },
          h(
            "div",
            { class: "row-main" },
            h(
              "div",
              { class: "line" },
              h("span", { class: "name" }, one.name),
              h("span", { class: "end dim" }, `${one.running} of ${count(one.slots)} jobs, ${one.queued} queued`),
            ),
            h(
              "div",
              { class: "line dim" },
              one.where,
              one.usage ? h("span", { class: "end" }, h("span", {}, ...nodes(one.usage))) : null,
            ),
            one.error ? h("div", { class: "line" }, h("span", { class: "warn" }, one.error)) : null,
            one.usage ? [meters(one.usage), hosts(one.usage)] : null,
          ),
        ),
      ),
    ),
  );
}

/** The hosts of a cluster, the dead ones and those with drivers first, and the demands that wait for room. */
function hosts(use) {
  const more = use.nodes + use.dead_nodes - use.hosts.length;
  return [
    ...use.hosts.map((one) =>
      h(
        "div",
        { class: "line", "data-key": one.id },
        h("span", { class: one.alive ? "" : "bad" }, one.address),
        one.head ? h("span", { class: "tag" }, "head") : null,
        one.drivers.map((attempt) =>
          h("a", { href: `/jobs/${encodeURIComponent(attempt.slice(0, attempt.lastIndexOf(".")))}`, class: "tag", title: `The driver of ${attempt} runs here` }, "driver"),
        ),
        h("span", { class: "end dim" }, one.alive ? `${count(one.cpus_used)} of ${count(one.cpus)} CPU` : "dead"),
      ),
    ),
    more > 0 ? h("div", { class: "line dim" }, `and ${count(more)} more`) : null,
    use.waiting.length ? h("p", { class: "dim" }, `pending demand: ${use.waiting.join(", ")}`) : null,
  ];
}

function services(found) {
  return card(
    "Services",
    null,
    found.length ? h("ul", { class: "rows small" }, found.map(service)) : empty("No services.", "moray up"),
  );
}

function service(one) {
  const restarts = one.restarts ? `${one.restarts} ${one.restarts === 1 ? "restart" : "restarts"}` : "";
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
        h("span", { class: "name" }, one.name),
        one.state === "running" ? null : h("span", { class: "warn" }, one.state),
        h(
          "span",
          { class: "end dim" },
          one.pid ? h("span", {}, `pid ${one.pid}`) : null,
          h("span", {}, clock("elapsed", one.since)),
        ),
      ),
      restarts || one.detail
        ? h("div", { class: "line dim" }, restarts ? h("span", { class: "warn" }, restarts) : null, one.detail)
        : null,
    ),
  );
}

function ticks(found) {
  const next = found
    .filter((one) => one.next && !one.paused)
    .sort((a, b) => a.next - b.next)
    .slice(0, 6);
  return card(
    "Next ticks",
    h("a", { href: "/schedules" }, "Schedules"),
    next.length
      ? h(
          "ul",
          { class: "rows small" },
          next.map((one) =>
            h(
              "li",
              { class: "row", "data-key": one.name },
              h(
                "div",
                { class: "row-main" },
                h(
                  "div",
                  { class: "line" },
                  h("span", { class: "name" }, one.name),
                  h("span", { class: "end dim" }, clock("until", one.next)),
                ),
                h("div", { class: "line dim" }, stamp(one.next)),
              ),
            ),
          ),
        )
      : empty(
          found.length ? "All schedules are paused." : "No schedules yet.",
          found.length ? "" : "moray schedule add",
        ),
  );
}
