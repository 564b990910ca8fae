"""Plug-in of vLLM-Omni: the entry point `foveal` of the group `vllm_omni.sparse_attn` (its slot SPARSE_ATTN).

    --diffusion-attention-config.per_role.self.backend foveal
    --diffusion-attention-config.per_role.self.extra.window '[6, 16, 16]'
    --diffusion-attention-config.per_role.self.extra.dense_steps 10

Parameters are fields of `foveal.zoo.accelerate.Plan`: window, stride, dilation, mask, options, budget, flat,
dense_steps, min_tokens. Attention is dense in the dense steps, with a mask, and where the tokens are not those of the
latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .grids import attend_grid
from .plan import Plan

FIELDS = ("window", "stride", "dilation", "mask", "options", "budget", "flat", "dense_steps", "min_tokens")


@torch.compiler.disable(recursive=True)  # the step is a Python number: a graph would be compiled for each
def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, params: Mapping[str, Any], is_causal: bool, softmax_scale: float
) -> Tensor:
    """Self-attention of one layer, as the slot calls it.

    Args:
        query, key, value: `[batch, tokens, heads, head_dim]`, float16 or bfloat16.
        params: fields of a plan; `denoise_step_idx` and `total_denoise_steps` `[samples]`; `latent_shape` (T, H, W) and
            `patch_size` `[samples, 3]`; `attn_mask`. What else is in it is ignored.
        is_causal: dense when true.
        softmax_scale: factor on query . key.

    Returns:
        `[batch, tokens, heads, head_dim]`.

    Raises:
        ValueError, TypeError: parameters that are no plan.
    """
    plan = Plan(**{name: _hashable(params[name]) for name in FIELDS if params.get(name) is not None})
    mask, grid = params.get("attn_mask"), read_grid(params, query.shape[1])
    step, total = (_one(params.get(name)) for name in ("denoise_step_idx", "total_denoise_steps"))
    same = query.shape[1] == key.shape[1]
    if mask is None and same and not is_causal and grid is not None and plan.is_sparse(step, total, None):
        out = attend_grid(query, key, value, plan, grid, scale=softmax_scale)
        if out is not None:
            return out
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    out = scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=is_causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


sparse_attention.capabilities = {"supports_attention_mask": True}  # type: ignore[attr-defined]


def read_grid(params: Mapping[str, Any], tokens: int) -> tuple[int, int, int] | None:
    """Tokens along (t, h, w), the same for all samples; None where they are not told or do not make up the sequence."""
    shapes, patches = (_rows(params.get(name)) for name in ("latent_shape", "patch_size"))
    if not shapes or not patches or len(set(shapes)) > 1 or len(set(patches)) > 1:
        return None
    t, h, w = (n // p for n, p in zip(shapes[0], patches[0], strict=True))
    return (t, h, w) if prod((t, h, w)) == tokens else None


def _rows(value: Any) -> list[tuple[int, int, int]]:
    """Rows of `[samples, 3]`, or one row of three numbers."""
    if value is None:
        return []
    rows = torch.as_tensor(value).reshape(-1, 3).tolist()
    return [tuple(int(n) for n in row) for row in rows]  # type: ignore[misc]


def _one(value: Any) -> int | None:
    """The largest of `[samples]`: samples of one call are at one step."""
    return None if value is None else int(torch.as_tensor(value).max())


def _hashable(value: Any) -> Any:
    return tuple(_hashable(x) for x in value) if isinstance(value, list) else value
