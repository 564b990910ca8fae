"""What every pipeline of diffusers has: adapters of low rank, and facts of the running call for callbacks."""

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import is_transformers_available
from torch import Tensor

from .labels import read_labels

if is_transformers_available():  # diffusers has its loaders of adapters only beside transformers
    from diffusers.loaders import CogVideoXLoraLoaderMixin as TransformerLora  # of pipelines with one transformer
else:

    class TransformerLora:
        """Stands for diffusers' loader of adapters."""

        def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
            """Refuse.

            Raises:
                ImportError: always.
            """
            raise ImportError("load_lora_weights needs peft and transformers: pip install 'foveal[lora]' transformers")


class TransformerPipeline(DiffusionPipeline, TransformerLora):
    """A pipeline of one transformer that predicts under guidance."""

    transformer: Any
    _guidance_scale: float
    _guidance_rescale: float
    _attention_kwargs: dict[str, Any] | None
    _generator: Any = None  # of noise that schedulers add
    _guider: Any = None
    _num_timesteps: int
    _current_timestep: Tensor | None
    _interrupt: bool

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        guided = self._guidance_scale > 1 if self._guider is None else True
        return guided and self.transformer.config.conditioning is not None

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def labels(self) -> dict[str, int]:
        """Labels of classes by name; empty where id2label was not given."""
        return {name: int(label) for label, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Labels of classes by name, as `DiTPipeline.get_label_ids`.

        Raises:
            ValueError: an unknown name; says the nearest ones.
        """
        return read_labels(label, labels=self.labels, num_classes=self.transformer.config.num_classes or 0).tolist()

    def video_size(self, *sizes: int | None) -> tuple[int, ...]:
        """Frames, height and width, those of sample_size where None.

        Raises:
            ValueError: there is no sample_size.
        """
        default = self.config.sample_size
        if None in sizes and default is None:
            names = ", ".join(
                f"{name}={size}" for name, size in zip(("num_frames", "height", "width"), sizes, strict=True)
            )
            raise ValueError(f"{names} must be given: this pipeline has no sample_size")
        return tuple(default[i] if size is None else size for i, size in enumerate(sizes))
