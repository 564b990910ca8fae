"""Registration of model families with timm, and construction with or without pretrained weights.

A released checkpoint is named `architecture.tag`. Its `pretrained_cfg["url"]` is "foveal:architecture.tag": the weights
manifest knows where the file is and what its hash must be, so no other downloader can take it unverified.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from ..weights import bundled_manifest, fetch
from .conversion import OFFICIAL_NAMES, Conversion
from .fit import explained, fitting

SCHEME = "foveal:"
IMAGENET_22K_CLASSES = 21841  # where upstream does not state the rows of the head
DIGITS_CFG = {
    "num_classes": 10,
    "input_size": (1, 32, 32),
    "crop_pct": 1.0,
    "mean": (0.5,),
    "std": (0.5,),
}
TEST_CFG = {"num_classes": 10, "input_size": (3, 64, 64)}  # of the small models called test_*
ModelT = TypeVar("ModelT", bound=nn.Module)


def build_backbone(
    model_cls: Callable[..., ModelT],
    variant: str,
    pretrained: bool,
    *,
    filter_fn: Callable = OFFICIAL_NAMES,
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


class Model(NamedTuple):
    """A row of a family's table.

    Args:
        about: docstring of the entry point.
        build: a model class, or a `functools.partial` of one.
        args: its arguments.
    """

    about: str
    build: Callable[..., nn.Module]
    args: Mapping[str, Any]


def register_family(
    module: str,
    models: Mapping[str, Model],
    *,
    conversion: Conversion = OFFICIAL_NAMES,
    cfg: Mapping[str, Any],
    cfgs: Mapping[str, Mapping[str, Any]] | None = None,
    checkpoint_args: Mapping[str, Mapping[str, Any]] | None = None,
    leaves: Sequence[type[nn.Module]] = (),
) -> None:
    """Register the models of one module with timm, as `@timm.models.register_model` does for functions.

    Args:
        module: `__name__` of the family's module, which gets an entry point for every model and `default_cfgs`.
        models: by name.
        conversion: of the family's published files.
        cfg: entries of timm's pretrained configuration that all checkpoints share, beside those that the manifest and
            the model class know.
        cfgs: the same of single checkpoints, `architecture.tag`.
        checkpoint_args: arguments that the model of a checkpoint needs, `architecture.tag`; the caller's come first.
        leaves: layers that torch.fx must take whole, because they check shapes.
    """
    for layer in leaves:
        register_notrace_module(layer)
    here = sys.modules[module]
    names = [name for model in models for name in _checkpoints(model)]
    default_cfgs = {name: _make_cfg(name, models, {**cfg, **(cfgs or {}).get(name, {})}) for name in names}
    here.default_cfgs = generate_default_cfgs(default_cfgs)  # where register_model looks for them
    for name, model in models.items():
        entry_point = _make_entry_point(name, model, conversion, checkpoint_args or {})
        entry_point.__module__, entry_point.__doc__ = module, model.about
        entry_point.__name__ = entry_point.__qualname__ = name
        setattr(here, name, register_model(entry_point))


def _checkpoints(model: str) -> list[str]:
    """Released checkpoints of a model, or the one name "model.untrained"."""
    released = [name for name in bundled_manifest().entries if name.partition(".")[0] == model]
    return released or [f"{model}.untrained"]


def _make_cfg(name: str, models: Mapping[str, Model], stated: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained configuration of a checkpoint: what the family states, over what the manifest does."""
    architecture = name.partition(".")[0]
    _, build, args = models[architecture]
    model_cls: Any = build.func if isinstance(build, partial) else build
    reduction = 2 ** (1 + len(args["depths"])) if "depths" in args else 16  # stages from 1/4 on, or patches of 16x16
    cfg: dict[str, Any] = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": model_cls.first_conv,
        "classifier": "head",
    }
    if (entry := bundled_manifest().entries.get(name)) is not None:
        cfg |= {
            "url": SCHEME + name,
            "num_classes": entry.num_classes or IMAGENET_22K_CLASSES,
            "input_size": (3, entry.img_size, entry.img_size),
            "license": None if entry.license == "NOASSERTION" else entry.license.lower(),
            "origin_url": entry.source,
        }
    cfg |= {**(TEST_CFG if architecture.startswith("test_") else {}), **stated}
    return {"pool_size": (math.ceil(cfg["input_size"][1] / reduction),) * 2} | cfg


def _make_entry_point(
    name: str, model: Model, conversion: Conversion, checkpoint_args: Mapping[str, Mapping[str, Any]]
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        args = model.args
        if checkpoint_args:
            tag = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg")).tag
            args = {**args, **checkpoint_args.get(f"{name}.{tag}", {})}
        return build_backbone(model.build, name, pretrained, filter_fn=conversion, **{**args, **kwargs})

    return entry_point
