// The schedules: their rules, next ticks and latest ticks.

import { h, patch } from "./dom.js";
import { clock, ownZone, setClock, stamp } from "./format.js";
import { call, follow } from "./live.js";
import { chip, empty, icon, priority, problem } from "./parts.js";

const OVERLAP = {
  skip: "A tick is skipped while an earlier job is unfinished.",
  queue: "The job of a tick waits until all earlier jobs have ended.",
  allow: "Jobs of several ticks may run at the same time.",
};
const CATCHUP = {
  none: "Ticks missed while Moray was down are skipped.",
  last: "Of the ticks missed while Moray was down, only the last one runs.",
};

export function schedules(place) {
  document.title = "Schedules · Moray";
  const details = new Map(); // name -> the schedule from the API, with its next ticks
  let known = null,
    error = "";

  const show = () =>
    patch(
      place,
      h(
        "div",
        { class: "heading" },
        h("h1", {}, "Schedules"),
        h("p", { class: "sum dim" }, `Your time zone is ${ownZone()}.`),
      ),
      error ? problem(error) : null,
      known === null
        ? empty("Waiting for the controller…")
        : known.length
          ? known.map((one) => schedule({ ...one, ...details.get(one.name) }, act))
          : h(
              "section",
              { class: "card welcome" },
              h("h2", {}, "No schedules yet"),
              h("p", {}, "To run a recipe every night at 02:00:"),
              h("pre", {}, 'moray schedule add nightly quickstart --cron "0 2 * * *"'),
            ),
    );

  const act = async (name, what) => {
    try {
      await call("POST", `/api/schedules/${encodeURIComponent(name)}/${what}`);
      error = "";
      await load(name);
    } catch (failure) {
      error = failure.message;
    }
    show();
  };

  const load = async (name) => {
    const base = `/api/schedules/${encodeURIComponent(name)}`;
    const [one, coming] = await Promise.all([call("GET", base), call("GET", `${base}/next?n=5`)]);
    details.set(name, { ...one, coming: coming.ticks });
  };

  const receive = async (state) => {
    setClock(state.now);
    const before = new Map((known || []).map((one) => [one.name, JSON.stringify(one)]));
    known = state.schedules || [];
    const changed = known.filter((one) => before.get(one.name) !== JSON.stringify(one));
    for (const one of changed) details.set(one.name, { ...details.get(one.name), ...one });
    show();
    try {
      for (const one of changed) await load(one.name);
      error = "";
    } catch (failure) {
      error = failure.message;
    }
    show();
  };
  show();
  return follow("/api/stream", "overview", receive);
}

function schedule(one, act) {
  const rule = one.cron ? h("code", { class: "nowrap" }, one.cron) : `every ${one.every}`;
  return h(
    "section",
    { class: "card schedule", "data-key": one.name, "aria-label": one.name },
    h(
      "div",
      { class: "card-head" },
      h("h2", {}, one.name),
      one.paused ? chip("paused") : null,
      h("span", { class: "dim" }, one.recipe),
      priority(one.priority),
      h(
        "button",
        { class: "button end", type: "button", onclick: () => act(one.name, one.paused ? "resume" : "pause") },
        one.paused ? "Resume" : "Pause",
      ),
    ),
    h("p", { class: "reading" }, one.english, " ", h("span", { class: "dim" }, "(", rule, ")")),
    h("div", { class: "columns even" }, h("div", {}, upcoming(one)), h("div", {}, latest(one))),
    h(
      "p",
      { class: "dim rules" },
      OVERLAP[one.overlap] || "",
      " ",
      CATCHUP[one.catchup] || "",
      one.retries ? ` A failed job is retried up to ${one.retries} ${one.retries === 1 ? "time" : "times"}.` : "",
      one.set?.length ? [" With ", h("code", {}, one.set.join(" ")), "."] : null,
    ),
  );
}

function upcoming(one) {
  if (one.paused) return [h("h3", {}, "Next ticks"), empty("Paused. Ticks are skipped until you resume the schedule.")];
  const coming = one.coming?.length ? one.coming.map((row) => row.tick) : one.next ? [one.next] : [];
  const elsewhere = one.tz && one.tz !== ownZone();
  return [
    h("h3", {}, "Next ticks"),
    coming.length
      ? h(
          "div",
          { class: "scroll" },
          h(
            "table",
            {},
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                h("th", {}, ""),
                h("th", {}, one.tz || ownZone()),
                elsewhere ? h("th", {}, "Your time") : null,
              ),
            ),
            h(
              "tbody",
              {},
              coming.map((at) =>
                h(
                  "tr",
                  { "data-key": String(at) },
                  h("td", {}, clock("until", at)),
                  h("td", {}, stamp(at, one.tz)),
                  elsewhere ? h("td", {}, stamp(at)) : null,
                ),
              ),
            ),
          ),
        )
      : empty("No further ticks."),
  ];
}

function latest(one) {
  const ticks = one.ticks || [];
  return [
    h("h3", {}, "Latest ticks"),
    ticks.length
      ? h(
          "ul",
          { class: "rows small" },
          ticks
            .slice(0, 8)
            .map((row) =>
              h(
                "li",
                { class: "row", "data-key": String(row.tick) },
                icon(row.outcome, row.outcome === "run" ? "up" : undefined),
                h(
                  "div",
                  { class: "row-main" },
                  h(
                    "div",
                    { class: "line" },
                    row.job
                      ? h("a", { href: `/jobs/${encodeURIComponent(row.job)}` }, row.outcome)
                      : h("span", {}, row.count > 1 ? `${row.count} ${row.outcome}` : row.outcome),
                    h(
                      "span",
                      { class: "end dim upto" },
                      stamp(row.tick, one.tz),
                      row.count > 1 ? ` to ${stamp(row.until, one.tz)}` : "",
                    ),
                  ),
                  row.reason ? h("div", { class: "line dim" }, row.reason) : null,
                ),
              ),
            ),
        )
      : empty("No ticks yet."),
  ];
}
