"""``fastdiff train``."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from fastdiff.cli.inputs import (
    SIZE,
    add_picture_options,
    add_table_options,
    check_picture,
    covariates,
    describe_pictures,
    picture_options,
    table_options,
    training_data,
)
from fastdiff.cli.messages import REFUSED, PatientInterrupt, fail, note, uninterrupted
from fastdiff.cli.parser import add_command, add_common, add_overwrite, backend_of
from fastdiff.cli.sample import SHOWN, class_names, drawn_by, in_turn
from fastdiff.errors import FastdiffError, TrainingError, check_float, check_int, check_seed
from fastdiff.nn.optim import LR_PLANS
from fastdiff.noise import TARGETS
from fastdiff.schedule import PREDICTIONS

if TYPE_CHECKING:
    from fastdiff.callbacks import FileLogger
    from fastdiff.model import Diffusion
    from fastdiff.ranks import Ranks
    from fastdiff.schedule import Schedule

# Constructor: T, beta_start, beta_end. The first is the tutorial's, the others the values of the papers.
SCHEDULES: dict[str, tuple[int, float | None, float | None]] = {
    "sigmoid": (100, 1e-5, 0.1),
    "linear": (1000, 1e-4, 0.02),
    "scaled_linear": (1000, 1e-4, 0.02),
    "cosine": (1000, None, None),
    "laplace": (1000, None, None),
    "flow": (1000, None, None),
}
# What may change with --resume.
PLAN = ("lr", "warmup", "decay_steps", "clip_norm", "ema", "weighting", "snr_gamma", "lr_plan")
FEWEST_ROWS = 8  # as fastdiff.judgement has it


def add(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        "learn the curves of a file, or the pictures of a folder",
        "Learns the curves of a .csv file (one curve a line, all of one length) or an\n"
        ".npy file (one array, curves x points); series of several channels, those of an\n"
        ".npy file (series x points x channels) or windows of a recording; or the\n"
        "pictures of a folder, which it brings to one small size (or, with --size, those\n"
        "of an .npy file of bytes).\n"
        "Ctrl-C, or SIGTERM, saves what was learned so far and says how to continue.",
        "examples:\n"
        "  fastdiff train curves.csv -o m.safetensors --steps 3000 --seed 0\n"
        "  fastdiff train curves.csv --resume m.safetensors --steps 2000\n"
        "  fastdiff train curves.csv -o m.safetensors --validation 0.1 --loss-plot l.png\n"
        "  fastdiff train table.csv -o m.safetensors --index year --drop label\n"
        "  fastdiff train weather.csv -o m.safetensors --window 48 --stride 12\n"
        "  fastdiff train load.csv -o m.safetensors --window 48 --covariates hour,holiday\n"
        "  fastdiff train weather.csv -o m.safetensors --window 48 --conditional mask\n"
        "  fastdiff train pictures/ -o m.safetensors --size 32 --flip --snapshots 500\n"
        "  fastdiff train classes/ -o m.safetensors --size 16 --gray --labels\n"
        "  mpirun -n 4 fastdiff train curves.csv -o m.safetensors --batch 4096\n"
        "\n"
        "Pictures take time, at 32 x 32 about half a second a step: start small (--size\n"
        "16 --gray), and look at the snapshots. On one backend the same data, options and\n"
        "seed give the same model, bit for bit, and so does a run in two parts.\n",
    )
    train.add_argument("data", metavar="DATA", help="a .csv or .npy file of curves, or a folder of pictures")
    train.add_argument("-o", "--output", metavar="MODEL", help="where the model goes, a .safetensors file")
    train.add_argument("--steps", type=int, metavar="N", help="training steps (default: as many as suit the data)")
    train.add_argument("--batch", type=int, metavar="N", help="curves (default 256) or pictures (64) a step")
    plan = partial(train.add_argument, default=argparse.SUPPRESS)  # None is a value of some
    plan("--lr", type=float, metavar="RATE", help="learning rate (default 0.001)")
    plan("--warmup", type=int, metavar="N", help="steps over which the rate rises (default 0)")
    plan(
        "--decay-steps",
        type=int,
        metavar="N",
        help="the step by which the rate has fallen (default: the last one, or with --steps it stays)",
    )
    plan(
        "--lr-plan",
        choices=LR_PLANS,
        help="how the rate goes: down by a cosine (default), or up and down, until --decay-steps; or constant",
    )
    plan(
        "--weighting",
        choices=("uniform", "min_snr"),
        help="what an error counts: 1, or as one of x0 the smaller of SNR and --snr-gamma (default uniform)",
    )
    plan("--snr-gamma", type=float, metavar="G", help="of --weighting min_snr (default 5)")
    plan("--clip-norm", type=_number_or_none, metavar="NORM", help="bound on the gradient, or none (default 1)")
    plan("--ema", type=_number_or_none, metavar="DECAY", help="of the average of the weights, or none (default 0.999)")
    train.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="hold out this part of the data, and report its loss (default: 0.05 of 100 rows or more; 0: none)",
    )
    train.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop where the loss on held-out data has not fallen for N steps, and keep the best weights",
    )
    train.add_argument(
        "--jitter",
        action=argparse.BooleanOptionalAction,
        help="learn from copies of the rows, moved towards a fitted Gaussian (default: of few rows, without --steps)",
    )
    train.add_argument("--log", metavar="FILE", help="add loss and rate of every 10 steps to this .csv or .jsonl file")
    train.add_argument(
        "--resume",
        metavar="MODEL",
        help="continue this model for --steps more; -o may be left out, then it is updated; how fast it learns goes on "
        "as before where it is not said",
    )
    add_overwrite(train)
    train.add_argument("--save-every", type=int, metavar="N", help="save the model every N steps as well")
    train.add_argument(
        "--keep", type=int, metavar="K", help="let the last K of those stay, as MODEL-STEP.safetensors (default 1: -o)"
    )
    train.add_argument(
        "--judge",
        action=argparse.BooleanOptionalAction,
        help="at the end measure samples against held-out rows (default: unless --steps is below 1000)",
    )
    train.add_argument(
        "--label-drop",
        type=float,
        metavar="SHARE",
        help="how often a label or covariates are left out, for sample --guidance (default 0.1 where there are any)",
    )
    train.add_argument(
        "--keep-rows",
        type=int,
        metavar="N",
        help="keep N rows of the data in the model, to be drawn beside samples (default: none, or those kept before)",
    )
    train.add_argument(
        "--alone", action="store_true", help="not together with the other processes that mpirun or srun has begun"
    )
    train.add_argument("--loss-plot", metavar="FILE", help="draw the loss into this .png file")
    add_table_options(train)
    train.add_argument(
        "--missing",
        action="store_true",
        help="empty cells of curves, nan, NA and null are values that are missing; what is there is learned from "
        "(default: an error)",
    )
    add_common(train, seed="of weights, batches and noise (default 0)", usual_seed=None)
    pictures = train.add_argument_group("pictures")
    pictures.add_argument(
        "--size", type=_size, metavar="S", help=f"pixels on a side, or HEIGHTxWIDTH (default {SIZE}); crops to fit"
    )
    add_picture_options(pictures)
    pictures.add_argument("--gray", action="store_true", help="without colour (default: as the files are)")
    pictures.add_argument(
        "--labels", action="store_true", help="the folder holds one folder for each class; learn to draw by class"
    )
    pictures.add_argument("--flip", action="store_true", help="also learn the mirror images")
    pictures.add_argument(
        "--crop", type=_size, metavar="S", help="learn parts of this size, at every step others, of pictures of --size"
    )
    pictures.add_argument(
        "--snapshots", type=int, metavar="N", help="every N steps draw 16 pictures into MODEL-STEP.png"
    )
    pictures.add_argument(
        "--accumulate",
        type=int,
        metavar="K",
        help="take a batch in K parts: a Kth of the memory (default 1; under mpirun 8)",
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
    model.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the network learns (default v; velocity for a flow)"
    )
    model.add_argument(
        "--conditional",
        choices=TARGETS,
        help="the network is told which values are known, and learns to draw single ones, blocks or the tail given the "
        "others; mask: any of these",
    )
    model.add_argument(
        "--learned-variance",
        action="store_true",
        default=None,
        help="for pictures: the network also learns how much noise each step of ddpm adds",
    )
    model.add_argument(
        "--scale",
        choices=("auto", "all", "column", "channel"),
        help="what has a mean and a deviation of its own (default auto: channels; columns of curves that differ a lot)",
    )
    model.add_argument(
        "--schedule",
        choices=tuple(SCHEDULES),
        metavar="NAME",
        help=f"{', '.join(SCHEDULES)} (default: chosen for the data)",
    )
    model.add_argument("--timesteps", type=int, metavar="T", help="steps of noise; needs --schedule")
    model.add_argument(
        "--shift", type=float, metavar="S", help="above 1, a flow has more steps at much noise (default 1)"
    )
    model.add_argument("--zero-snr", action="store_true", default=None, help="end the schedule in noise alone")
    model.add_argument("--beta-start", type=float, metavar="BETA", help="noise of the first step")
    model.add_argument("--beta-end", type=float, metavar="BETA", help="noise of the last step")
    train.set_defaults(run=run)


def _size(text: str) -> int | tuple[int, int]:
    """``32`` or, height first, ``32x48``."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(","))


def run(args: argparse.Namespace) -> int:
    from fastdiff import ranks

    if args.alone or ranks.launched() == 1:
        return _train(args, None)
    team = ranks.Ranks(ranks.world())
    if team.rank == 0:
        note(f"{team.size} ranks train together")
        return _train(args, team)
    args.quiet, args.log, args.loss_plot, args.snapshots = True, None, None, None
    with ExitStack() as silent, open(os.devnull, "w") as nowhere:  # the first rank speaks
        silent.enter_context(redirect_stdout(nowhere))
        silent.enter_context(redirect_stderr(nowhere))
        try:
            return _train(args, team)
        except (FastdiffError, OSError):  # of this rank or another one, all know
            return REFUSED


def _train(args: argparse.Namespace, team: Ranks | None) -> int:
    from fastdiff.callbacks import FileLogger
    from fastdiff.files import check_writable
    from fastdiff.ranks import PARTS
    from fastdiff.series import described

    speaks = team is None or team.rank == 0
    with nullcontext() if team is None else team.agreeing():
        output: str | None = args.output or args.resume
        if output is None:
            raise FastdiffError("say where the model goes: -o MODEL.safetensors")
        steps = None if args.steps is None else check_int("--steps", args.steps, low=1)
        batch = None if args.batch is None else check_int("--batch", args.batch, low=1)
        keep_rows = None if args.keep_rows is None else check_int("--keep-rows", args.keep_rows, low=0)
        # All that could fail is tried before the minutes of training.
        if speaks:
            check_writable(output, (".safetensors",))
        args.overwrite = args.overwrite or output == args.resume  # which is updated, and its figures
        if speaks and os.path.exists(output) and not args.overwrite:
            raise FastdiffError(
                f"{output}: is there; --overwrite replaces it, and --resume {output} goes on training it"
            )
        saves: dict[str, Any] = {}
        if args.save_every is not None:
            saves = {"checkpoint": output, "every": check_int("--save-every", args.save_every, low=1)}
        if args.keep is not None:
            if not saves:
                raise FastdiffError("--keep says how many of the states of --save-every stay")
            saves["keep"] = check_int("--keep", args.keep, low=1)
        if args.loss_plot:
            check_picture(args, args.loss_plot)
        log = None
        if args.log:
            check_writable(args.log, (".csv", ".jsonl"))
            log = FileLogger(args.log)
        if args.snapshots is not None:
            check_int("--snapshots", args.snapshots, low=1)
            check_picture(args, _snapshot(output, 0))
        model = _resumed(args) if args.resume else None
        data, labels, names = training_data(args, model)
        numbers = covariates(args, model) if data.ndim < 4 else None
        if model is None and data.ndim < 4 and len(data) < FEWEST_ROWS:  # a few pictures give parts to put together
            raise FastdiffError(
                f"{args.data}: {len(data)} rows can be learned by heart only; new ones of their kind want at least "
                f"{FEWEST_ROWS}"
            )
        if model is None:
            shape = data.shape[1:] if args.crop is None else (*_both(args.crop), data.shape[-1])
            model = _new_model(args, shape, None if names is None else len(names))
            model.class_names, model.covariate_names = names, args.covariates
        elif names != model.class_names:
            raise FastdiffError(f"--labels: the classes are {names}, where the saved model has {model.class_names}")
    what = f"curves of {data.shape[1]} points" if data.ndim == 2 else describe_pictures(data) if data.ndim == 4 else ""
    what = what or described(data.shape[1:], getattr(data, "names", None))
    note(f"{len(data)} {what} from {args.data}" + (f", classes: {', '.join(names)}" if names else ""))

    if team is not None and args.accumulate is None and model.net is not None and model.net.in_parts:
        args.accumulate = min(PARTS, batch or model.net.usual_batch)
    plan = {name: getattr(args, name) for name in PLAN if hasattr(args, name)}
    start, first = time.perf_counter(), model.step
    stop = PatientInterrupt()
    callback: Callable[[int, float], bool] | None = stop.wanted
    if team is not None:  # what is asked of one rank goes to the others with the next gradient
        callback, team.wanted = None, lambda: stop.asked
    if args.snapshots is not None:
        callback = _snapshots(model, output, args.snapshots, stop)
    failure: TrainingError | None = None
    try:
        with stop:
            model.fit(
                data,
                labels,
                covariates=numbers,
                label_drop=args.label_drop,
                steps=steps,
                batch=batch,
                **plan,
                validation=args.validation,
                jitter=args.jitter,
                patience=args.patience,
                callbacks=[] if log is None else [_warned(log)],
                judge=args.judge,
                keep_rows=keep_rows,
                flip=args.flip,
                crop=args.crop,
                accumulate=args.accumulate,
                progress=not args.quiet,
                callback=callback,
                comm=team,
                **saves,
            )
        stopped = stop.asked
    except KeyboardInterrupt:
        if stop.gave_up:
            raise
        stopped = True
    except TrainingError as error:
        failure, stopped = error, True
    done = model.step - first
    if done and speaks:
        with uninterrupted():
            model.save(output)
    if failure and not done:
        return fail(str(failure))
    if stopped:
        state = f"after step {model.step}, saved to {output}" if done else "before the first step: nothing to save"
        note(f"fastdiff: stopped {state}")
    else:
        seconds = time.perf_counter() - start
        print(f"{output}: {done} steps in {seconds:.1f} s, now at step {model.step}; {_last_losses(model)}")
    if args.loss_plot and done:
        from fastdiff import plots

        linear = model.linear_loss() if model.base == "gaussian" else None
        plots.save(plots.loss(model.history, linear=linear), args.loss_plot)
        (note if stopped else print)(f"{args.loss_plot}: the loss of every step")
    if failure:
        return fail(str(failure))
    if stopped and done > 0 and model.step < model.end_step:
        # Training that was looked after by the rule goes on by it: so many steps more would not be.
        rest = None if steps is None and data.ndim < 4 else model.end_step - model.step
        note(f"continue with: {_continuation(args, output, rest)}")
    return stop.code if stopped else 0


def _warned(log: FileLogger) -> Callable[[int, dict[str, float]], None]:
    """A logger that cannot be written any more, and says so once: it is worth less than the training."""
    lost = False

    def tell(step: int, numbers: dict[str, float]) -> None:
        nonlocal lost
        try:
            if not lost:
                log(step, numbers)
        except FastdiffError as error:
            lost = True
            note(f"\nfastdiff: warning: no more lines after step {step}: {error}")

    return tell


def _snapshot(output: str, step: int) -> str:
    return f"{output.removesuffix('.safetensors')}-{step:06}.png"


def _snapshots(model: Diffusion, output: str, every: int, stop: PatientInterrupt) -> Callable[[int, float], bool]:
    """What `fit` calls after each step: now and then it draws pictures, and says whether to stop."""
    from fastdiff import plots

    def after(step: int, loss: float) -> bool:
        if (step + 1) % every == 0:
            assert model.normaliser is not None
            try:
                labels = in_turn(model, None, SHOWN)
                figure = plots.image_grid(
                    model.sample(SHOWN, labels=labels, sampler="ddim"),
                    labels=class_names(model, labels),
                    title=f"After {step + 1} steps: {drawn_by(model, 'ddim', None)}",
                    data_range=model.normaliser.data_range or (0, 255),
                )
                plots.save(figure, _snapshot(output, step + 1))
            except (FastdiffError, OSError) as error:  # worth less than the training
                note(f"\nfastdiff: warning: no snapshot after step {step + 1}: {error}")
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
        net = picture_net(
            shape, T=T, classes=classes, seed=seed, channels=args.channels, dropout=args.dropout or 0.0,
            learned_variance=bool(args.learned_variance), masked=args.conditional is not None,
        )  # fmt: skip
    elif args.learned_variance:
        raise FastdiffError("--learned-variance is for pictures: a perceptron has one output for each point")
    elif args.network == "tutorial":
        schedule = schedule or _named_schedule("sigmoid", None, None, None)
        net = fd.MLP.tutorial(shape if len(shape) == 2 else shape[0], T=schedule.T)
    scale = args.scale or "auto"
    options = {"prediction": args.prediction, "conditional": args.conditional, "backend": backend_of(args)}
    return fd.Diffusion(net, schedule, scale=scale, seed=seed, **options)


def _resumed(args: argparse.Namespace) -> Diffusion:
    import fastdiff as fd

    settled = (
        "size",
        "channels",
        "dropout",
        "weighting",
        "snr_gamma",
        "seed",
        "network",
        "schedule",
        "timesteps",
        "beta_start",
        "beta_end",
        "shift",
        "zero_snr",
        "prediction",
        "learned_variance",
        "scale",
        "conditional",
    )
    for name in settled:
        if getattr(args, name, None) is not None and (name != "size" or args.crop is None):
            option = "--" + name.replace("_", "-")
            raise FastdiffError(f"{option} cannot change with --resume: the saved model has its own")
    if args.gray:
        raise FastdiffError("--gray cannot change with --resume: the saved model has its own")
    return fd.load(args.resume, backend=backend_of(args))


def _schedule(args: argparse.Namespace) -> Schedule | None:
    options = ("timesteps", "beta_start", "beta_end", "shift", "zero_snr")
    given = [name for name in options if getattr(args, name) is not None]
    if args.schedule is None:
        if given:
            raise FastdiffError(f"--{given[0].replace('_', '-')} needs --schedule: {', '.join(SCHEDULES)}")
        return None
    if args.shift is not None and args.schedule != "flow":
        raise FastdiffError(f"--shift means nothing to the {args.schedule} schedule")
    schedule = _named_schedule(args.schedule, args.timesteps, args.beta_start, args.beta_end, args.shift)
    return schedule.zero_terminal_snr() if args.zero_snr else schedule


def _named_schedule(
    name: str, T: int | None, start: float | None, end: float | None, shift: float | None = None
) -> Schedule:
    from fastdiff.schedule import Schedule

    usual_T, usual_start, usual_end = SCHEDULES[name]
    build = getattr(Schedule, name)
    T = check_int("--timesteps", usual_T if T is None else T, low=1)
    made: Schedule
    if usual_start is None or usual_end is None:
        if start is not None or end is not None:
            raise FastdiffError(f"--beta-start and --beta-end mean nothing to the {name} schedule")
        made = build(T) if shift is None else build(T, shift=shift)
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
        ("--accumulate", args.accumulate, None),
        ("--validation", args.validation, None),
        ("--label-drop", args.label_drop, None),
        ("--snapshots", args.snapshots, None),
        ("--save-every", args.save_every, None),
        ("--keep", args.keep, None),
        ("--patience", args.patience, None),
        ("--log", args.log, None),
        ("--backend", args.backend, "auto"),
        ("--precision", args.precision, None),
        ("--loss-plot", args.loss_plot, None),
    ):
        if value != usual:
            words += [option, str(value)]
    words += [option for option, given in (("--labels", args.labels), ("--flip", args.flip)) if given]
    words += [] if args.jitter is None else ["--jitter" if args.jitter else "--no-jitter"]
    if args.crop is not None:  # only then the pictures are not of the model's size
        for option, size in (("--size", args.size or SIZE), ("--crop", args.crop)):
            words += [option, "x".join(map(str, _both(size)))]
    words += table_options(args) + picture_options(args)
    return shlex.join(words)


def _last_losses(model: Diffusion) -> str:
    recent = model.history["loss"][-100:]
    text = f"loss {sum(recent) / len(recent):.4g} (mean of the last {len(recent)})"
    held = model.history["validation_loss"]
    return f"{text}, {held[-1]:.4g} on held-out data" if held else text
