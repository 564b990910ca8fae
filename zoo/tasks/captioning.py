"""Captions of clips: words behind masks in training, sentences that are right in every word in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..captioning import VideoCaptioner
from ..data.loader import PADDING
from ._base import mean_metrics
from .epochs import EpochTask
from .model import told_as


class CaptioningTask(EpochTask):
    """Trains `VideoCaptioner` on `(clips [B, C, T, H, W], words [B, length])`.

    `exact` is the share of captions that are right in every word, `words` that of words; `visible` is the share of
    pairs of tokens of the clip that the learned mask leaves above one half.

    Args:
        captioner: arguments of `VideoCaptioner` beside those of the data.
        sparsity: weight of the loss that makes the mask sparse.
        ratio: chance of a word to be masked.
        vocabulary, length, frames, size, in_chans: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: arguments that the model does not take.
    """

    progress_metric = "val_exact"

    def __init__(
        self,
        *,
        captioner: Mapping[str, Any],
        sparsity: float = 0.5,
        ratio: float = 0.5,
        vocabulary: Sequence[str],
        length: int,
        frames: int,
        size: int,
        in_chans: int,
        **options: Any,
    ):
        names = ("loss", "exact", "words", "visible")
        super().__init__(metrics=mean_metrics(*names), **options)
        self.save_hyperparameters()
        self.captioner_cfg, self.sparsity, self.ratio = dict(captioner), sparsity, ratio
        self.facts = {"length": length, "frames": frames, "size": size, "in_chans": in_chans}
        self.vocabulary = list(vocabulary)

    def make_model(self) -> nn.Module:
        with told_as("task.captioner", self.captioner_cfg):
            return VideoCaptioner(self.vocabulary, **self.facts, **self.captioner_cfg)

    def training_loss(self, batch: Any) -> Tensor:
        clips, words = batch
        return self.model.loss(clips, words, ratio=self.ratio) + self.sparsity * self.model.mask.sparsity_loss()

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        clips, words = (x[batch[1][:, 0] != PADDING] for x in batch)
        if not len(clips):
            return
        with torch.random.fork_rng(devices=[clips.device] if clips.is_cuda else []):
            torch.manual_seed(batch_idx)
            loss = self.model.loss(clips, words, ratio=self.ratio)
        right, visible = self.model.caption(clips) == words, self.model.mask.visible() > 0.5
        found = {"loss": loss, "exact": right.all(1).float().mean(), "words": right.float().mean()}
        self.record(split, found | {"visible": visible.float().mean()}, weight=len(clips))
