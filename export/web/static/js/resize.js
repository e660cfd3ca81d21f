/** Pillow's bicubic resize, to the last bit: the shorter side to the model's size, then the center square.
 *
 * The same arithmetic as vitrm/data/decoding.py's `fit_square` has through Pillow: filter weights as whole numbers of
 * 2^-22, a horizontal pass, rounding to 8 bits, a vertical pass.  A browser's own scaling differs from one to the next.
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
export function fitSquare(source, size, longest) {
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
  const column = Math.floor((wide - size) / 2);
  const row = Math.floor((high - size) / 2);
  const across = coefficients(width, wide, column, column + size);
  const down = coefficients(height, high, row, row + size);
  // What lies outside of the square is never computed.
  const x0 = across.first[0];
  const x1 = across.first[size - 1] + across.count[size - 1];
  const y0 = down.first[0];
  const y1 = down.first[size - 1] + down.count[size - 1];
  const narrowed = new Uint8Array((y1 - y0) * size * 3);
  const rows = Math.max(1, Math.floor(STRIP / (x1 - x0)));
  for (let y = y0; y < y1; y += rows) {
    const some = Math.min(rows, y1 - y);
    const pixels = source.read(left + x0, top + y, x1 - x0, some);
    narrow(pixels, x1 - x0, some, x0, across, narrowed.subarray((y - y0) * size * 3), size);
  }
  return shorten(narrowed, y0, down, size);
}

function narrow(pixels, width, rows, x0, { first, count, weights, most }, out, size) {
  for (let y = 0; y < rows; y++) {
    for (let i = 0; i < size; i++) {
      let r = HALF;
      let g = HALF;
      let b = HALF;
      let at = (y * width + first[i] - x0) * 4;
      for (let k = i * most; k < i * most + count[i]; k++, at += 4) {
        r += pixels[at] * weights[k];
        g += pixels[at + 1] * weights[k];
        b += pixels[at + 2] * weights[k];
      }
      const to = (y * size + i) * 3;
      out[to] = clip(r >> PRECISION);
      out[to + 1] = clip(g >> PRECISION);
      out[to + 2] = clip(b >> PRECISION);
    }
  }
}

function shorten(narrowed, y0, { first, count, weights, most }, size) {
  const out = new Uint8Array(3 * size * size);
  for (let i = 0; i < size; i++) {
    for (let x = 0; x < size; x++) {
      for (let c = 0; c < 3; c++) {
        let sum = HALF;
        let at = ((first[i] - y0) * size + x) * 3 + c;
        for (let k = i * most; k < i * most + count[i]; k++, at += size * 3) sum += narrowed[at] * weights[k];
        out[(c * size + i) * size + x] = clip(sum >> PRECISION);
      }
    }
  }
  return out;
}
