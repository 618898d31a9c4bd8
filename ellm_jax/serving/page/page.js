// The dashboard: asks for new snapshots every second and draws them.

import { Lanes, Lines, Stack, View } from "./chart.js";
import {
  bytes, bytesParts, clock, count, number, percent, time, timeParts, timeTick,
} from "./format.js";
import { Limits } from "./limits.js";

const OWNERS = ["weights", "workspace", "kv", "cache", "activation", "free"];
const OWNER_NAMES = { kv: "KV cache", cache: "prefixes", activation: "activations" };
const LANES = [
  { kind: "inflate", color: "kv" },
  { kind: "deflate", color: "activation" },
  { kind: "offload", color: "violet" },
  { kind: "fetch", color: "cache" },
  { kind: "evict", color: "weights" },
  { kind: "preempt", color: "bad" },
  { kind: "trim", color: "workspace" },
  { kind: "resize", color: "text" },
  { kind: "sleep", color: "text" },
  { kind: "wake", color: "text" },
];
// Lanes that are there even while nothing happens on them.
const ALWAYS = new Set(["inflate", "deflate"]);
const WAITING = (s) => s.waiting + s.queued;
const QUEUES = [
  { name: "running", color: "kv", value: (s) => s.running },
  { name: "waiting", color: "activation", value: WAITING },
  { name: "in host memory", color: "violet", value: (s) => s.offloaded + s.moving },
];
const FLOWS = [
  { name: "output", color: "kv", value: (s) => s.output_tokens_per_s },
  { name: "prompt", color: "cache", value: (s) => s.prompt_tokens_per_s },
];
const HOST = [{ name: "violet", value: (s) => s.host_used_bytes }];
const FIRST = [latency("kv", "ttft_ms")];
const EACH = [latency("cache", "tpot_ms")];
const RETRY_MS_MAX = 8000;
const TIMEOUT_MS = 5000;

const find = (id) => document.getElementById(id);
const charts = {
  memory: new Stack(find("memory"), "device memory by owner over time"),
  events: new Lanes(find("events"), "moves of memory over time"),
  requests: new Lines(find("requests"), "requests by queue over time"),
  tokens: new Lines(find("tokens"), "tokens per second over time"),
  first: new Lines(find("first"), "time to the first token over time"),
  each: new Lines(find("each"), "time per output token over time"),
  host: new Stack(find("host"), "host memory over time"),
};
const limits = new Limits(find("limits"));

let snapshots = [];
let status = { interval_s: 1, kept: 600, started_s: 0 };
let windowS = 180;
let hover = null;
// Owners that are left out of the picture, to look closer at the others.
const hidden = new Set();
const SHORTEST_S = 30;

function latency(color, field) {
  return { color, value: (s) => s[field]?.p50 ?? null, top: (s) => s[field]?.p95 ?? null };
}

async function poll() {
  let wait = 1000 * status.interval_s;
  for (;;) {
    if (!document.hidden) {
      try {
        await update();
        wait = 1000 * status.interval_s;
      } catch (error) {
        show("lost", `no answer (${error.message}); trying again`);
        wait = Math.min(RETRY_MS_MAX, 2 * wait);
      }
    }
    await new Promise((done) => setTimeout(done, wait));
  }
}

async function update() {
  const last = snapshots.at(-1)?.number ?? 0;
  // A server that is stuck answers nothing at all.
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  const reply = await fetch(`dashboard/snapshots?since=${last}`, { cache: "no-store", signal });
  if (!reply.ok) throw new Error(`status ${reply.status}`);
  const said = await reply.json();
  if (status.started_s && said.started_s !== status.started_s) {
    // Another server: its numbers begin anew, and what it has was not all sent.
    snapshots = [];
    status = said;
    return update();
  }
  snapshots = [...snapshots, ...said.snapshots].slice(-said.kept);
  status = said;
  const now = snapshots.at(-1);
  if (!now) return show("", "waiting for the first snapshot");
  show(now.asleep ? "asleep" : "live", now.asleep ? "asleep" : "live");
  find("model").textContent = said.model;
  document.title = said.model ? `ellm \u00b7 ${said.model}` : "ellm";
  tiles(now);
  limits.show(now, said.admin, said.resizable);
  draw();
}

function show(kind, text) {
  const state = find("state");
  state.className = `state ${kind}`;
  // Only when it changes: it is read aloud.
  const words = state.querySelector("b");
  if (words.textContent !== text) words.textContent = text;
}

function put(id, value, unit = "") {
  const small = document.createElement("span");
  small.textContent = unit;
  find(id).replaceChildren(value, ...(unit ? [small] : []));
}

function tiles(now) {
  const used = now.limit_bytes - now.device.free;
  put("used", ...bytesParts(used));
  find("used-of").textContent = `of ${bytes(now.limit_bytes)} (${percent(used / now.limit_bytes)})`;
  const bar = OWNERS.map((owner) => {
    const part = document.createElement("span");
    part.className = `c-${owner}`;
    part.style.flexGrow = now.device[owner];
    return part;
  });
  find("bar").replaceChildren(...bar);
  put("running", count(now.running));
  find("running-more").textContent = "in the batch";
  put("waiting", count(WAITING(now)));
  const away = now.offloaded + now.moving;
  find("waiting-more").textContent = away ? `${away} more in host memory` : "for memory or a seat";
  put("output", number(now.output_tokens_per_s), "tokens/s");
  find("prompt").textContent = `prompt ${number(now.prompt_tokens_per_s)}/s`;
  percentiles("ttft", now.ttft_ms);
  percentiles("tpot", now.tpot_ms);
}

function percentiles(id, values) {
  if (values) put(id, ...timeParts(values.p50));
  else put(id, "\u2013");
  find(`${id}-more`).textContent = values ? `p95 ${time(values.p95)}` : "no calls lately";
}

// A swatch, a name and an amount, below an element of that name.
function entry(within, color, name, value) {
  const made = document.createElement(within);
  const swatch = document.createElement("i");
  swatch.className = `c-${color}`;
  const amount = document.createElement("b");
  amount.textContent = value;
  made.append(swatch, name, amount);
  return made;
}

function legend(id, entries) {
  find(id).replaceChildren(
    ...entries.map(({ color, name, value }) => entry("li", color, name, value)),
  );
}

// The legend of the memory is made once: its entries are buttons, which keep their focus.
function ownerButtons() {
  const made = {};
  for (const owner of OWNERS) {
    const button = entry("button", owner, OWNER_NAMES[owner] ?? owner, "");
    const item = document.createElement("li");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.title = "show or hide";
    button.addEventListener("click", () => {
      if (!hidden.delete(owner) && hidden.size < OWNERS.length - 1) hidden.add(owner);
      button.setAttribute("aria-pressed", String(!hidden.has(owner)));
      draw();
    });
    item.append(button);
    find("owners").append(item);
    made[owner] = button.querySelector("b");
  }
  return made;
}

function at(timeS) {
  if (timeS === null) return snapshots.at(-1);
  let best = null;
  for (const s of snapshots) {
    if (!best || Math.abs(s.time_s - timeS) < Math.abs(best.time_s - timeS)) best = s;
  }
  return best;
}

function draw() {
  const now = snapshots.at(-1);
  if (!now) return;
  // No wider than what there is to see.
  const age = Math.max(SHORTEST_S, now.time_s - snapshots[0].time_s);
  const view = new View(now.time_s, Math.min(windowS, age), status.interval_s);
  const shown = view.within(snapshots);
  const drawn = OWNERS.filter((owner) => !hidden.has(owner));
  const layers = drawn.map((owner) => ({ name: owner, value: (s) => s.device[owner] }));
  const limit = (s) => drawn.reduce((sum, owner) => sum + s.device[owner], 0);
  charts.memory.draw(view, snapshots, layers, limit, bytes);
  const lanes = LANES.filter(({ kind }) => ALWAYS.has(kind) || shown.some((s) => s.moves[kind]));
  charts.events.draw(view, snapshots, lanes, (s, kind) => s.moves[kind]);
  charts.requests.draw(view, snapshots, QUEUES, count, 4, [1, 2, 5, 10]);
  charts.tokens.draw(view, snapshots, FLOWS, number, 10);
  charts.first.draw(view, snapshots, FIRST, timeTick, 1);
  charts.each.draw(view, snapshots, EACH, timeTick, 1);
  find("host-card").hidden = !now.host_limit_bytes;
  if (now.host_limit_bytes) charts.host.draw(view, snapshots, HOST, (s) => s.host_limit_bytes, bytes);
  const point = at(hover?.timeS ?? null);
  for (const owner of OWNERS) amounts[owner].textContent = bytes(point.device[owner]);
  legend("queues", QUEUES.map((q) => ({ ...q, value: count(q.value(point)) })));
  const flows = FLOWS.map((f) => ({ ...f, value: number(f.value(point)) }));
  const part = point.cached_fraction;
  if (part !== null) flows.push({ color: "cache pale", name: "of it found", value: percent(part) });
  legend("flows", flows);
  legend("firsts", latencies("kv", point.ttft_ms));
  legend("eaches", latencies("cache", point.tpot_ms));
  legend("hosts", [{ color: "violet", name: "used", value: bytes(point.host_used_bytes) }]);
  if (hover) {
    for (const chart of Object.values(charts)) chart.cross(point.time_s);
    tip(point);
  }
}

function latencies(color, values) {
  if (!values) return [];
  return [
    { color, name: "median", value: time(values.p50) },
    { color: `${color} pale`, name: "to p95", value: time(values.p95) },
  ];
}

function tip(point) {
  const box = find("tip");
  const title = document.createElement("h3");
  title.textContent = clock(point.time_s);
  const rows = hover.memory
    ? [...OWNERS].reverse().map((o) => [o, OWNER_NAMES[o] ?? o, bytes(point.device[o])])
    : [
      ...QUEUES.map((q) => [q.color, q.name, count(q.value(point))]),
      ...FLOWS.map((f) => [f.color, `${f.name} tokens/s`, number(f.value(point))]),
    ];
  for (const { kind, color } of hover.memory ? LANES : []) {
    const move = point.moves[kind];
    if (move) rows.push([color, `${kind} \u00d7 ${move.count}`, bytes(move.bytes)]);
  }
  box.replaceChildren(title, ...rows.map(([color, name, value]) => entry("div", color, name, value)));
  box.hidden = false;
  const right = hover.x + 16 + box.offsetWidth > window.innerWidth;
  box.style.left = `${right ? Math.max(4, hover.x - 16 - box.offsetWidth) : hover.x + 16}px`;
  box.style.top = `${Math.max(4, Math.min(hover.y + 12, window.innerHeight - box.offsetHeight - 4))}px`;
}

function leave() {
  hover = null;
  find("tip").hidden = true;
  draw();
}

const amounts = ownerButtons();
for (const [name, chart] of Object.entries(charts)) {
  const point = (event) => {
    if (!chart.view) return;
    const memory = name === "memory" || name === "events";
    hover = { timeS: chart.timeAt(event.clientX), x: event.clientX, y: event.clientY, memory };
    draw();
  };
  chart.svg.addEventListener("pointermove", point);
  chart.svg.addEventListener("pointerdown", point);
  chart.svg.addEventListener("pointerleave", leave);
}
for (const button of find("windows").children) {
  const seconds = Number(button.dataset.seconds);
  button.setAttribute("aria-pressed", String(seconds === windowS));
  button.addEventListener("click", () => {
    windowS = seconds;
    for (const other of find("windows").children) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    draw();
  });
}
new ResizeObserver(draw).observe(document.body);
poll();
