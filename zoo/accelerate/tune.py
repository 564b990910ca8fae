"""Search for the cheapest plan of each layer that keeps to a budget of recall, PSNR or speed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .acceleration import accelerate, accelerations
from .explain import explain
from .measure import psnr, run
from .plan import RULE, Plan
from .presets import as_plan
from .recall import Recall

DEFAULT_CANDIDATES = tuple(
    {"window": (frames, side, side)} for frames, side in ((2, 8), (4, 8), (4, 16), (8, 16), (8, 24), (16, 32))
)
GOALS = ("recall", "psnr", "speedup")


def parse_budget(budget: str) -> tuple[str, float]:
    """Goal and bound of "recall>=0.95", "psnr>=28" or "speedup>=1.5".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\w+)\s*>=\s*([\d.]+)\s*", budget)
    if not match or match[1] not in GOALS:
        raise ValueError(f"budget={budget!r} must be one of {[f'{goal}>=NUMBER' for goal in GOALS]}")
    return match[1], float(match[2])


def tune(
    pipe: Any,
    budget: str = "recall>=0.95",
    *,
    candidates: Sequence[Plan | Mapping[str, Any] | str] = DEFAULT_CANDIDATES,
    plan: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    recall_steps: int = 3,
    seed: int = 0,
    size: Mapping[str, int] | None = None,
    progress: bool = True,
    **call: Any,
) -> Plan:
    """Choose for each layer the candidate with the lowest density whose recall is high enough, else dense.

    One dense run per candidate observes its recall in every layer. For "recall" that decides. For "psnr" and "speedup"
    the bound on recall is searched: the lowest whose plan reaches the PSNR to the dense result (one run per trial), or
    the highest whose plan saves enough FLOPs.

    Args:
        pipe: a pipeline of diffusers.
        budget: "recall>=0.95" (mean over heads), "psnr>=28" (dB, on the same noise) or "speedup>=1.5" (of FLOPs over
            the run, by `explain`).
        candidates: windows or masks, as `accelerate` takes plans.
        plan: fields that the result has besides, such as {"dense_steps": 0.2}.
        output: JSON file of the result. What has been observed is kept beside it, with the suffix `.observed.json`, and
            used again by the next call.
        recall_steps: steps of a run in which recall is observed.
        seed: of the noise.
        size: height, width and frames for "speedup".
        progress: show a bar.
        call: arguments of the pipeline.

    Returns:
        A plan with an entry for each layer; it is also in `output`.

    Raises:
        ValueError: a budget that is not one, or that no plan of these candidates reaches.
    """
    goal, bound = parse_budget(budget)
    if goal == "speedup" and size is None:
        raise ValueError('budget="speedup>=…" needs size={"height": …, "width": …, "frames": …}')
    plans = [as_plan(candidate) for candidate in candidates]
    rest = dict(plan or {}) | {"name": f"tuned, {budget}"}
    aside = accelerations(pipe)
    for one in aside:
        one.undo()
    try:
        table = _observe(pipe, plans, output, recall_steps, seed, progress, call)
        if goal == "recall":
            found = build(plans, table, bound, rest)
        elif goal == "speedup":
            found = _search_speedup(pipe, plans, table, bound, rest, size or {}, call)
        else:
            found = _search_psnr(pipe, plans, table, bound, rest, seed, progress, call)
    finally:
        for one in aside:
            one.install()
    if output is not None:
        found.save(output)
    return found


Table = list[dict[str, dict[str, float]]]  # of each candidate: layer -> recall, density


def _observe(
    pipe: Any,
    plans: Sequence[Plan],
    output: str | Path | None,
    recall_steps: int,
    seed: int,
    progress: bool,
    call: Mapping[str, Any],
) -> Table:
    """Recall and density of each candidate in each layer, of those that are not in the file of observations."""
    from tqdm.auto import tqdm

    file = None if output is None else Path(output).with_suffix(".observed.json")
    known: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    steps = int(call.get("num_inference_steps") or 50)
    observed = {round(i * (steps - 1) / max(recall_steps - 1, 1)) for i in range(recall_steps)}
    table = []
    for candidate in tqdm(plans, desc="candidates", disable=not progress):
        key = json.dumps([candidate.to_dict(), steps, seed, {name: _digest(x) for name, x in call.items()}])
        if key not in known:
            with Recall(pipe, candidate, steps=observed) as recall:
                run(pipe, seed, call)
            known[key] = _by_layer(recall)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(known, indent=1))
        table.append(known[key])
    return table


def _digest(value: Any) -> Any:
    """An argument of a pipeline as JSON: tensors by their content, other objects by their type."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()
    if isinstance(value, list | tuple):
        return [_digest(x) for x in value]
    return value if isinstance(value, int | float | str | None) else type(value).__name__


def _by_layer(recall: Recall) -> dict[str, dict[str, float]]:
    """The lowest recall and the highest density of the sites of each layer; what covers the grid has 1 and 1."""
    found: dict[str, dict[str, float]] = {}
    for site in recall.acceleration.sites:
        mass = recall.mean.get(site.path, 1.0 if site.path in recall.dense else None)
        if mass is None:
            continue
        density = recall.densities.get(site.path, 1.0)
        density = mass if density is None else density  # only the data tell: at most the mass is a guess
        entry = found.setdefault(str(site.layer), {"recall": 1.0, "density": 0.0})
        entry["recall"], entry["density"] = min(entry["recall"], mass), max(entry["density"], density)
    return found


def build(plans: Sequence[Plan], table: Table, bound: float, rest: Mapping[str, Any]) -> Plan:
    """The plan whose layers have the candidate of the lowest density with at least this recall, else are dense.

    Raises:
        ValueError: every layer is dense.
    """
    layers: dict[int, Any] = {}
    for layer in sorted(table[0], key=int):
        fitting = [(row[layer]["density"], i) for i, row in enumerate(table) if row[layer]["recall"] >= bound]
        density, best = min(fitting, default=(1.0, -1))
        layers[int(layer)] = "dense" if density >= 1 else _rule(plans[best])
    if all(entry == "dense" for entry in layers.values()):
        best = max(entry["recall"] for row in table for entry in row.values() if entry["density"] < 1)
        raise ValueError(f"no layer keeps recall>={bound:.4g} with these candidates; the best has {best:.4g}")
    return Plan.from_dict(dict(rest) | {"layers": layers})


def _rule(plan: Plan) -> dict[str, Any]:
    """Fields of a plan that a layer may have, those by default left out."""
    values = plan.to_dict()
    return {name: values[name] for name in RULE if name in values}


def _bounds(table: Table) -> list[float]:
    """Bounds on recall at which the plan changes, ascending."""
    return sorted({entry["recall"] for row in table for entry in row.values() if entry["density"] < 1})


def _search(bounds: Sequence[float], good: Callable[[float], bool]) -> float | None:
    """The lowest bound that is good, where all above a good one are good."""
    low, high, best = 0, len(bounds) - 1, None
    while low <= high:
        middle = (low + high) // 2
        if good(bounds[middle]):
            best, high = bounds[middle], middle - 1
        else:
            low = middle + 1
    return best


def _search_psnr(
    pipe: Any,
    plans: Sequence[Plan],
    table: Table,
    bound: float,
    rest: Mapping[str, Any],
    seed: int,
    progress: bool,
    call: Mapping[str, Any],
) -> Plan:
    from tqdm.auto import tqdm

    dense = run(pipe, seed, call).frames
    reached: dict[float, float] = {}
    with tqdm(desc="trials", disable=not progress) as bar:

        def good(recall: float) -> bool:
            with accelerate(pipe, build(plans, table, recall, rest)):
                reached[recall] = psnr(run(pipe, seed, call).frames, dense, 1.0)
            bar.update()
            bar.set_postfix(recall=recall, psnr=reached[recall])
            return reached[recall] >= bound

        best = _search(_bounds(table), good)
    if best is None:
        raise ValueError(
            f"no plan of these candidates reaches psnr>={bound:.4g}; the best has {max(reached.values()):.4g}"
        )
    return replace(build(plans, table, best, rest), source=f"PSNR {reached[best]:.1f} dB, recall>={best:.4f}")


def _search_speedup(
    pipe: Any,
    plans: Sequence[Plan],
    table: Table,
    bound: float,
    rest: Mapping[str, Any],
    size: Mapping[str, int],
    call: Mapping[str, Any],
) -> Plan:
    steps = int(call.get("num_inference_steps") or 50)
    reached: dict[float, float] = {}

    def too_slow(recall: float) -> bool:
        reached[recall] = explain(pipe, build(plans, table, recall, rest), steps=steps, **size).speedup
        return reached[recall] < bound

    bounds = _bounds(table)
    slow = _search(bounds, too_slow)
    below = [recall for recall in bounds if slow is None or recall < slow]
    if not below:
        raise ValueError(
            f"no plan of these candidates reaches speedup>={bound:.4g}; the best has {max(reached.values()):.4g}"
        )
    found = build(plans, table, below[-1], rest)
    return replace(found, source=f"recall>={below[-1]:.4f}")
