"""Results of the benchmarks: records that programs fill, files hold as JSON, and documents show as tables."""

from __future__ import annotations

import json
import math
import sys
import types
import typing
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from plans import Network, Workers

from fastdiff.bench import Result, Roofs, duration, speed

BUSY = 0.05  # share of the machine that others may use before a row is called doubtful
RESULTS = Path(__file__).parent / "results"
MISSED = ": **missed**"


def record(kind: Any, value: Any) -> Any:
    """Return what was read from JSON as a record of this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if value is None or kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return record(next(one for one in arguments if one is not types.NoneType), value)
    if origin in (list, tuple):
        return origin(record(arguments[0], one) for one in value)
    if origin is dict:
        return {name: record(arguments[1], one) for name, one in value.items()}
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        types_of = typing.get_type_hints(kind)
        return kind(**{name: record(types_of[name], one) for name, one in value.items()})
    return value


@dataclass(kw_only=True)
class Header:
    """Where, when and with what it was measured."""

    date: str
    commit: str
    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    numpy: str
    numba: str
    fastdiff: str = ""
    safetensors: str = ""
    torch: str | None = None
    diffusers: str | None = None
    jax: str | None = None
    openvino: str | None = None
    zarr: str | None = None
    mpi4py: str | None = None
    scale: float = 1.0

    def line(self) -> str:
        """Return it as a line of text."""
        peers = f" PyTorch {self.torch}, diffusers {self.diffusers};" if self.torch else ""
        others = {"JAX": self.jax, "OpenVINO": self.openvino, "zarr": self.zarr, "mpi4py": self.mpi4py}
        peers += "".join(f" {name} {version};" for name, version in others.items() if version)
        return (
            f"{self.cpu}, {self.threads} threads on {self.cores} cores, {self.system}; Python {self.python}, "
            f"NumPy {self.numpy}, Numba {self.numba};{peers} {self.date}, commit {self.commit}."
        )

    def tiny(self, what: str) -> str:
        """Return a warning where the sizes are not the real ones."""
        return "" if self.scale == 1 else f"**At {self.scale:g} of the sizes: the {what} mean nothing.** "


@dataclass
class Report:
    """Results of one program. Names of its files begin with a key of `REPORTS`."""

    header: Header

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read those of a JSON file."""
        return record(cls, json.loads(path.read_text(encoding="utf-8")))

    def lines(self) -> list[str]:
        """Return them as lines of Markdown."""
        raise NotImplementedError

    def table(self) -> str:
        """Return them as Markdown: what was measured where, and a table."""
        return "\n".join(self.lines()) + "\n"

    def save(self, folder: Path, name: str) -> None:
        """Write them to NAME.json and NAME.md in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.json", json.dumps(plain(self), indent=1) + "\n")
        write(folder / f"{name}.md", self.table())


def plain(value: Any) -> Any:
    """Return a record as JSON has it: named tuples are objects too."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def load(path: Path) -> Report:
    """Read the results in a JSON file, which its name says the kind of."""
    return REPORTS[path.stem.split("-")[0]].read(path)


def finish(report: Report, name: str, folder: Path | None, failed: list[str]) -> int:
    """Write what a program has measured, unless a part of it failed or there is no folder; return its exit code."""
    if failed:
        print(f"failed: {', '.join(failed)}; nothing written", file=sys.stderr)
        return 1
    if folder is not None:
        report.save(folder, name)
        print(f"written to {folder}")
    return 0


def write(path: Path, text: str) -> None:
    """Replace a file by one with this text, in one go."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def markdown(head: list[str], rows: list[list[Any]], left: int = 1) -> list[str]:
    """Return a table; all columns but the first few are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * left}{'---:|' * (len(head) - left)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


# -- peers.py --------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """The peer's time through ours, of the rounds or of the shapes."""

    median: float
    min: float
    max: float


@dataclass
class Sides:
    """A figure of both sides."""

    ours: float
    peer: float


@dataclass
class Memory(Sides):
    """Peaks of both sides, and what share of the peer's ours may be."""

    target: float | None = None

    def line(self) -> str:
        """Return both, and whether ours is small enough."""
        words = f"{self.ours / 1e6:.0f} MB, theirs {self.peer / 1e6:.0f} MB"
        if self.target is None:
            return words
        missed = "" if self.ours <= self.target * self.peer else MISSED
        return f"{words}: {self.ours / self.peer:.2f} of it, target at most {self.target:g}{missed}"


class Shape(NamedTuple):
    """One shape of a row of many."""

    title: str
    ratio: Ratio
    seconds: Sides
    operations: int = 0


class Compared(NamedTuple):
    """A workload beside a peer."""

    name: str
    title: str
    peer: str
    ratio: Ratio
    seconds: Sides
    target: float | None
    met: bool | None
    rounds: tuple[Sides, ...] = ()
    prepared: Sides | None = None
    parity: dict[str, dict[str, float]] | None = None
    bytes: int = 0
    operations: int = 0
    normals: int = 0
    others: float = 0.0  # share of the machine that other programs used
    shapes: tuple[Shape, ...] = ()
    memory: Memory | None = None


@dataclass
class PeersReport(Report):
    """Ours beside peers; of workloads that could not be compared, why."""

    rows: list[Compared]
    failed: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        head = f"{self.header.tiny('ratios')}{self.header.line()}"
        rows = []
        for row in self.rows:
            target = "" if row.target is None else f"{row.target:g}{'' if row.met else MISSED}"
            if row.others > BUSY:
                target += f" (other programs used {row.others:.0%} of the machine)"
            ratio = f"**{row.ratio.median:.1f}** ({row.ratio.min:.1f} .. {row.ratio.max:.1f})"
            times = duration(row.seconds.ours), duration(row.seconds.peer)
            rows.append([row.title, row.peer, *times, ratio, target])
        return [
            f"{head} Ratio: their time through ours, median of the rounds (smallest .. largest).",
            "",
            *markdown(["work", "against", "ours", "theirs", "ratio", "target"], rows, left=2),
            *self._shapes(),
            *self._memory(),
            *(line for why in self.failed for line in ("", f"Not compared: {why}.")),
        ]

    def _shapes(self) -> list[str]:
        """A table of the shapes of rows that have any, which are the same ones."""
        of_shapes = [row for row in self.rows if row.shapes]
        if not of_shapes:
            return []
        head = ["shape", *(cell for row in of_shapes for cell in (f"{row.title}: ours", "theirs", "ratio"))]
        rows = []
        for shapes in zip(*(row.shapes for row in of_shapes), strict=True):
            rows.append([shapes[0].title])
            for one in shapes:
                rows[-1] += [duration(one.seconds.ours), duration(one.seconds.peer), f"**{one.ratio.median:.2f}**"]
        return ["", *markdown(head, rows)]

    def _memory(self) -> list[str]:
        return [
            line
            for row in self.rows
            if row.memory
            for line in ("", f"Peak memory beyond the imported libraries, {row.title}: {row.memory.line()}.")
        ]


# -- run.py ----------------------------------------------------------------------------------------------------


@dataclass
class BenchReport(Report):
    """Every backend, side by side, against the roofs."""

    roofs: dict[str, Roofs]
    cases: list[Result]

    def lines(self) -> list[str]:
        fast = [name for name in self.roofs if name != "numpy"]  # which has the roofs of the CPU
        roofs = "; ".join(
            f"{name} {self.roofs[name].memory / 1e9:.1f} GB/s and {self.roofs[name].arithmetic / 1e9:.0f} GF/s"
            for name in fast
        )
        titles = dict.fromkeys(result.title for result in self.cases)
        by_case = {(result.title, result.backend): result for result in self.cases}
        rows = []
        for title in titles:
            found = [by_case.get((title, name)) for name in fast]
            reference = by_case.get((title, "numpy"))
            rate = f"{speed(reference.rate)} {reference.unit}" if reference and reference.rate is not None else ""
            rows.append([title, *(cell for one in found for cell in (one.cells() if one else [""] * 3)), rate])
        head = ["work", *(cell for name in fast for cell in (name, "rate", "of the roof")), "NumPy's rate"]
        return [
            f"{self.header.tiny('numbers')}{self.header.line()} The roofs, measured in the same run: {roofs}. NumPy "
            "computes a part of the samples.",
            "",
            *markdown(head, rows),
        ]


# -- footprint.py, compile_time.py -----------------------------------------------------------------------------


class Process(NamedTuple):
    """A new process: its time, peak memory, and the size of what is installed."""

    seconds: float
    memory: float
    installed: int


@dataclass
class FootprintReport(Report):
    """What a user feels before anything is computed."""

    footprint: dict[str, Process]
    rounds: int
    names: ClassVar = {
        "ours": "fastdiff", "ours, no kernel cached": "fastdiff, no kernel cached", "peer": "torch + diffusers",
    }  # fmt: skip

    def lines(self) -> list[str]:
        rows = [
            [self.names[side], duration(one.seconds), f"{one.memory / 1e6:.0f} MB", f"{one.installed / 1e6:.0f} MB"]
            for side, one in self.footprint.items()
        ]
        head = ["a new process loads a model and draws 16 curves", "time", "peak memory", "installed"]
        return [self.header.line(), "", *markdown(head, rows)]


@dataclass
class CacheTimes:
    """Seconds with nothing cached, and with everything."""

    cold: float
    warm: float


@dataclass
class Stage(CacheTimes):
    """What a new process does, and how long it may take where that is set."""

    what: str
    target: CacheTimes | None = None

    def cells(self) -> list[str]:
        """Return what was done, and both times."""
        if self.target is None:
            return [self.what, duration(self.cold), duration(self.warm)]
        both = ((self.cold, self.target.cold), (self.warm, self.target.warm))
        return [self.what, *(f"{duration(s)} (target {most:g} s{'' if s <= most else MISSED})" for s, most in both)]


@dataclass
class CompileReport(Report):
    """What the first run costs."""

    kernels: int
    stages: list[Stage]

    def lines(self) -> list[str]:
        rows = [stage.cells() for stage in self.stages]
        return [
            f"{self.header.line()} {self.kernels} compiled functions are cached.",
            "",
            *markdown(["in a new process", "nothing cached", "cached"], rows),
        ]


# -- profile_layers.py -----------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Time and operations."""

    seconds: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.operations + other.operations)

    def cells(self, peak: float) -> list[str]:
        """Return the time, the speed, and its share of the peak."""
        rate = self.operations / self.seconds if self.operations else 0.0
        shown = [f"{rate / 1e9:.0f}", f"{rate / peak:.0%}"] if rate else ["", ""]
        return [duration(self.seconds) if self.seconds else "", *shown]


@dataclass
class LayerCost:
    """Calls of a kind of layer in a pass."""

    what: str
    calls: int = 0
    forward: Cost = field(default_factory=Cost)
    backward: Cost = field(default_factory=Cost)


@dataclass
class Pass:
    """A training step, or a forward pass."""

    title: str
    seconds: float
    rows: list[LayerCost]

    def lines(self, peak: float) -> list[str]:
        """Return a table of its layers."""
        all_layers = LayerCost(f"all: {duration(self.seconds)}")
        for row in self.rows:
            all_layers.forward += row.forward
            all_layers.backward += row.backward
        both = ("forward", "backward") if all_layers.backward.seconds else ("forward",)
        rows = []
        for row in (*self.rows, all_layers):
            costs = [getattr(row, way) for way in both]
            share = sum(cost.seconds for cost in costs) / self.seconds
            cells = (cell for cost in costs for cell in cost.cells(peak))
            rows.append([row.what, "" if row is all_layers else row.calls, *cells, f"{share:.0%}"])
        head = [self.title, "calls", *(cell for way in both for cell in (way, "GF/s", "of peak")), "share"]
        return ["", *markdown(head, rows)]


@dataclass
class ProfileReport(Report):
    """Where the U-Net's time goes."""

    peak: float
    passes: list[Pass]
    rounding: dict[str, dict[str, float]]

    def lines(self) -> list[str]:
        lines = [f"{self.header.line()} A matrix product in cache reaches {self.peak / 1e9:.0f} GF/s."]
        for one in self.passes:
            lines += one.lines(self.peak)
        numpy = self.rounding["numpy"]
        errors = ", ".join(f"{what} {ours:.1e} ({numpy[what]:.1e})" for what, ours in self.rounding["ours"].items())
        return [
            *lines,
            "",
            f"Error of a 3x3 convolution against float64, and in brackets NumPy's in float32: {errors}.",
        ]


# -- precision.py, quality.py ----------------------------------------------------------------------------------


class Precision(NamedTuple):
    """A figure in both precisions."""

    what: str
    float32: float
    bf16: float
    ratio: float | None = None
    target: float | None = None
    error: float | None = None

    def cells(self) -> list[str]:
        """Return the row of a table."""
        ratio = target = ""
        if self.ratio is not None:
            ratio = f"**{self.ratio:.4f}**" + ("" if self.error is None else f" ± {self.error:.4f}")
            target = f"{self.target:g}{'' if self.ratio <= self.target else MISSED}"
        return [self.what, f"{self.float32:.4f}", f"{self.bf16:.4f}", ratio, target]


@dataclass
class PrecisionReport(Report):
    """Whether bf16 convolutions learn as well."""

    steps: int
    batch: int
    precision: list[Precision]

    def lines(self) -> list[str]:
        head = ["digits of `examples/images.py`", "float32", "bf16 convolutions", "ratio", "target"]
        return [
            f"{self.header.line()} {self.steps} steps of batch {self.batch}; the error of a ratio is the standard "
            "error of the mean difference of a step.",
            "",
            *markdown(head, [row.cells() for row in self.precision]),
        ]


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


class Quality(NamedTuple):
    """A data set, and how far samples are from unseen rows."""

    name: str
    rows: int
    d: int
    network: str
    steps: int
    scale: str
    ours: Estimate
    gaussian: Estimate
    real: Estimate
    nearest: Estimate
    seconds: Estimate
    excess: Estimate
    target: float | None
    met: bool

    def cells(self) -> list[str]:
        """Return the row of a table."""
        target = "at most the Gaussian's" if self.target is None else f"{self.target:g}"
        means = f"{self.real.mean:.3f}", f"{self.gaussian.mean:.3f}"
        others = f"{self.nearest.mean:.2f}", f"{self.seconds.mean:.0f} s"
        target += "" if self.met else MISSED
        return [f"{self.name} ({self.rows} x {self.d})", *means, f"**{self.ours}**", f"{self.excess}", target, *others]

    def chosen(self) -> list[str]:
        """Return the row of the table by sizes: what was chosen for so many rows and values, and how far it came."""
        sizes = f"{self.rows}", f"{self.d}", f"{self.steps}", f"{self.seconds.mean:.0f} s"
        means = f"{self.real.mean:.3f}", f"{self.gaussian.mean:.3f}", f"**{self.ours.mean:.3f}**"
        return [self.name, *sizes, *means]


class CurveFigure(NamedTuple):
    """A figure of the source text's task."""

    what: str
    value: float
    target: float | None = None
    met: bool = True

    def cells(self) -> list[str]:
        """Return the row of a table."""
        target = "" if self.target is None else f"{self.target:g}{'' if self.met else MISSED}"
        return [self.what, f"{self.value:.4f}", target]


@dataclass
class QualityReport(Report):
    """How good the defaults are on real data."""

    seeds: int
    quality: list[Quality]
    curves: list[CurveFigure]

    def lines(self) -> list[str]:
        head = [
            "data (rows trained on x values)", "real rows", "Gaussian", "fastdiff", "less the Gaussian's", "target",
            "nearest", "training, CPU time",
        ]  # fmt: skip
        lines = [
            f"{self.header.line()} Energy distance to unseen rows, mean and standard error over {self.seeds} splits; "
            "nearest: median distance to the nearest training row, over that of unseen rows (copies: 0).",
            "",
            *markdown(head, [row.cells() for row in self.quality]),
        ]
        rows = [row.cells() for row in self.curves]
        return [*lines, "", *markdown(["curves of the source text", "value", "target"], rows)] if rows else lines

    def by_size(self) -> SizesReport:
        """Return the same data sets, from few rows to many."""
        return SizesReport(self.header, sorted(self.quality, key=lambda row: (row.rows, row.d)))


@dataclass
class SizesReport(Report):
    """What the defaults choose for so many rows of so many values, and how far samples are from unseen rows."""

    quality: list[Quality]

    def lines(self) -> list[str]:
        head = ["data", "rows N", "values d", "steps", "training, CPU time", "real rows", "Gaussian", "fastdiff"]
        return [self.header.line(), "", *markdown(head, [row.chosen() for row in self.quality])]


# -- answers.py ------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """A way to draw what is hidden of curves, and what was found of its draws, by name."""

    name: str
    found: dict[str, Estimate]
    ratio: float
    missed: list[str]

    def cells(self) -> list[str]:
        """Return the row of a table."""
        return [
            self.name,
            *(f"{each.mean:.4f} ± {each.error:.4f}" for each in self.found.values()),
            f"{self.ratio:.2f}",
        ]


class Posterior(NamedTuple):
    """A mixture of `d` dimensions seen in `m`: distances to draws of its exact posterior, the first of others of it."""

    d: int
    m: int
    distances: dict[str, Estimate]

    def cells(self) -> list[str]:
        """Return the row of a table."""
        return [f"{self.d}", f"{self.m}", *(f"{each.mean:.2f} ± {each.error:.2f}" for each in self.distances.values())]


class Price(NamedTuple):
    """Time of draws given m values through that of plain ones: median, least and largest, and what it may be."""

    m: int
    ratio: float
    least: float
    largest: float
    wanted: float

    def cells(self) -> list[str]:
        """Return the row of a table."""
        missed = MISSED if self.ratio > self.wanted else ""
        return [f"{self.m}", f"{self.ratio:.2f}", f"{self.least:.2f} .. {self.largest:.2f}", f"{self.wanted:g}{missed}"]


@dataclass
class AnswersReport(Report):
    """Draws given observations, beside exact ones."""

    seen: int
    draws: int
    curves: int
    steps: int
    spread: float
    answers: list[Answers]
    problems: int
    particles: int
    rows: int
    posteriors: list[Posterior]
    gaps: list[Answers]
    costs: list[Price]

    def lines(self) -> list[str]:
        found = list(self.answers[0].found) if self.answers else []
        short = [f"{row.name}: {', '.join(row.missed)}" for row in self.answers if row.missed]
        lines = [self.header.line()]
        if self.answers:
            lines += [
                "",
                f"{self.curves} unseen curves of 50 points, {self.seen} of them told, {self.draws} draws each, after "
                f"{self.steps} training steps, by which those with tmpd are spread by {self.spread:.2f} (learned from "
                "held-out curves); mean and standard error over the curves.",
                "",
                *markdown(["draws by", *found, "CRPS through the Gaussian's"], [row.cells() for row in self.answers]),
                "",
                f"Missed (bands by more than three standard errors): {'; '.join(short) or 'nothing'}.",
            ]
        if self.gaps:
            lines += [
                "",
                "The same of curves of which 25 points in a row are hidden, where the Gaussian continues what it sees "
                "from its last digits, or takes it for right to a hundredth:",
                "",
                *markdown(["draws by", *found, "CRPS through the Gaussian's"], [row.cells() for row in self.gaps]),
            ]
        if self.posteriors:
            names = list(self.posteriors[0].distances)
            lines += [
                "",
                "25 unit Gaussians at (8 i, 8 j, 8 i, ...), seen through a random matrix with noise (Cardoso et al. "
                f"2023): sliced Wasserstein distance of {self.particles} draws by {self.rows} rows of ddpm to as many "
                f"of the exact posterior, mean and standard error over {self.problems} problems.",
                "",
                *markdown(["dimensions", "seen", *names], [row.cells() for row in self.posteriors], 0),
            ]
        if self.costs:
            lines += [
                "",
                "Processor time of 1,000 draws by tmpd in 50 rows of ddpm through that of plain ones: median and range "
                "of nine turns.",
                "",
                *markdown(["values seen", "ratio", "range", "may be"], [row.cells() for row in self.costs], 0),
            ]
        return lines


# -- series_answers.py -----------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """Series with values hidden: what was found of draws by a model and by a Gaussian, and the ratio of their CRPS.

    `missed` names bands that are off, where the law of the data is known. `seconds` of CPU time are those of the
    longest training, `spread` is what the models learned of their draws, and
    `series` how many unseen ones each seed has.
    """

    data: str
    hidden: str
    ours: dict[str, Estimate]
    gaussian: dict[str, Estimate]
    ratio: Estimate
    target: float
    missed: list[str]
    seconds: float
    spread: float
    series: int

    @property
    def met(self) -> bool:
        """Whether it is within its bound, and its bands hold."""
        return self.ratio.mean <= self.target and not self.missed

    def cells(self) -> list[str]:
        """Return the row of a table."""
        crps = [f"{one['CRPS'].mean:.4f}" for one in (self.ours, self.gaussian)]
        bands = [
            [f"{each.mean:.1%}" for what, each in one.items() if what != "CRPS"] for one in (self.ours, self.gaussian)
        ]
        errors = max(each.error for what, each in self.ours.items() if what != "CRPS")
        target = f"at most {self.target:g}" + ("" if self.ratio.mean <= self.target else MISSED)
        target += "".join(f", {band}{MISSED}" for band in self.missed)
        ours = f"{', '.join(bands[0])} (± {errors:.1%})"
        return [
            f"{self.data} ({self.series})",
            self.hidden,
            *crps,
            f"**{self.ratio}**",
            target,
            ours,
            ", ".join(bands[1]),
            f"{self.spread:.2f}",
        ]


@dataclass
class SeriesReport(Report):
    """Imputation and forecasts of series, beside a Gaussian's."""

    draws: int
    seeds: int
    seconds: float
    rows: list[Answered]

    def lines(self) -> list[str]:
        bands = " / ".join(what.removeprefix("in ") for what in self.rows[0].ours if what != "CRPS")
        head = [
            "data (unseen series of a seed)", "hidden", "CRPS", "the Gaussian's", "ratio", "target",
            f"in bands of {bands}", "the Gaussian's bands", "spread",
        ]  # fmt: skip
        longest = max(row.seconds for row in self.rows)
        slow = "" if longest <= self.seconds else MISSED
        return [
            f"{self.header.line()} {self.seeds} seeds, {self.draws} draws; ratio: "
            "mean of the paired ratios and its standard error; of AR(1) the Gaussian is the exact conditional, and a "
            "band misses where it is off by more than three standard errors (the largest in brackets). The longest "
            f"training took {longest:.0f} s of CPU time, target at most {self.seconds:g} s{slow}.",
            "",
            *markdown(head, [row.cells() for row in self.rows], left=2),
        ]


# -- sines.py --------------------------------------------------------------------------------------------------


class SinesScore(NamedTuple):
    """A measure of real and drawn series, the same of two real sets, and how far above that it may be."""

    name: str
    ours: Estimate
    floor: Estimate
    bound: float | None = None

    @property
    def met(self) -> bool:
        """Whether it is within its bound."""
        return self.bound is None or self.ours.mean <= self.floor.mean + self.bound

    def cells(self) -> list[str]:
        """Return the row of a table."""
        shown = [f"{one.mean:.4f}" + (f" ± {one.error:.4f}" if one.error else "") for one in (self.ours, self.floor)]
        target = "" if self.bound is None else f"floor + {self.bound:g}{'' if self.met else MISSED}"
        return [self.name, f"**{shown[0]}**", shown[1], target]


@dataclass
class SinesReport(Report):
    """Whether networks tell drawn series from real ones."""

    what: str
    rows: list[SinesScore]

    def lines(self) -> list[str]:
        table = markdown(["measure", "fastdiff", "floor", "target"], [row.cells() for row in self.rows])
        return [f"{self.header.line()} {self.what}", "", *table]


# -- pictures.py -----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A figure of what was asked for and drawn, its standard error, and its bound, if it has one."""

    what: str
    value: float
    error: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def cells(self) -> list[str]:
        """Return the row of a table."""
        value = f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")
        bounds = ("at least", self.at_least), ("at most", self.at_most)
        target = "".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return [self.what, f"**{value}**" if target else value, target + ("" if self.met else MISSED)]


@dataclass
class PicturesReport(Report):
    """How good pictures are that are asked for, and what asking costs."""

    rows: list[Asked]

    def lines(self) -> list[str]:
        return [self.header.line(), "", *markdown(["measured", "value", "target"], [row.cells() for row in self.rows])]


# -- scaling.py ------------------------------------------------------------------------------------------------


class Lines(NamedTuple):
    """The axes of a figure: of every side, sizes and seconds."""

    title: str
    label: str
    lines: dict[str, list[Any]]


@dataclass
class ScalingReport(Report):
    """Time against sizes, by panel."""

    panels: dict[str, Lines]


# -- scale.py --------------------------------------------------------------------------------------------------

# What a plan takes for granted of machines that were not measured.
STORE_BYTES = 1e9  # a second, that a shared store takes from all workers together
LINK = Network(seconds_of_a_byte=1 / 1.25e9, delay=50e-6)  # 10 Gbit/s
PIECE_BYTES = 1 << 18  # of a sum that travel together: `fastdiff.ranks.PIECE`
PLANNED = 10**9
PLANNED_WORKERS = (1, 2, 8, 64, 512, 4096)
PLANNED_RANKS = (1, 2, 4, 8, 32)
MOST_OVERHEAD, LEAST_GAIN, MOST_CHUNKS = 0.05, 1.8, 3.0


class Growth(NamedTuple):
    """Many samples: how long, how many bytes on disk, and the most memory of a process."""

    rows: int
    seconds: float
    size: int
    memory: int

    def cells(self) -> list[str]:
        return [f"{self.rows:,}", duration(self.seconds), f"{self.size / 1e6:.0f} MB", f"{self.memory / 1e6:.0f} MB"]


class OverRanks(NamedTuple):
    """Steps of a network alone and over ranks.

    Attributes
    ----------
    what : str
    ranks, parameters, chunks : int
        Chunks that a batch comes in.
    alone, together : float
        Seconds of a step without ranks, and on all of them.
    lone, beside, few : float
        Of one of a rank that has all chunks, while the others wait; while the others do the same; and then with a batch
        of one chunk.
    adding : float
        Seconds in which all chunks are added.
    nothing, summed : float
        Of a sum by itself, of a loss and of as many values as there are parameters.
    up, down : tuple of int
        Bytes of the messages from one rank to the next that has more, and of those with the result.
    sent, least : float
        Bytes of a step, and the fewest possible.
    equal : bool
        Whether one process and the ranks ended in the same weights.
    """

    what: str
    ranks: int
    parameters: int
    alone: float
    together: float
    summed: float
    sent: float
    least: float
    equal: bool
    # Older results have none of these.
    chunks: int = 0
    lone: float = 0.0
    beside: float = 0.0
    few: float = 0.0
    adding: float = 0.0
    nothing: float = 0.0
    up: tuple[int, ...] = ()
    down: tuple[int, ...] = ()

    @property
    def each(self) -> float:
        """Seconds of what every rank does, however few chunks it has."""
        return max(0.0, self.few - (self.beside - self.few) / (self.chunks - 1))

    def planned(self, ranks: int, network: Network | None = None) -> float:
        """Seconds of a step on so many ranks; by default of this machine, which they share."""
        if not self.chunks:
            pieces = math.ceil(self.sent / (2 * (self.ranks - 1)) / PIECE_BYTES)
            messages = [self.sent / (2 * (self.ranks - 1)) / pieces] * pieces
            return self.alone / ranks + (network.sum_seconds(ranks, messages, messages) if network else self.summed)
        divided = max(0.0, self.beside - self.each - self.adding)
        seconds = self.each + divided * math.ceil(self.chunks / ranks) / self.chunks
        faster = 1.0 if network is None else self.lone / self.beside
        links = 2 * (self.ranks - 1)
        here = Network((self.summed - self.nothing) / (links * 4 * self.parameters), self.nothing / links)
        return faster * seconds + (network or here).sum_seconds(ranks, self.up, self.down, faster * self.adding)

    def cells(self) -> list[str]:
        return [
            self.what, duration(self.alone), duration(self.together), f"{self.alone / self.together:.2f} x",
            f"{self.planned(self.ranks) / self.together:.2f}", duration(self.summed),
            f"{self.sent / 1e6:.3f} MB",
            f"{self.sent / self.least:.2f}", "yes" if self.equal else "**no**",
        ]  # fmt: skip


@dataclass
class WorkersReport(Report):
    """What samples cost on workers and training over ranks, and what that means for more of both."""

    points: int
    chunk: int
    seconds: float  # of a chunk, of processor time
    overhead: float
    start: float
    hand_out: float
    rates: dict[str, float]  # samples a second of so many processes, when all work
    whole: dict[str, float]  # seconds of `chunks` chunks on so many, with their start
    chunks: int
    worker: int
    chunks_of_memory: float
    growth: list[Growth]
    growth_steps: int  # of the sampler of these
    ranks: list[OverRanks]
    ranks_at: str = ""  # date and commit of these, where they are of another time

    def workers(self, store: float) -> Workers:
        """What a plan is made of, for a store that takes so many bytes a second."""
        write = self.chunk * self.points * 4 / store
        return Workers(self.start, self.chunk / self.rates["1"], self.hand_out, write)

    def lines(self) -> list[str]:
        one, two = self.rates["1"], self.rates["2"]
        predicted, _ = self.workers(math.inf).seconds(self.chunks, 2)
        facts = [
            ["processor time of a chunk, one thread", f"{self.chunk:,} curves in {duration(self.seconds)}", ""],
            ["`sample_to` over `sample`", f"{self.overhead:+.1%}", _at_most(self.overhead, MOST_OVERHEAD, "5 %")],
            ["start of a process", duration(self.start), ""],
            ["to hand out a chunk", duration(self.hand_out), ""],
            ["one process", f"{one:,.0f} samples/s", ""],
            ["two processes", f"{two:,.0f} samples/s, {two / one:.2f} x", _at_most(-two / one, -LEAST_GAIN, "1.8 x")],
            [f"{self.chunks} chunks on two processes", duration(self.whole["2"]), f"planned {duration(predicted)}"],
            [
                "memory of a worker", f"{self.worker / 1e6:.0f} MB and {self.chunks_of_memory:.1f} chunks",
                _at_most(self.chunks_of_memory, MOST_CHUNKS, "3 chunks"),
            ],
        ]  # fmt: skip
        plan, of_workers = self.workers(STORE_BYTES), []
        for workers in PLANNED_WORKERS:
            seconds, busy = plan.seconds(-(-PLANNED // self.chunk), workers)
            of_workers.append([f"{workers:,}", f"{seconds / 3600:.2f} h", *(f"{share:.0%}" for share in busy.values())])
        of_ranks = [
            [
                str(r),
                *(f"{duration(row.planned(r, LINK))}, {row.alone / row.planned(r, LINK):.2f} x" for row in self.ranks),
            ]
            for r in PLANNED_RANKS
        ]
        sizes = [f"samples, {self.growth_steps} steps, 2 processes", "time", "on disk", "memory"]
        head = [
            f"training, one thread a rank{self.ranks_at}", "alone", "2 ranks", "faster", "planned / measured",
            "a sum by itself", "sent a step", "of the least", "same bits",
        ]  # fmt: skip
        return [
            self.header.line(),
            "",
            *markdown(["measured", "", "goal"], facts),
            "",
            *(markdown(sizes, [g.cells() for g in self.growth]) if self.growth else []),
            "",
            *(markdown(head, [row.cells() for row in self.ranks]) if self.ranks else []),
            "",
            *markdown(
                [f"workers, {PLANNED:.0e} samples", "planned", "workers busy", "the driver", "the store"], of_workers
            ),
            "",
            *(
                markdown(["ranks, planned for 10 Gbit/s", *(row.what for row in self.ranks)], of_ranks)
                if self.ranks
                else []
            ),
        ]


def _at_most(value: float, most: float, words: str) -> str:
    """A goal, and whether it was missed."""
    return f"{'at least' if most < 0 else 'at most'} {words}" + ("" if value <= most else MISSED)


REPORTS: dict[str, type[Report]] = {
    "peers": PeersReport, "bench": BenchReport, "footprint": FootprintReport, "compile": CompileReport,
    "profile": ProfileReport, "precision": PrecisionReport, "quality": QualityReport, "scaling": ScalingReport,
    "sines": SinesReport, "answers": AnswersReport, "series": SeriesReport,
    "pictures": PicturesReport, "workers": WorkersReport,
}  # fmt: skip
