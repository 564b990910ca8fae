"""Launches of Triton kernels: facts of tensors and devices, lengths of tiles, parameters that are forced."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

# Names of tables of sizes: tensor descriptors and over 160 KiB of shared memory a program (sm_90, sm_100); as much
# memory, but pointers (sm_80); less, of NVIDIA (sm_86, sm_89, sm_120: 99 KiB); CDNA, whose waves of 64 lanes have 512
# registers each (64 KiB, gfx950 160); RDNA, whose waves of 32 have 256 (64 KiB).
Device = Literal["hopper", "ampere", "ada", "amd", "rdna"]
AMD: tuple[Device, ...] = ("amd", "rdna")
LARGE_MEMORY = 160 * 1024
MIN_TILE = 16  # tokens; the smallest side of a matrix instruction
ConfigT = TypeVar("ConfigT", bound=NamedTuple)
P = ParamSpec("P")
R = TypeVar("R")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs the host microseconds a call."""
    return -(-a // b)


def tile_length(tokens: int, most: int) -> int:
    """Tokens in a tile: the next power of two, from `MIN_TILE` to `most`."""
    return max(MIN_TILE, min(most, 1 << (tokens - 1).bit_length()))


def block_d(head_dim: int) -> int:
    """Head dim as the kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def feature_parts(head_dim: int, device: Device, longest: int = 128) -> tuple[int, ...]:
    """Widths of the one or two parts in which a kernel holds vectors of a head, see `triton.features`.

    Two where they are at least a quarter shorter than one of up to `longest`: 64 and 16 of 72 features, 64 and 32 of
    96. Beyond 128 they have to be shorter by three eighths. Up to 64 exponentials are the bound on Hopper, and two
    parts only more to issue.
    """
    whole = block_d(head_dim)
    parts = whole // 2, block_d(head_dim - whole // 2)
    few = sum(parts) <= (3 * whole // 4 if whole <= 128 else 5 * whole // 8)
    if head_dim == whole or whole > longest or not few or (whole == 64 and device == "hopper"):
        return (whole,)
    return parts


class Vectors(NamedTuple):
    """Compile-time arguments of kernels that hold vectors in parts: features of a head, and widths of the parts."""

    D: int  # of query and key
    BLOCK_D: tuple[int, ...]
    DV: int  # of value and output
    BLOCK_DV: tuple[int, ...]


@lru_cache(maxsize=1024)
def vectors(head_dim: int, value_dim: int, device: Device, longest: int = 128, *, eight_bits: bool = False) -> Vectors:
    """How a kernel holds queries and keys of `head_dim` features and values of `value_dim`; see `feature_parts`.

    Matrix units take 32 numbers of `eight_bits` at a time, so queries and keys of such stay in one part.
    """
    whole = (block_d(head_dim),) if eight_bits else feature_parts(head_dim, device, longest)
    return Vectors(head_dim, whole, value_dim, feature_parts(value_dim, device, longest))


def width_constants(head_dim: int, value_dim: int) -> dict:
    """Compile-time arguments of kernels: features of a head of query and key, and of value and output."""
    return dict(D=head_dim, BLOCK_D=block_d(head_dim), DV=value_dim, BLOCK_DV=block_d(value_dim))


class Overrides(dict[str, Any]):
    """Launch parameters of one operator that are forced, by name: empty, but inside `override`."""

    def __init__(self, *names: str):
        super().__init__()
        self.names = names

    @contextmanager
    def override(self, **fields) -> Iterator[None]:
        """Force launch parameters inside the block: for tuning and for tests of rare paths.

        Raises:
            TypeError: a name that the operator does not have; the message lists those that it has.
        """
        if unknown := fields.keys() - set(self.names):
            raise TypeError(f"override() got {sorted(unknown)}; accepted: {list(self.names)}")
        before = dict(self)
        self.update(fields)
        try:
            yield
        finally:
            self.clear()
            self.update(before)

    def on(self, config: ConfigT) -> ConfigT:
        """A configuration with its fields that are forced."""
        return config._replace(**{name: value for name, value in self.items() if name in config._fields})


def grid_strides(x: Tensor, rank: int) -> tuple[int, ...]:
    """Strides of `[B, *spatial, …]` with leading spatial axes of length 1 added up to three."""
    outer = x.shape[1] * x.stride(1)
    return x.stride(0), *(outer,) * (3 - rank), *x.stride()[1:]


def kernel_strides(x: Tensor, strides: Sequence[int]) -> tuple[int | None, ...]:
    """Strides of `x` as kernels take them, which turn them into elements by `triton.memory.elements`.

    Triton makes other machine code where an integer is 1 or divisible by 16. In elements that leaves out rows of 40 or
    72 numbers in half precision, which begin at multiples of 16 bytes, too, and would be loaded by 2 bytes at a time.
    Where there are such strides all are in bytes, but for those of 1, which stay, and a None follows. Others stay in
    elements: numbers that a kernel has to compute take registers.
    """
    size = x.element_size()
    if not any(stride % 16 and stride * size % 16 == 0 for stride in strides):
        return tuple(strides)
    return *(1 if stride == 1 else stride * size for stride in strides), None


def tile_strides(x: Tensor, rank: int) -> tuple[int | None, ...]:
    """`kernel_strides` of `grid_strides`."""
    return kernel_strides(x, grid_strides(x, rank))


def grid(x: Tensor) -> tuple[Tensor, tuple[int | None, ...], tuple[int, int]]:
    """`x [B, *spatial, heads, head_dim]` on three spatial axes, its `kernel_strides`, and the lengths of the last two.

    Axes that lie behind each other in memory count as one. Only where more than three are left, `x` is copied.
    """
    lengths, strides = [x.shape[1]], [x.stride(1)]
    for length, stride in zip(x.shape[2:-2], x.stride()[2:-2], strict=True):
        if lengths[-1] == 1 or strides[-1] == length * stride or length == 1:
            strides[-1] = strides[-1] if length == 1 else stride
            lengths[-1] *= length
        else:
            lengths.append(length)
            strides.append(stride)
    if len(lengths) > 3:
        return grid(x.contiguous())
    _, y, z = lengths + [1] * (3 - len(lengths))
    all_strides = (x.stride(0), *strides, *[0] * (3 - len(strides)), *x.stride()[-2:])
    return x, kernel_strides(x, all_strides), (y, z)


def unspecialised(values: tuple[int, ...]) -> tuple[int, ...]:
    """Integers of a tuple as odd ones, 2n - 1, which kernels turn back.

    Triton makes other machine code where an integer is divisible by 16: lengths of grids gain nothing by it, and
    kernels would be compiled again for images of another size. A one stays one, and folds away an axis of length 1.
    `do_not_specialize_on_alignment` of `triton.jit` does not reach into tuples (3.8).
    """
    return tuple(2 * n - 1 for n in values)


def has_descriptors(device: torch.device) -> bool:
    """Return whether the device addresses tiles by tensor descriptors: Hopper and newer."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def aligned(*tensors: Tensor) -> bool:
    """Return whether tensor descriptors can address tensors: unit last stride, all else at multiples of 16 bytes."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


@lru_cache
def device_class(device: torch.device) -> Device:
    """Name of the table of sizes that suits a device."""
    if device.type != "cuda":
        return "hopper"
    import triton

    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)  # pyright: ignore[reportAttributeAccessIssue]
    if torch.version.hip:
        return "amd" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9") else "rdna"
    if properties["max_shared_mem"] < LARGE_MEMORY:
        return "ada"
    return "hopper" if has_descriptors(device) else "ampere"


def needs_wide(*tensors: Tensor, made: int = 0) -> bool:
    """Return whether an offset in one batch entry and head passes 32 bits, or one in `made` numbers per batch entry."""
    return made >= 2**31 or any(
        sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31 for x in tensors
    )


@lru_cache
def has_tf32(device: torch.device) -> bool:
    """Return whether matrix units take float32 as TF32 only: NVIDIA from Ampere on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def precision(query: Tensor) -> str:
    """Precision of products of float32 matrices, in Triton's names.

    To float32 accuracy, unless `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.fp32_precision`
    allows TF32. On NVIDIA that is three TF32 products (an error of 2^-22, where float32 rounds at 2^-24): products
    without the matrix units hold whole rows in registers and spill.
    """
    if query.dtype != torch.float32 or not has_tf32(query.device):
        return "ieee"
    # both set this one; `torch.get_float32_matmul_precision` raises once the second was used
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def device_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that programs build."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def with_scratch(launch: Callable[P, R]) -> Callable[P, R]:
    """Let a function launch kernels whose programs build descriptors.

    Triton takes the memory for them from an allocator of the current context. The function runs in a copy of it, so
    that the caller's own allocator stays.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import triton

        triton.set_allocator(device_scratch)
        return launch(*args, **kwargs)

    @wraps(launch)
    def in_own_context(*args: P.args, **kwargs: P.kwargs) -> R:
        return copy_context().run(run, *args, **kwargs)

    return in_own_context


def padded(values, fill) -> tuple:
    return (fill,) * (3 - len(values)) + tuple(values)
