"""The exceptions, and the checks at the edge: what passes, what is refused, and what the message says."""

import copy
import math
import pickle

import numpy as np
import pytest

from fastdiff import errors
from fastdiff.errors import (
    ArgumentError,
    FastdiffError,
    check_array,
    check_choice,
    check_float,
    check_int,
    check_seed,
    check_timesteps,
)


def test_one_hierarchy():
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    raised = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert {kind.__name__ for kind in raised} == {
        "FastdiffError", "ArgumentError", "DataError", "CheckpointError", "BackendError", "TrainingError",
    }  # fmt: skip
    assert all(issubclass(kind, FastdiffError) for kind in raised)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(errors.ScheduleWarning, UserWarning)
    assert issubclass(errors.DataWarning, UserWarning)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_an_argument_error_names_argument_value_and_wish_and_travels(again):
    error = again(ArgumentError("n", "-1", "an integer of at least 0"))
    assert (error.argument, error.got, error.wants) == ("n", "-1", "an integer of at least 0")
    assert str(error) == "n: got -1, wants an integer of at least 0"


def refusal(check, *args, **kwargs):
    with pytest.raises(ArgumentError) as caught:
        check(*args, **kwargs)
    assert caught.value.argument == args[0]
    assert caught.value.__cause__ is None
    assert len(str(caught.value)) < 200
    return caught.value


@pytest.mark.parametrize("value", [0, 5, np.int8(5), np.uint64(7), np.array(3)])
def test_integers_pass(value):
    number = check_int("n", value, low=0, high=7)
    assert type(number) is int
    assert number == value


@pytest.mark.parametrize("value", [-1, 8, 1.0, np.float32(1), "1", None, True, np.True_, [1], 2**70, math.nan])
def test_integers_refused(value):
    assert "an integer from 0 to 7" in str(refusal(check_int, "n", value, low=0, high=7))


def test_seeds_have_64_bits():
    assert check_seed(2**64 - 1) == 2**64 - 1
    assert check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    for value in (-1, 2**64, 0.5):
        refusal(lambda name, v: check_seed(v, name), "seed", value)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.25), np.float64(1), np.array(0.5)])
def test_numbers_pass(value):
    number = check_float("rate", value, low=0, high=1)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize("value", [-1e-9, 1.1, math.nan, math.inf, -math.inf, "0.5", b"1", None, True, [0.1, 0.2], 1j])
def test_numbers_refused(value):
    assert "a finite number" in str(refusal(check_float, "rate", value, low=0, high=1))


def test_open_bounds():
    for value in (0.0, 1.0):
        error = refusal(check_float, "rate", value, low=0, high=1, low_open=True, high_open=True)
        assert "above 0 and below 1" in str(error)


def test_a_choice_lists_what_is_known():
    assert check_choice("kind", "b", ["a", "b"]) == "b"
    for value in ("c", "B", None, 1, ["a"]):
        assert "'a', 'b'" in str(refusal(check_choice, "kind", value, ["a", "b"]))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", "i1", "i8", "u1", "u8", ">f4"])
def test_real_arrays_pass(dtype):
    array = check_array("x", np.arange(6).reshape(2, 3).astype(dtype), shape=(None, 3))
    assert array.dtype == np.dtype(dtype)
    assert array.shape == (2, 3)


@pytest.mark.parametrize(
    "value",
    [
        np.ones(3, complex),
        np.ones(3, bool),
        np.array(["a"]),
        np.array([None]),
        None,
        [1, None],
        b"ab",
        {1: 2},
    ],
)
def test_other_arrays_refused(value):
    assert "real floats or integers" in str(refusal(check_array, "x", value))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_their_place(bad):
    array = np.zeros((4, 5))
    array[2, 3] = bad
    assert f"{bad} at index (2, 3)" in str(refusal(check_array, "x", array))
    assert check_array("x", array, finite=False) is array


def test_shapes_are_checked_and_shown():
    assert "shape (None,)" not in str(refusal(check_array, "x", np.ones((2, 3)), shape=(None,)))
    assert "wants shape (any, 4)" in str(refusal(check_array, "x", np.ones((2, 3)), shape=(None, 4)))
    assert "wants shape (5,)" in str(refusal(check_array, "x", np.ones(4), shape=(5,)))
    assert "at least 1 axes" in str(refusal(check_array, "x", 1.0, min_ndim=1))
    assert "rows of different lengths" in str(refusal(check_array, "x", [[1.0], [1.0, 2.0]]))


class NAType:
    """What pandas has where a nullable type has no value: its truth is an error, and it equals nothing."""

    def __eq__(self, other):
        return self

    __hash__ = None

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self):
        return "<NA>"


class Frame:
    """A table of nullable types as pandas hands it over: an array of objects."""

    def __init__(self, *rows):
        self.rows = rows

    def __array__(self, dtype=None, copy=None):
        return np.array(self.rows, object)

    def to_numpy(self):
        return np.array(self.rows, object)


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], mask=[[0, 1], [0, 0]]),
        [np.ma.masked_array([1.0, 2.0]), np.ma.masked_array([1.0, 2.0], mask=[0, 1])],
        (np.ma.masked_array([1, 2], mask=[0, 1]), np.array([1, 2])),
    ],
)
@pytest.mark.parametrize("finite", [True, False])
def test_masks_are_not_dropped(value, finite):
    error = refusal(check_array, "x", value, finite=finite)
    assert str(error).startswith("x: got 1 masked values, wants an array without a mask: X.filled(...)")
    assert "1 masked" in str(refusal(check_timesteps_of, "t", np.ma.masked_array([1, 2], mask=[0, 1])))


def check_timesteps_of(_, t):
    return check_timesteps(t, 10, 2)


def test_a_mask_that_hides_nothing_passes():
    np.testing.assert_array_equal(check_array("x", np.ma.masked_array([1.0, 2.0], mask=False)), [1, 2])


def test_nullable_types_are_numbers_or_refused():
    read = check_array("x", Frame([1.5, 2], [np.float32(3), np.int64(4)]))
    np.testing.assert_array_equal(read, np.array([[1.5, 2], [3, 4]]), strict=True)
    for none in (NAType(), None):
        error = refusal(check_array, "x", Frame([1.5, 2.0], [3.0, none]))
        assert f"a missing value ({none!r}) at index (1, 1)" in str(error)
        np.testing.assert_array_equal(check_array("x", Frame([1.5, none]), finite=False), [[1.5, np.nan]])
    assert "a missing value (None) at index (0, 1)" in str(refusal(check_array, "x", [[1.0, None]]))
    for one in ("a", True, 1j, [1]):
        got = f"dtype object, with {one!r} at index (0, 1)"
        rows = np.empty((1, 2), object)
        rows[0] = 1.0, None
        rows[0, 1] = one
        assert got in str(refusal(check_array, "x", rows))
    assert "dtype object" in str(refusal(check_array, "x", np.array([1.0, 2.0], object)))


def test_a_value_that_overflows_its_dtype_counts_as_infinity():
    assert check_array("x", [1e38], dtype=np.float32).dtype == np.float32
    assert "inf at index (1,)" in str(refusal(check_array, "x", [1.0, 1e39], dtype=np.float32))


@pytest.mark.parametrize("t", [3, np.int64(3), np.full(4, 3, np.uint8), [3, 3, 3, 3], np.array(3)])
def test_timesteps_become_one_integer_a_sample(t):
    steps = check_timesteps(t, 10, 4)
    assert steps.dtype == np.int64
    assert steps.flags.c_contiguous
    assert steps.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "t", [-1, 10, [0, 1, 2, 10], [0, -1, 0, 0], 1.0, True, None, "1", [1, 2], [[1, 2, 3, 4]], [[1], [1, 2]]]
)
def test_timesteps_refused(t):
    refusal(lambda name, value: check_timesteps(value, 10, 4), "t", t)


def test_no_samples_need_no_timesteps():
    assert check_timesteps(np.zeros(0, int), 10, 0).shape == (0,)
    assert check_timesteps(3, 10, 0).shape == (0,)
