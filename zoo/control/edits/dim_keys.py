"""Keys times a mask, which hides them in part."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..where import Where


class DimKeys(Edit):
    """`k <- (1 - mask) k` on the grid, bilinear: a key of zero still has the logit 0 and its share of the softmax.

    Args:
        mask: `[height, width]`, in 0..1; all zeros is neutral.
        branch: name of the prompt; all when None.
        where, schedule, guidance: sites, steps and rows.
    """

    def __init__(
        self,
        mask: Tensor,
        *,
        branch: str | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        self.mask, self.branch, self.branches = mask.float(), branch, () if branch is None else (branch,)
        self.where, self.schedule = where or Where(kinds=("self",)), schedule or Schedule()
        self.guidance = guidance

    def plan(self, context: Context) -> tuple | None:
        grid = context.layout.grid_of(context.site)
        if grid is None or not self.mask.any():
            return None
        mask = interpolate(self.mask[None, None], size=grid, mode="bilinear").flatten()
        return context, context.rows.of(self.branch, self.guidance), mask

    def qkv(self, call: Call, plan: tuple) -> Call:
        context, rows, mask = plan
        if (span := context.span(call, "image", keys=True)) is None:
            return call
        key, index = call.key.clone(), torch.tensor(rows, device=call.key.device)
        key[index, span[0] : span[1]] *= (1 - mask).to(key)[:, None, None]
        return replace(call, key=key)
