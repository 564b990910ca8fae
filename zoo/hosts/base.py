"""The interface of timm that image backbones share: a stem, stages of blocks, a norm and a linear head."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NoReturn

import torch
from timm.layers import create_classifier, get_device_dtype, to_2tuple
from timm.models import named_apply
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from .blocks import Blocks, Stage


class Backbone(nn.Module):
    """Hierarchical classifier with timm's interface, on `[B, H, W, C]` maps.

    A subclass builds `patch_embed` and a `torch.nn.Sequential` of `Stage` under the name in `stages_name`, then calls
    `_build_head` and `init_weights(needs_reset=False)`. Where its stages are stored in another way, it replaces
    `_stages`, `_enter` and `_truncate`.
    """

    output_fmt: Literal["NHWC"] = "NHWC"
    stages_name: ClassVar[str] = "levels"
    stage_norm_name: ClassVar[str] = "norm{}"
    first_conv: ClassVar[str] = "patch_embed.proj"  # the convolution that timm adapts to other numbers of channels
    weight_init: str = ""  # timm's name for the initialisation

    def _build_head(
        self,
        *,
        feature_info: list[dict],
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        norm_layer: type[nn.Module],
        stage_norms: bool,
        dd: dict,
    ) -> None:
        self.in_chans, self.num_classes, self.stage_norms = in_chans, num_classes, stage_norms
        self.feature_info = feature_info
        self.num_features = feature_info[-1]["num_chs"]
        if stage_norms:
            for i, info in enumerate(feature_info):
                self.set_submodule(self.stage_norm_name.format(i), norm_layer(info["num_chs"], **dd))
        self.norm = nn.Identity() if stage_norms else norm_layer(self.num_features, **dd)
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, global_pool, input_fmt=self.output_fmt, **dd
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _build_stages(
        self,
        stages: Sequence[Sequence[nn.Module]],
        *,
        ways_down: Sequence[nn.Module | None],
        channels: Sequence[int],
        reductions: Sequence[int],
        **head: Any,
    ) -> None:
        """A `Stage` of each list of blocks, with the way down to the next, then `_build_head(**head)` and weights."""
        pairs = zip(stages, [*ways_down, None], strict=True)
        self.add_module(self.stages_name, nn.Sequential(*(Stage(list(blocks), way) for blocks, way in pairs)))
        places = enumerate(zip(channels, reductions, strict=True))
        info = [{"num_chs": n, "reduction": r, "module": f"{self.stages_name}.{i}.blocks"} for i, (n, r) in places]
        self._build_head(feature_info=info, **head)
        self.init_weights(needs_reset=False)

    @property
    def _stages(self) -> Sequence[nn.Module]:
        return getattr(self, self.stages_name)

    def _enter(self, index: int, x: Tensor) -> Tensor:
        """The map that stage `index` takes: of images `[B, in_chans, H, W]` for the first, else of the map before."""
        return self.patch_embed(x) if index == 0 else self._stages[index - 1].downsample(x)

    def _run(self, index: int, x: Tensor) -> Tensor:
        """The map that stage `index` hands out, before the way down to the next."""
        return self._stages[index](x)

    def _truncate(self, last: int) -> None:
        """Drop the stages after `last` and the way down to them."""
        setattr(self, self.stages_name, self._stages[: last + 1])
        self._stages[-1].downsample = nn.Identity()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal (std 0.02) for linear layers and bias tables, zero biases, torch's own elsewhere.

        Args:
            needs_reset: also reset layers that initialised themselves when built; for models built on "meta".
        """
        named_apply(get_init_weights_vit(self.weight_init, needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions, as in the official recipes."""
        return position_tables(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        name = self.stages_name
        fine = [(rf"^{name}\.(\d+)\.blocks\.(\d+)", None), (rf"^{name}\.(\d+)\.downsample", (99999,))]
        return {
            "stem": r"^patch_embed",
            "blocks": rf"^{name}\.(\d+)" if coarse else [*fine, (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear head, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head with `num_classes` outputs (0: none) and, unless None, another pooling ("": none)."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool, input_fmt=self.output_fmt, **get_device_dtype(self)
        )
        self.global_pool.train(self.training)
        self.head.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _norm_map(self, index: int, x: Tensor, *, final: bool) -> Tensor:
        """The map that stage `index` hands out, normalised; by the classifier's norm only after the last one."""
        if self.stage_norms:
            return self.get_submodule(self.stage_norm_name.format(index))(x)
        return self.norm(x) if final and index == len(self.feature_info) - 1 else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages before down-sampling.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: the last n stages when an int, these stages when a list, all when None.
            norm: apply the classifier's norm to the last stage's map.
            stop_early: leave out stages after the last wanted one.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns:
            the maps, or the output of `forward_features` and the maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self._stages), indices)
        last = last if stop_early else len(self._stages) - 1
        intermediates = []
        for i in range(last + 1):
            x = self._run(i, self._enter(i, x))
            if i in take:
                tap = self._norm_map(i, x, final=norm)
                intermediates.append(tap.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else tap)
        if intermediates_only:
            return intermediates
        return self._norm_map(last, x, final=True), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need; returns the indices."""
        take, last = feature_take_indices(len(self._stages), indices)
        shorter = last < len(self._stages) - 1
        if shorter:
            self._truncate(last)
            self.num_features = self.feature_info[last]["num_chs"]
        if self.stage_norms:
            for i in set(range(len(self.feature_info))) - set(take):
                self.set_submodule(self.stage_norm_name.format(i), nn.Identity())
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the last, normalised map `[B, H', W', num_features]`."""
        for i in range(len(self._stages)):
            x = self._run(i, self._enter(i, x))
        return self._norm_map(len(self._stages) - 1, x, final=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits `[B, num_classes]`, or to pooled features `[B, head_hidden_size]` with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise NotImplementedError(f"TorchScript cannot compile {name}; use torch.export or torch.compile")


class Host(Backbone):
    """A layout that takes an attention; see `Place`.

    Its arguments `attn` and `img_size` are the factory and the native input size. `set_input_size` changes the latter:
    attentions with a method `set_grid_size(grid_size)` are told.
    """

    def _grids(self, img_size: Sequence[int]) -> list[tuple[int, int]]:
        return stage_grids(img_size, [info["reduction"] for info in self.feature_info])[: len(self._stages)]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another input size native: what is learnt for one is interpolated. Windows and stripes stay."""
        size = to_2tuple(img_size)
        for stage, grid_size in zip(self._stages, self._grids(size), strict=True):
            set_grid_size(stage, grid_size)
        update_model_input_size(self, size)


class WideHeadBackbone(Backbone):
    """A backbone with a layer `pre_head`, from the last map's channels to `feature_dim`, before the head."""

    feature_dim: int
    pre_head: nn.Module
    pooled_first: ClassVar[bool] = False  # before that layer

    def _make_pre_head(self, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head with `num_classes` outputs (0: none) and, unless None, another pooling.

        Without pooling ("") the layer before the head goes, too, and the head takes every place of the map; with
        pooling again there is a new one.

        Raises:
            ValueError: "catavgmax", which pools to twice the channels that this layer takes.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        if pool == "catavgmax":
            raise ValueError(f"global_pool={pool!r} must be 'avg', 'max', 'avgmax' or ''")
        dd = get_device_dtype(self)
        super().reset_classifier(0 if pool else num_classes, pool)
        if not pool:
            self.pre_head = nn.Identity().train(self.training)
            return
        if isinstance(self.pre_head, nn.Identity):
            self.pre_head = self._make_pre_head(**dd).train(self.training)
        self.head_hidden_size, self.num_classes = self.feature_dim, num_classes
        self.head = nn.Linear(self.feature_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.head.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits `[B, num_classes]`, or to features `[B, feature_dim]` with `pre_logits`."""
        x = self.pre_head(self.global_pool(x)) if self.pooled_first else self.global_pool(self.pre_head(x))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class NumberedHost(Host):
    """A host whose stages, sequences of blocks, are attributes such as `stage1`, `stage2`, …, as in PVT and CSWin.

    `stages_name` has "{}" for the number of a stage; the first is 1. `attached_names` are attributes of the model that
    go with their stage.
    """

    stages_name: ClassVar[str] = "stage{}"
    attached_names: ClassVar[tuple[str, ...]] = ()

    @property
    def _stages(self) -> Sequence[nn.Module]:
        names = (self.stages_name.format(i) for i in range(1, len(self.feature_info) + 1))
        return [self.get_submodule(name) for name in names if hasattr(self, name)]

    def _truncate(self, last: int) -> None:
        for number in range(last + 2, len(self._stages) + 1):
            for name in (self.stages_name, *self.attached_names):
                delattr(self, name.format(number))


class ListedBackbone(Backbone):
    """A backbone with `downsample_layers`, of which the first is the stem, and `stages`, as in ConvNeXt."""

    stages_name: ClassVar[str] = "stages"
    downsample_layers: nn.ModuleList
    stages: nn.Sequential

    @property
    def patch_embed(self) -> nn.Module:
        """The stem."""
        return self.downsample_layers[0]

    def _enter(self, index: int, x: Tensor) -> Tensor:
        return self.downsample_layers[index](x)

    def _truncate(self, last: int) -> None:
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None)]
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:stages|downsample_layers)\.(\d+)" if coarse else [*fine, (r"^(?:extra_)?norm", (99999,))],
        }


def check_weight_init(weight_init: str) -> None:
    """Raises a ValueError for an initialisation that hosts do not have."""
    if weight_init not in ("", "jax"):
        raise ValueError(f"weight_init={weight_init!r} must be '' or 'jax'")


def position_tables(model: nn.Module) -> set[str]:
    """Names of parameters with two or more axes that are no weights of layers: biases and embeddings of positions."""
    leaves = ("weight", "bias")
    return {n for n, p in model.named_parameters() if p.ndim > 1 and n.rsplit(".", 1)[-1] not in leaves}


def stage_grids(img_size: Sequence[int], reductions: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of the maps of an image."""
    return [(math.ceil(img_size[0] / r), math.ceil(img_size[1] / r)) for r in reductions]


def set_grid_size(stage: nn.Module, grid_size: tuple[int, int]) -> None:
    """Make another map native to the attentions of a stage that have one."""
    for module in stage.modules():
        change: Any = getattr(module, "set_grid_size", None)
        if change is not None:
            change(grid_size)
