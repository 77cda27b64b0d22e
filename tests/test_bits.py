"""The recorder of bits: it says the same twice, and notices a change."""

import json

import bits
import pytest

import fastdiff as fd

CASE = "numpy/mlp under dense noise"


def recorded(path, *more):
    return bits.main(["--lanes", "numpy", "--only", f"^{CASE}$", "-o", str(path), *more])


@pytest.fixture
def before(tmp_path):
    path = tmp_path / "before.json"
    assert recorded(path) == 0
    return path


def test_a_record_is_the_same_twice(before, tmp_path, capsys):
    assert recorded(tmp_path / "after.json", "--against", str(before)) == 0
    assert capsys.readouterr().out == "1 cases: the same bits\n"
    assert (tmp_path / "after.json").read_text() == before.read_text()
    hashes = json.loads(before.read_text())["cases"][CASE]
    assert len(set(hashes.values())) > 20  # of weights and moments, losses and samples, at each time


def test_a_change_is_named(before, monkeypatch, capsys):
    monkeypatch.setitem(bits.FIT, "lr", 3.001e-3)
    assert recorded(before.with_name("after.json"), "--against", str(before)) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"{CASE}: first net, first ema, ")
    assert "first noise_shape" not in said


def test_what_raises_or_is_gone_differs(before, monkeypatch, capsys):
    monkeypatch.setattr(fd.Diffusion, "sample", lambda *args, **options: 1 / 0)
    assert recorded(before.with_name("after.json"), "--against", str(before)) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"{CASE}: ")
    assert "raised" in said.out
    assert "ZeroDivisionError" in said.err
    monkeypatch.delitem(bits.CASES, "mlp under dense noise")
    monkeypatch.setitem(bits.CASES, "mlp under dense noise of another name", bits.CASES["normals"])
    assert bits.main(["--lanes", "numpy", "--only", "under dense noise", "--against", str(before)]) == 1
    assert capsys.readouterr().out == f"{CASE}: only before\n{CASE} of another name: only after\n"


def test_only_what_is_asked_for_is_compared(before, capsys):
    assert bits.main(["--lanes", "numpy", "--only", "^numpy/schedules$", "--against", str(before)]) == 1
    assert capsys.readouterr().out == "numpy/schedules: only after\n"


def test_every_lane_has_cases():
    for lane in bits.LANES:
        names = [name for name, *_ in bits.selected((lane,), "")]
        assert len(names) > (30 if lane in bits.LANES[:4] else 1), lane
