"""Training that takes care: plans of the rate, patience, loggers, a history for data frames, few rows."""

import copy
import csv
import json
import logging
import math
import warnings

import numpy as np
import pytest
from tolerances import assert_same_bits

import fastdiff as fd
from fastdiff import cli
from fastdiff.callbacks import FileLogger
from fastdiff.errors import ArgumentError, DataError, QualityWarning
from fastdiff.nn.optim import TrainingPlan

CURVES = fd.data.harmonic_curves(40, points=9, seed=3)
QUIET = {"progress": False, "judge": False}
PLANS = {
    "cosine": {"decay_steps": 7, "warmup": 2},
    "constant": {"warmup": 2},
    "one-cycle": {"decay_steps": 7},
}


def model(backend="numpy", **options):
    net = fd.MLP(9, hidden=(8,), T=20, seed=1)
    return fd.Diffusion(net, fd.Schedule.cosine(20), base=None, backend=backend, seed=4, **options)


def fit(made, steps, **options):
    return made.fit(CURVES, steps=steps, **{"batch": 6, "validation": 0, **QUIET, **options})


# ------------------------------------------------------------------------------------------- how the rate goes


def test_the_rates_of_the_plans():
    steps = np.arange(30)
    cosine = TrainingPlan(lr=2.0, warmup=4, decay_steps=24)
    rates = np.array([cosine.rate(step) for step in steps])
    np.testing.assert_allclose(rates[:4], [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(rates[4:25], 2 * (0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(21) / 20)) / 2))
    constant = cosine.changed(lr_plan="constant")
    np.testing.assert_array_equal([constant.rate(step) for step in steps[4:]], 2.0)
    assert constant.rate(1) == 1


def test_one_cycle_is_that_of_its_peers():
    """Up over 3 tenths of the steps, from a 25th, and down to a ten-thousandth of that: PyTorch's, step for step."""
    total = 40
    plan = TrainingPlan(lr=0.5, decay_steps=total, lr_plan="one-cycle")
    rates = [plan.rate(step) for step in range(total + 5)]
    assert rates[0] == pytest.approx(0.5 / 25)
    assert max(rates) == rates[12] == 0.5
    assert rates[6] == pytest.approx(0.5 * (1 + 1 / 25) / 2)
    assert rates[26] == pytest.approx(0.5 * (1 + 1e-4 / 25) / 2)
    assert rates[total:] == [pytest.approx(0.5 / 25 * 1e-4)] * 5
    assert plan.changed(warmup=20).rate(20) == 0.5
    assert plan.changed(decay_steps=None).rate(99) == 0.5  # a cycle without an end


def saved_and_loaded(made, folder):
    made.save(folder / "m.safetensors")
    return fd.load(folder / "m.safetensors", backend=made.backend)


@pytest.mark.parametrize("name", PLANS)
def test_parts_of_a_run_are_the_run_with_every_plan(backend, name, tmp_path):
    options = {**PLANS[name], "lr": 0.01, "lr_plan": name}
    whole = fit(model(backend), 9, **options)
    parts = saved_and_loaded(fit(model(backend), 4, **options), tmp_path)
    fit(parts, 5)
    assert_same_bits(parts.net.flat, whole.net.flat)
    assert_same_bits(parts.denoiser().flat, whole.denoiser().flat)
    assert parts.history == whole.history
    others = {other for other in PLANS if other != name}
    for other in others:
        plain = fit(model(backend), 9, **PLANS[other], lr=0.01, lr_plan=other)
        assert not np.array_equal(plain.net.flat, whole.net.flat)


def test_a_file_says_of_a_plan_only_what_is_not_usual():
    usual = TrainingPlan(decay_steps=9)
    assert usual.features == []
    assert "lr_plan" not in usual.to_dict()
    for plan in (usual, usual.changed(lr_plan="one-cycle"), usual.changed(weighting="min_snr", lr_plan="constant")):
        assert TrainingPlan.from_dict(plan.to_dict()) == plan
        assert ("rate plan" in plan.features) == (plan.lr_plan != "cosine")
        assert ("weighting" in plan.to_dict()) == (plan.weighting != "uniform")


def test_by_the_rule_a_constant_rate_stays(caplog):
    caplog.set_level(logging.INFO, "fastdiff")
    made = model()
    made.fit(CURVES, lr_plan="constant", callback=lambda step, loss: True, **QUIET)
    assert "a constant rate" in caplog.text
    assert made._optimizer.plan.rate(10**6) == 1e-3
    made.fit(CURVES, lr_plan="one-cycle", callback=lambda step, loss: True, **QUIET)
    assert made._optimizer.plan.decay_steps == made.end_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_plan": "linear"}, "lr_plan: got 'linear', wants one of 'cosine', 'constant', 'one-cycle'"),
        ({"lr_plan": "one-cycle"}, "decay_steps: got None, wants with steps and lr_plan='one-cycle' the step where"),
        ({"lr_plan": "cosine"}, "decay_steps: got None, wants with steps and lr_plan='cosine' the step where it ends"),
        ({"lr_plan": "constant", "decay_steps": 5}, "decay_steps: got 5, wants None with lr_plan='constant'"),
        ({"patience": 0, "validation": 0.2}, "patience: got 0, wants an integer of at least 1"),
        ({"patience": 100}, "patience: got 100, wants rows that are held out: validation=0.1, or rows"),
        ({"callbacks": "run.csv"}, "callbacks: got str, wants a list of loggers or functions"),
        ({"callbacks": [3]}, "callbacks: got int, wants a fastdiff.callbacks.FileLogger, an object with log_metrics"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    made = model()
    with pytest.raises(ArgumentError, match=message):
        fit(made, 1, **options)
    assert made.normaliser is None


# ------------------------------------------------------------------------------------------- patience


def test_patience_stops_and_keeps_the_best_average(backend, caplog):
    """A rate this high learns at first, and then only strays."""
    caplog.set_level(logging.INFO, "fastdiff")
    kept = {}
    made = model(backend)

    def keep(step, loss):
        kept[step + 1] = made._average.copy()

    fit(made, 3000, lr=0.05, clip_norm=None, ema=0.5, validation=0.25, patience=300, callback=keep)
    losses = made.history["validation_loss"]
    best = made.history["validation_step"][int(np.argmin(losses))]
    assert made.step == made.end_step == best + 300 < 3000
    assert made.history["validation_step"][-1] == made.step
    assert_same_bits(made.denoiser().flat, kept[best])
    assert f"of {made.step} steps the averaged weights after {best} are kept" in caplog.text
    assert len(made.history["loss"]) == made.step


def test_patience_keeps_the_last_weights_where_they_are_the_best(backend):
    """Also after a number of steps at which nothing is evaluated otherwise."""
    plain = fit(model(backend), 150, lr=0.002, ema=0.5, validation=0.25)
    patient = fit(model(backend), 150, lr=0.002, ema=0.5, validation=0.25, patience=300)
    assert_same_bits(patient.denoiser().flat, plain.denoiser().flat)
    assert patient.history == plain.history
    assert patient.history["validation_step"] == [0, 100]


def test_patience_takes_the_place_of_the_look_at_samples(monkeypatch):
    """Rows that are held out are worth more than samples: no sample is drawn."""
    made = model()
    monkeypatch.setattr("fastdiff.fitting._drawn_inside", None)
    made.fit(CURVES, validation=0.25, patience=100, decay_steps=200, batch=4, lr=0.1, clip_norm=None, **QUIET)
    assert made.step == made.end_step


# ------------------------------------------------------------------------------------------- loggers


class TensorBoard:
    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))


class MLflow:
    """A module has functions, and so has this."""

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))


class Run:
    def __init__(self):
        self.seen = []

    def log(self, data, step=None):
        self.seen.append((step, data))


def expected(made, plan):
    losses = made.history["loss"]
    ends = [*range(10, len(losses) + 1, 10), *([len(losses)] if len(losses) % 10 else [])]
    told = []
    for end in ends:
        start = (end - 1) // 10 * 10
        told.append((end - 1, {"loss": pytest.approx(np.mean(losses[start:end])), "lr": plan.rate(end - 1)}))
    return told


@pytest.mark.parametrize("every", [None, "step"])
def test_loggers_are_told_what_the_history_has(backend, every, tmp_path):
    board, flow, run, seen = TensorBoard(), MLflow(), Run(), []
    files = [tmp_path / "run.csv", tmp_path / "run.jsonl"]
    options = {"lr": 0.01, "warmup": 30, "validation": 0.25}
    if every:
        options["callback"] = lambda step, loss: None  # losses are read at every step
    loggers = [board, flow, run, lambda step, numbers: seen.append((step, numbers)), *map(FileLogger, files)]
    made = fit(model(backend), 104, callbacks=loggers, **options)
    losses = [(step, numbers) for step, numbers in seen if "loss" in numbers]
    assert losses == expected(made, TrainingPlan(lr=0.01, warmup=30))
    held = [(step, numbers["validation_loss"]) for step, numbers in seen if "loss" not in numbers]
    assert held == list(zip(made.history["validation_step"], made.history["validation_loss"], strict=True))
    assert flow.seen == run.seen == seen
    assert board.seen == [(name, value, step) for step, numbers in seen for name, value in numbers.items()]
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert lines == [{"step": step, **numbers} for step, numbers in seen]
    with files[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == lines
    plain = fit(model(backend), 104, **{**options, "callback": None})
    assert_same_bits(plain.net.flat, made.net.flat)
    fit(made, 16, callbacks=loggers, validation=0.25)  # it goes on where it was
    assert [step for step, numbers in seen if "loss" in numbers][-2:] == [109, 119]
    assert len(files[0].read_text().splitlines()) == len(seen) + 1


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    (tmp_path / "run.csv").write_text("epoch,error\n1,2\n")
    with pytest.raises(DataError, match=r"run\.csv: has the columns 'epoch,error', wants 'step,loss,lr"):
        FileLogger(tmp_path / "run.csv")
    with pytest.raises(ArgumentError, match=r"path: got run\.txt, wants a \.csv or \.jsonl file"):
        FileLogger("run.txt")


def test_a_file_that_cannot_be_written_leaves_a_sound_model(tmp_path):
    made = model()
    with pytest.raises(DataError, match="cannot be written: No such file"):
        fit(made, 20, callbacks=[FileLogger(tmp_path / "none" / "run.jsonl")])
    assert made.step == len(made.history["loss"]) > 0
    assert_same_bits(fit(made, 20 - made.step).net.flat, fit(model(), 20).net.flat)


def test_the_command_line_trains_on_without_a_log(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", CURVES)

    def full(self, step, numbers):
        raise DataError("run.csv: cannot be written: No space left on device")

    monkeypatch.setattr(FileLogger, "__call__", full)
    words = [
        "train",
        str(tmp_path / "x.npy"),
        "-o",
        str(tmp_path / "m.safetensors"),
        "--steps",
        "30",
        "--backend",
        "numpy",
    ]
    assert cli.main([*words, "--log", str(tmp_path / "run.csv"), "--quiet"]) == 0
    said = capsys.readouterr().err
    assert said.count("no more lines after step 9: run.csv: cannot be written: No space left on device") == 1
    assert fd.load(tmp_path / "m.safetensors").step == 30


def test_the_history_as_columns():
    made = fit(model(), 100, validation=0.25)
    table = made.history_table()
    assert list(table) == ["step", "loss", "validation_loss"]
    assert {len(column) for column in table.values()} == {101}
    np.testing.assert_array_equal(table["step"], np.arange(101))
    assert table["loss"][:100].tolist() == made.history["loss"]
    assert math.isnan(table["loss"][100])
    assert table["validation_loss"][[0, 100]].tolist() == made.history["validation_loss"]
    assert np.isnan(table["validation_loss"][1:100]).all()
    assert all(len(column) == 0 for column in model().history_table().values())


# ------------------------------------------------------------------------------------------- few rows


def test_few_rows_and_many_parameters_are_warned_of():
    wide = fd.Diffusion(fd.MLP(9, hidden=(512, 512), T=20), backend="cpu", base=None)
    stop = {"callback": lambda step, loss: True, **QUIET}
    with pytest.warns(QualityWarning, match=r"40 rows meet \d+ parameters, .* patience= stops before that"):
        copy.deepcopy(wide).fit(CURVES, steps=1000, **stop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(wide).fit(CURVES, steps=999, **stop)
        copy.deepcopy(wide).fit(CURVES, steps=1000, patience=500, validation=0.25, **stop)
        copy.deepcopy(wide).fit(np.concatenate([CURVES] * 10), steps=1000, **stop)


# ------------------------------------------------------------------------------------------- the command line


def test_the_command_line_takes_care(tmp_path, capsys):
    np.save(tmp_path / "x.npy", CURVES)
    made, log = tmp_path / "m.safetensors", tmp_path / "run.csv"
    options = ["--overwrite", "--backend", "numpy", "--quiet", "--validation", "0.2", "--batch", "4"]
    words = ["train", str(tmp_path / "x.npy"), "-o", str(made), "--steps", "300", "--lr", "0.3", "--clip-norm", "none"]
    care = ["--patience", "100", "--log", str(log), "--lr-plan", "constant", "--network", "tutorial"]
    assert cli.main([*words, *care, *options]) == 0
    saved = fd.load(made)
    assert saved._optimizer.plan.lr_plan == "constant"
    assert saved.step in (100, 200, 300)
    assert log.read_text().startswith("step,loss,lr,validation_loss\n0,,,")
    assert "averaged weights after 0 are kept: their loss on held-out rows is the least" in capsys.readouterr().err
    assert cli.main([*words, "--log", str(tmp_path / "run.txt"), *options]) == 2
    assert "wants a file name that ends in .csv or .jsonl" in capsys.readouterr().err
    assert cli.main([*words, "--lr-plan", "one-cycle", *options]) == 2
    assert "decay_steps: got None, wants with steps" in capsys.readouterr().err
