"""U-Nets: every gradient, sizes, labels, dropout, memory, configuration and bad input."""

import copy
import gc
import inspect
import itertools
import json
import logging
import pickle
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradcheck import assert_gradient
from rows import three_back
from tolerances import WORKSPACE, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends import Backend, get_backend
from fastdiff.backends.layers import Batch
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.errors import ArgumentError, BackendError
from fastdiff.nn import UNet
from fastdiff.nn.layers import NO_DRAW, Program
from fastdiff.noise import Draw, Stream, fill_uniform
from fastdiff.sampling import sample
from fastdiff.schedule import Schedule

NUMPY = get_backend("numpy")

NETS = {
    "plain": {"shape": (3, 5, 1), "channels": (2, 3)},
    "curves": {"shape": (7,), "channels": (4, 2, 3), "classes": 3},
    "series": {"shape": (5, 3), "channels": (3, 4), "classes": 2, "outputs": 6},
    "scale and shift": {
        "shape": (2, 3, 2), "channels": (4, 6), "scale_shift": True, "dropout": 0.3, "groups": 2, "eps": 0.1,
    },
    "one level": {"shape": (2, 2, 2), "channels": (4,), "head_width": 2, "dropout": 0.5, "classes": 2, "outputs": 3},
    "other conventions": {
        "shape": (5, 4, 1), "channels": (5, 6), "attention": (True, False), "up_attention": (False, True), "padding": 0,
        "middle_attention": False, "flip": False, "frequency_shift": 1, "embedding": 7, "eps": 1e-3,
    },
}  # fmt: skip
nets = pytest.mark.parametrize("options", NETS.values(), ids=NETS)


def made(options, dtype="float64", **more):
    net = UNet(**{"blocks": 1, "T": 9, "dtype": dtype, "embedding": 3, **options, **more})
    random = np.random.default_rng(0)
    for name, view in net.params.items():
        view[...] = random.normal(size=view.shape) / np.sqrt(view[..., 0].size if view.ndim > 1 else 4)
        view += "norm" in name and name.endswith("weight")
    return net


DRAW = Draw(3, Stream.DROPOUT, 2)


def batch_of(net, n=2, seed=1):
    """x, t, target and labels."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, *net.shape)).astype(net.dtype)
    target = random.normal(size=(n, *net.image[:2], net.outputs)).astype(net.dtype)
    labels = None if net.classes is None else random.integers(0, net.classes, n)
    return x, random.integers(0, net.T, n), target, labels


def gradient(net, batch, backend="numpy", draw=NO_DRAW):
    x, t, target, labels = batch
    grads = net.layout.zeros(net.dtype)
    for view in net.layout.views(grads).values():
        view[...] = np.nan
    loss = net.runner(get_backend(backend)).gradient(Batch(x, t, target, labels), grads, draw)
    return float(loss[0]), grads


# ------------------------------------------------------------------------------------------- gradients


def assert_gradient_along(net, directions):
    """Check the gradient of all parameters in some directions (k, layout.size), with dropout drawn."""
    x, t, target, labels = batch = batch_of(net)
    given = {"x": x.reshape(2, *net.image), "t": t, "labels": labels, "features": net._features}
    kept, at, program = net.flat.copy(), np.zeros(len(directions)), planned(net, 2, training=True)

    def loss():
        net.flat[...] = kept + at @ directions
        return np.mean((program.run(NUMPY, net.params, given, draw=DRAW) - target) ** 2)

    value, grads = gradient(net, batch, draw=DRAW)
    assert_close(value, loss())
    assert_gradient(loss, at, directions @ grads)
    return grads


def planned(net, n, training):
    program = Program(n, "training" if training else "output")
    net.record(program)
    program.plan()
    program.lay(np.full(program.size, np.nan, net.dtype))
    return program


@pytest.mark.slow
def test_every_gradient_of_a_network():
    net = made({"shape": (3,), "channels": (2, 2), "embedding": 2, "classes": 2, "dropout": 0.3})
    used = net.layout.zeros(bool)
    for view in net.layout.views(used).values():
        view[...] = True
    grads = assert_gradient_along(net, np.eye(len(used))[used])
    assert not grads[~used].any()
    assert used.sum() == net.layout.count


@pytest.mark.slow
@nets
def test_the_gradient_of_every_tensor_in_some_direction(options):
    net, random = made(options), np.random.default_rng(2)
    directions = np.zeros((len(net.params), net.layout.size))
    for direction, name in zip(directions, net.params, strict=True):
        view = net.layout.views(direction)[name]
        view[...] = random.normal(size=view.shape)
    grads = assert_gradient_along(net, directions)
    for name, view in net.layout.views(grads).items():
        assert np.any(view), name


@nets
def test_the_loss_is_that_of_the_prediction(options, backend):
    net = made(options, "float32", dropout=0.0)
    batch = x, t, target, labels = batch_of(net, 3)
    y = net.predict(x, t, labels, backend=backend)
    assert y.dtype == np.float32
    loss, _ = gradient(net, batch, backend)
    assert_close(loss, np.mean((y.reshape(target.shape) - target) ** 2), dtype=np.float32, terms=target.size)


@nets
def test_backends_agree_with_float64(options, backend):
    net, wide = made(options, "float32"), made(options)
    wide.flat[...] = net.flat
    batch = batch_of(net, 3)
    wide_batch = [a.astype(np.float64) if a is not None and a.dtype == np.float32 else a for a in batch]
    y, want = (
        net.predict(*batch[:2], batch[3], backend=backend),
        wide.predict(*wide_batch[:2], batch[3], backend="numpy"),
    )
    assert_close(y, want, terms=200)
    (loss, grads), (want_loss, want_grads) = gradient(net, batch, backend), gradient(wide, wide_batch)
    assert_close(loss, want_loss, dtype=np.float32, terms=200)
    scale = np.abs(want_grads).max()
    for key, view in net.layout.views(grads).items():
        assert_close(view, wide.layout.views(want_grads)[key], terms=400, scale=scale)
    assert not np.isnan(grads).any()


# ------------------------------------------------------------------------------------------- memory


def apart(program):
    """Give every value of a planned program memory of its own."""
    size = 0
    for block in program._blocks:
        block.offset, size = size, size + block.size
    program.lay(np.full(size, np.nan, np.float32))


@nets
@pytest.mark.parametrize("training", [False, True])
def test_values_that_share_memory_do_not_disturb_each_other(options, training):
    net = made(options, "float32", dropout=0.0)
    x, t, target, labels = batch_of(net, 3)
    given = {"x": x.reshape(3, *net.image), "t": t, "labels": labels, "features": net._features}
    results = []
    for separate in (False, True):
        program = planned(net, 3, training)
        if separate:
            apart(program)
        grads = net.layout.zeros(np.float32) if training else None
        views = None if grads is None else net.layout.views(grads)
        results.append((program.run(NUMPY, net.params, {**given, "target": target}, views).copy(), grads))
    assert_same_bits(results[0][0], results[1][0])
    if training:
        assert_same_bits(results[0][1], results[1][1])
    assert program.size < 0.7 * sum(block.size for block in program._blocks)


def test_batches_of_any_size_in_one_arena(backend):
    net = made(NETS["plain"], "float32")
    batches = {n: batch_of(net, n) for n in (3, 1, 7)}
    fresh = {n: gradient(copy.deepcopy(net), batch, backend) for n, batch in batches.items()}
    for n in (3, 7, 1, 3, 7):
        loss, grads = gradient(net, batches[n], backend)
        assert loss == fresh[n][0]
        assert_same_bits(grads, fresh[n][1])
        net.predict(*batches[n][:2], backend=backend)


def test_more_images_than_fit_at_once(backend):
    net = made(NETS["curves"], "float32")
    x, t, _, labels = batch_of(net, 7)
    whole = net.predict(x, t, labels, backend=backend)
    net.chunk = 3
    parts = net.predict(x, t, labels, backend=backend)
    if backend == "numpy":  # where BLAS decides how it adds
        assert_close(parts, whole, terms=100)
    else:
        assert_same_bits(parts, whole)
    assert net.predict(x[:0], t[:0], labels[:0], backend=backend).shape == (0, 7)


def test_samples_of_images_in_chunks(backend):
    """A table that remembers, visits again and goes up: at once, in chunks, row by row, and on more threads."""
    net = made(NETS["plain"], "float32")
    smp, at = three_back(Schedule.cosine(net.T), clip=(-2.0, 2.0)), {"n": 7, "seed": 5, "backend": backend}
    whole = sample(net, smp, **at)
    assert_close(whole, sample(net, smp, n=7, seed=5, backend="numpy"), terms=1000 * len(smp))
    net.chunk = 3
    others = [sample(net, smp, **at), sample(net, smp, **at, trajectory=True)[0], sample(net, smp, **at, batch=4)]
    if backend == "cpu":
        others += [sample(net, smp, n=7, seed=5, backend=get_backend("cpu", threads=threads)) for threads in (1, 2)]
    for other in others:
        if backend == "numpy":  # where BLAS decides how it adds
            assert_close(other, whole, terms=1000 * len(smp))
        else:
            assert_same_bits(other, whole)


def test_a_step_allocates_nothing_large():
    net = UNet((16, 16, 1), channels=(8, 16), T=9)
    batch = batch_of(net, 8)
    grads, be = net.layout.zeros(np.float32), get_backend("cpu")
    for _ in range(2):
        net.runner(be).gradient(Batch(*batch), grads)
    tracemalloc.start()
    net.runner(be).gradient(Batch(*batch), grads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < WORKSPACE


@pytest.mark.parametrize("change", ["weights", "fit"])
def test_a_denoiser_has_the_weights_that_it_was_made_of(backend, change, tmp_path):
    """Their copies, and forms of them, come to lie where those of a denoiser before lay."""
    X = np.random.default_rng(8).normal(size=(12, 8, 8, 1)).astype(np.float32)
    model = fd.Diffusion(UNet((8, 8, 1), channels=(16, 32), blocks=1, T=10), backend=backend)
    model.fit(X, steps=1, batch=4, progress=False, judge=False)
    for _ in range(4):
        if change == "fit":
            model.fit(X, steps=1, batch=4, progress=False, judge=False)
            model.save(tmp_path / "m.safetensors")
            other = fd.load(tmp_path / "m.safetensors", backend=backend)
            for ema in (True, False):
                got, want = (each.sample(2, sampler="ddim", steps=3, ema=ema) for each in (model, other))
                assert_same_bits(got, want)
        else:
            model.net.flat *= np.float32(1.2)
            got = fd.nn.NetworkDenoiser(model.net, model.net.flat, "v", get_backend(backend)).predict(X[:2], 3)
            assert_same_bits(got, model.net.predict(X[:2], 3, backend=backend))


@pytest.mark.parametrize("shape", [NETS["plain"]["shape"], (8, 8, 1)])
def test_nothing_of_the_callers_is_kept(backend, shape):
    net = made({**NETS["plain"], "shape": shape}, "float32")
    x, t, target, _ = batch_of(net)
    flat, grads = net.flat.copy(), net.layout.zeros(net.dtype)
    net.predict(x, t, backend=backend, flat=flat)
    net.runner(get_backend(backend), flat).gradient(Batch(x, t, target), grads)
    gone = [weakref.ref(array) for array in (x, flat, grads, target)]
    del x, flat, grads, target
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_two_threads_at_once(backend):
    net = made(NETS["plain"], "float32")
    batches = [batch_of(net, 4, seed) for seed in range(8)]
    alone = [net.predict(x, t, backend=backend) for x, t, _, _ in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: net.predict(*batch[:2], backend=backend), batches))
    for got, want in zip(together, alone, strict=True):
        assert_same_bits(got, want)


def test_losses_of_two_networks_do_not_mix():
    """A loss may be read after another thread's gradient has been computed on the same backend."""
    nets = [made({"shape": (8, 8, 1), "channels": (4, 8), "seed": seed}, "float32") for seed in range(2)]
    be = get_backend("cpu")
    losses = []
    for net in nets:
        x, t, target, labels = batch_of(net)
        grads = net.layout.zeros(net.dtype)
        losses.append(net.runner(be).gradient(Batch(x * (1 + net.seed), t, target, labels), grads))
    again = [gradient(net, (x * (1 + net.seed), *rest), "cpu")[0] for net in nets for x, *rest in [batch_of(net)]]
    assert [float(loss[0]) for loss in losses] == again
    assert again[0] != again[1]


# ------------------------------------------------------------------------------------------- what goes in and out


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((1, 1, 1), (4,)),
        ((9, 4, 3), (4, 6)),
        ((50,), (4, 4, 4)),
        ((24, 5), (4, 6, 8)),
        ((13, 1), (4, 4)),
        ((1, 7), (4,)),
        ((1, 13, 2), (3, 5)),
        ((4, 4, 1), (2, 3, 4)),
        ((8, 1, 2), (7,)),
    ],
)
def test_shapes(shape, channels, backend):
    net = UNet(shape, channels=channels, blocks=1, T=5)
    assert net.shape == shape
    x = np.ones((2, *shape), np.float64)
    y = net.predict(x, [1, 4], backend=backend)
    assert y.shape == x.shape
    assert not y.any()  # the last layer starts at zero
    assert_same_bits(net.predict(x, 3, backend=backend), net.predict(x, [3, 3], backend=backend))


def test_a_series_is_an_image_of_height_one(backend):
    """Of the same weights, bit for bit: in what it predicts, and in both products with the Jacobian."""
    series, image = (made({"shape": shape, "channels": (4, 6)}, "float32") for shape in ((7, 3), (1, 7, 3)))
    assert {view.shape[:2] for view in series.params.values() if view.ndim == 4} == {(1, 1), (1, 3)}
    image.flat[...] = series.flat
    x, t, _, _ = batch_of(series, 3)
    for call, *vector in (("predict",), ("vjp", x[::-1]), ("jvp", np.stack([x, x + 1]))):
        y = getattr(series, call)(x, t, *vector, backend=backend)
        want = getattr(image, call)(x[:, None], t, *(v[..., None, :, :] for v in vector), backend=backend)
        assert y.shape[-3:] == x.shape
        assert_same_bits(y, want.reshape(y.shape))


def test_padding_is_of_zeros():
    net = made({"shape": (3, 5, 1), "channels": (2, 3)})
    wide = made({"shape": (4, 6, 1), "channels": (2, 3)})
    x, t, _, _ = batch_of(net)
    padded = np.zeros((2, 4, 6, 1))
    padded[:, :3, :5] = x
    assert_same_bits(net.predict(x, t, backend="numpy"), wide.predict(padded, t, backend="numpy")[:, :3, :5])


def test_time_and_labels_matter():
    net = made(NETS["curves"], T=50)
    x = np.repeat(batch_of(net, 1)[0], 50, axis=0)
    by_time = net.predict(x, np.arange(50), 1, backend="numpy")
    assert len(np.unique(by_time[:, 0].round(9))) == 50
    by_label = net.predict(x[:3], 4, np.arange(3), backend="numpy")
    assert len(np.unique(by_label[:, 0].round(9))) == 3


def test_other_parameters(backend):
    net = made(NETS["plain"], "float32")
    x, t, _, _ = batch_of(net)
    want = net.predict(x, t, backend=backend)
    kept, net.flat = net.flat, np.zeros_like(net.flat)
    assert not net.predict(x, t, backend=backend).any()
    assert_same_bits(net.predict(x, t, backend=backend, flat=kept), want)


def test_dropout_is_the_noise_law(backend):
    net = made({**NETS["plain"], "dropout": 0.4}, "float32")
    x, t, target, labels = batch = batch_of(net, 4)
    draw = Draw(5, Stream.DROPOUT, 1, 2)
    loss, grads = gradient(net, batch, backend, draw)
    again = gradient(net, batch, backend, draw)
    assert again[0] == loss
    assert_same_bits(again[1], grads)
    for other in ({"step": 2}, {"seed": 6}, {"first_row": 3}):
        assert gradient(net, batch, backend, draw._replace(**other))[0] != loss
    halves = [gradient(net, (x[a:b], t[a:b], target[a:b], labels), backend, draw.after(a)) for a, b in ((0, 2), (2, 4))]
    assert_close((halves[0][0] + halves[1][0]) / 2, loss, dtype=np.float32, terms=200)
    assert_close((halves[0][1] + halves[1][1]) / 2, grads, terms=400)


def test_every_dropout_has_its_own_blocks():
    net = UNet((5, 7, 1), channels=(4, 8), blocks=1, dropout=0.1)
    used = []

    class Recorder(NumpyBackend):
        def dropout(self, x, out, rate, first_block, draw):
            used.append((first_block, first_block + -(-x[0].size // 4)))
            super().dropout(x, out, rate, first_block, draw)

    x, t, target, _ = batch_of(net)
    net.runner(Recorder()).gradient(Batch(x, t, target), net.layout.zeros(np.float32))
    forward, backward = used[:8], used[8:]  # a block on the way down and two on the way up a level, two in the middle
    assert backward == forward[::-1]
    assert len(set(forward)) == 8
    assert all(before[1] == after[0] for before, after in itertools.pairwise(forward))


# ------------------------------------------------------------------------------------------- weights and configuration


def test_weights_are_drawn_by_the_noise_law():
    net = UNet((4, 4, 1), channels=(4, 8), seed=2**40 + 1, classes=5)
    for tensor, (name, view) in enumerate(net.params.items()):
        if name == "conv_in.weight":
            want = np.empty((1, view.size))
            fill_uniform(want, Draw(2**40 + 1, Stream.WEIGHTS, first_row=tensor))
            assert_close(view, (2 * want - 1).reshape(view.shape) / 3, scale=1)
        elif "norm" in name:
            assert np.all(view == name.endswith("weight")), name
        else:
            zero = name.rpartition(".")[0].endswith(("conv2", "to_out.0", "conv_out"))
            assert bool(np.any(view)) != zero, name
    assert abs(net.params["class_embedding.weight"].mean()) < 4 / np.sqrt(5 * 16)
    drawn = net.flat.copy()
    net.flat[...] = 0
    net.redraw()
    assert_same_bits(net.flat, drawn)
    assert np.any(UNet((4, 4, 1), channels=(4, 8), classes=5).flat != drawn)
    assert not UNet((4, 4, 1), channels=(4,), draw=False).flat.any()


@nets
def test_configuration_round_trip(options):
    net = made(options, "float32")
    config = json.loads(json.dumps(net.to_dict()))
    again = UNet.from_dict(config, draw=False)
    assert again.to_dict() == net.to_dict()
    assert again.layout.shapes == net.layout.shapes
    assert not again.flat.any()
    again.flat[...] = net.flat
    x, t, _, labels = batch_of(net)
    assert_same_bits(again.predict(x, t, labels, backend="numpy"), net.predict(x, t, labels, backend="numpy"))
    assert UNet.from_dict(config).flat.any()


def test_every_option_is_in_the_configuration():
    options = set(inspect.signature(UNet).parameters) - {"draw"}
    asked = {"classes": 3, "covariates": 2, "pointwise": True, "masked": True}
    assert set(UNet((4, 4, 1), channels=(4,), **asked).to_dict()) == options | {"kind"}
    newer = {"covariates", "null_class", "pointwise", "masked"}  # where it is used: networks of 0.1.0 had it not
    assert set(UNet((4, 4, 1), channels=(4,)).to_dict()) == (options | {"kind"}) - newer


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_independent(again, backend):
    net = made(NETS["plain"], "float32")
    x, t, _, _ = batch_of(net)
    want = net.predict(x, t, backend=backend)
    other = again(net)
    assert len(pickle.dumps(net)) < 2 * net.flat.nbytes + 20_000  # no arena in it
    net.flat[...] = 0
    assert_same_bits(other.predict(x, t, backend=backend), want)


@pytest.mark.parametrize(
    ("channels", "groups"), [((32, 64, 128), 8), ((6, 9), 1), ((33, 65), 1), ((128, 256), 32), ((2,), 1), ((12, 20), 2)]
)
def test_groups_are_chosen_and_noted(channels, groups, caplog):
    with caplog.at_level(logging.INFO, "fastdiff"):
        assert UNet((16, 16, 1), channels=channels, blocks=1, draw=False).groups == groups
    assert [record.getMessage() for record in caplog.records] == [
        f"UNet with channels {channels}: {groups} groups in every GroupNorm"
    ]


def test_a_backend_without_layers_says_what_to_do():
    kind = type("Plain", (), {name: getattr(NumpyBackend, name, None) for name in dir(Backend) if name[0] != "_"})
    kind.name, kind.threads, kind.steps_ahead = "plain", 1, 1
    net = UNet((4, 4, 1), channels=(4,))
    with pytest.raises(BackendError, match="'plain' does not run image networks: use backend='cpu'"):
        net.predict(np.zeros((1, 4, 4, 1)), 0, backend=kind())


BAD_OPTIONS = [
    ("shape", {"shape": (8, 8, 1, 1)}), ("shape", {"shape": ()}), ("shape", {"shape": (3, 8)}),
    ("shape", {"shape": (0, 8, 1)}), ("shape", {"shape": 8}), ("shape", {"shape": (8, 0)}),
    ("shape", {"shape": (3, 8, 1)}), ("shape", {"shape": (3,)}), ("shape", {"shape": (8, 8.5, 1)}),
    ("channels", {"channels": ()}), ("channels", {"channels": 32}), ("channels", {"channels": (1, 2, 3)}),
    ("channels", {"channels": (65536,) * 3}), ("channels", {"channels": (4,) * 13}),
    ("attention", {"attention": (True,)}), ("attention", {"attention": True}),
    ("attention", {"attention": (0, 1, 1)}), ("up_attention", {"up_attention": (True,) * 4}),
    ("middle_attention", {"middle_attention": 1}), ("blocks", {"blocks": 0}), ("T", {"T": 0}), ("T", {"T": 1 << 20}),
    ("classes", {"classes": 0}), ("head_width", {"head_width": 17}), ("head_width", {"head_width": 0}),
    ("groups", {"groups": 3}), ("groups", {"groups": 0}), ("dropout", {"dropout": 1}),
    ("dropout", {"dropout": -0.1}), ("scale_shift", {"scale_shift": "yes"}), ("seed", {"seed": -1}),
    ("dtype", {"dtype": "float16"}), ("outputs", {"outputs": 0}), ("embedding", {"embedding": 0}),
    ("padding", {"padding": 2}), ("flip", {"flip": None}), ("frequency_shift", {"frequency_shift": 4}),
    ("eps", {"eps": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "bad"), BAD_OPTIONS)
def test_bad_options(argument, bad):
    with pytest.raises(ArgumentError, match=rf"{argument}: got") as caught:
        UNet(**{"shape": (8, 8, 1), "channels": (8, 12, 16), **bad})
    assert caught.value.argument.endswith(argument)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("x", {"x": np.zeros((2, 4, 5, 1))}), ("x", {"x": np.full((2, 4, 4, 1), np.nan)}),
        ("x", {"x": np.zeros((2, 4, 4, 1), bool)}), ("t", {"t": 10}), ("t", {"t": -1}), ("t", {"t": [1, 2, 3]}),
        ("t", {"t": 0.5}), ("labels", {"labels": None}), ("labels", {"labels": 3}), ("labels", {"labels": [0, -1]}),
        ("labels", {"labels": [0]}), ("labels", {"labels": "two"}), ("labels", {"labels": [0.0, 1.0]}),
        ("flat", {"flat": np.zeros(3)}), ("backend", {"backend": "gpu"}),
    ],
)  # fmt: skip
def test_bad_input(argument, bad):
    net = UNet((4, 4, 1), channels=(4,), T=10, classes=3)
    with pytest.raises(ArgumentError, match=rf"^{argument}: got"):
        net.predict(**{"x": np.zeros((2, 4, 4, 1)), "t": 1, "labels": 0, "backend": "numpy", **bad})


def test_labels_for_a_network_without_classes():
    with pytest.raises(ArgumentError, match=r"^labels: got list, wants None"):
        UNet((4, 4, 1), channels=(4,)).predict(np.zeros((1, 4, 4, 1)), 0, [0], backend="numpy")


def test_float64_is_for_numpy():
    with pytest.raises(ArgumentError, match="'numpy': this network has float64 parameters"):
        UNet((4, 4, 1), channels=(4,), dtype="float64").predict(np.zeros((1, 4, 4, 1)), 0, backend="cpu")


@pytest.mark.parametrize("change", [{"kind": "mlp"}, {"extra": 1}, {"channels": None}, {"shape": [4, "4", 1]}])
def test_bad_configurations(change):
    config = UNet((4, 4, 1), channels=(4,)).to_dict()
    with pytest.raises(ArgumentError):
        UNet.from_dict({**config, **change})
    with pytest.raises(ArgumentError, match=r"^config: got"):
        UNet.from_dict({name: config[name] for name in config if name != "T"})
    with pytest.raises(ArgumentError, match=r"^config: got list"):
        UNet.from_dict([])
