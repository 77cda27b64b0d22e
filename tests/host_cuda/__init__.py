"""The CUDA sources of fastdiff on machines without a GPU: compiled by g++ against ``shim.hpp``, run on NumPy arrays.

A library is built once per source text, shim and flags, and kept under ``build/host_cuda``: plain, under the address
and undefined-behaviour sanitizers, or with the race checker ``races.cpp``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdiff.kernels.cuda import runtime

SHIM = Path(__file__).with_name("shim.hpp")
RACES = Path(__file__).with_name("races.cpp")
ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++")
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
# The optimiser may not fuse a product and a sum, nor assume types behind pointers: kernels read float as float4.
FLAGS = (
    "-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
)  # fmt: skip
# Undefined behaviour ends the process; address errors do so anyway.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

# Every access is a call to races.cpp. No library of a sanitizer is linked.
RACE_FLAGS = ("-fsanitize=thread,alignment", "--param", "tsan-instrument-func-entry-exit=0", "-DFD_RACES")

C_TYPES = {np.dtype(k): v for k, v in [
    (np.float32, "float"), (np.float64, "double"), (np.int32, "int"), (np.uint32, "unsigned int"),
    (np.int64, "long long"), (np.uint64, "unsigned long long"),
]}  # fmt: skip

_LOCK = threading.Lock()  # a library holds the state of one launch


class Played(NamedTuple):
    """A launch of a graph that has run.

    Attributes
    ----------
    source, entry : str
    stream : int
        0, or 1 aside.
    clock : (int, int)
        How many launches of the two streams are before it, itself among them.
    touched : (k, 3) array or None
        Of each stretch of bytes where it begins and ends, and whether it was written; None: nobody has looked.
    """

    source: str
    entry: str
    stream: int
    clock: tuple[int, int]
    touched: np.ndarray | None

    def precedes(self, other: Played) -> bool:
        """Whether something puts it before another one."""
        return self.clock[self.stream] <= other.clock[self.stream]


class HostError(RuntimeError):
    """A launch did what is undefined on a GPU."""


def has_compiler() -> bool:
    """Whether the host run can be built here."""
    return shutil.which(CXX) is not None


def sanitizer_library() -> str:
    """Return the path of libasan, to be preloaded into the process that loads a sanitized library."""
    command = [CXX, "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _c_type(parameter: runtime.Parameter) -> str:
    for name, dtype in runtime.STRUCTURES.items():
        if dtype == parameter.dtype:
            return name
    return C_TYPES[parameter.dtype]


def host_text(source: str) -> str:
    """Return the text that g++ compiles: the source, and a function per entry that launches it."""
    return _host_text(source, runtime.source_text(source))


@cache  # every launch asks
def _host_text(source: str, text: str) -> str:
    parts = [text, '#line 1 "launchers"']
    for entry, parameters in runtime.entries(source).items():
        passed = ", ".join(
            f"{'*' if not p.pointer else ''}({'' if p.written else 'const '}{_c_type(p)} *)args[{i}]"
            for i, p in enumerate(parameters)
        )
        parts.append(
            f"static void call_{entry}(void **args) {{ (void)args; {entry}({passed}); }}\n"
            f'extern "C" const char *launch_{entry}(void **args, unsigned grid, unsigned block, size_t shared_bytes, '
            "int order, unsigned seed) {\n"
            f"    return fd_host::launch(call_{entry}, args, grid, block, shared_bytes, order, seed);\n}}"
        )
    return "\n".join(parts) + "\n"


def build(text: str, sanitize: bool = False, races: bool = False) -> Path:
    """Return the shared library of a text, compiled now or found from an earlier time."""
    flags = [*FLAGS, *(SANITIZERS if sanitize else ()), *(RACE_FLAGS if races else ())]

    def make(made: Path) -> None:
        source, object_file = made.with_name("source.cpp"), made.with_name("source.o")
        source.write_text(text)
        command = [CXX, *flags, "-DFD_HOST", f"-I{SHIM.parent}", str(source), "-o"]
        if races:
            _run([*command, str(object_file), "-c"])
            _run([CXX, *FLAGS, str(object_file), str(_race_checker()), "-ldl", "-o", str(made)])
        else:
            _run([*command, str(made)])

    return _kept(".so", [text, *flags, *([RACES.read_text()] if races else [])], make)


@cache
def _race_checker() -> Path:
    """Return the object file of ``races.cpp``, which is in every library that looks for races."""
    command = [CXX, *FLAGS, "-DFD_RACES", "-c", str(RACES), "-o"]
    return _kept(".o", [RACES.read_text(), *FLAGS], lambda made: _run([*command, str(made)]))


def _kept(kind: str, parts: list[str], make: Callable[[Path], None]) -> Path:
    """Return the file that is made of the parts and the shim."""
    shim = [path.read_text() for path in (SHIM, RACES.with_suffix(".hpp"))]
    key = hashlib.sha256("\0".join([*parts, *shim, CXX]).encode()).hexdigest()[:24]
    folder = ROOT / "build" / "host_cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "fastdiff-host-cuda"
        folder.mkdir(exist_ok=True)
    file = folder / f"{key}{kind}"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work, f"made{kind}")
            make(made)
            made.replace(file)
    return file


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"{' '.join(command)}\n{done.stderr}")


def build_all(sanitize: bool = False, races: bool = False) -> None:
    """Build the libraries of all sources, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: build(host_text(source), sanitize, races), runtime.source_names()))


@cache
def _library(text: str, sanitize: bool, races: bool) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(text, sanitize, races)))


@cache
def _launcher(text: str, sanitize: bool, races: bool, entry: str) -> Callable[..., bytes | None]:
    function = _library(text, sanitize, races)[f"launch_{entry}"]
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint]
    return function


def _with_lines(said: str, library: ctypes.CDLL) -> str:
    """What was said, with the line of a source for each place in the library; not with that of the shim."""

    def line(place: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-e", library._name, place[1]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        names = [Path(name.split(" ")[0]).name for name in done.stdout.splitlines()]
        return next((name for name in names if not name.startswith(SHIM.name)), place[0])

    return re.sub(r"\+(0x[0-9a-f]+)", line, said) if shutil.which("addr2line") else said


def _late(launches: list[Callable[[], None]]) -> list[Callable[[], None]]:
    """The launches of a graph, those aside as late as may be."""
    own, aside = ([launch for launch in launches if launch.at[0] == stream] for stream in (0, 1))
    ordered, done = [], 0
    for launch in own:
        _, (_, needed) = launch.at
        ordered += [*aside[done:needed], launch]
        done = max(done, needed)
    return ordered + aside[done:]


def _touched(library: ctypes.CDLL) -> np.ndarray:
    """What the last launch touched, as `Played` has it."""
    count = ctypes.c_size_t()
    library.fd_races_touched.restype = ctypes.c_void_p
    numbers = library.fd_races_touched(ctypes.byref(count))
    found = np.empty(count.value, np.uintp)
    ctypes.memmove(found.ctypes, numbers, found.nbytes)
    return found.reshape(-1, 3)


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges (begin, end), those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


class HostRuntime:
    """The runtime of a `CudaBackend` on NumPy arrays.

    A graph is a list of launches: it has addresses and no arrays, as on a GPU. What lies there when it runs must be an
    array that is known, by a launch or by its address, and still lives.

    Parameters
    ----------
    order : {"forward", "backward", "shuffled", "mixed"}
        In which order the threads of a block, and the blocks, run. Mixed: an entry's launches have all of them, any
        three in turn each of them once.
    seed : int
        Of the shuffling.
    sanitize : bool
        Whether libraries are built under AddressSanitizer and UndefinedBehaviorSanitizer; libasan must be preloaded.
    cut_sums : bool
        Whether tensor cores cut the sums of their products toward zero, as on a GPU, and do not round every one.
    races : bool
        Whether a launch fails that has a data race, a misaligned access or a read of shared memory never written.
    block : int
        Threads of a block where the kernel does not fix them. A prime: nothing divides by it.
    multiprocessors : int
        Few, so that grid-stride loops go round.
    late : bool
        Whether a graph's launches aside run as late as may be, and not when they were issued.
    """

    name = "host"
    device = place = "host"
    arch = ""
    nccl = None
    shared_limit = 227 * 1024
    waves = 2

    def __init__(
        self,
        order: str = "forward",
        seed: int = 1,
        sanitize: bool | None = None,
        block: int = 61,
        multiprocessors: int = 2,
        races: bool = False,
        cut_sums: bool = False,
        late: bool = False,
    ) -> None:
        self.order, self.seed = order, seed
        self.sanitize = os.environ.get("FASTDIFF_HOST_SANITIZE", "0") != "0" if sanitize is None else sanitize
        self.block, self.multiprocessors, self.races, self.cut_sums = block, multiprocessors, races, cut_sums
        self.late = late
        self.launches: list[tuple[str, str]] = []
        """(source, entry) of every launch so far."""
        self.met: set[tuple[str, str, str]] = set()
        """(source, entry, order) of them."""
        self._to_come: dict[tuple[str, str], list[str]] = {}
        self.graphs: list[int] = []
        """How many launches each graph has that was captured so far."""
        self.static_shared: dict[tuple[str, str], int] = {}
        """Bytes of shared memory that each entry had besides the dynamic."""
        self.accesses: dict[tuple[str, str], int] = {}
        """How often the last launch of each entry touched memory, where races are looked for."""
        self.played: list[Played] = []
        """Launches of the graph that ran last."""
        self.forked: list[int] = []
        """How many of its launches each graph that was captured has aside."""
        self._captured = None
        self._stream, self._clocks = 0, [[0, 0], [0, 0]]
        self._ends: dict[int, int] = {}  # of arrays that begin there, dead ones too

    @cached_property
    def _known(self):
        """Arrays by the address where they begin."""
        return weakref.WeakValueDictionary()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_known"}

    @property
    def capturing(self):
        return self._captured is not None

    def _not_in_a_graph(self, what):
        if self.capturing:
            raise HostError(f"{what} while a graph is captured")

    def empty(self, shape, dtype=runtime.REAL):
        self._not_in_a_graph("memory is asked for")
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8).fill(255)  # NaN: what is read must have been written
        return array

    def zeros(self, shape, dtype=runtime.REAL):
        self._not_in_a_graph("memory is asked for")
        return np.zeros(shape, dtype)

    def asarray(self, value, dtype=None):
        self._not_in_a_graph("an array is sent")
        return np.ascontiguousarray(value, dtype)

    def owns(self, value):
        return isinstance(value, np.ndarray)

    def to_numpy(self, array):
        self._not_in_a_graph("an array is read")
        return array

    def copy(self, target, source):
        self._not_in_a_graph("CuPy copies")
        np.copyto(target, source, casting="no")

    def matmul(self, a, b, out):
        self._not_in_a_graph("CuPy multiplies")
        np.matmul(a, b, out=out)

    def address(self, array):
        self._know(array)
        return array.ctypes.data

    def _know(self, array):
        """Where the array ends, and where the memory begins that it is a part of; a kernel may touch all of this."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        start = owner.ctypes.data
        self._known[start], self._ends[start] = owner, start + owner.nbytes
        return array.ctypes.data + array.nbytes, start

    def _lives(self, end, start):
        owner = self._known.get(start)
        return owner is not None and end <= start + owner.nbytes

    def queue(self):
        return 0

    def stream(self):
        return self.queue() + (1 << 20) * self.capturing

    def grid_1d(self, n, block=None):
        return runtime.grid_1d(n, block or self.block, self.multiprocessors * self.waves)

    def _argument(self, entry, parameter, value):
        """The memory of an array argument."""
        assert isinstance(value, np.ndarray), f"{entry}: {parameter.name} is {type(value)}"
        return value

    def _order_of(self, source, entry):
        order = self.order
        if order == "mixed":
            to_come = self._to_come.get((source, entry)) or list(ORDERS)
            order = to_come.pop((self.seed >> 16) % len(to_come))
            self._to_come[source, entry] = to_come
        self.met.add((source, entry, order))
        return ORDERS[order]

    def launch(self, source, entry, grid, block, args, shared_bytes=0):
        if shared_bytes > self.shared_limit:
            raise HostError(f"{entry} asks for {shared_bytes} bytes of shared memory")
        cast = runtime.cast_arguments(source, entry, args)
        pointers = (ctypes.c_void_p * max(1, len(cast)))()
        kept, used, limit = [], [], HostRuntime.shared_limit  # that of the device, whatever is allowed here
        for i, (parameter, value) in enumerate(zip(runtime.entries(source)[entry], cast, strict=True)):
            if parameter.pointer:
                memory = None if value is None else self._argument(entry, parameter, value)
                pointers[i] = None if memory is None else memory.ctypes.data
                used += [] if memory is None else [self._know(memory)]
            else:
                kept.append(np.ascontiguousarray(value).reshape(-1))
                pointers[i] = kept[-1].ctypes.data
        races = self.races
        built = host_text(source), self.sanitize, races
        library, function = _library(*built), _launcher(*built, entry)
        stream, clock = self._stream, self._clocks[self._stream]
        clock[stream] += 1
        at, captured = (stream, tuple(clock)), self.capturing

        def run(kept=kept):  # which the pointers need
            if not all(self._lives(*where) for where in used):
                raise HostError(f"{source}.cu, {entry}: memory of the graph has been given back")
            with _LOCK:
                self.seed = (self.seed * 69069 + 1) % 2**32
                library.fd_cut_sums(int(self.cut_sums))
                if races:
                    # Kept until the end, so that none of them makes room for memory of the host run itself.
                    alive = dict(self._known.items())
                    watched = np.array(_union((start, self._ends[start]) for start in alive), np.uintp)
                    library.fd_races_watch(watched.ctypes, ctypes.c_size_t(len(watched)))
                error = function(pointers, grid, block, shared_bytes, self._order_of(source, entry), self.seed)
                static = library.fd_static_shared()
                if races:
                    self.accesses[source, entry] = library.fd_races_accesses()
                if captured:
                    self.played.append(Played(source, entry, *at, _touched(library) if races else None))
            self.launches.append((source, entry))
            self.static_shared[source, entry] = max(static, self.static_shared.get((source, entry), 0))
            if error:
                raise HostError(f"{source}.cu, {entry}: {_with_lines(error.decode(), library)}")
            if static + shared_bytes > limit:
                raise HostError(f"{entry} asks for {shared_bytes} bytes of shared memory, besides {static} of its own")

        if captured:
            run.at = at
            self._captured.append(run)
        else:
            run()

    def capture(self, issue):
        self.begin_capture()
        try:
            issue()
        except BaseException:
            with suppress(HostError):
                self.end_capture()
            raise
        launches = self.end_capture()
        if self.late:
            launches = _late(launches)

        def launch_all():
            self.played.clear()
            for launch in launches:
                launch()

        return launch_all

    def begin_capture(self):
        assert not self.capturing
        self._captured, self._clocks = [], [[0, 0], [0, 0]]

    def end_capture(self):
        """What has been launched since `begin_capture`, as functions."""
        launches, self._captured, (own, side) = self._captured, None, self._clocks
        self.graphs.append(len(launches))
        self.forked.append(side[1])
        if own[1] < side[1]:
            raise HostError("what was launched aside has not been waited for at the end of a graph")
        return launches

    @contextmanager
    def aside(self):
        if not self.capturing:
            yield
            return
        self.follow(1, self.reached(0))
        with self.on(1):
            yield

    def rejoin(self):
        if self.capturing:
            self.follow(0, self.reached(1))

    @contextmanager
    def on(self, stream):
        """Launch on a stream, 0 or 1."""
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    def reached(self, stream):
        """An event: how far a stream is, and what it has waited for."""
        return list(self._clocks[stream])

    def follow(self, stream, event):
        """Have what comes on a stream wait for an event."""
        self._clocks[stream] = list(map(max, self._clocks[stream], event))
