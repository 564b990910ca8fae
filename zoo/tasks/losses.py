"""Losses of classifiers: cross-entropy, binary cross-entropy and focal loss, with weights of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loader import PADDING
from ..data.names import unknown_name

LOSSES = ("ce", "bce", "focal")


def check_loss(name: str, gamma: float, class_weights: Any, num_classes: int) -> None:
    """Refuses options that `ClassLoss` does not take.

    Raises:
        ValueError: names the key.
    """
    if name not in LOSSES:
        raise unknown_name("task.loss", name, LOSSES)
    if not gamma >= 0:
        raise ValueError(f"task.focal_gamma={gamma} must be 0 or more")
    if class_weights is None or class_weights == "balanced":
        return
    values = list(class_weights) if isinstance(class_weights, Sequence) and not isinstance(class_weights, str) else []
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != num_classes or len(values) != num_classes or min(numbers) < 0 or not sum(numbers) > 0:
        raise ValueError(
            f"task.class_weights={class_weights!r} must be balanced, or {num_classes} numbers from 0 on, one a class"
        )


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Weights of classes in inverse proportion to their images, `N / (classes * count)`: their mean over images is 1.

    A class without images has weight 0.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


class ClassLoss(nn.Module):
    """Mean loss of a batch of logits.

    Args:
        name: "ce", cross-entropy of the softmax; "bce", the mean over images and classes of the binary cross-entropy of
            each class against all others (arXiv:2110.00476, §2); "focal", cross-entropy times
            `(1 - p) ** gamma` of the true class's probability (arXiv:1708.02002, eq. 4).
        num_classes: of the logits.
        gamma: of the focal loss.
        weights: one for each class, by which its images count ("ce" and "focal": a weighted mean, as in PyTorch) or its
            column ("bce"); None: all count the same.
        smoothing: of the targets, 0 to 1: every class gets `smoothing / num_classes`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        gamma: float = 2.0,
        weights: Sequence[float] | None = None,
        smoothing: float = 0.0,
    ):
        super().__init__()
        self.name, self.num_classes, self.gamma, self.smoothing = name, num_classes, gamma, smoothing
        # no buffer: averages of the weights go over those, and balanced ones come when the data are there
        self.weights: Tensor | None = None if weights is None else torch.tensor(weights)

    def forward(self, logits: Tensor, targets: Tensor, *, plain: bool = False) -> Tensor:
        """The loss.

        Args:
            logits: `[B, num_classes]`.
            targets: class numbers `[B]`, of which `PADDING` do not count, or shares of classes `[B, num_classes]`,
                which are taken as they are.
            plain: without smoothing and weights, to compare models by.
        """
        smoothing = 0.0 if plain else self.smoothing
        weights = None if plain or self.weights is None else self.weights.to(logits)
        hard = targets.dim() == 1
        if self.name == "ce":
            options = {"label_smoothing": smoothing, "ignore_index": PADDING} if hard else {}
            return F.cross_entropy(logits, targets, weight=weights, **options)
        if hard:
            logits, targets = logits[targets != PADDING], targets[targets != PADDING]
            targets = F.one_hot(targets, self.num_classes).to(logits.dtype)
            targets = (1 - smoothing) * targets + smoothing / self.num_classes
        if self.name == "bce":
            return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
        log_p = logits.log_softmax(-1)
        share = targets if weights is None else targets * weights
        losses = -(share * (1 - log_p.exp()) ** self.gamma * log_p).sum(-1)
        return losses.sum() / share.sum() if weights is not None else losses.mean()


class LabelLoss(nn.Module):
    """Mean over images and labels of the binary cross-entropy, times `|target - p| ** gamma` (arXiv:1708.02002, eq. 4).

    Args:
        gamma: 0 is the plain cross-entropy.
        weights: of each label, by which the images that have it count; None: 1.
    """

    def __init__(self, *, gamma: float = 0.0, weights: Sequence[float] | None = None):
        super().__init__()
        self.name, self.gamma = "focal" if gamma else "bce", gamma
        self.weights: Tensor | None = None if weights is None else torch.tensor(weights)  # as in `ClassLoss`

    def forward(self, logits: Tensor, targets: Tensor, *, plain: bool = False) -> Tensor:
        """The loss.

        Args:
            logits: `[B, labels]`.
            targets: 0 or 1, `[B, labels]`; rows with NaN do not count.
            plain: without weights, to compare models by.
        """
        real = ~targets.isnan().any(dim=1)
        logits, targets = logits[real], targets[real].to(logits.dtype)
        weights = None if plain or self.weights is None else self.weights.to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        return (losses * (targets - logits.sigmoid()).abs().pow(self.gamma) if self.gamma else losses).mean()


MASK_LOSSES = ("ce", "dice", "ce_dice")


def check_mask_loss(name: str, class_weights: Any, num_classes: int) -> None:
    """Refuses options that `MaskLoss` does not take.

    Raises:
        ValueError: names the key.
    """
    if name not in MASK_LOSSES:
        raise unknown_name("task.loss", name, MASK_LOSSES)
    if class_weights == "balanced":
        raise ValueError("task.class_weights='balanced' is of images with one class; give a number for each class")
    check_loss("ce", 0.0, class_weights, num_classes)


class MaskLoss(nn.Module):
    """Mean loss of the pixels of a batch.

    Args:
        name: "ce", cross-entropy of the softmax; "dice", one minus the mean over the classes of the batch of
            `2 sum(p y) / sum(p + y)` (V-Net, arXiv:1606.04797, §3, without squares); "ce_dice", their sum.
        weights: of the cross-entropy, one for each class; None: all 1.
        smoothing: of the targets of the cross-entropy, 0 to 1.
    """

    def __init__(self, name: str, *, weights: Sequence[float] | None = None, smoothing: float = 0.0):
        super().__init__()
        self.name, self.smoothing = name, smoothing
        self.weights: Tensor | None = None if weights is None else torch.tensor(weights)  # as in `ClassLoss`

    def forward(self, logits: Tensor, masks: Tensor, *, plain: bool = False) -> Tensor:
        """The loss, 0 where no pixel counts.

        Args:
            logits: `[B, classes, H, W]`.
            masks: class numbers `[B, H, W]`; `PADDING` does not count.
            plain: without smoothing and weights, to compare models by.
        """
        if not (masks != PADDING).any():
            return 0.0 * logits.sum()
        total = logits.new_zeros(())
        if self.name != "dice":
            weights = None if plain or self.weights is None else self.weights.to(logits)
            smoothing = 0.0 if plain else self.smoothing
            total = F.cross_entropy(logits, masks, weight=weights, ignore_index=PADDING, label_smoothing=smoothing)
        return total if self.name == "ce" else total + dice_loss(logits, masks)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """See `MaskLoss`; classes that no pixel of the batch has are left out."""
    real = (masks != PADDING)[:, None]
    classes = F.one_hot(masks.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2) * real
    shares = logits.softmax(dim=1) * real
    axes = (0, 2, 3)
    both, either = (shares * classes).sum(axes), (shares + classes).sum(axes)
    present = classes.sum(axes) > 0
    return 1 - (2 * both[present] / either[present]).mean()
