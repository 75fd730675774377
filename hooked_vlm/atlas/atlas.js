// What is shown, and what happens on clicks, keys and pointing.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const names = { language: "language model", vision: "vision tower" };
const setNames = data.sets.length === 1 ? [data.sets[0].model] : ["A", "B", "B − A"].slice(0, data.sets.length);
const towers = Object.keys(names).filter(tower => data.sets.some(set => set.towers[tower]));
const tables = [], strongest = {}; // tables[set][tower]
const state = {
  tower: towers[0], set: 0, focus: {}, shown: {}, hover: null, pinned: { language: null, vision: null },
  from: 0, up: false, selection: null, order: [], last: null, // the head of the card
};
let maps = [], scatter = null;
const GAP = 14, NARROWEST = 205; // between maps, and of a map or the scatter, in pixels (a page that is not shown has no width)

const current = () => tables[state.set][state.tower];
const focusOf = () => state.focus[state.tower];
const signedOf = (set, score) => set === 2 || data.scores[score].signed;
const samePlace = (a, b) => a !== null && b !== null && a.group === b.group && a.head === b.head;

/** Sets whose heads correspond have one group: the number of the first of them. */
function groupOf(set, tower = state.tower) {
  const own = tables[set]?.[tower], first = tables[0][tower];
  return own && first && own.layers === first.layers && own.heads === first.heads ? 0 : set;
}

/** The head of a set that is meant by what is pointed at or pinned; null: none of that set. */
const within = (shown, set) => shown !== null && shown.group === groupOf(set) ? shown.head : null;
const inFocus = () => state.hover ?? state.pinned[state.tower];

/** Numbers of a tower, with what is computed of them on first use. */
function asTable(buffer, set, { layers, heads, scores }) {
  const table = { layers, heads, nHeads: layers * heads, scores, ...asColumns(buffer, scores.length * layers * heads) };
  const kept = new Map(), once = (key, compute) => kept.has(key) ? kept.get(key) : kept.set(key, compute()).get(key);
  table.order = score => once("order " + score, () => ranked(ofScore(table, score)));
  table.places = score => once("places " + score, () => {
    const places = new Int32Array(table.nHeads);
    table.order(score).forEach((head, place) => { places[head] = place; });
    return places;
  });
  table.scale = score => once("scale " + score, () => scaleOf([ofScore(table, score)], signedOf(set, score), 1));
  table.show = score => once("show " + score, () => writer(Math.max(Math.abs(table.scale(score).low), table.scale(score).high)));
  table.profiles = () => once("profiles", () => profilesOf(table));
  return table;
}

// ---------------------------------------------------------------- pointing

/** Outline a head everywhere; null: none. The card shows it, unless it is pointed at in the card. */
function mark(shown, inCard = false) {
  if (state.hover === shown || samePlace(state.hover, shown)) return;
  state.hover = shown;
  if (!inCard) state.last = shown ?? state.pinned[state.tower] ?? state.last;
  drawMarks(!inCard);
}

/** Keep a head; null lets it go. */
function pin(shown) {
  state.pinned[state.tower] = shown;
  state.last = shown ?? state.hover;
  drawMarks();
}

function drawMarks(withCard = true) {
  const pinned = state.pinned[state.tower];
  for (const map of maps) markMap(map, within(state.hover, map.set), within(pinned, map.set));
  if (scatter) markScatter(scatter, within(state.hover, state.set), within(pinned, state.set));
  for (const row of at("table").rows) markRow(row);
  fillRow(at("table").tFoot.rows[0], within(inFocus(), state.set));
  at("readout").textContent = readout(inFocus());
  if (withCard) drawCard(state.last);
}

function markRow(row) {
  const head = Number(row.dataset.head);
  row.classList.toggle("hover", head === within(state.hover, state.set));
  row.classList.toggle("pinned", head === within(state.pinned[state.tower], state.set));
}

function readout(shown) {
  const score = focusOf();
  if (shown === null) return `${titleOf(score)} is in focus: it orders the table and chooses the pictures.`;
  const set = groupOf(state.set) === shown.group ? state.set : shown.group, table = tables[set][state.tower];
  const own = entry(table, score, shown.head), parts = [`head ${nameOf(table, shown.head)}`];
  if (tables.length > 1) parts.push(setNames[set]);
  if (own === null) return [...parts, `no ${titleOf(score)}`].join(" · ");
  const show = table.show(score), more = Number.isNaN(own.null) ? "" : `, null ${show(own.null)}, Holm p ${chance(own.p_holm)}`;
  return [...parts, `${titleOf(score)} ${show(own.value)} ${unitOf(score)} ${range(own.low, own.high, show)}${more}`].join(" · ");
}

// ---------------------------------------------------------------- selection

const given = id => at(id).value.trim() === "" ? null : Number(at(id).value);

/** The rule "does one thing and not another", as a function of a head; null: there is none. */
function ruleOf(table) {
  const does = at("does").value, not = at("doesnt").value, tested = at("doesnt-rule").value === "test", [least, most] = [given("least"), given("most")];
  if (!does) return null;
  const values = ofScore(table, does), others = not ? ofScore(table, not) : null;
  return head => {
    if (above(table, does, head, data.level) !== true || (least !== null && !(values[head] >= least))) return false;
    if (!not) return true;
    return tested ? above(table, not, head, data.level) === false : (most === null || others[head] <= most);
  };
}

/** The filters of the table, as a function of a head. */
function filterOf(table) {
  const score = focusOf(), values = ofScore(table, score), words = at("search").value.trim(), tested = at("tested").checked;
  const [from, to, floor] = ["from", "to", "floor"].map(given), [layer, head] = words.split(".");
  return own => {
    const depth = Math.floor(own / table.heads);
    if (words && (layer !== String(depth) || (head && head !== String(own % table.heads)))) return false;
    if ((from !== null && depth < from) || (to !== null && depth > to) || (floor !== null && !(values[own] >= floor))) return false;
    return !tested || above(table, score, own, data.level) === true;
  };
}

/** Apply rule and filters; draw what depends on them. */
function select() {
  const table = current(), heads = Array.from({ length: table.nHeads }, (_, head) => head), rule = ruleOf(table);
  const keeping = rule ? heads.filter(rule) : heads, chosen = new Set(keeping.filter(filterOf(table))), values = ofScore(table, focusOf());
  const before = state.selection;
  state.selection = chosen.size === table.nHeads ? null : Uint8Array.from(heads, head => chosen.has(head) ? 1 : 0);
  const order = table.order(focusOf()).filter(head => chosen.has(head)), n = order.findIndex(head => Number.isNaN(values[head]));
  const known = n < 0 ? order.length : n;
  state.order = state.up ? [...order.slice(0, known).reverse(), ...order.slice(known)] : order;
  sayRule(rule ? keeping : null);
  if (String(before) !== String(state.selection)) redraw();
  drawTable();
  drawMarks();
}

/** Everything that is drawn rather than written. */
function redraw() {
  drawMaps();
  drawTwo();
}

function sayRule(keeping) {
  const does = at("does").value, not = at("doesnt").value, table = current(), n = table.nHeads;
  if (keeping === null) {
    at("rule-said").textContent = "Choose a score: the heads that are significantly above its null are listed here, and outlined in maps, scatter and table.";
    at("rule-heads").replaceChildren();
    return;
  }
  const holm = `Holm over ${n} heads`, zero = state.set === 2 ? "0 (higher in B)" : "its null";
  const untested = score => table.scores.includes(score) ? Array.from({ length: n }, (_, head) => above(table, score, head, data.level)).filter(one => one === null).length : 0;
  let words = `${keeping.length} of ${n} heads: ${titleOf(does)} is above ${zero} (p ≤ ${data.level}, ${holm})`;
  if (given("least") !== null) words += `, at least ${number(given("least"))}`;
  if (not && at("doesnt-rule").value === "test") words += `, and ${titleOf(not)} is not (p > ${data.level}, or not above). Not significant is no evidence of absence`;
  else if (not && given("most") !== null) words += `, and ${titleOf(not)} is ${number(given("most"))} at most`;
  words += ".";
  for (const score of new Set([does, at("doesnt-rule").value === "test" ? not : ""])) {
    if (untested(score)) words += ` Left out: ${untested(score)} without a test of ${titleOf(score)} (fewer than three stimuli).`;
  }
  at("rule-said").textContent = words;
  const kept = new Set(keeping), order = table.order(does).filter(head => kept.has(head)), listed = order.slice(0, 60);
  const more = order.length > listed.length ? [make("span", { class: "soft" }, `and ${order.length - listed.length} more, in the table`)] : [];
  at("rule-heads").replaceChildren(...listed.map(head => headButton(table, { group: groupOf(state.set), head }, number(entry(table, does, head).value))), ...more);
}

// ---------------------------------------------------------------- maps

const paletteOf = signed => !signed ? data.colours.sequential : matchMedia("(prefers-color-scheme: dark)").matches ? data.colours.dark : data.colours.diverging;

/** Sets that a score is shown of. */
const setsOf = score => data.sets.map((_, set) => set).filter(set => tables[set][state.tower]?.scores.includes(score));

function makeMaps() {
  maps = [];
  const room = Math.max(NARROWEST, at("maps").clientWidth), columns = Math.max(1, Math.floor((room + GAP) / (NARROWEST + GAP)));
  const wide = Math.floor(Math.min(300, (room - GAP * (columns - 1)) / columns));
  at("maps").classList.toggle("compared", data.sets.length > 1);
  at("maps").replaceChildren(...state.shown[state.tower].map(score => {
    const figures = setsOf(score).map(set => makeMap(score, set, wide));
    const about = make("details", {}, make("summary", {}, "definition"), make("p", {}, data.scores[score].formula + "."), make("p", {}, `Compared with: ${data.scores[score].null || "nothing"}. ${data.scores[score].source}.`));
    const title = make("button", { type: "button", class: "title", "data-score": score, title: "Put in focus: order the table by it", click: () => focusOn(score) }, titleOf(score));
    return make("figure", { "data-score": score, style: data.sets.length > 1 ? null : `width:${wide}px` }, make("figcaption", {}, title), make("div", { class: "row" }, ...figures), about);
  }));
}

function makeMap(score, set, wide) {
  const table = tables[set][state.tower], canvas = make("canvas", { tabindex: 0, role: "img" });
  const map = { score, set, table, canvas, size: mapSize(table, wide), bar: make("canvas"), ticks: make("div", { class: "ticks" }) };
  const headOf = event => {
    const frame = canvas.getBoundingClientRect(), head = headAt(map, event.clientX - frame.left, event.clientY - frame.top);
    return head === null ? null : { group: groupOf(set), head };
  };
  canvas.addEventListener("pointermove", event => mark(headOf(event)));
  canvas.addEventListener("pointerleave", () => mark(null));
  canvas.addEventListener("click", event => { const head = headOf(event); if (head) pin(samePlace(head, state.pinned[state.tower]) ? null : head); });
  canvas.addEventListener("keydown", event => step(map, event));
  canvas.addEventListener("blur", () => mark(null));
  maps.push(map);
  const label = data.sets.length > 1 ? [make("span", { class: "soft set" }, setNames[set])] : [];
  return make("div", { class: "map", style: `width:${wide}px` }, ...label, canvas, make("div", { class: "scale" }, map.bar, map.ticks));
}

/** Arrows move among the heads of a map. */
function step(map, event) {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const now = within(inFocus(), map.set);
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    if (now !== null) pin({ group: groupOf(map.set), head: now });
  }
  if (!by) return;
  event.preventDefault();
  const { layers, heads } = map.table, clamp = (value, n) => Math.max(0, Math.min(n - 1, value));
  const head = now === null ? 0 : clamp(Math.floor(now / heads) + by[0], layers) * heads + clamp(now % heads + by[1], heads);
  mark({ group: groupOf(map.set), head });
}

function drawMaps() {
  const share = Number(at("reach").value), ink = inks();
  for (const map of maps) {
    const signed = signedOf(map.set, map.score), values = ofScore(map.table, map.score);
    const alike = map.set === 2 ? [values] : maps.filter(other => other.score === map.score && other.set !== 2).map(other => ofScore(other.table, other.score));
    const scale = scaleOf(alike, signed, share), colours = paletteOf(signed);
    drawMap(map, values, scale, colours, groupOf(map.set) === groupOf(state.set) ? state.selection : null, ink);
    drawScale(map.bar, colours);
    const ticks = scale.high === 0 && scale.low === 0 ? ["0 everywhere"] : [number(scale.low), signed ? "0" : "", (scale.over ? "≥ " : "") + number(scale.high) + " " + unitOf(map.score)];
    if (scale.over && signed) ticks[0] = "≤ " + ticks[0];
    map.ticks.replaceChildren(...ticks.map(text => make("span", {}, text)));
    const best = map.table.order(map.score)[0];
    map.canvas.setAttribute("aria-label", `${titleOf(map.score)}${data.sets.length > 1 ? ", " + setNames[map.set] : ""}: ${map.table.layers} layers of ${map.table.heads} heads, largest ${number(values[best])} at head ${nameOf(map.table, best)}`);
  }
}

// ---------------------------------------------------------------- scatter

function drawTwo() {
  const table = current(), [x, y] = [at("across").value, at("up").value], values = [x, y].map(score => ofScore(table, score));
  const shades = data.colours.sequential, depth = head => Math.floor(head / table.heads) / Math.max(1, table.layers - 1);
  const { rho, n } = rankCorrelation(...values), canvas = at("scatter"), width = Math.max(NARROWEST, Math.min(560, canvas.parentElement.clientWidth));
  scatter = { canvas, width, height: Math.round(Math.min(380, 0.75 * width)) };
  const axes = [x, y].map(score => `${titleOf(score)} (${unitOf(score)}${state.set === 2 ? ", B − A" : ""})`);
  drawScatter(scatter, ...values, axes, { number, ink: inks(), selection: state.selection, colourOf: head => shades[Math.round(225 * depth(head))] });
  at("scatter-said").textContent = `Spearman’s rank correlation ${number(rho)} over ${n} heads. Colours: from the first layer (dark) to the last (green).`;
}

function makeScatter() {
  const headOf = event => {
    const frame = at("scatter").getBoundingClientRect(), head = nearest(scatter, event.clientX - frame.left, event.clientY - frame.top);
    return head === null ? null : { group: groupOf(state.set), head };
  };
  at("scatter").addEventListener("pointermove", event => mark(headOf(event)));
  at("scatter").addEventListener("pointerleave", () => mark(null));
  at("scatter").addEventListener("click", event => { const head = headOf(event); if (head) pin(head); });
  for (const id of ["across", "up"]) at(id).addEventListener("change", () => { drawTwo(); drawMarks(); });
}
