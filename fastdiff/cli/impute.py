"""``fastdiff impute``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff.cli.inputs import add_table_options, check_output, check_picture, covariates, inputs_of, reading
from fastdiff.cli.parser import add_command, add_common, add_method, add_overwrite, add_quantiles, backend_of
from fastdiff.errors import FastdiffError, check_int, check_seed

SHOWN = 6  # rows in the figure
MOST_SHOWN = 300  # of a recording


def add(commands: Any) -> None:
    impute = add_command(
        commands,
        "impute",
        "fill in what is missing in curves",
        "Draws the missing values of curves from a trained model, given the values that are\n"
        "there, which stay as they are. Missing are empty cells and the words nan, NA and null.\n"
        "A .csv file gets the lines of DATA as they are, filled in, all of the first draw before\n"
        "those of the second; with --quantiles columns before them say which quantile of which\n"
        "row. An .npy file gets the array (draws, curves, points). Of a model of windows DATA is\n"
        "a recording, a line for each time, which is filled in from window to window.",
        "examples:\n"
        "  fastdiff impute m.safetensors holes.csv -o filled.csv\n"
        "  fastdiff impute m.safetensors holes.csv -o draws.npy --draws 100 --plot band.png\n"
        "  fastdiff impute w.safetensors weather.csv -o filled.csv --draws 100 --quantiles 0.05,0.5,0.95\n"
        "\n"
        "One draw is one guess. The spread of many says how sure the model is.\n",
    )
    impute.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train")
    impute.add_argument("data", metavar="DATA", help="a .csv or .npy file of curves with missing values")
    add_table_options(impute)
    impute.add_argument("-o", "--output", metavar="FILE", required=True, help="a .csv or .npy file")
    impute.add_argument("--draws", type=int, default=1, metavar="K", help="how often each is filled in (default 1)")
    add_quantiles(impute)
    impute.add_argument("--first-draw", type=int, default=0, metavar="K", help="index of the first draw")
    impute.add_argument("--plot", metavar="FILE", help="draw the first curves, with bands of the draws, into this .png")
    add_method(impute)
    add_overwrite(impute)
    add_common(impute, seed="of the noise (default: the model's)", usual_seed=None)
    impute.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    import fastdiff as fd
    from fastdiff import plots, series
    from fastdiff.data import ENDINGS, read_table
    from fastdiff.files import writing
    from fastdiff.tables import save_filled

    draws = check_int("--draws", args.draws, low=1)
    first = check_int("--first-draw", args.first_draw, low=0)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    check_output(args, args.output, series.ENDINGS)
    if args.plot:
        check_picture(args, args.plot)
    model = fd.load(args.model, backend=backend_of(args))
    assert model.net is not None
    if len(model.net.shape) > 2:
        raise FastdiffError(f"{args.model} is a model of pictures: fastdiff sample --known fills those in")
    options: dict[str, Any] = {"method": args.method, "seed": seed, "first_draw": first, "progress": not args.quiet}
    if len(model.net.shape) == 2:
        return _recording(args, model, draws, options)
    if not args.output.endswith(ENDINGS):
        raise FastdiffError(f"{args.output}: curves go to a .csv or .npy file")
    inputs = covariates(args, model)
    table = read_table(args.data, **reading(args), missing=True)
    X = table.as_float32(missing=True)
    if X.shape[1:] != model.net.shape:
        wants = f"where those of {args.model} have {model.net.shape[0]}"
        raise FastdiffError(f"{args.data}: curves of {X.shape[1]} points, {wants}")
    holes = np.isnan(X)
    if args.plot and not holes.any():
        raise FastdiffError("--plot: there is nothing to show, for no value is missing")
    filled = model.impute(X, draws, quantiles=args.quantiles, covariates=inputs, **options)
    if args.output.endswith(".npy"):
        with writing(args.output) as file:
            np.lib.format.write_array(file, filled, allow_pickle=False)
    else:
        save_filled(args.output, filled, table, args.quantiles)
    print(
        f"{args.output}: {holes.sum()} of {holes.size} values filled in, in {holes.any(axis=1).sum()} of {len(X)} "
        f"curves, {_how(args, draws)}"
    )
    if args.plot:
        some = np.flatnonzero(holes.any(axis=1))[:SHOWN]
        shown = filled[:, some]
        if args.quantiles is not None:
            inputs = None if inputs is None else inputs[some]
            shown = model.impute(X[some], draws, covariates=inputs, **options)
        plots.save(plots.imputed(X[some], shown), args.plot)
        print(f"{args.plot}: the first {len(some)} curves with missing values")
    return 0


def _how(args: argparse.Namespace, draws: int) -> str:
    if args.quantiles is not None:
        return f"by {len(args.quantiles)} quantiles of {draws} draws"
    return f"{draws} time{'s' if draws > 1 else ''}"


def _recording(args: argparse.Namespace, model: Any, draws: int, options: dict[str, Any]) -> int:
    """Fill in a recording, or the series (N, points, channels) of an array."""
    import numpy as np

    from fastdiff import plots, series

    X = series.load_recording(args.data, **reading(args))
    frame = series.Frame.of(X, args.data) if series.is_frame(X) else None
    seen = X if frame is None else frame.values
    if frame is not None:
        frame.check_clock()
        if model.channel_names is not None and frame.names != model.channel_names:
            wants = f"where {args.model} has {','.join(model.channel_names)}: --columns names some, in their order"
            raise FastdiffError(f"{args.data}: the columns {','.join(frame.names)}, {wants}")
    if (inputs := inputs_of(args, model)) is not None:
        options["covariates"] = inputs
    holes = np.isnan(seen)
    if args.plot and (not holes.any() or seen.ndim != 2):
        raise FastdiffError("--plot: there is nothing to show: it wants a recording with missing values")
    found = model.impute(seen, draws, quantiles=args.quantiles, **options)
    if seen.ndim == 2:
        series.save_answers(args.output, found, frame, args.quantiles, model.channel_names, later=False)
    else:
        series.save_series(args.output, found.reshape(-1, *seen.shape[1:]), model.channel_names)
    print(f"{args.output}: {holes.sum()} of {holes.size} values filled in, {_how(args, draws)}")
    if args.plot:
        levels = args.quantiles or plots.BANDS
        of_levels = found if args.quantiles else np.quantile(found, levels, axis=0)
        first = int(np.flatnonzero(holes.any(axis=1))[0])
        part = slice(max(0, first - model.net.shape[0]), max(0, first - model.net.shape[0]) + MOST_SHOWN)
        lines = {level: one[part] for level, one in zip(levels, of_levels, strict=True)}
        names = None if frame is None else frame.names
        plots.save(plots.bands(seen[part], lines, names=names, title="The gaps, given the rest"), args.plot)
        print(f"{args.plot}: rows {part.start} to {min(part.stop, len(seen)) - 1}")
    return 0
