"""The error rule for neighborhood attention whose queries and keys are rounded to e4m3."""

import neighborhood_matrix
import operator_matrix
import torch
from foveal.kernels.neighborhood import quantized
from neighborhood_matrix import OPERATORS, Case
from operator_matrix import as_leaves

E4M3 = torch.float8_e4m3fn


def check(case: Case, dtype: torch.dtype, impl: str, device: str = "cpu", operator=None) -> None:
    """Assert that `impl` attends to the rounded numbers, by the reference in float64 on those, as exactly as it attends
    to others."""
    inputs = neighborhood_matrix.make_inputs(case, dtype, device)
    inputs = {name: x if x is None else x.detach() for name, x in inputs.items()}
    options = neighborhood_matrix.on_device(case, inputs)
    visible = None if case.visible is None else case.visible.to(device)
    rounded = quantized.quantize(inputs["query"], inputs["key"], inputs["additional_keys"], visible)

    def replaced(dtype: torch.dtype) -> dict:
        query, key, additional_keys = quantized.restore(rounded, dtype)
        others = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
        return others | {"query": query, "key": key, "additional_keys": additional_keys}

    got = (operator or OPERATORS[case.rank])(**inputs, **options, qk_dtype=E4M3, impl=impl)
    exact = OPERATORS[case.rank](**replaced(torch.float64), **options, impl="reference")
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    shift = quantized.mean_logits(inputs["query"].double(), rounded.mean.double(), scale)
    yardstick = None
    if dtype.itemsize < 4:
        eager = neighborhood_matrix.run_eager(case, as_leaves(replaced(dtype)))
        yardstick = {"out": eager["out"], "lse": eager["lse"] + shift}
    found = operator_matrix.errors(
        dict(zip(("out", "lse"), got, strict=True)), {"out": exact[0], "lse": exact[1] + shift}, yardstick, dtype
    )
    operator_matrix.assert_exact(found, f"{impl} in {dtype} with e4m3 on {case!r}")
