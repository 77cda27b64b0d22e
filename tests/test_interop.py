"""Folders of diffusers: what is written is read back, old names and precisions are understood, damage is named."""

import json
import logging
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.errors import ArgumentError, CheckpointError, DataError
from fastdiff.interop import CONFIG, PICKLED, WEIGHTS, options_from_diffusers

NETS = {
    "small": {"shape": (4, 4, 1), "channels": (4, 6)},
    "labels": {"shape": (6, 4, 2), "channels": (4,), "classes": 3, "head_width": 2, "outputs": 5},
    "conventions": {
        "shape": (4, 4, 1), "channels": (6, 4), "scale_shift": True, "padding": 0, "flip": False, "frequency_shift": 1,
        "attention": (True, False), "up_attention": (False, True), "middle_attention": False, "embedding": 10,
        "eps": 1e-6, "dropout": 0.1, "T": 50,
    },
}  # fmt: skip


def made(name="small", **options):
    net = fd.UNet(**{"blocks": 1, **NETS[name], **options})
    net.flat[...] = np.random.default_rng(0).normal(size=net.flat.shape)
    return net


def save_pipeline(folder, net, **scheduler):
    net.save_diffusers(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        fd.load_diffusers(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", NETS)
def test_round_trip(name, tmp_path):
    net = made(name)
    net.save_diffusers(tmp_path / "new" / "folder")
    again, schedule = fd.load_diffusers(tmp_path / "new" / "folder")
    assert schedule is None
    # diffusers has no null class: it is one class more there.
    classes = None if net.classes is None else net.classes + net.null_class
    assert again.to_dict() | {"null_class": net.null_class} == net.to_dict() | {
        "classes": classes,
        "null_class": net.null_class,
    }
    for key, view in net.params.items():
        assert_same_bits(again.params[key], view)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]


def test_tensors_have_their_names_and_shapes(tmp_path):
    made("labels").save_diffusers(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["conv_in.weight"] == (4, 2, 3, 3)
    assert shapes["conv_out.weight"] == (5, 4, 3, 3)
    assert shapes["class_embedding.weight"] == (4, 16)  # the null class is the last
    assert shapes["time_embedding.linear_1.weight"] == (16, 4)
    assert shapes["down_blocks.0.resnets.0.time_emb_proj.weight"] == (4, 16)
    assert shapes["up_blocks.0.resnets.0.conv_shortcut.weight"] == (4, 8, 1, 1)
    assert shapes["mid_block.attentions.0.to_q.weight"] == (4, 4)
    assert shapes["mid_block.attentions.0.to_out.0.bias"] == (4,)
    assert not any("qkv" in name for name in shapes)


def test_options_win(tmp_path):
    made().save_diffusers(tmp_path)
    net, _ = fd.load_diffusers(tmp_path, shape=(8, 12, 1), dtype="float64", T=20)
    assert (net.shape, net.dtype, net.T) == ((8, 12, 1), np.float64, 20)


def test_old_names_of_attention(tmp_path):
    net = made()
    net.save_diffusers(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    assert "mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, tmp_path / WEIGHTS)
    assert_same_bits(fd.load_diffusers(tmp_path)[0].params["mid_block.attentions.0.to_qkv.weight"],
                     net.params["mid_block.attentions.0.to_qkv.weight"])  # fmt: skip


def test_half_precision(tmp_path):
    net = made()
    net.save_diffusers(tmp_path)
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(halves, tmp_path / WEIGHTS)
    again, _ = fd.load_diffusers(tmp_path)
    for key, view in net.params.items():
        assert_same_bits(again.params[key], view.astype(np.float16).astype(np.float32))


BETAS = np.linspace(0.1, 0.2, 30)
SCHEDULES = {
    "defaults": ({}, lambda: fd.Schedule.linear(1000)),
    "linear": ({"beta_schedule": "linear", "num_train_timesteps": 200, "beta_end": 0.1},
               lambda: fd.Schedule.linear(200, beta_end=0.1)),
    "scaled": ({"beta_schedule": "scaled_linear", "beta_end": 0.03}, lambda: fd.Schedule.scaled_linear(beta_end=0.03)),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77}, lambda: fd.Schedule.cosine(77)),
    "sigmoid": ({"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
                lambda: fd.Schedule.sigmoid(1000, beta_start=1e-4, beta_end=0.02)),
    "trained": ({"trained_betas": BETAS.tolist()}, lambda: fd.Schedule.from_betas(BETAS)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::fastdiff.errors.ScheduleWarning")
@pytest.mark.parametrize(("config", "want"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(config, want, tmp_path):
    net, schedule = fd.load_diffusers(save_pipeline(tmp_path, made(), **config))
    assert_close(schedule.betas, want().betas, scale=0)
    assert net.T == schedule.T
    assert net.prediction == "noise"


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "noise"), ("sample", "x0"), ("v_prediction", "v")])
def test_predictions_are_kept_and_checked(theirs, ours, tmp_path):
    net, schedule = fd.load_diffusers(save_pipeline(tmp_path, made(), prediction_type=theirs))
    assert net.prediction == ours
    for prediction in ("noise", "x0", "v"):
        table = fd.samplers.ddim(schedule, 2, prediction=prediction)
        if prediction == ours:
            assert fd.sample(net, table, n=1, shape=net.shape, backend="numpy").shape == (1, *net.shape)
        else:
            with pytest.raises(ArgumentError, match="prediction"):
                fd.sample(net, table, n=1, shape=net.shape, backend="numpy")


def test_a_pipeline_without_a_scheduler(tmp_path):
    made().save_diffusers(tmp_path / "unet")
    assert fd.load_diffusers(tmp_path)[1] is None


def test_defaults_are_theirs():
    net = fd.UNet.like_diffusers({"sample_size": 32}, draw=False)
    assert net.channels == (224, 448, 672, 896)
    assert net.attention == net.up_attention == (False, True, True, True)
    assert (net.groups, net.head_width, net.blocks, net.padding, net.flip, net.eps) == (32, 8, 2, 1, True, 1e-5)
    assert net.layout.count == 274_056_163  # as theirs
    assert fd.UNet.like_diffusers({"sample_size": 8, "block_out_channels": [32, 32, 64, 64]}, seed=3).flat.any()


def test_unknown_keys_are_noted(caplog):
    with caplog.at_level(logging.WARNING, "fastdiff"):
        options_from_diffusers({"sample_size": 8, "new_option": 3, "_private": 4})
    assert [record.getMessage() for record in caplog.records] == [
        "new_option = 3 in a configuration of diffusers: unknown, left out"
    ]


# ------------------------------------------------------------------------------------------- bad input

BAD_CONFIGS = [
    {"_class_name": "UNet2DConditionModel"}, {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
    {"up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"]}, {"up_block_types": 3}, {"mid_block_type": None},
    {"time_embedding_type": "fourier"}, {"class_embed_type": "timestep"}, {"act_fn": "gelu"}, {"norm_num_groups": 3},
    {"norm_num_groups": None}, {"center_input_sample": True}, {"resnet_time_scale_shift": "ada_group"},
    {"downsample_padding": 2}, {"sample_size": 1}, {"sample_size": "big"}, {"sample_size": None}, {"sample_size": [4]},
    {"block_out_channels": [4]}, {"layers_per_block": [1, 2]}, {"in_channels": None}, {"attention_head_dim": 64},
    {"attn_norm_num_groups": 2}, {"mid_block_scale_factor": 1.5}, {"block_out_channels": [1 << 16, 1 << 16]},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()))
def test_configurations_that_we_do_not_have(change, tmp_path):
    made().save_diffusers(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    refused(tmp_path, CONFIG, ": got ", ", wants ")


def test_unknown_blocks_are_named(tmp_path):
    made().save_diffusers(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["down_block_types"] = ["DownBlock2D", "SkipDownBlock2D"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    refused(tmp_path, "down_block_types: got 'SkipDownBlock2D', wants one of 'DownBlock2D', 'AttnDownBlock2D'")


def edited(folder, change):
    made().save_diffusers(folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("mid_block.attentions.0.to_k.bias"), "a tensor 'mid_block.attentions.0.to_k.bias', which"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "no place for the tensor 'extra'"),
        (lambda t: t.update({"conv_in.bias": np.zeros(5, np.float32)}), "'conv_in.bias' has shape (5,), the"),
        (lambda t: t.update({"conv_in.bias": np.zeros(4, np.int64)}), "'conv_in.bias' is I64, wants F16, BF16"),
        (lambda t: t["conv_out.bias"].fill(np.nan), "'conv_out.bias' has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, tmp_path):
    edited(tmp_path, change)
    refused(tmp_path, WEIGHTS, words)


def test_the_first_tensor_that_does_not_fit_is_named(tmp_path):
    made().save_diffusers(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "block_out_channels": [8, 6], "norm_num_groups": 1}))
    refused(tmp_path, "'time_embedding.linear_1.weight' has shape (16, 4), the configuration wants (32, 8)")


def test_pickles_are_not_opened(tmp_path):
    made().save_diffusers(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / PICKLED)
    refused(tmp_path, "a pickle", "safe_serialization=True")


def test_damaged_files(tmp_path):
    refused(tmp_path / "nowhere", "no such file")
    made().save_diffusers(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for content in (whole[:100], whole[:-1], b"", b"pickle"):
        (tmp_path / WEIGHTS).write_bytes(content)
        refused(tmp_path, "not a whole safetensors file")
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, WEIGHTS, "no such file")
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / CONFIG).write_bytes(content)
        refused(tmp_path, CONFIG, "not JSON")
    (tmp_path / CONFIG).write_text("[1]")
    refused(tmp_path, "not a configuration of diffusers")
    (tmp_path / CONFIG).unlink()
    refused(tmp_path, CONFIG, "no such file")


@pytest.mark.parametrize(
    "scheduler",
    [
        {"beta_schedule": "exp"}, {"prediction_type": "flow"}, {"num_train_timesteps": 0}, {"beta_end": 2},
        {"trained_betas": [0.1, 2]},
    ],
)  # fmt: skip
def test_schedules_that_we_do_not_have(scheduler, tmp_path):
    refused(save_pipeline(tmp_path, made(), **scheduler), "scheduler_config.json", ": got ", ", wants ")


def test_no_size_in_the_configuration():
    with pytest.raises(ArgumentError, match=re.escape("shape: got nothing, wants (height, width, channels)")):
        fd.UNet.like_diffusers({})


def test_curves_are_not_theirs(tmp_path):
    with pytest.raises(ArgumentError, match="square kernels"):
        fd.UNet((8,), channels=(4,)).save_diffusers(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(DataError, match="cannot be written"):
        made().save_diffusers(tmp_path / "file")
    (tmp_path / "taken" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be written"):
        made().save_diffusers(tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [WEIGHTS]


# ------------------------------------------------------------------------------------------- files as people have them


def bf16(array):
    """The upper halves, as the format has them."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def as_bf16(path, tensors):
    """Write tensors as bfloat16, for which NumPy has no type."""
    save_file({name: bf16(array) for name, array in tensors.items()}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_are_taken_and_said(variant, tmp_path, caplog):
    net = fd.UNet((8, 8, 1), channels=(4,), T=10)
    net.save_diffusers(tmp_path)
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, path = load_file(whole), tmp_path / f"diffusion_pytorch_model.{variant}.safetensors"
    if variant == "fp16":
        save_file({name: array.astype(np.float16) for name, array in tensors.items()}, path)
        want = net.flat.astype(np.float16).astype(np.float32)
    else:
        as_bf16(path, tensors)
        want = (net.flat.view(np.uint32) >> 16 << 16).view(np.float32)
    whole.unlink()
    got, _ = fd.load_diffusers(tmp_path)
    assert np.array_equal(got.flat, want)
    assert f"{variant}.safetensors: there is no diffusion_pytorch_model.safetensors, taken instead" in caplog.text


def test_weights_in_several_files(tmp_path):
    net = fd.UNet((8, 8, 1), channels=(4,), T=10)
    net.save_diffusers(tmp_path)
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, names in parts.items():
        save_file({one: tensors[one] for one in names}, tmp_path / name)
    index = {"weight_map": {one: name for name, names in parts.items() for one in names}}
    place = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    place.write_text(json.dumps(index))
    assert np.array_equal(fd.load_diffusers(tmp_path)[0].flat, net.flat)
    place.write_text(json.dumps({"weight_map": {"conv_in.weight": "../a.safetensors"}}))
    refused(tmp_path, "no file of this folder")
    save_file(tensors, tmp_path / "b.safetensors")
    place.write_text(json.dumps(index))
    refused(tmp_path, "one tensor, which is there twice")


def test_averaged_weights_alone_are_taken_and_said(tmp_path, caplog):
    net = fd.UNet((8, 8, 1), channels=(4,), T=10)
    net.save_diffusers(tmp_path / "unet_ema")
    assert np.array_equal(fd.load_diffusers(tmp_path)[0].flat, net.flat)
    assert "there is no unet; unet_ema, the averaged weights, is taken" in caplog.text


def test_a_configuration_of_another_save_is_said_and_one_left_by_a_killed_save_is_taken(tmp_path, caplog):
    folder, other = tmp_path / "a", tmp_path / "b"
    net = fd.UNet((8, 8, 1), channels=(4,), T=10)
    net.save_diffusers(folder)
    text = (folder / "config.json").read_bytes()
    fd.UNet((8, 8, 1), channels=(4,), T=10, dropout=0.5).save_diffusers(other)
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    assert fd.load_diffusers(folder)[0].dropout == 0.5
    assert "config.json: changed after the weights" in caplog.text
    (folder / ".config.json.0123456789ab.tmp").write_bytes(text)
    assert fd.load_diffusers(folder)[0].dropout == 0
    net.save_diffusers(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
