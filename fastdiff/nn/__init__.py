"""Networks with hand-written backward passes, and what makes one: see `fastdiff.nn.network`."""

from fastdiff.backends.layers import Conv
from fastdiff.nn.denoiser import NetworkDenoiser
from fastdiff.nn.layers import Program, Value
from fastdiff.nn.mlp import MLP, sinusoidal_features
from fastdiff.nn.network import Network, ProgramNetwork, network_of, register
from fastdiff.nn.runner import Runner
from fastdiff.nn.unet import UNet

__all__ = [
    "MLP",
    "Conv",
    "Network",
    "NetworkDenoiser",
    "Program",
    "ProgramNetwork",
    "Runner",
    "UNet",
    "Value",
    "network_of",
    "register",
    "sinusoidal_features",
]
