"""DataSpec: facts about data by which a task builds its model and a report shows samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSpec:
    """Facts about the items that a model gets; a data module owns them.

    Attributes:
        channels: of an item.
        size: of an item, `(height, width)` or `(frames, height, width)`, in pixels or latents.
        num_classes: None for data without classes.
        class_names: by label.
        mean, std: per channel, `item = (x - mean) / std`.
        text_dim: channels of embedded text; None for data without.

    Raises:
        ValueError: mean or std without one value per channel.
    """

    channels: int
    size: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    text_dim: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, self.channels):
                raise ValueError(f"{name}={values} must have one value per channel, and there are {self.channels}")
