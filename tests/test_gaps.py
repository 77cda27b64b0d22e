"""Learning from rows with missing values: the Gaussian of what is there, draws of what is not, and the loss."""

import logging

import numpy as np
import pytest
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import noise
from fastdiff.backends import TrainingDraws, get_backend
from fastdiff.errors import ArgumentError
from fastdiff.gaps import FIRST_STEP, Gaps
from fastdiff.noise import Draw, Stream
from fastdiff.normaliser import Normaliser

NUMPY, CPU = get_backend("numpy"), get_backend("cpu")
POINTS = 8
AR = 0.9 ** np.abs(np.subtract.outer(np.arange(POINTS), np.arange(POINTS)))


def holed(n, *, share=0.3, seed=0):
    """AR(1) curves of variance 1, and the same with values missing at random."""
    rng = np.random.default_rng(seed)
    whole = rng.multivariate_normal(np.zeros(POINTS), AR, n)
    return whole, np.where(rng.random(whole.shape) < share, np.nan, whole)


# ------------------------------------------------------------------------------------------- the Gaussian


def test_em_finds_the_law_of_whole_rows():
    """Nearer than pairs of columns do, and not much further than all values would."""
    whole, rows = holed(3000)
    gaps = Gaps.of(rows, 0)
    of_whole, error = np.abs(np.cov(whole.T) - AR).max(), np.abs(gaps.cov - AR).max()
    assert error < 2 * of_whole
    at = ~np.isnan(rows)
    pairs = np.where(at, rows, 0).T @ np.where(at, rows, 0) / (at.T.astype(float) @ at)
    assert np.linalg.norm(gaps.cov - AR) < np.linalg.norm(pairs - AR)


def test_without_gaps_em_is_one_step_of_moments():
    whole, _ = holed(500)
    gaps = Gaps.of(whole, 0)
    S = np.cov(whole.T, bias=True)
    want = (1 - gaps.shrinkage) * S + gaps.shrinkage * np.trace(S) / POINTS * np.eye(POINTS)
    np.testing.assert_allclose(gaps.cov, want, atol=1e-12)
    np.testing.assert_array_equal(gaps.filled(2), [whole, whole])


def test_draws_are_of_the_conditional():
    """Of one row told everywhere but at two points, drawn many times."""
    _, rows = holed(400)
    gaps = Gaps.of(rows, 0)
    one = np.sin(np.arange(POINTS))
    one[2:4] = np.nan
    many = gaps.filled(1, np.tile(one, (20_000, 1)))[0][:, 2:4]
    there = np.isfinite(one)
    gain = gaps.cov[2:4][:, there] @ np.linalg.inv(gaps.cov[np.ix_(there, there)])
    mean = gaps.mean[2:4] + gain @ (one - gaps.mean)[there]
    cov = gaps.cov[2:4, 2:4] - gain @ gaps.cov[there][:, 2:4]
    np.testing.assert_allclose(many.mean(axis=0), mean, atol=5 * np.sqrt(cov.max() / 20_000))
    np.testing.assert_allclose(np.cov(many.T), cov, atol=5 * cov.max() * np.sqrt(2 / 20_000))


def test_draws_follow_the_noise_law():
    """Stream DATA, step 4 + copy, the row's number; whatever other rows are missing."""
    _, rows = holed(60)
    gaps = Gaps.of(rows, seed=7)
    drawn = gaps.filled(2)
    one = np.full_like(rows, 0.5)
    one[5] = rows[5]
    assert_close(gaps.filled(2, one)[:, 5], drawn[:, 5], terms=POINTS**2)
    alone = np.zeros((1, POINTS))
    alone[:, 3] = np.nan
    z = np.empty((1, POINTS))
    noise.fill_normal(z, Draw(7, Stream.DATA, FIRST_STEP + 1))
    there = np.arange(POINTS) != 3
    gain = np.linalg.solve(gaps.cov[np.ix_(there, there)], gaps.cov[there, 3])
    want = gaps.mean[3] - gain @ gaps.mean[there] + z[0, 3] * np.sqrt(AR_conditional(gaps, there))
    assert gaps.filled(2, alone)[1, 0, 3] == pytest.approx(want, abs=1e-6)


def AR_conditional(gaps, there):
    return gaps.cov[3, 3] - gaps.cov[3, there] @ np.linalg.solve(gaps.cov[np.ix_(there, there)], gaps.cov[there, 3])


# ------------------------------------------------------------------------------------------- training


def masked(n=40, d=5, seed=3):
    rng = np.random.default_rng(seed)
    data = np.stack([rng.normal(size=(n, d)), np.where(rng.random((n, d)) < 0.4, np.nan, 0.0)], axis=1)
    schedule = fd.Schedule.cosine(6)
    tables = schedule.signal, schedule.noise, *schedule.target("v")
    return TrainingDraws(data.astype(np.float32), *tables, 9, masked=True)


def test_only_what_is_there_has_a_loss():
    """In float64: as if the squares of the others were not in the sum, by loops."""
    draws, net = masked(), fd.MLP(5, hidden=(4,), T=6, dtype="float64")
    net.flat[...] = np.random.default_rng(0).normal(size=net.flat.size)
    draws = draws._replace(data=draws.data.astype(np.float64))
    grads = np.zeros_like(net.flat)
    loss = NUMPY.mlp_train_gradient(net.plan, net.flat, draws, 2, 7, grads)
    rows = noise.scaled_words(7, 40, Draw(9, Stream.BATCH, 2))
    t = noise.scaled_words(7, 6, Draw(9, Stream.TRAIN_TIME, 2))
    eps = np.empty((7, 5))
    noise.fill_normal(eps, Draw(9, Stream.TRAIN_NOISE, 2))
    total = 0.0
    for i in range(7):
        x0, hidden = draws.data[rows[i]]
        x = draws.signal[t[i]] * x0 + draws.noise[t[i]] * eps[i]
        off = net.predict(x[None], int(t[i]), backend="numpy")[0] - draws.target_noise[t[i]] * eps[i]
        off -= draws.target_data[t[i]] * x0
        total += sum(off[j] ** 2 for j in range(5) if not np.isnan(hidden[j]))
    assert loss == pytest.approx(total / 35, rel=1e-12)
    # The gradient is that of this loss.
    step, k = 1e-6, 3
    losses = []
    for sign in (1, -1):
        moved = net.flat.copy()
        moved[k] += sign * step
        losses.append(NUMPY.mlp_train_gradient(net.plan, moved, draws, 2, 7, np.zeros_like(grads)))
    assert grads[k] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("net", [fd.MLP(5, hidden=(4,), T=6), fd.UNet((5,), channels=(4,), blocks=1, T=6, groups=2)])
def test_backends_agree_where_values_are_missing(net):
    draws = masked()
    found = []
    for be in (NUMPY, CPU):
        state = [net.flat.copy(), *(net.layout.zeros(net.dtype) for _ in range(4))]
        from fastdiff.backends import TrainState
        from fastdiff.nn.optim import TrainingPlan

        results = np.zeros((1, 2))
        training = net.runner(be, state[0]).training(draws, 33, 1, TrainState(*state), results)
        training.run(0, TrainingPlan().options(0, 0))
        found.append((results.copy(), state[1]))
    assert np.isfinite(found[0][0]).all()
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-5 * np.abs(found[0][1]).max())


def test_gaps_are_told_once_where_nothing_is_held_out(caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    fd.Diffusion(backend="cpu").fit(holed(120)[1], steps=1, validation=0, progress=False)
    assert caplog.text.count("% of the values are missing") == 1


def test_a_model_learns_from_gaps(caplog):
    """The law of its samples is that of whole rows; a network has not learned that missing values are zero."""
    caplog.set_level(logging.INFO, "fastdiff")
    _, rows = holed(1500)
    model = fd.Diffusion(backend="cpu").fit(rows, steps=200, progress=False)
    assert "% of the values are missing" in caplog.text
    found = np.cov(model.sample(4000).T)
    np.testing.assert_allclose(np.diag(found), 1, atol=0.15)
    np.testing.assert_allclose(np.diag(found, 1), 0.9, atol=0.15)
    assert len(model.history["validation_loss"]) == 3


def test_training_goes_on_to_the_bit(tmp_path):
    _, rows = holed(120)
    once = fd.Diffusion(backend="cpu").fit(rows, steps=6, progress=False)
    twice = fd.Diffusion(backend="cpu").fit(rows, steps=4, progress=False)
    twice.save(tmp_path / "m.safetensors")
    again = fd.load(tmp_path / "m.safetensors", backend="cpu").fit(rows, steps=2, progress=False)
    assert_same_bits(again.net.flat, once.net.flat)


def test_scales_are_of_what_is_there():
    _, rows = holed(300)
    made = Normaliser.of(rows * 3 + 5)
    assert (made.mean, made.std) == pytest.approx((np.nanmean(rows * 3 + 5), np.nanstd(rows * 3 + 5)))
    each = Normaliser.of(rows * np.arange(1, 1 + POINTS) ** 2, scale="auto")
    np.testing.assert_allclose(each.std, np.nanstd(rows, axis=0) * np.arange(1, 1 + POINTS) ** 2)
    series = Normaliser.of_series(rows.reshape(300, 4, 2) * [1, 50])
    np.testing.assert_allclose(series.std, np.nanstd(rows.reshape(-1, 2), axis=0) * [1, 50])


def _with(at):
    rows = holed(60)[1].reshape(60, 4, 2)
    rows[at] = np.nan
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (_with(7), "1 rows without any value, the first is row 7"),
        (_with((slice(None), slice(None), 1)), "channel 2, never seen"),
        (_with((slice(None), 1, 0)), "point 1 of channel 1, missing in all rows"),
        (_with(np.s_[:, 2:, 1]) * [1, 0] + [0, 3], "point 2 of channel 2"),
        (np.nan_to_num(_with(7)) * [1, 0] + [0, 3], "channel 2 that is 3 everywhere"),
        ([np.ones((4, 2)), np.ones((5, 2))], "rows of different lengths"),
        (np.where(np.arange(60)[:, None, None] == 3, np.inf, _with(0 * 7 + 1)), "inf at index"),
    ],
)
def test_what_nothing_can_be_learned_of(rows, words):
    with pytest.raises(ArgumentError, match=words):
        fd.Diffusion(backend="cpu").fit(rows, steps=1, progress=False)


def test_pictures_have_no_gaps():
    with pytest.raises(ArgumentError, match="finite"):
        fd.Diffusion().fit(np.full((4, 4, 4, 1), np.nan), steps=1)
