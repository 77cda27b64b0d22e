"""Figures: what is drawn is what was given; nothing global is touched; every figure is written as a PNG."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastdiff import covariance, plots
from fastdiff.data import harmonic_curves
from fastdiff.errors import ArgumentError, BackendError, DataError
from fastdiff.plots.pictures import GAP
from fastdiff.schedule import Schedule

matplotlib = pytest.importorskip("matplotlib")

T, POINTS = 20, 50
CURVE = harmonic_curves(1)[0]
RNG = np.random.default_rng(0)
CHAIN = np.stack([(1 - k / T) * CURVE + k / T * RNG.standard_normal(POINTS) for k in range(T + 1)])
PATH = CHAIN[::-1]
SIGNAL = np.linspace(1, 0.1, T)
LINEAR = Schedule.cosine(T)
SCHEDULE = SimpleNamespace(signal=SIGNAL, noise=np.sqrt(1 - SIGNAL**2))
SOURCE, TARGET = np.eye(POINTS), np.exp(-np.square(CURVE[:, None] - CURVE))
HOLES = np.where(np.arange(POINTS) % 6 == 0, CURVE, np.nan) + np.zeros((3, 1))
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
    "forward_diffusion of a schedule": lambda: plots.forward_diffusion(CHAIN, schedule=LINEAR),
    "forward_diffusion, 5 panels": lambda: plots.forward_diffusion(CHAIN, [0, 1, 2, 3, 20]),
    "forward_diffusion, 1 panel": lambda: plots.forward_diffusion(CHAIN, [7]),
    "loss": lambda: plots.loss(HISTORY),
    "loss without validation": lambda: plots.loss({"step": [1, 2], "loss": [1.0, 0.5]}),
    "loss of one step": lambda: plots.loss({"step": [1], "loss": [1.0]}),
    "loss with a zero": lambda: plots.loss({"step": [1, 2], "loss": [1.0, 0.0]}),
    "loss beside the linear": lambda: plots.loss(HISTORY, linear=0.2),
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
    "reverse_chain of a sampler": lambda: plots.reverse_chain(PATH, CURVE, sampler="dpmpp_2m, 100 steps"),
    "around_target of a sampler": lambda: plots.around_target(CHAIN, CURVE, sampler="dpmpp_2m, 100 steps"),
    "imputed": lambda: plots.imputed(HOLES, CHAIN[:, None] + np.zeros((3, 1))),
    "imputed, with all": lambda: plots.imputed(
        HOLES[:1], CHAIN[:, None], truth=CURVE[None], rate=50, names=("A name",)
    ),
    "imputed, one draw of one curve": lambda: plots.imputed(HOLES[:1], CHAIN[:1, None]),
    "covariances": lambda: plots.covariances({"Noise": SOURCE, "Signal": TARGET, "Both": SOURCE + TARGET}),
    "covariances, one": lambda: plots.covariances({"Signal": TARGET}),
    "spectra": lambda: plots.spectra(SOURCE, TARGET),
    "reshaped": lambda: plots.reshaped(CHAIN, PATH, CURVE, rate=50),
    "convergence": lambda: plots.convergence([5, 10, 20], {"ddpm": [2, 1, 0.5], "ddim": [1, np.nan, 0.2]}),
    "convergence to a plateau": lambda: plots.convergence([5, 10], {"ddpm": [2, 1]}, plateau=(0.8, "the start")),
    "series": lambda: plots.series(CHAIN[:3, :, None]),
    "series beside real ones": lambda: plots.series(CHAIN[..., None], PATH[..., None], names=["a"]),
    "tradeoff": lambda: plots.tradeoff(
        {
            "exact": {"a": ([5, 10], [1, 0.1]), "b": ([5, 9], [2, 1])},
            "drawn": {"a": ([5, 10], [0.1, -0.01]), "b": ([5], [-1])},
        },
        ylabels={"exact": "W2"},
        floors={"drawn": 0.02},
    ),
    "tradeoff, one": lambda: plots.tradeoff({"exact": {"a": ([5, 10], [1, 0.1])}}),
    "bound": lambda: plots.bound([-40, 8, 4, 2, 1, 0.1], [1, 0.5, 0.2, 0.1, 0.1, 0.01]),
    "bound of one row": lambda: plots.bound([-40, 8, -0.1, 0.1], [np.nan] * 4),
    "shares": lambda: plots.shares({"noise": (0.2, "6 GB/s"), "convolution": (1.3, "600 GF/s")}, "a CPU"),
    "scaling": lambda: plots.scaling(
        {"a chain": {"ours": ([1, 10], [1e-3, 2]), "theirs": ([1], [1e-2])}, "a step": {"ours": ([1, 2], [2, 1])}},
        ["curves", "threads"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_written(tmp_path, name):
    path = tmp_path / "figure.png"
    plots.save(FIGURES[name](), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 5000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_axes_is_labelled_and_no_legend_covers_data(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()

    def words(part):
        texts = [getattr(part, kind, None) for kind in ("_suptitle", "_supxlabel", "_supylabel")]
        return [text.get_text() for text in texts if text is not None]

    def within(part):
        return [part, *(inner for sub in part.subfigs for inner in within(sub))]

    parts = within(figure)
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


@pytest.mark.parametrize(
    ("schedule", "words"), [(LINEAR, "ends at signal 0.0025"), (Schedule.flow(9), "0: noise alone")]
)
def test_schedule_factors_say_where_the_chain_ends(schedule, words):
    axes = plots.schedule_factors(schedule).axes[1]
    curve, _, end = axes.lines
    there = schedule.signal > 0
    np.testing.assert_allclose(curve.get_ydata()[there], schedule.log_snr[there], rtol=1e-9)
    assert end.get_xdata() == [np.flatnonzero(there)[-1]]
    assert axes.get_title(loc="right").endswith(words)


def test_forward_diffusion_draws_the_rows_it_names():
    axes = plots.forward_diffusion(CHAIN, [0, 3, 20], rate=50).axes
    assert [a.get_title(loc="left") for a in axes] == ["the curve", "after 3 steps", "after 20 steps"]
    np.testing.assert_array_equal(axes[1].lines[1].get_ydata(), CHAIN[3])
    np.testing.assert_allclose(axes[1].lines[1].get_xdata(), np.arange(POINTS) / 50)
    assert all(np.array_equal(a.lines[0].get_ydata(), CURVE) for a in axes)
    titles = [a.get_title(loc="left") for a in plots.forward_diffusion(CHAIN, [0, 10], schedule=LINEAR).axes]
    assert titles[0] == "the curve"
    assert titles[1] == f"after 10 steps: signal {LINEAR.signal[9]:.2f}, noise {LINEAR.noise[9]:.2f}"


def test_loss_smooths_by_a_centred_mean():
    axes = plots.loss(HISTORY).axes[0]
    raw, smooth, held, smallest = (line.get_ydata() for line in axes.lines)
    assert smallest == [0.15]
    assert axes.get_xlabel().endswith("the smallest held-out loss, 0.15 at step 300)")
    assert axes.lines[2].get_label() == "held out, averaged weights"
    linear = plots.loss(HISTORY, linear=0.2).axes[0].lines[-1]
    assert (linear.get_label(), set(linear.get_ydata())) == ("best linear denoiser", {0.2})
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
    shown = [0, 2, 4, 5, 7, 9, 11, 13, 15, 16, 18]  # and the result: a dozen of 21 states
    np.testing.assert_allclose([segment[:, 1] for segment in lines.get_segments()], PATH[shown])
    np.testing.assert_array_equal(lines.get_array(), shown)
    target, result = axes.lines
    assert matplotlib.colors.to_hex(target.get_color()) == plots.RED
    np.testing.assert_array_equal(target.get_ydata(), CURVE)
    np.testing.assert_array_equal(result.get_ydata(), PATH[-1])
    assert np.mean(matplotlib.colors.to_rgb(result.get_color())) < brightness.min()
    assert result.get_zorder() > target.get_zorder() > lines.get_zorder()
    assert result.get_linewidth() < target.get_linewidth()


def test_reverse_lines_draws_one_line_a_dimension():
    axes = plots.reverse_lines(PATH, np.arange(T)[::-1], sampler="ddpm, 100 steps").axes[0]
    assert axes.get_xlabel().endswith(": ddpm, 100 steps")
    segments = axes.collections[0].get_segments()
    assert len(segments) == POINTS
    np.testing.assert_allclose(segments[7][:, 1], PATH[:, 7])
    np.testing.assert_array_equal(segments[7][:, 0], np.arange(T, -1, -1))
    assert [line.get_label() for line in axes.lines] == ["point 8", "point 16", "point 24", "point 33", "point 41"]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), PATH[:, 16])
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


def test_many_curves_have_bands_on_the_same_axes():
    made, real = RNG.standard_normal((300, 7)), RNG.standard_normal((20, 7))
    axes = plots.generated(made, real, count=2).axes[0]
    of_real, of_made = axes.collections
    for band, rows in ((of_real, real), (of_made, made)):
        low, high = np.quantile(rows, (0.05, 0.95), axis=0)
        edges = band.get_paths()[0].vertices
        np.testing.assert_allclose([edges[:, 1].min(), edges[:, 1].max()], [low.min(), high.max()])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["real", "generated"]
    assert len(plots.generated(made, real[:19], count=2).axes) == 4  # too few for a band


def test_around_target_counts_all_curves_in_the_error():
    curves = CURVE + np.repeat([[0.0], [2.0]], 2, axis=0)
    figure = plots.around_target(curves, CURVE, count=1)
    assert "error 1.41 " in figure.axes[1].get_title(loc="left")
    assert len(figure.axes[0].collections[0].get_segments()) == 1


def test_figures_of_samples_name_the_sampler():
    how = "ddim, 50 steps"
    assert plots.reverse_chain(PATH, sampler=how).axes[1].get_ylabel() == f"sampling steps done: {how}"
    legend = plots.around_target(CHAIN, CURVE, sampler=how).axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == f"{T + 1} generated: {how}"
    assert plots.image_trace(REVERSE["gray"], sampler=how)._suptitle.get_text() == f"From noise to a picture: {how}"
    alone = plots.generated(CHAIN[:1], names=(f"Generated: {how}", ""))
    inside(alone, alone.subfigs[0]._suptitle)


def test_covariances_share_a_scale_and_the_axes_of_their_spectra():
    figure = plots.covariances({"a": SOURCE, "b": TARGET})
    first, second, under = (a for a in figure.axes if a.get_label() == "")
    np.testing.assert_array_equal(second.images[0].get_array(), TARGET)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 1)
    assert [a.get_label() for a in figure.axes].count("<colorbar>") == 1
    assert first.get_title(loc="left") == "a"
    assert first.get_xlabel() == "effective rank 50.0 of 50"
    of_source, of_target = (line.get_ydata() for line in under.lines[:2])
    np.testing.assert_allclose(of_source, np.ones(POINTS))
    values = np.sort(np.linalg.eigvalsh(TARGET.astype(np.float64)))[::-1]
    floor = 1e-6 * values[0]
    assert len(of_target) == POINTS
    assert of_target.min() == pytest.approx(floor)  # what is drowned in rounding lies on the floor
    np.testing.assert_allclose(of_target, np.maximum(values, floor), rtol=1e-6)


def test_a_plateau_is_named():
    axes = plots.convergence([5, 10], {"ddpm": [2, 1]}, plateau=(0.8, "the start")).axes[0]
    assert set(axes.lines[-1].get_ydata()) == {0.8}
    assert [text.get_text() for text in axes.texts] == ["the start: 0.8"]


def test_two_sizes_are_bars_with_their_times():
    panels = {"a step": {"ours": ([1, 2], [0.0258, 0.013]), "theirs": ([1, 2], [0.04, 0.02])}}
    axes = plots.scaling(panels, ["threads"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.0258, 0.013, 0.04, 0.02]
    assert [text.get_text() for text in axes.texts] == ["26 ms", "13 ms", "40 ms", "20 ms"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def test_rates_stand_in_long_bars_and_beside_short_ones():
    figure = plots.shares({"noise": (0.2, "6 GB/s"), "convolution": (1.3, "600 GF/s")}, "a CPU")
    figure.draw_without_rendering()
    for bar, word, inside in zip(figure.axes[0].patches, figure.axes[0].texts, (False, True), strict=True):
        assert bar.get_window_extent().contains(*word.get_window_extent().get_points()[1]) == inside
        assert figure.axes[0].bbox.x1 >= word.get_window_extent().x1


def test_real_pictures_stand_beside_generated_ones(tmp_path):
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1) * 20
    figure = plots.image_grid(images, columns=2, reference=255 - images[:1])
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["generated", "real"]
    mosaic = figure.axes[0].images[0].get_array()
    side = (mosaic.shape[1] - 4 * GAP) // 5
    assert mosaic[1, 1, 0] == images[0, 0, 0, 0]
    assert mosaic[1, 3 * (side + GAP) + 1, 0] == 255 - images[0, 0, 0, 0]
    with pytest.raises(ArgumentError, match="labels"):
        plots.image_grid(images, reference=images, labels=[1, 2, 3])
    with pytest.raises(ArgumentError, match="reference"):
        plots.image_grid(images, reference=images[:, :1])


def test_spectra_draws_the_gain_that_reshaping_has():
    source = 4 * SOURCE
    lines = plots.spectra(source, TARGET).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), 4)
    gains = covariance.reshaping(source, TARGET).gains
    np.testing.assert_allclose(lines[2].get_ydata()[:5], gains[:5])


def test_reshaped_draws_the_nearest_darkest_and_last():
    after = CURVE + np.array([[1.0], [0.0], [2.0]])
    figure = plots.reshaped(-after, after, CURVE)
    for axes, curves in zip(figure.axes[:2], (-after, after), strict=True):
        (lines,) = axes.collections
        np.testing.assert_allclose([s[:, 1] for s in lines.get_segments()], curves[[2, 0, 1]])
        np.testing.assert_allclose(lines.get_array(), [2, 1, 0], atol=1e-12)
        lines.update_scalarmappable()
        assert (np.diff(lines.get_edgecolor()[:, :3].mean(axis=1)) < 0).all()


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: plots.forward_diffusion(CURVE), "chain"),
        (lambda: plots.forward_diffusion(CHAIN, [T + 1]), "timesteps"),
        (lambda: plots.forward_diffusion(CHAIN, []), "timesteps"),
        (lambda: plots.forward_diffusion(CHAIN, rate=0), "rate"),
        (lambda: plots.forward_diffusion(CHAIN, schedule=Schedule.cosine(T + 1)), "schedule"),
        (lambda: plots.convergence([5], {"ddpm": [1.0]}, plateau=(0, "x")), "plateau"),
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
        (lambda: plots.covariances({}), "matrices"),
        (lambda: plots.covariances({"a": CURVE}), "matrices"),
        (lambda: plots.spectra(SOURCE, TARGET[1:, 1:]), "target"),
        (lambda: plots.reshaped(CHAIN, PATH[:3], CURVE), "after"),
        (lambda: plots.reshaped(CHAIN, PATH, CURVE[1:]), "signal"),
        (lambda: plots.reshaped(CHAIN[:0], PATH[:0], CURVE), "before"),
        (lambda: plots.convergence([5, 10], {"ddpm": [1.0]}), r"distances\['ddpm'\]"),
        (lambda: plots.tradeoff({}), "panels"),
        (lambda: plots.tradeoff({"x": {"a": ([5, 10], [1.0])}}), r"panels \(distances\)"),
        (lambda: plots.bound([1.0, 2.0], [1.0, 2.0]), "terms"),
        (lambda: plots.bound([1.0, 2.0, 3.0], [1.0, 2.0]), "stderr"),
        (lambda: plots.shares({}, "a CPU"), "work"),
        (lambda: plots.scaling({"a step": {"ours": ([1, 2], [1])}}, ["n"]), r"panels\['a step'\]"),
        (lambda: plots.scaling({"a step": {"ours": ([1], [1])}}, []), "labels"),
    ],
)
def test_figures_refuse(draw, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        draw()


# --------------------------------------------------------------------------------------- pictures

COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)
GRAY = RNG.integers(0, 256, (6, 5, 4, 1), np.uint8)
STEPS = 40
REVERSE = {  # (steps + 1, 2, H, W, C), noise first, and much of it outside 0 .. 255
    name: np.linspace(RNG.normal(128, 150, images[:2].shape), images[:2], STEPS + 1)
    for name, images in {"colour": COLOUR, "gray": GRAY}.items()
}


def laid_out(pictures, columns, scale, gap, line=0):
    """The pictures one after the other, each pixel a square, on white; by loops."""
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    high, wide = height * scale + gap + line, width * scale + gap
    canvas = np.full((rows * high - gap - line, columns * wide - gap, 3), 255, np.uint8)
    for k, one in enumerate(pictures):
        for y in range(height * scale):
            for x in range(width * scale):
                canvas[k // columns * high + y, k % columns * wide + x] = one[y // scale, x // scale]
    return canvas


def drawn_pixels(figure, tmp_path):
    """What the PNG of a figure shows at the place of its only axes."""
    from PIL import Image

    plots.save(figure, tmp_path / "figure.png")
    shown = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    (axes,) = figure.axes
    box = axes.get_position()
    left, right = (round(x * shown.shape[1]) for x in (box.x0, box.x1))
    top, bottom = (round((1 - y) * shown.shape[0]) for y in (box.y1, box.y0))
    assert (np.delete(shown, np.s_[left - 1 : right + 1], axis=1)[top:bottom] == 255).all()
    return shown[top:bottom, left:right]


@pytest.mark.parametrize("images", [COLOUR, GRAY, COLOUR[:1], GRAY[:4]], ids=["colour", "gray", "one", "one row"])
def test_image_grid_draws_every_pixel(tmp_path, images):
    drawn = drawn_pixels(plots.image_grid(images), tmp_path)
    np.testing.assert_array_equal(drawn, laid_out(images, min(4, len(images)), 160 // 5, GAP))


def test_image_grid_fits_the_usual_width_and_does_not_shrink(tmp_path):
    wide = RNG.integers(0, 256, (20, 16, 30, 3), np.uint8)
    drawn = drawn_pixels(plots.image_grid(wide, columns=10), tmp_path)
    np.testing.assert_array_equal(drawn, laid_out(wide, 10, 3, GAP))  # 10 x 30 x 3 <= 960
    large = RNG.integers(0, 256, (1, 200, 170, 1), np.uint8)
    np.testing.assert_array_equal(drawn_pixels(plots.image_grid(large), tmp_path), large[0].repeat(3, axis=2))


def test_image_grid_clips_to_its_range(tmp_path):
    unit = np.linspace(-2, 2, 20).reshape(1, 5, 4, 1)
    drawn = drawn_pixels(plots.image_grid(unit, data_range=(-1, 1)), tmp_path)[16::32, 16::32, 0]
    np.testing.assert_array_equal(drawn, np.rint(np.clip(unit[0, ..., 0] + 1, 0, 2) * 127.5))


def inside(figure, text):
    figure.draw_without_rendering()
    box = text.get_window_extent()
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)
    return box


@pytest.mark.parametrize("title", ["Generated pictures", "A heading that is much wider than one small picture below"])
def test_the_words_of_pictures_stand_above_them(title):
    figure = plots.image_grid(COLOUR, columns=3, labels=list("ABCyyy"), title=title)
    narrow = plots.image_grid(COLOUR[:1], title=title)
    for each in (figure, narrow):
        heading = inside(each, each._suptitle)
        assert heading.y0 > max([each.axes[0].bbox.y1, *(t.get_window_extent().y1 for t in each.axes[0].texts)])
        assert not each.axes[0].get_xticks().size
        assert not each.axes[0].get_yticks().size
    axes = figure.axes[0]
    high, wide = 160 // 5 * 5, 160 // 5 * 4
    for k, text in enumerate(axes.texts):
        box = inside(figure, text)
        left = axes.bbox.x0 + k % 3 * (wide + GAP)
        lower = axes.bbox.y1 - k // 3 * (axes.bbox.height - high)  # the upper edge of its picture
        assert lower < box.y0 < box.y1 < lower + 32
        assert (box.x0 + box.x1) / 2 == pytest.approx(left + wide / 2, abs=1.5)
    assert [text.get_text() for text in axes.texts] == list("ABCyyy")


def test_words_above_columns_stand_there_once(tmp_path):
    figure = plots.image_grid(COLOUR, columns=3, labels=range(3))
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1", "2"]
    for text in figure.axes[0].texts:
        assert inside(figure, text).y0 > figure.axes[0].bbox.y1
    np.testing.assert_array_equal(drawn_pixels(figure, tmp_path), laid_out(COLOUR, 3, 160 // 5, GAP))


@pytest.mark.parametrize("kind", ["colour", "gray"])
def test_image_trace_draws_eleven_even_frames_of_each_chain(tmp_path, kind):
    path = REVERSE[kind]
    figure = plots.image_trace(path)
    assert [text.get_text() for text in figure.axes[0].texts] == [str(k) for k in range(0, 41, 4)]
    assert figure.axes[0].get_xlabel() == "sampling steps done"
    inside(figure, figure.axes[0].xaxis.label)
    chains = np.concatenate([path[::4, 0], path[::4, 1]])
    want = np.rint(chains).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(drawn_pixels(figure, tmp_path), laid_out(want, 11, 960 // 44, GAP))
    one = plots.image_trace(path[:, 1], frames=3)
    np.testing.assert_array_equal(drawn_pixels(one, tmp_path), laid_out(want[[11, 16, 21]], 3, 32, GAP))
    few = plots.image_trace(path[-2:])
    assert [text.get_text() for text in few.axes[0].texts] == ["0", "1"]


@pytest.mark.parametrize("kind", ["colour", "gray"])
def test_an_animation_shows_the_states_in_order_and_holds_the_last(tmp_path, kind):
    from PIL import Image

    path = REVERSE[kind]
    plots.animation(path, tmp_path / "x.gif", frames=21, seconds=2.1, hold=1.5)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 21
        assert film.info["loop"] == 0
        for k in range(21):
            film.seek(k)
            assert film.info["duration"] == (1600 if k == 20 else 100)
            shown = np.asarray(film.convert("RGB"))
            want = laid_out(np.rint(path[2 * k]).clip(0, 255).astype(np.uint8), 2, 96 // 5, GAP)
            np.testing.assert_array_equal(shown, want)  # 40 colours a frame: none has to give way


def test_many_colours_of_an_animation_give_way_to_near_ones(tmp_path):
    from PIL import Image

    x, y = np.meshgrid(np.arange(32), np.arange(32))
    smooth = np.stack([8 * x, 8 * y, 255 - 4 * x - 4 * y], axis=-1)[None, None]
    plots.animation(np.concatenate([smooth[:, :, ::-1], smooth]), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        film.seek(1)
        shown = np.asarray(film.convert("RGB")).astype(int)
    off = shown - laid_out(smooth[0].astype(np.uint8), 1, 3, GAP)
    assert np.sqrt(np.mean(off**2)) < 8


def test_an_animation_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.animation(REVERSE["gray"][:, 0], tmp_path / "x.gif")
    assert (tmp_path / "x.gif").read_bytes().startswith(b"GIF89a")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BackendError, match=r'pip install "fastdiff-engine\[plot\]"'):
        plots.animation(REVERSE["gray"], tmp_path / "y.gif")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gif"]


def test_moving_curves_end_where_the_chains_end(tmp_path):
    """The line of a flat curve is at its height; frames are in order, and the last one holds."""
    from PIL import Image

    heights = np.linspace(1, -1, 5)
    path = np.broadcast_to(heights[:, None, None], (5, 2, 8))
    plots.moving_curves(path, tmp_path / "x.gif", rows=1, seconds=0.5, hold=1)
    blue, lines = (0, 114, 178), []
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 5
        for k in range(5):
            film.seek(k)
            assert film.info["duration"] == (1100 if k == 4 else 100)
            shown = np.asarray(film.convert("RGB")).astype(int)
            drawn = (np.abs(shown - blue).sum(axis=-1) < 8).sum(axis=1)  # pixels of a row
            lines.append(int(drawn.argmax()))
            assert drawn.max() > shown.shape[1] / 2
    assert np.ptp(np.diff(lines)) <= 1  # evenly spaced,
    assert lines[0] < lines[-1]  # and down


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda to: plots.moving_curves(np.zeros((3, 2)), to / "x.gif"), "path"),
        (lambda to: plots.moving_curves(np.zeros((1, 2, 5)), to / "x.gif"), "path"),
        (lambda to: plots.moving_curves(np.zeros((3, 0, 5)), to / "x.gif"), "path"),
        (lambda to: plots.moving_curves(np.zeros((3, 2, 5)), to / "x.png"), "path"),
        (lambda to: plots.moving_curves(np.zeros((3, 2, 5)), to / "x.gif", rows=0), "rows"),
        (lambda to: plots.moving_curves(np.zeros((3, 2, 5)), to / "x.gif", frames=1), "frames"),
        (lambda to: plots.moving_curves(np.zeros((3, 2, 5)), to / "x.gif", hold=-1), "hold"),
        (lambda to: plots.image_grid(COLOUR[0]), "images"),
        (lambda to: plots.image_grid(COLOUR[:0]), "images"),
        (lambda to: plots.image_grid(COLOUR[..., :2]), "images"),
        (lambda to: plots.image_grid(np.full((1, 2, 2, 1), np.nan)), "images"),
        (lambda to: plots.image_grid(COLOUR, columns=0), "columns"),
        (lambda to: plots.image_grid(COLOUR, labels=["a"]), "labels"),
        (lambda to: plots.image_grid(COLOUR, data_range=(1, 0)), "data_range"),
        (lambda to: plots.image_trace(COLOUR[0]), "path"),
        (lambda to: plots.image_trace(COLOUR[:1]), "path"),
        (lambda to: plots.image_trace(REVERSE["gray"][:, :0]), "path"),
        (lambda to: plots.image_trace(REVERSE["gray"] * np.inf), "path"),
        (lambda to: plots.image_trace(REVERSE["gray"], frames=1), "frames"),
        (lambda to: plots.animation(REVERSE["gray"], to / "x.png"), "path"),
        (lambda to: plots.animation(COLOUR[0], to / "x.gif"), "path"),
        (lambda to: plots.animation(REVERSE["gray"], to / "x.gif", columns=0), "columns"),
        (lambda to: plots.animation(REVERSE["gray"], to / "x.gif", frames=0), "frames"),
        (lambda to: plots.animation(REVERSE["gray"], to / "x.gif", seconds=0), "seconds"),
        (lambda to: plots.animation(REVERSE["gray"], to / "x.gif", hold=-1), "hold"),
    ],
)
def test_figures_of_pictures_refuse(tmp_path, draw, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_a_figure_as_it_is_saved(tmp_path):
    figure = plots.loss(HISTORY)
    assert isinstance(figure, matplotlib.figure.Figure)
    copied = pickle.loads(pickle.dumps(figure))
    plots.save(plots.loss(HISTORY), tmp_path / "figure.png")
    for each in (figure, copied):
        assert each._repr_png_() == (tmp_path / "figure.png").read_bytes()


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


def test_imputed_shows_bands_of_the_draws_and_what_is_known():
    draws = CHAIN[:, None] + np.zeros((2, 1))
    figure = plots.imputed(HOLES[:2], draws, truth=np.stack([CURVE, -CURVE]), rate=50, names=("a", "b"))
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    curves = {line.get_label(): line for line in second.lines}
    np.testing.assert_array_equal(curves["known"].get_ydata(), HOLES[1])
    np.testing.assert_array_equal(curves["the curve"].get_ydata(), -CURVE)
    np.testing.assert_array_equal(curves["one draw"].get_ydata(), draws[0, 1])
    assert curves["known"].get_xdata()[-1] == (POINTS - 1) / 50
    low, high = np.quantile(CHAIN, (0.025, 0.975), axis=0)
    wide = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (wide.min(), wide.max()) == pytest.approx((low.min(), high.max()))


@pytest.mark.parametrize(
    ("known", "draws", "options", "message"),
    [
        (HOLES[:2], CHAIN[:, None], {}, "known: got shape"),
        (HOLES, np.zeros((0, 3, POINTS)), {}, "draws: got"),
        (HOLES[:1], CHAIN[:, None], {"names": ("a", "b")}, "names: got 2"),
        (HOLES[:1], CHAIN[:, None], {"truth": CURVE}, "truth: got"),
    ],
)
def test_imputed_refuses_what_does_not_fit(known, draws, options, message):
    with pytest.raises(ArgumentError, match=message):
        plots.imputed(known, draws, **options)
