"""Sentences for users: a name that does not exist, what was done otherwise than asked for."""

import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from lightning.pytorch.utilities import rank_zero_only


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


@rank_zero_only
def say(what: str, details: Sequence[str] = (), most: int = 20) -> None:
    """Tells the user, once and from the main process, what else was done than was asked for.

    Args:
        what: a sentence.
        details: a line each below it.
        most: of the details that are shown; the others are counted.
    """
    shown = [f"  {detail}" for detail in details[:most]]
    more = [f"  and {len(details) - most} more"] if len(details) > most else []
    text = "\n".join([what + ":" * bool(details), *shown, *more])
    warnings.warn_explicit(text, UserWarning, filename="foveal", lineno=1)  # a line of our code would say nothing
