"""Small recurrent networks that judge series, several trained side by side: what TimeGAN's scores are made of.

A gated recurrent unit (Cho et al. 2014) as TensorFlow's GRUCell has it, and a linear output:

    r, u = sigmoid(W x + U h + b);   c = tanh(W' x + U' (r h) + b');   h <- u h + (1 - u) c;   out = V h + d

Arrays have the networks first and the rows last: K networks see batches (K, T, channels, rows) of their own. So one
call of NumPy does the work of all networks and rows, which would be lost in calls for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.noise import Draw, fill_uniform

Array = npt.NDArray[Any]

RECURRENT = "gates", "candidate"
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8  # of Adam, as TimeGAN has it


class GRUs:
    """K networks of some units over series of C channels.

    Parameters
    ----------
    networks, channels, units : int
    draw : Draw
        Of the weights: Glorot's uniform ones (2010, equation 16), network k from row k. Biases are 0, of the gates 1.
    dtype : dtype, optional
    """

    def __init__(self, networks: int, channels: int, units: int, draw: Draw, dtype: npt.DTypeLike = np.float32) -> None:
        C, H = channels, units
        self.shapes = {
            "gates_in": (2 * H, C), "gates": (2 * H, H), "candidate_in": (H, C), "candidate": (H, H), "out": (1, H),
            "gates_bias": (2 * H, 1), "candidate_bias": (H, 1), "out_bias": (1, 1),
        }  # fmt: skip
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        self.units, self.ends = units, {name: int(end) for name, end in zip(self.shapes, ends, strict=True)}
        self.flat = np.empty((networks, int(ends[-1])), dtype)
        fill_uniform(self.flat, draw)
        self.weights = self.views(self.flat)
        fans = {"gates": C + 3 * H, "candidate": C + 2 * H, "out": H + 1}  # of [W U] together
        for name, weight in self.weights.items():
            if name.endswith("bias"):
                weight[...] = name.startswith("gates")
            else:
                weight -= 0.5
                weight *= 2 * math.sqrt(6 / fans[name.removesuffix("_in")])

    def views(self, flat: Array) -> dict[str, Array]:
        """The arrays of all networks, (K, ...), in a flat buffer (K, values)."""
        return {
            name: flat[:, self.ends[name] - math.prod(shape) : self.ends[name]].reshape(-1, *shape)
            for name, shape in self.shapes.items()
        }

    def states(self, x: Array) -> tuple[Array, Array, Array]:
        """Run over series (K, T, C, rows); return states, gates and candidates of every moment, (K, T, .., rows)."""
        w, H = self.weights, self.units
        gates, candidates = (w[f"{name}_in"][:, None] @ x + w[f"{name}_bias"][:, None] for name in RECURRENT)
        states = np.empty_like(candidates)
        h = np.zeros_like(states[:, 0])
        for t in range(x.shape[1]):
            both, c = gates[:, t], candidates[:, t]
            both += w["gates"] @ h
            sigmoid(both)
            r, u = both[:, :H], both[:, H:]
            c += w["candidate"] @ (r * h)
            np.tanh(c, out=c)
            h = states[:, t] = c + u * (h - c)
        return states, gates, candidates

    def outputs(self, x: Array, *, last: bool) -> Array:
        """Return the output at every moment, (K, T, rows), or at the last one, (K, 1, rows)."""
        return self._out(self.states(x)[0][:, -1 if last else 0 :])

    def _out(self, states: Array) -> Array:
        return (self.weights["out"][:, None] @ states + self.weights["out_bias"][:, None])[:, :, 0]

    def gradient(self, x: Array, slope: Callable[[Array], Array], *, last: bool) -> Array:
        """Return the gradient by all weights, (K, values); `slope` makes that by the outputs out of the outputs."""
        w, H, T = self.weights, self.units, x.shape[1]
        states, gates, candidates = self.states(x)
        seen = states[:, -1 if last else 0 :]
        dout = slope(self._out(seen))[:, :, None]  # (K, T or 1, 1, rows)
        into = _turned(w["out"])[:, None] @ dout  # what the outputs add to the gradient by the states
        before = np.concatenate([np.zeros_like(states[:, :1]), states[:, :-1]], axis=1)
        dgates, dcandidates = np.empty_like(gates), np.empty_like(candidates)
        of_gates, of_candidate = (_turned(w[name]) for name in RECURRENT)
        dh = np.zeros_like(states[:, 0])
        for t in reversed(range(T)):
            if not last or t == T - 1:
                dh += into[:, 0 if last else t]
            h, c, r, u = before[:, t], candidates[:, t], gates[:, t, :H], gates[:, t, H:]
            dc, dr, du = dcandidates[:, t], dgates[:, t, :H], dgates[:, t, H:]
            keep = 1 - u
            dc[...] = dh * keep * (1 - c * c)
            du[...] = dh * (h - c) * (u * keep)
            through = (of_candidate @ dc) * r
            dr[...] = through * h * (1 - r)
            dh = dh * u + through + of_gates @ dgates[:, t]
        flat = np.empty_like(self.flat)
        grads = self.views(flat)
        reset = gates[:, :, :H] * before
        for name, state, d in (("gates", before, dgates), ("candidate", reset, dcandidates), ("out", seen, dout)):
            grads[name][...] = _summed(d, state)
            grads[f"{name}_bias"][...] = d.sum(axis=(1, 3))[:, :, None]
            if name != "out":
                grads[f"{name}_in"][...] = _summed(d, x)
        return flat

    def train(
        self,
        steps: int,
        batch: Callable[[int], tuple[Array, Callable[[Array], Array]]],
        *,
        last: bool,
    ) -> None:
        """Take steps of Adam (Kingma and Ba 2015); `batch` gives series and the slope of the loss, see `gradient`."""
        m, v = np.zeros_like(self.flat), np.zeros_like(self.flat)
        for step in range(steps):
            g = self.gradient(*batch(step), last=last)
            m += (1 - BETA1) * (g - m)
            v += (1 - BETA2) * (g * g - v)
            rate = LR * math.sqrt(1 - BETA2 ** (step + 1)) / (1 - BETA1 ** (step + 1))
            self.flat -= rate * m / (np.sqrt(v) + EPS)


def sigmoid(x: Array) -> None:
    """1 / (1 + exp(-x)), in place, without overflow."""
    x *= 0.5
    np.tanh(x, out=x)
    x += 1
    x *= 0.5


def _turned(weight: Array) -> Array:
    return np.ascontiguousarray(np.swapaxes(weight, 1, 2))


def _summed(d: Array, x: Array) -> Array:
    """Sum over moments and rows of d (K, T, b, rows) times x (K, T, a, rows): (K, b, a)."""
    return np.asarray((d @ np.swapaxes(x, 2, 3)).sum(axis=1))
