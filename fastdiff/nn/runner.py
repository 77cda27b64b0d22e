"""A network on a backend, with given weights: what evaluates it, trains it, and runs a sampler's table over it.

Everything that is kept for a network on a backend lives here. A `Runner` has weights, and what was made for these. The
arena, the programs laid into it, and what was recorded of them are the same for all weights: they are in the network's
`Memory` for the backend, which all runners share. Copies of a network start with none.
"""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import (
    AdamW,
    Array,
    Backend,
    Gather,
    PartGradient,
    Row,
    Segment,
    Team,
    Training,
    TrainingDraws,
    TrainState,
)
from fastdiff.backends.layers import Batch, LayerBackend, Recording
from fastdiff.denoiser import Asked, Evaluator, asked_parts
from fastdiff.errors import BackendError
from fastdiff.forks import at_fork, free
from fastdiff.nn.layers import NO_DRAW, Program, Purpose
from fastdiff.nn.params import ALIGNMENT
from fastdiff.noise import Draw, Stream

if TYPE_CHECKING:
    from fastdiff.nn.network import Network, ProgramNetwork


class Kept(NamedTuple):
    """Forms of all weights, see `Prepared`, and where those lie that a forward pass reads."""

    forms: list[list[Array]]
    places: tuple[int, ...]


Forms = Callable[[Program], Kept]

KNOWN = ("known", "marks")  # what a program is given of what is known
MAX_PROGRAMS = 8  # kept for each queue
MAX_RECORDINGS = 4  # kept of a program, and of a runner's steps


class Runner(Evaluator):
    """A network on a backend, with given weights.

    Arrays are the backend's own and are not checked. States are flat, (n, D), where nothing else is said.

    Parameters
    ----------
    net : Network
    be : Backend
    weights : (layout.size,) array
        Whoever changes them in place has a network that has changed: except for `step`, `run_table`, and what is
        called frozen, which may keep forms of them.

    Examples
    --------
    >>> be, net = fd.get_backend("numpy"), fd.MLP(12, hidden=(8,), T=20)
    >>> runner = net.on(be, (12,))
    >>> isinstance(runner, fd.nn.Runner), runner.evaluate(np.zeros((3, 12), np.float32), 5).shape
    (True, (3, 12))
    """

    def __init__(self, net: Network, be: Backend, weights: Array) -> None:
        net.check_backend(be)
        self.net, self.be, self.weights = net, be, weights
        self._products: dict[str, tuple[Array, Array]] = {}  # the last results, and timesteps

    @abstractmethod
    def fill(self, y: Array, x: Array, t: Array, labels: Array = None) -> None:
        """Fill y (n, H, W, outputs) with the output for x (n, ...) at t (n,) int64."""

    def fill_frozen(self, y: Array, x: Array, t: Array, labels: Array = None) -> None:
        """Do `fill`; forms of the weights may be kept."""
        self.fill(y, x, t, labels)

    @abstractmethod
    def fill_vjp(self, dx: Array, x: Array, t: Array, dy: Array, labels: Array = None) -> None:
        """Fill dx (..., n, D) with J^T dy for dy (..., n, outputs), J being the Jacobian of the output at x (n, D)."""

    @abstractmethod
    def fill_jvp(self, dy: Array, x: Array, t: Array, dx: Array, labels: Array = None) -> None:
        """Fill dy (..., n, outputs) with J dx for dx (..., n, D), J being the Jacobian of the output at x (n, D)."""

    def vjp(self, x: Array, t: int, cotangent: Array, labels: Array = None) -> Array:
        return self._product("vjp", self.fill_vjp, x, t, cotangent, labels)

    def jvp(self, x: Array, t: int, tangent: Array, labels: Array = None) -> Array:
        return self._product("jvp", self.fill_jvp, x, t, tangent, labels)

    def _product(self, kind: str, fill: Callable[..., None], x: Array, t: int, vector: Array, labels: Array) -> Array:
        """A product in an array that the next one of its kind and size fills anew; of the prediction alone."""
        net, be = self.net, self.be
        shape, (*sides, channels) = vector.shape, net.image
        if net.learned_variance and kind == "vjp":
            whole = be.empty((*shape[:-1], *sides, net.outputs), net.dtype)
            whole.fill(0)
            whole[..., :channels] = be.asarray(vector, net.dtype).reshape(*shape[:-1], *net.image)
            vector = whole
        elif net.learned_variance:
            shape = *shape[:-1], *sides, net.outputs
        kept = self._products.get(kind)
        if kept is None or kept[0].shape != shape:
            kept = self._products[kind] = be.empty(shape, net.dtype), be.empty((len(x),), np.int64)
        out, steps = kept
        steps.fill(t)
        fill(out, be.asarray(x, net.dtype), steps, be.asarray(vector, net.dtype), labels)
        if net.learned_variance and kind == "jvp":
            out = be.asarray(out[..., :channels].reshape(*shape[:-3], -1))
        return be.asarray(out, x.dtype)

    @abstractmethod
    def training(
        self,
        draws: TrainingDraws,
        batch: int,
        parts: int,
        state: TrainState,
        results: Array,
        team: Team | None = None,
    ) -> Training:
        """Return what takes training steps with these weights, which are those of `state`.

        Parameters
        ----------
        draws : TrainingDraws
        batch : int
            Rows of a step.
        parts : int
            Into how many the batch is cut, where the network can do that.
        state : TrainState
            On the backend.
        results : (rows, 2) float64 array
            As for `Backend.mlp_training`.
        team : Team, optional
            Others who take the same steps: of each everybody computes a share, and all have the bits of one alone.
        """


class Recordings(dict[Any, Any]):
    """The last few that were made, each under a key."""

    def of(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            while len(self) >= MAX_RECORDINGS:
                self.pop(next(iter(self)))
            self[key] = make()
        return self[key]


class Laid(NamedTuple):
    """A program in an arena, and what was recorded of its passes, by the places of weights and gradients."""

    program: Program
    passes: Recordings

    def run(self, be: LayerBackend, *arguments: Any, kept: Kept | None = None, **options: Any) -> Array:
        """Do `Program.run`, as it was recorded where it is the same as before."""
        forms, there = (None, ()) if kept is None else kept

        def record(places: list[Array], body: Callable[[], None]) -> Recording:
            # With every form: weights that are gone leave their place to others, whose forms lie elsewhere.
            key = tuple(None if array is None else be.address(array) for array in places), there
            own = [pair[0] for pair in forms or []]
            made: Recording = self.passes.of(key, lambda: be.record(body, [*places, *own]))
            return made

        return self.program.run(be, *arguments, forms=forms, record=record, **options)


class Memory:
    """What all runners of a network on a backend share: for each queue an arena, and the programs in it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.spaces: dict[int, tuple[Array, dict[tuple[int, Purpose], Laid]]] = {}
        self._constants: dict[tuple[int, str], Array] = {}
        at_fork(self)

    def renew(self) -> None:
        if (lock := free(self.lock)) is not self.lock:  # somebody was at work in it
            self.lock, self.spaces, self._constants = lock, {}, {}

    def laid(self, net: ProgramNetwork, be: LayerBackend, n: int, purpose: Purpose) -> Laid:
        """Return the program for n samples, recorded where there is none; hold the lock until it has run."""
        queue = be.queue()
        arena, programs = self.spaces.get(queue, (None, {}))
        laid = programs.get((n, purpose))
        if laid is not None:
            return laid
        program = Program(n, purpose)
        net.record(program)
        program.plan(be.gradients_wait)
        if arena is None or len(arena) < program.size:
            programs = {}
            self.spaces[queue] = None, programs
            arena = None  # the old one goes before the new one comes
            arena = _aligned(be, program.size, net.dtype)
        elif len(programs) == MAX_PROGRAMS:
            programs.pop(next(iter(programs)))
        program.lay(arena)
        laid = programs[n, purpose] = Laid(program, Recordings())
        self.spaces[queue] = arena, programs
        return laid

    def constants(self, net: ProgramNetwork, be: LayerBackend) -> dict[str, Array]:
        """Return the network's constants on the backend, brought there once for each queue."""
        queue = be.queue()
        there = {}
        for name, values in net.constants().items():
            if (queue, name) not in self._constants:
                self._constants[queue, name] = be.asarray(values, values.dtype)
            there[name] = self._constants[queue, name]
        return there


class Memories:
    """The memory of a network for each backend that it has been on. A copy is empty."""

    def __init__(self) -> None:
        self._memories: dict[Backend, Memory] = {}

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Memories, ()

    def on(self, be: Backend) -> Memory:
        """Return that for a backend."""
        memory = self._memories.get(be)
        return self._memories.setdefault(be, Memory()) if memory is None else memory


def _aligned(be: Backend, size: int, dtype: npt.DTypeLike) -> Array:
    """An array of `size` values that starts on a cache line, where the backend's memory is the host's."""
    array = be.empty((size + ALIGNMENT,), dtype)
    start = 0
    if isinstance(array, np.ndarray):
        start = -array.ctypes.data // array.itemsize % ALIGNMENT
    return array[start : start + size]


class ProgramRunner(Runner):
    """A network that records its operations: see `Network.record`."""

    net: ProgramNetwork
    be: LayerBackend

    def __init__(self, net: ProgramNetwork, be: Backend, weights: Array, memory: Memory) -> None:
        super().__init__(net, be, weights)
        if not isinstance(be, LayerBackend):
            raise BackendError(f"backend {be.name!r} does not run image networks: use backend='cpu'")
        self.memory, self.params = memory, net.layout.views(weights)
        self._output: tuple[Array, Array] | None = None  # of `evaluate`, and its timesteps
        self._kept: dict[int, Kept] = {}  # for each queue
        self._steps = Recordings()

    def _parts(self, n: int) -> Array | None:
        """Room for prediction and variance of n samples, one after the other, where the network has both."""
        return self.be.empty((2, n, *self.net.image), self.net.dtype) if self.net.learned_variance else None

    def _laid(self, n: int, purpose: Purpose) -> Laid:
        return self.memory.laid(self.net, self.be, n, purpose)

    def _named(self, labels: Array | Asked | None, n: int) -> dict[str, Array]:
        """What is asked of n samples, under the names that a program has for it."""
        parts, named = asked_parts(labels), {}
        if parts.labels is not None:
            named["labels"] = parts.labels
        if parts.covariates is not None:
            named["covariates"] = _shaped(parts.covariates, self._covariate_shape(n))
        if self.net.masked:
            known, d = parts.known, self.net.known // 2
            if known is None:
                known = self.be.empty((n, 2 * d), self.net.dtype)
                known.fill(0)
            of_each = known[:, :d], known[:, d:]
            named |= {name: part.reshape(n, *self.net.image) for name, part in zip(KNOWN, of_each, strict=True)}
        return named

    def _given(self, given: Mapping[str, Array]) -> dict[str, Array]:
        return {**given, **self.memory.constants(self.net, self.be)}

    def fill(self, y: Array, x: Array, t: Array, labels: Array = None) -> None:
        self._fill(y, x, t, labels, None)

    def fill_frozen(self, y: Array, x: Array, t: Array, labels: Array = None) -> None:
        self._fill(y, x, t, labels, self._kept_forms)

    def _fill(self, y: Array, x: Array, t: Array, labels: Array | Asked | None, forms: Forms | None) -> None:
        given = {"x": x.reshape(len(x), *self.net.image), "t": t, **self._named(labels, len(x))}
        for start in range(0, len(y), self.net.chunk):
            part = slice(start, start + self.net.chunk)
            with self.memory.lock:
                some = self._given({name: array[part] for name, array in given.items()})
                laid = self._laid(len(some["x"]), "output")
                y[part] = laid.run(self.be, self.params, some, kept=forms and forms(laid.program))

    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        return self._evaluate(x, t, labels, None)

    def evaluate_frozen(self, x: Array, t: int, labels: Array = None) -> Array:
        """Do `evaluate`, and as `step` does keep forms of the weights."""
        return self._evaluate(x, t, labels, self._kept_forms)

    def _kept_forms(self, program: Program) -> Kept:
        queue = self.be.queue()
        if queue not in self._kept:
            forms = program.prepare(self.be, backward=False).run(program.weights(self.params))
            self._kept[queue] = Kept(forms, tuple(self.be.address(pair[0]) for pair in forms))
        return self._kept[queue]

    def _evaluate(self, x: Array, t: int, labels: Array | Asked | None, forms: Forms | None) -> Array:
        n, dtype = len(x), self.net.dtype
        if self._output is None or len(self._output[0]) != n:  # the last batch may be smaller
            shape = (n, *self.net.image[:2], self.net.outputs)
            self._output = self.be.empty(shape, dtype), self.be.empty((n,), np.int64)
        y, steps = self._output
        steps.fill(t)
        self._fill(y, self.be.asarray(x, dtype), steps, labels, forms)
        return self.be.asarray(_both_parts(self.be, y, self._parts(n)), x.dtype)

    def fill_vjp(self, dx: Array, x: Array, t: Array, dy: Array, labels: Array = None) -> None:
        self._fill_product("vjp", dx, x, t, dy, labels)

    def fill_jvp(self, dy: Array, x: Array, t: Array, dx: Array, labels: Array = None) -> None:
        self._fill_product("jvp", dy, x, t, dx, labels)

    def _fill_product(
        self, purpose: Purpose, out: Array, x: Array, t: Array, vector: Array, labels: Array = None
    ) -> None:
        net, n = self.net, len(x)
        if vector.size == 0:
            return
        of_output, of_input = (*net.image[:2], net.outputs), net.image
        given, made = (of_output, of_input) if purpose == "vjp" else (of_input, of_output)
        named = {"x": x.reshape(n, *of_input), "t": t, **self._named(labels, n)}
        results, factors = out.reshape(-1, n, *made), vector.reshape(-1, n, *given)
        for k in range(len(factors)):
            result, factor = results[k], factors[k]
            for start in range(0, n, net.chunk):
                part = slice(start, start + net.chunk)
                with self.memory.lock:
                    some = self._given({name: array[part] for name, array in named.items()})
                    laid = self._laid(len(some["x"]), purpose)
                    result[part] = laid.run(self.be, self.params, {**some, "vector": factor[part]})

    # ------------------------------------------------------------------------------------------- sampling

    def step(
        self,
        x: Array,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array = None,
    ) -> None:
        if not row.evaluates:
            super().step(x, memory, row, clip, draw)
            return
        for start in range(0, len(x), self.net.chunk):
            end = start + self.net.chunk
            some, chosen = x[start:end], None if labels is None else labels[start:end]
            remembered = tuple(array[start:end] for array in memory)
            with self.memory.lock:
                self._step(some, remembered, chosen, row, clip, draw.after(start))

    def _step(
        self,
        x: Array,
        memory: tuple[Array, ...],
        labels: Array,
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        be, n = self.be, len(x)
        laid = self._laid(n, "output")
        program = laid.program
        own = program.own(be, "x", (n, *self.net.image), self.net.dtype)
        own[...] = be.asarray(x, self.net.dtype).reshape(own.shape)
        t = program.own(be, "t", (n,), np.int64)
        t.fill(row.t)
        given = {"x": own, "t": t}
        for name, array in self._named(labels, n).items():
            given[name] = program.own(be, name, array.shape, array.dtype)
            given[name][...] = array
        queue, kept = be.queue(), self._kept_forms(program)
        of, recorded = self._steps.of((queue, n), lambda: (None, None))
        if of is None or of() is not program:
            output = _Output(self.memory, self.net, be, self.params, self._given(given), kept, self._parts(n))
            recorded = be.record_sampling(output, own.reshape(n, -1))
            self._steps[queue, n] = weakref.ref(program), recorded
        recorded.run(x, memory, row, clip, draw.at(row.step))

    # ------------------------------------------------------------------------------------------- training

    def batch(self, n: int, *, labels: bool, columns: int = 0, covariates: bool = False, known: bool = False) -> Batch:
        """Return the places where `gradient` looks for a batch: what it finds there it does not copy.

        Parameters
        ----------
        n : int
            Number of samples.
        labels : bool
            Whether there are labels.
        columns : int, optional
            Of the terms; 0: there are none.
        covariates : bool, optional
            Whether there are covariates.
        known : bool, optional
            Whether the network is told what is known.

        Returns
        -------
        Batch
            Unfilled. The network's, and valid until it is given more samples than ever before.
        """
        be, net = self.be, self.net
        with self.memory.lock:
            program = self._laid(n, "training").program
            known_inputs = [program.own(be, name, (n, *net.image), net.dtype) if known else None for name in KNOWN]
            return Batch(
                program.own(be, "x", (n, *net.image), net.dtype),
                program.own(be, "t", (n,), np.int64),
                program.own(be, "target", self._target_shape(n, columns), net.dtype),
                program.own(be, "labels", (n,), np.int64) if labels else None,
                program.own(be, "terms", (n, columns), net.dtype) if columns else None,
                program.own(be, "covariates", self._covariate_shape(n), net.dtype) if covariates else None,
                *known_inputs,
            )

    def _covariate_shape(self, n: int) -> tuple[int, ...]:
        """Of covariates as a program takes them: of every image, or of every pixel."""
        net = self.net
        return (n, *(net.image[:2] if net.pointwise else (1, 1)), (net.covariates or 0) + 1)

    def _target_shape(self, n: int, columns: int) -> tuple[int, ...]:
        """Of a loss with more than one column half of the outputs have a target."""
        return n, *self.net.image[:2], self.net.outputs // (2 if columns > 1 else 1)

    def gradient(self, batch: Batch, grads: Array, draw: Draw = NO_DRAW) -> Array:
        """Fill `grads` with the gradient of the loss, and return that as an array of one value.

        The padding between the tensors of `grads` must be zero, and stays so. Memory is reused from step to step.

        Parameters
        ----------
        batch : Batch
        grads : (layout.size,) array
        draw : Draw, optional
            Of dropout: its step is the training step, its rows are positions in the batch.

        Returns
        -------
        (1,) array
            The backend's own, valid until the next call.
        """
        n, image = len(batch.x), self.net.image
        given = {"x": _shaped(batch.x, (n, *image)), "t": batch.t}
        if batch.labels is not None:
            given["labels"] = batch.labels
        if batch.covariates is not None:
            given["covariates"] = _shaped(batch.covariates, self._covariate_shape(n))
        if batch.known is not None and batch.marks is not None:
            given |= {"known": _shaped(batch.known, (n, *image)), "marks": _shaped(batch.marks, (n, *image))}
        if batch.terms is not None:
            given["terms"] = batch.terms
        columns = 0 if batch.terms is None else batch.terms.shape[1]
        given["target"] = _shaped(batch.target, self._target_shape(n, columns))
        with self.memory.lock:
            views = self.net.layout.views(grads)
            laid = self._laid(n, "training")
            return laid.run(self.be, self.params, self._given(given), views, draw=draw)

    def drawn_gradient(self, draws: TrainingDraws, step: int, first: int, n: int, grads: Array) -> Array:
        """Do `gradient` for n positions of a training batch, from `first` on."""
        columns = 0 if draws.terms is None else draws.terms.shape[1]
        labels, covariates = draws.labels is not None, draws.covariates is not None
        known = draws.targets is not None
        batch = self.batch(n, labels=labels, columns=columns, covariates=covariates, known=known)
        self.be.draw_batch(draws, batch, step, first)
        if columns:
            self.be.take(draws.terms, batch.t, batch.terms)
        return self.gradient(batch, grads, Draw(draws.seed, Stream.DROPOUT, step, first))

    def training(
        self,
        draws: TrainingDraws,
        batch: int,
        parts: int,
        state: TrainState,
        results: Array,
        team: Team | None = None,
    ) -> Training:
        labels = None if draws.labels is None else self.be.asarray(draws.labels, np.int64)
        terms = None if draws.terms is None else self.be.asarray(draws.terms, self.net.dtype)
        covariates = None if draws.covariates is None else self.be.asarray(draws.covariates, self.net.dtype)
        lead = (-1, 2) if draws.masked else (-1,)
        whole = draws.data if len(self.net.shape) == 3 else None  # pictures may be larger than what is learned of them
        data = draws.data.reshape(*lead, *self.net.image) if whole is None else whole
        draws = draws._replace(data=data, labels=labels, terms=terms, covariates=covariates)
        if parts == 1 and team is None:
            return _Whole(self, draws, batch, state, results)
        return in_parts(self.be, partial(self.drawn_gradient, draws), (batch, parts), state, results, team)


@dataclass(frozen=True)
class _Output:
    """The output of a network with weights in these forms; it knows nothing of the runner that keeps it.

    `parts` is where a learned variance is put apart.
    """

    memory: Memory
    net: ProgramNetwork
    be: LayerBackend
    params: Mapping[str, Array]
    given: dict[str, Array]
    kept: Kept
    parts: Array | None

    def __call__(self) -> Array:
        laid = self.memory.laid(self.net, self.be, len(self.given["x"]), "output")
        return _both_parts(self.be, laid.run(self.be, self.params, self.given, kept=self.kept), self.parts)


class _Whole:
    """A training step whose batch goes through the network at once."""

    def __init__(
        self, runner: ProgramRunner, draws: TrainingDraws, batch: int, state: TrainState, results: Array
    ) -> None:
        self.runner, self.batch = runner, batch

        def gradient(step: int) -> Array:
            return runner.drawn_gradient(draws, step, 0, batch, state.grads)

        self._record = partial(runner.be.record_training, gradient, state, results)
        self._of: Callable[[], Program | None] = lambda: None
        self._recorded: Training | None = None

    def run(self, step: int, options: AdamW) -> None:
        memory = self.runner.memory
        with memory.lock:
            program = memory.laid(self.runner.net, self.runner.be, self.batch, "training").program
            if self._recorded is None or self._of() is not program:  # in an arena that is gone
                self._of, self._recorded = weakref.ref(program), self._record()
            self._recorded.run(step, options)


class _InParts:
    """A training step whose batch goes through the network in parts: their gradients, weighted by sizes, are added."""

    def __init__(
        self, be: LayerBackend, gradient: PartGradient, bounds: list[int], state: TrainState, results: Array
    ) -> None:
        self.be, self.gradient, self.bounds, self.state, self.results = be, gradient, bounds, state, results
        self.part, self.total = self._zeros(), be.empty((1,), np.float64)

    def _zeros(self, *several: int) -> Array:
        """Room for a gradient, or for several."""
        made = self.be.empty((*several, *self.state.grads.shape), self.state.grads.dtype)
        made.fill(0)
        return made

    def run(self, step: int, options: AdamW) -> None:
        grads, total = self.state.grads, self.total
        grads[...], total[...] = 0, 0
        for first, end in pairwise(self.bounds):
            total[...] += self._weighted(step, first, end, self.part)
            self.be.add(grads, self.part, grads)
        self.be.finish_step(total, step, self.state, options, self.results)

    def _weighted(self, step: int, first: int, end: int, part: Array) -> Array:
        """Fill `part` with what a part of the batch adds to the gradient, and return what it adds to the loss."""
        loss = self.gradient(step, first, end - first, part)
        weight = (end - first) / self.bounds[-1]
        loss *= weight
        part[...] *= part.dtype.type(weight)
        return loss


class _SharedParts(_InParts):
    """One whose parts are shared by a team; they are added in their order, in the memory of the hosts."""

    def __init__(
        self,
        be: LayerBackend,
        gradient: PartGradient,
        bounds: list[int],
        state: TrainState,
        results: Array,
        team: Team,
    ) -> None:
        super().__init__(be, gradient, bounds, state, results)
        self.team, share = team, team.share(len(bounds) - 1)
        self.mine = list(pairwise(bounds[share.start : share.stop + 1]))
        self.rows = slice(bounds[share.start], bounds[share.stop])
        self.losses = be.empty((len(self.mine),), np.float64)
        # Whoever comes first adds to nothing; the others keep theirs until what is before them has come.
        self.first, self.alone = share.start == 0, len(team.shares(1)) == 1
        self.there = not isinstance(state.grads, np.ndarray)
        self.sums = np.empty(state.grads.shape, state.grads.dtype) if self.there else state.grads
        self.kept = [] if self.first else [np.zeros_like(self.sums) for _ in self.mine]

    def run(self, step: int, options: AdamW) -> None:
        be, grads, sums = self.be, self.state.grads, self.sums
        grads[...] = 0
        for i, (first, end) in enumerate(self.mine):
            part = self.part if self.first or self.there else self.kept[i]
            self.losses[i : i + 1] = self._weighted(step, first, end, part)
            if self.first:
                be.add(grads, part, grads)
            elif self.there:
                self.kept[i][...] = be.to_numpy(part)

        def add(piece: slice) -> None:
            for part in self.kept:
                sums[piece] += part[piece]

        crosses = self.there and not self.alone
        if crosses and self.first:
            sums[...] = be.to_numpy(grads)
        segments = [] if self.alone else [Segment(sums, add, sums)]
        self.total[...] = self.team.sum(segments, be.to_numpy(self.losses).tolist())
        if crosses:
            grads[...] = be.asarray(sums, sums.dtype)
        be.finish_step(self.total, step, self.state, options, self.results)


class _GatheredParts(_InParts):
    """One whose parts are shared by a team that gathers them on the devices of all, where each adds them in order."""

    def __init__(
        self,
        be: LayerBackend,
        gradient: PartGradient,
        bounds: list[int],
        state: TrainState,
        results: Array,
        team: Team,
        gather: Gather,
    ) -> None:
        super().__init__(be, gradient, bounds, state, results)
        self.team, self.gather, share, shares = team, gather, team.share(len(bounds) - 1), team.shares(len(bounds) - 1)
        self.mine = list(pairwise(bounds[share.start : share.stop + 1]))
        self.rows = slice(bounds[share.start], bounds[share.stop])
        self.order = [(k, i) for k, each in enumerate(shares) for i in range(len(each))]
        most = max(map(len, shares))  # which all send, be they needed or not
        self.kept, self.every = self._zeros(most), self._zeros(len(shares), most)
        self.losses, self.every_loss = be.empty((most,), np.float64), be.empty((len(shares), most), np.float64)
        self.losses.fill(0)

    def run(self, step: int, options: AdamW) -> None:
        grads, total = self.state.grads, self.total
        for i, (first, end) in enumerate(self.mine):
            self.losses[i : i + 1] = self._weighted(step, first, end, self.part)
            self.kept[i][...] = self.part  # one graph for all
        self.gather(self.kept, self.every)
        self.gather(self.losses, self.every_loss)
        grads[...], total[...] = 0, 0
        for k, i in self.order:
            self.be.add(grads, self.every[k, i], grads)
            total[...] += self.every_loss[k, i : i + 1]
        self.team.sum([], [])  # whether anybody wants to stop
        self.be.finish_step(total, step, self.state, options, self.results)


def in_parts(
    be: LayerBackend,
    gradient: PartGradient,
    sizes: tuple[int, int],
    state: TrainState,
    results: Array,
    team: Team | None,
) -> Training:
    """Return what takes training steps of a batch that comes in parts, both of which are the sizes."""
    batch, parts = sizes
    of = be, gradient, [batch * i // parts for i in range(parts + 1)], state, results
    if team is None:
        return _InParts(*of)
    gather = team.gathering(be)
    return _SharedParts(*of, team) if gather is None else _GatheredParts(*of, team, gather)


def _both_parts(be: LayerBackend, y: Array, parts: Array | None) -> Array:
    """An output (n, H, W, outputs) as `Evaluator.evaluate` returns it: (n, D), or with room for the parts (2, n, D)."""
    if parts is None:
        return y.reshape(len(y), -1)
    be.split(y, *parts)
    return parts.reshape(2, len(y), -1)


def _shaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array in another shape, itself where it has that."""
    return array if array.shape == shape else array.reshape(shape)
