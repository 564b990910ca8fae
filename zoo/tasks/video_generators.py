"""Text-to-video transformers of diffusers in the video task: how each is called, what it predicts, how it samples."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor
from torch.nn import functional as F

from ..accelerate import accelerate
from ..accelerate.presets import as_plan
from ..data.names import unknown_name
from ..sites import MODELS
from ..video.flow import TIMESTEPS, add_noise, sample_time, velocity
from .tuning import lora_config
from .video_model import LORA, model_folder

Arguments = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Forward:
    """How the transformer of an architecture is called, beside its timestep.

    Attributes:
        arguments: of a forward, from the model, noisy video `[B, C, T, H, W]`, text `[B, L, D]`, its mask `[B, L]` and
            options.
        video: the prediction as `[B, C, T, H, W]`, from that of the model and the noisy video.
        text_dim: field of the configuration with D.
        options: what `model.args` may say, with defaults.
        flow: whether it predicts a flow where no scheduler lies beside it.
    """

    arguments: Callable[[Any, Tensor, Tensor, Tensor, Mapping[str, Any]], Arguments]
    video: Callable[[Tensor, Tensor], Tensor] = lambda made, noisy: made
    text_dim: str = "text_dim"
    options: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = True


def _padded(text: Tensor, mask: Tensor, length: int) -> Tensor:
    """Text with zeros for what the mask hides, up to a length."""
    return F.pad(text.masked_fill(~mask[..., None], 0), (0, 0, 0, max(0, length - text.shape[1])))


def _wan(model: Any, noisy: Tensor, text: Tensor, mask: Tensor, options: Mapping[str, Any]) -> Arguments:
    length = MODELS["WanTransformer3DModel"].text  # no mask: the model has learned with zeros up to this length
    return {"hidden_states": noisy, "encoder_hidden_states": _padded(text, mask, length)}


def _ltx(model: Any, noisy: Tensor, text: Tensor, mask: Tensor, options: Mapping[str, Any]) -> Arguments:
    frames, height, width = noisy.shape[2:]
    time, *space = MODELS["LTXVideoTransformer3DModel"].stride
    return {
        "hidden_states": noisy.flatten(2).transpose(1, 2),  # [B, T * H * W, C]
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (time / options["frame_rate"], *space),
    }


def _hunyuan(model: Any, noisy: Tensor, text: Tensor, mask: Tensor, options: Mapping[str, Any]) -> Arguments:
    pooled = noisy.new_zeros(len(noisy), model.config.pooled_projection_dim)
    given = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "pooled_projections": pooled}
    if model.config.guidance_embeds:
        given["guidance"] = noisy.new_full((len(noisy),), 1000.0 * options["guidance"])
    return {"hidden_states": noisy, **given}


def _cogvideox(model: Any, noisy: Tensor, text: Tensor, mask: Tensor, options: Mapping[str, Any]) -> Arguments:
    config = model.config
    if text.shape[1] > config.max_text_seq_length:
        raise ValueError(
            f"texts of {text.shape[1]} tokens are too long for a {type(model).__name__}, which takes "
            f"{config.max_text_seq_length}: make the latents with --text-length {config.max_text_seq_length}"
        )
    given = {"encoder_hidden_states": _padded(text, mask, config.max_text_seq_length)}
    if config.use_rotary_positional_embeddings:
        given["image_rotary_emb"] = _cogvideox_rotary(config, *noisy.shape[2:], device=noisy.device)
    return {"hidden_states": noisy.transpose(1, 2), **given}


def _cogvideox_rotary(
    config: Any, frames: int, height: int, width: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the patches' positions, as `CogVideoXPipeline` makes them: 1.0 and 1.5 differ."""
    patch, frame_patch = config.patch_size, config.patch_size_t
    grid = height // patch, width // patch
    largest = config.sample_height // patch, config.sample_width // patch
    if frame_patch is None:
        crops = get_resize_crop_region_for_grid(grid, largest[1], largest[0])
        options = {"crops_coords": crops, "temporal_size": frames}
    else:
        options = {
            "crops_coords": None,
            "grid_type": "slice",
            "max_size": largest,
            "temporal_size": frames // frame_patch,
        }
    cosines, sines = get_3d_rotary_pos_embed(config.attention_head_dim, grid_size=grid, device=device, **options)
    return cosines, sines  # pyright: ignore[reportReturnType]


FORWARDS: dict[str, Forward] = {
    "WanTransformer3DModel": Forward(_wan),
    "LTXVideoTransformer3DModel": Forward(
        _ltx,
        lambda made, noisy: made.transpose(1, 2).reshape(noisy.shape),
        text_dim="caption_channels",
        options={"frame_rate": 25.0},
    ),
    "HunyuanVideoTransformer3DModel": Forward(_hunyuan, text_dim="text_embed_dim", options={"guidance": 1.0}),
    "CogVideoXTransformer3DModel": Forward(
        _cogvideox, lambda made, noisy: made.transpose(1, 2), text_dim="text_embed_dim", flow=False
    ),
}


class FlowProcess:
    """Rectified flow, see `zoo.video.flow`: the model predicts the velocity from data to noise."""

    def draw_time(self, shape: tuple[int, ...], density: Mapping[str, float], device: torch.device) -> Tensor:
        """Times in (0, 1), logit-normal."""
        return sample_time(shape, **density, device=device)

    def mix(self, video: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy video at times `[B]` or `[B, F]`."""
        return add_noise(video, noise, t)

    def target(self, video: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The right prediction."""
        return velocity(video, noise)

    def timestep(self, t: Tensor) -> Tensor:
        """A time as the model is told it."""
        return TIMESTEPS * t


class DiffusionProcess:
    """The discrete process of a DDPM or DDIM scheduler, for models that predict the noise or `v` (arXiv:2202.00512).

    Times t in 0..1 are steps floor(t * N) of the N that the scheduler was trained with.

    Args:
        scheduler: of diffusers, with `alphas_cumprod`.
    """

    def __init__(self, scheduler: Any):
        self.kind, self.alphas = scheduler.config.prediction_type, scheduler.alphas_cumprod.float()

    def draw_time(self, shape: tuple[int, ...], density: Mapping[str, float], device: torch.device) -> Tensor:
        """Times in [0, 1), uniform."""
        return torch.rand(shape, device=device, dtype=torch.float32)

    def _shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of data and noise, `[B, 1, 1, 1, 1]`: squares add up to 1."""
        kept = self.alphas.to(t.device)[self.timestep(t)].view(-1, 1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def mix(self, video: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy video at times `[B]`."""
        of_data, of_noise = self._shares(t)
        return of_data * video + of_noise * noise

    def target(self, video: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The right prediction."""
        of_data, of_noise = self._shares(t)
        return noise if self.kind == "epsilon" else of_data * noise - of_noise * video

    def timestep(self, t: Tensor) -> Tensor:
        """A time as the model is told it, int64."""
        return (t * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)


Process = FlowProcess | DiffusionProcess


def read_scheduler(folder: Path) -> Any:
    """The scheduler beside the folder of a transformer; None where there is none.

    Raises:
        ValueError: a class that diffusers does not have.
    """
    beside = folder.parent / "scheduler"
    if not (beside / "scheduler_config.json").is_file():
        return None
    name = json.loads((beside / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name", "")
    name = "CogVideoXDDIMScheduler" if name == "CogVideoXDPMScheduler" else name  # same process, plain steps
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"{str(beside)!r} is of the scheduler {name!r}, which this version of diffusers does not have")
    return kind.from_pretrained(beside)


def process_of(scheduler: Any, forward: Forward, said: str) -> Process:
    """The process that a model has learned to undo.

    Args:
        scheduler: of its folder, or None.
        forward: of its architecture.
        said: key and value of the configuration that names the folder.

    Raises:
        ValueError: a scheduler of another process, or one that is needed and not there.
    """
    if scheduler is None:
        if forward.flow:
            return FlowProcess()
        raise ValueError(
            f"{said} has no folder scheduler beside it, which says how noise is added: pass the pipeline's"
        )
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction":
        return FlowProcess()
    if kind in ("epsilon", "v_prediction") and hasattr(scheduler, "alphas_cumprod"):
        return DiffusionProcess(scheduler)
    raise ValueError(
        f"{said} has a {type(scheduler).__name__} with prediction_type={kind!r}; a flow, epsilon and v_prediction are "
        "trained"
    )


class Generator:
    """A pretrained transformer of diffusers and how it is trained. It holds no weights itself.

    Args:
        folder: of the transformer.
        cfg: of the configuration group `model`: `args`, options of the architecture; `plan`, see `accelerate`; `dtype`
            of frozen weights.
        lora: whether adapters are trained beside frozen weights.

    Raises:
        ValueError: an architecture, option, plan or scheduler that is not supported; the message names it.
    """

    def __init__(self, folder: Path, cfg: Mapping[str, Any], *, lora: bool):
        self.folder, self.said = folder, f"model.pretrained={str(cfg['pretrained'])!r}"
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.name = self.config["_class_name"]
        self.forward: Forward = FORWARDS[self.name]
        self.options = dict(self.forward.options)
        for key, value in dict(cfg.get("args") or {}).items():
            if key not in self.options:
                raise unknown_name(f"key of model.args of a {self.name}", key, self.options)
            self.options[key] = value
        self.dtype = cfg.get("dtype") or "float32"
        if self.dtype not in DTYPES:
            raise unknown_name("model.dtype", self.dtype, DTYPES)
        if self.dtype != "float32" and not lora:
            raise ValueError(
                f"model.dtype={self.dtype} is for frozen weights, others lose small steps in it: set task.lora"
            )
        self.plan = None if cfg.get("plan") is None else _training_plan(cfg["plan"])
        self.scheduler = read_scheduler(folder)
        self.process: Process = process_of(self.scheduler, self.forward, self.said)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents of a token."""
        patch = self.config.get("patch_size", 1)
        return tuple(patch) if isinstance(patch, list) else (self.config.get("patch_size_t") or 1, patch, patch)  # pyright: ignore

    def check_data(self, in_channels: int, text_dim: int | None) -> None:
        """Refuses data that the model does not take, and models that take more than noise and text.

        Raises:
            ValueError: names both.
        """
        config = self.config
        inputs, outputs = config.get("in_channels"), config.get("out_channels") or config.get("in_channels")
        more = [name for name in ("image_dim", "ofs_embed_dim", "image_condition_type") if config.get(name)]
        packed = self.name.startswith("LTX") and self.patch_size != (1, 1, 1)
        if inputs != outputs or more or packed:
            raise ValueError(
                f"{self.said} takes more than noise and text (in_channels={inputs}, out_channels={outputs}"
                f"{''.join(f', {name}={config[name]}' for name in more)}): text-to-video models are trained here"
            )
        if inputs != in_channels:
            raise ValueError(f"{self.said} takes latents of {inputs} channels, and the data have {in_channels}")
        if config.get(self.forward.text_dim) != text_dim:
            raise ValueError(
                f"{self.said} takes text of {config.get(self.forward.text_dim)} channels, and the data have {text_dim}"
            )

    def make(self, lora: Mapping[str, Any] | None) -> Any:
        """The model with its weights, frozen with adapters of low rank in float32 beside them where `lora` says so.

        Raises:
            ValueError: weights that do not fit, or no layer for adapters.
        """
        try:
            model = getattr(diffusers, self.name).from_pretrained(self.folder, torch_dtype=DTYPES[self.dtype])
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.said} cannot be loaded: {str(error).splitlines()[0]}") from error
        model.train()
        if lora is not None:
            model.requires_grad_(False)
            model.add_adapter(lora_config(model, {**LORA, **lora}))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.plan is not None:
            try:
                accelerate(model, self.plan)
            except (TypeError, ValueError) as error:
                raise ValueError(f"model.plan={self.plan.to_dict()}: {error}") from error
        return model

    def predict(self, model: Any, noisy: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The prediction `[B, C, T, H, W]` of a model in float32.

        Args:
            model: made by `make`.
            noisy: `[B, C, T, H, W]`.
            timestep: `[B]`, of `process.timestep`.
            text: `[B, L, D]`.
            mask: bool `[B, L]`, False for padding.
        """
        dtype = DTYPES[self.dtype]
        given = self.forward.arguments(model, noisy.to(dtype), text.to(dtype), mask, self.options)
        made = model(**given, **{MODELS[self.name].timestep: timestep}).sample
        return self.forward.video(made, noisy).float()


def _training_plan(plan: Any) -> Any:
    """A plan of `accelerate` that training can follow.

    Raises:
        ValueError: not a plan, or one that counts the steps of a sampler.
    """
    try:
        made = as_plan(plan if isinstance(plan, str) else dict(plan))
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"model.plan={plan!r}: {error}") from error
    if any(made.dense_first_and_last):
        raise ValueError(
            f"model.plan: dense_steps={made.dense_steps!r} counts steps of a sampler; say noise=[low, high]"
        )
    return made


class GeneratorSampler:
    """Samples a generator with the scheduler of its folder; called by a report as a `VideoDiTPipeline` is.

    Args:
        generator: see `Generator`.
        model: made by it.
        shape: `(C, T, H, W)` of the latents.
        shift: of the noise levels, where the folder has no scheduler.
        null_condition: gives the condition that guidance leads away from; None: samples are not guided.
    """

    def __init__(
        self,
        generator: Generator,
        model: Any,
        *,
        shape: tuple[int, ...],
        shift: float = 1.0,
        null_condition: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ):
        self.generator, self.model, self.shape, self.null_condition = generator, model, shape, null_condition
        self.scheduler = generator.scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)

    def _steps(self, count: int) -> dict[str, Any]:
        """Arguments of `set_timesteps`, those of the pipelines of diffusers."""
        config = self.scheduler.config
        if "FlowMatchEuler" not in type(self.scheduler).__name__:
            return {"num_inference_steps": count}
        given: dict[str, Any] = {"sigmas": np.linspace(1, 1 / count, count).tolist()}
        if config.use_dynamic_shifting:
            tokens = np.prod(self.shape[1:]) // np.prod(self.generator.patch_size)
            lengths = config.base_image_seq_len, config.max_image_seq_len
            given["mu"] = float(calculate_shift(tokens, *lengths, config.base_shift, config.max_shift))
        return given

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator],
        **others: Any,
    ) -> Any:
        """`frames`, latents `[B, C, T, H, W]`, one of each text; no others of a pipeline's arguments matter.

        Raises:
            ValueError: pictures to start from.
        """
        if pictures := [name for name in ("image", "last_image", "video") if others.get(name) is not None]:
            raise ValueError(f"{self.generator.said} makes videos from text: it takes no {pictures[0]}")
        device = self.model.device
        noise = [
            torch.randn(self.shape, generator=one)
            for one in (generator if isinstance(generator, list) else [generator] * len(prompt_embeds))
        ]
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(device=device, **self._steps(num_inference_steps))
        latents = torch.stack(noise).to(device)  # all schedulers that are trained for begin with a deviation of 1
        names = "encoder_hidden_states", "encoder_attention_mask"
        told = prompt_embeds.to(device), prompt_attention_mask.to(device)
        untold = None
        if guidance_scale != 1 and self.null_condition is not None:
            nothing = self.null_condition(dict(zip(names, told, strict=True)))
            untold = tuple(nothing[name] for name in names)
        for t in scheduler.timesteps:  # pyright: ignore[reportOptionalIterable]  # set above
            timestep = t.expand(len(latents))
            made = self.generator.predict(self.model, latents, timestep, *told)
            if untold is not None:
                without = self.generator.predict(self.model, latents, timestep, *untold)
                made = without + guidance_scale * (made - without)
            latents = scheduler.step(made, t, latents, return_dict=False)[0]
        return SimpleNamespace(frames=latents)


def find_generator(cfg: Mapping[str, Any], *, lora: bool) -> Generator | None:
    """The generator that the configuration group `model` names; None for a `VideoDiT`.

    Raises:
        FileNotFoundError: see `model_folder`.
        ValueError: a model of diffusers that is not trained here, or options of one for a `VideoDiT`.
    """
    source = cfg.get("pretrained")
    folder = model_folder(source, "model.pretrained") if source else None
    name = "VideoDiT" if folder is None else json.loads((folder / "config.json").read_text()).get("_class_name")
    if folder is None or name == "VideoDiT":
        for key in ("plan", "dtype"):
            if cfg.get(key) is not None:
                raise ValueError(
                    f"model.{key}={cfg[key]!r} is for transformers of diffusers; model.args.attention chooses the "
                    "layers of a VideoDiT, trainer.precision its dtype"
                )
        return None
    if name not in FORWARDS:
        raise ValueError(f"model.pretrained={str(source)!r} is a {name}; trained are VideoDiT, {', '.join(FORWARDS)}")
    index = folder.parent / "model_index.json"
    if index.is_file() and (json.loads(index.read_text()).get("transformer_2") or [None])[0]:
        raise ValueError(
            f"model.pretrained={str(source)!r} has two transformers, each for a part of the noise levels: pipelines of "
            "one are trained here"
        )
    return Generator(folder, cfg, lora=lora)
