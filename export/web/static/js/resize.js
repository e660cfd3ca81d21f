/** Pillow's bicubic resize, to the last bit: of the center square, or of all of a picture.
 *
 * The same arithmetic as vitrm/data/decoding.py's `fit` has through Pillow: filter weights as whole numbers of
 * 2^-22, and a pass in each direction that rounds to 8 bits.  A browser's own scaling differs from one to the next.
 */

const PRECISION = 22;
const HALF = 1 << (PRECISION - 1);
const SUPPORT = 2; // of the bicubic filter, in pixels of the smaller of source and result
const STRIP = 1 << 21; // pixels read at once: a phone's canvas has a limit, and a photo may be larger

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** Weights of the source pixels for results `from` … `to - 1` of `size`.
 *
 * Returns first[i], count[i] (the source pixels of result from + i) and weights[i * most + k], in units of 2^-22.
 */
export function coefficients(length, size, from, to) {
  const scale = length / size;
  const stretch = Math.max(scale, 1);
  const support = SUPPORT * stretch;
  const most = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(to - from);
  const count = new Int32Array(to - from);
  const weights = new Int32Array((to - from) * most);
  const exact = new Float64Array(most);
  for (let i = from; i < to; i++) {
    const center = (i + 0.5) * scale;
    const low = Math.max(0, Math.trunc(center - support + 0.5));
    const high = Math.min(length, Math.trunc(center + support + 0.5));
    let sum = 0;
    for (let k = 0; k < high - low; k++) {
      exact[k] = bicubic((k + low - center + 0.5) * (1 / stretch));
      sum += exact[k];
    }
    for (let k = 0; k < high - low; k++) {
      const share = sum === 0 ? exact[k] : exact[k] / sum;
      weights[(i - from) * most + k] = Math.trunc((share < 0 ? -0.5 : 0.5) + share * (1 << PRECISION));
    }
    first[i - from] = low;
    count[i - from] = high - low;
  }
  return { first, count, weights, most };
}

const clip = (value) => (value < 0 ? 0 : value > 255 ? 255 : value);

/** The center square of a picture: Uint8Array of 3 planes [3, size, size].
 *
 * source: width, height, and read(x, y, width, height), which gives the RGBA bytes of a part of it.
 * longest: of a strip more than so many times as long as wide, the middle is taken first.
 */
export function cropSquare(source, size, longest) {
  let { width, height } = source;
  let left = 0;
  let top = 0;
  const shorter = Math.min(width, height);
  if (Math.max(width, height) > longest * shorter) {
    left = Math.floor((width - Math.min(width, longest * shorter)) / 2);
    top = Math.floor((height - Math.min(height, longest * shorter)) / 2);
    width = Math.min(width, longest * shorter);
    height = Math.min(height, longest * shorter);
  }
  const wide = Math.floor((size * width) / shorter);
  const high = Math.floor((size * height) / shorter);
  return resized(source, { left, top, width, height }, wide, high, size);
}

/** All of a picture, whatever its shape: Uint8Array of 3 planes [3, size, size]. */
export function fitSquare(source, size) {
  const { width, height } = source;
  return resized(source, { left: 0, top: 0, width, height }, size, size, size);
}

/** The center square of a part of a picture that is resized to `wide` × `high`. */
function resized(source, { left, top, width, height }, wide, high, size) {
  const column = Math.floor((wide - size) / 2);
  const row = Math.floor((high - size) / 2);
  const across = coefficients(width, wide, column, column + size);
  const down = coefficients(height, high, row, row + size);
  // What lies outside of the square is never computed.
  const x0 = across.first[0];
  const x1 = across.first[size - 1] + across.count[size - 1];
  const y0 = down.first[0];
  const y1 = down.first[size - 1] + down.count[size - 1];
  const out = new Uint8Array(3 * size * size);
  // Pillow's order of the two passes since version 13; each rounds to 8 bits.
  if (height > high && height - high > 2 * (width - wide)) {
    const flat = new Uint8Array(size * (x1 - x0) * 3);
    const some = Math.max(1, Math.floor(STRIP / (y1 - y0)));
    for (let x = x0; x < x1; x += some) {
      const columns = Math.min(some, x1 - x);
      const pixels = source.read(left + x, top + y0, columns, y1 - y0);
      vertical({ pixels, channels: 4, width: columns, y0 }, down, flat, x1 - x0, x - x0);
    }
    const narrow = new Uint8Array(3 * size * size);
    horizontal({ pixels: flat, channels: 3, width: x1 - x0, rows: size, x0 }, across, narrow, 0);
    planes(narrow, out, size * size);
  } else {
    const narrow = new Uint8Array((y1 - y0) * size * 3);
    const some = Math.max(1, Math.floor(STRIP / (x1 - x0)));
    for (let y = y0; y < y1; y += some) {
      const rows = Math.min(some, y1 - y);
      const pixels = source.read(left + x0, top + y, x1 - x0, rows);
      horizontal({ pixels, channels: 4, width: x1 - x0, rows, x0 }, across, narrow, y - y0);
    }
    const flat = new Uint8Array(3 * size * size);
    vertical({ pixels: narrow, channels: 3, width: size, y0 }, down, flat, size, 0);
    planes(flat, out, size * size);
  }
  return out;
}

/** Resizes rows of pixels, whose first column is x0 of the source, to RGB rows of `out` from `row` on. */
function horizontal({ pixels, channels, width, rows, x0 }, { first, count, weights, most }, out, row) {
  const size = first.length;
  let to = row * size * 3;
  for (let y = 0; y < rows; y++) {
    for (let i = 0; i < size; i++, to += 3) {
      const at = (y * width + first[i] - x0) * channels;
      sum(pixels, at, channels, weights, i * most, count[i], out, to);
    }
  }
}

/** Resizes columns of pixels, whose first row is y0 of the source, to RGB columns of `out`, from `column` of `wide` on. */
function vertical({ pixels, channels, width, y0 }, { first, count, weights, most }, out, wide, column) {
  for (let i = 0; i < first.length; i++) {
    let to = (i * wide + column) * 3;
    for (let x = 0; x < width; x++, to += 3) {
      const at = ((first[i] - y0) * width + x) * channels;
      sum(pixels, at, channels * width, weights, i * most, count[i], out, to);
    }
  }
}

/** One result of a pass: red, green and blue. */
function sum(pixels, at, stride, weights, from, count, out, to) {
  let r = HALF;
  let g = HALF;
  let b = HALF;
  for (let k = from; k < from + count; k++, at += stride) {
    const weight = weights[k];
    r += pixels[at] * weight;
    g += pixels[at + 1] * weight;
    b += pixels[at + 2] * weight;
  }
  out[to] = clip(r >> PRECISION);
  out[to + 1] = clip(g >> PRECISION);
  out[to + 2] = clip(b >> PRECISION);
}

/** RGB, RGB, … → three planes. */
function planes(pixels, out, area) {
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) out[c * area + i] = pixels[3 * i + c];
  }
}
