"""Turn a finished run into weights that ship inside the wheel: `python -m foveal.zoo.tasks.export`.

Takes the averaged weights of a run's last checkpoint, measures them on the test images, writes
`weights/NAME.safetensors` and its manifest entry (accuracy, sha256, bytes). The shipped file was made by

    python train.py experiment=digits_dinat
    python -m foveal.zoo.tasks.export
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from ...weights.manifest import MANIFEST_PATH, write_packaged_entry
from ..data.loader import PADDING
from .checkpoint import newest_checkpoint
from .launch import check_targets

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


def export_run(run: Path, *, name: str, licence: str, source: str, manifest: Path = MANIFEST_PATH) -> Path:
    """Writes the weights of `run` beside the manifest and enters them there.

    Args:
        run: folder of a run, with `config.yaml` and `checkpoints/last.ckpt`.
        name: `architecture.tag`.
        licence, source: for the manifest; see `foveal.weights.manifest.Entry`.
        manifest: to enter them in; the file goes to its folder.

    Returns:
        The safetensors file.
    """
    config = OmegaConf.load(run / "config.yaml")
    check_targets(config)  # pyright: ignore[reportArgumentType]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    weights = {
        key.removeprefix("model."): value.contiguous()
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("model.")
    }
    data = instantiate(config.data, _convert_="all")
    args = OmegaConf.to_container(config.model.args) if config.model.args else {}
    model = timm.create_model(
        config.model.name,
        num_classes=data.num_classes,
        in_chans=len(data.mean),
        **args,  # pyright: ignore
    )
    model.load_state_dict(weights)
    accuracy = accuracy_on_test(model, data)
    path = manifest.parent / f"{name}.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it is written for its owner only, and goes into wheels
    entry = write_packaged_entry(
        path,
        name=name,
        metrics={"top1": round(100 * accuracy, 2)},
        licence=licence,
        source=source,
        img_size=data.img_size,
        num_classes=data.num_classes,
        notes=f"Experiment {config.name}, seed {config.seed}; top-1 on its {len(data.datasets['test'])} test images.",
        manifest_path=manifest,
    )
    (mirror,) = entry.mirrors
    Console().print(
        f"{path}: top-1 {100 * accuracy:.2f} %, {mirror.bytes:,} bytes, sha256 {mirror.sha256}", soft_wrap=True
    )
    return path


def main(
    run: Annotated[Path | None, typer.Argument(help="A run's folder; by default the newest of digits_dinat.")] = None,
    name: Annotated[str, typer.Option(help="architecture.tag of the weights.")] = "natten_dinat_pico.digits",
    licence: Annotated[str, typer.Option(help="SPDX identifier.")] = "Apache-2.0",
    source: Annotated[str, typer.Option(help="https page of the data or project.")] = DIGITS_SOURCE,
) -> None:
    """Write a run's averaged weights into the package, with their accuracy and hash in the manifest."""
    if run is None:
        checkpoint = newest_checkpoint(Path("runs") / "digits_dinat")
        if checkpoint is None:
            raise typer.BadParameter("there is no run under runs/digits_dinat: train one by `python train.py`")
        run = checkpoint.parent.parent
    export_run(run, name=name, licence=licence, source=source)


if __name__ == "__main__":
    typer.run(main)
