"""What moves an output towards observations by tmpd: the formulas, and the operations of the backends of the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.protocol import DAMPED, KRYLOV_LEAST, TINY, Equations, TmpdPlan, TmpdStates

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


def rows_of(places: Places | None, matrix: Float64 | None, which: Places, d: int) -> Float64:
    """Return A (n, m, D) of samples, by the places (N, m) or the matrix (N, m, D) of all observations."""
    if matrix is not None:
        return matrix[which]
    assert places is not None
    return np.eye(d + 1)[places[which], :d]


def times(places: Places | None, matrix: Float64 | None, x: Array, which: Places) -> Float64:
    """Return A x (n, m) of samples x (n, D)."""
    if places is None:
        return np.einsum("nmd,nd->nm", rows_of(places, matrix, which, x.shape[1]), x)
    return np.take_along_axis(np.pad(x, ((0, 0), (0, 1))), places[which], axis=1)


def transposed(places: Places | None, matrix: Float64 | None, y: Float64, which: Places, d: int) -> Float64:
    """Return A^T y (n, D) of vectors y (n, m)."""
    if places is None:
        return np.einsum("nmd,nm->nd", rows_of(places, matrix, which, d), y)
    out = np.zeros((len(y), d + 1))
    np.add.at(out, (np.arange(len(y))[:, None], places[which]), y)
    return out[:, :d]


def damped(M: Float64, residual: Float64, least: float | Float64) -> Float64:
    """Return w with M w = residual, as far as M can be trusted: least squares, iterated by Tikhonov's method.

    A singular value s of M is divided by where it is well above `least`, up to a relative (least / s)^6, and what it
    belongs to is left out where it is well below: w = sum_k least^(2k) (M^T M + least^2)^-(k + 1) M^T residual,
    k = 0 .. 2. M w is then the residual with every part lessened, whatever M is.

    Parameters
    ----------
    M : (n, i, j) float64
    residual : (n, i) float64
    least : float or (n,) float64
        Above 0.

    Returns
    -------
    (n, j) float64
    """
    squared = np.square(least)[..., None, None]
    normal = np.einsum("nij,nik->njk", M, M) + squared * np.eye(M.shape[2])
    term = np.linalg.solve(normal, np.einsum("nij,ni->nj", M, residual)[..., None])
    total = term.copy()
    for _ in range(DAMPED - 1):
        term = squared * np.linalg.solve(normal, term)
        total += term
    solved: Float64 = total[..., 0]
    return solved


def arnoldi(k: int, image: Float64, basis: Float64, H: Float64) -> None:
    """Take Arnoldi's step k: from the image (n, m) of vector k of the basis (n, K + 1, m), which is changed.

    Fills column k of H (n, K + 1, K) and vector k + 1 of the basis.
    """
    whole = np.linalg.norm(image, axis=1)
    H[:, :, k] = 0
    for _ in range(2):  # once is not enough in finite precision
        part = np.einsum("njm,nm->nj", basis[:, : k + 1], image)
        image -= np.einsum("nj,njm->nm", part, basis[:, : k + 1])
        H[:, : k + 1, k] += part
    H[:, k + 1, k] = left = np.linalg.norm(image, axis=1)
    # Where nothing is left the answer is found: vectors of 0 add nothing to it.
    basis[:, k + 1] = np.where(left > KRYLOV_LEAST * whole, 1 / np.maximum(left, TINY), 0.0)[:, None] * image


class TmpdOperations:
    """Outputs that are moved towards observations."""

    def tmpd_rows(self, tmpd: TmpdPlan, which: Array, out: Array) -> None:
        out[...] = rows_of(tmpd.places, tmpd.matrix, which, out.shape[2]).transpose(1, 0, 2)

    def tmpd_direct(self, states: TmpdStates, x: Array, out: Array, products: Array, equations: Equations) -> None:
        (tmpd, which, t), (back, H, residual, _) = states, equations
        p, q, gain = tmpd.numbers[t, :3].T[..., None]
        A = rows_of(tmpd.places, tmpd.matrix, which, x.shape[1])
        back[...] = p * A.transpose(1, 0, 2) + q * products
        H[...] = gain[..., None] * np.einsum("nid,jnd->nij", A, back.astype(np.float64, copy=False))
        H[...] += np.eye(A.shape[1]) * tmpd.variance[which][:, None]
        residual[...] = _residual(states, x, out)

    def tmpd_begin(self, states: TmpdStates, x: Array, out: Array, cotangent: Array, equations: Equations) -> None:
        (tmpd, which, _), (_, _, residual, basis) = states, equations
        assert basis is not None
        first = _residual(states, x, out)
        size = np.linalg.norm(first, axis=1)
        basis[:, 0] = first / np.maximum(size, TINY)[:, None]
        residual[:, 0], residual[:, 1:] = size, 0
        cotangent[...] = transposed(tmpd.places, tmpd.matrix, basis[:, 0], which, x.shape[1])

    def tmpd_arnoldi(self, states: TmpdStates, k: int, product: Array, cotangent: Array, equations: Equations) -> None:
        (tmpd, which, t), (back, H, _, basis) = states, equations
        assert basis is not None
        p, q, gain = tmpd.numbers[t, :3].T[..., None]
        back[k] = p * cotangent + q * product
        image = gain * times(tmpd.places, tmpd.matrix, back[k].astype(np.float64, copy=False), which)
        arnoldi(k, image + tmpd.variance[which] * basis[:, k], basis, H)
        cotangent[...] = transposed(tmpd.places, tmpd.matrix, basis[:, k + 1], which, cotangent.shape[1])

    def tmpd_move(self, states: TmpdStates, out: Array, equations: Equations) -> None:
        (tmpd, which, t), (back, H, residual, _) = states, equations
        _, _, _, to_output, squared, farthest = tmpd.numbers[t].T
        slope = np.einsum("nk,knd->nd", damped(H, residual, np.sqrt(squared)), back)
        bound = np.minimum(farthest * tmpd.reach[which] / np.maximum(np.linalg.norm(slope, axis=1), TINY), 1.0)
        out += ((to_output * bound)[:, None] * slope).astype(out.dtype)


def _residual(states: TmpdStates, x: Array, out: Array) -> Float64:
    """y - A of the mean of x0."""
    tmpd, which, t = states
    p, q = tmpd.numbers[t, :2].T[..., None]
    return tmpd.y[which] - times(tmpd.places, tmpd.matrix, p * x + q * out, which)
