"""The steps that masks share, and the branches beside masks, against their definitions."""

from itertools import product

import pytest
import torch
from foveal.kernels import masks
from foveal.kernels.masks.blocks import (
    block_means,
    block_tokens,
    cut_into_blocks,
    density,
    own_blocks,
    product_mask,
    stack_heads,
    to_mask,
)
from foveal.kernels.ops import block_sparse_attention
from mask_lists import kept

GRIDS = [(11,), (5, 7), (3, 4, 5)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def owners(shape, block) -> torch.Tensor:
    """The block of every token, by its definition."""
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    found = []
    for place in product(*map(range, shape)):
        number = 0
        for x, b, count in zip(place, block, counts, strict=True):
            number = number * count + x // b
        found.append(number)
    return torch.tensor(found)


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_sums_over_blocks(shape):
    block = (2, 3, 2)[: len(shape)]
    x, owner = normal(2, *shape, 2, 4), owners(shape, block)
    flat = x.flatten(1, -3)
    expected = torch.stack([flat[:, owner == i].mean(1) for i in range(int(owner.max()) + 1)], dim=1)
    torch.testing.assert_close(block_means(x, block), expected)
    assert torch.equal(block_tokens(shape, block), torch.bincount(owner))
    tokens, exists = cut_into_blocks(x, block)
    assert torch.equal(exists.sum(1), torch.bincount(owner))
    assert not tokens[:, ~exists].any()
    assert torch.equal(own_blocks(shape, block, block), torch.eye(len(exists), dtype=torch.bool))
    other = (3, 2, 4)[: len(shape)]
    shared = torch.zeros(len(exists), int(owners(shape, other).max()) + 1, dtype=torch.bool)
    shared[owner, owners(shape, other)] = True
    assert torch.equal(own_blocks(shape, block, other), shared)


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_scores_are_their_definitions(shape):
    query, key = normal(1, *shape, 4, 4), normal(1, *shape, 2, 4, seed=1)
    blocks = {"query_block": 2, "key_block": 3}
    owner = [owners(shape, (size,) * len(shape)) for size in (2, 3)]
    q = query.flatten(1, -3)[0].transpose(0, 1)
    k = key.repeat_interleave(2, dim=-2).flatten(1, -3)[0].transpose(0, 1)  # [heads, tokens, d]
    found = {
        x: masks.block_scores(query, key, estimate=x, samples=99, **blocks)[0] for x in ("mean", "minmax", "probe")
    }
    for i, j in product(range(int(owner[0].max()) + 1), range(int(owner[1].max()) + 1)):
        queries, keys = q[:, owner[0] == i], k[:, owner[1] == j]
        middle = queries.mean(1)
        torch.testing.assert_close(found["mean"][:, i, j], (middle * keys.mean(1)).sum(-1) / 2)
        bound = torch.maximum(middle * keys.amin(1), middle * keys.amax(1)).sum(-1) / 2
        torch.testing.assert_close(found["minmax"][:, i, j], bound)
        torch.testing.assert_close(found["probe"][:, i, j], (queries @ keys.mean(1)[..., None]).amax((1, 2)) / 2)
    both = masks.block_scores(query, key, per="all", **blocks)
    torch.testing.assert_close(both[:, 0], found["mean"].mean(0)[None])


def by_hand(scores, rule, value, crossing=True):
    """Kept places of one row."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if rule == "topk":
        return set(order[:value])
    if rule == "threshold":
        return {i for i in order if scores[i] >= value} | set(order[:1])
    total, sums, chosen = sum(scores), 0.0, set()
    for i in order:
        if sums >= value * total or (not crossing and sums + scores[i] > value * total):
            break
        chosen.add(i)
        sums += scores[i]
    return chosen | set(order[:1])


@pytest.mark.parametrize(
    ("rule", "value", "crossing"),
    [("topk", 3, True), ("threshold", 0.55, True), ("mass", 0.55, True), ("mass", 0.55, False), ("mass", 0.999, True)],
)
def test_rules_keep_what_they_say(rule, value, crossing):
    scores = (normal(2, 2, 5, 9).abs() * 4).round() / 4 + 0.001 * torch.arange(9).remainder(2)  # with ties
    chosen = masks.keep(scores, rule=rule, **{rule: value}, mass_crossing=crossing)
    for row, bits in zip(scores.flatten(0, 2).tolist(), chosen.flatten(0, 2), strict=True):
        assert set(bits.nonzero().flatten().tolist()) == by_hand(row, rule, value, crossing)


def test_scopes_budgets_and_bounds():
    scores = normal(2, 3, 4, 10)
    for scope, size in (("row", 10), ("head", 40), ("all", 120)):
        chosen = masks.keep(scores, rule="budget", budget=0.3, scope=scope, least=0)
        assert (chosen.flatten(-1 - ("row", "head", "all").index(scope)).sum(-1) == 0.3 * size).all()
        chosen = masks.keep(scores, rule="topk", topk=2, scope=scope, least=0)
        assert chosen.sum() == 2 * 2 * 3 * 4
    whole = masks.keep(scores, rule="budget", budget=0.3, scope="all", least=0)[0].flatten()
    assert scores[0].flatten()[whole].min() > scores[0].flatten()[~whole].max()
    assert (masks.keep(scores, rule="threshold", threshold=9.0, least=2).sum(-1) == 2).all()
    assert (masks.keep(scores, rule="threshold", threshold=-9.0, most=3).sum(-1) == 3).all()


def test_allowed_comes_before_the_rule_and_always_after_it():
    scores = torch.arange(6.0).view(1, 1, 1, 6)
    allowed, always = (
        torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool),
        torch.tensor([1, 0, 0, 0, 0, 1], dtype=torch.bool),
    )
    chosen = masks.keep(scores, rule="topk", topk=2, allowed=allowed, always=always)
    assert chosen.flatten().tolist() == [True, False, True, True, False, True]
    chosen = masks.keep(scores, rule="mass", mass=1.0, allowed=allowed)
    assert chosen.flatten().tolist() == allowed.tolist()
    assert not masks.keep(scores, rule="topk", topk=2, allowed=torch.zeros(6, dtype=torch.bool)).any()


def test_lists_and_matrices_say_the_same():
    chosen = normal(2, 3, 5, 7) > 0.5
    mask = to_mask(chosen, query_block=(2,), key_block=(3,))
    assert torch.equal(kept(mask, 7), chosen)
    cut = to_mask(chosen, query_block=(2,), key_block=(3,), most=int(chosen.sum(-1).max()))
    assert torch.equal(kept(cut, 7), chosen) and cut.kv_idx.shape[-1] == chosen.sum(-1).max()
    one = to_mask(chosen[0, 0], query_block=(2,), key_block=(3,), most=6)
    two = to_mask(chosen[0, 1], query_block=(2,), key_block=(3,), most=7)
    assert torch.equal(kept(stack_heads([one, two]), 7)[0], chosen[0, :2])
    tokens = block_tokens((20,), (3,)).double()
    expected = (chosen[0, 0].double() @ tokens) @ block_tokens((10,), (2,)).double() / 200
    torch.testing.assert_close(density(one, (10,), (20,))[0, 0], expected)


def test_relations_along_axes_make_the_mask_of_their_product():
    relations = [normal(n, n, seed=n) > 0 for n in (5, 7)]
    fine = product_mask(relations, query_block=(1, 1), key_block=(1, 1))
    dense = (relations[0][:, None, :, None] & relations[1][None, :, None, :]).reshape(35, 35)
    assert torch.equal(kept(fine, 35)[0, 0], dense)


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_the_coarse_branch_is_attention_of_means(shape):
    query, key, value = (normal(1, *shape, n, 4, seed=i).requires_grad_() for i, n in enumerate((4, 2, 2)))
    block = (2,) * len(shape)
    owner = owners(shape, block)
    out = masks.vsa_coarse(query, key, value, block=2)
    flat = [x.flatten(1, -3)[0] for x in (query, key, value)]
    means = [torch.stack([x[owner == i].mean(0) for i in range(int(owner.max()) + 1)]) for x in flat]
    means[1:] = [x.repeat_interleave(2, dim=1) for x in means[1:]]
    weights = (torch.einsum("qhd,khd->hqk", means[0], means[1]) / 2).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, means[2])[owner].view(out.shape)
    torch.testing.assert_close(out, expected)
    weight = normal(*out.shape, seed=5)
    found = torch.autograd.grad((out * weight).sum(), (query, key, value))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), (query, key, value)))


def test_the_linear_branch_is_its_quadratic_form():
    query, key, value = (normal(2, 3, 5, n, 4, seed=i).requires_grad_() for i, n in enumerate((4, 2, 2)))
    out = masks.sla_linear(query, key, value)
    q, k = query.softmax(-1).flatten(1, 2), key.softmax(-1).flatten(1, 2).repeat_interleave(2, dim=2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value.flatten(1, 2).repeat_interleave(2, dim=2)).view(out.shape)
    torch.testing.assert_close(out, expected)
    weight = normal(*out.shape, seed=5)
    found = torch.autograd.grad((out * weight).sum(), (query, key, value))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), (query, key, value)))


def test_a_mean_in_the_pyramid_weighs_as_many_keys():
    query, key, value = (normal(1, 64, 2, 8, seed=i).requires_grad_() for i in range(3))
    levels = torch.tensor([1, 2, 4, 8])[torch.randperm(4, generator=torch.Generator().manual_seed(0))].expand(
        1, 2, 4, 4
    )
    mask = masks.pyramid_mask(levels, 64, query_block=16, key_block=16)
    out = block_sparse_attention(query, masks.pyramid(key, 16), masks.pyramid(value, 16), mask=mask)
    rows = [(x.view(1, -1, level, 2, 8).mean(2).repeat_interleave(level, dim=1))[:, 16 * i : 16 * i + 16]
            for i, level in enumerate(levels[0, 0, 0].tolist()) for x in (key, value)]  # fmt: skip
    keys, values = torch.cat(rows[::2], 1), torch.cat(rows[1::2], 1)
    flat = [x.transpose(1, 2) for x in (query, keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weight = normal(*out.shape, seed=5)
    found = torch.autograd.grad((out * weight).sum(), (query, key, value))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), (query, key, value)))


def test_pooled_keys_are_weighted_sums_of_patches():
    x, weight = normal(1, 5, 6, 2, 3), normal(2, 4, seed=1)
    pooled = masks.clear_pooled(x, weight)
    assert pooled.shape == (1, 6, 2, 3)
    torch.testing.assert_close(pooled[:, 0], torch.einsum("bijhd,ij->bhd", x[:, :2, :4], weight))
    short = torch.einsum("bijhd,ij->bhd", x[:, 4:, 4:], weight[:1, :2]) * 8 / 2
    torch.testing.assert_close(pooled[:, 5], short)


def test_orders_are_permutations_and_curves_go_step_by_step():
    for shape in ((4, 6), (6, 4, 8), (5, 7, 3)):
        order = masks.gilbert_order(shape)
        assert torch.equal(order.sort().values, torch.arange(torch.Size(shape).numel()))
        steps = torch.stack(torch.unravel_index(order, shape)).diff(dim=1).abs().sum(0)
        assert (steps == 1).all() if not any(n % 2 for n in shape) else steps.max() <= 2
    order = masks.axis_order((2, 3, 4), (1, 2, 0))
    x = torch.arange(24)
    assert torch.equal(x[order], x.view(2, 3, 4).permute(1, 2, 0).flatten())
    assert torch.equal(x[order][masks.inverse_order(order)], x)
    assert masks.paro_block((5, 30, 52), (1, 2, 0), 64) == (5, 1, 12)


def test_patterns_keep_their_promises():
    shards = masks.static_blocks((24, 24), 4, "local_stride", heads=6, stride=(2, 3))
    assert shards.any(0).all(), "all heads together see everything"
    reach = masks.static_blocks((64,), 1, "power")[0].double()
    seen = reach
    for _ in range(5):
        seen = seen @ reach
    assert (seen > 0).all(), "after as many layers as a distance has bits everything is seen"
    assert reach.sum(1).max() <= 2 * 6 + 1
    everywhere = masks.grid_offsets((4, 5, 6), stride=(None, 5, 6))
    query, key, value = (normal(1, 4, 5, 6, 1, 4, seed=i) for i in range(3))
    out = block_sparse_attention(query, key, value, mask=everywhere)
    along = [x.permute(0, 2, 3, 4, 1, 5) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*along).permute(0, 4, 1, 2, 3, 5)
    torch.testing.assert_close(out, expected)
    assert masks.vmoba_block((20, 30, 52), 1, temporal=2, spatial=(3, 4), cube=(4, 6, 4)) == (20, 3, 4)
    assert [masks.sparsity_schedule(i, 4) for i in (0, 3)] == [0.0, 0.9]


def test_a_difference_of_logits_keeps_more_as_it_grows():
    query, key = normal(1, 6, 7, 2, 8), normal(1, 6, 7, 2, 8, seed=1)
    counts = [masks.anchor(query, key, difference=x, query_block=2).kv_num.sum().item() for x in (-9.0, 0.0, 2.0, 9.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    shift = normal(1, 1, 1, 2, 8, seed=2)
    same = masks.sale(query, key + shift, threshold=0.05, query_block=2, key_block=2)
    assert torch.equal(same.kv_idx, masks.sale(query, key, threshold=0.05, query_block=2, key_block=2).kv_idx)


def call(name, *args, **options):
    return lambda: getattr(masks, name)(*args, **options)


X, CROSS = torch.zeros(1, 6, 8, 2, 4), torch.zeros(1, 5, 8, 2, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call("vsa", X, X, sparsity=1.5), r"sparsity=1.5 must lie in \[0, 1\]"),
        (call("vsa", X, X[..., :3]), "must agree in B and head_dim"),
        (call("vsa", X, X, block=(2, 0)), r"block=\(2, 0\) must be at least 1"),
        (call("vsa", X, X, block=(2, 2, 2)), "3 values"),
        (call("vsa", X[0, 0], X[0, 0]), "1 to 3 spatial axes"),
        (call("nabla", X, X, mass=2.0, block=2), r"mass=2.0 must lie in \[0, 1\]"),
        (call("nabla", X, CROSS, window=3, block=2), "window=3 needs queries and keys of one grid"),
        (call("nabla_prior", (6, 8), window=0, block=2), "window=0 must be at least 1"),
        (call("bsa", X, X, share=0.0), "share=0.0"),
        (call("sla", X, X, ratio=0.0), "ratio=0.0"),
        (call("sparge", X, X, mass=0.5, topk=0.5), "give one of them"),
        (call("sparge", X, X, causal=True), "causal=True needs one axis"),
        (call("moba", X, X, causal=True), "causal=True needs one axis"),
        (call("moba", X, X, topk=0), "topk=0 must be at least 1"),
        (call("vmoba", X, X, block=2), "give one of them"),
        (call("vmoba", X, X, block=2, topk=2, scope="block"), "scope='block'"),
        (call("vmoba", X, CROSS, block=2, topk=2), "must have the grid of"),
        (call("psa", X, X, X), "flatten the grid"),
        (call("psa", X[:, 0], X[:, 0], X[:, 0], key_block=12), "key_block=12 must be a multiple of 8"),
        (call("psa_levels", torch.ones(1, 1, 2, 4), ends={3: 0.5}), "must map levels 1, 2, 4, 8"),
        (call("flexprefill", X, X, causal=True), "causal=True needs one axis"),
        (call("hip", X, X), "flatten the grid"),
        (call("hip", X[:, 0], X[:, 0], tokens=7), "tokens=7 must be a multiple of key_block=2"),
        (call("longheads", X, X, topk=2), "topk=2 must be at least 3"),
        (call("dma", X, X, bias=torch.zeros(1, 2, 3)), r"bias.shape=\(1, 2, 3\) must be \(1, 2, 48\)"),
        (call("anchor", X, X, query_block=4, key_block=3), r"must divide query_block"),
        (call("sale", X, CROSS), "must have the grid of queries"),
        (call("svg_online", X, CROSS, CROSS), r"of one \(T, tokens\)"),
        (call("content_blocks", X, X, X), "as many tokens and heads"),
        (call("sta", (6, 8), window=(3, 0), tile=2), r"window=\(3, 0\) must be at least 1 tile"),
        (call("radial", (6, 8)), r"shape=\(6, 8\) must be \(T, H, W\)"),
        (call("radial", (6, 2, 2), block=64), "block=64 must be less than three frames"),
        (call("clear", (6, 8), radius=0), "radius=0 must be at least 1"),
        (call("freeswim", (6, 8), half=(1,)), r"half=\(1,\) must be a number of tokens or None for each axis"),
        (call("s2", (6, 8), heads=2, stride=2), "heads=2 must be at least 4"),
        (call("s2", (6, 8), heads=2, stride=0), "stride=0 must be at least 1"),
        (call("s2_causal", (6, 8), heads=2, stride=2, local=1), "must have one axis"),
        (call("power", (6, 8), local=0), "local=0 must be at least 1"),
        (call("moa", (64,), alpha=(1.0, 2.0), beta=(0.1, 0.2, 0.3)), "alpha has 2 heads and beta 3"),
        (call("duo", (6, 8), recent=2, causal=True), "causal=True needs one axis"),
        (call("grid_offsets", (6, 8), stride=(2, 2), offsets=((1,), (0,))), "must hold 0 along each axis"),
        (call("svg", (6, 8), head="other"), "head='other'"),
        (call("static_blocks", (6, 8), 2, "other"), "pattern='other' must be one of"),
        (call("keep", torch.ones(1, 1, 2, 2), rule="best"), "rule='best' must be one of"),
        (call("keep", torch.ones(1, 1, 2, 2), rule="topk"), "rule='topk' needs topk="),
        (call("keep", torch.ones(1, 1, 2, 2), rule="topk", topk=1, mass=0.5), "takes topk=, not mass=0.5"),
        (call("keep", torch.ones(1, 1, 2, 2), rule="topk", topk=1, scope="batch"), "scope='batch' must be one of"),
        (call("block_scores", X, X, query_block=2, key_block=2, estimate="max"), "estimate='max' must be"),
        (call("axis_order", (2, 3), (0, 0)), "must be a permutation"),
        (call("gilbert_order", (5,)), "two or three axes"),
        (call("sparsity_schedule", 4, 4), r"chunk=4 must lie in \[0, 4\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_errors_name_the_argument_and_its_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_queries_of_a_block_share_the_list_of_their_mean(shape):
    query, key = normal(1, *shape, 2, 4), normal(1, *shape, 2, 4, seed=1)
    rank = len(shape)
    scores = masks.block_scores(query, key, query_block=3, key_block=2)
    own = own_blocks(shape, (3,) * rank, (2,) * rank)
    expected = masks.keep(scores.masked_fill(own, torch.inf), rule="topk", topk=3) | own
    for mask in (
        masks.moba(query, key, topk=3, block=2, query_block=3),
        masks.vmoba(query, key, topk=3, block=2, query_block=3),
    ):
        assert torch.equal(kept(mask, scores.shape[-1]), expected)
    near = masks.longheads(query, key, topk=3, block=2, query_block=3)
    assert (kept(near, scores.shape[-1]) | ~own).all() and near.kv_num.min() >= 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clear", {"radius": 3}),
        ("freeswim", {"half": (1, 3)}),
        ("freeswim", {"half": (None, 2)}),
        ("duo", {"recent": (2, 3), "sink": 2}),
        ("grid_offsets", {"stride": (None, 4), "offsets": ((0,), (0, 3))}),
        ("grid_offsets", {"stride": (3, 5), "offsets": ((0, 1), (-1, 0))}),
    ],
)
@pytest.mark.parametrize("block", [(2, 3), (3, 4), (5, 1)])
def test_blocks_are_kept_where_a_query_sees_a_key(name, options, block):
    shape = (7, 11)
    fine = kept(getattr(masks, name)(shape, block=1, **options), 77)[0, 0]
    owner = owners(shape, block)
    expected = torch.zeros(int(owner.max()) + 1, int(owner.max()) + 1, dtype=torch.bool)
    for i, j in fine.nonzero().tolist():
        expected[owner[i], owner[j]] = True
    assert torch.equal(kept(getattr(masks, name)(shape, block=block, **options), len(expected))[0, 0], expected)


def test_streaming_heads_with_order_keep_the_blocks_that_are_seen():
    options = {"recent": 5, "sink": 2, "causal": True, "retrieval": (False, True)}
    fine = kept(masks.duo((23,), block=1, **options), 23)[0]
    place = torch.arange(23)
    past = place <= place[:, None]
    assert torch.equal(fine[0], past & ((place < 2) | (place[:, None] - place < 5))) and torch.equal(fine[1], past)
    expected = torch.zeros(2, 6, 6, dtype=torch.bool)
    for head, i, j in fine.nonzero().tolist():
        expected[head, i // 4, j // 4] = True
    assert torch.equal(kept(masks.duo((23,), block=4, **options), 6)[0], expected)
