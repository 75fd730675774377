// The table of heads, its files, and the controls.

/** Place of a head among all, in the order of the table, from 1. */
function rankOf(head) {
  const place = current().places(focusOf())[head];
  return state.up ? current().nHeads - place : place + 1;
}

const PAGE = 25, FIXED = 5; // rows of a page, columns before the scores

/** The rows of the table, empty: they are filled again and again. */
function makeTable() {
  const table = current(), columns = ["", "head", "95% interval", "null", "Holm p"].map(text => make("th", { scope: "col" }, text));
  const headers = table.scores.map(score => make("th", { scope: "col", title: data.scores[score].formula },
    make("button", { type: "button", "data-score": score, click: () => score === focusOf() ? turn() : focusOn(score) }, titleOf(score))));
  const row = () => make("tr", {}, make("td", { class: "soft" }), make("th", { scope: "row" }, make("button", { type: "button" })), ...[...columns, ...headers].slice(2).map(() => make("td")));
  const widths = [2.4, 3.8, 8.4, 3.8, 4.2, ...table.scores.map(() => 4.9)]; // given, so that no number moves a column
  at("table").querySelector("colgroup").replaceChildren(...widths.map(width => make("col", { style: `width:${width}rem` })));
  at("table").style.width = widths.reduce((a, b) => a + b) + "rem";
  at("table").tHead.replaceChildren(make("tr", {}, ...columns, ...headers));
  at("table").tBodies[0].replaceChildren(...Array.from({ length: Math.min(PAGE, table.nHeads) }, row));
  at("table").tFoot.replaceChildren(row());
}

/** Write a head into a row; null: none. */
function fillRow(row, head) {
  row.hidden = head === null;
  if (head === null) return;
  const table = current(), focus = entry(table, focusOf(), head), show = table.show(focusOf()), cells = row.cells;
  row.dataset.head = head;
  cells[0].textContent = rankOf(head);
  cells[1].firstChild.textContent = nameOf(table, head);
  [range(focus.low, focus.high, show), show(focus.null), chance(focus.p_holm)].forEach((text, i) => { cells[2 + i].textContent = text; });
  table.scores.forEach((score, s) => {
    const cell = cells[FIXED + s], value = ofScore(table, score)[head], scale = table.scale(score);
    const share = scale.signed ? Math.abs(value) / scale.high : (value - scale.low) / (scale.high - scale.low);
    cell.textContent = table.show(score)(value);
    cell.className = above(table, score, head, data.level) ? "strong" : "";
    cell.style.setProperty("--share", share > 0 ? share.toFixed(3) : 0);
  });
  markRow(row);
}

function drawTable() {
  const table = current(), score = focusOf(), by = `by ${titleOf(score)}${state.set === 2 ? ", B − A" : ""}, ${state.up ? "lowest" : "highest"} first`;
  for (const header of at("table").tHead.rows[0].cells) {
    if (header.querySelector(`[data-score="${score}"]`)) header.setAttribute("aria-sort", state.up ? "ascending" : "descending");
    else header.removeAttribute("aria-sort");
  }
  [...at("table").tBodies[0].rows].forEach((row, i) => fillRow(row, state.order[state.from + i] ?? null));
  for (const title of document.querySelectorAll("#maps .title")) title.setAttribute("aria-pressed", String(title.dataset.score === score));
  at("table-said").textContent = `${state.order.length} of ${table.nHeads} heads of the ${names[state.tower]} ${by}. Interval, null and p are of ${titleOf(score)}; bold: significantly above the null.`;
  at("focus-name").textContent = titleOf(score);
  at("page").textContent = state.order.length ? `${state.from + 1} to ${Math.min(state.from + PAGE, state.order.length)} of ${state.order.length}` : "no heads";
  at("previous").disabled = state.from === 0;
  at("next").disabled = state.from + PAGE >= state.order.length;
}

/** Another page of the table. */
function leaf(by) {
  state.from += by * PAGE;
  drawTable();
}

/** Rows answer as maps do. */
function listen() {
  const headOf = event => {
    const row = event.target.closest("tr[data-head]");
    return row ? { group: groupOf(state.set), head: Number(row.dataset.head) } : null;
  };
  for (const part of [at("table").tBodies[0], at("table").tFoot]) {
    if (part === at("table").tBodies[0]) part.addEventListener("pointerover", event => { if (event.pointerType === "mouse") mark(headOf(event)); });
    part.addEventListener("click", event => {
      const head = headOf(event);
      if (head && event.target.closest("button")) pin(samePlace(head, state.pinned[state.tower]) ? null : head);
    });
  }
  at("table").addEventListener("pointerleave", () => mark(null));
}

/** The other direction of the table. */
function turn() {
  Object.assign(state, { up: !state.up, from: 0 });
  select();
}

/** Put a score in focus: it orders the table and chooses the pictures. */
function focusOn(score) {
  if (!current().scores.includes(score)) return;
  Object.assign(state, { up: false, from: 0 });
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
  Object.assign(state, change, { hover: null, from: 0 });
  state.last = state.pinned[state.tower];
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
  makeTable();
  ruleChoices();
  redraw();
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
      drawTable();
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
  for (const id of ["does", "doesnt", "doesnt-rule", "least", "most"]) at(id).addEventListener("input", () => { ruleChoices(); state.from = 0; select(); });
  for (const id of ["search", "from", "to", "floor", "tested"]) at(id).addEventListener("input", () => { state.from = 0; select(); });
  at("clear").addEventListener("click", () => {
    for (const id of ["search", "from", "to", "floor", "does", "doesnt", "least"]) at(id).value = "";
    at("tested").checked = false;
    ruleChoices();
    state.from = 0;
    select();
  });
  at("reach").addEventListener("change", () => { drawMaps(); drawMarks(); });
  at("previous").addEventListener("click", () => leaf(-1));
  at("next").addEventListener("click", () => leaf(1));
  at("csv-all").addEventListener("click", saveAll);
  at("csv-selection").addEventListener("click", saveSelection);
  document.addEventListener("keydown", event => { if (event.key === "Escape") { state.hover = null; pin(null); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { redraw(); drawMarks(); });
  let before = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; makeMaps(); redraw(); drawTable(); drawMarks(); } });
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
  listen();
  turnTo({});
  document.body.dataset.ready = "yes";
}

start().catch(error => {
  at("warning").hidden = false;
  at("warning").textContent = "Nothing can be shown: " + error.message;
  at("readout").textContent = "";
});
