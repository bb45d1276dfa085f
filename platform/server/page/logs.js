// The output of an attempt's driver, updated while it runs.

import { h, patch } from "./dom.js";
import { call } from "./live.js";

const SECONDS = 1.5,
  MOST = 400000; // characters kept on the page
const COLOURS = /\u001b\[[0-9;?]*[A-Za-z]/g;

/** Shows the log of `attempt` in `place`; returns a function that ends the updates. */
export function logs(place, job, attempt) {
  const text = h("pre", { class: "log", tabindex: 0, role: "log", "aria-label": "Log" });
  const follow = h("input", { type: "checkbox", checked: true });
  const state = h("span", { class: "dim" });
  patch(
    place,
    h("div", { class: "card-head" }, h("h2", {}, "Log"), state, h("label", { class: "check end" }, follow, "Follow")),
    text,
  );
  let offset = 0,
    timer = 0,
    over = false;

  const bottom = () => (text.scrollTop = text.scrollHeight);
  text.onscroll = () => (follow.checked = text.scrollHeight - text.scrollTop - text.clientHeight < 24);
  follow.onchange = () => follow.checked && bottom();

  const poll = async () => {
    let ended = false;
    try {
      const query = new URLSearchParams({ attempt, offset });
      const found = await call("GET", `/api/jobs/${encodeURIComponent(job)}/logs?${query}`);
      if (over) return;
      ended = found.ended && (!found.text || found.offset === offset);
      append(found.text);
      offset = found.offset;
      patch(state, text.textContent ? "" : ended ? "No output." : "No output yet.");
    } catch (error) {
      if (!over) patch(state, error.message);
    }
    if (!over && !ended) timer = setTimeout(poll, SECONDS * 1000);
  };
  const append = (more) => {
    if (!more) return;
    const pinned = follow.checked;
    const all = text.textContent + more.replace(COLOURS, "").replace(/\r(?!\n)/g, "\n");
    text.textContent = all.length > MOST ? all.slice(all.indexOf("\n", all.length - MOST) + 1) : all;
    if (pinned) bottom();
  };
  poll();
  return () => {
    over = true;
    clearTimeout(timer);
  };
}
