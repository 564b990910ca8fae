"""`add_gates`: a gate at the end of blocks or stages of any timm model, beside the weights that it has."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from timm.layers import get_attn
from torch import Tensor, nn

from ..layers.gates import GATES

Layout = Literal["NCHW", "NHWC", "NLC"]
BATCH = 3  # of the dry run; modules that give another number work on windows
CHILD = "added_gate"  # name of the gate inside of the module that it follows
LAST = {"Bottleneck": "bn3", "BasicBlock": "bn2", "InvertedResidual": "bn3"}  # ends of residual branches in timm
STAGES = r"^(?:stages|layers|levels)\.\d+$|^layer\d+$"


class FormattedGate(nn.Module):
    """A gate of `[B, C, H, W]` on another layout.

    Args:
        gate: the gate.
        layout: of what comes in: "NCHW", "NHWC" or "NLC".
        prefix: tokens before those of the map, which pass.
        shape: rows and columns of the map of tokens; other numbers of tokens must be square maps.
    """

    def __init__(self, gate: nn.Module, layout: Layout, prefix: int = 0, shape: tuple[int, int] = (0, 0)):
        super().__init__()
        self.gate, self.layout, self.prefix, self.shape = gate, layout, prefix, shape

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "NCHW":
            return self.gate(x)
        if self.layout == "NHWC":
            return self.gate(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        first, tokens = x[:, : self.prefix], x[:, self.prefix :]
        made = self.gate(tokens.mT.unflatten(2, self._map_of(tokens.shape[1])))
        made = made.flatten(2).mT
        return torch.cat([first, made], dim=1) if self.prefix else made

    def _map_of(self, tokens: int) -> tuple[int, int]:
        if tokens == self.shape[0] * self.shape[1]:
            return self.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"x has {tokens} tokens; a gate knows maps of {self.shape} and square ones")
        return side, side


@cache
def _gated(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass whose result goes through the gate."""

    def forward(self, *args, **kwargs):
        return getattr(self, CHILD)(base.forward(self, *args, **kwargs))

    def reduce(self, protocol):  # pickled by its base: the class itself is made when it is needed
        return _empty, (base,), self.__dict__

    return type(f"Gated{base.__name__}", (base,), {"forward": forward, "__reduce_ex__": reduce})


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = _gated(base)
    return cls.__new__(cls)


def add_gates(
    model: nn.Module,
    gate: str | Callable[[int], nn.Module],
    where: str = "block",
    *,
    input_fmt: Layout | None = None,
    input_size: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Put a gate behind modules of a model, in place; weights that it has keep their names.

    A module that is followed by a gate keeps its name and gets the gate as a child, `added_gate`, so a state dict from
    before loads with the gates' keys missing alone. Works with `deepcopy`, `torch.compile` and saving.

    Args:
        model: any timm model; it is run once, on the meta device, to learn the shapes.
        gate: "ela", "ulsam", "triplet", "pat_ch", "pat_sp", a name of `timm.layers.create_attn` such as "se" or "eca",
            or a function of the number of channels that makes a module of `[B, C, H, W]` to the same shape.
        where: "block" (the end of every residual branch: the last norm in ResNet's blocks, `mlp` in transformers'),
            "stage" (after every stage), or a regular expression that is searched for in the names of modules.
        input_fmt: layout behind the modules; from shapes when None.
        input_size: of the images, channels first; the model's own when None.
        **kwargs: further arguments of the gate.

    Returns:
        the model.

    Raises:
        ValueError: no module matches, or one has a gate already; nothing has been changed then. An unknown gate.
    """
    names = _matches(model, where)
    taken = [n for n in names if hasattr(model.get_submodule(n), CHILD)]
    if taken:
        raise ValueError(f"where={where!r} matches {taken[0]}, which has a gate already")
    make = _factory(gate, kwargs)
    outputs = _dry_run(model, names, input_size)
    reference = next(model.parameters())
    made: dict[str, nn.Module] = {}
    for name in names:
        shape, image = outputs[name]
        layout = input_fmt or _layout(model, model.get_submodule(name), shape)
        channels = shape[1 if layout == "NCHW" else -1]
        prefix, size = _map_size(model, shape, image) if layout == "NLC" else (0, (0, 0))
        made[name] = FormattedGate(make(channels), layout, prefix, size)
        made[name].to(device=reference.device, dtype=reference.dtype)
    for name, module in made.items():
        target = model.get_submodule(name)
        module.train(target.training)
        if type(target) is nn.Sequential:
            target.add_module(CHILD, module)  # runs as its last layer
        else:
            target.add_module(CHILD, module)
            target.__class__ = _gated(type(target))
    return model


def _factory(gate: str | Callable[[int], nn.Module], options: dict[str, Any]) -> Callable[[int], nn.Module]:
    if not isinstance(gate, str):
        return lambda channels: gate(channels, **options)
    if gate.lower() in GATES:
        return lambda channels: GATES[gate.lower()](channels, **options)
    try:
        cls = get_attn(gate)
    except AssertionError as error:
        raise ValueError(f"gate={gate!r} must be one of {sorted(GATES)} or a name of timm's create_attn") from error
    return lambda channels: cls(channels, **options)  # pyright: ignore[reportOptionalCall]


def _matches(model: nn.Module, where: str) -> list[str]:
    modules = dict(model.named_modules())
    if where == "block":
        found = [f"{n}.{last}" for n, m in modules.items() if (last := LAST.get(type(m).__name__)) and hasattr(m, last)]
        found += [n for n in modules if re.search(r"(^|\.)mlp$", n)]
    else:
        pattern = STAGES if where == "stage" else where
        found = [n for n in modules if n and re.search(pattern, n)]
    if not found:
        candidates = [n for n in modules if n.count(".") <= 2 and n][:5]
        raise ValueError(
            f"where={where!r} matches no module of {type(model).__name__}; its modules begin with {candidates}"
        )
    return found


def _dry_run(
    model: nn.Module, names: list[str], input_size: tuple[int, int, int] | None
) -> dict[str, tuple[tuple[int, ...], tuple[int, int]]]:
    """Shape of what each module gives, and size of the images, from a run without data."""
    ghost = copy.deepcopy(model).to("meta").eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            shapes.setdefault(name, tuple(out.shape))

        return hook

    for name in names:
        ghost.get_submodule(name).register_forward_hook(note(name))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = input_size or tuple(cfg.get("input_size", (3, 224, 224)))
    if input_size is None:
        channels = next(p.shape[1] for p in model.parameters() if p.dim() == 4)  # of the first convolution
        embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = (channels, *(embed or size[1:]))
    with torch.no_grad():
        ghost(torch.empty(BATCH, *size, device="meta"))
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(f"{missing[0]} did not run in a forward pass of {type(model).__name__}")
    return {name: (tuple(shape), (size[1], size[2])) for name, shape in shapes.items()}


def _layout(model: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """Layout of an output, by the number of channels that the last layer of the module gives."""
    if len(shape) == 3:
        return "NLC"
    if len(shape) != 4:
        raise ValueError(f"{type(module).__name__} gives {shape}; gates take [B, C, H, W], [B, H, W, C] or [B, N, C]")
    widths = [getattr(m, n) for m in module.modules() for n in ("out_features", "out_channels") if hasattr(m, n)]
    if widths and shape[1] != shape[3] and widths[-1] in (shape[1], shape[3]):
        return "NCHW" if shape[1] == widths[-1] else "NHWC"
    from_model = getattr(model, "output_fmt", "NCHW")
    return "NHWC" if str(from_model).upper().endswith("NHWC") else "NCHW"


def _map_size(model: nn.Module, shape: tuple[int, ...], image: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Prefix tokens, and rows and columns of the others."""
    whole = shape[0] == BATCH
    for prefix in dict.fromkeys((getattr(model, "num_prefix_tokens", 0), 0)) if whole else ():
        tokens = shape[1] - prefix
        step = math.sqrt(image[0] * image[1] / tokens) if tokens > 0 else 0
        size = (round(image[0] / step), round(image[1] / step)) if step else (0, 0)
        if tokens > 0 and size[0] * size[1] == tokens:
            return prefix, size
    raise ValueError(f"{shape[1]} tokens of an image of {image} are no map of it; windows cannot be gated")


def gate_names(model: nn.Module) -> list[str]:
    """Names of the modules that are followed by a gate."""
    return [n.rpartition(".")[0] for n, m in model.named_modules() if isinstance(m, FormattedGate)]
