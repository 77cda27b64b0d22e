"""The safetensors format against the library of that name, and what is refused."""

import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import load, save

from fastdiff import tensor_file
from fastdiff.errors import CheckpointError

RANDOM = np.random.default_rng(0)
TYPES = [dtype for dtype in tensor_file.NAMES if dtype != np.bool_]
ARRAYS = {
    f"{dtype.name}.{k}": RANDOM.integers(0, 100, shape).astype(dtype)
    for dtype in TYPES
    for k, shape in enumerate([(), (3,), (2, 0), (5, 1, 3)])
} | {"ü.bool": np.array([True, False])}


def written(path, arrays, metadata):
    with path.open("wb") as file:
        tensor_file.write(file, arrays, metadata)
    return path.read_bytes()


@pytest.mark.parametrize("metadata", [{}, {"a": 'b"\n', "c": "é"}])
def test_what_is_written_is_what_the_library_writes(metadata, tmp_path):
    got = written(tmp_path / "x", ARRAYS, metadata)
    assert got == save(ARRAYS, metadata or None) or len(metadata) > 1  # the order of metadata is chance there
    assert load(got).keys() == ARRAYS.keys()


def test_what_is_read_is_what_was_written(tmp_path):
    written(tmp_path / "x", ARRAYS, {"a": "b"})
    file = tensor_file.read(tmp_path / "x")
    assert file.metadata == {"a": "b"}
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        got = file.array(name)
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()
    assert tensor_file.read(tmp_path / "x", values=False).tensors == file.tensors


def made(path, header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


def one(**changes):
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "no header"),
        (b"[]", "no header"),
        (b"{", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b"{" + b'"a":{' * 50_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "'a' is in its header twice"),
        ({"a": None}, "no dtype, shape and place"),
        (one(dtype="F8"), "has the type 'F8', which is not read"),
        (one(dtype=[]), "which is not read"),
        (one(shape=4), "no dtype, shape and place"),
        (one(shape=[True, 4]), "no dtype, shape and place"),
        (one(shape=[-1, -4]), "no dtype, shape and place"),
        (one(shape=[1 << 32, 1 << 32]), "has 4 bytes, which is not its shape's"),
        (one(shape=[1] * 40), "not its shape's"),
        (one(data_offsets=[0, 4, 5]), "no dtype, shape and place"),
        (one(data_offsets=[4, 0]), "not its shape's"),
        (one(data_offsets=[1, 5]), "values that no tensor has"),
        (one() | {"b": one()["a"]}, "or two have"),
        (one(shape=[3], data_offsets=[0, 3]), "4 bytes of values, where the header has 3"),
        ({"__metadata__": {"a": 1}, **one()}, "metadata are no text"),
    ],
)
def test_bad_headers(header, message, tmp_path):
    path = made(tmp_path / "x", header, b"abcd")
    with pytest.raises(CheckpointError, match=f"x: not a whole safetensors file .*{message}"):
        tensor_file.read(path)


@pytest.mark.parametrize("part", [b"[],", b"1,", b'"a":{},'])
def test_headers_of_many_values_cost_nothing(part, tmp_path):
    path = made(tmp_path / "x", b"{" + part * 2_000_000)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="a header of more than"):
        tensor_file.read(path)
    assert time.process_time() - start < 1


def test_a_long_list_of_long_numbers_is_read(tmp_path):
    betas = json.dumps((np.arange(300_000) / 7e5).tolist())
    written(tmp_path / "x", {}, {"a": betas})
    assert tensor_file.read(tmp_path / "x").metadata == {"a": betas}


def test_a_sparse_file_that_claims_much_is_read_by_its_header_alone(tmp_path):
    path = tmp_path / "x"
    made(path, one(shape=[1 << 40], data_offsets=[0, 1 << 40]))
    with pytest.raises(CheckpointError, match="0 bytes of values, where the header has 1099511627776"):
        tensor_file.read(path)
    assert os.path.getsize(path) < 200
