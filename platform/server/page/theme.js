// Sets the chosen theme before the first paint. Without a choice, the page follows the system's theme.
"use strict";
{
  const chosen = localStorage.getItem("moray-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
