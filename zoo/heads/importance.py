"""How much each head matters (arXiv:1905.10650), and models with fewer heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attentions import TABLES, HeadSite, find_attentions, head_gates, ones_of

Loss = Callable[[nn.Module, Any], Tensor]


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    kind: Literal["gradient", "ablate", "leave_one_in"] = "gradient",
) -> dict[str, Tensor]:
    """Importance of each head, by name of its attention (arXiv:1905.10650, sections 3 and 4.1).

    Args:
        model: any model whose attentions `find_attentions` knows. Its mode (`eval`) stays as it is.
        batches: what `loss` takes.
        loss: `loss(model, batch)` is a loss per example `[B]`, of a forward pass of B examples.
        kind: "gradient" is the mean over examples of the absolute derivative of the loss by a factor on the head's
            output; "ablate" the rise of the mean loss without the head; "leave_one_in" that without all other heads of
            its attention.

    Returns:
        float32 `[heads]` by name.

    Raises:
        ValueError: an unknown kind, no batch, or a loss of another shape.
    """
    if kind not in ("gradient", "ablate", "leave_one_in"):
        raise ValueError(f"kind={kind!r} must be 'gradient', 'ablate' or 'leave_one_in'")
    sites = find_attentions(model)
    total = {site.name: torch.zeros(site.heads) for site in sites}
    examples = 0
    for batch in batches:
        measure = _by_gradient if kind == "gradient" else _by_removal
        count, found = measure(model, batch, loss, sites, kind)
        examples += count
        for name, x in found.items():
            total[name] += x.cpu()
    if examples == 0:
        raise ValueError("batches holds no batch")
    return {name: x / examples for name, x in total.items()}


def _losses(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    losses = loss(model, batch)
    if losses.dim() != 1:
        raise ValueError(f"loss gave a tensor of shape {tuple(losses.shape)}; expected a loss per example, [B]")
    return losses


def _by_gradient(model, batch, loss, sites: list[HeadSite], kind: str) -> tuple[int, dict[str, Tensor]]:
    with torch.no_grad():
        count = len(_losses(model, batch, loss))
    gates = {name: x.requires_grad_() for name, x in ones_of(sites, count).items()}
    with torch.enable_grad(), head_gates(model, gates):
        grads = torch.autograd.grad(_losses(model, batch, loss).sum(), list(gates.values()), allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, gates.values(), strict=True))
    return count, {name: g.abs().sum(0).float() for name, g in zip(gates, zeros, strict=True)}


@torch.no_grad()
def _by_removal(model, batch, loss, sites: list[HeadSite], kind: str) -> tuple[int, dict[str, Tensor]]:
    whole = _losses(model, batch, loss)
    found = {}
    for site in sites:
        rises = []
        for head in range(site.heads):
            gate = torch.zeros(site.heads) if kind == "leave_one_in" else torch.ones(site.heads)
            gate[head] = 1.0 if kind == "leave_one_in" else 0.0
            with head_gates(model, {site.name: gate.to(whole.device)}):
                rises.append((_losses(model, batch, loss) - whole).sum())
        found[site.name] = torch.stack(rises).float()
    return len(whole), found


def choose_heads(
    importance: Mapping[str, Tensor], *, keep: float = 0.7, per_layer_norm: bool = True
) -> dict[str, list[int]]:
    """The most important heads of a model, at least one per attention.

    Args:
        importance: as `head_importance` gives it.
        keep: share of all heads that stays, in (0, 1].
        per_layer_norm: divide by the length of each attention's vector first, so that layers compare.

    Returns:
        kept heads in ascending order, by name of attention.

    Raises:
        ValueError: keep out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must lie in (0, 1]")
    scaled = {n: x / x.norm().clamp_min(1e-30) if per_layer_norm else x for n, x in importance.items()}
    ranked = sorted(((x[h].item(), name, h) for name, x in scaled.items() for h in range(len(x))), reverse=True)
    first = {name: int(x.argmax()) for name, x in scaled.items()}
    budget = max(len(first), round(keep * len(ranked)))
    kept = {(name, h) for name, h in first.items()}
    for _, name, head in ranked:
        if len(kept) >= budget:
            break
        kept.add((name, head))
    return {name: sorted(h for n, h in kept if n == name) for name in importance}


@torch.no_grad()
def prune_heads(model: nn.Module, plan: Mapping[str, list[int]]) -> nn.Module:
    """Cut heads out of a model's projections, in place: it equals the model whose other heads give zero.

    Args:
        model: any model whose attentions `find_attentions` knows.
        plan: heads to keep by name of attention, as `choose_heads` gives them; others stay whole.

    Returns:
        the model.

    Raises:
        ValueError: an unknown attention or head, or none to keep. Nothing has been cut then.
        NotImplementedError: an attention whose heads' outputs are normed or gated together, or whose tables of heads
            are unknown.
    """
    sites = {site.name: site for site in find_attentions(model)}
    for name, heads in plan.items():
        if name not in sites:
            raise ValueError(f"plan names {name!r}; expected one of {list(sites)}")
        site = sites[name]
        if not heads or len(set(heads)) != len(heads) or any(not 0 <= h < site.heads for h in heads):
            raise ValueError(f"plan[{name!r}]={heads} must hold some of the heads 0 to {site.heads - 1}, each once")
        for part in ("norm", "gate"):
            if not isinstance(getattr(site.module, part, None), nn.Identity | None):
                raise NotImplementedError(f"{name}.{part} works on all heads together: its heads cannot be cut")
        mlp = getattr(site.module, "cpb_mlp", None)  # Swin v2 makes biases of all heads by a network
        if mlp is not None:
            raise NotImplementedError(f"{name}.cpb_mlp makes biases of all heads: its heads cannot be cut")
    for name, heads in plan.items():
        if len(heads) < sites[name].heads:
            _cut(sites[name], sorted(heads))
    return model


def _cut(site: HeadSite, heads: list[int]) -> None:
    module, dim = site.module, site.head_dim
    channels = torch.cat([torch.arange(h * dim, (h + 1) * dim) for h in heads]).to(module.proj.weight.device)
    rows = torch.cat([channels + i * site.heads * dim for i in range(3)])
    qkv, proj = module.qkv, module.proj
    for layer, name, index, axis in (
        (qkv, "weight", rows, 0),
        (qkv, "bias", rows, 0),
        (proj, "weight", channels, 1),
    ):
        old = getattr(layer, name)
        if old is not None:
            setattr(layer, name, nn.Parameter(old.index_select(axis, index), requires_grad=old.requires_grad))
    qkv.out_features, proj.in_features = len(rows), len(channels)
    for name, axis in TABLES.items():
        table = getattr(module, name, None)
        if isinstance(table, nn.Parameter):
            index = torch.tensor(heads, device=table.device)
            setattr(module, name, nn.Parameter(table.index_select(axis, index), requires_grad=table.requires_grad))
    module.num_heads = len(heads)
    for name, value in (("attn_dim", len(heads) * dim), ("num_kv_heads", len(heads)), ("key_heads", len(heads))):
        if hasattr(module, name):
            setattr(module, name, value)
