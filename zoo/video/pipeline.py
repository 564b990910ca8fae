"""VideoDiTPipeline: from noise to videos with a `VideoDiT`, a flow-matching scheduler and, for latents, a VAE.

Given frames stay clean through timesteps of their own; causal models roll out chunk by chunk with a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from .checks import check_counts, check_frames, check_output, check_size, check_strength, check_told
from .conditions import (
    Conditions,
    Texts,
    class_conditions,
    encode_texts,
    join_segments,
    mask_rows,
    rows,
    segment_prompts,
)
from .export import save_clips
from .given import read_images, read_videos
from .guidance import Heads, Perturbation, guide, perturbed_heads
from .guiders import check_guider, guided
from .kv_cache import KVCache
from .labels import check_names, read_labels
from .pipeline_base import TransformerPipeline
from .pipeline_output import VideoDiTPipelineOutput
from .segments import Segments, segmented
from .stepping import begin_with, check_scheduler, draw_noise, set_timesteps
from .transformer import VideoDiT
from .vae import LatentSpace, decode, encode, latent_space


class VideoDiTPipeline(TransformerPipeline):
    """Samples videos.

    `load_lora_weights`, `set_adapters`, `fuse_lora` and the others of diffusers' pipelines are those of a pipeline
    whose adapters are all in the transformer.

    Args:
        transformer: the model.
        scheduler: with flow-matching sigmas, such as `FlowMatchEulerDiscreteScheduler(shift=s)` or
            `UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=s)`.
        vae: one of `zoo.video.vae.SUPPORTED`, such as `AutoencoderKLWan`; None: the model makes pixels.
        text_encoder: called with a list of prompts, returns embeddings `[B, L, text_dim]` or (embeddings, bool mask
            `[B, L]`); with a tokenizer, called as `transformers` models are. None: prompt_embeds must be given.
        tokenizer: as those of `transformers`.
        pixel_mean, pixel_std: per channel, what a model of pixels was trained on: (pixels in 0..1 - mean) / std.
        sample_size: frames, height and width of a video when the call does not say.
        null_text: what guidance leads away from when a call does not say: "empty", the empty prompt, or "zeros",
            embeddings of zeros, as models of this project are trained.
        id2label: names of classes by label, which class_labels may then be given as.

    Raises:
        ValueError: another null_text, or names for labels that the model does not have.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 - as in every pipeline of diffusers
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    transformer: VideoDiT
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        transformer: VideoDiT,
        scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        sample_size: Sequence[int] | None = None,
        null_text: str = "empty",
        id2label: Mapping[Any, str] | None = None,  # int | str, which the check of types of diffusers does not know
    ):
        super().__init__()
        if null_text not in ("empty", "zeros"):
            raise ValueError(f"null_text={null_text!r} must be one of ('empty', 'zeros')")
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            pixel_mean=None if pixel_mean is None else list(pixel_mean),
            pixel_std=None if pixel_std is None else list(pixel_std),
            sample_size=None if sample_size is None else list(sample_size),
            null_text=null_text,
            id2label=check_names(id2label, getattr(getattr(transformer, "config", None), "num_classes", None)),
        )
        self.video_processor = VideoProcessor(vae_scale_factor=1, do_normalize=False)

    @property
    def latent_space(self) -> LatentSpace:
        """Latent space of the model; without a VAE, pixels after normalisation."""
        if self.vae is not None:
            return latent_space(self.vae)
        channels = self.transformer.config.in_channels
        mean = tuple(self.config.pixel_mean or [0.5] * channels)
        std = tuple(self.config.pixel_std or [0.5] * channels)
        return LatentSpace(channels, 1, 1, mean, std)

    # inputs

    def token_frames(self, frames: int, name: str) -> int:
        """Frames of tokens of so many frames of a video.

        Raises:
            ValueError: naming the argument, that they do not fill latents and patches.
        """
        space, patch = self.latent_space, self.transformer.config.patch_size[0]
        latents = space.frames(frames)
        if frames < 1 or (frames - 1) % space.time or latents % patch:
            rule = f"{space.time} * n + 1" if space.time > 1 else "n"
            also = f" with a multiple of {patch} latent frames" if patch > 1 else ""
            raise ValueError(f"{name}={frames} must be {rule} frames{also}")
        return latents // patch

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Encode texts for the model, one row per video; needs no transformer.

        Args:
            prompt: B texts, unless prompt_embeds is given.
            negative_prompt: one or B; the null text when neither this nor negative_prompt_embeds is given.
            do_classifier_free_guidance: whether negative ones are wanted.
            num_videos_per_prompt: every row is repeated so often, those of embeddings that are given too.
            prompt_embeds, negative_prompt_embeds: `[B, L, text_dim]` or, the negative ones, `[1, L, text_dim]`.
            prompt_attention_mask, negative_prompt_attention_mask: of given embeddings, words that count, `[B, L]`, bool
                or integers of 0 and 1.
            max_sequence_length: words of a prompt, with a tokenizer.
            device, dtype: of the result; where the pipeline computes and the transformer's, or else the text encoder's.

        Returns:
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds and negative_prompt_attention_mask under the
            names of the call's arguments; masks are None where all words count, negative ones without guidance.

        Raises:
            ValueError: no prompt, not as many negative prompts as prompts, nor one, or masks of another type.
        """
        device, dtype = device or self._execution_device, dtype or self._text_dtype()
        encoders = {"tokenizer": self.tokenizer, "length": max_sequence_length, "device": device}
        if prompt_embeds is None:
            if prompt is None:
                raise ValueError("prompt or prompt_embeds must be given")
            prompt_embeds, prompt_attention_mask = encode_texts(self.text_encoder, prompt, **encoders)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        elif negative_prompt_embeds is None and negative_prompt is None and self.config.null_text == "zeros":
            negative_prompt_embeds, negative_prompt_attention_mask = torch.zeros_like(prompt_embeds), None
        elif negative_prompt_embeds is None:
            negative_prompt_embeds, negative_prompt_attention_mask = encode_texts(
                self.text_encoder, negative_prompt or "", **encoders
            )
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) not in (1, len(prompt_embeds)):
            raise ValueError(
                f"{len(negative_prompt_embeds)} negative prompts for {len(prompt_embeds)} videos; one, or one for each"
            )
        repeat = {"count": len(prompt_embeds), "times": num_videos_per_prompt, "device": device}
        prompt_embeds = rows(prompt_embeds, dtype=dtype, **repeat)
        prompt_attention_mask = mask_rows("prompt_attention_mask", prompt_attention_mask, **repeat)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = rows(negative_prompt_embeds, dtype=dtype, **repeat)
        negative_prompt_attention_mask = mask_rows(
            "negative_prompt_attention_mask", negative_prompt_attention_mask, **repeat
        )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _text_dtype(self) -> torch.dtype | None:
        model = self.text_encoder if self.transformer is None else self.transformer
        return getattr(model, "dtype", None)

    def prepare_conditions(
        self, texts: Texts, class_labels: int | str | Sequence[int | str] | Tensor | None, *, device: torch.device
    ) -> Conditions:
        """Conditions of classes or texts, one row for each label or prompt, with counterparts under guidance.

        Raises:
            ValueError: labels out of range or unknown, prompts and segments or negative prompts that differ in number.
        """
        guided = self.do_classifier_free_guidance
        if class_labels is not None:
            classes = self.transformer.config.num_classes
            assert classes is not None
            labels = read_labels(class_labels, labels=self.labels, num_classes=classes, device=device)
            return class_conditions(labels, classes, guided=guided)
        if texts.prompt is None and texts.prompt_embeds is None:
            return Conditions()
        encoding, segments = {"do_classifier_free_guidance": guided, "device": device}, None
        if (parts := texts.segment_frames) is not None:
            videos = texts.prompt_embeds, texts.prompt_attention_mask
            if texts.prompt is not None:
                prompts, count = segment_prompts(texts.prompt, len(parts))
                alone = encoding | {"do_classifier_free_guidance": False}
                encoded = self.encode_prompt(prompts, max_sequence_length=texts.max_sequence_length, **alone)
                videos = tuple(None if x is None else x.unflatten(0, (count, -1)) for x in encoded[:2])
            ends = [self.token_frames(end, "frames up to the end of a segment") for end in accumulate(parts)]
            texts, segments = join_segments(texts, *videos, ends=ends, zeros=self.config.null_text == "zeros")
        embeds, mask, unwanted, unwanted_mask = self.encode_prompt(**encoding, **texts.encoder_arguments())
        return Conditions(
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=unwanted,
            negative_prompt_attention_mask=unwanted_mask,
            segments=segments,
        )

    def prepare_given(
        self, name: str, given: Any, *, height: int, width: int, batch: int, prompts: int, device: torch.device
    ) -> Tensor | None:
        """Frames that are given, as the model sees them, `[B, C, frames, H, W]`; None where none are.

        A picture is held still where a patch or a latent holds several frames.

        Args:
            name: "image", "last_image" or "video".
            given: see `__call__`.

        Raises:
            ValueError: pictures that cannot be read, frames that do not fill patches, or not as many images or videos
                as prompts or as clips to make.
        """
        if given is None:
            return None
        space, patch = self.latent_space, self.transformer.config.patch_size[0]
        size = {"channels": 3 if self.vae else space.channels, "height": height, "width": width}
        if name == "video":
            pixels = read_videos(given, **size)
            self.token_frames(pixels.shape[2], "frames of video")
        else:  # the first latent is that of one frame; before the last ones there is one more, which is dropped
            still = (patch if name == "last_image" else patch - 1) * space.time + 1
            pixels = read_images(given, name=name, **size).repeat(1, 1, still, 1, 1)
        count = len(pixels)
        if count not in (1, prompts, batch):
            raise ValueError(
                f"{name} has {count} for {batch} videos of {prompts} prompts; one, or one for each is accepted"
            )
        pixels = pixels.to(device=device, dtype=torch.float32)
        seen = self.normalise(pixels) if self.vae is None else encode(self.vae, pixels)
        seen = seen[:, :, -patch:] if name == "last_image" else seen
        return seen.repeat_interleave(batch // count, dim=0)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, C, T, H, W]` in 0..1 as a model of pixels sees them."""
        mean, std = self._pixel_statistics(pixels)
        return (pixels - mean) / std

    def _pixel_statistics(self, like: Tensor) -> tuple[Tensor, ...]:
        space = self.latent_space
        return tuple(like.new_tensor(x).view(1, -1, 1, 1, 1) for x in (space.mean, space.std))

    # sampling

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        *,
        step: int,
        perturbation: Perturbation,
        caches: dict[str, KVCache] | None = None,
    ) -> Tensor:
        """The guided prediction of the model, `[B, C, T, H, W]` in float32."""
        place = {
            "step_index": step,
            "sigma": float(self.scheduler.sigmas[step]),
            "num_inference_steps": len(self.scheduler.timesteps),
        }

        def predict(name: str, side: str) -> Tensor:
            with self.transformer.cache_context(name, **place):
                return self.transformer(
                    latents.to(self.transformer.dtype),
                    timestep,
                    **sides[side],
                    kv_cache=None if caches is None else caches[side],
                    attention_kwargs=self._attention_kwargs,
                    return_dict=False,
                )[0].float()

        def predict_side(name: str, side: str) -> Tensor:
            segments = conditions.segments if side == "cond" else None
            with self.in_segments(segments, latents, None if caches is None else caches[side]):
                return predict(name, side)

        sides, uncond, perturbed = conditions.sides(), None, None
        if self._guider is not None:
            begin = self.scheduler.begin_index or 0
            where = {"step": step - begin, "steps": len(self.scheduler.timesteps) - begin}
            where["timestep"] = self._current_timestep
            return guided(self._guider, predict_side, transformer=self.transformer, **where)
        with self.in_segments(conditions.segments, latents, None if caches is None else caches["cond"]):
            cond = predict("cond", "cond")
            if perturbation.scale and perturbation.heads:
                with perturbed_heads(self.transformer, perturbation.heads, strength=perturbation.strength):
                    perturbed = predict("perturbed", "cond")
        if "uncond" in sides and self.do_classifier_free_guidance:  # a callback may switch it off
            uncond = predict("uncond", "uncond")
        scales = {"scale": self._guidance_scale, "pag_scale": perturbation.scale, "rescale": self._guidance_rescale}
        return guide(cond, uncond=uncond, perturbed=perturbed, **scales)

    def in_segments(
        self, segments: Segments | None, latents: Tensor, cache: KVCache | None
    ) -> AbstractContextManager[None]:
        """Inside, each segment of the video has a text of its own; latents go on after the frames of the cache."""
        if segments is None:
            return nullcontext()
        if cache is not None:
            frames = latents.shape[2] // self.transformer.config.patch_size[0]
            segments = segments.between(cache.frames, cache.frames + frames)
        return segmented(self.transformer, segments)

    def remember(self, latents: Tensor, conditions: Conditions, caches: dict[str, KVCache]) -> None:
        """Appends clean frames to the caches of a rollout."""
        clean = latents.new_zeros(len(latents))
        for name, condition in conditions.sides().items():
            with self.in_segments(conditions.segments if name == "cond" else None, latents, caches[name]):
                caches[name].append = True
                self.transformer(
                    latents.to(self.transformer.dtype),
                    clean,
                    **condition,
                    kv_cache=caches[name],
                    attention_kwargs=self._attention_kwargs,
                )
                caches[name].append = False

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[list[str]] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_rescale: float = 0.0,
        guider: Any = None,
        sigmas: Sequence[float] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 226,
        segment_frames: Sequence[int] | None = None,
        chunk_frames: int | None = None,
        pag_scale: float = 0.0,
        pag_heads: Heads | None = None,
        pag_strength: float = 1.0,
        output_type: str = "np",
        output_path: Any = None,
        fps: float = 8,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VideoDiTPipelineOutput | tuple:
        """Sample.

        Args:
            prompt: of models of texts, one or a list. With segment_frames, the prompts of one video's segments, or a
                list of such lists.
            class_labels: of models of classes, one or several: integers, or names where the pipeline has `labels`.
            negative_prompt: what guidance leads away from, one for all or one for each; the null text when None.
            image, last_image: the first and the last frame, one for all or one for each, of any size; see
                `given.read_images`.
            video: the first frames, for all or for each, of any size; see `given.read_videos`. With strength, the video
                to change.
            strength: share of the steps in (0, 1] that change a video (SDEdit, arXiv:2108.01073): noise is added up to
                the level of the first of them. None: video stays as it is and is continued.
            height, width, num_frames: of the video in pixels and frames; those of the config's sample_size when None.
            num_inference_steps: evaluations of the model, times two with guidance.
            guidance_scale: of classifier-free guidance (arXiv:2207.12598); off up to 1 and for unconditional models.
            guidance_rescale: see `guidance.guide`, 0 to 1.
            guider: of diffusers, such as `diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0)`, in place of
                guidance_scale, guidance_rescale and pag_scale; see `guiders.check_guider`.
            sigmas: noise levels from 1 down, in place of num_inference_steps; the scheduler's shift applies to them.
            num_videos_per_prompt: videos of each prompt or label.
            generator: one, or one for each video; the same gives the same videos.
            latents: noise `[B, C, T, H, W]` of the model's own size.
            prompt_embeds, negative_prompt_embeds: `[B, L, text_dim]`; with segment_frames `[B, segments, L, text_dim]`
                for prompt_embeds. One negative for all may be given, `[1, L, text_dim]`.
            prompt_attention_mask, negative_prompt_attention_mask: words that count, `[B, L]` (`[B, segments, L]`), bool
                or integers of 0 and 1.
            max_sequence_length: words of a prompt, with a tokenizer.
            segment_frames: frames of each segment of the video that has a prompt of its own; see `segments`.
            chunk_frames: token frames to make at a time, each chunk in sight of those before; for causal models. A
                rollout that a callback interrupts returns the chunks it has finished, within the first the steps done.
            pag_scale: of guidance away from perturbed heads; 0 is off. See `guidance`.
            pag_heads: layer → heads to perturb.
            pag_strength: how much, 0..1.
            output_type: see `VideoDiTPipelineOutput`.
            output_path: file of "gif" and "mp4"; several videos are numbered.
            fps: frames a second of such files.
            return_dict: else a tuple.
            attention_kwargs: for attention processors.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)` after each step; returns tensors to
                go on with.
            callback_on_step_end_tensor_inputs: those it gets: "latents" (in a rollout, the chunk's), "prompt_embeds",
                "negative_prompt_embeds".

        Returns:
            `VideoDiTPipelineOutput`, or a tuple of its frames.

        Raises:
            ValueError: arguments that contradict the model or each other; see `checks`.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        num_frames, height, width = self.video_size(num_frames, height, width)
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._attention_kwargs, self._generator, self._guider = attention_kwargs, generator, guider
        self._interrupt, self._current_timestep = False, None
        texts = Texts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            max_sequence_length,
            segment_frames,
        )
        perturbation, config = Perturbation(pag_scale, pag_heads, pag_strength), self.transformer.config
        check_scheduler(self.scheduler)
        if guider is not None:
            replaced = {"guidance_rescale": guidance_rescale, "pag_scale": pag_scale}
            of_model = {"conditioning": config.conditioning, "layers": config.num_layers}
            check_guider(guider, others=replaced, **of_model)
            self.transformer.register_blocks()
        check_counts(num_inference_steps, num_videos_per_prompt, sigmas, fps)
        check_size(height, width, space=self.latent_space.space, patch=config.patch_size)
        tokens = self.token_frames(num_frames, "num_frames")
        inputs = callback_on_step_end_tensor_inputs
        check_output(output_type, output_path, inputs, accepted=self._callback_tensor_inputs)
        told = {"encoder": self.text_encoder is not None, "null_text": self.config.null_text}
        said = f"guidance_scale={guidance_scale}" if guider is None else f"guider={type(guider).__name__}"
        told["guidance"] = said if self.do_classifier_free_guidance else None
        check_told(texts, class_labels, conditioning=config.conditioning, **told)
        sizes = {"num_frames": num_frames, "token_frames": tokens}
        check_frames(image, last_image, video, segment_frames, chunk_frames, transformer=self.transformer, **sizes)
        check_strength(strength, video, last_image, chunk_frames, guidance_rescale)
        perturbation.check(self.transformer)
        device = self._execution_device
        steps = num_inference_steps if sigmas is None else len(sigmas)
        set_timesteps(self.scheduler, steps, sigmas, device)  # may refuse, so before anything is encoded

        conditions = self.prepare_conditions(texts, class_labels, device=device).repeat(num_videos_per_prompt)
        batch = conditions.videos or num_videos_per_prompt
        size = {"height": height, "width": width, "batch": batch, "prompts": batch // num_videos_per_prompt}
        first = ("video", video) if image is None else ("image", image)
        given = self.prepare_given(*first, device=device, **size)
        space = self.latent_space
        shape = (batch, config.in_channels, space.frames(num_frames), height // space.space, width // space.space)
        latents, begin = draw_noise(shape, generator=generator, device=device, latents=latents), 0
        if strength is None:
            last = self.prepare_given("last_image", last_image, device=device, **size)
            conditions = replace(conditions, first_frames=given, last_frames=last)
        else:
            latents, begin = begin_with(given, latents, self.scheduler, strength)
        if (known := conditions.known + conditions.known_last) >= shape[2]:
            raise ValueError(f"{known} frames are given of {shape[2]}; at least one patch of frames must be left")
        options = {"chunk_frames": chunk_frames, "callback": callback_on_step_end, "callback_inputs": inputs}
        options["begin"] = begin
        latents = self.denoise(latents, conditions, perturbation, steps=steps, sigmas=sigmas, **options)
        frames = self.finish(latents, output_type, output_path, fps)
        self.maybe_free_model_hooks()
        return VideoDiTPipelineOutput(frames=frames) if return_dict else (frames,)

    def denoise(
        self,
        latents: Tensor,
        conditions: Conditions,
        perturbation: Perturbation,
        *,
        steps: int,
        sigmas: Sequence[float] | None = None,
        begin: int = 0,
        chunk_frames: int | None = None,
        callback: Callable[..., dict] | None = None,
        callback_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """The loop over timesteps, in a rollout for one chunk after the other.

        Args:
            latents: noise `[B, C, T, H, W]`.
            conditions: of B videos.
            perturbation: of heads.
            steps, sigmas: of the scheduler.
            begin: first step to take.
            chunk_frames: token frames of each chunk; None: all at once.
            callback, callback_inputs: called after each step, and the tensors it gets.

        Returns:
            Clean latents of the same shape; of an interrupted rollout the chunks that are finished.
        """
        given, caches, chunks, done = conditions.first_frames, None, [latents], []
        if chunk_frames is not None:
            caches = {name: KVCache() for name in conditions.sides()}
            for cache in caches.values():
                cache.append = False  # only `remember` appends
            frames = chunk_frames * self.transformer.config.patch_size[0]
            chunks = list(latents[:, :, conditions.known :].split(frames, dim=2))
            conditions = replace(conditions, first_frames=None)  # the caches hold them
            if given is not None:
                self.remember(given, conditions, caches)
                done = [given]
        self._num_timesteps = (len(self.scheduler.timesteps) - begin) * len(chunks)
        with self.progress_bar(total=self._num_timesteps) as progress:
            for turn, chunk in enumerate(chunks):
                timesteps, finished = set_timesteps(self.scheduler, steps, sigmas, latents.device)[begin:], True
                self.scheduler.set_begin_index(begin)
                for step, t in enumerate(timesteps):
                    if self.interrupt:
                        finished = False
                        break
                    chunk = self.step(chunk, t, conditions, step=begin + step, perturbation=perturbation, caches=caches)
                    if callback is not None:
                        tensors = {"latents": chunk} | conditions.shown()
                        tensors = {name: tensors[name] for name in callback_inputs}
                        returned = callback(self, turn * len(timesteps) + step, t, tensors)
                        chunk, conditions = returned.get("latents", chunk), conditions.change(returned)
                    progress.update()
                if done and not finished:
                    break  # what is made stays free of noise
                done.append(chunk)
                if self.interrupt:
                    break
                if caches is not None:
                    self.remember(chunk, conditions, caches)
        self._current_timestep = None
        return torch.cat(done, dim=2)

    def step(self, latents: Tensor, t: Tensor, conditions: Conditions, **arguments: Any) -> Tensor:
        """One step of the scheduler; frames that are given stay clean, at timestep 0."""
        self._current_timestep = t
        latents = conditions.hold(latents)
        timestep = conditions.timesteps(t, latents, self.transformer.config.patch_size[0])
        velocity = self.velocity(latents, timestep, conditions, **arguments)
        noise = {"generator": self._generator} if "generator" in signature(self.scheduler.step).parameters else {}
        return conditions.hold(self.scheduler.step(velocity, t, latents, return_dict=False, **noise)[0])

    def finish(self, latents: Tensor, output_type: str, output_path: Any, fps: float) -> Any:
        """Convert the model's result to `output_type`."""
        if output_type == "latent":
            return latents
        if self.vae is None:
            mean, std = self._pixel_statistics(latents)
            pixels = (latents * std + mean).clamp(0, 1)
        else:
            pixels = decode(self.vae, latents)
        if output_type in ("gif", "mp4"):
            clips = self.video_processor.postprocess_video(pixels, "pil")
            return save_clips(clips, output_path, kind=output_type, fps=fps)
        return self.video_processor.postprocess_video(pixels, output_type)
