"""Pre-training without labels: pixels of masked patches, or places of patches whose position was dropped.

Orders of patches follow from the seeds that `Task` sets at each step; in evaluation from the number of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from ..data.loader import PADDING
from ..pretraining import (
    DroppedPositions,
    MaskedAutoencoder,
    color_noise,
    color_order,
    follow,
    hard_order,
    random_order,
    relative_loss,
    visible_count,
)
from .epochs import EpochTask

OBJECTIVES = {"pixels": MaskedAutoencoder, "positions": DroppedPositions}
MASKINGS = ("random", "green", "red", "blue", "purple", "hard")


class Pretrainer(nn.Module):
    """A student, and a teacher that follows it; the teacher has no gradients and is part of checkpoints."""

    def __init__(self, student: nn.Module, *, with_teacher: bool):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False) if with_teacher else None


class PretrainingTask(EpochTask):
    """Trains a vision transformer on `(images [B, C, H, W], targets [B])`; of the targets only `PADDING` matters.

    The keys of the trained `student` that timm's `VisionTransformer` has are timm's; `trunk_state_dict` gives those.

    Args:
        vit: arguments of `MaskedAutoencoder` or `DroppedPositions`: `patch_size`, `embed_dim`, `depth`, ….
        objective: "pixels" or "positions".
        masking: "random", a color of ColorMAE's patterns ("green", "red", "blue", "purple"), or "hard" (the patches of
            which a teacher expects most), which needs loss_prediction.
        ratio: share of masked patches.
        loss_prediction: pixels only: predict the loss of each patch, too.
        teacher_decay: share of the teacher that stays in a step, for "hard".
        position: positions only: `drop_ratio`, `sigma` (of the first epoch, falling to 0 linearly) and `guided`.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.
        img_size, in_chans: of the data.
        data: further facts of the data, which do not matter here.

    Raises:
        ValueError: an unknown objective or masking, or options that do not fit together.
    """

    def __init__(
        self,
        *,
        vit: Mapping[str, Any],
        objective: str = "pixels",
        masking: str = "random",
        ratio: float = 0.75,
        loss_prediction: bool = False,
        teacher_decay: float = 0.999,
        position: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        lr_batch: int | None = None,
        img_size: int,
        in_chans: int = 3,
        compile: Mapping[str, Any] | None = None,
        seed: int = 0,
        **data: Any,
    ):
        if objective not in OBJECTIVES:
            raise ValueError(f"task.objective={objective!r} must be one of {sorted(OBJECTIVES)}")
        if masking not in MASKINGS:
            raise ValueError(f"task.masking={masking!r} must be one of {MASKINGS}")
        if (loss_prediction and objective != "pixels") or (masking == "hard" and not loss_prediction):
            raise ValueError(
                f"task.masking={masking!r}, task.loss_prediction={loss_prediction}, task.objective={objective!r}: "
                "losses are predicted of pixels, and hard patches by predicted losses"
            )
        names = ["loss"] + ["rank"] * loss_prediction + ["accuracy"] * (objective == "positions")
        metrics: dict[str, Metric] = {f"{split}_{name}": MeanMetric() for split in ("val", "test") for name in names}
        super().__init__(
            metrics=metrics, optimizer=optimizer, scheduler=scheduler, lr_batch=lr_batch, compile=compile, seed=seed
        )
        self.save_hyperparameters(ignore=["data", *data])
        self.vit_cfg = dict(vit) | {"img_size": img_size, "in_chans": in_chans}
        self.objective, self.masking, self.ratio = objective, masking, ratio
        self.loss_prediction, self.teacher_decay, self.position = loss_prediction, teacher_decay, dict(position or {})
        self._patterns: Tensor | None = None

    def make_model(self) -> nn.Module:
        options = {"loss_prediction": self.loss_prediction} if self.objective == "pixels" else {}
        return Pretrainer(OBJECTIVES[self.objective](**self.vit_cfg, **options), with_teacher=self.masking == "hard")

    def names_matter(self) -> bool:
        return False

    def trunk_state_dict(self) -> dict[str, Tensor]:
        """Weights of the trunk by the names of timm's `VisionTransformer`, for fine-tuning."""
        parts = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
        return {n: x for n, x in self.model.student.state_dict().items() if n.startswith(parts)}

    @property
    def _progress(self) -> float:
        epochs = self.trainer.max_epochs or 1
        return min(1.0, (self.current_epoch + 1) / epochs) if epochs > 0 else 1.0

    def order(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Orders of the patches of a batch, `[B, N]`."""
        side = self.model.student.side
        if self.masking == "hard" and generator is None:
            scores = self.model.teacher.predict_losses(images)
            return hard_order(scores, self.ratio, self._progress)
        if self.masking in ("random", "hard") or generator is not None:
            return random_order(len(images), side**2, generator=generator).to(images.device)
        if self._patterns is None or len(self._patterns) < len(images):
            fixed = torch.Generator().manual_seed(self.seed)
            count = max(256, len(images))
            self._patterns = color_noise(count, 2 * side, self.masking, generator=fixed)  # pyright: ignore
        return color_order(self._patterns, len(images), (side, side)).to(images.device)

    def losses(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of a batch by name, and what is measured beside it."""
        order = self.order(images, generator)
        student = self.model.student
        if self.objective == "positions":
            visible = visible_count(order.shape[1], self.ratio)
            drop_order = random_order(len(images), visible, generator=generator).to(images.device)
            options = {"drop_ratio": 0.75, "sigma": 1.0, "guided": True} | self.position
            options["sigma"] *= 1 - self._progress
            found = student(images, order, drop_order, ratio=self.ratio, **options)
            return {"loss": found.loss, "accuracy": found.accuracy}
        found = student(images, order, ratio=self.ratio)
        losses = {"loss": found.losses.mean()}
        if self.loss_prediction:
            predicted = found.predicted_losses.gather(1, order[:, order.shape[1] - found.losses.shape[1] :])
            losses |= {
                "prediction": relative_loss(predicted, found.losses),
                "rank": rank_correlation(predicted, found.losses),
            }
        return losses

    def training_loss(self, batch: Any) -> Tensor:
        found = self.losses(batch[0])
        return found["loss"] + found.get("prediction", 0.0)

    def weight(self, batch: Any) -> Any:
        return len(batch[0])

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        images = batch[0][batch[1] != PADDING]
        if len(images) == 0:
            return
        found = self.losses(images, torch.Generator().manual_seed(batch_idx))
        for name, x in found.items():
            if f"{split}_{name}" in self.metrics:
                self.metrics[f"{split}_{name}"].update(x, weight=len(images))  # pyright: ignore

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.model.teacher is not None:
            follow(self.model.teacher, self.model.student, self.teacher_decay)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of rows `[B, K]`, mean over the batch."""
    ranks = [x.detach().argsort(-1).argsort(-1).double() for x in (a, b)]
    centered = [x - x.mean(-1, keepdim=True) for x in ranks]
    return nn.functional.cosine_similarity(*centered, dim=-1).mean()
