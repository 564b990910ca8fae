"""Training on a folder of one's own videos: sizes are checked first, classes keep their names, what cannot be read does
not count; and the pictures of a run have room for what is written in them."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from foveal import train
from foveal.zoo.tasks.video import VideoDiffusionTask
from foveal.zoo.tasks.video_plots import plot_strips, write_grid
from foveal.zoo.tasks.video_report import collect
from foveal.zoo.video import VideoDiTPipeline
from PIL import Image
from train_helpers import configure
from video_files import damage, folder, open_folder

NANO = (
    "experiment=video_ucf101_s",
    "data.frames=4",
    "data.sizes=[[16, 24]]",
    "data.batch_size=2",
    "data.num_workers=0",
    "model.preset=nano",
    "+model.args.num_layers=1",
    "+model.args.num_attention_heads=1",
    "+model.args.attention_head_dim=16",
    "trainer.precision=32-true",
    "trainer.max_steps=1",
    "trainer.check_val_every_n_epoch=1",
    "task.scheduler.warmup_steps=0",
    "callbacks.report.sample_every=0",
    "callbacks.report.samples_per_class=1",
    "callbacks.report.steps=1",
    "logger=none",
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    names = ("10 m", "2 m")
    return folder(root, **{f"{split}__{name}__{i}": {} for split in ("train", "val") for name in names for i in (0, 1)})


def nano(root: Path, run_dir: Path, *overrides: str):
    return configure(run_dir, *NANO, f"data.root={root}", *overrides, tiny=False)


def test_a_run_keeps_the_names_of_its_classes(videos, tmp_path):
    train.train(nano(videos, tmp_path))
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["hyper_parameters"]["class_names"] == ["2 m", "10 m"]
    pipe = VideoDiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"2 m": 0, "10 m": 1}
    assert pipe(class_labels="10 m", num_inference_steps=1).frames.shape == (1, 4, 16, 24, 3)
    config = nano(videos, tmp_path, "data.class_names=[10 m,2 m]")
    config.ckpt_path = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(
        ValueError, match="numbers the classes otherwise than the data: label 0 is '2 m' there and '10 m'"
    ):
        train.train(config)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.sizes=[[16, 24], [30, 30]]", r"data\.sizes=\[\[16, 24\], \[30, 30\]\]: \[T, H, W\] = \[4, 30, 30\]"),
        ("data.frames=5", r"data\.frames=5 and data\.sizes=.*: \[T, H, W\] = \[5, 16, 24\]"),
    ],
)
def test_sizes_are_checked_before_the_videos_are_opened(videos, tmp_path, monkeypatch, override, sentence):
    monkeypatch.setattr("foveal.zoo.data.videofolder.probe", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(
        "foveal.zoo.tasks.video.VideoDiT.from_preset", lambda *_, **__: pytest.fail("a model was built")
    )
    with pytest.raises(Exception, match=rf"{sentence} must be multiples of the model's patch_size=\[2, 4, 4\]"):
        train.build(nano(videos, tmp_path, override))


def test_sizes_of_latents_are_checked_as_well():
    options = {"in_channels": 4, "num_classes": 2, "optimizer": {"opt": "adamw", "lr": 1e-3}}
    model = {"preset": "s", "conditioning": "class"}  # patches of 1x2x2
    with pytest.raises(ValueError, match=r"latents: \[T, H, W\] = \[3, 5, 6\] must be multiples of .*\[1, 2, 2\]"):
        VideoDiffusionTask(model=model, clip_sizes=("latents", [[3, 4, 6], [3, 5, 6]]), **options)
    VideoDiffusionTask(
        model=model | {"args": {"patch_size": [1, 1, 1]}}, clip_sizes=("latents", [[3, 5, 7]]), **options
    )


def test_what_cannot_be_decoded_is_not_shown(tmp_path):
    folder(tmp_path, **{f"{split}__a__{i}": {} for split in ("train", "val") for i in range(3)})
    damage(tmp_path / "val/a/1.mp4")
    data = open_folder(tmp_path, frames=8)
    assert len(collect(data, "val", most=3)["video"]) == 2
    for i in (0, 2):
        damage(tmp_path / f"val/a/{i}.mp4")
    with pytest.raises(ValueError, match=r"none of the val videos of shape .* can be decoded"):
        collect(data, "val", most=3)


def test_titles_of_grids_are_whole(tmp_path):
    """The page is as wide as its title; a grid that is wider keeps its width."""
    title = "generated, 25 steps, guidance 4"
    for columns, width in ((1, None), (2, None), (10, 10 * 70 + 6)):
        path = tmp_path / f"{columns}.gif"
        names = ["circle"] * columns
        write_grid(torch.zeros(columns, 3, 2, 32, 32), captions=names, columns=columns, path=path, title=title)
        page = np.asarray(Image.open(path).convert("L"))
        band = page[:24] < 200
        assert band[:, :-4].any(axis=0).nonzero()[0].max() > 170 and not band[:, -4:].any()
        assert width in (None, page.shape[1])
        black = (page[60] < 50).nonzero()[0]
        assert abs((black.min() + black.max()) / 2 - page.shape[1] / 2) < 3  # the grid is in the middle


@pytest.mark.parametrize("count", [1, 2])
def test_texts_of_strips_are_whole(tmp_path, count):
    """Two frames and long texts: nothing touches the edges; a `$` in the name of a class is a letter."""
    clips = torch.full((2, 3, 2, 32, 32), 0.9)
    path = plot_strips(
        clips,
        clips if count == 2 else None,
        captions=["a_class_with_a_long_name", "$x_1$"],
        title="85 % of 100 show their class; Fréchet distance 12.3",
        path=tmp_path / "strips.png",
    )
    page = matplotlib.image.imread(path)[:, :, :3].mean(axis=2)
    assert (page[:, :3] > 0.9).all() and (page[:, -3:] > 0.9).all() and (page[:60] < 0.3).any()
