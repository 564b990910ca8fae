"""The canvas of glimpses: official recording, costs and equivariance."""

import torch
from foveal.layers.canvas import CanvasViT, cell_centers, rotate, sample_glimpse
from recorded_modules import fill, noise, recorded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "patch": 8,
    "registers": 2,
    "canvas_grid": 6,
    "canvas_registers": 3,
    "canvas_heads": 2,
    "canvas_head_dim": 16,
    "stride": 1,
}


def test_canvas_recorded():
    z, model = recorded("canvit_additive"), fill(CanvasViT(**SMALL), keep=("vpe.B",))
    assert (model.read_after, model.write_after) == ([0, 2], [1, 3])
    model.vpe.B.copy_(z["vpe_B"])
    scene, state = noise((2, 3, 64, 64), 19).float(), None
    views = (
        (torch.zeros(2, 2), torch.ones(2)),
        (torch.tensor([[-0.5, 0.25], [0.3, -0.6]]), torch.tensor([0.5, 0.4])),
    )
    for i, (center, scale) in enumerate(views):
        glimpse = sample_glimpse(scene, center, scale, 32)
        torch.testing.assert_close(glimpse.sum().double(), z[f"glimpse{i}_sum"], rtol=1e-5, atol=1e-3)
        state = model(glimpse, center, scale, state)
        for name, x in (("canvas", state.tokens), ("cls", state.cls), ("patches", state.patches)):
            torch.testing.assert_close(x.double(), z[f"{name}{i}"], rtol=2e-5, atol=2e-5)


def test_layout_of_the_published_model():
    with torch.device("meta"):
        model = CanvasViT()
    assert (model.read_after, model.write_after) == ([1, 5, 9], [3, 7, 11])
    assert sum(x.numel() for x in model.backbone.parameters()) == 12 * (12 * 768**2 + 15 * 768) + 768 * 769


def test_tokens_start_at_norm_one():
    """As in the official code: from tokens of 0.02 a layer norm makes gradients that are larger by the inverse."""
    torch.manual_seed(0)
    state = CanvasViT(**SMALL | {"canvas_head_dim": 64, "embed_dim": 256}).start(1)
    for tokens in (state.tokens, state.cls):
        assert ((tokens.norm(dim=-1) - 1).abs() < 0.3).all()


def test_writing_zeros_leaves_the_canvas():
    model = CanvasViT(**SMALL)
    for layer in model.canvas_write:
        for p in layer.v_proj.parameters():
            torch.nn.init.zeros_(p)
    start = model.start(2)
    state = model(torch.randn(2, 3, 32, 32), torch.zeros(2, 2), torch.ones(2))
    assert torch.equal(state.tokens, start.tokens)


def test_a_crop_and_a_viewpoint_see_the_same():
    """Half of a scene sampled at scale 1/2 is the glimpse at full scale of the crop, with places of the scene."""
    scene = torch.randn(1, 3, 64, 64)
    center, scale = torch.tensor([[-0.5, 0.5]]), torch.tensor([0.5])
    torch.testing.assert_close(
        sample_glimpse(scene, center, scale, 32),
        sample_glimpse(scene[..., :32, 32:], torch.zeros(1, 2), torch.ones(1), 32),
    )
    q, k = torch.randn(2, 1, 1, 5, 8).double()
    at = torch.rand(1, 5, 2).double()
    near = rotate(q, at, 0) @ rotate(k, at, 0).mT
    moved = rotate(q, at + 0.3, 0) @ rotate(k, at + 0.3, 0).mT  # places count by their difference
    torch.testing.assert_close(near, moved)
    assert torch.equal(cell_centers(2), torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]))


def test_the_cost_is_linear_in_the_canvas():
    def flops(grid: int) -> int:
        model = CanvasViT(**SMALL | {"canvas_grid": grid})
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 3, 32, 32), torch.zeros(1, 2), torch.ones(1))
        return counter.get_total_flops()

    small, middle, large = flops(4), flops(8), flops(16)
    assert abs((large - middle) / (middle - small) - (256 - 64) / (64 - 16)) < 1e-6


def test_convex_writing_and_gradients():
    model = CanvasViT(**SMALL | {"convex": True})
    views = [(torch.rand(2, 2) - 0.5, torch.rand(2) / 2 + 0.2) for _ in range(2)]
    glimpses = torch.randn(2, 2, 3, 32, 32)
    states = []
    for order in ((0, 1), (1, 0)):
        state = None
        for i in order:
            state = model(glimpses[i], *views[i], state)
        states.append(state)
    assert not torch.allclose(states[0].tokens, states[1].tokens)
    (states[0].tokens.square().sum() + states[0].cls.sum() + states[0].patches.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
