"""What is chosen where the caller does not say: network, schedule, and how long to train.

The rules for curves were measured on real data sets of 30 to 1,500 rows and 4 to 600 values (`make quality`):

- Beside a Gaussian base a perceptron of 128 units corrects what few rows tell, and one of 256 what many do: more units
  learn rows by heart.
- Without a base it carries x_t through its hidden layers, noise and all, so these are 3.5 times as wide as a curve is
  long. A narrower one loses noise that it should predict, and its samples stay rough.
- What can be learned without learning rows by heart grows with the number of values, N d: 30 sqrt(N d) steps of 256
  rows were near the best of every set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastdiff.errors import ArgumentError, check_choice, shown
from fastdiff.nn.mlp import MLP
from fastdiff.nn.network import Network
from fastdiff.nn.unet import UNet
from fastdiff.noise import TARGETS
from fastdiff.noise_shape import NoiseShape
from fastdiff.schedule import PREDICTIONS, Schedule

log = logging.getLogger("fastdiff")

WIDTH, WIDTH_OF_MANY, MANY_ROWS = 128, 256, 4000  # beside a base
WIDTH_PER_POINT, WIDEST, WIDTH_STEP = 3.5, 1024, 32  # without one
BASE_T, BASE_STEPS = 200, 50
STEPS_PER_ROOT, FEWEST_STEPS, MOST_STEPS = 30, 500, 12_000
MOST_WORK = 6e12  # operations of a training: less than a minute on two cores
PICTURE_STEPS, PICTURE_T = 3000, 200

WATCHED_ROWS = 4096  # more are not learned by heart in so few steps

JUDGED_STEPS = 1000  # a fit of so many ends with a judgement
HELD_OUT, HELD_OUT_FROM = 0.05, 100  # share of the rows, where there are so many
MOST_HELD_OUT, MOST_HELD_OUT_PICTURES = 1024, 256  # more would cost time at every look and tell little


def checked_parts(
    net: Network | None,
    schedule: Schedule | None,
    prediction: str | None,
    conditional: str | None,
    noise_shape: NoiseShape | None,
) -> tuple[Schedule | None, str, str | None]:
    """Return schedule, prediction and conditional of a model as they are used, after refusing parts that do not fit."""
    if net is not None and not isinstance(net, Network):
        wants = "a fastdiff.MLP, a fastdiff.UNet, or another fastdiff.nn.Network"
        raise ArgumentError("net", type(net).__name__, wants)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")
    if net is not None and schedule is None:
        schedule = usual_schedule(net.T)
    if noise_shape is not None and not isinstance(noise_shape, NoiseShape):
        raise ArgumentError("noise_shape", type(noise_shape).__name__, "a fastdiff.NoiseShape, or None: white")
    if net is not None and schedule is not None:
        _check_parts(net, schedule, noise_shape)
    if prediction is None:
        usual = "velocity" if schedule is not None and schedule.kind == "flow" else "v"
        prediction = (None if net is None else net.prediction) or usual
    if net is not None and net.prediction not in (None, prediction):
        raise ArgumentError("prediction", shown(prediction), f"{net.prediction!r}, as the network was trained")
    prediction = check_choice("prediction", prediction, PREDICTIONS)
    if schedule is not None:
        schedule.target(prediction)  # one that ends in noise alone refuses its prediction
    if conditional is None and net is not None and net.masked:
        conditional = TARGETS[0]
    conditional = None if conditional is None else check_choice("conditional", conditional, TARGETS)
    if conditional is not None and net is not None and (not net.masked or net.learned_variance):
        what = "a learned variance" if net.masked else "none that is told of a mask"
        raise ArgumentError("net", what, "one made with masked=True, without learned variance, or None")
    if conditional is not None and noise_shape is not None:
        raise ArgumentError("noise_shape", shown(noise_shape), "None with a network that is told of a mask")
    return schedule, prediction, conditional


def _check_parts(net: Network, schedule: Schedule, noise_shape: NoiseShape | None) -> None:
    """Refuse a network, a schedule and a shape of the noise that do not fit each other."""
    if net.T != schedule.T:
        raise ArgumentError("schedule", f"T = {schedule.T}", f"T = {net.T}, as the network has")
    if noise_shape is not None and net.shape != (noise_shape.d,):
        alone = len(net.shape) == 1
        wants = f"one of {net.shape[0]} values, as the network has" if alone else "None for series and pictures"
        raise ArgumentError("noise_shape", shown(noise_shape), wants)
    if net.outputs != net.image[2] and not net.learned_variance:
        wants = f"{net.image[2]}, as many as there are channels, or twice as many for a learned variance"
        raise ArgumentError("net", f"{net.outputs} outputs", wants)
    if net.learned_variance and noise_shape is not None:
        raise ArgumentError("noise_shape", shown(noise_shape), "None: this network learns the variance of white noise")


def curve_net(
    rows: int,
    shape: tuple[int, ...],
    *,
    T: int,
    seed: int,
    base: bool,
    **asked: Any,
) -> MLP:
    """Return a perceptron that suits so many curves (points,) or series (points, channels), and log what was chosen.

    `asked` are arguments of `MLP`: classes, covariates, and so on.
    """
    points = math.prod(shape)
    width = WIDTH if rows < MANY_ROWS else WIDTH_OF_MANY
    if not base:
        width = min(WIDEST, max(WIDTH, WIDTH_STEP * math.ceil(WIDTH_PER_POINT * points / WIDTH_STEP)))
    sizes = points if len(shape) == 1 else (shape[0], shape[1])
    net = MLP(sizes, hidden=(width,) * 3, T=T, seed=seed, **asked)
    what = f"curves of {points} points" if len(shape) == 1 else f"series of {shape[0]} points in {shape[1]} channels"
    log.info("chosen for %s: %r, %d parameters", what, net, net.layout.count)
    return net


def network_kind(ndim: int) -> type[Network]:
    """Return which kind of network suits data of so many dimensions, that of the rows included."""
    return MLP if ndim < 4 else UNet


def network_and_schedule(
    net: Network | None,
    levels: Schedule | None,
    data: tuple[int, ...],
    asked: Mapping[str, Any],
    *,
    base: bool,
    seed: int,
) -> tuple[Network, Schedule]:
    """Return what was given, and for what was not what suits data of a shape (N, ...).

    `asked` are arguments of networks: classes, covariates, and so on.
    """
    if levels is None:
        levels = usual_schedule(PICTURE_T) if len(data) > 3 else curve_schedule(base=base)
        if len(data) > 3:
            log.info("chosen for the pictures: %r", levels)
    if net is None:
        at: dict[str, Any] = {"T": levels.T, "seed": seed, **asked}
        net = picture_net((*data[1:],), **at) if len(data) > 3 else curve_net(data[0], data[1:], base=base, **at)
    return net, levels


def picture_net(
    shape: tuple[int, ...],
    *,
    T: int = PICTURE_T,
    seed: int = 0,
    channels: Iterable[int] | None = None,
    dropout: float = 0.0,
    learned_variance: bool = False,
    **asked: Any,
) -> UNet:
    """Return a U-Net that suits small pictures, and log what was chosen: see `UNet`, which takes `asked` as well.

    By default the pictures are halved as long as 4 pixels are left on a side, at most three times.
    """
    outputs = 2 * shape[-1] if learned_variance else None
    side = shape[1] if shape[0] == 1 else min(shape[:2])  # a height of 1 is not halved
    if channels is None:
        channels = (32, 64, 128, 128)[: min(4, max(1, side.bit_length() - 2))]
    net = UNet(shape, channels=channels, blocks=1, T=T, seed=seed, dropout=dropout, outputs=outputs, **asked)
    log.info("chosen for the pictures: %r, %d parameters", net, net.layout.count)
    return net


def usual_schedule(T: int = 100) -> Schedule:
    """Return the schedule used where none is given: the source text's for T = 100, else cosine."""
    return Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1) if T == 100 else Schedule.cosine(T)


def curve_schedule(*, base: bool) -> Schedule:
    """Return the schedule for a network that is chosen for curves.

    With a base it is the source text's in twice as many steps. Of the variance of smooth curves most is in a few
    directions, 20 to 100 times that of white noise, and of those the source text's last state, whose signal is 0.07,
    keeps a third: started from white noise, samples of such a Gaussian lack a third of the variance there (by
    `exact_chain`), and now 0.1 %.
    """
    return Schedule.sigmoid(BASE_T, beta_start=1e-5, beta_end=0.1) if base else usual_schedule()


def curve_sampler(schedule: Schedule, *, base: bool) -> tuple[str, int | None]:
    """Return name and steps of the sampler that "auto" stands for.

    For a base it is the one whose samples of a Gaussian are nearest to it, again by `exact_chain`.
    """
    return ("dpmpp_2m", min(BASE_STEPS, schedule.T - 1)) if base and schedule.T > 1 else ("ddpm", None)


def curve_steps(rows: int, points: int, batch: int, parameters: int, rank: int = 0) -> int:
    """Return how many training steps suit so many curves.

    Each costs about 6 operations a row and parameter, and 4 a point and direction of a base.
    """
    wanted = STEPS_PER_ROOT * math.sqrt(rows * points)
    affordable = MOST_WORK / (batch * (6 * parameters + 4 * points * rank))
    return 100 * round(max(FEWEST_STEPS, min(wanted, affordable, MOST_STEPS)) / 100)


def held_out_share(rows: int, most: int) -> float:
    """Return which share of so many rows is held out."""
    return 0.0 if rows < HELD_OUT_FROM else min(HELD_OUT, most / rows)
