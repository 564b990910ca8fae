"""The Gluon forward of neighborhood attention without a device: its functions as plain Python, its barriers in every
order, its machine code, and which calls it takes.

No test here runs what the compiler makes of it: that needs a GPU, see `test_neighborhood_gpu.py`.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from random import Random

import neighborhood_matrix
import operator_matrix
import pytest
import torch
from foveal.kernels.common import calling
from foveal.kernels.neighborhood import configs, geometry
from foveal.kernels.neighborhood.call import NeighborhoodCall, gluon_unsupported, neighborhood
from foveal.kernels.neighborhood.configs import Size
from foveal.kernels.ops import explain, na1d, na2d, window_attention
from foveal.kernels.tools import compile_report
from neighborhood_matrix import Case, cases, make_call, make_inputs, plain
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton.experimental.gluon")

import gluon_shim
from barrier_model import Model
from foveal.kernels.neighborhood import gluon as launch
from gluon_shim import DeadlockError, HazardError
from launch_driver import launches

SMALL = {"ROWS": 8}  # queries of a consumer, so that small grids have many tiles


@contextmanager
def small(seed: int, keys: int = 8, stages: int = 2, **edits: tuple[str, str]) -> Iterator[gluon_shim.Run]:
    """Programs of 16 queries, `keys` keys a tile and `stages` buffers, in an order of the seed; `edits` mutate them."""

    def configure(axes, head_dim, *, wide):
        known = dict(head_dim=head_dim, itemsize=2, device="hopper", descriptor=True, wide=wide)
        return configs.choose("forward", axes, **known, sizes=(Size(16, keys, 4, stages),))

    before, launch.configure = launch.configure, configure
    try:
        with gluon_shim.running(launch, seed, constants=SMALL, edits=edits) as run:
            yield run
    finally:
        launch.configure = before


def forward(case: Case, inputs: dict) -> dict[str, Tensor]:
    """Output and log-sum-exp of the Gluon forward, inside of a block that runs it."""
    tensors = [inputs[name].detach() for name in ("query", "key", "value")]
    out, lse = launch.forward(*neighborhood.prepare(*tensors, make_call(case, inputs)))
    return {"out": out, "lse": lse}


def assert_exact(case: Case, got: dict[str, Tensor], inputs: dict, dtype: torch.dtype) -> None:
    """Hold output and log-sum-exp to the float64 reference, by the rule of all operators."""

    def both(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: found[name] for name in ("out", "lse")}

    exact = neighborhood_matrix.run(case, operator_matrix.as_leaves(inputs, torch.float64), "reference")
    eager = both(neighborhood_matrix.run_eager(case, inputs)) if dtype.itemsize < 4 else None
    found = operator_matrix.errors(got, both(exact), eager, dtype)
    operator_matrix.assert_exact(found, f"the Gluon forward on {case!r}")


def random_cases(rank: int, n: int) -> list[Case]:
    def affordable(case: Case) -> bool:
        groups = case.batch * case.heads
        for dilation in case.dilation:
            groups *= dilation
        return 0 < groups <= 8 and case.batch * case.heads * len(geometry.mask(case.axes)) <= 300

    return list(islice(filter(affordable, map(partial(plain, head_dim=8), cases(rank, 10**6, seed=31))), n))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_walk_and_masks_on_random_cases(rank):
    walked = 0
    for i, case in enumerate(random_cases(rank, 12)):
        inputs = make_inputs(case, torch.float32)
        with small(case.seed, keys=(8, 16)[i % 2], stages=2 + i % 3 // 2) as run:
            got = forward(case, inputs)
        assert_exact(case, got, inputs, torch.float32)
        walked += len(run.programs)
    assert walked > 60


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_queries_that_are_a_part_of_the_grid(rank):
    for case in random_cases(rank, 4):
        random, inputs = Random(case.seed), make_inputs(case, torch.float32)
        boxes = [sorted(random.sample(range(length + 1), 2)) for length in case.shape]
        box = (slice(None), *(slice(*queries) for queries in boxes))
        axes = tuple(a._replace(queries=tuple(queries)) for a, queries in zip(case.axes, boxes, strict=True))
        call = replace(make_call(case, inputs), axes=axes)
        query, key, value = (inputs[name].detach() for name in ("query", "key", "value"))
        exact = neighborhood_matrix.run(case, operator_matrix.as_leaves(inputs, torch.float64), "reference")
        with small(case.seed):
            out, lse = launch.forward(*neighborhood.prepare(query[box], key, value, call))
        truth = {name: exact[name][box] for name in ("out", "lse")}
        found = operator_matrix.errors({"out": out, "lse": lse}, truth, None, torch.float32)
        operator_matrix.assert_exact(found, f"the Gluon forward on the box {boxes} of {case!r}")


CLIP = Case((5, 9, 12), (3, 5, 7), (1, 2, 1), (1, 1, 1), (False, True, False), key_heads=1)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (replace(CLIP, head_dim=64), torch.bfloat16),
        (Case((17, 21), (13, 9), (1, 3), (1, 2), (False, False), heads=1, key_heads=1, head_dim=128), torch.float16),
        (Case((700,), (401,), (1,), (1,), (True,), heads=1, key_heads=1, head_dim=64), torch.bfloat16),
    ],
)  # fmt: skip
def test_the_sizes_of_the_table(case, dtype):
    inputs = make_inputs(case, dtype)
    with gluon_shim.running(launch, case.seed) as run:
        got = forward(case, inputs)
    assert run.programs
    assert_exact(case, got, inputs, dtype)


def test_a_row_that_sees_nothing_of_a_tile():
    """Causal rows at the beginning see few keys of the first tile, and a tile later none: weights stay finite."""
    case = Case((48,), (30,), (1,), (1,), (True,), heads=1, key_heads=1, head_dim=8, scale=3.0)
    inputs = make_inputs(case, torch.float32)
    with small(0):
        assert_exact(case, forward(case, inputs), inputs, torch.float32)


# protocol of the barriers

WIDE = Case((40,), (21,), (1,), (1,), (False,), heads=1, key_heads=1, head_dim=8)  # wholly visible tiles and others
FULL = replace(WIDE, shape=(32,), window=(32,))


def traced(case: Case, seed: int = 0, **size: int) -> list[gluon_shim.Program]:
    with small(seed, **size) as run:
        forward(case, make_inputs(case, torch.float32))
    return run.programs


def all_events(program: gluon_shim.Program) -> list[list[tuple]]:
    return [partition.events for partition in program.partitions]


def model(program: gluon_shim.Program) -> Model:
    return Model(all_events(program), program.counts, turns=True)


def test_events_do_not_depend_on_the_order():
    first, *others = ([[p.events for p in x.partitions] for x in traced(WIDE, seed)] for seed in range(4))
    assert all(other == first for other in others)
    kinds = {event[0] for events in first[0] for event in events}
    assert kinds == {"wait", "expect", "arrive", "copy", "product", "done", "use"}


@pytest.mark.parametrize(("case", "stages"), [(WIDE, 2), (FULL, 2), (replace(FULL, shape=(24,), window=(24,)), 3)])
def test_no_order_ends_in_a_deadlock_or_overwrites_a_buffer(case, stages):
    program = traced(case, stages=stages)[0]
    assert model(program).explore() > 1000


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_long_walks_in_random_orders(stages):
    case, random = replace(WIDE, shape=(200,), window=(120,)), Random(stages)
    known = model(traced(case, stages=stages)[3])
    for _ in range(100):
        known.check(random)


def test_one_buffer_is_too_few():
    with pytest.raises(DeadlockError):
        traced(FULL, stages=1)
    with configs.override(size=Size(128, 128, 4, 1)), pytest.raises(ValueError, match="stages=1 must be at least 2"):
        launch.configure((geometry.Axis(64, 9),), 64, wide=False)


def mutants(events: list[list[tuple]]) -> Iterator[tuple[tuple, tuple[int, int], bool, list]]:
    """Every event left out, and every parity turned: the event, its partition and place, whether it is left out, and
    the events with that."""
    for part, some in enumerate(events):
        for place, event in enumerate(some):
            changed = [] if event[0] in ("product", "use") else [some[:place] + some[place + 1 :]]
            if event[0] == "wait":
                changed.append([*some[:place], ("wait", event[1], 1 - event[2]), *some[place + 1 :]])
            for other in changed:
                yield event, (part, place), len(other) < len(some), [*events[:part], other, *events[part + 1 :]]


@pytest.mark.parametrize("turns", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_missing_event_and_wrong_phase_is_found(turns):
    """All but waits at which no order ever waits, and arrivals at the end, for which nobody waits.

    Buffers are safe without the turns, which are there for speed; so their barriers are looked at alone.
    """
    program, random, found = traced(FULL)[0], Random(0), 0
    of_turns, events = list(program.counts)[-2:], all_events(program)
    if not turns:
        events = [[event for event in some if event[1] not in of_turns] for some in events]
    shipped = Model(events, program.counts, turns=turns)
    shipped.explore()
    for event, where, left_out, changed in mutants(events):
        if turns != (event[1] in of_turns) or (left_out and event[0] == "wait" and where not in shipped.blocked):
            continue
        mutant = Model(changed, program.counts, turns=turns)
        try:
            for _ in range(15):
                mutant.check(random)
            mutant.explore()
        except (HazardError, DeadlockError):
            found += 1
        else:
            assert event[0] == "arrive" and event not in events[where[0]][where[1] + 1 :], event
    assert found > (10 if turns else 70)


MUTATIONS = {
    "keys are read before they are there": {"first_logits": ("mbarrier.wait(k_full.index(0), 0)", "pass")},
    "further keys are not waited for": {"end_tile": ("pred=after < total", "pred=False")},
    "queries are not waited for": {"first_logits": ("mbarrier.wait(q_full, 0)", "pass")},
    "values of another phase": {"begin_tile": ("v_full.index(before), (t - 1)", "v_full.index(before), t")},
    "keys are not released": {"begin_tile": ("mbarrier.arrive(k_empty.index(slot))", "pass")},
    "values are not released": {"end_tile": ("mbarrier.arrive(v_empty.index((t - 1) % STAGES))", "pass")},
    "values are released early": {"end_tile": ("warpgroup_mma_wait(0", "warpgroup_mma_wait(1")},
    "logits are read early": {"begin_tile": ("warpgroup_mma_wait(1", "warpgroup_mma_wait(2")},
    "nobody's turn": {"begin_tile": ("turns.index(1 - HALF)", "turns.index(HALF)")},
    "the producer does not wait": {"copy_tile": ("mbarrier.wait(k_empty.index(slot), phase ^ 1)", "pass")},
    "the producer waits for another phase": {
        "copy_tile": ("(v_empty.index(slot), phase ^ 1", "(v_empty.index(slot), phase")
    },
    "half of the bytes": {"copy_tile": ("BYTES: gl.constexpr = 2", "BYTES: gl.constexpr = 1")},
    "one reader frees a buffer": {"make_rings": ("k_empty.index(i), count=CONSUMERS", "k_empty.index(i), count=1")},
    "no mask": {"consumer": ("if MASKED:", "if False:")},
    "no mask of the first tile": {"consumer": ("if BORDER:", "if False:")},
    "the output is not rescaled": {"end_tile": ("acc * decay[:, None]", "acc + 0 * decay[:, None]")},
    "the other half of the queries": {
        "copy_queries": ("[first[0], first[1], first[2]", "[second[0], second[1], second[2]")
    },
    "another walk": {"producer": ("tile_origin(i, starts", "tile_origin(count - 1 - i, starts")},
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_of_the_source_are_found(name):
    for case in (WIDE, replace(WIDE, causal=(True,))):
        inputs = make_inputs(case, torch.float32)
        for seed in range(12):
            try:
                with small(seed, **MUTATIONS[name]):
                    assert_exact(case, forward(case, inputs), inputs, torch.float32)
            except (HazardError, DeadlockError, AssertionError):
                return
    pytest.fail("nothing was found")


# calls


def on_cuda(*shape: int, heads: int = 2, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Tensor:
    """A tensor without data on a device that need not be there; inside of `FakeTensorMode`."""
    return torch.empty(2, *shape, heads, width, dtype=dtype, device="cuda")


def test_explain_names_it_and_auto_does_not_take_it():
    with FakeTensorMode():
        query = on_cuda(30, 48, 80, width=128)
        chosen = explain("na3d", query, query, query, window=(18, 24, 24))
        asked = explain("na3d", query, query, query, window=(18, 24, 24), impl="gluon")
        text = str(explain("na2d", on_cuda(64, 64), on_cuda(64, 64), on_cuda(64, 64), window=9, impl="gluon"))
    assert chosen.impl == "triton" and chosen.reasons["gluon"] is None
    assert list(chosen.reasons) == ["triton", "gluon", "torch", "reference"]
    assert asked.impl == "gluon" and asked.cost["forward_tiles"].startswith("4×8×4 by 4×8×4: ")
    assert "gluon  " in text and "chosen" in text


REFUSED = {
    "dtype torch.float32 is not float16 or bfloat16": (dict(dtype=torch.float32), {}),
    "head_dim 32 is not one of (64, 128)": (dict(width=32), {}),
    "its consumers have no registers left for a bias": ({}, dict(bias=torch.zeros(2, 13, 13))),
    "it has no loop over additional keys": ({}, "additional"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_calls_say_why(why):
    tensor, options = REFUSED[why]
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = on_cuda(9, 9, **tensor)
        if options == "additional":
            extra = torch.empty(2, 5, 2, 64, dtype=query.dtype, device="cuda")
            options = dict(additional_keys=extra, additional_values=extra)
        options = {name: x.to("cuda") for name, x in options.items()}
        assert explain("na2d", query, query, query, window=7, impl="gluon", **options).reasons["gluon"] == why
        with pytest.raises(NotImplementedError, match="impl='gluon' cannot take this call: ") as error:
            na2d(query, query, query, window=7, impl="gluon", **options)
        assert str(error.value).endswith(why)


def test_refused_tensors_say_why():
    with FakeTensorMode():
        query = on_cuda(9, 9)
        narrow = on_cuda(9, 9, width=65)[..., :64]
        assert gluon_unsupported(query, narrow, query, None) == (
            f"key.stride()={narrow.stride()} must end in 1, the others multiples of 8 and not 0"
        )
        wide = on_cuda(9, 9, width=128)
        assert gluon_unsupported(query, query, wide, None) == "head_dim 128 of value is not that of query, 64"
    query = torch.zeros(1, 9, 9, 2, 64, dtype=torch.bfloat16)
    assert gluon_unsupported(query, query, query, None) == "device cpu is not CUDA, and Gluon has no interpreter"
    with pytest.raises(NotImplementedError, match="device cpu is not CUDA"):
        na1d(query[0], query[0], query[0], window=3, impl="gluon")
    call = NeighborhoodCall((geometry.Axis(9, 3), geometry.Axis(9, 3)), 1.0)
    shifted = torch.zeros(3 * query.numel() + 1, dtype=query.dtype)[1:].view(3, *query.shape)
    with pytest.raises(NotImplementedError, match="begins between multiples of 16 bytes"):
        launch.forward(*shifted, call)
    with pytest.raises(ValueError, match=r"impl='gluon' must be one of \('auto', 'triton', 'torch', 'reference'\)"):
        window_attention(query, query, query, window=3, impl="gluon")


@pytest.mark.parametrize(
    ("version", "capability", "why"),
    [
        ("3.5.1", (9, 0), "Triton 3.5.1 is older than 3.6, whose Gluon it is written in"),
        ("3.6.0", (9, 0), None),
        ("3.8.0", (10, 0), "compute capability 10.0 is not 9.0 (H100, H200), whose instructions it consists of"),
    ],
)
def test_refused_devices_say_why(version, capability, why, monkeypatch):
    monkeypatch.setattr(calling, "triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        query = on_cuda(9)
        assert calling.gluon_obstacle(query, query, query) == why


def test_sizes_it_does_not_have_are_refused():
    axes = (geometry.Axis(64, 9),)
    for size, text in ((Size(64, 64, 4, 2), "size.queries=64 must be 128"), (Size(128, 32, 4, 2), "size.keys=32 must")):
        with configs.override(size=size), pytest.raises(ValueError, match=text):
            launch.configure(axes, 64, wide=False)


def test_outputs_of_a_graph():
    with FakeTensorMode():
        query, key, value = (on_cuda(9, 9, heads=heads).requires_grad_() for heads in (4, 2, 2))
        out, lse = na2d(query, key, value, window=5, impl="gluon", return_lse=True)
        assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "cuda")
        assert (lse.shape, lse.dtype) == (query.shape[:-1], torch.float32)
        assert out.requires_grad and lse.requires_grad


def test_launches_compile_once_and_gradients_are_of_the_triton_kernels():
    """Through Triton's binding and compiler for sm_90; without a device nothing runs, and outputs hold anything."""
    case = Case((9, 12), (5, 5), (1, 1), (1, 2), (False, True), head_dim=64, key_heads=1, layout="fused")
    with launches() as driver:
        for _ in range(2):
            inputs = make_inputs(case, torch.bfloat16)
            tensors = [inputs[name] for name in ("query", "key", "value")]
            out, lse = neighborhood.dispatch("gluon", *tensors, make_call(case, inputs))
            (out.sum() + lse.sum()).backward()
            assert all(x.grad is not None and x.grad.shape == x.shape for x in tensors)
    assert driver.launched == 2 * ["forward_kernel", "query_kernel", "key_kernel"]
    assert len(driver.compiled) == 3 and driver.with_scratch == driver.launched


def test_nothing_of_gluon_is_imported_before_it_runs():
    code = """
import sys, torch
from foveal.kernels.ops import explain, na2d
query = torch.zeros(1, 9, 9, 1, 64)
na2d(query, query, query, window=3), explain("na2d", query, query, query, window=3)
lazy = "triton.experimental.gluon", "foveal.kernels.neighborhood.gluon"
assert not any(name.startswith(lazy) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# machine code


@pytest.mark.slow
def test_machine_code():
    """One size: no spills, every product once, TMA and wgmma; `compile_report` and the slow tests do all."""
    select = {"kernel": {"gluon"}, "grid": {"18x24x24"}, "dtype": {"bf16"}, "head_dim": {128}}
    select["keys"] = {(4, 8, 4)}
    (row,) = compile_report.report(architectures=["sm_90"], operators=["neighborhood"], select=select, workers=1)
    assert (row.spills, row.products, row.wgmma, row.tma, row.broken) == (0, 1.0, True, True, "")
    loops = list(
        compile_report.loop_report(architectures=["sm_90"], operators=["neighborhood"], select=select, workers=1)
    )
    assert len(loops) == 4 and all(loop.programs == 2 for loop in loops), "inner and border of either consumer"
    assert all(loop.products == 2 * 64 * 128 * 128 and loop.share == 1 for loop in loops)


def test_other_architectures_have_none():
    for arch in set(compile_report.ARCHITECTURES) - {"sm_90"}:
        assert not any(variant.kernel == "gluon" for variant in compile_report._variants("neighborhood", arch))


@pytest.mark.slow
def test_every_size_compiles_without_spills():
    select = {"kernel": {"gluon"}}
    rows = list(compile_report.report(architectures=["sm_90"], operators=["neighborhood"], select=select, workers=2))
    assert len(rows) == 36
    assert all((row.spills, row.products, row.broken) == (0, 1.0, "") for row in rows)
