"""The Gluon forward of block-sparse attention without a device: its functions as plain Python, its barriers, its code
for sm_90, and which calls it takes. What it shares with neighborhood attention is in `test_neighborhood_gluon.py`.

No test here runs what the compiler makes of it: that needs a GPU, see `test_block_sparse_gpu.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import block_sparse_matrix
import operator_matrix
import pytest
import torch
from block_sparse_matrix import Case, make_call, make_inputs, plain
from foveal.kernels.block_sparse import configs
from foveal.kernels.block_sparse.call import block_sparse, gluon_unsupported
from foveal.kernels.ops import BlockMask, block_sparse_attention
from foveal.kernels.tools import compile_report
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton.experimental.gluon")

import gluon_shim
from barrier_model import Model
from foveal.kernels.block_sparse import gluon as launch
from gluon_shim import DeadlockError, HazardError
from launch_driver import launches

QUERY_BLOCKS = {1: ((16,), (32,)), 2: ((4, 4), (2, 8), (8, 4)), 3: ((2, 2, 4), (4, 2, 4))}
KEY_BLOCKS = {1: ((8,), (16,)), 2: ((2, 4), (4, 4)), 3: ((2, 2, 2), (2, 2, 4))}
CASE = Case((5, 23), (7, 11), (4, 4), (2, 4), 5, heads=2, key_heads=1, head_dim=8, per_head=True)


@contextmanager
def small(seed: int, stages: int = 2, **edits: tuple[str, str]) -> Iterator[gluon_shim.Run]:
    """Programs of 16 queries and tiles of 8 keys, in an order of the seed; `edits` mutate them."""

    def configure(query_block, key_block, head_dim):
        return launch.Parts(configs.part(query_block, 8), configs.part(key_block, 8), stages)

    before, launch.configure = launch.configure, configure
    try:
        with gluon_shim.running(launch, seed, constants={"ROWS": 8}, edits=edits) as run:
            yield run
    finally:
        launch.configure = before


def forward(case: Case, inputs: dict) -> dict[str, Tensor]:
    """Output and log-sum-exp of the Gluon forward, inside of a block that runs it."""
    tensors = [inputs[name].detach() for name in ("query", "key", "value")]
    out, lse, kept = launch.forward(*tensors, make_call(case, inputs))
    assert kept.numel() == 0
    return {"out": out, "lse": lse}


def assert_exact(case: Case, got: dict[str, Tensor], inputs: dict, dtype: torch.dtype) -> None:
    """Hold output and log-sum-exp to the float64 reference, by the rule of all operators."""
    tensors = operator_matrix.as_leaves(inputs, torch.float64)
    out, lse = block_sparse_matrix.WITH_LSE(**tensors, **case.options, impl="reference")
    eager = None
    if dtype.itemsize < 4:
        eager = block_sparse_matrix.run_eager(case, inputs)
        lse, got["lse"] = (x.masked_fill(x == float("-inf"), 0) for x in (lse, got["lse"]))
    found = operator_matrix.errors(got, {"out": out.detach(), "lse": lse.detach()}, eager, dtype)
    operator_matrix.assert_exact(found, f"the Gluon forward on {case!r}")


def random_case(i: int) -> Case:
    random = Random(f"gluon/{i}")
    rank = 1 + i % 3
    shape, key_shape = (tuple(random.randint(2, (60, 13, 6)[rank - 1]) for _ in range(rank)) for _ in range(2))
    heads = random.choice((1, 2))
    case = Case(
        shape,
        key_shape,
        (),
        (),
        random.choice((1, 3, 10**6)),
        full=random.random() < 0.4,
        per_batch=random.random() < 0.5,
        per_head=random.random() < 0.5,
        batch=random.choice((1, 1, 2)),
        heads=heads,
        key_heads=random.choice((1, heads)),
        scale=random.choice((None, 0.7)),
        seed=random.randrange(2**31),
    )
    return plain(case, 8, random.choice(QUERY_BLOCKS[rank]), random.choice(KEY_BLOCKS[rank]))


@pytest.mark.parametrize("first", range(3))
def test_lists_and_masks_on_random_cases(first):
    programs = empty = cut = 0
    for i in range(12 * first, 12 * first + 12):
        case = random_case(i)
        inputs = make_inputs(case, torch.float32)
        with small(i, stages=2 + i % 2) as run:
            got = forward(case, inputs)
        assert_exact(case, got, inputs, torch.float32)
        programs += len(run.programs)
        empty += bool((got["lse"] == float("-inf")).any())
        cut += any(n % b for n, b in zip(case.key_shape, case.key_block, strict=True))
    assert programs > 40 and empty and cut


def test_blocks_of_the_table():
    halves = Case((7, 9, 10), (5, 9, 17), (4, 4, 8), (4, 4, 4), 7, heads=2, key_heads=1, head_dim=64)
    whole = replace(halves, key_block=(4, 4, 8), head_dim=128)
    for case, dtype in ((halves, torch.bfloat16), (whole, torch.float16)):
        inputs = make_inputs(case, dtype)
        with gluon_shim.running(launch, 0) as run:
            got = forward(case, inputs)
        assert run.programs
        assert_exact(case, got, inputs, dtype)


def test_no_order_ends_in_a_deadlock_or_overwrites_a_buffer():
    with small(0) as run:
        forward(replace(CASE, full=True), make_inputs(CASE, torch.float32))
    program = run.programs[0]
    assert Model([partition.events for partition in program.partitions], program.counts, turns=True).explore() > 3000


MUTATIONS = {
    "cut blocks are not masked": {"visible_logits": ("if EVEN:", "if True:")},
    "the list of the next block": {"forward_kernel": ("boxes, lists) + box", "boxes, lists)")},
    "one tile too few": {"consumer": ("range(1, total)", "range(1, total - 1)")},
    "queries of the other half": {"producer": ("CONSUMERS * place + 1", "CONSUMERS * place")},
    "an empty list is walked": {"forward_kernel": ("if total == 0:", "if False:")},
    "another key head": {"forward_kernel": ("k_strides, batch, head // GROUP", "k_strides, batch, 0 * head")},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_of_the_source_are_found(name):
    for case in (CASE, replace(CASE, heads=4, key_heads=2, batch=1)):
        inputs = make_inputs(case, torch.float32)
        for seed in range(4):
            try:
                with small(seed, **MUTATIONS[name]):
                    assert_exact(case, forward(case, inputs), inputs, torch.float32)
            except (HazardError, DeadlockError, AssertionError):
                return
    pytest.fail("nothing was found")


def lists(*block: int, **options) -> BlockMask:
    kv_num, kv_idx = (torch.zeros(1, 1, n, dtype=torch.int32, device="cuda") for n in (2, 2))
    return BlockMask(tuple(block), tuple(block), kv_num + 1, kv_idx[..., None], **options)


def test_calls_it_takes_and_refuses():
    with FakeTensorMode():
        query = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16, device="cuda")
        out = block_sparse_attention(query, query, query, mask=lists(128), impl="gluon")
        assert (out.shape, out.dtype) == (query.shape, query.dtype)
        extra = torch.empty(1, 5, 2, 64, dtype=query.dtype, device="cuda")
        length = torch.zeros(2, dtype=torch.int32, device="cuda")
        refused = {
            "it does not take mask.q_len": dict(mask=lists(128, q_len=length)),
            "it does not take mask.kv_len": dict(mask=lists(128, kv_len=length)),
            "it does not take additional_keys": dict(
                mask=lists(128), additional_keys=extra, additional_values=extra
            ),
            "it does not take skip_threshold": dict(mask=lists(128), skip_threshold=0.1),
            "scale=-1.0 must be positive": dict(mask=lists(128), scale=-1.0),
        }  # fmt: skip
        for why, options in refused.items():
            with pytest.raises(NotImplementedError) as error:
                block_sparse_attention(query, query, query, **options, impl="gluon")
            assert str(error.value) == f"impl='gluon' cannot take this call: {why}"
        short = query[:, :128]
        with pytest.raises(
            NotImplementedError, match=r"mask.query_block=\(64,\) must have sides of powers of two and at"
        ):
            block_sparse_attention(short, short, short, mask=lists(64), impl="gluon")
        assert block_sparse.select_impl(query, query, query, make_call_of(query), "auto") == "triton"
        assert gluon_unsupported(query, query, query, None) is None


def make_call_of(query: Tensor):
    return block_sparse.call(None, None, lists(128), 1.0)


def test_launches_compile_once_and_gradients_are_of_the_triton_kernels():
    """Through Triton's binding and compiler for sm_90; without a device nothing runs, and outputs hold anything."""
    case = Case((256,), (192,), (128,), (64,), 2, head_dim=64, key_heads=1, inverse=True)
    with launches() as driver:
        for _ in range(2):
            inputs = make_inputs(case, torch.bfloat16)
            tensors = [inputs[name] for name in ("query", "key", "value")]
            out, lse = block_sparse.dispatch("gluon", *tensors, make_call(case, inputs))
            (out.sum() + lse.sum()).backward()
            assert all(x.grad is not None and x.grad.shape == x.shape for x in tensors)
    assert driver.launched == 2 * ["forward_kernel", "query_kernel", "key_kernel"]
    assert len(driver.compiled) == 3 and driver.with_scratch[0] == "forward_kernel"


def test_machine_code():
    """One size with cut blocks: no spills, every product once; `compile_report` and the slow test do all."""
    select = {"kernel": {"gluon"}, "grid": {"4x4x8"}, "dtype": {"bf16"}, "head_dim": {128}, "flags": {"cut"}}
    known: dict = dict(architectures=["sm_90"], operators=["block_sparse"], select=select, workers=1)
    (row,) = compile_report.report(**known)
    assert (row.spills, row.products, row.wgmma, row.tma, row.broken) == (0, 1.0, True, True, "")
    loops = list(compile_report.loop_report(**known))
    assert len(loops) == 2 and all(loop.share == 1 and loop.programs == 2 for loop in loops)


@pytest.mark.slow
def test_every_variant_compiles_without_spills():
    select = {"kernel": {"gluon"}}
    rows = list(compile_report.report(architectures=["sm_90"], operators=["block_sparse"], select=select, workers=2))
    assert len(rows) == 24
    assert all((row.spills, row.products, row.broken) == (0, 1.0, "") for row in rows)
