"""The parity checks of outputs that are moved towards observations, beside those of `cuda_parity`."""

from __future__ import annotations

import numpy as np
from cuda_parity import NUMPY, covers
from gradcheck import scatter, with_linear
from tolerances import TMPD, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends.protocol import Equations, TmpdPlan, TmpdStates
from fastdiff.nn import MLP

T, STATES = 9, {"small": 23, "full": 3001}
KINDS = {"few places": (7, 3, False), "few maps": (40, 4, True), "places": (70, 37, False), "maps": (33, 20, True)}


def plan_of(d, m, maps, count):
    """A plan of observations, some of which know less than others; two rows of the first are of one place."""
    random = np.random.default_rng(m)
    y, variance = random.normal(size=(count, m)), random.uniform(0.01, 1, size=(count, m))
    places = matrix = None
    if maps:
        matrix = (random.normal(size=(count, m, d)) / np.sqrt(d)).astype(np.float32).astype(np.float64)
    else:
        places = np.array([random.permutation(d)[:m] for _ in range(count)])
        places[0, -1] = places[0, 0]
    nothing = slice(m // 2, None) if count > 1 else slice(m, None)
    y[-1, nothing], variance[-1, nothing] = 0, 1
    if matrix is not None:
        matrix[-1, nothing] = 0
    elif places is not None:
        places[-1, nothing] = d
    p, q, gain, least = random.uniform(0.5, 1.5, size=(4, T))
    farthest, reach = random.uniform(0.05, 2, size=T), random.uniform(1, 3, size=count)
    return TmpdPlan(
        y, variance, places, matrix, 5, np.arange(count), min(m, 16), p, q, gain, 0.1 * least, farthest, reach
    )


BY_VECTOR = ("rows", "products", "back")  # arrays of which the states are the second axis


def agrees(be, operation, of, arrays, *numbers, changes, terms):
    """Do an operation by the reference and on the device, and there on a part of the states, whose bits are the same.

    `of` is the plan and what selects its rows; of the other `arrays`, by name, it `changes` those of these names.
    """
    tmpd, *places = of
    before = {name: array.copy() for name, array in arrays.items()}

    def do(backend, places, arrays):
        if operation == "tmpd_rows":
            backend.tmpd_rows(tmpd, *places, *arrays.values())
            return
        others = [array for name, array in arrays.items() if name not in Equations._fields]
        equations = Equations(*(arrays.get(name) for name in Equations._fields))
        getattr(backend, operation)(TmpdStates(tmpd, *places), *numbers, *others, equations)

    do(NUMPY, places, arrays)
    whole = {}
    for some in (slice(None), slice(3, 10)):
        there = {
            name: be.asarray((array[:, some] if name in BY_VECTOR else array[some]).copy(), array.dtype)
            for name, array in before.items()
        }
        at = [be.asarray(place[some].copy(), np.int64) for place in places]
        do(be, at, there)
        for name in changes:
            got, want = be.to_numpy(there[name]), arrays[name]
            if some == slice(None):
                assert_close(got, want.astype(np.float64), terms=terms)
                whole[name] = got.copy()
            else:
                assert_same_bits(got, whole[name][:, some] if name in BY_VECTOR else whole[name][some])


@covers("tmpd", "tmpd_rows", "tmpd_direct", "tmpd_begin", "tmpd_arnoldi", "tmpd_move")
def moved_outputs(be, size):
    """Each operation on what the reference has before it."""
    n = STATES[size]
    for number, (d, m, maps) in enumerate(KINDS.values()):
        for count in (1, -(-n // 5)):
            tmpd, random = plan_of(d, m, maps, count), np.random.default_rng(number)
            which, t = tmpd.states(0, n)[0], random.integers(0, T, n)
            x, out = random.normal(size=(2, n, d)).astype(np.float32)
            J = (np.eye(d) + random.normal(size=(d, d)) / np.sqrt(4 * d)).astype(np.float32)
            K, start, of, terms = tmpd.products, out.copy(), (tmpd, which, t), 4 * (d + m)
            back, H = np.zeros((K, n, d), np.float32), np.zeros((n, tmpd.equations, K))
            residual = np.zeros((n, tmpd.equations))
            if tmpd.direct:
                rows = np.zeros((m, n, d), np.float32)
                agrees(be, "tmpd_rows", of[:2], {"rows": rows}, changes=["rows"], terms=1)
                arrays = {"x": x, "out": out, "products": rows @ J, "back": back, "H": H, "residual": residual}
                agrees(be, "tmpd_direct", of, arrays, changes=["back", "H", "residual"], terms=terms)
            else:
                basis, cotangent = np.zeros((n, K + 1, m)), np.zeros((n, d), np.float32)
                arrays = {"x": x, "out": out, "cotangent": cotangent, "residual": residual, "basis": basis}
                agrees(be, "tmpd_begin", of, arrays, changes=["basis", "residual", "cotangent"], terms=terms)
                for k in range(K):
                    arrays = {"product": cotangent @ J, "cotangent": cotangent, "back": back, "basis": basis, "H": H}
                    changes = ["cotangent", "back", "basis", "H"]
                    agrees(be, "tmpd_arnoldi", of, arrays, k, changes=changes, terms=terms)
            arrays = {"H": H, "residual": residual, "back": back, "out": out}
            agrees(be, "tmpd_move", of, arrays, changes=["out"], terms=terms)
            assert np.abs(out - start).max() > 0.01, "nothing is moved"


CHAINS = {
    "tutorial": lambda: scatter(MLP.tutorial(5, T=T)),
    "default": lambda: scatter(MLP(6, hidden=(5, 9), T=T)),
    "part of rank": lambda: with_linear(scatter(MLP(26, hidden=(12,), T=T)), 4),
}


@covers("tmpd", "tmpd_rows", "tmpd_direct", "tmpd_begin", "tmpd_arnoldi", "tmpd_move")
def tmpd_chains(be, size):
    """Chains of a perceptron, in which a row is a graph: with a memory, blind rows, and noise of draws for several."""
    s = fd.Schedule.cosine(T).zero_terminal_snr()
    for make in CHAINS.values():
        net, random = make(), np.random.default_rng(3)
        net.flat *= 0.5
        values = random.normal(size=(3, net.points))
        values[random.random(values.shape) < 0.2] = np.nan
        given = fd.Known(values, 0.3)
        for table in (fd.samplers.ddpm(s, 4, prediction="v"), fd.samplers.dpmpp_2m(s, 4, prediction="v")):
            options = {"n": 5 if size == "small" else 200, "given": given, "seed": 2, "first_sample": 3}
            want = fd.sample(net, table, backend="numpy", **options)
            got = be.to_numpy(fd.sample(net, table, backend=be, **options))
            off = np.abs(got - want).max() / np.abs(want).max()
            assert off <= TMPD, f"off by {off:.3g}"
            assert_same_bits(be.to_numpy(fd.sample(net, table, backend=be, batch=4, **options)), got)
