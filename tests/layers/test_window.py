"""The window attention layer against timm's Swin block."""

import pytest
import torch
from foveal.layers import WindowAttention2d
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn


def make(**options) -> WindowAttention2d:
    torch.manual_seed(0)
    layer = WindowAttention2d(8, **({"num_heads": 2, "window": 4, "dtype": torch.float64} | options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("grid", [(8, 12), (4, 4), (3, 3), (8, 4)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_is_the_attention_of_swin(grid, shift):
    layer = make(shift=shift)
    block = SwinTransformerBlock(8, grid, num_heads=2, window_size=4, shift_size=shift, dtype=torch.float64).eval()
    state = layer.state_dict()
    if grid == (3, 3):  # timm cuts the table of a map that is smaller than the window
        table = state["relative_position_bias_table"].view(7, 7, 2)[1:6, 1:6]
        state["relative_position_bias_table"] = table.reshape(25, 2)
    block.attn.load_state_dict(state)
    x = draw(2, *grid, 8)
    torch.testing.assert_close(layer(x), block._attn(x), rtol=1e-10, atol=1e-12)


def test_windows_at_the_border_hold_only_tokens_of_the_map():
    layer = make()
    x = draw(1, 6, 7, 8)
    torch.testing.assert_close(layer(x)[:, 4:, 4:], layer(x[:, 4:, 4:]), rtol=1e-10, atol=1e-12)


def test_compiles_exports_and_has_gradients():
    layer, x = make(shift=1), draw(1, 8, 6, 8)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("options, message", [
    ({"num_heads": 3}, "dim=8 must be a multiple of num_heads=3"),
    ({"shift": 4}, r"shift=4 must lie in \[0, window=4\)"),
])  # fmt: skip
def test_contradictory_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_shape_and_scripting_are_refused():
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 8\]"):
        make()(draw(1, 16, 8))
    with pytest.raises(NotImplementedError, match=r"^TorchScript cannot compile WindowAttention2d"):
        torch.jit.script(make())
