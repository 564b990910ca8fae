"""Quality of clips, measured by how their scores are ordered and where a network looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import KendallRankCorrCoef, MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef

from ..data.loader import PADDING
from ..quality import Quality, QualityNet, quality_loss
from .epochs import EpochTask
from .model import make_model


class TokenTrunk(nn.Module):
    """Features of a timm model as tokens `[n, tokens, dim]`, without prefix tokens.

    Args:
        model: of timm.
        detail: the model sees each pixel less the mean of 3 x 3 around it, times this factor; 0: pixels as they are.
    """

    def __init__(self, model: nn.Module, *, detail: float = 0.0):
        super().__init__()
        self.model: Any = model
        self.detail = detail

    def forward(self, x: Tensor) -> Tensor:
        if self.detail:  # noise and blur change steps between pixels, which brightness hides
            x = self.detail * (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1))
        found = self.model.forward_features(x)
        if found.dim() == 3:
            return found[:, getattr(self.model, "num_prefix_tokens", 0) :]
        last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return found.flatten(1, 2) if last else found.flatten(2).mT


class QualityTask(EpochTask):
    """Trains `QualityNet` on `(clips [B, C, T, H, W], scores [B], quarters [B])`.

    Measured are the correlations of scores by rank (`srcc`, `krcc`) and by value (`plcc`), and how often saliency is
    largest on the degraded quarter (`located`). A quarter of PADDING marks a clip that does not count.

    Args:
        trunk: `name` of a timm model and its `args`; its images are the regions.
        regions: rows and columns, even numbers that divide the frames.
        num_heads, topk: see `QualityNet`.
        margin: of `quality_loss`.
        detail: see `TokenTrunk`.
        in_chans, size: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: regions that do not divide the frames into quarters.
    """

    progress_metric = "val_srcc"

    def __init__(
        self,
        *,
        trunk: Mapping[str, Any],
        regions: tuple[int, int] = (4, 4),
        num_heads: int = 1,
        topk: int = 4,
        margin: float = 0.0,
        detail: float = 0.0,
        in_chans: int,
        size: int,
        **options: Any,
    ):
        if any(n % 2 or size % n for n in regions):
            raise ValueError(f"task.regions={list(regions)} must be even and divide data.size={size}")
        metrics: dict[str, Metric] = {}
        for split in ("val", "test"):
            metrics |= {f"{split}_{name}": MeanMetric() for name in ("loss", "located")}
            kinds = {"srcc": SpearmanCorrCoef(), "krcc": KendallRankCorrCoef(), "plcc": PearsonCorrCoef()}
            metrics |= {f"{split}_{name}": metric for name, metric in kinds.items()}
        super().__init__(metrics=metrics, **options)
        self.save_hyperparameters()
        self.trunk_cfg, self.margin, self.detail = dict(trunk), margin, detail
        self.in_chans, self.size = in_chans, size
        self.net_cfg = {"regions": (regions[0], regions[1]), "num_heads": num_heads, "topk": topk}

    def make_model(self) -> nn.Module:
        side = self.size // self.net_cfg["regions"][0]
        pretrained = self.trunk_cfg.get("pretrained", False)
        trunk = make_model(self.trunk_cfg, num_classes=0, in_chans=self.in_chans, img_size=side, pretrained=pretrained)
        dim: Any = trunk.num_features
        return QualityNet(TokenTrunk(trunk, detail=self.detail), dim, **self.net_cfg)

    def training_loss(self, batch: Any) -> Tensor:
        clips, scores, _ = batch
        return quality_loss(self.model(clips).score.float(), scores, margin=self.margin)

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        clips, scores, quarters = (x[batch[2] != PADDING] for x in batch)
        if not len(clips):
            return
        found: Quality = self.model(clips)
        score = found.score.float()
        rows, columns = found.saliency.shape[2:]
        mass = found.saliency.float().unflatten(2, (2, rows // 2)).unflatten(4, (2, columns // 2)).sum((1, 3, 5))
        right = (mass.flatten(1).argmax(1) == quarters).float()
        loss = quality_loss(score, scores, margin=self.margin) if len(score) > 1 else score.new_zeros(())
        self.metrics[f"{split}_loss"].update(loss, weight=len(score))  # pyright: ignore
        self.metrics[f"{split}_located"].update(right)  # pyright: ignore
        for name in ("srcc", "krcc", "plcc"):
            self.metrics[f"{split}_{name}"].update(score, scores)  # pyright: ignore
