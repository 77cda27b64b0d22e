"""``fastdiff page``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastdiff.cli.inputs import check_output
from fastdiff.cli.parser import add_command, add_overwrite


def add(commands: Any) -> None:
    page = add_command(
        commands,
        "page",
        "write a page in which a curve diffuses",
        "Writes one HTML file that runs in a browser and loads nothing: draw a curve, see it\n"
        "dissolve and come back, erase a stretch and see it filled a hundred ways. With a model\n"
        "of curves or series its network travels inside; none of the data does. It has to be a\n"
        "perceptron, which train makes of them, and not one of --conditional: no U-Net.",
        "examples:\n"
        "  fastdiff page -o page.html\n"
        "  fastdiff page m.safetensors -o page.html\n"
        "\n"
        "Of pictures: fastdiff sample p.safetensors -n 16 -o new.png --gif chain.gif\n",
    )
    page.add_argument("model", metavar="MODEL", nargs="?", help="a .safetensors file written by fastdiff train")
    page.add_argument("-o", "--output", metavar="FILE", default="page.html", help="an .html file (default page.html)")
    add_overwrite(page)
    page.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import fastdiff as fd
    from fastdiff import page

    check_output(args, args.output, (".html",))
    if args.model is None:
        page.save(args.output)
    else:
        model = fd.load(
            args.model, backend="numpy"
        )  # for a few samples, which other backends would compile kernels for
        page.save(args.output, model, name=os.path.basename(args.model))
    print(f"{args.output}: {os.path.getsize(args.output) / 1e3:.0f} kB, open it in a browser")
    return 0
