"""SoftPAG and segments against formulas written out in float64."""

import pytest
import torch
from foveal.zoo.video import KVCache, Segments, extend_scenes, hunt_heads, perturbed_heads
from foveal.zoo.video.attention import VideoAttnProcessor
from foveal.zoo.video.guidance import SoftPAGProcessor, guide
from foveal.zoo.video.positions import grid_positions, rotary_embedding, rotate
from foveal.zoo.video.segments import SegmentAttnProcessor, segmented
from video_helpers import visible
from video_models import CALL, TEXT, letters, seeded, tiny_model, tiny_pipe

GRID = (4, 2, 3)


def double(conditioning, **config):
    return tiny_model(conditioning, **config).double()


def rotary(model, grid=GRID):
    return rotary_embedding(
        grid_positions(grid), axes=model.rope_axes, theta=model.config.rope_theta, dtype=torch.float64
    )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def maps(query, key, allowed=None):
    """Softmax maps `[B, heads, S, S']` of `[B, S, heads, d]`."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)


def apply(probabilities, value):
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value)


def test_soft_pag_moves_maps_towards_the_identity_head_by_head():
    model = double("class")
    attn, strength, x = model.blocks[0].attn1, torch.tensor([0.3, 1.0], dtype=torch.float64), normal(2, 24, 32)
    rope = rotary(model)
    query, key, value = attn.project(x)
    soft = maps(rotate(query, rope), rotate(key, rope))
    soft = (1 - strength[:, None, None]) * soft + strength[:, None, None] * torch.eye(24, dtype=torch.float64)
    expected = attn.output(apply(soft, value), x)
    attn.set_processor(SoftPAGProcessor(strength.tolist()))
    torch.testing.assert_close(attn(x, rotary_emb=rope, grid=GRID)[0], expected)


@pytest.mark.parametrize("conditioning", ["class", "cross", "joint"])
def test_only_the_chosen_heads_are_perturbed_and_only_inside(conditioning):
    model = double(conditioning, attention=["dense", {"type": "window", "window": [2, 1, 1]}])
    video, time = normal(2, 1, 4, 8, 8), torch.tensor([300.0, 700.0], dtype=torch.float64)
    side = {"encoder_hidden_states": normal(2, 5, TEXT, seed=1)}
    if conditioning == "class":
        side = {"class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        plain = model(video, time, **side).sample
        before = model.attn_processors
        with perturbed_heads(model, {1: [0]}, strength=0.0):
            torch.testing.assert_close(model(video, time, **side).sample, plain)
        outs = []
        for heads in ({0: [0]}, {0: [1]}, {1: [0]}, {0: [0], 1: [1]}):
            with perturbed_heads(model, heads, strength=0.5):
                outs.append(model(video, time, **side).sample)
        assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate([plain, *outs]) for b in outs[i:])
        assert torch.equal(model(video, time, **side).sample, plain)
        assert model.attn_processors == before


def test_processors_come_back_after_an_error():
    model = tiny_model()
    before = dict(model.attn_processors)
    with pytest.raises(RuntimeError, match="inside"), perturbed_heads(model, {0: [0]}):
        assert model.attn_processors != before
        raise RuntimeError("inside")
    assert model.attn_processors == before


def test_guidances_add_up():
    cond, uncond, perturbed = normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2)
    assert torch.equal(guide(cond), cond)
    expected = uncond + 3 * (cond - uncond) + 2 * (cond - perturbed)
    torch.testing.assert_close(guide(cond, uncond=uncond, scale=3, perturbed=perturbed, pag_scale=2), expected)
    torch.testing.assert_close(guide(cond, perturbed=perturbed, pag_scale=2), cond + 2 * (cond - perturbed))


def test_the_pipeline_guides_away_from_perturbed_heads():
    """One Euler step by hand: x - (v_0 + s (v_c - v_0) + w (v_c - v_pert))."""
    pipe = tiny_pipe("class")
    call = {"class_labels": 3, "num_inference_steps": 1, "output_type": "latent", "generator": seeded()}
    made = pipe(**call, guidance_scale=3.0, pag_scale=2.0, pag_heads={1: [0, 1]}, pag_strength=0.7).frames
    x, time = torch.randn(1, 1, 4, 8, 8, generator=seeded()), torch.tensor([1000.0])
    with torch.no_grad():
        cond, uncond = (pipe.transformer(x, time, class_labels=torch.tensor([label])).sample for label in (3, 10))
        with perturbed_heads(pipe.transformer, {1: [0, 1]}, strength=0.7):
            perturbed = pipe.transformer(x, time, class_labels=torch.tensor([3])).sample
    expected = x - (uncond + 3 * (cond - uncond) + 2 * (cond - perturbed))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_the_pipeline_perturbs_heads_of_segments():
    """One Euler step by hand, as above; the segments hold for both wanted predictions and not for the unwanted one."""
    pipe = tiny_pipe("joint", text_encoder=letters)
    call = {"prompt": ["fog", "sun"], "segment_frames": [1, 3], "num_inference_steps": 1, "output_type": "latent"}
    made = pipe(**call, generator=seeded(), guidance_scale=3.0, pag_scale=2.0, pag_heads={1: [0]}).frames
    x, time, model = torch.randn(1, 1, 4, 8, 8, generator=seeded()), torch.tensor([1000.0]), pipe.transformer
    wanted, unwanted = letters(["fog", "sun"]).flatten(0, 1)[None], letters([""])
    with torch.no_grad():
        uncond = model(x, time, encoder_hidden_states=unwanted).sample
        with segmented(model, Segments((1, 3), (3, 3))):
            cond = model(x, time, encoder_hidden_states=wanted).sample
            with perturbed_heads(model, {1: [0]}):
                perturbed = model(x, time, encoder_hidden_states=wanted).sample
    assert not torch.allclose(perturbed, cond, atol=1e-3)
    expected = x - (uncond + 3 * (cond - uncond) + 2 * (cond - perturbed))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_the_attention_backend_holds_inside():
    model = double("joint")
    model.set_attention_backend("_native_cudnn")  # cannot do float64 on CPU: proof that the backend is asked
    call = (normal(1, 1, 4, 8, 8), torch.tensor([300.0]), normal(1, 5, TEXT))
    try:
        with (
            segmented(model, Segments((4,), (5,))),
            perturbed_heads(model, {0: [0]}),
            pytest.raises(RuntimeError, match="No viable backend"),
        ):
            model(*call)
    finally:
        model.set_attention_backend("native")  # of the process, too


class Doubled(VideoAttnProcessor):
    def see(self, *args):
        return 2 * super().see(*args)


class OfItsOwn(VideoAttnProcessor):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options)


def test_processors_of_a_user_are_kept_inside_or_refused():
    model = double("joint", num_layers=1)
    call = (normal(1, 1, 4, 8, 8), torch.tensor([300.0]), normal(1, 5, TEXT))
    with torch.no_grad():
        model.set_attn_processor(Doubled())
        plain = model(*call).sample
        with segmented(model, Segments((4,), (5,))), perturbed_heads(model, {0: [0]}, strength=0.0):
            torch.testing.assert_close(model(*call).sample, plain)
    model.set_attn_processor(OfItsOwn())
    with pytest.raises(TypeError, match=r"processor is a OfItsOwn, which"), perturbed_heads(model, {0: [0]}):
        pass


def test_the_hunt_finds_the_heads_that_serve():
    worth = {(0, 0): 1.0, (0, 1): -2.0, (1, 0): 3.0, (1, 1): 2.0}

    def score(heads):
        chosen = {(layer, head) for layer, some in heads.items() for head in some}
        # two heads that help alone hinder each other
        return sum(worth[head] for head in chosen) - 4 * ({(1, 0), (1, 1)} <= chosen)

    assert hunt_heads(score, list(worth), rounds=2, per_round=1) == ({0: [0], 1: [0]}, [3.0, 4.0])
    assert hunt_heads(score, list(worth), rounds=1, per_round=2) == ({1: [0, 1]}, [1.0])
    with pytest.raises(ValueError, match="rounds=3 of per_round=2 need more than 4 candidates"):
        hunt_heads(score, list(worth), rounds=3, per_round=2)


def test_the_mask_of_segments_written_out():
    """Two segments of 1 and 2 frames of 1 token, with 2 and 1 words: words first."""
    seen = Segments((1, 2), (2, 1)).mask(1)
    expected = torch.tensor(
        [
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [0, 0, 1, 0, 1, 1],
            [1, 1, 0, 1, 1, 1],
            [0, 0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1],
        ]
    )
    assert torch.equal(seen, expected.bool())


SEGMENTED = [
    {"type": "dense"},
    {"type": "dense", "causal": True},
    {"type": "spatial"},
    {"type": "temporal", "causal": True},
    {"type": "window", "window": [3, 2, 1]},
    {"type": "window", "window": [3, 2, 2], "stride": [3, 1, 1], "causal": True},  # 4 frames are no multiple of 3
]


def joint_maps(attn, video, text, rope, allowed):
    """Maps over words and then video of both, their values, and how many words there are, all in one softmax."""
    query, key, value = attn.project(video)
    text_query, text_key, text_value = attn.project_text(text)
    if text_query is None:
        text_query = text_key  # of the last layer, whose words look at nothing
    queries = torch.cat([text_query, rotate(query, rope)], dim=1)
    keys = torch.cat([text_key, rotate(key, rope)], dim=1)
    return maps(queries, keys, allowed), torch.cat([text_value, value], dim=1)


def seen_in(segments, layer, counted=None):
    """Of words and then video: the mask of the segments, what the layer sees of the video, words that count."""
    allowed, words = segments.mask(6), sum(segments.words)
    allowed[words:, words:] &= visible(layer, GRID)
    allowed[:words, words:] &= not layer.get("causal", False)
    if counted is None:
        return allowed[None, None]
    return allowed & torch.nn.functional.pad(counted, (0, 24), value=True)[:, None, None]


@pytest.mark.parametrize("words_that_count", [None, [[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]]])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", SEGMENTED, ids=lambda layer: "-".join(map(str, layer.values())))
def test_joint_attention_of_segments_is_attention_under_their_mask(layer, words_that_count, last):
    model = double("joint", attention=[layer])
    attn, segments = model.blocks[int(last)].attn, Segments((1, 3), (3, 2))
    video, text, rope = normal(2, 24, 32), normal(2, 5, 32, seed=1), rotary(model)
    counted = None if words_that_count is None else torch.tensor(words_that_count).bool()
    both = apply(*joint_maps(attn, video, text, rope, seen_in(segments, layer, counted)))
    attn.set_processor(SegmentAttnProcessor(segments))
    out, words = attn(video, text, counted, rope, GRID)
    torch.testing.assert_close(out, attn.output(both[:, 5:], video))
    if last:
        assert words is None
    else:
        torch.testing.assert_close(words, attn.output_text(both[:, :5]))


def test_perturbed_heads_of_segments_move_their_own_maps():
    """(1 - u) A + u I with A under the mask of the segments, words and video in one softmax; words keep their maps."""
    model, segments, layer = double("joint"), Segments((1, 3), (3, 2)), {"type": "dense"}
    attn, rope, strength = model.blocks[0].attn, rotary(model), torch.tensor([0.3, 1.0], dtype=torch.float64)
    video, text = normal(2, 24, 32), normal(2, 5, 32, seed=1)
    plain, value = joint_maps(attn, video, text, rope, seen_in(segments, layer))
    soft = (1 - strength[:, None, None]) * plain + strength[:, None, None] * torch.eye(29, dtype=torch.float64)
    attn.set_processor(SoftPAGProcessor(strength.tolist(), SegmentAttnProcessor(segments)))
    out, words = attn(video, text, None, rope, GRID)
    torch.testing.assert_close(out, attn.output(apply(soft, value)[:, 5:], video))
    torch.testing.assert_close(words, attn.output_text(apply(plain, value)[:, :5]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_a_rollout_of_segments_is_the_full_pass_under_their_mask(conditioning, masked):
    """Chunks that begin, end and lie within segments; a segment of no frames of the chunk is still read."""
    layers = [SEGMENTED[5], SEGMENTED[1], SEGMENTED[3], {"type": "spatial", "causal": True}]
    model, segments = double(conditioning, attention=layers, num_layers=4), Segments((1, 4, 2), (2, 3, 1))
    video, time = normal(1, 1, 7, 8, 8), torch.tensor([300.0], dtype=torch.float64)
    side = {"encoder_hidden_states": normal(1, 6, TEXT, seed=1)}
    if masked:
        side["encoder_attention_mask"] = torch.tensor([[True, False, True, True, False, True]])
    with torch.no_grad():
        with segmented(model, segments):
            expected = model(video, time, **side).sample
        cache, outs, first = KVCache(), [], 0
        for frames in (2, 1, 3, 1):
            with segmented(model, segments.between(first, first + frames)):
                outs.append(model(video[:, :, first : first + frames], time, **side, kv_cache=cache).sample)
            first += frames
    torch.testing.assert_close(torch.cat(outs, dim=2), expected, rtol=1e-9, atol=1e-10)


def test_cross_attention_of_segments_is_attention_under_their_mask():
    model = double("cross")
    attn, segments = model.blocks[0].attn2, Segments((3, 1), (2, 3))
    video, text = normal(2, 24, 32), normal(2, 5, 32, seed=1)
    counted = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 0, 1]]).bool()
    query, key, value = attn.project(video, text)
    allowed = segments.mask(6)[5:, :5] & counted[:, None, None]
    expected = attn.output(apply(maps(query, key, allowed), value), video)
    attn.set_processor(SegmentAttnProcessor(segments))
    torch.testing.assert_close(attn(video, text, counted)[0], expected)


@pytest.mark.parametrize("layer", ["spatial", "temporal", {"type": "window", "window": [3, 1, 2], "causal": True}])
def test_one_segment_is_no_restriction(layer):
    model = double("joint", attention=[layer])
    video, text = normal(1, 1, 4, 8, 8), normal(1, 5, TEXT, seed=1)
    time = torch.tensor([300.0], dtype=torch.float64)
    with torch.no_grad():
        plain = model(video, time, encoder_hidden_states=text).sample
        with segmented(model, Segments((4,), (5,))):
            torch.testing.assert_close(model(video, time, encoder_hidden_states=text).sample, plain)
        with segmented(model, Segments((2, 2), (2, 3))):
            assert not torch.allclose(model(video, time, encoder_hidden_states=text).sample, plain, atol=1e-4)


def test_a_prompt_changes_only_its_segment_where_frames_do_not_mix():
    pipe = tiny_pipe("cross", text_encoder=letters, attention=["spatial"])
    call = CALL | {"segment_frames": [1, 3], "output_type": "latent"}
    rain, sun = (pipe(prompt=["fog", text], generator=seeded(), **call).frames for text in ("rain", "sun"))
    torch.testing.assert_close(rain[:, :, :1], sun[:, :, :1])
    assert (rain[:, :, 1:] - sun[:, :, 1:]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3
    embeds = torch.stack([letters(["fog", "rain"])])
    given = pipe(prompt_embeds=embeds, generator=seeded(), **call).frames
    torch.testing.assert_close(given, rain)
    two = pipe(prompt=[["fog", "rain"], ["fog", "sun"]], generator=[seeded(), seeded()], **call).frames
    torch.testing.assert_close(two, torch.cat([rain, sun]))


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_a_rollout_of_segments_continues_as_a_call_that_sees_the_past(conditioning):
    """Chunk 2 with a cache is what a call with chunk 1 given makes, though the second text begins inside chunk 1."""
    pipe = tiny_pipe(conditioning, text_encoder=letters, attention=[{"type": "dense", "causal": True}])
    pipe.register_to_config(pixel_mean=[0.5], pixel_std=[0.05])  # nothing is made outside of 0..1
    call = CALL | {"prompt": ["fog", "rain"], "output_type": "latent"}
    noise = torch.randn(1, 1, 4, 8, 8, generator=seeded())
    rolled = pipe(**call, segment_frames=[1, 3], num_frames=4, latents=noise, chunk_frames=2).frames
    plain = pipe(**call, segment_frames=[1, 3], num_frames=4, latents=noise, chunk_frames=4).frames
    torch.testing.assert_close(plain, pipe(**call, segment_frames=[1, 3], num_frames=4, latents=noise).frames)
    first = pipe(**call, segment_frames=[1, 1], num_frames=2, latents=noise[:, :, :2]).frames
    torch.testing.assert_close(rolled[:, :, :2], first)
    pixels = (first * 0.05 + 0.5).transpose(1, 2)
    seen = pipe(**call, segment_frames=[1, 3], num_frames=4, latents=noise, video=pixels).frames
    torch.testing.assert_close(rolled, seen, rtol=1e-4, atol=1e-4)
    continued = pipe(**call, segment_frames=[1, 3], num_frames=4, latents=noise, video=pixels, chunk_frames=2).frames
    torch.testing.assert_close(continued, rolled, rtol=1e-4, atol=1e-4)
    other = pipe(**call | {"prompt": ["sun", "rain"]}, segment_frames=[1, 3], num_frames=4, latents=noise).frames
    assert not torch.allclose(other[:, :, :1], rolled[:, :, :1], atol=1e-3)


def test_scenes_follow_each_other_in_sight_of_the_last_frames():
    pipe = tiny_pipe("cross", text_encoder=letters)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(args))
    call = CALL | {"generator": seeded()}
    video = extend_scenes(pipe, ["fog", "rain", "sun"], frames_per_scene=4, context_frames=1, **call)
    assert video.shape == (1, 4 + 3 + 3, 1, 8, 8)
    assert calls[0][1].shape == (1,) and calls[-1][1].shape == (1, 4) and calls[-1][1][0, 0] == 0
    torch.testing.assert_close(calls[-1][0][:, :, 0] * 0.4 + 0.2, video[:, 6])

    # the second scene is a call of its own, with the first one's last frame given
    generator = seeded()
    first = pipe(prompt="fog", num_frames=4, output_type="pt", **CALL, generator=generator).frames
    second = pipe(
        prompt=["fog", "rain"],
        segment_frames=[1, 3],
        video=first[:, -1:],
        num_frames=4,
        output_type="pt",
        **CALL,
        generator=generator,
    ).frames
    torch.testing.assert_close(video[:, :7], torch.cat([first, second[:, 1:]], dim=1))


def test_segments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"equally many, got frames=\(2, 2\), words=\(3,\)"):
        Segments((2, 2), (3,))
    for frames, words in (((0, 0), (3, 3)), ((4, -1), (3, 3)), ((2, 2), (3, 0)), ((), ())):
        with pytest.raises(ValueError, match="segments need frames and at least one word each"):
            Segments(frames, words)
    with (
        pytest.raises(ValueError, match="segments need conditioning='cross' or 'joint', not 'class'"),
        segmented(tiny_model(), Segments((4,), (3,))),
    ):
        pass
    model, video = tiny_model("joint"), torch.zeros(1, 1, 4, 8, 8)
    with (
        pytest.raises(ValueError, match="segments cover 3 token frames and 5 words, the video has 4"),
        segmented(model, Segments((1, 2), (2, 3))),
    ):
        model(video, torch.zeros(1), encoder_hidden_states=torch.zeros(1, 5, TEXT))
    pipe = tiny_pipe("cross", text_encoder=letters)
    with pytest.raises(ValueError, match=r"segment_frames=\[2, 3\] must add up to num_frames=4"):
        pipe(prompt=["a", "b"], segment_frames=[2, 3])
    with pytest.raises(ValueError, match="must have 2 texts for segment_frames"):
        pipe(prompt=["a", "b", "c"], segment_frames=[2, 2])
    with pytest.raises(ValueError, match=r"prompt_embeds has shape \[1, 5, 12\], expected \[B, 2, L, text_dim\]"):
        pipe(prompt_embeds=torch.zeros(1, 5, TEXT), segment_frames=[2, 2])
    with pytest.raises(ValueError, match="context_frames=4 at least 1 and less than frames_per_scene=4"):
        extend_scenes(pipe, ["a"], frames_per_scene=4, context_frames=4)


def test_rescaled_guidance_is_as_large_as_the_prediction():
    cond, uncond = (3 * torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    plain = guide(cond, uncond=uncond, scale=7)
    full, half = (guide(cond, uncond=uncond, scale=7, rescale=share) for share in (1.0, 0.5))
    for video in range(2):
        assert float(full[video].std()) == pytest.approx(float(cond[video].std()), rel=1e-5)
        assert full[video].std() < 0.5 * plain[video].std()
    torch.testing.assert_close(half, (full + plain) / 2)
