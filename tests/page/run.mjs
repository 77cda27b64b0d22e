// Runs the modules of the page for the tests in Python: a job as JSON on stdin, numbers as JSON on stdout.
import { readFileSync } from "node:fs";

const room = new URL("../../fastdiff/page/", import.meta.url);
const [law, exact, unpack, chains, algebra] = await Promise.all(
  ["noise", "denoisers", "payload", "chain", "algebra"].map((name) => import(new URL(`${name}.js`, room))),
);

const jobs = {
  words: ({ seed, counter }) => {
    const words = new Int32Array(4);
    law.philox(...counter, law.roundKeys(BigInt(seed)), words);
    return Array.from(words, (word) => word >>> 0);
  },
  /** Bits of normals, in base64. */
  normals: ({ rows, width, seed, stream, step, first }) => {
    const z = new Float32Array(rows * width);
    law.fillNormal(z, rows, width, { keys: law.roundKeys(BigInt(seed)), stream, step, first });
    return Buffer.from(z.buffer).toString("base64");
  },
  eigen: ({ matrix, n }) => {
    const { values, vectors } = algebra.eigen(matrix, n);
    return [values, vectors, algebra.eigen(matrix, n, false).values].map((array) => Array.from(array));
  },
  chain: ({ payload, denoiser, sampler, steps, from = 0, n, seed, initial, seen, deviation, method, label, guidance }) => {
    const page = unpack.unpacked(payload), { schedule, d } = page;
    const rows = page.samplers[sampler].tables[steps].slice(from);
    const known = seen && seen.map((value) => (value === null ? NaN : value));
    let law = null, hook = null;
    if (denoiser.kind === "perceptron") {
      law = unpack.perceptron(page);
      law.ask(unpack.asked(page, label ?? null, denoiser.covariates), guidance ?? 1);
      if (known && method === "tmpd") law = new chains.Tmpd(law, schedule, known, deviation);
      else if (known) hook = chains.replacing({ rows, schedule, seen: known, deviation, d, seed: BigInt(seed) });
    } else {
      const data = Float64Array.from(denoiser.rows.flat());
      law = denoiser.kind === "empirical" ? new exact.Empirical(data, d, schedule) : exact.Gaussian.fitted(data, d, schedule, 1e-4);
      if (known) law = law.given(known, deviation);
    }
    const chain = new chains.Chain({ rows, denoiser: law, n, d, seed: BigInt(seed), initial, hook });
    return Array.from(chain.run());
  },
};

const { job, ...given } = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(jobs[job](given)));
