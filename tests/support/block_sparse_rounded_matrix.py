"""Block-sparse attention with queries and keys of few bits: one case with everything, and the rule for its errors."""

from dataclasses import replace

import block_sparse_matrix as matrix
import operator_matrix
import torch
from block_sparse_matrix import Case
from foveal.kernels.block_sparse import call as calls
from foveal.kernels.block_sparse import rounded
from foveal.kernels.neighborhood.quantized import mean_logits
from operator_matrix import as_leaves

DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "signs": torch.uint1}
FULL = Case(
    shape=(7, 9), key_shape=(9, 11), query_block=(3, 4), key_block=(4, 4), most=6, per_batch=True, per_head=True,
    bias=True, q_len=True, kv_len=True, batch=2, heads=4, key_heads=2, head_dim=24, extra=5, additional_mask="mask",
)  # fmt: skip


def check(case: Case, dtype: torch.dtype, impl: str, qk_dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Assert that `impl` attends to the rounded numbers as exactly as it attends to others, by the error rule."""
    inputs = {name: x if x is None else x.detach() for name, x in matrix.make_inputs(case, dtype, device).items()}
    case = replace(case, skip=False)
    visible = matrix.additional_mask(case, torch.device(device))
    options = case.options | {"mask": matrix.make_mask(case, device), "additional_mask": visible}
    call = calls.make_call(**inputs, **options, qk_dtype=qk_dtype)
    query, key, extra, mean = rounded.emulate(inputs["query"], inputs["key"], call)
    if impl == "triton" and qk_dtype == torch.int8:  # products of the integers, whose multiples half precision rounds
        found = rounded.to_int8(inputs["query"], inputs["key"], call)
        query, key, extra = rounded.restore(found, call, torch.float64)

    def replaced(dtype: torch.dtype) -> dict:
        given = inputs | {"query": query, "key": key, "additional_keys": extra}
        return {name: None if x is None else x.to(dtype) for name, x in given.items()}

    got = matrix.WITH_LSE(**inputs, **options, qk_dtype=qk_dtype, impl=impl)
    exact = matrix.WITH_LSE(**replaced(torch.float64), **options, impl="reference")
    shift = 0.0 if mean is None else mean_logits(inputs["query"].double(), mean.double(), call.scale)
    finite = exact[1].isfinite()
    yardstick = None
    if dtype.itemsize < 4:
        eager = matrix.run_eager(case, as_leaves(replaced(dtype)))
        yardstick = {"out": eager["out"], "lse": torch.where(finite, eager["lse"] + shift, 0)}
    assert torch.equal(got[1].isfinite(), finite)
    lses = (torch.where(finite, x, 0) for x in (got[1], exact[1] + shift))
    found, expected = ({"out": x[0], "lse": y} for x, y in zip((got, exact), lses, strict=True))
    operator_matrix.assert_exact(
        operator_matrix.errors(found, expected, yardstick, dtype), f"{impl} in {dtype} with {qk_dtype} on {case!r}"
    )
