"""``fastdiff evaluate``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastdiff.cli.inputs import (
    add_picture_options,
    add_table_options,
    check_picture,
    check_whole,
    covariates,
    training_data,
)
from fastdiff.cli.messages import note
from fastdiff.cli.parser import add_command, add_common, add_overwrite, backend_of
from fastdiff.cli.sample import drawn_by
from fastdiff.display import aligned, shown
from fastdiff.errors import check_int, check_seed


def add(commands: Any) -> None:
    evaluate = add_command(
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
    add_table_options(evaluate)
    add_picture_options(evaluate)
    evaluate.add_argument("-o", "--output", metavar="FILE", help="draw a page of comparisons into this .png file")
    evaluate.add_argument("-n", type=int, metavar="N", help="how many samples (default 1000; pictures: 64)")
    evaluate.add_argument("--training", metavar="DATA", help="what the model has learned from, where DATA is other")
    evaluate.add_argument("--labels", action="store_true", help="the folder holds one folder for each class")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    add_overwrite(evaluate)
    add_common(evaluate, seed="of the samples (default: the model's)", usual_seed=None)
    evaluate.set_defaults(run=run, size=None, gray=False, flip=False)
    evaluate.set_defaults(snapshots=None, channels=None, dropout=None)


def run(args: argparse.Namespace) -> int:
    import fastdiff as fd

    if args.output:
        check_picture(args, args.output)
    samples = None if args.n is None else check_int("-n", args.n, low=2)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    model = fd.load(args.model, backend=backend_of(args))
    args.resume = args.model  # where the shape of the data is known from
    data, labels, _ = training_data(args, model)
    check_whole(args, data)
    training = None
    if args.training is not None:
        training, _, _ = training_data(argparse.Namespace(**{**vars(args), "data": args.training}), model)
    numbers = covariates(args, model) if data.ndim == 2 else None
    found = model.evaluate(data, labels, covariates=numbers, training=training, samples=samples, seed=seed)
    report = found.report
    if args.json:
        print(json.dumps({**report.to_dict(), "complaint": found.complaint}, indent=2))
    else:
        print(f"{args.model} beside {args.data}")
        print("\n".join(aligned(_measures(report))))
    if args.output:
        from fastdiff import judgement, plots

        _, how = judgement.how(model._fitted()[0], len(found.drawn))
        lines = {"sampler": drawn_by(model, how.get("sampler", "auto"), how.get("steps"))}
        lines |= {key: shown(value) for key, value in _measures(report).items()}
        figure = plots.evaluation(
            found.real.reshape(len(found.real), -1),
            found.drawn.reshape(len(found.drawn), -1),
            training=found.training.reshape(len(found.training), -1),
            measures=lines,
        )
        plots.save(figure, args.output)
        note(f"figure in {args.output}")
    if found.complaint:
        note(f"fastdiff: warning: {found.complaint}")
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
