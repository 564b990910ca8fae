"""The model of a video task: new, or from weights that exist, with adapters of low rank, beside a dense teacher."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data.names import say
from ..video import VideoDiT
from ..video.pipeline import VideoDiTPipeline
from ..video.presets import PRESETS
from .tuning import ADAPTER, check_lora, lora_config, merge_lora

LORA = {"rank": 8, "alpha": 8, "dropout": 0.0, "targets": r".*\.(to_q|to_k|to_v|to_out\.0)"}
OF_DATA = ("class_embed.", "text_embed.")  # parameters that other data need anew
GATE = ".gate."  # of a layer, see `foveal.layers.BoxGate`


def model_folder(source: str | Path, said: str) -> Path:
    """The folder of a saved transformer: itself, that of a pipeline around it, or that of a run.

    Args:
        source: the folder.
        said: key of the configuration that names it.

    Raises:
        FileNotFoundError: none of them.
    """
    for folder in (Path(source), Path(source) / "transformer", Path(source) / "pipeline" / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{said}={str(source)!r} is neither the folder of a model (config.json), nor of a pipeline, nor of a run"
    )


def saved_config(source: str | Path, said: str) -> dict[str, Any]:
    """Arguments of a saved `VideoDiT`.

    Raises:
        FileNotFoundError: see `model_folder`.
        ValueError: the folder is of another model.
    """
    config = VideoDiT.load_config(model_folder(source, said))
    if config.get("_class_name") != "VideoDiT":
        raise ValueError(f"{said}={str(source)!r} is a {config.get('_class_name')}; expected a VideoDiT")
    known = inspect.signature(VideoDiT).parameters
    return {name: value for name, value in config.items() if name in known}


def from_saved(source: str | Path, changes: Mapping[str, Any], *, said: str = "model.pretrained") -> VideoDiT:
    """A model with saved weights.

    Args:
        source: its folder, that of a pipeline or of a run.
        changes: arguments that replace those of its configuration, such as another `attention`. Embeddings of classes
            and texts start anew where their shape has changed, gates of blocks where the folder has none.
        said: key of the configuration that names the folder.

    Raises:
        FileNotFoundError, ValueError: see `saved_config`; or the weights do not fit the changed model.
    """
    folder = model_folder(source, said)
    model = VideoDiT(**(saved_config(source, said) | dict(changes)))
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    ours, anew = model.state_dict(), []
    for name, value in ours.items():
        if name in weights and weights[name].shape == value.shape:
            continue
        if name not in weights and GATE in name:
            weights[name] = value
            continue
        if not name.startswith(OF_DATA):
            found = f"has {list(weights[name].shape)}" if name in weights else "is not there"
            raise ValueError(f"{said}={str(source)!r}: {name} {found}; the model needs {list(value.shape)}")
        anew.append(name)
        weights[name] = value
    if unused := sorted(weights.keys() - ours.keys()):
        anything_else = [name for name in unused if not name.startswith(OF_DATA)]
        if anything_else:
            raise ValueError(f"{said}={str(source)!r} has weights that the model has no place for: {anything_else[0]}")
        weights = {name: value for name, value in weights.items() if name in ours}
    if anew:
        say(f"{len(anew)} parameters of {source} have another shape than these data need, and start anew", anew)
    model.load_state_dict(weights)
    return model


def patch_size(cfg: Mapping[str, Any]) -> Any:
    """`patch_size` of the model that `cfg`, the configuration group `model`, describes."""
    base: Mapping[str, Any] = {"patch_size": inspect.signature(VideoDiT).parameters["patch_size"].default}
    base = dict(base) | (saved_config(cfg["pretrained"], "model.pretrained") if cfg.get("pretrained") else {})
    return (base | PRESETS.get(cfg.get("preset") or "", {}) | dict(cfg.get("args") or {}))["patch_size"]


def make_video_model(
    cfg: Mapping[str, Any], of_data: Mapping[str, Any], *, lora: Mapping[str, Any] | None = None
) -> VideoDiT:
    """The model of a configuration.

    Args:
        cfg: `preset` or `pretrained`, and `args`.
        of_data: arguments that follow from the data.
        lora: see `add_lora`; None: everything is trained.

    Raises:
        ValueError: arguments that the model does not take, or weights that do not fit.
    """
    preset, pretrained, args = cfg.get("preset"), cfg.get("pretrained"), dict(cfg.get("args") or {})
    if pretrained:
        model = from_saved(pretrained, args | dict(of_data))
    else:
        try:
            model = VideoDiT.from_preset(str(preset), **(args | dict(of_data)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.preset={preset!r} cannot be built with model.args={args}: {error}") from error
    return model if lora is None else add_lora(model, lora)


def check_source(cfg: Mapping[str, Any], lora: Mapping[str, Any] | None) -> None:
    """Refuses a model of no origin or of two, and adapters beside random weights.

    Raises:
        ValueError: names the key.
        ImportError: LoRA needs peft, and it is not installed.
    """
    if not cfg.get("pretrained"):
        if lora is not None:
            raise ValueError(f"task.lora={dict(lora)} trains adapters beside weights that exist: set model.pretrained")
        if not cfg.get("preset"):
            raise ValueError(
                "model.preset and model.pretrained are not set: pass model.pretrained=FOLDER of a run or a VideoDiT, "
                f"or a size, one of {', '.join(PRESETS)}"
            )
        return
    if cfg.get("preset"):
        raise ValueError(
            f"model.pretrained={str(cfg['pretrained'])!r} says how the model is built: pass model.preset=null"
        )
    if lora is not None:
        check_lora(lora, LORA)


def add_lora(model: VideoDiT, lora: Mapping[str, Any]) -> VideoDiT:
    """Freezes a model and gives it trainable adapters of low rank (arXiv:2106.09685) beside linear layers.

    Args:
        model: changed in place.
        lora: `rank`, `alpha` (the adapters count `alpha / rank`), `dropout`, and `targets`, a regular expression that
            the names of linear layers fit as a whole; the projections of attention by default.

    Raises:
        ValueError: no layer fits.
    """
    model.requires_grad_(False)
    model.add_adapter(lora_config(model, {**LORA, **lora}))
    return model


def plain_model(model: VideoDiT, weights: Mapping[str, Tensor], lora: Mapping[str, Any]) -> VideoDiT:
    """A model without adapters whose weights have them added."""
    plain = VideoDiT.from_config(model.config)
    plain.load_state_dict(merge_lora(weights, {**LORA, **lora}))
    return plain.to(next(model.parameters()).device).eval()


def save_lora(model: Any, folder: Path, *, weights: dict[str, Tensor] | None = None) -> None:
    """Writes the adapters of a model as `load_lora_weights` of its pipeline and other trainers expect them.

    Args:
        weights: of the whole model, where its own are sharded.
    """
    from peft import get_peft_model_state_dict

    VideoDiTPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model, state_dict=weights),
        transformer_lora_adapter_metadata=model.peft_config[ADAPTER].to_dict(),  # pyright: ignore
    )


class Teacher:
    """A frozen model that a task imitates; no part of the task's weights.

    Args:
        source: see `model_folder`.

    Raises:
        FileNotFoundError, ValueError: see `from_saved`.
    """

    def __init__(self, source: str | Path):
        self.model = from_saved(source, {}, said="task.teacher").requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """Velocity in float32, on the device of `noisy`."""
        self.model.to(noisy.device)
        return self.model(noisy, timestep, **condition).sample.float()
