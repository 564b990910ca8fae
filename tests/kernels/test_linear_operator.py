"""Linear attention: the plain path against the fp64 reference, the formulas of the papers, and what is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from foveal.kernels.linear import cost
from foveal.kernels.linear.plot import attention_maps, plot_linear_attention
from foveal.kernels.ops import explain, linear_attention
from linear_matrix import VARIANTS, Case, cases, check, check_first_token_far_away, check_large_means, make_inputs
from operator_matrix import LAYOUTS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import softplus

FLOOR = Case((5, 7), (4, 6), batch=2, heads=3, relu=True, floor=20.0, scale=None)
CENTERED = Case((13, 11), (13, 11), heads=3, value_dim=12, centered=True, scale=0.3)
EPS = Case((6, 5), (6, 5), eps=1e-3, mean=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_random_cases(dtype):
    for case in cases(300, seed=0):
        check(case, dtype, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_cases_in_half_precision(dtype):
    for case in cases(100, seed=1):
        check(case, dtype, "torch")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_definition(impl, variant):
    """One head of one entry, query by query."""
    case = replace(EPS, **({"eps": None, "mean": False, "heads": 1, "scale": 0.3} | variant))
    inputs = make_inputs(case, torch.float64)
    q, k, v = (inputs[x][0].reshape(-1, 8) for x in ("query", "key", "value"))
    if case.relu:
        q, k = q.clamp(min=0), k.clamp(min=0)
    total = torch.Tensor.mean if case.mean or case.centered else torch.Tensor.sum
    middle = v.mean(0) if case.centered else 0.0
    if case.centered:
        k = k - k.mean(0)
    rows = []
    for x in q:
        weights = k @ x
        normaliser = 1.0
        if case.eps is not None:
            normaliser = total(weights) + case.eps
        if case.floor is not None:
            normaliser = max(total(weights), case.floor)
        rows.append(middle + 0.3 * total(weights[:, None] * (v - middle), 0) / normaliser)
    got = linear_attention(**inputs, **case.options, impl=impl)
    torch.testing.assert_close(got, torch.stack(rows).view(got.shape), rtol=1e-12, atol=1e-12)


def features(*shape: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values `[2, tokens, heads, head_dim]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, *shape, generator=generator, dtype=torch.float64).unbind()


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def test_l2vit():
    """arXiv:2501.16182: ReLU, a denominator of at least 100, a temperature for every head."""
    query, key, value = features(49, 3, 32)
    temperature = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    q, k, v = heads_first(query.relu(), key.relu(), value)
    denominator = torch.clamp(q @ k.sum(2).unsqueeze(-1), min=100)
    assert (denominator == 100).any() and (denominator > 100).any()
    expected = q @ (k.mT @ v * temperature[:, None, None]) / denominator
    got = linear_attention(query, key, value, relu=True, floor=100.0, scale=temperature)
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_inline():
    """arXiv:2412.06590, as its authors compute it: injective attention without a softmax."""
    query, key, value = features(30, 2, 8)
    q, k, v = heads_first(query, key, value)
    tokens, scale = 30, 8**-0.5
    k_mean, v_mean = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    expected = q @ (k.mT @ v * (scale / tokens)) + (1 - scale * q @ k_mean.mT) * v_mean
    got = linear_attention(query, key, value, centered=True, scale=scale)
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_flatten():
    """arXiv:2308.00442: features whose direction is sharpened by a power, norms over all heads, means of tokens."""
    query, key, value = features(36, 2, 8)
    scale = torch.linspace(-1, 1, 16, dtype=torch.float64)

    def focus(x: torch.Tensor) -> torch.Tensor:
        x = (x.flatten(2).relu() + 1e-6) / softplus(scale)
        cubed = x**3
        return (cubed * (x.norm(dim=-1, keepdim=True) / cubed.norm(dim=-1, keepdim=True))).unflatten(2, (2, 8))

    q, k, v = heads_first(focus(query), focus(key), value)
    z = 1 / (q @ k.mean(2, keepdim=True).mT + 1e-6)
    expected = (q @ (k.mT @ v / 36)) * z
    got = linear_attention(focus(query), focus(key), value, mean=True, eps=1e-6)
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_efficient_attention():
    """arXiv:1812.01243: keys are a softmax over positions, queries one over channels."""
    query, key, value = features(20, 2, 8)
    q, k, v = heads_first(query.softmax(-1), key.softmax(1), value)
    got = linear_attention(query.softmax(-1), key.softmax(1), value)
    torch.testing.assert_close(got.transpose(1, 2), q @ (k.mT @ v), rtol=1e-12, atol=1e-12)


def test_flow_attention():
    """arXiv:2202.06258: what flows in and out is linear attention to values of one feature."""
    query, key, value = features(24, 2, 8)
    query, key, eps = query.sigmoid(), key.sigmoid(), 1e-6
    q, k, v = heads_first(query, key, value)

    incoming = 1 / ((q + eps) * (k.sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    outgoing = 1 / ((k + eps) * (q.sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    refined_in = ((q + eps) * ((k * outgoing).sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    refined_out = ((k + eps) * ((q * incoming).sum(2, keepdim=True) + eps)).sum(-1, keepdim=True).clamp(-1, 1)
    competition = refined_out.softmax(2) * 24
    expected = (q * incoming) @ (k.mT @ (v * competition)) * refined_in.sigmoid()

    def flow(to: torch.Tensor, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sum over `source` of (to + eps) . (source * weight + eps / tokens)."""
        return linear_attention(to + eps, source, weight) + eps * (to + eps).sum(-1, keepdim=True)

    ones = torch.ones_like(query[..., :1])
    incoming, outgoing = 1 / flow(query, key, ones), 1 / flow(key, query, ones)
    refined_in = flow(query, key, outgoing)
    competition = flow(key, query, incoming).clamp(-1, 1).softmax(1) * 24
    got = linear_attention(query * incoming, key, value * competition) * refined_in.sigmoid()
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [FLOOR, CENTERED, EPS], ids=["floor", "centered", "eps"])
def test_gradcheck(case):
    case = replace(case, shape=(3,), key_shape=(4,), batch=1, heads=2, head_dim=3, value_dim=2)
    inputs = make_inputs(replace(case, floor=None if case.floor is None else 2.0), torch.float64)

    def operator(*tensors):
        return linear_attention(**dict(zip(inputs, tensors, strict=True)), **case.options, impl="torch")

    assert torch.autograd.gradcheck(operator, tuple(inputs.values()))


def test_large_means_do_not_swallow_the_covariance():
    check_large_means("torch")


def test_the_first_token_may_lie_far_away(monkeypatch):
    check_first_token_far_away("torch")
    monkeypatch.setattr("foveal.kernels.linear.chunked.CHUNK", 1 << 12)  # several parts
    check_first_token_far_away("torch")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check(replace(FLOOR, layout=layout), torch.float64, "torch")


@pytest.mark.parametrize("case", [FLOOR, CENTERED, EPS], ids=["floor", "centered", "eps"])
def test_tokens_in_parts(case):
    """More tokens than are worked on at a time, 512 of these, of one entry and of several."""
    long = replace(case, heads=4, head_dim=128, value_dim=48)
    check(replace(long, shape=(30, 25), key_shape=(27, 30)), torch.float32, "torch")
    check(replace(long, shape=(15, 10), key_shape=(40, 10), batch=5), torch.float32, "torch")


def test_function_transforms():
    query, key, value = torch.randn(3, 2, 5, 6, 2, 4, dtype=torch.float64)

    def total(query: torch.Tensor) -> torch.Tensor:
        return linear_attention(query, key, value, relu=True, eps=0.5).square().sum()

    (expected,) = torch.autograd.grad(total(query.requires_grad_()), query)
    query = query.detach()
    torch.testing.assert_close(torch.func.grad(total)(query), expected)
    _, slope = torch.func.jvp(total, (query,), (query,))
    torch.testing.assert_close(slope, (expected * query).sum())
    stacked = torch.stack([query, 2 * query])
    torch.testing.assert_close(torch.func.vmap(total)(stacked), torch.stack([total(x) for x in stacked]))


def test_second_derivative_is_refused():
    inputs = make_inputs(FLOOR, torch.float64)
    out = linear_attention(**inputs, **FLOOR.options)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiled_as_one_operator():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    operator = torch.compile(linear_attention, fullgraph=True, dynamic=False, backend=counter)
    for case in (FLOOR, CENTERED, replace(EPS, value_dim=5)):
        for dtype in (torch.float64, torch.float16):
            check(case, dtype, "torch", operator=operator)
    for graph in counter.graphs:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert called.count(torch.ops.foveal.linear_torch_forward) == 1
        assert torch.matmul not in called and torch.bmm not in called


def test_compile_dynamic_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    operator = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for shape, key_shape in (((14, 12), (6, 7)), ((25, 6), (5, 11)), ((19, 31), (10, 24))):
        check(replace(EPS, shape=shape, key_shape=key_shape), torch.float32, "torch", operator=operator)
        counts.add(counter.frame_count)
    assert len(counts) == 1


def check_graph(case: Case, dtype: torch.dtype, trace: Callable) -> None:
    """Graphs of torch alone have plain products, which PyTorch differentiates."""

    class Model(torch.nn.Module):
        def forward(self, query, key, value, scale):
            return linear_attention(query, key, value, scale=scale, **case.options)

    graph = trace(Model(), tuple(x.detach() for x in make_inputs(case, dtype).values()))
    check(case, dtype, "torch", operator=lambda query, key, value, scale, **_: graph(query, key, value, scale))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_exported_graphs_keep_the_definition(variant):
    case = replace(EPS, **({"eps": None, "mean": False, "scale": None, "key_shape": (4, 7), "value_dim": 5} | variant))
    check_graph(case, torch.float64, lambda model, inputs: torch.export.export(model, inputs).module())


def test_jit_trace():
    check_graph(FLOOR, torch.float32, torch.jit.trace)


class Exported(torch.nn.Module):
    def forward(self, query, key, value, scale):
        return linear_attention(query, key, value, relu=True, floor=5.0, scale=scale)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_is_aten(dynamic):
    def inputs(tokens):
        return *(torch.randn(1, tokens, 2, 8) for _ in range(3)), torch.randn(2)

    tokens = torch.export.Dim("tokens", min=10, max=4096)
    shapes = (*({1: tokens},) * 3, None) if dynamic else None
    exported = torch.export.export(Exported(), inputs(132), dynamic_shapes=shapes)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)} == {"aten"}
    for length in (132, 340)[: 1 + dynamic]:
        given = inputs(length)
        torch.testing.assert_close(exported.module()(*given), Exported()(*given), rtol=1e-5, atol=1e-5)


Q = torch.zeros(1, 6, 8, 2, 4)
TENSORS = {
    "not a tensor": ((Q, None, Q), TypeError, "key must be a tensor, got NoneType"),
    "rank": ((Q[0, 0], Q, Q), ValueError, r"query has shape \(8, 2, 4\); expected \[B, \*spatial"),
    "integer": ((Q.long(), Q, Q), TypeError, r"query\.dtype=torch\.int64"),
    "dtype": ((Q, Q, Q.half()), TypeError, r"value\.dtype=torch\.float16"),
    "device": ((Q, Q, Q.to("meta")), ValueError, r"value\.device=meta"),
    "batch": ((Q, Q.expand(2, -1, -1, -1, -1), Q), ValueError, r"key\.shape=\(2, 6, 8, 2, 4\) must have the batch"),
    "heads": ((Q, Q[..., :1, :], Q), ValueError, r"key\.shape=\(1, 6, 8, 1, 4\) must have the batch, heads"),
    "value": ((Q, Q, Q[:, :5]), ValueError, r"value\.shape=\(1, 5, 8, 2, 4\) must equal key\.shape"),
    "empty": ((Q, Q[:, :0], Q[:, :0]), ValueError, r"key\.shape=\(1, 0, 8, 2, 4\) must have no empty axis"),
}


@pytest.mark.parametrize(("tensors", "error", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensor_is_refused(tensors, error, message):
    with pytest.raises(error, match=message):
        linear_attention(*tensors)


WRONG = {
    "two normalisers": ({"eps": 1e-6, "floor": 1.0}, "eps=1e-06 and floor=1.0 exclude each other"),
    "centered": ({"eps": 1e-6, "centered": True}, "centered=True has no normaliser: eps=1e-06"),
    "eps": ({"eps": -1.0}, r"eps=-1\.0 must be None or at least 0"),
    "floor": ({"floor": 0.0}, r"floor=0\.0 must be None or above 0"),
    "scale shape": ({"scale": torch.ones(2, 1)}, r"scale\.shape=\(2, 1\) must be \[heads\] = \(2,\)"),
    "scale dtype": ({"scale": torch.ones(2).long()}, r"scale \(torch\.int64"),
    "impl": ({"impl": "cuda"}, "impl='cuda'"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(Q, Q, Q, **options)


def test_explain():
    text = str(explain("linear_attention", Q, Q, Q, floor=100.0, relu=True))
    assert "linear_attention of (1, 6, 8, 2, 4) float32 on cpu takes: torch" in text
    assert "triton" in text and "cannot: " in text
    found = explain("linear_attention", Q, Q, Q[..., :3]).cost
    assert found["forward_flops"] == 2 * 2 * 4 * 3 * 96 and found["backward_flops"] == 2 * found["forward_flops"]
    sizes = dict(batch=1, heads=2, head_dim=4, value_dim=3, queries=48, keys=48, itemsize=4)
    state = 4 * 2 * (12 + 4 + 3)
    assert found["forward_bytes"] == cost.forward_bytes(**sizes) == 4 * 2 * 48 * (4 + 4 + 3 + 3) + 2 * state
    assert found["backward_bytes"] == cost.backward_bytes(**sizes) == 4 * 2 * 48 * (8 + 8 + 6 + 3) + 3 * state


def test_long_heads_are_left_to_plain_pytorch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        long, short = (torch.empty(1, 64, 2, d, device="cuda") for d in (160, 128))
        assert explain("linear_attention", long, long, long).impl == "torch"
        assert "head_dim 160 exceeds 128" in explain("linear_attention", long, long, long).reasons["triton"]
        assert explain("linear_attention", short, short, long).impl == "triton"


def test_pictures_show_the_weights_of_the_operator(tmp_path):
    torch.manual_seed(0)  # of a query without a positive feature nothing is left
    query, key, value = torch.randn(3, 1, 6, 9, 1, 4, dtype=torch.float64)
    token = (2, 7)
    single = (query[0, ..., 0, :], key[0, ..., 0, :])
    variants = ({"relu": True, "eps": 0.0}, {"centered": True, "scale": 0.5})
    _, *maps = attention_maps(*single, token)
    for weights, options in zip(maps, variants, strict=True):
        expected = linear_attention(query, key, value, **options)[0, 2, 7, 0]
        torch.testing.assert_close(weights.flatten() @ value.view(-1, 4), expected)
    picture = plot_linear_attention(*single, token=token, path=tmp_path / "linear.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"token=\(6, 0\)"):
        plot_linear_attention(*single, token=(6, 0), path=picture)
