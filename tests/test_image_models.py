"""`Diffusion` with a U-Net: what a step draws, training by parts and by classes, ranges, bad input."""

import logging
import re
import warnings

import naive
import numpy as np
import pytest
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import sampling
from fastdiff.backends import TrainingDraws, get_backend
from fastdiff.backends.numpy.mlp import draw_batch
from fastdiff.errors import ArgumentError, TrainingError
from fastdiff.noise import Draw, Stream, flips
from fastdiff.normaliser import Normaliser
from fastdiff.split import split

T = 20
RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (12, 6, 5, 1), np.uint8)
LABELS = np.arange(12) % 3
QUIET = {"progress": False, "batch": 5}


def net(shape=(6, 5, 1), **options):
    options = {"channels": (4, 8), "blocks": 1, "T": T, "groups": 2, "seed": 1, **options}
    made = fd.UNet(shape, **options)
    made.flat[...] = 0
    for name, view in made.params.items():  # no layer at zero, so that everything matters
        scale = 1.0 if "norm" in name else np.sqrt(np.prod(view.shape[:-1]))
        view[...] = np.random.default_rng(len(name)).normal(size=view.shape) / max(1, scale)
    return made


def model(backend="numpy", prediction="noise", **options):
    return fd.Diffusion(net(**options), prediction=prediction, backend=backend, seed=4)


# --------------------------------------------------------------------------------------- what a step draws


def drawn(backend, draws, step, first, n):
    """Positions of a training batch."""
    be = fd.get_backend(backend)
    batch = net().runner(be).batch(n, labels=True)
    be.draw_batch(draws, batch, step, first)
    return batch


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_the_noise_law_and_its_parts_are_numbered_through(backend, flip):
    data = RANDOM.normal(size=(12, 6, 5, 1)).astype(np.float32)
    tables = RANDOM.normal(size=(4, T))
    draws = TrainingDraws(data, *tables, 9, LABELS, flip)
    whole = drawn(backend, draws, 3, 0, 8)
    rows = data.copy()
    x, t, target = draw_batch(TrainingDraws(rows.reshape(12, -1), *tables, 9), T, 3, 8)
    if flip:
        mirrored = flips(8, Draw(9, Stream.AUGMENT, 3))
        assert 0 < mirrored.sum() < 8
        signal, of_data = (table[t].astype(np.float32)[:, None, None, None] for table in (tables[0], tables[3]))
        chosen = fd.noise.scaled_words(8, 12, Draw(9, Stream.BATCH, 3))
        change = np.where(mirrored[:, None, None, None], data[chosen][:, :, ::-1] - data[chosen], 0)
        assert_close(whole[0], x.reshape(whole[0].shape) + signal * change, scale=10)
        assert_close(whole[2], target.reshape(whole[2].shape) + of_data * change, scale=10)
    else:
        assert_same_bits(whole[0].reshape(8, -1), x)
        assert_same_bits(whole[2].reshape(8, -1), target)
    assert_same_bits(whole[1], t)
    assert whole.terms is None
    for one, *parts in zip(
        whole[:4], drawn(backend, draws, 3, 0, 3)[:4], drawn(backend, draws, 3, 3, 5)[:4], strict=True
    ):
        assert_same_bits(one, np.concatenate(parts))


def test_a_batch_of_parts_is_cut_by_the_noise_law(backend):
    data = RANDOM.normal(size=(12, 9, 11, 2)).astype(np.float32)
    tables = RANDOM.normal(size=(4, T))
    wide = TrainingDraws(data, *tables, 9, flip=True)
    at = {"seed": 9, "step": 3}
    rows = [naive.words(0, stream=4, row=row, **at)[0] * 12 >> 32 for row in range(7)]
    words = [naive.words(0, stream=10, row=row, **at) for row in range(7)]
    places = [(w1 * 4 >> 32, w2 * 7 >> 32) for _, w1, w2, _ in words]
    parts = np.stack([data[i, a : a + 6, b : b + 5] for i, (a, b) in zip(rows, places, strict=True)])
    parts = np.stack([part[:, ::-1] if w[0] < 2**31 else part for part, w in zip(parts, words, strict=True)])
    made = net(shape=(6, 5, 2))
    be = fd.get_backend(backend)
    whole, one = (made.runner(be).batch(n, labels=False) for n in (7, 1))
    be.draw_batch(wide, whole, 3, 0)
    signal, level = (table[whole.t].astype(np.float32)[:, None, None, None] for table in tables[:2])
    eps = fd.normal((7, 60), seed=9, stream="train_noise", step=3, backend="numpy").reshape(parts.shape)
    assert_close(whole.x, signal * parts + level * eps, scale=10)
    kept = whole.x[4].copy()
    be.draw_batch(wide, one, 3, 4)
    assert_same_bits(one.x[0], kept)


def test_labels_go_with_their_pictures():
    data = LABELS.repeat(30).reshape(12, 6, 5, 1).astype(np.float32)
    ones, zeros = np.ones(T), np.zeros(T)
    draws = TrainingDraws(data, ones, zeros, zeros, ones, 0, LABELS, True)
    x, _, target, labels, *_ = drawn("numpy", draws, 0, 0, 9)
    assert set(labels) == {0, 1, 2}
    np.testing.assert_array_equal(x[:, 0, 0, 0], labels)
    np.testing.assert_array_equal(target[:, 5, 4, 0], labels)


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("k", [2, 5])
def test_a_batch_in_parts_is_the_same_step(backend, k):
    whole, parts = (model(backend, classes=3) for _ in range(2))
    whole.fit(BYTES, LABELS, steps=1, **QUIET)
    parts.fit(BYTES, LABELS, steps=1, accumulate=k, **QUIET)
    assert parts.history["loss"][0] == pytest.approx(whole.history["loss"][0], rel=1e-6)
    assert_close(parts._optimizer.m, whole._optimizer.m, terms=1000)  # a tenth of the clipped gradient
    assert np.abs(whole._optimizer.m).max() > 0


def test_dropout_is_numbered_through_the_parts():
    whole, parts = (model(dropout=0.5, dtype="float64") for _ in range(2))
    whole.fit(BYTES, steps=3, **QUIET)
    parts.fit(BYTES, steps=3, accumulate=3, **QUIET)
    np.testing.assert_allclose(parts.history["loss"], whole.history["loss"], rtol=1e-9)
    without = model(dtype="float64").fit(BYTES, steps=1, **QUIET)
    assert abs(without.history["loss"][0] - whole.history["loss"][0]) > 1e-3


def test_a_run_goes_on_bit_for_bit(backend, tmp_path):
    everything = {"flip": True, "accumulate": 2, "warmup": 2, "decay_steps": 5, "validation": 0.25, **QUIET}
    whole = model(backend, "v", classes=3, dropout=0.2).fit(BYTES, LABELS, steps=6, **everything)
    half = model(backend, "v", classes=3, dropout=0.2).fit(BYTES, LABELS, steps=3, **everything)
    half.save(tmp_path / "m.safetensors")
    again = fd.load(tmp_path / "m.safetensors", backend=backend)
    again.fit(BYTES, LABELS, steps=3, flip=True, accumulate=2, validation=0.25, **QUIET)  # the saved plan stays
    assert again.step == 6
    assert again.history["loss"] == whole.history["loss"]
    for ema in (False, True):
        assert_same_bits(again.denoiser(ema=ema).flat, whole.denoiser(ema=ema).flat)
    assert_same_bits(again.sample(4, labels=2), whole.sample(4, labels=2))


def test_threads_change_no_bits():
    runs = [model(fd.get_backend("cpu", threads=n)).fit(BYTES, steps=3, flip=True, **QUIET) for n in (1, 2)]
    assert_same_bits(runs[0].net.flat, runs[1].net.flat)
    assert_same_bits(runs[0].sample(5), runs[1].sample(5))


def test_parts_of_larger_pictures_are_learned(backend, tmp_path):
    """On any number of threads, in one run or in two; what is held out and judged is of the parts' size."""
    large = RANDOM.integers(0, 256, (12, 9, 8, 1), np.uint8)
    how = {"flip": True, "crop": (6, 5), "validation": 0.25, **QUIET}
    whole = model(backend).fit(large, steps=4, **how)
    assert_same_bits(model(backend).fit(large, steps=2, **how).fit(large, steps=2, **how).net.flat, whole.net.flat)
    corners = model(backend).fit(large[:, :6, :5], steps=4, flip=True, validation=0.25, **QUIET)
    assert (corners.net.flat != whole.net.flat).any()
    half = model(backend).fit(large, steps=2, accumulate=2, **how)
    assert half.history["loss"][0] == pytest.approx(whole.history["loss"][0], rel=1e-6)
    assert len(whole.history["validation_loss"]) == 1
    assert whole.sample(2).shape == (2, 6, 5, 1)
    if backend == "cpu":
        threads = model(fd.get_backend("cpu", threads=1)).fit(large, steps=4, **how)
        assert_same_bits(threads.net.flat, whole.net.flat)


def test_a_network_is_made_for_the_parts_and_the_range_is_that_of_the_whole():
    bright = np.zeros((6, 40, 40, 1))
    bright[:, 0, 0] = 7.0  # hardly ever in a part
    made = fd.Diffusion(backend="numpy").fit(bright, crop=8, steps=0, progress=False)
    assert made.net.shape == (8, 8, 1)
    assert made.normaliser.data_range == (0, 7)
    parts = split(bright, None, None, None, None, 3, get_backend("numpy")).cut((8, 5), 3)
    assert parts.rows.shape == (6, 8, 5, 1)
    assert parts.whole is bright
    places = fd.noise.cuts(6, (32, 35), Draw(3, Stream.DATA, 21))
    numbered = np.arange(6 * 1600.0).reshape(6, 40, 40, 1)
    parts = split(numbered, None, 0.5, None, None, 3, get_backend("numpy")).cut((8, 5), 3)
    first = np.array([part[0, 0, 0] for part in (*parts.rows, *parts.held_out[0])])
    of = np.concatenate([parts.whole[:, 0, 0, 0], numbered[parts.held][:, 0, 0, 0]])
    assert (first - of).tolist() == (places @ [40, 1]).tolist()


def test_named_samplers_of_pictures():
    """They clip, ddim takes the noise from what it has clipped, and what remembers the noise clips nothing."""
    made = model("numpy").fit(BYTES, steps=1, **QUIET)
    for name in fd.samplers.names():
        table = made.named_sampler(name, 3)
        unclipped = name in ("deis", "lms", "pndm", "ipndm", "dpmsolver", "dpmpp_sde")
        assert table.clip == (None if unclipped else (-1, 1))
        assert all(row.e == 0 for row in table.rows) or unclipped
        assert made.sample(2, sampler=name, steps=3).dtype == np.uint8


def test_backends_learn_the_same():
    losses = [model(name).fit(BYTES, steps=4, flip=True, **QUIET).history["loss"] for name in ("numpy", "cpu")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
def test_classes_are_learned(backend):
    """Dark and bright pictures: what is asked for comes, and validation sees the labels too."""
    y = np.arange(16) % 2
    X = np.where(y[:, None, None, None] == 1, 220, 30) + RANDOM.integers(-20, 20, (16, 4, 4, 1))
    made = fd.Diffusion(
        fd.UNet((4, 4, 1), channels=(8,), blocks=1, T=T, classes=2), prediction="x0", backend=backend, seed=0
    )
    held_out = (X[:6].astype(np.uint8), y[:6])
    made.fit(X.astype(np.uint8), y, steps=200, batch=16, lr=5e-3, ema=0.9, validation=held_out, progress=False)
    asked = np.arange(10) % 2
    drawn = made.sample(10, labels=asked, sampler="ddim")
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn.mean(axis=(1, 2, 3)) > 128, asked == 1)
    assert_same_bits(made.sample(3, labels=1, sampler="ddim"), made.sample(3, labels=[1, 1, 1], sampler="ddim"))
    assert made.history["validation_step"] == [0, 100, 200]
    good = made.history["validation_loss"][-1]
    assert good < 0.2 * made.history["validation_loss"][0]
    swapped = fd.Diffusion(made.net, made.schedule, prediction="x0", backend=backend)
    swapped.fit(*held_out, steps=0, validation=(held_out[0], 1 - held_out[1]), progress=False)
    swapped.fit(*held_out, steps=1, lr=1e-3, validation=(held_out[0], 1 - held_out[1]), progress=False)
    assert swapped.history["validation_loss"][0] > 2 * good


def test_labels_are_held_out_with_their_pictures():
    X = np.broadcast_to(LABELS[:, None, None, None] / 2, (12, 6, 5, 1)).astype(np.float32)
    rows, labels, (held, of_held), *_ = split(X, LABELS, 0.25, 3, None, 4, get_backend("numpy"))
    np.testing.assert_array_equal(rows[:, 0, 0, 0] * 2, labels)
    np.testing.assert_array_equal(held[:, 0, 0, 0] * 2, of_held)
    assert (len(rows), len(held)) == (9, 3)


def test_one_dimensional_nets_learn_curves(backend):
    curves = fd.data.harmonic_curves(32, points=10)
    made = fd.Diffusion(fd.UNet((10,), channels=(8, 8), blocks=1, T=T), backend=backend)
    made.fit(curves, steps=3, **QUIET)
    assert made.normaliser.data_range is None
    assert made.normaliser.std == pytest.approx(curves.std(), rel=1e-6)
    assert made.sample(3).shape == (3, 10)
    assert made.sample(3).dtype == np.float32


def test_a_loss_that_is_not_finite_leaves_the_state_before_it(backend):
    made = model(backend).fit(BYTES, steps=2, **QUIET)
    before = made.net.flat.copy()
    made.net.flat[made.net.layout.offsets["conv_out.bias"]] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(TrainingError, match=r"step 2: .*weights not finite"):
        made.fit(BYTES, steps=1, accumulate=2, **QUIET)
    made.net.flat[made.net.layout.offsets["conv_out.bias"]] = before[made.net.layout.offsets["conv_out.bias"]]
    assert made.step == 2
    assert_same_bits(made.net.flat, before)


# --------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((8, 8, 1), (32, 64)), ((28, 28, 1), (32, 64, 128)), ((64, 32, 3), (32, 64, 128, 128)), ((1, 40, 1), None),
     ((2, 9, 3), (32,))],
)  # fmt: skip
def test_pictures_get_a_network_of_their_size(shape, channels, caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    made = fd.Diffusion(backend="numpy", seed=2).fit(np.zeros((3, *shape), np.uint8), [0, 4, 2], steps=0)
    assert isinstance(made.net, fd.UNet)
    assert made.net.shape == shape
    assert made.net.classes == 5
    assert made.schedule == fd.Schedule.cosine(200)
    assert channels is None or made.net.channels == channels
    assert "chosen for the pictures: UNet" in caplog.text
    assert "chosen for the pictures: Schedule" in caplog.text or repr(made.schedule) in caplog.text
    made.reset()
    assert made.net is None


def test_curves_still_get_a_perceptron():
    assert isinstance(fd.Diffusion(backend="numpy").fit(np.eye(4), steps=0).net, fd.MLP)


# --------------------------------------------------------------------------------------- ranges


def test_bytes_come_back_as_bytes_and_states_as_floats(backend):
    made = model(backend).fit(BYTES, steps=1, **QUIET)
    assert made.normaliser == Normaliser(127.5, 127.5, None, (0, 255), True)
    drawn, path = made.sample(3, trajectory=True)
    assert (drawn.dtype, path.dtype) == (np.uint8, np.float32)
    assert path.shape == (T + 1, 3, 6, 5, 1)
    np.testing.assert_array_equal(drawn, path[-1].round())
    assert path[0].min() < 0 < 255 < path[0].max()


def test_floats_keep_their_range_and_are_clipped_to_it(caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    X = BYTES / 51 - 2.0
    made = model().fit(X, steps=1, **QUIET)
    assert "data_range" in caplog.text
    inner = made.normaliser.apply(X, np.float64)
    assert (inner.min(), inner.max()) == pytest.approx((-1, 1))
    drawn = made.sample(8)
    assert drawn.dtype == np.float32
    assert X.min() - 1e-6 <= drawn.min() < drawn.max() <= X.max() + 1e-6
    free = made.sample(8, sampler=fd.samplers.ddpm(made.schedule))
    assert free.max() > X.max()  # a table does what it says
    given = model().fit(X, steps=1, data_range=(-4, 8), **QUIET)
    assert (given.normaliser.mean, given.normaliser.std) == (2, 6)


def test_large_sets_are_normalised_in_blocks(monkeypatch):
    want = (BYTES.astype(np.float64) - 127.5) / 127.5
    for block in (1, 40, 1 << 20):
        monkeypatch.setattr("fastdiff.normaliser.BLOCK_VALUES", block)
        assert_same_bits(Normaliser.of_pictures(BYTES).apply(BYTES, np.float64), want)


# --------------------------------------------------------------------------------------- samplers and labels


def test_labels_reach_any_denoiser_batch_by_batch():
    seen = []

    def denoiser(x, t, labels):
        seen.append((t, labels.tolist()))
        return x + labels[:, None]

    smp = fd.samplers.ddim(fd.Schedule.cosine(10), 2)
    got = sampling.sample(denoiser, smp, n=5, shape=3, labels=[0, 9, 2, 7, 4], batch=3, backend="numpy")
    assert [labels for _, labels in seen] == [[0, 9, 2]] * 2 + [[7, 4]] * 2
    want = sampling.sample(
        lambda x, t: x + np.array([[0], [9], [2], [7], [4]], np.float32), smp, n=5, shape=3, backend="numpy"
    )
    assert_same_bits(got, want)


def test_a_network_is_a_denoiser_with_classes(backend):
    unet = net(classes=3)
    smp = fd.samplers.ddim(fd.Schedule.cosine(T), 3, prediction="x0")
    labels = [2, 0, 1, 2]
    together = fd.sample(unet, smp, n=4, labels=labels, backend=backend)
    apart = [fd.sample(unet, smp, n=1, labels=k, first_sample=i, backend=backend)[0] for i, k in enumerate(labels)]
    assert_close(together, np.stack(apart), terms=100)
    with pytest.raises(ArgumentError, match="labels: got None"):
        fd.sample(unet, smp, n=4, backend=backend)


@pytest.mark.parametrize(
    ("denoiser", "labels", "message"),
    [
        (net(classes=3), 3, "from 0 to 2"),
        (net(classes=3), [0, 1], r"shape \(2,\)"),
        (net(classes=3), 0.5, "dtype float64"),
        (net(), 0, "no classes"),
        (fd.MLP(4, T=T), 0, "no classes"),
        (fd.denoisers.Gaussian(np.zeros(4), np.eye(4), fd.Schedule.cosine(T)), 0, "no classes"),
        (lambda x, t, labels: x, -1, "integers from 0"),
    ],
)
def test_bad_labels_of_samples_are_refused(denoiser, labels, message):
    smp = fd.samplers.ddpm(fd.Schedule.cosine(T))
    shape = None if hasattr(denoiser, "predict") else (4,)
    with pytest.raises(ArgumentError, match=f"labels: .*{message}"):
        fd.sample(denoiser, smp, n=3, labels=labels, shape=shape, backend="numpy")


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "X", "y", "more", "message"),
    [
        ({}, BYTES[:0], None, {}, "X: got shape .*at least one picture"),
        ({}, BYTES[..., 0], None, {}, r"X: got shape \(12, 6, 5\)"),
        ({}, BYTES[:, :5], None, {}, r"X: got shape \(12, 5, 5, 1\)"),
        ({}, [np.zeros((6, 5, 1)), np.zeros((5, 5, 1))], None, {}, "X: got rows of different lengths"),
        ({}, np.where(BYTES > 9, BYTES, np.nan), None, {}, "X: got nan"),
        ({}, np.ones((3, 6, 5, 1)), None, {}, "X: got the value 1 only"),
        ({}, BYTES / 255, None, {"data_range": (0, 0.5)}, "X: got values from 0 to 1, wants values within"),
        ({}, BYTES, None, {"data_range": (1, 1)}, "data_range"),
        ({}, BYTES, None, {"data_range": 255}, "data_range"),
        ({}, BYTES, LABELS, {}, "y: .*no classes"),
        ({"classes": 3}, BYTES, None, {}, "y: got None"),
        ({"classes": 3}, BYTES, LABELS + 1, {}, "y: got 3, wants integers from 0 to 2"),
        ({"classes": 3}, BYTES, LABELS.astype(str), {}, r"y: got dtype <U\d+, wants integers: np\.unique\(y, "),
        ({"classes": 3}, BYTES, LABELS - 1, {}, "y: got -1"),
        ({"classes": 3}, BYTES, LABELS[:5], {}, "y: got shape"),
        ({"classes": 3}, BYTES, LABELS / 2, {}, "y: got dtype"),
        ({"classes": 3}, BYTES, LABELS, {"validation": BYTES}, "labels of validation: got None"),
        ({"classes": 3}, BYTES, LABELS, {"validation": (BYTES, LABELS, 1)}, "validation"),
        ({"classes": 3}, BYTES, LABELS, {"validation": (BYTES, LABELS + 1)}, "labels of validation: got 3"),
        ({}, BYTES, None, {"validation": BYTES[:, :4]}, "validation: got shape"),
        ({}, BYTES, None, {"validation": BYTES / 255}, "validation: got dtype float64"),
        ({}, BYTES, None, {"accumulate": 6}, "accumulate: got 6, wants at most batch = 5"),
        ({}, BYTES, None, {"accumulate": 0}, "accumulate"),
        ({}, BYTES, None, {"crop": (7, 5)}, "crop: got 7, wants an integer from 1 to 6"),
        ({}, BYTES, None, {"crop": 5}, r"crop: got 5, wants \(6, 5\), as the network has"),
        ({}, BYTES, None, {"crop": (6, 5, 1)}, "crop: .*a pair"),
        ({}, BYTES, None, {"crop": "6"}, "crop: got '6'"),
    ],
)
def test_bad_training_data_is_refused_and_changes_nothing(options, X, y, more, message):
    made = model(**options)
    before = made.net.flat.copy()
    with pytest.raises(ArgumentError, match=message):
        made.fit(X, y, steps=1, **{**QUIET, **more})
    assert made.step == 0
    assert_same_bits(made.net.flat, before)
    good = LABELS if made.net.classes else None
    assert made.fit(BYTES, good, steps=1, **QUIET).normaliser.data_range == (0, 255)


def test_later_fits_keep_to_the_first_one_s_range():
    made = model().fit(BYTES, steps=1, **QUIET)
    for X, more, message in (
        (BYTES / 255, {}, "X: got dtype float64, wants bytes"),
        (BYTES, {"data_range": (0, 300)}, "data_range: .*that of the first fit"),
    ):
        with pytest.raises(ArgumentError, match=message):
            made.fit(X, steps=1, **QUIET, **more)
    made.fit(BYTES, steps=1, data_range=(0, 255), **QUIET)
    made = model().fit(BYTES / 255, steps=1, **QUIET)
    with pytest.raises(ArgumentError, match="X: got values from 0 to 2"):
        made.fit(BYTES / 127.5, steps=1, **QUIET)


@pytest.mark.parametrize("option", [{"flip": True}, {"crop": 2}, {"accumulate": 2}, {"data_range": (0, 1)}])
def test_options_of_pictures_are_refused_for_curves(option):
    with pytest.raises(ArgumentError, match=next(iter(option))):
        fd.Diffusion(backend="numpy").fit(np.eye(8), steps=1, progress=False, **option)


def test_what_curves_cannot_be_is_answered_with_what_they_can():
    curves, classes = np.eye(12), np.arange(12) % 3
    model = fd.Diffusion(fd.MLP(12, T=T), backend="numpy")
    with pytest.raises(ArgumentError, match=r"y: got labels, wants None: .*; use (fd\.MLP\(12, classes=3\))$") as told:
        model.fit(curves, classes)
    net = eval(str(told.value).split("use ")[1].replace("classes", "hidden=(4,), T=9, classes"))
    assert fd.Diffusion(net, backend="numpy").fit(curves, classes, steps=1, **QUIET).step == 1
    with pytest.raises(ArgumentError, match=r"y: got shape"):
        model.fit(curves, classes[:5])

    series = curves.reshape(12, 4, 3)
    with pytest.raises(ArgumentError, match=r"X: got shape \(12, 4, 3\), wants curves .*X\.reshape\(len\(X\), -1\)"):
        model.fit(series)
    assert model.fit(series.reshape(len(series), -1), steps=1, **QUIET).step == 1


def test_gray_pictures_without_an_axis_of_colour_are_told_what_they_lack():
    pictures = BYTES[..., 0]
    with pytest.raises(ArgumentError, match=r"X\[\.\.\., None\] pictures of gray ones"):
        fd.Diffusion(backend="numpy").fit(pictures)


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        ((BYTES // 16).astype(np.uint8), {}, r"pictures from 0 to 15 use less than an eighth of the range, \(0, 255\)"),
        ((BYTES // 16).astype(np.uint8), {"data_range": (0, 15)}, None),
        ((BYTES // 4).astype(np.uint8), {}, None),
        (BYTES.astype(np.uint16) * 16, {"data_range": (0, 65535)}, "use less than an eighth"),
        (BYTES.astype(np.uint16) * 16, {"data_range": (0, 4095)}, None),
        (BYTES.astype(np.uint16) * 16, {}, None),  # the range of the pictures
    ],
)
def test_a_range_of_which_little_is_used_is_said(X, options, message):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = model("numpy").fit(X, steps=1, **options, **QUIET)
    assert [bool(message and re.search(message, str(one.message))) for one in seen] == [True] * (message is not None)
    assert all(one.filename == __file__ for one in seen)
    assert made.step == 1


@pytest.mark.parametrize(("shape", "said"), [((9, 3, 8, 8), True), ((9, 1, 8, 8), True), ((9, 3, 8, 3), False)])
def test_pictures_of_which_the_channels_come_first_are_said_to_be_odd(shape, said):
    X = np.resize(BYTES, shape)
    made = fd.Diffusion(fd.UNet(shape[1:], channels=(4,), T=5, groups=2), backend="numpy")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made.fit(X, steps=1, **QUIET)
    assert len(seen) == said
    if said:
        assert re.search(
            r"taken for pictures of . x 8 pixels in 8 channels; .*X\.transpose\(0, 2, 3, 1\)", str(seen[0].message)
        )
        assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fd.Diffusion(net(outputs=3)), "net: got 3 outputs"),
        (
            lambda: fd.Diffusion(net(), noise_shape=fd.NoiseShape.diagonal(np.ones(30))),
            "noise_shape: .*None for .*pict",
        ),
        (lambda: fd.Diffusion(noise_shape=fd.NoiseShape.diagonal(np.ones(30))).fit(BYTES), "X: got shape"),
        (lambda: fd.Diffusion(backend="numpy").fit(BYTES[0, 0, 0].astype(float)), "pictures .N, height, width, chann"),
        (lambda: fd.Diffusion(net(), fd.Schedule.cosine(7)), "schedule"),
        (lambda: fd.UNet((3, 8, 1), channels=(4, 4, 4)), "a size of at least 4"),
    ],
)
def test_bad_models_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_loaded_network_s_prediction_is_kept():
    trained = net()
    trained.prediction = "v"
    with pytest.raises(ArgumentError, match="prediction: got 'noise', wants 'v'"):
        fd.Diffusion(trained, prediction="noise")
    trained.prediction = "noise"
    assert fd.Diffusion(trained).prediction == "noise"
