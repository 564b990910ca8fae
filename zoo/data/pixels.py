"""Image files as 8-bit RGB or grey pixels: every mode of Pillow is brought to these or refused by name."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .foreign import reason

Mode = Literal["RGB", "L"]
BACKGROUND = "white"  # under transparent pixels: the page that pictures are drawn for
GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class UnreadableImage(ValueError):
    """A file that gives no image.

    Args:
        name: path of the file, or its name in a dataset.
        reason: in a few words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def mode_of(mean: tuple[float, ...]) -> Mode:
    """Mode of images with a mean per channel.

    Raises:
        ValueError: neither one channel (grey) nor three (RGB).
    """
    if len(mean) not in (1, 3):
        raise ValueError(f"data.mean={list(mean)} must have one value for grey images or three for RGB")
    return "RGB" if len(mean) == 3 else "L"


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit grey, also where Pillow keeps it in 32 bits: the whole range 0..65535 to 0..255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"its integers from {pixels.min()} to {pixels.max()} are no 16-bit pixels (0 to 65535)")
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    """Grey 0..1 to 0..255."""
    pixels = np.asarray(image)
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"its floats from {pixels.min():g} to {pixels.max():g} are no pixels (0 to 1)")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """The pixels as 8-bit RGB or grey.

    Grey of 16 bits (and integers and floats of 32 bits that hold 0..65535 and 0..1) is scaled from its whole range.
    Transparent pixels, of palettes too, are laid over white. Everything else is Pillow's conversion.

    Args:
        image: of any mode.
        mode: "RGB" or "L".

    Raises:
        ValueError: the mode has no way to 8 bits, or values out of range.
    """
    if image.mode.startswith("I"):
        image = _from_integers(image)
    elif image.mode == "F":
        image = _from_floats(image)
    elif image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.new("RGBA", above.size, BACKGROUND)
        image.alpha_composite(above)
        image = image.convert("RGB")
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


class ToMode:
    """Transform that brings an image to `mode`, for datasets that hand out images of others."""

    def __init__(self, mode: Mode):
        self.mode: Mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else to_mode(image, self.mode)

    def __repr__(self) -> str:
        return f"ToMode({self.mode!r})"


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the file's EXIF says; an EXIF block that cannot be read says nothing."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return image  # Pillow lets whatever its parser meets through, and the pixels are whole
    return ImageOps.exif_transpose(image) if turned else image


def decode(file: IO[bytes], *, name: str, mode: Mode) -> Image.Image:
    """The first image in `file`, upright, as 8-bit RGB or grey.

    Raises:
        UnreadableImage: it cannot be decoded to its last row, or its mode or values have no way to 8 bits.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return to_mode(_upright(image), mode)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError and more
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise UnreadableImage(name, "it is empty or no image" if unknown else reason(error)) from error


def read_image(path: str | Path, mode: Mode = "RGB") -> Image.Image:
    """`decode` for a path.

    Raises:
        UnreadableImage: as `decode`, or the file is gone or may not be read.
        OSError: any other failure of the file system, which is not the file's fault.
    """
    try:
        data = Path(path).read_bytes()
    except GONE as error:
        raise UnreadableImage(str(path), reason(error)) from error
    return decode(BytesIO(data), name=str(path), mode=mode)
