"""Backbones on images of unequal sizes, from timm's NaFlex loader and as lists."""

import foveal.zoo  # noqa: F401  registers the models
import numpy as np
import pytest
import timm
import torch
from foveal.zoo.naflex import NaFlexModel
from PIL import Image
from timm.data import create_naflex_loader
from timm.data.naflex_transforms import patchify_image

SIZES = [(48, 80), (64, 64), (48, 80), (80, 48), (64, 48)]


class Pictures(torch.utils.data.Dataset):
    """Noise of several aspect ratios."""

    def __init__(self, count: int):
        self.count, self.transform = count, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        height, width = SIZES[i % len(SIZES)]
        pixels = np.random.default_rng(i).integers(0, 255, (2 * height, 2 * width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        return (image if self.transform is None else self.transform(image)), i % 3


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_natten_dinat", num_classes=3).eval()


def as_patches(images, *, longest: int, channels_last: bool = True, flat: bool = True) -> dict[str, torch.Tensor]:
    """Patches of 8 x 8 of images, with what follows the last one of an image."""
    found = {"patches": [], "patch_coord": [], "patch_valid": []}
    for image in images:
        pieces = patchify_image(image, (8, 8), flatten_patches=flat, channels_last=channels_last)
        shuffled = torch.randperm(longest)
        for name, x in zip(found, pieces, strict=True):
            padded = torch.cat((x, x.new_ones(longest - len(x), *x.shape[1:]) * (name != "patch_valid")))
            found[name].append(padded[shuffled])
    return {name: torch.stack(x) for name, x in found.items()}


@pytest.mark.parametrize("form", ["list", "patches", "channels first", "unflattened"])
def test_every_image_as_if_alone(model, form):
    images = [torch.randn(3, *size) for size in SIZES]
    first, flat = form == "channels first", form != "unflattened"
    wrapped = NaFlexModel(model, channels_last=not first)
    batch = images if form == "list" else as_patches(images, longest=70, channels_last=not first, flat=flat)
    with torch.no_grad():
        found, maps = wrapped(batch), wrapped.forward_features(batch)
        for i, image in enumerate(images):
            torch.testing.assert_close(found[i], model(image[None])[0])
            torch.testing.assert_close(maps[i], model.forward_features(image[None])[0])
    square = torch.randn(2, 3, 48, 48)
    assert torch.equal(wrapped(square), model(square))


def test_trained_by_the_loader(model):
    """Two steps on batches of timm's loader lower the loss, and sizes differ in a batch."""
    loader = create_naflex_loader(
        Pictures(8), patch_size=8, max_seq_len=64, batch_size=8, num_workers=0, device=torch.device("cpu"),
        pin_memory=False, persistent_workers=False,
    )  # fmt: skip
    batch, target = next(iter(loader))
    wrapped = NaFlexModel(model)
    sizes = {images.shape[2:] for _, images in wrapped._batches(batch)}
    assert len(sizes) > 1 and all(h * w <= 64 * 64 for h, w in sizes)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    losses = []
    for _ in range(3):
        losses.append(torch.nn.functional.cross_entropy(wrapped(batch), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in wrapped.parameters())


def test_refused(model):
    images = [torch.randn(3, *size) for size in SIZES]
    wrapped = NaFlexModel(model)
    batch = as_patches(images, longest=70)
    dropped = batch["patch_valid"].clone()
    dropped[1, dropped[1].nonzero()[0]] = False
    for x, message in (
        ({**batch, "patch_valid": dropped}, "image 1 has 63 patches of a grid of 8 x 8: all of them are needed"),
        ({**batch, "patches": batch["patches"][..., :189]}, r"patch_size=\(7, 7\) must hold the 63 pixels"),
        ({**batch, "patches": batch["patches"][..., :10]}, r"must be \[B, N, P \* P \* 3\]"),
        ([], "x must be a dict of patches"),
        (torch.zeros(3, 8, 8), r"must be \[B, 3, H, W\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrapped(x)
    whole = NaFlexModel(timm.create_model("test_natten_dinat", num_classes=0, global_pool=""))
    with pytest.raises(ValueError, match="use forward_features"):
        whole(images)
