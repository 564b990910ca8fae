"""Order, augmentation and resumption of the data, and the data modules built on them."""

import numpy as np
import pytest
import torch
from foveal.zoo.data import Digits, ImageFolder, TimmDataset
from foveal.zoo.data.digits import split_digits
from foveal.zoo.data.loader import PADDING, EpochSampler, ResumableLoader, SeededDataset, seeded
from PIL import Image
from torch.utils.data import Dataset


class Noise(Dataset):
    """Items that show every generator a transform could draw from."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        import random

        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([index, *drawn], dtype=torch.float64), index


def loader(*, batch_size=8, workers=0, shuffle=True, rank=0, world=1, seed=3) -> ResumableLoader:
    sampler = EpochSampler(50, batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world=world)
    return ResumableLoader(SeededDataset(Noise(), seed=seed), sampler, num_workers=workers)


def epoch(data: ResumableLoader, number: int) -> list[torch.Tensor]:
    data.epoch_sampler.set_epoch(number)
    return [images for images, _ in data]


def test_epochs_differ_and_repeat():
    first, second = epoch(loader(), 0), epoch(loader(), 1)
    assert len(first) == 6
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(epoch(loader(), 1), second, rtol=0, atol=0)
    other_seed = epoch(loader(seed=4), 0)
    assert not torch.equal(first[0], other_seed[0])
    every_draw = torch.cat(first)[:, 1:]
    assert every_draw.unique().numel() == every_draw.numel()


def test_workers_do_not_change_the_data():
    torch.testing.assert_close(epoch(loader(workers=2), 5), epoch(loader(), 5), rtol=0, atol=0)


def test_workers_start_in_the_epoch_that_lightning_sets_after_iter():
    data = loader(workers=1)
    batches = iter(data)
    data.epoch_sampler.set_epoch(4)
    torch.testing.assert_close(next(batches)[0], epoch(loader(), 4)[0], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_inside_an_epoch(workers):
    whole, data = epoch(loader(), 2), loader(workers=workers)
    data.epoch_sampler.set_epoch(2)
    batches = iter(data)
    for _ in range(3):
        next(batches)
    state = data.state_dict()
    resumed = loader(workers=workers)
    resumed.load_state_dict(state)
    torch.testing.assert_close(epoch(resumed, 2), whole[3:], rtol=0, atol=0)
    torch.testing.assert_close(epoch(resumed, 3), epoch(loader(), 3), rtol=0, atol=0)


def test_state_of_an_old_epoch_skips_nothing():
    resumed = loader()
    resumed.load_state_dict({"epoch": 2, "batches": 6, "global_batch": 8})
    assert len(epoch(resumed, 3)) == 6


def test_resume_inside_an_epoch_with_another_batch_size_is_refused():
    resumed = loader(batch_size=4)
    resumed.load_state_dict({"epoch": 0, "batches": 2, "global_batch": 8})
    with pytest.raises(ValueError, match=r"8 images a step.*takes 4"):
        epoch(resumed, 0)


def test_ranks_share_the_batches_of_one_process():
    whole = epoch(loader(batch_size=8), 1)
    ranks = [epoch(loader(batch_size=4, rank=rank, world=2), 1) for rank in range(2)]
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for one, *parts in zip(whole, *ranks, strict=True):
        merged = torch.cat(parts)
        torch.testing.assert_close(merged[merged[:, 0].argsort()], one[one[:, 0].argsort()], rtol=0, atol=0)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_evaluation_sees_everything_once_on_any_number_of_ranks(world):
    seen, steps = [], set()
    for rank in range(world):
        batches = list(loader(shuffle=False, rank=rank, world=world))
        steps.add(len(batches))
        seen += [target for _, targets in batches for target in targets.tolist() if target != PADDING]
    assert sorted(seen) == list(range(50))
    assert len(steps) == 1


def test_seeded_leaves_the_generators_alone():
    import random

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with seeded(1):
        random.random(), np.random.rand(), torch.rand(1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_digits_are_split_once_and_for_all():
    parts = {name: set(numbers) for name, (numbers, _) in split_digits().items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1257, "val": 180, "test": 360}
    assert len(set.union(*parts.values())) == 1797
    for _, targets in split_digits().values():
        counts = np.bincount(targets)
        assert counts.min() > 0.9 * counts.max() - 2
    assert sorted(parts["test"])[:8] == TEST_IMAGES


TEST_IMAGES = [21, 24, 28, 34, 35, 37, 39, 42]


def test_digits_batches():
    data = Digits(batch_size=16, seed=1)
    data.setup()
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (16, 1, 32, 32) and images.dtype == torch.float32
    assert targets.shape == (16,) and targets.dtype == torch.int64
    pixels = data.denormalize(images)
    assert pixels.min() >= 0 and 0.9 < pixels.max() <= 1
    test_images = torch.cat([images for images, _ in data.test_dataloader()])
    assert len(test_images) == 360


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for name in ("cat", "dog", "owl"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_image_folder(folder):
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}
    options = {"batch_size": 4, "img_size": 32, "train_transform": augment}
    data = ImageFolder(root=str(folder), num_workers=0, **options)
    assert data.for_task == {"num_classes": 3, "in_chans": 3, "img_size": 32, "class_names": ["cat", "dog", "owl"]}
    assert (data.num_classes, data.class_names) == (3, ["cat", "dog", "owl"])
    data.setup()
    batches = list(data.train_dataloader())
    assert [images.shape for images, _ in batches] == [(4, 3, 32, 32)] * 4
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 9
    with_workers = ImageFolder(root=str(folder), num_workers=2, **options)
    with_workers.setup()
    for (one, _), (two, _) in zip(batches, with_workers.train_dataloader(), strict=True):
        assert torch.equal(one, two)


def test_image_folder_errors(folder):
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        ImageFolder(root=None, batch_size=4)
    with pytest.raises(FileNotFoundError, match="'/no/such/folder' is not a folder"):
        ImageFolder(root="/no/such/folder", batch_size=4)
    (folder / "train").rename(folder / "trains")
    with pytest.raises(FileNotFoundError, match="no folder for the split 'train'; it holds trains, validation"):
        ImageFolder(root=str(folder), batch_size=4)
    (folder / "trains").rename(folder / "train")
    data = ImageFolder(root=str(folder), batch_size=40, img_size=32, num_workers=0)
    data.setup()
    with pytest.raises(ValueError, match="needs 40 training images, and there are 18"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_transform": {"crop_mod": 1}}, r"data\.train_transform=.*crop_mod"),
        ({"train_transform": {"auto_augment": "rand-m9-z3"}}, r"data\.train_transform=.*Unknown RandAugment"),
        ({"train_transform": {"separate": True}}, r"data\.train_transform="),
        ({"eval_transform": {"normalize": False}}, r"data\.eval_transform=.* makes torch\.uint8 of \[3, 224, 224\]"),
        ({"mean": (0.5, 0.5)}, r"data\.mean=\[0\.5, 0\.5\] must have one value for grey images or three"),
        ({"mean": (0.5,)}, r"data\.std=.* must have as many values as data\.mean=\[0\.5\]"),
        ({"std": (0.2, 0.2, 0.0)}, r"data\.std=.* each above zero"),
        ({"img_size": 0}, r"data\.img_size=0 must be"),
        ({"num_workers": -1}, r"data\.num_workers=-1 must be at least 0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 must be above 0 and below 1"),
        ({"num_classes": 4}, r"data\.num_classes=4, and .*train has 3 classes: cat, dog, owl"),
        ({"labels": "none.csv"}, r"data\.labels='none\.csv' does not exist"),
        ({"class_names": ["cat", "dog"]}, r"train has images of owl, which data\.class_names does not have"),
        ({"class_names": ["cat", "dog", "cat", "owl"]}, r"data\.class_names names 'cat' twice"),
    ],
)
def test_image_folder_refuses(folder, arguments, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        ImageFolder(root=str(folder), batch_size=4, **arguments)


def test_timm_datasets(folder):
    options = {"root": str(folder), "batch_size": 4, "num_classes": 3, "img_size": 32, "num_workers": 0}
    data = TimmDataset(name="torch/image_folder", **options)
    data.setup()
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32) and targets.max() < 3
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch/cifar11", "did you mean 'torch/cifar10'"),
        ("hfd/food101", "did you mean 'hfds/food101'"),
        ("digits", "data.name='digits' is not known"),
        ("tfds/mnist", "pip install tensorflow_datasets"),
        ("torch/cifar10", "data.root='/no/such/folder' does not exist"),
    ],
)
def test_timm_dataset_errors(name, message):
    with pytest.raises((ValueError, ImportError, FileNotFoundError), match=message):
        TimmDataset(name=name, root="/no/such/folder", batch_size=4, num_classes=10)
