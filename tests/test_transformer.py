"""A transformer block as a program: positions that are learnt, then attention and a perceptron with GELU.

Each of the two has LayerNorm before it and a residual around it (Radford et al. 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from device_array import DeviceRuntime
from gradcheck import assert_gradient
from host_cuda import ORDERS, HostRuntime, has_compiler
from test_unet import apart
from tolerances import assert_close, assert_same_bits

from fastdiff.backends import get_backend
from fastdiff.backends.cpu import CpuBackend, workers
from fastdiff.backends.cuda import CudaBackend
from fastdiff.nn.layers import Program
from fastdiff.nn.params import Layout
from fastdiff.nn.runner import Laid, Recordings

NUMPY = get_backend("numpy")
TERMS = 200  # of a way through one of these networks
EPS = 1e-2

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
BACKENDS = [
    pytest.param(lambda: CpuBackend(threads=1), id="cpu"),
    pytest.param(lambda: CpuBackend(threads=2), id="cpu, two threads"),
    *(
        pytest.param(lambda order=order: CudaBackend(DeviceRuntime(order)), id=f"cuda, {order}", marks=needs_compiler)
        for order in ORDERS
    ),
]
backends = pytest.mark.parametrize("make", BACKENDS)


class Block(NamedTuple):
    """Images of some shape, channels between them, heads of the attention."""

    shape: tuple[int, int, int]
    width: int
    heads: int

    def record(self, p):
        x = p.given("x", (p.n, *self.shape))
        h = p.offset("position", p.conv("embed", x, self.width))
        v = p.attention(p.conv("qkv", p.layer_norm("norm1", h, eps=EPS), 3 * self.width), self.heads)
        h = p.conv("attended", v, self.width, residual=h)
        v = p.gelu(p.conv("up", p.layer_norm("norm2", h, eps=EPS), 2 * self.width))
        h = p.conv("down", v, self.width, residual=h)
        return p.conv("out", h, self.shape[2])


BLOCKS = {
    "pictures": Block((2, 3, 3), 4, 2),
    "one channel": Block((1, 3, 1), 1, 1),
    "seven channels of 33 pixels": Block((3, 11, 1), 7, 1),
}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def planned(record, n, be=NUMPY, dtype=np.float64, training=True):
    program = Program(n, "training" if training else "output")
    record(program)
    program.plan(be.gradients_wait)
    program.lay(be.empty((program.size,), dtype))
    return program


def case(record, n=2, dtype=np.float64, seed=0):
    """Layout, parameters, and values of one image's shape for x and the target."""
    program = planned(record, n)
    layout, random = Layout(program.parameters), np.random.default_rng(seed)
    flat = layout.zeros(dtype)
    for name, view in layout.views(flat).items():
        view[...] = random.normal(size=view.shape) / np.sqrt(view[..., 0].size if view.ndim > 1 else 4)
        view += "norm" in name and name.endswith("weight")
    (given,) = program._given.values()
    return layout, flat, *(random.normal(size=shape).astype(dtype) for shape in (given.shape, program.output.shape))


def gradient(be, program, layout, flat, x, target):
    """The loss and the gradients of all parameters, as NumPy arrays."""
    params, there, wanted, grads = (be.asarray(a) for a in (flat, x, target, np.zeros_like(flat)))
    loss = program.run(be, layout.views(params), {"x": there, "target": wanted}, layout.views(grads))
    return float(be.to_numpy(loss)[0]), be.to_numpy(grads).copy()


def assert_every_gradient(record):
    layout, flat, x, target = case(record)
    program = planned(record, 2)

    def loss():
        return np.mean((program.run(NUMPY, layout.views(flat), {"x": x}) - target) ** 2)

    value, grads = gradient(NUMPY, program, layout, flat, x, target)
    assert_close(value, loss())
    assert_gradient(loss, flat, grads)
    return layout.views(grads)


@blocks
def test_every_gradient(block):
    for name, view in assert_every_gradient(block.record).items():
        still = block.width == 1 and name in ("norm1.weight", "norm2.weight")  # one channel is its own mean
        assert view.any() != still, name


FIRST = {
    "layer norm": lambda p, x: p.layer_norm("first", x, eps=EPS),
    "GELU": lambda p, x: p.gelu(x),
    "offsets": lambda p, x: p.concatenate(p.offset("first", x), p.offset("second", x)),
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_a_layer_of_what_is_given(first):
    """Which has no gradient, and may have another use."""

    def record(p):
        x = p.given("x", (p.n, 2, 2, 3))
        p.conv("last", p.concatenate(p.conv("beside", x, 2), p.conv("behind", first(p, x), 2)), 2)

    assert_every_gradient(record)


@backends
@blocks
def test_backends_agree_with_float64(block, make):
    be, (layout, flat, x, target) = make(), case(block.record, 3, np.float32)
    program, wide = planned(block.record, 3, be, np.float32), planned(block.record, 3)
    arrays = [a.astype(np.float64) for a in (flat, x, target)]
    want_loss, want = gradient(NUMPY, wide, layout, *arrays)
    loss, grads = gradient(be, program, layout, flat, x, target)
    assert_close(loss, want_loss, dtype=np.float32, terms=TERMS)
    scale = np.abs(want).max()
    for name, view in layout.views(want).items():
        assert_close(layout.views(grads)[name], view, terms=TERMS, scale=scale)
    y = program.run(be, layout.views(be.asarray(flat)), {"x": be.asarray(x)})
    assert_close(be.to_numpy(y), wide.run(NUMPY, layout.views(arrays[0]), {"x": arrays[1]}), terms=TERMS)


@blocks
@pytest.mark.parametrize("training", [False, True])
def test_values_that_share_memory_do_not_disturb_each_other(block, training):
    layout, flat, x, target = case(block.record, 3, np.float32)
    results = []
    for separate in (False, True):
        program = planned(block.record, 3, dtype=np.float32, training=training)
        if separate:
            apart(program)
        grads = np.zeros_like(flat)
        views = layout.views(grads) if training else None
        results.append((program.run(NUMPY, layout.views(flat), {"x": x, "target": target}, views).copy(), grads))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert program.size > 0


@backends
def test_what_is_recorded_follows_the_values(make):
    """Parameters, pictures and targets of every run, in places that stay: a script on the CPU, a graph on CUDA."""
    block, be, eager = BLOCKS["pictures"], make(), make()
    eager.graphs = False
    program, (layout, flat, x, target) = planned(block.record, 2, be, np.float32), case(block.record, 2, np.float32)
    laid = Laid(program, Recordings())
    there = [be.asarray(np.zeros_like(a)) for a in (flat, x, target, flat)]
    for seed in range(4):
        values = case(block.record, 2, np.float32, seed)[1:]
        for place, value in zip(there, values, strict=False):
            place[...] = be.asarray(value)
        params, given, wanted, grads = there
        loss = laid.run(be, layout.views(params), {"x": given, "target": wanted}, layout.views(grads))
        fresh = planned(block.record, 2, eager, np.float32)
        want_loss, want = gradient(eager, fresh, layout, *values)
        assert float(be.to_numpy(loss)[0]) == want_loss
        assert_same_bits(be.to_numpy(grads), want)
    assert len(laid.passes) == 1
    if be.name == "cuda":
        assert len(be.runtime.graphs) == 1
        assert not eager.runtime.graphs


@blocks
@pytest.mark.parametrize("make", BACKENDS[:3])
def test_the_batch_and_the_threads_change_nothing(block, make, monkeypatch):
    monkeypatch.setattr(workers, "MIN_WORK", 1)  # every job is shared out among the threads, however small
    layout, flat, x, target = case(block.record, 5, np.float32)
    other = CudaBackend(HostRuntime("backward", multiprocessors=3)) if make().name == "cuda" else CpuBackend(threads=3)
    whole, several = (
        gradient(be, planned(block.record, 5, be, np.float32), layout, flat, x, target) for be in (make(), other)
    )
    assert whole[0] == several[0]
    assert_same_bits(whole[1], several[1])
    parts = []
    for be, part in ((make(), slice(0, 5)), (other, slice(0, 1)), (other, slice(1, 5))):
        program = planned(block.record, len(x[part]), be, np.float32, training=False)
        y = program.run(be, layout.views(be.asarray(flat)), {"x": be.asarray(x[part])})
        parts.append(be.to_numpy(y).copy())
    assert_same_bits(np.concatenate(parts[1:]), parts[0])
