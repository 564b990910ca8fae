"""Recorded functions of the authors' code, by edits and recipes."""

from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from foveal.zoo.control import edits, recipes
from foveal.zoo.control.control import attend_edited
from foveal.zoo.control.edit import Context
from foveal.zoo.control.edits.motion_energy import energy
from foveal.zoo.control.latents import Step, virtual_step
from foveal.zoo.control.recipes.attencraft import classes
from foveal.zoo.control.recipes.creatidesign import rules_of
from foveal.zoo.control.recipes.ditctrl import reweighted, split_by_words
from foveal.zoo.control.recipes.motionclr import shift
from foveal.zoo.control.recipes.rag import cells
from foveal.zoo.control.recipes.seg2any import BASE, HARD
from foveal.zoo.control.recipes.videograin import fade
from foveal.zoo.control.recipes.vimaedit import masks, refined_map
from foveal.zoo.control.rows import Rows
from foveal.zoo.control.terms import apply_right
from foveal.zoo.control.words import cross_times, refinement_map, replacement_map, word_tokens
from foveal.zoo.sites import Call, Layout, Moment, Operation, Site
from foveal.zoo.token_merging import Matching, random_destinations
from stub_tokenizer import PIECES, StubTokenizer
from torch.nn.functional import layer_norm, linear

GOLDENS = Path(__file__).parents[1] / "goldens" / "control"
STREAMS = {"text": ("text",), "image": ("image",), "dual": ("text", "image"), "sd3": ("image", "text")}


def golden(name):
    return {key: torch.from_numpy(x) for key, x in np.load(GOLDENS / f"{name}.npz").items()}


def weights(g, prefix="w."):
    return {key.removeprefix(prefix): x for key, x in g.items() if key.startswith(prefix)}


def project(w, name, x, heads):
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")).unflatten(-1, (heads, -1))


def operation(q, k, v, *, queries, keys, grid, counts=None, level=0):
    """An operation and the context of a plan."""
    site = Site("golden", 0, "joint", q.shape[2], q.shape[3], (Operation(queries, keys),), level=level)
    layout = Layout(tuple(grid), counts or {})
    return Call(site, 0, q, k, v), (site, layout)


def edited(found, call, context, *, branches=(), guidance=None, words=None, moment=None):
    site, layout = context
    batch = call.query.shape[0]
    rows = Rows(batch, branches, guidance)
    made = Context(site, layout, moment or Moment(0, 10, 0.5), rows, words or {})
    plans = [(edit, plan) for edit in found if (plan := edit.plan(made)) is not None]
    return attend_edited(call, batch, plans, lambda call: call.dense())


def close(x, y, tolerance=1e-12):
    error, scale = float((x - y).abs().max()), max(float(y.abs().max()), 1)
    assert error <= tolerance * scale, f"{error} of {scale}"


REPLACE = [
    ("a photo of a cat on the grass", "a photo of a dog on the grass"),
    ("a cat riding a bike", "a tiger riding a bike"),
    ("a tiger riding a bike", "a cat riding a bike"),
    ("a tiger on the grass", "a leopard on the grass"),
    ("a cat on the grass", "a tiger on a bike"),
]
REFINE = [
    ("a cat riding a bike", "a silver cat riding a bike"),
    ("a cat on the grass", "a photo of a red robot cat on the grass"),
    ("a photo of a tiger on the grass", "a photo of a tiger"),
    ("a cat on the grass", "a dog on the bike"),
]


def test_alignments_of_prompt_to_prompt():
    g, stub = golden("unet_p2p_mappers"), StubTokenizer()
    for number, pair in enumerate(REPLACE):
        assert torch.equal(replacement_map(stub, *pair, align="official", length=24), g[f"replace_{number}"])
    for number, pair in enumerate(REFINE):
        mapper, alpha = refinement_map(stub, *pair, length=24)
        assert torch.equal(mapper, g[f"refine_{number}_mapper"]) and torch.equal(alpha, g[f"refine_{number}_alpha"])
    for name, times in {"0p8": 0.8, "word": {"default_": 1.0, "tiger": (0.2, 0.4)}}.items():
        table = cross_times(stub, REPLACE[1], 10, times, length=24)
        assert torch.equal(table.flatten(), g[f"alpha_{name}_10"].flatten())
    assert list(word_tokens(stub, REPLACE[1][1], "tiger")) == g["word_inds_tiger"].tolist()


@pytest.mark.parametrize("pair", REPLACE)
def test_words_align_after_a_swap_of_unequal_words(pair):
    """A swapped word's columns sum to p/q; all others are one-hot at the same word, end to end, padding to padding."""
    stub = StubTokenizer()
    matrix = replacement_map(stub, *pair, length=24)
    owner = [[n for n, word in enumerate(p.split()) for _ in PIECES.get(word, [word])] for p in pair]
    ends, ids = [len(x) + 1 for x in owner], [stub.encode(p) for p in pair]
    assert matrix[ends[0], ends[1]] == 1 and matrix[0, 0] == 1
    swapped = [a != b for a, b in zip(pair[0].split(), pair[1].split(), strict=True)]
    for column in range(1, ends[1]):
        word = owner[1][column - 1]
        p, q = owner[0].count(word), owner[1].count(word)
        if swapped[word]:
            assert abs(matrix[:, column].sum() - p / q) < 1e-6
        else:
            assert matrix[:, column].sum() == 1
            assert ids[0][matrix[:, column].argmax()] == ids[1][column]
    assert (matrix[:, ends[1] :].sum(0) == 1).all() and (matrix[:, ends[1] + 1 :].argmax(0) > ends[0]).all()


def test_edits_of_prompt_to_prompt_on_the_values():
    g, m = golden("unet_p2p_edits"), golden("unet_p2p_mappers")
    source, target, value = g["source"], g["target"][0], g["value"]
    changed = apply_right(m["replace_1"], value.transpose(0, 1)[None])[0].transpose(0, 1)  # [heads, tokens, d]
    close(source @ changed, g["out_replace"][0], 1e-6)
    right = edits.gather_map(m["refine_1_mapper"])
    factor, keep = edits.alignment(right, m["refine_1_alpha"], torch.ones(11, 24))
    refined = source @ factor(0) + target * keep(0)
    close(refined, g["refine"][0], 1e-6)
    close(refined * g["equalizer"], g["reweight_of_refine"][0, 0], 1e-6)


def test_local_blend():
    g = golden("unet_p2p_local_blend")
    maps = g["maps"].float()  # [prompt, frame, layer, head, 16, 16, token]
    chosen = torch.stack([maps[0, ..., 0], maps[1].sum(-1)])  # source {2}, target {2, 3}
    out = g["x"].clone()
    for frame in range(maps.shape[1]):
        mask = edits.blend_masks(chosen[:, frame].mean((1, 2)), (32, 32), threshold=0.3)
        out[:, :, frame] = edits.blend(g["x"][:, :, frame], g["x"][:1, :, frame], mask[:, None])
    close(out, g["out"], 1e-6)


def test_key_means():
    g = golden("dit_grag")
    w = weights(g)
    image, text = g["hidden_states"], g["encoder_hidden_states"]

    def heads(name, norm, x):
        out = project(w, name, x, 2)
        if norm is None:
            return out
        variance = out.float().square().mean(-1, keepdim=True)  # diffusers' RMSNorm computes it in float32
        return out * torch.rsqrt(variance + 1e-6) * w[norm + ".weight"]

    q = torch.cat([heads("add_q_proj", "norm_added_q", text), heads("to_q", "norm_q", image)], 1)
    k = torch.cat([heads("add_k_proj", "norm_added_k", text), heads("to_k", "norm_k", image)], 1)
    v = torch.cat([heads("add_v_proj", None, text), heads("to_v", None, image)], 1)
    for case in range(4):
        words, *text_scale, last, scale, delta = g[f"case{case}.scale"].tolist()
        streams = ("text", "padding", "image", "reference") if words < 5 else ("text", "image", "reference")
        counts = {"reference": int(last), "padding": 5 - int(words)}
        call, context = operation(q, k, v, queries=streams, keys=streams, grid=(1, 12 - int(last)), counts=counts)
        made = Context(*context, Moment(), Rows(1), {})
        for edit in recipes.grag(scale=scale, delta=delta, text=tuple(text_scale)):
            if (plan := edit.plan(made)) is not None:
                call = edit.qkv(call, plan)
        close(call.key, g[f"case{case}.key"])
        out = call.dense().flatten(2)
        close(linear(out[:, 5:], w["to_out.0.weight"], w["to_out.0.bias"]), g[f"case{case}.image"])


def close_masks(mine, theirs):
    theirs = theirs.double()
    hidden = theirs < -1e3
    assert torch.equal(mine == -inf, hidden)
    close(mine.masked_fill(hidden, 0), theirs.masked_fill(hidden, 0), 1e-6)


def test_masks_of_seg2any():
    g = golden("dit_seg2any")
    streams = ["text"] * 4 + ["entity"] * 7 + ["padding"] + ["image"] * 16 + ["reference"] * 3 + ["padding"] * 2
    same = torch.tensor([0] * 4 + [1, 1, 2, 2, 2, 3, 3] + [4] + [0] * 19 + [5, 5])
    regions = torch.zeros(33, 3)
    regions[4:11] = torch.eye(3).repeat_interleave(torch.tensor([2, 3, 2]), 0)

    def mask(rules, mode, **options):
        regions[12:28] = torch.nn.functional.interpolate(g["labels"][None], size=(4, 4), mode=mode)[0].flatten(1).T
        members = edits.Members(streams, regions, same)
        return edits.relate(members, members, rules, **options).dense()

    weight = {("image", "reference"): 0.8, ("reference", "image"): 0.8}
    close_masks(mask(BASE, "nearest-exact", weights=weight), g["base"])
    close_masks(mask(BASE, "nearest-exact"), g["hard"])
    close_masks(mask(HARD, "nearest-exact"), g["hard.hard"])
    close_masks(mask(BASE, "area", fractional=True), g["place"])


def test_masks_of_creatidesign():
    g = golden("dit_creatidesign")
    streams = ["object"] * 6 + ["text"] * 5 + ["image"] * 16 + ["subject"] * 4
    same = torch.tensor([0] * 3 + [1] * 3 + [0] * 25)
    regions = torch.zeros(31, 3)
    regions[:6, :2] = torch.eye(2).repeat_interleave(3, 0)

    def small(masks, size):
        return torch.nn.functional.interpolate(masks, size=size, mode="nearest-exact")[0].flatten(1).T

    regions[11:27, :2] = small(g["objects_masks_maps"], (4, 4))
    regions[11:27, 2:] = small(g["subject_masks_maps"], (4, 4))
    regions[27:, 2] = 1
    prompt = regions.clone()
    prompt[6:11, 2] = 1  # the prompt sees the subject's tokens that its mask holds
    prompt[27:, 2:] = small(g["subject_masks_maps"], (2, 2))
    members, of_prompt = (edits.Members(streams, shares, same) for shares in (regions, prompt))
    for number, options in enumerate([{}, {"objects": False, "subject": False}, {"subject": False}]):
        rules = rules_of(**options)
        mine = edits.relate(members, members, rules).dense() == 0
        mine[6:11] = (edits.relate(of_prompt, of_prompt, rules).dense() == 0)[6:11]
        assert torch.equal(mine, g[f"mask{number}"]), number


def test_videograin():
    g = golden("dit_videograin")
    now = fade(float(g["timestep"]) / 1000)
    assert abs(now - ((float(g["timestep"]) - 1) / 1000) ** 5) < 1e-12
    logits = g["self.logits"]  # [1, heads, N, N]: queries whose products with unit keys are these
    tokens = logits.shape[-1]
    q, k = logits.transpose(1, 2), torch.eye(tokens).double()[None, :, None].expand(1, tokens, 3, tokens)
    member = g["layout"].flatten(2)
    member = next(
        m for m in (member.permute(0, 2, 1).flatten(0, 1), member.permute(1, 2, 0).flatten(0, 1))
        if torch.equal(m @ m.T, g["self.map"][0])
    )  # fmt: skip
    call, _ = operation(q, k, k, queries=("image",), keys=("image",), grid=(2, 4, 4))
    sizes = edits.Sharpen(torch.zeros(2, 2, 2), parity=True).sizes(member, (2, 4, 4))
    close(sizes, g["self.size"].flatten())
    out = edits.sharpen(replace(call, scale=1.0), member, member, (0.3 * now * sizes)[None, :, None])
    mine = torch.einsum("bnhd,bmhd->bhnm", out.query, out.key)
    close(mine.softmax(-1), g["self.out"].softmax(-1))
    logits, pairs = g["cross.logits"], g["cross.map"]  # [frames, heads, 16, 6] and [frames, 1, 16, 6]
    for frame in range(2):  # words are members of the region whose pixels they are paired with
        q = logits[frame : frame + 1].transpose(1, 2)
        k = torch.eye(6).double()[None, :, None].expand(1, 6, 3, 6)
        rows, group = pairs[frame, 0].unique(dim=0, return_inverse=True)
        mine, theirs = torch.eye(len(rows))[group].double(), rows.T.double()
        call, _ = operation(q, k, k, queries=("image",), keys=("text",), grid=(4, 4))
        out = edits.sharpen(replace(call, scale=1.0), mine, theirs, (now * g["cross.size"][frame, 0])[None])
        found = torch.einsum("bnhd,bmhd->bhnm", out.query, out.key)
        close(found.softmax(-1), g["cross.out"][frame : frame + 1].softmax(-1))


def test_ditctrl():
    g = golden("dit_ditctrl")
    q, k, v = (g[name].transpose(1, 2) for name in ("query", "key", "value"))
    guidance = {"uncond": slice(0, 2), "cond": slice(2, 4)}
    streams = ("text", "video")
    call, context = operation(q, k, v, queries=streams, keys=streams, grid=(2, 3, 4))
    out = edited(recipes.ditctrl(), call, context, branches=("source", "target"), guidance=guidance)
    close(out.transpose(1, 2), g["shared"])
    near = (g["mask"] > 0.3).flatten(1)
    for target, source in ((1, 0), (3, 2)):
        mine = split_by_words(q[target], k[source], v[source], 5, near[3], near[2])
        close(mine.transpose(0, 1), g["masked"][target])
    alone, context = operation(q[:1], k[:1], v[:1], queries=streams, keys=streams, grid=(2, 3, 4))
    out = edited([reweighted({"word": 0.5})], alone, context, words={"word": (2,)})
    close(out.transpose(1, 2), g["reweighted"])


def test_consistedit():
    g = golden("dit_consistedit")
    found = recipes.consistedit(~g["mask"].bool(), alpha=0.5)
    w = weights(g, "sd3.w.")
    image, text = g["sd3.hidden_states"], g["sd3.encoder_hidden_states"]
    q, k, v = (torch.cat([project(w, f"to_{x}", image, 2), project(w, f"add_{x}_proj", text, 2)], 1) for x in "qkv")
    guidance = {"uncond": slice(0, 2), "cond": slice(2, 4)}
    branches = ("source", "target")
    call, context = operation(q, k, v, queries=STREAMS["sd3"], keys=STREAMS["sd3"], grid=(3, 4))
    for name, moment in (("qk", Moment(2, 10)), ("v", Moment(7, 10))):
        now = [edit for edit in found if edit.schedule.active(moment)]
        out = edited(now, call, context, branches=branches, guidance=guidance, moment=moment).flatten(2)
        close(linear(out[:, :12], w["to_out.0.weight"], w["to_out.0.bias"]), g[f"sd3.{name}.image"])
        close(linear(out[:, 12:], w["to_add_out.weight"], w["to_add_out.bias"]), g[f"sd3.{name}.text"])
    w = weights(g, "flux.w.")
    q, k, v = (project(w, f"to_{x}", g["flux.hidden_states"], 2) for x in "qkv")
    call, context = operation(q, k, v, queries=STREAMS["dual"], keys=STREAMS["dual"], grid=(3, 4))
    for name, moment in (("qk", Moment(2, 10)), ("v", Moment(7, 10))):
        now = [edit for edit in found if edit.schedule.active(moment)]
        close(edited(now, call, context, branches=branches, moment=moment).flatten(2), g[f"flux.{name}"])


def test_mask2dit():
    """Three scenes of three words and one frame of four tokens."""
    g = golden("dit_mask2dit")
    w = weights(g)
    x = torch.cat([g["encoder_hidden_states"], g["hidden_states"]], 1)
    q, k = (
        layer_norm(project(w, f"to_{n}", x, 2), (8,), w[f"norm_{n}.weight"], w[f"norm_{n}.bias"], 1e-6) for n in "qk"
    )
    streams = ("text", "video")
    call, context = operation(q, k, project(w, "to_v", x, 2), queries=streams, keys=streams, grid=(3, 2, 2))
    words = {"a": (0, 1, 2), "b": (3, 4, 5), "c": (6, 7, 8)}
    found = recipes.mask2dit((1, 1, 1), tuple(words))
    out = linear(edited(found, call, context, words=words).flatten(2), w["to_out.0.weight"], w["to_out.0.bias"])
    close(out[:, :9], g["text"], 1e-9)
    close(out[:, 9:], g["video"], 1e-9)
    groups = found[0].groups(call, Context(*context, Moment(), Rows(2), words))
    assert torch.equal(groups.dense() == 0, g["mask"])


def test_merged_tokens():
    g = golden("dit_tome")
    for case in range(3):
        height, width, rows, columns, count, random = g[f"case{case}.args"].tolist()
        x = g[f"case{case}.x"]
        if random:
            destination = random_destinations((height, width), (rows, columns), torch.Generator().manual_seed(3))
        else:
            destination = torch.zeros(height, width, dtype=torch.bool)
            destination[: height // rows * rows : rows, : width // columns * columns : columns] = True
            destination = destination.flatten()
        merging = Matching(x, destination).merging(count)
        merged = merging.merge(x)
        assert merged.shape == g[f"case{case}.merged"].shape
        close(merging.unmerge(merged), g[f"case{case}.back"])
        # the same tokens, in another order
        order = [y[y[:, 0].argsort()] for y in (merged[0], g[f"case{case}.merged"][0])]
        close(*order)


def test_trajectory_attention():
    g = golden("dit_trajectory")
    w = weights(g)
    hidden = g["hidden_states"].unflatten(0, (2, 20)).transpose(1, 2)  # [B, F, tokens, C]
    names = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [lambda x, n=n: linear(x, w[f"{n}.weight"], w.get(f"{n}.bias")) for n in names]
    options = {"grid": (4, 5), "size": (32, 40), "projections": layers, "heads": 2, "invisible": "zero"}
    out = recipes.trajectory_attention(hidden, g["trajectory"], g["visible"], **options)
    close(out.transpose(1, 2).flatten(0, 1), g["out"])


def test_all_to_first():
    g = golden("dit_all_to_first")
    w = weights(g)
    q, k, v = (project(w, f"to_{x}", g["hidden_states"], 2) for x in "qkv")
    call, context = operation(q, k, v, queries=("image",), keys=("image",), grid=(2, 3))
    out = edited(recipes.all_to_first(14), call, context).flatten(2)
    close(linear(out, w["to_out.0.weight"], w["to_out.0.bias"]), g["out"])
    whole = [x.flatten(0, 1)[None] for x in (q, k, v)]
    call, context = operation(*whole, queries=("video",), keys=("video",), grid=(14, 2, 3))
    close(edited(recipes.all_to_first(), call, context)[0].unflatten(0, (14, 6)).flatten(2), out)


def test_foveated_tokens_and_attention():
    g = golden("dit_crpa")
    packing, attend = recipes.foveated(g["fovea"])
    image = g["image"].flatten(1, 2)
    assert torch.equal(packing.pack(image), g["tokens"]) and torch.equal(packing.ids().double(), g["ids"][:, 1:])
    assert torch.equal(packing.unpack(g["tokens"]), g["back"])

    def rotate(x, places):
        ids, angles = torch.cat([torch.zeros(len(places), 1), places], 1).double(), []
        for axis, dim in enumerate((2, 4, 4)):
            angles.append(ids[:, axis, None] * 2000.0 ** -(torch.arange(0, dim, 2).double() / dim))
        angle = torch.cat(angles, 1)[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    q, k, v = (g[name].transpose(1, 2) for name in ("query", "key", "value"))
    close(attend(q, k, v, packing, rotate).flatten(2), g["out"])


def test_composed_regions():
    g = golden("dit_rag")
    image, w = g["image"], g["W"]

    def attend(words):
        return image + (image @ w @ words.mT).softmax(-1) @ words

    parts = [attend(g[f"words{i}"]) for i in range(3)]
    masks = cells("1,1,1; 1", (6, 8)).flatten(1)
    close(edits.compose_regions(attend(g["words"]), parts, masks, float(g["delta"])), g["out"])


def test_perturbed_joint_attention():
    g = golden("dit_pag_joint")
    w = weights(g)
    image, text = g["hidden_states"], g["encoder_hidden_states"]
    q, k, v = (torch.cat([project(w, f"to_{x}", image, 2), project(w, f"add_{x}_proj", text, 2)], 1) for x in "qkv")
    call, context = operation(q, k, v, queries=STREAMS["sd3"], keys=STREAMS["sd3"], grid=(3, 4))
    found = [edits.Perturb(1.0, towards="self_and_text", guidance="cond")]
    out = edited(found, call, context, guidance={"uncond": slice(0, 1), "cond": slice(1, 2)}).flatten(2)
    close(linear(out[:, :12], w["to_out.0.weight"], w["to_out.0.bias"]), g["image"])
    close(linear(out[:, 12:], w["to_add_out.weight"], w["to_add_out.bias"]), g["text"])


def test_broadway():
    g = golden("unet_broadway")
    for frames, tau, beta in ((16, 7, 1.5), (16, 7, 10.0), (16, 3, 1.5), (15, 4, 1.5)):
        key = f"f{frames}_t{tau}_b{beta}"
        alpha = 0.1 if beta == 10 else 0.6
        maps, first, numbers = g[f"{key}_map"], g[f"{key}_up1"], g[f"{key}_E"]
        out = edits.enhance(maps, first, slice(6, None), alpha=alpha, beta=beta, tau=tau)
        close(out, g[f"{key}_out"], 1e-5)
        close(energy(maps[6:]), numbers[0], 1e-6)
        close(energy(out[6:]), numbers[6], 1e-5)
        if tau == 7:  # all but the mean is in the band
            mixed = maps + alpha * (first - maps)
            close(1 / frames + numbers[5] * (mixed - 1 / frames), out, 2e-5)


def test_refined_maps():
    g = golden("unet_refined_maps")
    q, k = (g[name].transpose(1, 2) for name in ("q", "k"))
    cross = g["cross"]  # [layer, B, head, 256, word]
    words = torch.stack([cross[:, 0, ..., 0], cross[:, 1].sum(-1)], 1)  # source {3}, target {3, 4}
    small = words.mean(2).unflatten(-1, (16, 16))  # [layer, B, 16, 16]
    maps = torch.nn.functional.interpolate(small, size=(32, 32)).mean(0).flatten(1)
    vima = refined_map(maps[..., None], edits.attend_mean([(q, k, 1.5)]))
    graph = (1.5 * torch.einsum("bnhd,bmhd->bhnm", q, k)).softmax(-1).mean(1)
    locate = edits.smooth_on_graph(maps, graph)
    for name, found in (("vima", vima), ("locate", locate)):
        found = found.unflatten(-1, (32, 32))
        close(found[:, None], g[f"{name}_map"], 2e-6)
        assert torch.equal(masks(found, (64, 64)), g[f"{name}_mask"])
    assert ((locate >= maps.amin(1, keepdim=True)) & (locate <= maps.amax(1, keepdim=True))).all()


def test_virtual_steps():
    g = golden("unet_edit_step")
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for timestep in (780, 180):
        at = Step.of(scheduler, timestep, 50)
        for name in ("vima", "locate"):
            for suffix, mask in (("", g["mask"]), ("_nomask", None)):
                options = {"mask": mask, "noise": g["noise"], "gated": name == "vima"}
                out = virtual_step(g["x0"], g["x"], g["eps"], at, **options)
                close(out, g[f"{name}_{timestep}{suffix}"], 1e-6)


def test_training_losses():
    g = golden("unet_attencraft")
    close(recipes.attencraft(g["p"].double(), g["mask"].double()), g["js"].double(), 1e-6)
    assert torch.equal(classes(g["maps"]), g["classes"].long())
    g = golden("unet_attention_regulation")
    close(edits.regulation_loss(g["maps"], g["weights"], threshold=0.4), g["loss"], 1e-6)


def test_pfb_diff():
    g = golden("unet_pfb_diff")
    close(edits.fuse_features(g["h"], g["mask32"], g["h_ref"], clamp=False), g["fused"], 1e-6)
    inputs = (("q", g["x"]), ("k", g["context"]), ("v", g["context"]))
    q, k, v = (linear(x, g[f"w_to_{n}_weight"]).unflatten(-1, (2, 8)) for n, x in inputs)
    call, context = operation(q, k, v, queries=("image",), keys=("text",), grid=(8, 8))
    found = recipes.pfb_diff(g["mask"][0, 0], inside="in", outside="out")[1:]
    out = edited(found, call, context, words={"in": (1, 2), "out": (5,)}).flatten(2)
    close(linear(out, g["w_to_out_0_weight"], g["w_to_out_0_bias"]), g["out"], 1e-6)


def motion(g, prefix):
    w = {key: x for key, x in g.items() if key.startswith(prefix)}

    def heads(name, x, norm):
        x = layer_norm(x, x.shape[-1:], w[f"{prefix}{norm}__weight"], w[f"{prefix}{norm}__bias"])
        return linear(x, w[f"{prefix}{name}__weight"], w[f"{prefix}{name}__bias"]).unflatten(-1, (2, -1))

    return heads


def test_motionclr():
    g = golden("unet_motionclr")
    heads, x, text = motion(g, "c_"), g["x"], g["text"]
    q, k, v = heads("query", x, "norm"), heads("key", text, "text_norm"), heads("value", text, "text_norm")
    call, context = operation(q, k, v, queries=("image",), keys=("text",), grid=(1, 12))
    branches = ("source", "target")
    close(call.dense().flatten(2), g["cross_plain"], 1e-6)
    words = {"first": (1, 2), "third": (3, 4)}
    found = [edits.Emphasize("first", 0.4, branch="source"), edits.Emphasize("third", 0.4, branch="target")]
    close(edited(found, call, context, branches=branches, words=words).flatten(2), g["cross_reweight"], 1e-6)
    erased = edited(recipes.motionclr("third", erase=0.1), call, context, branches=branches, words=words).flatten(2)
    close(torch.cat([g["cross_plain"][1, :6], erased[1, 6:]]), g["cross_erase"][1], 1e-6)
    keep = torch.zeros(9)
    keep[4] = 1  # the word that the edited motion keeps
    found = [edits.Transfer(lambda step: 1 - keep, lambda step: keep)]
    close(edited(found, call, context, branches=branches).flatten(2), g["cross_replace"], 1e-6)
    own = motion(g, "s_")
    q, k, v = (own(name, x, "norm") for name in ("query", "key", "value"))
    call, context = operation(q, k, v, queries=("image",), keys=("image",), grid=(1, 12))
    close(call.dense().flatten(2), g["self_plain"], 1e-6)
    for name, options in (("replace", {"replace_steps": 3}), ("style", {"style_steps": 5})):
        out = edited(recipes.motionclr(**options), call, context, branches=branches)
        close(out.flatten(2), g[f"self_{name}"], 1e-6)
    shifted = Call(call.site, 0, *(torch.cat([y[:1], shift(y[:1])]) for y in (q, k, v)))
    close(shifted.dense().flatten(2), g["self_shift"], 1e-6)
