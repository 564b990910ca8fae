"""`foveal plot`: receptive fields, block masks, the attention of a token, maps of words of a generator."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Container, Device, ImgSize, Model, mistakes, open_source, pick_device

plot = typer.Typer(
    help="Draw receptive fields, block masks, the attention of a token and maps of words.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Numbers = Annotated[str | None, typer.Option(help="One number, or one for each axis: 3,7,7.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The .png file to write.")]


def _numbers(text: str | None, name: str) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f"--{name} {text} must be numbers, such as 7 or 3,7,7") from None
    return values[0] if len(values) == 1 else values


def _check_png(out: Path) -> None:
    if out.suffix != ".png":
        raise ValueError(f"--out {out} must end in .png")


@plot.command("field")
def field(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="Tokens: 56,56 for an image, 8,28,28 for a clip.")],
    window: Annotated[str, typer.Option(help="Tokens of the window: 7, or 3,7,7.")] = "7",
    stride: Numbers = None,
    dilation: Numbers = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal on the first axis.")] = False,
    query: Annotated[str | None, typer.Option(help="Coordinate of the query: 0,12.")] = None,
    out: Out = Path("field.png"),
) -> None:
    """Draw the keys that a query of neighborhood attention sees.

    Example: foveal plot field 28,28 --window 7 --dilation 2
    """
    with mistakes():
        from ..kernels.neighborhood.plot import plot_receptive_field

        _check_png(out)
        sizes = _numbers(shape, "shape")
        sizes = (sizes,) if isinstance(sizes, int) else sizes
        assert sizes is not None
        options = {"stride": _numbers(stride, "stride"), "dilation": _numbers(dilation, "dilation")}
        options |= {"query": _numbers(query, "query")}
        plot_receptive_field(
            sizes,
            window=_numbers(window, "window"),  # pyright: ignore[reportArgumentType]
            causal=(True, *[False] * (len(sizes) - 1)) if causal else False,
            path=out,
            **{key: value for key, value in options.items() if value is not None},
        )
        typer.echo(str(out))


@plot.command("model")
def model_field(
    model: Model, img_size: ImgSize = None, container: Container = None, out: Out = Path("field.png")
) -> None:
    """Draw how the receptive field of a model's first stage grows.

    Example: foveal plot model natten_dinat_pico

    For models with neighborhood attention.
    """
    with mistakes():
        import torch

        _check_png(out)
        opened = open_source(model, img_size=img_size, container=container)
        from ..kernels.neighborhood.plot import plot_composed_receptive_field
        from ..zoo.tasks.plots import first_stage

        found = first_stage(opened.model, torch.zeros(1, *opened.preprocessing["input_size"]))
        if found is None:
            raise ValueError(f"{model} has no neighborhood attention: its tokens see everything, or other shapes")
        plot_composed_receptive_field(*found, path=out)
        typer.echo(str(out))


@plot.command("mask")
def mask(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="radial, freeswim, sta, … : masks that a grid alone makes.")
    ],
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="Tokens: 8,16,16.")],
    block: Annotated[int | None, typer.Option(help="Tokens of a block; by default the method's.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="A further argument: --set decay=2.0.")] = None,
    out: Out = Path("mask.png"),
) -> None:
    """Draw which blocks of queries see which blocks of keys.

    Example: foveal plot mask radial 8,16,16 --block 64
    """
    with mistakes():
        from ..zoo.inference.masks import draw_mask, read_options

        _check_png(out)
        sizes = _numbers(shape, "shape")
        sizes = (sizes,) if isinstance(sizes, int) else sizes
        options = read_options(option or []) | ({"block": block} if block is not None else {})
        density = draw_mask(name, sizes, out, **options)  # pyright: ignore[reportArgumentType]
        typer.echo(f"{out}: {100 * density:.1f} % of the pairs are visible")


@plot.command("attention")
def attention(
    model: Model,
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    place: Annotated[str, typer.Option(help="Of the query, vertical,horizontal, 0 to 1.")] = "0.5,0.5",
    layer: Annotated[str, typer.Option(help="Name or number of an attention layer; -1: the last.")] = "-1",
    img_size: ImgSize = None,
    container: Container = None,
    out: Out = Path("attention.png"),
) -> None:
    """Draw the attention of a token over an image.

    Example: foveal plot attention natten_dinat_s cat.jpg --place 0.4,0.6 --layer 0

    For attention on whole maps or sequences with a projection qkv: neighborhood attention, most of foveal's, ViT.
    """
    with mistakes():
        _check_png(out)
        from ..zoo.data.pixels import read_image

        try:
            row, column = (float(part) for part in place.split(","))
        except ValueError:
            raise ValueError(f"--place {place} must be two numbers from 0 to 1, such as 0.5,0.5") from None
        opened = open_source(model, img_size=img_size, container=container)
        from ..zoo.inference.attention import plot_token_attention, token_attention

        images = opened.transform(read_image(image, opened.mode))[None]
        chosen = int(layer) if layer.lstrip("-").isdigit() else layer
        found = token_attention(opened.model, images, place=(row, column), layer=chosen)
        plot_token_attention(found, opened.denormalize(images)[0], path=out)
        typer.echo(f"{out}: layer {found.layer}")


@plot.command("words")
def words(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pipeline of diffusers, a folder or a name.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    chosen: Annotated[list[str], typer.Argument(metavar="WORDS...", help="Words of the prompt, a map each.")],
    steps: Annotated[int | None, typer.Option("--steps", help="By default the pipeline's own.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Pixels, height,width: 512,768.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same image.")] = 0,
    device: Device = None,
    out: Out = Path("words.png"),
) -> None:
    """Draw which places of a generated image attend to which words.

    Example: foveal plot words stable-diffusion-v1-5/stable-diffusion-v1-5 "a photo of a cat" cat photo

    Means over heads, layers and steps, of any pipeline whose tokenizers are known: UNets, Flux, SD3, QwenImage, Wan, ….
    """
    with mistakes():
        _check_png(out)
        sizes = _numbers(size, "size")
        if size is not None and (isinstance(sizes, int) or len(sizes or ()) != 2):
            raise ValueError(f"--size {size} must be height,width, such as 512,768")
        from ..zoo.control.plot import draw_words
        from ..zoo.inference.sample import open_generator

        pipe = open_generator(model).to(pick_device(device))
        typer.echo(str(draw_words(pipe, prompt, chosen, out, steps=steps, size=sizes, seed=seed)))
