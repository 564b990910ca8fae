"""Frozen surfaces: what users, checkpoints and experiment files name stays as it is unless a change means to move it.

Each surface is one snapshot in `frozen/`. A change that is meant is written down by

    make test ARGS="tests/house/test_frozen.py --freeze"

and shows in the diff of the snapshot.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path

import foveal.zoo  # noqa: F401  registers the models
import pytest
import timm
import yaml
from meta_models import without_data

FROZEN = Path(__file__).parent / "frozen"
ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "foveal.kernels.compat.natten",
    "foveal.kernels.ops",
    "foveal.layers",
    "foveal.weights",
    "foveal.zoo",
    "foveal.zoo.accelerate",
    "foveal.zoo.data",
    "foveal.zoo.sites",
    "foveal.zoo.video",
)
PLACES = r" at 0x[0-9a-f]+|(?<=PosixPath\(').*(?=/weights)"  # of objects in memory, of the checkout on the disk
OURS = sorted(
    name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("foveal.")
)


def parameters(target) -> str:
    """Parameters as they are called: `*` before those by keyword only, defaults as Python writes them."""
    shown, keyword_only = [], False
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(f"{stars}{parameter.name}{re.sub(PLACES, '', default)}")
    return ", ".join(shown)


def public_names() -> dict:
    """Parameters of each public function and class, by module and name."""
    surface = {}
    for module_name in MODULES:
        module = import_module(module_name)
        for name in sorted(module.__all__):
            found = getattr(module, name)
            takes = callable(found) and not (inspect.isclass(found) and issubclass(found, Exception | Enum))
            surface[f"{module_name}.{name}"] = parameters(found) if takes else type(found).__name__
    return surface


def models() -> dict:
    """Checkpoint tags of each registered model."""
    tags = {name: [] for name in OURS}
    for full in timm.list_models(include_tags=True):
        name, _, tag = full.partition(".")
        if name in tags and tag:
            tags[name].append(tag)
    return tags


def config_keys() -> dict:
    """Keys of each configuration file, nested ones joined by dots."""

    def keys(node, prefix=""):
        for key, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{key}"
            yield from keys(value, f"{prefix}{key}.")

    files = sorted((ROOT / "configs").rglob("*.yaml"))
    return {
        path.relative_to(ROOT / "configs").as_posix(): [
            key for key in keys(yaml.safe_load(path.read_text())) if not key.startswith(("defaults", "hydra."))
        ]
        for path in files
    }


def state_dict_keys() -> dict:
    """Keys of each model but the largest with numbers as `#`, and a digest of all keys and shapes."""
    surface = {}
    for name in (name for name in OURS if not name.endswith(("_b", "_l", "_384")) and "_b_" not in name):
        with without_data():
            state = timm.create_model(name).state_dict()
        listing = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
        patterns = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "#", key) for key in state})
        surface[name] = {"keys": patterns, "sha256": hashlib.sha256(listing.encode()).hexdigest()}
    return surface


@pytest.mark.parametrize("surface", [public_names, models, config_keys, state_dict_keys], ids=lambda f: f.__name__)
def test_surface_is_frozen(surface: Callable[[], dict], request):
    path = FROZEN / f"{surface.__name__}.json"
    found = json.loads(json.dumps(surface()))
    assert found and OURS
    if request.config.getoption("--freeze"):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    frozen = json.loads(path.read_text())
    moved = [f"- {name}: {frozen[name]}" for name in frozen if found.get(name) != frozen[name]]
    moved += [f"+ {name}: {found[name]}" for name in found if found[name] != frozen.get(name)]
    assert not moved, "changed, see this file's docstring:\n" + "\n".join(moved)
