// Before anything is painted: the theme that was chosen here, if any. Without a choice the system's holds.
"use strict";
{
  const chosen = localStorage.getItem("moray-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
