"""Training a part of a model: the classifier alone (probe), adapters of low rank (LoRA), prompts, or everything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..data.classes import listed
from ..data.foreign import reason
from ..data.names import unknown_name
from ..prompts import add_prompts, prompts_of

TUNINGS = ("full", "probe", "lora", "prompt")
ADAPTER = "default"  # peft's name of the one adapter
LORA = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": r".*\.(qkv|q|kv|proj)"}


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that timm calls the classifier.

    Raises:
        ValueError: the model has none.
    """
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # pyright: ignore
    heads = [found] if isinstance(found, nn.Module) else list(found or [])
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    if not any(True for head in heads for _ in head.parameters()):
        raise ValueError("task.tuning needs a classifier to train, and this model has none with parameters")
    return names


def set_trainable(model: nn.Module, tuning: str) -> None:
    """Switches gradients on for the parameters that `tuning` trains, and off for the others."""
    heads = tuple(f"{name}." for name in classifier_names(model)) if tuning != "full" else ()
    for name, parameter in model.named_parameters():
        added = {"lora": ".lora_", "prompt": ".prompts."}.get(tuning)
        trained = tuning == "full" or name.startswith(heads) or (added is not None and added in name)
        parameter.requires_grad_(trained)


def freeze_statistics(model: nn.Module) -> None:
    """Puts all but the classifier and prompts in evaluation mode: no dropout, and batch statistics stay."""
    heads = classifier_names(model)
    model.eval()
    for module in [*map(model.get_submodule, heads), *prompts_of(model)]:
        module.train()


def check_tuning(
    tuning: str, unfreeze_epoch: int | None, lora: Mapping[str, Any] | None, prompt: Mapping[str, Any] | None = None
) -> None:
    """Refuses options that `tune` does not take.

    Raises:
        ValueError: names the key.
        ImportError: LoRA needs peft, and it is not installed.
    """
    if tuning not in TUNINGS:
        raise unknown_name("task.tuning", tuning, TUNINGS)
    if unfreeze_epoch is not None and (tuning != "probe" or unfreeze_epoch < 1):
        raise ValueError(f"task.unfreeze_epoch={unfreeze_epoch} needs task.tuning=probe and must be at least 1")
    check_lora(lora or {}, LORA, needed=tuning == "lora")
    if prompt and tuning != "prompt":
        raise ValueError(f"task.prompt={dict(prompt)} needs task.tuning=prompt, not {tuning}")


def check_lora(lora: Mapping[str, Any], known: Mapping[str, Any], *, needed: bool = True) -> None:
    """Refuses options of adapters that are not known, and adapters without peft.

    Raises:
        ValueError: names the key.
        ImportError: LoRA is needed and peft is not installed.
    """
    unknown = set(lora) - set(known)
    if unknown:
        raise unknown_name("task.lora", min(unknown), known)
    if needed and find_spec("peft") is None:
        raise ImportError("LoRA needs peft: pip install 'foveal[lora]'")


def _linear_layers(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers that a regular expression fits as a whole."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        found = [name for name in linear if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f"task.lora.targets={pattern!r} is no regular expression: {error}") from error
    if not found:
        raise ValueError(f"task.lora.targets={pattern!r} fits none of the linear layers: {listed(linear)}")
    return found


def lora_config(model: nn.Module, options: Mapping[str, Any]) -> Any:
    """Peft's configuration of adapters beside the linear layers of a model that `options["targets"]` fits.

    Raises:
        ValueError: no layer fits, or peft refuses the options.
    """
    from peft import LoraConfig

    try:
        return LoraConfig(
            r=options["rank"],
            lora_alpha=options["alpha"],
            lora_dropout=options["dropout"],
            target_modules=_linear_layers(model, options["targets"]),
        )
    except TypeError as error:
        raise ValueError(f"task.lora={dict(options)} does not work: {reason(error)}") from error


def tune(
    model: nn.Module,
    tuning: str,
    lora: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Prepares a model to train a part of it.

    Args:
        model: of timm; LoRA replaces linear layers in it.
        tuning: "full", everything; "probe", the classifier; "lora", the classifier and adapters of low rank
            (arXiv:2106.09685) beside linear layers; "prompt", the classifier and prompts of each block.
        lora: `rank`, `alpha` (the adapters count `alpha / rank`), `dropout`, and `targets`, a regular expression that
            the names of linear layers fit as a whole.
        prompt: `kind` and further arguments of `foveal.zoo.prompts.add_prompts`.

    Returns:
        The model.

    Raises:
        ValueError: no layer fits `targets`, the model has no classifier or takes no prompts.
    """
    if tuning == "prompt":
        try:
            add_prompts(model, **(prompt or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"task.prompt={dict(prompt or {})} does not work: {reason(error)}") from error
    if tuning == "lora":
        from peft import inject_adapter_in_model

        options = {**LORA, **(lora or {})}
        config = lora_config(model, options)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"task.lora={dict(options)} does not work: {reason(error)}") from error
    set_trainable(model, tuning)
    return model


def merge_lora(state_dict: Mapping[str, Tensor], lora: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The weights of the plain model: `W + alpha / rank * B @ A` under the names it had without adapters.

    Args:
        state_dict: of a model that `tune` gave adapters, under its own names; another one is returned as it is.
        lora: as for `tune`.
    """
    options = {**LORA, **(lora or {})}
    merged: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        down = state_dict.get(f"{stem}.lora_A.{ADAPTER}.weight")
        if stem != name and down is not None:
            up = state_dict[f"{stem}.lora_B.{ADAPTER}.weight"]
            change = up.float() @ down.float() * (options["alpha"] / options["rank"])
            value = (value.float() + change).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value.contiguous() if isinstance(value, torch.Tensor) else value
    return merged
