"""The page of generated rows beside real ones: its numbers are their formulas, and what is drawn is what was given."""

from itertools import pairwise

import numpy as np
import pytest
from tolerances import assert_close

import fastdiff as fd
from fastdiff import plots
from fastdiff.cli import main
from fastdiff.data import harmonic_curves
from fastdiff.errors import ArgumentError
from fastdiff.plots import evaluation_page
from fastdiff.plots.evaluation_page import autocorrelation, correlations, nearest, spectrum

matplotlib = pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
MADE, REAL, TRAIN = (harmonic_curves(n, points=20, first_sample=start) for n, start in ((40, 0), (30, 40), (50, 70)))
TABLE = RNG.standard_normal((40, 5)) * [1, 100, 0.1, 30, 0] + [0, 1000, 0, -5, 3]
TABLE[:, 3] += 0.3 * TABLE[:, 1]  # the two that go together most
MEASURES = {"energy distance": "0.05", "judgement": "word " * 60, "what has a long name, longer than any other": "1"}
BLUE, GREY, RED = plots.BLUE, plots.GREY, plots.RED
(OVER, UNDER, BANDS, MEAN, DEVIATION, LEFT, RIGHT, VALUES, DISTANCES, *NEAR) = range(12)  # axes without measures

PAGES = {
    "curves": lambda **more: plots.evaluation(REAL, MADE, TRAIN, rate=50, **more),
    "curves without training rows": lambda **more: plots.evaluation(REAL, MADE, **more),
    "a table": lambda **more: plots.evaluation(
        TABLE[20:], TABLE[:20], TABLE, columns=["a long name " * 3, *"bcde"], **more
    ),
    "a table of long names": lambda **more: plots.evaluation(
        *RNG.normal(size=(2, 9, 30)),
        ordered=False,
        columns=[f"a name of many letters {k:3}" for k in range(30)],
        **more,
    ),
    "a table of many columns": lambda **more: plots.evaluation(*RNG.normal(size=(2, 9, 60)), ordered=False, **more),
    "two columns": lambda **more: plots.evaluation(TABLE[20:, :2], TABLE[:20, :2], **more),
    "one column": lambda **more: plots.evaluation(TABLE[20:, :1], TABLE[:20, :1], **more),
    "constant columns": lambda **more: plots.evaluation(np.ones((9, 3)), np.eye(9, 3), **more),
    "constant curves": lambda **more: plots.evaluation(np.zeros((5, 20)), np.ones((5, 20)), **more),
    "one row each": lambda **more: plots.evaluation(REAL[:1], MADE[:1], **more),
    "samples far away": lambda **more: plots.evaluation(REAL, 1e6 * MADE, TRAIN, **more),
}


def names_of(color, artists):
    return [artist for artist in artists if matplotlib.colors.to_hex(artist.get_color()) == color]


# --------------------------------------------------------------------------------------- numbers


def test_autocorrelation_is_its_formula():
    want = np.zeros(11)
    for curve in REAL.astype(float):
        centred = [value - sum(curve) / 20 for value in curve]
        products = [sum(centred[i] * centred[i + k] for i in range(20 - k)) for k in range(11)]
        want += [product / products[0] / len(REAL) for product in products]
    assert_close(autocorrelation(REAL.astype(float)), want, terms=1000, scale=1.0)
    with_constant = np.concatenate([REAL, np.full((9, 20), 1e3 / 3)]).astype(float)
    assert_close(autocorrelation(with_constant), want, terms=1000, scale=1.0)
    assert np.isnan(autocorrelation(np.full((2, 6), 0.1))).all()


@pytest.mark.parametrize("d", [20, 19])
def test_spectrum_is_its_formula(d):
    X = REAL[:, :d].astype(float)
    i = np.arange(d)
    want = [
        np.mean([abs(sum((x - x.mean()) * np.exp(-2j * np.pi * i * j / d))) ** 2 / d for x in X])
        for j in range(1, d // 2 + 1)
    ]
    assert_close(spectrum(X), np.array(want), terms=1000, scale=float(np.max(want)))


def test_nearest_is_a_search():
    from scipy.spatial.distance import cdist

    X, rows = RNG.normal(size=(130, 7)) + 50, RNG.normal(size=(90, 7)) + 50
    apart = cdist(X, rows) / np.sqrt(7)
    distance, index = nearest(X, rows)
    np.testing.assert_array_equal(index, apart.argmin(axis=1))
    np.testing.assert_allclose(distance, apart.min(axis=1), rtol=1e-9)
    copies, index = nearest(rows[30:], rows)
    np.testing.assert_array_equal(copies, 0)
    np.testing.assert_array_equal(index, np.arange(30, 90))
    among = cdist(X, X) / np.sqrt(7) + np.diag(np.full(130, np.inf))
    np.testing.assert_allclose(nearest(X[:100], X, others=True)[0], among[:100].min(axis=1), rtol=1e-9)


def test_correlations_are_those_of_pairs_that_vary():
    want = np.corrcoef(TABLE[:, :4].T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlations(TABLE[:, :4]), want, rtol=1e-9)
    assert np.isnan(correlations(TABLE)).sum() == 4


# --------------------------------------------------------------------------------------- the page


@pytest.mark.slow
@pytest.mark.parametrize(("name", "measures"), [*((name, MEASURES) for name in PAGES), ("curves", None)])
def test_every_page_is_drawn_without_overlaps(tmp_path, name, measures):
    figure = PAGES[name](measures=measures, names=("100,000 held-out rows", "256 generated: dpmpp_2m, 100 steps"))
    plots.save(figure, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    renderer = figure.canvas.get_renderer()
    axes = [each for each in figure.axes if each.axison]
    assert len(axes) == 12
    boxes = [each.get_tightbbox(renderer) for each in axes]  # with titles and labels
    (legend,) = figure.legends
    words = [text.get_window_extent(renderer) for each in figure.axes if not each.axison for text in each.texts]
    boxes += [legend.get_window_extent(renderer), figure._suptitle.get_window_extent(renderer), *words]
    for k, box in enumerate(boxes):
        assert figure.bbox.padded(2).contains(box.x0, box.y0)
        assert figure.bbox.padded(2).contains(box.x1, box.y1)
        # The bars of neighbours may touch; nothing lies over anything else.
        assert not any(box.shrunk(0.99, 0.9).overlaps(other.shrunk(0.99, 0.9)) for other in boxes[:k]), k
    for each in axes:
        assert each.get_title(loc="left")
        assert each.get_xlabel()
    assert all(axes[k].get_ylabel() for k in (OVER, BANDS, MEAN, LEFT, RIGHT, VALUES, DISTANCES, NEAR[0]))
    assert min(each.bbox.height for each in axes) > 170  # pixels
    ticks = [label.get_window_extent(renderer) for label in axes[BANDS].get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(ticks))


def test_measured_lines_stand_in_the_head_of_the_page():
    figure = PAGES["curves"](measures=MEASURES, title="A heading", names=("theirs", "ours"))
    told = [text.get_text() for text in figure.axes[0].texts]
    assert told[:3] == ["energy distance", "0.05", "judgement"]
    assert told[4] == ""  # the name of a second line
    assert " ".join(told[3::2]).split() == [*["word"] * 60, "1"]
    assert figure._suptitle.get_text() == "A heading"
    assert [text.get_text() for text in figure.legends[0].texts] == ["theirs", "ours", "nearest training row"]
    assert len(PAGES["curves"]().axes) == 12


def test_the_panels_of_curves_draw_what_they_say():
    axes = PAGES["curves"]().axes
    for panel, rows, color in ((OVER, REAL, GREY), (UNDER, MADE, BLUE)):
        lines = names_of(color, axes[panel].lines)
        assert len(lines) == len(axes[panel].lines) == 12
        np.testing.assert_array_equal(
            [line.get_ydata() for line in lines], rows[np.linspace(0, len(rows) - 1, 12).astype(int)]
        )
        np.testing.assert_allclose(lines[0].get_xdata(), np.arange(20) / 50)
    assert axes[OVER].get_ylim() == axes[UNDER].get_ylim()
    for rows, color in ((REAL, GREY), (MADE, BLUE)):
        X = rows.astype(float)
        wanted = {
            BANDS: np.percentile(X, 50, axis=0),
            MEAN: X.mean(axis=0),
            DEVIATION: X.std(axis=0),
            LEFT: autocorrelation(X),
            RIGHT: spectrum(X),
        }
        for panel, values in wanted.items():
            (line,) = names_of(color, axes[panel].lines)
            np.testing.assert_allclose(line.get_ydata(), values)
    low, high = (box.vertices[:, 1] for box in [axes[BANDS].collections[0].get_paths()[0]] for _ in range(2))
    assert low.min() == pytest.approx(np.percentile(REAL, 5, axis=0).min())
    assert high.max() == pytest.approx(np.percentile(REAL, 95, axis=0).max())
    assert axes[RIGHT].get_yscale() == "log"
    assert axes[RIGHT].lines[0].get_xdata()[-1] == pytest.approx(25)  # Hz: half of the rate
    assert axes[LEFT].lines[0].get_xdata()[1] == pytest.approx(1 / 50)


def test_nearest_rows_are_those_of_the_training_data():
    made = np.concatenate([TRAIN[7:8] + 0.01, MADE, 9 + TRAIN[3:4]])
    axes = plots.evaluation(REAL, made, TRAIN).axes
    of_made, index = nearest(made.astype(float), TRAIN.astype(float))
    order = np.argsort(of_made, kind="stable")
    for panel, k in zip(NEAR, (order[0], order[len(order) // 2], order[-1]), strict=True):
        (theirs,), (ours,) = names_of(RED, axes[panel].lines), names_of(BLUE, axes[panel].lines)
        np.testing.assert_allclose(ours.get_ydata(), made[k])
        np.testing.assert_allclose(theirs.get_ydata(), TRAIN[index[k]])
    assert axes[NEAR[0]].get_title(loc="left") == "Nearest of all: 0.01 away"
    np.testing.assert_allclose(axes[NEAR[0]].lines[0].get_ydata(), TRAIN[7])
    of_real, _ = nearest(REAL.astype(float), TRAIN.astype(float))
    for values, color in ((of_real, GREY), (of_made, BLUE)):
        (median,) = names_of(color, axes[DISTANCES].lines)
        assert median.get_xdata()[0] == pytest.approx(np.median(values))


def test_without_training_rows_the_real_ones_are_searched():
    figure = PAGES["curves without training rows"]()
    among, _ = nearest(REAL.astype(float), REAL.astype(float), others=True)
    (median,) = names_of(GREY, figure.axes[DISTANCES].lines)
    assert median.get_xdata()[0] == pytest.approx(np.median(among))
    assert figure.axes[DISTANCES].get_title(loc="left").startswith("Distance to the nearest other real row")
    assert figure.legends[0].texts[2].get_text() == "nearest real row"
    same = plots.evaluation(TRAIN, MADE, TRAIN)  # a model that holds nothing out: no row is its own neighbour
    (median,) = names_of(GREY, same.axes[DISTANCES].lines)
    among, _ = nearest(TRAIN.astype(float), TRAIN.astype(float), others=True)
    assert median.get_xdata()[0] == pytest.approx(np.median(among))
    assert not names_of(GREY, PAGES["one row each"]().axes[DISTANCES].lines)  # it has no other


def test_columns_of_a_table_are_drawn_as_standard_scores():
    real, made = TABLE[20:], TABLE[:20]
    axes = PAGES["a table"]().axes
    learned = TABLE.mean(axis=0), np.where(TABLE.std(axis=0) > 0, TABLE.std(axis=0), 1)
    for rows, color in ((made, BLUE), (real, GREY)):
        (line,) = names_of(color, axes[MEAN].lines)
        np.testing.assert_allclose(line.get_ydata(), (rows.mean(axis=0) - learned[0]) / learned[1], atol=1e-12)
    assert axes[MEAN].get_ylabel() == axes[VALUES].get_xlabel() == "standard score"
    (points,) = names_of(BLUE, axes[LEFT].lines)
    np.testing.assert_allclose(points.get_xdata(), correlations(real), rtol=1e-9)
    assert [line.get_color() for line in axes[RIGHT].lines] == [BLUE, GREY]  # the few lie over the many
    np.testing.assert_allclose(points.get_ydata(), correlations(made), rtol=1e-9)
    assert axes[RIGHT].get_xlabel() == "column b"
    assert axes[RIGHT].get_ylabel() == "column d"
    labels = [label.get_text() for label in axes[BANDS].get_xticklabels()]
    assert labels == ["a long name a long name…", *"bcde"]


@pytest.mark.parametrize(
    ("rows", "ordered", "value"),
    [
        (REAL, True, "value"),
        (np.cumsum(RNG.normal(size=(50, 400)), axis=1), True, "value"),  # deviations of 1 to 20, that creep
        (REAL[:, :7], False, "value"),
        (RNG.normal(size=(30, 8)) * [1, 6, 1, 6, 1, 6, 1, 6], False, "value"),
        (RNG.normal(size=(30, 8)) * [1, 90, 1, 90, 1, 90, 1, 90], False, "standard score"),
        (RNG.normal(size=(30, 12)) * [*[1] * 6, *[50] * 6], True, "value"),  # two channels
        (np.ones((30, 8)), True, "value"),
    ],
)
def test_what_is_a_curve_and_what_a_table(rows, ordered, value):
    page = evaluation_page.page_of(rows, rows, None, ordered=None, rate=None, columns=None)
    assert (page.ordered, page.value) == (ordered, value)
    for wanted in (True, False):
        assert evaluation_page.page_of(rows, rows, None, ordered=wanted, rate=None, columns=None).ordered is wanted


def test_a_large_training_set_is_thinned(monkeypatch):
    monkeypatch.setattr(evaluation_page, "MOST_TRAINING", 10)
    axes = plots.evaluation(REAL, MADE, TRAIN).axes
    of_made, _ = nearest(MADE.astype(float), TRAIN[::5].astype(float))
    (median,) = names_of(BLUE, axes[DISTANCES].lines)
    assert median.get_xdata()[0] == pytest.approx(np.median(of_made))
    assert "10 of the 50" in axes[DISTANCES].get_title(loc="left")


@pytest.mark.parametrize(
    ("arguments", "more", "named"),
    [
        ((REAL, MADE[0]), {}, "generated"),
        ((REAL[:, :9], MADE), {}, "generated"),
        ((REAL, MADE, TRAIN[:, :9]), {}, "training"),
        ((REAL, MADE[:0]), {}, "generated"),
        ((REAL[:0], MADE), {}, "real"),
        ((REAL, MADE, TRAIN[:0]), {}, "training"),
        ((REAL, MADE * np.nan), {}, "generated"),
        ((REAL, MADE), {"count": 0}, "count"),
        ((REAL, MADE), {"rate": -1}, "rate"),
        ((REAL, MADE), {"columns": ["a"]}, "columns"),
    ],
)
def test_the_page_refuses(arguments, more, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        plots.evaluation(*arguments, **more)


def test_the_command_names_the_sampler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fd.Diffusion(backend="numpy").fit(TRAIN, steps=2, batch=8, progress=False).save("m.safetensors")
    fd.data.save_curves("curves.csv", REAL)
    shown, draw = {}, plots.evaluation

    def seen(*arguments, **options):
        shown.update(options["measures"])
        return draw(*arguments, **options)

    monkeypatch.setattr(plots, "evaluation", seen)
    command = "evaluate m.safetensors curves.csv -o page.png -n 8 --backend numpy --quiet"
    assert main(command.split()) == 0
    assert shown["sampler"] == "dpmpp_2m, 50 steps"
    assert (tmp_path / "page.png").exists()
