"""Backends: the protocol, and how one is chosen.

``numpy`` is the reference: plain formulas, float32 or float64. ``cpu`` runs compiled Numba kernels in float32, ``cuda``
CUDA C++ on a GPU. Each is a package, imported when it is asked for, with the same file names inside.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

from fastdiff.backends.protocol import (
    CONVOLUTIONS,
    LEAKY_SLOPE,
    MAX_VISITS,
    PRECISIONS,
    Activation,
    AdamW,
    Array,
    Backend,
    ChainTable,
    DenseLayer,
    Gather,
    Inputs,
    LinearPart,
    MLPPlan,
    PartGradient,
    Row,
    RowMap,
    Segment,
    SharingBackend,
    Team,
    TimeMode,
    TmpdPlan,
    Training,
    TrainingDraws,
    TrainState,
    measured,
)
from fastdiff.errors import ArgumentError, BackendError, check_choice, check_int, is_on_device, shown
from fastdiff.signals import delayed

__all__ = [
    "CONVOLUTIONS",
    "LEAKY_SLOPE",
    "MAX_VISITS",
    "PRECISIONS",
    "Activation",
    "AdamW",
    "Array",
    "Backend",
    "ChainTable",
    "DenseLayer",
    "Gather",
    "Inputs",
    "LinearPart",
    "MLPPlan",
    "PartGradient",
    "Row",
    "RowMap",
    "Segment",
    "SharingBackend",
    "Team",
    "TimeMode",
    "TmpdPlan",
    "TrainState",
    "Training",
    "TrainingDraws",
    "available_backends",
    "backend_for",
    "get_backend",
]

log = logging.getLogger("fastdiff")


def available_backends() -> list[str]:
    """Return the names of the backends that work on this machine, the reference first.

    Examples
    --------
    >>> 'numpy' in fd.available_backends()
    True
    """
    return ["numpy", *([] if _no_compiler() else ["cpu"]), *(["cuda"] if _has_cuda() else [])]


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
    try:
        if name == "numpy":
            from fastdiff.backends.numpy import NumpyBackend

            return NumpyBackend()
        if name == "cuda":
            from fastdiff.backends.cuda import CudaBackend
            from fastdiff.kernels.cuda.runtime import use_own_device

            use_own_device()
            return CudaBackend(kernels=kernels, precision=precision, graphs=graphs, convolutions=convolutions)
        if _no_compiler():
            raise BackendError(
                "NUMBA_DISABLE_JIT is set, and backend 'cpu' compiles its kernels: unset it, or take 'numpy'"
            )
        with delayed():  # kernels that others call are compiled, or loaded, when they are imported
            from fastdiff.backends.cpu import CpuBackend

        return CpuBackend(threads=threads, precision=precision)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("fastdiff"):
            raise
        raise BackendError(
            "fastdiff is imported from a source tree that is not installed: run pip install -e ."
        ) from error


def _no_compiler() -> bool:
    """Whether Numba has been told to compile nothing."""
    numba = sys.modules.get("numba")
    if numba is not None:
        return bool(numba.config.DISABLE_JIT)
    try:
        return int(os.environ.get("NUMBA_DISABLE_JIT", "0") or "0") != 0
    except ValueError:
        return False  # as Numba takes it


MEASURED = Path(__file__).parent / "cuda" / "measured"
"""Results of `make gpu`, a file for each family of GPUs, as sm_90.json: only there is "auto" the GPU."""


def _why_not_cuda() -> str:
    """Return why "auto" is not "cuda" here, or nothing; a GPU is looked at only where some family was measured."""
    families = sorted(path.stem for path in MEASURED.glob("sm_*.json") if measured(path))
    if not families:
        return "not measured on a GPU yet, which 'make gpu' does"
    try:
        be = _shared("cuda", None, "raw", "float32", True, "own")
    except BackendError as error:
        return str(error)
    family = f"sm_{be.runtime.arch}"  # type: ignore[attr-defined]
    if family in families:
        return ""
    return f"measured on GPUs of {', '.join(families)}, and this one is of {family}; 'make gpu' measures it"


@cache
def _choose_auto() -> str:
    why = _why_not_cuda()
    name = "cuda" if not why else "numpy" if _no_compiler() else "cpu"
    why = f", and not 'cuda': {why}" if why else ""
    log.info("backend 'auto' chose %r%s%s", name, ", as NUMBA_DISABLE_JIT is set" if name == "numpy" else "", why)
    return name


_backends: WeakSet[type] = WeakSet()  # to ask an object for every method of the protocol takes 0.1 ms


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
        A backend object is returned as it is. "auto" is "cuda" on a GPU of a family whose measurements are part of
        the package (so far of none), else the CPU, or "numpy" where NUMBA_DISABLE_JIT is set; it logs once what it
        chose, and why.
    threads : int, optional
        For "cpu": how many threads its kernels use; by default one per core this process may run on, and no more
        than a container's quota of time allows. Results do not depend on it.
    kernels : {"raw", "numba"}, optional
        For "cuda": the CUDA C++ kernels (default), or their Numba twins where there are some.
    precision : {"float32", "bf16x3", "bf16"}, optional
        For "cuda" and "cpu": what is multiplied; sums and everything else are float32. "bf16": convolutions and linear
        layers of image networks multiply bfloat16, on a CPU with AMX (Intel's since Sapphire Rapids). On "cuda" so do
        the forward passes and sampling chains of perceptrons, where these run in one launch (``fastdiff info`` of a
        model says whether they do). "bf16x3", for "cuda" alone: there each factor is the sum of two bfloat16, which
        leaves errors of about 2^-16 of it; image networks are float32 then. What perceptrons do layer by layer is
        always float32: training, derivatives, draws given observations, networks with labels or covariates, and those
        that are too wide.
    graphs : bool, optional
        For "cuda": whether work that comes again is launched as a CUDA graph (default), in which weight gradients of
        image networks run beside the backward pass, or kernel by kernel, one after the other, of the same bits; for
        comparison, and where a tool wants to see every launch.
    convolutions : {"own", "cudnn"}, optional
        For "cuda": our own kernels (default), or cuDNN's where it has some, which needs the extra ``[cudnn]``.

    Raises
    ------
    ArgumentError
        An unknown name, or an option that the backend does not have.
    BackendError
        "cuda" where CuPy, a driver or a GPU is missing: the message says what to install. "cpu" where Numba is told
        to compile nothing, or with "bf16" where the CPU has no AMX.

    Examples
    --------
    >>> fd.get_backend('cpu', threads=1).name
    'cpu'
    """
    if not isinstance(backend, (str, type)) and (type(backend) in _backends or isinstance(backend, Backend)):
        _backends.add(type(backend))
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
        raise ArgumentError("kernels", shown(kernels), "None: only the cuda backend has a choice of kernels")
    if precision is not None and name == "numpy":
        raise ArgumentError("precision", shown(precision), "None: the numpy backend has no choice of precision")
    if precision == "bf16x3" and name != "cuda":
        raise ArgumentError("precision", shown(precision), "'float32' or 'bf16': only the cuda backend has 'bf16x3'")
    if convolutions is not None and name != "cuda":
        raise ArgumentError("convolutions", shown(convolutions), "None: only the cuda backend has a choice of them")
    if graphs is not None and (name != "cuda" or not isinstance(graphs, bool)):
        wants = "True or False" if name == "cuda" else "None: only the cuda backend has graphs"
        raise ArgumentError("graphs", shown(graphs), wants)
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
