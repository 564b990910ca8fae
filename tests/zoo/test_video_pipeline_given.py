"""Frames that are given, rollout, and the way through autoencoders and files."""

from fractions import Fraction

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from foveal.zoo.video.export import save_clips
from foveal.zoo.video.vae import decode, encode, latent_space
from PIL import Image
from video_models import CALL, SIZE, scrambled, seeded, tiny_pipe

CAUSAL = {"attention": [{"type": "dense", "causal": True}, {"type": "window", "window": [2, 1, 3], "causal": True}]}


def wan(**config):
    config = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 2.0, 1.0],
    } | config
    return scrambled(AutoencoderKLWan(**config))


def ltx():
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
        scaling_factor=0.5,
    )
    vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
    return vae.eval()


def taesd():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


def hunyuan():
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


def cogvideox():
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    ).eval()


@pytest.mark.parametrize(
    ("make", "channels", "time", "space"),
    [(wan, 4, 2, 4), (ltx, 8, 4, 4), (hunyuan, 4, 4, 8), (cogvideox, 4, 4, 8), (taesd, 4, 1, 4)],
)
def test_latents_are_normalised_by_the_autoencoder_s_own_numbers(make, channels, time, space):
    vae = make()
    found = latent_space(vae)
    assert (found.channels, found.time, found.space) == (channels, time, space)
    video = torch.rand(2, 3, 2 * time + 1, 16, 8, generator=seeded())
    latents = encode(vae, video)
    assert latents.shape == (2, channels, found.frames(2 * time + 1), 16 // space, 8 // space)
    with torch.no_grad():
        if make is taesd:
            raw = torch.stack([vae.encode(2 * frame - 1).latents for frame in video.unbind(2)], dim=2)
            expected = (raw - 0.25) * 0.5
            back = torch.stack([vae.decode(frame).sample for frame in raw.unbind(2)], dim=2)
        else:
            raw = vae.encode(2 * video - 1).latent_dist.mode()
            mean, std = (torch.as_tensor(x).view(1, -1, 1, 1, 1) for x in (found.mean, found.std))
            expected = (raw - mean) / std
            back = vae.decode(raw).sample
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(decode(vae, latents), (back / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_the_factor_of_ltx_scales_and_that_of_wan_2_2_counts_patches():
    found = latent_space(ltx())
    torch.testing.assert_close(torch.tensor(found.std), torch.linspace(0.5, 2, 8) / 0.5)
    patched = wan(in_channels=12, out_channels=12, patch_size=2, is_residual=True)
    assert latent_space(patched).space == 8
    with pytest.raises(TypeError, match=r"vae must be one of AutoencoderKLWan, .*, got Identity"):
        latent_space(torch.nn.Identity())


@pytest.mark.parametrize("make", [wan, ltx, taesd])
def test_autoencoders_compute_where_their_inputs_are(make):
    """Weights that are offloaded say nothing about the device: their own is "meta" until they are needed."""
    vae, time = make(), latent_space(make()).time
    video = torch.rand(1, 3, time + 1, 16, 8, generator=seeded())
    latents = encode(vae, video)
    pixels = decode(vae, latents)
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in vae.parameters())
    torch.testing.assert_close(encode(vae, video), latents)
    torch.testing.assert_close(decode(vae, latents), pixels)


@pytest.fixture
def latent_pipe():
    return tiny_pipe("class", vae=wan(), in_channels=4, patch_size=(1, 2, 2))


def test_latents_become_pixels(latent_pipe, tmp_path):
    call = CALL | {"class_labels": [1, 2], "height": 16, "width": 24, "num_frames": 5}
    latents = latent_pipe(**call, generator=seeded(), output_type="latent").frames
    assert latents.shape == (2, 4, 3, 4, 6)
    video = latent_pipe(**call, generator=seeded(), output_type="pt").frames
    assert video.shape == (2, 5, 3, 16, 24)
    assert torch.equal(video, decode(latent_pipe.vae, latents).transpose(1, 2))
    with pytest.raises(ValueError, match=r"num_frames=4 must be 2 \* n \+ 1 frames"):
        latent_pipe(**call | {"num_frames": 4})
    with pytest.raises(ValueError, match="width=12 must be a multiple of 8"):
        latent_pipe(**call | {"width": 12})
    latent_pipe.save_pretrained(tmp_path)
    again = type(latent_pipe).from_pretrained(tmp_path)
    assert torch.allclose(again(**call, generator=seeded(), output_type="pt").frames, video, atol=1e-5)


def test_offloaded_layer_by_layer_it_makes_the_same_video(latent_pipe):
    call = CALL | {"class_labels": 1, "height": 16, "width": 24, "num_frames": 5, "output_type": "pt"}
    call["image"] = torch.rand(1, 3, 16, 24, generator=seeded(2))
    expected = latent_pipe(**call, generator=seeded()).frames
    for model in (latent_pipe.transformer, latent_pipe.vae):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(latent_pipe(**call, generator=seeded()).frames, expected)


def test_a_given_image_stays_as_the_first_latent(latent_pipe):
    image = Image.fromarray((torch.rand(16, 24, 3, generator=seeded(2)) * 255).byte().numpy())
    call = CALL | {"class_labels": [1, 2], "height": 16, "width": 24, "num_frames": 5, "output_type": "latent"}
    latents = latent_pipe(**call, image=image, generator=seeded()).frames
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 255
    torch.testing.assert_close(latents[:, :, :1], encode(latent_pipe.vae, pixels).expand(2, -1, -1, -1, -1))
    free = latent_pipe(**call, generator=seeded()).frames
    assert not torch.allclose(latents[:, :, 1:], free[:, :, 1:], atol=1e-3), "what is given changes what follows"


def test_given_frames_are_clean_at_timestep_zero():
    pipe = tiny_pipe("class")
    video = torch.rand(1, 2, 1, 8, 8, generator=seeded(2))
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append((args[0].clone(), args[1])))
    made = pipe(class_labels=1, num_inference_steps=3, video=video, generator=seeded(), output_type="pt").frames
    torch.testing.assert_close(made[:, :2], video)
    given = ((video - 0.2) / 0.4).transpose(1, 2)
    assert len(calls) == 6
    for hidden_states, timestep in calls:
        torch.testing.assert_close(hidden_states[:, :, :2], given)
        assert timestep.shape == (1, 4) and not timestep[:, :2].any() and (timestep[:, 2:] == timestep[0, 3]).all()
    assert calls[0][1][0, 3] == 1000


def test_the_last_frame_is_given_beside_the_first():
    pipe, images = tiny_pipe("class"), torch.rand(2, 1, 8, 8, generator=seeded(2))
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append((args[0].clone(), args[1])))
    call = {"class_labels": 1, "num_inference_steps": 3, "output_type": "pt"}
    made = pipe(**call, image=images[0], last_image=images[1], generator=seeded()).frames
    torch.testing.assert_close(made[0, [0, 3]], images)
    for hidden_states, timestep in calls:
        torch.testing.assert_close(hidden_states[0, :, [0, 3]], (images.transpose(0, 1) - 0.2) / 0.4)
        assert not timestep[:, [0, 3]].any() and (timestep[:, 1:3] == timestep[0, 1]).all() and timestep[0, 1] > 0
    alone = pipe(**call, last_image=images[1], generator=seeded()).frames
    torch.testing.assert_close(alone[0, 3], images[1])
    assert not torch.allclose(alone[0, 1:3], made[0, 1:3], atol=1e-3), "the first frame changes what is between"
    free = pipe(**call, generator=seeded()).frames
    assert not torch.allclose(alone[0, :3], free[0, :3], atol=1e-3), "the last frame changes what is before"
    both = pipe(**call, video=images[None], last_image=images[1], generator=seeded()).frames
    torch.testing.assert_close(both[0, [0, 1, 3]], images[[0, 1, 1]])


def test_the_last_latent_holds_its_picture_still():
    pipe = tiny_pipe("class", vae=wan(temperal_downsample=[True, True]), in_channels=4, patch_size=(1, 2, 2))
    image = torch.rand(2, 3, 16, 24, generator=seeded(2))
    call = CALL | {"class_labels": [1, 2], "height": 16, "width": 24, "num_frames": 9, "output_type": "latent"}
    latents = pipe(**call, last_image=image, generator=seeded()).frames
    still = encode(pipe.vae, image[:, :, None].expand(-1, -1, 5, -1, -1))
    assert latents.shape[2] == 3 and not torch.allclose(still[:, :, 0], still[:, :, 1], atol=1e-3)
    torch.testing.assert_close(latents[:, :, 2], still[:, :, 1])
    pipe = tiny_pipe("class", patch_size=(2, 4, 4))
    picture = torch.rand(1, 1, 8, 8, generator=seeded(2))
    made = pipe(class_labels=1, num_inference_steps=1, last_image=picture, output_type="pt").frames
    torch.testing.assert_close(made[:, 2:], picture[:, None].expand(1, 2, 1, 8, 8))


def test_last_images_that_cannot_be_are_named():
    picture = torch.rand(1, 8, 8)
    call = {"class_labels": 1, "num_inference_steps": 1, "last_image": picture}
    with pytest.raises(ValueError, match="last_image needs a model that sees later frames"):
        tiny_pipe("class", **CAUSAL)(**call)
    pipe = tiny_pipe("class")
    with pytest.raises(ValueError, match="4 frames are given of 4"):
        pipe(**call, video=picture.expand(3, 1, 8, 8))
    with pytest.raises(ValueError, match="last_image has 2 for 1 videos of 1 prompts"):
        pipe(**call | {"last_image": picture.expand(2, 1, 8, 8)})
    with pytest.raises(ValueError, match="last_image has floating-point values from 2 to 2"):
        pipe(**call | {"last_image": torch.full((1, 8, 8), 2.0)})
    with pytest.raises(ValueError, match="without last_image"):
        pipe(**call, video=picture.expand(4, 1, 8, 8), strength=1.0)


def test_an_image_fills_the_first_patch():
    pipe = tiny_pipe("class", patch_size=(2, 4, 4))
    image = torch.rand(1, 1, 8, 8, generator=seeded(2))
    made = pipe(class_labels=1, num_inference_steps=1, image=image, output_type="pt").frames
    torch.testing.assert_close(made[:, :2], image[:, None].expand(1, 2, 1, 8, 8))
    with pytest.raises(ValueError, match="frames of video=1 must be n frames with a multiple of 2 latent frames"):
        pipe(class_labels=1, num_inference_steps=1, video=image[:, None])


def test_given_frames_are_brought_to_size():
    pipe = tiny_pipe("class")
    call = {"class_labels": 1, "num_inference_steps": 1, "height": 12, "width": 20, "output_type": "pt"}
    image = torch.rand(1, 1, 12, 20, generator=seeded(2))
    torch.testing.assert_close(pipe(**call, image=image).frames[:, 0], image)
    torch.testing.assert_close(pipe(**call, video=image[:, None]).frames[:, 0], image)
    grey = pipe(**call, image=Image.new("L", (33, 47), 51)).frames[:, 0]
    torch.testing.assert_close(grey, torch.full((1, 1, 12, 20), 0.2))


def test_each_video_may_have_an_image_of_its_own():
    pipe = tiny_pipe("class")
    images = torch.rand(2, 1, 8, 8, generator=seeded(2))
    made = pipe(class_labels=[1, 2], num_inference_steps=1, image=images, output_type="pt").frames
    torch.testing.assert_close(made[:, 0], images)
    call = {"num_inference_steps": 1, "output_type": "pt", "num_videos_per_prompt": 2}
    made = pipe(class_labels=[1, 2], image=images, **call).frames
    torch.testing.assert_close(made[:, 0], images.repeat_interleave(2, dim=0))
    four = torch.rand(4, 1, 8, 8, generator=seeded(3))
    torch.testing.assert_close(pipe(class_labels=[1, 2], image=four, **call).frames[:, 0], four)
    with pytest.raises(ValueError, match="image has 2 for 4 videos of 4 prompts"):
        pipe(class_labels=[1, 2, 3, 4], num_inference_steps=1, image=images)
    with pytest.raises(ValueError, match="image has 2 for 3 videos"):
        pipe(class_labels=[1, 2, 3], num_inference_steps=1, image=images)


def test_a_rollout_in_one_chunk_is_a_plain_call():
    pipe = tiny_pipe("class", **CAUSAL)
    call = CALL | {"class_labels": [1, 2], "output_type": "latent"}
    plain = pipe(**call, generator=seeded()).frames
    torch.testing.assert_close(pipe(**call, generator=seeded(), chunk_frames=4).frames, plain)


def test_a_rollout_continues_as_a_call_that_sees_the_past():
    """For a causal model, chunk 2 with a cache is what a call with chunk 1 given makes, chunk after chunk."""
    pipe = tiny_pipe("class", **CAUSAL)
    pipe.register_to_config(pixel_mean=[0.5], pixel_std=[0.05])  # nothing is made outside of 0..1
    call = CALL | {"class_labels": [1, 2], "num_frames": 6}
    noise = torch.randn(2, 1, 6, 8, 8, generator=seeded())
    rolled = pipe(**call, latents=noise, chunk_frames=2, output_type="latent").frames
    first = pipe(**call | {"num_frames": 2}, latents=noise[:, :, :2], output_type="latent").frames
    torch.testing.assert_close(rolled[:, :, :2], first)
    for frames in (2, 4):
        pixels = (rolled[:, :, :frames] * 0.05 + 0.5).transpose(1, 2)
        until = call | {"num_frames": frames + 2}
        seen = pipe(**until, latents=noise[:, :, : frames + 2], video=pixels, output_type="latent").frames
        torch.testing.assert_close(rolled[:, :, frames : frames + 2], seen[:, :, frames:], rtol=1e-4, atol=1e-4)


def test_a_rollout_starts_from_what_is_given_and_a_chunk_may_be_short():
    pipe = tiny_pipe("class", **CAUSAL)
    video = torch.rand(1, 1, 1, 8, 8, generator=seeded(2))
    steps = []
    call = CALL | {"class_labels": 1, "video": video, "generator": seeded(), "output_type": "pt", "chunk_frames": 2}
    made = pipe(**call, callback_on_step_end=lambda p, step, t, tensors: steps.append(step) or {}).frames
    torch.testing.assert_close(made[:, :1], video)
    assert made.shape == (1, *SIZE[:1], 1, 8, 8) and steps == [0, 1, 2, 3]
    assert pipe.num_timesteps == 4


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_rollout_returns_the_chunks_it_finished(stop):
    """Two chunks of two steps: whether the last step done is the second, third or fourth."""
    pipe = tiny_pipe("class", **CAUSAL)
    call = CALL | {"class_labels": 1, "chunk_frames": 2, "output_type": "latent"}
    whole, calls = pipe(**call, generator=seeded()).frames, []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(args[1]))

    def end(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == stop
        return tensors

    made = pipe(**call, generator=seeded(), callback_on_step_end=end).frames
    torch.testing.assert_close(made, whole[:, :, : 4 if stop == 3 else 2])
    assert sum(bool(timestep.any()) for timestep in calls) == 2 * (stop + 1)


def test_a_rollout_interrupted_at_once_returns_what_was_given_or_the_steps_done():
    pipe = tiny_pipe("class", **CAUSAL)
    video = torch.rand(1, 1, 1, 8, 8, generator=seeded(2))

    def end(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    call = CALL | {"class_labels": 1, "output_type": "pt", "callback_on_step_end": end, "generator": seeded()}
    torch.testing.assert_close(pipe(**call, chunk_frames=2, video=video).frames, video)
    plain, rolled = (
        pipe(**call | {"generator": seeded(), "num_frames": frames}, chunk_frames=chunk).frames
        for frames, chunk in ((2, None), (2, 2))
    )
    torch.testing.assert_close(rolled, plain)


def test_gifs_and_films_hold_the_frames(tmp_path):
    av = pytest.importorskip("av")
    pipe = tiny_pipe("class")
    call = CALL | {"class_labels": [1, 2]}
    wanted = (pipe(**call, generator=seeded()).frames[..., 0] * 255).round()  # [2, T, H, W]
    gifs = pipe(**call, generator=seeded(), output_type="gif", output_path=tmp_path / "new" / "clip.gif", fps=10).frames
    assert [path.name for path in gifs] == ["clip_0.gif", "clip_1.gif"]
    for path, clip in zip(gifs, wanted, strict=True):
        with Image.open(path) as gif:
            assert gif.n_frames == SIZE[0] and gif.info["duration"] == 100 and gif.info["loop"] == 0
            for i in range(SIZE[0]):
                gif.seek(i)
                np.testing.assert_array_equal(np.asarray(gif.convert("L")), clip[i])
    films = pipe(**call, generator=seeded(), output_type="mp4", output_path=tmp_path / "clip", fps=10).frames
    assert [path.name for path in films] == ["clip_0.mp4", "clip_1.mp4"]
    with av.open(str(films[0])) as film:
        frames = np.stack([frame.to_ndarray(format="gray") for frame in film.decode(video=0)])
        assert film.streams.video[0].average_rate == 10
    assert frames.shape == wanted[0].shape
    assert np.abs(frames - wanted[0]).mean() < 5  # compressed


def test_odd_sizes_and_wrong_paths_of_files(tmp_path):
    av = pytest.importorskip("av")
    frames = [Image.new("RGB", (5, 7), (200, 30, 90))] * 3
    (path,) = save_clips([frames], tmp_path / "odd.mp4", kind="mp4")
    with av.open(str(path)) as film:
        (stream,) = film.streams.video
        assert (stream.width, stream.height, stream.frames) == (6, 8, 3)
    for fps, rate in ((7.5, Fraction(15, 2)), (29.97, Fraction(2997, 100)), (24000 / 1001, Fraction(24000, 1001))):
        (path,) = save_clips([frames], tmp_path / "rate.mp4", kind="mp4", fps=fps)
        with av.open(str(path)) as film:
            assert film.streams.video[0].average_rate == rate
    (path,) = save_clips([frames], None, kind="gif")
    assert path.is_file() and path.suffix == ".gif"
    with pytest.raises(ValueError, match=r"output_path='.*odd.mp4' must end in .gif"):
        save_clips([frames], tmp_path / "odd.mp4", kind="gif")
    with pytest.raises(ValueError, match="kind='webm' must be one of"):
        save_clips([frames], None, kind="webm")


def test_strength_changes_a_video():
    """The last half of four steps, from the video under their noise; all steps are as if there were no video."""
    pipe = tiny_pipe()
    call = CALL | {"class_labels": 3, "num_inference_steps": 4, "output_type": "latent"}
    frames, height, width = SIZE
    video = np.random.default_rng(0).random((frames, height, width, 1), dtype=np.float32)
    half = pipe(**call, video=video, strength=0.5, generator=seeded()).frames
    assert pipe.num_timesteps == 2
    pipe.scheduler.set_timesteps(4)
    sigma = float(pipe.scheduler.sigmas[2])
    clean = pipe.normalise(torch.from_numpy(video).permute(3, 0, 1, 2)[None])
    noise = torch.randn(1, 1, *SIZE, generator=seeded())
    rest = {"sigmas": [float(x) for x in pipe.scheduler.sigmas[2:4]], "latents": (1 - sigma) * clean + sigma * noise}
    pipe.scheduler.register_to_config(shift=1.0)
    pipe.scheduler._shift = 1.0  # given levels are shifted again otherwise
    expected = pipe(**{k: v for k, v in call.items() if k != "num_inference_steps"}, **rest).frames
    torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-5)
    pipe = tiny_pipe()
    whole = pipe(**call, video=video, strength=1.0, generator=seeded()).frames
    torch.testing.assert_close(whole, pipe(**call, generator=seeded()).frames, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength=0.0 must be more than 0"),
        ({"strength": 0.1}, "strength=0.1 of 2 steps is no step"),
        ({"strength": 0.5, "video": None}, "strength=0.5 changes a video"),
        ({"strength": 0.5, "video": np.zeros((2, 8, 8, 1), np.float32)}, "2 frames as the model sees them"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2.0"),
    ],
)
def test_wrong_strengths_are_named(options, message):
    video = np.zeros((*SIZE, 1), np.float32)
    given = CALL | {"class_labels": 3, "num_inference_steps": 2, "video": video} | options
    with pytest.raises(ValueError, match=message):
        tiny_pipe()(**given)
