"""U-Nets against UNet2DModel of diffusers, with its weights: output, every gradient, and folders both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm
from tolerances import PEER_FLOOR, PEER_GRADIENT, PEER_OUTPUT

import fastdiff as fd
from fastdiff import samplers
from fastdiff.backends.layers import Batch
from fastdiff.interop import diffusers_views

NETS = {
    "digits": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32, "num_class_embeds": 10,
    },
    "cifar": {
        "sample_size": 16, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 32, "norm_eps": 1e-6,
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "scale and shift": {
        "sample_size": (8, 16), "out_channels": 6, "block_out_channels": (24, 36), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8,
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"), "resnet_time_scale_shift": "scale_shift",
    },
    "odd": {
        "sample_size": (6, 4), "in_channels": 2, "out_channels": 2, "block_out_channels": (5, 15), "norm_num_groups": 5,
        "layers_per_block": 3, "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"), "downsample_padding": 0,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 3, "time_embedding_dim": 17,
        "add_attention": False, "freq_shift": 1,
    },
}  # fmt: skip
nets = pytest.mark.parametrize("config", NETS.values(), ids=NETS)


def theirs(config):
    torch.manual_seed(0)
    net = UNet2DModel(**config)
    with torch.no_grad():
        for parameter in net.parameters():  # gains of one and biases of zero would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def batch_of(net, n=3):
    """x, t, target and labels."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, *net.image)).astype(np.float32)
    target = random.normal(size=(n, *net.image[:2], net.outputs)).astype(np.float32)
    labels = None if net.classes is None else random.integers(0, net.classes, n)
    return x, np.array([0, 999, 371]), target, labels


def relative(got, want, floor=0.0):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), floor)


def run(net, x, t, labels):
    classes = None if labels is None else torch.tensor(labels)
    return net(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), class_labels=classes).sample.permute(0, 2, 3, 1)


@nets
def test_output_and_every_gradient(config, backend, tmp_path):
    other = theirs(config)
    other.save_pretrained(tmp_path)
    net, schedule = fd.load_diffusers(tmp_path)
    assert schedule is None
    assert net.layout.count == sum(parameter.numel() for parameter in other.parameters())

    x, t, target, labels = batch_of(net)
    y = run(other, x, t, labels)
    loss = torch.nn.functional.mse_loss(y, torch.tensor(target))
    loss.backward()
    assert relative(net.predict(x, t, labels, backend=backend), y.detach().numpy()) <= PEER_OUTPUT
    grads = net.layout.zeros(np.float32)
    got = net.runner(fd.get_backend(backend)).gradient(Batch(x, t, target, labels), grads)
    assert relative(got, loss.item()) <= PEER_OUTPUT
    want = {name: parameter.grad.numpy() for name, parameter in other.named_parameters()}
    views = diffusers_views(net, grads)
    assert views.keys() == want.keys()
    floor = PEER_FLOOR * np.sqrt(sum(np.sum(np.square(gradient)) for gradient in want.values()))
    errors = {name: relative(views[name], gradient, floor) for name, gradient in want.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= PEER_GRADIENT, worst


@nets
def test_what_we_write_is_what_they_read(config, tmp_path):
    net = fd.UNet.like_diffusers(config)
    net.flat[...] = 0.1 * np.random.default_rng(0).normal(size=net.flat.shape)
    net.save_diffusers(tmp_path)
    other = UNet2DModel.from_pretrained(tmp_path)
    views = diffusers_views(net, net.flat)
    state = other.state_dict()
    assert state.keys() == views.keys()
    for name, tensor in state.items():
        assert np.array_equal(tensor.numpy(), views[name]), name
    x, t, _, labels = batch_of(net)
    got = net.predict(x, t, labels, backend="numpy")
    assert relative(got, run(other, x, t, labels).detach().numpy()) <= PEER_OUTPUT


def test_pipelines(tmp_path):
    other = theirs(NETS["scale and shift"] | {"out_channels": 3})
    scheduler = DDPMScheduler(400, beta_start=2e-4, beta_end=0.05, prediction_type="v_prediction")
    DDPMPipeline(other, scheduler).save_pretrained(tmp_path)
    net, schedule = fd.load_diffusers(tmp_path)
    np.testing.assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=1e-6)
    assert net.prediction == "v"
    assert net.T == 400
    x, t, _, _ = batch_of(net)
    assert (
        relative(net.predict(x, t % 400, backend="numpy"), run(other, x, t % 400, None).detach().numpy()) <= PEER_OUTPUT
    )


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_learned_variance(clip, backend, tmp_path, monkeypatch):
    """A folder whose network says where a step's variance lies between its bounds: loaded, and sampled as they do."""
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 2, "block_out_channels": (8,), "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    }  # fmt: skip
    options = {"clip_sample": clip is not None, "timestep_spacing": "linspace", "variance_type": "learned_range"}
    net, scheduler, steps = theirs(config), DDPMScheduler(**options), 8
    DDPMPipeline(net, scheduler).save_pretrained(tmp_path)
    ours, schedule = fd.load_diffusers(tmp_path)
    assert ours.learned_variance
    at = {
        "clip": clip,
        "prediction": ours.prediction,
        "spacing": "linspace",
    }  # ends at 0, where they add no noise either
    table = samplers.ddpm(schedule, steps, variance="learned_range", **at)

    def normals(stream, step=0):
        z = fd.normal((3, 64), seed=4, stream=stream, step=step, backend="numpy").reshape(3, 8, 8, 1)
        return torch.from_numpy(z.transpose(0, 3, 1, 2).copy())

    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    x = normals("init")
    for t in scheduler.timesteps.tolist():
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, t=t, **__: normals("step", t))
        with torch.no_grad():
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
    want = x.numpy().transpose(0, 2, 3, 1)
    assert relative(fd.sample(ours, table, n=3, seed=4, backend=backend), want) < 5 * PEER_OUTPUT
