"""Trained models in use: open one by whatever names it, evaluate it, predict with it, export it, look into it."""

from .evaluate import Evaluation, evaluate
from .export import export_onnx, export_program
from .predict import Prediction, predict
from .source import OpenedModel, open_model

__all__ = [
    "Evaluation",
    "OpenedModel",
    "Prediction",
    "evaluate",
    "export_onnx",
    "export_program",
    "open_model",
    "predict",
]
