"""How CUDA sources are put together, compiled, cached and launched: one home for options, geometry and arguments.

A source is one translation unit: constants made from `fastdiff.noise`, ``common.cuh``, ``laws.cuh``, the file.
`CupyRuntime` runs it on a GPU. Whatever has the methods of `Runtime` may take its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends.protocol import DAMPED, KRYLOV, KRYLOV_LEAST, LEAKY_SLOPE, PIVOT, TINY
from fastdiff.errors import BackendError

log = logging.getLogger("fastdiff")

Array = Any

REAL = np.dtype(np.float32)

# -fmad=false: one rounding per operation, as in NumPy; likewise denormals, division and square roots as IEEE 754 says.
COMPILE_OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")

# What a parameter of an entry may be, and the NumPy type it is cast to.
SCALARS = {
    "real": REAL,
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "int": np.dtype(np.int32),
    "int32": np.dtype(np.int32),
    "uint32": np.dtype(np.uint32),
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
}
# Tasks that a launch takes at most, where it takes several: its parameters have 4 KB.
TASKS = {"WeightTask": 24, "FinishTask": 24, "MmaTask": 24, "SumTask": 64, "GatherTask": 24, "NormTask": 48}
# Structures passed by value; their C text is made from this, fields of one type are a plain vector.
_ROUND_KEYS = np.dtype([("words", np.uint32, (20,))])
_CONV_SIZES = np.dtype(
    [(name, np.int32) for name in ("images", "channels", "outputs")]
    + [
        (name, np.int32, (2,))
        for name in ("input", "output", "kernel", "stride", "pad", "up", "up_period", "stride_period", "fold")
    ]
)


def _task(wide: str, narrow: str, sizes: bool = True) -> np.dtype[Any]:
    """What a launch is told of one of its tasks; `first` is the first block that works on it."""
    fields: list[Any] = [(name, np.int64) for name in wide.split()]
    fields += [("sizes", _CONV_SIZES)] if sizes else []
    return np.dtype(fields + [(name, np.int32) for name in (*narrow.split(), "first")], align=True)


_TASKS = {
    "WeightTask": _task("x dy partials sums chunk", "vectors"),
    "FinishTask": _task("partials sums dw db", "chunks"),
    "MmaTask": _task("x dy dw db row", "rows_log columns_log tap_rows tap_columns channel_blocks chunk flags threads"),
    "SumTask": _task("partials dw db row size", "count", sizes=False),
    "GatherTask": _task("source weight bias target", "vectors"),
    "NormTask": _task("sums modulation dgamma dbeta images", "channels modulated", sizes=False),
}
_TABLE_ROW = np.dtype([(name, REAL) for name in ("p", "q", "a", "b", "c1", "c2", "c3", "e", "s", "r", "low", "high")])
STRUCTURES: dict[str, np.dtype[Any]] = {
    # The ten key pairs of Philox, from `fastdiff.noise.round_keys`.
    "RoundKeys": _ROUND_KEYS,
    # One row of a sampler table, and the bounds of m.
    "TableRow": _TABLE_ROW,
    # A step of a sampler: all that its kernel takes besides arrays and their sizes.
    "RowRecord": np.dtype(
        [
            ("first_row", np.uint64),
            ("step", np.uint32),
            ("stream", np.uint32),
            ("row", _TABLE_ROW),
            ("keys", _ROUND_KEYS),
        ],
        align=True,
    ),
    # The scalars of an optimiser step; `clip_norm` may be infinite.
    "AdamWScalars": np.dtype(
        [(name, REAL) for name in ("one_beta1", "one_beta2", "root", "eps", "keep", "rate", "one_ema")]
    ),
    # A convolution, see conv.cuh; pairs are along rows and along columns.
    "ConvSizes": _CONV_SIZES,
    # Tasks of a launch, see fd_find_task; places are numbers of values behind the arrays of the launch.
    **_TASKS,
    **{f"{name}s": np.dtype([("task", dtype, (TASKS[name],))], align=True) for name, dtype in _TASKS.items()},
}
NOWHERE = 2**31 - 1  # where a task that is not there begins


def tasks_of(kind: str, rows: Sequence[tuple[Any, ...]]) -> npt.NDArray[Any]:
    """Return tasks of a kind, as "WeightTask", to be passed by value: the fields of each in their order."""
    record = np.zeros(1, STRUCTURES[f"{kind}s"])
    record["task"]["first"] = NOWHERE
    for i, row in enumerate(rows):
        record["task"][0, i] = row
    return record


class Parameter(NamedTuple):
    """One parameter of an entry."""

    name: str
    dtype: np.dtype[Any]
    pointer: bool
    written: bool


# --------------------------------------------------------------------------------------------- the sources


def source_names() -> list[str]:
    """Return the names of the kernel sources, without ``.cu``."""
    folder = resources.files("fastdiff.kernels.cuda")
    return sorted(path.name[: -len(".cu")] for path in folder.iterdir() if path.name.endswith(".cu"))


def _read(name: str) -> str:
    return resources.files("fastdiff.kernels.cuda").joinpath(name).read_text(encoding="utf-8")


def constants() -> str:
    """Return the C text of what the sources take from `fastdiff.noise` and the protocol, and of the structures."""

    def real(value: float) -> str:
        return f"{np.float32(value)!s}f"  # the shortest decimal that reads back as this float32

    lines = [
        *(f"#define FD_PHILOX_M{i} {m:#x}u" for i, m in enumerate(law.PHILOX_M)),
        *(f"#define FD_LOG_{i} ({real(c)})" for i, c in enumerate(law.LOG_COEFFICIENTS)),
        *(f"#define FD_SIN_{i} ({real(c)})" for i, c in enumerate(law.SIN_COEFFICIENTS)),
        *(f"#define FD_COS_{i} ({real(c)})" for i, c in enumerate(law.COS_COEFFICIENTS)),
        f"#define FD_LN2_HIGH ({real(law.LN2_HIGH)})",
        f"#define FD_LN2_LOW ({real(law.LN2_LOW)})",
        f"#define FD_SQRT_HALF_BITS {law.SQRT_HALF_BITS:#x}",
        f"#define FD_ANGLE_UNIT ({real(law.ANGLE_UNIT)})",
        *(f"#define FD_STREAM_{stream.name} {int(stream)}u" for stream in law.Stream),
        f"#define FD_LEAKY_SLOPE ({real(LEAKY_SLOPE)})",
        f"#define FD_KRYLOV {KRYLOV}",
        f"#define FD_KRYLOV_LEAST {KRYLOV_LEAST!r}",
        f"#define FD_DAMPED {DAMPED}",
        f"#define FD_PIVOT {PIVOT!r}",
        f"#define FD_TINY {TINY!r}",
    ]
    names = {dtype: name for name, dtype in STRUCTURES.items()} | {REAL: "FD_REAL", np.dtype(np.int32): "int"}
    names |= {np.dtype(np.uint32): "unsigned int", np.dtype(np.uint64): "unsigned long long"}
    names |= {np.dtype(np.int64): "long long"}
    for structure, dtype in STRUCTURES.items():
        fields = []
        for field in dtype.names or ():
            kind = dtype[field]
            c_type = names[kind.base]
            fields.append(f"{c_type} {field}{''.join(f'[{n}]' for n in kind.shape)};")
        lines.append(f"struct {structure} {{ {' '.join(fields)} }};")
    return "\n".join(["#ifndef FD_REAL", "#define FD_REAL float", "#endif", *lines, ""])


def _file(name: str) -> tuple[str, str]:
    """The file of a source, and the text in front of it: "conv_mma.4" is ``conv_mma.cu`` with FD_STAGES 4."""
    file, _, stages = name.partition(".")
    return f"{file}.cu", f"#define FD_STAGES {stages}\n" if stages else ""


_INCLUDE = re.compile(r'^(#include "(\w+\.cuh)")$', re.MULTILINE)


@cache
def source_text(name: str) -> str:
    """Return the whole text of the source ``name.cu``, as compilers get it.

    A header that it includes, by a line such as ``#include "elementary.cuh"``, goes in front of it.
    """
    file, defined = _file(name)
    own = [header for _, header in _INCLUDE.findall(_read(file))]
    parts = ("common.cuh", "laws.cuh", *own, file)
    texts = (_INCLUDE.sub(r"// \1", _read(part)) for part in parts)
    marked = (f'#line 1 "{part}"\n{text}' for part, text in zip(parts, texts, strict=True))
    return "\n".join([constants() + defined, *marked])


_ENTRY = re.compile(r"FD_KERNEL\s+(?:FD_BOUNDS\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)\s*\{")
_PARAMETER = re.compile(r"(const\s+)?(\w+)\s*(\*?)\s*(?:__restrict__\s+)?(\w+)")


@cache
def entries(name: str) -> dict[str, tuple[Parameter, ...]]:
    """Return the entries of the source ``name.cu`` with their parameters, read from its text."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", _read(_file(name)[0]), flags=re.DOTALL)
    found = {}
    for entry, declared in _ENTRY.findall(text):
        parameters = []
        for part in filter(None, (piece.strip() for piece in declared.split(","))):
            match = _PARAMETER.fullmatch(part)
            kinds = SCALARS | STRUCTURES
            if match is None or match[2] not in kinds:
                raise ValueError(f"{name}.cu: parameter {part!r} of {entry} is of no type that runtime.py knows")
            parameters.append(Parameter(match[4], kinds[match[2]], bool(match[3]), not match[1]))
        found[entry] = tuple(parameters)
    return found


def cast_arguments(source: str, entry: str, args: Sequence[Any]) -> list[Any]:
    """Return the arguments of an entry as it declares them: arrays as they are, numbers as NumPy scalars.

    A launch checks nothing by itself. Here an array must be C-contiguous and have the declared dtype (None is a null
    pointer), and a number must fit its type; a structure is given as a tuple or an array.
    """
    parameters = entries(source)[entry]
    if len(args) != len(parameters):
        raise TypeError(f"{entry} takes {len(parameters)} arguments, got {len(args)}")
    cast: list[Any] = []
    for parameter, value in zip(parameters, args, strict=True):
        name, dtype = parameter.name, parameter.dtype
        if parameter.pointer:
            if value is not None:
                if value.dtype != dtype and not (dtype.fields and value.dtype == np.uint8):
                    raise TypeError(f"{entry}: {name} has dtype {value.dtype}, declared is {dtype}")
                if not value.flags.c_contiguous:
                    raise TypeError(f"{entry}: {name} is not C-contiguous")
            cast.append(value)
        elif dtype.fields:
            cast.append(_structure(dtype, value))
        elif dtype.kind == "f":
            with np.errstate(over="ignore"):
                cast.append(dtype.type(value))
        else:
            cast.append(dtype.type(value))
    return cast


def _structure(dtype: np.dtype[Any], value: Any) -> npt.NDArray[Any]:
    record = np.zeros(1, dtype)
    if isinstance(value, np.ndarray) and value.dtype == dtype:
        record[0] = value.reshape(-1)[0]
    else:
        assert dtype.names is not None
        base = dtype[0].base  # fields of one type, so that the structure is a plain vector
        flat = record.view(base)
        with np.errstate(over="ignore"):
            flat[:] = np.asarray(value).reshape(-1).astype(base)
    return record


# --------------------------------------------------------------------------------------------- runtimes


class CaptureError(BackendError):
    """Launches cannot be captured as a graph here; they can be issued one by one."""


@runtime_checkable
class Runtime(Protocol):
    """Where the arrays and the kernels of a `CudaBackend` live."""

    name: str
    device: str
    """What it runs on, in words."""
    arch: str
    """Its compute capability, such as "90"."""
    place: str
    """Which device of its machine that is, whatever numbers a process gives them."""
    multiprocessors: int
    shared_limit: int
    """Bytes of dynamic shared memory that a block may ask for."""
    block: int
    """Threads of a block where the kernel does not fix them; any number will do."""

    @property
    def nccl(self) -> Any:
        """The module cupy.cuda.nccl; None: there is none."""

    @property
    def capturing(self) -> bool:
        """Whether this thread is in `capture`."""

    def empty(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike = REAL) -> Array:
        """Return an uninitialised array."""

    def zeros(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike = REAL) -> Array:
        """Return an array of zeros."""

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """Return a C-contiguous array here, `value` itself where it is one."""

    def owns(self, value: Any) -> bool:
        """Whether `value` is an array of this runtime's kind, on its device."""

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        """Return a NumPy array; waits for the work that makes it."""

    def copy(self, target: Array, source: Array) -> None:
        """Copy `source` into `target`, of one shape and dtype."""

    def address(self, array: Array) -> int:
        """Where the array begins in memory."""

    def queue(self) -> int:
        """The stream that work is issued on now, as a number; in `capture` the one that it was called on."""

    def stream(self) -> int:
        """The same, for libraries that launch by themselves: in `capture` the one that is captured."""

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """out = a b for matrices; `a` and `b` may be transposed views."""

    def grid_1d(self, n: int, block: int | None = None) -> tuple[int, int]:
        """Return (grid, block) for a grid-stride loop over n items."""

    def launch(
        self, source: str, entry: str, grid: int, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Launch an entry of ``source.cu`` on the current stream; see `cast_arguments`."""

    def capture(self, issue: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does on the current stream what `issue` launches; it has not been done then.

        The same kernels on the same memory, whoever has that by then, and the same numbers. `issue` launches and
        nothing else, but for `aside` and `rejoin`: it allocates nothing, sends nothing to the device and reads nothing
        back.

        Raises
        ------
        CaptureError
            It did something else, or the device refuses.
        """

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for launches that others need not wait for.

        In `capture` these come after all that was launched before, but maybe beside what is launched later, until
        `rejoin`; they keep their own order. Elsewhere nothing is different.
        """

    def rejoin(self) -> None:
        """Have what is launched from now on come after all that was launched `aside`."""


WAVES = 8  # blocks per multiprocessor in a grid-stride launch: 2048 threads of 256


def grid_1d(n: int, block: int, most: int) -> tuple[int, int]:
    """Return (grid, block) for a grid-stride loop over n items in at most `most` blocks."""
    return max(1, min(-(-n // block), most)), block


# --------------------------------------------------------------------------------------------- CuPy

CPU_INSTEAD = "backend='cpu' works without a GPU"
LOCAL_NUMBERS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")  # of Open MPI, MPICH, srun
INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100  # cudaErrorInsufficientDriver, cudaErrorNoDevice


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def import_cupy() -> Any:
    """Return the module cupy, with a device that can be used, or raise a `BackendError` that says what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise BackendError(
            "backend 'cuda' needs CuPy: pip install 'fastdiff-engine[cuda13]', or [cuda12] for an older driver; "
            f"{CPU_INSTEAD} ({error})"
        ) from error
    api = cupy.cuda.runtime
    try:
        driver = api.driverGetVersion()
        if driver == 0:
            raise BackendError(f"backend 'cuda' needs an NVIDIA driver, and this machine has none; {CPU_INSTEAD}")
        count = api.getDeviceCount()
    except api.CUDARuntimeError as error:
        if error.status == INSUFFICIENT_DRIVER:
            raise BackendError(
                f"the NVIDIA driver is too old: it knows CUDA {_version(driver)}, and CuPy was built for CUDA "
                f"{_version(api.runtimeGetVersion())}; update the driver, or install 'fastdiff-engine[cuda12]'; "
                f"{CPU_INSTEAD}"
            ) from error
        if error.status == NO_DEVICE:
            count = 0
        else:
            raise BackendError(f"CUDA does not start: {error}; {CPU_INSTEAD}") from error
    if count == 0:
        raise BackendError(
            f"backend 'cuda' needs an NVIDIA GPU, and the driver shows none (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}); {CPU_INSTEAD}"
        )
    return cupy


def use_own_device() -> None:
    """Where a launcher has begun several processes on this machine, and each sees several GPUs, have each its own.

    It becomes the current one: that of the process's number here, counted round. Engines that give each worker its
    CUDA_VISIBLE_DEVICES leave nothing to choose, and neither does who has made another device current.
    """
    number = next((os.environ[name] for name in LOCAL_NUMBERS if os.environ.get(name, "").isdecimal()), "0")
    with contextlib.suppress(BackendError):  # whoever makes a backend will say why
        if int(number) and (cuda := import_cupy().cuda).Device().id == 0:
            cuda.Device(int(number) % cuda.runtime.getDeviceCount()).use()


# Of an ELF header: offsets of the tables of segments and sections, then sizes and counts of their entries.
_ELF = struct.Struct("<32x QQ 6x HHHH 2x")
_SEGMENT = struct.Struct("<8x Q 16x Q 16x")  # of an entry: where a segment lies in the file, and how long it is


def cache_folder() -> Path:
    """Return where compiled kernels are kept: FASTDIFF_CACHE_DIR, or the user's cache folder."""
    given = os.environ.get("FASTDIFF_CACHE_DIR")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"
    return base / "cuda"


def cubin_size(code: bytes) -> int:
    """Return how long machine code, an ELF file, is by its own headers: where their tables and what they name end."""
    if len(code) < _ELF.size or code[:5] != b"\x7fELF\x02":
        raise ValueError("it is no 64-bit ELF file")
    segments, sections, segment_size, segment_count, section_size, section_count = _ELF.unpack_from(code)
    end = max(segments + segment_size * segment_count, sections + section_size * section_count)
    for at in range(segments, segments + segment_size * segment_count, max(1, segment_size)):
        if at + _SEGMENT.size <= len(code):
            end = max(end, sum(_SEGMENT.unpack_from(code, at)))
    return end


def compile_cubin(nvrtc: Any, name: str, arch: str) -> bytes:
    """Compile the source ``name.cu`` for an architecture such as "90".

    Through NVRTC itself and not through CuPy's own compiler, which sets ``-ftz=true``: denormals would be zeros.
    """
    program = nvrtc.createProgram(source_text(name), f"{name}.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, [*COMPILE_OPTIONS, f"-arch=sm_{arch}"])
        except Exception as error:
            raise BackendError(
                f"{name}.cu does not compile for sm_{arch} with NVRTC {'.'.join(map(str, nvrtc.getVersion()))}: "
                f"{error}\n{nvrtc.getProgramLog(program)}"
            ) from error
        code = bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)
    # CuPy takes the last byte for the end of a string. It is the highest of an alignment: zero.
    if cubin_size(code) == len(code) + 1:
        code += b"\0"
    if cubin_size(code) > len(code):
        raise BackendError(f"NVRTC gave {len(code)} bytes of {name}.cu for sm_{arch}, of {cubin_size(code)}")
    return code


def _kept_cubin(path: Path) -> bytes | None:
    """Return the machine code of a file; None where there is none, or a part of it only."""
    try:
        code = path.read_bytes()
        return code if cubin_size(code) <= len(code) else None
    except (OSError, ValueError):
        return None


def cached_cubin(nvrtc: Any, name: str, arch: str, anew: bool = False) -> bytes:
    """Return the machine code of ``name.cu``, found from an earlier time, or compiled now; `anew`: compiled now."""
    try:
        version = nvrtc.getVersion()
    except Exception as error:
        raise BackendError(f"CuPy finds no NVRTC to compile with: pip install nvidia-cuda-nvrtc ({error})") from error
    key = repr((source_text(name), COMPILE_OPTIONS, arch, version)).encode()
    path = cache_folder() / f"{name}-sm_{arch}-{hashlib.sha256(key).hexdigest()[:32]}.cubin"
    if not anew and (code := _kept_cubin(path)) is not None:
        return code
    log.info("compiling %s.cu for sm_%s", name, arch)
    code = compile_cubin(nvrtc, name, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)  # whole or not at all, whoever else compiles it now
    except OSError as error:
        _warn_unkept(str(path.parent), str(error))
    return code


@cache
def _warn_unkept(folder: str, error: str) -> None:
    """Say so once for a folder, and not for each source."""
    log.warning(
        "compiled CUDA kernels are not kept, and every process compiles them anew: %s; FASTDIFF_CACHE_DIR names "
        "another folder than %s",
        error,
        folder,
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


class CupyRuntime:
    """CuPy arrays on the device that is current when this is made; work goes to CuPy's current stream.

    Raises
    ------
    BackendError
        CuPy, the driver or a GPU is missing, or the driver is too old.
    """

    name = "cupy"
    block = 256

    def __init__(self) -> None:
        self._cupy = cupy = import_cupy()
        device = cupy.cuda.Device()
        self.device_id = int(device.id)
        attributes = device.attributes
        self.multiprocessors = int(attributes["MultiProcessorCount"])
        self.shared_limit = int(attributes["MaxSharedMemoryPerBlockOptin"])
        self.arch = str(device.compute_capability)
        title = cupy.cuda.runtime.getDeviceProperties(self.device_id)["name"]
        self.device = title.decode() if isinstance(title, bytes) else str(title)
        self.place = str(cupy.cuda.runtime.deviceGetPCIBusId(self.device_id))
        self._kernels: dict[tuple[str, str], Any] = {}
        self._shared: dict[tuple[str, str], int] = {}
        # While this thread captures: the `queue` it was called on, the stream that is captured, and the one `aside`.
        self._captured = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return CupyRuntime, ()

    @property
    def nccl(self) -> Any:
        try:
            from cupy.cuda import nccl
        except ImportError:
            return None
        return nccl if getattr(nccl, "available", False) else None

    @property
    def capturing(self) -> bool:
        return getattr(self._captured, "queue", None) is not None

    def _allocate(self, make: Any, count: Any, *args: Any) -> Array:
        if self.capturing:  # CuPy would, and might give the memory to others while the graph still uses it
            raise CaptureError("memory was asked for while a graph was captured")
        try:
            return make(*args)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._cupy.cuda.runtime.memGetInfo()
            free += self._cupy.get_default_memory_pool().free_bytes()
            raise BackendError(
                f"out of device memory on {self.device}: asked for {_size(count())}, {_size(free)} of {_size(total)} "
                "are free; a smaller batch needs less (batch=...)"
            ) from error

    def empty(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike = REAL) -> Array:
        return self._allocate(self._cupy.empty, lambda: _bytes(shape, dtype), shape, dtype)

    def zeros(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike = REAL) -> Array:
        return self._allocate(self._cupy.zeros, lambda: _bytes(shape, dtype), shape, dtype)

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        cupy = self._cupy

        def make() -> Array:
            if isinstance(value, cupy.ndarray):
                array = value if value.device.id == self.device_id else value.copy()  # a copy is made here
            else:
                array = cupy.asarray(value, dtype)
            return cupy.ascontiguousarray(array, dtype)

        return self._allocate(make, lambda: _bytes(getattr(value, "shape", None) or np.shape(value), dtype or REAL))

    def owns(self, value: Any) -> bool:
        return isinstance(value, self._cupy.ndarray) and value.device.id == self.device_id

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return self._cupy.asnumpy(array)

    def copy(self, target: Array, source: Array) -> None:
        self._cupy.copyto(target, source, casting="no")

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def queue(self) -> int:
        return int(self._captured.queue) if self.capturing else self.stream()

    def stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        self._allocate(self._cupy.dot, lambda: out.nbytes, a, b, out)

    def grid_1d(self, n: int, block: int | None = None) -> tuple[int, int]:
        return grid_1d(n, block or self.block, self.multiprocessors * WAVES)

    def kernel(self, source: str, entry: str) -> Any:
        """Return CuPy's function object of an entry."""
        key = (source, entry)
        if key not in self._kernels:
            module = self._load(source)
            self._kernels.update({(source, name): module.get_function(name) for name in entries(source)})
        return self._kernels[key]

    def attribute(self, source: str, entry: str, name: str) -> int:
        """Return what the driver knows of an entry; `name` as in ``CU_FUNC_ATTRIBUTE_NUM_REGS``: "NUM_REGS"."""
        driver = self._cupy.cuda.driver
        number = getattr(driver, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(driver.funcGetAttribute(number, self.kernel(source, entry).ptr))

    def _load(self, source: str) -> Any:
        """Load machine code from memory; what the driver refuses is compiled anew, once."""
        cuda, nvrtc = self._cupy.cuda, self._cupy.cuda.nvrtc
        module = cuda.function.Module()
        with cuda.Device(self.device_id):
            try:
                module.load(cached_cubin(nvrtc, source, self.arch))
                return module
            except cuda.driver.CUDADriverError as error:
                log.info("%s.cu is compiled anew: the driver refuses what was kept (%s)", source, error)
            try:
                module.load(cached_cubin(nvrtc, source, self.arch, anew=True))
            except cuda.driver.CUDADriverError as error:
                raise BackendError(
                    f"the driver, which knows CUDA {_version(cuda.runtime.driverGetVersion())}, does not load "
                    f"{source}.cu as NVRTC {'.'.join(map(str, nvrtc.getVersion()))} compiles it for sm_{self.arch}: "
                    f"{error}; a newer driver may"
                ) from error
        return module

    def launch(
        self, source: str, entry: str, grid: int, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        cast = cast_arguments(source, entry, args)
        for parameter, value in zip(entries(source)[entry], cast, strict=True):
            if parameter.pointer and value is not None:
                if not isinstance(value, self._cupy.ndarray):
                    raise TypeError(f"{entry}: {parameter.name} is {type(value).__name__}, wants a CuPy array")
                if value.data.device_id != self.device_id:
                    raise BackendError(
                        f"{entry}: {parameter.name} is on GPU {value.data.device_id}, and this backend works on GPU "
                        f"{self.device_id}, {self.device}: bring it there, or make a backend while its GPU is current"
                    )
        kernel = self.kernel(source, entry)
        if shared_bytes > self._shared.get((source, entry), 0):
            # Above 48 KB a block must be told, and its static shared memory counts: any size is told.
            driver = self._cupy.cuda.driver
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(kernel.ptr, attribute, shared_bytes)
            self._shared[source, entry] = shared_bytes
        kernel((grid,), (block,), tuple(cast), shared_mem=shared_bytes)

    def capture(self, issue: Callable[[], None]) -> Callable[[], None]:
        # On a stream of its own, because the legacy default stream cannot be captured, and one that does not wait for
        # that stream nor it for this one. Nothing runs on it: the memory stays that of the caller's queue.
        queue, cuda = self.queue(), self._cupy.cuda
        try:
            with cuda.Stream(non_blocking=True) as stream:
                stream.begin_capture()
                self._captured.queue, self._captured.stream, self._captured.side = queue, stream, None
                try:
                    issue()
                except BaseException:
                    with contextlib.suppress(Exception):  # the capture has failed already
                        stream.end_capture()
                    raise
                finally:
                    self._captured.queue = None
                graph = stream.end_capture()
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            # The caller issues it again, and will see. An error of its own is its own.
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            self._captured.stream = self._captured.side = None  # which must live until the capture has ended
        launch: Callable[[], None] = graph.launch
        return launch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        if not self.capturing:
            yield
            return
        captured = self._captured
        if captured.side is None:
            captured.side = self._cupy.cuda.Stream(non_blocking=True)
        self._follow(captured.side, captured.stream)
        with captured.side:
            yield

    def rejoin(self) -> None:
        if self.capturing and self._captured.side is not None:
            self._follow(self._captured.stream, self._captured.side)

    def _follow(self, stream: Any, other: Any) -> None:
        """Have what comes on a stream wait for what another one has."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(other)
        stream.wait_event(event)


def _bytes(shape: Any, dtype: npt.DTypeLike) -> int:
    return int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
