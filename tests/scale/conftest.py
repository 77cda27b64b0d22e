"""Models that are small, and clusters that are real."""

import numpy as np
import pytest

import fastdiff as fd


@pytest.fixture(scope="session")
def curves():
    return fd.data.harmonic_curves(200, points=12)


@pytest.fixture(scope="session")
def model(curves):
    net = fd.MLP(12, hidden=(32, 32), T=20)
    return fd.Diffusion(net, backend="cpu").fit(curves, steps=20, progress=False)


@pytest.fixture(scope="session")
def asked(curves):
    """A model that is asked for classes and numbers."""
    labels = np.arange(len(curves)) % 3
    fit = {"covariates": curves[:, :2], "steps": 20, "progress": False}
    net = fd.MLP(12, hidden=(32, 32), T=20, classes=3, covariates=2)
    return fd.Diffusion(net, backend="cpu").fit(curves, labels, **fit)
