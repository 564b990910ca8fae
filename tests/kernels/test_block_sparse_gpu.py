"""Block-sparse attention on a real device: `pytest -m gpu -n 16 tests/kernels/test_block_sparse_gpu.py`.

`--cases 800` is the long run.
"""

from dataclasses import replace
from functools import partial
from itertools import islice
from random import Random

import pytest
import torch
from block_sparse_matrix import Case, cases, check, for_gluon, make_inputs, make_mask, run
from block_sparse_rounded_matrix import check as check_rounded
from foveal.kernels.block_sparse import configs
from foveal.kernels.block_sparse.configs import Size
from foveal.kernels.ops import block_sparse_attention, explain, routing_attention2d
from operator_matrix import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [Size(r, c, w, s) for r, c, w, s in ((16, 16, 4, 1), (32, 16, 4, 2), (16, 64, 4, 1), (64, 32, 4, 2))]
BOXES = {"query_block": (8, 8), "key_block": (8, 8)}
IMAGE = Case((56, 56), (56, 56), **BOXES, most=4, batch=2, heads=4, key_heads=4, head_dim=32, inverse=True)
RAGGED = Case(
    shape=(45, 50), key_shape=(37, 61), query_block=(16, 8), key_block=(8, 16), most=7, per_head=True, bias=True,
    q_len=True, kv_len=True, heads=4, key_heads=2, batch=2, head_dim=64, extra=19,
)  # fmt: skip
CLIP = Case(
    shape=(8, 24, 24), key_shape=(8, 24, 24), query_block=(4, 4, 4), key_block=(4, 4, 4), most=9, per_batch=True,
    heads=2, key_heads=2, batch=2, head_dim=128,
)  # fmt: skip

WHOLE = Case(
    shape=(10, 30, 52), key_shape=(10, 30, 52), query_block=(4, 4, 8), key_block=(4, 4, 8), most=20, per_head=True,
    heads=2, key_heads=2, head_dim=128, extra=19,
)  # fmt: skip


def test_random_cases_keep_the_error_rule(sweep):
    for case in islice(cases(sweep.stop, seed=5), sweep.start, None):
        random = Random(case.seed)
        forced = {"size": random.choice(SIZES)} if random.random() < 0.3 else {}
        forced |= {"wide": True} if random.random() < 0.3 else {}
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


def test_random_cases_of_the_gluon_forward(sweep):
    """Gradients are of the Triton kernels."""
    if torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("impl='gluon' is for compute capability 9.0")
    for case in map(for_gluon, islice(cases(sweep.stop, seed=41), sweep.start, None)):
        check(case, DTYPES[1 + case.seed % 2], "gluon", device="cuda")


@pytest.mark.parametrize("head_dim", [1, 8, 24, 32, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(head_dim, dtype):
    check(Case((24, 40), (24, 40), **BOXES, most=3, head_dim=head_dim), dtype, "triton", device="cuda")


@pytest.mark.parametrize("case", [IMAGE, RAGGED, CLIP, WHOLE, replace(WHOLE, head_dim=64, bias=True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_the_models(case, dtype):
    check(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("case", [IMAGE, RAGGED, CLIP, WHOLE, replace(WHOLE, skip=True)])
def test_gradients_are_the_same_bits_every_time(case):
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    assert_same_bits(lambda: run(case, inputs, "triton"), 100)


@pytest.mark.parametrize("block", [(4, 4, 4), (4, 4, 8), (3, 5, 4)])
def test_skipping(block):
    case = Case((8, 16, 24), (8, 16, 24), block, block, most=6, heads=2, key_heads=1, head_dim=64, skip=True, scale=1.0)
    check(case, torch.float32, "triton", device="cuda")


@pytest.mark.parametrize("qk_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("case", [IMAGE, RAGGED, CLIP, WHOLE, replace(WHOLE, head_dim=64, bias=True)])
def test_eight_bits(case, qk_dtype):
    check_rounded(case, torch.bfloat16, "triton", qk_dtype, device="cuda")


def test_cuda_takes_the_kernels():
    inputs = make_inputs(IMAGE, torch.bfloat16, "cuda")
    assert explain(block_sparse_attention, **inputs, mask=make_mask(IMAGE, "cuda")).impl == "triton"


def test_keys_are_not_gathered():
    """Routing every region to 16 others allocates less than a copy of the keys that they list."""
    query, key, value = torch.randn(3, 4, 56, 56, 4, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        routing_attention2d(query, key, value, topk=16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = routing_attention2d(query, key, value, topk=16)
    assert torch.cuda.max_memory_allocated() - before < 4 * out.numel() * out.itemsize  # a copy takes 2 x 16 of them


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(partial(block_sparse_attention, return_lse=True), fullgraph=True, dynamic=dynamic)
    check(IMAGE, torch.float32, "triton", device="cuda", operator=compiled)
