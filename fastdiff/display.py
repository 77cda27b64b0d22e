"""How objects show themselves: facts as aligned lines of text and, in notebooks, as tables and small drawings.

The HTML takes its colours from the page, light or dark, and needs neither matplotlib nor a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastdiff.model import Diffusion
    from fastdiff.nn import Network
    from fastdiff.samplers import Sampler
    from fastdiff.schedule import Schedule

SIGNAL, NOISE = "#2a8ac8", "#e69f00"  # as in figures, but for a blue that can be read on black too
WIDE, HIGH, LEFT, BELOW = 320, 96, 24, 16  # of a drawing, in pixels, and what its labels take
CURRENT = 'fill="currentColor"'
POINTS = 160  # of a drawn line, at most
ENDS = 8  # rows of a long table that are shown, at each end


class Summary:
    """Facts about an object: lines of text when printed, a table in a notebook.

    Attributes
    ----------
    title : str
    facts : dict
        Names and values; a mapping is a part of its own.
    """

    def __init__(self, title: str, facts: Mapping[str, Any]) -> None:
        self.title, self.facts = title, dict(facts)

    def __repr__(self) -> str:
        return "\n".join([self.title, *aligned(self.facts)])

    def _repr_html_(self) -> str:
        rows = [(name.replace(" ", "\u00a0"), value) for name, value in _rows(self.facts, "")]
        return f"<strong>{escape(self.title)}</strong>{_table((), rows)}"


def summary(model: Diffusion) -> Summary:
    """The network and its layers, what it learned from, and how far it is: see `Diffusion.summary`."""
    net, history = model.net, model.history
    facts: dict[str, Any] = {"network": "chosen at the first fit"}
    if net is not None:
        facts = {"network": repr(net), "parameters": f"{net.layout.count:,}", "layers": _layers(net)}
    facts["schedule"] = "chosen at the first fit" if model.schedule is None else repr(model.schedule)
    facts["predicts"] = model.prediction
    if model.normaliser is None:
        return Summary("Diffusion", facts | {"state": "not trained: call fit", "seed": model.seed})
    facts["base"] = "none" if model._gaussian is None else f"a Gaussian of {len(model._gaussian.variances)} directions"
    named = {"classes": model.class_names, "covariates": model.covariate_names, "channels": model.channel_names}
    facts |= {what: names for what, names in named.items() if names}
    facts["state"] = f"step {model.step:,}"
    if history["loss"]:
        last = history["loss"][-100:]
        facts["loss"] = f"{sum(last) / len(last):.4g} (mean of the last {len(last)} steps)"
    if held := history["validation_loss"]:
        at = history["validation_step"][int(np.argmin(held))]
        facts["held-out loss"] = f"{held[-1]:.4g}, smallest {min(held):.4g} at step {at:,}"
    if model.report_ is not None:
        facts["judged"] = f"after step {model.report_['step']:,}: see report_"
    return Summary("Diffusion", facts | {"backend": model.backend, "seed": model.seed})


def _layers(net: Network) -> dict[str, str]:
    """The parts of a network by name: how many parameters, and the shapes of few tensors."""
    parts: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in net.layout.shapes.items():
        words = name.split(".")
        parts.setdefault(".".join(words[: 2 if words[1].isdecimal() else 1]), []).append(shape)
    shown = {}
    for name, shapes in parts.items():
        text = (
            " + ".join(" x ".join(map(str, shape)) for shape in shapes) if len(shapes) < 3 else f"{len(shapes)} tensors"
        )
        shown[name] = f"{sum(int(np.prod(shape)) for shape in shapes):,} ({text})"
    return shown


def schedule_html(schedule: Schedule) -> str:
    """Signal and noise against the timestep, drawn as SVG, above the schedule in words."""
    T = schedule.T
    at = np.unique(np.linspace(0, T - 1, min(T, POINTS)).round().astype(int))
    x = LEFT + (WIDE - LEFT - 2) * (at / max(T - 1, 1))
    foot = HIGH - BELOW

    def line(values: Any, colour: str) -> str:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, 4 + (foot - 4) * (1 - values[at]), strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>'

    def word(x: float, y: float, text: str, more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" {more or CURRENT}>{text}</text>'

    middle = (LEFT + WIDE) / 2
    drawn = [
        f'<path d="M{LEFT} 4V{foot}H{WIDE - 2}" fill="none" stroke="currentColor" stroke-opacity="0.4"/>',
        line(schedule.signal, SIGNAL), line(schedule.noise, NOISE),
        word(LEFT - 14, 12, "1"), word(LEFT - 14, foot, "0"), word(LEFT, HIGH - 3, "0"),
        word(middle, HIGH - 3, "timestep t", f'{CURRENT} text-anchor="middle"'),
        word(WIDE - 2, HIGH - 3, f"{T - 1}", f'{CURRENT} text-anchor="end"'),
        word(middle - 30, foot - 6, "signal", f'fill="{SIGNAL}" text-anchor="end"'),
        word(middle + 30, foot - 6, "noise", f'fill="{NOISE}"'),
    ]  # fmt: skip
    label = escape(repr(schedule))
    size = f'width="{WIDE}" height="{HIGH}" viewBox="0 0 {WIDE} {HIGH}"'
    return (
        f'<div><svg {size} role="img" aria-label="{label}" font-size="11" font-family="sans-serif">{"".join(drawn)}'
        f"</svg><br/><code>{label}</code></div>"
    )


def sampler_html(sampler: Sampler) -> str:
    """The rows of a sampler, without columns that are 0 throughout; of a long table both ends."""
    named = ("t", "p", "q", "a", "b", "c1", "c2", "c3", "e", "s", "r")
    values = np.array([[getattr(row, name) for name in named] for row in sampler.rows])
    kept = [0, *(k for k in range(1, len(named)) if values[:, k].any())]
    rows: list[Sequence[Any]] = [
        (f"{number}", f"{row[0]:.0f}", *(f"{row[k]:.5g}" for k in kept[1:])) for number, row in enumerate(values)
    ]
    if len(rows) > 2 * ENDS + 1:
        rows = [*rows[:ENDS], ("…",) * (len(kept) + 1), *rows[-ENDS:]]
    law = "m = clip(p x + q out); x' = a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s exp(r v) z"
    return f"<code>{escape(repr(sampler))}</code>{_table(['row', *(named[k] for k in kept)], rows)}<small>{law}</small>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    above = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{above}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def aligned(facts: Mapping[str, Any]) -> list[str]:
    """Lines ``key  value`` with all values in one column; a mapping within is indented below its key."""
    rows = list(_rows(facts, "  "))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {value}".rstrip() for name, value in rows]


def _rows(facts: Mapping[str, Any], indent: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = indent + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield name, "" if value else "none"
            yield from _rows(value, indent + "  ")
        else:
            yield name, shown(value)


def shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        if len(value) > 8:
            return f"{len(value)} values, {shown(value[0])} to {shown(value[-1])}"
        return ", ".join(map(shown, value)) if value else "none"
    return str(value)
