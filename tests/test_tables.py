"""Tables: columns are left out by name or number, and what looks like no value is said, and only that."""

import re
import warnings

import numpy as np
import pytest

from fastdiff.data import harmonic_curves, load_curves
from fastdiff.errors import ArgumentError, DataError, DataWarning


def rng():
    return np.random.default_rng(0)


CURVES = harmonic_curves(24, points=6)
REAL = rng().standard_normal((24, 3)) * [1, 10, 100]
ROWS = np.arange(24)


def written(path, values, names=None):
    top = "" if names is None else ",".join(names) + "\n"
    path.write_text(top + "".join(",".join(f"{value:.9g}" for value in row) + "\n" for row in values))
    return path


def said(path, **options):
    """The curves of a file, and what was said about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curves = load_curves(path, **options)
    assert all(warning.category is DataWarning and warning.filename == __file__ for warning in caught)
    return curves, [str(warning.message).removeprefix(f"{path}: ") for warning in caught]


# --------------------------------------------------------------------------------------- left out


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id,a,place,b,1970\nn_1,1,Kiel,2,3\nn_2,4,Köln,5,6\n")
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"index": "id", "drop": "place"},
        {"index": 1, "drop": 3},
        {"index": "1", "drop": ["place"]},
        {"drop": ("id", "3")},
        {"drop": [3, np.int64(1), "place"]},
    ],
)
def test_columns_are_left_out_by_name_or_number(table, options):
    np.testing.assert_array_equal(load_curves(table, header=True, **options), [[1, 2, 3], [4, 5, 6]])


def test_a_name_means_that_the_first_line_has_names(table):
    # Without one it is "a, 1970" against "1, 2, 3": a line of numbers with a word, or of names?
    assert load_curves(table, index="id", drop=["place", "1970"]).tolist() == [[1, 2], [4, 5]]
    with pytest.raises(
        DataError, match=r"line 1, column 2: 'a' is not a number; --drop 2,4 leaves them out .*--header"
    ):
        load_curves(table, index=1, drop=3)


def test_a_first_line_of_data_stays_data(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("n1,1,2\nn2,3,4\n")
    assert load_curves(path, index=1).tolist() == [[1, 2], [3, 4]]
    assert load_curves(path, index="1", drop=2).tolist() == [[2], [4]]
    assert load_curves(path, drop=1, header=True).tolist() == [[3, 4]]


def test_a_number_is_a_place_and_not_a_name(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("2,1,x\n5,6,7\n")  # the column called 2 is the first one
    assert load_curves(path, header=True, drop="2").tolist() == [[5, 7]]
    assert load_curves(path, drop=["2", "x"]).tolist() == [[5]]
    written(path, np.c_[ROWS, REAL], ["2", "1", "x", "y"])
    assert "--index 1 or" in said(path, header=True)[1][0]


def test_a_first_column_without_a_name_can_be_taken_as_the_index(tmp_path):
    path = tmp_path / "pandas.csv"
    for names in ("a,b,c", "0,1,2", "a,b", "0,1"):
        width = names.count(",") + 1
        path.write_text(f",{names}\n" + "".join(f"r{i}{',7.5' * width}\n" for i in range(3)))
        with pytest.raises(DataError, match=r"line 1: .*looks like a row index; --index 1 or --drop 1 leaves it out"):
            load_curves(path)
        assert load_curves(path, index=1).tolist() == [[7.5] * width] * 3


def test_an_npy_file_has_numbers_only(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    assert load_curves(tmp_path / "x.npy", index=1, drop="3").tolist() == [[1], [4]]
    with pytest.raises(ArgumentError, match=r"^index: got 'a', wants a column of .*x\.npy by its number from 1 to 3$"):
        load_curves(tmp_path / "x.npy", index="a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"index": "plase"},
            r"^index: got 'plase', wants .* by its name, or by its number from 1 to 5; did you mean place\?$",
        ),
        ({"drop": "0"}, r"^drop: got '0', wants a column of .*x\.csv"),
        ({"drop": ["6"]}, r"^drop: got '6', wants"),
        ({"drop": [0]}, r"got 0, wants an integer from 1 to 5"),
        ({"index": 6}, r"got 6, wants an integer from 1 to 5"),
        ({"index": True}, r"got True"),
        ({"index": "id", "header": False}, r"^index: got 'id', wants a column of .* by its number from 1 to 5$"),
        ({"drop": ["id", "a", 3, 4, "5"]}, r"^drop: got every column, wants one column of .* that stays"),
    ],
)
def test_columns_that_are_not_there(table, options, message):
    with pytest.raises(ArgumentError, match=message):
        load_curves(table, **options)


def test_of_two_columns_with_one_name_neither_is_guessed(tmp_path):
    path = written(tmp_path / "x.csv", np.c_[ROWS, REAL], ["a", "a", "b", "c"])
    with pytest.raises(ArgumentError, match=r"^drop: got 'a', of which there are 2, wants"):
        load_curves(path, drop="a")
    assert "--index 1 or" in said(path)[1][0]


def test_text_is_answered_with_the_columns_that_have_it(table):
    for options, hint in (
        ({}, "--drop id,place leaves them out"),
        ({"index": "id"}, "--index place or --drop place leaves it out"),
    ):
        with pytest.raises(DataError, match=rf"line 2, column \d: '.*' is not a number; {hint}"):
            load_curves(table, header=True, **options)
    table.write_text("1,2\na,b\n")
    with pytest.raises(DataError, match=r"line 2, column 1: 'a' is not a number$"):
        load_curves(table)


def test_messages_name_the_column_of_the_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("n,1,2\nn,3,1e39\n")
    with pytest.raises(DataError, match=r"line 2, column 3: 1e\+39 is too large"):
        load_curves(path, index=1)
    path.write_text("n,1,2\nn,3,\n")
    with pytest.raises(DataError, match=r"line 2, column 3: empty cell"):
        load_curves(path, index=1)


# --------------------------------------------------------------------------------------- said

SUSPICIOUS = {  # columns, names, what is said
    "a year": (
        np.c_[1950 + ROWS, REAL],
        ["YEAR", *"abc"],
        r"column YEAR rises by 1 in every row: .*--index YEAR or --drop",
    ),
    "a counter without a name": (np.c_[REAL, 100 - ROWS], None, r"column 4 falls by 1 in every row: .*--index 4 or"),
    "a rounded time": (np.c_[np.round(ROWS / 30, 3), CURVES], None, r"column 1 rises by 0\.033\d* in every row"),
    "seconds since 1970": (np.c_[1.6e9 + 60 * ROWS, CURVES], None, r"column 1 rises by 60 in every row"),
    "a year with gaps": (
        np.c_[1950 + ROWS**2, REAL],
        ["Year built", *"abc"],
        r"column Year built never falls: is it an index\? --index 'Year built' or",
    ),
    "an id": (
        np.c_[rng().permutation(24), REAL],
        ["patient_id", *"abc"],
        r"column patient_id has another whole number",
    ),
    "a quarter": (
        np.c_[REAL, CURVES, 1 + (ROWS + 2) % 4],
        None,
        r"column 10 runs from 1 to 4 again and again: is it an index\? --index 10 or",
    ),
    "labels first": (
        np.c_[ROWS % 5 > 2, CURVES],
        None,
        r"column 1 holds 2 whole numbers from 0 to 1 only, where .*--drop 1 ",
    ),
    "labels last": (np.c_[CURVES, ROWS * ROWS % 5 - 1], None, r"column 7 holds 3 whole numbers from -1 to 3 only"),
    "a target of counts": (
        np.c_[ROWS * 7 % 24, rng().integers(0, 3, 24), rng().integers(0, 99, (24, 4))],
        ["a", "target", *"bcde"],
        r"column target holds 3 whole numbers from 0 to 2 only: is it a label\? --drop target ",
    ),
    "names that are numbers": (
        np.r_[[1100 + 8 * np.arange(6)], CURVES],
        None,
        r"line 1 \(1100, 1108, 1116, \.\.\.\) looks like column names: --header ",
    ),
}


@pytest.mark.parametrize("what", SUSPICIOUS)
def test_what_looks_like_no_value_is_said_once_and_kept(tmp_path, what):
    values, names, message = SUSPICIOUS[what]
    path = written(tmp_path / "x.csv", values, names)
    curves, sentences = said(path)
    np.testing.assert_allclose(curves, values, rtol=1e-6, atol=1e-6)
    assert len(sentences) == 1
    assert re.match(message, sentences[0]), sentences[0]


@pytest.mark.parametrize("what", SUSPICIOUS)
def test_the_remedy_is_one(tmp_path, what):
    values, names, _ = SUSPICIOUS[what]
    path = written(tmp_path / "x.csv", values, names)
    (sentence,) = said(path)[1]
    if "--header" in sentence:
        curves, sentences = said(path, header=True)
        assert len(curves) == len(values) - 1
    else:
        column = re.search(r"--drop ('.*?'|\S+)", sentence)[1].strip("'")
        curves, sentences = said(path, drop=column)
        assert curves.shape[1] == values.shape[1] - 1
    assert not sentences


def test_names_that_are_numbers_hide_no_other_doubt(tmp_path):
    path = written(tmp_path / "x.csv", np.r_[[1092 + 8 * np.arange(7)], np.c_[ROWS, CURVES]])
    names, index = said(path)[1]
    assert names.startswith("line 1 (1092, ")
    assert index.startswith("column 1 rises by 1 in every row")
    assert not any("line 1" in sentence for sentence in said(path, header=False)[1])  # as the caller knows


LONG = np.c_[np.repeat(ROWS, 6), np.tile(np.arange(6) / 50, 24), CURVES.ravel()]


@pytest.mark.parametrize("order", ["by curve", "by time"])
@pytest.mark.parametrize("names", [["curve_id", "time", "value"], None])
def test_a_long_format_is_said(tmp_path, order, names):
    rows = LONG if order == "by curve" else LONG[np.argsort(LONG[:, 1], kind="stable")]
    (sentence,) = said(written(tmp_path / "x.csv", rows, names))[1]
    assert "long format" in sentence
    if names:
        assert sentence.startswith("column curve_id repeats while column time runs through")
        assert sentence.endswith("df.pivot(index='curve_id', columns='time', values='value')")


def test_a_long_format_whose_curves_have_names_is_said_too(tmp_path):
    (sentence,) = said(written(tmp_path / "x.csv", LONG, ["id", "time", "value"]), index="id")[1]
    assert re.match(r"column time runs from 0 to 0\.1 again and again: .*long format", sentence)


def test_a_date_in_two_columns_is_no_long_format(tmp_path):
    path = written(tmp_path / "x.csv", np.c_[1990 + ROWS // 4, 1 + ROWS % 4, REAL], ["year", "quarter", *"abc"])
    sentences = said(path)[1]
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "column year never falls",
        "column quarter runs from 1 to 4 again and again",
    ]


def digits():
    from sklearn.datasets import load_digits

    return load_digits().data[:300]


def wine():
    from sklearn.datasets import load_wine

    return load_wine().data


QUIET = {
    "harmonic curves": lambda: harmonic_curves(500),
    "slow curves of one offset": lambda: np.sin(np.linspace(0, 3, 150) + rng().normal(0, 0.05, (100, 1))),
    "random walks": lambda: np.cumsum(rng().standard_normal((100, 80)), axis=1),
    "walks from 0 by whole steps": lambda: np.c_[np.zeros(100), np.cumsum(rng().choice([-1, 1], (100, 20)), axis=1)],
    "digits": digits,
    "wine": wine,
    "wine, standardised": lambda: (wine() - wine().mean(0)) / wine().std(0),
    "counts": lambda: rng().poisson(2, (60, 5)),
    "signs": lambda: rng().choice([-1, 1], (60, 5)),
    "one column": lambda: ROWS[:, None],
    "all columns rise": lambda: ROWS[:, None] * [1, 2, 3] + 0.5,
    "lines": lambda: np.linspace(0, 1, 24)[:, None] * np.linspace(1, 2, 6) + np.linspace(3, 4, 6),
    "constant": lambda: np.ones((24, 4)),
    "one curve, repeated": lambda: np.repeat(CURVES[:1], 24, axis=0),
    "one spike each": lambda: 3 * np.eye(24, 12),
    "sorted by the first value": lambda: REAL[np.argsort(REAL[:, 0])],
    "seven rows": lambda: np.r_[[[0, 2, 4, 6]], np.c_[1 + ROWS[:6], REAL[:6]]],
    "a first column of counts, not small": lambda: np.c_[20 + rng().integers(0, 3, 24), REAL],
    "a first column of many counts": lambda: np.c_[rng().integers(0, 24, 24), REAL],
    "a first column of few counts, far apart": lambda: np.c_[9 * rng().integers(0, 3, 24), REAL],
    "a first column of ones": lambda: np.c_[np.ones(24), REAL],
    "a first column that walks": lambda: np.c_[20 + np.cumsum(rng().choice([-1, 1], 24)), REAL],
    "a middle column of two values": lambda: np.c_[REAL, ROWS % 7 > 3, CURVES],
    "groups": lambda: np.c_[ROWS // 3, REAL],
    "groups, and what rises": lambda: np.c_[ROWS // 3, ROWS + rng().random(24), REAL],
    "groups, and what repeats in them": lambda: np.c_[ROWS // 3, np.tile([2, 1, 3], 8), REAL],
}


@pytest.mark.parametrize("what", QUIET)
@pytest.mark.parametrize("ending", ["csv", "npy"])
def test_tables_that_are_as_they_should_be_are_read_in_silence(tmp_path, what, ending):
    path = tmp_path / f"x.{ending}"
    if ending == "csv":
        written(path, QUIET[what]())
    else:
        np.save(path, QUIET[what]())
    assert not said(path)[1]


QUIET_NAMES = {
    "nothing but years": (ROWS[:, None], ["year"]),
    "one year": (np.c_[np.full(24, 1970), REAL], ["year", *"abc"]),
    "times in any order": (np.c_[REAL, rng().permutation(24), CURVES], [*"abc", "time", *"defghi"]),
    "ids that come again": (np.c_[REAL, rng().integers(0, 12, 24), CURVES], [*"abc", "id", *"defghi"]),
    "a class of real values": (REAL, ["class", "target", "label"]),
}


@pytest.mark.parametrize("what", QUIET_NAMES)
def test_names_alone_are_no_reason(tmp_path, what):
    assert not said(written(tmp_path / "x.csv", *QUIET_NAMES[what]))[1]


def test_a_constant_and_a_time_are_no_long_format(tmp_path):
    (sentence,) = said(written(tmp_path / "x.csv", np.c_[np.ones(24), ROWS / 50, REAL]))[1]
    assert sentence.startswith("column 2 rises by 0.02 in every row")


def test_two_conditions_are_no_long_format(tmp_path):
    sentences = said(written(tmp_path / "x.csv", np.c_[ROWS // 2 % 2, ROWS % 2, REAL]))[1]
    assert not any("repeats while" in sentence for sentence in sentences)


def test_the_first_row_of_an_npy_file_has_no_names(tmp_path):
    np.save(tmp_path / "x.npy", SUSPICIOUS["names that are numbers"][0])
    assert not said(tmp_path / "x.npy")[1]


def test_an_npy_file_is_looked_at_in_its_own_precision(tmp_path):
    np.save(tmp_path / "x.npy", np.c_[1.6e9 + 60 * ROWS, CURVES])
    curves, sentences = said(tmp_path / "x.npy")
    assert curves.dtype == np.float32
    assert len(np.unique(curves[:, 0])) < len(ROWS)
    assert re.match(r"column 1 rises by 60 in every row: .*--index 1 or", sentences[0])


def test_a_pattern_that_breaks_late_is_none(tmp_path):
    rows = np.c_[np.arange(1000.0), rng().standard_normal((1000, 3))]
    assert said(written(tmp_path / "x.csv", rows))[1]
    rows[900, 0] += 1
    assert not said(written(tmp_path / "x.csv", rows))[1]
    rows[:, 0] = np.arange(1000) % 10
    assert said(written(tmp_path / "x.csv", rows))[1]
    rows[905, 0] = 5.5
    assert not said(written(tmp_path / "x.csv", rows))[1]
    rows[905, 0], rows[900, 0], rows[901, 0] = 5, 1, 0
    (sentence,) = said(written(tmp_path / "x.csv", rows))[1]
    assert sentence.startswith("column 1 holds 10 whole numbers")
    rows[902, 0] = 0.5
    assert not said(written(tmp_path / "x.csv", rows))[1]


def test_a_decimal_comma_is_called_so(tmp_path):
    table = tmp_path / "x.csv"
    commas = r"is not a number; of decimal commas make points, or --decimal , reads"
    for text, where in (
        ("0,25;-1,5\n2,0;3,0\n", "line 1, column 1: '0,25'"),
        ("a;b\n2,0;3,0\n", "line 2, column 1: '2,0'"),
        ("0,25 -1,5\n2,0 3,0\n", "line 1: '0,25'"),
        ("1\t2\n2\t3,0\n", "line 2, column 2: '3,0'"),
        ("Tag;Wert;Menge\n01.01.2024 00:00;1,5;2,5\n", "line 2, column 2: '1,5'"),  # before the columns of text
        ("01.01.2024;1,5;7\n", "line 1, column 2: '1,5'"),
        (";a;b\n0;1,5;2,5\n", "line 2, column 2: '1,5'"),
        ("a;b\n1;1.234,5\n", "line 2, column 2: '1.234,5'"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=f"{where} {commas}"):
            load_curves(table)


@pytest.mark.parametrize(
    ("text", "options", "wants"),
    [
        ("a;b.c\n0,25;-1,5e3\n", {}, [[0.25, -1500]]),
        ("0,25\t-1,5\n2\t,5\n", {}, [[0.25, -1.5], [2, 0.5]]),
        ("0,25 -1,5\n2 3,0\n", {}, [[0.25, -1.5], [2, 3]]),
        ("x 0,25\ny 2,0\n", {"delimiter": "space", "index": 1}, [[0.25], [2]]),
        ("a.b;c\n1,5;2\n", {"index": "a.b"}, [[2]]),
        ('"0,5";"1"\n', {}, [[0.5, 1]]),
    ],
)
def test_decimal_commas_are_read_where_asked(tmp_path, text, options, wants):
    table = tmp_path / "x.csv"
    table.write_text(text)
    assert load_curves(table, decimal=",", **options).tolist() == wants


def test_points_beside_decimal_commas_are_refused(tmp_path):
    """They may stand between thousands."""
    table = tmp_path / "x.csv"
    for cell in ("1.234", "1.234,5", "1.5"):
        table.write_text(f"0,5;1\n{cell};2\n")
        wants = "is not a number; the decimal sign is to be a comma"
        with pytest.raises(DataError, match=rf"line 2, column 1: '{cell}' {wants}"):
            load_curves(table, decimal=",")


@pytest.mark.parametrize(
    ("delimiter", "text"),
    [("|", "1|2\n"), (None, "1|2\n"),
     (":", "1:2\n"), ("tab", "1\t2\n"), ("\\t", "1\t2\n"), ("\t", "1\t2\n"), ("space", "1  2\n"),
     (" ", "1 2\n"), (",", "1,2\n")],
)  # fmt: skip
def test_what_is_between_cells_can_be_said(tmp_path, delimiter, text):
    table = tmp_path / "x.csv"
    table.write_text(text)
    assert load_curves(table, delimiter=delimiter).tolist() == [[1, 2]]


def test_a_delimiter_that_is_said_is_not_guessed(tmp_path):
    table = tmp_path / "x.csv"
    table.write_text("a;x,b;y\n1,2\n")
    assert load_curves(table, delimiter=",").tolist() == [[1, 2]]
    table.write_text("a\tb\n\t2\n")  # an empty first cell
    assert np.isnan(load_curves(table, delimiter="tab", missing=True)[0, 0])
    for bad in ("", "ab", "1", "a", ".", "-", 5, '"'):
        with pytest.raises(ArgumentError, match=r"^delimiter: got"):
            load_curves(table, delimiter=bad)
    with pytest.raises(ArgumentError, match=r"^delimiter: got ','"):
        load_curves(table, delimiter=",", decimal=",")
    with pytest.raises(ArgumentError, match=r"^decimal: got ';'"):
        load_curves(table, decimal=";")


@pytest.mark.parametrize(
    ("columns", "wants"),
    [
        ("a", [[1], [4]]),
        (["1970", "a"], [[1, 3], [4, 6]]),
        (2, [[1], [4]]),
        ([4, 2], [[1, 2], [4, 5]]),
        ("2-3", None),
        (["4-5", 2], [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_columns_that_are_asked_for_are_read_alone(table, columns, wants):
    """Of `table` the first line is id, a, place, b, 1970."""
    if wants is None:
        with pytest.raises(DataError, match="column 3"):
            load_curves(table, columns=columns, header=True)
        return
    assert load_curves(table, columns=columns, header=True).tolist() == wants
    if len(wants[0]) > 1:
        assert load_curves(table, columns=columns, header=True, drop="a").tolist() == [row[1:] for row in wants]


def test_columns_are_refused_as_others_are(table, tmp_path):
    with pytest.raises(ArgumentError, match=r"^columns: got 'plase', wants .* did you mean place"):
        load_curves(table, columns="plase")
    with pytest.raises(ArgumentError, match=r"^columns: got none that stays, wants one column"):
        load_curves(table, columns="a", drop="a")
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    assert load_curves(tmp_path / "x.npy", columns="2-3").tolist() == [[1, 2], [4, 5]]
    with pytest.raises(ArgumentError, match=r"^columns: got '3-4', wants a column"):
        load_curves(tmp_path / "x.npy", columns="3-4")


@pytest.mark.parametrize("order", [1, -1])
def test_a_first_line_that_is_an_uneven_axis_is_said(tmp_path, order):
    rows = np.random.default_rng(0).normal(size=(12, 6))
    axis = np.array([400.1, 410.7, 425.2, 433.9, 450, 451])[::order]
    (sentence,) = said(written(tmp_path / "x.csv", np.vstack([axis, rows])))[1]
    assert "line 1 (" in sentence
    assert "looks like column names: --header takes it for them" in sentence
    others = np.sort(rows)[:, ::order]  # rise too
    assert said(written(tmp_path / "x.csv", np.vstack([axis, others])))[1]
    assert not said(written(tmp_path / "x.csv", np.vstack([axis / 100, others])))[1]  # 4 .. 4.5
    assert said(written(tmp_path / "x.csv", np.vstack([axis / 100, rows])))[1]
    assert not said(written(tmp_path / "x.csv", np.vstack([axis / 400, rows])))[1]  # among the values
    assert not said(written(tmp_path / "x.csv", np.vstack([axis[[1, 0, 2, 3, 4, 5]], rows])))[1]


@pytest.mark.parametrize(
    ("text", "options", "note"),
    [
        ("1,2,3\n", {}, "cells between commas; line 1 has the first curve; 3 columns are values"),
        ("# x\na;b;c\n1;2;3\n", {}, "cells between semicolons; line 2 has column names; 3 columns are values"),
        ("i\ta\nx\t1\n", {"index": "i"}, "tabs; line 1 has column names; 1 columns are values, left out: 1"),
        ("1 2 3\n", {"columns": [2]}, "blanks; line 1 has the first curve; 1 columns are values, left out: 1, 3"),
        ("1:2\n", {"delimiter": ":"}, "cells between ':'; line 1"),
    ],
)
def test_what_was_taken_for_what_is_logged(tmp_path, text, options, note, caplog):
    (tmp_path / "x.csv").write_text(text)
    with caplog.at_level("INFO"):
        load_curves(tmp_path / "x.csv", **options)
    assert note in caplog.text
