// The page's controls: they pick among answers, probabilities and maps that the model computed.
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent);
const LAST = data.factors.length - 1, ZOOM = Math.max(1, Math.round(768 / data.picture.width));
const state = { random: false, pair: 1, step: LAST, at: 0 };
const percent = p => p >= 0.995 && p < 1 ? ">99%" : p < 0.005 && p > 0 ? "<1%" : `${Math.round(100 * p)}%`;
let codes, image, panel, timer = null, typed = [];

const setting = () => data.settings[state.random ? state.pair : 0];
const reply = () => setting().steps[state.step];

/** Attention of a watched head on every image token while a token of the shown reply was predicted. */
function attention(head) {
  const { tokens, first } = reply(), map = new Float32Array(data.nTokens);
  if (tokens.length) {
    const start = (first + state.at * data.watched.length + head) * data.nTokens;
    for (let i = 0; i < data.nTokens; i++) map[i] = codes[start + i] / 255 * data.reach;
  }
  return map;
}

/** The answer as buttons; characters that differ from those before are typed in one after the other. */
function drawAnswer() {
  const { tokens, probabilities, expected } = reply();
  let fresh = 0;
  at("answer").replaceChildren(...tokens.map((token, i) => {
    const button = document.createElement("button"), letter = document.createElement("b");
    const bar = document.createElement("i"), share = document.createElement("small");
    button.type = "button"; button.className = "char"; button.dataset.at = i;
    button.classList.toggle("wrong", token.trim() !== expected[i].trim());
    if (typed[i] !== token) { button.classList.add("new"); button.style.setProperty("--n", fresh++); }
    letter.textContent = token; share.textContent = percent(probabilities[i]);
    bar.style.setProperty("--p", probabilities[i]);
    button.setAttribute("aria-pressed", i === state.at);
    button.setAttribute("aria-label", `${token}, probability ${percent(probabilities[i])}`);
    button.append(letter, bar, share);
    return button;
  }));
  if (!tokens.length) at("answer").append(Object.assign(document.createElement("span"), { className: "nothing", textContent: "nothing" }));
  typed = tokens;
}

/** Whether more than a tenth of one of the boxes lies in the box of an image token: the rule of the OCR score. */
function shows(token, boxes) {
  const i = data.tokens.indexOf(token);
  const [x0, y0, x1, y1] = data.boxes.slice(4 * i, 4 * i + 4);
  const shared = ([a, b, c, d]) => Math.max(0, Math.min(c, x1) - Math.max(a, x0)) * Math.max(0, Math.min(d, y1) - Math.max(b, y0));
  return i >= 0 && boxes.some(box => shared(box) > 0.1 * (box[2] - box[0]) * (box[3] - box[1]));
}

/** The image token with the largest weight of a map. */
const largest = map => map.indexOf(Math.max(...map));

function drawMaps() {
  const { tokens, boxes } = reply(), marked = tokens.length ? boxes[state.at] : [];
  const frames = marked.map(([x0, y0, x1, y1]) => [x0 - 1, y0 - 1, x1 + 1, y1 + 1]); // clear of the ink
  for (const [head, { colour }] of data.watched.entries()) {
    const map = attention(head), best = largest(map), canvas = at(`map-${head}`);
    const look = { strength: 0.85, reach: data.reach, signed: false, colours: Array(256).fill(colour), marked: frames };
    paint(canvas, panel, map, look);
    const where = !marked.length ? "" : shows(best, marked) ? ", on the character" : ", beside the character";
    at(`reading-${head}`).textContent = tokens.length ? `most on one place: ${percent(map[best])}${where}` : "";
  }
  const canvas = at("page"), pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const scale = canvas.width / data.picture.width;
  for (const box of frames) frame(pen, box.map(corner => Math.round(corner * scale)), "#000", Math.max(2, canvas.width / 160));
}

/** Probability of the right answer against strength, every setting; the shown one marked. */
function drawCurves() {
  const path = (own, kind) => `<path class="${kind}" d="M${own.expected.map((p, i) => `${data.factors[i]} ${40 - 38 * p}`).join("L")}"/>`;
  const random = data.settings.slice(1).map((own, i) => [own, state.random && i + 1 === state.pair ? "chosen" : ""]);
  random.sort((a, b) => a[1].length - b[1].length);
  const lines = [...random, [data.settings[0], "ours"]].map(([own, kind]) => path(own, kind));
  const x = data.factors[state.step];
  at("curves").innerHTML = `${lines.join("")}<line x1="${x}" x2="${x}" y1="0" y2="40"/>`;
}

function say() {
  const { text } = reply(), right = text === data.answer, heads = setting().heads.join(" and ");
  const strength = `${data.factors[state.step]}%`;
  at("strength-said").textContent = `heads ${heads} at ${strength}`;
  at("strength").setAttribute("aria-valuetext", strength);
  const p = percent(setting().expected[state.step]);
  at("said").textContent = `Heads ${heads} at ${strength}: ${right ? "right" : `wrong, the page says ${data.answer}`}. Probability of the right answer: ${p}.`;
}

function draw() {
  const length = reply().tokens.length;
  state.at = Math.max(0, Math.min(state.at, length - 1));
  at("strength").value = state.step;
  at("pair").value = state.pair;
  document.querySelector(`input[value=${state.random ? "random" : "reading"}]`).checked = true;
  for (const dot of document.querySelectorAll(".dot")) dot.classList.toggle("chosen", state.random && Number(dot.dataset.pair) === state.pair);
  drawAnswer(); drawMaps(); drawCurves(); say();
}

function change(values) { Object.assign(state, values); draw(); }

/** Choose a character; the answer stays as it is. */
function look(i) {
  const length = reply().tokens.length;
  if (!length) return;
  state.at = (i + length) % length;
  for (const button of at("answer").children) button.setAttribute("aria-pressed", Number(button.dataset.at) === state.at);
  drawMaps();
}

function stop() {
  clearInterval(timer); timer = null;
  at("play").textContent = state.step ? "▶ turn down" : "▶ turn up";
}

/** From where the slider stands to off, or from off to as trained. */
function play() {
  if (timer) return stop();
  const by = state.step ? -1 : 1;
  at("play").textContent = "❚❚ pause";
  timer = setInterval(() => {
    change({ step: state.step + by });
    if (state.step === 0 || state.step === LAST) stop();
  }, 450);
}

function choose(values) { if (timer) stop(); change(values); at("play").textContent = state.step ? "▶ turn down" : "▶ turn up"; }

function listen() {
  at("answer").addEventListener("click", event => {
    const button = event.target.closest(".char");
    if (button) look(Number(button.dataset.at));
  });
  at("strength").addEventListener("input", event => choose({ step: Number(event.target.value) }));
  at("pair").addEventListener("change", event => choose({ random: true, pair: Number(event.target.value) }));
  for (const radio of document.querySelectorAll("input[name=who]")) {
    radio.addEventListener("change", () => choose({ random: radio.value === "random" }));
  }
  for (const dot of document.querySelectorAll(".dot")) {
    dot.addEventListener("click", () => choose({ random: true, pair: Number(dot.dataset.pair), step: 0 }));
  }
  at("play").addEventListener("click", play);
  document.addEventListener("keydown", event => {
    const takesIt = event.key === " " ? "select, button, summary, input[type=radio]" : event.key.startsWith("Arrow") ? "select, input" : "select";
    if (event.target.matches(takesIt) || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => look(state.at - 1), ArrowRight: () => look(state.at + 1),
      ArrowUp: () => choose({ step: Math.min(LAST, state.step + 1) }), ArrowDown: () => choose({ step: Math.max(0, state.step - 1) }),
      r: () => choose({ random: !state.random }), " ": play,
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
}

async function start() {
  codes = new Uint8Array(await inflate(at("maps").textContent));
  image = new Image();
  image.src = data.picture.src;
  await image.decode();
  const width = ZOOM * data.picture.width, height = ZOOM * data.picture.height;
  for (const canvas of document.querySelectorAll(".stage canvas")) { canvas.width = width; canvas.height = height; }
  panel = {
    grey: greyPicture(image, width, height), boxes: data.boxes, tokens: data.tokens,
    size: [data.picture.width, data.picture.height], tiles: [1, 1], evidence: [],
  };
  listen();
  // begins with the first character that both heads look at
  const seen = reply().boxes.map((boxes, i) => { state.at = i; return data.watched.every((_, head) => shows(largest(attention(head)), boxes)); });
  state.at = Math.max(0, seen.indexOf(true));
  draw();
  document.body.dataset.ready = "";
}
start();
