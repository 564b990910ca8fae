"""L2ViT beyond what every model of the zoo is asked."""

from pathlib import Path

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from foveal.layers import LinearAttention
from foveal.zoo.backbones.l2vit import PaddedWindowAttention2d
from meta_models import create_without_data
from torch import nn
from torch.nn import functional as F

PARAMETERS = {"l2vit_t": 28_596_781, "l2vit_s": 50_199_157, "l2vit_b": 88_577_188}
NARROW = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
TAG_384 = "l2vit_b.chuanyangzheng_in22k_ft_in1k_384"


def create(name: str = "l2vit_t", **kwargs) -> nn.Module:
    """A narrow version whose every parameter is random."""
    model = timm.create_model(name, **(NARROW | kwargs)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_authors_count(name):
    assert sum(p.numel() for p in create_without_data(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name, heads", [("l2vit_t", [3, 6, 12, 24]), ("l2vit_b", [4, 8, 16, 32])])
def test_heads_and_turns(name, heads):
    """What the shapes of a checkpoint do not fix."""
    model = create_without_data(name)
    for stage, number in zip(model.stages, heads, strict=True):
        assert {block.attn.num_heads for block in stage} == {number}
        assert [type(block.attn) for block in stage] == [PaddedWindowAttention2d, LinearAttention] * (len(stage) // 2)


def test_the_tag_of_384_pixels_brings_its_window_and_an_argument_wins():
    def window(name: str, **kwargs) -> int:
        return create_without_data(name, **kwargs).stages[0][0].attn.window

    assert [window("l2vit_b"), window(TAG_384), window(TAG_384, window=7)] == [7, 12, 7]
    cfg = timm.get_pretrained_cfg(TAG_384).to_dict()
    assert window("l2vit_b", pretrained_cfg=cfg) == 12


@pytest.mark.parametrize("size", [(7, 14), (9, 5), (16, 8)])
def test_padded_tokens_are_keys_of_their_window(size):
    """As the official code has it: zeros after the norm, so a padded key is the bias of the projection."""
    torch.manual_seed(0)
    attn = PaddedWindowAttention2d(8, num_heads=2, window=7, proj_drop=0.0, impl="auto").double()
    nn.init.normal_(attn.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    rows, columns = (-(-n // 7) for n in size)
    padded = F.pad(x, (0, 0, 0, 7 * columns - size[1], 0, 7 * rows - size[0]))
    windows = padded.view(2, rows, 7, columns, 7, 8).transpose(2, 3).reshape(-1, 49, 8)
    q, k, v = attn.qkv(windows).view(-1, 49, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, rows, columns, 7, 7, 8)
    out = attn.proj(out.transpose(2, 3).reshape(2, 7 * rows, 7 * columns, 8)[:, : size[0], : size[1]])
    torch.testing.assert_close(attn(x), out, rtol=1e-12, atol=1e-12)


def test_odd_sizes_are_padded_on_the_way_down():
    """The stem to a multiple of four, the merging, after its norm, to a multiple of two."""
    model = create()
    x = torch.randn(1, 3, 61, 34)
    stem = model.patch_embed(x)
    torch.testing.assert_close(stem, model.patch_embed(F.pad(x, (0, 2, 0, 3))))
    assert stem.shape[1:3] == (16, 9)
    merge = model.downsample_layers[1]
    normed = F.pad(merge.norm(stem), (0, 0, 0, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(merge(stem), merge.proj(normed).permute(0, 2, 3, 1))


def test_dense_task_files_load_and_their_maps_are_normalised(tmp_path: Path):
    source = create(stage_norms=True, num_classes=0)
    keys = source.state_dict().keys()
    added = {f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")}
    assert keys - create(num_classes=0).state_dict().keys() == added and "norm.weight" not in keys
    detector = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {"neck.weight": torch.zeros(1)}
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "detector.pth")}}
    model = timm.create_model("l2vit_t", stage_norms=True, features_only=True, **NARROW, **overlay).eval()
    x = torch.randn(1, 3, 64, 96)
    bare = source.stages[0](source.patch_embed(x))
    for ours, theirs in zip(model(x), source.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(model(x)[0], source.norm0(bare).permute(0, 3, 1, 2))


def test_averaged_weights_of_a_training_file_are_preferred(tmp_path: Path):
    averaged, last = create(), create()
    for parameter in last.parameters():
        parameter.data += 1
    both = {"model": last.state_dict(), "model_ema": averaged.state_dict()}
    torch.save(both, tmp_path / "checkpoint-best-ema.pth")
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "checkpoint-best-ema.pth")}}
    model = timm.create_model("l2vit_t", **NARROW, **overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), averaged(x))


def test_mismatched_stages_are_refused():
    with pytest.raises(ValueError, match=r"num_heads=\(1, 2\) must be equally long"):
        create(num_heads=(1, 2))
