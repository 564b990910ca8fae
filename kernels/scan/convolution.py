"""Convolutions as long as the sequence, by the fast Fourier transform."""

import torch
from torch import Tensor

from ..common.arguments import operator


@operator
def long_convolution(sequence: Tensor, filter: Tensor, *, center: int = 0, skip: float | Tensor = 0.0) -> Tensor:
    """Convolve every channel of a sequence with a filter of any length: O(N log N), in float32 or float64.

        out_t = sum_s filter_s * sequence_(t - s + center) + skip * sequence_t

    Tokens outside of the sequence are zero. With `center=0` a token sees itself and those before it (S4, Hyena,
    arXiv:2302.10866; Mega's moving average, arXiv:2209.10655); with another those behind it, too. Differentiable any
    number of times.

    Args:
        sequence: `[B, tokens, channels]`, float16, bfloat16, float32 or float64.
        filter: `[length, channels]`.
        center: place of the filter that falls on the token itself, 0 <= center < length.
        skip: factor on the token itself, added: a number or `[channels]`.

    Returns:
        `[B, tokens, channels]` in the dtype of sequence.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    if sequence.dim() != 3 or any(n < 1 for n in sequence.shape[1:]):
        raise ValueError(
            f"sequence has shape {tuple(sequence.shape)}; expected [B, tokens, channels], none of them empty"
        )
    tokens, channels = sequence.shape[1:]
    if filter.dim() != 2 or filter.shape[1] != channels or filter.shape[0] < 1:
        raise ValueError(f"filter.shape={tuple(filter.shape)} must be [length, channels={channels}]")
    if not 0 <= center < filter.shape[0]:
        raise ValueError(f"center={center} must be a place of the filter, of length {filter.shape[0]}")
    if isinstance(skip, Tensor) and skip.shape != (channels,):
        raise ValueError(f"skip.shape={tuple(skip.shape)} must be [channels] = {(channels,)}")
    dtype = torch.promote_types(torch.promote_types(sequence.dtype, filter.dtype), torch.float32)
    wide = sequence.to(dtype)
    padded = tokens + filter.shape[0] - 1  # without wrapping round
    spectrum = torch.fft.rfft(wide, n=padded, dim=1) * torch.fft.rfft(filter.to(dtype), n=padded, dim=0)
    out = torch.fft.irfft(spectrum, n=padded, dim=1)[:, center : center + tokens]
    out = out + (skip.to(dtype) if isinstance(skip, Tensor) else skip) * wide
    return out.to(sequence.dtype)
