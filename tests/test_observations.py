"""Observations: what they hold, the one form that they are brought into, and what is refused."""

import math

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.errors import ArgumentError
from fastdiff.observations import observations

NAN = math.nan
VALUES = np.array([1.0, NAN, -2.0, NAN])


def test_what_is_known_is_kept_as_it_was_given():
    values = np.array([1, 2, 3], np.uint8)
    known = fd.Known(values, noise=values)
    assert known.values.dtype == np.uint8
    values[0] = 7
    np.testing.assert_array_equal(known.values, [1, 2, 3])
    np.testing.assert_array_equal(known.noise, [1, 2, 3])
    with pytest.raises(ValueError, match="read-only"):
        known.values[0] = 1


def test_one_observation_in_one_form():
    A = np.arange(8).reshape(2, 4)
    weight = fd.Weight(lambda x: (x.sum(axis=1), np.ones_like(x)))
    told = observations([fd.Known(VALUES, 0.5), fd.Linear(A, [3, 4], [0, 2]), weight], (4,))
    assert (told.count, told.d, told.nothing, told.weights) == (None, 4, False, (weight,))
    (group,) = told.groups()
    np.testing.assert_array_equal(group.indices, [0])
    np.testing.assert_array_equal(group.A, [[1, 0, 0, 0], [0, 0, 1, 0], *A])
    np.testing.assert_array_equal(group.y, [[1, -2, 3, 4]])
    np.testing.assert_array_equal(group.noise, [0.5, 0.5, 0, 2])


def test_several_observations_are_grouped_by_what_is_seen():
    several = np.array([[1, NAN], [NAN, 2], [3, NAN], [NAN, NAN]])
    told = observations([fd.Known(several), fd.Linear([[1, 1]], [[5], [6], [7], [8]], 1.0), fd.Known([NAN, 9])], (2,))
    assert told.count == 4
    np.testing.assert_array_equal(told.mask, [[1, 1], [0, 1], [1, 1], [0, 1]])
    seen = {}
    for group in told.groups():
        for i, y in zip(group.indices, group.y, strict=True):
            seen[int(i)] = (group.A.tolist(), y.tolist(), group.noise.tolist())
    first, second, both = [1, 0], [0, 1], [1, 1]
    assert seen == {
        0: ([first, second, both], [1, 9, 5], [0, 0, 1]),
        1: ([second, second, both], [2, 9, 6], [0, 0, 1]),
        2: ([first, second, both], [3, 9, 7], [0, 0, 1]),
        3: ([second, both], [9, 8], [0, 1]),
    }
    assert len(list(told.groups())) == 3


def test_samples_of_any_shape():
    picture = np.full((2, 3, 1), NAN)
    picture[1, 0, 0] = 4
    (group,) = observations(
        [fd.Known(picture, np.arange(3)[:, None]), fd.Linear(np.ones((1, 2, 3, 1)), [2], 0)], (2, 3, 1)
    ).groups()
    np.testing.assert_array_equal(group.A, [np.arange(6) == 3, np.ones(6)])
    np.testing.assert_array_equal(group.y, [[4, 2]])
    np.testing.assert_array_equal(group.noise, [0, 0])
    assert observations(fd.Known(picture[None]), (2, 3, 1)).count == 1


def test_nothing_known():
    for given in ([], (), fd.Known([NAN, NAN]), [fd.Known([[NAN, NAN]] * 3)], fd.Linear(np.zeros((0, 2)), [], 1)):
        told = observations(given, (2,))
        assert told.nothing
        for group in told.groups():
            assert group.A.shape == (0, 2)
    assert not observations(fd.Linear([[0, 0]], [0], 1), (2,)).nothing


def test_what_is_no_observation():
    for make, match in [
        (lambda: fd.Known([1, math.inf]), "values: got infinity"),
        (lambda: fd.Known(["a"]), "values: got"),
        (lambda: fd.Known([1], noise=-1), "noise: got -1"),
        (lambda: fd.Known([1], noise=NAN), "noise: got nan"),
        (lambda: fd.Linear([1, 2], [1], 0), "A: got shape"),
        (lambda: fd.Linear([[1, NAN]], [1], 0), "A: got nan"),
        (lambda: fd.Linear([[1, 2]], [1, 2], 0), r"y: got shape \(2,\)"),
        (lambda: fd.Linear([[1, 2]], [NAN], 0), "y: got nan"),
        (lambda: fd.Linear([[1, 2]], [1], [1, 2]), r"noise: got shape \(2,\)"),
        (lambda: fd.Weight(3), "function: got int"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            make()


def test_observations_of_other_samples():
    for given, match in [
        (3, "given: got int"),
        ([fd.Known(VALUES), 3], r"given\[1\]: got int"),
        (fd.Known(VALUES[:3]), r"given: got values of shape \(3,\)"),
        (fd.Known(VALUES.reshape(2, 2)), r"given: got values of shape \(2, 2\)"),
        (fd.Known(VALUES[None, None]), "given: got values of shape"),
        ([fd.Known(VALUES, noise=[1, 2])], r"given\[0\]: got noise of shape"),
        (fd.Linear(np.eye(3), [1, 2, 3], 0), "given: got A of shape"),
        ([fd.Known([VALUES] * 2), fd.Known(VALUES), fd.Linear(np.eye(4), np.eye(4)[:3], 0)], r"given\[2\]: got 3 obs"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            observations(given, (4,))
    with pytest.raises(ArgumentError, match="observations of 4 values"):
        observations(observations(fd.Known(VALUES), (4,)), (5,))


def test_a_weight_is_checked_sample_by_sample():
    x = np.arange(6.0).reshape(3, 2)
    good = fd.Weight(lambda x: (-np.square(x).sum(axis=1), -2 * x))
    np.testing.assert_array_equal(good.log_weights(x), -np.square(x).sum(axis=1))
    np.testing.assert_array_equal(good.gradients(x), -2 * x)
    assert fd.Weight(lambda x: (np.full(3, -math.inf), x)).log_weights(x).max() == -math.inf
    for function, match in [
        (lambda x: np.zeros(3), "a pair"),
        (lambda x: (np.zeros(2), x), r"shape \(2,\)"),
        (lambda x: (np.array([0, NAN, 0]), x), "log weight nan for sample 1"),
        (lambda x: (np.array([0, 0, math.inf]), x), "log weight inf for sample 2"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            fd.Weight(function).log_weights(x)
    for function, match in [
        (lambda x: (np.zeros(3), x[:2]), r"shape \(2, 2\)"),
        (lambda x: (np.zeros(3), np.where(x == 5, NAN, x)), "a gradient for sample 2"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            fd.Weight(function).gradients(x)
