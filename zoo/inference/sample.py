"""Sample a video pipeline from its folder, and write the clips as GIF, MP4 or PNG."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import weights
from ..tasks.video_plots import plot_strips, write_grid
from ..video.export import check_path, save_clips
from ..video.single_file import load_single_file

COLUMNS = 10  # of a grid of clips, at most
GUIDANCE = 4.0  # of models that say nothing themselves
SHIPPED = {"digits": ("videodit.moving_digits.safetensors", 1.5)}  # by name: a file in `weights`, and its guidance


@dataclass(frozen=True)
class Clips:
    """Sampled clips.

    Attributes:
        frames: `[N, C, T, H, W]` in 0..1.
        captions: N, or none.
    """

    frames: Tensor
    captions: list[str]


def pipeline_folder(source: str | Path) -> Path:
    """The folder of a pipeline: itself, or `pipeline` of a run.

    Raises:
        FileNotFoundError: neither.
    """
    for folder in (Path(source), Path(source) / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{source} is neither the folder of a pipeline (model_index.json) nor a video run with a folder pipeline, nor "
        f"a model of this package ({', '.join(SHIPPED)})"
    )


def is_shipped(source: str | Path) -> bool:
    """Return whether this is the name of a model inside this package; the folder of a pipeline goes first."""
    return str(source) in SHIPPED and not any(
        (Path(source) / name).exists() for name in ("model_index.json", "pipeline")
    )


def open_pipeline(source: str | Path) -> Any:
    """The pipeline of a folder, ours or any video pipeline of diffusers, or that of a name in `SHIPPED`.

    Raises:
        FileNotFoundError: see `pipeline_folder`.
        ValueError: its class is unknown to diffusers.
    """
    if is_shipped(source):
        pipeline = load_single_file(Path(weights.__file__).with_name(SHIPPED[str(source)][0]))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    folder = pipeline_folder(source)
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name", "")
    if name == "VideoDiTPipeline":
        from ..video.pipeline import VideoDiTPipeline as kind
    else:
        import diffusers

        kind = getattr(diffusers, name, None)
        if kind is None:
            raise ValueError(f"{folder} is of the pipeline {name!r}, which this version of diffusers does not have")
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_generator(source: str) -> Any:
    """A pipeline of a folder, see `open_pipeline`, or one that diffusers knows by name and downloads."""
    if Path(source).exists():
        return open_pipeline(source)
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(source)


def _classes(given: Sequence[str], pipeline: Any) -> list[Any]:
    """Names as they are, numbers as integers where the pipeline does not know them as names."""
    names = getattr(pipeline, "labels", None) or {}
    return [int(name) if name not in names and name.lstrip("-").isdigit() else name for name in given]


def sample_clips(
    source: str | Path,
    *,
    class_labels: Sequence[str] | None = None,
    prompt: Sequence[str] | None = None,
    count: int = 1,
    steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    size: Mapping[str, int] | None = None,
) -> Clips:
    """Sample clips from a pipeline.

    Args:
        source: its folder, that of a run, or a name in `SHIPPED`.
        class_labels: names or numbers of classes; None: of a model of classes the first ones, at most ten.
        prompt: texts.
        count: clips of each class or prompt.
        steps: evaluations of the model, times two with guidance.
        guidance_scale: of classifier-free guidance; None: that of a shipped model, of others 4.
        seed: the same gives the same clips.
        device: to sample on.
        size: `num_frames`, `height`, `width`, where they are not the pipeline's own.

    Raises:
        FileNotFoundError, ValueError: see `open_pipeline`; or the pipeline refuses the arguments.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    pipeline = open_pipeline(source).to(device)
    if guidance_scale is None:
        guidance_scale = SHIPPED[str(source)][1] if is_shipped(source) else GUIDANCE
    accepted = inspect.signature(pipeline.__call__).parameters
    told: dict[str, Any] = {"prompt": list(prompt) if prompt else None}
    if class_labels and "class_labels" not in accepted:
        raise ValueError(f"{source} takes no classes: a {type(pipeline).__name__} takes --prompt")
    classes = list(class_labels or [])
    conditioning = getattr(getattr(pipeline, "transformer", None), "config", {}).get("conditioning")
    if not classes and not prompt and conditioning == "class":
        names = list(getattr(pipeline, "labels", None) or [])
        classes = names[:10] or [str(i) for i in range(min(10, pipeline.transformer.config.num_classes))]
    if classes:
        told["class_labels"] = _classes(classes, pipeline)
    told |= {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "np"}
    told |= {"num_videos_per_prompt": count, "generator": torch.Generator("cpu").manual_seed(seed), **(size or {})}
    unknown = [name for name in size or {} if name not in accepted]
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} does not take {', '.join(unknown)}")
    made = pipeline(**{name: value for name, value in told.items() if value is not None and name in accepted}).frames
    frames = torch.from_numpy(np.asarray(made)).permute(0, 4, 1, 2, 3).float()  # [N, C, T, H, W]
    captions = [text for text in (classes or list(prompt or [])) for _ in range(count)]
    return Clips(frames, captions if len(captions) == len(frames) else [""] * len(frames))


def write_clips(clips: Clips, path: Path, *, fps: float = 8) -> list[Path]:
    """Writes clips to a .gif file (a grid), a .png file (a clip a row), or .mp4 files (numbered, if several).

    Raises:
        ValueError: another suffix.
        ImportError: films need PyAV and it is not installed.
    """
    frames = clips.frames
    if path.suffix == ".gif":
        count = len(frames)  # full rows, if they are not short
        columns = next((n for n in range(min(COLUMNS, count), 4, -1) if count % n == 0), min(COLUMNS, count))
        return [write_grid(frames, captions=clips.captions, columns=columns, path=path, fps=round(fps), side=96)]
    if path.suffix == ".png":
        return [plot_strips(frames, None, captions=clips.captions, title=f"{len(frames)} clips", path=path)]
    check_path(path, path.suffix.removeprefix("."))
    pixels = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).numpy()
    films = [
        [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in clip] for clip in pixels
    ]
    return save_clips(films, path, kind=path.suffix.removeprefix("."), fps=fps)
