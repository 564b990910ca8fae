"""Tiny runs and tasks of video diffusion."""

import torch
from foveal.zoo.tasks.video import VideoDiffusionTask
from train_helpers import configure

TINY = (
    "experiment=moving_digits",
    "model.args={num_layers:1,num_attention_heads:1,attention_head_dim:16}",
    "data.batch_size=8",
    "data.epoch_length=48",
    "data.val_length=12",
    "data.test_length=20",
    "task.scheduler.warmup_steps=2",
    "callbacks.report.sample_every=0",
    "callbacks.report.judge_steps=0",
    "trainer.max_epochs=3",
    "logger=none",
)


def tiny(run_dir, *overrides: str):
    return configure(run_dir, *TINY, *overrides, tiny=False)


def task_alone(*, conditioning="class", num_layers=1, **options) -> VideoDiffusionTask:
    """A tiny task outside a trainer, its zero-initialised output made random."""
    args = {"num_layers": num_layers, "num_attention_heads": 1, "attention_head_dim": 16}
    model = {"preset": "nano", "conditioning": conditioning, "args": args}
    data = {"in_channels": 1, "num_classes": 10, "text_dim": 6}
    task = VideoDiffusionTask(model=model, **data, optimizer={"opt": "adamw", "lr": 1e-3}, **options)
    task.configure_model()
    task.log = lambda *args, **kwargs: None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in task.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return task
