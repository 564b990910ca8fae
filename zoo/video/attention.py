"""Attention as a module: projections, norms of queries and keys, gate; a processor does the rest, as in diffusers."""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .kv_cache import LayerCache
from .parallel import share_of
from .pattern import Pattern, Text, attend, key_mask
from .positions import rotate

Grid = tuple[int, int, int]


class VideoAttnProcessor:
    """Attention between the projections of a `VideoAttention`; replace it with `model.set_attn_processor`.

    A processor is called as `processor(attn, hidden_states, ...)` with the arguments of `VideoAttention.forward`, and
    returns its results. Whatever a caller puts into `attention_kwargs` arrives by keyword.

    Args:
        qk_dtype: torch.float8_e4m3fn for queries and keys of window layers in e4m3, to sample with; see
            `foveal.kernels.ops.na2d`.
    """

    _attention_backend = None
    _parallel_config = None
    qk_dtype: torch.dtype | None = None  # of subclasses that do not call __init__

    def __init__(self, *, qk_dtype: torch.dtype | None = None):
        self.qk_dtype = qk_dtype

    def __call__(
        self,
        attn: "VideoAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        grid: Grid | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if attn.is_cross_attention:
            query, key, value = attn.project(hidden_states, encoder_hidden_states)
            return attn.output(self.cross(query, Text(key, value, attention_mask)), hidden_states), None

        assert rotary_emb is not None and grid is not None
        share = share_of(self._parallel_config)
        query, key, value = attn.project(hidden_states)
        if share is not None:
            query, key, value = (share.to_heads(x) for x in (query, key, value))
        query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        query, key, value = (x.unflatten(1, grid) for x in (query, key, value))  # [B, T, H, W, heads, d]
        if cache is not None and attn.pattern.remembers:
            key, value = cache.join(key, value, attn.pattern.first_needed)
        text_query, text = None, None
        if encoder_hidden_states is not None:
            words = attn.project_text(encoder_hidden_states)
            if share is not None:
                words = tuple(None if x is None else share.some_heads(x) for x in words)
            text_query, text_key, text_value = words
            text = Text(text_key, text_value, attention_mask)
        out = self.see(attn, query, key, value, text).flatten(1, 3)
        hidden_states = attn.output(out if share is None else share.to_tokens(out), hidden_states)
        if text_query is None or text is None:
            return hidden_states, None
        out = self.read(attn, text_query, text, key, value)
        return hidden_states, attn.output_text(out if share is None else share.all_heads(out))

    # for processors that change only one of these

    def dense(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention of `[B, queries, heads, d]` to `[B, keys, heads, d]` by the backend that was chosen."""
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend, **options)

    def cross(self, query: Tensor, text: Text) -> Tensor:
        """Cross-attention of tokens `[B, S, heads, d]` to a text."""
        mask = None
        if text.mask is not None:  # [B, L], or [B, S, L] where each token has its own words
            mask = text.mask[:, None, None] if text.mask.dim() == 2 else text.mask[:, None]
        return self.dense(query, text.key, text.value, attn_mask=mask)

    def see(self, attn: "VideoAttention", query: Tensor, key: Tensor, value: Tensor, text: Text | None) -> Tensor:
        """Attention of the video to itself, and to a text that attends along, `[B, T, H, W, heads, d]`."""
        return attend(
            attn.pattern, query, key, value, text=text, dense=self.dense, qk_dtype=self.qk_dtype, gate=attn.gate
        )

    def read(self, attn: "VideoAttention", query: Tensor, text: Text, key: Tensor, value: Tensor) -> Tensor:
        """Attention of text tokens `[B, L, heads, d]` to their text and to the video."""
        if attn.pattern.causal:  # words that saw a video would tell its first frames about the last
            return self.dense(query, text.key, text.value, attn_mask=key_mask(text, 0))
        keys, values = (
            torch.cat([text.key, key.flatten(1, 3)], dim=1),
            torch.cat([text.value, value.flatten(1, 3)], dim=1),
        )
        return self.dense(query, keys, values, attn_mask=key_mask(text, keys.shape[1] - text.key.shape[1]))


class VideoAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over a video, alone or with text tokens that attend along, or cross-attention to text.

    Names of projections are those of diffusers (`to_q`, `add_k_proj`, `to_out.0`, ...), so LoRA targets carry over.

    Args:
        dim: channels of the tokens, `heads * head_dim`.
        heads, head_dim: attention heads and their size.
        pattern: what queries see; None makes it cross-attention.
        gated: multiply each head's output by 2 * sigmoid of a projection of the input, 1 to begin with.
        text: "none", "keys" (text is seen) or "full" (and attends itself), each with projections of its own.
        eps: of the RMS norms of queries and keys.
    """

    processor: Any
    _default_processor_cls = VideoAttnProcessor
    _available_processors = (VideoAttnProcessor,)

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        pattern: Pattern | None,
        gated: bool = False,
        text: str = "none",
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads, self.head_dim, self.pattern = heads, head_dim, pattern or Pattern()
        if self.pattern.heads not in (None, heads):
            raise ValueError(f"attention has entries for {self.pattern.heads} heads; expected one for each of {heads}")
        self.is_cross_attention = pattern is None
        self.use_bias = self.added_proj_bias = True
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=eps) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_gate_logits = nn.Linear(dim, heads) if gated else None
        self.gate = self.pattern.make_gate(heads, head_dim)
        if text != "none":
            self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(2))
            self.norm_added_k = nn.RMSNorm(head_dim, eps=eps)
        self.add_q_proj = None
        if text == "full":
            self.add_q_proj, self.to_add_out = (nn.Linear(dim, dim) for _ in range(2))
            self.norm_added_q = nn.RMSNorm(head_dim, eps=eps)
        self.set_processor(VideoAttnProcessor())

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> tuple[Tensor, ...]:
        """Query, key and value `[B, tokens, heads, d]`, normed; keys and values of the text when it is given."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.fused_projections and self.is_cross_attention:
            query, (key, value) = self.to_q(hidden_states), self.to_kv(source).chunk(2, dim=-1)
        elif self.fused_projections:
            query, key, value = self.to_qkv(source).chunk(3, dim=-1)
        else:
            query, key, value = self.to_q(hidden_states), self.to_k(source), self.to_v(source)
        query, key, value = (x.unflatten(-1, (self.heads, self.head_dim)) for x in (query, key, value))
        return self.norm_q(query).to(value.dtype), self.norm_k(key).to(value.dtype), value  # autocast norms in float32

    def project_text(self, encoder_hidden_states: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Query (None unless text attends itself), key and value of the text, `[B, L, heads, d]`, normed."""
        query = None
        if self.fused_projections and self.add_q_proj is not None:
            query, key, value = self.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
        else:
            key, value = self.add_k_proj(encoder_hidden_states), self.add_v_proj(encoder_hidden_states)
            query = None if self.add_q_proj is None else self.add_q_proj(encoder_hidden_states)
        key, value = (x.unflatten(-1, (self.heads, self.head_dim)) for x in (key, value))
        if query is not None:
            query = self.norm_added_q(query.unflatten(-1, (self.heads, self.head_dim))).to(value.dtype)
        return query, self.norm_added_k(key).to(value.dtype), value

    def output(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """Heads `[B, tokens, heads, d]` gated and projected to `[B, tokens, dim]`."""
        if self.to_gate_logits is not None:
            out = out * (2 * torch.sigmoid(self.to_gate_logits(hidden_states)))[..., None].to(out.dtype)
        return self.to_out[0](out.flatten(-2))

    def output_text(self, out: Tensor) -> Tensor:
        return self.to_add_out(out.flatten(-2))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        grid: Grid | None = None,
        cache: LayerCache | None = None,
        **attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: `[B, S, dim]`, a video in raster order.
            encoder_hidden_states: text `[B, L, dim]`.
            attention_mask: words that count, bool `[B, L]`; for cross-attention also `[B, S, L]`, by token.
            rotary_emb: of `positions.rotary_embedding`; not for cross-attention.
            grid: tokens along (t, h, w), product S; not for cross-attention.
            cache: earlier frames of a causal rollout.
            attention_kwargs: for the processor.

        Returns:
            `[B, S, dim]`, and `[B, L, dim]` where text attends itself (else None).
        """
        return self.processor(
            self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, grid, cache, **attention_kwargs
        )
