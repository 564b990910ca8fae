"""Classes by name: the table that a pipeline keeps, and labels from what a caller gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHOWN = 10  # names that a message lists


def check_names(id2label: Mapping[int | str, str] | None, num_classes: int | None) -> dict[str, str] | None:
    """The names of classes as a configuration keeps them, by label as text; JSON knows no other keys.

    Raises:
        ValueError: a label out of range, a name twice, or names for a model without classes.
    """
    if not id2label:
        return None
    if num_classes is None:
        raise ValueError(f"id2label={dict(id2label)} is for models with conditioning='class'")
    try:
        numbers = sorted(int(label) for label in id2label)
    except (TypeError, ValueError) as error:
        raise ValueError(f"id2label={dict(id2label)} must have integers as keys") from error
    if numbers[0] < 0 or numbers[-1] >= num_classes or len(set(numbers)) < len(numbers):
        raise ValueError(f"id2label has the labels {numbers}, the model has 0..{num_classes - 1}")
    names = {str(int(label)): str(name) for label, name in id2label.items()}
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise ValueError(f"id2label has {twice[0]!r} more than once")
    return names


def find_label(name: str, labels: Mapping[str, int]) -> int:
    """The label of a class.

    Args:
        name: of the class.
        labels: by name.

    Raises:
        ValueError: no such class; says the nearest names, or the first ones.
    """
    if name in labels:
        return labels[name]
    if not labels:
        raise ValueError(f"class_labels={name!r}: this pipeline knows no names of classes (id2label); give numbers")
    near = get_close_matches(name, labels, n=3, cutoff=0.6)
    first = ", ".join(map(repr, list(labels)[:SHOWN])) + ", …" * (len(labels) > SHOWN)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {first}"
    raise ValueError(f"class_labels={name!r} is no class of this pipeline: {hint}")


def read_labels(
    given: Any, *, labels: Mapping[str, int], num_classes: int, device: torch.device | None = None
) -> Tensor:
    """Labels `[B]` int64 of one class or several.

    Args:
        given: integers of 0 to num_classes, which is the null class, or names, one or a sequence, or a tensor.
        labels: by name.
        num_classes: of the model.

    Raises:
        ValueError: another kind of value, out of range, or an unknown name; names `class_labels`.
    """
    values = given.tolist() if isinstance(given, np.ndarray | np.generic) else given
    if not isinstance(values, Tensor):
        values = [values] if isinstance(values, str) or not isinstance(values, Sequence) else values
        values = [find_label(value, labels) if isinstance(value, str) else value for value in values]
    try:
        found = torch.as_tensor(values, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"class_labels={given!r} must be integers of 0..{num_classes} or names") from error
    kinds = found.is_floating_point() or found.is_complex() or found.dtype == torch.bool
    if kinds or not len(found) or found.min() < 0 or found.max() > num_classes:
        raise ValueError(f"class_labels={found.tolist()} must be integers of 0..{num_classes} or names")
    return found.long()
