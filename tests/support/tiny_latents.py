"""Folders that the video task reads for transformers of diffusers: a tiny pipeline, a cache of latents with texts."""

import json
from pathlib import Path
from typing import Any

import diffusers
import generators
import torch
from safetensors.torch import save_file
from torch import Tensor
from video_models import scrambled

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
KINDS = {  # grid of latents [T, H, W], channels and tokens of texts, scheduler
    "wan": (
        (3, 4, 4), 16, 12,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ),
    "ltx": ((3, 4, 4), 16, 6, FLOW(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=128)),
    "hunyuan": ((3, 4, 4), 16, 6, FLOW(shift=7.0)),
    "cogvideox": (
        (3, 8, 8), 8, 6,
        diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    ),
    "cogvideox15": (
        (4, 8, 8), 8, 6,
        diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ),
}  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformer(kind: str) -> Any:
    """A tiny transformer whose parameters all matter, in float32."""
    torch.manual_seed(0)
    return scrambled(getattr(generators, kind)()[0])


def save_generator(folder: Path, kind: str) -> Path:
    """The folders `transformer` and `scheduler` of a pipeline."""
    transformer(kind).save_pretrained(folder / "transformer")
    KINDS[kind][3].save_pretrained(folder / "scheduler")
    return folder


def write_latents(folder: Path, kind: str, *, clips: int = 6) -> Path:
    """A cache as `foveal.zoo.data.latents` writes it: smooth clips, each with a text of its own."""
    grid, width, length, _ = KINDS[kind]
    tensors, listed = {}, []
    for i in range(clips):
        tensors[f"{i}.latents"] = drawn(4, *grid, seed=i).bfloat16()
        tensors[f"t{i}.text"] = drawn(length, width, seed=100 + i)
        tensors[f"t{i}.text_mask"] = torch.arange(length) < length - i % 2 * (kind != "cogvideox")
        split = "train" if i < clips - 2 else "val"
        listed.append({"split": split, "label": 0, "caption": f"clip {i}", "text": f"t{i}", "key": str(i)})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "0.safetensors")
    size = [4 * grid[0] - 3, 8 * grid[1], 8 * grid[2]]
    described = {"vae": "", "classes": [], "text_dim": width, "sample_size": size, "clips": listed}
    (folder / "latents.json").write_text(json.dumps(described))
    save_file({"text": drawn(2, width, seed=99)}, folder / "empty.safetensors")
    return folder


def write_wan(folder: Path) -> Path:
    """A whole pipeline of Wan with a text encoder and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "blue": 3, "sky": 4}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="</s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(UMT5Config(**sizes)), vae=vae,
        transformer=transformer("wan"), scheduler=KINDS["wan"][3],
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder
