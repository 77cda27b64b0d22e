"""Fill README.md from the results of the benchmarks: ``python benchmarks/readme_numbers.py [--check]``.

What stands between ``<!-- numbers:NAME -->`` and ``<!-- /numbers -->`` becomes the table of results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- numbers:([\w-]+) -->\n).*?(<!-- /numbers -->)", re.DOTALL)
MARKERS = re.compile(r"<!-- (?:numbers:[\w-]+|/numbers) -->")


class NumbersError(Exception):
    """Why a README cannot be filled."""


def write(path: Path, text: str) -> None:
    """Replace a file by one with this text, in one go."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError


def place(header: dict[str, Any]) -> str:
    """Return a header as a line of text."""
    h = header
    peers = f" PyTorch {h['torch']}, diffusers {h['diffusers']};" if "torch" in h else ""
    return (
        f"{h['cpu']}, {h['threads']} threads on {h['cores']} cores, {h['system']}; Python {h['python']}, "
        f"NumPy {h['numpy']}, Numba {h['numba']};{peers} {h['date']}, commit {h['commit']}."
    )


def table(results: dict[str, Any]) -> str:
    """Return the results of `peers.py` or `compile_time.py` as Markdown: what was measured where, and a table."""
    if "stages" in results:
        return compile_table(results)
    h = results["header"]
    tiny = "" if h["scale"] == 1 else f"**At {h['scale']:g} of the sizes: the ratios mean nothing.** "
    lines = [
        f"{tiny}{place(h)} Ratio: their time through ours, median of the rounds (smallest .. largest).",
        "",
        "| work | against | ours | theirs | ratio | wanted |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        ratio, target, seconds = row["ratio"], row["target"], row["seconds"]
        wanted = "" if target is None else f"{target:g}" if row["met"] else f"{target:g}: **missed**"
        lines.append(
            f"| {row['title']} | {row['peer']} | {duration(seconds['ours'])} | {duration(seconds['peer'])} "
            f"| **{ratio['median']:.1f}** ({ratio['min']:.1f} .. {ratio['max']:.1f}) | {wanted} |"
        )
    for row in results["rows"]:
        if "memory" in row:
            ours, peer = (f"{row['memory'][side] / 1e6:.0f} MB" for side in ("ours", "peer"))
            lines += ["", f"Peak memory beyond the imported libraries, {row['title']}: {ours}, theirs {peer}."]
    return "\n".join(lines) + "\n"


def compile_table(results: dict[str, Any]) -> str:
    """Return the results of `compile_time.py` as Markdown."""
    lines = [
        f"{place(results['header'])} {results['kernels']} compiled functions are cached.",
        "",
        "| in a new process | nothing cached | cached |",
        "|---|---:|---:|",
        *(
            f"| {stage['what']} | {duration(stage['cold'])} | {duration(stage['warm'])} |"
            for stage in results["stages"]
        ),
    ]
    return "\n".join(lines) + "\n"


def filled(text: str, folder: Path) -> str:
    """Return a README's text with its tables from the results in a folder."""
    if not BLOCK.search(text) or len(MARKERS.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise NumbersError("wants pairs of <!-- numbers:NAME --> and <!-- /numbers -->, each on its own line")

    def block(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        if not path.exists():
            raise NumbersError(f"there is no {path.name} in {folder.name}/: run the benchmark first")
        return match[1] + table(json.loads(path.read_text(encoding="utf-8"))) + match[3]

    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    """Fill the README, or check that it is filled; return the exit code."""
    parser = argparse.ArgumentParser(prog="readme_numbers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is not up to date")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text(encoding="utf-8")
        new = filled(text, args.results)
    except (NumbersError, OSError) as error:
        print(f"{args.readme.name}: {error}", file=sys.stderr)
        return 1
    if args.check:
        if text != new:
            print(f"{args.readme.name} does not show the results: run make readme-numbers", file=sys.stderr)
        return int(text != new)
    if text != new:
        write(args.readme, new)
    print(f"{args.readme.name}: {'filled' if text != new else 'is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
