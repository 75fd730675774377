// The controls: which row, layer and head are shown, and what happens on keys, clicks and hovering.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const order = data.chips.filter(chip => chip.row !== null).map(chip => chip.row); // rows as they are read
const nHeads = data.heads.length, nMaps = data.layers.length * nHeads, signed = data.zero > 0;
const first = data.ranked[0] || [data.layer, nHeads > 1 ? "max" : 0];
const state = { row: 0, preview: null, layer: first[0], head: first[1], panel: 0, pointed: null };
// values of no layer or head have a nameless one
const hasLayers = data.layers.some(name => name), hasHeads = data.heads.some(name => name);
const known = new Map();
let panels = [], drawn = null, turn = 0;

const number = value => Number.isNaN(value) ? "no value" : value === 0 ? "0" : Number(value.toPrecision(3)).toString();
const percent = value => (100 * value).toFixed(1) + "%";
const headName = head => head === "max" ? "largest of all heads" : head === "mean" ? "mean of all heads" : "head " + data.heads[head];

/** The values of a row on the images, or (`kind` "text") on the text. */
function rowOf(row, kind = "row") {
  const id = `${kind}-${row}`;
  if (!known.has(id)) known.set(id, inflate(at(id).textContent).then(buffer => asRow(buffer, nMaps)));
  return known.get(id);
}

/** Everything the page shows of the state. Only the last of several calls draws. */
async function render() {
  const mine = ++turn, shown = state.preview ?? state.row;
  const [row, text] = await Promise.all([rowOf(shown), data.nColumns ? rowOf(shown, "text") : null]);
  if (mine !== turn) return;
  const maps = data.heads.map((_, head) => mapOf(row, state.layer * nHeads + head, data.nTokens, data.zero, data.clear));
  const map = typeof state.head === "number" ? maps[state.head] : combined(maps, state.head);
  const ofLayer = Math.max(...maps.map(reachOf)), common = at("common").value === "layer";
  const look = {
    colours: data.colours, signed, strength: at("strength").value / 100, evidence: at("evidence").checked,
    reach: common ? ofLayer : reachOf(map), marked: [],
  };
  drawn = { map, look, shown };
  drawPanels();
  const small = panels[data.picks.length ? data.picks[shown][0] : state.panel];
  [...at("heads").children].forEach((button, head) => {
    const canvas = button.firstChild;
    [canvas.width, canvas.height] = small.smallSize;
    paint(canvas, small, maps[head], { ...look, reach: common ? ofLayer : reachOf(maps[head]) });
    button.setAttribute("aria-pressed", state.head === head);
    button.lastChild.textContent = `${data.heads[head]}: ${number(reachOf(maps[head]))}`;
  });
  scaleBar(look.reach);
  controls(shown);
  if (text) drawText(shown, text, common);
  at("readout").textContent = readout(shown, map, row);
}

/** The text, each token as opaque as the weight with which the shown one attends to it: full where it is the largest of
 * text and pictures, so that a head that looks at the picture leaves the text clear. */
function drawText(shown, text, common) {
  const maps = data.heads.map((_, head) => mapOf(text, state.layer * nHeads + head, data.nColumns, 0, data.clear));
  const map = typeof state.head === "number" ? maps[state.head] : combined(maps, state.head);
  const reach = Math.max(drawn.look.reach, common ? Math.max(...maps.map(reachOf)) : reachOf(map));
  const chips = [...at("chips").children].map((element, i) => ({ element, ...data.chips[i] })).filter(chip => chip.column !== null);
  for (const { element, column, text } of chips) {
    element.style.setProperty("--share", reach > 0 ? (map[column] / reach).toFixed(3) : 0);
    element.title = `${number(map[column])} on “${text}”`;
  }
  const most = chips.filter(chip => map[chip.column] > 0).sort((a, b) => map[b.column] - map[a.column]).slice(0, 3);
  const names = most.map(chip => `“${spelled(chip.text)}” ${number(map[chip.column])}`);
  at("text-said").textContent = `“${spelled(chipOf(shown).text)}” attends in the text to ${names.join(", ") || "nothing"}`;
}

/** The pictures as they were drawn last, with what is marked in them now. */
function drawPanels() {
  for (const [i, panel] of panels.entries()) {
    const marked = state.pointed && state.pointed.panel === i ? [panel.boxes.subarray(4 * state.pointed.token, 4 * state.pointed.token + 4)] : [];
    if (data.picks.length && data.picks[drawn.shown][0] === i) marked.push(data.picks[drawn.shown][1]);
    paint(panel.canvas, panel, drawn.map, { ...drawn.look, marked });
  }
}

function readout(shown, map, row) {
  const names = [`“${chipOf(shown).text}”`];
  if (hasLayers) names.push(`layer ${data.layers[state.layer]}`);
  if (hasHeads) names.push(headName(state.head));
  const parts = [names.join(", ")];
  let best = -1;
  for (let i = 0; i < map.length; i++) if (Math.abs(map[i]) > (best < 0 ? -1 : Math.abs(map[best]))) best = i;
  const home = panels.find(panel => panel.tokens.includes(best));
  parts.push(home ? `largest ${number(map[best])} at ${home.label}, ${data.unit} ${home.tokens.indexOf(best)}` : "no values");
  if (data.hasShares && state.head !== "max") {
    const own = row.shares.subarray(state.layer * nHeads, (state.layer + 1) * nHeads);
    const elsewhere = state.head === "mean" ? own.reduce((a, b) => a + b) / nHeads : own[state.head];
    if (panels.length > 1) for (const panel of panels) parts.push(`${panel.label} ${percent(sum(map, panel.tokens))}`);
    parts.push(`on images ${percent(1 - elsewhere)}`, `on ${data.elsewhere} ${percent(elsewhere)}`);
    if (data.evidenceTokens.length) parts.push(`on evidence ${percent(data.evidenceTokens.reduce((s, i) => s + map[i], 0))}`);
  }
  return parts.join(" · ");
}

function sum(map, start, stop) {
  let total = 0;
  for (let i = start; i < stop; i++) total += map[i] || 0;
  return total;
}

const spelled = text => text.replaceAll("\n", "⏎") || " ";
const chipOf = row => data.chips.find(chip => chip.row === row);

function scaleBar(reach) {
  const canvas = at("bar").firstChild, pen = canvas.getContext("2d"), ticks = at("ticks").children;
  data.colours.forEach((colour, i) => { pen.fillStyle = colour; pen.fillRect(i, 0, 1, 1); });
  const ends = signed ? [-reach, 0, reach] : [0, reach / 2, reach];
  ends.forEach((value, i) => { ticks[i].textContent = number(value) + (i === 2 ? " " + data.quantity : ""); });
}

function controls(shown) {
  at("layer").value = state.layer;
  at("head").value = state.head;
  at("rank").value = data.ranked.findIndex(([layer, head]) => layer === state.layer && head === state.head);
  for (const chip of document.querySelectorAll("button.chip")) chip.setAttribute("aria-pressed", Number(chip.dataset.row) === shown);
}

const show = change => { Object.assign(state, change); return render(); };
const step = (value, by, n) => Math.max(0, Math.min(n - 1, value + by));

function rank(by) {
  const now = Number(at("rank").value), place = at("rank").value === "" || now < 0 ? 0 : step(now, by, data.ranked.length);
  if (data.ranked.length) show({ layer: data.ranked[place][0], head: data.ranked[place][1] });
}

function toggle(id, values) {
  const control = at(id);
  if (control.type === "checkbox") control.checked = !control.checked;
  else control.value = control.value === values[0] ? values[1] : values[0];
  render();
}

const keys = {
  ArrowLeft: () => show({ row: order[step(order.indexOf(state.row), -1, data.nRows)] }),
  ArrowRight: () => show({ row: order[step(order.indexOf(state.row), 1, data.nRows)] }),
  ArrowUp: () => show({ layer: step(state.layer, 1, data.layers.length) }),
  ArrowDown: () => show({ layer: step(state.layer, -1, data.layers.length) }),
  ",": () => show({ head: typeof state.head === "number" ? step(state.head, -1, nHeads) : nHeads - 1 }),
  ".": () => show({ head: typeof state.head === "number" ? step(state.head, 1, nHeads) : 0 }),
  m: () => show({ head: "mean" }),
  x: () => show({ head: "max" }),
  n: () => rank(1),
  p: () => rank(-1),
  s: () => toggle("common", ["own", "layer"]),
  b: () => toggle("evidence"),
  o: () => toggle("strength", ["75", "0"]),
};

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=range]")) return;
  if (!Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  state.preview = null;
  keys[event.key]();
});

function makeChips() {
  at("text").hidden = data.picks.length > 0;
  for (const chip of data.chips) {
    const element = document.createElement(chip.row === null ? "span" : "button");
    element.className = "chip " + chip.kind;
    element.textContent = spelled(chip.text);
    if (chip.row !== null) {
      element.type = "button";
      element.dataset.row = chip.row;
      element.addEventListener("click", () => show({ row: chip.row, preview: null }));
      element.addEventListener("pointerenter", event => { if (event.pointerType === "mouse") show({ preview: chip.row }); });
      element.addEventListener("pointerleave", () => show({ preview: null }));
    }
    at("chips").append(element);
  }
}

function makeControls() {
  const option = (select, value, text) => select.append(new Option(text, value));
  data.layers.forEach((name, layer) => option(at("layer"), layer, name));
  if (nHeads > 1) { option(at("head"), "max", "largest"); option(at("head"), "mean", "mean"); }
  data.heads.forEach((name, head) => option(at("head"), head, name));
  data.ranked.forEach(([layer, head], place) => option(at("rank"), place, `${place + 1}. head ${data.layers[layer]}.${data.heads[head]}`));
  at("rank-label").hidden = !data.ranked.length;
  at("heads").hidden = nHeads < 2;
  at("layer").parentElement.hidden = !hasLayers;
  at("head").parentElement.hidden = !hasHeads;
  at("layer").addEventListener("change", event => show({ layer: Number(event.target.value) }));
  at("head").addEventListener("change", event => show({ head: Number.isNaN(Number(event.target.value)) ? event.target.value : Number(event.target.value) }));
  at("rank").addEventListener("change", () => rank(0));
  for (const id of ["common", "strength", "evidence"]) at(id).addEventListener("input", render);
  at("save-svg").addEventListener("click", () => save(paperPicture(), "svg"));
  at("save-png").addEventListener("click", () => save(paperPicture(), "png"));
  data.heads.forEach((name, head) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(document.createElement("canvas"), document.createElement("span"));
    button.addEventListener("click", () => show({ head }));
    at("heads").append(button);
  });
}

/** What is drawn, with what it says, for `paper.js`. */
function paperPicture() {
  const names = [data.picks.length ? chipOf(drawn.shown).text : `“${spelled(chipOf(drawn.shown).text)}”`];
  if (hasLayers) names.push(`layer ${data.layers[state.layer]}`);
  if (hasHeads) names.push(headName(state.head));
  const { map, look } = drawn, ends = signed ? [-look.reach, 0, look.reach] : [0, look.reach / 2, look.reach];
  const marked = data.picks.length ? [data.picks[drawn.shown]] : [];
  return { panels, map, look, marked, title: names.join(", "), ticks: ends.map(number), quantity: data.quantity, inches: Number(at("paper").value) };
}

async function makePanels() {
  const boxes = new Float32Array(await inflate(at("boxes").textContent));
  const pictures = await Promise.all(data.pictures.map(async ({ src }) => {
    const image = new Image();
    image.src = src;
    await image.decode();
    return image;
  }));
  return data.panels.map((panel, i) => {
    const { width, height, evidence } = data.pictures[panel.picture], longest = Math.max(width, height);
    const scale = Math.min(1600 / longest, Math.max(1, Math.ceil(640 / longest))), thumb = 160 / longest;
    const canvas = document.createElement("canvas"), figure = document.createElement("figure"), caption = document.createElement("figcaption");
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    caption.textContent = panel.label;
    figure.append(canvas, caption);
    at("panels").append(figure);
    const made = {
      ...panel, canvas, evidence, size: [width, height], boxes: boxes.subarray(4 * panel.at, 4 * (panel.at + panel.tokens.length)),
      grey: greyPicture(pictures[panel.picture], canvas.width, canvas.height),
      smallSize: [Math.max(1, Math.round(width * thumb)), Math.max(1, Math.round(height * thumb))],
    };
    canvas.addEventListener("pointermove", event => point(i, made, event));
    canvas.addEventListener("pointerleave", () => { at("pointed").textContent = "\u00a0"; mark(null); });
    canvas.addEventListener("click", event => pick(i, made, event));
    canvas.classList.toggle("pick", data.picks.length > 0);
    return made;
  });
}

/** Where in the original image an event happened. */
function place(panel, event) {
  const frame = panel.canvas.getBoundingClientRect();
  return [(event.clientX - frame.left) / frame.width * panel.size[0], (event.clientY - frame.top) / frame.height * panel.size[1]];
}

function mark(pointed) {
  state.pointed = pointed;
  if (drawn) drawPanels();
}

const within = ([x0, y0, x1, y1], [x, y]) => x0 <= x && x < x1 && y0 <= y && y < y1;

function point(i, panel, event) {
  const spot = place(panel, event);
  for (let token = 0; token < panel.tokens.length; token++) {
    const box = panel.boxes.subarray(4 * token, 4 * token + 4);
    if (!within(box, spot) || !drawn) continue;
    const [x0, y0, x1, y1] = [...box].map(number);
    at("pointed").textContent = `${panel.label}, ${data.unit} ${token}: ${number(drawn.map[panel.tokens[token]])} · pixels x ${x0} to ${x1}, y ${y0} to ${y1}`;
    if (!state.pointed || state.pointed.panel !== i || state.pointed.token !== token) mark({ panel: i, token });
    return;
  }
}

/** A click in a picture chooses the nearest row that lies in it, if any does; small maps then show this picture. */
function pick(i, panel, event) {
  const [x, y] = place(panel, event);
  let row = state.row, least = Infinity;
  data.picks.forEach(([home, [x0, y0, x1, y1]], other) => {
    const far = Math.hypot((x0 + x1) / 2 - x, (y0 + y1) / 2 - y);
    if (home === i && far < least) [row, least] = [other, far];
  });
  show({ row, panel: i });
}

/** The layer and head that the address names, as #head=14.3, if the page has them. */
function named() {
  const [, layer, head] = /^#head=(\d+)\.(\d+)$/.exec(location.hash) ?? [];
  const own = { layer: data.layers.indexOf(layer), head: data.heads.indexOf(head) };
  return own.layer >= 0 && own.head >= 0 ? own : {};
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot decompress (DecompressionStream is missing): open the page in one of 2023 or later");
  makeChips();
  makeControls();
  panels = await makePanels();
  await show(named());
  addEventListener("hashchange", () => show(named()));
  document.body.dataset.ready = "yes";
}

start().catch(error => {
  at("warning").hidden = false;
  at("warning").textContent = "Nothing can be shown: " + error.message;
  at("readout").textContent = "";
});
