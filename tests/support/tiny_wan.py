"""A tiny random pipeline of Wan: nothing is downloaded, a step takes milliseconds."""

import diffusers
import torch
from video_models import scrambled

CALL = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4}


def tiny_wan(layers: int = 2) -> diffusers.WanPipeline:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=scrambled(transformer), scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call() -> dict:
    generator = torch.Generator().manual_seed(3)
    texts = torch.randn(2, 1, 12, 16, generator=generator)
    return CALL | {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
