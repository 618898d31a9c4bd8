// Charts over time as SVG: stacked areas, lines with bands, and lanes of ticks.

import { clock } from "./format.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const MARGIN = { left: 58, right: 4, top: 8, bottom: 20 };
// A hole longer than so many intervals is shown as one.
const HOLE = 4;

export function element(name, attributes = {}, text = "") {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

// What part of which time a chart shows.
export class View {
  constructor(endS, seconds, intervalS) {
    this.endS = endS;
    this.beginS = endS - seconds;
    this.intervalS = intervalS;
  }

  within(snapshots) {
    // One more on the left, so that areas reach the edge.
    const first = snapshots.findIndex((s) => s.time_s >= this.beginS);
    return first < 0 ? [] : snapshots.slice(Math.max(0, first - 1));
  }
}

class Chart {
  constructor(host, label) {
    this.host = host;
    this.svg = element("svg", { role: "img", "aria-label": label });
    host.append(this.svg);
  }

  start(view, bottom = MARGIN.bottom) {
    this.view = view;
    this.width = this.host.clientWidth;
    this.height = this.host.clientHeight;
    this.plot = { top: MARGIN.top, bottom: this.height - bottom };
    this.left = MARGIN.left;
    this.right = this.width - MARGIN.right;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
  }

  x(timeS) {
    const part = (timeS - this.view.beginS) / (this.view.endS - this.view.beginS);
    return this.left + Math.max(0, Math.min(1, part)) * (this.right - this.left);
  }

  timeAt(clientX) {
    const box = this.svg.getBoundingClientRect();
    const part = (clientX - box.left - this.left) / (this.right - this.left);
    return this.view.beginS + Math.max(0, Math.min(1, part)) * (this.view.endS - this.view.beginS);
  }

  y(value) {
    return this.plot.bottom - (value / this.most) * (this.plot.bottom - this.plot.top);
  }

  add(name, attributes, text) {
    const made = element(name, attributes, text);
    this.svg.append(made);
    return made;
  }

  timeAxis() {
    const { beginS, endS } = this.view;
    const about = ((endS - beginS) * 90) / (this.right - this.left);
    const step = [5, 10, 15, 30, 60, 120, 300].find((s) => s >= about) ?? 600;
    for (let at = Math.ceil(beginS / step) * step; at <= endS; at += step) {
      const x = this.x(at);
      this.add("line", { class: "grid", x1: x, x2: x, y1: this.plot.top, y2: this.plot.bottom });
      const anchor = x > this.right - 24 ? "end" : x < this.left + 24 ? "start" : "middle";
      const text = step >= 60 ? clock(at).slice(0, -3) : clock(at);
      this.add("text", { x, y: this.height - 5, "text-anchor": anchor }, text);
    }
  }

  valueAxis(ticks, format, kind = "grid") {
    for (const value of ticks) {
      const y = this.y(value);
      this.add("line", { class: kind, x1: this.left, x2: this.right, y1: y, y2: y });
      this.add("text", { x: this.left - 7, y: y + 4, "text-anchor": "end" }, format(value));
    }
  }

  cross(timeS) {
    if (timeS === null || !this.view) return;
    const x = this.x(timeS);
    const bottom = this.plot.bottom;
    this.add("line", { class: "cross", x1: x, x2: x, y1: this.plot.top, y2: bottom });
  }

  nothing(text) {
    const middle = (this.left + this.right) / 2;
    const y = (this.plot.top + this.plot.bottom) / 2;
    this.add("text", { class: "empty", x: middle, y, "text-anchor": "middle" }, text);
  }

  // Runs of snapshots without a hole and with a value, each an SVG polyline's points.
  runs(snapshots, value) {
    const found = [];
    let run = [];
    let before = null;
    for (const snapshot of snapshots) {
      const at = value(snapshot);
      const hole = before !== null && snapshot.time_s - before > HOLE * this.view.intervalS;
      if (run.length && (hole || at === null)) {
        found.push(run);
        run = [];
      }
      if (at !== null) run.push([this.x(snapshot.time_s), at]);
      before = snapshot.time_s;
    }
    if (run.length) found.push(run);
    return found;
  }
}

// Amounts on top of each other, and a line for their limit.
export class Stack extends Chart {
  draw(view, snapshots, layers, limit, format) {
    this.start(view);
    const shown = view.within(snapshots);
    this.most = 1.03 * Math.max(1, ...shown.map(limit));
    this.timeAxis();
    if (!shown.length) return this.nothing("no snapshots yet");
    const below = new Map(shown.map((snapshot) => [snapshot, 0]));
    for (const { name, value } of layers) {
      const floor = new Map(below);
      for (const s of shown) below.set(s, below.get(s) + value(s));
      const top = this.runs(shown, (s) => this.y(below.get(s)));
      const bottom = this.runs(shown, (s) => this.y(floor.get(s)));
      const d = top.map((run, i) => outline(run, bottom[i])).join("");
      this.add("path", { class: `area c-${name}`, d });
    }
    const now = limit(shown.at(-1));
    // What stands too near to the limit's own label would be written over it.
    const ticks = binaryTicks(this.most).filter((v) => Math.abs(this.y(v) - this.y(now)) > 13);
    this.valueAxis(ticks, format, "grid over");
    const line = this.runs(shown, (s) => this.y(limit(s)));
    this.add("path", { class: "limit", d: line.map(path).join("") });
    const label = { class: "most", x: this.left - 7, y: this.y(now) + 4, "text-anchor": "end" };
    this.add("text", label, format(now));
  }
}

// Lines from 0 up, each with an optional band above it.
export class Lines extends Chart {
  draw(view, snapshots, series, format, least = 1, steps = [1, 2, 2.5, 5, 10]) {
    this.start(view);
    const shown = view.within(snapshots);
    const values = shown.flatMap((s) => series.map(({ top, value }) => (top ?? value)(s) ?? 0));
    const [most, ticks] = decimalTicks(Math.max(least, ...values), steps);
    this.most = most;
    this.timeAxis();
    this.valueAxis(ticks, format);
    const scaled = (f) => (s) => (f(s) === null ? null : this.y(f(s)));
    let drawn = false;
    for (const { color, value, top } of series) {
      const runs = this.runs(shown, scaled(value));
      drawn ||= runs.length > 0;
      if (top) {
        const bands = this.runs(shown, scaled(top));
        const d = bands.map((run, i) => outline(run, runs[i])).join("");
        this.add("path", { class: `band c-${color}`, d });
      }
      this.add("path", { class: `series c-${color}`, d: runs.map(path).join("") });
    }
    if (!drawn) this.nothing("nothing in this time");
  }
}

// A row of ticks per kind of event; the higher, the more bytes.
export class Lanes extends Chart {
  draw(view, snapshots, lanes, moves) {
    const row = 15;
    this.host.style.height = `${lanes.length * row + 4}px`;
    this.start(view, 2);
    const shown = view.within(snapshots).filter((s) => s.time_s >= view.beginS);
    lanes.forEach(({ kind, color }, i) => {
      const y = 2 + row * (i + 1);
      this.add("line", { class: "grid", x1: this.left, x2: this.right, y1: y - 1, y2: y - 1 });
      this.add("text", { x: this.left - 7, y: y - 3, "text-anchor": "end" }, kind);
      let d = "";
      for (const snapshot of shown) {
        const move = moves(snapshot, kind);
        if (!move) continue;
        // 4 KiB and less are the lowest tick, 4 GiB and more the highest.
        const part = Math.min(20, Math.max(0, Math.log2(Math.abs(move.bytes) + 1) - 12)) / 20;
        d += `M${this.x(snapshot.time_s).toFixed(1)} ${y - 1}v${-(3 + part * (row - 5)).toFixed(1)}`;
      }
      this.add("path", { class: `lane c-${color}`, d });
    });
  }
}

function path(run) {
  // A lone point would be invisible.
  if (run.length === 1) return `M${run[0]}h0.1`;
  return `M${run.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L")}`;
}

function outline(top, bottom) {
  const points = [...top, ...[...bottom].reverse()];
  return `${path(points)}Z`;
}

function binaryTicks(most) {
  let step = 1;
  while (most / step > 5) step *= 2;
  const ticks = [];
  for (let value = 0; value <= most; value += step) ticks.push(value);
  return ticks;
}

function decimalTicks(most, steps) {
  const size = 10 ** Math.floor(Math.log10(most / 4));
  const step = size * steps.find((s) => s * size * 4 >= most);
  const count = Math.ceil(most / step - 1e-9);
  return [step * count, Array.from({ length: count + 1 }, (_, i) => i * step)];
}
