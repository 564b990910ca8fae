"""The families of the zoo against recorded outputs, names and shapes of the official implementations."""

import json
import lzma
import re
import sys
from pathlib import Path

import foveal.zoo
import numpy as np
import pytest
import timm
import torch
from foveal.zoo.conversion import OFFICIAL_NAMES, Conversion
from golden_weights import image_a, image_b, load_synthetic, official_weights
from meta_models import create_without_data

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = sorted(path.name.removesuffix("_keys.json.xz") for path in GOLDENS.glob("*_keys.json.xz"))
WHOLE = ("natten", "litv2", "biformer", "agent")  # of which every size was recorded, by its official name
NOISE, KEYS = {}, {}
for family in FAMILIES:
    NOISE |= json.loads((GOLDENS / f"{family}_outputs.json").read_text())
    KEYS |= json.loads(lzma.decompress((GOLDENS / f"{family}_keys.json.xz").read_bytes()))
RECORDED = {  # recording: our model, stages whose outputs were recorded after the stem
    "dinat_mini": ("natten_dinat_m", (0, 1, 2, 3)),
    "dinat_s_tiny": ("natten_dinats_t", (0, 1, 2, 3)),
    "nat_isotropic_small": ("natten_nat_iso_s", (2, 5, 8, 11)),
    "litv2_s": ("litv2_s", (0, 1, 2, 3)),
    "biformer_tiny": ("biformer_t", (0, 1, 2, 3)),
    "biformer_stl_nchw": ("biformer_stl_nchw", (0, 1, 2, 3)),
    "agent_deit_tiny": ("agent_deit_t", (2, 5, 8, 11)),
    "agent_pvt_tiny": ("agent_pvt_t", (0, 1, 2, 3)),
    "agent_swin_tiny": ("agent_swin_t", (0, 1, 2, 3)),
    "agent_cswin_tiny": ("agent_cswin_t", (0, 1, 2, 3)),
}
LOGITS = [  # recordings of logits only, by our names; see golden_weights.record
    pytest.param(name, dtype, id=f"{name}-{dtype}",
                 marks=[pytest.mark.slow] if runs["a_hot"]["slow"] or (dtype is torch.float64) is not hard else [])
    for name, runs in NOISE.items()
    if "a_hot" in runs
    for hard in [runs["a_hot"].get("hard", False)]
    for dtype in (torch.float32, torch.float64)
    if dtype is torch.float64 or not hard
]  # fmt: skip
HARD = ("biformer_tiny", "biformer_stl_nchw")  # choose regions: rounding flips close choices, so float64 only


def slow(recording: str, run: str, dtype: str) -> bool:
    """What runs on request only: weak weights; a second dtype, and another image of what has float64 alone."""
    return run.endswith("v1") or (run.startswith("b_") if recording in HARD else dtype == "fp64")


RUNS = [
    pytest.param(recording, run, dtype, id=f"{recording}-{run}-{name}",
                 marks=[pytest.mark.slow] if slow(recording, run, name) else [])
    for recording in RECORDED
    for run in NOISE[recording]
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64))
    if name == "fp64" or recording not in HARD
]  # fmt: skip
SIZES = {"mini": "m", "tiny": "t", "small": "s", "medium": "m", "base": "b", "large": "l"}
NAMES = {
    "dinat_large_21k": "natten_dinat_l",
    "dinat_large_21k_11x11": "natten_dinat_l_11x11_384",
    "dinat_large_384_11x11": "natten_dinat_l_11x11_384",
    "dinat_s_large_21k": "natten_dinats_l",
    "litv2_b_384": "litv2_b.ziplab_in1k_384",
}


def our_name(official: str) -> str:
    if official in NAMES:
        return NAMES[official]
    if official.startswith("litv2"):
        return re.sub(r"_alpha(\d)\.(\d)", r".ziplab_alpha\1\2_in1k", official)
    if official.startswith("biformer"):
        return "_".join(SIZES.get(part, part) for part in official.split("_"))
    if timm.is_model(official) and not official.startswith("biformer"):
        return official
    if official.startswith("agent"):
        family, backbone, size, *pixels = official.split("_")
        return "_".join([family, backbone, f"{SIZES[size]}.leap_in1k", *pixels])
    name = official.replace("dinat_s_", "dinats_") if official.removeprefix("dinat_s_") in SIZES else official
    name = name.replace("dinat_s_large_384", "dinats_large_384").replace("_isotropic", "_iso")
    return "natten_" + "_".join(SIZES.get(part, part) for part in name.split("_"))


@pytest.mark.parametrize("recording, run, dtype", RUNS)
def test_outputs_are_the_official_ones(recording, run, dtype):
    name, indices = RECORDED[recording]
    image, scheme = run.split("_")
    shape = tuple(NOISE[recording][run]["input"])
    x = (image_a if image == "a" else image_b)(shape).to(dtype)
    model = load_synthetic(timm.create_model(name).to(dtype), scheme)
    stem = []
    first = model.get_submodule(model.pretrained_cfg["first_conv"].split(".")[0])
    first = model.patch_embed if isinstance(first, torch.nn.ModuleList) else first  # a list itself is never called
    first.register_forward_hook(lambda module, args, out: stem.append(out))
    tokens = {"output_fmt": "NLC", "return_prefix_tokens": True}  # class tokens are part of what was recorded
    layout = tokens if model.output_fmt == "NLC" else {"output_fmt": "NHWC"}
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x, indices=list(indices), **layout)
        logits = model.forward_head(features)
        pre_logits = model.forward_head(features, pre_logits=True)

    prefix = "" if run == "a_v1" else run + "_"
    recorded = np.load(GOLDENS / f"{recording}.npz")
    noise, stage_noise = (NOISE[recording][run][k] for k in ("fp64_max_abs_diff", "stage_fp64_max_abs_diff"))
    assert np.abs(logits.numpy() - recorded[prefix + "logits"]).max() <= 20 * noise
    if run == "a_v1":
        assert np.abs(pre_logits.numpy() - recorded["pre_logits"]).max() <= 20 * stage_noise
    maps = [torch.cat(tap[::-1], dim=1) if isinstance(tap, tuple) else tap for tap in maps]
    for i, tap in enumerate([stem[0], *maps]):
        shape = [n for n in recorded[prefix + "stage_shape"][i].tolist() if n]  # [B, H, W, C], or [B, H * W, C]
        assert list((tap if len(shape) == tap.dim() else tap.flatten(1, 2)).shape) == shape
        assert np.abs(tap.flatten()[:64].numpy() - recorded[prefix + "stage_first64"][i]).max() <= 20 * stage_noise
        moments = [tap.double().mean(), tap.double().std(correction=0)]
        assert np.abs(np.array(moments) - recorded[prefix + "stage_stat"][i]).max() <= 20 * stage_noise


@pytest.mark.parametrize("name, dtype", LOGITS)
def test_logits_are_the_official_ones(name, dtype):
    """Of a file with official names, which is converted."""
    recorded, noise = np.load(GOLDENS / f"{name}.npz")["logits"], NOISE[name]["a_hot"]
    model = timm.create_model(name).to(dtype).eval()
    model.load_state_dict(conversion_of(name)(official_weights(KEYS[name], "hot", dtype), model))
    with torch.inference_mode():
        logits = model(image_a(tuple(noise["input"]))[:1].to(dtype))
    assert np.abs(logits.numpy() - recorded[:1]).max() <= 20 * noise["fp64_max_abs_diff"]


def conversion_of(model: str) -> Conversion:
    family = sys.modules[timm.models.model_entrypoint(model.split(".")[0]).__module__]
    return getattr(family, "CONVERSION", OFFICIAL_NAMES)


@pytest.mark.parametrize("official", KEYS)
def test_official_names_and_shapes_are_converted_to_ours(official):
    model = create_without_data(our_name(official))
    file = {key: torch.empty(shape, device="meta") for key, shape in KEYS[official].items()}
    out = conversion_of(our_name(official))(file, model)
    assert {key: x.shape for key, x in out.items()} == {key: x.shape for key, x in model.state_dict().items()}


@pytest.mark.slow
def test_every_published_variant_has_the_parameters_of_the_official_code():
    """Of whole families, most of whose sizes have the layout of a recorded one: "model@pixels" and their number."""
    for entry, expected in json.loads((GOLDENS / "official_params.json").read_text()).items():
        name, _, pixels = entry.partition("@")
        native = timm.get_pretrained_cfg(name).input_size[-1]  # pyright: ignore
        any_size = int(pixels) == native or name.startswith("l2vit")
        model = create_without_data(name, **({} if any_size else {"img_size": int(pixels)}))
        unused = 2 * 512 if name.startswith("flatten_pvt_") else 0  # a norm that PVT's files hold and no one calls
        assert sum(x.numel() for x in model.parameters()) == expected - unused, entry


def test_every_official_variant_is_ours():
    covered = {our_name(official).split(".")[0] for official in KEYS}
    ours = set(timm.list_models([f"{family}_*" for family in WHOLE]))
    assert covered >= {name for name in ours if not name.endswith("_pico")}
    assert {name.split("_")[0] for name in covered} == set(FAMILIES) <= set(foveal.zoo.backbones.FAMILIES)
