"""The noise law: the same bits from three implementations, and bits that are as random as they should be."""

import hashlib
import itertools
import tracemalloc

import naive
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from tolerances import P_VALUE, WORKSPACE, assert_close, assert_estimate, assert_same_bits

from fastdiff import noise
from fastdiff.backends import get_backend
from fastdiff.errors import ArgumentError
from fastdiff.noise import Draw, Stream, normal
from fastdiff.process import forward_noise
from fastdiff.schedule import Schedule

BACKENDS = ("numpy", "cpu")

SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**32, 2**64 - 1]))
STEPS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 2**31, 2**32 - 1]))
ROWS = st.one_of(
    st.integers(0, 1000),
    st.integers(2**32 - 3, 2**32 + 1),
    st.integers(2**56 - 9, 2**56 - 4),
    st.integers(0, 2**56 - 4),
)
WIDTHS = st.integers(0, 70)

# ------------------------------------------------------------------------------------------- the bits


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(counter, key, want):
    assert naive.philox(counter, key) == want
    words = noise.philox(*(np.array([c], np.uint32) for c in counter), noise.round_keys(key[1] << 32 | key[0]))
    assert tuple(int(w[0]) for w in words) == want


@pytest.mark.parametrize("name", BACKENDS)
def test_the_bits_of_law_version_1(name):
    """They never change: checkpoints and figures of other people depend on them. A change is a new version."""
    assert noise.NOISE_LAW_VERSION == 1
    digest, after = hashlib.sha256(), {}
    for stream in Stream:
        drawn = normal((5, 33), seed=2**64 - 59, stream=stream, step=7 * stream, first_sample=2**32 - 2, backend=name)
        digest.update(drawn.astype("<f4").tobytes())
        after[stream] = digest.hexdigest()
    assert after[Stream.CHAIN] == "93eed107889cecf02ec35e6eba6f861ac92e9e01387184126e28e3fd79385ef2"
    assert after[Stream.AUGMENT] == "f3eb48617a9b8348322983c010d773f0c4af1fbd53166ffd613c489f3dd4687d"


def test_the_polynomials_are_the_law():
    assert noise.LOG_COEFFICIENTS == naive.LOG
    assert noise.SIN_COEFFICIENTS == naive.SIN
    assert noise.COS_COEFFICIENTS == naive.COS


def test_streams_keep_their_numbers():
    assert {s.name: s.value for s in Stream} == {
        "INIT": 0, "STEP": 1, "TRAIN_NOISE": 2, "TRAIN_TIME": 3, "BATCH": 4,
        "WEIGHTS": 5, "FORWARD": 6, "DATA": 7, "DROPOUT": 8, "CHAIN": 9,
        "AUGMENT": 10, "KNOWN": 11, "PROBE": 12, "RESAMPLE": 13, "DROP": 14,
    }  # fmt: skip


@given(n=st.integers(0, 3), width=WIDTHS, seed=SEEDS, stream=st.sampled_from(Stream), step=STEPS, first=ROWS)
@example(n=1, width=2051, seed=1, stream=Stream.STEP, step=3, first=0)  # more than a chunk of the cpu kernel in a row
@settings(max_examples=150)
def test_naive_numpy_and_cpu_draw_the_same_bits(n, width, seed, stream, step, first):
    want = naive.normal(n, width, seed=seed, stream=stream, step=step, first_sample=first)
    for name in BACKENDS:
        got = normal((n, width), seed=seed, stream=stream, step=step, first_sample=first, backend=name)
        assert_same_bits(got, want)


@pytest.mark.parametrize(
    "shape", [(31, 2047), (7, 2048), (5, 2049), (3, 9001), (9, 4096), (20011, 3), (1, 40001), (40001, 1)]
)
def test_numpy_and_cpu_agree_beyond_their_chunks(shape):
    """Rows of several chunks, chunks of several rows, pieces for several threads, blocks beyond NumPy's own chunk."""
    at = {"seed": 2**63 + 11, "stream": "chain", "step": 2**31 + 1, "first_sample": 2**32 - 5}
    want = normal(shape, **at, backend="numpy")
    for threads in (1, 2, 3):
        assert_same_bits(normal(shape, **at, backend=get_backend("cpu", threads=threads)), want)


@given(data=st.data(), seed=SEEDS, first=ROWS, width=st.integers(1, 40))
@settings(max_examples=40)
def test_words_uniforms_and_integers_are_the_law(data, seed, first, width):
    at = {
        "seed": seed,
        "stream": data.draw(st.sampled_from(Stream)),
        "step": data.draw(STEPS),
        "first_sample": first,
    }
    blocks, drawn = -(-width // 4), Draw(seed, at["stream"], at["step"], first)
    words = noise.philox_words(2, blocks, drawn)
    assert words.shape == (2, blocks, 4)
    assert words.dtype == np.uint32
    for k in range(2):
        for q in range(blocks):
            want = naive.words(q, seed=seed, stream=at["stream"], step=at["step"], row=first + k)
            assert tuple(words[k, q]) == want
    uniforms = np.empty((2, width))
    noise.fill_uniform(uniforms, drawn)
    assert uniforms.tolist() == naive.uniform(2, width, **at)
    bound = data.draw(st.integers(1, 2**32 - 1))
    assert noise.scaled_words(2, bound, drawn).tolist() == naive.scaled(2, bound, **at)


def test_flips_are_the_law():
    at = {"seed": 2**63 + 5, "step": 40_000}
    want = [naive.words(0, stream=10, row=row, **at)[0] < 2**31 for row in range(64)]
    assert want[:16] == [bool(int(c)) for c in "0010110011010110"]
    drawn = Draw(**at, stream=Stream.AUGMENT)
    assert noise.flips(64, drawn).tolist() == want
    assert noise.flips(60, drawn.after(4)).tolist() == want[4:]
    many = noise.flips(40_000, Draw(1, Stream.AUGMENT, 3))
    assert_estimate(many.mean(), 0.5, 0.5 / len(many) ** 0.5)


def test_cuts_are_the_law():
    at = {"seed": 2**63 + 5, "step": 40_000}
    room = 3, 2**20
    words = [naive.words(0, stream=10, row=row, **at) for row in range(64)]
    want = [[w1 * 4 >> 32, w2 * (2**20 + 1) >> 32] for _, w1, w2, _ in words]
    drawn = Draw(**at, stream=Stream.AUGMENT)
    assert noise.cuts(64, room, drawn).tolist() == want
    assert noise.cuts(60, room, drawn.after(4)).tolist() == want[4:]
    assert noise.cuts(9, (0, 0), drawn).tolist() == [[0, 0]] * 9
    many = noise.cuts(40_000, (1, 4), Draw(1, Stream.AUGMENT, 3))
    assert_estimate(many[:, 0].mean(), 0.5, 0.5 / len(many) ** 0.5)
    assert_estimate(many[:, 1].mean(), 2, 2**0.5 / len(many) ** 0.5)


# ------------------------------------------------------------------------------------------- what bits depend on


@given(
    cuts=st.lists(st.integers(0, 300), max_size=4),
    first=ROWS.filter(lambda row: row < 2**56 - 300),
    width=st.integers(1, 90),
)
@settings(max_examples=25)
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_do_not_depend_on_how_they_are_batched(name, cuts, first, width):
    whole = normal((300, width), seed=3, first_sample=first, backend=name)
    edges = [0, *sorted(cuts), 300]
    parts = [
        normal((stop - start, width), seed=3, first_sample=first + start, backend=name)
        for start, stop in itertools.pairwise(edges)
    ]
    assert_same_bits(np.concatenate(parts), whole)


def test_a_sample_is_numbered_in_c_order(backend):
    assert_same_bits(normal((3, 4, 5, 2), backend=backend), normal((3, 40), backend=backend).reshape(3, 4, 5, 2))
    assert_same_bits(normal((3,), backend=backend), normal((3, 1), backend=backend)[:, 0])
    assert_same_bits(normal(3, backend=backend), normal((3,), backend=backend))


def test_a_stream_goes_by_member_number_and_name():
    want = normal((2, 5), stream=Stream.TRAIN_NOISE)
    for stream in (2, "train_noise", "TRAIN_NOISE", np.int64(2)):
        assert_same_bits(normal((2, 5), stream=stream), want)


def test_no_block_is_drawn_twice():
    """Over streams, steps, seeds and rows, with bits set in every word of key and counter."""
    words = [
        noise.philox_words(150, 5, Draw(seed, stream, step, row))
        for stream in Stream
        for step in (0, 1, 2**16, 2**31, 2**32 - 1)
        for seed in (0, 1, 2**32, 2**63)
        for row in (0, 2**32, 2**48, 2**56 - 150)
    ]
    blocks = np.concatenate(words).reshape(-1, 4)
    assert len(np.unique(blocks.view(np.dtype((np.void, 16))))) == len(blocks)


# ------------------------------------------------------------------------------------------- the distribution


@pytest.fixture(scope="module")
def draws():
    """(2000, 512) normals, as float64; every column is a place in the row, every row a sample."""
    return normal((2000, 512), seed=20240229, stream="init").astype(np.float64)


def test_moments(draws):
    n = draws.size
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert_estimate((draws**power).mean(), want, np.sqrt(variance / n))
    # of every row and of every column, too
    for axis in (0, 1):
        assert_estimate(draws.mean(axis=axis), 0, draws.shape[axis] ** -0.5)


def test_distribution(draws):
    assert stats.kstest(draws.ravel(), "norm").pvalue > P_VALUE
    for quarter in np.split(draws, 4, axis=1):  # cosine and sine of the first pair, and of the second
        assert stats.kstest(quarter.ravel(), "norm").pvalue > P_VALUE
    assert stats.kstest(stats.norm.cdf(draws[:, 0]), "uniform").pvalue > P_VALUE


def test_tails(draws):
    for bound in (3.0, 4.0):
        p = 2 * stats.norm.sf(bound)
        assert_estimate((np.abs(draws) > bound).mean(), p, np.sqrt(p / draws.size))


def test_values_are_uncorrelated(draws):
    """The four values of a block, neighbours in a row, the same place in the next row; squares as well, since both
    values of a Box-Muller pair share their radius."""
    quarters = np.split(draws, 4, axis=1)
    pairs = [(quarters[i], quarters[j]) for i in range(4) for j in range(i)]
    pairs += [(draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])]
    for x, y in pairs:
        assert_estimate((x * y).mean(), 0, x.size**-0.5)
        assert_estimate(((x**2 - 1) * (y**2 - 1)).mean(), 0, 2 * x.size**-0.5)


def test_steps_streams_and_seeds_are_uncorrelated(draws):
    x = draws[:200]
    for other in (
        {"step": 1},
        {"stream": "step"},
        {"seed": 20240230},
        {"seed": 20240229 + 2**32},
        {"first_sample": 2**32},
    ):
        y = normal(x.shape, **{"seed": 20240229, "stream": "init"} | other)
        assert_estimate((x * y).mean(), 0, x.size**-0.5)


def test_uniforms_and_integers_are_uniform():
    uniforms = np.empty((500, 40))
    noise.fill_uniform(uniforms, Draw(5, Stream.WEIGHTS))
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > P_VALUE
    counts = np.bincount(noise.scaled_words(70_000, 7, Draw(5, Stream.TRAIN_TIME, 3)), minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > P_VALUE


# ------------------------------------------------------------------------------------------- the elementary functions

EVERY_ANGLE = np.concatenate(
    [np.arange(0, 2**32, 2**14 + 2**8), *(q * 2**29 + np.arange(-2048, 2048, 256) for q in range(1, 8))]
)
MANY_WORDS = np.concatenate([np.arange(4096), np.arange(0, 2**32, 65521), np.arange(2**32 - 2**20, 2**32)])


def test_logarithm_is_accurate_and_never_positive():
    w = MANY_WORDS.astype(np.uint32)
    u = ((w.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
    got = noise.log_uniform(w)
    assert got.dtype == np.float32
    assert got.max() <= 0
    assert_close(got, np.log(u), scale=0)


def test_sine_and_cosine_are_accurate_all_around():
    w = EVERY_ANGLE.astype(np.uint32)
    angle = 2 * np.pi * (w >> np.uint32(8)) / 2**24
    cosine, sine = noise.cos_sin_turn(w)
    assert cosine.dtype == sine.dtype == np.float32
    assert_close(cosine, np.cos(angle))
    assert_close(sine, np.sin(angle))


def test_the_range_of_a_normal():
    ends = np.array([0, 2**32 - 1], np.uint32)
    for angle in (0, 2**30, 2**31, 3 * 2**30, 2**32 - 1):
        far, near = np.hypot(*noise.box_muller(ends, np.full(2, angle, np.uint32)))
        assert far == np.float32(np.sqrt(66 * np.log(2)))
        assert near == 0


# ------------------------------------------------------------------------------------------- dtypes, memory, bad input


def test_float64_work_takes_the_float32_normals_widened():
    wide = np.empty((4, 9))
    get_backend("numpy").normal(wide, Draw(8, Stream.STEP, 5, 1))
    narrow = normal((4, 9), seed=8, stream="step", step=5, first_sample=1)
    assert narrow.dtype == np.float32
    assert_same_bits(wide, narrow.astype(np.float64))


def peak(function):
    """Most bytes held during a call."""
    function()
    tracemalloc.start()
    try:
        kept = function()
        size, most = tracemalloc.get_traced_memory()
        assert kept is not None
        return size, most
    finally:
        tracemalloc.stop()


NORMAL = {name: lambda x0, t, schedule, name=name: normal(x0.shape, backend=name) for name in BACKENDS}


@pytest.mark.parametrize("work", [*NORMAL.values(), forward_noise], ids=[*NORMAL, "forward_noise"])
def test_memory_grows_by_what_is_returned(work):
    schedule, excess = Schedule.linear(1000), []
    for n in (600, 1800):
        x0 = np.ones((n, 512), np.float32)
        size, most = peak(lambda x0=x0: work(x0, 500, schedule))
        assert size >= x0.nbytes
        excess.append(most - size)
    assert excess[1] - excess[0] < WORKSPACE


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        ({"shape": (-1, 2)}, "shape"),
        ({"shape": ()}, "shape"),
        ({"shape": (2.0, 3)}, "shape"),
        ({"shape": 2.5}, "shape"),
        ({"shape": None}, "shape"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": None}, "seed"),
        ({"stream": "nose"}, "stream"),
        ({"stream": len(Stream)}, "stream"),
        ({"stream": None}, "stream"),
        ({"step": -1}, "step"),
        ({"step": 2**32}, "step"),
        ({"first_sample": -1}, "first_sample"),
        ({"first_sample": 2**56 - 1}, "first_sample"),
        ({"backend": "gpu"}, "backend"),
        ({"backend": None}, "backend"),
    ],
)
def test_bad_input_is_refused_by_name(bad, argument):
    with pytest.raises(ArgumentError) as caught:
        normal(**{"shape": (2, 3), "seed": 1} | bad)
    assert caught.value.argument == argument


def test_the_last_row_exists():
    assert normal((2, 3), first_sample=2**56 - 2).shape == (2, 3)
