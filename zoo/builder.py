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

from ..weights import fetch
from .fit import explained, fitting

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

    Pretrained weights of any source must fill the model, see `fitting`; a file that cannot be read is a WeightsError.
    With `features_only` and no `out_indices`, models with `depths` hand out every stage, others their last three maps.
    """
    if out_indices is None:
        out_indices = tuple(range(len(kwargs["depths"]))) if "depths" in kwargs else 3
    overlay, file = dict(pretrained_cfg_overlay or {}), None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        file = cfg.file if not (cfg.state_dict or cfg.source) else None
        elsewhere = cfg.file or cfg.state_dict or cfg.hf_hub_id or cfg.source
        if not elsewhere and cfg.url and cfg.url.startswith(SCHEME):
            file = overlay["file"] = str(fetch(cfg.url.removeprefix(SCHEME), cache_dir=cache_dir))
        source = "the given state_dict" if cfg.state_dict else file or cfg.file or cfg.hf_hub_id or cfg.url
        filter_fn = fitting(filter_fn, str(source), features_only=kwargs.get("features_only", False))
    with explained(file):
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
