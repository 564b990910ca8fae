"""VideoDiT as a whole: against a plain DiT written out, with every condition, timestep, size and error."""

from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.zoo.video import VideoDiT
from foveal.zoo.video.modulation import SNRLayerNorm, between_ends
from foveal.zoo.video.positions import grid_positions
from torch import Tensor
from torch.nn import functional as F
from video_helpers import CONDITIONS, draw, inputs, make

WINDOW = {"type": "window", "window": [3, 3, 3]}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def plain_dit(model: VideoDiT, video: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    """A DiT for images (adaLN-single, RMS-normed queries and keys, RoPE), one convolution and a few products."""
    w, dim, heads = dict(model.named_parameters()), model.patch_embed.out_features, model.config.num_attention_heads
    patch, size = model.config.patch_size, dim // heads

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift

    kernel = w["patch_embed.weight"].view(dim, -1, *patch)
    x = F.conv3d(video, kernel, w["patch_embed.bias"], stride=patch)  # [B, dim, 1, H, W]
    height, width = x.shape[3:]
    x = x.flatten(2).transpose(1, 2)
    waves = torch.exp(-torch.arange(128) / 128 * torch.tensor(10000.0).log())
    phase = timestep.float()[:, None] * waves
    t = linear("time_embed.linear_1", torch.cat([phase.cos(), phase.sin()], dim=-1).double())
    t = linear("time_embed.linear_2", F.silu(t))
    if labels is not None:
        t = t + w["class_embed.weight"][labels]
    shared = linear("modulation_proj", F.silu(t)).view(-1, 6, dim)

    def attend(x: Tensor, name: str) -> Tensor:
        q, k, v = (linear(f"{name}.to_{n}", x).unflatten(-1, (heads, size)).transpose(1, 2) for n in "qkv")
        q, k = (F.rms_norm(z, (size,), w[f"{name}.norm_{n}.weight"], 1e-6) for n, z in (("q", q), ("k", k)))
        row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
        angle = [torch.zeros(height * width, (size - 2 * (size // 2 * 10 // 32 * 2)) // 2)]
        channels = size // 2 * 10 // 32 * 2
        for position in (row, column):
            angle.append(position[:, None] / 10000 ** (torch.arange(0, channels, 2).double() / channels))
        spin = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angle, dim=-1))
        q, k = (torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * spin) for z in (q, k))
        out = ((q.flatten(-2) @ k.flatten(-2).mT) * size**-0.5).softmax(-1) @ v
        return linear(f"{name}.to_out.0", out.transpose(1, 2).flatten(2))

    for i in range(model.config.num_layers):
        s1, c1, g1, s2, c2, g2 = (
            (w[f"blocks.{i}.modulation.scale_shift_table"] + shared).unsqueeze(2).transpose(1, 2).unbind(2)
        )
        x = x + g1 * attend(norm(x, s1, c1), f"blocks.{i}.attn1")
        hidden = F.gelu(linear(f"blocks.{i}.mlp.up", norm(x, s2, c2)), approximate="tanh")
        x = x + g2 * linear(f"blocks.{i}.mlp.down", hidden)
    shift, scale = (w["output_modulation"] + t[:, None])[:, :, None].unbind(1)
    pixels = linear("proj_out", norm(x, shift, scale)).view(-1, height, width, model.config.in_channels, *patch)
    return torch.einsum("bhwctij->bcthiwj", pixels).reshape(video.shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layer", ["dense", "spatial", "window"])
@pytest.mark.parametrize("conditioning", ["none", "class"])
def test_an_image_goes_through_a_plain_dit(conditioning, layer, causal):
    spec = {"type": layer, "causal": causal} | ({"window": [3, 9, 9]} if layer == "window" else {})
    model = make(attention=[spec], **CONDITIONS[conditioning])
    given = inputs(model, size=(1, 6, 10))
    expected = plain_dit(model, given["hidden_states"], given["timestep"], given.get("class_labels"))
    torch.testing.assert_close(model(**given).sample, expected, **CLOSE)


@pytest.mark.parametrize("modulation", ["adaln_single", "td_ln", "td_ln_snr"])
@pytest.mark.parametrize("conditioning", CONDITIONS)
def test_every_parameter_learns_and_videos_do_not_mix(conditioning, modulation):
    layers = ["dense", WINDOW, "spatial", "temporal"]
    model = make(
        attention=layers,
        num_layers=4,
        modulation=modulation,
        gated_attention=True,
        mlp="swiglu",
        **CONDITIONS[conditioning],
    )
    given = inputs(model)
    out = model(**given).sample
    assert out.shape == given["hidden_states"].shape
    for i in range(2):
        alone = model(**{k: v[i : i + 1] for k, v in given.items()}).sample
        torch.testing.assert_close(out[i : i + 1], alone, **CLOSE)
    (out * draw(*out.shape, seed=3)).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    zero = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not idle
    # words are clean: their timestep is 0, and the slope of s(t) has nothing to multiply
    assert all(modulation == "td_ln" and "text_modulation.slope" in name for name in zero), zero


@pytest.mark.parametrize("modulation", ["adaln_single", "td_ln", "td_ln_snr"])
@pytest.mark.parametrize("conditioning", ["class", "joint"])
def test_timesteps_per_video_frame_and_token_agree(conditioning, modulation):
    model = make(modulation=modulation, patch_size=(2, 1, 2), **CONDITIONS[conditioning])
    given = inputs(model, size=(4, 3, 6))
    expected = model(**given).sample
    for count in (2, 2 * 3 * 3):
        spread = given["timestep"][:, None].expand(2, count)
        torch.testing.assert_close(model(**given | {"timestep": spread}).sample, expected, **CLOSE)
    frames = torch.tensor([[10.0, 700.0], [300.0, 20.0]], dtype=torch.float64)
    by_token = frames.repeat_interleave(9, dim=1)
    found = [model(**given | {"timestep": t}).sample for t in (frames, by_token)]
    torch.testing.assert_close(*found, **CLOSE)
    assert not torch.allclose(found[0], expected, rtol=1e-3)


def test_ends_of_time_by_channel_are_dimr_s():
    """The recorded parameter of DiMR; high SNR gives the first end, and a fresh norm has no time."""
    g = np.load(Path(__file__).parents[1] / "goldens" / "control" / "dit_td_ln.npz")
    names = ("param0", "param1", "nodecay_weight", "nodecay_bias")
    first, second, slope, offset = (torch.from_numpy(g[name]) for name in names)
    found = between_ends(first, second, slope, offset, torch.from_numpy(g["log_snr"])[:, None])
    torch.testing.assert_close(found, torch.from_numpy(g["out"]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(between_ends(first, second, 0 * slope, offset, torch.tensor(1e3)), first)
    norm = SNRLayerNorm(6).double()
    torch.nn.init.normal_(norm.ends)
    with torch.no_grad():
        norm.ends[:, 1] = norm.ends[:, 0]
    early, late = norm(torch.tensor([[0.0, 1.0]], dtype=torch.float64))[0].scale.unbind(1)
    torch.testing.assert_close(early, late)


def test_a_new_model_returns_zeros_and_its_blocks_nothing():
    for conditioning in CONDITIONS:
        model = VideoDiT(num_layers=1, in_channels=2, gated_attention=True, **CONDITIONS[conditioning])
        given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(model).items()}
        seen = []
        model.blocks[0].register_forward_hook(lambda _, args, out, seen=seen: seen.extend([args[0], out]))
        assert not model(**given).sample.any()
        after = seen[1][0] if conditioning == "joint" else seen[1]
        torch.testing.assert_close(after, seen[0])
        assert seen[0].std() > 0.1


def test_any_size_the_patch_divides():
    model = make(patch_size=(2, 3, 1), attention=["dense", WINDOW, "spatial", "temporal"], num_layers=4)
    for size in ((2, 3, 1), (2, 9, 7), (6, 3, 5), (10, 12, 11)):
        given = inputs(model, batch=1, size=size)
        assert model(**given).sample.shape == given["hidden_states"].shape


def test_output_channels_can_differ():
    model = make(out_channels=5)
    assert model(**inputs(model, size=(2, 4, 4))).sample.shape == (2, 5, 2, 4, 4)


@pytest.mark.parametrize("conditioning", ["class", "cross", "joint"])
def test_conditions_and_masks_reach_the_output(conditioning):
    model = make(**CONDITIONS[conditioning])
    given = inputs(model)
    out = model(**given).sample
    if conditioning == "class":
        assert not torch.allclose(out, model(**given | {"class_labels": torch.tensor([5, 5])}).sample, rtol=1e-3)
        return
    mask = torch.tensor([[True, True, False, False]] * 2)
    masked = model(**given, encoder_attention_mask=mask).sample
    short = model(**given | {"encoder_hidden_states": given["encoder_hidden_states"][:, :2]}).sample
    torch.testing.assert_close(masked, short, **CLOSE)
    assert not torch.allclose(out, masked, rtol=1e-3)
    nothing = model(**given, encoder_attention_mask=torch.zeros(2, 4, dtype=torch.bool)).sample
    assert nothing.isfinite().all()


def test_layers_take_their_attention_in_turn():
    model = make(num_layers=5, attention=[WINDOW, "spatial", "dense"])
    assert [p.type for p in model.patterns] == ["window", "spatial", "dense", "window", "spatial"]
    others = make(num_layers=5, attention=["spatial", WINDOW, "dense"])
    given = inputs(model, size=(4, 10, 10))
    assert not torch.allclose(model(**given).sample, others(**given).sample, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_states": draw(2, 3, 3, 6, 8)},
            r"hidden_states has shape \[2, 3, 3, 6, 8\]; expected \[B, in_channels=2",
        ),
        ({"hidden_states": draw(2, 2, 6, 8)}, "hidden_states has shape"),
        ({"hidden_states": draw(2, 2, 3, 6, 7)}, r"\[T, H, W\] = \[3, 6, 7\]; each must be a multiple of patch_size"),
        ({"timestep": torch.zeros(2, 5)}, r"timestep has shape \[2, 5\]"),
        ({"timestep": torch.zeros(())}, r"timestep has shape \[\]"),
        ({"positions": torch.zeros(35, 3)}, "positions has shape"),
        ({"class_labels": torch.zeros(2, dtype=torch.int64)}, "class_labels must be given when"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states must be given when"),
        ({"encoder_hidden_states": draw(2, 4, 5)}, "encoder_hidden_states has shape"),
        ({"encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool)}, "encoder_attention_mask"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask"),
    ],
)
def test_wrong_inputs_are_named(options, message):
    model = make(**CONDITIONS["cross"])
    with pytest.raises(ValueError, match=message):
        model(**inputs(model) | options)


def test_missing_and_wrong_labels_are_named():
    model = make(**CONDITIONS["class"])
    with pytest.raises(ValueError, match="class_labels must be given"):
        model(**inputs(model) | {"class_labels": None})
    with pytest.raises(ValueError, match=r"class_labels .*must be integers"):
        model(**inputs(model) | {"class_labels": torch.zeros(2)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"conditioning": "text"}, "conditioning='text'"),
        ({"modulation": "adaln"}, "modulation='adaln'"),
        ({"patch_size": (2, 2)}, "patch_size"),
        ({"attention": []}, "attention"),
        ({"attention": "dense"}, "attention='dense'"),
        ({"conditioning": "class"}, "num_classes=None"),
        ({"num_classes": 3}, "num_classes=3"),
        ({"conditioning": "joint"}, "text_dim=None"),
        ({"rope_axes": (4, 4, 2)}, "rope_axes"),
        ({"rope_axes": (5, 5, 2)}, "rope_axes"),
        ({"rope_axes": (-4, 8, 8)}, r"rope_axes=\(-4, 8, 8\) must be three even numbers from 0 up"),
        ({"rope_axes": ()}, r"rope_axes=\(\)"),
        ({"attention_head_dim": 6}, "attention_head_dim=6 must be even and at least 8"),
        ({"attention_head_dim": 9}, "attention_head_dim=9 must be even"),
        ({"attention_head_dim": 0}, "attention_head_dim=0"),
        ({"num_layers": 0}, "num_layers=0 must be more than 0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio=-1.0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"eps": -1e-6}, "eps=-1e-06 must not be negative"),
        ({"conditioning": "class", "num_classes": 0}, "num_classes=0"),
        ({"conditioning": "cross", "text_dim": 0}, "text_dim=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ],
)
def test_wrong_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_axis_may_be_left_out_on_purpose():
    """Channels of an image's heads need not turn with time."""
    model = make(rope_axes=(0, 6, 6))
    given = inputs(model, batch=1, size=(2, 4, 4))
    moved = grid_positions((2, 2, 2)) * torch.tensor([3, 1, 1])
    torch.testing.assert_close(model(**given, positions=moved).sample, model(**given).sample, **CLOSE)


# millions of parameters: class-conditional and with cross-attention to text
SIZES = {
    "nano": (0.53, None),
    "s": (22, 29),
    "b": (86, 114),
    "l": (303, 404),
    "xl": (446, 595),
    "latte_xl": (446, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_sizes_they_are_named_for(name):
    of_classes, of_text = SIZES[name]
    with torch.device("meta"):
        model = VideoDiT.from_preset(name, conditioning="class", num_classes=10)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx(of_classes, rel=0.06)
        if of_text:
            model = VideoDiT.from_preset(name, conditioning="cross", text_dim=768)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(of_text, rel=0.06)


def test_presets_take_overrides_and_refuse_unknown_names():
    model = VideoDiT.from_preset("nano", num_layers=1, attention=[WINDOW])
    assert (model.config.num_layers, model.config.attention, model.config.patch_size) == (1, [WINDOW], (2, 4, 4))
    assert model.rope_axes == (12, 10, 10)
    with pytest.raises(ValueError, match="name='giant' must be one of"):
        VideoDiT.from_preset("giant")


def test_patches_hold_what_a_convolution_would_see():
    model = make(patch_size=(2, 2, 3))
    video = draw(1, 2, 4, 6, 9)
    weight = model.patch_embed.weight.view(-1, 2, 2, 2, 3)
    expected = F.conv3d(video, weight, model.patch_embed.bias, stride=(2, 2, 3)).flatten(2).transpose(1, 2)
    seen = []
    model.patch_embed.register_forward_hook(lambda *args: seen.append(args[-1]))
    model(video, torch.zeros(1))
    torch.testing.assert_close(seen[0], expected, **CLOSE)
    assert seen[0].shape[1] == prod((2, 3, 3))


@pytest.mark.parametrize("per", ["video", "frame", "token"])
def test_a_predicted_video_becomes_a_velocity(per):
    clean, model = make(), make(prediction="video")
    given = inputs(model)
    patch, video = model.config.patch_size, given["hidden_states"]
    frames, rows, columns = (n // p for n, p in zip(video.shape[2:], patch, strict=True))
    count = {"video": 1, "frame": frames, "token": frames * rows * columns}[per]
    times = torch.linspace(10.0, 900.0, 2 * count, dtype=torch.float64).view(2, count)  # 10 is below the least divisor
    given["timestep"] = times[:, 0] if per == "video" else times
    groups = {"video": (1, 1, 1), "frame": (frames, 1, 1), "token": (frames, rows, columns)}[per]
    t = (times / 1000).clamp(min=0.05).view(2, 1, *groups)
    for axis, (n, group) in enumerate(zip(video.shape[2:], groups, strict=True), 2):
        t = t.repeat_interleave(n // group, dim=axis)
    torch.testing.assert_close(model(**given).sample, (video - clean(**given).sample) / t, **CLOSE)
    with pytest.raises(ValueError, match="out_channels=3 must be in_channels=2"):
        make(prediction="video", out_channels=3)
    with pytest.raises(ValueError, match="prediction='noise' must be one of"):
        make(prediction="noise")
