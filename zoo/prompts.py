"""Fine-tuning by prompts: learned tokens that a frozen vision transformer attends to in each block."""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["vpt", "vfpt", "tcpa"]
KINDS: tuple[Kind, ...] = ("vpt", "vfpt", "tcpa")


def fourier(prompts: Tensor) -> Tensor:
    """Real part of the Fourier transform of `[P, dim]` over tokens and channels."""
    wide = prompts if prompts.dtype == torch.float64 else prompts.float()
    return torch.fft.fft2(wide).real.to(prompts.dtype)


class Prompts(nn.Module):
    """Prompts that every token may attend to.

    Args:
        dim: channels.
        length: number of prompts.
        transform: use the real part of their Fourier transform over tokens and channels.
    """

    def __init__(self, dim: int, *, length: int = 10, transform: bool = False, device=None, dtype=None):
        super().__init__()
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        self.transform = transform
        bound = sqrt(6 / (dim + length))
        self.tokens = nn.Parameter(torch.empty(length, dim, device=device, dtype=dtype).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Prompts `[P, dim]`; no pair is forbidden."""
        return fourier(self.tokens) if self.transform else self.tokens, None


class MatchedPrompts(nn.Module):
    """Prompts of two roles, chosen token by token (TCPA, arXiv:2505.02406, section 3).

    The class token sees the prompts of its pool whose keys are most like it by cosine, a patch those of the other pool.
    Prompts that a token does not see keep their share of its softmax. `loss` draws tokens and chosen keys together.

    Args:
        dim: channels.
        pool_cls, pool_image: prompts of the class token's pool and of the patches'.
        length_cls, length_image: tokens of a prompt.
        topk_cls, topk_image: prompts that a token sees of its pool.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        pool_cls: int = 18,
        pool_image: int = 18,
        length_cls: int = 1,
        length_image: int = 1,
        topk_cls: int = 10,
        topk_image: int = 10,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for role, pool, topk, length in (
            ("cls", pool_cls, topk_cls, length_cls),
            ("image", pool_image, topk_image, length_image),
        ):
            if not 1 <= topk <= pool or length < 1:
                raise ValueError(
                    f"topk_{role}={topk} must lie in [1, pool_{role}={pool}], and length_{role}={length} be at least 1"
                )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.topk_cls, self.topk_image = topk_cls, topk_image
        self.keys_cls, self.keys_image = (
            nn.Parameter(torch.empty(n, dim, **dd).uniform_(-1, 1)) for n in (pool_cls, pool_image)
        )
        self.prompts_cls, self.prompts_image = (
            nn.Parameter(torch.empty(n, length, dim, **dd).uniform_(-1, 1))
            for n, length in ((pool_cls, length_cls), (pool_image, length_image))
        )
        self.random = False
        self.loss: Tensor | None = None

    def choose(self, x: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """Prompts that tokens `[B, N, dim]` see, bool `[B, N, pool]`, and the mean distance of their keys."""
        likeness = F.normalize(x, dim=-1) @ F.normalize(keys, dim=-1).mT
        ranking = torch.rand_like(likeness) if self.random and self.training else likeness
        chosen = ranking.topk(topk, dim=-1).indices
        return torch.zeros_like(likeness, dtype=torch.bool).scatter(-1, chosen, True), 1 - likeness.gather(-1, chosen)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts and the pairs that see each other.

        Args:
            x: input of the block `[B, 1 + patches, dim]`, class token first.

        Returns:
            prompts `[P, dim]`, and bool `[B, 1 + patches, P]`.
        """
        seen_cls, apart_cls = self.choose(x[:, :1], self.keys_cls, self.topk_cls)
        seen_image, apart_image = self.choose(x[:, 1:], self.keys_image, self.topk_image)
        self.loss = apart_cls.mean() + apart_image.mean() if self.training else None
        seen_cls = seen_cls.repeat_interleave(self.prompts_cls.shape[1], -1)
        seen_image = seen_image.repeat_interleave(self.prompts_image.shape[1], -1)
        allowed = torch.cat([F.pad(seen_cls, (0, seen_image.shape[-1])), F.pad(seen_image, (seen_cls.shape[-1], 0))], 1)
        return fourier(torch.cat([self.prompts_cls.flatten(0, 1), self.prompts_image.flatten(0, 1)])), allowed


class PromptedBlock(Block):
    """timm's block whose tokens attend to its `prompts`, too; prompts do not go on to the next block."""

    prompts: Prompts | MatchedPrompts
    attn: Attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`; raises ValueError with a mask."""
        if attn_mask is not None or is_causal:
            raise ValueError(f"attn_mask and is_causal={is_causal} do not go with prompts")
        x = x + self.drop_path1(self.ls1(self.attend(x)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Attention of the tokens to themselves and the prompts.

        Weights of prompts that a token does not see are dropped after the softmax. The fused attention gives them as
        further channels of the values, so that no matrix of all pairs is made.
        """
        prompts, allowed = self.prompts(x)
        attn, normed = self.attn, self.norm1(x)
        q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        _, more_k, more_v = attn.qkv(self.norm1(prompts)).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
        q, k, more_k = attn.q_norm(q), attn.k_norm(k), attn.k_norm(more_k)
        keys = torch.cat([k, more_k.expand(len(x), -1, -1, -1)], dim=2)
        if allowed is None:
            out = F.scaled_dot_product_attention(q, keys, torch.cat([v, more_v.expand(len(x), -1, -1, -1)], dim=2))
        else:
            count = len(prompts)
            ones = torch.eye(count, device=v.device, dtype=v.dtype).expand(*v.shape[:2], -1, -1)
            wide = torch.cat([F.pad(v, (0, count)), F.pad(ones, (v.shape[-1], 0))], dim=2)
            out, weights = F.scaled_dot_product_attention(q, keys, wide).split([v.shape[-1], count], dim=-1)
            out = out + (weights * allowed[:, None]) @ more_v
        out = attn.norm(out.transpose(1, 2).flatten(2))
        gate = getattr(attn, "gate", None)
        out = out if gate is None else out * gate(normed).sigmoid()
        return attn.proj_drop(attn.proj(out))


def add_prompts(model: nn.Module, kind: Kind = "vpt", **options: Any) -> nn.Module:
    """Give each block of a vision transformer prompts of its own, in place. Other weights keep their names.

    Args:
        model: a timm model with `blocks` of timm's `Block`, such as `VisionTransformer`.
        kind: "vpt" (arXiv:2203.12119, prompts in each block), "vfpt" (the same, Fourier-transformed), or "tcpa"
            (`MatchedPrompts`), which needs a class token.
        **options: of `Prompts` or `MatchedPrompts`.

    Returns:
        The model, whose blocks have a child `prompts`.

    Raises:
        ValueError: an unknown kind, another model, attention dropout, prompts that are there already, or options that
            do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {KINDS}")
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    other = next((type(block).__name__ for block in blocks if type(block) is not Block), None)
    if not blocks or other is not None:
        found = f"blocks of {other}" if other else "no block"
        raise ValueError(f"{type(model).__name__} has {found}; prompts need a vision transformer of timm's Block")
    prefix = getattr(model, "num_prefix_tokens", 1)
    if kind == "tcpa" and prefix != 1:
        raise ValueError(f"kind='tcpa' needs one class token; {type(model).__name__} has {prefix} prefix tokens")
    for block in blocks:
        attn: Any = block.attn
        if attn.attn_drop.p > 0:
            raise ValueError(f"attn_drop={attn.attn_drop.p} does not go with prompts: build the model with 0")
        weight = attn.qkv.weight
        dd = {"device": weight.device, "dtype": weight.dtype}
        if kind == "tcpa":
            prompts: nn.Module = MatchedPrompts(weight.shape[1], **options, **dd)
        else:
            prompts = Prompts(weight.shape[1], transform=kind == "vfpt", **options, **dd)
        block.add_module("prompts", prompts.train(block.training))
        block.__class__ = PromptedBlock
    return model


def prompts_of(model: nn.Module) -> list[Prompts | MatchedPrompts]:
    """Prompts of all blocks, first to last."""
    return [module.prompts for module in model.modules() if isinstance(module, PromptedBlock)]


def matching_loss(model: nn.Module) -> Tensor | float:
    """Sum over blocks of the distances between tokens and the keys that they chose in the last forward pass in
    training; 0 for prompts without keys."""
    return sum((p.loss for p in prompts_of(model) if isinstance(p, MatchedPrompts) and p.loss is not None), 0.0)
