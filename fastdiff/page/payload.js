// What fastdiff.page writes into the page, unpacked.

import { Perceptron } from "./denoisers.js";

/** Little-endian numbers in base64. */
function numbers(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), size = Kind.BYTES_PER_ELEMENT;
  const read = size === 8 ? "getFloat64" : "getFloat32";
  return Kind.from({ length: bytes.length / size }, (_, i) => view[read](i * size, true));
}

/** The payload with its arrays as typed arrays, and `schedule` with the noise levels. */
export function unpacked(payload) {
  const { T, signal, noise, p, q, model } = payload;
  const families = payload.families.map((family) => ({ ...family, rows: numbers(family.rows, Float64Array) }));
  const found = { ...payload, families, d: payload.shape.reduce((a, b) => a * b), schedule: { T, signal, noise, p, q } };
  if (model) {
    const arrays = Object.fromEntries(Object.entries(model.arrays).map(([k, v]) => [k, numbers(v, Float32Array)]));
    found.model = { ...model, arrays, samples: numbers(model.samples, Float64Array) };
  }
  return found;
}

/** The model's network. */
export function perceptron({ model, d, T }) {
  const { flat, basis, gains, rest } = model.arrays;
  return new Perceptron({ plan: model.plan, flat, linear: basis ? { basis, gains, rest } : null, d, T });
}

/** What every sample is asked for: a class (or none), and covariates in their own units, with a 1 after them. */
export function asked({ model }, label, covariates) {
  if (!model.plan.asked) return null;
  const out = new Float64Array(model.plan.asked);
  if (model.classes && label !== null) out[label] = 1;
  if (!covariates) return out;
  const { mean, deviation } = model.covariates;
  covariates.forEach((value, i) => (out[model.plan.classes + i] = (value - mean[i]) / deviation[i]));
  out[out.length - 1] = 1;
  return out;
}
