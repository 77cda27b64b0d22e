// Draws that a model makes given a part of a curve, beside the page: workers have some of the draws each.
//
// A worker runs the modules that compute, and what it is asked for last. Where a page may have no workers, it computes
// the same chain itself.

import { Chain, Tmpd, replacing } from "./chain.js";
import { Perceptron } from "./denoisers.js";
import { STREAM, fillNormal, roundKeys } from "./noise.js";

const BLOCK = 16; // draws between two looks at what is asked for
const MOST = 4; // workers, each with a copy of the weights
const LEAST = 8; // draws of a worker

/** The chain of n draws, from the first on, of a network given what is seen. */
export function filler(network, { rows, schedule, seen, deviation, method, n, first = 0, seed }) {
  const tmpd = method === "tmpd", d = network.d;
  const denoiser = tmpd ? new Tmpd(network, schedule, seen, deviation) : network;
  const hook = tmpd ? null : replacing({ rows, schedule, seen, deviation, d, seed });
  return new Chain({ rows, denoiser, n, d, seed, first, hook });
}

/** In a worker: draw what is asked for, and tell of every row. */
export function serve() {
  let network = null, latest = 0;
  const { port1, port2 } = new MessageChannel();
  let go = null;
  port1.onmessage = () => go();
  const turn = () => new Promise((resolve) => {
    go = resolve;
    port2.postMessage(0);
  });
  onmessage = async ({ data }) => {
    if (data.network) {
      network = new Perceptron(data.network);
      return;
    }
    latest = data.id;
    if (!data.job) return;
    network.ask(data.asked, data.guidance);
    const chain = filler(network, data.job);
    while (!chain.done) {
      for (const _ of chain.row(BLOCK)) {
        await turn();
        if (latest !== data.id) return;
      }
      postMessage({ id: data.id, first: data.job.first, passed: chain.passed, x: Float64Array.from(chain.x) });
      await turn();
      if (latest !== data.id) return;
    }
  };
}

/** What workers draw together: like a `Chain` of all of it. */
class Shared {
  constructor({ rows, n, seed }, d) {
    Object.assign(this, { rows, n, d });
    this.x = fillNormal(new Float64Array(n * d), n, d, { keys: roundKeys(seed), stream: STREAM.INIT });
    this.parts = new Map(); // rows so far, by the first draw
  }

  get passed() {
    return Math.min(...this.parts.values());
  }

  get done() {
    return this.passed === this.rows.length;
  }

  get latest() {
    return this.x;
  }
}

/** Workers for a network. */
export class Crew {
  /** A crew, or null where there can be none; `failed` is called when one of them stops. */
  static of(source, network, failed) {
    try {
      const text = new Blob([source, "\nmodules.crew.serve();\n"], { type: "text/javascript" });
      return new Crew(URL.createObjectURL(text), network, failed);
    } catch {
      return null;
    }
  }

  constructor(url, network, failed) {
    const count = Math.max(1, Math.min(MOST, navigator.hardwareConcurrency || 1));
    this.workers = Array.from({ length: count }, () => new Worker(url));
    this.id = 0;
    const { plan, flat, linear, d, T } = network;
    for (const worker of this.workers) {
      worker.onerror = failed;
      worker.postMessage({ network: { plan, flat, linear, d, T } });
    }
  }

  /** Begin `job`, see `filler`, in the place of what was begun before; `done` is called with every row of a part. */
  start(network, job, done) {
    const id = ++this.id, { asked, guidance, d } = network, shared = new Shared(job, d);
    const share = Math.max(LEAST, Math.ceil(job.n / this.workers.length));
    this.workers.forEach((worker, k) => {
      const first = k * share, n = Math.min(share, job.n - first);
      if (n <= 0) return worker.postMessage({ id });
      shared.parts.set(first, 0);
      worker.onmessage = ({ data }) => {
        if (data.id !== this.id) return;
        shared.x.set(data.x, data.first * d);
        shared.parts.set(data.first, data.passed);
        done();
      };
      worker.postMessage({ id, asked, guidance, job: { ...job, first, n } });
    });
    return shared;
  }

  /** Draw no more of what was begun. */
  stop() {
    this.id++;
    for (const worker of this.workers) worker.postMessage({ id: this.id });
  }

  /** End all workers. */
  end() {
    for (const worker of this.workers) worker.terminate();
  }
}
