"""Linear attention on a device: `pytest -m gpu -n 16 tests/kernels/test_linear_gpu.py`, long with `--cases 600`."""

from itertools import islice
from random import Random

import pytest
import torch
from foveal.kernels.linear import configs
from foveal.kernels.ops import explain, linear_attention
from linear_matrix import VARIANTS, Case, cases, check, make_inputs, run
from operator_matrix import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
L2VIT = Case((56, 56), (56, 56), batch=8, heads=3, head_dim=32, value_dim=32, relu=True, floor=100.0, scale=None)


def test_random_cases_keep_the_error_rule(sweep):
    for case in islice(cases(sweep.stop, seed=3), sweep.start, None):
        random = Random(case.seed)
        forced = dict(wide=True) if random.random() < 0.3 else {}
        if random.random() < 0.3:
            forced |= dict(rows=random.choice((16, 32, 64)), columns=random.choice((16, 32)), chunk=64)
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


@pytest.mark.parametrize("head_dim", [1, 8, 24, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS[2::2], ids=str)
def test_head_dims(head_dim, dtype, variant):
    case = Case((24, 40), (24, 40), head_dim=head_dim, value_dim=head_dim, scale=0.1, **variant)
    check(case, dtype, "triton", device="cuda")


def test_gradients_are_the_same_bits_every_time():
    inputs = make_inputs(L2VIT, torch.bfloat16, "cuda")
    assert_same_bits(lambda: run(L2VIT, inputs, "triton"), times=3)


def test_cuda_takes_the_kernels():
    inputs = make_inputs(L2VIT, torch.bfloat16, "cuda")
    assert explain(linear_attention, *(inputs[x] for x in ("query", "key", "value"))).impl == "triton"


def test_nothing_but_the_output_and_states_is_in_memory():
    inputs = make_inputs(L2VIT, torch.bfloat16, "cuda")
    with torch.no_grad():
        linear_attention(**inputs, **L2VIT.options)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = linear_attention(**inputs, **L2VIT.options)
    states = 4 * L2VIT.batch * L2VIT.heads * (32 * 32 + 64) * 32
    assert torch.cuda.max_memory_allocated() - before < out.numel() * out.itemsize + states


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=dynamic)
    check(L2VIT, torch.float32, "triton", device="cuda", operator=compiled)
