"""Tasks on sequences: poses and quality run, measure and refuse wrong options."""

import pytest
import torch
from foveal import train
from train_helpers import configure

RUN = ("callbacks=pretraining", "logger=none", "trainer.max_epochs=1", "trainer.limit_train_batches=2",
       "data.batch_size=4", "data.val_length=6", "data.train_length=8")  # fmt: skip
POSE = (*RUN, "task=pose", "data=skeletons", "metric=val/mpjpe", "metric_mode=min", "task.lifter.dim=4")
QUALITY = (
    *RUN,
    "task=quality",
    "data=degraded_photos",
    "metric=val/srcc",
    "metric_mode=max",
    "task.trunk.args.depth=1",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (POSE, ("loss", "mpjpe", "p_mpjpe", "mpjve", "mpjpe_mean")),
        (QUALITY, ("loss", "located", "srcc", "krcc", "plcc")),
    ],
)
def test_a_run(options, names, tmp_path):
    trainer, task, data = train.build(configure(tmp_path, *options, tiny=False))
    task.configure_model()
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    trainer.fit(task, datamodule=data)
    assert all(torch.isfinite(trainer.callback_metrics[f"val/{name}"]) for name in names)
    assert all(not p.equal(before[n]) for n, p in task.model.named_parameters() if not n.endswith(("mixture", "bias")))


@pytest.mark.parametrize(
    ("options", "wrong", "message"),
    [(POSE, "task.lifter.num_heads=3", "lifter"), (QUALITY, "task.regions=[3,4]", "regions")],
)
def test_wrong_options(options, wrong, message, tmp_path):
    with pytest.raises(Exception, match=message):
        train.build(configure(tmp_path, *options, wrong, tiny=False))[1].configure_model()
