"""Watch where attention looks while a model trains: entropy and largest weights by layer, and an alarm for collapse."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ...kernels.ops import attention_statistics
from ..data.names import say

COLUMNS = ("step", "layer", "entropy", "lowest", "largest", "lse")


def watched_attentions(model: nn.Module) -> dict[str, Any]:
    """Attentions with a softmax over all tokens that they are given: those of timm's ViT and Swin, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (Attention, WindowAttention))}


def measure(module: Any, qkv: Tensor) -> dict[str, float]:
    """Statistics of an attention from the output of its `qkv`, `[B, N, 3 * heads * d]`; biases are left out.

    Returns:
        `entropy`, its mean over images, queries and heads as a share of log(keys); `lowest`, that of the head with the
        least; `largest`, the mean of the largest weight; `lse`, the mean log-sum-exp.
    """
    query, key, _ = qkv.detach().unflatten(-1, (3, module.num_heads, -1)).unbind(2)  # [B, N, heads, d]
    query, key = (
        norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(norm := getattr(module, name, None), nn.Module) else x
        for name, x in (("q_norm", query), ("k_norm", key))
    )
    found = attention_statistics(query, key, scale=module.scale)
    shares = found.entropy.mean((0, 1)) / max(math.log(key.shape[1]), 1e-12)
    means = {"largest": found.largest.mean(), "lse": found.lse.mean()}
    return {name: x.item() for name, x in {"entropy": shares.mean(), "lowest": shares.min(), **means}.items()}


class AttentionWatch(Callback):
    """Measures every so many steps, writes `attention.csv` and `attention.png`, and warns of collapsed heads.

    Entropy that falls to zero early in training goes with losses that diverge (arXiv:2303.06296): a head whose mean
    entropy is below a share of log(keys) is named once. Measured is the forward pass of training, on its first images;
    no matrix of weights is made. Position biases are left out.

    Args:
        dirpath: the run's folder.
        every: steps between measurements.
        alarm: share of log(keys) below which a head has collapsed, in [0, 1].
        images: of a batch that are measured; windows of Swin count as images.

    Raises:
        ValueError: numbers outside of these ranges.
    """

    def __init__(self, dirpath: str, every: int = 100, alarm: float = 0.02, images: int = 8):
        if every < 1 or images < 1 or not 0 <= alarm <= 1:
            raise ValueError(
                f"callbacks.attention: every={every} and images={images} must be at least 1, alarm={alarm} in [0, 1]"
            )
        self.dirpath, self.every, self.alarm, self.images = Path(dirpath), every, alarm, images
        self.rows: list[dict[str, Any]] = []
        self._handles: list[Any] = []
        self._warned: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse models of which nothing can be measured.

        Raises:
            ValueError: the model has no attention of timm's ViT or Swin.
        """
        if not watched_attentions(pl_module):
            raise ValueError("callbacks.attention: the model has no attention of timm's ViT or Swin to watch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every or not trainer.is_global_zero:
            return
        step = trainer.global_step

        def hook(name: str, module: Any):
            def note(_: nn.Module, inputs: tuple, out: Tensor) -> None:
                self._note(step, name, measure(module, out[: self.images]))

            return note

        for name, module in watched_attentions(pl_module).items():
            self._handles.append(module.qkv.register_forward_hook(hook(name, module)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.rows or not trainer.is_global_zero:
            return
        self.dirpath.mkdir(parents=True, exist_ok=True)
        with (self.dirpath / "attention.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self._draw(self.dirpath / "attention.png")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._warned = list(state_dict["rows"]), set(state_dict["warned"])

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _note(self, step: int, layer: str, found: dict[str, float]) -> None:
        if (
            self.rows
            and self.rows[-1]["step"] == step
            and any(row["layer"] == layer and row["step"] == step for row in self.rows)
        ):
            return  # a second forward pass of the step
        self.rows.append({"step": step, "layer": layer} | found)
        if not found["lowest"] >= self.alarm and layer not in self._warned:  # also where it is no number
            self._warned.add(layer)
            say(
                f"{layer}: a head's attention has collapsed at step {step}, to an entropy of {found['lowest']:.3f} of "
                "that of uniform weights; a lower learning rate, a longer warm-up or norms of queries and keys help"
            )

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        from .plots import save_figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for layer in dict.fromkeys(row["layer"] for row in self.rows):
            mine = [row for row in self.rows if row["layer"] == layer]
            axes.plot([r["step"] for r in mine], [r["entropy"] for r in mine], marker=".", label=layer)
        axes.axhline(self.alarm, color="gray", linestyle=":")
        axes.set(xlabel="step", ylabel="entropy / log(keys)", ylim=(0, 1.02), title="Entropy of attention")
        axes.legend(fontsize="x-small")
        save_figure(figure, path)
