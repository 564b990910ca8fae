"""Conditions of one's own that a video run samples on the way: a table of captions, classes and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.clip_dataset import read_embedding
from ..data.folders import table_rows
from ..data.loader import mix_seed
from ..data.names import unknown_name
from ..data.pixels import UnreadableImage, read_image

COLUMNS = ("caption", "embedding", "class", "image", "last_image")
TEXT_LENGTH = 226  # tokens of an embedding, at most


@dataclass(frozen=True)
class Prompt:
    """Condition of one video.

    Attributes:
        caption: what it is called.
        arguments: of the pipeline's call.
    """

    caption: str
    arguments: Mapping[str, Any]


def _picture(path: Path, name: str) -> Image.Image:
    try:
        return read_image(path)
    except UnreadableImage as error:
        raise ValueError(f"callbacks.report.prompts: {name}={error}") from error


def read_prompts(
    table: str | Path, *, conditioning: str | None, class_names: Sequence[str] = (), text_dim: int | None = None
) -> list[Prompt]:
    """Reads a .csv file with the columns `caption`, `embedding`, `class`, `image` and `last_image`, all optional.

    Args:
        table: the file; files that it names start from its folder.
        conditioning: of the model: `class` must be there for "class", `embedding`, a safetensors file with `text`
            `[L, D]`, for "cross" and "joint"; `python -m foveal.zoo.data.texts` makes them.
        class_names: of the data.
        text_dim: D.

    Raises:
        FileNotFoundError: the table is not there.
        ValueError: no rows, a column that is unknown or missing, a class that the data do not have, a file that cannot
            be read; the message names the line.
    """
    path = Path(table)
    if not path.is_file():
        raise FileNotFoundError(f"callbacks.report.prompts={str(table)!r} does not exist")
    made = []
    for line, row in table_rows(path, key="callbacks.report.prompts"):
        unknown = [name for name in row if name and name not in COLUMNS]
        if unknown:
            raise unknown_name(f"a column of callbacks.report.prompts={str(table)!r}", unknown[0], COLUMNS)
        where = f"callbacks.report.prompts={str(table)!r}, line {line}"
        arguments: dict[str, Any] = {
            name: _picture(path.parent / row[name], name) for name in ("image", "last_image") if row.get(name)
        }
        called = row.get("caption") or row.get("class") or f"line {line}"
        if conditioning == "class":
            if row.get("class") not in class_names:
                raise unknown_name(f"{where}: class", row.get("class", ""), class_names)
            arguments["class_labels"] = [list(class_names).index(row["class"])]
        elif conditioning is not None:
            if not row.get("embedding"):
                raise ValueError(f"{where}: the column embedding is empty, and model.conditioning={conditioning!r}")
            arguments |= _text(path.parent / row["embedding"], text_dim, where)
        made.append(Prompt(called, arguments))
    if not made:
        raise ValueError(f"callbacks.report.prompts={str(table)!r} has no rows")
    return made


def _text(path: Path, text_dim: int | None, where: str) -> dict[str, Tensor]:
    """Arguments of an embedding, and of the zeros that guidance leads away from."""
    told = read_embedding(path, length=TEXT_LENGTH)
    text, mask = told["text"][told["text_mask"]][None], told["text_mask"][told["text_mask"]][None]
    if text_dim is not None and text.shape[2] != text_dim:
        raise ValueError(f"{where}: {path.name} has text of {text.shape[2]} channels, and the data of {text_dim}")
    zeros = {"negative_prompt_embeds": torch.zeros_like(text), "negative_prompt_attention_mask": mask}
    return {"prompt_embeds": text, "prompt_attention_mask": mask, **zeros}


def sample_prompts(
    pipeline: Callable[..., Any], prompts: Sequence[Prompt], *, steps: int, guidance_scale: float, **arguments: Any
) -> Tensor:
    """A video of each, `[N, C, T, H, W]` as the model makes it, on the CPU; the same noise every time.

    Args:
        pipeline: a `VideoDiTPipeline`, or called like one.
        arguments: more of its call.
    """
    made = []
    for number, prompt in enumerate(prompts):
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"} | arguments
        generator = torch.Generator().manual_seed(mix_seed(0, number))
        made.append(pipeline(**prompt.arguments, **options, generator=generator).frames.cpu())
    return torch.cat(made)
