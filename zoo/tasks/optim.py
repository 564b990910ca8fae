"""Optimizers from a configuration, and schedules that follow from it and the step alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from timm.optim import OptimInfo, create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..data.foreign import reason
from ..data.names import unknown_name

PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}  # by the beginning of the names of their optimizers

for _name in ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8"):  # timm imports them when asked
    default_registry.register(
        OptimInfo(
            name=f"torchao{_name.lower()}",
            opt_class=f"{__package__}.torchao_optimizers.{_name}",
            description=f"torchao {_name}",
            has_betas=True,
        )
    )


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown optimizer, one whose package is missing, or a rate that is no number."""
    if options["opt"] not in list_optimizers():
        raise unknown_name("task.optimizer.opt", options["opt"], [str(name) for name in list_optimizers()])
    for prefix, package in PACKAGES.items():
        if options["opt"].startswith(prefix) and find_spec(package) is None:
            raise ValueError(
                f"task.optimizer.opt={options['opt']!r} needs {package}, which is not installed: pip install "
                f"{package}, or pass task.optimizer.opt=adamw"
            )
    lr = options.get("lr")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr >= 0:
        raise ValueError(f"task.optimizer.lr={lr!r} must be a number, 0 or more")


def make_optimizer(model: nn.Module, options: Mapping[str, Any], *, scale: float = 1.0) -> Optimizer:
    """Makes an optimizer for the parameters of a model.

    Args:
        model: its `no_weight_decay()` is obeyed.
        options: of `timm.optim.create_optimizer_v2`: `opt`, `lr`, `weight_decay`, `layer_decay`, ….
        scale: of the learning rate.

    Raises:
        ValueError: the optimizer does not take these options.
    """
    try:
        return create_optimizer_v2(model, **{**options, "lr": scale * options["lr"]})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task.optimizer={dict(options)} does not work: {reason(error)}") from error


def seek(schedule: Any, step: int) -> None:
    """Sets the learning rates to those of a schedule after `step` optimizer steps, whatever they were before.

    Args:
        schedule: of timm, stepped at every update, or a `LambdaLR`, as diffusers makes them: both are functions of
            the step.

    Raises:
        TypeError: a schedule that is no function of the step.
    """
    if isinstance(schedule, Scheduler):
        schedule.step_update(step)
    elif isinstance(schedule, LambdaLR):
        schedule.last_epoch, schedule._step_count = step, step + 1
        schedule._last_lr = [rate * of(step) for rate, of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    else:
        raise TypeError(f"a {type(schedule).__name__} cannot be set to a step")
