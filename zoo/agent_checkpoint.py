"""What the Agent Attention families share: input sizes, and the official rule for weights of another size."""

import math
from collections.abc import Sequence

from timm.layers import register_notrace_function, register_notrace_module, resample_abs_pos_embed
from torch import Tensor, nn

from ..kernels.symbolic import known
from ..layers.agent import AXIS_BIASES, AgentAttention2d, AgentBranch2d, resize_axis_bias
from ..layers.relative import resize_bias_table
from ..layers.window import WindowAttention2d
from .builder import imagenet_cfg
from .checkpoint import fit_stage_norms, unwrap

for layer in (AgentAttention2d, AgentBranch2d, WindowAttention2d):
    register_notrace_module(layer)  # torch.fx cannot trace their checks of shapes

BUFFERS = ("relative_position_index", "attn_mask")


def agent_cfg(name: str, **overrides) -> dict:
    """timm's pretrained configuration of the checkpoint `name`: images are squashed, the input size is the model's."""
    defaults = {
        "fixed_input_size": True,
        "crop_mode": "squash",
        "paper_ids": "arXiv:2312.08874",
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
    }
    return imagenet_cfg(name, **(defaults | overrides))


def stage_grids(img_size: tuple[int, int], reductions: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of the maps of an image."""
    return [(math.ceil(img_size[0] / r), math.ceil(img_size[1] / r)) for r in reductions]


def set_agent_grids(stages: Sequence[nn.Module], grids: Sequence[tuple[int, int]]) -> None:
    """Make other maps native to the agent layers of each stage."""
    for stage, grid_size in zip(stages, grids, strict=True):
        for module in stage.modules():
            if isinstance(module, (AgentAttention2d, AgentBranch2d)):
                module.set_grid_size(grid_size)


@register_notrace_function
def resample_positions(table: Tensor, grid_size: Sequence[int], new_size: Sequence[int], prefix: int = 0) -> Tensor:
    """Position embedding `[1, prefix + H * W, C]` for another map, bicubic; itself when the size is right."""
    if all(known(old == new) for old, new in zip(grid_size, new_size, strict=True)):
        return table
    return resample_abs_pos_embed(
        table, new_size=list(new_size), old_size=list(grid_size), num_prefix_tokens=prefix, antialias=False
    )


@register_notrace_function
def add_positions(x: Tensor, table: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Position embedding `[1, H * W, C]`, learnt for maps of `grid_size`, on maps `[B, H, W, C]` of any size."""
    size = x.shape[1:3]
    return x + resample_positions(table, grid_size, size).unflatten(1, size)


def _resize(key: str, value: Tensor, own: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """One published tensor in the shape of ours: linear along axes, bicubic for tables and embeddings."""
    leaf = key.rsplit(".", 1)[-1]
    if value.shape == own.shape:
        return value
    if leaf in AXIS_BIASES:
        axis, _ = AXIS_BIASES[leaf]
        return resize_axis_bias(value, axis, own.shape[axis])
    if leaf == "relative_position_bias_table":
        old, new = (math.isqrt(len(table)) for table in (value, own))
        return resize_bias_table(value.T.unflatten(1, (old, old)), (new, new)).flatten(1).T
    if leaf.startswith("pos_embed"):
        attn = f"block{leaf.removeprefix('pos_embed')}.0.attn" if leaf != "pos_embed" else "blocks.0.attn"
        old, new = ((s[f"{attn}.ah_bias"].shape[3], s[f"{attn}.aw_bias"].shape[4]) for s in (theirs, ours))
        return resample_positions(value, old, new, prefix=value.shape[1] - old[0] * old[1])
    return value


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Published state dict to that of `model`.

    Names are the same. Biases and embeddings of another input size are interpolated as upstream does, the tables
    `an_bias` and `na_bias` serve every size; index and mask buffers are dropped.
    """
    theirs, ours = unwrap(state_dict), model.state_dict()
    out = {key: value for key, value in theirs.items() if key.rsplit(".", 1)[-1] not in BUFFERS}
    out = {k: _resize(k, v, ours[k], ours, theirs) if k in ours else v for k, v in out.items()}
    return fit_stage_norms(out, model)
