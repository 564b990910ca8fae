"""Turn a finished run into weights that ship inside the wheel, for maintainers: `python -m foveal.zoo.tasks.package`.

Takes the averaged weights of a run's last checkpoint, measures them on the test images, writes
`weights/NAME.safetensors` and its manifest entry (accuracy, sha256, bytes) into the checkout. The shipped file was made
by

    python train.py experiment=digits_dinat
    python -m foveal.zoo.tasks.package
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch import nn

from ...weights import WeightsError
from ...weights.load import save
from ...weights.manifest import MANIFEST_PATH, Entry, Mirror, write_packaged_entry
from ..data.loader import PADDING
from .checkpoint import newest_checkpoint
from .export import trained_model
from .launch import check_targets

CHECKOUT = Path(__file__).resolve().parents[2]
DIGITS_SOURCE = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"


@torch.inference_mode()
def accuracy_on_test(model: nn.Module, data: LightningDataModule) -> float:
    """Top-1 on the test images, 0 to 1."""
    data.setup("test")
    model.eval()
    right = total = 0
    for images, targets in data.test_dataloader():
        right += int((model(images).argmax(dim=1) == targets).sum())
        total += int((targets != PADDING).sum())
    return right / total


def package_run(run: Path, *, name: str, license: str, source: str, manifest: Path = MANIFEST_PATH) -> Entry:
    """Writes the weights of `run` beside the manifest and enters them there.

    Args:
        run: folder of a run, with `config.yaml` and `checkpoints/last.ckpt`.
        name: `architecture.tag`.
        license, source: for the manifest; see `foveal.weights.manifest.Entry`.
        manifest: to enter them in; the file goes to its folder.

    Returns:
        The entry.

    Raises:
        WeightsError: a name, license or source that the manifest does not take, or a model of another architecture;
            nothing is written then.
    """
    path = manifest.parent / f"{name}.safetensors"
    model = trained_model(run / "checkpoints" / "last.ckpt")
    architecture = model.pretrained_cfg["architecture"]  # pyright: ignore
    if name.split(".")[0] != architecture:
        raise WeightsError(f"name is {name!r}; expected '{architecture}.tag', because {run} trained {architecture}")
    config = OmegaConf.load(run / "config.yaml")
    check_targets(config)  # pyright: ignore[reportArgumentType]
    data = instantiate(config.data, _convert_="all")
    fields = {"license": license, "source": source, "img_size": data.img_size, "num_classes": data.num_classes}
    unknown = Mirror(format="foveal", file="weights.safetensors", url="https://unknown.invalid/")
    Entry(name=name, mirrors=(unknown,), **fields)  # refuses what the manifest would, before anything is written
    accuracy = accuracy_on_test(model, data)
    save(model.state_dict(), path)
    return write_packaged_entry(
        path,
        name=name,
        metrics={"top1": round(100 * accuracy, 2)},
        notes=f"Experiment {config.name}, seed {config.seed}; top-1 on its {len(data.datasets['test'])} test images.",
        manifest_path=manifest,
        **fields,
    )


def main(
    run: Annotated[Path | None, typer.Argument(help="A run's folder; by default the newest of digits_dinat.")] = None,
    name: Annotated[str, typer.Option(help="architecture.tag of the weights.")] = "natten_dinat_pico.digits",
    license: Annotated[str, typer.Option(help="SPDX identifier.")] = "Apache-2.0",
    source: Annotated[str, typer.Option(help="https page of the data or project.")] = DIGITS_SOURCE,
) -> None:
    """Write a run's averaged weights into this checkout, with their accuracy and hash in the manifest."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise typer.BadParameter(
            "weights are packaged in a checkout of foveal, and this is an installed one; "
            "`python -m foveal.zoo.tasks.export RUN FOLDER` writes a model of yours"
        )
    if run is None:
        checkpoint = newest_checkpoint(Path("runs") / "digits_dinat")
        if checkpoint is None:
            raise typer.BadParameter("there is no run under runs/digits_dinat: train one by `python train.py`")
        run = checkpoint.parent.parent
    try:
        entry = package_run(run, name=name, license=license, source=source)
    except WeightsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    (mirror,) = entry.mirrors
    typer.echo(f"{mirror.file}: top-1 {entry.metrics['top1']} %, {mirror.bytes:,} bytes, sha256 {mirror.sha256}")


if __name__ == "__main__":
    typer.run(main)
