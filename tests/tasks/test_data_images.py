"""Image folders as people have them: classes and splits, tables of labels, files that are no images."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from foveal.zoo.data import ImageFolder, TimmDataset
from foveal.zoo.data.classes import ClassTable
from foveal.zoo.data.loader import PADDING
from foveal.zoo.data.unreadable import Receiver
from image_folders import both, write, write_damaged


def opened(root: Path, **options) -> ImageFolder:
    data = ImageFolder(root=str(root), **{"batch_size": 2, "img_size": 16, "num_workers": 0} | options)
    data.setup()
    return data


def labels(data: ImageFolder, split: str) -> dict[str, int]:
    """Label by file, from the root."""
    dataset = data.datasets[split]
    return {dataset.filename(i): dataset[i][1] for i in range(len(dataset))}


@pytest.mark.parametrize(
    ("names", "ordered"),
    [(("10", "2", "1"), ["1", "2", "10"]), (("c", "B", "a"), ["a", "B", "c"]), (("x10y", "x9"), ["x9", "x10y"])],
)
def test_classes_have_the_natural_order_of_timm(tmp_path, names, ordered):
    data = opened(write(tmp_path, *both(*names)))
    assert data.class_names == ordered
    for split in ("train", "val", "test"):
        for file, label in labels(data, split).items():
            assert data.class_names[label] == Path(file).parent.name
    timms = TimmDataset(name="", root=str(tmp_path), batch_size=1, num_classes=len(names), img_size=16, num_workers=0)
    timms.setup()
    assert timms.class_names == ordered


def test_training_numbers_the_classes_of_every_split(tmp_path):
    write(tmp_path, *both("a", "b", "c"), "test/c/0.png")
    (tmp_path / "val/a/0.png").unlink()
    with pytest.warns(UserWarning) as said:
        data = opened(tmp_path)
    assert labels(data, "val") == {"val/b/0.png": 1, "val/c/0.png": 2}
    assert labels(data, "test") == {"test/c/0.png": 2}
    sentences = [str(warning.message) for warning in said]
    assert any(f"{tmp_path}/val has no val images of 1 of 3 classes: a" in sentence for sentence in sentences)
    assert any(f"{tmp_path}/test has no test images of 2 of 3 classes: a, b" in sentence for sentence in sentences)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_without_training_images_is_refused(tmp_path, split):
    write(tmp_path, *both("a", "b"), f"{split}/d/0.png")
    with pytest.raises(ValueError, match=rf"{tmp_path}/{split} has images of d, which training does not have: .* a, b"):
        opened(tmp_path)


def test_every_reader_gets_the_table(tmp_path):
    """torchvision's numbers each split for itself."""
    write(tmp_path, *both("ant", "bee", "cat"))
    for file in (tmp_path / "val/ant").iterdir():
        file.unlink()
    (tmp_path / "val/ant").rmdir()
    options = {"root": str(tmp_path), "batch_size": 1, "img_size": 16, "num_workers": 0, "num_classes": 3}
    for name in ("torch/image_folder", ""):
        data = TimmDataset(name=name, **options)
        with pytest.warns(UserWarning, match="data.val_split='validation' of .* has no images of 1 of 3 classes: ant"):
            data.setup()
        assert [target for _, target in data.datasets["val"]] == [1, 2]
        assert [target for _, target in data.datasets["train"]] == [0, 1, 2]
        assert data.class_names == ["ant", "bee", "cat"]
        with pytest.raises(ValueError, match=r"data\.num_classes=4, and data\.train_split='train' of .* has 3 classes"):
            TimmDataset(name=name, **options | {"num_classes": 4}).setup()


def test_numbers_of_another_run_can_be_kept(tmp_path):
    write(tmp_path, *both("a", "b"))
    with pytest.warns(UserWarning, match="has no train images of 1 of 3 classes: gone"):
        data = opened(tmp_path, class_names=["b", "gone", "a"])
    assert set(labels(data, "train").values()) == {0, 2} and data.num_classes == 3
    assert data.for_record == {"class_names": ["b", "gone", "a"]}


def test_what_is_no_class(tmp_path):
    """Hidden and empty folders, images beside the folders; files of other kinds are counted."""
    write(tmp_path, *both("a", "b"), "train/loose.png", "train/.ipynb_checkpoints/x.png", "train/a/.hidden.png")
    for folder in ("train/.git", "train/empty", "train/deep/empty"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("train/a/notes.txt", "train/b/1.heic", "train/b/2.HEIC", "train/b/Thumbs.db", "train/b/.DS_Store"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.warns(UserWarning) as said:
        data = opened(tmp_path)
    assert data.class_names == ["a", "b"] and len(data.datasets["train"]) == 2
    sentences = "\n".join(str(warning.message) for warning in said)
    assert f"in {tmp_path}/train are folders without images, which are no classes: deep, empty" in sentences
    assert f"in {tmp_path}/train are images in no folder of a class, which are left out: 1" in sentences
    assert f"in {tmp_path}/train are files that are no images, which are left out: .heic (2), .txt (1)" in sentences


def test_the_first_folder_names_the_class(tmp_path):
    write(tmp_path, "train/a/monday/1.png", "train/a/tuesday/x/2.png", "train/b/monday/3.png", *both("a", "b"))
    (tmp_path / "train/a/circle").symlink_to(tmp_path / "train")
    (tmp_path / "train/c").symlink_to(tmp_path / "train/b")
    with pytest.warns(UserWarning, match="has no val images of 1 of 3 classes: c"):
        data = opened(tmp_path)
    assert data.class_names == ["a", "b", "c"]
    assert labels(data, "train") == {
        "train/a/0.png": 0,
        "train/a/monday/1.png": 0,
        "train/a/tuesday/x/2.png": 0,
        "train/b/0.png": 1,
        "train/b/monday/3.png": 1,
        "train/c/0.png": 2,
        "train/c/monday/3.png": 2,
    }


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "WebP", "bmp", "tif", "TIFF", "gif", "ppm", "tga"])
def test_files_of_every_kind_are_used(tmp_path, suffix):
    write(tmp_path, *both("a", "b"), *(f"{split}/a/1.{suffix}" for split in ("train", "val")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = opened(tmp_path)
    assert labels(data, "train")[f"train/a/1.{suffix}"] == 0 and len(data.datasets["val"]) == 3


def test_a_class_called_train(tmp_path):
    data = opened(write(tmp_path / "splits", *both("bus", "train", "val")))
    assert data.class_names == ["bus", "train", "val"]
    assert labels(data, "val") == {"val/bus/0.png": 0, "val/train/0.png": 1, "val/val/0.png": 2}
    data = opened(write(tmp_path / "classes", *(f"{name}/{i}.png" for name in ("bus", "train") for i in range(4))))
    assert data.class_names == ["bus", "train"]
    assert sum(len(data.datasets[split]) for split in ("train", "val")) == 8


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/monday/0.png", "bus/0.png"], "train may be the training split or a class beside bus"),
        (["train/0.png", "val/0.png"], r"train, val hold no images in folders of classes; .* data\.labels=FILE\.csv"),
        (["train/a/0.png", "train/b/0.png", "val/0.png"], "val holds no images in folders of classes"),
        (["val/a/0.png", "images/a/0.png"], "no folder for the split 'train'; it holds images, val"),
        (["0.png"], "holds no images in folders of classes"),
        (["only/0.png", "only/1.png"], "has images of one class, 'only'"),
        (["a/0.png", "b/0.png"], "leaves nothing to validate on: a class needs two images"),
    ],
)
def test_folders_that_mean_two_things_or_nothing(tmp_path, paths, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened(write(tmp_path, *paths))


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("training", "eval"), ("TRAIN", "Validation")])
def test_split_folders_in_any_case(tmp_path, train, val):
    data = opened(write(tmp_path, f"{train}/a/0.png", f"{train}/b/0.png", f"{val}/a/0.png", f"{val}/b/0.png"))
    assert set(labels(data, "val")) == {f"{val}/a/0.png", f"{val}/b/0.png"}


def split_of(root: Path, **options) -> dict[str, set[str]]:
    data = opened(root, **options)
    return {split: set(labels(data, split)) for split in ("train", "val")}


def test_a_folder_without_splits_is_split_by_the_names_of_its_files(tmp_path):
    files = [f"{name}/{i}.png" for name in ("a", "b") for i in range(60)]
    write(tmp_path, *files[::2], "rare/0.png", "rare/1.png", "single/0.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the class with a single image
        first = split_of(tmp_path, val_fraction=0.25)
        assert first["train"] | first["val"] == {*files[::2], "rare/0.png", "rare/1.png", "single/0.png"}
        assert not first["train"] & first["val"] and "single/0.png" in first["train"]
        per_class = {name: sum(file.startswith(name) for file in first["val"]) for name in ("a", "b", "rare")}
        assert per_class["rare"] == 1 and 3 <= per_class["a"] <= 14 and 3 <= per_class["b"] <= 14
        assert split_of(tmp_path, val_fraction=0.25, seed=5) == first
        assert split_of(tmp_path, val_fraction=0.25, split_seed=1) != first
        write(tmp_path, *files[1::2])
        more = split_of(tmp_path, val_fraction=0.25)
    assert first["train"] <= more["train"] and {file for file in first["val"] if file[0] in "ab"} <= more["val"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert split_of(moved, val_fraction=0.25) == more


def test_what_is_trained_on_is_never_validated_on_because_others_came(tmp_path):
    """Also in classes so small that one image is held out against its hash."""
    write(tmp_path, *(f"{name}/{i}.png" for name in ("a", "b") for i in range(3)))
    before = split_of(tmp_path, val_fraction=0.01)
    for count in (5, 9, 20):
        write(tmp_path, *(f"{name}/{i}.png" for name in ("a", "b") for i in range(count)))
        after = split_of(tmp_path, val_fraction=0.01)
        assert before["train"] <= after["train"]
        before = after


def test_training_images_stand_in_where_there_are_none_to_validate_on(tmp_path):
    write(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(20)))
    with pytest.warns(UserWarning, match=r"no folder for the split 'val': \d+ of 40 images of .*train are held out"):
        data = opened(tmp_path)
    assert set(labels(data, "train")) | set(labels(data, "val")) == {
        f"train/{n}/{i}.png" for n in "ab" for i in range(20)
    }
    assert not set(labels(data, "train")) & set(labels(data, "val"))


def table(root: Path, text: str, encoding: str = "utf-8") -> Path:
    (root / "labels.csv").write_text(text, encoding=encoding)
    return root


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("file,label,split\nx/0.png,2,train\nx/1.png,10,training\nx/2.png,10,VAL\nx/3.png,2,val\n", "utf-8"),
        (
            "File;Label;Split\r\nx/0.png;2;train\r\nx/1.png;10;train\r\nx/2.png;10;val\r\nx/3.png;2;val\r\n\r\n",
            "utf-8-sig",
        ),
        ("label\tfile_name\tsplit\n2\tx\\0.png\ttrain\n10\tx/1.png\ttrain\n10\tx/2.png\tval\n2\tx/3.png\tval", "utf-8"),
    ],
    ids=["commas", "excel", "tabs"],
)
def test_a_table_of_labels(tmp_path, text, encoding):
    write(tmp_path, *(f"x/{i}.png" for i in range(5)))
    data = opened(table(tmp_path, text, encoding))
    assert data.class_names == ["2", "10"]
    assert labels(data, "train") == {"x/0.png": 0, "x/1.png": 1}
    assert labels(data, "val") == labels(data, "test") == {"x/2.png": 1, "x/3.png": 0}
    named = opened(tmp_path, labels=str(tmp_path / "labels.csv"))
    assert labels(named, "train") == labels(data, "train")


def test_a_table_without_splits_is_split_by_the_names_of_its_files(tmp_path):
    files = [f"{i}.png" for i in range(40)]
    rows = [f"{file},{'odd' if int(file[:-4]) % 2 else 'even'}" for file in files]
    data = opened(table(write(tmp_path, *files), "\n".join(["file,label", *rows])), val_fraction=0.2)
    assert set(labels(data, "train")) | set(labels(data, "val")) == set(files)
    assert not set(labels(data, "train")) & set(labels(data, "val"))
    assert set(labels(data, "val").values()) == {0, 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\n0.png,a\n9.png,b\n",
            r"1 of 2 files of data\.labels=.* do not exist, the first is .*9\.png \(line 3\)",
        ),
        ("file,label\n0.png,a\n1.png,\n", r"line 3: the column label is empty"),
        ("file,name\n0.png,a\n", r"line 2: the column label is missing; there are file, name"),
        ("file,label,split\n0.png,a,train\n1.png,b,dev\n", r"line 3: split='dev' must be one of train, val, test"),
        ("file,label\n0.png,a\n1.png,b\n0.png,b\n", r"line 4: 0\.png has another label or split further up"),
        ("file,label,split\n0.png,a,train\n1.png,b,train\n0.png,a,val\n", r"line 4: 0\.png has another label or split"),
        (
            "file,label,split\n0.png,a,train\n1.png,b,train\n2.png,d,val\n",
            r"labels\.csv has images of d, which training",
        ),
        ("file,label,split\n0.png,a,val\n", r"has no rows to train on"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    write(tmp_path, *(f"{i}.png" for i in range(3)))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(table(tmp_path, text), labels="labels.csv")


def test_a_table_that_is_no_text(tmp_path):
    write(tmp_path, "0.png")
    (tmp_path / "t.csv").write_bytes("file,label\n0.png,Mäuse\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv' is no table of text in UTF-8"):
        opened(tmp_path, labels="t.csv")


def test_folders_of_classes_come_before_a_table_that_nobody_named(tmp_path):
    write(tmp_path, *both("a", "b"), "x/0.png")
    data = opened(table(tmp_path, "file,label\nx/0.png,c\n"))
    assert data.class_names == ["a", "b"]
    write(tmp_path / "classes", *(f"{name}/{i}.png" for name in "ab" for i in range(2)))
    with pytest.warns(UserWarning, match=r"labels\.csv has no columns file and label"):
        data = opened(table(tmp_path / "classes", "id,breed\n0,c\n"))
    assert data.class_names == ["a", "b"]


@pytest.fixture
def damaged(tmp_path) -> Path:
    return write_damaged(tmp_path)


AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}


def quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def test_unreadable_images_do_not_count_in_evaluation(damaged):
    data = opened(damaged)
    with pytest.warns(
        UserWarning, match=r"image of val cannot be read and does not count: .*val/ant/0\.jpg: it is empty"
    ):
        batches = list(data.val_dataloader())
    assert torch.cat([targets for _, targets in batches]).tolist() == [PADDING] * 3 + [1, 1, 1]
    assert {images.shape for images, _ in batches} == {(2, 3, 16, 16)}
    assert {Path(file).name for file in data.unreadable["val"]} == {"0.jpg", "1.jpg", "2.jpg"}
    reasons = " ".join(data.unreadable["val"].values())
    assert "it is empty or no image" in reasons and "runcated" in reasons
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is said once
        list(data.val_dataloader())


def test_unreadable_images_leave_the_order_and_the_augmentation_of_the_others(damaged):
    """With any number of workers, and from any batch on."""
    whole, workers = (
        quiet(lambda n=n: [b for b in opened(damaged, train_transform=AUGMENTED, num_workers=n).train_dataloader()])
        for n in (0, 2)
    )
    assert [len(targets) for _, targets in whole] != [2] * 6 and sum(len(targets) for _, targets in whole) == 9
    assert torch.cat([targets for _, targets in whole]).sort().values.tolist() == [0] * 3 + [1] * 6
    for ours, theirs in zip(whole, workers, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    for file in ("0", "1", "2"):  # repaired, the others are what they were
        os.link(damaged / "train/ant/3.jpg", damaged / "train/ant/x.jpg")
        os.replace(damaged / "train/ant/x.jpg", damaged / f"train/ant/{file}.jpg")
    repaired = torch.cat([b[0] for b in opened(damaged, train_transform=AUGMENTED).train_dataloader()])
    kept = torch.cat([images for images, _ in whole])
    assert all((repaired == image).flatten(1).all(1).any() for image in kept)
    data = opened(damaged, train_transform=AUGMENTED)
    batches = iter(data.train_dataloader())
    next(batches), next(batches)
    again = opened(damaged, train_transform=AUGMENTED)
    again.load_state_dict(data.state_dict())
    assert torch.equal(torch.cat([b[0] for b in again.train_dataloader()]), repaired[4:])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_readable_image_is_one_sentence(damaged, split):
    for file in (damaged / split).rglob("*.jpg"):
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    loader = getattr(opened(damaged), f"{split}_dataloader")()
    with pytest.raises(ValueError, match=rf"none of \d+ {split} images in a row can be read; the first is .*: it is"):
        quiet(lambda: list(loader))


def test_readers_are_told_of_files_that_are_gone(damaged):
    data = opened(damaged)
    (damaged / "val/bee/0.jpg").unlink()
    quiet(lambda: list(data.val_dataloader()))
    assert data.unreadable["val"][str(damaged / "val/bee/0.jpg")] == "No such file or directory"


def test_torchvisions_folders_do_not_count_them_either(damaged):
    options = {"root": str(damaged), "batch_size": 2, "img_size": 16, "num_workers": 0, "num_classes": 2}
    data = TimmDataset(name="torch/image_folder", **options)
    data.setup()
    targets = quiet(lambda: torch.cat([targets for _, targets in data.val_dataloader()]))
    assert targets.tolist() == [PADDING] * 3 + [1, 1, 1] and len(data.unreadable["val"]) == 3


def test_how_long_nothing_may_be_readable():
    class Broken(torch.utils.data.Dataset):
        def __getitem__(self, index):
            raise AssertionError("only asked for what is noted")

    def run(split, size, world, *batches):
        receive = Receiver(Broken(), split=split, size=size, world=world, reasons={"x": "why"})
        receive.known = set(range(10_000))
        for number, batch in enumerate(batches):
            try:
                receive([torch.zeros(len(batch), 1), torch.tensor(batch)])
            except ValueError:
                return number
        return None

    bad, good = [PADDING - 1] * 10, [0] * 10
    assert run("val", 30, 1, bad, bad, bad) == 2
    assert run("val", 30, 1, bad, bad, good, bad, bad) is None
    assert run("val", 10, 4, bad, bad) is None  # other ranks may have readable ones
    assert run("train", 10_000, 1, *[bad] * 20) == 9
    assert run("train", 10_000, 1, good, *[bad] * 200) == 100
    assert run("train", 20, 1, good, bad, bad, good) is None  # the end of an epoch and the begin of the next


def test_class_tables():
    names = ClassTable.of(["b", "A", "a10", "a9"])
    assert names.names == ("A", "a9", "a10", "b") and names.labels["a10"] == 2 and len(names) == 4
    assert names.relabel(("b", "A")) == (3, 0)
    with pytest.raises(ValueError, match="must name at least one class"):
        ClassTable(())
    with pytest.raises(ValueError, match="here has images of x, z, which training does not have"):
        names.check(["z", "A", "x"], where="here")
