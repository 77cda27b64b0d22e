"""The exact denoisers under their public name: see `fastdiff.exact`."""

from fastdiff.exact import Affine, Empirical, Exact, ExactChain, Gaussian, Mixture, Moments, convergence, exact_chain

__all__ = ["Affine", "Empirical", "Exact", "ExactChain", "Gaussian", "Mixture", "Moments", "convergence", "exact_chain"]
