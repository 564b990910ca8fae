"""A pipeline of pixels as one safetensors file: weights in half precision, its configuration as metadata.

For small pipelines that ship inside a package; `save_pretrained` writes the folders that everything else reads.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError, safe_open

from ...weights import WeightsError, load, save
from .pipeline import VideoDiTPipeline
from .transformer import VideoDiT

KEY = "pipeline"  # of the metadata
OF_PIPELINE = ("pixel_mean", "pixel_std", "sample_size", "null_text", "id2label")


def save_single_file(pipeline: VideoDiTPipeline, path: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Writes a pipeline of pixels without a text encoder.

    Args:
        pipeline: with a `FlowMatchEulerDiscreteScheduler`.
        path: of the file, `.safetensors`.
        dtype: that its weights are rounded to.

    Returns:
        The path.

    Raises:
        ValueError: a pipeline with other components.
        WeightsError: the file cannot be written.
    """
    beside = [name for name in ("vae", "text_encoder", "tokenizer") if getattr(pipeline, name) is not None]
    if beside or not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "a single file holds a transformer of pixels with a FlowMatchEulerDiscreteScheduler, and this pipeline has "
            f"{', '.join([*beside, type(pipeline.scheduler).__name__])}: use save_pretrained"
        )
    described = {
        "transformer": _public(pipeline.transformer.config),
        "scheduler": _public(pipeline.scheduler.config),
        "pipeline": {name: pipeline.config[name] for name in OF_PIPELINE},
    }
    weights = {name: value.to(dtype) for name, value in pipeline.transformer.state_dict().items()}
    return save(weights, path, metadata={KEY: json.dumps(described)})


def _public(config) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def load_single_file(path: str | Path) -> VideoDiTPipeline:
    """The pipeline that `save_single_file` wrote, in float32.

    Raises:
        WeightsError: the file is missing, damaged, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[KEY])
        model = VideoDiT(**described["transformer"])
        scheduler = FlowMatchEulerDiscreteScheduler(**described["scheduler"])
        weights = {name: value.float() for name, value in load(path).items()}
        model.load_state_dict(weights)
        return VideoDiTPipeline(model.eval(), scheduler, **described["pipeline"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is no pipeline in a single file: {str(error).splitlines()[0]}") from error
