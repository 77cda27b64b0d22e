"""The documentation site: `make docs` builds it into docs/_build, with warnings as errors.

The reference is written from the docstrings of all public names when a build begins, and the gallery runs the examples:
GALLERY=0 in the environment shows them without their figures.
"""

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # for the gallery's scraper, which is named

project = "fastdiff"
author = copyright = "The fastdiff developers"  # noqa: A001
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "numpydoc",
]
html_theme = "pydata_sphinx_theme"
html_title = "fastdiff"
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 9,  # to Developers
    "secondary_sidebar_items": ["page-toc"],
}
html_show_sourcelink = False
exclude_patterns = [
    "_build",
    "_page",
    "gallery/*.py",
    "gallery/*.ipynb",
    "sg_execution_times.rst",
    "gallery/sg_execution_times.rst",
]
myst_heading_anchors = 3
myst_links_external_new_tab = False
nitpicky = False
autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say the types
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
autodoc_default_options = {"members": True, "inherited-members": True}
suppress_warnings = ["ref.ref"]  # labels of scikit-learn's own site, in what estimators inherit
copybutton_exclude = ".linenos, .gp, .go"
html_extra_path = ["_page"]  # diffusing.html, which write_page makes


# ------------------------------------------------------------------------------------------- reference

ROOMS = {
    "fastdiff": "Everything that `import fastdiff as fd` has at hand.",
    "fastdiff.samplers": "Tables of samplers: [which one](../samplers.md).",
    "fastdiff.denoisers": "Exact denoisers, their posteriors, and the exact law of a sampler's results.",
    "fastdiff.likelihood": "How likely: the variational bound, and log densities.",
    "fastdiff.covariance": "Similarity, scatter, spectra, reshaping, shrinkage.",
    "fastdiff.metrics": "How good samples and forecasts are.",
    "fastdiff.scale": "Many samples, on many workers: [how](../scaling.md).",
    "fastdiff.sklearn": "Estimators of scikit-learn: a density, and an imputer.",
    "fastdiff.callbacks": "What may look on while a model is trained.",
    "fastdiff.data": "Curves, tables and pictures: made, read and written.",
    "fastdiff.interop": "Samplers as files of another program: [which](../samplers.md#other-programs).",
    "fastdiff.nn": "Networks, and what makes one.",
    "fastdiff.plots": "Figures.",
    "fastdiff.page": "[The page](../curve.md) where a curve diffuses, as a file.",
    "fastdiff.errors": "What is raised, and what is warned of.",
}


def public(module):
    """The names that a reader may use: those of __all__, else the classes of the module, which errors has."""
    if names := getattr(module, "__all__", None):
        return [name for name in names if not inspect.ismodule(getattr(module, name))]
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return [name for name, value in own.items() if inspect.isclass(value) and not name.startswith("_")]


def write_reference():
    folder = DOCS / "reference"
    folder.mkdir(exist_ok=True)
    names, seen, pages = [], [], set()
    for room, about in ROOMS.items():
        module = importlib.import_module(room)
        shown = [name for name in public(module) if callable(getattr(module, name))]
        shown = [
            name for name in shown if getattr(module, name) not in seen
        ]  # MLP is fastdiff's, and not nn's once more
        seen += [getattr(module, name) for name in shown]
        constants = [name for name in public(module) if not callable(getattr(module, name))]
        lines = [f"# {room}", "", about, "", "```{eval-rst}", f".. currentmodule:: {room}", "", ".. autosummary::"]
        lines += ["   :toctree: api", "", *(f"   {name}" for name in shown), "```", ""]
        if constants:
            lines += ["Besides: " + ", ".join(f"`{name}`" for name in constants) + ".", ""]
        _write(folder / f"{room}.md", "\n".join(lines))
        pages |= {f"{room}.{name}" for name in shown}
        names.append(room)
    toc = "\n".join(names)
    text = f"# Reference\n\nEvery public name, from its docstring.\n\n```{{toctree}}\n:maxdepth: 1\n\n{toc}\n```\n"
    _write(folder / "index.md", text)
    for page in (folder / "api").glob("*.rst"):
        if page.stem not in pages:  # of an earlier build
            page.unlink()


def write_page():
    """The page where a curve diffuses, which docs/curve.md shows."""
    from fastdiff import page

    folder = DOCS / "_page"
    folder.mkdir(exist_ok=True)
    _write(folder / "diffusing.html", page.document())


def escape(app, what, name, obj, options, lines):
    """|x|, and shapes like (n, *shape), are text in our docstrings, which are written to be read in a terminal too."""
    block = None  # the indentation of what announced a literal block
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None and not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")
            parts[::2] = [re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "``".join(parts)
        if line.rstrip().endswith("::"):
            block = indent


def name_files(app, docname, source):
    """A link to a file of the repository that is no page here becomes its name."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])


def _write(path, text):
    if not path.exists() or path.read_text() != text:  # an unchanged page is not built again
        path.write_text(text)


# ------------------------------------------------------------------------------------------- gallery

# A minute each at most; the others are shown without being run, and their pictures are on other pages.
RUN = ("answers", "covariance", "curves", "guidance", "series")


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/(" + "|".join(RUN) + ")\\.py$",
    "ignore_pattern": r"__init__\.py",
    "plot_gallery": os.environ.get("GALLERY") != "0",
    "image_scrapers": ("example_pictures.taken",),
    "reset_argv": "example_pictures.arguments",
    "reset_modules": (),
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
}


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=1)  # before numpydoc
    app.connect("source-read", name_files)
    app.connect("config-inited", lambda app, config: (write_page(), write_reference()))  # before pages are looked for
