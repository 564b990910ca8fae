"""Bags: folders and files of instances, batches with padding, a run that finds the digit, wrong options."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from foveal import train
from foveal.zoo.data.bags import BagFolder, DigitBags, pad_bags, read_features
from image_folders import write
from safetensors.torch import save_file
from train_helpers import configure

SHORT = ("task=bags", "callbacks=bags", "metric=val/auroc", "callbacks.ema=null", "logger=none")


def test_bags_of_digits():
    data = [DigitBags(seed=s, train_length=8, batch_size=8) for s in (0, 1)]
    for some in data:
        some.setup()
    instances, labels, mask, marks = next(iter(data[0].train_dataloader()))
    assert instances.shape == (8, 20, 1, 8, 8) and mask.all() and labels.sum() == 4
    assert torch.equal(marks.any(1).long(), labels) and marks.sum(1).max() <= 2
    one, two = (x.datasets["test"][5] for x in data)  # bags do not depend on the seed of a run
    assert torch.equal(one[0], two[0])
    sums = [{tuple(x.flatten().tolist()) for x in data[0].datasets[s][1][0]} for s in ("train", "test")]
    assert not sums[0] & sums[1]
    assert data[0].class_counts == [4, 4] and data[0].class_names == ["no 9", "a 9"]


def test_batches_are_padded():
    bags = [(torch.ones(2, 3), 1, None), (2 * torch.ones(4, 3), 0, None)]
    instances, labels, mask = pad_bags(bags)
    assert instances.shape == (2, 4, 3) and labels.tolist() == [1, 0] and mask.sum(1).tolist() == [2, 4]
    assert instances[0, 2:].eq(0).all() and mask[0].tolist() == [True, True, False, False]


def make_files(root: Path, suffix: str) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                x, path = np.random.default_rng(i).normal(size=(4 + i, 6)), root / split / name / f"{i}{suffix}"
                WRITERS[suffix](path, x)
    return root


class H5File(dict):
    """What h5py's `File` is to a reader of whole datasets, over an archive of NumPy."""

    def __init__(self, path: str, mode: str):
        assert mode == "r"
        super().__init__(np.load(path))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def write_h5(path: Path, x: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, features=x, coords=np.zeros((2, 2)))


WRITERS = {
    ".npy": np.save,
    ".npz": lambda path, x: np.savez(path, features=x, coords=np.zeros((2, 2))),
    ".pt": lambda path, x: torch.save({"features": torch.from_numpy(x)}, path),
    ".safetensors": lambda path, x: save_file({"features": torch.from_numpy(x), "coords": torch.zeros(2, 2)}, path),
    ".h5": write_h5,
}


@pytest.fixture
def h5py(monkeypatch):
    """A stand-in for the package, which is not installed here."""
    module = ModuleType("h5py")
    module.File, module.__spec__ = H5File, ModuleSpec("h5py", None)
    monkeypatch.setitem(sys.modules, "h5py", module)


@pytest.mark.usefixtures("h5py")
@pytest.mark.parametrize("suffix", WRITERS)
def test_bags_of_features(suffix, tmp_path):
    data = BagFolder(root=str(make_files(tmp_path, suffix)), batch_size=6, instances=5, num_workers=0)
    data.setup()
    instances, labels, mask = next(iter(data.train_dataloader()))
    assert instances.shape == (6, 5, 6) and sorted(mask.sum(1).tolist()) == [4, 4, 5, 5, 5, 5] and labels.sum() == 3
    assert next(iter(data.val_dataloader()))[0].shape == (4, 5, 6)
    assert data.for_task["instance"] == [6] and data.class_names == ["a", "b"]
    np.save(tmp_path / "train" / "a" / "wide.npy", np.ones((3, 7)))
    wide = BagFolder(root=str(tmp_path), batch_size=7, num_workers=0)
    wide.setup()
    if suffix == ".npy":
        with pytest.raises(ValueError, match="7 channels, and others have 6"):
            next(iter(wide.train_dataloader()))


def test_bags_of_images(tmp_path):
    names = [f"{kind}/{bag}/{i}.png" for kind in "ab" for bag in range(4) for i in range(bag + 1)]
    write(tmp_path, *names)
    (tmp_path / "a" / "3" / "2.png").write_bytes(b"no image")
    data = BagFolder(root=str(tmp_path), batch_size=1, img_size=16, mean=(0.5,), std=(0.5,), num_workers=0)
    data.setup()
    sizes = {bag[0]: len(data.datasets["train"][i][0]) for i, bag in enumerate(data.listing.images["train"])}
    assert all(n == 3 if path.endswith("a/3") else n == int(Path(path).name) + 1 for path, n in sizes.items())
    assert data.datasets["train"][0][0].shape[1:] == (1, 16, 16)
    assert set(data.listing.images["val"]).isdisjoint(data.listing.images["train"])


def test_wrong_bags(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        BagFolder(root=None)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        BagFolder(root=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no bags"):
        BagFolder(root=str(tmp_path))
    np.save(tmp_path / "flat.npy", np.ones(3))
    with pytest.raises(ValueError, match="instances, channels"):
        read_features(str(tmp_path / "flat.npy"))
    torch.save({"other": torch.ones(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"data\.key='features'"):
        read_features(str(tmp_path / "other.pt"))
    make_files(tmp_path / "h5", ".h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"0\.h5 is read by the package h5py, .* or store .*\.npz, \.pt"):
        BagFolder(root=str(tmp_path / "h5"))
    with pytest.raises(ValueError, match=r"data\.digit=11"):
        DigitBags(digit=11)


@pytest.mark.slow
def test_a_trunk_of_images_stays_frozen(tmp_path):
    options = (
        "data=digit_bags", "task.head.name=spa", "task.mark_weight=1.0", "task.head.inner=16",
        "+task.trunk={name:vit_tiny_patch16_224,args:{img_size:8,patch_size:4,embed_dim:16,depth:1,num_heads:2}}",
        "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.max_epochs=1",
    )  # fmt: skip
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *options, tiny=False))
    task.configure_model()
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    trainer.fit(task, datamodule=data)
    moved = {n for n, p in task.model.named_parameters() if not p.equal(before[n])}
    assert moved and all(n.startswith("head.") for n in moved) and not task.model.trunk.training
    names = ("loss", "acc1", "auroc", "f1", "entropy", "top", "instance_auroc")
    assert all(torch.isfinite(trainer.callback_metrics[f"val/{name}"]) for name in names)


@pytest.mark.slow
def test_report_and_the_warning_of_equal_weights(tmp_path):
    few = ("data=digit_bags", "data.train_length=8", "data.val_length=8", "data.test_length=8", "trainer.max_epochs=2")
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *few, tiny=False))
    with pytest.warns(UserWarning, match="nearly alike"):
        trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    for name in ("bags.png", "confusion.png", "per_class.csv", "curves.png", "metrics.csv"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("task.head.name=abmill", "abmil"),
        ("+task.head.depth=3", "does not work"),
        ("task.mark_weight=1.0", "whose gate selects"),
        ("task.loss=hinge", "loss"),
    ],
)
def test_wrong_options(wrong, message, tmp_path):
    with pytest.raises(Exception, match=message):
        train.build(configure(tmp_path, *SHORT, "data=digit_bags", wrong, tiny=False))[1].configure_model()


def test_a_mean_has_no_attention_to_measure(tmp_path):
    config = configure(tmp_path, *SHORT, "data=digit_bags", "task.head.name=mean", tiny=False)
    assert {n for n in train.build(config)[1].metrics if n.startswith("val")} == {
        "val_loss", "val_acc1", "val_auroc", "val_f1",
    }  # fmt: skip
