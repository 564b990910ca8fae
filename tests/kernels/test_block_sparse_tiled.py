"""The plain path of block-sparse attention against the reference, and how it behaves in torch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from block_sparse_matrix import (
    TENSORS,
    Case,
    cases,
    check,
    make_inputs,
    make_mask,
    run,
    visible_tokens,
)
from foveal.kernels.block_sparse import mask as masks
from foveal.kernels.ops import BlockMask, block_sparse_attention, routing_attention2d
from torch._dynamo.testing import CompileCounterWithBackend

CASE = Case(
    shape=(7, 10),
    key_shape=(5, 9),
    query_block=(3, 4),
    key_block=(2, 4),
    most=5,
    per_head=True,
    bias=True,
    q_len=True,
    kv_len=True,
    heads=4,
    key_heads=2,
    batch=2,
    extra=3,
    additional_mask="mask",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_random_cases_match_the_reference(dtype):
    for case in cases(n=150 if dtype.itemsize > 2 else 50, seed=dtype.itemsize):
        check(case, dtype, "torch")


def test_chunks_and_parts_change_nothing(monkeypatch):
    """Small limits give many chunks, parts of batch and heads, and rows cut."""
    from foveal.kernels.block_sparse import tiled

    for name, value in (("LOGIT_BYTES", 512), ("CHUNK_BYTES", (1, 4096)), ("PART_BYTES", 1), ("PART_RATIO", 1e-3)):
        monkeypatch.setattr(tiled, name, value)
    long = Case(
        shape=(300,), key_shape=(40,), query_block=(150,), key_block=(16,), most=3, batch=3, heads=4, key_heads=2
    )
    for case in (*cases(n=60, seed=3), long, replace(long, per_head=True)):
        check(case, torch.float64, "torch")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["mask", "lengths"])
def test_masked_additional_tokens_may_hold_anything(impl, kind):
    case = replace(CASE, additional_mask=kind, seed=4)
    visible = visible_tokens(case)[..., None, None]
    inputs = make_inputs(case, torch.float64)
    names = ("additional_keys", "additional_values")
    poisoned = {n: inputs[n].detach().where(visible, torch.nan).requires_grad_() for n in names}
    got, expected = run(case, inputs | poisoned, impl), run(case, inputs, impl)
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, msg=name)
    assert not got["additional_values"].masked_select(~visible).any()


def test_lists_say_who_is_seen():
    """Against a mask written out token by token."""
    query, key, value = torch.randn(3, 1, 4, 6, 1, 8, dtype=torch.float64)
    kv_idx = torch.tensor([[[[3, 0], [1, 1], [2, 9], [0, 2]]]], dtype=torch.int32)
    mask = BlockMask((2, 3), (2, 3), torch.tensor([[[2, 1, 1, 0]]], dtype=torch.int32), kv_idx)
    box = torch.arange(4)[:, None] // 2 * 2 + torch.arange(6) // 3  # of every token
    seen = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ((0, 3), (0, 0), (1, 1), (2, 2)):
        seen[i, j] = True
    logits = query.flatten(1, 3) @ key.flatten(1, 3).mT * 8**-0.5
    logits = logits.masked_fill(~seen[box.flatten()][:, box.flatten()], float("-inf"))
    expected = logits.softmax(-1).nan_to_num(0) @ value.flatten(1, 3)
    for impl in ("reference", "torch"):
        out, lse = block_sparse_attention(query, key, value, mask=mask, impl=impl, return_lse=True)
        torch.testing.assert_close(out.flatten(1, 3), expected)
        torch.testing.assert_close(lse.flatten(1), logits.logsumexp(-1))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_empty_lists(impl):
    """Output 0, log-sum-exp -inf, gradients 0."""
    case = Case(shape=(6,), key_shape=(6,), query_block=(2,), key_block=(3,), most=2)
    inputs = make_inputs(case, torch.float32)
    mask = make_mask(case)._replace(kv_num=torch.zeros(1, 1, 3, dtype=torch.int32))
    out, lse = block_sparse_attention(**inputs, mask=mask, impl=impl, return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    grads = torch.autograd.grad(
        (out, lse), [inputs[n] for n in TENSORS[:3]], (torch.ones_like(out), torch.ones_like(lse))
    )
    assert all((g == 0).all() for g in grads)


def test_inverse_lists_name_who_lists_a_box():
    case = replace(CASE, per_batch=True, full=False)
    mask = make_mask(case, inverse=True)
    (starts, order), seen = mask.inverse, masks.listed(mask.kv_num, mask.kv_idx)
    for b in range(2):
        for h in range(4):
            for j in range(case.key_boxes):
                entries = order[b, h, starts[b, h, j] : starts[b, h, j + 1]]
                expected = ((mask.kv_idx[b, h] == j) & seen[b, h]).flatten().nonzero().flatten()
                assert torch.equal(entries.long(), expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_lists_of_key_heads_are_those_of_their_query_heads(impl):
    case = Case(
        (6, 5), (6, 5), (2, 2), (3, 2), most=2, heads=4, key_heads=2, per_head=True, per_key_head=True, bias=True
    )
    inputs, mask = make_inputs(case, torch.float64), make_mask(case)
    assert mask.kv_num.shape[1] == 2
    lists = {name: getattr(mask, name).repeat_interleave(2, 1) for name in ("kv_num", "kv_idx", "bias")}
    got, expected = run(case, inputs, impl, mask=mask), run(case, inputs, impl, mask=mask._replace(**lists))
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_lengths_of_a_batch_entry_are_its_own(impl):
    case = Case((12,), (12,), (4,), (4,), most=3, full=True, batch=3, q_len=True, kv_len=True, lengths_per_batch=True)
    inputs, mask = make_inputs(case, torch.float64), make_mask(case)
    whole = run(case, inputs, impl, mask=mask)
    for entry in range(3):
        own = {name: None if x is None else x[entry : entry + 1] for name, x in inputs.items()}
        lengths = {name: getattr(mask, name)[entry] for name in ("q_len", "kv_len")}
        out = block_sparse_attention(**own, mask=mask._replace(**lengths), impl=impl)
        torch.testing.assert_close(whole["out"][entry : entry + 1], out, rtol=1e-12, atol=1e-12)


def test_compressed_lists():
    indptr = torch.tensor([[0, 2, 2, 3], [3, 4, 7, 7]])
    indices = torch.tensor([5, 1, 0, 2, 3, 4, 5])
    mask = BlockMask.from_indptr((2,), (1,), indptr, indices)
    assert mask.kv_num.tolist() == [[[2, 0, 1], [1, 3, 0]]] and mask.kv_idx.shape == (1, 2, 3, 3)
    listed = masks.listed(mask.kv_num, mask.kv_idx)
    assert mask.kv_idx[listed].tolist() == indices.tolist()
    one = BlockMask.from_indptr([2], [1], indptr[0].int(), indices[:3].int(), most=2)
    assert one.kv_idx[masks.listed(one.kv_num, one.kv_idx)].tolist() == [5, 1, 0] and one.kv_idx.shape == (1, 1, 3, 2)
    with pytest.raises(TypeError, match=r"indptr\.dtype=torch\.float32"):
        BlockMask.from_indptr((2,), (1,), indptr.float(), indices)
    with pytest.raises(ValueError, match=r"indices\.shape=\(1, 7\) must have 1 axes"):
        BlockMask.from_indptr((2,), (1,), indptr, indices[None])


def test_gradcheck():
    inputs = {n: x.detach().double().requires_grad_() for n, x in make_inputs(CASE, torch.float64).items()}
    mask = make_mask(replace(CASE, q_len=False), inverse=False)

    def call(*tensors):
        query, key, value, additional_keys, additional_values = tensors
        return block_sparse_attention(
            query,
            key,
            value,
            additional_keys=additional_keys,
            additional_values=additional_values,
            mask=mask,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(call, tuple(inputs[n] for n in TENSORS), fast_mode=True)


def test_what_is_not_listed_is_not_read():
    """NaN outside the listed boxes, past the ends of ragged boxes and in queries that do not exist reaches nothing."""
    case = replace(CASE, heads=2, batch=1, bias=False)
    mask, inputs = make_mask(case), make_inputs(case, torch.float32)
    mask = mask._replace(kv_num=mask.kv_num.clamp(max=1), kv_idx=mask.kv_idx.clamp(min=0) % 4)
    clean = run(case, inputs, "torch", mask=mask)
    poisoned = {n: x.detach().clone() for n, x in inputs.items()}
    box, place = masks.box_of_token(case.key_shape, case.key_block, torch.device("cpu"))
    dead = ((box >= 4) | (place >= mask.kv_len[box])).view(case.key_shape)
    box, place = masks.box_of_token(case.shape, case.query_block, torch.device("cpu"))
    absent = (place >= mask.q_len[box]).view(case.shape)
    assert dead.any() and absent.any()
    poisoned["key"][:, dead] = poisoned["value"][:, dead] = poisoned["query"][:, absent] = float("nan")
    dirty = run(case, {n: x.requires_grad_() for n, x in poisoned.items()}, "torch", mask=mask)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_nan_that_is_listed_shows():
    query, key, value = torch.randn(3, 1, 8, 1, 4)
    key[0, 5] = float("nan")
    mask = BlockMask((4,), (4,), torch.ones(1, 1, 2).int(), torch.tensor([[[[0], [1]]]]).int())
    out = block_sparse_attention(query, key, value, mask=mask, impl="torch")
    assert out[0, :4].isfinite().all() and out[0, 4:].isnan().all()


def test_memory_is_linear_in_tokens():
    """Boxes and lists of fixed size: four times the tokens take at most four times the memory, and less than inputs."""

    def peak(tokens: int) -> int:
        query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, tokens, 2, 32))
        kv_idx = torch.arange(tokens // 64)[:, None].add(torch.arange(4)).remainder(tokens // 64).int()[None, None]
        mask = BlockMask((64,), (64,), torch.full(kv_idx.shape[:-1], 4).int(), kv_idx)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            block_sparse_attention(query, key, value, mask=mask, impl="torch").sum().backward()
        now = most = 0
        records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for record in sorted(records, key=lambda e: e.start_ns()):
            now += record.nbytes()
            most = max(most, now)
        return most

    small, large = peak(4096), peak(16384)
    assert large < 4.2 * small
    assert large < 4 * (4 * 16384 * 2 * 32 * 4)  # four times query, key, value and output, gradients included


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_operator(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        partial(block_sparse_attention, return_lse=True), fullgraph=True, dynamic=dynamic, backend=counter
    )
    shapes = ((7, 10), (9, 14), (11, 13)) if dynamic else ((7, 10),)
    for shape in shapes:
        check(replace(CASE, shape=shape), torch.float32, "torch", operator=compiled)
    called = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.foveal.block_sparse_torch_forward) == 1
    assert torch.bmm not in called


def test_routing_compiled_for_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(routing_attention2d, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for shape in ((14, 21), (28, 35), (21, 42)):
            x = torch.randn(3, 2, *shape, 3, 8)
            torch.testing.assert_close(compiled(*x, topk=4), routing_attention2d(*x, topk=4))


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return routing_attention2d(query, key, value, topk=4)

    inputs = tuple(torch.randn(3, 2, 14, 21, 3, 8))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), inputs, dynamic_shapes=({0: batch},) * 3)
    larger = tuple(torch.randn(3, 5, 14, 21, 3, 8))
    torch.testing.assert_close(program.module()(*larger), Model()(*larger))


def test_second_derivatives_are_refused():
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 14, 14, 1, 8))
    out = routing_attention2d(query, key, value, topk=2, impl="torch")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiated Tensor"):
        torch.autograd.grad(gradient.sum(), query)
