// What the curves of a view are drawn over: training steps, or times of day.

import { count, tickTexts, timeOfDay } from "./format.js";

const SPANS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400]; // seconds

/** Training steps. A value that is missing was NaN. */
export const STEPS = {
  marks: (first, last, most) =>
    nice(first, last, most).filter((mark) => mark >= first && mark <= last && Number.isInteger(mark)),
  texts: (marks) => tickTexts(marks),
  name: (at) => `step ${count(at)}`,
  missing: "not a number",
  zero: false,
};

/** Times in seconds since the epoch. A value that is missing has not been measured. Rates and counts begin at zero. */
export const TIMES = {
  marks: (first, last, most) => {
    const span = SPANS.find((one) => (last - first) / one < most) || SPANS.at(-1);
    const marks = [];
    for (let at = Math.ceil(first / span) * span; at <= last; at += span) marks.push(at);
    return marks;
  },
  texts: (marks) => marks.map((mark) => timeOfDay(mark, marks.some((one) => one % 60))),
  name: (at) => timeOfDay(at, true),
  missing: "unknown",
  zero: true,
};

/** About `most` round numbers between `low` and `high`. */
export function nice(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= 0.8 * rough) || 10);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    marks.push(Number((i * step).toPrecision(12)));
  return marks.length ? marks : [low];
}
