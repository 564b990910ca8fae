"""Processes that stand for ranks: they join one gloo group and then run functions of this module, called by name.

    ranks = Ranks(3, folder)
    results = ranks("attend", case, axis, lengths, given, impl)  # one result a rank

An exception in a function becomes an assertion in the test that called it.
"""

import multiprocessing
import time
import traceback
from datetime import timedelta
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.distributed as dist
from foveal.kernels.ops import na3d, sharded_neighborhood_attention
from neighborhood_matrix import Case, make_inputs
from operator_matrix import as_leaves, seeded_randn
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

SPLIT = ("query", "key", "value")
STEPS = {"all_to_all_single": "send", "wait_tensor": "wait", "bmm": "attend"}


class Ranks:
    """A group of processes; a call runs a function on the first `size` of them and returns what each returned."""

    def __init__(self, world: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: str, *args, size: int | None = None) -> list:
        pipes = self.pipes[:size]
        for pipe in pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(120), f"rank {rank} does not answer"
            result, failure = pipe.recv()
            assert failure is None, f"rank {rank}: {failure}"
            results.append(result)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(rank: int, world: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((globals()[function](groups, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def cotangents(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients of the output and the log-sum-exp of the whole grid."""
    randn = seeded_randn(case.seed + 1, torch.float64, "cpu")
    shape = (case.batch, *case.shape, case.heads)
    return randn(*shape, case.value_dim or case.head_dim), randn(*shape)


def gradients(inputs: dict, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The outputs and, by the name of each input that requires it, its gradient."""
    given = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    found = torch.autograd.grad(outputs, tuple(given.values()), grads)
    return dict(zip(("out", "lse", *given), (*(x.detach() for x in outputs), *found), strict=True))


def piece(x: Tensor, axis: int, lengths: tuple[int, ...], rank: int) -> Tensor:
    """A rank's piece of a whole tensor."""
    return x.detach().narrow(1 + axis, list(accumulate((0, *lengths)))[rank], lengths[rank])


def _pieces(case: Case, axis: int, lengths: tuple[int, ...], rank: int, dtype: torch.dtype) -> dict:
    inputs = make_inputs(case, dtype)
    return as_leaves({n: piece(x, axis, lengths, rank) if n in SPLIT else x for n, x in inputs.items()})


def attend(
    groups,
    case: Case,
    axis: int,
    lengths: tuple[int, ...],
    given: bool,
    impl: str,
    dtype=torch.float64,
    leaves: tuple[str, ...] | None = None,
):
    """Outputs and gradients of this rank's piece of a case, those of `leaves` only unless None."""
    rank, group = dist.get_rank(), groups[len(lengths)]
    inputs = _pieces(case, axis, lengths, rank, dtype)
    for name, x in inputs.items():
        if x is not None and leaves is not None:
            x.requires_grad_(name in leaves)
    outputs = sharded_neighborhood_attention(
        **inputs, **case.options, mesh=group, axis=axis, lengths=lengths if given else None, impl=impl, return_lse=True
    )
    grads = tuple(piece(x, axis, lengths, rank).to(y.dtype) for x, y in zip(cotangents(case), outputs, strict=True))
    return gradients(inputs, outputs, grads)


def attend_twice(groups, cases: tuple[Case, Case], axis: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """`attend` for the sum of two calls with the same inputs."""
    rank = dist.get_rank()
    inputs = _pieces(cases[0], axis, lengths, rank, torch.float64)
    where = {"mesh": groups[len(lengths)], "axis": axis, "lengths": lengths}
    outputs = [sharded_neighborhood_attention(**inputs, **case.options, **where, return_lse=True) for case in cases]
    grads = tuple(piece(x, axis, lengths, rank) for x in cotangents(cases[0]))
    return gradients(inputs, tuple(sum(x) for x in zip(*outputs, strict=True)), grads)


def attend_checkpointed(groups, case: Case, axis: int, lengths: tuple[int, ...]) -> tuple[dict, int]:
    """`attend` with a forward that is computed again in the backward, and how many exchanges nobody waited for."""
    rank = dist.get_rank()
    inputs = _pieces(case, axis, lengths, rank, torch.float64)
    options = case.options | {"mesh": groups[len(lengths)], "axis": axis, "lengths": lengths}
    outputs = checkpoint(
        partial(sharded_neighborhood_attention, return_lse=True), **inputs, **options, use_reentrant=False
    )
    found = gradients(inputs, outputs, tuple(piece(x, axis, lengths, rank) for x in cotangents(case)))
    return found, torch._C._distributed_c10d._get_work_registry_size()


def attend_for(groups, case: Case, axis: int, lengths: tuple[int, ...], name: str) -> tuple[dict[str, Tensor], int]:
    """The gradient of one input where others require gradients, too, and how many exchanges nobody waited for."""
    rank = dist.get_rank()
    inputs = _pieces(case, axis, lengths, rank, torch.float64)
    where = {"mesh": groups[len(lengths)], "axis": axis, "lengths": lengths}
    outputs = sharded_neighborhood_attention(**inputs, **case.options, **where, return_lse=True)
    grads = tuple(piece(x, axis, lengths, rank) for x in cotangents(case))
    (found,) = torch.autograd.grad(outputs, inputs[name], grads)
    out, lse = (x.detach() for x in outputs)
    return {"out": out, "lse": lse, name: found}, torch._C._distributed_c10d._get_work_registry_size()


def attend_with_anomaly_detection(groups, case: Case, axis: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """`attend` while autograd looks for NaN, which new memory is full of; rank 1 is the first to go backwards."""
    rank = dist.get_rank()
    inputs = _pieces(case, axis, lengths, rank, torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            outputs = sharded_neighborhood_attention(
                **inputs, **case.options, mesh=groups[len(lengths)], axis=axis, lengths=lengths, return_lse=True
            )
            time.sleep(0.0 if rank == 1 else 0.5)
            return gradients(inputs, outputs, tuple(piece(x, axis, lengths, rank) for x in cotangents(case)))
    finally:
        torch.use_deterministic_algorithms(False)


class Steps(TorchFunctionMode):
    """Records in what order this process sends, waits and computes; a file appears before it waits."""

    def __init__(self, path: Path):
        self.path, self.steps = path, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.add(STEPS.get(func.__name__))
        return func(*args, **(kwargs or {}))

    def add(self, step: str | None) -> None:
        if step is not None and self.steps[-1:] != [step]:
            self.steps.append(step)
        if step == "wait":
            self.path.touch()


def _backward_steps(out: Tensor, path: Path) -> Steps:
    """Records them for a backward to come, node by node: the mode is off inside one."""
    names = {"WaitBackward": "send", "PackBackward": "wait", "_AttentionBackward": "attend"}
    found, nodes, seen = Steps(path), [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        step = names.get(node.name())
        node.register_prehook(lambda grads, step=step: found.add(step))
    return found


def _meet(path: Path) -> None:
    """Wait until another rank makes the file."""
    for _ in range(9000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"no rank made {path.name}")


def overlap(groups, case: Case, axis: int, lengths: tuple[int, ...], folder: Path) -> tuple[list[str], list[str]]:
    """Steps of forward and backward of rank 1. The others start either only when it waits for them."""
    rank, forward, backward = dist.get_rank(), folder / "forward", folder / "backward"
    inputs = _pieces(case, axis, lengths, rank, torch.float64)
    if rank != 1:
        _meet(forward)
    with (there := Steps(forward)):
        out = sharded_neighborhood_attention(
            **inputs, **case.options, mesh=groups[len(lengths)], axis=axis, lengths=lengths
        )
    if rank != 1:
        _meet(backward)
    back = _backward_steps(out, backward)
    out.sum().backward()
    return there.steps, back.steps


def attend_compiled(groups, case: Case, axis: int, lengths: tuple[int, ...], impl: str):
    """`attend` on a mesh, lengths given, under `torch.compile(fullgraph=True)`, and the steps of both graphs."""
    rank, mesh = dist.get_rank(), DeviceMesh.from_group(groups[len(lengths)], "cpu")
    inputs, graphs = _pieces(case, axis, lengths, rank, torch.float64), []

    def operator(**tensors):
        return sharded_neighborhood_attention(
            **tensors, **case.options, mesh=mesh, axis=axis, lengths=lengths, impl=impl, return_lse=True
        )

    def record(graph, _):
        names = (getattr(node.target, "overloadpacket", node.target) for node in graph.graph.nodes)
        steps = [STEPS[name.__name__] for name in names if getattr(name, "__name__", "") in STEPS]
        graphs.append([step for step, _ in groupby(steps)])
        return make_boxed_func(graph)

    outputs = torch.compile(operator, fullgraph=True, backend=aot_autograd(fw_compiler=record))(**inputs)
    grads = tuple(piece(x, axis, lengths, rank) for x in cotangents(case))
    return gradients(inputs, outputs, grads), graphs


def attend_on_meshes(groups, case: Case, axis: int, lengths: tuple[int, ...]):
    """Outputs on a mesh of one dimension, on one of two, and the message of the refusal of the latter as a whole."""
    inputs = _pieces(case, axis, lengths, dist.get_rank(), torch.float64)
    line = DeviceMesh("cpu", list(range(len(lengths))))
    plane = init_device_mesh("cpu", (1, len(lengths)), mesh_dim_names=("data", "sequence"))
    outputs = [
        sharded_neighborhood_attention(**inputs, **case.options, mesh=mesh, axis=axis)
        for mesh in (line, plane["sequence"])
    ]
    return *(x.detach() for x in outputs), refusal(groups, [{"mesh": plane}] * len(lengths))


def attend_flat(groups, case: Case, axis: int, lengths: tuple[int, ...]):
    """Output and log-sum-exp of this rank's piece, given and returned without its grid, and on it."""
    inputs = _pieces(case, axis, lengths, dist.get_rank(), torch.float64)
    options = dict(case.options, mesh=groups[len(lengths)], axis=axis, return_lse=True)
    grid = inputs["query"].shape[1:-2]
    flat = inputs | {name: inputs[name].flatten(1, -3) for name in ("query", "key", "value")}
    results = [
        sharded_neighborhood_attention(**flat, **options, grid=grid),
        sharded_neighborhood_attention(**flat, **options, grid=grid, lengths=lengths),
        sharded_neighborhood_attention(**inputs, **options),
    ]
    return [[x.detach() for x in outputs] for outputs in results]


def refusal(groups, changes: list[dict]) -> tuple[str, str]:
    """Type and message of what a call raises that this rank makes with changes of its own to a right one."""
    change = dict(changes[dist.get_rank()])
    shape = change.pop("shape", (1, 4, 6, 2, 4))
    query, key, value = torch.zeros(3, *shape, dtype=change.pop("dtype", torch.float32))
    key.requires_grad_(change.pop("requires_grad", False))
    options = {"mesh": groups[len(changes)], "window": 3} | change
    try:
        sharded_neighborhood_attention(query, key, value, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


class Block(nn.Module):
    """Attention with a residual, over one process or over the ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh | None = None):
        super().__init__()
        self.mesh = mesh
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (6, 8)).chunk(3, dim=-2)
        if self.mesh is None:
            out = na3d(query, key, value, window=3)
        else:
            out = sharded_neighborhood_attention(query, key, value, mesh=self.mesh, window=3)
        return x + self.proj(out.flatten(-2))


def make_step(mesh: DeviceMesh | None = None) -> tuple[nn.Module, Tensor]:
    """A model of two blocks and the clips of a step, the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Block(mesh), Block(mesh)).double(), torch.randn(4, 6, 5, 5, 16, dtype=torch.float64)


def train(groups, how: str) -> dict[str, Tensor]:
    """Gradients of the parameters from two pairs of ranks: a pair shares clips, a rank has half of the frames."""
    from torch.distributed.fsdp import fully_shard  # takes a second, in every process

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model, clips = make_step(mesh["sequence"])
    data, sequence = mesh.get_coordinate()
    clips = clips.tensor_split(2)[data].tensor_split(2, dim=1)[sequence]
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in (*model, model):
            fully_shard(block)
    model(clips).square().mean().backward()
    gradients = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: x if how == "ddp" else x.full_tensor() for name, x in gradients.items()}
