"""Bands that hold: draws spread by what held-out rows say, against closed forms; in fits, files and answers."""

import numpy as np
import pytest
from tolerances import SPREAD_LINEAR

import fastdiff as fd
from fastdiff import calibration
from fastdiff.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore::fastdiff.errors.QualityWarning")  # of networks of 50 steps
COV = 0.9 ** np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
QUIET = {"progress": False}
SCHEDULE = fd.Schedule.sigmoid(50, beta_start=1e-4, beta_end=0.2)


def ar(n, seed=0):
    return np.random.default_rng(seed).multivariate_normal(np.zeros(6), COV, n)


@pytest.mark.parametrize("make", [fd.samplers.dpmpp_2m, fd.samplers.ddpm, fd.samplers.heun])
@pytest.mark.parametrize("given", [False, True])
def test_draws_of_a_normal_law_move_away_from_one_point(make, given):
    """x(f) = c + f (x(1) - c) for all draws, c being the same of all: the noise enters linearly."""
    law, f = fd.denoisers.Gaussian(np.zeros(6), COV, SCHEDULE, prediction="v"), 1.7
    table = make(SCHEDULE, 20, prediction="v")
    seen = fd.Known(np.array([1.0, np.nan, np.nan, -0.5, np.nan, np.nan])) if given else None
    once, wide = (fd.sample(law, each, n=30, seed=3, given=seen, backend="numpy") for each in (table, table.widened(f)))
    centre = (wide - f * once) / (1 - f)
    assert centre.std(axis=0).max() < SPREAD_LINEAR < 0.1 * once[:, 1].std()
    if given:
        np.testing.assert_array_equal(wide[:, [0, 3]], np.float32([[1.0, -0.5]] * 30))


def test_a_wider_table_keeps_its_noise_and_its_rules():
    table = fd.samplers.ddpm(SCHEDULE, 10)
    wide = table.widened(1.5)
    assert [row.s for row in wide.rows[1:]] == [1.5 * row.s for row in table.rows]
    assert [row.visit for row in wide.rows[1:]] == [row.visit for row in table.rows]  # the same draws
    assert (wide.evaluations, wide.prediction, wide.clip) == (table.evaluations, table.prediction, table.clip)
    with pytest.raises(ArgumentError, match="factor"):
        table.widened(0)
    with pytest.raises(ArgumentError, match="learned variance"):
        fd.samplers.ddpm(SCHEDULE, variance="learned_range").widened(1.1)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_wider_table_in_one_piece_and_row_by_row(backend):
    net = fd.MLP(6, hidden=(16,), T=50, seed=1)
    net.flat[:] = np.random.default_rng(0).normal(size=net.flat.shape) / 4
    table = fd.samplers.ddpm(SCHEDULE, 10).widened(1.3)
    whole = fd.sample(net, table, n=5, backend=backend)
    np.testing.assert_array_equal(whole, fd.sample(net, table, n=5, backend=backend, trajectory=True)[0])
    assert (whole != fd.sample(net, fd.samplers.ddpm(SCHEDULE, 10), n=5, backend=backend)).any()


@pytest.mark.parametrize("true", [0.75, 1.0, 1.4])
def test_the_factor_of_normal_draws(true):
    rng = np.random.default_rng(1)
    truth, draws = true * rng.normal(size=(200, 20)), rng.normal(size=(19, 200, 20))
    holes = calibration.hidden(truth, seed=0)
    found = calibration.measure(truth, holes, np.where(np.isnan(holes), draws, truth))
    assert abs(found.factor / true - 1) < 0.05
    assert abs(found.held_now - 0.9) < 0.01
    assert (found.held < 0.87, found.held > 0.93) == (true > 1, true < 1)
    assert found.rows == np.isnan(holes).any(axis=1).sum() > 190


def test_few_rows_that_agree_change_nothing():
    """Rows whose values are all as far off: what they tell is little, and 1 stays near."""
    rng = np.random.default_rng(2)
    truth, draws = np.repeat(rng.normal(size=(9, 1)), 20, axis=1), rng.normal(size=(19, 9, 20))
    holes = calibration.hidden(truth, seed=0)
    found = calibration.measure(truth, holes, draws)
    assert abs(found.factor - 1) < 0.2


def test_values_that_are_missing_say_nothing():
    rng = np.random.default_rng(3)
    truth, draws = rng.normal(size=(20, 8)), rng.normal(size=(19, 20, 8))
    holes = calibration.hidden(truth, seed=0)
    want = calibration.measure(truth[:, :4], holes[:, :4], draws[:, :, :4])
    truth[:, 4:] = np.nan
    assert calibration.measure(truth, np.where(np.isnan(truth), np.nan, holes), draws) == want
    assert 0.3 < np.isnan(holes).mean() < 0.7
    assert calibration.measure(truth[:7], holes[:7], draws[:, :7]) is None


@pytest.fixture(scope="module")
def model():
    made = fd.Diffusion(fd.MLP(6, hidden=(16,), T=50), SCHEDULE, seed=1, backend="cpu")
    return made.fit(ar(200), steps=50, validation=2 * ar(60, seed=1), judge=True, calibrate=True, **QUIET)


def test_a_fit_learns_it_and_says_so(model, tmp_path):
    """Rows held out that are wider than those learned from: draws are not wide enough."""
    assert model.spread == model.report_["spread"] > 1.1
    assert model.report_["rows_hidden"] == np.isnan(calibration.hidden(np.zeros((60, 6)), 1)).any(axis=1).sum()
    assert abs(model.report_["held_spread"] - 0.9) < abs(model.report_["held"] - 0.9)
    model.save(tmp_path / "m.safetensors")
    loaded = fd.load(tmp_path / "m.safetensors")
    assert loaded.spread == model.spread
    holes = calibration.hidden(ar(3, seed=9), seed=5)
    np.testing.assert_array_equal(loaded.impute(holes, 4), model.impute(holes, 4))
    assert fd.Diffusion(seed=1).spread == 1


def test_answers_are_spread_by_it(model):
    x = ar(1, seed=7)[0]
    holes = calibration.hidden(x[None], seed=5)
    wide = model.impute(holes, 40)
    np.testing.assert_array_equal(model.impute(holes, 10, first_draw=5), wide[5:15])  # whatever the other draws are
    seen = ~np.isnan(holes[0])
    np.testing.assert_array_equal(wide[:, 0, seen], np.tile(x[seen], (40, 1)))
    raw = model.impute(holes, 40, sampler=model.named_sampler(given=True))
    ratio = wide[:, 0, ~seen].std(axis=0) / raw[:, 0, ~seen].std(axis=0)
    assert abs(np.median(ratio) / model.spread - 1) < 0.2
    spread = model.spread
    try:
        model.spread = 1.0
        np.testing.assert_array_equal(model.impute(holes, 40), raw)
    finally:
        model.spread = spread


def test_a_sample_given_something_is_drawn_as_widely_as_an_answer(model):
    holes = calibration.hidden(ar(1, seed=7), seed=5)
    known, table = fd.Known(holes), model.named_sampler(given=True)
    np.testing.assert_array_equal(model.sample(8, given=known), model.impute(holes, 8))
    raw = model.sample(8, given=known, sampler=table)
    assert (model.sample(8, given=known) != raw).any()
    np.testing.assert_array_equal(model.sample(8), model.sample(8, sampler=model.named_sampler()))  # nothing is given
    by_pigdm = model.sample(8, given=known, method="pigdm")
    np.testing.assert_array_equal(by_pigdm, model.sample(8, given=known, method="pigdm", sampler=table))
    spread = model.spread
    try:
        model.spread = 1.0
        np.testing.assert_array_equal(model.sample(8, given=known), raw)
    finally:
        model.spread = spread


@pytest.mark.parametrize(
    ("rows", "options", "measured"),
    [
        (ar(60), {}, True),
        (ar(60), {"calibrate": False}, False),
        (ar(60).reshape(60, 3, 2), {}, True),
        (ar(60).reshape(60, 3, 2), {"calibrate": False}, False),
        (ar(60).reshape(60, 3, 2), {"judge": False}, False),
        (np.where(np.arange(6) < 3, ar(60), calibration.hidden(ar(60), seed=4)), {}, True),
        (ar(20).reshape(20, 3, 2), {}, False),  # 5 rows are held out
    ],
)
def test_what_is_calibrated(rows, options, measured):
    made = fd.Diffusion(backend="cpu").fit(rows, **{"steps": 2, "validation": 0.25, "judge": True, **options, **QUIET})
    assert ("held" in (made.report_ or {})) == measured
    assert measured or made.spread == 1


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, 101, "a", None, [1]])
def test_a_spread_is_a_number(value):
    made = fd.Diffusion()
    with pytest.raises(ArgumentError, match="spread: got"):
        made.spread = value
    assert made.spread == 1
