"""`foveal weights …`: list, fetch, verify and convert weights from a shell."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .cache import cached_path, check, default_cache_dir
from .errors import WeightsError
from .fetch import fetch
from .load import parameters, save
from .manifest import Entry, Manifest, Mirror, load_manifest, lookup
from .read import read
from .training import metadata
from .transfer import Transfer

app = typer.Typer(help="foveal: vision backbones and video generators on efficient attention.", no_args_is_help=True)
weights = typer.Typer(help="List, fetch, verify and convert pretrained weights.", no_args_is_help=True)
app.add_typer(weights, name="weights")

CacheDir = Annotated[Path | None, typer.Option(help="Where files are kept; by default in the user's cache.")]
ManifestPath = Annotated[Path | None, typer.Option("--manifest", help="Another manifest than the bundled one.")]
Loopback = Annotated[bool, typer.Option("--loopback-http", hidden=True)]


@app.callback()
def _main() -> None:
    """Keeps `weights` a sub-command while it is the only one."""


@weights.command("list")
def list_weights(
    pattern: Annotated[str, typer.Argument(help="Show only names that contain this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    cache_dir: CacheDir = None,
    manifest: ManifestPath = None,
) -> None:
    """Show known weights: size, license, top-1 accuracy (percent) and whether they are cached."""
    with _one_sentence_errors():
        known = load_manifest(manifest)
        root = _root(cache_dir)
        rows = [_row(entry, known, root) for name, entry in known.entries.items() if pattern in name]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    for title in ("size", "license", "top-1", "cached"):
        table.add_column(title, justify="left" if title == "license" else "right", no_wrap=True)
    for row in rows:
        top1 = "–" if row["top1"] is None else str(row["top1"])
        table.add_row(row["name"], _size(row["bytes"], row["params"]), row["license"], top1, row["cached"] or "–")
    _console().print(table)
    _console().print(f"{len(rows)} weights; cache: {root}", style="dim", soft_wrap=True)
    if any(row["bytes"] is None for row in rows):
        _console().print("~: parameters in float32, where no file size is published", style="dim", soft_wrap=True)


@weights.command("fetch")
def fetch_weights(
    names: Annotated[list[str], typer.Argument(help="Names as `foveal weights list` shows them.")],
    format: Annotated[str | None, typer.Option(help="Only files of this format: official, transformers.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use nothing but what is cached.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    cache_dir: CacheDir = None,
    manifest: ManifestPath = None,
    loopback_http: Loopback = False,
) -> None:
    """Download weights, verify them and print their paths."""
    with _one_sentence_errors():
        known = load_manifest(manifest)
        for name in names:
            path = fetch(
                name,
                format=format,
                cache_dir=cache_dir,
                offline=offline or None,
                progress=not quiet,
                manifest=known,
                transfer=Transfer(loopback_http=loopback_http),
            )
            typer.echo(path)


@weights.command("verify")
def verify_weights(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all that are cached.")] = None,
    cache_dir: CacheDir = None,
    manifest: ManifestPath = None,
) -> None:
    """Hash cached and packaged files again; exit with 1 if one is damaged or a name given here is not cached."""
    with _one_sentence_errors():
        known = load_manifest(manifest)
        root = _root(cache_dir)
        entries = [lookup(name, known) for name in names] if names else list(known.entries.values())
        bad = 0
        for entry in entries:
            results = [check(_path(entry, mirror, known, root), mirror, rehash=True) for mirror in entry.mirrors]
            for mirror, result in zip(entry.mirrors, results, strict=True):
                if result.state != "missing":
                    typer.echo(f"{result.state:9} {entry.name} {mirror.file} {result.detail}".rstrip())
            bad += sum(result.state == "corrupt" for result in results)
            if names and all(result.state == "missing" for result in results):
                typer.echo(f"missing   {entry.name}")
                bad += 1
    if bad:
        _fail(f"{bad} of these are damaged or missing; `foveal weights fetch` gets them again")


@weights.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(help="A .ckpt, .pth, .pt, .bin or .safetensors file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    container: Annotated[str | None, typer.Option(help="Key that holds the state dict.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Rewrite a checkpoint as a flat safetensors file with the model's own parameter names.

    Of a checkpoint of foveal-train these are the averaged weights, and the metadata say which model they are of.
    """
    with _one_sentence_errors():
        if os.path.lexists(target) and not force:
            raise WeightsError(f"{target} exists; pass --force to replace it")
        data = read(source)
        tensors = parameters(data, container, source)
        save(tensors, target, metadata={"converted_from": source.name, **metadata(data)})
    typer.echo(f"{target}: {len(tensors)} tensors, {_size(target.stat().st_size)}")


def _row(entry: Entry, manifest: Manifest, root: Path) -> dict:
    """Row of `list`; a file counts as cached if it exists, `verify` checks its contents."""
    paths = [_path(entry, mirror, manifest, root) for mirror in entry.mirrors]
    there = [path for path in paths if path.is_file()]
    known = [mirror.bytes for mirror in entry.mirrors if mirror.bytes is not None]
    packaged = entry.mirrors[0].package is not None
    return {
        "name": entry.name,
        "bytes": there[0].stat().st_size if there else known[0] if known else None,
        "params": entry.params,
        "license": entry.license,
        "top1": entry.metrics.get("top1"),
        "cached": ("packaged" if packaged else "yes") if there else "",
        "source": entry.source,
    }


def _path(entry: Entry, mirror: Mirror, manifest: Manifest, root: Path) -> Path:
    return manifest.folder / mirror.file if mirror.package is not None else cached_path(root, entry.name, mirror.file)


def _root(cache_dir: Path | None) -> Path:
    return default_cache_dir() if cache_dir is None else cache_dir.expanduser()


def _size(size: int | None, params: int | None = None) -> str:
    """The size of a file, or of so many parameters when the file's is not known."""
    if size is None:
        return f"~{4 * params / 1e6:.0f} MB" if params is not None else "?"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _console() -> Console:
    """As wide as the terminal, wide enough for whole names when piped into another program; text is never markup."""
    return Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    try:
        yield
    except WeightsError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
