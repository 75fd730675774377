// Numbers of an atlas; nothing here draws.

const DOUBLES = ["p", "p_holm"], SINGLES = ["value", "low", "high", "null", "n"];

/** Columns [score * head] of a tower, as `page.py` packs them. */
function asColumns(buffer, n) {
  const columns = {};
  DOUBLES.forEach((name, i) => { columns[name] = new Float64Array(buffer, 8 * n * i, n); });
  SINGLES.forEach((name, i) => { columns[name] = new Float32Array(buffer, 8 * n * DOUBLES.length + 4 * n * i, n); });
  return columns;
}

/** One score's part of a column, [head]. */
function ofScore(table, score, column = "value") {
  const place = table.scores.indexOf(score);
  return place < 0 ? null : table[column].subarray(place * table.nHeads, (place + 1) * table.nHeads);
}

/** Heads by a score, largest first; those without a value last. */
function ranked(values) {
  const key = i => Number.isNaN(values[i]) ? -Infinity : values[i];
  return Array.from(values, (_, i) => i).sort((a, b) => key(b) - key(a) || a - b);
}

/** Profiles of heads, [head, score]: scores less their mean over heads, by their standard deviation (0 where there is no
 * value), each head's divided by its norm. */
function profilesOf(table) {
  const nScores = table.scores.length, out = new Float64Array(table.nHeads * nScores);
  table.scores.forEach((score, s) => {
    const values = ofScore(table, score), known = values.filter(value => !Number.isNaN(value));
    const mean = known.reduce((a, b) => a + b, 0) / known.length;
    const spread = Math.sqrt(known.reduce((a, b) => a + (b - mean) ** 2, 0) / known.length);
    if (spread > 0) values.forEach((value, head) => { if (!Number.isNaN(value)) out[head * nScores + s] = (value - mean) / spread; });
  });
  for (let head = 0; head < table.nHeads; head++) {
    const own = out.subarray(head * nScores, (head + 1) * nScores), norm = Math.hypot(...own);
    if (norm > 0) own.forEach((value, s) => { own[s] = value / norm; });
  }
  return out;
}

/** The `n` heads whose profiles have the largest cosine with that of a head: [head, cosine]. */
function relatives(profiles, nScores, head, n) {
  const found = [];
  for (let other = 0; other * nScores < profiles.length; other++) {
    let cosine = 0;
    for (let s = 0; s < nScores; s++) cosine += profiles[head * nScores + s] * profiles[other * nScores + s];
    if (other !== head) found.push([other, cosine]);
  }
  return found.sort((a, b) => b[1] - a[1]).slice(0, n);
}

/** Ranks from 1, equal values sharing the mean of theirs. */
function ranksOf(values) {
  const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]), ranks = new Array(values.length);
  for (let i = 0, j = 0; i < order.length; i = j) {
    while (j < order.length && values[order[j]] === values[order[i]]) j++;
    for (let k = i; k < j; k++) ranks[order[k]] = (i + j + 1) / 2;
  }
  return ranks;
}

/** Spearman's rank correlation over heads that have both values, and their number. */
function rankCorrelation(x, y) {
  const both = Array.from(x, (_, i) => i).filter(i => !Number.isNaN(x[i]) && !Number.isNaN(y[i]));
  const a = ranksOf(both.map(i => x[i])), b = ranksOf(both.map(i => y[i])), middle = (both.length + 1) / 2;
  let ab = 0, aa = 0, bb = 0;
  a.forEach((rank, i) => { ab += (rank - middle) * (b[i] - middle); aa += (rank - middle) ** 2; bb += (b[i] - middle) ** 2; });
  return { rho: ab / Math.sqrt(aa * bb), n: both.length };
}

/** Whether a head's score is significantly above its null; null: it was not tested. */
function above(table, score, head, level) {
  const i = table.scores.indexOf(score) * table.nHeads + head;
  if (Number.isNaN(table.p_holm[i])) return null;
  return table.p_holm[i] <= level && table.value[i] > table.null[i];
}

/** Ends of a colour scale for several lists of values. `share`: of the values that it reaches. */
function scaleOf(lists, signed, share) {
  const known = lists.flatMap(list => Array.from(list)).filter(value => !Number.isNaN(value));
  const sizes = known.map(value => signed ? Math.abs(value) : value).sort((a, b) => a - b);
  if (!sizes.length) return { signed, low: 0, high: 0, over: false };
  const high = sizes[Math.ceil(share * sizes.length) - 1], most = sizes[sizes.length - 1];
  const low = signed ? -high : sizes[0] > high / 2 ? sizes[0] : Math.min(0, sizes[0]);
  return { signed, low, high, over: most > high };
}

/** Place of a value among 256 colours. */
function shadeOf(value, scale) {
  return scale.signed ? colourOf(value, scale.high, true) : colourOf(value - scale.low, scale.high - scale.low, false);
}

/** How values up to a size are written: with the decimals of three digits of the largest. */
function writer(largest) {
  const decimals = largest > 0 ? Math.max(0, Math.min(8, 2 - Math.floor(Math.log10(largest)))) : 3;
  return value => Number.isNaN(value) ? "–" : (Math.abs(value) < 0.5 * 10 ** -decimals ? 0 : value).toFixed(decimals);
}

/** Rows of a table of comma-separated values, with the columns of heads.csv; `label` before them, if there is one. */
function csvRows(table, tower, heads, label) {
  const cell = value => Number.isNaN(value) ? "" : String(Number(value.toPrecision(7)));
  return table.scores.flatMap((score, s) => heads.map(head => {
    const i = s * table.nHeads + head;
    const numbers = ["value", "low", "high", "null", "p", "p_holm", "n"].map(name => cell(table[name][i]));
    return [...label, tower, Math.floor(head / table.heads), head % table.heads, score, ...numbers].join(",");
  }));
}

const CSV_HEADER = "tower,layer,head,score,value,low,high,null,p,p_holm,n";
