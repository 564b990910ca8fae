"""Agent Attention: DeiT, PVT, Swin and CSWin whose queries meet the keys through a few agents (arXiv:2312.08874).

Parameters are named as in the official checkpoints, which load unchanged, at any input size.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...layers.agent import AXIS_BIASES, AgentAttention2d, AgentBranch2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, Target, axes, positions, window_table
from ..hosts import PVT, CSWin, DeiT, Place, Swin


def agent(
    place: Place,
    *,
    layer: Callable[..., nn.Module],
    num_agents: int | Sequence[int | None],
    agent_blocks: int | Sequence[int] | None = None,
) -> nn.Module | None:
    """Agent attention over the whole map in the leading blocks of a stage; the others keep the host's own.

    Args:
        place: the block.
        layer: the layer that the host calls.
        num_agents: agents, square numbers; None for a stage without.
        agent_blocks: leading blocks with agents; all when None.
    """
    agents = place.pick(num_agents)
    if agents is None or not place.is_leading("agent_blocks", agent_blocks):
        return None
    return layer(place.dim, num_heads=place.num_heads, num_agents=agents, grid_size=place.grid, **place.options)


def axis_grid(target: Target) -> tuple[int, int]:
    """Rows and columns of the map that a file's position embedding is for, from its biases along the axes."""
    number = target.key.removeprefix("pos_embed")
    attn = f"block{number}.0.attn" if number else "blocks.0.attn"
    return target.file[f"{attn}.ah_bias"].shape[-2], target.file[f"{attn}.aw_bias"].shape[-1]


DEIT = partial(DeiT, attn=agent, layer=partial(AgentAttention2d, class_token=True), num_agents=49)
AGENTS = (9, 16, 49, 49)
PVT_ = partial(PVT, attn=agent, layer=partial(AgentAttention2d, separate_query=True), num_agents=AGENTS)
SWIN = partial(Swin, attn=agent, layer=AgentAttention2d, num_agents=AGENTS)
CSWIN = partial(CSWin, attn=agent, layer=partial(AgentBranch2d, conv_name="get_v"), num_agents=(9, 16, None, None))

BASE_SWIN = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
BASE_CSWIN = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
PICO = {"embed_dim": 28, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "window": 4, "mlp_ratio": 2.0}
TEST = {"embed_dim": 16, "mlp_ratio": 2.0}
MODELS = {
    "agent_deit_t": Model("Agent-DeiT-Tiny, trained without drop path.", DEIT, {"embed_dim": 192, "num_heads": 3}),
    "agent_deit_s": Model("Agent-DeiT-Small, trained with drop path 0.1.", DEIT, {"embed_dim": 384, "num_heads": 6}),
    "agent_deit_b": Model(
        "Agent-DeiT-Base, trained with drop path 0.3; agents in the first four blocks only.",
        DEIT,
        {"embed_dim": 768, "num_heads": 12, "num_agents": 81, "agent_blocks": 4},
    ),
    "agent_pvt_t": Model("Agent-PVT-Tiny, trained with drop path 0.1.", PVT_, {"depths": (2, 2, 2, 2)}),
    "agent_pvt_s": Model("Agent-PVT-Small, trained with drop path 0.1.", PVT_, {"depths": (3, 4, 6, 3)}),
    "agent_pvt_m": Model("Agent-PVT-Medium, trained with drop path 0.3.", PVT_, {"depths": (3, 4, 18, 3)}),
    "agent_pvt_l": Model("Agent-PVT-Large, trained with drop path 0.3.", PVT_, {"depths": (3, 8, 27, 3)}),
    "agent_swin_t": Model(
        "Agent-Swin-Tiny, trained with drop path 0.2.", SWIN, {"depths": (2, 2, 6, 2), "agent_blocks": (2, 2, 6, 0)}
    ),
    "agent_swin_s": Model(
        "Agent-Swin-Small, trained with drop path 0.3.", SWIN, {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
    ),
    "agent_swin_b": Model(
        "Agent-Swin-Base, trained with drop path 0.5.", SWIN, {**BASE_SWIN, "agent_blocks": (2, 2, 2, 0)}
    ),
    "agent_swin_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).",
        SWIN,
        {**PICO, "num_agents": (9, 4, 4), "agent_blocks": (2, 1, 0)},
    ),
    "agent_cswin_t": Model("Agent-CSWin-Tiny, trained with drop path 0.2.", CSWIN, {"depths": (2, 4, 18, 1)}),
    "agent_cswin_s": Model("Agent-CSWin-Small, trained with drop path 0.4.", CSWIN, {"depths": (3, 6, 29, 2)}),
    "agent_cswin_b": Model("Agent-CSWin-Base, trained with drop path 0.5, at 384 pixels 0.7.", CSWIN, BASE_CSWIN),
    "test_agent_deit": Model(
        "Agent-DeiT for tests.", DEIT, {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_agents": 9, "agent_blocks": 2}
    ),
    "test_agent_pvt": Model(
        "Agent-PVT for tests.",
        PVT_,
        {"embed_dims": (16, 24), "depths": (2, 1), "num_heads": (1, 2), "mlp_ratios": (2, 3), "num_agents": (9, 16)},
    ),
    "test_agent_swin": Model(
        "Agent-Swin for tests.",
        SWIN,
        {**TEST, "depths": (1, 2), "num_heads": (1, 2), "num_agents": (9, 4), "agent_blocks": (1, 0), "window": 3},
    ),
    "test_agent_cswin": Model(
        "Agent-CSWin for tests.",
        CSWIN,
        {**TEST, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "num_agents": (9, None, None)},
    ),
}
CONVERSION = Conversion(
    drop=(r"\.relative_position_index$", r"\.attn_mask$"),
    resize={
        **dict.fromkeys(AXIS_BIASES, axes),
        "relative_position_bias_table": window_table,
        **{f"pos_embed{i}": partial(positions, file_grid=axis_grid) for i in ("", 1, 2, 3, 4)},
    },
)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "crop_mode": "squash", "paper_ids": "arXiv:2312.08874"},
    cfgs={
        "agent_swin_s.leap_in1k_288": {"crop_pct": 1.0},
        "agent_swin_b.leap_in1k_384": {"crop_pct": 1.0},
        "agent_swin_pico.untrained": DIGITS_CFG,
    },
    leaves=(AgentAttention2d, AgentBranch2d),
)
