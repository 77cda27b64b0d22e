"""Networks, losses, gradients and the optimiser against PyTorch, from the same weights."""

import numpy as np
import pytest
import torch
from gradcheck import scatter
from tolerances import assert_close
from torch.nn import functional

from fastdiff.backends import Inputs, TrainState, get_backend
from fastdiff.backends.numpy import functions as reference
from fastdiff.nn import MLP
from fastdiff.nn.optim import TrainingPlan

LANES = [("numpy", "float64"), ("numpy", "float32"), ("cpu", "float32")]
lanes = pytest.mark.parametrize(("backend", "dtype"), LANES, ids=["-".join(lane) for lane in LANES])

NETS = {
    "default": lambda dtype: MLP(50, T=100, dtype=dtype),
    "odd": lambda dtype: MLP(17, hidden=(33, 1, 19), T=11, dtype=dtype),
    "linear": lambda dtype: MLP(4, hidden=(), T=3, dtype=dtype),
    "tutorial": lambda dtype: MLP.tutorial(50, T=100, dtype=dtype),
    "tutorial of three": lambda dtype: MLP.tutorial(3, T=5, dtype=dtype),
}
nets = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def leaves(net):
    """The parameters as float64 leaves of torch; theirs is the precision that ours is measured with."""
    return {name: torch.tensor(view, dtype=torch.float64, requires_grad=True) for name, view in net.params.items()}


def forward(net, weights, x, t):
    def layer(i, x):
        return functional.linear(x, weights[f"layers.{i}.weight"].T, weights[f"layers.{i}.bias"])

    if net.kind == "tutorial":
        h = layer(1, functional.leaky_relu(layer(0, x), 0.01)) + functional.embedding(t, weights["time.weight"])
        return layer(3, functional.leaky_relu(layer(2, h), 0.01))
    if net.hidden:
        angles = 1000 / net.T * t.double()[:, None] * 10000 ** (-torch.arange(16, dtype=torch.float64) / 16)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        time = functional.linear(features, weights["time.weight"].T, weights["time.bias"])
        parts = iter(torch.split(time, [width for width in net.hidden for _ in range(2)], dim=1))
    for i in range(len(net.hidden)):
        gain = next(parts)
        x = functional.silu((1 + gain) * layer(i, x) + next(parts))
    return layer(len(net.hidden), x)


def terms(net):
    return sum(layer.inputs for layer in net.plan.layers) + 32


def batch_of(net, n, seed=0):
    random = np.random.default_rng(seed)
    x, target = random.normal(size=(2, n, net.points)).astype(net.dtype)
    return x, random.integers(0, net.T, n), target


@lanes
@nets
def test_output_loss_and_every_gradient(make, backend, dtype):
    net, be, n = scatter(make(dtype)), get_backend(backend), 150
    x, t, target = batch_of(net, n)
    weights, theirs = leaves(net), torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = forward(net, weights, theirs, torch.tensor(t))
    loss = functional.mse_loss(y, torch.tensor(target, dtype=torch.float64))
    loss.backward()

    angle = 1000 if dtype == "float64" else 1  # the angles of the time features are that large, and rounded in float64
    close = {"terms": (terms(net) + n) * angle**2, "dtype": dtype}
    assert_close(be.mlp_forward(net.plan, net.flat, Inputs(x, t)), y.detach().numpy(), **close)
    grads = np.full(net.layout.size, np.nan, dtype)
    got_loss, dx = be.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)
    assert_close(got_loss, loss.item(), **close)
    assert_close(dx, theirs.grad.numpy(), **close)
    views = net.layout.views(grads)
    assert set(views) == set(weights)
    for name, weight in weights.items():
        assert_close(views[name], weight.grad.numpy(), **close)


@pytest.mark.parametrize(("kind", "theirs"), [("silu", functional.silu), ("leaky_relu", functional.leaky_relu)])
def test_activations(kind, theirs):
    v = np.concatenate([np.linspace(-30, 30, 601), [-0.0, 1e-300, -1e-300, 700, -700]])
    leaf = torch.tensor(v, requires_grad=True)
    y = theirs(leaf)
    y.sum().backward()
    assert_close(reference.activate(v, kind), y.detach().numpy(), scale=0)
    assert_close(reference.activate_backward(np.ones_like(v), v, kind), leaf.grad.numpy(), scale=1)


PLANS = {
    "default": TrainingPlan(),
    "clipped, with decay of weights and rate": TrainingPlan(
        lr=0.01, clip_norm=0.1, weight_decay=0.3, beta1=0.8, beta2=0.99, eps=1e-3, warmup=3, decay_steps=15, ema=0.5
    ),
    "free": TrainingPlan(clip_norm=None, ema=None, weight_decay=0.0),
}


@lanes
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["odd", "tutorial of three"])
def test_twenty_steps_of_training(name, plan, backend, dtype):
    """Gradient, clipping, AdamW and the moving average together, as a PyTorch user would write them.

    AdamW magnifies what rounding does to a gradient near zero, so in float32 torch gets our gradients.
    """
    net, be, steps = scatter(NETS[name](dtype)), get_backend(backend), 20
    weights = leaves(net)
    optimiser = torch.optim.AdamW(
        weights.values(), betas=(plan.beta1, plan.beta2), eps=plan.eps, weight_decay=plan.weight_decay
    )
    averages = {name: weight.detach().clone() for name, weight in weights.items()}
    grads, m, v = (net.layout.zeros(dtype) for _ in range(3))
    average = net.flat.copy()
    for step in range(steps):
        x, t, target = batch_of(net, 30, seed=step)
        be.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)
        norm = be.adamw(TrainState(net.flat, grads, m, v, average), plan.options(step, step))

        optimiser.zero_grad()
        if dtype == "float64":
            y = forward(net, weights, torch.tensor(x), torch.tensor(t))
            functional.mse_loss(y, torch.tensor(target)).backward()
        else:
            for key, view in net.layout.views(grads).items():
                weights[key].grad = torch.tensor(view, dtype=torch.float64)
        want = torch.nn.utils.clip_grad_norm_(weights.values(), plan.clip_norm or float("inf"))
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        optimiser.step()
        decay = 0 if plan.ema is None else min(plan.ema, (1 + step) / (10 + step))
        for key, weight in weights.items():
            averages[key] = decay * averages[key] + (1 - decay) * weight.detach()

    angle = 1000 if dtype == "float64" else 1
    close = {"terms": steps * terms(net) * angle**2, "dtype": dtype}
    assert_close(norm, want.item(), **close)
    for key, weight in weights.items():
        assert_close(net.params[key], weight.detach().numpy(), **close)
        assert_close(net.layout.views(average)[key], averages[key].numpy(), **close)
