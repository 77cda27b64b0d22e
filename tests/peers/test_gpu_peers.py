"""The PyTorch side of the GPU benchmark, every way of it run once on the CPU, beside our kernels on the host run."""

import importlib
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from host_cuda import HostRuntime, has_compiler
from tolerances import assert_close, assert_same_bits

import fastdiff
from fastdiff.backends.cuda import CudaBackend
from fastdiff.bench import arrays, layers, networks
from fastdiff.errors import ArgumentError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
gpu, gpu_peers = map(importlib.import_module, ("gpu", "gpu_peers"))

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++"),
    pytest.mark.filterwarnings("ignore::fastdiff.errors.ScheduleWarning"),  # of so few timesteps
]

ARRAYS = [
    workload.name
    for workload in gpu.WORKLOADS
    if type(workload).__module__ == arrays.__name__ and not isinstance(workload, arrays.Normals)
]


def small(workload):
    if not workload.image:
        return replace(workload.at(1e-5), n=2 if workload.n < 100 else 5)
    few = {"channels": (4, 4, 8)} if isinstance(workload, networks.Pictures) else {}
    if isinstance(workload, networks.PicturesSampling):
        few["steps"] = networks.GPU_DDIM + 1
    shape = (4, 4, 3) if few else (5, 8) if isinstance(workload, layers.Attention) else (4, 4, 8)
    return replace(workload.at(1e-5), n=2, shape=shape, **few)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    """Stands for a CUDA graph: counts its replays."""

    made = ()

    def __init__(self):
        self.captured, self.replays = False, 0
        Graph.made = (*Graph.made, self)

    def replay(self):
        assert self.captured
        self.replays += 1


@pytest.fixture
def on_cpu(monkeypatch):
    """PyTorch's GPU is its CPU, and nothing is compiled."""

    @contextmanager
    def capture(graph):
        yield
        graph.captured = True

    monkeypatch.setattr(gpu_peers, "DEVICE", "cpu")
    for module in (arrays, networks):
        monkeypatch.setattr(module, "T", 7)
    monkeypatch.setattr(arrays, "DATA_STEP", 3)
    monkeypatch.setattr(layers, "HEAD", 4)
    monkeypatch.setattr(layers, "GROUPS", 2)
    for name, value in {"blocks": 1, "head_width": 4, "groups": 2}.items():
        monkeypatch.setitem(networks.UNET, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    Graph.made = ()
    for name, value in {
        "Stream": Stream, "current_stream": Stream, "stream": contextmanager(lambda side: iter([side])),
        "CUDAGraph": Graph, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("workload", gpu.WORKLOADS, ids=lambda workload: workload.name)
def test_every_way_runs_and_agrees(on_cpu, workload):
    """Whoever makes them compares the two sides' results on the same inputs; what decides a target comes first."""
    ways = gpu.prepare(CudaBackend(HostRuntime()), small(workload), gpu_peers, None)
    if isinstance(workload, arrays.Normals):
        expected = {"ours", "eager"}
    elif not workload.image:
        expected = {"ours", *(f"ours-{name}" for name in workload.precisions), *gpu.WAYS}
    else:
        ours = {"ours", "ours-bf16"} if workload.convolves else {"ours"}
        expected = {*ours, *gpu.IMAGE_WAYS} - (set() if isinstance(workload, networks.Pictures) else {"reduced"})
    assert set(ways.makers) == expected
    ours = [name for name in ways.makers if name in gpu.OURS]
    assert list(ways.makers)[: len(ours) + 1] == [*ours, "eager"]
    decide = [name for name in gpu.deciding(workload) if name != "eager"]
    assert list(ways.makers)[len(ours) + 1 :][: len(decide)] == decide
    runs, failed, cut = gpu.make(ways, int)
    assert (failed, cut) == ({}, [])
    assert set(next(gpu.measure(runs, ways.units, int, 1e-6))) == expected
    for graph in Graph.made:
        assert graph.replays > 1
    assert len(Graph.made) == ("graphs" in expected) + ("bf16-graphs" in expected)


@pytest.mark.parametrize(
    "name", [*ARRAYS, "chain-tutorial-1000", "chain-default-100000"], ids=lambda name: name.split("-")[0]
)
def test_results_that_differ_are_noticed(on_cpu, monkeypatch, name):
    """Somebody else's formula in PyTorch's place."""
    workload = small(gpu.BY_NAME[name])

    def wrong(function):
        def run(*args):
            result = function(*args)
            return (1.001 * result[0], *result[1:]) if isinstance(result, tuple) else 1.001 * result

        return run

    def wrong_work(self, torch, given):
        work = right(self, torch, given)
        return work._replace(function=wrong(work.function))

    if name in ARRAYS:
        right = type(workload).peer_on_gpu
        monkeypatch.setattr(type(workload), "peer_on_gpu", wrong_work)
    else:
        monkeypatch.setattr(gpu_peers.nets, "output", wrong(gpu_peers.nets.output))
    with pytest.raises(AssertionError, match=f"{workload.name}: ours and PyTorch's differ"):
        gpu.prepare(CudaBackend(HostRuntime()), workload, gpu_peers, None)


@pytest.mark.parametrize(
    "name", ["unet-forward-16", "unet-train-16", "unet-ddim-50-16", "conv-back-16x16x16x128", "norm-1024x32x32x64"]
)
def test_a_form_that_differs_is_noticed(on_cpu, monkeypatch, name):
    """One of PyTorch's, or PyTorch as it stands, whose place is in every comparison."""
    workload = gpu.BY_NAME[name]
    right = {"unet-forward": "image_forward", "unet-train": "image_training", "unet-ddim": "image_sampling"}
    right = right.get("-".join(name.split("-")[:2]), "layer")
    function, off = getattr(gpu_peers, right), "channels"

    def wrong(*args, **options):
        def scaled(make):
            run, result = make()
            return run, 1.001 * result

        return {
            name: (lambda make=make: scaled(make)) if name == off else make
            for name, make in function(*args, **options).items()
        }

    monkeypatch.setattr(gpu_peers, right, wrong)
    makers = gpu.prepare(CudaBackend(HostRuntime()), small(workload), gpu_peers, None).makers
    makers["ours"]()
    with pytest.raises(AssertionError, match=f"{name}, channels: ours and PyTorch's differ by 0.001"):
        makers["channels"]()
    off = "eager"
    makers = gpu.prepare(CudaBackend(HostRuntime()), small(workload), gpu_peers, None).makers
    for name in ("ours", "channels"):
        with pytest.raises(AssertionError, match=f"{workload.name}, {name}: ours and PyTorch's differ by 0.000999"):
            makers[name]()


def test_a_form_is_compared_with_the_weights_of_before(on_cpu):
    """Though another form, which shares them, has trained them; and each is made once."""
    workload = small(gpu.BY_NAME["unet-train-16"])
    ways, made = gpu.prepare(CudaBackend(HostRuntime()), workload, gpu_peers, None), []
    for name in ("graphs", "bf16-graphs", "channels", "compiled"):
        run = ways.makers[name]()
        for _ in range(3):
            run()
        made.append(run)
    assert made[0].run is made[3]


def test_reduced_is_called_once_before_it_is_timed(on_cpu, monkeypatch):
    """Its second call is recorded, with the precision of that moment."""
    calls, exact = [], []
    monkeypatch.setattr(
        torch.compiler,
        "cudagraph_mark_step_begin",
        lambda: calls.append(torch.backends.cudnn.allow_tf32),
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for name in ("unet-forward-16", "unet-train-16", "unet-ddim-50-16"):
        workload = small(gpu.BY_NAME[name])
        calls.clear()
        run = gpu.prepare(CudaBackend(HostRuntime()), workload, gpu_peers, None).makers["reduced"]()
        exact.append(list(calls))
        run()
        assert set(calls[1:]) == {True}
    assert exact == [[False]] * 3


def test_a_capture_warms_up_first(on_cpu):
    calls = []
    replayed = gpu_peers._Replayed(lambda: calls.append(1))
    for _ in range(3):
        replayed()
    assert len(calls) == gpu_peers.WARM + 1
    assert [graph.replays for graph in Graph.made] == [3]


def test_tensors_are_arrays():
    """Through DLPack, on every backend; tensors that cannot be handed over are refused with the argument's name."""
    x0, t, schedule = torch.randn(5, 7), torch.arange(5), fastdiff.Schedule.cosine(12)
    net = fastdiff.MLP(7, hidden=(5,), T=12)
    table = fastdiff.samplers.ddim(schedule, 4)
    for be in (fastdiff.get_backend("numpy"), fastdiff.get_backend("cpu"), CudaBackend(HostRuntime())):
        for got, want in (
            (fastdiff.forward_noise(x0, t, schedule, backend=be), (x0.numpy(), t.numpy(), schedule)),
            (fastdiff.forward_noise(x0, t[3], schedule, backend=be), (x0.numpy(), 3, schedule)),
        ):
            assert_same_bits(got[0], fastdiff.forward_noise(*want, backend=be)[0])
        assert_same_bits(net.predict(x0, t, backend=be), net.predict(x0.numpy(), t.numpy(), backend=be))
        drawn = fastdiff.sample(lambda x, t: torch.from_numpy(x) / 2, table, n=3, shape=7, backend=be)
        assert_same_bits(drawn, fastdiff.sample(lambda x, t: x / 2, table, n=3, shape=7, backend=be))
        assert torch.from_dlpack(drawn).shape == (3, 7)
    for bad in (x0.clone().requires_grad_(), x0.to(torch.bfloat16), x0.to_sparse()):
        with pytest.raises(ArgumentError, match=r"^x0: got Tensor "):
            fastdiff.forward_noise(bad, 3, schedule)
    with pytest.raises(ArgumentError, match=r"^x0: got dtype bool"):
        fastdiff.forward_noise(x0 > 0, 3, schedule)


def test_a_training_step_learns(on_cpu):
    """Its loss on a batch of its own falls: gradient, clipping and optimiser are wired as they should be."""
    net = torch.nn.Module()
    net.scale = torch.nn.Parameter(torch.tensor(0.0))
    net.forward = lambda x, t: net.scale * x
    betas = np.linspace(0.9, 0.99, 10)  # what is left is noise: the best factor is 1
    for name, run in gpu_peers.training(net, np.ones((8, 4), np.float32), betas, 64).items():
        before = net.scale.item()
        for _ in range(5):
            run()
        assert net.scale.item() > before + 1e-3, name


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_what_is_really_compiled_is_the_formula(monkeypatch):
    monkeypatch.setattr(gpu_peers, "DEVICE", "cpu")
    workload, s = small(gpu.BY_NAME["forward-1000000x50"]), arrays.image_schedule()
    given = workload.inputs()
    x0, t = given["x0"], given["t"]
    runs = gpu_peers.ways(workload.peer(torch, {name: gpu_peers.device(value) for name, value in given.items()}))
    x_t, eps = (tensor.numpy() for tensor in runs["compiled"]())
    assert eps.std() > 0.5
    want = s.signal[t][:, None] * x0 + s.noise[t][:, None] * eps.astype(np.float64)
    assert_close(x_t, want, terms=2)
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    runs["compiled"]()
    assert frames["ok"] == before
    gpu_peers.release()
    runs["compiled"]()
    assert frames["ok"] > before
