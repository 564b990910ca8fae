"""Latents and inversion through stock pipelines and callbacks."""

from types import SimpleNamespace

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
from foveal.zoo.control.latents import Step, low_band, paste, replace_low_band
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


def scheduler_of(kind, steps):
    if kind != "flow":
        return scheduler(kind, steps)
    made = FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(steps)
    return made


KINDS = ("epsilon", "v_prediction", "flow")


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_leads_back(kind):
    made = scheduler_of(kind, steps := 20)
    predict, clean = field(kind), start() * 0.5
    once = ddim_invert(predict, clean, made)
    exact = ddim_invert(predict, clean, made, rounds=60)
    assert exact.error < 1e-9 < once.error
    assert len(exact.latents) == steps + 1 and torch.equal(exact.latents[0], clean)
    x = exact.start
    for timestep in made.timesteps:
        x = made.step(predict(x, timestep), timestep, x).prev_sample
    assert (x - clean).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_edit_friendly_noises_reproduce_the_image(kind, tmp_path):
    made, predict, clean = scheduler_of(kind, 10), field(kind), start() * 0.5
    inverted = ddpm_invert(predict, clean, made)
    inverted.save(str(tmp_path / "x.safetensors"))
    loaded = Inversion.load(str(tmp_path / "x.safetensors"))
    assert (ddpm_replay(predict, loaded, made) - inverted.latents[0]).abs().max() < 1e-12
    # the last step has no noise that could make up for the model's error
    last = float(made.sigmas[-2]) if kind == "flow" else (1 - float(made.final_alpha_cumprod)) ** 0.5
    assert inverted.error < 5 * last
    assert torch.stack(inverted.noises[:-1]).std() > 0.5
    with pytest.raises(ValueError, match="eta=0 must be above 0"):
        ddpm_invert(predict, clean, made, eta=0)


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_inversion_lowers_the_error(kind):
    embeds = prompts(1).values()
    arguments = (field(kind), start() * 0.5, scheduler_of(kind, 10), *embeds)
    without, inverted = (null_text_invert(*arguments, inner_steps=steps) for steps in (0, 10))
    assert inverted.error < 0.8 * without.error and len(inverted.embeddings) == 10
    with pytest.raises(ValueError, match="guidance_scale=1"):
        null_text_invert(*arguments, guidance_scale=1)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_inversion_reconstructs_the_source(kind):
    """From any noise, whatever the model predicts; noise inside of the mask changes the other branch alone."""
    made, predict = scheduler_of(kind, 10), field(kind)
    mask = torch.zeros(16, 16)
    mask[4:12, 4:12] = 1
    clean, control = start() * 0.5, SimpleNamespace(branches=PAIR)
    outs = {}
    for name, found in (("plain", None), ("noise", mask)):
        edit = edits.VirtualInversion(clean, mask=found)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)).double().repeat(2, 1, 1, 1)
        for timestep in made.timesteps:
            before, prediction = x, predict(x, timestep) * torch.tensor([1.0, 0.7]).double()[:, None, None, None]
            x = edit.move(control, made, prediction, timestep, x)
        at = Step.of(made, made.timesteps[-1], 10)
        outs[name], level = x, at.shares(at.before)
        noise = (before[0] - at.shares(at.alpha)[0] * clean[0]) / at.shares(at.alpha)[1]
        error = x[0] - level[0] * clean[0] - level[1] * noise
        assert error[:, mask == 0].abs().max() < 1e-12 and (found is not None or error.abs().max() < 1e-12)
        assert (x[1] - x[0]).abs().max() > 1e-3
    assert not torch.equal(outs["plain"][1], outs["noise"][1])
    if kind == "flow":  # whose last step ends at the clean latents
        assert (outs["plain"][0] - clean[0]).abs().max() < 1e-12


def test_branches_have_guidance_of_their_own(pipe):
    weak, strong = sample(pipe, guidance_scale=1.0), sample(pipe, guidance_scale=7.5)
    with Control(pipe, edits.RowGuidance({"source": 1.0}), branches=PAIR):
        out = sample(pipe, guidance_scale=7.5)
        with pytest.raises(ValueError, match=r"guidance_scale=1\.0 other than 1"):
            pipe._guidance_scale = 1.0
            type(pipe).do_classifier_free_guidance, before = True, type(pipe).do_classifier_free_guidance
            try:
                pipe.unet(start(4), 500, encoder_hidden_states=prompts(4)["prompt_embeds"])
            finally:
                type(pipe).do_classifier_free_guidance = before
    assert (out[0] - weak[0]).abs().max() < 1e-9 * weak.abs().max() and torch.equal(out[1], strong[1])
    with pytest.raises(ValueError, match="needs the pipeline"):
        Control(pipe.unet, edits.RowGuidance({"source": 1.0}), branches=PAIR)


@pytest.mark.parametrize("name", ["vimaedit", "locatedit"])
def test_edits_without_inversion_run_in_a_stock_pipeline(pipe, name):
    """The source's row is the source; the scheduler is given back, and two runs are equal."""
    clean = start()[:1] * 0.5
    options = {"tokenizer": StubTokenizer(), "steps": 4, "length": 7, "scale": 1, "self_scales": (2,)}
    made = getattr(recipes, name)("a cat on", "a red cat on", clean, ("word",), **options)
    step = pipe.scheduler.step
    with Control(pipe, made, branches=PAIR, words={"word": [2]}, maps="allow") as control:
        outs = [sample(pipe, guidance_scale=7.5, callback_on_step_end=control.callback) for _ in range(2)]
    assert torch.equal(*outs) and pipe.scheduler.step == step and "step" not in vars(pipe.scheduler)
    left = 1 - float(pipe.scheduler.final_alpha_cumprod)
    assert (outs[0][0] - clean[0]).abs().max() < 10 * left**0.5 and not torch.equal(outs[0][0], outs[0][1])
    with pytest.raises(ValueError, match="give the Control the pipeline"):
        Control(pipe.unet, made, branches=PAIR, words={"word": [2]}, maps="allow")


def test_latents_that_a_word_does_not_decide_are_the_references(pipe):
    clean = start()[:1] * 0.5
    (edit,) = recipes.grad_sam("word", clean, scale=2, blur=(1, 1.0), dilate=1, threshold=0.5)
    pipe.scheduler.set_timesteps(4)
    z, embeds, timestep = start() * 2, prompts(1)["prompt_embeds"], pipe.scheduler.timesteps[2]
    with Control(pipe, edit, words={"word": [2]}) as control:
        out = edit.update(control, z, timestep, embeds)
        mask = torch.nn.functional.interpolate(edit.masks[-1].float()[None, None], size=(16, 16))[0, 0] > 0
        sampled = sample(pipe, 1, callback_on_step_end=control.callback, **CALLBACK)
    assert 0 < mask.float().mean() < 1 and len(edit.masks) >= 1 and sampled.isfinite().all()
    assert torch.equal(out[..., mask], z[..., mask])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(out[..., ~mask], Step.of(pipe.scheduler, timestep, 4).noised(clean, noise)[..., ~mask])


def test_regulated_words_lower_their_loss(pipe):
    """The loss falls on maps of 16 x 16; the edit keeps its best addition, in the first steps alone."""
    logits = torch.randn(4, 256, 77, generator=torch.Generator().manual_seed(0))
    added, losses = edits.regulate(logits, (2, 5), (16, 16), iterations=8)
    assert losses[-1] < 0.5 * losses[0] and added.shape == (4, 256, 2)
    found = recipes.attention_regulation(("word",), scales=(2,), until=0.5)
    plain = sample(pipe)
    with Control(pipe, found, words={"word": [2]}, maps="allow") as control:
        assert not torch.equal(sample(pipe), plain)
        assert all(steps == {0, 1} for seen in control.seen.values() for steps in seen.edits.values())
    assert len(found[0].losses) == len(control.seen)


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
