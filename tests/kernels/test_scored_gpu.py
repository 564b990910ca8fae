"""Scored attention on a device: `pytest -m gpu -n 16 tests/kernels/test_scored_gpu.py`, long with `--cases 600`."""

from itertools import islice
from random import Random

import pytest
import torch
from foveal.kernels.ops import explain, scored_attention
from foveal.kernels.scored import ColumnMask, Softmax, configs
from operator_matrix import assert_same_bits
from scored_matrix import KINDS, Case, attend, cases, check, make_inputs, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_random_cases_keep_the_error_rule(sweep):
    for case in islice(cases(sweep.stop, seed=3), sweep.start, None):
        random = Random(case.seed)
        forced = dict(wide=True) if random.random() < 0.3 else {}
        if random.random() < 0.3:
            forced |= dict(queries=random.choice((16, 32, 64)), keys=random.choice((16, 32, 64)))
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_head_dims(kind, dtype, head_dim):
    case = Case((24, 30), kind, head_dim=head_dim, key_heads=1, mask="causal", positions=40)
    check(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bits_every_time(kind):
    case = Case((40, 50), kind, batch=2, heads=3, head_dim=64, mask="random")
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    assert_same_bits(lambda: run(case, inputs, "triton"), times=3)


def test_logits_are_never_in_memory():
    query, key, value = torch.randn(3, 1, 8192, 4, 64, dtype=torch.bfloat16, device="cuda")
    assert explain(scored_attention, query, key, value, score=Softmax()).impl == "triton"
    mask = ColumnMask.causal(torch.arange(8192, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scored_attention(query, key, value, score=Softmax(), mask=mask)
    assert torch.cuda.max_memory_allocated() - before < 8 * query.numel() * query.itemsize


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    check(Case((14, 14), "cope", heads=3, head_dim=64), torch.float32, "triton", device="cuda", operator=compiled)
