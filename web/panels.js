// What is small: the two curves, the requests, the steps on their timeline, and the pool.
import { $ } from "./api.js";
import { make } from "./tree.js";

const POINTS = 240, WINDOW = 20; // snapshots: a minute, and what the hit rate looks back on
const rates = [], shares = [], tokens = []; // tokens: [cached, prompt] so far, for the hit rate of the last seconds

function curve(id, values, top) {
  const points = values.map((value, i) => `${(POINTS - values.length + i + 1).toFixed(0)} ${(46 - 44 * value / top).toFixed(1)}`);
  if (!points.length) return;
  const line = `M${points.join("L")}`;
  $(id).replaceChildren(make("path", { class: "area", d: `${line}L${POINTS} 48L${POINTS - values.length + 1} 48Z` }), make("path", { d: line }));
}

export function drawPace({ stats }) {
  tokens.push([stats.cached_tokens, stats.prompt_tokens]);
  const [cached, prompt] = tokens.at(-1).map((now, i) => now - tokens[Math.max(0, tokens.length - WINDOW)][i]);
  rates.push(stats.tokens_per_second);
  shares.push(prompt > 0 ? cached / prompt : shares.at(-1) ?? stats.hit_rate);
  for (const list of [rates, shares, tokens]) if (list.length > POINTS) list.shift();
  $("rate").textContent = Math.round(stats.tokens_per_second).toLocaleString("en");
  $("hits").textContent = `${Math.round(100 * stats.hit_rate)} %`;
  curve("rate-curve", rates, Math.max(10, ...rates));
  curve("hits-curve", shares, 1);
}

// ---- requests

const rows = new Map(); // id -> list element

function newRow() {
  const row = document.createElement("li");
  row.innerHTML = `<div class="head"><span></span><span></span></div><div class="bar"><span class="cached"></span><span class="locked"></span><span class="own"></span></div>`;
  return row;
}

export function drawRequests({ requests, stats }) {
  const now = new Set();
  for (const r of requests) {
    const key = `${r.id}/${r.index}`;
    const row = rows.get(key) ?? newRow();
    const [name, count] = row.firstChild.children;
    const whole = r.prompt_tokens + r.max_new_tokens;
    const parts = [r.cached_tokens, Math.max(0, Math.min(r.computed_tokens, r.prompt_tokens) - r.cached_tokens), r.new_tokens];
    now.add(key);
    rows.set(key, row);
    name.textContent = `${r.state} · ${r.id.slice(-12)}${r.index ? ` #${r.index}` : ""}`;
    count.textContent = `${r.prompt_tokens} + ${r.new_tokens} of ${r.max_new_tokens}`;
    [...row.lastChild.children].forEach((part, i) => (part.style.width = `${100 * parts[i] / whole}%`));
  }
  for (const [key, row] of rows) {
    if (now.has(key)) continue;
    rows.delete(key);
    row.className = "ended";
    row.querySelector("span").textContent = "ended";
    setTimeout(() => row.remove(), 1500);
  }
  if (rows.size) $("requests").querySelector(".hint")?.remove();
  $("requests").append(...[...rows.values()].filter(row => !row.isConnected));
  $("request-count").textContent = `${stats.running} run, ${stats.waiting} wait${stats.preemptions ? `, ${stats.preemptions} preempted so far` : ""}`;
}

// ---- steps

const DRAWN = 10, HEIGHT = 92, LANE = 30; // steps; pixels

/** Seconds of host work during which the device worked too; of `host` and itself: of host work at all. */
function overlap(host, device) {
  const both = (a, b) => Math.max(0, Math.min(a.end, b.end) - Math.max(a.start, b.start));
  return host.flatMap(h => device.map(d => both(h, d))).reduce((a, b) => a + b, 0);
}

export function drawSteps({ spans, at }) {
  const device = spans.filter(span => span.row === "device").slice(-DRAWN);
  const pause = device.findLastIndex((step, i) => i && step.start - device[i - 1].end > 0.05);
  device.splice(0, Math.max(0, pause)); // nothing was to be done before
  if (!device.length) return;
  const from = device[0].start - 0.0005, until = Math.max(...device.map(step => step.end)) + 0.0005;
  const host = spans.filter(span => span.row === "host" && span.end > from && span.start < until);
  const width = $("steps").clientWidth;
  const x = time => width * (time - from) / (until - from);
  const box = (span, kind, y) => {
    const what = span.row === "device" ? `${span.name}: ${kind}, ${span.requests} requests, ${span.tokens} tokens` : kind;
    const label = make("title", {}, `${what}, ${(1000 * (span.end - span.start)).toFixed(2)} ms`);
    return make("rect", { class: kind, x: x(span.start), y, width: Math.max(1, x(span.end) - x(span.start) - 0.5), height: LANE, rx: 2 }, label);
  };
  $("steps").setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  $("steps").replaceChildren(
    ...host.map(span => box(span, span.name, 11)),
    ...device.map(span => box(span, span.tokens > span.requests ? "prefill" : "decode", 51)),
  );
  const all = overlap(host, host), age = at - until;
  $("overlap").textContent = `${all ? `${Math.round(100 * overlap(host, device) / all)} % of the host's work is hidden behind the device's` : ""}${age > 1 ? `; ${Math.round(age)} s ago` : ""}`;
  $("scale").textContent = `Host above, device below; ${device.length} steps in ${(1000 * (until - from)).toFixed(1)} ms. While the device computes a step, the host commits the one before and plans the next.`;
}

// ---- pool

let before = "";

export function drawPool({ cells, pages_per_cell, stats }) {
  const canvas = $("pool"), legend = $("pool-legend"), ratio = devicePixelRatio;
  const width = canvas.clientWidth, height = 150;
  let size = 14;
  while (size > 3 && Math.ceil(cells.length / Math.floor(width / size)) * size > height) size--;
  const columns = Math.floor(width / size);
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const colourOf = name => getComputedStyle(legend.querySelector(`.${name} i`)).backgroundColor; // light or dark
  const colours = { ".": colourOf("free"), r: colourOf("own"), l: colourOf("locked"), c: colourOf("cached") };
  [...cells].forEach((owner, i) => {
    pen.globalAlpha = before && before[i] !== owner ? 0.5 : 1; // has just changed hands
    pen.fillStyle = colours[owner];
    pen.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - 1, size - 1);
  });
  before = cells;
  const own = stats.pages_total - stats.pages_free - stats.pages_held;
  const counts = `${stats.pages_free} free, ${own} own, ${stats.pages_locked} shared, ${stats.pages_held - stats.pages_locked} cached, of ${stats.pages_total}`;
  $("pool-count").textContent = counts + (pages_per_cell > 1 ? `; a square is ${pages_per_cell} pages` : "");
  canvas.setAttribute("aria-label", `Page pool: ${counts}`);
}
