"""Latents and inversion through stock pipelines and callbacks."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from foveal.zoo.control import Control, edits, recipes
from foveal.zoo.control.inversion import (
    Inversion,
    ddim_invert,
    ddpm_invert,
    ddpm_replay,
    embeddings_callback,
    null_text_invert,
)
from foveal.zoo.control.latents import low_band, paste, replace_low_band
from foveal.zoo.control.recipes.prompt_to_prompt import local_blend
from generators import build
from stub_tokenizer import StubTokenizer
from torch import nn

PAIR = ("source", "target")
OPTIONS = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"}
CALLBACK = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def scheduler(kind="epsilon", steps=4):
    made = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=kind, timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


class TinyVAE(nn.Module):
    config = type("Config", (), {"block_out_channels": (1,), "scaling_factor": 1.0})()
    dtype = torch.float64


@pytest.fixture(scope="module")
def pipe():
    """Stable Diffusion with a tiny UNet in double precision; prompts come encoded."""
    model, _ = build("sd unet")
    model.requires_grad_(False)
    made = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=model, scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.vae_scale_factor = 1
    return made


def prompts(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(count, 7, 12, generator=generator).double(),
        "negative_prompt_embeds": torch.zeros(count, 7, 12).double(),
    }


def start(count=1):
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double().expand(count, -1, -1, -1)


def sample(pipe, count=2, **options):
    return pipe(**OPTIONS | prompts(count) | {"latents": start(count).clone()} | options).images


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_guided_run_of_prompt_to_prompt(pipe, guidance_scale):
    """The source's picture is the model's own, and outside of a mask the target's is the source's."""
    plain = sample(pipe, guidance_scale=guidance_scale)
    options = {"tokenizer": StubTokenizer(), "steps": 4, "length": 7, "self_scales": (2,)}
    found = recipes.prompt_to_prompt("a cat on", "a tiger on", **options)
    mask = torch.zeros(16, 16)
    mask[4:12, 4:12] = 1
    with Control(pipe, found, edits.Blend(mask), branches=PAIR) as control:
        out = sample(pipe, guidance_scale=guidance_scale, callback_on_step_end=control.callback)
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])
    outside = mask == 0
    assert torch.equal(out[1][:, outside], out[0][:, outside])
    assert not torch.equal(out[1][:, ~outside], out[0][:, ~outside])
    assert "rows 4 → 4" in control.report() or guidance_scale == 1
    assert torch.equal(sample(pipe, guidance_scale=guidance_scale), plain)


def test_two_runs_equal_two_fresh_ones(pipe):
    def observed():
        return local_blend(["word"], ["word"], steps=4, scale=2, start=0.0)

    first = observed()
    with Control(pipe, first, branches=PAIR, words={"word": [2]}) as control:
        images = [sample(pipe, callback_on_step_end=control.callback) for _ in range(2)]
        maps = first[0].maps
    assert torch.equal(*images)
    second = observed()
    with Control(pipe, second, branches=PAIR, words={"word": [2]}) as control:
        sample(pipe, callback_on_step_end=control.callback)
    assert torch.equal(second[0].maps, maps)


def test_losses_of_maps_move_latents_down(pipe):
    """In every step one update lowers the loss there; size 0 is neutral."""
    plain = sample(pipe, count=1)
    words = {"first": [1], "second": [3]}

    def with_size(size):
        found = recipes.astar(("first", "second"), size=lambda step, total: size, scale=2)
        with Control(pipe, found, words=words) as control:
            out = sample(pipe, 1, callback_on_step_end=control.callback, **CALLBACK)
            return out, list(found[1].values)

    same, before = with_size(0.0)
    # observed columns beside the values may change the order of sums
    assert (same - plain).abs().max() < 1e-9 * plain.abs().max() and len(before) == 3
    moved, _ = with_size(5.0)
    assert not torch.equal(moved, plain)

    found = recipes.bacon({"first": (0, 0, 0.5, 1)}, size=0.5, scale=2)
    with Control(pipe, found, words=words) as control:
        z, embeds = start(), prompts(1)["prompt_embeds"]
        for _ in range(4):
            z = found[1].update(control, z, torch.tensor(750), embeds)
        losses = found[1].values
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    with Control(pipe, found, words=words) as control, pytest.raises(ValueError, match="callback_on_step_end_tensor"):
        sample(pipe, 1, callback_on_step_end=control.callback)


def field(kind):
    """A smooth model of its latents and of time."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double() / 4

    def predict(x, timestep, embeds=None):
        scale = 0.2 if kind == "flow" else 0.8
        out = scale * torch.einsum("oc,bchw->bohw", weight, x).tanh()
        return out if embeds is None else out + 0.3 * embeds.mean((1, 2))[:, None, None, None]

    return predict


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_inversion_leads_back(kind):
    steps = 20
    if kind == "flow":
        made = FlowMatchEulerDiscreteScheduler()
        made.set_timesteps(steps)
    else:
        made = scheduler(kind, steps)
    predict, clean = field(kind), start() * 0.5
    once = ddim_invert(predict, clean, made)
    exact = ddim_invert(predict, clean, made, rounds=60)
    assert exact.error < 1e-9 < once.error
    assert len(exact.latents) == steps + 1 and torch.equal(exact.latents[0], clean)
    x = exact.start
    for timestep in made.timesteps:
        x = made.step(predict(x, timestep), timestep, x).prev_sample
    assert (x - clean).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edit_friendly_noises_reproduce_the_image(kind, tmp_path):
    made, predict, clean = scheduler(kind, 10), field(kind), start() * 0.5
    inverted = ddpm_invert(predict, clean, made)
    inverted.save(str(tmp_path / "x.safetensors"))
    loaded = Inversion.load(str(tmp_path / "x.safetensors"))
    assert (ddpm_replay(predict, loaded, made) - inverted.latents[0]).abs().max() < 1e-12
    last = 1 - float(made.final_alpha_cumprod)
    assert inverted.error < 5 * last**0.5
    with pytest.raises(ValueError, match="not of flows"):
        flow = FlowMatchEulerDiscreteScheduler()
        flow.set_timesteps(4)
        ddpm_invert(predict, clean, flow)


def test_null_text_inversion_lowers_the_error():
    embeds = prompts(1).values()
    arguments = (field("epsilon"), start() * 0.5, scheduler(steps=10), *embeds)
    without, inverted = (null_text_invert(*arguments, inner_steps=steps) for steps in (0, 10))
    assert inverted.error < 0.8 * without.error and len(inverted.embeddings) == 10
    with pytest.raises(ValueError, match="guidance_scale=1"):
        null_text_invert(*arguments, guidance_scale=1)


def test_embeddings_of_null_text_inversion_run_in_a_stock_pipeline(pipe):
    made, embeds = scheduler(steps=4), prompts(1)
    predict = lambda x, t, e: pipe.unet(x, t, encoder_hidden_states=e).sample  # noqa: E731
    clean = start() * 0.5
    inverted = null_text_invert(predict, clean, made, *embeds.values(), inner_steps=2)
    out = pipe(
        **OPTIONS, latents=inverted.start.clone(), prompt_embeds=embeds["prompt_embeds"],
        negative_prompt_embeds=inverted.embeddings[0], callback_on_step_end=embeddings_callback(inverted.embeddings),
        guidance_scale=7.5, **CALLBACK,
    ).images  # fmt: skip
    assert abs(float((out - clean).abs().max()) - inverted.error) < 1e-6


def test_layers_and_low_bands():
    canvas, layer = torch.zeros(1, 1, 4, 5), torch.ones(1, 1, 4, 5)
    mask = torch.zeros(4, 5)
    mask[0, 0] = 1
    assert paste(canvas, layer, mask, shift=(2, 3)).nonzero().tolist() == [[0, 0, 2, 3]]
    assert paste(canvas, layer, mask, flip=True).nonzero().tolist() == [[0, 0, 0, 4]]
    assert torch.equal(paste(layer * 3, layer, mask * 0), layer * 3)
    x, y = torch.randn(2, 1, 3, 9, 12)
    mixed = replace_low_band(x, y, 0.4)
    assert (low_band(mixed, 0.4) - low_band(y, 0.4)).abs().max() < 1e-6
    assert torch.equal(replace_low_band(x, y, 0.4, weight=0.0), x)
