"""exp, log and cos, rounded correctly, against decimals of 60 digits."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from fastdiff import rounded

RANDOM = np.random.default_rng(0)
NEAR = RANDOM.uniform(0, 1, 100)
TINY = 10.0 ** RANDOM.uniform(-15, -1, 50)
SMALL = 10.0 ** RANDOM.uniform(-9, -1, 50)


def decimal_cos(x):
    term = total = Decimal(1)
    n = 0
    while abs(term) > Decimal(10) ** -55:
        n += 2
        term *= -x * x / (n * (n - 1))
        total += term
    return total


@pytest.mark.parametrize(
    ("ours", "exact", "x"),
    [
        (rounded.exp, Decimal.exp, np.concatenate([[0.0, 1.0, -700.0, 700.0], 1400 * NEAR - 700, 12 * NEAR - 6])),
        (
            rounded.log,
            Decimal.ln,
            np.concatenate([[1.0, 2.0], NEAR, 10.0 ** (400 * NEAR - 200), 1 + SMALL, 1 - SMALL]),
        ),
        (rounded.cos, decimal_cos, np.concatenate([[0.0, np.pi / 2], np.pi / 2 * NEAR, np.pi / 2 - TINY, TINY])),
    ],
)
def test_they_are_rounded_correctly(ours, exact, x):
    with localcontext() as context:
        context.prec = 60
        want = [float(exact(Decimal(value))) for value in x.tolist()]
    np.testing.assert_array_equal(ours(x), want)
