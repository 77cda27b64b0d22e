"""What is asked for comes to the same bits; what goes wrong is said, and costs nothing that is done."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import dask.array
import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

import fastdiff as fd
from fastdiff import stored
from fastdiff.errors import ArgumentError, BackendError, DataError
from fastdiff.scale import jobs, store

N, CHUNK = 100, 30


def draw(where, model, **options):
    options = {"n": N, "chunk": CHUNK, "progress": False, **options}
    return fd.scale.sample_to(where, model, **options)


def test_array(tmp_path, model):
    array = draw(tmp_path / "a.zarr", model)
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.chunks, array.dtype, array.metadata.zarr_format) == ((N, 12), (CHUNK, 12), "float32", 3)
    np.testing.assert_array_equal(zarr.open(tmp_path / "a.zarr", mode="r")[:], model.sample(N))
    facts = array.attrs["fastdiff"]
    assert facts["model"] == model.digest()
    assert (facts["seed"], facts["noise_law"], facts["version"]) == (0, fd.noise.NOISE_LAW_VERSION, fd.__version__)


@pytest.mark.parametrize("ema", [True, False])
def test_digest_is_that_of_the_weights(tmp_path, model, curves, ema):
    model.save(tmp_path / "m.safetensors")
    before = fd.load(tmp_path / "m.safetensors")
    assert before.digest(ema=ema) == model.digest(ema=ema)
    assert before.fit(curves, steps=1, progress=False).digest(ema=ema) != model.digest(ema=ema)
    assert model.digest(ema=True) != model.digest(ema=False)


def test_options(tmp_path, asked, model):
    """Labels and covariates go with their rows, and first_sample shifts all."""
    labels, numbers = np.arange(N) % 3, np.linspace(-1, 1, 2 * N).reshape(N, 2)
    options = {"labels": labels, "covariates": numbers, "guidance": 1.5, "sampler": "ddim", "steps": 4, "seed": 8}
    array = draw(tmp_path / "a.zarr", asked, first_sample=5, ema=False, **options)
    np.testing.assert_array_equal(array[:], asked.sample(N, first_sample=5, ema=False, **options))
    options |= {"labels": 1, "covariates": [0.5, 2.0]}
    np.testing.assert_array_equal(draw(tmp_path / "b.zarr", asked, **options)[:], asked.sample(N, **options))
    with pytest.raises(ArgumentError, match="labels"):
        draw(tmp_path / "c.zarr", asked, labels=labels[:-1], covariates=numbers)
    table = fd.samplers.dpmpp_2m(model.schedule, 5, prediction=model.prediction)
    np.testing.assert_array_equal(draw(tmp_path / "d.zarr", model, sampler=table)[:], model.sample(N, sampler=table))
    with pytest.raises(ArgumentError, match="trajectory"):
        draw(tmp_path / "c.zarr", model, trajectory=True)
    with pytest.raises(ArgumentError, match="'smc'"):
        draw(tmp_path / "c.zarr", model, given=fd.Known(np.zeros(12)), method="smc")
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("several", [False, True])
def test_given(tmp_path, model, curves, several):
    seen = curves[:3].copy() if several else curves[0].copy()
    seen[..., ::2] = np.nan
    array = draw(tmp_path / "a.zarr", model, given=fd.Known(seen), n=20, chunk=7)
    np.testing.assert_array_equal(array[:], model.sample(20, given=fd.Known(seen)))
    with pytest.raises(ArgumentError, match="given"):
        draw(tmp_path / "a.zarr", model, given=fd.Known(seen + 1), n=20, chunk=7)


def test_impute(tmp_path, model, curves):
    X = curves[:25].copy()
    X[:18, ::2] = np.nan
    X[4, 1:6] = np.nan
    np.save(tmp_path / "X.npy", X)
    array = fd.scale.impute_to(
        tmp_path / "a.zarr", model, np.load(tmp_path / "X.npy", mmap_mode="r"), 6, chunk=4, progress=False
    )
    assert array.chunks == (6, 4, 12)
    want = model.impute(X, 6)
    np.testing.assert_array_equal(array[:], want)
    assert array.dtype == want.dtype
    X[0, 1] += 1
    with pytest.raises(ArgumentError, match="rows X"):
        fd.scale.impute_to(tmp_path / "a.zarr", model, X, 6, chunk=4, progress=False)


@pytest.mark.parametrize("options", [{}, {"method": "denoising"}, {"trace": "hutchinson", "probes": 2}])
def test_score(tmp_path, model, curves, options):
    array = fd.scale.score_to(tmp_path / "a.zarr", model, curves[:20], chunk=6, progress=False, **options)
    np.testing.assert_array_equal(array[:], model.score_samples(curves[:20], **options))


def test_resume(tmp_path, model, monkeypatch):
    """Only what is not done is drawn, and a chunk that was damaged when it is asked for."""
    path, drawn = tmp_path / "a.zarr", []
    answer = jobs.Job.answer

    def stops(self, start, stop, told):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(start)
        return answer(self, start, stop, told)

    monkeypatch.setattr(jobs.Job, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        draw(path, model)
    found = fd.scale.check(path)
    assert (found.done, found.total, found.damaged) == (2, 4, [])
    drawn.clear()
    drawn.append("two more")
    with pytest.raises(KeyboardInterrupt):
        draw(path, model)
    assert drawn == ["two more", 60]
    monkeypatch.setattr(jobs.Job, "answer", answer)
    np.testing.assert_array_equal(draw(path, model)[:], model.sample(N))
    chunk = path / "c" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    assert fd.scale.check(path, repair=True).damaged == [1]
    np.testing.assert_array_equal(draw(path, model)[:], model.sample(N))
    with pytest.raises(ArgumentError, match="which is there"):
        draw(path, model, resume=False)


def test_stores_of_something_else(tmp_path, model, monkeypatch):
    path = tmp_path / "a.zarr"
    draw(path, model)
    cases = [
        ("seed 0 there, 1 asked for", {"seed": 1}),
        ("chunk 30 there, 20 asked for", {"chunk": 20}),
        (r"shape \[100, 12\] there, \[90, 12\] asked for", {"n": 90}),
        ("table name 'ddpm, 20 steps' there, 'ddim, 5 steps' asked for", {"sampler": "ddim", "steps": 5}),
        ("first 0 there, 7 asked for", {"first_sample": 7}),
        ("model sha256:", {"ema": False}),
    ]
    for words, options in cases:
        with pytest.raises(ArgumentError, match=words):
            draw(path, model, **options)
    with monkeypatch.context() as law:
        law.setattr(jobs, "NOISE_LAW_VERSION", 2)
        with pytest.raises(ArgumentError, match="noise_law 1 there, 2 asked for"):
            draw(path, model)
    with monkeypatch.context() as version:
        version.setattr(fd, "__version__", "9.9")
        with pytest.raises(ArgumentError, match=r"version '.*' there, '9.9' asked for"):
            draw(path, model)
    zarr.create_array(tmp_path / "foreign.zarr", shape=(3,), dtype="f4")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("dear")
    for name, words in (("foreign.zarr", "not written"), ("folder", "other things"), ("folder/letter.txt", "a file")):
        with pytest.raises(ArgumentError, match=words):
            draw(tmp_path / name, model)
    assert (tmp_path / "folder" / "letter.txt").read_text() == "dear"
    with pytest.raises(DataError, match="no array"):
        fd.scale.check(tmp_path / "absent")


class Failing(LocalStore):
    """A store whose writes of chunks fail from one on, so many times."""

    def __init__(self, root, number=errno.EIO, after=2, times=100):
        super().__init__(root)
        self.number, self.after, self.times = number, after, times

    async def set(self, key, value):
        if key.startswith("c/"):
            self.after -= 1
            if self.after < 0 and self.times > 0:
                self.times -= 1
                raise OSError(self.number, "it does not go")
        await super().set(key, value)


def test_disk_full(tmp_path, model):
    """It ends at once, what is there stays, and the same call goes on."""
    path = tmp_path / "a.zarr"
    with pytest.raises(DataError, match="the disk is full") as caught:
        draw(Failing(path, errno.ENOSPC), model)
    assert "2 of 4 chunks" in caught.value.__notes__[0]
    assert fd.scale.check(path)[1:] == (2, 4, [])
    np.testing.assert_array_equal(draw(path, model)[:], model.sample(N))


def test_writes_that_fail_are_tried_again(tmp_path, model):
    np.testing.assert_array_equal(draw(Failing(tmp_path / "a.zarr", times=3), model)[:], model.sample(N))
    with pytest.raises(BackendError, match=r"chunk \d has failed 4 times.*2 of 4 chunks are in"):
        draw(Failing(tmp_path / "b.zarr"), model)


def test_memory_and_urls(model):
    np.testing.assert_array_equal(draw(MemoryStore(), model)[:], model.sample(N))
    np.testing.assert_array_equal(draw("memory://a.zarr", model)[:], model.sample(N))
    np.testing.assert_array_equal(draw("memory://a.zarr", model)[:], model.sample(N))


def test_bad_arguments(tmp_path, model):
    for options in ({"n": 0}, {"chunk": 0}, {"client": 0}, {"client": "none"}, {"client": object()}, {"labels": 1}):
        with pytest.raises((ArgumentError, BackendError)):
            draw(tmp_path / "a.zarr", model, **options)
    with pytest.raises(fd.errors.TrainingError):
        draw(tmp_path / "b.zarr", fd.Diffusion())
    with pytest.raises(ArgumentError, match="X: got shape"):
        fd.scale.score_to(tmp_path / "b.zarr", model, np.zeros((3, 5)), chunk=1)


def test_import_is_light():
    code = "import sys, fastdiff; fastdiff.scale; assert not {'zarr', 'dask', 'distributed', 'joblib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_zarr(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(fd.errors.FastdiffError, match=r"fastdiff-engine\[scale\]"):
        draw(tmp_path / "a.zarr", model)


def test_command(tmp_path, model, capsys):
    from fastdiff.cli import main

    model.save(tmp_path / "m.safetensors")
    store_, saved = str(tmp_path / "a.zarr"), str(tmp_path / "m.safetensors")
    common = ["sample", saved, "--to", store_, "-n", "50", "--quiet"]
    assert main([*common, "--chunk", "20"]) == 0
    assert main([*common, "--workers", "2"]) == 0  # it goes on with the chunks that are there
    assert f"{store_}: 50 samples of shape (12,) in 3 chunks" in capsys.readouterr().out
    np.testing.assert_array_equal(zarr.open_array(store_, mode="r")[:], model.sample(50))
    assert main(["sample", saved, "-n", "5"]) != 0
    assert main([*common, "--workers", "2", "--scheduler", "tcp://a:1"]) != 0
    assert main(["sample", saved, "-o", str(tmp_path / "x.csv"), "--workers", "2"]) != 0


def test_the_documented_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(block.replace("4_000", "40").replace("1_000", "10").replace("steps=200", "steps=2"), names)
    np.testing.assert_array_equal(names["array"][5:9], names["model"].sample(4, first_sample=5))


def test_fit_on_stored_arrays(tmp_path, curves, monkeypatch):
    """Of zarr, in compressed chunks, and of Dask: what the same array in memory makes, to the bit."""
    monkeypatch.setattr(stored, "FEW_VALUES", 500)
    on_disk = zarr.create_array(tmp_path / "X.zarr", data=curves, chunks=(17, 12))
    digests = set()
    for X in (curves, on_disk, dask.array.from_zarr(on_disk), zarr.open(tmp_path / "X.zarr", mode="r")):
        one = fd.Diffusion(fd.MLP(12, hidden=(16,), T=10), backend="cpu")
        digests.add(one.fit(X, steps=20, batch=32, progress=False).digest())
    assert len(digests) == 1


def test_content_hash_tells_arrays_apart():
    a = np.arange(6.0)
    different = [a, a.astype(np.float32), a.reshape(2, 3), a[::-1].copy(), None, 3, "x", [1, 2], {"b": 1}]
    found = {str(store.content_hash(one)) for one in different}
    assert len(found) == len(different)
    assert store.content_hash(a.copy()) == store.content_hash(a)
