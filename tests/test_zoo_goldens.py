"""NAT, DiNAT and relatives against recorded outputs, names and shapes of the official implementations."""

import json
import lzma
from pathlib import Path

import foveal.zoo  # noqa: F401
import numpy as np
import pytest
import timm
import torch
from golden_weights import image_a, image_b, load_synthetic

GOLDENS = Path(__file__).with_name("goldens")
NOISE = json.loads((GOLDENS / "natten_outputs.json").read_text())
KEYS = json.loads(lzma.decompress((GOLDENS / "natten_keys.json.xz").read_bytes()))
RECORDED = {  # recording: our model, stages whose outputs were recorded after the stem
    "dinat_mini": ("natten_dinat_m", (0, 1, 2, 3)),
    "dinat_s_tiny": ("natten_dinats_t", (0, 1, 2, 3)),
    "nat_isotropic_small": ("natten_nat_iso_s", (2, 5, 8, 11)),
}
SIZES = {"mini": "m", "tiny": "t", "small": "s", "base": "b", "large": "l"}
NAMES = {
    "dinat_large_21k": "natten_dinat_l",
    "dinat_large_21k_11x11": "natten_dinat_l_11x11_384",
    "dinat_large_384_11x11": "natten_dinat_l_11x11_384",
    "dinat_s_large_21k": "natten_dinats_l",
}


def our_name(official: str) -> str:
    if official in NAMES:
        return NAMES[official]
    name = official.replace("dinat_s_", "dinats_") if official.removeprefix("dinat_s_") in SIZES else official
    name = name.replace("dinat_s_large_384", "dinats_large_384").replace("_isotropic", "_iso")
    return "natten_" + "_".join(SIZES.get(part, part) for part in name.split("_"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("recording, run", [(r, run) for r in RECORDED for run in NOISE[r]])
def test_outputs_are_the_official_ones(recording, run, dtype):
    name, indices = RECORDED[recording]
    image, scheme = run.split("_")
    shape = tuple(NOISE[recording][run]["input"])
    x = (image_a if image == "a" else image_b)(shape).to(dtype)
    model = load_synthetic(timm.create_model(name).to(dtype), scheme)
    stem = []
    model.patch_embed.register_forward_hook(lambda module, args, out: stem.append(out))
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x, indices=list(indices), output_fmt="NHWC")
        logits = model.forward_head(features)
        pre_logits = model.forward_head(features, pre_logits=True)

    prefix = "" if run == "a_v1" else run + "_"
    recorded = np.load(GOLDENS / f"{recording}.npz")
    noise, stage_noise = (NOISE[recording][run][k] for k in ("fp64_max_abs_diff", "stage_fp64_max_abs_diff"))
    assert np.abs(logits.numpy() - recorded[prefix + "logits"]).max() <= 20 * noise
    if run == "a_v1":
        assert np.abs(pre_logits.numpy() - recorded["pre_logits"]).max() <= 20 * stage_noise
    for i, tap in enumerate([stem[0], *maps]):
        assert list(tap.shape) == recorded[prefix + "stage_shape"][i].tolist()
        assert np.abs(tap.flatten()[:64].numpy() - recorded[prefix + "stage_first64"][i]).max() <= 20 * stage_noise
        moments = [tap.double().mean(), tap.double().std(correction=0)]
        assert np.abs(np.array(moments) - recorded[prefix + "stage_stat"][i]).max() <= 20 * stage_noise


@pytest.mark.parametrize("official", KEYS)
def test_names_and_shapes_are_the_official_ones(official):
    model = timm.create_model(our_name(official), device="meta")
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: shape for key, shape in KEYS[official].items() if not key.endswith("relative_position_index")}
    assert ours == theirs


def test_every_official_variant_is_ours():
    covered = {our_name(official) for official in KEYS}
    assert covered == set(timm.list_models("natten_*")) - {"natten_dinat_pico"}
