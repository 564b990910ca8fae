"""Scan attention on a device: `pytest -m gpu -n 16 tests/kernels/test_scan_gpu.py`, long with `--cases 600`."""

from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch
from foveal.kernels.ops import explain, scan_attention
from foveal.kernels.scan import configs
from operator_matrix import assert_same_bits
from scan_matrix import Case, cases, check, make_inputs, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GATED = Case((14, 14), batch=4, heads=3, head_dim=64, value_dim=64, decay="token", delta=True)


def test_random_cases_keep_the_error_rule(sweep):
    for case in islice(cases(sweep.stop, seed=3), sweep.start, None):
        random = Random(case.seed)
        forced = dict(wide=True) if random.random() < 0.3 else {}
        if random.random() < 0.3:
            forced |= dict(chunk=random.choice((16, 32)), columns=random.choice((16, 32)))
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


@pytest.mark.parametrize("head_dim", [1, 8, 24, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [False, True])
def test_head_dims(head_dim, dtype, delta):
    case = replace(GATED, delta=delta, head_dim=head_dim, value_dim=head_dim, scale=0.1, batch=1)
    check(case, dtype, "triton", device="cuda")


def test_gradients_are_the_same_bits_every_time():
    inputs = make_inputs(GATED, torch.bfloat16, "cuda")
    assert_same_bits(lambda: run(GATED, inputs, "triton"), times=3)


def test_cuda_takes_the_kernels():
    inputs = make_inputs(GATED, torch.bfloat16, "cuda")
    assert explain(scan_attention, *(inputs[x] for x in ("query", "key", "value"))).impl == "triton"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(scan_attention, fullgraph=True, dynamic=dynamic)
    check(GATED, torch.float32, "triton", device="cuda", operator=compiled)
