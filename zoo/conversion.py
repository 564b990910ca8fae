"""Checkpoints as data: from the names and shapes of published files to those of our models."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.positions import resize_positions
from ..layers.relative import resize_bias_table
from ..weights.load import CONTAINERS
from ..weights.training import model_names


class Target(NamedTuple):
    """The parameter of a model that a published tensor of another shape is for."""

    key: str
    shape: torch.Size
    model: nn.Module
    file: Mapping[str, Tensor]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the map that the parameter is learnt for, as its owner states them."""
        owner, _, leaf = self.key.rpartition(".")
        module: Any = self.model.get_submodule(owner)
        return module.position_grids[leaf] if module is self.model else module.grid_size


Resize = Callable[[Tensor, Target], Tensor]
Rename = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """From the names and shapes of a published file to those of a model: the filter that timm takes.

    The state dict is taken out of its container and, if it is a detector's, out of its `backbone`; then the steps
    follow in the order of the arguments. A model with `stage_norms` loses the classifier's norm and head and keeps its
    own fresh norms where the file has none.

    Args:
        rename: pairs of a regular expression and its replacement, applied in order to every key; or a function from
            the model to such pairs, where names count what its arguments decide.
        drop: regular expressions of keys that files have beyond the parameters of the model, such as index buffers.
        join: name of a module and the names of those whose parameters it concatenates, {"qkv": ("query", …)}.
        split: name of a parameter and the names of those that its rows become.
        resize: last part of a parameter's name, and the function that resizes a tensor of another shape.
    """

    rename: Rename | Callable[[nn.Module], Rename] = ()
    drop: Sequence[str] = ()
    join: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    resize: Mapping[str, Resize] = field(default_factory=dict)

    def __call__(self, state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """The file's tensors by the model's names, in its shapes; a key that no step knows stays as it is."""
        file = _split(_join(self._renamed(unwrap(state_dict), model), self.join), self.split)
        own = model.state_dict()
        file = {key: value for key, value in file.items() if key in own or not self._is_dropped(key)}
        out = {key: self._resized(key, value, own, model, file) for key, value in file.items()}
        return fit_stage_norms(out, model)

    def report(self, state_dict: Mapping[str, Any], model: nn.Module) -> "Report":
        """Compare a published file, converted, with the parameters of a model."""
        out, own = self(state_dict, model), model.state_dict()
        return Report([key for key in own if key not in out], [key for key in out if key not in own])

    def _renamed(self, state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        pairs, out = self.rename(model) if callable(self.rename) else self.rename, {}
        for key, value in state_dict.items():
            for pattern, replacement in pairs:
                key = re.sub(pattern, replacement, key)
            out[key] = value
        return out

    def _is_dropped(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self.drop)

    def _resized(
        self, key: str, value: Tensor, own: Mapping[str, Tensor], model: nn.Module, file: Mapping[str, Tensor]
    ) -> Tensor:
        resize = self.resize.get(key.rpartition(".")[2])
        if resize is None or key not in own or value.shape == own[key].shape:
            return value
        return resize(value, Target(key, own[key].shape, model, file))


class Report(NamedTuple):
    """Fit of a published file to a model: parameters that it lacks, and keys without a use in the model."""

    missing: list[str]
    unused: list[str]


OFFICIAL_NAMES = Conversion()  # of families whose files have our names and shapes


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters inside a published file: of its container if it has one, of its `backbone` if it is a detector."""
    for container in CONTAINERS:
        state_dict = state_dict.get(container, state_dict)
    state_dict = model_names(state_dict)
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return dict(state_dict)


def _join(state_dict: dict[str, Tensor], joins: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    out = dict(state_dict)
    for whole, parts in joins.items():
        for key in [key for key in state_dict if f".{parts[0]}." in key]:
            names = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(name in out for name in names):
                out[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([out.pop(name) for name in names])
    return out


def _split(state_dict: dict[str, Tensor], splits: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    out = dict(state_dict)
    for whole, parts in splits.items():
        for key in [key for key in state_dict if key.endswith(f".{whole}")]:
            prefix = key.removesuffix(whole)
            out |= dict(zip([prefix + part for part in parts], out.pop(key).unbind(), strict=True))
    return out


def fit_stage_norms(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For a model with `stage_norms`: without the classifier's norm and head, its own fresh norms where none are."""
    if not getattr(model, "stage_norms", False):
        return state_dict
    norm = re.compile(str(model.stage_norm_name).replace(".", r"\.").format(r"\d+") + r"\.")
    out = {k: v for k, v in state_dict.items() if not k.startswith(("norm.", "head."))}
    return out | {k: v for k, v in model.state_dict().items() if norm.match(k) and k not in out}


def bias_table(value: Tensor, target: Target) -> Tensor:
    """Bicubic resize of a bias per offset, `[heads, 2H - 1, 2W - 1]`."""
    return resize_bias_table(value, target.shape[1:])


def window_table(value: Tensor, target: Target) -> Tensor:
    """Bicubic resize of Swin's bias per offset in a square window, `[offsets, heads]`."""
    old, new = (math.isqrt(offsets) for offsets in (len(value), target.shape[0]))
    return resize_bias_table(value.T.unflatten(1, (old, old)), (new, new)).flatten(1).T


def axes(value: Tensor, target: Target) -> Tensor:
    """Linear resize along every axis that has another length."""
    for axis, length in enumerate(target.shape):
        if value.shape[axis] != length:
            lines = value.movedim(axis, -1)
            resized = F.interpolate(lines.flatten(0, -2)[None].float(), size=length, mode="linear", align_corners=False)
            value = resized[0].unflatten(0, lines.shape[:-1]).movedim(-1, axis).to(value.dtype)
    return value


def positions(value: Tensor, target: Target, file_grid: Callable[[Target], tuple[int, int]] | None = None) -> Tensor:
    """Bicubic resize of embeddings per position, `[1, prefix + H * W, C]`, whose leading `prefix` rows stay.

    The map of the file is `file_grid(target)`, or a square when that is None.

    Raises:
        ValueError: the positions of the file are those of no square map.
    """
    new = target.grid_size
    prefix = target.shape[1] - new[0] * new[1]
    tokens = value.shape[1] - prefix
    side = math.isqrt(tokens)
    old = (side, side) if file_grid is None else file_grid(target)
    if old[0] * old[1] != tokens:
        raise ValueError(f"{target.key} of this file has {tokens} positions; expected those of a {old[0]}x{old[1]} map")
    return resize_positions(value, old, new, prefix=prefix)
