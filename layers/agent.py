"""Agent attention as a layer: agents pooled from queries, biases of positions, a depthwise convolution of values."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import Impl
from ..kernels.common.symbolic import exporting, known
from ..kernels.ops import agent_attention

AXIS_BIASES = {"ah_bias": (3, 0), "aw_bias": (4, 1), "ha_bias": (2, 0), "wa_bias": (3, 1)}  # its axis, the grid's axis


def is_plain(x: Tensor) -> bool:
    """Return whether a tensor is a plain `Tensor` or `Parameter`, not a subclass of them."""
    return type(x) in (Tensor, nn.Parameter)


def resize_axis_bias(bias: Tensor, axis: int, length: int) -> Tensor:
    """A bias whose `axis` gets another length, interpolated linearly; itself when the length is right."""
    if known(bias.shape[axis] == length):
        return bias
    lines = bias.movedim(axis, -1)
    resized = F.interpolate(lines.flatten(0, -2)[None].float(), size=length, mode="linear", align_corners=False)
    return resized[0].unflatten(0, lines.shape[:-1]).movedim(-1, axis).to(bias.dtype)


def pool_to_square(x: Tensor, side: int) -> Tensor:
    """Mean of each of side × side regions of maps `[B, C, H, W]`, as `adaptive_avg_pool2d` cuts them.

    An exported graph gets two products instead of the pooling: ONNX's translation of the latter keeps the extents of
    regions that it was traced with, and is wrong for other sizes without a word.
    """
    if not exporting():
        return F.adaptive_avg_pool2d(x, side)

    def averages(length: int) -> Tensor:  # [side, length]
        region, i = torch.arange(side, device=x.device)[:, None], torch.arange(length, device=x.device)
        inside = (i >= region * length // side) & (i < ((region + 1) * length + side - 1) // side)
        return inside.to(x.dtype) / inside.sum(1, keepdim=True)

    return averages(x.shape[-2]) @ x @ averages(x.shape[-1]).mT


class _AgentAttention(nn.Module):
    """Agent attention between the projections; see `AgentAttention2d`.

    Biases depend on weights only. In evaluation, where no gradient is asked for, they are combined once and kept; the
    next call combines them anew if a table was replaced or written to, and `train`, `eval`, `to` and their like forget
    them; a write to `table.data` goes unseen, so call one of these after it. They are never part of a state dict, a
    copy or a pickle, nor of a traced or compiled graph.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_agents: int,
        grid_size: Sequence[int],
        class_token: bool = False,
        table_size: int = 7,
        conv_name: str = "dwc",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.agent_side = math.isqrt(num_agents)
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if num_agents < 1 or self.agent_side**2 != num_agents:
            raise ValueError(f"num_agents={num_agents} must be a square: agents are pooled on a grid of equal sides")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.num_agents = dim, num_heads, num_agents
        self.grid_size, self.class_token = (grid_size[0], grid_size[1]), class_token
        self.conv_name = conv_name
        self.impl: Impl = impl
        (rows, columns), side = self.grid_size, table_size
        self.an_bias = nn.Parameter(torch.empty(num_heads, num_agents, side, side, **dd))
        self.na_bias = nn.Parameter(torch.empty(num_heads, num_agents, side, side, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, rows, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, columns, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, num_heads, rows, 1, num_agents, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, num_heads, 1, columns, num_agents, **dd))
        self.ac_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, **dd)) if class_token else None
        self.ca_bias = nn.Parameter(torch.empty(1, num_heads, 1, num_agents, **dd)) if class_token else None
        self.add_module(conv_name, nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd))
        self._kept: tuple | None = None
        self.reset_parameters()

    def _tables(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters(recurse=False) if name.endswith("_bias")]

    def reset_parameters(self) -> None:
        """Draw the biases anew; submodules have their own `reset_parameters`."""
        for table in self._tables():
            nn.init.trunc_normal_(table, std=0.02)

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Make another map the native one: biases along the axes are interpolated linearly, as upstream does."""
        self.grid_size = (grid_size[0], grid_size[1])
        for name, (axis, side) in AXIS_BIASES.items():
            table = getattr(self, name)
            resized = resize_axis_bias(table.detach(), axis, self.grid_size[side])
            setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))

    def _combine(self, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`[heads, agents, tokens]` and `[heads, tokens, agents]`."""
        ah, aw, ha, wa = (
            resize_axis_bias(getattr(self, name), axis, grid_size[side])[0]
            for name, (axis, side) in AXIS_BIASES.items()
        )
        size = {"size": grid_size, "mode": "bilinear", "align_corners": False}
        to_agents = (F.interpolate(self.an_bias, **size) + (ah + aw)).flatten(2)
        to_queries = F.interpolate(self.na_bias, **size).flatten(2).transpose(1, 2) + (ha + wa).flatten(1, 2)
        if self.ac_bias is not None and self.ca_bias is not None:
            to_agents = torch.cat([self.ac_bias[0], to_agents], dim=2)
            to_queries = torch.cat([self.ca_bias[0], to_queries], dim=1)
        return to_agents, to_queries

    def biases(self, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Biases of the two passes on a map of this size.

        Args:
            grid_size: rows and columns; where they differ from the layer's own, the axis biases are interpolated.

        Returns:
            `[heads, agents, tokens]` for agents that look at keys, `[heads, tokens, agents]` for queries that look at
            agents; tokens in C order, after the class token if there is one.
        """
        tables = self._tables()
        if not self._may_keep(tables):
            return self._combine(grid_size)
        # Identities hold because what is kept also holds the tables; tensors of inference mode must not leave it.
        state = [(id(table), table._version, table.data_ptr(), table.dtype, table.device) for table in tables]
        state = (grid_size, torch.is_inference_mode_enabled(), state)
        if self._kept is None or self._kept[0] != state:
            combined = self._combine(grid_size)
            if any(type(bias) is not Tensor for bias in combined):  # under a mode that makes fake tensors
                return combined
            self._kept = (state, tables, combined)
        return self._kept[2]

    def _may_keep(self, tables: list[nn.Parameter]) -> bool:
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
            return False
        return all(type(table) is nn.Parameter and not table.is_inference() for table in tables)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]`, class token first, to `[B, N, dim]`."""
        first = int(self.class_token)

        def as_map(x: Tensor) -> Tensor:  # [B, dim, H, W]
            return x[:, first:].flatten(2).unflatten(1, grid_size).permute(0, 3, 1, 2)

        agent = pool_to_square(as_map(query), self.agent_side).flatten(2).transpose(1, 2)
        agent_bias, query_bias = self.biases(grid_size)
        out = agent_attention(
            query,
            key,
            value,
            agent.unflatten(2, query.shape[-2:]).to(query.dtype),
            agent_bias=agent_bias,
            query_bias=query_bias,
            impl=self.impl,
        )
        local = self.get_submodule(self.conv_name)(as_map(value)).flatten(2).transpose(1, 2)
        return out.flatten(2) + F.pad(local, (0, 0, first, 0))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the two passes for one image; `shape` is H and W, or tokens and dim."""
        tokens = shape[0] if self.class_token else shape[0] * shape[1]
        return 4 * self.num_agents * tokens * self.dim

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._kept = None
        # Memory formats of images take tensors of four axes. The axis biases have five in the official checkpoints, of
        # which the first is 1; tensors of other classes, such as shards, stay whole.
        return super()._apply(lambda t: fn(t[0])[None] if t.dim() == 5 and is_plain(t) else fn(t), recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_agents={self.num_agents}, grid_size={self.grid_size}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"TorchScript cannot compile {type(self).__name__}; use torch.export or torch.compile"
        )


class AgentAttention2d(_AgentAttention):
    """Agent attention on maps `[B, H, W, dim]`, or on their tokens after a class token (arXiv:2312.08874).

    A few agents, queries pooled to a square, gather from all tokens; every token then gathers from the agents. A
    depthwise 3x3 convolution of the values is added. The cost is linear in the number of tokens.

    Parameters carry the names of the official checkpoints: `qkv` (rows: query, key, value; each head by head) or `q`
    and `kv`, `proj`, `dwc`, the tables `an_bias`, `na_bias` and the axis biases `ah_bias`, `aw_bias`, `ha_bias`,
    `wa_bias`; with a class token `ac_bias` (as a key) and `ca_bias` (as a query). Maps of other sizes than `grid_size`
    go through, with axis biases interpolated on the way.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        num_agents: agents, a square number.
        grid_size: rows and columns of the map whose axis biases are learnt.
        class_token: tokens `[B, 1 + H * W, dim]` come instead of a map. The first is neither pooled nor convolved.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        separate_query: project queries by `q`, keys and values by `kv`, as PVT names them.
        proj_drop: dropout after the output projection.
        table_size: side of the tables that are interpolated bilinearly to every map.
        conv_name: name of the depthwise convolution.
        impl: "auto", "triton", "torch" or "reference"; see `foveal.kernels.ops.agent_attention`.

    Raises:
        ValueError: num_heads does not divide dim, or num_agents is no square.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_agents: int,
        grid_size: Sequence[int],
        class_token: bool = False,
        qkv_bias: bool = True,
        separate_query: bool = False,
        proj_drop: float = 0.0,
        table_size: int = 7,
        conv_name: str = "dwc",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            num_heads=num_heads,
            num_agents=num_agents,
            grid_size=grid_size,
            class_token=class_token,
            table_size=table_size,
            conv_name=conv_name,
            impl=impl,
            **dd,
        )
        self.separate_query = separate_query
        if separate_query:
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Attend through agents.

        Args:
            x: `[B, H, W, dim]`, or `[B, 1 + H * W, dim]` with a class token.
            grid_size: H and W of such tokens; those of the layer when None.

        Returns:
            the shape of x.

        Raises:
            ValueError: a shape that does not fit.
        """
        if x.dim() != 4 - self.class_token or x.shape[-1] != self.dim:
            expected = f"[B, 1 + H * W, {self.dim}]" if self.class_token else f"[B, H, W, {self.dim}]"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
        if not self.class_token:
            grid_size = (x.shape[1], x.shape[2])
        grid_size = self.grid_size if grid_size is None else grid_size
        tokens = x if self.class_token else x.flatten(1, 2)
        if tokens.shape[1] != grid_size[0] * grid_size[1] + self.class_token:
            raise ValueError(f"x has {tokens.shape[1]} tokens; expected a class token and grid_size={grid_size}")
        if self.separate_query:
            query = self.q(tokens).unflatten(-1, (self.num_heads, -1))
            key, value = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        else:
            query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, heads, d]
        return self.proj_drop(self.proj(self._attend(query, key, value, grid_size))).view(x.shape)


class AgentBranch2d(_AgentAttention):
    """Agent attention without projections, for blocks that have their own; arguments as in `AgentAttention2d`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor | None = None) -> Tensor:
        """Maps `[B, H, W, heads, d]` to `[B, H, W, heads * d]`; `x`, the input of such a block, has no part in it."""
        grid_size = (query.shape[1], query.shape[2])
        out = self._attend(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2), grid_size)
        return out.view(*query.shape[:3], self.dim)
