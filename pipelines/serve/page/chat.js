// A chat with one of the models of this server. Messages are kept in the browser's session storage.

const $ = (id) => document.getElementById(id);
const state = { messages: [], models: [], running: null };

function element(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

function remembered(name, fallback) {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function remember(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage is full or forbidden: the conversation is kept until the page is closed.
  }
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** The message of an error response in OpenAI's form. */
async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function loadModels() {
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    showProblem("The server does not answer.");
    return;
  }
  if (response.status === 401) {
    openOptions(true);
    showProblem("This server needs a key: enter it in the options.");
    $("key").focus();
    return;
  }
  if (!response.ok) {
    showProblem(await problemOf(response));
    return;
  }
  showProblem("");
  state.models = (await response.json()).data;
  const chosen = $("model").value || remembered("model", "");
  $("model").replaceChildren(...state.models.map((model) => element("option", { value: model.id, textContent: model.id })));
  if (state.models.some((model) => model.id === chosen)) $("model").value = chosen;
  showNotice();
}

function showNotice() {
  const model = state.models.find((one) => one.id === $("model").value);
  const plain = model?.chat_template === "plain";
  $("notice").textContent = plain ? "This is a base model: it was not trained to chat, and continues the dialogue as any other text." : "";
  $("notice").hidden = !plain;
}

/** Text with fenced code as blocks. */
function showText(target, text) {
  target.replaceChildren();
  text.split("```").forEach((part, place) => {
    if (place % 2 === 0) target.append(part);
    else target.append(element("pre", {}, element("code", { textContent: part.replace(/^[\w+-]*\n/, "") })));
  });
}

function messageView(message) {
  const text = element("div", { className: "text" });
  const thoughts = element("div", { className: "text" });
  const details = element("details", { hidden: true }, element("summary", { textContent: "Reasoning" }), thoughts);
  const foot = element("div", { className: "foot" });
  const who = element("div", { className: "who", textContent: message.role === "user" ? "You" : message.model || "Model" });
  const view = element("li", { className: `message ${message.role}` }, who, details, text, foot);
  const update = (waiting) => {
    showText(text, message.content);
    thoughts.textContent = message.reasoning ?? "";
    details.hidden = !message.reasoning;
    text.classList.toggle("waiting", waiting);
    foot.replaceChildren(...(waiting ? [] : footParts(message)));
    foot.hidden = !foot.childNodes.length;
  };
  update(false);
  return { view, update };
}

function footParts(message) {
  if (message.role !== "assistant") return [];
  const parts = [];
  const button = (label, act) => parts.push(element("button", { className: "quiet", type: "button", textContent: label, onclick: act }));
  button("Copy", (event) => {
    navigator.clipboard?.writeText(message.content);
    event.target.textContent = "Copied";
  });
  if (message === state.messages.at(-1)) {
    button("Retry", () => {
      state.messages.pop();
      showAll();
      answer();
    });
  }
  if (message.note) parts.push(element("span", { textContent: message.note }));
  return parts;
}

function showAll() {
  $("messages").replaceChildren(...state.messages.map((message) => messageView(message).view));
  $("empty").hidden = state.messages.length > 0;
  remember("messages", state.messages);
}

function atBottom() {
  const main = $("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < 60;
}

function toBottom() {
  $("main").scrollTop = $("main").scrollHeight;
}

function body() {
  const system = $("system").value.trim();
  const messages = state.messages.map(({ role, content }) => ({ role, content }));
  const limit = Number.parseInt($("limit").value, 10);
  return {
    model: $("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(limit > 0 ? { max_completion_tokens: limit } : {}),
  };
}

/** Yields the JSON of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function note(message, usage, began, first) {
  const reasons = { length: "stopped at the limit", stopped: "stopped" };
  const parts = [];
  if (usage && first) {
    const rate = (usage.completion_tokens - 1) / Math.max((performance.now() - first) / 1000, 0.001);
    parts.push(`${usage.completion_tokens} tokens`, `first after ${Math.round(first - began)} ms`);
    if (usage.completion_tokens > 8) parts.push(`${Math.round(rate)} tokens/s`);
  }
  if (reasons[message.reason]) parts.push(reasons[message.reason]);
  return parts.join(" · ");
}

/** Asks for the answer to the messages so far, and shows it as it comes. */
async function answer() {
  const request = body();
  const message = { role: "assistant", content: "", reasoning: "", model: request.model };
  const shown = messageView(message);
  state.messages.push(message);
  $("messages").append(shown.view);
  shown.update(true);
  toBottom();
  showProblem("");
  state.running = new AbortController();
  busy(true);
  const began = performance.now();
  let first = 0;
  let usage = null;
  let problem = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request), signal: state.running.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const [choice] = event.choices;
      if (!choice) continue;
      first ||= performance.now();
      message.content += choice.delta.content ?? "";
      message.reasoning += choice.delta.reasoning_content ?? "";
      message.reason = choice.finish_reason ?? message.reason;
      const follow = atBottom();
      shown.update(true);
      if (follow) toBottom();
    }
  } catch (error) {
    if (error.name === "AbortError") message.reason = "stopped";
    else problem = error.message || "The server does not answer.";
  }
  message.note = note(message, usage, began, first);
  state.running = null;
  busy(false);
  if (problem && !message.content) state.messages.pop();
  showAll();
  showProblem(problem);
  toBottom();
  $("prompt").focus();
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

function openOptions(open) {
  $("options").hidden = !open;
  $("options-open").setAttribute("aria-expanded", String(open));
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function save() {
  const text = JSON.stringify(body().messages, null, 2);
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "chat.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("prompt").value.trim();
  if (!content || state.running) return;
  state.messages.push({ role: "user", content });
  $("prompt").value = "";
  grow();
  showAll();
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", () => state.running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
$("new").addEventListener("click", () => {
  state.running?.abort();
  state.messages = [];
  showAll();
  showProblem("");
  $("prompt").focus();
});
$("save").addEventListener("click", save);
$("options-open").addEventListener("click", () => openOptions($("options").hidden));
$("options").addEventListener("submit", (event) => event.preventDefault());
$("model").addEventListener("change", () => {
  remember("model", $("model").value);
  showNotice();
});
for (const name of ["system", "temperature", "limit", "key"]) {
  $(name).value = remembered(name, $(name).value);
  $(name).addEventListener("change", () => {
    remember(name, $(name).value);
    if (name === "key") loadModels();
  });
}

$("address").textContent = `${location.origin}/v1`;
state.messages = remembered("messages", []);
showAll();
loadModels();
$("prompt").focus();
