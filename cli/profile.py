"""`foveal profile`: parameters, multiply-adds and time of a model."""

from typing import Annotated

import typer

from .common import AsJson, Device, ImgSize, mistakes, pick_device, print_json, print_rows


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model name of timm, a run, or an exported folder.")],
    img_size: ImgSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images of a step.")] = 1,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Measured steps.")] = 10,
    operators: Annotated[int, typer.Option(help="List so many operators that take most time.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the size and the speed of a model.

    Example: foveal profile natten_dinat_t --batch-size 8 --operators 10

    Names of timm are built without weights. Numbers are named as in timm's benchmark.
    """
    with mistakes():
        found = _measure(model, img_size, batch_size, train, dtype, device, repeats, operators)
        slowest = found.pop("operators", [])
        if as_json:
            print_json(found | ({"operators": slowest} if slowest else {}))
            return
        kind = "train" if train else "infer"
        typer.echo(
            f"{model} at {found['img_size']} pixels, batch {batch_size}, {dtype}, {found['device']}\n"
            f"  {found['param_count']:.2f} M parameters, {found['infer_gmacs']:.3f} GMACs an image\n"
            f"  {found[f'{kind}_step_time']:.2f} ms a step, {found[f'{kind}_samples_per_sec']:.1f} images/s"
            + (f", {found['memory_mb']:.0f} MB" if "memory_mb" in found else "")
        )
        if slowest:
            print_rows(
                [["operator", "ms", "calls"]] + [[e["name"], f"{e['ms']:.3f}", str(e["calls"])] for e in slowest],
                right=(1, 2),
            )


def _measure(model, img_size, batch_size, train, dtype, device, repeats, operators) -> dict:
    from pathlib import Path

    import timm

    from .. import zoo  # noqa: F401
    from ..zoo.inference.profile import profile_model
    from ..zoo.inference.source import open_model
    from ..zoo.tasks.model import make_model

    options = {"batch_size": batch_size, "device": pick_device(device), "dtype": dtype, "train": train}
    options |= {"repeats": repeats, "operators": operators}
    if not Path(model).exists() and timm.is_model(model.split(".")[0]):
        cfg = timm.get_pretrained_cfg(model)
        channels, side = (cfg.input_size[0], cfg.input_size[-1]) if cfg else (3, 224)
        side = img_size or side
        classes = cfg.num_classes if cfg else 1000
        built = make_model({"name": model}, num_classes=classes, in_chans=channels, img_size=side)
        return profile_model(built, (channels, side, side), **options)
    opened = open_model(model, img_size=img_size)
    return profile_model(opened.model, tuple(opened.preprocessing["input_size"]), **options)
