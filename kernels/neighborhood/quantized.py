"""Queries and keys as e4m3 numbers, whose products matrix units make at twice the rate of half precision.

The mean of a head's keys is subtracted from all of them: it adds the same to every logit of a query, which a softmax
does not see, and what is left spans less ("smoothing", SageAttention, arXiv:2410.02367, section 4.2). Query and key are
then divided by one number for each batch entry and head. It is a power of two, so that numbers rounded to e4m3 are
exact in every dtype once multiplied by it: implementations without products of e4m3 attend to the very same ones.

Only torch is imported here, and nothing waits for the device. The operator on e4m3 numbers is defined here, too.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.calling import wants_gradient
from .call import NeighborhoodCall, neighborhood

DTYPE = torch.float8_e4m3fn
LARGEST, SMALLEST = 448.0, 2.0**-9  # numbers that e4m3 has
LEAST_SCALE = 2.0**-60  # the product of two stays a normal float32
MIN_HEAD_DIM = 17  # matrix instructions of e4m3 add over 32 features


class Rounded(NamedTuple):
    """Queries and keys as e4m3 numbers, in float8_e4m3fn or float32.

    Attributes:
        query: query over `query_scale`.
        key, additional_keys: key minus `mean` over `key_scale`.
        query_scale: float32 `[B, heads]`, powers of two.
        key_scale: float32 `[B, key_heads]`, powers of two.
        mean: float32 `[B, key_heads, head_dim]`, of all keys.
    """

    query: Tensor
    key: Tensor
    additional_keys: Tensor | None
    query_scale: Tensor
    key_scale: Tensor
    mean: Tensor


def check(qk_dtype: torch.dtype, *tensors: Tensor | None) -> None:
    """Refuse other dtypes, and tensors that a gradient is asked of."""
    if qk_dtype != DTYPE:
        raise ValueError(f"qk_dtype={qk_dtype!r} must be None or {DTYPE}")
    if wants_gradient(*tensors):
        raise NotImplementedError(
            f"qk_dtype={qk_dtype} has no gradients and got a tensor that requires one: call it under torch.no_grad()"
        )


def _of_heads(x: Tensor, like: Tensor) -> Tensor:
    """`[B, heads, …]` as it broadcasts against `like` `[B, …, heads, head_dim]`."""
    return x.view(x.shape[0], *(1,) * (like.dim() - 3), x.shape[1], x.shape[2] if x.dim() == 3 else 1)


def _power_of_two(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The least power of two that divides `largest` down to what e4m3 has; one where that is NaN or infinite.

    It is no less than what keeps every multiple of e4m3's smallest number exact in `dtype`.
    """
    info = torch.finfo(dtype)
    least = max(LEAST_SCALE, info.smallest_normal * info.eps / SMALLEST)
    largest = largest.float()
    ratio = torch.where(largest.isfinite(), largest / LARGEST, 1.0).clamp(min=least)
    return ((ratio.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # the exponent, rounded up


def _round(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers, in float32: the cast, for compilers to whose devices e4m3 is unknown."""
    x = x.float().clamp(-LARGEST, LARGEST)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, at most |x|
    step = power.clamp(min=8 * SMALLEST) / 8
    return (x / step).round() * step


def quantize(
    query: Tensor,
    key: Tensor,
    additional_keys: Tensor | None,
    additional_mask: Tensor | None = None,
    *,
    cast: bool = True,
) -> Rounded:
    """Round query and key to e4m3, in float32 where their own dtype would round, too; `cast` makes it float8_e4m3fn.

    Of a channel that holds NaN or infinities no mean is subtracted, and no scale taken of a head: other tokens keep
    their meaning. There numbers beyond 448 become 448, as infinities do. Extra keys that are masked count nowhere.
    """
    tokens = tuple(range(1, query.dim() - 2))
    total, count = key.sum(tokens, dtype=torch.float32), prod(key.shape[1:-2])  # [B, key_heads, head_dim]
    highest, lowest = key.amax(tokens), key.amin(tokens)
    if additional_keys is not None and additional_keys.shape[1]:
        highs = lows = additional_keys
        if additional_mask is None:
            count += additional_keys.shape[1]
        else:
            hidden = ~additional_mask[..., None, None]
            additional_keys = additional_keys.masked_fill(hidden, 0.0)
            highs, lows = (additional_keys.masked_fill(hidden, limit) for limit in (-torch.inf, torch.inf))
            count = count + additional_mask.sum(1)[:, None, None]
        total = total + additional_keys.sum(1, dtype=torch.float32)
        highest, lowest = torch.maximum(highest, highs.amax(1)), torch.minimum(lowest, lows.amin(1))
    mean = torch.where(total.isfinite(), total / count, 0.0)
    highest, lowest = highest - mean, lowest - mean
    key_scale = _power_of_two(torch.maximum(highest, -lowest).amax(-1), query.dtype)
    query_scale = _power_of_two(torch.linalg.vector_norm(query, torch.inf, dim=(*tokens, -1)), query.dtype)

    def nearest(x: Tensor) -> Tensor:
        return x.clamp(-LARGEST, LARGEST).to(DTYPE) if cast else _round(x)

    def divided(x: Tensor) -> Tensor:  # one operation in float32: dividing by a power of two is exact
        shift, factor = -mean / key_scale[..., None], (1 / key_scale)[..., None].expand_as(mean)
        return torch.addcmul(_of_heads(shift, x), x, _of_heads(factor, x))

    return Rounded(
        nearest(query * _of_heads(1 / query_scale, query).to(query.dtype)),
        nearest(divided(key)),
        None if additional_keys is None else nearest(divided(additional_keys)),
        query_scale,
        key_scale,
        mean,
    )


def restore(rounded: Rounded, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rounded query, key without its mean, and extra key, in `dtype`: exact, up to its largest number."""
    accumulate, largest = torch.promote_types(dtype, torch.float32), torch.finfo(dtype).max

    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        return (x.to(accumulate) * _of_heads(scale, x)).clamp(-largest, largest).to(dtype)

    extra = None if rounded.additional_keys is None else scaled(rounded.additional_keys, rounded.key_scale)
    return scaled(rounded.query, rounded.query_scale), scaled(rounded.key, rounded.key_scale), extra


def mean_logits(query: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Logit of the mean key per query, added to its logits and its log-sum-exp: `[B, *spatial, heads]`."""
    mean = mean.repeat_interleave(query.shape[-2] // mean.shape[1], dim=1)
    return (query * _of_heads(mean, query)).sum(-1) * scale  # float32 at least, as mean is


def obstacle(query: Tensor) -> str | None:
    """Why the Triton kernel does not multiply e4m3 numbers as they are, or None where it does.

    A device that is not there counts as one that can.
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"values of {query.dtype} are not half precision"
    if query.shape[-1] < MIN_HEAD_DIM:
        return f"head_dim {query.shape[-1]} is under {MIN_HEAD_DIM}"
    if query.device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "ROCm devices are not asked for e4m3"
    device = torch.cuda.get_device_properties(query.device)
    if (device.major, device.minor) < (8, 9):
        return f"{device.name} has no matrix instructions of e4m3"
    return None


def attend(rounded: Rounded, value: Tensor, call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the Triton kernel, of keys without their mean; the extra key of the call is
    that of `rounded`, its scale > 0."""
    group = rounded.query.shape[-2] // rounded.key.shape[-2]
    factor = (rounded.query_scale * rounded.key_scale.repeat_interleave(group, dim=1)).contiguous()  # [B, heads]
    arguments = neighborhood.codec.flatten(call)
    return torch.ops.foveal.neighborhood_fp8_forward(rounded.query, rounded.key, value, factor, *arguments)


torch.library.define(
    "foveal::neighborhood_fp8_forward",
    f"(Tensor query, Tensor key, Tensor value, Tensor factor, {neighborhood.arguments}) -> (Tensor, Tensor)",
)


@torch.library.impl("foveal::neighborhood_fp8_forward", "default")
def _forward(query, key, value, factor, *arguments):
    from . import launch

    return launch.forward(query, key, value, neighborhood.codec.build(arguments), factor)


@torch.library.register_fake("foveal::neighborhood_fp8_forward")
def _fake(query, key, value, *_):
    rows = query.shape[:-1]
    return value.new_empty(*rows, value.shape[-1]), value.new_empty(rows, dtype=torch.float32)


@register_flop_formula(torch.ops.foveal.neighborhood_fp8_forward, get_raw=True)
def _count(query, key, value, factor, *arguments, out_val=None, **_) -> int:
    return neighborhood.flops(query, key, value, neighborhood.codec.build(arguments))[0]
