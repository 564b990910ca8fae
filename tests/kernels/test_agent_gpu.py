"""Agent attention on a device: `pytest -m gpu -n 16 tests/kernels/test_agent_gpu.py`, long with `--cases 600`."""

from itertools import islice
from random import Random

import pytest
import torch
from agent_matrix import Case, cases, check, make_inputs, run
from foveal.kernels.agent import configs
from foveal.kernels.ops import agent_attention, explain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SWIN = Case((56, 56), (56, 56), agents=9, batch=8, heads=3, head_dim=32, agent_bias=True, query_bias=True)


def test_random_cases_keep_the_error_rule(sweep):
    for case in islice(cases(sweep.stop, seed=3), sweep.start, None):
        random = Random(case.seed)
        forced = dict(wide=True) if random.random() < 0.3 else {}
        if random.random() < 0.3:
            forced |= dict(queries=random.choice((16, 32, 64)), keys=random.choice((16, 32, 64)), chunk=64)
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


@pytest.mark.parametrize("head_dim", [1, 8, 24, 32, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(head_dim, dtype):
    check(Case((24, 40), (24, 40), agents=49, head_dim=head_dim, agent_bias=True), dtype, "triton", device="cuda")


@pytest.mark.parametrize("agents", [9, 16, 49, 81, 205])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_the_models(agents, dtype):
    case = Case((56, 56), (56, 56), agents=agents, batch=2, heads=3, head_dim=32, agent_bias=True, query_bias=True)
    check(case, dtype, "triton", device="cuda")


def test_gradients_are_the_same_bits_every_time():
    inputs = make_inputs(SWIN, torch.bfloat16, "cuda")
    first, second = run(SWIN, inputs, "triton"), run(SWIN, inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cuda_takes_the_kernels():
    inputs = make_inputs(SWIN, torch.bfloat16, "cuda")
    assert explain(agent_attention, **inputs).impl == "triton"


def test_logits_are_never_in_memory():
    """Operands in half precision and the log-sum-exp: less than the logits of either pass take."""
    inputs = make_inputs(SWIN, torch.bfloat16, "cuda")
    with torch.no_grad():
        agent_attention(**inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = agent_attention(**inputs)
    logits = 2 * SWIN.batch * SWIN.heads * 9 * 56**2
    assert torch.cuda.max_memory_allocated() - before < out.numel() * out.itemsize + logits


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(agent_attention, fullgraph=True, dynamic=dynamic)
    check(SWIN, torch.float32, "triton", device="cuda", operator=compiled)
