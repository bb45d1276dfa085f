// The box in which a deployed model is tried: a prompt, and the answer as it is generated.

import { completion } from "./completion.js";
import { h, patch } from "./dom.js";
import { count, latency } from "./format.js";
import { problem } from "./parts.js";

const ENDS = { length: "reached max tokens", stop: "ended by itself" };

/** Adds the box to `place`; returns a function that ends a request that still runs. */
export function promptBox(place, name) {
  const prompt = h("textarea", { rows: 3, required: true, spellcheck: "false" }, "In the beginning"),
    tokens = h("input", { type: "number", min: 1, step: 1, value: 60, required: true }),
    temperature = h("input", { type: "number", min: 0, max: 2, step: "any", value: 1, required: true });
  const button = h("button", { class: "button", type: "submit" }, "Send"),
    result = h("p", { class: "dim", role: "status" }),
    trouble = h("div"),
    answer = h("pre", { class: "log answer", tabindex: 0, role: "log", "aria-label": "Answer" });
  const form = h(
    "form",
    { class: "prompt" },
    h("label", { class: "whole" }, h("span", { class: "dim" }, "Prompt"), prompt),
    h("label", {}, h("span", { class: "dim" }, "Max tokens"), tokens),
    h("label", {}, h("span", { class: "dim" }, "Temperature"), temperature),
    button,
  );
  place.append(h("div", { class: "card-head" }, h("h2", {}, "Try it")), form, trouble, answer, result);
  let running = null;

  const send = async () => {
    running = new AbortController();
    const { signal } = running;
    answer.textContent = "";
    patch(trouble);
    patch(result, "Waiting for the first token…");
    shown(true);
    const told = meter();
    try {
      const body = {
        model: name,
        prompt: prompt.value,
        max_tokens: tokens.valueAsNumber,
        temperature: temperature.valueAsNumber,
      };
      for await (const chunk of completion(`/api/deployments/${encodeURIComponent(name)}/completions`, body, signal)) {
        const text = told.add(chunk);
        if (text) answer.append(text);
        answer.scrollTop = answer.scrollHeight;
        patch(result, told.words());
      }
    } catch (error) {
      patch(result, told.words(signal.aborted ? "stopped" : ""));
      if (!signal.aborted) patch(trouble, problem(error.message));
    }
    running = null;
    shown(false);
  };
  const shown = (busy) => {
    button.textContent = busy ? "Stop" : "Send";
    answer.setAttribute("aria-busy", String(busy));
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  };
  prompt.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) form.requestSubmit();
  };
  return () => running?.abort();
}

/** Measures an answer: the time to its first token, its tokens and their rate. */
function meter() {
  const began = performance.now();
  let first = null,
    last = null,
    end = "",
    tokens = null;
  return {
    /** Counts a chunk and returns its text. */
    add(chunk) {
      const choice = chunk.choices?.[0];
      if (choice) last = performance.now();
      if (choice?.text) first ??= last;
      end = ENDS[choice?.finish_reason] ?? end;
      tokens = chunk.usage?.completion_tokens ?? tokens; // in the last chunk
      return choice?.text ?? "";
    },
    words(ending = end) {
      const seconds = (last - first) / 1000;
      return [
        first === null ? "" : `first token after ${latency((first - began) / 1000)}`,
        tokens === null ? "" : `${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`,
        tokens > 1 && seconds > 0 ? `${count((tokens - 1) / seconds)} tokens/s` : "",
        ending,
      ]
        .filter(Boolean)
        .join(" · ");
    },
  };
}
