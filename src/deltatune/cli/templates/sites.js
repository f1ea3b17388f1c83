"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tree = document.getElementById("tree"), search = document.getElementById("search");
const only = document.getElementById("only"), fold = document.getElementById("fold");
const FOUND = 400; // matches that a search shows
const OPENED = 300; // rows up to which the page opens what leads to a site

const escape = text => String(text).replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`);
const full = n => n.toLocaleString("en-US");
const short = n => {
  for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"]]) if (n >= size) return (n / size).toPrecision(4) + unit;
  return full(n);
};
const size = n => {
  for (const [one, unit] of [[1e12, " TB"], [1e9, " GB"], [1e6, " MB"], [1e3, " kB"]]) if (n >= one) return (n / one).toPrecision(3) + unit;
  return `${n} B`;
};
const numel = shape => shape.reduce((product, length) => product * length, 1);
const color = term => `--c: var(--m${term % COLORS})`;
const COLORS = 7;

// Modules: each with its totals, and a number that equal ones share, by which blocks are folded.
const known = new Map(), all = [];
const same = text => { let id = known.get(text); if (id === undefined) known.set(text, id = known.size); return id; };
function prepare([name, type, roles, params, sites, kids], path, parent) {
  const node = { name, type, roles, params, sites, parent, path: path || name };
  all.push(node);
  node.kids = kids.map(kid => prepare(kid, path ? `${path}.${kid[0]}` : kid[0], node));
  node.size = params.reduce((sum, [, shape, tied]) => sum + (tied ? 0 : numel(shape)), 0);
  node.trained = 0;
  for (const [, , leaves] of sites) for (const [, shape, kind] of leaves) if (kind === "trained") node.trained += numel(shape);
  node.acts = sites.length;
  for (const kid of node.kids) { node.size += kid.size; node.trained += kid.trained; node.acts += kid.acts; }
  const within = path => path.startsWith(node.path + ".") ? path.slice(node.path.length) : path;
  node.same = same(JSON.stringify([type, roles, params.map(([n, s, t]) => [n, s, within(t)]), sites, node.kids.map(kid => [kid.name, kid.same])]));
  node.words = [node.path, type, ...roles, ...sites.map(([term]) => data.terms[term].method)].join(" ").toLowerCase();
  return node;
}
const root = prepare(data.root, "", null);

// Views: a module, or a run of equal ones that stands for `times` of them.
function views(node, folding) {
  const found = [];
  for (const kid of node.kids) {
    const last = found.at(-1);
    if (folding && last && last.node.same === kid.same && /^\d+$/.test(kid.name) && Number(kid.name) === last.end + 1) {
      last.end += 1;
      last.times += 1;
    } else found.push({ node: kid, end: /^\d+$/.test(kid.name) ? Number(kid.name) : NaN, times: 1 });
  }
  for (const view of found) view.label = view.times > 1 ? `${view.node.name}–${view.end}` : view.node.name;
  return found;
}
const key = view => `${view.node.path}|${view.times}`;
const opened = new Set(["|1"]);

function visible() {
  const query = search.value.trim().toLowerCase();
  const rows = [], shown = query ? matches(query) : null;
  const visit = (view, depth, copies) => {
    const node = view.node;
    if ((only.checked && !node.acts) || (shown && !shown.within.has(node))) return;
    const open = shown ? shown.above.has(node) : opened.has(key(view));
    const kids = node.kids.length + node.sites.length > 0;
    rows.push({ view, depth, copies: copies * view.times, open: kids ? open : null, hit: shown?.hits.has(node), beside: shown && !shown.hits.has(node) });
    if (!open) return;
    if (!shown) for (const site of node.sites) rows.push({ site, view, depth: depth + 1, copies: copies * view.times });
    for (const kid of views(node, fold.checked && !shown)) visit(kid, depth + 1, copies * view.times);
  };
  for (const view of views(root, fold.checked && !shown)) visit(view, 0, 1);
  return { rows, shown };
}

function matches(query) {
  const hits = new Set(), within = new Set(), above = new Set();
  let count = 0;
  for (const node of all) {
    if (node === root || !node.words.includes(query) || (only.checked && !node.acts)) continue;
    if (node.path.toLowerCase().includes(query) && node.parent.path.toLowerCase().includes(query)) continue; // what is inside a match
    count += 1;
    if (count > FOUND) continue;
    hits.add(node);
    for (let up = node; up; up = up.parent) { within.add(up); if (up !== node) above.add(up); }
  }
  return { hits, within, above, count };
}

const shapes = params => params.map(([name, shape, tied]) => `${name} ${shape.join("×") || "1"}${tied ? ` = ${tied}` : ""}`).join(", ");

function chips(node, open) {
  const own = new Map(), inside = new Map();
  for (const [term, note] of node.sites) own.set(term, [...(own.get(term) ?? []), note].filter(Boolean));
  const collect = kid => { for (const [term] of kid.sites) inside.set(term, (inside.get(term) ?? 0) + 1); kid.kids.forEach(collect); };
  if (!open && node.acts > node.sites.length) node.kids.forEach(collect);
  const chip = (term, extra, kind) => `<span class="chip ${kind}" style="${color(term)}">${escape(data.terms[term].name)}${extra}</span>`;
  return [...own].map(([term, notes]) => chip(term, notes.length ? ` · ${escape(notes.join(" "))}` : "", "")).join("")
    + [...inside].map(([term, count]) => chip(term, ` ×${full(count)}`, "inside")).join("");
}

function draw({ view, site, depth, copies, open, hit, beside }) {
  const node = view.node, many = copies > 1 ? `${full(copies)} × ` : "";
  if (site) {
    const [term, note, leaves] = site, owned = leaves.filter(([, , kind]) => kind === "trained");
    const count = owned.reduce((sum, [, shape]) => sum + numel(shape), 0);
    const text = leaves.map(([name, shape, kind]) => `${name} ${shape.join("×") || "1"}${kind === "trained" ? "" : ` (${kind})`}`).join(", ");
    return `<div class="row detail" role="treeitem" aria-level="${depth + 1}" style="--d: ${depth}; ${color(term)}">`
      + `<span class="what"><span class="twist"></span><span class="type" style="color: inherit">${escape(data.terms[term].method)}${note ? ` · ${escape(note)}` : ""}</span></span>`
      + `<span class="shape" title="${escape(text)}">${escape(text)}</span><span class="num"></span><span class="num bytes"></span>`
      + `<span class="num" title="${many}${full(count)}">${count ? short(copies * count) : ""}</span></div>`;
  }
  const expanded = open === null ? "" : ` aria-expanded="${open}"`, acts = node.sites.length > 0;
  const total = copies * node.size, trained = copies * node.trained, text = shapes(node.params);
  const classes = `row${acts ? " acts" : ""}${beside ? " beside" : ""}`;
  const label = hit ? `<mark>${escape(view.label)}</mark>` : escape(view.label);
  return `<div class="${classes}" role="treeitem" tabindex="-1" aria-level="${depth + 1}"${expanded} data-key="${escape(key(view))}" style="--d: ${depth}; ${acts ? color(node.sites[0][0]) : ""}">`
    + `<span class="what" title="path:${escape(node.path)}"><span class="twist"></span><span class="label">${label}</span>`
    + (view.times > 1 ? `<span class="times">×${view.times}</span>` : "") + `<span class="type">${escape(node.type)}</span>`
    + node.roles.map(role => `<span class="role">${escape(role)}</span>`).join("") + chips(node, open) + "</span>"
    + `<span class="shape" title="${escape(text)}">${escape(text)}</span>`
    + `<span class="num bar ${total ? "" : "none"}" style="--w: ${(100 * total / (root.size || 1)).toFixed(2)}%" title="${many}${full(node.size)}">${total ? short(total) : "–"}</span>`
    + `<span class="num bytes ${total ? "" : "none"}">${total ? size(total * data.bytes) : "–"}</span>`
    + `<span class="num ${trained ? "trained" : "none"}" title="${many}${full(node.trained)}">${trained ? short(trained) : "–"}</span></div>`;
}

let current = null;
function render() {
  const { rows, shown } = visible();
  tree.innerHTML = rows.map(draw).join("");
  const first = (current && tree.querySelector(`[data-key="${CSS.escape(current)}"]`)) || tree.querySelector("[data-key]");
  if (first) first.tabIndex = 0;
  const more = shown && shown.count > FOUND ? `; the first ${FOUND} are shown` : "";
  document.getElementById("status").textContent = shown
    ? `${full(shown.count)} ${shown.count === 1 ? "match" : "matches"} among ${full(all.length - 1)} modules${more}.`
    : `${full(all.length - 1)} modules. Numbers of a folded row, and of what is in it, are those of all its copies.`;
}

function toggle(row, wanted) {
  if (!row.hasAttribute("aria-expanded") || search.value.trim()) return;
  const open = row.getAttribute("aria-expanded") === "true";
  if (wanted === open) return;
  opened[open ? "delete" : "add"](row.dataset.key);
  current = row.dataset.key;
  render();
  tree.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
}

function openAll(stop = Infinity, wanted = () => true) {
  let rows = 0, level = views(root, fold.checked);
  while (level.length && rows < stop) {
    const next = [];
    for (const view of level) {
      rows += 1;
      if (!wanted(view.node) || !(view.node.kids.length + view.node.sites.length)) continue;
      opened.add(key(view));
      next.push(...views(view.node, fold.checked));
    }
    level = next;
  }
}

tree.addEventListener("click", event => {
  const row = event.target.closest("[data-key]");
  if (row && !String(getSelection())) toggle(row);
});
tree.addEventListener("keydown", event => {
  const rows = [...tree.querySelectorAll("[data-key]")], row = event.target.closest("[data-key]"), at = rows.indexOf(row);
  const go = next => { if (next) { row.tabIndex = -1; next.tabIndex = 0; current = next.dataset.key; next.focus(); } };
  const act = { ArrowDown: () => go(rows[at + 1]), ArrowUp: () => go(rows[at - 1]), ArrowRight: () => toggle(row, true), ArrowLeft: () => toggle(row, false), Enter: () => toggle(row), Home: () => go(rows[0]), End: () => go(rows.at(-1)) }[event.key];
  if (act && row) { event.preventDefault(); act(); }
});
let waiting = 0;
search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(render, 80); });
only.addEventListener("change", render);
fold.addEventListener("change", () => { openAll(OPENED, node => node.acts > node.sites.length); render(); });
document.getElementById("open").addEventListener("click", () => { openAll(); render(); });
document.getElementById("close").addEventListener("click", () => { opened.clear(); render(); });

document.getElementById("terms").innerHTML = data.terms.map((term, index) => {
  const shared = term.shared.map(([name, shape, kind]) => `${name} ${shape.join("×")}${kind === "trained" ? "" : ` (${kind})`}`).join(", ");
  return `<div class="term" style="${color(index)}"><code>${escape(term.method)}</code> at <code style="color: inherit; font-weight: 400">${escape(term.where)}</code>`
    + `<div>${full(term.sites)} ${term.sites === 1 ? "site" : "sites"}, ${full(term.trained)} trained${shared ? `; shared by all: ${escape(shared)}` : ""}</div></div>`;
}).join("");
openAll(OPENED, node => node.acts > node.sites.length);
render();
