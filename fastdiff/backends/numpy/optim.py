"""The reference formula of AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.protocol import AdamW, TrainState

Array = npt.NDArray[Any]


class OptimOperations:
    """The step of the optimiser."""

    def adamw(self, state: TrainState, options: AdamW) -> float:
        (params, grads, m, v, average), o = state, options
        norm = float(np.sqrt(np.sum(np.square(grads, dtype=np.float64))))
        if not np.isfinite(norm):
            return norm
        real = params.dtype.type
        g = grads * real(min(1.0, o.clip_norm / (norm + 1e-6)))
        m += real(1 - o.beta1) * (g - m)
        v += real(1 - o.beta2) * (g * g - v)
        denominator = np.sqrt(v) * real(o.correction2**-0.5) + real(o.eps)
        params *= real(1 - o.rate * o.decay)
        params -= real(o.rate / o.correction1) * (m / denominator)
        average += real(1 - o.ema) * (params - average)
        return norm
