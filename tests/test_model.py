"""`Diffusion` of curves: a run in parts is one run, what fit counts and keeps, what samples depend on, interrupts."""

import copy
import pickle
import signal
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import defaults
from fastdiff.backends import TrainState, get_backend
from fastdiff.errors import ArgumentError, BackendError, CheckpointError, TrainingError
from fastdiff.nn.optim import TrainingPlan
from fastdiff.normaliser import Normaliser
from fastdiff.split import split
from fastdiff.training import Trainer

T = 12
CURVES = fd.data.harmonic_curves(40, points=9, seed=3)
QUIET = {"batch": 8, "progress": False}
PLAN = {"lr": 0.01, "warmup": 3, "decay_steps": 9, "clip_norm": 0.5, "ema": 0.95}

NETS = {
    "default": lambda: fd.MLP(9, hidden=(16, 11), T=T, seed=1),
    "tutorial": lambda: fd.MLP.tutorial(9, T=T, seed=1),
    "unet": lambda: fd.UNet((9,), channels=(4, 8), blocks=1, T=T, groups=2, dropout=0.2, seed=1),
}


def model(backend="numpy", kind="default", **options):
    options = {"seed": 4, "prediction": "noise", **options}
    return fd.Diffusion(NETS[kind](), fd.Schedule.cosine(T), backend=backend, **options)


def fit(made, steps, X=CURVES, **options):
    return made.fit(X, steps=steps, **{**QUIET, **options})


def assert_same_model(one, other):
    """All that training has made, to the bit."""
    assert (one.step, one.ema_updates) == (other.step, other.ema_updates)
    for name in ("step", "loss"):
        assert one.history[name] == other.history[name]
    for ema in (True, False):
        assert_same_bits(one.denoiser(ema=ema).flat, other.denoiser(ema=ema).flat)
    for name in ("m", "v"):
        assert_same_bits(getattr(one._optimizer, name), getattr(other._optimizer, name))
    assert one.normaliser == other.normaliser


# --------------------------------------------------------------------------------------- a run in parts


def saved_and_loaded(made, folder):
    made.save(folder / "m.safetensors")
    return fd.load(folder / "m.safetensors", backend=made.backend)


AGAIN = {
    "the same object": lambda made, folder: made,
    "a file": saved_and_loaded,
    "a copy": lambda made, folder: copy.deepcopy(made),
    "a pickle": lambda made, folder: pickle.loads(pickle.dumps(made)),
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("kind", NETS)
def test_parts_of_a_run_are_the_run(backend, kind, again, tmp_path):
    options = {**PLAN, "validation": 0.25}
    whole = fit(model(backend, kind, prediction="v"), 7, **options)
    parts = fit(model(backend, kind, prediction="v"), 4, **options)
    parts = AGAIN[again](parts, tmp_path)
    fit(parts, 0, validation=0.25)  # the saved plan stays
    parts = AGAIN[again](fit(parts, 1, **options), tmp_path)
    fit(parts, 2, validation=0.25)
    assert_same_model(parts, whole)
    assert parts.history == whole.history
    for options in ({}, {"sampler": "ddim", "steps": 4, "ema": False}, {"sampler": "dpmpp_2m", "steps": 4}):
        assert_same_bits(parts.sample(3, **options), whole.sample(3, **options))


def test_a_loaded_model_goes_on_where_the_first_one_would(backend, tmp_path):
    """On the other backend too: as near as backends are."""
    there = {"numpy": "cpu", "cpu": "numpy"}[backend]
    made = fit(model(backend), 3)
    made.save(tmp_path / "m.safetensors")
    other = fd.load(tmp_path / "m.safetensors", backend=there)
    assert_same_bits(other.net.flat, made.net.flat)
    for each in (made, other):
        fit(each, 3)
    np.testing.assert_allclose(other.history["loss"], made.history["loss"], rtol=1e-5)
    assert other.backend == there


@pytest.mark.parametrize("kind", NETS)
def test_every_choice_and_none_changes_the_bits(kind):
    """What a run depends on, and what it does not."""
    base = fit(model(kind=kind), 3, **PLAN)
    for same in ({"callback": lambda step, loss: None}, {"progress": True}):
        assert_same_model(fit(model(kind=kind), 3, **PLAN, **same), base)
    for other in ({"seed": 5}, {"prediction": "x0"}):
        assert not np.array_equal(fit(model(kind=kind, **other), 3, **PLAN).net.flat, base.net.flat)
    for other in ({"lr": 0.02}, {"batch": 9}, {"warmup": 2}, {"clip_norm": 0.01}, {"validation": 0.25}):
        assert not np.array_equal(fit(model(kind=kind), 3, **{**PLAN, **other}).net.flat, base.net.flat)
    other = fit(model(kind=kind), 3, **{**PLAN, "ema": 0.1})
    assert_same_bits(other.net.flat, base.net.flat)
    assert not np.array_equal(other.denoiser().flat, base.denoiser().flat)


# --------------------------------------------------------------------------------------- the first fit, and reset


def test_the_first_fit_chooses_what_is_not_given():
    made = fd.Diffusion(backend="numpy", seed=7)
    assert (made.net, made.schedule, made.normaliser) == (None, None, None)
    fit(made, 0)
    assert (made.net.points, made.net.T, made.net.seed) == (9, 200, 7)
    assert made.schedule == fd.Schedule.sigmoid(200, beta_start=1e-5, beta_end=0.1)
    assert made.normaliser == Normaliser.of(CURVES).centred(CURVES)
    assert made.step == 0
    weights, plain = made.net.params, fd.MLP(9, hidden=made.net.hidden, T=200, seed=7).params
    # The Gaussian's output has no constant, and a first layer sees along its axes.
    turned = made._gaussian.turned(plain["layers.0.weight"].astype(np.float64)).astype(np.float32)
    expected = {**plain, "layers.3.bias": np.zeros(9, np.float32), "layers.0.weight": turned}
    assert not np.allclose(turned, plain["layers.0.weight"])
    for name, view in weights.items():
        assert_same_bits(view, expected[name])
    assert_same_bits(made.denoiser().flat, made.net.flat)
    assert fd.Diffusion(fd.MLP(9, T=30)).schedule == defaults.usual_schedule(30) == fd.Schedule.cosine(30)


def test_later_fits_keep_the_normaliser(backend):
    made = fit(model(backend), 1)
    before = made.normaliser
    assert before.mean == pytest.approx(CURVES.mean(dtype=np.float64))
    assert before.std == pytest.approx(CURVES.std(dtype=np.float64))
    fit(made, 1, X=10 * CURVES + 3)
    assert made.normaliser == before


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", NETS)
def test_reset_is_a_new_model(kind, own, backend):
    def new():
        return fd.Diffusion(None if own else NETS[kind](), backend=backend, seed=4)

    made = fit(new(), 3, **PLAN)
    made.class_names = ["x"]
    assert made.reset() is made
    assert (made.step, made.ema_updates, made.normaliser, made.class_names) == (0, 0, None, None)
    assert set(map(len, made.history.values())) == {0}
    with pytest.raises(TrainingError, match="call fit first"):
        made.sample(1)
    if own:
        assert made.net is None
    else:
        assert_same_bits(made.net.flat, NETS[kind]().flat)
    assert_same_model(fit(made, 2, X=2 * CURVES, lr=0.03), fit(new(), 2, X=2 * CURVES, lr=0.03))


def test_a_reset_model_takes_curves_of_another_length_where_the_network_is_its_own():
    assert fit(fit(fd.Diffusion(backend="numpy"), 1).reset(), 1, X=CURVES[:, :5]).net.points == 5
    with pytest.raises(ArgumentError, match=r"^X: got shape"):
        fit(fit(model(), 1).reset(), 1, X=CURVES[:, :5])


OTHER = {
    "lr": [1e-3, 0.02], "warmup": [0, 4], "decay_steps": [None, 20], "clip_norm": [1.0, None], "ema": [0.999, None],
}  # fmt: skip


@pytest.mark.parametrize(("name", "other"), [(name, value) for name, values in OTHER.items() for value in values])
def test_a_later_fit_changes_what_it_names_and_nothing_else(name, other, tmp_path, caplog):
    made = fit(model(), 2, **PLAN)
    by_hand = copy.deepcopy(made)
    with caplog.at_level("INFO"):
        fit(made, 2, **{name: other})
    assert f"from step 2 on: {name} {other} ({getattr(by_hand._optimizer.plan, name)} before)" in caplog.text
    want = replace(by_hand._optimizer.plan, **{name: other})
    assert made._optimizer.plan == want
    by_hand._optimizer = by_hand._optimizer._replace(plan=want)  # moments, averages and counts as they are
    fit(by_hand, 2)
    assert_same_model(made, by_hand)
    assert saved_and_loaded(made, tmp_path)._optimizer.plan == want
    fit(made, 1)
    assert made._optimizer.plan == want
    assert fit(made.reset(), 1)._optimizer.plan == TrainingPlan()


def test_a_change_that_does_nothing_says_so(caplog):
    made = fit(model(), 6, **PLAN)
    fit(made, 1, warmup=4)
    assert "warmup=4 has no effect" in caplog.text


def test_a_later_fit_whose_length_is_a_rule_keeps_a_decay_that_is_named():
    made = fit(model(), 2)
    made.fit(CURVES, decay_steps=9, callback=lambda step, loss: True, progress=False, judge=False)
    assert (made.step, made._optimizer.plan.decay_steps) == (3, 9)
    made.fit(CURVES, callback=lambda step, loss: True, progress=False, judge=False)
    assert made._optimizer.plan.decay_steps == made.end_step


# --------------------------------------------------------------------------------------- history and counters


def test_history_counts_every_step(backend):
    made = fit(model(backend), 3)
    assert fit(made, 0) is made
    fit(made, 2)
    assert made.history["step"] == [0, 1, 2, 3, 4]
    assert len(made.history["loss"]) == 5
    assert all(isinstance(loss, float) and np.isfinite(loss) for loss in made.history["loss"])
    assert made.history["validation_step"] == made.history["validation_loss"] == []
    assert made.step == made.ema_updates == 5


def test_a_loss_belongs_to_the_weights_before_its_step(backend):
    one, other = (fit(model(backend), 2, lr=lr) for lr in (1e-3, 0.1))
    assert one.history["loss"][0] == other.history["loss"][0]
    assert one.history["loss"][1] != other.history["loss"][1]


def test_the_rate_is_that_of_the_absolute_step(backend):
    """Adam moves the most certain weight by about the rate, whatever the gradient is."""
    made, plan = model(backend), TrainingPlan(**PLAN)
    weights = [made.net.flat.copy()]
    for steps in (2, 1, 4, 8):
        fit(made, steps, callback=lambda step, loss: weights.append(made.net.flat.copy()), **PLAN)
    for step, (before, after) in enumerate(pairwise(weights)):
        assert 0.6 < np.abs(after - before).max() / plan.rate(step) < 1.4, step


def test_losses_fall(backend):
    losses = fit(model(backend), 300, batch=32, lr=0.01).history["loss"]
    assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:20])


@pytest.mark.parametrize("kind", NETS)
def test_the_average_follows_its_formula(backend, kind):
    """average += (1 - d) (weights - average) with d = min(ema, (1 + n) / (10 + n)) after n updates, through a file."""
    seen = []
    made = model(backend, kind)
    average = made.net.flat.astype(np.float64)

    def keep(step, loss):
        seen.append(made.net.flat.astype(np.float64))

    for _ in range(2):
        fit(made, 4, lr=0.05, ema=0.2, callback=keep)
    assert made.ema_updates == 8
    for n, weights in enumerate(seen):
        average += (1 - min(0.2, (1 + n) / (10 + n))) * (weights - average)
    assert_close(made.denoiser().flat, average.astype(np.float32), terms=8)
    assert np.abs(made.denoiser().flat - made.net.flat).max() > 1e-3


def test_without_an_average_it_is_the_weights(backend):
    made = fit(model(backend), 3, ema=None)
    assert_close(made.denoiser().flat, made.net.flat)  # average + (weights - average), which is rounded
    assert made.ema_updates == 3


def test_the_counter_of_the_average_is_its_own(tmp_path):
    """A file may say another number of updates than of steps."""
    made = fit(model(), 3, ema=0.9)
    other = copy.deepcopy(made)
    other.ema_updates = 1000
    for each in (made, other):
        fit(each, 1)
    assert_same_bits(other.net.flat, made.net.flat)
    assert not np.array_equal(other.denoiser().flat, made.denoiser().flat)
    other.save(tmp_path / "m.safetensors")
    assert fd.load(tmp_path / "m.safetensors").ema_updates == 1001


# --------------------------------------------------------------------------------------- validation


def test_validation_is_every_hundred_steps_and_once_at_each(backend):
    made = model(backend)
    for steps in (100, 0, 30, 71):
        fit(made, steps, batch=2, validation=0.25)
    assert made.history["validation_step"] == [0, 100, 200]
    whole = fit(model(backend), 201, batch=2, validation=0.25)
    assert whole.history == made.history


@pytest.mark.parametrize(("kind", "prediction"), [("default", "noise"), ("tutorial", "v"), ("unet", "x0")])
def test_validation_is_the_loss_of_the_average_on_fixed_noise(backend, kind, prediction):
    rows = fd.data.harmonic_curves(7, points=9, seed=8)
    made = fit(model(backend, kind, prediction=prediction), 0, validation=rows, **PLAN)
    x0 = ((rows.astype(np.float64) - made.normaliser.mean) / made.normaliser.std).astype(np.float32)
    t = np.arange(7) * T // 7
    x, eps = fd.forward_noise(x0, t, made.schedule, seed=4, backend=backend)
    v = made.schedule.signal[t, None] * eps - made.schedule.noise[t, None] * x0
    target = {"noise": eps, "x0": x0, "v": v}[prediction]
    fit(made, 100, validation=rows, **PLAN)
    assert made.history["validation_step"] == [0, 100]
    for weights, got in zip(
        (model(backend, kind).net.flat, made.denoiser().flat), made.history["validation_loss"], strict=True
    ):
        out = made.net.predict(x, t, backend=backend, flat=weights)
        assert got == pytest.approx(np.mean(np.square(out.astype(np.float64) - target)), rel=1e-6)


def test_a_fraction_holds_out_the_same_rows_and_they_are_not_trained_on():
    rows, labels, (held, of_held), *_ = split(CURVES, None, 0.3, None, None, 4, get_backend("numpy"))
    assert labels is None
    assert of_held is None
    assert (len(rows), len(held)) == (28, 12)
    assert_same_bits(np.sort(np.concatenate([rows, held]), axis=0), np.sort(CURVES, axis=0))
    again = split(CURVES, None, 0.3, None, None, 4, get_backend("numpy"))
    assert_same_bits(again[0], rows)
    assert not np.array_equal(split(CURVES, None, 0.3, None, None, 5, get_backend("numpy"))[0], rows)
    by_fraction = fit(model(), 3, validation=0.3)
    by_rows = fit(model(), 3, X=rows, validation=held)
    assert_same_model(by_fraction, by_rows)
    assert by_fraction.history == by_rows.history


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (-0.1, "validation: got -0.1"), (1.0, "validation: got 1.0"), (0.001, "holds out 1 to 39 of the 40 rows"),
        (np.zeros((0, 9)), "validation: got no curves"), (np.zeros((2, 8)), r"validation: got shape \(2, 8\)"),
        ("all", "validation: got 'all'"),
    ],
)  # fmt: skip
def test_bad_validation_is_refused(validation, message):
    made = model()
    with pytest.raises(ArgumentError, match=message):
        fit(made, 1, validation=validation)
    assert made.normaliser is None


# --------------------------------------------------------------------------------------- callbacks and interrupts


def test_a_callback_sees_every_step_and_the_weights_after_it(backend):
    seen = []
    made = model(backend)

    def look(step, loss):
        seen.append((step, loss, made.step, made.net.flat.copy()))

    fit(made, 3, callback=look)
    fit(made, 2, callback=look)
    assert [step for step, *_ in seen] == made.history["step"]
    assert [loss for _, loss, *_ in seen] == made.history["loss"]
    assert [after for *_, after, _ in seen] == [1, 2, 3, 4, 5]
    for steps in (1, 4):
        assert_same_bits(seen[steps - 1][-1], fit(model(backend), steps).net.flat)


def test_a_callback_stops_the_training(backend):
    made = fit(model(backend), 50, callback=lambda step, loss: step == 2)
    assert_same_model(made, fit(model(backend), 3))
    assert_same_model(fit(made, 1), fit(model(backend), 4))


def test_a_callback_that_raises_leaves_a_sound_state(backend):
    made = model(backend)

    def fail(step, loss):
        if step == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit(made, 50, callback=fail)
    assert_same_model(fit(made, 2), fit(model(backend), 5))


@pytest.fixture
def _ctrl_c_works():
    """As in a terminal; what is started in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_works")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_takes_effect_after_a_whole_step(backend, presses, tmp_path):
    def press(step, loss):
        if step == 2:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    made = model(backend)
    with pytest.raises(KeyboardInterrupt):
        fit(made, 50, callback=press)
    assert 3 <= made.step <= 4  # the one that was under way is finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    made = saved_and_loaded(made, tmp_path)
    assert_same_model(fit(made, 6 - made.step), fit(model(backend), 6))


@pytest.mark.usefixtures("_ctrl_c_works")
def test_the_third_ctrl_c_is_at_once():
    presses = []

    def press(step, loss):
        for count in range(3):
            presses.append(count)
            signal.raise_signal(signal.SIGINT)
        presses.append("still here")

    with pytest.raises(KeyboardInterrupt):
        fit(model(), 50, callback=press)
    assert presses == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_ctrl_c_works")
def test_somebody_else_s_handler_stays():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    made = fit(model(), 3, callback=lambda step, loss: signal.raise_signal(signal.SIGINT))
    assert made.step == 3
    assert seen == [signal.SIGINT] * 3


def test_training_in_another_thread():
    made = model()
    thread = threading.Thread(target=fit, args=(made, 3))
    thread.start()
    thread.join()
    assert_same_model(made, fit(model(), 3))


def test_steps_at_the_end_of_a_decay_say_so(caplog):
    with caplog.at_level("INFO"):
        made = fit(model(), 4, decay_steps=4)
        assert "the rate has fallen" not in caplog.text
        fit(made, 1)
    assert "the rate has fallen to 1e-05 by step 4 and stays there" in caplog.text


# --------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", ["default", "tutorial"])
def test_what_is_not_finite_leaves_the_state_before_it(backend, kind):
    made = fit(model(backend, kind), 2, **PLAN)
    kept = copy.deepcopy(made)
    with (
        np.errstate(all="ignore"),
        pytest.raises(TrainingError, match=r"in step 2: stopped; the model keeps the state"),
    ):
        fit(made, 5, X=np.full((40, 9), 1e30))
    assert_same_model(made, kept)
    assert_same_model(fit(made, 1), fit(kept, 1))


def test_weights_are_checked_after_the_last_step_too(backend):
    made = fit(fd.Diffusion(fd.MLP.tutorial(9, T=200), backend=backend), 2)
    made.net.params["time.weight"][7] = 1e37  # of a timestep that the next batch has not: the loss shows nothing
    with (
        np.errstate(all="ignore"),
        pytest.raises(TrainingError, match="weights not finite after step 2: stopped; load one saved"),
    ):
        fit(made, 1, lr=1e15)  # the decay multiplies by 1e13


def state_of_zeros():
    return TrainState(*(np.zeros(3, np.float32) for _ in range(5)))


@pytest.mark.parametrize("name", ["params", "m", "v", "average"])
def test_all_that_is_trained_is_checked(name):
    trainer = Trainer.__new__(Trainer)
    trainer.be, trainer.state, trainer.brought = get_backend("numpy"), state_of_zeros(), False
    trainer.host = state_of_zeros()
    trainer.state.grads[1] = np.nan  # belongs to no state
    assert trainer.unsound() is None
    getattr(trainer.state, name)[1] = np.inf
    trainer.brought = False
    assert trainer.unsound() == ("moments of the gradient" if name in "mv" else "weights")


@pytest.mark.parametrize("ema", [True, False])
def test_nothing_is_drawn_with_weights_that_are_not_finite(backend, ema):
    made = fit(model(backend), 2)
    (made._average if ema else made.net.flat)[5] = np.nan
    with pytest.raises(TrainingError, match="weights of this model are not finite"):
        made.sample(2, ema=ema)
    with pytest.raises(TrainingError, match="weights of this model are not finite"):
        made.log_density(CURVES[:2], ema=ema)


def test_samples_are_finite_or_an_error():
    made = fit(model("numpy"), 1)
    made.net.flat *= np.float32(1e15)
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match="samples that are not finite"):
        made.sample(2, ema=False)


NUMPY_PLAN = {
    "lr": np.float32(1e-3), "warmup": np.int64(5), "decay_steps": np.uint8(9), "clip_norm": np.float16(0.5),
    "ema": np.float64(0.9), "weighting": "min_snr", "snr_gamma": np.int32(3), "steps": np.int16(2), "batch": np.int8(4),
    "validation": np.float32(0.25),
}  # fmt: skip
NUMPY_NETS = {
    "mlp": lambda: fd.MLP(np.int64(9), hidden=np.array([8, 4]), T=np.uint16(T), seed=np.uint64(3)),
    "unet": lambda: fd.UNet(
        (np.int32(9),), channels=np.array([4, 8]), blocks=np.int8(1), T=np.int64(T), attention=np.array([False, True]),
        groups=np.int64(2), dropout=np.float32(0.25), seed=np.int64(1), eps=np.float32(1e-5), embedding=np.int64(8),
        head_width=np.int16(4), scale_shift=np.bool_(True), padding=np.int8(1), frequency_shift=np.int8(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMPY_NETS)
def test_scalars_of_numpy_train_and_are_saved(kind, tmp_path):
    net = NUMPY_NETS[kind]()
    schedule = fd.Schedule.linear(np.int64(T), beta_start=np.float64(1e-3), beta_end=np.float32(0.75))
    made = fd.Diffusion(net, schedule, seed=np.uint8(3), backend="numpy").fit(CURVES, progress=False, **NUMPY_PLAN)
    again = saved_and_loaded(made, tmp_path)
    assert_same_model(fit(again, 1), fit(made, 1))
    assert all(type(value) in (int, float, str) for value in vars(made._optimizer.plan).values())


SPOILT = {
    "net": lambda made: made.net.flat.__setitem__(0, np.nan),
    "ema": lambda made: made._average.__setitem__(0, np.inf),
    "adam.v": lambda made: made._optimizer.v.__setitem__(0, np.nan),
    "history.loss": lambda made: made.history["loss"].__setitem__(0, np.nan),
    "history.validation_loss": lambda made: made.history["validation_loss"].append(1.0),
    "class_names": lambda made: setattr(made, "class_names", ["ant"]),
    "seed": lambda made: setattr(made, "seed", -1),
    "prediction": lambda made: setattr(made, "prediction", "score"),
    "step": lambda made: setattr(made, "step", -1),
    "report": lambda made: setattr(made, "report_", [1]),
    "normaliser.std": lambda made: setattr(made, "normaliser", Normaliser(0.0, 0.0)),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_could_not_be_loaded_is_not_saved(what, tmp_path):
    made, path = fit(model("numpy"), 2), tmp_path / "m.safetensors"
    made.save(path)
    before = path.read_bytes()
    SPOILT[what](made)
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: not saved, as it could not be read again: {what}"):
        made.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (CURVES[0], {}, r"X: got shape \(9,\)"),
        (CURVES[:0], {}, "X: got shape .*at least one curve"),
        (CURVES[:, :8], {}, r"X: got shape \(40, 8\)"),
        (np.where(CURVES > 1, np.inf, CURVES), {}, "X: got inf"),
        (CURVES.astype(complex), {}, "X: got dtype complex"),
        (CURVES.astype(float) * 1e38, {}, r"X: got .*e\+38 at index \(\d+, \d+\), wants at most 1e\+37"),
        ("curves.csv", {}, "X: got"),
        (CURVES, {"steps": -1}, "steps: got -1"),
        (CURVES, {"steps": 1.5}, "steps: got 1.5"),
        (CURVES, {"batch": 0}, "batch: got 0"),
        (CURVES, {"batch": True}, "batch: got True"),
        (CURVES, {"lr": 0}, "lr: got 0"),
        (CURVES, {"lr": 1e38}, r"lr: got 1e\+38, wants a finite number, above 0 and at most 1e\+15"),
        (CURVES, {"ema": 1}, "ema: got 1"),
        (CURVES, {"warmup": 5, "decay_steps": 5}, "decay_steps: got 5"),
        (
            CURVES,
            {"y": np.zeros(40, int)},
            "y: got labels, wants None: this network has no classes; use fd.MLP.9, classes=1",
        ),
        (CURVES, {"flip": True}, "flip: got True"),
        (CURVES, {"accumulate": 2}, "accumulate: got 2"),
        (CURVES, {"data_range": (0, 1)}, "data_range: got"),
    ],
)
def test_bad_arguments_change_nothing(X, options, message):
    made = model()
    before = made.net.flat.copy()
    with pytest.raises(ArgumentError, match=f"^{message}"):
        made.fit(X, **{**QUIET, "steps": 1, **options})
    assert (made.step, made.normaliser, made._optimizer) == (0, None, None)
    assert_same_bits(made.net.flat, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fd.Diffusion("mlp"), "net: got str"),
        (lambda: fd.Diffusion(schedule="cosine"), "schedule: got str"),
        (lambda: model(prediction="score"), "prediction: got 'score'"),
        (lambda: model(seed=-1), "seed: got -1"),
        (lambda: fd.Diffusion(NETS["default"](), fd.Schedule.cosine(13)), "schedule: got T = 13, wants T = 12"),
        (lambda: fd.Diffusion(backend="gpu"), "backend: got 'gpu'"),
        (lambda: model(noise_shape=np.eye(9)), "noise_shape: got ndarray"),
        (lambda: model(noise_shape=fd.NoiseShape.diagonal(np.ones(8))), "noise_shape: got"),
    ],
)
def test_bad_models_are_refused(make, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        make()


def test_float64_networks_learn_on_numpy_alone():
    net = fd.MLP(9, hidden=(5,), T=T, dtype="float64")
    made = fit(fd.Diffusion(net, backend="numpy"), 2)
    assert made.denoiser().flat.dtype == np.float64
    with pytest.raises((ArgumentError, BackendError), match="float64"):
        fit(fd.Diffusion(fd.MLP(9, hidden=(5,), T=T, dtype="float64"), backend="cpu"), 1)


# --------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module", params=["numpy", "cpu"])
def trained(request):
    return fit(model(request.param), 20, lr=0.01)


def test_samples_are_numbered(trained):
    all_nine = trained.sample(9)
    assert all_nine.shape == (9, 9)
    assert all_nine.dtype == np.float32
    assert_same_bits(trained.sample(9), all_nine)
    assert_same_bits(trained.sample(9, seed=4), all_nine)
    assert not np.array_equal(trained.sample(9, seed=5), all_nine)
    together = trained.sample(4, first_sample=5), trained.sample(9, batch=2)
    for got, want in zip(together, (all_nine[5:], all_nine), strict=True):
        assert_close(got, want, terms=1000)  # BLAS has another order of additions for other sizes
    assert trained.sample(0).shape == (0, 9)


def test_a_trajectory_ends_in_the_samples(trained):
    x, path = trained.sample(3, trajectory=True)
    assert path.shape == (T + 1, 3, 9)
    assert_same_bits(path[-1], x)
    assert_close(x, trained.sample(3), terms=1000)
    inner = (path[0].astype(np.float64) - trained.normaliser.mean) / trained.normaliser.std
    assert_close(inner.astype(np.float32), fd.normal((3, 9), seed=4, stream="init"), terms=10)


def test_a_named_sampler_is_its_table(trained):
    for name, steps in (("ddpm", None), *((name, 5) for name in fd.samplers.names()[1:])):
        table = fd.samplers.named(name, trained.schedule, steps, prediction="noise")
        assert_same_bits(trained.sample(2, sampler=table), trained.sample(2, sampler=name, steps=steps))


def test_samples_by_hand(trained):
    """The model is its normaliser and `fastdiff.sample` with its denoiser."""
    table = fd.samplers.ddim(trained.schedule, 4)
    for ema in (True, False):
        white = fd.sample(trained.denoiser(ema=ema), table, n=3, seed=9, backend=trained.backend)
        want = white.astype(np.float64) * trained.normaliser.std + trained.normaliser.mean
        assert_close(trained.sample(3, seed=9, sampler=table, ema=ema), want.astype(np.float32), terms=4)
    assert not np.array_equal(trained.sample(3), trained.sample(3, ema=False))


def test_samples_follow_the_training(backend):
    made = fit(model(backend), 2, lr=0.05)
    frozen, first = made.denoiser(), made.sample(2)
    before = frozen.predict(CURVES, 3)
    fit(made, 2)
    assert_same_bits(frozen.predict(CURVES, 3), before)  # a copy
    assert not np.array_equal(made.sample(2), first)
    assert_same_bits(made.sample(2), fit(model(backend), 4, lr=0.05).sample(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "n: got -1"),
        ({"labels": 0}, "labels: .*no classes"),
        ({"sampler": "plms"}, "sampler: got 'plms'"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": T + 1}, "steps: got 13"),
        ({"seed": 2**64}, "seed: got"),
        ({"first_sample": -1}, "first_sample: got -1"),
        ({"batch": 0}, "batch: got 0"),
        ({"sampler": fd.samplers.ddpm(fd.Schedule.cosine(T)), "steps": 3}, "steps: got 3, wants None with a table"),
        ({"sampler": fd.samplers.ddpm(fd.Schedule.linear(T, beta_end=0.8))}, "sampler: got"),
        (
            {"sampler": fd.samplers.ddpm(fd.Schedule.cosine(T), prediction="v")},
            "sampler: got a table for prediction 'v', wants one made with prediction='noise'",
        ),
    ],
)
def test_bad_samples_are_refused(options, message):
    made = fit(model(), 1)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        made.sample(**options)


def test_nothing_comes_of_a_model_that_is_not_trained():
    for act in (lambda made: made.sample(1), lambda made: made.denoiser()):
        with pytest.raises(TrainingError, match="this model has not been trained: call fit first"):
            act(model())


def test_a_named_table_is_made_once():
    made = fit(model(), 2)
    table = made.named_sampler("ddim", 5)
    assert made.named_sampler("ddim", 5) is table
    assert len(made.named_sampler("ddim", np.int64(6))) == 6
    for steps in range(2, T):
        assert len(made.named_sampler("ddim", steps)) == steps
    assert len(made._tables) <= 8
    assert pickle.loads(pickle.dumps(made))._tables == {}
    with pytest.raises(ArgumentError, match="steps"):
        made.named_sampler("ddim", [5])
