"""The U-Net of diffusers in OpenVINO: its graph is taken from PyTorch once, and compiled for one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import peer_nets
from peer_nets import torch


def forward_side(
    workload: Any, inputs: Any, folder: Path, threads: int, halves: bool
) -> tuple[dict[str, Any], list[Callable[[], Any]]]:
    """Return the example's output, and what computes the whole batch's."""
    net = peer_nets.Pictures(folder / "unet").train(False)

    def compiled(x: Any, t: Any) -> Callable[[], Any]:
        given = peer_nets.nchw(x).contiguous(), peer_nets.tensor(t)
        with torch.no_grad():
            graph = ov.convert_model(net, example_input=given, input=[tuple(each.shape) for each in given])
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if halves else "f32", "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        request = ov.compile_model(graph, "CPU", options).create_infer_request()
        arrays = [each.numpy() for each in given]
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)[0]

    small, large = ([given[name] for name in ("x", "t")] for given in (inputs, workload.inputs()))
    return {"output": np.ascontiguousarray(compiled(*small)().transpose(0, 2, 3, 1))}, [compiled(*large)]
