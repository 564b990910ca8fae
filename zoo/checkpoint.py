"""Published state dicts to ours, as far as all families agree: containers, wrappers, norms of the stages."""

import re

from torch import Tensor, nn

from ..weights.load import CONTAINERS
from ..weights.training import model_names


def unwrap(state_dict: dict) -> dict[str, Tensor]:
    """The parameters inside a file: of its container if it has one, of its `model` if Lightning wrote it, of its
    `backbone` if it is a detector."""
    for container in CONTAINERS:
        state_dict = state_dict.get(container, state_dict)
    state_dict = model_names(state_dict)
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return state_dict


def fit_stage_norms(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For a model with `stage_norms`: without the classifier's norm and head, its own fresh norms where none are."""
    if not getattr(model, "stage_norms", False):
        return state_dict
    norm = re.compile(str(model.stage_norm_name).replace(".", r"\.").format(r"\d+") + r"\.")
    out = {k: v for k, v in state_dict.items() if not k.startswith(("norm.", "head."))}
    return out | {k: v for k, v in model.state_dict().items() if norm.match(k) and k not in out}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Published state dict to that of `model`, for families whose official names are ours."""
    return fit_stage_norms(unwrap(state_dict), model)
