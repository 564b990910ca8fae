"""Blocks and stages, and the place in a block that an attention takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import checkpoint_seq
from torch import Tensor, nn

from ...kernels.common.symbolic import at_least as length_at_least
from ...layers.completion import complete


class Place(NamedTuple):
    """The place of one attention in a host.

    A host's argument `attn` is called as `attn(place, **options)` for every block, with the keyword arguments that the
    host does not know itself, and returns a module, or None where the host's own attention stays.

    Args:
        stage, block: counted from 0; blocks within their stage.
        dim, num_heads: channels and heads.
        grid: rows and columns of the map at the host's native input size.
        shift: whether a window of this block is to be shifted.
        depth: blocks of the stage.
        window: side of the host's own windows or stripes; None where it has none.
        options: `proj_drop`, `impl`, `device` and `dtype`, for the constructor of the layer.
    """

    stage: int
    block: int
    dim: int
    num_heads: int
    grid: tuple[int, int]
    shift: bool
    depth: int
    window: int | None
    options: Mapping[str, Any]

    def pick(self, values: Any) -> Any:
        """This stage's entry of a list or tuple with one entry per stage; anything else is returned as it is."""
        return values[self.stage] if isinstance(values, (list, tuple)) else values

    def is_leading(self, name: str, counts: int | Sequence[int] | None) -> bool:
        """True for the first blocks of a stage.

        Args:
            name: of the option, for the message of the error.
            counts: how many blocks of each stage are, or of the only one; None for all.

        Raises:
            ValueError: more blocks than there are, or fewer than none.
        """
        count = self.depth if counts is None else self.pick(counts)
        if not 0 <= count <= self.depth:
            raise ValueError(f"{name}={counts} must each lie in [0, depth]; stage {self.stage} has {self.depth} blocks")
        return self.block < count


AttentionFactory = Callable[..., nn.Module | None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shapes of a host's stages, and what makes its attentions and blocks.

    Args:
        attn: makes the attention of a place; see `Place`.
        attn_options: further keyword arguments of `attn`. A list or tuple has one entry per stage.
        channels, depths, num_heads, grids: of each stage.
        windows: of each stage; see `Place`. None where no stage has windows.
        options: see `Place`.
        own: makes the host's own attention of a place; None where it has none.
        block: makes a block of a place, by `block(place, attn=…, drop_path=…)`.
        drop_path_rate: rate of the last block; it grows linearly.

    Raises:
        TypeError: options without an `attn` that could take them.
        ValueError: sequences of different lengths.
    """

    attn: AttentionFactory | None
    attn_options: Mapping[str, Any]
    channels: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]
    grids: Sequence[tuple[int, int]]
    options: Mapping[str, Any]
    windows: Sequence[int | None] | None = None
    own: Callable[[Place], nn.Module] | None = None
    block: Callable[..., nn.Module] | None = None
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.attn is None and self.attn_options:
            raise TypeError(f"unexpected arguments {sorted(self.attn_options)}: they are no host's, and attn is None")
        listed = {k: v for k, v in self.attn_options.items() if isinstance(v, (list, tuple))}
        equally_long(depths=self.depths, num_heads=self.num_heads, **listed)

    def place(self, stage: int, block: int) -> Place:
        """The place of an attention."""
        return Place(
            stage,
            block,
            self.channels[stage],
            self.num_heads[stage],
            self.grids[stage],
            block % 2 == 1,
            self.depths[stage],
            None if self.windows is None else self.windows[stage],
            self.options,
        )

    def attention(self, place: Place) -> nn.Module | None:
        """The attention of a place: what `attn` makes, else the host's own, else None."""
        made = None if self.attn is None else self.attn(place, **self.attn_options)
        return self.own(place) if made is None and self.own is not None else made

    def blocks(self, stage: int) -> list[nn.Module]:
        """The blocks of one stage.

        Raises:
            ValueError: `attn` returns None for a block and the host has no attention of its own.
        """
        assert self.block is not None
        rates = calculate_drop_path_rates(self.drop_path_rate, sum(self.depths))[sum(self.depths[:stage]) :]
        blocks = []
        for i in range(self.depths[stage]):
            place = self.place(stage, i)
            attn = self.attention(place)
            if attn is None:
                raise ValueError(f"attn made nothing for block {i} of stage {stage}; this host has no own attention")
            blocks.append(self.block(place, attn=attn, drop_path=rates[i]))
        return blocks


def per_block(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a host of one stage, where a list or tuple has one entry per block, as a `Layout` takes them."""
    return {key: (value,) if isinstance(value, (list, tuple)) else value for key, value in options.items()}


def equally_long(**values: Sequence) -> None:
    """Raises a ValueError that names all arguments unless they have one length."""
    if len({len(value) for value in values.values()}) > 1:
        *some, last = (f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{', '.join(some)} and {last} must be equally long")


class Block(nn.Module):
    """Pre-norm transformer block on `[B, H, W, dim]`, with optional layer scale `gamma1`, `gamma2`."""

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None = None,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        act_layer: type[nn.Module],
        mlp_layer: Callable[..., nn.Module] = Mlp,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.empty(dim, **dd))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.empty(dim, **dd))
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scales to their initial value; submodules have their own `reset_parameters`."""
        if self.gamma1 is not None and self.gamma2 is not None:
            nn.init.constant_(self.gamma1, self.layer_scale)
            nn.init.constant_(self.gamma2, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + self.drop_path1(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma2 is None else self.gamma2 * y)


class Blocks(nn.Sequential):
    """The blocks of a stage, recomputed in the backward pass if `grad_checkpointing`; `[B, H, W, C]`."""

    grad_checkpointing = False

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint_seq(self, input) if self.grad_checkpointing else super().forward(input)


class Stage(nn.Module):
    """Blocks at one resolution, `[B, H, W, C]`, and the way down to the next, which the backbone takes by itself."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None):
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution of `[B, H, W, dim]`."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvFeedForward(nn.Module):
    """Feed-forward layer with a depthwise convolution before the activation, on `[B, H, W, dim]`."""

    def __init__(self, dim: int, hidden: int, *, act_layer: type[nn.Module], drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, **dd)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(self.fc1(x))))))


def at_least(side: int, x: Tensor) -> Tensor:
    """`[B, C, H, W]`, completed right and bottom by zeros where it has fewer than `side` rows or columns."""
    return complete(x, [length_at_least(side, n) for n in x.shape[2:]], first=2)
