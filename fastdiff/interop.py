"""Networks and schedulers of diffusers, read and written without torch: UNet2DModel, and scheduler_config.json."""

from __future__ import annotations

import json
import logging
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import scheduler_config, tensor_file
from fastdiff.errors import (
    ArgumentError,
    CheckpointError,
    ConversionWarning,
    all_finite,
    check_choice,
    check_int,
    shown,
)
from fastdiff.files import check_path, naming, reading, writing, writing_together
from fastdiff.nn.unet import UNet
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule
from fastdiff.tensor_file import TensorFile

__all__ = ["load_diffusers", "load_scheduler", "save_scheduler"]

log = logging.getLogger("fastdiff")

CONFIG, WEIGHTS, PICKLED = "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
INDEX = ".index.json"
# In the order in which they are taken: a variant stands between the name and its ending.
NAMED_WEIGHTS = (WEIGHTS, *(WEIGHTS.replace("model.", f"model.{variant}.") for variant in ("fp32", "fp16", "bf16")))
PAIRED = "fastdiff.config"  # in the metadata of weights: checksum of the configuration that was written with them
MOST_JSON = 1 << 24  # bytes
ATTEMPTS = 5  # to read weights and configuration of one save
SCHEDULER = "scheduler_config.json"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of layers of attention
LINEAR = ("linear_1", "linear_2", "time_emb_proj", "to_q", "to_k", "to_v", "to_out.0")
DTYPES = ("F16", "BF16", "F32", "F64")

# What a configuration that leaves a key out means.
DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 1,
    "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "num_class_embeds": None,
    "num_train_timesteps": None,
}  # fmt: skip
# What has a single value that we have.
FIXED: dict[str, Any] = {
    "center_input_sample": False, "time_embedding_type": "positional", "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1, "downsample_type": "conv", "upsample_type": "conv", "attn_norm_num_groups": None,
    "class_embed_type": None,
}  # fmt: skip


def load_diffusers(folder: str | os.PathLike[str], **options: Any) -> tuple[UNet, Schedule | None]:
    """Load a pipeline folder of diffusers, or the folder of a UNet2DModel.

    Parameters
    ----------
    folder : path
        With ``unet/`` and ``scheduler/`` in it (a DDPM or DDIM pipeline), or with config.json and
        diffusion_pytorch_model.safetensors. Where that is missing its variants fp32, fp16 and bf16 are taken, and where
        ``unet`` is, ``unet_ema``, which is logged; weights may be in several files with an index.
    **options
        Of `UNet`, before those of the file, for instance ``shape=(64, 64, 3)`` or ``dtype="float64"``.

    Returns
    -------
    net : UNet
        Its `prediction` is the scheduler's, None where there is none.
    schedule : Schedule or None
        None for a bare network.

    Raises
    ------
    CheckpointError
        A file is missing, damaged or a pickle; the network has parts that `UNet` does not have; a tensor is missing,
        unknown, or does not fit the configuration (the first one is named).

    Examples
    --------
    >>> net, schedule = fd.load_diffusers("ddpm-cifar10-32")
    >>> net.shape, schedule is None  # the folder of a bare network
    ((8, 8, 3), True)
    """
    folder = check_path("folder", folder)
    pipeline = [name for name in ("unet", "unet_ema") if (folder / name).is_dir()]
    if pipeline == ["unet", "unet_ema"]:
        log.info("%s: has unet and unet_ema, the averaged weights; unet is taken, as diffusers does", folder)
    elif pipeline == ["unet_ema"]:
        log.warning("%s: there is no unet; unet_ema, the averaged weights, is taken", folder)
    place = folder / pipeline[0] if pipeline else folder
    weights, text = _pair(place)
    config = _parsed(place / CONFIG, text)
    schedule_file = folder / "scheduler" / SCHEDULER
    schedule, prediction = None, None
    if pipeline and schedule_file.exists():
        schedule, prediction = _schedule(schedule_file)
        options.setdefault("T", schedule.T)
    try:
        net = UNet.like_diffusers(config, **options, draw=False)
    except ArgumentError as error:
        raise CheckpointError(f"{place / CONFIG}: {error}") from error
    net.prediction = prediction
    _fill(place, weights, diffusers_views(net, net.flat))
    return net, schedule


def load_scheduler(path: str | os.PathLike[str], steps: int, **options: Any) -> Sampler:
    """Read a scheduler of diffusers as a sampler of so many steps.

    Parameters
    ----------
    path : path
        A scheduler_config.json, the folder that it is in, or that of a pipeline.
    steps : int
        Number of timesteps, which diffusers is told later.
    **options
        Of the sampler, before those of the file: what diffusers is told at every step, as ``eta`` of DDIM or ``order``
        of LMS, or ``clip``, which most of its schedulers do not have.

    Returns
    -------
    Sampler
        One of `fastdiff.samplers`; its `schedule` and `prediction` are the file's.

    Raises
    ------
    CheckpointError
        The file is missing or damaged; its class, or a value that changes the mathematics, is none that fastdiff has.
    ArgumentError
        Steps or options that the sampler does not take.

    Warns
    -----
    ConversionWarning
        For each key that asks for something a table does otherwise.

    Examples
    --------
    >>> from fastdiff.interop import load_scheduler, save_scheduler
    >>> table = fd.samplers.ddim(fd.Schedule.linear(1000), 20)
    >>> save_scheduler(table, "scheduler")
    >>> load_scheduler("scheduler", 20) == table
    True
    """
    path = check_path("path", path)
    for inner in ("scheduler", SCHEDULER):
        path = path / inner if path.is_dir() and (path / inner).exists() else path
    schedule, prediction = _schedule(path)
    steps = check_int("steps", steps, low=1, high=schedule.T)
    try:
        sampler, notes = scheduler_config.table(_read_json(path), schedule, prediction, steps, options)
    except ArgumentError as error:
        if error.argument in ("steps", *options):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    for note in notes:
        warnings.warn(f"{path}: {note}", ConversionWarning, stacklevel=2)
    return sampler


def save_scheduler(sampler: Sampler, folder: str | os.PathLike[str]) -> None:
    """Write the scheduler of diffusers that a sampler comes from: scheduler_config.json in a folder.

    Parameters
    ----------
    sampler : Sampler
        One of `fastdiff.samplers`, with the options that diffusers has too. Its number of steps is not written:
        diffusers is told it later, as it is ``eta`` of DDIM and ``order`` of LMS, which must be 0 and 4 here.
    folder : path
        Made if it is not there.

    Raises
    ------
    ArgumentError
        If no scheduler of diffusers stands for this table.
    DataError
        If it cannot be written.

    Warns
    -----
    ConversionWarning
        For what diffusers does otherwise.

    Examples
    --------
    >>> from fastdiff.interop import save_scheduler
    >>> save_scheduler(fd.samplers.dpmpp_2m(fd.Schedule.linear(1000), 20), "scheduler")
    >>> from pathlib import Path
    >>> import json
    >>> json.loads(Path("scheduler/scheduler_config.json").read_text())["_class_name"]
    'DPMSolverMultistepScheduler'
    """
    text = json.dumps(scheduler_config.config_of(sampler), indent=2)
    folder = check_path("folder", folder)
    with naming(folder, "cannot be written"):
        os.makedirs(folder, exist_ok=True)
    with writing(folder / SCHEDULER) as file:
        file.write(text.encode())


def save_diffusers(net: UNet, folder: str | os.PathLike[str]) -> None:
    """Write what `UNet.save_diffusers` says."""
    text = json.dumps(_config_for_diffusers(net), indent=2).encode()
    tensors = {name: np.ascontiguousarray(view) for name, view in diffusers_views(net, net.flat).items()}
    folder = check_path("folder", folder)
    with naming(folder, "cannot be written"):
        os.makedirs(folder, exist_ok=True)
    with writing_together([folder / WEIGHTS, folder / CONFIG]) as (weights, config):
        tensor_file.write(weights, tensors, {"format": "pt", PAIRED: _checksum(text)})
        config.write(text)


def _checksum(text: bytes) -> str:
    return f"crc32:{zlib.crc32(text):08x}"


def diffusers_views(net: UNet, flat: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return views into a flat buffer of the network under the names, and in the shapes, of diffusers."""
    views = {}
    for name, view in net.layout.views(flat).items():
        layer, _, part = name.rpartition(".")
        if layer.endswith("to_qkv"):
            for letter, third in zip("qkv", np.split(view, 3, axis=-1), strict=True):
                views[f"{layer.removesuffix('qkv')}{letter}.{part}"] = third
        else:
            views[name] = view
    for name, view in views.items():
        if view.ndim == 4:
            views[name] = view[0, 0].T if name.rpartition(".")[0].endswith(LINEAR) else view.transpose(3, 2, 0, 1)
    return views


def options_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `UNet` that make the network of a UNet2DModel's configuration.

    Raises
    ------
    ArgumentError
        A block or an option that `UNet` does not have, or one that makes no sense.
    """
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise ArgumentError("config", shown(config), "a mapping of names to values")
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ArgumentError(
            "_class_name", shown(kind), "'UNet2DModel', the only network of diffusers that fastdiff has"
        )
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in sorted(given.keys() - DEFAULTS.keys() - FIXED.keys()):
        log.warning("%s = %r in a configuration of diffusers: unknown, left out", name, given[name])
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise ArgumentError(name, shown(given[name]), f"{value!r}: fastdiff does not have the other")
    c = {**DEFAULTS, **given}
    check_choice("act_fn", c["act_fn"], ["silu", "swish"])
    mode = check_choice("resnet_time_scale_shift", c["resnet_time_scale_shift"], ["default", "scale_shift"])
    down = _attends("down_block_types", c["down_block_types"], "DownBlock2D", "AttnDownBlock2D")
    up = _attends("up_block_types", c["up_block_types"], "UpBlock2D", "AttnUpBlock2D")
    check_int("norm_num_groups", c["norm_num_groups"], low=1)
    channels = check_int("in_channels", c["in_channels"], low=1)
    options = {
        "channels": c["block_out_channels"], "blocks": c["layers_per_block"], "attention": down,
        "up_attention": up[::-1], "middle_attention": c["add_attention"], "classes": c["num_class_embeds"],
        "null_class": False,
        "T": 1000 if c["num_train_timesteps"] is None else c["num_train_timesteps"],
        "head_width": c["attention_head_dim"], "groups": c["norm_num_groups"], "dropout": c["dropout"],
        "scale_shift": mode == "scale_shift", "outputs": c["out_channels"], "embedding": c["time_embedding_dim"],
        "padding": c["downsample_padding"], "flip": c["flip_sin_to_cos"], "frequency_shift": c["freq_shift"],
        "eps": c["norm_eps"],
    }  # fmt: skip
    if c["sample_size"] is not None:
        size = c["sample_size"] if isinstance(c["sample_size"], (list, tuple)) else [c["sample_size"]] * 2
        if len(size) != 2:
            raise ArgumentError("sample_size", shown(size), "one size, or height and width")
        options["shape"] = (*size, channels)
    return options


def _attends(argument: str, blocks: Any, plain: str, attending: str) -> tuple[bool, ...]:
    if not isinstance(blocks, (list, tuple)):
        raise ArgumentError(argument, shown(blocks), f"a list of {plain} and {attending}")
    names = [str(block).removeprefix("UNetRes") for block in blocks]
    return tuple(check_choice(argument, name, [plain, attending]) == attending for name in names)


def _config_for_diffusers(net: UNet) -> dict[str, Any]:
    height, width, channels = net.image
    if net.flat_images:
        raise ArgumentError("net", f"images of shape {net.shape}", "a height above 1: UNet2DModel has square kernels")
    if net.covariates is not None:
        raise ArgumentError("net", f"{net.covariates} covariates", "none: UNet2DModel has labels alone")
    classes = None if net.classes is None else net.classes + net.null_class  # the null class is one more there
    config = {
        "_class_name": "UNet2DModel", "_diffusers_version": "0.35.0", **FIXED,
        "sample_size": height if height == width else [height, width],
        "in_channels": channels, "out_channels": net.outputs, "block_out_channels": list(net.channels),
        "layers_per_block": net.blocks, "num_train_timesteps": net.T, "num_class_embeds": classes,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in net.attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in net.up_attention[::-1]],
        "add_attention": net.middle_attention, "attention_head_dim": net.head_width, "norm_num_groups": net.groups,
        "norm_eps": net.eps, "dropout": net.dropout, "downsample_padding": net.padding, "flip_sin_to_cos": net.flip,
        "freq_shift": net.frequency_shift, "act_fn": "silu",
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
    }  # fmt: skip
    if net.embedding != 4 * net.channels[0]:  # a key that older versions do not know
        config["time_embedding_dim"] = net.embedding
    return config


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed(path, _read_text(path))


def _read_text(path: Path) -> bytes:
    try:
        with reading(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_JSON:
                raise CheckpointError(f"{path}: more than {MOST_JSON} bytes, which no configuration has")
            return file.read()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a configuration of diffusers")
    return content


def _pair(place: Path) -> tuple[list[TensorFile], bytes]:
    """Weights and the configuration that was written with them, where they are ours.

    A save in between is waited for. A process that is killed between the renames of both leaves the configuration
    under its temporary name.
    """
    path = place / CONFIG
    if path.exists() or not any(place.glob(f".{CONFIG}.*.tmp")):
        _read_json(path)  # whatever is wrong with it is said first
    for _ in range(ATTEMPTS):
        weights = _weights(place)
        checksum = weights[0].metadata.get(PAIRED)
        text = _read_text(path) if path.exists() or checksum is None else None
        if checksum is None or (text is not None and checksum == _checksum(text)):
            assert text is not None
            return weights, text
        for other in sorted(place.glob(f".{CONFIG}.*.tmp")):
            with suppress(CheckpointError):
                if _checksum(left := _read_text(other)) == checksum:
                    return weights, left
        sleep(0.01)
    text = _read_text(path)
    log.warning("%s: changed after the weights beside it were written, or of another network", path)
    return weights, text


def _schedule(path: Path) -> tuple[Schedule, str]:
    """Schedule and prediction of a scheduler's configuration."""
    try:
        return scheduler_config.schedule_of(_read_json(path))
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weights(place: Path) -> list[TensorFile]:
    """The files of weights of a folder: one, or as many as an index names."""
    tried: list[Path] = []
    for name in NAMED_WEIGHTS:
        for path in (place / name, place / f"{name}{INDEX}"):
            if not path.exists():
                tried.append(path)
                continue
            if name != WEIGHTS:
                log.warning("%s: there is no %s, taken instead", path, WEIGHTS)
            if path.name == name:
                return [tensor_file.read(path)]
            return [tensor_file.read(place / part) for part in _shards(path)]
    advice = "there is no such file"
    if (place / PICKLED).exists():
        advice = (
            f"there is only {PICKLED}, a pickle, which may run anything when it is read and which fastdiff does "
            "not open; diffusers' save_pretrained(folder, safe_serialization=True) writes it anew"
        )
    raise CheckpointError(f"{tried[0]}: {advice}")


def _shards(path: Path) -> list[str]:
    """The names of the files that an index has, in order."""
    places = _read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path}: no weight_map of tensors to files")
    names = sorted(set(places.values()))
    if bad := [name for name in names if os.path.basename(name) != name or "\0" in name]:
        raise CheckpointError(f"{path}: {bad[0]!r} is no file of this folder")
    return names


def _fill(place: Path, files: Sequence[TensorFile], views: Mapping[str, npt.NDArray[Any]]) -> None:
    """Fill the views with the tensors of files, all of which must be there and fit."""
    path = place / WEIGHTS
    stored: dict[str, tuple[TensorFile, str]] = {}
    for file in files:
        for name in file.tensors:
            if (new := _new_name(name)) in stored:
                raise CheckpointError(f"{path}: {name!r} and {stored[new][1]!r} are one tensor, which is there twice")
            stored[new] = file, name
    for name, view in views.items():
        if name not in stored:
            raise CheckpointError(f"{path}: the configuration wants a tensor {name!r}, which is not there")
        one = stored[name][0].tensors[stored[name][1]]
        if one.shape != view.shape:
            raise CheckpointError(f"{path}: {name!r} has shape {one.shape}, the configuration wants {view.shape}")
        if one.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name!r} is {one.dtype}, wants {', '.join(DTYPES)}")
    for name in stored:
        if name not in views:
            raise CheckpointError(f"{path}: the configuration has no place for the tensor {name!r}")
    for name, view in views.items():
        file, old = stored[name]
        with np.errstate(over="ignore"):
            view[...] = file.array(old)
        if not all_finite(view):
            raise CheckpointError(f"{path}: {name!r} has values that are not finite in {view.dtype}")


def _new_name(name: str) -> str:
    """The name that a tensor of an old file has today."""
    layer, _, part = name.rpartition(".")
    block, _, last = layer.rpartition(".")
    return f"{block}.{OLD_NAMES[last]}.{part}" if ".attentions." in name and last in OLD_NAMES else name
