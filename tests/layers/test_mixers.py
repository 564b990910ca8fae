"""Layers of the second half of the zoo: by definition, on odd maps, in half precision, on the meta device."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.layers import (
    BinaryAttention2d,
    DenseAttention2d,
    EfficientAttention2d,
    FlowAttention2d,
    GlobalCosineAttention2d,
    HeadRouter,
    PartialAttention2d,
    PixelFocusedAttention2d,
    PostSoftmaxCausalAttention2d,
    Shift2d,
    SparseMlp2d,
    TokenMlp2d,
    TripletAttention2d,
    balance_loss,
)
from foveal.layers.aggregated import axis_offsets
from foveal.layers.binary import bias_of_offsets, resize_offsets, signs
from foveal.layers.causal import rotate_by_index
from foveal.layers.mixture import taken_rows
from foveal.layers.partial import distance_buckets
from foveal.zoo.backbones.ninformer import InnerGate
from golden_weights import image_a, value
from torch import nn
from torch.nn import functional as F

GOLDENS = Path(__file__).parents[1] / "goldens"
GRID = (5, 7)
DD = {"dtype": torch.float64}
MIXED = {"num_heads": 4, "grid_size": GRID, "shared": 1, "routed": 2}
LAYERS = {
    "shift": lambda **dd: Shift2d(16, divisions=5),
    "token_mlp": lambda **dd: TokenMlp2d(16, grid_size=GRID, **dd),
    "sparse_mlp": lambda **dd: SparseMlp2d(16, grid_size=GRID, **dd),
    "dense": lambda **dd: DenseAttention2d(16, num_heads=2, **dd),
    "causal": lambda **dd: PostSoftmaxCausalAttention2d(16, num_heads=2, **dd),
    "flow": lambda **dd: FlowAttention2d(16, num_heads=2, **dd),
    "efficient": lambda **dd: EfficientAttention2d(16, key_dim=8, value_dim=12, num_heads=2, **dd),
    "triplet": lambda **dd: TripletAttention2d(**dd),
    "global_cosine": lambda **dd: GlobalCosineAttention2d(16, **MIXED, **dd),
    "pixel_focused": lambda **dd: PixelFocusedAttention2d(16, pool=2, **MIXED, **dd),
    "partial_gate": lambda **dd: PartialAttention2d(16, kind="gate", **dd),
    "partial_attn": lambda **dd: PartialAttention2d(16, kind="attn", num_heads=2, **dd),
}  # on maps; BinaryAttention2d takes tokens and has tests of its own


def hot(layer: nn.Module) -> nn.Module:
    """A layer whose every parameter is random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.eval()


def draw(*size: int, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LAYERS)
def test_contract(name):
    """Shapes, gradients, half precision, strides, the meta device, errors."""
    layer = hot(LAYERS[name](**DD))
    x = draw(2, *GRID, 16).requires_grad_()
    out = layer(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    out.square().sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    strided = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(strided), out, rtol=1e-9, atol=1e-9)
    assert torch.isfinite(LAYERS[name](dtype=torch.bfloat16).eval()(x.detach().bfloat16())).all()
    assert LAYERS[name](device="meta")(torch.empty(2, *GRID, 16, device="meta")).shape == x.shape
    with pytest.raises(ValueError, match="shape"):
        layer(draw(2, 35, 16))


@pytest.mark.parametrize("name", [name for name in LAYERS if "mlp" not in name])
def test_single_tokens_and_rows_go_through(name):
    layer = hot(LAYERS[name](**DD))
    for size in ((1, 1), (1, 6)):
        assert layer(draw(1, *size, 16)).isfinite().all()


def test_shift_moves_content_left_right_up_and_down():
    x = torch.arange(12.0).view(1, 3, 4, 1).expand(1, 3, 4, 5)
    out = Shift2d(5, divisions=5)(x)
    for i, shifts in enumerate([(0, -1), (0, 1), (-1, 0), (1, 0)]):
        moved = torch.roll(x[0, :, :, 0], shifts, dims=(0, 1))
        moved[
            {-1: -1, 1: 0}[shifts[0]] if shifts[0] else slice(None),
            {-1: -1, 1: 0}[shifts[1]] if shifts[1] else slice(None),
        ] = 0
        assert torch.equal(out[0, :, :, i], moved)
    assert torch.equal(out[..., 4], x[..., 4])


def test_post_softmax_causal_attention_is_causal_attention_times_the_ratio_of_normalisers():
    layer = hot(PostSoftmaxCausalAttention2d(8, num_heads=2, class_token=True, **DD))
    x = draw(1, 1 + 6, 8)
    ordered = x.roll(-1, dims=1)  # the class token is last in the order
    query, key, val = layer.qkv(ordered).unflatten(-1, (3, 2, 4)).unbind(2)
    query, key, val = (t.transpose(1, 2) for t in (rotate_by_index(query), rotate_by_index(key), val))
    scores = query @ key.mT / 2
    causal = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    ratio = (causal.logsumexp(-1) - scores.logsumexp(-1)).exp()
    out = F.scaled_dot_product_attention(query, key, val, is_causal=True) * ratio[..., None]
    expected = layer.proj(out.transpose(1, 2).flatten(2)).roll(1, dims=1)
    torch.testing.assert_close(layer(x, grid_size=(2, 3)), expected)
    layer.softness = 1.0
    full = layer.proj((scores.softmax(-1) @ val).transpose(1, 2).flatten(2)).roll(1, dims=1)
    torch.testing.assert_close(layer(x, grid_size=(2, 3)), full)
    with pytest.raises(ValueError, match=r"softness=2 must lie in \[0, 1\]"):
        PostSoftmaxCausalAttention2d(8, num_heads=2, softness=2)


def test_rotation_by_index_depends_on_distances_alone():
    q, k = draw(1, 1, 1, 8).expand(1, 9, 1, 8), draw(1, 1, 1, 8, seed=2).expand(1, 9, 1, 8)
    scores = rotate_by_index(q)[0, :, 0] @ rotate_by_index(k)[0, :, 0].T
    for offset in range(-8, 9):
        line = scores.diagonal(offset)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert scores[0].std() > 0.1


def test_signs_multiply_like_counted_bits():
    query, key = draw(3, 64), draw(5, 64, seed=2)
    different = ((query >= 0)[:, None] ^ (key >= 0)).sum(-1)
    assert torch.equal(signs(query) @ signs(key).T, (64 - 2 * different).double())


def test_binary_attention_rounds_as_stated_and_passes_gradients_straight_through():
    layer = hot(BinaryAttention2d(8, num_heads=2, grid_size=(2, 3), **DD))
    x = draw(2, 7, 8).requires_grad_()
    query, key, val = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    bits = [t.abs().mean((-2, -1), keepdim=True) * torch.where(t >= 0, 1.0, -1.0) for t in (query, key)]
    bias = torch.empty(2, 7, 7, **DD)
    for i in range(7):
        for j in range(7):
            (a, b), (c, d) = divmod(i - 1, 3), divmod(j - 1, 3)
            row = (a - c + 1) * 5 + b - d + 2 if i and j else 15 + (2 if i == j else 0 if i == 0 else 1)
            bias[:, i, j] = layer.relative_position_bias_table[row]
    torch.testing.assert_close(bias_of_offsets(layer.relative_position_bias_table, (2, 3)), bias)
    weights = ((bits[0] @ bits[1].mT / 2 + bias).softmax(-1) * 255).round() / 255
    scale = 127 / (val.abs().amax(-2, keepdim=True) + 1e-6)
    out = weights @ ((val * scale).round() / (scale + 1e-6))
    expected = layer.proj(out.transpose(1, 2).flatten(2))
    got = layer(x, grid_size=(2, 3))
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert layer.qkv.weight.grad.abs().min() > 0 and layer.relative_position_bias_table.grad.abs().max() > 0
    with pytest.raises(ValueError, match="grid_size=None"):
        layer(x)


def test_bias_tables_of_offsets_are_resized_around_the_class_rows():
    table = draw(3 * 5 + 3, 2)
    assert torch.equal(resize_offsets(table, (2, 3), (2, 3)), table)
    larger = resize_offsets(table, (2, 3), (4, 4))
    assert larger.shape == (7 * 7 + 3, 2) and torch.equal(larger[-3:], table[-3:])


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_flow_attention_by_definition(floor):
    layer = hot(FlowAttention2d(8, num_heads=2, floor=floor, **DD))
    x = draw(1, 3, 4, 8)
    out = torch.empty(12, 2, 4, **DD)
    query, key, val = layer.qkv(x.flatten(1, 2))[0].unflatten(-1, (3, 2, 4)).unbind(1)
    eps = 1e-6
    for h in range(2):
        q, k, v = query[:, h].sigmoid(), key[:, h].sigmoid(), val[:, h]
        taken = 1 / ((q + eps) @ (k.sum(0) + eps) + floor)
        given = 1 / ((k + eps) @ (q.sum(0) + eps) + floor)
        allocation = ((q + eps) @ ((k * given[:, None]).sum(0) + eps) + floor).sigmoid()
        competition = ((k + eps) @ ((q * taken[:, None]).sum(0) + eps) + floor).clamp(-1, 1).softmax(0) * 12
        out[:, h] = (q * taken[:, None]) @ (k.T @ (v * competition[:, None])) * allocation[:, None]
    torch.testing.assert_close(layer(x)[0], layer.proj(out.flatten(1)).view(3, 4, 8))


def recorded(name: str, shapes: dict[str, tuple[int, ...]], rename, layer: nn.Module, size: tuple[int, ...]):
    """Every fifth output of the official layer with "hot" weights, and ours with the same."""
    weights = {rename(key): torch.from_numpy(value(key, shape, "hot")) for key, shape in shapes.items()}
    layer.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        out = layer.eval()(image_a(size))
    return np.load(GOLDENS / "mixers.npz")[name], out


def test_efficient_attention_is_the_official_one():
    names = {"keys": 32, "queries": 32, "values": 64}
    shapes = {f"{n}.{leaf}": (dim, 64, 1, 1) if leaf == "weight" else (dim,)
              for n, dim in names.items() for leaf in ("weight", "bias")}  # fmt: skip
    shapes |= {"reprojection.weight": (64, 64, 1, 1), "reprojection.bias": (64,)}

    class ChannelsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = EfficientAttention2d(64, key_dim=32, value_dim=64, num_heads=4)

        def load_state_dict(self, weights, strict):
            self.layer.load_state_dict({k: v.flatten(1) if v.dim() > 1 else v for k, v in weights.items()}, strict)

        def forward(self, x):
            return x + self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # the official layer adds its input

    expected, out = recorded("efficient", shapes, lambda key: key, ChannelsFirst(), (2, 64, 14, 14))
    assert np.abs(out.flatten()[::5].numpy() - expected).max() < 1e-5


def test_flow_attention_is_the_official_one():
    parts = ("query", "key", "value", "out")
    shapes = {f"{n}_projection.{leaf}": (64, 64) if leaf == "weight" else (64,)
              for n in parts for leaf in ("weight", "bias")}  # fmt: skip

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FlowAttention2d(64, num_heads=4, floor=0.0)

        def load_state_dict(self, w, strict):
            joined = {
                f"qkv.{leaf}": torch.cat([w[f"{n}_projection.{leaf}"] for n in parts[:3]])
                for leaf in ("weight", "bias")
            }
            self.layer.load_state_dict(
                joined | {f"proj.{leaf}": w[f"out_projection.{leaf}"] for leaf in ("weight", "bias")}
            )

        def forward(self, x):
            return self.layer(x[:, :, None])[:, :, 0]

    expected, out = recorded("flow", shapes, lambda key: key, Tokens(), (2, 196, 64))
    assert np.abs(out.flatten()[::5].numpy() - expected).max() < 1e-5


def test_triplet_attention_by_definition():
    layer = hot(TripletAttention2d(kernel_size=3, **DD))
    x = draw(2, 4, 5, 6)

    def gate(part, axes):  # the plane first, what is pooled last
        y = x.permute(0, *axes)
        pooled = torch.stack([y.amax(-1), y.mean(-1)], 1)
        back = [0] + [axes.index(i) + 1 for i in (1, 2, 3)]
        return (y * part.spatial(pooled)[:, 0, ..., None].sigmoid()).permute(back)

    parts = [
        gate(layer.ChannelGateH, (3, 2, 1)),
        gate(layer.ChannelGateW, (1, 3, 2)),
        gate(layer.SpatialGate, (1, 2, 3)),
    ]
    torch.testing.assert_close(layer(x), sum(parts) / 3)
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        TripletAttention2d(kernel_size=4)


@pytest.mark.parametrize("shared, routed", [(1, 2), (2, 1), (0, 3), (4, 0)])
def test_router_leaves_heads_out_and_keeps_the_sum(shared, routed):
    router = hot(HeadRouter(16, num_heads=4, shared=shared, routed=routed, **DD))
    weights = router(draw(2, 9, 16))
    assert weights.shape == (2, 9, 4)
    assert ((weights[..., shared:] > 0).sum(-1) == routed).all()
    total = float(shared + routed) if not (shared and routed) else None
    if total is not None:
        torch.testing.assert_close(weights.sum(-1), torch.full((2, 9), total, **DD))
    router.train()(draw(2, 9, 16))
    assert (router.balance_loss is not None) is bool(routed)
    assert torch.isfinite(balance_loss(router))
    assert copy.deepcopy(router).balance_loss is None  # a loss has a graph, which cannot be copied
    with pytest.raises(ValueError, match="routed=5"):
        HeadRouter(16, num_heads=4, shared=shared, routed=5)


@pytest.mark.parametrize("kind", [GlobalCosineAttention2d, PixelFocusedAttention2d])
def test_heads_that_are_skipped_change_nothing(kind):
    options = {} if kind is GlobalCosineAttention2d else {"pool": 2}
    layers = [hot(kind(16, skip_heads=skip, **MIXED, **options, **DD)) for skip in (False, True)]
    x = draw(2, *GRID, 16)
    torch.testing.assert_close(layers[1](x), layers[0](x))
    grads = []
    for layer in layers:
        layer(x).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    weights = layers[0].router(x.flatten(1, 2))[..., 1:]
    rows = taken_rows(weights)
    assert rows.shape[-1] == (weights > 0).sum(1).max()
    for image, head in ((0, 0), (1, 2)):
        assert set((weights[image, :, head] > 0).nonzero()[:, 0].tolist()) <= set(rows[image, head].tolist())


def test_offsets_of_pooled_keys_are_those_of_the_middles_of_cells():
    offsets, index = axis_offsets(7, 4, 2, 7, torch.device("cpu"))
    middles = torch.tensor([0.5, 2.5, 4.5, 6.5])
    torch.testing.assert_close(offsets[index], (torch.arange(7.0)[:, None] - middles) / 6 * 8)


def test_pixel_focused_attention_by_definition():
    layer = hot(PixelFocusedAttention2d(8, num_heads=2, grid_size=(4, 6), pool=2, **DD))
    x = draw(1, 4, 6, 8)
    pooled = layer.norm(F.avg_pool2d(F.gelu(layer.sr(x.permute(0, 3, 1, 2))), 2).permute(0, 2, 3, 1))
    query, key, val = layer.q(x), *layer.kv(x).chunk(2, -1)
    far_key, far_val = layer.kv(pooled).flatten(1, 2).chunk(2, -1)
    bias = layer.pair_bias((4, 6), (2, 3), 2)
    out = torch.zeros(1, 4, 6, 8, **DD)
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        unit = F.normalize(query[..., part], dim=-1)
        for i in range(4):
            for j in range(6):
                cells = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
                on = [0 <= a < 4 and 0 <= b < 6 for a, b in cells]
                q = (unit[0, i, j] + layer.query_embedding[h, 0]) * F.softplus(layer.temperature[h, 0, 0])
                q = q * torch.tensor(float(sum(on) + 6)).log()
                near = [
                    F.normalize(key[0, a, b, part], dim=-1) if ok else None
                    for (a, b), ok in zip(cells, on, strict=True)
                ]
                local = [q @ k + layer.relative_pos_bias_local[h, n] for n, k in enumerate(near) if k is not None]
                far = F.normalize(far_key[0, :, part], dim=-1) @ q + bias[h, 6 * i + j]
                weights = torch.cat([torch.stack(local), far]).softmax(0)
                learnt = unit[0, i, j] @ layer.learnable_tokens[h] + layer.learnable_bias[h, 0]
                total, n = weights[len(local) :] @ far_val[0, :, part], 0
                for c, ((a, b), ok) in enumerate(zip(cells, on, strict=True)):
                    if ok:
                        total, n = total + (weights[n] + learnt[c]) * val[0, a, b, part], n + 1
                out[0, i, j, part] = total
    torch.testing.assert_close(layer(x), layer.proj(out), rtol=1e-6, atol=1e-6)  # offsets are float32


def test_distances_beyond_the_near_share_buckets():
    buckets = distance_buckets((1, 200), torch.device("cpu"))[0]
    assert torch.equal(buckets[:21], torch.arange(40, 61))
    assert buckets[160] == buckets[199] == 80 and (buckets.diff() >= 0).all()


def test_mlps_along_tokens_refuse_another_grid():
    for layer in (TokenMlp2d(4, grid_size=(2, 3)), SparseMlp2d(4, grid_size=(2, 3))):
        with pytest.raises(ValueError, match=r"expected \[B, 2, 3, 4\].*img_size="):
            layer(torch.zeros(1, 3, 2, 4))
    with pytest.raises(ValueError, match=r"grid_size=\(3, 2\) must be \(2, 3\)"):
        TokenMlp2d(4, grid_size=(2, 3)).set_grid_size((3, 2))


def test_an_inner_network_gates_a_linear_layer():
    """NiNformer: the gate is a function of all tokens, what it scales of the own token alone."""
    gate, x = InnerGate(8, grid_size=(3, 4)).double(), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    inner = gate.mixer(x.flatten(1, 2)).view(x.shape)
    torch.testing.assert_close(gate(x), gate.proj(x) * inner)
    elsewhere = x.clone()
    elsewhere[:, 2, 3, 0] += 1
    assert not torch.equal(gate(x)[:, 0, 0], gate(elsewhere)[:, 0, 0])
    gate.mixer.forward = torch.ones_like  # a network that lets everything pass
    torch.testing.assert_close(gate(x), gate.proj(x))
    torch.testing.assert_close(gate(x)[:, 0, 0], gate(elsewhere)[:, 0, 0])
