"""The agent attention layer against its definition, and what it keeps between calls."""

import copy
import io
import pickle

import pytest
import torch
from foveal.layers import AgentAttention2d, AgentBranch2d, agent
from foveal.layers.agent import resize_axis_bias
from torch import nn
from torch.nn import functional as F

GRID, HEADS, AGENTS, DIM = (5, 7), 2, 9, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**options) -> AgentAttention2d:
    torch.manual_seed(0)
    defaults = {"num_heads": HEADS, "num_agents": AGENTS, "grid_size": GRID, "dtype": torch.float64}
    layer = AgentAttention2d(DIM, **(defaults | options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def defined(layer: AgentAttention2d, x: torch.Tensor, *, grid=GRID) -> torch.Tensor:
    """Equations 4 and 5 of the paper and the bias rule of the official code, head by head."""
    rows, columns = grid
    first = int(layer.class_token)
    tokens = x if first else x.flatten(1, 2)
    if layer.separate_query:
        query, (key, value) = layer.q(tokens), layer.kv(tokens).chunk(2, dim=-1)
    else:
        query, key, value = layer.qkv(tokens).chunk(3, dim=-1)
    pooled = F.adaptive_avg_pool2d(query[:, first:].transpose(1, 2).unflatten(2, grid), 3).flatten(2).transpose(1, 2)
    out = []
    for h in range(HEADS):
        q, k, v, a = (t.unflatten(-1, (HEADS, -1))[:, :, h] for t in (query, key, value, pooled))
        spread = [F.interpolate(t[None, h], size=grid, mode="bilinear")[0] for t in (layer.an_bias, layer.na_bias)]
        to_agents = (spread[0] + layer.ah_bias[0, h] + layer.aw_bias[0, h]).flatten(1)  # [agents, tokens]
        axes = (layer.ha_bias[0, h] + layer.wa_bias[0, h]).flatten(0, 1)  # [tokens, agents]
        to_queries = spread[1].flatten(1).T + axes
        if first:
            to_agents = torch.cat([layer.ac_bias[0, h], to_agents], dim=1)
            to_queries = torch.cat([layer.ca_bias[0, h], to_queries], dim=0)
        scale = q.shape[-1] ** -0.5
        gathered = (scale * a @ k.transpose(1, 2) + to_agents).softmax(-1) @ v
        out.append((scale * q @ a.transpose(1, 2) + to_queries).softmax(-1) @ gathered)
    local = layer.dwc(value[:, first:].transpose(1, 2).unflatten(2, (rows, columns))).flatten(2).transpose(1, 2)
    mixed = torch.cat(out, dim=-1) + F.pad(local, (0, 0, first, 0))
    return layer.proj(mixed).view(x.shape)


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"separate_query": True}], ids=str)
def test_is_the_definition(options):
    layer = make(**options)
    x = draw(2, 36, DIM) if "class_token" in options else draw(2, *GRID, DIM)
    torch.testing.assert_close(layer(x), defined(layer, x), rtol=1e-10, atol=1e-12)


def test_branch_has_no_projections():
    layer = make()
    branch = AgentBranch2d(
        DIM, num_heads=HEADS, num_agents=AGENTS, grid_size=GRID, conv_name="get_v", dtype=torch.float64
    )
    state = {k.replace("dwc", "get_v"): v for k, v in layer.state_dict().items() if not k.startswith(("qkv", "proj"))}
    branch.load_state_dict(state)
    x = draw(2, *GRID, DIM)
    query, key, value = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(3)
    torch.testing.assert_close(layer.proj(branch.eval()(query, key, value)), layer(x))


def test_names_and_shapes_are_those_of_the_checkpoints():
    shapes = {name: tuple(value.shape) for name, value in make(class_token=True).state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.endswith("_bias")} == {
        "an_bias": (2, 9, 7, 7), "na_bias": (2, 9, 7, 7), "ah_bias": (1, 2, 9, 5, 1), "aw_bias": (1, 2, 9, 1, 7),
        "ha_bias": (1, 2, 5, 1, 9), "wa_bias": (1, 2, 1, 7, 9), "ac_bias": (1, 2, 9, 1), "ca_bias": (1, 2, 1, 9),
    }  # fmt: skip
    assert {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "dwc.weight", "dwc.bias"} < shapes.keys()
    assert {"q.weight", "kv.weight"} < make(separate_query=True).state_dict().keys()


def test_other_maps_take_the_biases_that_resizing_gives():
    layer, resized = make(), make()
    resized.set_grid_size((8, 3))
    assert resized.ah_bias.shape == (1, 2, 9, 8, 1) and resized.wa_bias.shape == (1, 2, 1, 3, 9)
    x = draw(2, 8, 3, DIM)
    assert torch.equal(layer(x), resized(x))
    tokens = make(class_token=True)
    assert tokens(draw(1, 25, DIM), grid_size=(8, 3)).shape == (1, 25, DIM)


def test_axis_biases_are_interpolated_linearly():
    bias = draw(1, 2, 9, 4, 1)
    assert resize_axis_bias(bias, 3, 4) is bias
    ramp = torch.arange(4.0).view(1, 1, 1, 4, 1).expand(1, 2, 9, 4, 1)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]).view(1, 1, 1, 8, 1).expand(1, 2, 9, 8, 1)
    torch.testing.assert_close(resize_axis_bias(ramp, 3, 8), expected)


def kept(layer: AgentAttention2d) -> bool:
    """Whether two calls hand out the same tensors."""
    first, second = layer.biases(GRID), layer.biases(GRID)
    return all(a is b for a, b in zip(first, second, strict=True))


def test_biases_are_combined_once_in_evaluation_without_gradients():
    layer = make()
    assert not kept(layer)
    with torch.no_grad():
        assert kept(layer)
        assert not kept(layer.train())
    assert kept(layer.eval().requires_grad_(False))


CHANGES = {
    "in place": lambda layer, other: layer.ah_bias.copy_(other.ah_bias),
    "loaded": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "assigned": lambda layer, other: layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "data": lambda layer, other: setattr(layer.an_bias, "data", other.an_bias.data),
    "rounded": lambda layer, other: layer.bfloat16().double(),
    "optimizer": lambda layer, other: torch.optim.SGD([layer.ha_bias], lr=1.0).step(),
    "grid": lambda layer, other: layer.set_grid_size((4, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_biases_follow_the_weights(change):
    layer, other = make(), make()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    layer.ha_bias.grad = torch.ones_like(layer.ha_bias)
    with torch.no_grad():
        before = [bias.clone() for bias in layer.biases(GRID)]
        CHANGES[change](layer, other)
        after = layer.biases(GRID)
        fresh = copy.deepcopy(layer).train().biases(GRID)
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_kept_biases_depend_on_the_map():
    layer, x = make(), draw(1, 4, 4, DIM)
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
        layer(draw(1, *GRID, DIM))
        assert torch.equal(layer(x), expected)


def test_tensors_of_inference_mode_stay_there():
    layer = make().requires_grad_(False)
    with torch.inference_mode():
        assert kept(layer)
    x = draw(1, *GRID, DIM).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_kept_biases_are_in_no_copy():
    layer = make().requires_grad_(False)
    x = draw(1, *GRID, DIM)
    sizes = []
    for _ in range(2):
        stream = io.BytesIO()
        torch.save(layer, stream)
        sizes.append((len(stream.getvalue()), len(pickle.dumps(layer)), len(layer.state_dict())))
        layer(x)
    assert sizes[0] == sizes[1]
    twin = copy.deepcopy(layer)
    nn.init.normal_(twin.an_bias)
    assert not torch.equal(twin(x), layer(x))


def test_compiled_graphs_keep_nothing():
    layer, x = make(), draw(1, *GRID, DIM)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), layer(x), rtol=1e-12, atol=1e-12)
        layer.aw_bias.mul_(-3)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-12, atol=1e-12)
        exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-12, atol=1e-12)


def test_every_parameter_and_the_input_get_a_gradient():
    layer, x = make(class_token=True).train(), draw(2, 36, DIM).requires_grad_()
    layer(x).square().sum().backward()
    gradients = {name: p.grad for name, p in [*layer.named_parameters(), ("x", x)]}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_meta_then_empty_then_reset():
    layer = AgentAttention2d(8, num_heads=2, num_agents=4, grid_size=(3, 3), device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(2, 3, 3, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 3, 8)
    layer.to_empty(device="cpu")
    layer.an_bias.data.fill_(float("nan"))
    layer.reset_parameters()
    assert 0 < layer.an_bias.abs().max() < 0.2


@pytest.mark.parametrize("options, message", [
    ({"num_heads": 3}, "dim=8 must be a multiple of num_heads=3"),
    ({"num_agents": 8}, "num_agents=8 must be a square"),
])  # fmt: skip
def test_contradictory_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 8\]"):
        make()(draw(1, 35, DIM))
    with pytest.raises(ValueError, match=r"expected \[B, 1 \+ H \* W, 8\]"):
        make(class_token=True)(draw(1, *GRID, DIM))
    with pytest.raises(ValueError, match=r"x has 35 tokens; expected a class token and grid_size=\(5, 7\)"):
        make(class_token=True)(draw(1, 35, DIM))


def test_scripting_is_refused_in_one_sentence():
    with pytest.raises(NotImplementedError, match=r"^TorchScript cannot compile AgentAttention2d; use torch\.export"):
        torch.jit.script(make())


@pytest.mark.parametrize("size", [(8, 8), (12, 7), (31, 24), (3, 5)])
def test_exported_pooling_is_the_pooling_of_every_size(size, monkeypatch):
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = agent.pool_to_square(x, 3)
    monkeypatch.setattr(agent, "exporting", lambda: True)
    torch.testing.assert_close(agent.pool_to_square(x, 3), expected)
