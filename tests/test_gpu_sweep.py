"""Tiles and profiles that ``make gpu`` measures, on the host run, and what the backend makes of them."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_parity_conv import Arrays, Case
from host_cuda import HostRuntime, has_compiler
from stand_in_cupy import StandIn
from tolerances import assert_same_bits

from fastdiff import bench
from fastdiff.backends.cuda import CudaBackend, conv, conv_mma, tuning
from fastdiff.backends.layers import Conv, ConvShapes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpu, gpu_profile, gpu_sweep, report = map(importlib.import_module, ("gpu", "gpu_profile", "gpu_sweep", "report"))

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

SAME = Conv((3, 3), pad=(1, 1, 1, 1))
GIVEN = Arrays(Case(SAME, 2, 3, 4, 8, 12), 1)
SHAPES = ConvShapes(SAME, GIVEN.x.shape, GIVEN.out_shape)


def seconds(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def row(entry="conv", key="conv 1", stages=3, **seconds):
    seconds = {name.removeprefix("t"): value for name, value in seconds.items()}
    speeds = {name: 1 / value for name, value in seconds.items()}
    return gpu_sweep.Swept(name="a", entry=entry, key=key, stages=stages, seconds=seconds, speeds=speeds)


def test_what_is_swept():
    """All convolutions of the U-Net that are not alike, of both batches, and the products of both perceptrons."""
    cases = gpu_sweep.cases(quick=False)
    for n in gpu_sweep.PICTURES:
        convs = gpu_sweep.unet_convs(bench.networks.Pictures("", "", n, (32, 32, 3)))
        assert len(convs) > 40
        assert set(map(gpu_sweep.name_of, convs)) <= set(cases)
    assert {
        "3x3 of 16x32x32x3 to 32", "3x3 of 256x16x16x64 to 64", "3x3 of 16x8x8x128 to 128 up 2x2",
        "3x3 of 16x32x32x32 to 32 stride 2x2", "1x1 of 1x1000x1x50 to 100", "1x1 of 1x8192x1x128 to 128",
    } <= set(cases)  # fmt: skip
    assert not any("," in name for name in cases)
    assert len(gpu_sweep.cases(quick=True)) == 2


def test_every_tile_of_every_kernel_is_timed():
    runtime, recorded = HostRuntime(), []
    make = lambda precision: CudaBackend(runtime, precision=precision)  # noqa: E731
    rows = list(gpu_sweep.sweep(make, SHAPES, lambda run: recorded.append(run) or seconds(run), (3, 2)))
    assert [(each.entry, each.stages) for each in rows] == [
        ("conv", 3), ("conv_input", 3), ("conv_weights", 3),
        ("conv_mma", 3), ("conv_mma", 2), ("conv_mma_adjoint", 3), ("conv_mma_adjoint", 2),
    ]  # fmt: skip
    for each in rows:
        module = conv_mma if "mma" in each.entry else conv
        assert list(each.seconds) == list(each.speeds) == [tile.name for tile in module.TILES]
        assert min(each.seconds.values()) > 0
    launched = Counter(runtime.launches)
    for source in ("conv_mma", "conv_mma.2"):
        for entry in ("conv_mma", "conv_mma_adjoint"):
            for tile in conv_mma.TILES:
                assert launched[source, f"{entry}_{tile.name}"] > 2
    assert len({each.key for each in rows}) == 5
    assert runtime.launch.__func__ is HostRuntime.launch, "the runtime is still watched"


def test_images_of_one_pixel_have_one_tile():
    make = lambda precision: CudaBackend(HostRuntime(), precision=precision)  # noqa: E731
    shapes = ConvShapes(Conv(), (5, 1, 1, 8), (5, 1, 1, 4))
    rows = gpu_sweep.sweep(make, shapes, seconds, (3,))
    assert [each.entry for each in rows] == ["conv_weights", "conv_mma", "conv_mma_adjoint"]


def test_the_fastest_is_chosen():
    """Tiles by product, rates by kernel, and one number of stages, of the products that have been timed with all."""
    rows = [
        row(key="conv 1", t128x64=2.0, t64x32=1.0), row(key="conv 2", t128x64=2.0, t64x32=8.0),
        row(key="conv 3", t128x64=2.0, t64x32=2.0), row("conv_weights", "conv_weights 1", t128x64=1.0, t64x32=4.0),
        row("conv_mma", "conv_mma 1", 3, t128x128=1.0, t64x32=3.0),
        row("conv_mma", "conv_mma 1", 2, t128x128=2.0, t64x32=0.5),
        row("conv_mma", "conv_mma 2", 3, t128x128=1e-9),
    ]  # fmt: skip
    assert gpu_sweep.tuning_of(rows) == {
        "tiles": {"conv 1": "64x32", "conv 2": "128x64", "conv 3": "128x64", "conv_mma 1": "64x32"},
        "rates": {
            "conv_128x64": 1.0, "conv_64x32": 1.0, "conv_weights_128x64": 1.0, "conv_weights_64x32": 0.25,
            "conv_mma_128x128": 1.0, "conv_mma_64x32": 4.0,
        },
        "stages": 2,
    }  # fmt: skip
    assert gpu_sweep.tuning_of(rows[:1])["stages"] == gpu_sweep.tuning_of([])["stages"] == 3


# ------------------------------------------------------------------------------------------- what is made of it


def done(be):
    """Outputs, gradients, and what was launched for them."""
    be.runtime.launches.clear()
    x, w, b, dy = map(be.asarray, (GIVEN.x, GIVEN.w, GIVEN.b, GIVEN.dy))
    made = [be.empty(array.shape) for array in (GIVEN.dy, GIVEN.x, GIVEN.w, GIVEN.b)]
    be.conv(SAME, x, w, b, made[0])
    be.conv_backward(SAME, dy, x, w, *made[1:])
    return [be.to_numpy(array) for array in made], be.runtime.launches


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Write what was measured of a family, of which the host's device is one."""
    monkeypatch.setattr(tuning, "MEASURED", tmp_path)
    monkeypatch.setattr(HostRuntime, "arch", "90")

    def write(arch="90", scale=1.0, **fields):
        results = gpu.Results({"arch": arch, "scale": scale})
        found = results.measured() | ({"tuning": fields} if fields else {})
        (tmp_path / f"sm_{arch}.json").write_text(json.dumps(found))
        tuning.tuning.cache_clear()

    yield write
    tuning.tuning.cache_clear()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_measured_tiles_take_the_place_of_estimates(measured, precision):
    """By product or, where it was not timed, by rates; without a change of bits."""
    entries = ("conv_mma", "conv_mma_adjoint") if precision == "bf16" else ("conv", "conv_input")
    tiles = (conv_mma if precision == "bf16" else conv).TILES
    keys = [tuning.key(entry, conv.product(*SHAPES, adjoint).sizes) for adjoint, entry in enumerate(entries)]
    measured()  # a run that came to no sweep
    want, launched = done(CudaBackend(HostRuntime(), precision=precision))
    for tile in tiles:
        by_rate = {f"{entry}_{tile.name}": 1e9 for entry in (*entries, "conv_weights")}
        for fields in ({"tiles": dict.fromkeys(keys, tile.name)}, {"rates": by_rate}):
            measured(**fields)
            be = CudaBackend(HostRuntime(), precision=precision)
            got, launched = done(be)
            for array, wanted in zip(got, want, strict=True):
                assert_same_bits(array, wanted)
            names = {entry for _, entry in launched}
            assert {f"{entry}_{tile.name}" for entry in entries} <= names
            if precision == "float32" and "rates" in fields:
                assert f"conv_weights_{tile.name}" in names
    measured(arch="120", tiles=dict.fromkeys(keys, tiles[-1].name))  # another family
    (tuning.MEASURED / "sm_90.json").unlink()
    tuning.tuning.cache_clear()
    assert tuning.tuning("90") == tuning.tuning("") == tuning.Tuning()


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_tiles_of_a_quick_run_are_refused(measured, scale):
    measured(scale=scale, tiles={"conv 1": "64x32"})
    assert tuning.tuning("90") == (tuning.Tuning({"conv 1": "64x32"}) if scale == 1 else tuning.Tuning())


@pytest.mark.parametrize(
    ("fields", "unfit", "instead"),
    [
        ({"tiles": {}}, {"tile": conv_mma.TILES[0]}, {}),
        ({"tiles": {}, "stages": 2}, {"tile": conv_mma.TILES[0]}, {"stages": 2}),
        ({"stages": 4}, {"stages": 4}, {}),
    ],
    ids=["tile", "tile of few stages", "stages"],
)
def test_what_does_not_fit_is_passed_over(measured, monkeypatch, fields, unfit, instead):
    """A tile, then the number of stages too: then it is as if that had not been measured."""
    fits, signature = conv_mma.gather_shape, inspect.signature(conv_mma.gather_shape.__wrapped__)

    def shape(*args):
        given = signature.bind(*args).arguments
        return None if any(given[name] == value for name, value in unfit.items()) else fits(*args)

    monkeypatch.setattr(conv_mma, "gather_shape", shape)
    measured(**instead)
    want, guessed = done(CudaBackend(HostRuntime(), precision="bf16"))
    if "tiles" in fields:
        entries = "conv_mma", "conv_mma_adjoint"
        keys = [tuning.key(entry, conv.product(*SHAPES, adjoint).sizes) for adjoint, entry in enumerate(entries)]
        fields = fields | {"tiles": dict.fromkeys(keys, unfit["tile"].name)}
    measured(**fields)
    got, launched = done(CudaBackend(HostRuntime(), precision="bf16"))
    assert launched == guessed
    for array, wanted in zip(got, want, strict=True):
        assert_same_bits(array, wanted)


def test_the_number_of_stages_changes_no_bits(measured):
    want, _ = done(CudaBackend(HostRuntime(), precision="bf16"))
    measured(stages=2)
    got, launched = done(CudaBackend(HostRuntime(), precision="bf16"))
    for array, wanted in zip(got, want, strict=True):
        assert_same_bits(array, wanted)
    assert {source for source, entry in launched if "_128x" in entry or "_64x" in entry} == {"conv_mma.2"}


# ------------------------------------------------------------------------------------------- first launches, profiles


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path))
    module = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_a_launch_of_every_family(cupy, monkeypatch):
    be, names = CudaBackend(), {path.stem for path in (Path(gpu.__file__).parents[1] / "kernels" / "cuda").glob("*.cu")}
    assert set(gpu.FAMILIES) == names - {"cudnn"}
    for source in gpu.FAMILIES:
        cupy.host.launches.clear()
        gpu.launch_first(be, source)
        assert source in {launched for launched, _ in cupy.host.launches}
    monkeypatch.setattr(CudaBackend, "gelu", lambda be, x, out: out.fill(np.nan))
    with pytest.raises(AssertionError, match="not all numbers are finite"):
        gpu.launch_first(be, "pointwise")


def test_where_the_time_of_a_step_goes(cupy):
    """Every launch of the steps, and nothing else, is a part of it; something is there to wait for at each of them."""
    be, copies = CudaBackend(graphs=False), []
    workload = replace(gpu.BY_NAME["unet-train-16"], units=2, n=1, shape=(4, 4, 3), channels=(32,))
    found = gpu_profile.profile(be, workload, cupy.cuda, lambda: copies.append(len(cupy.host.launches)), "float32")
    assert len(copies) == 2
    launched = Counter(entry for _, entry in cupy.host.launches[copies[0] :])
    assert {kernel.name: 2 * kernel.launches for kernel in found.kernels} == launched
    assert [kernel.seconds for kernel in found.kernels] == sorted((k.seconds for k in found.kernels), reverse=True)
    assert found.launches == (len(cupy.host.launches) - copies[0]) / 2
    assert found.seconds == pytest.approx(sum(kernel.seconds for kernel in found.kernels))
    rows = list(found.rows())
    assert len(rows) == gpu_profile.SHOWN + 1
    assert rows[-1][0] == f"{len(found.kernels) - gpu_profile.SHOWN} others"
    assert sum(float(cells[1]) for cells in rows) == pytest.approx(found.launches, rel=1e-4)
    lines = gpu.profile_lines(found)
    start = f"A training step of the U-Net in float32, kernel by kernel: {found.launches:g} launches, "
    assert lines[0].startswith(start)
    assert report.record(gpu.Profile, json.loads(json.dumps(report.plain(found)))) == found
