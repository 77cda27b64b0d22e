"""The page's modules in node: the noise law to the bit, and chains against those of the library."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tolerances import PAGE, PAGE_FLOAT64, PAGE_TMPD

import fastdiff as fd
from fastdiff import page
from fastdiff.generation import inner_covariates

NODE = shutil.which("node")
if NODE is None:
    pytest.skip("the page's modules need node: apt-get install nodejs", allow_module_level=True)


def node(job, **given):
    text = json.dumps({"job": job, **given})
    command = [NODE, str(Path(__file__).parent / "run.mjs")]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------- the law


def test_known_answers():
    assert node("words", seed="0", counter=[0, 0, 0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [0xFFFFFFFF] * 4
    assert node("words", seed=str(2**64 - 1), counter=ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    ("rows", "width", "seed", "stream", "step", "first"),
    [
        (20_000, 50, 0, 0, 0, 0),
        (101, 1, 2**64 - 1, 1, 2**32 - 1, 2**32 - 101),
        (333, 7, 12345678901234567890, 11, 7, 9),
    ],
)
def test_normals_have_the_same_bits(rows, width, seed, stream, step, first):
    given = {"rows": rows, "width": width, "seed": str(seed), "stream": stream, "step": step, "first": first}
    ours = np.frombuffer(base64.b64decode(node("normals", **given)), np.uint32)
    theirs = fd.normal((rows, width), seed=seed, stream=stream, step=step, first_sample=first)
    assert np.array_equal(ours, theirs.view(np.uint32).ravel())


@pytest.mark.parametrize("n", [1, 2, 50])
def test_eigenvalues(n):
    A = np.random.default_rng(n).normal(size=(n, n))
    A = A + A.T
    values, vectors, alone = (np.array(part) for part in node("eigen", matrix=A.ravel().tolist(), n=n))
    wanted = np.linalg.eigvalsh(A)[::-1]
    assert np.allclose(values, wanted, rtol=0, atol=1e-12 * n)
    assert np.allclose(alone, wanted, rtol=0, atol=1e-12 * n)
    vectors = vectors.reshape(n, n)
    assert np.allclose(vectors * values @ vectors.T, A, rtol=0, atol=1e-12 * n)


# ------------------------------------------------------------------------------------------- exact denoisers

DRAWN = np.round(fd.data.harmonic_curves(12).astype(np.float64), 2)
FAMILIES = page._of_families()
SCHEDULE = eval(page.SCHEDULE)
SEEN = np.where((np.arange(50) >= 15) & (np.arange(50) < 35), np.nan, DRAWN[3] + 0.05)


def exact(kind, X):
    if kind == "empirical":
        return fd.denoisers.Empirical(X, SCHEDULE, prediction="v")
    cov = np.cov(X.T, bias=True) + 1e-4 * np.eye(50)
    return fd.denoisers.Gaussian(X.mean(axis=0), cov, SCHEDULE, prediction="v")


def both(kind, sampler, steps, n=6, seed=3, seen=None, deviation=0.2):
    """Samples of the page and, in float32 and in float64, of the library."""
    given = {"payload": FAMILIES, "denoiser": {"kind": kind, "rows": DRAWN.tolist()}, "sampler": sampler}
    given |= {"steps": str(steps), "n": n, "seed": str(seed)}
    law, table = exact(kind, DRAWN), fd.samplers.named(sampler, SCHEDULE, steps, prediction="v")
    if seen is not None:
        given |= {"seen": [None if np.isnan(v) else v for v in seen], "deviation": deviation}
        law = law.given(fd.Known(seen, noise=deviation))
    start = fd.normal((n, 50), seed=seed, stream="init").astype(np.float64)
    wide = fd.sample(law, table, initial=start, seed=seed, backend="numpy")
    return np.array(node("chain", **given)).reshape(n, 50), fd.sample(law, table, n=n, seed=seed), wide


@pytest.mark.parametrize("kind", ["empirical", "gaussian"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("ddpm", 200), ("ddim", 20), ("dpmpp_2m", 20), ("dpmpp_3m", 10), ("unipc", 10), ("deis", 10), ("heun", 5),
     ("dpmpp_sde", 20)],
)  # fmt: skip
def test_chains_of_exact_denoisers(kind, sampler, steps):
    ours, narrow, wide = both(kind, sampler, steps)
    assert np.abs(ours - wide).max() < PAGE_FLOAT64
    assert np.abs(ours - narrow).max() < PAGE


@pytest.mark.parametrize("kind", ["empirical", "gaussian"])
def test_chains_given_a_part(kind):
    ours, narrow, wide = both(kind, "ddim", 50, seen=SEEN)
    assert np.abs(ours - wide).max() < PAGE_FLOAT64
    assert np.abs(ours - narrow).max() < PAGE


def test_a_chain_that_begins_in_the_middle():
    start = fd.forward_noise(DRAWN, 120, SCHEDULE, seed=1)[0].astype(np.float64)
    table = fd.samplers.ddpm(SCHEDULE, prediction="v")
    at = table.timesteps.tolist().index(120)
    tail = fd.Sampler(np.array(table.rows)[at:], SCHEDULE, prediction="v")
    wanted = fd.sample(exact("empirical", DRAWN), tail, initial=start, seed=3, backend="numpy")
    given = {"payload": FAMILIES, "denoiser": {"kind": "empirical", "rows": DRAWN.tolist()}, "sampler": "ddpm"}
    ours = node("chain", **given, steps="200", n=12, seed="3", initial=start.ravel().tolist(), **{"from": at})
    assert np.abs(np.array(ours).reshape(12, 50) - wanted).max() < PAGE_FLOAT64


# ------------------------------------------------------------------------------------------- perceptrons


def trained(shape=(50,), **options):
    X = fd.data.harmonic_curves(64, points=int(np.prod(shape))).reshape(-1, *shape)
    y = options.pop("y", None)
    net = options.pop("net", None)
    return fd.Diffusion(net, **options).fit(X, y, steps=30, batch=16, progress=False, judge=False)


def answers(model, sampler="auto", steps=None, n=5, seed=3, **given):
    """Samples in the network's range of the page, and of the library, in float32."""
    payload = page._of_model(model, "m.safetensors")
    table = model.named_sampler(sampler, steps)
    job = {"payload": payload, "denoiser": {"kind": "perceptron"}, "sampler": table.name, "n": n, "seed": str(seed)}
    options = {"n": n, "seed": seed}
    if "seen" in given:
        seen, noise = given["seen"], given["noise"]
        job |= {"seen": [None if np.isnan(v) else float(v) for v in seen.ravel()], "deviation": noise}
        job |= {"method": given["method"]}
        options |= {"given": fd.Known(seen, noise=noise), "method": given["method"]}
    if "label" in given:
        job |= {"label": given["label"], "guidance": given["guidance"]}
        options |= {"labels": given["label"], "guidance": given["guidance"]}
    if "covariates" in given:
        job["denoiser"]["covariates"] = given["covariates"]
        options |= {"covariates": inner_covariates(model, given["covariates"], 1)[0]}
    ours = np.array(node("chain", **job, steps=str(table.options["steps"])))
    return ours.reshape(n, *model.net.shape), fd.sample(model.denoiser(), table, **options)


def close(pair):
    ours, theirs = pair
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() < PAGE


@pytest.mark.parametrize("prediction", ["v", "noise", "x0"])
def test_perceptrons(prediction):
    close(answers(trained(prediction=prediction)))


def test_a_perceptron_without_a_base_and_the_tutorials():
    close(answers(trained(base=None), "ddpm"))
    close(answers(trained(net=fd.MLP.tutorial(50)), "ddim", 20))


def test_a_perceptron_on_series():
    close(answers(trained((16, 3))))


def test_a_perceptron_given_a_part():
    model = trained()
    inner = model.normaliser.apply(fd.data.harmonic_curves(1, seed=5), np.float64)[0]
    many = np.where((np.arange(50) >= 15) & (np.arange(50) < 35), np.nan, inner)
    few = np.where(np.arange(50) % 5 == 0, inner, np.nan)
    for seen in (many, few):
        for method in ("tmpd", "replace"):
            ours, theirs = answers(model, seen=seen, noise=0.05, method=method)
            assert np.abs(ours - theirs).max() < PAGE_TMPD


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_a_perceptron_asked_for_a_class(guidance):
    model = trained(
        net=fd.MLP(50, hidden=(32, 32), T=50, classes=3), schedule=fd.Schedule.cosine(50), y=np.arange(64) % 3
    )
    close(answers(model, label=2, guidance=guidance))


def test_a_perceptron_asked_for_numbers():
    X = fd.data.harmonic_curves(64)
    model = fd.Diffusion().fit(X, covariates=X.max(axis=1), steps=30, batch=16, progress=False, judge=False)
    close(answers(model, covariates=[2.5]))
