"""Agent attention: the plain path against the fp64 reference, what it promises besides values, and what is refused."""

from dataclasses import replace

import pytest
import torch
from agent_matrix import Case, cases, check, make_inputs
from foveal.kernels.agent import cost
from foveal.kernels.agent.plot import attention_maps, plot_agent_attention
from foveal.kernels.ops import agent_attention, explain
from operator_matrix import LAYOUTS
from torch._dynamo.testing import CompileCounterWithBackend

FULL = Case((5, 7), (4, 6), agents=9, heads=3, agent_bias=True, query_bias=True, query_scale=0.2)
PLAIN = Case((13, 11), (13, 11), agents=16, batch=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_random_cases(dtype):
    for case in cases(300, seed=0):
        check(case, dtype, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_cases_in_half_precision(dtype):
    for case in cases(80, seed=1):
        if case.agents > 1:  # one agent has gradients of zero, and of the rounding of float32 where softmax is fused
            check(case, dtype, "torch")


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_definition(impl):
    """One head of one entry, token by token."""
    case = replace(FULL, heads=1)
    inputs = make_inputs(case, torch.float64)
    q, k, v, a = (inputs[x][0].reshape(-1, case.head_dim) for x in ("query", "key", "value", "agent"))
    gathered = torch.stack([
        sum(w * x for w, x in zip((k @ a[i] * 8**-0.5 + inputs["agent_bias"][0, i]).softmax(0), v, strict=True))
        for i in range(9)
    ])  # fmt: skip
    out = torch.stack([((a @ q[i]) * 0.2 + inputs["query_bias"][0, i]).softmax(0) @ gathered for i in range(35)])
    got = agent_attention(**inputs, **case.options, impl=impl)
    torch.testing.assert_close(got, out.view(got.shape), rtol=1e-12, atol=1e-12)


def test_one_agent_gives_every_query_the_same():
    inputs = make_inputs(replace(PLAIN, agents=1), torch.float64)
    out = agent_attention(**inputs)
    torch.testing.assert_close(out, out[:, :1, :1].expand_as(out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [FULL, replace(FULL, agent_bias=False, query_bias=False, shape=(6,))])
def test_gradcheck(case):
    case = replace(case, shape=case.shape[:1], key_shape=(4,), agents=3, heads=2, head_dim=3)
    inputs = {name: x for name, x in make_inputs(case, torch.float64).items() if x is not None}

    def operator(*tensors):
        return agent_attention(**dict(zip(inputs, tensors, strict=True)), **case.options, impl="torch")

    assert torch.autograd.gradcheck(operator, tuple(inputs.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check(replace(FULL, layout=layout), torch.float64, "torch")


@pytest.mark.parametrize("agents", [9, 49])
def test_many_and_few_agents_without_gradients(agents):
    """Where no gradient is wanted CPUs attend to many agents by fused attention."""
    case = replace(PLAIN, agents=agents, agent_bias=True, query_bias=True, query_scale=0.2)
    inputs = make_inputs(case, torch.float64)
    expected = agent_attention(**inputs, **case.options, impl="reference")
    with torch.no_grad():
        out = agent_attention(**{name: x.detach().float() for name, x in inputs.items()}, **case.options, impl="torch")
        hidden = dict(inputs, query_bias=inputs["query_bias"].index_fill(1, torch.tensor([5]), -torch.inf))
        unseen = agent_attention(**hidden, **case.options, impl="torch").flatten(1, -3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert unseen[:, 5].isnan().all() and unseen[:, :5].isfinite().all()


@pytest.mark.parametrize("agents", [9, 25, 49])
def test_an_agent_that_sees_nothing_is_nan_with_and_without_gradients(agents):
    query, key, value = torch.randn(3, 1, 8, 8, 2, 4)
    agent, bias = torch.randn(1, agents, 2, 4), torch.randn(2, agents, 64)
    bias[0, 3] = -float("inf")
    for impl in ("torch", "reference"):
        for x in (query, query.clone().requires_grad_()):
            out = agent_attention(x, key, value, agent, agent_bias=bias, impl=impl)
            assert out[..., 0, :].isnan().all() and out[..., 1, :].isfinite().all()


def test_compile():
    torch._dynamo.reset()
    operator = torch.compile(agent_attention, fullgraph=True, dynamic=False, backend="aot_eager")
    for case in (FULL, PLAIN):
        check(case, torch.float32, "torch", operator=operator)


def test_compile_dynamic_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    operator = torch.compile(agent_attention, fullgraph=True, dynamic=True, backend=counter)
    for shape, key_shape, agents in (((14, 12), (6, 7), 9), ((25, 6), (5, 11), 17), ((19, 31), (10, 24), 4)):
        check(replace(FULL, shape=shape, key_shape=key_shape, agents=agents), torch.float32, "torch", operator=operator)
    assert counter.frame_count == 1


class Exported(torch.nn.Module):
    def forward(self, query, key, value, agent, agent_bias):
        return agent_attention(query, key, value, agent, agent_bias=agent_bias)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_is_aten(dynamic):
    def inputs(tokens):
        return *(torch.randn(1, tokens, 2, 8) for _ in range(3)), torch.randn(1, 9, 2, 8), torch.randn(2, 9, tokens)

    tokens = torch.export.Dim("tokens", min=10, max=4096)
    shapes = (*({1: tokens},) * 3, None, {2: tokens}) if dynamic else None
    exported = torch.export.export(Exported(), inputs(132), dynamic_shapes=shapes)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)} == {"aten"}
    for length in (132, 340)[: 1 + dynamic]:
        given = inputs(length)
        torch.testing.assert_close(exported.module()(*given), Exported()(*given), rtol=1e-5, atol=1e-5)


Q = torch.zeros(1, 6, 8, 2, 4)
A = torch.zeros(1, 9, 2, 4)
TENSORS = {
    "not a tensor": ((Q, Q, Q, None), TypeError, "agent must be a tensor, got NoneType"),
    "query rank": ((Q[0, 0], Q, Q, A), ValueError, r"query has shape \(8, 2, 4\); expected \[B, \*spatial"),
    "agent rank": ((Q, Q, Q, Q), ValueError, r"agent has shape \(1, 6, 8, 2, 4\); expected \[B, agents,"),
    "integer": ((Q.long(), Q, Q, A), TypeError, r"query\.dtype=torch\.int64"),
    "dtype": ((Q, Q, Q, A.half()), TypeError, r"agent\.dtype=torch\.float16"),
    "device": ((Q, Q, Q.to("meta"), A), ValueError, r"value\.device=meta"),
    "batch": ((Q, Q, Q, A.expand(2, -1, -1, -1)), ValueError, r"agent\.shape=\(2, 9, 2, 4\) must have the batch"),
    "heads": ((Q, Q[..., :1, :], Q, A), ValueError, r"key\.shape=\(1, 6, 8, 1, 4\) must have the batch, heads"),
    "value": ((Q, Q, Q[:, :5], A), ValueError, r"value\.shape=\(1, 5, 8, 2, 4\) must equal key\.shape"),
    "empty": ((Q, Q, Q, A[:, :0]), ValueError, r"agent\.shape=\(1, 0, 2, 4\) must have no empty axis"),
}


@pytest.mark.parametrize(("tensors", "error", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensor_is_refused(tensors, error, message):
    with pytest.raises(error, match=message):
        agent_attention(*tensors)


WRONG = {
    "agent_bias": ({"agent_bias": torch.zeros(2, 48, 9)}, ValueError, r"agent_bias\.shape=\(2, 48, 9\).*\(2, 9, 48\)"),
    "query_bias": ({"query_bias": torch.zeros(2, 9, 48)}, ValueError, r"query_bias\.shape=\(2, 9, 48\).*\(2, 48, 9\)"),
    "batched": ({"query_bias": torch.zeros(1, 2, 48, 9)}, ValueError, r"query_bias\.shape=\(1, 2, 48, 9\)"),
    "bias dtype": ({"agent_bias": torch.zeros(2, 9, 48).long()}, ValueError, r"agent_bias \(torch\.int64"),
    "bias type": ({"agent_bias": 1.0}, TypeError, "agent_bias must be a tensor or None, got float"),
    "impl": ({"impl": "cuda"}, ValueError, "impl='cuda'"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        agent_attention(Q, Q, Q, A, **options)


def test_explain():
    text = str(explain(agent_attention, Q, Q, Q, agent=A, query_bias=torch.zeros(2, 48, 9)))
    assert "agent_attention of (1, 6, 8, 2, 4) float32 on cpu takes: torch" in text
    assert "triton" in text and "cannot: " in text
    found = explain("agent_attention", Q, Q, Q, agent=A, query_bias=torch.zeros(2, 48, 9)).cost
    assert found["agents"] == 9 and found["forward_flops"] == 4 * 2 * 4 * 9 * 96
    without = cost.forward_bytes(batch=1, heads=2, head_dim=4, queries=48, keys=48, agents=9, itemsize=4)
    assert found["forward_bytes"] - without == 4 * 2 * 48 * 9


def test_pictures_show_the_weights_of_the_operator(tmp_path):
    query, key, value = torch.randn(3, 1, 6, 9, 1, 4, dtype=torch.float64)
    agent = torch.randn(1, 9, 1, 4, dtype=torch.float64)
    token = (2, 7)
    single = (query[0, ..., 0, :], key[0, ..., 0, :], agent[0, :, 0])
    dense, weights, first, through = attention_maps(*single, token)
    for x in (dense, weights, first, through):
        assert x.sum().item() == pytest.approx(1)
    expected = agent_attention(query, key, value, agent)[0, 2, 7, 0]
    torch.testing.assert_close(through.flatten() @ value.view(-1, 4), expected)
    picture = plot_agent_attention(*single, token=token, path=tmp_path / "agents.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"agent\.shape=\(8, 4\)"):
        plot_agent_attention(*single[:2], single[2][:8], token=token, path=picture)
    with pytest.raises(ValueError, match=r"token=\(6, 0\)"):
        plot_agent_attention(*single, token=(6, 0), path=picture)
