"""Training on latents that `latents.py` encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .buckets import BucketSampler
from .video import Item, VideoData

DESCRIPTION = "latents.json"


def read_entries(root: Path) -> dict[str, dict[str, Any]]:
    """Every clip of a cache by key: its shard, split, label, caption and shape. Half-written shards do not count."""
    entries: dict[str, dict[str, Any]] = {}
    for shard in sorted(root.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key, entry in json.loads(file.metadata()["entries"]).items():
                entries[key] = {**entry, "shard": shard.name}
    return entries


class LatentClips(Dataset):
    """Latents of a cache, opened when they are asked for."""

    def __init__(self, root: Path, entries: list[tuple[str, dict[str, Any]]]):
        self.root, self.entries = root, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        key, entry = self.entries[index]
        with safe_open(self.root / entry["shard"], framework="pt") as file:
            item = {"video": file.get_tensor(f"{key}.latents").float()}
            if f"{key}.text" in file.keys():  # noqa: SIM118 - a file is no dict
                item |= {name: file.get_tensor(f"{key}.{name}") for name in ("text", "text_mask")}
        return {**item, "label": entry["label"], "caption": entry["caption"]}


class VideoLatents(VideoData):
    """Latents `[B, C, T, H, W]`, normalised, of a cache that `python -m foveal.zoo.data.latents` wrote.

    Args:
        root: of the cache.
        vae: folder of the autoencoder that turns samples into pixels; None: the one that made the cache.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        FileNotFoundError: the cache is not there.
        ValueError: it holds no clips to train on.
    """

    def __init__(
        self,
        *,
        root: str | None,
        vae: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 8,
    ):
        if root is None:
            raise ValueError("data.root is not set: pass the folder that python -m foveal.zoo.data.latents wrote")
        if not (Path(root) / DESCRIPTION).is_file():
            raise FileNotFoundError(f"data.root={root!r} is no cache of latents: it has no {DESCRIPTION}")
        self.root, description = Path(root), json.loads((Path(root) / DESCRIPTION).read_text())
        entries = read_entries(self.root)
        by_split: dict[str, list[tuple[str, dict[str, Any]]]] = {split: [] for split in ("train", "val", "test")}
        for key, entry in sorted(entries.items()):
            by_split[entry["split"]].append((key, entry))
        if not by_split["train"]:
            raise ValueError(f"data.root={root!r} holds no latents to train on")
        by_split["val"] = by_split["val"] or by_split["test"] or by_split["train"][:1]
        by_split["test"] = by_split["test"] or by_split["val"]
        channels, frames, height, width = by_split["train"][0][1]["shape"]
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
        self.by_split, self.class_names = by_split, description["classes"]
        self.vae_folder, self.pixel_size = vae or description["vae"], tuple(description["sample_size"])
        self._vae: Any = None

    @property
    def vae(self) -> Any:
        """The autoencoder, loaded when samples are to be looked at."""
        if self._vae is None:
            self._vae = load_vae(Path(self.vae_folder))
        return self._vae

    @property
    def for_pipeline(self) -> dict[str, Any]:
        return {"sample_size": self.pixel_size}

    def pixels(self, videos: Tensor) -> Tensor:
        from ..video.vae import decode

        whole = videos.reshape(-1, *videos.shape[-4:])
        return torch.cat([decode(self.vae, one).cpu() for one in whole.split(1)]).unflatten(0, videos.shape[:-4])

    def setup(self, stage: str | None = None) -> None:
        if not self.datasets:
            self.datasets = {split: LatentClips(self.root, entries) for split, entries in self.by_split.items()}

    def _sampler(self, split: str, **options: Any) -> BucketSampler:
        shapes = [tuple(entry["shape"]) for _, entry in self.by_split[split]]
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
