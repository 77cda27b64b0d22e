"""One home for how CPU kernels are compiled and cached."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, event, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from fastdiff.kernels.cpu.cache import KernelCache
from fastdiff.signals import delayed

log = logging.getLogger("fastdiff")

# nogil: kernels run on the backend's own threads. No fast-math: every operation rounds once, in the written order.
OPTIONS = {"nogil": True, "error_model": "numpy"}

FORK_SECONDS = 60  # that a fork waits for a compilation in another thread
COMPILING = "compiling kernels, once, about 10 s"


class _Watch(event.Listener):  # type: ignore[misc]
    """Calls a function whenever a kernel begins to be compiled: it is not cached."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self.begun = begun

    def on_start(self, compilation: Any) -> None:
        if compilation.data["dispatcher"].py_func.__module__.startswith("fastdiff.kernels"):
            self.begun()

    def on_end(self, compilation: Any) -> None:
        pass


def watching(begun: Callable[[], None]) -> AbstractContextManager[Any]:
    """Call a function whenever a kernel begins to be compiled inside the block."""
    watch: AbstractContextManager[Any] = event.install_listener("numba:compile", _Watch(begun))
    return watch


@cache
def _announce() -> None:
    log.info(COMPILING)


event.register("numba:compile", _Watch(_announce))


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a kernel at its first call, and keep the machine code on disk: see `fastdiff.kernels.cpu.cache`."""
    dispatcher = numba.njit(**OPTIONS)(function)
    try:
        dispatcher._cache = KernelCache(function, _sources_digest())
    except RuntimeError:  # no folder to write to
        _say_uncached(str(Path(__file__).parent))
    compile_it = dispatcher.compile

    def compile_whole(signature: Any) -> Any:
        with delayed():  # half of a compilation is of no use, and an exception in one may hang or crash
            return compile_it(signature)

    dispatcher.compile = compile_whole
    return dispatcher


def cache_folder() -> str | None:
    """Where the machine code of kernels is kept; None where no folder can be written to."""
    try:
        return str(KernelCache(kernel, _sources_digest()).cache_path)
    except RuntimeError:
        return None


@cache
def _say_uncached(folder: str) -> None:
    words = "kernels are compiled in every process: %s cannot be written to; set NUMBA_CACHE_DIR to a folder that can"
    log.warning(words, folder)


_held: list[Any] = []


def _wait_for_compilers() -> None:
    """Let no fork fall into a compilation, whose state a child could not use, nor its locks."""
    locks = global_compiler_lock._lock, llvm.ffi.lib._lock._lock
    _held.extend(lock for lock in locks if lock.acquire(timeout=FORK_SECONDS))


def _go_on() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_wait_for_compilers, after_in_parent=_go_on, after_in_child=_go_on)


def part(function: Callable[..., Any]) -> Any:
    """Make a function that is compiled as part of the one kernel that calls it, and not alone before."""
    return numba.njit(inline="always", **OPTIONS)(function)


def export(dispatcher: Any, argument_types: tuple[Any, ...], name: str) -> Callable[..., Any]:
    """Compile a kernel now and give its machine code a symbol; return what an intrinsic emits to call it.

    Numba links a copy of every callee into its caller and compiles it again. A kernel with many callers is compiled
    once this way, or read from the cache, when its module is imported. It returns nothing.
    """
    dispatcher.compile(types.void(*argument_types))
    compiled = dispatcher.overloads[argument_types]
    symbol = f"fastdiff_{name}"
    llvm.add_symbol(symbol, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))

    def emit(context: Any, builder: Any, arguments: Any) -> Any:
        declared = context.call_conv.get_function_type(types.none, argument_types)
        function = cgutils.get_or_insert_function(builder.module, declared, symbol)
        context.call_conv.call_function(builder, function, types.none, argument_types, arguments)
        return context.get_dummy_value()

    return emit


@intrinsic  # type: ignore[misc]
def float_bits(typingctx, x):  # type: ignore[no-untyped-def]
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic  # type: ignore[misc]
def bits_float(typingctx, x):  # type: ignore[no-untyped-def]
    """The float32 of the bits in an int32."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


def _element(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.gep(make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])


# A loop over several arrays asks first whether they overlap, and runs without vectors where two do, be it one array
# that is given in place of another that the loop leaves alone. `load` and `store` say that it need not ask.
APART = 8  # arrays that can be told apart


def _known_apart(builder: Any, access: Any, number: int) -> Any:
    """Tell LLVM that an access to memory is to array `number`, which shares none with arrays of other numbers."""
    module = builder.module
    domain = module.add_metadata(["fastdiff"])
    scopes = [module.add_metadata([f"array {k}", domain]) for k in range(APART)]
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(number)]))
    access.set_metadata("noalias", module.add_metadata(scopes))
    return access


@intrinsic(prefer_literal=True)  # type: ignore[misc]
def load(typingctx, array, index, number):  # type: ignore[no-untyped-def]
    """array[index], of an array that shares no memory in use with those that a kernel gives another number below 8."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        access = builder.load(_element(context, builder, signature, args), align=array.dtype.bitwidth // 8)
        return _known_apart(builder, access, number.literal_value)

    return array.dtype(array, types.int64, number), emit


@intrinsic(prefer_literal=True)  # type: ignore[misc]
def store(typingctx, array, index, number, value):  # type: ignore[no-untyped-def]
    """array[index] = value, for an array as in `load`."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        access = builder.store(args[3], _element(context, builder, signature, args), align=array.dtype.bitwidth // 8)
        _known_apart(builder, access, number.literal_value)
        return context.get_dummy_value()

    return types.void(array, types.int64, number, array.dtype), emit


WORD = types.Array(types.int64, 1, "C")


@intrinsic  # type: ignore[misc]
def atomic_take(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Return array[index] and add 1 to it, as one operation of all threads; the array is int64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _element(context, builder, signature, args)
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(WORD, types.int64), emit


@intrinsic  # type: ignore[misc]
def atomic_load(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index] of an int64 array, with all that was written before its `atomic_store`."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_element(context, builder, signature, args), "acquire", 8)

    return types.int64(WORD, types.int64), emit


@intrinsic  # type: ignore[misc]
def atomic_store(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """array[index] = value for an int64 array, after all that was written before."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[2], _element(context, builder, signature, args), "release", 8)
        return context.get_dummy_value()

    return types.void(WORD, types.int64, types.int64), emit


@intrinsic  # type: ignore[misc]
def atomic_swap(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """Set array[index] of an int64 array, and return what it was, as one operation of all threads."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("xchg", _element(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(WORD, types.int64, types.int64), emit


@intrinsic  # type: ignore[misc]
def atomic_swap_if(typingctx, array, index, expected, value):  # type: ignore[no-untyped-def]
    """Set array[index] of an int64 array where it is `expected`, as one operation; return whether it was."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _element(context, builder, signature, args)
        return builder.extract_value(builder.cmpxchg(place, args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(WORD, types.int64, types.int64, types.int64), emit
