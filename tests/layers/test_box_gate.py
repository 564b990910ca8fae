"""The gate that learns which blocks matter, against the recorded official gate and its own definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels import masks
from foveal.kernels.ops import block_sparse_attention
from foveal.layers import BoxGate
from foveal.layers.box_gate import attention_map
from mask_lists import kept

GRIDS = [(23,), (9, 11), (3, 5, 7)]


def tensors(grid, heads=4, key_heads=2, d=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, *grid, n, d) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_the_recorded_gate():
    with np.load(Path(__file__).parents[1] / "goldens" / "masks.npz") as file:
        recorded = {
            name: torch.from_numpy(file[f"seer/{name}"]) for name in ("q", "k", "logits", "mask_linear_k.weight")
        }
    gate = BoxGate(4, 16, query_block=8, key_block=8)
    gate.load_state_dict({"mask_linear_k.weight": recorded["mask_linear_k.weight"]})
    past = torch.ones(6, 6, dtype=torch.bool).tril()  # the official gate is causal
    torch.testing.assert_close(
        gate(recorded["q"], recorded["k"])[..., past], recorded["logits"][..., past], atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_new_gate_is_the_product_of_means(grid):
    query, key, _ = tensors(grid)
    gate = BoxGate(4, 8, query_block=3, key_block=2, dtype=torch.float64)
    torch.testing.assert_close(gate(query, key), masks.block_scores(query, key, query_block=3, key_block=2))
    weight = gate.mask_linear_k.weight.detach()
    same = masks.block_scores(query, key, query_block=3, key_block=2, estimate="maxminavg", weight=weight)
    torch.testing.assert_close(gate(query, key), same)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_target_is_the_largest_probability(grid, monkeypatch):
    query, key, _ = tensors(grid)
    monkeypatch.setattr("foveal.layers.box_gate.LOGITS", 1)  # block by block
    block = (2,) * len(grid)
    target = attention_map(query, key, block, block)
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (query, key.repeat_interleave(2, dim=-2))]
    shares = (flat[0] @ flat[1].mT * 8**-0.5).softmax(-1)
    counts = [-(-n // 2) for n in grid]
    number = torch.arange(torch.Size(counts).numel()).view(counts)
    for axis, n in enumerate(grid):
        number = number.repeat_interleave(2, dim=axis).narrow(axis, 0, n)
    owner = number.flatten()
    expected = torch.zeros_like(target)
    for q in range(expected.shape[2]):
        for k in range(expected.shape[3]):
            expected[:, :, q, k] = shares[:, :, owner == q][..., owner == k].amax((-2, -1))
    torch.testing.assert_close(target, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("options", [{}, {"gate_dim": 5}, {"rope_theta": 100.0}], ids=str)
def test_the_gate_learns_and_nothing_else_does(options):
    torch.manual_seed(0)
    query, key, value = (x.requires_grad_() for x in tensors((9, 11), dtype=torch.float32))
    gate = BoxGate(4, 8, query_block=3, key_block=3, **options)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = gate.loss(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert query.grad is None and key.grad is None
    mask = gate.mask(query, key, topk=4)
    assert mask.kv_num.min() >= 4 and mask.kv_num.max() <= 5
    block_sparse_attention(query, key, value, mask=mask).sum().backward()
    assert query.grad is not None
    everything = gate.mask(query, key, threshold=0.0)
    assert kept(everything, 12).all()


def test_the_divergence_of_the_target_from_itself_is_zero(monkeypatch):
    query, key, _ = tensors((12,))
    gate = BoxGate(4, 8, query_block=3, key_block=3, dtype=torch.float64)
    target = attention_map(query, key, (3,), (3,))
    monkeypatch.setattr(BoxGate, "forward", lambda self, query, key: target.log())
    assert gate.loss(query, key).abs() < 1e-12


def test_errors_name_the_argument():
    query, key, _ = tensors((12,))
    gate = BoxGate(4, 8, query_block=3, key_block=3)
    with pytest.raises(ValueError, match=r"threshold=0.1 and topk=2"):
        gate.mask(query, key, threshold=0.1, topk=2)
    with pytest.raises(ValueError, match=r"query.shape=.* must end in \(2, 8\)"):
        BoxGate(2, 8)(query, key)
    with pytest.raises(ValueError, match="num_heads=0"):
        BoxGate(0, 8)
