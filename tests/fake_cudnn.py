"""A stand-in for the module cudnn of nvidia-cudnn-frontend, which executes graphs with NumPy.

It has the calls that `fastdiff.backends.cuda.cudnn` makes, which take what is given there and nothing else, and insists
on what the real ones need: the order of the stages, a workspace, aligned addresses of everything that a graph names.
It computes in TF32 where kernels on tensor cores have not been refused, and has no plan where cuDNN 9.28 has none for
an H100.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from types import SimpleNamespace

import numpy as np
from cuda_parity import NUMPY

from fastdiff.backends.layers import Conv

DataType = Enum("DataType", "NOT_SET FLOAT BFLOAT16")
HeurMode = Enum("HeurMode", "A B FALLBACK")
Note = Enum("Note", "TENSOR_CORE DOWN_CONVERT_INPUTS REDUCED_PRECISION_REDUCTION NONDETERMINISTIC WINOGRAD")
WORKSPACE = 300  # bytes that every plan asks for
STAGES = (
    "described", "validate", "build_operation_graph", "create_execution_plans", "deselect_numeric_notes",
    "deselect_workspace_greater_than", "check_support", "build_plans",
)  # fmt: skip


class NotSupportedError(RuntimeError):
    """As `cudnn.cudnnGraphNotSupportedError`."""


class Tensor:
    """What a graph knows of an array."""

    def __init__(self, dim=None, stride=None, data_type=DataType.NOT_SET, uid=None, make=None):
        self.dim, self.stride, self.data_type, self.uid, self.make = dim, stride, data_type, uid, make
        self.output = False

    def set_output(self, value):
        self.output = value
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_uid(self, uid):
        self.uid = uid
        return self

    def at(self, address):
        """The array there, NCHW whatever its strides are."""
        assert address % 16 == 0
        assert min(self.dim) > 0
        dtype = np.dtype({DataType.FLOAT: np.float32, DataType.BFLOAT16: np.uint16}[self.data_type])
        last = sum((count - 1) * stride for count, stride in zip(self.dim, self.stride, strict=True))
        flat = np.frombuffer((ctypes.c_byte * (dtype.itemsize * (last + 1))).from_address(address), dtype)
        return np.lib.stride_tricks.as_strided(flat, self.dim, [dtype.itemsize * s for s in self.stride])


def nhwc(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


class Graph:
    def __init__(self, library, *, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert handle in library.streams
        assert intermediate_data_type == compute_data_type == DataType.FLOAT
        self.library, self.io, self.stage = library, io_data_type, "described"
        self.tensors, self.refused, self.kind = [], set(), None

    def _new(self, **options):
        assert self.stage == "described"
        self.tensors.append(Tensor(**options))
        return self.tensors[-1]

    def tensor(self, *, dim, stride, data_type, uid):
        return self._new(dim=dim, stride=stride, data_type=data_type, uid=uid)

    def _conv(self, kind, first, second, pre_padding, post_padding, stride, dilation):
        assert first.data_type == second.data_type == self.io
        assert dilation == [1, 1]
        (top, left), (bottom, right) = pre_padding, post_padding
        self.kind, self.first, self.second = kind, first, second
        self.geometry = Conv((0, 0), tuple(stride), (top, bottom, left, right))
        return self._new(make=lambda value: getattr(self, f"_{kind}")(value(first), value(second)))

    def conv_fprop(self, image, weight, *, pre_padding, post_padding, stride, dilation):
        return self._conv("fprop", image, weight, pre_padding, post_padding, stride, dilation)

    def conv_dgrad(self, loss, filter, *, pre_padding, post_padding, stride, dilation):  # noqa: A002
        return self._conv("dgrad", loss, filter, pre_padding, post_padding, stride, dilation)

    def conv_wgrad(self, image, loss, *, pre_padding, post_padding, stride, dilation):
        return self._conv("wgrad", image, loss, pre_padding, post_padding, stride, dilation)

    def add(self, a, b):
        return self._new(make=lambda value: value(a) + value(b))

    def _result(self):
        (result,) = [tensor for tensor in self.tensors if tensor.output]
        return result

    def _fprop(self, image, weight):
        w = weight.transpose(2, 3, 1, 0)
        geometry = self.geometry._replace(kernel=w.shape[:2])
        out = np.empty((len(image), *geometry.size(*image.shape[2:]), w.shape[3]))
        NUMPY.conv(geometry, nhwc(image), w, np.zeros(w.shape[3]), out)
        return out.transpose(0, 3, 1, 2)

    def _dgrad(self, loss, weight):
        w, (n, c, height, width) = weight.transpose(2, 3, 1, 0), self._result().dim
        dx, dw, db = np.empty((n, height, width, c)), np.empty(w.shape), np.empty(w.shape[3])
        geometry = self.geometry._replace(kernel=w.shape[:2])
        NUMPY.conv_backward(geometry, nhwc(loss), np.zeros(dx.shape), w, dx, dw, db)
        return dx.transpose(0, 3, 1, 2)

    def _wgrad(self, image, loss):
        k, c, *kernel = self._result().dim
        dw, db = np.empty((*kernel, c, k)), np.empty(k)
        geometry = self.geometry._replace(kernel=tuple(kernel))
        NUMPY.conv_backward(geometry, nhwc(loss), nhwc(image), np.zeros(dw.shape), None, dw, db)
        return dw.transpose(3, 2, 0, 1)

    def _go(self, stage):
        assert STAGES.index(stage) == STAGES.index(self.stage) + 1, f"{stage} after {self.stage}"
        self.stage = stage

    def validate(self):
        self._go("validate")
        named = [tensor for tensor in self.tensors if tensor.uid is not None]
        assert len({tensor.uid for tensor in named}) == len(named)
        assert {tensor for tensor in self.tensors if tensor.make is None} < set(named)
        assert self._result() in named
        self.uids = {tensor.uid: tensor for tensor in named}

    def build_operation_graph(self):
        self._go("build_operation_graph")

    def create_execution_plans(self, modes):
        self._go("create_execution_plans")
        assert modes == [HeurMode.A, HeurMode.FALLBACK]

    def deselect_numeric_notes(self, notes):
        self._go("deselect_numeric_notes")
        self.refused.update(notes)

    def deselect_workspace_greater_than(self, limit):
        self._go("deselect_workspace_greater_than")
        assert limit >= WORKSPACE

    def check_support(self):
        self._go("check_support")
        assert {Note.NONDETERMINISTIC, Note.REDUCED_PRECISION_REDUCTION} <= self.refused
        channels = [self.first.dim[1], self.second.dim[1]]
        odd = channels[0] % 8 or (self.kind == "wgrad" and channels[1] % 8)
        strided = self.kind == "dgrad" and self.geometry.stride != (1, 1)
        if self.io == DataType.BFLOAT16 and (odd or strided):
            raise NotSupportedError("No execution plans support the graph.\nmore")

    def build_plans(self):
        self._go("build_plans")
        self.library.planned += 1

    def get_workspace_size(self):
        assert self.stage == "build_plans"
        return WORKSPACE

    def execute(self, pack, workspace, *, handle):
        assert self.stage == "build_plans"
        assert set(pack) == set(self.uids)
        assert workspace % 16 == 0
        assert workspace
        tf32 = self.io == DataType.FLOAT and not {Note.TENSOR_CORE, Note.DOWN_CONVERT_INPUTS} <= self.refused
        self.library.executed.append((self.kind, self.library.streams[handle]))

        def value(tensor):
            if tensor.make is not None:
                return tensor.make(value)
            array = tensor.at(pack[tensor.uid])
            if tensor.data_type == DataType.BFLOAT16:
                return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            return (array.view(np.uint32) & np.uint32(0xFFFFE000 if tf32 else 0xFFFFFFFF)).view(np.float32)

        def run():
            result = self._result()
            (ctypes.c_byte * WORKSPACE).from_address(workspace)[:] = [-1] * WORKSPACE
            result.at(pack[result.uid])[...] = value(result)

        runtime = self.library.runtime
        if runtime.capturing:
            runtime._captured.append(run)
        else:
            run()


class Library(SimpleNamespace):
    """The module.

    Parameters
    ----------
    runtime : HostRuntime
        Where its work is captured.
    """

    data_type, heur_mode, numerical_note, cudnnGraphNotSupportedError = DataType, HeurMode, Note, NotSupportedError

    def __init__(self, runtime):
        super().__init__(runtime=runtime, streams={}, executed=[], planned=0)

    def create_handle(self):
        assert not self.runtime.capturing
        self.streams[1 + len(self.streams)] = None
        return len(self.streams)

    def set_stream(self, *, handle, stream):
        self.streams[handle] = stream

    def pygraph(self, **options):
        return Graph(self, **options)
