"""InLine and focused linear attention: their definitions, every call form, other sizes, half precision, export."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.layers import (
    FocusedLinearAttention2d,
    FocusedLinearBranch2d,
    InLineAttention2d,
    InLineBranch2d,
    ProjectedAttention2d,
)
from foveal.layers.focused import focused_features
from foveal.layers.inline import convolve_each
from golden_weights import image_a, load_synthetic
from torch import nn
from torch.nn import functional as F

GRID = (5, 7)
OPTIONS = {"dim": 16, "num_heads": 2, "dtype": torch.float64}
LAYERS = {
    "inline": lambda **more: InLineAttention2d(**(OPTIONS | more)),
    "focused": lambda **more: FocusedLinearAttention2d(grid_size=GRID, **(OPTIONS | more)),
}
BRANCHES = {
    "inline": lambda: InLineBranch2d(**OPTIONS),
    "focused": lambda: FocusedLinearBranch2d(grid_size=GRID, **OPTIONS),
}


def hot(layer: nn.Module) -> nn.Module:
    """A layer whose every parameter is random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.eval()


def draw(*size: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def depthwise(x: torch.Tensor, weight: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens `[N, C]` of one map, convolved by `[C, 1, k, k]`."""
    maps = x.T.reshape(1, -1, *grid)
    return F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=maps.shape[1]).flatten(2)[0].T


def inline_by_definition(layer, query, key, value, x, grid):
    """Equation 5 of the paper for one image; tokens `[N, heads, d]`, input `[N, dim]`."""
    count, heads, d = query.shape
    out = torch.empty_like(value)
    for h in range(heads):
        q, k, v = query[:, h], key[:, h], value[:, h]
        weights = d**-0.5 / count * (q @ k.T)
        weights = weights + (1 - weights.sum(1, keepdim=True)) / count  # each query's weights add up to one
        out[:, h] = weights @ v
    weight = layer.residual(x.mean(0)[None, :, None]).view(-1, 1, 3, 3)
    first = count - grid[0] * grid[1]
    local = depthwise(value[first:].flatten(1), weight, grid)
    return out.flatten(1) + F.pad(local, (0, 0, first, 0))


def focused_by_definition(layer, query, key, value, x, grid):
    """Section 4 of the paper for one image."""
    count, heads, d = query.shape
    scale = F.softplus(layer.scale[0])

    def features(t):
        t = (F.relu(t) + 1e-6) / scale
        return (t**3 / (t**3).norm(dim=-1, keepdim=True) * t.norm(dim=-1, keepdim=True)).view(count, heads, d)

    query, key = features(query.flatten(1)), features(key.flatten(1) + layer.positional_encoding[0])
    out = torch.empty_like(value)
    for h in range(heads):
        weights = query[:, h] @ key[:, h].T / count
        local = depthwise(value[:, h], layer.dwc.weight, grid) + layer.dwc.bias
        out[:, h] = weights @ value[:, h] / (weights.sum(1, keepdim=True) + 1e-6) + local
    return out.flatten(1)


DEFINITIONS = {"inline": inline_by_definition, "focused": focused_by_definition}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_their_definition(name, separate):
    layer, x = hot(LAYERS[name](separate_query=separate)), draw(2, *GRID, 16).requires_grad_()
    tokens = x.flatten(1, 2)
    qkv = torch.cat([layer.q(tokens), layer.kv(tokens)], -1) if separate else layer.qkv(tokens)
    heads = qkv.unflatten(-1, (3, 2, 8)).unbind(2)
    expected = torch.stack([DEFINITIONS[name](layer, *(t[i] for t in heads), tokens[i], GRID) for i in range(2)])
    expected, out = layer.proj(expected).view(x.shape), layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    leaves = [x, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_are_their_definition(name):
    layer, x = hot(BRANCHES[name]()), draw(2, *GRID, 16)
    query, key, value = (t.squeeze(3) for t in draw(2, *GRID, 3, 2, 8).split(1, 3))
    tokens = [[t[i].flatten(0, 1) for t in (query, key, value, x)] for i in range(2)]
    expected = torch.stack([DEFINITIONS[name](layer, *tokens[i], GRID) for i in range(2)]).view(x.shape)
    expected = expected + layer.get_v(value.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(query, key, value, x), expected, rtol=1e-10, atol=1e-12)
    assert not any(key.startswith(("qkv", "proj")) for key in layer.state_dict())


def test_class_tokens_count_and_are_not_convolved():
    layer, x = hot(LAYERS["inline"](class_token=True)), draw(2, 1 + 35, 16)
    heads = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
    expected = [inline_by_definition(layer, *(t[i] for t in heads), x[i], GRID) for i in range(2)]
    torch.testing.assert_close(layer(x, grid_size=GRID), layer.proj(torch.stack(expected)), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"x has 36 tokens; expected a class token and grid_size=\(6, 6\)"):
        layer(x, grid_size=(6, 6))
    with pytest.raises(ValueError, match="expected a class token and grid_size=None"):
        layer(x)
    with pytest.raises(ValueError, match="class_token=True must be False"):
        LAYERS["focused"](class_token=True)


def test_focused_linear_attention_is_the_official_one():
    recorded = np.load(Path(__file__).parents[1] / "goldens" / "focused_linear_attention.npz")
    layer = load_synthetic(FocusedLinearAttention2d(64, num_heads=4, grid_size=(14, 14)), "hot")
    with torch.inference_mode():
        out = layer(image_a((2, 196, 64)).view(2, 14, 14, 64)).flatten()
    assert np.abs(out[::5].numpy() - recorded["out"]).max() <= 20 * 2**-23 * np.abs(recorded["out"]).max()


def test_positions_of_other_maps_are_interpolated_alike_on_the_way_and_for_good():
    layer, x = hot(LAYERS["focused"]()), draw(1, 8, 6, 16)
    out = layer(x)
    layer.set_grid_size((8, 6))
    assert layer.positional_encoding.shape == (1, 48, 16)
    torch.testing.assert_close(layer(x), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_stays_near(name, dtype):
    """Features that are cubes of thousandths would be zero in half."""
    layer, x = hot(LAYERS[name]()), 0.01 * draw(1, *GRID, 16)
    exact = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
def test_export_with_a_free_batch_size(name):
    layer = hot(LAYERS[name]())
    dynamic = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(layer, (draw(3, *GRID, 16),), dynamic_shapes=dynamic)
    x = draw(5, *GRID, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_convolutions_of_each_map_are_alike_in_graphs():
    x, weight = draw(2, *GRID, 3), draw(2, 3, 3, 3)
    expected = torch.stack([depthwise(x[i].flatten(0, 1), weight[i][:, None], GRID).view(*GRID, 3) for i in range(2)])
    compiled = torch.compile(convolve_each, backend="aot_eager", fullgraph=True)
    for convolve in (convolve_each, compiled):
        torch.testing.assert_close(convolve(x, weight), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_errors_and_refusals(name):
    layer = LAYERS[name]()
    with pytest.raises(ValueError, match=r"x has shape \(1, 5, 7, 8\); expected \[B, H, W, 16\]"):
        layer(draw(1, *GRID, 8))
    with pytest.raises(ValueError, match="dim=16 must be a multiple of num_heads=3"):
        LAYERS[name](num_heads=3)
    with pytest.raises(NotImplementedError, match=r"TorchScript cannot compile \w+; use torch\.export"):
        torch.jit.script(layer)
    assert isinstance(layer, ProjectedAttention2d)
    assert {p.device.type for p in LAYERS[name](device="meta").parameters()} == {"meta"}


def test_focused_features_of_some_tokens_at_a_time_are_those_of_all(monkeypatch):
    """Values, gradients, those of positions and scales included, and what a compiler traces."""
    monkeypatch.setattr("foveal.layers.focused.CHUNK", 3 * 16)
    x, scale, positions = (
        draw(*size).requires_grad_() for size in ((2, 11, 16), (1, 1, 16), (1, 11, 16))
    )  # fmt: skip

    def compiled(*tensors):
        monkeypatch.setattr("foveal.layers.focused.is_plain_call", lambda: False)
        return focused_features(*tensors)

    outs = [focused_features(x, scale, positions), compiled(x, scale, positions)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.sin().sum(), (x, scale, positions)) for y in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [InLineAttention2d, partial(FocusedLinearAttention2d, grid_size=(5, 7))])
def test_convolutions_added_in_place_have_the_gradients_of_the_reference(make):
    torch.manual_seed(0)
    layer = make(12, num_heads=3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    weights, found = torch.randn(3, 5, 7, 12, dtype=torch.float64), []
    for layer.impl in ("torch", "reference"):
        out = layer(x)
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], weights)])
    torch.testing.assert_close(*found)
