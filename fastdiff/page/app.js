// The page: what is chosen, what is computed of it, and what is shown.

import { eigen } from "./algebra.js";
import { Chain, Tmpd, evaluates, startsAnywhere } from "./chain.js";
import { Crew, filler } from "./crew.js";
import { Empirical, Gaussian } from "./denoisers.js";
import { Graph, cleared, colour, heatMap, histogram, mixed, recolour, short, spectrum } from "./draw.js";
import { STREAM, fillNormal, roundKeys } from "./noise.js";
import { asked, perceptron, unpacked } from "./payload.js";
import { backCode, fillCode, forwardCode } from "./python.js";

const $ = (id) => document.getElementById(id);
const MANY = 512; // noised curves at least, of which moments are taken
const PLACES = 64; // most rows of a matrix that is shown
const RIDGE = 1e-4; // on the diagonal of a fitted covariance
const SECONDS = 4; // that a way through all timesteps or rows lasts
const LIMIT = 3.5; // of values in the histogram
const MOST = 2 ** 18; // values of those
const STORED = 2 ** 23; // most values of states that a chain keeps to be shown again

const page = unpacked(JSON.parse($("payload").textContent));
const { d, schedule, model } = page;
const channels = page.shape.length > 1 ? page.shape[1] : 1, points = d / channels;
const network = model && perceptron(page);
const BUDGET = network ? 10 : 4; // milliseconds of a frame that are computed in; the rest is drawing
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

const state = {
  family: null, // of the page's own, while nothing is drawn
  own: [], // curves that were drawn, in the data's units
  rows: new Float64Array(0), // all curves (N, d), as the denoiser sees them
  kind: model ? "perceptron" : "gaussian",
  selected: 0,
  channel: 0,
  t: 0,
  seed: model ? model.seed : "0",
  sampler: page.auto[0],
  steps: page.auto[1],
  start: null, // timestep, or null: from noise
  startRow: 0,
  n: 100,
  ways: 100,
  erased: [Math.round(points * 0.36), Math.round(points * 0.66)],
  error: 0.05,
  method: "tmpd",
  label: model?.classes ? 0 : null,
  covariates: model?.covariates ? [...model.covariates.mean] : null,
  guidance: 1,
  copies: 1,
};

// ---------------------------------------------------------------------------------------- units

const factor = model ? model.factor : new Array(d).fill(1), offset = model ? model.offset : new Array(d).fill(0);
const toData = (value, j) => factor[j] * value + offset[j];
const toInner = (value, j) => (factor[j] ? (value - offset[j]) / factor[j] : 0);
/** Whole hundredths of the unit of a value, so that it can be written down. */
const rounded = (value, j) => {
  const step = 10 ** Math.floor(Math.log10(0.0144 * (factor[j] || 1)));
  return +(Math.round(value / step) * step).toPrecision(9);
};
const at = (i) => i * channels + state.channel; // value of point i of the channel that is shown

function range() {
  const j = at(0);
  if (!model) return { points, low: -3.6, high: 3.6 };
  let low = toData(-3, j), high = toData(3, j);
  for (let k = 0; k < model.samples.length; k += d) {
    for (let i = 0; i < points; i++) {
      low = Math.min(low, model.samples[k + at(i)]);
      high = Math.max(high, model.samples[k + at(i)]);
    }
  }
  const margin = 0.06 * (high - low);
  return { points, low: low - margin, high: high + margin };
}

const count = () => state.rows.length / d;
const curve = (k) => (i) => toData(state.rows[k * d + at(i)], at(i));

// ---------------------------------------------------------------------------------------- frames

const jobs = new Map(); // generators by name: each works until it has yielded enough
const dirty = new Set(); // pictures that are to be drawn
const players = new Map(); // what moves by itself, by name
const frames = []; // milliseconds of script of each of the last ones

function frame(now) {
  const begin = performance.now();
  for (const play of players.values()) play(now);
  for (const [name, job] of jobs) {
    while (performance.now() - begin < BUDGET) {
      if (job.next().done) {
        jobs.delete(name);
        break;
      }
    }
  }
  for (const paint of [...dirty]) {
    dirty.delete(paint);
    paint();
  }
  frames.push(performance.now() - begin);
  if (frames.length > 600) frames.shift();
  waiting = false;
  if (jobs.size || players.size || dirty.size) wake();
}

let waiting = false;
function wake() {
  if (!waiting) requestAnimationFrame(frame);
  waiting = true;
}

function repaint(...paints) {
  for (const paint of paints) dirty.add(paint);
  wake();
}

// ---------------------------------------------------------------------------------------- 1: curves

let keyed = null; // the curve that keys bend, and where
let stroke = null; // the one that the pointer draws

function settle() {
  const fixed = model ? model.samples : state.family ? state.family.rows : new Float64Array(0);
  const all = [...fixed, ...state.own.flatMap((values) => Array.from(values))];
  state.rows = Float64Array.from(all, (value, i) => toInner(value, i % d));
  if (!count()) return;
  state.selected = Math.min(state.selected, count() - 1);
  state.copies = Math.max(1, Math.ceil(Math.min(MANY, MOST / d) / count()));
  noiseOf = momentOf = null;
  for (const chip of $("families").children) chip.setAttribute("aria-pressed", String(chip.textContent === state.family?.title));
  $("remove").disabled = $("vary").disabled = !state.own.length;
  const own = state.own.length, what = model ? `${model.samples.length / d} samples of the model` : state.family?.title;
  $("pad-caption").textContent = [what && `${what}${model ? "" : `: ${count() - own} curves`}`, own && `${own} of your own`]
    .filter(Boolean).join(", ") + `, ${points} points each. Curve ${state.selected + 1} is highlighted.`;
  law();
  repaint(paintStrip, paintPad, paintForward);
}

/** The denoiser of the curves, and all that depends on it. */
function law() {
  state.law = network || (state.kind === "gaussian" ? Gaussian.fitted(state.rows, d, schedule, RIDGE) : new Empirical(state.rows, d, schedule));
  network?.ask(asked(page, state.label, state.covariates), state.guidance);
  restart();
  refill();
}

function add(values) {
  if (state.family) state.own = [];
  state.family = null;
  state.own.push(values.map(rounded));
  state.selected = (model ? model.samples.length / d : 0) + state.own.length - 1;
  settle();
}

/** The curve at a few timesteps, side by side. */
function paintStrip() {
  if (!count()) return;
  const { context, width, height } = cleared($("strip")), parts = width > 700 ? 9 : 5, gap = 14;
  const wide = (width - gap * (parts - 1)) / parts, { low, high } = range(), z = noises(), k = state.selected;
  for (let part = 0; part < parts; part++) {
    const t = part && Math.round((part / (parts - 1)) * schedule.T) - 1;
    const signal = part ? schedule.signal[t] : 1, noise = part ? schedule.noise[t] : 0;
    context.strokeStyle = mixed("data", "noise", part / (parts - 1));
    context.lineWidth = 2;
    context.beginPath();
    for (let i = 0; i < points; i++) {
      const value = toData(signal * state.rows[k * d + at(i)] + noise * z[k * d + at(i)], at(i));
      const y = ((high - value) / (high - low)) * height;
      context.lineTo(part * (wide + gap) + (i / (points - 1)) * wide, Math.max(1, Math.min(height - 1, y)));
    }
    context.stroke();
  }
}

function paintPad() {
  const graph = new Graph($("pad"), range()), n = count();
  const alpha = Math.max(0.1, Math.min(0.6, 6 / n));
  for (let k = 0; k < n; k++) graph.line(curve(k), { stroke: colour("data"), width: 1.25, alpha });
  if (stroke) graph.line((i) => stroke[at(i)], { stroke: colour("ink"), width: 3 });
  else if (keyed) {
    graph.line((i) => keyed.values[at(i)], { stroke: colour("ink"), width: 3 });
    graph.context.fillStyle = colour("warm");
    graph.context.beginPath();
    graph.context.arc(graph.x(keyed.i), graph.y(keyed.values[at(keyed.i)]), 6, 0, 7);
    graph.context.fill();
  } else if (n) graph.line(curve(state.selected), { stroke: colour("data"), width: 3 });
}

const selectedInData = () => Array.from({ length: d }, (_, j) => toData(state.rows[state.selected * d + j], j));

function onPad(canvas) {
  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect(), graph = new Graph(canvas, range());
    const part = (event.clientX - box.left - graph.left) / (box.width - graph.left - graph.right);
    const height = (event.clientY - box.top - graph.top) / (box.height - graph.top - graph.bottom);
    const { low, high } = range();
    return [Math.max(0, Math.min(1, part)) * (points - 1), Math.max(low, Math.min(high, high - height * (high - low)))];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    keyed = null;
    last = place(event);
    stroke = count() ? selectedInData() : new Array(d).fill(0);
    stroke = stroke.map((value, j) => (j % channels === state.channel ? NaN : value));
    stroke[at(Math.round(last[0]))] = last[1];
    repaint(paintPad);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!stroke) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      const [x, y] = place(each), [x0, y0] = last;
      for (let i = Math.ceil(Math.min(x, x0)); i <= Math.max(x, x0); i++) {
        stroke[at(i)] = x === x0 ? y : y0 + ((i - x0) / (x - x0)) * (y - y0);
      }
      last = [x, y];
    }
    repaint(paintPad);
  });
  const end = () => {
    if (!stroke) return;
    const drawn = Array.from({ length: points }, (_, i) => i).filter((i) => !Number.isNaN(stroke[at(i)]));
    for (let i = 0; i < points; i++) {
      if (Number.isNaN(stroke[at(i)])) stroke[at(i)] = stroke[at(i < drawn[0] ? drawn[0] : drawn.findLast((j) => j < i))];
    }
    const done = stroke;
    stroke = null;
    if (drawn.length > 1) add(done);
    else repaint(paintPad); // a tap is no curve
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("keydown", (event) => {
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key], upwards = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (event.key === "PageUp" || event.key === "PageDown") {
      state.selected = (state.selected + (event.key === "PageUp" ? 1 : count() - 1)) % count();
      keyed = null;
      settle();
    } else if (event.key === "Enter" && keyed) {
      const { values } = keyed;
      keyed = null;
      add(values);
    } else if (event.key === "Escape" && keyed) {
      keyed = null;
    } else if (sideways || upwards) {
      keyed ??= { values: selectedInData(), i: points >> 1 };
      keyed.i = Math.max(0, Math.min(points - 1, keyed.i + (sideways || 0)));
      const { low, high } = range(), width = points / 14;
      for (let i = 0; upwards && i < points; i++) {
        const more = upwards * 0.03 * (high - low) * Math.exp(-(((i - keyed.i) / width) ** 2) / 2);
        keyed.values[at(i)] = Math.max(low, Math.min(high, keyed.values[at(i)] + more));
      }
      say(`point ${keyed.i + 1}: ${keyed.values[at(keyed.i)].toFixed(2)}`);
    } else return;
    event.preventDefault();
    repaint(paintPad);
  });
}

/** Eleven relatives of the last curve: moved sideways, taller or flatter. */
function vary() {
  const values = state.own.at(-1), moves = new Float64Array(22);
  fillNormal(moves, 11, 2, { keys: roundKeys(BigInt(state.seed)), stream: STREAM.FORWARD, step: state.own.length });
  for (let k = 0; k < 11; k++) {
    const shift = Math.round((points / 24) * moves[2 * k]), scale = 1 + 0.15 * moves[2 * k + 1];
    state.own.push(values.map((_, j) => {
      const i = Math.max(0, Math.min(points - 1, Math.floor(j / channels) - shift)), c = j % channels;
      return rounded(toData(scale * toInner(values[i * channels + c], j), j), j);
    }));
  }
  settle();
}

// ---------------------------------------------------------------------------------------- 2: forward

let noiseOf = null; // noise of many curves
let momentOf = null; // S_0 at the places that are shown, and its spectrum
const places = Array.from({ length: Math.min(d, PLACES) }, (_, i) => Math.floor((i * d) / Math.min(d, PLACES)));

function noises() {
  if (noiseOf === null) {
    const many = count() * state.copies;
    noiseOf = fillNormal(new Float64Array(many * d), many, d, { keys: roundKeys(BigInt(state.seed)), stream: STREAM.FORWARD });
  }
  return noiseOf;
}

function secondMoment(rows, total) {
  const n = places.length, S = new Float64Array(n * n);
  for (let k = 0; k < total; k++) {
    for (let i = 0; i < n; i++) {
      const value = rows[k * d + places[i]];
      for (let j = 0; j <= i; j++) S[i * n + j] += value * rows[k * d + places[j]];
    }
  }
  for (let i = 0; i < n; i++) for (let j = 0; j <= i; j++) S[j * n + i] = S[i * n + j] /= total;
  return S;
}

/** All numbers of the second part at the timestep that is chosen. */
function dissolved() {
  const { t, selected, rows } = state, signal = schedule.signal[t], noise = schedule.noise[t];
  const z = noises(), n = places.length, many = z.length / d, x = new Float64Array(many * d);
  for (let i = 0; i < x.length; i++) x[i] = signal * rows[i % rows.length] + noise * z[i];
  momentOf ??= { S: secondMoment(rows, count()) };
  momentOf.values ??= eigen(momentOf.S, n, false).values;
  const measured = secondMoment(x, many), closed = momentOf.S.map((value, i) => signal ** 2 * value + (i % (n + 1) ? 0 : noise ** 2));
  let off = 0;
  for (let i = 0; i < n * n; i++) off = Math.max(off, Math.abs(measured[i] - closed[i]));
  const shown = Array.from(places, (j) => x[selected * d + j]), similarity = new Float64Array(n * n);
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) similarity[i * n + j] = Math.exp(-((shown[i] - shown[j]) ** 2));
  const counts = new Float64Array(56);
  let mean = 0, square = 0;
  for (const value of x) {
    const bin = Math.floor(((value / LIMIT + 1) / 2) * counts.length);
    if (bin >= 0 && bin < counts.length) counts[bin]++;
    mean += value;
    square += value * value;
  }
  mean /= x.length;
  return {
    signal, noise, x, many, measured, closed, off, similarity, counts, mean,
    deviation: Math.sqrt(Math.max(0, square / x.length - mean * mean)),
    spectra: {
      similarity: eigen(similarity, n, false).values,
      measured: eigen(measured, n, false).values,
      closed: momentOf.values.map((value) => signal ** 2 * Math.max(value, 0) + noise ** 2),
    },
  };
}

let seenNow = null;
function paintForward() {
  if (!count()) return;
  const now = (seenNow = dissolved()), { t, selected } = state, n = places.length;
  $("t").value = t + 1;
  $("t-shown").textContent = `t = ${t} of ${schedule.T - 1}`;
  const graph = new Graph($("curve"), range());
  graph.line(curve(selected), { stroke: colour("noise"), width: 1.5, alpha: 0.8, dash: [4, 4] });
  graph.line((i) => toData(now.x[selected * d + at(i)], at(i)), { stroke: colour("data"), width: 2.5 });
  const normal = (v) => Math.exp((-v * v) / 2) / Math.sqrt(2 * Math.PI);
  histogram($("histogram"), now.counts, LIMIT, now.x.length, [{ density: normal, stroke: colour("warm") }]);
  paintMatrices($("similarity"), [[now.similarity, 1, ""]], [{ values: now.spectra.similarity, stroke: colour("data") }], n);
  const most = Math.max(1, ...places.map((_, i) => now.closed[i * (n + 1)]));
  paintMatrices($("moment"), [[now.measured, most, "measured"], [now.closed, most, "closed form"]],
    [{ values: now.spectra.closed, stroke: colour("warm") }, { values: now.spectra.measured, stroke: colour("data"), dots: true }], n);
  const a = now.signal.toFixed(3), b = now.noise.toFixed(3), a2 = (now.signal ** 2).toFixed(3), b2 = (now.noise ** 2).toFixed(3);
  formula("jump", "<var>x<sub>t</sub></var> = √ᾱ<sub><var>t</var></sub> <var>x</var><sub>0</sub> + √(1 − ᾱ<sub><var>t</var></sub>) <var>z</var>",
    `<var>x</var><sub>${t}</sub> = ${a} <var>x</var><sub>0</sub> + ${b} <var>z</var>`);
  $("moments").textContent = `Mean ${short(+now.mean.toFixed(3))}, deviation ${now.deviation.toFixed(3)}`;
  formula("kernel", "<var>C<sub>ij</sub></var> = exp(−(<var>v<sub>i</sub></var> − <var>v<sub>j</sub></var>)²)",
    `effective rank ${rank(now.spectra.similarity).toFixed(1)} of ${n}`);
  formula("propagated", "<var>S<sub>t</sub></var> = ᾱ<sub><var>t</var></sub> <var>S</var><sub>0</sub> + (1 − ᾱ<sub><var>t</var></sub>) <var>I</var>",
    `<var>S</var><sub>${t}</sub> = ${a2} <var>S</var><sub>0</sub> + ${b2} <var>I</var>`,
    `Dots: the spectrum measured on ${now.many} noised curves; line: closed form. Entries differ by ${now.off.toFixed(2)} at most.`);
  writeCode("forward-code");
}

function paintMatrices(canvas, maps, series, n) {
  const { context, width, height } = cleared(canvas), beside = width > 430 || maps.length === 1;
  const size = Math.min(height - (maps.length === 1 ? 2 : 22), maps.length === 1 ? 0.6 * (width - 60) : beside ? 0.34 * (width - 60) : (width - 12) / 2), gap = 12;
  maps.forEach(([matrix, most, name], i) => {
    heatMap(context, matrix, n, most, i * (size + gap), 0, size);
    context.fillStyle = colour("soft");
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    context.fillText(name, i * (size + gap), size + 16);
  });
  const left = beside ? maps.length * (size + gap) + 34 : 34, top = beside ? 6 : size + 28;
  const box = { x: left, y: top, width: width - left - 6, height: (beside ? size : height - 4) - top - 4, low: maps.length === 1 ? 1e-6 : 1e-3, high: 1e2 };
  if (box.height < 30) return;
  spectrum(context, series, box);
}

const rank = (values) => {
  const total = values.reduce((sum, value) => sum + Math.max(value, 0), 0);
  return Math.exp(-values.reduce((sum, v) => (v > 0 ? sum + (v / total) * Math.log(v / total) : sum), 0));
};

function formula(id, general, now, small = "") {
  $(id).innerHTML = `${general}<span class="now">${now}</span>${small && `<small>${small}</small>`}`;
}

// ---------------------------------------------------------------------------------------- 3: back

let chain = null, rowShown = 0, stride = 1;

const table = () => page.samplers[state.sampler].tables[state.steps];

/** A new chain for what is chosen; its rows are computed while they play. */
function restart(play = true) {
  const rows = table(), free = startsAnywhere(rows);
  if (!free) state.start = null;
  const first = rows.findIndex((row) => row[0] <= state.start);
  state.startRow = state.start === null ? 0 : first < 0 ? rows.length - 1 : first;
  if (state.start !== null) state.start = rows[state.startRow][0];
  const n = state.n, keys = roundKeys(BigInt(state.seed));
  let initial = null;
  if (state.start !== null) {
    initial = fillNormal(new Float64Array(n * d), n, d, { keys, stream: STREAM.FORWARD });
    const signal = schedule.signal[state.start], noise = schedule.noise[state.start];
    initial = initial.map((z, i) => signal * state.rows[state.selected * d + (i % d)] + noise * z);
  }
  chain = new Chain({ rows: rows.slice(state.startRow), denoiser: state.law, n, d, seed: BigInt(state.seed), initial });
  stride = Math.max(1, Math.ceil((chain.rows.length * n * d) / STORED));
  jobs.set("chain", computing(chain));
  rowShown = 0;
  $("row").max = chain.rows.length;
  options("start", [["", "noise"], ...(free ? rows.map((row) => [row[0], `t = ${row[0]}`]) : [])], state.start ?? "");
  $("start").disabled = !free;
  $("sampler-about").textContent = `${state.sampler}: ${page.samplers[state.sampler].about}. ` +
    (free ? "It can start from the curve above at any of its timesteps." : "Its rows look back at earlier ones, so it starts from noise; ddim and ddpm can start anywhere.");
  if (play) playBack();
  repaint(paintBack);
}

function* computing(which) {
  while (!which.done) {
    yield* which.row(which.denoiser instanceof Tmpd ? 4 : 8);
    const done = which.path.length - 1;
    if (rowShown >= done) repaint(paintBack); // the end is to be shown, and this is how far it is
    if (stride > 1 && done > 1 && (done - 1) % stride) which.path[done - 1] = which.path[done - 2]; // shown in its place
    yield;
  }
}

function playBack() {
  if (still) return finish();
  const rows = chain.rows.length, rate = Math.max(4, rows / SECONDS) / 1000;
  let before = null;
  if (rowShown >= rows) rowShown = 0;
  $("back-play").textContent = "Pause";
  players.set("back", (now) => {
    rowShown = Math.min(rowShown + (before === null ? 0 : now - before) * rate, chain.path.length - 1);
    before = now;
    repaint(paintBack);
    if (rowShown >= rows) pause("back");
  });
  wake();
}

function finish() {
  rowShown = chain.rows.length;
  pause("back");
}

function pause(name) {
  players.delete(name);
  $(`${name}-play`).textContent = name === "forward" ? "Dissolve" : "Play";
}

function paintBack() {
  const shown = Math.min(Math.floor(rowShown), chain.path.length - 1), x = chain.path[shown], { rows, n } = chain;
  $("row").value = shown;
  const next = rows[Math.min(shown, rows.length - 1)], level = shown < rows.length ? next[0] : -1;
  $("row-shown").textContent = level < 0 ? `done, row ${shown}` : `row ${shown}, t = ${level}`;
  const graph = new Graph($("draws-canvas"), range());
  const alpha = Math.max(0.05, Math.min(0.4, 4 / count()));
  if (state.start !== null) graph.line(curve(state.selected), { stroke: colour("noise"), width: 2, dash: [4, 4] });
  else for (let k = 0; k < Math.min(count(), 60); k++) graph.line(curve(k), { stroke: colour("noise"), width: 1, alpha: alpha / 2 });
  for (let k = n - 1; k >= 0; k--) {
    const strong = k < Math.min(5, n);
    graph.line((i) => toData(x[k * d + at(i)], at(i)), { stroke: colour("draw"), width: strong ? 2.25 : 1, alpha: strong ? 1 : 0.28 });
  }
  const [t, p, q, a, b, c1, c2, c3, e, s] = next;
  const term = (value, name) => value && `${value < 0 ? "− " : "+ "}${Math.abs(value) < 0.0005 ? Math.abs(value).toExponential(0).replace("-", "−") : Math.abs(value).toFixed(3)} ${name}`;
  const sum = (...terms) => terms.filter(Boolean).join(" ").replace(/^\+ /, "").replace(/^− /, "−");
  const m = evaluates(next) && b ? sum(term(p, "<var>x</var>"), term(q, "<var>out</var>")) : "";
  const mixed = sum(term(a, "<var>x</var>"), term(b, "<var>m</var>"), term(c1, "<var>m</var><sub>1</sub>"), term(c2, "<var>m</var><sub>2</sub>"),
    term(c3, "<var>m</var><sub>3</sub>"), term(e, "<var>out</var>"), term(s, "<var>z</var>"));
  formula("step", "<var>m</var> = <var>p x</var> + <var>q out</var>,&ensp; <var>x′</var> = <var>a x</var> + <var>b m</var> + <var>c</var><sub>1</sub> <var>m</var><sub>1</sub> + … + <var>e out</var> + <var>s z</var>",
    `${m && `<var>m</var> = ${m},&ensp; `}<var>x′</var> = ${mixed}`);
  writeCode("back-code");
}

// ---------------------------------------------------------------------------------------- 4: fill

let filling = null; // a chain, or what a crew draws
let crew; // undefined until it is wanted, null where a page can have none

/** The curve as it is seen: NaN where it is erased, in all channels, and where it is constant. */
function seen() {
  const [from, to] = state.erased, row = state.rows.subarray(state.selected * d, (state.selected + 1) * d);
  return Array.from(row, (value, j) => (!factor[j] || (j >= from * channels && j < (to + 1) * channels) ? NaN : value));
}

function refill() {
  unfill();
  fillSoon = true;
  if (fillVisible) fill();
  repaint(paintFill);
}

let fillSoon = true, fillVisible = false;

function fill() {
  fillSoon = false;
  const rows = table(), known = seen(), deviation = state.error, seed = BigInt(state.seed);
  state.posterior = null;
  if (network) {
    const job = { rows, schedule, seen: known, deviation, method: state.method, n: state.ways, seed };
    if (crew === undefined) crew = Crew.of($("computing").textContent, network, dismiss);
    if (crew) {
      filling = crew.start(network, job, () => repaint(paintFill));
      return repaint(paintFill);
    }
    filling = filler(network, job);
  } else {
    const denoiser = (state.posterior = state.law.given(known, deviation));
    filling = new Chain({ rows, denoiser, n: state.ways, d, seed });
  }
  jobs.set("fill", steps(filling));
  repaint(paintFill);
}

/** Fill here what a worker cannot. */
function dismiss() {
  crew?.end();
  crew = null;
  if (filling && !filling.done) fill();
}

function unfill() {
  filling = null;
  jobs.delete("fill");
  crew?.stop();
}

function* steps(which) {
  while (!which.done) {
    yield* which.row(which.denoiser instanceof Tmpd ? 4 : 8);
    which.path = Object.assign(which.path, Array.from({ length: which.path.length - 1 }, () => null)); // the last is shown
    repaint(paintFill);
    yield;
  }
  repaint(paintFill);
}

function paintFill() {
  if (!count()) return;
  const [from, to] = state.erased, k = state.selected, graph = new Graph($("filled"), range());
  graph.stretch(from, to, colour("erased"));
  $("erase-from").value = from;
  $("erase-to").value = to;
  $("error-shown").textContent = `± ${state.error.toFixed(2)}`;
  let facts = "";
  if (filling) {
    const x = filling.latest, n = filling.n, value = (row, i) => toData(x[row * d + at(i)], at(i));
    const inside = (i) => i >= from - 1 && i <= to + 1;
    for (let row = 0; row < n; row++) {
      graph.line((i) => (inside(i) ? value(row, i) : NaN), { stroke: colour("draw"), width: 1, alpha: 0.3 });
    }
    if (filling.done) {
      const sorted = Array.from({ length: points }, (_, i) => Array.from({ length: n }, (_, row) => value(row, i)).sort((a, b) => a - b));
      const quantile = (share) => (i) => (inside(i) ? sorted[i][Math.round(share * (n - 1))] : NaN);
      graph.line(quantile(0.5), { stroke: colour("draw"), width: 3 });
      for (const share of [0.05, 0.95]) graph.line(quantile(share), { stroke: colour("draw"), width: 1.5, dash: [2, 4] });
      let hits = 0;
      for (let i = from; i <= to; i++) hits += curve(k)(i) >= quantile(0.05)(i) && curve(k)(i) <= quantile(0.95)(i);
      facts = `${n} draws; lines: median, 5 and 95 %. Of the ${to - from + 1} erased points ${hits} lie between the last two.`;
    } else facts = `row ${filling.passed} of ${filling.rows.length}`;
  }
  graph.line((i) => (i >= from && i <= to ? curve(k)(i) : NaN), { stroke: colour("warm"), width: 2, dash: [5, 5] });
  graph.line((i) => (i >= from && i <= to ? NaN : curve(k)(i)), { stroke: colour("seen"), width: 3 });
  $("fill-facts").textContent = facts;
  const m = seen().filter((value) => !Number.isNaN(value)).length, s2 = (state.error ** 2).toFixed(4);
  if (network && state.method === "tmpd") {
    formula("posterior", "<var>x</var><sub>0</sub> += <var>g J</var><sup>T</sup><var>A</var><sup>T</sup> (<var>g A J A</var><sup>T</sup> + <var>s</var>² <var>I</var>)<sup>−1</sup> (<var>y</var> − <var>A x</var><sub>0</sub>)",
      `${m} values seen, <var>s</var>² = ${s2}`, "<var>J</var> is the Jacobian of the denoiser, <var>g</var> = noise² / signal (tmpd, Boys et al. 2023).");
  } else if (network) {
    formula("posterior", "<var>x</var> ← √ᾱ <var>y</var> + √(1 − ᾱ) <var>z</var>&ensp; where it is seen, after every row",
      `${m} values seen`, "Replacement is quick, and biased however many rows there are.");
  } else if (state.kind === "gaussian") {
    formula("posterior", "<var>μ</var> + <var>Σ</var><sub>·<var>o</var></sub> (<var>Σ<sub>oo</sub></var> + <var>s</var>² <var>I</var>)<sup>−1</sup> (<var>y</var> − <var>μ<sub>o</sub></var>)",
      `${m} values seen, <var>s</var>² = ${s2}`, "The exact law of what is erased: a Gaussian again, which the sampler draws from.");
  } else {
    const left = state.posterior ? Math.exp(-state.posterior.logs.reduce((sum, log) => sum + (log > -600 ? Math.exp(log) * log : 0), 0)) : NaN;
    formula("posterior", "<var>w<sub>k</sub></var> ∝ exp(−|<var>y</var> − <var>X<sub>k</sub></var>|² / 2<var>s</var>²)",
      `${m} values seen, <var>s</var>² = ${s2}: ${Number.isNaN(left) ? "…" : left.toFixed(1)} of ${count()} curves still count`,
      "The exact law of what is erased: the same curves with other weights.");
  }
  writeCode("fill-code");
}

function onErase(canvas) {
  let begin = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect(), graph = { left: 34, right: 8 };
    const part = (event.clientX - box.left - graph.left) / (box.width - graph.left - graph.right);
    return Math.round(Math.max(0, Math.min(1, part)) * (points - 1));
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    begin = place(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (begin === null) return;
    const end = place(event);
    if (end !== begin) erase(Math.min(begin, end), Math.max(begin, end), false);
  });
  const end = () => {
    if (begin !== null) refill();
    begin = null;
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
}

function erase(from, to, now = true) {
  if (to - from >= points - 1) to = points - 2; // something is to be seen
  state.erased = [from, to];
  unfill();
  if (now) refill();
  repaint(paintFill);
}

// ---------------------------------------------------------------------------------------- controls

const codes = { "forward-code": forwardCode, "back-code": backCode, "fill-code": fillCode };

/** The lines of Python of a part, where they are shown or `wanted`. */
function writeCode(id, wanted = false) {
  if (wanted || $(id).parentElement.open) $(id).textContent = codes[id](page, state);
}

function options(id, pairs, chosen) {
  const select = $(id), text = JSON.stringify(pairs);
  if (select.dataset.options !== text) {
    select.replaceChildren(...pairs.map(([value, name]) => new Option(name, value)));
    select.dataset.options = text;
  }
  select.value = String(chosen);
}

const say = (text) => ($("status").textContent = text);

function on(id, event, act) {
  $(id).addEventListener(event, () => act($(id)));
}

function chooseSteps() {
  const known = Object.keys(page.samplers[state.sampler].tables).map(Number);
  if (!known.includes(state.steps)) state.steps = known.reduce((a, b) => (Math.abs(b - state.steps) < Math.abs(a - state.steps) ? b : a));
  options("steps", known.map((steps) => [steps, steps]), state.steps);
}

function chooseSeed(text) {
  let seed;
  try {
    seed = BigInt(text.trim() || "?");
  } catch {
    seed = -1n;
  }
  const good = seed >= 0n && seed < 2n ** 64n;
  $("seed").setAttribute("aria-invalid", String(!good));
  if (!good) return say("The seed is a whole number from 0 to 2^64 − 1.");
  state.seed = String(seed);
  $("seed").value = state.seed;
  noiseOf = null;
  restart();
  refill();
  repaint(paintStrip, paintForward);
}

function setTheme(name) {
  const dark = name === "dark" || (name === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = `Theme: ${name}`;
  $("theme").dataset.name = name;
  recolour();
}

const PAINTS = [paintStrip, paintPad, paintForward, paintBack, paintFill];

function repaintAll() {
  repaint(...PAINTS);
}

/** On paper it is light. */
function printing(on) {
  const name = $("theme").dataset.name;
  setTheme(on ? "light" : name);
  Object.assign($("theme").dataset, { name });
  for (const paint of PAINTS) paint(); // at once: no frame comes before the paper
}

function begin() {
  setTheme("system");
  on("theme", "click", (button) => {
    setTheme({ system: "light", light: "dark", dark: "system" }[button.dataset.name]);
    repaintAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    setTheme($("theme").dataset.name);
    repaintAll();
  });
  const paper = matchMedia("print");
  paper.addEventListener("change", () => printing(paper.matches));
  new ResizeObserver(repaintAll).observe(document.querySelector("main"));

  for (const family of page.families) {
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: family.title });
    chip.addEventListener("click", () => {
      Object.assign(state, { family, own: [], selected: 0 });
      settle();
    });
    $("families").append(chip);
  }
  if (model) aboutModel();
  $("families-group").hidden = $("kind-group").hidden = Boolean(model);
  options("channel", (model?.channels ?? ["values"]).map((name, i) => [i, name]), 0);
  $("channel-group").hidden = channels === 1;
  on("channel", "change", (select) => {
    state.channel = Number(select.value);
    keyed = null;
    repaintAll();
  });
  for (const radio of document.getElementsByName("kind")) {
    radio.addEventListener("change", () => {
      state.kind = radio.value;
      law();
    });
  }
  onPad($("pad"));
  on("vary", "click", vary);
  on("remove", "click", () => {
    state.own.pop();
    if (!state.own.length && !model) state.family = page.families[0];
    settle();
  });

  $("t").max = schedule.T; // 0 is the curve itself; t counts from there
  $("t").min = 1;
  on("t", "input", (slider) => {
    pause("forward");
    state.t = Number(slider.value) - 1;
    repaint(paintForward);
  });
  on("forward-play", "click", () => {
    if (players.has("forward")) return pause("forward");
    let started = null;
    const from = state.t >= schedule.T - 1 ? 0 : state.t;
    $("forward-play").textContent = "Pause";
    players.set("forward", (now) => {
      started ??= now;
      state.t = Math.min(schedule.T - 1, Math.round(from + ((now - started) / (1000 * SECONDS)) * (schedule.T - 1)));
      repaint(paintForward);
      if (state.t === schedule.T - 1) pause("forward");
    });
    wake();
  });
  on("come-back", "click", () => {
    if (!startsAnywhere(table())) {
      state.sampler = page.samplers.ddpm ? "ddpm" : "ddim";
      $("sampler").value = state.sampler;
      state.steps = schedule.T;
      chooseSteps();
    }
    state.start = Math.max(state.t, table().at(-1)[0]);
    restart();
    refill();
    $("back").scrollIntoView();
  });

  options("sampler", Object.keys(page.samplers).map((name) => [name, name]), state.sampler);
  chooseSteps();
  on("sampler", "change", (select) => {
    state.sampler = select.value;
    chooseSteps();
    restart();
    refill();
  });
  on("steps", "change", (select) => {
    state.steps = Number(select.value);
    restart();
    refill();
  });
  on("start", "change", (select) => {
    state.start = select.value === "" ? null : Number(select.value);
    restart();
  });
  on("draws", "change", (select) => {
    state.n = Number(select.value);
    restart();
  });
  $("seed").value = state.seed;
  on("seed", "change", (input) => chooseSeed(input.value));
  on("next-seed", "click", () => chooseSeed(String((BigInt(state.seed) + 1n) % 2n ** 64n)));
  on("back-play", "click", () => (players.has("back") ? pause("back") : playBack()));
  on("back-step", "click", () => {
    pause("back");
    rowShown = Math.floor(rowShown) >= chain.rows.length ? 0 : Math.min(Math.floor(rowShown) + 1, chain.path.length - 1);
    repaint(paintBack);
  });
  on("row", "input", (slider) => {
    pause("back");
    rowShown = Math.min(Number(slider.value), chain.path.length - 1);
    repaint(paintBack);
  });

  for (const id of ["erase-from", "erase-to"]) {
    $(id).max = points - 1;
    on(id, "input", () => {
      const ends = [Number($("erase-from").value), Number($("erase-to").value)];
      erase(Math.min(...ends), Math.max(...ends), false);
    });
    on(id, "change", refill);
  }
  on("error", "input", (slider) => {
    state.error = Number(slider.value);
    refill();
  });
  $("method-group").hidden = !model;
  on("method", "change", (select) => {
    state.method = select.value;
    refill();
  });
  on("fill-play", "click", fill);
  onErase($("filled"));

  for (const id of Object.keys(codes)) $(id).parentElement.addEventListener("toggle", () => writeCode(id));
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = $(button.dataset.copy);
      writeCode(source.id, true);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        source.parentElement.open = true; // a page from a file may not write to the clipboard everywhere
        getSelection().selectAllChildren(source);
        button.textContent = "Selected: press Ctrl-C";
      }
      say(button.textContent);
      setTimeout(() => (button.textContent = "Copy as Python"), 1500);
    });
  }
  if (!model) state.family = page.families[0];
  state.selected = model ? 0 : 3;
  state.t = Math.round(schedule.T * 0.4);
  $("error").value = state.error;
  settle();
  new IntersectionObserver(([entry]) => {
    fillVisible = entry.isIntersecting;
    if (fillVisible && fillSoon) fill();
  }).observe($("filled"));
  let first = true;
  new IntersectionObserver(([entry]) => {
    if (first && entry.isIntersecting && !entry.target.dataset.touched) {
      rowShown = 0;
      playBack();
      first = false;
    }
  }).observe($("draws-canvas"));
}

function aboutModel() {
  $("data-name").textContent = "The model";
  $("data-lead").textContent = "A few of its samples. Curves of your own are diffused and filled by it as well.";
  $("lead").textContent = `The page holds ${model.name} and runs it by itself, with the noise and the samplers of the Python library: the normals are the same to the bit, and every picture comes with the lines that reproduce it.`;
  const facts = { File: model.name, Network: model.about, Parameters: model.parameters.toLocaleString("en"), Predicts: page.prediction };
  $("model-facts").hidden = false;
  $("model-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
    [["dt", name], ["dd", value]].map(([tag, textContent]) => Object.assign(document.createElement(tag), { textContent }))));
  if (!model.plan.asked) return;
  const ask = () => {
    law();
    repaint(paintBack);
  };
  const field = (name, input, act, event = "change") => {
    const label = Object.assign(document.createElement("label"), { textContent: `${name} ` });
    input.addEventListener(event, () => {
      act(input);
      ask();
    });
    label.append(input);
    $("asked").append(label);
  };
  if (model.classes) {
    const select = document.createElement("select");
    select.id = "label";
    select.append(...model.classes.map((name, k) => new Option(name, k)));
    field("Asked for", select, () => (state.label = Number(select.value)));
  }
  model.covariates?.names.forEach((name, k) => {
    const input = Object.assign(document.createElement("input"), { type: "number", step: "any", value: +state.covariates[k].toPrecision(4) });
    state.covariates[k] = Number(input.value);
    field(name, input, () => (state.covariates[k] = Number(input.value)));
  });
  if (model.guided) {
    const input = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 5, step: 0.25, value: 1, id: "guidance" });
    const shown = Object.assign(document.createElement("output"), { textContent: "1" });
    field("Guidance", input, () => (shown.textContent = String((state.guidance = Number(input.value)))), "input");
    $("asked").lastChild.append(shown);
  }
}

begin();

// What tests read.
window.fastdiff = {
  page, state, frames, jobs,
  get forward() { return seenNow; },
  get chain() { return chain; },
  get filling() { return filling; },
  finished: () => jobs.size === 0 && (filling === null || filling.done),
  get workers() { return crew ? crew.workers.length : 0; },
  normals: (rows, width, given) => fillNormal(new Float32Array(rows * width), rows, width, { ...given, keys: roundKeys(BigInt(given.seed)) }),
};
