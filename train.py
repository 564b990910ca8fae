"""`foveal-train`, which is also `python train.py`: train what a Hydra configuration describes, with Lightning.

Arguments are Hydra's: `experiment=NAME`, `group=choice`, `key=value`, `-m` for sweeps; see docs/training.md.
"""

import logging
import sys
import warnings
from pathlib import Path
from time import monotonic
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from foveal.zoo.tasks.checkpoint import read_checkpoint, writing_to
from foveal.zoo.tasks.console import say
from foveal.zoo.tasks.explain import one_sentence, raise_to_us
from foveal.zoo.tasks.launch import (
    Start,
    check_metrics,
    check_targets,
    find_start,
    instantiate_all,
    make_callbacks,
    make_strategy,
    open_dicts,
)
from foveal.zoo.tasks.record import Record, print_summary
from foveal.zoo.tasks.resume import Resumption, changed_since, check_resume, listed
from foveal.zoo.tasks.stopping import Interruption, report_stop, status_of, stop_between_stages
from foveal.zoo.tasks.sweep import go_on_after_failure, metric_mode, record_job
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf


def build(config: DictConfig) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
    """The trainer, the task and the data that a configuration with a `run_dir` describes."""
    check_targets(config)
    options = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(options, dict)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(options["data"], _convert_="all")
    for key, value in data.for_record.items():
        OmegaConf.update(config, f"data.{key}", value, force_add=True)
    task = instantiate(options["task"], **data.for_task, _convert_="all")
    check_metrics(config, task)
    strategy = make_strategy(options["trainer"].pop("strategy"))
    if not isinstance(strategy, ModelParallelStrategy):
        task.configure_model()  # sharded models are built on their devices; others here, before processes are spawned
    loggers = instantiate_all(options.get("logger"))
    callbacks = make_callbacks(options.get("callbacks"), options["trainer"], logs=bool(loggers))
    if options["trainer"].get("enable_checkpointing", True):
        callbacks.append(Interruption(Path(config.run_dir) / "checkpoints" / "last.ckpt"))
    trainer = instantiate(
        options["trainer"], strategy=strategy, callbacks=[*callbacks, Resumption()], logger=loggers, _convert_="all"
    )
    return trainer, task, data


def train(config: DictConfig) -> float:
    """Trains, tests and reports; returns the value of `config.metric`, which sweeps compare.

    Args:
        config: composed from `foveal.configs`, see `configs/train.yaml`.

    Raises:
        ValueError, FileNotFoundError, ImportError: a mistake in the configuration; the message names the key.
        OSError: the disk is full, or the run's folder cannot be written.
        SystemExit: SIGTERM or Ctrl-C stopped the run, with the status of shells (143, 130).
    """
    start = find_start(config)
    config.run_dir = str(start.run_dir)
    trainer, task, data = build(config)
    changes = prepare(start, config, task)
    record = Record(config, start.run_dir, checkpoint=start.checkpoint, changes=changes)
    trainer.callbacks.insert(0, record)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with writing_to(start.run_dir):
            metrics = run(config, trainer, task, data, checkpoint=start.checkpoint)
            record.end(metrics)
    except (SystemExit, RuntimeError) as stopped:
        status = status_of(stopped, trainer)
        if status is None:
            raise
        if trainer.is_global_zero:
            report_stop(status, start.run_dir, step=trainer.global_step)
        raise SystemExit(status) from stopped
    print_summary(metrics, start.run_dir)
    return metrics[config.metric]


def prepare(start: Start, config: DictConfig, task: pl.LightningModule) -> dict[str, tuple[Any, Any]]:
    """Checks that the task fits the checkpoint, says what starts, and returns what the configuration changes."""
    changes = {}
    if start.checkpoint is not None:
        saved = read_checkpoint(start.checkpoint)
        check_resume(task, saved, path=start.checkpoint)
        changes = changed_since(config, saved, path=start.checkpoint)
    rank_zero_only(say)(f" {start.in_words}; everything goes to {start.run_dir}", lead=config.name)
    if changes:
        rank_zero_only(say)(f" {listed(changes)}", lead="changed:")
    return changes


def run(
    config: DictConfig,
    trainer: pl.Trainer,
    task: pl.LightningModule,
    data: pl.LightningDataModule,
    *,
    checkpoint: Path | None,
) -> dict[str, float]:
    """Trains what is left to train, tests, and returns what was measured."""
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    stop_between_stages(trainer)
    if config.metric not in metrics:  # a finished run was resumed: nothing was trained
        trainer.validate(task, datamodule=data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        stop_between_stages(trainer)
    if config.test:
        trainer.test(task, datamodule=data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.metric not in metrics:
        raise ValueError(f"metric={config.metric!r} was not measured; this run has {', '.join(sorted(metrics))}")
    return metrics


def _job(config: DictConfig) -> float:
    """One job of the command line: a single run, or one of a sweep."""
    job = HydraConfig.get()
    if job.mode == RunMode.RUN:
        with one_sentence():
            return train(config)
    with go_on_after_failure(job):
        config.run_dir = job.runtime.output_dir
        mode = metric_mode(config)
        start = monotonic()
        value = train(config)
        record_job(job, metric=config.metric, mode=mode, value=value, minutes=(monotonic() - start) / 60)
    return value


def main() -> None:
    """Console entry point: a mistake in the arguments ends with one sentence and exit status 2."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*dirpath has changed.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    raise_to_us()
    sys.argv[1:] = open_dicts(sys.argv[1:])
    with one_sentence():
        hydra.main(version_base="1.3", config_path="pkg://foveal.configs", config_name="train")(_job)()


if __name__ == "__main__":
    main()
