// Small dense linear algebra in float64. Matrices are flat, row after row.

/**
 * Eigenvalues, descending, and eigenvectors of a symmetric matrix (n, n): `vectors[i * n + k]` is entry i of vector k.
 *
 * Householder tridiagonalisation and implicit QL (Bowdler, Martin, Reinsch and Wilkinson 1968). Without `wanted` the
 * vectors are not made, which costs a fifth.
 */
export function eigen(matrix, n, wanted = true) {
  const z = Float64Array.from(matrix), d = new Float64Array(n), e = new Float64Array(n);
  for (let i = n - 1; i > 0; i--) {
    let h = 0, scale = 0;
    for (let k = 0; k < i; k++) scale += Math.abs(z[i * n + k]);
    if (i === 1 || scale === 0) {
      e[i] = z[i * n + i - 1];
    } else {
      for (let k = 0; k < i; k++) {
        z[i * n + k] /= scale;
        h += z[i * n + k] ** 2;
      }
      const f = z[i * n + i - 1], g = f >= 0 ? -Math.sqrt(h) : Math.sqrt(h);
      e[i] = scale * g;
      h -= f * g;
      z[i * n + i - 1] = f - g;
      let sum = 0;
      for (let j = 0; j < i; j++) {
        if (wanted) z[j * n + i] = z[i * n + j] / h;
        let dot = 0;
        for (let k = 0; k <= j; k++) dot += z[j * n + k] * z[i * n + k];
        for (let k = j + 1; k < i; k++) dot += z[k * n + j] * z[i * n + k];
        e[j] = dot / h;
        sum += e[j] * z[i * n + j];
      }
      const half = sum / (h + h);
      for (let j = 0; j < i; j++) {
        const of = z[i * n + j], to = (e[j] -= half * of);
        for (let k = 0; k <= j; k++) z[j * n + k] -= of * e[k] + to * z[i * n + k];
      }
    }
    d[i] = h;
  }
  if (wanted) d[0] = 0;
  e[0] = 0;
  for (let i = 0; i < n; i++) {
    if (!wanted) {
      d[i] = z[i * n + i];
      continue;
    }
    if (d[i] !== 0) {
      for (let j = 0; j < i; j++) {
        let dot = 0;
        for (let k = 0; k < i; k++) dot += z[i * n + k] * z[k * n + j];
        for (let k = 0; k < i; k++) z[k * n + j] -= dot * z[k * n + i];
      }
    }
    d[i] = z[i * n + i];
    z[i * n + i] = 1;
    for (let j = 0; j < i; j++) z[j * n + i] = z[i * n + j] = 0;
  }
  for (let i = 1; i < n; i++) e[i - 1] = e[i];
  e[n - 1] = 0;
  for (let l = 0; l < n; l++) {
    for (let turn = 0; turn < 60; turn++) {
      let m = l;
      for (; m < n - 1; m++) {
        const size = Math.abs(d[m]) + Math.abs(d[m + 1]);
        if (Math.abs(e[m]) <= Number.EPSILON * size) break;
      }
      if (m === l) break;
      let g = (d[l + 1] - d[l]) / (2 * e[l]), r = Math.hypot(g, 1);
      g = d[m] - d[l] + e[l] / (g + (g >= 0 ? r : -r));
      let s = 1, c = 1, p = 0, i = m - 1;
      for (; i >= l; i--) {
        let f = s * e[i];
        const b = c * e[i];
        e[i + 1] = r = Math.hypot(f, g);
        if (r === 0) {
          d[i + 1] -= p;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2 * c * b;
        d[i + 1] = g + (p = s * r);
        g = c * r - b;
        if (wanted) {
          for (let k = 0; k < n; k++) {
            f = z[k * n + i + 1];
            z[k * n + i + 1] = s * z[k * n + i] + c * f;
            z[k * n + i] = c * z[k * n + i] - s * f;
          }
        }
      }
      if (r === 0 && i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0;
    }
  }
  const order = Array.from(d.keys()).sort((a, b) => d[b] - d[a]);
  const values = Float64Array.from(order, (k) => d[k]);
  if (!wanted) return { values };
  const vectors = new Float64Array(n * n);
  for (let i = 0; i < n; i++) order.forEach((k, j) => (vectors[i * n + j] = z[i * n + k]));
  return { values, vectors };
}

/** Solve A X = B in place for a symmetric positive definite A (n, n) and B (n, m), by Cholesky's method. */
export function solvePositive(A, n, B, m) {
  for (let j = 0; j < n; j++) {
    for (let i = j; i < n; i++) {
      let sum = A[i * n + j];
      for (let k = 0; k < j; k++) sum -= A[i * n + k] * A[j * n + k];
      A[i * n + j] = i === j ? Math.sqrt(Math.max(sum, 1e-300)) : sum / A[j * n + j];
    }
  }
  for (let c = 0; c < m; c++) {
    for (let i = 0; i < n; i++) {
      let sum = B[i * m + c];
      for (let k = 0; k < i; k++) sum -= A[i * n + k] * B[k * m + c];
      B[i * m + c] = sum / A[i * n + i];
    }
    for (let i = n - 1; i >= 0; i--) {
      let sum = B[i * m + c];
      for (let k = i + 1; k < n; k++) sum -= A[k * n + i] * B[k * m + c];
      B[i * m + c] = sum / A[i * n + i];
    }
  }
  return B;
}

/**
 * w with M w = rest as far as M (i, j) can be trusted: least squares, iterated by Tikhonov's method, as `damped` of
 * fastdiff/conditioning.py.
 */
export function damped(M, rest, i, j, least) {
  const total = new Float64Array(j);
  let term = new Float64Array(j);
  for (let b = 0; b < j; b++) for (let a = 0; a < i; a++) term[b] += M[a * j + b] * rest[a];
  for (let pass = 0; pass < 3; pass++) {
    const normal = new Float64Array(j * j);
    for (let b = 0; b < j; b++) {
      for (let c = 0; c <= b; c++) {
        let sum = b === c ? least * least : 0;
        for (let a = 0; a < i; a++) sum += M[a * j + b] * M[a * j + c];
        normal[b * j + c] = normal[c * j + b] = sum;
      }
    }
    solvePositive(normal, j, term, 1);
    for (let b = 0; b < j; b++) total[b] += term[b];
    term = term.map((value) => value * least * least);
  }
  return total;
}
