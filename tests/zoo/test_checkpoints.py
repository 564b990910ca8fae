"""Published files of the NAT family, in every format they exist in, load into our models through timm."""

import argparse
from pathlib import Path

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from foveal.weights import WeightsError, load_manifest
from foveal.zoo.data.digits import split_digits
from foveal.zoo.table import our_models
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.models import get_arch_pretrained_cfgs, save_for_hf

NARROW = {"embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window": 3}
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "dinat": "natten_dinat_b",
    "dinats": "natten_dinats_t",
    "iso": "natten_dinat_iso_s",
    "rpb": "natten_vitrpb_s",
}


def create(name: str, **kwargs) -> torch.nn.Module:
    narrow = {"embed_dim": 32, "depth": 2, "num_heads": 2, "window": 3} if "iso" in name or "rpb" in name else NARROW
    return timm.create_model(name, **(narrow | kwargs)).eval()


def official(name: str, **kwargs) -> torch.nn.Module:
    """A model whose every parameter is random; its names are the official ones."""
    torch.manual_seed(1)
    model = create(name, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def load(name: str, file: Path, **kwargs) -> torch.nn.Module:
    return create(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


def to_transformers(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Names and layout of `transformers`' NatForImageClassification and DinatForImageClassification."""
    out = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        match parts:
            case ["patch_embed", "proj", i, leaf]:
                out[f"{prefix}.embeddings.patch_embeddings.projection.{i}.{leaf}"] = value
            case ["patch_embed", "norm", leaf]:
                out[f"{prefix}.embeddings.norm.{leaf}"] = value
            case ["levels", s, "downsample", *rest]:
                out[".".join([prefix, "encoder.levels", s, "downsample", *rest])] = value
            case ["levels", s, "blocks", b, *rest]:
                block = f"{prefix}.encoder.levels.{s}.layers.{b}"
                match rest:
                    case ["gamma1"]:
                        both = torch.stack([value, state_dict[key.replace("gamma1", "gamma2")]])
                        out[f"{block}.layer_scale_parameters"] = both
                    case ["gamma2"]:
                        pass
                    case ["attn", "rpb"]:
                        out[f"{block}.attention.self.rpb"] = value
                    case ["attn", "qkv", leaf]:
                        for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                            out[f"{block}.attention.self.{part}.{leaf}"] = third
                    case [module, *inner, leaf]:
                        theirs = {
                            "norm1": "layernorm_before",
                            "norm2": "layernorm_after",
                            "attn.proj": "attention.output.dense",
                            "mlp.fc1": "intermediate.dense",
                            "mlp.fc2": "output.dense",
                        }[".".join([module, *inner])]
                        out[f"{block}.{theirs}.{leaf}"] = value
            case ["norm", leaf]:
                out[f"{prefix}.layernorm.{leaf}"] = value
            case ["head", leaf]:
                out[f"classifier.{leaf}"] = value
    return out


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "nested"])
def test_official_files_load_as_they_are(tmp_path, name, suffix):
    size = {"img_size": 64} if "rpb" in name else {}
    source = official(name, **size)
    state_dict = source.state_dict()
    if "rpb" in name:  # the official file carries this index buffer
        state_dict["layers.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    file = tmp_path / ("w.safetensors" if suffix == "safetensors" else "w.pth")
    if suffix == "safetensors":
        save_file(state_dict, file)
    else:
        torch.save({"state_dict": state_dict} if suffix == "nested" else state_dict, file)
    assert torch.equal(load(name, file, **size)(X), source(X))


@pytest.mark.parametrize("name, prefix", [("natten_nat_s", "nat"), ("natten_dinat_m", "dinat")])
def test_transformers_files_load(tmp_path, name, prefix):
    source = official(name)
    converted = to_transformers(source.state_dict(), prefix)
    assert not converted.keys() & source.state_dict().keys()
    torch.save(converted, tmp_path / "pytorch_model.bin")
    assert torch.equal(load(name, tmp_path / "pytorch_model.bin")(X), source(X))


def test_dense_task_files_load_into_stage_norms(tmp_path):
    source = official("natten_dinat_s", stage_norms=True, num_classes=0)
    state_dict = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {"decode_head.weight": torch.zeros(1)}
    torch.save({"state_dict": state_dict}, tmp_path / "upernet.pth")
    assert {"backbone.norm0.weight", "backbone.norm3.bias"} <= state_dict.keys()
    assert not any(key.startswith(("backbone.norm.", "backbone.head.")) for key in state_dict)
    model = load("natten_dinat_s", tmp_path / "upernet.pth", stage_norms=True, features_only=True)
    expected = source.forward_intermediates(X, intermediates_only=True)
    for ours, theirs in zip(model(X), expected, strict=True):
        assert torch.equal(ours, theirs)
    norm0 = source.get_submodule("norm0")
    (bare,) = source.levels[:1]
    torch.testing.assert_close(expected[0].permute(0, 2, 3, 1), norm0(bare(source.patch_embed(X))))


def test_classification_files_start_dense_training(tmp_path):
    source = official("natten_dinat_s")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load("natten_dinat_s", tmp_path / "w.pth", stage_norms=True, num_classes=0)
    assert torch.equal(model.levels[3].blocks[0].attn.rpb, source.levels[3].blocks[0].attn.rpb)
    assert torch.equal(model.get_submodule("norm0").weight, torch.ones(16))


def test_bias_tables_follow_window_and_grid(tmp_path):
    torch.save(official("natten_dinat_s").state_dict(), tmp_path / "w.pth")
    assert load("natten_dinat_s", tmp_path / "w.pth", window=5).levels[0].blocks[0].attn.rpb.shape == (1, 9, 9)
    torch.save(official("natten_vitrpb_s", img_size=64).state_dict(), tmp_path / "r.pth")
    resized = load("natten_vitrpb_s", tmp_path / "r.pth", img_size=(96, 64))
    changed = load("natten_vitrpb_s", tmp_path / "r.pth", img_size=64)
    changed.set_input_size((96, 64))
    assert torch.equal(resized.layers[1].attn.rpb, changed.layers[1].attn.rpb)


@pytest.mark.parametrize("name", ["natten_dinat_s", "natten_dinats_t", "natten_nat_iso_s"])
def test_other_channels_and_classes(tmp_path, name):
    source = official(name)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    gray = load(name, tmp_path / "w.pth", in_chans=1, num_classes=5)
    assert gray(X[:, :1]).shape == (1, 5)
    torch.testing.assert_close(gray.forward_features(X[:, :1]), source.forward_features(X[:, :1].expand(-1, 3, -1, -1)))


def test_missing_and_unknown_keys_are_errors(tmp_path):
    state_dict = official("natten_dinat_s").state_dict()
    del state_dict["levels.1.blocks.0.attn.rpb"]
    torch.save(state_dict | {"levels.0.extra": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"(?s)levels\.1\.blocks\.0\.attn\.rpb.*levels\.0\.extra"):
        load("natten_dinat_s", tmp_path / "w.pth")


@pytest.mark.parametrize("classes", [3, 1000, 0])
@pytest.mark.parametrize("prefix", ["net.", "foreign"])
def test_a_file_that_fits_nothing_is_an_error_whatever_the_classes(tmp_path, prefix, classes):
    """timm's own models stay random and log it as soon as the number of classes differs."""
    weights = official("natten_dinat_m", num_classes=3).state_dict()
    if prefix == "foreign":
        weights = {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}
    file = tmp_path / "w [x].pth"
    torch.save({prefix + key: value for key, value in weights.items()} if prefix == "net." else weights, file)
    with pytest.raises(WeightsError) as raised:
        load("natten_dinat_m", file, num_classes=classes)
    assert str(raised.value).startswith(f"{file} does not fit natten_dinat_m")
    assert "missing " in str(raised.value) and "; unexpected " in str(raised.value)


@pytest.mark.parametrize("name", ["litv2_s", "biformer_t", "l2vit_t", "agent_pvt_t", "agent_swin_t"])
def test_files_of_every_family_must_fit(tmp_path, name):
    weights = {"encoder.weight": torch.zeros(1)}
    torch.save(weights, tmp_path / "w.pth")
    for overlay, source in (({"file": tmp_path / "w.pth"}, "w.pth"), ({"state_dict": weights}, "the given state_dict")):
        with pytest.raises(WeightsError, match=rf"{source} does not fit {name}: missing .*unexpected encoder\.weight"):
            timm.create_model(name, pretrained=True, num_classes=2, device="meta", pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("levels.2.blocks.0.mlp.fc1.weight"), r"missing levels\.2\.blocks\.0\.mlp\.fc1\.weight$"),
        (lambda w: w.update({"levels.9.w": torch.zeros(1)}), r"unexpected levels\.9\.w$"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), r"norm\.bias has shape \(3,\), expected \(128,\)$"),
    ],
)
def test_every_parameter_but_the_classifier_must_fit(tmp_path, change, message):
    weights = official("natten_dinat_s").state_dict()
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load("natten_dinat_s", tmp_path / "w.pth", num_classes=5)


def test_a_classifier_of_the_right_size_is_kept(tmp_path):
    """Also where it is not that of the released checkpoint, by which timm goes."""
    source = official("natten_dinat_s", num_classes=5, in_chans=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load("natten_dinat_s", tmp_path / "w.pth", num_classes=5, in_chans=1)
    assert torch.equal(model(X[:, :1]), source(X[:, :1]))
    assert (model.pretrained_cfg["num_classes"], model.pretrained_cfg["input_size"]) == (5, (1, 224, 224))
    other = load("natten_dinat_s", tmp_path / "w.pth", num_classes=7)  # three channels from one, a new classifier
    assert other(X).shape == (1, 7)
    torch.testing.assert_close(other.forward_features(X), source.forward_features(X.sum(1, keepdim=True) / 3))
    with pytest.raises(WeightsError, match=r"\(its classifier has 5 classes: pass num_classes=5\)"):
        load("natten_dinat_s", tmp_path / "w.pth")
    features = load("natten_dinat_s", tmp_path / "w.pth", features_only=True, in_chans=1)
    maps = source.forward_intermediates(X[:, :1], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features(X[:, :1]), maps, strict=True))


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module.", "model._orig_mod."])
def test_names_of_wrappers_are_left_out(tmp_path, prefix):
    source = official("natten_dinat_s", num_classes=3)
    weights = {prefix + key: value for key, value in source.state_dict().items()} | {"n_averaged": torch.tensor(3)}
    if prefix != "module.":
        del weights["n_averaged"]
    if prefix.startswith("model."):
        weights["criterion.weight"] = torch.zeros(3)
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    assert torch.equal(load("natten_dinat_s", tmp_path / "w.pth", num_classes=3)(X), source(X))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b"<html>", "it holds a web page"),
        (b"PK\x03\x04", "cut short"),
        ([1, 2], "holds list; expected a mapping"),
        ({3: torch.ones(1)}, "holds more than named tensors"),
    ],
)
def test_files_that_cannot_be_read_are_told_in_one_sentence(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message) as raised:
        load("natten_dinat_s", tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(raised.value)


def test_training_files_with_arguments_load_as_in_timm(tmp_path):
    """And are not blamed when something else is wrong."""
    source = official("natten_dinat_s")
    file = tmp_path / "w.pth"
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, file)
    assert torch.equal(load("natten_dinat_s", file)(X), source(X))
    with pytest.raises(TypeError, match="no_such_argument"):
        load("natten_dinat_s", file, no_such_argument=1)


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_saved_for_the_hub_and_created_from_the_folder(tmp_path, name):
    size = {"img_size": (64, 64)} if "rpb" in name else {}
    source = official(name, num_classes=7, **size)
    save_for_hf(source, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(X), source(X))
    assert "foveal:" not in (tmp_path / "config.json").read_text()


def test_registry_and_manifest_name_the_same_checkpoints():
    ours = {name for model in our_models() for name in get_arch_pretrained_cfgs(model)}
    ours = {name for name in ours if not name.endswith(".untrained")}
    assert set(load_manifest().entries) == ours <= set(timm.list_models(pretrained=True))
    for name, entry in load_manifest().entries.items():
        cfg = timm.get_pretrained_cfg(name).to_dict()
        assert (cfg["input_size"][1], cfg["num_classes"]) == (entry.img_size, entry.num_classes or cfg["num_classes"])


def test_pretrained_goes_through_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"natten_dinat_s\.shi_in1k"):
        create("natten_dinat_s", pretrained=True, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match=r"natten_dinat_l\.shi_in22k"):
        create("natten_dinat_l.shi_in22k", pretrained=True, cache_dir=tmp_path)


def test_the_shipped_model_reads_held_out_digits():
    model = timm.create_model("natten_dinat_pico", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    numbers, targets = split_digits()["test"]
    pixels = (load_digits().images[numbers] * (255 / 16)).round().astype("uint8")  # [360, 8, 8]
    with torch.inference_mode():
        predicted = model(torch.stack([transform(Image.fromarray(scan)) for scan in pixels])).argmax(1)
    assert (predicted == torch.tensor(targets)).float().mean() >= 0.98
