"""Convolutions by cuDNN on CUDA: ``get_backend("cuda", convolutions="cudnn")``, with the extra ``[cudnn]``.

**It has not run on a GPU yet.** cuDNN 9.28 has planned these graphs for an H100, and a stand-in has executed them.

cuDNN gets NHWC tensors and plans each geometry and shape once, by its own rules: no timing chooses. It compiles some
kernels for that, which may take half a minute for all of a network's. Kernels that add in an order of their own each
time are refused, so a result is the same in every run; but cuDNN may take another kernel for another batch, and the
bits of a sample then differ by rounding, as they never do with our own kernels. In "float32" kernels on tensor cores
are refused too, hence **no TF32**. In "bf16" the factors are rounded, by us, and cuDNN adds in float32 and writes
float32: what our own kernels compute, in another order.

Our own kernels take what cuDNN does not, by a fixed rule: images of one pixel, upsampling, arrays that are not aligned
to 16 bytes, and what cuDNN finds no plan for (in "bf16" most channel counts that are no multiple of eight, and input
gradients of strides).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from fastdiff.backends.layers import Conv
from fastdiff.errors import BackendError
from fastdiff.kernels.cuda.runtime import CaptureError, Runtime

log = logging.getLogger("fastdiff")

Array = Any
Shape = tuple[int, ...]

VECTOR = 16  # bytes to which cuDNN's tensors are aligned
MOST_WORKSPACE = 1 << 28  # bytes
RESULT = 3  # the operands are 1 and 2, and what is added comes after
SUM_COLUMNS, SUM_THREADS = 32, 256  # of conv_image_sums


class Work(NamedTuple):
    """What is planned once.

    Attributes
    ----------
    kind : {"conv_fprop", "conv_dgrad", "conv_wgrad"}
    geometry : Conv
    operands : (tuple, tuple)
        Shapes; weights are (K, rows, columns, C), all else (N, H, W, C).
    result : tuple
    added : tuple of tuple
        Shapes of what cuDNN adds to the result, in this order.
    """

    kind: str
    geometry: Conv
    operands: tuple[Shape, Shape]
    result: Shape
    added: tuple[Shape, ...] = ()


class Plan(NamedTuple):
    """A graph that can be executed, and the bytes of its workspace."""

    graph: Any
    workspace: int


def import_cudnn() -> Any:
    """Return the module cudnn, or raise a `BackendError` that says what to install."""
    try:
        return importlib.import_module("cudnn")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"convolutions='cudnn' needs cuDNN: pip install 'fastdiff-engine[cudnn]'; 'own' needs nothing ({error})"
        ) from error


class Cudnn:
    """The convolutions that cuDNN takes: a method does its work and returns True, or does nothing and returns False.

    Parameters
    ----------
    runtime : Runtime
    precision : {"float32", "bf16"}
    scratch : callable
        Takes a name and a size and returns an array of at least so many float32 values, for the current queue alone.

    Raises
    ------
    BackendError
        cuDNN, or its Python module, is missing or does not start.
    """

    def __init__(self, runtime: Runtime, precision: str, scratch: Callable[[str, int], Array]) -> None:
        self.runtime, self.halves, self.scratch = runtime, precision == "bf16", scratch
        self.library = import_cudnn()
        notes = self.library.numerical_note
        self._refused = [notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION]
        if not self.halves:
            self._refused += [notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS]
        self._plans: dict[Work, Plan | None] = {}
        self._handles: dict[int, tuple[int, int]] = {}  # of a queue, and the stream that it is set to
        try:
            self._handle()
        except RuntimeError as error:  # of the frontend: it finds no libcudnn, or that no GPU
            raise BackendError(
                f"cuDNN does not start: {error}; pip install 'fastdiff-engine[cudnn]', or convolutions='own'"
            ) from error

    def conv(
        self, geometry: Conv, x: Array, w: Array, b: Array, out: Array, shift: Array | None, residual: Array | None
    ) -> bool:
        """Fill `out`, see `LayerBackend.conv`; in bf16 cuDNN adds what is added, in float32 `cudnn_finish` does."""
        if not self._takes(geometry, x, out, w, b, shift, residual):
            return False
        # cuDNN does not promise that its result may be an array that it adds.
        fused = self.halves and (residual is None or self.runtime.address(residual) != self.runtime.address(out))
        added = [array for array in (b, shift, residual) if array is not None] if fused else []
        pixels, filters = out.shape[1] * out.shape[2], self._filters(w)
        shapes = tuple(self._row(array) for array in added)
        plan = self._plan(Work("conv_fprop", geometry, (x.shape, filters), out.shape, shapes))
        if plan is None:
            return False
        y = out if fused else self.scratch("cudnn result", out.size)
        self._execute(plan, self._operand("image", x), self._weights(w), y, *added)
        if not fused:
            self._finish(y, b, shift, residual, out, pixels)
        return True

    def input_gradient(self, geometry: Conv, dy: Array, w: Array, dx: Array, add: bool) -> bool:
        """Fill `dx`, or add to it."""
        if not self._takes(geometry, dx, dy, w):
            return False
        plan = self._plan(Work("conv_dgrad", geometry, (dy.shape, self._filters(w)), dx.shape))
        if plan is None:
            return False
        result = self.scratch("cudnn result", dx.size) if add else dx
        self._execute(plan, self._operand("loss", dy), self._weights(w), result)
        if add:
            self._finish(dx, None, None, result, dx, 1)
        return True

    def weight_gradient(self, geometry: Conv, dy: Array, x: Array, dw: Array, db: Array, dshift: Array | None) -> bool:
        """Fill dw and db; where dshift is given, it is there already."""
        if not self._takes(geometry, x, dy, dw):
            return False
        filters, launch = self._filters(dw), self.runtime.launch
        plan = self._plan(Work("conv_wgrad", geometry, (x.shape, dy.shape), filters))
        if plan is None:
            return False
        turned = self.scratch("cudnn weights", dw.size)
        self._execute(plan, self._operand("image", x), self._operand("loss", dy), turned)
        self._turn(turned, dw, filters[0], dw.size // filters[0], False)
        images, height, width, outputs = dy.shape
        sums = self.scratch("cudnn sums", images * outputs) if dshift is None else dshift
        across = -(-outputs // SUM_COLUMNS) * SUM_THREADS
        for array, total, groups, members in ((dy, sums, images, height * width), (sums, db, 1, images)):
            if array is not dy or dshift is None:
                grid, block = self.runtime.grid_1d(groups * across, SUM_THREADS)
                launch("conv", "conv_image_sums", grid, block, (array, total, groups, members, outputs))
        return True

    # ------------------------------------------------------------------------------------------- arrays

    def _takes(self, geometry: Conv, x: Array, y: Array, *others: Array | None) -> bool:
        arrays = [array for array in (x, y, *others) if array is not None]
        return (
            geometry.up == (1, 1)
            and (x.shape[1:3] != (1, 1) or y.shape[1:3] != (1, 1))
            and min(x.size, y.size) > 0
            and all(self.runtime.address(array) % VECTOR == 0 for array in arrays)
        )

    def _filters(self, w: Array) -> Shape:
        """The shape of weights (rows, columns, C, K) as cuDNN has them."""
        return (w.shape[3], *w.shape[:3])

    def _row(self, array: Array) -> Shape:
        """The shape of what is added, (K,), (N, K) or (N, H, W, K), as (N, H, W, K)."""
        return array.shape if array.ndim == 4 else (array.size // array.shape[-1], 1, 1, array.shape[-1])

    def _operand(self, name: str, array: Array) -> Array:
        if not self.halves:
            return array
        halves = self.scratch(f"cudnn {name}", -(-array.size // 2))
        grid = self.runtime.grid_1d(-(-array.size // 4))
        self.runtime.launch("cudnn", "cudnn_halves", *grid, (array, halves, array.size))
        return halves

    def _weights(self, w: Array) -> Array:
        outputs, turned = w.shape[3], self.scratch("cudnn weights", w.size)
        self._turn(w, turned, w.size // outputs, outputs, self.halves)
        return turned

    def _turn(self, x: Array, out: Array, rows: int, columns: int, halves: bool) -> None:
        grid = self.runtime.grid_1d(rows * columns)
        self.runtime.launch("cudnn", "cudnn_turn", *grid, (x, out, rows, columns, halves))

    def _finish(
        self, y: Array, b: Array | None, shift: Array | None, residual: Array | None, out: Array, pixels: int
    ) -> None:
        channels = out.shape[-1]
        fours = channels % 4 == 0  # everything is aligned
        grid = self.runtime.grid_1d(out.size // (4 if fours else 1))
        args = (y, b, shift, residual, out, out.size // channels, pixels, channels, fours)
        self.runtime.launch("cudnn", "cudnn_finish", *grid, args)

    # ------------------------------------------------------------------------------------------- cuDNN

    def _handle(self) -> int:
        """The handle of the current queue, set to the stream that work is issued on now."""
        queue, stream = self.runtime.queue(), self.runtime.stream()
        handle, last = self._handles.get(queue) or (self.library.create_handle(), None)
        if last != stream:
            self.library.set_stream(handle=handle, stream=stream)
            self._handles[queue] = handle, stream
        return handle

    def graph(self, work: Work, **options: Any) -> Any:
        """Return a graph that is not planned yet; `options` go to cuDNN."""
        types, (pad, stride) = self.library.data_type, work.geometry[2:0:-1]
        io = types.BFLOAT16 if self.halves else types.FLOAT
        graph = self.library.pygraph(
            io_data_type=io, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, **options
        )

        def layout(shape: Shape) -> tuple[list[int], list[int]]:
            n, height, width, channels = shape
            return [n, channels, height, width], [height * width * channels, 1, width * channels, channels]

        def tensor(uid: int, shape: Shape, data_type: Any) -> Any:
            dim, strides = layout(shape)
            return graph.tensor(dim=dim, stride=strides, data_type=data_type, uid=uid)

        result = getattr(graph, work.kind)(
            *(tensor(uid, shape, io) for uid, shape in enumerate(work.operands, start=1)),
            pre_padding=[pad[0], pad[2]], post_padding=[pad[1], pad[3]], stride=list(stride), dilation=[1, 1],
        )  # fmt: skip
        for uid, shape in enumerate(work.added, start=RESULT + 1):
            result = graph.add(result, tensor(uid, shape, types.FLOAT))
        dim, strides = layout(work.result)
        result.set_output(True).set_data_type(types.FLOAT).set_dim(dim).set_stride(strides).set_uid(RESULT)
        return graph

    def plan(self, graph: Any) -> Plan:
        """Plan a graph; raises the frontend's error where cuDNN has no kernel that is not refused."""
        modes = self.library.heur_mode
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([modes.A, modes.FALLBACK])
        graph.deselect_numeric_notes(self._refused)
        graph.deselect_workspace_greater_than(MOST_WORKSPACE)
        graph.check_support()
        graph.build_plans()
        return Plan(graph, int(graph.get_workspace_size()))

    def _plan(self, work: Work) -> Plan | None:
        if work not in self._plans:
            try:
                self._plans[work] = self.plan(self.graph(work, handle=self._handle()))
            except self.library.cudnnGraphNotSupportedError as error:
                log.info("cuDNN has no plan, so our own kernels take %s: %s", work, str(error).split("\n")[0])
                self._plans[work] = None
        return self._plans[work]

    def _execute(self, plan: Plan, first: Array, second: Array, result: Array, *added: Array) -> None:
        arrays = dict(enumerate((first, second, result, *added), start=1))
        addresses = {uid: self.runtime.address(array) for uid, array in arrays.items()}
        workspace = self.scratch("cudnn workspace", -(-plan.workspace // 4)) if plan.workspace else None
        at = 0 if workspace is None else self.runtime.address(workspace)
        try:
            plan.graph.execute(addresses, at, handle=self._handle())
        except RuntimeError as error:  # of the frontend
            if self.runtime.capturing:
                raise CaptureError(f"cuDNN: {error}") from error
            raise
