"""Glimpses: viewpoints inside of scenes, canvases of digits, a run whose canvas gathers what glimpses see."""

import numpy as np
import pytest
import torch
from foveal import train
from foveal.zoo.data.scattered import ScatteredDigits, scatter
from foveal.zoo.heads.glimpses import GlimpseClassifier, random_viewpoints
from foveal.zoo.tasks.glimpses import GlimpseTask
from train_helpers import configure

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch": 4, "canvas_grid": 4, "canvas_heads": 1,
        "canvas_head_dim": 16, "stride": 1, "init_values": 0.1, "in_chans": 1}  # fmt: skip
SHORT = ("task=glimpses", "data=scattered_digits", "callbacks=pretraining", "logger=none", "metric=val/map",
         "metric_mode=max", "data.batch_size=4", "data.val_length=6")  # fmt: skip


def test_viewpoints_lie_inside():
    center, scale = random_viewpoints(500, 3, least=0.2, most=0.6)
    assert center.shape == (3, 500, 2) and (center.abs() + scale[..., None]).max() <= 1
    assert 0.2 <= scale.min() < 0.22 and 0.58 < scale.max() <= 0.6


def test_scattered_digits():
    image, labels = scatter(np.ones((2, 8, 8)), np.array([3, 3]), canvas=20, draw=np.random.default_rng(0))
    assert image.sum() == 4 * 64 and labels.nonzero().flatten().tolist() == [3]
    data = [ScatteredDigits(seed=s, epoch_length=4, batch_size=4) for s in (0, 0, 1)]
    batches = []
    for x in data:
        x.setup()
        batches.append(next(iter(x.train_dataloader())))
    assert batches[0][0].shape == (4, 1, 64, 64) and 1 <= batches[0][1].sum(1).min() <= batches[0][1].sum(1).max() <= 4
    assert torch.equal(batches[0][0], batches[1][0]) and not torch.equal(batches[0][0], batches[2][0])
    assert torch.equal(data[0].datasets["test"][3][0], data[2].datasets["test"][3][0])
    images = torch.stack([data[0].datasets["test"][i][0] for i in range(100)])
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05
    assert torch.equal(
        data[0].datasets["test"][3][0].min(), (torch.tensor(0.0) - data[0].spec.mean[0]) / data[0].spec.std[0]
    )
    with pytest.raises(ValueError, match=r"data\.side=40"):
        ScatteredDigits(side=40)


def test_glimpses_hand_on_what_they_saw():
    """Logits after a glimpse depend on the scenes' parts that were seen until then, and on no others."""
    model = GlimpseClassifier(3, glimpse=8, glimpses=3, least=0.25, most=0.25, **TINY).eval()
    scene = torch.rand(1, 1, 32, 32)
    center, scale = torch.tensor([[[-0.75, -0.75]], [[0.75, 0.75]], [[-0.75, -0.75]]]), torch.full((3, 1), 0.25)
    model.viewpoints = lambda batch, generator=None: (center, scale)
    other = scene.clone()
    other[..., 24:, 24:] += 1.0  # the second glimpse sees it
    with torch.no_grad():
        before, after = model(scene), model(other)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1]) and not torch.allclose(before[:, 2], after[:, 2])
    model(scene).sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # the canvas is read again, so writing learns
    with pytest.raises(ValueError, match="least=0"):
        GlimpseClassifier(3, least=0.0, **TINY)


@pytest.mark.slow
def test_overfits_eight_scenes():
    """Seen through the same glimpses again and again, with the sizes of configs/task/glimpses.yaml."""
    torch.manual_seed(0)
    data = ScatteredDigits(batch_size=8)
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    sizes = TINY | {"embed_dim": 64, "num_heads": 4, "canvas_grid": 8, "canvas_heads": 2, "canvas_head_dim": 32}
    model = GlimpseClassifier(10, least=0.3, most=0.5, registers=2, canvas_registers=4, **sizes)
    optimizer, loss = torch.optim.AdamW(model.parameters(), 2e-3), torch.tensor(0.0)
    for _ in range(80):
        loss = GlimpseTask._loss(model(images, generator=torch.Generator().manual_seed(0)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # the labels' base rates give 0.64


@pytest.mark.slow
def test_a_run_and_wrong_options(tmp_path):
    few = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "task.canvas.depth=2")
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *few, tiny=False))
    trainer.fit(task, datamodule=data)
    assert all(torch.isfinite(trainer.callback_metrics[f"val/{name}"]) for name in ("loss", "map", "map_first"))
    with pytest.raises(ValueError, match=r"task\.canvas"):
        train.build(configure(tmp_path, *SHORT, "+task.canvas.pictures=2", tiny=False))[1].configure_model()
