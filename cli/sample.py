"""`foveal sample`: clips of a video generator as GIF, MP4 or PNG."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Device, fail, mistakes, pick_device, print_json, tell_files

SUFFIXES = (".gif", ".mp4", ".png")


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A pipeline's folder, that of a video run, or digits: a model that is here."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="clip.gif, clip.mp4, or clip.png: the frames beside each other.")
    ],
    class_labels: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="Names or numbers; several times for several clips.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Of models of texts.")] = None,
    count: Annotated[int, typer.Option("--num", "-n", help="Clips of each class or prompt.")] = 1,
    steps: Annotated[int, typer.Option("--steps", help="Evaluations of the model.")] = 25,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of classifier-free guidance; 1: off. [4, or the model's own]")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="By default the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the model's own.")] = None,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clips.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Sample clips of a video generator.

    Example: foveal sample digits three.gif --class 3 --num 4

    digits is a model inside this package: handwritten digits that move. Several clips go to one file as a grid (GIF,
    PNG), or to numbered files (MP4).
    """
    if out.suffix not in SUFFIXES:
        fail(f"OUT is {out}; expected a file whose name ends in {', '.join(SUFFIXES)}")
    options = {"num_frames": frames, "height": height, "width": width}
    with mistakes():
        from ..zoo.inference.sample import sample_clips, write_clips

        clips = sample_clips(
            model,
            class_labels=class_labels,
            prompt=prompt,
            count=count,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            device=pick_device(device),
            size={key: value for key, value in options.items() if value is not None},
        )
        written = write_clips(clips, out, fps=fps)
        if as_json:
            print_json(
                {"files": [str(path) for path in written], "clips": len(clips.frames), "captions": clips.captions}
            )
            return
        tell_files(written)
