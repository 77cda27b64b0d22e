// Denoisers: exact ones of drawn curves, and perceptrons. All compute in float64, on flat rows of d values.
//
// A denoiser has `evaluate(x, n, t, out)`, its output v = signal E[noise | x] - noise E[x0 | x] (a perceptron's is what
// it has learned to predict) at states x (n, d), and a perceptron has `transposed`, its Jacobian's transpose,
// for conditioning.

import { eigen, solvePositive } from "./algebra.js";

/** The law of data that are given rows, row k with probability weights[k]: fd.denoisers.Empirical. */
export class Empirical {
  constructor(rows, d, schedule, weights = null) {
    this.rows = rows;
    this.d = d;
    this.schedule = schedule;
    this.count = rows.length / d;
    this.logs = new Float64Array(this.count);
    if (weights) weights.forEach((w, k) => (this.logs[k] = Math.log(Math.max(w, 1e-300))));
    this.squares = new Float64Array(this.count);
    for (let k = 0; k < this.count; k++) {
      for (let i = 0; i < d; i++) this.squares[k] += rows[k * d + i] ** 2;
    }
    this.shares = new Float64Array(this.count);
  }

  evaluate(x, n, t, out) {
    const { rows, d, count, logs, squares, shares } = this;
    const signal = this.schedule.signal[t], noise = this.schedule.noise[t];
    const slope = signal / noise ** 2, fall = slope * signal / 2;
    for (let i = 0; i < n; i++) {
      const at = i * d;
      let top = -Infinity;
      for (let k = 0, r = 0; k < count; k++) {
        let dot = 0;
        for (let j = 0; j < d; j++) dot += x[at + j] * rows[r++];
        const log = logs[k] + slope * dot - fall * squares[k];
        shares[k] = log;
        if (log > top) top = log;
      }
      let total = 0;
      for (let j = 0; j < d; j++) out[at + j] = 0;
      for (let k = 0; k < count; k++) {
        const log = shares[k] - top;
        if (log < -50) continue; // below one rounding of the sum
        const share = Math.exp(log), r = k * d;
        total += share;
        for (let j = 0; j < d; j++) out[at + j] += share * rows[r + j];
      }
      for (let j = 0; j < d; j++) {
        const x0 = out[at + j] / total;
        out[at + j] = (signal * (x[at + j] - signal * x0)) / noise - noise * x0;
      }
    }
  }

  /** The same rows, weighted by how well they fit what was seen with normal noise; NaN is what was not. */
  given(seen, deviation) {
    const { rows, d, count, logs } = this, found = Float64Array.from(logs);
    for (let k = 0; k < count; k++) {
      for (let j = 0; j < d; j++) {
        if (!Number.isNaN(seen[j])) found[k] -= (rows[k * d + j] - seen[j]) ** 2 / (2 * deviation ** 2);
      }
    }
    const top = found.reduce((a, b) => Math.max(a, b), -Infinity);
    const weights = found.map((log) => Math.exp(log - top));
    const total = weights.reduce((a, b) => a + b, 0);
    return new Empirical(rows, d, this.schedule, weights.map((w) => w / total));
  }
}

/** The law N(mean, cov): fd.denoisers.Gaussian. */
export class Gaussian {
  constructor(mean, cov, schedule) {
    const d = (this.d = mean.length);
    this.mean = mean;
    this.cov = cov;
    this.schedule = schedule;
    const { values, vectors } = eigen(cov, d);
    this.spectrum = values.map((value) => Math.max(value, 0));
    this.basis = vectors;
    this.along = new Float64Array(d);
  }

  /** Mean and covariance (over N) of rows, and `ridge` on the diagonal. */
  static fitted(rows, d, schedule, ridge) {
    const count = rows.length / d, mean = new Float64Array(d), cov = new Float64Array(d * d);
    for (let k = 0; k < rows.length; k++) mean[k % d] += rows[k] / count;
    for (let i = 0; i < d; i++) {
      for (let j = 0; j <= i; j++) {
        let sum = 0;
        for (let k = 0; k < rows.length; k += d) sum += (rows[k + i] - mean[i]) * (rows[k + j] - mean[j]);
        cov[i * d + j] = cov[j * d + i] = sum / count;
      }
      cov[i * d + i] += ridge;
    }
    return new Gaussian(mean, cov, schedule);
  }

  evaluate(x, n, t, out) {
    const { d, mean, basis, spectrum, along } = this;
    const signal = this.schedule.signal[t], noise = this.schedule.noise[t];
    for (let i = 0; i < n; i++) {
      const at = i * d;
      along.fill(0);
      for (let j = 0; j < d; j++) {
        const off = x[at + j] - signal * mean[j];
        for (let k = 0; k < d; k++) along[k] += off * basis[j * d + k];
      }
      for (let k = 0; k < d; k++) along[k] *= spectrum[k] / (signal ** 2 * spectrum[k] + noise ** 2);
      for (let j = 0; j < d; j++) {
        let x0 = 0;
        for (let k = 0; k < d; k++) x0 += basis[j * d + k] * along[k];
        x0 = mean[j] + signal * x0;
        out[at + j] = (signal * (x[at + j] - signal * x0)) / noise - noise * x0;
      }
    }
  }

  /** The law given what was seen with normal noise: a Gaussian again. */
  given(seen, deviation) {
    const { d, mean, cov } = this, places = [];
    seen.forEach((value, j) => Number.isNaN(value) || places.push(j));
    const m = places.length, of = new Float64Array(m * m), across = new Float64Array(m * (d + 1));
    places.forEach((a, i) => {
      places.forEach((b, j) => (of[i * m + j] = cov[a * d + b] + (i === j ? deviation ** 2 : 0)));
      for (let j = 0; j < d; j++) across[i * (d + 1) + j] = cov[a * d + j];
      across[i * (d + 1) + d] = seen[a] - mean[a];
    });
    const solved = solvePositive(of, m, Float64Array.from(across), d + 1);
    const moved = Float64Array.from(mean), left = Float64Array.from(cov);
    for (let j = 0; j < d; j++) {
      for (let i = 0; i < m; i++) moved[j] += cov[places[i] * d + j] * solved[i * (d + 1) + d];
      for (let k = 0; k <= j; k++) {
        let sum = 0;
        for (let i = 0; i < m; i++) sum += across[i * (d + 1) + j] * solved[i * (d + 1) + k];
        left[j * d + k] -= sum;
        left[k * d + j] = left[j * d + k];
      }
    }
    return new Gaussian(moved, left, this.schedule);
  }
}

const SIGMOID = (value) => 1 / (1 + Math.exp(-value));
const ACTIVATIONS = {
  none: [(v) => v, () => 1],
  leaky_relu: [(v) => (v > 0 ? v : 0.01 * v), (v) => (v > 0 ? 1 : 0.01)],
  silu: [
    (v) => v * SIGMOID(v),
    (v) => {
      const s = SIGMOID(v);
      return s * (1 + v * (1 - s));
    },
  ],
};

/** A perceptron with its Gaussian base, asked for a class or covariates, and guided: fd.MLP. */
export class Perceptron {
  /** `plan` and arrays as fastdiff.page writes them. */
  constructor({ plan, flat, linear, d, T }) {
    Object.assign(this, { plan, flat, linear, d, T });
    this.asked = null; // what every sample is asked for, (plan.asked,), or nothing
    this.guidance = 1;
    this.columns = new Map();
  }

  ask(asked, guidance = 1) {
    this.asked = asked;
    this.guidance = guidance;
    this.columns.clear();
  }

  evaluate(x, n, t, out) {
    this.forward(x, n, t, out, this.guidance === 0 ? null : this.asked);
    if (this.guided) {
      const without = new Float64Array(n * this.d);
      this.forward(x, n, t, without, null);
      for (let i = 0; i < out.length && i < without.length; i++) {
        out[i] = without[i] + this.guidance * (out[i] - without[i]);
      }
    }
  }

  get guided() {
    return this.asked !== null && this.guidance !== 0 && this.guidance !== 1;
  }

  /** J^T at states x (n, d), J being the Jacobian of the output: a function of k cotangents (k, n, d). */
  transposed(x, n, t) {
    const back = this.backward(x, n, t, this.guidance === 0 ? null : this.asked);
    if (!this.guided) return back;
    const without = this.backward(x, n, t, null);
    return (cotangent, k) => {
      const product = back(cotangent, k), other = without(cotangent, k);
      return product.map((value, i) => other[i] + this.guidance * (value - other[i]));
    };
  }

  /** The columns of gains and shifts of a timestep. */
  timeColumns(t, asked) {
    const key = asked === null ? ~t : t;
    if (!this.columns.has(key)) this.columns.set(key, this.tell(t, asked));
    return this.columns.get(key);
  }

  tell(t, asked) {
    const { plan, flat, T } = this, width = plan.time_width;
    const out = new Float64Array(width);
    if (!width) return out;
    if (plan.features) {
      const half = plan.features / 2;
      for (let j = 0; j < width; j++) out[j] = flat[plan.time_bias + j];
      for (let i = 0; i < plan.features; i++) {
        const angle = (1000 / T) * t * Math.exp((-Math.log(10000) * (i % half)) / half);
        const feature = Math.fround(i < half ? Math.cos(angle) : Math.sin(angle)), from = plan.time_weight + i * width;
        for (let j = 0; j < width; j++) out[j] += feature * flat[from + j];
      }
    } else {
      for (let j = 0; j < width; j++) out[j] = flat[plan.time_weight + t * width + j];
    }
    (asked || []).forEach((value, i) => {
      for (let j = 0; value && j < width; j++) out[j] += value * flat[plan.asked_weight + i * width + j];
    });
    return out;
  }

  forward(x, n, t, out, asked, saved = null) {
    const columns = this.timeColumns(t, asked);
    let h = x;
    for (const layer of this.plan.layers) {
      const { outputs, column, time } = layer, last = layer === this.plan.layers.at(-1);
      const v = last && !saved ? out : new Float64Array(n * outputs);
      times(h, n, this.flat, layer, v);
      const gain = time === "scale_shift" ? column : -1;
      const shift = time === "none" ? -1 : column + (gain < 0 ? 0 : outputs);
      if (shift >= 0) {
        for (let i = 0, at = 0; i < n; i++) {
          for (let j = 0; j < outputs; j++, at++) {
            v[at] = (gain < 0 ? v[at] : (1 + columns[gain + j]) * v[at]) + columns[shift + j];
          }
        }
      }
      if (saved) saved.push(v);
      if (layer.activation === "none") {
        h = v;
      } else {
        const act = ACTIVATIONS[layer.activation][0];
        h = saved ? v.map(act) : v;
        if (!saved) for (let i = 0; i < v.length; i++) h[i] = act(v[i]);
      }
    }
    if (!saved) this.addLinear(x, n, t, out);
  }

  backward(x, n, t, asked) {
    const saved = [], columns = this.timeColumns(t, asked), { layers } = this.plan;
    this.forward(x, n, t, null, asked, saved);
    const slopes = layers.map(({ activation, outputs, time, column }, l) => {
      const slope = ACTIVATIONS[activation][1];
      return saved[l].map((v, i) => slope(v) * (time === "scale_shift" ? 1 + columns[column + (i % outputs)] : 1));
    });
    return (cotangent, k) => {
      let d = cotangent;
      for (let l = layers.length - 1; l >= 0; l--) {
        const of = slopes[l], scaled = new Float64Array(k * of.length);
        for (let c = 0, at = 0; c < k; c++) for (let i = 0; i < of.length; i++, at++) scaled[at] = of[i] * d[at];
        d = timesTransposed(scaled, k * n, this.flat, layers[l]);
      }
      this.addLinear(cotangent, k * n, t, d);
      return d;
    };
  }

  /** Add the base: the best linear prediction B_t x, which is symmetric. */
  addLinear(x, n, t, out) {
    if (!this.linear) return;
    const { basis, gains, rest } = this.linear, d = this.d, r = basis.length / d, along = new Float64Array(r);
    for (let i = 0; i < n; i++) {
      const at = i * d;
      along.fill(0);
      for (let j = 0; j < d; j++) {
        const value = x[at + j];
        if (value) for (let k = 0; k < r; k++) along[k] += value * basis[j * r + k];
      }
      for (let k = 0; k < r; k++) along[k] *= gains[t * r + k];
      for (let j = 0; j < d; j++) {
        let sum = rest ? rest[t] * x[at + j] : 0;
        for (let k = 0; k < r; k++) sum += basis[j * r + k] * along[k];
        out[at + j] += sum;
      }
    }
  }
}

/** y = x W + b for rows x (n, inputs), four rows at a time: a weight is read once for all of them. */
function times(x, n, flat, { inputs, outputs, weight, bias }, y) {
  for (let i = 0, at = 0; i < n; i++) for (let j = 0; j < outputs; j++) y[at++] = flat[bias + j];
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    const y0 = i * outputs, y1 = y0 + outputs, y2 = y1 + outputs, y3 = y2 + outputs;
    for (let k = 0; k < inputs; k++) {
      const a = x[i * inputs + k], b = x[(i + 1) * inputs + k], c = x[(i + 2) * inputs + k], e = x[(i + 3) * inputs + k];
      const from = weight + k * outputs;
      for (let j = 0; j < outputs; j++) {
        const w = flat[from + j];
        y[y0 + j] += a * w;
        y[y1 + j] += b * w;
        y[y2 + j] += c * w;
        y[y3 + j] += e * w;
      }
    }
  }
  for (; i < n; i++) {
    for (let k = 0; k < inputs; k++) {
      const a = x[i * inputs + k], from = weight + k * outputs;
      for (let j = 0; j < outputs; j++) y[i * outputs + j] += a * flat[from + j];
    }
  }
}

/** d W^T for rows d (n, outputs): four rows and two inputs at a time, whose eight sums stay in registers. */
function timesTransposed(d, n, flat, { inputs, outputs, weight }) {
  const out = new Float64Array(n * inputs);
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    const d0 = i * outputs, d1 = d0 + outputs, d2 = d1 + outputs, d3 = d2 + outputs;
    const o0 = i * inputs, o1 = o0 + inputs, o2 = o1 + inputs, o3 = o2 + inputs;
    let k = 0;
    for (; k + 2 <= inputs; k += 2) {
      const one = weight + k * outputs, two = one + outputs;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let j = 0; j < outputs; j++) {
        const w = flat[one + j], v = flat[two + j], x0 = d[d0 + j], x1 = d[d1 + j], x2 = d[d2 + j], x3 = d[d3 + j];
        a0 += w * x0;
        a1 += w * x1;
        a2 += w * x2;
        a3 += w * x3;
        b0 += v * x0;
        b1 += v * x1;
        b2 += v * x2;
        b3 += v * x3;
      }
      out[o0 + k] = a0;
      out[o1 + k] = a1;
      out[o2 + k] = a2;
      out[o3 + k] = a3;
      out[o0 + k + 1] = b0;
      out[o1 + k + 1] = b1;
      out[o2 + k + 1] = b2;
      out[o3 + k + 1] = b3;
    }
    for (; k < inputs; k++) {
      const from = weight + k * outputs;
      for (let row = 0; row < 4; row++) {
        let sum = 0;
        for (let j = 0; j < outputs; j++) sum += flat[from + j] * d[(i + row) * outputs + j];
        out[(i + row) * inputs + k] = sum;
      }
    }
  }
  for (; i < n; i++) {
    for (let k = 0; k < inputs; k++) {
      let sum = 0;
      for (let j = 0; j < outputs; j++) sum += flat[weight + k * outputs + j] * d[i * outputs + j];
      out[i * inputs + k] = sum;
    }
  }
  return out;
}
