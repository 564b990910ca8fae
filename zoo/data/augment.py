"""timm's transforms, of which every draw ends with an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from torch import Tensor

from .loader import seeded
from .pixels import Mode, ToMode

CHECK_SIZE = (40, 48)  # of the image that a transform is tried on, in pixels


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm's, but never fewer than one bit.

    At its strongest timm asks for none, which RandAugment reaches from magnitude 9 with noise on (`m9-mstd0.5`). Pillow
    refuses it since version 13, and made a black image of it before.
    """
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


def _operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """The single operations of RandAugment, AutoAugment, AugMix, and of anything composed of them."""
    if isinstance(transform, auto_augment.AugmentOp):
        yield transform
    elif isinstance(transform, list | tuple):
        for part in transform:
            yield from _operations(part)
    else:
        for name in ("transforms", "ops", "policy"):
            yield from _operations(getattr(transform, name, ()))


def make_transform(
    options: Mapping[str, Any],
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mode: Mode,
    is_training: bool,
) -> Any:
    """From a PIL image of any mode to `[C, size, size]`, float and normalised, tried once on an image.

    Args:
        options: further arguments of `timm.data.create_transform`.
        size: pixels a side.
        mean, std: of each channel, in units of pixel/255.
        mode: of the images, as `mean` has it.
        is_training: training's transform or evaluation's.

    Raises:
        TypeError, ValueError: timm refuses the options, or what they make is no such tensor; the message names the key.
    """
    key = f"data.{'train' if is_training else 'eval'}_transform={dict(options)}"
    try:
        transform = create_transform(size, is_training=is_training, mean=mean, std=std, **options)
        for operation in _operations(transform):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
        transform.transforms.insert(0, ToMode(mode))
        with seeded(0):
            made = transform(Image.new(mode, CHECK_SIZE))
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{key}: {error or type(error).__name__}") from error
    wanted = (len(mean), size, size)
    if not isinstance(made, Tensor) or made.dtype != torch.float32 or tuple(made.shape) != wanted:
        found = f"{made.dtype} of {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"{key} makes {found}, and a model needs float32 of {list(wanted)}")
    return transform
