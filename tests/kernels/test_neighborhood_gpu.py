"""Neighborhood attention on a real device: `pytest -m gpu -n 16 tests/kernels/test_neighborhood_gpu.py`.

Most of the time goes into compilation, so use as many processes as there are cores. `--cases 700` takes 700 random
cases a rank, which compile 7,400 kernels.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.neighborhood import configs
from foveal.kernels.neighborhood.configs import Size
from foveal.kernels.ops import na1d, na2d, na3d
from neighborhood_matrix import Case, cases, check, errors, for_gluon, make_inputs, run
from operator_matrix import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [
    Size(q, k, w, s) for q, k, w, s in ((16, 16, 4, 1), (32, 16, 4, 2), (16, 64, 4, 1), (64, 32, 4, 2), (32, 64, 8, 1))
]
WIDE = Case(
    shape=(9, 40, 24), window=(4, 17, 9), stride=(2, 4, 1), dilation=(1, 2, 1), causal=(True, False, False),
    batch=2, heads=4, key_heads=2, head_dim=64, extra=19,
)  # fmt: skip
BIAS = Case(
    shape=(56, 41), window=(7, 5), stride=(1, 1), dilation=(8, 3), causal=(False, False), head_dim=32, bias=True
)


def random_half(case: Case) -> torch.dtype:
    return DTYPES[1 + case.seed % 2]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_keep_the_error_rule(rank, sweep):
    for case in islice(cases(rank, sweep.stop, seed=3), sweep.start, None):
        random = Random(case.seed)
        forced = {"size": random.choice(SIZES)} if random.random() < 0.3 else {}
        if random.random() < 0.3:
            forced["descriptor"] = False
        if random.random() < 0.3:
            forced["wide"] = True
        with configs.override(**forced):
            check(case, random.choice(DTYPES), "triton", device="cuda")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("place", [0, 1])
def test_random_cases_of_the_gluon_forward(rank, place, sweep, monkeypatch):
    """Every size of its table; gradients are of the Triton kernels."""
    if torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("impl='gluon' is for compute capability 9.0")
    for head_dim, sizes in list(configs.GLUON_SIZES.items()):
        monkeypatch.setitem(configs.GLUON_SIZES, head_dim, sizes[place : place + 1])
    for case in map(for_gluon, islice(cases(rank, sweep.stop, seed=37), sweep.start, None)):
        check(case, random_half(case), "gluon", device="cuda")


@pytest.mark.parametrize("head_dim", [1, 8, 24, 32, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(head_dim, dtype):
    case = Case(
        shape=(24, 40), window=(9, 16), stride=(1, 4), dilation=(1, 2), causal=(False, False), head_dim=head_dim
    )
    check(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("case", [WIDE, BIAS])
@pytest.mark.parametrize("descriptor", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_every_way_of_addressing(case, descriptor, wide):
    if descriptor and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors want Hopper or newer")
    with configs.override(descriptor=descriptor, wide=wide):
        check(case, torch.bfloat16, "triton", device="cuda")


def test_allowed_tf32_is_bounded():
    torch.set_float32_matmul_precision("high")
    try:
        case = Case(shape=(32, 32), window=(16, 16), stride=(1, 1), dilation=(1, 1), causal=(False, False), head_dim=64)
        for error, allowed in errors(case, torch.float32, "triton", device="cuda").values():
            assert error <= 500 * allowed  # 10 bits of mantissa in place of 23
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("case", [WIDE, BIAS])
def test_500_runs_give_the_same_bits(case):
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    assert_same_bits(lambda: run(case, inputs, "triton"), 500)


def test_batch_entries_do_not_influence_each_other():
    query, key, value = torch.randn(3, 5, 33, 29, 4, 64, device="cuda", dtype=torch.bfloat16)
    whole = na2d(query, key, value, window=(9, 7), impl="triton")
    for b in range(5):
        assert torch.equal(
            na2d(query[b : b + 1], key[b : b + 1], value[b : b + 1], window=(9, 7), impl="triton")[0], whole[b]
        )


def test_cuda_graph_replays():
    tensors = [torch.randn(2, 28, 28, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(4, 13, 13, device="cuda", requires_grad=True)
    cotangent = torch.randn(2, 28, 28, 4, 32, device="cuda", dtype=torch.float16)

    def step():
        out = na2d(*tensors, window=7, bias=bias, impl="triton")
        return (out, *torch.autograd.grad(out, (*tensors, bias), cotangent))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(100):
        with torch.no_grad():
            for x in tensors:
                x.normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


def test_side_stream():
    query, key, value = torch.randn(3, 1, 64, 64, 2, 64, device="cuda", dtype=torch.float16)
    expected = na2d(query, key, value, window=9, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = na2d(query, key, value, window=9, impl="triton")
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_compiled_whole(mode):
    torch._dynamo.reset()  # what another mode compiled counts towards the limit
    compiled = torch.compile(partial(na2d, return_lse=True), fullgraph=True, dynamic=True, mode=mode)
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape in ((33, 40), (48, 31), (56, 56), (64, 37), (29, 70)):
            case = Case(shape=shape, window=(7, 9), stride=(1, 3), dilation=(2, 1), causal=(False, True), head_dim=32)
            check(case, torch.float16, "triton", device="cuda", operator=compiled)


@pytest.mark.parametrize("views", ["batch", "space"])
def test_more_than_two_to_the_31_elements(views):
    """Values at both ends of a tensor of over 2^31 elements equal those of a small tensor with the same contents."""
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("wants 70 GiB")
    heads, head_dim, window = 16, 128, 33
    shape = (2, 600_000) if views == "batch" else (1, 1_200_000)
    query = torch.randn(*shape, heads, head_dim, device="cuda", dtype=torch.float16)
    assert query.numel() > 2**31
    key, value = query.flip(-1), query.roll(1, -1)
    out = na1d(query, key, value, window=window, impl="triton")
    for part in (slice(0, 4096), slice(shape[1] - 4096, shape[1])):
        small = [x[-1:, part].float() for x in (query, key, value)]
        expected = na1d(*small, window=window, impl="torch")
        inner = slice(0, 4096 - window) if part.start == 0 else slice(window, 4096)
        torch.testing.assert_close(out[-1:, part][:, inner].float(), expected[:, inner], atol=4e-3, rtol=4e-3)


def test_memory_of_forward_and_backward():
    query, key, value = (
        torch.randn(4, 128, 128, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    operands = 4 * query.numel() * 2 + query.numel() // 64 * 4
    na2d(query, key, value, window=7, impl="triton").sum().backward()  # compile and allocate what stays
    query.grad = key.grad = value.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = na2d(query, key, value, window=7, impl="triton")
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * (operands - 3 * query.numel() * 2)
    out.backward(torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before <= 2 * operands


def test_float64_takes_the_tiled_path():
    query, key, value = torch.randn(3, 1, 12, 12, 2, 16, device="cuda", dtype=torch.float64)
    expected = na2d(query, key, value, window=5, impl="reference")
    torch.testing.assert_close(na2d(query, key, value, window=5), expected)


SANITIZED = """
import torch
from foveal.kernels.ops import na1d, na2d, na3d
for operator, shape, options in (
    (na1d, (77,), dict(window=9, dilation=3)),
    (na2d, (13, 21), dict(window=(5, 7), stride=(2, 1))),
    (na3d, (3, 9, 10), dict(window=(3, 5, 4), causal=(True, False, False))),
):
    for dtype, head_dim in ((torch.float16, 40), (torch.bfloat16, 64), (torch.float32, 24)):
        x = [torch.randn(2, *shape, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
        extra = [torch.randn(2, 5, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
        out = operator(*x, additional_keys=extra[0], additional_values=extra[1], impl="triton", **options)
        out.float().square().sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device, or not in this virtual machine")
    assert done.returncode == 0, done.stdout[-4000:]


def test_large_windows_take_interior_tiles():
    """Windows of video models at full size: too many tokens for the reference, so against the tiled path."""
    query, key, value = torch.randn(3, 1, 10, 24, 40, 2, 64, device="cuda", dtype=torch.bfloat16)
    options = dict(window=(6, 16, 20), stride=(2, 4, 5))
    assert prod(query.shape[1:4]) > 5000
    out = na3d(query, key, value, impl="triton", **options)
    exact = na3d(query.double(), key.double(), value.double(), impl="torch", **options)
    assert (out.double() - exact).abs().max() < 8e-3
