"""The neighborhood attention layers against their definition, written out with the public operators."""

import pytest
import torch
from foveal.kernels.ops import na1d, na2d, na3d
from foveal.layers.neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from foveal.layers.relative import RelativeAttention2d, resize_bias_table
from torch import nn
from torch.nn import functional as F

LAYERS = {1: NeighborhoodAttention1d, 2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}
OPERATORS = {1: na1d, 2: na2d, 3: na3d}
GRIDS = {1: (11,), 2: (7, 9), 3: (3, 5, 6)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(rank: int, **options) -> nn.Module:
    torch.manual_seed(0)
    defaults = {"num_heads": 4, "window": 3, "dtype": torch.float64}
    layer = LAYERS[rank](16, **(defaults | options))
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5)
    return layer.eval()


@pytest.mark.parametrize("rank", LAYERS)
def test_is_projection_operator_projection(rank):
    layer = make(rank, rpb=True, stride=1, dilation=(1,) * (rank - 1) + (2,))
    x = draw(2, *GRIDS[rank], 16)
    qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (3, 4, 4))
    query, key, value = qkv.unbind(-3)
    out = OPERATORS[rank](query, key, value, window=3, dilation=layer.dilation, bias=layer.rpb)
    expected = F.linear(out.flatten(-2), layer.proj.weight, layer.proj.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_causal_and_strided_windows_reach_the_operator():
    x = draw(1, *GRIDS[2], 16)
    plain = make(2)(x)
    for options in ({"causal": (True, False)}, {"stride": 2}, {"stride": (1, 3)}, {"dilation": 2}):
        assert not torch.allclose(make(2, **options)(x), plain)


def test_grouped_heads_repeat_keys_and_values():
    layer, full = make(2, num_kv_heads=2), make(2)
    query, key, value = layer.qkv.weight.split((16, 8, 8))
    spread = [w.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1) for w in (key, value)]
    query_bias, *rest = layer.qkv.bias.split((16, 8, 8))
    spread_bias = [b.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten() for b in rest]
    full.load_state_dict(layer.state_dict() | {"qkv.weight": torch.cat([query, *spread]),
                                               "qkv.bias": torch.cat([query_bias, *spread_bias])})  # fmt: skip
    x = draw(1, *GRIDS[2], 16)
    torch.testing.assert_close(layer(x), full(x), rtol=1e-12, atol=1e-12)


def test_norms_act_on_queries_and_keys():
    layer = make(2, qk_norm=nn.RMSNorm)
    assert {"q_norm.weight", "k_norm.weight"} <= layer.state_dict().keys()
    x = draw(1, *GRIDS[2], 16)
    query, key, value = layer.qkv(x).unflatten(-1, (3, 4, 4)).unbind(-3)
    out = na2d(layer.q_norm(query), layer.k_norm(key), value, window=3)
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)), rtol=1e-12, atol=1e-12)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding with one angle per pair of channels, from the sum of the coordinates."""
    angle = positions.double().sum(-1)[..., None, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def test_rope_gets_grid_positions_and_depends_on_differences_only():
    layer, plain = make(2, rope=rotate), make(2)
    x = draw(1, *GRIDS[2], 16)
    rows, columns = GRIDS[2]
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    assert not torch.allclose(layer(x), plain(x))
    torch.testing.assert_close(layer(x), layer(x, positions=grid), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), layer(x, positions=grid + 5), rtol=1e-10, atol=1e-10)


def test_rope_module_is_a_submodule():
    class Rope(nn.Module):
        def __init__(self):
            super().__init__()
            self.speed = nn.Parameter(torch.ones(()))

        def forward(self, x, positions):
            return rotate(x, positions * self.speed)

    assert "rope.speed" in make(2, rope=Rope()).state_dict()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_extra_tokens_are_seen_by_every_query(num_kv_heads):
    layer = make(2, qk_norm=nn.RMSNorm, num_kv_heads=num_kv_heads)
    x, extra = draw(2, *GRIDS[2], 16), draw(2, 3, 16, seed=1)
    heads = (4, num_kv_heads, num_kv_heads)
    query, key, value = layer.qkv(x).unflatten(-1, (-1, 4)).split(heads, dim=-2)
    _, additional_keys, additional_values = layer.qkv(extra).unflatten(-1, (-1, 4)).split(heads, dim=-2)
    out = na2d(
        layer.q_norm(query),
        layer.k_norm(key),
        value,
        window=3,
        additional_keys=layer.k_norm(additional_keys),
        additional_values=additional_values,
    )
    torch.testing.assert_close(layer(x, extra=extra), layer.proj(out.flatten(-2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mask", "lengths"])
def test_masked_extra_tokens_go_nowhere(kind):
    """Neither into the output nor, as what they hold is multiplied, into gradients of the projection."""
    layer, x = make(2, qk_norm=nn.RMSNorm), draw(2, *GRIDS[2], 16)
    extra, lengths = draw(2, 3, 16, seed=1), torch.tensor([1, 2])
    mask = torch.arange(3) < lengths[:, None]
    poisoned = extra.masked_fill(~mask[..., None], float("nan"))
    out = layer(x, extra=poisoned, additional_mask=mask if kind == "mask" else lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = layer(x[i : i + 1], extra=extra[i : i + 1, :n])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("rank", LAYERS)
def test_flattened_tokens(rank):
    layer, x, extra = make(rank, rpb=True), draw(2, *GRIDS[rank], 16), draw(2, 3, 16, seed=1)
    out = layer(x.flatten(1, -2), grid=GRIDS[rank], extra=extra)
    assert torch.equal(out, layer(x, extra=extra).flatten(1, -2))
    with pytest.raises(ValueError, match=r"grid=.* must hold the .* tokens of x"):
        layer(x.flatten(1, -2)[:, 1:], grid=GRIDS[rank])


def test_windows_per_head():
    windows, dilations = [(3, 5), (5, 1), (3, 5), (1, 3)], [(1, 1), (1, 2), (2, 1), (1, 1)]
    layer, x = make(2, window=windows, dilation=dilations, rpb=True), draw(2, *GRIDS[2], 16)
    assert layer.rpb.shape == (4, 9, 9) and "window=((3, 5), (5, 1)" in repr(layer)
    query, key, value = layer.qkv(x).unflatten(-1, (3, 4, 4)).unbind(-3)
    heads = []
    for i, (window, dilation) in enumerate(zip(windows, dilations, strict=True)):
        h = slice(i, i + 1)
        bias = layer.rpb[(h, *(slice(5 - w, 4 + w) for w in window))]
        tensors = (t[..., h, :] for t in (query, key, value))
        heads.append(na2d(*tensors, window=window, dilation=dilation, bias=bias, impl="reference"))
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -2).flatten(-2)), rtol=1e-12, atol=1e-12)


def test_padding_reaches_the_largest_window_of_a_head():
    windows = [(3, 5), (5, 1), (3, 5), (1, 3)]
    layer, x = make(2, window=windows, pad=True), draw(1, 4, 3, 16)
    same = make(2, window=windows)
    torch.testing.assert_close(layer(x), same(nn.functional.pad(x, (0, 0, 0, 2, 0, 1)))[:, :4, :3])


@pytest.mark.parametrize("rank", LAYERS)
def test_padding_adds_zero_tokens_before_the_projection(rank):
    grid = (4, 9, 5)[:rank]
    padded, plain = make(rank, pad=True, dilation=2, rpb=True), make(rank, dilation=2, rpb=True)
    x = draw(2, *grid, 16)
    target = [max(n, 6) for n in grid]
    canvas = torch.zeros(2, *target, 16, dtype=torch.float64)
    inside = (slice(None), *(slice(n) for n in grid))
    canvas[inside] = x
    torch.testing.assert_close(padded(x), plain(canvas)[inside], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="window=3"):
        plain(x)


def test_runs_under_autocast():
    layer = make(2, rpb=True, qk_norm=nn.LayerNorm, rope=rotate, dtype=torch.float32)
    x, extra = draw(1, *GRIDS[2], 16).float(), draw(1, 2, 16, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, extra=extra)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, extra=extra), rtol=0.05, atol=0.05 * layer(x).abs().max().item())


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_runs_inside_autocast(compiled):
    layer = make(2, rpb=True, dtype=torch.float32)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = draw(1, *GRIDS[2], 16).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(x).float().square().sum().backward()
    exact = x.detach().requires_grad_()
    layer(exact).square().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad, rtol=0.05, atol=0.05 * exact.grad.abs().max().item())


def test_padding_leaves_large_maps_alone():
    x = draw(1, 8, 6, 16)
    assert torch.equal(make(2, pad=True, dilation=2)(x), make(2, dilation=2)(x))


def test_names_are_those_of_the_checkpoints():
    assert list(make(2, rpb=True).state_dict()) == ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert list(make(2, qkv_bias=False, proj_bias=False).state_dict()) == ["qkv.weight", "proj.weight"]
    assert make(3, rpb=True, window=(1, 3, 5)).rpb.shape == (4, 1, 5, 9)


def test_meta_then_empty_then_reset():
    layer = NeighborhoodAttention2d(16, num_heads=4, window=3, rpb=True, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.empty(2, 5, 6, 16, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 6, 16)
    layer.to_empty(device="cpu")
    layer.rpb.data.fill_(float("nan"))
    layer.reset_parameters()
    assert 0 < layer.rpb.abs().max() < 0.2


@pytest.mark.parametrize("options, message", [
    ({"num_heads": 3}, "dim=16 must be a multiple of num_heads=3"),
    ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ({"window": 4, "rpb": True}, "must be odd"),
    ({"window": (3, 3, 3)}, r"window=\(3, 3, 3\)"),
    ({"window": [(3, 3)] * 3}, "has 3 entries; expected one for each of 4 heads"),
    ({"stride": [(1, 1)] * 3 + [(1,)]}, r"stride\[3\]=\(1,\)"),
    ({"window": [(3, 3)] * 3 + [(3, 4)], "rpb": True}, "must be odd"),
    ({"dilation": (1,)}, r"dilation=\(1,\)"),
    ({"pad": True, "rope": rotate}, "pad=True cannot be combined with rope"),
])  # fmt: skip
def test_contradictory_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(2, **options)


@pytest.mark.parametrize("shape", [(1, 7, 16), (1, 7, 9, 12), (7, 9, 16)])
def test_wrong_input_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 2 spatial axes, 16\]"):
        make(2)(torch.zeros(shape, dtype=torch.float64))


def test_scripting_is_refused_in_one_sentence():
    for layer in (make(2), RelativeAttention2d(16, num_heads=4, grid_size=(3, 3))):
        with pytest.raises(NotImplementedError, match="TorchScript cannot compile"):
            torch.jit.script(layer)


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_compiles_without_graph_break_and_exports(rank):
    layer = make(rank, rpb=True, pad=True, dilation=2)
    x = draw(2, *GRIDS[rank], 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-12, atol=1e-12)


def test_every_parameter_and_the_input_get_a_gradient():
    layer = make(2, rpb=True, qk_norm=nn.RMSNorm).train()
    x = draw(1, *GRIDS[2], 16).requires_grad_()
    layer(x, extra=draw(1, 2, 16)).square().sum().backward()
    gradients = {name: p.grad for name, p in [*layer.named_parameters(), ("x", x)]}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_dense_relative_attention_is_neighborhood_attention_over_the_whole_map():
    dense = RelativeAttention2d(16, num_heads=4, grid_size=(5, 7), dtype=torch.float64)
    whole = NeighborhoodAttention2d(16, num_heads=4, window=(5, 7), rpb=True, dtype=torch.float64)
    nn.init.normal_(dense.rpb)
    whole.load_state_dict(dense.state_dict())
    x = draw(2, 5, 7, 16)
    torch.testing.assert_close(dense(x), whole(x), rtol=1e-10, atol=1e-12)


def test_dense_relative_attention_knows_its_grid():
    layer = RelativeAttention2d(16, num_heads=4, grid_size=(4, 4))
    with pytest.raises(ValueError, match=r"\(4, 5\); expected grid_size=\(4, 4\)"):
        layer(torch.zeros(1, 4, 5, 16))
    layer.rpb.requires_grad_(False)
    layer.set_grid_size((4, 5))
    assert layer(torch.zeros(1, 4, 5, 16)).shape == (1, 4, 5, 16)
    assert layer.rpb.shape == (4, 7, 9) and not layer.rpb.requires_grad


def test_resizing_keeps_symmetry_constants_and_equal_sizes():
    table = draw(3, 13, 13)
    assert resize_bias_table(table, (13, 13)) is table
    resized = resize_bias_table(table + table.flip(1, 2), (21, 17))
    assert resized.shape == (3, 21, 17) and resized.dtype == torch.float64
    torch.testing.assert_close(resized, resized.flip(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(resize_bias_table(torch.ones(1, 13, 13), (21, 21)), torch.ones(1, 21, 21))


def test_products_in_e4m3_are_for_inference_only():
    layer = NeighborhoodAttention2d(32, num_heads=1, window=3).eval()
    x = torch.randn(1, 6, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = layer(x)
    layer.qk_dtype = torch.float8_e4m3fn
    with torch.no_grad():
        rounded = layer(x)
    assert 1e-5 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    with pytest.raises(NotImplementedError, match="qk_dtype"):
        layer(x)
