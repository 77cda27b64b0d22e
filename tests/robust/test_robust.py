"""The short form of `make robust`: the same counts, of fewer tries. Every one of them is to be 0."""

import sys
import threading

import pytest

from robust import accidents, calls, hostile

forks = pytest.mark.skipif(sys.platform == "win32", reason="this platform has no fork")
forking = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def clean(counts):
    counts = counts if isinstance(counts, list) else [counts]
    assert sum(count.tries for count in counts) > 0
    for count in counts:
        assert count.failures == 0, f"{count.what}: {count.failures} of {count.tries}: {count.found}"


def test_flipped_bits_are_noticed():
    clean(hostile.flips(200))


@pytest.mark.filterwarnings("ignore")
def test_mutated_files():
    clean(hostile.mutations(100))


@pytest.mark.filterwarnings("ignore")
def test_calls():
    assert threading.current_thread() is threading.main_thread()
    clean(calls.calls(800))


@forks
@forking
def test_loads_beside_a_process_that_saves():
    clean(accidents.loads_beside_a_saver(100))


@forks
@forking
def test_killed_saves():
    clean(accidents.killed_saves(15))


@forks
@forking
@pytest.mark.slow
def test_forks():
    clean(accidents.forks(20))


def test_repeats():
    clean(accidents.repeats(5))


@pytest.mark.slow
def test_costs_and_cold_interrupts():
    clean(hostile.costs(100))
    clean(accidents.cold_interrupts(4))
