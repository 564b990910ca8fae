"""Layers around `scan_attention`: Lightning attention, DeltaNet and EFLA, and attention over recurrent chunks (RAT)."""

from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import Impl
from ..kernels.ops import scan_attention, scan_order

Rule = Literal["add", "delta", "exact"]
Decay = Literal["none", "slopes", "gate"]


def alibi_slopes(num_heads: int, *, layer: int = 0, layers: int = 1) -> Tensor:
    """Log decays `[num_heads]` of Lightning attention, negative ALiBi slopes (TransNormer, arXiv:2401.04658).

    Head h of layer l decays by exp(-2 ** (-8 (h + 1) / num_heads) * (1 - l / (layers - 1) + 1e-5)) a token: later
    layers look farther. Other codes use other slopes; pass a tensor of your own to `scan_attention` for these.

    Raises:
        ValueError: a layer outside of 0 to layers - 1.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer} must lie in 0 to layers - 1 = {layers - 1}")
    share = 1 - layer / (layers - 1) + 1e-5 if layers > 1 else 1.0
    return -(2.0 ** (-8 * torch.arange(1, num_heads + 1) / num_heads)) * share


def exact_step(key: Tensor, beta: Tensor) -> Tensor:
    """The beta with which the delta rule solves its own differential equation (EFLA, arXiv:2512.12602).

    (1 - exp(-beta |k|^2)) / |k|^2: what is written over a time beta while the state moves to k's value continuously.
    Stable for keys of any length; nearly beta for short ones.

    Args:
        key: `[..., d]`, not normalised.
        beta: `[...]`, at least 0.
    """
    length = key.to(torch.promote_types(key.dtype, torch.float32)).square().sum(-1).clamp(min=1e-12)
    return -torch.expm1(-beta * length) / length


class ScanAttention(nn.Module):
    """Attention of `[B, *spatial, dim]` by a recurrence over its tokens; see `foveal.kernels.ops.scan_attention`.

    Lightning attention (arXiv:2401.04658) is `decay="slopes"`, SiLU'd queries, keys and values, a norm of the output
    and a sigmoid gate of low rank; DeltaNet (arXiv:2406.06484) is `rule="delta"`, EFLA (arXiv:2512.12602)
    `rule="exact"`. The width of the gate is ours: the papers give none for images.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        rule: "add" writes values, "delta" their differences from what is stored, with unit keys, "exact" the same in
            continuous time, with keys of any length.
        decay: "none"; "slopes", a fixed one per head; "gate", one per token and head.
        direction: "forward", "backward" or "both".
        order: order of the tokens of a grid, as `foveal.kernels.ops.scan_order` takes it.
        layer, layers: of `decay="slopes"`, see `alibi_slopes`.
        gate_dim: width of the output gate; 0 for none.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: an argument outside what is accepted; `forward` gets another shape.
    """

    slopes: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        rule: Rule = "add",
        decay: Decay = "slopes",
        direction: str = "both",
        order: str = "rows",
        layer: int = 0,
        layers: int = 1,
        gate_dim: int = 16,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if rule not in get_args(Rule) or decay not in get_args(Decay):
            raise ValueError(f"rule={rule!r}, decay={decay!r} must be one of {get_args(Rule)} and {get_args(Decay)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.rule, self.decay = dim, num_heads, rule, decay
        self.direction, self.order = direction, order
        self.impl: Impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.beta = None if rule == "add" else nn.Linear(dim, num_heads, **dd)
        self.forget = nn.Linear(dim, num_heads, **dd) if decay == "gate" else None
        slopes = alibi_slopes(num_heads, layer=layer, layers=layers).to(device) if decay == "slopes" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.norm = nn.LayerNorm(dim, **dd)
        self.gate = None
        if gate_dim:
            down, up = nn.Linear(dim, gate_dim, bias=False, **dd), nn.Linear(gate_dim, dim, bias=False, **dd)
            self.gate = nn.Sequential(down, up)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]` to `[B, *spatial, dim]`."""
        if x.dim() < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, *spatial, {self.dim}]")
        tokens, inverse = x.flatten(1, -2), None
        if self.order != "rows":
            order, inverse = (t.to(x.device) for t in scan_order(x.shape[1:-1], self.order))
            tokens = tokens[:, order]
        query, key, value = F.silu(self.qkv(tokens)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        beta = None if self.beta is None else self.beta(tokens).sigmoid()
        if self.rule == "delta":
            key = F.normalize(key, dim=-1)
        elif beta is not None:
            beta = exact_step(key, beta).to(beta.dtype)
        decay = self.slopes if self.forget is None else F.logsigmoid(self.forget(tokens))
        options: dict[str, Any] = {"direction": self.direction, "scale": query.shape[-1] ** -0.5, "impl": self.impl}
        out = scan_attention(query, key, value, log_decay=decay, beta=beta, **options).flatten(2)
        out = self.norm(out if inverse is None else out[:, inverse]).view(x.shape)
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the recurrence for one map of this size."""
        a_pass = (3 if self.rule != "add" else 2) * shape[0] * shape[1] * self.dim * (self.dim // self.num_heads)
        return 2 * a_pass if self.direction == "both" else a_pass

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rule={self.rule!r}, decay={self.decay!r}, direction={self.direction!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile ScanAttention; use torch.export or torch.compile")


def gated_states(x: Tensor, gate: Tensor, chunk: int) -> Tensor:
    """States of s_t = gate_t * s_(t-1) + (1 - gate_t) * x_t, which begin at zero in every chunk of `chunk` tokens.

    Args:
        x, gate: `[B, N, ...]`, N a multiple of `chunk`.
    """
    x, gate = x.unflatten(1, (-1, chunk)), gate.unflatten(1, (-1, chunk))
    new, state, states = (1 - gate) * x, torch.zeros_like(x[:, :, 0]), []
    for t in range(chunk):
        state = gate[:, :, t] * state + new[:, :, t]
        states.append(state)
    return torch.stack(states, 2).flatten(1, 2)


class RecurrentChunkAttention(nn.Module):
    """Causal attention to the ends of chunks, each summed up by a gated recurrence: RAT (arXiv:2507.04416).

    Keys and values of a chunk are running means with a gate per channel. A token attends to the last of those of all
    earlier chunks and to the running one of its own: N * N / chunk logits. With chunks of one token and closed gates
    it is causal softmax attention. The residual connection and the norm before it are part of the layer, as in the
    official code, whose parameter names it has.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        groups: sets of queries and keys that heads share; a divisor of num_heads.
        chunk: tokens of a chunk.

    Raises:
        ValueError: an argument outside what is accepted; `forward` gets another shape.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        groups: int = 1,
        chunk: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads or num_heads % groups:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}, and that one of groups={groups}")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.groups, self.chunk = dim, num_heads, groups, chunk
        self.input_norm = nn.RMSNorm(dim, eps=1e-6, **dd)
        self.in_proj = nn.Linear(dim, 3 * dim + 2 * groups * (dim // num_heads), bias=False, **dd)
        self.gate_bias = nn.Parameter(torch.empty(dim, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gates to memories of one token to a chunk: logarithms of numbers from 1 to chunk - 1."""
        with torch.no_grad():
            self.gate_bias.uniform_(1, max(1.0, self.chunk - 1)).log_()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`, the residual connection included."""
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] % self.chunk:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected [B, N, {self.dim}], N a multiple of chunk={self.chunk}"
            )
        shared = self.groups * (self.dim // self.num_heads)
        parts = self.in_proj(self.input_norm(x)).split([self.dim] * 3 + [shared] * 2, dim=-1)
        outer, value, gate = (t.unflatten(-1, (self.num_heads, -1)) for t in parts[:3])  # [B, N, heads, d]
        query, key = (
            t.unflatten(-1, (self.groups, -1)).repeat_interleave(self.num_heads // self.groups, 2) for t in parts[3:]
        )
        gate = (gate + self.gate_bias.view(self.num_heads, -1)).sigmoid()
        out = recurrent_chunk_attention(query, key, value, gate, chunk=self.chunk)
        return x + self.out_proj((outer.sigmoid() * out).flatten(2))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one sequence; `shape` is tokens and dim."""
        return 2 * shape[0] * (shape[0] // self.chunk + 1) * self.dim

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, groups={self.groups}, chunk={self.chunk}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile this layer; use torch.export or torch.compile")


def recurrent_chunk_attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, *, chunk: int) -> Tensor:
    """The attention of `RecurrentChunkAttention`, `[B, N, heads, d]` of all; gates lie in (0, 1)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    gate = gate.to(dtype)
    keys, values = (gated_states(x.to(dtype), gate, chunk) for x in (key, value))
    q = query.to(dtype) * query.shape[-1] ** -0.5
    ends = [x.unflatten(1, (-1, chunk))[:, :, -1] for x in (keys, values)]  # [B, chunks, heads, d]
    logits = torch.einsum("bnhd,bchd->bnhc", q, ends[0])
    place = torch.arange(q.shape[1], device=q.device) // chunk
    earlier = place[:, None] > torch.arange(ends[0].shape[1], device=q.device)
    logits = logits.masked_fill(~earlier[:, None], float("-inf"))
    own = (q * keys).sum(-1, keepdim=True)
    weights = torch.cat([logits, own], -1).softmax(-1)
    out = torch.einsum("bnhc,bchd->bnhd", weights[..., :-1], ends[1]) + weights[..., -1:] * values
    return out.to(query.dtype)
