"""The backend protocol: the operations that every backend provides, and the plans that it is given.

Arguments are checked where the user calls, not here: a backend may assume C-contiguous arrays of its own kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastdiff.forks import cached_property
from fastdiff.noise import Draw

Array = Any  # the backend's own kind: numpy.ndarray, later cupy.ndarray

Activation = Literal["none", "leaky_relu", "silu"]
TimeMode = Literal["none", "shift", "scale_shift"]

LEAKY_SLOPE = 0.01
PRECISIONS = ("float32", "bf16x3", "bf16")
CONVOLUTIONS = ("own", "cudnn")
VISIT = 1 << 20  # the step of a noise is that many for every earlier draw at its timestep; above any T
MAX_VISITS = 4096  # steps are below 2^32
DEPTH = 3  # of a table's memory, at most
DRAWS = 1 << 20  # of an observation: draw k of observation i is sample i 2^20 + k by the noise law
KRYLOV = 16  # most vector-Jacobian products of tmpd for a state of a network
KRYLOV_LEAST = 1e-6  # of a new direction, relative to the image that it is the rest of: float32 products
DAMPED = 3  # terms of the sum that leaves out what is below the least singular value
PIVOT = 1e-13  # least pivot of a factorisation, relative to the entry that it is the rest of
TINY = 1e-300  # what is divided by, at least


def measured(path: Path) -> dict[str, Any]:
    """Return what a file of results of `make gpu` says: nothing of a quick run, whose numbers mean nothing."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("scale", 1) == 1 else {}


class Row(NamedTuple):
    """One row of a sampler table (docs/design.md: the table law), in float64.

    m = clip(p x + q out); x' = a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s exp(r v) z. Every sum starts from +0 and
    adds its terms in that order, one rounding per operation; a term with a zero coefficient is not evaluated. m1, m2
    and m3 are the m of earlier rows that evaluated the denoiser, the latest first. v is the second output of a denoiser
    that learned its variance.
    """

    t: int
    p: float
    q: float
    a: float
    b: float
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    e: float = 0.0
    s: float = 0.0
    r: float = 0.0
    visit: int = 0
    """How many rows before this one drew noise at its timestep."""

    @property
    def evaluates(self) -> bool:
        """Whether the row needs the denoiser's output; one that does not leaves the memory as it is."""
        return self.q != 0 or self.e != 0

    @property
    def depth(self) -> int:
        """How many of m1, m2 and m3 the row reaches back to."""
        return 3 if self.c3 != 0 else 2 if self.c2 != 0 else 1 if self.c1 != 0 else 0

    @property
    def step(self) -> int:
        """The step of its noise, by the noise law."""
        return self.t + VISIT * self.visit


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
    `features_of` is None, else features @ W + bias with W (F, time_width) at `time_weight`.

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
    features_of : callable or None
        Makes sinusoidal features of T timesteps.
    linear : LinearPart or None
        Added to the output of the layers, and not trained.
    asked : int
        Columns of what is asked of a sample, its class in `classes` of them, then covariates, then what is known of it;
        0: nothing is. A sample's row of the time table is that of its timestep, plus what is asked of it times W
        (asked, time_width).
    asked_weight : int
        Offset of that W.
    classes : int
    known : int
        Columns of what is known, twice the values of a sample: the values, 0 where they are not known, and then for
        each whether it is, 1 or 0. A network without them has 0.
    """

    layers: tuple[DenseLayer, ...]
    T: int
    size: int
    time_width: int
    time_weight: int
    time_bias: int
    features_of: Callable[[int], npt.NDArray[np.float64]] | None
    linear: LinearPart | None = None
    asked: int = 0
    asked_weight: int = 0
    classes: int = 0
    known: int = 0

    def asks(
        self,
        labels: npt.NDArray[Any] | None,
        covariates: npt.NDArray[Any] | None,
        dtype: npt.DTypeLike = np.float32,
        known: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Return what is asked of samples (n, asked): 1 in the column of its class, none for the null class.

        `labels` are (n,), from 0 to `classes`, the null class; `covariates` (n, asked - classes - known), and `known`
        (n, known).
        """
        given = next(part for part in (labels, covariates, known) if part is not None)
        out = np.zeros((len(given), self.asked), dtype)
        if labels is not None:
            named = np.flatnonzero(labels < self.classes)
            out[named, labels[named]] = 1
        if covariates is not None:
            out[:, self.classes : self.asked - self.known] = covariates
        if known is not None:
            out[:, self.asked - self.known :] = known
        return out

    @cached_property
    def features(self) -> npt.NDArray[np.float64] | None:
        """(T, F), made when they are asked for: a file may claim any T."""
        return None if self.features_of is None else self.features_of(self.T)


class Inputs(NamedTuple):
    """What a perceptron is evaluated for.

    Attributes
    ----------
    x : (n, inputs) array
    t : (n,) int64 array
    asked : (n, plan.asked) array or None
        What is asked of every sample, as `MLPPlan.asks` returns it, of a network that is asked something; None:
        nothing.
    """

    x: Array
    t: Array
    asked: Array | None = None


class ChainTable(NamedTuple):
    """A sampler's table as a perceptron's chain runs it.

    Attributes
    ----------
    rows : tuple of Row
    clip : (float, float) or None
    weights : (len(rows),) float32 array or None
        Of guidance: the denoiser of a row is u + w (c - u), c being the output for what is asked and u that for nothing
        but what is known, in that order of operations; c alone where w is 1, or there are none.
    levels : (len(rows),) float32 array or None
        What is asked says what is known, and that is held: before row i evaluates the network these values of x become
        ``levels[i]`` times the known ones.
    """

    rows: tuple[Row, ...]
    clip: tuple[float, float] | None = None
    weights: npt.NDArray[np.float32] | None = None
    levels: npt.NDArray[np.float32] | None = None


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


@dataclass(frozen=True, eq=False)
class TmpdPlan:
    """What tmpd needs to know of N observations y = A x0 + s z, of m values each, and of a network's noise levels.

    State i of a chain is draw ``i % per`` of observation ``i // per``; where N is 1 all are of that one. A plan, which
    a backend may keep in its own form for as long as the object lives.

    Attributes
    ----------
    y, variance : (N, m) float64
        What was seen, and s^2; 0 and 1 in rows that say nothing.
    places : (N, m) int64, or None
        Which value of a sample a row of A is; D: it says nothing.
    matrix : (N, m, D) float64, or None
        A, where it is no such choice.
    per : int
        Draws of each observation.
    firsts : (N,) int64
        The sample index, by the noise law, of the first draw of each.
    products : int
        Vector-Jacobian products of a state and row, at most.
    p, q, gain, least, farthest : (T,) float64
        The mean of x0 is p x + q out. gain = noise^2 / signal moves it; where it is 0 nothing is moved. `least` is what
        singular values are trusted from; the mean is moved by ``farthest reach`` at most.
    reach : (N,) float64
    """

    y: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    places: npt.NDArray[np.int64] | None
    matrix: npt.NDArray[np.float64] | None
    per: int
    firsts: npt.NDArray[np.int64]
    products: int
    p: npt.NDArray[np.float64]
    q: npt.NDArray[np.float64]
    gain: npt.NDArray[np.float64]
    least: npt.NDArray[np.float64]
    farthest: npt.NDArray[np.float64]
    reach: npt.NDArray[np.float64]

    @property
    def direct(self) -> bool:
        """Whether there is a product for every row of A, and R is solved with; else its image of a Krylov space is."""
        return self.y.shape[1] <= self.products

    @property
    def equations(self) -> int:
        """How many equations w, by which the products are added up, has to fulfil."""
        return self.products if self.direct else self.products + 1

    @cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """(T, 6): p, q, gain, that of the output, least^2, and how far a slope may reach; 0 where the gain is 0."""
        gain = np.where(self.gain == 0, 1.0, self.gain)
        q = np.where(self.gain == 0, 1.0, self.q)
        columns = [self.p, self.q, self.gain, gain / q, self.least**2, self.farthest / gain]
        return np.ascontiguousarray(np.where(self.gain == 0, 0.0, np.array(columns)).T)

    def states(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return of so many states from number `first` on their observations, and their sample indices."""
        at = np.arange(first, first + count)
        which = np.zeros(count, np.int64) if len(self.y) == 1 else at // self.per
        return which, self.firsts[which] + at - which * self.per


class TmpdStates(NamedTuple):
    """States of chains that are conditioned by tmpd, and where their outputs are from.

    Attributes
    ----------
    tmpd : TmpdPlan
    which : (n,) int64 array
        The observation of each state.
    t : (n,) int64 array
        Timesteps at which the gain is not 0.
    """

    tmpd: TmpdPlan
    which: Array
    t: Array


class Equations(NamedTuple):
    """What moves outputs: the mean of x0 by gain sum_k w_k back[k], with w from H w = residual, solved in float64.

    Attributes
    ----------
    back : (K, n, D) array
        Like the states; K is ``tmpd.products``.
    H : (n, equations, K) float64 array
    residual : (n, equations) float64 array
    basis : (n, K + 1, m) float64 array or None
        Of the Krylov space; None where these are `direct`.
    """

    back: Array
    H: Array
    residual: Array
    basis: Array | None = None


class TrainingDraws(NamedTuple):
    """What a training step draws its batch from: the noise law's TRAIN streams over a data set.

    Position i of the batch at a step takes data row (w0 N) >> 32 of stream BATCH, timestep (w0 T) >> 32 of
    TRAIN_TIME and its noise from TRAIN_NOISE. `signal` and `noise` are the schedule's tables (T,), and the target
    is ``target_noise[t] * eps + target_data[t] * x0``: which prediction the network learns is a table too.

    Of image networks stream AUGMENT says where a batch of smaller pictures than the data's is cut out of these, and
    with `flip` which pictures are mirrored left to right: see `fastdiff.noise.cuts` and `fastdiff.noise.flips`.

    `terms` (T, columns) says what a row's loss is made of at its timestep: see `LayerBackend.squared_error`. None: its
    squared error.

    `labels` (N,) and `covariates` (N, columns) are what is asked of every data row, or None. Both are left out of a
    share `drop` of the positions, as stream DROP says, see `fastdiff.noise.dropped`: such a label is `classes`, the
    null class, and such covariates are zeros.

    Where the data set is not here `data`, `labels` and `covariates` are those of the batch, `by_position`, and are put
    there before each step: see `fastdiff.stored.Feed`.

    Where values are missing the data are `masked`, (N, 2, ...): a row is x0, and what is added to its target, 0 or, of
    a value that has not been seen, NaN. A target of NaN has no error.

    `targets` is a kind of `fastdiff.noise.targets`, and the shape (height, width, channels) of a row, where the network
    is told of a mask. Of the values that are no targets, and have been seen, x is ``signal[t] * x0``, without noise,
    and the target NaN; these are what is known of the row.
    """

    data: Array
    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]
    target_noise: npt.NDArray[np.float64]
    target_data: npt.NDArray[np.float64]
    seed: int
    labels: Array | None = None
    flip: bool = False
    terms: npt.NDArray[np.float64] | None = None
    covariates: Array | None = None
    drop: float = 0.0
    classes: int = 0
    masked: bool = False
    targets: tuple[str, tuple[int, int, int]] | None = None
    by_position: bool = False

    @property
    def bound(self) -> int:
        """Of how many rows one is drawn; 0: the batch is what the data are."""
        return 0 if self.by_position else len(self.data)


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


class Segment(NamedTuple):
    """A flat array that the members of a team sum, one after the other.

    Attributes
    ----------
    sums : array or None
        Comes as the members before left it, and goes on to the next one; None: there is nothing to sum.
    add : callable
        Of a slice: adds to that part of `sums` what this member has.
    result : array or None
        What the last member then gives to all: `sums` itself, or what it makes of that and of earlier segments.
    make : callable, optional
        What makes `result`, where that is not `sums`.
    in_pieces : bool, optional
        Whether `sums` may travel piece by piece, or is added to whole.
    came : array, optional
        The first part of `sums` where no more than that comes: what follows is zero before.
    """

    sums: Array | None
    add: Callable[[slice], None]
    result: Array | None
    make: Callable[[], None] | None = None
    in_pieces: bool = True
    came: Array | None = None


PartGradient = Callable[[int, int, int, Array], Array]
"""Of a training step, the first position of a part, how many it has, and an array that is filled with its gradient.
Returns the mean loss, an array of one value that is valid until the next call."""

Gather = Callable[[Array, Array], None]
"""Fills the second array, (members, ...), with the first one, (...), of each member; both are on devices."""


class Team(Protocol):
    """Processes that take training steps together: see `fastdiff.ranks`."""

    def shares(self, items: int) -> list[range]:
        """Return which of so many items, in a row, each member has; those of all members follow each other."""

    def share(self, items: int) -> range:
        """Return this member's of `shares`."""

    def gathering(self, be: Backend) -> Gather | None:
        """Return what gathers arrays of a backend on devices; None: nothing does."""

    def sum(self, segments: Sequence[Segment], losses: Sequence[float]) -> float:
        """Sum segments in the order of the members; return the sum of the losses of all, added one by one."""


class Training(Protocol):
    """Training steps on arrays that stay where they are; it is the caller's, and what is kept for it goes with it."""

    def run(self, step: int, options: AdamW) -> None:
        """Take a step."""


@runtime_checkable
class Backend(Protocol):
    """The operations of a backend. Arrays are changed in place where the text says *fill* or *change*.

    Examples
    --------
    >>> be = fd.get_backend("numpy")
    >>> be.name, be.to_numpy(be.asarray([1.5, 2.0])).tolist()
    ('numpy', [1.5, 2.0])
    """

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
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        """Change `x` (n, D) by one row of a table, and the `memory` of the rows before, if the row evaluates.

        `memory` is (m1, ..., mK), each (n, D), of a table that reaches back K rows: m1 becomes this row's m, m2 what m1
        was, and so on. `out` (n, D) is the denoiser's output, None where no term needs it; (2, n, D), which holds the
        output and v, of a denoiser with a learned variance, which rows with an r want.
        """

    def mlp_forward(self, plan: MLPPlan, params: Array, inputs: Inputs, out: Array | None = None) -> Array:
        """Return the network's output (n, outputs), in `out` where given."""

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, inputs: Inputs, target: Array, grads: Array
    ) -> tuple[float, Array]:
        """Fill `grads` with the gradient of the mean squared error; return the loss and the gradient of x.

        The padding between the tensors of `grads` must be zero, and stays so.
        """

    def mlp_vjp(
        self, plan: MLPPlan, params: Array, inputs: Inputs, dy: Array, dx: Array, y: Array | None = None
    ) -> None:
        """Fill dx (n, inputs), or (k, n, inputs) for k vectors dy, with J^T dy: J is the Jacobian of `mlp_forward`.

        One forward pass does for all vectors, and `y` (n, outputs), where it is given, takes its output.
        """

    def mlp_jvp(self, plan: MLPPlan, params: Array, inputs: Inputs, dx: Array, dy: Array) -> None:
        """Fill dy (n, outputs), or (k, n, outputs) for k vectors dx, with J dx: J is the Jacobian of `mlp_forward`."""

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        """Draw the batch of a training step, fill `grads`, return the loss."""

    def mlp_chain(
        self, plan: MLPPlan, params: Array, x: Array, table: ChainTable, draw: Draw, asked: Array | None = None
    ) -> None:
        """Change `x` (n, D) by all rows of a table, the network being the denoiser: stream STEP, a row at its t.

        `asked` is as of `Inputs`.
        """

    def hold(self, x: Array, known: Array, level: float) -> None:
        """Change the values of x (n, D) that are known to `level` times the known ones.

        `known` (n, 2 D) has the values, and then for each 1 where it is known, and 0.
        """

    def guide(self, asked: Array, unasked: Array, weight: float, rescale: float, out: Array) -> None:
        """Fill `out` (n, D) with u + w (c - u), c and u being outputs for what is `asked` and for nothing.

        With `rescale` phi it is multiplied by phi std(c) / std(out) + 1 - phi, deviations being those of a sample's
        values (Lin et al. 2024, section 3.4). `out` may be c.
        """

    def mlp_chain_tmpd(
        self, plan: MLPPlan, params: Array, x: Array, rows: tuple[Row, ...], draw: Draw, tmpd: TmpdPlan
    ) -> bool:
        """Do `mlp_chain` with every output moved as tmpd_move does; x[0] is the state number `draw.first_row`.

        That is in one piece, or a recorded step for each row. False: the backend cannot, and has done nothing.
        """

    def tmpd_rows(self, tmpd: TmpdPlan, which: Array, out: Array) -> None:
        """Fill `out` (m, n, D) with the rows of A of every state: cotangents of the products, where these are `direct`.

        `which` (n,) int64 is the observation of each state. Here and below `x`, `out`, cotangents and products are the
        states' dtype.
        """

    def tmpd_direct(self, states: TmpdStates, x: Array, out: Array, products: Array, equations: Equations) -> None:
        """Begin to move the output `out` (n, D) for x, of observations with so few rows that all are solved with.

        `products` (m, n, D) are J^T times the rows of A, J being the Jacobian of the output by x. Fills `back` with the
        same of the mean of x0, p A + q J^T A; H (n, m, m) with gain A back^T + s^2, and `rest` (n, m) with
        y - A (p x + q out).
        """

    def tmpd_begin(self, states: TmpdStates, x: Array, out: Array, cotangent: Array, equations: Equations) -> None:
        """Begin to move the output `out` (n, D) for x, by GMRES (Saad & Schultz 1986).

        Fills vector 0 of the `basis` with y - A (p x + q out) by its norm, `rest` (n, K + 1) with that norm and zeros,
        and `cotangent` (n, D) with A^T times the vector.
        """

    def tmpd_arnoldi(self, states: TmpdStates, k: int, product: Array, cotangent: Array, equations: Equations) -> None:
        """Take Arnoldi's step k, from vector k of the basis to the next.

        `product` (n, D) is J^T times the `cotangent`, which is A^T times vector k. Fills back[k] with p times the one
        and q times the other, and column k of H (n, K + 1, K) and vector k + 1 with what the image
        gain A back[k] + s^2 vector k is made of: vectors 0 ... k, and the rest by its norm, 0 where hardly any is left.
        The cotangent becomes A^T times the new vector.
        """

    def tmpd_move(self, states: TmpdStates, out: Array, equations: Equations) -> None:
        """Add to `out` (n, D) what moves the mean of x0 as the equations say, and no farther than it may be moved.

        They are solved as far as H can be trusted: `fastdiff.conditioning.damped`. Afterwards `back` is not defined.
        """

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


class TmpdWorkspace:
    """What a backend needs to move the outputs for so many states towards observations.

    Parameters
    ----------
    be : Backend
    tmpd : TmpdPlan
    shape : (int, int)
        Of the states, (n, D).
    dtype : dtype
        Theirs.

    Attributes
    ----------
    t : (n,) int64 array
        Where the outputs are from, to be filled by whoever moves them.
    """

    def __init__(self, be: Backend, tmpd: TmpdPlan, shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        (n, d), K, m, double = shape, tmpd.products, tmpd.y.shape[1], np.float64
        self.be, self.tmpd, self.shape, self.dtype = be, tmpd, shape, np.dtype(dtype)
        self.t, self._which = be.empty((n,), np.int64), be.empty((n,), np.int64)
        self._cotangent = be.empty((K, n, d) if tmpd.direct else (n, d), dtype)
        self._equations = Equations(
            be.empty((K, n, d), dtype),
            be.empty((n, tmpd.equations, K), double),
            be.empty((n, tmpd.equations), double),
            None if tmpd.direct else be.empty((n, K + 1, m), double),
        )
        self._of: npt.NDArray[np.int64] | None = None  # which, on the host

    def place(self, which: npt.NDArray[np.int64]) -> None:
        """Say of which observation each state is a draw."""
        if self._of is None or not np.array_equal(self._of, which):
            self._of = which
            self._which[...] = self.be.asarray(which, np.int64)
            if self.tmpd.direct:
                self.be.tmpd_rows(self.tmpd, self._which, self._cotangent)

    @property
    def rows(self) -> Array:
        """(m, n, D): the rows of A of every state, where these are `direct`."""
        return self._cotangent

    def move(self, x: Array, out: Array, product: Callable[[Array], Array]) -> None:
        """Move the output (n, D) for x at `t`.

        `product` returns J^T times cotangents (n, D), or `rows`, J being the Jacobian of the output by x.
        """
        be, equations, states = self.be, self._equations, TmpdStates(self.tmpd, self._which, self.t)
        if self.tmpd.direct:
            be.tmpd_direct(states, x, out, product(self._cotangent), equations)
        else:
            be.tmpd_begin(states, x, out, self._cotangent, equations)
            for k in range(self.tmpd.products):
                be.tmpd_arnoldi(states, k, product(self._cotangent), self._cotangent, equations)
        be.tmpd_move(states, out, equations)


@runtime_checkable
class SharingBackend(Backend, Protocol):
    """A backend that also trains perceptrons in a team, to the bits of `Backend.mlp_training`."""

    def mlp_shared_training(
        self, plan: MLPPlan, draws: TrainingDraws, batch: int, state: TrainState, results: Array, team: Team
    ) -> Training:
        """Return what does a step of `mlp_training` of which this member computes its share, the batch's `rows`."""
