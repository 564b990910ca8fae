"""The way out of a run: its checkpoints in timm and `foveal.weights`, folders for `local-dir:`, packaged weights."""

import json
from pathlib import Path

import foveal.zoo  # noqa: F401 - registers the models
import pytest
import timm
import torch
import typer
from foveal import train
from foveal.weights import WeightsError, check_state_dict, load
from foveal.weights.manifest import Entry, lookup
from foveal.zoo.data import Digits
from foveal.zoo.data.images import TimmDataset
from foveal.zoo.tasks import package
from foveal.zoo.tasks.export import export_run, main
from foveal.zoo.tasks.package import accuracy_on_test, package_run
from train_helpers import configure
from typer.testing import CliRunner

SHORT = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "callbacks.ema.decay=0.5",
    "callbacks.report=null",
    "logger=none",
)
MODELS = {"timm": "vit_tiny_patch16_224", "ours": "natten_dinat_pico"}
CLASSES = {"num_classes": 10, "in_chans": 1}


@pytest.fixture(scope="module", params=MODELS)
def finished(request, tmp_path_factory):
    """A run of two steps, what `timm.create_model` needs for its model, and the averaged model itself."""
    folder = tmp_path_factory.mktemp("run") / "r [x]"
    config = configure(folder, *SHORT, tiny=request.param == "timm")
    train.train(config)
    arguments = {"model_name": MODELS[request.param], **CLASSES, **(config.model.args or {})}
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = timm.create_model(**arguments)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return folder, arguments, model.eval()


def command(function) -> typer.Typer:
    app = typer.Typer()
    app.command()(function)
    return app


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("file", ["last.ckpt", "best-000.ckpt"])
def test_checkpoints_load_into_timm(finished, file):
    """The averaged weights, by each of timm's ways."""
    folder, arguments, averaged = finished
    path = folder / "checkpoints" / file
    assert same(timm.create_model(**arguments, checkpoint_path=path), averaged)
    overlay = {"file": str(path), "num_classes": 10, "input_size": (1, 32, 32)}
    assert same(timm.create_model(**arguments, pretrained=True, pretrained_cfg_overlay=overlay), averaged)


def test_checkpoints_load_into_our_weights(finished):
    folder, _, averaged = finished
    path = folder / "checkpoints" / "last.ckpt"
    check_state_dict(load(path), averaged.state_dict())
    raw = load(path, container="current_model_state")
    check_state_dict(raw, averaged.state_dict())
    assert not torch.equal(raw["head.weight"], averaged.state_dict()["head.weight"])
    assert torch.equal(load(path)["head.weight"], averaged.state_dict()["head.weight"])


def test_the_file_holds_each_weight_once(finished):
    folder, _, averaged = finished
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in checkpoint["state_dict_ema"].items():
        assert value.data_ptr() == checkpoint["state_dict"][f"model.{name}"].data_ptr()
    assert len(checkpoint["state_dict_ema"]) == len(averaged.state_dict())


def test_the_export_is_the_trained_model(finished, tmp_path):
    folder, arguments, averaged = finished
    exported = export_run(folder, tmp_path / "out")
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert same(model, averaged)
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), averaged(images))
    data = Digits()
    said = timm.data.resolve_model_data_config(model)
    assert (tuple(said["input_size"]), tuple(said["mean"]), tuple(said["std"])) == ((1, 32, 32), data.mean, data.std)
    assert (said["crop_pct"], said["crop_mode"]) == (1.0, "squash")
    config = json.loads((exported / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (arguments["model_name"], 10)
    assert config["label_names"] == list(model.pretrained_cfg["label_names"]) == [str(i) for i in range(10)]
    assert not {"tag", "license", "url"} & config["pretrained_cfg"].keys()
    card = (exported / "README.md").read_text()
    assert ("import foveal.zoo" in card) == arguments["model_name"].startswith("natten")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_weights_and_other_models_start_from_the_export(finished, tmp_path):
    folder, _, averaged = finished
    raw = export_run(folder / "checkpoints" / "last.ckpt", tmp_path / "raw", container="current_model_state")
    model = timm.create_model(f"local-dir:{raw}", pretrained=True, num_classes=3)
    assert model.head.weight.shape[0] == 3 and not same(model, averaged)


def test_an_export_says_what_is_wrong_and_leaves_nothing(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    out = tmp_path / "out"

    def said(run: Path, *options: str) -> str:
        done = CliRunner().invoke(command(main), [str(run), str(out), *options])
        assert done.exit_code == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        return done.stderr

    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert "does not say which timm model it is of" in said(tmp_path / "foreign.ckpt")
    assert f"{tmp_path} is not the folder of a run" in said(tmp_path)
    assert "there is no such file" in said(tmp_path / "gone.ckpt")
    assert "has no container 'model'" in said(folder, "--container", "model")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict_ema"].pop("head.weight")
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert "missing head.weight" in said(tmp_path / "odd.ckpt")
    checkpoint["timm_config"]["architecture"] = "net_of_mine"
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert "cannot build net_of_mine" in said(tmp_path / "odd.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr("foveal.zoo.tasks.export.save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "disk full")))
        assert f"cannot write {out}: disk full" in said(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.ckpt", "odd.ckpt"]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "it holds files; pass --force" in said(folder)
    done = CliRunner().invoke(command(main), [str(folder), str(out), "--force"])
    assert done.exit_code == 0 and f"local-dir:{out}" in done.output
    assert (out / "notes.txt").read_text() == "mine" and (out / "config.json").is_file()
    out = tmp_path / "odd.ckpt"
    assert "it is a file" in said(folder)


def test_weights_alone_are_the_averaged_ones(tmp_path):
    """Lightning saves them past its callbacks."""
    train.train(configure(tmp_path, *SHORT, "+callbacks.last.save_weights_only=true", "test=false"))
    alone, whole = (torch.load(tmp_path / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("last", "best-000"))
    assert not {"optimizer_states", "current_model_state", "averaging_state"} & alone.keys()
    for name, value in whole["state_dict_ema"].items():
        assert torch.equal(alone["state_dict_ema"][name], value)
    assert any(not torch.equal(whole["current_model_state"][n], v) for n, v in alone["state_dict"].items())


def test_preprocessing_is_that_of_the_evaluated_images(tmp_path):
    """In timm's words, so that `create_transform` builds the same."""
    (tmp_path / "x").mkdir()
    options = {"name": "", "root": str(tmp_path), "batch_size": 1, "num_classes": 2, "img_size": 40}
    transform = {"crop_pct": 0.9, "crop_mode": "border", "interpolation": "nearest"}
    for given in ({}, transform):
        data = TimmDataset(**options, mean=(0.1,) * 3, std=(0.2,) * 3, eval_transform=given)
        said = timm.data.create_transform(**data.preprocessing, is_training=False)
        assert str(said) == str(data._transform("val")).replace("    ToMode('RGB')\n", "")


def test_shipped_weights_reproduce_the_accuracy_in_the_manifest():
    entry = lookup("natten_dinat_pico.digits")
    model = timm.create_model("natten_dinat_pico", pretrained=True)
    accuracy = accuracy_on_test(model, Digits())
    assert round(100 * accuracy, 2) == entry.metrics["top1"] >= 98
    assert entry.mirrors[0].bytes < 1_000_000
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000


def test_packaging_writes_file_and_entry_or_nothing(finished, tmp_path):
    folder, arguments, averaged = finished
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    options = {"name": f"{arguments['model_name']}.digits", "license": "Apache-2.0", "source": "https://example.org/"}
    wrong = (
        ({"name": f"{arguments['model_name']}.B[x]"}, "name is .*; expected 'architecture.tag' in lower case"),
        ({"name": "resnet18.digits"}, f"expected '{arguments['model_name']}.tag', because .* trained"),
        ({"source": "ftp://example.org"}, "source is 'ftp://example.org'; expected an https URL"),
        ({"license": ""}, "license is ''"),
    )
    for change, message in wrong:
        with pytest.raises(WeightsError, match=message):
            package_run(folder, **(options | change), manifest=manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest.read_text() == "{}"
    entry = package_run(folder, **options, manifest=manifest)
    assert entry == Entry.from_json(options["name"], json.loads(manifest.read_text())[options["name"]])
    check_state_dict(load(tmp_path / f"{options['name']}.safetensors"), averaged.state_dict())
    assert entry.metrics["top1"] == round(100 * accuracy_on_test(averaged, Digits()), 2)


def test_weights_are_packaged_in_a_checkout_only(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "CHECKOUT", tmp_path)
    done = CliRunner().invoke(command(package.main), [str(tmp_path)])
    assert done.exit_code == 2 and "installed one" in done.stderr
