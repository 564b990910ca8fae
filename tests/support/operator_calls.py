"""One small, right call of every public operator."""

from collections.abc import Callable

import torch
from foveal.kernels.ops import BlockMask
from foveal.kernels.scored import Softmax
from torch import Tensor


def grid(*shape: int) -> Tensor:
    return torch.randn(1, *shape, 2, 8)


def mask() -> BlockMask:
    idx = torch.zeros(1, 1, 4, 2, dtype=torch.int32)
    lists = BlockMask((2, 2), (2, 2), torch.ones(1, 1, 4, dtype=torch.int32), idx, torch.zeros(1, 1, 4, 2))
    lengths = torch.full((4,), 4, dtype=torch.int32)
    return lists._replace(q_len=lengths, kv_len=lengths).with_inverse((4, 4))


def neighborhood(rank: int) -> dict:
    extra = {"additional_keys": torch.randn(1, 3, 2, 8), "additional_values": torch.randn(1, 3, 2, 8)}
    table = torch.zeros(2, *(5,) * rank)
    return qkv(*(4,) * rank) | extra | {"window": 3, "stride": 1, "dilation": 1, "causal": False, "bias": table}


def qkv(*shape: int) -> dict:
    return dict(zip(("query", "key", "value"), (grid(*shape) for _ in range(3)), strict=True))


def lists() -> dict:
    return qkv(4, 4) | {
        "mask": mask(),
        "additional_keys": torch.randn(1, 3, 2, 8),
        "additional_values": torch.randn(1, 3, 2, 8),
    }


def pairs() -> dict:
    """Query and key of 16 blocks of one token, all of which are listed."""
    every = torch.arange(16, dtype=torch.int32).expand(1, 1, 16, 16)
    mask = BlockMask((1, 1), (1, 1), torch.full((1, 1, 16), 16, dtype=torch.int32), every)
    return {"query": grid(4, 4), "key": grid(4, 4), "mask": mask}


def windows() -> dict:
    return qkv(4, 4) | {"window": 2, "bias": torch.zeros(2, 4, 4)}


CALLS: dict[str, Callable[[], dict]] = {
    **{f"na{rank}d": lambda rank=rank: neighborhood(rank) for rank in (1, 2, 3)},
    "block_sparse_attention": lists,
    "routing_attention2d": lambda: qkv(4, 4) | {"regions": 2, "topk": 1},
    "skipped_blocks": lambda: pairs() | {"skip_threshold": 0.5},
    "calibrate_skip": pairs,
    "window_attention": windows,
    "linear_attention": lambda: qkv(4, 4),
    "scan_attention": lambda: (
        qkv(4, 4)
        | {"log_decay": -torch.rand(1, 4, 4, 2), "beta": torch.rand(1, 4, 4, 2), "state": torch.zeros(1, 2, 8, 8)}
    ),
    "scan_order": lambda: {"shape": (4, 4), "kind": "segments", "segments": torch.arange(16).view(4, 4) // 3},
    "long_convolution": lambda: {"sequence": torch.randn(1, 6, 4), "filter": torch.randn(5, 4)},
    "agent_attention": lambda: (
        qkv(4, 4) | {"agent": grid(3), "agent_bias": torch.zeros(2, 3, 16), "query_bias": torch.zeros(2, 16, 3)}
    ),
    "biased_attention": lambda: qkv(4, 4) | {name: torch.randn(2, 16, 3) for name in ("query_factor", "key_factor")},
    "scored_attention": lambda: qkv(4, 4) | {"score": Softmax(), "order": torch.randperm(16)},
    "merge_attentions": lambda: {"outs": [grid(4), grid(4)], "lses": [grid(4)[..., 0], grid(4)[..., 0]]},
    "relative_bias": lambda: {"table": torch.zeros(2, 3, 5), "window": (2, 3)},
}
