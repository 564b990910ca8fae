"""How timm builds our models, and where their weights come from.

A released checkpoint is named `architecture.tag`. Its `pretrained_cfg["url"]` is "foveal:architecture.tag": the weights
manifest knows where the file is and what its hash must be, so no other downloader can take it unverified.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

SCHEME = "foveal:"
ModelT = TypeVar("ModelT", bound=nn.Module)


def imagenet_cfg(name: str, **overrides) -> dict:
    """timm's pretrained configuration of the checkpoint `name` ("architecture.tag"), ImageNet-1k unless overridden."""
    cfg = {
        "url": SCHEME + name,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
    }
    return cfg | overrides


def build_backbone(
    model_cls: Callable[..., ModelT],
    variant: str,
    pretrained: bool,
    *,
    filter_fn: Callable,
    out_indices: int | Sequence[int] | None = None,
    pretrained_cfg=None,
    pretrained_cfg_overlay: dict | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs,
) -> ModelT:
    """`timm.models.build_model_with_cfg`, with "foveal:" sources fetched and verified by `foveal.weights`.

    With `features_only` and no `out_indices`, models with `depths` hand out every stage, others their last three maps.
    """
    if out_indices is None:
        out_indices = tuple(range(len(kwargs["depths"]))) if "depths" in kwargs else 3
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        elsewhere = cfg.file or cfg.state_dict or cfg.hf_hub_id or cfg.source
        if not elsewhere and cfg.url and cfg.url.startswith(SCHEME):
            from ..weights import fetch  # a third of a second, for pretrained models only

            overlay["file"] = str(fetch(cfg.url.removeprefix(SCHEME), cache_dir=cache_dir))
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        cache_dir=cache_dir,
        **kwargs,
    )
