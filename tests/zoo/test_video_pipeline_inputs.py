"""What callers hand to a pipeline: pictures of any kind, schedulers of another kind, classes by name, masks."""

import io
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from foveal.zoo.pixels import cover
from foveal.zoo.video import VideoDiTPipeline
from foveal.zoo.video.given import read_images, read_videos
from PIL import Image
from video_models import CALL, SIZE, TEXT, letters, seeded, tiny_model, tiny_pipe

SIDE = {"height": 8, "width": 8}
RGB = SIDE | {"channels": 3}
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
UNIT = torch.from_numpy(PICTURE / 255.0).float().permute(2, 0, 1)  # [3, 8, 8]
TENSOR = torch.from_numpy(PICTURE).permute(2, 0, 1)

# pictures


@pytest.mark.parametrize(
    "given",
    [
        Image.fromarray(PICTURE),
        PICTURE,
        PICTURE[:, ::-1][:, ::-1],
        TENSOR,
        PICTURE.astype(np.uint16) * 257,
        (PICTURE.astype(np.uint16) * 257).astype(">u2"),
        TENSOR.to(torch.uint16) * 257,
        PICTURE / 255.0,
        UNIT.double(),
        [PICTURE],
        (Image.fromarray(PICTURE),),
        TENSOR[None],
        [PICTURE[None]],
    ],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)
def test_a_picture_is_read_by_its_type(given):
    torch.testing.assert_close(read_images(given, **RGB), UNIT[None, :, None], atol=1e-6, rtol=0)


def test_half_precision_is_read_to_its_own_precision():
    for dtype in (torch.float16, torch.bfloat16):
        found = read_images(UNIT.to(dtype), **RGB)
        assert found.dtype == torch.float32 and torch.equal(found[0, :, 0], UNIT.to(dtype).float())


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_pictures_of_any_mode_of_pillow(mode):
    """A grey of 51 is 0.2 in every mode, with all of 16 bits and of 0..1 as well; alpha is laid over white."""
    if mode in ("I;16", "I", "F"):
        value = {"I;16": np.uint16(13107), "I": np.int32(13107), "F": np.float32(0.2)}[mode]
        image, expected = Image.fromarray(np.full((9, 9), value)), 0.2
        assert image.mode == mode
    elif mode == "1":
        image, expected = Image.new("1", (9, 9), 1), 1.0
    elif mode in ("LA", "PA", "RGBA"):
        image, expected = Image.new("RGBA", (9, 9), (51, 51, 51, 102)), 0.4 * 0.2 + 0.6
        image = image.convert(mode) if mode != "PA" else image.convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        image, expected = Image.new("RGB", (9, 9), (51, 51, 51)).convert(mode), 0.2
    for channels in (1, 3):
        found = read_images(image, channels=channels, **SIDE)
        assert found.shape == (1, channels, 1, 8, 8)
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=0.02, rtol=0)


def test_pictures_are_turned_by_their_exif():
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :8] = 250  # bright at the left; turned by 90 degrees clockwise it is bright above
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(file, "PNG", exif=exif)
    found = read_images(Image.open(file), channels=3, height=16, width=8)[0, 0, 0]
    assert found[:8].min() > 0.9 and found[8:].max() < 0.1


def test_grey_and_alpha_of_arrays_and_tensors():
    grey = PICTURE[..., 0]
    for given in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        torch.testing.assert_close(read_images(given, **RGB), UNIT[None, :1, None].expand(-1, 3, -1, -1, -1))
    alpha = np.full((8, 8, 1), 51, np.uint8)
    over_white = 0.2 * UNIT + 0.8
    torch.testing.assert_close(read_images(np.concatenate([PICTURE, alpha], -1), **RGB)[0, :, 0], over_white)
    luma = read_images(PICTURE, channels=1, **SIDE)[0, 0, 0]
    expected = torch.from_numpy(np.asarray(Image.fromarray(PICTURE).convert("L")) / 255.0).float()
    torch.testing.assert_close(luma, expected, atol=1 / 255, rtol=0)
    torch.testing.assert_close(read_images(torch.rand(4, 8, 8), channels=4, **SIDE).shape, torch.Size([1, 4, 1, 8, 8]))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (PICTURE > 100, "image has numbers of type bool; accepted are uint8"),
        (PICTURE.astype(np.int64), "image has numbers of type int64"),
        (TENSOR.long(), "image has numbers of type int64"),
        (TENSOR.bool(), "image has numbers of type bool"),
        (PICTURE.astype(np.float32), "image has floating-point values from .* accepted are 0..1"),
        (2 * UNIT - 1, r"image has floating-point values from -.*: \(x \+ 1\) / 2"),
        (UNIT / 0, "image has floating-point values from"),
        (TENSOR.permute(1, 2, 0), r"image has a picture of shape \[8, 8, 3\]; expected \[C, H, W\] of a tensor"),
        (PICTURE.transpose(2, 0, 1), r"image has a picture of shape \[3, 8, 8\]; expected \[H, W, C\] of an array"),
        (PICTURE[:0], r"image has a picture of shape \[0, 8, 3\]"),
        ("cat.png", r"image is str; accepted are .*load_image opens files"),
        (["cat.png"], "image has a picture of str"),
        ([], "image is list; accepted are"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), "integers from 70000 to 70000; accepted are 0..65535"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_images(given, **RGB)


def test_a_file_that_breaks_off_is_refused_by_name():
    file = io.BytesIO()
    Image.fromarray(PICTURE.repeat(20, axis=0)).save(file, "PNG")
    with pytest.raises(ValueError, match="image cannot be decoded: OSError"):
        read_images(Image.open(io.BytesIO(file.getvalue()[:-200])), **RGB)


def test_videos_of_every_kind():
    frames = np.stack([PICTURE, PICTURE[::-1]])  # [T, H, W, C]
    expected = torch.from_numpy(frames / 255.0).float().permute(3, 0, 1, 2)  # [C, T, H, W]
    tensor = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)
    for given, count in (
        (frames, 1),
        (frames[None], 1),
        (list(frames), 1),
        ([Image.fromarray(frame) for frame in frames], 1),
        (tensor, 1),
        (tensor[None], 1),
        (list(tensor), 1),
        ([frames, frames], 2),
        ([list(frames), tensor], 2),
        (np.stack([frames, frames]), 2),
    ):
        torch.testing.assert_close(read_videos(given, **RGB), expected.expand(count, -1, -1, -1, -1))
    for given, sentence in (
        (PICTURE, "video is one picture: image takes it"),
        (tensor.permute(1, 0, 2, 3), r"video has a picture of shape \[2, 8, 8\]; expected \[C, H, W\]"),
        ([frames, frames[:1]], r"video has videos of \[2, 1\] frames"),
        (frames.astype(np.float64), "video has floating-point values"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_videos(given, **RGB)


def test_a_first_frame_of_another_aspect_is_cut_as_in_training():
    wide = np.random.default_rng(1).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    trained_on = cover(torch.from_numpy(wide).permute(2, 0, 1)[:, None], height=8, width=12)
    for given in (wide, torch.from_numpy(wide).permute(2, 0, 1), Image.fromarray(wide), wide / 255.0):
        found = read_images(given, channels=3, height=8, width=12)
        torch.testing.assert_close(found[0], trained_on, atol=1e-6, rtol=0)
    several = read_images([Image.fromarray(wide), PICTURE], channels=3, height=8, width=12)
    torch.testing.assert_close(several[:1], found)  # each of a size of its own


def test_bytes_reach_the_first_frame():
    pipe = tiny_pipe("class")
    grey = PICTURE[..., :1]
    for name, given in (("image", grey), ("video", grey[None])):
        made = pipe(class_labels=1, num_inference_steps=1, **{name: given}).frames
        np.testing.assert_allclose(made[0, 0], grey / 255, atol=1e-6)


# schedulers

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module")
def exact():
    """A pipeline whose model is the exact flow from given noise to 0.3: every sampler of flows ends there."""
    model = tiny_model(None)
    noise = torch.randn(1, 1, *SIZE, generator=seeded())
    model.forward = lambda hidden_states, timestep, **_: (noise - 0.3,)
    pipe = VideoDiTPipeline(model, FlowMatchEulerDiscreteScheduler(), sample_size=SIZE)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"latents": noise, "num_inference_steps": 5, "output_type": "latent"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}),
        ("DPMSolverMultistepScheduler", FLOW),
        ("DPMSolverSinglestepScheduler", FLOW),
    ],
)
def test_schedulers_of_flows_arrive(exact, name, options):
    pipe, call = exact
    pipe.scheduler = getattr(diffusers, name)(**options)
    steps = []
    made = pipe(**call, callback_on_step_end=lambda p, step, t, tensors: steps.append(step) or {}).frames
    torch.testing.assert_close(made, torch.full_like(made, 0.3), atol=5e-3, rtol=0)
    assert steps == list(range(len(pipe.scheduler.timesteps))) and pipe.num_timesteps == len(steps)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("UniPCMultistepScheduler", {}, "has prediction_type='epsilon': it needs prediction_type='flow_prediction'"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "has no flow-matching noise levels"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, "has prediction_type='v_prediction'"),
        (
            "EulerDiscreteScheduler",
            {},
            "has prediction_type='epsilon': it cannot be told that this model predicts flow",
        ),
        ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, "has noise levels of 157"),
        ("DDIMScheduler", {}, "has prediction_type='epsilon': it cannot"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "has no flow-matching noise levels"),
        ("LCMScheduler", {"prediction_type": "flow_prediction"}, "has noise levels of none"),
        ("DEISMultistepScheduler", FLOW, "has noise levels of 0.999 to 0.19"),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, "has prediction_type='v_prediction'"),
        ("CMStochasticIterativeScheduler", {}, "has noise levels of 80"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "has use_dynamic_shifting=True"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "has noise levels of 0"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"num_train_timesteps": 500},
            "has noise levels of 1 to 0 and timesteps from 500",
        ),
        ("SCMScheduler", {}, "has prediction_type='trigflow'"),
    ],
)
def test_schedulers_of_other_kinds_are_refused_by_name(exact, name, options, sentence):
    pipe, call = exact
    pipe.scheduler = getattr(diffusers, name)(**options)
    with pytest.raises(ValueError, match=f"the scheduler {name} {sentence}"):
        pipe(**call)


def test_a_scheduler_that_is_made_of_another_ones_config_says_what_it_lacks(exact):
    pipe, call = exact
    flow = FlowMatchEulerDiscreteScheduler().config
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(flow)
    with pytest.raises(
        ValueError, match=r"UniPCMultistepScheduler\.from_config\(pipe\.scheduler\.config, predic"
    ) as said:
        pipe(**call)
    assert "prediction_type='flow_prediction', use_flow_sigmas=True)" in str(said.value)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(flow, **FLOW)
    made = pipe(**call).frames
    torch.testing.assert_close(made, torch.full_like(made, 0.3), atol=1e-4, rtol=0)


# classes by name

NAMES = {0: "circle", 1: "square", 2: "10, ten"}


def named_pipe() -> VideoDiTPipeline:
    pipe = VideoDiTPipeline(
        tiny_model(num_classes=3), FlowMatchEulerDiscreteScheduler(), sample_size=SIZE, id2label=NAMES
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_classes_are_called_by_their_names(tmp_path, monkeypatch):
    named_pipe().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"]["1"] == "square"
    warnings = []
    monkeypatch.setattr(diffusers.pipelines.pipeline_utils.logger, "warning", lambda text, *_: warnings.append(text))
    pipe = VideoDiTPipeline.from_pretrained(tmp_path)
    assert not warnings  # of types that annotations leave out
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"circle": 0, "square": 1, "10, ten": 2}
    assert pipe.get_label_ids(["10, ten", "circle"]) == [2, 0] and pipe.get_label_ids("square") == [1]
    call = CALL | {"output_type": "latent"}
    for given in ("square", ["square"], np.int64(1), np.array([1]), np.array(["square"]), torch.tensor(1), (1,)):
        assert torch.equal(pipe(class_labels=given, **call, generator=seeded()).frames, pipe(
            class_labels=1, **call, generator=seeded()
        ).frames)  # fmt: skip
    mixed = pipe(class_labels=["circle", 1], **call, generator=seeded()).frames
    assert torch.equal(mixed, pipe(class_labels=[0, 1], **call, generator=seeded()).frames)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("cirlce", r"class_labels='cirlce' is no class of this pipeline: did you mean 'circle'\?"),
        ("zebra", "class_labels='zebra' is no class of this pipeline: it has 'circle', 'square', '10, ten'"),
        (["circle", "squares"], "did you mean 'square'"),
        (4, r"class_labels=\[4\] must be integers of 0..3 or names"),
        (True, "must be integers of 0..3 or names"),
        ([], "must be integers of 0..3 or names"),
        ([None], "must be integers of 0..3 or names"),
        ({"circle"}, "must be integers of 0..3 or names"),
    ],
)
def test_unknown_classes_are_said(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        named_pipe()(class_labels=given, num_inference_steps=1)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({3: "a"}, r"id2label has the labels \[3\], the model has 0..2"),
        ({0: "a", 1: "a"}, "id2label has 'a' more than once"),
        ({"x": "a"}, "must have integers as keys"),
    ],
)
def test_wrong_names_of_classes(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        VideoDiTPipeline(tiny_model(num_classes=3), FlowMatchEulerDiscreteScheduler(), id2label=names)
    with pytest.raises(ValueError, match="is for models with conditioning='class'"):
        VideoDiTPipeline(tiny_model(None), FlowMatchEulerDiscreteScheduler(), id2label=names)


# masks


@pytest.mark.parametrize("layer", ["dense", "spatial", {"type": "window", "window": [3, 3, 3]}])
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_masks_of_integers_are_those_of_tokenizers(conditioning, layer):
    model = tiny_model(conditioning, attention=[layer])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    call = {"hidden_states": torch.randn(2, 1, 2, 8, 8), "timestep": torch.tensor([500.0, 500.0])}
    call["encoder_hidden_states"] = torch.randn(2, 6, TEXT)
    with torch.no_grad():
        expected = model(**call, encoder_attention_mask=mask).sample
        assert not torch.equal(model(**call).sample, expected)
        for dtype in (torch.int64, torch.int32, torch.uint8):
            assert torch.equal(model(**call, encoder_attention_mask=mask.to(dtype)).sample, expected)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"encoder_attention_mask \(torch.b?float.* must be bool, or integers"):
            model(**call, encoder_attention_mask=mask.to(dtype))


def test_masks_of_the_pipeline_are_no_terms_of_logits():
    """A mask that is added to logits has 0 where a word counts: as bool it would leave out those words."""
    pipe = tiny_pipe("cross", text_encoder=letters)
    embeds = letters(["rain"], 5)
    call = CALL | {"prompt_embeds": embeds, "output_type": "latent", "negative_prompt_embeds": embeds}
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    made = pipe(**call, prompt_attention_mask=mask, generator=seeded()).frames
    assert torch.equal(made, pipe(**call, prompt_attention_mask=mask.bool(), generator=seeded()).frames)
    with pytest.raises(
        ValueError, match=r"prompt_attention_mask has type torch\.float32; it must be bool, or integers"
    ):
        pipe(**call, prompt_attention_mask=(1.0 - mask) * -1e9)
