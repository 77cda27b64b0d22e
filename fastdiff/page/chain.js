// A sampler is a table, and this runs one: row by row
//
//     m = p x + q out;   x' = a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s z
//
// with the terms added in this order and a term with a zero coefficient left out. The tables are the library's.

import { damped } from "./algebra.js";
import { STREAM, fillNormal, roundKeys } from "./noise.js";

/** Columns of a row. */
export const COLUMNS = ["t", "p", "q", "a", "b", "c1", "c2", "c3", "e", "s", "r", "visit"];
const [T, P, Q, A, B, C1, , , E, S, , VISIT] = COLUMNS.keys();
const VISITS = 2 ** 20, KRYLOV = 16, KRYLOV_LEAST = 1e-6, LEAST = 1e-4, REACH = 4, TINY = 1e-300;

export const evaluates = (row) => row[Q] !== 0 || row[E] !== 0;
export const depth = (rows) => Math.max(...rows.map((row) => (row[7] ? 3 : row[6] ? 2 : row[C1] ? 1 : 0)));

/** Whether a chain may start in the middle of a table, from a state of its own: no row looks back at others. */
export const startsAnywhere = (rows) => depth(rows) === 0 && rows.every((row, i) => !i || row[T] < rows[i - 1][T]);

/**
 * n samples on their way through a table.
 *
 * `x` (n, d) is the state, `path` holds the states before and after all rows so far. `initial` (n, d) starts from
 * something else than noise. `hook(row number, x, first, count)` may change states after a row. `first` is the index of
 * the first sample: the noise of sample k of a seed is the same wherever it is drawn.
 */
export class Chain {
  constructor({ rows, denoiser, n, d, seed, first = 0, initial = null, hook = null }) {
    Object.assign(this, { rows, denoiser, n, d, first, hook });
    this.keys = roundKeys(seed);
    this.x = initial ? Float64Array.from(initial) : new Float64Array(n * d);
    if (!initial) fillNormal(this.x, n, d, { keys: this.keys, stream: STREAM.INIT, first });
    this.memory = Array.from({ length: depth(rows) }, () => new Float64Array(n * d));
    this.path = [Float32Array.from(this.x)];
    this.out = new Float64Array(n * d);
    this.z = new Float64Array(n * d);
    this.visits = 0;
  }

  /** Rows so far. */
  get passed() {
    return this.path.length - 1;
  }

  get done() {
    return this.passed === this.rows.length;
  }

  /** The states after these. */
  get latest() {
    return this.path.at(-1);
  }

  /** Work on one row, `block` samples at a time; yields between two blocks, and returns after the row. */
  *row(block = 8) {
    const { n, d, path } = this, i = path.length - 1, row = this.rows[i];
    for (let first = 0; first < n; first += block) {
      const count = Math.min(block, n - first), from = first * d, to = from + count * d;
      const view = (array) => array.subarray(from, to);
      this.take(row, view(this.x), view(this.out), this.memory.map(view), view(this.z), this.first + first, count);
      if (this.hook) this.hook(i, view(this.x), this.first + first, count);
      if (to < n * d) yield;
    }
    path.push(Float32Array.from(this.x));
  }

  /** All rows at once. */
  run() {
    while (!this.done) for (const _ of this.row(this.n));
    return this.x;
  }

  take(row, x, out, memory, z, first, count) {
    const t = row[T], asks = evaluates(row), keeps = memory.length > 0 && asks;
    if (asks) this.denoiser.evaluate(x, count, t, out, first);
    if (row[S]) {
      fillNormal(z, count, this.d, { keys: this.keys, stream: STREAM.STEP, step: t + VISITS * row[VISIT], first });
    }
    for (let i = 0; i < x.length; i++) {
      let m = 0, value = 0;
      if (row[B] || keeps) m = (row[P] ? row[P] * x[i] : 0) + (row[Q] ? row[Q] * out[i] : 0);
      if (row[A]) value += row[A] * x[i];
      if (row[B]) value += row[B] * m;
      for (let k = 0; k < memory.length; k++) if (row[C1 + k]) value += row[C1 + k] * memory[k][i];
      if (row[E]) value += row[E] * out[i];
      if (row[S]) value += row[S] * z[i];
      x[i] = value;
      if (keeps) {
        for (let k = memory.length - 1; k > 0; k--) memory[k][i] = memory[k - 1][i];
        memory[0][i] = m;
      }
    }
  }
}

/** Overwrites known values after each row by what they are at its level of noise: method="replace". */
export function replacing({ rows, schedule, seen, deviation, d, seed }) {
  const keys = roundKeys(seed), visits = new Map(), z = new Float64Array(d);
  const steps = rows.map((row) => {
    const visit = visits.get(row[T]) || 0;
    visits.set(row[T], visit + 1);
    return row[T] + VISITS * visit;
  });
  return (i, x, first, count) => {
    const next = rows[i + 1], signal = next ? schedule.signal[next[T]] : 1;
    const scale = next ? schedule.noise[next[T]] : signal * deviation;
    for (let k = 0; k < count; k++) {
      fillNormal(z, 1, d, { keys, stream: STREAM.KNOWN, step: steps[i], first: first + k });
      for (let j = 0; j < d; j++) if (!Number.isNaN(seen[j])) x[k * d + j] = signal * seen[j] + scale * z[j];
    }
  };
}

/**
 * A perceptron whose mean of x0 is moved towards what was seen: method="tmpd" (Boys et al. 2023), by the formulas of
 * fastdiff/conditioning.py.
 */
export class Tmpd {
  constructor(inner, schedule, seen, deviation) {
    Object.assign(this, { inner, schedule, seen, d: inner.d, variance: deviation ** 2 });
    this.places = [];
    seen.forEach((value, j) => Number.isNaN(value) || this.places.push(j));
    const largest = this.places.reduce((most, j) => Math.max(most, Math.abs(seen[j])), 1);
    this.reach = REACH * Math.sqrt(this.d) * largest; // a network's mean of x0 is moved no farther than it can be off
  }

  evaluate(x, n, t, out) {
    const { inner, schedule, places, seen, d } = this, m = places.length;
    inner.evaluate(x, n, t, out);
    const signal = schedule.signal[t], noise = schedule.noise[t], p = schedule.p[t], q = schedule.q[t];
    const gain = signal > 0 ? noise ** 2 / signal : 0;
    if (!gain || !q || !m) return;
    const power = noise ** 2 / (signal ** 2 + noise ** 2), least = Math.max(LEAST * power, TINY);
    const rest = new Float64Array(n * m);
    for (let i = 0; i < n; i++) {
      places.forEach((j, r) => (rest[i * m + r] = seen[j] - (p * x[i * d + j] + q * out[i * d + j])));
    }
    const slope = m <= KRYLOV ? this.direct(x, n, t, rest, gain, least) : this.krylov(x, n, t, rest, gain, least);
    const farthest = Math.sqrt(power) * this.reach;
    for (let i = 0; i < n; i++) {
      let size = 0;
      for (let j = 0; j < d; j++) size += slope[i * d + j] ** 2;
      const step = (gain / q) * Math.min(farthest / Math.max(gain * Math.sqrt(size), TINY), 1);
      for (let j = 0; j < d; j++) out[i * d + j] += step * slope[i * d + j];
    }
  }

  /** J^T at states x, J being the Jacobian of the mean of x0: a function of k cotangents. */
  transposed(x, n, t) {
    const p = this.schedule.p[t], q = this.schedule.q[t], product = this.inner.transposed(x, n, t);
    return (cotangent, k) => product(cotangent, k).map((value, i) => p * cotangent[i] + q * value);
  }

  direct(x, n, t, rest, gain, least) {
    const { places, d, variance } = this, m = places.length, A = new Float64Array(m * n * d);
    places.forEach((place, r) => {
      for (let i = 0; i < n; i++) A[(r * n + i) * d + place] = 1;
    });
    const back = this.transposed(x, n, t)(A, m), slope = new Float64Array(n * d), M = new Float64Array(m * m);
    for (let i = 0; i < n; i++) {
      for (let a = 0; a < m; a++) {
        for (let b = 0; b < m; b++) {
          M[a * m + b] = gain * back[(b * n + i) * d + places[a]] + (a === b ? variance : 0);
        }
      }
      const w = damped(M, rest.subarray(i * m, (i + 1) * m), m, m, least);
      for (let r = 0; r < m; r++) for (let j = 0; j < d; j++) slope[i * d + j] += w[r] * back[(r * n + i) * d + j];
    }
    return slope;
  }

  /** GMRES, KRYLOV products a sample. */
  krylov(x, n, t, rest, gain, least) {
    const { places, d, variance } = this, m = places.length, K = Math.min(KRYLOV, m);
    const product = this.transposed(x, n, t);
    const basis = Array.from({ length: K + 1 }, () => new Float64Array(n * m)), backs = [];
    const H = new Float64Array(n * (K + 1) * K), sizes = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      sizes[i] = norm(rest, i * m, m);
      for (let r = 0; r < m; r++) basis[0][i * m + r] = rest[i * m + r] / Math.max(sizes[i], TINY);
    }
    for (let k = 0; k < K; k++) {
      const spread = new Float64Array(n * d);
      for (let i = 0; i < n; i++) places.forEach((j, r) => (spread[i * d + j] = basis[k][i * m + r]));
      const back = product(spread, 1), image = new Float64Array(n * m);
      backs.push(back);
      for (let i = 0; i < n; i++) {
        places.forEach((j, r) => (image[i * m + r] = gain * back[i * d + j] + variance * basis[k][i * m + r]));
        const whole = norm(image, i * m, m), h = i * (K + 1) * K;
        for (let pass = 0; pass < 2; pass++) {
          const parts = [];
          for (let b = 0; b <= k; b++) {
            let dot = 0;
            for (let r = i * m; r < (i + 1) * m; r++) dot += basis[b][r] * image[r];
            parts.push(dot);
          }
          parts.forEach((part, b) => {
            for (let r = i * m; r < (i + 1) * m; r++) image[r] -= part * basis[b][r];
            H[h + b * K + k] += part;
          });
        }
        const left = (H[h + (k + 1) * K + k] = norm(image, i * m, m));
        const factor = left > KRYLOV_LEAST * whole ? 1 / Math.max(left, TINY) : 0;
        for (let r = i * m; r < (i + 1) * m; r++) basis[k + 1][r] = factor * image[r];
      }
    }
    const slope = new Float64Array(n * d), first = new Float64Array(K + 1);
    for (let i = 0; i < n; i++) {
      first[0] = sizes[i];
      const w = damped(H.subarray(i * (K + 1) * K, (i + 1) * (K + 1) * K), first, K + 1, K, least);
      backs.forEach((back, k) => {
        for (let j = 0; j < d; j++) slope[i * d + j] += w[k] * back[i * d + j];
      });
    }
    return slope;
  }
}

function norm(array, from, length) {
  let sum = 0;
  for (let i = from; i < from + length; i++) sum += array[i] ** 2;
  return Math.sqrt(sum);
}
