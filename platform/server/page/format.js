// Numbers and times as people read them, and the clock that keeps them true.

import { h } from "./dom.js";

let skew = 0; // seconds by which the server's clock is ahead of this one

export function setClock(now) {
  if (now) skew = now - Date.now() / 1000;
}

export const now = () => Date.now() / 1000 + skew;

export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 59.5) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m ${String(Math.floor(s % 60)).padStart(2, "0")} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} m`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function about(seconds) {
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

const READINGS = {
  ago: (at) => (about(now() - at) === "now" ? "just now" : `${about(now() - at)} ago`),
  until: (at) => (at - now() < 5 ? "now" : `in ${about(at - now())}`),
  elapsed: (at) => whole(now() - at),
};

const whole = (seconds) => (seconds < 10 ? `${Math.max(0, Math.floor(seconds))} s` : duration(seconds));

/** A time that ticks. `how`: ago, until or elapsed; the exact time is its title. */
export function clock(how, at) {
  if (!at) return null;
  const exact = new Date(at * 1000);
  return h(
    "time",
    { datetime: exact.toISOString(), title: stamp(at), "data-clock": how, "data-at": at },
    READINGS[how](at),
  );
}

setInterval(() => {
  for (const node of document.querySelectorAll("time[data-clock]")) {
    const text = READINGS[node.dataset.clock](Number(node.dataset.at));
    if (node.textContent !== text) node.textContent = text;
  }
}, 1000);

/** Date and time, in a zone or in this machine's. */
export function stamp(at, zone) {
  const form = {
    weekday: "short",
    day: "numeric",
    month: "short",
    hour: "2-digit",
    minute: "2-digit",
    hourCycle: "h23",
  };
  try {
    return new Intl.DateTimeFormat("en-GB", { ...form, timeZone: zone }).format(new Date(at * 1000));
  } catch {
    return new Intl.DateTimeFormat("en-GB", form).format(new Date(at * 1000)); // a zone this browser does not know
  }
}

export const ownZone = () => Intl.DateTimeFormat().resolvedOptions().timeZone;

export function count(value) {
  for (const [limit, by, unit] of [
    [1e12, 1e12, "T"],
    [1e9, 1e9, "G"],
    [1e7, 1e6, "M"],
  ]) {
    if (value >= limit) return `${(value / by).toFixed(1)}${unit}`;
  }
  const digits = value >= 100 || Number.isInteger(value) ? 0 : 1;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A figure with about four digits that say something. */
export function figure(value) {
  if (value === null || value === undefined) return "NaN"; // JSON has no other way to say it
  const size = Math.abs(value);
  if (size >= 1000) return count(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

export function bytes(value) {
  for (const [size, unit] of [
    [2 ** 40, "TiB"],
    [2 ** 30, "GiB"],
    [2 ** 20, "MiB"],
  ]) {
    if (value >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${Math.round(value / 1024)} KiB`;
}

export const percent = (share) => `${Math.floor(100 * Math.min(1, Math.max(0, share)))} %`;
