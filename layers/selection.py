"""Select and pack: attention of the tokens that a gate selects to each other; the others pass (arXiv:2410.23608)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.ragged import ragged_attention
from .base import ProjectedAttention2d


class SelectAndPackAttention2d(ProjectedAttention2d):
    """Attention of the selected tokens of a map `[B, H, W, dim]` to each other; zero for the others (section 3).

    A linear gate gives every token a logit. In training a token is selected with the probability of its sigmoid
    (Gumbel-sigmoid of temperature 1) and the gradient goes straight through the choice; later it is selected if its
    logit is positive. In a residual block a token that is not selected leaves the attention as it came. No code is
    public: where the paper is silent the choices are ours.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`; `impl` has no effect, and there is no class token.
        pack: project and attend the selected tokens alone, one image after the other in memory. It computes the same,
            with a launch per number of tokens that images of the batch select, and the host waits for these numbers:
            graphs cannot hold it.
        gate_bias: of a new gate, as `torch.nn.Linear` has it when None. Around 0 training starts by dropping half
            of the tokens at random, in each layer. Where no `selection_loss` teaches the gate soon, tokens of which
            nothing is known yet are better kept: 3 selects 95 %.
    """

    def __init__(self, dim: int, *, num_heads: int, pack: bool = False, gate_bias: float | None = None, **options: Any):
        super().__init__(dim, num_heads=num_heads, **options)
        self.pack, self.gate_bias = pack, gate_bias
        self.gate = nn.Linear(dim, 1, device=options.get("device"), dtype=options.get("dtype"))
        self.logits: Tensor | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """Set the bias of the gate if one is asked for; models that initialise linear layers call it after them."""
        if self.gate_bias is not None:
            nn.init.constant_(self.gate.bias, self.gate_bias)

    def forward(self, x: Tensor, *, grid_size: None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[B, H, W, dim]` to the same shape; raises ValueError for another.

        In training `logits` becomes those of the gate, `[B, H, W]`, for `selection_loss`.
        """
        out, _, logits = self.attend_selected(x)
        if self.training:
            self.logits = logits
        return out

    def attend_selected(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Attend, and tell what is selected.

        Args:
            x: `[B, H, W, dim]`.
            mask: tokens that may be selected, bool `[B, H, W]`; all when None.

        Returns:
            attended: `[B, H, W, dim]`, zero for tokens that are not selected.
            weight: see `select`, `[B, H * W]`.
            logits: of the gate, `[B, H, W]`; very small where the mask is False.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        logits = self.gate(x).squeeze(-1)
        if mask is not None:
            logits = logits.masked_fill(~mask, -1e4)  # finite in half precision, too
        chosen, weight = self.select(logits.flatten(1))
        attend = self._packed if self.pack else self._masked
        return (attend(x.flatten(1, 2), chosen) * weight.to(x.dtype)[..., None]).view(x.shape), weight, logits

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose tokens by their logits `[B, N]`.

        Returns:
            chosen: bool `[B, N]`.
            weight: 1 for chosen tokens, else 0; its gradient is that of the sigmoid.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training:
            tiny = torch.finfo(logits.dtype).tiny
            uniform = torch.rand_like(logits).clamp(min=tiny)
            logits = logits + uniform.log() - (-uniform).log1p()  # the difference of two Gumbel variables
        chosen, soft = logits > 0, logits.sigmoid()
        return chosen, chosen + (soft - soft.detach())

    def _masked(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """All tokens, `[B, N, dim]`, attend to the chosen ones; the results of the others are dropped."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        visible = chosen | ~chosen.any(1, keepdim=True)  # a softmax over no key is not defined
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None])
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return torch.where(chosen[..., None], out, 0)

    def _packed(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The same of the chosen tokens alone."""
        places = chosen.flatten().nonzero().squeeze(-1)
        query, key, value = self.qkv(tokens.flatten(0, 1)[places]).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out = ragged_attention(_attend, query, key, value, sizes=chosen.sum(1))
        out = self.proj_drop(self.proj(out.flatten(1)))
        return out.new_zeros(chosen.numel(), self.dim).index_copy(0, places, out).view(tokens.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"logits": None}  # of a graph, which is neither copied nor stored

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates for one image whose tokens are all selected; `shape` is H and W."""
        return 2 * (shape[0] * shape[1]) ** 2 * self.dim


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of `[B, N, heads, d]`."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def selection_loss(model: nn.Module, masks: Tensor) -> Tensor:
    """Cross-entropy between the gates of a model and the places of objects, to be added to the training loss.

    A token is wanted if its cell of the map touches an object. The loss is a mean over tokens and a sum over layers, of
    the last forward pass in training.

    Args:
        model: any model with `SelectAndPackAttention2d`.
        masks: `[B, H, W]` at the resolution of the images, or any other; positive inside of objects, from boxes or
            segmentations.

    Raises:
        ValueError: no layer has logits; masks of another shape.
    """
    found = [m.logits for m in model.modules() if isinstance(m, SelectAndPackAttention2d) and m.logits is not None]
    if not found:
        raise ValueError("model has no logits of SelectAndPackAttention2d: run it in training first")
    if masks.dim() != 3 or masks.shape[0] != found[0].shape[0]:
        raise ValueError(f"masks.shape={tuple(masks.shape)} must be [{found[0].shape[0]}, H, W]")
    losses = []
    for logits in found:
        wanted = F.adaptive_max_pool2d((masks > 0).to(logits.dtype)[:, None], logits.shape[1:]).squeeze(1)
        losses.append(F.binary_cross_entropy_with_logits(logits, wanted))
    return torch.stack(losses).sum()
