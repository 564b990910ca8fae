"""HiLo against its definition, written out token by token."""

import pytest
import torch
from foveal.layers import HiLo
from foveal.zoo.backbones.litv2 import LITv2
from torch import nn
from torch.nn import functional as F


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(**options) -> HiLo:
    torch.manual_seed(0)
    layer = HiLo(24, **({"num_heads": 6, "window": 2, "alpha": 0.5, "dtype": torch.float64} | options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def definition(layer: HiLo, x: torch.Tensor) -> torch.Tensor:
    """Both branches by loops over tokens (section 3.2 of the paper), with the zeros of the detection code."""
    side, d = layer.window, layer.head_dim
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    windows = padded.unfold(1, side, side).unfold(2, side, side).flatten(4).transpose(3, 4)  # [B, wh, ww, tokens, C]
    out = []
    for i in range(height):
        for j in range(width):
            halves = []
            if layer.high_heads:
                tokens = layer.h_qkv(windows[:, i // side, j // side]).unflatten(-1, (3, -1, d))
                query = layer.h_qkv(x[:, i, j]).unflatten(-1, (3, -1, d))[:, 0]
                weights = torch.einsum("bhd,bthd->bht", query, tokens[:, :, 1]).div(d**0.5).softmax(-1)
                halves.append(layer.h_proj(torch.einsum("bht,bthd->bhd", weights, tokens[:, :, 2]).flatten(1)))
            if layer.low_heads:
                tokens = layer.l_kv(windows.mean(3).flatten(1, 2)).unflatten(-1, (2, -1, d))
                query = layer.l_q(x[:, i, j]).unflatten(-1, (-1, d))
                weights = torch.einsum("bhd,bthd->bht", query, tokens[:, :, 0]).div(d**0.5).softmax(-1)
                halves.append(layer.l_proj(torch.einsum("bht,bthd->bhd", weights, tokens[:, :, 1]).flatten(1)))
            out.append(torch.cat(halves, dim=-1))
    return torch.stack(out, dim=1).unflatten(1, (height, width))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
@pytest.mark.parametrize("options", [
    {}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.7}, {"window": 3}, {"window": 1}, {"qkv_bias": False}
], ids=str)  # fmt: skip
def test_is_its_definition(options, grid):
    layer = make(**options)
    x = draw(2, *grid, 24)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-12, atol=1e-12)


def test_names_are_those_of_the_checkpoints():
    low, high = ["l_q.weight", "l_q.bias", "l_kv.weight", "l_kv.bias", "l_proj.weight", "l_proj.bias"], [
        "h_qkv.weight", "h_qkv.bias", "h_proj.weight", "h_proj.bias"]  # fmt: skip
    assert list(make().state_dict()) == low + high
    assert list(make(alpha=1.0).state_dict()) == list(make(window=1, alpha=0.0).state_dict()) == low
    assert list(make(alpha=0.0).state_dict()) == high


@pytest.mark.parametrize("heads, alpha, low", [(12, 0.9, 10), (16, 0.9, 14), (12, 0.7, 8), (12, 0.4, 4), (12, 0.2, 2)])
def test_heads_are_split_as_in_the_official_code(heads, alpha, low):
    layer = HiLo(16 * heads, num_heads=heads, alpha=alpha, device="meta")
    assert (layer.low_heads, layer.high_heads) == (low, heads - low)


def test_every_parameter_and_the_input_get_a_gradient():
    layer, x = make().train(), draw(1, 5, 4, 24).requires_grad_()
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [*layer.parameters(), x])


@pytest.mark.parametrize("grid", [pytest.param((4, 6), marks=pytest.mark.slow), (5, 3)])
def test_compiles_without_graph_break_and_exports(grid):
    layer, x = make(), draw(2, *grid, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-12, atol=1e-12)


def test_runs_on_meta():
    layer = HiLo(24, num_heads=6, device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(2, 5, 6, 24, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 6, 24)


@pytest.mark.parametrize("options, message", [
    ({"num_heads": 5}, "dim=24 must be a multiple of num_heads=5"),
    ({"alpha": 1.5}, "alpha=1.5 must be from 0 to 1"),
    ({"window": 0}, "window=0 must be at least 1"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(1, 4, 24\); expected \[B, H, W, 24\]"):
        make()(draw(1, 4, 24))
    with pytest.raises(ValueError, match=r"windows=\(2,\) must be equally long"):
        LITv2(depths=(1, 1), num_heads=(1, 2), windows=(2,), device="meta")


def test_scripting_is_refused_in_one_sentence():
    with pytest.raises(NotImplementedError, match="TorchScript cannot compile HiLo"):
        torch.jit.script(make())
