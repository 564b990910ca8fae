"""The table of recipes in the documentation: `python -m foveal.zoo.control.table docs/steer.md` writes it anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .recipes import RECIPES

BEGIN, END = "<!-- recipes -->", "<!-- end of recipes -->"
COLUMNS = ("recipe", "paper", "status", "models", "needs", "cost", "not public")


def table() -> str:
    """Rows in the order of their names: exact ones, then partial ones, then ideas."""
    order = ("exact", "partial", "idea")
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for found in sorted(RECIPES.values(), key=lambda entry: (order.index(entry.status), entry.name)):
        paper = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", found.source)
        paper = re.sub(r"(?<![/\w])([\w.-]+/[\w.-]+)(?:@(\w+))?$", _repository, paper)
        title = f"{found.title}; {paper}"
        status = f"{found.status}, recorded" if found.recorded else found.status
        cells = (f"`{found.name}`", title, status, found.hosts, found.needs, found.cost, found.missing)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _repository(match: re.Match) -> str:
    return f"[{match[1]}](https://github.com/{match[1]}{'/tree/' + match[2] if match[2] else ''})"


def write(page: Path) -> None:
    """Replaces what stands between the marks of a page.

    Raises:
        ValueError: a page without marks.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m foveal.zoo.control.table docs/steer.md")
    write(Path(sys.argv[1]))
