"""Public block-sparse attention."""

from dataclasses import replace
from typing import Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl, Mask, without_autocast
from ..neighborhood.quantized import mean_logits
from . import eight_bit
from .call import RoundedCall, block_sparse, make_call
from .mask import BlockMask
from .rounded import emulate


class Options(TypedDict, total=False):
    """Keyword arguments of `block_sparse_attention` but for `return_lse`, for type checkers."""

    mask: Required[BlockMask]
    scale: float | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    additional_mask: Mask | None
    skip_threshold: float | None
    qk_dtype: torch.dtype | None
    impl: Impl


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@block_sparse.public(make_call)
@operator
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_mask: Mask | None = None,
    skip_threshold: float | None = None,
    qk_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every block of queries attends to its own list of blocks of keys, on 1-D, 2-D and 3-D grids.

    Cost and memory follow the lists, not the square of the tokens. Tokens stay where they are in memory: blocks are
    addressed inside the grid. Differentiable in query, key, value and the extras, once.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, float16, bfloat16, float32 or float64, any
            strides.
        key: `[B, *key_spatial, key_heads, head_dim]`, as many axes as query, of any lengths; heads is a multiple of
            key_heads (grouped-query attention).
        value: `[B, *key_spatial, key_heads, value_dim]`.
        mask: the blocks and their lists; see `BlockMask`. A query whose list is empty, and that has no extra keys, gets
            output 0 and log-sum-exp -inf.
        scale: factor on query . key; head_dim ** -0.5 when None.
        additional_keys, additional_values: `[B, tokens, key_heads, head_dim]` and `[…, value_dim]`, visible to every
            query (text tokens, registers), without bias.
        additional_mask: visible additional tokens, bool `[B, tokens]`, or their number at the start of each batch
            entry, integer `[B]`; all when None. A masked token may hold anything, NaN included, and has a gradient of
            zero.
        skip_threshold: in [0, 1]; leaves out listed blocks whose weights would be small (skip softmax, BLASST,
            arXiv:2512.12087). Lists are walked in order with the largest logit so far of every query; a block of keys
            is skipped where for all queries of the block its largest logit is below the largest so far plus
            log(skip_threshold). A softmax then lacks at most `skip_threshold` times its largest weight per skipped
            token. Gradients are those of what is left. None or 0 skips nothing, and `calibrate_skip` finds a value.
        qk_dtype: dtype to which queries and keys are rounded: torch.int8, with a scale for each block and head and keys
            less their mean (SageAttention, arXiv:2410.02367); torch.float8_e4m3fn, likewise with a scale for each head;
            torch.uint1, signs times the mean magnitude of a head (BinaryAttention, arXiv:2603.09582). Values and
            weights are not rounded. Gradients pass straight through the rounding, those of signs where the number is in
            [-1, 1]. Without gradients the Triton kernels multiply int8 and e4m3 as they are, in half precision from
            head dim 17 on (e4m3: NVIDIA from compute capability 8.9 on); all else is restored to the dtype of query:
            the result, not the speed, of few bits. A block of int8 that holds NaN or an infinity is NaN.
        impl: "auto" takes the fused kernels on CUDA and ROCm and the tiled PyTorch path elsewhere; "triton", "gluon",
            "torch" or "reference" insist on one. "gluon" is a forward for Hopper in half precision, head dims 64 and
            128, whose values no GPU has checked yet. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        output `[B, *spatial, heads, value_dim]` in the dtype of query; with `return_lse` a tuple of it and the
        log-sum-exp `[B, *spatial, heads]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    call = make_call(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        additional_mask=additional_mask,
        skip_threshold=skip_threshold,
        qk_dtype=qk_dtype,
    )
    mean = None
    original = query
    if isinstance(call, RoundedCall):
        with without_autocast(query.device):
            if eight_bit.multiplies(query, key, value, call, impl):
                out, lse, mean = eight_bit.attend(query, key, value, call)
                return (out, _with_mean(lse, query, mean, call.scale)) if return_lse else out
            query, key, additional_keys, mean = emulate(query, key, call)
        call = replace(call, additional_keys=additional_keys)
    out, lse, *_ = block_sparse(query, key, value, call, impl=impl)
    if not return_lse:
        return out
    return out, lse if mean is None else _with_mean(lse, original, mean, call.scale)


def _with_mean(lse: Tensor, query: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Log-sum-exp with what the mean of the keys adds; of queries that see nothing, which may hold anything, -inf."""
    return lse + mean_logits(query, mean, scale).masked_fill(lse == float("-inf"), 0)
