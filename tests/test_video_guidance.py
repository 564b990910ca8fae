"""SoftPAG and segments against formulas written out in float64."""

import pytest
import torch
from foveal.zoo.video import Segments, extend_scenes, hunt_heads, perturbed_heads
from foveal.zoo.video.guidance import SoftPAGProcessor, guide
from foveal.zoo.video.positions import grid_positions, rotary_embedding, rotate
from foveal.zoo.video.segments import SegmentAttnProcessor, segmented
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


@pytest.mark.parametrize("words_that_count", [None, [[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]]])
@pytest.mark.parametrize("last", [False, True])
def test_joint_attention_of_segments_is_attention_under_their_mask(words_that_count, last):
    model = double("joint")
    attn, segments = model.blocks[int(last)].attn, Segments((1, 3), (3, 2))
    video, text, rope = normal(2, 24, 32), normal(2, 5, 32, seed=1), rotary(model)
    counted = None if words_that_count is None else torch.tensor(words_that_count).bool()
    allowed = segments.mask(6)[None, None]
    if counted is not None:
        allowed = allowed & torch.nn.functional.pad(counted, (0, 24), value=True)[:, None, None]
    query, key, value = attn.project(video)
    text_query, text_key, text_value = attn.project_text(text)
    if text_query is None:
        text_query = text_key  # of the last layer, whose words look at nothing
    queries = torch.cat([text_query, rotate(query, rope)], dim=1)
    keys = torch.cat([text_key, rotate(key, rope)], dim=1)
    both = apply(maps(queries, keys, allowed), torch.cat([text_value, value], dim=1))
    attn.set_processor(SegmentAttnProcessor(segments))
    out, words = attn(video, text, counted, rope, GRID)
    torch.testing.assert_close(out, attn.output(both[:, 5:], video))
    if last:
        assert words is None
    else:
        torch.testing.assert_close(words, attn.output_text(both[:, :5]))


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
def test_other_patterns_keep_what_they_see_of_the_video(layer):
    """One segment is no restriction: the plain processor says the same."""
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
    with pytest.raises(ValueError, match=r"equally many, at least one each, got frames=\(2, 2\), words=\(3,\)"):
        Segments((2, 2), (3,))
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
