"""Threads that wait for work inside compiled code: a job starts within a microsecond, without the interpreter's lock.

A *script* is a list of phases, a phase a list of tasks, a task a compiled kernel with its arguments, whose first two
are a range of items. All threads take pieces of a phase, in order, and begin the next phase when every piece is done.

A kernel is called by its address with 64-bit words: what Numba makes of arrays (pointers and lengths) and integers;
a named tuple is passed as its fields.
Every task is called with `WORDS` of them. The calling conventions of our platforms pass such words in registers and
then on the stack, where the caller removes them, so that a kernel does not see those beyond its own.

A helper's state is a word of the board: it sleeps outside, watches the board, is called, or is busy. Every change of
state is one atomic operation, so that a call and a helper that falls asleep do not miss each other.
"""

from __future__ import annotations

import os
import platform

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from fastdiff.kernels.cpu.jit import atomic_load, atomic_store, atomic_swap, atomic_swap_if, atomic_take, kernel

WORDS = 112  # 64-bit words of a task, the range of its items apart
ADDRESS, ARGUMENTS, DISTANCE, ITEMS, GRAIN, FIRST = range(6)  # of a task; FIRST is its first piece in the phase
BEGIN, END, PIECES = range(3)  # of a phase: its tasks and all their pieces
SPREAD = 16  # words between what different threads write: two cache lines
ASLEEP, WATCHING, CALLED, BUSY = range(4)
TASKS, PHASES, COUNTERS = 1, 3, 5  # on the board: address and length of each
WOKEN, RECALLED = 1, 2  # beside a helper's state: whether it slept when it was called; whether it is recalled
SPINS_BEFORE_YIELD = 1 << 12  # looks at a word before the thread lets others run
SPINS = 1 << 13  # looks at the board before a helper goes to sleep: a tenth of a millisecond or two

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


@intrinsic
def _relax(typingctx):
    """Tell the core that this is a loop that waits."""
    machine = platform.machine().lower()

    def codegen(context, builder, signature, args):
        if machine in ("x86_64", "amd64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        elif machine in ("arm64", "aarch64"):
            function = ir.FunctionType(ir.VoidType(), [I32])
            hint = cgutils.get_or_insert_function(builder.module, function, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(I32, 1)])  # yield
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield_core(typingctx):
    """Offer the core to another thread, where the system has a call for that."""

    def codegen(context, builder, signature, args):
        if os.name == "posix":
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield")
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _numbers(typingctx, address, rows, columns):
    """The int64 array (rows, columns) at an address."""
    result = types.Array(types.int64, 2, "C")

    def codegen(context, builder, signature, args):
        array = make_array(result)(context, builder)
        data = builder.inttoptr(args[0], I64.as_pointer())
        row = builder.mul(args[2], ir.Constant(I64, 8))
        populate_array(
            array, data=data, shape=[args[1], args[2]], strides=[row, ir.Constant(I64, 8)],
            itemsize=ir.Constant(I64, 8), meminfo=None,
        )  # fmt: skip
        return array._getvalue()

    i = types.int64
    return result(i, i, i), codegen


@intrinsic
def _call(typingctx, address, start, stop, words):
    """Call the kernel at an address with a range and the WORDS words at another."""

    def codegen(context, builder, signature, args):
        address, start, stop, words = args
        nothing = builder.bitcast(cgutils.alloca_once(builder, I8.as_pointer()), I8.as_pointer())
        error = builder.bitcast(cgutils.alloca_once(builder, I8.as_pointer()), I8.as_pointer())
        first = builder.inttoptr(words, I64.as_pointer())
        values = [builder.load(builder.gep(first, [ir.Constant(I64, i)])) for i in range(WORDS)]
        arguments = [nothing, error, start, stop, *values]
        function = ir.FunctionType(I32, [value.type for value in arguments])
        builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i), codegen


@kernel
def work(worker, tasks, phases, counters):
    """Take pieces of every phase; return when all of them are done, by whomever.

    `counters` has two words for each phase, SPREAD apart, 0 at first: pieces taken, pieces done.
    """
    for p in range(len(phases)):
        pieces, taken, done = phases[p, PIECES], 2 * p * SPREAD, (2 * p + 1) * SPREAD
        task = phases[p, BEGIN]
        while True:
            piece = atomic_take(counters, taken)
            if piece >= pieces:
                break
            while task + 1 < phases[p, END] and piece >= tasks[task + 1, FIRST]:
                task += 1
            row = tasks[task]
            start = (piece - row[FIRST]) * row[GRAIN]
            _call(row[ADDRESS], start, min(row[ITEMS], start + row[GRAIN]), row[ARGUMENTS] + worker * row[DISTANCE])
            atomic_take(counters, done)
        looks = 0
        while atomic_load(counters, done) < pieces:
            looks += 1
            _relax()
            if looks > SPINS_BEFORE_YIELD:
                _yield_core()


@kernel
def serve(board, worker):
    """A helper's loop: work when called, and return when nothing has come for a while or `recall` says so."""
    at, looks = worker * SPREAD, 0
    while True:
        state = atomic_load(board, at)
        if state == CALLED:
            if atomic_swap_if(board, at, CALLED, BUSY):
                work(
                    worker, _numbers(board[TASKS], board[TASKS + 1], 6), _numbers(board[PHASES], board[PHASES + 1], 3),
                    _numbers(board[COUNTERS], 1, board[COUNTERS + 1])[0],
                )  # fmt: skip
                atomic_store(board, at, WATCHING)
                looks = 0
        elif state == ASLEEP:  # the call has been taken back: the next one may come soon
            atomic_swap_if(board, at, ASLEEP, WATCHING)
        else:
            looks += 1
            _relax()
            if (looks > SPINS or atomic_load(board, at + RECALLED)) and atomic_swap_if(board, at, WATCHING, ASLEEP):
                return


@kernel
def call(board, helpers, table):
    """Show a script to helpers 1 ... helpers; return how many of them sleep: their states say which (WOKEN).

    `table` holds address and length of tasks, phases and counters; the counters become 0.
    """
    counters = _numbers(table[4], 1, table[5])[0]
    counters[:] = 0
    for i in range(6):
        board[TASKS + i] = table[i]
    sleepers = 0
    for h in range(1, helpers + 1):
        board[h * SPREAD + WOKEN] = 0
        if atomic_swap(board, h * SPREAD, CALLED) == ASLEEP:
            board[h * SPREAD + WOKEN] = 1
            sleepers += 1
    return sleepers


@kernel
def dismiss(board, helpers):
    """Take back the call from helpers that have not come; return when the others are no longer busy."""
    for h in range(1, helpers + 1):
        at, looks = h * SPREAD, 0
        before = ASLEEP if board[at + WOKEN] else WATCHING
        if not atomic_swap_if(board, at, CALLED, before):
            while atomic_load(board, at) == BUSY:
                looks += 1
                _relax()
                if looks > SPINS_BEFORE_YIELD:
                    _yield_core()


@kernel
def recall(board, helpers):
    """Send helpers that watch back outside, where there is something for them."""
    for h in range(1, helpers + 1):
        atomic_store(board, h * SPREAD + RECALLED, 1)


@kernel
def acknowledge(board, worker):
    """A helper is outside, and takes what is there."""
    atomic_store(board, worker * SPREAD + RECALLED, 0)


@kernel
def await_recalled(board, helpers):
    """Wait until helpers have taken what was outside and are back, but not for long."""
    looks = 0
    for h in range(1, helpers + 1):
        at = h * SPREAD
        while (atomic_load(board, at + RECALLED) or atomic_load(board, at) == ASLEEP) and looks < SPINS:
            looks += 1
            _relax()


def kind_of(value):
    """What decides the type of an argument of a task: kind and dimensions of an array, or of an integer none.

    Of a named tuple its class, and the kinds of its fields.
    """
    if isinstance(value, tuple):
        return (type(value), *map(kind_of, value))
    return (value.dtype.str, value.ndim) if isinstance(value, np.ndarray) else None


def arrays_of(value):
    """The arrays that are passed as an argument."""
    if isinstance(value, tuple):
        return [array for field in value for array in arrays_of(field)]
    return [value] if isinstance(value, np.ndarray) else []


def words_of(value):
    """The words that pass an array, an integer, or a named tuple of these to a kernel."""
    if isinstance(value, tuple):
        return [word for field in value for word in words_of(field)]
    if not isinstance(value, np.ndarray):
        return [int(value)]
    if not value.flags.c_contiguous:
        raise TypeError("a task takes contiguous arrays")
    return [0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides]


def _type_of(kind):
    if kind is None:
        return types.int64
    first, *rest = kind
    if isinstance(first, str):
        return types.Array(from_dtype(np.dtype(first)), *rest, "C")
    return types.BaseTuple.from_types([_type_of(field) for field in rest], first)


def address_of(function, kinds):
    """Compile a kernel for arguments of these kinds, or find it compiled, and return its address."""
    signature = (types.int64, types.int64, *map(_type_of, kinds))
    function.compile(types.void(*signature))
    compiled = function.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
