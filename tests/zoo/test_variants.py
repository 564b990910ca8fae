"""What the shapes of a checkpoint do not fix, for every variant: heads, windows, listed regions, stripes."""

import foveal.zoo  # noqa: F401  registers the models
import pytest
from meta_models import create_without_data

SWIN, LARGE_SWIN = [3, 6, 12, 24], [4, 8, 16, 32]
PARAMETERS = {  # of the official code
    "inline_deit_t": 6_477_736,
    "inline_deit_s.leap_in1k": 16_734_760,
    "inline_deit_b.leap_in1k": 23_797_096,
    "inline_pvt_t": 12_032_232,
    "inline_pvt_s": 21_556_136,
    "inline_pvt_m": 37_618_856,
    "inline_pvt_b": 51_154_280,
    "inline_swin_t": 29_223_544,
    "inline_swin_s": 49_793_296,
    "inline_swin_b": 88_350_120,
    "inline_cswin_t": 20_604_520,
    "inline_cswin_s": 33_032_872,
    "inline_cswin_b": 73_413_640,
    "flatten_pvt_t": 12_150_504 - 1024,  # without a norm that has no use
    "flatten_pvt_s": 21_670_248 - 1024,
    "flatten_pvt_m": 37_242_216 - 1024,
    "flatten_pvt_b": 50_649_192 - 1024,
    "flatten_pvtv2_b0": 3_594_824,
    "flatten_pvtv2_b1": 12_931_240,
    "flatten_pvtv2_b2": 22_548_264,
    "flatten_pvtv2_b3": 38_273_832,
    "flatten_pvtv2_b4": 51_836_968,
    "flatten_swin_t": 29_192_384,
    "flatten_swin_s": 50_510_288,
    "flatten_swin_b": 88_972_488,
    "flatten_swin_b.leap_in1k_384": 91_433_928,
    "flatten_cswin_t": 21_201_768,
    "flatten_cswin_s": 35_451_752,
    "flatten_cswin_b": 74_867_032,
    "binary_deit_b.edwardchasel_in1k_384": 87_178_024,
    "illama_b.techmonsterwang_in22k_ft_in1k_384": 86_794_216,
    "illama_l.techmonsterwang_in22k_ft_in1k_384": 310_834_152,
}
HEADS = {
    **{f"agent_cswin_{x}": [2, 4, 8, 16] for x in "ts"},
    "agent_cswin_b": LARGE_SWIN,
    **{f"agent_swin_{x}": SWIN for x in "ts"},
    "agent_swin_b": LARGE_SWIN,
    **{f"agent_pvt_{x}": [1, 2, 5, 8] for x in "tsml"},
    **{f"biformer_{x}": [2, 4, 8] for x in "ts"},  # the last stage has 8, too
    "biformer_b": [3, 6, 12, 8],
    **{f"{family}_swin_{x}": SWIN for family in ("inline", "flatten") for x in "ts"},
    **{f"{family}_swin_b": LARGE_SWIN for family in ("inline", "flatten")},
    **{f"inline_pvt_{x}": [2, 4, 10, 16] for x in "tsmb"},
    **{f"flatten_pvt_{x}": [1, 2, 5, 8] for x in "tsmb"},
    **{f"biformer_{x}": [3, 6, 12, 8] for x in ("stl", "stl_nchw")},
    "flowformer_cv": [12],
    **{f"moh_vit_s_{x}": [3, 6, 12, 24] for x in (80, 75)},
    **{f"moh_vit_b_{x}": LARGE_SWIN for x in (75, 50)},
    **{f"illama_{x}": [n] for x, n in zip("tsbl", (3, 6, 12, 16), strict=True)},
    **{f"binary_deit_{x}": [n] for x, n in zip("tsb", (3, 6, 12), strict=True)},
    **{f"spach_{x}_attn": [n] for x, n in zip(("xxs", "xs", "s"), (6, 12, 16), strict=True)},
    **{f"spach_ms_{x}_attn": [n] for x, n in zip(("xxs", "xs", "s"), (1, 2, 3), strict=True)},
    **{f"spach_ms_{x}_hybrid": [n] for x, n in zip(("xs", "s"), (3, 4), strict=True)},
    **{f"partialnet_{x}": [4] for x in ("t0", "t1", "t2", "s", "m", "l")},
}


def per_stage(model, name: str) -> list:
    """Values of an attribute of the attentions, without repeats."""
    found = [getattr(m, name) for m in model.modules() if hasattr(m, name) and type(m).__name__ != "Attention"]
    return [x for i, x in enumerate(found) if i == 0 or x != found[i - 1]]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert sum(p.numel() for p in create_without_data(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    assert per_stage(create_without_data(name), "num_heads") == HEADS[name]


@pytest.mark.parametrize("name", [x for x in HEADS if "biformer" in x])
def test_regions(name):
    model = create_without_data(name)
    assert per_stage(model, "topk") == [1, 4, 16] and per_stage(model, "regions") == [7]


@pytest.mark.parametrize(("name", "low", "high"), [("litv2_s", 10, 2), ("litv2_m", 10, 2), ("litv2_b", 14, 2)])
def test_hilo(name, low, high):
    model = create_without_data(name)
    assert per_stage(model, "low_heads") == [low, model.layers[3].blocks[0].attn.low_heads]
    assert per_stage(model, "high_heads") == [high, 0] and per_stage(model, "window") == [2, 1]
    assert per_stage(create_without_data("litv2_s", alpha=0.7), "low_heads")[0] == 8  # 12 * 0.7, cut


@pytest.mark.parametrize(("size", "window"), [(224, 7), (288, 9), (384, 12)])
@pytest.mark.parametrize("name", ["agent_swin_t", "agent_swin_s", "agent_swin_b", "inline_swin_t", "flatten_swin_t"])
def test_windows(name, size, window):
    model = create_without_data(name, img_size=size)
    assert set(per_stage(model, "window")) == {window} and set(per_stage(model, "shift")) == {0, window // 2}


@pytest.mark.parametrize(("size", "split"), [(224, 7), (384, 12)])
@pytest.mark.parametrize("name", ["agent_cswin_t", "agent_cswin_s", "agent_cswin_b", "inline_cswin_t"])
def test_stripes(name, size, split):
    """The last stage has one window, the map."""
    assert per_stage(create_without_data(name, img_size=size), "split") == [
        split,
        None,
    ]  # the last stage: the map


@pytest.mark.parametrize(("name", "blocks"), [("agent_deit_t", 12), ("agent_deit_s", 12), ("agent_deit_b", 4)])
def test_agent_blocks(name, blocks):
    model = create_without_data(name)
    assert [type(b.attn).__name__ for b in model.blocks].count("AgentAttention2d") == blocks


@pytest.mark.parametrize(
    ("name", "shared", "routed"),
    [
        ("moh_vit_s_80", [3, 6, 3, 8], [0, 6, 12]),
        ("moh_vit_s_75", [3, 6, 3, 4], [0, 6, 12]),
        ("moh_vit_b_75", [4, 8, 4, 5], [0, 8, 16]),
        ("moh_vit_b_50", [2, 4], [2, 4, 6, 8]),
    ],
)
def test_mixtures_of_heads(name, shared, routed):
    model = create_without_data(name)
    assert per_stage(model, "shared") == shared and per_stage(model, "routed") == routed
    assert per_stage(model, "pool")[:3] == [8, 4, 2]


@pytest.mark.parametrize("name", ["shiftvit_light_t", "shiftvit_r2_s", "shiftvit_r4_b"])
def test_shifted_channels(name):
    divisions = 16 if name.endswith("_b") else 12
    assert per_stage(create_without_data(name), "divisions") == [divisions]


@pytest.mark.parametrize("name", ["triplet_resnet18", "triplet_resnet50", "triplet_mobilenetv2"])
def test_gates_of_another_tag_have_smaller_kernels(name):
    def side(model: str) -> int:
        gates = [m for m in create_without_data(model).modules() if type(m).__name__ == "PlaneGate"]
        return gates[0].spatial.conv.kernel_size[0]

    assert [side(name), side(f"{name}.landskape_k3_in1k")] == [7, 3]
