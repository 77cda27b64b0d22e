"""What a workload is: ours, the peer's, its bytes and operations, its check and its sizes, in one class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

import fastdiff as fd

Run = Callable[[], Any]
Arrays = dict[str, Any]
RateUnit = Literal["GB/s", "GF/s", "samples/s", ""]

SAME = 1e-4  # largest difference from a peer on a GPU, through the largest value
TRAINING_EXAMPLE = 2  # steps of the example that is compared with the reference


class Work(NamedTuple):
    """One thing to time.

    Attributes
    ----------
    run : callable
        Does `units` units of the work, returns what it made.
    check : callable
        Takes what `run` returned and raises `AssertionError` if it is wrong; cheap, and not for timing.
    units : int
        Training steps in one run; 1 for all other work.
    """

    run: Run
    check: Callable[[Any], None]
    units: int = 1


class PeerWork(NamedTuple):
    """The same work of a peer: a function, and the tensors that it takes."""

    function: Callable[..., Any]
    tensors: tuple[Any, ...]

    def run(self) -> Any:
        """Do it."""
        return self.function(*self.tensors)


@dataclass(frozen=True)
class Workload:
    """A kind of work at one size. Every kind is a subclass, every row of the table an instance.

    A subclass gives `ours` and `counts`; `operation` where its form on arrays that are there differs from
    the public call; and, to be compared with PyTorch, `inputs` and `peer`.

    Attributes
    ----------
    name : str
        Never changes.
    title : str
        What is done, in words.
    n : int
        Samples: rows, curves, images, or a training batch.
    shape : tuple of int
        Of one sample.
    units : int
        Training steps in one run, so many that what a call of `fit` costs once does not count.
    rate_unit : {"GB/s", "GF/s", "samples/s", ""}
        What its speed is given in; "" where only the time means something.
    example_values : int
        Values, about, in the samples of the example that is compared with the reference; 0: its check is all.
    tolerance : float
        How far the example may be from the reference, in the Euclidean norm, through the reference's own.
    draws : int
        Normals drawn for each value.
    needs : {"", "layers", "cpu"}
        What it runs on: every backend, those for image networks, or the CPU backend.
    memory_bound : bool
        Whether its time on a GPU is compared with a copy's.
    image, convolves : bool
        Whether it is of image networks, where a GPU has many ways in two precisions; whether convolutions decide.
    precisions : dict
        Others than float32 in which a GPU does it as well, and how far `outputs` may be from those of float32 then, in
        the Euclidean norm, through them.
    peer_name : str
        Whom it is compared with on a CPU, in words; "": nobody.
    peer_samples : int
        Samples in the example that both sides compute before they are timed.
    parity : dict
        How far the results of that example may differ, by name: the largest difference through the peer's largest
        value. "moments" are in units of their standard error; "weights" are compared with how far training moved them.
    """

    name: str
    title: str
    n: int
    shape: tuple[int, ...]
    units: int = 1

    rate_unit: ClassVar[RateUnit] = "GB/s"
    example_values: ClassVar[int] = 1_000_000
    tolerance: ClassVar[float] = 1e-6
    draws: ClassVar[int] = 0
    needs: ClassVar[Literal["", "layers", "cpu"]] = ""
    memory_bound: ClassVar[bool] = False
    image: ClassVar[bool] = False
    convolves: ClassVar[bool] = False
    precisions: ClassVar[dict[str, float]] = {}
    peer_name: ClassVar[str] = ""
    peer_samples: ClassVar[int] = 10_000
    parity: ClassVar[dict[str, float]] = {}

    # -- sizes ---------------------------------------------------------------------------------------------------

    def at(self, scale: float) -> Self:
        """Return the workload with that fraction of its samples and training steps, at least one of each."""
        return replace(self, n=max(1, round(self.n * scale)), units=max(1, round(self.units * scale)))

    @property
    def example(self) -> Self:
        """The small one that backends and the reference both compute."""
        most = max(1, self.example_values // math.prod(self.shape))
        return replace(self, n=min(self.n, most), units=min(self.units, TRAINING_EXAMPLE))

    @property
    def peer_example(self) -> Self:
        """The small one that both sides of a comparison compute."""
        return replace(self, n=min(self.n, self.peer_samples))

    @property
    def parts(self) -> tuple[Workload, ...]:
        """What takes turns with the peer: the workload itself, or each shape of a sweep."""
        return (self,)

    @property
    def values(self) -> int:
        """Numbers in all samples."""
        return self.n * math.prod(self.shape)

    @property
    def normals(self) -> int:
        """Normals drawn for one unit of the work."""
        return self.draws * self.values

    def counts(self) -> tuple[int, int]:
        """Return `bytes` and `operations`."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Bytes of one unit that cross memory at least once: arguments, results, parameters and moments."""
        return self.counts()[0]

    @property
    def operations(self) -> int:
        """Multiplications and additions of one unit: matrix products, and formulas of noising, step and optimiser.

        Draws, activations, exponentials and the time table are not counted.
        """
        return self.counts()[1]

    def rate(self, seconds: float) -> float | None:
        """Speed in `rate_unit`, where a unit of the work takes so long; None where only the time means something."""
        amount = {"GB/s": self.bytes / 1e9, "GF/s": self.operations / 1e9, "samples/s": self.n, "": 0}[self.rate_unit]
        return amount / seconds if self.rate_unit else None

    # -- ours ----------------------------------------------------------------------------------------------------

    def ours(self, be: Any) -> Work:
        """Make the arrays and objects, and return the public call. Compiles nothing: run it once to be warm."""
        raise NotImplementedError

    def operation(self, be: Any) -> Run:
        """Return the same on arrays that are there already, as part of a larger program."""
        work = self.ours(be)
        work.check(on_host(be, work.run()))
        return work.run

    def runs_on(self, backend: Any) -> bool:
        """Whether a backend has what the workload needs."""
        if self.needs == "layers":
            from fastdiff.backends.layers import LayerBackend

            return isinstance(backend, LayerBackend)
        return not self.needs or backend.name == self.needs

    def setup(self, backend: Any = "cpu") -> Work:
        """Return what is to be timed on a backend; on a GPU a run ends when its work is done."""
        be = fd.get_backend(backend)
        work = self.ours(be)
        if be.name != "cuda":
            return work
        last = be.asarray(np.zeros(1))

        def run() -> Any:
            result = work.run()
            be.to_numpy(last)  # waits for all work before it
            return result

        return work._replace(run=run, check=lambda result: work.check(on_host(be, result)))

    def agree_with_reference(self, backend: Any) -> float:
        """Compute the example on a backend and on the reference; return how far they differ, through the reference.

        Raises
        ------
        AssertionError
            They differ by more than `tolerance`.
        """
        if not self.example_values:
            return 0.0
        be, results = fd.get_backend(backend), []
        for side in (be, fd.get_backend("numpy")):
            work = self.example.setup(side)
            result = work.run()
            work.check(result)
            results.append(vector(on_host(side, result)))
        ours, reference = results
        error = float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
        if not error <= self.tolerance:  # NaN fails
            raise AssertionError(
                f"{self.name}: {be.name} and numpy differ by {error:.3g}, allowed are {self.tolerance:g}"
            )
        return error

    # -- the peer's ----------------------------------------------------------------------------------------------

    def inputs(self) -> Arrays:
        """Return the arrays that both sides take, on the host."""
        return {}

    def noise(self, be: Any, result: Any) -> Any:
        """Return what a run of ours has drawn, for the peer to draw the same: (draws, ...), the first one first."""
        del be, result
        return np.empty((0, 1), np.float32)

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        """Return the peer's form of the work, on tensors of the inputs; results in our layout.

        Parameters
        ----------
        torch : module
            PyTorch, which this library does not import.
        given : dict of Tensor
            `inputs`, on the device where it is to run.
        """
        raise NotImplementedError

    def peer_on_gpu(self, torch: Any, given: Arrays) -> PeerWork:
        """Return the same where a GPU wants it written in another way."""
        return self.peer(torch, given)

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        """Compute it beside a peer: return what the peer needs to compute it too, and our results by name.

        What is no array can be left in the folder.
        """
        del folder
        result = self.setup(be).run()
        (name,) = self.parity
        return self.inputs() | {"noise": self.noise(be, result)}, {name: first(result)}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        """Return the peer's results of its example, and what is to be timed: one function for each of `parts`.

        Parameters
        ----------
        nets : module
            ``benchmarks/peer_nets.py``: networks, training and sampling in PyTorch.
        inputs, folder
            From `compare` of the example.
        variant : str
            Another form of the peer: "fused", "compiled" or "numpy".
        """
        del folder
        (name,) = self.parity
        torch, tensor = (np, np.asarray) if variant == "numpy" else (nets.torch, nets.tensor)
        small, large = (
            workload.peer(torch, {key: tensor(value) for key, value in given.items()})
            for workload, given in ((self.peer_example, inputs), (self, self.inputs()))
        )
        with nets.drawing(inputs["noise"]):
            result = first(small.run())
        return {name: np.asarray(result)}, [large.run]

    def gpu_ways(self, peers: Any, be: Any, run: Run) -> dict[str, Run]:
        """Return the ways to do it in PyTorch on a GPU, whose results on our inputs were compared.

        Parameters
        ----------
        peers : module
            ``benchmarks/gpu_peers.py``.
        be, run
            Our backend there, and `operation` on it.
        """
        result = on_host(be, run())
        work = self.peer_on_gpu(peers.torch, {name: peers.device(value) for name, value in self.inputs().items()})
        with peers.drawing(self.noise(be, result)):
            theirs = first(work.run()).cpu().numpy()
        agree(self.name, first(result), theirs)
        return peers.ways(work)

    def gpu_forms(self, peers: Any, folder: Path | None) -> dict[str, Callable[[], tuple[Run, Any]]]:
        """Return what makes the ways of an image network in PyTorch, and with each what it makes of our inputs.

        The folder has the network as diffusers reads it, in a folder "unet".
        """
        raise NotImplementedError

    def gpu_result(self, be: Any) -> Any:
        """Return what ours makes of these inputs, as one vector."""
        return vector(on_host(be, self.operation(be)()))

    def outputs(self, be: Any) -> Any:
        """Return what shows that a precision is right, on the host."""
        raise NotImplementedError

    def in_precision(self, be: Any, other: Any) -> Run:
        """Return `operation` on a backend of one of `precisions`, whose outputs were compared with those of `be`."""
        want, allowed = self.outputs(be), self.precisions[other.precision]
        error = float(np.linalg.norm(self.outputs(other) - want) / np.linalg.norm(want))
        if not error <= allowed:  # NaN fails
            raise AssertionError(
                f"{self.name}: {other.precision} and float32 differ by {error:.3g}, allowed are {allowed:.3g}"
            )
        return self.operation(other)

    def twin(self, be: Any, twins: Any) -> Run | None:
        """Return the same with the Numba kernels of `twins` on a GPU, where there is one."""
        del be, twins
        return None


def fills(result: Any, work: Callable[[], None]) -> Run:
    """Return what does work that fills arrays, and returns these."""

    def run() -> Any:
        work()
        return result

    return run


def on_host(be: Any, result: Any) -> Any:
    """Return what a run made, with NumPy arrays in place of a backend's own."""
    if isinstance(result, tuple):
        return tuple(on_host(be, part) for part in result)
    return be.to_numpy(result) if be.owns(result) else result


def first(result: Any) -> Any:
    """Return a result, or the first of several."""
    return result[0] if isinstance(result, tuple) else result


def vector(result: Any) -> Any:
    """Return what a run made as one float64 vector; of a model, its parameters."""
    if isinstance(result, tuple):
        return np.concatenate([vector(part) for part in result])
    net = getattr(result, "net", None)
    return np.asarray(result if net is None else net.flat, np.float64).reshape(-1)


def agree(name: str, ours: Any, theirs: Any) -> None:
    """Raise `AssertionError` where results of a GPU and of a peer on the same inputs differ."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error <= SAME:  # NaN fails
        raise AssertionError(f"{name}: ours and PyTorch's differ by {error:.3g}, allowed are {SAME:g}")


def finite(shape: tuple[int, ...], low: float, high: float) -> Callable[[Any], None]:
    """Return a check of an array's shape, and of the standard deviation of a part of it."""

    def check(x: Any) -> None:
        assert x.shape == shape
        assert x.dtype == np.float32
        part = x.reshape(len(x), -1)[:1000, :100_000]
        assert np.isfinite(part).all()
        assert low < part.std() < high

    return check
