"""``fastdiff score``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff.cli.inputs import (
    add_picture_options,
    add_table_options,
    check_output,
    check_picture,
    check_whole,
    covariates,
    training_data,
)
from fastdiff.cli.parser import add_command, add_common, add_overwrite, backend_of
from fastdiff.display import aligned
from fastdiff.errors import check_int, check_seed

ENDINGS = (".csv",)


def add(commands: Any) -> None:
    score = add_command(
        commands,
        "score",
        "say how likely data are under a model",
        "Writes -log p of every row, in nats of the data's units, and its standard error.\n"
        "A familiar row has a low number, a strange one a high one.",
        "examples:\n"
        "  fastdiff score m.safetensors curves.csv -o nll.csv\n"
        "  fastdiff score m.safetensors curves.csv -o nll.csv --bits --plot terms.png\n",
    )
    score.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train")
    score.add_argument("data", metavar="DATA", help="a .csv or .npy file, or a folder of pictures")
    add_table_options(score)
    add_picture_options(score)
    score.add_argument("-o", "--output", metavar="FILE", required=True, help="a .csv file: one row of DATA a line")
    score.add_argument("--bits", action="store_true", help="bits a value instead of nats a row")
    score.add_argument(
        "--method",
        choices=["table", "denoising"],
        help="of what a deterministic sampler draws, or by denoising errors (default: by size)",
    )
    score.add_argument(
        "--probes", type=int, default=1, metavar="K", help="noises for each row and timestep (default 1)"
    )
    score.add_argument("--plot", metavar="FILE", help="draw the variational bound's terms into this .png file")
    score.add_argument("--labels", action="store_true", help="the folder holds one folder for each class")
    add_overwrite(score)
    add_common(score, seed="of what is drawn (default: the model's)", usual_seed=None)
    score.set_defaults(run=run, size=None, gray=False, flip=False)
    score.set_defaults(snapshots=None, channels=None, dropout=None)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    import fastdiff as fd
    from fastdiff.files import writing

    check_output(args, args.output, ENDINGS)
    if args.plot:
        check_picture(args, args.plot)
    probes = check_int("--probes", args.probes, low=1)
    model = fd.load(args.model, backend=backend_of(args))
    seed = model.seed if args.seed is None else check_seed(args.seed, "--seed")
    args.resume = args.model  # where the shape of the data is known from
    data, labels, _ = training_data(args, model)
    check_whole(args, data)
    options: dict[str, Any] = {"seed": seed, "progress": not args.quiet}
    options["covariates"] = covariates(args, model) if data.ndim == 2 else None
    found = model.log_density(data, labels, method=args.method, probes=probes, **options)
    unit, factor = ("bits", 1 / (data[0].size * np.log(2))) if args.bits else ("nats", 1.0)
    table = np.column_stack([-found.values, found.stderr]) * factor
    with writing(args.output) as file:
        np.savetxt(file, table, fmt="%.9g", delimiter=",", header=f"{unit},stderr", comments="")
    missed = float(found.residual.max())
    facts = {
        f"{unit} a {'value' if args.bits else 'row'}": f"{table[:, 0].mean():.6g}",
        "lowest, highest": f"{table[:, 0].min():.6g}, {table[:, 0].max():.6g}",
    }
    if missed > 0:
        facts["rows of the table missed by"] = f"{missed:.1e} at most"
    print(f"{args.output}: -log p of {len(data)} rows")
    print("\n".join(aligned(facts)))
    if args.plot:
        from fastdiff import plots

        terms = model.bound(data, labels, **options)
        plots.save(plots.bound(terms.terms, terms.stderr), args.plot)
        print(f"{args.plot}: the bound's terms")
    return 0
