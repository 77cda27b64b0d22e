"""Exact denoisers, and the exact law of what a sampler makes of them.

Data with a known distribution has a known best denoiser, here on every backend. With `Gaussian` in the place of a
network every sampler is an affine map of its noise, so `exact_chain` follows the mean and covariance of the samples
without drawing one: the ground truth for samplers. `Mixture` and `Empirical` have no such chain; their densities and
conditional means are exact, and a deterministic sampler ends on the rows of `Empirical`'s data.
"""

from fastdiff.exact.chain import Affine, ExactChain, convergence, exact_chain
from fastdiff.exact.empirical import Empirical
from fastdiff.exact.exact import Exact
from fastdiff.exact.gaussian import Gaussian
from fastdiff.exact.mixture import Mixture
from fastdiff.exact.moments import Moments

__all__ = ["Affine", "Empirical", "Exact", "ExactChain", "Gaussian", "Mixture", "Moments", "convergence", "exact_chain"]
