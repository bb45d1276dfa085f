// Selects the view for the current address, and handles what all views share: links, theme, log-out.

import { deployment } from "./deployment.js";
import { deployments } from "./deployments.js";
import { h, patch } from "./dom.js";
import { call } from "./live.js";
import { overview } from "./overview.js";
import { run } from "./run.js";
import { schedules } from "./schedules.js";

const main = document.getElementById("main");
let leave = () => {};

// Address, name of the view, the view. A view renders into an element and returns a function that ends it.
const VIEWS = [
  [/^\/jobs\/([^/]+)$/, "run", run],
  [/^\/deployments\/([^/]+)$/, "deployment", deployment],
  [/^\/deployments$/, "deployments", deployments],
  [/^\/schedules$/, "schedules", schedules],
  [/^/, "overview", overview],
];

/** Opens the view for the current address. */
function open() {
  leave();
  patch(main);
  const [address, page, view] = VIEWS.find(([address]) => address.test(location.pathname));
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const place = main.appendChild(h("div", { class: `view ${page}` }));
  leave = view(place, decodeURIComponent(location.pathname.match(address)[1] ?? ""));
}

addEventListener("popstate", open);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  const plain = event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey && !event.altKey;
  if (!link || !plain || link.origin !== location.origin || link.getAttribute("href").startsWith("#")) return;
  if (!/^\/($|schedules$|deployments($|\/)|jobs\/)/.test(link.pathname)) return;
  event.preventDefault();
  if (link.href !== location.href) history.pushState(null, "", link.href);
  open();
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
});

const THEMES = { system: "light", light: "dark", dark: "system" };
const themeButton = document.getElementById("theme");

function showTheme() {
  const theme = document.documentElement.dataset.theme || "system";
  patch(
    themeButton,
    h("span", { class: `theme-icon ${theme}`, "aria-hidden": "true" }),
    h("span", { class: "wide" }, theme[0].toUpperCase() + theme.slice(1)),
  );
  themeButton.title = `Theme: ${theme}. Click to switch to ${THEMES[theme]}.`;
  themeButton.setAttribute("aria-label", themeButton.title);
}

themeButton.onclick = () => {
  const next = THEMES[document.documentElement.dataset.theme || "system"];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  if (next === "system") localStorage.removeItem("moray-theme");
  else localStorage.setItem("moray-theme", next);
  showTheme();
};
document.getElementById("logout").onclick = () => call("POST", "/logout").finally(() => location.assign("/login"));
showTheme();
open();
