"""The command line as a user meets it: whole runs, one-line errors, nothing half-written, Ctrl-C."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import cli, defaults, demo
from fastdiff.cli.messages import PatientInterrupt
from fastdiff.cli.parser import SYNONYMS
from fastdiff.data import harmonic_curves, load_curves, save_curves

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_curves("curves.csv", harmonic_curves(64, points=12))


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, stdout and stderr."""

    def run(command, *more):
        code = cli.main([*command.split(), *more])
        return code, *capsys.readouterr()

    return run


TRAIN = "train curves.csv --backend numpy --quiet --batch 16 --overwrite"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bytes of a model after four steps, trained once."""
    path = tmp_path_factory.mktemp("trained") / "m.safetensors"
    curves = harmonic_curves(64, points=12)
    fd.Diffusion(backend="numpy").fit(curves, steps=4, batch=16, progress=False).save(path)
    return path.read_bytes()


@pytest.fixture
def model(trained):
    path = Path("m.safetensors")
    path.write_bytes(trained)
    return path


def files():
    return sorted(path.name for path in Path().iterdir())


# --------------------------------------------------------------------------------------- whole runs


def test_train_info_sample(run):
    code, out, err = run(f"{TRAIN} -o m.safetensors --steps 20 --validation 0.25 --loss-plot loss.png")
    assert code == 0
    assert re.search(r"m\.safetensors: 20 steps in [\d.]+ s, now at step 20; loss \d\S* .* held-out", out)
    assert "64 curves of 12 points from curves.csv" in err
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")

    code, out, _ = run("info m.safetensors")
    assert code == 0
    assert re.search(r"^  step +20$", out, re.M)
    facts = json.loads(run("info m.safetensors --json")[1])
    assert facts["step"] == 20

    code, out, _ = run("sample m.safetensors -n 5 -o new.csv --plot new.png --backend numpy")
    assert code == 0
    assert "new.csv: 5 curves of 12 points" in out
    assert Path("new.png").read_bytes().startswith(b"\x89PNG")
    drawn = load_curves("new.csv", header=False)
    assert drawn.shape == (5, 12)
    np.testing.assert_array_equal(drawn, fd.load("m.safetensors", backend="numpy").sample(5))
    assert files() == ["curves.csv", "loss.png", "m.safetensors", "new.csv", "new.png"]


def test_a_run_in_two_parts_is_the_same_run(run):
    for options, parts in (("", (7, 5)), (" --validation 0.25 --seed 3 --lr 0.01 --schedule cosine", (5, 7))):
        assert run(f"{TRAIN} -o whole.safetensors --steps 12{options}")[0] == 0
        assert run(f"{TRAIN} -o half.safetensors --steps {parts[0]}{options}")[0] == 0
        again = options[: options.index(" --seed")] if options else ""
        assert run(f"{TRAIN} --resume half.safetensors --steps {parts[1]}{again}")[0] == 0
        whole, halves = fd.load("whole.safetensors"), fd.load("half.safetensors")
        assert whole.step == halves.step == 12
        # Not the validation's: a call ends with one.
        assert whole.history["loss"] == halves.history["loss"]
        for ema in (False, True):
            np.testing.assert_array_equal(whole.denoiser(ema=ema).flat, halves.denoiser(ema=ema).flat)


def test_resume_into_another_file_leaves_the_first(run, model):
    before = model.read_bytes()
    assert run(f"{TRAIN} --resume m.safetensors -o n.safetensors --steps 2")[0] == 0
    assert model.read_bytes() == before
    assert fd.load("n.safetensors").step == 6


def test_options_reach_the_model(run):
    options = "--network tutorial --prediction v --schedule linear --timesteps 30 --beta-end 0.3 --seed 9"
    plan = "--lr 0.01 --warmup 1 --decay-steps 5"
    assert run(f"{TRAIN} -o m.safetensors --steps 3 {options} {plan}")[0] == 0
    made = fd.load("m.safetensors")
    assert made.schedule == fd.Schedule.linear(30, beta_start=1e-4, beta_end=0.3)
    assert made.prediction == "v"
    want = fd.Diffusion(fd.MLP.tutorial(12, T=30), made.schedule, prediction="v", backend="numpy", seed=9)
    want.fit(load_curves("curves.csv"), steps=3, batch=16, progress=False, lr=0.01, warmup=1, decay_steps=5)
    np.testing.assert_array_equal(fd.load("m.safetensors", backend="numpy").sample(3), want.sample(3), strict=True)


def test_how_tables_are_read_is_said_and_noted(run):
    X = load_curves("curves.csv")
    lines = [f"{k};" + ";".join(f"{v:.6f}".replace(".", ",") for v in row) for k, row in enumerate(X)]
    Path("comma.csv").write_text("\n".join(["n;" + ";".join("abcdefghijkl"), *lines]) + "\n")
    how = "--decimal , --delimiter ; --columns 3-6 --steps 1 --batch 4 --backend numpy --quiet"
    code, _, err = run(f"train comma.csv -o c.safetensors --overwrite {how}")
    assert code == 0
    assert (
        "fastdiff: comma.csv: cells between semicolons; line 1 has column names; 4 columns are values, left out" in err
    )
    assert fd.load("c.safetensors").net.shape == (4,)
    code, _, err = run("train comma.csv -o c.safetensors --overwrite --steps 1")
    assert "line 2, column 2" in err
    assert "--decimal , reads decimal commas" in err or "--decimal , reads them" in err
    code, _, err = run("train flat --size 8 -o p.safetensors --overwrite --decimal ,")
    assert "--decimal is for files of curves" in err


def test_losses_are_weighted(run):
    assert run(f"{TRAIN} -o m.safetensors --steps 2 --weighting min_snr --snr-gamma 3")[0] == 0
    plan = fd.load("m.safetensors")._optimizer.plan
    assert (plan.weighting, plan.snr_gamma) == ("min_snr", 3.0)
    assert run(f"{TRAIN} --resume m.safetensors --steps 2")[0] == 0
    assert fd.load("m.safetensors")._optimizer.plan == plan
    code, _, err = run(f"{TRAIN} --resume m.safetensors --steps 2 --clip-norm none --lr 1e-3")
    assert code == 0
    assert "from step 4 on: clip_norm None (1.0 before)" in err
    now = fd.load("m.safetensors")._optimizer.plan
    code, _, err = run(f"{TRAIN} --resume m.safetensors --steps 2 --weighting uniform")
    assert (code, "--weighting cannot change with --resume" in err) == (2, True)
    assert now == replace(plan, clip_norm=None)
    assert run(f"{TRAIN} --resume m.safetensors --steps 2 --ema none --lr 2e-3 --warmup 9 --decay-steps 99")[0] == 0
    assert fd.load("m.safetensors")._optimizer.plan == replace(now, ema=None, lr=2e-3, warmup=9, decay_steps=99)


@pytest.mark.parametrize(
    ("options", "schedule", "prediction"),
    [
        ("--schedule flow --timesteps 20 --shift 3", lambda: fd.Schedule.flow(20, shift=3), "velocity"),
        ("--schedule flow --prediction v", lambda: fd.Schedule.flow(1000), "v"),
        ("--schedule laplace --timesteps 20", lambda: fd.Schedule.laplace(20), "v"),
        ("--schedule cosine --timesteps 9 --zero-snr", lambda: fd.Schedule.cosine(9).zero_terminal_snr(), "v"),
    ],
)
def test_schedules_that_end_in_noise(run, options, schedule, prediction):
    assert run(f"{TRAIN} -o m.safetensors --steps 2 {options}")[0] == 0
    made = fd.load("m.safetensors", backend="numpy")
    assert made.schedule == schedule()
    assert made.prediction == prediction
    assert np.isfinite(made.sample(3)).all()


def test_sample_is_independent_of_how_many_and_of_chunks(run, model, monkeypatch):
    assert run("sample m.safetensors -n 9 -o all.npy --seed 4")[0] == 0
    everything = load_curves("all.npy")
    assert run("sample m.safetensors -n 4 -o last.npy --seed 4 --first-sample 5")[0] == 0
    np.testing.assert_allclose(load_curves("last.npy"), everything[5:], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(cli.sample, "SAMPLES_AT_ONCE", 4)
    assert run("sample m.safetensors -n 9 -o chunks.npy --seed 4")[0] == 0
    np.testing.assert_allclose(load_curves("chunks.npy"), everything, rtol=1e-4, atol=1e-4)
    assert run("sample m.safetensors -n 9 -o other.npy --seed 5")[0] == 0
    assert not np.allclose(load_curves("other.npy"), everything)


@pytest.mark.parametrize("options", ["--sampler ddim --sample-steps 5", "--sampler dpmpp_2m", "--no-ema"])
def test_sampler_options_change_the_curves(run, model, options):
    run("sample m.safetensors -n 2 -o plain.npy")
    assert run(f"sample m.safetensors -n 2 -o other.npy {options}")[0] == 0
    assert not np.array_equal(load_curves("plain.npy"), load_curves("other.npy"))


def test_info_without_a_file_describes_the_installation(run):
    code, out, _ = run("info")
    assert code == 0
    assert re.search(r"^fastdiff \d+\.\d+", out)
    assert re.search(r"^  backends +numpy", out, re.M)
    columns = {len(re.match(r"  .*?\s{2,}", line).group()) for line in out.splitlines()[1:]}
    assert len(columns) == 1, "values are not in one column"


def test_info_says_whether_a_file_can_be_trained_on(run, model):
    fd.load(model).save("small.safetensors", training=False)
    with_training, without = (json.loads(run(f"info {name} --json")[1]) for name in (model, "small.safetensors"))
    assert with_training != without


def test_info_says_how_a_model_samples_on_gpus_in_every_precision(run, model):
    told = json.loads(run(f"info {model} --backend cuda --json")[1])["cuda"]
    chains = {
        name: ways["on compute capability 9.0"] for name, ways in told.items() if name.startswith("sampling chain")
    }
    assert list(chains) == ["sampling chain", "sampling chain, bf16x3", "sampling chain, bf16"]
    assert all(way.startswith("one launch: ") for way in chains.values())
    assert len(set(chains.values())) == 3


@pytest.mark.slow
def test_demo(run, monkeypatch, drawn):
    for name, value in {"CURVE_STEPS": 30, "FAMILY_STEPS": 30, "FAMILY_CURVES": 50, "GENERATED": 20}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(defaults, "JUDGED_STEPS", 1)  # as its thousands of steps are
    code, out, err = run("demo -o deep/demo --quick --backend numpy --quiet")
    assert "learned by heart" not in err  # one curve is to be
    assert code == 0
    assert re.search(r"root mean square error of 20 generated curves +\d", out)
    assert re.search(r"energy distance, 20 generated to 20 unseen +\d", out)
    assert re.search(r"between two unseen sets +\d", out)
    named = {path for line in out.splitlines() for path in re.findall(r"^  (\S+): ", line)}
    assert {str(path) for path in Path("deep/demo").iterdir()} == named
    assert len([name for name in named if name.endswith(".png")]) == 8
    assert len(drawn) == 3
    assert all("ddpm, 100 steps" in str(options) for _, options in drawn)
    assert "error" not in err
    # What it advises to do next works.
    for advice in re.findall(r"^  fastdiff (.*)$", out, re.M):
        assert run(advice)[0] == 0


@pytest.mark.slow
def test_example(capsys):
    main = runpy.run_path(str(EXAMPLES / "curves.py"))["main"]
    main(["-o", "pictures", "--steps", "3"])
    assert "root mean square error" in capsys.readouterr().out
    assert sorted(os.listdir("pictures")) == ["family.gif", "family.png", "family_loss.png", "one_reverse.png"]


@pytest.mark.slow
def test_the_samplers_example_draws_its_picture(capsys):
    main = runpy.run_path(str(EXAMPLES / "samplers.py"))["main"]
    main.__globals__["COUNTS"] = np.array([7, 11])
    main(["-o", "pictures", "--steps", "20", "--draws", "60"])
    printed = capsys.readouterr().out
    values = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()[1:11]}
    assert values["unipc"] < values["dpmpp_2m"] < values["ddim"] < values["ddpm"]
    assert os.listdir("pictures") == ["samplers.png"]


@pytest.mark.slow
def test_the_covariance_example_draws_its_pictures(capsys):
    runpy.run_path(str(EXAMPLES / "covariance.py"))["main"](["-o", "pictures"])
    printed = capsys.readouterr().out
    assert re.search(r"effective rank: noise 49\.\d, signal 3\.\d", printed)
    assert float(re.search(r"scatter off by (\S+)", printed)[1]) < 1e-5
    assert sorted(os.listdir("pictures")) == ["convergence.png", "curves.png", "matrices.png", "spectra.png"]


@pytest.mark.slow
def test_the_image_example_draws_and_judges(capsys):
    main = runpy.run_path(str(EXAMPLES / "images.py"))["main"]
    main(["-o", "pictures", "--steps", "2", "--drawn", "20", "--quiet"])
    printed = capsys.readouterr().out
    assert re.search(r"confident classifications: .*% of generated digits, 80\.9% of unseen real ones", printed)
    assert re.search(r"energy distance to unseen digits: generated \d+\.\d+, as many real ones \d", printed)
    assert re.search(r"drawn as asked: [\d.]+% are classified so", printed)
    pictures = ["digits_asked.png", "digits_generated.png", "digits_trace.png", "digits_training.png"]
    assert sorted(os.listdir("pictures")) == sorted([*pictures, "digits.safetensors", "digits_chain.gif"])
    assert len(fd.load("pictures/digits.safetensors", backend="numpy").history["loss"]) == 2


@pytest.mark.slow
def test_the_image_example_cuts_tiles_of_a_folder(pictures, capsys):
    main = runpy.run_path(str(EXAMPLES / "images.py"))["main"]
    main(["--folder", "classes/cat", "-o", "new", "--steps", "2", "--batch", "4", "--quiet"])
    assert "2 steps" in capsys.readouterr().out
    assert {"tiles_generated.png", "tiles_trace.png", "tiles_training.png"} < set(os.listdir("new"))


@pytest.mark.slow
def test_the_example_of_answers_draws_them(capsys):
    main = runpy.run_path(str(EXAMPLES / "answers.py"))["main"]
    main(["-o", "pictures", "--steps", "2", "--draws", "20"])
    assert len(re.findall(r"bands [\d.]+ wide on average, with \d+% of the hidden", capsys.readouterr().out)) == 2
    assert os.listdir("pictures") == ["answers.png"]


# --------------------------------------------------------------------------------------- what is missing


@pytest.fixture
def holes(model):
    """A table of four curves with values missing, written in several ways; the curves."""
    X = harmonic_curves(4, points=12, seed=1)
    cells = [[f"{value:.9g}" for value in row] for row in X]
    for (row, column), text in {(0, 3): "", (0, 11): "nan", (1, 0): "NA", (3, 5): "null"}.items():
        cells[row][column], X[row, column] = text, np.nan
    Path("holes.csv").write_text("\n".join(map(",".join, cells)) + "\n")
    return X


def test_impute_fills_in_what_is_missing(run, holes):
    code, out, _ = run("impute m.safetensors holes.csv -o filled.csv --draws 3 --plot band.png --quiet --backend numpy")
    assert code == 0
    assert "filled.csv: 4 of 48 values filled in, in 3 of 4 curves, 3 times" in out
    assert "band.png: the first 3 curves with missing values" in out
    assert Path("band.png").read_bytes().startswith(b"\x89PNG")
    filled = load_curves("filled.csv", header=False).reshape(3, 4, 12)
    want = fd.load("m.safetensors", backend="numpy").impute(holes, 3)
    np.testing.assert_allclose(filled, want, rtol=1e-5, atol=1e-6)
    for draw in filled:
        np.testing.assert_array_equal(draw[~np.isnan(holes)], holes[~np.isnan(holes)])
    more = "impute m.safetensors holes.csv -o one.npy --first-draw 2 --method replace --seed 3 --quiet --backend numpy"
    assert run(more)[0] == 0
    want = fd.load("m.safetensors", backend="numpy").impute(holes, 1, first_draw=2, method="replace", seed=3)
    np.testing.assert_array_equal(np.load("one.npy"), want)


def test_rows_come_back_as_they_came(run, model):
    """Names, an index of text, a column that is left out, semicolons, decimal commas: only what was missing changes."""
    X = harmonic_curves(3, points=12, seed=1)
    cells = [[f"n{k}", *(f"{value:.4f}".replace(".", ",") for value in row), "so; so"] for k, row in enumerate(X)]
    cells[1][3], cells[2][12], cells[0][9] = "", "NA", "0,50"
    lines = [";".join([*row[:-1], f'"{row[-1]}"']) for row in cells]
    names = ";".join(["Ort", *(f"p {k}" for k in range(12)), "Note"])
    Path("rows.csv").write_text("\n".join([names, *lines]) + "\n")
    command = "impute m.safetensors rows.csv --index Ort --drop Note --decimal , --quiet --backend numpy"
    code, out, _ = run(f"{command} -o filled.csv")
    assert code == 0
    assert "2 of 36 values filled in, in 2 of 3 curves, 1 time\n" in out
    read = {"index": "Ort", "drop": "Note", "decimal": ","}
    drawn = fd.load("m.safetensors", backend="numpy").impute(load_curves("rows.csv", **read, missing=True), 2)
    filled = Path("filled.csv").read_text().splitlines()
    cells[1][3], cells[2][12] = (f"{drawn[0, row, at]:.9g}".replace(".", ",") for row, at in ((1, 2), (2, 11)))
    assert filled == [names, *(";".join([*row[:-1], f'"{row[-1]}"']) for row in cells)]
    assert run(f"{command} -o draws.csv --draws 2")[0] == 0
    draws = Path("draws.csv").read_text().splitlines()
    assert draws[:4] == [f"draw;{names}", *(f"0;{line}" for line in filled[1:])]
    assert [line[:4] for line in draws[4:]] == ["1;n0", "1;n1", "1;n2"]
    assert run(f"{command} -o bands.csv --draws 2 --quantiles 0.25,1")[0] == 0
    bands = [line.split(";") for line in Path("bands.csv").read_text().splitlines()]
    assert bands[0] == ["quantile", "row", *names.split(";")]
    assert [line[:3] for line in bands[1:]] == [[q, str(k + 1), f"n{k}"] for q in ("0,25", "1") for k in range(3)]
    np.testing.assert_allclose(float(bands[5][5].replace(",", ".")), drawn[:, 1, 2].max(), rtol=1e-6)


def test_quantiles_of_rows_without_names_get_them(run, holes):
    command = "impute m.safetensors holes.csv -o bands.csv --draws 3 --quantiles 0.1,0.9 --quiet --backend numpy"
    code, out, _ = run(command)
    assert code == 0
    assert "by 2 quantiles of 3 draws" in out
    lines = [line.split(",") for line in Path("bands.csv").read_text().splitlines()]
    assert lines[0] == ["quantile", "row", *(f"column_{k}" for k in range(1, 13))]
    assert [line[:2] for line in lines[1:]] == [[q, str(k)] for q in ("0.1", "0.9") for k in range(1, 5)]
    want = fd.load("m.safetensors", backend="numpy").impute(holes, 3, quantiles=(0.1, 0.9))
    found = load_curves("bands.csv", drop=["quantile", "row"])
    np.testing.assert_allclose(found.reshape(want.shape), want, rtol=1e-6)
    np.save("holes.npy", holes)
    assert run(command.replace("holes.csv", "holes.npy") + " --overwrite")[0] == 0
    np.testing.assert_array_equal(load_curves("bands.csv", drop=["quantile", "row"]), found)


def test_what_is_missing_is_drawn_for_its_covariates(run):
    X, c = harmonic_curves(64, points=6), np.arange(64.0) % 7
    model = fd.Diffusion(backend="numpy").fit(X, covariates=c, steps=2, batch=8, progress=False)
    model.covariate_names = ["age"]
    model.save("k.safetensors")
    holes = np.where(np.arange(6) == np.arange(3)[:, None], np.nan, X[:3])
    rows = [[f"{age:g}", *("" if np.isnan(v) else f"{v:.9g}" for v in row)] for age, row in zip(c, holes, strict=False)]
    Path("holes.csv").write_text("\n".join(["age,a,b,c,d,e,f", *map(",".join, rows)]) + "\n")
    command = "impute k.safetensors holes.csv -o f.npy --draws 4 --quiet --backend numpy"
    code, _, err = run(command)
    assert code == 2
    assert "--covariates is wanted: the model is asked for age" in err
    picture = "--quantiles 0,1 --plot band.png"
    assert run(f"{command} --covariates age {picture}")[0] == 0
    want = fd.load("k.safetensors", backend="numpy").impute(holes, 4, covariates=c[:3], quantiles=(0, 1))
    np.testing.assert_allclose(np.load("f.npy"), want, rtol=1e-6)


THERE = [
    "sample m.safetensors -n 2 -o there.csv",
    "sample m.safetensors -n 2 -o new.csv --plot there.png",
    "sample m.safetensors -n 2 -o new.csv --trace there.png",
    "sample m.safetensors -n 2 -o new.csv --gif there.gif",
    "impute m.safetensors holes.csv -o holes.csv",
    "impute m.safetensors holes.csv -o new.csv --plot there.png",
    "train curves.csv -o n.safetensors --steps 1 --loss-plot there.png",
    "train curves.csv -o m.safetensors --steps 1",
    "score m.safetensors curves.csv -o there.csv",
    "evaluate m.safetensors curves.csv -n 8 -o there.png",
    "page m.safetensors -o there.html",
    "bench --plot there.png",
    "forecast m.safetensors curves.csv --horizon 2 -o there.csv",
]


@pytest.mark.parametrize("command", THERE)
@pytest.mark.usefixtures("holes")
def test_no_command_replaces_a_file_that_is_there(run, command):
    for ending in ("csv", "png", "gif", "html"):
        Path(f"there.{ending}").write_text("mine")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    code, out, err = run(command)
    assert (code, out) == (2, "")
    assert re.search(r"^fastdiff: error: \S+: is there; --overwrite replaces it", err, re.M)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    if command in THERE[4:8]:  # the others draw and write in the same way, later
        assert run(f"{command} --overwrite --quiet --backend numpy")[0] == 0
        assert {path for path in before if path.read_bytes() != before[path]}


@pytest.mark.filterwarnings("ignore::fastdiff.errors.QualityWarning")  # of a few rows
def test_training_learns_around_what_is_missing_where_it_is_told(run, model):
    X = harmonic_curves(40, points=12, seed=1)
    X[::3, 3:6] = np.nan
    rows = [["" if np.isnan(value) else f"{value:.9g}" for value in row] for row in X]
    Path("gaps.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    command = "train gaps.csv -o g.safetensors --steps 2 --batch 8 --quiet --backend numpy"
    code, _, err = run(command)
    assert code == 2
    assert "gaps.csv, line 1, column 4: empty cell; train --missing" in err
    assert not Path("g.safetensors").exists()
    code, _, err = run(f"{command} --missing")
    assert code == 0, err
    there = load_curves("gaps.csv", missing=True)
    np.testing.assert_array_equal(there, X)
    same = fd.Diffusion(backend="numpy").fit(there, steps=2, batch=8, progress=False)
    assert fd.load("g.safetensors").digest() == same.digest()


def test_a_sample_given_a_part_of_a_curve(run, holes):
    Path("part.csv").write_text(Path("holes.csv").read_text().splitlines()[0] + "\n")
    assert run("sample m.safetensors -n 3 -o new.csv --known part.csv --trace new.png --quiet --backend numpy")[0] == 0
    drawn, told = load_curves("new.csv", header=False), ~np.isnan(holes[0])
    np.testing.assert_array_equal(drawn[:, told], np.broadcast_to(holes[0, told], (3, told.sum())))
    assert np.ptp(drawn[:, 3]) > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("impute m.safetensors holes.csv -o f.txt", "f.txt"),
        ("impute m.safetensors holes.csv -o f.csv --draws 0", "--draws: got 0"),
        ("impute m.safetensors holes.csv -o f.csv --first-draw -1", "--first-draw: got -1"),
        ("impute m.safetensors curves.csv -o f.csv --plot f.png", "--plot: there is nothing to show"),
        ("impute m.safetensors none.csv -o f.csv", "none.csv"),
        (
            "impute m.safetensors short.csv -o f.csv",
            "short.csv: curves of 3 points, where those of m.safetensors have 12",
        ),
        ("impute m.safetensors words.csv -o f.csv", "words.csv"),
        ("sample m.safetensors -n 2 -o f.csv --known holes.csv", "--known holes.csv: 4 curves of 12 points"),
        ("sample m.safetensors -n 2 -o f.csv --mask curves.csv", "--mask is of a picture that --known names"),
        ("sample m.safetensors -n 2 -o f.csv --known short.csv --mask a.png", "--mask is for pictures"),
    ],
)
@pytest.mark.usefixtures("holes")
def test_bad_input_for_what_is_missing_is_one_error(run, command, message):
    Path("short.csv").write_text("1,,3\n")
    Path("words.csv").write_text(",".join(["1"] * 11 + ["maybe"]) + "\n")
    before = files()
    code, out, err = run(command + " --quiet")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert err.count("fastdiff: error: ") == 1
    assert files() == before


@pytest.fixture
def part():
    """A model of pictures of bytes, and one picture whose lower half is transparent."""
    pillow = pytest.importorskip("PIL.Image")
    X = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    net = fd.UNet((4, 4, 3), channels=(8,), blocks=1, attention=(False,), groups=4, T=6)
    fitted = fd.Diffusion(net, fd.Schedule.cosine(6), backend="numpy").fit(X, steps=2, batch=4, progress=False)
    fitted.save("p.safetensors")
    alpha = np.where(np.arange(4)[:, None, None] < 2, 255, 0) + np.zeros((4, 4, 1))
    pillow.fromarray(np.concatenate([X[0], alpha.astype(np.uint8)], axis=2)).save("part.png")
    pillow.fromarray(X[0]).save("whole.png")
    pillow.fromarray(((np.arange(16).reshape(4, 4) % 4 == 0) * 255).astype(np.uint8)).save("mask.png")
    pillow.fromarray(np.zeros((5, 4), np.uint8)).save("other.png")
    return X[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--known part.png", np.arange(16).reshape(4, 4) < 8),
        ("--known whole.png --mask mask.png --method replace", np.arange(16).reshape(4, 4) % 4 != 0),
    ],
)
def test_pictures_given_a_part_of_one(run, part, options, told):
    assert run(f"sample p.safetensors -n 3 -o new.npy {options} --quiet --backend numpy")[0] == 0
    drawn = np.load("new.npy")
    assert drawn.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(drawn[:, told], np.broadcast_to(part[told], (3, told.sum(), 3)))
    assert (drawn[:, ~told] != part[~told]).any()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample p.safetensors -n 2 -o new.npy --known whole.png", "whole.png: no pixel is unknown"),
        ("sample p.safetensors -n 2 -o new.npy --known other.png", "other.png: 5 x 4 pixels, where 4 x 4"),
        ("sample p.safetensors -n 2 -o new.npy --known whole.png --mask other.png", "other.png: 5 x 4 pixels"),
        ("sample p.safetensors -n 2 -o new.npy --known curves.csv", "curves.csv: not a picture"),
        ("sample p.safetensors -n 2 -o new.npy --known gone.png", "gone.png: No such file"),
        ("impute p.safetensors curves.csv -o f.csv", "fastdiff sample --known fills those in"),
    ],
)
@pytest.mark.usefixtures("part")
def test_bad_parts_of_pictures_are_one_error(run, command, message):
    before = files()
    code, _, err = run(command + " --quiet")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert files() == before


# --------------------------------------------------------------------------------------- tables


@pytest.fixture
def years():
    """A table with a name and a year in each row, and its values alone."""
    curves = load_curves("curves.csv")
    cells = [f"n{i},{1950 + i}," + ",".join(f"{value:.9g}" for value in row) for i, row in enumerate(curves)]
    Path("table.csv").write_text("\n".join(["name,YEAR," + ",".join("abcdefghijkl"), *cells, ""]))
    return curves


def test_a_suspicious_column_is_a_warning_that_names_the_remedy(run, years):
    train = TRAIN.replace("curves.csv", "table.csv")
    code, _, err = run(f"{train} -o m.safetensors --steps 2")
    assert code == 2
    assert "--index name or --drop name leaves it out" in err
    code, _, err = run(f"{train} -o m.safetensors --steps 2 --index name")
    assert code == 0
    assert (
        "\nfastdiff: warning: table.csv: column YEAR rises by 1 in every row: is it an index? --index YEAR"
        in f"\n{err}"
    )
    assert "64 curves of 13 points" in err
    code, _, err = run(f"{train} -o m.safetensors --steps 2 --index name --drop YEAR,l --drop 3")
    assert code == 0
    assert "warning" not in err
    assert "64 curves of 10 points" in err
    made = fd.load("m.safetensors", backend="numpy")
    want = fd.Diffusion(backend="numpy").fit(years[:, 1:-1], steps=2, batch=16, progress=False)
    np.testing.assert_array_equal(made.net.flat, want.net.flat)


def test_options_of_tables_are_part_of_the_advice_and_for_tables_only(run, years, pictures):
    def stop(self, step, loss):
        self.presses = 1
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatientInterrupt, "wanted", stop)
        train = TRAIN.replace("curves.csv", "table.csv")
        err = run(f"{train} -o m.safetensors --steps 9 --index name --drop YEAR,3 --header")[2]
        advice = re.search(r"continue with: fastdiff (.*)", err)[1]
    assert advice.endswith("--header --index name --drop YEAR,3")
    assert run(f"{advice} --quiet")[0] == 0
    assert fd.load("m.safetensors").step == 9
    code, _, err = run("train classes/ant -o p.safetensors --overwrite --drop 1")
    assert code == 2
    assert "--drop is for files of curves" in err


# --------------------------------------------------------------------------------------- pictures


@pytest.fixture
def pictures():
    """Folders: `classes` with ant and cat, a handful of pictures each, dark and bright; `empty`; `broken`."""
    for name, level in (("ant", 20), ("cat", 220)):
        noise = np.random.default_rng(level).integers(0, 30, (5, 24, 20, 1))
        Path("classes").mkdir(exist_ok=True)
        fd.data.save_images((level + noise).astype(np.uint8), f"classes/{name}")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"not a picture")


LEARN = "--backend numpy --quiet --size 4 --batch 4 --channels 4 --schedule cosine --timesteps 8"


@pytest.fixture(scope="module")
def trained_drawer():
    """The bytes of the model below, after its first use."""
    return []


@pytest.fixture
def drawer(pictures, run, trained_drawer):
    """A model of two classes after three steps, long enough ones that the classes differ."""
    if not trained_drawer:
        assert run(f"train classes -o p.safetensors --overwrite {LEARN} --labels --steps 3 --lr 0.1")[0] == 0
        made = fd.load("p.safetensors", backend="numpy")
        assert np.mean(made.sample(5, labels=0) != made.sample(5, labels=1)) > 0.2
        trained_drawer.append(Path("p.safetensors").read_bytes())
    Path("p.safetensors").write_bytes(trained_drawer[0])
    return fd.load("p.safetensors", backend="numpy")


def pixels(path):
    return fd.data.load_images(path, None)


def test_a_folder_is_learned_and_drawn(run, pictures):
    code, out, err = run(
        f"train classes/ant -o p.safetensors {LEARN} --flip --steps 4 --validation 0.4 --snapshots 2 --dropout 0.1"
    )
    assert code == 0, err
    assert "5 gray pictures of 4 x 4 pixels from classes/ant" in err
    assert "p.safetensors: 4 steps" in out
    assert {"p-000002.png", "p-000004.png"} < set(files())
    made = fd.load("p.safetensors", backend="numpy")
    assert (made.net.shape, made.net.dropout, made.schedule) == ((4, 4, 1), 0.1, fd.Schedule.cosine(8))
    want = made.sample(5)

    code, out, _ = run(
        "sample p.safetensors -n 5 -o new/ --backend numpy --quiet --trace t.png --gif g.gif --plot x.png"
    )
    assert code == 0
    assert "new/: 5 gray pictures of 4 x 4 pixels\n" in out
    np.testing.assert_array_equal(pixels("new"), want)
    assert Path("g.gif").read_bytes().startswith(b"GIF")
    assert {"t.png", "x.png"} < set(files())
    assert run("sample p.safetensors -n 2 -o new --backend numpy --quiet")[0] == 2  # there are pictures
    assert run("sample p.safetensors -n 2 -o new --backend numpy --quiet --overwrite --first-sample 1")[0] == 0
    np.testing.assert_array_equal(pixels("new"), want)

    assert run("sample p.safetensors -n 5 -o new.npy --backend numpy --quiet")[0] == 0
    np.testing.assert_array_equal(np.load("new.npy"), want)
    assert run("sample p.safetensors -n 5 -o grid.png --backend numpy --quiet")[0] == 0
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^    kind +unet$", run("info p.safetensors")[1], re.M)


def test_parts_of_larger_pictures_are_learned(run, pictures):
    learn = LEARN.replace("--size 4", "--size 6x5 --crop 4")
    code, _, err = run(f"train classes/ant -o p.safetensors --overwrite {learn} --steps 2")
    assert code == 0, err
    assert "gray pictures of 6 x 5 pixels" in err
    made = fd.load("p.safetensors", backend="numpy")
    assert made.net.shape == (4, 4, 1)
    X = fd.data.load_images("classes/ant", (6, 5))
    made.fit(X, crop=4, steps=1, batch=4, progress=False)
    how = "--size 6x5 --crop 4 --backend numpy --quiet --batch 4"
    assert run(f"train classes/ant --resume p.safetensors --steps 1 {how}")[0] == 0
    np.testing.assert_array_equal(fd.load("p.safetensors").net.flat, made.net.flat)
    code, _, err = run("train curves.csv -o m.safetensors --crop 4")
    assert (code, "--crop is for pictures" in err) == (2, True)


def test_classes_have_names(run, drawer):
    assert drawer.class_names == ["ant", "cat"]
    assert drawer.net.classes == 2
    out = run("sample p.safetensors -n 5 -o all.npy --backend numpy --quiet")[1]
    assert "of ant, cat" in out
    np.testing.assert_array_equal(np.load("all.npy"), drawer.sample(5, labels=[0, 1, 0, 1, 0]))
    for words in ("cat", "1"):
        assert run(f"sample p.safetensors -n 5 -o {words}.npy --backend numpy --quiet --labels {words}")[0] == 0
        np.testing.assert_array_equal(np.load(f"{words}.npy"), drawer.sample(5, labels=1))
    assert (
        run("sample p.safetensors -n 18 -o moving.npy --gif g.gif --backend numpy --quiet --labels cat,cat,ant")[0] == 0
    )
    np.testing.assert_array_equal(np.load("moving.npy"), drawer.sample(18, labels=[1, 1, 0] * 6))
    more = "--labels cat,ant --first-sample 1"
    assert run(f"sample p.safetensors -n 2 -o two.npy --backend numpy --quiet {more}")[0] == 0
    np.testing.assert_array_equal(np.load("two.npy"), drawer.sample(2, labels=[0, 1], first_sample=1))
    assert "class names" in run("info p.safetensors")[1]


@pytest.mark.usefixtures("pictures")
def test_a_variance_is_learned(run):
    assert run(f"train classes/ant -o v.safetensors {LEARN} --steps 1 --learned-variance")[0] == 0
    model = fd.load("v.safetensors")
    assert model.net.learned_variance
    assert any(row.r != 0 for row in model.named_sampler("ddpm", None).rows)
    code, _, err = run("train classes/ant --resume v.safetensors --steps 1 --learned-variance")
    assert (code, "--learned-variance cannot change with --resume" in err) == (2, True)


def test_how_pictures_are_read_is_said(run, pictures):
    deep = np.random.default_rng(0).integers(0, 1 << 12, (3, 8, 8), np.uint16)
    for k, one in enumerate(deep):
        pytest.importorskip("PIL.Image").fromarray(one).save(f"classes/ant/deep{k}.png")
        Path(f"classes/cat/bad{k}.png").write_bytes(b"bad")
    code, _, err = run(f"train classes -o p.safetensors --overwrite --labels --steps 1 {LEARN}")
    assert code == 2
    assert "skip_bad=True (--skip-bad) leaves out what is bad; 3 of 16 pictures" in err
    code, _, err = run(
        f"train classes -o p.safetensors --overwrite --labels --steps 1 {LEARN} --skip-bad --data-range 0,4095"
    )
    assert code == 0
    assert "3 of 16 pictures left out: cat/bad0.png (not a picture)" in err
    assert "13 gray pictures" in err
    code, _, err = run("evaluate p.safetensors classes --labels --skip-bad --data-range=0,4095 -n 4 --backend numpy")
    assert code == 0
    code, _, err = run("train curves.csv -o m.safetensors --skip-bad")
    assert (code, "--skip-bad is for pictures" in err) == (2, True)
    code, _, err = run("train curves.csv -o m.safetensors --data-range 0,1")
    assert (code, "--data-range is for pictures" in err) == (2, True)


def test_training_on_pictures_goes_on_bit_for_bit(run, drawer):
    again = "--backend numpy --quiet --batch 4 --labels --flip --accumulate 2"
    X, y, _ = fd.data.load_images("classes", 4, labels=True)
    drawer.fit(X, y, steps=4, batch=4, flip=True, accumulate=2, progress=False)
    assert run(f"train classes --resume p.safetensors -o long.safetensors {again} --steps 4")[0] == 0
    assert run(f"train classes --resume p.safetensors {again} --steps 2")[0] == 0
    assert run(f"train classes --resume p.safetensors {again} --steps 2")[0] == 0
    whole, halves = (fd.load(f"{name}.safetensors", backend="numpy") for name in ("long", "p"))
    assert whole.step == halves.step == 7
    np.testing.assert_array_equal(whole.net.flat, halves.net.flat)
    np.testing.assert_array_equal(whole.net.flat, drawer.net.flat)


def test_a_snapshot_that_fails_does_not_cost_the_training(run, pictures, monkeypatch):
    from fastdiff import plots

    def save(*_):
        raise OSError("disk full")

    monkeypatch.setattr(plots, "save", save)
    code, _, err = run(f"train classes/ant -o p.safetensors --overwrite {LEARN} --steps 4 --snapshots 2")
    assert code == 0
    assert err.count("disk full") == 2
    assert fd.load("p.safetensors").step == 4


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train empty -o n.safetensors", r"empty: no pictures"),
        ("train broken -o n.safetensors", r"broken: 1 of 1 pictures cannot be used: a\.png"),
        ("train nowhere/ -o n.safetensors --size 8", r"nowhere"),
        ("train classes -o n.safetensors", r"classes: no pictures"),
        ("train classes/ant -o n.safetensors --labels", r"of no class"),
        ("train classes/ant -o n.safetensors --size 3 --channels 4,4,4", r"shape: .*a size of at least 4"),
        ("train classes/ant -o n.safetensors --network tutorial", r"--network tutorial is for curves"),
        ("train classes/ant -o n.safetensors --snapshots 0", r"--snapshots: got 0"),
        ("train classes/ant -o n.safetensors --accumulate 100", r"accumulate: got 100"),
        ("train classes/ant -o n.safetensors --dropout 1", r"dropout: got 1"),
        ("train curves.csv -o n.safetensors --flip", r"--flip is for pictures"),
        ("train curves.csv -o n.safetensors --labels", r"--labels is for pictures.*classes: --covariates NAME, or fit"),
        ("train curves.csv -o n.safetensors --dropout 0.1", r"--dropout is for pictures"),
        ("train curves.csv -o n.safetensors --accumulate 2", r"accumulate: got 2"),
        ("train classes --resume p.safetensors", r"--labels is wanted: p\.safetensors has the classes ant, cat"),
        ("train classes --resume p.safetensors --labels --size 8", r"--size cannot change"),
        ("train classes --resume p.safetensors --labels --gray", r"--gray cannot change"),
        ("train curves.csv --resume p.safetensors --labels", r"curves\.csv: .*[Nn]ot a (folder|directory)"),
        ("train other --resume p.safetensors --labels", r"--labels: the classes are \['cat'\]"),
        ("sample p.safetensors -o new --labels dog", r"--labels: 'dog', where a class from 0 to 1 .*, or ant, cat"),
        ("sample p.safetensors -o new --labels 2", r"--labels: '2'"),
        ("sample p.safetensors -o new.csv", r"new\.csv: pictures go to a folder"),
        ("sample p.safetensors -o curves.csv/", r"cannot be made as a folder"),
        ("sample p.safetensors", "give -o PATH, or --to STORE"),
        ("sample p.safetensors -o x.png --gif x.png", r"wants a file name that ends in \.gif"),
        ("sample p.safetensors -o x.png --trace x.doc", r"x\.doc"),
    ],
)
def test_bad_input_about_pictures_is_one_line(run, drawer, command, message):
    import shutil

    shutil.copytree("classes/cat", "other/cat")
    before = {path: path.is_dir() or path.read_bytes() for path in Path().rglob("*")}
    code, out, err = run(f"{command} --backend numpy")
    assert code == 2
    assert out == ""
    assert re.search(f"^fastdiff: error: .*{message}", err, re.M), err
    assert "Traceback" not in err
    assert {path: path.is_dir() or path.read_bytes() for path in Path().rglob("*")} == before


def test_the_way_of_curves_from_noise_is_drawn(run, model):
    code, _, err = run("sample m.safetensors -o x.csv --labels 1")
    assert code == 2
    assert "--labels: this model has no cl" in err
    code, out, _ = run("sample m.safetensors -n 3 -o x.csv --trace x.png --gif x.gif --quiet")
    assert code == 0
    assert "x.gif: the first 3 on their way from noise, moving" in out
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    assert Path("x.gif").read_bytes().startswith(b"GIF89a")


@pytest.fixture
def drawn(monkeypatch):
    """Every call of a function of `plots` that draws samples: its name and its options."""
    from fastdiff import plots

    calls = []

    def listened(name):
        draw = getattr(plots, name)
        monkeypatch.setattr(
            plots, name, lambda *arrays, **options: calls.append((name, options)) or draw(*arrays, **options)
        )

    for name in ("generated", "reverse_chain", "around_target", "image_grid", "image_trace"):
        listened(name)
    return calls


def test_figures_of_samples_say_how_they_were_drawn(run, model, drawer, drawn):
    how = "--sampler ddim --sample-steps 5 --quiet --backend numpy --overwrite"
    assert run(f"sample m.safetensors -o x.csv --plot x.png --trace t.png {how}")[0] == 0
    assert run(f"sample p.safetensors -n 4 -o new --plot x.png --trace t.png {how}")[0] == 0
    assert run(f"train classes -o q.safetensors --overwrite {LEARN} --labels --steps 1 --snapshots 1")[0] == 0
    said = {(name, str(options)) for name, options in drawn}
    assert len(said) == len(drawn) == 5
    assert all("ddim, 5 steps" in options for _, options in said - {("image_grid", str(drawn[-1][1]))})
    assert drawn[-1][1]["title"] == "After 1 steps: ddim, 8 steps"
    assert drawn[-1][1]["labels"] == ["ant", "cat"] * 8


def test_a_schedule_is_warned_of_once_where_a_figure_is_drawn(run):
    assert run(f"{TRAIN} -o m.safetensors --steps 1 --schedule linear --timesteps 10")[0] == 0
    for options in ("", " --plot x.png"):
        warned = run(f"sample m.safetensors -o x.csv --quiet --backend numpy --overwrite{options}")[2].count("warning")
        if not options:
            alone = warned
    assert warned == alone


# --------------------------------------------------------------------------------------- score


@pytest.mark.slow
def test_score(run, model):
    code, out, _ = run("score m.safetensors curves.csv -o nll.csv --plot bound.png --quiet --backend numpy")
    assert code == 0
    assert re.search(r"^nll\.csv: -log p of 64 rows$", out, re.M)
    assert re.search(r"^  nats a row +-?[\d.]+$", out, re.M)
    assert Path("bound.png").read_bytes().startswith(b"\x89PNG")
    nats = np.loadtxt("nll.csv", delimiter=",", skiprows=1)
    assert Path("nll.csv").read_text().splitlines()[0] == "nats,stderr"
    loaded = fd.load("m.safetensors", backend="numpy")
    np.testing.assert_allclose(nats[:, 0], -loaded.score_samples(load_curves("curves.csv")), rtol=1e-6)
    run("score m.safetensors curves.csv -o bits.csv --bits --quiet --backend numpy")
    bits = np.loadtxt("bits.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(bits[:, 0], nats[:, 0] / (12 * np.log(2)), rtol=1e-6)
    run("score m.safetensors curves.csv -o d.csv --method denoising --probes 2 --quiet --backend numpy")
    assert (np.loadtxt("d.csv", delimiter=",", skiprows=1)[:, 1] > 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [("-o nll.txt", r"\.csv"), ("-o nll.csv --probes 0", "--probes"), ("-o nll.csv --plot b.doc", r"b\.doc")],
)
def test_bad_scores(run, model, options, said):
    code, _, err = run(f"score m.safetensors curves.csv --quiet {options}")
    assert code == 2
    assert re.match(rf"fastdiff: error: .*{said}", err)
    assert files() == ["curves.csv", "m.safetensors"]


# --------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", "demo", "train", "sample", "score", "info", "doctor", "completion"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*command.split(), "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"fastdiff {command}" in text
    if command in ("demo", "train", "sample"):
        assert "--seed" in text
        assert "--backend {auto,numpy,cpu,cuda}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_examples_in_the_help_are_options_that_exist(capsys):
    parser = cli.build_parser()
    for command in ("", "demo", "train", "sample", "score", "info"):
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        for line in re.findall(r"^  fastdiff (.*?)(?:   .*)?$", capsys.readouterr().out, re.M):
            parser.parse_args(line.split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fastdiff import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'scipy', 'matplotlib', 'cupy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train none.csv -o n.safetensors", r"none\.csv: cannot be read: No such file"),
        ("train empty.csv -o n.safetensors", r"empty\.csv: empty file"),
        ("train ragged.csv -o n.safetensors", r"ragged\.csv, line 2: 1 cells, where line 1 has 2"),
        ("train words.csv -o n.safetensors", r"words\.csv, line 2, column 1: 'x' is not a number"),
        ("train nan.csv -o n.safetensors", r"nan\.csv, line 1, column 2: nan"),
        (
            "train curves.txt -o n.safetensors",
            r"'curves\.txt', wants a file name that ends in \.csv or \.npy",
        ),
        ("train curves.csv", r"say where the model goes: -o"),
        ("train curves.csv -o m.pt", r"'m\.pt', wants a file name that ends in \.safetensors"),
        (
            "train curves.csv -o none/m.safetensors",
            r"none/m\.safetensors: cannot be written: there is no folder",
        ),
        ("train curves.csv -o curves.csv/m.safetensors", r"cannot be written: there is no folder"),
        ("train curves.csv -o n.safetensors --steps 0", r"--steps: got 0, wants an integer of at least 1"),
        ("train curves.csv -o n.safetensors --batch -3", r"--batch: got -3"),
        ("train curves.csv -o n.safetensors --lr 0", r"lr: got 0"),
        ("train curves.csv -o n.safetensors --lr nan", r"lr: got nan"),
        ("train curves.csv -o n.safetensors --seed -1", r"--seed: got -1"),
        ("train curves.csv -o n.safetensors --validation 1.5", r"validation: got 1\.5"),
        ("train curves.csv -o n.safetensors --timesteps 9", r"--timesteps needs --schedule"),
        ("train curves.csv -o n.safetensors --schedule cosine --beta-end 0.1", r"mean nothing to the cosine"),
        ("train curves.csv -o n.safetensors --schedule cosine --shift 2", r"--shift means nothing to the cosine"),
        ("train curves.csv -o n.safetensors --zero-snr", r"--zero-snr needs --schedule"),
        ("train curves.csv -o n.safetensors --snr-gamma 3", r"snr_gamma: got 3.0, wants weighting='min_snr'"),
        ("train curves.csv -o n.safetensors --learned-variance", r"--learned-variance is for pictures"),
        ("train curves.csv -o n.safetensors --schedule flow --prediction noise", r"prediction: got 'noise', wants 'v'"),
        ("train curves.csv -o n.safetensors --schedule linear --timesteps 0", r"--timesteps: got 0"),
        ("train curves.csv -o n.safetensors --schedule linear --beta-end 2", r"--beta-end: got 2"),
        ("train curves.csv -o n.safetensors --loss-plot none/x.png", r"none/x\.png: cannot be written"),
        (
            "train curves.csv -o n.safetensors --loss-plot x.xyz",
            r"'x\.xyz', wants a file name that ends in \.png",
        ),
        ("train curves.csv --resume none.safetensors", r"none\.safetensors"),
        ("train curves.csv --resume cut.safetensors", r"cut\.safetensors"),
        ("train curves.csv --resume m.safetensors --lr 0", r"lr: got 0"),
        (
            "train curves.csv --resume m.safetensors --beta-start 0.1",
            r"--beta-start cannot change with --resume",
        ),
        ("train wide.csv --resume m.safetensors", r"12|points"),
        ("train curves.csv --resume weights.safetensors", r"weights\.safetensors|training"),
        ("sample none.safetensors -o x.csv", r"none\.safetensors"),
        ("sample cut.safetensors -o x.csv", r"cut\.safetensors"),
        ("sample foreign.safetensors -o x.csv", r"foreign\.safetensors"),
        ("sample curves.csv -o x.csv", r"curves\.csv"),
        ("sample m.safetensors -o x.txt", r"'x\.txt', wants a file name that ends in \.csv or \.npy"),
        ("sample m.safetensors -o none/x.csv", r"none/x\.csv: cannot be written"),
        ("sample m.safetensors -o x.csv -n 0", r"-n: got 0, wants an integer of at least 1"),
        ("sample m.safetensors -o x.csv --plot none/x.png", r"none/x\.png: cannot be written"),
        ("sample m.safetensors -o x.csv --sample-steps 0", r"steps: got 0"),
        ("sample m.safetensors -o x.csv --sample-steps 5000", r"steps: got 5000"),
        ("sample m.safetensors -o x.csv --first-sample -1", r"--first-sample: got -1"),
        ("info none.safetensors", r"none\.safetensors"),
        ("info cut.safetensors", r"cut\.safetensors"),
        ("info foreign.safetensors", r"foreign\.safetensors"),
        ("info curves.csv", r"curves\.csv"),
        ("demo -o curves.csv", r"curves\.csv: no folder can be made there"),
        ("demo --seed -1", r"--seed: got -1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, model, command, message):
    from safetensors.numpy import save_file

    Path("empty.csv").touch()
    Path("ragged.csv").write_text("1,2\n3\n")
    Path("words.csv").write_text("1,2\nx,3\n")
    Path("nan.csv").write_text("1,nan\n")
    Path("wide.csv").write_text("1,2,3,4\n5,6,7,8\n")
    Path("cut.safetensors").write_bytes(model.read_bytes()[:-10])
    save_file({"weight": np.ones(3, np.float32)}, "foreign.safetensors")
    fd.load(model).save("weights.safetensors", training=False)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    code, out, err = run(command)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("fastdiff: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in err
    assert err.endswith(lines[0] + "\n")
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("train curves.csv -o n.safetensors --backend gpu", "cuda"),
        ("train curves.csv -o n.safetensors --schedule square", "sigmoid"),
        ("train curves.csv -o n.safetensors --network big", "tutorial"),
        ("train curves.csv -o n.safetensors --steps many", "--steps"),
        ("sample m.safetensors -o x.csv --sampler plms", "dpmpp_2m"),
        ("paint", "train"),
        ("--quiet", "COMMAND"),
    ],
)
def test_unknown_names_are_told_the_known_ones(command, known, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(command.split())
    assert left.value.code == 2
    assert known in capsys.readouterr().err
    assert files() == ["curves.csv"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train curves.csv -o n.safetensors --epochs 5", "unrecognized option --epochs: did you mean --steps?"),
        ("train --epochs=5 curves.csv", "unrecognized option --epochs: did you mean --steps?"),
        ("train curves.csv --learning-rate 1", "--learning-rate: did you mean --lr?"),
        ("train curves.csv --learning_rate 1", "--learning_rate: did you mean --lr?"),
        ("train curves.csv --batch-size 1", "--batch-size: did you mean --batch?"),
        ("train curves.csv --seeed 1", "--seeed: did you mean --seed?"),
        ("train curves.csv --zzz 1", "unrecognized option --zzz"),
        ("train curves.csv -n 1", "unrecognized option -n"),
        ("train curves.csv more.csv", "unrecognized arguments: more.csv"),
        (
            "train curves.csv --batch x --epochs 5",
            "invalid int value: 'x'; unrecognized option --epochs: did you mean --steps?",
        ),
        ("sample m.safetensors -o x.csv --num-samples 5", "--num-samples: did you mean -n?"),
        ("sample m.safetensors -o x.csv --steps 5", "--steps: did you mean --sample-steps?"),
        ("sample m.safetensors --outfile x.csv", "unrecognized option --outfile: did you mean --output?"),
        ("trian curves.csv", "did you mean train?"),
        ("generate m.safetensors --epochs 3", "did you mean sample?"),
        ("paint", "'completion')"),
    ],
)
def test_mistyped_words_are_answered_by_their_command(command, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(command.split())
    assert left.value.code == 2
    usage, *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(message)
    known = command.split()[0] if command.split()[0] in ("train", "sample") else ""
    assert f"{usage} ".startswith(f"usage: fastdiff {known}".rstrip() + " ")
    assert line.startswith(f"fastdiff {known}".rstrip() + ": error: ")


def test_synonyms_are_of_words_that_exist():
    actions = cli.build_parser()._actions
    commands = next(action.choices for action in actions if action.choices)
    known = {name for command in commands.values() for action in command._actions for name in action.option_strings}
    assert set(SYNONYMS) <= known | set(commands)


def test_without_arguments_there_is_help(run):
    code, out, err = run("")
    assert code == 2
    assert out == ""
    assert "fastdiff demo" in err
    assert "start here" in err


def test_a_missing_gpu_is_one_line(run):
    if "cuda" in fd.available_backends():
        pytest.skip("there is a GPU")
    code, _, err = run("train curves.csv -o m.safetensors --backend cuda")
    assert code == 2
    assert re.fullmatch(r"fastdiff: error: .*\n", err.splitlines(keepends=True)[-1])
    assert files() == ["curves.csv"]


def test_missing_matplotlib_is_said_before_training(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(f"{TRAIN} -o m.safetensors --loss-plot loss.png")
    assert code == 2
    assert 'pip install "fastdiff-engine[plot]"' in err
    assert files() == ["curves.csv"]


def test_warnings_are_plain_lines(run):
    code, _, err = run(f"{TRAIN} -o m.safetensors --steps 1 --schedule linear --timesteps 10")
    assert code == 0
    assert re.search(r"^fastdiff: warning: .*schedule", err, re.M)
    assert ".py" not in err


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m fastdiff info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


# --------------------------------------------------------------------------------------- stopped


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the overflows on the way there
def test_training_that_diverges_keeps_the_last_good_state(run):
    save_curves("spike.csv", np.eye(64, 12) * 3)
    code, out, err = run("train spike.csv -o m.safetensors --steps 500 --lr 1e12 --backend numpy --quiet")
    assert code == 2
    assert out == ""
    assert re.search(r"^fastdiff: error: .*step \d+", err, re.M)
    if "nothing to save" in err:
        assert files() == ["curves.csv", "spike.csv"]
    else:
        assert all(np.isfinite(fd.load("m.safetensors").history["loss"]))


def test_ctrl_c_before_the_first_step_saves_nothing(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fd.Diffusion, "fit", interrupted)
    code, out, err = run(f"{TRAIN} -o m.safetensors")
    assert code == 130
    assert out == ""
    assert "nothing to save" in err
    assert files() == ["curves.csv"]


def test_ctrl_c_saves_and_the_advice_continues_the_run_bit_for_bit(run):
    # As a user: a process of its own, a real SIGINT, some steps into a training that would take hours. On our own
    # kernels: what BLAS makes of one product need not have the same bits twice.
    train = TRAIN.replace("--backend numpy", "--backend cpu") + " --no-judge"
    command = [sys.executable, "-m", "fastdiff", *train.replace("--quiet ", "").split()]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        [*command, "-o", "m.safetensors", "--steps", "10000000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        # A background job of a shell ignores SIGINT, and tests may run as one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        seen = b""
        while not re.search(rb"\b[1-9]\d*/10000000", seen):
            part = os.read(process.stderr.fileno(), 4096)
            assert part, f"ended early: {seen.decode()}"
            seen += part
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    text = err.decode()
    assert process.returncode == 130
    assert out == b""
    assert "Traceback" not in text
    step = int(re.search(r"stopped after step (\d+), saved to m\.safetensors", text).group(1))
    stopped = fd.load("m.safetensors", backend="numpy")
    assert stopped.step == step > 0
    assert files() == ["curves.csv", "m.safetensors"]

    advice = re.search(r"^continue with: fastdiff (.*)$", text, re.M).group(1)
    assert f"--steps {10_000_000 - step} " in advice
    assert run(advice.replace(f"--steps {10_000_000 - step} ", "--steps 3 ") + " --quiet")[0] == 0
    if step < 20_000:  # the whole run again, in this process
        assert run(f"{train} -o whole.safetensors --steps {step + 3}")[0] == 0
        assert Path("whole.safetensors").read_bytes() == Path("m.safetensors").read_bytes()


@pytest.mark.slow
def test_ctrl_c_in_training_by_the_rule_says_how_to_go_on_by_it(run, monkeypatch):
    def stop(self, step, loss):
        self.presses = step == 149
        return self.presses

    monkeypatch.setattr(PatientInterrupt, "wanted", stop)
    code, _, err = run(f"{TRAIN} -o m.safetensors")
    assert code == 130
    assert "are kept: \n" not in err
    advice = re.search(r"^continue with: fastdiff (.*)$", err, re.M).group(1)
    assert advice == "train curves.csv --resume m.safetensors --batch 16 --backend numpy"


def test_ctrl_c_while_saving_does_not_cost_the_training(run, monkeypatch):
    save = fd.Diffusion.save

    def impatient(model, path):
        signal.raise_signal(signal.SIGINT)
        save(model, path)

    monkeypatch.setattr(fd.Diffusion, "save", impatient)
    assert run(f"{TRAIN} -o m.safetensors --steps 3")[0] == 0
    assert fd.load("m.safetensors").step == 3


@pytest.fixture
def _ctrl_c_works():
    """As in a terminal; what is started in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_works")
def test_a_first_ctrl_c_waits_for_the_step_and_a_second_does_not(run, monkeypatch):
    presses, patient = 0, PatientInterrupt

    def press(step, loss):
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        return wanted(step, loss)

    for presses, saved in ((1, True), (2, False)):
        stop = patient()
        wanted, stop.wanted = stop.wanted, press
        monkeypatch.setattr(cli.train, "PatientInterrupt", lambda stop=stop: stop)
        code, out, err = run(f"{TRAIN} -o m{presses}.safetensors --steps 50")
        assert code == 130
        assert out == ""
        assert "Traceback" not in err
        assert Path(f"m{presses}.safetensors").exists() == saved
        assert "once more to stop at once" in err
        assert ("continue with: fastdiff train" in err) == saved
        if saved:
            assert fd.load(f"m{presses}.safetensors").step <= 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_kept_rows_are_told_and_drawn_beside_samples(run, drawn):
    train = "train curves.csv -o m.safetensors --steps 2 --batch 4 --quiet --backend numpy"
    assert run(f"{train} --keep-rows 5 --loss-plot l.png")[0] == 0
    assert re.search(r"^  kept rows +5 of them are in this file$", run("info m.safetensors")[1], re.M)
    code, out, _ = run("sample m.safetensors -n 3 -o new.csv --plot new.png --quiet --backend numpy")
    assert code == 0
    assert "new.png: the first 3 of them, beside real ones\n" in out
    assert run(f"{train} --overwrite")[0] == 0
    assert re.search(r"^  kept rows +none in this file$", run("info m.safetensors")[1], re.M)
