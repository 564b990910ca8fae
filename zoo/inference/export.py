"""Write a model as an ONNX file or a program of torch.export, compared with the model on other batches and sizes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...weights.errors import WeightsError
from ..data.foreign import reason
from .source import OpenedModel

TOLERANCE = 1e-3  # of the largest logit; reordered float32 sums of deep models differ by up to some 1e-4 of it
FREE = {"size": (0, 2, 3), "batch": (0,), "none": ()}  # axes of `[B, C, H, W]` that stay free
INPUT, OUTPUT, ABOUT = "images", "logits", "foveal.json"
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        path: of the file.
        free: axes that may have other lengths than traced: "size" (batch, height, width), "batch" or "none".
        checked: shapes of images that it was compared with the model on.
        difference: the largest of all logits.
        refused: why more axes are not free, or "".
    """

    path: Path
    free: str
    checked: tuple[tuple[int, ...], ...]
    difference: float
    refused: str = ""


def _about(opened: OpenedModel) -> dict[str, str]:
    """Names of classes and preprocessing, as JSON by name, for the file."""
    images = {key: value for key, value in opened.preprocessing.items() if value is not None}
    facts: dict[str, Any] = {"preprocessing": images}
    if opened.class_names:
        facts["class_names"] = list(opened.class_names)
    if opened.targets != "class":
        facts["targets"] = opened.targets
    return {key: json.dumps(value) for key, value in facts.items()}


def _shapes(opened: OpenedModel, free: str) -> list[tuple[int, ...]]:
    """Shapes to compare on: that which is traced, another batch, another size."""
    channels, height, width = opened.preprocessing["input_size"]
    shapes = [(2, channels, height, width)]
    if free in ("batch", "size"):
        shapes += [(1, channels, height, width), (3, channels, height, width)]
    if free == "size":
        shapes += [(1, channels, height + 32, width), (2, channels, height, width + 64)]
    return shapes


def _images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _compare(run: Run, opened: OpenedModel, shapes: list[tuple[int, ...]]) -> float:
    """The largest difference of logits.

    Raises:
        ValueError: it is beyond the tolerance on one of the shapes.
    """
    largest = 0.0
    for shape in shapes:
        images = _images(shape)
        with torch.no_grad():
            expected, found = opened.model(images), run(images)
        difference = float((found - expected).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if found.shape != expected.shape or not difference <= allowed:
            raise ValueError(f"logits of {list(shape)} differ by {difference:.2g} from the model's")
        largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of exporters, which are about their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _export(
    opened: OpenedModel, path: Path, write: Callable[[Any, Path], Run], *, dynamic: str | None, force: bool
) -> Exported:
    """Writes with as many free axes as the model allows, or with exactly those of `dynamic`."""
    if dynamic is not None and dynamic not in FREE:
        raise ValueError(f"dynamic={dynamic!r} must be one of {', '.join(FREE)}")
    if path.exists() and not force:
        raise WeightsError(f"cannot write {path}: it exists; pass --force (force=True) to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    refused, last = "", None
    for free in FREE if dynamic is None else (dynamic,):
        auto = torch.export.Dim.AUTO
        shapes = _shapes(opened, free)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            with _quiet():
                run = write(({axis: auto for axis in FREE[free]},), scratch / path.name)
                difference = _compare(run, opened, shapes)
            for file in scratch.iterdir():  # large models have their weights in a second file
                os.replace(file, path.parent / file.name)
            return Exported(path, free, tuple(shapes), difference, refused)
        except OSError:
            raise
        except Exception as error:  # exporters raise whatever they ran into
            refused = refused or f"free {free}: {reason(error)}"
            last = error
        finally:
            for file in scratch.iterdir():
                file.unlink()
            scratch.rmdir()
    raise ValueError(f"{opened.source} cannot be exported to {path.suffix} ({refused})") from last


def export_onnx(opened: OpenedModel, path: Path, *, dynamic: str | None = None, force: bool = False) -> Exported:
    """Write an ONNX file with the input `images` `[B, C, H, W]` and the output `logits` `[B, num_classes]`, of masks
    `[B, num_classes, H, W]`.

    The file holds class names and preprocessing as metadata (JSON). onnxruntime's logits are compared with the model's
    on other batches and, where they are free, other sizes; nothing is written when they differ.

    Args:
        opened: a model on the CPU.
        path: of the .onnx file.
        dynamic: axes that stay free: "size" (batch, height and width), "batch" or "none"; None: as many as work.
        force: replace an existing file.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the model cannot be exported so.
        WeightsError: the file exists.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX files need {', '.join(missing)}: pip install 'foveal[onnx]'")
    import onnxruntime

    def write(dynamic_shapes: Any, file: Path) -> Run:
        images = _images(_shapes(opened, "none")[0])
        names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
        program = torch.onnx.export(
            opened.model, (images,), dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, **names
        )
        assert program is not None
        program.model.metadata_props.update(_about(opened))
        program.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return _export(opened, path, write, dynamic=dynamic, force=force)


def export_program(opened: OpenedModel, path: Path, *, dynamic: str | None = None, force: bool = False) -> Exported:
    """Write a program of torch.export, `torch.export.load(path).module()` in Python, with class names and preprocessing
    in its extra file `foveal.json`; arguments and errors as for `export_onnx`."""

    def write(dynamic_shapes: Any, file: Path) -> Run:
        images = _images(_shapes(opened, "none")[0])
        program = torch.export.export(opened.model, (images,), dynamic_shapes=dynamic_shapes)
        torch.export.save(program, file, extra_files={ABOUT: json.dumps(_about(opened))})
        return torch.export.load(file).module()

    return _export(opened, path, write, dynamic=dynamic, force=force)
