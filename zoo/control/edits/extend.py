"""Keys and values of other branches beside a branch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..regions import to_grid
from ..where import Where


class Extend(Edit):
    """Rows of one branch attend to `[own keys ; keys of the references]`.

    Keys outside of a reference's mask are left out of the attention, not masked or zeroed.

    Args:
        references: names of the branches that are seen.
        to: name of the branch that sees them.
        visible: reference → mask of its tokens that are seen, `[height, width]`; all when missing.
        inside: queries that see the references, `[height, width]`; all when None.
        where, schedule, guidance: sites, steps and rows.
    """

    owner = True

    def __init__(
        self,
        references: Sequence[str] = ("source",),
        to: str = "target",
        *,
        visible: dict[str, Tensor] | None = None,
        inside: Tensor | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        self.references, self.to = tuple(references), to
        self.visible, self.inside = dict(visible or {}), inside
        self.where, self.schedule = where or Where(kinds=("self",)), schedule or Schedule()
        self.guidance, self.branches = guidance, (*self.references, to)

    def plan(self, context: Context) -> tuple | None:
        grid = context.layout.grid_of(context.site)
        if grid is None:
            raise ValueError(f"{context.site.path}: {context.layout.why}; Extend needs a grid")
        index = {name: to_grid(mask, grid).nonzero()[:, 0] for name, mask in self.visible.items()}
        names = [name for name in self.references if name not in index or len(index[name])]
        inside = None if self.inside is None else to_grid(self.inside, grid).nonzero()[:, 0]
        if not names or (inside is not None and not len(inside)):
            return None
        references = [(context.rows.of(name, self.guidance), index.get(name)) for name in names]
        return context.rows.of(self.to, self.guidance), references, inside

    def attend(self, call: Call, plan: Any, rows: Sequence[int], following: Callable[[Call], Tensor]) -> Tensor:
        targets, references, inside = plan
        place = {row: i for i, row in enumerate(rows)}
        mine = [i for i, row in enumerate(rows) if row in targets]
        out = following(call) if inside is not None or len(mine) < len(rows) else None
        keys, values = [call.key[mine]], [call.value[mine]]
        for sources, index in references:
            pairs = dict(zip(targets, sources, strict=True))
            theirs = torch.tensor([place[pairs[rows[i]]] for i in mine], device=call.key.device)
            for found, x in ((keys, call.key), (values, call.value)):
                found.append(x[theirs] if index is None else x[theirs][:, index.to(x.device)])
        query = call.query[mine] if inside is None else call.query[mine][:, inside.to(call.query.device)]
        part = replace(call, query=query, key=torch.cat(keys, 1), value=torch.cat(values, 1), mask=None)
        extended = following(part)
        if out is None:
            return extended
        out = out.clone()
        chosen = torch.tensor(mine, device=out.device)
        if inside is None:
            out[chosen] = extended
        else:
            out[chosen[:, None], inside.to(out.device)] = extended
        return out
