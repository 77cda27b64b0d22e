"""What is missing of recordings, forecasts and anomalies: against exact conditionals, in parts, and as frames."""

from itertools import pairwise

import numpy as np
import pytest
from test_series import Index, Table
from tolerances import assert_estimate

import fastdiff as fd
from fastdiff import series
from fastdiff.cli import main
from fastdiff.errors import ArgumentError
from fastdiff.recordings import Step, forecast_plan, steps_of

T, RHO = 8, 0.8


def ar(n, length=T, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, length))
    for k in range(1, length):
        x[:, k] = RHO * x[:, k - 1] + np.sqrt(1 - RHO**2) * x[:, k]
    return x


@pytest.fixture(scope="module")
def model():
    """The Gaussian of many curves, exactly: a network that has learned nothing else."""
    return fd.Diffusion(backend="cpu").fit(ar(20_000), steps=0, progress=False)


@pytest.fixture(scope="module")
def of_series():
    rows = ar(300).reshape(300, 4, 2) * [1, 10]
    return fd.Diffusion(backend="cpu").fit(series.Windows(rows, ["a", "b"]), steps=0, progress=False)


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(("length", "T"), [(8, 8), (9, 8), (30, 8), (31, 5), (100, 24), (7, 1), (10, 2), (11, 3)])
def test_windows_cover_a_recording(length, T):
    steps = steps_of(length, T)
    assert (steps[0].start, steps[-1].start + T, steps[-1].finished) == (0, length, length)
    for one, other in pairwise(steps):
        assert one.start < other.start <= one.finished <= one.start + T  # no row is left out
        assert one.finished < other.finished
        assert T < 3 or one.finished - other.start >= T // 3 or other is steps[-1]


def test_a_forecast_that_fits_is_one_window():
    assert forecast_plan(5, 3, 8) == (0, [Step(0, 0, 8)])
    assert forecast_plan(2, 3, 8) == (0, [Step(0, 0, 5)])
    assert forecast_plan(30, 3, 8) == (25, [Step(0, 0, 8)])
    assert forecast_plan(3, 9, 8) == (-1, [Step(k, 4 * k, 8 + 4 * k) for k in range(3)])


# ------------------------------------------------------------------------------------------- truth


def crps(draws, truth):
    """Fair, over draws (n, ...)."""
    n = len(draws)
    ranks = (2 * np.arange(n) - n + 1).reshape(n, *[1] * truth.ndim)
    return np.abs(draws - truth).mean(axis=0) - (ranks * np.sort(draws, axis=0)).sum(axis=0) / (n * (n - 1))


def conditional(row):
    """Mean and deviations of what is missing of a curve of the law."""
    gone = np.isnan(row)
    cov = RHO ** np.abs(np.subtract.outer(np.arange(len(row)), np.arange(len(row))))
    gain = np.linalg.solve(cov[np.ix_(~gone, ~gone)], cov[np.ix_(~gone, gone)]).T
    return gain @ row[~gone], np.sqrt(np.diag(cov[np.ix_(gone, gone)] - gain @ cov[np.ix_(~gone, gone)]))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gaps", "end"])
def test_answers_of_ar1_are_as_good_as_exact_ones(model, what):
    """The CRPS within 5 % of that of the exact conditional, and bands that hold what they should."""
    truth = ar(150, seed=1)
    gone = np.zeros(truth.shape, bool)
    gone[:, 5:] = what == "end"
    gone |= (np.random.default_rng(2).random(truth.shape) < 0.5) & (what == "gaps")
    holes = np.where(gone, np.nan, truth)
    if what == "end":
        drawn = model.forecast(truth[:, :5], 3, draws=39)
        drawn = np.concatenate([np.repeat(truth[None, :, :5], 39, axis=0), drawn], axis=2)
    else:
        drawn = model.impute(holes, 39)
    exact = np.random.default_rng(3).normal(size=drawn.shape)
    for k in range(len(truth)):
        if gone[k].any():
            mean, deviation = conditional(holes[k])
            exact[:, k, gone[k]] = mean + deviation * exact[:, k, gone[k]]
    ours, theirs = (crps(d, truth)[gone].mean() for d in (drawn, exact))
    assert ours < 1.05 * theirs
    place = ((drawn < truth).sum(axis=0) + 0.5) / 40
    for band in (0.5, 0.8, 0.95):
        inside = np.abs(place - 0.5) < band / 2
        of_rows = np.array([inside[k, gone[k]].mean() for k in range(len(truth)) if gone[k].any()])
        assert abs(of_rows.mean() - band) < 3 * of_rows.std(ddof=1) / np.sqrt(len(of_rows)) + 0.02


def test_a_gap_in_a_recording_is_given_both_of_its_ends(model):
    x = ar(1, 40, seed=5)[0]
    holes = x.copy()
    holes[[13, 14, 15]] = np.nan
    holes[22:30] = np.nan
    drawn = model.impute(holes, 150)
    np.testing.assert_array_equal(drawn[:, ~np.isnan(holes)], np.repeat(x[None, ~np.isnan(holes)], 150, axis=0))
    mean, deviation = conditional(holes)
    got = drawn[:, np.isnan(holes)]
    np.testing.assert_allclose(got.mean(axis=0)[:3], mean[:3], atol=0.25)
    np.testing.assert_allclose(got.std(axis=0), deviation, atol=0.2)
    along = np.corrcoef(drawn[:, 24], drawn[:, 25])[0, 1]  # neighbours of one draw belong together
    assert along > 0.5


def test_a_long_forecast_rolls_on(model):
    x = ar(1, 30, seed=6)[0]
    drawn = model.forecast(x, 14, draws=150)
    ahead = np.arange(1, 15)
    np.testing.assert_allclose(drawn.mean(axis=0), x[-1] * RHO**ahead, atol=0.3)
    np.testing.assert_allclose(drawn.std(axis=0), np.sqrt(1 - RHO ** (2 * ahead)), atol=0.2)
    assert np.corrcoef(drawn[:, 3], drawn[:, 4])[0, 1] > 0.5  # over the end of a window


# ------------------------------------------------------------------------------------------- in parts


def test_draws_do_not_depend_on_how_many_there_are(model):
    x = ar(1, 20, seed=7)[0]
    x[5:12] = np.nan
    np.testing.assert_array_equal(model.impute(x, 6)[2:5], model.impute(x, 3, first_draw=2))
    past = ar(3, 6, seed=8)
    many = model.forecast(past, 9, draws=4)
    np.testing.assert_array_equal(model.forecast(past[:2], 9, draws=2), many[:2, :2])
    assert len(np.unique(many[:, 0, 5])) == len(np.unique(many[:, 0, 1])) == 4


def test_quantiles_are_those_of_the_draws(model, of_series, monkeypatch):
    levels = (0.1, 0.5, 0.9)
    x = ar(1, 20, seed=7)[0]
    x[5:12] = np.nan
    np.testing.assert_array_equal(model.impute(x, 9, quantiles=levels), np.quantile(model.impute(x, 9), levels, axis=0))
    past = ar(2, 6)
    want = np.quantile(model.forecast(past, 9, 5), levels, axis=0)
    np.testing.assert_array_equal(model.forecast(past, 9, 5, quantiles=levels), want)
    rows = ar(3, seed=9).reshape(3, 4, 2)
    rows[:, 1] = np.nan
    want = np.quantile(of_series.impute(rows, 5).astype(np.float64), levels, axis=0)
    monkeypatch.setattr("fastdiff.answers.BLOCK_VALUES", 1)  # a row at a time
    np.testing.assert_allclose(of_series.impute(rows, 5, quantiles=levels), want, rtol=1e-6)


def test_a_row_of_which_nothing_is_known_is_a_sample(model):
    rows = model.impute(np.full((2, T), np.nan), 2000)
    assert_estimate(rows.std(axis=0).mean(axis=1), 1, 0.02)
    assert_estimate((rows[:, 0, 0] * rows[:, 0, 1]).mean(), RHO, (1 + RHO**2) ** 0.5 / 2000**0.5)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m: m.forecast(np.ones((2, 9)), 1), "past: got 9 rows, wants at most 8"),
        (lambda m: m.forecast(np.ones(9), 0), "horizon: got 0"),
        (lambda m: m.forecast(np.ones((2, 0)), 1), "past"),
        (lambda m: m.forecast(np.full((2, 3), np.inf), 1), "past: got infinite"),
        (lambda m: m.forecast(np.ones((2, 2, 2)), 1), "past: got shape"),
        (lambda m: m.impute(np.ones(9), quantiles=2), "quantiles"),
        (lambda m: m.impute(np.ones((2, 9))), "X: got shape"),
        (lambda m: m.impute(3.0), "X: got shape"),
        (lambda m: m.impute([np.ones(8), np.ones(7)]), "different lengths"),
        (lambda m: m.forecast([np.ones(8), np.ones(7)], 1), "different lengths"),
        (lambda m: m.impute(np.full((1, 8), np.inf)), "X: got infinity"),
        (lambda m: m.impute(np.full((1, 8), "x")), "X: got"),
        (lambda m: m.impute(np.ones((2, 8)), 0), "draws: got 0"),
        (lambda m: m.anomaly(np.ones(5)), "X: got 5 rows"),
        (lambda m: m.anomaly(np.ones((2, 8)), block=9), "block"),
    ],
)
def test_questions_without_an_answer(model, ask, words):
    with pytest.raises(ArgumentError, match=words):
        ask(model)


# ------------------------------------------------------------------------------------------- anomalies


def test_strange_values_stand_out(model):
    x = ar(1, 40, seed=9)[0]
    usual = model.anomaly(x)
    assert usual.shape == x.shape
    assert 0.2 < usual.mean() < 1.2  # half, where the model is right
    x[17] += 4
    found = model.anomaly(x)
    assert found.argmax() == 17
    assert found[17] > 8
    rows = ar(6, seed=10)
    rows[2, 3] += 5
    rows[4, 5] = np.nan
    found = model.anomaly(rows)
    assert np.unravel_index(np.nanargmax(found), found.shape) == (2, 3)
    assert np.isnan(found[4, 5])


# ------------------------------------------------------------------------------------------- frames


def frame_of(rows=20, gaps=True):
    x = ar(2, rows, seed=11).T * [1, 10]
    if gaps:
        x[5:9, 1] = np.nan
    return Table({"a": x[:, 0], "b": x[:, 1]}, np.datetime64("2024-01-01T00", "h") + np.arange(rows))


def test_frames_are_answered_by_frames(of_series):
    frame = frame_of()
    found = of_series.impute(frame, 3, quantiles=(0.05, 0.95))
    assert list(found) == [0.05, 0.95]
    np.testing.assert_array_equal(found[0.05].data["a"], frame.data["a"])
    gone = np.isnan(frame.data["b"])
    assert (found[0.05].data["b"][gone] <= found[0.95].data["b"][gone]).all()
    assert np.isnan(frame.data["b"]).sum() == 4  # the frame itself is as it was
    draws = of_series.impute(frame, 2)
    assert len(draws) == 2
    assert isinstance(draws[0].index, Index)
    later = of_series.forecast(frame, 6, 2, quantiles=0.5)[0.5]
    np.testing.assert_array_equal(later.index.values, np.datetime64("2024-01-01T20", "h") + np.arange(6))
    assert of_series.anomaly(frame_of(gaps=False), draws=4).columns == ["a", "b"]
    with pytest.raises(ArgumentError, match=r"the columns \['b', 'a'\]"):
        of_series.impute(Table({"b": frame.data["a"], "a": frame.data["b"]}))


def test_a_recording_has_the_channels_and_the_clock_that_were_learned(of_series, tmp_path, capsys):
    for shape in ((40, 1), (40, 3), (3, 8)):
        with pytest.raises(ArgumentError, match=r"X: got shape .* wants a recording \(time, 2\)"):
            of_series.impute(np.full(shape, np.nan), 2)
    frame = frame_of()
    rows = np.r_[0:9, 12:20]
    cut = Table({name: column[rows] for name, column in frame.data.items()}, frame.index.values[rows])
    for ask in (of_series.impute, of_series.anomaly):
        with pytest.raises(ArgumentError, match="clock: got steps from 1 hours to 4 hours"):
            ask(cut)
    of_series.channel_names = ["a", "b"]
    of_series.save(m := tmp_path / "m.safetensors")
    for name, header, hours, words in [
        ("swapped", "when,b,a", range(10), "the columns b,a, where"),
        ("cut", "when,a,b", [0, 1, 2, 5, 6, 7, 8, 9], "clock: got steps"),
    ]:
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([header, *(f"2024-01-01 {k:02d}:00,{k % 3},{k % 2}" for k in hours)]) + "\n")
        assert main(["impute", str(m), str(path), "-o", str(tmp_path / "o.csv"), "--quiet"]) != 0
        assert words in capsys.readouterr().err
        assert not (tmp_path / "o.csv").exists()


def test_the_command_line_fills_in_and_goes_on(of_series, tmp_path, capsys):
    of_series.save(m := tmp_path / "m.safetensors")
    frame = frame_of()
    cells = np.column_stack([frame.data["a"], frame.data["b"]])
    lines = [
        f"2024-01-01 {k:02d}:00,{a:.4f},{'' if np.isnan(b) else format(b, '.4f')}" for k, (a, b) in enumerate(cells)
    ]
    path = tmp_path / "x.csv"
    path.write_text("when,a,b\n" + "\n".join(lines) + "\n")
    out, common = tmp_path / "o.csv", ["--draws", "4", "--quiet", "--backend", "cpu", "--overwrite"]
    levels = ["--quantiles", "0.1,0.5,0.9"]
    picture = ["--plot", str(tmp_path / "o.png")]
    assert main(["impute", str(m), str(path), "-o", str(out), *common, *levels, *picture]) == 0
    table = out.read_text().splitlines()
    assert (table[0], len(table)) == ("when,a 0.1,a 0.5,a 0.9,b 0.1,b 0.5,b 0.9", 21)
    assert "4 of 40 values filled in" in capsys.readouterr().out
    assert main(["score", str(m), str(path), "-o", str(out), "--quiet", "--overwrite"]) == 2
    assert "values are missing in 2 of 5 rows: fastdiff impute" in capsys.readouterr().err
    assert main(["forecast", str(m), str(path), "-o", str(out), "--horizon", "6", *common, *picture]) == 0
    table = out.read_text().splitlines()
    assert (table[0], len(table)) == ("draw,when,a,b", 25)
    assert table[1].startswith("0,2024-01-01 20:00,")
    assert main(["forecast", str(m), str(path), "-o", str(tmp_path / "o.npy"), "--horizon", "6", *common]) == 0
    assert np.load(tmp_path / "o.npy").shape == (4, 6, 2)
    assert main(["forecast", str(m), str(path), "-o", str(out), "--horizon", "0", *common]) == 2


def test_a_recording_goes_on_in_its_own_habits(of_series, tmp_path, capsys):
    """Semicolons, decimal commas, and days before months, as the file has them."""
    of_series.save(m := tmp_path / "m.safetensors")
    frame = frame_of()

    def text(number):
        return "" if np.isnan(number) else f"{number:.4f}".replace(".", ",")

    def written(sign):
        pairs = enumerate(zip(frame.data["a"], frame.data["b"], strict=True))
        return [f"31{sign}01{sign}2024 {k:02d}:00;{text(a)};{text(b)}" for k, (a, b) in pairs]

    def answered(command, *more):
        common = ["--decimal", ",", "--draws", "1", "--quiet", "--backend", "cpu", "--overwrite", *more]
        assert main([command, str(m), str(path), "-o", str(out), *common]) == 0
        return out.read_text().splitlines(), capsys.readouterr().err

    path, out = tmp_path / "x.csv", tmp_path / "o.csv"
    path.write_text("\n".join(["Zeit;a;b", *written(".")]) + "\n")
    filled, _ = answered("impute")
    assert filled[0] == "Zeit;a;b"
    assert [line.split(";")[0] for line in filled[1:]] == [line.split(";")[0] for line in written(".")]
    assert float(filled[1].split(";")[1].replace(",", ".")) == float(f"{frame.data['a'][0]:.4f}")
    later, _ = answered("forecast", "--horizon", "6")
    assert [line.split(";")[0] for line in later[1:]] == [f"31.01.2024 {k}:00" for k in (20, 21, 22, 23)] + [
        f"01.02.2024 0{k}:00" for k in (0, 1)
    ]
    path.write_text("\n".join(["Zeit;a;b", *written("/")]) + "\n")
    later, said = answered("forecast", "--horizon", "6", "--index", "Zeit")
    assert later[0] == "a;b"
    assert "has no times: those of the recording, like '31/01/2024 19:00', are not read" in said


def test_a_huge_value_is_found_where_it_stands(model, of_series):
    """It is refused by its place, and not by samples that are not finite."""
    frame = frame_of(gaps=False)
    frame.data["b"][7] = 1e300
    for ask in (lambda: of_series.impute(frame, 2), lambda: of_series.forecast(frame, 3, 2)):
        with pytest.raises(ArgumentError, match=r"(X|past): got 1e\+300 in column 'b', row 7, wants values of at most"):
            ask()
    rows = ar(2, seed=1)
    rows[1, 3] = -1e300
    with pytest.raises(ArgumentError, match=r"X: got -1e\+300 at index \(1, 3\)"):
        model.impute(rows, 2)
    with pytest.raises(ArgumentError, match=r"given: got -1e\+300 at index \(3,\)"):
        model.sample(2, given=fd.Known(rows[1]))
    with pytest.raises(ArgumentError, match=r"given\[1\]: got 1e\+300 at index \(0,\)"):
        model.sample(2, given=[fd.Known(rows[0]), fd.Linear(np.eye(8)[:1], [1e300], 0.1)])
    with pytest.raises(ArgumentError, match=r"X: got -1e\+300 at index \(1, 3\), wants at most 1e\+37"):
        model.score_samples(rows)
