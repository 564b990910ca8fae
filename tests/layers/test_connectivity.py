"""Learned connectivity against its formula, and what it learns."""

import pytest
import torch
from foveal.kernels.ops import block_sparse_attention
from foveal.layers import LearnedConnectivity
from mask_lists import kept


def tensors(*grid, heads=2, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *grid, heads, d, generator=generator, dtype=dtype) for _ in range(3)]


def test_the_map_is_its_formula():
    torch.manual_seed(0)
    query, key, value = tensors(4, 5)
    layer = LearnedConnectivity(2, 6, tokens=20, basis=7, coefficients=3, dtype=torch.float64)
    found = layer(query, key)
    q, k = (x.flatten(1, 2).transpose(1, 2) for x in (query, key))
    expected = torch.zeros_like(found)
    for b in range(2):
        for h in range(2):
            rows, columns = layer.proj_c_q(q[b, h]), layer.proj_c_k(k[b, h])
            weights = (rows @ (columns.T @ layer.proj_n) * 2**-0.5).softmax(-1)
            for i, row in enumerate(weights):
                for j in row.argsort(descending=True)[:3]:
                    basis = layer.proj_back_n[:, j].abs()
                    expected[b, h, i] += row[j] * torch.where(basis > 0.02, basis, 0)
    torch.testing.assert_close(found, expected)
    mask = layer.mask(query, key, share=0.25, dense=1)
    chosen = kept(mask, 20)
    assert chosen[:, :, 0].all() and chosen.diagonal(dim1=2, dim2=3).all()
    assert (chosen[:, :, 1:].sum(-1) >= 5).all() and (chosen[:, :, 1:].sum(-1) <= 6).all()
    assert block_sparse_attention(query, key, value, mask=mask).isfinite().all()
    everything = layer.mask(query, key, share=1.0)
    assert (everything.kv_num == 20).all()


def test_it_learns_where_attention_looks():
    torch.manual_seed(0)
    query, key, _ = tensors(24, dtype=torch.float32)
    query = 4 * key.roll(1, dims=1)  # every token looks at the one before it
    target = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 6**-0.5).softmax(-1)
    layer = LearnedConnectivity(2, 6, tokens=24, basis=24)
    with torch.no_grad():
        layer.proj_back_n.uniform_(0.02, 0.1)

    def recall() -> float:
        return (target * kept(layer.mask(query, key, share=0.25), 24)).sum(-1).mean().item()

    before, optimizer = recall(), torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(200):
        loss = (layer(query, key) - target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert recall() > before + 0.2


def test_errors_name_the_argument():
    query, key, _ = tensors(4, 5)
    layer = LearnedConnectivity(2, 6, tokens=20, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"query.shape=.* of 20 tokens"):
        layer(query[:, :3], key)
    with pytest.raises(ValueError, match=r"share=0.0"):
        layer.mask(query, key, share=0.0)
    with pytest.raises(ValueError, match=r"basis=30"):
        LearnedConnectivity(2, 6, tokens=20, basis=30)
