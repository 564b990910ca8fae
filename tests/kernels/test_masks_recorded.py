"""Masks against selections recorded from the official code: exactly the same blocks.

`goldens/masks.json` describes the cases. A case without an array in `masks.npz` is held to its density or digest.
"""

import hashlib
import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels import masks
from foveal.kernels.block_sparse.call import RoundedCall, make_call
from foveal.kernels.block_sparse.rounded import to_int8
from foveal.kernels.masks.blocks import block_tokens, cut_into_blocks, own_blocks
from foveal.kernels.masks.psa import psa_importance, psa_levels
from foveal.kernels.masks.select import pair_scores
from foveal.kernels.ops import BlockMask, block_sparse_attention, merge_attentions, na1d
from mask_lists import kept

GOLDENS = Path(__file__).parents[1] / "goldens"
SIZES = "variable_block_sizes"
CASES = json.loads((GOLDENS / "masks.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDENS / "masks.npz") as file:
        return dict(file)


def bits(packed, shape) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed)[: prod(shape)].reshape(shape).astype(bool))


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32) * np.float32(scale))


def holds(arrays, key: str, selected: torch.Tensor, case: dict, shape="shape") -> None:
    """The recorded array, or the recorded density."""
    if key in arrays:
        assert torch.equal(selected, bits(arrays[key], case[shape]))
    assert abs(selected.double().mean().item() - case["density"]) < 1e-6


def named(group: str, name: str = "name", field: str = "cases"):
    return pytest.mark.parametrize("case", CASES[group][field], ids=lambda case: case[name])


@named("radial")
def test_radial(case):
    shape = case["num_frames"], 1, case["tokens_per_frame"]
    options = {"block": case["block_size"], "decay": case["decay_factor"], "text": case["text_tokens"]}
    mask = masks.radial(shape, first_frame=case["model_type"] == "wan", **options)
    selected = kept(mask, case["block_mask_shape"][0])[0, 0]
    columns = selected.nonzero()[:, 1].numpy()
    digests = [hashlib.sha256(columns.astype(kind).tobytes()).hexdigest() for kind in ("int32", "int64")]
    assert len(columns) == case["nnz"] and case["indices_sha256"] in digests


@named("clear")
def test_clear(case, arrays):
    args = case["args"]
    text, image = args["text_length"], args["height"] * args["width"]
    mask = masks.clear((args["height"], args["width"]), radius=args["window_size"], block=1)
    selected = torch.ones(case["shape"], dtype=torch.bool)
    selected[text:, text : text + image] = kept(mask, image)[0, 0]
    selected[:text, text + image :] = False  # text does not see pooled keys
    holds(arrays, f"clear/{case['name']}", selected, case)


@named("sta")
def test_sta(case, arrays):
    counts = [n // t for n, t in zip(case["canvas"], case["tile"], strict=True)]
    tokens, video = prod(case["tile"]), prod(case["canvas"])
    mask = masks.sta(case["canvas"], window=case["kernel"], tile=case["tile"])
    tiles = kept(mask, prod(counts))[0, 0]
    selected = torch.zeros(case["shape"], dtype=torch.bool)
    selected[:video, :video] = tiles.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    selected[:video, video : video + case["text_length"]] = True
    selected[video:, : video + case["text_length"]] = True
    holds(arrays, f"sta/{case['name']}", selected, case)


@named("freeswim")
def test_freeswim(case, arrays):
    args = case["args"]
    shape = args["num_frames"], args["height"], args["width"]
    mask = masks.freeswim(shape, half=(None, args["d_h"], args["d_w"]), block=1)
    assert mask.kv_num.min() == case["kv_per_query_min"] and mask.kv_num.max() == case["kv_per_query_max"]
    holds(arrays, f"freeswim/{case['name']}", kept(mask, prod(shape))[0, 0], case)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("duo", lambda: masks.duo((32,), recent=8, sink=4, causal=True, block=1)),
        ("s2_causal", lambda: masks.s2_causal((1024,), heads=4, stride=4, local=3)),
        (
            "s2_causal_kv2_dense1",
            lambda: masks.s2_causal((1024,), heads=4, key_heads=2, dense_heads=1, stride=5, local=2),
        ),
        ("s2_stride8_heads4", lambda: masks.s2_causal((1024,), heads=4, stride=8, local=2)),
        ("s2_bidir", lambda: masks.s2_relative((1024,), stride=4, local=3)),
        ("moa_a256_b0_n16", lambda: masks.moa((1024,), alpha=256, causal=True)),
        ("moa_a128_b025_n16", lambda: masks.moa((1024,), alpha=128, beta=0.25, causal=True)),
        ("moa_a128_b025_n32", lambda: masks.moa((2048,), alpha=128, beta=0.25, causal=True)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_static_masks_of_blocks(name, mask, arrays):
    shape = CASES["variants"][name]
    assert torch.equal(kept(mask(), shape[-1])[0].view(shape), bits(arrays[f"variants/{name}"], shape))


@named("nabla")
def test_nabla(case):
    blocks = case["grid_blocks"]

    def patches(j: int) -> torch.Tensor:  # the official order is patch by patch
        x = normal(case["seed"] * 10 + j, 1, case["seq"], case["heads"], case["dim"], scale=case["scale"])
        x = x.view(1, *blocks, 8, 8, case["heads"], case["dim"]).transpose(3, 4)
        return x.reshape(1, blocks[0], blocks[1] * 8, blocks[2] * 8, case["heads"], case["dim"])

    query, key = patches(0), patches(1)
    mask = masks.nabla(query, key, mass=case["thr"], window=case["window"], own=False)
    prior = masks.nabla_prior(query.shape[1:4], window=case["window"])
    for found, density in ((mask, case["density"]), (prior, case["sta_density"])):
        assert abs(kept(found, prod(blocks)).double().mean() - density) < 1e-6


def spread_blocks(seed: int, heads: int, tokens: int, dim: int, amplitude: float) -> list[torch.Tensor]:
    """Queries and keys around a centre per 64 tokens, keys shifted by one such block; a quarter of blocks is noise."""
    random, blocks = np.random.RandomState(seed), -(-tokens // 64)
    centres = random.standard_normal((1, heads, blocks, dim))
    noise = np.where(random.rand(1, heads, blocks) < 0.25, 3.0, 0.5)
    noise = np.repeat(noise, 64, axis=2)[:, :, :tokens, None]
    tensors = []
    for shift in (0, 1):
        middle = np.repeat(np.roll(centres, shift, axis=2), 64, axis=2)[:, :, :tokens]
        x = amplitude * middle + noise * random.standard_normal((1, heads, tokens, dim))
        tensors.append(torch.from_numpy(x.astype(np.float32)).transpose(1, 2))
    return tensors


@named("sparge")
def test_sparge(case, arrays):
    query, key = spread_blocks(case["seed"], case["H"], case["L"], case["D"], case["amp"])
    given = case["kwargs"]
    options = {"mass": given["cdfthreshd"], "topk": given.get("topk"), "sink": given.get("attention_sink", False)}
    options |= {"similarity": given["simthreshd1"], "causal": given.get("is_causal", False)}
    mask = masks.sparge(query.half(), key.half(), own=False, **options)
    holds(arrays, f"sparge/{case['name']}/map", kept(mask, case["map_shape"][-1]), case, "map_shape")


def test_the_integers_of_sparge():
    """`get_vanilla_qk_quant`: 8 bits in blocks of 128 queries and 64 keys, keys less their mean."""
    query, key = (x.half() for x in spread_blocks(503, 2, 768, 64, 1.0))
    one = torch.ones(1, 1, 6, dtype=torch.int32)
    mask = BlockMask((128,), (64,), one, torch.zeros(1, 1, 6, 1, dtype=torch.int32))
    call = make_call(query, key, key, mask=mask, qk_dtype=torch.int8)
    assert isinstance(call, RoundedCall)
    found = to_int8(query, key, call)
    with np.load(GOLDENS / "int8.npz") as recorded:
        for name in ("query", "key"):
            off = getattr(found, name)[0, :64].transpose(0, 1).int() - torch.from_numpy(recorded[name]).int()
            share = 0.0 if name == "query" else 0.02  # the official code rounds keys less their mean to half precision
            assert off.abs().max() <= 1 and (off != 0).float().mean() <= share, name
            scale = torch.from_numpy(recorded[f"{name}_scale"])
            torch.testing.assert_close(getattr(found, f"{name}_scale")[0], scale, rtol=1e-3, atol=0)


def test_vsa(arrays):
    means = [torch.from_numpy(arrays[f"vsa_select/{x}_mean"]).transpose(1, 2) for x in "qk"]
    selected = masks.keep(pair_scores(*means, scale=0.125), rule="topk", topk=3)
    assert torch.equal(selected, bits(arrays["vsa_select/mask"], (1, 2, 6, 6)))


@pytest.mark.parametrize(("shape", "block"), [((21, 30, 52), (4, 4, 4)), ((3, 10, 12), (4, 8, 8))], ids=str)
def test_cubes(shape, block, arrays):
    name = "vsa_tiles/" + "_t".join("x".join(map(str, x)) for x in (shape, block))
    number = torch.arange(prod(shape)).view(1, *shape, 1, 1)
    tokens, exists = cut_into_blocks(number, block)
    recorded = {x: torch.from_numpy(arrays[f"{name}/{x}"].astype(np.int64)) for x in ("tile_partition_indices", SIZES)}
    assert torch.equal(tokens[0, exists, 0, 0], recorded["tile_partition_indices"])
    assert torch.equal(exists.sum(1), recorded[SIZES]) and torch.equal(block_tokens(shape, block), recorded[SIZES])


def test_bsa():
    query, key = (normal(530 + i, 1, 2, 6, 16, 16, scale=1.5).permute(0, 2, 3, 1, 4).flatten(1, 2) for i in range(2))
    mask = masks.bsa(query, key, mass=0.7, least=2, block=16, own=False)
    assert abs(kept(mask, 6).double().mean() - CASES["bsa"]["density"]) < 1e-6


def wave(seed: int, heads: int, tokens: int, dim: int, amplitude: float) -> list[torch.Tensor]:
    """Queries along a random walk with a step per 32 tokens, keys along the same walk backwards."""
    random, steps = np.random.RandomState(seed), -(-tokens // 32)
    walk = np.cumsum(random.standard_normal((1, heads, steps, dim)), axis=2) / np.sqrt(steps)
    walk = np.repeat(walk, 32, axis=2)
    tensors = [amplitude * x + 0.3 * random.standard_normal(walk.shape) for x in (walk, walk[:, :, ::-1])]
    return [torch.from_numpy(x[:, :, :tokens].astype(np.float32)).transpose(1, 2) for x in tensors]


@named("psa", field="importance")
def test_psa_importance(case, arrays):
    query, key = wave(case["seed"], case["H"], case["L"], case["D"], case["amp"])
    random = np.random.RandomState(case["rand_seed"])
    draws = [torch.from_numpy(random.rand(*shape).astype(np.float32)) for shape in case["rand_shapes"]]
    places = [x.topk(x.shape[-1] // 4, dim=-1).indices[:, :, 0] for x in draws]
    blocks = {"query_block": case["block_m"], "key_block": case["block_n"]}
    found = psa_importance(query, key, query_places=places[0], key_places=places[1], **blocks)
    assert found.unique().numel() == case["distinct_values"]
    if (key := f"psa/importance/{case['name']}/score") in arrays:
        torch.testing.assert_close(found, torch.from_numpy(arrays[key]), atol=1e-6, rtol=0)


@named("psa", name="key", field="select")
def test_psa_levels(case, arrays):
    importance = torch.from_numpy(arrays["psa/select/s0/attn"])
    ends = {int(level): share[1] for level, share in case["mask_ratios"].items() if level != "0"}
    text = -(-case["text_length"] // case["blocksize"])
    always = torch.arange(importance.shape[-1]) >= importance.shape[-1] - text
    rule = "topk" if case["mode"].startswith("topk") else "mass"
    blocks = {"block": case["blocksize"], "tile": case["compute_tile"]}
    levels = psa_levels(importance, ends=ends, rule=rule, always=always, **blocks)
    recorded = torch.from_numpy(arrays["psa/" + case["key"]]).long()
    if case["mode"].endswith("newtype"):  # numbers of blocks, level after level, -1 between them
        lists, recorded = recorded, torch.zeros_like(levels)
        for place in np.ndindex(*lists.shape[:3]):
            level = iter((1, 2, 4, 8, 0, 0))
            now = next(level)
            for number in lists[place].tolist():
                if number == -1:
                    now = next(level)
                elif now:
                    recorded[place][number] = now
    assert torch.equal(levels, recorded)


@named("moba")
def test_moba(case, arrays):
    size, outputs = case["chunk"], []
    tensors = [normal(case["seed"] * 10 + j, sum(case["lens"]), case["heads"], case["dim"]) for j in range(3)]
    for sample in zip(*(x.split(case["lens"]) for x in tensors), strict=True):
        tokens = sample[0].shape[0]
        x = [torch.nn.functional.pad(t, [0, 0, 0, 0, 0, -tokens % size])[None] for t in sample]
        mask = masks.moba(x[0], x[1], topk=case["topk"], block=size, causal=True)
        own, own_lse = na1d(*x, window=size, stride=size, causal=True, return_lse=True)
        far, far_lse = block_sparse_attention(*x, mask=mask, return_lse=True)
        outputs.append(merge_attentions([own, far], [own_lse, far_lse])[0][0, :tokens])
    torch.testing.assert_close(
        torch.cat(outputs), torch.from_numpy(arrays[f"moba/{case['name']}/out"]), atol=2e-6, rtol=0
    )


@named("vmoba", name="key")
def test_vmoba(case, arrays):
    given = next(x for x in CASES["vmoba"]["inputs"] if x["id"] == case["input"])
    grid, flat = tuple(given["grid"]), case["partition"].startswith("1d")
    shape = (given["batch"], *((prod(grid),) if flat else grid), given["heads"], given["dim"])
    query, key = (normal(given["seed"] * 10 + j, *shape, scale=given["scale"]) for j in range(2))
    block = (case["moba_chunk_size"],) if flat else tuple(case["chunk_size"])
    block = (grid[0], *block) if len(block) == 2 else block
    rule = {"topk": case["topk"]} if case["select_mode"] == "topk" else {"threshold": case["threshold"]}
    mask = masks.vmoba(query, key, block=block, scope=case["threshold_type"], **rule)
    selected = kept(mask, case["num_chunks"] // given["batch"]) & ~own_blocks(shape[1:-2], (1,) * len(block), block)
    share = selected.double().mean() / given["batch"]  # the official chunks are those of all entries
    assert abs(share - case["selected_fraction_excl_self"]) < 1e-7
    if (name := f"vmoba/{case['key']}/gate_mask") in arrays:
        number = torch.arange(prod(shape[1:-2])).view(1, *shape[1:-2], 1, 1)
        order = cut_into_blocks(number, block)[0].flatten() if not flat else number.flatten()
        assert torch.equal(selected[0].permute(2, 0, 1)[:, :, order], bits(arrays[name], case["gate_mask_shape"]))


@pytest.mark.parametrize("mass", [0.5, 0.9])
@pytest.mark.parametrize("distance", [0.0, 0.1, 2.0])
def test_flexprefill(distance, mass, arrays):
    query, key = (torch.from_numpy(arrays[f"flexprefill/{x}"]) for x in "qk")
    mask = masks.flexprefill(query, key, mass=mass, distance=distance, causal=True, block=16, own=False)
    name = f"mask_tau{distance}_gamma{mass}"
    assert torch.equal(kept(mask, 16)[0], bits(arrays[f"flexprefill/{name}"], CASES["flexprefill"][name]))


@pytest.mark.parametrize("shape", [(4, 6, 8), (13, 30, 45)], ids=str)
def test_gilbert_order(shape, arrays):
    name = "x".join(map(str, reversed(shape)))
    assert torch.equal(masks.gilbert_order(shape), torch.from_numpy(arrays[f"gilbert/{name}"].astype(np.int64)))


def test_hashed_blocks(arrays):
    query, key, value = (torch.from_numpy(arrays[f"hyper/{x}"]).transpose(1, 2) for x in "qkv")
    directions = torch.from_numpy(arrays["hyper/proj_dir"])[0, 0]
    *_, of_query, of_key = masks.content_order(query, key, kind="lsh", directions=directions)
    for found, name in ((of_query, "hash_q"), (of_key, "hash_k")):
        assert torch.equal(found, torch.from_numpy(arrays[f"hyper/{name}"]))
    mask, *laid, back = masks.content_blocks(query, key, value, block=16, kind="lsh", directions=directions)
    out, lse = block_sparse_attention(*laid, mask=mask, return_lse=True)
    for found, name in ((out, "out"), (lse[..., None], "lse")):
        recorded = torch.from_numpy(arrays[f"hyper/{name}"])
        torch.testing.assert_close(masks.lay_out(found, back).transpose(1, 2), recorded, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "smooth"), [("top12", None), ("top12_block8", 8)])
def test_dynamic_mask_of_keys(name, smooth, arrays):
    bias = torch.from_numpy(arrays["dma/bias"])[:, :, 0]
    tokens = torch.zeros(2, 40, 2, 4)
    mask = masks.dma(tokens, tokens, bias=bias, window=12, smooth=smooth)
    assert torch.equal(kept(mask, 40), bits(arrays[f"dma/{name}"], CASES["dma"][name]))


@pytest.mark.parametrize("options", [(64, 16, 2, 16), (32, 32, 1, 0)], ids=["a", "b"])
def test_hip(options, arrays, request):
    name = request.node.callspec.id
    query, key = (torch.from_numpy(arrays[f"hip/{x}"])[:, :, None] for x in "qk")
    named = dict(zip(("tokens", "query_block", "key_block", "window"), options, strict=True))
    mask = masks.hip(query, key, causal=True, **named)
    assert torch.equal(mask.kv_num[0], torch.from_numpy(arrays[f"hip/{name}_count"]))
    assert torch.equal(mask.kv_idx[0] * options[2], torch.from_numpy(arrays[f"hip/{name}_indices"]))
