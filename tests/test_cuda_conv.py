"""The float32 convolutions of the CUDA backend, run on the CPU from the text of the kernels.

`cuda_parity_conv` says that they agree with NumPy, on every tile and in any batch; here is what else they promise:
any geometry, the same bits in every order of threads, how the work is cut, and what is allocated and read back.
"""

import re

import numpy as np
import pytest
from cuda_parity_conv import ROWS, SAME, TILES, WEIGHTS, Arrays, Case, only
from cuda_parity_layers import unfilled
from device_array import DeviceRuntime
from host_cuda import ORDERS, HostRuntime, has_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, assert_same_bits

from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda import conv as operations
from fastdiff.backends.cuda import conv_mma as cuda_conv_mma
from fastdiff.backends.layers import Conv
from fastdiff.kernels.cuda import runtime

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

F = np.float32


def forward(be, case):
    out = be.empty(case.out_shape)
    arrays = [None if array is None else be.asarray(array) for array in (case.shift, case.residual)]
    be.conv(case.geometry, *map(be.asarray, (case.x, case.w, case.b)), out, shift=arrays[0], residual=arrays[1])
    return out


def backward(be, case):
    """dx, dw, db and dshift."""
    outputs = [be.asarray(case.start.copy()), be.empty(case.w.shape), be.empty(case.b.shape)]
    dshift = be.empty((len(case.x), len(case.b)))
    arrays = map(be.asarray, (case.dy, case.x, case.w))
    be.conv_backward(case.geometry, *arrays, *outputs, dshift=dshift, add=case.add)
    return *outputs, dshift


few, some = st.integers(1, 3), st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(few, few), st.tuples(few, few), st.tuples(*[st.integers(0, 3)] * 4), st.tuples(few, few),
    st.tuples(few, some, some, st.integers(1, 20), st.integers(1, 40)), st.integers(0, 11), st.sampled_from(TILES),
)  # fmt: skip
def test_any_convolution_agrees_with_the_reference(kernel, stride, pad, up, shape, number, tile):
    geometry = Conv(kernel, stride, pad, up)
    if min(geometry.size(*shape[1:3])) < 1:
        return
    case, be = Arrays(Case(geometry, *shape), number), CudaBackend(HostRuntime("shuffled"))
    terms, pixels = case.taps * shape[3], case.dy.size // shape[4]
    with only(tile, least_chunk=16):
        assert_close(forward(be, case), case.outputs(), terms=terms + 3)
        sums = case.taps * shape[4], pixels, pixels, pixels // shape[0]
        for got, want, count in zip(backward(be, case), case.gradients(), sums, strict=True):
            assert_close(got, want, terms=count + 1, scale=max(1, np.abs(want).max()))


@pytest.mark.parametrize("case", [Case(SAME._replace(up=(2, 2)), 2, 3, 4, 12, 36), ROWS["small"][0]])
def test_the_order_of_threads_changes_no_bits(case):
    case, results = Arrays(case, 2), []
    for order in ORDERS:
        be = CudaBackend(HostRuntime(order))
        with only(TILES[1], least_chunk=16):
            results.append([forward(be, case), *backward(be, case)])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("geometry", [Conv(), SAME, SAME._replace(up=(2, 2)), SAME._replace(stride=(2, 2))])
def test_no_images(geometry):
    be = CudaBackend(HostRuntime())
    case = Arrays(Case(geometry, 0, 4, 4, 3, 5), 1)
    assert forward(be, case).size == 0
    dx, dw, db, dshift = backward(be, case)
    assert dx.size == dshift.size == 0
    assert not dw.any()
    assert not db.any()


def test_without_an_input_gradient():
    case, be = Arrays(Case(SAME, 2, 5, 5, 3, 4), 1), CudaBackend(HostRuntime())
    _, want, want_db, _ = backward(be, case)
    dw, db = be.empty(case.w.shape), be.empty(case.b.shape)
    be.runtime.launches.clear()
    be.conv_backward(case.geometry, case.dy, case.x, case.w, None, dw, db)
    assert_same_bits(dw, want)
    assert_same_bits(db, want_db)
    assert {entry for _, entry in be.runtime.launches} <= {*WEIGHTS, "conv_weights_finish"}


def test_what_is_not_finite_stays_in_its_image():
    case, be = Arrays(Case(SAME, 3, 4, 5, 8, 6), 2), CudaBackend(HostRuntime())
    want, want_dx = forward(be, case), backward(be, case)[0]
    case.x[1, 2, 3, 4], case.dy[1, 0, 0, 0] = np.nan, np.inf
    got, dx, db = forward(be, case), *backward(be, case)[0:3:2]
    for array, clean in ((got, want), (dx, want_dx)):
        assert_same_bits(array[::2], clean[::2])
        assert not np.isfinite(array[1]).all()
    assert not np.isfinite(db[0])
    assert np.isfinite(db[1:]).all()


# ------------------------------------------------------------------------------------------- how the work is cut


def test_tiles_are_those_of_the_kernels():
    """Their names say pixels and channels; a block has the threads that its bounds promise."""
    text = runtime._read("conv.cu")
    found = re.findall(
        r"FD_BOUNDS\((\d+), \d+\)\s+(conv_(?:input_|weights_)?(\w+))\(.*?ConvTile<(\d+), (\d+), (\d+), (\d+), \d+>"
        r"(?:, (\d))?>",
        text,
        re.DOTALL,
    )
    tiles = {tile.name: tile for tile in (*TILES, operations.ROWS)}
    assert len(found) == 3 * len(TILES) + 4
    for bound, entry, name, *shape, split in found:
        pixels, channels, down, across = map(int, shape)
        tile = tiles[name.removesuffix("_many")]
        assert (tile.pixels, tile.channels) == (pixels, channels), entry
        assert tile.threads == int(bound) == pixels // down * (channels // across) * int(split or 1), entry
        assert entry in runtime.entries("conv")


def test_tiles_fill_the_device():
    def name(*sizes):
        return operations.best_tile(132, sizes).name

    assert name(256 * 32 * 32, 128, 1) == name(256 * 8 * 8, 256, 1) == "128x64"
    assert name(16 * 8 * 8, 256, 1) == name(16 * 16 * 16, 128, 1) == name(256 * 32 * 32, 32, 1) == "64x32"
    assert name(256 * 32 * 32, 3, 1) == "128x8"
    assert name(256 * 16 * 16, 64, 4) == "128x64"
    small = 16 * 8 * 8, 256, 1
    assert operations.best_tile(132, *[small] * 8).name == "128x64"  # together they are many


def test_chunks_depend_on_sizes_alone():
    for pixels, pairs, rows, outputs in [
        (0, 1, 4, 1), (1, 1, 4, 1), (300, 1, 36, 64), (2**14, 1, 1152, 128), (2**24, 4, 36, 3), (512, 1, 20_736, 2048)
    ]:  # fmt: skip
        chunks, chunk = operations.chunks_of(pixels, pairs, rows, outputs)
        assert chunk % operations.DEPTH == 0
        assert chunks * chunk >= pixels > (chunks - 1) * chunk or chunks == 1
        if chunks > 1:
            assert chunk >= operations.LEAST_CHUNK
            assert chunks * rows * outputs * pairs <= operations.MOST_PARTIALS
    assert operations.chunks_of(16 * 1024, 1, 1152, 128) == (29, 576)
    assert operations.chunks_of(16 * 1024, 1, 20_736, 2048)[0] == 1


def gradients_of(be, cases):
    """Weight gradients of some convolutions, with dshift."""
    wanted = []
    for case in cases:
        arrays = [unfilled(*shape) for shape in (case.w.shape, case.b.shape, (len(case.x), len(case.b)))]
        be.conv_backward(case.geometry, case.dy, case.x, case.w, None, *arrays[:2], dshift=arrays[2])
        wanted.append(arrays)
    return wanted


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("together", [1 << 25, 2000])
def test_gradients_that_wait_have_the_same_bits(monkeypatch, precision, together):
    """Of many convolutions, more than a launch takes, in chunks and not; too many partial sums are added up at once."""
    monkeypatch.setattr(operations, "TOGETHER", together)
    monkeypatch.setattr(operations, "LEAST_CHUNK", 16)
    monkeypatch.setattr(cuda_conv_mma, "LEAST_TILES", 1)
    cuda_conv_mma.weight_plan.cache_clear()
    shapes = [(SAME, 2, 5, 5, 3, 4), (Conv(), 3, 1, 1, 8, 40), (SAME._replace(up=(2, 2)), 1, 4, 4, 4, 6)] * 10
    cases = [Arrays(Case(*shape), i) for i, shape in enumerate(shapes)]
    be, alone = (CudaBackend(HostRuntime("shuffled"), precision=precision) for _ in range(2))
    want = gradients_of(alone, cases)
    with be.gradients_together() as later:
        got = gradients_of(be, cases[:20])
        assert not be.runtime.launches
        later.begin()
        later.finish()
        launched = len(be.runtime.launches)
        got += gradients_of(be, cases[20:])
        assert len(be.runtime.launches) == launched
    cuda_conv_mma.weight_plan.cache_clear()
    for some, others in zip(got, want, strict=True):
        for array, other in zip(some, others, strict=True):
            assert_same_bits(array, other)
    assert len(be.runtime.launches) < len(alone.runtime.launches) // (5 if together > 2000 else 1)
    be.runtime.launches.clear()
    for some, others in zip(gradients_of(be, cases[:1]), want, strict=False):  # and none waits any more
        for array, other in zip(some, others, strict=True):
            assert_same_bits(array, other)


def test_after_an_error_nothing_waits():
    be = CudaBackend(HostRuntime())

    def fails():
        with be.gradients_together():
            gradients_of(be, [Arrays(Case(SAME, 1, 5, 5, 3, 4), 1)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not be.runtime.launches
    gradients_of(be, [Arrays(Case(SAME, 1, 5, 5, 3, 4), 1)])
    assert be.runtime.launches


def test_a_weight_gradient_in_one_chunk_is_one_launch():
    case, be = Arrays(Case(SAME, 1, 5, 5, 3, 4), 1), CudaBackend(HostRuntime())
    dw, db = be.empty(case.w.shape), be.empty(case.b.shape)
    be.conv_backward(case.geometry, case.dy, case.x, case.w, None, dw, db)
    assert len(be.runtime.launches) == 1


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("geometry", [SAME, SAME._replace(up=(2, 2))])
def test_scratch_is_kept_and_nothing_is_read(monkeypatch, geometry):
    be, made = CudaBackend(DeviceRuntime()), []
    empty = be.runtime.empty
    monkeypatch.setattr(be.runtime, "empty", lambda shape, *args: made.append(shape) or empty(shape, *args))

    def allocated(case):
        x, w, b, dy = map(be.asarray, (case.x, case.w, case.b, case.dy))
        outputs = [be.asarray(unfilled(*a.shape)) for a in (case.dy, case.x, case.w, case.b)]
        made.clear()
        be.conv(geometry, x, w, b, outputs[0])
        be.conv_backward(geometry, dy, x, w, *outputs[1:])
        return list(made)

    with only(*TILES, least_chunk=16):
        small, large = (Arrays(Case(geometry, n, 4, 5, 4, 8), 3) for n in (2, 5))
        first = allocated(small)
        assert first
        assert not allocated(small)
        assert allocated(large)
        assert not allocated(small)
        assert not allocated(large)
        monkeypatch.setattr(be.runtime, "queue", lambda: 1)  # work there may still use what was issued here
        assert allocated(small) == first
    assert not be.runtime.reads


def test_residual_and_gradient_in_place():
    """`out` may be the residual."""
    case, be = Arrays(Case(SAME, 2, 4, 5, 8, 6), 1), CudaBackend(HostRuntime("shuffled"))
    want, out = forward(be, case), case.residual.copy()
    be.conv(case.geometry, case.x, case.w, case.b, out, shift=case.shift, residual=out)
    assert_same_bits(out, want)
