// What the driver of an attempt prints, followed while it is at work.

import { h, patch } from "./dom.js";
import { call } from "./live.js";

const SECONDS = 1.5,
  MOST = 400000; // characters that stay on the page
const COLOURS = /\u001b\[[0-9;?]*[A-Za-z]/g;

/** Fills `place` with the log of `attempt`; returns what ends it. */
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
      patch(state, text.textContent ? "" : ended ? "It printed nothing." : "Nothing printed yet.");
    } catch (error) {
      if (!over) patch(state, error.message);
    }
    if (!over && !ended) timer = setTimeout(poll, SECONDS * 1000);
  };
  const append = (more) => {
    if (!more) return;
    const stays = follow.checked;
    const all = text.textContent + more.replace(COLOURS, "").replace(/\r(?!\n)/g, "\n");
    text.textContent = all.length > MOST ? all.slice(all.indexOf("\n", all.length - MOST) + 1) : all;
    if (stays) bottom();
  };
  poll();
  return () => {
    over = true;
    clearTimeout(timer);
  };
}
