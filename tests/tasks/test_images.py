"""Training on folders of images: fine-tuning as documented, classes kept with the run, files that cannot be read."""

import csv
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from foveal import train
from foveal.zoo.data.loader import PADDING
from foveal.zoo.tasks import plots
from foveal.zoo.tasks.epochs import fit_ramps
from foveal.zoo.tasks.model import make_model
from image_folders import both, photograph_digits, write, write_damaged
from train_helpers import configure

FOLDER = (
    *("data=imagefolder", "data.img_size=32", "data.batch_size=2", "data.num_workers=0", "logger=none"),
    *("trainer.max_epochs=1", "trainer.enable_model_summary=false"),
)
# noise in place of photographs is nothing to learn from: they are the digits that the packaged weights are of
DIGITS = (
    *("experiment=finetune", "model.name=natten_dinat_pico", "data.img_size=32", "data.batch_size=16"),
    *("data.train_transform.hflip=0", "task.optimizer.lr=2e-3", "data.num_workers=0"),
)


def finetuned(tmp_path: Path, *options: str) -> float:
    folder = photograph_digits(tmp_path / "digits")
    assert len(list(folder.glob("train/*/*.jpg"))) == 200
    return train.train(configure(tmp_path / "run", *DIGITS, f"data.root={folder}", *options, tiny=False))


@pytest.mark.filterwarnings("ignore")
def test_finetuning_learns_two_hundred_photographs(tmp_path):
    bare = ("logger=none", "trainer.enable_model_summary=false", "test=false", "callbacks.report=null")
    accuracy = finetuned(tmp_path, "trainer.max_epochs=6", "trainer.check_val_every_n_epoch=6", *bare)
    assert accuracy > 0.65  # six of thirty epochs; guessing is right once in ten


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_finetuning_reaches_the_documented_accuracy(tmp_path):
    pretrained = finetuned(tmp_path)
    scratch = train.train(
        configure(
            tmp_path / "scratch", *DIGITS, f"data.root={tmp_path / 'digits'}", "model.pretrained=false", tiny=False
        )
    )
    assert pretrained > 0.95 and scratch < 0.9


def test_the_run_keeps_the_names_of_its_classes(tmp_path):
    """As they are, whatever they look like to rich, OmegaConf or matplotlib."""
    names = ["$a_b$", "${seed}", "10", "2", "[bold]x"]
    folder = write(tmp_path / "images", *both(*names))
    train.train(configure(tmp_path / "run", *FOLDER, f"data.root={folder}"))
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    ordered = checkpoint["hyper_parameters"]["class_names"]
    assert sorted(ordered) == sorted(names) and ordered[:2] == ["2", "10"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["class_names"] == ordered


def test_a_run_does_not_go_on_with_other_classes(tmp_path):
    folder = write(tmp_path / "images", *both("ant", "cat", count=2))
    options = (*FOLDER, f"data.root={folder}")
    train.train(configure(tmp_path / "run", *options))
    for split in ("train", "val"):
        (folder / split / "ant").rename(folder / split / "dog")
    config = configure(
        tmp_path / "run", *options, "trainer.max_epochs=2", f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    )
    with pytest.raises(ValueError, match="label 0 is 'ant' there and 'cat' here"):
        train.train(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [(), ("task.mixup={mixup_alpha:0.8,cutmix_alpha:1.0}",), ("data.batch_size=1",)])
def test_unreadable_images_are_listed_and_do_not_count(tmp_path, capsys, options):
    folder = write_damaged(tmp_path / "images")
    config = configure(tmp_path / "run", *FOLDER, f"data.root={folder}", "trainer.max_epochs=2", *options)
    accuracy = train.train(config)
    assert 3 * accuracy == pytest.approx(round(3 * accuracy))
    rows = list(csv.DictReader((tmp_path / "run/unreadable.csv").open()))
    listed = {(row["split"], Path(row["file"]).relative_to(folder).as_posix()) for row in rows}
    assert listed == {
        (split, f"{'val' if split == 'test' else split}/ant/{i}.jpg")
        for split in ("train", "val", "test")
        for i in range(3)
    }
    assert all(row["reason"] for row in rows)
    said = capsys.readouterr().out
    assert "(3 images could not be read and do not count)" in said and "unreadable.csv" in said
    (row, *_) = csv.DictReader((tmp_path / "run/metrics.csv").open())
    assert 0 < float(row["train/loss"]) < 10
    weights = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_step_without_a_readable_image_has_no_gradient(tmp_path):
    _, task, _ = train.build(configure(tmp_path, "logger=none"))
    task.log = lambda *args, **kwargs: None
    loss = task.training_step((torch.zeros(0, 1, 32, 32), torch.zeros(0, dtype=torch.int64)), 0)
    loss.backward()
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in task.parameters())
    logits = task._evaluate("val", (torch.zeros(2, 1, 32, 32), torch.tensor([PADDING, PADDING])))
    assert logits.shape == (2, 10) and not task.metrics["val_loss"].update_called


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ({"warmup_epochs": 20, "cooldown_epochs": 10}, 310, {}),
        ({"warmup_epochs": 20, "cooldown_epochs": 10}, 31, {}),
        ({"warmup_epochs": 20, "cooldown_epochs": 10}, 30, {"warmup_epochs": 10, "cooldown_epochs": 5}),
        ({"warmup_epochs": 20, "cooldown_epochs": 10}, 1, {"warmup_epochs": 1 / 3, "cooldown_epochs": 1 / 6}),
        ({"warmup_epochs": 5}, 2, {"warmup_epochs": 1, "cooldown_epochs": 0}),
        ({}, 1, {}),
    ],
)
def test_warm_up_and_cool_down_leave_half_of_a_short_run(schedule, epochs, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit_ramps(schedule, epochs) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [("debug=fast",), ("trainer.max_epochs=1", "trainer.limit_train_batches=2")])
def test_recipes_of_many_epochs_run_for_one(tmp_path, options):
    folder = write(tmp_path / "images", *both("ant", "cat", count=2))
    small = ("++model.args={embed_dim:16,depths:[1,1],num_heads:[1,2],dilations:[2,1]}", "data.img_size=32")
    config = configure(
        tmp_path / "run",
        "experiment=in1k_natten_dinat_m",
        f"data.root={folder}",
        *("data.batch_size=2", "data.num_workers=0", "trainer=default", "trainer.accelerator=cpu", "logger=none"),
        *(*small, *options),
        tiny=False,
    )
    train.train(config)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("natten_vitrpb_s", {"embed_dim": 32, "depth": 1, "num_heads": 1}),
        ("agent_deit_t", {"embed_dim": 32, "depth": 1, "num_heads": 1}),
        ("agent_swin_pico", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1)}),
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 1}),
        ("natten_dinat_pico", {}),
        ("test_resnet", {}),
        ("test_efficientnet", {}),
    ],
)
def test_the_size_of_the_images_goes_to_models_that_are_made_for_one(name, args):
    model = make_model({"name": name, "args": args}, num_classes=3, in_chans=3, img_size=64).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    if name == "vit_tiny_patch16_224":
        assert model.patch_embed.img_size == (64, 64)
        own = make_model({"name": name, "args": {**args, "img_size": 32}}, num_classes=3, in_chans=3).patch_embed
        assert own.img_size == (32, 32)


def test_the_packaged_weights_take_colour():
    grey = make_model({"name": "natten_dinat_pico"}, num_classes=10, in_chans=1, pretrained=True).eval()
    colour = make_model({"name": "natten_dinat_pico"}, num_classes=10, in_chans=3, pretrained=True).eval()
    image = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(colour(image.expand(-1, 3, -1, -1)), grey(image), rtol=1e-4, atol=1e-4)


def test_pretrained_weights_say_which_pixels_they_know(tmp_path):
    options = ("model.pretrained=true", "debug=fast", "logger=none")
    folder = write(tmp_path / "images", *both("ant", "cat"))
    data = ("data=imagefolder", f"data.root={folder}", "data.img_size=32", "data.batch_size=2", "data.num_workers=0")
    config = configure(tmp_path / "run", *data, "data.mean=[0.2]", "data.std=[0.5]", *options, tiny=False)
    with pytest.warns(UserWarning, match=r"pretrained with data\.mean=\[0\.5\], not \[0\.2\]"):
        train.train(config)


def test_the_column_of_the_learning_rate_is_the_heads(tmp_path):
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false")
    options = ("task.optimizer.layer_decay=0.5", "task.optimizer.lr=1e-3", "task.scheduler.sched=constant")
    train.train(configure(tmp_path, *short, *options, "task.scheduler.warmup_epochs=0", "logger=none"))
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert float(row["lr"]) == pytest.approx(1e-3)


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize(
    "names",
    [
        ("3", "5"),
        ("Labrador retriever", "golden retriever"),
        ("n02099601 golden retriever", "a_name_that_has_no_space_to_be_broken_at"),
        ("$x_1$ and $", "\n[bold]two\nlines"),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9", ""),
    ],
)
def test_titles_of_predictions_stay_over_their_images(tmp_path, monkeypatch, names, count):
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    targets = [number % 3 == 0 for number in range(count)]
    values = {"targets": targets, "predictions": [0] * count, "class_names": names, "accuracy": 0.5}
    plots.plot_predictions(torch.rand(count, 3, 8, 8), path=tmp_path / "p.png", **values)
    (figure,) = kept
    figure.draw_without_rendering()
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    assert len(titles) == (count if names[0].strip() else 0)
    boxes = [title.get_window_extent() for title in titles]
    for row in range(0, count, 10):
        places = boxes[row : row + 10]
        assert all(left.x1 < right.x0 for left, right in pairwise(places))
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.width
    for title, axes in zip(boxes, figure.axes, strict=False):
        assert title.y0 >= axes.get_window_extent().y1
    if "$" in names[0]:
        assert {title.get_text() for title in titles} <= {"$x_1$ and $", "$x_1$ and $\nis [bold]two lines"}
        assert not any(title.get_parse_math() for title in titles)
