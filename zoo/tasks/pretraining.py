"""Pre-training without labels: pixels of masked patches, alone or beside a second view, or places of patches.

Orders of patches follow from the seeds that `Task` sets at each step; in evaluation from the number of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loader import PADDING
from ..data.names import unknown_name
from ..heads.few_labels import few_label_accuracy
from ..pretraining import (
    BroadContext,
    CrossViewCompletion,
    DroppedPositions,
    MaskedAutoencoder,
    color_noise,
    color_order,
    follow,
    hard_order,
    random_order,
    relative_loss,
    second_view,
    visible_count,
)
from ._base import mean_metrics
from .epochs import EpochTask

OBJECTIVES = {"pixels": MaskedAutoencoder, "positions": DroppedPositions, "cross_view": CrossViewCompletion}
CONTEXT = {"weight": 0.25, "hidden": 4096, "degrees": 0.0, "shift": 0.1, "jitter": 0.4}
VIEW = {"degrees": 20.0, "shift": 0.2, "jitter": 0.0}
CROSS_NAMES = {name: f"enc_{name}" for name in ("embed_dim", "depth", "num_heads")} | {
    f"decoder_{name}": f"dec_{name}" for name in ("embed_dim", "depth", "num_heads")
}
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
        objective: "pixels", "positions", or "cross_view" (pixels of a masked image beside a second view of it, CroCo).
        masking: "random", a color of ColorMAE's patterns ("green", "red", "blue", "purple"), or "hard" (the patches of
            which a teacher expects most), which needs loss_prediction.
        ratio: share of masked patches.
        loss_prediction: pixels only: predict the loss of each patch, too.
        teacher_decay: share of the teacher that stays in a step, for "hard" and broad_context.
        view: cross_view only: `degrees`, `shift` and `jitter` of `second_view`.
        broad_context: pixels only: `weight`, `hidden` and the `second_view` of a loss on views that share no visible
            patch, with a teacher that sees both whole (LUT); None: none.
        probe_shots: labels of a class that a probe knows, whose accuracy is `val/probe` and `test/probe`: that of
            `few_label_accuracy` on mean patch tokens of whole images of the split, a mean of its draws. 0: no probe.
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
        probe_shots: int = 0,
        position: Mapping[str, Any] | None = None,
        view: Mapping[str, Any] | None = None,
        broad_context: Mapping[str, Any] | None = None,
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
        _check_keys("view", view, VIEW)
        _check_keys("broad_context", broad_context, CONTEXT)
        if broad_context is not None and objective != "pixels":
            raise ValueError(f"task.broad_context needs task.objective=pixels, not {objective}")
        names = ["loss"] + ["wrong_view"] * (objective == "cross_view") + ["context"] * (broad_context is not None)
        names += ["rank"] * loss_prediction + ["accuracy"] * (objective == "positions")
        super().__init__(
            metrics=mean_metrics(*names),
            optimizer=optimizer,
            scheduler=scheduler,
            lr_batch=lr_batch,
            compile=compile,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["data", *data])
        self.vit_cfg = dict(vit) | {"img_size": img_size, "in_chans": in_chans}
        self.objective, self.masking, self.ratio = objective, masking, ratio
        self.loss_prediction, self.teacher_decay, self.position = loss_prediction, teacher_decay, dict(position or {})
        self.view = VIEW | dict(view or {})
        self.context = None if broad_context is None else CONTEXT | dict(broad_context)
        self._patterns: Tensor | None = None
        self.probe_shots = probe_shots
        self._probed: list[tuple[Tensor, Tensor]] = []

    def make_model(self) -> nn.Module:
        options = {"loss_prediction": self.loss_prediction} if self.objective == "pixels" else {}
        given = self.vit_cfg
        if self.objective == "cross_view":
            given = {CROSS_NAMES.get(name, name): x for name, x in given.items()}
        student = OBJECTIVES[self.objective](**given, **options)
        if self.context is not None:
            student.context = BroadContext(student.norm.normalized_shape[0], self.context["hidden"])
        return Pretrainer(student, with_teacher=self.masking == "hard" or self.context is not None)

    def names_matter(self) -> bool:
        return False

    def trunk_state_dict(self) -> dict[str, Tensor]:
        """Weights of the trunk by the names of timm's `VisionTransformer`, for fine-tuning."""
        parts, found = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm."), self.model.student.state_dict()
        if self.objective == "cross_view":  # a trunk without a class token
            found = {n.removeprefix("enc_"): x for n, x in found.items()}
            found["pos_embed"] = found["pos_embed"][None]
        return {n: x for n, x in found.items() if n.startswith(parts)}

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
        if self.objective == "cross_view":
            other, masked = second_view(images, **self.view, generator=generator), int(self.ratio * order.shape[1])
            losses = {"loss": student(images, other, order, masked=masked).loss}
            if generator is not None:
                losses["wrong_view"] = student(images, other.roll(1, 0), order, masked=masked).loss
            return losses
        found = student(images, order, ratio=self.ratio)
        losses = {"loss": found.losses.mean()}
        if self.context is not None:
            losses["context"] = self._context_loss(images, order, found.features, generator)
        if self.loss_prediction:
            predicted = found.predicted_losses.gather(1, order[:, order.shape[1] - found.losses.shape[1] :])
            losses |= {
                "prediction": relative_loss(predicted, found.losses),
                "rank": rank_correlation(predicted, found.losses),
            }
        return losses

    def _context_loss(
        self, images: Tensor, order: Tensor, features: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Loss of two views whose visible patches are disjoint, from the features of the first one."""
        student, teacher, options = self.model.student, self.model.teacher.eval(), dict(self.context or {})
        view = {name: options[name] for name in VIEW}
        other = second_view(images, **view, generator=generator)
        _, visible = BroadContext.disjoint(order, self.ratio)
        students = features[:, 1:].mean(1), student.encode(other, visible)[:, 1:].mean(1)
        with torch.no_grad():
            whole = tuple(teacher.context.head(teacher.encode(x)[:, 1:].mean(1)) for x in (images, other))
        return student.context.loss(students, whole)

    def training_loss(self, batch: Any) -> Tensor:
        found = self.losses(batch[0])
        context = self.context["weight"] * found["context"] if self.context is not None else 0.0
        return found["loss"] + found.get("prediction", 0.0) + context

    def weight(self, batch: Any) -> Any:
        return len(batch[0])

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        known = batch[1] != PADDING
        images = batch[0][known]
        if len(images) == 0:
            return
        if self.probe_shots:
            tokens = self.model.student.encode(images)
            if self.objective != "cross_view":  # its trunk has no class token
                tokens = tokens[:, 1:]
            self._probed.append((tokens.mean(1).float(), batch[1][known]))
        found = self.losses(images, torch.Generator().manual_seed(batch_idx))
        known = {name: x for name, x in found.items() if f"{split}_{name}" in self.metrics}
        self.record(split, known, weight=len(images))

    def on_validation_epoch_start(self) -> None:
        self._probed.clear()

    def on_test_epoch_start(self) -> None:
        self._probed.clear()

    def on_validation_epoch_end(self) -> None:
        self._log_probe("val")

    def on_test_epoch_end(self) -> None:
        self._log_probe("test")

    def _log_probe(self, split: str) -> None:
        """Each device probes its own share of the images."""
        if not self._probed or self.trainer.sanity_checking:
            return
        features, labels = (torch.cat(x) for x in zip(*self._probed, strict=True))
        self._probed.clear()
        found = few_label_accuracy(features, labels, shots=self.probe_shots).mean()
        self.log(f"{split}/probe", found.float().to(self.device), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.model.teacher is not None:
            follow(self.model.teacher, self.model.student, self.teacher_decay)


def _check_keys(name: str, given: Mapping[str, Any] | None, known: Mapping[str, Any]) -> None:
    if unknown := sorted(set(given or {}) - set(known)):
        raise unknown_name(f"task.{name}", unknown[0], known)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of rows `[B, K]`, mean over the batch."""
    ranks = [x.detach().argsort(-1).argsort(-1).double() for x in (a, b)]
    centered = [x - x.mean(-1, keepdim=True) for x in ranks]
    return nn.functional.cosine_similarity(*centered, dim=-1).mean()
