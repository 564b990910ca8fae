"""Pictures of words: `python -m foveal.zoo.control.plot MODEL "a photo of a cat" cat photo --out maps.png`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .heatmap import heatmap


def overlay(image: Any, maps: Mapping[str, Tensor], path: str | Path) -> Path:
    """Draws maps of words over an image, side by side, and the image itself first.

    Args:
        image: PIL image, or array `[height, width, 3]`, of 0..255 or in 0..1; the first frame of a list.
        maps: word → `[height, width]`, or `[frames, height, width]`, of which the first is drawn.
        path: of the picture.
    """
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture = image[0] if isinstance(image, list) else image
    picture = numpy.asarray(picture)
    height, width = picture.shape[:2]
    size = (3 * (len(maps) + 1), 3 * height / width + 0.4)
    figure, axes = pyplot.subplots(1, len(maps) + 1, figsize=size, squeeze=False)
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("image")
    for axis, (word, found) in zip(axes[0, 1:], maps.items(), strict=True):
        plane = (found[0] if found.dim() == 3 else found).float()
        axis.imshow(picture)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        axis.imshow(plane.numpy(), cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
        axis.set_title(f"{word}, {float(plane.min()):.3f} to {float(plane.max()):.3f}")
    for axis in axes[0]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)


def draw_words(
    pipe: Any,
    prompt: str,
    words: Sequence[str],
    path: str | Path,
    *,
    steps: int | None = None,
    size: Any = None,
    seed: int = 0,
) -> Path:
    """Runs a pipeline once and draws the maps of words over its image.

    Args:
        pipe: of diffusers, whose tokenizers are known.
        prompt: text that holds the words.
        words: to draw.
        path: of the picture.
        steps: num_inference_steps; the pipeline's own when None.
        size: height and width; the pipeline's own when None.
        seed: of the noise.

    Raises:
        ValueError: a word that the prompt does not hold, or a generator whose tokenizers are not known.
    """
    call: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    if size is not None:
        call |= dict(zip(("height", "width"), size, strict=True))
    image, maps = heatmap(pipe, prompt, words, generator=torch.Generator().manual_seed(seed), **call)
    return overlay(image, maps, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads a pipeline, draws words of a prompt."""
    parser = argparse.ArgumentParser(prog="python -m foveal.zoo.control.plot", description=__doc__)
    parser.add_argument("model", help="folder or name of a pipeline of diffusers")
    parser.add_argument("prompt")
    parser.add_argument("words", nargs="+", help="words of the prompt")
    parser.add_argument("--out", default="words.png", help="file of the picture")
    parser.add_argument("--steps", type=int, default=None, help="num_inference_steps")
    parser.add_argument("--size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    options = {"steps": given.steps, "size": given.size, "seed": given.seed}
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(given.model)
    except (OSError, ValueError) as error:
        parser.error(f"model {given.model} cannot be opened: {str(error).splitlines()[0]}")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        print(draw_words(pipe, given.prompt, given.words, given.out, **options))
    except (OSError, ValueError) as error:  # words that the prompt does not have, a picture that cannot be written
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
