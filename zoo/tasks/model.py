"""The model that a configuration describes: timm's, for the images of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
from timm.models import resolve_model_input_args
from torch import nn

from ...weights.errors import WeightsError
from ..adapters import use_kernels
from ..data.foreign import reason


@contextmanager
def told_as(key: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Raise what a model refuses as a ValueError that names the key and the options of the configuration."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}={options} does not work: {error}") from error


def make_model(
    config: Mapping[str, Any], *, num_classes: int, in_chans: int, img_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """The timm model `config["name"]` with `config["args"]`.

    Args:
        config: `name`, `args` (further arguments of `timm.create_model`) and `use_kernels`.
        num_classes, in_chans: of the data.
        img_size: pixels a side; goes to models that are made for one size, unless `args` has it.
        pretrained: load the weights that timm knows for the name.

    Raises:
        ValueError: the model does not take these arguments; the message names them.
    """
    name = config["name"]
    args = {**(config.get("args") or {}), "num_classes": num_classes, "in_chans": in_chans}
    try:
        if img_size is not None and "img_size" not in args:
            args |= {
                key: value
                for key, value in resolve_model_input_args(name, {"img_size": img_size}, **args).items()
                if key == "img_size"
            }
        model = timm.create_model(name, pretrained=pretrained, **args)
        if config.get("use_kernels"):
            use_kernels(model)
    except WeightsError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        how = f"pretrained=True and model.args={args}" if pretrained else f"model.args={args}"
        raise ValueError(f"model.name={name!r} cannot be built with {how}: {reason(error)}") from error
    return model
