"""The README's code runs as it stands: every Python block alone, and every command as far as its options."""

import re
from pathlib import Path

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import cli

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
STEPS, ROWS, PICTURE_T = 3, 200, 5  # of the short runs below


def blocks(language):
    """The blocks of a language, each by the line of the README that it starts on."""
    text = README.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in BLOCK.finditer(text) if m[1] == language]
    return [pytest.param(line, code, id=f"line {line}") for line, code in found]


@pytest.fixture
def _short_runs(monkeypatch):
    """Training takes a few steps only, on few rows, and pictures have few timesteps. Nothing else is changed."""
    fit, curves = fd.Diffusion.fit, fd.data.harmonic_curves

    def short_fit(model, X, y=None, **options):
        return fit(model, X, y, **{**options, "steps": STEPS, "progress": False})

    def few_curves(n, **options):
        return curves(min(n, ROWS), **options)

    monkeypatch.setattr(fd.Diffusion, "fit", short_fit)
    monkeypatch.setattr(fd.data, "harmonic_curves", few_curves)
    monkeypatch.setattr("fastdiff.model.PICTURE_T", PICTURE_T)


@pytest.fixture
def _what_a_reader_has(tmp_path, monkeypatch):
    """A folder of pictures, and a network that diffusers has written."""
    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 36, 3), np.uint8)
    fd.data.save_images(pictures, "pictures")
    fd.UNet((8, 8, 3), channels=(8, 8), blocks=1, T=PICTURE_T).save_diffusers("ddpm-cifar10-32")


@pytest.mark.usefixtures("_short_runs", "_what_a_reader_has")
@pytest.mark.parametrize(("line", "code"), blocks("python"))
def test_a_block_runs_as_it_stands(line, code):
    exec(compile("\n" * (line - 1) + code, README, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("line", "code"), blocks("sh"))
def test_commands_have_the_options_that_they_are_given(line, code):
    parser = cli._parser()
    for command in re.findall(r"^fastdiff (.*?)(?: +#.*)?$", code, re.M):
        parser.parse_args(command.split())


def test_the_readme_has_blocks():
    assert len(blocks("python")) >= 4
    assert any("fastdiff train" in block.values[1] for block in blocks("sh"))
