// The connection to the controller: one event stream for the open view, and its status in the header.

const WAITS = [1, 2, 4, 8, 15]; // seconds before the next attempt to connect

/** Calls `receive` with each `event` of the stream at `url`; returns a function that closes the stream.
 *
 * A hidden tab closes its stream, because browsers open at most six connections to one host over all tabs. */
export function follow(url, event, receive) {
  let source = null,
    timer = 0,
    tries = 0,
    over = false;

  const open = () => {
    if (over || source || document.hidden) return;
    source = new EventSource(url);
    source.onopen = () => ((tries = 0), show("live", "Live"));
    source.addEventListener(event, (message) => receive(JSON.parse(message.data)));
    source.onerror = lost;
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
  };
  const lost = () => {
    close();
    if (over) return;
    const wait = WAITS[Math.min(tries++, WAITS.length - 1)];
    show("lost", tries > 1 ? `Offline, retrying in ${wait} s` : "Reconnecting");
    timer = setTimeout(() => checkLogin().then(open), wait * 1000);
  };
  const visibilityChanged = () => (document.hidden ? close() : open());

  document.addEventListener("visibilitychange", visibilityChanged);
  show("connecting", "Connecting");
  open();
  return () => {
    over = true;
    document.removeEventListener("visibilitychange", visibilityChanged);
    close();
  };
}

// An event stream does not report why it failed, but a plain request does: a 401 opens the login form.
const checkLogin = () => call("GET", "/api/overview").catch(() => {});

function show(state, text) {
  const place = document.getElementById("live");
  place.dataset.state = state;
  place.lastElementChild.textContent = text;
}

/** Sends a request and returns its JSON. Throws an Error with the controller's message; a 401 opens the login form. */
export async function call(method, url) {
  const answer = await ask(method, url);
  return answer.status === 204 ? null : answer.json().catch(() => null);
}

/** Sends a request and returns the Response. Throws like `call`. `body`: sent as JSON. `signal`: ends the request. */
export async function ask(method, url, body, signal) {
  const headers = { Accept: "application/json", ...(body ? { "Content-Type": "application/json" } : {}) };
  let answer;
  try {
    answer = await fetch(url, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The controller does not answer.");
  }
  if (answer.status === 401) {
    sessionStorage.setItem("moray-next", location.pathname);
    location.assign("/login");
  }
  if (!answer.ok)
    throw new Error(said(await answer.json().catch(() => null)) || `The controller returned ${answer.status}`);
  return answer;
}

/** The words of an error, of the controller or of a model's API. */
export const said = (body) => [body?.error?.message ?? body?.error, body?.hint].filter(Boolean).join("; ");
