"""fastdiff: a fast diffusion engine on NumPy, Numba and CuPy, without a deep-learning framework.

>>> import fastdiff as fd
>>> X = fd.data.harmonic_curves(2000)
>>> model = fd.Diffusion().fit(X)
>>> new = model.sample(16)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdiff import callbacks, covariance, errors, likelihood, nn, noise, samplers
from fastdiff.backends import Backend, available_backends, get_backend
from fastdiff.conditioning import condition
from fastdiff.guidance import Guided, product
from fastdiff.model import Diffusion, load
from fastdiff.nn import MLP, UNet
from fastdiff.noise import normal
from fastdiff.noise_shape import NoiseShape
from fastdiff.observations import Known, Linear, Weight
from fastdiff.process import forward_chain, forward_noise, posterior
from fastdiff.samplers import Sampler
from fastdiff.sampling import sample
from fastdiff.schedule import Schedule

if TYPE_CHECKING:
    from fastdiff import data, denoisers, metrics, scale
    from fastdiff.interop import load_diffusers

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Backend",
    "Diffusion",
    "Guided",
    "Known",
    "Linear",
    "NoiseShape",
    "Sampler",
    "Schedule",
    "UNet",
    "Weight",
    "available_backends",
    "callbacks",
    "condition",
    "covariance",
    "data",
    "denoisers",
    "errors",
    "forward_chain",
    "forward_noise",
    "get_backend",
    "likelihood",
    "load",
    "load_diffusers",
    "metrics",
    "nn",
    "noise",
    "normal",
    "posterior",
    "product",
    "sample",
    "samplers",
    "scale",
]

_LATER = {
    "data": "fastdiff.data",
    "denoisers": "fastdiff.denoisers",
    "load_diffusers": "fastdiff.interop",
    "metrics": "fastdiff.metrics",
    "scale": "fastdiff.scale",
}


def __getattr__(name: str) -> Any:
    """Import on first use what a script that loads a model and samples does without."""
    if name not in _LATER:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return getattr(module, name, module)
