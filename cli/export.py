"""`foveal export`: a trained model as a folder of timm, an ONNX file, or a program of torch.export."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Container, ImgSize, Model, fail, mistakes, open_source, print_json


class Format(StrEnum):
    timm = "timm"
    onnx = "onnx"
    pt2 = "pt2"


class Dynamic(StrEnum):
    size = "size"
    batch = "batch"
    none = "none"


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (timm), or the .onnx or .pt2 file, to write.")],
    format: Annotated[
        Format | None, typer.Option("--format", help="By default by the suffix of OUT; without one, timm.")
    ] = None,
    dynamic: Annotated[
        Dynamic | None, typer.Option(help="Axes that stay free in .onnx and .pt2; by default as many as work.")
    ] = None,
    img_size: ImgSize = None,
    container: Container = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for use elsewhere.

    Example: foveal export runs/mine/2026-01-31_12-00-00 flowers.onnx

    timm: a folder with config.json, model.safetensors and README.md for timm.create_model("local-dir:OUT") and the
    Hugging Face hub. onnx, pt2: a file that takes any batch and, where the model does, any size; its logits are
    compared with the model's. Models of segmentation become files alone.
    """
    suffixes = {".onnx": Format.onnx, ".pt2": Format.pt2}
    chosen = format or suffixes.get(out.suffix, Format.timm)
    if chosen != Format.timm and suffixes.get(out.suffix) != chosen:
        fail(f"OUT is {out}; expected a file whose name ends in .{chosen.value} for --format {chosen.value}")
    with mistakes():
        if chosen == Format.timm:
            from .. import zoo  # noqa: F401
            from ..zoo.tasks.export import export_run

            if not Path(model).exists() or (Path(model) / "config.json").is_file():
                fail(
                    f"{model} is neither a run nor a checkpoint, of which folders for timm are made; of any model "
                    "OUT.onnx and OUT.pt2 can be written"
                )
            export_run(Path(model), out, container=container, force=force)
            hint = f'timm.create_model("local-dir:{out}", pretrained=True)'
            print_json({"path": str(out), "format": "timm"}) if as_json else typer.echo(f"{out}: {hint}")
            return
        opened = open_source(model, img_size=img_size, container=container, masks=True)
        from ..zoo.inference.export import export_onnx, export_program

        if hasattr(opened, "as_model"):  # of segmentation
            opened = opened.as_model(model)

        write = export_onnx if chosen == Format.onnx else export_program
        made = write(opened, out, dynamic=dynamic.value if dynamic else None, force=force)
        told = {"size": "any batch and size", "batch": "any batch", "none": "this batch and size only"}[made.free]
        if as_json:
            shapes = [list(shape) for shape in made.checked]
            facts = {"path": str(made.path), "format": chosen.value, "dynamic": made.free, "checked": shapes}
            print_json(facts | {"difference": made.difference})
            return
        typer.echo(
            f"{made.path}: {told}; logits of {len(made.checked)} shapes within {made.difference:.1e} of the model's"
        )
        if made.refused:
            typer.echo(f"not free: {made.refused}", err=True)
