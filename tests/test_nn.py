"""Networks and their optimiser: every gradient against differences, layout, initialisation, plan, and bad input."""

import copy
import json
import math
import pickle

import naive
import numpy as np
import pytest
from gradcheck import assert_gradient, scatter, with_linear
from scipy import stats
from tolerances import P_VALUE, assert_close, assert_same_bits

from fastdiff.backends import Inputs, TrainState, get_backend
from fastdiff.backends.numpy import functions as reference
from fastdiff.errors import ArgumentError
from fastdiff.nn import MLP
from fastdiff.nn.mlp import sinusoidal_features
from fastdiff.nn.optim import TrainingPlan
from fastdiff.nn.params import ALIGNMENT, Layout
from fastdiff.noise import Stream

NUMPY = get_backend("numpy")

# ------------------------------------------------------------------------------------------- gradients


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape) for shape in shapes]


def test_linear():
    x, w, b, dy = arrays((4, 3), (3, 5), (5,), (4, 5))
    gradients = reference.linear_backward(dy, x, w)
    for array, gradient in zip((x, w, b), gradients, strict=True):
        assert_gradient(lambda: np.sum(reference.linear(x, w, b) * dy), array, gradient)


@pytest.mark.parametrize("kind", ["none", "leaky_relu", "silu"])
def test_activate(kind):
    v, dy = arrays((4, 7), (4, 7))
    v[0] = (-50, -5, -0.5, 0.25, 1, 5, 50)
    assert_gradient(lambda: np.sum(reference.activate(v, kind) * dy), v, reference.activate_backward(dy, v, kind))


def test_activations_are_their_formulas():
    v = np.array([-800.0, -3.0, -0.0, 0.0, 2.0, 800.0])
    assert_close(reference.activate(v, "silu"), [naive.silu(x) for x in v], scale=0)
    assert_close(reference.activate(v, "leaky_relu"), [naive.leaky_relu(x) for x in v], scale=0)
    assert reference.activate_backward(np.ones(2), np.zeros(2), "leaky_relu").tolist() == [0.01, 0.01]


@pytest.mark.parametrize("rows", [1, 4])
def test_modulate(rows):
    u, gain, shift, dv = arrays((rows, 3), (rows, 3), (rows, 3), (rows, 3))
    gradients = reference.modulate_backward(dv, u, gain)
    for array, gradient in zip((u, gain, shift), gradients, strict=True):
        assert_gradient(lambda: np.sum(reference.modulate(u, gain, shift) * dv), array, gradient)


def test_embedding():
    t = np.array([2, 0, 2, 2, 4])
    table, drows = arrays((6, 3), (5, 3))
    assert_gradient(lambda: np.sum(table[t] * drows), table, reference.embedding_backward(drows, t, 6))


def test_squared_error():
    y, target = arrays((4, 3), (4, 3))
    loss, dy = reference.squared_error(y, target)
    assert_close(loss, np.mean((y - target) ** 2), dtype=np.float64)
    assert_gradient(lambda: reference.squared_error(y, target)[0], y, dy)


NETS = {
    "no hidden layer": lambda **kw: MLP(3, hidden=(), T=4, **kw),
    "one hidden layer": lambda **kw: MLP(3, hidden=(5,), T=4, **kw),
    "three hidden layers": lambda **kw: MLP(2, hidden=(3, 1, 7), T=6, **kw),
    "one point": lambda **kw: MLP(1, hidden=(17,), T=1, **kw),
    "tutorial": lambda **kw: MLP.tutorial(3, T=4, **kw),
    "tutorial of one": lambda **kw: MLP.tutorial(1, T=2, **kw),
    "linear part": lambda **kw: with_linear(MLP(3, hidden=(5,), T=4, **kw)),
    "part of rank": lambda **kw: with_linear(MLP(4, hidden=(5,), T=4, **kw), 2),
}
nets = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


@nets
def test_every_gradient_of_a_network(make):
    net = scatter(make(dtype="float64"))
    x, target = arrays((5, net.points), (5, net.points), seed=1)
    t = np.array([1, 1, 0, 3, 1]) % net.T  # timesteps repeat

    def loss():
        return float(np.mean((net.predict(x, t, backend="numpy") - target) ** 2))

    grads = np.full(net.layout.size, np.nan)
    value, dx = NUMPY.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)
    assert_close(value, loss(), dtype=np.float64)
    assert_gradient(loss, x, dx)
    views = net.layout.views(grads)
    assert set(views) == set(net.params)
    for name, view in net.params.items():
        assert np.any(views[name]), name
        assert_gradient(loss, view, views[name])
    assert not grads[padding(net.layout)].any()


# ------------------------------------------------------------------------------------------- layout


def padding(layout):
    mask = np.ones(layout.size, bool)
    for view in layout.views(mask).values():
        view[...] = False
    return mask


def test_a_layout_is_one_aligned_buffer_of_views():
    layout = Layout({"a": (3, 5), "b": (16,), "c": (17,), "d": ()})
    assert layout.offsets == {"a": 0, "b": 16, "c": 32, "d": 64}
    assert layout.size == 80
    assert layout.count == 15 + 16 + 17 + 1
    flat = layout.zeros(np.float32)
    for number, view in enumerate(layout.views(flat).values(), 1):
        view[...] = number
        assert not any(offset % ALIGNMENT for offset in layout.offsets.values())
    assert [int((flat == k).sum()) for k in range(5)] == [80 - layout.count, 15, 16, 17, 1]


@nets
def test_params_are_views_of_the_flat_buffer(make):
    net = make()
    for view in net.params.values():
        assert np.shares_memory(view, net.flat)
    assert net.flat.dtype == np.float32
    assert net.layout.count == sum(view.size for view in net.params.values())
    assert padding(net.layout).sum() == net.layout.size - net.layout.count


@nets
def test_padding_stays_zero_in_training(make, backend):
    net, be = scatter(make()), get_backend(backend)
    buffers = m, v, average = [net.layout.zeros(np.float32) for _ in range(3)]
    grads = net.layout.zeros(np.float32)
    random = np.random.default_rng(0)
    for step in range(5):
        x, target = random.normal(size=(2, 6, net.points)).astype(np.float32)
        be.mlp_gradient(net.plan, net.flat, Inputs(x, random.integers(0, net.T, 6)), target, grads)
        be.adamw(TrainState(net.flat, grads, m, v, average), TrainingPlan().options(step, step))
    for buffer in (net.flat, grads, *buffers):
        assert buffer.any()
        assert not buffer[padding(net.layout)].any()


def test_training_learns(backend):
    """The optimiser and the gradients together reach a target that the network can represent."""
    net, be = MLP(3, hidden=(16,), T=4, seed=1), get_backend(backend)
    grads, m, v, average = (net.layout.zeros(np.float32) for _ in range(4))
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    t = np.arange(64) % 4
    target = (x * (1 + t[:, None])).astype(np.float32)
    losses = []
    for step in range(300):
        losses.append(be.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)[0])
        be.adamw(TrainState(net.flat, grads, m, v, average), TrainingPlan(lr=0.02, ema=0.9).options(step, step))
    assert losses[-1] < losses[0] / 100
    kept = net.flat.copy()
    net.flat[...] = average
    assert be.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)[0] < losses[0] / 100
    assert not np.array_equal(kept, average)


# ------------------------------------------------------------------------------------------- initialisation


def test_weights_are_the_noise_law():
    """Tensor k takes row k of stream WEIGHTS; the last layer and the modulation start at zero."""
    net = MLP(6, hidden=(5, 3), T=4, seed=2**64 - 3)
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")] + ["time.weight", "time.bias"]
    assert list(net.params) == names
    for tensor, (name, fan_in) in enumerate(zip(names, (6, 6, 5, 5, 3, 3, 32, 32), strict=True)):
        view = net.params[name]
        drawn = naive.uniform(1, view.size, seed=2**64 - 3, stream=Stream.WEIGHTS, first_sample=tensor)[0]
        want = np.array([(2 * u - 1) / math.sqrt(fan_in) for u in drawn]).reshape(view.shape)
        if name in ("layers.2.weight", "time.weight", "time.bias"):
            want = np.zeros_like(want)
        assert_same_bits(view, want.astype(np.float32))


def test_the_tutorial_starts_as_its_text_says():
    net = MLP.tutorial(50, T=100, seed=4)
    shapes = {name: view.shape for name, view in net.params.items()}
    assert [shapes[f"layers.{i}.weight"] for i in range(4)] == [(50, 100), (100, 200), (200, 100), (100, 50)]
    assert shapes["time.weight"] == (100, 200)
    for i, fan_in in enumerate((50, 100, 200, 100)):
        for kind in ("weight", "bias"):
            scaled = (net.params[f"layers.{i}.{kind}"].ravel() * math.sqrt(fan_in) + 1) / 2
            assert stats.kstest(scaled, "uniform").pvalue > P_VALUE
    assert stats.kstest(net.params["time.weight"].ravel(), "norm").pvalue > P_VALUE


@nets
def test_a_seed_decides_the_weights(make):
    assert_same_bits(make(seed=3).flat, make(seed=3).flat)
    assert not np.array_equal(make(seed=3).flat, make(seed=4).flat)
    assert_same_bits(make(seed=3, dtype="float64").flat.astype(np.float32), make(seed=3).flat)
    net = scatter(make(seed=3))
    net.redraw()
    assert_same_bits(net.flat, make(seed=3).flat)


def test_an_untrained_default_network_predicts_a_constant():
    net = MLP(5, T=10)
    y = net.predict(np.random.default_rng(0).normal(size=(4, 5)), [0, 3, 3, 9])
    assert_same_bits(y, np.broadcast_to(net.params["layers.3.bias"], (4, 5)))


def test_time_features():
    features = sinusoidal_features(100)
    assert features.shape == (100, 32)
    for t in (0, 1, 57, 99):
        assert_close(features[t], naive.time_features(100, t), scale=1000)


# ------------------------------------------------------------------------------------------- prediction


@nets
def test_predict_takes_one_timestep_or_many(make, backend):
    net = scatter(make())
    x = np.random.default_rng(0).normal(size=(4, net.points))
    t = net.T - 1
    want = net.predict(x.astype(np.float32), t, backend=backend)
    assert want.shape == x.shape
    assert want.dtype == np.float32
    for given in (np.full(4, t), [t] * 4, np.int8(t)):
        assert_same_bits(net.predict(x, given, backend=backend), want)
    assert_same_bits(net.predict(np.asfortranarray(x), t, backend=backend), want)
    assert_same_bits(net.predict((x * 0).astype(int), t, backend=backend), net.predict(x * 0, t, backend=backend))
    assert net.predict(x[:0], t, backend=backend).shape == (0, net.points)
    if net.plan.linear is None:
        assert_same_bits(net.predict(x, t, backend=backend, flat=np.zeros(net.flat.size)), np.zeros_like(want))


def test_float64_networks_run_on_numpy_only():
    net = scatter(MLP(3, T=5, dtype="float64"))
    assert net.predict(np.ones((2, 3)), 1, backend="numpy").dtype == np.float64
    with pytest.raises(ArgumentError, match=r"^backend: got 'cpu', wants 'numpy'"):
        net.predict(np.ones((2, 3)), 1, backend="cpu")


@pytest.mark.parametrize(
    ("x", "t", "more", "argument"),
    [
        (np.ones((2, 4)), 1, {}, "x"),
        (np.ones(3), 1, {}, "x"),
        (np.ones((2, 3), complex), 1, {}, "x"),
        (np.full((2, 3), math.nan), 1, {}, "x"),
        (np.full((2, 3), 1e300), 1, {}, "x"),
        (None, 1, {}, "x"),
        (np.ones((2, 3)), 5, {}, "t"),
        (np.ones((2, 3)), -1, {}, "t"),
        (np.ones((2, 3)), [1, 2, 3], {}, "t"),
        (np.ones((2, 3)), 1.0, {}, "t"),
        (np.ones((2, 3)), 1, {"labels": [0, 1]}, "labels"),
        (np.ones((2, 3)), 1, {"backend": "gpu"}, "backend"),
        (np.ones((2, 3)), 1, {"flat": np.ones(3, np.float32)}, "flat"),
    ],
)
def test_bad_predictions_are_refused(x, t, more, argument):
    with pytest.raises(ArgumentError) as caught:
        MLP(3, T=5).predict(x, t, **more)
    assert caught.value.argument == argument


# ------------------------------------------------------------------------------------------- configuration


@nets
@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_networks_survive_copy_and_pickle(make, again, backend):
    net = scatter(make())
    other = again(net)
    assert_same_bits(other.flat, net.flat)
    x = np.ones((2, net.points))
    assert_same_bits(other.predict(x, 0, backend=backend), net.predict(x, 0, backend=backend))
    other.params["layers.0.bias"][...] = 7
    assert not (net.params["layers.0.bias"] == 7).any()
    assert (other.flat == 7).any()


@nets
def test_a_configuration_goes_through_json(make):
    for net in (make(seed=2**64 - 1), make(seed=5, dtype="float64")):
        stored = json.loads(json.dumps(net.to_dict()))
        other = MLP.from_dict(stored)
        assert repr(other) == repr(net)
        assert other.to_dict() == net.to_dict()
        assert other.layout.shapes == net.layout.shapes
        if net.plan.linear is None:  # it comes from the data, and changes how the last layer starts
            assert_same_bits(other.flat, net.flat)
        assert not MLP.from_dict(stored, draw=False).flat.any()


GOOD = MLP(3, hidden=(4,), T=5).to_dict()


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        ({"kind": "unet"}, "kind"),
        ({"kind": None}, "kind"),
        ({"points": None}, "points"),
        ({"points": "3"}, "points"),
        ({"points": 0}, "points"),
        ({"hidden": None}, "hidden"),
        ({"hidden": 4}, "hidden"),
        ({"hidden": [0]}, "hidden"),
        ({"hidden": ["a"]}, "hidden"),
        ({"T": 0}, "T"),
        ({"T": 2**40}, "T"),
        ({"seed": -1}, "seed"),
        ({"dtype": "int8"}, "dtype"),
        ({"kind": "tutorial"}, "hidden"),
        ({"width": 3}, "config"),
    ],
)
def test_bad_configurations_are_refused(bad, argument):
    with pytest.raises(ArgumentError) as caught:
        MLP.from_dict(GOOD | bad)
    assert caught.value.argument == argument


def test_a_configuration_is_complete():
    for key in GOOD:
        with pytest.raises(ArgumentError, match="config: got"):
            MLP.from_dict({name: value for name, value in GOOD.items() if name != key})
    for config in (None, [], "modulated"):
        with pytest.raises(ArgumentError, match="config: got"):
            MLP.from_dict(config)


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"points": 0}, "points"),
        ({"points": 1 << 20}, "points"),
        ({"points": 3.0}, "points"),
        ({"hidden": (4, 0)}, "hidden"),
        ({"hidden": (4, 1 << 20)}, "hidden"),
        ({"hidden": 128}, "hidden"),
        ({"hidden": "128"}, "hidden"),
        ({"T": 0}, "T"),
        ({"T": True}, "T"),
        ({"seed": -1}, "seed"),
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": None}, "dtype"),
    ],
)
def test_bad_networks_are_refused(kwargs, argument):
    for make in (MLP, MLP.tutorial):
        if make == MLP.tutorial and "hidden" in kwargs:
            continue
        with pytest.raises(ArgumentError) as caught:
            make(**{"points": 3} | kwargs)
        assert caught.value.argument == argument


# ------------------------------------------------------------------------------------------- the training plan


def test_the_rate_is_a_function_of_the_absolute_step():
    assert {TrainingPlan(lr=0.5).rate(step) for step in (0, 1, 10**9)} == {0.5}
    plan = TrainingPlan(lr=0.5, warmup=4)
    assert [plan.rate(step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    plan = TrainingPlan(lr=0.5, warmup=4, decay_steps=104)
    assert plan.rate(4) == 0.5
    assert plan.rate(3) == 0.5
    assert plan.rate(54) == pytest.approx(0.5 * (0.01 + 0.99 / 2))
    assert plan.rate(79) == pytest.approx(0.5 * (0.01 + 0.99 * (1 - math.sqrt(0.5)) / 2))
    assert plan.rate(104) == plan.rate(10**6) == pytest.approx(0.005)
    rates = [plan.rate(step) for step in range(4, 110)]
    assert rates == sorted(rates, reverse=True)


def test_the_scalars_of_a_step():
    options = TrainingPlan(lr=0.5, beta1=0.8, beta2=0.9, weight_decay=0.1, clip_norm=2.0).options(2, 0)
    assert options.rate == 0.5
    assert (options.beta1, options.beta2, options.decay, options.clip_norm) == (0.8, 0.9, 0.1, 2.0)
    assert options.correction1 == pytest.approx(1 - 0.8**3)
    assert options.correction2 == pytest.approx(1 - 0.9**3)
    assert TrainingPlan(clip_norm=None).options(0, 0).clip_norm == math.inf


def test_the_average_warms_up_by_its_own_counter():
    plan = TrainingPlan(ema=0.999)
    assert [plan.options(1000, n).ema for n in (0, 1, 8)] == [1 / 10, 2 / 11, 9 / 18]
    assert plan.options(0, 10**6).ema == 0.999
    assert TrainingPlan(ema=None).options(0, 50).ema == 0
    assert TrainingPlan(ema=0.05).options(0, 0).ema == 0.05


def test_a_plan_goes_through_json():
    plan = TrainingPlan(lr=0.3, warmup=2, decay_steps=9, clip_norm=None, ema=None)
    weighted = TrainingPlan(weighting="min_snr", snr_gamma=2.5)
    for each in (plan, weighted):
        assert TrainingPlan.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert weighted.to_dict().keys() - plan.to_dict().keys() == {"weighting", "snr_gamma"}
    for broken in ({}, plan.to_dict() | {"momentum": 1}, {"lr": 1}):
        with pytest.raises(ArgumentError, match="training plan"):
            TrainingPlan.from_dict(broken)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("lr", bad) for bad in (0, -1, math.nan, math.inf, "1", None)),
        *(("warmup", bad) for bad in (-1, 1.5, None)),
        *(("decay_steps", bad) for bad in (0, -5, 2.5, 3)),
        *(("clip_norm", bad) for bad in (0, -1, math.inf)),
        *(("ema", bad) for bad in (-0.1, 1.0, math.nan)),
        *(("beta1", bad) for bad in (-0.1, 1.0)),
        *(("beta2", bad) for bad in (-0.1, 1.0)),
        ("eps", 0),
        ("weight_decay", -1),
    ],
)
def test_bad_plans_are_refused(name, bad):
    with pytest.raises(ArgumentError) as caught:
        TrainingPlan(**{"warmup": 3} | {name: bad})
    assert caught.value.argument == name
