"""The page of masks in the documentation: `python -m foveal.kernels.masks.table docs/masks.md` writes it anew."""

import re
import sys
from pathlib import Path

from . import REGISTRY
from .registry import Entry

INTRO = """# Masks

`block_sparse_attention(query, key, value, mask=...)` is the one sparse kernel; methods differ in how its lists are
made. A mask is a function: of a grid if it is static, of queries and keys if it is dynamic. It returns a
`BlockMask`.

```python
import torch
from foveal.kernels.ops import block_sparse_attention, masks

query, key, value = (torch.randn(1, 5, 12, 20, 2, 32) for _ in range(3))  # [B, T, H, W, heads, head_dim]
static = masks.sta((5, 12, 20), window=(3, 1, 3), tile=(2, 4, 4))  # made once for a grid
dynamic = masks.vsa(query, key, sparsity=0.8, block=(2, 4, 4))  # made for each call
out = block_sparse_attention(query, key, value, mask=dynamic)
```

- Any grid will do: blocks at the far borders are short. Text goes to the kernel as `additional_keys`, seen by
  everybody.
- Lists are data. No mask has the size of tokens times tokens, none that looks at queries and keys waits for the
  device, and all of these trace under `torch.compile(fullgraph=True)`. No gradient flows through a choice.
- Every key is listed once, and a block of queries keeps its own block. `own=False` gives the published selection
  where that lacks it.
- Masks of the flattened grid (`radial`, `moa`, `psa`, `content_blocks`) take `query.flatten(1, 3)`, those of Sparse
  VideoGen `query.flatten(2, 3)`: both are views.
- Official selections were recorded and are met exactly; `tests/kernels/test_masks_recorded.py` holds them.

## The table

"Exact" says whether the tokens that are kept are those of the paper's formula.

"""

COLUMNS = ["mask", "method", "paper", "kind", "density by", "exact"]

OUTRO = """
## What a mask is made of

A dynamic mask is an estimate, a rule and what is always kept. A method without a name is a line:

```python
scores = masks.block_scores(query, key, query_block=(1, 4, 4), key_block=(1, 4, 4), estimate="minmax")
kept = masks.keep(scores, rule="budget", budget=0.2)
mine = masks.to_mask(kept, query_block=(1, 4, 4), key_block=(1, 4, 4))
out = block_sparse_attention(query, key, value, mask=mine)
```

`allowed` comes before the rule, `always` after it. Rules are "topk", "mass", "threshold" and "budget", ranked by
row, by head or over all heads. Static patterns without a name come from `static_blocks`: "band_global",
"local_stride" and "power".

## Two branches

Some papers add a cheap branch that sees everything: `vsa_coarse` (means of cubes), `sla_linear` (linear attention),
`psa` (means of 2, 4 and 8 keys inside one softmax).

```python
fine = block_sparse_attention(query, key, value, mask=masks.vsa(query, key, block=(1, 4, 4)))
gate = torch.zeros(2, 32)  # learned, of the layer's input; zero is the fine branch alone
out = fine + gate * masks.vsa_coarse(query, key, value, block=(1, 4, 4))

flat = [x.flatten(1, 3) for x in (query, key, value)]
mask, keys, values = masks.psa(*flat, query_block=64, key_block=64)
out = block_sparse_attention(flat[0], keys, values, mask=mask)
```

Plans of [`accelerate`](faster-video.md) and layers of `VideoDiT` take `psa` by its name, with `flat`.

## A mask per head

A `HeadPlan` says which static mask each head of each layer takes in a range of denoising steps. It is JSON. Three
searches make one: by the mass of attention that a mask keeps (Sparse VideoGen), by the influence of what it drops
on a loss (MoA), by gates that are trained (DuoAttention).

```python
candidates = [masks.HeadChoice("nabla_prior", {"window": n, "block": (1, 4, 4)}) for n in (1, 3)]
plan = masks.plan_by_recall(query, key, candidates, recall=0.5, layer=0, steps=(0.2, 1.0))
mask = masks.plan_mask(masks.HeadPlan.from_json(plan.to_json()), (5, 12, 20), layer=0, heads=2, step=0.5)
```

`foveal.zoo.tasks.video_metrics.attention_mass_recall(query, key, mask=mask)` measures any mask in the same way.

## Masks that learn

`foveal.layers.BoxGate` is SeerAttention's gate on grids: `gate.loss(query, key)` teaches it the map of the
attention around it, which stays frozen, and `gate.mask(query, key, topk=16)` chooses blocks. In a `VideoDiT` it is the
mask `box_gate` ([training](training.md#sparse-attention)).
`foveal.layers.LearnedConnectivity` is Sparsifiner's predictor for image grids of one size: `forward` is trained to
resemble the attention's map, and `mask(query, key, share=0.25)` lists single keys. The `sparsifiner_*` models have it.

## Not here

SEA (arXiv:2310.01777) needs a network of its own per layer and a teacher; SpargeAttn's second stage and skipped softmax
tiles (BLASST) are decided inside a kernel, not by a mask.
"""


def summary(entry: Entry) -> str:
    """The first line of the file of a mask, without its arXiv id."""
    line = (sys.modules[entry.function.__module__].__doc__ or "").splitlines()[0].rstrip(".")
    return re.sub(r" \(arXiv:[\d.]+\)", "", line)


def row(name: str) -> list[str]:
    """Table cells of a mask."""
    entry = REGISTRY[name]
    paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else "–"
    kind = "dynamic" if entry.dynamic else "static"
    return [f"`{name}`", summary(entry), paper, kind, f"`{entry.density}`", entry.exact]


def markdown() -> str:
    """The whole page."""
    names = sorted(REGISTRY, key=lambda name: (REGISTRY[name].dynamic, name))
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *map(row, names))]
    return INTRO + "\n".join(lines) + "\n" + OUTRO


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m foveal.kernels.masks.table docs/masks.md")
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
