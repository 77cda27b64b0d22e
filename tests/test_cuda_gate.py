"""The compile gate: every CUDA source compiles for every architecture, and its entries cost what they did."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import cuda_code
import cuda_gate
import numpy as np
import pytest

from fastdiff.backends.cuda.conv_mma import TILES, source_of
from fastdiff.backends.cuda.mlp import THREADS
from fastdiff.kernels.cuda import runtime

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpu_sweep = importlib.import_module("gpu_sweep")

GATE = Path(cuda_gate.__file__)
CODE = cuda_code.Found(4, 0.0, 0.5)
REGISTERS = 1 << 16  # of a multiprocessor, on all of these architectures

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers, 1024 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 21.890 ms
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
ptxas         .     256 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperf
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""

STACK = """
extern "C" __global__ void stacked(float *x, int n) {
    float a[64];
    for (int i = 0; i < 64; ++i) a[i] = x[i];
    for (int i = 0; i < n; ++i) x[i] = a[(int)x[i] & 63];
}
"""
# 200 live values in the 64 registers that 1024 threads leave to each; the barrier keeps loads and stores apart.
SPILL = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float *x) {
    float a[200];
#pragma unroll
    for (int i = 0; i < 200; ++i) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = a[199 - i] * a[i];
}
"""
GOOD = 'extern "C" __global__ void good(float *x) { x[threadIdx.x] += 1.0f; }\n'


@pytest.fixture(scope="module")
def compiler():
    try:
        return cuda_gate.find_compiler()[0]
    except cuda_gate.NoCompilerError as error:
        pytest.skip(f"the compile gate: {error}")


def gate(*arguments):
    command = [sys.executable, str(GATE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_source_passes(compiler):
    done = gate()
    assert done.returncode == 0, done.stdout + done.stderr
    sources = runtime.source_names()
    entries = [entry for source in sources for entry in runtime.entries(source)]
    sources += cuda_gate.STAGES
    tiles = [f"{entry}_{tile.name}" for entry in ("conv_mma", "conv_mma_adjoint") for tile in TILES]
    entries += [f"{tile}.{stages}" for tile in tiles for stages in (2, 4)]
    assert f"{len(sources)} sources, {len(entries)} entries, compiled by {compiler}" in done.stdout
    for entry in entries:
        for arch in cuda_gate.ARCHITECTURES:
            assert any(line.split()[:2] == [entry, arch] for line in done.stdout.splitlines()), (entry, arch)
    for name in ("mlp_chain", "mlp_chain_bf16x3", "mlp_chain_bf16"):
        chain = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
        assert len(chain) == len(cuda_gate.ARCHITECTURES)
        assert max(chain) * 2 * THREADS <= REGISTERS, f"two blocks of {name} do not fit on a multiprocessor"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (STACK, "stacked keeps 256 bytes in local memory on sm_90"),
        (SPILL, "bytes of registers on sm_90"),
        (GOOD.replace("float", "flaot"), "does not compile for sm_90"),
    ],
    ids=["stack", "spill", "syntax"],
)
def test_what_does_not_pass(compiler, tmp_path, text, fault):
    (tmp_path / "good.cu").write_text(GOOD)
    (tmp_path / "bad.cu").write_text(text)
    done = gate("--arch", "sm_90", tmp_path / "good.cu", tmp_path / "bad.cu")
    assert done.returncode == 1
    assert fault in done.stderr
    assert "good" in done.stdout
    assert "good.cu" not in done.stderr


def test_what_passes(compiler, tmp_path):
    (tmp_path / "good.cu").write_text(GOOD)
    done = gate("--arch", "sm_90", tmp_path / "good.cu")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_entry_that_only_one_side_sees_fails(compiler):
    compile_text = cuda_gate.find_compiler()[1]
    for wanted in ({"good": 8, "lost": 8}, {}):
        _, faults = cuda_gate.examine({"source": GOOD}, {"source": wanted}, compile_text, ["sm_90"])
        assert len(faults) == 1
        assert "does not see this entry" in faults[0]
    assert cuda_gate.examine({"source": GOOD}, {"source": {"good": 8}}, compile_text, ["sm_90"])[1] == []


def test_parameters_of_another_size_fail(compiler):
    """What the compiler has is what the launches pack: here with gaps before an int64 and behind a float."""
    text = 'extern "C" __global__ void packed(float *x, int n, long long m, float a) { x[n + m] = a; }\n'
    parameters = [runtime.Parameter(name, np.dtype(dtype), name == "x", True) for name, dtype in
                  (("x", "f4"), ("n", "i4"), ("m", "i8"), ("a", "f4"))]  # fmt: skip
    size = cuda_gate.declared_size(parameters)
    assert size == 28
    compile_text = cuda_gate.find_compiler()[1]
    assert cuda_gate.examine({"source": text}, {"source": {"packed": size}}, compile_text, ["sm_90"])[1] == []
    faults = cuda_gate.examine({"source": text}, {"source": {"packed": 24}}, compile_text, ["sm_90"])[1]
    assert faults == ["source.cu: packed on sm_90 takes 28 bytes of parameters, declared are 24"]


UNROLLED = """
extern "C" __global__ void moved(const float4 *__restrict__ x, float4 *__restrict__ y, int n) {
#pragma unroll UNROLL
    for (int i = 0; i < 64; ++i) y[i * n] = x[i * n];
}
"""
MULTIPLIED = """
extern "C" __global__ void multiplied(const float *__restrict__ x, float *__restrict__ y, int n) {
    __shared__ float tile[1024];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float sums[8] = {};
    for (int i = 0; i < n; i++) {
#pragma unroll UNROLL
        for (int j = 0; j < 8; j++) sums[j] = fmaf(tile[i * 8 + j], tile[i * 8 + 7 - j], sums[j]);
    }
    for (int j = 0; j < 8; j++) y[threadIdx.x * 8 + j] = sums[j];
}
"""


@pytest.fixture(scope="module")
def disassembler():
    return cuda_code.disassembler() or pytest.skip(f"the machine code: {cuda_code.MISSING}")


def test_a_lost_unroll_is_seen(compiler, disassembler):
    compile_text = cuda_gate.find_compiler()[1]

    def found(text, unroll):
        code = compile_text(text.replace("UNROLL", str(unroll)), "sm_90").code
        ((of, made),) = cuda_code.found(disassembler, code).items()
        assert of in text
        return made

    assert found(UNROLLED, 8).loads >= 4
    assert found(UNROLLED, 1).loads == 1
    assert found(MULTIPLIED, 8).products > 2 * found(MULTIPLIED, 1).products > 0


ROOT = 'extern "C" __global__ void root(float *x) { x[threadIdx.x] = sqrtf(x[threadIdx.x]); }\n'


@pytest.mark.parametrize("arch", cuda_gate.ARCHITECTURES)
def test_a_root_has_the_steps_of_ours(compiler, disassembler, arch):
    """`fd_root_by` of laws.cuh is what the compiler makes of sqrtf, but for its test for other numbers."""
    compile_text = cuda_gate.find_compiler()[1]
    code, _ = cuda_code.entries(cuda_code.listing(disassembler, compile_text(ROOT, arch).code))["root"]
    steps = [(name.split(".")[0], *re.split(r",\s*", operands.replace(".reuse", ""))) for name, operands, *_ in code]
    (_, reciprocal, x), *steps = steps[[name for name, *_ in steps].index("MUFU") :]
    steps = [step for step in steps if step[0] in ("FMUL", "FFMA")][:4]  # what follows is for other numbers
    (_, root, *factors), (_, half, *halves), (_, rest, *squares), (_, _, *sums) = sorted(
        steps, key=lambda step: (step[0] == "FFMA", "0.5" in step)
    )
    assert (set(factors), set(halves)) == ({x, reciprocal}, {reciprocal, "0.5"})
    assert (squares, sums) == ([f"-{root}", root, x], [rest, half, root])


SASS = """
	.text.streamed:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.RSQ R20, R21 ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
.L_x_2:
        /*0060*/                   FFMA R7, R7, R9, R10 ;
        /*0070*/                   LDG.E.128 R12, desc[UR4][R2.64+0x20] ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
"""


def test_listings_are_read():
    """The loop has eight instructions, and its second turn begins before anything reads R12."""
    ((name, (code, labels)),) = cuda_code.entries(SASS).items()
    assert (name, len(code), cuda_code.loops(code, labels)) == ("streamed", 11, [(1, 8)])
    assert cuda_code.look(code, labels, 2) == cuda_code.Found(3, 4.0, 1 / 3, 4.0)


WAYS = """
	.text.branching:
.L_x_1:
        /*0010*/                   FSETP.NEU.AND P0, PT, R0, RZ, PT ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   FADD R1, R1, R4 ;
.L_x_3:
        /*0070*/                   BRA.U UP0, `(.L_x_4) ;
        /*0080*/                   FADD R1, R1, R5 ;
.L_x_4:
        /*0090*/                   MUFU.RSQ R20, R21 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""


def test_a_turn_takes_one_of_two_ways():
    """Ten instructions are in the loop: one side of the first branch has three, the other one; the last may be left."""
    code, labels = cuda_code.entries(WAYS)["branching"]
    assert cuda_code.loops(code, labels) == [(0, 9)]
    assert [at for at, instruction in enumerate(code) if instruction.always] == [4]
    assert cuda_code.lengths(code, labels) == [9]
    assert cuda_code.longest_way(code, labels, 4, 9) == 5


@pytest.mark.parametrize(
    ("entry", "found", "said"),
    [
        ("normal", cuda_code.Found(0, 63.0, 0.0, 63.0), "takes 63.0 instructions a value, allowed are 46.5"),
        ("step_noisy", cuda_code.Found(0, 59.0, 0.0, 99.0), "takes 99.0 instructions a value, allowed are"),
        ("step_noisy", cuda_code.Found(0, 0.0, 0.0), "takes 0.0 instructions a value"),
        ("norm_forward", cuda_code.Found(1, 0.0, 0.0), "has 1 loads of 16 bytes on their way at once"),
        ("mlp_chain", cuda_code.Found(0, 0.0, 0.5), "multiplies with 50% of its instructions, wanted are 60%"),
    ],
)
def test_what_may_not_be_worse(entry, found, said):
    use = cuda_gate.Use("sm_90", entry, 70, 0, 0, 0, 8, found)
    assert said in use.fault
    assert "FAILS" in cuda_gate.table([use])
    assert not use._replace(code=cuda_code.Found(99, 1.0, 1.0, 1.0)).fault
    known = {entry for source in runtime.source_names() for entry in runtime.entries(source)}
    assert known >= {*cuda_code.VALUES, *cuda_code.LEAST_LOADS, *cuda_code.LEAST_PRODUCTS}


def test_every_number_of_stages_is_compiled():
    """That `make gpu` tries; the floors of what depends on it are those of the usual one."""
    assert {*cuda_gate.STAGES, "conv_mma"} == {source_of(stages) for stages in gpu_sweep.STAGES}
    assert {*cuda_gate.STAGES}.isdisjoint(runtime.source_names())
    text = [runtime.source_text(source).count("#define FD_STAGES 4") for source in ("conv_mma", "conv_mma.4")]
    assert text == [0, 1]
    slow = cuda_code.Found(1, 0.0, 1.0)
    assert "has 1 loads" in cuda_gate.Use("sm_90", "conv_mma_128x128.4", 128, 0, 0, 0, 148, slow).fault


def test_without_nvdisasm_the_rest_is_compared(monkeypatch, tmp_path, capsys):
    kept, row = tmp_path / "kept.txt", cuda_gate.Use("sm_90", "first", 70, 1024, 0, 0, 8, CODE)
    monkeypatch.setattr(cuda_gate, "KEPT", kept)
    kept.write_text(f"NVRTC 13.0\n{cuda_gate.table([row])}\n")
    assert cuda_gate.changes(f"NVRTC 13.0\n{cuda_gate.table([row._replace(code=None)])}\n") == []
    assert cuda_gate.changes(f"NVRTC 13.0\n{cuda_gate.table([row._replace(code=None, shared=0)])}\n")
    assert len(cuda_gate.changes(f"NVRTC 13.0\n{cuda_gate.table([row._replace(code=CODE._replace(loads=3))])}\n")) == 2
    monkeypatch.setattr(cuda_code.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda_code, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_gate, "find_compiler", lambda wanted: ("NVRTC 13.0", None))
    monkeypatch.setattr(cuda_gate, "examine", lambda *args: ([row._replace(code=None)], []))
    cuda_gate.main(["--arch", "sm_90"])
    assert "not looked at: there is no nvdisasm" in capsys.readouterr().out


def test_the_table_is_renewed_on_request_only(monkeypatch, tmp_path, capsys):
    kept, rows = tmp_path / "kept.txt", [cuda_gate.Use("sm_90", "first", 70, 1024, 0, 0, 8, CODE)]
    monkeypatch.setattr(cuda_gate, "KEPT", kept)
    monkeypatch.setattr(cuda_gate, "find_compiler", lambda wanted: ("NVRTC 13.0", None))
    monkeypatch.setattr(cuda_gate, "examine", lambda *args: (rows, []))
    assert cuda_gate.main([]) == 1
    assert not kept.exists()
    assert cuda_gate.main(["--renew"]) == 0
    assert cuda_gate.main([]) == 0
    capsys.readouterr()
    rows[0] = rows[0]._replace(registers=71)
    assert cuda_gate.main([]) == 1
    assert "-first  sm_90" in (said := capsys.readouterr().err)
    assert "--renew writes it" in said
    assert cuda_gate.main(["--arch", "sm_90"]) == 0  # a part is not compared


def test_a_change_of_the_kept_table_fails(monkeypatch, tmp_path, capsys):
    """In whatever direction; the table of another compiler is left alone."""
    kept = tmp_path / "kept.txt"
    monkeypatch.setattr(cuda_gate, "KEPT", kept)
    row = cuda_gate.Use("sm_90", "first", 70, 1024, 0, 0, 8, CODE)
    text = f"NVRTC 13.0\n{cuda_gate.table([row])}\n"
    assert len(cuda_gate.changes(text)) == 3
    kept.write_text(text)
    assert cuda_gate.changes(text) == []
    (old, new) = cuda_gate.changes(f"NVRTC 13.0\n{cuda_gate.table([row._replace(registers=69)])}\n")
    assert (old[0], new[0]) == ("-", "+")
    assert "70" in old
    assert "69" in new
    assert cuda_gate.changes("NVRTC 13.5\nwhatever\n") == []
    assert "not compared" in capsys.readouterr().out
    lines = GATE.with_name("cuda_resources.txt").read_text().splitlines()
    kept_names = {line.split()[0] for line in lines}
    assert kept_names >= {entry for source in runtime.source_names() for entry in runtime.entries(source)}


def test_what_ptxas_says_is_read():
    first, second, helper = cuda_gate.uses(LOG, "sm_90")
    assert first == ("sm_90", "first", 70, 1024, 0, 0, 0, None)
    assert not first.fault
    assert second == ("sm_90", "second", 255, 0, 256, 24, 0, None)
    assert "spills 24 bytes" in second.fault
    assert helper == ("sm_90", "_Z6helperf", 0, 0, 40, 0, 0, None)
    assert "40 bytes in local memory" in helper.fault
    lines = cuda_gate.table([first, second]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["first", "sm_90", "70", "1024", "0", "0", "0"],
        ["second", "sm_90", "255", "0", "256", "24", "0", "FAILS"],
    ]


def test_no_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cuda_gate.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert cuda_gate.main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert "pip install cuda-core nvidia-cuda-nvrtc" in err
