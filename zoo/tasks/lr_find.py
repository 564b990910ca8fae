"""Find a learning rate: raise it from step to step, and look where the loss falls fastest (arXiv:1506.01186, §3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .confusion import write_csv
from .console import say
from .plots import FONT, MUTED, TRAIN, VAL, save_figure

SMOOTHING = 0.8  # of the moving average of the loss, without the bias of its start
DIVERGED = 4.0  # times the least loss, from which the search ends
EDGE = 5  # points at either end in which a slope is noise


def _follow(losses: Iterable[float]) -> list[float]:
    """Exponential moving average, each value divided by the weight that it has seen."""
    average, made = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        made.append(average / (1 - SMOOTHING**number))
    return made


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean of the moving averages from both ends: one alone would lag, and show the fall at a rate that is too high."""
    return [(a + b) / 2 for a, b in zip(_follow(losses), reversed(_follow(reversed(losses))), strict=True)]


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate; None: it does not fall."""
    values = smooth(losses)
    slopes = [
        (values[i + 1] - values[i - 1]) / math.log(rates[i + 1] / rates[i - 1]) for i in range(1, len(values) - 1)
    ]
    inside = range(EDGE, len(slopes) - EDGE)
    best = min(inside, key=slopes.__getitem__, default=None)
    return rates[best + 1] if best is not None and slopes[best] < 0 else None


class LearningRateFinder(Callback):
    """Trains with a rate that grows by a constant factor, writes `lr_find.csv` and `lr_find.png`, and says a rate.

    The search ends where the loss is four times its least, or not finite. Rates of layers keep their proportions.

    Args:
        dirpath: the run's folder.
        min_lr, max_lr: of the search; the first and the last step's.
        steps: of the search, at least 20; `trainer.max_steps`.

    Raises:
        ValueError: rates that do not grow, or too few steps.
    """

    def __init__(self, dirpath: str, min_lr: float = 1e-6, max_lr: float = 1.0, steps: int = 100):
        if not 0 < min_lr < max_lr:
            raise ValueError(f"callbacks.lr_find: min_lr={min_lr} must be above 0 and below max_lr={max_lr}")
        if steps < 20:
            raise ValueError(f"callbacks.lr_find.steps={steps} must be at least 20")
        self.dirpath, self.min_lr, self.max_lr, self.steps = Path(dirpath), min_lr, max_lr, steps
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        share = min(1.0, trainer.global_step / (self.steps - 1))
        rate = self.min_lr * (self.max_lr / self.min_lr) ** share
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.rates.append(rate)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"])
        if trainer.world_size > 1:
            loss = float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean"))  # pyright: ignore
        self.losses.append(loss)
        if not math.isfinite(loss) or loss > DIVERGED * min(self.losses):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        last = -1 if self.losses and not math.isfinite(self.losses[-1]) else None
        rates, losses = self.rates[:last], self.losses[:last]
        found = suggest(rates, losses) if len(losses) > 2 * EDGE + 3 else None
        rows = zip(rates, losses, smooth(losses), strict=True)
        write_csv(self.dirpath / "lr_find.csv", [["lr", "loss", "smoothed"], *rows])
        self._plot(rates, losses, found)
        advice = f"task.optimizer.lr={found:.1e}" if found else "the loss does not fall in this range"
        say(f" {advice}; see {self.dirpath / 'lr_find.png'}", lead="learning rate:")

    def _plot(self, rates: Sequence[float], losses: Sequence[float], found: float | None) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, NullFormatter

        with rc_context(FONT):
            figure = Figure(figsize=(6, 3.4), dpi=160, layout="constrained")
            ax = figure.subplots()
            ax.plot(rates, losses, color=MUTED, linewidth=0.8, alpha=0.6, label="a batch")
            ax.plot(rates, smooth(losses), color=TRAIN, linewidth=1.6, label="smoothed")
            if found:
                ax.axvline(found, color=VAL, linewidth=1.2, label=f"falls fastest at {found:.1e}")
            ax.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="Learning rate search")
            ax.xaxis.set_major_formatter(FormatStrFormatter("%.0e"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.25, linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False)
            save_figure(figure, self.dirpath / "lr_find.png")
