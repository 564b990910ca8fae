"""The report of tasks from image to image: what a network was given, what it made, and what that is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .plots import FONT, save_figure
from .report import MetricTable

ROWS = 4


class ImageReport(MetricTable):
    """Writes `metrics.csv` and `images.png`, the first images of the test, by what `test_step` returns of them.

    Args:
        dirpath: the run's folder.
    """

    def __init__(self, dirpath: str):
        super().__init__(dirpath)
        self._rows: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Mapping) or len(self._rows) >= ROWS:
            return
        rows = zip(*outputs.values(), strict=True)
        self._rows += [{n: x.float().cpu() for n, x in zip(outputs, row, strict=True)} for row in rows]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._rows:
            plot_images(self._rows[:ROWS], path=self.dirpath / "images.png")


def plot_images(rows: list[dict[str, Tensor]], *, path: Path) -> Path:
    """Draw rows of images beside each other.

    Args:
        rows: images `[3, H, W]` or `[1, H, W]` in [0, 1] by title, the same titles in each row.
        path: of the PNG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    height, width = next(iter(rows[0].values())).shape[1:]
    with rc_context(FONT):
        inches = 3.0 * len(rows[0]), 3.0 * len(rows) * height / width + 0.3
        figure = Figure(figsize=inches, dpi=160, layout="constrained")
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for number, (axes, row) in enumerate(zip(grid, rows, strict=True)):
            for ax, (title, image) in zip(axes, row.items(), strict=True):
                pixels = image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy()
                ax.imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
                ax.axis("off")
                if number == 0:
                    ax.set_title(title)
        return save_figure(figure, path)
