"""The cache of latents: what is in it, that nothing is encoded twice, that a killed run goes on, training on it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKLWan
from foveal.zoo.data import VideoFolder, VideoLatents
from foveal.zoo.data.clips import cover, read_clip
from foveal.zoo.data.latent_videos import load_vae, read_keys
from foveal.zoo.data.latents import ShardWriter, clip_key, encode_folder, file_hash, main, vae_hash
from foveal.zoo.video.vae import encode
from video_files import av, damage, write_video

OPTIONS = {"frames": 5, "sizes": [[16, 24]], "num_workers": 0}
CLASSES = ("jump", "run")


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    small = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    AutoencoderKLWan(**small, latents_mean=[0.1] * 4, latents_std=[0.5] * 4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 3), ("val", 1)):
        for k, name in enumerate(CLASSES):
            for i in range(count):
                write_video(root / split / name / f"{i}.mp4", frames=10, blue=60 * i + 30 * k)
    return root


def make(videos: Path, root: Path, vae: Path, **more) -> list[str]:
    data = VideoFolder(root=str(videos), **OPTIONS)
    return [reason for reason in encode_folder(data, root, vae=load_vae(vae), vae_folder=vae, **more) if reason]


def state(root: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.glob("*.safetensors")}


def test_a_cache_holds_what_the_autoencoder_makes_of_the_clips(videos, vae, tmp_path):
    assert make(videos, tmp_path, vae, shard=4) == []
    assert len(read_keys(tmp_path)) == 6 and len(state(tmp_path)) == 2  # two of the eight files have the same bytes
    data = VideoLatents(root=str(tmp_path), batch_size=2, num_workers=0)
    assert (data.channels, data.num_classes, data.text_dim, data.class_names) == (4, 2, None, list(CLASSES))
    assert data.clip_sizes == (f"data.root={str(tmp_path)!r} with latents of [T, H, W] = [3, 4, 6]", [(3, 4, 6)])
    assert data.for_record == {"class_names": list(CLASSES)}
    with pytest.raises(ValueError, match=r"data\.class_names=\['run', 'jump'\] are not those of the latents"):
        VideoLatents(root=str(tmp_path), class_names=CLASSES[::-1])
    data.setup()
    batches = list(data.train_dataloader())
    assert [batch["video"].shape for batch in batches] == [(2, 4, 3, 4, 6)] * 3
    assert sorted(torch.cat([batch["label"] for batch in batches]).tolist()) == [0, 0, 0, 1, 1, 1]
    assert sum(len(batch["video"]) for batch in data.val_dataloader()) == 2
    times = torch.linspace(0.25, 0.65, 5).numpy()  # the middle of a second
    pixels = cover(read_clip(videos / "val" / "run" / "0.mp4", times=times), height=16, width=24)
    expected = encode(load_vae(vae), pixels[None])[0]
    mine = [data.datasets["val"][i] for i in range(2)]
    (ours,) = [item["video"] for item in mine if item["label"] == 1]
    torch.testing.assert_close(ours, expected.bfloat16().float())
    decoded = data.pixels(torch.stack([item["video"] for item in mine]))
    assert decoded.shape == (2, 3, 5, 16, 24) and decoded.min() >= 0 and decoded.max() <= 1


def test_nothing_is_encoded_twice(videos, vae, tmp_path):
    make(videos, tmp_path, vae)
    before = state(tmp_path)
    make(videos, tmp_path, vae)
    assert state(tmp_path) == before
    make(videos, tmp_path, vae, clips=2)  # their first and last second: two new ones of each
    assert len(read_keys(tmp_path)) == 18 and before.items() <= state(tmp_path).items()


def test_keys_follow_the_bytes_the_autoencoder_and_the_cut(vae, tmp_path):
    one = clip_key("a", "b", {"times": [0.0], "height": 1})
    assert one == clip_key("a", "b", {"height": 1, "times": [0.0]})
    others = [("c", "b", {"times": [0.0], "height": 1}), ("a", "c", {"times": [0.0], "height": 1})]
    others += [("a", "b", {"times": [0.5], "height": 1}), ("a", "b", {"times": [0.0], "height": 2})]
    assert len({one, *(clip_key(*other) for other in others)}) == 5
    copy = tmp_path / "vae"
    load_vae(vae).save_pretrained(copy)
    assert vae_hash(copy) == vae_hash(vae)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"latents_mean": [0.2] * 4}))
    assert vae_hash(copy) != vae_hash(vae)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(vae, tmp_path):
    """The third file is a pipe that nobody writes to: the command waits there until it is killed."""
    root, out = tmp_path / "in", tmp_path / "out"
    for i in (0, 1, 3):
        write_video(root / f"{i}.mp4", frames=10, blue=60 * i)
    (root / "metadata.csv").write_text("file_name,split\n" + "".join(f"{i}.mp4,train\n" for i in range(4)))
    os.mkfifo(root / "2.mp4")
    command = [sys.executable, "-m", "foveal.zoo.data.latents", str(root), str(out), "--vae", str(vae)]
    command += ["--frames", "5", "--size", "16x24", "--shard", "1", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(state(out)) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = state(out)
    assert len(before) == 2 and not (out / "latents.json").exists()
    (out / "half.partial").write_bytes(b"half")
    (root / "2.mp4").unlink()
    write_video(root / "2.mp4", frames=10, blue=120)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"4 clips in {out}".replace("\n", "") in done.stdout.replace("\n", "") and "100%" in done.stdout
    assert before.items() <= state(out).items() and len(state(out)) == 4
    whole = tmp_path / "whole"
    make(root, whole, vae)
    assert read_keys(whole).keys() == read_keys(out).keys()
    assert (whole / "latents.json").read_text() == (out / "latents.json").read_text()


def test_two_processes_do_not_write_into_the_same_file(tmp_path):
    """The name of a half-written shard has the process in it, and the shard's own has not."""
    writer, other = (ShardWriter(tmp_path, size=2) for _ in range(2))
    foreign = tmp_path / "of_another_process"
    for one in (writer, other):
        one.add("a", {"latents": torch.zeros(1)})
    name = hashlib.sha256(b"a.latents").hexdigest()[:16]
    foreign.mkdir()
    (tmp_path / f"{name}.partial").symlink_to(foreign)  # what is there already is not touched
    for one in (writer, other):
        one.flush()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [f"{name}.safetensors"]
    assert (tmp_path / f"{name}.partial").is_symlink()


def test_a_shard_that_is_gone_is_said(videos, vae, tmp_path):
    make(videos, tmp_path, vae, shard=2)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks \d of the 8 tensors that latents\.json lists: a \.safetensors"):
        VideoLatents(root=str(tmp_path))


def test_a_damaged_file_of_a_cache_is_named(videos, vae, tmp_path):
    make(videos, tmp_path, vae, shard=9)
    (shard,) = tmp_path.glob("*.safetensors")
    data = VideoLatents(root=str(tmp_path))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    for read in (lambda: VideoLatents(root=str(tmp_path)), lambda: data.dataset("train")[0]):
        with pytest.raises(ValueError, match=rf"latents='.*{shard.name}' cannot be read: "):
            read()
    (tmp_path / "latents.json").write_text('{"clips": [')
    with pytest.raises(ValueError, match=r"data\.root='.*latents\.json' cannot be read: Expecting value"):
        VideoLatents(root=str(tmp_path))


def test_sizes_that_the_autoencoder_cannot_take_are_said_first(videos, vae, tmp_path):
    for options, sentence in (
        ({"frames": 4}, r"--frames=4 must be 2 \* n \+ 1 for a AutoencoderKLWan"),
        ({"sizes": [[16, 24], [16, 18]]}, r"--size=16x18 must be multiples of 4"),
    ):
        data = VideoFolder(root=str(videos), **(OPTIONS | options))
        with pytest.raises(ValueError, match=sentence):
            list(encode_folder(data, tmp_path, vae=load_vae(vae), vae_folder=vae))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["16", "axb", "16x18"])
def test_the_command_says_a_mistake_in_one_sentence(videos, vae, tmp_path, size, capsys):
    with pytest.raises(typer.Exit) as ended:
        main(videos, tmp_path, vae, frames=5, size=[size], device="cpu")
    assert ended.value.exit_code == 2 and f"--size={size} must be" in capsys.readouterr().err


def test_turned_videos_have_keys_of_their_own(vae, tmp_path):
    """Caches from before videos were turned keep the latents of those that need no turning."""
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "0.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(180)
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    make(tmp_path / "in", tmp_path / "out", vae)
    times, size = [0.0, 0.1, 0.2, 0.3, 0.4], {"height": 16, "width": 24}
    key = clip_key(file_hash(tmp_path / "in" / "0.mp4"), vae_hash(vae), {"times": times, **size})
    turned = {"times": times, **size, "turned": (False, True, True)}
    expected = clip_key(file_hash(tmp_path / "in" / "0.mp4"), vae_hash(vae), turned)
    assert read_keys(tmp_path / "out").keys() == {f"{expected}.latents"} != {f"{key}.latents"}


def test_a_cache_without_videos_to_validate_on_says_so(vae, tmp_path):
    write_video(tmp_path / "in" / "train" / "a" / "0.mp4", frames=10)
    make(tmp_path / "in", tmp_path / "out", vae)
    with pytest.warns(UserWarning, match="holds nothing to validate on: its first clip stands in"):
        VideoLatents(root=str(tmp_path / "out"))


def test_a_video_that_breaks_off_is_left_out_whole(vae, tmp_path):
    """Its first clip can be decoded, its second cannot."""
    path = write_video(tmp_path / "in" / "train" / "a" / "0.mp4", fps=4)
    write_video(tmp_path / "in" / "train" / "a" / "1.mp4", fps=4)
    damage(path, first=11)
    read_clip(path, times=np.arange(5) / 4)
    (reason,) = make(tmp_path / "in", tmp_path / "out", vae, clips=2)
    assert "0.mp4" in reason
    assert len(json.loads((tmp_path / "out" / "latents.json").read_text())["clips"]) == 2


def test_broken_videos_are_said(videos, vae, tmp_path):
    for i in range(2):
        write_video(tmp_path / "in" / "train" / "a" / f"{i}.mp4", frames=10)
    damage(tmp_path / "in" / "train" / "a" / "1.mp4")
    (reason,) = make(tmp_path / "in", tmp_path / "out", vae)
    assert "1.mp4" in reason and len(read_keys(tmp_path / "out")) == 1


def test_errors(vae, tmp_path):
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        VideoLatents(root=None)
    with pytest.raises(FileNotFoundError, match=r"is no cache of latents: it has no latents\.json"):
        VideoLatents(root=str(tmp_path))
    (tmp_path / "latents.json").write_text(
        '{"vae": "", "classes": [], "text_dim": null, "sample_size": [1, 1, 1], "clips": []}'
    )
    with pytest.raises(ValueError, match="holds no latents to train on"):
        VideoLatents(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKL; accepted are AutoencoderKLWan"):
        load_vae(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors"):
        vae_hash(tmp_path)
