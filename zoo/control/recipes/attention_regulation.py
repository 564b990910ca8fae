"""Attention Regulation: logits of target words edited by a few Gaussians so that each gets its share."""

from collections.abc import Sequence

from ...sites import Schedule
from ..edits import Regulate
from ..registry import recipe
from ..where import Where


@recipe(
    "Attention Regulation",
    "YaNgZhAnG-V5/attention_regulation@b66d9db",
    "exact",
    hosts="Stable Diffusion 1.4 to 2.1; any cross-attention to text",
    needs="target words, maps='allow'",
    cost="20 gradient steps on cross-attention maps of 16 x 16 in each edited layer and step",
    recorded="unet_attention_regulation",
)
def attention_regulation(
    words: Sequence[str],
    *,
    ends: Sequence[int] = (0,),
    until: float = 0.5,
    iterations: int = 20,
    scales: tuple[int, ...] | None = (4,),
) -> list:
    """Edits for a Control with maps="allow".

    Args:
        words: of the Control, that shall each get their share.
        ends: tokens whose columns stay: start and end of the text.
        until: fraction of the steps.
        iterations: gradient steps; 0 is neutral.
        scales: latent pixels per token of the edited cross-attentions, 16 x 16 of 64 x 64 latents; all when None.
    """
    where = Where(kinds=("cross",), scales=scales)
    schedule = Schedule(steps=(None, float(until)))
    return [Regulate(*words, ends=ends, iterations=iterations, where=where, schedule=schedule)]
