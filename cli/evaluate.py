"""`foveal eval`: accuracy of a model on a folder of images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    AsJson,
    BatchSize,
    Container,
    Device,
    ImgSize,
    Model,
    Workers,
    mistakes,
    new_folder,
    open_source,
    pick_device,
    pick_workers,
    print_json,
    print_rows,
    tell_files,
)  # fmt: skip

MOST_ROWS = 50  # classes of the printed table


def evaluate(
    model: Model,
    data: Annotated[Path, typer.Argument(metavar="FOLDER", help="CLASS/*.jpg, or test/, val/ or train/ of such.")],
    split: Annotated[str | None, typer.Option(help="train, val or test; by default test, else val.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="A .csv file: file and label, or the labels or values of the model.")
    ] = None,
    img_size: ImgSize = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and pictures [runs/eval/DATE_TIME].")] = None,
    container: Container = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on images whose classes, labels, values or masks are known.

    Example: foveal eval runs/mine/2026-01-31_12-00-00 photos/test

    Prints accuracy and a table per class; writes summary.json, per_class.csv, confusion.csv, confusion.png and
    predictions.csv.
    """
    with mistakes():
        opened = open_source(model, img_size=img_size, container=container, masks=True)
        if hasattr(opened, "eval_size"):
            _evaluate_masks(opened, data, split=split, out=out, as_json=as_json, device=pick_device(device))
            return
        from ..zoo.inference.evaluate import evaluate as measure
        from ..zoo.inference.evaluate import list_labelled
        from ..zoo.tasks.confusion import per_class

        if opened.targets != "class":
            options = {"batch_size": batch_size, "workers": workers, "device": pick_device(device)}
            _evaluate_table(opened, data, split=split, labels=labels, out=out, as_json=as_json, **options)
            return
        images = list_labelled(data, split=split, labels=labels)
        count = pick_workers(workers, len(images))
        found = measure(opened, images, batch_size=batch_size, num_workers=count, device=pick_device(device))
        written = found.write(new_folder(out, "eval"))
        if as_json:
            print_json(found.summary)
            return
        rows = [row for row in per_class(found.confusion, found.class_names) if row["images"]]
        table = [["class", "images", "recall", "precision", "most often taken for"]]
        for row in rows[:MOST_ROWS]:
            shares = ["–" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("recall", "precision")]
            taken = f"{row['taken_for']} ({row['mistakes']})" if row["mistakes"] else ""
            table.append([str(row["class"]), str(row["images"]), *shares, taken])
        print_rows(table, right=(1, 2, 3))
        if len(rows) > MOST_ROWS:
            typer.echo(f"… and {len(rows) - MOST_ROWS} more classes in per_class.csv")
        told = found.summary
        line = f"top-1 {told['top1']:.2f} %  top-5 {told['top5']:.2f} %  mean of classes {told['per_class']:.2f} %"
        typer.echo(f"\n{line}  loss {told['loss']:.4f}  {told['num_images']} images at {told['img_size']} pixels")
        if told["unreadable"]:
            typer.echo(f"{told['unreadable']} images could not be read and do not count: unreadable.csv")
        tell_files(written)


def _evaluate_table(
    opened: Any,
    data: Path,
    *,
    split: str | None,
    labels: str | None,
    out: Path | None,
    as_json: bool,
    batch_size: int,
    workers: int | None,
    device: Any,
) -> None:
    """Measures a model of labels or values on a table, and tells it."""
    from ..zoo.inference.tables import evaluate_table, list_targets

    images = list_targets(data, opened, split=split, labels=labels)
    count = pick_workers(workers, len(images))
    found = evaluate_table(opened, images, batch_size=batch_size, num_workers=count, device=device)
    written, told = found.write(new_folder(out, "eval")), found.summary
    if as_json:
        print_json(told)
        return
    rows = found.rows
    shown = [["–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
             for row in rows[:MOST_ROWS]]  # fmt: skip
    print_rows([list(rows[0]), *shown], right=tuple(range(1, len(rows[0]))))
    if len(rows) > MOST_ROWS:
        typer.echo(f"… and {len(rows) - MOST_ROWS} more in the table per {opened.targets.removesuffix('s')}")
    means = "  ".join(f"{name} {told[name]}" for name in ("map", "f1", "mae", "rmse", "r2") if name in told)
    typer.echo(f"\n{means}  {told['num_images']} images at {told['img_size']} pixels")
    if told["unreadable"]:
        typer.echo(f"{told['unreadable']} images could not be read and do not count: unreadable.csv")
    tell_files(written)


def _evaluate_masks(
    opened: Any, data: Path, *, split: str | None, out: Path | None, as_json: bool, device: Any
) -> None:
    """Measures a segmenter on a folder of images and masks, and tells it."""
    from ..zoo.inference.segmentation import evaluate_masks, find_pairs
    from ..zoo.tasks.mask_report import per_class

    found = evaluate_masks(opened, find_pairs(data, split=split), device=device)
    written, told = found.write(new_folder(out, "eval")), found.summary
    if as_json:
        print_json(told)
        return
    rows = per_class(found.confusion, found.class_names)
    shown = [
        [
            "–" if cell is None else f"{100 * cell:.1f} %" if isinstance(cell, float) else str(cell)
            for cell in row.values()
        ]
        for row in rows[:MOST_ROWS]
    ]
    print_rows([list(rows[0]), *shown], right=(1, 2, 3, 4))
    typer.echo(f"\nmIoU {told['miou']:.2f} %  pixels right {told['acc']:.2f} %  {told['num_images']} images")
    if told["unreadable"]:
        typer.echo(f"{told['unreadable']} images or masks cannot be read and do not count: unreadable.csv")
    tell_files(written)
