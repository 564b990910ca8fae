"""Segmentation: masks are read with their images or refused, the head takes any maps, a model learns and is used."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from foveal import train
from foveal.cli import app
from foveal.zoo.data import MaskFolder, Shapes
from foveal.zoo.data.loader import PADDING
from foveal.zoo.data.masks import list_pairs, read_mask
from foveal.zoo.data.pixels import UnreadableImage
from foveal.zoo.inference.segmentation import evaluate_masks, find_pairs, open_segmenter
from foveal.zoo.segmentation import PyramidHead, Segmenter
from foveal.zoo.tasks.losses import MaskLoss, dice_loss
from foveal.zoo.tasks.mask_report import paint, per_class, summarize
from foveal.zoo.tasks.plots import palette
from foveal.zoo.tasks.segmentation import make_segmenter
from PIL import Image
from sklearn.metrics import jaccard_score
from torch.nn import functional as F
from train_helpers import configure
from typer.testing import CliRunner

PLAIN = {"batch_size": 2, "img_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_workers": 0}


def write_pair(root, image, mask, *, size=(24, 20), values=(0, 1), mode="L"):
    """A picture that is dark where its mask has the first value, and bright where it has the second."""
    width, height = size
    labels = np.full((height, width), values[0], np.uint8)
    labels[:, width // 2 :] = values[1]
    for path in (root / image, root / mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(labels == values[0], 20, 230).astype(np.uint8)).convert("RGB").save(root / image)
    picture = Image.fromarray(labels)
    if mode == "P":
        picture.putpalette([channel for colour in palette(256) for channel in colour])
    picture.save(root / mask)
    return root


def folder(root, *, values=(0, 1), mode="L"):
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            write_pair(root, f"{split}/images/{i}.png", f"{split}/masks/{i}.png", values=values, mode=mode)
    return root


# data


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_read_with_their_images(tmp_path, mode):
    data = MaskFolder(root=str(folder(tmp_path, values=(2, 255), mode=mode)), num_classes=3, augment=False, **PLAIN)
    data.setup()
    ((image, mask),) = list(data.val_dataloader())[:1]
    assert image.shape == (1, 3, 20, 24) and mask.shape == (1, 20, 24) and mask.dtype == torch.int64
    assert (mask[..., :12] == 2).all() and (mask[..., 12:] == PADDING).all()
    torch.testing.assert_close(image[0, 0, 0, [0, -1]], torch.tensor([20, 230]) / 127.5 - 1)
    assert data.for_task == {"num_classes": 3, "in_chans": 3, "img_size": 16, "class_names": ["0", "1", "2"],
                             "targets": "masks"}  # fmt: skip


def test_a_mask_goes_where_its_image_goes(tmp_path):
    root = folder(tmp_path)
    data = MaskFolder(root=str(root), scale=(0.5, 2.0), color_jitter=0.0, **PLAIN | {"batch_size": 4})
    data.setup()
    seen = []
    for epoch in range(6):
        loader = data.train_dataloader()
        loader.epoch_sampler.set_epoch(epoch)
        for images, masks in loader:
            assert images.shape == (4, 3, 16, 16)
            bright, kept = images[:, 0] > 0, masks != PADDING
            assert ((bright == (masks == 1)) | ~kept).float().mean() > 0.97  # pixels of the border are between
            assert (images[:, 0][~kept].abs() < 0.01).all(), "what is filled up is the mean, and does not count"
            seen += [(float(mask[:, 0].float().mean()), bool((mask == PADDING).any())) for mask in masks]
    assert {first for first, _ in seen} >= {0.0, 1.0}, "some are turned"
    assert {padded for _, padded in seen} == {True, False}, "some are smaller than the crop"


def test_layouts_of_folders(tmp_path):
    for name, layout in {
        "a": "{split}/images/x {split}/masks/x",
        "b": "images/{split}/x annotations/{split}/x",
    }.items():
        for split in ("train", "val", "test"):
            image, mask = layout.format(split=split).split()
            write_pair(tmp_path / name, f"{image}.jpg", f"{mask}.png")
        assert {split: len(pairs) for split, pairs in list_pairs(tmp_path / name, fraction=0.1, seed=0).items()} == {
            "train": 1, "val": 1, "test": 1}  # fmt: skip
        assert find_pairs(tmp_path / name)[0][1].endswith("test/masks/x.png" if name == "a" else "test/x.png")
    for i in range(20):
        write_pair(tmp_path / "c", f"Images/deep/{i}.jpg", f"masks/deep/{i}.png")
    parts = list_pairs(tmp_path / "c", fraction=0.2, seed=0)
    assert len(parts["train"]) + len(parts["val"]) == 20 and 1 <= len(parts["val"]) <= 10
    assert parts == list_pairs(tmp_path / "c", fraction=0.2, seed=0)


def test_names_of_classes_and_their_number(tmp_path):
    root = folder(tmp_path, values=(0, 4))
    with pytest.warns(UserWarning, match=r"data.num_classes=5: the greatest label of 4 training masks is 4"):
        assert MaskFolder(root=str(root), **PLAIN).num_classes == 5
    (root / "classes.txt").write_text("ground\n\nroad\ncar\ntree\nsky\n")
    data = MaskFolder(root=str(root), **PLAIN)
    assert data.class_names == ["ground", "road", "car", "tree", "sky"] == data.for_record["class_names"]
    with pytest.raises(ValueError, match=r"data.num_classes=3, and 5 classes are named"):
        MaskFolder(root=str(root), num_classes=3, **PLAIN)


def test_pairs_that_cannot_be_used_do_not_count(tmp_path):
    root = folder(tmp_path)
    write_pair(root, "train/images/large.png", "train/masks/other.png", size=(30, 20))
    (root / "train/masks/other.png").unlink()
    Image.new("L", (24, 20)).save(root / "train/masks/large.png")
    write_pair(root, "train/images/seven.png", "train/masks/seven.png", values=(0, 7))
    Image.new("RGB", (24, 20)).save(root / "train/masks/1.png")
    write_pair(root, "val/images/1.png", "val/masks/1.png", values=(0, 9))
    data = MaskFolder(root=str(root), num_classes=2, **PLAIN | {"batch_size": 6})
    data.setup()
    ((images, masks),) = data.train_dataloader()
    assert len(images) == len(masks) == 3
    found = {path.rsplit("/", 1)[1]: why for path, why in data.unreadable["train"].items()}
    assert "its mode is RGB" in found["1.png"] and "label 7, and there are 2 classes" in found["seven.png"]
    assert "it is 24x20, and its image 30x20 pixels" in found["large.png"]
    (_, good), (_, bad) = data.val_dataloader()
    assert (good != PADDING).any() and (bad == PADDING).all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda root: None, {"root": None}, "data.root is not set"),
        (lambda root: None, {"root": "nowhere"}, "is not a folder"),
        (lambda root: None, {}, "has no folders train/images and train/masks"),
        (lambda root: write_pair(root, "images/a.jpg", "masks/b.png"), {}, "has a mask of the same"),
        (lambda root: write_pair(root, "images/a.jpg", "masks/a.png"), {}, "has one pair"),
        (lambda root: write_pair(root, "images/a.png", "masks/a.jpg"), {}, "its kind changes labels"),
        (folder, {"scale": (2, 1)}, r"data.scale=\[2, 1\]"),
        (folder, {"hflip": 2}, "data.hflip=2"),
        (folder, {"eval_size": 0}, "data.eval_size=0"),
        (folder, {"val_fraction": 0}, "data.val_fraction=0"),
    ],
)  # fmt: skip
def test_folders_that_are_none_are_named(tmp_path, change, options, message):
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MaskFolder(**{"root": str(tmp_path), "num_classes": 2} | PLAIN | options)


def test_masks_of_sixteen_bits_and_files_that_are_none(tmp_path):
    Image.fromarray(np.array([[0, 300], [65535, 2]], np.uint16)).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png", ignore=(65535,)).tolist() == [[0, 300], [PADDING, 2]]
    (tmp_path / "b.png").write_bytes(b"no")
    with pytest.raises(UnreadableImage):
        read_mask(tmp_path / "b.png")


def test_shapes_are_the_same_in_every_run():
    data = Shapes(train_length=3, val_length=2, test_length=2)
    data.setup()
    (image, mask), (again, _) = data.datasets["val"][1], data.datasets["val"][1]
    assert torch.equal(image, again) and image.shape[1:] == mask.shape and set(mask.unique().tolist()) <= {0, 1, 2, 3}
    first, other = (data.read((split, "0"))[0] for split in ("val", "test"))
    assert first.size != other.size or first.tobytes() != other.tobytes()
    with pytest.raises(ValueError, match=r"data\.img_size=300"):
        Shapes(img_size=300)
    with pytest.raises(ValueError, match=r"data\.val_length=0"):
        Shapes(val_length=0)


# networks and losses


@pytest.mark.parametrize(
    ("name", "args", "pad_to"),
    [
        ("test_natten_dinats", {}, 1),
        ("test_resnet", {}, 1),
        ("test_vit", {"dynamic_img_size": True}, 16),
        ("swin_tiny_patch4_window7_224",
         {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "out_indices": (0, 1), "strict_img_size": False}, 8),
    ],
)  # fmt: skip
def test_any_backbone_names_the_pixels_of_odd_sizes(name, args, pad_to):
    torch.manual_seed(0)
    options = {"num_classes": 5, "img_size": 64, "head": {"width": 16, "pad_to": pad_to}}
    model = make_segmenter({"name": name, "args": args}, **options)
    images = torch.randn(2, 3, 45, 67)
    logits = model(images)
    assert logits.shape == (2, 5, 45, 67)
    logits.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in missing if n.startswith("head.")]
    moved = model.eval()(images) - model(images.roll(8, -1))
    assert moved.abs().max() > 1e-4, "it sees the image"


def test_heads_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="width=12 must be a multiple of 8, at least 16"):
        PyramidHead([8], 2, width=12)
    with pytest.raises(ValueError, match="width=8 must be"):
        PyramidHead([8], 2, width=8)
    with pytest.raises(ValueError, match=r"channels=\[\]"):
        PyramidHead([], 2)
    with pytest.raises(ValueError, match=r"task.head=\{'depth': 3\} has 'depth'; accepted are width, dropout, pad_to"):
        make_segmenter({"name": "test_resnet"}, num_classes=2, head={"depth": 3})
    with pytest.raises(ValueError, match="pad_to=0"):
        Segmenter(timm.create_model("test_resnet", features_only=True), 2, pad_to=0)


def test_the_losses_of_masks_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(-1, 2, (2, 4, 5), generator=generator)  # no pixel of class 2
    rows, labels = logits.permute(0, 2, 3, 1)[masks != PADDING], masks[masks != PADDING]
    ce = F.cross_entropy(rows, labels)
    torch.testing.assert_close(MaskLoss("ce")(logits, masks), ce)
    shares = rows.softmax(1)
    dice = [2 * shares[labels == c, c].sum() / (shares[:, c].sum() + (labels == c).sum()) for c in (0, 1)]
    torch.testing.assert_close(dice_loss(logits, masks), 1 - (dice[0] + dice[1]) / 2)
    torch.testing.assert_close(MaskLoss("ce_dice")(logits, masks), ce + 1 - (dice[0] + dice[1]) / 2)
    weighted = MaskLoss("ce", weights=[1.0, 3.0, 1.0], smoothing=0.1)
    torch.testing.assert_close(
        weighted(logits, masks),
        F.cross_entropy(rows, labels, weight=torch.tensor([1.0, 3, 1]).double(), label_smoothing=0.1),
    )
    torch.testing.assert_close(weighted(logits, masks, plain=True), ce)
    assert torch.autograd.gradcheck(lambda x: MaskLoss("ce_dice")(x, masks), logits)
    assert MaskLoss("ce_dice")(logits, torch.full_like(masks, PADDING)).item() == 0


def test_tables_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, 500), rng.integers(0, 4, 500)
    matrix = torch.zeros(5, 5, dtype=torch.long)
    np.add.at(matrix.numpy(), (truth, found), 1)
    rows = per_class(matrix, "abcde")
    assert [row["iou"] for row in rows[:4]] == pytest.approx(jaccard_score(truth, found, average=None, labels=range(4)))
    assert rows[4]["iou"] is None and rows[3]["recall"] is None
    assert summarize(matrix, "abcde")["miou"] == pytest.approx(np.mean([row["iou"] for row in rows[:4]]))
    assert paint(torch.tensor([[0, 1, PADDING]]), 2).tolist() == [[[0, 0, 0], [128, 0, 0], [255, 255, 255]]]
    assert palette(5) == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]


# runs

SHORT = (
    "experiment=shapes_segmentation", "data.img_size=32", "data.test_length=12", "data.val_length=6", "logger=none",
    "task.head.width=16", "data.batch_size=8", "trainer.enable_progress_bar=false", "callbacks.progress=null",
)  # fmt: skip


SMALL = "model.args={depths:[1,1,1],embed_dim:16,num_heads:[1,2,4]}"


def foveal_(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_run_is_measured_used_and_told(tmp_path):
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    train.train(configure(run, *SHORT, "trainer.max_epochs=1", "data.train_length=24", SMALL, tiny=False))
    rows = list(csv.DictReader((run / "per_class.csv").open()))
    assert [row["class"] for row in rows] == ["ground", "disc", "square", "triangle"]
    for name in ("curves.png", "predictions.png", "confusion.png"):
        assert Image.open(run / name).width > 300
    ended = json.loads((run / "environment.json").read_text())[-1]["ended"]["metrics"]
    opened = open_segmenter(run)
    data = Shapes(img_size=32, test_length=12)
    for i, pair in enumerate(data.pairs_of("test")):
        image, labels = data.read(pair)
        for kind, picture in (("images", image), ("masks", Image.fromarray(labels.astype(np.uint8)))):
            (pictures / kind).mkdir(parents=True, exist_ok=True)
            picture.save(pictures / kind / f"{i}.png")
    told = json.loads(foveal_("eval", run, pictures, "--json", "--out", tmp_path / "eval").stdout)
    assert told["miou"] == pytest.approx(100 * ended["test/miou"], abs=0.01) and told["num_images"] == 12
    assert told["acc"] == pytest.approx(100 * ended["test/acc"], abs=0.01)
    assert "mIoU" in foveal_("eval", run, pictures, "--out", tmp_path / "eval").stdout
    masks = json.loads(foveal_("predict", run, pictures / "images", "--masks", tmp_path / "m", "--json").stdout)[
        "masks"
    ]
    assert len(masks) == 12
    with Image.open(tmp_path / "m" / "3.png") as mask, Image.open(pictures / "images" / "3.png") as image:
        assert mask.mode == "P" and mask.size == image.size
        np.testing.assert_array_equal(np.asarray(mask), opened.predict(image).numpy())
    assert "pass --masks FOLDER" in foveal_("predict", run, pictures / "images", code=2).stderr
    assert "go to OUT.onnx or OUT.pt2" in foveal_("export", run, tmp_path / "model", code=2).stderr
    (pictures / "masks" / "0.png").write_bytes(b"no")
    found = evaluate_masks(open_segmenter(run, eval_size=40), find_pairs(pictures))
    assert found.num_images == 11 and len(found.unreadable) == 1 and found.confusion.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_run_becomes_a_file_for_other_programs(suffix, tmp_path):
    run, file = tmp_path / "run", tmp_path / f"shapes.{suffix}"
    train.train(configure(run, *SHORT, "trainer.max_epochs=1", "data.train_length=8", SMALL, tiny=False))
    told = json.loads(foveal_("export", run, file, "--dynamic", "batch", "--json").stdout)
    assert told["dynamic"] == "batch" and told["difference"] < 1e-3
    opened, images = open_segmenter(run), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if suffix == "pt2":
        found = {"foveal.json": ""}
        logits = torch.export.load(file, extra_files=found).module()(images)
        about = json.loads(found["foveal.json"])
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        about = session.get_modelmeta().custom_metadata_map
    torch.testing.assert_close(logits, opened.model(images).detach(), rtol=1e-3, atol=1e-4)
    assert logits.shape == (3, 4, 32, 32) and json.loads(about["targets"]) == "masks"
    assert json.loads(about["class_names"]) == ["ground", "disc", "square", "triangle"]


@pytest.mark.slow
def test_it_learns_eight_pictures_by_heart(tmp_path):
    options = ("debug=overfit", "trainer.max_epochs=80", "task.optimizer.lr=1e-2", SMALL)
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *options, tiny=False))
    trainer.fit(task, datamodule=data)
    task.eval()
    images, masks = next(iter(data.train_dataloader()))
    shares = masks[masks != PADDING].bincount(minlength=4) / (masks != PADDING).sum()
    constant = -(shares * shares.clamp(min=1e-9).log()).sum()  # the least loss that does not look
    assert trainer.callback_metrics["train/loss"] < constant / 4
    with torch.no_grad():
        right = (task(images).argmax(1) == masks)[masks > 0]  # the ground is most of it
    assert right.float().mean() > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("task=segmentation",),
            "data.targets=class needs task=classification; task=segmentation trains on data.targets",
        ),
        (("data=shapes",), "data.targets=masks needs task=segmentation"),
        (("data=shapes", "task=segmentation", "task.loss=bce"), "task.loss='bce' is not known"),
        (("data=shapes", "task=segmentation", "task.class_weights=[1,2]"), "or 4 numbers"),
        (("data=shapes", "task=segmentation", "task.class_weights=balanced"), "give a number for each class"),
    ],
)
def test_data_and_task_have_to_agree(tmp_path, options, message):
    with pytest.raises(Exception, match=message):
        train.build(configure(tmp_path, *options))


def test_sizes_that_a_model_does_not_take_are_named(tmp_path):
    args = "model.args={img_size:32,patch_size:8,embed_dim:16,depth:3,num_heads:2}"
    options = ("model=timm", "model.name=vit_tiny_patch16_224", args, "trainer.max_epochs=1")
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *options, tiny=False))
    with pytest.raises(ValueError, match=r"takes no image of \d+x\d+ pixels .* try task.head.pad_to=32"):
        trainer.fit(task, datamodule=data)


@pytest.mark.slow
def test_the_experiment_finds_shapes_on_parts_it_has_not_seen(tmp_path):
    value = train.train(configure(tmp_path, "experiment=shapes_segmentation", tiny=False))
    assert value > 0.8
