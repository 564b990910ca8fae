"""Learned connectivity against its formula, and what it learns."""

import pytest
import torch
from foveal.kernels.ops import block_sparse_attention
from foveal.layers import ConnectivityAttention2d, LearnedConnectivity
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


def attention(class_token=False, heads=2, **options):
    torch.manual_seed(0)
    layer = ConnectivityAttention2d(12, num_heads=heads, grid_size=(3, 5), class_token=class_token, **options)
    return layer.double()


@pytest.mark.parametrize("class_token", [False, True])
def test_attention_is_the_softmax_over_the_chosen_keys(class_token):
    layer = attention(class_token, share=0.3, predictor={"basis": 6, "coefficients": 2, "threshold": 0.0})
    tokens = 15 + class_token
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    query, key, value = layer.qkv(x).view(2, tokens, 3, 2, 6).unbind(2)
    predicted = layer.mask_predictor(query, key)
    expected = torch.empty(2, tokens, 2, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for i in range(tokens):
                kept = predicted[b, h, i].argsort(descending=True)[:5]  # ceil(0.3 * 15 or 16)
                kept = torch.arange(tokens) if class_token and i == 0 else kept
                weights = (key[b, kept, h] @ query[b, i, h] * 6**-0.5).softmax(0)
                expected[b, i, h] = weights @ value[b, kept, h]
    given = (x, {"grid_size": (3, 5)}) if class_token else (x.view(2, 3, 5, 12), {})
    out = layer(given[0], **given[1]).view(2, tokens, 12)
    torch.testing.assert_close(out, layer.proj(expected.flatten(2)))


def test_all_keys_are_plain_attention():
    layer = attention(share=1.0)
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    out = layer(x)
    layer.sparse = False
    torch.testing.assert_close(layer(x), out)


@pytest.mark.parametrize("sparse", [True, False])
def test_any_loss_teaches_the_predictor_the_dense_map_and_nothing_else(sparse):
    layer = attention(sparse=sparse, predictor={"basis": 15})
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    loss = layer(x).square().mean()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    query, key, _ = layer.qkv(x.view(2, 15, 12)).view(2, 15, 3, 2, 6).unbind(2)
    dense = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 6**-0.5).softmax(-1)
    predicted = layer.mask_predictor(query, key, whole=not sparse)
    teaching = (predicted - dense).square().sum(-1).mean()
    taught = dict(layer.mask_predictor.named_parameters())
    for name, wanted in zip(taught, torch.autograd.grad(teaching, list(taught.values())), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found[f"mask_predictor.{name}"], wanted)
    layer.loss_weight = 0
    own = {n: p for n, p in layer.named_parameters() if not n.startswith("mask_predictor")}
    untaught = torch.autograd.grad(layer(x).square().mean(), list(own.values()))
    assert all(torch.equal(found[name], gradient) for name, gradient in zip(own, untaught, strict=True))
    layer(x).square().mean().backward()
    assert all(p.grad is None for p in taught.values())


def test_tables_follow_the_grid():
    layer = attention(class_token=True)
    for table in (layer.mask_predictor.proj_n, layer.mask_predictor.proj_back_n):
        torch.nn.init.constant_(table[1:], 0.5)
    layer.set_grid_size((6, 5))
    assert layer.mask_predictor.proj_n.shape == (31, 2)
    torch.testing.assert_close(layer.mask_predictor.proj_back_n[1:], torch.full((30, 2), 0.5).double())
    torch.testing.assert_close(layer.mask_predictor.proj_n[1:], torch.full((30, 2), 0.5 * 16 / 31).double())
    assert layer(torch.randn(1, 31, 12).double(), grid_size=(6, 5)).shape == (1, 31, 12)
    with pytest.raises(ValueError, match=r"of 31 tokens"):
        layer(torch.randn(1, 16, 12).double(), grid_size=(3, 5))


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"loss_weight": -1}, {"predictor": {"basis": 99}}])
def test_wrong_options_of_the_attention_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.get("predictor", wrong)))):
        attention(**wrong)
