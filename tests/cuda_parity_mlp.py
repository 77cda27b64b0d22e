"""The parity checks of the network operations, beside those of `cuda_parity`: they run on any runtime."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
from cuda_parity import NUMPY, covers
from cuda_parity_conv_mma import bf16
from gradcheck import scatter, with_linear
from rows import three_back
from tolerances import MLP_ERRORS, assert_close, assert_close_in_norm, assert_same_bits

from fastdiff.backends import ChainTable, DenseLayer, Inputs, TrainingDraws, TrainState
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.numpy.mlp import draw_batch
from fastdiff.nn import MLP
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import Draw, Stream
from fastdiff.samplers import Sampler, ddpm, dpmpp_2m
from fastdiff.schedule import Schedule

NETS = {
    "tutorial": lambda: MLP.tutorial(50, T=100),
    "default": lambda: MLP(50, T=100),
    "odd": lambda: MLP(17, hidden=(33, 1, 19), T=11),
    "linear part": lambda: with_linear(MLP(19, hidden=(33, 21), T=11)),
    "part of rank": lambda: with_linear(MLP(19, hidden=(5,), T=11), 6),
}
BATCH = {"small": 37, "full": 8195}
CHAIN_STEPS = {"small": 3, "full": 100}


FORWARD = (
    "mlp_pack", "mlp_chain", "mlp_chain_part", "mlp_time_table", "mlp_bias_activate", "mlp_scale", "mlp_add_part",
)  # fmt: skip


def terms(net):
    """How many products the longest way through the network adds up."""
    linear = net.plan.linear
    of_part = 0 if linear is None else sum(linear.basis.shape)
    return sum(layer.inputs for layer in net.plan.layers) + 32 + of_part


def both_paths(be):
    """The backend, whose networks run in one launch, and one where none fits and all go layer by layer."""
    yield be
    limit = be.runtime.shared_limit
    be.runtime.shared_limit = 64
    try:
        yield CudaBackend(be.runtime)
    finally:
        be.runtime.shared_limit = limit


def networks():
    """Networks whose parameters are all random, and their values in float64."""
    for make in NETS.values():
        net = scatter(make())
        yield net, net.flat.astype(np.float64)


def batch_of(net, n):
    random = np.random.default_rng(n)
    x, target = random.normal(size=(2, n, net.points)).astype(np.float32)
    return x, random.integers(0, net.T, n), target


@covers(
    "mlp", "mlp_pack", "mlp_chain", "mlp_chain_part", "mlp_time_table", "mlp_bias_activate", "mlp_scale", "mlp_add_part"
)
def networks_forward(be, size):
    n = BATCH[size]
    for net, wide in networks():
        x, t, _ = batch_of(net, n)
        want = NUMPY.mlp_forward(net.plan, wide, Inputs(x.astype(np.float64), t))
        with contextlib.closing(both_paths(be)) as paths:
            for path in paths:
                params, x_there, t_there = path.asarray(net.flat), path.asarray(x), path.asarray(t, np.int64)
                got = path.to_numpy(path.mlp_forward(net.plan, params, Inputs(x_there, t_there)))
                assert_close(got, want, terms=terms(net))
                for rows in (slice(3, 9), slice(7, 8)):  # a row does not depend on its batch
                    there = Inputs(path.asarray(x[rows]), path.asarray(t[rows], np.int64))
                    assert_same_bits(path.to_numpy(path.mlp_forward(net.plan, params, there)), got[rows])


def deep_tables(schedule):
    """Tables that remember three rows and two: with all terms, rows without evaluation that go up, and visits."""
    three = three_back(schedule, clip=(-0.9, 0.8))
    return three, Sampler([row._replace(c3=0.0) for row in three.rows], schedule)


@covers(
    "mlp", "mlp_pack", "mlp_chain", "mlp_chain_part", "mlp_time_table", "mlp_bias_activate", "mlp_scale", "mlp_add_part"
)
def chains(be, size):
    n = BATCH[size] // 2
    for number, (net, wide) in enumerate(networks()):
        schedule = Schedule.cosine(net.T)
        steps = min(CHAIN_STEPS[size], net.T - 1)
        tables = ddpm(schedule, steps, clip=1.0), dpmpp_2m(schedule, steps, prediction="v"), *deep_tables(schedule)
        for smp in tables if size == "full" else tables[number % 2 :: 2]:  # each with two networks at least
            x, _, _ = batch_of(net, n)
            draw = Draw(4, Stream.STEP, first_row=2**32 - 5)
            want = x.astype(np.float64)
            NUMPY.mlp_chain(net.plan, wide, want, ChainTable(smp.rows, smp.clip), draw)
            with contextlib.closing(both_paths(be)) as paths:
                for path in paths:
                    params, got = path.asarray(net.flat), path.asarray(x.copy())
                    path.mlp_chain(net.plan, params, got, ChainTable(smp.rows, smp.clip), draw)
                    assert_close(path.to_numpy(got), want, terms=len(smp) * terms(net))
                    part = path.asarray(x[5:].copy())
                    path.mlp_chain(net.plan, params, part, ChainTable(smp.rows, smp.clip), draw.after(5))
                    assert_same_bits(path.to_numpy(part), path.to_numpy(got)[5:])


MMA = "mlp_mma_pack", "mlp_chain_bf16x3", "mlp_chain_bf16"


def rounded_product(x, w, precision):
    """x w as tensor cores multiply: each factor one bf16, or two, whose low parts do not meet."""
    high = [bf16(factor).astype(np.float64) for factor in (x, w)]
    if precision == "bf16":
        return high[0] @ high[1]
    low = [bf16(factor - of.astype(np.float32)).astype(np.float64) for factor, of in zip((x, w), high, strict=True)]
    return high[0] @ high[1] + high[0] @ low[1] + low[0] @ high[1]


def layer_of(plan, k, u, flat, t):
    """What layer k makes of its products u, in float64: a layer whose W is one."""
    layer, m = plan.layers[k], plan.layers[k].outputs
    wide = np.concatenate([flat.astype(np.float64), np.eye(m).ravel()])
    alone = replace(plan, layers=(replace(layer, inputs=m, weight=len(flat)),), linear=None)
    return NUMPY.mlp_forward(alone, wide, Inputs(u, t))


@covers("mlp_mma", *MMA)
def networks_on_tensor_cores(be, size):
    """Layer by layer the formula on rounded factors, which are those that the kernel has itself; the whole, float64."""
    for precision, (net, wide) in ((precision, network) for precision in MLP_ERRORS for network in networks()):
        there, plan, n = CudaBackend(be.runtime, precision=precision), net.plan, BATCH[size]
        x, t, _ = batch_of(net, n)

        def forward(plan, flat, rows=slice(None), there=there, x=x, t=t):
            given = Inputs(there.asarray(x[rows]), there.asarray(t[rows], np.int64))
            return there.to_numpy(there.mlp_forward(plan, there.asarray(flat), given))

        given = x
        for k, layer in enumerate(plan.layers):
            w = net.flat[layer.weight : layer.weight + layer.inputs * layer.outputs].reshape(layer.inputs, -1)
            got = forward(replace(plan, layers=plan.layers[: k + 1], linear=None), net.flat)
            assert_close(got, layer_of(plan, k, rounded_product(given, w, precision), net.flat, t), terms=terms(net))
            given = got
        got = forward(plan, net.flat)
        if part := plan.linear:
            basis, gains = part.basis.astype(np.float32), part.gains.astype(np.float32)[t]
            layers = (DenseLayer(*basis.shape, 0, basis.size, "none"),)
            alone = replace(plan, layers=layers, time_width=0, linear=None)
            h = forward(alone, np.append(basis, np.zeros(part.rank, np.float32))) * gains
            rest = 0 if part.rest is None else part.rest[t, None] * x
            of_part = rounded_product(h, np.ascontiguousarray(basis.T), precision)
            assert_close(got, given + of_part + rest, terms=terms(net))
        want = NUMPY.mlp_forward(plan, wide, Inputs(x.astype(np.float64), t))
        assert_close_in_norm(got, want, MLP_ERRORS[precision])
        for rows in (slice(3, 9), slice(7, 8)):  # a row does not depend on its batch
            assert_same_bits(forward(plan, net.flat, rows), got[rows])


@covers("mlp_mma", *MMA)
def chains_on_tensor_cores(be, size):
    """Tables that remember nothing, a row, two and three: steps that are those of the forward pass, in any batch."""
    for number, (net, wide) in enumerate(networks()):
        schedule, n = Schedule.cosine(net.T), BATCH[size] // 2
        steps = min(CHAIN_STEPS[size], net.T - 1, 3)  # what rounding does grows with every row
        tables = ddpm(schedule, steps, clip=1.0), dpmpp_2m(schedule, steps, prediction="v"), *deep_tables(schedule)
        for smp in tables if size == "full" else tables[number % 2 :: 2]:
            table, draw = ChainTable(smp.rows, smp.clip), Draw(4, Stream.STEP, first_row=2**32 - 5)
            x, _, _ = batch_of(net, n)
            want = x.astype(np.float64)
            NUMPY.mlp_chain(net.plan, wide, want, table, draw)
            for precision, error in MLP_ERRORS.items():
                there = CudaBackend(be.runtime, precision=precision)
                params, got, part = there.asarray(net.flat), there.asarray(x.copy()), there.asarray(x[5:].copy())
                there.mlp_chain(net.plan, params, got, table, draw)
                got = there.to_numpy(got)
                assert_close_in_norm(got, want, len(smp) * error)
                there.mlp_chain(net.plan, params, part, table, draw.after(5))
                assert_same_bits(there.to_numpy(part), got[5:])


@covers("mlp", "mlp_add_times", "mlp_draw_asked")
def asked_networks(be, size):
    """Networks that are asked for classes and covariates: forward, chains that are guided, products, and training."""
    n, schedule = BATCH[size], Schedule.cosine(11)
    told = {"classes": 2, "covariates": 1, "masked": True}
    for number, asked in enumerate(({"classes": 3}, {"covariates": 2}, {"masked": True}, told)):
        net = scatter(MLP(19, hidden=(33, 21), T=11, **asked))
        net, wide = (with_linear(net) if number == 3 else net), net.flat.astype(np.float64)
        random, (x, t, target) = np.random.default_rng(number), batch_of(net, n)
        labels = random.integers(0, net.classes + 1, n) if net.classes else None
        covariates = random.normal(size=(n, net.covariates + 1)).astype(np.float32) if net.covariates else None
        known = None
        if net.masked:
            marks = random.random((n, 19)) < 0.5
            known = np.hstack([np.where(marks, random.normal(size=(n, 19)), 0), marks]).astype(np.float32)
        told = net.plan.asks(labels, covariates, known=known)
        wide_x, wide_told = x.astype(np.float64), told.astype(np.float64)
        params, *there = (be.asarray(a, a.dtype) for a in (net.flat, x, t, told))
        inputs, there = Inputs(wide_x, t, wide_told), Inputs(*there)
        got = be.to_numpy(be.mlp_forward(net.plan, params, there))
        assert_close(got, NUMPY.mlp_forward(net.plan, wide, inputs), terms=terms(net) + 4)
        alone = Inputs(*(be.asarray(a[3:9], a.dtype) for a in (x, t, told)))
        assert_same_bits(be.to_numpy(be.mlp_forward(net.plan, params, alone)), got[3:9])

        smp, draw = dpmpp_2m(schedule, 4, prediction="v"), Draw(4, Stream.STEP, first_row=7)
        for weights in (None, np.array([1, 2, 0.5, 1], np.float32)):
            want, state = wide_x.copy(), be.asarray(x.copy())
            levels = None if known is None else schedule.signal[[row.t for row in smp.rows]].astype(np.float32)
            table = ChainTable(smp.rows, None, weights, levels)
            NUMPY.mlp_chain(net.plan, wide, want, table, draw, wide_told)
            be.mlp_chain(net.plan, params, state, table, draw, there.asked)
            assert_close(be.to_numpy(state), want, terms=12 * terms(net))

        want, grads = np.zeros_like(wide), be.asarray(np.zeros_like(net.flat))
        loss, _ = NUMPY.mlp_gradient(net.plan, wide, inputs, target.astype(np.float64), want)
        found, _ = be.mlp_gradient(net.plan, params, there, be.asarray(target), grads)
        assert_close(np.float32(found), loss, terms=terms(net))
        compare_gradients(net, be.to_numpy(grads), want, n)
        for method in (be.mlp_vjp, be.mlp_jvp):
            want, got = np.empty((n, net.points)), be.empty((n, net.points))
            getattr(NUMPY, method.__name__)(net.plan, wide, inputs, target.astype(np.float64), want)
            method(net.plan, params, there, be.asarray(target), got)
            assert_close(be.to_numpy(got), want, terms=terms(net))

        data = random.normal(size=(n, net.points))
        tables = schedule.signal, schedule.noise, np.ones(11), np.zeros(11)
        for drop in (0.0, 0.4):
            draws = TrainingDraws(
                data, *tables, 2**63 + 5, None if labels is None else labels % net.classes, False, None, covariates,
                drop, net.classes or 0, targets=("mask", net.image) if net.masked else None,
            )  # fmt: skip
            want = np.zeros_like(wide)
            loss = NUMPY.mlp_train_gradient(net.plan, wide, draws, 12, n, want)
            draws = draws._replace(data=data.astype(np.float32))
            found = be.mlp_train_gradient(net.plan, params, draws, 12, n, grads)
            assert_close(np.float32(found), loss, terms=terms(net))
            compare_gradients(net, be.to_numpy(grads), want, n)
            found, gradient = in_parts(be, net, draws, n)
            assert_close(np.float32(found), loss, terms=terms(net))
            compare_gradients(net, gradient, want, n)


GRADIENT = ("mlp_bias_activate", "mlp_layer_backward", "mlp_order_times", "mlp_scale", "mlp_add_part")
TIME_GRADIENT = ("mlp_time_gradient", "mlp_time_table", "mlp_time_table_backward")


@covers("mlp", *GRADIENT, *TIME_GRADIENT)
def gradients(be, size):
    for net, wide in networks():
        x, t, target = batch_of(net, BATCH[size])
        want = np.zeros_like(wide)
        inputs, there = Inputs(x.astype(np.float64), t), Inputs(be.asarray(x), be.asarray(t, np.int64))
        want_loss, want_dx = NUMPY.mlp_gradient(net.plan, wide, inputs, target.astype(np.float64), want)
        grads = be.asarray(np.zeros_like(net.flat))
        loss, dx = be.mlp_gradient(net.plan, be.asarray(net.flat), there, be.asarray(target), grads)
        assert_close(np.float32(loss), want_loss, terms=terms(net))
        assert_close(be.to_numpy(dx), want_dx, terms=terms(net))
        compare_gradients(net, be.to_numpy(grads), want, BATCH[size])


@covers("mlp", *GRADIENT[:2], *GRADIENT[3:])
def products(be, size):
    n = BATCH[size]
    for net, wide in networks():
        x, t, vector = batch_of(net, n)
        vector, inputs = np.stack([vector, vector[::-1]]), Inputs(x.astype(np.float64), t)
        for method in (be.mlp_vjp, be.mlp_jvp):
            want, got = np.empty(vector.shape), be.empty(vector.shape)
            getattr(NUMPY, method.__name__)(net.plan, wide, inputs, vector.astype(np.float64), want)
            (flat, *at, given), out = (be.asarray(a, a.dtype) for a in (net.flat, x, t, vector)), be.empty(x.shape)
            method(net.plan, flat, Inputs(*at), given, got, **({"y": out} if method == be.mlp_vjp else {}))
            assert_close(be.to_numpy(got), want, terms=terms(net))
            if method == be.mlp_vjp:
                wanted = NUMPY.mlp_forward(net.plan, wide, inputs)
                assert_close(be.to_numpy(out), wanted, terms=terms(net))


@covers("mlp", "mlp_draw_batch", *GRADIENT, *TIME_GRADIENT)
def training_gradients(be, size):
    n = BATCH[size]
    for net, wide in networks():
        schedule = Schedule.cosine(net.T)
        data = np.random.default_rng(3).normal(size=(1003, net.points)).astype(np.float32)
        of_noise, of_data = np.full((2, net.T), [[0.75], [-0.5]])
        draws = TrainingDraws(data, schedule.signal, schedule.noise, of_noise, of_data, seed=2**63 + 5)
        if net.has_linear and net.plan.linear is not None:  # and some values have not been seen
            hidden = np.where(np.random.default_rng(5).random(data.shape) < 0.3, np.float32(np.nan), np.float32(0))
            draws = draws._replace(data=np.stack([data, hidden], axis=1), masked=True)
        x, t, target = draw_batch(draws, net.T, 12, n)
        want = np.zeros_like(wide)
        inputs = Inputs(x.astype(np.float64), t)
        want_loss, _ = NUMPY.mlp_gradient(net.plan, wide, inputs, target.astype(np.float64), want)
        grads, params = be.asarray(np.zeros_like(net.flat)), be.asarray(net.flat)
        loss = be.mlp_train_gradient(net.plan, params, draws, 12, n, grads)
        assert_close(np.float32(loss), want_loss, terms=terms(net))
        compare_gradients(net, be.to_numpy(grads), want, n)
        loss, gradient = in_parts(be, net, draws, n)
        assert_close(np.float32(loss), want_loss, terms=terms(net))
        compare_gradients(net, gradient, want, n)


@covers("pointwise", "take", "weighted_error")
def weighted_gradients(be, size):
    """A loss whose rows weigh by their timesteps."""
    n = BATCH[size]
    for net, wide in networks():
        schedule = Schedule.cosine(net.T)
        data = np.random.default_rng(3).normal(size=(103, net.points))
        weights = np.random.default_rng(4).uniform(0.1, 2, size=(net.T, 1))
        tables = schedule.signal, schedule.noise, np.ones(net.T), np.zeros(net.T)
        draws = TrainingDraws(data, *tables, seed=2**63 + 5, terms=weights)
        want = np.zeros_like(wide)
        want_loss = NUMPY.mlp_train_gradient(net.plan, wide, draws, 12, n, want)
        draws = draws._replace(data=data.astype(np.float32))
        grads = be.asarray(np.zeros_like(net.flat))
        loss = be.mlp_train_gradient(net.plan, be.asarray(net.flat), draws, 12, n, grads)
        assert_close(np.float32(loss), want_loss, terms=terms(net))
        compare_gradients(net, be.to_numpy(grads), want, n)


@covers("optim", "square_sums", "finish_norm", "adamw")
def training_steps(be, size):
    """Gradient and optimiser in one: loss and norm come back together, and what is not finite changes nothing."""
    n, steps, plan = BATCH[size], 3, TrainingPlan(clip_norm=0.5)
    for net, wide in networks():
        schedule = Schedule.cosine(net.T)
        ones, zeros = np.ones(net.T), np.zeros(net.T)
        data = np.random.default_rng(3).normal(size=(1003, net.points)).astype(np.float32)
        draws = TrainingDraws(data, schedule.signal, schedule.noise, ones, zeros, seed=5)
        want = [wide, *(np.zeros_like(wide) for _ in range(3))]
        state, apart = ([be.asarray(column, np.float32) for column in want] for _ in range(2))
        grads, wide_grads = be.asarray(np.zeros_like(net.flat)), np.zeros_like(wide)
        results, wide_results = be.asarray(np.zeros((2, 2)), np.float64), np.zeros((2, 2))
        there = draws._replace(data=data.astype(np.float64))
        reference = NUMPY.mlp_training(net.plan, there, n, TrainState(want[0], wide_grads, *want[1:]), wide_results)
        ours = TrainState(state[0], grads, *state[1:])
        training = be.mlp_training(net.plan, draws, n, ours, results)
        for step in range(steps):
            options = plan.options(step, step)
            reference.run(step, options)
            training.run(step, options)
            got = be.to_numpy(results)[step % 2]
            assert_close(got.astype(np.float32), wide_results[step % 2], terms=steps * (terms(net) + n))
            # Weights cannot be compared with NumPy's: Adam divides a gradient by its size, be it a rounding error.
            loss = be.mlp_train_gradient(net.plan, apart[0], draws, step, n, grads)
            norm = be.adamw(TrainState(apart[0], grads, *apart[1:]), options)
            assert [loss, norm] == got.tolist(), "the two in one differ"
            for column, wanted in zip(state, apart, strict=True):
                assert_same_bits(be.to_numpy(column), be.to_numpy(wanted))
        before = [be.to_numpy(column) for column in state]
        broken = draws._replace(data=np.full_like(data, np.nan))
        for step, data in ((3, broken), (4, draws)):
            be.mlp_training(net.plan, data, n, ours, results).run(step, plan.options(step, step))
        # A target of NaN has no error: what is wrong with such rows is seen by the gradient.
        assert not np.isfinite(be.to_numpy(results)[:, 1]).any(), be.to_numpy(results)
        for column, wanted in zip(state, before, strict=True):
            assert_same_bits(be.to_numpy(column), wanted)


def in_parts(be, net, draws, n):
    """Loss and gradient of a batch that comes in two parts, each for the second time: by then it is a graph."""
    grads, total, loss = be.asarray(np.zeros_like(net.flat)), np.zeros(net.flat.shape), 0.0
    gradient = be.mlp_parts(net.plan, be.asarray(net.flat), draws)
    for first, end in ((0, n // 3), (n // 3, n)):
        for step in (7, 12):
            found = gradient(step, first, end - first, grads)
        loss += float(be.to_numpy(found)[0]) * (end - first) / n
        total += be.to_numpy(grads) * ((end - first) / n)
    return loss, total.astype(np.float32)


def compare_gradients(net, got, want, n):
    for name, view in net.layout.views(got).items():
        assert_close(view, net.layout.views(want)[name], terms=terms(net) + n)
