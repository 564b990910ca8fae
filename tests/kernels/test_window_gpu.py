"""Window attention on a device: `pytest -m gpu -n 16 tests/kernels/test_window_gpu.py`, long with `--cases 400`."""

from functools import partial
from itertools import islice
from random import Random

import pytest
import torch
from foveal.kernels.ops import explain, window_attention
from foveal.kernels.window import configs
from operator_matrix import assert_same_bits
from window_matrix import Case, cases, check, make_inputs, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SWIN = Case((56, 56), (7, 7), (3, 3), (0, 0), batch=4, heads=3, key_heads=3, head_dim=32, bias=True)
HALO = Case((32, 48), (8, 8), (0, 0), (3, 3), padded=True, batch=2, heads=4, key_heads=2, head_dim=64, bias=True)
HIFI = Case((28, 42), (2, 2), (0, 0), (0, 0), batch=4, heads=3, key_heads=3, head_dim=32)
CLIP = Case((16, 28, 28), (8, 7, 7), (4, 3, 3), (0, 0, 0), heads=3, key_heads=3, head_dim=32, bias=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_keep_the_error_rule(rank, sweep):
    for case in islice(cases(rank, sweep.stop, seed=5), sweep.start, None):
        random = Random(case.seed)
        forced = {"rows": random.choice((16, 32, 64))} if random.random() < 0.3 else {}
        forced |= {name: True for name in ("wide", "one_pass") if random.random() < 0.3}
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


@pytest.mark.parametrize("head_dim", [1, 8, 24, 32, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(head_dim, dtype):
    for window, halo in (((2, 2), (0, 0)), ((7, 7), (0, 0)), ((8, 8), (2, 2))):
        case = Case((24, 40), window, (0, 0), halo, head_dim=head_dim, bias=True)
        check(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("case", [SWIN, HALO, HIFI, CLIP])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_the_models(case, dtype):
    check(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("case", [SWIN, HALO, HIFI, CLIP])
def test_gradients_are_the_same_bits_every_time(case):
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    assert_same_bits(lambda: run(case, inputs, "triton"), 100)


def test_cuda_takes_the_kernels():
    inputs = make_inputs(SWIN, torch.bfloat16, "cuda")
    assert explain(window_attention, **inputs, window=7, shift=3).impl == "triton"


def test_nothing_is_rolled_padded_or_partitioned_in_memory():
    """The output and the log-sum-exp are all that a forward allocates, on a grid that windows do not divide."""
    query, key, value = torch.randn(3, 8, 61, 75, 3, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        window_attention(query, key, value, window=7, shift=3)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = window_attention(query, key, value, window=7, shift=3)
    lse = 4 * out.numel() // 32
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.itemsize + lse + 4096


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(partial(window_attention, return_lse=True), fullgraph=True, dynamic=dynamic)
    for case in (SWIN, HALO):
        check(case, torch.float32, "triton", device="cuda", operator=compiled)
