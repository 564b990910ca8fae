"""Write a trained model as a folder that timm and the Hugging Face hub take: `python -m foveal.zoo.tasks.export`.

    python -m foveal.zoo.tasks.export runs/mine/2026-01-31_12-00-00 flowers

makes `flowers/config.json` and `flowers/model.safetensors`, from which
`timm.create_model("local-dir:flowers", pretrained=True)` builds the trained model. Neither the run's data nor its
configuration are needed, only the checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import timm
import typer
from timm.models import get_model_input_config, model_entrypoint
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import Tensor, nn

from ...weights import WeightsError, check_state_dict
from ...weights.load import parameters, save
from ...weights.read import read
from ...weights.training import CONFIG, metadata
from ..prompts import add_prompts

WHAT = {"class": "Classes", "labels": "Labels", "values": "Values"}  # that outputs are of
NOT_OF_THE_RUN = ("tag", "license", "origin_url", "description", "notes", "label_names", "label_descriptions")


def export_run(run: Path, folder: Path, *, container: str | None = None, force: bool = False) -> Path:
    """Writes the model of a run to `folder`, in the form of timm's `local-dir:` and `hf-hub:` models.

    `config.json` holds the architecture with its arguments, the classes' names and the preprocessing of the images that
    the run was evaluated on; `model.safetensors` the weights; `README.md` how to use both.

    Args:
        run: folder of a run, whose `checkpoints/last.ckpt` is taken, or a checkpoint of `foveal-train`.
        folder: to write; a new or an empty one.
        container: key of the checkpoint that holds the weights, such as `current_model_state` for the raw ones. None:
            the averaged weights, where the run had an average.
        force: replace these three files in a folder that holds some.

    Returns:
        The folder.

    Raises:
        WeightsError: no checkpoint, not one of an image model of `foveal-train`, or the folder cannot be written.
    """
    checkpoint, folder = checkpoint_of(run), Path(folder)
    data = read(checkpoint)
    config = _config(data, checkpoint)
    if "prompts" in config:
        raise WeightsError(f"{checkpoint} has prompts, which timm's folders have no place for; `foveal` opens the run")
    model = _build(config, parameters(data, container, checkpoint), checkpoint)
    with _filling(folder, force=force) as scratch:
        _write_config(model, config, scratch / "config.json")
        save(model.state_dict(), scratch / HF_SAFE_WEIGHTS_NAME, metadata=metadata(data))
        (scratch / "README.md").write_text(card(config, folder.resolve().name), encoding="utf-8")
    return folder


def read_run(run: Path, *, container: str | None = None) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model of a run, in evaluation mode, and its description; arguments and errors as for `export_run`.

    Returns:
        The model; and `architecture`, `model_args`, `num_classes`, `label_names` and `pretrained_cfg` (preprocessing).
    """
    checkpoint = checkpoint_of(run)
    data = read(checkpoint)
    config = _config(data, checkpoint)
    return _build(config, parameters(data, container, checkpoint), checkpoint), config


def trained_model(run: Path, *, container: str | None = None) -> nn.Module:
    """The model of a run, in evaluation mode; arguments and errors as for `export_run`."""
    return read_run(run, container=container)[0]


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that `run` means: itself, or `checkpoints/last.ckpt` of a run's folder.

    Raises:
        WeightsError: a folder without one.
    """
    last = Path(run) / "checkpoints" / "last.ckpt"
    if not Path(run).is_dir():
        return Path(run)
    if not last.is_file():
        raise WeightsError(f"{run} is not the folder of a run: it holds no checkpoints/last.ckpt")
    return last


def _config(data: object, checkpoint: Path) -> Mapping[str, Any]:
    """The description of its model in a checkpoint."""
    config: Any = data.get(CONFIG) if isinstance(data, Mapping) else None
    if not isinstance(config, Mapping):
        raise WeightsError(
            f"{checkpoint} does not say which timm model it is of: expected a checkpoint that this version of "
            "foveal-train made of an image model; `foveal weights convert` writes the weights alone. Models of "
            "segmentation, which timm's folders have no place for, go to OUT.onnx or OUT.pt2; of video models "
            "diffusers loads the run's folder `pipeline`"
        )
    return config


def _build(config: Mapping[str, Any], weights: dict[str, Tensor], checkpoint: Path) -> nn.Module:
    """The model that a checkpoint describes, with these weights."""
    name, arguments = config["architecture"], dict(config["model_args"])
    try:
        model = timm.create_model(name, **arguments | {"num_classes": config["num_classes"]})
    except (RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{checkpoint}: cannot build {name} with {arguments}: {error}") from error
    if not hasattr(model, "pretrained_cfg"):
        raise WeightsError(f"{checkpoint}: {name} is not built by timm's build_model_with_cfg, which local-dir: needs")
    if "prompts" in config:
        add_prompts(model, **config["prompts"])
    check_state_dict(weights, model.state_dict(), problem=f"{checkpoint} does not fit {name}")
    model.load_state_dict(weights)
    return model.eval()


def card(config: Mapping[str, Any], name: str) -> str:
    """The text of `README.md`: front matter of the Hugging Face hub, how to load and to prepare images, the classes."""
    architecture = config["architecture"]
    ours = model_entrypoint(architecture).__module__.startswith("foveal.")
    imports = "import timm\n" + ("import foveal.zoo  # registers the model\n" if ours else "")
    what = WHAT[config.get("targets", "class")]
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [image-classification, timm]",
        "---",
        f"# {name}",
        "",
        f"`{architecture}` with {config['num_classes']} {what.lower()}, trained with foveal.",
        "",
        f'```python\n{imports}\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        "```",
    ]
    if config.get("label_names"):
        lines += ["", f"{what}, in the order of the outputs: {', '.join(map(str, config['label_names']))}."]
    return "\n".join(lines) + "\n"


def _write_config(model: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    source: dict = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    model.pretrained_cfg = {key: value for key, value in source.items() if key not in NOT_OF_THE_RUN}  # pyright: ignore
    names, images = config.get("label_names"), dict(config.get("pretrained_cfg") or {})
    own = get_model_input_config(model)
    if own["fixed_input_size"] and own["input_size"] != tuple(images.get("input_size", own["input_size"])):
        del images["input_size"]  # timm takes no other size for a model whose weights are of one
    model_config = {"pretrained_cfg": images, **({"label_names": list(names)} if names else {})}
    model_config |= {"targets": config["targets"]} if "targets" in config else {}
    save_config_for_hf(model, str(path), model_config=model_config, data_config=images)


@contextmanager
def _filling(folder: Path, *, force: bool) -> Iterator[Path]:
    """A new folder to write to, whose files go to `folder` once all are there; nothing is left behind otherwise."""
    try:
        if folder.exists() and not folder.is_dir():
            raise WeightsError(f"cannot write {folder}: it is a file; expected a new or an empty folder")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            raise WeightsError(f"cannot write {folder}: it holds files; pass --force (force=True) to replace an export")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            yield Path(scratch)
            folder.mkdir(exist_ok=True)
            for file in Path(scratch).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        raise WeightsError(f"cannot write {folder}: {error.strerror or error}") from error


def main(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    container: Annotated[str | None, typer.Option(help="Other weights of the checkpoint: current_model_state.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a trained model as a folder for timm (local-dir:FOLDER) and the Hugging Face hub."""
    try:
        export_run(run, folder, container=container, force=force)
    except WeightsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f'{folder}: timm.create_model("local-dir:{folder}", pretrained=True)')


if __name__ == "__main__":
    typer.run(main)
