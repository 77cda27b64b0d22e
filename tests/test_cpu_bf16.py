"""Convolutions of bf16 values on the CPU: by the matrix unit where there is one, and by imitated tiles everywhere."""

import pickle
from unittest import mock

import imitated_tiles
import numpy as np
import pytest
from cuda_parity_conv_mma import CASES, SAME, Case, arrays_of, bf16, normals, pairs, rounded_products
from tolerances import PEER_GRADIENT, assert_close, assert_close_in_bf16, assert_same_bits

import fastdiff as fd
from fastdiff.backends.cpu import CpuBackend, conv_amx
from fastdiff.backends.layers import Conv, ConvShapes
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.bench.networks import perturbed
from fastdiff.errors import ArgumentError, BackendError
from fastdiff.kernels.cpu import tiles

NUMPY = NumpyBackend()
F = np.float32
SMALL = [
    *CASES["small"],
    Case(SAME, (2, 8, 8, 3), 3),
    Case(SAME, (40, 4, 4, 16), 33),  # groups of images that do not fill their cells
    Case(Conv((1, 3), pad=(0, 0, 1, 1)), (3, 1, 24, 32), 16),
    Case(Conv((7, 7), (2, 2), (3, 3, 3, 3)), (2, 9, 10, 5), 8),
]
amx_here = pytest.mark.skipif(bool(tiles.why_not()), reason=f"no matrix unit: {tiles.why_not()}")


@pytest.fixture(params=["imitated", pytest.param("amx", marks=amx_here)])
def be(request, monkeypatch):
    """The backend, of one thread where tiles are imitated."""
    if request.param == "amx":
        return CpuBackend(2, "bf16")
    monkeypatch.setattr(tiles, "why_not", lambda: "")
    monkeypatch.setattr(conv_amx, "amx", imitated_tiles.kernels())
    return CpuBackend(1, "bf16")


def rounded_weight_gradient(geometry, x, dy):
    """The weights' gradient of rounded values."""
    dw = np.zeros((*geometry.kernel, x.shape[3], dy.shape[3]))
    x, dy = (bf16(values).astype(np.float64) for values in (x, dy))
    columns = list(pairs(geometry, 1, x.shape[2], dy.shape[2]))
    for i, p, rows in pairs(geometry, 0, x.shape[1], dy.shape[1]):
        for j, q, across in columns:
            product = x[:, p, q].T @ dy[:, i, j]
            for r in rows:
                for s in across:
                    dw[r, s] += product
    return dw


def outputs(be, case, x, w, b, **added):
    out = np.full((len(x), *case.geometry.size(*x.shape[1:3]), case.outputs), np.nan, F)
    be.conv(case.geometry, x, w, b, out, **added)
    return out


def gradients(be, case, dy, x, w, before=None):
    dx = np.full(x.shape, np.nan, F) if before is None else before.copy()
    dw, db = np.full((*case.geometry.kernel, x.shape[3], case.outputs), np.nan, F), np.full(case.outputs, np.nan, F)
    be.conv_backward(case.geometry, dy, x, w, dx, dw, db, add=before is not None)
    return dx, dw, db


def check(be, case):
    x, w, b, dy = arrays_of(case)
    shift, residual, before = normals(7, len(x), case.outputs), normals(8, *dy.shape), normals(9, *x.shape)
    want, of_x = rounded_products(case.geometry, x, w, dy)
    terms = w[..., 0].size + 3
    got = outputs(be, case, x, w, b, shift=shift, residual=residual)
    assert_close(got, want + b + shift[:, None, None] + residual, terms=terms)
    assert_close(outputs(be, case, x, w, b), want + b, terms=terms)
    terms = w[:, :, 0].size + 1
    dx, dw, db = gradients(be, case, dy, x, w)
    assert_close(dx, of_x, terms=terms)
    assert_close(dw, rounded_weight_gradient(case.geometry, x, dy), terms=dy[..., 0].size)
    assert_close(db, dy.sum(axis=(0, 1, 2), dtype=np.float64), terms=dy[..., 0].size)
    assert_close(gradients(be, case, dy, x, w, before)[0], of_x + before, terms=terms)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_products_of_rounded_values(be, case):
    check(be, case)


@amx_here
@pytest.mark.parametrize("case", CASES["full"], ids=str)
def test_products_of_rounded_values_at_length(case):
    check(CpuBackend(2, "bf16"), case)


def test_errors_are_those_of_rounding(be):
    """Against the formula in float64."""
    case = SMALL[0]
    x, w, b, _ = arrays_of(case)
    want, absolute = (np.zeros(outputs(be, case, x, w, b).shape) for _ in range(2))
    NUMPY.conv(case.geometry, *(a.astype(np.float64) for a in (x, w, b)), want)
    NUMPY.conv(case.geometry, *(np.abs(a.astype(np.float64)) for a in (x, w, b)), absolute)
    assert_close_in_bf16(outputs(be, case, x, w, b), want, absolute, terms=w[..., 0].size + 3)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[2], SMALL[3]], ids=str)
def test_an_image_does_not_depend_on_the_others(be, case):
    x, w, b, dy = arrays_of(case)
    whole, dx = outputs(be, case, x, w, b), gradients(be, case, dy, x, w)[0]
    assert_same_bits(outputs(be, case, x[-1:], w, b), whole[-1:])
    assert_same_bits(gradients(be, case, dy[-1:], x[-1:], w)[0], dx[-1:])


@amx_here
@pytest.mark.parametrize("case", [*SMALL[:3], CASES["full"][2]], ids=str)
def test_threads_change_no_bit(case):
    x, w, b, dy = arrays_of(case)
    backends = [CpuBackend(threads, "bf16") for threads in (1, 2, 3)]
    first, *others = [(outputs(be, case, x, w, b), *gradients(be, case, dy, x, w)) for be in backends]
    for found in others:
        for got, want in zip(found, first, strict=True):
            assert_same_bits(got, want)


def test_weights_in_tiles_give_the_same_bits(be):
    """Made together of views of one buffer, and again when they have changed."""
    given = [(case, *arrays_of(case)) for case in SMALL[:4]]
    flat = np.concatenate([w.reshape(-1) for _, _, w, _, _ in given])
    prepared = be.prepare([ConvShapes(case.geometry, x.shape, dy.shape) for case, x, _, _, dy in given], True)
    for change in (0, 1):
        flat += F(change)
        weights, at = [], 0
        for _, _, w, _, _ in given:
            weights.append(flat[at : at + w.size].reshape(w.shape))
            at += w.size
        for (case, x, _, b, dy), w, forms in zip(given, weights, prepared.run(weights), strict=True):
            assert all(form.dtype == np.uint32 for form in forms)
            assert_same_bits(outputs(be, case, x, forms[0], b), outputs(be, case, x, w, b))
            for got, want in zip(gradients(be, case, dy, x, forms[1]), gradients(be, case, dy, x, w), strict=True):
                assert_same_bits(got, want)


def test_what_is_no_number_is_seen(be):
    """A NaN, whatever its bits, and an infinity come out where they are seen, and nowhere else."""
    case = Case(SAME, (2, 6, 5, 20), 17)
    x, w, b, _ = arrays_of(case)
    x.view(np.uint32)[0, 2, 2, 3] = 0x7FFFFFFF  # rounding its bits up would make it -0
    x[1, 0, 0, 0] = np.inf
    out = outputs(be, case, x, w, b)
    seen = np.zeros((2, 6, 5), bool)
    seen[0, 1:4, 1:4] = seen[1, :2, :2] = True
    assert not np.isfinite(out[seen]).any()
    assert np.isfinite(out[~seen]).all()


def test_no_images_and_no_weights(be):
    case = Case(SAME, (0, 4, 4, 8), 6)
    x, w, b, dy = arrays_of(case)
    assert outputs(be, case, x, w, b).shape == (0, 4, 4, 6)
    dx, dw, _ = gradients(be, case, dy, x, w)
    assert dx.shape == x.shape
    assert (dw == 0).all()


def trained(be, steps=6, more=0, folder=None):
    X = np.random.default_rng(0).normal(size=(24, 8, 8, 2)).astype(F)
    model = fd.Diffusion(fd.UNet((8, 8, 2), T=20, channels=(16, 32)), fd.Schedule.cosine(20), backend=be)
    model.fit(X, steps=steps, batch=8, progress=False, judge=False)
    if more:
        model.save(folder / "m.safetensors")
        model = fd.load(folder / "m.safetensors", backend=be)
        model.fit(X, steps=more, batch=8, progress=False, judge=False)
    return model


def test_a_network_learns_and_draws(be, tmp_path):
    """Like in float32 but for rounding; k + m steps are k, save, load, m; a batch changes no sample."""
    model, plain = trained(be), trained("cpu")
    drawn = model.sample(3, steps=5)
    assert not np.array_equal(drawn, plain.sample(3, steps=5))
    np.testing.assert_allclose(model.history["loss"], plain.history["loss"], rtol=0.05)
    assert_same_bits(trained(be, 4, 2, tmp_path).sample(3, steps=5), drawn)
    assert_same_bits(model.sample(1, steps=5), drawn[:1])


def test_gradients_of_a_network(be):
    """The input's, against float32: off by what bf16 rounds, which the network's depth multiplies."""
    net = perturbed(fd.UNet((8, 8, 2), T=20, channels=(16, 32)))
    x, dy = (normals(seed, 4, 8, 8, 2) for seed in (1, 2))
    t = np.array([0, 5, 10, 19])
    ours, plain = (net.vjp(x, t, dy, backend=each) for each in (be, "cpu"))
    error = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
    assert PEER_GRADIENT < error < 0.05


def test_the_precision_is_the_backends():
    with pytest.raises(ArgumentError, match=r"precision.*numpy"):
        fd.get_backend("numpy", precision="bf16")
    with pytest.raises(ArgumentError, match=r"precision.*float32"):
        fd.get_backend("cpu", precision="fp8")
    with pytest.raises(ArgumentError, match=r"precision: got 'bf16x3', wants 'float32' or 'bf16': only the cuda"):
        fd.get_backend("cpu", precision="bf16x3")
    with mock.patch.object(tiles, "why_not", return_value="it has none"), pytest.raises(BackendError) as caught:
        CpuBackend(1, "bf16")
    assert str(caught.value) == "precision 'bf16' on a CPU: it has none; 'float32' runs everywhere"
    assert fd.get_backend("cpu", precision="float32").precision == "float32"


@amx_here
def test_a_backend_is_pickled_with_its_precision():
    be = fd.get_backend("cpu", precision="bf16", threads=1)
    again = pickle.loads(pickle.dumps(be))
    assert (again.precision, again.threads) == ("bf16", 1)
    assert fd.get_backend("cpu", threads=1) is not be


def test_the_reason_names_the_system(monkeypatch):
    monkeypatch.setattr(tiles.sys, "platform", "darwin")
    assert "Linux" in tiles.why_not.__wrapped__()
