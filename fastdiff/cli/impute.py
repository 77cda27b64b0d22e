"""``fastdiff impute``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff.cli.inputs import add_table_options, check_picture, reading
from fastdiff.cli.parser import add_command, add_common, add_method
from fastdiff.errors import FastdiffError, check_int, check_seed

SHOWN = 6  # rows in the figure


def add(commands: Any) -> None:
    impute = add_command(
        commands,
        "impute",
        "fill in what is missing in curves",
        "Draws the missing values of curves from a trained model, given the values that are\n"
        "there, which stay as they are. Missing are empty cells and the words nan, NA and null.\n"
        "A .csv file gets one line for each curve, all curves of the first draw before those of\n"
        "the second; an .npy file the array (draws, curves, points).",
        "examples:\n"
        "  fastdiff impute m.safetensors holes.csv -o filled.csv\n"
        "  fastdiff impute m.safetensors holes.csv -o draws.npy --draws 100 --plot band.png\n"
        "\n"
        "One draw is one guess. The spread of many says how sure the model is.\n",
    )
    impute.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train")
    impute.add_argument("data", metavar="DATA", help="a .csv or .npy file of curves with missing values")
    add_table_options(impute)
    impute.add_argument("-o", "--output", metavar="FILE", required=True, help="a .csv or .npy file")
    impute.add_argument("--draws", type=int, default=1, metavar="K", help="how often each is filled in (default 1)")
    impute.add_argument("--first-draw", type=int, default=0, metavar="K", help="index of the first draw")
    impute.add_argument("--plot", metavar="FILE", help="draw the first curves, with bands of the draws, into this .png")
    add_method(impute)
    add_common(impute, seed="of the noise (default: the model's)", usual_seed=None)
    impute.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    import fastdiff as fd
    from fastdiff import plots
    from fastdiff.data import ENDINGS, load_curves, save_curves
    from fastdiff.files import check_writable, writing

    draws = check_int("--draws", args.draws, low=1)
    first = check_int("--first-draw", args.first_draw, low=0)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    check_writable(args.output, ENDINGS)
    if args.plot:
        check_picture(args.plot)
    model = fd.load(args.model, backend=args.backend)
    assert model.net is not None
    if len(model.net.shape) != 1:
        raise FastdiffError(f"{args.model} is a model of pictures: fastdiff sample --known fills those in")
    X = load_curves(args.data, **reading(args), missing=True)
    if X.shape[1:] != model.net.shape:
        wants = f"where those of {args.model} have {model.net.shape[0]}"
        raise FastdiffError(f"{args.data}: curves of {X.shape[1]} points, {wants}")
    holes = np.isnan(X)
    if args.plot and not holes.any():
        raise FastdiffError("--plot: there is nothing to show, for no value is missing")
    filled = model.impute(X, draws, method=args.method, seed=seed, first_draw=first, progress=not args.quiet)
    if args.output.endswith(".npy"):
        with writing(args.output) as file:
            np.lib.format.write_array(file, filled, allow_pickle=False)
    else:
        save_curves(args.output, filled.reshape(-1, X.shape[1]))
    print(
        f"{args.output}: {holes.sum()} of {holes.size} values filled in, in {holes.any(axis=1).sum()} of {len(X)} "
        f"curves, {draws} {'time' if draws == 1 else 'times'}"
    )
    if args.plot:
        some = np.flatnonzero(holes.any(axis=1))[:SHOWN]
        plots.save(plots.imputed(X[some], filled[:, some]), args.plot)
        print(f"{args.plot}: the first {len(some)} curves with missing values")
    return 0
