"""Training on latents that `latents.py` encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .buckets import BucketSampler
from .foreign import about
from .names import say
from .video import Item, VideoData

DESCRIPTION = "latents.json"


class Stored(NamedTuple):
    """Place and shape of a stored tensor."""

    shard: str
    shape: tuple[int, ...]


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A shard of a cache, by `safe_open`.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    with about("latents", path, SafetensorError, OSError), safe_open(path, framework="pt") as file:
        yield file


def read_keys(root: Path) -> dict[str, Stored]:
    """Every tensor of a cache, from the shards' headers. Half-written ones have another suffix and do not count.

    Raises:
        ValueError: a shard is damaged; the message names it.
    """
    keys = {}
    for shard in sorted(root.glob("*.safetensors")):
        with open_shard(shard) as file:
            keys |= {key: Stored(shard.name, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return keys


class LatentClips(Dataset):
    """Clips of a cache, read when they are asked for."""

    def __init__(self, root: Path, clips: list[dict[str, Any]], stored: dict[str, Stored]):
        self.root, self.clips, self.stored = root, clips, stored

    def __len__(self) -> int:
        return len(self.clips)

    def tensor(self, name: str) -> Tensor:
        with open_shard(self.root / self.stored[name].shard) as file:
            return file.get_tensor(name)

    def shape(self, index: int) -> tuple[int, ...]:
        """Of the latents, `(C, T, H, W)`."""
        return self.stored[f"{self.clips[index]['key']}.latents"].shape

    def __getitem__(self, index: int) -> Item:
        clip = self.clips[index]
        item = {
            "video": self.tensor(f"{clip['key']}.latents").float(),
            "label": clip["label"],
            "caption": clip["caption"],
        }
        if clip["text"]:
            item |= {name: self.tensor(f"{clip['text']}.{name}") for name in ("text", "text_mask")}
        return item


class VideoLatents(VideoData):
    """Latents `[B, C, T, H, W]`, normalised, of a cache that `python -m foveal.zoo.data.latents` wrote.

    Args:
        root: of the cache.
        vae: folder of the autoencoder that turns samples into pixels; None: the one that made the cache.
        class_names: of the classes by label, to be sure of; None: those of the cache.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        FileNotFoundError: the cache is not there.
        ValueError: it holds no clips to train on, or other classes, or a shard of it is gone or damaged.
    """

    def __init__(
        self,
        *,
        root: str | None,
        vae: str | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 8,
    ):
        if root is None:
            raise ValueError("data.root is not set: pass the folder that python -m foveal.zoo.data.latents wrote")
        if not (Path(root) / DESCRIPTION).is_file():
            raise FileNotFoundError(
                f"data.root={root!r} is no cache of latents: it has no {DESCRIPTION}, which is written at the end"
            )
        with about("data.root", Path(root) / DESCRIPTION, ValueError, OSError):
            description = json.loads((Path(root) / DESCRIPTION).read_text(encoding="utf-8"))
        clips: dict[str, list[dict[str, Any]]] = {split: [] for split in ("train", "val", "test")}
        for clip in description["clips"]:
            clips[clip["split"]].append(clip)
        if not clips["train"]:
            raise ValueError(f"data.root={root!r} holds no latents to train on")
        if not (clips["val"] or clips["test"]):
            say(f"data.root={root!r} holds nothing to validate on: its first clip stands in")
        clips["val"] = clips["val"] or clips["test"] or clips["train"][:1]
        clips["test"] = clips["test"] or clips["val"]
        if class_names is not None and list(map(str, class_names)) != description["classes"]:
            raise ValueError(
                f"data.class_names={list(class_names)} are not those of the latents, which are {description['classes']}"
            )
        stored = read_keys(Path(root))
        needed = [f"{clip['key']}.latents" for clip in description["clips"]]
        needed += [f"{clip['text']}.text" for clip in description["clips"] if clip["text"]]
        missing = sum(name not in stored for name in needed)
        if missing:
            raise ValueError(
                f"data.root={root!r} lacks {missing} of the {len(needed)} tensors that {DESCRIPTION} lists: a "
                ".safetensors file is gone; run python -m foveal.zoo.data.latents again"
            )
        self.parts = {split: LatentClips(Path(root), some, stored) for split, some in clips.items()}
        channels, frames, height, width = self.parts["train"].shape(0)
        super().__init__(
            batch_size=batch_size,
            channels=channels,
            frames=frames,
            height=height,
            width=width,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            num_classes=len(description["classes"]) or None,
            text_dim=description["text_dim"],
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        self.root, self.class_names = root, description["classes"]
        self.vae_folder, self.pixel_size = vae or description["vae"], tuple(description["sample_size"])
        self._vae: Any = None

    @property
    def vae(self) -> Any:
        """The autoencoder, loaded when samples are to be looked at."""
        if self._vae is None:
            self._vae = load_vae(Path(self.vae_folder))
        return self._vae

    @property
    def clip_sizes(self) -> tuple[str, list[tuple[int, ...]]]:
        """Of the latents of all splits."""
        sizes = {part.shape(i)[1:] for part in self.parts.values() for i in range(len(part))}
        shown = ", ".join(str(list(size)) for size in sorted(sizes))
        return f"data.root={self.root!r} with latents of [T, H, W] = {shown}", sorted(sizes)

    @property
    def for_record(self) -> dict[str, Any]:
        """Keys of the configuration that only the data could fill in, for the run's record."""
        return {"class_names": self.class_names or None}

    @property
    def for_pipeline(self) -> dict[str, Any]:
        return {"sample_size": self.pixel_size}

    def pixels(self, videos: Tensor, *, device: torch.device | None = None) -> Tensor:
        from ..video.vae import decode

        whole, home = videos.reshape(-1, *videos.shape[-4:]), self.vae.device
        self.vae.to(device or home)
        try:
            made = [decode(self.vae, one.to(self.vae.device)).cpu() for one in whole.split(1)]
        finally:
            self.vae.to(home)  # training needs the memory
        return torch.cat(made).unflatten(0, videos.shape[:-4])

    def setup(self, stage: str | None = None) -> None:
        self.datasets = dict(self.parts)

    def _sampler(self, split: str, **options: Any) -> BucketSampler:
        shapes = [self.parts[split].shape(i) for i in range(len(self.parts[split]))]
        number = {shape: i for i, shape in enumerate(sorted(set(shapes)))}
        return BucketSampler([number[shape] for shape in shapes], **options)


def load_vae(folder: Path) -> Any:
    """An autoencoder of diffusers from a local folder; its `config.json` says which class.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a class that `zoo.video.vae` does not know.
    """
    from ..video.vae import SUPPORTED

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of an autoencoder: it has no config.json")
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    known = {kind.__name__: kind for kind in SUPPORTED}
    if name not in known:
        raise ValueError(f"{str(folder)!r} holds a {name}; accepted are {', '.join(known)}")
    return known[name].from_pretrained(folder).eval().requires_grad_(False)
