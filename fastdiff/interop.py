"""Networks and schedulers of diffusers, read and written without torch: UNet2DModel, and scheduler_config.json."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import scheduler_config
from fastdiff.errors import ArgumentError, CheckpointError, ConversionWarning, check_choice, check_int
from fastdiff.files import naming, writing
from fastdiff.nn.unet import UNet
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule

log = logging.getLogger("fastdiff")

CONFIG, WEIGHTS, PICKLED = "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
SCHEDULER = "scheduler_config.json"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of layers of attention
LINEAR = ("linear_1", "linear_2", "time_emb_proj", "to_q", "to_k", "to_v", "to_out.0")
DTYPES = ("F16", "F32", "F64")

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
        diffusion_pytorch_model.safetensors.
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
    """
    folder = Path(folder)
    pipeline = (folder / "unet").is_dir()
    place = folder / "unet" if pipeline else folder
    config = _read_json(place / CONFIG)
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
    _read_weights(place, diffusers_views(net, net.flat))
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
    """
    path = Path(path)
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
    CheckpointError
        If it cannot be written.

    Warns
    -----
    ConversionWarning
        For what diffusers does otherwise.
    """
    text = json.dumps(scheduler_config.config_of(sampler), indent=2)
    with naming(folder, "cannot be written"):
        os.makedirs(folder, exist_ok=True)
    with writing(Path(folder) / SCHEDULER) as file:
        file.write(text.encode())


def save_diffusers(net: UNet, folder: str | os.PathLike[str]) -> None:
    """Write what `UNet.save_diffusers` says."""
    from safetensors.numpy import save

    text = json.dumps(_config_for_diffusers(net), indent=2)
    tensors = {name: np.ascontiguousarray(view) for name, view in diffusers_views(net, net.flat).items()}
    content = save(tensors, metadata={"format": "pt"})
    with naming(folder, "cannot be written"):
        os.makedirs(folder, exist_ok=True)
    # Both are on the disk before either appears.
    with writing(Path(folder) / CONFIG) as config, writing(Path(folder) / WEIGHTS) as weights:
        config.write(text.encode())
        weights.write(content)


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
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ArgumentError("_class_name", repr(kind), "'UNet2DModel', the only network of diffusers that fastdiff has")
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in sorted(given.keys() - DEFAULTS.keys() - FIXED.keys()):
        log.warning("%s = %r in a configuration of diffusers: unknown, left out", name, given[name])
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise ArgumentError(name, repr(given[name]), f"{value!r}: fastdiff does not have the other")
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
        "T": 1000 if c["num_train_timesteps"] is None else c["num_train_timesteps"],
        "head_width": c["attention_head_dim"], "groups": c["norm_num_groups"], "dropout": c["dropout"],
        "scale_shift": mode == "scale_shift", "outputs": c["out_channels"], "embedding": c["time_embedding_dim"],
        "padding": c["downsample_padding"], "flip": c["flip_sin_to_cos"], "frequency_shift": c["freq_shift"],
        "eps": c["norm_eps"],
    }  # fmt: skip
    if c["sample_size"] is not None:
        size = c["sample_size"] if isinstance(c["sample_size"], (list, tuple)) else [c["sample_size"]] * 2
        options["shape"] = (*size, channels)
    return options


def _attends(argument: str, blocks: Any, plain: str, attending: str) -> tuple[bool, ...]:
    if not isinstance(blocks, (list, tuple)):
        raise ArgumentError(argument, repr(blocks), f"a list of {plain} and {attending}")
    names = [str(block).removeprefix("UNetRes") for block in blocks]
    return tuple(check_choice(argument, name, [plain, attending]) == attending for name in names)


def _config_for_diffusers(net: UNet) -> dict[str, Any]:
    height, width, channels = net.image
    if net.flat_images:
        raise ArgumentError("net", f"images of shape {net.shape}", "a height above 1: UNet2DModel has square kernels")
    config = {
        "_class_name": "UNet2DModel", "_diffusers_version": "0.35.0", **FIXED,
        "sample_size": height if height == width else [height, width],
        "in_channels": channels, "out_channels": net.outputs, "block_out_channels": list(net.channels),
        "layers_per_block": net.blocks, "num_train_timesteps": net.T, "num_class_embeds": net.classes,
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
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a configuration of diffusers")
    return content


def _schedule(path: Path) -> tuple[Schedule, str]:
    """Schedule and prediction of a scheduler's configuration."""
    try:
        return scheduler_config.schedule_of(_read_json(path))
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_weights(place: Path, views: Mapping[str, npt.NDArray[Any]]) -> None:
    """Fill the views with the tensors of a file, all of which must be there and fit."""
    from safetensors import SafetensorError, safe_open

    path = place / WEIGHTS
    if not path.exists():
        advice = "there is no such file"
        if (place / PICKLED).exists():
            advice = (
                f"there is only {PICKLED}, a pickle, which may run anything when it is read and which fastdiff does "
                "not open; diffusers' save_pretrained(folder, safe_serialization=True) writes it anew"
            )
        raise CheckpointError(f"{path}: {advice}")
    try:
        with safe_open(path, framework="np") as file:
            stored = {_new_name(name): name for name in file.keys()}  # noqa: SIM118 - not a mapping
            for name, view in views.items():
                if name not in stored:
                    raise CheckpointError(f"{path}: the configuration wants a tensor {name!r}, which is not there")
                part = file.get_slice(stored[name])
                if tuple(part.get_shape()) != view.shape:
                    raise CheckpointError(
                        f"{path}: {name!r} has shape {tuple(part.get_shape())}, the configuration wants {view.shape}"
                    )
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{path}: {name!r} is {part.get_dtype()}, wants {', '.join(DTYPES)}")
            for name in stored:
                if name not in views:
                    raise CheckpointError(f"{path}: the configuration has no place for the tensor {name!r}")
            for name, view in views.items():
                view[...] = tensor = file.get_tensor(stored[name])
                if not np.isfinite(tensor).all():
                    raise CheckpointError(f"{path}: {name!r} has values that are not finite")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def _new_name(name: str) -> str:
    """The name that a tensor of an old file has today."""
    layer, _, part = name.rpartition(".")
    block, _, last = layer.rpartition(".")
    return f"{block}.{OLD_NAMES[last]}.{part}" if ".attentions." in name and last in OLD_NAMES else name
