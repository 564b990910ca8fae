"""VideoDiT: a diffusion transformer for videos and images, attention chosen layer by layer.

Notable: patches of any size and videos of any number of patches; adaLN-single or TD-LN; RMS norms of queries and keys;
RoPE from explicit positions; one timestep for a video, a frame or a token; causal layers that roll out with a KV cache.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .blocks import JointVideoDiTBlock, VideoDiTBlock
from .inputs import check_axes, check_config, check_inputs, check_numbers, patchify, unpatchify, velocity_of
from .kv_cache import KVCache
from .modulation import Modulation, wide
from .parallel import PLAN, check_parallel, share_of
from .pattern import Pattern
from .positions import grid_positions, rotary_embedding
from .presets import PRESETS


class VideoDiT(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Diffusion transformer for videos `[B, C, T, H, W]`; an image is a video of one frame.

    Blocks follow Wan (adaLN-single, cross-attention without modulation) or, with `conditioning="joint"`, MM-DiT.
    A new model returns zeros: output projection, modulation and the output of cross-attention start at zero.

    Args:
        in_channels: channels C of the latents or pixels.
        out_channels: channels of the output; in_channels when None.
        patch_size: frames, rows and columns of a patch, (1, 2, 2) for latents, (2, 4, 4) for pixels.
        num_layers: blocks.
        num_attention_heads, attention_head_dim: heads and their size; their product is the width.
        mlp: "gelu" (tanh) or "swiglu", both with the parameters of hidden size mlp_ratio * width.
        mlp_ratio: see mlp.
        conditioning: None, "class" (an embedding added to that of the timestep), "cross" (cross-attention to text) or
            "joint" (text tokens attend along with the video; see `JointVideoDiTBlock`).
        num_classes: with "class"; label num_classes is the null class of classifier-free guidance.
        text_dim: with "cross" and "joint", channels of encoder_hidden_states.
        attention: what layers see, layer i takes attention[i % len(attention)]: "dense", "spatial", "temporal", "first"
            (every frame sees the first one) or a dict such as
            {"type": "window", "window": [3, 3, 3], "stride": 1, "dilation": 1, "causal": True}; "causal" (in time) goes
            with these types. Windows fit themselves to small videos; see `pattern.Pattern.fit`. Or
            {"type": "sparse", "mask": "vsa", "options": {"block": [2, 4, 4]}, "budget": 0.2}: blocks of a mask of
            `foveal.kernels.masks`, "flat": True for masks of the flattened grid; see `pattern.Pattern`. Or
            {"type": "local_scan", "window": 8, "shift": 4}, LaMamba-Diff's: scans of each frame, then attention in its
            windows; not with "joint".
        rope_theta: longest wavelength of the rotary embedding over 2 pi.
        rope_axes: channels of a head that turn with t, h and w; 24, 20, 20 of 64 in proportion when None.
        modulation: "adaln_single", "td_ln" (`modulation.TimeDependentLayerNorm`; the embedding of timestep and class
            is then added to every token) or "td_ln_snr" (`modulation.SNRLayerNorm`, DiMR's own form).
        gated_attention: gate every head's output by 2 * sigmoid of a projection of its input.
        prediction: "velocity", or "video": the layers predict the clean video, from which the velocity follows as
            (noisy - clean) / max(t, 0.05). Few layers with large patches have an easier task so ("Back to Basics: Let
            Denoising Generative Models Denoise", arXiv:2511.13720, §4.3).
        eps: of all norms.

    Raises:
        ValueError: arguments that are unknown, out of range or contradict each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("VideoDiTBlock", "JointVideoDiTBlock")
    _repeated_blocks = ("VideoDiTBlock", "JointVideoDiTBlock")
    _cp_plan = PLAN
    _skip_layerwise_casting_patterns = ("patch_embed", "time_embed", "class_embed", "modulation", "norm")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: Sequence[int] = (1, 2, 2),
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        conditioning: str | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        attention: Sequence[str | dict[str, Any]] = ("dense",),
        rope_theta: float = 10000.0,
        rope_axes: Sequence[int] | None = None,
        modulation: str = "adaln_single",
        gated_attention: bool = False,
        prediction: str = "velocity",
        eps: float = 1e-6,
    ):
        super().__init__()
        check_numbers(
            {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "num_layers": num_layers,
                "num_attention_heads": num_attention_heads,
                "attention_head_dim": attention_head_dim,
                "mlp_ratio": mlp_ratio,
                "num_classes": num_classes,
                "text_dim": text_dim,
                "rope_theta": rope_theta,
            },
            eps,
        )
        check_config(patch_size, mlp, conditioning, num_classes, text_dim, attention, modulation, prediction)
        if prediction == "video" and out_channels not in (None, in_channels):
            raise ValueError(f"out_channels={out_channels} must be in_channels={in_channels} with prediction='video'")
        dim = num_attention_heads * attention_head_dim
        self.rope_axes = check_axes(rope_axes, attention_head_dim)
        self.patterns = [Pattern.from_config(attention[i % len(attention)]) for i in range(num_layers)]

        self.patch_embed = nn.Linear(in_channels * prod(patch_size), dim)
        self.time_frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        self.class_embed = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        self.text_embed = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh") if text_dim else None
        self.modulation_proj = nn.Linear(dim, 6 * dim) if modulation == "adaln_single" else None

        common = {
            "heads": num_attention_heads,
            "head_dim": attention_head_dim,
            "mlp": mlp,
            "mlp_ratio": mlp_ratio,
            "modulation": modulation,
            "gated": gated_attention,
            "eps": eps,
        }
        if conditioning == "joint":
            if any(pattern.type == "local_scan" for pattern in self.patterns):
                raise ValueError(f"attention={attention!r}: local_scan layers have no place for the text of 'joint'")
            blocks = (
                JointVideoDiTBlock(dim, pattern=pattern, last=i == num_layers - 1, **common)
                for i, pattern in enumerate(self.patterns)
            )
        else:
            cross = conditioning == "cross"
            blocks = (VideoDiTBlock(dim, pattern=pattern, cross=cross, **common) for pattern in self.patterns)
        self.blocks = nn.ModuleList(blocks)

        self.output_modulation = nn.Parameter(torch.zeros(2, dim))  # shift, scale
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * prod(patch_size))
        self.gradient_checkpointing = False
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VideoDiT":
        """A new model of a size in `presets.PRESETS`: nano, s, b, l, xl or latte_xl.

        Args:
            overrides: arguments of the class, over those of the preset.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"name={name!r} must be one of {sorted(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    def reset_parameters(self) -> None:
        """Initialise: Linear layers Xavier-uniform, embeddings with deviation 0.02, outputs and modulation zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed.weight, std=0.02)
        zero = [self.proj_out, self.modulation_proj]
        zero += [block.attn2.to_out[0] for block in self.blocks if getattr(block, "attn2", None) is not None]
        zero += [m.to_gate_logits for m in self.modules() if getattr(m, "to_gate_logits", None) is not None]
        for layer in zero:
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def is_causal(self) -> bool:
        """Return whether no frame attends to a later one, so that a rollout with a `KVCache` is possible.

        Frames that see only themselves tell nothing, unless through words that see all of them.
        """
        joint = self.config.conditioning == "joint"
        return all(pattern.causal or not (pattern.remembers or joint) for pattern in self.patterns)

    @staticmethod
    def register_blocks() -> None:
        """Tell diffusers' caches and guiders which outputs of blocks are hidden states."""
        TransformerBlockRegistry.register(VideoDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        TransformerBlockRegistry.register(
            JointVideoDiTBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
        )

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Share the tokens of a video among ranks that sample together; see `diffusers.ContextParallelConfig`.

        Raises:
            ValueError: what is not `ulysses_degree`, a degree that does not divide the heads, or layers that cannot be
                shared; see `parallel.check_parallel`.
        """
        check_parallel(config, heads=self.config.num_attention_heads, patterns=self.patterns)
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def enable_cache(self, config: Any) -> None:
        """Switch on one of diffusers' caches across steps; see `diffusers.CacheMixin.enable_cache`."""
        self.register_blocks()
        super().enable_cache(config)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        kv_cache: KVCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict, for rectified flow the velocity noise - video.

        Args:
            hidden_states: noisy video `[B, in_channels, T, H, W]`; each of T, H, W a multiple of patch_size.
            timestep: 0 (data) to 1000 (noise): `[B]`, or one a frame of patches `[B, T / patch]`, or one a token
                `[B, tokens]` in raster order.
            encoder_hidden_states: text `[B, L, text_dim]` of "cross" and "joint".
            class_labels: int64 `[B]` of "class", 0 to num_classes; num_classes means none.
            encoder_attention_mask: words that count, `[B, L]`, bool or integers of 0 and 1; all when None. With "cross"
                also `[B, tokens, L]`, the words that each token of the video sees, at least one: regional prompts.
            positions: coordinates (t, h, w) of the tokens, `[tokens, 3]` or `[B, tokens, 3]`, any real numbers; those
                of the grid when None, counted on from the frames in kv_cache.
            kv_cache: earlier frames of a rollout; hidden_states continues them. Needs a causal model.
            attention_kwargs: for attention processors; "scale" is the strength of LoRA layers.
            return_dict: an output with `sample`, else a tuple.

        Returns:
            `sample` `[B, out_channels, T, H, W]`.

        Raises:
            ValueError: an argument that is missing, not for this conditioning, or of a wrong shape.
        """
        check_inputs(
            self.config,
            hidden_states,
            timestep,
            encoder_hidden_states,
            class_labels,
            encoder_attention_mask,
            positions,
            kv_cache,
            is_causal=self.is_causal,
            checkpointing=self.gradient_checkpointing,
        )
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()  # tokenizers return integers
        patch = self.config.patch_size
        grid = tuple(n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True))
        dtype = self.patch_embed.weight.dtype

        # tokens, where they are, and when
        noisy = patchify(hidden_states, patch)  # [B, S, in_channels * patch]
        share = share_of(self._parallel_config)
        if share is not None:
            share.check(noisy.shape[1], training=self.training and torch.is_grad_enabled())
        tokens = self.patch_embed(noisy.to(dtype))  # [B, S, dim]
        if positions is None:
            first = 0 if kv_cache is None else kv_cache.frames
            positions = grid_positions(grid, first_frame=first, device=tokens.device)
        turns = {"axes": self.rope_axes, "theta": self.config.rope_theta, "dtype": wide(tokens.dtype)}
        rotary_emb = rotary_embedding(positions, **turns)
        embedding = self.embed_time(timestep, tokens.dtype)  # [B, M, dim], M = 1, frames or tokens
        if self.class_embed is not None and class_labels is not None:
            embedding = embedding + self.class_embed(class_labels)[:, None]
        conditioning = self.condition(timestep, embedding)
        if share is not None:  # tokens are this rank's from here to the last projection
            embedding, conditioning = (share.own(x, noisy.shape[1]) for x in (embedding, conditioning))
            if encoder_attention_mask is not None and encoder_attention_mask.dim() == 3:
                encoder_attention_mask = share.own(encoder_attention_mask, noisy.shape[1])
        if self.config.modulation != "adaln_single":
            tokens = (tokens.unflatten(1, (embedding.shape[1], -1)) + embedding[:, :, None]).flatten(1, 2)
        if self.text_embed is not None and encoder_hidden_states is not None:
            encoder_hidden_states = self.text_embed(encoder_hidden_states.to(dtype))  # [B, L, dim]

        # layers
        if self.config.conditioning == "joint":
            clean = torch.zeros_like(timestep[:1].flatten()[:1])
            text_conditioning = self.condition(clean, self.embed_time(clean, tokens.dtype))
        for i, block in enumerate(self.blocks):
            cache = None if kv_cache is None else kv_cache.layer(i)
            common = (encoder_attention_mask, rotary_emb, grid, cache, attention_kwargs)
            if self.config.conditioning == "joint":
                tokens, encoder_hidden_states = self.run(
                    block, tokens, encoder_hidden_states, conditioning, text_conditioning, *common
                )
            else:
                tokens = self.run(block, tokens, encoder_hidden_states, conditioning, *common)
        if kv_cache is not None:
            kv_cache.advance(grid[0])

        # pixels or latents again
        shift, scale = (self.output_modulation + embedding[:, :, None].to(wide(tokens.dtype))).unsqueeze(3).unbind(2)
        out = self.proj_out(Modulation(shift, scale, None).modulate(tokens, self.config.eps))
        if self.config.prediction == "video":
            out = velocity_of(out, noisy, timestep)
        sample = unpatchify(out, grid, patch)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, under gradient checkpointing when that is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            assert self._gradient_checkpointing_func is not None
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding `[B, M, dim]` of timesteps `[B]` (M = 1) or `[B, M]`."""
        times = timestep.reshape(timestep.shape[0], -1)
        frequencies = self.time_frequencies(times.flatten()).to(dtype)  # [B * M, 256]
        return self.time_embed(frequencies).unflatten(0, times.shape)

    def condition(self, timestep: Tensor, embedding: Tensor) -> Tensor:
        """Input of the blocks' modulation: `[B, M, 6, dim]` of adaLN-single, times `[B, M]` of TD-LN."""
        if self.modulation_proj is None:
            return timestep.reshape(timestep.shape[0], -1).to(wide(embedding.dtype)) / 1000
        values = self.modulation_proj(nn.functional.silu(embedding))
        return values.unflatten(-1, (6, -1)).to(wide(embedding.dtype))
