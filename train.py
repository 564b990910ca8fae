"""`foveal-train`, which is also `python train.py`: train what a Hydra configuration describes, with Lightning.

Arguments are Hydra's: `experiment=NAME`, `group=choice`, `key=value`, `-m` for sweeps; see docs/training.md.
"""

import logging
import warnings
from time import monotonic

import hydra
import lightning.pytorch as pl
import torch
from foveal.zoo.tasks.explain import one_sentence, raise_to_us
from foveal.zoo.tasks.launch import (
    check_targets,
    instantiate_all,
    make_strategy,
    print_summary,
    resolve_run,
    write_record,
)
from foveal.zoo.tasks.sweep import metric_mode, record_job
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.strategies import ModelParallelStrategy
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
    strategy = make_strategy(options["trainer"].pop("strategy"))
    if not isinstance(strategy, ModelParallelStrategy):
        task.configure_model()  # sharded models are built on their devices; others here, before processes are spawned
    trainer = instantiate(
        options["trainer"],
        strategy=strategy,
        callbacks=instantiate_all(options["callbacks"]),
        logger=instantiate_all(options["logger"]),
        _convert_="all",
    )
    return trainer, task, data


def train(config: DictConfig) -> float:
    """Trains, tests and reports; returns the value of `config.metric`, which sweeps compare.

    Args:
        config: composed from `foveal.configs`, see `configs/train.yaml`.

    Raises:
        ValueError, FileNotFoundError, ImportError: a mistake in the configuration; the message names the key.
    """
    run_dir, checkpoint = resolve_run(config)
    config.run_dir = str(run_dir)
    trainer, task, data = build(config)
    write_record(config, run_dir, checkpoint)
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.metric not in metrics:  # a finished run was resumed: nothing was trained
        trainer.validate(task, datamodule=data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.test:
        trainer.test(task, datamodule=data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    print_summary(metrics, run_dir)
    if config.metric not in metrics:
        raise ValueError(f"metric={config.metric!r} was not measured; this run has {', '.join(sorted(metrics))}")
    return metrics[config.metric]


def _job(config: DictConfig) -> float:
    """One job of the command line: a single run, or one of a sweep."""
    job = HydraConfig.get()
    with one_sentence():
        if job.mode == RunMode.RUN:
            return train(config)
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
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    raise_to_us()
    with one_sentence():
        hydra.main(version_base="1.3", config_path="pkg://foveal.configs", config_name="train")(_job)()


if __name__ == "__main__":
    main()
