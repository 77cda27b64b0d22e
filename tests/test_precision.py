"""Training with the factors of convolutions rounded to bf16: rounded where the CUDA kernels round, and compared."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_parity_conv_mma import CASES, Case, arrays_of, bf16, normals
from host_cuda import HostRuntime, has_compiler
from tolerances import assert_close, assert_same_bits

from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.layers import Conv

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
precision, report = map(importlib.import_module, ("precision", "report"))

host_run = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

WINOGRAD = Case(Conv((3, 3), pad=(1, 1, 1, 1)), (3, 7, 5, 20), 36)  # on the CPU
UPSAMPLED = Case(Conv((3, 3), pad=(1, 1, 1, 1), up=(2, 2)), (3, 5, 7, 20), 12)
LAYERS = [WINOGRAD, UPSAMPLED, *CASES["small"]]


def results(be, geometry, x, w, b, dy):
    """Output, and gradients of x, of w, of the bias and of the rows added to images."""
    shift, residual, dx = normals(7, len(x), len(b)), normals(8, *dy.shape), normals(9, *x.shape)
    y, dw, db, dshift = (np.full_like(a, np.nan) for a in (dy, w, b, shift))
    be.conv(geometry, x, w, b, y, shift=shift, residual=residual)
    be.conv_backward(geometry, dy, x, w, dx, dw, db, dshift=dshift, add=True)
    return y, dx, dw, db, dshift


def assert_as_on_tensor_cores(case, prepare=lambda w: w):
    """Equal up to the order of additions, some 1e-6; the rounding of a factor is worth 4e-3."""
    x, w, b, dy = arrays_of(case)
    ours = results(precision.RoundedBackend(threads=1), case.geometry, x, prepare(w), b, dy)
    theirs = results(CudaBackend(HostRuntime(), precision="bf16"), case.geometry, x, w, b, dy)
    pixels = dy[..., 0].size
    terms = w[..., 0].size + 3, w[:, :, 0].size + 1, pixels, pixels, pixels // len(x)
    for mine, other, count in zip(ours, theirs, terms, strict=True):
        assert_close(mine, other, terms=count)


@host_run
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_factors_are_rounded_where_the_cuda_kernels_round(case):
    assert_as_on_tensor_cores(case)


@host_run
@pytest.mark.parametrize("left_out", range(6))
@pytest.mark.parametrize("case", LAYERS[:3], ids=str)
def test_a_factor_that_is_not_rounded_is_noticed(case, left_out, monkeypatch):
    calls, round_it = iter(range(6)), precision.rounded
    monkeypatch.setattr(precision, "rounded", lambda a: a if next(calls) == left_out else round_it(a))
    with pytest.raises(AssertionError, match="differ; first at"):
        assert_as_on_tensor_cores(case)
    assert next(calls, None) is None


@host_run
def test_taps_of_an_upsampled_image_are_added_up_before_they_are_rounded():
    assert_as_on_tensor_cores(WINOGRAD, prepare=bf16)
    with pytest.raises(AssertionError, match="differ; first at"):
        assert_as_on_tensor_cores(UPSAMPLED, prepare=bf16)


def test_values_are_rounded_to_nearest_even():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF817FFF, 0x00000001, 0x7F7FFFFF], np.uint32)
    want = np.array([0x3F800000, 0x3F820000, 0x3F810000, 0xBF810000, 0x00000000, 0x7F800000], np.uint32)
    assert_same_bits(precision.rounded(halfway.view(np.float32)), want.view(np.float32))


def test_both_precisions_learn_and_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "BOUND", 0.5)
    assert precision.main(["--quick", "--threads", "1", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "precision-cpu.json").read_text())
    training, unseen, confident, distance = found["precision"]
    for row in (training, unseen):
        assert row["ratio"] == row["bf16"] / row["float32"]
        assert abs(row["ratio"] - 1) < 0.01
    assert training["ratio"] != 1
    assert 0 < training["error"] < 0.01
    assert 0 <= confident["bf16"] <= 1
    assert distance["bf16"] != distance["float32"]
    text = (tmp_path / "precision-cpu.md").read_text()
    assert text.count("| 0.5: **missed** |") == 2
    for row in (training, unseen):
        row["target"] = 1.02
    lines = report.record(report.PrecisionReport, found).lines()
    assert [line.endswith("| 1.02 |") for line in lines[-4:]] == [True, True, False, False]
    assert {line.count("|") for line in lines[2:]} == {6}
