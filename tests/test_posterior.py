"""Exact posteriors, their evidence, and products with the Jacobians of exact denoisers, against dense algebra."""

import copy
import math
import pickle

import numpy as np
import pytest
from tolerances import SIGMAS, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.denoisers import Empirical, Gaussian, Mixture, exact_chain
from fastdiff.errors import ArgumentError

NAN = math.nan
SCHEDULE = fd.Schedule.cosine(20)
RANDOM = np.random.default_rng(5)
D = 5
A = RANDOM.normal(size=(3, D))
Y = np.array([0.4, -1.2, 0.3])
ROOT = RANDOM.normal(size=(D, D))
MEAN = RANDOM.normal(size=D)
FACTOR = RANDOM.normal(size=(D, 2))
PREDICTIONS = ("noise", "x0", "v", "velocity")


def gaussians(prediction="noise", schedule=SCHEDULE):
    return {
        "dense": Gaussian(MEAN, ROOT @ ROOT.T, schedule, prediction=prediction),
        "low rank": Gaussian.low_rank(MEAN, FACTOR, 0.3, schedule, prediction=prediction),
        "low rank alone": Gaussian.low_rank(MEAN, FACTOR, 0.0, schedule, prediction=prediction),
        "singular": Gaussian(MEAN, FACTOR @ FACTOR.T, schedule, prediction=prediction),
    }


def textbook(law, rows, y, noise):
    """Posterior mean and covariance, and the log density of y, by the formulas as they are written."""
    S = rows @ law.cov @ rows.T + np.diag(np.square(noise))
    gain = law.cov @ rows.T @ np.linalg.inv(S)
    gap = y - rows @ law.mean
    evidence = -(gap @ np.linalg.solve(S, gap) + np.linalg.slogdet(2 * np.pi * S)[1]) / 2
    return law.mean + gain @ gap, law.cov - gain @ rows @ law.cov, evidence


# --------------------------------------------------------------------------------------- Gaussians


@pytest.mark.parametrize("kind", ["dense", "low rank", "low rank alone", "singular"])
@pytest.mark.parametrize("noise", [0.7, [0.5, 1e-3, 2.0]])
def test_noisy_observations_of_a_gaussian(kind, noise):
    law = gaussians("v")[kind]
    made = law.given(fd.Linear(A, Y, noise))
    mean, cov, evidence = textbook(law, A, Y, np.broadcast_to(noise, 3))
    np.testing.assert_allclose(made.mean, mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(made.cov, cov, rtol=0, atol=1e-9)
    assert made.log_evidence == pytest.approx(evidence, abs=1e-9)
    assert law.log_evidence == 0
    assert (made.schedule, made.prediction, made.shape) == (law.schedule, "v", law.shape)


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_exact_observations_of_a_gaussian(kind):
    """The posterior lies on a subspace; the covariance vanishes in what was seen."""
    law = gaussians()[kind]
    made = law.given(fd.Linear(A, Y, 0))
    mean, cov, evidence = textbook(law, A, Y, np.zeros(3))
    np.testing.assert_allclose(made.mean, mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(made.cov, cov, rtol=0, atol=1e-9)
    np.testing.assert_allclose(A @ made.mean, Y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(A @ made.cov @ A.T, 0, atol=1e-13)
    assert made.log_evidence == pytest.approx(evidence, abs=1e-9)


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_exact_and_noisy_observations_together(kind):
    law = gaussians()[kind]
    values = np.array([NAN, 0.5, NAN, NAN, -1.0])
    made = law.given([fd.Known(values), fd.Linear(A, Y, 0.4)])
    rows = np.concatenate([np.eye(D)[[1, 4]], A])
    mean, cov, evidence = textbook(law, rows, [0.5, -1.0, *Y], [0, 0, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(made.mean, mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(made.cov, cov, rtol=0, atol=1e-9)
    assert made.log_evidence == pytest.approx(evidence, abs=1e-9)
    np.testing.assert_allclose(made.mean[[1, 4]], [0.5, -1.0], rtol=0, atol=1e-12)


def test_one_after_the_other_is_both_together():
    for law in gaussians().values():
        one, other = fd.Linear(A[:1], Y[:1], 0), fd.Linear(A[1:], Y[1:], 0.3)
        together, first = law.given([one, other]), law.given(one)
        second = first.given(other)
        np.testing.assert_allclose(second.mean, together.mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(second.cov, together.cov, rtol=0, atol=1e-10)
        assert first.log_evidence + second.log_evidence == pytest.approx(together.log_evidence, abs=1e-10)


def test_many_dimensions_stay_thin():
    d = 3000
    factor = RANDOM.normal(size=(d, 2))
    for rest in (0.0, 0.1):
        made = Gaussian.low_rank(np.zeros(d), factor, rest, SCHEDULE).given(
            fd.Linear(np.eye(d)[:2], factor[:2] @ [1, -1], 0.1)
        )
        assert made.data.basis.shape == (d, 2 if rest == 0 else 4)
        assert made.predict(np.zeros((1, d)), 3).shape == (1, d)


def test_what_says_nothing_new_changes_nothing():
    law = gaussians()["dense"]
    plain = law.given(fd.Linear(A, Y, 0))
    for more in (
        fd.Linear(A[:1], Y[:1], 0),
        fd.Linear(2 * A[1:2] - A[:1], [2 * Y[1] - Y[0]], 0),
        fd.Linear(np.zeros((1, D)), [0], 0),
    ):
        again = law.given([fd.Linear(A, Y, 0), more])
        np.testing.assert_allclose(again.mean, plain.mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(again.cov, plain.cov, rtol=0, atol=1e-10)
    flat = gaussians()["singular"]
    left = np.linalg.svd(FACTOR)[0]
    made = flat.given(fd.Linear(left[:, 2:].T, left[:, 2:].T @ MEAN, 0))  # constant under this law
    np.testing.assert_allclose(made.cov, flat.cov, rtol=0, atol=1e-12)
    assert made.log_evidence == 0


def test_nothing_known_is_the_law_itself():
    x = RANDOM.normal(size=(3, D))
    for law in gaussians().values():
        for obs in ([], fd.Known(np.full(D, NAN)), fd.Linear(np.zeros((0, D)), [], 1)):
            made = law.given(obs)
            assert made.log_evidence == 0
            for t in (0, 7, 19):
                assert_same_bits(made.predict(x, t), law.predict(x, t))


def test_all_known_is_one_point():
    values = np.arange(5.0)
    made = gaussians()["dense"].given(fd.Known(values))
    np.testing.assert_allclose(made.mean, values, rtol=0, atol=1e-12)
    np.testing.assert_allclose(made.cov, 0, atol=1e-24)
    np.testing.assert_allclose(made.mean_x0(RANDOM.normal(size=(2, D)), 3), [values] * 2, rtol=0, atol=1e-12)
    assert made.log_evidence == pytest.approx(textbook(gaussians()["dense"], np.eye(D), values, np.zeros(D))[2])


def test_several_observations_give_a_list():
    law = gaussians()["dense"]
    several = np.array([[1, NAN, NAN, 0, NAN], [NAN] * 5, [2, NAN, NAN, 1, NAN], [NAN, 1, NAN, NAN, NAN]])
    made = law.given([fd.Known(several, 0.1), fd.Linear(A, Y, 1.0)])
    assert len(made) == 4
    for each, values in zip(made, several, strict=True):
        alone = law.given([fd.Known(values, 0.1), fd.Linear(A, Y, 1.0)])
        np.testing.assert_allclose(each.mean, alone.mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(each.cov, alone.cov, rtol=0, atol=1e-12)
        assert each.log_evidence == pytest.approx(alone.log_evidence, abs=1e-12)
    assert law.given(fd.Known(np.zeros((0, D)))) == []
    assert isinstance(law.given(fd.Known(several[:1])), list)


def test_samples_of_any_shape():
    mean = RANDOM.normal(size=(2, 2))
    law = Gaussian(mean, np.eye(4) + 0.5, SCHEDULE)
    values = np.array([[1, NAN], [NAN, NAN]])
    made = law.given(fd.Known(values))
    assert made.mean.shape == (2, 2)
    flat = Gaussian(mean.reshape(-1), np.eye(4) + 0.5, SCHEDULE).given(fd.Known(values.reshape(-1)))
    assert_same_bits(made.cov, flat.cov)


def test_what_cannot_have_been_seen():
    dense, flat = gaussians()["dense"], gaussians()["singular"]
    for law, obs in [
        (dense, [fd.Linear(A, Y, 0), fd.Linear(A[:1], Y[:1] + 1e-3, 0)]),
        (dense, [fd.Known([1, NAN, NAN, NAN, NAN]), fd.Known([2, NAN, NAN, NAN, NAN])]),
        (dense, fd.Linear(np.zeros((1, D)), [1], 0)),
        (flat, fd.Known(MEAN + 1)),
        (Mixture.of([0.5, 0.5], [flat, flat]), fd.Known(MEAN + 1)),
        (Empirical(ROOT, SCHEDULE), fd.Known(MEAN)),
    ]:
        with pytest.raises(ArgumentError, match="obs: got values seen without noise that contradict"):
            law.given(obs)
    with pytest.raises(ArgumentError, match="observation 1: values seen"):
        flat.given(fd.Known([MEAN, MEAN + 1]))
    dense.given([fd.Linear(A, Y, 0), fd.Linear(A[:1].astype(np.float32), Y[:1].astype(np.float32), 0)])
    noisy = dense.given([fd.Known([1, NAN, NAN, NAN, NAN], 0.1), fd.Known([2, NAN, NAN, NAN, NAN], 0.1)])
    assert 1 < noisy.mean[0] < 2


def test_what_a_gaussian_does_not_take():
    weight = fd.Weight(lambda x: (np.zeros(len(x)), np.zeros_like(x)))
    law = gaussians()["dense"]
    for each in (law, Mixture.of([1.0], [law])):
        with pytest.raises(ArgumentError, match=r"an fd\.Weight.*Empirical"):
            each.given([fd.Known(MEAN), weight])
        with pytest.raises(ArgumentError, match=r"obs: got values of shape \(4,\)"):
            each.given(fd.Known(np.zeros(4)))
        with pytest.raises(ArgumentError, match="obs: got int"):
            each.given(3)


def test_a_posterior_survives_copies():
    made = gaussians()["low rank"].given(fd.Linear(A, Y, 0.1))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.log_evidence == made.log_evidence
        assert_same_bits(other.mean, made.mean)


# --------------------------------------------------------------------------------------- known numbers


def correlated(d, rho):
    return rho ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))


def test_evidence_of_two_noisy_values_of_four():
    law = Gaussian(np.zeros(4), correlated(4, 0.8), SCHEDULE)
    assert law.given(fd.Known([1, -0.5, NAN, NAN], 0.3)).log_evidence == pytest.approx(-3.5099523, abs=1e-7)


def test_evidence_of_what_a_table_samples():
    """Its samples' law is the prior that particles run by it see."""
    schedule = fd.Schedule.linear(1000)
    law = Gaussian(np.zeros(4), correlated(4, 0.8), schedule)
    chain = exact_chain(law, fd.samplers.ddpm(schedule, 50))
    made = Gaussian(chain.mean, chain.cov, schedule).given(fd.Known([1, -0.5, NAN, NAN], 0.3))
    assert made.log_evidence == pytest.approx(-3.7204792, abs=1e-7)


def test_spread_when_every_other_value_is_seen():
    values = np.full(16, NAN)
    values[::2] = (1, -1, 0.5, 2, 0, -0.5, 1, 0.3)
    law = Gaussian(np.sin(np.arange(16) / 2), correlated(16, 0.9), SCHEDULE)
    made = law.given(fd.Known(values))
    assert math.sqrt(np.trace(made.cov)) == pytest.approx(0.96167, abs=5e-6)
    few, many = (exact_chain(made, fd.samplers.ddim(SCHEDULE, n)).w2() for n in (5, 20))
    assert many < few / 2


# --------------------------------------------------------------------------------------- affine denoisers


class Plain:
    """A Gaussian that shows its affine maps only, or others."""

    def __init__(self, gaussian, change=None):
        self.gaussian, self.change = gaussian, change
        self.shape, self.schedule, self.prediction = gaussian.shape, gaussian.schedule, gaussian.prediction

    def affine(self, prediction, t):
        gain, offset = self.gaussian.affine(prediction, t)
        return (gain, offset) if self.change is None else (self.change @ gain, self.change @ offset)


SAMPLERS = {
    "ddpm": lambda p: fd.samplers.ddpm(SCHEDULE, prediction=p),
    "ddim": lambda p: fd.samplers.ddim(SCHEDULE, 7, eta=0.5, prediction=p),
    "dpmpp_2m": lambda p: fd.samplers.dpmpp_2m(SCHEDULE, 8, prediction=p),
    "dpmpp_2m with noise": lambda p: fd.samplers.dpmpp_2m(SCHEDULE, 8, eta=1.0, prediction=p),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_of_an_affine_denoiser(name, prediction):
    """Dense matrices find what the eigenvectors of a Gaussian do."""
    sampler = SAMPLERS[name](prediction)
    for gaussian in gaussians(prediction).values():
        want, got = exact_chain(gaussian, sampler), exact_chain(Plain(gaussian), sampler)
        for one, other in zip(got.trace, want.trace, strict=True):
            np.testing.assert_allclose(one.mean, other.mean, rtol=0, atol=1e-10)
            np.testing.assert_allclose(one.cov, other.cov, rtol=0, atol=1e-10)
        assert got.w2(gaussian) == pytest.approx(want.w2(), abs=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_is_what_samples_do(name):
    """Of maps that are not symmetric."""
    sampler, gaussian = SAMPLERS[name]("noise"), gaussians()["dense"]
    twisted = Plain(gaussian, np.eye(D) + 0.1 * ROOT)
    chain = exact_chain(twisted, sampler)

    def predict(x, t):
        gain, offset = twisted.affine("noise", t)
        return x @ gain.T + offset

    many = fd.sample(predict, sampler, shape=(D,), backend="numpy", initial=RANDOM.normal(size=(40000, D)))
    variances = np.diag(chain.cov)
    assert (np.abs(many.mean(axis=0) - chain.mean) < SIGMAS * np.sqrt(variances / len(many))).all()
    errors = np.sqrt((np.outer(variances, variances) + chain.cov**2) / len(many))
    assert (np.abs(np.cov(many.T) - chain.cov) < SIGMAS * errors).all()


def test_affine_is_what_predict_does():
    x = RANDOM.normal(size=(3, D))
    for prediction in PREDICTIONS:
        for name, gaussian in gaussians().items():
            gain, offset = gaussian.affine(prediction, 4)
            want = gaussians(prediction)[name].predict(x, 4)
            np.testing.assert_allclose(x @ gain.T + offset, want, rtol=0, atol=1e-10)


def test_what_no_chain_follows():
    sampler = SAMPLERS["ddim"]("noise")
    with pytest.raises(ArgumentError, match=r"gaussian: got Mixture.*\.affine"):
        exact_chain(mixture(), sampler)
    chain = exact_chain(Plain(gaussians()["dense"]), sampler)
    with pytest.raises(ArgumentError, match="gaussian: got Plain"):
        chain.w2()


# --------------------------------------------------------------------------------------- mixtures


def mixture(prediction="noise", schedule=SCHEDULE):
    laws = gaussians(prediction, schedule)
    other = Gaussian(MEAN[::-1], np.eye(D) / 4, schedule, prediction=prediction)
    return Mixture.of([0.5, 0.2, 0.3], [laws["dense"], laws["low rank"], other])


def test_observations_of_a_mixture():
    law = mixture("x0")
    made = law.given([fd.Linear(A, Y, 0.5), fd.Known([0.1, NAN, NAN, NAN, NAN])])
    rows, y, noise = np.concatenate([np.eye(D)[:1], A]), [0.1, *Y], [0, 0.5, 0.5, 0.5]
    each = [textbook(component, rows, y, noise) for component in law.components]
    joint = np.log(law.weights) + [evidence for _, _, evidence in each]
    assert made.log_evidence == pytest.approx(np.logaddexp.reduce(joint), abs=1e-9)
    np.testing.assert_allclose(made.weights, np.exp(joint - np.logaddexp.reduce(joint)), rtol=1e-8)
    for component, (mean, cov, _) in zip(made.components, each, strict=True):
        np.testing.assert_allclose(component.mean, mean, rtol=0, atol=1e-9)
        np.testing.assert_allclose(component.cov, cov, rtol=0, atol=1e-9)
    assert (made.prediction, made.schedule) == ("x0", SCHEDULE)


def test_a_mixture_by_bayes_on_a_grid():
    law = Mixture([0.3, 0.7], [[-1.0], [2.0]], [[[0.5]], [[1.5]]], SCHEDULE)
    made = law.given(fd.Known([0.4], 0.8))
    grid = np.linspace(-12, 12, 40001)
    prior = sum(
        w * np.exp(-np.square(grid - c.mean[0]) / (2 * c.cov[0, 0])) / np.sqrt(2 * np.pi * c.cov[0, 0])
        for w, c in zip(law.weights, law.components, strict=True)
    )
    joint = prior * np.exp(-np.square(grid - 0.4) / (2 * 0.64)) / np.sqrt(2 * np.pi * 0.64)
    evidence = joint.sum() * (grid[1] - grid[0])
    assert made.log_evidence == pytest.approx(np.log(evidence), abs=1e-9)
    mean = (grid * joint).sum() / joint.sum()
    assert made.data.mean[0] == pytest.approx(mean, abs=1e-9)
    assert made.data.cov[0, 0] == pytest.approx((np.square(grid - mean) * joint).sum() / joint.sum(), abs=1e-9)


def test_components_that_cannot_have_made_it_are_gone():
    laws = gaussians()
    law = Mixture.of([0.4, 0.6], [laws["singular"], laws["dense"]])
    seen = MEAN + np.eye(D)[0]
    made = law.given(fd.Known(seen))
    assert len(made.components) == 1
    alone = laws["dense"].given(fd.Known(seen)).log_evidence
    assert made.log_evidence == pytest.approx(alone + np.log(0.6), abs=1e-9)


def test_a_component_that_sees_fewer_values_takes_all():
    """What the flat component can make has no volume for the other one."""
    laws = gaussians()
    law = Mixture.of([0.4, 0.6], [laws["singular"], laws["dense"]])
    seen = MEAN + FACTOR @ [1, -1]
    made = law.given(fd.Known(seen))
    assert len(made.components) == 1
    assert made.log_evidence == pytest.approx(laws["singular"].given(fd.Known(seen)).log_evidence + np.log(0.4))
    narrow = Mixture.of([0.4, 0.6], [Gaussian(MEAN, FACTOR @ FACTOR.T + 1e-8 * np.eye(D), SCHEDULE), laws["dense"]])
    assert narrow.given(fd.Known(seen)).weights[0] > 1 - 1e-6


def test_mixtures_of_several_observations():
    law = mixture()
    several = RANDOM.normal(size=(3, D))
    several[:, 2:] = NAN
    made = law.given(fd.Known(several, 0.2))
    for each, values in zip(made, several, strict=True):
        alone = law.given(fd.Known(values, 0.2))
        np.testing.assert_allclose(each.weights, alone.weights, rtol=1e-10)
        assert each.log_evidence == pytest.approx(alone.log_evidence, abs=1e-10)


# --------------------------------------------------------------------------------------- given rows

ROWS = RANDOM.normal(size=(9, D))
WEIGHTS = RANDOM.dirichlet(np.ones(9))


def by_loops(rows, weights, x, t):
    """E[x0 | x] and log q_t(x), one row after the other."""
    alpha, sigma = SCHEDULE.signal[t], SCHEDULE.noise[t]
    means, densities = [], []
    for state in x:
        terms = np.array(
            [
                math.log(w) - sum((s - alpha * v) ** 2 for s, v in zip(state, row, strict=True)) / (2 * sigma**2)
                for w, row in zip(weights, rows, strict=True)
            ]
        )
        top = terms.max()
        shares = np.exp(terms - top)
        means.append(sum(share * row for share, row in zip(shares, rows, strict=True)) / shares.sum())
        densities.append(top + math.log(shares.sum()) - D / 2 * math.log(2 * math.pi * sigma**2))
    return np.array(means), np.array(densities)


@pytest.mark.parametrize("t", [0, 4, 19])
def test_weighted_rows(t, any_backend):
    law = Empirical(ROWS, SCHEDULE, weights=WEIGHTS)
    x = RANDOM.normal(size=(6, D)).astype(np.float64 if any_backend.name == "numpy" else np.float32)
    mean, density = by_loops(ROWS, WEIGHTS, x, t)
    rtol = 1e-10 if any_backend.name == "numpy" else 2e-4
    np.testing.assert_allclose(law.mean_x0(x, t, backend=any_backend), mean, rtol=0, atol=rtol)
    np.testing.assert_allclose(law.log_density(x, t, backend=any_backend), density, rtol=rtol, atol=rtol)
    mixed = law.mean_x0(x, [t, 3, t, 5, t, t], backend=any_backend)
    np.testing.assert_allclose(mixed[[0, 2, 4, 5]], mean[[0, 2, 4, 5]], rtol=0, atol=rtol)
    np.testing.assert_allclose(mixed[1], by_loops(ROWS, WEIGHTS, x[1:2], 3)[0][0], rtol=0, atol=rtol)


def test_even_weights_have_the_bits_of_none():
    x = RANDOM.normal(size=(6, D))
    plain, even = Empirical(ROWS, SCHEDULE), Empirical(ROWS, SCHEDULE, weights=np.full(9, 1 / 9))
    for t in (0, 9, [1, 2, 3, 4, 5, 6]):
        assert_same_bits(plain.predict(x, t), even.predict(x, t))
        assert_same_bits(plain.log_density(x, t), even.log_density(x, t))
    assert_same_bits(plain.data.mean, even.data.mean)
    np.testing.assert_array_equal(plain.weights, even.weights)
    assert_same_bits(plain.given([]).predict(x, 4), plain.predict(x, 4))


def test_a_row_of_no_weight_is_not_there():
    weights = np.array([0.5, 0.0, 0.5])
    law, fewer = Empirical(ROWS[:3], SCHEDULE, weights=weights), Empirical(ROWS[[0, 2]], SCHEDULE)
    x = RANDOM.normal(size=(4, D))
    for t in (0, 10, 19):
        np.testing.assert_allclose(law.predict(x, t), fewer.predict(x, t), rtol=0, atol=1e-12)
        np.testing.assert_allclose(law.log_density(x, t), fewer.log_density(x, t), rtol=0, atol=1e-10)
    np.testing.assert_allclose(law.data.cov, fewer.data.cov, atol=1e-12)


def test_bad_weights():
    for weights, match in [([0.5, 0.6], "a sum of"), ([1.5, -0.5], "no negative"), ([1.0], r"shape \(1,\)")]:
        with pytest.raises(ArgumentError, match=rf"weights: got .*{match}"):
            Empirical(ROWS[:2], SCHEDULE, weights=weights)


def test_observations_of_rows():
    law = Empirical(ROWS, SCHEDULE, weights=WEIGHTS, prediction="v")
    tilt = fd.Weight(lambda x: (x[:, 0] - np.abs(x).sum(axis=1), np.zeros_like(x)))
    made = law.given([fd.Linear(A, Y, [0.5, 1, 2]), tilt])
    logs = np.log(WEIGHTS) + ROWS[:, 0] - np.abs(ROWS).sum(axis=1)
    for row, y, noise in zip(A, Y, [0.5, 1, 2], strict=True):
        logs -= np.square(ROWS @ row - y) / (2 * noise**2) + math.log(noise * math.sqrt(2 * math.pi))
    assert made.log_evidence == pytest.approx(np.logaddexp.reduce(logs), abs=1e-12)
    np.testing.assert_allclose(made.weights, np.exp(logs - np.logaddexp.reduce(logs)), rtol=1e-12)
    assert made.prediction == "v"


def test_rows_that_agree_with_what_was_seen_exactly():
    rows = np.array([[1, 2], [1, 3], [2, 2]], np.float32) / 3
    law = Empirical(rows, SCHEDULE, weights=[0.2, 0.3, 0.5])
    made = law.given(fd.Known([1 / 3, NAN]))
    assert_same_bits(made.X, rows[:2])
    np.testing.assert_allclose(made.weights, [0.4, 0.6])
    assert made.log_evidence == pytest.approx(math.log(0.5))
    several = law.given(fd.Known([[1 / 3, NAN], [NAN, NAN], [2 / 3, 2 / 3]]))
    assert [len(each.X) for each in several] == [2, 3, 1]
    assert np.exp([each.log_evidence for each in several]) == pytest.approx([0.5, 1, 0.5])


def test_weights_of_a_function_that_are_no_numbers():
    law = Empirical(ROWS, SCHEDULE)
    with pytest.raises(ArgumentError, match="log weight nan for sample 3"):
        law.given(fd.Weight(lambda x: (np.where(np.arange(9) == 3, NAN, 0), x)))
    with pytest.raises(ArgumentError, match="contradict"):
        law.given(fd.Weight(lambda x: (np.full(9, -math.inf), x)))
    one = law.given(fd.Weight(lambda x: (np.where(np.arange(9) == 3, 0, -math.inf), x)))
    assert_same_bits(one.X, ROWS[3:4])
    assert one.log_evidence == pytest.approx(-math.log(9))


# --------------------------------------------------------------------------------------- products


def models(prediction, schedule=SCHEDULE):
    made = {**gaussians(prediction, schedule), "mixture": mixture(prediction, schedule)}
    made["rows"] = Empirical(ROWS, schedule, prediction=prediction)
    made["weighted rows"] = Empirical(ROWS, schedule, prediction=prediction, weights=WEIGHTS)
    made["posterior"] = made["mixture"].given(fd.Linear(A[:2], Y[:2], 0))
    return made


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [SCHEDULE, fd.Schedule.flow(20)], ids=["cosine", "flow"])
def test_products_are_those_of_the_jacobian(prediction, schedule):
    """Every entry, by central differences."""
    step = 1e-5
    for name, model in models(prediction, schedule).items():
        for t in (1, 8, 18):
            x = model.schedule.signal[t] * ROWS[:3] + model.schedule.noise[t] * RANDOM.normal(size=(3, D))
            shifts = step * np.eye(D)[:, None]
            columns = [(model.predict(x + e, t) - model.predict(x - e, t)) / (2 * step) for e in shifts]
            units = np.broadcast_to(np.eye(D)[:, None], (D, 3, D))
            scale = np.abs(columns).max(initial=1.0)
            np.testing.assert_allclose(model.jvp(x, t, units), columns, rtol=0, atol=1e-7 * scale, err_msg=name)
            rows = model.vjp(x, t, units)
            np.testing.assert_allclose(rows, np.array(columns).transpose(2, 1, 0), rtol=0, atol=1e-7 * scale)


def test_the_jacobian_of_the_mean_is_a_covariance():
    """signal / noise^2 Cov[x0 | x], here of rows whose shares are known."""
    t, law = 6, Empirical(ROWS, SCHEDULE, prediction="x0", weights=WEIGHTS)
    alpha, sigma = SCHEDULE.signal[t], SCHEDULE.noise[t]
    x = RANDOM.normal(size=(1, D))
    shares = WEIGHTS * np.exp(-np.square(x - alpha * ROWS).sum(axis=1) / (2 * sigma**2))
    cov = np.cov(ROWS.T, aweights=shares / shares.sum(), ddof=0)
    units = np.eye(D)[:, None]
    np.testing.assert_allclose(law.jvp(x, t, units)[:, 0], alpha / sigma**2 * cov, rtol=1e-9, atol=1e-12)


def test_products_in_batches_and_at_several_timesteps():
    x, u = RANDOM.normal(size=(4, D)), RANDOM.normal(size=(2, 4, D))
    t = [3, 8, 3, 11]
    for model in models("v").values():
        together = model.vjp(x, t, u)
        assert together.shape == (2, 4, D)
        for i in range(4):
            np.testing.assert_allclose(together[:, i], model.vjp(x[i : i + 1], t[i], u[:, i : i + 1])[:, 0], atol=1e-13)
        np.testing.assert_allclose(model.jvp(x, t, u[1]), together[1], atol=1e-13)
        assert model.vjp(x[:0], 3, u[:, :0]).shape == (2, 0, D)


def test_products_on_a_backend(any_backend):
    be = any_backend
    kind = be.asarray(np.zeros(1)).dtype
    x, u = RANDOM.normal(size=(4, D)).astype(kind), RANDOM.normal(size=(2, 4, D)).astype(kind)
    for model in models("noise").values():
        want = model.vjp(x.astype(np.float64), 7, u.astype(np.float64))
        assert_close(model.vjp(x, 7, u, backend=be), want, terms=100 * D)
        evaluator = model.on(be)
        got = be.to_numpy(evaluator.vjp(be.asarray(x), 7, be.asarray(u)))
        assert_close(got, want, terms=100 * D)
        one = be.to_numpy(evaluator.jvp(be.asarray(x), 7, be.asarray(u[1])))
        assert_close(one, want[1], terms=100 * D)


def test_bad_vectors():
    model, x = mixture(), np.zeros((3, D))
    for vector in (np.zeros((2, D)), np.zeros((4, 2, D)), np.full((3, D), NAN), np.zeros(D)):
        with pytest.raises(ArgumentError, match="cotangent: got"):
            model.vjp(x, 3, vector)
    with pytest.raises(ArgumentError, match="tangent: got"):
        model.jvp(x, 3, np.zeros((2, D)))
    with pytest.raises(ArgumentError, match="x: got"):
        model.jvp(np.zeros((3, 2)), 3, x)
