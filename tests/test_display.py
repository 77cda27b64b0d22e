"""How objects show themselves in notebooks, and what a model says of itself."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import fastdiff as fd

S = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)


def parsed(shown):
    """HTML that is well-formed XML: browsers forgive, and this does not."""
    return ET.fromstring(f"<body>{shown._repr_html_()}</body>")


def cells(tree):
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


@pytest.mark.parametrize(
    "schedule", [S, fd.Schedule.cosine(1000), fd.Schedule.flow(3), fd.Schedule.from_betas([0.9999])]
)
def test_a_schedule_draws_its_signal_and_noise(schedule):
    tree = parsed(schedule)
    svg = tree.find("./div/svg")
    assert svg.get("aria-label") == tree.findtext("./div/code") == repr(schedule)
    lines = [np.array([pair.split(",") for pair in line.get("points").split()], float) for line in svg.iter("polyline")]
    foot, top = 80, 4
    for line, factor in zip(lines, (schedule.signal, schedule.noise), strict=True):
        assert len(line) == min(schedule.T, 160)
        assert line[0, 1] == pytest.approx(foot - (foot - top) * factor[0], abs=0.051)
        assert line[-1, 1] == pytest.approx(foot - (foot - top) * factor[-1], abs=0.051)
        assert (np.diff(line[:, 0]) > 0).all()
        assert 24 <= line[0, 0] <= line[-1, 0] <= 320
    assert {"signal", "noise", "timestep t", "0", "1", f"{schedule.T - 1}"} == {word.text for word in svg.iter("text")}


def test_a_sampler_shows_the_columns_it_has():
    head, *rows = cells(parsed(fd.samplers.ddim(S, 5)))
    assert head == ["row", "t", "p", "q", "b", "e"]
    assert [row[1] for row in rows] == ["99", "79", "59", "39", "19"]
    assert float(rows[0][4]) == pytest.approx(fd.samplers.ddim(S, 5).rows[0].b, rel=1e-4)


def test_of_a_long_table_both_ends_are_shown():
    _, *rows = cells(parsed(fd.samplers.ddpm(S)))
    assert [row[0] for row in rows] == [*map(str, range(8)), "…", *map(str, range(92, 100))]
    _, *rows = cells(parsed(fd.samplers.ddim(S, 17)))
    assert len(rows) == 17


def test_a_name_is_text_and_no_html():
    rows = fd.samplers.ddim(S, 2).rows
    parsed(fd.Sampler(rows, S, name="<script>&"))
    assert "<script>" not in fd.Sampler(rows, S, name="<script>&")._repr_html_()


def test_a_summary_counts_every_parameter():
    for net in (fd.MLP(50, hidden=(16, 8), T=10, classes=2), fd.UNet((8, 8, 1), channels=(8, 16), T=10)):
        facts = fd.Diffusion(net).summary().facts
        assert facts["parameters"] == f"{net.layout.count:,}"
        counts = [int(text.split()[0].replace(",", "")) for text in facts["layers"].values()]
        assert sum(counts) == net.layout.count
    assert facts["layers"]["conv_in"] == f"{8 * 9 + 8} (3 x 3 x 1 x 8 + 8)"


def test_a_summary_follows_the_training():
    model = fd.Diffusion(backend="numpy", seed=3)
    assert model.summary().facts == {
        "network": "chosen at the first fit", "schedule": "chosen at the first fit", "predicts": "v",
        "state": "not trained: call fit", "seed": 3,
    }  # fmt: skip
    X = fd.data.harmonic_curves(120, points=6)
    model = fd.Diffusion(fd.MLP(6, hidden=(4,), T=5), backend="numpy")
    model.fit(X, steps=200, batch=4, validation=0.2, progress=False)
    facts, held = model.summary().facts, model.history["validation_loss"]
    assert facts["state"] == "step 200"
    assert facts["loss"] == f"{np.mean(model.history['loss'][-100:]):.4g} (mean of the last 100 steps)"
    at = model.history["validation_step"][int(np.argmin(held))]
    assert facts["held-out loss"] == f"{held[-1]:.4g}, smallest {min(held):.4g} at step {at}"


def test_a_summary_is_text_and_a_table_of_the_same_facts():
    model = fd.Diffusion(fd.MLP.tutorial(50, T=100), seed=7)
    text, table = repr(model.summary()), cells(parsed(model))
    assert text.startswith("Diffusion\n  network")
    for name, value in table:
        name = name.replace("\N{NO-BREAK SPACE}", " ").strip()
        assert re.search(rf"^ +{re.escape(name)} *{re.escape(value)}$", text, re.M), (name, value)
    assert ["layers.0", "5,100 (50 x 100 + 100)"] in [
        [name.strip("\N{NO-BREAK SPACE}"), value] for name, value in table
    ]
