"""Reading weights without running anything: safetensors, or PyTorch files with `weights_only=True`."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import WeightsError

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load(
    path: str | os.PathLike,
    *,
    container: str | None = None,
    device: str | torch.device = "cpu",
    suffix: str | None = None,
) -> dict[str, Tensor]:
    """Reads a flat `{parameter name: tensor}` from a `.safetensors`, `.pth`, `.pt` or `.bin` file.

    Args:
        path: the file.
        container: key that holds the state dict. None: a flat file, or the first of `state_dict_ema`, `model_ema`,
            `state_dict`, `model` that is there (timm's order).
        device: where the tensors go.
        suffix: how to read the file when its name does not say, e.g. ".pth".

    Raises:
        WeightsError: the file is missing, of another kind, damaged, holds anything but tensors (a pickle that asks
            for other objects is refused before it can run), or has no such container.
    """
    path = Path(path)
    suffix = path.suffix if suffix is None else suffix
    if not path.is_file():
        raise WeightsError(f"cannot read weights from {path}: there is no such file")
    if suffix == ".safetensors":
        data = _read_safetensors(path, device)
    elif suffix in PICKLE_SUFFIXES:
        data = _read_pickle(path, device)
    else:
        accepted = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise WeightsError(f"cannot read weights from {path}: its suffix is {suffix!r}; expected one of {accepted}")
    return _state_dict(data, container, path)


def save(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes a state dict as safetensors, in one step: the file is whole or not there.

    Tensors that share memory are written once each. Returns the path; raises WeightsError if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"cannot write weights to {path}: its suffix is {path.suffix!r}; expected '.safetensors'")
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state_dict.items()
    }
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(tensors, scratch, metadata={"format": "pt", **(metadata or {})})
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
        raise WeightsError(f"cannot write weights to {path}: {error}") from error
    return path


def check_state_dict(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor | torch.Size | tuple]) -> None:
    """Compares a state dict with what a model expects and names every difference.

    Args:
        state_dict: what was read.
        expected: name → tensor (then the kind of dtype is compared too: floating, integer, …) or shape; a model's
            own `state_dict()` will do, on the meta device too.

    Raises:
        WeightsError: names are missing or unexpected, or shapes or kinds of dtype differ.
    """
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    wrong = []
    for key in sorted(expected.keys() & state_dict.keys()):
        want, got = expected[key], state_dict[key]
        shape = want.shape if isinstance(want, Tensor) else want
        if tuple(shape) != tuple(got.shape):
            wrong.append(f"{key} has shape {tuple(got.shape)}, expected {tuple(shape)}")
        elif isinstance(want, Tensor) and _kind(want.dtype) != _kind(got.dtype):
            wrong.append(f"{key} has dtype {got.dtype}, expected {want.dtype}")
    problems = [f"missing {_some(missing)}"] if missing else []
    problems += [f"unexpected {_some(unexpected)}"] if unexpected else []
    problems += [_some(wrong, "; ")] if wrong else []
    if problems:
        raise WeightsError("weights do not fit the model: " + "; ".join(problems))


def _read_safetensors(path: Path, device: str | torch.device) -> object:
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise WeightsError(f"{path} is not a valid safetensors file ({error}); fetch it again") from error


def _read_pickle(path: Path, device: str | torch.device) -> object:
    if zipfile.is_zipfile(path):
        _refuse_compressed(path)
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch answers damaged files with whatever its parser ran into
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unsafe = _globals_asked_for(path)
        if unsafe:
            raise WeightsError(
                f"{path} is refused: its pickle asks for {', '.join(unsafe)}, and only tensors are accepted; "
                "nothing in it was run; ask its authors for a safetensors file"
            ) from error
        raise WeightsError(f"{path} cannot be read as tensors ({reason}); fetch it again") from error


def _globals_asked_for(path: Path) -> list[str]:
    """Names of the objects, other than tensors, that a pickle refers to; finds them without running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # legacy or damaged file: the first error is the one to report
        return []


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


def _state_dict(data: object, container: str | None, path: Path) -> dict[str, Tensor]:
    if container is not None:
        if not isinstance(data, Mapping) or container not in data:
            there = _some(sorted(map(str, data))) if isinstance(data, Mapping) else type(data).__name__
            raise WeightsError(f"{path} has no container {container!r}; it holds {there}")
        data = data[container]
    elif isinstance(data, Mapping):
        found = [key for key in CONTAINERS if isinstance(data.get(key), Mapping)]
        data = data[found[0]] if found else data
    if not isinstance(data, Mapping):
        raise WeightsError(f"{path} holds {type(data).__name__}; expected a mapping of parameter name → tensor")
    other = [f"{key!r} ({type(value).__name__})" for key, value in data.items() if not _named_tensor(key, value)]
    if other:
        raise WeightsError(f"{path} holds more than named tensors: {_some(other)}; name the container with container=")
    return {key: value.detach() for key, value in data.items()}


def _named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _some(items: list[str], separator: str = ", ", most: int = 8) -> str:
    rest = f"{separator}… ({len(items) - most} more)" if len(items) > most else ""
    return separator.join(items[:most]) + rest
