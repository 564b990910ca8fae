"""What the channel-last image backbones share: timm's model interface over a stem, stages, a norm and a linear head."""

from functools import partial
from typing import ClassVar, Literal

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models import checkpoint_seq, named_apply
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from ..kernels.symbolic import at_least as length_at_least
from ..layers.completion import complete


def at_least(side: int, x: Tensor) -> Tensor:
    """`[B, C, H, W]`, completed right and bottom by zeros where it has fewer than `side` rows or columns."""
    return complete(x, [length_at_least(side, n) for n in x.shape[2:]], first=2)


class Stage(nn.Module):
    """Blocks at one resolution, then the way down to the next; `[B, H, W, C]` in and out."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample or nn.Identity()
        self.grad_checkpointing = False

    def forward_blocks(self, x: Tensor) -> Tensor:
        """The map before down-sampling."""
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.forward_blocks(x))


class Backbone(nn.Module):
    """Hierarchical classifier with timm's interface, on `[B, H, W, C]` maps.

    A subclass builds `patch_embed` and a `torch.nn.Sequential` of `Stage` under the name in `stages_name`, then calls
    `_build_head` and `init_weights(needs_reset=False)`. Where its stages differ, it replaces `_run`, `_down` and
    `_shorten`.
    """

    output_fmt: Literal["NHWC"] = "NHWC"
    stages_name: ClassVar[str] = "levels"
    stage_norm_name: ClassVar[str] = "norm{}"
    patch_embed: nn.Module

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

    @property
    def _stages(self) -> nn.Sequential:
        return getattr(self, self.stages_name)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal (std 0.02) for linear layers and bias tables, zero biases, torch's own elsewhere.

        Args:
            needs_reset: also reset layers that initialised themselves when built; for models built on "meta".
        """
        named_apply(partial(init_weights_vit_timm, needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions, as in the official recipes."""
        leaves = ("weight", "bias")
        return {n for n, p in self.named_parameters() if p.ndim > 1 and n.rsplit(".", 1)[-1] not in leaves}

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
        for stage in self._stages:
            stage.grad_checkpointing = enable

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

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """The map that a stage hands out."""
        return stage.forward_blocks(x)

    def _down(self, index: int, x: Tensor) -> Tensor:
        """From the map that stage `index` hands out to what the next one takes."""
        return self._stages[index].downsample(x)

    def _shorten(self, last: int) -> None:
        """Drop the stages after `last` and the way down to them."""
        setattr(self, self.stages_name, self._stages[: last + 1])
        self._stages[-1].downsample = nn.Identity()

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
        intermediates = []
        stages = self._stages[: last + 1] if stop_early else self._stages
        x = self.patch_embed(x)
        for i, stage in enumerate(stages):
            x = self._run(stage, x if i == 0 else self._down(i - 1, x))
            if i in take:
                tap = self._norm_map(i, x, final=norm)
                intermediates.append(tap.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else tap)
        if intermediates_only:
            return intermediates
        return self._norm_map(len(stages) - 1, x, final=True), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need; returns the indices."""
        take, last = feature_take_indices(len(self._stages), indices)
        shorter = last < len(self._stages) - 1
        if shorter:
            self._shorten(last)
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
        x = self.patch_embed(x)
        for i, stage in enumerate(self._stages):
            x = self._run(stage, x if i == 0 else self._down(i - 1, x))
        return self._norm_map(len(self._stages) - 1, x, final=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits `[B, num_classes]`, or to pooled features `[B, head_hidden_size]` with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))
