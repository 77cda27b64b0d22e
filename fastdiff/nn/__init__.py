"""Networks with hand-written backward passes."""

from fastdiff.nn.mlp import MLP

__all__ = ["MLP"]
