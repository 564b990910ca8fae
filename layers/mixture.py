"""Mixture of heads: each token weighs the heads of an attention and leaves some out (arXiv:2410.11842)."""

from typing import Any

import torch
from torch import Tensor, nn


class HeadRouter(nn.Module):
    """Weights of the heads of an attention for every token; 0 for heads that the token leaves out (section 3.3).

    The first `shared` heads serve every token. Of the others each token takes the `routed` with the largest softmax
    scores, which are scaled to sum to `routed`. Two more softmaxes balance shared heads among each other and the two
    groups. All maps are linear, without biases, and named as in the official checkpoints: `wg` (scores of heads that
    are routed), `wg_0` (of both groups), `wg_1` (of the shared heads).

    Args:
        dim: channels of the tokens.
        num_heads: heads.
        shared: leading heads that serve every token.
        routed: further heads that each token takes; 0 where all heads are shared.

    Raises:
        ValueError: numbers of heads that contradict each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        shared: int,
        routed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= shared <= num_heads:
            raise ValueError(f"shared={shared} must lie in [0, num_heads]; num_heads={num_heads}")
        choice = num_heads - shared
        if not (0 < routed <= choice or (routed == 0 and choice == 0)):
            raise ValueError(f"routed={routed} must lie in [1, {choice}], or be 0 if shared=num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shared, self.routed = shared, routed
        self.wg = nn.Linear(dim, choice, bias=False, **dd) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False, **dd) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, bias=False, **dd) if shared > 1 else None
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, dim]` to weights `[B, N, heads]`.

        In training `balance_loss` becomes the squared number of routed heads times the mean product of how often a head
        is taken and how large its score is; training adds 0.01 times its mean over layers.
        """
        shared = x.new_ones(*x.shape[:2], self.shared)
        if self.wg_1 is not None:
            shared = self.wg_1(x).softmax(-1) * self.shared
        if self.wg is None:
            return shared
        scores = self.wg(x).softmax(-1)
        taken = torch.zeros_like(scores).scatter(-1, scores.topk(self.routed, dim=-1).indices, 1.0)
        if self.training:
            often, large = taken.mean((0, 1)), scores.mean((0, 1))
            self.balance_loss = scores.shape[-1] ** 2 * (often * large).mean()
        routed = scores * taken
        total = routed.sum(-1, keepdim=True).clamp(min=torch.finfo(routed.dtype).eps)
        routed = routed / total * self.routed
        if self.wg_0 is None:
            return routed
        groups = self.wg_0(x).softmax(-1) * 2
        return torch.cat([groups[..., :1] * shared, groups[..., 1:] * routed], dim=-1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"balance_loss": None}  # of a graph, which is neither copied nor stored

    def extra_repr(self) -> str:
        return f"shared={self.shared}, routed={self.routed}"


def balance_loss(model: nn.Module) -> Tensor:
    """Mean over the routers of a model of what their last forward pass in training left; 0 where none routes.

    Raises:
        ValueError: the model has no router.
    """
    routers = [module for module in model.modules() if isinstance(module, HeadRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no HeadRouter")
    losses = [router.balance_loss for router in routers if router.balance_loss is not None]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def taken_rows(weights: Tensor) -> Tensor:
    """For each head the tokens that take it, then others, as many for all as the most taken head has.

    The number is data: this waits for the device.

    Args:
        weights: `[B, N, heads]`, 0 where a token leaves a head out.

    Returns:
        indices `[B, heads, rows]` into N.
    """
    taken = (weights != 0).transpose(1, 2)
    count = int(taken.sum(-1).max())
    return taken.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]
