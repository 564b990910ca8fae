"""The command `foveal`, in this process: what each command computes, prints, writes and refuses."""

import csv
import json

import foveal.zoo  # noqa: F401 - registers the models
import numpy as np
import pytest
import timm
import torch
from foveal.cli import app
from foveal.zoo.data.digits import split_digits
from foveal.zoo.inference.attention import attention_layers, token_attention
from foveal.zoo.inference.evaluate import number_classes
from foveal.zoo.inference.source import open_model
from foveal.zoo.tasks.confusion import count_confusion, per_class, plot_confusion
from PIL import Image
from sklearn.datasets import load_digits
from timm.models._hub import save_for_hf
from typer.testing import CliRunner
from video_models import tiny_pipe

MODEL = "natten_dinat_pico"  # its weights, for digits, are in the package
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def foveal_(*arguments, code: int = 0):
    """The result of a command that ends with this exit status."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments) -> str:
    """The sentence of a command that refuses its arguments."""
    result = foveal_(*arguments, code=2)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("foveal: error: "))
    assert "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """`digits/NAME/*.png`: forty scans that the weights were tested on, and a file that is no image."""
    root = tmp_path_factory.mktemp("cli") / "digits"
    pixels = load_digits().images
    for number, digit in list(zip(*split_digits()["test"], strict=True))[:40]:
        (root / WORDS[digit]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[number] * 255 / 16).astype(np.uint8)).save(root / WORDS[digit] / f"{number}.png")
    (root / "zero" / "broken.jpg").write_bytes(b"<html>")
    return root


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The packaged model as a folder for `local-dir:` that knows the names of its classes."""
    folder = tmp_path_factory.mktemp("cli") / "named"
    model = timm.create_model(MODEL, pretrained=True)
    save_for_hf(model, str(folder), model_config={"label_names": list(WORDS)})
    return folder


def test_every_command_has_help_with_an_example():
    listed = foveal_("--help").output
    for command in ("train", "eval", "predict", "sample", "export", "profile", "explain", "plot", "demo", "weights"):
        assert f"  {command} " in listed
    for words in (["eval"], ["demo"], ["predict"], ["sample"], ["export"], ["profile"], ["plot", "field"],
                  ["plot", "mask"], ["plot", "model"], ["plot", "attention"]):  # fmt: skip
        assert f"Example: foveal {' '.join(words)}" in foveal_(*words, "--help").output


def test_eval_measures_and_writes_its_tables(named, digits, tmp_path):
    told = json.loads(foveal_("eval", named, digits, "--json", "--out", tmp_path).stdout)
    assert told["num_images"] == 40 and told["unreadable"] == 1 and told["img_size"] == 32
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    right = sum(row["true"] == row["predicted"] for row in rows)
    assert told["top1"] == 100 * right / 40 >= 95
    matrix = [row[1:] for row in csv.reader((tmp_path / "confusion.csv").open())][1:]
    assert sum(int(cell) for row in matrix for cell in row) == 40
    assert sum(int(matrix[i][i]) for i in range(10)) == right
    table = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [row["class"] for row in table] == list(WORDS)
    assert json.loads((tmp_path / "summary.json").read_text()) == told
    assert "broken.jpg" in (tmp_path / "unreadable.csv").read_text()
    assert Image.open(tmp_path / "confusion.png").width > 400


def test_eval_at_another_size_and_of_a_split(named, digits, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(digits)
    found = foveal_("eval", named, tmp_path / "data", "--img-size", 48, "--out", tmp_path / "out")
    assert "40 images at 48 pixels" in found.stdout
    assert "no folder for the split 'test'" in refused("eval", named, tmp_path / "data", "--split", "test")


def test_eval_by_a_table_and_by_the_order_of_folders(named, digits, tmp_path):
    files = sorted(digits.glob("*/*.png"))[:6]
    rows = [f"{path.relative_to(digits)},{path.parent.name}" for path in files]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    arguments = ("--labels", tmp_path / "labels.csv", "--json", "--out", tmp_path / "out")
    assert json.loads(foveal_("eval", named, digits, *arguments).stdout)["num_images"] == 6
    assert "does not exist" in refused("eval", named, digits, "--labels", "nowhere.csv")
    # a model without names numbers as many folders as it has classes in natural order
    opened = open_model(MODEL)
    names, numbers = number_classes([f"digit {i}" for i in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)], opened)
    assert names[0] == "digit 1" and numbers["digit 10"] == 9
    with pytest.raises(ValueError, match="classes that natten_dinat_pico does not have: ant"):
        number_classes(["ant", "bee"], opened)


def test_eval_refuses_classes_that_the_model_does_not_have(named, digits, tmp_path):
    (tmp_path / "ant").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "ant" / "0.png")
    assert "classes that" in (sentence := refused("eval", named, tmp_path)) and "ant" in sentence
    assert "did you mean 'natten_dinat_pico'" in refused("eval", "natten_dinat_picoo", digits)
    assert "is not a folder" in refused("eval", named, tmp_path / "nowhere")
    assert "does not exist" in refused("eval", tmp_path / "nowhere", digits)


def test_predict_names_images_in_order(named, digits, tmp_path):
    table, sheet = tmp_path / "names.csv", tmp_path / "sheet.png"
    arguments = ("predict", named, digits / "zero", digits / "one", "--topk", 3)
    told = json.loads(foveal_(*arguments, "--json", "--csv", table, "--sheet", sheet).stdout)
    opened = open_model(named)
    for entry in told:
        if "broken" in entry["file"]:
            assert entry["top"] == [] and "no image" in entry["error"]
            continue
        image = opened.transform(Image.open(entry["file"]))[None]
        shares = opened.probabilities(image)[0]
        assert [x["label"] for x in entry["top"]] == shares.topk(3).indices.tolist()
        assert entry["top"][0]["name"] == WORDS[entry["top"][0]["label"]]
        assert entry["top"][0]["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
    rows = list(csv.DictReader(table.open()))
    assert [row["file"] for row in rows] == [entry["file"] for entry in told]
    assert {"prediction", "probability_3", "error"} <= rows[0].keys()
    assert Image.open(sheet).width > 300
    assert "cannot be read" in foveal_("predict", named, digits / "zero").stdout


def test_predict_refuses_what_is_no_image(named, digits, tmp_path):
    assert "none of 1 images can be read" in refused("predict", named, digits / "zero" / "broken.jpg")
    assert "does not exist" in refused("predict", named, tmp_path / "nowhere.jpg")
    assert "topk=0" in refused("predict", named, digits, "--topk", 0)


def test_export_needs_a_suffix_that_fits(named, tmp_path):
    assert "ends in .onnx" in refused("export", named, tmp_path / "model.pb", "--format", "onnx")
    (tmp_path / "there.onnx").write_bytes(b"x")
    assert "--force" in refused("export", named, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_bytes() == b"x"


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["test_vit", MODEL])
def test_weights_of_a_token_are_softmax_attention(name, number):
    """Each head's weights sum to 1, and those of ViT are the softmax of its queries and keys."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=name == MODEL).eval()
    channels, side, _ = model.pretrained_cfg["input_size"]
    image = torch.randn(1, channels, side, side)
    caught = {}
    layer = attention_layers(model)[number]
    hook = model.get_submodule(layer).qkv.register_forward_hook(lambda _, args, out: caught.update(qkv=out))
    found = token_attention(model, image, place=(0.6, 0.3), layer=layer)
    hook.remove()
    weights, heads = found.weights, model.get_submodule(layer).num_heads
    assert weights.min() >= 0
    if "natten" in name:
        torch.testing.assert_close(weights.sum((1, 2)), torch.ones(heads))
        return
    query, key, _ = caught["qkv"].unflatten(-1, (3, heads, -1)).unbind(2)
    row, column = found.token
    columns = weights.shape[2]
    before = query.shape[1] - weights[0].numel()
    logits = torch.einsum("hd,nhd->hn", query[0, before + row * columns + column], key[0]) * query.shape[-1] ** -0.5
    torch.testing.assert_close(weights.flatten(1), logits.softmax(-1)[:, before:], rtol=1e-4, atol=1e-6)


def test_plots_are_drawn(named, digits, tmp_path):
    image = next((digits / "two").glob("*.png"))
    foveal_("plot", "attention", named, image, "--place", "0.3,0.7", "--layer", 0, "-o", tmp_path / "attention.png")
    foveal_("plot", "field", "14,14", "--window", "3,5", "--dilation", 2, "-o", tmp_path / "field.png")
    foveal_("plot", "model", named, "-o", tmp_path / "model.png")
    told = foveal_("plot", "mask", "sta", "4,8,8", "--set", "tile=(2,4,4)", "-o", tmp_path / "mask.png").stdout
    assert "100.0 %" in told  # windows of three tiles on two
    for name in ("attention", "field", "model", "mask"):
        assert Image.open(tmp_path / f"{name}.png").width > 300
    assert "layer='nope'" in refused("plot", "attention", named, image, "--layer", "nope")
    assert "did you mean 'radial'" in refused("plot", "mask", "radia", "4,8,8")
    assert "must end in .png" in refused("plot", "field", "9,9", "--window", 3, "-o", tmp_path / "field.gif")
    assert "must be numbers" in refused("plot", "field", "9,nine")


def test_profile_counts_and_times(tmp_path):
    told = json.loads(foveal_("profile", MODEL, "--repeats", 2, "-b", 2, "--json").stdout)
    model = timm.create_model(MODEL)
    assert told["param_count"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
    assert told["infer_gmacs"] > 0 and told["infer_samples_per_sec"] > 0 and told["batch_size"] == 2
    assert "dtype='int8'" in refused("profile", MODEL, "--dtype", "int8")


def test_sample_writes_what_the_suffix_says(tmp_path):
    tiny_pipe().save_pretrained(tmp_path / "run" / "pipeline")
    arguments = ("sample", tmp_path / "run")
    foveal_(*arguments, tmp_path / "a.gif", "--class", 1, "--class", 2, "--num", 2, "--steps", 2)
    foveal_(*arguments, tmp_path / "b.gif", "--class", 1, "--class", 2, "--num", 2, "--steps", 2)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    assert Image.open(tmp_path / "a.gif").n_frames > 1
    told = json.loads(foveal_(*arguments, tmp_path / "a.png", "--class", 1, "--steps", 1, "--json").stdout)
    assert told["clips"] == 1 and told["captions"] == ["1"]
    assert "ends in .gif, .mp4, .png" in refused(*arguments, tmp_path / "a.avi")
    assert "neither the folder of a pipeline" in refused("sample", tmp_path, tmp_path / "c.gif")


def test_the_table_per_class():
    targets, guesses = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 2])
    table = per_class(count_confusion(targets, guesses, 3), ["a", "b", "c"])
    assert [row["images"] for row in table] == [3, 2, 0]
    assert [row["recall"] for row in table] == [1 / 3, 1 / 2, None]
    assert [row["precision"] for row in table] == [1.0, 1 / 3, 0.0]
    assert [row["f1"] for row in table] == [0.5, 0.4, 0.0]
    assert [(row["taken_for"], row["mistakes"]) for row in table] == [("b", 2), ("c", 1), ("", 0)]


def test_the_picture_of_many_classes_shows_those_with_mistakes(tmp_path):
    matrix = torch.eye(100, dtype=torch.int64)
    matrix[3, 97] = 5
    path = plot_confusion(matrix, [f"class number {i}" for i in range(100)], path=tmp_path / "confusion.png")
    assert max(Image.open(path).size) < 3000
