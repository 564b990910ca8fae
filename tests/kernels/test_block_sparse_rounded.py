"""Block-sparse attention with queries and keys of few bits: 8-bit integers, e4m3, signs."""

import math
import re
from dataclasses import replace

import block_sparse_matrix as matrix
import kernel_checks
import pytest
import torch
from block_sparse_matrix import cases
from block_sparse_rounded_matrix import DTYPES, FULL, check
from foveal.kernels.block_sparse import call as calls
from foveal.kernels.block_sparse import rounded
from foveal.kernels.neighborhood.quantized import mean_logits
from foveal.kernels.ops import BlockMask, block_sparse_attention, explain, masks
from foveal.kernels.tools import compile_report
from foveal.layers.binary import signs
from operator_matrix import as_leaves
from torch._subclasses.fake_tensor import FakeTensorMode


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(grid=(6, 8), heads: int = 2, d: int = 32, **options) -> tuple[torch.Tensor, ...]:
    return tuple(draw(3, 1, *grid, heads, d, **options).unbind())


def half(query: torch.Tensor, key: torch.Tensor) -> BlockMask:
    return masks.vsa(query, key, sparsity=0.5, block=(3, 4))


def call_of(query, key, mask, qk_dtype=torch.int8, **options) -> calls.RoundedCall:
    found = calls.make_call(query, key, key, mask=mask, qk_dtype=qk_dtype, **options)
    assert isinstance(found, calls.RoundedCall)
    return found


# what is rounded


def test_an_integer_is_off_by_at_most_half_a_step_of_its_own_block():
    query, key, _ = tensors((7, 9))
    query[:, 3:6, 4:8] *= 100  # one block: others keep their steps
    mask = half(query, key)
    call = call_of(query, key, mask)
    found = rounded.to_int8(query, key, call)
    restored, keys, _ = rounded.restore(found, call, torch.float64)
    step = rounded._of_tokens(found.query_scale.double(), (7, 9), (3, 4))
    assert ((restored - query).abs() <= 0.5001 * step).all() and step.max() > 50 * step.min()
    assert found.query.abs().max() == 127 and found.key.abs().max() == 127
    centred = key - key.mean((1, 2), keepdim=True)
    assert ((keys - centred).abs() <= 0.5001 * rounded._of_tokens(found.key_scale, (7, 9), (3, 4))).all()


def test_signs_stand_for_the_mean_magnitude_of_their_head():
    query, key, value = tensors()
    mask = half(query, key)
    out = block_sparse_attention(query, key, value, mask=mask, qk_dtype=torch.uint1)
    q, k = (torch.where(x >= 0, 1.0, -1.0) * x.abs().mean((1, 2, 4), keepdim=True) for x in (query, key))
    torch.testing.assert_close(out, block_sparse_attention(q, k, value, mask=mask))


# what is computed


@pytest.mark.parametrize("qk_dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_cases_match_the_reference_on_the_rounded_numbers(qk_dtype, dtype):
    for case in cases(12, seed=5):
        check(case, dtype, "torch", qk_dtype)
    check(FULL, dtype, "reference", qk_dtype)


@pytest.mark.parametrize("qk_dtype", DTYPES.values(), ids=DTYPES.keys())
def test_gradients_pass_straight_through(qk_dtype):
    """Those of attention to the rounded numbers; of signs where a number is in [-1, 1], and by the magnitude."""
    inputs = matrix.make_inputs(FULL, torch.float64)
    out, lse = matrix.WITH_LSE(**inputs, **FULL.options, qk_dtype=qk_dtype)
    weight = draw(*out.shape, seed=3, dtype=torch.float64)
    finite = lse.isfinite()
    got = torch.autograd.grad((out * weight).sum() + lse[finite].sum(), list(inputs.values()))
    plain = as_leaves(inputs)
    call = calls.make_call(**plain, **FULL.options, qk_dtype=qk_dtype)
    if qk_dtype == torch.uint1:
        query, key, extra = plain["query"], plain["key"], plain["additional_keys"]
        there = rounded.known(query, key, call)
        of_key = (there.key.abs().sum((1, 2, 4)) + there.additional_keys.abs().sum((1, 3))) / 24 / there.keys[..., 0]
        of_query = there.query.abs().sum((1, 2, 4)) / 24 / there.queries[..., 0]
        query, key = (signs(x) * y[:, None, None, :, None] for x, y in ((query, of_query), (key, of_key)))
        given = plain | {"query": query, "key": key, "additional_keys": signs(extra) * of_key[:, None, :, None]}
        shift = 0.0
    else:
        q, k, e, mean = rounded.emulate(plain["query"].detach(), plain["key"].detach(), replace_extra(call))
        given = plain | as_leaves({"query": q, "key": k, "additional_keys": e})
        shift = mean_logits(plain["query"], mean.double(), call.scale)
        plain = given | {"shift": plain["query"]}
    out, lse = matrix.WITH_LSE(**given, **FULL.options, impl="reference")
    wanted = list(plain.values())
    expected = torch.autograd.grad((out * weight).sum() + (lse + shift)[finite].sum(), wanted, allow_unused=True)
    expected = dict(zip(plain, expected, strict=True))
    if "shift" in expected:
        expected["query"] = expected["query"] + expected.pop("shift")
    for name, grad in zip(inputs, got, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def replace_extra(call: calls.RoundedCall) -> calls.RoundedCall:
    return replace(call, additional_keys=call.additional_keys.detach())


def relative_error(query, key, value, qk_dtype, **extra) -> float:
    """Root mean square, relative, of the output against float64 without rounding."""
    mask = half(query, key)
    out = block_sparse_attention(query, key, value, mask=mask, qk_dtype=qk_dtype, **extra)
    exact = block_sparse_attention(*(x.double() for x in (query, key, value)), mask=mask)
    return ((out - exact).square().mean() / exact.square().mean()).sqrt().item()


def test_a_shift_of_all_keys_costs_nothing_and_eight_bits_a_hundredth():
    query, key, value = tensors((12, 16))
    shift = 20 * draw(2, 32, seed=1)
    plain = relative_error(query, key, value, torch.int8)
    assert 0.003 < plain < 0.015, "measured: 0.0093"
    assert relative_error(query, key + shift, value, torch.int8) < 1.1 * plain
    assert plain < 0.5 * relative_error(query, key, value, torch.float8_e4m3fn)


@pytest.mark.parametrize("qk_dtype", DTYPES.values(), ids=DTYPES.keys())
def test_log_sum_exp_has_the_mean_of_the_keys(qk_dtype):
    query, key, value = tensors()
    key = key if qk_dtype == torch.uint1 else key + 5
    mask = half(query, key)
    _, lse = block_sparse_attention(query, key, value, mask=mask, qk_dtype=qk_dtype, return_lse=True)
    if qk_dtype == torch.uint1:
        query, key = (signs(x) * x.abs().mean((1, 2, 4), keepdim=True) for x in (query, key))
    _, exact = block_sparse_attention(query.double(), key.double(), value.double(), mask=mask, return_lse=True)
    assert exact.abs().max() > 3 and (lse - exact).abs().max() < 0.1


@pytest.mark.parametrize("qk_dtype", DTYPES.values(), ids=DTYPES.keys())
def test_what_does_not_exist_is_not_rounded_along(qk_dtype):
    """Tokens past the length of their block and masked additional keys may hold anything."""
    inputs = {name: x.detach() for name, x in matrix.make_inputs(FULL, torch.float32).items()}
    options = FULL.options | {"qk_dtype": qk_dtype}
    out, lse = matrix.WITH_LSE(**inputs, **options)
    mask = options["mask"]
    bad = dict(inputs)
    for name, block, length in (("query", (3, 4), mask.q_len), ("key", (4, 4), mask.kv_len)):
        exists = rounded._exists(inputs[name], block, length).view(1, *inputs[name].shape[1:3], 1, 1)
        bad[name] = inputs[name].masked_fill(~exists, math.nan)
    hidden = ~options["additional_mask"]
    bad["additional_keys"] = inputs["additional_keys"].masked_fill(hidden[..., None, None], 1e9)
    again = matrix.WITH_LSE(**bad, **options)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_a_block_with_nan_is_nan_where_it_is_seen_and_nowhere_else():
    query, key, value = tensors((6, 8))
    lists = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32)[None, None]
    mask = BlockMask((3, 4), (3, 4), torch.full((1, 1, 4), 2, dtype=torch.int32), lists)
    key[0, 0, 5, 0, 3] = math.nan  # in block 1, which blocks 0 and 1 see
    out = block_sparse_attention(query, key, value, mask=mask, qk_dtype=torch.int8)
    nan = out[0, :, :, 0].isnan().all(-1)
    assert nan[:3].all() and not nan[3:].any() and not out[0, :, :, 1].isnan().any()


def test_zeros_and_no_additional_tokens():
    query, key, value = tensors()
    empty = torch.zeros(1, 0, 2, 32)
    mask = masks.vsa(query, key, sparsity=0.0, block=(3, 4))
    for qk_dtype in DTYPES.values():
        given = dict(mask=mask, additional_keys=empty, additional_values=empty, qk_dtype=qk_dtype)
        out = block_sparse_attention(query * 0, key * 0, value, **given)
        torch.testing.assert_close(out, value.mean((1, 2), keepdim=True).expand_as(out))


# what is refused, and what is said


@pytest.mark.parametrize("qk_dtype", [torch.bfloat16, torch.int32, "int8"], ids=str)
def test_other_dtypes_are_refused(qk_dtype):
    query, key, value = tensors()
    with pytest.raises((ValueError, TypeError), match=r"qk_dtype=.* must be "):
        block_sparse_attention(query, key, value, mask=half(query, key), qk_dtype=qk_dtype)


def test_explain_says_what_is_multiplied():
    query, key, value = tensors()
    said = str(explain(block_sparse_attention, query, key, value, mask=half(query, key), qk_dtype=torch.int8))
    assert "of int8 numbers restored to float32: impl is torch" in said

    def on_a_gpu(qk_dtype: torch.dtype, dtype: torch.dtype = torch.bfloat16, d: int = 32, **options) -> str:
        with FakeTensorMode():
            query, key, value = torch.empty(3, 1, 6, 8, 2, d, dtype=dtype, device="cuda")
            lists = torch.zeros(1, 1, 4, 2, dtype=torch.int32, device="cuda")
            mask = BlockMask((3, 4), (3, 4), lists[..., 0], lists)
            found = explain(block_sparse_attention, query, key, value, mask=mask, qk_dtype=qk_dtype, **options)
        return str(found)

    for qk_dtype, name in ((torch.int8, "int8"), (torch.float8_e4m3fn, "e4m3")):
        assert f"of {name} numbers; for gradients restored to bfloat16" in on_a_gpu(qk_dtype)
    assert "restored to float32: values of torch.float32 are not half precision" in on_a_gpu(torch.int8, torch.float32)
    assert "head_dim 16 is under 17" in on_a_gpu(torch.int8, d=16)
    assert "scale=-1.0 is not positive" in on_a_gpu(torch.int8, scale=-1.0)
    assert "of signs restored to bfloat16: products of bits are not used" in on_a_gpu(torch.uint1)


# matrix units


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    pytest.importorskip("triton")
    kernel_checks.run_interpreter("test_block_sparse_rounded_kernels.py")


@pytest.mark.slow
def test_interpreter_on_everything():
    pytest.importorskip("triton")
    kernel_checks.run_interpreter("test_block_sparse_rounded_kernels.py", marker="slow")


INSTRUCTIONS = {
    ("sm_80", "int8"): r"mma\.sync[\w.]*\.s8\.s8",
    ("sm_90", "int8"): r"wgmma\.mma_async[\w.]*\.s8\.s8",
    ("sm_90", "e4m3"): r"wgmma\.mma_async[\w.]*\.e4m3\.e4m3",
}


@pytest.mark.parametrize("arch, word", INSTRUCTIONS)
def test_matrix_units_multiply_eight_bits(arch, word):
    """Whole blocks at head dim 128; a slow test of all kernels has the others."""
    triton = pytest.importorskip("triton")
    variants = compile_report._variants("block_sparse", arch)
    chosen = ((i, v) for i, v in enumerate(variants) if (v.flags, v.head_dim, v.grid) == (word, 128, "4x4x8"))
    index, variant = next(chosen)
    row = compile_report.describe("block_sparse", arch, index)
    assert not row.error and not row.spills, row
    ptx = triton.compile(variant.source, target=compile_report._target(arch), options=variant.options).asm["ptx"]
    assert re.search(INSTRUCTIONS[arch, word], ptx)
