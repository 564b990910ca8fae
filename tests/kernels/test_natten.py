"""The stand-in for NATTEN: its recorded results, its own list of cases, orders of arguments, code written for it."""

import importlib.metadata
import importlib.util
import itertools
import sys
from types import ModuleType

import pytest
import torch
from foveal.kernels.compat.natten import install, pairs, uninstall
from foveal.kernels.neighborhood import geometry
from foveal.kernels.ops import merge_attentions, na2d, na3d
from foveal.layers import NeighborhoodAttention2d
from recorded_natten import RECORDED, RECORDED_BIAS, assert_recorded, recorded_inputs
from torch import Tensor
from torch.nn import functional as F

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _uninstalled():
    yield
    uninstall()


def randn(*size: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*size, **F64, requires_grad=requires_grad)


def dense(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a matrix of all pairs, on `[B, T, heads, d]`."""
    key, value = (x.repeat_interleave(query.shape[-2] // x.shape[-2], -2) for x in (key, value))
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * (scale or query.shape[-1] ** -0.5)
    logits = logits.masked_fill(~sees, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value), logits.logsumexp(-1).transpose(1, 2)


# values


@pytest.mark.parametrize("config", RECORDED[::3], ids=lambda c: str(c["id"]))
def test_recorded_functions(config):
    *qkv, grad = recorded_inputs(config)
    qkv = [x.requires_grad_() for x in qkv]
    places = [tuple(config[name]) for name in ("window", "stride", "dilation", "is_causal")]
    with install("0.21") as natten:
        out = getattr(natten, f"na{config['rank']}d")(*qkv, *places)
        generic, lse = natten.functional.neighborhood_attention_generic(*qkv, *places, return_lse=True)
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *torch.autograd.grad(out, qkv, grad)), strict=True))
    torch.testing.assert_close(generic, out, rtol=1e-12, atol=1e-12)
    for name, key in config["out_keys"].items():
        assert_recorded(found[name], "neighborhood.npz", key)


@pytest.mark.parametrize("computed", [False, True], ids=["deferred", "computed"])
@pytest.mark.parametrize("config", RECORDED_BIAS, ids=lambda c: str(c["id"]))
def test_recorded_pairs_with_bias(config, computed):
    *qkv, grad, bias = recorded_inputs(config, (2, *(2 * w - 1 for w in config["window"])))
    inputs = [x.requires_grad_() for x in (*qkv, bias)]
    rank = len(config["shape"])
    size, dilation = tuple(config["window"]), tuple(config["dilation"])
    query, key, value = (x.movedim(-2, 1) for x in inputs[:3])
    with install("0.17") as natten:
        qk, av = (getattr(natten.functional, f"na{rank}d_{name}") for name in ("qk", "av"))
        attn = qk(query * query.shape[-1] ** -0.5, key, size, dilation, rpb=bias)
        attn = attn.clone() if computed else attn
        assert isinstance(attn, pairs.DeferredWeights) != computed
        attn = attn.softmax(dim=-1)
        out = av(attn, value, size, dilation).movedim(1, -2)
        if not computed:
            assert attn.computed is None
    found = dict(zip(("out", "dq", "dk", "dv", "drpb"), (out, *torch.autograd.grad(out, inputs, grad)), strict=True))
    for name, key in config["keys"].items():
        assert_recorded(found[name], "neighborhood_rpb.npz", key)


LISTED = [  # NATTEN 0.21.6, tests/test_fna.py: batch, heads, key heads, shape, kernel size, stride, dilation
    (2, 4, 4, (128,), (63,), (31,), (1,)),
    (2, 4, 2, (128,), (63,), (31,), (1,)),
    (1, 1, 1, (128,), (3,), (2,), (10,)),
    (1, 1, 1, (128,), (8,), (7,), (5,)),
    (1, 2, 2, (125,), (15,), (1,), (1,)),
    (1, 4, 4, (5, 25), (5, 16), (1, 16), (1, 1)),
    (1, 4, 1, (5, 25), (5, 16), (1, 16), (1, 1)),
    (1, 1, 1, (19, 29), (8, 8), (1, 1), (2, 3)),
    (1, 1, 1, (8, 8), (8, 8), (1, 1), (1, 1)),
    (1, 1, 1, (16, 16), (3, 3), (1, 1), (1, 1)),
    (1, 1, 1, (7, 9, 10), (7, 3, 5), (2, 1, 3), (1, 3, 2)),
]


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_cases_of_its_own_tests(case):
    batch, heads, key_heads, shape, *places = case
    torch.manual_seed(0)
    query, key, value = (randn(batch, *shape, n, 4) for n in (heads, key_heads, key_heads))
    cotangent = torch.randn_like(query)
    with install("0.21") as natten:
        for causal in itertools.product([False, True], repeat=len(shape)):
            names = dict(zip(("window", "stride", "dilation"), places, strict=True))
            sees = geometry.mask(geometry.make_axes(shape, **names, causal=causal))
            tokens = [x.flatten(1, -3) for x in (query, key, value)]
            expected, expected_lse = dense(*tokens, sees)
            out, lse = natten.functional.neighborhood_attention_generic(
                query, key, value, *places, is_causal=causal, return_lse=True, backend="cutlass-fna"
            )
            torch.testing.assert_close(out.flatten(1, -3), expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(lse.flatten(1, -2), expected_lse, rtol=1e-10, atol=1e-10)
            grads = (torch.autograd.grad(x, (query, key, value), cotangent.view_as(x)) for x in (out, expected))
            for got, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "shape, size, dilation, causal",
    [
        ((16,), 7, 2, True),
        ((16, 12), (7, 5), (2, 1), (True, False)),
        ((16, 12), (3, 5), (5, 2), (False, True)),
        ((5, 6, 7), (3, 4, 3), (1, 1, 2), (True, False, True)),
    ],
)
def test_causal_pairs_with_additional_tokens(shape, size, dilation, causal):
    """Slots that a causal window lacks hold -inf; additional tokens follow the window."""
    torch.manual_seed(0)
    rank = len(shape)
    query, key, value = (randn(2, 3, *shape, 4) for _ in range(3))
    keys, values = (randn(2, 3, 2, 4) for _ in range(2))
    inputs, cotangent = (query, key, value, keys, values), torch.randn(2, 3, *shape, 4, **F64)
    with install("0.17") as natten:
        qk, av = (getattr(natten.functional, f"na{rank}d_{name}") for name in ("qk", "av"))
        attn = qk(query, key, size, dilation, keys, causal)
        fused = av(attn.softmax(-1), value, size, dilation, values, causal)
        assert attn.computed is None
        weights = attn.clone()
        assert weights.isinf().any() and weights[..., -2:].isfinite().all()
        plain = av(weights.softmax(-1), value, size, dilation, values, causal)
    axes = pairs.check_axes(shape, size, 1, dilation, causal)
    sees = F.pad(geometry.mask(axes), (0, 2), value=True)
    tokens = [torch.cat((x.flatten(2, -2), more), 2).transpose(1, 2) for x, more in ((key, keys), (value, values))]
    expected, _ = dense(query.flatten(2, -2).transpose(1, 2), *tokens, sees, scale=1.0)
    expected = expected.transpose(1, 2).unflatten(2, shape)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for out in (fused, plain):
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for got, grad in zip(torch.autograd.grad(out, inputs, cotangent), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-9, atol=1e-9)


def test_gradients_of_computed_weights():
    """Through any number of derivatives, and the same bits each time."""
    torch.manual_seed(0)
    query, key, value, bias = randn(1, 1, 3, 4, 2), randn(1, 1, 3, 4, 2), randn(1, 1, 3, 4, 2), randn(1, 5, 5)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return pairs.av(2, pairs.qk(2, query, key, 3, rpb=bias).tanh(), value, 3)

    assert torch.autograd.gradcheck(attend, (query, key, value, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, (query, key, value, bias))


def test_computed_in_pieces(monkeypatch):
    query, key, value = (randn(2, 2, 6, 7, 3, requires_grad=False) for _ in range(3))
    whole = pairs.av(2, pairs.qk(2, query, key, 3).exp(), value, 3)
    monkeypatch.setattr(pairs.gathered, "MOST_NUMBERS", 2 * query.numel())
    torch.testing.assert_close(pairs.av(2, pairs.qk(2, query, key, 3).exp(), value, 3), whole)


# deferred weights


def test_what_keeps_weights_deferred():
    query, key, value = (torch.randn(1, 2, 6, 6, 4, requires_grad=True) for _ in range(3))
    attn = pairs.qk(2, query, key, 3)
    assert attn.shape == (1, 2, 6, 6, 9) and attn.dtype == query.dtype and attn.requires_grad and attn.dim() == 5
    drop = torch.nn.Dropout(0.5).eval()
    for softmax in (
        lambda x: x.softmax(-1),
        lambda x: torch.softmax(x, dim=4),
        lambda x: F.softmax(x, -1),
        torch.nn.Softmax(dim=-1),
        lambda x: (x * 0.5 / 2).softmax(-1).to(value.dtype).contiguous(),
    ):
        found = drop(softmax(attn))
        assert isinstance(found, pairs.DeferredWeights) and found.computed is None
        expected = softmax(pairs.qk(2, query, key, 3).clone())
        torch.testing.assert_close(pairs.av(2, found, value, 3), pairs.av(2, expected, value, 3))
        torch.testing.assert_close(found.clone(), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x + torch.arange(9)).softmax(-1),
        lambda x: x.softmax(2),
        lambda x: x.masked_fill(x > 0, -1e3).softmax(-1),
        lambda x: F.softmax(x, -1, dtype=torch.float64),
        lambda x: x.softmax(-1) * 2,
        lambda x: x.softmax(-1).pow(2),
    ],
)
def test_what_computes_them(change):
    query, key, value = (torch.randn(1, 2, 6, 6, 4, requires_grad=True) for _ in range(3))
    found = change(pairs.qk(2, query, key, 3))
    assert not isinstance(found, pairs.DeferredWeights)
    expected = change(pairs.Recipe(query, key, None, None, pairs.check_axes((6, 6), 3, 1, 1, False)).weights())
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(1, 2, 6, 6, 4)
    grads = (torch.autograd.grad(pairs.av(2, x, value, 3), (query, key, value), cotangent) for x in (found, expected))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_changes_in_place():
    query, value = torch.randn(1, 2, 6, 6, 4), torch.randn(1, 2, 6, 6, 4)
    attn = pairs.qk(2, query, query, 3)
    attn.mul_(torch.tensor(3.0))  # of the weights: they are computed, and stay changed
    expected = (pairs.qk(2, query, query, 3).clone() * 3).softmax(-1)
    torch.testing.assert_close(attn.softmax(-1), expected)
    attn = pairs.qk(2, query, query, 3).softmax(-1)
    query += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        pairs.av(2, attn, value, 3)


def test_looked_at_without_gradients():
    """Whoever looks does not take the gradient away."""
    query = torch.randn(1, 2, 6, 6, 4, requires_grad=True)
    attn = pairs.qk(2, query, query, 3)
    with torch.no_grad():
        assert attn.mean().isfinite() and not attn.softmax(-1).requires_grad
    (grad,) = torch.autograd.grad(pairs.av(2, attn.softmax(-1), query, 3).sum(), query)
    assert grad.abs().sum() > 0


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_in_other_autograd_functions():
    """Their graph is made in C++, where nobody asks for what the weights are."""
    query, key, value, bias = randn(1, 2, 4, 4, 3), randn(1, 2, 4, 4, 3), randn(1, 2, 4, 4, 3), randn(2, 5, 5)
    attn, plain = (pairs.qk(2, query, key, 3, rpb=bias) for _ in range(2))
    outs = [pairs.av(2, x.softmax(-1), value, 3) for x in (Doubled.apply(attn), 2 * plain.clone())]
    grads = [torch.autograd.grad(x.square().sum(), (query, key, value, bias)) for x in outs]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda q, k: pairs.qk(2, q, k, 3), (query, key))


def test_compiled_pairs():
    query, key, value = (torch.randn(1, 2, 6, 6, 4, requires_grad=True) for _ in range(3))

    def attend(query, key, value):
        return pairs.av(2, pairs.qk(2, query, key, 3).softmax(-1), value, 3)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))


# attention of other lengths


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (5, 200), (200, 5)])
def test_attention(lengths, causal):
    torch.manual_seed(0)
    query, key, value = randn(2, lengths[0], 4, 8), randn(2, lengths[1], 2, 8), randn(2, lengths[1], 2, 3)
    sees = torch.ones(lengths, dtype=torch.bool)
    expected, lse = dense(query, key, value, sees.tril() if causal else sees, scale=0.3)
    with install("0.21") as natten:
        out, found = natten.attention(query, key, value, causal, 0.3, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, lse, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(out)
    grads = (torch.autograd.grad(x, (query, key, value), cotangent) for x in (out, expected))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_attention_of_several_lengths():
    from_lengths = [(3, 5), (7, 7), (3, 5), (1, 9)]
    query, key, value = randn(1, 14, 2, 4), randn(1, 26, 2, 4), randn(1, 26, 2, 4)
    lengths, key_lengths = (torch.tensor(x, dtype=torch.int32) for x in zip(*from_lengths, strict=True))
    with install("0.21") as natten:
        from natten.utils.varlen import generate_varlen_parameters

        ends, key_ends, most, most_keys = generate_varlen_parameters(query, key, value, lengths, key_lengths)
        assert (ends.tolist(), key_ends.tolist(), most, most_keys) == ([0, 3, 10, 13, 14], [0, 5, 12, 17, 26], 7, 9)
        out = natten.attention(query, key, value, seqlens_Q=lengths, seqlens_KV=key_lengths)
        again = natten.attention(
            query, key, value, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=key_ends, max_seqlen_Q=most,
            max_seqlen_KV=most_keys,
        )  # fmt: skip
        pieces = [x.split(n.tolist(), 1) for x, n in ((query, lengths), (key, key_lengths), (value, key_lengths))]
        expected = torch.cat([natten.attention(*x) for x in zip(*pieces, strict=True)], 1)
        with pytest.raises(ValueError, match="seqlens_Q and seqlens_KV must be given together"):
            natten.attention(query, key, value, seqlens_Q=lengths)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(again, expected)


def test_merged_attentions():
    query, key, value = randn(2, 6, 2, 4), randn(2, 9, 2, 4), randn(2, 9, 2, 4)
    for version, several in (("0.20", False), ("0.21", True)):
        with install(version) as natten:
            pieces = zip(key.split(5, 1), value.split(5, 1), strict=True)
            parts = [natten.attention(query, *piece, return_lse=True) for piece in pieces]
            merged = natten.merge_attentions(*map(list, zip(*parts, strict=True)), torch_compile=False)
            assert isinstance(merged, tuple) == several
            torch.testing.assert_close(merged[0] if several else merged, natten.attention(query, key, value))
            with pytest.raises(ValueError, match="at least two"):
                natten.merge_attentions([merged], [merged])
            uninstall()
    with pytest.raises(ValueError):
        merge_attentions([], [])


# modules


def test_checkpoint_of_an_old_module():
    """The layer of the backbones loads it and is loaded by it, also on maps smaller than the window."""
    ours = NeighborhoodAttention2d(16, num_heads=2, window=5, dilation=2, rpb=True, pad=True)
    for version, places in (("0.14.4", (16, 5, 2)), ("0.15", (16, 2, 5))):
        with install(version) as natten:
            named = {"dilation": 2}
            theirs = natten.NeighborhoodAttention2D(*places, **named)
        assert {*theirs.state_dict()} == {"qkv.weight", "qkv.bias", "rpb", "proj.weight", "proj.bias"}
        theirs.load_state_dict(ours.state_dict())
        for shape in ((12, 11), (6, 13)):
            x = torch.randn(2, *shape, 16)
            torch.testing.assert_close(theirs(x), ours(x))


def test_modules_by_version():
    x = torch.randn(1, 4, 5, 6, 8)
    with install("0.15") as natten:
        cube = natten.NeighborhoodAttention3D(8, 2, 3, 5 - 2, 1, 1)
        uneven = natten.NeighborhoodAttention3D(8, 2, 5, kernel_size_d=3, bias=False)
        assert cube.rpb is not None and uneven.kernel_size == (3, 5, 5) and uneven.rpb is None
        assert uneven(x).shape == x.shape
    with install("0.17") as natten:
        table = natten.NeighborhoodAttention1D(8, 2, 3, 1, False, True)
        assert table.rpb.shape == (2, 5) and natten.NeighborhoodAttention1D(8, 2, 3).rpb is None
        with pytest.raises(ValueError, match="kernel_size=7 times dilation=1 on axis 0 must not exceed its length 6"):
            natten.NeighborhoodAttention1D(8, 2, 7)(x[0, 0])
        with pytest.raises(ValueError, match="rel_pos_bias=True cannot be combined with is_causal"):
            natten.NeighborhoodAttention1D(8, 2, 3, is_causal=True, rel_pos_bias=True)
    with install("0.21") as natten:
        strided = natten.NeighborhoodAttention2D(embed_dim=8, num_heads=2, kernel_size=4, stride=(1, 2), is_causal=None)
        assert strided(x[:, 0]).shape == x[:, 0].shape
        with pytest.raises(TypeError, match="no argument 'rel_pos_bias' in this release"):
            natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)


def test_dropout_of_weights():
    with install("0.17") as natten:
        module = natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True, attn_drop=0.5)
    x = torch.randn(1, 5, 6, 8)
    torch.testing.assert_close(module.eval()(x), module(x))
    calm = module(x)
    torch.manual_seed(0)
    dropped = torch.stack([module.train()(x) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - calm).abs().max() < 5 * dropped.std(0).max() / 20


# installing


def test_orders_of_arguments():
    q = torch.randn(1, 9, 9, 2, 4)
    expected = na2d(q, q, q, window=3, dilation=2, causal=True, scale=0.5)
    with install("0.17") as natten:
        assert not callable(natten.na2d) and natten.has_fused_na() and not natten.is_fused_na_enabled()
        natten.use_fused_na(True)
        assert natten.is_fna_enabled() and natten.context.is_fused_na_enabled()
        natten.context.NattenContext.reset()
        torch.testing.assert_close(natten.functional.na2d(q, q, q, 3, 2, True, None, 0.5), expected)
    with install("0.20") as natten:
        torch.testing.assert_close(natten.na2d(q, q, q, 3, 1, 2, True, 0.5, try_fuse_additional_kv=False), expected)
    with install("0.21") as natten:
        torch.testing.assert_close(natten.na2d(q, q, q, 3, 1, 2, True, scale=0.5, backend="hopper-fna"), expected)
        for call, message in (
            (lambda: natten.na2d(q, q, q, 3, rpb=None), "na2d.. has no argument 'rpb' in this release"),
            (lambda: natten.na2d(q, q, q), "na2d.. needs 'kernel_size'"),
            (lambda: natten.na2d(q, q, q, 3, query=q), "by place and by name"),
            (lambda: natten.na2d(*[q] * 40), "takes 22 arguments"),
            (lambda: natten.na1d(q, q, q, 3), "must be .B, 1 spatial axes, heads, head_dim"),
            (lambda: natten.na2d(q, q, q, 3, 4), "stride=4 on axis 0 must lie in .1, kernel_size=3"),
            (lambda: natten.na2d(q, q, q, 5, 1, 2), "kernel_size=5 times dilation=2 on axis 0 must not"),
        ):  # fmt: skip
            with pytest.raises((TypeError, ValueError), match=message):
                call()


def test_old_names_agree():
    q, k, v = (torch.randn(1, 2, 5, 6, 6, 4) for _ in range(3))
    bias = torch.randn(2, 5, 9, 9)
    with install("0.15") as natten:
        f = natten.functional
        logits = f.natten3dqkrpb(q, k, bias, 3, 5, 1, 1).clone()
        sizes = {"kernel_size_d": 3, "kernel_size": 5, "dilation_d": 1, "dilation": 1}
        torch.testing.assert_close(f.na3d_qk_with_bias(q, k, bias=bias, **sizes).clone(), logits)
        out = f.na3d_av(logits.softmax(-1), v, 3, 5, 1, 1)
    heads_last = [x.movedim(1, -2) for x in (q, k, v)]
    torch.testing.assert_close(out.movedim(1, -2), na3d(*heads_last, window=(3, 5, 5), bias=bias, scale=1.0))
    with install("0.14.4") as natten:  # sizes follow from the shapes
        f = natten.functional
        q, k, v, bias = q[:, :, 0], k[:, :, 0], v[:, :, 0], bias[:, 0, 2:-2, 2:-2]
        attn = f.natten2dqkrpb(q, k, bias, 2)
        out = f.natten2dav(attn.softmax(-1), v, 2)
    heads_last = [x.movedim(1, -2) for x in (q, k, v)]
    torch.testing.assert_close(out.movedim(1, -2), na2d(*heads_last, window=3, dilation=2, bias=bias, scale=1.0))


def test_installed_and_taken_away(monkeypatch):
    with install("0.17.2") as natten:
        assert sys.modules["natten"] is natten and natten.__version__ == "0.17.1"
        assert importlib.util.find_spec("natten") and importlib.metadata.version("natten") == "0.17.1"
        import natten.functional as functional

        assert functional.na1d.__name__ == "na1d" and install("0.17.1").module is natten
        with pytest.raises(RuntimeError, match=r"the stand-in for NATTEN 0\.17\.1 is in place: call uninstall"):
            install("0.21")
        with pytest.raises(AttributeError, match=r"stand-in for NATTEN 0\.17\.1 has no natten\.profiler"):
            _ = natten.profiler
    assert not any(name.split(".")[0] == "natten" for name in sys.modules)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten")
    for version in ("0.16", "1", "latest", 0.17):
        with pytest.raises(ValueError, match="must be of NATTEN's series"):
            install(version)
    monkeypatch.setitem(sys.modules, "natten", ModuleType("natten"))
    with pytest.raises(RuntimeError, match="NATTEN itself is imported already"):
        install()
    uninstall()
    assert "natten" in sys.modules, "what is not ours stays"


# code written for NATTEN


class CosineBlock(torch.nn.Module):
    """As HDiT attends: cosine similarity, rotation in place, both branches of its code."""

    def __init__(self, natten: ModuleType, fused: bool):
        super().__init__()
        self.natten, self.fused = natten, fused
        self.qkv, self.scale = torch.nn.Linear(16, 48), torch.nn.Parameter(torch.full([2], 10.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)  # [B, H, W, heads, d]
        q, k = (F.normalize(t, dim=-1) * self.scale.sqrt()[:, None] for t in (q, k))
        if self.fused:
            return self.natten.functional.na2d(q, k, v, 3, scale=1.0).flatten(-2)
        q, k, v = (t.movedim(-2, 1) for t in (q, k, v))
        q = q.clone().mul_(1.0)
        qk = self.natten.functional.na2d_qk(q, k, 3)
        a = torch.softmax(qk, dim=-1).to(v.dtype)
        return self.natten.functional.na2d_av(a, v, 3).movedim(1, -2).flatten(-2)


def test_like_hdit():
    x = torch.randn(2, 6, 7, 16)
    with install("0.17") as natten:
        fused, pair = CosineBlock(natten, True), CosineBlock(natten, False)
        pair.load_state_dict(fused.state_dict())
        torch.testing.assert_close(pair(x), fused(x))
        again = torch.utils.checkpoint.checkpoint(pair, x, use_reentrant=False)
        grads = torch.autograd.grad(again.sum(), pair.scale), torch.autograd.grad(fused(x).sum(), fused.scale)
        torch.testing.assert_close(*grads)


def test_like_a_video_decoder():
    """Keywords of LTX-2's decoder, whose heads, dim and kernel these are."""
    q, k, v = (torch.randn(1, 4, 8, 8, 2, 8) for _ in range(3))
    with install("0.21") as natten:
        out = natten.na3d(q, k, v, kernel_size=(3, 7, 7), scale=1.0, backend="cutlass-fna")
    torch.testing.assert_close(out, na3d(q, k, v, window=(3, 7, 7), scale=1.0))
