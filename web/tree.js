// The radix tree. A bar is a node, as wide as its tokens are many; what hangs on its right begins with it.
import { $ } from "./api.js";

const ROW = 44, BAR = 36, GAP = 30, LETTER = 6.95;
const shown = new Map(); // id -> { group, hits }

/** An SVG element. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const width = node => Math.min(320, 110 + 11 * Math.sqrt(node.tokens));
const clean = text => text.replace(/<\|.*?\|>/g, "¦").replace(/\s*\n\s*/g, " ⏎ ");

/** Where each node goes: children below each other, the first on its parent's row. */
function layOut(nodes) {
  const children = Map.groupBy(nodes, node => node.parent);
  let row = 0, right = 0;
  const place = (node, x) => {
    Object.assign(node, { x, y: row * ROW + 2, w: width(node) });
    right = Math.max(right, x + node.w);
    const below = (children.get(node.id) ?? []).sort((a, b) => a.id - b.id);
    for (const child of below) place(child, x + node.w + GAP);
    if (!below.length) row++;
  };
  for (const node of (children.get(0) ?? []).sort((a, b) => a.id - b.id)) place(node, 22);
  return { width: right + 4, height: Math.max(1, row) * ROW };
}

function describe(node, riders) {
  const use = node.locks ? `${plural(node.locks, "request")} on it or below` : "evictable";
  return `${plural(node.tokens, "token")} in ${plural(node.pages, "page")}, ${use}, found ${plural(node.hits, "time")}${riders ? `, ${riders} end here` : ""}${node.salted ? ", shared within a salt only" : ""}: “${clean(node.text)}…”`;
}

function newBar(node) {
  const group = make("g", { class: "node", tabindex: 0, role: "img" }, make("rect", { height: BAR, rx: 7 }), make("text", { x: 9, y: 15 }), make("text", { class: "meta", x: 9, y: 29 }), make("g"));
  group.onmouseenter = group.onfocus = () => ($("detail").textContent = group.getAttribute("aria-label"));
  return { group, hits: node.hits };
}

function drawBar(node, riders) {
  const bar = shown.get(node.id) ?? newBar(node);
  const { group } = bar;
  const [rect, text, meta, dots] = group.children;
  shown.set(node.id, bar);
  group.style.transform = `translate(${node.x}px, ${node.y}px)`;
  group.classList.toggle("locked", node.locks > 0);
  group.setAttribute("aria-label", describe(node, riders));
  group.dataset.hits = node.hits;
  rect.setAttribute("width", node.w);
  text.textContent = clean(node.text).trimStart().slice(0, Math.floor((node.w - 16) / LETTER));
  meta.textContent = `${node.tokens} tok${node.hits ? ` · found ${node.hits}×` : ""}`;
  const circle = i => make("circle", { cx: node.w - 9 - 9 * i, cy: 25, r: 3 });
  dots.replaceChildren(...Array.from({ length: Math.min(8, riders) }, (_, i) => circle(i)));
  if (node.hits > bar.hits && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
    rect.animate([{ stroke: "var(--own)", strokeWidth: 6 }, { strokeWidth: 1 }], { duration: 1500, easing: "ease-out" });
  }
  bar.hits = node.hits;
  return group;
}

export function drawTree({ nodes, requests, stats }) {
  const size = layOut(nodes);
  const riders = Map.groupBy(requests, request => request.node);
  const byId = new Map(nodes.map(node => [node.id, node]));
  const svg = $("tree");
  const edges = nodes.map(node => {
    const from = byId.get(node.parent) ?? { x: 8, w: 0, y: node.y };
    const [x, y, to] = [from.x + from.w, from.y + BAR / 2, node.y + BAR / 2];
    return make("path", { class: node.locks ? "edge locked" : "edge", d: `M${x} ${y}C${x + GAP / 2} ${y} ${x + GAP / 2} ${to} ${node.x} ${to}` });
  });
  svg.querySelectorAll(".edge").forEach(edge => edge.remove());
  svg.prepend(...edges);
  for (const [id, { group }] of shown) if (!byId.has(id) && shown.delete(id)) group.remove();
  for (const node of nodes) {
    const group = drawBar(node, riders.get(node.id)?.length ?? 0);
    if (group.parentNode !== svg) svg.append(group); // once: to move it again would take the focus away
  }
  svg.setAttribute("width", size.width);
  svg.setAttribute("height", size.height);
  const hidden = stats.pages_held - nodes.reduce((sum, node) => sum + node.pages, 0);
  $("tree-count").textContent = `${plural(nodes.length, "node")}, ${plural(stats.pages_held, "page")}, ${stats.pages_locked} in use${hidden > 0 ? `; ${hidden} more pages in nodes not drawn` : ""}`;
}
