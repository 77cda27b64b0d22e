"""The command line: ``fastdiff demo | train | sample | impute | forecast | evaluate | score | page | info | doctor |
bench | completion``.

Results go to stdout; progress, warnings and errors to stderr. What goes wrong on purpose is one line
``fastdiff: error: ...`` and an exit code, which `EXIT_CODES` has. Nothing is coloured but by Python's own help and by
bars, where NO_COLOR is heeded. Each command imports what it needs when it runs, so that ``--help`` comes at once.

A command is a module with a function `add`, which adds its arguments to the parser and says what runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastdiff.cli import bench, completion, demo, doctor, evaluate, forecast, impute, info, page, sample, score, train
from fastdiff.cli.messages import BROKEN, INTERRUPTED, REFUSED, fail, note, plain_messages
from fastdiff.cli.parser import Parser, Version
from fastdiff.errors import FastdiffError

COMMANDS = (
    demo,
    train,
    sample,
    impute,
    forecast,
    evaluate,
    score,
    page,
    info,
    doctor,
    bench,
    completion,
)  # in the order of the help

EXIT_CODES = """\
exit codes:
  0    done
  1    doctor found something bad, or nobody read the output
  2    refused: bad input, an unknown option, a file that cannot be used
  130  Ctrl-C, and 128 + N after signal N: a training saves what it has learned
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; those of the process by default.

    Returns
    -------
    int
        As `EXIT_CODES` says. ``--help``, ``--version`` and unknown options leave by ``SystemExit``, as argparse does.
        Without any argument there is help on stderr, and 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        build_parser().print_help(sys.stderr)
        return REFUSED
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
        return BROKEN
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
            "fastdiff COMMAND --help explains a command.\n"
            "\n" + EXIT_CODES
        ),
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print versions and backends, and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
