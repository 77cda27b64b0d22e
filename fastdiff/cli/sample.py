"""``fastdiff sample``."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.inputs import check_output, check_picture, describe_pictures
from fastdiff.cli.parser import add_command, add_common, add_method, add_overwrite, backend_of
from fastdiff.errors import FastdiffError, ScheduleWarning, check_int, check_seed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastdiff.model import Diffusion

SAMPLES_AT_ONCE = 4096  # bounds memory, and is the tick of the progress bar; changes no bits of our kernels
PICTURES_AT_ONCE = 64
CHUNK_VALUES, CHUNKS = 1 << 22, 4  # of a chunk in a store, at most; for each worker, where there are fewer
NAME_WIDTH = 17  # of a sampler, in the help
SHOWN, TRACED = 16, 4  # samples in a grid or a GIF, and in a trace


def add(commands: Any) -> None:
    from fastdiff import samplers

    listed = "".join(f"  {name:<{NAME_WIDTH}}{samplers.about(name)}\n" for name in samplers.names())
    sample = add_command(
        commands,
        "sample",
        "draw new curves or pictures from a model",
        "Draws from a trained model: curves into a .csv file (one curve a line) or an\n"
        ".npy file, pictures into a folder, side by side into one .png file, or into an\n"
        ".npy file.",
        "examples:\n"
        "  fastdiff sample m.safetensors -n 100 -o new.csv --plot new.png\n"
        "  fastdiff sample m.safetensors -o new.npy --sampler dpmpp_2m --sample-steps 20\n"
        "  fastdiff sample m.safetensors -n 16 -o new/ --trace trace.png --gif chain.gif\n"
        "  fastdiff sample m.safetensors -n 30 -o new.png --labels 0,1,2\n"
        "  fastdiff sample m.safetensors -n 10000000 --to new.zarr --workers 8\n"
        "\n"
        "Sample k of a seed is the same however many are drawn: -n 10 --first-sample 90\n"
        "repeats the last ten of -n 100.\n"
        "\n"
        f"samplers:\n{listed}",
    )
    sample.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train")
    sample.add_argument("-n", type=int, default=16, metavar="N", help="how many (default 16)")
    sample.add_argument(
        "-o", "--output", metavar="PATH", help="a .csv or .npy file; of pictures a folder, .png or .npy"
    )
    _add_store(sample)
    sample.add_argument("--plot", metavar="FILE", help="draw the first 16 into this .png file")
    sample.add_argument("--trace", metavar="FILE", help="draw the way from noise into this .png file")
    sample.add_argument("--gif", metavar="FILE", help="show the way of the first 16 in this .gif file")
    sample.add_argument("--labels", metavar="L,L,...", help="classes, by number or name, taken in turn (default: all)")
    sample.add_argument(
        "--covariates",
        metavar="V,V,...",
        help="the numbers that all samples are asked for, or NAME=V,... or a table with a line for each sample",
    )
    sample.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="how much labels and covariates count: 1 as in the data (default), more for typical ones, 0 not at all",
    )
    add_overwrite(sample)
    sample.add_argument(
        "--sampler",
        choices=("auto", *samplers.names()),
        metavar="NAME",
        default="auto",
        help="one of those below; default auto: dpmpp_2m for a model with a Gaussian base, else ddpm",
    )
    sample.add_argument(
        "--sample-steps", type=int, metavar="N", help="sampling steps (default: all T for ddpm, 10 to 50 for others)"
    )
    sample.add_argument("--first-sample", type=int, metavar="K", default=0, help="index of the first sample")
    sample.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the running mean of the weights (default), or the last weights",
    )
    sample.add_argument(
        "--known",
        metavar="FILE",
        help="draw given this: a table of one curve with values missing, or a picture with transparent parts",
    )
    sample.add_argument("--mask", metavar="FILE", help="a picture that is white where that of --known is unknown")
    add_method(sample)
    add_common(sample, seed="of the noise (default: the model's)", usual_seed=None)
    sample.set_defaults(run=run)


def _add_store(command: argparse.ArgumentParser) -> None:
    """What draws more than fits into memory, or on many workers."""
    store = command.add_argument_group("many samples (needs the extra 'scale')")
    store.add_argument(
        "--to", metavar="STORE", help="draw into this Zarr array, a folder or a URL; the same command goes on with it"
    )
    store.add_argument("--workers", type=int, metavar="K", help="processes of this machine (default: this one)")
    store.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that draws, as tcp://host:8786")
    store.add_argument("--chunk", type=int, metavar="N", help="samples of a chunk (default: a few million values)")


def run(args: argparse.Namespace) -> int:
    import fastdiff as fd

    check_int("-n", args.n, low=1)
    check_int("--first-sample", args.first_sample, low=0)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    if (args.output is None) == (args.to is None):
        raise FastdiffError("give -o PATH, or --to STORE for many samples")
    of_store = {"--workers": args.workers, "--scheduler": args.scheduler, "--chunk": args.chunk}
    of_file = {"--plot": args.plot, "--trace": args.trace, "--gif": args.gif}
    for name, value in (of_store if args.to is None else of_file).items():
        if value is not None:
            raise FastdiffError(f"{name} goes with {'--to' if args.to is None else '-o'}")
    for path in (args.plot, args.trace):
        if path:
            check_picture(args, path)
    model = fd.load(args.model, backend=backend_of(args))
    assert model.net is not None
    options = {"sampler": args.sampler, "steps": args.sample_steps, "seed": seed, "ema": args.ema}
    options |= {"guidance": args.guidance}
    if args.known:
        options |= {"given": _known(args, model), "method": args.method}
    elif args.mask:
        raise FastdiffError("--mask is of a picture that --known names")
    if args.to is not None:
        return _sample_to_store(args, model, options)
    return (_sample_curves if len(model.net.shape) < 3 else _sample_pictures)(args, model, options)


def _sample_to_store(args: argparse.Namespace, model: Diffusion, options: Mapping[str, Any]) -> int:
    import math

    from fastdiff import scale

    n, first, shape = args.n, args.first_sample, model.net.shape if model.net is not None else ()
    if args.workers is not None and args.scheduler is not None:
        raise FastdiffError("--workers are of this machine, and --scheduler has its own: give one of them")
    if args.workers is not None:
        check_int("--workers", args.workers, low=1)
    workers = args.workers or 1
    begun = scale.chunk_of(args.to)
    usual = begun or max(1, min(CHUNK_VALUES // math.prod(shape), -(-n // (CHUNKS * workers))))
    chunk = usual if args.chunk is None else check_int("--chunk", args.chunk, low=1)
    labels, numbers = in_turn(model, args.labels, n, first), asked_numbers(model, args.covariates, n)
    array = scale.sample_to(
        args.to, model, n, chunk=chunk, client=args.scheduler or args.workers, progress=not args.quiet,
        first_sample=first, **_part(labels, numbers, 0, n), **options,
    )  # fmt: skip
    facts = array.attrs["fastdiff"]
    print(f"{args.to}: {n} samples of shape {shape} in {-(-n // chunk)} chunks, by {facts['table']['name']}")
    print(f"seed {facts['seed']}, model {facts['model']}")
    return 0


def _sample_curves(args: argparse.Namespace, model: Diffusion, options: Mapping[str, Any]) -> int:
    import numpy as np

    from fastdiff import plots, progress, series
    from fastdiff.data import ENDINGS, save_curves

    n = args.n
    assert model.net is not None
    shape = model.net.shape
    check_output(args, args.output, ENDINGS if len(shape) == 1 else series.ENDINGS)
    if args.gif:
        check_output(args, args.gif, (".gif",))
    labels, numbers = in_turn(model, args.labels, n, args.first_sample), asked_numbers(model, args.covariates, n)
    parts = []
    with progress.bar(show=not args.quiet, total=n, desc="sampling", unit="curve", leave=False) as bar:
        for start in range(0, n, SAMPLES_AT_ONCE):
            size = min(SAMPLES_AT_ONCE, n - start)
            asked = _part(labels, numbers, start, start + size)
            first = args.first_sample + start
            parts.append(_as_numpy(args, model.sample(size, **asked, first_sample=first, **options)))
            bar.update(size)
    curves, how = np.concatenate(parts), drawn_by(model, args.sampler, args.sample_steps)
    if len(shape) == 1:
        save_curves(args.output, curves)
    else:
        series.save_series(args.output, curves, model.channel_names)
    what = f"curves of {shape[0]} points" if len(shape) == 1 else series.described(shape, model.channel_names)
    print(f"{args.output}: {n} {what}")
    if args.plot:
        title, real = f"Generated: {how}", model.kept_rows
        if len(shape) == 2:
            figure = plots.series(
                curves if real is not None else curves[:SHOWN], real, names=model.channel_names, title=title
            )
        else:
            whole = None if real is None else real[~np.isnan(real).any(axis=1)]
            beside = whole if whole is not None and len(whole) else None
            figure = plots.generated(curves, beside, count=SHOWN, names=(title, "Real" if beside is not None else ""))
        plots.save(figure, args.plot)
        print(f"{args.plot}: the first {min(SHOWN, n)} of them" + (", beside real ones" if real is not None else ""))
    if args.trace or args.gif:
        traced = min(n, SHOWN) if args.gif else 1
        asked = _part(labels, numbers, 0, traced)
        _, path = model.sample(traced, **asked, first_sample=args.first_sample, trajectory=True, **options)
        way = _as_numpy(args, path)
        way = way if len(shape) == 1 else way[..., 0]
        if args.trace:
            plots.save(plots.reverse_chain(way[:, 0], sampler=how), args.trace)
            print(f"{args.trace}: the first one's way from noise")
        if args.gif:
            plots.moving_curves(way, args.gif, title=f"From noise to curves: {how}")
            print(f"{args.gif}: the first {traced} on their way from noise, moving")
    return 0


def _sample_pictures(args: argparse.Namespace, model: Diffusion, options: Mapping[str, Any]) -> int:
    import numpy as np

    from fastdiff import plots
    from fastdiff.data import picture_files, save_images
    from fastdiff.files import writing

    n, first, output = args.n, args.first_sample, args.output
    labels, numbers = in_turn(model, args.labels, n, first), asked_numbers(model, args.covariates, n)
    ending = "" if output.endswith(("/", os.sep)) or os.path.isdir(output) else Path(output).suffix.lower()
    if ending == ".png":
        check_picture(args, output)
    elif ending == ".npy":
        check_output(args, output)
    elif ending:
        raise FastdiffError(f"-o {output}: pictures go to a folder, to one .png file or to an .npy file")
    else:
        picture_files(output, n, first=first, overwrite=args.overwrite)
    if args.gif:
        check_output(args, args.gif, (".gif",))
    # The chains that are shown are drawn first, with all their states; where a sample is cut changes no bits.
    traced = min(n, SHOWN) if args.trace or args.gif else 0
    parts = []
    for low, high in ((0, traced), (traced, n)):
        if low == high:
            continue
        drawn = model.sample(
            high - low,
            **_part(labels, numbers, low, high),
            first_sample=first + low,
            batch=PICTURES_AT_ONCE,
            trajectory=high == traced,
            progress=not args.quiet,
            **options,
        )
        if high == traced:
            drawn, path = drawn
            path = _as_numpy(args, path)
        parts.append(_as_numpy(args, drawn))
    images = np.concatenate(parts)
    assert model.normaliser is not None and model.normaliser.data_range is not None  # noqa: PT018
    shades: dict[str, Any] = {"data_range": model.normaliser.data_range}
    words, how = class_names(model, labels), drawn_by(model, args.sampler, args.sample_steps)

    def grid(path: str, count: int) -> None:
        columns = max(1, round(count**0.5))
        some, title = words and words[:count], f"Generated pictures: {how}"
        real = model.kept_rows if words is None and path == args.plot else None  # labels have the place of headings
        figure = plots.image_grid(images[:count], columns=columns, labels=some, title=title, reference=real, **shades)
        plots.save(figure, path)

    if ending == ".png":
        grid(output, n)
    elif ending == ".npy":
        with writing(output) as file:
            np.lib.format.write_array(file, images, allow_pickle=False)
    else:
        save_images(images, output, first=first, overwrite=args.overwrite, **shades)
    of = "" if words is None else f", of {', '.join(sorted(set(words)))}"
    print(f"{output}: {n} {describe_pictures(images)}{of}")
    if args.plot:
        grid(args.plot, min(n, SHOWN))
        print(f"{args.plot}: the first {min(n, SHOWN)} of them")
    if args.trace:
        plots.save(plots.image_trace(path[:, :TRACED], sampler=how, **shades), args.trace)
        print(f"{args.trace}: the first {min(n, TRACED)} on their way from noise")
    if args.gif:
        plots.animation(path, args.gif, **shades)
        print(f"{args.gif}: the first {traced} on their way from noise, moving")
    return 0


def _known(args: argparse.Namespace, model: Diffusion) -> Any:
    """What --known says of the samples."""
    import numpy as np

    import fastdiff as fd

    assert model.net is not None and model.normaliser is not None  # noqa: PT018
    shape = model.net.shape
    if len(shape) == 1:
        if args.mask:
            raise FastdiffError("--mask is for pictures, and this is a model of curves")
        rows = fd.data.load_curves(args.known, missing=True)
        if rows.shape != (1, *shape):
            wants = f"one of {shape[0]}, some of them missing; fastdiff impute takes several"
            raise FastdiffError(f"--known {args.known}: {len(rows)} curves of {rows.shape[1]} points, where {wants}")
        return fd.Known(rows[0])
    from fastdiff.pictures import load_known

    low, high = model.normaliser.data_range or (0.0, 255.0)
    return fd.Known(np.float32(low) + load_known(args.known, shape, args.mask) * np.float32((high - low) / 255))


def in_turn(model: Diffusion, text: str | None, n: int, first: int = 0) -> npt.NDArray[np.int64] | None:
    """The labels of samples first ... first + n - 1: those of a list like ``0,2`` or ``cat,dog``, or all, in turn."""
    import numpy as np

    classes = getattr(model.net, "classes", None)
    if classes is None:
        if text is not None:
            raise FastdiffError("--labels: this model has no classes")
        return None
    names = [_class_name(model, k) for k in range(classes)]
    numbers = []
    for word in [] if text is None else text.split(","):
        if word.strip() in names:
            numbers.append(names.index(word.strip()))
        elif word.strip().isdecimal() and int(word) < classes:
            numbers.append(int(word))
        else:
            suffix = "" if model.class_names is None else f", or {', '.join(names)}"
            raise FastdiffError(f"--labels: {word.strip()!r}, where a class from 0 to {classes - 1} is wanted{suffix}")
    chosen = np.array(numbers or range(classes), np.int64)
    return chosen[(first + np.arange(n)) % len(chosen)]


def asked_numbers(model: Diffusion, text: str | None, n: int) -> npt.NDArray[Any] | None:
    """The covariates of n samples (n, k), of a list like ``1.5,20`` or ``age=30,height=1.8``, or of a table."""
    import numpy as np

    known = None if model.net is None else model.net.covariates
    if text is None:
        return None
    if known is None:
        raise FastdiffError("--covariates: this model has none")
    names = model.covariate_names or []
    if text.endswith((".csv", ".npy")):
        from fastdiff.data import load_curves

        table = load_curves(text)
        if table.shape != (n, known):
            raise FastdiffError(
                f"--covariates {text}: {table.shape[0]} x {table.shape[1]}, where {n} x {known} is wanted"
            )
        return table
    values: dict[int, float] = {}
    for place, word in enumerate(text.split(",")):
        name, equals, number = word.strip().rpartition("=")
        at = names.index(name) if equals and name in names else place
        try:
            value = float(number)
        except ValueError:
            value = np.nan
        if not np.isfinite(value) or (equals and name not in names) or at in values:
            suffix = f": {', '.join(names)}" if names else ""
            raise FastdiffError(f"--covariates: {word.strip()!r}, where a number for each covariate is wanted{suffix}")
        values[at] = value
    if sorted(values) != list(range(known)):
        raise FastdiffError(f"--covariates: {len(values)} numbers, where the model has {known}")
    return np.tile([values[at] for at in range(known)], (n, 1))


def _part(labels: Any, numbers: Any, start: int, stop: int) -> dict[str, Any]:
    """What some samples are asked for."""
    given = {"labels": labels, "covariates": numbers}
    return {name: None if array is None else array[start:stop] for name, array in given.items()}


def _class_name(model: Diffusion, label: int) -> str:
    return str(label) if model.class_names is None else model.class_names[label]


def class_names(model: Diffusion, labels: npt.NDArray[np.int64] | None) -> list[str] | None:
    return None if labels is None else [_class_name(model, label) for label in labels]


def drawn_by(model: Diffusion, sampler: str, steps: int | None) -> str:
    """What draws, for the legend of a figure."""
    with warnings.catch_warnings(action="ignore", category=ScheduleWarning):  # drawing itself warns
        return model.named_sampler(sampler, steps).label


def _as_numpy(args: argparse.Namespace, array: Any) -> npt.NDArray[Any]:
    from fastdiff.backends import get_backend

    return get_backend(backend_of(args)).to_numpy(array)
