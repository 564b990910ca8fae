"""Images with several labels or with numbers: tables are read or refused, models learn them and give them back."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
from foveal import train
from foveal.cli import app
from foveal.zoo.data import ImageTable
from foveal.zoo.data.loader import PADDING
from foveal.zoo.data.tables import WithTargets
from foveal.zoo.inference.source import open_model
from foveal.zoo.tasks.export import export_run
from foveal.zoo.tasks.losses import LabelLoss
from foveal.zoo.tasks.measured import per_label, per_value
from image_folders import write
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, precision_score, r2_score, recall_score
from train_helpers import configure
from typer.testing import CliRunner

COLOURS = ("red", "green", "blue")
PLAIN = {"batch_size": 4, "img_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_workers": 0, "augment": False}


def table(root, text: str, *, count: int = 6, **options) -> ImageTable:
    """Data of the images 0.png to 5.png and this table."""
    write(root, *[f"{i}.png" for i in range(count)])
    (root / "labels.csv").write_text(text)
    return ImageTable(root=str(root), **PLAIN | options)


LABELS = (
    "file,label,split\n0.png,cat|dog,train\n1.png,,train\n2.png,Emu 10,train\n3.png,dog | cat,val\n4.png,dog,test\n"
)


def test_labels_in_one_column(tmp_path):
    data = table(tmp_path, LABELS)
    assert data.class_names == ["cat", "dog", "Emu 10"] and data.for_task["targets"] == "labels"
    assert data.table.tensor("train").tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.table.tensor("val").tolist() == [[1, 1, 0]] and data.table.tensor("test").tolist() == [[0, 1, 0]]
    assert data.positive_weights.tolist() == [2, 2, 2]
    data.setup()
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (1, 3, 16, 16) and targets.tolist() == [[1, 1, 0]] and targets.dtype == torch.float32
    again = table(tmp_path, LABELS, class_names=["Emu 10", "dog", "cat", "ant"])
    assert again.table.tensor("train").tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert again.positive_weights.tolist() == [2, 2, 2, 1]


def test_labels_and_values_in_columns(tmp_path):
    text = "File;Cat;dog\n0.png;1;0\n1.png;0;1\n2.png;1;1\n3.png;0;0\n"
    data = table(tmp_path, text, val_fraction=0.01)
    assert data.class_names == ["Cat", "dog"]
    assert {split: len(paths) for split, paths in data.table.paths.items()} == {"train": 3, "val": 1}
    assert data.table.targets[str(tmp_path / "1.png")] == [0, 1]
    text = "file,age,mass\n0.png,10,-1e3\n1.png,30,0\n2.png,20,5\n"
    values = table(tmp_path, text, targets="values")
    rows = values.table.tensor("train").double()
    facts = values.for_task
    assert (facts["class_names"], facts["num_classes"], facts["targets"]) == (["age", "mass"], 2, "values")
    assert facts["value_mean"] == pytest.approx(rows.mean(0).tolist())
    assert facts["value_std"] == pytest.approx(rows.numpy().std(0).tolist())
    one = table(tmp_path, text, targets="values", columns=["age"])
    assert one.num_classes == 1 and one.for_record == {"columns": ["age"]}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,label\n0.png,cat\n1.png,cat\n", {}, r"has the labels \['cat'\], and there must be two"),
        ("file,cat,dog\n0.png,1,0\n1.png,0,2\n", {}, r"line 3: dog='2' must be 0 or 1"),
        ("file,cat,dog\n0.png,1,0\n1.png,0\n", {}, r"line 3: dog='' must be 0 or 1"),
        ("file,age\n0.png,1\n1.png,nan\n", {"targets": "values"}, r"line 3: age='nan' must be a finite number"),
        ("file,age\n0.png,1\n1.png,old\n", {"targets": "values"}, r"line 3: age='old' must be a finite number"),
        ("file,split\n0.png,train\n", {"targets": "values"}, r"data.columns=None: .* has the columns file, split"),
        ("file,age\n0.png,1\n", {"targets": "values", "columns": ["Age"]}, r"data.columns=\['Age'\]"),
        ("file,age\n0.png,1\n0.png,2\n", {"targets": "values"}, "line 3: 0.png has another label or split"),
        (LABELS.replace("4.png", "9.png"), {}, r"1 of 5 files .* do not exist, the first is .*9.png \(line 6\)"),
        (LABELS, {"class_names": ["cat", "dog"]}, "has images of Emu 10, which training does not have"),
        ("file,label,split\n0.png,a|b,val\n", {}, "has no rows of the split 'train'"),
        ("file,label\n", {}, "has no rows"),
        (LABELS, {"targets": "label"}, r"data.targets='label' is not known: did you mean 'labels'"),
        (LABELS, {"targets": "values", "class_names": ["a"]}, "values go by data.columns"),
        (LABELS, {"separator": ""}, "data.separator=''"),
        (LABELS, {"val_fraction": 1.0}, "data.val_fraction=1.0"),
    ],
)
def test_tables_that_are_none_are_named(tmp_path, text, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        table(tmp_path, text, **options)


def test_folders_without_a_table(tmp_path):
    for options, message in (
        ({"root": None}, "data.root is not set"),
        ({"root": str(tmp_path / "x")}, "is not a folder"),
        ({"root": str(tmp_path)}, "data.labels='labels.csv' does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ImageTable(**options, **PLAIN)


def test_images_that_do_not_count_have_no_targets():
    receive = WithTargets(lambda batch: batch, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    _, targets = receive([torch.zeros(3, 1), torch.tensor([1, PADDING, 0])])
    assert targets[[0, 2]].tolist() == [[3, 4], [1, 2]] and targets[1].isnan().all()


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_the_loss_of_labels_is_its_formula(gamma):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(2, (5, 3), generator=generator).double()
    targets[3] = math.nan
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    p, y = logits[[0, 1, 2, 4]].sigmoid(), targets[[0, 1, 2, 4]]
    each = -(weights * y * (1 - p) ** gamma * p.log() + (1 - y) * p**gamma * (1 - p).log())
    loss = LabelLoss(gamma=gamma, weights=weights.tolist())
    torch.testing.assert_close(loss(logits, targets), each.mean())
    torch.testing.assert_close(loss(logits, targets, plain=True), LabelLoss(gamma=gamma)(logits, targets))
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits)


def test_tables_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    shares, truth = rng.random((40, 3)), rng.random((40, 3)) < 0.4
    truth[:, 2] = False
    rows = per_label(torch.tensor(shares), torch.tensor(truth).float(), COLOURS)
    for i, row in enumerate(rows[:2]):
        guess = shares[:, i] >= 0.5
        assert row["images"] == truth[:, i].sum() and row["label"] == COLOURS[i]
        for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            assert row[name] == pytest.approx(score(truth[:, i], guess))
        assert row["ap"] == pytest.approx(average_precision_score(truth[:, i], shares[:, i]), abs=1e-6)
    assert rows[2]["recall"] is None and rows[2]["ap"] is None and rows[2]["precision"] == 0
    found, values = rng.normal(size=(40, 2)), rng.normal(size=(40, 2))
    values[:, 1] = 3
    first, second = per_value(torch.tensor(found), torch.tensor(values), ["a", "b"])
    assert first["r2"] == pytest.approx(r2_score(values[:, 0], found[:, 0])) and second["r2"] is None
    assert first["mae"] == pytest.approx(np.abs(found - values)[:, 0].mean())
    assert second["rmse"] == pytest.approx(np.sqrt(((found - values)[:, 1] ** 2).mean()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """72 pictures of squares in up to three colours, and two tables: which colours, and how bright the ground is."""
    root = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    labels, values = ["file,label,split"], ["file,light,split"]
    for i in range(72):
        light = rng.uniform(0, 0.5)
        picture = np.full((32, 32, 3), light)
        there = rng.random(3) < 0.5
        for colour in np.flatnonzero(there):
            picture[8 * colour + 4 : 8 * colour + 12, 4:28] = np.eye(3)[colour]
        Image.fromarray((255 * picture).astype(np.uint8)).save(root / f"{i}.png")
        split = "train" if i < 48 else "val" if i < 56 else "test"
        labels.append(f"{i}.png,{'|'.join(np.array(COLOURS)[there])},{split}")
        values.append(f"{i}.png,{100 * light + 1000},{split}")
    (root / "labels.csv").write_text("\n".join(labels))
    (root / "values.csv").write_text("\n".join(values))
    return root


def trained(pictures, folder, name, *options, epochs):
    given = (f"data.root={pictures}", f"experiment=finetune_{name}", "data.img_size=32", "data.batch_size=16")
    rest = ("model.pretrained=false", "task.scheduler=null", "task.optimizer.lr=3e-3", "callbacks.ema=null")
    last = ("logger=none", "data.augment=false", "task.optimizer.layer_decay=null", "data.num_workers=0", "seed=1")
    pure = "model.args={img_size:32,patch_size:8,embed_dim:32,depth:2,num_heads:2}"
    model = ("model.name=vit_tiny_patch16_224", pure, f"trainer.max_epochs={epochs}", "data.eval_transform.crop_pct=1")
    config = configure(folder, *given, *rest, *last, *model, *options, tiny=False)
    train.train(config)
    return config


def foveal_(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_labels_are_learnt_told_and_exported(pictures, tmp_path):
    run = tmp_path / "run"
    trained(pictures, run, "multilabel", "task.class_weights=balanced", epochs=20)
    rows = list(csv.DictReader((run / "per_label.csv").open()))
    assert [row["label"] for row in rows] == ["blue", "green", "red"]
    assert sum(float(row["ap"]) for row in rows) / 3 > 0.9
    for name in ("curves.png", "predictions.png"):
        assert Image.open(run / name).width > 300
    told = json.loads(foveal_("eval", run, pictures, "--json", "--out", tmp_path / "eval"))
    ended = json.loads((run / "environment.json").read_text())[-1]["ended"]["metrics"]
    assert told["map"] == pytest.approx(100 * ended["test/map"], abs=1e-3) and told["num_images"] == 16
    export_run(run, tmp_path / "model")
    opened = open_model(tmp_path / "model")
    assert opened.targets == "labels" and opened.names == ("blue", "green", "red")
    entries = json.loads(foveal_("predict", tmp_path / "model", pictures / "60.png", pictures / "61.png", "--json"))
    for entry in entries:
        shares = opened.predictions(opened.transform(Image.open(entry["file"]))[None])[0]
        assert {x["name"] for x in entry["top"]} == {n for n, p in zip(opened.names, shares, strict=True) if p >= 0.5}
    sheet = tmp_path / "sheet.png"
    out = foveal_("predict", run, pictures / "60.png", "--topk", 2, "--csv", tmp_path / "t.csv", "--sheet", sheet)
    assert "%" in out and sheet.is_file() and "prediction_2" in (tmp_path / "t.csv").read_text()
    assert "Labels, in the order of the outputs: blue, green, red." in (tmp_path / "model" / "README.md").read_text()


def test_values_are_learnt_and_exported_in_their_units(pictures, tmp_path):
    run = tmp_path / "run"
    trained(pictures, run, "regression", "data.labels=values.csv", epochs=20)
    (row,) = csv.DictReader((run / "per_value.csv").open())
    assert row["value"] == "light" and float(row["r2"]) > 0.8 and float(row["mae"]) < 6
    assert (run / "values.png").is_file()
    told = json.loads(foveal_("eval", run, pictures, "--labels", "values.csv", "--json", "--out", tmp_path / "eval"))
    assert told["mae"] == pytest.approx(float(row["mae"]), rel=1e-3)
    assert told["r2"] == pytest.approx(float(row["r2"]), abs=1e-3)
    export_run(run, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    opened = open_model(run)
    image = opened.transform(Image.open(pictures / "60.png"))[None]
    with torch.no_grad():
        value = float(plain(image))
    assert 990 < value < 1060
    (entry,) = json.loads(foveal_("predict", tmp_path / "model", pictures / "60.png", "--json"))
    assert entry["top"] == [{"name": "light", "value": pytest.approx(value, rel=1e-5)}]
    foveal_("predict", run, pictures / "60.png", "--csv", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().startswith("file,light,error\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data=imagetable",), r"data.targets=labels needs task=multilabel; task=classification trains on"),
        (("data=imagetable", "data.targets=values", "data.labels=values.csv", "task=multilabel"),
         "data.targets=values needs task=regression"),
        (("task=multilabel",), "data.targets=class needs task=classification"),
        (("data=imagetable", "task=multilabel", "task.loss=ce"), "task.loss='ce' is not known"),
        (("data=imagetable", "task=multilabel", "task.class_weights=[1,2]"), "must be balanced, or 3 numbers"),
        (("data=imagetable", "task=multilabel", "task.focal_gamma=-1"), "task.focal_gamma=-1"),
        (("data=imagetable", "data.targets=values", "data.labels=values.csv", "task=regression", "task.loss=ce"),
         "task.loss='ce' is not known"),
    ],
)  # fmt: skip
def test_data_and_tasks_have_to_agree(pictures, tmp_path, options, message):
    root = (f"data.root={pictures}",) if "data=imagetable" in options else ()
    with pytest.raises(Exception, match=message):
        train.build(configure(tmp_path, *options, *root))
