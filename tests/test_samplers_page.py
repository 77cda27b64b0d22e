"""The numbers of docs/samplers.md: exact distances are computed again, to the digits that are given."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastdiff import covariance, samplers
from fastdiff.data import harmonic_curves
from fastdiff.denoisers import Gaussian, exact_chain
from fastdiff.schedule import Schedule

PAGE = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text(encoding="utf-8")
SCHEDULES = {"linear": Schedule.linear(1000), "cosine": Schedule.cosine(1000)}
SPACINGS = {"even": "linspace_open", "exponential": "exponential", "Karras": "karras"}


@pytest.fixture(scope="module")
def distance():
    curves = harmonic_curves(20_000)
    family = covariance.empirical((curves - curves.mean()) / curves.std())
    laws = {"curves": (family.mean, family.cov), "stiff": (np.zeros(24), np.diag(np.logspace(-4, 2, 24)))}

    def of(law, table):
        mean, cov = laws[law]
        return exact_chain(Gaussian(mean, cov, table.schedule), table).w2() / np.sqrt(np.trace(cov))

    return of


def rows(first):
    """The cells of the table whose first heading this is, without marks."""
    lines = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].replace("*", "").replace("`", "").splitlines()
    heads, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return heads, body


def assert_digits(found, said):
    assert found == pytest.approx(float(said), abs=0.501 * 10.0 ** -len(said.partition(".")[2]))


def test_where_the_steps_go(distance):
    (_, *heads), body = rows("evaluations | curves: even")
    assert len(body) == 4
    for steps, *cells in body:
        for k, (head, said) in enumerate(zip(heads, cells, strict=True)):
            law = ("curves", "stiff")[k // 3]
            spacing = SPACINGS[head.split(": ")[-1]]
            assert_digits(distance(law, samplers.unipc(SCHEDULES["linear"], int(steps), spacing=spacing)), said)


def test_the_loudest_level(distance):
    (_, *heads), body = rows("loudest level")
    assert len(body) == 5
    for level, *cells in body:
        loudest = np.inf if level == "the last" else float(level.split()[0])
        for head, said in zip(heads, cells, strict=True):
            name, count = re.match(r"(\w+) (\d+)", head).groups()
            steps = (int(count) + 1) // 2 if name == "heun" else int(count)
            spacing = "exponential" if "exponential" in head else "karras"
            t = SCHEDULES["cosine"].timesteps(steps, spacing=spacing, sigma_max=loudest)
            assert_digits(distance("curves", getattr(samplers, name)(SCHEDULES["cosine"], len(t), spacing=t)), said)


def test_pndm_beside_unipc(distance):
    ours, theirs = re.search(r"(\.\d+) against (\.\d+) on the curves at 10 rows", PAGE).groups()
    assert_digits(distance("curves", samplers.pndm(SCHEDULES["linear"], 10)), ours)
    assert_digits(distance("curves", samplers.unipc(SCHEDULES["linear"], 10)), theirs)
    ours, theirs = re.search(r"`unipc` is nearer \((\.\d+)\s+against (\.\d+)\)", PAGE).groups()
    assert_digits(distance("curves", samplers.unipc(SCHEDULES["cosine"], 10)), ours)
    assert_digits(distance("curves", samplers.ipndm(SCHEDULES["cosine"], 10)), theirs)


def test_what_there_is():
    """Every sampler has a row, and every scheduler that is read is in the list."""
    from fastdiff import scheduler_config

    table = PAGE[PAGE.index("| name | order |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines())))
    assert named == set(samplers.names())
    classes = PAGE[PAGE.index('| class, without "Scheduler"') :]
    listed = re.findall(r"\w+", " ".join(line.split("|")[1] for line in classes.splitlines() if line.startswith("|")))
    assert {name.removesuffix("Scheduler") for name in scheduler_config.METHODS} <= set(listed)
