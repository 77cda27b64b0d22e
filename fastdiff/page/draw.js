// Pictures on a canvas.

let colours = {};

/** Read the theme's colours. */
export function recolour() {
  const style = getComputedStyle(document.documentElement);
  const names = ["panel", "ink", "soft", "line", "grid", "data", "noise", "draw", "seen", "erased", "warm", "map0", "map1", "map2"];
  colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

export const colour = (name) => colours[name];

/** A canvas, cleared, in CSS pixels: its context, width and height. */
export function cleared(canvas) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  const wide = Math.round(width * scale), high = Math.round(height * scale);
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.lineJoin = "round";
  context.font = "12px system-ui, sans-serif";
  return { context, width, height };
}

/** A graph of curves of `points` values between `low` and `high`. */
export class Graph {
  constructor(canvas, { points, low, high }) {
    Object.assign(this, cleared(canvas), { points, low, high, left: 34, right: 8, top: 8, bottom: 8 });
    const { context, width } = this, step = niceStep((high - low) / 5);
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
      const y = Math.round(this.y(value)) + 0.5, zero = Math.abs(value) < step / 2;
      context.strokeStyle = zero ? colour("line") : colour("grid");
      context.lineWidth = zero ? 1.5 : 1;
      this.path([[this.left, y], [width - this.right, y]]);
      context.fillStyle = colour("soft");
      context.fillText(short(zero ? 0 : value), this.left - 6, y);
    }
  }

  x(i) {
    return this.left + (i / Math.max(1, this.points - 1)) * (this.width - this.left - this.right);
  }

  y(value) {
    return this.top + ((this.high - value) / (this.high - this.low)) * (this.height - this.top - this.bottom);
  }

  path(pairs) {
    this.context.beginPath();
    for (const [x, y] of pairs) this.context.lineTo(x, y);
    this.context.stroke();
  }

  /** A line through values; `at(i)` gives value i, NaN a gap. */
  line(at, { stroke, width = 2, alpha = 1, dash = [] }) {
    const { context, points } = this;
    context.strokeStyle = stroke;
    context.lineWidth = width;
    context.globalAlpha = alpha;
    context.setLineDash(dash);
    context.beginPath();
    let open = false;
    for (let i = 0; i < points; i++) {
      const value = at(i);
      if (Number.isNaN(value)) {
        open = false;
      } else if (open) {
        context.lineTo(this.x(i), this.y(value));
      } else {
        context.moveTo(this.x(i), this.y(value));
        open = true;
      }
    }
    context.stroke();
    context.globalAlpha = 1;
    context.setLineDash([]);
  }

  /** The area between two lines. */
  band(low, high, fill, alpha) {
    const { context, points } = this;
    context.fillStyle = fill;
    context.globalAlpha = alpha;
    context.beginPath();
    for (let i = 0; i < points; i++) context.lineTo(this.x(i), this.y(high(i)));
    for (let i = points - 1; i >= 0; i--) context.lineTo(this.x(i), this.y(low(i)));
    context.fill();
    context.globalAlpha = 1;
  }

  /** A stretch of points from edge to edge. */
  stretch(from, to, fill) {
    const half = (this.x(1) - this.x(0)) / 2;
    this.context.fillStyle = fill;
    this.context.fillRect(this.x(from) - half, 0, this.x(to) - this.x(from) + 2 * half, this.height);
  }

  note(text, x, y, fill, align = "left") {
    this.context.fillStyle = fill;
    this.context.textAlign = align;
    this.context.textBaseline = "alphabetic";
    this.context.fillText(text, x, y);
  }
}

/** A histogram of values (counts of equal bins from -limit to limit) as a density, and curves over it. */
export function histogram(canvas, counts, limit, total, curves) {
  const { context, width, height } = cleared(canvas), bins = counts.length, floor = height - 20;
  const densities = Array.from(counts, (count) => (count / total) * (bins / (2 * limit)));
  const top = Math.max(0.55, ...densities) * 1.05, y = (density) => floor - (density / top) * (floor - 8);
  context.fillStyle = colour("data");
  context.globalAlpha = 0.35;
  densities.forEach((density, i) => {
    context.fillRect((i / bins) * width + 0.5, y(density), width / bins - 1, floor - y(density));
  });
  context.globalAlpha = 1;
  for (const { density, stroke, dash } of curves) {
    context.strokeStyle = stroke;
    context.lineWidth = 2;
    context.setLineDash(dash || []);
    context.beginPath();
    for (let i = 0; i <= 160; i++) context.lineTo((i / 160) * width, y(density((i / 80 - 1) * limit)));
    context.stroke();
  }
  context.setLineDash([]);
  context.strokeStyle = colour("line");
  context.beginPath();
  context.moveTo(0, floor + 0.5);
  context.lineTo(width, floor + 0.5);
  context.stroke();
  context.fillStyle = colour("soft");
  context.textAlign = "center";
  for (let value = Math.ceil(-limit + 0.5); value < limit - 0.4; value++) {
    context.fillText(short(value), ((value / limit + 1) / 2) * width, height - 5);
  }
}

const stops = new Map();

function rgb(name) {
  const text = colour(name);
  if (!stops.has(text)) stops.set(text, [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16)));
  return stops.get(text);
}

/** A colour between two of the theme. */
export function mixed(from, to, share) {
  const [a, b] = [rgb(from), rgb(to)];
  return `rgb(${a.map((value, c) => Math.round(value + share * (b[c] - value))).join(" ")})`;
}

/** A matrix (n, n) as a picture, at (x, y) of that size; `most` is what has the full colour, of either sign. */
export function heatMap(context, matrix, n, most, x, y, size) {
  const image = new ImageData(n, n), none = rgb("map0"), plus = rgb("map1"), minus = rgb("map2");
  for (let i = 0; i < n * n; i++) {
    const share = Math.min(1, Math.abs(matrix[i]) / most), to = matrix[i] < 0 ? minus : plus;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = none[c] + share * (to[c] - none[c]);
    image.data[4 * i + 3] = 255;
  }
  const small = new OffscreenCanvas(n, n);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, x, y, size, size);
  context.strokeStyle = colour("line");
  context.lineWidth = 1;
  context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
}

/** Eigenvalues on a logarithmic axis, in a box of the canvas. */
export function spectrum(context, series, { x, y, width, height, low, high }) {
  const place = (value) => y + ((Math.log10(high) - Math.log10(Math.max(value, low))) / Math.log10(high / low)) * height;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power += 2) {
    const line = Math.round(place(10 ** power)) + 0.5;
    context.strokeStyle = power === 0 ? colour("line") : colour("grid");
    context.beginPath();
    context.moveTo(x, line);
    context.lineTo(x + width, line);
    context.stroke();
    context.fillStyle = colour("soft");
    context.fillText(power === 0 ? "1" : `10${String(power).replace(/./g, (c) => SUPERSCRIPTS[c])}`, x - 5, line);
  }
  for (const { values, stroke, dash, dots } of series) {
    const at = (i) => x + (i / Math.max(1, values.length - 1)) * width;
    context.strokeStyle = context.fillStyle = stroke;
    context.lineWidth = 2;
    context.setLineDash(dash || []);
    context.beginPath();
    values.forEach((value, i) => {
      if (value < low) return;
      if (dots) context.rect(at(i) - 1.5, place(value) - 1.5, 3, 3);
      else context.lineTo(at(i), place(value));
    });
    if (dots) context.fill();
    else context.stroke();
    context.setLineDash([]);
  }
}

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((step) => step * power >= rough) * power;
}

/** A number for an axis, with a true minus sign. */
export function short(value) {
  const text = Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(+value.toPrecision(6));
  return text.replace("-", "−");
}
