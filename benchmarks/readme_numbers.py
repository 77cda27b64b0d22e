"""Fill README.md and docs from the results of the benchmarks: ``python benchmarks/readme_numbers.py [--check]``.

What stands between ``<!-- numbers:NAME -->`` and ``<!-- /numbers -->`` becomes the table of results/NAME.json, and of
``<!-- numbers:NAME:short -->`` the rows of it that `SHORT` lists, or of quality the data sets by their sizes.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

from report import RESULTS, PeersReport, QualityReport, Report, load, write

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- numbers:([\w-]+)(:short)? -->\n).*?(<!-- /numbers -->)", re.DOTALL)
MARKERS = re.compile(r"<!-- (?:numbers:[\w-]+(?::short)?|/numbers) -->")
# The rows of a short form. Of a kind of work the peer's fastest form that was measured.
SHORT = {
    "peers-cpu": (
        "forward-1000000x50",
        "train-tutorial-1000-fused",
        "chain-tutorial-1000",
        "unet-train-ema-16-compiled",
        "unet-ddim-16-compiled",
    )
}


class NumbersError(Exception):
    """Why a file cannot be filled."""


def shortened(name: str, report: PeersReport | QualityReport) -> Report:
    """Return the results with the rows of their short form only, and these without what is more than a line."""
    if isinstance(report, QualityReport):
        return report.by_size()
    if name not in SHORT:
        raise NumbersError(f"{name} has no short form")
    rows = {row.name: row for row in report.rows}
    missing = [row for row in SHORT[name] if row not in rows]
    if missing:
        raise NumbersError(f"{name} has no row {', '.join(missing)}, which its short form needs")
    return replace(report, rows=[rows[row]._replace(shapes=(), memory=None) for row in SHORT[name]])


def filled(text: str, folder: Path) -> str:
    """Return the text of a file with its tables from the results in a folder."""
    if not BLOCK.search(text) or len(MARKERS.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise NumbersError("needs pairs of <!-- numbers:NAME --> and <!-- /numbers -->, each on its own line")

    def block(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        if not path.exists():
            raise NumbersError(f"there is no {path.name} in {folder.name}/: run the benchmark first")
        report = load(path)
        return match[1] + (shortened(match[2], report) if match[3] else report).table() + match[4]

    return BLOCK.sub(block, text)


def files_with_numbers() -> list[Path]:
    """Return README.md and what of docs has blocks."""
    docs = sorted((ROOT / "docs").glob("*.md"))
    return [ROOT / "README.md", *(path for path in docs if MARKERS.search(path.read_text(encoding="utf-8")))]


def main(argv: list[str] | None = None) -> int:
    """Fill the files, or check that they are filled; return the exit code."""
    parser = argparse.ArgumentParser(prog="readme_numbers.py", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md, and what of docs has blocks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    return max(fill(path, args.results, check=args.check) for path in args.files or files_with_numbers())


def fill(path: Path, results: Path, *, check: bool) -> int:
    """Fill a file, or check that it is filled; return the exit code."""
    try:
        text = path.read_text(encoding="utf-8")
        new = filled(text, results)
    except (NumbersError, OSError) as error:
        print(f"{path.name}: {error}", file=sys.stderr)
        return 1
    if check:
        if text != new:
            print(f"{path.name} does not show the results: run make readme-numbers", file=sys.stderr)
        return int(text != new)
    if text != new:
        write(path, new)
    print(f"{path.name}: {'filled' if text != new else 'is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
