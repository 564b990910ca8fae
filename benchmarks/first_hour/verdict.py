"""The verdict of a first hour: `verdict.json`, which the next run goes on from, and `verdict.md` for people."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .plan import Record, Step, read_json, write_whole

SENTENCES = {
    "passed": "The device gave the answer.",
    "failed": "Wrong, broken or late: these come first.",
    "skipped": "The device, or what is installed, cannot answer.",
    "cut": "The run ended within them; the next run asks again.",
    "left": "There was no time for them; the next run asks them.",
}


def load(folder: Path) -> list[Record]:
    """Records of earlier runs; none where there is no verdict, or a broken one."""
    stored = read_json(folder / "verdict.json")
    return [] if stored is None else [Record(**record) for record in stored["records"]]


def save(folder: Path, about: dict[str, str], steps: Sequence[Step], records: Sequence[Record]) -> None:
    """Write both files, each as a whole."""
    counts = dict(Counter(record.status for record in records))
    stored = {"about": about, "counts": counts, "records": [asdict(record) for record in records]}
    write_whole(folder / "verdict.json", json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "verdict.md", markdown(about, steps, records))


def _goal(goal: dict[str, Any]) -> str:
    word = "reached" if goal["reached"] else "**missed**"
    return f"{word}: {goal['what']}: {goal['found']} times, {goal['wanted']} wanted"


def markdown(about: dict[str, str], steps: Sequence[Step], records: Sequence[Record]) -> str:
    """The verdict as a page: what would change first, then every step by how it ended."""
    by_name, known = {step.name: step for step in steps}, [r for r in records if r.name in {s.name for s in steps}]
    lines = [f"# First hour on {about['device']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items() if name != "device" and value) + ".", ""]
    counts = Counter(record.status for record in known)
    ended = ", ".join(f"{counts[status]} {status}" for status in SENTENCES if counts[status])
    lines += [f"{ended or 'Nothing was run'}.", ""]
    tables = [(record, entry) for record in known for entry in record.finding.get("tables", ())]
    lines += ["## Tables that would change", ""]
    lines += [f"- {entry} ({record.name})" for record, entry in tables] or ["None."]
    goals = [_goal(goal) for record in known for goal in record.finding.get("goals", ())]
    lines += ["", "## Goals", "", *([f"- {goal}" for goal in goals] or ["None was measured."])]
    for status in ("failed", "passed", "skipped", "cut", "left"):
        chosen = [record for record in known if record.status == status]
        if not chosen:
            continue
        lines += ["", f"## {status.capitalize()}", "", SENTENCES[status], ""]
        for record in chosen:
            step = by_name[record.name]
            lines.append(
                f"- **{record.name}** ({record.seconds:.0f} s): {step.question} It would change {step.changes}."
            )
            lines += [f"    - {line}" for line in (*record.why.splitlines(), *record.finding.get("notes", ()))]
    return "\n".join(lines) + "\n"
