"""The classification task and its callbacks: steps, schedules, averages, resumption, what a run leaves behind."""

import csv
import json
import pickle
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from foveal import train
from foveal.zoo.data.loader import PADDING
from foveal.zoo.tasks import ClassificationTask
from foveal.zoo.tasks.checkpoint import AtomicCheckpointIO
from foveal.zoo.tasks.ema import EMA
from foveal.zoo.tasks.sharding import repeated_blocks
from lightning.pytorch.callbacks import Callback
from timm.scheduler import create_scheduler_v2
from train_helpers import Crash, configure, differences


def fit(config, *callbacks: Callback, checkpoint=None):
    trainer, task, data = train.build(config)
    trainer.callbacks = [*callbacks, *trainer.callbacks]
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer, task, data


class Recorder(Callback):
    """What every step saw: the batch, and every generator after it."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        python, numpy = random.getstate(), np.random.get_state()
        self.steps[trainer.global_step] = {
            "images": batch[0].clone(),
            "targets": batch[1].clone(),
            "loss": outputs["loss"].clone(),
            "torch": torch.get_rng_state(),
            "numpy": numpy[1].tolist(),
            "python": list(python[1]),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }


UNVALIDATED = ("trainer.limit_val_batches=0", "metric=train/loss", "metric_mode=min")
SHORT = (
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=6",
    "logger=none",
    "data.batch_size=32",
    "callbacks=steps",
)


class CrashAfter(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crash


@pytest.mark.parametrize("step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 10))])
def test_resumed_steps_see_the_same_data_and_random_numbers(tmp_path, step):
    """Inside the first epoch, at its end, inside the second."""
    mixed = (*SHORT, "task.mixup={mixup_alpha:0.8,cutmix_alpha:1.0}", "callbacks.last_step.every_n_train_steps=1")
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer, task, _ = fit(configure(tmp_path / "whole", *mixed), whole)
    with pytest.raises(Crash):
        fit(configure(tmp_path / "part", *mixed), first, CrashAfter(step))
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed, resumed_task, _ = fit(configure(tmp_path / "part", *mixed), second, checkpoint=last)
    assert (list(first.steps), list(second.steps)) == (list(range(1, step + 1)), list(range(step + 1, 19)))
    assert differences(first.steps | second.steps, whole.steps) == []
    assert differences(dict(resumed_task.state_dict()), dict(task.state_dict())) == []
    assert differences(resumed.optimizers[0].state_dict(), trainer.optimizers[0].state_dict()) == []
    rows = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "part")]
    assert rows[0] == rows[1]


def test_a_finished_run_resumes_to_its_averaged_weights(tmp_path):
    _, task, _ = fit(configure(tmp_path, *SHORT))
    trained = {name: value.clone() for name, value in task.state_dict().items()}
    recorder = Recorder()
    _, again, _ = fit(configure(tmp_path, *SHORT), recorder, checkpoint=tmp_path / "checkpoints" / "last.ckpt")
    assert recorder.steps == {}
    assert differences(dict(again.state_dict()), trained) == []


def test_checkpoint_holds_average_and_raw_weights(tmp_path):
    trainer, task, _ = fit(configure(tmp_path, *SHORT, "callbacks.ema.decay=0.9"))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert differences(saved["state_dict"], dict(task.state_dict())) == []
    raw = saved["current_model_state"]
    assert any(not torch.equal(raw[name], value) for name, value in saved["state_dict"].items())
    trainer.test(task, datamodule=trainer.datamodule, ckpt_path=tmp_path / "checkpoints" / "last.ckpt", verbose=False)
    assert differences(dict(task.state_dict()), saved["state_dict"]) == []


class RawWeights(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(pl_module.model.head.weight.detach().clone())


@pytest.mark.parametrize("start", [0, 4])
def test_average_is_the_exponential_average(tmp_path, start):
    raw = RawWeights()
    options = (
        "callbacks.ema.decay=0.8",
        "callbacks.ema.warmup=false",
        "trainer.max_epochs=1",
        f"+callbacks.ema.update_starting_at_step={start}",
    )
    _, task, _ = fit(configure(tmp_path, *SHORT, *options), raw)
    expected = raw.steps[start]
    for weights in raw.steps[start + 1 :]:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(task.model.head.weight.detach(), expected)


class ValidatedWeights(Callback):
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.weights = pl_module.model.head.weight.detach().clone()


def test_delayed_average_validates_and_saves_the_current_weights_before_it_starts(tmp_path):
    raw, validated = RawWeights(), ValidatedWeights()
    options = ("trainer.max_epochs=1", "+callbacks.ema.update_starting_at_step=100")
    _, task, _ = fit(configure(tmp_path, *SHORT, *options), raw, validated)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for weights in (validated.weights, saved["state_dict"]["model.head.weight"], task.model.head.weight.detach()):
        assert torch.equal(weights, raw.steps[-1])


def test_average_survives_pickling_and_refuses_nonsense():
    assert pickle.loads(pickle.dumps(EMA(decay=0.5))).should_update(step_idx=0)
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay=1\.5"):
        EMA(decay=1.5)


def test_resuming_without_the_average_takes_the_raw_weights(tmp_path):
    fit(configure(tmp_path, *SHORT, "trainer.max_epochs=1", "callbacks.ema.decay=0.9"))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    config = configure(tmp_path, *SHORT, "callbacks.ema=null", "trainer.max_epochs=1")
    _, task, _ = fit(config, checkpoint=tmp_path / "checkpoints" / "last.ckpt")
    assert differences(dict(task.state_dict()), saved["current_model_state"]) == []


def test_training_loss_is_smoothed_cross_entropy(tmp_path):
    _, task, _ = train.build(configure(tmp_path, "task.label_smoothing=0.1"))
    task.eval()
    task.log = lambda *args, **kwargs: None
    images, targets = torch.randn(6, 1, 32, 32), torch.randint(0, 10, (6,))
    logits = F.log_softmax(task(images), dim=1)
    smooth = torch.full((6, 10), 0.01).scatter(1, targets[:, None], 0.91)
    torch.testing.assert_close(task.training_step((images, targets), 0), -(smooth * logits).sum(1).mean())
    padded = torch.cat([targets, torch.tensor([PADDING, PADDING])]), torch.cat([images, torch.zeros(2, 1, 32, 32)])
    torch.testing.assert_close(task.training_step((padded[1], padded[0]), 0), -(smooth * logits).sum(1).mean())


def test_official_schedule(tmp_path):
    """Warm-up from 1e-6 to 1e-3 over 20 epochs, cosine to 5e-6 at epoch 300, then cool-down; stepped per update."""
    config = configure(tmp_path, "experiment=in1k_natten_dinat_m", tiny=False)
    assert (config.trainer.max_epochs, config.task.scheduler.cooldown_epochs, config.task.lr_batch) == (310, 10, 1024)
    assert (config.data.batch_size, config.trainer.gradient_clip_val) == (128, 5.0)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.task.optimizer.lr)
    schedule = {"step_on_epochs": False, "updates_per_epoch": 1251, "num_epochs": 300}
    scheduler, epochs = create_scheduler_v2(optimizer, **schedule, **config.task.scheduler)
    assert epochs == 310
    for epoch, expected in ((0, 1e-6), (10, 5.005e-4), (300, 5e-6), (309, 5e-6)):
        scheduler.step_update(epoch * 1251)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3)


def test_learning_rate_follows_the_batch_and_layers_decay(tmp_path):
    options = ("task.lr_batch=128", "task.optimizer.lr=1e-3", "task.optimizer.layer_decay=0.5", "task.scheduler=null")
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accumulate_grad_batches=2")
    bare = ("data.batch_size=32", "callbacks.ema=null", "logger=none")
    trainer, task, _ = fit(configure(tmp_path, *options, *short, *bare))
    groups = trainer.optimizers[0].param_groups
    assert {group["lr"] for group in groups} == {1e-3 * 64 / 128}
    assert len({group["lr_scale"] for group in groups}) == 4  # stem, two blocks, head
    no_decay = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in task.model.named_parameters():
        plain = parameter.ndim < 2 or name in task.model.no_weight_decay()
        assert (id(parameter) in no_decay) == plain, name


def test_relative_position_bias_is_not_decayed(tmp_path):
    trainer, task, _ = fit(configure(tmp_path, "debug=fast", tiny=False))
    decayed = {id(p) for group in trainer.optimizers[0].param_groups if group["weight_decay"] for p in group["params"]}
    biases = [parameter for name, parameter in task.model.named_parameters() if name.endswith("rpb")]
    assert decayed and biases and not any(id(bias) in decayed for bias in biases)


VIT = ("model=timm", "model.name=vit_tiny_patch16_224", "model.args={img_size:32,patch_size:8,embed_dim:64,depth:2}")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param((*VIT, "+model.args.num_heads=2", "task.optimizer.lr=2e-3"), marks=pytest.mark.slow),
    ],
    ids=["natten_dinat_pico", "vit"],
)
def test_overfits_eight_images(tmp_path, model):
    recorder = Recorder()
    fit(configure(tmp_path, "debug=overfit", "logger=none", *model, tiny=False), recorder)
    losses = [float(step["loss"]) for step in recorder.steps.values()]
    assert losses[-1] < 0.01 * losses[0]


def test_repeated_blocks_are_the_innermost():
    model = timm.create_model("natten_dinat_pico", depths=(2, 2), num_heads=(1, 2), dilations=(2, 1))
    assert [type(block).__name__ for block in repeated_blocks(model)] == ["Block"] * 4
    vit = timm.create_model("vit_tiny_patch16_224", depth=3)
    assert repeated_blocks(vit) == list(vit.blocks)


@pytest.mark.slow
def test_compiled_blocks_train_like_eager_ones(tmp_path):
    compiled = ("task.compile.enabled=true", "task.compile.fullgraph=true")
    short = (*SHORT, "trainer.max_epochs=1", "trainer.limit_train_batches=2", *UNVALIDATED)
    plain = ("model.args.drop_path_rate=0.0", "model.args.proj_drop_rate=0.0")
    _, eager_task, _ = fit(configure(tmp_path / "eager", *short, *plain))
    _, task, _ = fit(configure(tmp_path / "compiled", *short, *plain, *compiled))
    assert all(block._compiled_call_impl is not None for block in task.model.blocks)
    assert task.state_dict().keys() == eager_task.state_dict().keys()
    for name, value in task.state_dict().items():
        torch.testing.assert_close(value, eager_task.state_dict()[name], msg=name, rtol=1e-3, atol=1e-4)


def test_checkpoints_are_written_beside_and_renamed(tmp_path):
    target = tmp_path / "folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, target)
    kept = target.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"a": lambda: None}, target)
    assert target.read_bytes() == kept


def test_run_folder_of_a_short_default_run(tmp_path):
    """The default experiment, three batches an epoch: everything that docs/training.md promises is there."""
    short = ("trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=2")
    value = train.train(configure(tmp_path / "run", *short, tiny=False))
    assert 0 <= value <= 1
    run = tmp_path / "run"
    for name in ("curves.png", "predictions.png", "receptive_field.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG"), name
    for name in ("config.yaml", "steps/version_0/metrics.csv", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 0, name
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5", "lr"} <= rows[0].keys()
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["packages"]["torch"] == torch.__version__ and start["cpu_cores"] >= 1


class Named(ClassificationTask):
    """Has classes of its own, and nothing to draw."""

    def setup(self, stage):
        super().setup(stage)
        self.hparams["class_names"] = [f"class {i}" for i in range(10)]

    def evaluate(self, split, batch, batch_idx):
        super().evaluate(split, batch, batch_idx)


def test_a_task_of_ones_own_names_its_classes_and_need_not_be_drawn(tmp_path):
    short = (*SHORT, "callbacks=default", "trainer.max_epochs=1", "trainer.limit_val_batches=1")
    trainer, task, data = train.build(configure(tmp_path, *short, "trainer.limit_test_batches=1"))
    task.__class__ = Named
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (
        saved["timm_config"]["label_names"] == saved["hyper_parameters"]["class_names"] == task.hparams["class_names"]
    )
    assert (tmp_path / "metrics.csv").exists() and not (tmp_path / "predictions.png").exists()
