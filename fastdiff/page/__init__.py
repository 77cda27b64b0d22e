"""The page where a curve diffuses: one HTML file that runs in a browser and loads nothing.

What the page computes it computes by itself, with the noise law and the tables of this library: `noise.js` draws the
same bits, `chain.js` runs the rows that are written into the page, `denoisers.js` has the exact denoisers and the
perceptron. The modules are joined as they are, without a build step; those that compute run in workers as well, which
the page makes of its own text.
"""

from __future__ import annotations

import base64
import json
import os
import re
import warnings
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff import samplers
from fastdiff.errors import ArgumentError, ScheduleWarning
from fastdiff.samplers.table import x0_from_output
from fastdiff.schedule import Schedule

if TYPE_CHECKING:
    from fastdiff.model import Diffusion

COMPUTING = ("noise", "algebra", "denoisers", "payload", "chain", "crew")  # what workers run as well
SHOWING = ("draw", "python", "app")
MOST_BYTES = 20_000_000  # of weights
DRAWN = 24  # samples of a model that the page begins with
ELSEWHERE = "fastdiff sample MODEL -o new.csv --gif chain.gif shows this one"
POINTS = 50
SCHEDULE = "fd.Schedule.sigmoid(200, beta_start=1e-5, beta_end=0.1)"
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "heun", "dpmpp_sde")
ALL_ROWS = ("ddpm", "ddim")  # of them all T are offered as well
ROWS = (5, 10, 20, 50)
# What the page begins with, and says as Python.
FAMILIES = {
    "Harmonics": "fd.data.harmonic_curves(128)",
    "Bumps": "3 * np.exp(-(((np.arange(50) - np.linspace(6, 43, 38)[:, None]) / 4) ** 2)) - 0.6",
    "Steps": "np.where(np.arange(50) < np.linspace(9, 40, 32)[:, None], -1.2, 1.2)",
    "Waves": "1.5 * np.sin(np.arange(50) * np.linspace(0.12, 0.5, 32)[:, None])",
}


def document(model: Diffusion | None = None, *, name: str = "m.safetensors") -> str:
    """Return the page as HTML.

    Parameters
    ----------
    model : Diffusion, optional
        A trained model of curves or series with a perceptron, which travels inside the page as float32: its averaged
        weights and a few samples, none of the data. Without one the page has the exact denoisers of drawn curves.
    name : str, optional
        What the file of the model is called, in the lines of Python that the page shows.

    Returns
    -------
    str

    Raises
    ------
    ArgumentError
        A model that the page cannot carry: of pictures, with a noise shape, with a network that is no `fastdiff.MLP`,
        or with weights of more than 20 MB.
    TrainingError
        A model that has not been trained.
    """
    payload = json.dumps(_of_model(model, name) if model is not None else _of_families(), separators=(",", ":"))
    room = files("fastdiff.page")
    computing, showing = (
        "".join(_inlined(module, room.joinpath(f"{module}.js").read_text("utf-8")) for module in part)
        for part in (COMPUTING, SHOWING)
    )
    parts = {
        "style": room.joinpath("page.css").read_text("utf-8"),
        "payload": payload.replace("</", "<\\/"),
        "computing": f'"use strict";\nconst modules = {{}};\n{computing}'.replace("</script", "<\\/script"),
        "showing": showing.replace("</script", "<\\/script"),
    }
    html = room.joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], html)


def save(path: str | os.PathLike[str], model: Diffusion | None = None, *, name: str = "m.safetensors") -> None:
    """Write the page into a file, whole or not at all.

    Parameters
    ----------
    path : path
        Ends in .html.
    model, name
        As of `document`.

    Raises
    ------
    ArgumentError
        As `document`, or another ending.
    DataError
        The file cannot be written.
    """
    from fastdiff.files import check_writable, writing

    check_writable(path, (".html",))
    text = document(model, name=name).encode()
    with writing(path) as file:
        file.write(text)


def _inlined(name: str, module: str) -> str:
    """A module as an expression that may stand beside the others in one script: ``modules.name = {its exports}``."""
    names = re.findall(r"^export (?:function|const|class) (\w+)", module, flags=re.M)
    text = re.sub(r"^export ", "", module, flags=re.M)
    text = re.sub(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', r"const \1 = modules.\2;", text, flags=re.M)
    return f"modules.{name} = (() => {{\n{text}\nreturn {{ {', '.join(names)} }};\n}})();\n"


def _of_families() -> dict[str, Any]:
    import fastdiff as fd

    families = []
    for title, code in FAMILIES.items():
        rows = eval(code, {"fd": fd, "np": np})  # our own lines above, which the page shows
        families.append({"title": title, "code": code, "rows": _packed(rows, np.float64), "count": len(rows)})
    schedule = eval(SCHEDULE, {"fd": fd})
    return {
        **_of_schedule(schedule, "v"),
        "shape": [POINTS],
        "auto": ["dpmpp_2m", 20],
        "families": families,
        "code": SCHEDULE,
        "model": None,
    }


def _of_schedule(schedule: Schedule, prediction: str, auto: samplers.Sampler | None = None) -> dict[str, Any]:
    """Noise levels, and tables of samplers for a choice of rows; `auto` is one more of them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = x0_from_output(schedule.signal, schedule.noise, prediction)
    tables: dict[str, dict[int, Any]] = {}
    with warnings.catch_warnings(action="ignore", category=ScheduleWarning):  # making the schedule has warned
        for name in SAMPLERS:
            for steps in (*(n for n in ROWS if n < schedule.T), *([schedule.T] if name in ALL_ROWS else [])):
                try:
                    made = samplers.named(name, schedule, steps, prediction=prediction)
                except ArgumentError:  # a method that this schedule or prediction does not suit
                    continue
                tables.setdefault(name, {})[steps] = _rows(made)
    if auto is not None:
        tables.setdefault(auto.name, {})[auto.options["steps"]] = _rows(auto)
    return {
        "T": schedule.T,
        "prediction": prediction,
        "signal": schedule.signal.tolist(),
        "noise": schedule.noise.tolist(),
        "p": p.tolist(),
        "q": q.tolist(),
        "samplers": {name: {"about": samplers.about(name), "tables": found} for name, found in tables.items()},
    }


def _rows(table: samplers.Sampler) -> list[list[float]]:
    """The numbers of a table, whole ones as integers: JSON keeps every float64."""
    return [[int(v) if v == int(v) else v for v in row] for row in np.array(table.rows).tolist()]


def _of_model(model: Diffusion, name: str) -> dict[str, Any]:
    from fastdiff.nn import MLP

    net, schedule, normaliser = model._fitted()
    if len(net.shape) == 3:
        wants = "one of curves or series; for pictures: fastdiff sample MODEL -o new.png --gif chain.gif"
        raise ArgumentError("model", f"a network on pictures {net.shape}", wants)
    if not isinstance(net, MLP):
        shape = net.shape if len(net.shape) > 1 else net.shape[0]
        wants = f"a perceptron, which the page has: train an fd.Diffusion(fd.MLP({shape})); {ELSEWHERE}"
        raise ArgumentError("model", f"a network {type(net).__name__}", wants)
    if net.pointwise or net.masked:
        what = "covariates of every point" if net.pointwise else "a mask"
        wants = f"one that is not: the page has no place for it; {ELSEWHERE}"
        raise ArgumentError("model", f"a network that is told {what}", wants)
    if normaliser.noise_shape is not None:
        raise ArgumentError("model", "noise with a shape", f"white noise: the page draws no other; {ELSEWHERE}")
    plan, used = net.plan, model.denoiser()
    flat = np.asarray(used.backend.to_numpy(used.flat))
    arrays: dict[str, npt.NDArray[Any]] = {"flat": flat}
    if plan.linear is not None:
        arrays |= {"basis": plan.linear.basis, "gains": plan.linear.gains}
        arrays |= {} if plan.linear.rest is None else {"rest": plan.linear.rest}
    size = sum(4 * array.size for array in arrays.values())
    if size > MOST_BYTES:
        wants = f"at most {MOST_BYTES / 1e6:g} MB, which a page can carry: a narrower network"
        raise ArgumentError("model", f"weights of {size / 1e6:.1f} MB", wants)
    auto = model.named_sampler()
    factor, offset = (np.ravel(part) for part in normaliser.affine(net.shape))
    labels = None if net.classes is None else np.arange(DRAWN) % net.classes
    scale = model._covariates
    numbers = None if scale is None else np.tile(scale.mean, (DRAWN, 1))
    drawn = np.asarray(model.sample(DRAWN, labels=labels, covariates=numbers), np.float64).reshape(DRAWN, -1)
    classes = None
    if net.classes is not None:
        classes = [str(k) for k in range(net.classes)] if model.class_names is None else list(model.class_names)
    covariates = None
    if scale is not None:
        names = model.covariate_names or [f"covariate {k + 1}" for k in range(len(scale.mean))]
        covariates = {"names": list(names), "mean": scale.mean.tolist(), "deviation": scale.deviation.tolist()}
    channels = 1 if len(net.shape) == 1 else net.shape[1]
    return {
        **_of_schedule(schedule, model.prediction, auto),
        "shape": list(net.shape),
        "auto": [auto.name, auto.options["steps"]],
        "families": [],
        "code": "model.schedule",
        "model": {
            "name": name,
            "about": repr(net),
            "parameters": net.layout.count,
            "seed": str(model.seed),
            "plan": _plan(plan),
            "arrays": {key: _packed(array, np.float32) for key, array in arrays.items()},
            "factor": factor.tolist(),
            "offset": offset.tolist(),
            "channels": list(model.channel_names or [f"channel {k + 1}" for k in range(channels)]),
            "classes": classes,
            "guided": bool(model._label_drop),
            "covariates": covariates,
            "samples": _packed(drawn, np.float64),
        },
    }


def _plan(plan: Any) -> dict[str, Any]:
    layers = [
        {
            "inputs": layer.inputs, "outputs": layer.outputs, "weight": layer.weight, "bias": layer.bias,
            "activation": layer.activation, "time": layer.time, "column": layer.time_column,
        }
        for layer in plan.layers
    ]  # fmt: skip
    features = 0 if plan.features is None else plan.features.shape[1]
    keys = ("time_width", "time_weight", "time_bias", "asked", "asked_weight", "classes")
    return {"layers": layers, "features": features} | {key: getattr(plan, key) for key in keys}


def _packed(array: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
    """Little-endian numbers in base64."""
    data = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(data.tobytes()).decode("ascii")
