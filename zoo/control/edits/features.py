"""Inputs of blocks blended with those of a reference run (PFB-Diff)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...sites import Schedule
from ...sites.models import models_of
from ..edit import Context, Edit


def fuse_features(h: Tensor, mask: Tensor, reference: Tensor, *, clamp: bool = True) -> Tensor:
    """`h m + reference (1 - m)` with the mask `[B or 1, 1, H, W]` resized to `h [B, C, h, w]`, bicubic.

    Args:
        h, mask, reference: see above.
        clamp: whether the resized mask is held to 0..1; the official code lets it overshoot.
    """
    mask = interpolate(mask.to(h), size=h.shape[-2:], mode="bicubic")
    mask = mask.clamp(0, 1) if clamp else mask
    return h * mask + reference * (1 - mask)


class BlendFeatures(Edit):
    """`h <- m h_target + (1 - m) h_source` at the inputs of blocks of a UNet, between branches of one batch.

    Args:
        mask: of the edit, `[height, width]`, 1 inside; all ones is neutral.
        blocks: names of modules, such as "mid_block" or "up_blocks.0"; their first input is blended.
        source, target: names of the branches.
        schedule, guidance: steps and rows.
    """

    def __init__(
        self,
        mask: Tensor,
        blocks: Sequence[str] = ("mid_block", "up_blocks.0"),
        *,
        source: str = "source",
        target: str = "target",
        schedule: Schedule | None = None,
        guidance: str = "both",
    ):
        self.mask, self.blocks, self.schedule = mask.float()[None, None], tuple(blocks), schedule or Schedule()
        self.source, self.target, self.branches, self.guidance = source, target, (source, target), guidance

    def sites(self, sites: Sequence[Any]) -> list[Any]:
        return []

    def _modules(self, control: Any) -> list[nn.Module]:
        (model,) = models_of(control.pipe_or_model).values()
        known = dict(model.named_modules())
        if missing := [name for name in self.blocks if name not in known]:
            raise ValueError(f"blocks={missing} are no modules of {type(model).__name__}")
        return [known[name] for name in self.blocks]

    def check(self, control: Any) -> None:
        self._modules(control)

    def plan(self, context: Context) -> None:
        return None

    def hooks(self, control: Any) -> list[Any]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
            if not self.now or bool((self.mask == 1).all()):
                return None
            h = args[0] if args else kwargs["hidden_states"]
            rows = (list(control.rows.of(name, self.guidance)) for name in (self.source, self.target))
            source, target = rows
            h = h.clone()
            h[target] = fuse_features(h[target], self.mask.to(h.device), h[source])
            return ((h, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h})

        return [module.register_forward_pre_hook(before, with_kwargs=True) for module in self._modules(control)]
