"""fastdiff: a fast diffusion engine on NumPy, Numba and CuPy, without a deep-learning framework.

>>> import fastdiff as fd
>>> X = fd.data.harmonic_curves(2000)
>>> model = fd.Diffusion().fit(X)
>>> new = model.sample(16)
"""

from fastdiff import covariance, data, denoisers, errors, likelihood, nn, noise, samplers
from fastdiff.backends import Backend, available_backends, get_backend
from fastdiff.conditioning import condition
from fastdiff.interop import load_diffusers
from fastdiff.model import Diffusion, load
from fastdiff.nn import MLP, UNet
from fastdiff.noise import normal
from fastdiff.noise_shape import NoiseShape
from fastdiff.observations import Known, Linear, Weight
from fastdiff.process import forward_chain, forward_noise, posterior
from fastdiff.samplers import Sampler
from fastdiff.sampling import sample
from fastdiff.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Backend",
    "Diffusion",
    "Known",
    "Linear",
    "NoiseShape",
    "Sampler",
    "Schedule",
    "UNet",
    "Weight",
    "available_backends",
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
    "nn",
    "noise",
    "normal",
    "posterior",
    "sample",
    "samplers",
]
