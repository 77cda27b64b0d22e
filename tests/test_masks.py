"""Networks that are told of a mask, and covariates of every point or pixel."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import scatter
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint, noise
from fastdiff.backends import ChainTable, TrainingDraws, get_backend
from fastdiff.backends.layers import Batch
from fastdiff.denoiser import Asked, asked_on, checked_asked
from fastdiff.errors import ArgumentError, CheckpointError
from fastdiff.metrics import crps
from fastdiff.noise import Draw, Stream
from fastdiff.samplers import ddpm, dpmpp_2m

NUMPY, CPU = get_backend("numpy"), get_backend("cpu")
T = 9
COSINE = fd.Schedule.cosine(T)
CURVES = fd.data.harmonic_curves(60, points=12)
HOURS = np.stack([np.broadcast_to(np.arange(12.0), (60, 12)), CURVES.cumsum(axis=1)], axis=-1)
TOLD = {"classes": 2, "covariates": 2, "pointwise": True, "masked": True}


def mlp(dtype="float32"):
    return scatter(fd.MLP((5, 2), hidden=(11, 7), T=T, dtype=dtype, **TOLD))


def unet(dtype="float32", shape=(4, 5, 1)):
    return scatter(fd.UNet(shape, channels=(4, 8), blocks=1, T=T, dtype=dtype, **TOLD))


def drawn_from(net, n=40, dtype=np.float32, flip=False):
    """What a training step draws from: labels, covariates of every point, some values not seen, and masks."""
    random, shape = np.random.default_rng(3), net.image if isinstance(net, fd.UNet) else (net.points,)
    data = np.stack([random.normal(size=(n, *shape)), np.where(random.random((n, *shape)) < 0.2, np.nan, 0)], axis=1)
    numbers = net.covariate_form.marked(NUMPY, random.normal(size=(n, *net.covariate_form.shape)).astype(dtype))
    tables = COSINE.signal, COSINE.noise, *COSINE.target("v")
    terms = random.uniform(0.5, 2, size=(T, 1)).astype(dtype)
    more = {"drop": 0.3, "classes": 2, "masked": True, "targets": ("mask", net.image), "flip": flip}
    return TrainingDraws(
        data.astype(dtype), *tables, 7, random.integers(0, 2, n), terms=terms, covariates=numbers, **more
    )


# ------------------------------------------------------------------------------------------- the law


def naive_targets(image, kind, words_of):
    """Which values of a row are drawn; ``words_of(block)`` are its words."""
    height, width, channels = image
    w0, w1, w2, w3 = words_of(1)
    tenth = w0 * 10 >> 32
    which = -(-tenth // 3) if kind == "mask" else 0 if tenth == 0 else noise.TARGETS.index(kind)
    lines, columns = (w1 * height >> 32) + 1, (w1 * width >> 32) + 1
    out = np.zeros(image, bool)
    if which == 0:
        out[:] = True
    elif which == 1:
        for index in np.ndindex(image):
            i, j, c = index
            cell = i * width + j if height > 1 else j * channels + c
            out[index] = words_of(2 + cell // 4)[cell % 4] <= w1
    elif which == 2:
        top, left = w3 * (height - lines + 1) >> 32, w2 * (width - columns + 1) >> 32
        channel = channels if height > 1 else w3 * (channels + 1) >> 32
        of = slice(None) if channel == channels else channel
        out[top : top + lines, left : left + columns, of] = True
    elif height > 1:
        out[height - lines :] = True
    else:
        out[:, width - columns :] = True
    return out


@pytest.mark.parametrize("image", [(1, 7, 1), (1, 5, 3), (4, 3, 2)])
@pytest.mark.parametrize("kind", noise.TARGETS)
def test_the_law_of_targets(image, kind):
    draw = Draw(5, Stream.DROP, 3, 11)
    found = noise.targets(60, image, kind, draw)
    for row in range(60):
        words = noise.philox_words(1, 12, draw.after(row))[0].tolist()
        assert (found[row] == naive_targets(image, kind, words.__getitem__)).all(), row
    assert (noise.targets(20, image, kind, draw.after(40)) == found[40:]).all()
    share = noise.targets(3000, image, kind, draw).mean(axis=(1, 2, 3))
    assert 0.08 < (share == 1).mean() < 0.35  # nothing is known of a tenth, and of those with the largest ratios
    assert 0.35 < share.mean() < 0.7


def test_nothing_but_what_is_drawn_has_noise_and_a_target():
    net = unet()
    draws, batch = drawn_from(net), net.runner(NUMPY).batch(30, labels=True, covariates=True, known=True, columns=1)
    NUMPY.draw_batch(draws, batch, 4, 10)
    of_rows = Draw(7, Stream.BATCH, 4, 10)
    rows = draws.data[noise.scaled_words(30, 40, of_rows)]
    known = ~noise.targets(30, net.image, "mask", of_rows.of(Stream.DROP)) & ~np.isnan(rows[:, 1])
    assert (batch.marks == known).all()
    assert (batch.known == np.where(known, rows[:, 0], 0)).all()
    signal = COSINE.signal.astype(np.float32)[batch.t].reshape(-1, 1, 1, 1)
    assert (batch.x[known] == (signal * rows[:, 0])[known]).all()
    assert (np.isnan(batch.target) == (known | np.isnan(rows[:, 1]))).all()
    assert not known.all()
    assert known.any()


# ------------------------------------------------------------------------------------------- networks


def test_gradients_of_what_is_told():
    """Every entry of what extra inputs go into, against differences."""
    nets = [scatter(fd.MLP((3, 2), hidden=(4, 3), T=T, dtype="float64", **TOLD))]
    for shape in ((2, 3, 1), (4, 2)):
        small = {"channels": (2,), "blocks": 1, "attention": (False,), "middle_attention": False}
        nets.append(scatter(fd.UNet(shape, T=T, dtype="float64", **small, **TOLD)))
    for net in nets:
        draws = drawn_from(net, dtype=np.float64)
        if isinstance(net, fd.MLP):
            weights = ["asked.weight"]

            def loss(flat, grads, net=net, draws=draws):
                return NUMPY.mlp_train_gradient(net.plan, flat, draws, 5, 4, grads)
        else:
            weights = ["conv_in.weight", "conv_in.bias"]
            batch = net.runner(NUMPY).batch(3, labels=True, covariates=True, known=True, columns=1)
            NUMPY.draw_batch(draws, batch, 5, 0)
            NUMPY.take(draws.terms, batch.t, batch.terms)
            batch = Batch(*(None if array is None else array.copy() for array in batch))

            def loss(flat, grads, net=net, batch=batch):
                return float(net.runner(NUMPY, flat).gradient(batch, grads)[0])

        grads, spare = net.layout.zeros(np.float64), net.layout.zeros(np.float64)
        loss(net.flat, grads)
        for name in weights:
            found = net.layout.views(grads)[name]
            for index in np.ndindex(found.shape):
                moved = [net.flat.copy() for _ in range(2)]
                for sign, flat in zip((1e-6, -1e-6), moved, strict=True):
                    net.layout.views(flat)[name][index] += sign
                slope = (loss(moved[0], spare) - loss(moved[1], spare)) / 2e-6
                assert abs(slope - found[index]) < 1e-7 * (1 + abs(slope)), (name, index)


def test_products_with_the_jacobian_by_x_alone():
    for net in (mlp("float64"), unet("float64")):
        random = np.random.default_rng(0)
        x, v, w = random.normal(size=(3, 2, *net.shape))
        told = {"labels": [0, 1], "covariates": random.normal(size=(2, *net.covariate_form.shape))}
        moved = [net.predict(x + sign * v, 3, backend="numpy", **told) for sign in (1e-6, -1e-6)]
        along = net.jvp(x, 3, v, backend="numpy", **told)
        assert np.abs((moved[0] - moved[1]) / 2e-6 - along).max() < 1e-7
        assert abs(np.sum(w * along) - np.sum(v * net.vjp(x, 3, w, backend="numpy", **told))) < 1e-10


@pytest.mark.parametrize("make", [mlp, unet, lambda: unet(shape=(6, 2))])
def test_cpu_networks_that_are_told_agree_with_numpy(make):
    net, grads = make(), []
    for be in (NUMPY, CPU, get_backend("cpu", threads=1)):
        draws = drawn_from(net)
        grads.append(net.layout.zeros(np.float32))
        if isinstance(net, fd.MLP):
            loss = be.mlp_train_gradient(net.plan, net.flat, draws, 5, 200, grads[-1])
        else:
            loss = float(net.runner(be).drawn_gradient(draws, 5, 3, 9, grads[-1])[0])
        assert np.isfinite(loss)
    assert_close(grads[1], grads[0], terms=800)
    assert_same_bits(grads[2], grads[1])


def asked_of(net, be, n):
    random = np.random.default_rng(4)
    covariates = random.normal(size=(n, *net.covariate_form.shape)).astype(np.float32)
    marks = random.random((n, net.points)) < 0.5
    known = np.hstack([np.where(marks, random.normal(size=marks.shape), 0), marks]).astype(np.float32)
    asked = checked_asked(net, random.integers(0, 2, n), covariates, n)
    return asked_on(be, net, *asked, be.asarray(known)), marks, known


@pytest.mark.parametrize("table", [ddpm(COSINE, prediction="v"), dpmpp_2m(COSINE, 5, prediction="v")])
@pytest.mark.parametrize("guided", [False, True])
def test_a_chain_that_holds_what_is_known(table, guided, any_backend):
    """In one piece with the bits of steps, in any batch, and as the reference does it."""
    net, be, n = mlp(), any_backend, 70
    x0 = np.random.default_rng(5).normal(size=(n, net.points)).astype(np.float32)
    asked, _, _ = asked_of(net, be, n)
    told = net.runner(be)._asks(asked)
    levels = COSINE.signal[[row.t for row in table.rows]].astype(np.float32)
    weights = np.linspace(1, 2, len(table)).astype(np.float32) if guided else None
    draw, params = Draw(1, Stream.STEP), be.asarray(net.flat)
    chain = ChainTable(table.rows, None, weights, levels)

    def run(part):
        x = be.asarray(x0[part].copy())
        be.mlp_chain(net.plan, params, x, chain, draw.after(part.start), be.asarray(be.to_numpy(told)[part]))
        return be.to_numpy(x)

    whole = run(slice(0, n))
    assert_same_bits(np.concatenate([run(slice(0, 3)), run(slice(3, n))]), whole)
    want = x0.astype(np.float64)
    of_all = be.to_numpy(told).astype(np.float64)
    NUMPY.mlp_chain(net.plan, net.flat.astype(np.float64), want, chain, draw, of_all)
    assert_close(whole, want, terms=5000)


# ------------------------------------------------------------------------------------------- models


def told_model(be="cpu", X=CURVES, **options):
    given = {"steps": 6, "batch": 16, "progress": False} | options
    conditional = given.pop("conditional", "mask")
    net = fd.MLP(12, hidden=(16,), T=T, masked=conditional is not None)
    return fd.Diffusion(net, COSINE, conditional=conditional, seed=1, backend=be).fit(X, **given)


def holes(n=5):
    X = CURVES[:n].astype(float)
    X[:, 4:8] = np.nan
    X[2] = CURVES[2]
    X[3] = np.nan
    X[3, 5] = CURVES[3, 5]
    return X


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_draws_are_those_of_other_methods(sampler):
    """Known values to the bit, draw k in any call, rows by their number, and the hidden value draws what it did."""
    model, X = told_model(), holes()
    how = {"sampler": sampler, "steps": 6}
    drawn = model.impute(X, 8, **how)
    there = ~np.isnan(X)
    assert (drawn[:, there] == X[there]).all()
    assert_same_bits(model.impute(X, 3, first_draw=4, **how), drawn[4:7])
    assert_same_bits(model.impute(X[:2], 8, **how), drawn[:, :2])
    known = fd.Known(X)
    assert_same_bits(model.sample(8, given=known, batch=3, **how), drawn)
    loud = fd.Diffusion(model.net, COSINE, backend="numpy", seed=1)
    loud.normaliser, loud._average = model.normaliser, model._average
    loud._optimizer = model._optimizer
    assert_close(np.float32(loud.impute(X, 8, **how)), np.float32(drawn), terms=20_000)
    assert model.forecast(CURVES[:3, :8], 4, 2, **how).shape == (2, 3, 4)
    assert model.forecast(CURVES[0], 9, 2, **how).shape == (2, 9)


def test_nothing_known_is_unconditional_and_the_same_as_all_unknown():
    model = told_model()
    none = fd.Known(np.full(12, np.nan))
    assert_same_bits(model.sample(4, given=none), model.sample(4))


def test_files_bring_the_mask_back(tmp_path, monkeypatch):
    model = told_model(conditional="tail", validation=0.2)
    path = tmp_path / "m.safetensors"
    model.save(path)
    assert "mask" in checkpoint.describe(path)["features"]
    again = fd.load(path)
    assert again.conditional == "tail"
    assert_same_bits(again.impute(holes(), 3), model.impute(holes(), 3))
    for each in (model, again):
        each.fit(CURVES, steps=3, batch=16, progress=False)
    assert_same_bits(again.net.flat, model.net.flat)
    whole = told_model(conditional="tail", validation=0.2, steps=9)
    assert_same_bits(whole.net.flat, model.net.flat)
    monkeypatch.setattr(checkpoint, "FEATURES", checkpoint.FEATURES - {"mask"})
    with pytest.raises(CheckpointError, match="'mask'"):
        fd.load(path)


def test_rows_with_gaps_teach_what_is_there():
    X = CURVES.astype(float)
    X[np.random.default_rng(0).random(X.shape) < 0.3] = np.nan
    model = told_model(X=X, validation=0.2)
    assert np.isfinite(model.history["loss"]).all()
    assert np.isfinite(model.history["validation_loss"]).all()
    assert np.isfinite(model.impute(X[:4], 2)).all()


WRONG = [
    ({"given": fd.Known(holes()[0], noise=0.1)}, "given.*values with noise"),
    ({"given": fd.Linear(np.ones((1, 12)), [1.0], 0.1)}, "given.*a Linear"),
    ({"given": fd.Known(holes()[0]), "method": "tmpd"}, "method.*'auto'"),
    ({"given": [fd.Known(holes()[0]), fd.Known(holes()[0] + 1)]}, "given.*different values"),
]


def test_what_a_mask_cannot_tell_is_refused():
    model = told_model()
    for options, match in WRONG:
        with pytest.raises(ArgumentError, match=match):
            model.sample(2, **options)
    with pytest.raises(ArgumentError, match="conditional"):
        fd.Diffusion(conditional="gaps")
    with pytest.raises(ArgumentError, match=r"net.*masked=True"):
        fd.Diffusion(fd.MLP(12, T=T), COSINE, conditional="mask")
    with pytest.raises(ArgumentError, match=r"known.*not told"):
        fd.MLP(12, T=T).predict(CURVES[:2], 0, known=CURVES[:2])


@pytest.mark.parametrize("kind", ["curves", "series", "pictures"])
def test_covariates_of_every_point(kind, tmp_path):
    X = {"curves": CURVES, "series": CURVES[..., None], "pictures": CURVES[:, :9].reshape(60, 3, 3, 1)}[kind]
    c = HOURS[:, :9].reshape(60, 3, 3, 2) if kind == "pictures" else HOURS
    model = fd.Diffusion(backend="cpu", seed=2)
    model.fit(X, covariates=c, steps=3, batch=8, progress=False, validation=(X[:9], c[:9]))
    net = model.net
    assert (net.covariates, net.pointwise, net.covariate_form.shape) == (2, True, c.shape[1:])
    assert np.allclose(model._covariates.mean, c.reshape(-1, 2).mean(axis=0))
    scatter(net)
    model._average[...] = net.flat
    how = {"sampler": "ddim", "steps": 4}
    drawn = model.sample(3, covariates=c[:3], **how)
    assert_same_bits(model.sample(3, covariates=np.stack([c[0], c[1], c[2]]), **how), drawn)
    assert_same_bits(model.sample(1, covariates=c[0], **how), drawn[:1])
    assert np.abs(model.sample(3, covariates=c[3:6], **how) - drawn).max() > 0
    assert np.abs(model.sample(3, guidance=0.0, **how) - drawn).max() > 0  # left out at times, as other covariates are
    for bad, match in ((c[:3, ..., :1], "shape"), (c[:2], "shape"), (None, "None"), (c[:3, 0, ..., 0], "shape")):
        with pytest.raises(ArgumentError, match=f"covariates.*{match}"):
            model.sample(3, covariates=bad, **how)
    model.save(tmp_path / "m.safetensors")
    assert "known inputs" in checkpoint.describe(tmp_path / "m.safetensors")["features"]
    assert_same_bits(fd.load(tmp_path / "m.safetensors").sample(3, covariates=c[:3], **how), drawn)
    if kind == "pictures":
        with pytest.raises(ArgumentError, match="flip"):
            model.fit(X, covariates=c, steps=1, flip=True, progress=False)


def test_known_inputs_of_past_and_horizon():
    """What the horizon's inputs are changes the forecast, and not its past."""
    model = fd.Diffusion(fd.MLP(12, hidden=(8,), T=T, covariates=2, pointwise=True), COSINE, backend="cpu")
    model.fit(CURVES, covariates=HOURS, steps=3, batch=8, progress=False)
    scatter(model.net)
    model._average[...] = model.net.flat
    past, c = CURVES[:2, :8], HOURS[:2].copy()
    first = model.forecast(past, 4, 3, covariates=c)
    assert first.shape == (3, 2, 4)
    c[1, 9:] += 5
    second = model.forecast(past, 4, 3, covariates=c)
    assert_same_bits(second[:, 0], first[:, 0])
    assert np.abs(second[:, 1] - first[:, 1]).max() > 0
    long = np.concatenate([HOURS[0], HOURS[1]])
    assert model.forecast(CURVES[0], 12, 2, covariates=long).shape == (2, 12)
    gaps = np.concatenate([CURVES[0], CURVES[1]]).astype(float)
    gaps[5:9] = np.nan
    assert model.impute(gaps, 2, covariates=long).shape == (2, 24)
    with pytest.raises(ArgumentError, match=r"covariates.*\(2, 12, 2\)"):
        model.forecast(past, 4, 3, covariates=c[:, :8])


def test_a_known_input_is_followed():
    """A curve that is its input and noise: draws given the input have its mean."""
    random = np.random.default_rng(0)
    c = random.normal(size=(400, 8, 1))
    X = (2 * c[..., 0] + 0.1 * random.normal(size=(400, 8))).astype(np.float32)
    net = fd.MLP(8, hidden=(32, 32), T=20, covariates=1, pointwise=True)
    model = fd.Diffusion(net, fd.Schedule.cosine(20), backend="cpu", base=None)
    model.fit(X, covariates=c, steps=600, batch=128, lr=3e-3, decay_steps=600, progress=False, judge=False, ema=0.98)
    drawn = model.sample(400, covariates=c, sampler="ddim", steps=10)
    assert np.corrcoef(drawn.reshape(-1), c.reshape(-1))[0, 1] > 0.97


@pytest.mark.slow
def test_masks_of_a_gaussian_are_answered_as_its_conditionals():
    """AR(1): CRPS of imputation and forecast within 6 % of the exact conditional's, bands near theirs."""
    d, rho, random = 8, 0.8, np.random.default_rng(0)
    S = rho ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
    X, V = (random.multivariate_normal(np.zeros(d), S, n).astype(np.float32) for n in (8000, 200))
    model = fd.Diffusion(conditional="mask", backend="cpu", seed=1)
    model.fit(X, steps=2500, batch=256, decay_steps=2500, progress=False, judge=False)
    for gone in (random.random(V.shape) < 0.5, np.broadcast_to(np.arange(d) >= 6, V.shape)):
        ours, exact = model.impute(np.where(gone, np.nan, V), 60), np.repeat(V[None].astype(float), 60, axis=0)
        for i, u in enumerate(gone):
            if u.any():
                gain = S[np.ix_(u, ~u)] @ np.linalg.inv(S[np.ix_(~u, ~u)])
                cov = S[np.ix_(u, u)] - gain @ S[np.ix_(~u, u)]
                exact[:, i, u] = random.multivariate_normal(gain @ V[i, ~u], cov, 60)
        ratio = crps(ours, V)[gone].mean() / crps(exact, V)[gone].mean()
        assert 0.94 < ratio < 1.06
        low, high = np.quantile(ours, (0.1, 0.9), axis=0)
        assert abs(((low <= V) & (high >= V))[gone].mean() - 0.8) < 0.06


def test_what_is_asked_comes_in_parts():
    asked = Asked(None, None, np.arange(8).reshape(4, 2))
    assert len(asked) == 4
    assert (asked[1:3].known == [[2, 3], [4, 5]]).all()
