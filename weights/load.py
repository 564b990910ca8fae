"""State dicts: read from files, written as safetensors, compared with what a model expects."""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import WeightsError
from .read import read
from .training import is_lightning, model_names, own_names

AVERAGED = ("state_dict_ema", "model_ema")
CONTAINERS = (*AVERAGED, "state_dict", "model")


def load(
    path: str | os.PathLike,
    *,
    container: str | None = None,
    device: str | torch.device = "cpu",
    suffix: str | None = None,
) -> dict[str, Tensor]:
    """Reads a flat `{parameter name: tensor}` from a `.safetensors`, `.pth`, `.pth.tar`, `.pt`, `.bin` or `.ckpt` file.

    Names are the model's own: what torch.compile, DDP, FSDP and a Lightning module put around them is left out.

    Args:
        path: the file.
        container: key that holds the state dict. None: a flat file, or the first of `state_dict_ema`, `model_ema`,
            `state_dict`, `model` that is there (timm's order); of checkpoints of `foveal-train` the averaged weights.
        device: where the tensors go.
        suffix: how to read the file when its name does not say, e.g. ".pth".

    Raises:
        WeightsError: the file is missing, of another kind, damaged, holds anything but tensors (a pickle that asks
            for other objects is refused before it can run), or has no such container.
    """
    return parameters(read(path, device=device, suffix=suffix), container, path)


def parameters(data: object, container: str | None, path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in what `read` returned, as `load` gives it; `path` is for messages.

    Raises:
        WeightsError: there is no such container, or it holds more than named tensors.
    """
    lightning = is_lightning(data)
    if container is not None:
        if not isinstance(data, Mapping) or container not in data:
            there = _some(sorted(map(str, data))) if isinstance(data, Mapping) else type(data).__name__
            raise WeightsError(f"{path} has no container {container!r}; it holds {there}")
        data = data[container]
    elif isinstance(data, Mapping):
        container = next((key for key in CONTAINERS if isinstance(data.get(key), Mapping)), None)
        data = data if container is None else data[container]
    if not isinstance(data, Mapping):
        raise WeightsError(f"{path} holds {type(data).__name__}; expected a mapping of parameter name → tensor")
    other = [f"{key!r} ({type(value).__name__})" for key, value in data.items() if not _named_tensor(key, value)]
    if other:
        raise WeightsError(f"{path} holds more than named tensors: {_some(other)}; name the container with container=")
    named = model_names(data) if lightning and container not in AVERAGED else own_names(data)
    return {key: value.detach() for key, value in named.items()}


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


def check_state_dict(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | torch.Size | tuple],
    *,
    problem: str = "weights do not fit the model",
) -> None:
    """Compares a state dict with what a model expects and names every difference.

    Args:
        state_dict: what was read.
        expected: name → tensor (then the kind of dtype is compared too: floating, integer, …) or shape; a model's
            own `state_dict()` will do, on the meta device too.
        problem: how the message begins.

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
        raise WeightsError(f"{problem}: {'; '.join(problems)}")


def _named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _some(items: list[str], separator: str = ", ", most: int = 8) -> str:
    rest = f"{separator}… ({len(items) - most} more)" if len(items) > most else ""
    return separator.join(items[:most]) + rest
