"""Training a `VideoDiT`, or a pretrained transformer of diffusers, to remove noise.

Random numbers of a training step are times, noise and dropped conditions; `Task` seeds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from torch import Tensor
from torchmetrics import MeanMetric

from ...layers import BoxGate, gate_loss
from ..data.clip_dataset import read_embedding
from ..data.loader import mix_seed
from ..data.names import unknown_name
from ..video import VideoDiT
from ..video.flow import flow_loss
from ..video.presets import PRESETS
from ._base import Task
from .optim import check_optimizer
from .tuning import merge_lora
from .video_generators import FlowProcess, Generator, find_generator
from .video_model import LORA, Teacher, check_source, make_video_model, patch_size

Batch = dict[str, Any]
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SCHEDULERS = tuple(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION)
ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")  # need not know how long training takes
NULL_LENGTH = 512  # tokens of the empty prompt, at most
SCHEDULER_KEYS = ("name", "warmup_steps", "num_cycles", "power", "step_rules")


class VideoDiffusionTask(Task):
    """Trains a `VideoDiT`, by rectified flow, or a transformer of diffusers on the batches of a `VideoData`.

    Args:
        model: `preset` of `VideoDiT.from_preset` or `pretrained`, the folder of a saved model, pipeline or run to start
            from, `conditioning` (None, "class", "cross", "joint") and `args`, further arguments of the model. Of a
            transformer of diffusers (`video_generators.FORWARDS`) also `plan` and `dtype`; its process is that of the
            scheduler beside it.
        in_channels, num_classes, text_dim: of the data.
        clip_sizes: of the data: the configuration of its clips' sizes, in words, and `[T, H, W]` of each.
        class_names: of the data, by label; kept in checkpoints and by the pipeline of the run.
        optimizer: arguments of `timm.optim.create_optimizer_v2`: `opt`, `lr`, `weight_decay`, `betas`, ….
        scheduler: `name`, `warmup_steps`, `num_cycles`, `power` and `step_rules` of
            `diffusers.optimization.get_scheduler`, stepped at every update over the length of training; None: the
            learning rate stays.
        shift, time_mean, time_std: of the density of the times; see `flow.sample_time`. Sample with the same shift.
        time_per: "video" or "frame": one time for a video or for every frame of patches (diffusion forcing).
        first_frame, last_frame: chance that the first or the last frame of patches is given: clean, with time 0 and no
            loss. A frame that is all that is left of a clip is not given.
        context: chance that a random number of first frames of patches, not all, is given in the same way, as in a
            rollout of a causal model.
        condition_dropout: chance that class or text is left out, for classifier-free guidance. A dropped class is the
            null class, a dropped text is zeros; for transformers of diffusers it is `null_text`.
        null_text: safetensors file with `text` `[L, D]`, the embedded empty prompt; needed where these leave out texts.
        new_noise: draw times, noise and dropped conditions anew in every epoch; off, a batch has the same ones each
            time (to learn a few samples by heart: only then does the loss go to zero).
        gradient_checkpointing: recompute the blocks in the backward pass.
        lora: train adapters of low rank beside frozen weights: `rank`, `alpha`, `dropout` and `targets`, see
            `video_model.add_lora`; None: train everything.
        gates_only: train the gates of `{type: sparse, mask: box_gate}` layers alone, beside frozen weights.
        teacher: folder of a saved model, pipeline or run whose velocity is imitated (distillation); None: no teacher.
        teacher_weight: share of the distance to the teacher in the loss, 0 to 1; the rest is that to the data.
        compile: `enabled`, `mode` and `fullgraph` for `torch.compile` of each repeated block.
        seed: of the run.

    Raises:
        FileNotFoundError: a folder that holds no model.
        ValueError: an unknown preset, optimizer or scheduler, a number out of range, a condition that the data do not
            have, or clips that patches do not fill.
    """

    sampling: ClassVar[Mapping[str, Any]] = {}  # options of the pipeline's scheduler

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
        last_frame: float = 0.0,
        context: float = 0.0,
        condition_dropout: float = 0.1,
        null_text: str | None = None,
        new_noise: bool = True,
        gradient_checkpointing: bool = False,
        lora: Mapping[str, Any] | None = None,
        gates_only: bool = False,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        compile: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_source(model, lora)
        _check_choices(model, optimizer, scheduler, time_per)
        _check_condition(model.get("conditioning"), num_classes, text_dim)
        generator = find_generator(model, lora=lora is not None)
        if generator is not None:
            generator.check_data(in_channels, text_dim)
            of_dit = {"time_per": (time_per, "video"), "first_frame": (first_frame, 0), "last_frame": (last_frame, 0)}
            of_dit |= {"context": (context, 0)}
            of_dit |= {"gates_only": (gates_only, False), "teacher": (teacher, None)}
            _check_generator(generator, model, of_dit, condition_dropout, null_text)
        elif null_text is not None:
            raise ValueError(f"task.null_text={null_text!r} is for transformers of diffusers: a VideoDiT learns zeros")
        _check_patches(patch_size(model) if generator is None else generator.patch_size, clip_sizes)
        for name, chance in (
            ("first_frame", first_frame),
            ("last_frame", last_frame),
            ("context", context),
            ("condition_dropout", condition_dropout),
            ("teacher_weight", teacher_weight),
        ):
            if not 0 <= chance <= 1:
                raise ValueError(f"task.{name}={chance} must be between 0 and 1")
        if shift <= 0:
            raise ValueError(f"task.shift={shift} must be positive")
        if time_std < 0:
            raise ValueError(f"task.time_std={time_std} must not be negative")
        times = ("", *map(_time_name, VALIDATION_TIMES))
        metrics = {f"{split}_loss{when}": MeanMetric() for split in ("val", "test") for when in times}
        super().__init__(metrics=metrics, optimizer=optimizer, scheduler=scheduler, compile=compile, seed=seed)
        self.save_hyperparameters()
        self.conditioning = model.get("conditioning")
        self.model_cfg, self.in_channels, self.num_classes, self.text_dim = (
            dict(model),
            in_channels,
            num_classes,
            text_dim,
        )
        self.density = {"shift": shift, "mean": time_mean, "std": time_std}
        self.shift, self.time_per, self.condition_dropout = shift, time_per, condition_dropout
        self.given_frames, self.context = {0: first_frame, -1: last_frame}, context
        self.generator, self.process = generator, FlowProcess() if generator is None else generator.process
        self.null_text = None if null_text is None else _read_null_text(null_text, text_dim)
        self.new_noise, self.gradient_checkpointing = new_noise, gradient_checkpointing
        self.gates_only = gates_only
        self.lora, self.teacher_weight = None if lora is None else dict(lora), teacher_weight
        self.teacher = None if teacher is None else Teacher(teacher)

    def shown_name(self, name: str) -> str:
        return name.replace("_", "/", 1).replace("_", "_t0.")

    def make_model(self) -> Any:
        if self.generator is not None:
            model = self.generator.make(self.lora)
            self.has_gates = False
        else:
            model = self._make_video_dit()
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def _make_video_dit(self) -> VideoDiT:
        of_data: dict[str, Any] = {"in_channels": self.in_channels, "conditioning": self.conditioning}
        if self.conditioning == "class":
            of_data["num_classes"] = self.num_classes
        elif self.conditioning is not None:
            of_data["text_dim"] = self.text_dim
        model = make_video_model(self.model_cfg, of_data, lora=self.lora)
        gates = [module for module in model.modules() if isinstance(module, BoxGate)]
        self.has_gates = bool(gates)
        if self.gates_only:
            if not gates:
                raise ValueError("task.gates_only=true: the model has no layer {type: sparse, mask: box_gate}")
            model.requires_grad_(False)
            for gate in gates:
                gate.requires_grad_(True)
        return model

    def condition(self, batch: Batch, *, dropout: float = 0.0) -> dict[str, Tensor]:
        """Condition of each video, beside noisy video and time; dropped per video with the probability `dropout`."""
        if self.conditioning is None:
            return {}
        if self.conditioning == "class":
            labels = batch["label"]
            dropped = torch.rand(labels.shape, device=labels.device, dtype=torch.float32) < dropout
            return {"class_labels": torch.where(dropped, self.num_classes, labels)}
        told = {"encoder_hidden_states": batch["text"], "encoder_attention_mask": batch["text_mask"]}
        dropped = torch.rand(len(batch["text"]), device=batch["text"].device, dtype=torch.float32) < dropout
        nothing = self.null_condition(told)
        return {
            name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), nothing[name], value)
            for name, value in told.items()
        }

    def null_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replacement of a condition that is left out."""
        if "class_labels" in condition:
            return {"class_labels": torch.full_like(condition["class_labels"], self.num_classes)}
        text, mask = (condition[name] for name in ("encoder_hidden_states", "encoder_attention_mask"))
        if self.null_text is None:
            return {"encoder_hidden_states": torch.zeros_like(text), "encoder_attention_mask": torch.ones_like(mask)}
        nothing = torch.zeros_like(text)
        seen = torch.arange(text.shape[1], device=mask.device) < len(self.null_text)
        nothing[:, : len(self.null_text)] = self.null_text[: text.shape[1]].to(text)
        return {"encoder_hidden_states": nothing, "encoder_attention_mask": seen.expand_as(mask)}

    def draw_time(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Training times `[B]` or `[B, F]`, F frames of patches, and what their errors count: 0 for given frames."""
        frames = self.token_frames(video) if self.time_per == "frame" else None
        shape = (len(video),) if frames is None else (len(video), frames)
        return self.give_frames(self.process.draw_time(shape, self.density, video.device), video)

    def token_frames(self, video: Tensor) -> int:
        """Frames of patches."""
        assert self.model is not None
        return video.shape[2] // self.model.config.patch_size[0]

    def give_frames(self, t: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Times of which some are 0, those of frames that are given by chance, and what errors count there."""
        if not any(self.given_frames.values()) and not self.context:
            return t, torch.ones_like(t)
        batch, frames = len(video), self.token_frames(video)
        t = t.view(batch, -1).expand(batch, frames).clone()
        weight = torch.ones_like(t)
        for place, chance in self.given_frames.items():
            if chance:
                given = torch.rand(batch, device=video.device, dtype=torch.float32) < chance
                given &= weight.sum(dim=1) > 1  # something has to be left to make
                t[given, place] = weight[given, place] = 0
        if self.context and frames > 1:
            given = torch.rand(batch, 1, device=video.device, dtype=torch.float32) < self.context
            length = torch.randint(1, frames, (batch, 1), device=video.device)
            given = given & (torch.arange(frames, device=video.device) < length)
            given &= (weight * ~given).any(dim=1, keepdim=True)
            t[given] = weight[given] = 0
        return t, weight

    def loss(self, video: Tensor, noise: Tensor, t: Tensor, weight: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Of the prediction, a velocity unless a scheduler of diffusers says otherwise; see `flow.flow_loss`.

        All tensors are float32, whatever the model is. In training with a teacher, the mean of the distances to the
        data and to the teacher.
        """
        assert self.model is not None
        noisy, timestep = self.process.mix(video, noise, t), self.process.timestep(t)
        if self.generator is None:
            prediction = self.model(noisy, timestep, **condition).sample
        else:
            text, mask = (condition[name] for name in ("encoder_hidden_states", "encoder_attention_mask"))
            prediction = self.generator.predict(self.model, noisy, timestep, text, mask)
        loss = flow_loss(prediction, self.process.target(video, noise, t), weight=weight)
        if self.teacher is None or not self.training:
            return loss
        imitation = flow_loss(prediction, self.teacher(noisy, timestep, **condition), weight=weight)
        return torch.lerp(loss, imitation, self.teacher_weight)

    def seed_epoch(self) -> int:
        return self.current_epoch if self.new_noise else 0

    def training_loss(self, batch: Batch) -> Tensor:
        video, real = batch["video"].float(), batch["real"]
        t, weight = self.draw_time(video)
        weight = weight * real.view(-1, *[1] * (weight.ndim - 1))  # of file order the last batch may be filled up
        condition = self.condition(batch, dropout=self.condition_dropout)
        loss = self.loss(video, torch.randn_like(video), t, weight, condition)
        # gates learn from the maps around them, which get no gradient of theirs
        return loss + gate_loss(self.model) if self.has_gates else loss

    def weight(self, batch: Batch) -> Tensor:
        return batch["real"].sum()

    def evaluate(self, split: str, batch: Batch, batch_idx: int) -> None:
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

    def make_scheduler(self, optimizer: torch.optim.Optimizer, scale: float) -> Any:
        options = {"warmup_steps": 0} | self.scheduler_cfg
        name, warmup = options.pop("name"), options.pop("warmup_steps")
        if name not in ENDLESS:
            length = self.trainer.estimated_stepping_batches
            if length == float("inf"):
                raise ValueError(
                    f"task.scheduler.name={name!r} needs an end: set trainer.max_epochs or trainer.max_steps"
                )
            options["num_training_steps"] = int(length)
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.lora is not None:
            checkpoint["state_dict_ema"] = merge_lora(checkpoint["state_dict_ema"], {**LORA, **self.lora})

    def names_matter(self) -> bool:
        return self.conditioning == "class"


def _time_name(time: float) -> str:
    return f"_{round(10 * time)}"  # names of modules have no points


def _check_choices(model: Mapping, optimizer: Mapping, scheduler: Mapping | None, time_per: str) -> None:
    if not model.get("pretrained") and model["preset"] not in PRESETS:
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


def _check_generator(
    generator: Generator, model: Mapping[str, Any], of_dit: Mapping[str, tuple], dropout: float, null_text: str | None
) -> None:
    """Refuses options that only a `VideoDiT` has, and texts that are left out without an empty prompt."""
    if model.get("conditioning") not in ("cross", "joint"):
        raise ValueError(f"{generator.said} is a {generator.name}, which is told texts: pass model.conditioning=cross")
    for name, (value, neutral) in of_dit.items():
        if value != neutral:
            raise ValueError(f"task.{name}={value!r} is for a VideoDiT, and {generator.said} is a {generator.name}")
    if dropout and null_text is None:
        raise ValueError(
            f"task.condition_dropout={dropout} leaves out texts, which a {generator.name} knows as the empty prompt: "
            "pass task.null_text=FILE, empty.safetensors of python -m foveal.zoo.data.texts, or "
            "task.condition_dropout=0"
        )


def _read_null_text(file: str, text_dim: int | None) -> Tensor:
    """The embedded empty prompt, `[L, D]`."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"task.null_text={file!r} does not exist")
    told = read_embedding(Path(file), length=NULL_LENGTH)
    text = told["text"][told["text_mask"]]
    if text.shape[1] != text_dim:
        raise ValueError(f"task.null_text={file!r} has text of {text.shape[1]} channels, and the data of {text_dim}")
    return text


def _check_patches(patch: Any, clip_sizes: tuple[str, Sequence[Sequence[int]]] | None) -> None:
    """Before any data are read or a model is built: both may take minutes."""
    if clip_sizes is None:
        return
    if not isinstance(patch, Sequence) or len(patch) != 3 or min(patch) < 1:
        return  # the model says what is wrong with it
    said, sizes = clip_sizes
    for size in sizes:
        if any(n % p for n, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"{said}: [T, H, W] = {list(size)} must be multiples of the model's patch_size={list(patch)}"
            )
