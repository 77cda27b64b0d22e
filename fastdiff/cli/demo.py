"""``fastdiff demo``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff.cli.parser import add_command, add_common, backend_of
from fastdiff.errors import check_seed


def add(commands: Any) -> None:
    demo = add_command(
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
    add_common(demo, seed="of everything that is drawn (default 0)", usual_seed=0)
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastdiff import demo

    demo.run(
        args.output,
        backend=backend_of(args),
        seed=check_seed(args.seed, "--seed"),
        quick=args.quick,
        progress=not args.quiet,
        say=lambda text: print(text, flush=True),
    )
    return 0
