"""Pages of the documentation that list systems: the ledger, and tables between marks of other pages."""

from __future__ import annotations

import re
from pathlib import Path

from .absent import ABSENT
from .record import STATUS, System
from .shelves import shelves

INTRO = """# Systems

Every paper that the library implements: where it is, how far it goes, and the test that holds it. The page is written
by `python -m foveal.zoo.systems docs/systems.md` from the registries and from the tables in `zoo/systems/`; a test
compares it with them.

"Exact" is held to recorded outputs of the official code or, where no code is public, to the paper's formula. "Partial"
leaves something out, which stands beside it. "Idea" follows a text whose formula is not public, with our constants.

"""
MARK = re.compile(r"(<!-- systems: (\w+) -->\n).*?(<!-- end of systems -->)", re.DOTALL)


def link(source: str) -> str:
    """A source as Markdown: links to arXiv ids and repositories, or the venue as it is."""
    if match := re.fullmatch(r"arXiv:(\d{4}\.\d{5})", source):
        return f"[{match[1]}](https://arxiv.org/abs/{match[1]})"
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\w+))?", source):
        return f"[{match[1]}](https://github.com/{match[1]}{'/tree/' + match[2] if match[2] else ''})"
    return source


def sources(system: System) -> str:
    """Cell of the sources."""
    return ", ".join(link(part.strip()) for part in system.source.split(",")) if system.source else "–"


def rows(columns: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [columns, ("---",) * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(name: str) -> str:
    """Table of a shelf for a page about it.

    Raises:
        ValueError: an unknown shelf.
    """
    known = {shelf.name: shelf for shelf in shelves()}
    if name not in known:
        raise ValueError(f"systems: {name!r} must be one of {sorted(known)}")
    cells = [(s.name, sources(s), s.code, s.reach) for s in known[name].systems]
    return rows(("system", "source", "where", "how far"), cells)


def ledger() -> str:
    """The whole page of systems."""
    every = [system for shelf in shelves() for system in shelf.systems]
    counts = ", ".join(f"{sum(s.status == status for s in every)} {status}" for status in STATUS)
    parts = [f"{INTRO}{len(every)} entries: {counts}.\n"]
    for shelf in shelves():
        cells = [(s.name, sources(s), s.code, s.reach, f"`{s.test.partition('::')[0]}`") for s in shelf.systems]
        columns = ("system", "source", "where", "how far", "test, in `tests/`")
        parts.append(f"## {shelf.title}\n\n{rows(columns, cells)}\n")
    cells = [(a.name, link(a.source) or "–", a.reason) for a in ABSENT]
    parts.append(f"## Not here\n\n{rows(('system', 'source', 'why'), cells)}\n")
    return "\n".join(parts)


def filled(text: str) -> str:
    """A page with its marked tables written anew."""
    return MARK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n\n{match[3]}", text)


def write(page: Path) -> None:
    """Write the ledger, or the marked tables of a page that has marks."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(filled(text) if MARK.search(text) else ledger(), encoding="utf-8")
