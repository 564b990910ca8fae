"""Plans with the settings that papers and their code publish, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels.masks.named import mask_names
from .plan import Plan, read_plan

PRESETS: dict[str, dict[str, Any]] = {
    "gna_hunyuan_720p": {
        "window": (18, 24, 24),
        "stride": (16, 8, 8),
        "source": "GNA (arXiv:2504.16922), NATTEN's profiler documentation; its dense steps are not in it",
    },
    "gna_flux_4k": {
        "window": (80, 80),
        "stride": (16, 16),
        "source": "GNA (arXiv:2504.16922), NATTEN's profiler documentation; its dense steps are not in it",
    },
    "freeswim_wan_480p": {
        "window": (None, 31, 53),
        "source": "FreeSwim (arXiv:2511.14712): windows of the training size 480 x 832, without its full branch",
    },
    "radial_wan21": {
        "mask": "radial",
        "options": {"block": 128, "decay": 0.2},
        "dense_steps": 12,
        "dense_layers": (0,),
        "source": "radial attention (arXiv:2506.19852), official script for Wan 2.1 14B, of 50 steps",
    },
    "radial_wan22": {
        "mask": "radial",
        "options": {"block": 128, "decay": 0.8},
        "dense_steps": 11,
        "dense_layers": (0,),
        "source": "radial attention (arXiv:2506.19852), official script for Wan 2.2, of 40 steps",
    },
    "radial_hunyuan": {
        "mask": "radial",
        "options": {"block": 128, "decay": 0.95, "first_frame": False},
        "dense_steps": 12,
        "source": "radial attention (arXiv:2506.19852), official script for HunyuanVideo, of 50 steps",
    },
    "sparge": {
        "mask": "sparge",
        "options": {"topk": 0.5, "similarity": -0.1},
        "flat": True,
        "source": "SpargeAttn (arXiv:2502.18137), defaults of the official code; its second stage is not a mask",
    },
    "clear_flux": {
        "mask": "clear",
        "options": {"radius": 16},
        "source": "CLEAR (arXiv:2412.16112), one of its radii 8, 16 and 32; the published weights are distilled for it",
    },
    "vsa": {
        "mask": "vsa",
        "options": {"sparsity": 0.9, "own": False},
        "gated": True,
        "source": "VSA (arXiv:2505.13389): for checkpoints that are trained with it, such as FastWan",
    },
}


def as_plan(plan: Plan | Mapping[str, Any] | str | Path, **changes: Any) -> Plan:
    """A plan of a plan, a mapping, a name in `PRESETS` or in `foveal.kernels.masks`, or a JSON or YAML file.

    Args:
        plan: see above.
        changes: fields of `Plan` that replace those of the plan.

    Raises:
        ValueError, TypeError: no such plan, or values outside of what is accepted.
    """
    if isinstance(plan, Plan):
        return Plan(**(vars(plan) | changes))
    if isinstance(plan, Mapping):
        return Plan.from_dict(dict(plan) | changes)
    if isinstance(plan, Path) or str(plan).endswith((".json", ".yaml", ".yml")):
        return Plan(**(vars(read_plan(plan)) | changes))
    if isinstance(plan, str) and plan in PRESETS:
        return Plan.from_dict({"name": plan} | PRESETS[plan] | changes)
    if isinstance(plan, str) and plan in mask_names():
        return Plan.from_dict({"name": plan, "mask": plan} | changes)
    raise ValueError(f"plan={plan!r} must be a Plan, a mapping, a file, or one of {sorted({*PRESETS, *mask_names()})}")
