"""Curves: made by their formula, read back as written, refused with file and line."""

import io
import logging
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiff.data import energy_distance, harmonic_curves, load_curves, save_curves
from fastdiff.errors import ArgumentError, DataError
from fastdiff.noise import Draw, Stream, philox_words

# --------------------------------------------------------------------------------------- made


def test_harmonic_curves_follow_their_formula():
    words = philox_words(3, 3, Draw(11, Stream.DATA)).reshape(3, 12)
    for row, curve in enumerate(harmonic_curves(3, seed=11)):
        u = [int(w >> 8) / 2**24 for w in words[row]]
        v = [
            sum(math.cos(2 * math.pi * 5.0 * u[j] * (k / 50) + math.pi * u[5 + j]) for j in range(5)) for k in range(50)
        ]
        np.testing.assert_allclose(curve, np.array(v) / np.std(v), rtol=2e-6, atol=2e-6)


def test_harmonic_curves_are_float32_with_unit_deviation():
    curves = harmonic_curves(200)
    assert curves.shape == (200, 50)
    assert curves.dtype == np.float32
    np.testing.assert_allclose(curves.std(axis=1), 1, rtol=1e-5)


def test_one_cosine_has_uniform_frequency_and_phase():
    curves = harmonic_curves(4000, cosines=1, points=40).astype(np.float64)
    # v[k - 1] + v[k + 1] = 2 cos(w) v[k]: the frequency, by least squares over k.
    inner, outer = curves[:, 1:-1], curves[:, :-2] + curves[:, 2:]
    w = np.arccos(np.clip((inner * outer).sum(1) / (2 * inner**2).sum(1), -1, 1))
    clear = w > 0.1  # below it, too little of a turn is seen for a phase
    k = np.arange(40)
    phase = []
    for curve, turn in zip(curves[clear], w[clear], strict=True):
        (a, b), *_ = np.linalg.lstsq(np.stack([np.cos(turn * k), -np.sin(turn * k)], 1), curve)
        phase.append(math.atan2(b, a))
    for name, fraction in (("frequency", w / (2 * math.pi * 0.1)), ("phase", np.array(phase) / math.pi)):
        fraction = np.sort(fraction)
        assert fraction[0] > -1e-3, name
        assert fraction[-1] < 1.001, name
        even = (np.arange(len(fraction)) + 0.5) / len(fraction)
        critical = 1.63 / math.sqrt(len(fraction))  # Kolmogorov-Smirnov, 1 %
        assert np.abs(fraction - even).max() < critical, name


@given(n=st.integers(0, 9), first=st.integers(0, 2**55), points=st.integers(2, 9), cosines=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_a_curve_depends_on_seed_and_index_alone(n, first, points, cosines):
    def make(n, first):
        return harmonic_curves(n, points=points, cosines=cosines, seed=5, first_sample=first)

    np.testing.assert_array_equal(make(n + 3, first)[3:], make(n, first + 3), strict=True)
    if n:
        assert not np.array_equal(make(n, first), make(n, first + 1))
        assert not np.array_equal(make(1, first), harmonic_curves(1, points=points, cosines=cosines, seed=6))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": -1}, "n"),
        ({"n": 2.5}, "n"),
        ({"n": 2, "points": 1}, "points"),
        ({"n": 2, "cosines": 0}, "cosines"),
        ({"n": 2, "max_frequency": 0}, "max_frequency"),
        ({"n": 2, "max_frequency": 0.6}, "max_frequency"),
        ({"n": 2, "seed": -1}, "seed"),
        ({"n": 2, "first_sample": -1}, "first_sample"),
    ],
)
def test_harmonic_curves_refuse(arguments, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got .*, wants "):
        harmonic_curves(**arguments)


# --------------------------------------------------------------------------------------- read


@pytest.mark.parametrize(
    "text",
    [
        "1,2.5\n-3,4e2\n",
        "1,2.5\n-3,4e2",
        "1;2.5\r\n-3;4e2\r\n",
        "1\t2.5\n-3\t4e2\n",
        "1 2.5\n -3   4e2 \n",
        "\ufeff1,2.5\n-3,4e2\n",
        "a,b\n1,2.5\n-3,4e2\n",
        '"a,b",c\n1,2.5\n-3,4e2\n',
        '"1","2.5"\n"-3","4e2"\n',
        "# a remark\n\n 1 , 2.5\n\n-3, 4e2\n\n",
    ],
)
def test_csv_dialects(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    np.testing.assert_array_equal(load_curves(path), np.array([[1, 2.5], [-3, 400]], np.float32), strict=True)


def test_csv_with_numbered_columns_is_read_without_them_and_says_so(tmp_path, caplog):
    path = tmp_path / "x.csv"
    path.write_text("0,1,2\n5,6,7\n")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert load_curves(path).tolist() == [[5, 6, 7]]
    assert "line 1" in caplog.text
    assert load_curves(path, header=False).tolist() == [[0, 1, 2], [5, 6, 7]]


def test_csv_header_can_be_forced(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("1,t2\n5,6\n")
    assert load_curves(path, header=True).tolist() == [[5, 6]]
    with pytest.raises(DataError, match=r"line 1, column 2: 't2' is not a number"):
        load_curves(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"x\.csv: empty file"),
        (b"\n  \n# nothing\n", r"x\.csv: empty file"),
        (b"a,b\n", r"x\.csv: column names and no curves"),
        (b"1,2\n\n3\n", r"line 3: 1 cells, where line 1 has 2"),
        (b"a,b,c\n1,2\n", r"line 2: 2 cells, where line 1 has 3"),
        (b"1,2\n3,x\n", r"line 2, column 2: 'x' is not a number"),
        (b"1,2\n3,\n", r"line 2, column 2: empty cell"),
        (b"1;2\n3;4,5\n", r"line 2, column 2: '4,5' is not a number"),
        (b"1,2\n1_0,4\n", r"line 2, column 1: '1_0' is not a number"),
        (b"1,2\n# c\n3,nan\n", r"line 3, column 2: nan is not a finite number"),
        (b"1,2\n-inf,3\n", r"line 2, column 1: -inf is not a finite number"),
        (b"1,2\n3,1e39\n", r"line 2, column 2: 1e\+39 is too large for float32"),
        (b",a,b\n0,1,2\n", r"line 1: .*row index"),
        (b"1,2\n\xff\xfe,3\n", r"x\.csv: not UTF-8 text"),
        (b"a\n1,2\n", r"line 2, column 1: '1,2' is not a number"),
        (b"x" * 200_000, r"x\.csv: column names and no curves"),
        (b'"' + b"x" * 200_000 + b'",1\n', r"x\.csv: not a CSV file"),
    ],
)
def test_csv_refusals_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        load_curves(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60) | st.text('0123456789.,;\t -+einfa"#\n\r', max_size=60).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_curves_or_a_data_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.csv", "any.npy"):
        (folder / name).write_bytes(content)
        try:
            curves = load_curves(folder / name)
        except DataError:
            continue
        assert curves.dtype == np.float32
        assert curves.ndim == 2
        assert np.isfinite(curves).all()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i1", "u8", "g"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_real_dtype(tmp_path, dtype, order):
    X = np.arange(6).reshape(2, 3).astype(dtype, order=order)
    np.save(tmp_path / "x.npy", X)
    loaded = load_curves(tmp_path / "x.npy")
    np.testing.assert_array_equal(loaded, X.astype(np.float32), strict=True)
    assert loaded.flags.c_contiguous


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"shape \(3,\), where \(curves, points\)"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((2, 3), complex), r"dtype complex128"),
        (np.zeros((2, 3), bool), r"dtype bool"),
        (np.zeros((2, 3), "U3"), r"dtype <U3"),
        (np.zeros((2, 3), [("a", "f4")]), r"dtype \[\('a'"),
        (np.array([[1, 2], [3, np.nan]]), r"curve 1, column 2: nan"),
        (np.array([[1, 1e300]]), r"curve 0, column 2: 1e\+300 is too large"),
    ],
)
def test_npy_refusals(tmp_path, X, message):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(DataError, match=message):
        load_curves(tmp_path / "x.npy")


def test_npy_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    np.save(tmp_path / "object.npy", np.array([[Trap(), 1]], object), allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Trap()))
    np.savez(tmp_path / "zip.npz", np.zeros((2, 3)))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    for name in ("object", "raw", "zip"):
        with pytest.raises(DataError):
            load_curves(tmp_path / f"{name}.npy")


def test_npy_cut_anywhere_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 5), np.float32))
    whole = buffer.getvalue()
    path = tmp_path / "x.npy"
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"truncated|not an \.npy file|unknown"):
            load_curves(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="something follows"):
        load_curves(path)


def test_npy_header_that_promises_terabytes(tmp_path):
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match="truncated"):
        load_curves(path)


def test_npy_of_an_unknown_format_is_called_so(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2, 3)))
    content = path.read_bytes()
    path.write_bytes(content[:6] + b"\x09\x01" + content[8:])
    with pytest.raises(DataError, match=r"x\.npy: unknown \.npy format 9\.1$"):
        load_curves(path)


def test_missing_files_and_unknown_endings(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: cannot be read: No such file"):
        load_curves(tmp_path / "none.csv")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(DataError, match=r"folder\.npy: cannot be read"):
        load_curves(tmp_path / "folder.npy")
    for act in (load_curves, lambda path: save_curves(path, np.zeros((1, 2)))):
        with pytest.raises(ArgumentError, match=r"^path: got .*x\.txt.*, wants .*\.csv or \.npy"):
            act(tmp_path / "x.txt")


# --------------------------------------------------------------------------------------- written


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@settings(max_examples=60, deadline=None)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, X):
    for name in ("saved.csv", "saved.NPY"):
        path = tmp_path_factory.getbasetemp() / name
        save_curves(path, X)
        back = load_curves(path, header=False)
        np.testing.assert_array_equal(back.view(np.uint32), X.view(np.uint32), strict=True)


def test_csv_keeps_every_bit_of_every_mantissa(tmp_path):
    X = np.random.default_rng(0).integers(0, 0x7F800000, (200, 5), np.uint32).view(np.float32)
    save_curves(tmp_path / "x.csv", X)
    np.testing.assert_array_equal(load_curves(tmp_path / "x.csv"), X, strict=True)


@pytest.mark.parametrize(
    "X", [np.zeros(3), np.array([[1, np.nan]]), np.array([["a"]]), [[1, 2], [3]], np.array([[1e300]])]
)
def test_save_refuses_what_load_would(tmp_path, X):
    with pytest.raises(ArgumentError, match=r"^X: got "):
        save_curves(tmp_path / "x.csv", X)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- compared


def test_energy_distance_is_its_formula():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 1

    def mean(A, B):
        return np.mean([[math.dist(a, b) for b in B] for a in A])

    want = 2 * mean(X, Y) - mean(X, X) - mean(Y, Y)
    assert energy_distance(X, Y) == pytest.approx(want, rel=1e-12)
    assert energy_distance(Y, X) == pytest.approx(want, rel=1e-12)


def test_energy_distance_over_several_blocks():
    rng = np.random.default_rng(1)
    X, Y = rng.standard_normal((600, 2)), rng.standard_normal((517, 2))
    D = np.sqrt(((X[:, None] - Y) ** 2).sum(-1))
    DX = np.sqrt(((X[:, None] - X) ** 2).sum(-1))
    DY = np.sqrt(((Y[:, None] - Y) ** 2).sum(-1))
    assert energy_distance(X, Y) == pytest.approx(2 * D.mean() - DX.mean() - DY.mean(), rel=1e-9)
    assert energy_distance(X, X) == pytest.approx(0, abs=1e-12)
    assert energy_distance(X, X + 3) > 100 * energy_distance(X[:300], X[300:])


def test_energy_distance_of_one_dimension_is_scipys():
    from scipy.stats import energy_distance as of_line

    rng = np.random.default_rng(2)
    x, y = rng.standard_normal(30), rng.standard_normal(20) * 2
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(of_line(x, y) ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("X", "Y", "named"),
    [
        (np.zeros((0, 2)), np.zeros((3, 2)), "X"),
        (np.zeros((3, 2)), np.zeros((0, 2)), "Y"),
        (np.zeros((3, 2)), np.zeros((3, 4)), "Y"),
        (np.zeros(3), np.zeros((3, 1)), "X"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "X"),
    ],
)
def test_energy_distance_refuses(X, Y, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        energy_distance(X, Y)


# ------------------------------------------------------------------------------------------- missing values


def test_missing_values_are_nan_where_they_may_be(tmp_path):
    path = tmp_path / "holes.csv"
    path.write_text("a,b,c,d\n1,,nan,NA\n N/A ,2,null,None\n3,4,5,6\n")
    want = np.array([[1, np.nan, np.nan, np.nan], [np.nan, 2, np.nan, np.nan], [3, 4, 5, 6]], np.float32)
    np.testing.assert_array_equal(load_curves(path, missing=True), want)
    with pytest.raises(DataError, match=r"holes\.csv"):
        load_curves(path)
    np.save(tmp_path / "holes.npy", want)
    np.testing.assert_array_equal(load_curves(tmp_path / "holes.npy", missing=True), want)
    with pytest.raises(DataError):
        load_curves(tmp_path / "holes.npy")


@pytest.mark.parametrize("cell", ["inf", "maybe", "1e400"])
def test_missing_values_are_no_excuse_for_others(tmp_path, cell):
    path = tmp_path / "bad.csv"
    path.write_text(f"1,2\n,{cell}\n")
    with pytest.raises(DataError, match=r"bad\.csv"):
        load_curves(path, missing=True)
