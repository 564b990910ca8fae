"""Attention Regulation: logits of target words edited by a few Gaussians so that each gets its share."""

import torch
from torch import Tensor

from ..registry import recipe


@recipe(
    "Attention Regulation",
    "YaNgZhAnG-V5/attention_regulation@b66d9db",
    "exact",
    hosts="Stable Diffusion 1.4 to 2.1, up_blocks.1 and down_blocks.2",
    needs="target words",
    cost="20 gradient steps on cross-attention maps of 16 x 16",
)
def attention_regulation(
    maps: Tensor, weights: Tensor, *, threshold: float, gamma: float = 1.0, delta: float = 80.0, epsilon: float = 0.09
) -> Tensor:
    """`γ mean (q90(A_k) - .9)² + δ mean (mean A_k - threshold / n)² + ε mean w²`.

    Args:
        maps: of the n target words, `[B heads, height, width, n]`.
        weights: w of the Gaussians.
        threshold: `min(1, 0.2 n)` by the authors.
        gamma, delta, epsilon: of the terms.
    """
    flat = maps.flatten(1, 2)
    high = torch.quantile(flat, 0.9, dim=1)
    peak = (high - 0.9).square().mean()
    share = (flat.mean(1) - threshold / maps.shape[-1]).square().mean()
    return gamma * peak + delta * share + epsilon * weights.square().mean()


def gaussians(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Gaussians of width W // 16 (1 at least) on a grid of centers two widths apart, `[centers, height, width]`."""
    height, width = size
    sigma = max(width // 16, 1)
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    centers = torch.cartesian_prod(y[:: 2 * sigma], x[:: 2 * sigma])
    square = (y[None, :, None] - centers[:, 0, None, None]) ** 2 + (x[None, None] - centers[:, 1, None, None]) ** 2
    return torch.exp(-square / (2 * sigma**2))


def regulate(
    logits: Tensor,
    words: tuple[int, ...],
    size: tuple[int, int],
    *,
    iterations: int = 20,
    rate: float = 100.0,
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """Addition to the logits of some words, optimized, and the losses on the way.

    Args:
        logits: of cross-attention, `[B heads, tokens of the grid, text tokens]`.
        words: target tokens.
        size: rows and columns of the grid.
        iterations, rate: of the gradient steps `w <- w - B heads rate ∇L`.
        seed: of the random start; the authors do not seed.

    Returns:
        the addition `[B heads, tokens, words]` of the least loss, and all losses.
    """
    shapes = gaussians(size, logits.device).to(logits)
    generator = torch.Generator(logits.device).manual_seed(seed)
    shape = (len(logits), len(shapes), 1, 1, len(words))
    w = torch.rand(shape, generator=generator, device=logits.device, dtype=logits.dtype)
    threshold = min(1.0, 0.2 * len(words))
    best, losses = None, []
    with torch.enable_grad():
        for _ in range(iterations):
            w = w.detach().requires_grad_()
            added = (w * shapes[None, ..., None]).sum(1).flatten(1, 2)  # [B heads, tokens, words]
            edited = logits.detach().clone()
            edited[..., list(words)] += added
            maps = edited.softmax(-1)[..., list(words)].unflatten(1, size)
            loss = attention_regulation(maps, w, threshold=threshold)
            if not losses or float(loss) < min(losses):
                best = added.detach()
            losses.append(float(loss))
            (gradient,) = torch.autograd.grad(loss, w)
            w = w - len(logits) * rate * gradient
    assert best is not None
    return best, losses
