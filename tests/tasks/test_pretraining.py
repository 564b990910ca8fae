"""The pre-training task: each objective and masking runs and learns, a teacher follows, wrong options are refused."""

import pytest
import timm
import torch
from foveal import train
from foveal.zoo.data.loader import PADDING
from train_helpers import configure

SHORT = (
    "task=pretraining",
    "callbacks=pretraining",
    "logger=none",
    "metric=val/loss",
    "metric_mode=min",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
    "task.vit={patch_size:8,embed_dim:16,depth:1,num_heads:2,decoder_embed_dim:16,decoder_depth:1,decoder_num_heads:2}",
)


@pytest.mark.parametrize(
    "options",
    [
        ("task.masking=green", "task.probe_shots=1"),
        ("task.masking=hard", "task.loss_prediction=true", "task.teacher_decay=0.5"),
        ("task.objective=positions", "task.ratio=0.5"),
        ("task.objective=cross_view", "task.view={degrees:10}"),
        ("task.broad_context={hidden:32}", "task.teacher_decay=0.5"),
    ],
)
def test_objectives(options, tmp_path):
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *options, tiny=False))
    task.configure_model()
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    trainer.fit(task, datamodule=data)
    moved = [n for n, p in task.model.named_parameters() if not p.equal(before[n])]
    crossed = "task.objective=cross_view" in options
    blocks = "student.enc_blocks" if crossed else "student.blocks"
    assert any(n.startswith(blocks) for n in moved) and not any("pos_embed" in n for n in moved)
    assert any(n.startswith("teacher.") for n in moved) == ("task.teacher_decay=0.5" in options)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert ("val/probe" in trainer.callback_metrics) == ("task.probe_shots=1" in options)
    assert ("val/accuracy" in trainer.callback_metrics) == ("task.objective=positions" in options)
    if task.loss_prediction:
        assert -1 <= trainer.callback_metrics["val/rank"] <= 1
    assert ("val/wrong_view" in trainer.callback_metrics) == crossed
    assert ("val/context" in trainer.callback_metrics) == ("task.broad_context={hidden:32}" in options)
    names = set(task.trunk_state_dict())
    assert {"pos_embed", "norm.weight", "blocks.0.attn.qkv.weight"} <= names and ("cls_token" in names) != crossed
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2,
                            in_chans=1, num_classes=0, class_token=not crossed,
                            global_pool="avg" if crossed else "token", fc_norm=False)  # fmt: skip
    vit.load_state_dict(task.trunk_state_dict())
    assert not any("decoder" in n or "mask" in n for n in names)


@pytest.mark.parametrize(
    "wrong", ["task.objective=words", "task.masking=pink", "task.masking=hard", "task.view={turn:1}"]
)
def test_wrong_options(wrong, tmp_path):
    with pytest.raises(Exception, match=wrong.split("=")[0]):
        train.build(configure(tmp_path, *SHORT, wrong, tiny=False))


def test_images_that_do_not_count(tmp_path):
    """Padding of a rank and images that could not be read change no metric, and a batch without images no weight."""
    _, task, _ = train.build(configure(tmp_path, *SHORT, tiny=False))
    task.configure_model()
    task.log = lambda *args, **kwargs: None
    images, targets = torch.randn(5, 1, 32, 32), torch.tensor([3, 1, 4, PADDING, PADDING])
    task.evaluate("val", (images, targets), 0)
    task.evaluate("test", (images[:3], targets[:3]), 0)
    task.evaluate("test", (images[3:], targets[3:]), 1)
    val, test = task.metrics["val_loss"], task.metrics["test_loss"]
    assert val.weight == test.weight == 3 and torch.equal(val.compute(), test.compute())
    loss = task.training_step((images[:0], targets[:0]), 0)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in task.parameters() if p.requires_grad)
