"""ViMAEdit: Prompt-to-Prompt without inversion, with masks spread by self-attention and noise inside of them."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import interpolate

from ..edits import spread
from ..latents import Step, virtual_step
from ..regions import normalize
from ..registry import recipe


def refined_map(maps: Tensor, attend: Callable[[Tensor], Tensor], *, rounds: int = 5, keep: float = 0.5) -> Tensor:
    """Maps `[B, tokens, words]`, words added up, spread by self-attention; `[B, tokens]`."""
    return spread(maps.sum(-1, keepdim=True), attend, rounds=rounds, keep=keep)[..., 0]


def masks(maps: Tensor, size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """Masks of the latents, bool `[rows, 1, *size]`: minimum to maximum in 0..1, nearest, above a threshold."""
    scaled = normalize(maps, "minmax")
    return interpolate(scaled[:, None], size=size) > threshold


@recipe(
    "ViMAEdit",
    "Null-0000/ViMAEdit@8d3ffa2",
    "exact",
    hosts="Stable Diffusion with an IP-Adapter",
    needs="two prompts; an image prompt for its third part",
    cost="five attention calls with one channel",
)
def vimaedit(
    clean_source: Tensor,
    sample: Tensor,
    noise_prediction: Tensor,
    step: Step,
    *,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    eta: float = 1.0,
) -> Tensor:
    """The step that reconstructs the source in the first row; see `latents.virtual_step`."""
    return virtual_step(clean_source, sample, noise_prediction, step, mask=mask, noise=noise, eta=eta)


def edited_image_embedding(image: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`e_image + (t_target - t_source) |e_image| / |t_target - t_source|`, for an IP-Adapter."""
    change = target - source
    length = change.norm(dim=-1, keepdim=True)
    return image + change * image.norm(dim=-1, keepdim=True) / length.masked_fill(length == 0, 1)
