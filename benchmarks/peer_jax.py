"""The two curve networks in JAX: chains and training steps that are compiled whole, by jit and scan.

A chain is one call: `lax.scan` over the rows of the table, noise drawn inside by the generator of XLA's own, which is
JAX's fastest. A training step is one call too, weights and moments donated, AdamW and clipping written out as optax
has them. Results are waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from fastdiff.bench.networks import joined

jax.config.update("jax_default_prng_impl", "unsafe_rbg")

LR, BETAS, EPS, DECAY, MOST = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0  # PyTorch's AdamW; the norm of a gradient at most


def network(workload: Any, inputs: Any) -> tuple[Callable[..., Any], Any]:
    """Return output(weights, x, t) and the weights, from the arrays of `weights_of`."""
    widths, tutorial = workload.widths, workload.net == "tutorial"
    weights = {name[2:]: jnp.asarray(value) for name, value in inputs.items() if name.startswith("w/")}
    features = None if tutorial else jnp.asarray(inputs["features"])
    columns = np.cumsum([width for width in widths[1:-1] for _ in range(2)])[:-1].tolist()

    def output(weights: Any, x: Any, t: Any) -> Any:
        layers = [(weights[f"layers.{k}.weight"], weights[f"layers.{k}.bias"]) for k in range(len(widths) - 1)]
        if tutorial:
            for k, (w, b) in enumerate(layers):
                x = x @ w + b
                if k == 1:
                    x = x + weights["time.weight"][t]
                elif k != 3:
                    x = jax.nn.leaky_relu(x, 0.01)
            return x
        parts = jnp.split(features[t] @ weights["time.weight"] + weights["time.bias"], columns, axis=-1)
        for (w, b), gain, shift in zip(layers, parts[::2], parts[1::2], strict=False):
            x = jax.nn.silu((1 + gain) * (x @ w + b) + shift)
        w, b = layers[-1]
        return x @ w + b

    return output, weights


def chain_side(workload: Any, inputs: Any) -> tuple[dict[str, Any], list[Callable[[], Any]]]:
    """Draw the example with its noise; return its results, and what draws more."""
    output, weights = network(workload, inputs)
    rows, noise = coefficients(inputs["betas"]), jnp.asarray(inputs["noise"])

    def step(x: Any, row: Any, z: Any) -> Any:
        t, a, e, s = row
        return a * x + e * output(weights, x, t) + s * z

    @jax.jit
    def given(noise: Any) -> Any:
        more = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])  # the last row adds none
        return lax.scan(lambda x, each: (step(x, each[0], each[1]), None), noise[0], (rows, more))[0]

    @partial(jax.jit, static_argnums=1)
    def drawn(key: Any, n: int) -> Any:
        first, *keys = jax.random.split(key, len(rows[0]) + 1)
        shape = n, *workload.shape

        def one(x: Any, each: Any) -> Any:
            row, key = each
            return step(x, row, jax.random.normal(key, shape)), None

        return lax.scan(one, jax.random.normal(first, shape), (rows, jnp.stack(keys)))[0]

    keys = iter(jax.random.split(jax.random.key(0), 1 << 16))
    out = jax.jit(output)(weights, noise[0], workload.schedule().T // 2)
    outputs = {"output": np.asarray(out), "samples": np.asarray(given(noise))}
    return outputs, [lambda: np.asarray(drawn(next(keys), workload.n))]


def training_side(workload: Any, inputs: Any) -> tuple[dict[str, Any], list[Callable[[], Any]]]:
    """Take the example's steps with its draws; return losses and weights, and what takes more steps."""
    output, weights = network(workload, inputs)
    X, betas = jnp.asarray(inputs["X"], jnp.float32), np.asarray(inputs["betas"], np.float64)
    abar = np.cumprod(1 - betas)
    signal, level = (jnp.asarray(np.sqrt(each)[:, None], jnp.float32) for each in (abar, 1 - abar))

    def loss(weights: Any, rows: Any, t: Any, eps: Any) -> Any:
        return jnp.mean((output(weights, signal[t] * X[rows] + level[t] * eps, t) - eps) ** 2)

    def update(state: Any, rows: Any, t: Any, eps: Any) -> Any:
        weights, m, v, k = state
        value, grads = jax.value_and_grad(loss)(weights, rows, t, eps)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, MOST / (norm + 1e-6))
        k = k + 1

        def one(w: Any, g: Any, m: Any, v: Any) -> Any:
            g = g * scale
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            change = (m / (1 - BETAS[0] ** k)) / (jnp.sqrt(v / (1 - BETAS[1] ** k)) + EPS)
            return w * (1 - LR * DECAY) - LR * change, m, v

        new = {name: one(weights[name], grads[name], m[name], v[name]) for name in weights}
        weights, m, v = ({name: each[i] for name, each in new.items()} for i in range(3))
        return (weights, m, v, k), value

    @partial(jax.jit, donate_argnums=0)
    def on(state: Any, rows: Any, t: Any, eps: Any) -> Any:
        return update(state, rows, t, eps)

    @partial(jax.jit, donate_argnums=0)
    def drawing(state: Any, key: Any) -> Any:
        one, two, three = jax.random.split(key, 3)
        n = workload.n
        rows, t = jax.random.randint(one, (n,), 0, len(X)), jax.random.randint(two, (n,), 0, len(betas))
        return update(state, rows, t, jax.random.normal(three, (n, *X.shape[1:])))

    zeros = {name: jnp.zeros_like(value) for name, value in weights.items()}
    state = ({name: value.copy() for name, value in weights.items()}, zeros, {**jax.tree.map(jnp.copy, zeros)}, 0)
    losses = []
    for rows, t, eps in zip(*(inputs[name] for name in ("rows", "t", "eps")), strict=True):
        state, value = on(state, rows, t, eps)
        losses.append(float(value))
    trained = {f"w/{name}": np.asarray(value) for name, value in state[0].items()}
    keys = iter(jax.random.split(jax.random.key(0), 1 << 18))

    def run() -> None:
        nonlocal state
        for _ in range(workload.units):
            state, value = drawing(state, next(keys))
            losses.append(float(value))

    return {"losses": np.array(losses), "weights": joined(trained).copy()}, [run]


def coefficients(betas: Any) -> tuple[Any, ...]:
    """Columns (t, a, e, s) of the DDPM step, as `peer_nets.coefficients` has them; the last row draws no noise."""
    betas = np.asarray(betas, np.float64)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    a = 1 / np.sqrt(1 - betas)
    e = -betas / np.sqrt(1 - abar) * a
    s = np.sqrt(betas * (1 - before) / (1 - abar))
    s[0] = 0
    columns = (np.arange(len(betas), dtype=np.int32), *(each.astype(np.float32) for each in (a, e, s)))
    return tuple(jnp.asarray(each[::-1]) for each in columns)


SIDES = {"Chain": chain_side, "Training": training_side}  # by the class of the workload
