"""Tiny video models and pipelines of the tests: a step takes milliseconds."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from foveal.zoo.video import VideoDiT, VideoDiTPipeline
from torch import Tensor, nn

SIZE = [4, 8, 8]  # frames, height, width
TEXT = 12  # channels of embeddings
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}


def scrambled(model: nn.Module, seed: int = 0) -> Any:
    """A model whose outputs, gates and modulation are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def tiny_model(conditioning: str | None = "class", **config: Any) -> VideoDiT:
    """Two layers of two heads on grey pixels, patches of 1x4x4."""
    config = {
        "in_channels": 1,
        "patch_size": (1, 4, 4),
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "rope_theta": 100.0,
        "num_classes": 10 if conditioning == "class" else None,
        "text_dim": TEXT if conditioning in ("cross", "joint") else None,
    } | config
    return scrambled(VideoDiT(conditioning=conditioning, **config))


def tiny_pipe(conditioning: str | None = "class", *, vae: Any = None, text_encoder: Any = None, **config: Any):
    pipe = VideoDiTPipeline(
        tiny_model(conditioning, **config),
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=text_encoder,
        pixel_mean=None if vae is not None else [0.2],
        pixel_std=None if vae is not None else [0.4],
        sample_size=SIZE if vae is None else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def letters(prompts: list[str], length: int = 3) -> Tensor:
    """A text encoder: a fixed vector for each of the first letters."""
    table = torch.randn(256, TEXT, generator=torch.Generator().manual_seed(7))
    return torch.stack([table[[ord(c) % 256 for c in prompt.ljust(length)[:length]]] for prompt in prompts])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
