"""Numbers that samples are asked for beside a label: in the units of the data, and in the network's range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import backend_for
from fastdiff.denoiser import check_covariates
from fastdiff.errors import ArgumentError, check_array, is_on_device

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CovariateScale:
    """The map of covariates to mean 0 and deviation 1 in the training rows; a constant one keeps a deviation of 1.

    Attributes
    ----------
    mean, deviation : (k,) float64
    """

    mean: Float64
    deviation: Float64

    @classmethod
    def of(cls, rows: Float64) -> Self:
        """Return that of training rows (N, k), or (N, ..., k) of which every point counts."""
        rows = rows.reshape(-1, rows.shape[-1])
        deviation = rows.std(axis=0)
        return cls(rows.mean(axis=0), np.where(deviation > 0, deviation, 1.0))

    def apply(self, covariates: Float64) -> Float64:
        """Return covariates (n, ..., k) in the network's range."""
        return (covariates - self.mean) / self.deviation

    @property
    def arrays(self) -> dict[str, Float64]:
        """What a file holds of it."""
        return {"covariates.mean": self.mean, "covariates.deviation": self.deviation}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], columns: int) -> Self:
        """Return that of a file."""
        mean, deviation = (
            check_array(name, arrays[name], shape=(columns,), dtype=np.float64)
            for name in ("covariates.mean", "covariates.deviation")
        )
        if deviation.min() <= 0:
            raise ArgumentError("covariates.deviation", f"{deviation.min():g}", "numbers above 0")
        return cls(mean, deviation)


def checked_covariates(covariates: Any, shape: tuple[int, ...] | None, n: int) -> Float64:
    """Return covariates (n, *shape) on the host in float64; shape None: as many for each sample as there are.

    Raises
    ------
    ArgumentError
        They are None, of another shape, or not finite.
    """
    if covariates is None:
        wants = f"{' x '.join(map(str, shape or ('k',)))} numbers for each sample: this network has covariates"
        raise ArgumentError("covariates", "None", wants)
    if is_on_device(covariates):
        be, array = backend_for("auto", covariates=covariates), check_array("covariates", covariates)
        covariates = be.to_numpy(be.asarray(array, array.dtype))
    host: Float64 = check_covariates(covariates, shape, n)
    return host


def none_known(covariates: Any) -> ArgumentError:
    """Return the error of covariates for a network that has none."""
    wants = "None: this network has no covariates; make a new one with covariates=k, or let fit make it"
    return ArgumentError("covariates", type(covariates).__name__, wants)
