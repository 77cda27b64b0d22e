"""Progress: the first step, in which kernels may be compiled, is said to be that and estimates nothing."""

import io
import logging
import re
import sys

import pytest

import fastdiff as fd
from fastdiff import progress
from fastdiff.kernels.cpu import jit


def compile_something():
    """What happens in the first step where no kernel is cached."""
    import numba

    def nothing():
        return 0

    nothing.__module__ = "fastdiff.kernels.cpu.nothing"
    return numba.njit(nothing)()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Options of a bar that writes to a terminal at every step, and what was written, line by line."""
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    return {"show": True, "file": out, "mininterval": 0, "desc": "training"}, lambda: out.getvalue().split("\r")


def test_the_first_step_estimates_nothing(shown):
    options, lines = shown
    with progress.bar(total=1000, **options) as bar:
        now = bar._time()
        bar._time = lambda: now
        now += 30
        bar.update(3)
        assert "3/1000 [00:00<?, ?it/s]" in lines()[-1]
        for _ in range(10):
            now += 0.25
            bar.update()
        assert bar.n == 13
        assert bar.format_dict["elapsed"] == pytest.approx(2.5)
        assert bar.format_dict["rate"] == pytest.approx(4, rel=0.01)


def test_compilation_is_said_while_it_lasts(shown):
    options, lines = shown
    with progress.bar(total=5, **options) as bar:
        assert lines()[-1].startswith("training:   0%")
        compile_something()
        assert lines()[-1].startswith("compiling kernels, once, about 10 s:   0%")
        compile_something()
        bar.update()
        assert lines()[-1].startswith("training:  20%")
    with progress.bar(total=5, **options) as bar:
        bar.update()
        compile_something()  # some rare one, later: no reason to change the word
        assert lines()[-1].startswith("training:  20%")
    before = len(lines())
    compile_something()
    assert len(lines()) == before


def test_other_people_s_kernels_are_not_ours(shown):
    import numba

    options, lines = shown
    with progress.bar(total=5, **options):
        numba.njit(lambda: 0)()
        assert lines()[-1].startswith("training:")


def test_compilation_is_logged_once(caplog):
    jit._announce.cache_clear()
    with caplog.at_level(logging.INFO, "fastdiff"):
        compile_something()
        compile_something()
    assert [record.getMessage() for record in caplog.records] == [jit.COMPILING]


def test_a_bar_needs_no_compiler(shown, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastdiff.kernels.cpu.jit")
    options, lines = shown
    with progress.bar(total=2, **options) as bar:
        bar.update()
    assert "1/2" in lines()[-1]


def test_nothing_is_written_without_show(capsys):
    with progress.bar(show=False, total=3) as bar:
        bar.update()
        bar.set_postfix(loss="1")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def logged(monkeypatch):
    """A loop whose steps take as long as is said, shown in a file; returns what is in that file."""

    def run(steps, *, begin=0.0, compiled=False, total=None, **options):
        now, out = [100.0], io.StringIO()
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        with progress.bar(show=True, file=out, total=total or len(steps), desc="training", **options) as bar:
            if compiled:
                compile_something()
            for k, seconds in enumerate(steps):
                now[0] += seconds + (begin if k == 0 else 0)
                bar.update()
                bar.set_postfix(loss=f"{k}", refresh=False)
        return out.getvalue().splitlines()

    return run


def test_a_log_gets_a_line_every_few_seconds(logged):
    lines = logged([1.0] * 14, begin=30)
    assert lines == [
        "fastdiff: training: 1/14 (7 %), begun",  # after 31 seconds, of which nothing follows
        "fastdiff: training: 6/14 (42 %), loss 4, 1 a second, 8.0 s left",
        "fastdiff: training: 11/14 (78 %), loss 9, 1 a second, 3.0 s left",
        "fastdiff: training: 14/14 (100 %), loss 13, in 13.0 s",
    ]


def test_what_is_short_and_not_to_stay_says_nothing_in_a_log(logged):
    assert logged([0.2] * 4, leave=False) == []
    assert logged([1.0] * 4, total=9)[1:] == ["fastdiff: training: 4/9 (44 %), loss 3, in 3.0 s"]  # stopped
    assert logged([70.0] * 3, leave=False, unit="curve")[1] == (
        "fastdiff: training: 2/3 curves (66 %), loss 0, 0.0143 a second, 1 min 10 s left"
    )


def test_a_log_says_that_kernels_are_compiled(logged):
    assert logged([1.0], compiled=True)[0] == f"fastdiff: {jit.COMPILING}"


@pytest.mark.parametrize(
    ("terminal", "term", "drawn"), [(True, "xterm", True), (True, "dumb", False), (False, "", False)]
)
def test_a_bar_is_drawn_where_one_can_be(monkeypatch, terminal, term, drawn):
    monkeypatch.setenv("TERM", term)
    out = Terminal() if terminal else io.StringIO()
    with progress.bar(show=True, file=out, total=2, desc="x") as bar:
        bar.update(2)
    assert ("\r" in out.getvalue()) == drawn


def test_a_training_in_a_log_has_no_carriage_returns(capsys):
    X = fd.data.harmonic_curves(64, points=8)
    fd.Diffusion(fd.MLP(8, hidden=(8,), T=5), fd.Schedule.cosine(5), backend="numpy").fit(X, steps=50, batch=4)
    err = capsys.readouterr().err
    assert "\r" not in err
    assert re.fullmatch(r"fastdiff: training: 50/50 \(100 %\), loss [\d.]+, in \d+\.\d s\n", err)
