"""Published state dicts to ours, as far as all families agree: containers, wrappers, norms of the stages, what fits."""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..weights.errors import WeightsError
from ..weights.load import CONTAINERS, check_state_dict
from ..weights.read import read
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


def fitting(filter_fn: Callable, source: str, *, features_only: bool = False) -> Callable:
    """`filter_fn`, whose result must fill the model: no parameter but the classifier's may stay as it was initialised.

    timm takes pretrained weights less strictly as soon as the number of classes differs from that of `pretrained_cfg`,
    and would return a model of random weights. A user's own file may hold other classes and channels than the released
    one; `pretrained_cfg` is corrected by it, so that timm keeps a classifier of the model's size and adapts the stem
    from the channels that are there.

    Args:
        source: of the weights, for messages.
        features_only: the model becomes a feature extractor, which needs no classifier.

    Raises:
        WeightsError: from the returned function; names what is missing, unexpected and of another shape.
    """

    def filter_and_check(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
        out = filter_fn(state_dict, model)
        cfg: dict = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
        expected = dict(model.state_dict())
        stem, head = f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"
        if stem in out and stem in expected:
            channels = out[stem].shape[1]
            cfg["input_size"] = (channels, *cfg["input_size"][1:])
            expected[stem] = torch.Size((len(expected[stem]), channels, *expected[stem].shape[2:]))
        rows = len(out[head]) if head in out else None
        if head in expected and rows == model.num_classes:
            cfg["num_classes"] = rows
        problem = f"{source} does not fit {cfg['architecture']}"
        if not features_only and cfg["num_classes"] == model.num_classes:
            hint = f" (its classifier has {rows} classes: pass num_classes={rows})" if rows != model.num_classes else ""
            check_state_dict(out, expected, problem=problem + hint)
        else:  # timm leaves the classifier out
            body, wanted = (_without(weights, f"{cfg['classifier']}.") for weights in (out, expected))
            check_state_dict(body, wanted, problem=problem)
        return out

    return filter_and_check


def _without(weights: dict, prefix: str) -> dict:
    return {key: value for key, value in weights.items() if not key.startswith(prefix)}


@contextmanager
def explained(file: str | None) -> Iterator[None]:
    """When timm cannot load weights from `file`, says in one sentence what is wrong with it, if that is the reason."""
    try:
        yield
    except Exception as error:
        if file is not None and not isinstance(error, WeightsError):
            read(file, also=(argparse.Namespace,))  # as timm does
        raise
