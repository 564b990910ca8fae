"""The video task: its loss, its conditions, resumption, and what a run leaves behind."""

import csv
import json
import os
import random
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from foveal import train
from foveal.weights import load
from foveal.zoo.data.loader import mix_seed
from foveal.zoo.tasks.ema import EMA, ema_update
from foveal.zoo.tasks.video import VALIDATION_TIMES, VideoDiffusionTask
from foveal.zoo.video.flow import sample_time
from foveal.zoo.video.pipeline import VideoDiTPipeline
from killed_runs import ROOT, finish, kill_at
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from train_helpers import QUIET, Crash, CrashAt, assert_one_sentence, configure, differences
from video_tasks import TINY, task_alone, tiny

OFTEN = ("callbacks=video_steps", "callbacks.last_step.every_n_train_steps=3")


def fit(config, *callbacks: Callback, checkpoint=None):
    trainer, task, data = train.build(config)
    trainer.callbacks = [*callbacks, *trainer.callbacks]
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer, task, data


def a_batch(size: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "video": torch.randn(size, 1, 6, 12, 12, generator=generator),
        "label": torch.arange(size) % 10,
        "text": torch.randn(size, 3, 6, generator=generator),
        "text_mask": torch.tensor([[True, True, False]] * size),
        "real": torch.ones(size, dtype=torch.bool),
    }


def test_training_loss_is_the_error_of_the_velocity():
    task, batch = task_alone(shift=2.0, condition_dropout=0.5, seed=4), a_batch()
    task.on_train_batch_start(batch, 3)
    loss = task.training_step(batch, 3)
    torch.manual_seed(mix_seed(4, 0, 0, 3))
    t = sample_time((6,), shift=2.0)
    labels = torch.where(torch.rand(6) < 0.5, 10, batch["label"])
    noise, at = torch.randn_like(batch["video"]), t.view(-1, 1, 1, 1, 1)
    assert 0 < (labels == 10).sum() < 6
    x = (1 - at) * batch["video"] + at * noise
    predicted = task.model(x, 1000 * t, class_labels=labels).sample
    torch.testing.assert_close(loss, (predicted - (noise - batch["video"])).square().mean())
    assert task.training_step(batch, 3) != loss  # other noise


def test_steps_follow_from_seed_rank_and_batch():
    task, batch = task_alone(), a_batch()
    losses = []
    for index in (0, 1, 0):
        task.on_train_batch_start(batch, index)
        losses.append(float(task.training_step(batch, index)))
    assert losses[0] == losses[2] != losses[1]


def test_conditions_are_dropped_at_their_rate():
    batch = a_batch(4000)
    torch.manual_seed(0)
    labels = task_alone().condition(batch, dropout=0.1)["class_labels"]
    dropped = labels == 10
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(labels[~dropped], batch["label"][~dropped])
    text = task_alone(conditioning="cross")
    told = text.condition(batch, dropout=0.1)
    dropped = (told["encoder_hidden_states"] == 0).all(dim=(1, 2))
    assert 0.08 < dropped.float().mean() < 0.12
    assert told["encoder_attention_mask"][dropped].all()  # zeros are seen, or attention would have nothing
    assert torch.equal(told["encoder_attention_mask"][~dropped], batch["text_mask"][~dropped])
    null = text.null_condition(told)
    assert torch.equal(null["encoder_hidden_states"][dropped], told["encoder_hidden_states"][dropped])
    assert task_alone(conditioning=None).condition(batch, dropout=0.5) == {}


@pytest.mark.parametrize("conditioning", [None, "class", "cross", "joint"])
def test_every_conditioning_trains(conditioning):
    """Two layers: the last one of "joint" makes nothing of its text and lacks the parameters for it."""
    task, batch = task_alone(conditioning=conditioning, num_layers=2), a_batch()
    task.training_step(batch, 0).backward()
    missing = [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_given_first_frames_are_clean_and_have_no_loss():
    task, batch = task_alone(first_frame=1.0), a_batch()
    t, weight = task.draw_time(batch["video"])
    assert t.shape == weight.shape == (6, 3)  # patches of two frames
    assert not t[:, 0].any() and not weight[:, 0].any() and (weight[:, 1:] == 1).all()
    assert torch.equal(t[:, 1], t[:, 2]) and (t[:, 1] > 0).all()
    t, weight = task_alone(first_frame=0.5).draw_time(a_batch(1000)["video"])
    assert 0.45 < (weight[:, 0] == 0).float().mean() < 0.55
    t, _ = task_alone(time_per="frame").draw_time(batch["video"])
    assert t.shape == (6, 3) and t.unique().numel() == 18
    task.training_step(batch, 0).backward()


def test_given_last_frames_leave_something_to_make():
    video = a_batch(1000)["video"]  # three frames of patches
    t, weight = task_alone(first_frame=0.5, last_frame=1.0).draw_time(video)
    assert not t[:, 2].any() and not weight[:, 2].any() and (t[:, 1] > 0).all() and (weight[:, 1] == 1).all()
    assert torch.equal(t == 0, weight == 0) and 0.45 < (weight[:, 0] == 0).float().mean() < 0.55
    t, weight = task_alone(first_frame=1.0, last_frame=1.0).draw_time(video[:, :, :4])
    assert not t[:, 0].any() and (t[:, 1] > 0).all() and (weight == torch.tensor([0.0, 1.0])).all()
    t, weight = task_alone(first_frame=1.0).draw_time(video[:, :, :2])
    assert (t > 0).all() and (weight == 1).all()


def test_context_is_a_random_number_of_first_frames():
    video = a_batch(1000)["video"]  # three frames of patches
    t, weight = task_alone(context=0.5).draw_time(video)
    given = (weight == 0).sum(dim=1)
    assert torch.equal(t == 0, weight == 0) and all(0.2 < (given == n).float().mean() < 0.3 for n in (1, 2))
    assert (given == 3).sum() == 0 and weight[:, 2].all() and (weight.diff(dim=1) >= 0).all()
    t, weight = task_alone(context=1.0, last_frame=1.0).draw_time(video)
    assert weight.any(dim=1).all() and torch.equal(t == 0, weight == 0)
    t, weight = task_alone(context=1.0).draw_time(video[:, :, :2])
    assert (t > 0).all() and (weight == 1).all()


def test_validation_loss_is_at_fixed_times_and_leaves_padding_out():
    task, batch = task_alone(), a_batch()
    task.eval()
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        for metric in task.metrics.values():
            metric.reset()
        task.validation_step(batch, 2)
        values.append({name: float(m.compute()) for name, m in task.metrics.items() if name.startswith("val")})
    assert values[0] == values[1]
    noise = torch.randn(batch["video"].shape, generator=torch.Generator().manual_seed(mix_seed(0, 2)))
    expected = []
    for time in VALIDATION_TIMES:
        x = (1 - time) * batch["video"] + time * noise
        predicted = task.model(x, torch.full((6,), 1000 * time), class_labels=batch["label"]).sample
        expected.append(float((predicted - (noise - batch["video"])).square().mean()))
    assert values[0]["val_loss_9"] == pytest.approx(expected[-1], rel=1e-5)
    assert values[0]["val_loss"] == pytest.approx(sum(expected) / 5, rel=1e-5)
    batch["real"][4:] = False
    batch["video"][4:] = 1e6
    task.metrics["val_loss"].reset()
    task.validation_step(batch, 2)
    assert float(task.metrics["val_loss"].compute()) < 10


def test_training_leaves_padding_out():
    """In file order the last batch is filled up; here the padding is enormous."""
    task, batch = task_alone(first_frame=0.5), a_batch()
    batch["real"][4:] = False
    batch["video"][4:] = 1e6
    assert float(task.training_step(batch, 0).detach()) < 10


def test_the_flow_is_mixed_in_float32_under_a_model_in_bfloat16():
    task, batch = task_alone().bfloat16(), a_batch()
    batch["video"] = batch["video"].bfloat16()
    given = []
    task.model.register_forward_pre_hook(lambda module, args: given.append(args))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's precision bf16-true does around a step
    try:
        loss = task.training_step(batch, 0)
        task.validation_step(batch, 0)
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for args in given for value in args} == {loss.dtype} == {torch.float32}
    assert given[-1][1].tolist() == pytest.approx([900.0] * 6, abs=1e-3)  # of bfloat16, 898.4


def test_an_average_in_float32_follows_weights_in_bfloat16(tmp_path):
    """Small steps add up in it, and validation, which looks at the average, does not round it."""

    class Watch(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            self.before = [p.clone() for p in average_of(trainer).parameters()]
            self.raw = [p.clone() for p in pl_module.model.parameters()]

        def on_validation_end(self, trainer, pl_module):
            self.after = [p.clone() for p in average_of(trainer).parameters()]
            self.back = [p.clone() for p in pl_module.model.parameters()]

    def average_of(trainer):
        (ema,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))
        return ema._average_model.module.model

    value = [torch.ones(3)]
    ema_update(value, [torch.full((3,), 1.5, dtype=torch.bfloat16)], 1, decay=0.999)
    torch.testing.assert_close(value[0], torch.full((3,), 1.0005))
    watch = Watch()
    quiet = ("trainer.precision=bf16-true", "trainer.max_epochs=1", "callbacks.report=null", "callbacks.last=null")
    fit(tiny(tmp_path, *quiet, "callbacks.best=null"), watch)
    assert {p.dtype for p in watch.after} == {torch.float32} and {p.dtype for p in watch.back} == {torch.bfloat16}
    assert all(map(torch.equal, watch.before, watch.after)) and all(map(torch.equal, watch.raw, watch.back))
    assert any(not torch.equal(p, p.bfloat16().float()) for p in watch.after)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_schedules_without_an_end_do_not_ask_for_one(name):
    task = task_alone(scheduler={"name": name, "warmup_steps": 4})
    task._trainer = Trainer(max_epochs=-1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    schedule = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert schedule.get_last_lr()[0] == (1e-3 if name == "constant" else 0)


def test_arguments_of_the_schedule_are_passed_on():
    """Two restarts over eight steps: the rate is back at its top after four."""
    task = task_alone(scheduler={"name": "cosine_with_restarts", "num_cycles": 2})
    task._trainer = Trainer(max_epochs=-1, max_steps=8, logger=False, enable_checkpointing=False)
    settings = task.configure_optimizers()
    rates = []
    for _ in range(8):
        rates.append(settings["lr_scheduler"]["scheduler"].get_last_lr()[0])
        settings["optimizer"].step()
        settings["lr_scheduler"]["scheduler"].step()
    assert rates[:4] == pytest.approx(rates[4:]) and rates[0] == 1e-3 and rates[3] < 2e-4


def test_average_warms_up():
    average, current = [torch.zeros(3)], [torch.ones(3)]
    for n, decay in ((1, 2 / 11), (90, 0.9)):
        value = [average[0].clone()]
        ema_update(value, current, torch.tensor(n), decay=0.9, warmup=True)
        torch.testing.assert_close(value[0], torch.full((3,), 1 - decay))
    value = [average[0].clone()]
    ema_update(value, current, torch.tensor(1), decay=0.9)
    torch.testing.assert_close(value[0], torch.full((3,), 0.1))


def end_state(run_dir) -> dict:
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    state["callbacks"] = {key: value for key, value in state["callbacks"].items() if "ModelCheckpoint" not in key}
    return state


@pytest.mark.parametrize(("crash", "scheduler"), [(7, "constant_with_warmup"), (16, "cosine")])
def test_resumed_run_ends_with_the_same_bits(tmp_path, crash, scheduler):
    """18 steps, a checkpoint every 3; in the middle of an epoch, and in the last one; a schedule that has to know how
    many steps there are, and one that does not."""
    often = (*OFTEN, f"task.scheduler.name={scheduler}")
    fit(tiny(tmp_path / "whole", often[-1]))
    with pytest.raises(Crash):
        fit(tiny(tmp_path / "cut", *often), CrashAt(crash))
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == crash // 3 * 3
    fit(tiny(tmp_path / "cut", *often), checkpoint=checkpoint)
    ours, theirs = end_state(tmp_path / "cut"), end_state(tmp_path / "whole")
    assert ours["global_step"] == 18 and differences(ours, theirs) == []
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_what_a_run_leaves_behind(tmp_path):
    judged = ("callbacks.report.judge_steps=5", "callbacks.report.judged=10", "callbacks.report.sample_every=1")
    short = ("callbacks.report.steps=2", "callbacks.report.samples_per_class=1", "trainer.max_epochs=1")
    value = train.train(tiny(tmp_path, *judged, *short))
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert float(row["val/loss"]) == pytest.approx(value)
    assert {"train/loss", "val/loss_t0.1", "val/loss_t0.9", "lr", "step"} <= row.keys()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"accuracy", "accuracy of held-out videos", "frechet", "frechet of noise", "test/loss"} <= metrics.keys()
    assert metrics["change beyond a shift"] > 0.1  # of a model that is hardly trained
    assert metrics["change beyond a shift of 10 held-out videos"] < 1e-5
    for name in ("samples.gif", "samples/step_0000006.gif"):
        with Image.open(tmp_path / name) as grid:
            assert grid.n_frames == 6 and grid.width > 10 * 64 and grid.info["loop"] == 0
    saved = VideoDiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert (saved.scheduler.config.shift, list(saved.config.sample_size)) == (2.0, [6, 12, 12])
    assert (saved.config.pixel_mean, saved.config.pixel_std) == ([0.1365], [0.2942])
    assert saved.labels == {str(digit): digit for digit in range(10)}
    average = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weights = saved.transformer.state_dict()
    assert weights and all(torch.equal(average[f"model.{name}"], value) for name, value in weights.items())
    torch.testing.assert_close(load(tmp_path / "checkpoints" / "last.ckpt"), dict(weights), rtol=0, atol=0)
    for name in ("curves.png", "samples.png"):
        assert matplotlib.image.imread(tmp_path / name)[60:, :, :3].std() > 0.05, name


def test_bf16_trains_on_cpu(tmp_path):
    _, task, _ = fit(tiny(tmp_path, "trainer.precision=bf16-mixed", "trainer.max_epochs=1"))
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert task.metrics["val_loss"].dtype == torch.float32


def test_overfits_eight_clips(tmp_path):
    """Loss of the first step against that of the last: noise, times and clips are the same in all."""
    losses = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    quiet = ("callbacks.report=null", "callbacks.last=null", "logger=none", "trainer.limit_val_batches=0")
    fit(configure(tmp_path, "experiment=moving_digits", "debug=overfit", *quiet, tiny=False), Recorder())
    assert len(losses) == 100
    assert losses[-1] < 0.01 * losses[0]


def test_a_sweep_puts_the_least_loss_first(tmp_path, monkeypatch):
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=3", "callbacks.report=null", "callbacks.last=null")
    sweep = ("task.optimizer.lr=0.0,1e-2", "test=false", f"runs={tmp_path}")
    monkeypatch.setattr(sys, "argv", ["foveal-train", "-m", *QUIET, *TINY, *short, *sweep])
    train.main()
    (folder,) = (tmp_path / "sweeps").iterdir()
    best, worst = csv.DictReader((folder / "comparison.csv").open())
    assert (best["job"], worst["job"]) == ("1", "0")
    assert float(best["val/loss"]) < float(worst["val/loss"])


MISTAKES = [
    (["model.preset=nanno"], "model.preset='nanno' is not known: did you mean 'nano'"),
    (["model.args={depth:3}"], "model.preset='nano' cannot be built with model.args="),
    (["model.conditioning=cross"], "model.conditioning='cross' needs data with embedded text"),
    (["task.scheduler.name=cosin"], "task.scheduler.name='cosin' is not known: did you mean 'cosine'"),
    (["task.time_per=clip"], "task.time_per='clip' is not known"),
    (["+task.scheduler.num_cycle=2"], "key of task.scheduler='num_cycle' is not known: did you mean 'num_cycles'"),
    (["task.shift=0"], "task.shift=0 must be positive"),
    (["task.time_std=-1"], "task.time_std=-1 must not be negative"),
    (["callbacks.report.judged=1"], "callbacks.report.judged=1 must be at least 2"),
    (["callbacks.report.guidance_scale=-1"], "callbacks.report.guidance_scale=-1 must be at least 0"),
    (
        ["trainer.max_epochs=-1", "trainer.fast_dev_run=false", "callbacks.report=null"],
        "task.scheduler.name='cosine' needs an end: set trainer.max_epochs or trainer.max_steps",
    ),
    (["task.condition_dropout=2"], "task.condition_dropout=2 must be between 0 and 1"),
    (
        ["data.canvas=13"],
        "data.frames=6 and data.canvas=13: [T, H, W] = [6, 13, 13] must be multiples of the model's patch_size=[2, 4",
    ),
    (["data=videofolder"], "data.root is not set"),
    (["data=videofolder", "data.root=/no/such/folder"], "data.root='/no/such/folder' is not a folder"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    fast = ["experiment=moving_digits", "trainer.fast_dev_run=true", f"runs={tmp_path}"]
    assert_one_sentence([*fast, *arguments], sentence, monkeypatch, capsys)


def initial_and_trained(config) -> tuple[dict, dict, VideoDiffusionTask]:
    _, task, _ = train.build(config)
    start = {name: value.clone() for name, value in task.model.state_dict().items()}
    _, task, _ = fit(config)
    return start, {name: value.clone() for name, value in task.model.state_dict().items()}, task


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    """One step of plain SGD on two ranks moves by the mean of the gradients of each rank's own noise and clips."""
    plain = ("task.optimizer.opt=momentum", "task.optimizer.lr=1.0", "task.optimizer.weight_decay=0.0")
    plain += ("~task.optimizer.betas", "++task.optimizer.momentum=0.9", "task.scheduler=null", "callbacks.ema=null")
    plain += ("callbacks.best=null", "callbacks.last=null", "callbacks.report=null", "trainer.gradient_clip_val=null")
    step = (
        "trainer.limit_train_batches=1",
        "trainer.max_epochs=1",
        "data.batch_size=4",
        "trainer.limit_val_batches=0",
        "metric=train/loss",
    )
    config = tiny(tmp_path, *plain, *step, "trainer.strategy=ddp_spawn", "trainer.devices=2")
    start, trained, task = initial_and_trained(config)
    data = train.build(tiny(tmp_path, "data.batch_size=8"))[2]
    data.setup()
    whole = next(iter(data.train_dataloader()))
    gradients = []
    for rank in range(2):
        task.model.load_state_dict(start)
        task.model.zero_grad()
        mine = {name: value[rank::2] for name, value in whole.items()}
        torch.manual_seed(mix_seed(0, rank, 0, 0))
        t, weight = task.draw_time(mine["video"])
        condition = task.condition(mine, dropout=task.condition_dropout)
        task.loss(mine["video"], torch.randn_like(mine["video"]), t, weight, condition).backward()
        gradients.append({name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None})
    moved = {name: start[name] - trained[name] for name in gradients[0]}
    assert max(float(value.abs().max()) for value in moved.values()) > 1e-3
    for name, value in moved.items():
        torch.testing.assert_close(value, (gradients[0][name] + gradients[1][name]) / 2, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_sharded_processes_train_sample_and_save_as_two_whole_ones(tmp_path):
    """FSDP against DDP over one epoch of plain SGD, samples and judge on the way: weights, losses, pipeline; and one
    process goes on from the sharded checkpoint."""
    plain = ("task.optimizer.opt=momentum", "task.optimizer.lr=0.05", "~task.optimizer.betas", "callbacks.ema=null")
    plain += ("++task.optimizer.momentum=0.9", "task.scheduler=null", "trainer.max_epochs=1", "data.batch_size=4")
    shown = ("callbacks.report.sample_every=1", "callbacks.report.samples_per_class=1", "callbacks.report.steps=2")
    judged = ("callbacks.report.judge_steps=5", "callbacks.report.judged=10")
    whole = tiny(tmp_path / "whole", *plain, "trainer.strategy=ddp_spawn", "trainer.devices=2")
    fit(whole)
    sharded = ("trainer=fsdp", "trainer.devices=2", "trainer.precision=32-true", f"run_dir={tmp_path / 'sharded'}")
    command = [sys.executable, str(ROOT / "train.py"), *QUIET, *TINY, *plain, *shown, *judged, *sharded]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    ours, theirs = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("sharded", "whole")
    )
    assert ours["global_step"] == theirs["global_step"] == 6
    weights = {name: value for name, value in ours["state_dict"].items() if name.startswith("model.")}
    for name, value in weights.items():
        torch.testing.assert_close(value, theirs["state_dict"][name], rtol=0, atol=1e-5, msg=name)
    rows = [next(csv.DictReader((tmp_path / run / "metrics.csv").open())) for run in ("sharded", "whole")]
    for name in ("train/loss", "val/loss", "val/loss_t0.9"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), rel=1e-4), name
    saved = VideoDiTPipeline.from_pretrained(tmp_path / "sharded" / "pipeline").transformer.state_dict()
    assert {f"model.{name}" for name in saved} == weights.keys()
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in saved.items())
    metrics = json.loads((tmp_path / "sharded" / "metrics.json").read_text())
    assert {"accuracy", "frechet", "test/loss"} <= metrics.keys()
    for name in ("samples.gif", "samples.png", "curves.png", "samples/step_0000006.gif"):
        assert (tmp_path / "sharded" / name).stat().st_size > 1000, name

    on = tiny(tmp_path / "sharded", *plain, "trainer.max_epochs=2", "data.batch_size=8")
    trainer, _, _ = fit(on, checkpoint=tmp_path / "sharded" / "checkpoints" / "last.ckpt")
    assert trainer.global_step == 12


def start(runs):
    options = [*QUIET, *TINY[:-1], "+logger.csv.flush_logs_every_n_steps=1", "trainer.log_every_n_steps=1"]
    command = [sys.executable, str(ROOT / "train.py"), *options, *OFTEN, "test=false", "ckpt_path=auto", f"runs={runs}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(runs) -> dict:
    """End of the run in a folder; one that was killed before its first checkpoint is not counted."""
    finish(start(runs))
    (checkpoint,) = runs.glob("*/*/checkpoints/last.ckpt")
    return end_state(checkpoint.parents[1])


ATTEMPTS = [pytest.param(i, marks=pytest.mark.exhaustive) for i in range(1, 10)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    return finished(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("attempt", [pytest.param(0, marks=pytest.mark.slow), *ATTEMPTS])
def test_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tmp_path, attempt):
    assert kill_at(start(tmp_path), tmp_path, random.SystemRandom().randrange(1, 18))
    ours = finished(tmp_path)
    assert ours["global_step"] == 18 and differences(ours, uninterrupted) == []
