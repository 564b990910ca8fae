"""Training a `VideoDiT` by rectified flow.

Every random number of a training step (times, noise, dropped conditions) follows from (seed, rank, epoch, batch), so a
run that was killed and resumed makes the steps it would have made.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric

from ..data.loader import mix_seed
from ..data.names import unknown_name
from ..video import VideoDiT
from ..video.flow import TIMESTEPS, add_noise, flow_loss, sample_time, velocity
from ..video.presets import PRESETS
from .optim import check_optimizer, make_optimizer
from .portable import make_portable
from .sharding import repeated_blocks, shard

Batch = dict[str, Any]
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SCHEDULERS = tuple(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION)
ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")  # need not know how long training takes
SCHEDULER_KEYS = ("name", "warmup_steps", "num_cycles", "power", "step_rules")


class VideoDiffusionTask(LightningModule):
    """Trains a `VideoDiT` on the batches of a `VideoData`.

    Args:
        model: `preset` of `VideoDiT.from_preset`, `conditioning` (None, "class", "cross", "joint") and `args`, further
            arguments of the model.
        in_channels, num_classes, text_dim: of the data.
        clip_sizes: of the data: the configuration of its clips' sizes, in words, and `[T, H, W]` of each.
        class_names: of the data, by label; kept in checkpoints and by the pipeline of the run.
        optimizer: arguments of `timm.optim.create_optimizer_v2`: `opt`, `lr`, `weight_decay`, `betas`, ….
        scheduler: `name`, `warmup_steps`, `num_cycles`, `power` and `step_rules` of
            `diffusers.optimization.get_scheduler`, stepped at every update over the length of training; None: the
            learning rate stays.
        shift, time_mean, time_std: of the density of the times; see `flow.sample_time`. Sample with the same shift.
        time_per: "video" or "frame": one time for a video or for every frame of patches (diffusion forcing).
        first_frame: chance that the first frame of patches is given: clean, with time 0 and no loss.
        condition_dropout: chance that class or text is left out, for classifier-free guidance. A dropped class is the
            null class, a dropped text is zeros.
        new_noise: draw times, noise and dropped conditions anew in every epoch; off, a batch has the same ones each
            time (to learn a few samples by heart: only then does the loss go to zero).
        gradient_checkpointing: recompute the blocks in the backward pass.
        compile: `enabled`, `mode` and `fullgraph` for `torch.compile` of each repeated block.
        seed: of the run.

    Raises:
        ValueError: an unknown preset, optimizer or scheduler, a number out of range, a condition that the data do not
            have, or clips that patches do not fill.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        in_channels: int,
        num_classes: int | None = None,
        text_dim: int | None = None,
        clip_sizes: tuple[str, Sequence[Sequence[int]]] | None = None,
        class_names: Sequence[str] = (),
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        shift: float = 1.0,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_per: str = "video",
        first_frame: float = 0.0,
        condition_dropout: float = 0.1,
        new_noise: bool = True,
        gradient_checkpointing: bool = False,
        compile: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.conditioning = model.get("conditioning")
        _check_choices(model, optimizer, scheduler, time_per)
        _check_condition(self.conditioning, num_classes, text_dim)
        _check_patches(model, clip_sizes)
        for name, chance in (("first_frame", first_frame), ("condition_dropout", condition_dropout)):
            if not 0 <= chance <= 1:
                raise ValueError(f"task.{name}={chance} must be between 0 and 1")
        if shift <= 0:
            raise ValueError(f"task.shift={shift} must be positive")
        if time_std < 0:
            raise ValueError(f"task.time_std={time_std} must not be negative")
        self.save_hyperparameters()
        self.model_cfg, self.in_channels, self.num_classes, self.text_dim = (
            dict(model),
            in_channels,
            num_classes,
            text_dim,
        )
        self.optimizer_cfg, self.scheduler_cfg = dict(optimizer), dict(scheduler or {})
        self.density = {"shift": shift, "mean": time_mean, "std": time_std}
        self.shift, self.time_per, self.first_frame, self.condition_dropout = (
            shift,
            time_per,
            first_frame,
            condition_dropout,
        )
        self.new_noise, self.seed = new_noise, seed
        self.gradient_checkpointing, self.compile_cfg = gradient_checkpointing, dict(compile or {})
        self.model: VideoDiT | None = None
        self.train_loss = MeanMetric()
        names = [
            f"{split}_loss{when}" for split in ("val", "test") for when in ("", *map(_time_name, VALIDATION_TIMES))
        ]
        self.metrics = torch.nn.ModuleDict({name: MeanMetric() for name in names})

    @property
    def measured(self) -> list[str]:
        """Names of what training and evaluation log."""
        return ["train/loss", *map(_shown, self.metrics)]

    def configure_model(self) -> None:
        """Builds the model once; under a sharded strategy its blocks are split over the devices here."""
        if self.model is not None:
            return
        preset, args = self.model_cfg["preset"], dict(self.model_cfg.get("args") or {})
        of_data: dict[str, Any] = {"in_channels": self.in_channels, "conditioning": self.conditioning}
        if self.conditioning == "class":
            of_data["num_classes"] = self.num_classes
        elif self.conditioning is not None:
            of_data["text_dim"] = self.text_dim
        try:
            self.model = VideoDiT.from_preset(preset, **(args | of_data))
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.preset={preset!r} cannot be built with model.args={args}: {error}") from error
        if self.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, precision=self.trainer.precision)
        if self.compile_cfg.get("enabled"):
            options = {key: self.compile_cfg[key] for key in ("mode", "fullgraph") if key in self.compile_cfg}
            for block in repeated_blocks(self.model):
                block.compile(**options)

    def condition(self, batch: Batch, *, dropout: float = 0.0) -> dict[str, Tensor]:
        """What the model is told beside video and time; each video of the batch loses it with the chance `dropout`."""
        if self.conditioning is None:
            return {}
        if self.conditioning == "class":
            labels = batch["label"]
            dropped = torch.rand(labels.shape, device=labels.device, dtype=torch.float32) < dropout
            return {"class_labels": torch.where(dropped, self.num_classes, labels)}
        text, mask = batch["text"], batch["text_mask"]
        dropped = torch.rand(len(text), device=text.device, dtype=torch.float32) < dropout
        return {
            "encoder_hidden_states": text.masked_fill(dropped[:, None, None], 0),
            "encoder_attention_mask": mask | dropped[:, None],
        }

    def null_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """What takes the place of a condition that is left out."""
        if "class_labels" in condition:
            return {"class_labels": torch.full_like(condition["class_labels"], self.num_classes)}
        text, mask = (condition[name] for name in ("encoder_hidden_states", "encoder_attention_mask"))
        return {"encoder_hidden_states": torch.zeros_like(text), "encoder_attention_mask": torch.ones_like(mask)}

    def draw_time(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Training times `[B]` or `[B, F]`, F frames of patches, and what their errors count: 0 for given frames."""
        assert self.model is not None
        batch, frames = video.shape[0], video.shape[2] // self.model.config.patch_size[0]
        if self.time_per == "frame":
            t = sample_time((batch, frames), **self.density, device=video.device)
        else:
            t = sample_time((batch,), **self.density, device=video.device)
        if not self.first_frame:
            return t, torch.ones_like(t)
        t = t.view(batch, -1).expand(batch, frames).clone()
        given = torch.rand(batch, device=video.device, dtype=torch.float32) < self.first_frame
        t[given, 0] = 0
        weight = torch.ones_like(t)
        weight[given, 0] = 0
        return t, weight

    def loss(self, video: Tensor, noise: Tensor, t: Tensor, weight: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Of the predicted velocity; see `flow.flow_loss`. All tensors are float32, whatever the model is."""
        assert self.model is not None
        prediction = self.model(add_noise(video, noise, t), TIMESTEPS * t, **condition).sample
        return flow_loss(prediction, velocity(video, noise), weight=weight)

    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()  # not called when a run is resumed inside an epoch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        epoch = self.current_epoch if self.new_noise else 0
        seed = mix_seed(self.seed, self.global_rank, epoch, batch_idx)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        video, real = batch["video"].float(), batch["real"]
        t, weight = self.draw_time(video)
        weight = weight * real.view(-1, *[1] * (weight.ndim - 1))  # of file order the last batch may be filled up
        condition = self.condition(batch, dropout=self.condition_dropout)
        loss = self.loss(video, torch.randn_like(video), t, weight, condition)
        self.train_loss.update(loss.detach(), weight=real.sum())  # pyright: ignore
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/loss_step", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> None:
        """Losses at fixed times, with noise that is the same in every evaluation."""
        video, real = batch["video"].float(), batch["real"]
        generator = torch.Generator().manual_seed(mix_seed(self.global_rank, batch_idx))
        noise = torch.randn(video.shape, generator=generator, dtype=torch.float32).to(video.device)
        condition = self.condition(batch)
        for time in VALIDATION_TIMES:
            t = torch.full((len(video),), time, device=video.device, dtype=torch.float32)
            loss = self.loss(video, noise, t, real.float(), condition)
            for name in (f"{split}_loss", f"{split}_loss{_time_name(time)}"):
                self.metrics[name].update(loss, weight=real.sum())  # pyright: ignore
        for name, metric in self.metrics.items():
            if name.startswith(split):
                self.log(_shown(name), metric, on_step=False, on_epoch=True, prog_bar=name == "val_loss")  # pyright: ignore

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch, batch_idx)

    def configure_optimizers(self):
        assert self.model is not None
        optimizer = make_optimizer(self.model, self.optimizer_cfg)
        if not self.scheduler_cfg:
            return optimizer
        options = {"warmup_steps": 0} | self.scheduler_cfg
        name, warmup = options.pop("name"), options.pop("warmup_steps")
        if name not in ENDLESS:
            length = self.trainer.estimated_stepping_batches
            if length == float("inf"):
                raise ValueError(
                    f"task.scheduler.name={name!r} needs an end: set trainer.max_epochs or trainer.max_steps"
                )
            options["num_training_steps"] = int(length)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, **options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the mean loss of a half-done epoch (no other metric is alive between steps), and what others need."""
        metric = self.train_loss
        checkpoint["train_loss"] = {"mean_value": metric.mean_value, "weight": metric.weight}
        make_portable(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights whose classes have other labels: they would be taken for each other."""
        saved = checkpoint.get("hyper_parameters", {})
        theirs, ours = (list(holder.get("class_names") or []) for holder in (saved, self.hparams))
        if self.conditioning == "class" and theirs and ours and theirs != ours:
            pairs = enumerate(zip_longest(theirs, ours))
            label, (there, here) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint numbers the classes otherwise than the data: label {label} is {there!r} there and "
                f"{here!r} here; give the data the classes that it had, or their order by data.class_names"
            )
        averaging = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # pyright: ignore
        if self.trainer.state.fn == TrainerFn.FITTING and "current_model_state" in checkpoint and not averaging:
            checkpoint["state_dict"] = checkpoint["current_model_state"]  # its optimizer state belongs to these weights
        for name, value in checkpoint.get("train_loss", {}).items():
            setattr(self.train_loss, name, value.clone())


def _time_name(time: float) -> str:
    return f"_{round(10 * time)}"  # names of modules have no points


def _shown(name: str) -> str:
    """The name under which a module of metrics is logged."""
    return name.replace("_", "/", 1).replace("_", "_t0.")


def _check_choices(model: Mapping, optimizer: Mapping, scheduler: Mapping | None, time_per: str) -> None:
    if model["preset"] not in PRESETS:
        raise unknown_name("model.preset", model["preset"], PRESETS)
    check_optimizer(optimizer)
    if scheduler and scheduler["name"] not in SCHEDULERS:
        raise unknown_name("task.scheduler.name", scheduler["name"], SCHEDULERS)
    for key in scheduler or {}:
        if key not in SCHEDULER_KEYS:
            raise unknown_name("key of task.scheduler", key, SCHEDULER_KEYS)
    if time_per not in ("video", "frame"):
        raise unknown_name("task.time_per", time_per, ("video", "frame"))


def _check_condition(conditioning: str | None, num_classes: int | None, text_dim: int | None) -> None:
    if conditioning == "class" and num_classes is None:
        raise ValueError("model.conditioning='class' needs data with classes, and these have none")
    if conditioning in ("cross", "joint") and text_dim is None:
        raise ValueError(
            f"model.conditioning={conditioning!r} needs data with embedded text, and these have none: captions are "
            "trained on by the column embedding of metadata.csv"
        )


def _check_patches(model: Mapping[str, Any], clip_sizes: tuple[str, Sequence[Sequence[int]]] | None) -> None:
    """Before any data are read or a model is built: both may take minutes."""
    if clip_sizes is None:
        return
    patch = inspect.signature(VideoDiT).parameters["patch_size"].default
    patch = (PRESETS[model["preset"]] | dict(model.get("args") or {})).get("patch_size", patch)
    if not isinstance(patch, Sequence) or len(patch) != 3 or min(patch) < 1:
        return  # the model says what is wrong with it
    said, sizes = clip_sizes
    for size in sizes:
        if any(n % p for n, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"{said}: [T, H, W] = {list(size)} must be multiples of the model's patch_size={list(patch)}"
            )
