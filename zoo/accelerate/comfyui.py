"""Node of ComfyUI: sparse self-attention for video and image models, any head size, any GPU.

`custom_nodes/foveal_sparse.py` in a ComfyUI folder has one line:

    from foveal.zoo.accelerate.comfyui import comfy_entrypoint
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from .grids import attend_grid
from .plan import Plan

_logger = logging.getLogger(__name__)


def parse_blocks(text: str) -> set[int]:
    """Numbers of "0, 1, 47-49".

    Raises:
        ValueError: anything else.
    """
    numbers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ValueError(f'dense_blocks={text!r} must be numbers and ranges such as "0, 1, 47-49"')
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


class SparseOverride:
    """The `optimized_attention_override` of a model.

    Args:
        plan: window or mask, min_tokens.
        sigmas: noise levels (highest, lowest) between which attention is sparse.
        dense_blocks: numbers of blocks that stay dense.
        previous: the override that was there, called where this one declines.
        verbose: log once per shape what was done.
    """

    def __init__(
        self,
        plan: Plan,
        sigmas: tuple[float, float],
        dense_blocks: set[int],
        previous: Callable[..., Tensor] | None = None,
        verbose: bool = False,
    ):
        self.plan, self.sigmas, self.dense_blocks = plan, sigmas, dense_blocks
        self.previous, self.verbose, self.told = previous, verbose, set()

    def __call__(
        self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any
    ) -> Tensor:
        tokens = q.shape[-2]
        why = self.reason(tokens, k.shape[-2], kwargs)
        out = None
        if why is None:
            grid = tuple(kwargs["transformer_options"]["grid_sizes"])
            if kwargs.get("skip_reshape"):
                query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # from [B, heads, N, D]
            else:
                query, key, value = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
            out = attend_grid(query, key, value, self.plan, grid)
            why = "the plan covers the grid" if out is None else f"sparse, {self.plan.words}"
        if self.verbose and (tokens, why) not in self.told:
            self.told.add((tokens, why))
            _logger.info("%s tokens: %s", f"{tokens:,}", why)
        if out is None:
            if self.previous is not None:
                return self.previous(func, q, k, v, heads, **kwargs)
            return func(q, k, v, heads, **kwargs)
        return out.transpose(1, 2) if kwargs.get("skip_output_reshape") else out.flatten(-2)

    def reason(self, tokens: int, keys: int, kwargs: dict[str, Any]) -> str | None:
        """Why a call stays dense, None where it does not."""
        options = kwargs.get("transformer_options") or {}
        grid, sigmas, block = (options.get(name) for name in ("grid_sizes", "sigmas", "block_index"))
        if kwargs.get("mask") is not None:
            return "dense: it has a mask"
        if keys != tokens or grid is None or prod(grid) != tokens:
            return f"dense: no self-attention of the grid {grid}"
        if tokens < self.plan.min_tokens:
            return f"dense: fewer than min_tokens={self.plan.min_tokens}"
        if block in self.dense_blocks:
            return "dense: one of dense_blocks"
        if sigmas is not None and not self.sigmas[1] <= float(sigmas.max()) <= self.sigmas[0]:
            return "dense: before start_percent or after end_percent"
        return None


def _patch(model: Any, plan: Plan, start: float, end: float, dense_blocks: str, verbose: bool) -> Any:
    """A clone of a model of ComfyUI with the override."""
    sampling = model.get_model_object("model_sampling")
    sigmas = (float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end)))
    clone = model.clone()
    options = clone.model_options["transformer_options"] = dict(clone.model_options.get("transformer_options") or {})
    previous = options.get("optimized_attention_override")
    options["optimized_attention_override"] = SparseOverride(
        plan, sigmas, parse_blocks(dense_blocks), previous, verbose
    )
    return clone


async def comfy_entrypoint() -> Any:
    """The extension, as ComfyUI asks for it."""
    from comfy_api.latest import ComfyExtension, io  # type: ignore[import-not-found]

    class FovealSparseAttention(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="FovealSparseAttention",
                display_name="Sparse attention (foveal)",
                category="advanced/attention",
                description="Self-attention in a window around each token; dense in the first steps.",
                inputs=[
                    io.Model.Input("model"),
                    io.Int.Input("window_frames", default=6, min=1, max=1024, tooltip="tokens in time"),
                    io.Int.Input("window_height", default=16, min=1, max=1024),
                    io.Int.Input("window_width", default=16, min=1, max=1024),
                    io.Int.Input("stride", default=8, min=1, max=64, tooltip="rows and columns that share a window"),
                    io.Float.Input("start_percent", default=0.2, min=0.0, max=1.0, step=0.01),
                    io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01),
                    io.String.Input("dense_blocks", default="0", tooltip='such as "0, 1, 47-49"'),
                    io.Int.Input("min_tokens", default=12288, min=0, max=1 << 24),
                    io.Boolean.Input("verbose", default=False),
                ],
                outputs=[io.Model.Output()],
            )

        @classmethod
        def execute(
            cls, model, window_frames, window_height, window_width, stride, start_percent, end_percent, dense_blocks,
            min_tokens, verbose,
        ) -> Any:  # fmt: skip
            window = (window_frames, window_height, window_width)
            plan = Plan(window=window, stride=(1, stride, stride), min_tokens=min_tokens)
            return io.NodeOutput(_patch(model, plan, start_percent, end_percent, dense_blocks, verbose))

    class FovealExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [FovealSparseAttention]

    return FovealExtension()
