"""Open an image model by whatever names it: a run, a checkpoint, an exported folder, a name of timm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from ...weights.errors import WeightsError
from ..data.augment import make_transform
from ..data.foreign import reason
from ..data.names import unknown_name
from ..data.pixels import Mode, mode_of
from ..tasks.export import read_run

REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
OF_TRANSFORM = ("crop_pct", "crop_mode", "interpolation")


@dataclass(frozen=True)
class OpenedModel:
    """An image model in evaluation mode, and how its images are prepared.

    Attributes:
        model: `[B, C, H, W]` → logits `[B, num_classes]`, of masks `[B, num_classes, H, W]`.
        source: what it was opened by.
        class_names: by class number; None: not known.
        preprocessing: `input_size` `(C, H, W)`, `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation`, as in timm's
            `pretrained_cfg`.
        targets: "class", one of each image; "labels", any number; "values", numbers; "masks", a class of each pixel.
    """

    model: nn.Module
    source: str
    class_names: tuple[str, ...] | None
    preprocessing: Mapping[str, Any]
    targets: str = "class"

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)  # pyright: ignore[reportArgumentType]

    @property
    def img_size(self) -> int:
        """Pixels a side that images are prepared to."""
        return self.preprocessing["input_size"][-1]

    @property
    def mode(self) -> Mode:
        """Pillow's mode of its images: "RGB" or "L"."""
        return mode_of(tuple(self.preprocessing["mean"]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of classes, their numbers where none are known."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @cached_property
    def transform(self) -> Any:
        """From an image of Pillow to `[C, H, W]`, as in evaluation."""
        options = {key: self.preprocessing[key] for key in OF_TRANSFORM if self.preprocessing.get(key)}
        mean, std = (tuple(self.preprocessing[key]) for key in ("mean", "std"))
        return make_transform(options, size=self.img_size, mean=mean, std=std, mode=self.mode, is_training=False)

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` as the model gets them → pixels in 0..1."""
        mean, std = (torch.tensor(self.preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (images.float().cpu() * std + mean).clamp(0, 1)

    @torch.inference_mode()
    def predictions(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` → `[B, num_classes]` in float32: probabilities, of sum 1 of classes, or values."""
        outputs = self.model(images).float()
        if self.targets == "class":
            return outputs.softmax(-1)
        return outputs.sigmoid() if self.targets == "labels" else outputs

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """`predictions` of a model of classes or labels."""
        return self.predictions(images)

    def resized(self, img_size: int | None) -> OpenedModel:
        """This model on images of other pixels a side; one made for a size is set to it, positions interpolated.

        Raises:
            ValueError: the model takes no such size.
        """
        if img_size in (None, self.img_size):
            return self
        if img_size < 1:
            raise ValueError(f"img_size={img_size} must be at least 1")
        channels = self.preprocessing["input_size"][0]
        try:
            if hasattr(self.model, "set_input_size"):
                self.model.set_input_size(img_size=(img_size, img_size))
            with torch.inference_mode():
                self.model(torch.zeros(1, channels, img_size, img_size, device=next(self.model.parameters()).device))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"img_size={img_size}: {self.source} does not take it: {reason(error)}") from error
        return replace(self, preprocessing={**self.preprocessing, "input_size": (channels, img_size, img_size)})


def _imagenet_names(model: nn.Module) -> tuple[str, ...] | None:
    """WordNet ids of models with a classifier of ImageNet."""
    subset = infer_imagenet_subset(model)
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def describe_classes(names: tuple[str, ...]) -> dict[str, str]:
    """English words for WordNet ids; nothing for other names."""
    if not all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names):
        return {}
    known = ImageNetInfo("imagenet21k-goog")
    return {name: known.label_name_to_description(name) for name in names}


def _of_timm(name: str, source: str) -> OpenedModel:
    """A model of timm with its pretrained weights, `local-dir:` and `hf-hub:` included."""
    if not name.startswith(REMOTE) and not timm.is_model(name.split(".")[0]):
        raise unknown_name("model", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except WeightsError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{source}: cannot be opened with its pretrained weights: {reason(error)}") from error
    cfg: Mapping[str, Any] = model.pretrained_cfg
    if not model.num_classes:
        raise ValueError(f"{source} has no classifier: it gives features, and no classes can be predicted")
    names = cfg.get("label_names")
    names = tuple(map(str, names)) if names else _imagenet_names(model)
    return OpenedModel(model, source, names, resolve_model_data_config(model))


def open_model(source: str | Path, *, img_size: int | None = None, container: str | None = None) -> OpenedModel:
    """Open an image model, on the CPU and in evaluation mode.

    Args:
        source: the folder of a run, a checkpoint of `foveal-train`, a folder that `foveal export` or timm's
            `save_for_hf` wrote, or a name that `timm.create_model` takes, `hf-hub:owner/name` included; of names the
            pretrained weights are loaded.
        img_size: pixels a side; None: those that the model was evaluated on.
        container: key of a checkpoint with other weights than the averaged ones, such as `current_model_state`.

    Raises:
        ValueError: an unknown name, a model without a classifier, or a size that it does not take.
        WeightsError: its weights cannot be read or fetched.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        opened = _of_timm(f"local-dir:{path}", str(source))
        told = json.loads((path / "config.json").read_text(encoding="utf-8"))
        opened = replace(opened, targets=str(told.get("targets", "class")))
    elif path.exists():
        model, config = read_run(path, container=container)
        names, images = config.get("label_names"), dict(config.get("pretrained_cfg") or {})
        preprocessing = {**resolve_model_data_config(model), **images}
        names = tuple(map(str, names)) if names else None
        opened = OpenedModel(model, str(source), names, preprocessing, str(config.get("targets", "class")))
    elif "/" in str(source) and not str(source).startswith(REMOTE):
        raise WeightsError(f"{source} does not exist; expected a run, a checkpoint, an exported folder or a timm model")
    else:
        opened = _of_timm(str(source), str(source))
    if container is not None and not path.exists():
        raise ValueError(f"container={container!r} is of checkpoints, and {source} is none")
    return opened.resized(img_size)
