"""The data that a command is given, curves or pictures, and the options that say how to read it."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastdiff.errors import DataWarning, FastdiffError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastdiff.model import Diffusion

SIZE = 32  # pixels on a side of the pictures


def add_table_options(command: argparse.ArgumentParser) -> None:
    """What `_curves` and `recording` ask for."""
    table = command.add_argument_group("a table of curves, or a recording (a line for each time)")
    table.add_argument(
        "--window",
        type=_window,
        metavar="N",
        help="DATA is a recording with a column for each channel: cut it so long, or into whole days (day) or weeks",
    )
    table.add_argument("--stride", type=int, metavar="N", help="lines from one window to the next (default: N)")
    table.add_argument(
        "--index", metavar="NAME", help="leave out this column of names or times; a number counts from 1"
    )
    table.add_argument(
        "--drop", type=_words, action="extend", default=[], metavar="NAME,...", help="leave these columns out as well"
    )
    table.add_argument(
        "--columns", type=_words, action="extend", metavar="NAME,...", help="read these columns only; 3-20 is a run"
    )
    table.add_argument(
        "--covariates",
        type=_words,
        action="extend",
        metavar="NAME,...",
        help="these columns are no values of the curves, but numbers that samples can be asked for; of a recording "
        "they are known inputs of every time",
    )
    table.add_argument("--decimal", choices=(".", ","), default=".", help="the decimal sign (default: the point)")
    table.add_argument(
        "--delimiter", metavar="C", help="what is between cells: a character, tab or space (default: looks)"
    )
    table.add_argument(
        "--header", action=argparse.BooleanOptionalAction, help="the first line has column names (default: looks)"
    )


def add_picture_options(group: Any) -> None:
    """How files of pictures are read."""
    group.add_argument(
        "--data-range",
        type=_pair,
        metavar="LOW,HIGH",
        help="the values in the files that are black and white, as 0,4095 for 12 bits (default: all a file can hold)",
    )
    group.add_argument("--skip-bad", action="store_true", help="leave out and list what cannot be read")


def _window(text: str) -> int | str:
    if text in ("day", "week"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines, day or week") from None


def _pair(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(","))
    return low, high


def picture_options(args: argparse.Namespace) -> list[str]:
    """What was said about the files of pictures, as it was said."""
    between = [] if args.data_range is None else [f"--data-range={args.data_range[0]:g},{args.data_range[1]:g}"]
    return between + ["--skip-bad"] * args.skip_bad


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def training_data(
    args: argparse.Namespace, model: Diffusion | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None, list[str] | None]:
    """Curves or pictures, and for those the class of each and the classes' names."""
    from fastdiff.data import load_images

    shape: tuple[int, ...] | None = None if model is None or model.net is None else model.net.shape
    learned = shape is not None and len(shape) == 3
    if not (learned or os.path.isdir(args.data) or args.size is not None):
        for name in ("labels", "gray", "flip", "crop", "snapshots", "channels", "dropout", "data_range", "skip_bad"):
            if getattr(args, name, None):
                other = "; a column of classes: --covariates NAME, or fit(X, y) in Python" if name == "labels" else ""
                where = "a folder, or with --size an .npy file"
                raise FastdiffError(f"--{name.replace('_', '-')} is for pictures: {where}{other}")
        if is_series(args, shape):
            return series_of(args, shape), None, None
        return _curves(args), None, None
    if table_options(args):
        raise FastdiffError(f"{table_options(args)[0]} is for files of curves")
    if shape is None:
        size, mode = args.size or SIZE, "gray" if args.gray else "auto"
    elif len(shape) == 3:
        cut = getattr(args, "crop", None)
        size, mode = shape[:2] if cut is None else args.size or SIZE, "gray" if shape[2] == 1 else "rgb"
    else:
        raise FastdiffError(f"{args.resume} is a model of curves, {args.data} a folder")
    options = {"mode": mode, "data_range": args.data_range, "skip_bad": args.skip_bad}
    if args.labels:
        return load_images(args.data, size, labels=True, **options)
    if model is not None and model.class_names is not None:
        raise FastdiffError(f"--labels is wanted: {args.resume} has the classes {', '.join(model.class_names)}")
    return load_images(args.data, size, **options), None, None


def _curves(args: argparse.Namespace) -> npt.NDArray[np.float32]:
    from fastdiff.data import load_curves

    return load_curves(args.data, **reading(args), missing=getattr(args, "missing", False))


def check_whole(args: argparse.Namespace, data: npt.NDArray[Any]) -> None:
    """Refuse rows with missing values, which training takes and nothing that compares them does."""
    import numpy as np

    X = np.asarray(data)
    gaps = np.isnan(X).reshape(len(X), -1).any(axis=1) if X.dtype.kind == "f" else np.zeros(len(X), bool)
    if gaps.any():
        fill = f"fastdiff impute {args.model} {args.data} -o filled.csv fills them in"
        raise FastdiffError(f"{args.data}: values are missing in {gaps.sum()} of {len(X)} rows: {fill}")


def is_series(args: argparse.Namespace, shape: tuple[int, ...] | None) -> bool:
    """Whether DATA is taken for series: by the model's shape, by --window, or by what kind of file it is."""
    if args.window is not None or (shape is not None and len(shape) == 2):
        return True
    if args.stride is not None:
        raise FastdiffError("--stride is of windows: it needs --window")
    ending = os.path.splitext(args.data)[1].lower()
    if ending == ".parquet":
        raise FastdiffError(f"{args.data}: say how long a window of the recording is: --window N")
    return ending == ".npy" and dimensions(args.data) == 3


def dimensions(path: str) -> int:
    """How many axes the array of an ``.npy`` file has; 0 where it cannot be read."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).ndim
    except (OSError, ValueError):
        return 0


def series_of(args: argparse.Namespace, shape: tuple[int, ...] | None) -> Any:
    """Series (N, points, channels) of a file, or windows of the recording that it is."""
    from fastdiff.series import load_recording

    X = load_recording(args.data, **reading(args))
    if getattr(X, "ndim", 0) == 3:
        if args.window is not None:
            raise FastdiffError(f"{args.data} has series of {X.shape[1]} points, which are no recording: no --window")
        return X
    return _cut(args, shape, X)


def _cut(args: argparse.Namespace, shape: tuple[int, ...] | None, X: Any) -> Any:
    """Windows of a recording, as long as --window or the model says."""
    from fastdiff.errors import check_int
    from fastdiff.series import windows

    length = args.window if args.window is not None else None if shape is None else shape[0]
    length = length if isinstance(length, str) else check_int("--window", length, low=1)
    stride = None if args.stride is None else check_int("--stride", args.stride, low=1)
    return windows(X[:, None] if getattr(X, "ndim", 2) == 1 else X, length, stride)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """What was said about the file of curves, as arguments of `load_curves`."""
    given = {name: getattr(args, name) for name in ("header", "index", "drop", "columns", "decimal", "delimiter")}
    return given | {"drop": [*args.drop, *(args.covariates or ())]}


def covariates(args: argparse.Namespace, model: Diffusion | None) -> npt.NDArray[np.float32] | None:
    """The columns of a table that are covariates, (N, k), in the order in which they were named.

    Of windows of a recording (N, length, k): known inputs.
    """
    import numpy as np

    from fastdiff.data import load_curves

    known = None if model is None or model.net is None else model.net.covariates
    if not args.covariates:
        if known is not None:
            assert model is not None
            names = model.covariate_names or [f"{known} columns"]
            raise FastdiffError(f"--covariates is wanted: the model is asked for {', '.join(names)}")
        return None
    if known is None and model is not None:
        raise FastdiffError("--covariates: this model has none")
    if known not in (None, len(args.covariates)):
        raise FastdiffError(f"--covariates: {len(args.covariates)} columns, where the model has {known}")
    shape = None if model is None or model.net is None else model.net.shape
    if is_series(args, shape):
        return _cut(args, shape, known_inputs(args))
    if model is not None and model.net is not None and model.net.pointwise:
        raise FastdiffError("--covariates: those of this model belong to every point, and are read from Python")
    options = reading(args) | {"index": None, "drop": ()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # they are not taken for values of curves
        columns = [load_curves(args.data, **options | {"columns": name}) for name in args.covariates]
    for name, column in zip(args.covariates, columns, strict=True):
        if column.shape[1] != 1:
            raise FastdiffError(f"--covariates: {name} is {column.shape[1]} columns, name one after the other")
    return np.hstack(columns)


def known_inputs(args: argparse.Namespace) -> npt.NDArray[Any]:
    """The columns of a recording that are known inputs of every time, (time, k), in the order of their names."""
    import numpy as np

    from fastdiff.series import load_recording, recording

    parts = [recording(load_recording(args.data, **reading(args) | {"drop": (), "columns": [name]}))[0]
             for name in args.covariates]  # fmt: skip
    for name, part in zip(args.covariates, parts, strict=True):
        if part.ndim != 2 or part.shape[1] != 1:
            raise FastdiffError(f"--covariates: {name} is no column of {args.data}")
        if np.isnan(part).any():
            row = int(np.flatnonzero(np.isnan(part))[0])
            raise FastdiffError(
                f"--covariates: {name} has no number at time {row + 1}; known inputs have one everywhere"
            )
    return np.hstack(parts)


def inputs_of(args: argparse.Namespace, model: Diffusion) -> npt.NDArray[Any] | None:
    """What `known_inputs` returns, for a model that has any."""
    names = model.covariate_names
    if model.net is None or not model.net.pointwise:
        if args.covariates:
            raise FastdiffError("--covariates: this model has no known inputs of every time")
        return None
    if not args.covariates or (names is not None and args.covariates != names):
        wants = ",".join(names or ["NAME"] * (model.net.covariates or 0))
        raise FastdiffError(f"--covariates {wants} is wanted: the model has these known inputs")
    return known_inputs(args)


def table_options(args: argparse.Namespace) -> list[str]:
    """What was said about the file of curves, as it was said."""
    header = [] if args.header is None else ["--header" if args.header else "--no-header"]
    index = [] if args.index is None else ["--index", args.index]
    lists = [("--drop", args.drop), ("--columns", args.columns), ("--covariates", args.covariates)]
    signs = [] if args.decimal == "." else ["--decimal", args.decimal]
    signs += [] if args.delimiter is None else ["--delimiter", args.delimiter]
    signs += [] if args.window is None else ["--window", str(args.window)]
    signs += [] if args.stride is None else ["--stride", str(args.stride)]
    return [*header, *index, *(word for name, some in lists if some for word in (name, ",".join(some))), *signs]


def describe_pictures(images: npt.NDArray[Any]) -> str:
    height, width, channels = images.shape[1:]
    return f"{'gray' if channels == 1 else 'colour'} pictures of {height} x {width} pixels"


def check_output(args: argparse.Namespace, path: str, endings: Sequence[str] = ()) -> None:
    """Refuse a file that cannot be written, or is there and not to be replaced: the one rule of all commands."""
    from fastdiff.files import check_writable

    check_writable(path, endings)
    if os.path.exists(path) and not args.overwrite:
        raise FastdiffError(f"{path}: is there; --overwrite replaces it")


def check_picture(args: argparse.Namespace, path: str) -> None:
    from fastdiff import plots

    plots.check_available()
    check_output(args, path, plots.ENDINGS)
