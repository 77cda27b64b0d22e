"""What samples are asked for, and how much it counts: labels, covariates, guidance, weights and products."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from gradcheck import scatter, with_linear
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint, noise
from fastdiff.backends import Inputs, TrainingDraws, get_backend
from fastdiff.cli import main
from fastdiff.denoiser import Asked, asked_on, checked_asked
from fastdiff.denoisers import Gaussian, exact_chain
from fastdiff.errors import ArgumentError, CheckpointError, QualityWarning
from fastdiff.noise import Draw, Stream
from fastdiff.samplers import ddim, ddpm, dpmpp_2m

NUMPY, CPU = get_backend("numpy"), get_backend("cpu")
T = 9
COSINE = fd.Schedule.cosine(T)
CURVES = fd.data.harmonic_curves(60, points=12)
LABELS = np.arange(60) % 3


def curve_net(dtype="float32", **asked):
    return scatter(fd.MLP(13, hidden=(20, 17), T=T, dtype=dtype, **(asked or {"classes": 3, "covariates": 2})))


def picture_net(dtype="float32", **asked):
    asked = asked or {"classes": 3, "covariates": 2}
    return scatter(fd.UNet((4, 4, 1), channels=(4, 8), blocks=1, T=T, dtype=dtype, **asked))


def wishes(net, n, seed=0):
    """Labels and covariates for samples of a network."""
    random = np.random.default_rng(seed)
    labels = None if net.classes is None else random.integers(0, net.classes, n)
    return {"labels": labels, "covariates": None if net.covariates is None else random.normal(size=(n, net.covariates))}


# ------------------------------------------------------------------------------------------- truth


def exploding(steps):
    """The limit of exploding variance: signal 1, noise from 0.002 to 200, written with signal^2 + noise^2 = 1."""
    alphas_bar = 1 / (1 + np.geomspace(2e-3, 200, steps) ** 2)
    return fd.Schedule.from_betas(1 - alphas_bar / np.append(1, alphas_bar[:-1]))


@pytest.mark.parametrize("g", [2, 3, 5])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_variance_of_guided_gaussians(sampler, g):
    """p(x) = N(0, 2), p(x | c) = N(0, 1) (Bradley and Nakkiran 2024): neither is 2 / (g + 1), that of the power."""
    variances = []
    for steps in (100, 200):
        schedule = exploding(steps)
        of_all, of_class = (Gaussian(np.zeros(1), [[variance]], schedule) for variance in (2.0, 1.0))
        table = fd.samplers.ddim(schedule, steps) if sampler == "ddim" else ddpm(schedule)
        variances.append(exact_chain(fd.Guided(of_class, g, of_all), table).cov[0, 0])
    want = 2.0 ** (1 - g) if sampler == "ddim" else (2 - 2.0 ** (2 - 2 * g)) / (2 * g - 1)
    assert variances[0] < variances[1] < want  # of first order, from below
    assert abs((2 * variances[1] - variances[0]) / want - 1) < 0.01
    assert abs(2 / (g + 1) / want - 1) > 0.1


def test_samples_of_a_guided_pair_have_the_chain_s_law():
    schedule = fd.Schedule.cosine(20)
    of_class, of_all = (Gaussian(np.full(2, m), s * np.eye(2), schedule) for m, s in ((1.0, 0.5), (0.0, 2.0)))
    guided, table = fd.Guided(of_class, 2.5, of_all), ddpm(schedule)
    x, law = fd.sample(guided, table, n=4000, seed=3), exact_chain(guided, table)
    assert np.abs(x.mean(axis=0) - law.mean).max() < 4 * np.sqrt(law.cov[0, 0] / 4000)
    assert abs(x.var() / law.cov[0, 0] - 1) < 4 * np.sqrt(2 / 8000)


# ------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("be", ["numpy", "cpu"])
@pytest.mark.parametrize("make", [curve_net, picture_net, lambda: with_linear(curve_net())])
def test_one_batch_and_every_way_to_run_a_table(make, be):
    net = make()
    table = dpmpp_2m(COSINE, T - 1, prediction="v")
    asked, options = wishes(net, 9), {"n": 9, "seed": 5, "backend": be}
    plain = fd.sample(net, table, **asked, **options)
    assert_same_bits(fd.sample(net, table, guidance=1, **asked, **options), plain)
    strong = fd.sample(net, table, guidance=3, **asked, **options)
    assert np.abs(strong - plain).max() > 0.01
    stepwise, path = fd.sample(net, table, guidance=3, trajectory=True, **asked, **options)
    if be == "cpu":  # elsewhere a product's bits may depend on its batch
        assert_same_bits(stepwise, strong)
    assert_close(stepwise, strong, terms=100)
    assert len(path) == T
    parts = [
        fd.sample(
            net, table, guidance=3, n=b - a, seed=5, first_sample=a, backend=be,
            **{name: None if part is None else part[a:b] for name, part in asked.items()},
        )
        for a, b in itertools.pairwise((0, 1, 6, 9))
    ]  # fmt: skip
    if be == "cpu":
        assert_same_bits(np.concatenate(parts), strong)
    else:
        assert_close(np.concatenate(parts), strong, terms=100)
    free = fd.sample(net, table, guidance=0, **options)
    assert_same_bits(fd.sample(net, table, guidance=0, **asked, **options), free)
    assert np.abs(free - plain).max() > 0.01


def test_many_curves_have_the_bits_of_their_steps():
    """Beyond a tile, guided and not, in an interval and with a weight of 0."""
    net = with_linear(curve_net())
    asked, table = wishes(net, 150), ddpm(COSINE, prediction="v")
    for options in ({}, {"guidance": 2.5}, {"guidance": 2.5, "guidance_interval": (2, 6)}, {"guidance": 0.0}):
        fused = fd.sample(net, table, n=150, backend=CPU, **asked, **options)
        stepwise = fd.sample(net, table, n=150, backend=CPU, callback=lambda i, t, x: None, **asked, **options)
        assert_same_bits(fused, stepwise)
        few = {name: part[70:73] for name, part in asked.items()}
        assert_same_bits(fd.sample(net, table, n=3, first_sample=70, backend=CPU, **few, **options), fused[70:73])
        single = fd.sample(net, table, n=150, backend=get_backend("cpu", threads=1), **asked, **options)
        assert_same_bits(single, fused)
        assert_close(fused, fd.sample(net, table, n=150, backend=NUMPY, **asked, **options), terms=2000)


def test_an_interval_guides_within_alone():
    seen = []

    def function(x, t, labels=None):
        seen.append((t, labels is not None))
        return 0 * x + (0 if labels is None else 1)

    table = ddim(COSINE, T)
    fd.sample(function, table, n=2, shape=3, labels=1, guidance=2.0, guidance_interval=(3, 4))
    assert seen == [(t, told) for t in reversed(range(T)) for told in ((True, False) if t in (3, 4) else (True,))]


def test_rescaling_brings_the_deviation_back():
    c, u = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    out = np.empty_like(c)
    NUMPY.guide(c, u, 4.0, 1.0, out)
    assert_close(out.std(axis=1), c.std(axis=1), terms=100)
    NUMPY.guide(c, u, 4.0, 0.0, out)
    assert out.std() > 2 * c.std()
    net, table = curve_net(), ddim(COSINE, 4, prediction="v")
    asked = wishes(net, 3)
    plain, strong = (fd.sample(net, table, n=3, **asked, guidance=g, rescale=r) for g, r in ((1, 0), (4, 0)))
    both = fd.sample(net, table, n=3, **asked, guidance=4, rescale=1.0)
    assert np.abs(both - strong).max() > 0.01 < np.abs(both - plain).max()


# ------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", [fd.MLP, fd.UNet])
def test_gradients_of_what_is_asked(kind):
    """Of the tensors that only labels and covariates touch, every entry, against differences in float64."""
    asked = {"classes": 3, "covariates": 2, "T": T, "dtype": "float64"}
    if kind is fd.MLP:
        net = scatter(fd.MLP(5, hidden=(6, 4), **asked))
    else:
        net = scatter(fd.UNet((2, 2, 1), channels=(2,), blocks=1, embedding=5, attention=(False,), **asked))
    n, random = 5, np.random.default_rng(1)
    x, target = random.normal(size=(2, n, *net.shape))
    t, labels = random.integers(0, T, n), np.array([0, 1, 2, 3, 1])  # 3: the null class
    covariates = np.column_stack([random.normal(size=(n, 2)), np.ones(n)])
    covariates[2] = 0
    grads = net.layout.zeros(np.float64)
    if kind is fd.MLP:
        asked = net.plan.asks(labels, covariates, np.float64)
        NUMPY.mlp_gradient(net.plan, net.flat, Inputs(x, t, asked), target, grads)

        def loss(flat):
            return np.mean((NUMPY.mlp_forward(net.plan, flat, Inputs(x, t, asked)) - target) ** 2)
    else:
        runner = net.runner(NUMPY)
        batch = runner.batch(n, labels=True, covariates=True)
        arrays = (x, t, target, labels, covariates.reshape(n, 1, 1, 3))
        for place, values in zip((*batch[:4], batch.covariates), arrays, strict=True):
            place[...] = values
        runner.gradient(batch, grads)

        told = Asked(labels, covariates)
        y = np.empty_like(x)

        def loss(flat):
            net.runner(NUMPY, flat).fill(y, x, t, told)
            return np.mean((y - target) ** 2)

    found = net.layout.views(grads)
    names = [name for name in found if name.startswith(("asked", "class", "covariate"))]
    assert names
    for name in names:
        for index in np.ndindex(found[name].shape):
            moved = [net.flat.copy() for _ in range(2)]
            for sign, flat in zip((1e-6, -1e-6), moved, strict=True):
                net.layout.views(flat)[name][index] += sign
            slope = (loss(moved[0]) - loss(moved[1])) / 2e-6
            assert abs(slope - found[name][index]) < 1e-7 * (1 + abs(slope)), (name, index)


def test_products_with_a_guided_jacobian():
    net = curve_net("float64")
    guided, x = fd.Guided(net, 2.5).on(NUMPY, net.shape), np.random.default_rng(0).normal(size=(4, 13))
    asked = asked_on(NUMPY, net, *checked_asked(net, **wishes(net, 4), n=4, dtype=np.float64))
    v, w = np.random.default_rng(1).normal(size=(2, 4, 13))
    moved = [guided.evaluate(x + sign * v, 3, asked).copy() for sign in (1e-6, -1e-6)]
    slope = (moved[0] - moved[1]) / 2e-6
    along = guided.jvp(x, 3, v, asked).copy()
    assert np.abs(slope - along).max() < 1e-7
    assert abs(np.sum(w * along) - np.sum(v * guided.vjp(x, 3, w, asked))) < 1e-10


def test_cpu_networks_that_are_asked_agree_with_numpy():
    for net in (curve_net(), with_linear(curve_net(classes=4)), curve_net(covariates=3)):
        wide, n = net.flat.astype(np.float64), 300
        random = np.random.default_rng(2)
        x = random.normal(size=(n, 13)).astype(np.float32)
        t = random.integers(0, T, n)
        labels = None if net.classes is None else random.integers(0, net.classes + 1, n)
        numbers = None if net.covariates is None else random.normal(size=(n, net.covariates + 1)).astype(np.float32)
        asked = net.plan.asks(labels, numbers)
        y = CPU.mlp_forward(net.plan, net.flat, Inputs(x, t, asked))
        exact = NUMPY.mlp_forward(net.plan, wide, Inputs(x.astype(np.float64), t, asked.astype(np.float64)))
        assert_close(y, exact, terms=100)
        tables = COSINE.signal, COSINE.noise, np.ones(T), np.zeros(T)
        told = None if labels is None else labels % net.classes
        draws = TrainingDraws(x, *tables, 3, told, covariates=numbers, drop=0.4, classes=net.classes or 0)
        want, got = np.zeros_like(wide), np.zeros_like(net.flat)
        there = draws._replace(data=x.astype(np.float64))
        loss = NUMPY.mlp_train_gradient(net.plan, wide, there, 7, 290, want)
        assert_close(np.float32(CPU.mlp_train_gradient(net.plan, net.flat, draws, 7, 290, got)), loss, terms=100)
        assert_close(got, want, terms=800)
        one = get_backend("cpu", threads=1)
        again = np.zeros_like(got)
        one.mlp_train_gradient(net.plan, net.flat, draws, 7, 290, again)
        assert_same_bits(again, got)


def test_the_law_of_what_is_left_out():
    out = noise.dropped(4000, 0.1, Draw(5, Stream.DROP, 3))
    words = noise.philox_words(4000, 1, Draw(5, Stream.DROP, 3))[:, 0]
    assert (out[:, 0] == (words[:, 0] < round(0.1 * 2**32))).all()
    assert (out[:, 1] == (words[:, 1] < round(0.1 * 2**32))).all()
    assert abs(out.mean(axis=0) - 0.1).max() < 0.02
    assert noise.dropped(50, 1.0, Draw(5, Stream.DROP)).all()
    assert not noise.dropped(50, 0.0, Draw(5, Stream.DROP)).any()


def test_a_batch_leaves_out_labels_and_covariates():
    net = picture_net()
    data = np.zeros((7, 4, 4, 1), np.float32)
    numbers = np.column_stack([np.arange(14.0).reshape(7, 2), np.ones(7)]).astype(np.float32)
    tables = COSINE.signal, COSINE.noise, np.ones(T), np.zeros(T)
    for be in (NUMPY, CPU):
        batch = net.runner(be).batch(50, labels=True, covariates=True)
        draws = TrainingDraws(data, *tables, 9, np.arange(7) % 3, covariates=numbers, drop=0.5, classes=3)
        be.draw_batch(draws, batch, 4, 10)
        rows = noise.scaled_words(50, 7, Draw(9, Stream.BATCH, 4, 10))
        out = noise.dropped(50, 0.5, Draw(9, Stream.DROP, 4, 10))
        assert (batch.labels == np.where(out[:, 0], 3, rows % 3)).all()
        assert (batch.covariates.reshape(50, 3) == np.where(out[:, 1:], 0, numbers[rows])).all()
        assert 10 < out[:, 0].sum() < 40


# ------------------------------------------------------------------------------------------- models


def asked_model(be="cpu", **options):
    net = fd.MLP(12, hidden=(8,), T=T, classes=3, covariates=1)
    model = fd.Diffusion(net, COSINE, seed=1, backend=be)
    return model.fit(CURVES, LABELS, covariates=CURVES[:, 0], **{"steps": 6, "batch": 16, "progress": False} | options)


def test_models_on_two_backends_agree_and_files_bring_everything_back(tmp_path):
    model, other = asked_model(validation=0.2), asked_model("numpy", validation=0.2)
    assert_close(np.float32(model.history["loss"]), np.array(other.history["loss"]), terms=2000)
    options = {"labels": [0, 2], "covariates": [[0.3], [0.1]], "guidance": 2.0, "sampler": "ddim", "steps": 4}
    assert_close(model.sample(2, **options), other.sample(2, **options), terms=5000)
    model.covariate_names = ["start"]
    path = tmp_path / "m.safetensors"
    model.save(path)
    assert {"null class", "covariates"} <= set(checkpoint.describe(path)["features"])
    again = fd.load(path)
    assert_same_bits(again.sample(2, **options), model.sample(2, **options))
    assert again.covariate_names == ["start"]
    for each in (model, again):
        each.fit(CURVES, LABELS, covariates=CURVES[:, 0], steps=3, batch=16, progress=False)
    assert_same_bits(again.net.flat, model.net.flat)
    assert model.history["validation_loss"]


def test_steps_are_those_of_one_run():
    whole, parts = asked_model(label_drop=0.3), asked_model(steps=2, label_drop=0.3)
    parts.fit(CURVES, LABELS, covariates=CURVES[:, 0], steps=4, batch=16, progress=False)  # 0.3 goes on
    assert_same_bits(parts.net.flat, whole.net.flat)
    assert not np.array_equal(asked_model(label_drop=0.0).net.flat, whole.net.flat)


def test_covariates_are_asked_for_in_their_own_units():
    """Other units of the same covariates make the same model, up to rounding."""
    model = asked_model()
    far = fd.Diffusion(fd.MLP(12, hidden=(8,), T=T, classes=3, covariates=1), COSINE, seed=1)
    far.fit(CURVES, LABELS, covariates=1000 + 50 * CURVES[:, :1], steps=6, batch=16, progress=False)
    one = model.sample(3, labels=1, covariates=0.5, guidance=2)
    assert_close(far.sample(3, labels=1, covariates=1025.0, guidance=2), one, terms=5000)
    three = model.sample(3, labels=1, covariates=[0.5, 0.1, 0.5], guidance=2)
    assert_same_bits(three[[0, 2]], one[[0, 2]])
    assert not np.array_equal(three[1], one[1])


def test_networks_that_are_made_take_what_they_are_given():
    model = fd.Diffusion(seed=0).fit(CURVES, LABELS, covariates=CURVES[:, :2], steps=1, progress=False)
    assert (model.net.classes, model.net.covariates, model.net.null_class) == (3, 2, True)
    pictures = CURVES.reshape(60, 4, 3, 1)
    model = fd.Diffusion(seed=0).fit(pictures, covariates=LABELS, steps=1, batch=4, data_range=(-9, 9), progress=False)
    assert (model.net.classes, model.net.covariates) == (None, 1)
    assert model.sample(2, covariates=[[0.0], [2.0]], sampler="ddim", steps=2, guidance=2).shape == (2, 4, 3, 1)


def test_densities_and_missing_values_of_an_asked_model():
    model = asked_model()
    asked = {"covariates": CURVES[:4, 0]}
    dens = model.score_samples(CURVES[:4], LABELS[:4], **asked)
    assert not np.array_equal(dens, model.score_samples(CURVES[:4], LABELS[:4], covariates=CURVES[:4, 0] + 1))
    holes = CURVES[:4].copy()
    holes[1:, 3] = np.nan
    filled = model.impute(holes, 2, labels=LABELS[:4], **asked, steps=4, sampler="ddim")
    assert np.isfinite(filled).all()
    assert_same_bits(filled[:, 0], np.stack([holes[0]] * 2).astype(filled.dtype))
    with pytest.raises(ArgumentError, match="covariates: got None"):
        model.score_samples(CURVES[:4], LABELS[:4])


def test_older_networks_have_no_null_class(tmp_path):
    config = fd.UNet((4, 4, 1), channels=(4, 8), blocks=1, T=T, classes=3).to_dict()
    assert config.pop("null_class") is True
    old = fd.nn.network_of(config)
    assert old.params["class_embedding.weight"].shape[0] == 3
    assert not old.null_class
    assert "null_class" not in old.to_dict()
    assert "covariates" not in old.to_dict()
    model = fd.Diffusion(old, COSINE).fit(CURVES.reshape(60, 4, 3, 1)[:, :, [0, 1, 2, 2]], LABELS, steps=1, batch=2,
                                          data_range=(-9, 9), progress=False)  # fmt: skip
    assert model._label_drop == 0
    with pytest.raises(ArgumentError, match="label_drop"):
        model.fit(CURVES.reshape(60, 4, 3, 1)[:, :, [0, 1, 2, 2]], LABELS, steps=1, label_drop=0.1, progress=False)
    with pytest.raises(ArgumentError, match=r"guidance: got 2\.0.*no null class"):
        model.sample(1, labels=0, guidance=2.0)
    assert (
        "null class"
        not in (model.save(tmp_path / "m.safetensors"), checkpoint.describe(tmp_path / "m.safetensors"))[1]["features"]
    )


def test_a_file_with_damaged_covariates_is_refused(tmp_path):
    model, path = asked_model(), tmp_path / "m.safetensors"
    model._covariates.deviation[:] = 0
    with pytest.raises(CheckpointError, match=r"covariates\.deviation"):
        model.save(path)
    assert not path.exists()


# ------------------------------------------------------------------------------------------- bad input


PLAIN = fd.Diffusion(fd.MLP(12, hidden=(8,), T=T), COSINE)
REFUSED = {
    "labels of a network without": (lambda m: PLAIN.sample(1, labels=1), "labels.*no classes"),
    "guidance of a network that is asked nothing": (lambda m: PLAIN.sample(1, guidance=2), "guidance.*labels or cov"),
    "guidance trained without dropping": (
        lambda m: asked_model(label_drop=0.0).sample(1, labels=1, covariates=1.0, guidance=2), "label_drop=0.1",
    ),
    "label_drop of a network that is asked nothing": (
        lambda m: PLAIN.fit(CURVES, steps=1, label_drop=0.1, progress=False), "label_drop.*nothing is asked",
    ),
    "label_drop above 1": (lambda m: asked_model(label_drop=1.5), "label_drop"),
    "covariates missing in training": (
        lambda m: m.fit(CURVES, LABELS, steps=1, progress=False), "covariates: got None, wants 1 numbers",
    ),
    "covariates missing": (lambda m: m.sample(2, labels=1, guidance=2), "covariates: got None, wants 1 numbers"),
    "covariates of another width": (
        lambda m: m.sample(2, labels=1, covariates=np.zeros((2, 3))), r"covariates: got shape \(2, 3\)",
    ),
    "covariates of another number": (
        lambda m: m.sample(2, labels=1, covariates=np.zeros((3, 1))), r"covariates: got shape \(3, 1\)",
    ),
    "covariates that are not finite": (lambda m: m.sample(1, labels=1, covariates=np.nan), "covariates"),
    "covariates of a network without": (lambda m: PLAIN.sample(1, covariates=1.0), "covariates.*no covariates"),
    "covariates in training of a network without": (
        lambda m: PLAIN.fit(CURVES, covariates=LABELS, steps=1), "covariates.*no covariates",
    ),
    "labels missing": (lambda m: m.sample(2, covariates=1.0, guidance=2), "labels: got None, wants a class"),
    "mixed None labels": (lambda m: m.sample(2, labels=[0, None], covariates=1.0), "labels"),
    "the null class by number": (lambda m: m.sample(2, labels=3, covariates=1.0), "labels: got 3"),
    "negative guidance": (lambda m: m.sample(1, labels=1, covariates=1.0, guidance=-1), "guidance: got -1"),
    "guidance that is no number": (lambda m: m.sample(1, labels=1, covariates=1.0, guidance="2"), "guidance"),
    "an interval outside T": (
        lambda m: m.sample(1, labels=1, covariates=1.0, guidance=2, guidance_interval=(0, T)), "guidance_interval",
    ),
    "an interval that runs backwards": (
        lambda m: m.sample(1, labels=1, covariates=1.0, guidance=2, guidance_interval=(5, 2)), "guidance_interval",
    ),
    "an interval without guidance": (
        lambda m: m.sample(1, labels=1, covariates=1.0, guidance_interval=(0, 2)), "guidance",
    ),
    "rescale above 1": (lambda m: m.sample(1, labels=1, covariates=1.0, guidance=2, rescale=2), "rescale"),
    "one exact denoiser": (lambda m: fd.Guided(Gaussian(np.zeros(2), np.eye(2), COSINE), 2), "unconditional"),
    "two that disagree": (
        lambda m: fd.Guided(
            Gaussian(np.zeros(2), np.eye(2), COSINE), 2, Gaussian(np.zeros(3), np.eye(3), COSINE)
        ), "unconditional: got shape",
    ),
    "a denoiser with observations": (
        lambda m: fd.Guided(fd.condition(m.denoiser(), fd.Known(np.full(12, np.nan)), schedule=COSINE), 2), "Guided",
    ),
    "classes without a layer": (lambda m: fd.MLP(3, hidden=(), classes=2), "hidden"),
    "no covariates": (lambda m: fd.MLP(3, covariates=0), "covariates"),
    "covariates beside classes without null": (
        lambda m: fd.UNet((4, 4, 1), channels=(4,), classes=2, null_class=False, covariates=1), "null_class",
    ),
    "a weight of scale 0": (lambda m: fd.Weight(lambda x: x, scale=0), "scale"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    PLAIN.fit(CURVES, steps=1, batch=4, progress=False)
    return asked_model()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, trained):
    call, match = REFUSED[case]
    with pytest.raises(ArgumentError, match=match):
        call(trained)


def test_a_file_of_a_perceptron_with_keys_that_it_cannot_have():
    config = fd.MLP.tutorial(12, T=T).to_dict()
    assert "classes" not in config
    with pytest.raises(ArgumentError, match="kind"):
        fd.nn.network_of(config | {"classes": 3})


# ------------------------------------------------------------------------------------------- weights and products


def test_a_scaled_weight_is_its_power():
    """N(0, 1) weighed by exp(-x^2 / 2)^s is N(0, 1 / (1 + s))."""
    schedule = fd.Schedule.cosine(50)
    prior = Gaussian(np.zeros(1), np.eye(1), schedule)
    given = fd.Weight(lambda x: (-(x[:, 0] ** 2) / 2, -x), scale=3.0)
    assert given.log_weights(np.full((1, 1), 2.0))[0] == -6
    assert given.gradients(np.full((1, 1), 2.0))[0, 0] == -6
    x = fd.sample(prior, ddpm(schedule), n=4096, given=given, method="smc", seed=2)
    assert abs(x.var() / 0.25 - 1) < 0.15


def test_products_are_sums_of_scores_and_particles_are_right():
    """N(0, 1) N(1, 1/2) is N(2/3, 1/3) but for a factor."""
    schedule = fd.Schedule.cosine(50)
    first = Gaussian(np.zeros(1), np.eye(1), schedule)
    second = Gaussian(np.ones(1), 0.5 * np.eye(1), schedule)
    with pytest.warns(QualityWarning, match="not the score of the noised product"):
        both = fd.product(first, second)
    x = np.linspace(-2, 2, 7)[:, None]
    score = [each.predict(x, 20) for each in (first, second)]
    assert_close(both.predict(x, 20), score[0] + score[1], terms=10)
    assert exact_chain(both, ddim(schedule, 50)).cov[0, 0] < 0.5 / 3  # too narrow, as the warning says

    given = fd.Weight(lambda x: (-((x[:, 0] - 1) ** 2), -2 * (x - 1)))
    drawn = fd.sample(first, ddpm(schedule), n=4096, given=given, method="smc", seed=1)
    assert abs(drawn.mean() - 2 / 3) < 0.05
    assert abs(drawn.var() * 3 - 1) < 0.15


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_a_product_is_the_same_in_every_prediction(prediction):
    schedule = fd.Schedule.cosine(20)
    laws = [(np.zeros(2), np.eye(2)), (np.ones(2), np.diag([0.5, 2.0]))]
    x, t = np.random.default_rng(0).normal(size=(5, 2)), 11
    with pytest.warns(QualityWarning):
        of_noise, other = (
            fd.product(*(Gaussian(mean, cov, schedule, prediction=name) for mean, cov in laws))
            for name in ("noise", prediction)
        )
    eps, signal, level = of_noise.predict(x, t), schedule.signal[t], schedule.noise[t]
    x0 = (x - level * eps) / signal
    want = {"x0": x0, "v": signal * eps - level * x0, "velocity": eps - x0}[prediction]
    assert_close(other.predict(x, t), want, terms=10)
    A, offset = other.affine(prediction, t)
    assert_close(x @ A.T + offset, want, terms=10, dtype=np.float32)


# ------------------------------------------------------------------------------------------- where users meet it


def test_covariates_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = np.column_stack([np.arange(60), LABELS, CURVES])
    np.savetxt("t.csv", table, "%.9g", ",", header="age,size," + ",".join(f"v{k}" for k in range(12)), comments="")
    train = ["train", "t.csv", "--steps", "2", "--batch", "8", "--quiet", "--covariates", "age,size"]
    assert main([*train, "-o", "m.safetensors"]) == 0
    model = fd.load("m.safetensors")
    assert (model.net.points, model.net.covariates, model.covariate_names) == (12, 2, ["age", "size"])
    by_hand = fd.Diffusion(seed=0).fit(CURVES, covariates=table[:, :2], steps=2, batch=8, progress=False)
    assert_same_bits(model.net.flat, by_hand.net.flat)
    sample = ["sample", "m.safetensors", "-n", "3", "-o", "new.csv", "--quiet", "--overwrite"]
    sample += ["--guidance", "2", "--covariates"]
    for asked in ("30,1", "size=1,age=30", "asked.csv"):
        np.savetxt("asked.csv", [[30, 1]] * 3, "%g", ",")
        assert main([*sample, asked]) == 0
        drawn = fd.data.load_curves("new.csv")
        assert_close(drawn, model.sample(3, covariates=[30.0, 1.0], guidance=2.0), terms=1000)
    capsys.readouterr()
    for words, told in (
        ([*sample, "30"], "1 numbers, where the model has 2"),
        ([*sample, "age=30,weight=1"], "'weight=1'"),
        ([*sample, "30,none"], "'none'"),
        (["train", "t.csv", "--resume", "m.safetensors", "--steps", "1"], "--covariates is wanted"),
        (["score", "m.safetensors", "t.csv", "-o", "s.csv"], "--covariates is wanted"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err
    assert main(["train", "t.csv", "--resume", "m.safetensors", *train[2:]]) == 0


def test_the_example_draws_its_picture(tmp_path, capsys):
    example = Path(__file__).parents[1] / "examples" / "guidance.py"
    runpy.run_path(str(example))["main"](["-o", str(tmp_path), "-n", "100", "--steps", "40"])
    printed = capsys.readouterr().out
    upper = [float(share) for share in re.findall(r"g = \d: ([\d.]+)", printed)]
    assert upper[1] < upper[2] < upper[3]
    assert [path.name for path in tmp_path.iterdir()] == ["guidance.png"]


# ------------------------------------------------------------------------------------------- what is asked is drawn


@pytest.mark.slow
def test_drawn_amplitudes_are_those_asked_for():
    random = np.random.default_rng(0)
    amplitudes, phases = random.uniform(0.5, 3, 2000), random.uniform(0, 2 * np.pi, (2000, 1))
    x = np.linspace(0, 4 * np.pi, 32)
    waves = np.stack([np.sin(x), np.cos(x)])
    X = amplitudes[:, None] * np.sin(x + phases) + 0.05 * random.normal(size=(2000, 32))
    model = fd.Diffusion(seed=0).fit(
        X, covariates=amplitudes, steps=3000, decay_steps=3000, judge=False, progress=False
    )
    asked = random.uniform(0.5, 3, 300)
    drawn = np.linalg.norm(model.sample(300, covariates=asked) @ np.linalg.pinv(waves), axis=1)
    assert np.corrcoef(asked, drawn)[0, 1] > 0.98
    free = np.linalg.norm(model.sample(300, guidance=0) @ np.linalg.pinv(waves), axis=1)
    assert free.std() > 0.5 * amplitudes.std()  # of all amplitudes
