"""Copies of rows with jitter: their law, the choice of how much, and what a fit makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

import fastdiff as fd
from fastdiff import base, defaults, jitter, judgement
from fastdiff.base import GaussianBase
from fastdiff.jitter import Jitter
from fastdiff.noise import Draw, Stream, fill_normal


def rows_of(n, d, seed=0):
    """Two curves with amplitudes of chance: far from Gaussian."""
    random = np.random.default_rng(seed)
    x = np.linspace(0, 1, d)
    shapes = np.stack([np.sin(2 * np.pi * x), np.sign(x - 0.5)])
    rows = shapes[random.integers(0, 2, n)] * random.uniform(0.5, 1.5, (n, 1)) + 0.05 * random.normal(size=(n, d))
    return rows - rows.mean(axis=0)


def covariance(base):
    d = len(base.axes)
    rest = base.rest * (np.eye(d) - base.axes @ base.axes.T)
    return base.axes * base.variances @ base.axes.T + rest


def some_base(d, rank, seed=1):
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.normal(size=(d, d)))[0][:, :rank]
    return GaussianBase(axes, np.geomspace(2, 0.1, rank), 0.05)


@pytest.mark.parametrize("rank", [5, 3])
@pytest.mark.parametrize("ratio", [0.01, 1.0, 100.0])
def test_a_copy_is_a_noisy_row_denoised_by_the_gaussian(rank, ratio):
    """The law of x0 under the Gaussian, given the row at that signal-to-noise ratio: by matrices."""
    base, rows = some_base(5, rank), np.random.default_rng(2).normal(size=(4, 5))
    C = covariance(base)
    gain = ratio * C @ np.linalg.inv(ratio * C + np.eye(5))  # of x0 + z / sqrt(ratio)
    law = gain @ rows.T, gain @ gain.T / ratio + C - gain @ C
    drawn = Jitter(base, ratio).copies(np.repeat(rows, 5000, axis=0), 3).reshape(-1, 4, 5000, 5)
    means = drawn.mean(axis=(0, 2))
    spread = np.mean([np.cov(each.T) for each in drawn.transpose(1, 0, 2, 3).reshape(4, -1, 5)], axis=0)
    n = drawn.shape[0] * 5000
    assert np.abs(means - law[0].T).max() < 5 * np.sqrt(C.max() / n)
    assert np.abs(spread - law[1]).max() < 5 * C.max() * np.sqrt(2 / (4 * n))


def test_copies_keep_the_covariance():
    base = some_base(6, 6)
    z = np.empty((20_000, 6))
    fill_normal(z, Draw(0, Stream.PROBE))
    rows = z * np.sqrt(base.variances) @ base.axes.T
    for ratio in (0.1, 10.0):
        drawn = Jitter(base, ratio).copies(rows, 0)
        assert np.abs(np.cov(drawn.T) - covariance(base)).max() < 0.05


@pytest.mark.parametrize("rank", [4, 2])
def test_the_likelihood_is_that_of_the_mixture(rank):
    base, rows, at = some_base(4, rank), *np.random.default_rng(0).normal(size=(2, 7, 4))
    kernel = Jitter(base, 2.0)
    C = covariance(base)
    gain = 2.0 * C @ np.linalg.inv(2.0 * C + np.eye(4))
    cov = C - gain @ C @ gain.T
    off = at[:, None] - rows @ gain.T
    logs = -0.5 * np.einsum("ijk,kl,ijl->ij", off, np.linalg.inv(cov), off) - 0.5 * np.linalg.slogdet(cov)[1]
    assert kernel.log_likelihood(rows, at) == pytest.approx(float(np.sum(logsumexp(logs, axis=1) - np.log(7))))


def test_rows_say_how_much():
    """Draws of a Gaussian: as much as there is; two shapes: little; the grid is not left."""
    random = np.random.default_rng(0)
    gaussian = random.normal(size=(100, 12)) @ random.normal(size=(12, 12))
    both = [Jitter.of(GaussianBase.of(rows), rows) for rows in (gaussian, rows_of(100, 12))]
    of_gaussian, of_shapes = (each.ratio for each in both)
    most = jitter.SHARPER[0]
    assert of_gaussian < 0.1 * most < 1.1 * most < of_shapes <= most * jitter.RATIOS[-1]
    few, same = rows_of(9, 5), np.zeros((50, 5))
    assert Jitter.of(GaussianBase.of(few), few) is None
    assert Jitter.of(GaussianBase.of(same), same) is None
    held = rows_of(60, 6)
    held[:, 2] = 0  # a column without variance
    assert np.isfinite(Jitter.of(GaussianBase.of(held), held).copies(held, 0)).all()


def test_copies_are_kept_apart_from_rows():
    """Distances one by one; and where ten times the likeliest ratio would crowd rows, as much of it as does not."""
    rows = rows_of(40, 12)
    kernel = Jitter.of(GaussianBase.of(rows), rows)
    n, d = jitter.PICKED, 12
    z = np.empty((n, d))
    fill_normal(z, Draw(0, Stream.DATA, jitter.STEP))
    near, usual = np.empty(n), np.empty(n)
    kept, width = kernel._axes
    for i, at in enumerate(np.linspace(0, 39, n).astype(int)):
        along, noise = kernel.base.axes.T @ rows[at], kernel.base.axes.T @ z[i]
        copy = kernel.base.axes @ (kept[:-1] * along + np.sqrt(width[:-1]) * noise)
        near[i] = min(np.linalg.norm(copy - row) for row in rows)
        usual[i] = min(np.linalg.norm(rows[at] - row) for k, row in enumerate(rows) if k != at)
    assert kernel.apart(rows) == pytest.approx(np.median(near) / np.median(usual), rel=1e-9)
    assert kernel.apart(rows) >= jitter.APART
    sharper = Jitter(kernel.base, kernel.ratio * 10**0.25)
    assert sharper.apart(rows) < jitter.APART
    assert Jitter(kernel.base, 1e9).apart(rows) < 1e-3 < 0.5 < Jitter(kernel.base, 1e-9).apart(rows)


def test_of_many_rows_evenly_spaced_ones_say_it():
    """And not the first ones: here these are a Gaussian's, and the others two shapes."""
    random, most = np.random.default_rng(0), base.MOST_FITTED
    rows = np.concatenate([random.normal(size=(most, 6)), rows_of(most, 6)])
    found = Jitter.of(GaussianBase.of(rows), rows)
    assert found.ratio == Jitter.of(GaussianBase.of(rows), rows[::2]).ratio
    assert found.ratio > Jitter.of(GaussianBase.of(rows[:most]), rows[:most]).ratio


def test_copies_are_of_the_noise_law():
    base, rows = some_base(5, 3), rows_of(8, 5)
    kernel = Jitter(base, 1.0)
    copies = kernel.copies(rows, 7)
    assert copies.shape == (jitter.MOST_COPIES * 8, 5)
    z = np.empty((1, 5))
    fill_normal(z, Draw(7, Stream.DATA, jitter.STEP, 3 * 8 + 2))  # copy 3 of row 2
    variances = np.append(base.variances, base.rest)
    k = variances / (1 + variances)
    width = np.sqrt(variances * (1 - k**2))
    along = base.axes @ np.diag(k[:3] - k[3]) @ base.axes.T @ rows[2] + k[3] * rows[2]
    jittered = base.axes @ np.diag(width[:3] - width[3]) @ base.axes.T @ z[0] + width[3] * z[0]
    np.testing.assert_allclose(copies[3 * 8 + 2], along + jittered, rtol=1e-12)
    assert (kernel.copies(rows, 8) != copies).all()


def test_a_fit_by_the_rule_learns_from_copies():
    """And one of so many steps from the rows, as ever, unless it is asked."""
    X = rows_of(60, 10)
    weights = {}
    for asked in (None, True, False):
        for steps in (None, 20):
            model = fd.Diffusion(seed=1, backend="numpy")
            if steps is None:
                stop = {"callback": lambda step, loss: step == 19, "judge": False}
            else:
                stop = {"lr_plan": "cosine", "decay_steps": 700}
            model.fit(X, steps=steps, jitter=asked, progress=False, **stop)
            weights[asked, steps] = np.array(model.history["loss"][:20])
    assert (weights[None, None] == weights[True, None]).all()
    assert (weights[None, 20] == weights[False, 20]).all()
    assert (weights[True, 20] != weights[False, 20]).all()
    assert (weights[True, None] != weights[False, None]).all()


def test_a_fit_with_jitter_is_looked_at_when_it_begins_and_ends(monkeypatch):
    """Without jitter, or of rows too few to say how much, samples are looked at on the way, and for copies."""
    made = []

    class Seen(judgement.Watch):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(judgement, "Watch", Seen)
    monkeypatch.setattr(defaults, "FEWEST_STEPS", 100)
    monkeypatch.setattr(defaults, "STEPS_PER_ROOT", 1)
    for X, jittered, ends in (
        (rows_of(60, 10), None, True),
        (rows_of(60, 10), False, False),
        (rows_of(9, 10), None, False),
    ):
        made.clear()
        model = fd.Diffusion().fit(X, jitter=jittered, progress=False, judge=False)
        assert model.step == 100
        assert [each.ends for each in made] == [ends]


def test_jitter_goes_on_after_a_file(tmp_path):
    X = rows_of(60, 10)
    whole = fd.Diffusion().fit(X, steps=12, jitter=True, progress=False)
    part = fd.Diffusion().fit(X, steps=5, jitter=True, progress=False)
    part.save(tmp_path / "m.safetensors")
    part = fd.load(tmp_path / "m.safetensors").fit(X, steps=7, jitter=True, progress=False)
    assert (part.net.flat == whole.net.flat).all()


def test_jitter_with_labels_keeps_them_beside_their_rows():
    X, y = rows_of(40, 8), np.arange(40) % 2
    X[y == 1] += 40.0
    model = fd.Diffusion().fit(X, y, steps=600, jitter=True, progress=False, judge=False)
    assert model.sample(8, labels=[0, 1] * 4).mean(axis=1).argsort().argsort()[1::2].min() >= 4


@pytest.mark.parametrize(
    ("options", "fit", "why"),
    [
        ({"base": None}, {}, "with a Gaussian base"),
        ({"conditional": "mask"}, {}, "not told of a mask"),
        ({}, {"gap": True}, "no values are missing"),
        ({"net": fd.UNet((8,), channels=(4,), T=10)}, {}, "with a Gaussian base"),
    ],
)
def test_where_there_is_none_it_cannot_be_asked_for(options, fit, why):
    X = rows_of(30, 8)
    if fit:
        X[3, 4] = np.nan
    with pytest.raises(fd.errors.ArgumentError, match=rf"jitter: got True, wants None or False: .*{why}"):
        fd.Diffusion(**options).fit(X, steps=2, jitter=True, progress=False)


def test_jitter_is_a_flag():
    with pytest.raises(fd.errors.ArgumentError, match=r"jitter: got 0\.5"):
        fd.Diffusion().fit(rows_of(30, 8), steps=2, jitter=0.5, progress=False)
