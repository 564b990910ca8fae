"""Token merging for diffusion: self-attention over fewer tokens."""

from ..edits import MergeTokens
from ..registry import recipe
from ..where import Where


@recipe(
    "Token merging (ToMe for Stable Diffusion)",
    "arXiv:2303.17604, dbolya/tomesd@27a14a3",
    "exact",
    hosts="UNets and transformers with self-attention",
    cost="(1 - ratio)² of self-attention, and a matching",
    recorded="dit_tome",
)
def token_merging(ratio: float = 0.5, *, scales: tuple[int, ...] | None = (1,), log_size: bool = False, seed=0) -> list:
    """Edits that merge before and copy back after self-attention.

    Args:
        ratio: share of tokens merged; 0 is neutral.
        scales: latent pixels per token of the attentions; the largest grid by default, as by the authors.
        log_size: whether merged keys count by their sizes.
        seed: of the random destination in each 2 x 2 cell, the same in every call; None for the first token.
    """
    return [MergeTokens(ratio, log_size=log_size, seed=seed, where=Where(kinds=("self",), scales=scales))]
