"""Dependence of latents on a word: gradients with respect to its observed map."""

from __future__ import annotations

import torch
from torch import Tensor


def importance(output: Tensor, columns: Tensor, *, probes: int = 0, seed: int = 0) -> Tensor:
    """`|d output / d map| * map` of a word, without the Jacobian.

    Args:
        output: what depends on the map, such as a clean estimate of latents.
        columns: the word's map, in the graph of output: `[B, queries, heads]` or any shape.
        probes: 0 takes the gradient of `sum |output|`, which may cancel; more are Hutchinson probes of random signs,
            whose mean of squares is that of the Jacobian's columns.
        seed: of the signs.

    Returns:
        the shape of columns, not negative.
    """
    if probes == 0:
        (gradient,) = torch.autograd.grad(output.abs().sum(), columns, retain_graph=True)
        return gradient.abs() * columns.detach().abs()
    generator = torch.Generator(output.device).manual_seed(seed)
    total = torch.zeros_like(columns)
    for _ in range(probes):
        signs = torch.randint(0, 2, output.shape, generator=generator, device=output.device).to(output) * 2 - 1
        (gradient,) = torch.autograd.grad((output * signs).sum(), columns, retain_graph=True)
        total = total + gradient.square()
    return (total / probes).sqrt() * columns.detach().abs()
