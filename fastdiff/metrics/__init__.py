"""How good draws are: scores of ensembles and intervals, distances of sets of rows, likeness of sets of series."""

from fastdiff.metrics.distances import Distances, distances, energy_distance, mmd, nearest_distances
from fastdiff.metrics.ensembles import coverage, crps, crps_normal, crps_sum, energy_score, quantile_crps
from fastdiff.metrics.outlines import roundness
from fastdiff.metrics.sequences import (
    Score,
    autocorrelation,
    autocorrelation_error,
    cross_correlation_error,
    discriminative_score,
    predictive_score,
)

__all__ = [
    "Distances",
    "Score",
    "autocorrelation",
    "autocorrelation_error",
    "coverage",
    "cross_correlation_error",
    "crps",
    "crps_normal",
    "crps_sum",
    "discriminative_score",
    "distances",
    "energy_distance",
    "energy_score",
    "mmd",
    "nearest_distances",
    "predictive_score",
    "quantile_crps",
    "roundness",
]
