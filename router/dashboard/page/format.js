// Formats numbers in the language of the page.

import { language, serverWords, t } from "./words.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"]; // as in the server's own messages

export function number(value, digits = 0) {
  return value.toLocaleString(language(), { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function bytes(value) {
  let scaled = Math.max(0, value);
  let unit = 0;
  for (; scaled >= 1023.5 && unit < UNITS.length - 1; unit++) scaled /= 1024;
  return `${number(scaled, unit > 0 && scaled < 99.95 ? 1 : 0)} ${UNITS[unit]}`;
}

/** Formats a duration with one unit: 0.4 s, 12 s, 4 min, 3 h, 2 d. */
export function duration(seconds) {
  if (seconds < 1) return `${number(Math.max(0, seconds), 1)} ${t("unit.s")}`;
  if (seconds < 90) return `${number(seconds)} ${t("unit.s")}`;
  if (seconds < 5400) return `${number(seconds / 60)} ${t("unit.min")}`;
  if (seconds < 129600) return `${number(seconds / 3600)} ${t("unit.h")}`;
  return `${number(seconds / 86400)} ${t("unit.d")}`;
}

/** Formats a rate with two significant digits. */
export function perSecondWords(value) {
  return number(value, value < 0.1 ? 2 : value < 10 ? 1 : 0);
}

/** Formats a failure's cause, `unsupported_model: …; next attempt after 11 s`: without a wait that has passed when read. */
export function causeWords(cause) {
  const [, code, message] = /^(?:([a-z_]+): )?(.*)$/s.exec(cause);
  return serverWords(code, message.replace(/; (?:next attempt|retry) after \d+ s$/, ""));
}

/** Formats a latency with two significant digits. */
export function latency(seconds) {
  const ms = seconds * 1000;
  if (seconds < 1) return `${number(ms, ms < 10 ? 1 : 0)} ms`;
  return seconds < 10 ? `${number(seconds, 1)} ${t("unit.s")}` : duration(seconds);
}

export function clockTime(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString(language(), { hour12: false });
}
