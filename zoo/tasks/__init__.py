"""Training: Lightning modules, callbacks and what `foveal-train` does around them."""

from .classification import ClassificationTask

__all__ = ["ClassificationTask"]
