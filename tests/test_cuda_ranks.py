"""Training over ranks whose backend is CUDA, by the host run: the bits of any number of ranks, by NCCL or without.

The ranks are threads; tests/scale has processes with MPI.
"""

import logging
import sys
import threading
from time import perf_counter

import numpy as np
import pytest
from device_array import DeviceRuntime
from fake_nccl import FakeNccl
from host_cuda import HostRuntime, has_compiler
from test_ranks import assert_same
from threaded_ranks import on_ranks

import fastdiff as fd
from fastdiff import ranks, stored
from fastdiff.backends.cpu import CpuBackend
from fastdiff.backends.cuda import CudaBackend
from fastdiff.errors import ArgumentError, TrainingError

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

CURVES = fd.data.harmonic_curves(60, points=6)
PICTURES = np.random.default_rng(0).integers(0, 255, (20, 4, 4, 1), np.uint8)
QUIET = {"progress": False, "judge": False}


def curves(be, **options):
    return fd.Diffusion(fd.MLP(6, hidden=(8, 8), T=10, **options), backend=be, seed=3)


def pictures(be):
    net = fd.UNet((4, 4, 1), channels=(4, 8), blocks=1, groups=2, attention=(False, True), T=10, dropout=0.1)
    return fd.Diffusion(net, backend=be, seed=3)


def together(size, make, data, *, nccl=False, device=None, **options):
    """Models that so many ranks train, and their backends; with `nccl` each has a GPU of its own."""

    def work(comm):
        be = CudaBackend(HostRuntime() if device is None else device(), graphs=device is None)
        if nccl:
            be.runtime.place, be.runtime.nccl = f"GPU {comm.rank}", FakeNccl(comm)
        return make(be).fit(*data, comm=comm, steps=4, **QUIET, **options), be

    found = on_ranks(size, work)
    for each in found:
        assert isinstance(each, tuple), each
    return [model for model, _ in found], [be for _, be in found]


# ------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("nccl", [False, True], ids=["hosts", "NCCL"])
@pytest.mark.parametrize("asked", [{}, {"classes": 3, "covariates": 2}], ids=["plain", "asked"])
def test_perceptrons(nccl, asked):
    """Parts of two sizes, and a graph for each of a rank's."""
    data, told = (CURVES,), {}
    if asked:
        data, told = (CURVES, np.arange(60) % 3), {"covariates": CURVES[:, :2]}
    (want,), (alone,) = together(1, lambda be: curves(be, **asked), data, batch=20, **told)
    assert len(alone.runtime.graphs) == ranks.PARTS
    for size in (2, 4):
        found, backends = together(size, lambda be: curves(be, **asked), data, batch=20, nccl=nccl, **told)
        assert_same(found, want)
        assert [len(be.runtime.graphs) for be in backends] == [ranks.PARTS // size] * size
        if nccl:  # gradients and losses of each step
            assert all(be.runtime.nccl.calls == ["init", *["allGather"] * 8] for be in backends)


@pytest.mark.parametrize("nccl", [False, True], ids=["hosts", "NCCL"])
def test_image_networks(nccl):
    """To the bit of one process that takes the batch in as many parts."""
    want = pictures(CudaBackend(HostRuntime())).fit(PICTURES, steps=4, batch=10, accumulate=8, flip=True, **QUIET)
    for size in (2, 3):
        found, _ = together(size, pictures, (PICTURES,), batch=10, flip=True, nccl=nccl)
        assert_same(found, want)


@pytest.mark.parametrize("nccl", [False, True], ids=["hosts", "NCCL"])
def test_arrays_on_devices(nccl):
    """They come to the host by the runtime alone; over NCCL gradients do not."""
    (want,), _ = together(1, curves, (CURVES,), batch=20)
    for size in (1, 2):
        found, backends = together(size, curves, (CURVES,), batch=20, nccl=nccl, device=DeviceRuntime)
        assert_same(found, want)
        sizes = [backends[-1].runtime.reads.count(shape) for shape in (want.net.flat.shape, (4,))]
        at_the_end = 4  # parameters, moments and their average
        if size == 2:
            assert sizes == ([at_the_end, 0] if nccl else [at_the_end + 4 * 4, 4])


def test_more_ranks_than_parts():
    (want,), _ = together(1, curves, (CURVES,), batch=20, accumulate=2)
    for nccl in (False, True):
        found, _ = together(3, curves, (CURVES,), batch=20, accumulate=2, nccl=nccl)
        assert_same(found, want)


def test_data_on_disk(tmp_path, monkeypatch):
    (want,), _ = together(1, curves, (CURVES,), batch=20)
    monkeypatch.setattr(stored, "FEW_VALUES", 100)
    np.save(tmp_path / "X.npy", CURVES)
    found, _ = together(2, curves, (str(tmp_path / "X.npy"),), batch=20, nccl=True)
    assert_same(found, want)


def test_losses_are_read_after_the_same_steps(monkeypatch):
    """One that is not finite ends all alike, be the time of one rank ever so long."""
    clock = threading.local()
    monkeypatch.setattr(CudaBackend, "steps_ahead", 3)
    monkeypatch.setattr("fastdiff.training.perf_counter", lambda: perf_counter() * clock.speed)

    def work(comm):
        clock.speed = 0 if comm.rank else 1e9
        be = CudaBackend(HostRuntime())
        be.runtime.place, be.runtime.nccl = f"GPU {comm.rank}", FakeNccl(comm)
        model = curves(be)
        model.net.flat[...] = np.float32(1e30)
        try:
            model.fit(CURVES, steps=9, batch=20, comm=comm, **QUIET)
        except TrainingError as error:
            return str(error), model.step

    first, second = on_ranks(2, work)
    assert first == second
    assert "in step 0: stopped" in first[0]


def test_a_wish_of_one_rank_stops_all():
    def work(comm):
        be = CudaBackend(HostRuntime())
        be.runtime.place, be.runtime.nccl = f"GPU {comm.rank}", FakeNccl(comm)
        team, model = ranks.Ranks(comm), curves(be)
        team.wanted = lambda: comm.rank == 1 and len(be.runtime.nccl.calls) > 4
        with pytest.raises(KeyboardInterrupt):
            model.fit(CURVES, steps=50, batch=20, comm=team, **QUIET)
        return model.step

    assert on_ranks(2, work) == [3, 3]


# ------------------------------------------------------------------------------------------- which way, and what fails


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ("device", "ranks 0 and 1 share a GPU, and NCCL wants one for each"),
        ("nccl", "the CuPy of rank 1 has no NCCL"),
        ("wish", "as was asked for"),
    ],
)
def test_where_there_is_no_nccl(lacks, why, caplog):
    """The log says it once."""

    def work(comm):
        be = CudaBackend(HostRuntime())
        be.runtime.place = "GPU 0" if lacks == "device" else f"GPU {comm.rank}"
        be.runtime.nccl = None if lacks == "nccl" and comm.rank else FakeNccl(comm)
        team = ranks.Ranks(comm, nccl=lacks != "wish")
        curves(be).fit(CURVES, comm=team, steps=1, batch=20, **QUIET)
        return be.runtime.nccl and be.runtime.nccl.calls

    with caplog.at_level(logging.INFO, logger="fastdiff"):
        assert [] in on_ranks(2, work)
    said = [record.getMessage() for record in caplog.records if "hosts" in record.getMessage()]
    assert said == [f"gradients of GPUs are added in the memory of the hosts: {why}"]


@pytest.mark.parametrize("when", ["init", "allGather", "later"])
def test_nccl_that_fails_on_a_rank_ends_all(when, capsys, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)

    def work(comm):
        be = CudaBackend(HostRuntime())
        be.runtime.place, be.runtime.nccl = f"GPU {comm.rank}", FakeNccl(comm, when if comm.rank else "")
        curves(be).fit(CURVES, steps=3, batch=20, comm=comm, **QUIET)

    first, second = on_ranks(2, work)
    assert first is not None
    assert isinstance(second, SystemExit)
    said = capsys.readouterr().err
    assert "fastdiff: error: rank 1 of 2: BackendError: NCCL fails on host: NCCL_ERROR_SYSTEM_ERROR" in said
    assert "Ranks(comm, nccl=False)) does without it: all ranks end" in said


def test_ranks_of_different_backends():
    cuda = CudaBackend(HostRuntime())
    for other, name in (
        (CpuBackend(1), "cpu float32"),
        (CudaBackend(HostRuntime(), precision="bf16"), "cuda bf16 own"),
    ):

        def work(comm, other=other):
            curves(cuda if comm.rank else other).fit(CURVES, steps=1, batch=20, comm=comm, **QUIET)

        words = f"disagree about backend: '{name}' on rank 0, 'cuda float32 own' on rank 1"
        for error in on_ranks(2, work):
            with pytest.raises(ArgumentError, match=words):
                raise error


def test_a_perceptron_in_parts_only_over_ranks():
    with pytest.raises(ArgumentError, match="accumulate: got 2, wants 1, where MLP takes a batch whole"):
        curves(CudaBackend(HostRuntime())).fit(CURVES, steps=1, accumulate=2, **QUIET)
