// What comes from the controller: one stream for the view that is open, with a state that everybody can see.

const WAITS = [1, 2, 4, 8, 15]; // seconds before the next try

/** Follows `event` of the stream at `url`; returns a function that ends it.
 *
 * A hidden tab lets go of its stream: a browser opens six connections to one address, and tabs are many. */
export function follow(url, event, heard) {
  let source = null,
    timer = 0,
    tries = 0,
    over = false;

  const open = () => {
    if (over || source || document.hidden) return;
    source = new EventSource(url);
    source.onopen = () => ((tries = 0), show("live", "Live"));
    source.addEventListener(event, (message) => heard(JSON.parse(message.data)));
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
    show("lost", tries > 1 ? `Offline, next try in ${wait} s` : "Reconnecting");
    timer = setTimeout(() => stillAllowed().then(open), wait * 1000);
  };
  const seen = () => (document.hidden ? close() : open());

  document.addEventListener("visibilitychange", seen);
  show("connecting", "Connecting");
  open();
  return () => {
    over = true;
    document.removeEventListener("visibilitychange", seen);
    close();
  };
}

// An event stream does not say why it failed; a plain request does.
const stillAllowed = () => call("GET", "/api/overview").catch(() => {});

function show(state, text) {
  const place = document.getElementById("live");
  place.dataset.state = state;
  place.lastElementChild.textContent = text;
}

/** A request; its JSON, or an Error with the controller's own words. Without a valid token: the login. */
export async function call(method, url) {
  let answer;
  try {
    answer = await fetch(url, { method, headers: { Accept: "application/json" } });
  } catch {
    throw new Error("The controller does not answer.");
  }
  if (answer.status === 401) {
    sessionStorage.setItem("moray-next", location.pathname);
    location.assign("/login");
  }
  const body = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok)
    throw new Error([body?.error || `The controller answered ${answer.status}`, body?.hint].filter(Boolean).join("; "));
  return body;
}
