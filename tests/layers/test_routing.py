"""Bi-level routing attention as a layer against its definition, region by region with gathered tokens."""

import pytest
import torch
from foveal.layers import BiLevelRoutingAttention2d
from foveal.layers.routing import ConvRoutingAttention2d, LePEAttention2d
from torch import nn
from torch.nn import functional as F

DIM = 16


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(cls: type[nn.Module], **options) -> nn.Module:
    torch.manual_seed(0)
    layer = cls(DIM, **({"num_heads": 2, "dtype": torch.float64} | options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (query, key, value))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def gathered(qkv: torch.Tensor, size: tuple[int, int], topk: int, heads: int, real: tuple[int, int]) -> torch.Tensor:
    """Attention of one image `[H, W, 3 * C]`, a multiple of `size`, of which `real` counts in means."""
    query, key, value = qkv.chunk(3, dim=-1)
    boxes = [(slice(i, i + size[0]), slice(j, j + size[1]))
             for i in range(0, qkv.shape[0], size[0]) for j in range(0, qkv.shape[1], size[1])]  # fmt: skip
    inside = torch.zeros(*qkv.shape[:2], 1, dtype=torch.bool)
    inside[: real[0], : real[1]] = True

    def mean(x: torch.Tensor, box) -> torch.Tensor:
        return (x[box] * inside[box]).sum((0, 1)) / inside[box].sum()

    means = torch.stack([mean(key, box) for box in boxes])
    out = torch.empty_like(query)
    for box in boxes:
        chosen = (means @ mean(query, box)).topk(topk).indices
        keys, values = (torch.cat([x[boxes[i]].flatten(0, 1) for i in chosen]) for x in (key, value))
        shape = out[box].shape
        out[box] = attend(query[box].flatten(0, 1), keys, values, heads, DIM**-0.5).reshape(shape)
    return out


def lepe(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), layer.lepe.weight, layer.lepe.bias, padding=2, groups=DIM).permute(
        0, 2, 3, 1
    )


@pytest.mark.parametrize("grid", [(6, 9), (7, 4)])
@pytest.mark.parametrize("topk", [1, 4])
def test_routing_is_its_definition(grid, topk):
    layer = make(BiLevelRoutingAttention2d, regions=3, topk=topk)
    x = draw(2, *grid, DIM)
    padded = F.pad(x, (0, 0, 0, -grid[1] % 3, 0, -grid[0] % 3))
    qkv = layer.qkv["qkv"](padded)
    size = (padded.shape[1] // 3, padded.shape[2] // 3)
    out = torch.stack([gathered(image, size, topk, 2, padded.shape[1:3]) for image in qkv])
    expected = layer.wo(out + lepe(layer, qkv[..., 2 * DIM :]))[:, : grid[0], : grid[1]]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(6, 9), (7, 11), (2, 5)])
@pytest.mark.parametrize("topk", [1, 4])
def test_conv_routing_pads_after_the_projection_and_keeps_real_means(grid, topk):
    layer = make(ConvRoutingAttention2d, regions=3, topk=topk)
    x = draw(2, *grid, DIM)
    qkv = F.linear(x, layer.qkv_linear.weight.flatten(1), layer.qkv_linear.bias)
    size = tuple(max(n // 3, 1) for n in grid)
    padded = F.pad(qkv, (0, 0, 0, -grid[1] % size[1], 0, -grid[0] % size[0]))
    out = torch.stack([gathered(image, size, topk, 2, grid) for image in padded])[:, : grid[0], : grid[1]]
    out = out + lepe(layer, qkv[..., 2 * DIM :])
    expected = F.linear(out, layer.output_linear.weight.flatten(1), layer.output_linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lepe_of, conv", [("input", False), ("value", True)])
def test_full_attention_is_its_definition(lepe_of, conv):
    layer = make(LePEAttention2d, lepe_of=lepe_of, conv=conv)
    x = draw(2, 3, 5, DIM)
    query, key, value = F.linear(x, layer.qkv.weight.flatten(1)).flatten(1, 2).chunk(3, dim=-1)
    out = attend(query, key, value, 2, (DIM // 2) ** -0.5).unflatten(1, (3, 5))
    out = out + lepe(layer, x if lepe_of == "input" else value.unflatten(1, (3, 5)))
    expected = F.linear(out, layer.proj.weight.flatten(1), layer.proj.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_more_regions_than_there_are_means_all_of_them():
    few, all_of_them = (make(BiLevelRoutingAttention2d, regions=2, topk=k) for k in (16, 4))
    x = draw(1, 4, 6, DIM)
    assert torch.equal(few(x), all_of_them(x))
    assert torch.equal(*(make(ConvRoutingAttention2d, regions=7, topk=k)(x) for k in (99, 24)))


def test_maps_that_do_not_divide_are_refused_without_padding():
    layer = make(BiLevelRoutingAttention2d, regions=3, auto_pad=False)
    assert layer(draw(1, 6, 3, DIM)).shape == (1, 6, 3, DIM)
    with pytest.raises(ValueError, match=r"\(6, 4\); regions=3 must divide both sides"):
        layer(draw(1, 6, 4, DIM))


LAYERS = [(BiLevelRoutingAttention2d, {"regions": 3}), (ConvRoutingAttention2d, {"regions": 3}), (LePEAttention2d, {})]


@pytest.mark.parametrize("cls, options", LAYERS)
def test_every_parameter_and_the_input_get_a_gradient(cls, options):
    layer, x = make(cls, **options).train(), draw(1, 5, 4, DIM).requires_grad_()
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [*layer.parameters(), x])


@pytest.mark.parametrize("cls, options", LAYERS)
def test_runs_on_meta_names_wrong_shapes_and_refuses_scripting(cls, options):
    layer = make(cls, device="meta", dtype=torch.bfloat16, **options)
    assert layer(torch.empty(2, 5, 6, DIM, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 6, DIM)
    with pytest.raises(ValueError, match=r"\(1, 4, 16\); expected \[B, H, W, 16\]"):
        layer(torch.empty(1, 4, DIM, device="meta"))
    with pytest.raises(NotImplementedError, match=f"TorchScript cannot compile {cls.__name__}"):
        torch.jit.script(layer)


@pytest.mark.parametrize("cls, options, message", [
    (BiLevelRoutingAttention2d, {"num_heads": 3}, "dim=16 must be a multiple of num_heads=3"),
    (BiLevelRoutingAttention2d, {"topk": 0}, "topk=0 must be at least 1"),
    (ConvRoutingAttention2d, {"regions": 0}, "regions=0"),
    (LePEAttention2d, {"lepe_of": "key"}, "lepe_of='key' must be 'input' or 'value'"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **options)
