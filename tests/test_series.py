"""Series of several channels: networks, normalisers, files, recordings cut into windows, and frames."""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import series
from fastdiff.cli import main
from fastdiff.errors import ArgumentError, CheckpointError, DataError
from fastdiff.normaliser import Normaliser

POINTS, SCALES, OFFSETS = 6, np.array([1.0, 100.0]), np.array([0.0, 1e4])


def waves(n=40, *, points=POINTS, seed=0):
    """Series of two channels of other units: the second is the first, a quarter turn on."""
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi, (n, 1))
    angle = phase + np.arange(points) / 2
    return np.stack([np.sin(angle), np.cos(angle)], axis=2) * SCALES + OFFSETS


@pytest.fixture(scope="module")
def model():
    return fd.Diffusion(backend="cpu").fit(waves(), steps=5, progress=False)


# ------------------------------------------------------------------------------------------- networks and models


def test_a_perceptron_of_series_is_one_of_their_values():
    """Same weights, same bits: in the output and both products, and a row is points, then channels."""
    of_series, of_curves = fd.MLP((3, 2), hidden=(5,), T=4), fd.MLP(6, hidden=(5,), T=4)
    of_series.flat[...] = of_curves.flat[...] = np.random.default_rng(0).normal(size=of_curves.flat.size)
    x, t = np.random.default_rng(1).normal(size=(4, 3, 2)).astype(np.float32), [0, 1, 3, 2]
    flat = x.reshape(4, 6)
    for name in ("predict", "vjp", "jvp"):
        given = () if name == "predict" else (np.stack([x, 2 * x]),)
        got = getattr(of_series, name)(x, t, *given, backend="numpy")
        want = getattr(of_curves, name)(flat, t, *(v.reshape(2, 4, 6) for v in given), backend="numpy")
        assert got.shape[-2:] == (3, 2)
        np.testing.assert_array_equal(got.reshape(want.shape), want)
    again = fd.MLP.from_dict(of_series.to_dict())
    assert (again.shape, again.points, repr(again)) == ((3, 2), 6, "MLP((3, 2), hidden=(5,), T=4)")


@pytest.mark.parametrize("points", [(3, 2, 1), (0, 2), (3, -1), (1 << 10, 1 << 10), ()])
def test_bad_shapes_of_a_perceptron(points):
    with pytest.raises(ArgumentError, match="points"):
        fd.MLP(points)


def test_every_channel_has_its_own_scale(model, caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    made = Normaliser.of_series(X := waves(200))
    assert "each of 2 channels its own" in caplog.text
    assert made.scale == model.normaliser.scale == "channel"
    inner = made.apply(X, np.float64)
    np.testing.assert_allclose(inner.mean(axis=(0, 1)), 0, atol=1e-9)
    np.testing.assert_allclose(inner.std(axis=(0, 1)), 1, rtol=1e-9)
    np.testing.assert_allclose(made.std, X.std(axis=(0, 1)))
    one = Normaliser.of_series(X, "all")
    assert (one.scale, np.ndim(one.std)) == ("all", 0)


def test_the_determinant_of_the_scales():
    """The log density of data is that inside less the logs of the scales, once for each point."""
    made = Normaliser.of_series(waves(100))
    assert made.log_det((POINTS, 2)) == pytest.approx(-POINTS * np.log(made.std).sum())
    # A Gaussian model that has learned nothing else: its density is known.
    X = np.random.default_rng(0).normal(size=(2000, 2, 2)) * SCALES
    found = fd.Diffusion(backend="cpu").fit(X, steps=0, progress=False).score_samples(X[:200]).mean()
    exact = -2 * (np.log(2 * np.pi) + 1 + np.log(SCALES.prod()))
    assert found == pytest.approx(exact, abs=0.2)


def test_offsets_leave_in_float64():
    far = waves() + np.array([0.0, 1e7])
    near = Normaliser.of_series(waves()).apply(waves(), np.float32)
    np.testing.assert_allclose(Normaliser.of_series(far).apply(far, np.float32), near, atol=2e-5)


def test_samples_answers_and_files(model, tmp_path):
    drawn = model.sample(3)
    assert (drawn.shape, drawn.dtype) == ((3, POINTS, 2), np.float32)
    np.testing.assert_allclose(drawn.mean(axis=(0, 1)), OFFSETS, atol=3 * SCALES.max())
    holes = waves(2, seed=1)
    holes[:, 1:3, 1], holes[0, :, 0] = np.nan, np.nan
    filled = model.impute(holes, 2)
    assert filled.shape == (2, 2, POINTS, 2)
    np.testing.assert_array_equal(filled[1][~np.isnan(holes)], holes[~np.isnan(holes)])
    model.channel_names = ["level", "temperature"]
    model.save(tmp_path / "m.safetensors")
    again = fd.load(tmp_path / "m.safetensors", backend="cpu")
    assert again.channel_names == ["level", "temperature"]
    assert again.normaliser == model.normaliser
    np.testing.assert_array_equal(again.sample(3), drawn)
    np.testing.assert_array_equal(again.fit(waves(), steps=2, progress=False).sample(2), _resumed(model))
    model.channel_names = ["one"]
    with pytest.raises(CheckpointError, match="channel_names"):
        model.save(tmp_path / "n.safetensors")
    model.channel_names = None


def _resumed(model):
    import copy

    return copy.deepcopy(model).fit(waves(), steps=2, progress=False).sample(2)


def test_backends_agree_on_series(model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    on_numpy = fd.load(tmp_path / "m.safetensors", backend="numpy").sample(3)
    np.testing.assert_allclose(on_numpy / SCALES, model.sample(3) / SCALES, rtol=1e-4, atol=1e-3)


def test_a_judgement_of_series():
    model = fd.Diffusion(backend="cpu").fit(waves(), steps=0, judge=True, progress=False)
    assert model.report_["samples"] == 256
    assert model.evaluate(waves(8, seed=3), samples=16).drawn.shape == (16, POINTS, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fd.Diffusion().fit(waves() * [1, 0], progress=False), "channel 2 that is 0 everywhere"),
        (lambda: fd.Diffusion(scale="column").fit(waves(), progress=False), "series have channels"),
        (lambda: fd.Diffusion(scale="channel").fit(waves()[..., 0], progress=False), "curves have one channel"),
        (lambda: fd.Diffusion(fd.MLP(6)).fit(waves(), progress=False), "makes curves of series"),
        (lambda: fd.Diffusion(fd.MLP((6, 3))).fit(waves(), progress=False), r"\(any, 6, 3\)"),
        (lambda: fd.Diffusion().fit(waves(), flip=True, progress=False), "False for series"),
    ],
)
def test_what_no_model_of_series_takes(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


# ------------------------------------------------------------------------------------------- windows


def test_windows(caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    x = np.arange(14.0).reshape(7, 2)
    got = fd.data.windows(x, 3, 2)
    np.testing.assert_array_equal(got, [x[0:3], x[2:5], x[4:7]])
    np.testing.assert_array_equal(fd.data.windows(x[:, 0], 3), [x[0:3, 0], x[3:6, 0]])
    assert "the last 1 of 7 rows are in no window" in caplog.text
    np.testing.assert_array_equal(fd.data.windows([x[:3], x[3:]], 3), [x[0:3], x[3:6]])


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 1)), "at least 3"), (np.zeros((5, 1, 1)), "a recording"), (np.full(5, np.inf), "at index"),
        ([np.zeros((5, 1)), np.zeros((5, 2))], "as many channels"),
    ],
)  # fmt: skip
def test_what_has_no_windows(x, words):
    with pytest.raises(ArgumentError, match=words):
        fd.data.windows(x, 3)


# ------------------------------------------------------------------------------------------- frames


class Table:
    """What of pandas we count on, so that it need not be here."""

    def __init__(self, data, index=None):
        self.data = {name: np.asarray(column) for name, column in data.items()}
        self.columns = list(self.data)
        size = len(next(iter(self.data.values())))
        self.index = RangeIndex(size) if index is None else index if isinstance(index, Index) else Index(index)

    def __getitem__(self, name):
        return SimpleNamespace(to_numpy=lambda: self.data[name], values=self.data[name], dtype=self.data[name].dtype)

    def __setitem__(self, name, column):
        self.data[name] = column

    def copy(self, *, deep):
        assert deep
        return Table(self.data, self.index)

    @property
    def iloc(self):
        def part(at):
            return Table({name: column[at] for name, column in self.data.items()}, Index(self.index.values[at]))

        return type("iloc", (), {"__getitem__": lambda _, at: part(at)})()


class Index:
    name = None

    def __init__(self, values):
        self.values = np.asarray(getattr(values, "values", values))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, at):
        return Index(self.values[at]) if isinstance(at, slice) else self.values[at]


class RangeIndex(Index):
    def __init__(self, size):
        super().__init__(np.arange(size))


def recording_of(times=None, **extra):
    x = waves(1, points=30)[0]
    x[3:6, 1] = np.nan
    return Table({"level": x[:, 0], "temperature": x[:, 1]} | extra, times)


def test_a_frame_gives_windows_and_takes_samples():
    hours = np.datetime64("2024-02-28T12", "h") + np.arange(30)
    frame = recording_of(hours)
    cut = fd.data.windows(frame, 6, 3)
    assert (cut.shape, cut.names) == ((9, 6, 2), ["level", "temperature"])
    assert np.isnan(np.asarray(cut)).any()
    whole = fd.data.windows(recording_of(hours), 6)
    rows = np.nan_to_num(whole.values)
    model = fd.Diffusion(backend="cpu").fit(series.Windows(rows, whole.names, whole.frame), steps=1, progress=False)
    assert model.channel_names == ["level", "temperature"]
    made, plain = model.sample(2, as_frame=True), model.sample(2)
    assert made.columns == ["sample", "level", "temperature"]
    np.testing.assert_array_equal(made.data["level"], plain[..., 0].reshape(-1))
    np.testing.assert_array_equal(made.index.values[:6], hours[-1] + 1 + np.arange(6))
    np.testing.assert_array_equal(made.data["sample"], [0] * 6 + [1] * 6)
    with pytest.raises(ArgumentError, match="as_frame"):
        fd.Diffusion(backend="cpu").fit(waves(), steps=1, progress=False).sample(1, as_frame=True)


@pytest.mark.parametrize(("period", "starts"), [("day", range(12, 396, 24)), ("week", [84])])
def test_whole_days_and_weeks(period, starts, caplog):
    """From Thursday noon on: the first midnight is in row 12; with steps of 2 hours the first Monday in row 42."""
    caplog.set_level(logging.INFO, "fastdiff")
    hours = np.datetime64("2024-02-29T12", "h") + np.arange(404)
    frame = Table({"hour": np.arange(404.0)}, hours)
    cut = fd.data.windows(frame, period)
    np.testing.assert_array_equal(cut.values[:, 0, 0], starts)
    np.testing.assert_array_equal(cut.values[0, :, 0], starts[0] + np.arange(24 if period == "day" else 168))
    assert f"the first {starts[0]} of 404 rows are before the first whole {period}" in caplog.text
    assert "the last 8 of 404 rows" in caplog.text if period == "day" else "the last 152 of" in caplog.text
    overlapping = fd.data.windows(frame, period, 12)
    np.testing.assert_array_equal(overlapping.values[:2, 0, 0], [starts[0], starts[0] + 12])
    two = fd.data.windows(Table({"x": np.arange(202.0)}, hours[::2]), period)
    assert two.values[0, 0, 0] == starts[0] / 2
    np.testing.assert_array_equal(fd.data.windows([frame, frame], period).values[: len(cut.values)], cut.values)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.arange(90.0), "without a clock"),
        (recording_of(), "without a clock"),
        (recording_of(np.arange(30) * 0.1), "clock of 30 float64 values"),
        (recording_of(np.datetime64("2024-01-01T01", "h") + np.arange(20).repeat(2)[:30]), "times that rise"),
        (recording_of(np.datetime64("2024-01-01T01", "h") + 5 * np.arange(30)), "one that meets midnight"),
        (recording_of(np.datetime64("2024-01-01T00:30", "m") + 60 * np.arange(30)), "one that meets midnight"),
        (recording_of(np.datetime64("2024-01-01T01", "h") + np.arange(30)), "got 30 rows, wants at least 47"),
        (recording_of(np.datetime64("2024-01-01", "h") + np.arange(30) ** 2), "on_grid"),
        ([recording_of(np.datetime64("2024-01-01", "h") + k * np.arange(30)) for k in (1, 2)], "12 rows a day"),
    ],
)
def test_what_has_no_whole_days(frame, words):
    with pytest.raises(ArgumentError, match=words):
        fd.data.windows(frame, "day")
    with pytest.raises(ArgumentError, match="length"):
        fd.data.windows(frame, "month")


def test_a_frame_of_curves(caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    curves = waves(20)[..., 0]
    table = Table(
        {f"hour {k}": curves[:, k] for k in range(POINTS)}
        | {"day": np.arange("2024-01-01", "2024-01-21", dtype="M8[D]")}
    )
    model = fd.Diffusion(backend="cpu").fit(_with_index(table), steps=1, progress=False)
    assert model.net.shape == (POINTS,)
    assert "column 'day' is a clock" in caplog.text
    assert model.sample(3, as_frame=True).columns == [f"hour {k}" for k in range(POINTS)]


def _with_index(table):
    sys.modules[Table.__module__.split(".")[0]].Index = Index
    return table


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (recording_of(place=np.array(["x"] * 30, object)), "column 'place' with 'x' in row 0"),
        (recording_of(other=np.full(30, np.inf)), "column 'other' with an infinite value in row 0"),
        (recording_of(np.delete(np.arange(31), 4)), "steps from 1 to 2.*on_grid"),
        (recording_of(np.arange(30)[::-1]), "in row 1"),
        (recording_of(np.arange(2.0).repeat(15)), "times that rise"),
    ],
)
def test_frames_that_are_no_recordings(frame, words):
    with pytest.raises(ArgumentError, match=words):
        fd.data.windows(frame, 6)


def test_two_columns_of_one_name():
    table = recording_of()
    table.columns = ["level", "level"]
    with pytest.raises(ArgumentError, match="2 columns called 'level'"):
        fd.data.windows(table, 6)


def test_on_a_grid():
    times = np.array([0, 1, 2, 4, 5, 8]) * np.timedelta64(30, "m") + np.datetime64("2024-01-01T00:00")
    frame = Table({"a": np.arange(6.0)}, times)
    made = fd.data.on_grid(frame)
    np.testing.assert_array_equal(made.data["a"], [0, 1, 2, np.nan, 3, 4, np.nan, np.nan, 5])
    np.testing.assert_array_equal(
        fd.data.on_grid(frame, fill="linear").data["a"], [0, 1, 2, 2.5, 3, 4, 4 + 1 / 3, 4 + 2 / 3, 5]
    )
    with pytest.raises(ArgumentError, match="no grid"):
        fd.data.on_grid(Table({"a": np.arange(3.0)}, [0.0, 1.0, 2.5]))
    with pytest.raises(ArgumentError, match="without a clock"):
        fd.data.on_grid(Table({"a": np.arange(3.0)}))


# ------------------------------------------------------------------------------------------- files


def written(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    return path


def test_a_recording_of_a_csv_file(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    text = '\ufeff"date";"temp; C";rain\n"2020-01-01 00:00";1,5;\n2020-01-01 01:00;2,5;0\n2020-01-01 02:00;NA;0,25\n'
    table = series.load_recording(written(tmp_path, text), decimal=",")
    assert table.columns == ["date", "temp; C", "rain"]
    assert "the first column is a clock" in caplog.text
    np.testing.assert_array_equal(table["temp; C"], [1.5, 2.5, np.nan])
    np.testing.assert_array_equal(table["rain"], [np.nan, 0, 0.25])
    later = fd.data.windows(table, 2).frame.later(np.array([[1.0, np.nan]]))
    series.save_recording(tmp_path / "y.csv", later)
    assert (tmp_path / "y.csv").read_text() == "date,temp; C,rain\n2020-01-01 03:00,1,\n"
    by_name = series.load_recording(written(tmp_path, "when,a\nx,1\ny,2\n"), index="when")
    assert list(by_name["when"]) == ["x", "y"]
    assert fd.data.windows(by_name, 2).frame.later(np.ones((1, 1))).columns == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n1,x\n", "line 3, column 2: 'x'"), ("a,a\n1,2\n", "2 columns are called 'a'"),
        ("a,b\n1,2\n3\n", "line 3: 1 cells"), ("a,b\n", "no curves"), ("a,b\n1,inf\n", "line 2, column 2: inf is not"),
        ("a,b\n1,2\n1e300,3\n", "line 3, column 1: 1e\\+300 is too large"),
    ],
)  # fmt: skip
def test_files_that_are_no_recordings(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        series.load_recording(written(tmp_path, text))


def test_the_command_line_learns_series(tmp_path, capsys):
    rows = enumerate(waves(1, points=60)[0])
    lines = "\n".join(f"2020-01-{1 + k // 24:02d} {k % 24:02d}:00,{a:.5f},{b:.5f}" for k, (a, b) in rows)
    path, m = written(tmp_path, f"when,level,temp\n{lines}\n"), str(tmp_path / "m.safetensors")
    common = ["--steps", "2", "--quiet", "--backend", "cpu"]
    assert main(["train", str(path), "-o", m, "--window", "6", "--stride", "2", *common]) == 0
    assert "28 series of 6 points in 2 channels: level, temp" in capsys.readouterr().err
    out = tmp_path / "out.csv"
    assert main(["sample", m, "-n", "3", "-o", str(out), "--plot", str(tmp_path / "o.png"), "--quiet"]) == 0
    assert "3 series of 6 points in 2 channels: level, temp" in capsys.readouterr().out
    assert out.read_text().splitlines()[0] == "sample,step,level,temp"
    assert main(["info", m]) == 0
    assert "level, temp" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", waves(20))
    n = str(tmp_path / "n.safetensors")
    assert main(["train", str(tmp_path / "x.npy"), "-o", n, *common]) == 0
    assert main(["sample", n, "-n", "2", "-o", str(tmp_path / "y.npy"), "--quiet"]) == 0
    assert np.load(tmp_path / "y.npy").shape == (2, POINTS, 2)
    assert main(["train", str(path), "-o", m, "--overwrite", "--stride", "2"]) == 2
    assert "--window" in capsys.readouterr().err
