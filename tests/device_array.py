"""An array that lies on a pretended device, and the host runtime on such arrays.

CuPy refuses to become a NumPy array unasked, and so does this one; it refuses more than that: whatever would read the
device for Python (a truth value, a number, a loop over the entries), and operations with NumPy arrays. What it offers
is what CuPy offers under the same name. A runtime counts what it brings back to the host.
"""

from __future__ import annotations

import ctypes
import operator
from types import SimpleNamespace

import numpy as np
from host_cuda import HostError, HostRuntime

CUDA = 2  # kDLCUDA, the device type of DLPack


def _refused(name):
    def refuse(self, *args, **options):
        raise TypeError(f"{name} would bring an array on a device to the host")

    return refuse


def _on_device(operation, swapped=False):
    def apply(self, other):
        values = self._memory, self._operand(other)
        return DeviceArray(operation(*(values[::-1] if swapped else values)), self.where)

    return apply


def _in_place(operation):
    def apply(self, other):
        operation(self._memory, self._operand(other))
        return self

    return apply


class DeviceArray:
    """An array on device `where`.

    Parameters
    ----------
    memory : ndarray
        What lies there; it is not copied.
    where : int
    """

    capturing = False  # whether a runtime captures a graph: CuPy's own operations have no place there
    __array_ufunc__ = None  # NumPy's functions and operators leave it alone
    __hash__ = None

    def __init__(self, memory, where=0):
        assert isinstance(memory, np.ndarray | np.generic)
        self._memory, self.where = np.asarray(memory), where

    dtype = property(lambda self: self._memory.dtype)
    shape = property(lambda self: self._memory.shape)
    strides = property(lambda self: self._memory.strides)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)
    T = property(lambda self: DeviceArray(self._memory.T, self.where))
    device = property(lambda self: SimpleNamespace(id=self.where))
    data = property(lambda self: SimpleNamespace(ptr=self._memory.ctypes.data, device_id=self.where))

    @property
    def flags(self):
        flags = self._memory.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    @property
    def __cuda_array_interface__(self):
        host = self._memory.__array_interface__
        return {key: host[key] for key in ("shape", "typestr", "data", "strides")} | {"version": 3}

    def __dlpack__(self, **options):
        capsule = self._memory.__dlpack__()  # says that it is of the host: a DLTensor is {pointer, {type, id}, ...}
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        (ctypes.c_int32 * 2).from_address(address(capsule, b"dltensor") + 8)[:] = self.__dlpack_device__()
        return capsule

    def __dlpack_device__(self):
        return CUDA, self.where

    def __len__(self):
        return len(self._memory)

    def __repr__(self):
        return f"<DeviceArray {self.dtype} {self.shape} on device {self.where}>"

    def reshape(self, *shape):
        return DeviceArray(self._memory.reshape(*shape), self.where)

    def squeeze(self, axis):
        return DeviceArray(self._memory.squeeze(axis), self.where)

    def swapaxes(self, first, second):
        return DeviceArray(self._memory.swapaxes(first, second), self.where)

    def astype(self, dtype):
        self._not_in_a_graph()
        return DeviceArray(self._memory.astype(dtype), self.where)

    def copy(self):
        self._not_in_a_graph()
        return DeviceArray(self._memory.copy(), self.where)

    def round(self):
        self._not_in_a_graph()
        return DeviceArray(self._memory.round(), self.where)

    def clip(self, low, high):
        return DeviceArray(self._memory.clip(self._operand(low), self._operand(high)), self.where)

    def repeat(self, repeats):
        self._not_in_a_graph()
        return DeviceArray(self._memory.repeat(repeats), self.where)

    def fill(self, value):
        self._memory.fill(self._operand(value))

    def __getitem__(self, index):
        return DeviceArray(self._memory[self._index(index)], self.where)

    def __setitem__(self, index, value):
        self._memory[self._index(index)] = self._operand(value)

    def _operand(self, value):
        """What an operation takes: a number, or another array on this device."""
        self._not_in_a_graph()
        if isinstance(value, DeviceArray):
            assert value.where == self.where, f"arrays on the devices {self.where} and {value.where}"
            return value._memory
        if isinstance(value, int | float | np.generic):
            return value
        raise TypeError(f"unsupported type {type(value)}")

    def _not_in_a_graph(self):
        if self.capturing:
            raise HostError("CuPy computes while a graph is captured")

    def _index(self, index):
        def one(part):
            if isinstance(part, DeviceArray):
                return part._memory
            assert part is None or part is ... or isinstance(part, int | slice), f"index {part!r}"
            return part

        return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


for _name in ("add", "sub", "mul", "truediv", "pow"):
    _operation = getattr(operator, _name)
    setattr(DeviceArray, f"__{_name}__", _on_device(_operation))
    setattr(DeviceArray, f"__r{_name}__", _on_device(_operation, swapped=True))
    setattr(DeviceArray, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))
for _name in (
    "__array__", "__array_function__", "__array_interface__", "__array_struct__", "__float__", "__int__", "__complex__",
    "__index__", "__bool__", "__iter__", "__contains__", "__eq__", "__ne__", "__lt__", "__gt__", "__le__", "__ge__",
    "__buffer__", "item", "tolist", "get", "any", "all", "min", "max",
):  # fmt: skip
    setattr(DeviceArray, _name, _refused(_name))
for _name in ("__array_interface__", "__array_struct__"):  # attributes: absent, so that NumPy goes on to `__array__`
    delattr(DeviceArray, _name)


class DeviceRuntime(HostRuntime):
    """The host run on arrays of a pretended device; parameters as for `HostRuntime`."""

    def __init__(self, *args, where=0, **options):
        super().__init__(*args, **options)
        self.where = where
        self.reads: list[tuple[int, ...]] = []
        """The shape of every array that was brought to the host so far."""

    def empty(self, shape, dtype=np.float32):
        return DeviceArray(super().empty(shape, dtype), self.where)

    def zeros(self, shape, dtype=np.float32):
        return DeviceArray(super().zeros(shape, dtype), self.where)

    def asarray(self, value, dtype=None):
        self._not_in_a_graph("an array is sent")
        if isinstance(value, DeviceArray):
            right = value.flags.c_contiguous and (dtype is None or value.dtype == dtype)
            if value.where == self.where and right:
                return value
            value = value._memory
        return DeviceArray(np.array(value, dtype, order="C"), self.where)  # always a copy, as between memories

    def owns(self, value):
        return isinstance(value, DeviceArray) and value.where == self.where

    def to_numpy(self, array):
        assert isinstance(array, DeviceArray)
        self._not_in_a_graph("an array is read")
        self.reads.append(array.shape)
        return array._memory.copy()

    def begin_capture(self):
        super().begin_capture()
        DeviceArray.capturing = True

    def end_capture(self):
        DeviceArray.capturing = False
        return super().end_capture()

    def copy(self, target, source):
        assert target.dtype == source.dtype
        target[...] = source

    def matmul(self, a, b, out):
        super().matmul(a._memory, b._memory, out._memory)

    def address(self, array):
        return super().address(array._memory)

    def _argument(self, entry, parameter, value):
        if not self.owns(value):
            raise TypeError(f"{entry}: {parameter.name} is {value!r}, wants an array on device {self.where}")
        return value._memory
