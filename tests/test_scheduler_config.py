"""Scheduler configurations of diffusers: read as samplers, written, and what is refused, warned of and left out."""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pytest

from fastdiff import samplers
from fastdiff.errors import ArgumentError, CheckpointError, ConversionWarning
from fastdiff.interop import load_diffusers, load_scheduler, save_scheduler
from fastdiff.schedule import Schedule

LINEAR = Schedule.linear()
LATENT = Schedule.linear(beta_start=0.00085, beta_end=0.012)
BENT = Schedule(np.linspace(1e-4, 0.02, 1000) ** 1.01)


def written(folder, **content):
    (folder / "scheduler_config.json").write_text(json.dumps(content))
    return folder


TABLES = {
    "ddpm": lambda s, **o: samplers.ddpm(s, 20, clip=1.0, spacing="leading", **o),
    "ddpm large": lambda s, **o: samplers.ddpm(s, 20, variance="large", **o),
    "ddpm learned": lambda s, **o: samplers.ddpm(s, 20, variance="learned_range", **o),
    "ddim": lambda s, **o: samplers.ddim(s, 25, clip=0.7, **o),
    "ddim final": lambda s, **o: samplers.ddim(s, 25, spacing="leading", final="sigma_min", **o),
    "euler": lambda s, **o: samplers.euler(s, 25, final="sigma_min", **o),
    "euler_ancestral": lambda s, **o: samplers.euler_ancestral(s, 25, **o),
    "heun": lambda s, **o: samplers.heun(s, 25, clip=2.0, spacing="leading", **o),
    "lms": lambda s, **o: samplers.lms(s, 25, **o),
    "dpmpp_2m": lambda s, **o: samplers.dpmpp_2m(s, 12, **o),
    "dpmpp_2m sde": lambda s, **o: samplers.dpmpp_2m(s, 20, eta=1.0, solver="heun", spacing="trailing", **o),
    "dpmpp_2m final": lambda s, **o: samplers.dpmpp_2m(s, 20, final="sigma_min", **o),
    "dpmpp_2m end": lambda s, **o: samplers.dpmpp_2m(s, 20, final="sigma_min", lower_order_final=1, **o),
    "dpmpp_3m": lambda s, **o: samplers.dpmpp_3m(s, 12, published=True, **o),
    "unipc": lambda s, **o: samplers.unipc(s, 10, lower_order_final=2, **o),
    "unipc3": lambda s, **o: samplers.unipc(s, 20, order=3, variant="bh1", final="sigma_min", **o),
    "unipc uncorrected": lambda s, **o: samplers.unipc(s, 10, lower_order_final=2, uncorrected=(0, 3), **o),
    "unipc noise": lambda s, **o: samplers.unipc(s, 10, lower_order_final=2, predict_x0=False, **o),
    "dpmsolver": lambda s, **o: samplers.dpmsolver(s, 20, final="sigma_min", **o),
    "dpmsolver sde": lambda s, **o: samplers.dpmsolver(s, 20, eta=1.0, solver="heun", final="sigma_min", **o),
    "single": lambda s, **o: samplers.dpmsolver_single(s, 10, **o),
    "single3": lambda s, **o: samplers.dpmsolver_single(s, 12, order=3, solver="heun", **o),
    "single noise": lambda s, **o: samplers.dpmsolver_single(s, 12, predict_x0=False, final="sigma_min", **o),
    "single sde": lambda s, **o: samplers.dpmsolver_single(s, 12, eta=1.0, **o),
    "sa_solver": lambda s, **o: samplers.sa_solver(s, 20, corrector=3, lower_order_final=2, final="sigma_min", **o),
    "pndm": lambda s, **o: samplers.pndm(s, 20, spacing="leading", **o),
    "pndm final": lambda s, **o: samplers.pndm(s, 20, spacing="leading", final="sigma_min", **o),
    "dpm2_ancestral": lambda s, **o: samplers.dpm2_ancestral(s, 20, **o),
    "lcm": lambda s, **o: samplers.lcm(s, 5, timestep_scaling=3.0, clip=1.0, **o),
    "tcd": lambda s, **o: samplers.tcd(s, 5, final="sigma_min", **o),
    "deis": lambda s, **o: samplers.deis(s, 10, order=3, final="sigma_min", lower_order_final=2, **o),
}


def loud(schedule, steps):
    """Karras' levels as other programs have them, from the last timestep."""
    return schedule.timesteps(steps, spacing="karras", sigma_max=np.inf)


WARNED = {  # what diffusers does otherwise
    "dpm2": (lambda s, **o: samplers.dpm2(s, 20, **o), "the middle of a step becomes a timestep"),
    "dpmpp_sde": (lambda s, **o: samplers.dpmpp_sde(s, 20, **o), "the middle of a step becomes a timestep"),
    "karras": (
        lambda s, **o: samplers.dpmpp_2m(s, 20, spacing=loud(s, 20), **o),
        "use_karras_sigmas: its levels",
    ),
    "karras heun": (
        lambda s, **o: samplers.heun(s, 18, spacing=loud(s, 18), **o),
        "use_karras_sigmas: its levels",
    ),
    "karras deis": (
        lambda s, **o: samplers.deis(s, 12, spacing=loud(s, 12), final="sigma_min", lower_order_final=2, **o),
        "use_karras_sigmas: its levels",
    ),
    "clipped": (lambda s, **o: samplers.unipc(s, 10, lower_order_final=2, clip=1.0, **o), "clip = "),
}


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("name", TABLES)
def test_what_is_written_is_read(name, prediction, tmp_path):
    schedules = [LINEAR, BENT, *([LINEAR.zero_terminal_snr(), Schedule.cosine(1000)] if prediction == "v" else [])]
    for schedule in schedules:
        table = TABLES[name](schedule, prediction=prediction)
        steps = table.options["steps"]
        with warnings.catch_warnings():  # of pndm with v, which theirs remembers
            ignored = table.name == "pndm" and prediction == "v"
            warnings.simplefilter("ignore" if ignored else "error", ConversionWarning)
            save_scheduler(table, tmp_path)
            assert load_scheduler(tmp_path, steps) == table


FLOW = Schedule.flow(1000, shift=3.0)
FLOWS = {
    "euler": lambda **o: samplers.euler(FLOW, 10, spacing="linspace", **o),
    "heun": lambda **o: samplers.heun(FLOW, 10, spacing="linspace", velocity=True, **o),
    "stochastic": lambda **o: samplers.lcm(FLOW, 10, spacing="linspace", timestep_scaling=np.inf, **o),
    "unipc": lambda **o: samplers.unipc(FLOW, 10, lower_order_final=2, **o),
    "dpmpp_2m": lambda **o: samplers.dpmpp_2m(FLOW, 20, **o),
    "single": lambda **o: samplers.dpmsolver_single(FLOW, 10, **o),
}


@pytest.mark.filterwarnings("ignore:.*shifted twice:fastdiff.errors.ConversionWarning")
@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_written_and_read(name, tmp_path):
    table = FLOWS[name](prediction="velocity")
    with pytest.warns(ConversionWarning, match="a network is told T sigma there"):
        save_scheduler(table, tmp_path)
    content = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert 3.0 in (content.get("shift"), content.get("flow_shift"))
    with pytest.warns(ConversionWarning, match="a network is told T sigma there"):
        found = load_scheduler(tmp_path, 20 if name == "dpmpp_2m" else 10)
    assert found.rows == table.rows
    assert found.schedule == FLOW
    assert found.prediction == "velocity"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: samplers.ddim(LINEAR, 10, eta=0.5), r"eta: got 0.5, wants 0.0"),
        (lambda: samplers.ddim(LINEAR, 10, clip=1.0, reclip=True), r"reclip: got True, wants False"),
        (lambda: samplers.lms(LINEAR, 10, final="sigma_min"), r"final: got 'sigma_min', wants 'zero'"),
        (lambda: samplers.euler(LINEAR, 10, churn=4), r"churn: got 4, wants 0.0"),
        (lambda: samplers.consistency(LINEAR, 2), r"sampler: got .*consistency.*no scheduler of it is consistency"),
        (lambda: samplers.ddim(LINEAR, 10, clip=(-1, 2)), r"clip: got \(-1, 2\), wants None"),
        (lambda: samplers.heun(LINEAR, 12, churn=4), r"churn: got 4, wants 0.0"),
        (lambda: samplers.heun(LINEAR, 12, churn=4, s_noise=1.1), r"churn: got 4, wants 0.0"),
        (lambda: samplers.ddim(LINEAR, 9, eta=0.5, spacing="lambda"), r"eta, spacing: got ddim with eta=0.5, spacing="),
        (lambda: samplers.lms(LINEAR, 12, order=3), r"order: got 3, wants 4"),
        (lambda: samplers.dpmpp_3m(LINEAR, 12), r"published: got False, wants True"),
        (lambda: samplers.dpmpp_2m(LINEAR, 12, spacing="lambda"), r"spacing: got 'lambda', wants 'linspace_open'"),
        (
            lambda: samplers.sa_solver(LINEAR, 12, tau=0.5, final="sigma_min", lower_order_final=2),
            r"tau: got 0.5, wants 1.0",
        ),
        (lambda: samplers.dpmpp_2s(LINEAR, 12), r"sampler: got .*dpmpp_2s.*no scheduler of it is dpmpp_2s"),
        (lambda: samplers.ipndm(LINEAR, 12), r"sampler: got .*ipndm.*no scheduler of it is ipndm"),
        (lambda: samplers.ddim(LINEAR, 10, prediction="velocity"), r"prediction: got 'velocity'.*for flows only"),
        (
            lambda: samplers.euler(FLOW, 10, spacing="linspace", prediction="v"),
            r"prediction: got 'v', wants 'velocity'",
        ),
        (
            lambda: samplers.ddim(FLOW, 10, eta=0.5, spacing="linspace", prediction="velocity"),
            r"eta: got 0.5, wants 0.0",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::fastdiff.errors.ConversionWarning")
def test_the_option_that_is_not_written_is_named(make, words, tmp_path):
    with pytest.raises(ArgumentError, match=words):
        save_scheduler(make(), tmp_path / "not made")
    assert not (tmp_path / "not made").exists()


def test_a_table_says_what_made_it():
    table = samplers.heun(LINEAR, 12, churn=4, clip=1.0, prediction="v")
    assert dict(table.options) == {"steps": 12, "churn": 4, "clip": 1.0}
    assert pickle.loads(pickle.dumps(table)).options == table.options
    assert dict(table.unclipped().options) == {"steps": 12, "churn": 4}
    assert dict(samplers.ddpm(LINEAR).options) == {"steps": 1000}
    assert not samplers.Sampler(table.rows, LINEAR).options


@pytest.mark.parametrize("name", WARNED)
def test_what_is_written_with_a_warning_is_read(name, tmp_path):
    make, words = WARNED[name]
    table = make(LINEAR)
    with pytest.warns(ConversionWarning, match=words) as caught:
        save_scheduler(table, tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="ignore", category=ConversionWarning):
        assert load_scheduler(tmp_path, table.options["steps"], **({"clip": 1.0} if name == "clipped" else {})) == table


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "dpm2_ancestral"])
def test_levels_that_begin_below_theirs_are_written_with_a_warning(name, tmp_path):
    table = getattr(samplers, name)(Schedule.cosine(1000), 18, spacing="karras")
    with warnings.catch_warnings(record=True, action="always") as caught:
        save_scheduler(table, tmp_path)
    assert "its loudest level is 160 here, that of T - 1 there" in " ".join(str(each.message) for each in caught)
    with warnings.catch_warnings(action="ignore", category=ConversionWarning):
        assert load_scheduler(tmp_path, 18).timesteps[0] == 999
        assert load_scheduler(tmp_path, 18, spacing="karras") == table


def test_the_defaults_are_theirs(tmp_path):
    """What a configuration without keys means: as their constructors have it."""
    with pytest.warns(ConversionWarning, match="fractions of timesteps are rounded"):
        assert (
            load_scheduler(written(tmp_path, _class_name="LMSDiscreteScheduler"), 20).rows
            == samplers.lms(LINEAR, 20, spacing="linspace").rows
        )
    expected = {
        "DDPMScheduler": samplers.ddpm(LINEAR, 10, clip=1.0, spacing="leading"),
        "DDIMScheduler": samplers.ddim(LINEAR, 10, clip=1.0, spacing="leading"),
        "EulerDiscreteScheduler": samplers.euler(LINEAR, 10, spacing="linspace"),
        "EulerAncestralDiscreteScheduler": samplers.euler_ancestral(LINEAR, 10, spacing="linspace"),
        "HeunDiscreteScheduler": samplers.heun(LATENT, 10, spacing="linspace"),
        "DDIMParallelScheduler": samplers.ddim(LINEAR, 10, clip=1.0, spacing="leading"),
        "DPMSolverSinglestepScheduler": samplers.dpmsolver_single(LINEAR, 10),
        "DPMSolverMultistepScheduler": samplers.dpmpp_2m(LINEAR, 10),
        "UniPCMultistepScheduler": samplers.unipc(LINEAR, 10),
        "DEISMultistepScheduler": samplers.deis(LINEAR, 10, lower_order_final=2, final="sigma_min"),
        "FlowMatchLCMScheduler": samplers.lcm(
            Schedule.flow(1000), 10, spacing="linspace", timestep_scaling=np.inf, prediction="velocity"
        ),
        "PNDMScheduler": samplers.pndm(LINEAR, 10, spacing="leading", final="sigma_min"),
    }
    for kind, table in expected.items():
        with warnings.catch_warnings():  # FlowMatchLCM of T sigma, PNDM of its start
            warnings.simplefilter("ignore" if kind in ("FlowMatchLCMScheduler", "PNDMScheduler") else "error")
            assert load_scheduler(written(tmp_path, _class_name=kind, _diffusers_version="0.42.1"), 10) == table, kind
    assert load_scheduler(written(tmp_path), 10) == expected["DDPMScheduler"]  # as old files are
    pipeline = tmp_path / "pipeline"
    (pipeline / "scheduler").mkdir(parents=True)
    written(pipeline / "scheduler", _class_name="DDIMScheduler")
    assert load_scheduler(pipeline, 10) == expected["DDIMScheduler"]
    assert (
        load_scheduler(pipeline, 10, eta=1.0, clip=None).rows
        == samplers.ddim(LINEAR, 10, eta=1.0, spacing="leading").rows
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"_class_name": "DDIMScheduler", "steps_offset": 1}, "steps_offset = 1"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, "timestep_spacing = 'trailing'"),
        ({"_class_name": "DDPMScheduler", "thresholding": True}, "thresholding = True"),
        ({"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_beta_sigmas": True},
            "use_beta_sigmas.*quantiles of sigma",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"}, "timestep_spacing = 'leading'"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "has the wrong sign there",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "sigma_max": 80.0, "timestep_spacing": "trailing"},
            "sigma_max = 80.0",
        ),
    ],
)
def test_what_is_done_otherwise_is_warned_of(content, words, tmp_path):
    with pytest.warns(ConversionWarning, match=words) as caught:
        load_scheduler(written(tmp_path, **content), 9)
    assert caught[0].filename == __file__
    assert str(tmp_path) in str(caught[0].message)


@pytest.mark.parametrize(
    "content",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0},
        {"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5, 1.0]},
        {"_class_name": "UniPCMultistepScheduler", "euler_at_final": True},  # an option of others
        {"_class_name": "UniPCMultistepScheduler", "disable_corrector": 2},
        {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [-1]},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},  # of the noise, at a level of noise
        {"_class_name": "DDPMScheduler", "variance_type": "learned"},
        {"_class_name": "SASolverScheduler", "tau_func": "some"},
        {"_class_name": "IPNDMScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": ["DDPMScheduler"]},
        {"_class_name": "RePaintScheduler"},  # its levels are known, its method is no table
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "deis"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4},
        {"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "UniPCMultistepScheduler", "solver_p": "DDIMScheduler"},
        {"_class_name": "DDPMScheduler", "variance_type": "fixed"},
        {"_class_name": "DDPMScheduler", "clip_sample_range": 0},
        {"_class_name": "DDIMScheduler", "a_key_of_tomorrow": 2},
        {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
        {"_class_name": "DDIMScheduler", "timestep_spacing": "even"},
        {"_class_name": "DDIMScheduler", "clip_sample": "false"},
        {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": "yes"},
        {"_class_name": "UniPCMultistepScheduler", "lower_order_final": 3},
        {"_class_name": "UniPCMultistepScheduler", "lambda_min_clipped": "low"},
        {"_class_name": "DDIMScheduler", "steps_offset": "one"},
        {"_class_name": "PNDMScheduler", "timestep_spacing": "trailing", "steps_offset": "one"},
        {"_class_name": "LCMScheduler", "steps_offset": [1]},
        {"_class_name": "DDIMScheduler", "clip_sample": False, "clip_sample_range": "wide"},
        {"_class_name": "UniPCMultistepScheduler", "sample_max_value": "large"},
    ],
)
def test_what_we_do_not_have_is_refused(content, tmp_path):
    with pytest.raises(CheckpointError, match=r"scheduler_config.json: \w+: got .*, wants "):
        load_scheduler(written(tmp_path, **content), 9)


def test_other_errors(tmp_path, caplog):
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_scheduler(tmp_path / "nowhere", 9)
    written(tmp_path, _class_name="DDIMScheduler", a_key_of_tomorrow=None)
    with caplog.at_level("INFO", "fastdiff"):
        load_scheduler(tmp_path, 10)
    assert "a_key_of_tomorrow = None" in caplog.text
    for steps in (0, 1001, 2.5):
        with pytest.raises(ArgumentError, match="steps: got"):
            load_scheduler(tmp_path, steps)
    with pytest.raises(ArgumentError, match="eta: got 2"):
        load_scheduler(tmp_path, 10, eta=2)
    for option in ("churn", "prediction", "schedule"):
        with pytest.raises(ArgumentError, match=f"{option}: got 1, wants an option of ddim: clip, eta"):
            load_scheduler(tmp_path, 10, **{option: 1})
    with pytest.raises(ArgumentError, match=r"sampler: got <Sampler custom.*, wants a table that a scheduler"):
        save_scheduler(samplers.Sampler(samplers.ddim(LINEAR, 10).rows, LINEAR), tmp_path / "not made")
    with pytest.raises(ArgumentError, match="sampler: got str"):
        save_scheduler("ddim", tmp_path / "not made")
    with pytest.raises(ArgumentError, match=r"folder: got '', wants a path.* not empty"):
        save_scheduler(samplers.ddim(LINEAR, 10), "")
    assert not (tmp_path / "not made").exists()


def test_networks_are_not_loaded_with_levels_that_are_not_theirs(tmp_path):
    import fastdiff as fd

    net = fd.UNet((8, 8, 1), channels=(8,), blocks=1, T=50, groups=4)
    net.save_diffusers(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    written(tmp_path / "scheduler", _class_name="EDMEulerScheduler", num_train_timesteps=50)
    with pytest.raises(CheckpointError, match="_class_name: got 'EDMEulerScheduler'"):
        load_diffusers(tmp_path)
    written(tmp_path / "scheduler", _class_name="PNDMScheduler", num_train_timesteps=50, beta_end=0.3)
    assert load_diffusers(tmp_path)[1].T == 50


@pytest.mark.parametrize(
    ("name", "option"),
    [("dpmpp_3m", "published"), ("deis", "final"), ("dpmsolver", "final"), ("tcd", "final"), ("euler", "spacing")],
)
def test_what_no_scheduler_stands_for_is_named(name, option, tmp_path):
    schedule = Schedule.flow(50) if name == "euler" else Schedule.cosine(50)
    prediction = "velocity" if name == "euler" else "noise"
    with pytest.raises(ArgumentError, match=f"^{option}: got"):
        save_scheduler(samplers.named(name, schedule, 8, prediction=prediction), tmp_path)
