"use strict";
// The list of features, and what is shown of the one that is chosen; the address (#feature-12) says which.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const byNumber = new Map(data.features.map(entry => [entry.feature, entry]));
let listed = [], shown = null;

const number = value => value === 0 ? "0" : Number(value.toPrecision(3)).toString();

function element(name, attributes = {}, text = "") {
  const made = name === "svg" || attributes.svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (key !== "svg") made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}
const drawing = (name, attributes) => element(name, { ...attributes, svg: true });

/** The features that are listed, in their order. */
function choose() {
  const words = at("find").value.trim().toLowerCase(), order = at("order").value;
  listed = data.features.filter(entry =>
    (!at("found").checked || entry.found) &&
    (!words || String(entry.feature) === words || entry.label.toLowerCase() === words || (words.length > 1 && entry.label.toLowerCase().includes(words))));
  if (order === "feature") listed.sort((a, b) => a.feature - b.feature);
  if (order === "score") listed.sort((a, b) => (b.score ?? -1) - (a.score ?? -1));
  if (order === "active") listed.sort((a, b) => b.active - a.active);
  at("count").textContent = `${listed.length} of ${data.features.length} features`;
  const body = document.querySelector("#index tbody");
  body.replaceChildren(...listed.map(row));
  mark();
}

function row(entry) {
  const made = element("tr", { "data-feature": entry.feature }), button = element("button", { type: "button" }, String(entry.feature));
  button.addEventListener("click", () => show(entry.feature));
  const cells = [button, entry.found ? entry.label : entry.label && `(${entry.label})`, entry.score === null ? "" : entry.score.toFixed(2), (100 * entry.active).toFixed(2) + "%"];
  for (const cell of cells) {
    const td = element("td");
    td.append(cell);
    made.append(td);
  }
  return made;
}

/** Which row of the list is shown. */
function mark() {
  for (const tr of document.querySelectorAll("#index tbody tr")) tr.setAttribute("aria-current", Number(tr.dataset.feature) === shown);
}

function show(feature) {
  const entry = byNumber.get(feature);
  if (!entry) return;
  shown = feature;
  history.replaceState(null, "", `#feature-${feature}`);
  at("name").textContent = `Feature ${feature}` + (entry.found ? `: ${entry.label}` : "");
  at("said").textContent = entry.said;
  at("tops").replaceChildren(...entry.marks.map(own => figure(own, entry.largest)));
  at("histogram").replaceChildren(bars(entry), element("p", { class: "soft" }, `Active on ${(100 * entry.active).toFixed(2)}% of the tokens; from 0 to ${number(entry.largest)}, tokens in each bin (${Math.max(...entry.counts)} in the highest).`));
  at("direct").hidden = !entry.raised.length;
  for (const id of ["raised", "lowered"]) at(id).replaceChildren(...entry[id].map(([token, value]) => element("span", {}, `${token} ${value > 0 ? "+" : ""}${number(value)}`)));
  at("ablation").hidden = !entry.effect;
  at("effect").textContent = entry.effect;
  mark();
}

/** A picture with the tokens that activate the feature. */
function figure(own, largest) {
  const picture = data.pictures[own.picture], { width, height } = picture, made = element("figure");
  const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `picture ${own.picture}` });
  svg.append(drawing("image", { href: picture.src, width, height }));
  for (const [x0, y0, x1, y1, value] of own.tokens) {
    svg.append(drawing("rect", { class: "token", x: x0, y: y0, width: x1 - x0, height: y1 - y0, fill: "#0072b2", "fill-opacity": (0.75 * value / largest).toFixed(3), stroke: "#0072b2", "stroke-width": width / 200 }));
  }
  for (const [x0, y0, x1, y1] of own.frames) svg.append(drawing("rect", { class: "frame", x: x0, y: y0, width: x1 - x0, height: y1 - y0, fill: "none", stroke: "#d55e00", "stroke-width": width / 100 }));
  made.append(svg, element("figcaption", {}, `largest ${number(own.largest)}`));
  return made;
}

function bars(entry) {
  const n = entry.counts.length, most = Math.max(...entry.counts, 1);
  const svg = drawing("svg", { viewBox: `0 0 ${n} 1`, preserveAspectRatio: "none", role: "img", "aria-label": "histogram of activations" });
  entry.counts.forEach((count, i) => svg.append(drawing("rect", { x: i + 0.05, width: 0.9, y: 1 - count / most, height: count / most })));
  return svg;
}

for (const id of ["find", "found", "order"]) at(id).addEventListener("input", choose);
document.addEventListener("keydown", event => {
  if (!["ArrowUp", "ArrowDown"].includes(event.key) || ["INPUT", "SELECT"].includes(event.target.tagName) || !listed.length) return;
  event.preventDefault();
  const next = listed.findIndex(entry => entry.feature === shown) + (event.key === "ArrowDown" ? 1 : -1);
  if (listed[next]) show(listed[next].feature);
});
const asked = () => Number((location.hash.match(/^#feature-(\d+)$/) || [])[1] ?? NaN);
window.addEventListener("hashchange", () => show(asked()));
choose();
show(byNumber.has(asked()) ? asked() : data.features[0]?.feature);
document.body.dataset.ready = "";
