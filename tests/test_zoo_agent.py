"""Agent models at other input sizes, and official files into them."""

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from timm.models import get_model_input_config

NARROW = {
    "agent_deit_b": {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_agents": 9, "agent_blocks": 1},
    "agent_pvt_t": {
        "embed_dims": (8, 8, 16, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "mlp_ratios": (2, 2, 2, 2),
    },
    "agent_swin_t": {
        "embed_dim": 8,
        "depths": (1, 2, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "agent_blocks": (1, 1, 1, 0),
        "window": 3,
    },
    "agent_cswin_t": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
}
SIZE = (96, 64)


def create(name: str, **kwargs) -> torch.nn.Module:
    """A model whose every parameter is random."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(NARROW[name] | {"img_size": 64} | kwargs)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def draw(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NARROW)
def test_another_input_size_is_interpolated_alike_on_the_way_and_for_good(name):
    model, x = create(name), draw(*SIZE)
    out = model(x)
    model.set_input_size(SIZE)
    assert get_model_input_config(model)["input_size"] == (3, *SIZE)
    fixed = timm.create_model(name, **NARROW[name], img_size=SIZE, device="meta").state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in fixed.items()}
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NARROW)
def test_official_files_of_another_size_load(tmp_path, name):
    source = create(name)
    state = source.state_dict()
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
        state[key.rsplit(".", 2)[0] + ".attn_mask"] = torch.zeros(4, 9, 9)
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": other, "state_dict_ema": state}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    load = {"pretrained": True, "pretrained_cfg_overlay": overlay, **NARROW[name]}
    same = timm.create_model(name, img_size=64, **load).eval()
    assert torch.equal(same(draw(64, 64)), source(draw(64, 64)))
    resized = timm.create_model(name, img_size=SIZE, **load).eval()
    torch.testing.assert_close(resized(draw(*SIZE)), source(draw(*SIZE)), rtol=1e-5, atol=1e-5)


def test_window_tables_follow_the_window(tmp_path):
    source = create("agent_swin_t", window=4)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    model = timm.create_model(
        "agent_swin_t", pretrained=True, pretrained_cfg_overlay=overlay, img_size=64, **NARROW["agent_swin_t"]
    )
    ours, theirs = (m.layers[3].blocks[0].attn.relative_position_bias_table.detach() for m in (model, source))
    grid = torch.nn.functional.interpolate(theirs.T.view(1, 2, 7, 7), size=(5, 5), mode="bicubic")
    torch.testing.assert_close(ours, grid.view(2, 25).T)


@pytest.mark.parametrize("name", NARROW)
def test_dense_prediction_at_640x480(name):
    norms = {} if "deit" in name else {"stage_norms": True}
    model = timm.create_model(name, features_only=True, **norms, **NARROW[name]).eval()
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
    model = timm.create_model(checkpoint, device="meta")
    widths = {m.window for m in model.modules() if type(m).__name__ == "WindowAttention2d"}
    splits = {m.split for m in model.modules() if type(m).__name__ == "StripeBranch2d"}
    assert widths == ({window} if window else set()) and splits == ({split, None} if split else set())


@pytest.mark.parametrize("name, arguments", [
    ("agent_swin_t", {"agent_blocks": (1, 1)}), ("agent_pvt_t", {"depths": (1, 1)}),
    ("agent_cswin_t", {"num_agents": (9,)}),
])  # fmt: skip
def test_contradictory_arguments_are_refused(name, arguments):
    with pytest.raises(ValueError, match="must be equally long"):
        timm.create_model(name, device="meta", **arguments)
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)
