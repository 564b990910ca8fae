"""Printing for users: their names, folders and captions as they are, never as markup or emoji of rich."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A console that takes strings, in the cells of tables too, as they are."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def say(text: str, *, lead: str = "", style: str = "bold") -> None:
    """Prints a line, its `lead` in a style."""
    console().print(Text(lead, style) + Text(text))


def tell(sentence: str) -> None:
    """Prints a sentence on what went wrong to stderr."""
    console(stderr=True).print(Text("foveal-train:", "bold red") + Text(f" {sentence}"))
