"""Multi-head attention with options: neutral values leave it as it is, folding is exact, published identities hold."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels.ops import na2d, scored_attention
from foveal.kernels.scored import Signed
from foveal.layers.multihead import MultiHeadAttention
from foveal.layers.relational import RelationalHeads, SymbolicAttention
from torch import nn

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "variants.npz")
DIM, HEADS = 16, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shuffle(layer: nn.Module) -> nn.Module:
    """Parameters away from their neutral values."""
    with torch.no_grad():
        for x in layer.parameters():
            x.copy_(torch.randn_like(x) * 0.3)
    return layer.double()


NEUTRAL = {
    "add": {"head_embedding": "add"},
    "mul": {"head_embedding": "mul"},
    "knock": {"knock": "linear"},
    "knock_mlp": {"knock": "mlp", "knock_on": "v"},
    "mixer": {"token_mixer": 12},
    "conv": {"conv": (3, 3)},
    "token_temperature": {"temperature": "token"},
    "position_temperature": {"temperature": "position"},
    "gate": {"head_gate": True},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_options_keep_the_bits_of_a_checkpoint(name):
    plain = MultiHeadAttention(DIM, num_heads=HEADS)
    layer = MultiHeadAttention(DIM, num_heads=HEADS, **NEUTRAL[name])
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    if name == "position_temperature":
        nn.init.constant_(layer.beta, 6.0)  # exp(-exp(6)) is far below one unit in the last place
    x = torch.randn(2, 3, 4, DIM)
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    new = [n for n, _ in layer.named_parameters() if n in missing]
    flat = {"knock_mlp": lambda n: "gate" in n, "position_temperature": lambda n: False}.get(name, lambda n: True)
    assert all(layer.get_parameter(n).grad.abs().sum() > 0 for n in new if flat(n))


@pytest.mark.parametrize(
    "options",
    [
        {"share_projection": True, "head_embedding": "add"},
        {"share_projection": True, "head_embedding": "mul", "knock": "linear"},
        {"knock": "linear", "knock_on": "qk", "head_embedding": "add"},
        {"head_embedding": "mul", "key_heads": 2, "bias": False},
        {"temperature": "position", "head_gate": True, "knock": "linear", "bias": False},
        {"temperature": "position"},
        {"head_gate": True, "knock": "mlp"},
    ],
)
def test_folding_is_exact(options):
    layer = shuffle(MultiHeadAttention(DIM, num_heads=HEADS, **options))
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    expected = layer(x)
    folded = layer.fold(tokens=7)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert not any(name.endswith(("embedding", "beta", "gate")) and "." not in name for name in folded.state_dict())
    if "key_heads" not in options and options.get("knock") != "mlp":
        plain = MultiHeadAttention(DIM, num_heads=HEADS, bias=folded.bias).double()
        plain.load_state_dict(folded.state_dict())
        torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)


def test_equal_to_torch():
    layer, theirs = (
        MultiHeadAttention(DIM, num_heads=HEADS).double(),
        nn.MultiheadAttention(DIM, HEADS, batch_first=True),
    )
    theirs.double().load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x, x, x)[0])


def test_no_head_embedding_makes_all_heads_equal():
    """MHE with e = 0 is one head, repeated."""
    for kind in ("add", "mul"):
        layer = MultiHeadAttention(DIM, num_heads=HEADS, share_projection=True, head_embedding=kind, output=False)
        heads = layer.double()(torch.randn(2, 5, DIM, dtype=torch.float64)).unflatten(-1, (HEADS, -1))
        torch.testing.assert_close(heads, heads[..., :1, :].expand_as(heads), rtol=0, atol=0)


def count(layer: nn.Module) -> int:
    return sum(x.numel() for x in layer.parameters())


def test_parameters_of_the_papers():
    square = DIM * DIM
    make = partial(MultiHeadAttention, DIM, bias=False)
    of_proj = square + DIM
    assert count(make(num_heads=HEADS)) == 3 * square + of_proj
    assert count(make(num_heads=HEADS, value="input")) == 2 * square + of_proj  # optimised
    assert count(make(num_heads=1, value="input", key="input")) == square + of_proj  # efficient
    assert count(make(num_heads=1, value="input", key="input", token_mixer=9)) == square + of_proj + 81  # super
    assert count(make(num_heads=HEADS, key="query")) == 2 * square + of_proj  # symmetric
    head = DIM // HEADS
    shared = make(num_heads=HEADS, share_projection=True, head_embedding="add")
    assert count(shared) == 3 * DIM * head + 3 * HEADS * head + of_proj
    assert count(make(num_heads=HEADS, knock="linear")) == 3 * square + of_proj + 3 * head**2


def test_efficient_attention_merges_queries_and_keys():
    """One head with x W x^T is attention of one head with W = Wq Wk^T."""
    plain = shuffle(MultiHeadAttention(DIM, num_heads=1, value="input", bias=False))
    merged = MultiHeadAttention(DIM, num_heads=1, value="input", key="input", bias=False).double()
    with torch.no_grad():
        merged.q.weight.copy_(plain.k.weight.T @ plain.q.weight)
        merged.proj.load_state_dict(plain.proj.state_dict())
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    torch.testing.assert_close(merged(x), plain(x))


def test_symmetric_similarity():
    layer = shuffle(MultiHeadAttention(DIM, num_heads=HEADS, key="query"))
    parts = layer.project(torch.randn(1, 9, DIM, dtype=torch.float64))
    similarity = torch.einsum("bihd,bjhd->bhij", parts["q"], parts["k"])
    torch.testing.assert_close(similarity, similarity.mT)
    assert torch.linalg.eigvalsh(similarity).min() > -1e-10


def test_position_temperature():
    """The published start, beta = 1.5, makes the factor 1 + 0.0113 log n."""
    layer = MultiHeadAttention(DIM, num_heads=HEADS, temperature="position")
    assert layer.position_temperature(1).item() == 1
    assert layer.position_temperature(3).item() - 1 == pytest.approx(0.01131 * np.log(3), rel=1e-3)


def test_a_shifted_kernel_shifts_keys():
    layer, x = MultiHeadAttention(DIM, num_heads=HEADS, conv=3, output=False).double(), torch.randn(1, 6, DIM).double()
    with torch.no_grad():
        layer.v_conv.copy_(layer.v_conv.roll(1, -1))  # each token takes the value behind it
    plain = MultiHeadAttention(DIM, num_heads=HEADS, output=False).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    values = plain.project(x)["v"]
    shifted = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    plain.attend = lambda q, k, v: layer.attend(q, k, shifted)
    torch.testing.assert_close(layer(x), plain(x))


def test_any_attention_fits():
    x = torch.randn(1, 5, 6, DIM, dtype=torch.float64)
    signed = shuffle(MultiHeadAttention(DIM, num_heads=HEADS, attend=partial(scored_attention, score=Signed())))
    window = MultiHeadAttention(DIM, num_heads=HEADS, attend=partial(na2d, window=(5, 5))).double()
    assert signed(x).shape == window(x).shape == x.shape
    whole = MultiHeadAttention(DIM, num_heads=HEADS, attend=partial(na2d, window=(5, 6))).double()
    plain = MultiHeadAttention(DIM, num_heads=HEADS).double()
    plain.load_state_dict(whole.state_dict())
    torch.testing.assert_close(whole(x), plain(x))


@pytest.mark.parametrize("activation", [None, lambda x: x])
def test_relational_heads_recorded(activation):
    """Wide values and all pairs both equal the official code."""
    z = {k.split("/")[1]: torch.from_numpy(GOLDENS[k]) for k in GOLDENS if k.startswith("relational/")}
    for causal in (False, True):
        layer = RelationalHeads(16, num_heads=2, head_dim=4, relations=4, causal=causal, activation=activation).double()
        layer.load_state_dict({k[3:]: x for k, x in z.items() if k.startswith("ra.")})
        expected = z["out_causal" if causal else "out"]
        torch.testing.assert_close(layer(z["x"], z["symbols"]), expected, rtol=0, atol=1e-13)
    symbols = SymbolicAttention(16, num_heads=2, num_symbols=5).double()
    symbols.load_state_dict({k[4:]: x for k, x in z.items() if k.startswith("sym.")})
    torch.testing.assert_close(symbols(z["x"]), z["sym_out"], rtol=0, atol=1e-13)


def test_relational_heads_in_the_layer():
    symbols = SymbolicAttention(DIM, num_heads=2, num_symbols=5)
    layer = MultiHeadAttention(DIM, num_heads=HEADS, relations=2, relation_heads=2, symbols=symbols)
    x = torch.randn(2, 3, 4, DIM)
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    symmetric = RelationalHeads(DIM, num_heads=2, head_dim=4, relations=4, symmetric=True, activation=torch.relu)
    assert symmetric(x).shape == (2, 3, 4, 8) and not hasattr(symmetric, "wk_rel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_heads": 3}, "key_heads"),
        ({"knock": "cubic"}, "knock"),
        ({"knock": "linear", "knock_on": "x"}, "knock_on"),
        ({"conv": 4}, "conv"),
        ({"relations": 2}, "relation_heads"),
        ({"value": "input", "head_dim": 3}, "dim"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(DIM, num_heads=HEADS, **options)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="token_mixer is for 12"):
        MultiHeadAttention(DIM, num_heads=HEADS, token_mixer=12)(torch.randn(1, 5, DIM))
    with pytest.raises(ValueError, match="spatial axes"):
        MultiHeadAttention(DIM, num_heads=HEADS, conv=3)(torch.randn(1, 5, 5, DIM))
    with pytest.raises(ValueError, match="only projected"):
        MultiHeadAttention(DIM, num_heads=HEADS, value="input", head_gate=True).fold()
