"""Transformer blocks: attention and MLP under the modulation of the timestep."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Grid, VideoAttention
from .kv_cache import LayerCache
from .local_scan import frame_scan
from .modulation import MODULATIONS, wide
from .pattern import Pattern


class GeluMLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.up, self.down = nn.Linear(dim, int(dim * ratio)), nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """silu(gate) * up, then down (arXiv:2002.05202), with as many parameters as `GeluMLP` of the same ratio."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = -(-int(dim * ratio * 2 / 3) // 32) * 32
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


MLPS = {"gelu": GeluMLP, "swiglu": SwiGLU}


class VideoDiTBlock(nn.Module):
    """Attention, optional cross-attention to text, MLP; where the pattern says so, scans of each frame before them.

    Args:
        dim: channels, `heads * head_dim`.
        heads, head_dim: of attention.
        pattern: what attention sees.
        mlp, mlp_ratio: "gelu" or "swiglu", and hidden channels per channel.
        cross: attend to text after self-attention (unmodulated, output zero to begin with).
        modulation: "adaln_single", "td_ln" or "td_ln_snr".
        gated: gate the output of self-attention.
        eps: of norms.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        pattern: Pattern,
        mlp: str,
        mlp_ratio: float,
        cross: bool,
        modulation: str,
        gated: bool,
        eps: float,
    ):
        super().__init__()
        sizes = {"heads": heads, "head_dim": head_dim, "eps": eps}
        self.eps = eps
        self.modulation = MODULATIONS[modulation](dim)
        self.scan = self.scan_modulation = None
        if pattern.type == "local_scan":
            self.scan = frame_scan(dim, heads, pattern.options)
            self.scan_modulation = MODULATIONS[modulation](dim, parts=1)
        self.attn1 = VideoAttention(dim, pattern=pattern, gated=gated, **sizes)
        self.attn2 = VideoAttention(dim, pattern=None, **sizes) if cross else None
        self.mlp = MLPS[mlp](dim, mlp_ratio)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        conditioning: Tensor,
        encoder_attention_mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor],
        grid: Grid,
        cache: LayerCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """One layer: `[B, S, dim]` to the same; see `VideoAttention.forward` and `modulation` for the arguments."""
        options = attention_kwargs or {}
        if self.scan is not None and self.scan_modulation is not None:
            (part,) = self.scan_modulation(conditioning)
            hidden_states = part.residual(hidden_states, self.scan(part.modulate(hidden_states, self.eps), grid))
        attention, mlp = self.modulation(conditioning)
        update, _ = self.attn1(
            attention.modulate(hidden_states, self.eps), rotary_emb=rotary_emb, grid=grid, cache=cache, **options
        )
        hidden_states = attention.residual(hidden_states, update)
        if self.attn2 is not None:
            normed = F.layer_norm(hidden_states.to(wide(hidden_states.dtype)), hidden_states.shape[-1:], eps=self.eps)
            update, _ = self.attn2(
                normed.to(hidden_states.dtype), encoder_hidden_states, encoder_attention_mask, **options
            )
            hidden_states = hidden_states + update
        return mlp.residual(hidden_states, self.mlp(mlp.modulate(hidden_states, self.eps)))


class JointVideoDiTBlock(nn.Module):
    """Two streams, video and text, with weights of their own, that attend to each other (MM-DiT, arXiv:2403.03206).

    Words are clean whatever the noise of the video: their modulation is that of timestep 0, which also keeps them the
    same for every frame of a causal model.

    Args:
        last: text ends here: it is seen once more and has no output.
        others: as in `VideoDiTBlock`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        pattern: Pattern,
        mlp: str,
        mlp_ratio: float,
        modulation: str,
        gated: bool,
        eps: float,
        last: bool,
    ):
        super().__init__()
        self.eps = eps
        self.modulation, self.text_modulation = MODULATIONS[modulation](dim), MODULATIONS[modulation](dim)
        text = "keys" if last else "full"
        self.attn = VideoAttention(
            dim, heads=heads, head_dim=head_dim, pattern=pattern, gated=gated, text=text, eps=eps
        )
        self.mlp = MLPS[mlp](dim, mlp_ratio)
        self.text_mlp = None if last else MLPS[mlp](dim, mlp_ratio)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Tensor,
        text_conditioning: Tensor,
        encoder_attention_mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor],
        grid: Grid,
        cache: LayerCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer: video `[B, S, dim]` and text `[B, L, dim]` to the same."""
        attention, mlp = self.modulation(conditioning)
        text_attention, text_mlp = self.text_modulation(text_conditioning)
        update, text_update = self.attn(
            attention.modulate(hidden_states, self.eps),
            text_attention.modulate(encoder_hidden_states, self.eps),
            encoder_attention_mask,
            rotary_emb,
            grid,
            cache,
            **(attention_kwargs or {}),
        )
        hidden_states = attention.residual(hidden_states, update)
        hidden_states = mlp.residual(hidden_states, self.mlp(mlp.modulate(hidden_states, self.eps)))
        if self.text_mlp is not None:
            words = text_attention.residual(encoder_hidden_states, text_update)
            encoder_hidden_states = text_mlp.residual(words, self.text_mlp(text_mlp.modulate(words, self.eps)))
        return hidden_states, encoder_hidden_states
