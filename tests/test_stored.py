"""Data on disk: what is learned from them is what is learned from the same data in memory, to the bit."""

import numpy as np
import pytest
from tolerances import STREAMED

import fastdiff as fd
from fastdiff import stored
from fastdiff.covariance import ledoit_wolf
from fastdiff.errors import ArgumentError, DataError
from fastdiff.normaliser import Normaliser
from fastdiff.split import fingerprint
from fastdiff.stored import StoredRows


class OnDisk:
    """As zarr, Dask and h5py show an array; counts what is read, and wants rising numbers."""

    chunks = (10,)

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.read, self.most = 0, 0

    def __getitem__(self, key):
        if not isinstance(key, slice):
            assert np.all(np.diff(key) > 0)
        found = self.array[key]
        self.read += len(found)
        self.most = max(self.most, len(found))
        return found


@pytest.fixture
def many(monkeypatch):
    """What is small here is large: blocks of a few rows, and steps that are read ahead by threes."""
    monkeypatch.setattr(stored, "FEW_VALUES", 100)
    monkeypatch.setattr(stored, "PART_VALUES", 200)
    monkeypatch.setattr(stored, "AHEAD_VALUES", 3 * 8 * 12)


def fit(be, net, X, y=None, *, steps=7, **options):
    model = fd.Diffusion(None if net is None else net(), backend=be)
    return model.fit(X, y, steps=steps, batch=8, progress=False, **options)


def same(one, other):
    assert one.history["loss"] == other.history["loss"]
    assert one.history["validation_loss"] == other.history["validation_loss"]
    assert one.digest() == other.digest()
    assert one._data == other._data


def test_curves(many, any_backend):
    X = fd.data.harmonic_curves(130, points=12)
    y, numbers = np.arange(130) % 3, X[:, :2]

    def net():
        return fd.MLP(12, hidden=(16,), T=10, classes=3, covariates=2)

    options = {"covariates": numbers, "label_drop": 0.3, "validation": 0.1}
    disk = OnDisk(X)
    same(fit(any_backend, net, X, y, **options), fit(any_backend, net, disk, y, **options))
    assert disk.most <= 26  # of 130 rows: a block, or what three steps draw, or what is held out


def test_base_and_series_and_pictures(many, any_backend, tmp_path):
    X = fd.data.harmonic_curves(110, points=12)
    np.save(tmp_path / "X.npy", X)
    on_disk = np.load(tmp_path / "X.npy", mmap_mode="r")
    model = fit(any_backend, None, X)
    assert model._gaussian is not None
    same(model, fit(any_backend, None, on_disk))
    same(model, fit(any_backend, None, str(tmp_path / "X.npy")))
    series = X.reshape(110, 6, 2) * [1.0, 50.0]

    def wide():
        return fd.MLP((6, 2), hidden=(16,), T=10)

    same(fit(any_backend, wide, series), fit(any_backend, wide, OnDisk(series)))
    pictures = (np.arange(40 * 8 * 8) * 37 % 251).reshape(40, 8, 8, 1).astype(np.uint8)

    def unet():
        return fd.UNet((8, 8, 1), channels=(8, 8), T=10)

    both = [fit(any_backend, unet, data, steps=3, flip=True, accumulate=2) for data in (pictures, OnDisk(pictures))]
    same(*both)


def test_goes_on(many, backend):
    """Two fits of data on disk are one, and one of which the second half is in memory."""
    X = fd.data.harmonic_curves(130, points=12)

    def net():
        return fd.MLP(12, hidden=(16,), T=10)

    whole = fit(backend, net, OnDisk(X), steps=9)
    for second in (OnDisk(X), X):
        parts = fit(backend, net, OnDisk(X), steps=4).fit(second, steps=5, batch=8, progress=False)
        same(whole, parts)


def test_few_are_read(tmp_path):
    X = fd.data.harmonic_curves(30, points=12)
    np.save(tmp_path / "X.npy", X)
    assert isinstance(stored.opened(OnDisk(X)), np.ndarray)
    assert isinstance(stored.opened(np.load(tmp_path / "X.npy", mmap_mode="r")), np.ndarray)
    assert stored.opened(X) is X


def test_moments(many):
    rng = np.random.default_rng(0)
    X = rng.normal(3, 2, (97, 6))
    mean, variance = stored.moments(StoredRows(X))
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=STREAMED)
    np.testing.assert_allclose(variance, X.var(axis=0), rtol=STREAMED)
    mean, variance = stored.moments(StoredRows(X), unit=4.0, axis=None)
    np.testing.assert_allclose([mean, variance], [X.mean() / 4, X.var() / 16], rtol=STREAMED)
    of_parts, of_all = ledoit_wolf(StoredRows(X)), ledoit_wolf(X)
    np.testing.assert_allclose(of_parts.cov, of_all.cov, rtol=STREAMED)
    np.testing.assert_allclose(of_parts.shrinkage, of_all.shrinkage, rtol=STREAMED)


@pytest.mark.parametrize("scale", ["all", "auto", "column"])
def test_normaliser(many, scale, monkeypatch):
    """In blocks as in one go, but for rounding; with columns that are constant too."""
    X = fd.data.harmonic_curves(90, points=12).astype(np.float16)
    X[:, 5] = 3
    for data in (X, X[:, :5] * np.array([1, 1, 1, 1, 40], np.float16)):
        found = Normaliser.of(StoredRows(data), scale=scale)
        assert found == Normaliser.of(data, scale=scale)
        with monkeypatch.context() as one_go:
            one_go.setattr(stored, "FEW_VALUES", 1 << 20)
            want = Normaliser.of(data, scale=scale)
        assert found.scale == want.scale
        np.testing.assert_allclose(found.mean, want.mean, rtol=STREAMED)
        np.testing.assert_allclose(found.std, want.std, rtol=STREAMED)
        assert fingerprint(StoredRows(data)) == fingerprint(data)


def test_rows_are_those_of_the_array(many):
    X = np.arange(300.0).reshape(50, 3, 2)
    picked = np.arange(50) % 3 != 0
    rows = StoredRows(OnDisk(X)).some(picked)
    want = X[picked]
    assert (rows.shape, rows.size, rows.ndim, len(rows)) == (want.shape, want.size, 3, len(want))
    for key in (slice(3, 9), slice(1, 30, 7), np.array([5, 2, 2, 31]), np.arange(33) % 2 == 0, 4, slice(0, 0)):
        np.testing.assert_array_equal(rows[key], want[key])
    flat = rows.reshape(-1, 2)
    np.testing.assert_array_equal(np.concatenate(list(stored.parts(flat))), want.reshape(-1, 2))
    np.testing.assert_array_equal(flat[5:8], want.reshape(-1, 2)[5:8])


def test_bad_data(many, tmp_path):
    X = fd.data.harmonic_curves(130, points=12)
    X[77, 3] = np.nan
    with pytest.raises(ArgumentError, match=r"nan at index \(77, 3\)"):
        fd.Diffusion().fit(OnDisk(X), steps=1)
    with pytest.raises(ArgumentError, match="X: got shape"):
        fd.Diffusion(fd.MLP(5)).fit(OnDisk(X), steps=1)
    with pytest.raises(ArgumentError, match="dtype"):
        fd.Diffusion().fit(OnDisk(X.astype(complex)), steps=1)
    (tmp_path / "X.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"X\.npy"):
        fd.Diffusion().fit(tmp_path / "X.npy")
