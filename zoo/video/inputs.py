"""Inputs of the model: named checks of its arguments and calls; patches out of videos and back."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .blocks import MLPS
from .kv_cache import KVCache
from .modulation import MODULATIONS, wide
from .positions import default_axes

CONDITIONINGS = (None, "class", "cross", "joint")
PREDICTIONS = ("velocity", "video")
LEAST_TIME = 0.05  # of the divisor (arXiv:2511.13720): at less noise an error of the clean video counts no more


def patchify(video: Tensor, patch: Sequence[int]) -> Tensor:
    """`[B, C, T, H, W]` to tokens in raster order, `[B, tokens, C * prod(patch)]`."""
    (t, h, w), (frames, height, width) = patch, video.shape[2:]
    cut = video.unflatten(4, (width // w, w)).unflatten(3, (height // h, h)).unflatten(2, (frames // t, t))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`."""
    cut = tokens.unflatten(2, (-1, *patch)).unflatten(1, tuple(grid))  # [B, T, H, W, C, t, h, w]
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def velocity_of(clean: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """Velocity `noise - video` of tokens whose clean patches are predicted, in the dtype of clean.

    Args:
        clean, noisy: `[B, tokens, channels]`.
        timestep: 0 to 1000, as `VideoDiT.forward` takes it.
    """
    wider = wide(clean.dtype)
    t = timestep.reshape(timestep.shape[0], -1).to(wider) / 1000  # [B, M]
    groups = (noisy.to(wider) - clean.to(wider)).unflatten(1, (t.shape[1], -1))
    return (groups / t.clamp_min(LEAST_TIME)[..., None, None]).flatten(1, 2).to(clean.dtype)


def check_inputs(
    config: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None,
    class_labels: Tensor | None,
    encoder_attention_mask: Tensor | None,
    positions: Tensor | None,
    kv_cache: KVCache | None,
    *,
    is_causal: bool,
    checkpointing: bool,
) -> None:
    """Raise ValueError, naming the argument, unless they fit the model and each other; see `VideoDiT.forward`.

    Args:
        config: the configuration of the model.
        is_causal: whether all its layers are causal.
        checkpointing: whether its layers are computed again in the backward pass.
    """
    if hidden_states.dim() != 5 or hidden_states.shape[1] != config.in_channels:
        raise ValueError(
            f"hidden_states has shape {_shape(hidden_states)}; expected [B, in_channels={config.in_channels}, T, H, W]"
        )
    sizes = hidden_states.shape[2:]
    if any(n % p or n == 0 for n, p in zip(sizes, config.patch_size, strict=True)):
        raise ValueError(
            f"hidden_states has [T, H, W] = {list(sizes)}; each must be a multiple of patch_size="
            f"{list(config.patch_size)}"
        )
    batch, grid = hidden_states.shape[0], [n // p for n, p in zip(sizes, config.patch_size, strict=True)]
    tokens = prod(grid)
    if timestep.shape not in ((batch,), (batch, grid[0]), (batch, tokens)):
        raise ValueError(
            f"timestep has shape {_shape(timestep)}; expected [B] = [{batch}], "
            f"[B, frames of patches] = [{batch}, {grid[0]}] or [B, tokens] = [{batch}, {tokens}]"
        )
    if positions is not None and positions.shape not in ((tokens, 3), (batch, tokens, 3)):
        raise ValueError(
            f"positions has shape {_shape(positions)}; expected [tokens, 3] = [{tokens}, 3] or [{batch}, {tokens}, 3]"
        )
    if kv_cache is not None and not is_causal:
        raise ValueError(f"kv_cache needs causal layers; attention={config.attention} has others")
    if kv_cache is not None and kv_cache.append and checkpointing and torch.is_grad_enabled():
        raise ValueError("kv_cache cannot append under gradient checkpointing, which calls every layer twice")
    _check_conditions(config, batch, tokens, encoder_hidden_states, class_labels, encoder_attention_mask)


def _check_conditions(config, batch, tokens, encoder_hidden_states, class_labels, encoder_attention_mask) -> None:
    conditioning = config.conditioning
    if (class_labels is not None) != (conditioning == "class"):
        raise ValueError(f"class_labels must be given when conditioning='class', and only then; it is {conditioning!r}")
    if class_labels is not None and (class_labels.shape != (batch,) or class_labels.is_floating_point()):
        raise ValueError(
            f"class_labels ({class_labels.dtype}, shape {_shape(class_labels)}) must be integers of shape [{batch}]"
        )
    if (encoder_hidden_states is not None) != (conditioning in ("cross", "joint")):
        raise ValueError(
            f"encoder_hidden_states must be given when conditioning='cross' or 'joint', and only then; "
            f"it is {conditioning!r}"
        )
    if encoder_hidden_states is not None:
        shape = encoder_hidden_states.shape
        if len(shape) != 3 or shape[0] != batch or shape[2] != config.text_dim:
            raise ValueError(
                f"encoder_hidden_states has shape {_shape(encoder_hidden_states)}; "
                f"expected [{batch}, L, {config.text_dim}]"
            )
    if encoder_attention_mask is not None and (
        encoder_hidden_states is None
        or encoder_attention_mask.shape not in _mask_shapes(encoder_hidden_states, tokens, conditioning)
        or encoder_attention_mask.dtype.is_floating_point
        or encoder_attention_mask.dtype.is_complex
    ):
        raise ValueError(
            f"encoder_attention_mask ({encoder_attention_mask.dtype}, shape {_shape(encoder_attention_mask)}) must be "
            "bool, or integers of 0 and 1, of the shape [B, L] of encoder_hidden_states, or with conditioning='cross' "
            f"of [B, tokens={tokens}, L]"
        )


def _mask_shapes(text: Tensor, tokens: int, conditioning: str) -> list[tuple[int, ...]]:
    batch, words = text.shape[:2]
    return [(batch, words), (batch, tokens, words)] if conditioning == "cross" else [(batch, words)]


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def check_numbers(positive: dict[str, float | None], eps: float) -> None:
    """Raise ValueError, naming the argument, unless those that are given are more than 0; eps may be 0."""
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be more than 0")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")


def check_axes(rope_axes: Sequence[int] | None, head_dim: int) -> tuple[int, ...]:
    """Channels of a head that turn with t, h and w; a 0 has to be asked for.

    Raises:
        ValueError: they do not make up a head.
    """
    axes = default_axes(head_dim) if rope_axes is None else tuple(rope_axes)
    if rope_axes is None and (head_dim % 2 or min(axes) == 0):
        raise ValueError(
            f"attention_head_dim={head_dim} must be even and at least 8, for each of t, h and w to turn some channels; "
            "rope_axes may say otherwise"
        )
    if len(axes) != 3 or sum(axes) != head_dim or any(n % 2 or n < 0 for n in axes):
        raise ValueError(
            f"rope_axes={rope_axes} must be three even numbers from 0 up, together attention_head_dim={head_dim}"
        )
    return axes


def check_config(patch_size, mlp, conditioning, num_classes, text_dim, attention, modulation, prediction) -> None:
    """Raise ValueError, naming the argument, unless the choices of a model exist and agree; see `VideoDiT`."""
    for name, value, accepted in (
        ("mlp", mlp, tuple(MLPS)),
        ("conditioning", conditioning, CONDITIONINGS),
        ("modulation", modulation, tuple(MODULATIONS)),
        ("prediction", prediction, PREDICTIONS),
    ):
        if value not in accepted:
            raise ValueError(f"{name}={value!r} must be one of {accepted}")
    if len(patch_size) != 3 or any(p < 1 for p in patch_size):
        raise ValueError(f"patch_size={patch_size} must be three positive integers, for t, h and w")
    if isinstance(attention, str) or not attention:
        raise ValueError(f"attention={attention!r} must be a list of at least one layer")
    if (num_classes is not None) != (conditioning == "class"):
        raise ValueError(
            f"num_classes={num_classes} must be given with conditioning='class' only, not {conditioning!r}"
        )
    if (text_dim is not None) != (conditioning in ("cross", "joint")):
        raise ValueError(
            f"text_dim={text_dim} must be given with conditioning='cross' or 'joint' only, not {conditioning!r}"
        )
