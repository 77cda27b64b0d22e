"""A stand-in for CuPy, and for the driver and the compiler behind it: the host run on arrays of a pretended device.

It refuses what CuPy refuses, and loads only machine code that is whole and of the text as it is now.
"""

from __future__ import annotations

import contextlib
import math
import struct
import time
import types
from functools import partial

import numpy as np
from device_array import DeviceArray, DeviceRuntime

from fastdiff.kernels.cuda import runtime


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


class CUDADriverError(RuntimeError):
    pass


def elf(payload):
    """A 64-bit ELF file of one segment, with the table of segments at its end."""
    header = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQ6xHHHH2x", 64 + len(payload), 0, 56, 1, 64, 0)
    return header + payload + struct.pack("<IIQQQQQQ", 1, 5, 64, 0, 0, len(payload), len(payload), 1)


class StandIn(types.ModuleType):
    """What `CupyRuntime` uses of CuPy, on arrays of a pretended device and the host run."""

    ndarray, __version__ = DeviceArray, "14.2.0"

    def __init__(self, driver=13000, devices=1):
        super().__init__("cupy")
        self.host, self.compiled, self.most, self.used = DeviceRuntime(), [], 2**40, 0
        api = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: 13020,
            getDeviceCount=lambda: self.count(devices),
            getDeviceProperties=lambda number: {"name": b"Stand-in"},
            memGetInfo=lambda: (3 << 20, 80 << 30),
            deviceSynchronize=lambda: None,
            deviceGetPCIBusId=lambda number: f"0000:{number:02x}:00.0",
        )
        nvrtc = types.SimpleNamespace(
            getVersion=lambda: (13, 0),
            createProgram=lambda text, name, headers, includes: [name, text],
            compileProgram=lambda program, options: self.compiled.append(options),
            getCUBIN=lambda program: elf("\n".join(program).encode())[:-1],  # CuPy drops the last byte
            getProgramLog=lambda program: "the log",
            destroyProgram=list.clear,
        )
        self.cuda = types.SimpleNamespace(
            runtime=api, Device=partial(StandInDevice, self), nvrtc=nvrtc,
            driver=StandInDriver(), function=types.SimpleNamespace(Module=partial(StandInModule, self)),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError), Stream=partial(StandInStream, self),
            get_current_stream=lambda: self.streams[-1], Event=StandInEvent,
            get_elapsed_time=lambda begin, end: 1e3 * (end.time - begin.time),
            set_allocator=lambda allocator: None,
        )  # fmt: skip
        self.streams = [types.SimpleNamespace(ptr=0)]  # the current one last

    @staticmethod
    def count(devices):
        if isinstance(devices, int):
            return devices
        raise devices

    def get_default_memory_pool(self):
        return types.SimpleNamespace(free_bytes=lambda: 1 << 20, free_all_blocks=lambda: None)

    def _fits(self, size):
        if size > self.most:
            raise OutOfMemoryError

    def empty(self, shape, dtype):
        self._fits(math.prod(shape) if isinstance(shape, tuple) else shape)
        return self.host.empty(shape, dtype)

    def zeros(self, shape, dtype):
        return self.host.zeros(shape, dtype)

    def asarray(self, value, dtype=None):
        self._fits(np.size(value))
        return self.host.asarray(value, dtype)

    def ascontiguousarray(self, value, dtype=None):
        return self.host.asarray(value, dtype)

    def asnumpy(self, array):
        return self.host.to_numpy(array)

    def copyto(self, target, source, casting):
        assert casting == "no"
        self.host.copy(target, source)

    def dot(self, a, b, out):
        self._fits(out.size)
        self.host.matmul(a, b, out)


class StandInDevice(contextlib.nullcontext):
    """One by its number, or the current one."""

    compute_capability = "90"
    attributes = types.MappingProxyType({"MultiProcessorCount": 2, "MaxSharedMemoryPerBlockOptin": 227 * 1024})

    def __init__(self, cupy, number=None):
        super().__init__()
        self.cupy, self.id = cupy, cupy.used if number is None else number

    def use(self):
        self.cupy.used = self.id


class StandInDriver:
    """What it knows of a kernel, whose `ptr` is the kernel itself."""

    CUDADriverError = CUDADriverError
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 8, 3

    def funcGetAttribute(self, attribute, kernel):
        return kernel.attributes.get(attribute, 0)

    def funcSetAttribute(self, kernel, attribute, value):
        kernel.attributes[attribute] = value


class StandInModule:
    """It is loaded from memory, and only what is whole."""

    def __init__(self, cupy):
        self.cupy = cupy

    def load(self, cubin):
        name, text = cubin[64:-56].decode(errors="replace").split("\n", 1)
        self.source = name.removesuffix(".cu")
        if cubin != elf(cubin[64:-56]) or text != runtime.source_text(self.source):
            raise CUDADriverError("CUDA_ERROR_INVALID_IMAGE")

    def get_function(self, entry):
        return StandInKernel(self.cupy, self.source, entry)


class StandInStream:
    """One that captures, or goes beside that one; a graph goes to the stream that is current when it is launched."""

    def __init__(self, cupy, non_blocking):
        assert non_blocking  # else it would wait for the legacy stream, which a capture must not
        self.cupy, self.number = cupy, int(cupy.host.capturing)
        self.ptr = 7 + self.number

    def __enter__(self):
        self.cupy.streams.append(self)
        return self

    def __exit__(self, *error):
        self.cupy.streams.pop()
        assert self.cupy.host.capturing == (self.number == 1)

    def wait_event(self, event):
        self.cupy.host.follow(self.number, event.reached)

    def begin_capture(self):
        self.cupy.host.begin_capture()

    def end_capture(self):
        launches = self.cupy.host.end_capture()

        def launch():
            assert self.cupy.streams[-1] is not self
            for kernel in launches:
                kernel()

        return types.SimpleNamespace(launch=launch)


class StandInKernel:
    __slots__ = ("attributes", "cupy", "entry", "ptr", "source")

    def __init__(self, cupy, source, entry):
        self.cupy, self.source, self.entry, self.ptr = cupy, source, entry, self
        self.attributes = {}

    def __call__(self, grid, block, args, shared_mem):
        assert self.cupy.host.capturing == (self.cupy.streams[-1].ptr != 0)
        for parameter, value in zip(runtime.entries(self.source)[self.entry], args, strict=True):
            if parameter.pointer:
                assert value is None or isinstance(value, DeviceArray)
            else:  # by value: a scalar or an array of size one
                assert value.dtype == parameter.dtype
                assert value.size == 1
                assert not isinstance(value, DeviceArray)
        host = self.cupy.host
        with host.on(getattr(self.cupy.streams[-1], "number", 0)):
            host.launch(self.source, self.entry, *grid, *block, args, shared_mem)
        static = host.static_shared.get((self.source, self.entry), 0)  # seen by the launch
        told = self.attributes.get(self.cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 0)
        if shared_mem > told and static + shared_mem > 48 * 1024:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {self.entry}, {static} + {shared_mem} bytes shared")


class StandInEvent:
    def __init__(self, disable_timing=False):
        self.timed = not disable_timing

    def record(self, stream=None):
        self.time = time.perf_counter() if self.timed else None  # what was launched before is done
        self.reached = stream and stream.cupy.host.reached(stream.number)

    def synchronize(self):
        pass
