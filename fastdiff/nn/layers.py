"""Layers of image networks: recorded once for a batch size, run many times in one arena.

A network is written as calls of a `Program`. They compute nothing: each records an operation, with its backward pass
and its tangent side by side, and returns the `Value` that it makes. `Program.plan` then places every array in the
arena, from the operation that makes it to the last one that needs it, in the backward pass too; a run allocates
nothing. The operations themselves, with their formulas, are those of `LayerBackend`.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array
from fastdiff.backends.layers import Affine, Conv, ConvShapes, Later, LayerBackend, Norm, Prepared, Recording
from fastdiff.errors import ArgumentError
from fastdiff.nn.params import ALIGNMENT
from fastdiff.noise import Draw, Stream

Record = Callable[[list[Array], Callable[[], None]], Recording]

Purpose = Literal["output", "training", "vjp", "jvp"]

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
    varies : bool
        Whether it depends on what derivatives are taken by, parameters or x, and so has a gradient, or a tangent.
    data, grad : array or None
        Set when memory is placed, or at a run for parameters and what is given. In a program for "jvp" the latter is
        the tangent.
    forms : list of array
        Of weights: what a convolution takes for them, forward and backward.

    Examples
    --------
    >>> p = fd.nn.Program(4, "output")
    >>> x = p.given("x", (4, 8, 8, 3))
    >>> isinstance(x, fd.nn.Value), x.shape, x.width
    (True, (4, 8, 8, 3), 3)
    """

    def __init__(self, shape: tuple[int, ...], varies: bool = True) -> None:
        self.shape, self.varies = shape, varies
        self.data: Array = None
        self.grad: Array = None
        self.forms: list[Array] = []
        self.block: _Block | None = None
        self.grad_block: _Block | None = None

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.shape[-1]


@dataclass(eq=False)
class _Operation:
    """What one call recorded.

    Attributes
    ----------
    forward : callable
        ``forward(be)`` fills `makes`, the first of which is the result.
    backward : callable or None
        ``backward(be, add)`` fills the gradients of `fresh` and fills or, with `add`, adds to that of `source`; None
        where the result has no gradient.
    tangent : callable or None
        ``tangent(be)`` fills the tangent of the result, after `forward`.
    needs : tuple of Value
        Whose data the backward pass reads.
    through : Value or None
        A term of the result: its gradient is the result's own.
    in_place : bool
        Whether the gradient of `source` may take the place of the result's.
    waits : bool
        Whether the backward pass may leave gradients of parameters, made of the result's gradient and of what it reads,
        for later; and that of `fresh`.
    linear : (Value, Value) or None
        Weights and biases, if it is a linear layer of one pixel and nothing else.
    beside : list of _Operation
        All linear layers of what it reads, itself among them, where a backend computes them together: their backward
        passes come when it is the first one's turn.
    joins : bool
        Whether it is a concatenation.
    begins : bool
        Whether the gradients that wait are begun after its backward pass, its own among them.
    finishes : bool
        Whether those that were begun are there before its backward pass, which may change or need something of theirs.
    """

    forward: Callable[[LayerBackend], None]
    backward: Callable[[LayerBackend, bool], None] | None
    makes: tuple[Value, ...]
    reads: tuple[Value, ...]
    tangent: Callable[[LayerBackend], None] | None = None
    needs: tuple[Value, ...] = ()
    source: Value | None = None
    fresh: tuple[Value, ...] = ()
    through: Value | None = None
    in_place: bool = False
    waits: bool = False
    joins: bool = False
    linear: tuple[Value, Value] | None = None
    beside: list[_Operation] = field(default_factory=list, init=False)
    begins: bool = field(default=False, init=False)
    finishes: bool = field(default=False, init=False)
    again: list[tuple[Value, Value]] = field(default_factory=list, init=False)  # of `fresh`: gradients that there are
    add: bool = field(default=False, init=False)
    add_through: bool = field(default=False, init=False)


class Program:
    """The operations of a network on n images.

    Parameters
    ----------
    n : int
        Number of images.
    purpose : {"output", "training", "vjp", "jvp"}
        What a run computes: the output; the gradient of a loss by the parameters; or a product of a vector with the
        output's Jacobian by "x", transposed ("vjp", a backward pass without the gradients of parameters) or not ("jvp",
        tangents beside the forward pass). Dropout is left out of all but "training".

    Attributes
    ----------
    size : int
        Values in the arena, once planned.
    product : Value
        Whose `grad` is the product with the Jacobian, in a planned program for "vjp" or "jvp".

    Examples
    --------
    >>> p = fd.nn.Program(4, "output")  # on four images
    >>> x = p.given("x", (4, 8, 8, 1))
    >>> h = p.silu(p.conv("first", x, 16, fd.nn.Conv((3, 3), pad=(1, 1, 1, 1))))
    >>> h.shape, p.parameters
    ((4, 8, 8, 16), {'first.weight': (3, 3, 1, 16), 'first.bias': (16,)})
    """

    product: Value

    def __init__(self, n: int, purpose: Purpose) -> None:
        self.n, self.purpose = n, purpose
        self._by_input = purpose in ("vjp", "jvp")
        self.size = 0
        self._operations: list[_Operation] = []
        self._tensors: dict[str, Value] = {}
        self._given: dict[str, Value] = {}
        self._fixed: set[str] = set()
        self._own: dict[tuple[str, tuple[int, ...]], Array] = {}  # copies of what a run is given
        self._constants: dict[tuple[tuple[int, ...], float], Value] = {}
        self._convs: list[tuple[Conv, Value, Value, str]] = []
        self._prepared: Prepared | None = None
        self._forms: list[list[Array]] | None = None  # of the weights, where a run is given them
        self._target: Array = None
        self._loss: Array = None
        self._terms: Array = None
        self._repeats = True  # whether every run does the same, but for the values in its arrays
        self._resizes = False
        self._blocks: list[_Block] = []
        self._modulations: list[Value] = []
        self._waits = False
        self._dropped = 0  # blocks of the noise law that dropout has used, for each image
        self._draw = NO_DRAW

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the operations use, in the order of their use."""
        return {name: value.shape for name, value in self._tensors.items()}

    @property
    def convolves_rows(self) -> bool:
        """Whether a convolution has several taps along rows, and one across."""
        return any(geometry.kernel[0] == 1 < geometry.kernel[1] for geometry, *_ in self._convs)

    def given(self, name: str, shape: tuple[int, ...], *, fixed: bool = False) -> Value:
        """Return an array that every run is given under a name; a `fixed` one is the same in all of them."""
        self._given[name] = value = Value(shape, self._by_input and name == "x")
        if fixed:
            self._fixed.add(name)
        return value

    def parameter(self, name: str, shape: tuple[int, ...]) -> Value:
        """Return a tensor of the network."""
        self._tensors[name] = value = Value(shape, not self._by_input)
        return value

    def _result(self, shape: tuple[int, ...], *sources: Value) -> Value:
        return Value(shape, any(source.varies for source in sources))

    def _constant(self, shape: tuple[int, ...], number: float) -> Value:
        """An array of one number, as data and as tangent."""
        return self._constants.setdefault((shape, number), Value(shape, False))

    def _tangent(self, value: Value) -> Value:
        """The value, or one whose tangent is zero where it has none."""
        return value if value.varies else self._constant(value.shape, 0.0)

    def _spare(self, *shapes: tuple[int, ...]) -> tuple[Value, ...]:
        """Room for the gradients of parameters, which a product with the Jacobian by x has no use for."""
        return tuple(Value(shape) for shape in shapes) if self._by_input else ()

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
        parts = tuple(value for value in (shift, residual) if value is not None)
        y = self._result((self.n, *geometry.size(*x.shape[1:3]), outputs), x, w, b, *parts)
        self._convs.append((geometry, x, y, f"{name}.weight"))
        dx, zero = (self._tangent(x), self._constant(b.shape, 0.0)) if self.purpose == "jvp" else (x, b)

        def forward(be: LayerBackend) -> None:
            added = residual and residual.data
            be.conv(geometry, x.data, w.forms[0], b.data, y.data, shift=_rows(shift), residual=added)

        def backward(be: LayerBackend, add: bool) -> None:
            if x.varies or fresh or not self._by_input:
                be.conv_backward(
                    geometry, y.grad, x.data, w.forms[1], x.grad, w.grad, b.grad, dshift=_rows(shift, "grad"), add=add
                )

        def tangent(be: LayerBackend) -> None:
            added = residual and residual.grad
            be.conv(geometry, dx.grad, w.forms[0], zero.data, y.grad, shift=_rows(shift, "grad"), residual=added)

        linear = None if parts or geometry != Conv() or x.shape[1:3] != (1, 1) else (w, b)
        fresh = () if shift is None or not shift.varies else (shift,)
        through = residual if residual is not None and residual.varies else None
        return self._record(
            _Operation(
                forward, backward if y.varies else None, (y,), (x, *parts), tangent,
                () if self._by_input else (x,), x, fresh, through, waits=not self._by_input,
                linear=linear,
            )
        )  # fmt: skip

    def norm(
        self, name: str, x: Value, *, groups: int, eps: float, silu: bool, modulation: Value | None = None
    ) -> Value:
        """Record GroupNorm; `modulation` has one row (gain, shift) an image.

        A concatenation that nothing else has read becomes a part of it.
        """
        joins = self._taken_back(x)
        gamma, beta = (self.parameter(f"{name}.{part}", (x.width,)) for part in ("weight", "bias"))
        parts = () if modulation is None else (modulation,)
        self._modulations += parts
        y, stats = self._result(x.shape, x, gamma, beta, *parts), Value((self.n, groups, 2))
        spare, unused = self._spare(gamma.shape, beta.shape), () if x.varies else (Value(x.shape),)
        dx, one, zero = x, gamma, beta
        if self.purpose == "jvp":
            dx, one, zero = self._tangent(x), self._constant(gamma.shape, 1.0), self._constant(beta.shape, 0.0)

        def layer() -> Norm:
            return Norm(x.data, Affine(gamma.data, beta.data, _rows(modulation)), stats.data, silu)

        def forward(be: LayerBackend) -> None:
            be.norm(layer(), y.data, eps=eps, parts=None if joins is None else _pair(joins.reads, "data"))

        def backward(be: LayerBackend, add: bool) -> None:
            (to,), (dgamma, dbeta) = unused or (x,), spare or (gamma, beta)
            grads = Affine(dgamma.grad, dbeta.grad, _rows(modulation, "grad"))
            parts = None if joins is None or joins.backward is None else _pair(joins.fresh, "grad")
            be.norm_backward(layer(), y.grad, to.grad, grads, add=add, parts=parts)

        def tangent(be: LayerBackend) -> None:
            """The Jacobian of the normalised values h is symmetric, so that it is their backward pass."""
            plain = Norm(x.data, Affine(one.data, zero.data), stats.data)
            be.norm_backward(plain, dx.grad, y.grad, Affine(spare[0].data, spare[1].data))
            be.norm_tangent(layer(), y.grad, y.grad, modulation_tangent=_rows(modulation, "grad"))

        fresh = tuple(value for value in (*spare, *unused, *parts) if value.varies)
        makes, reads = (y, stats, *spare, *unused), (x, *parts)
        if joins is not None:
            makes, reads, fresh = (*makes, *joins.makes), (*reads, *joins.reads), (*fresh, *joins.fresh)
        return self._record(
            _Operation(
                forward, backward if y.varies else None, makes, reads, tangent, (x, stats, *parts), x, fresh,
                in_place=True,
            )
        )  # fmt: skip

    def layer_norm(self, name: str, x: Value, *, eps: float) -> Value:
        """Record LayerNorm over the channels of every pixel."""
        gamma, beta = (self.parameter(f"{name}.{part}", (x.width,)) for part in ("weight", "bias"))
        y, stats = self._result(x.shape, x, gamma, beta), Value((*x.shape[:-1], 2))
        unused = () if x.varies else (Value(x.shape),)  # takes the gradient that nobody wants
        spare, one = self._spare(gamma.shape, beta.shape), gamma
        if self.purpose == "jvp":
            one = self._constant(gamma.shape, 1.0)

        def layer() -> Norm:
            return Norm(x.data, Affine(gamma.data, beta.data), stats.data)

        def forward(be: LayerBackend) -> None:
            be.layer_norm(layer(), y.data, eps=eps)

        def backward(be: LayerBackend, add: bool) -> None:
            (to,), (dgamma, dbeta) = unused or (x,), spare or (gamma, beta)
            be.layer_norm_backward(layer(), y.grad, to.grad, Affine(dgamma.grad, dbeta.grad), add=add)

        def tangent(be: LayerBackend) -> None:
            plain = Norm(x.data, Affine(one.data, beta.data), stats.data)
            be.layer_norm_backward(plain, x.grad, y.grad, Affine(spare[0].data, spare[1].data))
            be.norm_tangent(layer()._replace(stats=None), y.grad, y.grad)

        return self._record(
            _Operation(
                forward, backward if y.varies else None, (y, stats, *spare, *unused), (x,), tangent, (x, stats), x,
                (*spare, *unused), in_place=True,
            )
        )  # fmt: skip

    def offset(self, name: str, x: Value) -> Value:
        """Record x plus a tensor of one image's shape, the same for all: a learned embedding of positions."""
        p = self.parameter(f"{name}.weight", x.shape[1:])
        y = self._result(x.shape, x, p)
        zero = self._constant(p.shape, 0.0) if self.purpose == "jvp" else p

        def forward(be: LayerBackend) -> None:
            be.offset(x.data, p.data, y.data)

        def backward(be: LayerBackend, add: bool) -> None:
            if p.varies:
                be.offset_backward(y.grad, p.grad)

        def tangent(be: LayerBackend) -> None:
            be.offset(x.grad, zero.data, y.grad)

        through = x if x.varies else None
        return self._record(_Operation(forward, backward if y.varies else None, (y,), (x,), tangent, through=through))

    def attention(self, qkv: Value, heads: int) -> Value:
        """Record self-attention over the pixels of an image."""
        n, height, width, channels = qkv.shape
        y = self._result((n, height, width, channels // 3), qkv)
        log_sums = Value((n, heads, height * width))

        def pixels(array: Array) -> Array:
            return array.reshape(n, height * width, array.shape[-1])

        def forward(be: LayerBackend) -> None:
            be.attention(pixels(qkv.data), pixels(y.data), log_sums.data, heads=heads)

        def backward(be: LayerBackend, add: bool) -> None:
            dy, dqkv = pixels(y.grad), pixels(qkv.grad)
            be.attention_backward(dy, pixels(qkv.data), pixels(y.data), log_sums.data, dqkv, heads=heads)

        def tangent(be: LayerBackend) -> None:
            dqkv, dy = pixels(qkv.grad), pixels(y.grad)
            be.attention_tangent(dqkv, pixels(qkv.data), pixels(y.data), log_sums.data, dy, heads=heads)

        return self._record(
            _Operation(
                forward, backward if y.varies else None, (y, log_sums), (qkv,), tangent, (qkv, y, log_sums),
                fresh=(qkv,) if y.varies else (),
            )
        )  # fmt: skip

    def silu(self, x: Value) -> Value:
        """Record SiLU."""
        y = self._result(x.shape, x)
        return self._record(
            _Operation(
                lambda be: be.silu(x.data, y.data),
                (lambda be, add: be.silu_backward(y.grad, x.data, x.grad, add=add)) if y.varies else None,
                (y,), (x,), lambda be: be.silu_backward(x.grad, x.data, y.grad), (x,), x,
            )
        )  # fmt: skip

    def gelu(self, x: Value) -> Value:
        """Record GELU, in its tanh form."""
        y = self._result(x.shape, x)

        def forward(be: LayerBackend) -> None:
            be.gelu(x.data, y.data)

        def backward(be: LayerBackend, add: bool) -> None:
            be.gelu_backward(y.grad, x.data, x.grad, add=add)

        def tangent(be: LayerBackend) -> None:
            be.gelu_backward(x.grad, x.data, y.grad)

        return self._record(_Operation(forward, backward if y.varies else None, (y,), (x,), tangent, (x,), x))

    def concatenate(self, a: Value, b: Value) -> Value:
        """Record the channels of a, then those of b, which is another value."""
        if a is b:  # each half would replace its gradient
            raise ArgumentError("b", "the value that a is", "another one")
        y = self._result((*a.shape[:-1], a.width + b.width), a, b)
        to = [part if part.varies else Value(part.shape) for part in (a, b)]  # a gradient that nobody wants goes apart
        unused = tuple(value for value in to if value not in (a, b)) if y.varies else ()
        da, db = (self._tangent(part) for part in (a, b)) if self.purpose == "jvp" else (a, b)
        return self._record(
            _Operation(
                lambda be: be.concatenate(a.data, b.data, y.data),
                (lambda be, add: be.split(y.grad, to[0].grad, to[1].grad)) if y.varies else None,
                (y, *unused), (a, b), lambda be: be.concatenate(da.grad, db.grad, y.grad),
                fresh=tuple(to) if y.varies else (), joins=True,
            )
        )  # fmt: skip

    def _taken_back(self, x: Value) -> _Operation | None:
        """The concatenation that made x, if nothing has read that since; it is no longer an operation."""
        if self.purpose == "jvp":
            return None
        for place in range(len(self._operations) - 1, -1, -1):
            operation = self._operations[place]
            if any(value is x for value in operation.makes):
                return self._operations.pop(place) if operation.joins else None
            if any(value is x for value in operation.reads):
                return None
        return None

    def take(self, table: Value, index: Value) -> Value:
        """Record the rows of a table that an image's index names, as (n, 1, 1, width)."""
        y = self._result((self.n, 1, 1, table.width), table)
        return self._record(
            _Operation(
                lambda be: be.take(table.data, index.data, _rows(y)),
                (lambda be, add: be.take_backward(_rows(y, "grad"), index.data, table.grad)) if table.varies else None,
                (y,), (table, index),
            )
        )  # fmt: skip

    def dropout(self, x: Value, rate: float) -> Value:
        """Record dropout, in a training program with a rate; its rows of the noise law are positions in the batch."""
        first, values = self._dropped, math.prod(x.shape[1:])
        self._dropped += -(-values // 4)
        if self.purpose != "training" or rate == 0:
            return x
        self._repeats = False
        y = self._result(x.shape, x)
        return self._record(
            _Operation(
                lambda be: be.dropout(x.data, y.data, rate, first, self._draw),
                (lambda be, add: be.dropout(y.grad, x.grad, rate, first, self._draw)) if y.varies else None,
                (y,), (x,), fresh=(x,) if y.varies else (),
            )
        )  # fmt: skip

    def resize(self, x: Value, height: int, width: int) -> Value:
        """Record x with rows and columns cut off at the end, or zeros there."""
        if x.shape[1:3] == (height, width):
            return x
        self._resizes = True
        y = self._result((self.n, height, width, x.width), x)
        return self._record(
            _Operation(
                lambda be: be.resize(x.data, y.data),
                (lambda be, add: be.resize(y.grad, x.grad)) if y.varies else None,
                (y,), (x,), lambda be: be.resize(x.grad, y.grad), fresh=(x,) if y.varies else (),
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

    def plan(self, wait: int = 0) -> None:
        """Decide the place of every array; the last value recorded is the result.

        `wait` is a backend's `gradients_wait`.

        Operation i of F runs forward at time i and backward at time 2 F - i; at time F the caller has the result, and
        fills its gradient. The gradient of a value is filled by the last operation that uses it and added to by those
        before, so it lives from the former's backward pass to that of the value's own operation. A tangent lives as
        long as its value.
        """
        end, self._waits = len(self._operations), wait > 0
        if wait:
            self._operations = _side_by_side(self._operations)
        for time, operation in enumerate(self._operations):
            for value in operation.makes:
                value.block = self._block(value.shape, time)
            if self.purpose == "jvp" and operation.makes[0].varies:
                operation.makes[0].grad_block = self._block(operation.makes[0].shape, time)
            _use(operation.reads, time)
        self.output = self._operations[-1].makes[0]
        _use((self.output,), end)
        for made, *_ in (operation.makes for operation in self._operations):
            if made.grad_block is not None and made.block is not None:  # a tangent
                made.grad_block.stop = made.block.stop
        if self._by_input:
            self.product = self._given["x"] if self.purpose == "vjp" else self.output
            if not self.output.varies:
                self.product = self._constant(self.product.shape, 0.0)
        if self.purpose in ("training", "vjp") and self.output.varies:
            # The cotangent is there before the forward pass; the gradient of a loss comes after it.
            self.output.grad_block = self._block(self.output.shape, 0 if self.purpose == "vjp" else end)
            waiting: list[_Operation] = []
            begun: list[_Operation] = []
            for time, operation in enumerate(reversed(self._operations), end + 1):
                if operation.backward is None:
                    continue
                group = operation.beside or [operation]
                comes = time + group.index(operation)
                if operation is group[-1]:
                    disturbed = [i for i, each in enumerate(waiting, 1) if _disturb(group, each)]
                    if disturbed:  # as early as can be: they are to be there when this comes
                        waiting[disturbed[-1] - 1].begins = True
                        begun += waiting[: disturbed[-1]]
                        del waiting[: disturbed[-1]]
                    if any(_disturb(group, each) for each in begun):
                        group[0].finishes = True
                        _keep(begun, comes)
                self._plan_backward(operation, time, comes)
                if not (operation.waits and wait and self.purpose == "training" and operation is group[0]):
                    continue
                waiting.append(operation)
                if operation.again:  # its gradients are added at once
                    _keep(waiting, time)
                    _keep(begun, time)
                elif len(waiting) >= wait:
                    operation.finishes |= bool(begun)  # two rounds keep their arrays, and no more
                    _keep(begun, time)
                    operation.begins, begun, waiting = True, waiting, []
            _keep(waiting, 2 * end + 1)
            _keep(begun, 2 * end + 1)
            if wait and self.purpose == "training":
                _use(tuple(self._modulations), 2 * end + 1)
        if self.purpose == "vjp" and self.product.grad_block is not None:
            self.product.grad_block.stop = 2 * end + 1
        self.size = _arrange(self._blocks)

    def _plan_backward(self, operation: _Operation, time: int, comes: int) -> None:
        """Place what a backward pass fills from a time on; what it reads must be there until it comes."""
        block = operation.makes[0].grad_block
        assert block is not None
        block.stop = comes
        _use(operation.needs, comes)
        for value in operation.fresh:
            to = value
            if value.grad_block is not None:  # the gradient goes apart, and is added
                value.grad_block.stop = time
                to = Value(value.shape)
                operation.again.append((value, to))
            to.grad_block = self._block(value.shape, time)
        source, through = operation.source, operation.through
        if source is not None and source.varies:
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
        made = itertools.chain.from_iterable(operation.makes for operation in self._operations)
        apart = (to for operation in self._operations for _, to in operation.again)
        for value in itertools.chain(made, self._given.values(), apart):
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
        *,
        forms: list[list[Array]] | None = None,
        record: Record | None = None,
        draw: Draw = NO_DRAW,
    ) -> Array:
        """Return the result, or a product with its Jacobian, which stays valid until the next run in the arena.

        Parameters
        ----------
        be : LayerBackend
        params : mapping of str to array
        given : mapping of str to array
            What was recorded as given, such as "x" and "t"; with `grads` also "target", and "terms" where there are
            any; of a program for "vjp" also "vector", the cotangent, like the output, of one for "jvp" the tangent,
            like "x".
        grads : mapping of str to array, optional
            Fill them with the gradients of the mean squared error, or of what the terms make of it
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
        if grads is not None:
            self._target = self._copy(be, "target", given["target"])
            self._loss = self.own(be, "loss", (1,), np.float64)
        terms, vector = given.get("terms"), given.get("vector")
        self._terms = None if terms is None else self._copy(be, "terms", terms)
        for (shape, number), value in self._constants.items():
            if value.data is None:
                value.data = value.grad = be.empty(shape, next(iter(params.values())).dtype)
                value.data.fill(number)
        if vector is not None and self.output.varies:
            if self.purpose == "jvp":
                self._given["x"].grad = self._copy(be, "tangent", vector)
            else:
                self.output.grad[...] = vector
        body = partial(self._work, be, grads is not None)
        if record is not None and self._repeats and (be.repeats_resize or not self._resizes):
            tensor = next(iter(self._tensors.values()))  # the others lie as far from it as ever
            places = [tensor.data, tensor.grad, self._terms, *(given[name] for name in sorted(self._fixed))]
            record(places, body).run()
        else:
            body()
        for value in self._given.values():
            value.data = None  # they are the caller's
        for value in self._tensors.values():
            value.data = value.grad = None
            value.forms = []
        self._forms = None
        if vector is not None:
            return self.product.grad
        return self.output.data if grads is None else self._loss

    def _work(self, be: LayerBackend, backward: bool) -> None:
        """Everything that a run does with the arrays that it has been given."""
        forms = self._forms
        if forms is None:
            if self._prepared is None:
                self._prepared = self.prepare(be, backward=backward or self.purpose == "vjp")
            forms = self._prepared.run([self._tensors[name].data for *_, name in self._convs])
        for (*_, name), pair in zip(self._convs, forms, strict=True):
            self._tensors[name].forms = pair
        for operation in self._operations:
            if not operation.beside:
                operation.forward(be)
            elif operation is operation.beside[0]:
                be.linears(operation.reads[0].data, [(w.data, b.data, y.data) for w, b, y in _layers(operation)])
            if self.purpose == "jvp" and operation.tangent is not None and operation.makes[0].varies:
                operation.tangent(be)
        if backward:
            be.squared_error(self.output.data, self._target, self.output.grad, self._loss, self._terms)
        elif self.purpose != "vjp":
            return
        if not (backward and self._waits):
            self._go_back(be, Later())
            return
        with be.gradients_together() as later:
            self._go_back(be, later)

    def _linears_backward(self, be: LayerBackend, operation: _Operation) -> None:
        """Do the backward passes of all linear layers beside one, in the order of the others: the last one first."""
        x, layers = operation.reads[0], _layers(operation)[::-1]
        if x.varies:
            be.linears_backward(x.grad, [(y.grad, w.data) for w, _, y in layers], add=operation.beside[-1].add)
        for w, b, y in () if self._by_input else layers:
            be.conv_backward(Conv(), y.grad, x.data, w.data, None, w.grad, b.grad)

    def _go_back(self, be: LayerBackend, later: Later) -> None:
        """Do the backward pass, and begin and finish the gradients of parameters that wait."""
        for operation in reversed(self._operations):
            if operation.finishes:
                later.finish()
            if operation.beside and operation is not operation.beside[0]:
                continue
            if operation.beside and operation.backward is not None:
                self._linears_backward(be, operation)
            elif operation.backward is not None:
                for value, to in operation.again:
                    value.grad, to.grad = to.grad, value.grad
                operation.backward(be, operation.add)
                if operation.again and operation.waits:
                    later.begin()
                    later.finish()
                for value, to in operation.again:
                    value.grad, to.grad = to.grad, value.grad
                    be.add(value.grad, to.grad, value.grad)
            if operation.begins:
                later.begin()
            if operation.add_through and operation.through is not None:
                be.add(operation.through.grad, operation.makes[0].grad, operation.through.grad)


def _rows(value: Value | None, which: str = "data") -> Array:
    """Data or gradient of a value as rows (n, width)."""
    array = None if value is None else getattr(value, which)
    return None if array is None else array.reshape(len(array), -1)


def _pair(values: tuple[Value, ...], which: str) -> tuple[Array, Array]:
    """Data or gradients of two values."""
    first, second = (getattr(value, which) for value in values)
    return first, second


def _side_by_side(operations: list[_Operation]) -> list[_Operation]:
    """The operations, linear layers of one value side by side where the first of them was."""
    groups: dict[int, list[_Operation]] = {}
    for operation in operations[:-1]:  # the last one makes the result
        if operation.linear is not None:
            groups.setdefault(id(operation.reads[0]), []).append(operation)
    ordered: list[_Operation] = []
    for operation in operations:
        group = groups.get(id(operation.reads[0]), []) if operation.linear is not None else []
        if len(group) < 2 or operation not in group:
            ordered.append(operation)
        elif operation is group[0]:
            ordered += group
            for each in group:
                each.beside = group
    return ordered


def _layers(operation: _Operation) -> list[tuple[Value, Value, Value]]:
    """Weights, biases and results of linear layers that are computed together."""
    return [(*each.linear, each.makes[0]) for each in operation.beside if each.linear is not None]


def _disturb(operations: list[_Operation], other: _Operation) -> bool:
    """Whether backward passes write to gradients that another one waits with, or are of values whose gradient waits."""
    written: list[_Block | None] = []
    for each in operations:
        to = (*each.fresh, each.source, each.through, *(each.makes[:1] if each.in_place else ()))
        written += [value.grad_block for value in to if value is not None and value.grad_block is not None]
    made = [each.makes[0] for each in operations]
    return any(
        each.makes[0].grad_block in written or any(value in made for value in each.fresh)
        for each in other.beside or [other]
    )


def _keep(operations: list[_Operation], time: int) -> None:
    """Keep what operations wait with until their gradients are there, at a time; none waits then."""
    for operation in operations:
        for each in operation.beside or [operation]:
            for block in (each.makes[0].grad_block, each.reads[0].block):
                if block is not None:
                    block.stop = max(block.stop, time)
    operations.clear()


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
