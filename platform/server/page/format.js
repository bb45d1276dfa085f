// Formats numbers and times, and keeps shown times up to date.

import { h } from "./dom.js";

let skew = 0; // the server's clock minus the browser's, in seconds

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

/** A relative time that updates itself. `how`: ago, until or elapsed. The tooltip shows the exact time. */
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

/** Date and time in `zone`, by default the browser's. */
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
    return new Intl.DateTimeFormat("en-GB", form).format(new Date(at * 1000)); // the browser does not support this zone
  }
}

const clocks = [{}, { second: "2-digit" }].map(
  (form) => new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...form }),
);

/** The time of day in the browser's zone. */
export const timeOfDay = (at, seconds) => clocks[seconds ? 1 : 0].format(new Date(at * 1000));

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

/** A number with about four significant digits. */
export function figure(value) {
  if (value === null || value === undefined) return "NaN"; // JSON has no NaN, so the server sends null
  const size = Math.abs(value);
  if (size >= 1000) return count(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

const BYTES = [
  [2 ** 40, "TiB"],
  [2 ** 30, "GiB"],
  [2 ** 20, "MiB"],
  [2 ** 10, "KiB"],
];

export function bytes(value) {
  const [size, unit] = BYTES.find(([size]) => value >= size) || BYTES.at(-1);
  return `${(value / size).toFixed(unit === "KiB" ? 0 : 1)} ${unit}`;
}

/** The scale in which all values of one metric are shown: {by: factor, unit, suffix: of axis ticks}.
 *
 * `unit` is a metric's unit in platform/core/metrics.py. Shares become percent, bytes KiB to TiB, short times ms. */
export function scaleOf(unit, values) {
  const largest = Math.max(0, ...values.map((value) => Math.abs(value ?? 0)));
  if (unit === "share") return { by: 100, unit: "%", suffix: " %" };
  if (unit === "s" && largest > 0 && largest < 1) return { by: 1000, unit: "ms", suffix: " ms" };
  if (unit === "bytes") {
    const [size, name] = BYTES.find(([size]) => largest >= size) || [1, "B"];
    return { by: 1 / size, unit: name, suffix: ` ${name}` };
  }
  return { by: 1, unit, suffix: unit === "s" ? " s" : "" };
}

/** Axis ticks as text, all in one power of ten: 5k, 10k; 0.5M, 1M; 1e-4, 2e-4. */
export function tickTexts(marks, suffix = "") {
  const largest = Math.max(...marks.map(Math.abs));
  const [by, power] = [
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ].find(([size]) => largest >= size && largest >= 1e4) || [1, ""];
  const text = (mark) => (largest < 0.001 ? mark.toExponential() : `${Number((mark / by).toPrecision(12))}${power}`);
  return marks.map((mark) => (mark === 0 ? "0" : text(mark)) + suffix);
}

export const percent = (share) => `${Math.floor(100 * Math.min(1, Math.max(0, share)))} %`;

/** A short time in milliseconds, a longer one in seconds. */
export function latency(seconds) {
  return seconds < 0.9995 ? `${figure(Math.round(1e4 * seconds) / 10)} ms` : duration(seconds);
}
