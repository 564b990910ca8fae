"""Options and endings that commands share: a user's mistake is one sentence on stderr and exit status 2."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run's folder, a checkpoint, an exported folder, or a model name of timm (hf-hub:owner/name, too).",
        show_default=False,
    ),
]
ImgSize = Annotated[int | None, typer.Option("--img-size", help="Pixels a side; by default the model's own.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Images at a time.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one.")]
Workers = Annotated[int | None, typer.Option("--workers", "-j", help="Processes that load; by default by the cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on stdout.")]
Container = Annotated[
    str | None, typer.Option("--container", help="Other weights of a checkpoint: current_model_state, the raw ones.")
]


@contextmanager
def mistakes() -> Iterator[None]:
    """Ends the process after a mistake of the user inside with its sentence on stderr and exit status 2; faults keep
    their traceback. What is done otherwise than asked for is told on stderr, a line each."""
    shown = warnings.showwarning

    def tell(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if filename == "foveal":  # `say`
            typer.echo(f"foveal: {message}", err=True)
        elif category not in (UserWarning, FutureWarning, DeprecationWarning):
            shown(message, category, filename, lineno, *rest)

    warnings.showwarning = tell
    try:
        yield
    except (KeyboardInterrupt, SystemExit, typer.Exit):
        raise
    except Exception as error:
        from ..zoo.tasks.explain import explain

        sentence = explain(error)
        if sentence is None and isinstance(error, OSError) and error.filename:
            sentence = f"{error.filename} cannot be used: {error.strerror}"
        if sentence is None:
            raise
        fail(sentence, error)
    finally:
        warnings.showwarning = shown


def fail(sentence: str, cause: Exception | None = None) -> None:
    """Ends the process with a sentence on stderr and exit status 2."""
    typer.echo(f"foveal: error: {sentence}", err=True)
    raise typer.Exit(2) from cause


def pick_device(name: str | None) -> Any:
    """The device of this name, or a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def pick_workers(count: int | None, images: int) -> int:
    """Loading processes: none for a few images, which are there before a process is."""
    from ..zoo.data.base import MOST_WORKERS, available_cores

    if count is not None:
        return count
    return 0 if images < 256 else min(MOST_WORKERS, available_cores())


def open_source(source: str, *, img_size: int | None = None, container: str | None = None, masks: bool = False) -> Any:
    """The model that a command names, with foveal's own registered; with `masks`, also one of segmentation."""
    from .. import zoo  # noqa: F401
    from ..weights import WeightsError
    from ..zoo.inference.source import open_model

    try:
        return open_model(source, img_size=img_size, container=container)
    except WeightsError:
        if not masks or not Path(source).exists():
            raise
        from ..zoo.inference.segmentation import holds_segmenter, open_segmenter

        if not holds_segmenter(source):
            raise
        return open_segmenter(source, eval_size=img_size, container=container)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_rows(rows: list[list[str]], *, right: tuple[int, ...] = ()) -> None:
    """Prints a table: columns padded, the first row its header; `right` are the numbers of columns of numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        columns = enumerate(zip(row, widths, strict=True))
        cells = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in columns]
        typer.echo("  ".join(cells).rstrip())


def new_folder(out: Path | None, command: str) -> Path:
    """The folder for a command's files: the one given, or `runs/COMMAND/DATE_TIME`."""
    return out if out is not None else Path("runs") / command / time.strftime("%Y-%m-%d_%H-%M-%S")


def tell_files(paths: list[Path], *, as_json: bool = False) -> None:
    for path in paths:
        typer.echo(str(path), file=sys.stderr if as_json else sys.stdout)
