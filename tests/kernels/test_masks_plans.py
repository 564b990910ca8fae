"""Plans of heads: what they say, what searches find, and the formulas behind."""

import pytest
import torch
from foveal.kernels.masks import HeadChoice, HeadPlan, head_recalls, mask_influence, plan_mask
from foveal.kernels.masks.search import assign, gated, join, plan_by_gates, plan_by_influence, plan_by_recall
from foveal.kernels.ops import block_sparse_attention
from mask_lists import kept

GRID, BLOCK = (6, 7), (2, 2)
NEAR = HeadChoice("nabla_prior", {"window": 1, "block": BLOCK})
WIDE = HeadChoice("nabla_prior", {"window": 3, "block": BLOCK})
POWER = HeadChoice("power", {"block": BLOCK})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_plan_is_json_and_says_who_does_what():
    first = HeadChoice("power", {"block": [2, 2]}, layers=(0,), heads=(1,), steps=(0.0, 0.5))
    plan = HeadPlan((first, HeadChoice("nabla_prior", {"window": 3}, heads=(1, 2))))
    assert HeadPlan.from_json(plan.to_json()) == plan
    assert plan.choice(0, 1, 0.4).mask == "power" and plan.choice(0, 1, 0.5).mask == "nabla_prior"
    assert plan.choice(3, 2).mask == "nabla_prior" and plan.choice(3, 0).mask == "dense"
    with pytest.raises(ValueError, match="not a head plan"):
        HeadPlan.from_json("[]")
    with pytest.raises(ValueError, match="steps="):
        HeadChoice("power", steps=(0.5, 0.2))


def test_the_mask_of_a_plan_stacks_those_of_its_heads():
    plan = HeadPlan((HeadChoice(**{**vars(NEAR), "heads": (1,)}), HeadChoice(**{**vars(POWER), "heads": (2,)})))
    mask = plan_mask(plan, GRID, layer=0, heads=3)
    query, key, value = (normal(1, *GRID, 3, 8, seed=i) for i in range(3))
    out = block_sparse_attention(query, key, value, mask=mask)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).view(out.shape)
    torch.testing.assert_close(out[..., 0, :], dense[..., 0, :])
    matrix = kept(mask, 12)[0]
    assert matrix[0].all() and torch.equal(matrix[1], torch.eye(12, dtype=torch.bool)) and not matrix[2].all()
    assert plan_mask(HeadPlan(), GRID, layer=0, heads=3) is None
    mixed = join([plan, HeadPlan((HeadChoice("power", {"block": 3}, heads=(0,)),))])
    with pytest.raises(ValueError, match="same blocks"):
        plan_mask(mixed, GRID, layer=0, heads=3)
    with pytest.raises(ValueError, match="mask='vsa' must be 'dense' or one of"):
        plan_mask(HeadPlan((HeadChoice("vsa"),)), GRID, layer=0, heads=1)


def test_recall_finds_the_heads_that_look_around_themselves():
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij"), -1).double()
    codes = torch.stack([f(places * w) for w in (0.8, 2.0) for f in (torch.sin, torch.cos)], -1).flatten(
        -2
    )  # [H, W, 8]
    query = torch.stack([30 * codes, torch.zeros_like(codes)], dim=-2)[None]
    key = codes[None, :, :, None].expand(-1, -1, -1, 2, -1)
    recalls, densities = head_recalls(query, key, [NEAR, WIDE])
    assert recalls[0, 0] > 0.9 and torch.allclose(recalls[:, 1], densities), "a head that looks everywhere has density"
    plan = plan_by_recall(query, key, [WIDE, NEAR], recall=0.9, layer=4, steps=(0.2, 1.0))
    assert plan.choice(4, 0, 0.3).options == NEAR.options and plan.choice(4, 1, 0.3).mask == "dense"
    assert plan.choice(4, 0, 0.1).mask == plan.choice(3, 0, 0.3).mask == "dense"
    flat = HeadChoice("moa", {"alpha": 12, "block": 4})
    assert plan_by_recall(query, key, [flat], recall=1e-3).choice(0, 1).mask == "moa"


def test_influence_is_the_change_of_the_loss(monkeypatch):
    """Against masking each pair with a weight that goes from 1 to 0, by finite differences."""
    query, key, value, weight = (normal(1, 5, 1, 4, seed=i) for i in range(4))
    monkeypatch.setattr("foveal.kernels.masks.search.LOGITS", 1)
    found = mask_influence(query, key, value, weight, query_block=1, key_block=1)
    q, k, v, w = (x[0, :, 0] for x in (query, key, value, weight))
    shares = (q @ k.T / 2).softmax(-1)
    for i in range(5):
        for j in range(5):
            without = shares[i].clone()
            without[j] = 0
            change = ((without / without.sum() - shares[i]) @ v) @ w[i]  # linear in the row: exact
            torch.testing.assert_close(found[0, i, j], change.abs())
    grouped = mask_influence(query, key, value, weight, query_block=2, key_block=3)
    blocks = found.view(1, 5, 5)
    expected = torch.stack([blocks[:, a : a + 2].sum(1) for a in (0, 2, 4)], 1)
    expected = torch.stack([expected[..., a : a + 3].sum(-1) for a in (0, 3)], -1)
    torch.testing.assert_close(grouped, expected)


def test_a_budget_goes_where_it_matters():
    influence = torch.zeros(3, 12, 12)
    influence[0] = 1.0  # masking anything hurts
    influence[1, 0, 11] = 0.1
    plan = plan_by_influence(influence, GRID, [NEAR, WIDE], budget=0.5)
    assert plan.choice(0, 0).mask == "dense"
    assert plan.choice(0, 1).mask == plan.choice(0, 2).mask == "nabla_prior"
    assert plan_by_influence(influence, GRID, [NEAR], budget=1.0).choice(0, 1).mask == "dense"
    with pytest.raises(ValueError, match=r"budget=0.01 must be at least"):
        plan_by_influence(influence, GRID, [NEAR], budget=0.01)
    with pytest.raises(ValueError, match=r"influence.shape"):
        plan_by_influence(influence[:, :4], GRID, [NEAR], budget=0.5)


def test_the_assignment_is_within_one_step_of_the_best():
    from itertools import product

    costs, sizes = normal(4, 3).abs().sort(dim=1).values, torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    for budget in (0.2, 0.35, 0.6, 1.0):
        picks = assign(costs, sizes, budget)
        assert sum(sizes[i] for i in picks) / 4 <= budget + 1e-6
        allowed = [p for p in product(range(3), repeat=4) if sum(sizes[i] for i in p) / 4 <= budget + 1e-6]
        best = min(sum(costs[h, i] for h, i in enumerate(p)) for p in allowed)
        step = (costs.amax(1) - costs.amin(1)).max()
        assert sum(costs[h, i] for h, i in enumerate(picks)) <= best + step + 1e-9


def test_gates_mix_outputs_and_become_a_plan():
    dense, sparse = normal(1, 5, 2, 3), normal(1, 5, 2, 3, seed=1)
    assert torch.equal(gated(dense, sparse, torch.ones(2)), dense)
    torch.testing.assert_close(gated(dense, sparse, torch.zeros(2)), sparse)
    gates = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    gated(dense, sparse, gates).sum().backward()
    torch.testing.assert_close(gates.grad, (dense - sparse).sum((0, 1, 3)))
    plan = plan_by_gates(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), NEAR, share=0.5)
    assert [plan.choice(layer, head).mask == "dense" for layer in (0, 1) for head in (0, 1)] == [
        True,
        False,
        False,
        True,
    ]
    assert plan == plan_by_gates(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), NEAR, threshold=0.5)
    with pytest.raises(ValueError, match="give one of them"):
        plan_by_gates(torch.ones(1, 1), NEAR)
