"""A network with frozen weights, as what can be sampled from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from fastdiff.backends import Backend
from fastdiff.denoiser import CovariateForm
from fastdiff.nn.network import Network
from fastdiff.nn.runner import Runner
from fastdiff.schedule import Schedule


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network with frozen weights, as `fastdiff.sample` takes it; it works in the network's own range.

    Attributes
    ----------
    net : Network
        The architecture.
    flat : array
        The weights in use. Forms of them may be kept: whoever changes them makes a new denoiser.
    prediction : {"noise", "x0", "v", "velocity"}
        What its output is.
    backend : Backend
        Where `predict` runs.
    schedule : Schedule or None
        That of its timesteps, where it is known.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> denoiser = model.denoiser()
    >>> denoiser.prediction, denoiser.shape, denoiser.T == model.schedule.T
    ('v', (12,), True)
    """

    net: Network
    flat: npt.NDArray[Any]
    prediction: str
    backend: Backend
    schedule: Schedule | None = None
    _runners: dict[Backend, Runner] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.net, self.flat, self.prediction, self.backend, self.schedule)

    @property
    def classes(self) -> int | None:
        return self.net.classes

    @property
    def covariate_form(self) -> CovariateForm | None:
        return self.net.covariate_form

    @property
    def masked(self) -> bool:
        return self.net.masked

    @property
    def asked_freely(self) -> bool:
        return self.net.asked_freely

    @property
    def learned_variance(self) -> bool:
        return self.net.learned_variance

    @property
    def T(self) -> int:
        return self.net.T

    @property
    def shape(self) -> tuple[int, ...]:
        return self.net.shape

    def predict(self, x: Any, t: Any, labels: Any = None, *, covariates: Any = None, known: Any = None) -> Any:
        """Return the output (n, ...) for x (n, ...) at timesteps t, an int or (n,): see `Network.predict`.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> model.denoiser().predict(np.zeros((3, 12)), 5).shape
        (3, 12)
        """
        asked = labels, covariates, known
        return self.net._call("fill_frozen", x, t, asked, self.backend, self.on(self.backend))

    def vjp(self, x: Any, t: Any, cotangent: Any, labels: Any = None, *, covariates: Any = None) -> Any:
        """Return J^T times a cotangent, J being the Jacobian of `predict` by x: see `Network.vjp`.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> x, v = np.zeros((1, 12)), np.ones((1, 12))
        >>> denoiser = model.denoiser()
        >>> np.allclose((denoiser.vjp(x, 5, v) * v).sum(), (denoiser.jvp(x, 5, v) * v).sum(), rtol=1e-3)
        True
        """
        options = {"covariates": covariates, "backend": self.backend, "flat": self.flat}
        return self.net.vjp(x, t, cotangent, labels, **options)

    def jvp(self, x: Any, t: Any, tangent: Any, labels: Any = None, *, covariates: Any = None) -> Any:
        """Return J times a tangent: see `Network.jvp`.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> x, v = np.zeros((1, 12)), np.ones((1, 12))
        >>> denoiser = model.denoiser()
        >>> slope = (denoiser.predict(x + 0.01 * v, 5) - denoiser.predict(x - 0.01 * v, 5)) / 0.02
        >>> np.allclose(denoiser.jvp(x, 5, v), slope, atol=1e-2)
        True
        """
        options = {"covariates": covariates, "backend": self.backend, "flat": self.flat}
        return self.net.jvp(x, t, tangent, labels, **options)

    def on(self, be: Backend, shape: tuple[int, ...] | None = None) -> Runner:
        """Return the network with these weights on a backend, always the same one."""
        if be not in self._runners:
            flat = self.flat if be.owns(self.flat) else self.backend.to_numpy(self.flat)
            self._runners[be] = self.net.runner(be, flat)
        return self._runners[be]
