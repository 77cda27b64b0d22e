"""Pictures of circles, and how round a shape is."""

from __future__ import annotations

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.data import circles
from fastdiff.errors import ArgumentError
from fastdiff.metrics import roundness


def test_circles_are_round_whole_and_anywhere():
    X = circles(300, 32, seed=3)
    assert X.shape == (300, 32, 32, 1)
    assert X.dtype == np.uint8
    assert np.median(roundness(X)) < 0.012
    assert roundness(X).max() < 0.03
    edge = np.concatenate([X[:, [0, -1]].reshape(300, -1), X[:, :, [0, -1]].reshape(300, -1)], axis=1)
    assert edge.max() <= 128  # they touch it at most
    areas = X.sum(axis=(1, 2, 3)) / 255
    radii = np.sqrt(areas / np.pi) / 32
    assert radii.min() > 0.14
    assert radii.max() < 0.41
    assert abs(radii.mean() - 0.275) < 0.02
    at = (X[..., 0] * np.arange(32)).sum(axis=(1, 2)) / X.sum(axis=(1, 2, 3))
    assert at.min() < 8 < 24 < at.max()


def test_a_circle_depends_on_its_number_alone():
    assert (circles(9, 16, seed=1)[4:] == circles(5, 16, seed=1, first_sample=4)).all()
    assert (circles(3, 16, seed=1) != circles(3, 16, seed=2)).any()
    assert circles(0, 16).shape == (0, 16, 16, 1)


def test_roundness_of_shapes_that_are_none():
    y, x = np.indices((40, 40)) - 19.5
    ellipse = 255.0 * np.clip(10 - np.hypot(x, 1.3 * y), 0, 1)
    square = 255.0 * (np.maximum(abs(x), abs(y)) < 9)
    nothing, everything = np.zeros((40, 40)), np.ones((40, 40))
    found = roundness(np.stack([ellipse, square, nothing, everything]))
    angle = 2 * np.pi * np.arange(64) / 64
    radius = 1 / np.hypot(np.cos(angle), 1.3 * np.sin(angle))
    assert abs(found[0] / (radius.std() / radius.mean()) - 1) < 0.05
    assert 0.08 < found[1] < 0.13  # of a square 0.108
    assert np.isnan(found[2])
    assert found[3] > 0.05  # the picture's own outline


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: circles(2, 4), "size"),
        (lambda: circles(-1), "n"),
        (lambda: circles(2, radius=(0.3, 0.2)), "radius"),
        (lambda: circles(2, radius=(0.1, 0.6)), "radius"),
        (lambda: circles(2, radius=0.2), "radius"),
        (lambda: roundness(np.zeros((2, 3))), "images"),
        (lambda: roundness(np.zeros((2, 8, 8, 3))), "images"),
        (lambda: fd.metrics.roundness(np.zeros((2, 8, 8)), rays=2), "rays"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ArgumentError, match=match):
        call()
