"""Keys and values of the frames already generated, so that a causal model continues a video chunk by chunk."""

from collections.abc import Callable

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, `[B, frames, H, W, heads, head_dim]`, from frame `start` on."""

    def __init__(self, owner: "KVCache"):
        self._owner = owner
        self.start = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def join(self, key: Tensor, value: Tensor, first_needed: Callable[[int], int]) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept frames followed by those of the chunk.

        While the cache appends, the chunk is kept too and every frame before `first_needed(frames seen)` is dropped.

        Raises:
            ValueError: the chunk's batch or frame size is not that of the kept frames.
        """
        if self.key is not None and self.value is not None:
            if self.key.shape[0] != key.shape[0] or self.key.shape[2:] != key.shape[2:]:
                raise ValueError(
                    f"kv_cache holds frames of [batch, H, W, heads, head_dim] = "
                    f"{[self.key.shape[0], *self.key.shape[2:]]}, hidden_states has {[key.shape[0], *key.shape[2:]]}"
                )
            key, value = torch.cat([self.key, key], dim=1), torch.cat([self.value, value], dim=1)
        if self._owner.append:
            first = max(first_needed(self.start + key.shape[1]), self.start)
            # clones, so that the frames before do not stay in memory behind a view
            dropped = first - self.start
            self.key, self.value = (x[:, dropped:].detach().clone() if dropped else x.detach() for x in (key, value))
            self.start = first
        return key, value


class KVCache:
    """State of an autoregressive rollout: `VideoDiT(..., kv_cache=cache)` on one chunk of frames after another.

    Every layer must be causal in time. Frames that a layer's window can no longer see are dropped. With `append` off a
    call reads the cache and leaves it as it is: denoise a chunk so, then append it with one call on the clean frames.

    Attributes:
        frames: token frames appended so far; the next chunk's first frame has this position.
        append: whether a call adds its frames.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.append = True
        self._layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        """The part that belongs to layer `index`."""
        if index not in self._layers:
            self._layers[index] = LayerCache(self)
        return self._layers[index]

    def advance(self, frames: int) -> None:
        """Count the frames of a call that has passed through every layer."""
        if self.append:
            self.frames += frames

    @property
    def nbytes(self) -> int:
        """Memory of the kept keys and values."""
        kept = (x for layer in self._layers.values() for x in (layer.key, layer.value) if x is not None)
        return sum(x.numel() * x.element_size() for x in kept)
