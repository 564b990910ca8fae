"""Systems of the shelves that have a registry: masks, recipes of steering, families of backbones."""

from __future__ import annotations

import re
import sys

from timm.models import get_arch_pretrained_cfgs

from ...kernels.masks import REGISTRY
from ...weights import bundled_manifest
from ..backbones import FAMILIES
from ..backbones import __name__ as BACKBONES
from ..control.recipes import RECIPES, Recipe
from .record import System

ARXIV = re.compile(r"arXiv:\d{4}\.\d{5}")
UNRELEASED = {  # families without weights in the manifest: test, status, note
    "flow": (
        "zoo/test_hosts.py::test_flow_attention_takes_the_places_it_is_told",
        "idea",
        "the authors' attention in layouts that they did not train",
    ),
    "minimal": ("zoo/test_minimal.py::test_reductions_save_matrices", "exact", "by formula; sizes are ours"),
    "ninformer": (
        "layers/test_mixers.py::test_an_inner_network_gates_a_linear_layer",
        "exact",
        "by formula; sizes are ours",
    ),
    "partialnet": ("zoo/test_goldens.py::partialnet", "exact", "recorded"),
    "spa": (
        "layers/test_selection.py::test_selected_tokens_attend_to_each_other_and_the_others_pass",
        "partial",
        "the layer; layout and sizes are ours",
    ),
    "sparsifiner": ("zoo/test_goldens.py::sparsifiner", "exact", "recorded"),
    "ran": ("zoo/test_ran.py::test_parameters_are_those_of_the_authors", "exact", "by the authors' network files"),
}


def masks() -> tuple[System, ...]:
    """Masks of block-sparse attention: "exact" and "ours" of an entry are its status, anything else is partial."""
    found = []
    for name, entry in sorted(REGISTRY.items()):
        title = (sys.modules[entry.function.__module__].__doc__ or "").splitlines()[0].rstrip(".")
        status = {"exact": "exact", "ours": "idea"}.get(re.split(r"\W", entry.exact)[0], "partial")
        note = re.sub(r"^(exact|ours)\b[:,;]? ?", "", entry.exact)
        source = f"arXiv:{entry.paper}" if entry.paper else ""
        where = f"kernels.masks:{name}"
        title = re.sub(r" \(arXiv:[\d.]+\)|, arXiv:[\d.]+", "", title)
        found.append(System(title, source, where, f'kernels/test_masks.py::"{name}"', status, note, f"`masks.{name}`"))
    return tuple(found)


def recipes() -> tuple[System, ...]:
    """Recipes of `Control`."""
    test = "control/test_control_recipes.py"
    return tuple(
        System(
            recipe.title,
            recipe.source,
            f"zoo.control.recipes:{name}",
            f"{test}::{name}",
            recipe.status,
            _note(recipe),
        )
        for name, recipe in sorted(RECIPES.items())
    )


def _note(recipe: Recipe) -> str:
    if recipe.missing:
        return f"not public: {recipe.missing}"
    return "recorded" if recipe.recorded else "by its properties"


def backbones() -> tuple[System, ...]:
    """Families of backbones; those with weights in the manifest have recorded logits.

    Raises:
        ValueError: a family without weights that `UNRELEASED` does not have.
    """
    released, found = bundled_manifest().entries, []
    for family in FAMILIES:
        module = sys.modules[f"{BACKBONES}.{family}"]
        heading = (module.__doc__ or family).splitlines()[0].rstrip(".")
        models = [name for name in module.MODELS if not name.startswith("test_")]
        tags = [tag for name in models for tag in get_arch_pretrained_cfgs(name) if tag in released]
        links = {released[tag].source for tag in tags}
        code = sorted({link.removeprefix("https://github.com/") for link in links if "://github.com/" in link})
        code = [link for link in code if link.count("/") == 1]
        sources = dict.fromkeys([*ARXIV.findall(heading), *code])
        if not tags and family not in UNRELEASED:
            raise ValueError(
                f"family {family!r} has no released weights; its test belongs into UNRELEASED of this file"
            )
        recorded = f"zoo/test_goldens.py::{family}", "exact", "recorded"
        test, status, note = recorded if tags else UNRELEASED[family]
        shown = ", ".join(f"`{name}`" for name in models[:3]) + (", …" if len(models) > 3 else "")
        title = re.sub(r" \([^()]*arXiv[^()]*\)", "", heading)
        found.append(System(title, ", ".join(sources), f"zoo.backbones.{family}:MODELS", test, status, note, shown))
    return tuple(found)
