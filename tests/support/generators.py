"""Tiny random generators of diffusers: every model that `foveal.zoo.sites` knows, with arguments of a forward."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from video_models import scrambled, tiny_model

TIME = 500.0


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def time(value: float = TIME, batch: int = 1) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def wan(batch=1, grid=(3, 4, 4), layers=2, image=False, tokens=False, heads=2, head_dim=12):
    options: dict[str, Any] = {"in_channels": 4}
    if image:
        options |= {"image_dim": 4, "added_kv_proj_dim": heads * head_dim}
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
        num_layers=layers, rope_max_seq_len=32, **options,
    )  # fmt: skip
    frames, height, width = grid
    inputs = {
        "hidden_states": noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 512 if image else 12, 16, seed=1),
    }
    if image:
        inputs["encoder_hidden_states_image"] = noise(batch, 5, 4, seed=2)
    if tokens:
        inputs["timestep"] = torch.full((batch, frames * height * width), TIME, dtype=torch.float64)
    return model, inputs


def hunyuan(batch=1):
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    return model, {
        "hidden_states": noise(batch, 4, 3, 4, 5),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(batch, 8, seed=2),
    }


def hunyuan15(batch=1):
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12, rope_axes_dim=(2, 2, 4),
        target_size=16, task_type="t2v",
    )  # fmt: skip
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    return model, {
        "hidden_states": noise(batch, 4, 3, 4, 5),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": noise(batch, 4, 8, seed=2),
        "encoder_attention_mask_2": torch.ones(batch, 4, dtype=torch.bool),
        "image_embeds": torch.zeros(batch, 3, 12, dtype=torch.float64),
    }


def cogvideox(batch=1):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 3, 4, 8, 8),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 6, 8, seed=1),
    }


def cogvideox15(batch=1):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
        patch_size_t=2, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    rope = get_3d_rotary_pos_embed(16, None, (4, 4), 2, grid_type="slice", max_size=(4, 4))
    return model, {
        "hidden_states": noise(batch, 4, 4, 8, 8),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 6, 8, seed=1),
        "image_rotary_emb": rope,
    }


def ltx(batch=1):
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 48, 4),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "timestep": time(batch=batch),
        "encoder_attention_mask": torch.ones(batch, 6, dtype=torch.bool),
        "num_frames": 3,
        "height": 4,
        "width": 4,
    }


def ltx2(batch=1):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=1, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 48, 4),
        "audio_hidden_states": noise(batch, 5, 4, seed=3),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "audio_encoder_hidden_states": noise(batch, 6, 16, seed=2),
        "timestep": time(batch=batch),
        "audio_timestep": time(batch=batch),
        "encoder_attention_mask": torch.ones(batch, 6),
        "audio_encoder_attention_mask": torch.ones(batch, 6),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
    }


def mochi(batch=1):
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=6,
    )  # fmt: skip
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    return model, {
        "hidden_states": noise(batch, 4, 3, 8, 8),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "timestep": time(batch=batch),
        "encoder_attention_mask": mask,
    }


def cosmos(batch=1):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), extra_pos_embed_type=None,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 4, 3, 8, 8),
        "timestep": time(0.5, batch),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 16, 16, dtype=torch.float64),
    }


def latte(batch=1):
    model = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=8,
        in_channels=4, cross_attention_dim=8, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=3,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 4, 3, 8, 8),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 6, 8, seed=1),
    }


def allegro(batch=1):
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=48, sample_height=16, sample_width=16, sample_frames=8, caption_channels=24,
    )  # fmt: skip
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    rope = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 3)
    places = torch.cartesian_prod(*(x.long() for x in rope[3:])).reshape(-1, 3).mT.reshape(3, 1, -1)
    return model, {
        "hidden_states": noise(batch, 4, 3, 8, 8),
        "encoder_hidden_states": noise(batch, 6, 24, seed=1),
        "timestep": time(batch=batch),
        "encoder_attention_mask": torch.ones(batch, 6),
        "image_rotary_emb": (rope[:3], tuple(places)),
    }


def flux_ids(height: int, width: int, *, axes: int = 3, image: int = 0) -> Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = image
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)


def flux(batch=1, grid=(6, 7), reference=None):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    ids = [flux_ids(*grid)] + ([flux_ids(*reference, image=1)] if reference else [])
    ids = torch.cat(ids)
    return model, {
        "hidden_states": noise(batch, len(ids), 4),
        "encoder_hidden_states": noise(batch, 5, 32, seed=1),
        "pooled_projections": noise(batch, 32, seed=2),
        "timestep": time(0.5, batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }


def flux2(batch=1):
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    ids = torch.cat([flux_ids(6, 7, axes=4), flux_ids(2, 3, axes=4, image=10)])
    return model, {
        "hidden_states": noise(batch, len(ids), 4),
        "encoder_hidden_states": noise(batch, 5, 32, seed=1),
        "timestep": time(0.5, batch),
        "guidance": time(1.0, batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 4),
    }


def sd3(batch=1):
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "pooled_projections": noise(batch, 16, seed=2),
        "timestep": time(batch=batch),
    }


def qwen(batch=1):
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    return model, {
        "hidden_states": noise(batch, 42 + 6, 16),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "encoder_hidden_states_mask": mask,
        "timestep": time(0.5, batch),
        "img_shapes": [[(1, 6, 7), (1, 2, 3)]] * batch,
    }


def hidream(batch=1, size=(8, 8)):
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[8, 8], text_emb_dim=8, num_routed_experts=2, num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1),
    )  # fmt: skip
    return model, {
        "hidden_states": noise(batch, 4, *size),
        "timesteps": time(batch=batch),
        "encoder_hidden_states_t5": noise(batch, 4, 8, seed=1),
        "encoder_hidden_states_llama3": noise(2, batch, 4, 8, seed=2),
        "pooled_embeds": noise(batch, 8, seed=3),
    }


def z_image(batch=1):
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {
        "x": [noise(4, 1, 12, 14, seed=i) for i in range(batch)],
        "t": time(0.5, batch),
        "cap_feats": [noise(7 + i, 16, seed=9) for i in range(batch)],
    }


def sd_unet(batch=1, size=(9, 12), **options):
    model = diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=2,
        **options,
    )  # fmt: skip
    return model, {
        "sample": noise(batch, 4, *size),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 7, 12, seed=1),
    }


def motion_unet(batch=1, frames=5):
    model = diffusers.UNetMotionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlockMotion",) * 2, up_block_types=("CrossAttnUpBlockMotion",) * 2,
        num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip
    return model, {
        "sample": noise(batch, 4, frames, 9, 12),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 7, 12, seed=1).repeat_interleave(frames, 0),
    }


def sdxl_unet(batch=1):
    model = diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), cross_attention_dim=12,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    conditions = {"text_embeds": noise(batch, 16, seed=2), "time_ids": noise(batch, 6, seed=3)}
    return model, {
        "sample": noise(batch, 4, 9, 12),
        "timestep": time(batch=batch),
        "encoder_hidden_states": noise(batch, 7, 12, seed=1),
        "added_cond_kwargs": conditions,
    }


def video_dit(conditioning, batch=1):
    inputs: dict[str, Any] = {"hidden_states": noise(batch, 1, 3, 16, 20), "timestep": time(batch=batch)}
    if conditioning == "class":
        inputs["class_labels"] = torch.arange(batch)
    else:
        inputs["encoder_hidden_states"] = noise(batch, 5, 12, seed=1)
    return tiny_model(conditioning), inputs


GENERATORS: dict[str, Callable[..., tuple[nn.Module, dict[str, Any]]]] = {
    "wan": wan,
    "wan i2v": lambda batch=1: wan(batch, image=True, layers=1),
    "wan ti2v": lambda batch=1: wan(batch, tokens=True, layers=1),
    "hunyuan": hunyuan,
    "hunyuan 1.5": hunyuan15,
    "cogvideox": cogvideox,
    "cogvideox 1.5": cogvideox15,
    "ltx": ltx,
    "ltx2": ltx2,
    "mochi": mochi,
    "cosmos": cosmos,
    "latte": latte,
    "allegro": allegro,
    "flux": flux,
    "flux kontext": lambda batch=1: flux(batch, reference=(3, 4)),
    "flux2": flux2,
    "sd3": sd3,
    "qwen": qwen,
    "hidream": hidream,
    "hidream wide": lambda batch=1: hidream(batch, size=(6, 8)),
    "z-image": z_image,
    "sd unet": sd_unet,
    "sdxl unet": sdxl_unet,
    "motion unet": motion_unet,
    "videodit": lambda batch=1: video_dit("cross", batch),
    "videodit joint": lambda batch=1: video_dit("joint", batch),
}


def build(name: str, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """A generator in double precision whose parts all matter, and arguments of its forward."""
    torch.manual_seed(0)
    model, inputs = GENERATORS[name](batch=batch)
    return scrambled(model).double().eval(), inputs


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The prediction, a list of images stacked."""
    out = model(**{name: list(x) if isinstance(x, list) else x for name, x in inputs.items()}, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out
