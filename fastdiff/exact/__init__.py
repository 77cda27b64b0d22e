"""Exact denoisers, and the exact law of what a sampler makes of them."""

from fastdiff.exact.exact import Empirical, Exact, ExactChain, Gaussian, Mixture, Moments, convergence, exact_chain

__all__ = ["Empirical", "Exact", "ExactChain", "Gaussian", "Mixture", "Moments", "convergence", "exact_chain"]
