"""Fill README.md and docs from the results of the benchmarks: ``python benchmarks/readme_numbers.py [--check]``.

What stands between ``<!-- numbers:NAME -->`` and ``<!-- /numbers -->`` becomes the table of results/NAME.json, and of
``<!-- numbers:NAME:short -->`` the rows of it that `SHORT` lists.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastdiff.bench import cells, duration, speed

BUSY = 0.05  # share of the machine that others may use before a row is called doubtful
RESULTS = Path(__file__).parent / "results"
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


def write(path: Path, text: str) -> None:
    """Replace a file by one with this text, in one go."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def place(header: dict[str, Any]) -> str:
    """Return a header as a line of text."""
    h = header
    peers = f" PyTorch {h['torch']}, diffusers {h['diffusers']};" if "torch" in h else ""
    return (
        f"{h['cpu']}, {h['threads']} threads on {h['cores']} cores, {h['system']}; Python {h['python']}, "
        f"NumPy {h['numpy']}, Numba {h['numba']};{peers} {h['date']}, commit {h['commit']}."
    )


def table(results: dict[str, Any]) -> str:
    """Return the results of a benchmark as Markdown: what was measured where, and a table."""
    if "stages" in results:
        return compile_table(results)
    if "footprint" in results:
        return footprint_table(results)
    if "roofs" in results:
        return roofs_table(results)
    if "passes" in results:
        return profile_table(results)
    if "precision" in results:
        return precision_table(results)
    if "quality" in results:
        return quality_table(results)
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
        if row.get("others", 0) > BUSY:
            wanted += f" (other programs used {row['others']:.0%} of the machine)"
        lines.append(
            f"| {row['title']} | {row['peer']} | {duration(seconds['ours'])} | {duration(seconds['peer'])} "
            f"| **{ratio['median']:.1f}** ({ratio['min']:.1f} .. {ratio['max']:.1f}) | {wanted} |"
        )
    lines += shapes_table([row for row in results["rows"] if "shapes" in row])
    for row in results["rows"]:
        if "memory" in row:
            words = memory_words(row["memory"])
            lines += ["", f"Peak memory beyond the imported libraries, {row['title']}: {words}."]
    return "\n".join(lines) + "\n"


def memory_words(memory: dict[str, float]) -> str:
    """Return both peaks, and where a share of the peer's is wanted, theirs."""
    ours, peer, wanted = memory["ours"], memory["peer"], memory.get("wanted")
    words = f"{ours / 1e6:.0f} MB, theirs {peer / 1e6:.0f} MB"
    if wanted is None:
        return words
    return (
        f"{words}: {ours / peer:.2f} of it, wanted at most {wanted:g}{'' if ours <= wanted * peer else ': **missed**'}"
    )


def shapes_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of the shapes of such rows, which have the same ones."""
    if not rows:
        return []
    heads = "".join(f" {row['title']}: ours | theirs | ratio |" for row in rows)
    lines = ["", f"| shape |{heads}", f"|---|{'---:|---:|---:|' * len(rows)}"]
    for shapes in zip(*(row["shapes"] for row in rows), strict=True):
        cells = "".join(
            f" {duration(s['seconds']['ours'])} | {duration(s['seconds']['peer'])} | **{s['ratio']['median']:.2f}** |"
            for s in shapes
        )
        lines.append(f"| {shapes[0]['title']} |{cells}")
    return lines


def roofs_table(results: dict[str, Any]) -> str:
    """Return the results of `run.py` as Markdown: by case, the backends side by side."""
    h, backends = results["header"], list(results["roofs"])
    tiny = "" if h["scale"] == 1 else f"**At {h['scale']:g} of the sizes: the numbers mean nothing.** "
    roofs = "; ".join(
        f"{name} {roof['memory'] / 1e9:.1f} GB/s and {roof['arithmetic'] / 1e9:.0f} GF/s"
        for name, roof in results["roofs"].items()
        if name != "numpy"  # it has those of the CPU
    )
    fast = [name for name in backends if name != "numpy"]
    by_case: dict[str, dict[str, Any]] = {}
    for row in results["cases"]:
        by_case.setdefault(row["title"], {})[row["backend"]] = row
    lines = [
        f"{tiny}{place(h)} The roofs, measured in the same run: {roofs}. NumPy computes a part of the samples.",
        "",
        "| work |" + "".join(f" {name} | rate | of the roof |" for name in fast) + " NumPy's rate |",
        "|---|" + "---:|" * (3 * len(fast) + 1),
    ]
    for title, rows in by_case.items():
        line = [title, *(cell for name in fast for cell in (cells(rows[name]) if name in rows else [""] * 3))]
        reference = rows.get("numpy", {"rate": None})
        line.append("" if reference["rate"] is None else f"{speed(reference['rate'])} {reference['unit']}")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def footprint_table(results: dict[str, Any]) -> str:
    """Return the results of `footprint.py` as Markdown."""
    names = {"ours": "fastdiff", "ours, no kernel cached": "fastdiff, no kernel cached", "peer": "torch + diffusers"}
    lines = [
        place(results["header"]),
        "",
        "| a new process loads a model and draws 16 curves | time | peak memory | installed |",
        "|---|---:|---:|---:|",
        *(
            f"| {names[side]} | {duration(row['seconds'])} | {row['memory'] / 1e6:.0f} MB "
            f"| {row['installed'] / 1e6:.0f} MB |"
            for side, row in results["footprint"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def compile_table(results: dict[str, Any]) -> str:
    """Return the results of `compile_time.py` as Markdown."""
    lines = [
        f"{place(results['header'])} {results['kernels']} compiled functions are cached.",
        "",
        "| in a new process | nothing cached | cached |",
        "|---|---:|---:|",
        *(f"| {stage['what']} | {_stage(stage, 'cold')} | {_stage(stage, 'warm')} |" for stage in results["stages"]),
    ]
    return "\n".join(lines) + "\n"


def _stage(stage: dict[str, Any], cache: str) -> str:
    """Return the time of a stage, and how long it may take where that is set."""
    words = duration(stage[cache])
    if "wanted" not in stage:
        return words
    wanted = stage["wanted"][cache]
    return f"{words} (wanted {wanted:g} s{'' if stage[cache] <= wanted else ': **missed**'})"


def profile_table(results: dict[str, Any]) -> str:
    """Return the results of `profile_layers.py` as Markdown."""
    peak = results["peak"]
    lines = [f"{place(results['header'])} A matrix product in cache reaches {peak / 1e9:.0f} GF/s."]
    for one in results["passes"]:
        ways = [way for way in ("forward", "backward") if any(way in row for row in one["rows"])]
        heads = "".join(f" {way} | GF/s | of peak |" for way in ways)
        lines += ["", f"| {one['title']} | calls |{heads} share |", f"|---|---:|{'---:|---:|---:|' * len(ways)}---:|"]
        sums: dict[str, Any] = {
            way: {unit: sum(row[way][unit] for row in one["rows"] if way in row) for unit in ("seconds", "operations")}
            for way in ways
        }
        for row in (*one["rows"], {"what": f"all: {duration(one['seconds'])}", "calls": ""} | sums):
            cells, whole = "", 0.0
            for way in ways:
                seconds, operations = (row[way][unit] if way in row else 0.0 for unit in ("seconds", "operations"))
                speed = operations / seconds if operations else 0.0
                cells += f" {duration(seconds) if seconds else ''} |"
                cells += f" {speed / 1e9:.0f} | {speed / peak:.0%} |" if speed else "  |  |"
                whole += seconds
            lines.append(f"| {row['what']} | {row['calls']} |{cells} {whole / one['seconds']:.0%} |")
    ours, numpy = (results["rounding"][side] for side in ("ours", "numpy"))
    errors = ", ".join(f"{what} {ours[what]:.1e} ({numpy[what]:.1e})" for what in ours)
    lines += ["", f"Error of a 3x3 convolution against float64, and in brackets NumPy's in float32: {errors}."]
    return "\n".join(lines) + "\n"


def precision_table(results: dict[str, Any]) -> str:
    """Return the results of `precision.py` as Markdown."""
    lines = [
        f"{place(results['header'])} {results['steps']} steps of batch {results['batch']}; the error of a ratio is the "
        "standard error of the mean difference of a step.",
        "",
        "| digits of `examples/images.py` | float32 | bf16 convolutions | ratio | wanted |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in results["precision"]:
        ratio = wanted = ""
        if "ratio" in row:
            ratio = f"**{row['ratio']:.4f}**" + (f" ± {row['error']:.4f}" if "error" in row else "")
            wanted = f"{row['wanted']:g}{'' if row['ratio'] <= row['wanted'] else ': **missed**'}"
        lines.append(f"| {row['what']} | {row['float32']:.4f} | {row['bf16']:.4f} | {ratio} | {wanted} |")
    return "\n".join(lines) + "\n"


def quality_table(results: dict[str, Any]) -> str:
    """Return the results of `quality.py` as Markdown."""

    def estimate(value: dict[str, float]) -> str:
        return f"{value['mean']:.3f} ± {value['error']:.3f}"

    lines = [
        f"{place(results['header'])} Energy distance to unseen rows, mean and standard error over {results['seeds']} "
        "splits; nearest: median distance to the nearest training row, over that of unseen rows (copies: 0).",
        "",
        "| data (rows trained on x values) | real rows | Gaussian | fastdiff | less the Gaussian's | wanted | nearest "
        "| training |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["quality"]:
        wanted = "at most the Gaussian's" if row["wanted"] is None else f"{row['wanted']:g}"
        wanted += "" if row["met"] else ": **missed**"
        lines.append(
            f"| {row['name']} ({row['rows']} x {row['d']}) | {row['real']['mean']:.3f} | {row['gaussian']['mean']:.3f} "
            f"| **{estimate(row['ours'])}** | {estimate(row['excess'])} | {wanted} "
            f"| {row['nearest']['mean']:.2f} | {row['seconds']['mean']:.0f} s |"
        )
    if results["curves"]:
        lines += ["", "| curves of the source text | | wanted |", "|---|---:|---:|"]
    for row in results["curves"]:
        wanted = "" if "wanted" not in row else f"{row['wanted']:g}{'' if row['met'] else ': **missed**'}"
        lines.append(f"| {row['what']} | {row['value']:.4f} | {wanted} |")
    return "\n".join(lines) + "\n"


def shortened(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results with the rows of their short form only, and these without what is more than a line."""
    if name not in SHORT:
        raise NumbersError(f"{name} has no short form")
    rows = {row["name"]: row for row in results["rows"]}
    missing = [row for row in SHORT[name] if row not in rows]
    if missing:
        raise NumbersError(f"{name} has no row {', '.join(missing)}, which its short form wants")
    kept = [{key: rows[row][key] for key in rows[row].keys() - {"shapes", "memory"}} for row in SHORT[name]]
    return results | {"rows": kept}


def filled(text: str, folder: Path) -> str:
    """Return the text of a file with its tables from the results in a folder."""
    if not BLOCK.search(text) or len(MARKERS.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise NumbersError("wants pairs of <!-- numbers:NAME --> and <!-- /numbers -->, each on its own line")

    def block(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        if not path.exists():
            raise NumbersError(f"there is no {path.name} in {folder.name}/: run the benchmark first")
        results = json.loads(path.read_text(encoding="utf-8"))
        return match[1] + table(shortened(match[2], results) if match[3] else results) + match[4]

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
