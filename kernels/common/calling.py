"""Checks of how arguments fit together, and facts of a call that choose its implementation."""

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import prod
from numbers import Integral
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Impl = Literal["auto", "triton", "gluon", "torch", "reference"]
T = TypeVar("T")
PerAxis = T | Sequence[T]
PerHead = PerAxis[T] | Sequence[PerAxis[T]]  # one value, one per axis, or one of these per head
Mask = Annotated[Tensor, "bool mask or integer lengths"]
IMPLEMENTATIONS = ("triton", "torch", "reference")
ON_REQUEST = ("gluon",)  # of some operators; `impl="auto"` never takes them
HAS_TRITON = find_spec("triton") is not None
OLDEST_GLUON = (3, 6)  # of Triton, whose Gluon has what our kernels call
GLUON_HEAD_DIMS = (64, 128)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_DIM = 256


def is_integer(x: Any) -> bool:
    """Return whether `x` is an integer, of Python or NumPy, and no boolean."""
    return isinstance(x, (int, torch.SymInt, Integral)) and not isinstance(x, bool)


def entries(name: str, value: Any, kind: type) -> Sequence | None:
    """The entries of a sequence and None for a single value, both checked to be of `kind` (int or bool)."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    for entry in value if several else (value,):
        if not (is_integer(entry) if kind is int else isinstance(entry, bool)):
            kinds = "integers" if kind is int else "booleans"
            raise TypeError(f"{name}={value!r} must hold {kinds}: one, or one for each axis")
    return value if several else None


def per_axis(name: str, value: Any, rank: int, kind: type) -> tuple:
    """`value` for each of `rank` axes, checked to be of `kind` (int or bool)."""
    several = entries(name, value, kind)
    values = (value,) * rank if several is None else tuple(several)
    if len(values) != rank:
        raise ValueError(f"{name}={value!r} has {len(values)} values; expected one, or one for each of {rank} axes")
    return tuple(v if isinstance(v, (int, torch.SymInt)) else int(v) for v in values)


def is_per_head(value) -> bool:
    """Return whether an argument of the neighborhood has one entry per head: a sequence that holds a sequence."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return several and any(isinstance(entry, Sequence) for entry in value)


def check_grids(rank: int, query: Tensor, key: Tensor, value: Tensor, *, cross: bool = False) -> None:
    """Refuse what is not `[B, *spatial, heads, head_dim]` three times over, with grouped key heads at most.

    Values may have a head_dim of their own. With `cross`, keys may lie on a grid of other lengths than queries.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != rank + 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [B, {rank} spatial axes, heads, head_dim]")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}.dtype={x.dtype} must equal query.dtype={query.dtype}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)} in all but head_dim"
        )
    same = 1 if cross else -2
    if key.shape[:same] != query.shape[:same] or key.shape[-1] != query.shape[-1]:
        axes = "heads and spatial axes" if cross else "the heads axis"
        raise ValueError(f"key.shape={tuple(key.shape)} must equal query.shape={tuple(query.shape)} in all but {axes}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if any(n < 1 for n in x.shape[1:]):  # `min` would compare symbols with each other
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have no empty axis but the batch")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"query heads ({query.shape[-2]}) must be a multiple of key heads ({key.shape[-2]})")


def check_tokens(**tensors: Tensor) -> None:
    """Refuse what is not `[B, *spatial, heads, head_dim]`, each on a grid of its own: query, key, value and others.

    Value lies on the grid of key, and may have a head_dim of its own.
    """
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    for name, x in tensors.items():
        if x.dim() < 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [B, *spatial, heads, head_dim]")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}.dtype={x.dtype} must equal query.dtype={query.dtype}")
        own, alike = (-1, "heads") if name == "value" else (None, "heads and head_dim")
        if x.shape[0] != query.shape[0] or x.shape[-2:own] != query.shape[-2:own]:
            raise ValueError(
                f"{name}.shape={tuple(x.shape)} must have the batch, {alike} of query.shape={tuple(query.shape)}"
            )
        if any(n < 1 for n in x.shape[1:]):
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have no empty axis but the batch")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)} in all but head_dim"
        )


def on_grid(
    name: str, x: Tensor, rank: int, grid: Sequence[int] | None, *, features: str = "heads, head_dim"
) -> Tensor:
    """`x [B, tokens, features]` as a view `[B, *grid, features]`; as it is when `grid` is None."""
    if grid is None:
        return x
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise TypeError(f"grid must be a list or tuple, got {type(grid).__name__}")
    for i, n in enumerate(grid):
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"grid[{i}]={n!r} must be an integer, got {type(n).__name__}")
    if len(grid) != rank:
        raise ValueError(f"grid={tuple(grid)} must hold the tokens along each of {rank} spatial axes")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 3 + features.count(","):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; with grid={tuple(grid)} expected [B, tokens, {features}]")
    if any(n < 1 for n in grid) or x.shape[1] != prod(grid):
        raise ValueError(f"grid={tuple(grid)} must hold the {x.shape[1]} tokens of {name}, shape {tuple(x.shape)}")
    return x.unflatten(1, tuple(grid))


def check_additional(
    key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> None:
    """Refuse extra keys and values that do not fit `key` and `value`."""
    if additional_keys is None or additional_values is None:
        if additional_keys is not additional_values:
            raise ValueError("additional_keys and additional_values must be given together")
        return
    for name, x, like in (("additional_keys", additional_keys, key), ("additional_values", additional_values, value)):
        if x.dim() != 4 or x.shape[0] != key.shape[0] or x.shape[2:] != like.shape[-2:]:
            expected = f"[B={key.shape[0]}, tokens, key heads={key.shape[-2]}, head_dim={like.shape[-1]}]"
            raise ValueError(f"{name}.shape={tuple(x.shape)} must be {expected}")
        if x.dtype != key.dtype or x.device != key.device:
            raise ValueError(f"{name} ({x.dtype}, {x.device}) must match key ({key.dtype}, {key.device})")
    if additional_keys.shape[1] != additional_values.shape[1]:
        raise ValueError(
            f"additional_values.shape={tuple(additional_values.shape)} must have the tokens of "
            f"additional_keys.shape={tuple(additional_keys.shape)}"
        )


def additional_visibility(additional_mask: Mask | None, additional_keys: Tensor | None) -> Tensor | None:
    """Extra keys that are visible, bool `[B, tokens]`, from such a mask or integer lengths `[B]`; None: all are.

    Lengths are compared with the number of tokens where that costs nothing: on CPU, outside of graphs.
    """
    if additional_mask is None:
        return None
    if not isinstance(additional_mask, Tensor):
        raise TypeError(f"additional_mask must be a tensor, got {type(additional_mask).__name__}")
    if additional_keys is None:
        raise ValueError("additional_mask must be given together with additional_keys and additional_values")
    accepted = "a bool mask [B, tokens] or integer lengths [B]"
    (batch, tokens), shape, dtype = additional_keys.shape[:2], tuple(additional_mask.shape), additional_mask.dtype
    if dtype.is_floating_point or dtype.is_complex:
        raise TypeError(f"additional_mask.dtype={dtype} must be bool or an integer dtype: {accepted}")
    if shape != ((batch, tokens) if dtype == torch.bool else (batch,)):
        raise ValueError(f"additional_mask ({dtype}, {shape}) must be {accepted}, with B={batch}, tokens={tokens}")
    if additional_mask.device != additional_keys.device:
        raise ValueError(
            f"additional_mask.device={additional_mask.device} must equal additional_keys.device="
            f"{additional_keys.device}"
        )
    if dtype == torch.bool:
        return additional_mask
    if (
        additional_mask.device.type == "cpu"
        and is_plain_call()
        and not all(0 <= n <= tokens for n in additional_mask.tolist())
    ):
        raise ValueError(
            f"additional_mask={additional_mask.tolist()} must hold lengths from 0 to {tokens}, the extra keys"
        )
    return torch.arange(tokens, device=additional_mask.device) < additional_mask[:, None]


def old_capability(device: torch.device) -> str | None:
    """Compute capability of an NVIDIA device that is older than Triton supports, None of every other device."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():  # or fake tensors, without a device
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.major}.{properties.minor}" if properties.major < 8 else None


def triton_obstacle(
    query: Tensor,
    value: Tensor | None = None,
    limits: tuple[int, int | None] = (MAX_TRITON_HEAD_DIM, MAX_TRITON_HEAD_DIM),
) -> str | None:
    """Why the Triton kernels cannot take this call, or None when they can.

    `limits` are the largest head dims of query and of value; None for any.
    """
    if not HAS_TRITON:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and query.device.type == "cpu"
    if query.device.type != "cuda" and not interpreted:
        return f"device {query.device} is neither CUDA nor ROCm"
    if (capability := old_capability(query.device)) is not None:
        return f"compute capability {capability} is below 8.0, the oldest that Triton supports"
    if query.dtype not in TRITON_DTYPES:
        return f"dtype {query.dtype} is not float16, bfloat16 or float32"
    if query.shape[-1] > limits[0]:
        return f"head_dim {query.shape[-1]} exceeds {limits[0]}"
    if value is not None and limits[1] is not None and value.shape[-1] > limits[1]:
        return f"head_dim {value.shape[-1]} of value exceeds {limits[1]}"
    return None


@lru_cache
def triton_version() -> str | None:
    """Version of Triton, None without it."""
    for name in ("triton", "pytorch-triton"):  # of nightly builds of PyTorch
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def gluon_obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why kernels in Gluon cannot take these tensors, or None when they can: those of Hopper, in half precision, with
    heads of one of `GLUON_HEAD_DIMS` and strides that tensor descriptors have."""
    if not HAS_TRITON:
        return "triton is not installed"
    if query.device.type != "cuda" or torch.version.hip:
        return f"device {query.device} is not CUDA, and Gluon has no interpreter"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(query.device)) != (9, 0):
        return f"compute capability {found[0]}.{found[1]} is not 9.0 (H100, H200), whose instructions it consists of"
    known = triton_version()
    if known is not None and tuple(int(x) for x in re.findall(r"\d+", known)[:2]) < OLDEST_GLUON:
        return f"Triton {known} is older than 3.6, whose Gluon it is written in"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query.dtype} is not float16 or bfloat16"
    if query.shape[-1] not in GLUON_HEAD_DIMS:
        return f"head_dim {query.shape[-1]} is not one of {GLUON_HEAD_DIMS}"
    if query.shape[-1] != value.shape[-1]:
        return f"head_dim {value.shape[-1]} of value is not that of query, {query.shape[-1]}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1 or any(n == 0 or n % 8 for n in x.stride()[:-1]):  # descriptors address by 16 bytes
            return f"{name}.stride()={x.stride()} must end in 1, the others multiples of 8 and not 0"
    return None


def resolve_scale(query: Tensor, scale: float | None) -> float:
    """The factor on products of queries and keys; head_dim ** -0.5 when None."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a gradient of one of these tensors may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def tracing() -> bool:
    """Return whether tensors made now may be fake or symbolic: then nothing is kept between calls."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_plain_call() -> bool:
    """Return whether operators run one by one on tensors with data: no graph is made of them, and neither `torch.func`
    nor forward-mode differentiation asks for formulas that only PyTorch's own operators have."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not (transformed or tracing() or torch.jit.is_tracing())


def is_compiled_on_cpu(query: Tensor) -> bool:
    """Return whether `torch.compile` traces a call on CPU, where a tiled path becomes one operator of the graph.

    To compile its many small steps takes minutes, and they then run more slowly. An exported graph keeps them: it needs
    nothing but torch.
    """
    # `torch.compiler.is_exporting()` reads this, but is True in every graph of torch 2.11
    compiling = torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag
    return query.device.type == "cpu" and compiling


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operators keep the dtypes they are given: their products accumulate in float32 anyway."""
    # the meta device has no autocast; torch.amp.is_autocast_available would say so, but no graph of torch 2.11 takes it
    cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if cast else nullcontext()
