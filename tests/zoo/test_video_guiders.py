"""Guiders of diffusers in the pipeline: plain guidance bit for bit, the others as their formulas say."""

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.guiders.ltx2_guidance import LTX2Guidance
from foveal.zoo.video.guidance import guide
from video_models import letters, seeded, tiny_pipe

STEPS = {"num_inference_steps": 4, "output_type": "latent"}
CAUSAL = [{"type": "dense", "causal": True}]


def made(pipe, **call):
    told = {"class_labels": [1, 2]} if pipe.transformer.config.conditioning == "class" else {"prompt": ["a", "b"]}
    return pipe(**told, **STEPS, generator=seeded(), **call).frames


@pytest.mark.parametrize("conditioning", ["class", "cross", "joint"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_plain_guidance_is_guidance_scale(conditioning, rescale):
    pipe = tiny_pipe(conditioning, text_encoder=letters if conditioning != "class" else None)
    expected = made(pipe, guidance_scale=3.0, guidance_rescale=rescale)
    ours = made(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=rescale))
    if rescale:  # the same formula with its sum in another order
        torch.testing.assert_close(ours, expected)
    else:
        assert torch.equal(ours, expected)
    assert not torch.allclose(ours, made(pipe, guidance_scale=1.0), rtol=1e-2)


def test_guidance_of_some_steps_saves_the_other_half(monkeypatch):
    """From the second of four steps on; a guider that is off gives what guidance_scale=1 gives."""
    pipe, calls = tiny_pipe(), []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *a, **k: calls.append(k["class_labels"]) or forward(*a, **k)
    )
    made(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.25))
    assert len(calls) == 1 + 2 * 3
    assert torch.equal(
        made(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0, enabled=False)), made(pipe, guidance_scale=1.0)
    )


def test_rollouts_are_guided_chunk_by_chunk():
    pipe = tiny_pipe(attention=CAUSAL)
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    assert torch.equal(made(pipe, guider=guider, chunk_frames=2), made(pipe, guidance_scale=3.0, chunk_frames=2))


def test_projected_guidance_removes_what_is_parallel():
    """One step from noise, eta 0: the update is orthogonal to the prediction."""
    pipe = tiny_pipe()
    noise = torch.randn(1, 1, 4, 8, 8, generator=seeded(1))
    one = {"class_labels": 1, "sigmas": [1.0], "latents": noise, "output_type": "latent"}
    cond = noise - pipe(**one, guidance_scale=1.0).frames
    uncond = pipe.transformer(noise, torch.tensor([1000.0]), class_labels=torch.tensor([10])).sample.detach()
    guider = AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.0)
    ours = noise - pipe(**one, guider=guider).frames
    update = (ours - uncond).flatten()
    assert abs(torch.cosine_similarity(update, cond.flatten(), dim=0)) < 1e-4 and update.norm() > 0.1
    plain = guide(cond, uncond=uncond, scale=4.0)
    assert not torch.allclose(ours, plain, rtol=1e-2)


def test_a_skipped_layer_is_left_out_and_comes_back():
    pipe = tiny_pipe()
    before = made(pipe, guidance_scale=3.0)
    always = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    guider = SkipLayerGuidance(
        guidance_scale=3.0, skip_layer_guidance_scale=2.0, skip_layer_guidance_layers=[1], **always
    )
    ours = made(pipe, guider=guider)
    assert not torch.allclose(ours, before, rtol=1e-2)
    assert torch.equal(made(pipe, guidance_scale=3.0), before)

    model, scheduler = pipe.transformer, FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    labels, null = torch.tensor([1, 2]), torch.tensor([10, 10])
    latents = torch.randn(2, 1, 4, 8, 8, generator=seeded())
    block = model.blocks[1]
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            cond, uncond = (model(latents, t.expand(2), class_labels=side).sample for side in (labels, null))
            velocity = uncond + 3.0 * (cond - uncond)
            if step > 0:  # diffusers begins after the step that it names
                block.forward, forward = lambda hidden_states, *args: hidden_states, block.forward
                velocity = velocity + 2.0 * (cond - model(latents, t.expand(2), class_labels=labels).sample)
                block.forward = forward
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    torch.testing.assert_close(ours, latents)


MISTAKES = [
    ({"guider": 3.0}, "class", "guider=float must be a guider of diffusers"),
    ({"guider": ClassifierFreeGuidance()}, None, "guider=ClassifierFreeGuidance needs a model of classes or texts"),
    ({"guider": ClassifierFreeGuidance(), "guidance_rescale": 0.5}, "class", "are both guidance: give one"),
    ({"guider": PerturbedAttentionGuidance(perturbed_guidance_layers=[0])}, "class", "pag_scale and pag_heads do that"),
    ({"guider": SkipLayerGuidance(skip_layer_guidance_layers=[2])}, "class", r"skips layers \[2\], and the model"),
    ({"guider": LTX2Guidance()}, "class", "wants pred_cond_stg, pred_cond_modality"),
    ({"guider": ClassifierFreeGuidance(), "prompt_embeds": torch.zeros(1, 3, 12)}, "cross", "guider=.* needs nega"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "conditioning", "sentence"), MISTAKES, ids=[s for _, _, s in MISTAKES])
def test_mistakes_name_the_guider(call, conditioning, sentence):
    told = {"class_labels": 1} if conditioning == "class" else {}
    with pytest.raises(ValueError, match=sentence):
        tiny_pipe(conditioning)(**told, **STEPS, **call)
