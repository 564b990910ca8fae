"""timm's own models after `use_kernels`: same parameters, same outputs, same gradients."""

import copy
import logging

import pytest
import timm
import torch
from foveal.zoo import use_kernels
from timm.layers.halo_attn import HaloAttn
from torch import nn

SWIN = dict(embed_dim=16, depths=(2, 2), num_heads=(2, 4), patch_size=4, num_classes=5)
MODELS = {
    "swin": ("swin_tiny_patch4_window7_224", dict(SWIN, img_size=56, window_size=7), (56, 56)),
    "swin, ragged": ("swin_tiny_patch4_window7_224", dict(SWIN, img_size=(44, 60), window_size=4), (44, 60)),
    "swin, any size": (
        "swin_tiny_patch4_window7_224",
        dict(SWIN, img_size=64, window_size=4, strict_img_size=False),
        (44, 72),
    ),
    "swin, always partition": (
        "swin_tiny_patch4_window7_224",
        dict(SWIN, img_size=36, window_size=7, always_partition=True),
        (36, 36),
    ),
    "swinv2": ("swinv2_tiny_window8_256", dict(SWIN, img_size=64, window_size=4), (64, 64)),
    "swinv2, ragged": ("swinv2_tiny_window8_256", dict(SWIN, img_size=(44, 60), window_size=(3, 4)), (44, 60)),
    "davit": ("davit_tiny", dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(2, 2), num_classes=5), (56, 56)),
    "davit, ragged": ("davit_tiny", dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(2, 2), num_classes=5), (45, 70)),
}


def pair(name: str, training: bool) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model, arguments, size = MODELS[name]
    torch.manual_seed(0)
    theirs = timm.create_model(model, **arguments).train(training)
    for parameter in theirs.parameters():  # what starts at zero would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return theirs, use_kernels(copy.deepcopy(theirs)), torch.randn(2, 3, *size)


def assert_same(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(2)  # of drop path
    expected = theirs(inputs[0])
    torch.manual_seed(2)
    got = ours(inputs[1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(cotangent)
    got.backward(cotangent)
    pairs = {"input": (inputs[1].grad, inputs[0].grad)}
    pairs |= {n: (p.grad, q.grad) for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True)}
    for name, (a, b) in pairs.items():
        largest = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(largest, 1.0), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, training):
    theirs, ours, x = pair(name, training)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert_same(theirs, ours, x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("block", "halo"), [(4, 1), (2, 3), (8, 3)])
def test_halo_attention(block, halo, scaled, stride):
    torch.manual_seed(0)
    options = dict(num_heads=2, block_size=block, halo_size=halo, scale_pos_embed=scaled, dim_head=5, qkv_bias=True)
    theirs = HaloAttn(12, dim_out=16, stride=stride, avg_down=True, **options)
    x = torch.randn(2, 12, 16, 24)
    assert_same(theirs, use_kernels(copy.deepcopy(theirs)), x)


def test_halonet(caplog):
    torch.manual_seed(0)
    theirs = timm.create_model("halonet26t", num_classes=4).eval()
    with caplog.at_level(logging.INFO, "foveal.zoo.adapters"):
        ours = use_kernels(copy.deepcopy(theirs))
    swapped = sum(type(m).__name__ == "_HaloAttention" for m in ours.modules())
    assert f"{swapped} modules" in caplog.text and swapped > 0
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "swinv2, ragged")]


@pytest.mark.parametrize("name", ["davit, ragged", *SLOW])
def test_compiles_whole(name):
    torch._dynamo.reset()
    theirs, ours, x = pair(name, False)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_autocast():
    for name in ("swin", "swinv2", "davit"):
        theirs, ours, x = pair(name, False)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(ours(x).float(), theirs(x).float(), rtol=0.1, atol=0.1)


def test_nothing_to_swap():
    with pytest.raises(ValueError, match="Linear has no module to swap"):
        use_kernels(nn.Linear(2, 2))


def test_swapped_twice(caplog):
    ours = pair("swin", False)[1]
    with caplog.at_level("INFO"):
        assert use_kernels(ours) is ours
    assert "0 modules now attend" in caplog.text


def test_attention_dropout_is_refused():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, img_size=56, window_size=7, attn_drop_rate=0.1)
    with pytest.raises(ValueError, match=r"attn_drop=0\.1"):
        use_kernels(model)
