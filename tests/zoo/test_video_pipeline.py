"""VideoDiTPipeline keeps what diffusers' pipelines promise: saving, components, batches, callbacks, guidance."""

import ast
import inspect
import json
import subprocess
import sys
import textwrap
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from foveal.zoo.tasks.video_report import make_pipeline
from foveal.zoo.video import VideoDiTPipeline
from video_models import CALL, SIZE, TEXT, letters, scrambled, seeded, tiny_model, tiny_pipe

EMBEDS = {"prompt_embeds": torch.randn(1, 5, TEXT, generator=seeded(3))}
EMBEDS["negative_prompt_embeds"] = torch.randn(1, 4, TEXT, generator=seeded(4))


def arguments(conditioning):
    return {"class": {"class_labels": 3}, None: {}}.get(conditioning, EMBEDS)


@pytest.mark.parametrize("conditioning", [None, "class", "cross", "joint"])
def test_saved_and_loaded_it_makes_the_same_videos(conditioning, tmp_path):
    pipe = tiny_pipe(conditioning)
    made = pipe(**arguments(conditioning), **CALL, generator=seeded()).frames
    assert made.shape == (1, *SIZE, 1) and made.dtype == np.float32
    assert 0 <= made.min() < made.max() <= 1
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["foveal.zoo.video.transformer", "VideoDiT"]
    assert index["sample_size"] == SIZE and index["vae"] == [None, None]
    loaded = VideoDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    # weights lie in memory as in the file, where other kernels of a matrix product may suit them
    again = loaded(**arguments(conditioning), **CALL, generator=seeded()).frames
    np.testing.assert_allclose(again, made, rtol=0, atol=2e-6)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name


@pytest.mark.slow
def test_loading_needs_no_transformers_and_takes_a_dtype(tmp_path):
    tiny_pipe().save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["transformers"] = sys.modules["peft"] = None  # importing them raises ImportError; peft needs the other
import torch
from foveal.zoo.video import VideoDiTPipeline
pipe = VideoDiTPipeline.from_pretrained({str(tmp_path)!r}, torch_dtype=torch.bfloat16)
print(pipe.transformer.dtype, pipe(class_labels=1, num_inference_steps=1, output_type="pt").frames.dtype)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["torch.bfloat16", "torch.float32"]


def test_a_component_may_be_replaced_when_loading(tmp_path):
    tiny_pipe("cross").save_pretrained(tmp_path)
    loaded = VideoDiTPipeline.from_pretrained(tmp_path, text_encoder=letters)
    assert loaded.text_encoder is letters and loaded.vae is None
    other = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    assert VideoDiTPipeline.from_pretrained(tmp_path, scheduler=other).scheduler is other


def test_tuples_dicts_and_output_types_agree():
    pipe = tiny_pipe()
    call = CALL | {"class_labels": [1, 2]}
    (array,) = pipe(**call, generator=seeded(), return_dict=False)
    tensor = pipe(**call, generator=seeded(), output_type="pt").frames  # [B, T, C, H, W]
    images = pipe(**call, generator=seeded(), output_type="pil").frames
    latents = pipe(**call, generator=seeded(), output_type="latent").frames  # [B, C, T, H, W]
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    torch.testing.assert_close((latents * 0.4 + 0.2).clamp(0, 1).transpose(1, 2), tensor)
    assert len(images) == 2 and len(images[0]) == SIZE[0] and images[0][0].mode == "L"
    np.testing.assert_array_equal(np.asarray(images[1][2]), (array[1, 2, ..., 0] * 255).round())


def test_the_generator_decides_and_noise_may_be_given():
    pipe = tiny_pipe()
    call = CALL | {"class_labels": 1, "output_type": "latent"}
    first, again, other = (pipe(**call, generator=seeded(s)).frames for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)
    noise = torch.randn(1, 1, *SIZE, generator=seeded(0))
    assert torch.equal(pipe(**call, latents=noise).frames, first)


@pytest.mark.parametrize("conditioning", ["class", "cross"])
def test_a_batch_makes_what_single_calls_make(conditioning):
    pipe = tiny_pipe(conditioning, text_encoder=letters if conditioning == "cross" else None)
    wanted = {"class": [1, 4], "cross": ["rain", "sun"]}[conditioning]
    name = {"class": "class_labels", "cross": "prompt"}[conditioning]
    call = CALL | {"output_type": "latent"}
    both = pipe(**{name: wanted}, **call, generator=[seeded(0), seeded(1)]).frames
    for i, one in enumerate(wanted):
        torch.testing.assert_close(pipe(**{name: one}, **call, generator=seeded(i)).frames, both[i : i + 1])


def test_several_videos_of_a_prompt_follow_each_other():
    pipe = tiny_pipe()
    call = CALL | {"output_type": "latent"}
    four = pipe(class_labels=[1, 2], num_videos_per_prompt=2, generator=seeded(), **call).frames
    assert torch.equal(four, pipe(class_labels=[1, 1, 2, 2], generator=seeded(), **call).frames)
    assert tiny_pipe(None)(num_videos_per_prompt=3, num_inference_steps=1).frames.shape == (3, *SIZE, 1)


@pytest.mark.parametrize("conditioning", ["class", "joint"])
def test_guidance_is_the_formula_step_by_step(conditioning):
    """Euler by hand: x + (sigma' - sigma) (v_0 + s (v_c - v_0))."""
    pipe = tiny_pipe(conditioning).to(torch.float64)
    scale, sigmas = 3.0, [1.0, 0.6, 0.3]
    call = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments(conditioning).items()}
    made = pipe(**call, guidance_scale=scale, sigmas=sigmas, generator=seeded(), output_type="latent").frames
    x = torch.randn(1, 1, *SIZE, generator=seeded())
    if conditioning == "class":
        sides = [{"class_labels": torch.tensor([label])} for label in (3, 10)]
    else:
        sides = [{"encoder_hidden_states": call[name]} for name in ("prompt_embeds", "negative_prompt_embeds")]
    shifted = [2 * s / (1 + s) for s in sigmas] + [0.0]  # the scheduler's shift of 2
    for sigma, below in pairwise(shifted):
        timestep = torch.tensor([1000 * sigma])
        with torch.no_grad():
            wanted, unwanted = (pipe.transformer(x.double(), timestep, **side).sample.float() for side in sides)
        x = x + (below - sigma) * (unwanted + scale * (wanted - unwanted))
    torch.testing.assert_close(made, x, rtol=0, atol=1e-4)  # float32 knows timesteps near 1000 to 6e-5


def test_guidance_of_one_is_none():
    pipe = tiny_pipe()
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipe(class_labels=1, num_inference_steps=3, guidance_scale=1.0)
    assert len(calls) == 3
    pipe(class_labels=1, num_inference_steps=3, guidance_scale=1.5)
    assert len(calls) == 3 + 6


@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize("conditioning", ["class", "cross"])
def test_guidance_that_a_callback_switches_off_is_off(conditioning, rollout):
    """From then on a step follows the wanted velocity, and only that is computed."""
    causal = {"attention": [{"type": "dense", "causal": True}]}
    pipe, seen = tiny_pipe(conditioning, **causal), []

    def note(module, args, kwargs, output):
        seen.append((*args, kwargs, output[0].clone()))

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    if conditioning == "cross":
        off = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    else:

        def off(pipeline, step, timestep, tensors):
            pipeline._guidance_scale = 1.0
            return tensors

    call = arguments(conditioning) | {"num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
    made = pipe(**call, callback_on_step_end=off, chunk_frames=SIZE[0] if rollout else None).frames
    seen = seen[:-2] if rollout else seen  # those that append to the caches
    assert len(seen) == 2 + 1 + 1
    (x, timestep, condition, velocity), (last, *_) = seen[2:4]
    name = "class_labels" if conditioning == "class" else "encoder_hidden_states"
    wanted = torch.tensor([3]) if conditioning == "class" else EMBEDS["prompt_embeds"]
    assert torch.equal(condition[name], wanted)
    sigmas = pipe.scheduler.sigmas
    assert timestep.item() == 1000 * sigmas[1]
    torch.testing.assert_close(last, x + (sigmas[2] - sigmas[1]) * velocity)
    assert made.shape == x.shape


def test_the_empty_prompt_is_unwanted_unless_another_is_given():
    pipe = tiny_pipe("cross", text_encoder=letters)
    call = CALL | {"prompt": ["rain", "sun"], "output_type": "latent"}
    default, empty, other, listed = (
        pipe(**call, generator=seeded(), **negative).frames
        for negative in ({}, {"negative_prompt": ""}, {"negative_prompt": "fog"}, {"negative_prompt": ["fog", "fog"]})
    )
    assert torch.equal(default, empty) and torch.equal(other, listed)
    assert not torch.allclose(default, other)


def test_words_that_do_not_count_change_nothing():
    pipe = tiny_pipe("cross", text_encoder=lambda prompts: (letters(prompts, 6), letters(prompts, 6)[..., 0] < 9))
    call = CALL | {"output_type": "latent"}
    short = tiny_pipe("cross")(
        **call,
        generator=seeded(),
        prompt_embeds=letters(["rainxy"], 6),
        negative_prompt_embeds=letters([""], 6),
        prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
    ).frames
    masked = tiny_pipe("cross")(
        **call, generator=seeded(), prompt_embeds=letters(["rain"], 4), negative_prompt_embeds=letters([""], 6)
    ).frames
    torch.testing.assert_close(short, masked)
    torch.testing.assert_close(
        pipe(prompt="rainxy", generator=seeded(), **call).frames,
        tiny_pipe("cross")(
            **call, generator=seeded(), prompt_embeds=letters(["rainxy"], 6), negative_prompt_embeds=letters([""], 6)
        ).frames,
    )


def test_a_tokenizer_is_called_as_those_of_transformers():
    class Tokens(dict):
        __getattr__ = dict.__getitem__

    def tokenizer(prompts, *, padding, max_length, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids = torch.tensor([[ord(c) for c in prompt.ljust(max_length)[:max_length]] for prompt in prompts])
        return Tokens(input_ids=ids, attention_mask=(ids != 32).long())

    def encoder(ids, *, attention_mask):
        return (letters(["".join(map(chr, row)) for row in ids.tolist()], ids.shape[1]),)

    pipe = tiny_pipe("cross", text_encoder=encoder)
    pipe.register_modules(tokenizer=tokenizer)
    embeds, mask, *negative = pipe.encode_prompt("rain", "sun", max_sequence_length=6)
    assert embeds.shape == (1, 6, TEXT) and mask.tolist() == [[True] * 4 + [False] * 2]
    assert negative[0].shape == (1, 6, TEXT) and negative[1].tolist() == [[True] * 3 + [False] * 3]


def test_callbacks_see_every_step_and_may_change_what_follows():
    pipe = tiny_pipe("cross")
    seen = []

    def look(pipeline, step, timestep, tensors):
        assert pipeline is pipe and pipe.num_timesteps == 3 and pipe.current_timestep == timestep
        seen.append((step, sorted(tensors), tensors["latents"].clone()))
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    call = EMBEDS | {"num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
    made = pipe(**call, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names).frames
    assert [entry[:2] for entry in seen] == [(step, sorted(names)) for step in range(3)]
    assert torch.equal(seen[-1][2], made)

    call["generator"] = seeded()
    ended = pipe(
        **call, callback_on_step_end=lambda p, step, t, tensors: {"latents": torch.zeros_like(tensors["latents"])}
    )
    assert not ended.frames.any()

    def same_prompt(pipeline, step, timestep, tensors):
        return {"prompt_embeds": tensors["negative_prompt_embeds"]}

    call["generator"] = seeded()
    changed = pipe(**call, callback_on_step_end=same_prompt, callback_on_step_end_tensor_inputs=names).frames
    assert not torch.allclose(changed, made)


def test_a_callback_object_names_its_tensors_and_interrupts():
    class Stop(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012 - as diffusers has it

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._interrupt = step_index == 0
            return callback_kwargs

    pipe = tiny_pipe()
    steps = []
    pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    pipe(class_labels=1, num_inference_steps=4, guidance_scale=1.0, callback_on_step_end=Stop())
    assert len(steps) == 1


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_a_straight_flow_is_followed_exactly(scheduler):
    """A model that knows the video predicts (x - video) / t; any solver must then end in the video."""
    pipe = tiny_pipe(None)
    if scheduler == "unipc":
        pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
        )
    video = torch.rand(1, 1, *SIZE, generator=seeded(5))

    def velocity(module, args, kwargs, output):
        x, timestep = args
        sigmas = pipe.scheduler.sigmas  # UniPC rounds its timesteps
        sigma = sigmas[(1000 * sigmas - timestep).abs().argmin()]
        return ((x - video) / sigma,)

    pipe.transformer.register_forward_hook(velocity, with_kwargs=True)
    made = pipe(num_inference_steps=6, generator=seeded(), output_type="latent").frames
    torch.testing.assert_close(made, video, rtol=1e-4, atol=1e-4)


def test_steps_end_where_the_schedulers_say():
    pipe = tiny_pipe()
    times = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1]))
    pipe(class_labels=1, num_inference_steps=4, guidance_scale=1.0)
    expected = FlowMatchEulerDiscreteScheduler(shift=2.0)
    expected.set_timesteps(4)
    assert torch.equal(torch.cat(times), expected.timesteps)


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_given_noise_levels_are_shifted_as_the_scheduler_says(scheduler):
    pipe = tiny_pipe()
    if scheduler == "unipc":
        pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
        )
    made = pipe(class_labels=1, sigmas=[1.0, 0.6, 0.3], output_type="latent").frames
    assert made.isfinite().all()
    expected = torch.tensor([1.0, 2 * 0.6 / 1.6, 2 * 0.3 / 1.3, 0.0])
    torch.testing.assert_close(pipe.scheduler.sigmas, expected, rtol=0, atol=2e-6)


def test_prompts_are_encoded_apart_from_the_model():
    """As test_encode_prompt_works_in_isolation of diffusers' pipeline tests goes about it."""
    full = tiny_pipe("cross", text_encoder=lambda texts: (letters(texts, 6), letters(texts, 6)[..., 0] < 9))
    parameters = inspect.signature(VideoDiTPipeline.__call__).parameters
    encoder = VideoDiTPipeline(transformer=None, scheduler=None, text_encoder=full.text_encoder)
    required = [
        name
        for name, parameter in inspect.signature(encoder.encode_prompt).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    assert set(required) <= set(parameters)
    visitor = ReturnNameVisitor()
    visitor.visit(ast.parse(textwrap.dedent(inspect.getsource(VideoDiTPipeline.encode_prompt))))
    assert len(visitor.return_names) == 4 and set(visitor.return_names) <= set(parameters)

    texts = {"prompt": ["rain", "sun"], "negative_prompt": "fog", "num_videos_per_prompt": 2}
    encoded = encoder.encode_prompt(**texts)
    assert [len(x) for x in encoded] == [4, 4, 4, 4] and encoded[1].dtype == torch.bool
    call = CALL | {"output_type": "latent"}
    given = dict(zip(visitor.return_names, encoded, strict=True))
    made = tiny_pipe("cross")(**given, **call, generator=seeded()).frames
    assert torch.equal(made, full(**texts, **call, generator=seeded()).frames)
    unguided = encoder.encode_prompt("rain", do_classifier_free_guidance=False, dtype=torch.float16)
    assert unguided[0].dtype == torch.float16 and unguided[2:] == (None, None)


@pytest.mark.parametrize("masked", [False, True])
def test_one_negative_text_serves_all_prompts(masked):
    embeds, one = letters(["rain", "sun"], 5), letters(["fog"], 4)
    call = CALL | {"prompt_embeds": embeds, "num_videos_per_prompt": 2, "output_type": "latent"}
    masks = [torch.tensor([[1, 1, 1, 0]]).expand(n, 4) if masked else None for n in (1, 2)]
    made, again = (
        tiny_pipe("cross")(
            **call,
            generator=seeded(),
            negative_prompt_embeds=one.expand(len(mask_of), -1, -1),
            negative_prompt_attention_mask=mask,
        ).frames
        for mask_of, mask in zip((one, embeds), masks, strict=True)
    )
    assert torch.equal(made, again)


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_the_null_text_may_be_zeros_and_needs_no_encoder(conditioning, tmp_path):
    embeds = letters(["rain", "sun"], 5)
    call = CALL | {"output_type": "latent"}
    pipe = tiny_pipe(conditioning)
    zeros = pipe(**call, prompt_embeds=embeds, negative_prompt_embeds=torch.zeros(2, 5, TEXT), generator=seeded())
    pipe.register_to_config(null_text="zeros")
    pipe.save_pretrained(tmp_path)
    loaded = VideoDiTPipeline.from_pretrained(tmp_path, transformer=pipe.transformer)
    loaded.set_progress_bar_config(disable=True)
    made = loaded(**call, prompt_embeds=embeds, generator=seeded()).frames
    assert torch.equal(made, zeros.frames)
    loaded.text_encoder = lambda texts: letters(texts, 5)
    encoded = loaded(**call, prompt=["rain", "sun"], generator=seeded()).frames
    torch.testing.assert_close(encoded, made)
    asked = loaded(**call, prompt=["rain", "sun"], negative_prompt="", generator=seeded()).frames
    assert not torch.allclose(asked, made, atol=1e-3)

    # segments: as many words as one text has
    segments = {"segment_frames": [1, 3], "generator": seeded()}
    made = loaded(**call, **segments, prompt_embeds=embeds[None]).frames
    segments["generator"] = seeded()
    expected = loaded(
        **call, **segments, prompt_embeds=embeds[None], negative_prompt_embeds=torch.zeros(1, 5, TEXT)
    ).frames
    torch.testing.assert_close(made, expected)


def test_the_pipeline_of_a_run_leads_away_from_zeros():
    task = SimpleNamespace(model=tiny_model("cross"), device_mesh=None, sampling={}, shift=2.0)
    data = SimpleNamespace(vae=None, for_pipeline={"pixel_mean": [0.2], "pixel_std": [0.4], "sample_size": SIZE})
    pipe = make_pipeline(task, data)
    made = pipe(**CALL, prompt_embeds=EMBEDS["prompt_embeds"], generator=seeded()).frames
    nothing = torch.zeros_like(EMBEDS["prompt_embeds"])
    call = CALL | {"prompt_embeds": EMBEDS["prompt_embeds"], "negative_prompt_embeds": nothing}
    np.testing.assert_array_equal(made, pipe(**call, generator=seeded()).frames)


BROKEN = {
    "height=6 must be a multiple of 4": {"height": 6},
    "num_frames=0 must be n frames": {"num_frames": 0},
    "output_type='jpg'": {"output_type": "jpg"},
    "output_path='a.gif' must end in .mp4": {"output_type": "mp4", "output_path": "a.gif"},
    "class_labels must be given": {"class_labels": None},
    r"class_labels=\[11\] must be integers of 0..10": {"class_labels": 11},
    "prompt needs a model of texts": {"prompt": "rain"},
    r"callback_on_step_end_tensor_inputs has \['noise'\]": {"callback_on_step_end_tensor_inputs": ["noise"]},
    r"latents has shape \[1, 1, 4, 8, 4\], expected": {"latents": torch.zeros(1, 1, 4, 8, 4)},
    "generator is a list of 2": {"generator": [seeded(), seeded()]},
    "image and video must not be given both": {"image": torch.zeros(1, 1, 8, 8), "video": torch.zeros(1, 2, 1, 8, 8)},
    r"image has a picture of shape \[2, 8, 8\]; expected \[C, H, W\]": {"image": torch.zeros(1, 2, 8, 8)},
    r"sigmas=\[0.3, 0.6\] must .* fall within 1..0": {"sigmas": [0.3, 0.6]},
    r"class_labels='ant': this pipeline knows no names of classes": {"class_labels": "ant"},
    r"class_labels=\[2.5\] must be integers of 0..10 or names": {"class_labels": 2.5},
    "4 frames are given of 4": {"video": torch.zeros(1, 4, 1, 8, 8)},
    "chunk_frames=2 needs a model whose layers are all causal": {"chunk_frames": 2},
    "segment_frames needs a model of texts": {"segment_frames": [2, 2]},
    "num_inference_steps=0 must be an integer of at least 1": {"num_inference_steps": 0},
    "num_inference_steps=2.5 must be an integer": {"num_inference_steps": 2.5},
    "num_videos_per_prompt=0 must be an integer of at least 1": {"num_videos_per_prompt": 0},
    "fps=0 must be more than 0": {"fps": 0},
    r"sigmas=\[\] must hold at least one": {"sigmas": []},
    "pag_scale=2.0 needs pag_heads": {"pag_scale": 2.0},
    r"pag_heads=\{5: \[0\]\} must be within 2 layers": {"pag_scale": 2.0, "pag_heads": {5: [0]}},
    "pag_strength=1.5 must be in 0..1": {"pag_scale": 2.0, "pag_heads": {0: [0]}, "pag_strength": 1.5},
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe()(**({"class_labels": 1, "num_inference_steps": 1} | BROKEN[message]))


BROKEN_TEXTS = {
    r"prompt=\[\] must be a string or a list of at least one": {"prompt": []},
    r"prompt=\['rain', 5\] must be a string": {"prompt": ["rain", 5]},
    r"prompt=\[\['rain'\]\] must be a string": {"prompt": [["rain"]]},
    "prompt=7 must be a string": {"prompt": 7, "segment_frames": [2, 2]},
    r"negative_prompt=\[None\] must be a string": {"prompt": "rain", "negative_prompt": [None]},
    "prompt_attention_mask belongs to prompt_embeds": {
        "prompt": "rain",
        "prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool),
    },
    "^negative_prompt_attention_mask belongs to negative_prompt_embeds": {
        "prompt": "rain",
        "negative_prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool),
    },
    r"prompt_attention_mask has shape \[1, 4\], expected \[1, 5\]": EMBEDS
    | {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)},
    r"prompt_embeds has shape \[5, 12\], expected \[B, L, text_dim\]": {"prompt_embeds": torch.zeros(5, TEXT)},
    r"negative_prompt_embeds has shape \[1, 1, 4, 12\], expected \[B, L, text_dim\]": {
        "prompt": "rain",
        "negative_prompt_embeds": torch.zeros(1, 1, 4, TEXT),
    },
}


@pytest.mark.parametrize("message", BROKEN_TEXTS)
def test_wrong_texts_are_named_before_anything_is_encoded(message):
    def encoder(texts):
        raise AssertionError("encoded")

    with pytest.raises(ValueError, match=message):
        tiny_pipe("cross", text_encoder=encoder)(num_inference_steps=1, **BROKEN_TEXTS[message])


def test_missing_texts_and_sizes_are_named():
    pipe = tiny_pipe("cross")
    with pytest.raises(ValueError, match="prompt or prompt_embeds must be given"):
        pipe()
    with pytest.raises(ValueError, match="prompt needs a text_encoder"):
        pipe(prompt="rain")
    with pytest.raises(ValueError, match=r"guidance_scale=4.0 needs negative_prompt_embeds"):
        pipe(prompt_embeds=EMBEDS["prompt_embeds"])
    with pytest.raises(ValueError, match="prompt and prompt_embeds must not be given both"):
        tiny_pipe("cross", text_encoder=letters)(prompt="rain", **EMBEDS)
    with pytest.raises(ValueError, match="3 negative prompts for 1 videos"):
        tiny_pipe("cross", text_encoder=letters)(prompt="rain", negative_prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="prompt or prompt_embeds must be given"):
        tiny_pipe("cross", text_encoder=letters).encode_prompt(negative_prompt="rain")
    with pytest.raises(ValueError, match=r"null_text='none' must be one of \('empty', 'zeros'\)"):
        VideoDiTPipeline(pipe.transformer, pipe.scheduler, null_text="none")
    pipe.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="num_frames=None, height=8, width=8 must be given"):
        pipe(height=8, width=8, **EMBEDS)


def test_components_make_another_pipeline():
    pipe = tiny_pipe()
    other = VideoDiTPipeline(**pipe.components, **{key: pipe.config[key] for key in ("pixel_mean", "pixel_std")})
    assert other.transformer is pipe.transformer and other.config.sample_size is None
    assert set(pipe.components) == {"transformer", "scheduler", "vae", "text_encoder", "tokenizer"}
    scrambled(other.transformer, seed=1)


def test_noise_that_a_scheduler_adds_is_the_generators():
    pipe = tiny_pipe()
    made = {}
    for stochastic in (False, True):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=stochastic)
        made[stochastic] = [pipe(class_labels=[1, 2], **CALL, generator=seeded(seed)).frames for seed in (0, 0, 1)]
        assert (made[stochastic][0] == made[stochastic][1]).all() and (made[stochastic][0] != made[stochastic][2]).any()
    assert (made[False][0] != made[True][0]).any()
