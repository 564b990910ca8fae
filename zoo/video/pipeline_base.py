"""What every pipeline of diffusers has: adapters of low rank, and facts of the running call for callbacks."""

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import is_transformers_available
from torch import Tensor

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
