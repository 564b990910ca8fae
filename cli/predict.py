"""`foveal predict`: classes of images."""

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
    open_source,
    pick_device,
    pick_workers,
    print_json,
    print_rows,
    tell_files,
)  # fmt: skip

MOST_ROWS = 50  # images of the printed table when a file has them all


def predict(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Files, or folders of them.")],
    topk: Annotated[
        int | None, typer.Option("--topk", "-k", help="Classes of each image [1; labels: those of at least 0.5].")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a table: file, prediction, probability, ….")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw the first images with their classes: a .png file.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder for the masks that a segmentation run predicts.")] = None,
    img_size: ImgSize = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    container: Container = None,
    as_json: AsJson = False,
) -> None:
    """Name the classes, labels or values of images, or draw masks of them.

    Example: foveal predict flowers photos/ --topk 3 --csv names.csv --sheet sheet.png

    --json prints [{"file": …, "top": [{"label": …, "name": …, "probability": …}]}].
    """
    with mistakes():
        from ..zoo.inference.files import find_images

        paths = find_images(images)
        opened = open_source(model, img_size=img_size, container=container, masks=True)
        if hasattr(opened, "eval_size"):
            _predict_masks(opened, paths, masks, device=pick_device(device), as_json=as_json)
            return
        if masks is not None:
            raise ValueError(f"--masks {masks} needs a run of task=segmentation, and {model} names classes of images")
        from ..zoo.inference import predict as shelf
        from ..zoo.inference.predict import write_predictions, write_sheet

        count = pick_workers(workers, len(paths))
        made = shelf(opened, paths, topk=topk, batch_size=batch_size, num_workers=count, device=pick_device(device))
        written = [write_predictions(made, csv)] if csv else []
        written += [write_sheet(made, sheet)] if sheet else []
        if as_json:
            print_json([prediction.as_dict for prediction in made])
            return
        shown = made[:MOST_ROWS] if csv else made
        if opened.targets == "class":
            table = [["file", *[cell for _ in range(min(topk or 1, opened.num_classes)) for cell in ("class", "p")]]]
        else:
            table = [["file", opened.targets]]
        for prediction in shown:
            cells = [cell for _, name, share in prediction.top for cell in (name, f"{share:.3f}")]
            cells = cells if opened.targets == "class" else [prediction.in_words]
            row = [str(prediction.path), *([f"cannot be read: {prediction.error}"] if prediction.error else cells)]
            table.append(row + [""] * (len(table[0]) - len(row)))
        print_rows(table)
        if len(made) > len(shown):
            typer.echo(f"… and {len(made) - len(shown)} more in {csv}")
        tell_files(written)


def _predict_masks(opened: Any, paths: list[Path], folder: Path | None, *, device: Any, as_json: bool) -> None:
    """Writes the masks of images, and tells them."""
    if folder is None:
        raise ValueError("this is a run of task=segmentation: pass --masks FOLDER, for a mask of each image")
    from ..zoo.inference.segmentation import write_masks

    written, unreadable = write_masks(opened, paths, folder, device=device)
    if as_json:
        print_json({"masks": [str(path) for path in written], "unreadable": unreadable})
        return
    tell_files(written)
    for path, why in unreadable.items():
        typer.echo(f"{path} cannot be read: {why}", err=True)
