"""What the command line says of itself: completion of shells, the doctor, versions, exit codes, no colours."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import cli
from fastdiff.cli import doctor


def printed(command, capsys):
    code = cli.main(command.split())
    return code, capsys.readouterr().out


def parser_of(command):
    actions = cli.build_parser()._actions
    return next(action.choices for action in actions if action.choices)[command]


# ------------------------------------------------------------------------------------ completion


@pytest.fixture(scope="module")
def completed():
    """What bash would offer for a line whose last word is being written."""
    script = subprocess.run(
        [sys.executable, "-m", "fastdiff", "completion", "bash"], check=True, capture_output=True, text=True
    ).stdout
    asked = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fastdiff; printf "%s\\n" "${COMPREPLY[@]}"'

    def offered(*words):
        line = ["bash", "-c", f"{script}\n{asked}", "bash", "fastdiff", *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()

    return offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["s"], ["sample", "score"]),
        (["--v"], ["--version"]),
        (["train", "x.csv", "--sche"], ["--schedule"]),
        (["train", "--schedule", "s"], ["sigmoid", "scaled_linear"]),
        (["info", "--backend", ""], ["auto", "numpy", "cpu", "cuda"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["sample", "m.safetensors", "-o", ""], []),  # then bash offers files
        (["bench", "--ti"], []),  # --tiny is for tests
    ],
)
def test_bash_completes(completed, words, offered):
    assert completed(*words) == offered


def test_every_option_is_completed(completed, capsys):
    _, fish = printed("completion fish", capsys)
    for command in ("train", "sample", "bench"):
        parser = parser_of(command)
        wanted = {o for action in parser._actions if action.help != "==SUPPRESS==" for o in action.option_strings}
        assert set(completed(command, "-")) == wanted
        lines = re.findall(rf"^complete -c fastdiff -n '__fish_seen_subcommand_from {command}'(.*)", fish, re.M)
        found = {f"--{word}" for line in lines for word in re.findall(r"-l (\S+)", line)}
        found |= {f"-{word}" for line in lines for word in re.findall(r"-s (\S+)", line)}
        assert found == wanted


def test_zsh_gets_bash_s_function_and_what_runs_it(capsys):
    _, bash = printed("completion bash", capsys)
    _, zsh = printed("completion zsh", capsys)
    first, rest = zsh.split("\n", 1)
    assert "bashcompinit" in first
    assert rest == bash


# ------------------------------------------------------------------------------------ doctor


def test_the_doctor_finds_what_works(capsys):
    code, out = printed("doctor", capsys)
    assert code == 0
    states = {line.split()[1]: line.split()[0] for line in out.splitlines()[1:]}
    assert {states[part] for part in ("python", "numpy", "numba", "processor", "kernels", "noise,")} == {"ok"}
    if "cuda" not in fd.available_backends():
        assert states["GPU"] == "none"
        assert "pip install 'fastdiff-engine[cuda13]'" in out
    code, text = printed("doctor --json", capsys)
    assert [f["part"] for f in json.loads(text)["findings"]][:2] == ["python", "numpy"]


def test_the_doctor_finds_what_is_bad(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_noise", lambda backend: (_ for _ in ()).throw(ArithmeticError("other bits")))
    monkeypatch.setattr("fastdiff.kernels.cpu.jit.cache_folder", lambda: None)
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("scipy", "pyarrow") else "1.0")
    code, out = printed("doctor", capsys)
    assert code == 1
    bad = [line.strip() for line in out.splitlines() if line.startswith("  bad")]
    assert [re.split(r" {2,}", line)[1] for line in bad] == ["scipy", "kernels", "noise, cpu"]
    assert "NUMBA_CACHE_DIR" in bad[1]
    assert re.search(r"^  none  pyarrow +not installed; Parquet files: pip install", out, re.M)
    looked_at = {"pandas", "pyarrow", "scikit-learn", "zarr", "dask", "mpi4py", "matplotlib", "pillow"}
    assert looked_at <= set(re.findall(r"^  \w+ +(\S+)", out, re.M))


def test_the_doctor_looks_at_bits(monkeypatch):
    usual = fd.normal

    def another(shape, *, backend, **options):
        z = usual(shape, backend=backend, **options)
        return z if backend == "numpy" else np.nextafter(z, np.float32(9))

    monkeypatch.setattr(fd, "normal", another)
    with pytest.raises(ArithmeticError, match="other bits"):
        doctor._noise("cpu")


# ------------------------------------------------------------------------------------ words


def test_the_version_comes_with_backends_and_packages(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"fastdiff {version('fastdiff-engine')}"
    assert second.startswith(f"backends: {', '.join(fd.available_backends())}; python 3.")
    assert f"numpy {np.__version__}" in second


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("train c.csv --schedule sigmod", "; did you mean sigmoid?"),
        ("sample m.safetensors -o x.csv --sampler dpmpp2m", "; did you mean dpmpp_2m?"),
        ("train c.csv --lr-plan one_cycle --epochs 3", "mean one-cycle?; unrecognized option --epochs: did you mean"),
        ("train c.csv --schedule zzz", "'flow')\n"),
        ("check", "did you mean doctor?"),
    ],
)
def test_mistyped_values_are_told_the_nearest(command, meant, capsys):
    with pytest.raises(SystemExit):
        cli.main(command.split())
    assert meant in capsys.readouterr().err


def test_names_of_the_library_are_told_the_nearest():
    with pytest.raises(fd.errors.ArgumentError, match=r"one of .*'karras'.*; did you mean 'karras'\?$"):
        fd.Schedule.cosine(10).timesteps(3, spacing="karas")
    with pytest.raises(fd.errors.ArgumentError, match=r"'trailing'") as refused:
        fd.Schedule.cosine(10).timesteps(3, spacing="zzz")
    assert "did you mean" not in str(refused.value)


def test_exit_codes_are_documented(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert cli.EXIT_CODES in capsys.readouterr().out
    assert {int(code) for code in re.findall(r"^  (\d+) ", cli.EXIT_CODES, re.M)} == {0, 1, 2, 130}


def test_nothing_is_coloured_in_a_terminal():
    """Output, a bar and an error on a terminal, with NO_COLOR: no sequence that sets a colour."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    theirs, ours = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    code = (
        "import sys; from fastdiff import cli, progress\n"
        "with progress.bar(show=True, total=2, desc='x') as bar: bar.update(); bar.update()\n"
        "cli.main(['info']); sys.exit(cli.main(['info', 'none.safetensors']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=ours, stderr=ours, env=os.environ | {"NO_COLOR": "1", "TERM": "xterm"}
    )
    os.close(ours)
    said = b""
    while True:
        try:
            said += os.read(theirs, 4096)
        except OSError:  # the other end is closed
            break
    os.close(theirs)
    assert child.wait() == 2
    assert b"fastdiff: error: none.safetensors" in said
    assert b"2/2" in said
    assert not re.search(rb"\x1b\[[\d;]*m", said)
