"""What the exact denoisers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, backend_for
from fastdiff.denoiser import Evaluator
from fastdiff.errors import ArgumentError, check_array, check_choice, check_timesteps, is_on_device
from fastdiff.exact.moments import Moments
from fastdiff.schedule import PREDICTIONS, Schedule

PLAN_VALUES = 1 << 22  # of maps of rows that a denoiser keeps for their next use


class Workspace:
    """Arrays of a backend by name, made anew where another shape is asked for."""

    def __init__(self, be: Backend) -> None:
        self.be = be
        self._arrays: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = self._arrays[name] = self.be.empty(shape, dtype)
        return array


class Exact(ABC):
    """What the exact denoisers share.

    At timestep t the state is ``x = alpha x0 + sigma noise``, with alpha the signal and sigma the noise of the
    schedule, and the best predictions are conditional expectations given x: ``E[x0 | x]``, ``E[noise | x]``, which is
    ``-sigma`` times the gradient of ``log_density``, and ``E[v | x] = alpha E[noise | x] - sigma E[x0 | x]``; the
    velocity is noise - x0. alpha^2 + sigma^2 need not be 1.

    Attributes
    ----------
    shape : tuple of int
        Shape of one sample.
    d : int
        Its size.
    schedule : Schedule
        The noise levels.
    T : int
        Number of timesteps of the schedule.
    prediction : {"noise", "x0", "v", "velocity"}
        What `predict` returns.
    data : Moments
        Mean and covariance of the data.
    log_evidence : float
        Of a posterior that `given` has made: the log density, under the model that was asked, of what was observed;
        else 0. Observations of rows without noise count as probabilities in an `Empirical`.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> isinstance(law, fd.denoisers.Exact), law.d, law.T, law.prediction
    (True, 2, 20, 'noise')
    """

    classes: int | None = None
    exact = True  # its Jacobian is that of a mean of x0: see `Denoiser`
    log_evidence = 0.0
    _mixes_steps = False  # whether `_expect` and `_log_density` take a t for each row

    def __init__(self, shape: tuple[int, ...], schedule: Schedule, prediction: str) -> None:
        if not isinstance(schedule, Schedule):
            raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        self.schedule, self.T = schedule, schedule.T
        self.shape, self.d = shape, math.prod(shape)
        self._plans: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    @property
    @abstractmethod
    def data(self) -> Moments: ...

    def predict(self, x: Any, t: Any, labels: Any = None, *, backend: str | Backend = "auto") -> Array:
        """The best prediction at x, in the form named by `prediction`.

        Parameters
        ----------
        x : (n, ...) array of real numbers
            States; each row holds d values, in any shape.
        t : int or (n,) integers
            Timesteps.
        labels : optional
            Not used: there are no classes.
        backend : str or Backend, optional
            What computes. "auto": where x is, for an array on a GPU; the cpu backend for float32; NumPy in float64 for
            any other dtype.

        Returns
        -------
        (n, ...) float32 or float64
            Of the shape of x and of its kind. float64 where NumPy was given it, or chosen by "auto".

        Raises
        ------
        ArgumentError
            If x is not finite or its rows are not of size d, or t is out of range.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> x = np.array([[1.0, 1.0]])
        >>> np.allclose(s.signal[5] * law.mean_x0(x, 5) + s.noise[5] * law.predict(x, 5), x)
        True
        """
        return self._conditional(self.prediction, x, t, backend)

    def mean_x0(self, x: Any, t: Any, *, backend: str | Backend = "auto") -> Array:
        """E[x0 | x_t = x], with arguments, result and errors as `predict`.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> x = s.signal[0] * np.array([[3.0, -1.0]])
        >>> np.allclose(law.mean_x0(x, 0), [[3, -1]], atol=0.05)  # hardly any noise yet
        True
        """
        return self._conditional("x0", x, t, backend)

    def vjp(self, x: Any, t: Any, cotangent: Any, *, backend: str | Backend = "auto") -> Array:
        """J^T times a cotangent, J being the Jacobian of the prediction by x.

        That of E[x0 | x] is ``J0 = alpha / sigma^2 Cov[x0 | x]``, that of the noise ``J1 = (I - alpha J0) / sigma``;
        v has ``alpha J1 - sigma J0``, and the velocity ``J1 - J0``. All are symmetric.

        Parameters
        ----------
        x, t, backend
            As of `predict`.
        cotangent : (n, ...) or (k, n, ...) array
            A vector for each state, or k of them.

        Returns
        -------
        array like the cotangent
            In what `predict` would return.

        Raises
        ------
        ArgumentError
            As `predict`, or the cotangent's shape or values.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> x, v = np.ones((1, 2)), np.array([[1.0, 0.0]])
        >>> np.allclose(law.vjp(x, 5, v), v @ law.affine("noise", 5)[0])
        True
        """
        return self._products("cotangent", x, t, cotangent, backend)

    def jvp(self, x: Any, t: Any, tangent: Any, *, backend: str | Backend = "auto") -> Array:
        """J times a tangent, the derivative of the prediction along it: as `vjp`, as J is symmetric.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> x, v = np.ones((1, 2)), np.array([[1.0, 0.0]])
        >>> np.allclose(law.jvp(x, 5, v), (law.predict(x + 1e-6 * v, 5) - law.predict(x, 5)) / 1e-6)
        True
        """
        return self._products("tangent", x, t, tangent, backend)

    def log_density(self, x: Any, t: Any, *, backend: str | Backend = "auto") -> Array:
        """log q_t(x), the log density of the states at timestep t.

        Parameters
        ----------
        x : (n, ...) array of real numbers
            States; each row holds d values.
        t : int or (n,) integers
            Timesteps.
        backend : str or Backend, optional
            As in `predict`.

        Returns
        -------
        (n,) float32 or float64
            In what `predict` would return.

        Raises
        ------
        ArgumentError
            As `predict`.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> x, h = np.array([[1.0, 2.0]]), 1e-6
        >>> slope = (law.log_density(x + [h, 0], 5) - law.log_density(x, 5)) / h
        >>> np.allclose(-s.noise[5] * slope, law.predict(x, 5)[:, 0], atol=1e-5)  # the score, scaled
        True
        """
        be, given, rows, steps = self._checked(x, t, backend)
        out = be.empty((len(rows),), rows.dtype)
        self._run(Workspace(be), self._log_density, rows, steps, out)
        return out if is_on_device(given) else be.to_numpy(out)

    def moments(self, t: int) -> Moments:
        """Mean and covariance of x_t: alpha mean and ``alpha^2 cov + sigma^2 I``.

        Parameters
        ----------
        t : int
            Timestep.

        Returns
        -------
        Moments

        Raises
        ------
        ArgumentError
            If t is out of range.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> np.allclose(law.moments(5).cov, fd.covariance.propagate(np.diag([4.0, 1.0]), s, 5))
        True
        """
        alpha, sigma = self._levels(int(check_timesteps(t, self.T, 1)[0]))
        data = self.data
        spread, rest = np.hypot(alpha * data.deviations, sigma), math.hypot(alpha * data.rest, sigma)
        return Moments(alpha * data.mean, spread, data.basis, rest)

    def on(self, be: Backend, shape: tuple[int, ...] | None = None) -> Evaluator:
        """The prediction on flat states (n, d) of a backend: see `Denoiser`."""
        return _Expects(self, be)

    @abstractmethod
    def _expect(self, space: Workspace, prediction: str, x: Array, t: Any, out: Array) -> None:
        """Fill `out` (n, d) with a prediction at x (n, d), n > 0."""

    @abstractmethod
    def _log_density(self, space: Workspace, x: Array, t: Any, out: Array) -> None:
        """Fill `out` (n,) with the log density at x (n, d), n > 0."""

    @abstractmethod
    def _product(self, space: Workspace, prediction: str, x: Array, t: int, vectors: Array, out: Array) -> None:
        """Fill `out` (k, n, d) with the Jacobian of a prediction at x (n, d), n > 0, times vectors (k, n, d)."""

    def _products(self, argument: str, x: Any, t: Any, vectors: Any, backend: str | Backend) -> Array:
        be, given, rows, steps = self._checked(x, t, backend)
        checked = check_array(argument, vectors, dtype=rows.dtype)
        if checked.shape != given.shape and checked.shape[1:] != given.shape:
            raise ArgumentError(argument, f"shape {checked.shape}", f"{given.shape} like x, or k of them")
        k = 1 if checked.shape == given.shape else len(checked)
        flat = be.asarray(checked, rows.dtype).reshape(k, *rows.shape)
        out, space = be.empty(flat.shape, rows.dtype), Workspace(be)
        for step in np.unique(steps):
            at = np.flatnonzero(steps == step)
            if len(at) == len(rows):
                self._product(space, self.prediction, rows, int(step), flat, out)
            else:
                at = be.asarray(at, np.int64)
                part = be.empty((k, len(at), self.d), rows.dtype)
                self._product(space, self.prediction, rows[at], int(step), flat[:, at], part)
                out[:, at] = part
        out = out.reshape(checked.shape)
        return out if is_on_device(given) else be.to_numpy(out)

    def _conditional(self, prediction: str, x: Any, t: Any, backend: str | Backend) -> Array:
        be, given, rows, steps = self._checked(x, t, backend)
        out = be.empty(rows.shape, rows.dtype)

        def expect(space: Workspace, x: Array, t: Any, out: Array) -> None:
            self._expect(space, prediction, x, t, out)

        self._run(Workspace(be), expect, rows, steps, out)
        out = out.reshape(given.shape)
        return out if is_on_device(given) else be.to_numpy(out)

    def _checked(self, x: Any, t: Any, backend: str | Backend) -> tuple[Backend, Array, Array, Array]:
        """The backend, x, its rows (n, d) as the backend takes them, and their timesteps on the host."""
        given = check_array("x", x, min_ndim=1)
        if math.prod(given.shape[1:]) != self.d:
            raise ArgumentError("x", f"shape {given.shape}", f"rows of {self.d} values")
        kind = None
        if isinstance(backend, str) and backend == "auto" and not is_on_device(given) and given.dtype != np.float32:
            backend, kind = "numpy", np.dtype(np.float64)
        be = backend_for(backend, x=given, t=t)
        kind = be.asarray(given[:0], kind).dtype
        rows = be.asarray(check_array("x", given, dtype=kind), kind).reshape(len(given), self.d)
        steps = check_timesteps(t, self.T, len(rows))
        return be, given, rows, be.to_numpy(steps) if is_on_device(steps) else steps

    def _run(self, space: Workspace, work: Callable[..., None], x: Array, t: Array, out: Array) -> None:
        """``work(space, x, t, out)``, once for the rows of each timestep where it takes but one."""
        if len(x) == 0:
            return
        if (t == t[0]).all():
            work(space, x, int(t[0]), out)
        elif self._mixes_steps:
            work(space, x, t, out)
        else:
            for step in np.unique(t):
                rows = space.be.asarray(np.flatnonzero(t == step), np.int64)
                part = space.be.empty((len(rows), *out.shape[1:]), out.dtype)
                work(space, x[rows], int(step), part)
                out[rows] = part

    def _levels(self, t: Any) -> tuple[Any, Any]:
        return self.schedule.signal[t], self.schedule.noise[t]

    def _kept(self, key: Any, values: int, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key, of so many values; at most `PLAN_VALUES` of them are kept."""
        found = self._plans.get(key)
        if found is None:
            if (len(self._plans) + 1) * values > PLAN_VALUES:
                self._plans.clear()
            found = self._plans[key] = make()
        return found


class _Expects(Evaluator):
    """An exact denoiser on a backend."""

    def __init__(self, denoiser: Exact, be: Backend) -> None:
        self.be, self.denoiser, self._space = be, denoiser, Workspace(be)

    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        out = self._space("out", x.shape, x.dtype)
        if len(x):
            self.denoiser._expect(self._space, self.denoiser.prediction, x, t, out)
        return out

    def vjp(self, x: Array, t: int, cotangent: Array, labels: Array = None) -> Array:
        return self.jvp(x, t, cotangent)  # the Jacobian is symmetric

    def jvp(self, x: Array, t: int, tangent: Array, labels: Array = None) -> Array:
        out = self._space("product", tangent.shape, x.dtype)
        if out.size:
            many = (-1, *x.shape)
            self.denoiser._product(
                self._space, self.denoiser.prediction, x, t, tangent.reshape(many), out.reshape(many)
            )
        return out
