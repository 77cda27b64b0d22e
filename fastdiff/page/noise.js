// The noise law of fastdiff in JavaScript: the same bits as fastdiff/noise.py, which says what it is and why.
// Integers are 32 bits wide (Math.imul, | 0, >>> 0); float32 is Math.fround after every single operation.

export const STREAM = { INIT: 0, STEP: 1, FORWARD: 6, KNOWN: 11 };

const round = Math.fround;
const M0 = 0xd2511f53, M1 = 0xcd9e8d57;
const W0 = 0x9e3779b9n, W1 = 0xbb67ae85n;
const LOG = [
  0.3333333, -0.2499998, 0.20000689, -0.16669151, 0.14251156, -0.123967, 0.11634664, -0.11659936, 0.073325336,
].map(round);
const SIN = [-0.16666664, 0.008332749, -0.00019588009].map(round);
const COS = [0.041666664, -0.0013888304, 2.454804e-5].map(round);
const LN2_HIGH = round(0.693359375), LN2_LOW = round(-2.1219444e-4);
const SQRT_HALF_BITS = 0x3f3504f3;
const ANGLE_UNIT = round(3.7450703e-7), UNIFORM_UNIT = 2 ** -32;

const asFloat = new Float32Array(1), asBits = new Int32Array(asFloat.buffer);

/** The high word of the product of two words, by 16-bit halves: no sum leaves 32 bits. */
function high(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const middle = (Math.imul(a1, b0) + (Math.imul(a0, b0) >>> 16)) | 0;
  const other = (Math.imul(a0, b1) + (middle & 0xffff)) | 0;
  return (Math.imul(a1, b1) + (middle >>> 16) + (other >>> 16)) | 0;
}

/** The ten pairs of round keys of a seed, a BigInt or a whole number from 0 to 2^64 - 1. */
export function roundKeys(seed) {
  const wide = BigInt(seed), keys = new Int32Array(20);
  for (let i = 0; i < 10; i++) {
    keys[2 * i] = Number((wide + BigInt(i) * W0) & 0xffffffffn) | 0;
    keys[2 * i + 1] = Number(((wide >> 32n) + BigInt(i) * W1) & 0xffffffffn) | 0;
  }
  return keys;
}

/** Philox4x32-10: four counter words to four words, written into `words`. */
export function philox(c0, c1, c2, c3, keys, words) {
  for (let i = 0; i < 20; i += 2) {
    const h0 = high(M0, c0), l0 = Math.imul(M0, c0), h1 = high(M1, c2), l1 = Math.imul(M1, c2);
    c0 = h1 ^ c1 ^ keys[i];
    c1 = l1;
    c2 = h0 ^ c3 ^ keys[i + 1];
    c3 = l0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/** ln((float32(w) + 0.5) 2^-32) in float32. */
function logUniform(w) {
  asFloat[0] = round(round(w >>> 0) + 0.5) * UNIFORM_UNIT;
  const bits = asBits[0], exponent = (bits - SQRT_HALF_BITS) >> 23;
  asBits[0] = bits - (exponent << 23);
  const m = round(asFloat[0] - 1), square = round(m * m);
  let y = LOG[8];
  for (let i = 7; i >= 0; i--) y = round(round(y * m) + LOG[i]);
  y = round(round(y * m) * square);
  y = round(y + round(exponent * LN2_LOW));
  y = round(y - round(0.5 * square));
  return round(round(m + y) + round(exponent * LN2_HIGH));
}

/** Two words to two normals, z[at] and z[other]; indices at or beyond `end` are dropped. */
function boxMuller(w0, w1, z, at, other, end) {
  const radius = round(Math.sqrt(round(-2 * logUniform(w0))));
  const k = w1 >>> 8, quarter = (k + (1 << 21)) >> 22;
  const x = round((k - (quarter << 22)) * ANGLE_UNIT), s2 = round(x * x);
  let s = round(round(SIN[2] * s2) + SIN[1]), c = round(round(COS[2] * s2) + COS[1]);
  s = round(round(s * s2) + SIN[0]);
  c = round(round(c * s2) + COS[0]);
  s = round(round(round(s * s2) * x) + x);
  c = round(round(round(round(c * s2) * s2) - round(0.5 * s2)) + 1);
  let cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
  if ((quarter + 1) & 2) cosine = -cosine;
  if (quarter & 2) sine = -sine;
  if (at < end) z[at] = round(radius * cosine);
  if (other < end) z[other] = round(radius * sine);
}

/**
 * Fill rows of an array with standard normals: row i of `out`, of `width` values, has the noise of row `first + i`.
 *
 * A row has ceil(width / 4) blocks; block q gives the values q, q + Q, q + 2Q and q + 3Q. Rows are below 2^32 here.
 */
export function fillNormal(out, rows, width, { keys, stream, step = 0, first = 0 }) {
  const blocks = Math.ceil(width / 4), words = new Int32Array(4);
  for (let row = 0; row < rows; row++) {
    const begin = row * width, end = begin + width;
    for (let q = 0; q < blocks; q++) {
      philox(q, step | 0, (first + row) | 0, stream << 24, keys, words);
      boxMuller(words[0], words[1], out, begin + q, begin + q + blocks, end);
      boxMuller(words[2], words[3], out, begin + q + 2 * blocks, begin + q + 3 * blocks, end);
    }
  }
  return out;
}
