"""Generators whose attentions are known, one row a model: names of the attentions, order of the tokens, timesteps."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import layout as layouts
from .layout import Layout
from .site import Operation, Site

VIDEO, IMAGE, TEXT = ("video",), ("image",), ("text",)
SELF_VIDEO, SELF_IMAGE = Operation(VIDEO, VIDEO), Operation(IMAGE, IMAGE)


def joint(*streams: str) -> Operation:
    """All streams attend to all."""
    return Operation(streams, streams)


@dataclass(frozen=True)
class Attention:
    """Attentions of one name in a model.

    Attributes:
        name: path of the module with `#` for the number of the block and `*` for any other number.
        kind: see `Site`.
        operations: see `Site`; of an attention with added projections of an image, `with_image`.
        after: the numbers of these blocks follow those of the blocks in this list.
        axes: see `Site`.
    """

    name: str
    kind: str
    operations: tuple[Operation, ...]
    with_image: tuple[Operation, ...] = ()
    after: str = ""
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Model:
    """A generator.

    Attributes:
        attentions: in the order in which a block runs them.
        layout: reads `Layout` from the arguments of a forward.
        timestep: name of the argument.
        noise_scale: timestep of pure noise.
        rises: whether timesteps grow towards the data.
        mask_hides_text_only: see `Site`.
        masks: arguments that hide tokens of the grid from each other.
        may_skip: whether a processor may run without its attention operation.
        stride: frames, rows and columns of pixels per latent, where no pipeline tells.
        pack: rows and columns of latents that the pipeline packs into one token.
        text: usual number of text tokens.
        example: arguments, without data, that `layout` reads, for latents (T, H, W).
    """

    attentions: tuple[Attention, ...]
    layout: Callable[[Any, Mapping[str, Any]], Layout]
    timestep: str = "timestep"
    noise_scale: float = 1000.0
    rises: bool = False
    mask_hides_text_only: bool = False
    masks: tuple[str, ...] = ("attention_mask", "video_self_attention_mask")
    may_skip: bool = False
    stride: tuple[int, int, int] = (4, 8, 8)
    pack: int = 1
    text: int = 512
    example: Callable[[int, int, int], dict[str, Any]] = layouts.video_example


def _cross(name: str, queries: tuple[str, ...] = VIDEO, axes: tuple[int, ...] | None = None) -> Attention:
    text, image = Operation(queries, TEXT), Operation(queries, ("condition",))
    return Attention(name, "cross", (text,), (image, text), axes=axes)


_REFINER = Attention("context_embedder.token_refiner.refiner_blocks.#.attn", "refine", (joint("text"),))
_FLUX = joint("text", "image", "reference")
_UNET = ("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*")
_MOTION = tuple(place.replace("attentions", "motion_modules") for place in _UNET)

MODELS: dict[str, Model] = {
    "WanTransformer3DModel": Model(
        (Attention("blocks.#.attn1", "self", (SELF_VIDEO,)), _cross("blocks.#.attn2")), layouts.wan_layout
    ),
    "HunyuanVideoTransformer3DModel": Model(
        (
            _REFINER,
            Attention("transformer_blocks.#.attn", "joint", (joint("video", "text"),)),
            Attention(
                "single_transformer_blocks.#.attn", "joint", (joint("video", "text"),), after="transformer_blocks"
            ),
        ),
        layouts.hunyuan_layout,
        mask_hides_text_only=True,
        text=256,
    ),
    "HunyuanVideo15Transformer3DModel": Model(
        (_REFINER, Attention("transformer_blocks.#.attn", "joint", (joint("video", "text"),))),
        layouts.hunyuan_layout,
        mask_hides_text_only=True,
        stride=(4, 16, 16),
        text=1985,
    ),
    "CogVideoXTransformer3DModel": Model(
        (Attention("transformer_blocks.#.attn1", "joint", (joint("text", "video"),)),),
        layouts.cogvideox_layout,
        text=226,
        example=layouts.cogvideox_example,
    ),
    "LTXVideoTransformer3DModel": Model(
        (
            Attention("transformer_blocks.#.attn1", "self", (joint("video", "reference"),)),
            _cross("transformer_blocks.#.attn2"),
        ),
        layouts.ltx_layout,
        stride=(8, 32, 32),
        text=128,
        example=layouts.ltx_example,
    ),
    "LTX2VideoTransformer3DModel": Model(
        (
            Attention("transformer_blocks.#.attn1", "self", (joint("video", "reference"),)),
            Attention("transformer_blocks.#.audio_attn1", "self", (joint("audio"),)),
            _cross("transformer_blocks.#.attn2", ("video", "reference")),
            _cross("transformer_blocks.#.audio_attn2", ("audio",)),
            Attention(
                "transformer_blocks.#.audio_to_video_attn", "cross", (Operation(("video", "reference"), ("audio",)),)
            ),
            Attention(
                "transformer_blocks.#.video_to_audio_attn", "cross", (Operation(("audio",), ("video", "reference")),)
            ),
        ),
        layouts.ltx_layout,
        may_skip=True,
        stride=(8, 32, 32),
        text=1024,
        example=layouts.ltx_example,
    ),
    "MochiTransformer3DModel": Model(
        (Attention("transformer_blocks.#.attn1", "joint", (joint("video", "text"),)),),
        layouts.frames_layout,
        stride=(6, 8, 8),
        text=256,
    ),
    "CosmosTransformer3DModel": Model(
        (Attention("transformer_blocks.#.attn1", "self", (SELF_VIDEO,)), _cross("transformer_blocks.#.attn2")),
        layouts.wan_layout,
        noise_scale=1.0,
        masks=(),  # attention_mask is one of the text
        stride=(8, 8, 8),
    ),
    "LatteTransformer3DModel": Model(
        (
            Attention("transformer_blocks.#.attn1", "self", (SELF_VIDEO,), axes=(1, 2)),
            _cross("transformer_blocks.#.attn2", axes=(1, 2)),
            Attention("temporal_transformer_blocks.#.attn1", "self", (SELF_VIDEO,), axes=(0,)),
        ),
        layouts.frames_layout,
        stride=(1, 8, 8),
        text=120,
    ),
    "AllegroTransformer3DModel": Model(
        (Attention("transformer_blocks.#.attn1", "self", (SELF_VIDEO,)), _cross("transformer_blocks.#.attn2")),
        layouts.hunyuan_layout,
    ),
    "FluxTransformer2DModel": Model(
        (
            Attention("transformer_blocks.#.attn", "joint", (_FLUX,)),
            Attention("single_transformer_blocks.#.attn", "joint", (_FLUX,), after="transformer_blocks"),
        ),
        layouts.ids_layout,
        noise_scale=1.0,
        stride=(1, 8, 8),
        pack=2,
        example=layouts.ids_example,
    ),
    "Flux2Transformer2DModel": Model(
        (
            Attention("transformer_blocks.#.attn", "joint", (_FLUX,)),
            Attention("single_transformer_blocks.#.attn", "joint", (_FLUX,), after="transformer_blocks"),
        ),
        layouts.ids_layout,
        noise_scale=1.0,
        stride=(1, 8, 8),
        pack=2,
        example=layouts.ids_example,
    ),
    "SD3Transformer2DModel": Model(
        (
            Attention("transformer_blocks.#.attn", "joint", (joint("image", "text"),)),
            Attention("transformer_blocks.#.attn2", "self", (SELF_IMAGE,)),
        ),
        layouts.sd3_layout,
        stride=(1, 8, 8),
        text=333,
        example=layouts.image_example,
    ),
    "QwenImageTransformer2DModel": Model(
        (Attention("transformer_blocks.#.attn", "joint", (_FLUX,)),),
        layouts.qwen_layout,
        noise_scale=1.0,
        mask_hides_text_only=True,
        stride=(1, 8, 8),
        pack=2,
        example=layouts.qwen_example,
    ),
    "HiDreamImageTransformer2DModel": Model(
        (
            Attention("double_stream_blocks.#.block.attn1", "joint", (joint("image", "padding", "text"),)),
            Attention(
                "single_stream_blocks.#.block.attn1",
                "joint",
                (joint("image", "padding", "text"),),
                after="double_stream_blocks",
            ),
        ),
        layouts.hidream_layout,
        timestep="timesteps",
        stride=(1, 8, 8),
        text=384,
        example=layouts.image_example,
    ),
    "ZImageTransformer2DModel": Model(
        (
            Attention("noise_refiner.#.attention", "refine", (joint("image", "padding"),)),
            Attention("context_refiner.#.attention", "refine", (joint("text"),)),
            Attention("siglip_refiner.#.attention", "refine", (joint("text"),)),
            Attention("layers.#.attention", "joint", (joint("image", "padding", "text"),)),
        ),
        layouts.z_image_layout,
        timestep="t",
        noise_scale=1.0,
        rises=True,
        mask_hides_text_only=True,
        stride=(1, 8, 8),
        example=layouts.z_image_example,
    ),
    "UNet2DConditionModel": Model(
        tuple(
            attention
            for place in _UNET
            for attention in (
                Attention(f"{place}.transformer_blocks.*.attn1", "self", (SELF_IMAGE,)),
                _cross(f"{place}.transformer_blocks.*.attn2", IMAGE),
            )
        ),
        layouts.unet_layout,
        stride=(1, 8, 8),
        text=77,
        example=layouts.unet_example,
    ),
    "UNetMotionModel": Model(
        (
            *(
                attention
                for place in _UNET
                for attention in (
                    Attention(f"{place}.transformer_blocks.*.attn1", "self", (SELF_VIDEO,), axes=(1, 2)),
                    _cross(f"{place}.transformer_blocks.*.attn2", axes=(1, 2)),
                )
            ),
            *(
                Attention(f"{place}.transformer_blocks.*.attn{number}", "self", (SELF_VIDEO,), axes=(0,))
                for place in _MOTION
                for number in (1, 2)
            ),
        ),
        layouts.unet_layout,
        stride=(1, 8, 8),
        text=77,
        example=layouts.motion_unet_example,
    ),
    "VideoDiT": Model(
        (
            Attention("blocks.#.attn1", "self", (SELF_VIDEO,)),
            Attention(
                "blocks.#.attn",
                "joint",
                (Operation(VIDEO, ("text", "video")), Operation(TEXT, ("text", "video"))),
            ),
            _cross("blocks.#.attn2"),
        ),
        layouts.video_dit_layout,
        mask_hides_text_only=True,
        stride=(1, 1, 1),
        text=77,
    ),
}


def models_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The known generators of a pipeline by the name of the component, or a model under the empty name.

    Raises:
        TypeError: neither a pipeline nor a model.
        ValueError: none whose attentions are known; the message names those that are.
    """
    unwrapped = unwrap(pipe_or_model)
    if isinstance(unwrapped, nn.Module):
        if row(unwrapped) is None:
            raise ValueError(f"{type(unwrapped).__name__} is not a generator with known attentions: {sorted(MODELS)}")
        return {"": unwrapped}
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(
            f"pipe_or_model is a {type(pipe_or_model).__name__}; expected a pipeline or a model of diffusers"
        )
    modules = {name: unwrap(x) for name, x in components.items() if isinstance(x, nn.Module)}
    found = {name: x for name, x in modules.items() if row(x) is not None}
    if not found:
        raise ValueError(
            f"{type(pipe_or_model).__name__} has {sorted(type(x).__name__ for x in modules.values())}, of which none "
            f"is a generator with known attentions: {sorted(MODELS)}"
        )
    return found


def unwrap(x: Any) -> Any:
    """A module without the wrappers of `torch.compile` and of data parallelism."""
    while isinstance(x, nn.Module):
        inner = getattr(x, "_orig_mod", None)
        inner = x.module if inner is None and type(x).__name__ in ("DistributedDataParallel", "DataParallel") else inner
        if inner is None:
            return x
        x = inner
    return x


def row(model: nn.Module) -> Model | None:
    """The row of a model, or of the class that it derives from."""
    return next((MODELS[c.__name__] for c in type(model).__mro__ if c.__name__ in MODELS), None)


def find(pipe_or_model: Any) -> list[Site]:
    """Every attention of a generator: of a pipeline, of both transformers where it has two, or of a model.

    Args:
        pipe_or_model: a pipeline, transformer or UNet of diffusers, or a `VideoDiT`; compiled ones, too.

    Returns:
        Sites in the order of the layers, those of one layer in the order in which they run.

    Raises:
        TypeError, ValueError: see `models_of`.
    """
    return [
        site for component, model in models_of(pipe_or_model).items() for site in _find_in(model, row(model), component)
    ]


def _find_in(model: nn.Module, known: Model | None, component: str) -> list[Site]:
    assert known is not None
    names = [name for name, module in model.named_modules() if hasattr(module, "processor")]
    sites = []
    for order, attention in enumerate(known.attentions):
        pattern = re.escape(attention.name).replace(r"\#", r"(\d+)").replace(r"\*", r"\d+")
        for name in names:
            if match := re.fullmatch(pattern, name):
                module = model.get_submodule(name)
                first = len(model.get_submodule(attention.after)) if attention.after else 0  # type: ignore[arg-type]
                layer = first + int(match[1]) if match.groups() else -1
                sites.append((layer, order, _site(model, known, attention, name, layer, component, module)))
    if "UNet" in type(model).__name__:
        return _number_unet(sites)
    refiners_last = [entry for entry in sites if entry[2].kind != "refine"] + [
        e for e in sites if e[2].kind == "refine"
    ]
    return [site for _, _, site in sorted(refiners_last, key=lambda e: (e[2].kind == "refine", *e[:2]))]


def _site(model: Any, known: Model, attention: Attention, name: str, layer: int, component: str, module: Any) -> Site:
    heads = module.heads
    head_dim = getattr(module, "head_dim", None)
    if head_dim is None:
        inner = getattr(module, "inner_dim", None) or module.to_q.out_features
        head_dim = inner // heads
    operations = attention.operations
    image_keys = getattr(module, "add_k_proj", None) or getattr(module, "q_img", None)
    if attention.with_image and image_keys is not None:
        both = attention.with_image
        operations = both if hasattr(module, "add_k_proj") and not hasattr(module, "q_img") else both[::-1]
    kind, blocks = attention.kind, model.config
    if kind == "self" and _only_cross(model, name):
        kind, operations = "cross", (Operation(operations[0].queries, TEXT),)
    pattern = getattr(getattr(module, "pattern", None), "type", "dense")
    if getattr(getattr(module, "pattern", None), "causal", False):
        pattern = f"causal {pattern}"
    return Site(
        name,
        layer,
        kind,
        heads,
        head_dim,
        operations,
        axes=attention.axes,
        level=_level(name, len(blocks.down_block_types)) if "down_block_types" in blocks else 0,
        component=component,
        mask_hides_text_only=known.mask_hides_text_only,
        pattern=pattern,
        module=module,
    )


def _only_cross(model: nn.Module, name: str) -> bool:
    """Return True if the block of a UNet attends to text in its first attention as well."""
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "only_cross_attention", False))


def _level(name: str, levels: int) -> int:
    """Number of times the latents were halved at an attention of a UNet."""
    place, number = name.split(".")[:2]
    if place == "mid_block":
        return levels - 1
    return int(number) if place == "down_blocks" else levels - 1 - int(number)


def _number_unet(found: list[tuple[int, int, Site]]) -> list[Site]:
    """Sites of a UNet in the order in which they run, one layer number for each transformer block."""
    places = ("down_blocks", "mid_block", "up_blocks")
    numbered: dict[str, int] = {}

    def key(site: Site) -> tuple:
        outer, _, inner = site.name.partition(".transformer_blocks.")
        numbers = [[int(n) for n in re.findall(r"\d+", part)] for part in (outer, inner)]
        # frames are attended to behind the attention inside of frames
        return (places.index(outer.split(".")[0]), *numbers[0], "motion_modules" in outer, *numbers[1])

    sites = []
    for site in sorted((site for _, _, site in found), key=key):
        block = site.name.rpartition(".")[0]
        layer = numbered.setdefault(block, len(numbered))
        sites.append(Site(**{**vars(site), "layer": layer}))
    return sites


def signature_of(model: nn.Module) -> inspect.Signature:
    """The parameters of a model's own forward, whatever hooks replaced it by."""
    return inspect.signature(type(model).forward)


def arguments_of(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by name."""
    parameters = [name for name in signature_of(model).parameters if name != "self"]
    return dict(zip(parameters, args, strict=False)) | dict(kwargs)
