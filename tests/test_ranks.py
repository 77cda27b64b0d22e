"""Training over ranks: the bits of one process. The ranks are threads here, tests/scale has processes with MPI."""

import sys

import numpy as np
import pytest
from threaded_ranks import on_ranks

import fastdiff as fd
from fastdiff import ranks
from fastdiff.backends import Segment
from fastdiff.backends.cpu import CpuBackend
from fastdiff.errors import ArgumentError, FastdiffError, TrainingError
from fastdiff.noise import Draw, Stream, scaled_words

CURVES = fd.data.harmonic_curves(300, points=12)
PICTURES = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), np.uint8)
QUIET = {"progress": False, "judge": False}


def one_thread():
    return CpuBackend(1)


def curves(**options):
    net = fd.MLP(12, hidden=(16, 16), T=20, **options)
    return fd.Diffusion(net, backend=one_thread(), seed=3)


def pictures():
    net = fd.UNet((8, 8, 1), channels=(8, 16), blocks=1, attention=(False, True), T=10, dropout=0.1)
    return fd.Diffusion(net, backend=one_thread(), seed=3)


def state(model):
    return [model.net.flat, model._average, model._optimizer.m, model._optimizer.v, np.array(model.history["loss"])]


def together(size, make, data, **options):
    def work(comm):
        return make().fit(*data, comm=comm, **QUIET, **options)

    found = on_ranks(size, work)
    for model in found:
        assert isinstance(model, fd.Diffusion), model
    return found


def assert_same(found, want):
    for model in found:
        for one, other in zip(state(model), state(want), strict=True):
            np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_sums_are_added_in_their_order(size, monkeypatch):
    """In float32, where another order ends in other bits; in pieces, and with results that are made of sums."""
    monkeypatch.setattr(ranks, "PIECE", 100)
    items, values = 7, 350
    addends = np.random.default_rng(0).standard_normal((items, values)).astype(np.float32) * 1e3
    want = np.zeros(values, np.float32)
    for row in addends:
        want += row
    losses = [0.1 * (k + 1) for k in range(items)]

    def work(comm):
        team = ranks.Ranks(comm)
        mine, sums, other, made = team.share(items), np.zeros(values, np.float32), np.zeros(8), np.zeros(130)

        def add(part):
            for k in mine:
                sums[part] += addends[k][part]

        def add_other(part):
            assert part == slice(0, 8)
            other[part] += len(mine)

        def make():
            made[:] = other[0] + np.arange(130)

        team.wish = comm.rank == size - 1
        parts = [Segment(sums, add, sums), Segment(other, add_other, None, in_pieces=False)]
        loss = team.sum([*parts, Segment(None, add, made, make)], [losses[k] for k in mine])
        return sums, made, loss, team.stops, team.sent, mine

    found = on_ranks(size, work)
    total = 0.0
    for loss in losses:
        total += loss
    for sums, made, loss, stops, _, _ in found:
        np.testing.assert_array_equal(sums, want)
        np.testing.assert_array_equal(made, items + np.arange(130))
        assert (loss, stops) == (total, True)
    assert [k for *_, mine in found for k in mine] == list(range(items))
    sent = sum(one[4] for one in found)
    assert sent == (size - 1) * (2 * 4 * values + 8 * 8 + 8 * 130 + 2 * 16)  # twice what is summed, once what is made


@pytest.mark.parametrize(("items", "size"), [(1, 4), (3, 4), (8, 4), (10, 4), (5, 1)])
def test_shares(items, size):
    shares = on_ranks(size, lambda comm: ranks.Ranks(comm).share(items))
    assert [k for share in shares for k in share] == list(range(items))
    assert max(map(len, shares)) == -(-items // size)
    assert len(shares[0]) > 0


# ------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"classes": 3, "covariates": 2}])
def test_perceptrons(size, options):
    """Batches that are no multiple of a tile, and more ranks than tiles."""
    data, told = (CURVES,), {}
    if options:
        data, told = (CURVES, np.arange(300) % 3), {"covariates": CURVES[:, :2]}
    for batch in (300, 100):
        want = curves(**options).fit(*data, steps=6, batch=batch, **told, **QUIET)
        assert_same(together(size, lambda: curves(**options), data, steps=6, batch=batch, **told), want)


def test_tutorial_network_and_a_base():
    def tutorial():
        return fd.Diffusion(fd.MLP.tutorial(12, T=20), backend=one_thread())

    def usual():
        return fd.Diffusion(backend=one_thread())

    for make in (tutorial, usual):
        want = make().fit(CURVES, steps=5, batch=300, **QUIET)
        assert_same(together(2, make, (CURVES,), steps=5, batch=300), want)


def test_rows_of_the_time_table_that_nobody_had_before_do_not_travel():
    """Of 256 samples, whose timesteps are few of 200, the first rank sends the sums of its own."""

    def make():
        return fd.Diffusion(fd.MLP(12, hidden=(16, 16), T=200), backend=one_thread(), seed=3)

    def work(comm):
        team, model = ranks.Ranks(comm), make()
        model.fit(CURVES, steps=1, batch=256, comm=team, **QUIET)
        return model, team.sent

    (model, up), (_, down) = on_ranks(2, work)
    assert_same([model], make().fit(CURVES, steps=1, batch=256, **QUIET))
    plan, t = model.net.plan, scaled_words(256, 200, Draw(3, Stream.TRAIN_TIME, 0))
    had = len(np.unique(t[:128]))
    assert had < len(np.unique(t)) < 200
    loss_and_wish = 16
    assert up == 4 * (plan.time_weight + had * plan.time_width) + loss_and_wish
    assert down == model.net.flat.nbytes + loss_and_wish


@pytest.mark.parametrize("size", [1, 3])
def test_image_networks(size):
    want = pictures().fit(PICTURES, steps=3, batch=10, accumulate=8, flip=True, **QUIET)
    assert_same(together(size, pictures, (PICTURES,), steps=3, batch=10, flip=True), want)


def test_more_ranks_than_parts():
    want = pictures().fit(PICTURES, steps=2, batch=6, accumulate=2, **QUIET)
    assert_same(together(3, pictures, (PICTURES,), steps=2, batch=6, accumulate=2), want)


def test_gaps_patience_and_numbers_of_ranks_that_change(tmp_path):
    """A training of two ranks that three go on with, from a file."""
    data = CURVES.copy()
    data[::3, 4:7] = np.nan
    options = {"batch": 300, "validation": 0.1, "patience": 300}
    want = curves().fit(data, steps=100, **options, **QUIET).fit(data, steps=20, **options, **QUIET)
    half = together(2, curves, (data,), steps=100, **options)[1]
    half.save(tmp_path / "half.safetensors")
    last = together(
        3, lambda: fd.load(tmp_path / "half.safetensors", backend=one_thread()), (data,), steps=20, **options
    )
    assert_same(last, want)
    assert last[2].history["validation_loss"] == want.history["validation_loss"]


def test_data_on_disk(tmp_path, monkeypatch):
    """A rank reads what it computes with."""
    monkeypatch.setattr(fd.stored, "FEW_VALUES", 500)
    np.save(tmp_path / "X.npy", CURVES)
    read, data, fetch = [], (str(tmp_path / "X.npy"),), fd.stored.Feed._read

    def counted(self, steps):
        found = fetch(self, steps)
        read.extend(len(numbers) for numbers, _ in found)
        return found

    monkeypatch.setattr(fd.stored.Feed, "_read", counted)
    want = curves().fit(*data, steps=5, batch=300, **QUIET)
    assert read == [300] * 5
    read.clear()
    assert_same(together(4, curves, data, steps=5, batch=300), want)
    assert sorted(read) == [0] * 5 + [44] * 5 + [128] * 10


# ------------------------------------------------------------------------------------------- who speaks, and who ends


def test_the_first_rank_saves_and_speaks(tmp_path):
    told, path = [], tmp_path / "m.safetensors"

    def work(comm):
        def callback(step, loss):
            told.append((comm.rank, step))
            return step == 5

        return curves().fit(
            CURVES, steps=50, batch=200, comm=comm, callback=callback, checkpoint=path, every=2, keep=2, **QUIET
        )

    found = on_ranks(2, work)
    assert [model.step for model in found] == [6, 6]
    assert told == [(0, step) for step in range(6)]
    np.testing.assert_array_equal(fd.load(path).net.flat, found[1].net.flat)
    assert {one.name for one in tmp_path.iterdir()} == {"m.safetensors", "m-000004.safetensors", "m-000006.safetensors"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": CURVES[:-1]}, r"disagree about data: \[300, \d+\] on rank 0, \[299, \d+\] on rank 1"),
        ({"batch": 128}, "disagree about batch: 200 on rank 0, 128 on rank 1"),
        ({"steps": 4}, "disagree about steps: '3' on rank 0, '4' on rank 1"),
        ({"lr": 1e-4}, "disagree about lr"),
        ({"seed": 4}, "disagree about seed: 3 on rank 0, 4 on rank 1"),
        ({"net": fd.MLP(12, hidden=(8,), T=20)}, "disagree about the network"),
        ({"net": fd.MLP(12, hidden=(16, 16), T=20, seed=1)}, "disagree about weights"),
    ],
)
def test_ranks_that_disagree(options, words):
    """One clear error on each of them, and nothing is trained."""
    models = [curves(), curves()]

    def work(comm):
        mine = dict(options) if comm.rank else {}
        model, data = models[comm.rank], mine.pop("data", CURVES)
        model.seed, model.net = mine.pop("seed", model.seed), mine.pop("net", model.net)
        model.fit(data, comm=comm, **{"steps": 3, "batch": 200, **mine}, **QUIET)

    for error in on_ranks(2, work):
        assert isinstance(error, ArgumentError)
        with pytest.raises(ArgumentError, match=words):
            raise error
    assert [model.step for model in models] == [0, 0]


def test_a_rank_that_cannot_begin():
    def work(comm):
        curves().fit(CURVES[:, : 12 - comm.rank], steps=3, comm=comm, **QUIET)

    first, second = on_ranks(2, work)
    assert isinstance(first, TrainingError)
    assert str(first).startswith("rank 1 of 2 cannot begin: ArgumentError: X: got shape (300, 11)")
    assert isinstance(second, ArgumentError)


def test_a_rank_that_fails_ends_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)

    def work(comm):
        def callback(step, loss):
            raise ZeroDivisionError("of mine")

        curves().fit(CURVES, steps=3, comm=comm, callback=callback, checkpoint=tmp_path / "m.safetensors", **QUIET)

    first, second = on_ranks(2, work)
    assert isinstance(first, SystemExit)
    assert second is not None
    said = capsys.readouterr().err
    assert "fastdiff: error: rank 0 of 2: ZeroDivisionError: of mine: all ranks end; what was saved last is in" in said
    assert fd.load(tmp_path / "m.safetensors").step == 1


def test_losses_that_are_not_finite_end_all_alike():
    def work(comm):
        curves().fit(CURVES, steps=300, lr=1e15, clip_norm=None, comm=comm, **QUIET)

    first, second = on_ranks(2, work)
    assert isinstance(first, TrainingError)
    assert str(first) == str(second)


def test_weights_that_differ_are_found(monkeypatch):
    """As those of processors that round otherwise."""
    same = ranks.Ranks.same
    monkeypatch.setattr(ranks.Ranks, "same", lambda self, what, value: same(self, what, value + self.rank))

    def work(comm):
        model = curves()

        def callback(step, loss):
            return step == 2

        model.fit(CURVES, steps=5, comm=comm, callback=callback, **QUIET)

    for error in on_ranks(2, work):
        assert isinstance(error, TrainingError)
        assert "rank 1 of 2 has other weights than rank 0" in str(error)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="comm: got 3, wants a communicator of mpi4py"):
        curves().fit(CURVES, steps=1, comm=3, **QUIET)

    def work(comm):
        fd.Diffusion(fd.MLP(12, T=20), backend="numpy").fit(CURVES, steps=1, comm=comm, **QUIET)

    (error,) = on_ranks(1, work)
    assert "comm" in str(error)
    assert "backend='cpu' instead of 'numpy'" in str(error)


def test_what_launchers_say(monkeypatch):
    for name in (*ranks.SIZES, ranks.PMIX):
        monkeypatch.delenv(name, raising=False)
    assert ranks.launched() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert ranks.launched() == 1  # processes that have nothing to do with each other
    monkeypatch.setenv("PMIX_RANK", "2")
    assert ranks.launched() == 4
    monkeypatch.setenv("PMI_SIZE", "3")
    assert ranks.launched() == 3
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(FastdiffError, match=r"3 ranks need mpi4py.*fastdiff-engine\[mpi\]"):
        ranks.world()


def test_the_command_beside_other_processes(monkeypatch, tmp_path, capsys):
    from fastdiff.cli import main

    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    np.savetxt(tmp_path / "X.csv", CURVES, delimiter=",")
    command = ["train", str(tmp_path / "X.csv"), "-o", str(tmp_path / "m.safetensors"), "--steps", "2", "--quiet"]
    assert main(command) == 2
    assert "3 ranks need mpi4py" in capsys.readouterr().err
    assert main([*command, "--alone"]) == 0


def test_ranks_without_a_chunk_are_told_of(caplog):
    together(3, curves, (CURVES,), steps=1, batch=200)
    assert [record.getMessage() for record in caplog.records].count(
        "1 of 3 ranks have nothing to do, for a batch has 2 chunks: take a larger one, or accumulate"
    ) == 1
