"""The parser, which knows what options of other programs are called here, and the options that commands share."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from fastdiff.backends import Backend

BACKENDS = ("auto", "numpy", "cpu", "cuda")
PRECISIONS = ("float32", "bf16x3", "bf16")

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
    "--drop": "exclude ignore",
    "--columns": "usecols only cols",
    "--delimiter": "sep separator",
    "--seed": "random-state random-seed",
    "--backend": "device gpu cuda",
    "--precision": "dtype bf16 bfloat16 half fp16 mixed-precision",
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
    "evaluate": "eval test judge",
    "score": "likelihood density nll logp bound",
    "impute": "fill inpaint complete interpolate",
    "forecast": "predict-ahead extrapolate continue future",
    "demo": "example tutorial",
    "doctor": "check diagnose selftest",
    "completion": "completions autocomplete",
    "page": "html web browser interactive",
}


class Parser(argparse.ArgumentParser):
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
            unknown = self._unknown([word for word in self.given if word[:2] == "--"])
            super().error("; ".join([message + self._meant(message), *unknown]))
        word = next((word for word in self.given if not word.startswith("-")), "")
        near = _nearest(word, commands)
        super().error(f"{message}; did you mean {near}?" if near not in (None, word) else message)

    def _meant(self, message: str) -> str:
        """What may be meant where the message is of a value that is none of an option's."""
        found = re.match(r"argument (?:\S+/)?(\S+): invalid choice: '(.*?)'", message)
        choices = [action.choices for action in self._actions if found and found[1] in action.option_strings]
        near = _nearest(found[2], list(choices[0])) if found and choices and choices[0] else None
        return f"; did you mean {near}?" if near else ""

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


class Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import platform

        from fastdiff.backends import available_backends

        packages = ", ".join(f"{name} {installed(name) or 'missing'}" for name in ("numpy", "numba", "scipy"))
        print(f"fastdiff {installed_version()}")
        print(f"backends: {', '.join(available_backends())}; python {platform.python_version()}, {packages}")
        parser.exit()


def installed(name: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed_version() -> str:
    return installed("fastdiff-engine") or "(not installed)"


def add_command(commands: Any, name: str, brief: str, text: str, epilog: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=brief,
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made


def add_method(command: argparse.ArgumentParser) -> None:
    """How samples are drawn given observations."""
    command.add_argument(
        "--method",
        choices=("auto", "tmpd", "pigdm", "dps", "replace", "repaint"),
        default="auto",
        help="how what is known is used (default auto: tmpd, which uses what the network knows of the covariance)",
    )


def add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overwrite", action="store_true", help="replace files that are there; without it that is an error"
    )


def add_quantiles(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quantiles", type=_levels, metavar="Q,Q,...", help="write these quantiles of the draws, as in 0.05,0.5,0.95"
    )


def _levels(text: str) -> list[float]:
    with contextlib.suppress(ValueError):
        levels = [float(word) for word in text.split(",")]
        if all(0 <= level <= 1 for level in levels):
            return levels
    raise argparse.ArgumentTypeError(f"got {text!r}, wants numbers from 0 to 1, as in 0.05,0.5,0.95")


def add_common(command: argparse.ArgumentParser, *, seed: str, usual_seed: int | None) -> None:
    command.add_argument("--seed", type=int, metavar="S", default=usual_seed, help=f"seed {seed}")
    command.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="where to compute (default: the fastest there is)"
    )
    command.add_argument(
        "--precision", choices=PRECISIONS,
        help="what is multiplied: bf16 for networks of pictures, on tensor cores or a CPU with AMX, and on cuda for "
        "perceptrons; bf16x3 for perceptrons on cuda (default: float32)",
    )  # fmt: skip
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def backend_of(args: argparse.Namespace) -> str | Backend:
    """Where a command computes."""
    if args.precision is None:
        return str(args.backend)
    from fastdiff.backends import get_backend

    return get_backend(args.backend, precision=args.precision)
