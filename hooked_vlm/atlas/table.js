// The table of heads, its files, and the controls.

/** Place of a head among all, in the order of the table, from 1. */
function rankOf(head) {
  const place = current().places(focusOf())[head];
  return state.up ? current().nHeads - place : place + 1;
}

function tableRow(head, rank) {
  const table = current(), shown = { group: groupOf(state.set), head }, focus = entry(table, focusOf(), head);
  const tested = !Number.isNaN(focus.p_holm), show = table.show(focusOf());
  const cells = table.scores.map(score => {
    const value = entry(table, score, head).value, scale = table.scale(score), strong = above(table, score, head, data.level);
    const share = scale.signed ? Math.abs(value) / scale.high : (value - scale.low) / (scale.high - scale.low);
    const look = [strong ? "strong" : "", score === focusOf() ? "focus" : ""].join(" ").trim();
    return make("td", { class: look || null, style: share > 0 ? `--share:${share.toFixed(3)}` : null }, table.show(score)(value));
  });
  const row = make("tr", { "data-head": head, pointerenter: event => { if (event.pointerType === "mouse") mark(shown); }, pointerleave: () => mark(null) },
    make("td", { class: "soft" }, String(rank)), make("th", { scope: "row" }, make("button", { type: "button", click: () => pin(samePlace(shown, state.pinned[state.tower]) ? null : shown) }, nameOf(table, head))),
    make("td", {}, range(focus.low, focus.high, show)), make("td", {}, show(focus.null)), make("td", {}, tested ? chance(focus.p_holm) : "–"), ...cells);
  markRow(row);
  return row;
}

function drawTable() {
  const table = current(), sort = state.up ? "ascending" : "descending";
  const fixed = ["", "head", "95% interval", "null", "Holm p"].map((text, i) => make("th", { scope: "col", title: i > 1 ? `of ${titleOf(focusOf())}` : null }, text));
  const headers = table.scores.map(score => make("th", { scope: "col", "aria-sort": score === focusOf() ? sort : null, title: data.scores[score].formula },
    make("button", { type: "button", "data-score": score, click: () => score === focusOf() ? turn() : focusOn(score) }, titleOf(score))));
  at("table").tHead.replaceChildren(make("tr", {}, ...fixed, ...headers));
  const listed = state.order.slice(0, state.rows);
  at("table").tBodies[0].replaceChildren(...listed.map(head => tableRow(head, rankOf(head))));
  const by = `by ${titleOf(focusOf())}, ${state.up ? "lowest" : "highest"} first${state.set === 2 ? ", B − A" : ""}`;
  at("table-said").textContent = `${state.order.length} of ${table.nHeads} heads of the ${names[state.tower]} ${by}; ${listed.length} listed. Interval, null and p are of ${titleOf(focusOf())}; bold: significantly above the null.`;
  at("focus-name").textContent = titleOf(focusOf());
  for (const id of ["more", "all"]) at(id).hidden = listed.length === state.order.length;
}

/** The other direction of the table. */
function turn() {
  state.up = !state.up;
  select();
}

/** Put a score in focus: it orders the table and chooses the pictures. */
function focusOn(score) {
  if (!current().scores.includes(score)) return;
  Object.assign(state, { up: false, rows: 25 });
  state.focus[state.tower] = score;
  select();
}

function save(lines, name) {
  const url = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
  make("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

const csvHeader = () => (data.sets.length > 1 ? "numbers," : "") + CSV_HEADER;
const csvLabel = set => data.sets.length > 1 ? [["A", "B", "B-A"][set]] : [];

function saveAll() {
  const every = tables.flatMap((own, set) => towers.filter(tower => own[tower]).flatMap(tower => {
    return csvRows(own[tower], tower, Array.from({ length: own[tower].nHeads }, (_, head) => head), csvLabel(set));
  }));
  save([csvHeader(), ...every], "atlas.csv");
}

function saveSelection() {
  save([csvHeader(), ...csvRows(current(), state.tower, state.order, csvLabel(state.set))], "atlas-selection.csv");
}

// ---------------------------------------------------------------- controls

function radios(id, labels, now, change) {
  at(id).append(...labels.map(([value, text]) => make("label", {}, make("input", { type: "radio", name: id, value, checked: value === now, change: () => change(value) }), make("span", {}, text))));
  at(id).hidden = labels.length < 2;
}

const options = (select, pairs, value) => { select.replaceChildren(...pairs.map(([key, text]) => new Option(text, key))); select.value = value; };

/** Another tower or other numbers: all that lists scores is made again. */
function turnTo(change) {
  Object.assign(state, change, { hover: null, rows: 25 });
  for (const input of at("set").querySelectorAll("input")) input.disabled = !tables[input.value][state.tower];
  if (!current()) {
    state.set = tables.findIndex(own => own[state.tower]);
    at("set").querySelectorAll("input")[state.set].checked = true;
  }
  const table = current(), tested = table.scores.filter(score => data.scores[score].tested);
  const first = data.first.filter(score => table.scores.includes(score));
  state.focus[state.tower] = table.scores.includes(focusOf()) ? focusOf() : first[0] ?? table.scores[0];
  state.shown[state.tower] ??= first.length ? first : table.scores.slice(0, 6);
  const titles = table.scores.map(score => [score, titleOf(score)]), can = tested.map(score => [score, titleOf(score)]);
  const kept = (id, fallback) => table.scores.includes(at(id).value) ? at(id).value : fallback;
  options(at("across"), titles, kept("across", first[0] ?? table.scores[0]));
  options(at("up"), titles, kept("up", first[1] ?? table.scores[table.scores.length > 1 ? 1 : 0]));
  options(at("does"), [["", "(choose a score)"], ...can], tested.includes(at("does").value) ? at("does").value : "");
  options(at("doesnt"), [["", "(anything)"], ...titles], kept("doesnt", ""));
  for (const id of ["from", "to"]) { at(id).max = table.layers - 1; at(id).placeholder = id === "from" ? "0" : String(table.layers - 1); }
  makeChips();
  makeMaps();
  ruleChoices();
  select();
}

function makeChips() {
  const shown = state.shown[state.tower], all = [...new Set(tables.flatMap(own => own[state.tower]?.scores ?? []))];
  const say = () => { at("chosen").textContent = `${shown.length} of ${all.length}`; };
  say();
  at("chips").replaceChildren(...all.map(score => make("label", { class: "chip" }, make("input", {
    type: "checkbox", value: score, checked: shown.includes(score),
    change: event => {
      if (event.target.checked) shown.push(score); else shown.splice(shown.indexOf(score), 1);
      say();
      makeMaps();
      drawMaps();
      drawMarks();
    },
  }), make("span", {}, titleOf(score)))));
}

/** A score without a null can be excluded by its value only. */
function ruleChoices() {
  const not = at("doesnt").value, rule = at("doesnt-rule");
  rule.options[0].disabled = Boolean(not) && !data.scores[not].tested;
  if (rule.options[0].disabled) rule.value = "value";
  rule.parentElement.hidden = !not;
  at("most").hidden = !not || rule.value === "test";
}

function makeControls() {
  radios("tower", towers.map(tower => [tower, names[tower]]), state.tower, tower => turnTo({ tower }));
  radios("set", data.sets.map((_, set) => [set, setNames[set]]), 0, set => turnTo({ set }));
  for (const id of ["does", "doesnt", "doesnt-rule", "least", "most"]) at(id).addEventListener("input", () => { ruleChoices(); state.rows = 25; select(); });
  for (const id of ["search", "from", "to", "floor", "tested"]) at(id).addEventListener("input", () => { state.rows = 25; select(); });
  at("clear").addEventListener("click", () => {
    for (const id of ["search", "from", "to", "floor", "does", "doesnt", "least"]) at(id).value = "";
    at("tested").checked = false;
    ruleChoices();
    select();
  });
  at("reach").addEventListener("change", () => { drawMaps(); drawMarks(); });
  at("more").addEventListener("click", () => { state.rows += 25; drawTable(); });
  at("all").addEventListener("click", () => { state.rows = Infinity; drawTable(); });
  at("csv-all").addEventListener("click", saveAll);
  at("csv-selection").addEventListener("click", saveSelection);
  document.addEventListener("keydown", event => { if (event.key === "Escape") { state.hover = null; pin(null); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", select);
  let before = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; makeMaps(); select(); } });
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot decompress (DecompressionStream is missing): open the page in one of 2023 or later");
  let blob = 0;
  for (const [set, { towers: own }] of data.sets.entries()) {
    tables.push({});
    for (const [tower, shape] of Object.entries(own)) tables[set][tower] = asTable(await inflate(at(`values-${blob++}`).textContent), set, shape);
  }
  for (const tower of towers) {
    const packed = at(`strongest-${tower}`);
    if (!packed) continue;
    const buffer = await inflate(packed.textContent), n = 3 * tables[0][tower].nHeads * tables[0][tower].scores.length;
    strongest[tower] = { values: new Float32Array(buffer, 0, n), pictures: new Uint8Array(buffer, 4 * n, n) };
  }
  makeControls();
  makeScatter();
  turnTo({});
  document.body.dataset.ready = "yes";
}

start().catch(error => {
  at("warning").hidden = false;
  at("warning").textContent = "Nothing can be shown: " + error.message;
  at("readout").textContent = "";
});
