"""What is installed, what an import costs, which room may hold what, and that a skipped lane cannot hide."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_readme import reference
from tolerances import HANG_SECONDS, IMPORT_SECONDS

import fastdiff

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code):
    """The output of a fresh interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True).stdout


# ------------------------------------------------------------------------------------------- what is installed


def test_every_package_is_shipped():
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {
        str(path.parent.relative_to(ROOT)).replace(os.sep, ".")
        for top in ("fastdiff", "kernels")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == {re.sub(r"^kernels", "fastdiff.kernels", folder) for folder in folders}
    assert setuptools["package-dir"] == {"fastdiff": "fastdiff", "fastdiff.kernels": "kernels"}
    assert (ROOT / "fastdiff" / "py.typed").exists()
    assert "py.typed" in setuptools["package-data"]["fastdiff"]


def test_one_version():
    version = PYPROJECT["project"]["version"]
    assert fastdiff.__version__ == version
    assert importlib.metadata.version("fastdiff-engine") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_public_names():
    names = set(fastdiff.__all__)
    assert names >= {
        "available_backends", "get_backend", "Schedule", "normal", "forward_noise", "forward_chain", "posterior",
        "samplers", "sample", "MLP", "Diffusion", "load", "denoisers", "data", "errors",
    }  # fmt: skip
    assert all(hasattr(fastdiff, name) for name in names)


def test_the_exact_denoisers_have_a_public_name():
    from fastdiff import denoisers, exact

    assert denoisers.__all__ == exact.__all__
    assert all(getattr(denoisers, name) is getattr(exact, name) for name in exact.__all__)


def test_what_the_code_imports_is_declared():
    """Every third-party module is a dependency, or belongs to an extra."""
    project = PYPROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = " ".join([*project["dependencies"], *extras, "PIL", "sklearn"])  # of pillow and scikit-learn
    for path in sources("fastdiff", "kernels"):
        for name, _ in imports(path):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in ("fastdiff", "llvmlite")  # llvmlite is a part of numba
            assert known or re.search(rf"\b{top}\b", declared, re.IGNORECASE), f"{path}: {top}"


# ------------------------------------------------------------------------------------------- what an import costs


def test_an_import_loads_nothing_heavy():
    loaded = python("import sys, fastdiff; print(*sys.modules)").split()
    heavy = {"numba", "llvmlite", "scipy", "cupy", "matplotlib", "PIL", "torch", "pandas", "sklearn", "IPython"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert not [name for name in loaded if name.startswith("fastdiff.kernels")]


@pytest.mark.timed
def test_an_import_is_quick(monkeypatch, tmp_path):
    """From compiled sources, as every import but the first, also where Python has been told to keep none."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = "import time; start = time.perf_counter(); import fastdiff; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(4)) < IMPORT_SECONDS


def test_the_command_line_shows_help_without_numba():
    loaded = python(
        "import sys, contextlib, fastdiff.cli\n"
        "with contextlib.suppress(SystemExit): fastdiff.cli.main(['--help'])\n"
        "print(*sys.modules)"
    )
    assert "usage" in loaded
    assert not {"numba", "scipy", "matplotlib"} & set(loaded.split())


# ------------------------------------------------------------------------------------------- which room holds what


def sources(*tops):
    return [path for top in tops for path in (ROOT / top).rglob("*.py")]


def imports(path):
    """(module, names) of every import statement of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, tuple(alias.name for alias in node.names)


def test_fastdiff_holds_no_kernel():
    for path in sources("fastdiff"):
        assert not [name for name, _ in imports(path) if name.split(".")[0] in ("numba", "llvmlite")], path


def test_kernels_are_imported_under_one_name():
    for path in sources("fastdiff", "kernels", "tests", "examples", "benchmarks"):
        assert not [name for name, _ in imports(path) if name.split(".")[0] == "kernels"], path


# Files of the CPU's kernels with functions of more parameters: those of convolutions and products.
LONG = {"conv.py", "gemm.py", "gemm_nested.py", "linear.py", "winograd.py", "winograd_rows.py"}


def test_kernels_of_the_cpu_have_few_parameters():
    """What belongs together comes as one: no more than 12."""
    long = {}
    for path in (ROOT / "kernels" / "cpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                own = node.args
                count = len([*own.posonlyargs, *own.args, *own.kwonlyargs])
                if count > 12:
                    long.setdefault(path.name, {})[node.name] = count
    assert set(long) == LONG, {name: long[name] for name in long if name not in LONG}


def test_rooms_depend_one_way():
    """model -> sampling, nn -> process -> backends -> kernels; nothing looks back."""
    order = [
        "errors", "signals", "forks", "rounded", "files", "tensor_file", "noise", "pictures", "data",
        "backends", "observations", "schedule", "samplers", "denoiser", "process", "sampling", "exact", "nn",
        "defaults", "checkpoint", "normaliser", "judgement", "split", "training", "model_file",
        "recordings", "generation", "evaluation", "answers", "calibration", "fitting", "model", "cli",
    ]  # fmt: skip
    rank = {room: k for k, room in enumerate(order)}

    def room(module):
        return module.split(".")[1] if module.startswith("fastdiff.") else None

    for path in sources("fastdiff"):
        own = path.relative_to(ROOT / "fastdiff").parts[0].removesuffix(".py")
        if own not in rank or own == "noise":  # fd.normal asks for a backend, inside the function
            continue
        for module, names in imports(path):
            seen = [room(module)] if module != "fastdiff" else list(names)
            for other in seen:
                assert rank.get(other, -1) <= rank[own], f"{path} imports {other}"
    for path in sources("kernels"):
        for module, _ in imports(path):
            known = (
                room(module) in (None, "kernels", "noise", "errors", "signals")
                or module == "fastdiff.backends.protocol"
            )
            assert known, f"{path} imports {module}"


def test_backends_depend_one_way():
    """cpu, cuda -> numpy -> layers -> protocol; the package, which chooses, imports the others when it is asked to."""
    below = {"protocol": set(), "layers": {"protocol"}, "numpy": {"protocol", "layers"}, "__init__": {"protocol"}}
    below["cpu"] = below["cuda"] = {"protocol", "layers", "numpy"}
    seen = set()
    for path in sources("fastdiff/backends"):
        own = path.relative_to(ROOT / "fastdiff" / "backends").parts[0].removesuffix(".py")
        seen.add(own)
        for module, _ in loaded_with(path):
            if module.startswith("fastdiff.backends"):
                other = [*module.split("."), "__init__"][2]
                assert other == own or other in below[own], f"{path} imports {module}"
    assert seen == set(below)


def loaded_with(path):
    """(module, name or None) of what is imported when a file is, and not later, in a function, or for types alone."""
    for node in ast.parse(path.read_text()).body:
        for inner in [node, *(node.body if isinstance(node, ast.Try) else [])]:
            if isinstance(inner, ast.Import):
                yield from ((alias.name, None) for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                yield from ((inner.module, alias.name) for alias in inner.names)


def test_no_file_waits_for_itself():
    """There is no circle among the imports of all files."""
    modules = {}
    for path in sources("fastdiff", "kernels"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name if name.startswith("fastdiff") else f"fastdiff.{name}"] = path
    needs = {}
    for name, path in modules.items():
        found = {f"{module}.{part}" if f"{module}.{part}" in modules else module for module, part in loaded_with(path)}
        needs[name] = found & set(modules)
    assert needs["fastdiff.backends.cpu.mlp"] >= {"fastdiff.backends.cpu.step", "fastdiff.kernels.cpu.mlp"}
    while free := {name for name, of in needs.items() if not of & set(needs)}:
        needs = {name: of for name, of in needs.items() if name not in free}
    assert not needs


# ------------------------------------------------------------------------------------------- signatures

MOST_PARAMETERS = 7
MAY_HAVE_MORE = {"read_table", "conv_backward"}  # the one has the options of load_curves


def public_functions():
    """(module, qualified name) of the functions of the reference, and of constructors and methods of its classes.

    A protocol is none of them: what a backend must offer is called by the library alone.
    """
    conf, found = reference(), set()
    for room in map(importlib.import_module, conf.ROOMS):
        for each in (getattr(room, name) for name in conf.public(room)):
            values = [each]
            if inspect.isclass(each):
                of = [] if getattr(each, "_is_protocol", False) else each.__mro__
                own = [item for base in of for item in vars(base).items()]
                values = [value for name, value in own if not name.startswith("_") or name == "__init__"]
            for value in values:
                function = inspect.unwrap(getattr(value, "__func__", value))
                if inspect.isfunction(function):
                    found.add((function.__module__, function.__qualname__))
    return found


def functions(node, within=""):
    """(qualified name, definition) of every function in a tree, also of those in others."""
    for child in ast.iter_child_nodes(node):
        inner = within
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield within + child.name, child
            inner = f"{within}{child.name}.<locals>."
        elif isinstance(child, ast.ClassDef):
            inner = f"{within}{child.name}."
        yield from functions(child, inner)


def test_functions_have_few_parameters():
    """What belongs together is one argument. Public functions may have any number of options, by keyword alone."""
    public, seen, long = public_functions(), set(), {}
    for path in sources("fastdiff"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name, node in functions(ast.parse(path.read_text())):
            by_place = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            count = len(by_place) - (by_place[:1] in (["self"], ["cls"]))
            if (module, name) in public:
                seen.add((module, name))
            else:
                count += len(node.args.kwonlyargs)
            if count > MOST_PARAMETERS and node.name not in MAY_HAVE_MORE:
                long[f"{path.relative_to(ROOT)}:{node.lineno} {name}"] = count
    assert len(seen) > 200, "the reference was not found"
    assert not long


# ------------------------------------------------------------------------------------------- skipped lanes


@pytest.mark.parametrize(("required", "code"), [("1", 1), ("0", 0)])
def test_a_skip_fails_where_all_lanes_are_required(pytester, monkeypatch, required, code):
    monkeypatch.setenv("FASTDIFF_REQUIRE_ALL", required)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile("import pytest\ndef test_1(): pytest.skip('no such machine')\ndef test_2(): pass")
    result = pytester.runpytest_subprocess("-ra", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == code
    result.stdout.fnmatch_lines(["SKIPPED*no such machine"])
    assert ("FASTDIFF_REQUIRE_ALL: 1 skipped" in result.stdout.str()) == (required == "1")


def test_the_peers_lane_is_one_skip_where_there_are_no_peers(pytester, monkeypatch):
    monkeypatch.delenv("FASTDIFF_REQUIRE_ALL", raising=False)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.mkdir("peers").joinpath("test_peer.py").write_text("def test_1(): pass\ndef test_2(): pass\n")
    result = pytester.runpytest_subprocess("-ra", "-p", "no:cacheprovider")
    if find_spec("torch") is None or find_spec("diffusers") is None:
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(["SKIPPED*peers lane needs*"])
    else:
        result.assert_outcomes(passed=2)


def test_a_part_counts_what_it_leaves_out(pytester):
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(
        test_cuda_any="def test_1(): pass",
        test_asv="import pytest\ndef test_1(): pass\n@pytest.mark.timed\ndef test_2(): pass",
        test_it="import pytest\n@pytest.mark.slow\ndef test_1(): pass\n"
        "@pytest.mark.parametrize('on', ['cpu', 'cuda'])\ndef test_2(on): pass",
    )
    # Files of "timed" and "rest" that have none are not read.
    counts = {"quick": (1, 2), "cuda": (2, 4), "timed": (1, 1), "rest": (2, 3), None: (6, 0)}
    for part, (passed, deselected) in counts.items():
        option = f"--part={part}" if part else "-ra"
        result = pytester.runpytest_subprocess(option, "-o", "markers=slow\n timed", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=passed, deselected=deselected)
        assert ("--part=quick: 2 files left out (" in result.stdout.str()) == (part == "quick")
