"""Multi-head attention with every published change to its projections and heads as an option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .relational import RelationalHeads

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of all tokens, `[B, *spatial, heads, d]` each, key and value with grouped heads at most."""
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).reshape(*query.shape[:-1], v.shape[-1])


class MultiHeadAttention(nn.Module):
    """Attention of tokens `[B, *spatial, dim]` between linear layers, whose options leave plain attention as it is.

    The default is multi-head attention with timm's names, `qkv` and `proj`. Each option has parameters with a neutral
    value, at which a checkpoint of the plain layer gives the same bits; all but `temperature="position"` start there.
    `fold` puts the linear ones into the projections. Projections come first, then in this order head embeddings,
    `knock`, `conv`, `temperature`, `token_mixer`.

    Args:
        dim: channels of the input and the output.
        num_heads: heads.
        head_dim: channels of a head; dim / num_heads when None.
        key_heads: heads of keys and values, a divisor of num_heads (grouped queries); num_heads when None.
        value: "project", or "input" for slices of the input (optimised attention, arXiv:2403.01643, section 3.1).
        key: "project"; "query" for the queries themselves (a symmetric similarity); or "input" for slices of the input,
            which with one head is efficient attention (section 3.2).
        output: whether there is an output projection.
        bias: whether the projections of queries, keys and values have a bias.
        share_projection: one projection for all heads, dim to head_dim.
        head_embedding: "add" (q + e) or "mul" (q * (e + 1)) an embedding per head to queries, keys and values (MHE,
            arXiv:2310.07911).
        knock: a matrix for all heads: "linear" (knocking heads, arXiv:2510.23052), or "mlp", which adds a gated layer
            of two matrices, x + gate * W2 silu(W1 x); its published form is not public, ours starts at gate 0.
        knock_on: letters of "qkv" that it changes.
        token_mixer: number of tokens of a learned matrix over them, applied to the values (super attention,
            arXiv:2403.01643, section 3.3).
        conv: size of depthwise convolutions of queries, keys and values along the spatial axes, odd: one number, or one
            per axis.
        temperature: factor on queries: "position", 1 + exp(-exp(beta)) log(keys) with a learned beta; "token",
            1 + tanh of a linear layer, on values, too (selective self-attention, arXiv:2411.12892).
        head_gate: a factor per head on its output, ones at the start.
        relations, relation_heads, symbols: the last `relation_heads` of the heads are relational with so many relations
            and a module that makes symbols `[B, N, dim]` of tokens; see `RelationalHeads`.
        attend: attention of `[B, *spatial, heads, d]` triples, such as a partial of `scored_attention` or `na2d`.

    Raises:
        ValueError: options that do not fit together; the message names them.
    """

    k: nn.Linear
    v: nn.Linear

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        key_heads: int | None = None,
        value: Literal["project", "input"] = "project",
        key: Literal["project", "query", "input"] = "project",
        output: bool = True,
        bias: bool = True,
        share_projection: bool = False,
        head_embedding: Literal["add", "mul"] | None = None,
        knock: Literal["linear", "mlp"] | None = None,
        knock_on: str = "qkv",
        token_mixer: int | None = None,
        conv: int | Sequence[int] | None = None,
        temperature: Literal["position", "token"] | None = None,
        head_gate: bool = False,
        relations: int = 0,
        relation_heads: int = 0,
        symbols: nn.Module | None = None,
        attend: Attend = dense_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _one_of("value", value, ("project", "input"))
        _one_of("key", key, ("project", "query", "input"))
        _one_of("head_embedding", head_embedding, (None, "add", "mul"))
        _one_of("knock", knock, (None, "linear", "mlp"))
        _one_of("temperature", temperature, (None, "position", "token"))
        if not set(knock_on) <= set("qkv") or not knock_on:
            raise ValueError(f"knock_on={knock_on!r} must hold letters of 'qkv'")
        if (relations > 0) != (relation_heads > 0) or not 0 <= relation_heads < num_heads:
            raise ValueError(
                f"relations={relations} and relation_heads={relation_heads} must both be 0 or both positive, with "
                f"fewer relation_heads than num_heads={num_heads}"
            )
        head_dim = head_dim or dim // num_heads
        self.dim, self.head_dim, self.relation_heads = dim, head_dim, relation_heads
        self.num_heads = num_heads - relation_heads
        self.key_heads = key_heads or self.num_heads
        if self.num_heads % self.key_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of key_heads={self.key_heads}")
        if "input" in (key, value) and self.key_heads * head_dim != dim:
            raise ValueError(f"key={key!r} or value={value!r} needs heads of {head_dim} channels that fill dim={dim}")
        if key == "query" and self.key_heads != self.num_heads:
            raise ValueError(f"key='query' needs key_heads={self.key_heads} to equal num_heads={self.num_heads}")
        self.key, self.value, self.attend = key, value, attend
        self.share_projection, self.embedding, self.knock, self.knock_on = (
            share_projection,
            head_embedding,
            knock,
            knock_on,
        )
        self.bias, self.temperature = bias, temperature
        self.sizes = None if conv is None else ((conv,) if isinstance(conv, int) else tuple(conv))
        if self.sizes is not None and any(n % 2 == 0 or n < 1 for n in self.sizes):
            raise ValueError(f"conv={conv} must be odd: convolutions keep the number of tokens")
        self._make_projections(dd)
        self._make_options(token_mixer, head_gate, dd)
        if output:
            self.proj = nn.Linear(self.num_heads * head_dim, dim - relation_heads * head_dim, **dd)
        if relation_heads:
            self.relational = RelationalHeads(
                dim, num_heads=relation_heads, head_dim=head_dim, relations=relations, symbols=symbols, **dd
            )
        self.has_output = output

    def _make_projections(self, dd: dict[str, Any]) -> None:
        """One `qkv` where all are projected alike, else `q`, and `k` and `v` where they are projected."""
        one = self.share_projection
        self.query_width = self.head_dim * (1 if one else self.num_heads)
        self.key_width = self.head_dim * (1 if one else self.key_heads)
        self.fused = self.key == self.value == "project" and self.query_width == self.key_width
        if self.fused:
            self.qkv = nn.Linear(self.dim, 3 * self.query_width, bias=self.bias, **dd)
            return
        self.q = nn.Linear(self.dim, self.query_width, bias=self.bias, **dd)
        for name, how in (("k", self.key), ("v", self.value)):
            if how == "project":
                setattr(self, name, nn.Linear(self.dim, self.key_width, bias=self.bias, **dd))

    def _make_options(self, token_mixer: int | None, head_gate: bool, dd: dict[str, Any]) -> None:
        """Parameters of the options, at their neutral values."""
        heads = {"q": self.num_heads, "k": self.key_heads, "v": self.key_heads}
        if self.embedding is not None:
            for x, n in heads.items():
                self.register_parameter(f"{x}_embedding", nn.Parameter(torch.zeros(n, self.head_dim, **dd)))
        for x in self.knock_on if self.knock is not None else "":
            if self.knock == "linear":
                self.register_parameter(f"{x}_knock", nn.Parameter(torch.eye(self.head_dim, **dd)))
            else:
                setattr(self, f"{x}_knock", GatedMlp(self.head_dim, **dd))
        if self.sizes is not None:
            for x, n in heads.items():
                kernel = torch.zeros(n * self.head_dim, 1, *self.sizes, **dd)
                kernel[(slice(None), slice(None), *(size // 2 for size in self.sizes))] = 1
                self.register_parameter(f"{x}_conv", nn.Parameter(kernel))
        if self.temperature == "position":
            self.beta = nn.Parameter(torch.full((), 1.5, **dd))
        elif self.temperature == "token":
            self.tau = nn.Linear(self.dim, self.num_heads + self.key_heads, **dd)
            nn.init.zeros_(self.tau.weight)
            nn.init.zeros_(self.tau.bias)
        self.mixer = None if token_mixer is None else nn.Parameter(torch.eye(token_mixer, **dd))
        self.gate = nn.Parameter(torch.ones(self.num_heads, **dd)) if head_gate else None

    # the steps of forward

    def project(self, x: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values `[B, *spatial, heads, head_dim]` by letter."""
        if self.fused:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q = self.q(x)
            k = q if self.key == "query" else x if self.key == "input" else self.k(x)
            v = x if self.value == "input" else self.v(x)
        found = {}
        for name, y, heads in (("q", q, self.num_heads), ("k", k, self.key_heads), ("v", v, self.key_heads)):
            y = y.unflatten(-1, (-1, self.head_dim))
            found[name] = y.expand(*y.shape[:-2], heads, self.head_dim)
        return found

    def _embed(self, name: str, x: Tensor) -> Tensor:
        e = getattr(self, f"{name}_embedding")
        return x + e if self.embedding == "add" else x * (e + 1)

    def _knock(self, name: str, x: Tensor) -> Tensor:
        matrix = getattr(self, f"{name}_knock")
        return x @ matrix if self.knock == "linear" else matrix(x)

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        kernel, rank = getattr(self, f"{name}_conv"), x.dim() - 3
        if kernel.dim() - 2 != rank:
            raise ValueError(f"conv={self.sizes} needs {kernel.dim() - 2} spatial axes, x has {rank}")
        maps = x.flatten(-2).movedim(-1, 1)
        padding = [n // 2 for n in kernel.shape[2:]]
        made = CONVOLUTIONS[rank - 1](maps, kernel, padding=padding, groups=maps.shape[1])
        return made.movedim(1, -1).unflatten(-1, x.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]`, one to three spatial axes, to the same shape.

        Raises:
            ValueError: another shape, or with `token_mixer` another number of tokens.
        """
        if not 3 <= x.dim() <= 5 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, 1 to 3 spatial axes, {self.dim}]")
        parts = self.project(x)
        for name, y in parts.items():
            y = self._embed(name, y) if self.embedding is not None else y
            y = self._knock(name, y) if self.knock is not None and name in self.knock_on else y
            parts[name] = self._convolve(name, y) if self.sizes is not None else y
        if self.temperature == "position":
            parts["q"] = parts["q"] * self.position_temperature(prod(x.shape[1:-1]))
        elif self.temperature == "token":
            tau = 1 + self.tau(x).tanh()[..., None]
            of_query, of_value = tau.split([self.num_heads, self.key_heads], dim=-2)
            parts["q"], parts["v"] = parts["q"] * of_query, parts["v"] * of_value
        if self.mixer is not None:
            tokens = parts["v"].flatten(1, -3)
            if tokens.shape[1] != self.mixer.shape[0]:
                raise ValueError(f"x has {tokens.shape[1]} tokens; token_mixer is for {self.mixer.shape[0]}")
            parts["v"] = torch.einsum("ij,bjhd->bihd", self.mixer, tokens).reshape(parts["v"].shape)
        out = self.attend(parts["q"], parts["k"], parts["v"])
        out = out if self.gate is None else out * self.gate[:, None]
        out = out.flatten(-2)
        out = self.proj(out) if self.has_output else out
        return torch.cat([out, self.relational(x)], dim=-1) if self.relation_heads else out

    def position_temperature(self, keys: int) -> Tensor:
        """Factor on the queries that see so many keys."""
        return 1 + (-self.beta.exp()).exp() * log(keys)

    # folding

    @torch.no_grad()
    def fold(self, *, tokens: int | None = None) -> MultiHeadAttention:
        """Put head embeddings, linear `knock`, head gates and a temperature by position into the projections.

        The layer computes the same with fewer parameters; a shared projection becomes one per head.

        Args:
            tokens: number of tokens for which a temperature by position is folded; it stays when None.

        Returns:
            the layer itself.

        Raises:
            ValueError: keys or values without a projection to fold into.
        """
        changed = self.embedding is not None or self.knock == "linear" or self.gate is not None
        if not changed and (self.temperature != "position" or tokens is None):
            return self
        if self.key != "project" or self.value != "project":
            raise ValueError(
                f"key={self.key!r}, value={self.value!r}: only projected keys and values can be folded into"
            )
        layers = self._full_projections()
        for name, (weight, bias) in layers.items():
            if self.embedding == "add":
                bias = bias + getattr(self, f"{name}_embedding")
            elif self.embedding == "mul":
                factor = getattr(self, f"{name}_embedding") + 1
                weight, bias = weight * factor[..., None], bias * factor
            if self.knock == "linear" and name in self.knock_on:
                matrix = getattr(self, f"{name}_knock")
                weight, bias = matrix.T @ weight, bias @ matrix
            layers[name] = weight, bias
        if self.temperature == "position" and tokens is not None:
            tau = self.position_temperature(tokens)
            layers["q"] = layers["q"][0] * tau, layers["q"][1] * tau
            self.temperature = None
            del self.beta
        if self.gate is not None and self.has_output:
            self.proj.weight.mul_(self.gate.repeat_interleave(self.head_dim))
            self.gate = None
        self._set_projections(layers)
        return self

    def _full_projections(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weights `[heads, head_dim, dim]` and biases `[heads, head_dim]` by letter, a shared one repeated."""
        if self.fused:
            weights = self.qkv.weight.chunk(3)
            biases = [None] * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        else:
            weights, biases = zip(*((x.weight, x.bias) for x in (self.q, self.k, self.v)), strict=True)
        found = {}
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            heads = self.num_heads if name == "q" else self.key_heads
            weight = weight.detach().unflatten(0, (-1, self.head_dim)).expand(heads, -1, -1).clone()
            bias = (
                weight.new_zeros(1, self.head_dim) if bias is None else bias.detach().unflatten(0, (-1, self.head_dim))
            )
            found[name] = weight, bias.expand(heads, -1).clone()
        return found

    def _set_projections(self, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Replace the projections, and drop what they hold now."""
        for name in "qkv":
            for option in ("embedding",) + (("knock",) if self.knock == "linear" else ()):
                if hasattr(self, f"{name}_{option}"):
                    delattr(self, f"{name}_{option}")
        self.embedding, self.knock = None, None if self.knock == "linear" else self.knock
        self.bias = self.bias or any(bool(bias.any()) for _, bias in layers.values())
        for name in ("qkv", "q", "k", "v"):
            if hasattr(self, name):
                delattr(self, name)
        self.share_projection = False
        weight = layers["q"][0]
        self._make_projections({"device": weight.device, "dtype": weight.dtype})
        flat = {name: (weight.flatten(0, 1), bias.flatten()) for name, (weight, bias) in layers.items()}
        if self.fused:
            flat = {"qkv": tuple(torch.cat([flat[x][i] for x in "qkv"]) for i in range(2))}
        for name, (weight, bias) in flat.items():
            layer = getattr(self, name)
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(bias)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class GatedMlp(nn.Module):
    """x + gate * W2 silu(W1 x), on the channels of a head, zero gates at the start."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1, self.fc2 = nn.Linear(dim, dim, bias=False, **dd), nn.Linear(dim, dim, bias=False, **dd)
        self.gate = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.fc2(F.silu(self.fc1(x)))


def _one_of(name: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} must be one of {accepted}")
