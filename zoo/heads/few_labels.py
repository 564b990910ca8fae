"""Classify features from a few labels a class: a measure of trunks where all labels would tell nothing apart."""

from __future__ import annotations

import torch
from torch import Tensor


def few_label_accuracy(
    features: Tensor, labels: Tensor, *, shots: int = 5, draws: int = 20, penalty: float = 1.0, seed: int = 0
) -> Tensor:
    """Accuracy of a linear classifier that knows a few labels of each class, for several choices of those.

    In each draw `shots` items of every class teach a ridge regression on standardised features, whose targets are the
    classes one-hot, and all other items are classified. With every label linear probes of small data saturate: a random
    trunk probes as well as a trained one. Trunks are compared by the same draws.

    Args:
        features: `[N, dim]`.
        labels: `[N]`; each class that occurs has more than `shots` items.
        shots: labels of a class.
        draws: choices, which follow from the seed and the labels alone.
        penalty: of the ridge regression, times the variance of a standardised feature and `dim`.
        seed: of the draws.

    Returns:
        accuracies `[draws]`, 0 to 1.

    Raises:
        ValueError: a class with too few items, or fewer than two classes.
    """
    classes, labels = labels.unique(return_inverse=True)
    counts = labels.bincount()
    if len(classes) < 2 or int(counts.min()) <= shots:
        raise ValueError(
            f"shots={shots} needs two classes or more with over {shots} items each; there are {counts.tolist()}"
        )
    features, labels = features.double().cpu(), labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        ranks = torch.nn.functional.one_hot(labels[order]).cumsum(0).gather(1, labels[order][:, None])[:, 0]
        known, others = order[ranks <= shots], order[ranks > shots]
        mean, std = features[known].mean(0), features[known].std(0).clamp(min=1e-6)
        x, z = ((features[which] - mean) / std for which in (known, others))
        targets = torch.nn.functional.one_hot(labels[known]).double()
        centered = targets - targets.mean(0)
        kernel = x @ x.T + penalty * x.shape[1] * torch.eye(len(x), dtype=torch.float64)  # as many labels as rows
        guesses = (z @ x.T @ torch.linalg.solve(kernel, centered)).argmax(1)
        found.append((guesses == labels[others]).double().mean())
    return torch.stack(found)
