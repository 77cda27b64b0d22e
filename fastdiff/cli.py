"""The command line: ``fastdiff demo | train | sample | evaluate | info | bench``.

Results go to stdout; progress, warnings and errors to stderr. What goes wrong on purpose is one line
``fastdiff: error: ...`` and exit code 2; Ctrl-C is exit code 130. Each command imports what it needs when it
runs, so that ``--help`` comes at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastdiff.errors import (
    DataWarning,
    FastdiffError,
    QualityWarning,
    ScheduleWarning,
    TrainingError,
    check_float,
    check_int,
    check_seed,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastdiff.model import Diffusion
    from fastdiff.schedule import Schedule

BACKENDS = ("auto", "numpy", "cpu", "cuda")
SAMPLERS = ("auto", "ddpm", "ddim", "dpmpp_2m")
# Constructor: T, beta_start, beta_end. The first is the tutorial's, the others the values of the papers.
SCHEDULES: dict[str, tuple[int, float | None, float | None]] = {
    "sigmoid": (100, 1e-5, 0.1),
    "linear": (1000, 1e-4, 0.02),
    "scaled_linear": (1000, 1e-4, 0.02),
    "cosine": (1000, None, None),
}
LEARNING_RATE = 1e-3
FEWEST_ROWS = 8  # as fastdiff.judgement has it
SIZE = 32  # pixels on a side of the pictures
SAMPLES_AT_ONCE = 4096  # bounds memory, and is the tick of the progress bar; changes no bits of our kernels
PICTURES_AT_ONCE = 64
SHOWN, TRACED = 16, 4  # samples in a grid or a GIF, and in a trace

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; those of the process by default.

    Returns
    -------
    int
        0, or 2 after an error, or 130 after Ctrl-C. ``--help``, ``--version`` and unknown options leave by
        ``SystemExit``, as argparse does. Without any argument there is help on stderr, and 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        _parser().print_help(sys.stderr)
        return 2
    args = _parser().parse_args(argv)
    try:
        with _plain_messages():
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # Whoever read our output has enough (`fastdiff info | head -1`). Python flushes stdout once more on
        # its way out, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FastdiffError, OSError) as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"not enough memory: {error}")
    except KeyboardInterrupt:
        _note("\nfastdiff: interrupted")
        return INTERRUPTED


# --------------------------------------------------------------------------------------- train


def _train(args: argparse.Namespace) -> int:
    from fastdiff.files import check_writable

    output: str | None = args.output or args.resume
    if output is None:
        raise FastdiffError("say where the model goes: -o MODEL.safetensors")
    steps = None if args.steps is None else check_int("--steps", args.steps, low=1)
    batch = None if args.batch is None else check_int("--batch", args.batch, low=1)
    # All that could fail is tried before the minutes of training.
    check_writable(output, (".safetensors",))
    if args.loss_plot:
        _check_picture(args.loss_plot)
    if args.snapshots is not None:
        check_int("--snapshots", args.snapshots, low=1)
        _check_picture(_snapshot(output, 0))
    model = _resumed(args) if args.resume else None
    data, labels, names = _training_data(args, model)
    if model is None and data.ndim == 2 and len(data) < FEWEST_ROWS:  # a few pictures give parts to put together
        raise FastdiffError(
            f"{args.data}: {len(data)} rows can be learned by heart only; new ones of their kind want at least "
            f"{FEWEST_ROWS}"
        )
    if model is None:
        model = _new_model(args, data.shape[1:], None if names is None else len(names))
        model.class_names = names
    elif names != model.class_names:
        raise FastdiffError(f"--labels: the classes are {names}, where the saved model has {model.class_names}")
    what = f"curves of {data.shape[1]} points" if data.ndim == 2 else _pictures(data)
    _note(f"{len(data)} {what} from {args.data}" + (f", classes: {', '.join(names)}" if names else ""))

    start, first = time.perf_counter(), model.step
    stop = _PatientInterrupt()
    failure: TrainingError | None = None
    try:
        with stop:
            model.fit(
                data,
                labels,
                steps=steps,
                batch=batch,
                # A resumed model keeps its own plan: fit takes its defaults for "not given".
                lr=LEARNING_RATE if args.lr is None else args.lr,
                warmup=0 if args.warmup is None else args.warmup,
                decay_steps=args.decay_steps,
                validation=args.validation,
                judge=args.judge,
                flip=args.flip,
                accumulate=args.accumulate,
                progress=not args.quiet,
                callback=stop.wanted if args.snapshots is None else _snapshots(model, output, args.snapshots, stop),
            )
        stopped = stop.presses > 0
    except KeyboardInterrupt:
        if stop.gave_up:
            raise
        stopped = True
    except TrainingError as error:
        failure, stopped = error, True
    done = model.step - first
    if done:
        with _uninterrupted():
            model.save(output)
    if failure and not done:
        return _fail(str(failure))
    if stopped:
        state = f"after step {model.step}, saved to {output}" if done else "before the first step: nothing to save"
        _note(f"fastdiff: stopped {state}")
    else:
        seconds = time.perf_counter() - start
        print(f"{output}: {done} steps in {seconds:.1f} s, now at step {model.step}; {_last_losses(model)}")
    if args.loss_plot and done:
        from fastdiff import plots

        plots.save(plots.loss(model.history), args.loss_plot)
        (_note if stopped else print)(f"{args.loss_plot}: the loss of every step")
    if failure:
        return _fail(str(failure))
    if stopped and done > 0 and model.step < model.end_step:
        # Training that was looked after by the rule goes on by it: so many steps more would not be.
        rest = None if steps is None and data.ndim == 2 else model.end_step - model.step
        _note(f"continue with: {_continuation(args, output, rest)}")
    return INTERRUPTED if stopped else 0


def _check_picture(path: str) -> None:
    from fastdiff import plots
    from fastdiff.files import check_writable

    plots.check_available()
    check_writable(path, plots.ENDINGS)


def _training_data(
    args: argparse.Namespace, model: Diffusion | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None, list[str] | None]:
    """Curves or pictures, and for those the class of each and the classes' names."""
    from fastdiff.data import load_images

    shape: tuple[int, ...] | None = None if model is None or model.net is None else model.net.shape
    learned = shape is not None and len(shape) == 3
    if not (learned or os.path.isdir(args.data) or args.size is not None):
        for name in ("labels", "gray", "flip", "snapshots", "channels", "dropout"):
            if getattr(args, name):
                raise FastdiffError(f"--{name} is for pictures: a folder, or with --size an .npy file")
        return _curves(args), None, None
    if _table_options(args):
        raise FastdiffError(f"{_table_options(args)[0]} is for files of curves")
    if shape is None:
        size, mode = args.size or SIZE, "gray" if args.gray else "auto"
    elif len(shape) == 3:
        size, mode = shape[:2], "gray" if shape[2] == 1 else "rgb"
    else:
        raise FastdiffError(f"{args.resume} is a model of curves, {args.data} a folder")
    if args.labels:
        return load_images(args.data, size, mode=mode, labels=True)
    if model is not None and model.class_names is not None:
        raise FastdiffError(f"--labels is wanted: {args.resume} has the classes {', '.join(model.class_names)}")
    return load_images(args.data, size, mode=mode), None, None


def _curves(args: argparse.Namespace) -> npt.NDArray[np.float32]:
    from fastdiff.data import load_curves

    return load_curves(args.data, header=args.header, index=args.index, drop=args.drop)


def _table_options(args: argparse.Namespace) -> list[str]:
    """What was said about the file of curves, as it was said."""
    header = [] if args.header is None else ["--header" if args.header else "--no-header"]
    index = [] if args.index is None else ["--index", args.index]
    return [*header, *index, *(["--drop", ",".join(args.drop)] if args.drop else [])]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _size(text: str) -> int | tuple[int, int]:
    """``32`` or, height first, ``32x48``."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(","))


def _pictures(images: npt.NDArray[Any]) -> str:
    height, width, channels = images.shape[1:]
    return f"{'gray' if channels == 1 else 'colour'} pictures of {height} x {width} pixels"


def _snapshot(output: str, step: int) -> str:
    return f"{output.removesuffix('.safetensors')}-{step:06}.png"


def _snapshots(model: Diffusion, output: str, every: int, stop: _PatientInterrupt) -> Callable[[int, float], bool]:
    """What `fit` calls after each step: now and then it draws pictures, and says whether to stop."""
    from fastdiff import plots

    def after(step: int, loss: float) -> bool:
        if (step + 1) % every == 0:
            assert model.normaliser is not None
            try:
                labels = _in_turn(model, None, SHOWN)
                figure = plots.image_grid(
                    model.sample(SHOWN, labels=labels, sampler="ddim"),
                    labels=_class_names(model, labels),
                    title=f"After {step + 1} steps: {_how(model, 'ddim', None)}",
                    data_range=model.normaliser.data_range or (0, 255),
                )
                plots.save(figure, _snapshot(output, step + 1))
            except (FastdiffError, OSError) as error:  # worth less than the training
                _note(f"\nfastdiff: warning: no snapshot after step {step + 1}: {error}")
        return stop.wanted(step, loss)

    return after


def _new_model(args: argparse.Namespace, shape: tuple[int, ...], classes: int | None) -> Diffusion:
    import fastdiff as fd
    from fastdiff.defaults import PICTURE_T, picture_net

    schedule = _schedule(args)
    seed = 0 if args.seed is None else check_seed(args.seed, "--seed")
    net: fd.MLP | fd.UNet | None = None
    if len(shape) == 3:
        if args.network == "tutorial":
            raise FastdiffError("--network tutorial is for curves")
        T = PICTURE_T if schedule is None else schedule.T
        net = picture_net(shape, T=T, classes=classes, seed=seed, channels=args.channels, dropout=args.dropout or 0.0)
    elif args.network == "tutorial":
        schedule = schedule or _named_schedule("sigmoid", None, None, None)
        net = fd.MLP.tutorial(shape[0], T=schedule.T)
    scale = args.scale or "auto"
    return fd.Diffusion(net, schedule, prediction=args.prediction, scale=scale, backend=args.backend, seed=seed)


def _resumed(args: argparse.Namespace) -> Diffusion:
    import fastdiff as fd

    settled = (
        "size",
        "channels",
        "dropout",
        "lr",
        "warmup",
        "decay_steps",
        "seed",
        "network",
        "schedule",
        "timesteps",
        "beta_start",
        "beta_end",
        "prediction",
        "scale",
    )
    for name in settled:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise FastdiffError(f"{option} cannot change with --resume: the saved model has its own")
    if args.gray:
        raise FastdiffError("--gray cannot change with --resume: the saved model has its own")
    return fd.load(args.resume, backend=args.backend)


def _schedule(args: argparse.Namespace) -> Schedule | None:
    given = [name for name in ("timesteps", "beta_start", "beta_end") if getattr(args, name) is not None]
    if args.schedule is None:
        if given:
            raise FastdiffError(f"--{given[0].replace('_', '-')} needs --schedule: {', '.join(SCHEDULES)}")
        return None
    return _named_schedule(args.schedule, args.timesteps, args.beta_start, args.beta_end)


def _named_schedule(name: str, T: int | None, start: float | None, end: float | None) -> Schedule:
    from fastdiff.schedule import Schedule

    usual_T, usual_start, usual_end = SCHEDULES[name]
    build = getattr(Schedule, name)
    T = check_int("--timesteps", usual_T if T is None else T, low=1)
    made: Schedule
    if usual_start is None or usual_end is None:
        if start is not None or end is not None:
            raise FastdiffError(f"--beta-start and --beta-end mean nothing to the {name} schedule")
        made = build(T)
    else:
        start = check_float("--beta-start", usual_start if start is None else start, low=0, high=1)
        end = check_float("--beta-end", usual_end if end is None else end, low=0, high=1)
        made = build(T, beta_start=start, beta_end=end)
    return made


def _continuation(args: argparse.Namespace, output: str, steps: int | None) -> str:
    words = ["fastdiff", "train", args.data, "--resume", output]
    words += [] if steps is None else ["--steps", str(steps)]
    for option, value, usual in (
        ("--batch", args.batch, None),
        ("--accumulate", args.accumulate, 1),
        ("--validation", args.validation, None),
        ("--snapshots", args.snapshots, None),
        ("--backend", args.backend, "auto"),
        ("--loss-plot", args.loss_plot, None),
    ):
        if value != usual:
            words += [option, str(value)]
    words += [option for option, given in (("--labels", args.labels), ("--flip", args.flip)) if given]
    words += _table_options(args)
    return shlex.join(words)


def _last_losses(model: Diffusion) -> str:
    recent = model.history["loss"][-100:]
    text = f"loss {sum(recent) / len(recent):.4g} (mean of the last {len(recent)})"
    held = model.history["validation_loss"]
    return f"{text}, {held[-1]:.4g} on held-out data" if held else text


# --------------------------------------------------------------------------------------- sample


def _sample(args: argparse.Namespace) -> int:
    import fastdiff as fd

    check_int("-n", args.n, low=1)
    check_int("--first-sample", args.first_sample, low=0)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    for path in (args.plot, args.trace):
        if path:
            _check_picture(path)
    model = fd.load(args.model, backend=args.backend)
    options = {"sampler": args.sampler, "steps": args.sample_steps, "seed": seed, "ema": args.ema}
    assert model.net is not None
    return (_sample_curves if len(model.net.shape) == 1 else _sample_pictures)(args, model, options)


def _sample_curves(args: argparse.Namespace, model: Diffusion, options: Mapping[str, Any]) -> int:
    import numpy as np

    from fastdiff import plots, progress
    from fastdiff.data import ENDINGS, save_curves
    from fastdiff.files import check_writable

    n = args.n
    check_writable(args.output, ENDINGS)
    if args.gif:
        raise FastdiffError("--gif is for pictures, and this is a model of curves")
    labels = _in_turn(model, args.labels, n, args.first_sample)
    parts = []
    with progress.bar(show=not args.quiet, total=n, desc="sampling", unit="curve", leave=False) as bar:
        for start in range(0, n, SAMPLES_AT_ONCE):
            size = min(SAMPLES_AT_ONCE, n - start)
            of_part = None if labels is None else labels[start : start + size]
            first = args.first_sample + start
            parts.append(_as_numpy(args, model.sample(size, labels=of_part, first_sample=first, **options)))
            bar.update(size)
    curves, how = np.concatenate(parts), _how(model, args.sampler, args.sample_steps)
    save_curves(args.output, curves)
    print(f"{args.output}: {n} curves of {curves.shape[1]} points")
    if args.plot:
        plots.save(plots.generated(curves, count=SHOWN, names=(f"Generated: {how}", "")), args.plot)
        print(f"{args.plot}: the first {min(SHOWN, n)} of them")
    if args.trace:
        of_first = None if labels is None else labels[:1]
        _, path = model.sample(1, labels=of_first, first_sample=args.first_sample, trajectory=True, **options)
        plots.save(plots.reverse_chain(_as_numpy(args, path)[:, 0], sampler=how), args.trace)
        print(f"{args.trace}: the first one's way from noise")
    return 0


def _sample_pictures(args: argparse.Namespace, model: Diffusion, options: Mapping[str, Any]) -> int:
    import numpy as np

    from fastdiff import plots
    from fastdiff.data import picture_files, save_images
    from fastdiff.files import check_writable, writing

    n, first, output = args.n, args.first_sample, args.output
    labels = _in_turn(model, args.labels, n, first)
    ending = "" if output.endswith(("/", os.sep)) or os.path.isdir(output) else Path(output).suffix.lower()
    if ending == ".png":
        _check_picture(output)
    elif ending == ".npy":
        check_writable(output)
    elif ending:
        raise FastdiffError(f"-o {output}: pictures go to a folder, to one .png file or to an .npy file")
    else:
        picture_files(output, n, first=first, overwrite=args.overwrite)
    if args.gif:
        check_writable(args.gif, (".gif",))
    # The chains that are shown are drawn first, with all their states; where a sample is cut changes no bits.
    traced = min(n, SHOWN) if args.trace or args.gif else 0
    parts = []
    for low, high in ((0, traced), (traced, n)):
        if low == high:
            continue
        drawn = model.sample(
            high - low,
            labels=None if labels is None else labels[low:high],
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
    words, how = _class_names(model, labels), _how(model, args.sampler, args.sample_steps)

    def grid(path: str, count: int) -> None:
        columns = max(1, round(count**0.5))
        some, title = words and words[:count], f"Generated pictures: {how}"
        figure = plots.image_grid(images[:count], columns=columns, labels=some, title=title, **shades)
        plots.save(figure, path)

    if ending == ".png":
        grid(output, n)
    elif ending == ".npy":
        with writing(output) as file:
            np.lib.format.write_array(file, images, allow_pickle=False)
    else:
        save_images(images, output, first=first, overwrite=args.overwrite, **shades)
    of = "" if words is None else f", of {', '.join(sorted(set(words)))}"
    print(f"{output}: {n} {_pictures(images)}{of}")
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


def _in_turn(model: Diffusion, text: str | None, n: int, first: int = 0) -> npt.NDArray[np.int64] | None:
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
            told = "" if model.class_names is None else f", or {', '.join(names)}"
            raise FastdiffError(f"--labels: {word.strip()!r}, where a class from 0 to {classes - 1} is wanted{told}")
    chosen = np.array(numbers or range(classes), np.int64)
    return chosen[(first + np.arange(n)) % len(chosen)]


def _class_name(model: Diffusion, label: int) -> str:
    return str(label) if model.class_names is None else model.class_names[label]


def _class_names(model: Diffusion, labels: npt.NDArray[np.int64] | None) -> list[str] | None:
    return None if labels is None else [_class_name(model, label) for label in labels]


def _how(model: Diffusion, sampler: str, steps: int | None) -> str:
    """What draws, for the legend of a figure."""
    with warnings.catch_warnings(action="ignore", category=ScheduleWarning):  # drawing itself warns
        return model.named_sampler(sampler, steps).label


def _as_numpy(args: argparse.Namespace, array: Any) -> npt.NDArray[Any]:
    from fastdiff.backends import get_backend

    return get_backend(args.backend).to_numpy(array)


# --------------------------------------------------------------------------------------- evaluate


def _evaluate(args: argparse.Namespace) -> int:
    import fastdiff as fd

    if args.output:
        _check_picture(args.output)
    samples = None if args.n is None else check_int("-n", args.n, low=2)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    model = fd.load(args.model, backend=args.backend)
    args.resume = args.model  # where the shape of the data is known from
    data, labels, _ = _training_data(args, model)
    training = None
    if args.training is not None:
        training, _, _ = _training_data(argparse.Namespace(**{**vars(args), "data": args.training}), model)
    found = model.evaluate(data, labels, training=training, samples=samples, seed=seed)
    report = found.report
    if args.json:
        print(json.dumps({**report.to_dict(), "complaint": found.complaint}, indent=2))
    else:
        print(f"{args.model} beside {args.data}")
        print("\n".join(_aligned(_measures(report))))
    if args.output:
        from fastdiff import plots

        lines = {key: _shown(value) for key, value in _measures(report).items()}
        figure = plots.evaluation(
            found.real.reshape(len(found.real), -1),
            found.drawn.reshape(len(found.drawn), -1),
            training=found.training.reshape(len(found.training), -1),
            measures=lines,
        )
        plots.save(figure, args.output)
        _note(f"figure in {args.output}")
    if found.complaint:
        _note(f"fastdiff: warning: {found.complaint}")
    return 0


def _measures(report: Any) -> dict[str, Any]:
    """The numbers of a report with what they are called, as lines of a table."""
    which = "held-out" if report.held_out else "training"
    return {
        "samples": report.samples,
        f"{which} rows": report.rows,
        "energy distance": f"{report.energy_distance:.4f} +- {report.stderr:.4f}",
        "of a fitted Gaussian": f"{report.gaussian:.4f}",
        "of two real sets": "not known" if report.real != report.real else f"{report.real:.4f}",
        "less the Gaussian's": f"{report.excess:.4f} +- {report.excess_stderr:.4f}",
        "deviation, over the data's": f"{report.deviation:.3f}",
        "smallest, largest value": f"{report.low:.4g}, {report.high:.4g}",
        "values out of range": f"{report.outside:.2%}",
        "nearer to training rows": f"{report.nearer:.0%} (50 % of unseen rows; 100 % of copies)",
        "median distance to them": f"{report.nearest_ratio:.3f} of unseen rows'",
    }


# --------------------------------------------------------------------------------------- info


def _info(args: argparse.Namespace) -> int:
    if args.model is None:
        facts = _installation()
        title = f"fastdiff {facts.pop('version')}"
    else:
        from fastdiff.checkpoint import describe

        facts = describe(args.model)
        title = args.model
    if args.backend == "cuda":
        facts["cuda"] = _on_cuda(facts.get("network"))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(title)
        print("\n".join(_aligned(facts if args.model is None else _brief(facts))))
    return 0


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a model file without what only programs want: those are in the JSON."""
    brief = {key: value for key, value in facts.items() if key not in ("tensors", "training", "parameters", "digest")}
    network = {**facts["network"], "parameters": facts["parameters"]}
    training = facts["training"] or "not in this file: it can sample, but not be trained on"
    return {**brief, "network": network, "training": training}


def _on_cuda(network: Mapping[str, Any] | None) -> dict[str, Any]:
    """The GPU here, or why none can be used; and how a perceptron's sampling chain runs on it and on others."""
    from fastdiff.backends import get_backend
    from fastdiff.backends.cuda.device import SHARED_LIMITS
    from fastdiff.backends.cuda.mlp import chain_plan
    from fastdiff.errors import BackendError
    from fastdiff.nn.mlp import KINDS, MLP

    limits = {f"on compute capability {name}": limit for name, limit in SHARED_LIMITS.items()}
    try:
        runtime: Any = get_backend("cuda").runtime  # type: ignore[attr-defined]
        device, limits = runtime.device, {"here": runtime.shared_limit, **limits}
    except BackendError as error:
        device = str(error)
    facts: dict[str, Any] = {"device": device}
    if network is not None and network.get("kind") in KINDS:
        plan = MLP.from_dict(network, draw=False).plan
        facts["sampling chain"] = {name: chain_plan(plan, limit) for name, limit in limits.items()}
    return facts


def _installation() -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import fastdiff as fd

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        "version": _version(),
        "backends": fd.available_backends(),
        "processors": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed(name) for name in ("numpy", "numba", "scipy", "safetensors", "matplotlib")},
    }


def _aligned(facts: Mapping[str, Any]) -> list[str]:
    """Lines ``key  value`` with all values in one column; a mapping within is indented below its key."""
    rows = list(_rows(facts, "  "))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {value}".rstrip() for name, value in rows]


def _rows(facts: Mapping[str, Any], indent: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = indent + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield name, "" if value else "none"
            yield from _rows(value, indent + "  ")
        else:
            yield name, _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        if len(value) > 8:
            return f"{len(value)} values, {_shown(value[0])} to {_shown(value[-1])}"
        return ", ".join(map(_shown, value)) if value else "none"
    return str(value)


# --------------------------------------------------------------------------------------- demo


def _demo(args: argparse.Namespace) -> int:
    from fastdiff import demo

    demo.run(
        args.output,
        backend=args.backend,
        seed=check_seed(args.seed, "--seed"),
        quick=args.quick,
        progress=not args.quiet,
        say=lambda text: print(text, flush=True),
    )
    return 0


# --------------------------------------------------------------------------------------- bench


def _bench(args: argparse.Namespace) -> int:
    import fastdiff as fd
    from fastdiff import bench

    if args.plot:
        _check_picture(args.plot)
    threads = None if args.threads is None else check_int("--threads", args.threads, low=1)
    wanted = args.only or [""]
    names = [name for name in bench.QUICK if any(name.startswith(start) for start in wanted)]
    if not names:
        raise FastdiffError(f"--only: there is no such work; there are {', '.join(bench.QUICK)}")
    be = fd.get_backend(args.backend, threads=threads)
    place = bench.cpu_model() if be.name != "cuda" else be.runtime.device  # type: ignore[attr-defined]
    if be.name == "cpu":
        place += f", {be.threads} thread{'s' if be.threads > 1 else ''}"
    scale = 0.001 if args.tiny else 1.0

    def show(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    show(f"fastdiff {_version()}, backend {be.name}, on {place}")
    if not args.quiet:
        _note("measuring the machine itself; a first run also compiles the kernels")
    roofs = bench.roofs(be, scale)
    show(
        f"at most {bench.speed(roofs.memory / 1e9)} GB/s through memory, "
        f"{bench.speed(roofs.arithmetic / 1e9)} GF/s of float32 arithmetic\n"
    )
    layout = "{:42}  {:>8}  {:>18}  {:>18}"
    show(layout.format("work", "time", "rate", "of the roof").rstrip())
    rows = []
    for k, name in enumerate(names):
        case = bench.BY_NAME[name].at(scale)
        if not case.runs_on(be):
            continue
        if not args.quiet and sys.stderr.isatty():
            print(f"\r{k + 1} of {len(names)}: {case.title}", end="", file=sys.stderr, flush=True)
        try:
            rows.append(bench.timed(case, be, roofs, 0.01 if args.tiny else bench.TURN))
        finally:
            if not args.quiet and sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        show(layout.format(case.title, *bench.cells(rows[-1])).rstrip())
    if args.json:
        facts = {"version": _version(), "backend": be.name, "machine": place, "roofs": roofs._asdict(), "rows": rows}
        print(json.dumps(facts, indent=2))
    if args.plot:
        from fastdiff import plots

        plots.save(plots.shares({row["title"]: (row["share"], bench.cells(row)[1]) for row in rows}, place), args.plot)
        _note(f"figure in {args.plot}")
    return 0


# --------------------------------------------------------------------------------------- the parser


# What options and commands of other programs are called here.
SYNONYMS = {
    "--steps": "epochs epoch iterations iters num-steps n-steps max-steps",
    "--sample-steps": "steps num-steps n-steps inference-steps num-inference-steps",
    "--lr": "learning-rate rate alpha",
    "--batch": "batch-size batchsize bs",
    "--validation": "val test-size validation-split validation-fraction holdout",
    "--warmup": "warmup-steps",
    "--resume": "load checkpoint continue init-from",
    "--index": "index-col id time",
    "--drop": "exclude ignore columns",
    "--seed": "random-state random-seed",
    "--backend": "device gpu cuda",
    "--quiet": "silent no-progress",
    "--size": "resolution image-size",
    "--labels": "class classes label",
    "--timesteps": "diffusion-steps num-timesteps",
    "--prediction": "parameterization prediction-type objective",
    "--sampler": "method solver scheduler",
    "--first-sample": "offset start skip",
    "--overwrite": "force",
    "--plot": "figure png",
    "--threads": "workers num-workers jobs n-jobs num-threads",
    "-n": "num-samples samples n-samples count number num",
    "--output": "out outfile out-file output-file file save save-to to",
    "train": "fit learn",
    "sample": "generate draw predict",
    "info": "show inspect describe",
    "bench": "benchmark time",
    "evaluate": "eval test score judge",
    "demo": "example tutorial",
}


class _Parser(argparse.ArgumentParser):
    """Answers what it does not know with its own usage, those of commands included, and with the nearest it knows."""

    given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = args
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [word for word in unknown if word.startswith("-")]
            super().error("; ".join(self._unknown(options)) or f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Leave with the usage and the message, and with what an unknown option or command may mean."""
        commands = [name for action in self._actions if not action.option_strings for name in action.choices or ()]
        if not commands:
            super().error("; ".join([message, *self._unknown([word for word in self.given if word[:2] == "--"])]))
        word = next((word for word in self.given if not word.startswith("-")), "")
        near = _nearest(word, commands)
        super().error(f"{message}; did you mean {near}?" if near not in (None, word) else message)

    def _unknown(self, words: Sequence[str]) -> list[str]:
        options = [name for action in self._actions for name in action.option_strings]
        said = []
        for name in (word.split("=")[0] for word in words):
            if any(option.startswith(name) for option in options):  # argparse takes what begins like one
                continue
            near = _nearest(name, options)
            said.append(f"unrecognized option {name}" + (f": did you mean {near}?" if near else ""))
        return said


def _nearest(word: str, known: Sequence[str]) -> str | None:
    """Which of the options or commands may be meant."""
    bare = word.strip("-").replace("_", "-").lower()
    for name in known:
        if bare in SYNONYMS.get(name, "").split():
            return name
    names = {name.strip("-"): name for name in known}
    near = difflib.get_close_matches(bare, names, 1, 0.65)
    return names[near[0]] if near else None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastdiff",
        description="Train diffusion models on curves or pictures and draw new ones.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "start here:\n"
            "  fastdiff demo                                see it learn and draw\n"
            "  fastdiff train curves.csv -o m.safetensors   learn your own: one curve a line\n"
            "  fastdiff sample m.safetensors -n 100 -o new.csv --plot new.png\n"
            "  fastdiff train pictures/ -o p.safetensors    learn from a folder of pictures\n"
            "  fastdiff sample p.safetensors -n 16 -o new.png\n"
            "\n"
            "fastdiff COMMAND --help explains a command."
        ),
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_info(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        "train on curves, draw new ones, and show how good they are",
        "Trains two models, one on the tutorial's single curve and one on a family of\n"
        "curves, draws new curves from both, writes models, curves and figures into a\n"
        "folder, and prints how good they are.",
        "example:\n  fastdiff demo -o demo\n",
    )
    demo.add_argument("-o", "--output", metavar="FOLDER", default="demo", help="default: demo; made if missing")
    demo.add_argument("--quick", action="store_true", help="a tenth of the training: worse curves, sooner")
    _add_common(demo, seed="of everything that is drawn (default 0)", usual_seed=0)
    demo.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    train = _command(
        commands,
        "train",
        "learn the curves of a file, or the pictures of a folder",
        "Learns the curves of a .csv file (one curve a line, all of one length) or an\n"
        ".npy file (one array, curves x points), or the pictures of a folder, which it\n"
        "brings to one small size (or, with --size, those of an .npy file of bytes).\n"
        "Ctrl-C saves what was learned so far and says how to continue.",
        "examples:\n"
        "  fastdiff train curves.csv -o m.safetensors --steps 3000 --seed 0\n"
        "  fastdiff train curves.csv --resume m.safetensors --steps 2000\n"
        "  fastdiff train curves.csv -o m.safetensors --validation 0.1 --loss-plot l.png\n"
        "  fastdiff train table.csv -o m.safetensors --index year --drop label\n"
        "  fastdiff train pictures/ -o m.safetensors --size 32 --flip --snapshots 500\n"
        "  fastdiff train classes/ -o m.safetensors --size 16 --gray --labels\n"
        "\n"
        "Pictures take time, at 32 x 32 about half a second a step: start small (--size\n"
        "16 --gray), and look at the snapshots. On one backend the same data, options and\n"
        "seed give the same model, bit for bit, and so does a run in two parts.\n",
    )
    train.add_argument("data", metavar="DATA", help="a .csv or .npy file of curves, or a folder of pictures")
    train.add_argument("-o", "--output", metavar="MODEL", help="where the model goes, a .safetensors file")
    train.add_argument("--steps", type=int, metavar="N", help="training steps (default: as many as suit the data)")
    train.add_argument("--batch", type=int, metavar="N", help="curves (default 256) or pictures (64) a step")
    train.add_argument("--lr", type=float, metavar="RATE", help=f"learning rate (default {LEARNING_RATE:g})")
    train.add_argument("--warmup", type=int, metavar="N", help="steps over which the rate rises (default 0)")
    train.add_argument(
        "--decay-steps",
        type=int,
        metavar="N",
        help="the step by which the rate has fallen (default: the last one, or with --steps it stays)",
    )
    train.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="hold out this part of the data, and report its loss (default: 0.05 of 100 rows or more; 0: none)",
    )
    train.add_argument(
        "--resume",
        metavar="MODEL",
        help="continue this model for --steps more; -o may be left out, then it is updated",
    )
    train.add_argument(
        "--judge",
        action=argparse.BooleanOptionalAction,
        help="at the end measure samples against held-out rows (default: unless --steps is below 1000)",
    )
    train.add_argument("--loss-plot", metavar="FILE", help="draw the loss into this .png file")
    _add_table_options(train)
    _add_common(train, seed="of weights, batches and noise (default 0)", usual_seed=None)
    pictures = train.add_argument_group("pictures")
    pictures.add_argument(
        "--size", type=_size, metavar="S", help=f"pixels on a side, or HEIGHTxWIDTH (default {SIZE}); crops to fit"
    )
    pictures.add_argument("--gray", action="store_true", help="without colour (default: as the files are)")
    pictures.add_argument(
        "--labels", action="store_true", help="the folder holds one folder for each class; learn to draw by class"
    )
    pictures.add_argument("--flip", action="store_true", help="also learn the mirror images")
    pictures.add_argument(
        "--snapshots", type=int, metavar="N", help="every N steps draw 16 pictures into MODEL-STEP.png"
    )
    pictures.add_argument(
        "--accumulate", type=int, metavar="K", default=1, help="take a batch in K parts: a Kth of the memory"
    )
    pictures.add_argument(
        "--channels", type=_widths, metavar="C,C,...", help="widths of the U-Net's levels (default: by the size)"
    )
    pictures.add_argument("--dropout", type=float, metavar="SHARE", help="against learning by heart (default 0)")
    model = train.add_argument_group("the model")
    model.add_argument(
        "--network",
        choices=("default", "tutorial"),
        help="for curves, default: three hidden layers that the timestep scales and shifts; tutorial: the tutorial's",
    )
    model.add_argument("--prediction", choices=("noise", "x0", "v"), help="what the network learns to say (default v)")
    model.add_argument(
        "--scale",
        choices=("auto", "all", "column"),
        help="for curves, what has a mean and a deviation of its own (default auto: columns that differ a lot)",
    )
    model.add_argument("--schedule", choices=tuple(SCHEDULES), help="default: chosen for the data")
    model.add_argument("--timesteps", type=int, metavar="T", help="steps of noise; needs --schedule")
    model.add_argument("--beta-start", type=float, metavar="BETA", help="noise of the first step")
    model.add_argument("--beta-end", type=float, metavar="BETA", help="noise of the last step")
    train.set_defaults(run=_train)


def _add_sample(commands: Any) -> None:
    sample = _command(
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
        "\n"
        "Sample k of a seed is the same however many are drawn: -n 10 --first-sample 90\n"
        "repeats the last ten of -n 100.\n",
    )
    sample.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train")
    sample.add_argument("-n", type=int, default=16, metavar="N", help="how many (default 16)")
    sample.add_argument(
        "-o", "--output", metavar="PATH", required=True, help="a .csv or .npy file; of pictures a folder, .png or .npy"
    )
    sample.add_argument("--plot", metavar="FILE", help="draw the first 16 into this .png file")
    sample.add_argument("--trace", metavar="FILE", help="draw the way from noise into this .png file")
    sample.add_argument("--gif", metavar="FILE", help="show the way of the first 16 pictures in this .gif file")
    sample.add_argument("--labels", metavar="L,L,...", help="classes, by number or name, taken in turn (default: all)")
    sample.add_argument("--overwrite", action="store_true", help="replace pictures in the folder")
    sample.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="auto",
        help="default auto: dpmpp_2m for a model with a Gaussian base, else ddpm; ddim and dpmpp_2m need fewer steps",
    )
    sample.add_argument(
        "--sample-steps", type=int, metavar="N", help="sampling steps (default: all T for ddpm, 50, 20)"
    )
    sample.add_argument("--first-sample", type=int, metavar="K", default=0, help="index of the first sample")
    sample.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the running mean of the weights (default), or the last weights",
    )
    _add_common(sample, seed="of the noise (default: the model's)", usual_seed=None)
    sample.set_defaults(run=_sample)


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "say how good a model's samples are",
        "Draws from a model and compares with data: of the file it was trained on, with the\n"
        "rows that training held out. Prints the energy distance beside that of a fitted\n"
        "Gaussian, deviation and range, and whether samples are copies of training rows.",
        "examples:\n"
        "  fastdiff evaluate m.safetensors curves.csv -o report.png\n"
        "  fastdiff evaluate m.safetensors new.csv --training curves.csv\n",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train")
    evaluate.add_argument("data", metavar="DATA", help="a .csv or .npy file, or a folder of pictures")
    _add_table_options(evaluate)
    evaluate.add_argument("-o", "--output", metavar="FILE", help="draw a page of comparisons into this .png file")
    evaluate.add_argument("-n", type=int, metavar="N", help="how many samples (default 1000; pictures: 64)")
    evaluate.add_argument("--training", metavar="DATA", help="what the model has learned from, where DATA is other")
    evaluate.add_argument("--labels", action="store_true", help="the folder holds one folder for each class")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _add_common(evaluate, seed="of the samples (default: the model's)", usual_seed=None)
    evaluate.set_defaults(run=_evaluate, size=None, gray=False, flip=False)
    evaluate.set_defaults(snapshots=None, channels=None, dropout=None)


def _add_info(commands: Any) -> None:
    info = _command(
        commands,
        "info",
        "say what is in a model file, or what is installed",
        "Prints what a model file holds: network, schedule, training. Without a file:\n"
        "version, backends and packages of this installation.",
        "examples:\n  fastdiff info m.safetensors\n  fastdiff info m.safetensors --backend cuda\n  fastdiff info\n",
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help="a .safetensors file")
    info.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="cuda: also the GPU, and how the model samples on GPUs"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)


def _add_bench(commands: Any) -> None:
    bench = _command(
        commands,
        "bench",
        "say how fast this machine is",
        "Times noise, noising, sampling, training and the layers of image networks, in about\n"
        "a minute (and a first time another, for compiling). Each is first compared with the\n"
        "NumPy reference at a small size. The last column is the share of what the machine can\n"
        "do at most, measured in the same run: bytes that must cross memory, or arithmetic.\n"
        "More than all of it is possible: an algorithm may need fewer operations than are\n"
        "counted, and a cache is faster than memory.",
        "examples:\n  fastdiff bench\n  fastdiff bench --plot bench.png\n"
        "  fastdiff bench --backend numpy --only train --json\n",
    )
    bench.add_argument("--only", metavar="NAME", action="append", help="work whose name begins so: normals, train, ...")
    bench.add_argument("--plot", metavar="FILE", help="draw the shares into this .png file")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="where (default: the fastest; numpy: small sizes only)"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="of the CPU backend (default: one for each core)")
    bench.add_argument("--quiet", action="store_true", help="no progress")
    bench.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # does it work? The numbers mean nothing
    bench.set_defaults(run=_bench)


def _command(commands: Any, name: str, brief: str, text: str, epilog: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=brief,
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made


def _add_common(command: argparse.ArgumentParser, *, seed: str, usual_seed: int | None) -> None:
    command.add_argument("--seed", type=int, metavar="S", default=usual_seed, help=f"seed {seed}")
    command.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="where to compute (default: the fastest there is)"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_table_options(command: argparse.ArgumentParser) -> None:
    """What `_curves` asks for."""
    table = command.add_argument_group("a table of curves")
    table.add_argument(
        "--index", metavar="NAME", help="leave out this column of names or times; a number counts from 1"
    )
    table.add_argument(
        "--drop", type=_words, action="extend", default=[], metavar="NAME,...", help="leave these columns out as well"
    )
    table.add_argument(
        "--header", action=argparse.BooleanOptionalAction, help="the first line has column names (default: looks)"
    )


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"fastdiff {_version()}")
        parser.exit()


def _version() -> str:
    from importlib.metadata import version

    return version("fastdiff-engine")


# --------------------------------------------------------------------------------------- messages


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    line = text.replace("\n", " ")
    _note(f"fastdiff: error: {line}")
    return 2


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        _note(f"fastdiff: {level}{record.getMessage()}")


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Show what the library logs and warns of as plain lines on stderr, while a command runs."""
    log, handler = logging.getLogger("fastdiff"), _Handler()
    level = log.level

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _note(f"fastdiff: warning: {message}")

    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with warnings.catch_warnings():
        for kind in (ScheduleWarning, DataWarning, QualityWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = show
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)


class _PatientInterrupt:
    """Ctrl-C while a model trains.

    The first one stops the training after the step, so the state is sound and worth saving. A second one stops at
    once: an exception in the middle of a step may leave weights and moments that belong to different steps.
    """

    def __init__(self) -> None:
        self.presses = 0
        self.gave_up = False

    def wanted(self, step: int, loss: float) -> bool:
        """Whether to stop: `fit` asks after each step."""
        return self.presses > 0

    def __enter__(self) -> None:
        self._before = None
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job
            self._before = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.presses += 1
        if self.presses > 1:
            self.gave_up = True
            raise KeyboardInterrupt
        _note("\nfastdiff: stopping after this step; once more to stop at once, without saving")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C inside the block: an impatient second one must not cost the training."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no Ctrl-C arrives here
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
