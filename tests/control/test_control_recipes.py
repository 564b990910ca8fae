"""Contract of recipes: neutral settings are the model bit for bit, sources stay, everything is given back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from foveal.zoo import sites
from foveal.zoo.control import Control, edits, recipes
from foveal.zoo.control.recipes import RECIPES
from foveal.zoo.control.recipes.astar import overlap, retention, segregation
from foveal.zoo.control.recipes.consistedit import consistedit_mask
from foveal.zoo.control.recipes.grad_sam import dependence_mask
from foveal.zoo.control.recipes.unifyedit import balance, concentration, self_loss
from foveal.zoo.control.table import table
from generators import build, run
from stub_tokenizer import StubTokenizer

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
}  # fmt: skip
SCALE = {"sd unet": 2, "wan": 1}
ONLY_LATENTS = {"unifyedit", "astar", "bacon", "cut_and_paste", "grad_sam", "freecontrol"}  # observe, or may
FUNCTIONS = {  # losses of training, and layers of trained models; what they compute is tested by their names
    "attencraft", "break_a_scene", "broadway", "dreamvideo2", "foveated", "fulldit", "scaleweaver",
    "trajectory_attention", "ultra3d",
}  # fmt: skip
CASES = [
    (name, toy, guided)
    for name, row in ROWS.items()
    for toy in row.toys
    for guided in (False, True)
    if guided or toy == row.toys[0]
]
KINDS = {"sd unet": "UNet", "sdxl unet": "UNet"}  # of the toys; all others are transformers


def test_every_recipe_has_its_row():
    shelf = Path(recipes.__file__).parent.glob("[!_]*.py")
    assert {path.stem for path in shelf} == set(RECIPES) == set(ROWS) | FUNCTIONS
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_control_*.py"))
    assert all(f"recipes.{name}" in text for name in FUNCTIONS)
    for recipe in RECIPES.values():
        lines = Path(recipe.build.__code__.co_filename).read_text().splitlines()
        assert recipe.hosts and recipe.cost and recipe.source and len(lines) <= 110, (recipe.name, len(lines))
        assert (recipe.status == "idea") == recipe.title.startswith("After the idea of")


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


def test_the_table_of_the_documentation_is_up_to_date():
    page = (Path(__file__).parents[2] / "docs" / "steer.md").read_text(encoding="utf-8")
    assert table() in page, "run: python -m foveal.zoo.control.table docs/steer.md"
    assert all(f"`{name}`" in table() for name in RECIPES)
