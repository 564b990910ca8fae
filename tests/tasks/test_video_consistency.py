"""Consistency distillation: intervals and targets written out, few steps after training, a run that was resumed."""

from types import SimpleNamespace

import pytest
import torch
from foveal import train
from foveal.zoo.tasks.video_consistency import HUBER, ConsistencyTask, huber_distance
from foveal.zoo.video import VideoDiT, VideoDiTPipeline
from foveal.zoo.video.flow import add_noise, shift_time
from train_helpers import Crash, CrashAt, assert_one_sentence, differences
from video_helpers import randomize
from video_tasks import TINY, tiny

CAUSAL = [{"type": "dense", "causal": True}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small causal model of moving digits, nothing in it zero, as a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    args = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "attention": CAUSAL}
    randomize(VideoDiT.from_preset("nano", conditioning="class", num_classes=10, **args)).save_pretrained(folder)
    return folder


def task_of(saved, **options) -> ConsistencyTask:
    model = {"pretrained": str(saved), "conditioning": "class"}
    optimizer = {"opt": "adamw", "lr": 1e-3}
    options = {"teacher": str(saved), "shift": 2.0, "condition_dropout": 0.0, "intervals": (4, 4)} | options
    task = ConsistencyTask(model=model, in_channels=1, num_classes=10, optimizer=optimizer, **options)
    task.configure_model()
    task.log = lambda *args, **kwargs: None
    return task


def a_batch() -> dict:
    video = torch.randn(4, 1, 6, 12, 12, generator=torch.Generator().manual_seed(1))
    return {"video": video, "label": torch.arange(4), "real": torch.ones(4, dtype=torch.bool)}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("interval", [1, 3])
def test_the_student_says_what_it_says_nearer_to_the_video(saved, interval, guidance):
    task, batch = task_of(saved, teacher_guidance=guidance), a_batch()
    for parameter in task.model.parameters():
        parameter.data.mul_(0.9)  # student and teacher differ
    video, noise = batch["video"], torch.randn(batch["video"].shape, generator=torch.Generator().manual_seed(2))
    t, nearer = (shift_time(torch.tensor(end / 4), 2.0) for end in (interval, interval - 1))

    def says(model, x, time, labels=batch["label"]):
        return model(x, 1000 * time.expand(4), class_labels=labels).sample

    with torch.no_grad():
        noisy = (1 - t) * video + t * noise
        velocity, null = (says(task.teacher.model, noisy, t, k) for k in (batch["label"], torch.full((4,), 10)))
        velocity = null + guidance * (velocity - null)
        before = noisy - (t - nearer) * velocity
        target = before - nearer * says(task.model, before, nearer)
        prediction = noisy - t * says(task.model, noisy, t)
        expected = ((prediction - target).square().mean(dim=(1, 2, 3, 4)) + HUBER**2).sqrt().sub(HUBER).mean()
    loss = task.loss(video, noise, t.expand(4), torch.ones(4), {"class_labels": batch["label"]})
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in task.teacher.model.parameters())
    ours = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    alone = huber_distance(noisy - t * says(task.model, noisy, t), target, weight=torch.ones(4))
    alone.backward()  # the target has no gradient
    for name, parameter in task.model.named_parameters():
        assert (ours[name] - parameter.grad).norm() < 1e-3 * parameter.grad.norm() + 1e-6, name


def test_times_are_ends_of_intervals_and_given_frames_do_not_count(saved):
    task, video = task_of(saved, context=0.5), torch.zeros(400, 1, 6, 12, 12)
    torch.manual_seed(0)
    t, weight = task.draw_time(video)
    ends = shift_time(torch.arange(1, 5) / 4, 2.0)
    assert t.shape == weight.shape == (400, 3) and set(t[:, -1].tolist()) == set(ends.tolist())
    given = (weight == 0).sum(dim=1)
    assert set(given.tolist()) == {0, 1, 2} and 0.4 < (given > 0).float().mean() < 0.6
    for row, count in zip(range(400), given.tolist(), strict=True):
        assert not t[row, :count].any() and not weight[row, :count].any() and weight[row, count:].all()
        assert t[row, count:].eq(t[row, -1]).all()
    batch, noise = a_batch(), torch.randn(4, 1, 6, 12, 12)
    t, weight = torch.tensor([[0.0, 0.8, 0.8]] * 4), torch.tensor([[0.0, 1.0, 1.0]] * 4)
    loss = task.loss(batch["video"], noise, t, weight, {"class_labels": batch["label"]})
    other = noise.clone()
    other[:, :, :2] = 9.0  # noise of a frame that is given
    assert torch.equal(task.loss(batch["video"], other, t, weight, {"class_labels": batch["label"]}), loss)
    noisy = add_noise(batch["video"], noise, t)
    assert torch.equal(task.jump(noisy, t, {"class_labels": batch["label"]})[:, :, :2], batch["video"][:, :, :2])


def test_intervals_grow_with_training(saved):
    task = task_of(saved, intervals=(4, 32))
    task._trainer = SimpleNamespace(estimated_stepping_batches=100, global_step=0)
    counts = []
    for step in (0, 50, 100):
        task._trainer.global_step = step
        counts.append(task.count_intervals())
    assert counts == [4, 11, 32]  # the geometric mean in the middle
    task.eval()
    task._trainer.global_step = 0
    assert task.count_intervals() == 32
    task.train()._trainer.estimated_stepping_batches = float("inf")
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs"):
        task.count_intervals()


def few_steps(run_dir, saved, *overrides: str):
    chosen = ("experiment=moving_digits_few_steps", f"model.pretrained={saved}", "model.args=null")
    kept = [option for option in TINY if not option.startswith(("experiment=", "model.args="))]
    return tiny(run_dir, *chosen, *kept, *overrides)


@pytest.mark.slow
def test_a_run_saves_a_pipeline_of_few_steps_and_resumes(saved, tmp_path):
    """Six steps, and six of a run that was interrupted after the fourth, whose intervals go on where they were."""

    def fit(name, *callbacks, checkpoint=None):
        often = ("callbacks=video_steps", "callbacks.last_step.every_n_train_steps=2", "trainer.max_epochs=2")
        trainer, task, data = train.build(few_steps(tmp_path / name, saved, "data.epoch_length=24", *often))
        trainer.callbacks = [*callbacks, *trainer.callbacks]
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return dict(task.state_dict())

    whole = fit("whole")
    with pytest.raises(Crash):
        fit("part", CrashAt(4))
    assert differences(fit("part", checkpoint=tmp_path / "part" / "checkpoints" / "last.ckpt"), whole) == []
    pipeline = VideoDiTPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": [1, 2], "sigmas": [1, 0.5], "guidance_scale": 1.0, "chunk_frames": 1}
    frames = [pipeline(**call, generator=torch.Generator().manual_seed(0)).frames for _ in range(2)]
    assert (frames[0] == frames[1]).all() and not any("teacher" in name for name in whole)


MISTAKES = [
    (["task.teacher=null"], "task.teacher=FOLDER is needed"),
    (["task.intervals=[8,4]"], "task.intervals=[8, 4] must be two counts"),
    (["task.teacher_guidance=0.5"], "task.teacher_guidance=0.5 must be 1, no guidance, or more"),
    (["task.time_per=frame"], "task.time_per=frame has no path from noise to data"),
    (["model.conditioning=null"], "task.teacher_guidance=2.0 needs model.conditioning"),
    (["task.context=2"], "task.context=2 must be between 0 and 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[a[0] for a, _ in MISTAKES])
def test_mistakes_get_one_sentence(arguments, sentence, saved, tmp_path, monkeypatch, capsys):
    fast = ["experiment=moving_digits_few_steps", f"model.pretrained={saved}", "trainer.fast_dev_run=true"]
    assert_one_sentence([*fast, f"runs={tmp_path}", *arguments], sentence, monkeypatch, capsys)
