// Pictures for a paper: what is drawn, as SVG of a width in inches, or as PNG of 300 pixels to the inch.
const DPI = 300, GAP = 6, LINE = 9, BAR = 5; // the others in points, of which an inch has 72
const SVG = Object.assign(document.createElement("div"), { innerHTML: "<svg/>" }).firstChild.namespaceURI;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const short = value => Number(value.toFixed(3));

/** Values over a picture as `paint` draws them, `width` points wide with its upper left corner at (x, y). */
function panelOf(panel, picture, x, y, width) {
  const { map, look } = picture, [w, h] = panel.size, scale = width / w;
  const group = element("g", { transform: `translate(${short(x)} ${short(y)}) scale(${scale})` });
  const whole = { width: w, height: h };
  const small = panel.grey.width * panel.grey.height <= 512 * 512;
  const source = small ? panel.grey.toDataURL() : panel.grey.toDataURL("image/jpeg", 0.9);
  group.append(element("image", { ...whole, href: source, preserveAspectRatio: "none" }));
  const values = element("g", { "shape-rendering": "crispEdges" });
  panel.tokens.forEach((token, i) => {
    const [x0, y0, x1, y1] = panel.boxes.subarray(4 * i, 4 * i + 4), value = map[token];
    if (Number.isNaN(value) || look.reach === 0 || look.strength === 0) return;
    const opacity = look.strength * Math.min(1, Math.abs(value) / look.reach);
    if (opacity < 0.002) return; // half a step of a screen's 256
    const fill = look.colours[colourOf(value, look.reach, look.signed)];
    values.append(element("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, fill, "fill-opacity": short(opacity) }));
  });
  group.append(values);
  const [columns, rows] = panel.tiles, thin = 0.5 / scale, dashes = { stroke: "#fff", "stroke-width": thin, "stroke-dasharray": 4 * thin };
  for (let i = 1; i < columns; i++) group.append(element("line", { x1: i * w / columns, x2: i * w / columns, y1: 0, y2: h, ...dashes }));
  for (let i = 1; i < rows; i++) group.append(element("line", { x1: 0, x2: w, y1: i * h / rows, y2: i * h / rows, ...dashes }));
  const frames = (look.evidence ? panel.evidence : []).map(box => [box, "#d55e00"]);
  for (const [home, box] of picture.marked) if (picture.panels[home] === panel) frames.push([box, "#000"]);
  for (const [[x0, y0, x1, y1], colour] of frames) {
    for (const [stroke, wide] of [["#fff", 1.8], [colour, 1]]) {
      group.append(element("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, fill: "none", stroke, "stroke-width": wide / scale }));
    }
  }
  return group;
}

/** The scale of colours, and its ticks below. */
function barOf(picture, y, width) {
  const group = element("g", { transform: `translate(0 ${short(y)})`, "shape-rendering": "crispEdges" }), n = 64, step = width / n;
  for (let i = 0; i < n; i++) {
    const fill = picture.look.colours[Math.round(255 * i / (n - 1))];
    group.append(element("rect", { x: short(i * step), y: 0, width: short(step + 0.1), height: BAR, fill }));
  }
  picture.ticks.forEach((tick, i) => {
    const text = i === 2 ? `${tick} ${picture.quantity}` : tick;
    group.append(element("text", { x: width * i / 2, y: BAR + LINE - 1, "text-anchor": ["start", "middle", "end"][i] }, text));
  });
  return group;
}

/** The picture as an SVG element: a title, the panels side by side, the scale. */
function svgOf(picture) {
  const width = 72 * picture.inches, n = picture.panels.length, own = (width - GAP * (n - 1)) / n;
  const height = Math.max(...picture.panels.map(({ size: [w, h] }) => own * h / w));
  const several = n > 1, top = LINE * (several ? 2 : 1) + 2, whole = top + height + 4 + BAR + LINE;
  const root = element("svg", {
    width: `${picture.inches}in`, height: `${short(whole / 72)}in`, viewBox: `0 0 ${width} ${short(whole)}`,
    "font-family": "Helvetica, Arial, sans-serif", "font-size": 7,
  });
  root.append(element("rect", { width, height: short(whole), fill: "#fff" }));
  root.append(element("text", { x: 0, y: 7 }, picture.title));
  picture.panels.forEach((panel, i) => {
    const x = i * (own + GAP);
    if (several) root.append(element("text", { x: short(x), y: 7 + LINE }, panel.label));
    root.append(panelOf(panel, picture, x, top, own));
  });
  root.append(barOf(picture, top + height + 4, Math.min(width, 234)));
  return root;
}

/** Bytes of a PNG with its resolution, by which it is placed at its width on paper. */
async function withResolution(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer()), chunk = new Uint8Array(21), view = new DataView(chunk.buffer);
  view.setUint32(0, 9);
  chunk.set([...("pHYs")].map(letter => letter.charCodeAt(0)), 4);
  for (const place of [8, 12]) view.setUint32(place, Math.round(DPI / 0.0254));
  chunk[16] = 1; // per metre
  let crc = ~0;
  for (const byte of chunk.subarray(4, 17)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >>> 1 ^ 0xedb88320 : crc >>> 1;
  }
  view.setUint32(17, ~crc);
  const head = 33; // signature and IHDR
  return new Blob([bytes.subarray(0, head), chunk, bytes.subarray(head)], { type: "image/png" });
}

async function pngOf(xml, inches) {
  const image = new Image(), canvas = document.createElement("canvas");
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(xml);
  await image.decode();
  canvas.width = Math.round(inches * DPI);
  canvas.height = Math.round(canvas.width * image.naturalHeight / image.naturalWidth);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return withResolution(await new Promise(done => canvas.toBlob(done)));
}

/** Offer the picture as a file. */
async function save(picture, kind) {
  const xml = new XMLSerializer().serializeToString(svgOf(picture));
  const blob = kind === "svg" ? new Blob([xml], { type: "image/svg+xml" }) : await pngOf(xml, picture.inches);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${picture.quantity}, ${picture.title}`.replace(/[^\w.]+/g, "-").replace(/^-|-$/g, "") + "." + kind;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
