"""What the shapes of a checkpoint do not fix, for every variant: heads, windows, listed regions, stripes."""

import foveal.zoo  # noqa: F401  registers the models
import pytest
import timm

SWIN, LARGE_SWIN = [3, 6, 12, 24], [4, 8, 16, 32]
HEADS = {
    **{f"agent_cswin_{x}": [2, 4, 8, 16] for x in "ts"},
    "agent_cswin_b": LARGE_SWIN,
    **{f"agent_swin_{x}": SWIN for x in "ts"},
    "agent_swin_b": LARGE_SWIN,
    **{f"agent_pvt_{x}": [1, 2, 5, 8] for x in "tsml"},
    **{f"biformer_{x}": [2, 4, 8] for x in "ts"},  # the last stage has 8, too
    "biformer_b": [3, 6, 12, 8],
    **{f"biformer_{x}": [3, 6, 12, 8] for x in ("stl", "stl_nchw")},
}


def per_stage(model, name: str) -> list:
    """Values of an attribute of the attentions, without repeats."""
    found = [getattr(m, name) for m in model.modules() if hasattr(m, name) and type(m).__name__ != "Attention"]
    return [x for i, x in enumerate(found) if i == 0 or x != found[i - 1]]


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    assert per_stage(timm.create_model(name, device="meta"), "num_heads") == HEADS[name]


@pytest.mark.parametrize("name", [x for x in HEADS if "biformer" in x])
def test_regions(name):
    model = timm.create_model(name, device="meta")
    assert per_stage(model, "topk") == [1, 4, 16] and per_stage(model, "regions") == [7]


@pytest.mark.parametrize(("name", "low", "high"), [("litv2_s", 10, 2), ("litv2_m", 10, 2), ("litv2_b", 14, 2)])
def test_hilo(name, low, high):
    model = timm.create_model(name, device="meta")
    assert per_stage(model, "low_heads") == [low, model.layers[3].blocks[0].attn.low_heads]
    assert per_stage(model, "high_heads") == [high, 0] and per_stage(model, "window") == [2, 1]
    assert per_stage(timm.create_model("litv2_s", alpha=0.7, device="meta"), "low_heads")[0] == 8  # 12 * 0.7, cut


@pytest.mark.parametrize(("size", "window"), [(224, 7), (288, 9), (384, 12)])
@pytest.mark.parametrize("name", ["agent_swin_t", "agent_swin_s", "agent_swin_b"])
def test_windows(name, size, window):
    model = timm.create_model(name, img_size=size, device="meta")
    assert set(per_stage(model, "window")) == {window} and set(per_stage(model, "shift")) == {0, window // 2}


@pytest.mark.parametrize(("size", "split"), [(224, 7), (384, 12)])
@pytest.mark.parametrize("name", ["agent_cswin_t", "agent_cswin_s", "agent_cswin_b"])
def test_stripes(name, size, split):
    """The last stage has one window, the map."""
    assert per_stage(timm.create_model(name, img_size=size, device="meta"), "split") == [
        split,
        None,
    ]  # the last stage: the map


@pytest.mark.parametrize(("name", "blocks"), [("agent_deit_t", 12), ("agent_deit_s", 12), ("agent_deit_b", 4)])
def test_agent_blocks(name, blocks):
    model = timm.create_model(name, device="meta")
    assert [type(b.attn).__name__ for b in model.blocks].count("AgentAttention2d") == blocks
