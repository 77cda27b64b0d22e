"""Checkpoints: files of earlier versions, what a file says of itself, and that a damaged or hostile one is refused.

tests/data/0.1.0 holds what version 0.1.0 saved of the `FIRST` models after three steps, on the cpu backend;
``format-1`` was written before there were formats 2 and 3.
"""

import copy
import errno
import json
import os
import re
import struct
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tolerances import CPU_STEPS, assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint
from fastdiff.errors import ArgumentError, CheckpointError, DataError, TrainingError
from fastdiff.files import reading
from fastdiff.normaliser import Normaliser

DATA = Path(__file__).parent / "data" / "0.1.0"

# Integers, and quotients that every machine rounds alike.
CURVES = ((np.arange(20 * 6) * 37) % 101 / np.float32(101)).reshape(20, 6).astype(np.float32)
PICTURES = ((np.arange(12 * 6) * 37) % 251).astype(np.uint8).reshape(12, 3, 2, 1)
LABELS = np.arange(12) % 2
SMOOTH = ((np.arange(12) * 5) % 7).reshape(6, 2) / 8
PLAN = {"batch": 5, "lr": 0.01, "warmup": 2, "decay_steps": 9, "clip_norm": 1.0, "ema": 0.9, "progress": False}


def curve_model(backend="cpu"):
    net = fd.MLP(6, hidden=(5,), T=8, seed=1)
    return fd.Diffusion(net, fd.Schedule.cosine(8), prediction="v", backend=backend, seed=2)


def shaped_model(backend="cpu"):
    shape = fd.NoiseShape.low_rank(SMOOTH, 0.5)
    net, schedule = fd.MLP.tutorial(6, T=8, seed=1), fd.Schedule.linear(8, beta_start=0.01, beta_end=0.9)
    return fd.Diffusion(net, schedule, prediction="noise", backend=backend, seed=2**64 - 1, noise_shape=shape)


def picture_model(backend="cpu"):
    net = fd.UNet(
        (3, 2, 1), channels=(2,), attention=(False,), blocks=1, T=8, classes=2, null_class=False, dropout=0.2, groups=1,
        embedding=2,
        seed=1,
    )  # fmt: skip
    model = fd.Diffusion(net, fd.Schedule.cosine(8), prediction="x0", backend=backend, seed=2)
    model.class_names = ["ant", "bee"]
    return model


def learn(model, steps):
    if model.net.shape == (6,):
        return model.fit(CURVES, steps=steps, validation=0.25, **PLAN)
    return model.fit(PICTURES, LABELS, steps=steps, validation=0.25, flip=True, accumulate=2, **PLAN)


FIRST = {"format-1": curve_model, "curves": curve_model, "shaped": shaped_model, "pictures": picture_model}
STEPS = 3  # that were taken before the files were saved


def parts(path):
    """Header and tensors, whatever they are."""
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["fastdiff"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assemble(path, header, tensors):
    if "header_digest" in header:
        header = {**header, "header_digest": checkpoint.header_digest(header)}
    save_file(tensors, path, {"fastdiff": json.dumps(header)})
    return path


def rewritten(path, change):
    """Change header and tensors of a file in place, as somebody may who knows the format: with the right digest."""
    header, tensors = parts(path)
    change(header, tensors)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    if "digest" in header:
        header["digest"] = checkpoint.digest(tensors)
    return assemble(path, header, tensors)


def refusal(path, act=fd.load):
    with pytest.raises(CheckpointError) as caught:
        act(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def outcome(path):
    """Nothing where a file loads, or the message of its refusal."""
    try:
        fd.load(path)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Bytes of a checkpoint of each model, as it is written now."""
    folder = tmp_path_factory.mktemp("written")
    for name in ("curves", "shaped", "pictures"):
        learn(FIRST[name](), STEPS).save(folder / name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def file(written, tmp_path):
    """Where a checkpoint of curves lies."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(written["curves"])
    return path


@pytest.fixture
def pictures(written, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(written["pictures"])
    return path


# --------------------------------------------------------------------------------------- files of earlier versions


def trained_weights(model):
    """All weights but the biases of keys: their gradient is rounding alone, of which Adam makes a step."""
    flat = model.net.flat.astype(np.float64)
    for name, view in model.net.layout.views(flat).items():
        if name.endswith("to_qkv.bias"):
            view[len(view) // 3 : 2 * len(view) // 3] = 0
    return flat


def assert_near(model, other, start):
    moved = np.linalg.norm(trained_weights(other) - start)
    assert np.linalg.norm(trained_weights(model) - trained_weights(other)) <= CPU_STEPS * moved
    assert moved > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_files_of_the_first_version_go_on(name, backend):
    """A model from a file goes on like one that was trained here.

    To the bit where three steps made here have the bits of the file, which is promised for one kind of CPU and one
    value of `arithmetic`; else as near as those three steps are.
    """
    old, new = fd.load(DATA / f"{name}.safetensors", backend=backend), learn(FIRST[name](backend), STEPS)
    start = trained_weights(FIRST[name](backend))
    assert (old.step, old.ema_updates, old.seed) == (STEPS, STEPS, new.seed)
    assert old.net.to_dict() == new.net.to_dict()
    assert (old.schedule, old.prediction, old.class_names) == (new.schedule, new.prediction, new.class_names)
    assert old.noise_shape == new.noise_shape
    assert replace(old.normaliser, mean=0, std=1) == replace(new.normaliser, mean=0, std=1)
    for name in ("mean", "std"):
        assert getattr(old.normaliser, name) == pytest.approx(getattr(new.normaliser, name), rel=1e-12)
    assert old.history["step"] == [0, 1, 2]
    same = np.array_equal(old.net.flat, new.net.flat) and old.history["loss"] == new.history["loss"]
    for each in (old, new):
        learn(each, 2)
    np.testing.assert_allclose(old.history["loss"], new.history["loss"], rtol=CPU_STEPS)
    if same:
        assert old.history["loss"] == new.history["loss"]
        for ema in (True, False):
            assert_same_bits(old.denoiser(ema=ema).flat, new.denoiser(ema=ema).flat)
        labels = None if old.net.shape == (6,) else [0, 1, 0]
        assert_same_bits(old.sample(3, labels=labels), new.sample(3, labels=labels))
    else:
        assert_near(old, new, start)


@pytest.mark.parametrize("name", ["format-1", "curves", "weights", "shaped", "pictures"])
def test_files_of_the_first_version_come_back_as_they_are(name, tmp_path):
    """Saved again a file has the same values; and goes on from there to the same bits, on any CPU."""
    model = fd.load(DATA / f"{name}.safetensors", backend="cpu")
    model.save(tmp_path / "m.safetensors")
    tensors, again = load_file(DATA / f"{name}.safetensors"), load_file(tmp_path / "m.safetensors")
    assert tensors.keys() == again.keys()
    for key, tensor in tensors.items():
        assert_same_bits(again[key], tensor)
    if name != "weights":
        other = fd.load(tmp_path / "m.safetensors", backend="cpu")
        assert_same_bits(learn(other, 2).net.flat, learn(model, 2).net.flat)


def test_weights_of_the_first_version_draw_and_do_not_learn():
    whole, weights = (fd.load(DATA / f"{name}.safetensors", backend="cpu") for name in ("curves", "weights"))
    for ema in (True, False):
        assert_same_bits(weights.sample(3, ema=ema), whole.sample(3, ema=ema))
    with pytest.raises(TrainingError, match="training=False"):
        learn(weights, 1)


def test_the_first_format_is_of_white_noise_and_of_curves():
    model = fd.load(DATA / "format-1.safetensors", backend="cpu")
    assert model.noise_shape is None
    assert model.normaliser.data_range is None
    assert json.loads(safe_open(DATA / "format-1.safetensors", "np").metadata()["fastdiff"])["format"] == 1


# --------------------------------------------------------------------------------------- what is written and read


def test_header_and_tensors_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.array([np.nan, -0.0, 1e300]),
        "transposed": np.arange(6.0).reshape(2, 3).T, "number": np.array(2.5), "none": np.zeros((0, 3), np.float32),
        "counts": np.array([2**62, -1]),
    }  # fmt: skip
    header = {"text": "e\N{COMBINING ACUTE ACCENT}\N{SNOWMAN}", "seed": 2**64 - 1, "list": [1, None, True, 1e-300]}
    checkpoint.write(path, header, tensors)
    facts, arrays = checkpoint.read(path)
    assert facts.items() >= header.items()
    assert arrays.keys() == tensors.keys()
    for name, array in arrays.items():
        assert_same_bits(array, tensors[name])
        array[...] = 0  # is the reader's own


def test_a_file_describes_itself(file, pictures):
    for path, count in ((file, 6 * 5 + 5 + 5 * 6 + 6 + 32 * 10 + 10), (pictures, None)):
        facts, model = checkpoint.describe(path), fd.load(path)
        assert facts["parameters"] == model.net.layout.count
        assert count in (None, facts["parameters"])
        assert facts["tensors"] == {name: list(array.shape) for name, array in load_file(path).items()}
        assert facts["network"] == model.net.to_dict()
        assert facts["step"] == STEPS
        assert json.loads(json.dumps(facts)) == facts


def test_the_same_model_makes_the_same_bytes(written, tmp_path):
    for name, content in written.items():
        path = tmp_path / name
        path.write_bytes(content)
        fd.load(path, backend="numpy").save(path)
        assert path.read_bytes() == content
        learn(FIRST[name](), STEPS).save(path)
        assert path.read_bytes() == content


def test_without_training_a_file_is_half_as_large(file, tmp_path):
    model = fd.load(file, backend="cpu")
    model.save(tmp_path / "w.safetensors", training=False)
    assert {name.split(".")[0] for name in load_file(tmp_path / "w.safetensors")} == {"net", "ema", "history"}
    assert (tmp_path / "w.safetensors").stat().st_size < 0.6 * file.stat().st_size
    weights = fd.load(tmp_path / "w.safetensors", backend="cpu")
    assert_same_bits(weights.sample(2), model.sample(2))
    assert weights.history == model.history
    with pytest.raises(TrainingError, match="training=False"):
        learn(weights, 1)
    weights.save(tmp_path / "again.safetensors")  # there is nothing to keep
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_save_that_fails_leaves_the_last_one(file, monkeypatch, step):
    before = file.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = learn(fd.load(file, backend="cpu"), 1)
    monkeypatch.setattr(step, full)
    with pytest.raises(DataError, match=r"m\.safetensors: cannot be written: No space left"):
        model.save(file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
    model.save(file)
    assert fd.load(file).step == STEPS + 1


def test_a_header_that_is_not_json_is_not_written(tmp_path):
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            checkpoint.write(tmp_path / "x.safetensors", {"bad": bad}, {"a": np.zeros(1, np.float32)})
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_trained_is_not_saved(tmp_path):
    with pytest.raises(TrainingError, match="call fit first"):
        curve_model().save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_seeds_and_names_of_pictures_come_back(pictures):
    model = fd.load(pictures, backend="cpu")
    assert model.normaliser == Normaliser(127.5, 127.5, None, (0, 255), True)
    assert model.class_names == ["ant", "bee"]
    assert_same_bits(model.sample(2, labels=1), learn(picture_model(), STEPS).sample(2, labels=1))


# --------------------------------------------------------------------------------------- format 3


def sums(tensors):
    """The digest as its docstring has it, word by word."""
    crc = 0
    for name, of in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {of.dtype.name} {of.shape} ".encode(), crc)
        content = of.astype(of.dtype.newbyteorder("<")).tobytes()
        while len(content) >= 8 * 509:
            block = content[: 61 * 8 * 509]
            block = block[: len(block) // (8 * 509) * 8 * 509]
            words = struct.unpack(f"<{len(block) // 8}Q", block)
            crc = zlib.crc32(struct.pack("<509Q", *(sum(words[k::509]) % 2**64 for k in range(509))), crc)
            content = content[len(block) :]
        crc = zlib.crc32(content, crc)
    return f"sum64:{crc:08x}"


def test_the_digest_of_large_tensors():
    rng = np.random.default_rng(3)
    tensors = {"a": rng.standard_normal((300, 411)), "b": rng.standard_normal(2037).astype(np.float32)}
    for extra in (0, 1, 508, 509):  # none, some and all words of a row behind the last block
        tensors["c"] = np.arange(61 * 509 + extra, dtype=np.int64) << 40
        assert checkpoint.digest(tensors) == sums(tensors)
    was, content = checkpoint.digest(tensors), tensors["a"].reshape(-1).view(np.uint8)
    for _ in range(300):
        at, bit = int(rng.integers(content.size)), np.uint8(1 << int(rng.integers(8)))
        content[at] ^= bit
        assert checkpoint.digest(tensors) != was
        content[at] ^= bit
    assert checkpoint.digest(tensors) == was
    pages = content[: content.size // 4096 * 4096].reshape(-1, 4096)
    for one, other in [(0, 1), (3, 50), (7, 128), (64, 200)]:
        pages[[one, other]] = pages[[other, one]]
        assert checkpoint.digest(tensors) != was
        pages[[one, other]] = pages[[other, one]]
    tensors["a"] *= -1
    assert checkpoint.digest(tensors) != was


def test_a_flipped_bit_of_the_header_is_noticed(file):
    content, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    want, refused = checkpoint.read(file)[0], 0
    for at in rng.integers(8, 8 + int.from_bytes(content[:8], "little"), 400):
        bit = 1 << int(rng.integers(8))
        content[at] ^= bit
        file.write_bytes(content)
        content[at] ^= bit
        try:
            found = checkpoint.read(file)[0]  # as with a tab for a blank, or the digest's own name
            assert {key: found.get(key) for key in want.keys() - {"header_digest"}} == {
                key: value for key, value in want.items() if key != "header_digest"
            }
        except CheckpointError:
            refused += 1
    assert refused > 380


def test_a_file_with_the_digest_of_every_byte_is_still_checked(file):
    header, tensors = parts(file)
    crc = 0
    for name, of in sorted(tensors.items()):
        crc = zlib.crc32(of.tobytes(), zlib.crc32(f"{name} {of.dtype.name} {of.shape} ".encode(), crc))
    header["digest"] = f"crc32:{crc:08x}"
    fd.load(assemble(file, header, tensors), backend="cpu")
    tensors["net.layers.0.bias"][0] += 1
    assert "altered or damaged" in refusal(assemble(file, header, tensors))


def test_the_header_of_a_new_file(file):
    header, tensors = parts(file)
    assert header["format"] == checkpoint.FORMAT_VERSION == 3
    assert header["noise_law"] == header["arithmetic"] == 1
    assert header["features"] == []
    assert header["digest"] == sums(tensors)


def test_without_the_new_keys_a_file_is_as_of_the_first_version(file):
    model = fd.load(file, backend="cpu")
    header, tensors = parts(file)
    for key in ("features", "arithmetic", "digest", "header_digest"):
        del header[key]
    other = fd.load(assemble(file, header, tensors), backend="cpu")
    assert_same_bits(learn(other, 2).net.flat, learn(model, 2).net.flat)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["telepathy"], "this file needs the feature 'telepathy', which this fastdiff does not have: update fastdiff"),
        (["adagrad", "zeal"], "this file needs the features 'adagrad', 'zeal', which this"),
        (["known", "zeal"], "this file needs the feature 'zeal', which this"),
        ("zeal", "features 'zeal', where a list of names is wanted"),
        ([1], r"features \[1\], where a list of names is wanted"),
        (None, "features None, where a list of names is wanted"),
    ],
)
@pytest.mark.parametrize("act", [fd.load, checkpoint.read, checkpoint.describe])
def test_features_are_known_or_refused_by_name(file, monkeypatch, features, message, act):
    monkeypatch.setattr(checkpoint, "FEATURES", frozenset({"known"}))
    rewritten(file, lambda header, tensors: header.update(features=features))
    assert re.search(message, refusal(file, act))


def test_features_are_written_sorted(tmp_path, monkeypatch):
    path, tensors = tmp_path / "x.safetensors", {"a": np.zeros(1, np.float32)}
    monkeypatch.setattr(checkpoint, "FEATURES", frozenset({"known", "also known"}))
    checkpoint.write(path, {}, tensors, features=["known", "also known", "known"])
    assert checkpoint.describe(path)["features"] == checkpoint.read(path)[0]["features"] == ["also known", "known"]
    with pytest.raises(AssertionError, match="unknown"):
        checkpoint.write(path, {}, tensors, features=["unknown"])


def test_training_with_another_arithmetic_is_said_once(file, monkeypatch, caplog, tmp_path):
    said = "trained with arithmetic 1 so far, now with 2: equal to one run up to rounding, not to the bit"
    monkeypatch.setattr(checkpoint, "ARITHMETIC", 2)
    model, again = fd.load(file, backend="cpu"), tmp_path / "again.safetensors"
    model.sample(1)
    learn(model, 0).save(again)
    assert not caplog.records
    assert checkpoint.describe(again)["arithmetic"] == 1  # still
    learn(fd.load(again, backend="cpu"), 1)
    assert [record.getMessage() for record in caplog.records] == [said]
    learn(learn(model, 1), 1).save(again)
    assert [record.getMessage() for record in caplog.records] == [said, said]
    assert checkpoint.describe(again)["arithmetic"] == 2
    learn(fd.load(again, backend="cpu"), 1)
    learn(fd.load(DATA / "curves.safetensors", backend="cpu").reset(), 1)
    assert len(caplog.records) == 2
    learn(fd.load(DATA / "curves.safetensors", backend="cpu"), 1)  # which does not say: 1
    assert len(caplog.records) == 3


def test_networks_along_rows_have_an_arithmetic_of_their_own(caplog, tmp_path):
    """Files that were trained before are said to go on in other bits; new ones, and other networks, are not."""
    path, curves = tmp_path / "m.safetensors", fd.data.harmonic_curves(16, points=8)
    for net, number in ((fd.UNet((8,), channels=(4,), blocks=1, T=5), 2), (fd.MLP(8, T=5), 1)):
        model = fd.Diffusion(net, fd.Schedule.cosine(5), backend="cpu")
        model.fit(curves, steps=1, batch=4, progress=False).fit(curves, steps=1, progress=False).save(path)
        assert checkpoint.describe(path)["arithmetic"] == number
        rewritten(path, lambda header, tensors: header.pop("arithmetic"))
        caplog.clear()
        fd.load(path, backend="cpu").fit(curves, steps=1, progress=False)
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [words.split(":")[0] for words in said] == ["trained with arithmetic 1 so far, now with 2"] * (
            number - 1
        )


@pytest.mark.parametrize("arithmetic", [0, "1", None, 1.0, True])
def test_a_bad_arithmetic_is_refused(file, arithmetic):
    rewritten(file, lambda header, tensors: header.update(arithmetic=arithmetic))
    assert "arithmetic: got" in refusal(file)


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["net.layers.0.bias"].__setitem__(0, np.nextafter(t["net.layers.0.bias"][0], np.float32(9))),
        lambda t: swap(t, "net.layers.0.bias", "ema.layers.0.bias"),
        lambda t: t.update({"history.step": t["history.step"].view(np.float64)}),
        lambda t: t.update({"net.layers.0.weight": t["net.layers.0.weight"].reshape(5, 6)}),
        lambda t: t.pop("history.validation_loss"),
        lambda t: t.update({"more": np.zeros(0, np.float32)}),
        lambda t: t.update({"net.layers.0.bias ": t.pop("net.layers.0.bias")}),
    ],
)
def test_a_digest_notices_what_was_altered(file, change):
    header, tensors = parts(file)
    change(tensors)
    assemble(file, header, tensors)
    assert refusal(file) == f"{file}: its content was altered or damaged after it was written: the digest differs"
    refusal(file, checkpoint.read)
    assert checkpoint.describe(file)["digest"] == header["digest"]  # which reads no values


@pytest.mark.parametrize("digest", ["", "crc32:00000000", "sha256:0", 7, [], {}])
def test_another_digest_is_refused(file, digest):
    header, tensors = parts(file)
    assert "altered or damaged" in refusal(assemble(file, {**header, "digest": digest}, tensors))


@pytest.mark.parametrize("act", [fd.load, checkpoint.describe])
def test_a_file_that_is_saved_anew_while_it_is_read_is_read_as_it_was(file, monkeypatch, act):
    later, opened, want = learn(fd.load(file, backend="cpu"), 1), [], act(file)

    @contextmanager
    def slow(path):
        with reading(path) as found:
            opened.append(path)
            later.save(file)
            yield found

    monkeypatch.setattr("fastdiff.tensor_file.reading", slow)
    got = act(file)
    assert len(opened) == 1
    if act is fd.load:
        assert got.step == STEPS
        assert_same_bits(got.net.flat, want.net.flat)
        assert got.history == want.history
    else:
        assert got == want
    monkeypatch.undo()
    assert fd.load(file).step == STEPS + 1


# --------------------------------------------------------------------------------------- damaged files


def test_a_file_cut_anywhere_is_refused(file):
    content = file.read_bytes()
    for size in [*range(0, len(content), 41), len(content) - 1]:
        file.write_bytes(content[:size])
        assert "not a whole safetensors file" in refusal(file)
        refusal(file, checkpoint.describe)
    file.write_bytes(content + b"\0")
    assert "not a whole safetensors file" in refusal(file)


def test_a_byte_that_changed_never_raises_anything_else(file):
    """A header may still be good; nothing but a `CheckpointError` comes of what is not, and of all changed values."""
    content, refused = bytearray(file.read_bytes()), 0
    values = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(0, values, 11), *range(values, len(content), 7)]:
        damaged = content.copy()
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        said = outcome(file)
        assert not said or said.startswith(f"{file}: ")
        assert at < values or "altered or damaged" in said
        refused += bool(said)
    assert refused > 1000


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    assert "there is no such file" in refusal(path)
    assert "not a whole safetensors file" in refusal(tmp_path)
    path.write_bytes(b"")
    refusal(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refusal(path)
    for text in (b"PK\x03\x04 not a checkpoint", b"x" * 1000, b"\x02\0\0\0\0\0\0\0{}"):
        path.write_bytes(text)
        refusal(path)
    save_file({"weight": np.ones(3, np.float32)}, path)
    assert "not a fastdiff checkpoint" in refusal(path)
    save_file({"weight": np.ones(3, np.float32)}, path, {"other": "{}"})
    assert "not a fastdiff checkpoint" in refusal(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no format version"),
        ("7", "no format version"),
        ("{}", "no format version"),
        ('{"format": "2"}', "no format version"),
        ('{"format": true}', "no format version"),
        ('{"format": 0}', "no format version"),
        ('{"format": 2.0}', "no format version"),
        ('{"format": 99}', "format version 99, this fastdiff reads up to .*: update fastdiff"),
        ('{"format": 4}', "format version 4, this fastdiff reads up to 3: update fastdiff"),
        ('{"format": 2}', "noise law None, this fastdiff has 1"),
        ('{"format": 2, "noise_law": 2}', "noise law 2, this fastdiff has 1"),
        ('{"format": 2, "noise_law": 1}', "the header lacks 'network'"),
    ],
)
def test_bad_headers_are_refused(tmp_path, text, message):
    path = tmp_path / "x.safetensors"
    save_file({"weight": np.ones(3, np.float32)}, path, {"fastdiff": text})
    with pytest.raises(CheckpointError, match=message):
        fd.load(path)


JUNK = (None, True, -1, 0.5, 10**400, "", "x", [], [None], {}, {"kind": 1}, [[[]]])


def paths_of(header, start=()):
    """The place of every value in a nested header."""
    for key, value in header.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*start, key))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curves", "shaped", "pictures"])
def test_junk_anywhere_in_the_header_never_raises_anything_else(written, tmp_path, name):
    path = tmp_path / "m.safetensors"
    path.write_bytes(written[name])
    header, tensors = checkpoint.read(path)
    refused = 0
    for place in paths_of(header):
        for junk in (*JUNK, KeyError):
            changed = copy.deepcopy(header)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            if junk is KeyError:
                del inner[place[-1]]
            else:
                inner[place[-1]] = junk
            said = outcome(assemble(path, changed, tensors))
            assert not said or said.startswith(f"{path}: ")
            refused += bool(said)
    assert refused > 300


def put(name, array):
    return lambda header, tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: t.pop("net.layers.0.bias"), r"net\.layers\.0\.bias: got no such tensor"),
        (lambda h, t: t.pop("ema.layers.0.bias"), r"ema\.layers\.0\.bias: got no such tensor"),
        (lambda h, t: t.pop("adam.m.time.bias"), r"adam\.m\.time\.bias: got no such tensor"),
        (lambda h, t: t.pop("history.loss"), r"the header lacks 'history\.loss'"),
        (put("history.loss", np.ones(4)), r"history\.loss: got 4 values, wants 3 values, as history\.step has"),
        (put("history.loss", np.ones((3, 1))), r"history\.loss: got shape"),
        (put("net.more", np.ones(3, np.float32)), r"net\.more: got a tensor in the file, wants none"),
        (put("net.layers.0.bias", np.ones(6, np.float32)), r"net\.layers\.0\.bias: got shape \(6,\)"),
        (put("net.layers.0.bias", np.ones(5)), r"net\.layers\.0\.bias: got dtype float64"),
        (put("net.layers.0.bias", np.ones(5, np.int64)), r"net\.layers\.0\.bias: got dtype int64"),
        (put("adam.v.layers.0.bias", np.full(5, -1, np.float32)), r"adam\.v: got -1\.0"),
        (put("more", np.ones(3, np.float32)), r"more: got a tensor in the file, wants none"),
        (put("noise_shape.factor", np.ones(3)), r"noise_shape\.factor: got a tensor in the file, wants none"),
        (lambda h, t: h.update(step=2), r"history\.step: got 3 steps, wants 0 to 1"),
        (lambda h, t: t["history.step"].__setitem__(1, 7), r"history\.step: got 3 steps"),
        (put("net.layers.0.bias", np.ones(5, np.float16)), "tensors of type F16, wants F32, F64, I64"),
        (put("ema.layers.0.bias", np.full(5, np.nan, np.float32)), r"ema\.layers\.0\.bias: got nan at index \(0,\)"),
        (put("adam.v.layers.0.bias", np.full(5, np.inf, np.float32)), r"adam\.v\.layers\.0\.bias: got inf"),
        (lambda h, t: h["network"].update(points=7), r"net\.layers\.0\.weight: got shape"),
        (lambda h, t: h["network"].update(hidden=[]), r"net\.layers\.0\.weight: got shape"),
        (lambda h, t: h["network"].update(T=9), "schedule: got T = 8, wants T = 9"),
        (lambda h, t: h["network"].update(kind="lstm"), "kind"),
        (lambda h, t: h["network"].update(dtype="float64"), r"net\.layers\.0\.weight: got dtype float32"),
        (lambda h, t: h.update(seed=2**64), "seed: got 18446744073709551616"),
        (lambda h, t: h.update(step=-1), "step: got -1"),
        (lambda h, t: h.update(prediction="x"), "prediction: got 'x'"),
        (lambda h, t: h.update(step=1 << 63), "step: got 9223372036854775808"),
        (lambda h, t: h.update(ema_updates=10**400), "ema_updates: got 1000"),
        (lambda h, t: h["training"].update(warmup=10**400, decay_steps=None), "warmup: got 1000"),
        (lambda h, t: h["training"].update(decay_steps=10**400), "decay_steps: got 1000"),
        (lambda h, t: h["normaliser"].update(std=0), r"normaliser\.std: got 0"),
        (lambda h, t: h["normaliser"].update(data_range=[0, 1]), r"normaliser\.data_range: got \[0, 1\]"),
        (lambda h, t: h["training"].update(momentum=1), "training plan: got keys"),
        (lambda h, t: h["training"].update(ema=2), "ema: got 2"),
        (lambda h, t: h.update(class_names=["ant"]), r"class_names: got \['ant'\]"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused(file, change, message):
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: {message}"):
        fd.load(rewritten(file, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h["network"].update(channels=[4]), r"net\.\S+: got shape"),
        (lambda h, t: h["network"].update(blocks=2), r"net\.down_blocks\.0\.resnets\.1\.\S+: got no such tensor"),
        (lambda h, t: h["network"].update(middle_attention=False), r"net\.mid_block\.attentions\.0\.\S+: got a tensor"),
        (lambda h, t: h["network"].update(classes=None), r"net\.class_embedding\.weight: got a tensor"),
        (lambda h, t: h["network"].update(shape=[3, 2, 3]), r"net\.conv_in\.weight: got shape"),
        (lambda h, t: h["network"].pop("eps"), "network: got"),
        (lambda h, t: h["network"].update(kind="transformer"), "network|kind"),
        (lambda h, t: t.pop("net.conv_out.bias"), r"net\.conv_out\.bias: got no such tensor"),
        (lambda h, t: t.pop("ema.conv_out.bias"), r"ema\.conv_out\.bias: got no such tensor"),
        (lambda h, t: h["normaliser"].update(data_range=None), "data_range"),
        (lambda h, t: h["normaliser"].update(data_range=[0]), "data_range"),
        (lambda h, t: h.update(class_names=["ant"]), "class_names"),
    ],
)
def test_a_file_of_pictures_that_does_not_fit_itself_is_refused(pictures, change, message):
    with pytest.raises(CheckpointError, match=message):
        fd.load(rewritten(pictures, change), backend="numpy")


@pytest.mark.parametrize(
    "network", [{"hidden": [65536] * 300}, {"kind": "tutorial", "hidden": [], "points": 65536, "T": 1 << 20}]
)
def test_a_header_that_claims_a_huge_network_is_refused(file, network):
    def change(header, tensors):
        header["network"].update(network)

    refusal(rewritten(file, change))


def test_training_rows_are_kept_only_if_asked(tmp_path):
    X = fd.data.harmonic_curves(100, points=6)
    model = fd.Diffusion(fd.MLP(6, hidden=(4,), T=5), backend="numpy")
    path = tmp_path / "m.safetensors"
    model.fit(X, steps=2, batch=4, validation=0.0, progress=False).save(path)
    assert model.kept_rows is None
    assert fd.load(path).kept_rows is None
    assert "kept rows" not in checkpoint.describe(path)["features"]
    model.fit(X, steps=1, batch=4, keep_rows=4, progress=False).save(path)
    kept = fd.load(path, backend="numpy")
    np.testing.assert_array_equal(kept.kept_rows, X[[0, 33, 66, 99]])
    assert checkpoint.describe(path)["kept_rows"] == 4
    assert kept.fit(X, steps=1, batch=4, progress=False).kept_rows.shape == (4, 6)  # those kept before
    model.save(path, training=False)  # to be passed on
    assert fd.load(path).kept_rows is None
    model.save(path, training=False, rows=True)
    assert len(fd.load(path).kept_rows) == 4
    assert model.fit(X, steps=1, batch=4, keep_rows=0, progress=False).kept_rows is None
    with pytest.raises(ArgumentError, match="keep_rows"):
        model.fit(X, steps=1, keep_rows=-1, progress=False)


def test_kept_rows_have_gaps_where_the_data_have(tmp_path):
    X = fd.data.harmonic_curves(40, points=6)
    X[::2, 1] = np.nan
    model = fd.Diffusion(fd.MLP(6, hidden=(4,), T=5), backend="numpy")
    model.fit(X, steps=1, batch=4, validation=0.0, keep_rows=400, progress=False).save(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(fd.load(tmp_path / "m.safetensors").kept_rows, X)
