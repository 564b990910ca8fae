"""The restoration task: metrics as published, pairs that follow from seeds, networks that learn, wrong options."""

import pytest
import torch
from foveal import train
from foveal.zoo.data.photos import Photos
from foveal.zoo.tasks.restoration import charbonnier, luma, psnr, psnr_luma
from train_helpers import configure

SHORT = (
    "task=restoration",
    "data=photos",
    "callbacks=pretraining",
    "logger=none",
    "metric=val/psnr",
    "metric_mode=max",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "data.batch_size=2",
)


def test_metrics():
    white, black = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    torch.testing.assert_close(luma(white), torch.full((1, 1, 8, 8), 235 / 255))
    torch.testing.assert_close(luma(black), torch.full((1, 1, 8, 8), 16 / 255))
    torch.testing.assert_close(psnr(black, white), torch.zeros(1))
    assert psnr(white, white).item() == pytest.approx(120)
    assert psnr_luma(black, white).item() == pytest.approx(-20 * torch.tensor(219 / 255).log10().item(), abs=1e-4)
    edged = white.clone()
    edged[..., 0, :] = 0
    assert psnr_luma(edged, white, border=2).item() == pytest.approx(120)
    assert charbonnier(white, white).item() == pytest.approx(1e-3)


def test_pairs_follow_from_the_seed():
    data = [Photos(crop=24, scale=2, epoch_crops=4, batch_size=2, seed=s) for s in (0, 0, 1)]
    batches = []
    for x in data:
        x.setup()
        batches.append(next(iter(x.train_dataloader())))
    assert batches[0][0].shape == (2, 3, 12, 12) and batches[0][1].shape == (2, 3, 24, 24)
    assert torch.equal(batches[0][1], batches[1][1]) and not torch.equal(batches[0][1], batches[2][1])
    assert batches[0][0].min() >= 0 and batches[0][0].max() <= 1
    whole = next(iter(data[0].test_dataloader()))
    assert whole[1].shape == (1, 3, 426, 640) and whole[0].shape == (1, 3, 213, 320)
    plain, other = (Photos(crop=24, scale=1, degrade="none", epoch_crops=8, recolor=x) for x in (False, True))
    for x in (plain, other):
        x.setup()
    given, whole, _ = next(iter(other.train_dataloader()))
    assert torch.equal(given, whole) and not torch.equal(whole, next(iter(plain.train_dataloader()))[1])
    assert torch.equal(plain.datasets["val"][0][0], other.datasets["val"][0][0]) and 0 <= whole.min() < whole.max() <= 1
    for wrong in ({"scale": 1}, {"degrade": "noise"}, {"crop": 47}):
        with pytest.raises(ValueError, match="data"):
            Photos(**wrong)


@pytest.mark.parametrize(
    "options",
    [
        ("task.network.args={width:8,up_width:8,depth:1}", "data.scale=3", "task.self_ensemble=true"),
        ("task.network.name=catanet", "task.network.args={depth:1}", "data.crop=64", "task.tile=48"),
        (
            "task.network.name=region_attention",
            "task.network.args={width:8,middle:3,encoder:[1,1],decoder:[1,1]}",
            "data.scale=1",
            "data.degrade=noise",
            "task.loss=charbonnier",
        ),
    ],
)
def test_networks(options, tmp_path):
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *options, tiny=False))
    trainer.fit(task, datamodule=data)
    for name in ("psnr", "psnr_rgb", "psnr_base", "ssim", "loss"):
        assert torch.isfinite(trainer.callback_metrics[f"val/{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["restoration", "compression", "style"])
def test_images_beside_each_other(name, tmp_path):
    small = {
        "restoration": ("data=photos", "data.crop=24", "task.network.args={width:8,up_width:8,depth:1}"),
        "compression": (
            *("data=photos", "data.scale=1", "data.degrade=none"),
            "task.codec={width:8,latent:10,slices:2,sent:4,num_heads:2}",
        ),
        "style": ("data=styles", "data.crop=64", "task.network.width=8", "data.test_length=3"),
    }
    options = (f"task={name}", "callbacks=images", "logger=none", "metric=val/loss", "metric_mode=min", *SHORT[6:])
    trainer, task, data = train.build(configure(tmp_path, *options, *small[name], tiny=False))
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    assert (tmp_path / "images.png").stat().st_size > 10_000
    assert all(torch.isfinite(x) for key, x in trainer.callback_metrics.items() if key.startswith("test/"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("task.network.name=a3n", "network"),
        ("task.loss=l3", "loss"),
        ("task.tile=32", "above 32"),
        ("task.network.name=shadow_remover", "does not enlarge"),
        ("task.network.args={breadth:3}", "does not work"),
    ],
)
def test_wrong_options(wrong, message, tmp_path):
    with pytest.raises(Exception, match=message):
        train.build(configure(tmp_path, *SHORT, wrong, tiny=False))
