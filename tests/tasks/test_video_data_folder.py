"""Video folders: which frames a clip has, buckets, captions, and files that are broken."""

import json
import warnings

import numpy as np
import pytest
import torch
from foveal.zoo.data import VideoFolder
from foveal.zoo.data.buckets import BucketSampler, nearest_bucket
from foveal.zoo.data.clips import UnreadableVideo, cover, probe, read_clip
from PIL import Image
from safetensors.torch import save_file
from video_files import damage, folder, open_folder, shown, write_video


def test_probe_and_frames_at_given_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=12, fps=10)
    info = probe(path)
    assert (info.fps, info.height, info.width) == (10, 32, 48) and info.seconds == pytest.approx(1.2)
    for times, expected in (
        ([0.0, 0.1, 0.2], [0, 1, 2]),
        ([0.3, 0.8, 1.1], [3, 8, 11]),
        ([1.05, 1.15], [10, 11]),
        ([0.0, 0.01, 0.02], [0, 0, 0]),
    ):
        clip = read_clip(path, times=np.array(times))
        assert clip.dtype == torch.uint8 and clip.shape == (3, len(times), 32, 48)
        assert shown(clip / 255) == expected
    long = write_video(tmp_path / "long.mp4", frames=13, fps=4)
    assert shown(read_clip(long, times=np.array([2.0, 2.5])) / 255) == [8, 10]  # sought, not decoded from the start
    with pytest.raises(UnreadableVideo, match=r"ends before second 1\.50"):
        read_clip(path, times=np.array([0.0, 1.5]))


def test_what_is_no_video_is_said(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UnreadableVideo, match=r"text\.mp4 cannot be opened as a video"):
        probe(tmp_path / "text.mp4")
    path = write_video(tmp_path / "a.mp4")
    damage(path)
    assert probe(path).seconds > 1
    with pytest.raises(UnreadableVideo, match=r"a\.mp4 cannot be decoded: Invalid data"):
        read_clip(path, times=np.array([0.8, 0.9]))
    damage(path, first=0)
    with pytest.raises(UnreadableVideo, match=r"a\.mp4 cannot be opened as a video: Invalid data"):
        probe(path)


def test_covering_keeps_the_aspect_ratio():
    clip = torch.zeros(3, 2, 20, 40, dtype=torch.uint8)
    clip[:, :, :, 20:] = 255
    assert cover(clip, height=20, width=40).equal(clip / 255)
    left, middle, right = (cover(clip, height=10, width=10, at=(0.5, x)) for x in (0.0, 0.5, 1.0))
    assert middle.shape == (3, 2, 10, 10)
    assert left[..., :9].max() == 0 and right[..., 1:].min() == 1  # antialiasing mixes the columns between
    assert middle.mean() == pytest.approx(0.5, abs=0.01)


def test_classes_are_folders(tmp_path):
    files = {f"{split}__{name}__{i}": {} for split in ("train", "val") for name in ("run", "jump") for i in range(2)}
    data = open_folder(folder(tmp_path, **files))
    known = {"in_channels": 3, "num_classes": 2, "text_dim": None, "class_names": ["jump", "run"]}
    assert data.for_task == known | {"clip_sizes": ("data.frames=4 and data.sizes=[[16, 24]]", [(4, 16, 24)])}
    assert data.for_record == {"class_names": ["jump", "run"]}
    batches = list(data.train_dataloader())
    assert [batch["video"].shape for batch in batches] == [(2, 3, 4, 16, 24)] * 2
    assert sorted(torch.cat([batch["label"] for batch in batches]).tolist()) == [0, 0, 1, 1]
    for clip in torch.cat([batch["video"] for batch in batches]):
        first, *rest = shown(data.pixels(clip))
        assert rest == [first + 1, first + 2, first + 3]
    (middle,) = {tuple(shown(data.pixels(clip))) for batch in data.val_dataloader() for clip in batch["video"]}
    assert middle == (4, 5, 6, 7)


def test_frame_rate_and_stride(tmp_path):
    folder(tmp_path, train__a__slow={"fps": 10}, train__a__fast={"fps": 20, "frames": 13})
    clips = open_folder(tmp_path, fps=5, frames=3).datasets["train"]
    assert [np.diff(shown((clips[i]["video"] + 1) / 2)).tolist() for i in (0, 1)] == [[4, 4], [2, 2]]
    clips = open_folder(tmp_path, stride=3, frames=3).datasets["train"]
    assert [np.diff(shown((clips[i]["video"] + 1) / 2)).tolist() for i in (0, 1)] == [[3, 3], [3, 3]]


def test_files_of_one_folder_are_split_by_name(tmp_path):
    folder(tmp_path, **{f"a__{i}": {"frames": 4} for i in range(12)})
    held_out = {}
    for share in (0.0, 0.5):
        data = open_folder(tmp_path, held_out=share)
        held_out[share] = {video.path.name for video in data.listed if video.split == "val"}
    assert not held_out[0.0] and 2 < len(held_out[0.5]) < 10
    for path in (tmp_path / "a").iterdir():
        if path.name not in held_out[0.5]:
            path.unlink()
            break
    left = {video.path.name for video in open_folder(tmp_path, held_out=0.5).listed if video.split == "val"}
    assert left == held_out[0.5]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_and_their_embeddings(tmp_path, kind):
    folder(tmp_path, one={}, two={"frames": 8}, three={})
    save_file({"text": torch.arange(6.0).reshape(3, 2)}, tmp_path / "text.safetensors")
    names = ("one", "two", "three")
    rows = [
        {"file_name": f"{n}.mp4", "caption": f"{n}, a clip", "split": s, "embedding": "text.safetensors"}
        for n, s in zip(names, ("train", "train", "val"), strict=True)
    ]
    if kind == "csv":
        lines = [
            "file_name,caption,split,embedding",
            *(f'{r["file_name"]},"{r["caption"]}",{r["split"]},{r["embedding"]}' for r in rows),
        ]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_folder(tmp_path, text_length=5)
    assert (data.num_classes, data.text_dim, data.for_record) == (None, 2, {"class_names": None})
    (batch,) = data.train_dataloader()
    assert sorted(batch["caption"]) == ["one, a clip", "two, a clip"]
    assert batch["text"].shape == (2, 5, 2) and batch["text_mask"].tolist() == [[True] * 3 + [False] * 2] * 2
    assert batch["text"][0, :3].flatten().tolist() == [0, 1, 2, 3, 4, 5] and not batch["text"][0, 3:].any()


def test_broken_and_short_files_are_left_out_and_listed(tmp_path):
    folder(tmp_path, **{f"train__a__{i}": {} for i in range(4)}, train__a__short={"frames": 2})
    (tmp_path / "train" / "a" / "text.mp4").write_text("no video")
    with pytest.warns(
        UserWarning, match=r"2 of 6 videos are left out:\n.*short\.mp4 lasts 0\.20 s.*\n.*text\.mp4 cannot"
    ):
        data = open_folder(tmp_path)
    assert len(data.datasets["train"]) == 4


def test_undecodable_files_are_replaced_in_training_and_listed_at_the_end(tmp_path):
    folder(tmp_path, **{f"train__a__{i}": {"blue": 200 if i == 1 else 0} for i in range(4)})
    damage(tmp_path / "train" / "a" / "2.mp4")
    data = open_folder(tmp_path, shuffle=False, frames=8)
    batches = [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert sum(len(batch["video"]) for batch in batches) == 4 and "broken" not in batches[0]
    with pytest.warns(UserWarning, match=r"1 videos could not be decoded and were replaced by others:\n.*2\.mp4"):
        data.teardown("fit")
    for path in (tmp_path / "train" / "a").iterdir():
        if path.name != "2.mp4":
            damage(path)
    with pytest.raises(ValueError, match="4 videos in a row cannot be decoded"):
        data.datasets["train"][0]


def test_undecodable_files_do_not_count_in_evaluation(tmp_path):
    folder(tmp_path, **{f"{split}__a__{i}": {} for split in ("train", "val") for i in range(3)})
    damage(tmp_path / "val" / "a" / "1.mp4")
    data = open_folder(tmp_path, frames=8)
    batches = [data.on_before_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert [batch["real"].tolist() for batch in batches] == [[True, False], [True, False]]  # the last one fills up
    assert not batches[0]["video"][1].any() and batches[0]["video"][0].any()
    with pytest.warns(UserWarning, match=r"1 videos could not be decoded and do not count in evaluation:\n.*1\.mp4"):
        data.teardown("validate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.teardown("fit")  # said once


def test_a_folder_without_videos_to_validate_on_says_so(tmp_path):
    folder(tmp_path, train__a__0={}, train__a__1={})
    with pytest.warns(UserWarning, match=r"no videos to validate on, and one of training stands in:\n.*0\.mp4"):
        open_folder(tmp_path)


def test_nearest_bucket():
    sizes = [(64, 64), (48, 80), (80, 48)]
    assert [nearest_bucket(*size, sizes) for size in ((100, 110), (720, 1280), (1920, 1080), (1, 1))] == [0, 1, 2, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_hold_one_bucket(shuffle, world):
    buckets = [0, 1, 1, 0, 1, 2, 1, 0, 1, 1, 0, 1, 1]
    options = {"batch_size": 2, "shuffle": shuffle, "seed": 3, "world": world}
    ranks = [BucketSampler(buckets, rank=rank, **options) for rank in range(world)]
    seen, orders = [], []
    for sampler in ranks:
        items = list(sampler)
        assert len(items) == len(sampler)
        seen += [i for i, epoch in items if epoch is not None]
        orders.append([{buckets[i] for i, _ in items[k : k + 2]} for k in range(0, len(items), 2)])
        sampler.skip_batches = 2
        assert list(sampler) == items[4:]
    assert all(len(bucket) == 1 for order in orders for bucket in order)
    assert all(order == orders[0] for order in orders)  # ranks meet videos of one size
    if shuffle:
        assert len(seen) == len(set(seen)) == 12  # bucket 2 has one item, no batch
        ranks[0].skip_batches = 0
        first = list(ranks[0])
        ranks[0].set_epoch(1)
        assert list(ranks[0]) != first
    else:
        assert sorted(seen) == list(range(13))


def test_buckets_that_never_fill_a_batch_are_said():
    options = {"batch_size": 4, "shuffle": True, "seed": 0}
    with pytest.warns(UserWarning, match="3 of 11 training videos are never seen: there are fewer than 4"):
        assert len(BucketSampler([0] * 8 + [1] * 3, **options)) == 8
    with pytest.raises(ValueError, match=r"data\.batch_size=4 on 2 device\(s\) needs 8 .* the sizes have 7, 5"):
        BucketSampler([0] * 7 + [1] * 5, world=2, **options)
    assert len(BucketSampler([0, 1], **(options | {"shuffle": False}))) == 8


def test_embeddings_that_do_not_fit_are_said_by_their_row(tmp_path):
    for name, width in (("two", 2), ("three", 3)):
        save_file({"text": torch.zeros(1, width)}, tmp_path / f"{name}.safetensors")

    def table(*embeddings: str):
        rows = [f"{i}.mp4,{name}" for i, name in enumerate(embeddings)]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,embedding", *rows]))
        return VideoFolder(root=str(tmp_path))

    assert table("two.safetensors", "two.safetensors").for_task["text_dim"] == 2
    with pytest.raises(ValueError, match=r"three\.safetensors' of 1\.mp4 has text of \[1, 3\], expected \[L, 2\]"):
        table("two.safetensors", "three.safetensors")
    for rows, lacking in ((("two.safetensors", ""), 1), (("", "two.safetensors"), 0)):
        with pytest.raises(ValueError, match=rf"the row of {lacking}\.mp4 has no embedding"):
            table(*rows)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors' in the row of 1\.mp4 does not exist"):
        table("two.safetensors", "none.safetensors")


def test_replacements_of_a_broken_video_are_of_its_size(tmp_path):
    for i in range(5):
        write_video(tmp_path / "train" / "a" / f"{i}.mp4", height=64 if i % 2 else 32, width=32 if i % 2 else 64)
    for i in (1, 4):
        damage(tmp_path / "train" / "a" / f"{i}.mp4")
    clips = open_folder(tmp_path, sizes=[[16, 32], [32, 16]], frames=8).datasets["train"]
    assert [tuple(clips[i]["video"].shape) for i in range(5)] == [clips.shape(i) for i in range(5)]
    assert "4.mp4" in clips[4]["broken"] and clips[0]["broken"] == ""


def test_batches_of_a_folder_have_one_size_each(tmp_path):
    wide = {f"train__a__w{i}": {"height": 32, "width": 64} for i in range(4)}
    folder(tmp_path, **wide, **{f"train__a__t{i}": {"height": 64, "width": 32} for i in range(2)})
    data = open_folder(tmp_path, sizes=[[16, 32], [32, 16]])
    assert sorted(tuple(batch["video"].shape[3:]) for batch in data.train_dataloader()) == [(16, 32)] * 2 + [(32, 16)]


def test_a_video_gives_the_longest_clip_that_fits_and_an_image_one_frame(tmp_path):
    counts = {"long": 12, "short": 5, "brief": 3}
    folder(tmp_path, **{f"train__a__{name}{i}": {"frames": counts[name]} for name in counts for i in range(2)})
    for i in range(2):
        Image.new("RGB", (48, 32), (200, 0, 10)).save(tmp_path / "train" / "a" / f"picture{i}.png")
    data = open_folder(tmp_path, frames=[8, 1, 4], sizes=[[16, 24]])
    clips = data.datasets["train"]
    lengths = {video.path.stem[:-1]: clips.shape(i)[1] for i, video in enumerate(clips.videos)}
    assert lengths == {"long": 8, "short": 4, "brief": 1, "picture": 1}
    batches = [tuple(batch["video"].shape[2:]) for batch in data.train_dataloader()]
    assert sorted(batches) == [(1, 16, 24)] * 2 + [(4, 16, 24), (8, 16, 24)]
    (at,) = [i for i, video in enumerate(clips.videos) if video.path.stem == "picture0"]
    pixels = (clips[at]["video"] + 1) / 2
    torch.testing.assert_close(pixels[:, 0, 8, 12], torch.tensor([200, 0, 10]) / 255)
    assert data.frames == 8 and [size[0] for size in data.clip_sizes[1]] == [1, 4, 8]
    (tmp_path / "train" / "a" / "picture0.png").write_bytes(b"no")
    again = open_folder(tmp_path, frames=[1, 4])
    assert len(again.skipped) == 1 and "picture0.png" in again.skipped[0]
    without = open_folder(tmp_path, frames=4)
    assert len(without.listed) == 6 and len(without.datasets["train"]) == 4, "images and short videos are left out"


def test_videos_come_several_times_in_an_epoch(tmp_path):
    folder(tmp_path, a={}, b={}, c={})
    (tmp_path / "metadata.csv").write_text("file_name,split,repeats\na.mp4,train,3\nb.mp4,train,\nc.mp4,val,2\n")
    data = open_folder(tmp_path, num_repeats=2)
    names = [video.path.stem for video in data.datasets["train"].videos]
    assert names == ["a"] * 6 + ["b"] * 2 and len(data.datasets["val"]) == 1
    first = data._seeded(data.datasets["train"])
    assert len({tuple(shown((first[i, 0]["video"] + 1) / 2)) for i in range(6)}) > 1, "each has a time of its own"
    with pytest.raises(ValueError, match=r"data\.num_repeats=0"):
        open_folder(tmp_path, num_repeats=0)
    (tmp_path / "metadata.csv").write_text("file_name,repeats\na.mp4,0\n")
    with pytest.raises(ValueError, match=r"repeats='0' of a.mp4 in .*metadata.csv must be an integer of at least 1"):
        open_folder(tmp_path)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        VideoFolder(root=None)
    with pytest.raises(FileNotFoundError, match="'/no/such' is not a folder"):
        VideoFolder(root="/no/such")
    with pytest.raises(ValueError, match="holds no videos"):
        VideoFolder(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data\.captions='/no/such\.csv' does not exist"):
        VideoFolder(root=str(tmp_path), captions="/no/such.csv")
    (tmp_path / "bad.csv").write_text("name,caption\na.mp4,hello\n")
    with pytest.raises(ValueError, match="must have rows with file_name"):
        VideoFolder(root=str(tmp_path), captions=str(tmp_path / "bad.csv"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="is no JSON lines file"):
        VideoFolder(root=str(tmp_path), captions=str(tmp_path / "bad.jsonl"))
    (tmp_path / "a.mp4").write_text("no video")
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"none of its 1 videos can be trained on, the first"),
    ):
        warnings.simplefilter("ignore")
        open_folder(tmp_path)
    wrong = (
        {"frames": 0},
        {"frames": []},
        {"frames": [4, 0]},
        {"stride": 0},
        {"fps": -1.0},
        {"sizes": [[16]]},
        {"held_out": 1.5},
        {"text_length": 0},
    )
    for options in wrong:
        with pytest.raises(ValueError, match=rf"data\.{next(iter(options))}="):
            VideoFolder(root=str(tmp_path), **options)
