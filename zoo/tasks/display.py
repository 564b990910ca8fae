"""Terminal display of a training run: a progress bar and a summary of the model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich.table import Table

from .console import console


class Bar(RichProgressBar):
    """Lightning's bar; a run that is not limited by epochs shows the steps that it is limited by."""

    def _get_train_description(self, current_epoch: int) -> str:
        if (self.trainer.max_epochs or -1) > 0:
            return super()._get_train_description(current_epoch)
        steps = f", from step {self.trainer.global_step:,}"
        return f"Epoch {current_epoch}{steps}" + (
            f" of {self.trainer.max_steps:,}" if self.trainer.max_steps > 0 else ""
        )


class Summary(RichModelSummary):
    """The parts of the model and their parameters; FLOPs only where they are known."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Prints the table, see Lightning; rows without parameters (metrics) are left out."""
        columns = dict(summary_data)
        table = Table("Name", "Type", header_style="bold")
        table.add_column("Params", justify="right")
        for name, kind, count in zip(columns["Name"], columns["Type"], columns["Params"], strict=True):
            if count.strip() != "0":
                table.add_row(name, kind, count)
        console().print(table)
        frozen = total_parameters - trainable_parameters
        line = f"{get_human_readable_count(trainable_parameters)} trainable parameters"
        line += f", {get_human_readable_count(frozen)} frozen" if frozen else ""
        line += f", {get_human_readable_count(total_flops)} FLOPs" if total_flops else ""
        console().print(line)
