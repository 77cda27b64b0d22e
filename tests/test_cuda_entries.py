"""Every entry in kernels/cuda has a parity check, and every check notices when an entry that it names goes wrong."""

from __future__ import annotations

import re

import cuda_parity_conv  # noqa: F401 - registers its checks
import cuda_parity_conv_mma  # noqa: F401 - registers its checks
import cuda_parity_covariance  # noqa: F401 - registers its checks
import cuda_parity_layers  # noqa: F401 - registers its checks
import cuda_parity_mlp  # noqa: F401 - registers its checks
import cuda_parity_tmpd  # noqa: F401 - registers its checks
import numpy as np
import pytest
from cuda_parity import CHECKS, all_entries
from host_cuda import HostRuntime, has_compiler

from fastdiff.backends.cuda import CudaBackend, device
from fastdiff.backends.cuda import mlp as cuda_mlp
from fastdiff.kernels.cuda import runtime

ENTRIES = sorted(all_entries())
TILED = [(source, entry) for source, entry in ENTRIES if source in ("noise", "step") and entry.endswith("_rows")]
COVERING = [(name, *key) for name, check in CHECKS.items() for key in sorted(check.covers)]


class Broken(HostRuntime):
    """A runtime on which everything that one entry changes becomes zero."""

    def __init__(self, source, entry):
        super().__init__()
        self.broken = source, entry

    def launch(self, source, entry, grid, block, args, shared_bytes=0):
        if (source, entry) != self.broken:
            super().launch(source, entry, grid, block, args, shared_bytes)
            return
        parameters = runtime.entries(source)[entry]
        written = [a for p, a in zip(parameters, args, strict=True) if p.pointer and p.written and a is not None]
        before = [array.copy() for array in written]
        super().launch(source, entry, grid, block, args, shared_bytes)
        for array, old in zip(written, before, strict=True):
            word = np.dtype(f"u{array.itemsize}")
            array[array.view(word) != old.view(word)] = 0


def uncovered(entries):
    """The entries that no parity check names."""
    return set(entries).difference(*(check.covers for check in CHECKS.values()))


def test_every_entry_has_a_parity_check():
    assert not uncovered(ENTRIES)
    assert uncovered([*ENTRIES, ("step", "new")]) == {("step", "new")}
    stale = {key for check in CHECKS.values() for key in check.covers}.difference(ENTRIES)
    assert not stale


@pytest.mark.parametrize("source", runtime.source_names())
def test_no_entry_hides(source):
    """What is a kernel in the text is an entry of the runtime, however it is written."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", runtime._read(f"{source}.cu"), flags=re.DOTALL)
    assert len(re.findall(r"\bFD_KERNEL\b", text)) == len(runtime.entries(source)) > 0
    assert "__global__" not in text


def test_bounds_are_those_of_the_launch():
    """More threads than an entry has promised its compiler are refused on a GPU, and nowhere else."""
    (threads,) = re.findall(r"FD_BOUNDS\((\d+), \d+\)\s+mlp_chain\(", runtime._read("mlp.cu"))
    assert int(threads) == cuda_mlp.THREADS
    for source, entry in (("noise", "forward_noise_wide"), ("step", "step_noisy_wide"), ("step", "step_recorded_wide")):
        (threads,) = re.findall(rf"FD_BOUNDS\((\d+), \d+\)\s+{entry}\(", runtime._read(f"{source}.cu"))
        assert int(threads) == runtime.CupyRuntime.block
    (tile,) = re.findall(r"TILE_THREADS = (\d+), TILE_LINES = (\d+),", runtime._read("tiles.cuh"))
    assert tuple(map(int, tile)) == (device.TILE_THREADS, device.TILE_LINES)
    for source, entry in TILED:
        assert re.search(rf"FD_BOUNDS\(TILE_THREADS, 2\)\s+{entry}\(", runtime._read(f"{source}.cu"))
    (bits,) = re.findall(r"DIGIT_BITS = (\d+), DIGITS = 1 << DIGIT_BITS", runtime._read("mlp.cu"))
    assert 1 << int(bits) == cuda_mlp.THREADS  # of mlp_order_times
    assert "mlp_chain" in runtime.entries("mlp")


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
@pytest.mark.parametrize(("name", "source", "entry"), COVERING, ids=[f"{c[0]}-{c[2]}" for c in COVERING])
def test_a_check_notices_a_wrong_entry(name, source, entry):
    """Hence the check launches the entry, and compares everything that depends on its result."""
    broken = Broken(source, entry)
    with pytest.raises(AssertionError, match=r"differ|off by"):
        CHECKS[name].run(CudaBackend(broken), "small")
    assert (source, entry) in broken.launches
