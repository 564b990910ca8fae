"""Images with a mask of the same size each, whose pixels are labels: folders of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from .base import ImageData
from .classes import ClassTable, listed, recorded
from .folders import SPLITS, hold_out, scan
from .foreign import reason
from .loader import PADDING, EpochSampler, SeededDataset
from .names import say
from .pixels import UnreadableImage, read_image
from .unreadable import Receiver

IMAGES, MASKS = ("images", "image", "img"), ("masks", "mask", "annotations", "labels", "labelids")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")  # JPEG changes labels
Pair = tuple[str, str]  # paths of an image and its mask


def read_mask(path: str | Path, *, num_classes: int | None = None, ignore: Sequence[int] = (255,)) -> np.ndarray:
    """Labels of a mask, `[H, W]` int64, `PADDING` where pixels do not count.

    The number of a palette's colour is the label, or the grey value is.

    Args:
        path: of a PNG or another file without loss, of 8 or 16 bits.
        num_classes: labels must be below; None: any.
        ignore: values that do not count.

    Raises:
        UnreadableImage: it cannot be read, has colours without a palette, or other labels.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
                what = f"its mode is {image.mode}; a mask has a palette or is grey, and its numbers are labels"
                raise UnreadableImage(str(path), what)
            labels = np.asarray(image).astype(np.int64)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
        raise UnreadableImage(str(path), reason(error)) from error
    ignored = np.isin(labels, list(ignore))
    if num_classes is not None and (labels[~ignored] >= num_classes).any():
        most = int(labels[~ignored].max())
        raise UnreadableImage(str(path), f"it has the label {most}, and there are {num_classes} classes, 0 first")
    return np.where(ignored, PADDING, labels)


class Masks(Dataset):
    """Items `(image [C, H, W], mask [H, W])` after a transform of both."""

    def __init__(self, pairs: Sequence[Pair], read: Callable[[Pair], tuple[Image.Image, np.ndarray]], transform: Any):
        self.pairs, self.read, self.transform = list(pairs), read, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.read(self.pairs[index])
        if (image.height, image.width) != labels.shape:
            found = f"it is {labels.shape[1]}x{labels.shape[0]}, and its image {image.width}x{image.height} pixels"
            raise UnreadableImage(self.pairs[index][1], found)
        made = self.transform(tv_tensors.Image(V.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(labels)))
        return made[0].as_subclass(Tensor), made[1].as_subclass(Tensor)


class SeededMasks(SeededDataset):
    """`(image, mask, number)` whose random transforms depend on (seed, epoch, index) only.

    The number tells of an image that fills up a batch (`PADDING`) or cannot be read (`PADDING - 1 - index`).
    """

    blank = (3, 8, 8)

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        index, epoch = key
        try:
            image, mask = self.draw(key)
        except UnreadableImage:
            image, mask = torch.zeros(self.blank), torch.full(self.blank[1:], PADDING)
            return image, mask, PADDING if epoch is None else PADDING - 1 - index
        if epoch is None:
            return image, torch.full_like(mask, PADDING), PADDING
        return image, mask, index


class ReceiveMasks:
    """Takes images that cannot be read out of `[images, masks, numbers]`, see `Receiver`, and drops the numbers."""

    def __init__(self, receive: Receiver):
        self.receive = receive

    def __call__(self, batch: Any) -> list[Tensor]:
        images, masks, numbers = batch
        kept, _ = self.receive([torch.arange(len(numbers)), numbers])
        return [images[kept], masks[kept]]


def make_transforms(
    size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: Sequence[float],
    hflip: float,
    color_jitter: float,
    eval_size: int | None,
) -> dict[bool, v2.Transform]:
    """Transforms of an image and its mask together: by True to train, by False to evaluate.

    Args:
        size: pixels a side of a training crop.
        mean, std: per channel, in units of pixel/255.
        scale: of the shorter side before the crop, in crops.
        hflip: chance to turn left and right.
        color_jitter: of brightness, contrast and saturation.
        eval_size: pixels of the shorter side in evaluation; None: those of the image.
    """
    shortest = [max(1, round(size * part)) for part in scale]
    normal: list[Any] = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    normal += [v2.Normalize(list(mean), list(std))]
    fill: Any = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: PADDING}
    crop: list[Any] = [v2.RandomResize(shortest[0], shortest[1] + 1, antialias=True)]
    crop += [v2.RandomCrop(size, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(hflip)]
    crop += [v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter and len(mean) == 3 else []
    evaluated: list[Any] = [] if eval_size is None else [v2.Resize(eval_size, antialias=True)]
    return {True: v2.Compose([*crop, *normal]), False: v2.Compose([*evaluated, *normal])}


class MaskData(ImageData):
    """Images `[B, C, H, W]` (float, normalised) with masks `[B, H, W]` (int64), `PADDING` where pixels do not count.

    To train on, crops of `img_size` pixels a side; in evaluation whole images of any size, one at a time. A subclass
    sets `pairs` and reads them.

    Args:
        scale: least and greatest shorter side of an image before the crop, in crops.
        hflip: chance that left and right are turned.
        color_jitter: of brightness, contrast and saturation, 0 to 1.
        eval_size: pixels of the shorter side in evaluation; None: those of the image.
        augment: off, training images are crops from the middle of the scales, neither turned nor recoloured.
        options: see `ImageData`.
    """

    seeded_dataset = SeededMasks

    def __init__(
        self,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        img_size: int,
        scale: Sequence[float],
        hflip: float,
        color_jitter: float,
        eval_size: int | None,
        augment: bool,
        **options: Any,
    ):
        super().__init__(mean=mean, std=std, img_size=img_size, **options)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"data.scale={list(scale)} must be two numbers above 0, the second not below the first")
        for key, chance in (("hflip", hflip), ("color_jitter", color_jitter)):
            if not 0 <= chance <= 1:
                raise ValueError(f"data.{key}={chance} must be between 0 and 1")
        if eval_size is not None and eval_size < 1:
            raise ValueError(f"data.eval_size={eval_size} must be at least 1, or null for the images' own size")
        self.eval_size = eval_size
        scale = scale if augment else [(scale[0] * scale[1]) ** 0.5] * 2
        changes = {"hflip": hflip if augment else 0.0, "color_jitter": color_jitter if augment else 0.0}
        options = {"mean": self.mean, "std": self.std, "scale": scale, "eval_size": eval_size, **changes}
        self.transforms = make_transforms(img_size, **options)

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """The image and the labels of a pair."""
        raise NotImplementedError

    def pairs_of(self, split: str) -> Sequence[Pair]:
        """The pairs of a split."""
        raise NotImplementedError

    @property
    def for_task(self) -> dict[str, Any]:
        return super().for_task | {"targets": "masks"}

    def setup(self, stage: str | None = None) -> None:
        for split in SPLITS:
            if split not in self.datasets:
                self.datasets[split] = Masks(self.pairs_of(split), self.read, self.transforms[split == "train"])

    def _sampler(self, split: str, **options: Any) -> EpochSampler:
        if split != "train":
            options["batch_size"] = 1  # sizes differ
        return super()._sampler(split, **options)

    def _seeded(self, dataset: Dataset) -> SeededMasks:
        seeded = SeededMasks(dataset, seed=self.seed)
        seeded.blank = (len(self.mean), self.img_size, self.img_size)
        return seeded

    def _receiver(self, split: str, sampler: EpochSampler) -> Callable[[Any], Any]:
        receive = super()._receiver(split, sampler)
        assert isinstance(receive, Receiver)
        return ReceiveMasks(receive)


def find_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first folder of these names in the root, in any case."""
    there = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    return next((there[name] for name in names if name in there), None)


def _files(folder: Path) -> dict[str, str]:
    """Paths of the images below a folder, by their names in it without suffix."""
    found = scan(folder)
    paths = [*found.loose, *(path for path, _ in found.images)]
    return {os.path.splitext(os.path.relpath(path, folder))[0].replace(os.sep, "/"): path for path in paths}


def match(images: Path, masks: Path) -> list[Pair]:
    """Images and masks of the same name, in natural order.

    Raises:
        ValueError: no image has a mask, or a mask is of a kind that changes labels.
    """
    pictures, labels = _files(images), _files(masks)
    pairs = [(pictures[name], labels[name]) for name in sorted(pictures, key=lambda n: (natural_key(n), n))
             if name in labels]  # fmt: skip
    if not pairs:
        raise ValueError(
            f"no image of {images} has a mask of the same name in {masks}; the first are {listed(pictures, 3)} and "
            f"{listed(labels, 3)}"
        )
    for _, mask in pairs:
        if not mask.lower().endswith(MASK_SUFFIXES):
            raise ValueError(f"{mask} is no mask: its kind changes labels; accepted are {', '.join(MASK_SUFFIXES)}")
    alone = [path for name, path in pictures.items() if name not in labels]
    if alone:
        say(f"in {images} are images without a mask in {masks}, which are left out: {len(alone)}", alone, most=3)
    return pairs


def list_pairs(root: Path, *, fraction: float, seed: int) -> dict[str, list[Pair]]:
    """Pairs by split, of `root/train/images` and `root/train/masks`, or `root/images/train` and `root/masks/train`, or
    `root/images` and `root/masks`, of which a fraction is held out.

    Raises:
        ValueError: there are no such folders, or nothing to validate on.
    """
    both = find_folder(root, IMAGES), find_folder(root, MASKS)
    parts: dict[str, list[Pair]] = {}
    for split, names in SPLITS.items():
        if all(both):
            folders = [find_folder(folder, names) for folder in both if folder is not None]
        else:
            own = find_folder(root, names)
            folders = [] if own is None else [find_folder(own, IMAGES), find_folder(own, MASKS)]
        if folders and all(folders):
            parts[split] = match(*[folder for folder in folders if folder is not None])
    if not parts and both[0] is not None and both[1] is not None:
        parts["train"] = match(both[0], both[1])
    if not parts.get("train"):
        raise ValueError(
            f"data.root={str(root)!r} has no folders train/images and train/masks, images/train and masks/train, or "
            f"images and masks; it holds {listed(sorted(path.name for path in root.iterdir())) or 'nothing'}"
        )
    if "val" not in parts:
        masks = dict(parts["train"])
        parts["train"], parts["val"] = (
            [(path, masks[path]) for path, _ in some]
            for some in hold_out([(path, "") for path in masks], root=root, fraction=fraction, seed=seed)
        )
        if not parts["val"]:
            raise ValueError(f"data.root={str(root)!r} has one pair: there is nothing to validate on")
    return parts


def _named(root: Path, names: Sequence[str] | None, count: int | None) -> tuple[str, ...] | None:
    """Names of the classes: the given ones, those of `classes.txt`, numbers, or None where nothing says how many."""
    if names is None and (root / "classes.txt").is_file():
        lines = (root / "classes.txt").read_text(encoding="utf-8-sig").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    if names is None:
        return None if count is None else tuple(map(str, range(count)))
    if count not in (None, len(names)):
        raise ValueError(f"data.num_classes={count}, and {len(names)} classes are named: {listed(names)}")
    return tuple(map(str, names))


class MaskFolder(MaskData):
    """Folders of images and of masks with the same names.

    - `root/train/images/*.jpg` and `root/train/masks/*.png`, and `val` and `test` as well; or
    - `root/images/train/*.jpg` and `root/masks/train/*.png`; or
    - `root/images/*.jpg` and `root/masks/*.png`, of which `val_fraction` is held out to validate on.

    `annotations` and `labels` are accepted for `masks`. A mask has a palette or is grey; its numbers are the labels.
    A pair of unequal sizes or with an unknown label does not count, and is told as an image that cannot be read.

    Args:
        root: the folder.
        class_names: by label; None: the lines of `root/classes.txt`, or numbers.
        num_classes: labels are below it; None: as many as are named, or one more than the greatest of a training mask.
        ignore: values of masks that do not count.
        val_fraction, split_seed: of the pairs held out, by the hash of their paths.
        batch_size, img_size, mean, std, seed, shuffle, num_workers: see `ImageData`.
        scale, hflip, color_jitter, eval_size, augment: see `MaskData`.

    Raises:
        FileNotFoundError: the root is not there.
        ValueError: no root, no pairs, or names that do not fit.
    """

    def __init__(
        self,
        *,
        root: str | None,
        batch_size: int,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore: Sequence[int] = (255,),
        img_size: int = 512,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        scale: Sequence[float] = (0.75, 2.0),
        hflip: float = 0.5,
        color_jitter: float = 0.3,
        eval_size: int | None = None,
        augment: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = None,
    ):
        if root is None:
            raise ValueError("data.root is not set: pass data.root=FOLDER, which holds images/*.jpg and masks/*.png")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must be above 0 and below 1")
        self.root, self.ignore = str(root), tuple(ignore)
        self.pairs = list_pairs(Path(root), fraction=val_fraction, seed=split_seed)
        names = _named(Path(root), class_names, num_classes) or self._count()
        super().__init__(
            batch_size=batch_size,
            mean=mean,
            std=std,
            num_classes=len(names),
            img_size=img_size,
            classes=ClassTable(names),
            scale=scale,
            hflip=hflip,
            color_jitter=color_jitter,
            eval_size=eval_size,
            augment=augment,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )

    def _count(self) -> tuple[str, ...]:
        """Numbers as names, as many as the training masks have labels."""
        most = PADDING
        for _, mask in self.pairs["train"]:
            try:
                most = max(most, int(read_mask(mask, ignore=self.ignore).max(initial=PADDING)))
            except UnreadableImage:  # told when it is trained on
                continue
        say(f"data.num_classes={most + 1}: the greatest label of {len(self.pairs['train'])} training masks is {most}")
        return tuple(map(str, range(most + 1))) or ("0",)

    @property
    def for_record(self) -> dict[str, Any]:
        return recorded(self.class_names)

    def pairs_of(self, split: str) -> Sequence[Pair]:
        return self.pairs.get(split) or self.pairs["val"]

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        return read_image(pair[0], self.mode), read_mask(pair[1], num_classes=self.num_classes, ignore=self.ignore)
