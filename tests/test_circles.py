"""Pictures of circles, and how round a shape is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.data import circles, portraits
from fastdiff.errors import ArgumentError
from fastdiff.metrics import roundness


def import_file(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_portraits_are_round_faces_of_many_people():
    X = portraits(60, 32, seed=3)
    assert (X.shape, X.dtype) == ((60, 32, 32, 3), np.uint8)
    assert (portraits(5, 32, seed=3, first_sample=4) == X[4:9]).all()
    assert (portraits(2, 32, seed=4) != X[:2]).any()
    assert portraits(0, 16).shape == (0, 16, 16, 3)
    # What is not of the ground's colour is the head: its width and height are alike, and it lies within the picture.
    ground = X[:, 0, 0].astype(int)
    assert (X[:, 0, -1] == ground).all()
    head = (abs(X.astype(int) - ground[:, None, None]).sum(axis=-1) > 60).reshape(60, 32, 32)
    width, height = (head.any(axis=axis).sum(axis=1) for axis in (1, 2))
    assert ((width > 16) & (width < 32)).all()
    assert (abs(height / width - 1) < 0.25).all()
    assert len(np.unique(ground.round(-1), axis=0)) > 20
    means = X[:, 8:24, 8:24].mean(axis=(1, 2, 3))
    assert means.min() < 120
    assert means.max() > 180


def test_the_example_draws_grids_and_traces(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    example = import_file(Path(__file__).parents[1] / "examples" / "round.py")
    monkeypatch.setattr(example, "T", 12)
    monkeypatch.setattr(example, "SIZE", 8)
    monkeypatch.setattr(example, "CHANNELS", (4, 8))
    monkeypatch.setattr(example, "CIRCLES", 64)
    example.main(["-o", str(tmp_path), "--steps", "2", "--quiet", "--portraits", "3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "circles_generated.png", "circles_trace.png", "portraits_generated.png", "portraits_trace.png",
        "portraits_training.png",
    ]  # fmt: skip
    assert "deviation of the radius: " in capsys.readouterr().out


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
        (lambda: portraits(2, 7), "size"),
        (lambda: portraits(-1), "n"),
        (lambda: portraits(1, seed=-1), "seed"),
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
