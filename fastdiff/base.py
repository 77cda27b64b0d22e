"""The Gaussian base: the best linear denoiser, which a network only has to correct.

Of Gaussian data N(m, C) the best prediction is linear in x_t. With C = U diag(l) U^T the map z = U^T (x - m) makes it
diagonal, and leaves white noise white: in coordinate k

    E[x0 | x_t] = signal l_k / (signal^2 l_k + noise^2) x_t,

and what follows from it for the noise and for v. A network in these coordinates whose output is added to that *is* the
Gaussian before it has learned anything (its last layer starts at zero), and at high noise there is nothing else to
learn (Wang and Vastola 2024, "The unreasonable effectiveness of Gaussian score approximation for diffusion models").
So a sampling step costs one multiplication a value more, and a sample is turned back once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Backend, RowMap
from fastdiff.covariance import ledoit_wolf
from fastdiff.errors import ArgumentError, check_array
from fastdiff.schedule import Schedule

MOST_VALUES = 2048  # of a row: the basis has the square of it
ORTHONORMAL = 1e-6  # that a basis in a file may be off

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GaussianBase:
    """A Gaussian fitted to rows, and its principal axes.

    Attributes
    ----------
    mean : (d,) float64
    basis : (d, d) float64
        Principal axes, the columns of an orthogonal matrix.
    variances : (d,) float64
        Along the axes, none of them negative.
    """

    mean: Array
    basis: Array
    variances: Array

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> GaussianBase:
        """Fit rows (N, d), with Ledoit-Wolf shrinkage."""
        moments = ledoit_wolf(rows)
        variances, basis = np.linalg.eigh(moments.cov)
        return cls(moments.mean, basis[:, ::-1].copy(), np.maximum(variances[::-1], 0.0))

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, npt.NDArray[Any]], d: int) -> GaussianBase:
        """Return the base of a file for rows of d values.

        Raises
        ------
        ArgumentError
            An array is missing, or has a shape or values that no base has.
        """
        found = []
        for name, shape in (("base.mean", (d,)), ("base.basis", (d, d)), ("base.variances", (d,))):
            if name not in tensors:
                raise ArgumentError(name, "no such tensor", f"shape {shape}, as there are others of a base")
            found.append(check_array(name, tensors[name], shape=shape, dtype=np.float64))
        mean, basis, variances = found
        if (variances < 0).any():
            raise ArgumentError("base.variances", str(variances.min()), "numbers of at least 0")
        off = float(np.abs(basis.T @ basis - np.eye(d)).max())
        if off > ORTHONORMAL:
            raise ArgumentError("base.basis", f"a matrix {off:.2g} off an orthogonal one", "an orthogonal matrix")
        return cls(mean, basis, variances)

    @property
    def arrays(self) -> dict[str, Array]:
        """What a file keeps."""
        return {"base.mean": self.mean, "base.basis": self.basis, "base.variances": self.variances}

    def apply(self, rows: Any, be: Backend) -> Any:
        """Return rows (..., d) of a backend in the coordinates of the axes, in a new array of the backend."""
        return _mapped(rows, be, self._there)

    def invert(self, z: Any, be: Backend) -> Any:
        """Return coordinates (..., d) as rows: the inverse of `apply`."""
        return _mapped(z, be, self._back)

    @cached_property
    def _there(self) -> RowMap:
        return RowMap(left=self.basis, offset=-(self.mean @ self.basis))

    @cached_property
    def _back(self) -> RowMap:
        return RowMap(left=np.ascontiguousarray(self.basis.T), offset=self.mean)

    def gains(self, schedule: Schedule, prediction: str) -> Array:
        """Return the factors (T, d) of x_t, axis by axis, in the best linear prediction at every t."""
        signal, noise = schedule.signal[:, None], schedule.noise[:, None]
        power = signal**2 * self.variances + noise**2
        if prediction == "x0":
            gains = signal * self.variances / power
        elif prediction == "noise":
            gains = noise / power
        else:
            gains = signal * noise * (1 - self.variances) / power  # v = signal noise - noise x0
        return np.asarray(gains)


def _mapped(x: Any, be: Backend, plan: RowMap) -> Any:
    rows = be.asarray(x.reshape(-1, plan.shape[0]), x.dtype)
    out = be.empty(rows.shape, rows.dtype)
    be.map_rows(rows, out, plan)
    return out.reshape(x.shape)
