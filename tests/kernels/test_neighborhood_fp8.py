"""Neighborhood attention with queries and keys in e4m3."""

import math
import re
from dataclasses import replace
from functools import partial

import fp8_matrix
import kernel_checks
import pytest
import torch
from foveal.kernels.neighborhood import quantized
from foveal.kernels.ops import explain, na1d, na2d, na3d
from foveal.kernels.tools import compile_report
from neighborhood_matrix import Case, cases
from torch._subclasses.fake_tensor import FakeTensorMode

E4M3 = torch.float8_e4m3fn
WINDOWS = {1: na1d, 2: na2d, 3: na3d}
FULL = Case(
    shape=(9, 11), window=(5, 3), stride=(2, 1), dilation=(1, 2), causal=(False, True),
    batch=2, heads=4, key_heads=2, head_dim=24, bias=True, extra=3,
)  # fmt: skip


def tensors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Query, key and value."""
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# what is rounded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_numbers_are_rounded_to_three_bits_and_restored_exactly(dtype, size):
    query, key, _ = tensors(2, 5, 6, 4, 24) * size
    query, key, extra = query.to(dtype), (key[..., :2, :] + 2 * size).to(dtype), (key[:, 0, :3, 2:] * 4).to(dtype)
    rounded = quantized.quantize(query, key, extra)
    restored, exact = quantized.restore(rounded, dtype), quantized.restore(rounded, torch.float64)
    for x, y in zip(restored, exact, strict=True):
        assert x.dtype == dtype and torch.equal(x.double(), y)
    centred = [x.double() - rounded.mean.double().view(2, *(1,) * (x.dim() - 3), 2, 24) for x in (key, extra)]
    scales = rounded.query_scale, rounded.key_scale, rounded.key_scale
    for x, y, scale in zip((query.double(), *centred), exact, scales, strict=True):
        least = 2.0**-10 * scale.view(2, *(1,) * (x.dim() - 3), -1, 1)  # half of the smallest number
        assert ((x - y).abs() <= torch.maximum(1.001 * 2.0**-4 * x.abs(), 1.001 * least)).all()
    assert torch.cat([x.flatten(1, -3) for x in centred], 1).mean(1).abs().max() < 1e-6 * size


def test_the_largest_number_takes_the_upper_half_of_e4m3():
    """All of e4m3 is used: a scale is the least power of two, at powers of two and between them."""
    for largest in (448.0, 448.1, 1.0, 1.75, 1.7501, 2.0**-20, 3e4):
        query = torch.zeros(1, 4, 1, 32)
        query[0, 1, 0, 5] = -largest
        rounded = quantized.quantize(query, query, None)
        assert 224 <= rounded.query.float().abs().max() <= 448
        assert math.frexp(rounded.query_scale.item())[0] == 0.5 and largest / 448 <= rounded.query_scale < largest / 223


@pytest.mark.parametrize("cast", [True, False])
def test_numbers_beside_an_infinity_keep_their_meaning(cast):
    query, key = torch.randn(2, 1, 6, 1, 32)
    for x in (query, key):
        x[0, 0], x[0, 1] = float("inf"), 600.0
    rounded = quantized.quantize(query, key, None, cast=cast)
    assert (rounded.query[0, :2].float() == 448).all() and (rounded.key[0, :2].float() == 448).all()
    for name, x in (("query", query), ("key", key)):
        error = (getattr(rounded, name)[0, 2:].float() - x[0, 2:]).abs()
        assert (error <= x[0, 2:].abs() / 16 + 2**-10).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_largest_numbers_of_a_dtype_stay_finite(dtype):
    largest = torch.finfo(dtype).max
    query, key, value = torch.randn(3, 1, 12, 2, 32, dtype=dtype)
    query[0, 0, 0, 0], key[0, 3, 0], key[0, 4, 0, 1] = largest * 0.99, -largest * 0.9, largest * 0.9
    for x in quantized.restore(quantized.quantize(query, key, None), dtype)[:2]:
        assert x[..., 1, :].isfinite().all() and (dtype == torch.float64 or x.isfinite().all())
    out = na1d(query * 1e-3, key, value, window=5, qk_dtype=quantized.DTYPE)
    assert out[..., 1, :].isfinite().all()


def test_rounding_without_the_dtype_is_the_cast():
    """Every e4m3 number, the middles between them and what lies around those."""
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, middles.nextafter(numbers[1:]), middles.nextafter(numbers[:-1])])
    x = torch.cat([x, -x, torch.tensor([math.nan])])
    torch.testing.assert_close(quantized._round(x), x.to(E4M3).float(), rtol=0.0, atol=0.0, equal_nan=True)
    assert quantized._round(torch.tensor([500.0, -1e9, math.inf])).tolist() == [448.0, -448.0, 448.0]


# what is computed


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_cases_match_the_reference_on_the_rounded_numbers(rank, dtype):
    for case in cases(rank, 25, seed=8):
        fp8_matrix.check(case, dtype, "torch")


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_every_argument_in_float64_and_float16(impl):
    for dtype in (torch.float64, torch.float16):
        fp8_matrix.check(replace(FULL, scale=-0.4), dtype, impl)
        fp8_matrix.check(replace(FULL, batch=0), dtype, impl)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_operator_without_log_sum_exp_is_the_same(rank):
    query, key, value = tensors(1, *(6, 5, 4)[:rank], 2, 24, dtype=torch.bfloat16)
    out, _ = fp8_matrix.OPERATORS[rank](query, key, value, window=3, qk_dtype=E4M3)
    assert torch.equal(WINDOWS[rank](query, key, value, window=3, qk_dtype=E4M3), out)
    assert not torch.equal(WINDOWS[rank](query, key, value, window=3), out), "something is rounded"


def relative_error(given: dict[str, torch.Tensor], **options) -> float:
    """Root mean square, relative, of the output with e4m3 against float64 without."""
    out = na2d(**given, **options, qk_dtype=E4M3)
    exact = na2d(**{name: x.double() for name, x in given.items()}, **options)
    return ((out - exact).square().mean() / exact.square().mean()).sqrt().item()


def test_a_shift_of_all_keys_costs_nothing():
    """Also of extra keys, causal, with grouped heads."""
    query, key, value = tensors(1, 10, 12, 4, 32)
    given = dict(query=query, key=key[..., :2, :], value=value[..., :2, :])
    given |= dict(additional_keys=key[:, 1, :4, 2:], additional_values=value[:, 1, :4, 2:])
    plain = relative_error(given, window=(5, 7), causal=(True, False))
    shift = 20 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    given |= dict(key=given["key"] + shift, additional_keys=given["additional_keys"] + shift)
    shifted = relative_error(given, window=(5, 7), causal=(True, False))
    assert 0.01 < plain < 0.06 and shifted < 1.1 * plain


def test_log_sum_exp_has_the_mean_of_the_keys():
    query, key, value = tensors(1, 10, 12, 2, 32)
    key = key + 5
    _, lse = na2d(query, key, value, window=5, qk_dtype=E4M3, return_lse=True)
    _, exact = na2d(query.double(), key.double(), value.double(), window=5, return_lse=True)
    assert exact.abs().max() > 10 and (lse - exact).abs().max() < 0.1


def test_nan_reaches_the_queries_that_see_it():
    query, key, value = tensors(1, 12, 12, 1, 24)
    key[0, 5, 7, 0, 3] = math.nan
    query[0, 0, 0, 0, 1] = math.nan
    out = na2d(query, key, value, window=3, qk_dtype=E4M3)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:7, 6:9] = expected[0, 0] = True
    assert torch.equal(out.isnan().all(-1)[0, :, :, 0], expected)
    assert torch.equal(out.isnan().any(-1)[0, :, :, 0], expected)
    whole = na2d(query.nan_to_num(), key.nan_to_num(), value, window=3, qk_dtype=E4M3)
    assert (out - whole)[~out.isnan()].abs().max() < 0.3, "what does not see it is rounded a little otherwise"


def test_masked_extra_keys_are_not_rounded_along():
    """Neither what they hold nor how many they are reaches the mean and the scale."""
    query, key, value = tensors(2, 5, 6, 2, 24)
    extra, mask = tensors(2, 4, 2, 24, seed=1)[:2], torch.tensor([[True, False, True, False], [False] * 4])
    out, lse = na2d(
        query,
        key,
        value,
        window=3,
        additional_keys=extra[0],
        additional_values=extra[1],
        additional_mask=mask,
        qk_dtype=E4M3,
        return_lse=True,
    )
    for bad in (1e4, math.nan):
        poisoned = extra.masked_fill(~mask[..., None, None], bad)
        given = dict(additional_keys=poisoned[0], additional_values=poisoned[1], additional_mask=mask)
        again = na2d(query, key, value, window=3, **given, qk_dtype=E4M3, return_lse=True)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    for i in range(2):
        row = slice(i, i + 1)
        seen = {f"additional_{name}": x[row, mask[i]] for name, x in zip(("keys", "values"), extra, strict=True)}
        alone = na2d(query[row], key[row], value[row], window=3, **seen, qk_dtype=E4M3, return_lse=True)
        torch.testing.assert_close((out[row], lse[row]), alone)


def test_zeros_and_no_extra_tokens():
    query, key, value = tensors(1, 5, 6, 2, 24)
    empty = torch.zeros(1, 0, 2, 24)
    out = na2d(query * 0, key * 0, value, window=(5, 6), additional_keys=empty, additional_values=empty, qk_dtype=E4M3)
    torch.testing.assert_close(out, value.mean((1, 2), keepdim=True).expand_as(out))


# what is refused, and what is said


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"qk_dtype={re.escape(repr(dtype))} must be None or torch.float8_e4m3fn"):
        na2d(*tensors(1, 5, 6, 2, 24), window=3, qk_dtype=dtype)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "additional_keys", "additional_values"])
def test_gradients_are_refused(name):
    given: dict = dict(zip(("query", "key", "value"), tensors(1, 5, 6, 2, 24), strict=True))
    given |= dict(
        bias=torch.zeros(2, 5, 5), additional_keys=torch.zeros(1, 2, 2, 24), additional_values=torch.zeros(1, 2, 2, 24)
    )
    given[name] = given[name].detach().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"qk_dtype=torch.float8_e4m3fn .*torch.no_grad\(\)"):
        na2d(**given, window=3, qk_dtype=E4M3)
    with torch.no_grad():
        assert na2d(**given, window=3, qk_dtype=E4M3).isfinite().all()


def explained(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **options) -> str:
    with FakeTensorMode():
        query = torch.empty(1, 24, 40, 2, head_dim, dtype=dtype, device=device)
    return str(explain(na2d, query, query, query, window=9, qk_dtype=E4M3, **options).cost["query_key_products"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a device that is not there")
def test_explain_says_whether_products_are_of_e4m3():
    pytest.importorskip("triton")
    assert explained() == "of e4m3 numbers"
    assert explained(16) == "of e4m3 numbers restored to bfloat16: head_dim 16 is under 17"
    assert "restored to float32: values of torch.float32 are not half precision" in explained(dtype=torch.float32)
    assert explained(device="cpu") == "of e4m3 numbers restored to bfloat16: impl is torch"
    assert explained(impl="reference").endswith("impl is reference")
    assert "query_key_products" not in explain(na2d, *tensors(1, 5, 6, 2, 24), window=3).cost


# graphs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_on_cpu_for_any_size(backend):
    torch._dynamo.reset()
    compiled = torch.compile(partial(na2d, return_lse=True), fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape in ((12, 14), (13, 11)):
            fp8_matrix.check(replace(FULL, shape=shape), torch.float32, "torch", operator=compiled)


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return na2d(query, key, value, window=3, qk_dtype=E4M3)

    inputs = tuple(tensors(1, 6, 7, 2, 24))
    program = torch.export.export(Model(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


# kernels

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 9),
    reason="no device with products of e4m3 numbers",
)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [17, 32, 64, 80, 128, 256])
@pytest.mark.gpu
@on_gpu
def test_random_cases_on_a_gpu(rank, dtype, head_dim):
    for case in cases(rank, 12, seed=head_dim):
        case = replace(case, head_dim=head_dim)
        fp8_matrix.check(case, dtype, "triton", device="cuda")


@pytest.mark.gpu
@on_gpu
def test_compiled_whole_on_a_gpu():
    torch._dynamo.reset()
    compiled = torch.compile(partial(na2d, return_lse=True), fullgraph=True, dynamic=True)
    for shape in ((33, 40), (48, 31)):
        fp8_matrix.check(replace(FULL, shape=shape, head_dim=64), torch.bfloat16, "triton", "cuda", compiled)


@pytest.mark.gpu
@on_gpu
def test_nan_on_a_gpu():
    query, key, value = tensors(1, 12, 12, 1, 64, dtype=torch.bfloat16).cuda()
    key[0, 5, 7, 0, 3] = math.nan
    out = na2d(query, key, value, window=3, qk_dtype=E4M3, impl="triton").isnan()[0, :, :, 0]
    assert out[4:7, 6:9].all() and out.any(-1).sum() == 9


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    pytest.importorskip("triton")
    kernel_checks.run_interpreter("test_neighborhood_fp8_kernels.py")


@pytest.mark.slow
def test_interpreter_on_everything():
    pytest.importorskip("triton")
    kernel_checks.run_interpreter("test_neighborhood_fp8_kernels.py", marker="slow")


INSTRUCTIONS = {
    "sm_89": r"mma\.sync[\w.]*\.e4m3\.e4m3",
    "sm_90": r"wgmma\.mma_async[\w.]*\.e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma[\w.:]*kind::f8f6f4",
}


@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_matrix_units_multiply_e4m3_numbers(arch):
    """The first size of head dim 128; a slow test of all kernels has the others."""
    triton = pytest.importorskip("triton")
    variants = compile_report._variants("neighborhood", arch)
    index, variant = next((i, v) for i, v in enumerate(variants) if v.flags == "e4m3" and v.head_dim == 128)
    row = compile_report.describe("neighborhood", arch, index)
    assert not row.error and not row.spills and row.tma == (arch != "sm_89"), row
    ptx = triton.compile(variant.source, target=compile_report._target(arch), options=variant.options).asm["ptx"]
    assert re.search(INSTRUCTIONS[arch], ptx)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "gfx942"])
def test_other_matrix_units_have_no_such_kernels(arch):
    pytest.importorskip("triton")
    assert not any("e4m3" in variant.flags for variant in compile_report._variants("neighborhood", arch))
