"""The report of a video run: metrics and curves, moving grids of samples on the way, judged samples at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..data.loader import mix_seed, seeded
from ..data.video import VideoData
from ..video import VideoDiT
from ..video.pipeline import VideoDiTPipeline
from .report import MetricTable
from .video import VideoDiffusionTask
from .video_generators import GeneratorSampler
from .video_metrics import ClipJudge, change_beyond_shift, conditional_accuracy, fit_judge, frechet_distance
from .video_model import plain_model, save_lora
from .video_plots import plot_strips, plot_video_curves, write_grid
from .video_prompts import Prompt, read_prompts, sample_prompts

JUDGE_CLIPS, SAMPLE_BATCH = 4000, 50


def collect(
    data: VideoData, split: str, *, most: int, shape: tuple[int, ...] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Videos `[N, C, T, H, W]` of a split with their labels or texts, N at most `most`, the same ones every time.

    Those that cannot be decoded are left out.

    Args:
        shape: `(C, T, H, W)` of the videos that count; None: that of the first one.

    Raises:
        ValueError: the split has no videos of that shape, or none that can be decoded.
    """
    dataset: Any = data.dataset(split)
    fitting = list(range(len(dataset)))
    if hasattr(dataset, "shape"):  # of videos that differ in size
        shape = shape or dataset.shape(0)
        fitting = [index for index in fitting if dataset.shape(index) == shape]
    if not fitting:
        raise ValueError(f"the {split} split has no videos of shape {shape}")
    items = []
    for place in torch.linspace(0, len(fitting) - 1, min(most, len(fitting))).long().tolist():
        with seeded(mix_seed(seed, fitting[place])):
            item = dataset[fitting[place]]
        if item.get("real", True):
            items.append(item)
    if not items:
        raise ValueError(f"none of the {split} videos of shape {shape} can be decoded")
    return torch.utils.data.default_collate(items)


def make_sampler(task: VideoDiffusionTask, data: VideoData) -> VideoDiTPipeline | GeneratorSampler:
    """Samples what the task trains; called as a `VideoDiTPipeline` is."""
    if task.generator is None:
        return make_pipeline(task, data)
    shape = collect(data, "val", most=1)["video"].shape[1:]
    guided = None if task.null_text is None else task.null_condition
    return GeneratorSampler(task.generator, task.model, shape=tuple(shape), shift=task.shift, null_condition=guided)


def make_pipeline(task: VideoDiffusionTask, data: VideoData, *, whole: bool = False) -> VideoDiTPipeline:
    """A pipeline around the task's model, which samples as the task trains.

    Args:
        whole: with all the weights of a sharded model in one copy, adapters added to them; every rank has to ask.
    """
    model = task.model
    assert model is not None
    if whole and task.device_mesh is not None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        model = VideoDiT.from_config(model.config)
        if task.global_rank == 0:
            model.load_state_dict(state)
    elif whole and task.lora is not None:
        model = plain_model(model, model.state_dict(), task.lora)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=task.shift, **task.sampling)
    names = dict(enumerate(data.class_names)) if model.config.conditioning == "class" else None
    pipeline = VideoDiTPipeline(model, scheduler, vae=data.vae, null_text="zeros", id2label=names, **data.for_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_generator(task: VideoDiffusionTask, folder: Path) -> None:
    """Writes the trained transformer of diffusers to `transformer/` with its scheduler beside it, or adapters alone to
    `lora/`. Every rank has to ask."""
    assert task.generator is not None
    state = None
    if task.device_mesh is not None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(task.model, options=options)
    if task.global_rank != 0:
        return
    if task.lora is not None:
        save_lora(task.model, folder / "lora", weights=state)
        return
    task.model.save_pretrained(folder / "transformer", state_dict=state)
    if task.generator.scheduler is not None:
        task.generator.scheduler.save_pretrained(folder / "scheduler")


class VideoReport(MetricTable):
    """Writes `metrics.csv`, `curves.png`, `samples/step_*.gif`, and at the end `samples.gif`, `samples.png`,
    `metrics.json` and `pipeline/`, a folder for `VideoDiTPipeline.from_pretrained`; of trained adapters also `lora/`,
    for `VideoDiTPipeline.load_lora_weights`. Of a transformer of diffusers, `transformer/` or `lora/` alone.

    Samples are made with the average of the weights when there is one: this callback comes after it.

    Args:
        dirpath: the run's folder.
        sample_every: validations between two grids; 0: none before the end.
        samples_per_class: of the grids; without classes four times as many in all.
        steps, guidance_scale: of the sampler.
        sigmas: noise levels from 1 down in place of `steps`, as `VideoDiTPipeline` takes them.
        chunk_frames: frames of patches that are made at a time, each chunk in sight of those before; for causal models.
        fps: of the GIFs.
        judge_steps: batches that train a small 3-D CNN on the data, which says how many samples show their class and
            in whose features the Fréchet distance to held-out videos is; 0: no judge. It needs classes.
        judged: samples for it, at least 2.
        prompts: a table of conditions of one's own, see `video_prompts.read_prompts`; each is sampled where a grid is,
            to `prompts/step_*.gif` and at the end `prompts.gif`. None: none.

    Raises:
        ValueError: `judged` or `guidance_scale` is too small.
    """

    def __init__(
        self,
        dirpath: str,
        sample_every: int = 1,
        samples_per_class: int = 4,
        steps: int = 25,
        guidance_scale: float = 4.0,
        fps: int = 8,
        judge_steps: int = 0,
        judged: int = 100,
        prompts: str | None = None,
        sigmas: Sequence[float] | None = None,
        chunk_frames: int | None = None,
    ):
        super().__init__(dirpath)
        for name, value, least in (("judged", judged, 2), ("guidance_scale", guidance_scale, 0)):
            if value < least:
                raise ValueError(f"callbacks.report.{name}={value} must be at least {least}")
        self.sample_every, self.samples_per_class, self.fps = sample_every, samples_per_class, fps
        self.steps = steps if sigmas is None else len(sigmas)
        self.guidance_scale = guidance_scale
        self.of_dit = {
            "sigmas": None if sigmas is None else [float(level) for level in sigmas],
            "chunk_frames": chunk_frames,
        }
        self.judge_steps, self.judged = judge_steps, judged
        self._validations = 0
        self.prompts, self._prompts = prompts, list[Prompt]()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the conditions of one's own before anything is trained."""
        task, data = pl_module, trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self.prompts is not None and not self._prompts:
            facts = {"class_names": data.class_names, "text_dim": task.text_dim}
            self._prompts = read_prompts(self.prompts, conditioning=task.conditioning, **facts)  # pyright: ignore

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._validations = state_dict.get("validations", 0)

    def _conditions(self, task: VideoDiffusionTask, data: VideoData, count: int) -> tuple[dict[str, Tensor], list[str]]:
        """`count` conditions, and what they are called: every class in turn, or the texts of held-out videos."""
        if task.conditioning == "class":
            labels = torch.arange(count) % len(data.class_names)
            return {"class_labels": labels}, [data.class_names[label] for label in labels.tolist()]
        if task.conditioning is None:
            return {}, [""] * count
        held_out = collect(data, "val", most=count)
        captions = held_out["caption"]
        turns = torch.arange(count) % len(captions)  # there may be fewer
        told = {name: value[turns] for name, value in task.condition(held_out).items()}
        return told, [captions[turn] for turn in turns.tolist()]

    def _generate(self, task: VideoDiffusionTask, data: VideoData, condition: dict[str, Tensor], count: int) -> Tensor:
        """`count` videos `[N, C, T, H, W]` as the model makes them, on the CPU."""
        pipeline, made, training = make_sampler(task, data), [], task.training
        of_dit = self.of_dit if task.generator is None else {}
        null = task.null_condition(condition) if "encoder_hidden_states" in condition else {}
        task.eval()
        for start in range(0, count, SAMPLE_BATCH):
            chosen = slice(start, min(start + SAMPLE_BATCH, count))
            seeds = [mix_seed(0, i) for i in range(*chosen.indices(count))]
            with task.trainer.precision_plugin.forward_context():  # as in training
                videos = pipeline(
                    class_labels=condition["class_labels"][chosen] if "class_labels" in condition else None,
                    prompt_embeds=condition["encoder_hidden_states"][chosen] if null else None,
                    prompt_attention_mask=condition["encoder_attention_mask"][chosen] if null else None,
                    negative_prompt_embeds=null["encoder_hidden_states"][chosen] if null else None,
                    negative_prompt_attention_mask=null["encoder_attention_mask"][chosen] if null else None,
                    num_videos_per_prompt=1 if condition else len(seeds),
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="latent",
                    **of_dit,
                )
            made.append(videos.frames.cpu())
        task.train(training)
        return torch.cat(made)

    def _grid(self, task: VideoDiffusionTask, data: VideoData, path: Path, title: str) -> None:
        classes = min(len(data.class_names), 10) if task.conditioning == "class" else 4
        count = classes * self.samples_per_class
        condition, captions = self._conditions(task, data, count)
        if task.conditioning == "class" and len(data.class_names) > classes:  # the first ones
            labels = torch.arange(count) % classes
            condition, captions = {"class_labels": labels}, [data.class_names[i] for i in labels.tolist()]
        videos = self._generate(task, data, condition, count)
        if not task.trainer.is_global_zero:
            return
        videos = data.pixels(videos, device=task.device)
        shown = captions[:classes] if task.conditioning == "class" else captions
        write_grid(videos, captions=shown, columns=classes, path=path, title=title, fps=self.fps)

    def _sheet(self, task: VideoDiffusionTask, data: VideoData, path: Path, title: str) -> None:
        """A grid of the conditions of one's own, if there are some."""
        if not self._prompts:
            return
        training = task.training
        task.eval()
        with task.trainer.precision_plugin.forward_context():  # as in training
            options = {"steps": self.steps, "guidance_scale": self.guidance_scale}
            options |= self.of_dit if task.generator is None else {}
            videos = sample_prompts(make_sampler(task, data), self._prompts, **options)
        task.train(training)
        if task.trainer.is_global_zero:
            shown = {"captions": [prompt.caption for prompt in self._prompts], "columns": min(len(videos), 4)}
            pixels = data.pixels(videos, device=task.device)
            write_grid(pixels, path=path, title=title, fps=self.fps, **shown)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.sample_every:
            return
        self._validations += 1
        if self._validations % self.sample_every == 0 and _takes_part(pl_module):
            path = self.dirpath / "samples" / f"step_{trainer.global_step:07d}.gif"
            title = f"step {trainer.global_step:,}, guidance {self.guidance_scale:g}"
            self._grid(pl_module, trainer.datamodule, path, title)  # pyright: ignore
            path = self.dirpath / "prompts" / path.name
            self._sheet(pl_module, trainer.datamodule, path, title)  # pyright: ignore

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.rows:
            plot_video_curves(self.rows, path=self.dirpath / "curves.png")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or not _takes_part(pl_module):  # pyright: ignore[reportAttributeAccessIssue]
            return
        if pl_module.generator is not None:  # pyright: ignore[reportAttributeAccessIssue]
            save_generator(pl_module, self.dirpath)  # pyright: ignore[reportArgumentType]
            return
        pipeline = make_pipeline(pl_module, trainer.datamodule, whole=True)  # pyright: ignore
        if trainer.is_global_zero:
            pipeline.save_pretrained(self.dirpath / "pipeline")
            if pl_module.lora is not None:  # pyright: ignore[reportAttributeAccessIssue]
                save_lora(pl_module.model, self.dirpath / "lora")  # pyright: ignore

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        task, data = pl_module, trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        metrics: dict[str, Any] = {}
        if _takes_part(task) and self.judge_steps and data.num_classes:
            with torch.inference_mode(False):  # the judge is trained here
                metrics = self._judge(task, data)  # pyright: ignore[reportArgumentType]
        for name in ("accuracy", "frechet") if task.conditioning == "class" else ("frechet",):
            if self.judge_steps and data.num_classes:
                task.log(f"test/{name}", metrics.get(name, 0.0), rank_zero_only=True)
        title = f"generated, {self.steps} steps, guidance {self.guidance_scale:g}"
        if _takes_part(task):
            self._grid(task, data, self.dirpath / "samples.gif", title)  # pyright: ignore[reportArgumentType]
            self._sheet(task, data, self.dirpath / "prompts.gif", title)  # pyright: ignore[reportArgumentType]
        if not trainer.is_global_zero:
            return
        metrics |= {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("test/loss")}
        self.dirpath.mkdir(parents=True, exist_ok=True)
        (self.dirpath / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    def _judge(self, task: VideoDiffusionTask, data: VideoData) -> dict[str, Any]:
        condition, captions = self._conditions(task, data, self.judged)
        made = self._generate(task, data, condition, self.judged)
        train, real = (
            collect(data, split, most=most, shape=tuple(made.shape[1:]))
            for split, most in (("train", JUDGE_CLIPS), ("test", 10 * self.judged))
        )
        judge: ClipJudge = fit_judge(
            train["video"], train["label"], steps=self.judge_steps, num_classes=data.num_classes
        )
        features = judge.features(real["video"])

        def distance(videos: Tensor) -> float:
            return frechet_distance(judge.features(videos), features)

        def change(videos: Tensor) -> float:
            return float(change_beyond_shift(data.denormalize(videos)).mean())

        same = torch.randperm(len(real["video"]), generator=torch.Generator().manual_seed(0))[: self.judged]
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
        metrics = {
            "accuracy of held-out videos": conditional_accuracy(real["video"], real["label"], judge=judge),
            "frechet": distance(made),
            f"frechet of {self.judged} held-out videos": distance(real["video"][same]),
            "frechet of noise": distance(noise),
            "frechet is": f"in the judge's features, {self.judged} videos against {len(features)} held-out ones",
        }
        if made.shape[2] > 1:
            metrics["change beyond a shift"] = change(made)
            metrics[f"change beyond a shift of {self.judged} held-out videos"] = change(real["video"][same])
        title = f"Fréchet {metrics['frechet']:.1f}"
        shown = beside = list(range(min(10, self.judged, len(features))))
        if "class_labels" in condition:
            metrics = {"accuracy": conditional_accuracy(made, condition["class_labels"], judge=judge)} | metrics
            title = f"{100 * metrics['accuracy']:.0f} % of {self.judged} show their class; {title}"
            first = {label: i for i, label in reversed(list(enumerate(real["label"].tolist())))}
            shown = [label for label in sorted(first) if label < self.judged][:10]  # clip i is made for class i
            beside = [first[label] for label in shown]
        if task.global_rank == 0:
            plot_strips(
                data.pixels(made[shown], device=task.device),
                data.pixels(real["video"][beside], device=task.device),
                captions=[captions[i] for i in shown],
                title=title,
                path=self.dirpath / "samples.png",
            )
        return metrics


def _takes_part(task: LightningModule) -> bool:
    """Return whether this rank samples: the first rank does, and all ranks do where the forward pass is sharded."""
    return task.global_rank == 0 or task.device_mesh is not None
