"""A pipeline as far as Controls look at it: guided steps of a tiny random UNet from prompts to latents."""

from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from stub_tokenizer import StubTokenizer


class TinyPipeline:
    """Guides by a factor of 2, calls back after each step."""

    do_classifier_free_guidance = True
    tokenizer = StubTokenizer()

    def __init__(self):
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 8, 16), norm_num_groups=4, cross_attention_dim=12,
            down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=2,
        ).eval()  # fmt: skip
        self.components = {"unet": self.unet}
        self.scheduler = DDIMScheduler()

    @torch.no_grad()
    def __call__(self, prompts, generator, callback_on_step_end=None, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        self.num_timesteps = self._num_timesteps = num_inference_steps
        latents = torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in generator])
        ids = torch.tensor([(self.tokenizer.encode(prompt) + [1] * 77)[:77] for prompt in prompts])
        text = torch.nn.functional.one_hot(ids % 12, 12).float()
        both = torch.cat([torch.zeros_like(text), text])
        for step, timestep in enumerate(self.scheduler.timesteps):
            uncond, cond = self.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=both).sample.chunk(2)
            latents = self.scheduler.step(uncond + 2 * (cond - uncond), timestep, latents).prev_sample
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, timestep, {"latents": latents})["latents"]
        return SimpleNamespace(images=list(latents))
