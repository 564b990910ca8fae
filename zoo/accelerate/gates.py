"""Gates of VSA checkpoints (`to_gate_compress`, as in FastWan), which diffusers drops when it loads a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site, find

GATE = "to_gate_compress"
NAMES = re.compile(rf"(?:^|\.)blocks\.(\d+)\.(?:attn1\.)?{GATE}\.(weight|bias)$")


def find_gate(site: Site) -> nn.Linear:
    """The gate of a site.

    Raises:
        ValueError: the model has none.
    """
    gate = getattr(site.module, GATE, None)
    if gate is None:
        raise ValueError(
            f"{site.path} has no {GATE}, which a gated plan needs: load_gates(model, checkpoint) puts in those of a "
            "checkpoint that was trained with VSA; gated=False is the sparse branch alone"
        )
    return gate


def load_gates(model: Any, checkpoint: str | Path | Mapping[str, Tensor]) -> int:
    """Put the gates of a VSA checkpoint into the self-attentions of a Wan transformer.

    Args:
        model: transformer, or pipeline with one.
        checkpoint: a safetensors file, a folder of them, or tensors by name, of which others are ignored. Gates are
            named `blocks.N.to_gate_compress.weight`, or `blocks.N.attn1.to_gate_compress.weight`.

    Returns:
        Number of gates.

    Raises:
        ValueError: no gates, gates for other layers, or of another size; nothing is changed then.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _read(checkpoint):
        if match := NAMES.search(name):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    sites = {site.layer: site for site in find(model) if site.kind == "self" and site.operations[0].main}
    if not found:
        raise ValueError(f"checkpoint has no blocks.N.{GATE}: it was not trained with VSA")
    if set(found) != set(sites):
        raise ValueError(f"checkpoint has gates for layers {sorted(found)}; the model has layers {sorted(sites)}")
    gates = {}
    for layer, tensors in found.items():
        like: Any = sites[layer].module.to_q
        weight = tensors.get("weight")
        inner = sites[layer].heads * sites[layer].head_dim
        if weight is None or tuple(weight.shape) != (inner, like.in_features):
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"blocks.{layer}.{GATE}.weight has shape {shape}; the model needs {(inner, like.in_features)}"
            )
        gate = nn.Linear(like.in_features, inner, bias="bias" in tensors)
        gate.load_state_dict(tensors)
        gates[layer] = gate.to(device=like.weight.device, dtype=like.weight.dtype)
    for layer, gate in gates.items():
        setattr(sites[layer].module, GATE, gate)
    return len(gates)


def _read(checkpoint: str | Path | Mapping[str, Tensor]):
    if isinstance(checkpoint, Mapping):
        yield from ((name, torch.as_tensor(x)) for name, x in checkpoint.items())
        return
    from safetensors import safe_open

    path = Path(checkpoint)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"checkpoint={str(checkpoint)!r} has no safetensors files")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if NAMES.search(name):
                    yield name, tensors.get_tensor(name)
