"""LITv2 and BiFormer beyond what every model of the zoo is asked: sizes, tags, dense-task variants."""

from pathlib import Path

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from meta_models import create_without_data
from torch import nn
from torch.nn import functional as F

PARAMETERS = {
    "litv2_s.ziplab_in1k": 27_844_000,
    "litv2_m": 48_830_368,
    "litv2_b": 86_520_704,
    "litv2_b.ziplab_in1k_384": 86_520_704,
    "litv2_s.ziplab_alpha00_in1k": 28_089_760,
    "litv2_s.ziplab_alpha02_in1k": 27_844_000,
    "litv2_s.ziplab_alpha04_in1k": 27_696_544,
    "litv2_s.ziplab_alpha05_in1k": 27_647_392,
    "litv2_s.ziplab_alpha07_in1k": 27_696_544,
    "litv2_s.ziplab_alpha09_in1k": 27_844_000,
    "litv2_s.ziplab_alpha10_in1k": 28_089_760,
    "biformer_t": 13_142_760,
    "biformer_s": 25_536_232,
    "biformer_b": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
}
NARROW = {
    "litv2_s": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "biformer_t": {"embed_dim": 16, "depths": (1, 1, 1, 1), "head_dim": 8},
    "biformer_stl_nchw": {"embed_dim": 16, "depths": (1, 1, 1, 1), "head_dim": 8},
}


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(NARROW[name.split(".")[0]] | kwargs)).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_authors_count(name):
    assert sum(p.numel() for p in create_without_data(name).parameters()) == PARAMETERS[name]


def test_tags_bring_their_alpha_and_an_argument_wins():
    def low_heads(name: str, **kwargs) -> int:
        return create_without_data(name, **kwargs).layers[2].blocks[0].attn.low_heads

    assert [low_heads(f"litv2_s.ziplab_alpha{a}_in1k") for a in ("00", "05", "10")] == [0, 6, 12]
    assert [low_heads("litv2_s"), low_heads("litv2_s", alpha=0.5)] == [10, 6]
    assert low_heads("litv2_s.ziplab_alpha00_in1k", alpha=1.0) == 12
    cfg = timm.get_pretrained_cfg("litv2_s.ziplab_alpha05_in1k").to_dict()
    assert low_heads("litv2_s", pretrained_cfg=cfg) == 6


@pytest.mark.parametrize("name, first", [("litv2_s", 1), ("biformer_t", 0)])
@pytest.mark.parametrize("size", [(480, 640), (203, 333)])
def test_dense_task_variants_normalise_their_maps(name, first, size):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    plain, normed = (create(name, features_only=True, stage_norms=norms) for norms in (False, True))
    normed.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        for i, (bare, ours) in enumerate(zip(plain(x), normed(x), strict=True)):
            eps = 1e-5 if name == "litv2_s" else 1e-6
            wanted = F.layer_norm(bare.permute(0, 2, 3, 1), bare.shape[1:2], eps=eps).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours, wanted if i >= first else bare, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, added", [
    ("litv2_s", {f"norm{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")}),
    ("biformer_t", {f"extra_norms.{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")}),
])  # fmt: skip
def test_dense_task_files_load(tmp_path: Path, name: str, added: set[str]):
    source = create(name, stage_norms=True, num_classes=0)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    keys = source.state_dict().keys()
    assert keys - create(name, num_classes=0).state_dict().keys() == added
    assert not any(key.startswith(("norm.", "head.")) for key in keys)
    detector = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {"neck.weight": torch.zeros(1)}
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "detector.pth")}}
    model = create(name, stage_norms=True, features_only=True, **overlay)
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(model(x), source.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NARROW)
def test_official_classification_files_load_and_start_dense_training(tmp_path: Path, name: str):
    source = create(name)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(create(name, **overlay)(x), source(x))
    dense = create(name, stage_norms=True, num_classes=0, **overlay)
    first = next(iter(source.state_dict()))
    assert torch.equal(dense.state_dict()[first], source.state_dict()[first])
    assert torch.equal(dense.get_submodule(dense.stage_norm_name.format(3)).weight, torch.ones(128))


def test_other_layouts_and_mismatched_stages_are_refused():
    with pytest.raises(ValueError, match="layout='swin' must be"):
        create("biformer_t", layout="swin")
    with pytest.raises(ValueError, match=r"topks=\(1, 4\) must be equally long"):
        create("biformer_t", topks=(1, 4))
    with pytest.raises(ValueError, match="head_dim=7 must divide the 16 channels"):
        create("biformer_t", head_dim=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deformable_merging_works_in_half_precision(dtype):
    model = create("litv2_s")
    merging = model.layers[0].downsample
    nn.init.normal_(merging.dconv.conv_offset.weight, std=0.1)
    x = torch.randn(1, 7, 6, 16)
    exact = merging(x)
    assert exact.shape == (1, 3, 3, 32)
    out = merging.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
