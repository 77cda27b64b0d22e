"""Distances of sets of rows, against their formulas in loops."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import SIGMAS

from fastdiff.errors import ArgumentError
from fastdiff.metrics import energy_distance, nearest_distances

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(37, 3)), RANDOM.normal(size=(300, 3)) + 0.2


def mean_distance(a, b, *, others=False):
    pairs = [np.linalg.norm(x - y) for i, x in enumerate(a) for j, y in enumerate(b) if not (others and i == j)]
    return sum(pairs) / len(pairs)


def test_both_statistics_are_their_formulas():
    plain = 2 * mean_distance(X, Y) - mean_distance(X, X) - mean_distance(Y, Y)
    assert energy_distance(X, Y) == pytest.approx(plain)
    unbiased = 2 * mean_distance(X, Y) - mean_distance(X, X, others=True) - mean_distance(Y, Y, others=True)
    assert energy_distance(X, Y, unbiased=True) == pytest.approx(unbiased)


def test_the_unbiased_one_is_0_on_average_for_equal_laws():
    found = [energy_distance(*RANDOM.normal(size=(2, 20, 3)), unbiased=True) for _ in range(200)]
    assert abs(np.mean(found)) < SIGMAS * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0


def test_nearest_distances_are_those_of_a_loop():
    want = [min(np.linalg.norm(x - y) for y in X) for x in Y]
    np.testing.assert_allclose(nearest_distances(Y, X), want)
    others = [min(np.linalg.norm(x - y) for j, y in enumerate(Y) if j != i) for i, x in enumerate(Y)]
    np.testing.assert_allclose(nearest_distances(Y, Y), others)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy_distance(X[:1], Y, unbiased=True), "X: got 1 rows, wants at least 2"),
        (lambda: energy_distance(X, Y[:, :2]), "Y: got shape"),
        (lambda: nearest_distances(X, Y[:0]), "Y: got no rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
