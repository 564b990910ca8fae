"""Scored attention: official recordings, neutral parameters, masks by columns, statistics, chunks, gradients."""

from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from foveal.kernels.ops import attention_statistics, explain, scaled_attention, scored_attention
from foveal.kernels.scored import (
    ColumnMask,
    CoPE,
    Filter,
    Landmark,
    LocalLinear,
    MultiToken,
    Parallax,
    Path,
    Selective,
    Signed,
    Softmax,
    Softplus,
    chunked,
    ring_positions,
)
from torch.nn import functional as F

GOLDENS = np.load(FilePath(__file__).parents[1] / "goldens" / "variants.npz")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def recorded(name: str) -> dict[str, torch.Tensor]:
    return {key.split("/")[1]: torch.from_numpy(GOLDENS[key]) for key in GOLDENS if key.startswith(f"{name}/")}


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(tokens: int = 9, heads: int = 2, dim: int = 4) -> list[torch.Tensor]:
    return [double(2, tokens, heads, dim) for _ in range(3)]


def softmax_attention(q, k, v, visible=None):
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def unit(x):
    return F.normalize(x, dim=-1)


def scores(tokens: int, heads: int, dim: int) -> dict:
    """One score of each kind with parameters that matter."""
    identity = torch.zeros(heads, 1, 2, 3, dtype=torch.float64)
    identity[:, :, -1, 1] = 1
    return {
        "softmax": Softmax(),
        "signed": Signed(),
        "softplus": Softplus(),
        "softplus_power": Softplus(power=3.0, offset=0.5, length_scale=True),
        "cope": CoPE(double(dim, 5)),
        "path": Path(unit(double(2, tokens, heads, dim)), 2 * torch.rand(2, tokens, heads, dtype=torch.float64)),
        "selective": Selective(1),
        "multi_token": MultiToken(double(heads, 1, 2, 3), identity, double(1, heads, heads)),
        "landmark": Landmark(3),
        "parallax": Parallax(double(2, tokens, heads, dim)),
        "local_linear": LocalLinear(0.3),
        "filter": Filter(
            -torch.rand(heads, dtype=torch.float64),
            double(heads, dim // 2),
            *(torch.rand(heads, dtype=torch.float64) + 0.1 for _ in range(3)),
        ),
    }


NAMES = list(scores(3, 2, 4))


@pytest.mark.parametrize("gated", [False, True])
def test_path_recorded(gated):
    z = recorded("path")
    found = scored_attention(z["q"], z["k"], z["v"], score=Path(z["w"], z["beta"], z["g"] if gated else None))
    torch.testing.assert_close(found, z["out_gated" if gated else "out"], rtol=0, atol=3e-6)


def test_parallax_recorded():
    z = recorded("parallax")
    masks = {
        "full": None,
        "causal": ColumnMask.causal(24),
        "window5": ColumnMask.band(torch.arange(24), before=4, after=0),
    }
    for name, mask in masks.items():
        found = scored_attention(z["q"], z["k"], z["v"], score=Parallax(z["r"]), mask=mask)
        torch.testing.assert_close(found, z[name], rtol=0, atol=1e-5)
    found = scored_attention(*(z[n].double() for n in "qkv"), score=LocalLinear(0.1))
    torch.testing.assert_close(found, z["lla_ridge01"], rtol=0, atol=1e-6)


def test_cope_recorded():
    z = recorded("cope")
    table, tensors = z["pos_emb"][0], [z[n][:, :, None] for n in "qkv"]
    for name, scaled, mask in (
        ("causal", True, ColumnMask.causal(16)),
        ("full", True, None),
        ("causal_nodiv", False, ColumnMask.causal(16)),
    ):
        found = scored_attention(*tensors, score=CoPE(table, scaled=scaled), mask=mask)[:, :, 0]
        torch.testing.assert_close(found, z[name], rtol=0, atol=1e-13)


def test_multi_token_recorded():
    z = recorded("mta")
    tensors = [z[n].transpose(1, 2) for n in "qkv"]
    for name, score in (
        ("out_pre", MultiToken(z["kernel"])),
        ("out_pre_post", MultiToken(z["kernel"], z["kernel"])),
        ("out_pre_head", MultiToken(z["kernel"], heads=z["head_kernel"])),
    ):
        found = scored_attention(*tensors, score=score, mask=ColumnMask.causal(12)).transpose(1, 2)
        torch.testing.assert_close(found, z[name], rtol=0, atol=1e-13)


def test_landmarks_recorded():
    z = recorded("landmark")
    eye = torch.eye(15, dtype=torch.float64).expand(1, 2, 15, 15).transpose(1, 2)
    query = z["scores"].transpose(1, 2)  # times the identity are the logits, and values of the identity the weights
    found = scored_attention(query, eye, eye, score=Landmark(4), mask=ColumnMask.causal(15), scale=1.0)
    torch.testing.assert_close(found.transpose(1, 2), z["probs"], rtol=0, atol=1e-14)
    everywhere = scored_attention(query, eye, torch.ones_like(eye), score=Landmark(4), scale=1.0)
    torch.testing.assert_close(everywhere, torch.ones_like(everywhere))
    alone = scored_attention(query, eye, eye, score=Landmark(15), scale=1.0).transpose(1, 2)
    torch.testing.assert_close(alone, z["scores"].softmax(-1))  # one section: plain attention


def test_neutral_parameters_are_softmax_attention():
    q, k, v = qkv(9, 2, 4)
    causal, full = torch.ones(9, 9).tril().bool(), None
    kernel = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    kernel[:, :, -1, 1] = 1
    neutral = [
        (CoPE(torch.zeros(4, 5)), full),
        (Path(unit(double(2, 9, 2, 4)), torch.zeros(2, 9, 2)), causal),
        (MultiToken(kernel, kernel, torch.eye(2)[None].double()), full),
        (MultiToken(), full),
        (Parallax(torch.zeros(2, 9, 2, 4)), full),
        (LocalLinear(1e12), full),
    ]
    for score, visible in neutral:
        expected = softmax_attention(q, k, v, visible)
        torch.testing.assert_close(scored_attention(q, k, v, score=score), expected, rtol=1e-9, atol=1e-9)
    # logits at most 0 select nothing
    q[..., 0, :], k[..., 0, :] = -q[..., 0, :].abs(), k[..., 0, :].abs()
    torch.testing.assert_close(scored_attention(q, k, v, score=Selective(0)), softmax_attention(q, k, v, causal))


def test_path_of_a_plane_is_rotation():
    """Two reflections in a plane turn by twice the angle between them: a rotary embedding."""
    tokens, turn = 6, 0.3
    q, k, v = (double(1, 2 * tokens, 1, 2) for _ in range(3))
    angle = torch.arange(2 * tokens, dtype=torch.float64) * turn / 2  # each pair of reflections turns by `turn`
    w = torch.stack([angle.cos(), angle.sin()], -1)[None, :, None]
    found = scored_attention(q, k, v, score=Path(w, torch.full((1, 2 * tokens, 1), 2.0, dtype=torch.float64)))
    reflect = torch.eye(2, dtype=torch.float64) - 2 * w[0, :, 0, :, None] * w[0, :, 0, None]
    logits = torch.full((2 * tokens, 2 * tokens), -torch.inf, dtype=torch.float64)
    for i in range(2 * tokens):
        product = torch.eye(2, dtype=torch.float64)
        for j in range(i, -1, -1):
            logits[i, j] = q[0, i, 0] @ product @ k[0, j, 0] * 2**-0.5
            product = product @ reflect[j]
    torch.testing.assert_close(found[0, :, 0], logits.softmax(-1) @ v[0, :, 0])


def test_selective_by_hand():
    q, k, v = qkv(7, 2, 4)
    s = (q.transpose(1, 2) @ k.transpose(1, 2).mT) / 2
    hidden = torch.zeros(2, 7, 7, dtype=torch.float64)
    for i in range(7):
        for j in range(1, i):
            hidden[:, i, j] = s[:, 1, j + 1 : i, j].relu().sum(-1)
    expected = (s - hidden[:, None]).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    found = scored_attention(q, k, v, score=Selective(1)).transpose(1, 2)
    torch.testing.assert_close(found, expected @ v.transpose(1, 2))


def test_signed_weights_have_unit_absolute_sum():
    q, k, v = qkv()
    s = (q.transpose(1, 2) @ k.transpose(1, 2).mT) / 2
    weights = s.sign() * s.abs().softmax(-1)
    found, lse = scored_attention(q, k, v, score=Signed(), return_lse=True)
    torch.testing.assert_close(found, (weights @ v.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(lse, s.abs().logsumexp(-1).transpose(1, 2))
    constant = scored_attention(q, k, torch.ones_like(v), score=Signed())
    torch.testing.assert_close(constant[..., 0], weights.sum(-1).transpose(1, 2))


def test_softplus_rows_sum_to_one():
    q, k, v = qkv(11)
    for score in (Softplus(), Softplus(power=4.0), Softplus(power=1.0, offset=0.0), Softplus(length_scale=True)):
        found = scored_attention(q, k, torch.ones_like(v), score=score, mask=ColumnMask.causal(11))
        torch.testing.assert_close(found, torch.ones_like(v))
    first, again = (scored_attention(q, k, v, score=s) for s in (Softplus(), Softplus(power=1.0, offset=0.0)))
    torch.testing.assert_close(first, again)


def test_local_linear_is_exact_on_affine_values():
    q, k, _ = qkv(24, 2, 4)
    matrix, shift = double(4, 3), double(3)
    found = scored_attention(q, k, k @ matrix + shift, score=LocalLinear(1e-9))
    torch.testing.assert_close(found, q @ matrix + shift, rtol=1e-6, atol=1e-6)


def test_filter_without_dynamics_is_rotary_softmax():
    q, k, v = qkv(8, 2, 4)
    k = 2 * unit(k)  # equal lengths: the residual differs by the product alone
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    turn = double(2, 2)
    found = scored_attention(q, k, v, score=Filter(zero, turn, zero, zero, 2 * one, freedom=0.5, robust=False))
    at = torch.arange(8).double()

    def rotate(x, sign=1):
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones(1).double(), sign * at[:, None, None] * turn)).flatten(-2)

    s = torch.einsum("bqhd,bkhd->bhqk", rotate(q, -1), rotate(k, -1)) * 2 / (0.5 * 4 * 2)
    mean = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), rotate(v, -1))
    torch.testing.assert_close(found, rotate(mean))


def test_filter_of_fast_decay_forgets():
    q, k, v = qkv(6, 2, 4)
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    gone = Filter(-50 * one, zero[:, None].expand(2, 2), one, zero, 1e-3 * one)
    found = scored_attention(q, q, v, score=gone)
    torch.testing.assert_close(found, v, rtol=0.1, atol=0.1)  # its own observation is the only precise one
    assert scored_attention(q, k, v, score=Filter(zero, zero[:, None].expand(2, 2), one, one, one)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_the_whole(name, monkeypatch):
    score = scores(40, 2, 4)[name]
    tensors = [x.requires_grad_() for x in qkv(40)]
    mask = ColumnMask.causal(40)
    parameters = [x.requires_grad_() for x in vars(score).values() if isinstance(x, torch.Tensor)]
    grad = double(2, 40, 2, 4)
    results = []
    monkeypatch.setattr(chunked, "CHUNK", 1)  # 16 rows at a time
    for impl in ("torch", "reference"):
        out = scored_attention(*tensors, score=score, mask=mask, impl=impl)
        results.append([out, *torch.autograd.grad(out, [*tensors, *parameters], grad)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    score = scores(5, 2, 4)[name]
    names = [n for n, x in vars(score).items() if isinstance(x, torch.Tensor)]
    given = [x.requires_grad_() for x in (*qkv(5), *(getattr(score, n) for n in names))]
    constants = {n: x for n, x in vars(score).items() if n not in names}
    mask = ColumnMask.documents([2, 3])

    def run(q, k, v, *parameters):
        made = type(score)(**dict(zip(names, parameters, strict=True)), **constants)
        return scored_attention(q, k, v, score=made, mask=mask)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_grids_and_grouped_heads(name):
    score = scores(12, 4, 4)[name]
    q, k, v = double(2, 3, 4, 4, 4), double(2, 3, 4, 2, 4), double(2, 3, 4, 2, 4)
    exact = scored_attention(q, k, v, score=score)
    wide = scored_attention(q, *(x.repeat_interleave(2, -2) for x in (k, v)), score=score)
    torch.testing.assert_close(exact, wide)
    half = scored_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), score=score)
    assert half.dtype == torch.bfloat16 and half.shape == q.shape and half.isfinite().all()
    again = scored_attention(*(x.bfloat16().double() for x in (q, k, v)), score=score)
    torch.testing.assert_close(half.double(), again, rtol=2e-2, atol=2e-2)


def test_order_is_a_permutation_of_tokens():
    q, k, v = qkv(10)
    order = torch.randperm(10)
    mask = ColumnMask.documents([4, 6])
    found, lse = scored_attention(q, k, v, score=CoPE(double(4, 6)), order=order, return_lse=True)
    assert found.shape == q.shape and lse.shape == q.shape[:-1]
    plain = [scored_attention(q, k, v, score=Softmax(), mask=mask, order=o) for o in (None, order)]
    torch.testing.assert_close(*plain)
    torch.testing.assert_close(
        scored_attention(q, k, v, score=Selective(), order=order)[:, order],
        scored_attention(q[:, order], k[:, order], v[:, order], score=Selective()),
    )


def test_rows_that_see_nothing():
    q, k, v = (x.requires_grad_() for x in qkv(6))
    nobody = ColumnMask(torch.zeros(1, 1, 6).long(), torch.full((1, 1, 6), 2))
    out, lse = scored_attention(q, k, v, score=Softmax(), mask=nobody, return_lse=True)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == -torch.inf).all() and lse[:, 2:].isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


# masks by columns


def test_rings_recorded():
    assert (ring_positions((24, 24)) == torch.from_numpy(GOLDENS["concentric/pos"])).all()
    assert ring_positions((5, 6, 7)).max() == 2


def dense_cases():
    prefix = torch.zeros(9, 9).bool()
    number = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    rings = ring_positions((3, 4)).flatten()
    frame = torch.arange(5).repeat_interleave(2)
    prefix = (number[:, None] == number) | (number == 0)
    near = (frame[:, None] - frame).abs() <= 1
    text, clip = torch.arange(3).repeat_interleave(2), torch.arange(3).repeat_interleave(torch.tensor([2, 3, 1]))
    is_text, scene = torch.tensor([True] * 6 + [False] * 6), torch.cat([text, clip])
    scenes = (scene[:, None] == scene) | (~is_text[:, None] & ~is_text)
    shuffled = torch.tensor([3, 0, 2, 2, 1])
    return {
        "causal": (ColumnMask.causal(6), torch.ones(6, 6).tril().bool()),
        "ties": (ColumnMask.causal(shuffled), shuffled[:, None] >= shuffled),
        "no ties": (ColumnMask.causal(shuffled, ties=False), shuffled[:, None] > shuffled),
        "documents": (ColumnMask.documents([2, 3, 4]), number[:, None] == number),
        "prefix": (ColumnMask.shared_prefix(2, [3, 4]), prefix),
        "frames": (ColumnMask.frames(5, 2, window=1, key_frames=[0]), near | (frame == 0)),
        "rings": (ColumnMask.concentric((3, 4)), rings[:, None] >= rings),
        "scenes": (ColumnMask.scenes([2, 2, 2], [2, 3, 1]), scenes),
    }


@pytest.mark.parametrize("name", list(dense_cases()))
def test_masks_by_columns(name):
    mask, expected = dense_cases()[name]
    tokens = expected.shape[0]
    assert torch.equal(mask.visible(tokens)[0, 0], expected)
    q, k, v = qkv(tokens)
    if expected.any(-1).all():
        found = scored_attention(q, k, v, score=Softmax(), mask=mask)
        torch.testing.assert_close(found, softmax_attention(q, k, v, expected))
    for block in (2, 3):
        state = mask.tiles(tokens, block, block)[0, 0]
        for i in range(state.shape[0]):
            for j in range(state.shape[1]):
                tile = expected[i * block : (i + 1) * block, j * block : (j + 1) * block]
                assert state[i, j] != 0 or not tile.any(), "a tile with visible pairs was skipped"
                assert state[i, j] != 2 or tile.all(), "a tile with masked pairs was taken for whole"


def test_tiles_of_a_causal_mask():
    state = ColumnMask.causal(64).tiles(64, 16, 16)[0, 0]
    assert torch.equal(state, torch.eye(4).to(torch.int8) + 2 * torch.ones(4, 4).tril(-1).to(torch.int8))


def test_text_after_rings_sees_the_image():
    visible = ColumnMask.concentric((4, 4), text=3).visible(19)[0, 0]
    assert (
        visible[16:, :16].all()
        and not visible[:16, 16:].any()
        and torch.equal(visible[16:, 16:], visible[16:, 16:].tril())
    )


# weights after the softmax


def test_scaled_keys_and_forbidden_pairs():
    q, k, v = qkv(7)
    p = ((q.transpose(1, 2) @ k.transpose(1, 2).mT) / 2).softmax(-1)
    m, a = torch.rand(2, 1, 7, dtype=torch.float64), torch.rand(1, 2, 7, 7) > 0.4
    for key_scale, allowed in ((m, None), (None, a), (m, a), (m, ColumnMask.causal(7)), (None, None)):
        weights = p if key_scale is None else p * m[:, :, None]
        if allowed is not None:
            weights = weights * (allowed if isinstance(allowed, torch.Tensor) else allowed.visible(7))
        for renormalize in (False, True):
            expected = weights / weights.sum(-1, keepdim=True) if renormalize else weights
            found = scaled_attention(q, k, v, key_scale=key_scale, allowed=allowed, renormalize=renormalize)
            torch.testing.assert_close(found.transpose(1, 2), expected @ v.transpose(1, 2))
    given = [x.requires_grad_() for x in (*qkv(4), torch.rand(2, 1, 4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(
        lambda q, k, v, m: scaled_attention(q, k, v, key_scale=m, allowed=a[:, :, :4, :4], renormalize=False), given
    )


def test_mask_after_the_softmax_is_the_causal_result_times_its_mass():
    """The weights of iLLaMA's causal attention: exp(lse causal - lse full) remains of each row."""
    q, k, v = qkv(8)
    causal, of_causal = scored_attention(q, k, v, score=Softmax(), mask=ColumnMask.causal(8), return_lse=True)
    _, of_all = scored_attention(q, k, v, score=Softmax(), return_lse=True)
    found = scaled_attention(q, k, v, allowed=ColumnMask.causal(8), renormalize=False)
    torch.testing.assert_close(found, causal * (of_causal - of_all).exp()[..., None])


def test_chunks_of_forbidden_pairs(monkeypatch):
    q, k, v = (x.requires_grad_() for x in qkv(40))
    run = lambda: scaled_attention(q, k, v, allowed=ColumnMask.causal(40))  # noqa: E731
    whole = run()
    expected = torch.autograd.grad(whole.sum(), (q, k, v))
    monkeypatch.setattr("foveal.kernels.scored.scaled.chunk_rows", lambda *_: 16)
    found = run()
    torch.testing.assert_close(found, whole)
    for x, y in zip(torch.autograd.grad(found.sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(x, y)


# statistics


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_statistics(chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    q, k, v = (double(2, 5, 6, 2, 4) * 2 for _ in range(3))
    p = ((q.flatten(1, 2).transpose(1, 2) @ k.flatten(1, 2).transpose(1, 2).mT) / 2).softmax(-1)
    first = torch.zeros(30).bool()
    first[0] = True
    found = attention_statistics(q, k, v, topk=3, window=(3, 3), sets={"sink": first, "past": ColumnMask.causal(30)})
    rows, columns = torch.arange(30) // 6, torch.arange(30) % 6
    near = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    top = p.topk(3, -1)
    flat = v.flatten(1, 2).transpose(1, 2)
    rest = p.scatter(-1, top.indices, 0) @ flat
    expected = {
        "entropy": -(p * p.log()).sum(-1),
        "largest": p.amax(-1),
        "squares": (p**2).sum(-1),
        "top": top.values.sum(-1),
        "distance": rest.norm(dim=-1) / (p @ flat).norm(dim=-1),
        "sink": p[..., 0],
        "past": p.tril().sum(-1),
        "window": (p * near).sum(-1),
    }
    for name, x in expected.items():
        got = found.mass[name] if name in found.mass else getattr(found, name)
        torch.testing.assert_close(got, x.transpose(1, 2).reshape(2, 5, 6, 2))
    assert found.summary()["mass_window"] == pytest.approx(expected["window"].mean().item())


def test_facts_of_attention():
    """Bounds of softmax attention: logits in [-a, a] make weights of at most e^2a / (n - 1 + e^2a)."""
    q, k = unit(double(1, 200, 1, 4)), unit(double(1, 200, 1, 4))
    found = attention_statistics(q, k, scale=1.0)
    assert found.largest.max() <= np.exp(2) / (199 + np.exp(2))
    uniform = attention_statistics(0 * q, k)
    torch.testing.assert_close(uniform.entropy, torch.full_like(uniform.entropy, np.log(200)))


def test_explain_says_what_a_score_costs():
    q = torch.empty(1, 4096, 8, 64, device="meta")
    for score, fusibility in ((Softmax(), "F1"), (MultiToken(torch.zeros(8, 1, 2, 3)), "F4")):
        found = explain("scored_attention", q, q, q, score=score)
        assert found.impl == "torch" and found.cost["fusibility"].startswith(fusibility)
        assert "triton" in found.reasons and found.reasons["triton"] is not None
    whole = 8 * 4096**2 * 4
    assert found.cost["logits_held_bytes"] == whole
    assert explain("scored_attention", q, q, q, score=Softmax()).cost["logits_held_bytes"] < whole / 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": CoPE(torch.zeros(3, 5))}, "score.table"),
        ({"score": Parallax(torch.zeros(1, 9, 2, 4))}, "score.r"),
        ({"score": Selective(2)}, "score.head"),
        ({"score": LocalLinear(0.0)}, "score.ridge"),
        ({"score": MultiToken(torch.zeros(2, 1, 2, 2))}, "score.kernel"),
        ({"score": Softplus(power=-1)}, "score.power"),
        ({"score": Path(torch.zeros(2, 9, 2, 4), torch.zeros(2, 9, 3))}, "score.beta"),
        ({"score": Softplus(), "return_lse": True}, "no log-sum-exp"),
        ({"score": Softmax(), "mask": ColumnMask.causal(8)}, "mask"),
        ({"score": Softmax(), "order": torch.arange(8)}, "order"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        scored_attention(*qkv(9), **options)


def test_wrong_masks():
    with pytest.raises(TypeError, match="start"):
        ColumnMask(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="start2 and end2"):
        ColumnMask(*(torch.zeros(1, 1, 4).long() for _ in range(3)))
    with pytest.raises(ValueError, match="key_frames"):
        ColumnMask.frames(3, 2, window=1, key_frames=[3])


def test_a_score_is_traced():
    q, k, v = (x.float() for x in qkv(12))
    score = Parallax(torch.randn(2, 12, 2, 4))
    compiled = torch.compile(lambda q, k, v: scored_attention(q, k, v, score=score), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), scored_attention(q, k, v, score=score))
