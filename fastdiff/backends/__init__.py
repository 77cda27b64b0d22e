"""The backend protocol: the operations that every backend provides, and how one is chosen.

``numpy`` is the reference: plain formulas, float32 or float64. ``cpu`` runs compiled Numba kernels in float32.
Arguments are checked where the user calls, not here: a backend may assume C-contiguous arrays of its own kind.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, BackendError, check_choice, check_int, is_on_device
from fastdiff.noise import Draw

log = logging.getLogger("fastdiff")

Array = Any  # the backend's own kind: numpy.ndarray, later cupy.ndarray

Activation = Literal["none", "leaky_relu", "silu"]
TimeMode = Literal["none", "shift", "scale_shift"]

LEAKY_SLOPE = 0.01
PRECISIONS = ("float32", "bf16")
CONVOLUTIONS = ("own", "cudnn")


class Row(NamedTuple):
    """One row of a sampler table (docs/design.md: the table law), in float64.

    x0 = clip(p x + q out); x' = a x + b x0 + c x0_previous + e out + s z. Every sum starts from +0 and adds its
    terms in that order, one rounding per operation; a term with a zero coefficient is not evaluated.
    """

    t: int
    p: float
    q: float
    a: float
    b: float
    c: float
    e: float
    s: float


@dataclass(frozen=True)
class DenseLayer:
    """y = act((1 + gain) (x W + bias) + shift), gain and shift being columns of the time table.

    Attributes
    ----------
    inputs, outputs : int
        Widths.
    weight, bias : int
        Offsets of W (inputs, outputs) and of the bias (outputs,) in the flat parameter buffer.
    activation : {"none", "leaky_relu", "silu"}
    time : {"none", "shift", "scale_shift"}
        Which of gain and shift the layer has; with both, the gain's columns come first.
    time_column : int
        First column of this layer in the time table.
    """

    inputs: int
    outputs: int
    weight: int
    bias: int
    activation: Activation
    time: TimeMode = "none"
    time_column: int = 0


@dataclass(frozen=True, eq=False)
class LinearPart:
    """A fixed, symmetric linear part of a network's output: B_t x = basis diag(gains[t]) basis^T x + rest[t] x.

    Attributes
    ----------
    basis : (d, r) float64
    gains : (T, r) float64
    rest : (T,) float64 or None
        For the directions that are not in the basis; None: zero.
    """

    basis: npt.NDArray[np.float64]
    gains: npt.NDArray[np.float64]
    rest: npt.NDArray[np.float64] | None = None

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


@dataclass(frozen=True, eq=False)
class MLPPlan:
    """What a backend needs to know of an MLP; the numbers are in the flat parameter buffer.

    The time table has one row per timestep and `time_width` columns. It is a parameter itself (an embedding) where
    `features` is None, else features @ W + bias with W (F, time_width) at `time_weight`.

    Attributes
    ----------
    layers : tuple of DenseLayer
    T : int
        Number of timesteps.
    size : int
        Length of the flat parameter buffer.
    time_width : int
        Columns of the time table, 0 for a network without time.
    time_weight, time_bias : int
        Offsets; `time_bias` is unused for an embedding.
    features : (T, F) float64 or None
        Sinusoidal features of every timestep.
    linear : LinearPart or None
        Added to the output of the layers, and not trained.
    """

    layers: tuple[DenseLayer, ...]
    T: int
    size: int
    time_width: int
    time_weight: int
    time_bias: int
    features: npt.NDArray[np.float64] | None
    linear: LinearPart | None = None


@dataclass(frozen=True, eq=False)
class RowMap:
    """A linear map of rows, x (m, n) to y (m, k): y = x scale + (x left) right + offset, in that order of terms.

    Where `right` is None, x left is the product itself. The map of rows by a covariance or its factor, dense or of
    low rank; a plan, which a backend may keep in its own form for as long as the object lives.

    Attributes
    ----------
    scale : (n,) float64 or None
        Needs k = n.
    left : (n, r) float64 or None
    right : (r, k) float64 or None
    offset : (k,) float64 or None
    standardise : bool
        Afterwards subtract each row's mean from it and divide it by its standard deviation; a constant row becomes 0.
    """

    scale: npt.NDArray[np.float64] | None = None
    left: npt.NDArray[np.float64] | None = None
    right: npt.NDArray[np.float64] | None = None
    offset: npt.NDArray[np.float64] | None = None
    standardise: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        first, last = (m for m in (self.scale, self.left, self.right) if m is not None), self.right
        n = next(first).shape[0]
        return n, n if self.left is None else (self.left if last is None else last).shape[1]


class TrainingDraws(NamedTuple):
    """What a training step draws its batch from: the noise law's TRAIN streams over a data set.

    Position i of the batch at a step takes data row (w0 N) >> 32 of stream BATCH, timestep (w0 T) >> 32 of
    TRAIN_TIME and its noise from TRAIN_NOISE. `signal` and `noise` are the schedule's tables (T,), and the target
    is ``target_noise[t] * eps + target_data[t] * x0``: which prediction the network learns is a table too.

    Image networks also have the class of every data row, `labels` (N,), or None; with `flip` a picture is mirrored left
    to right where stream AUGMENT says so: see `fastdiff.noise.flips`.
    """

    data: Array
    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]
    target_noise: npt.NDArray[np.float64]
    target_data: npt.NDArray[np.float64]
    seed: int
    labels: Array | None = None
    flip: bool = False


class TrainState(NamedTuple):
    """The arrays of a training run, in the layout of the flat parameter buffer.

    Attributes
    ----------
    params, grads : (size,) array
    m, v : (size,) array
        Moments of the optimiser.
    average : (size,) array
        Moving average of the parameters.
    """

    params: Array
    grads: Array
    m: Array
    v: Array
    average: Array


class AdamW(NamedTuple):
    """Scalars of one optimiser step (Loshchilov and Hutter 2019), already corrected for the step number.

    The gradient is scaled by min(1, clip_norm / (norm + 1e-6)) (no clipping where `clip_norm` is infinite); then
    m += (1 - beta1) (g - m); v += (1 - beta2) (g g - v);
    p = (1 - rate decay) p - rate / correction1 * m / (sqrt(v) / sqrt(correction2) + eps);
    average += (1 - ema) (p - average). A gradient whose norm is not finite changes nothing.
    """

    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    correction1: float
    correction2: float
    clip_norm: float
    ema: float


class Training(Protocol):
    """Training steps on arrays that stay where they are; it is the caller's, and what is kept for it goes with it."""

    def run(self, step: int, options: AdamW) -> None:
        """Take a step."""


@runtime_checkable
class Backend(Protocol):
    """The operations of a backend. Arrays are changed in place where the text says *fill* or *change*."""

    name: str
    threads: int
    steps_ahead: int
    """Training steps that are best issued before the results of the first one are read."""

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """Return `value` as a C-contiguous array of this backend, in `dtype` or its working float type."""

    def owns(self, value: Any) -> bool:
        """Whether `value` is an array of this backend's kind."""

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        """Return a backend array as NumPy."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        """Return an uninitialised array."""

    def normal(self, out: Array, draw: Draw) -> None:
        """Fill `out` (n, D) with normals by the noise law."""

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        """Fill `eps` (n, D) with noise and `out` with signal[t] x0 + noise[t] eps; t is (n,) int64."""

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        previous: Array | None,
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        """Change `x` (n, D) by one row of a table, and `previous`, where given, into this row's x0.

        `out` (n, D) is the denoiser's output; None where no term needs it.
        """

    def mlp_forward(self, plan: MLPPlan, params: Array, x: Array, t: Array, out: Array | None = None) -> Array:
        """Return the network's output (n, outputs) for x (n, inputs) and t (n,) int64, in `out` where given."""

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, x: Array, t: Array, target: Array, grads: Array
    ) -> tuple[float, Array]:
        """Fill `grads` with the gradient of the mean squared error; return the loss and the gradient of x.

        The padding between the tensors of `grads` must be zero, and stays so.
        """

    def mlp_vjp(self, plan: MLPPlan, params: Array, x: Array, t: Array, dy: Array, dx: Array) -> None:
        """Fill dx (n, inputs), or (k, n, inputs) for k vectors dy, with J^T dy: J is the Jacobian of `mlp_forward`."""

    def mlp_jvp(self, plan: MLPPlan, params: Array, x: Array, t: Array, dx: Array, dy: Array) -> None:
        """Fill dy (n, outputs), or (k, n, outputs) for k vectors dx, with J dx: J is the Jacobian of `mlp_forward`."""

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        """Draw the batch of a training step, fill `grads`, return the loss."""

    def mlp_chain(
        self,
        plan: MLPPlan,
        params: Array,
        x: Array,
        rows: tuple[Row, ...],
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        """Change `x` (n, D) by all rows of a table, the network being the denoiser: stream STEP, a row at its t."""

    def similarity(self, v: Array, out: Array) -> None:
        """Fill `out` (B, n, n) with exp(-(v_i - v_j)^2) of every row of v (B, n)."""

    def map_rows(self, x: Array, out: Array, plan: RowMap) -> None:
        """Fill `out` (m, k) with the map of the rows of x (m, n)."""

    def mapped_normal(self, out: Array, plan: RowMap, draw: Draw) -> None:
        """Fill `out` (m, k) with the map of normals (m, n) by the noise law, which are not stored."""

    def posterior_mean(
        self,
        x: Array,
        data: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        log_sum: Array,
    ) -> None:
        """Fill `out` (m, d) with E[x0 | x] where x0 is a row of `data` (N, d), each as likely as the others.

        Row i of x (m, d) is signal[i] x0 + noise[i] z. The weight of data row k is exp(-|x - signal y_k|^2 /
        (2 noise^2)), and `log_sum` (m,) takes the logarithm of the sum of the weights; no weight underflows.
        """

    def blend(self, out: Array, state: Array, parts: Array, residuals: Array, constant: float) -> None:
        """Add one component to a running average weighted by exp(constant - |residuals|^2 / 2), row by row.

        `out` (m, d) is the average so far of `parts` (m, d); `state` (m, 2) holds the greatest exponent so far and
        the sum of the weights relative to it: (-inf, 0) before the first component. `residuals` is (m, r).
        """

    def adamw(self, state: TrainState, options: AdamW) -> float:
        """Change parameters, moments and their moving average by one step; return the gradient's norm."""

    def mlp_training(
        self, plan: MLPPlan, draws: TrainingDraws, batch: int, state: TrainState, results: Array
    ) -> Training:
        """Return what does `mlp_train_gradient`, then `adamw`; row ``step % rows`` of `results` takes loss and norm.

        `results` (rows, 2) is float64, the caller's, and zero at first. Where loss or norm is not finite nothing but
        the gradient is changed, and the norm is not finite. The same is true of a step whose row before has no finite
        norm: after one that went wrong the steps that follow do nothing.
        """


def available_backends() -> list[str]:
    """Return the names of the backends that work on this machine, the reference first."""
    return ["numpy", "cpu", *(["cuda"] if _has_cuda() else [])]


@cache
def _has_cuda() -> bool:
    if find_spec("cupy") is None:
        return False
    try:
        _shared("cuda", None, "raw", "float32", True, "own")
    except BackendError as error:
        log.info("no backend 'cuda': %s", error)
        return False
    return True


@cache
def _shared(name: str, threads: int | None, kernels: str, precision: str, graphs: bool, convolutions: str) -> Backend:
    if name == "numpy":
        from fastdiff.backends.numpy import NumpyBackend

        return NumpyBackend()
    if name == "cuda":
        from fastdiff.backends.cuda import CudaBackend

        return CudaBackend(kernels=kernels, precision=precision, graphs=graphs, convolutions=convolutions)
    from fastdiff.backends.cpu import CpuBackend

    return CpuBackend(threads=threads)


@cache
def _choose_auto() -> str:
    # Not "cuda", until its speed has been measured on a GPU.
    log.info("backend 'auto' chose 'cpu'")
    return "cpu"


def get_backend(
    backend: str | Backend = "auto",
    *,
    threads: int | None = None,
    kernels: str | None = None,
    precision: str | None = None,
    graphs: bool | None = None,
    convolutions: str | None = None,
) -> Backend:
    """Return a backend.

    Parameters
    ----------
    backend : {"auto", "numpy", "cpu", "cuda"} or Backend
        A backend object is returned as it is. "auto" is the CPU in this version; it logs once what it chose.
    threads : int, optional
        For "cpu": how many threads its kernels use; by default one per core this process may run on. Results do not
        depend on it.
    kernels : {"raw", "numba"}, optional
        For "cuda": the CUDA C++ kernels (default), or their Numba twins where there are some.
    precision : {"float32", "bf16"}, optional
        For "cuda": what the convolutions of image networks multiply; sums and everything else are float32.
    graphs : bool, optional
        For "cuda": whether an image network's work that comes again is launched as a CUDA graph (default), or kernel
        by kernel, of the same bits; for comparison, and where a tool wants to see every launch.
    convolutions : {"own", "cudnn"}, optional
        For "cuda": our own kernels (default), or cuDNN's where it has some, which needs the extra ``[cudnn]``.

    Raises
    ------
    ArgumentError
        An unknown name, or an option that the backend does not have.
    BackendError
        "cuda" where CuPy, a driver or a GPU is missing: the message says what to install.
    """
    if isinstance(backend, Backend) and not isinstance(backend, type):
        options = {"threads": threads, "kernels": kernels, "precision": precision, "graphs": graphs}
        options["convolutions"] = convolutions
        for name, option in options.items():
            if option is not None:
                raise ArgumentError(name, str(option), "None: a backend object has its own")
        return backend
    name = check_choice("backend", backend, ["auto", "numpy", "cpu", "cuda"])
    if name == "auto":
        name = _choose_auto()
    if threads is not None:
        threads = check_int("threads", threads, low=1, high=1024)
        if name != "cpu":
            raise ArgumentError("threads", str(threads), "None: only the cpu backend has threads")
    if kernels is not None and name != "cuda":
        raise ArgumentError("kernels", repr(kernels), "None: only the cuda backend has a choice of kernels")
    if precision is not None and name != "cuda":
        raise ArgumentError("precision", repr(precision), "None: only the cuda backend has a choice of precision")
    if convolutions is not None and name != "cuda":
        raise ArgumentError("convolutions", repr(convolutions), "None: only the cuda backend has a choice of them")
    if graphs is not None and (name != "cuda" or not isinstance(graphs, bool)):
        wants = "True or False" if name == "cuda" else "None: only the cuda backend has graphs"
        raise ArgumentError("graphs", repr(graphs), wants)
    kernels = check_choice("kernels", "raw" if kernels is None else kernels, ["raw", "numba"])
    precision = check_choice("precision", "float32" if precision is None else precision, PRECISIONS)
    convolutions = check_choice("convolutions", "own" if convolutions is None else convolutions, CONVOLUTIONS)
    return _shared(name, threads, kernels, precision, graphs is not False, convolutions)


def backend_for(backend: str | Backend, **arrays: Any) -> Backend:
    """Return the backend for arguments that may be arrays on a GPU: of those, "auto" is "cuda".

    Raises
    ------
    ArgumentError
        An array on a GPU, for a backend of the host.
    BackendError
        As of `get_backend`.
    """
    on_device = [name for name, array in arrays.items() if is_on_device(array)]
    be = get_backend("cuda" if on_device and isinstance(backend, str) and backend == "auto" else backend)
    if on_device and be.name != "cuda":
        raise ArgumentError(
            on_device[0], "an array on a GPU", f"backend='cuda' with it, or a NumPy array for {be.name!r}"
        )
    return be
