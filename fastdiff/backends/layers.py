"""The protocol of a backend that also runs image networks: their layers, forward and backward.

Arrays are NHWC (a curve is an image of height 1), C-contiguous, and made by the caller: an operation fills what its
text names and allocates no more than scratch of its own. For a scalar loss, ``dy`` is the gradient of the loss with
respect to ``y``. A gradient is filled, not added to, except where a parameter `add` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from fastdiff.backends.protocol import (
    AdamW,
    Array,
    Backend,
    MLPPlan,
    PartGradient,
    Row,
    Training,
    TrainingDraws,
    TrainState,
)
from fastdiff.noise import Draw


class Conv(NamedTuple):
    """Geometry of a convolution of (N, H, W, C) images.

    Attributes
    ----------
    kernel : (int, int)
        Rows and columns.
    stride : (int, int)
    pad : (int, int, int, int)
        Zeros before the first row, after the last, before the first column, after the last.
    up : (int, int)
        Every row and column of the input is first repeated so often (nearest upsampling).

    Examples
    --------
    >>> same = fd.nn.Conv((3, 3), pad=(1, 1, 1, 1))
    >>> same.size(8, 8), fd.nn.Conv((3, 3), stride=(2, 2), pad=(1, 1, 1, 1)).size(8, 8)
    ((8, 8), (4, 4))
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    up: tuple[int, int] = (1, 1)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output.

        Examples
        --------
        >>> fd.nn.Conv(up=(2, 2)).size(4, 6)
        (8, 12)
        """
        rows = height * self.up[0] + self.pad[0] + self.pad[1] - self.kernel[0]
        columns = width * self.up[1] + self.pad[2] + self.pad[3] - self.kernel[1]
        return rows // self.stride[0] + 1, columns // self.stride[1] + 1


class ConvShapes(NamedTuple):
    """A convolution of images of the shape `x` to images of the shape `out`."""

    geometry: Conv
    x: tuple[int, ...]
    out: tuple[int, ...]


class Affine(NamedTuple):
    """What normalised values h become, (1 + gain) (gamma h + beta) + shift; or the gradients of these numbers.

    Attributes
    ----------
    gamma, beta : (C,) array
    modulation : (N, 2 C) array or None
        Gain and shift of every image; None: there are none.
    """

    gamma: Array
    beta: Array
    modulation: Array | None = None


class Norm(NamedTuple):
    """A normalisation of images x (N, H, W, C): what its forward pass reads and keeps, and the others read.

    Attributes
    ----------
    x : (N, H, W, C) array
    affine : Affine
    stats : (N, groups, 2) array of a GroupNorm, (N, H, W, 2) array of a LayerNorm
        Mean and 1 / sqrt(variance + eps), which the forward pass fills.
    silu : bool
        Whether the result goes through SiLU; a LayerNorm's does not.
    """

    x: Array
    affine: Affine
    stats: Array
    silu: bool = False


class Batch(NamedTuple):
    """A training batch of n images, or a part of one.

    Attributes
    ----------
    x, target : (n, ...) array
    t : (n,) int64 array
    labels : (n,) int64 array or None
    terms : (n, columns) array or None
        As of `LayerBackend.squared_error`; they are not drawn.
    covariates : (n, columns) array or None
    known, marks : (n, ...) array or None
        Like x: what is known of its values, else 0, and 1 where they are known, else 0.
    """

    x: Array
    t: Array
    target: Array
    labels: Array | None = None
    terms: Array | None = None
    covariates: Array | None = None
    known: Array | None = None
    marks: Array | None = None


class Recording(Protocol):
    """Operations that were written down, to be done again; it is the caller's, and goes with its memory."""

    def run(self) -> None:
        """Do them."""


class Sampling(Protocol):
    """A sampler's steps with a network's output: see `LayerBackend.record_sampling`."""

    def run(self, x: Array, memory: tuple[Array, ...], row: Row, clip: tuple[float, float] | None, draw: Draw) -> None:
        """Do `Backend.sampler_step` with the output for x."""


class Prepared(Protocol):
    """The weights of some convolutions in the forms that a backend reads best; they lie in memory of its own."""

    def run(self, weights: Sequence[Array]) -> list[list[Array]]:
        """Return for every convolution what `conv` is to be given for its weights, and `conv_backward`.

        That is w itself, or a form that holds what the weights were at this call. The weights are views of one buffer,
        always as far from each other as at first.
        """


class Later(NamedTuple):
    """Gradients of parameters that wait: see `LayerBackend.gradients_together`.

    Attributes
    ----------
    begin : callable
        begin() starts to make those that have waited so far.
    finish : callable
        finish() has what was begun be there before anything else is done.
    """

    begin: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None


@runtime_checkable
class LayerBackend(Backend, Protocol):
    """What a backend provides besides `Backend` to run image networks."""

    repeats_resize: bool
    """Whether `resize` may be among the operations of `record`."""

    gradients_wait: int
    """How many convolutions' gradients of parameters `gradients_together` may keep waiting; 0: none."""

    def queue(self) -> int:
        """Return which queue work is issued on now: work on another one does not wait for it, nor for its memory."""

    def address(self, array: Array) -> int:
        """Return where an array lies in memory."""

    def prepare(self, convs: Sequence[ConvShapes], backward: bool) -> Prepared:
        """Return what prepares the weights of convolutions; without `backward` its second forms are of no use."""

    def conv(
        self,
        geometry: Conv,
        x: Array,
        w: Array,
        b: Array,
        out: Array,
        *,
        shift: Array | None = None,
        residual: Array | None = None,
    ) -> None:
        """Fill `out` (N, H', W', K) with the correlation of x (N, H, W, C) and w (rows, columns, C, K), plus b (K,).

        ``out[n, i, j, k] = sum over r, s, c of X[n, i stride + r, j stride + s, c] w[r, s, c, k]``, X being x repeated
        and padded. `shift` (N, K), per image and channel, and `residual`, like `out`, are added after b, in this order.
        A kernel of (1, 1) is a linear layer over pixels, or over rows (N, 1, 1, C). `w` may be what `prepare` returned.
        """

    def conv_backward(
        self,
        geometry: Conv,
        dy: Array,
        x: Array,
        w: Array,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
        *,
        dshift: Array | None = None,
        add: bool = False,
    ) -> None:
        """Fill `dx`, dw, db and `dshift` for dy like `out`; with `add`, dx is added to. The residual's is dy itself.

        Both of dw and db may be None: of x only the shape is used then.
        """

    def gradients_together(self) -> AbstractContextManager[Later]:
        """Return a context within which gradients of parameters may come later, many of them by few launches.

        `conv_backward` may leave dw, db and `dshift` to the next `Later.begin`, from which on they are made, maybe
        beside all else, until `Later.finish`; `norm_backward` may leave dgamma and dbeta to the context's end, which
        begins and finishes everything. Until they are there the arrays that they are made of must stay as they are: dy
        and x, and `modulation`. No bits depend on it.
        """

    def linears(self, x: Array, layers: Sequence[tuple[Array, Array, Array]]) -> None:
        """Fill the last of every (w, b, out) with a linear layer, as `conv` with one pixel does, of x (N, 1, 1, C)."""

    def linears_backward(self, dx: Array, layers: Sequence[tuple[Array, Array]], *, add: bool = False) -> None:
        """Fill `dx` (N, 1, 1, C) for all (dy, w) of linear layers of one x; with `add`, dx is added to."""

    def norm(self, layer: Norm, out: Array, *, eps: float, parts: tuple[Array, Array] | None = None) -> None:
        """Fill `out` with GroupNorm of x, and the layer's statistics.

        Every group of C / groups neighbouring channels of an image is shifted to mean 0 and divided by
        sqrt(variance + eps), the biased variance.
        x is filled first with two `parts`, as `concatenate` joins them, where they are given.
        """

    def norm_backward(
        self,
        layer: Norm,
        dy: Array,
        dx: Array,
        grads: Affine,
        *,
        add: bool = False,
        parts: tuple[Array, Array] | None = None,
    ) -> None:
        """Fill `dx` and `grads`; with `add`, dx is added to. dx may be dy where `add` is off.

        Two `parts` are filled with those of dx, as `concatenate` joined them; what dx holds then is not defined.
        """

    def norm_tangent(self, layer: Norm, dh: Array, out: Array, *, modulation_tangent: Array | None = None) -> None:
        """Fill `out`, which may be dh, with the tangent of what `norm` makes of the normalised values h, for theirs.

        With u = gamma h + beta and v = (1 + gain) u + shift: dv = (1 + gain) gamma dh + dgain u + dshift, and with
        `silu` SiLU'(v) dv. `modulation_tangent` (N, 2 C) is that of `modulation`; without it and without `silu`, stats
        may be None, and the channels may be normalised in another way.
        """

    def layer_norm(self, layer: Norm, out: Array, *, eps: float) -> None:
        """Fill `out` with LayerNorm over the channels of x (Ba et al. 2016), and the layer's statistics.

        Every pixel is shifted to mean 0 and divided by sqrt(variance + eps), the biased variance.
        """

    def layer_norm_backward(self, layer: Norm, dy: Array, dx: Array, grads: Affine, *, add: bool = False) -> None:
        """Fill `dx` and `grads`; with `add`, dx is added to. dx may be dy where `add` is off."""

    def attention(self, qkv: Array, out: Array, log_sums: Array, *, heads: int) -> None:
        """Fill `out` (N, L, C) with softmax(q k^T / sqrt(C / heads)) v of every head.

        `qkv` (N, L, 3 C) holds queries, keys and values, head by head within each. `log_sums` (N, heads, L) takes
        the logarithm of every row's sum of exponentials, for the backward pass.
        """

    def attention_backward(
        self, dy: Array, qkv: Array, out: Array, log_sums: Array, dqkv: Array, *, heads: int
    ) -> None:
        """Fill `dqkv` (N, L, 3 C)."""

    def attention_tangent(
        self, dqkv: Array, qkv: Array, out: Array, log_sums: Array, dout: Array, *, heads: int
    ) -> None:
        """Fill `dout` (N, L, C) with the tangent of `out` for that of `qkv`."""

    def silu(self, x: Array, out: Array) -> None:
        """Fill `out` with x / (1 + exp(-x))."""

    def silu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        """Fill `dx`; with `add`, add to it."""

    def gelu(self, x: Array, out: Array) -> None:
        """Fill `out` with GELU in its tanh form (Hendrycks and Gimpel 2016).

        That is x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
        """

    def gelu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        """Fill `dx`; with `add`, add to it."""

    def offset(self, x: Array, p: Array, out: Array) -> None:
        """Fill `out` with x (N, H, W, C) plus p (H, W, C), the same for every image; it may be x."""

    def offset_backward(self, dy: Array, dp: Array) -> None:
        """Fill `dp` with the sum of the images of dy, in their order or in groups that N alone decides. dx is dy."""

    def add(self, a: Array, b: Array, out: Array) -> None:
        """Fill `out` with a + b; it may be one of them."""

    def concatenate(self, a: Array, b: Array, out: Array) -> None:
        """Fill `out` (..., A + B) with a (..., A) and b (..., B), side by side."""

    def split(self, x: Array, a: Array, b: Array, *, add: bool = False) -> None:
        """Fill `a` and `b` with the two parts of x, as `concatenate` joined them; with `add`, add to `a`."""

    def resize(self, x: Array, out: Array) -> None:
        """Fill `out` (N, H', W', C) with x (N, H, W, C), rows and columns cut off at the end, or zeros there."""

    def take(self, table: Array, index: Array, out: Array, *, add: bool = False) -> None:
        """Fill `out` (N, C) with the rows `index` (N,) int64 of a table; with `add`, add to it."""

    def take_backward(self, dy: Array, index: Array, dtable: Array) -> None:
        """Fill `dtable` with sums of the rows of dy (N, C), in rising order for each row of the table."""

    def draw_batch(self, draws: TrainingDraws, batch: Batch, step: int, first: int) -> None:
        """Fill a batch with so many positions of that of a training step, those from `first` on."""

    def dropout(self, x: Array, out: Array, rate: float, first_block: int, draw: Draw) -> None:
        """Fill `out` with x / (1 - rate) where it is kept, and 0 elsewhere; also the backward pass, dx from dy.

        Value j of image i, in the order of memory, is dropped where word j % 4 of Philox block
        ``first_block + j // 4`` of row i of the draw is below rate 2^32.
        """

    def squared_error(self, y: Array, target: Array, dy: Array, loss: Array, terms: Array | None = None) -> None:
        """Fill `dy` with 2 (y - target) / size, and `loss` (1,) float64 with the mean of (y - target)^2.

        Where the target is NaN y - target counts as 0.

        `terms` (n, columns), for the n rows of the target, say what the loss of a row's values is instead. One column,
        w, makes it w d^2 with d = y - target. With six, (w, g, h, V, K, A), y and `dy` have twice the channels of the
        target, y = [mean, v], and the loss is ``w d^2 + g (h v + (V + K d^2) exp(-h v) + A)`` with d = mean - target:
        the bound of a learned variance, in whose gradient d is a constant (Nichol and Dhariwal 2021, equation 16).
        """

    def finish_step(self, loss: Array, step: int, state: TrainState, options: AdamW, results: Array) -> None:
        """Do `adamw` with a loss that is given as an array of one value; `results` is as in `mlp_training`."""

    def record(self, body: Callable[[], None], places: Sequence[Array | None] = ()) -> Recording:
        """Return what does body(): operations of this backend, and nothing else, on arrays that stay where they are.

        `places` are among these arrays, but their memory is not kept: whoever runs it has them there.
        """

    def record_training(self, gradient: Callable[[int], Array], state: TrainState, results: Array) -> Training:
        """Return what calls ``gradient(step)``, which fills state.grads and returns the loss, and does `finish_step`.

        `gradient` is as a body of `record`; to the operations that want the training step it gives `step`.
        """

    def record_sampling(self, output: Callable[[], Array], state: Array) -> Sampling:
        """Return what does `sampler_step` with the denoiser's output (n, D) that ``output()`` returns.

        `output` is as a body of `record`. It reads x from `state` (n, D), which holds a copy of it before; what that
        holds afterwards is not defined.
        """


@runtime_checkable
class PartsBackend(LayerBackend, Protocol):
    """A backend on which a team takes the batch of a perceptron in parts, as it does those of other networks."""

    def mlp_parts(self, plan: MLPPlan, params: Array, draws: TrainingDraws) -> PartGradient:
        """Return what fills the gradient of a part of a training step's batch; a part always has the same array."""
