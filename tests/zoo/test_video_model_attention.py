"""Every kind of attention of VideoDiT against its definition: all logits, a mask, a softmax, in float64."""

import copy
import math

import pytest
import torch
from foveal.kernels.block_sparse.mask import boxes
from foveal.kernels.block_sparse.reference import dense_bias
from foveal.kernels.masks.named import resolve
from foveal.kernels.ops import block_sparse_attention, masks
from foveal.layers import Scan2d, gate_loss
from foveal.zoo.video.attention import VideoAttention
from foveal.zoo.video.pattern import Pattern, attend
from foveal.zoo.video.positions import default_axes, grid_positions, rotary_embedding
from torch.nn import functional as F
from video_helpers import draw, inputs, make, visible
from video_models import tiny_model

HEADS, SIZE = 2, 12
DIM = HEADS * SIZE
LAYERS = [
    {"type": "dense"},
    {"type": "spatial"},
    {"type": "temporal"},
    {"type": "window", "window": (3, 3, 3)},
    {"type": "window", "window": (2, 4, 3), "stride": (2, 2, 1)},
    {"type": "window", "window": (2, 2, 3), "dilation": (2, 2, 1)},
    {"type": "window", "window": (4, 2, 3), "stride": (2, 1, 3), "dilation": (2, 1, 1)},
    {"type": "window", "window": (9, 9, 9), "stride": (7, 1, 1), "dilation": (3, 3, 1)},
]
GRIDS = [(5, 4, 6), (1, 5, 4), (3, 2, 1)]


def name(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(str(x).replace(", ", "") for x in value.values())
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def module(pattern: Pattern | None, **options) -> VideoAttention:
    torch.manual_seed(0)
    layer = VideoAttention(DIM, heads=HEADS, head_dim=SIZE, pattern=pattern, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as multiplication of complex numbers; x `[B, S, heads, d]`."""
    angles = []
    for axis, channels in enumerate(default_axes(SIZE)):
        angles += [positions[:, axis].double() / 10000.0 ** (2 * i / channels) for i in range(channels // 2)]
    angle = torch.stack(angles, dim=-1)[:, None]  # [S, 1, d / 2]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def heads(x: torch.Tensor, linear: torch.nn.Linear, norm: torch.nn.RMSNorm | None) -> torch.Tensor:
    x = F.linear(x, linear.weight, linear.bias).unflatten(-1, (HEADS, SIZE))
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5
    weights = logits.masked_fill(~keep, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


SPARSE = [
    {"type": "sparse", "mask": "vsa", "options": {"block": (2, 2, 3)}, "budget": 0.4},
    {"type": "sparse", "mask": "sta", "options": {"tile": (1, 2, 2)}},
    {"type": "sparse", "mask": "hip", "options": {"tokens": 8, "query_block": 4, "key_block": 2}, "flat": True},
    {"type": "sparse", "mask": "moa", "options": {"alpha": [9.0, 3.0], "block": 4}, "flat": True},
]


def case(layer, grid, text):
    """A layer in float64, video, text and visible words."""
    attention = module(Pattern.from_config(layer), text="none" if text is None else "full")
    words = 0 if text is None else 3
    x, prompt = draw(2, grid[0] * grid[1] * grid[2], DIM), draw(2, words, DIM, seed=1) if words else None
    count = torch.ones(2, words, dtype=torch.bool)
    if text == "masked":
        count = torch.tensor([[True, False, True], [False] * 3])
    return attention, x, prompt, count


def queries_and_keys(attention, x, grid) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k))
    query, key = (turn(heads(x, linear, norm), grid_positions(grid)) for linear, norm in pairs)
    return query, key


def check_definition(attention, x, prompt, count, grid, see, *, masked, causal=False) -> None:
    """Outputs are those of a softmax over all visible tokens; `see` is `[B or 1, heads or 1, tokens, tokens]`."""
    words, tokens = count.shape[1], x.shape[1]
    rope = rotary_embedding(grid_positions(grid), axes=default_axes(SIZE), theta=10000.0, dtype=torch.float64)
    out, out_text = attention(x, prompt, count if masked else None, rope, grid)
    q, k = queries_and_keys(attention, x, grid)
    v = heads(x, attention.to_v, None)
    see = see.expand(2, see.shape[1], tokens, tokens)
    if prompt is None:
        assert out_text is None
        expected = softmax_attention(q, k, v, see)
    else:
        text_q = heads(prompt, attention.add_q_proj, attention.norm_added_q)
        text_k = heads(prompt, attention.add_k_proj, attention.norm_added_k)
        text_v = heads(prompt, attention.add_v_proj, None)
        k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
        keep_text = count[:, None, None].expand(2, see.shape[1], tokens, words)
        expected = softmax_attention(q, k, v, torch.cat([keep_text, see], dim=-1))
        keep = torch.cat([count, torch.full((2, tokens), not causal)], dim=-1)[:, None, None]
        of_text = softmax_attention(text_q, k, v, keep)
        if causal and masked:  # nothing to attend to: what comes out is finite and seen by nobody
            assert out_text[1].isfinite().all()
            of_text, out_text = of_text[:1], out_text[:1]
        torch.testing.assert_close(out_text, attention.to_add_out(of_text), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out, attention.to_out[0](expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("text", [None, "seen", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_equals_the_definition(layer, grid, causal, text):
    layer = layer | {"causal": causal}
    see = visible(layer, grid)[None, None]
    check_definition(*case(layer, grid, text), grid, see, masked=text == "masked", causal=causal)


@pytest.mark.parametrize("text", [None, "seen", "masked"])
def test_frames_that_see_the_first_one_equal_the_definition(text):
    layer, grid = {"type": "first"}, GRIDS[0]
    see = visible(layer, grid)[None, None]
    check_definition(*case(layer, grid, text), grid, see, masked=text == "masked", causal=True)


def test_tokens_with_words_of_their_own_see_these_alone():
    """A mask by token equals one call for each token with its own words."""
    attention, x, text, see = module(None), draw(2, 6, DIM), draw(2, 4, DIM, seed=1), draw(2, 6, 4, seed=2) > 0
    see[..., 0] = True
    out, _ = attention(x, text, see)
    for token in range(6):
        alone, _ = attention(x[:, token : token + 1], text, see[:, token])
        torch.testing.assert_close(out[:, token : token + 1], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("text", [None, "masked"])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
@pytest.mark.parametrize("layer", SPARSE, ids=lambda layer: layer["mask"])
def test_sparse_layers_equal_the_definition(layer, grid, text):
    attention, x, prompt, count = case(layer, grid, text)
    shape = (x.shape[1],) if layer.get("flat") else grid
    query, key = (tensor.unflatten(1, shape) for tensor in queries_and_keys(attention, x, grid))
    mask = resolve(layer["mask"], layer["options"], layer.get("budget"))[0](query, key, shape)
    see = dense_bias(mask, shape, shape, torch.float64) == 0
    assert grid != GRIDS[0] or not see.all()
    check_definition(attention, x, prompt, count, grid, see, masked=text == "masked")


@pytest.mark.parametrize("text", [None, "masked"])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_pyramids_equal_the_mask_called_by_hand(grid, text):
    blocks = {"query_block": 4, "key_block": 8, "tile": 8}
    layer = {
        "type": "sparse",
        "mask": "psa",
        "flat": True,
        "options": blocks | {"ends": {"1": 0.3, "2": 0.6, "4": 0.9}},
    }
    attention, x, prompt, count = case(layer, grid, text)
    rope = rotary_embedding(grid_positions(grid), axes=default_axes(SIZE), theta=10000.0, dtype=torch.float64)
    out, _ = attention(x, prompt, count if text else None, rope, grid)
    query, key = queries_and_keys(attention, x, grid)
    value = heads(x, attention.to_v, None)
    mask, keys, values = masks.psa(query, key, value, **blocks, ends={1: 0.3, 2: 0.6, 4: 0.9})
    words = {}
    if prompt is not None:
        words["additional_keys"] = heads(prompt, attention.add_k_proj, attention.norm_added_k)
        words["additional_values"] = heads(prompt, attention.add_v_proj, None)
        words["additional_mask"] = count
    expected = block_sparse_attention(query, keys, values, mask=mask, **words)
    torch.testing.assert_close(out, attention.to_out[0](expected.flatten(2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", [None, "masked"])
@pytest.mark.parametrize(
    "layer",
    [{"budget": 0.3, "options": {"block": (2, 2, 3)}}, {"flat": True, "options": {"block": 4, "threshold": 0.1}}],
)
def test_gates_choose_the_blocks_of_a_layer(layer, text):
    grid = GRIDS[0]
    attention, x, prompt, count = case({"type": "sparse", "mask": "box_gate"} | layer, grid, text)
    shape = (x.shape[1],) if layer.get("flat") else grid
    query, key = (tensor.unflatten(1, shape) for tensor in queries_and_keys(attention, x, grid))
    blocks = math.prod(boxes(shape, attention.gate.key_block if len(shape) > 1 else (attention.gate.key_block,)))
    choice = {"topk": math.ceil(0.3 * blocks)} if "budget" in layer else {"threshold": 0.1}
    see = dense_bias(attention.gate.mask(query, key, **choice), shape, shape, torch.float64) == 0
    assert not see.all()
    check_definition(attention, x, prompt, count, grid, see, masked=text == "masked")
    torch.testing.assert_close(gate_loss(attention), attention.gate.loss(query, key))
    assert gate_loss(copy.deepcopy(attention)) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_equals_the_definition(masked):
    attention = module(None)
    x, prompt = draw(2, 7, DIM), draw(2, 3, DIM, seed=1)
    count = torch.tensor([[True, False, True], [False, False, True]]) if masked else torch.ones(2, 3, dtype=torch.bool)
    out, _ = attention(x, prompt, count if masked else None)
    q, k = heads(x, attention.to_q, attention.norm_q), heads(prompt, attention.to_k, attention.norm_k)
    expected = softmax_attention(q, k, heads(prompt, attention.to_v, None), count[:, None, None])
    torch.testing.assert_close(out, attention.to_out[0](expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_windows_per_head(grid, causal):
    """Every head gets what it gets where all have its window."""
    windows, strides = [[2, 3, 3], [9, 2, 3]], [[1, 2, 1], [4, 1, 3]]
    layer = {"type": "window", "causal": causal, "dilation": [2, 1, 1]}
    x, prompt = draw(2, grid[0] * grid[1] * grid[2], DIM), draw(2, 3, DIM, seed=1)
    mask = torch.tensor([[True, False, True], [False] * 3])
    rope = rotary_embedding(grid_positions(grid), axes=default_axes(SIZE), theta=10000.0, dtype=torch.float64)

    def attend(**sizes) -> torch.Tensor:
        attention = module(Pattern.from_config(layer | sizes), text="keys")
        attention.to_out[0] = torch.nn.Identity()
        return attention(x, prompt, mask, rope, grid)[0].unflatten(-1, (HEADS, SIZE))

    found = attend(window=windows, stride=strides)
    for head, (window, stride) in enumerate(zip(windows, strides, strict=True)):
        expected = attend(window=window, stride=stride)
        torch.testing.assert_close(found[..., head, :], expected[..., head, :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"window": [[3, 3, 3]] * 3}, "entries for 3 heads; expected one for each of 2"),
        ({"window": [[3, 3, 3]] * 2, "stride": [[1, 1, 1]] * 3}, r"entries for \[2, 3\] heads"),
        ({"window": [[3, 3, 3], [3, 3]]}, r"window\[1\]=\[3, 3\] must be one integer"),
        (
            {"window": [[3, 3, 3], [3, 3, 2]], "stride": [1, 1, 3]},
            r"stride=\(1, 1, 3\) must not exceed window=\(3, 3, 2\)",
        ),
    ],
)
def test_windows_per_head_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        module(Pattern.from_config({"type": "window"} | sizes))


def test_gate_multiplies_every_head():
    plain, gated = module(Pattern()), module(Pattern(), gated=True)
    gated.load_state_dict(plain.state_dict() | {k: v for k, v in gated.state_dict().items() if "gate" in k})
    plain.to_out[0] = gated.to_out[0] = torch.nn.Identity()
    grid, x = (2, 2, 3), draw(1, 12, DIM)
    rope = rotary_embedding(grid_positions(grid), axes=default_axes(SIZE), theta=10000.0, dtype=torch.float64)
    gate = 2 / (1 + torch.exp(-F.linear(x, gated.to_gate_logits.weight, gated.to_gate_logits.bias)))
    expected = plain(x, rotary_emb=rope, grid=grid)[0] * gate.repeat_interleave(SIZE, dim=-1)
    torch.testing.assert_close(gated(x, rotary_emb=rope, grid=grid)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"text": "full"}, {"pattern": None}], ids=["self", "joint", "cross"])
def test_fused_projections_change_nothing(options):
    attention = module(**({"pattern": Pattern()} | options))
    grid, x = (2, 2, 3), draw(1, 12, DIM)
    prompt = None if not options else draw(1, 3, DIM, seed=1)
    rope = rotary_embedding(grid_positions(grid), axes=default_axes(SIZE), theta=10000.0, dtype=torch.float64)
    before = attention(x, prompt, None, rope, grid)
    attention.fuse_projections()
    attention.to_k = None  # the fused weights are the ones in use
    for a, b in zip(before, attention(x, prompt, None, rope, grid), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("sliding", "must be one of"),
        ({"window": 3}, "must be one of"),
        ({"type": "window"}, "needs a window"),
        ({"type": "dense", "window": 3}, "dense takes"),
        ({"type": "window", "window": (3, 3)}, r"window=\(3, 3\)"),
        ({"type": "window", "window": 0}, "window=0"),
        ({"type": "window", "window": 3, "stride": 4}, r"stride=\(4, 4, 4\)"),
        ({"type": "window", "window": 3, "dilation": 1.5}, "dilation=1.5"),
        ({"type": "dense", "causal": 1}, "causal=1"),
        ({"type": "sparse"}, "needs a mask"),
        ({"type": "sparse", "mask": "vsa", "causal": True}, "sparse takes"),
        ({"type": "sparse", "mask": "vas"}, "mask='vas' must be one of"),
        ({"type": "sparse", "mask": "vsa", "options": {"tile": 2}}, "has no"),
        ({"type": "sparse", "mask": "vsa", "budget": 2}, "budget=2"),
        ({"type": "local_scan", "window": [8, 8]}, r"window=\[8, 8\]"),
        ({"type": "local_scan", "shift": 8}, "shift=8 must be an integer from 0 to window - 1"),
        ({"type": "local_scan", "options": {"heads": 2}}, "some of"),
        ({"type": "local_scan", "causal": True}, "local_scan takes"),
        ({"type": "sparse", "mask": "dma", "flat": True}, "must be one of"),
        ({"type": "sparse", "mask": "psa", "budget": 0.5}, "budget=0.5 says nothing to mask 'psa'"),
        ({"type": "sparse", "mask": "box_gate", "options": {"bloc": 2}}, "unexpected keyword argument 'bloc'"),
        ({"type": "sparse", "mask": "box_gate", "options": {"threshold": 0.1}, "budget": 0.2}, "budget or a threshold"),
    ],
)
def test_wrong_layers_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        Pattern.from_config(layer)


def test_rope_splits_heads_as_documented():
    assert default_axes(64) == (24, 20, 20)
    assert default_axes(32) == (12, 10, 10)
    assert [sum(default_axes(n)) for n in range(2, 130, 2)] == list(range(2, 130, 2))


@pytest.mark.parametrize("attention", ["dense", {"type": "window", "window": 3}, "temporal"], ids=name)
def test_only_differences_of_positions_count(attention):
    model = make(attention=[attention])
    given = inputs(model)
    positions = grid_positions((3, 3, 4))
    out = model(**given).sample
    moved = model(**given, positions=positions + torch.tensor([11, -4, 0.5])).sample
    torch.testing.assert_close(moved, out, rtol=1e-9, atol=1e-10)
    stretched = model(**given, positions=positions * 2).sample
    assert not torch.allclose(stretched, out, rtol=1e-3)


def test_every_video_can_have_positions_of_its_own():
    model = make()
    given = inputs(model)
    positions = torch.stack([grid_positions((3, 3, 4)), grid_positions((3, 3, 4)) * 3])
    both = model(**given, positions=positions).sample
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in given.items()}
        torch.testing.assert_close(both[i : i + 1], model(**one, positions=positions[i]).sample, rtol=1e-9, atol=1e-10)


def test_dense_attention_knows_tokens_by_position_alone():
    model = make(patch_size=(1, 1, 1))
    given = inputs(model, size=(3, 2, 2))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2)[..., order].unflatten(2, (3, 2, 2))

    expected = shuffled(model(**given).sample)
    given["hidden_states"] = shuffled(given["hidden_states"])
    positions = grid_positions((3, 2, 2))[order]
    torch.testing.assert_close(model(**given, positions=positions).sample, expected, rtol=1e-9, atol=1e-10)


def test_local_scan_layers_see_their_window_of_their_frame():
    """Windows of a frame whose sides they do not divide, moved: those of the rolled frame, without what only rolling
    joined (Swin)."""
    (rows, columns), window, shift = (7, 5), 4, 3
    query, key, value = (draw(2, 3, rows, columns, HEADS, SIZE, seed=i) for i in range(3))

    def labels(length: int) -> torch.Tensor:
        place = (torch.arange(length) - shift) % length
        return 2 * (place // window) + (torch.arange(length) < shift)

    label = (10 * labels(rows)[:, None] + labels(columns)).flatten()
    flat = (x.flatten(0, 1).flatten(1, 2) for x in (query, key, value))
    expected = softmax_attention(*flat, label[:, None] == label).view(2, 3, rows, columns, HEADS, SIZE)
    pattern = Pattern.from_config({"type": "local_scan", "window": window, "shift": shift})
    found = attend(pattern, query, key, value, text=None, dense=None)  # pyright: ignore
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not pattern.remembers


@pytest.mark.parametrize("modulation", ["adaln_single", "td_ln"])
def test_local_scan_blocks_are_lamamba_diffs(modulation):
    """Scans, windows, MLP, each shifted, scaled and gated, each frame alone; at first nothing but the input."""
    layers = [{"type": "local_scan", "window": 2, "options": {"state_dim": 4}}]
    layers.append({**layers[0], "shift": 1})
    model = tiny_model(None, attention=layers, modulation=modulation).double()
    x, time = draw(1, 1, 3, 12, 20), torch.tensor([300.0])
    block = model.blocks[1]
    tokens, grid = draw(1, 3 * 3 * 5, 32), (3, 3, 5)
    conditioning = model.condition(time, model.embed_time(time, torch.float64))
    rope = rotary_embedding(grid_positions(grid), axes=model.rope_axes, theta=100.0, dtype=torch.float64)
    expected = tokens
    (part,) = block.scan_modulation(conditioning)
    frames = part.modulate(expected, 1e-6).view(3, 3, 5, -1)
    expected = part.residual(expected, Scan2d.forward(block.scan, frames).view(tokens.shape))
    attention, mlp = block.modulation(conditioning)
    update, _ = block.attn1(attention.modulate(expected, 1e-6), rotary_emb=rope, grid=grid)
    expected = attention.residual(expected, update)
    expected = mlp.residual(expected, block.mlp(mlp.modulate(expected, 1e-6)))
    torch.testing.assert_close(block(tokens, None, conditioning, None, rope, grid), expected)

    out = model(x, time).sample
    x[:, :, 2] += 1
    assert torch.equal(out[:, :, :2], model(x, time).sample[:, :, :2]) and model.is_causal
    grads = torch.autograd.grad(model(x, time).sample.square().sum(), list(model.parameters()))
    assert all(grad.abs().max() > 0 for (name, _), grad in zip(model.named_parameters(), grads, strict=True)
               if name.startswith("blocks.1.scan"))  # fmt: skip


def test_text_that_attends_along_has_no_place_in_local_scan_layers():
    with pytest.raises(ValueError, match="local_scan layers have no place for the text of 'joint'"):
        tiny_model("joint", attention=["dense", {"type": "local_scan"}])
