"""Mega: gated attention behind a moving average, and CHELA's variant of it (arXiv:2209.10655, arXiv:2406.08128)."""

import math
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import Impl
from ..kernels.ops import long_convolution, scan_attention

Weights = Literal["laplace", "relu2", "softmax", "scan"]


class MovingAverage(nn.Module):
    """Exponential moving averages of each channel of `[B, N, dim]` in both directions (arXiv:2209.10655, section 3.1).

    A channel's filter is a sum of `averages` exponentials; that of the other direction begins at the next token. A
    weighted copy of the input is added, then SiLU. Parameters have the names of the official image models, whose
    `alpha` is the weight of the newest token and whose `delta` damps.

    Args:
        dim: channels.
        averages: exponentials of a channel.
    """

    def __init__(self, dim: int, *, averages: int = 16, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.averages = dim, averages
        self.alpha, self.delta, self.beta = (nn.Parameter(torch.empty(2 * dim, averages, 1, **dd)) for _ in range(3))
        self.gamma = nn.Parameter(torch.empty(2 * dim, averages, **dd))
        self.omega = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set averages of both signs, as the official code does."""
        for parameter, std in ((self.alpha, 0.2), (self.delta, 0.2), (self.gamma, 1.0), (self.omega, 1.0)):
            nn.init.normal_(parameter, std=std)
        with torch.no_grad():
            signs = 1 - 2 * (torch.arange(self.averages, device=self.beta.device) % 2)
            nn.init.normal_(self.beta, std=0.02).add_(signs[:, None])

    def filter(self, tokens: int) -> Tensor:
        """Filters `[2 * tokens, dim]` of both directions; place `tokens` is a token itself."""
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        newest, damping = self.alpha.to(dtype).sigmoid(), self.delta.to(dtype).sigmoid()
        places = torch.arange(tokens, device=newest.device, dtype=dtype)
        powers = (places * torch.log1p(-newest * damping)).exp()  # [2 * dim, averages, tokens]
        weights = newest.squeeze(-1) * self.beta.squeeze(-1) * self.gamma * self.averages**-0.5
        forward, backward = torch.einsum("dnt,dn->td", powers, weights.to(dtype)).chunk(2, dim=1)
        return torch.cat([backward.flip(0), forward])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`."""
        tokens = x.shape[1]
        return F.silu(long_convolution(x, self.filter(tokens), center=tokens, skip=self.omega))


class ShortLongConvolution(nn.Module):
    """A short and a long filter per channel of `[B, N, dim]`, added to one before the convolution, then SiLU.

    CHELA's replacement of the moving average (arXiv:2406.08128). No code is public: that the two filters add up is the
    paper's; the decay with distance that the long one starts with is ours.

    Args:
        dim: channels.
        tokens: the longest sequence; the long filter has a weight for every distance in both directions.
        short: weights of the short filter, odd.
    """

    def __init__(self, dim: int, *, tokens: int, short: int = 5, device=None, dtype=None):
        super().__init__()
        if short % 2 == 0 or short > 2 * tokens - 1:
            raise ValueError(f"short={short} must be odd and at most 2 * tokens - 1 = {2 * tokens - 1}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.tokens = dim, tokens
        self.short = nn.Parameter(torch.empty(short, dim, **dd))
        self.long = nn.Parameter(torch.empty(2 * tokens - 1, dim, **dd))
        self.omega = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.omega)
        nn.init.normal_(self.short, std=len(self.short) ** -0.5)
        distance = (torch.arange(len(self.long), device=self.long.device) - self.tokens + 1).abs()
        with torch.no_grad():
            nn.init.normal_(self.long, std=self.tokens**-0.5).mul_((-4 * distance / self.tokens).exp()[:, None])

    def filter(self) -> Tensor:
        """The one filter `[2 * tokens - 1, dim]`; place `tokens - 1` is a token itself."""
        beside = (len(self.long) - len(self.short)) // 2
        return self.long + F.pad(self.short, (0, 0, beside, beside))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`; raises ValueError for more tokens than the filter knows."""
        if x.shape[1] > self.tokens:
            raise ValueError(f"x has {x.shape[1]} tokens; expected at most tokens={self.tokens}")
        return F.silu(long_convolution(x, self.filter(), center=self.tokens - 1, skip=self.omega))


class MovingAverageGatedAttention(nn.Module):
    """Single-head attention of `[B, N, dim]` behind a moving average and between gates (arXiv:2209.10655, section 3).

    Queries and keys are two scaled copies of one projection of the averaged tokens; the output is gated against the
    input, so the layer has its residual connection in itself. Parameters have the names of the official image models.

    Args:
        dim: channels of the input and the output.
        key_dim: channels of queries and keys.
        value_dim: channels of values.
        tokens: the longest sequence, for a bias per offset of tokens.
        averages: exponentials of a channel of the moving average.
        weights: "laplace", the official image models' function; "relu2"; "softmax"; or "scan": the sum of earlier and
            of later tokens by `foveal.kernels.ops.scan_attention` without a softmax or bias, linear in the tokens, as
            in CHELA.
        short: weights of the short filter of `ShortLongConvolution`, which takes the place of the moving average; None
            for that.
        drop: dropout of the average and of the output.
        impl: "auto", "triton", "torch" or "reference", of "scan".

    Raises:
        ValueError: other weights; `forward` gets another shape or more tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        key_dim: int,
        value_dim: int,
        tokens: int,
        averages: int = 16,
        weights: Weights = "laplace",
        short: int | None = None,
        drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if weights not in get_args(Weights):
            raise ValueError(f"weights={weights!r} must be one of {get_args(Weights)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.key_dim, self.value_dim, self.tokens, self.weights = dim, key_dim, value_dim, tokens, weights
        self.impl: Impl = impl
        self.norm = nn.LayerNorm(dim, **dd)
        average = MovingAverage(dim, averages=averages, **dd)
        self.move = average if short is None else ShortLongConvolution(dim, tokens=tokens, short=short, **dd)
        self.v_proj = nn.Linear(dim, value_dim, **dd)
        self.mx_proj = nn.Linear(dim, key_dim + value_dim + 2 * dim, **dd)
        self.h_proj = nn.Linear(value_dim, dim, **dd)
        self.gamma, self.beta = (nn.Parameter(torch.empty(2, key_dim, **dd)) for _ in range(2))
        self.rel_pos_bias = None if weights == "scan" else nn.Parameter(torch.empty(2 * tokens - 1, **dd))
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales and biases as the official code does; submodules have their own `reset_parameters`."""
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        if self.rel_pos_bias is not None:
            nn.init.normal_(self.rel_pos_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`, the residual connection included."""
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] > self.tokens:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, N, {self.dim}], N at most {self.tokens}")
        normed = self.norm(x)
        value = F.silu(self.v_proj(normed))
        parts = self.mx_proj(self.drop(self.move(normed)))
        update, shared, reset, own = parts.split([self.dim, self.key_dim, self.value_dim, self.dim], dim=-1)
        query, key = (F.silu(shared).unsqueeze(-2) * self.gamma + self.beta).unbind(-2)  # [B, N, key_dim]
        found = self._attend(query, key, value) * F.silu(reset)
        out = self.drop(F.silu(own + self.h_proj(found)))
        return x + update.sigmoid() * (out - x)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = query.shape[1]
        if self.rel_pos_bias is None:
            heads = (t.to(value.dtype).unsqueeze(2) for t in (query, key, value))  # autocast widens two
            return scan_attention(*heads, scale=1 / tokens, direction="both", impl=self.impl).squeeze(2)
        places = torch.arange(tokens, device=query.device)
        bias = self.rel_pos_bias[self.tokens - 1 + places - places[:, None]]
        logits = query @ key.mT
        if self.weights == "softmax":
            return (logits * self.key_dim**-0.5 + bias).softmax(-1) @ value
        logits = logits / tokens + bias
        if self.weights == "relu2":
            return logits.relu().square() @ value
        return 0.5 * (1 + ((logits - 0.707107) / (0.282095 * math.sqrt(2))).erf()) @ value

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one sequence; `shape` is tokens and dim."""
        both = self.key_dim + self.value_dim
        return 4 * shape[0] * self.key_dim * self.value_dim if self.weights == "scan" else shape[0] ** 2 * both

    def extra_repr(self) -> str:
        return f"key_dim={self.key_dim}, value_dim={self.value_dim}, tokens={self.tokens}, weights={self.weights!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise NotImplementedError(f"TorchScript cannot compile {name}; use torch.export or torch.compile")
