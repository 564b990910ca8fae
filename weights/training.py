"""Checkpoints that training leaves: parameters under the model's own names, and the description of that model."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
MODEL = "model."  # where a Lightning module keeps the model that it trains
CONFIG = "timm_config"  # key of a checkpoint: the description of its model in the words of timm's config.json
ValueT = TypeVar("ValueT")


def own_names(state_dict: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """A state dict under the names of the model itself, without those of modules wrapped around it.

    Names of torch.compile, FSDP and activation checkpointing go wherever they are, `module.` of DDP and of
    `torch.optim.swa_utils.AveragedModel`, with its count, where it stands before every name.
    """
    out = {".".join(part for part in key.split(".") if part not in WRAPPERS): v for key, v in state_dict.items()}
    out.pop("n_averaged", None)
    while out and all(key.startswith("module.") for key in out):
        out = {key.removeprefix("module."): value for key, value in out.items()}
    return out


def model_names(state_dict: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """A Lightning module's state dict under the names of the model that it keeps as `model`; without one, its own."""
    named = own_names(state_dict)
    inner = {key.removeprefix(MODEL): value for key, value in named.items() if key.startswith(MODEL)}
    return own_names(inner) if inner else named


def is_lightning(checkpoint: object) -> bool:
    """Return whether Lightning wrote this checkpoint."""
    return isinstance(checkpoint, Mapping) and "pytorch-lightning_version" in checkpoint


def metadata(checkpoint: object) -> dict[str, str]:
    """The description that `foveal-train` put into a checkpoint, as metadata of a safetensors file.

    `architecture` and `num_classes` as text; `label_names`, `model_args` and `pretrained_cfg` (preprocessing) as JSON.
    Empty where there is none.
    """
    config: Any = checkpoint.get(CONFIG) if isinstance(checkpoint, Mapping) else None
    if not isinstance(config, Mapping):
        return {}
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
