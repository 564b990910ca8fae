"""A third task on `Task`: it overfits a batch, and a run that is stopped inside an epoch resumes with the same bits."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from foveal.zoo.data.base import SeededData
from foveal.zoo.tasks._base import Task
from foveal.zoo.tasks.optim import check_optimizer, make_optimizer
from foveal.zoo.tasks.resume import Resumption
from lightning.pytorch import Callback, Trainer
from timm.scheduler import CosineLRScheduler
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


class EightBit(torch.optim.AdamW):
    """Stands for `bitsandbytes.optim.AdamW8bit`."""


def test_eight_bit_optimizers_are_those_of_bitsandbytes(monkeypatch):
    model, options = nn.Linear(2, 3), {"opt": "bnbadamw8bit", "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9)}
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ValueError, match=r"opt='bnbadamw8bit' needs bitsandbytes, which is not installed"):
            check_optimizer(options)
    for name, contents in {"bitsandbytes": {}, "bitsandbytes.optim": {"AdamW8bit": EightBit}}.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_optimizer(options)
    with pytest.raises(ValueError, match="CUDA required for bitsandbytes optimizers"):
        make_optimizer(model, options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optimizer = make_optimizer(model, options)
    assert type(optimizer) is EightBit and optimizer.defaults["betas"] == (0.8, 0.9)
    decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert decay == {0.0: [1], 0.2: [2]}


class LowBit(torch.optim.AdamW):
    """Stands for `torchao.optim.AdamW8bit`, which refuses rates that are no tensors."""

    def step(self, closure=None):
        if not all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups):
            raise RuntimeError("lr was changed to a non-Tensor object")
        return super().step(closure)


def test_low_bit_optimizers_are_those_of_torchao(monkeypatch):
    model, options = nn.Linear(2, 3), {"opt": "torchaoadamw8bit", "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9)}
    if find_spec("torchao") is None:
        with pytest.raises(ValueError, match=r"opt='torchaoadamw8bit' needs torchao, which is not installed: pip"):
            check_optimizer(options)
    names = ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8")
    for name, contents in {"torchao": {}, "torchao.optim": dict.fromkeys(names, LowBit)}.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["torchao"], "optim", sys.modules["torchao.optim"], raising=False)
    monkeypatch.delitem(sys.modules, "foveal.zoo.tasks.torchao_optimizers", raising=False)
    for name in names:
        assert isinstance(make_optimizer(model, options | {"opt": f"torchao{name.lower()}"}), LowBit)
    check_optimizer(options)
    optimizer = make_optimizer(model, options)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert decay == {0.0: [1], 0.2: [2]}
    schedule = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)  # it sets numbers
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    schedule.step_update(5)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)
    assert not torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="unexpected keyword"):
        make_optimizer(model, options | {"unknown": 1})
    monkeypatch.delitem(sys.modules, "foveal.zoo.tasks.torchao_optimizers")
