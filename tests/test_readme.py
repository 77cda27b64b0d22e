"""The documents: their code runs as it stands, every Python block after those under its heading, and so do the
examples of docstrings, which every public name has; commands have their options; links lead somewhere."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
STEPS, ROWS, PICTURE_T = 3, 200, 5  # of the short runs below
FEW = 20  # steps that are taken as they are told


def blocks(language):
    """The blocks of a language, each by its document and the line that it starts on.

    A block of Python comes with those before it under the same heading, all else being blank.
    """
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        start = 0  # of the heading's blocks
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            if match[1] != language:
                continue
            code = match[2]
            if language == "python":
                start = text.rfind("\n## ", 0, match.start()) + 1
                line = text.count("\n", 0, start) + 1
                inside = [(m.start(2), m.end(2)) for m in BLOCK.finditer(text, start, match.end()) if m[1] == language]
                code = "".join(
                    char if char == "\n" or any(low <= at < high for low, high in inside) else ""
                    for at, char in enumerate(text[start : match.end()], start)
                )
            shown = text.count("\n", 0, match.start(2)) + 1
            found.append(pytest.param(path, line, code, id=f"{path.name}, line {shown}"))
    return found


@pytest.fixture
def _short_runs(monkeypatch):
    """Training takes a few steps only, on few rows, and pictures have few timesteps. Nothing else is changed."""
    fit, curves = fd.Diffusion.fit, fd.data.harmonic_curves

    def short_fit(model, X, y=None, **options):
        told = options.get("steps")
        steps = STEPS if told is None or told > FEW else told
        return fit(model, X, y, **{**options, "steps": steps, "progress": False})

    def few_curves(n, **options):
        return curves(min(n, ROWS), **options)

    monkeypatch.setattr(fd.Diffusion, "fit", short_fit)
    monkeypatch.setattr(fd.data, "harmonic_curves", few_curves)
    monkeypatch.setattr("fastdiff.defaults.PICTURE_T", PICTURE_T)


@pytest.fixture
def _what_a_reader_has(tmp_path, monkeypatch):
    """A folder of pictures, and a network that diffusers has written."""
    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 36, 3), np.uint8)
    fd.data.save_images(pictures, "pictures")
    fd.UNet((8, 8, 3), channels=(8, 8), blocks=1, T=PICTURE_T).save_diffusers("ddpm-cifar10-32")


@pytest.mark.usefixtures("_short_runs", "_what_a_reader_has")
@pytest.mark.parametrize(("path", "line", "code"), blocks("python"))
def test_a_block_runs_as_it_stands(path, line, code):
    exec(compile("\n" * (line - 1) + code, path, "exec"), {"__name__": "__main__"})


def examples():
    """The examples of each docstring that has any."""
    found = []
    for path in sorted((ROOT / "fastdiff").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if wanted := len(re.findall(r"^\s*>>> ", text, re.M)):
            module = importlib.import_module(
                ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            )
            tests = [
                test for test in doctest.DocTestFinder().find(module, extraglobs={"fd": fd, "np": np}) if test.examples
            ]
            assert sum(len(test.examples) for test in tests) == wanted, f"{path}: an example that would not run"
            found += [pytest.param(test, id=test.name) for test in tests]
    return found


# What examples need beside the library: of a name, or of all in a module.
NEEDED = {"fastdiff.plots": "matplotlib", "fastdiff.scale": "zarr", "fastdiff.series.on_grid": "pandas"}


@pytest.mark.usefixtures("_short_runs", "_what_a_reader_has")
@pytest.mark.parametrize("test", examples())
def test_an_example_of_a_docstring_runs(test):
    for name, package in NEEDED.items():
        if f"{test.name}.".startswith(f"{name}."):
            pytest.importorskip(package)
    assert not any(example.options for example in test.examples), "nothing is left out"
    runner, said = doctest.DocTestRunner(), []
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


# What a backend or a network must offer the library, as docs/design.md shows: a reader calls none of it.
OFFERED = ("Backend", "Network", "Program", "ProgramNetwork", "Runner")
ASKED = ("on",)  # of a denoiser, by the loop that samples


def reference():
    """docs/conf.py: the rooms of the reference are there, and which names of them are public."""
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return conf


def documented():
    """Every public name, as the reference has them, and every method of a public class, with its docstring.

    A method that another class has as well is documented there, and properties are no functions.
    """
    conf, found = reference(), {}
    for room in conf.ROOMS:
        module = importlib.import_module(room)
        for name in conf.public(module):
            if not callable(each := getattr(module, name)) or each in [value for value, _ in found.values()]:
                continue
            found[f"{room}.{name}"] = each, each.__doc__
            if not inspect.isclass(each) or name in OFFERED:
                continue
            inherited = {method for base in each.__mro__[1:-1] for method in vars(base)}
            for method in vars(each).keys() - inherited - set(ASKED):
                function = inspect.unwrap(getattr(each, method))
                if not method.startswith("_") and (inspect.isfunction(function) or inspect.ismethod(function)):
                    found[f"{room}.{name}.{method}"] = function, function.__doc__
    return {name: doc for name, (_, doc) in found.items()}


def test_every_public_function_has_an_example():
    found = documented()
    assert len(found) > 200
    lacking = [name for name, doc in found.items() if not re.search(r"^ *Examples\n *-+\n *>>> ", doc or "", re.M)]
    assert not lacking


@pytest.mark.parametrize(("path", "line", "code"), blocks("sh"))
def test_commands_have_the_options_that_they_are_given(path, line, code):
    parser = cli.build_parser()
    for command in re.findall(r"^fastdiff (.*?)(?: +#.*)?$", code, re.M):
        parser.parse_args(command.split())


def test_the_documents_have_blocks():
    files = [block.values[0].name for block in blocks("python")]
    assert files.count("README.md") >= 3
    assert files.count("design.md") >= 2
    assert any("fastdiff train" in block.values[2] for block in blocks("sh"))


# ------------------------------------------------------------------------------------------- links

FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
TARGET = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s*(\S+)", re.M)  # [text](target), and [text]: target
HEADING = re.compile(r"^#+ (.*)$", re.M)


def links(text):
    """The targets of links and pictures, but for those elsewhere on the web."""
    found = [inline or named for inline, named in TARGET.findall(FENCED.sub("", text))]
    return [target for target in found if not re.match(r"https?://|mailto:", target)]


def anchors(path):
    """The names of headings, as GitHub has them."""
    headings = HEADING.findall(FENCED.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text, folder, own):
    """Targets that are not there."""
    bad = []
    for target in links(text):
        file, _, anchor = target.partition("#")
        path = folder / file if file else own
        if not path.exists() or (anchor and anchor not in anchors(path)):
            bad.append(target)
    return bad


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(path):
    assert not broken(path.read_text(encoding="utf-8"), path.parent, path)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, this\n", encoding="utf-8")
    text = "[a](there.md) ![b](b.png) [c](there.md#a-heading-this) [d](there.md#no) [e](https://e.org)\n[f]: gone.md\n"
    text += "```\nx[0](gone)\n```\n"
    assert broken(text, tmp_path, tmp_path / "there.md") == ["b.png", "there.md#no", "gone.md"]


def test_every_picture_of_docs_is_shown():
    shown = {(path.parent / target).resolve() for path in DOCUMENTS for target in links(path.read_text("utf-8"))}
    assert set((ROOT / "docs").glob("*.png")) <= shown
