"""One clear sentence for a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(what: str, value: str, known: Iterable[str]) -> ValueError:
    """The error for `value` not being one of `known`: says the nearest names, or lists them when they are few.

    Args:
        what: the configuration key, such as `model.name`.
        value: what was asked for.
        known: every accepted name.
    """
    known = sorted(known)
    near = get_close_matches(value, known, n=3, cutoff=0.6)
    if near:
        hint = f"did you mean {' or '.join(repr(name) for name in near)}?"
    elif len(known) <= 20:
        hint = f"accepted are {', '.join(known)}."
    else:
        hint = f"none of the {len(known)} known names is close."
    return ValueError(f"{what}={value!r} is not known: {hint}")
