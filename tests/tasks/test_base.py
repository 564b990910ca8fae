"""A third task on `Task`: it overfits a batch, and a run that is stopped inside an epoch resumes with the same bits."""

import torch
import torch.nn.functional as F
from foveal.zoo.data.base import SeededData
from foveal.zoo.tasks._base import Task
from foveal.zoo.tasks.resume import Resumption
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric


class Points(SeededData):
    """Points of a plane, to be given back from noise beside them."""

    item = "points"

    def setup(self, stage: str | None = None) -> None:
        points = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        self.datasets = {
            split: torch.utils.data.TensorDataset(points, torch.arange(16)) for split in ("train", "val", "test")
        }


class Denoising(Task):
    """Takes noise, drawn anew at every step, from points."""

    def __init__(self, *, noise: float = 0.1, **options):
        metrics = {"val_loss": MeanMetric(), "test_loss": MeanMetric()}
        super().__init__(metrics=metrics, optimizer={"opt": "adamw", "lr": 0.02, "weight_decay": 0.0}, **options)
        self.save_hyperparameters()
        self.noise = noise

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 32), nn.Dropout(0.1 if self.noise else 0.0), nn.GELU(), nn.Linear(32, 2))

    def training_loss(self, batch: list[Tensor]) -> Tensor:
        points, _ = batch
        return F.mse_loss(self.model(points + self.noise * torch.randn_like(points)), points)


class SaveAt(Callback):
    def __init__(self, step: int, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:  # an epoch has 4
            trainer.save_checkpoint(self.path)


def fit(task: Task, folder, *, ckpt_path=None, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **(quiet | options))
    trainer.fit(task, datamodule=Points(batch_size=4), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_it_overfits_a_batch(tmp_path):
    torch.manual_seed(0)
    trainer = fit(Denoising(noise=0.0), tmp_path, max_epochs=150, check_val_every_n_epoch=150)
    assert trainer.callback_metrics["train/loss"] < 1e-3
    assert trainer.callback_metrics["val/loss"] < 1e-3
    assert Denoising().measured == ["train/loss", "val/loss", "test/loss"]


def test_it_resumes_exactly_inside_an_epoch(tmp_path):
    torch.manual_seed(0)
    whole = Denoising(seed=3)
    fit(whole, tmp_path, max_steps=14, max_epochs=-1)
    torch.manual_seed(0)
    fit(Denoising(seed=3), tmp_path, max_steps=6, max_epochs=-1, callbacks=[SaveAt(6, tmp_path / "at_6.ckpt")])
    torch.manual_seed(1)
    resumed = Denoising(seed=3)
    fit(resumed, tmp_path, ckpt_path=tmp_path / "at_6.ckpt", max_steps=14, max_epochs=-1, callbacks=[Resumption()])
    assert all(torch.equal(whole.model.state_dict()[name], x) for name, x in resumed.model.state_dict().items())
    assert torch.equal(whole.train_loss.mean_value, resumed.train_loss.mean_value)
