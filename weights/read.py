"""Reading a file of weights without running anything: safetensors, or PyTorch files with `weights_only=True`."""

import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import WeightsError
from .low_bit import admit_low_bit

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
ZIP = b"PK\x03\x04"
SAFETENSORS_HEADER = b'{"'  # behind the eight bytes of its length
GIT_LFS = b"version https://git-lfs"


def read(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    suffix: str | None = None,
    also: Sequence[Callable] = (),
) -> object:
    """Contents of a `.safetensors`, `.pth`, `.pth.tar`, `.pt`, `.bin` or `.ckpt` file, containers included.

    Args:
        path: the file.
        device: where the tensors go.
        suffix: how to read the file when its name does not say, e.g. ".pth".
        also: classes beside tensors and plain values that a pickle may hold.

    Raises:
        WeightsError: the file is missing, empty, of another kind or damaged, or its pickle asks for other objects,
            which is refused before it can run.
    """
    path = Path(path)
    name = path.name.lower() if suffix is None else suffix.lower()
    start = _first_bytes(path)
    if name.endswith(".safetensors"):
        return _read_safetensors(path, device, start)
    if name.endswith(PICKLE_SUFFIXES):
        return _read_pickle(path, device, start, also)
    accepted = ", ".join((".safetensors", *PICKLE_SUFFIXES))
    suffix = path.suffix if suffix is None else suffix
    raise WeightsError(f"cannot read weights from {path}: its suffix is {suffix!r}; expected one of {accepted}")


def _first_bytes(path: Path) -> bytes:
    """The beginning of a regular file that may hold weights; raises WeightsError for anything else."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            inside = path / "model.safetensors"
            hint = f"; did you mean {inside}?" if inside.is_file() else "; expected a file"
            raise WeightsError(f"cannot read weights from {path}: it is a folder{hint}")
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(f"cannot read weights from {path}: it is no regular file")
        with open(path, "rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise WeightsError(f"cannot read weights from {path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read weights from {path}: {getattr(error, 'strerror', None) or error}") from error
    if not start:
        raise WeightsError(f"cannot read weights from {path}: the file is empty; fetch it again")
    if start.lstrip().startswith(b"<"):
        raise WeightsError(
            f"cannot read weights from {path}: it holds a web page, not weights; the address may need a login or "
            "another link, so fetch it by hand"
        )
    if start.startswith(GIT_LFS):
        raise WeightsError(
            f"cannot read weights from {path}: it is a Git LFS pointer, not the file; run `git lfs pull`"
        )
    return start


def _read_safetensors(path: Path, device: str | torch.device, start: bytes) -> object:
    if start.startswith(ZIP):
        raise WeightsError(f"{path} is not a valid safetensors file: it holds a PyTorch file; rename it to .pth")
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise WeightsError(
            f"{path} is not a valid safetensors file, or it is cut short ({_reason(error)}); fetch it again"
        ) from error


def _read_pickle(path: Path, device: str | torch.device, start: bytes, also: Sequence[Callable]) -> object:
    if start[8:].startswith(SAFETENSORS_HEADER):
        raise WeightsError(f"{path} cannot be read as a PyTorch file: it holds safetensors; rename it to .safetensors")
    if zipfile.is_zipfile(path):
        _refuse_compressed(path)
    try:
        with torch.serialization.safe_globals(list(also)):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch answers damaged files with whatever its parser ran into
        if admit_low_bit(error):
            return _read_pickle(path, device, start, also)
        unsafe = _globals_asked_for(path, error, also)
        if unsafe:
            raise WeightsError(
                f"{path} is refused: its pickle asks for {', '.join(unsafe)}, and only tensors are accepted; "
                "nothing in it was run; ask its authors for a safetensors file"
            ) from error
        raise WeightsError(
            f"{path} cannot be read as tensors, it is cut short, damaged or of another kind ({_reason(error)}); "
            "fetch it again"
        ) from error


def _reason(error: BaseException) -> str:
    """Kind of a library's exception and the first sentence of its message, if that is about the file."""
    sentence = str(error).strip().split("\n")[0].split(". ")[0]
    kind = type(error).__name__
    return kind if isinstance(error, pickle.UnpicklingError) or not sentence else f"{kind}: {sentence}"


def _globals_asked_for(path: Path, error: Exception, also: Sequence[Callable]) -> list[str]:
    """Names of the objects, other than tensors, that a pickle refers to; finds them without running it."""
    try:
        with torch.serialization.safe_globals(list(also)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the format before zip: torch stopped at the first of them
        return re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))


def _refuse_compressed(path: Path) -> None:
    """PyTorch stores its records as they are; a compressed one could grow without bound in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as a PyTorch file ({error}); fetch it again") from error
    if compressed:
        raise WeightsError(
            f"{path} is refused: it holds compressed records ({compressed[0]!r}), which PyTorch never writes"
        )
