"""Samples and judge of a video run: fewer texts than samples, several sizes, no classes told, precision, resumption."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from foveal import train
from foveal.zoo.data import VideoLatents
from foveal.zoo.data.video import VideoData
from foveal.zoo.tasks.video_prompts import read_prompts, sample_prompts
from foveal.zoo.tasks.video_report import VideoReport, collect, make_pipeline
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from video_tasks import task_alone, tiny

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Clips(Dataset):
    """Grey noise of 6×12×12, every second clip of 6×12×24 where there are two sizes, each with a text of its own."""

    def __init__(self, size: int, sizes: int = 1):
        self.size, self.sizes = size, sizes

    def __len__(self) -> int:
        return self.size

    def shape(self, index: int) -> tuple[int, ...]:
        return 1, 6, 12, 12 * (1 + index % self.sizes)

    def __getitem__(self, index: int) -> dict:
        text = torch.full((3, 6), float(index))
        mask = torch.ones(3, dtype=torch.bool)
        video = torch.randn(self.shape(index), generator=torch.Generator().manual_seed(index))
        return {"video": video, "label": index // 2 % 2, "caption": str(index), "text": text, "text_mask": mask}


class NoiseData(VideoData):
    def __init__(self, *, val: int, sizes: int = 1):
        options = {"channels": 1, "frames": 6, "height": 12, "width": 12, "mean": (0.0,), "std": (1.0,)}
        super().__init__(batch_size=1, text_dim=6, **options)
        self.datasets = {split: Clips(size, sizes) for split, size in (("train", 16), ("val", val), ("test", 16))}

    def setup(self, stage: str | None = None) -> None:
        """Everything is there."""


class Generated(VideoReport):
    """Keeps what was generated, and for which texts."""

    def _generate(self, task, data, condition, count) -> Tensor:
        self.texts = condition["encoder_hidden_states"][:, 0, 0].tolist()
        self.made = super()._generate(task, data, condition, count)
        return self.made


@pytest.mark.parametrize(("val", "sizes", "texts"), [(1, 1, [0] * 4), (4, 2, [0, 2, 0, 2])])
def test_fewer_texts_than_samples_come_round_again(tmp_path, val, sizes, texts):
    task = task_alone(conditioning="cross")
    report = Generated(str(tmp_path), steps=1, samples_per_class=1)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, callbacks=[report], **QUIET)
    trainer.fit(task, datamodule=NoiseData(val=val, sizes=sizes))
    assert report.texts == texts and report.made.shape == (4, 1, 6, 12, 12)
    assert (tmp_path / "samples" / "step_0000001.gif").is_file()


def test_conditions_of_ones_own_are_sampled(tmp_path):
    Image.fromarray(np.full((20, 30), 200, np.uint8)).save(tmp_path / "grey.png")
    save_file({"text": torch.ones(2, 6)}, tmp_path / "a.safetensors")
    table = tmp_path / "prompts.csv"
    table.write_text(
        "caption,embedding,image,last_image\na cat,a.safetensors,,\na dog,a.safetensors,grey.png,grey.png\n"
    )
    report = VideoReport(str(tmp_path / "run"), steps=1, samples_per_class=1, prompts=str(table))
    options = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    trainer = Trainer(callbacks=[report], **options, **QUIET)
    task, data = task_alone(conditioning="cross"), NoiseData(val=4)
    trainer.fit(task, datamodule=data)
    assert (tmp_path / "run" / "prompts" / "step_0000001.gif").is_file()
    trainer.test(task, datamodule=data, verbose=False)
    with Image.open(tmp_path / "run" / "prompts.gif") as sheet:
        assert sheet.n_frames == 6
    (cat, dog), pipeline = report._prompts, make_pipeline(task, data)
    assert (cat.caption, dog.caption) == ("a cat", "a dog") and not cat.arguments.keys() & {"image", "last_image"}
    first = sample_prompts(pipeline, [cat, dog], steps=1, guidance_scale=2.0)
    assert torch.equal(first, sample_prompts(pipeline, [cat, dog], steps=1, guidance_scale=2.0))
    given = torch.full((1, 12, 12), 200 / 255)
    torch.testing.assert_close(first[1, :, 0], given)
    torch.testing.assert_close(first[1, :, 5], given)
    assert not torch.allclose(first[0, :, 0], given, atol=1e-2)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "does not exist"),
        ("caption\n", {}, "has no rows"),
        ("caption,prompt\na,b\n", {}, r"a column of .*='prompt' is not known"),
        ("class\ncut\n", {"conditioning": "class", "class_names": ["cat", "dog"]}, "line 2: class='cut' is not known"),
        ("caption\na cat\n", {"conditioning": "cross"}, "line 2: the column embedding is empty"),
        ("caption,embedding\na,b.safetensors\n", {"conditioning": "cross"}, "b.safetensors' cannot be read"),
        ("image\nno.png\n", {}, r"image=.*no.png: No such file"),
        ("caption,embedding\na,a.safetensors\n", {"conditioning": "cross", "text_dim": 6}, "has text of 4 channels"),
    ],
)
def test_tables_of_conditions_that_cannot_be_used_are_named(tmp_path, text, options, message):
    save_file({"text": torch.ones(2, 4)}, tmp_path / "a.safetensors")
    if text is not None:
        (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_prompts(tmp_path / "prompts.csv", **{"conditioning": None} | options)


def test_collected_videos_have_the_size_asked_for():
    data = NoiseData(val=7, sizes=2)
    assert collect(data, "val", most=9)["caption"] == ["0", "2", "4", "6"]
    assert collect(data, "val", most=2, shape=(1, 6, 12, 24))["caption"] == ["1", "5"]
    with pytest.raises(ValueError, match=r"the val split has no videos of shape \(1, 6, 9, 9\)"):
        collect(data, "val", most=2, shape=(1, 6, 9, 9))


def test_a_model_that_is_told_no_class_is_judged_by_its_distance(tmp_path):
    short = ("callbacks.report.judge_steps=3", "callbacks.report.judged=10", "callbacks.report.steps=1")
    train.train(tiny(tmp_path, *short, "model.conditioning=null", "trainer.max_epochs=1"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["frechet"] > 0 and "accuracy" not in metrics
    assert (tmp_path / "samples.png").is_file()


def test_samples_are_made_in_the_precision_of_training(tmp_path):
    """Under autocast a linear layer gives bfloat16; the weights and the samples stay float32."""
    task, seen = task_alone(conditioning="cross"), []
    report = Generated(str(tmp_path), steps=1, samples_per_class=1)
    task.model.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer = Trainer(accelerator="cpu", precision="bf16-mixed", callbacks=[report], **QUIET)
    task._trainer = trainer
    condition, _ = report._conditions(task, NoiseData(val=2), 2)
    assert report._generate(task, NoiseData(val=2), condition, 2).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


def test_a_resumed_run_counts_validations_on(tmp_path):
    report, resumed = (VideoReport(str(tmp_path), sample_every=3) for _ in range(2))
    report._validations = 2
    resumed.load_state_dict(report.state_dict())
    assert resumed._validations == 2


class Traveller(AutoencoderTiny):
    """Notes where it is sent and what it does there, and stays where it is."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def to(self, device):
        self.seen.append(torch.device(device).type)
        return self

    def decode(self, latents):
        self.seen.append("decodes")
        return super().decode(latents)


def test_latents_are_decoded_where_it_is_asked_for():
    data = object.__new__(VideoLatents)
    data._vae = Traveller()
    pixels = data.pixels(torch.zeros(2, 4, 1, 1, 1), device=torch.device("meta"))
    assert pixels.shape == (2, 3, 1, 8, 8)
    assert data._vae.seen == ["meta", "decodes", "decodes", "cpu"]
