"use strict";
// Numbers and drawing; nothing here knows of the page's controls.

/** Bytes of a text that is base64 around zlib. */
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text.trim()), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** A row of values: scales and shares [map], codes [map, token]. Numbers are little-endian, as browsers' arrays are. */
function asRow(buffer, nMaps) {
  return {
    scales: new Float32Array(buffer, 0, nMaps),
    shares: new Float32Array(buffer, 4 * nMaps, nMaps),
    codes: new Uint8Array(buffer, 8 * nMaps),
  };
}

/** The values of one map; NaN where there is none. */
function mapOf(row, map, n, zero, clear) {
  const out = new Float32Array(n), scale = row.scales[map];
  for (let i = 0; i < n; i++) {
    const code = row.codes[map * n + i];
    out[i] = code === clear ? NaN : (code - zero) * scale;
  }
  return out;
}

/** Several maps as one: their mean, or at each token the value of the largest magnitude. */
function combined(maps, how) {
  const out = maps[0].slice();
  for (const map of maps.slice(1)) {
    for (let i = 0; i < out.length; i++) {
      if (how === "mean") out[i] += map[i];
      else if (Math.abs(map[i]) > Math.abs(out[i]) || Number.isNaN(out[i])) out[i] = map[i];
    }
  }
  if (how === "mean") for (let i = 0; i < out.length; i++) out[i] /= maps.length;
  return out;
}

/** The largest magnitude. */
function reachOf(map) {
  let most = 0;
  for (const value of map) if (Math.abs(value) > most) most = Math.abs(value);
  return most;
}

/** Place among 256 colours: from 0 to the reach, or from minus to plus the reach. */
function colourOf(value, reach, signed) {
  const share = reach > 0 ? Math.max(-1, Math.min(1, value / reach)) : 0;
  return Math.round(signed ? 127.5 + 127.5 * share : 255 * Math.max(0, share));
}

/** The picture in grey, once: colours belong to the values. */
function greyPicture(image, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = height;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = width <= image.naturalWidth;
  pen.drawImage(image, 0, 0, width, height);
  pen.globalCompositeOperation = "color";
  pen.fillStyle = "#888";
  pen.fillRect(0, 0, width, height);
  return canvas;
}

/**
 * Values over a picture.
 * `panel`: grey (canvas), boxes [token * 4] and size [width, height] in original pixels, tokens, tiles, evidence.
 * Each token is drawn on its box, more opaque where its value is larger.
 */
function paint(canvas, panel, map, look) {
  const pen = canvas.getContext("2d"), [width, height] = panel.size;
  const sx = canvas.width / width, sy = canvas.height / height, n = panel.boxes.length / 4;
  pen.globalAlpha = 1;
  pen.drawImage(panel.grey, 0, 0, canvas.width, canvas.height);
  for (let i = 0; i < n && look.strength > 0; i++) {
    const value = map[panel.tokens[i]];
    if (Number.isNaN(value) || look.reach === 0) continue;
    const [x0, y0, x1, y1] = pixels(panel.boxes, i, sx, sy);
    pen.globalAlpha = look.strength * Math.min(1, Math.abs(value) / look.reach);
    pen.fillStyle = look.colours[colourOf(value, look.reach, look.signed)];
    pen.fillRect(x0, y0, x1 - x0, y1 - y0);
  }
  pen.globalAlpha = 1;
  const thin = Math.max(1, canvas.width / 320);
  const [columns, rows] = panel.tiles;
  for (let i = 1; i < columns; i++) line(pen, i * canvas.width / columns, 0, i * canvas.width / columns, canvas.height, thin);
  for (let i = 1; i < rows; i++) line(pen, 0, i * canvas.height / rows, canvas.width, i * canvas.height / rows, thin);
  if (look.evidence) for (const box of panel.evidence) frame(pen, pixels(box, 0, sx, sy), "#d55e00", 2 * thin);
  for (const box of look.marked || []) frame(pen, pixels(box, 0, sx, sy), "#000", 2 * thin);
}

/** Box `i` in canvas pixels, rounded so that neighbours meet. */
function pixels(boxes, i, sx, sy) {
  return [0, 1, 2, 3].map(k => Math.round(boxes[4 * i + k] * (k % 2 ? sy : sx)));
}

function frame(pen, [x0, y0, x1, y1], colour, width) {
  for (const [ink, wide] of [["#fff", width * 1.8], [colour, width]]) {
    pen.strokeStyle = ink; pen.lineWidth = wide;
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
}

function line(pen, x0, y0, x1, y1, width) {
  pen.save();
  pen.strokeStyle = "#fff"; pen.lineWidth = width; pen.setLineDash([4 * width, 4 * width]);
  pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke();
  pen.restore();
}
