"""Attention and blocks with fewer parts: what the algebra says of each reduction."""

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from foveal.layers import MinimalAttention
from torch import nn

DD = {"dtype": torch.float64}


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, **DD, generator=torch.Generator().manual_seed(0))


def test_collapsed_attention_is_separate_attention_with_the_product_of_its_matrices():
    separate, collapsed = (MinimalAttention(8, qk=qk, **DD) for qk in ("separate", "collapsed"))
    nn.init.zeros_(separate.q.bias)
    nn.init.zeros_(separate.k.bias)
    collapsed.load_state_dict({k: v for k, v in separate.state_dict().items() if not k.startswith(("q.", "k."))} | {
        "q.weight": separate.k.weight.T @ separate.q.weight
    })  # fmt: skip
    x = draw(2, 7, 8)
    torch.testing.assert_close(collapsed(x), separate(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
def test_symmetric_scores_are_their_transpose_and_never_negative_definite(heads):
    query, key = MinimalAttention(8, num_heads=heads, qk="symmetric", **DD).scores(draw(1, 6, 8))
    scores = query @ key.mT
    torch.testing.assert_close(scores, scores.mT)
    assert torch.linalg.eigvalsh(scores).min() > -1e-9


@pytest.mark.parametrize(("qk", "vo", "matrices"), [
    ("separate", "separate", 4), ("collapsed", "separate", 3), ("symmetric", "merged", 2), ("symmetric", "none", 1),
])  # fmt: skip
def test_reductions_save_matrices_and_keep_shapes_and_gradients(qk, vo, matrices):
    layer = MinimalAttention(8, num_heads=2, qk=qk, vo=vo, **DD)
    assert sum(p.numel() for p in layer.parameters() if p.ndim == 2) == matrices * 64
    x = draw(2, 5, 8).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    assert out.shape == x.shape and all(p.grad.isfinite().all() for p in [x, *layer.parameters()])
    with pytest.raises(ValueError, match="qk='none' must be one of"):
        MinimalAttention(8, qk="none")
    with pytest.raises(ValueError, match=r"expected \[B, N, 8\]"):
        layer(draw(2, 5, 4))


def test_blocks_without_feed_forward_layers_have_that_many_parameters_less():
    full, less = (timm.create_model("minimal_vit_pico", mlp=mlp, device="meta") for mlp in (True, False))
    saved = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in less.parameters())
    assert saved == 6 * (8 * 64**2 + 7 * 64)
