"""Contract of recipes: neutral settings are the model bit for bit, sources stay, everything is given back."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from foveal.zoo import sites
from foveal.zoo.control import Control, Edit, Where, edits, latents, recipes, words
from foveal.zoo.control.control import flatten
from foveal.zoo.control.recipes import RECIPES
from foveal.zoo.control.recipes.astar import overlap, retention, segregation
from foveal.zoo.control.recipes.consistedit import consistedit_mask
from foveal.zoo.control.recipes.grad_sam import dependence_mask
from foveal.zoo.control.recipes.unifyedit import balance, concentration, self_loss
from foveal.zoo.control.table import table
from generators import build, run
from stub_tokenizer import StubTokenizer
from trained_recipes import LAYERS, LOSSES, InLayers, toy_of

GOLDENS = Path(__file__).parents[1] / "goldens" / "control"
LEFT = torch.zeros(6, 8)
LEFT[:, :4] = 1
HALVES = torch.stack([LEFT, 1 - LEFT])
TRACK = torch.zeros(3, 4, 4, dtype=torch.bool)
TRACK[0, :2, :2] = TRACK[1, 1:3, 1:3] = TRACK[2, 2:, 2:] = True
NONE = torch.zeros(6, 8)
PAIR = ("source", "target")
PROMPTS = {"tokenizer": StubTokenizer(), "steps": 10, "length": 7, "self_scales": (1, 2)}


@dataclass
class Row:
    """Settings of a recipe in the contract.

    Attributes:
        active, neutral: make its edits; no neutral setting when None.
        toys: generators.
        branches, words: of the Control.
        images: rows of each branch.
        maps: of the Control.
        source: whether the rows of the first branch are the model's own.
        needs_guidance: whether it is refused without.
        refused: toy of another kind → why the recipe does not serve it.
    """

    active: Callable
    neutral: Callable | None
    toys: tuple[str, ...] = ("sd unet", "sd3")
    branches: tuple[str, ...] = ()
    words: dict = field(default_factory=dict)
    images: int = 1
    maps: str = "raise"
    source: bool = True
    needs_guidance: bool = False
    refused: dict = field(default_factory=dict)


LENGTHS = {"sd unet": (7, 12), "wan": (12, 24)}  # tokens and channels of the toys' texts, as blocks read them


def swap(build, *prompts, **options):
    return lambda toy: build(*(prompts or ("a cat on", "a dog on")), **PROMPTS | {"length": LENGTHS[toy][0]} | options)


def texts(toy):
    return torch.randn(2, *LENGTHS[toy], generator=torch.Generator().manual_seed(5)).double()


def made(build, toy):
    """Edits of a row; some depend on the length of the toy's text."""
    return build(toy) if build.__code__.co_varnames[:1] == ("toy",) else build()


WORDS = {"first": [1], "second": [2, 3]}
UNET, KONTEXT, CROSS = ("sd unet",), ("flux kontext", "qwen"), ("sd unet", "wan")
CLEAN = torch.zeros(1, 4, 12, 16).double()
ROWS = {
    "prompt_to_prompt": Row(
        swap(recipes.prompt_to_prompt), swap(recipes.prompt_to_prompt, cross=0.0, self_attention=0.0), CROSS, PAIR
    ),
    "video_p2p": Row(
        swap(recipes.video_p2p, frames=2),
        swap(recipes.video_p2p, frames=1, cross=0.0, self_attention=0.0),
        CROSS, PAIR, images=2, source=False,
    ),
    "realcraft": Row(
        swap(recipes.realcraft, "a cat on", "a dog on", LEFT), swap(recipes.realcraft, "a cat on", "a dog on", LEFT + 2,
                                                                    cross=0.0), CROSS, PAIR,
    ),
    "cut_and_paste": Row(
        swap(recipes.cut_and_paste, "a cat on", "a dog on", "first", scale=2), None, UNET, PAIR, WORDS,
        refused={"wan": "has no site"},
    ),
    "grag": Row(recipes.grag, lambda: recipes.grag(delta=1.0), KONTEXT, refused={"sd unet": "keys of the stream"}),
    "mmdit_edit": Row(
        lambda: recipes.mmdit_edit(until=0.5), lambda: recipes.mmdit_edit(until=0.0), ("sd3", "flux", "sd unet"), PAIR
    ),
    "consistedit": Row(
        lambda: recipes.consistedit(LEFT), lambda: recipes.consistedit(LEFT + 2, alpha=0.0), ("sd3", "cogvideox"), PAIR,
        refused={"sd unet": "has no site"},
    ),
    "ditctrl": Row(
        lambda: recipes.ditctrl(layers=(0, 1), steps=10, first=0), lambda: recipes.ditctrl(layers=(0,), steps=10, end=0,
                                                                                         first=45),
        ("cogvideox", "sd unet"), PAIR,
    ),
    "softpag": Row(recipes.softpag, lambda: recipes.softpag(strength=0.0), ("sd unet", "sd3", "videodit joint")),
    "rag": Row(
        lambda: recipes.rag(("a", "b"), HALVES), lambda: recipes.rag(("a", "b"), HALVES, delta=0.0),
        ("sd3", "sd unet"), ("base", "a", "b"), source=False,
    ),
    "seg2any": Row(
        lambda: recipes.seg2any(HALVES, ("first", "second"), hard_layers=(1, 2)), None,
        ("flux", "flux kontext", "sd unet"), words={"first": [1], "second": [2]},
    ),
    "mask2dit": Row(
        lambda: recipes.mask2dit((1, 2), ("first", "second")), None, ("cogvideox",),
        words={"first": [0, 1, 2], "second": [3, 4, 5]}, refused={"sd unet": "frames"},
    ),
    "videograin": Row(
        lambda: recipes.videograin(HALVES, ("first", "second")),
        lambda: recipes.videograin(HALVES, ("first", "second"), self_strength=0.0, cross_strength=0.0), words=WORDS,
    ),
    "token_merging": Row(
        lambda: recipes.token_merging(0.3), lambda: recipes.token_merging(0.0), ("sd unet", "wan")
    ),
    "all_to_first": Row(
        lambda toy: recipes.all_to_first(2 if toy == "sd unet" else None),
        lambda toy: recipes.all_to_first(1), CROSS, images=2,
    ),
    "ditraj": Row(lambda: recipes.ditraj(TRACK), None, ("wan",), refused={"sd unet": "no rotary table"}),
    "unifyedit": Row(
        lambda: recipes.unifyedit("first", LEFT, scale=2), None, UNET, PAIR, WORDS, maps="allow",
        refused={"wan": "has no site"},
    ),
    "astar": Row(lambda toy: recipes.astar(("first", "second"), scale=SCALE[toy]), None, CROSS, (), WORDS),
    "bacon": Row(lambda toy: recipes.bacon({"first": (0, 0, 0.5, 1)}, scale=SCALE[toy]), None, CROSS, (), WORDS),
    "pfb_diff": Row(
        lambda: recipes.pfb_diff(LEFT, inside="first", outside="second", scales=(1, 2)),
        lambda: recipes.pfb_diff(torch.ones(6, 8)), UNET, PAIR, WORDS, source=False,
        refused={"sd3": "are no modules of SD3"},
    ),
    "designedit": Row(lambda: recipes.designedit(LEFT), lambda: recipes.designedit(NONE, leak=True), CROSS,
                      PAIR),
    "spacetime": Row(
        lambda toy: recipes.spacetime(texts(toy), [(0.3, 0.5), (0.7, 0.5)]),
        lambda toy: recipes.spacetime(texts(toy), [(0.3, 0.5), (0.7, 0.5)], weights=0.0), CROSS, needs_guidance=True,
    ),
    "ir_diffusion": Row(
        lambda: recipes.ir_diffusion({"subject": LEFT}, LEFT), lambda: recipes.ir_diffusion({"subject": NONE}, LEFT),
        CROSS, ("subject", "target"),
    ),
    "parts2whole": Row(
        lambda: recipes.parts2whole({"part": LEFT}), lambda: recipes.parts2whole({"part": NONE}), CROSS,
        ("part", "target"),
    ),
    "primecomposer": Row(lambda: recipes.primecomposer("first", LEFT, LEFT), None, CROSS, PAIR, WORDS,
                         source=False),
    "motionclr": Row(
        lambda: recipes.motionclr("first", emphasize=0.3, erase=0.5, replace_steps=2, style_steps=1),
        lambda: recipes.motionclr("first"), branches=PAIR, words=WORDS,
    ),
    "c_upscale": Row(
        lambda toy: recipes.c_upscale(texts(toy), HALVES),
        lambda toy: recipes.c_upscale(texts(toy), HALVES, weight=0.0), CROSS,
    ),
    "s2edit": Row(lambda: recipes.s2edit("first", LEFT), None, CROSS, words=WORDS),
    "attention_modulation": Row(
        lambda: recipes.attention_modulation({"first": 2.0}, temperature=0.5),
        lambda: recipes.attention_modulation({"first": 1.0}), CROSS, words=WORDS,
    ),
    "diffuhaul": Row(recipes.diffuhaul, lambda: recipes.diffuhaul(mix=0.0), CROSS, PAIR),
    "vimaedit": Row(
        swap(recipes.vimaedit, "a cat on", "a red cat on", CLEAN, ("first",), guidance=None, scale=1),
        swap(recipes.vimaedit, "a cat on", "a red cat on", CLEAN, guidance=None, cross=0.0, self_attention=0.0),
        UNET, PAIR, WORDS, refused={"wan": "has no site"},
    ),
    "locatedit": Row(
        swap(recipes.locatedit, "a cat on", "a red cat on", CLEAN, ("first",), guidance=None, scale=1), None,
        UNET, PAIR, WORDS, maps="allow", refused={"wan": "has no site"},
    ),
    "attention_regulation": Row(
        lambda toy: recipes.attention_regulation(("first",), iterations=2, scales=(2,)),
        lambda toy: recipes.attention_regulation(("first",), iterations=0, scales=(2,)),
        UNET, (), WORDS, maps="allow", refused={"wan": "has no site"},
    ),
    "grad_sam": Row(
        lambda: recipes.grad_sam("first", CLEAN, scale=2), None, UNET, (), WORDS, refused={"wan": "has no site"}
    ),
    "creatidesign": Row(
        lambda: recipes.creatidesign(HALVES[:1], ("first",), subject=LEFT), None, (*KONTEXT, "sd unet"),
        words={"first": [1]},
    ),
    "freecontrol": Row(lambda: recipes.freecontrol(places=None)[:1], None, ("flux", "sd unet")),
    "broadway": Row(
        lambda: recipes.broadway(tau=1, blocks=(0, 1)), lambda: recipes.broadway(0.0, 1.0, 1, blocks=(0, 1)),
        ("motion unet",), maps="allow", refused={"latte": "has no site"},
    ),
}  # fmt: skip
SCALE = {"sd unet": 2, "wan": 1}
ONLY_LATENTS = {"unifyedit", "astar", "bacon", "cut_and_paste", "grad_sam", "freecontrol"}  # observe, or may
CASES = [
    (name, toy, guided)
    for name, row in ROWS.items()
    for toy in row.toys
    for guided in (False, True)
    if guided or toy == row.toys[0]
]
KINDS = dict.fromkeys(("sd unet", "sdxl unet", "motion unet"), "UNet")  # of the toys; all others are transformers


def test_every_recipe_has_its_row():
    shelf = Path(recipes.__file__).parent.glob("[!_]*.py")
    in_layers = {"dreamvideo2", "foveated", "fulldit", "scaleweaver", "trajectory_attention", "ultra3d"}
    assert set(LAYERS) == in_layers and set(LOSSES) == {"attencraft", "break_a_scene"}
    assert {path.stem for path in shelf} == set(RECIPES) == set(ROWS) | set(LOSSES) | in_layers
    for recipe in RECIPES.values():
        lines = Path(recipe.build.__code__.co_filename).read_text().splitlines()
        assert recipe.hosts and recipe.cost and recipe.source and len(lines) <= 110, (recipe.name, len(lines))
        assert (recipe.status == "idea") == recipe.title.startswith("After the idea of")


def test_what_a_user_has_to_give_is_said():
    """maps='allow' and the callback where edits ask for them; recordings that exist and are read."""
    for name, row in ROWS.items():
        found, needs = list(flatten(made(row.active, row.toys[0]))), RECIPES[name].needs
        assert any(edit.needs for edit in found) == ("maps='allow'" in needs) == (row.maps == "allow"), name
        through_callback = any(type(edit).latents is not Edit.latents for edit in found)
        assert not through_callback or "callback" in needs, name
    text = (Path(__file__).parent / "test_control_goldens.py").read_text()
    for name, recipe in RECIPES.items():
        prefix = recipe.recorded.partition("_")[2]
        assert not recipe.recorded or ((GOLDENS / f"{recipe.recorded}.npz").exists() and prefix in text), name
        assert not recipe.recorded or recipe.status == "exact", name


def pipeline(model, guided):
    """A pipeline as far as Controls look at it."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    options = {"do_classifier_free_guidance": guided, "guidance_scale": 7.5 if guided else 1.0}
    return SimpleNamespace(components={"model": model}, scheduler=scheduler, _num_timesteps=10, **options)


@pytest.mark.parametrize(("name", "toy", "guided"), CASES)
def test_recipe(name, toy, guided):
    row = ROWS[name]
    batch = max(len(row.branches), 1) * row.images * (2 if guided else 1)
    model, inputs = build(toy, batch=batch)
    pipe = pipeline(model, guided)
    if "joint" in toy and guided:
        pytest.skip("the toy takes its pipeline's rows in two calls")
    found = sites.find(model)
    processors, plain = [site.module.processor for site in found], run(model, inputs)
    options = {"branches": row.branches, "words": row.words, "maps": row.maps}
    if row.neutral is not None:
        with Control(pipe, made(row.neutral, toy), **options):
            if name not in ONLY_LATENTS:
                assert torch.equal(run(model, inputs), plain)
    control = Control(pipe, made(row.active, toy), **options)
    with control:
        if row.needs_guidance and not guided:
            with pytest.raises(ValueError, match="guidance"):
                run(model, inputs)
            return
        out = run(model, inputs)
    assert out.isfinite().all() and (name in ONLY_LATENTS or not torch.equal(out, plain))
    if row.branches and row.source:
        kept = control.rows.of(row.branches[0], "both")
        assert torch.equal(out[list(kept)], plain[list(kept)]) or name in ONLY_LATENTS

    def fail(*arguments):
        raise RuntimeError("inside")

    handle = found[-1].module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"), control:
        run(model, inputs)
    handle.remove()
    assert all(a is b.module.processor for a, b in zip(processors, found, strict=True))
    assert torch.equal(run(model, inputs), plain) and not model._forward_pre_hooks


TWICE = ("wan", "flux", "flux kontext", "qwen", "cogvideox", "videodit joint")  # toys that are told the branch


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if set(row.toys) & set(TWICE)])
def test_recipe_where_guidance_calls_twice(name):
    """Edits of conditional rows leave the other rows' call alone, and are at work in theirs."""
    row = ROWS[name]
    toy = next(toy for toy in row.toys if toy in TWICE)
    model, inputs = build(toy, batch=max(len(row.branches), 1) * row.images)
    plain, found = run(model, inputs), made(row.active, toy)
    options = {"branches": row.branches, "words": row.words, "maps": row.maps}
    with Control(pipeline(model, True), found, **options) as control:
        outs = {}
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                if row.needs_guidance:
                    if branch == "cond":
                        with pytest.raises(ValueError, match="in one batch"):
                            run(model, inputs)
                    continue
                outs[branch] = run(model, inputs)
    if row.needs_guidance:
        return
    assert all(out.isfinite().all() for out in outs.values())
    if all(edit.guidance == "cond" for edit in control.edits):
        assert torch.equal(outs["uncond"], plain)
    assert name in ONLY_LATENTS or not torch.equal(outs["cond"], plain)


@pytest.mark.parametrize(("name", "toy"), [(name, toy) for name, row in ROWS.items() for toy in row.refused])
def test_recipes_refuse_what_they_do_not_serve(name, toy):
    """One sentence, and the generator as it was."""
    row = ROWS[name]
    batch = max(len(row.branches), 1) * row.images
    model, inputs = build(toy, batch=batch)
    plain, processors = run(model, inputs), [site.module.processor for site in sites.find(model)]
    options = {"branches": row.branches, "words": row.words, "maps": row.maps}
    with pytest.raises(ValueError, match=row.refused[toy]):  # noqa: SIM117
        with Control(pipeline(model, False), made(row.active, "sd unet"), **options):
            run(model, inputs)
    assert all(a is b.module.processor for a, b in zip(processors, sites.find(model), strict=True))
    assert torch.equal(run(model, inputs), plain)


def test_every_recipe_meets_a_unet_and_a_transformer():
    for name, row in ROWS.items():
        assert {KINDS.get(toy, "transformer") for toy in (*row.toys, *row.refused)} == {"UNet", "transformer"}, name


def test_broadway_leads_blocks_by_the_first():
    """Against explicit maps; the energy is that of the conditional rows, whose factor is for all."""
    model, inputs = build("motion unet", batch=2)
    seen = {}

    class Look(Edit):
        where, guidance = Where(kinds=("self",), places=("up",)), "both"

        def sites(self, sites):
            return [site for site in super().sites(sites) if site.axes == (0,)]

        def out(self, call, plan, out):
            seen[call.site.path] = (call, plan.layout.levels[call.site.level][1:], out)
            return out

    pipe = pipeline(model, True)
    with Control(pipe, recipes.broadway(0.6, 1.5, 1, blocks=(0, 1)), Look(), maps="allow") as control:
        run(model, inputs)
    assert len(seen) == 8 and "maps of frames x frames" in control.report()

    def maps_of(path):
        call, size, _ = seen[path]
        query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
        maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return maps.unflatten(0, (2, *size)), size  # [rows, height, width, heads, frames, frames]

    for path, (call, size, out) in seen.items():
        maps, first = maps_of(path)[0], maps_of(path.replace("up_blocks.1", "up_blocks.0"))[0]
        planes = first.permute(0, 3, 4, 5, 1, 2).flatten(1, 3)
        first = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)
        first = first.unflatten(1, maps.shape[3:]).permute(0, 4, 5, 1, 2, 3)
        wanted = edits.enhance(maps, first, slice(1, 2), alpha=0.6, beta=1.5, tau=1).flatten(0, 2)
        torch.testing.assert_close(torch.einsum("bhnm,bmhd->bnhd", wanted, call.value), out, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"tau=7 must be in 0\.\.2 for 5 frames"):  # noqa: SIM117
        with Control(pipe, recipes.broadway(blocks=(0, 1)), maps="allow"):
            run(model, inputs)
    with pytest.raises(ValueError, match="maps='allow'"):
        Control(pipe, recipes.broadway(blocks=(0, 1)))


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@pytest.mark.parametrize("name", LAYERS)
def test_recipes_of_trained_models_in_layers(name, kind):
    """At its start a trained part is not there; then it changes what comes out. All is given back."""
    model, inputs, where = toy_of(name, kind)
    plain, processors = run(model, inputs), [site.module.processor for site in sites.find(model)]
    neutral, active = (InLayers(LAYERS[name], where, on) for on in (False, True))
    with Control(model, neutral) as control:
        torch.testing.assert_close(run(model, inputs), plain, rtol=1e-12, atol=1e-12)
    assert control.seen
    with Control(model, active):
        out = run(model, inputs)
    assert out.isfinite().all() and (out - plain).abs().max() > 1e-6 * plain.abs().max()
    assert all(a is s.module.processor for a, s in zip(processors, sites.find(model), strict=True))
    assert torch.equal(run(model, inputs), plain) and not model._forward_pre_hooks


@pytest.mark.parametrize("toy", ["sd unet", "wan"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_training_fall(name, toy):
    """Their gradient reaches the latents through the observed words; a small step against it lowers them."""
    model, inputs = build(toy)
    latents = "sample" if toy == "sd unet" else "hidden_states"
    observer, scale = edits.WordMask("first", "second"), 1e-2 * inputs[latents].norm()

    def loss(x):
        observer.begin()
        model(**inputs | {latents: x})
        maps = observer.maps[0]
        maps = maps if maps.dim() == 3 else maps[:, 0]  # of the first frame
        left = torch.zeros(maps.shape[-2:])
        left[:, : left.shape[1] // 2] = 1
        return LOSSES[name](maps, torch.stack([left, 1 - left]))

    x = inputs[latents].clone().requires_grad_()
    with Control(model, observer, words=WORDS):
        before = loss(x)
        (gradient,) = torch.autograd.grad(before, x)
        after = loss(x.detach() - scale * gradient / gradient.norm())
    assert gradient.isfinite().all() and after < before


def test_consistedit_takes_the_mask_of_its_own_run():
    model, inputs = build("sd3", batch=1)
    mask = consistedit_mask("word")
    with Control(model, mask, words={"word": [2]}):
        run(model, inputs)
    model, inputs = build("sd3", batch=2)
    plain = run(model, inputs)
    with Control(model, recipes.consistedit(mask, alpha=1.0), branches=PAIR, total_steps=4):
        out = run(model, inputs)
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])


def test_freecontrol_recalls_queries_of_a_reference():
    """A bank from the same latents changes nothing; from others, the chosen layers alone."""
    model, inputs = build("flux", batch=1)
    plain = run(model, inputs)
    keep, recall = recipes.freecontrol()
    with Control(model, keep) as control:
        assert torch.equal(run(model, inputs), plain) and keep.bytes > 0
    with Control(model, recall):
        assert torch.equal(run(model, inputs), plain)
    with Control(model, keep):
        run(model, inputs | {"hidden_states": inputs["hidden_states"].flip(1)})
    with Control(model, recall) as control:
        assert not torch.equal(run(model, inputs), plain)
    assert all(path.startswith("single_transformer_blocks") for path in control.seen)


def test_losses_have_their_closed_values():
    map_, other = torch.zeros(4, 4), torch.zeros(4, 4)
    map_[:2], other[2:] = 1, 1
    assert overlap(map_, map_) == 0.5 and segregation([map_, other]) == 0 and retention([map_], [map_]) == 0.5
    assert recipes.break_a_scene(map_[None] * 7, map_[None]) == 0
    assert recipes.attencraft(map_, map_) == 0 < recipes.attencraft(map_, other)
    assert concentration(torch.ones(16), map_.flatten()) == 1 and self_loss(map_, map_) == 0
    assert balance(0, rate=0.05) == (0.0, 5.0)
    x = torch.randn(1, 5, 3)
    assert torch.equal(recipes.dreamvideo2(x, x, torch.zeros(5), outside=1.0), x + x)
    assert torch.equal(recipes.dreamvideo2(x, x, torch.zeros(5), outside=0.0), x)
    project = torch.nn.Linear(6, 6)
    torch.nn.init.zeros_(project.weight), torch.nn.init.zeros_(project.bias)
    q, k = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 4, 3)
    for merge in ("sum", "joint"):
        out = recipes.scaleweaver(q, (q, q), (k, k), project, merge=merge)
        assert torch.equal(out, recipes.scaleweaver(q, (q, q), (k, k + 1), project, merge=merge))
    sequence, spans = recipes.fulldit(x, {"camera": None, "depth": x[:, :2]})
    assert sequence.shape[1] == 7 and spans == {"video": (0, 5), "depth": (5, 7)}


def test_parts_see_themselves():
    labels = torch.tensor([0, 1, 0, 2, 1, 2])
    groups = recipes.ultra3d(labels)
    assert torch.equal(groups.dense() == 0, labels[:, None] == labels) and len(groups.bias) == 3


def test_grad_sam_finds_where_the_output_depends():
    columns = torch.rand(1, 16, 2, requires_grad=True)
    weight = torch.zeros(1, 16, 1)
    weight[:, 5] = 1
    mask = dependence_mask((columns * weight).sum(-1), columns, (4, 4), blur=(1, 1.0), dilate=1)
    assert mask.nonzero().tolist() == [[1, 1]]
    assert edits.importance((columns * weight).sum(-1), columns, probes=2).nonzero()[:, 1].unique().tolist() == [5]


def test_primitives_of_the_documentation_exist():
    """Every number is there, every name is one of ours."""
    page = (Path(__file__).parents[2] / "docs" / "steer.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("| primitive | no. |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    numbers = {number for row in rows for number in row[1].split(", ")}
    counts = {"E": 14, "O": 6, "L": 7, "P": 10}
    assert numbers == {"E4n"} | {f"{kind}{i + 1}" for kind, count in counts.items() for i in range(count)}
    for row in rows:
        names = re.findall(r"`(\w+)(?:\([^`]*\))?`", row[3])
        assert names, row
        assert all(any(hasattr(place, name) for place in (edits, words, latents)) for name in names), row


def test_the_table_of_the_documentation_is_up_to_date():
    page = (Path(__file__).parents[2] / "docs" / "steer.md").read_text(encoding="utf-8")
    assert table() in page, "run: python -m foveal.zoo.control.table docs/steer.md"
    assert all(f"`{name}`" in table() for name in RECIPES)
