// Maps of heads and the scatter of two scores. Each is drawn once on a hidden canvas; what is pointed at goes over it.

const MARGIN = { left: 26, top: 4, right: 4, bottom: 18 };

/** A canvas of a size in CSS pixels, sharp on the screen at hand. */
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  return ratio;
}

/** The page's colours, by their names in its style sheet. */
function inks() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["ink", "soft", "line"].map(name => [name, style.getPropertyValue("--" + name).trim()]));
}

/** Size of a map that is `width` wide: [width, height] of all cells. */
function mapSize(table, width) {
  const wide = width - MARGIN.left - MARGIN.right, cell = Math.min(wide / table.heads, 34);
  return [wide, Math.max(table.layers * 3, Math.min(table.layers * cell, 290))];
}

/** Edges of the cell of a head, in pixels of the canvas. */
function cellOf(map, head) {
  const { table, size: [wide, high], ratio } = map, layer = Math.floor(head / table.heads), column = head % table.heads;
  const x = i => Math.round(ratio * (MARGIN.left + i * wide / table.heads)), y = i => Math.round(ratio * (MARGIN.top + i * high / table.layers));
  return [x(column), y(layer), x(column + 1), y(layer + 1)];
}

/** The head at a place of a map's canvas in CSS pixels; null beside the cells. */
function headAt(map, x, y) {
  const { table, size: [wide, high] } = map;
  const column = Math.floor((x - MARGIN.left) / wide * table.heads), layer = Math.floor((y - MARGIN.top) / high * table.layers);
  return column < 0 || layer < 0 || column >= table.heads || layer >= table.layers ? null : layer * table.heads + column;
}

/** Everything of a map that does not move with the pointer. `selection`: 1 for heads that are selected, or null. */
function drawMap(map, values, scale, colours, selection, ink) {
  const { table, canvas, size: [wide, high] } = map;
  map.ratio = sized(canvas, MARGIN.left + wide + MARGIN.right, MARGIN.top + high + MARGIN.bottom);
  map.base = document.createElement("canvas");
  [map.base.width, map.base.height] = [canvas.width, canvas.height];
  const pen = map.base.getContext("2d");
  const [x0, y0] = cellOf(map, 0), [, , x1, y1] = cellOf(map, table.nHeads - 1);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(pixelsOf(table, values, scale, colours, selection, ink.line), x0, y0, x1 - x0, y1 - y0);
  if (selection) {
    pen.strokeStyle = ink.ink;
    pen.lineWidth = map.ratio;
    selection.forEach((chosen, head) => {
      const [x0, y0, x1, y1] = cellOf(map, head);
      if (chosen) pen.strokeRect(x0 + map.ratio / 2, y0 + map.ratio / 2, x1 - x0 - map.ratio, y1 - y0 - map.ratio);
    });
  }
  pen.fillStyle = ink.soft;
  pen.font = `${10 * map.ratio}px system-ui, sans-serif`;
  pen.textAlign = "right"; pen.textBaseline = "middle";
  for (const layer of steps(table.layers, high)) {
    const [x0, y0, , y1] = cellOf(map, layer * table.heads);
    pen.fillText(layer, x0 - 4 * map.ratio, (y0 + y1) / 2);
  }
  pen.textAlign = "center"; pen.textBaseline = "top";
  for (const head of steps(table.heads, wide)) {
    const [x0, , x1] = cellOf(map, head);
    pen.fillText(head, (x0 + x1) / 2, map.base.height - (MARGIN.bottom - 4) * map.ratio);
  }
}

/** A map of one pixel for each head; heads that are not selected are pale. */
function pixelsOf(table, values, scale, colours, selection, none) {
  const tiny = document.createElement("canvas");
  [tiny.width, tiny.height] = [table.heads, table.layers];
  const pen = tiny.getContext("2d"), image = pen.createImageData(table.heads, table.layers);
  const shades = new Uint8Array(colours.flatMap(bytesOf)), clear = bytesOf(none);
  for (let head = 0; head < table.nHeads; head++) {
    const shade = shadeOf(values[head], scale);
    image.data.set(Number.isNaN(values[head]) ? clear : shades.subarray(3 * shade, 3 * shade + 3), 4 * head);
    image.data[4 * head + 3] = selection && !selection[head] ? 77 : 255;
  }
  pen.putImageData(image, 0, 0);
  return tiny;
}

const bytesOf = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16)); // #rrggbb

/** Numbers at an axis with room for each. */
function steps(n, pixels) {
  const step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50].find(by => n / by * 20 <= pixels) || n;
  return Array.from({ length: Math.ceil(n / step) }, (_, i) => i * step);
}

/** A map with the heads that are pointed at and pinned. */
function markMap(map, hovered, pinned) {
  const pen = map.canvas.getContext("2d");
  pen.clearRect(0, 0, map.canvas.width, map.canvas.height);
  pen.drawImage(map.base, 0, 0);
  for (const [head, colour] of [[pinned, "#d55e00"], [hovered, "#000"]]) {
    if (head === null) continue;
    const [x0, y0, x1, y1] = cellOf(map, head), out = 2 * map.ratio;
    frame(pen, [x0 - out, y0 - out, x1 + out, y1 + out], colour, 2 * map.ratio);
  }
}

/** A bar of colours under a map. */
function drawScale(canvas, colours) {
  canvas.width = 256;
  canvas.height = 1;
  const pen = canvas.getContext("2d");
  colours.forEach((colour, i) => { pen.fillStyle = colour; pen.fillRect(i, 0, 1, 1); });
}

/** Round numbers between two ends, about `n` of them. */
function roundSteps(low, high, n) {
  const rough = (high - low) / n || 1, ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(by => by * ten).find(by => by >= rough);
  const out = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) out.push(Number((i * step).toPrecision(12)));
  return out;
}

/** Ends of an axis with a little room at both. */
function axisOf(values) {
  const known = Array.from(values).filter(value => !Number.isNaN(value));
  let low = Math.min(...known), high = Math.max(...known);
  if (!(high > low)) [low, high] = known.length ? [low - 0.5, low + 0.5] : [0, 1];
  const room = 0.04 * (high - low);
  return [low - room, high + room];
}

/** The scatter without what is pointed at; `plot` keeps where each head is. */
function drawScatter(plot, x, y, names, look) {
  const { canvas, width, height } = plot, ratio = plot.ratio = sized(canvas, width, height);
  const edge = { left: 52, top: 22, right: 12, bottom: 40 }, wide = width - edge.left - edge.right, high = height - edge.top - edge.bottom;
  const [x0, x1] = axisOf(x), [y0, y1] = axisOf(y);
  const acrossOf = value => ratio * (edge.left + (value - x0) / (x1 - x0) * wide), upOf = value => ratio * (edge.top + (y1 - value) / (y1 - y0) * high);
  plot.places = Array.from(x, (value, head) => [acrossOf(value), upOf(y[head])]);
  plot.base = document.createElement("canvas");
  [plot.base.width, plot.base.height] = [canvas.width, canvas.height];
  const pen = plot.base.getContext("2d");
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.lineWidth = ratio;
  pen.strokeStyle = look.ink.line;
  pen.fillStyle = look.ink.soft;
  pen.textAlign = "center"; pen.textBaseline = "top";
  for (const tick of roundSteps(x0, x1, 5)) {
    rule(pen, acrossOf(tick), upOf(y0), acrossOf(tick), upOf(y1));
    pen.fillText(look.number(tick), acrossOf(tick), upOf(y0) + 5 * ratio);
  }
  pen.textAlign = "right"; pen.textBaseline = "middle";
  for (const tick of roundSteps(y0, y1, 5)) {
    rule(pen, acrossOf(x0), upOf(tick), acrossOf(x1), upOf(tick));
    pen.fillText(look.number(tick), acrossOf(x0) - 6 * ratio, upOf(tick));
  }
  pen.fillStyle = look.ink.ink;
  pen.textBaseline = "bottom";
  pen.fillText(names[0], acrossOf(x1), ratio * (height - 4));
  pen.textAlign = "left"; pen.textBaseline = "top";
  pen.fillText(names[1], ratio * 4, ratio * 2);
  plot.places.forEach(([across, up], head) => {
    if (Number.isNaN(across) || Number.isNaN(up)) return;
    pen.globalAlpha = look.selection && !look.selection[head] ? 0.15 : 0.85;
    pen.fillStyle = look.colourOf(head);
    dot(pen, across, up, 3 * ratio);
    pen.fill();
  });
}

function markScatter(plot, hovered, pinned) {
  const pen = plot.canvas.getContext("2d");
  pen.clearRect(0, 0, plot.canvas.width, plot.canvas.height);
  pen.drawImage(plot.base, 0, 0);
  for (const [head, colour] of [[pinned, "#d55e00"], [hovered, "#000"]]) {
    if (head === null || plot.places[head].some(Number.isNaN)) continue;
    for (const [ink, wide] of [["#fff", 5], [colour, 2.5]]) {
      pen.strokeStyle = ink;
      pen.lineWidth = wide * plot.ratio;
      dot(pen, ...plot.places[head], 5.5 * plot.ratio);
      pen.stroke();
    }
  }
}

/** The head nearest to a place in CSS pixels, within a few pixels. */
function nearest(plot, x, y) {
  let found = null, least = (9 * plot.ratio) ** 2;
  plot.places.forEach(([across, up], head) => {
    const far = (across - x * plot.ratio) ** 2 + (up - y * plot.ratio) ** 2;
    if (far < least) [found, least] = [head, far];
  });
  return found;
}

function rule(pen, x0, y0, x1, y1) {
  pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke();
}

function dot(pen, x, y, radius) {
  pen.beginPath(); pen.arc(x, y, radius, 0, 2 * Math.PI);
}
