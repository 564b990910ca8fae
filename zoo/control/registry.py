"""Recipes by name: the paper, what is public of it, what it needs and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

STATUS = ("exact", "partial", "idea")
Build = TypeVar("Build", bound=Callable[..., Any])


@dataclass(frozen=True)
class Recipe:
    """A paper in a few edits or functions.

    Attributes:
        name: of the function.
        build: returns edits, or is the paper's loss, mask or step.
        title: of the system.
        source: arXiv id, or repository and commit, that the formulas are from.
        status: "exact" (fully specified), "partial" (some constants or terms are not public), "idea" (built of our
            primitives after the idea, with our constants).
        hosts: generators.
        needs: inputs and trained parts beyond the generator.
        cost: per step, over the generator.
        recorded: recording of the authors' functions that an exact recipe is held to; without one, tests hold it to
            properties of its formulas.
        missing: what is not public, of partial recipes and ideas.
    """

    name: str
    build: Callable[..., Any]
    title: str
    source: str
    status: str
    hosts: str
    needs: str
    cost: str
    missing: str = ""
    recorded: str = ""


RECIPES: dict[str, Recipe] = {}


def recipe(
    title: str,
    source: str,
    status: str,
    *,
    hosts: str,
    needs: str = "",
    cost: str,
    missing: str = "",
    recorded: str = "",
) -> Callable[[Build], Build]:
    """Registers the function of a recipe under its name.

    Raises:
        ValueError: an unknown status, something missing of an exact recipe, or nothing of another.
    """
    if status not in STATUS or (status == "exact") == bool(missing):
        raise ValueError(f"recipe {title!r} has status={status!r} of {STATUS} and missing={missing!r}")

    def register(build: Build) -> Build:
        name = build.__name__  # type: ignore[attr-defined]
        RECIPES[name] = Recipe(name, build, title, source, status, hosts, needs, cost, missing, recorded)
        return build

    return register
