"""``fastdiff info``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from fastdiff.cli.parser import BACKENDS, add_command, installed, installed_version
from fastdiff.display import aligned


def add(commands: Any) -> None:
    info = add_command(
        commands,
        "info",
        "say what is in a model file, or what is installed",
        "Prints what a model file holds: network, schedule, training. Without a file:\n"
        "version, backends and packages of this installation.",
        "examples:\n  fastdiff info m.safetensors\n  fastdiff info m.safetensors --backend cuda\n  fastdiff info\n",
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help="a .safetensors file")
    info.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="cuda: also the GPU, and how the model samples on GPUs"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model is None:
        facts = _installation()
        title = f"fastdiff {facts.pop('version')}"
    else:
        from fastdiff.checkpoint import describe

        facts = describe(args.model)
        title = args.model
    if args.backend == "cuda":
        facts["cuda"] = _on_cuda(facts.get("network"))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(title)
        print("\n".join(aligned(facts if args.model is None else _brief(facts))))
    return 0


FOR_PROGRAMS = ("tensors", "training", "parameters", "digest", "header_digest")


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a model file without what only programs want: those are in the JSON."""
    brief = {key: value for key, value in facts.items() if key not in FOR_PROGRAMS}
    network = {**facts["network"], "parameters": facts["parameters"]}
    training = facts["training"] or "not in this file: it can sample, but not be trained on"
    kept = facts.get("kept_rows", 0)
    private = f"{kept} of them are in this file" if kept else "none in this file"
    return {**brief, "kept_rows": private, "network": network, "training": training}


def _on_cuda(network: Mapping[str, Any] | None) -> dict[str, Any]:
    """The GPU here, or why none can be used; and how a perceptron's sampling chain runs on it and on others."""
    from fastdiff.backends import PRECISIONS, get_backend
    from fastdiff.backends.cuda.device import SHARED_LIMITS
    from fastdiff.backends.cuda.mlp import chain_plan
    from fastdiff.errors import BackendError
    from fastdiff.nn.mlp import KINDS, MLP

    limits = {f"on compute capability {name}": limit for name, limit in SHARED_LIMITS.items()}
    try:
        runtime: Any = get_backend("cuda").runtime  # type: ignore[attr-defined]
        device, limits = runtime.device, {"here": runtime.shared_limit, **limits}
    except BackendError as error:
        device = str(error)
    facts: dict[str, Any] = {"device": device}
    if network is not None and network.get("kind") in KINDS:
        plan = MLP.from_dict(network, draw=False).plan
        for precision in PRECISIONS:
            title = "sampling chain" + ("" if precision == PRECISIONS[0] else f", {precision}")
            facts[title] = {name: chain_plan(plan, limit, precision) for name, limit in limits.items()}
    return facts


def _installation() -> dict[str, Any]:
    import platform

    import fastdiff as fd

    return {
        "version": installed_version(),
        "backends": fd.available_backends(),
        "processors": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed(name) or "not installed" for name in ("numpy", "numba", "scipy", "matplotlib")},
    }
