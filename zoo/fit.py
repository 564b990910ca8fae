"""Pretrained weights must fill a model: what timm lets pass in silence is an error, and says what is wrong."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..weights import WeightsError, check_state_dict
from ..weights.load import parameters
from ..weights.read import read


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
            parameters(read(file, also=(argparse.Namespace,)), None, file)  # timm takes that class, too
        raise
