"""Small video models whose parameters all matter."""

from itertools import product

import torch
from foveal.zoo.video import VideoDiT
from torch import Tensor

CONDITIONS = {
    "none": {},
    "class": {"conditioning": "class", "num_classes": 5},
    "cross": {"conditioning": "cross", "text_dim": 6},
    "joint": {"conditioning": "joint", "text_dim": 6},
}


def make(**options) -> VideoDiT:
    """A float64 model of width 24 in which nothing is zero."""
    sizes = {"in_channels": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}
    torch.manual_seed(0)
    return randomize(VideoDiT(**(sizes | options)).double()).eval()


def randomize(model: VideoDiT) -> VideoDiT:
    """Makes nothing zero."""
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(model: VideoDiT, *, batch: int = 2, size: tuple[int, int, int] = (3, 6, 8), words: int = 4) -> dict:
    """Arguments of a call: a video of `size` pixels, timesteps, and the conditions of the model."""
    given: dict = {
        "hidden_states": draw(batch, model.config.in_channels, *size),
        "timestep": torch.linspace(80.0, 900.0, batch, dtype=torch.float64),
    }
    if model.config.num_classes:
        given["class_labels"] = torch.arange(batch) % (model.config.num_classes + 1)
    if model.config.text_dim:
        given["encoder_hidden_states"] = draw(batch, words, model.config.text_dim, seed=1)
    return given


def sees(i: int, j: int, n: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Whether coordinate i of an axis of n sees coordinate j: the rule of the papers, one pair at a time.

    Causal is the rule of an axis without end.
    """
    if i % dilation != j % dilation:
        return False
    p, q = i // dilation, j // dilation
    if causal:
        leader = p // stride * stride + stride - 1
        return q <= p and leader - q < window
    positions = len(range(i % dilation, n, dilation))
    leader = min(p // stride * stride + stride // 2, positions - 1)
    first = min(max(leader - window // 2, 0), positions - window)
    return first <= q < first + window


def visible(layer: dict, grid: tuple[int, int, int]) -> Tensor:
    """Which tokens see which, bool `[tokens, tokens]`, for an entry of `attention`."""
    causal, kind = layer.get("causal", False), layer["type"]
    cells = list(product(*map(range, grid)))
    axes = []
    if kind == "window":
        for axis, n in enumerate(grid):
            window, stride, dilation = (layer.get(name, (1, 1, 1))[axis] for name in ("window", "stride", "dilation"))
            if not (causal and axis == 0):  # what is larger than the map shrinks to it
                window = min(window, n)
                dilation, stride = min(dilation, n // window), min(stride, window)
            axes.append((n, window, stride, dilation, causal and axis == 0))

    def pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        if kind == "window":
            return all(sees(i, j, *axis) for i, j, axis in zip(a, b, axes, strict=True))
        if kind == "spatial":
            return a[0] == b[0]
        if kind == "first":
            return b[0] == 0
        later = causal and b[0] > a[0]
        return not later and (kind == "dense" or a[1:] == b[1:])

    return torch.tensor([[pair(a, b) for b in cells] for a in cells])


LAYERS = ["dense", {"type": "window", "window": [2, 3, 3], "causal": True}, "spatial", "temporal"]


def call(model: VideoDiT, **options) -> torch.Tensor:
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs(model, **options).items()}
    return model(**given).sample
