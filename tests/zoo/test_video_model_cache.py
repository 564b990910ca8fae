"""A causal VideoDiT continues a video chunk by chunk as if it had seen all of it at once."""

import math

import pytest
import torch
from foveal.zoo.video import KVCache
from foveal.zoo.video.pattern import Pattern
from video_helpers import CONDITIONS, inputs, make

LAYERS = {
    "dense": {"type": "dense"},
    "temporal": {"type": "temporal"},
    "window": {"type": "window", "window": [3, 3, 3]},
    "strided": {"type": "window", "window": [4, 2, 2], "stride": [3, 2, 1]},
    "dilated": {"type": "window", "window": [2, 2, 2], "dilation": [2, 1, 1]},
    "strided and dilated": {"type": "window", "window": [3, 2, 2], "stride": [2, 1, 1], "dilation": [2, 1, 2]},
    "of two heads": {"type": "window", "window": [[3, 3, 3], [4, 2, 2]], "stride": [[2, 1, 1], [3, 2, 1]]},
    "dilated in a head": {"type": "window", "window": 2, "stride": [2, 1, 1], "dilation": [[2, 1, 1], [3, 1, 2]]},
    "longer than the video": {"type": "window", "window": [20, 2, 2], "stride": [5, 1, 1]},
}
CHUNKS = [(1,) * 9, (2, 3, 4), (4, 4, 1)]


def roll(model, given: dict, chunks, cache: KVCache, timestep: torch.Tensor | None = None) -> torch.Tensor:
    outs, first = [], 0
    for frames in chunks:
        part = slice(first, first + frames)
        chunk = given | {"hidden_states": given["hidden_states"][:, :, part]}
        if timestep is not None:
            chunk["timestep"] = timestep[:, part]
        outs.append(model(**chunk, kv_cache=cache).sample)
        first += frames
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_rollout_equals_the_full_pass(layer, chunks):
    model = make(attention=[LAYERS[layer] | {"causal": True}, "spatial"], num_layers=4)
    given = inputs(model, batch=1, size=(9, 4, 6))
    expected = model(**given).sample
    torch.testing.assert_close(roll(model, given, chunks, KVCache()), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("conditioning", CONDITIONS)
def test_rollout_with_conditions_and_a_timestep_per_frame(conditioning, masked):
    attention = [LAYERS[layer] | {"causal": True} for layer in ("window", "dense", "temporal")]
    model = make(attention=attention, num_layers=3, **CONDITIONS[conditioning])
    given = inputs(model, size=(5, 4, 4))
    if masked and model.config.text_dim:
        given["encoder_attention_mask"] = torch.tensor([[True] * 4, [True, False, True, False]])
    timestep = torch.linspace(0, 1000, 10, dtype=torch.float64).view(2, 5)
    expected = model(**given | {"timestep": timestep}).sample
    found = roll(model, given, (2, 1, 2), KVCache(), timestep)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
def test_later_frames_change_nothing(layer):
    model = make(attention=[LAYERS[layer] | {"causal": True}], **CONDITIONS["joint"])
    given = inputs(model, batch=1, size=(7, 4, 4))
    short = given | {"hidden_states": given["hidden_states"][:, :, :4]}
    torch.testing.assert_close(model(**short).sample, model(**given).sample[:, :, :4], rtol=1e-9, atol=1e-10)


def test_words_carry_nothing_from_later_frames_either():
    """In joint models a frame would see through words that see the whole video: every layer must be causal."""
    dense, spatial = {"type": "dense", "causal": True}, {"type": "spatial", "causal": True}
    model = make(attention=[dense, spatial], num_layers=4, **CONDITIONS["joint"])
    given = inputs(model, batch=1, size=(6, 4, 4))
    found = roll(model, given, (2, 1, 3), KVCache())
    torch.testing.assert_close(found, model(**given).sample, rtol=1e-9, atol=1e-10)
    leaky = make(attention=[dense, "spatial"], num_layers=4, **CONDITIONS["joint"])
    with pytest.raises(ValueError, match="kv_cache needs causal layers"):
        leaky(**given, kv_cache=KVCache())


@pytest.mark.parametrize("layer", LAYERS)
def test_keeps_the_frames_that_can_still_be_seen(layer):
    spec = LAYERS[layer]
    model = make(attention=[spec | {"causal": True}], num_layers=1)
    cache = KVCache()
    kept = []
    for frames in range(1, 25):
        model(**inputs(model, batch=1, size=(1, 4, 4)), kv_cache=cache)
        assert cache.frames == frames
        kept.append(cache.layer(0).key.shape[1])
    if spec["type"] == "window":
        heads = [[x[0] for x in (h.window, h.stride, h.dilation)] for h in Pattern.from_config(spec).of_heads()]
        most = max((window + stride - 1) * dilation for window, stride, dilation in heads)
        assert max(kept) <= most + math.lcm(*(stride * dilation for _, stride, dilation in heads))
        assert max(kept[12:]) < 24
    else:
        assert kept == list(range(1, 25))
    assert cache.nbytes == 2 * kept[-1] * 2 * 2 * 24 * 8  # keys and values, frames, rows, columns, channels, bytes


def test_a_cache_that_does_not_append_is_read_only():
    model = make(attention=[LAYERS["window"] | {"causal": True}])
    given = inputs(model, batch=1, size=(4, 4, 4))
    parts = [given | {"hidden_states": given["hidden_states"][:, :, i : i + 2]} for i in (0, 2)]
    cache = KVCache()
    model(**parts[0], kv_cache=cache)
    cache.append = False
    first, again = (model(**parts[1], kv_cache=cache).sample for _ in range(2))
    assert torch.equal(first, again)
    assert cache.frames == 2
    torch.testing.assert_close(first, model(**given).sample[:, :, 2:], rtol=1e-9, atol=1e-10)


def test_errors_say_why():
    model = make(attention=[{"type": "dense", "causal": True}, "dense"])
    with pytest.raises(ValueError, match="kv_cache needs causal layers"):
        model(**inputs(model), kv_cache=KVCache())
    model, cache = make(attention=[{"type": "dense", "causal": True}]), KVCache()
    model(**inputs(model, batch=1), kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache holds frames of"):
        model(**inputs(model, batch=2), kv_cache=cache)
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="kv_cache cannot append"):
        model(**inputs(model, batch=1), kv_cache=cache)
