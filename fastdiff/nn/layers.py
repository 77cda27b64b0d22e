"""Layers of image networks: recorded once for a batch size, run many times in one arena.

A network is written as calls of a `Program`. They compute nothing: each records an operation, forward and backward
side by side, and returns the `Value` that it makes. `Program.plan` then places every array in the arena, from the
operation that makes it to the last one that needs it, in the backward pass too; a run allocates nothing. The
operations themselves, with their formulas, are those of `LayerBackend`.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array
from fastdiff.backends.layers import Conv, ConvShapes, LayerBackend, Prepared, Recording
from fastdiff.nn.params import ALIGNMENT
from fastdiff.noise import Draw, Stream

Record = Callable[[list[Array], Callable[[], None]], Recording]

NO_DRAW = Draw(0, Stream.DROPOUT)


class _Block:
    """A place in the arena, in use at the times start .. stop."""

    def __init__(self, shape: tuple[int, ...], start: int) -> None:
        self.size = -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        self.start = self.stop = start
        self.offset = 0


class Value:
    """An array of a program, and its gradient.

    Attributes
    ----------
    shape : tuple of int
    trained : bool
        Whether it depends on parameters, and so has a gradient.
    data, grad : array or None
        Set when memory is placed, or at a run for parameters and what is given.
    forms : list of array
        Of weights: what a convolution takes for them, forward and backward.
    """

    def __init__(self, shape: tuple[int, ...], trained: bool = True) -> None:
        self.shape, self.trained = shape, trained
        self.data: Array = None
        self.grad: Array = None
        self.forms: list[Array] = []
        self.block: _Block | None = None
        self.grad_block: _Block | None = None

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.shape[-1]


@dataclass
class _Operation:
    """What one call recorded.

    Attributes
    ----------
    forward : callable
        ``forward(be)`` fills `makes`, the first of which is the result.
    backward : callable or None
        ``backward(be, add)`` fills the gradients of `fresh` and fills or, with `add`, adds to that of `source`.
    needs : tuple of Value
        Whose data the backward pass reads.
    through : Value or None
        A term of the result: its gradient is the result's own.
    in_place : bool
        Whether the gradient of `source` may take the place of the result's.
    """

    forward: Callable[[LayerBackend], None]
    backward: Callable[[LayerBackend, bool], None] | None
    makes: tuple[Value, ...]
    reads: tuple[Value, ...]
    needs: tuple[Value, ...] = ()
    source: Value | None = None
    fresh: tuple[Value, ...] = ()
    through: Value | None = None
    in_place: bool = False
    add: bool = field(default=False, init=False)
    add_through: bool = field(default=False, init=False)


class Program:
    """The operations of a network on n images.

    Parameters
    ----------
    n : int
        Number of images.
    training : bool
        Whether a backward pass follows; without it dropout is left out.

    Attributes
    ----------
    size : int
        Values in the arena, once planned.
    """

    def __init__(self, n: int, training: bool) -> None:
        self.n, self.training = n, training
        self.size = 0
        self._operations: list[_Operation] = []
        self._tensors: dict[str, Value] = {}
        self._given: dict[str, Value] = {}
        self._fixed: set[str] = set()
        self._own: dict[tuple[str, tuple[int, ...]], Array] = {}  # copies of what a run is given
        self._convs: list[tuple[Conv, Value, Value, str]] = []
        self._prepared: Prepared | None = None
        self._forms: list[list[Array]] | None = None  # of the weights, where a run is given them
        self._target: Array = None
        self._loss: Array = None
        self._terms: Array = None
        self._repeats = True  # whether every run does the same, but for the values in its arrays
        self._resizes = False
        self._blocks: list[_Block] = []
        self._dropped = 0  # blocks of the noise law that dropout has used, for each image
        self._draw = NO_DRAW

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the operations use, in the order of their use."""
        return {name: value.shape for name, value in self._tensors.items()}

    def given(self, name: str, shape: tuple[int, ...], *, fixed: bool = False) -> Value:
        """Return an array that every run is given under a name; a `fixed` one is the same in all of them."""
        self._given[name] = value = Value(shape, trained=False)
        if fixed:
            self._fixed.add(name)
        return value

    def parameter(self, name: str, shape: tuple[int, ...]) -> Value:
        """Return a tensor of the network."""
        self._tensors[name] = value = Value(shape)
        return value

    def _record(self, operation: _Operation) -> Value:
        self._operations.append(operation)
        return operation.makes[0]

    def conv(
        self,
        name: str,
        x: Value,
        outputs: int,
        geometry: Conv = Conv(),  # noqa: B008 - immutable
        *,
        shift: Value | None = None,
        residual: Value | None = None,
    ) -> Value:
        """Record a convolution, or a linear layer; `shift` has one row an image."""
        w = self.parameter(f"{name}.weight", (*geometry.kernel, x.width, outputs))
        b = self.parameter(f"{name}.bias", (outputs,))
        y = Value((self.n, *geometry.size(*x.shape[1:3]), outputs))
        self._convs.append((geometry, x, y, f"{name}.weight"))

        def forward(be: LayerBackend) -> None:
            added = residual and residual.data
            be.conv(geometry, x.data, w.forms[0], b.data, y.data, shift=_rows(shift), residual=added)

        def backward(be: LayerBackend, add: bool) -> None:
            be.conv_backward(
                geometry, y.grad, x.data, w.forms[1], x.grad, w.grad, b.grad, dshift=_rows(shift, "grad"), add=add
            )

        parts = tuple(value for value in (shift, residual) if value is not None)
        fresh = () if shift is None else (shift,)
        return self._record(_Operation(forward, backward, (y,), (x, *parts), (x,), x, fresh, residual))

    def norm(
        self, name: str, x: Value, *, groups: int, eps: float, silu: bool, modulation: Value | None = None
    ) -> Value:
        """Record GroupNorm; `modulation` has one row (gain, shift) an image."""
        gamma, beta = (self.parameter(f"{name}.{part}", (x.width,)) for part in ("weight", "bias"))
        y, stats = Value(x.shape), Value((self.n, groups, 2))

        def forward(be: LayerBackend) -> None:
            be.norm(
                x.data, gamma.data, beta.data, y.data, stats.data,
                groups=groups, eps=eps, silu=silu, modulation=_rows(modulation),
            )  # fmt: skip

        def backward(be: LayerBackend, add: bool) -> None:
            be.norm_backward(
                y.grad, x.data, gamma.data, beta.data, stats.data, x.grad, gamma.grad, beta.grad, groups=groups,
                silu=silu, modulation=_rows(modulation), dmodulation=_rows(modulation, "grad"), add=add,
            )  # fmt: skip

        parts = () if modulation is None else (modulation,)
        return self._record(
            _Operation(forward, backward, (y, stats), (x, *parts), (x, stats, *parts), x, parts, in_place=True)
        )

    def layer_norm(self, name: str, x: Value, *, eps: float) -> Value:
        """Record LayerNorm over the channels of every pixel."""
        gamma, beta = (self.parameter(f"{name}.{part}", (x.width,)) for part in ("weight", "bias"))
        y, stats = Value(x.shape), Value((*x.shape[:-1], 2))
        unused = () if x.trained else (Value(x.shape),)  # takes the gradient that nobody wants

        def forward(be: LayerBackend) -> None:
            be.layer_norm(x.data, gamma.data, beta.data, y.data, stats.data, eps=eps)

        def backward(be: LayerBackend, add: bool) -> None:
            (dx,) = (value.grad for value in unused or (x,))
            be.layer_norm_backward(y.grad, x.data, gamma.data, stats.data, dx, gamma.grad, beta.grad, add=add)

        return self._record(
            _Operation(forward, backward, (y, stats, *unused), (x,), (x, stats), x, unused, in_place=True)
        )

    def offset(self, name: str, x: Value) -> Value:
        """Record x plus a tensor of one image's shape, the same for all: a learned embedding of positions."""
        p, y = self.parameter(f"{name}.weight", x.shape[1:]), Value(x.shape)

        def forward(be: LayerBackend) -> None:
            be.offset(x.data, p.data, y.data)

        def backward(be: LayerBackend, add: bool) -> None:
            be.offset_backward(y.grad, p.grad)

        return self._record(_Operation(forward, backward, (y,), (x,), through=x if x.trained else None))

    def attention(self, qkv: Value, heads: int) -> Value:
        """Record self-attention over the pixels of an image."""
        n, height, width, channels = qkv.shape
        y = Value((n, height, width, channels // 3))
        log_sums = Value((n, heads, height * width))

        def pixels(array: Array) -> Array:
            return array.reshape(n, height * width, array.shape[-1])

        def forward(be: LayerBackend) -> None:
            be.attention(pixels(qkv.data), pixels(y.data), log_sums.data, heads=heads)

        def backward(be: LayerBackend, add: bool) -> None:
            dy, dqkv = pixels(y.grad), pixels(qkv.grad)
            be.attention_backward(dy, pixels(qkv.data), pixels(y.data), log_sums.data, dqkv, heads=heads)

        return self._record(
            _Operation(forward, backward, (y, log_sums), (qkv,), (qkv, y, log_sums), fresh=(qkv,))
        )  # fmt: skip

    def silu(self, x: Value) -> Value:
        """Record SiLU."""
        y = Value(x.shape)
        return self._record(
            _Operation(
                lambda be: be.silu(x.data, y.data),
                lambda be, add: be.silu_backward(y.grad, x.data, x.grad, add=add),
                (y,), (x,), (x,), x,
            )
        )  # fmt: skip

    def gelu(self, x: Value) -> Value:
        """Record GELU, in its tanh form."""
        y = Value(x.shape, x.trained)

        def forward(be: LayerBackend) -> None:
            be.gelu(x.data, y.data)

        def backward(be: LayerBackend, add: bool) -> None:
            be.gelu_backward(y.grad, x.data, x.grad, add=add)

        return self._record(_Operation(forward, backward if x.trained else None, (y,), (x,), (x,), x))

    def concatenate(self, a: Value, b: Value) -> Value:
        """Record the channels of a, then those of b; whatever else uses them has been recorded before."""
        y = Value((*a.shape[:-1], a.width + b.width))
        return self._record(
            _Operation(
                lambda be: be.concatenate(a.data, b.data, y.data),
                lambda be, add: be.split(y.grad, a.grad, b.grad),
                (y,), (a, b), fresh=(a, b),
            )
        )  # fmt: skip

    def take(self, table: Value, index: Value) -> Value:
        """Record the rows of a table that an image's index names, as (n, 1, 1, width)."""
        y = Value((self.n, 1, 1, table.width), table.trained)
        return self._record(
            _Operation(
                lambda be: be.take(table.data, index.data, _rows(y)),
                (lambda be, add: be.take_backward(_rows(y, "grad"), index.data, table.grad)) if table.trained else None,
                (y,), (table, index),
            )
        )  # fmt: skip

    def dropout(self, x: Value, rate: float) -> Value:
        """Record dropout, in a training program with a rate; its rows of the noise law are positions in the batch."""
        first, values = self._dropped, math.prod(x.shape[1:])
        self._dropped += -(-values // 4)
        if not self.training or rate == 0:
            return x
        self._repeats = False
        y = Value(x.shape)
        return self._record(
            _Operation(
                lambda be: be.dropout(x.data, y.data, rate, first, self._draw),
                lambda be, add: be.dropout(y.grad, x.grad, rate, first, self._draw),
                (y,), (x,), fresh=(x,),
            )
        )  # fmt: skip

    def resize(self, x: Value, height: int, width: int) -> Value:
        """Record x with rows and columns cut off at the end, or zeros there."""
        if x.shape[1:3] == (height, width):
            return x
        self._resizes = True
        y = Value((self.n, height, width, x.width), x.trained)
        return self._record(
            _Operation(
                lambda be: be.resize(x.data, y.data),
                (lambda be, add: be.resize(y.grad, x.grad)) if x.trained else None,
                (y,), (x,), fresh=(x,) if x.trained else (),
            )
        )  # fmt: skip

    def own(self, be: LayerBackend, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return the program's own array of a name, always in the same place: where a run finds it, it copies none."""
        if (name, shape) not in self._own:
            self._own[name, shape] = be.empty(shape, dtype)
        return self._own[name, shape]

    def _copy(self, be: LayerBackend, name: str, array: Array) -> Array:
        own = self.own(be, name, array.shape, array.dtype)
        if own is not array:
            own[...] = array
        return own

    def plan(self) -> None:
        """Decide the place of every array; the last value recorded is the result.

        Operation i of F runs forward at time i and backward at time 2 F - i; at time F the caller has the result, and
        fills its gradient. The gradient of a value is filled by the last operation that uses it and added to by those
        before, so it lives from the former's backward pass to that of the value's own operation.
        """
        end = len(self._operations)
        for time, operation in enumerate(self._operations):
            for value in operation.makes:
                value.block = self._block(value.shape, time)
            _use(operation.reads, time)
        self.output = self._operations[-1].makes[0]
        _use((self.output,), end)
        if self.training:
            self.output.grad_block = self._block(self.output.shape, end)
            for time, operation in enumerate(reversed(self._operations), end + 1):
                if operation.backward is not None:
                    self._plan_backward(operation, time)
        self.size = _arrange(self._blocks)

    def _plan_backward(self, operation: _Operation, time: int) -> None:
        block = operation.makes[0].grad_block
        assert block is not None
        block.stop = time
        _use(operation.needs, time)
        for value in operation.fresh:
            assert value.grad_block is None
            value.grad_block = self._block(value.shape, time)
        source, through = operation.source, operation.through
        if source is not None and source.trained:
            operation.add = source.grad_block is not None
            if source.grad_block is None:
                source.grad_block = block if operation.in_place else self._block(source.shape, time)
            source.grad_block.stop = time
        if through is not None:
            operation.add_through = through.grad_block is not None
            if through.grad_block is None:
                through.grad_block = block  # nothing needs the result's gradient any more
            through.grad_block.stop = time

    def _block(self, shape: tuple[int, ...], time: int) -> _Block:
        self._blocks.append(_Block(shape, time))
        return self._blocks[-1]

    def lay(self, arena: Array) -> None:
        """Give every value its part of a flat buffer of `size` values."""
        for value in itertools.chain.from_iterable(operation.makes for operation in self._operations):
            for name, block in (("data", value.block), ("grad", value.grad_block)):
                if block is not None:
                    part = arena[block.offset : block.offset + math.prod(value.shape)]
                    setattr(value, name, part.reshape(value.shape))

    def prepare(self, be: LayerBackend, *, backward: bool) -> Prepared:
        """Do `LayerBackend.prepare` for all convolutions, in the order of their use."""
        return be.prepare([ConvShapes(geometry, x.shape, y.shape) for geometry, x, y, _ in self._convs], backward)

    def weights(self, params: Mapping[str, Array]) -> list[Array]:
        """Return the weights of all convolutions, in the order of their use."""
        return [params[name] for *_, name in self._convs]

    def run(
        self,
        be: LayerBackend,
        params: Mapping[str, Array],
        given: Mapping[str, Array],
        grads: Mapping[str, Array] | None = None,
        target: Array | None = None,
        terms: Array | None = None,
        *,
        forms: list[list[Array]] | None = None,
        record: Record | None = None,
        draw: Draw = NO_DRAW,
    ) -> Array:
        """Return the result, which stays valid until the next run in the arena.

        Parameters
        ----------
        be : LayerBackend
        params, given : mapping of str to array
        grads, target, terms : optional
            Fill the first with the gradients of the mean squared error, or of what the terms make of it
            (`LayerBackend.squared_error`), and return that, as an array of one value.
        forms : list of list of array, optional
            The weights as they were prepared; by default this is done in the run.
        record : callable, optional
            ``record(places, body)`` returns what does body() for arrays in these places, which are the caller's; it may
            have been made by an earlier run.
        draw : Draw, optional
            Of dropout.
        """
        self._draw, self._forms = draw, forms
        for name, value in self._given.items():
            value.data = given[name] if name in self._fixed else self._copy(be, name, given[name])
        for name, value in self._tensors.items():
            value.data, value.grad = params[name], None if grads is None else grads[name]
        if target is not None:
            self._target, self._loss = self._copy(be, "target", target), self.own(be, "loss", (1,), np.float64)
        self._terms = None if terms is None else self._copy(be, "terms", terms)
        body = partial(self._work, be, grads is not None)
        if record is not None and self._repeats and (be.repeats_resize or not self._resizes):
            tensor = next(iter(self._tensors.values()))  # the others lie as far from it as ever
            places = [tensor.data, tensor.grad, self._terms, *(given[name] for name in sorted(self._fixed))]
            record(places, body).run()
        else:
            body()
        for value in (*self._given.values(), *self._tensors.values()):
            value.data = value.grad = None  # they are the caller's
            value.forms = []
        self._forms = None
        return self.output.data if grads is None else self._loss

    def _work(self, be: LayerBackend, backward: bool) -> None:
        """Everything that a run does with the arrays that it has been given."""
        forms = self._forms
        if forms is None:
            if self._prepared is None:
                self._prepared = self.prepare(be, backward=backward)
            forms = self._prepared.run([self._tensors[name].data for *_, name in self._convs])
        for (*_, name), pair in zip(self._convs, forms, strict=True):
            self._tensors[name].forms = pair
        for operation in self._operations:
            operation.forward(be)
        if not backward:
            return
        be.squared_error(self.output.data, self._target, self.output.grad, self._loss, self._terms)
        for operation in reversed(self._operations):
            if operation.backward is not None:
                operation.backward(be, operation.add)
            if operation.add_through and operation.through is not None:
                be.add(operation.through.grad, operation.makes[0].grad, operation.through.grad)


def _rows(value: Value | None, which: str = "data") -> Array:
    """Data or gradient of a value as rows (n, width)."""
    array = None if value is None else getattr(value, which)
    return None if array is None else array.reshape(len(array), -1)


def _use(values: tuple[Value, ...], time: int) -> None:
    for value in values:
        if value.block is not None:
            value.block.stop = time


def _arrange(blocks: list[_Block]) -> int:
    """Give every block an offset such that no two overlap in memory and time, large ones first; return the size."""
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda block: -block.size):
        for other in placed:  # from low to high offsets: the first gap that is wide enough
            if other.start <= block.stop and block.start <= other.stop:
                if other.offset - block.offset >= block.size:
                    break
                block.offset = max(block.offset, other.offset + other.size)
        insort(placed, block, key=lambda block: block.offset)
    return max((block.offset + block.size for block in placed), default=0)
