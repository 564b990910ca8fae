"""Profile a generator: time, FLOPs, tokens and memory of a call of a pipeline, by class of operator and by step.

The classes are those of "Generative AI Beyond LLMs: System Implications of Multi-Modal Generation" (arXiv:2312.14385):
attention by kind, linear layers, convolutions, norms, and the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from ..sites import Call, Interception, Layout, Moment, Schedule, Site
from ..sites.models import models_of

CLASSES = {  # beginning of the name of an operator of PyTorch → class
    "linear": ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "matmul"),
    "convolution": ("convolution", "conv", "mkldnn_convolution", "cudnn_convolution"),
    "norm": ("native_layer_norm", "native_group_norm", "native_batch_norm", "rms_norm", "_fused_rms_norm"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention"),
}


def operator_class(name: str) -> str:
    """Class of an operator of PyTorch by its name without namespace: a key of `CLASSES`, or "other"."""
    for kind, names in CLASSES.items():
        if any(name == known or (known[0] == "_" and name.startswith(known)) for known in names):
            return kind
    return "attention" if "scaled_dot_product" in name else "other"


@dataclass
class Cost:
    """Sums over calls.

    Attributes:
        ms: time, milliseconds.
        flops: floating-point operations of products, 2 for a multiply-add.
        bytes: of the results.
        calls: operators.
    """

    ms: float = 0.0
    flops: float = 0.0
    bytes: int = 0
    calls: int = 0

    @property
    def rounded(self) -> dict[str, float]:
        """`ms`, `gflops` and `mb`, as tables have them."""
        return {"ms": round(self.ms, 3), "gflops": round(self.flops / 1e9, 4), "mb": round(self.bytes / 2**20, 2)}

    def add(self, other: Cost) -> None:
        """Adds the numbers of another."""
        self.ms, self.flops = self.ms + other.ms, self.flops + other.flops
        self.bytes, self.calls = self.bytes + other.bytes, self.calls + other.calls


@dataclass
class PipelineProfile:
    """Result of `profile_pipeline`.

    Attributes:
        costs: (component, step, class of operator) → `Cost`. The step is None outside of the denoiser. Classes are
            "attention (self)", "attention (temporal)", …, "linear", "convolution", "norm", "other".
        tokens: (component and site, queries, keys) → calls, of every attention operation of the denoiser.
        peak_bytes: most memory that CUDA held; 0 elsewhere.
    """

    costs: dict[tuple[str, int | None, str], Cost] = field(default_factory=dict)
    tokens: dict[tuple[str, int, int], int] = field(default_factory=dict)
    peak_bytes: int = 0

    def by(self, *what: str) -> dict[tuple, Cost]:
        """Costs added up by some of "component", "step" and "class", in order of their times."""
        places = [("component", "step", "class").index(name) for name in what]
        found: dict[tuple, Cost] = {}
        for key, cost in self.costs.items():
            found.setdefault(tuple(key[i] for i in places), Cost()).add(cost)
        return dict(sorted(found.items(), key=lambda entry: -entry[1].ms))

    @property
    def total(self) -> Cost:
        """Everything."""
        return self.by().get((), Cost())

    def rows(self) -> list[dict[str, Any]]:
        """One row for each component and class: `component`, `class`, `ms`, `share`, `gflops`, `mb`, `calls`."""
        whole = self.total.ms or 1.0
        return [
            {"component": component, "class": kind, "share": round(cost.ms / whole, 4), "calls": cost.calls}
            | cost.rounded
            for (component, kind), cost in self.by("component", "class").items()
        ]

    def steps(self) -> list[dict[str, Any]]:
        """One row for each denoising step: `step`, `ms`, `gflops`, `mb`."""
        found = ((step, cost) for (step,), cost in self.by("step").items() if step is not None)
        return [{"step": step} | cost.rounded for step, cost in sorted(found)]


class _Recorder(TorchDispatchMode):
    """Times every operator; a place and a class may be said from outside."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.found = device, PipelineProfile()
        self.component, self.step, self.kind = "pipeline", None, None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._wait()
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self._wait()
        ms = 1000 * (time.perf_counter() - start)
        name = func._schema.name.partition("::")[2]
        count = flop_registry.get(func._overloadpacket)
        # those of attention are counted by the shapes of the operation, whatever computes it
        flops = 0.0 if count is None or self.kind else float(count(*args, **kwargs, out_val=out))
        held = sum(x.nbytes for x in tree_flatten(out)[0] if isinstance(x, Tensor) and x._base is None)
        kind = self.kind or operator_class(name)
        self.found.costs.setdefault((self.component, self.step, kind), Cost()).add(Cost(ms, flops, held, 1))
        return out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _kind_of(site: Site) -> str:
    if site.kind == "self" and site.axes == (0,):
        return "attention (temporal)"
    return "attention (spatial)" if site.kind == "self" and site.axes == (1, 2) else f"attention ({site.kind})"


def profile_pipeline(pipe: Any, **call: Any) -> PipelineProfile:
    """Runs a pipeline once and measures it operator by operator.

    Every operator is waited for, so the sum of times is above that of a run without profile; shares are what to read.

    Args:
        pipe: of diffusers, whose attentions `foveal.zoo.sites` knows.
        call: arguments of the pipeline.

    Raises:
        ValueError: a generator whose attentions are not known.
    """
    denoisers = models_of(pipe)
    device = next(next(iter(denoisers.values())).parameters()).device
    recorder = _Recorder(device)

    def plan(site: Site, layout: Layout, moment: Moment) -> bool:
        recorder.step = moment.step
        return True

    def attend(operation: Call, following: Callable[[Call], Tensor]) -> Tensor:
        key = (operation.site.path, operation.query.shape[1], operation.key.shape[1])
        recorder.found.tokens[key] = recorder.found.tokens.get(key, 0) + 1
        recorder.kind = _kind_of(operation.site)
        batch, _, heads, size = operation.query.shape
        flops = 2.0 * batch * heads * key[1] * key[2] * (size + operation.value.shape[-1])
        recorder.found.costs.setdefault((recorder.component, recorder.step, recorder.kind), Cost()).add(
            Cost(flops=flops)
        )
        try:
            return following(operation)
        finally:
            recorder.kind = None

    handles = []
    for name, module in getattr(pipe, "components", {}).items():
        if isinstance(module, nn.Module):
            handles += _name_component(recorder, name, module, name in denoisers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    schedule = Schedule(steps=(None, None))  # steps are counted, none is left out
    try:
        with Interception(pipe, attend, plan=plan, schedule=schedule), recorder:
            pipe(**call)
    finally:
        for handle in handles:
            handle.remove()
    if device.type == "cuda":
        recorder.found.peak_bytes = torch.cuda.max_memory_allocated(device)
    return recorder.found


def _name_component(recorder: _Recorder, name: str, module: nn.Module, denoises: bool) -> list[Any]:
    """Hooks that say which component runs."""

    def before(module: nn.Module, args: tuple) -> None:
        recorder.component = name

    def after(module: nn.Module, args: tuple, out: Any) -> None:
        recorder.component = "pipeline"
        if denoises:
            recorder.step = None

    hooked = [module] if denoises or not hasattr(module, "decode") else [module.encoder, module.decoder]
    handles = []
    for part in hooked:
        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after, always_call=True)]
    return handles


def table_of(profile: PipelineProfile) -> list[list[str]]:
    """Lines for a terminal: component, class, ms, share, GFLOP, MB, calls."""
    lines = [["component", "operators", "ms", "share", "GFLOP", "MB", "calls"]]
    for row in profile.rows():
        numbers = (f"{row['ms']:.1f}", f"{100 * row['share']:.1f} %", f"{row['gflops']:.2f}", f"{row['mb']:.1f}")
        lines.append([row["component"], row["class"], *numbers, str(row["calls"])])
    return lines


def tokens_of(profile: PipelineProfile) -> Mapping[tuple[int, int], list[str]]:
    """Sites by the numbers of their queries and keys, the longest first."""
    found: dict[tuple[int, int], list[str]] = {}
    for path, queries, keys in profile.tokens:
        found.setdefault((queries, keys), []).append(path)
    return dict(sorted(found.items(), key=lambda entry: -entry[0][0] * entry[0][1]))
