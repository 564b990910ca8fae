"""The probing task: a head learns on frozen features, neighbours are counted, a wrong head is refused."""

import pytest
from foveal import train
from train_helpers import configure


def test_a_probe_learns_and_its_trunk_does_not(tmp_path):
    config = configure(
        tmp_path, "task=probing", "task.neighbors=5", "trainer.max_epochs=1", "trainer.limit_train_batches=4",
        "trainer.limit_val_batches=2", "callbacks=steps", "logger=none", "task.scheduler.warmup_epochs=0",
    )  # fmt: skip
    trainer, task, data = train.build(config)
    task.configure_model()
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    trainer.fit(task, datamodule=data)
    moved = {n for n, p in task.model.named_parameters() if not p.equal(before[n])}
    assert moved and all(n.startswith("head.") for n in moved)
    assert 0 <= trainer.callback_metrics["val/knn"] <= 1
    assert 0 <= trainer.callback_metrics["val/acc1"] <= 1


def test_a_head_has_a_name(tmp_path):
    config = configure(tmp_path, "task=probing", "task.head.name=best")
    with pytest.raises(ValueError, match="head='best'"):
        train.build(config)
