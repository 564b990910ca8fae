"""Video files of other people: links, hidden files, class folders, tables of spreadsheets, containers, rotation."""

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.zoo.data import VideoFolder
from foveal.zoo.data.clips import EndsEarly, UnreadableVideo, probe, read_clip
from foveal.zoo.data.videofolder import list_videos, read_table
from video_files import av, folder, open_folder, shown, write_video


def listing(root: Path, *names: str) -> Path:
    """Empty files: they are listed, not opened."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def labels(root: Path, **options) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """Split and label by name below the root, and the classes."""
    videos, classes = list_videos(root, **({"captions": None, "held_out": 0.0} | options))
    return {video.path.relative_to(root).as_posix(): (video.split, video.label) for video in videos}, classes


# classes


def test_links_are_followed_and_circles_are_not(tmp_path):
    shared = listing(tmp_path / "shared", "ant/0.mp4", "ant/more/1.mp4")
    root = listing(tmp_path / "root", "train/bee/0.mp4")
    (root / "train/ant").symlink_to(shared / "ant")
    (root / "train/bee/up").symlink_to(root)
    (shared / "ant/more/again").symlink_to(shared / "ant")
    (root / "train/bee/gone.mp4").symlink_to(shared / "nothing.mp4")
    found, classes = labels(root)
    assert classes == ["ant", "bee"]
    assert found == {
        "train/ant/0.mp4": ("train", 0),
        "train/ant/more/1.mp4": ("train", 0),
        "train/bee/0.mp4": ("train", 1),
        "train/bee/gone.mp4": ("train", 1),  # cannot be opened, and is listed as such
    }


def test_hidden_files_and_folders_do_not_count(tmp_path):
    listing(tmp_path, "train/a/0.mp4", "train/a/._0.mp4", "train/.trash/1.mp4", "train/a/.old/2.mp4", ".cache/3.mp4")
    assert labels(tmp_path) == ({"train/a/0.mp4": ("train", 0)}, ["a"])


def test_training_numbers_the_classes_in_natural_order(tmp_path):
    listing(tmp_path, *(f"train/{name}/0.mp4" for name in ("1", "2", "10", "b", "A")), "val/10/0.mp4", "val/2/0.mp4")
    with pytest.warns(UserWarning, match="3 of 5 classes have no val videos: 1, A, b"):
        found, classes = labels(tmp_path)
    assert classes == ["1", "2", "10", "A", "b"]
    assert found["val/10/0.mp4"] == ("val", 2) and found["val/2/0.mp4"] == ("val", 1)
    listing(tmp_path, "val/c/0.mp4")
    with pytest.raises(ValueError, match="has val videos of c, which training does not have: its classes are 1, 2, 10"):
        labels(tmp_path)


def test_class_names_of_another_run_number_the_classes(tmp_path):
    listing(tmp_path, "train/a/0.mp4", "train/b/0.mp4")
    with pytest.warns(UserWarning, match="1 of 3 classes have no train videos: c"):
        found, classes = labels(tmp_path, class_names=["c", "b", "a"])
    assert classes == ["c", "b", "a"] and found["train/a/0.mp4"] == ("train", 2)
    with pytest.raises(ValueError, match=r"train videos of b, which data\.class_names does not have"):
        labels(tmp_path, class_names=["a"])


def test_classes_that_are_called_like_a_split(tmp_path):
    """Below a split any name is a class; beside other classes `train` is one as well."""
    listing(tmp_path / "a", "train/train/0.mp4", "train/test/0.mp4", "val/train/0.mp4", "val/test/0.mp4")
    assert labels(tmp_path / "a")[1] == ["test", "train"]
    listing(tmp_path / "b", "train/0.mp4", "plane/0.mp4")
    assert labels(tmp_path / "b") == ({"plane/0.mp4": ("train", 0), "train/0.mp4": ("train", 1)}, ["plane", "train"])
    listing(tmp_path / "c", "train/x/0.mp4", "plane/0.mp4")
    with pytest.raises(ValueError, match="train may be the training split or a class beside plane"):
        labels(tmp_path / "c")
    listing(tmp_path / "d", "val/x/0.mp4", "test/x/0.mp4")
    with pytest.raises(ValueError, match="has no folder for the split 'train'; it holds test, val"):
        labels(tmp_path / "d")


def test_videos_that_belong_nowhere_are_said(tmp_path):
    listing(tmp_path, "Train/a/deep/0.mp4", "Train/1.mp4", "val/a/0.mp4", "extra/a/2.mp4", "3.mp4")
    with pytest.warns(UserWarning) as said:
        found, classes = labels(tmp_path)
    assert found == {"Train/a/deep/0.mp4": ("train", 0), "val/a/0.mp4": ("val", 0)} and classes == ["a"]
    text = "\n".join(str(warning.message) for warning in said)
    assert "2 videos of" in text and "extra/a/2.mp4" in text and "3.mp4" in text
    assert "1 videos of" in text and "lie in no folder of a class and are left out" in text and "Train/1.mp4" in text


def test_each_class_keeps_a_video_to_train_on(tmp_path):
    listing(tmp_path, *(f"{name}/{i}.mp4" for name in "abcdefgh" for i in range(2)))
    found, classes = labels(tmp_path, held_out=0.9)
    trained = [label for split, label in found.values() if split == "train"]
    assert sorted(set(trained)) == list(range(8)) and len(trained) < 12 and classes == list("abcdefgh")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    listing(tmp_path, "train/a/0.mp4")

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(ValueError, match=r"of data\.root cannot be read: Permission denied"):
        labels(tmp_path)


# captions


def test_tables_of_spreadsheets(tmp_path):
    rows = [{"file_name": "v/0.mp4", "caption": "a café, red"}, {"file_name": "v/1.mp4", "caption": "two\u2028lines"}]
    text = 'File_Name;Caption\nv/0.mp4;a café, red\nv/1.mp4;"two\u2028lines"\n;\n'
    for name, content in (
        ("mark.csv", text.encode("utf-8-sig")),
        ("windows.CSV", text.replace("\n", "\r\n").encode()),
        ("tabs.csv", text.replace(";", "\t").encode()),
        ("lines.jsonl", b"\xef\xbb\xbf" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_table(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "file_name,caption\n0.mp4,café\n".encode("cp1252"),
            r"not encoded in UTF-8 \(byte 0xe9 at 27\): save it as UTF",
        ),
        ("file_name,caption\n".encode("utf-16"), "not encoded in UTF-8"),
        (b"video,text\n0.mp4,hello\n", "has the columns video, text; it must have rows with file_name"),
        (b"file_name,caption\n0.mp4,red, round\n", "line 2: 3 cells under 2 columns; a caption that holds ','"),
        (b'file_name,caption\n0.mp4,"a "red" ball"\n', "line 2: "),
        (b"file_name,caption\n,hello\n", "row 1 has the columns file_name, caption, and file_name is empty"),
        (b"file_name,caption\n", "it has none"),
        (b"file_name,caption\n ,hello\n", "row 1 has the columns file_name, caption, and file_name is empty"),
        (b"", "has the columns of no header"),
    ],
)
def test_tables_that_cannot_be_read_say_what_was_found(tmp_path, content, sentence):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"metadata\.csv.*{sentence}"):
        read_table(tmp_path / "metadata.csv")


def test_rows_of_json_are_texts(tmp_path):
    for row, sentence in (
        ({"file_name": "0.mp4", "caption": 3}, "row 1: caption=3 must be text"),
        (["0.mp4"], r"row 1 has \['0.mp4'\]"),
    ):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=sentence):
            read_table(tmp_path / "metadata.jsonl")


def test_splits_of_a_table(tmp_path):
    """By the column, in the words that folders have; else by the folder; else by the name."""
    rows = ["file_name,split", "a.mp4,Validation", "test/b.mp4,", "test/c.mp4,train", "d\\e.mp4,"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    videos, classes = list_videos(tmp_path, captions=tmp_path / "metadata.csv", held_out=0.0)
    assert [video.split for video in videos] == ["val", "test", "train", "train"] and classes == []
    assert videos[3].path == tmp_path / "d" / "e.mp4"


def test_captions_beside_the_videos(tmp_path):
    folder(tmp_path, **{f"{split}__a__{i}": {} for split, i in (("train", 0), ("train", 1), ("val", 0))})
    (tmp_path / "train/a/0.txt").write_text("a red circle\n", encoding="utf-8-sig")
    (tmp_path / "val/a/0.txt").write_text("ein grüner Kreis", encoding="utf-8")
    (tmp_path / "train/a/notes.txt").write_text("of nobody")
    with pytest.warns(UserWarning, match=r"1 of 3 videos of .* have no caption: .* beside:\n.*1\.mp4$"):
        data = open_folder(tmp_path)
    assert [item["caption"] for item in map(data.datasets["train"].__getitem__, (0, 1))] == ["a red circle", ""]
    assert data.datasets["val"][0]["caption"] == "ein grüner Kreis" and data.class_names == ["a"]
    (tmp_path / "val/a/0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"0\.txt' is not encoded in UTF-8"):
        VideoFolder(root=str(tmp_path))


def test_a_damaged_embedding_is_named(tmp_path):
    (tmp_path / "text.safetensors").write_bytes(b"no tensors")
    (tmp_path / "metadata.csv").write_text("file_name,embedding\n0.mp4,text.safetensors")
    with pytest.raises(ValueError, match=r"embedding='.*text\.safetensors' cannot be read: "):
        VideoFolder(root=str(tmp_path))


# containers


def write_tracks(path: Path, *, start: float = 0.0, sound: float = 0.0, frames: int = 24, fps: int = 12, **options):
    """Frame `i` has red 10 i; it begins `start` seconds after the file, whose sound lasts `sound` seconds."""
    codec = {".webm": "libvpx", ".avi": "libx264"}.get(path.suffix, "libx264")
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream(codec, rate=fps, options={"g": "8", "crf": "10", "b": "1M"})
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000) if sound else None
        for i in range(frames):
            pixels = np.zeros((32, 48, 3), dtype=np.uint8)
            pixels[..., 0] = 10 * i
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i + round(start * fps), Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for i in range(int(sound * 48000) // 960) if audio else ():
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 48000, 960 * i, Fraction(1, 48000)
            container.mux(audio.encode(silence))
        if audio:
            container.mux(audio.encode())
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("longer_sound.mkv", {"sound": 8}),
        ("late.mkv", {"start": 5, "sound": 8}),
        ("late.webm", {"start": 5, "sound": 8}),
        ("late.mp4", {"start": 5, "sound": 8}),
        ("live.webm", {"live": "1"}),  # no length, no index
        ("reordered.avi", {}),  # no times of showing
    ],
)
def test_clips_are_made_of_frames_that_exist(tmp_path, name, options):
    path = write_tracks(tmp_path / name, **options)
    assert probe(path).seconds == pytest.approx(2, abs=0.01)
    for first in (0, 9, 20):
        clip = read_clip(path, times=np.arange(first, first + 4) / 12)
        frames = (clip[0].float().mean(dim=(1, 2)) / 10).round().int().tolist()
        assert frames == list(range(first, first + 4)), first
    with pytest.raises(EndsEarly, match=r"ends before second 2\.10") as ended:
        read_clip(path, times=np.array([1.5, 2.1]))
    assert ended.value.seconds == pytest.approx(2, abs=0.01)


def test_a_header_that_promises_too_much_gives_an_earlier_clip(tmp_path, monkeypatch):
    folder(tmp_path, train__a__0={"frames": 6})
    data = open_folder(tmp_path)
    clips = data.datasets["train"]
    clips.training = False
    (video,) = clips.videos
    clips.videos[0] = type(video)(video.path, "train", info=type(video.info)(10.0, 60.0, 32, 48))
    assert shown((clips[0]["video"] + 1) / 2) == [1, 2, 3, 4]
    folder(tmp_path, train__a__0={"frames": 3})
    assert "lasts 0.30 s, and a clip 0.40 s" in clips[0]["broken"] and not clips[0]["real"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damaged_files_are_unreadable_whatever_the_decoder_raises(tmp_path, suffix):
    good = write_video(tmp_path / f"good{suffix}").read_bytes()
    title, codec = (b"VideoHandler", b"avc1\x00") if suffix == ".mp4" else (b"Lavf", b"V_MPEG4/ISO/AVC")
    files = {"title": good.replace(title, b"\x8c" + title[1:]), "codec": good.replace(codec, b"zz" + codec[2:])}
    files |= {f"cut{n}": good[:n] for n in range(0, len(good), len(good) // 30)}
    for name, content in files.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        try:
            info = probe(path)
            read_clip(path, times=np.arange(int(info.seconds * info.fps)) / info.fps)
        except UnreadableVideo as error:
            assert path.name in str(error) and name != "title"
    with pytest.raises(UnreadableVideo, match="holds no video of a codec that FFmpeg knows"):
        probe(tmp_path / f"codec{suffix}")


def test_a_cover_is_not_the_video(tmp_path):
    """The still of an audio book comes first; FFmpeg ranks it last."""
    with av.open(str(tmp_path / "covered.mkv"), "w") as container:
        cover, video = (container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=10))
        for stream, size, kind in ((cover, 16, "yuvj420p"), (video, 32, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = size, size, kind
        cover.disposition = av.stream.Disposition.attached_pic
        for stream, size, count in ((cover, 16, 1), (video, 32, 4)):
            for _ in range(count):
                frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert probe(tmp_path / "covered.mkv").height == 32


# rotation


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_turned_as_the_file_says(tmp_path, degrees, flip):
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    stored[:16, :24, 0], stored[:16, 24:, 1] = 250, 250  # red at the left above, green beside it
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(degrees, hflip=flip)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())
    upright = np.rot90(stored, degrees // 90)
    upright = upright[:, ::-1] if flip else upright
    info = probe(tmp_path / "turned.mp4")
    assert (info.height, info.width) == upright.shape[:2]
    assert any(info.turned) == (degrees != 0 or flip)
    (frame,) = read_clip(tmp_path / "turned.mp4", times=np.array([0.0])).unbind(1)
    difference = (frame.permute(1, 2, 0).float() - torch.from_numpy(upright.copy()).float()).abs()
    assert difference.mean() < 20, difference.mean()  # another turn has 80 and more


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("aspect, shown", [("16/9", (32, 64)), ("1/2", (64, 36))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, shown, degrees):
    path, stored = tmp_path / "anamorphic.mp4", np.zeros((32, 36, 3), dtype=np.uint8)
    stored[:16] = 250  # bright above
    with av.open(str(path), "w") as container:
        options = {"crf": "10", "x264-params": f"sar={aspect}"}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 36, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())
    info = probe(path)
    shown = shown[::-1] if degrees else shown
    assert (info.height, info.width) == shown
    (frame,) = read_clip(path, times=np.array([0.0])).unbind(1)
    assert frame.shape == (3, *shown)
    bright = frame[:, :, : shown[1] // 2] if degrees else frame[:, : shown[0] // 2]
    assert bright.float().mean() > 220 and frame.float().mean() == pytest.approx(125, abs=6)


def test_turned_videos_go_to_the_size_of_what_is_shown(tmp_path):
    for name, degrees in (("wide", 0), ("tall", 90)):
        (tmp_path / "train/a").mkdir(parents=True, exist_ok=True)
        with av.open(str(tmp_path / f"train/a/{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            stream.set_display_rotation(degrees)
            for _ in range(6):
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    clips = open_folder(tmp_path, sizes=[[16, 32], [32, 16]], batch_size=1).datasets["train"]
    assert [clips.shape(i)[2:] for i in (0, 1)] == [(32, 16), (16, 32)]  # tall, wide
    assert os.path.basename(clips.videos[0].path) == "tall.mp4" and clips[0]["video"].shape == clips.shape(0)
