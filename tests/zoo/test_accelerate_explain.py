"""explain: grid, density, FLOPs and bounds of a plan from shapes alone."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from foveal.zoo import accelerate
from foveal.zoo.accelerate import explain
from generators import build, run
from sparse_plans import two_blocks, window_pairs
from torch.utils.flop_counter import FlopCounterMode

SIZES = {  # frames, height, width and text of the arguments in generators.py
    "wan": (9, 64, 64, 12), "hunyuan": (9, 32, 40, 6), "hunyuan 1.5": (9, 64, 80, 4), "cogvideox": (9, 64, 64, 6),
    "ltx": (17, 128, 128, 6), "mochi": (13, 64, 64, 6), "cosmos": (17, 64, 64, 6), "latte": (3, 64, 64, 6),
    "allegro": (9, 64, 64, 6), "flux": (1, 96, 112, 5), "sd3": (1, 96, 128, 5), "hidream": (1, 64, 64, 12),
    "qwen": (1, 96, 112, 5), "z-image": (1, 96, 112, 32), "sd unet": (1, 72, 96, 7), "sdxl unet": (1, 72, 96, 7),
    "motion unet": (5, 72, 96, 7),
    "videodit": (3, 16, 20, 5), "videodit joint": (3, 16, 20, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_flops_are_those_of_a_forward(name):
    """The count of torch leaves attention on CPU out; the rest is met within what small layers of one token cost."""
    model, inputs = build(name)
    frames, height, width, text = SIZES[name]
    cost = explain(model, frames=frames, height=height, width=width, text=text)
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    one_token = 0.35 if name == "z-image" else 0.1  # of 1024 channels
    assert cost.other_flops == pytest.approx(counter.get_total_flops(), rel=one_token)
    for site in cost.sites:
        assert site.density == 1.0 and site.flops == site.dense_flops


def test_attention_by_hand():
    model, _ = build("wan")
    cost = explain(
        model, {"window": 3}, frames=9, height=64, width=64, text=12, dense_layers=[0], steps=10, dense_steps=0.3
    )
    assert cost.grid == (3, 4, 4) and cost.sparse_steps == 7
    density = window_pairs((3, 4, 4), 3).double().mean().item()
    first, cross, second, _ = cost.sites
    assert first.dense_flops == first.flops == 4 * 48 * 48 * 2 * 12 and first.reason == "dense_layers=(0,)"
    assert cross.flops == 4 * 48 * 12 * 2 * 12 and cross.reason == "cross-attention"
    assert second.density == pytest.approx(density) and second.flops == pytest.approx(
        density * second.dense_flops, abs=1
    )
    share = 2 * first.dense_flops / cost.dense_step_flops
    assert cost.attention_share == pytest.approx(share) and cost.bound == pytest.approx(1 / (1 - share))
    dense, sparse = cost.dense_step_flops, cost.sparse_step_flops
    assert cost.speedup == pytest.approx(10 * dense / (3 * dense + 7 * sparse))
    assert "grid 3x4x4 = 48 tokens + 12 text" in str(cost) and "dense_layers=(0,)" in str(cost)


def test_text_of_joint_layers_is_whole():
    model, _ = build("flux")
    cost = explain(model, {"window": 3}, height=96, width=112, text=5)
    density = window_pairs((6, 7), 3).double().mean().item()
    for site in cost.sites:
        assert site.dense_flops == 4 * 47 * 47 * 32
        assert site.flops == pytest.approx(4 * 32 * (density * 42 * 42 + 2 * 42 * 5 + 5 * 5), abs=200)


def test_size_of_published_models():
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(num_layers=30, num_attention_heads=12, ffn_dim=8960)
    cost = explain(model, "gna_hunyuan_720p", height=480, width=832, frames=81)
    assert cost.grid == (21, 30, 52)
    assert cost.dense_step_flops == pytest.approx(283e12, rel=0.02), "2 FLOPs a weight and token, and the attention"
    assert cost.attention_share == pytest.approx(0.70, abs=0.01)
    assert "x fewer FLOPs over the run" in str(cost)


def test_the_plan_at_work_and_strides_of_a_pipeline():
    model, _ = build("wan")
    pipe = SimpleNamespace(components={"transformer": model}, vae_scale_factor_temporal=2, vae_scale_factor_spatial=4)
    assert explain(pipe, height=32, width=32, frames=5).plan is None
    with accelerate(pipe, {"window": 3}):
        cost = explain(pipe, height=32, width=32, frames=5)
        assert cost.grid == (3, 4, 4) and cost.plan is not None and cost.plan.window == 3
    with pytest.raises(ValueError, match=r"height=4, width=32, frames=5 make \(3, 1, 8\) latents"):
        explain(pipe, height=4, width=32, frames=5)


def test_density_of_masks():
    model, _ = build("wan")
    cost = explain(model, {"mask": two_blocks}, frames=9, height=64, width=64)
    assert cost.sites[0].density is not None and 0 < cost.sites[0].density < 1, "lists as long as they can get"

    def by_data(query, key, grid):
        return two_blocks(query, key, grid, shift=1 + int(query.sum() > 0))

    assert explain(model, {"mask": by_data}, frames=9, height=64, width=64).sites[0].density is None
