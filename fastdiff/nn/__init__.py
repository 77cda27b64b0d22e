"""Networks with hand-written backward passes."""

from fastdiff.nn.mlp import MLP
from fastdiff.nn.unet import UNet

__all__ = ["MLP", "UNet"]
