// Numbers as people read them.

const KIB = 1024;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

// [number, unit] of so many bytes, in powers of 1024.
export function bytesParts(count) {
  let unit = 0;
  let value = Math.abs(count);
  while (value >= KIB && unit < UNITS.length - 1) {
    value /= KIB;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  const text = value.toFixed(digits).replace(/\.0+$/, "");
  return [count < 0 ? `\u2212${text}` : text, UNITS[unit]];
}

export function bytes(count) {
  return bytesParts(count).join("\u00a0");
}

export function number(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  return value >= 10 || value === 0 ? String(Math.round(value)) : value.toFixed(1);
}

export function count(value) {
  return value >= 1e4 ? `${(value / 1e3).toFixed(1)}k` : String(value);
}

// For an axis: no zeros that say nothing.
export function timeTick(ms) {
  if (ms === 0) return "0";
  return ms >= 1000 ? `${ms / 1000}\u00a0s` : `${ms}\u00a0ms`;
}

// [number, unit] of so many milliseconds.
export function timeParts(ms) {
  if (ms >= 1000) return [(ms / 1000).toFixed(ms >= 10000 ? 1 : 2), "s"];
  return [ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2), "ms"];
}

export function time(ms) {
  return timeParts(ms).join("\u00a0");
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

export function percent(fraction) {
  const value = 100 * fraction;
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1)}\u00a0%`;
}
