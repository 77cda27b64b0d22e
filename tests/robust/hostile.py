"""Files that were altered or made up: what is raised, what is noticed, and what they cost."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import interop
from fastdiff.errors import CheckpointError, FastdiffError
from robust.accidents import FIT, PICTURES, X
from robust.count import Count

warnings.simplefilter("ignore")


def small_model() -> fd.Diffusion:
    return fd.Diffusion(fd.MLP(16, hidden=(8,), T=10), backend="numpy").fit(X, steps=2, **FIT)


def flips(tries: int) -> Count:
    """Bits flipped in the values of a checkpoint that are read without a word: of a small one, and of one with blocks."""
    count, chance = Count("flipped bits that are not noticed"), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for width in (8, 300):
            path = Path(folder) / f"{width}.safetensors"
            model = fd.Diffusion(fd.MLP(16, hidden=(width, width), T=10), backend="numpy").fit(X, steps=2, **FIT)
            model.save(path)
            content = bytearray(path.read_bytes())
            files.append((path, content, 8 + int.from_bytes(content[:8], "little")))
        for k in range(tries):
            path, content, start = files[k % 2]
            at, bit = chance.randrange(start, len(content)), 1 << chance.randrange(8)
            content[at] ^= bit
            path.write_bytes(content)
            content[at] ^= bit
            try:
                fd.load(path, backend="numpy")
                count.add(f"{path.name}: byte {at}, bit {bit}")
            except CheckpointError:
                count.add()
    return count


def seeds(folder: Path) -> dict[str, tuple[list[Path], object]]:
    """Files of each kind that can be read, and what reads them."""
    from PIL import Image

    model = small_model()
    pictures = fd.Diffusion(fd.UNet((4, 4, 1), channels=(4,), blocks=1, T=5), backend="numpy")
    pictures.fit(PICTURES[:, :4, :4], steps=1, **FIT)
    model.save(folder / "curves.safetensors")
    model.save(folder / "sampling.safetensors", training=False)
    pictures.save(folder / "pictures.safetensors")
    pictures.net.save_diffusers(folder / "net")
    interop.save_scheduler(fd.samplers.dpmpp_2m(fd.Schedule.linear(), 10), folder / "plan")
    np.save(folder / "x.npy", X[:4])
    (folder / "x.csv").write_text("a,b,c\n1,2,3\n4,5.5,6e3\n7,8,-9\n")
    (folder / "y.csv").write_text("1;2,5;3\n4;5;6\n\n# word\n7;8;9\n")
    shown = folder / "shown"
    shown.mkdir()
    for ending in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        Image.fromarray(PICTURES[0, :, :, 0]).save(shown / f"one.{ending}")

    def picture(path):
        place = path.parent / "alone"
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        (place / path.name).write_bytes(path.read_bytes())
        return fd.data.load_images(place, 8)

    def net(path):
        place = path.parent / "folder"
        place.mkdir(exist_ok=True)
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            (place / name).write_bytes((folder / "net" / name).read_bytes())
        (place / path.name).write_bytes(path.read_bytes())
        return fd.load_diffusers(place)

    return {
        "checkpoints": ([*folder.glob("*.safetensors")], lambda path: fd.load(path, backend="numpy")),
        "networks of diffusers": ([*(folder / "net").iterdir()], net),
        "schedulers of diffusers": ([*(folder / "plan").iterdir()], lambda path: interop.load_scheduler(path, 10)),
        "npy": ([folder / "x.npy"], fd.data.load_curves),
        "csv": ([folder / "x.csv", folder / "y.csv"], fd.data.load_curves),
        "pictures": ([*shown.iterdir()], picture),
    }


JUNK = [b"", b"\0", b"\xff" * 8, b"-1", b"1e999", b"nan", b"null", b"true", b"[]", b"{}", b'"', b"\n", b",", b"9" * 30,
        "\u00a0".encode(), "\u2003".encode(), "\ud800".encode("utf-8", "surrogatepass"), b"\x1c", b"1" * 5000]  # fmt: skip


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Content with a few changes."""
    found = bytearray(content)
    header = min(len(found), chance.choice([64, 512, len(found)]))  # most of what is checked comes early
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at, kind = chance.randrange(header + 1), chance.randrange(6)
        if kind == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            found[at : at + chance.randrange(1, 9)] = b""
        elif kind == 2:
            found[at:at] = chance.choice(JUNK)
        elif kind == 3:
            end = at + chance.randrange(1, 40)
            found[end:end] = found[at:end]
        elif kind == 4:
            number = chance.choice([0, 1, 2, 255, 1 << 31, (1 << 63) - 1])
            found[at : at + chance.choice([1, 4, 8])] = number.to_bytes(8, "little")[: chance.choice([1, 4, 8])]
        else:
            del found[at + (len(found) - at) // 2 :]
    return bytes(found)


def changed_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON text with a value replaced or a key dropped, where it is one; so too in the header of safetensors."""
    start = 0
    if content[:1] != b"{":
        size = int.from_bytes(content[:8], "little")
        text, rest, start = content[8 : 8 + size], content[8 + size :], 8
    else:
        text, rest = content, b""
    try:
        whole = json.loads(text)
    except ValueError:
        return content
    inner = None
    tree = whole
    if start and "fastdiff" in whole.get("__metadata__", {}) and chance.random() < 0.8:
        inner = tree = json.loads(whole["__metadata__"]["fastdiff"])
    for _ in range(chance.randrange(1, 5)):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            break
        key = chance.choice(keys)
        if isinstance(tree[key], (dict, list)) and chance.random() < 0.7:
            tree = tree[key]
            continue
        value = chance.choice(
            [None, True, False, 0, -1, 1, 2, 3, 0.5, 1e308, 10**400, "", "x", "\ud800", [], [None], {}, {"kind": 1},
             [[[]]], [1] * 3, 1 << 31, 1 << 63]
        )  # fmt: skip
        if chance.random() < 0.1 and isinstance(tree, dict):
            del tree[key]
        else:
            tree[key] = value
        break
    if inner is not None:
        inner.pop("digest", None)
        inner.pop("header_digest", None)
        whole["__metadata__"]["fastdiff"] = json.dumps(inner)
    text = json.dumps(whole).encode()
    return text if not start else len(text).to_bytes(8, "little") + text + rest


def mutations(tries: int, most: float = 5.0) -> list[Count]:
    """Mutated files of each kind: exceptions that are not ours, and files that take longer than `most` seconds."""
    counts = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, (paths, read) in seeds(folder).items():
            count, chance = Count(f"exceptions that are not ours, of mutated {kind}"), random.Random(kind)
            contents = [(path.name, path.read_bytes()) for path in sorted(paths)]
            refused = 0
            for _ in range(tries):
                one, content = chance.choice(contents)
                of_json = content[:1] == b"{" or one.endswith(".safetensors")
                content = (changed_json if of_json and chance.random() < 0.6 else mutated)(content, chance)
                place = folder / "tried"
                place.mkdir(exist_ok=True)
                (place / one).write_bytes(content)
                start = time.process_time()
                try:
                    read(place / one)
                    problem = None
                except FastdiffError:
                    refused, problem = refused + 1, None
                except Exception as error:  # noqa: BLE001
                    problem = f"{one}: {type(error).__name__}: {error}"
                if time.process_time() - start > most:
                    problem = f"{one}: {time.process_time() - start:.1f} s"
                if problem and os.environ.get("ROBUST_KEEP"):
                    (Path(os.environ["ROBUST_KEEP"]) / f"{count.failures}-{one}").write_bytes(content)
                count.add(problem)
            count.note = f"{refused} refused"
            counts.append(count)
    return counts


def costly(folder: Path) -> list[Path]:
    """Files that are to cost much."""
    model = small_model()
    model.save(folder / "m.safetensors")
    content = (folder / "m.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    outer, values = json.loads(content[8 : 8 + size]), content[8 + size :]
    header = json.loads(outer["__metadata__"]["fastdiff"])
    unet = fd.UNet((8, 8, 1), channels=(4,), T=10).to_dict()
    many = {"attention": [False] * 12, "up_attention": [False] * 12, "channels": [2] * 12, "blocks": 64}
    T = 1 << 20
    changes = {
        "layers": {"network": {**header["network"], "hidden": [1] * 100_000}},
        "wide": {"network": {**header["network"], "hidden": [65536] * 3}},
        "steps": {"network": {**header["network"], "T": T}},
        "betas": {"network": {**header["network"], "T": 1_000_000}, "schedule": {"name": "custom", "betas": [1e-6] * 10**6}},
        "levels": {"network": {**unet, "shape": [4096, 4096, 1], **many}},
        "deep": {"report": {"a": "[" * 100_000}},
        "long": {"class_names": ["x"] * 300_000},
    }  # fmt: skip
    found = []
    for name, change in changes.items():
        outer["__metadata__"]["fastdiff"] = json.dumps({**header, **change, "digest": None, "header_digest": None})
        text = json.dumps(outer).encode()
        found.append(folder / f"{name}.safetensors")
        found[-1].write_bytes(len(text).to_bytes(8, "little") + text + values)
    for name, text in {
        "lists": b"{" + b"[]," * 5_000_000, "names": b"{" + b'"a":1,' * 3_000_000, "open": b"[" * 10_000_000,
        "tensors": json.dumps(
            {str(k): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for k in range(120_000)}
        ).encode(),
    }.items():  # fmt: skip
        found.append(folder / f"{name}.safetensors")
        found[-1].write_bytes(len(text).to_bytes(8, "little") + text)
    found.append(folder / "x.npy")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4)))
    found[-1].write_bytes(buffer.getvalue().replace(b"(4, 4)", b"(4000000, 4000000)"[:6].ljust(6)))
    found.append(folder / "wide.csv")
    found[-1].write_text(",".join(["1"] * 500_000) + "\n")
    return found


COST = """
import resource, sys, time
import fastdiff as fd, fastdiff.model
path = sys.argv[1]
read = fd.load if path.endswith("safetensors") else fd.data.load_curves
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    read(path)
except fd.errors.FastdiffError as error:
    pass
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - start, (used - before) * 1024)
"""


def costs(tries: int) -> Count:
    """Files that cost more than 2 s + 20 ns a byte of processor time, or 4 n + 100 MB."""
    count = Count("files that cost more than 2 s + 20 ns a byte, or 4 n + 100 MB")
    most = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        for path in costly(Path(folder))[:tries]:
            n = path.stat().st_size
            run = subprocess.run([sys.executable, "-c", COST, str(path)], capture_output=True, text=True, check=False)
            if run.returncode:
                count.add(f"{path.name}: {run.stderr[-200:]}")
                continue
            seconds, memory = map(float, run.stdout.split())
            shares = seconds / (2 + 20e-9 * n), memory / (4 * n + 100e6)
            most = [max(pair) for pair in zip(most, shares, strict=True)]
            count.add(max(shares) > 1 and f"{path.name}: {n} bytes, {seconds:.2f} s, {memory / 1e6:.0f} MB")
    count.note = f"at most {most[0]:.0%} of that time, {most[1]:.0%} of that memory"
    return count


LOADS = """
import logging, sys, time, warnings
import numpy as np
import fastdiff as fd
warnings.simplefilter("ignore")
logging.disable()
path, times = sys.argv[1], []
net = fd.MLP(64, hidden=(900, 900), T=10)
options = {} if sys.argv[2] == "earlier" else {"validation": 0, "judge": False}
model = fd.Diffusion(net, fd.Schedule.cosine(10), backend="numpy")
model.fit(fd.data.harmonic_curves(16, points=64), steps=1, batch=8, progress=False, **options).save(path)
for line in sys.stdin:
    start = time.process_time()
    fd.load(path, backend="numpy")
    print(time.process_time() - start, flush=True)
"""
EARLIER = "0fb3548"  # the last commit whose files have no digest


def good_load(tries: int) -> Count:
    """A checkpoint of 16 MB: the processor time to load it over that of the loader before the digest, in alternation."""
    count = Count("16 MB checkpoint: loads at more than 1.3 x the time of the loader without a digest")
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), Path(__file__).parents[2]
        tree = subprocess.run(
            ["git", "archive", EARLIER, "fastdiff"], cwd=root, capture_output=True, check=False
        ).stdout
        if not tree:
            count.note = f"not counted: no commit {EARLIER} here"
            return count
        subprocess.run(["tar", "x", "-C", name], input=tree, check=True)
        loaders = {}
        for which, environment in (("earlier", {"PYTHONPATH": name}), ("now", {})):
            command = [sys.executable, "-c", LOADS, str(folder / f"{which}.safetensors"), which]
            loaders[which] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
            )
        times: dict[str, list[float]] = {which: [] for which in loaders}
        for _ in range(tries):
            for which, loader in loaders.items():
                loader.stdin.write("\n")
                loader.stdin.flush()
                times[which].append(float(loader.stdout.readline()))
        for loader in loaders.values():
            loader.stdin.close()
            loader.wait()
        before, now = (float(np.median(times[which])) for which in ("earlier", "now"))
        count.add(now > 1.3 * before and f"{now / before:.2f}")
        size = (folder / "now.safetensors").stat().st_size
    count.note = f"{size / 1e6:.0f} MB, {now * 1e3:.1f} ms against {before * 1e3:.1f} ms, ratio {now / before:.2f}"
    return count
