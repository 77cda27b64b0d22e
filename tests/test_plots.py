"""Figures: what is drawn is what was given; nothing global is touched; every figure is written as a PNG."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastdiff import plots
from fastdiff.data import harmonic_curves
from fastdiff.errors import ArgumentError, BackendError, DataError

matplotlib = pytest.importorskip("matplotlib")

T, POINTS = 20, 50
CURVE = harmonic_curves(1)[0]
RNG = np.random.default_rng(0)
CHAIN = np.stack([(1 - k / T) * CURVE + k / T * RNG.standard_normal(POINTS) for k in range(T + 1)])
PATH = CHAIN[::-1]
SIGNAL = np.linspace(1, 0.1, T)
SCHEDULE = SimpleNamespace(signal=SIGNAL, noise=np.sqrt(1 - SIGNAL**2))
HISTORY = {
    "step": list(range(1, 301)),
    "loss": (np.exp(-np.arange(300) / 60) + 0.1).tolist(),
    "validation_step": [100, 200, 300],
    "validation_loss": [0.4, 0.2, 0.15],
}

FIGURES = {
    "schedule_factors": lambda: plots.schedule_factors(SCHEDULE),
    "schedule of one step": lambda: plots.schedule_factors(SimpleNamespace(signal=[0.9], noise=[0.4])),
    "forward_diffusion": lambda: plots.forward_diffusion(CHAIN, rate=50),
    "forward_diffusion, 5 panels": lambda: plots.forward_diffusion(CHAIN, [0, 1, 2, 3, 20]),
    "forward_diffusion, 1 panel": lambda: plots.forward_diffusion(CHAIN, [7]),
    "loss": lambda: plots.loss(HISTORY),
    "loss without validation": lambda: plots.loss({"step": [1, 2], "loss": [1.0, 0.5]}),
    "loss of one step": lambda: plots.loss({"step": [1], "loss": [1.0]}),
    "loss with a zero": lambda: plots.loss({"step": [1, 2], "loss": [1.0, 0.0]}),
    "loss over decades": lambda: plots.loss({"step": [1, 2], "loss": [1e3, 1e-3]}),
    "reverse_chain": lambda: plots.reverse_chain(PATH, CURVE, rate=50),
    "reverse_chain without target": lambda: plots.reverse_chain(PATH),
    "reverse_chain of one step": lambda: plots.reverse_chain(PATH[-2:]),
    "reverse_lines": lambda: plots.reverse_lines(PATH, np.arange(T)[::-1]),
    "reverse_lines without timesteps": lambda: plots.reverse_lines(PATH),
    "generated": lambda: plots.generated(CHAIN, PATH, rate=50),
    "generated, more real ones": lambda: plots.generated(CHAIN[:2], PATH),
    "generated alone": lambda: plots.generated(CHAIN[:5]),
    "generated, flat": lambda: plots.generated(np.zeros((1, 1))),
    "around_target": lambda: plots.around_target(CHAIN, CURVE),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_written(tmp_path, name):
    path = tmp_path / "figure.png"
    plots.save(FIGURES[name](), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 5000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", FIGURES)
def test_every_axes_is_labelled_and_no_legend_covers_data(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()

    def words(part):
        texts = [getattr(part, kind, None) for kind in ("_suptitle", "_supxlabel", "_supylabel")]
        return [text.get_text() for text in texts if text is not None]

    parts = [figure, *figure.subfigs]
    heading = [text for part in parts for text in words(part)]
    axes = [a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"]
    heading += [a.get_title(loc="left") for a in axes]
    assert any(heading), "no title"
    assert any(a.get_xlabel() for a in axes) or any(part._supxlabel for part in parts)
    assert any(a.get_ylabel() for a in axes) or any(part._supylabel for part in parts)
    legends = [a.get_legend() for a in axes if a.get_legend()] + list(figure.legends)
    for legend in legends:
        box = legend.get_window_extent(renderer).shrunk(0.98, 0.98)
        assert not any(box.overlaps(a.get_window_extent(renderer)) for a in axes)
        titles = [a._left_title.get_window_extent(renderer) for a in axes if a._left_title.get_text()]
        titles += [part._suptitle.get_window_extent(renderer) for part in parts if part._suptitle]
        assert not any(box.overlaps(title) for title in titles)
        assert figure.bbox.padded(1).contains(box.x0, box.y0)
        assert figure.bbox.padded(1).contains(box.x1, box.y1)


def test_schedule_factors_draws_both():
    lines = plots.schedule_factors(SCHEDULE).axes[0].lines
    np.testing.assert_array_equal(lines[0].get_ydata(), SCHEDULE.signal)
    np.testing.assert_array_equal(lines[1].get_ydata(), SCHEDULE.noise)
    np.testing.assert_array_equal(lines[0].get_xdata(), np.arange(T))


def test_forward_diffusion_draws_the_rows_it_names():
    axes = plots.forward_diffusion(CHAIN, [0, 3, 20], rate=50).axes
    assert [a.get_title(loc="left") for a in axes] == ["the curve", "after 3 steps", "after 20 steps"]
    np.testing.assert_array_equal(axes[1].lines[1].get_ydata(), CHAIN[3])
    np.testing.assert_allclose(axes[1].lines[1].get_xdata(), np.arange(POINTS) / 50)
    assert all(np.array_equal(a.lines[0].get_ydata(), CURVE) for a in axes)


def test_loss_smooths_by_a_centred_mean():
    axes = plots.loss(HISTORY).axes[0]
    raw, smooth, held = (line.get_ydata() for line in axes.lines)
    np.testing.assert_array_equal(raw, HISTORY["loss"])
    np.testing.assert_allclose(smooth[100], np.mean(raw[97:104]))  # 300 steps: 3 on either side
    np.testing.assert_allclose([smooth[0], smooth[-1]], [np.mean(raw[:4]), np.mean(raw[-4:])])
    np.testing.assert_array_equal(held, HISTORY["validation_loss"])
    assert axes.get_yscale() == "log"
    assert plots.loss({"step": [1, 2], "loss": [1.0, 0.0]}).axes[0].get_yscale() == "linear"


def test_reverse_chain_goes_from_light_to_dark_with_the_target_in_red():
    axes = plots.reverse_chain(PATH, CURVE).axes[0]
    (lines,) = axes.collections
    lines.update_scalarmappable()
    brightness = lines.get_edgecolor()[:, :3].mean(axis=1)
    assert (np.diff(brightness) < 0).all()
    assert len(lines.get_segments()) == T
    np.testing.assert_allclose(lines.get_segments()[0][:, 1], PATH[0])
    target, result = axes.lines
    assert matplotlib.colors.to_hex(target.get_color()) == plots.RED
    np.testing.assert_array_equal(target.get_ydata(), CURVE)
    np.testing.assert_array_equal(result.get_ydata(), PATH[-1])
    assert np.mean(matplotlib.colors.to_rgb(result.get_color())) < brightness.min()
    assert result.get_zorder() > target.get_zorder() > lines.get_zorder()
    assert result.get_linewidth() < target.get_linewidth()


def test_reverse_lines_draws_one_line_a_dimension():
    axes = plots.reverse_lines(PATH, np.arange(T)[::-1]).axes[0]
    segments = axes.collections[0].get_segments()
    assert len(segments) == POINTS
    np.testing.assert_allclose(segments[7][:, 1], PATH[:, 7])
    np.testing.assert_array_equal(segments[7][:, 0], np.arange(T, -1, -1))
    left, right = axes.get_xlim()
    assert left > right  # noise on the left in either case
    left, right = plots.reverse_lines(PATH).axes[0].get_xlim()
    assert left < right


def test_generated_draws_both_on_one_scale():
    figure = plots.generated(CHAIN[:4], 2 * PATH[:3], count=6)
    drawn = [a.lines[0].get_ydata() for a in figure.axes if a.get_visible()]
    np.testing.assert_array_equal(drawn, [*CHAIN[:4], *(2 * PATH[:3])])
    limits = {a.get_ylim() for a in figure.axes if a.get_visible()}
    ((low, high),) = limits
    assert low < np.min(drawn)
    assert high > np.max(drawn)


def test_around_target_counts_all_curves_in_the_error():
    curves = CURVE + np.repeat([[0.0], [2.0]], 2, axis=0)
    figure = plots.around_target(curves, CURVE, count=1)
    assert "error 1.41 " in figure.axes[1].get_title(loc="left")
    assert len(figure.axes[0].collections[0].get_segments()) == 1


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: plots.forward_diffusion(CURVE), "chain"),
        (lambda: plots.forward_diffusion(CHAIN, [T + 1]), "timesteps"),
        (lambda: plots.forward_diffusion(CHAIN, []), "timesteps"),
        (lambda: plots.forward_diffusion(CHAIN, rate=0), "rate"),
        (lambda: plots.loss({}), "history"),
        (lambda: plots.loss({"step": [1, 2], "loss": [1.0]}), r"history\['loss'\]"),
        (lambda: plots.reverse_chain(PATH[:1]), "path"),
        (lambda: plots.reverse_chain(PATH, CURVE[:-1]), "target"),
        (lambda: plots.reverse_lines(PATH[:1]), "path"),
        (lambda: plots.reverse_lines(PATH, np.arange(3)), "timesteps"),
        (lambda: plots.generated(CHAIN[:0]), "curves"),
        (lambda: plots.generated(CHAIN, PATH[:0]), "reference"),
        (lambda: plots.generated(CHAIN, PATH[:, :9]), "reference"),
        (lambda: plots.generated(CHAIN, count=0), "count"),
        (lambda: plots.generated(np.full((2, 3), np.nan)), "curves"),
        (lambda: plots.around_target(CHAIN, PATH), "target"),
        (lambda: plots.around_target(CHAIN[:0], CURVE), "curves"),
    ],
)
def test_figures_refuse(draw, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        draw()


def test_save_refuses(tmp_path):
    figure = plots.schedule_factors(SCHEDULE)
    for name in ("figure", "figure.xyz"):
        with pytest.raises(ArgumentError, match=r"^path: .*\.png"):
            plots.save(figure, tmp_path / name)
    with pytest.raises(DataError, match="there is no folder"):
        plots.save(figure, tmp_path / "none" / "figure.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r'pip install "fastdiff-engine\[plot\]"'):
        plots.schedule_factors(SCHEDULE)


def test_no_global_state_is_touched():
    before = dict(matplotlib.rcParams)
    FIGURES["generated"]()
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys; from fastdiff import plots; assert 'matplotlib' not in sys.modules; "
        "plots.loss({'step': [1], 'loss': [1.0]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
