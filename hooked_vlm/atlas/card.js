// The head pointed at: its scores, its relatives, the pictures on which it is strongest.

/** An element with text or children; never with HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const number = value => value === null || Number.isNaN(value) ? "–" : value === 0 ? "0" : Number(value.toPrecision(3)).toString();
const chance = p => p === null || Number.isNaN(p) ? "–" : p < 1e-300 ? "< 1e-300" : p < 1e-3 ? p.toExponential(0) : Number(p.toPrecision(2)).toString();
const range = (low, high, show = number) => Number.isNaN(low) ? "–" : `[${show(low)}, ${show(high)}]`;
const nameOf = (table, head) => `${Math.floor(head / table.heads)}.${head % table.heads}`;
const titleOf = score => data.scores[score].title;
const unitOf = score => data.scores[score].unit;

/** All numbers of a head and score. */
function entry(table, score, head) {
  const place = table.scores.indexOf(score);
  if (place < 0) return null;
  return Object.fromEntries([...DOUBLES, ...SINGLES].map(name => [name, table[name][place * table.nHeads + head]]));
}

/** A score among all heads: bar from interval's end to end, dot at the value, line at the null. */
function strip(own, scale) {
  const at = value => Math.max(0, Math.min(100, 100 * (value - scale.low) / (scale.high - scale.low || 1))).toFixed(1);
  const marks = [["between", `left:${at(own.low)}%;right:${100 - at(own.high)}%`], ["null", `left:${at(own.null)}%`], ["value", `left:${at(own.value)}%`]];
  const known = { between: own.low, null: own.null, value: own.value };
  return make("span", { class: "strip", "aria-hidden": "true" }, ...marks.filter(([name]) => !Number.isNaN(known[name])).map(([name, style]) => make("i", { class: name, style })));
}

function cardRow(table, score, head) {
  const own = entry(table, score, head), tested = data.scores[score].tested, show = table.show(score);
  const place = table.places(score)[head];
  const strong = tested && above(table, score, head, data.level);
  return make("tr", { class: score === focusOf() ? "focus" : null },
    make("th", { scope: "row" }, make("button", { type: "button", "data-score": score, click: () => focusOn(score) }, titleOf(score))),
    make("td", {}, strip(own, table.scale(score))),
    make("td", { class: strong ? "strong" : null }, show(own.value)), make("td", {}, range(own.low, own.high, show)),
    make("td", {}, tested ? show(own.null) : "–"), make("td", {}, chance(own.p_holm)),
    make("td", {}, Number.isNaN(own.value) ? "–" : String(place + 1)), make("td", {}, String(own.n)));
}

/** One head in two models. */
function changeRow(score, head) {
  const [a, b, change] = [0, 1, 2].map(set => tables[set]?.[state.tower] ? entry(tables[set][state.tower], score, head) : null);
  const strong = change !== null && change.p_holm <= data.level;
  const show = (tables[0][state.tower].scores.includes(score) ? tables[0] : tables[1])[state.tower].show(score);
  const each = [show(a?.value ?? NaN), show(b?.value ?? NaN), show(change?.value ?? NaN), change ? range(change.low, change.high, show) : "–", chance(change?.p_holm ?? null), change ? String(change.n) : "–"];
  return make("tr", { class: score === focusOf() ? "focus" : null },
    make("th", { scope: "row" }, make("button", { type: "button", "data-score": score, click: () => focusOn(score) }, titleOf(score))),
    ...each.map((text, i) => make("td", { class: i === 2 && strong ? "strong" : null }, text)));
}

/** The card of a head: of one model, or of two whose heads correspond. */
function drawCard(shown) {
  if (shown === null) {
    at("card").replaceChildren(make("p", { class: "soft empty" }, "Point at a head in a map, in the scatter or in the table. A click pins it."));
    return;
  }
  const { group, head } = shown, table = tables[group][state.tower], pinned = samePlace(shown, state.pinned[state.tower]);
  const both = tables.length > 1 && group === 0 && groupOf(1) === 0 && tables[1][state.tower] !== undefined;
  const header = both ? ["", "A", "B", "B − A", "95% interval", "Holm p", "n"] : ["", "", "value", "95% interval", "null", "Holm p", "rank", "n"];
  const scores = both ? [...new Set([0, 1].flatMap(set => tables[set][state.tower].scores))] : table.scores;
  at("card").replaceChildren(
    make("h2", {}, `Head ${nameOf(table, head)} `, make("span", { class: "soft" }, names[state.tower] + (tables.length > 1 && !both ? ` of ${"AB"[group]}` : ""))),
    make("button", { type: "button", id: "pin", "aria-pressed": String(pinned), click: () => pin(pinned ? null : shown) }, pinned ? "unpin" : "pin"),
    make("div", { class: "scroll" }, make("table", { class: "scores" },
      make("thead", {}, make("tr", {}, ...header.map(text => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...scores.map(score => both ? changeRow(score, head) : cardRow(table, score, head))))),
    ...both && tables.length > 2 ? [make("p", { class: "soft small" }, "B − A, its interval, p and n are over the stimuli that both saw; A and B over all of each.")] : [],
    ...kin(table, group, head), ...gallery(group, head));
}

function kin(table, group, head) {
  const found = relatives(table.profiles(), table.scores.length, head, 5);
  if (!found.length) return [];
  return [make("h3", {}, "Closest relatives"), make("p", { class: "heads" }, ...found.map(([other, cosine]) => headButton(table, { group, head: other }, cosine.toFixed(2), true))),
    make("p", { class: "soft small" }, `Cosine of the ${table.scores.length} scores, each standardised over all heads of the tower.`)];
}

/** A head to point at, and to pin. */
function headButton(table, shown, text, inCard = false) {
  return make("button", {
    type: "button", "data-head": shown.head, pointerenter: event => { if (event.pointerType === "mouse") mark(shown, inCard); }, pointerleave: () => mark(null, inCard), click: () => pin(shown),
  }, nameOf(table, shown.head), text === null ? null : make("span", { class: "soft" }, " " + text));
}

function gallery(group, head) {
  const own = strongest[state.tower], score = focusOf(), table = tables[0][state.tower];
  if (!own || group !== 0 || !table.scores.includes(score)) return [];
  const first = 3 * (table.scores.indexOf(score) * table.nHeads + head);
  const places = [0, 1, 2].filter(rank => own.pictures[first + rank] !== data.none);
  if (!places.length) return [];
  const shown = places.map(rank => {
    const picture = data.pictures[own.pictures[first + rank]], link = picture[state.tower];
    const inside = [make("img", { src: picture.src, alt: picture.name }), make("span", { class: "caption" }, picture.caption), make("span", { class: "soft" }, `${titleOf(score)} ${table.show(score)(own.values[first + rank])}`)];
    return link ? make("a", { href: `${link}#head=${nameOf(table, head)}`, target: "_blank", rel: "noopener" }, ...inside) : make("span", {}, ...inside);
  });
  const of = tables.length > 1 ? " of A" : "", idle = above(table, score, head, data.level) === false;
  return [make("h3", {}, `Pictures where it is strongest: ${titleOf(score)}`), make("div", { class: "gallery" }, ...shown),
    make("p", { class: "soft small" }, `Of the ${data.pictures.length} pictures in this page${of}: the largest difference from the null.${idle ? " On average it is not significantly above it." : ""}`)];
}
