"""Convolutions as long as the sequence, by the fast Fourier transform."""

import torch
from torch import Tensor

from ..common.arguments import operator


@operator
def long_convolution(x: Tensor, filter: Tensor, *, center: int = 0, skip: Tensor | None = None) -> Tensor:
    """Convolve every channel of a sequence with a filter of any length: O(N log N), in float32 or float64.

        out_t = sum_s filter_s * x_(t - s + center) + skip * x_t

    Tokens outside of the sequence are zero. With `center=0` a token sees itself and those before it (S4, Hyena,
    arXiv:2302.10866; Mega's moving average, arXiv:2209.10655); with another those behind it, too. Differentiable any
    number of times.

    Args:
        x: `[B, tokens, channels]`, float16, bfloat16, float32 or float64.
        filter: `[length, channels]`.
        center: place of the filter that falls on the token itself, 0 <= center < length.
        skip: `[channels]`, a factor on the token itself, added; None for none.

    Returns:
        `[B, tokens, channels]` in the dtype of x.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    if x.dim() != 3 or any(n < 1 for n in x.shape[1:]):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, tokens, channels], neither of them empty")
    if filter.dim() != 2 or filter.shape[1] != x.shape[2] or filter.shape[0] < 1:
        raise ValueError(f"filter.shape={tuple(filter.shape)} must be [length, channels={x.shape[2]}]")
    if not 0 <= center < filter.shape[0]:
        raise ValueError(f"center={center} must be a place of the filter, of length {filter.shape[0]}")
    if skip is not None and skip.shape != x.shape[2:]:
        raise ValueError(f"skip.shape={tuple(skip.shape)} must be [channels] = {tuple(x.shape[2:])}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, filter.dtype), torch.float32)
    tokens, length = x.shape[1], filter.shape[0]
    wide = x.to(dtype)
    padded = tokens + length - 1  # without wrapping round
    spectrum = torch.fft.rfft(wide, n=padded, dim=1) * torch.fft.rfft(filter.to(dtype), n=padded, dim=0)
    out = torch.fft.irfft(spectrum, n=padded, dim=1)[:, center : center + tokens]
    if skip is not None:
        out = out + skip.to(dtype) * wide
    return out.to(x.dtype)
