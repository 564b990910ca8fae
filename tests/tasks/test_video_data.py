"""Moving digits: what a clip shows, and that the seed alone decides it."""

import numpy as np
import pytest
import torch
from foveal.zoo.data import MovingDigits
from foveal.zoo.data.moving_digits import bounce, moving_clip, resize_scans
from foveal.zoo.tasks.video_metrics import change_beyond_shift
from sklearn.datasets import load_digits


def batches(data: MovingDigits, epoch: int = 0) -> list[dict]:
    data.setup()
    loader = data.train_dataloader()
    loader.epoch_sampler.set_epoch(epoch)
    return list(loader)


def test_bouncing():
    assert bounce(2, 1, 6, 4) == [2, 3, 4, 3, 2, 1]
    assert bounce(1, -1, 4, 4) == [1, 0, 1, 2]
    assert bounce(3, 3, 5, 4) == [3, 2, 1, 4, 1]
    assert bounce(0, 1, 3, 0) == [0, 0, 0]


def test_a_clip_shows_one_scan_that_moves():
    scan = np.arange(1, 65, dtype=np.float32).reshape(8, 8) / 64
    velocities = set()
    for seed in range(300):
        clip = moving_clip(scan, canvas=12, frames=6, generator=torch.Generator().manual_seed(seed))
        assert clip.shape == (1, 6, 12, 12)
        corners = []
        for frame in clip[0]:
            y, x = (frame == 1 / 64).nonzero()[0].tolist()
            assert torch.equal(frame[y : y + 8, x : x + 8], torch.from_numpy(scan))
            assert torch.count_nonzero(frame) == 64
            corners.append((y, x))
        steps = np.diff(corners, axis=0)
        assert abs(steps).max() == 1 and (abs(steps).sum(1) > 0).all()
        velocities.add(tuple(steps[0].tolist()))
    assert len(velocities) == 8


def test_faster_digits():
    scan = np.ones((8, 8), dtype=np.float32)
    speeds = set()
    for seed in range(200):
        clip = moving_clip(scan, canvas=16, frames=3, speed=2, generator=torch.Generator().manual_seed(seed))
        corners = [frame.nonzero()[0].tolist() for frame in clip[0]]
        speeds |= set(abs(np.diff(corners, axis=0)).max(1).tolist())
    assert speeds >= {1, 2} and max(speeds) == 2


def test_larger_digits_are_the_scans_enlarged():
    large = resize_scans(np.stack([np.eye(8, dtype=np.float32), np.ones((8, 8), np.float32)]), 24)
    assert large.shape == (2, 24, 24) and large.min() == 0 and large.max() == 1
    np.testing.assert_allclose(large[1], 1, atol=1e-6)
    centres = large[0].reshape(8, 3, 8, 3)[:, 1, :, 1]  # a pixel of the scan is the middle one of nine
    np.testing.assert_allclose(centres, np.eye(8), atol=1e-6)
    clip = MovingDigits(canvas=32, side=24, frames=8).dataset("test")[0]["video"]
    assert clip.shape == (1, 8, 32, 32)
    assert float(change_beyond_shift(clip[None])) < 1e-6 < float(change_beyond_shift(clip[None], shift=0))
    with pytest.raises(ValueError, match=r"data\.canvas=16 must be at least 24"):
        MovingDigits(canvas=16, side=24)


def test_without_shuffle_a_clip_is_the_same_in_every_epoch():
    data = MovingDigits(epoch_length=64, shuffle=False)
    first, second = batches(data), batches(data, epoch=1)
    assert len(first) == 2 and all(torch.equal(a["video"], b["video"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(batches(MovingDigits(epoch_length=64), epoch=1)[0]["video"], first[0]["video"])


def test_batches_are_normalised_and_follow_the_seed():
    data = MovingDigits(epoch_length=640, seed=3)
    first = batches(data)
    assert len(first) == 20
    video, label = torch.cat([b["video"] for b in first]), torch.cat([b["label"] for b in first])
    assert video.shape == (640, 1, 6, 12, 12) and video.dtype == torch.float32 and label.dtype == torch.int64
    assert abs(video.mean()) < 0.02 and abs(video.std() - 1) < 0.02
    assert label.bincount().min() > 40
    pixels = data.denormalize(video)
    torch.testing.assert_close(data.normalize(pixels), video, rtol=0, atol=1e-5)
    assert abs(pixels.min()) < 1e-6 and abs(pixels.max() - 1) < 1e-5
    again = batches(MovingDigits(epoch_length=640, seed=3))
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(batches(MovingDigits(epoch_length=640, seed=4))[0]["video"], first[0]["video"])
    assert not torch.equal(batches(data, epoch=1)[0]["video"], first[0]["video"])


def test_held_out_clips_never_change_and_show_other_scans():
    one, two = MovingDigits(seed=0, val_length=50), MovingDigits(seed=9, val_length=50)
    for data in (one, two):
        data.setup()
    loaders = [data.val_dataloader() for data in (one, two)]
    loaders[1].epoch_sampler.set_epoch(5)
    held_out = [torch.cat([batch["video"] for batch in loader]) for loader in loaders]
    assert held_out[0].shape[0] == 50
    assert torch.equal(*held_out)
    scans = {split: {scan.tobytes() for scan in one.datasets[split].scans} for split in ("train", "val", "test")}
    everything = {scan.tobytes() for scan in (load_digits().images / 16).astype(np.float32)}
    assert scans["train"] | scans["val"] | scans["test"] == everything
    assert [len(some) for some in scans.values()] == [1257, 180, 360] and len(everything) == 1797


def test_validation_and_test_clips_move_differently():
    """Where a scan starts and how it moves: clip i of one does not foretell clip i of the other."""
    data = MovingDigits(val_length=60, test_length=60)
    shown = []
    for split in ("val", "test"):
        clips = (data.denormalize(data.dataset(split)[i]["video"]) > 0.1 for i in range(60))
        shown.append(torch.stack([clip.any(-1).float().argmax(-1)[0] for clip in clips]))  # top rows, [60, 6]
    assert (shown[0] == shown[1]).all(1).float().mean() < 0.3


def test_clips_of_an_epoch_resume_inside_it():
    whole = batches(MovingDigits(epoch_length=320), epoch=2)
    data = MovingDigits(epoch_length=320)
    data.load_state_dict({"epoch": 2, "batches": 4, "global_batch": 32})
    rest = batches(data, epoch=2)
    assert [torch.equal(a["video"], b["video"]) for a, b in zip(whole[4:], rest, strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": 7}, r"data\.canvas=7 must be at least 8"),
        ({"frames": 0}, r"data\.frames=0 must be at least 1"),
        ({"speed": 0}, r"data\.speed=0 must be at least 1"),
        ({"batch_size": 0}, r"data\.batch_size=0 must be at least 1"),
    ],
)
def test_sizes_that_are_too_small(options, message):
    with pytest.raises(ValueError, match=message):
        MovingDigits(**options)


def test_more_videos_a_step_than_there_are():
    data = MovingDigits(epoch_length=16)
    data.setup()
    with pytest.raises(ValueError, match="needs 32 training videos, and there are 16"):
        data.train_dataloader()
