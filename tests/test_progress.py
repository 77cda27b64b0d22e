"""Progress bars: the first step, in which kernels may be compiled, is said to be that and estimates nothing."""

import io
import logging
import sys

import pytest

from fastdiff import progress
from fastdiff.kernels.cpu import jit


def compile_something():
    """What happens in the first step where no kernel is cached."""
    import numba

    def nothing():
        return 0

    nothing.__module__ = "fastdiff.kernels.cpu.nothing"
    return numba.njit(nothing)()


@pytest.fixture
def shown():
    """Options of a bar that writes into a file at every step, and what was written, line by line."""
    out = io.StringIO()
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
