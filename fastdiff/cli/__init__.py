"""The command line: ``fastdiff demo | train | sample | impute | forecast | evaluate | score | page | info | bench``.

Results go to stdout; progress, warnings and errors to stderr. What goes wrong on purpose is one line
``fastdiff: error: ...`` and exit code 2; Ctrl-C is exit code 130. Each command imports what it needs when it
runs, so that ``--help`` comes at once.

A command is a module with a function `add`, which adds its arguments to the parser and says what runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastdiff.cli import bench, demo, evaluate, forecast, impute, info, page, sample, score, train
from fastdiff.cli.messages import INTERRUPTED, fail, note, plain_messages
from fastdiff.cli.parser import Parser, Version
from fastdiff.errors import FastdiffError

COMMANDS = (demo, train, sample, impute, forecast, evaluate, score, page, info, bench)  # in the order of the help


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
        build_parser().print_help(sys.stderr)
        return 2
    args = build_parser().parse_args(argv)
    try:
        with plain_messages():
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # Whoever read our output has enough (`fastdiff info | head -1`). Python flushes stdout once more on
        # its way out, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FastdiffError, OSError) as error:
        return fail(str(error))
    except MemoryError as error:
        return fail(f"not enough memory: {error}")
    except KeyboardInterrupt:
        note("\nfastdiff: interrupted")
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
