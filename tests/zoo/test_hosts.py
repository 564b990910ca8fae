"""Layouts that take an attention: places, the families on them at other input sizes, official files into them."""

import foveal.zoo.table
import pytest
import timm
import torch
from foveal.layers import FlowAttention2d, WindowAttention2d
from foveal.zoo.conversion import Conversion
from foveal.zoo.hosts import PVT, CSWin, DeiT, Isotropic, PVTv2, Swin
from meta_models import create_without_data
from timm.models import get_model_input_config
from torch import nn

HOSTED = ("agent", "inline", "flatten", "spa")
MODELS = [name for name in foveal.zoo.table.our_models() if name.startswith("test_") and name.split("_")[1] in HOSTED]
SIZE = (96, 64)
TWO_STAGES = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}


def create(name: str, **kwargs) -> torch.nn.Module:
    """A model whose every parameter is random."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def draw(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_another_input_size_is_interpolated_alike_on_the_way_and_for_good(name):
    model, x = create(name), draw(*SIZE)
    out = model(x)
    model.set_input_size(SIZE)
    assert get_model_input_config(model)["input_size"] == (3, *SIZE)
    fixed = create_without_data(name, img_size=SIZE).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in fixed.items()}
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_official_files_of_another_size_load(tmp_path, name):
    source = create(name)
    state = source.state_dict()
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
        state[key.rsplit(".", 2)[0] + ".attn_mask"] = torch.zeros(4, 9, 9)
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": other, "state_dict_ema": state}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    load = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    same = timm.create_model(name, **load).eval()
    assert torch.equal(same(draw(64, 64)), source(draw(64, 64)))
    resized = timm.create_model(name, img_size=SIZE, **load).eval()
    torch.testing.assert_close(resized(draw(*SIZE)), source(draw(*SIZE)), rtol=1e-5, atol=1e-5)


def test_window_tables_follow_the_window(tmp_path):
    source = create("test_agent_swin", window=4)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    model = timm.create_model("test_agent_swin", pretrained=True, pretrained_cfg_overlay=overlay)
    ours, theirs = (m.layers[1].blocks[0].attn.relative_position_bias_table.detach() for m in (model, source))
    grid = torch.nn.functional.interpolate(theirs.T.view(1, 2, 7, 7), size=(5, 5), mode="bicubic")
    torch.testing.assert_close(ours, grid.view(2, 25).T)


@pytest.mark.parametrize("name", MODELS)
def test_dense_prediction_at_640x480(name):
    norms = {} if any(layout in name for layout in ("deit", "pvtv2", "spa")) else {"stage_norms": True}
    model = timm.create_model(name, features_only=True, **norms).eval()
    with torch.no_grad():
        maps = model(draw(480, 640))
    reductions = model.feature_info.reduction()
    assert [tuple(m.shape[2:]) for m in maps] == [(480 // r, 640 // r) for r in reductions]
    assert all(m.isfinite().all() for m in maps)
    if norms:
        means = torch.stack([m.mean(dim=1).abs().max() for m in maps])
        assert (means < 1e-4).all()  # fresh norms leave no mean over channels


@pytest.mark.parametrize("checkpoint, window, split", [
    ("agent_swin_s.leap_in1k", 7, None), ("agent_swin_s.leap_in1k_288", 9, None),
    ("agent_swin_b.leap_in1k_384", 12, None), ("agent_cswin_b.leap_in1k_384", None, 12),
])  # fmt: skip
def test_tags_bring_their_size(checkpoint, window, split):
    model = create_without_data(checkpoint)
    widths = {m.window for m in model.modules() if type(m).__name__ == "WindowAttention2d"}
    splits = {m.split for m in model.modules() if type(m).__name__ == "StripeBranch2d"}
    assert widths == ({window} if window else set()) and splits == ({split, None} if split else set())


@pytest.mark.parametrize("name, arguments", [
    ("agent_swin_t", {"agent_blocks": (1, 1)}), ("agent_pvt_t", {"depths": (1, 1)}),
    ("agent_cswin_t", {"num_agents": (9,)}), ("inline_swin_t", {"inline_blocks": (1,)}),
    ("flatten_pvt_t", {"mlp_ratios": (1, 1)}),
])  # fmt: skip
def test_contradictory_arguments_are_refused(name, arguments):
    with pytest.raises(ValueError, match="must be equally long"):
        timm.create_model(name, device="meta", **arguments)


@pytest.mark.parametrize("blocks", [(2, 2, 7, 0), (-1, 0, 0, 0)])
def test_more_leading_blocks_than_there_are_are_refused(blocks):
    with pytest.raises(ValueError, match=r"inline_blocks=.* must each lie in \[0, depth\]; stage \d has"):
        timm.create_model("inline_swin_t", device="meta", inline_blocks=blocks)


class Mean(nn.Module):
    """An attention to the mean."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x, *rest, **grid):
        axes = tuple(range(1, x.dim() - 1))
        return self.proj(x.mean(axes, keepdim=True).expand_as(x))


def test_a_factory_gets_places_and_leaves_what_it_returns_none_for():
    places = []

    def factory(place):
        places.append(place)
        options = {key: place.options[key] for key in ("device", "dtype")}
        return Mean(place.dim, **options) if place.stage == 0 else None

    model = Swin(attn=factory, img_size=(64, 96), window=4, proj_drop_rate=0.1, **TWO_STAGES).eval()
    assert [place[:8] for place in places] == [
        (0, 0, 8, 1, (16, 24), False, 1, 4), (1, 0, 16, 2, (8, 12), False, 2, 4), (1, 1, 16, 2, (8, 12), True, 2, 4),
    ]  # fmt: skip
    assert dict(places[0].options) == {"proj_drop": 0.1, "impl": "auto", "device": None, "dtype": None}
    assert [type(b.attn) for stage in model.layers for b in stage.blocks] == [Mean, *[WindowAttention2d] * 2]
    assert [b.attn.shift for b in model.layers[1].blocks] == [0, 2]
    assert model(torch.randn(1, 3, 61, 34)).shape == (1, 3)


@pytest.mark.parametrize("host", [
    lambda attn: Swin(attn=attn, **TWO_STAGES), lambda attn: Isotropic(attn=attn, embed_dim=8, depth=2, num_heads=1),
    lambda attn: DeiT(attn=attn, embed_dim=8, depth=2, num_heads=1),
    lambda attn: PVT(attn=attn, embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1), mlp_ratios=(1, 1)),
    lambda attn: PVTv2(attn=attn, embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1), mlp_ratios=(1, 1)),
])  # fmt: skip
def test_any_module_on_maps_will_do(host):
    model = host(lambda place, size=1: Mean(place.dim)).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, model.num_classes)
    assert any(isinstance(module, Mean) for module in model.modules())


def test_what_nobody_takes_is_refused():
    with pytest.raises(TypeError, match=r"unexpected arguments \['widow'\]"):
        Swin(widow=7, device="meta")
    with pytest.raises(TypeError, match="widow"):
        Swin(attn=lambda place: None, widow=7, device="meta")
    with pytest.raises(ValueError, match="attn made nothing for block 0 of stage 0"):
        PVT(attn=lambda place: None, device="meta")
    with pytest.raises(ValueError, match="stage_norms=True must be False"):
        PVTv2(attn=lambda place: None, stage_norms=True, device="meta")


@pytest.mark.parametrize("ours, theirs, arguments", [
    (Swin, "swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
    (DeiT, "deit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}),
])  # fmt: skip
def test_without_a_factory_a_host_is_the_model_it_is_named_after(ours, theirs, arguments):
    torch.manual_seed(0)
    theirs = timm.create_model(theirs, **arguments).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = ours(**arguments).eval()
    # timm's Swin holds the way down at the beginning of the next stage, and its head in a module
    state = {key.replace("layers.1.down", "layers.0.down").replace("head.fc", "head"): value
             for key, value in theirs.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)
    x = draw(224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_cswin_without_a_factory_attends_in_stripes():
    model = CSWin(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), img_size=224, device="meta")
    widths = [[branch.split for branch in stage[0].attns] for stage in model._stages]
    assert widths == [[1, 1], [2, 2], [7, 7], [None]]
    upright = [branch.vertical for branch in model.get_submodule("stage1")[0].attns]
    assert upright == [True, False]


def test_isotropic_blocks_know_where_patches_are_by_an_embedding():
    patches = draw(64, 64).unflatten(2, (4, 16)).unflatten(4, (4, 16)).permute(0, 2, 4, 1, 3, 5)  # [1, 4, 4, 3, 16, 16]
    mixed = patches.flatten(1, 2).flip(1).view_as(patches)
    images = [p.permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 64, 64) for p in (patches, mixed)]
    for positions in (False, True):
        torch.manual_seed(0)
        model = Isotropic(attn=lambda place: Mean(place.dim), embed_dim=8, depth=2, num_heads=1, img_size=64,
                          positions=positions).eval()  # fmt: skip
        assert model.position_grids == ({"pos_embed": (4, 4)} if positions else {})
        assert model.no_weight_decay() == ({"pos_embed"} if positions else set())
        one, other = (model(image) for image in images)
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6) != positions  # without: a bag of patches


@pytest.mark.parametrize("host", [DeiT, Isotropic])
def test_narrow_blocks_may_start_wider(host):
    def widths(**options):
        torch.manual_seed(0)
        model = host(embed_dim=64, depth=1, num_heads=1, mlp_ratio=2.0, img_size=64, **options)
        *_, fc1, head = (m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape != (64, 128))
        return fc1.weight.std().item(), head.weight.std().item()

    assert widths() == pytest.approx((0.02, 0.02), rel=0.1)
    assert widths(weight_init="jax") == pytest.approx(((2 / (64 + 128)) ** 0.5, 0), rel=0.1)
    with pytest.raises(ValueError, match=r"weight_init='wide' must be '' or 'jax'"):
        host(weight_init="wide", device="meta")


def test_conversions_report_what_does_not_fit():
    model = create_without_data("test_flatten_swin")
    state = dict(model.state_dict())
    table = "layers.1.blocks.1.attn.relative_position_bias_table"
    old = {
        key.replace("norm1", "first"): torch.zeros(value.shape) for key, value in state.items() if key != "head.bias"
    }
    old |= {table.replace("bias_table", "index"): torch.zeros(9, 9), "decoder.weight": torch.zeros(1)}
    conversion = Conversion(rename=((r"\.first\.", ".norm1."),), drop=(r"relative_position_index$",))
    assert conversion.report({"model": old}, model) == (["head.bias"], ["decoder.weight"])


def test_conversions_join_and_split():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(2, 6)}), "mix": nn.Linear(2, 2)})
    parts = {f"attn.{name}.{leaf}": value for name in ("q", "k", "v")
             for leaf, value in nn.Linear(2, 2).state_dict().items()}  # fmt: skip
    file = {**parts, "mix.both": torch.arange(4.0).view(2, 2)}
    out = Conversion(join={"qkv": ("q", "k", "v")}, split={"both": ("one", "two")})(file, model)
    assert out.keys() == {"attn.qkv.weight", "attn.qkv.bias", "mix.one", "mix.two"}
    assert torch.equal(out["attn.qkv.weight"], torch.cat([parts[f"attn.{name}.weight"] for name in "qkv"]))
    assert out["mix.two"].tolist() == [2, 3]


def test_positions_of_no_square_map_are_refused(tmp_path):
    state = timm.create_model("test_inline_deit").state_dict()
    torch.save(state | {"pos_embed": torch.zeros(1, 1 + 15, 32)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="pos_embed of this file has 15 positions; expected those of a 3x3 map"):
        timm.create_model("test_inline_deit", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")})


def test_flow_attention_takes_the_places_it_is_told():
    for host, kept in (("deit", 0), ("pvt", 0), ("swin", 1), ("cswin", 2)):
        model = create_without_data(f"test_flow_{host}")
        flow = [m for m in model.modules() if isinstance(m, FlowAttention2d)]
        blocks = [m for m in model.modules() if hasattr(m, "mlp")]
        assert len(flow) == len(blocks) - kept > 0
    with pytest.raises(ValueError, match=r"flow_blocks=\(3, 0\) must each lie in \[0, depth\]"):
        create_without_data("test_flow_swin", flow_blocks=(3, 0))
