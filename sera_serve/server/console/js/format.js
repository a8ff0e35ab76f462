// Numbers, sizes and times, as people read them.

const COUNT = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const DATE = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const AGO = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const SPANS = [["year", 31536000], ["month", 2592000], ["day", 86400], ["hour", 3600], ["minute", 60]];

/** 12345 -> 12,345 */
export const count = (value) => COUNT.format(value);

/** 1, "key" -> 1 key */
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** How many there are, and how many of them are shown if that is a part: the first 60 of 200 keys. */
export const partOf = (all, shown, noun, order) =>
  shown < all ? `The ${order} ${count(shown)} of ${counted(all, noun)}` : counted(all, noun);

/** 12345 -> 12.3K, 498.6 -> 499 */
export const short = (value) => SHORT.format(Math.abs(value) >= 100 ? Math.round(value) : value);

/** Bytes -> 1.5 MiB */
export function bytes(value) {
  let unit = 0;
  let size = value;
  while (size >= 1024 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${size >= 100 || unit === 0 ? Math.round(size) : size.toFixed(1)} ${UNITS[unit]}`;
}

/** Seconds -> 80 ms, 1.2 s, 3 min 5 s */
export function seconds(value) {
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 59.5) return `${value.toFixed(value < 9.95 ? 1 : 0)} s`;
  const whole = Math.round(value);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** A metric or a loss: three or four digits that count. */
export function figure(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return count(value);
  return Math.abs(value) >= 0.001 ? value.toFixed(3) : value.toExponential(1);
}

/** A value on an axis: no zeros that say nothing. */
export const tick = (value) => String(Number(value.toFixed(3)));

/** A number beside an axis: small neighbours there differ by less than a tenth. */
export const onAxis = (value) => (Math.abs(value) < 10 ? tick(value) : short(value));

/** A share of 1 -> 97.3% */
export const percent = (value) => `${Number((value * 100).toFixed(1))}%`;

/** What a person typed as the API takes it. What is no number goes as it is: the server says what is wrong with it. */
export const numberOr = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);

/** An ISO time, or seconds since 1970, -> Date, or null. */
export function time(value) {
  if (value === null || value === undefined) return null;
  return new Date(typeof value === "number" ? value * 1000 : value);
}

/** A time in full. */
export const full = (value) => DATE.format(time(value));

/** A time as people say it: 3 hours ago. */
export function ago(value) {
  const distance = (time(value) - Date.now()) / 1000;
  for (const [unit, span] of SPANS) {
    if (Math.abs(distance) >= span) return AGO.format(Math.round(distance / span), unit);
  }
  return "just now";
}
