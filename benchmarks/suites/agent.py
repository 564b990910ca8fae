"""Agent attention against its two softmaxes in eager PyTorch, two calls of SDPA, and dense attention."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from foveal.kernels.ops import agent_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..operators import Operator, Tensors, randn
from ..peers import Attend, dense_makers, heads_first, heads_last


@dataclass(frozen=True)
class Case:
    source: str
    side: int
    heads: int
    agents: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    kernel = "agent"

    @property
    def name(self) -> str:
        text = f"{self.side}x{self.side} a{self.agents} h{self.heads}x32"
        return text + (f" b{self.batch}" if self.batch != 1 else "")


def written_out(query, key, value, agent, agent_bias, query_bias) -> Tensor:
    """Eager operations in the order of the paper's equations."""
    q, k, v, a = map(heads_first, (query, key, value, agent))
    scale = q.shape[-1] ** -0.5
    gathered = ((a * scale) @ k.transpose(-1, -2) + agent_bias).softmax(-1) @ v
    return heads_last(((q * scale) @ a.transpose(-1, -2) + query_bias).softmax(-1) @ gathered, query)


def twice(query, key, value, agent, agent_bias, query_bias) -> Tensor:
    """One SDPA call per softmax, with the bias as its mask."""
    q, k, v, a = map(heads_first, (query, key, value, agent))
    gathered = scaled_dot_product_attention(a, k, v, attn_mask=agent_bias[None])
    return heads_last(scaled_dot_product_attention(q, a, gathered, attn_mask=query_bias[None]), query)


class Agent(Operator):
    name = "agent"
    title = "Agent attention"
    folder = "agent"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        dtype = torch.float32 if on_cpu else torch.bfloat16
        for stage, (side, heads, agents) in enumerate(((56, 3, 9), (28, 6, 16), (14, 12, 49)), 1):
            yield Case(f"Agent-Swin-T stage {stage}", side, heads, agents, 8 if on_cpu else 64, dtype)
        for stage, (side, heads, agents) in ((1, (256, 3, 9)), (3, (64, 12, 49))):
            batch = 1 if on_cpu else 4
            yield Case(f"Agent-Swin-T stage {stage}, 1024 pixels", side, heads, agents, batch, dtype)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (64, 128, 256) if device.type == "cpu" else (64, 128, 256, 512)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("Agent-Swin-T stage 3, larger", n, 2, 49, dtype=dtype) for n in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        tensors = {x: draw(case.batch, case.side, case.side, case.heads, 32) for x in ("query", "key", "value")}
        tensors["agent"] = draw(case.batch, case.agents, case.heads, 32)
        tensors["agent_bias"] = draw(case.heads, case.agents, case.side**2)
        tensors["query_bias"] = draw(case.heads, case.side**2, case.agents)
        return tensors

    def arguments(self, case: Case) -> dict:
        return {}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return agent_attention

    def eager(self, case: Case, device: torch.device) -> Attend:
        return written_out

    def crop(self, case: Case) -> Case:
        return replace(case, batch=1)

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        made: dict[str, Callable[[], Attend]] = {"eager": partial(self.eager, case, device)}
        made["SDPA twice"] = lambda: twice
        return made | dense_makers((case.batch, case.side, case.side, case.heads, 32), case.dtype, device)
