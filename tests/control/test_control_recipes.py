"""Contract of recipes: neutral settings are the model bit for bit, sources stay, everything is given back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foveal.zoo import sites
from foveal.zoo.control import Control, edits, recipes
from foveal.zoo.control.recipes import RECIPES
from foveal.zoo.control.recipes.astar import overlap, retention, segregation
from foveal.zoo.control.recipes.consistedit import consistedit_mask
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


def swap(build, *prompts, **options):
    return lambda: build(*(prompts or ("a cat on", "a dog on")), **PROMPTS | options)


def texts(scale=1.0):
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(5)).double() * scale


WORDS = {"first": [1], "second": [2, 3]}
UNET, KONTEXT = ("sd unet",), ("flux kontext", "qwen")
ROWS = {
    "prompt_to_prompt": Row(
        swap(recipes.prompt_to_prompt), swap(recipes.prompt_to_prompt, cross=0.0, self_attention=0.0), UNET, PAIR
    ),
    "video_p2p": Row(
        swap(recipes.video_p2p, frames=2),
        swap(recipes.video_p2p, frames=1, cross=0.0, self_attention=0.0),
        UNET, PAIR, images=2, source=False,
    ),
    "realcraft": Row(
        swap(recipes.realcraft, "a cat on", "a dog on", LEFT), swap(recipes.realcraft, "a cat on", "a dog on", LEFT + 2,
                                                                    cross=0.0), UNET, PAIR,
    ),
    "cut_and_paste": Row(
        swap(recipes.cut_and_paste, "a cat on", "a dog on", "first", scale=2), None, UNET, PAIR, WORDS
    ),
    "grag": Row(recipes.grag, lambda: recipes.grag(delta=1.0), KONTEXT),
    "mmdit_edit": Row(
        lambda: recipes.mmdit_edit(until=0.5), lambda: recipes.mmdit_edit(until=0.0), ("sd3", "flux"), PAIR
    ),
    "consistedit": Row(
        lambda: recipes.consistedit(LEFT), lambda: recipes.consistedit(LEFT + 2, alpha=0.0), ("sd3", "cogvideox"), PAIR
    ),
    "ditctrl": Row(
        lambda: recipes.ditctrl(layers=(0, 1), steps=10, first=0), lambda: recipes.ditctrl(layers=(0,), steps=10, end=0,
                                                                                         first=45),
        ("cogvideox",), PAIR,
    ),
    "softpag": Row(recipes.softpag, lambda: recipes.softpag(strength=0.0), ("sd unet", "sd3", "videodit joint")),
    "rag": Row(
        lambda: recipes.rag(("a", "b"), HALVES), lambda: recipes.rag(("a", "b"), HALVES, delta=0.0),
        ("sd3", "sd unet"), ("base", "a", "b"), source=False,
    ),
    "seg2any": Row(
        lambda: recipes.seg2any(HALVES, ("first", "second"), hard_layers=(1, 2)), None, ("flux", "flux kontext"),
        words={"first": [1], "second": [2]},
    ),
    "mask2dit": Row(
        lambda: recipes.mask2dit((1, 2), ("first", "second")), None, ("cogvideox",),
        words={"first": [0, 1, 2], "second": [3, 4, 5]},
    ),
    "videograin": Row(
        lambda: recipes.videograin(HALVES, ("first", "second")),
        lambda: recipes.videograin(HALVES, ("first", "second"), self_strength=0.0, cross_strength=0.0), words=WORDS,
    ),
    "token_merging": Row(
        lambda: recipes.token_merging(0.3), lambda: recipes.token_merging(0.0), ("sd unet", "wan")
    ),
    "all_to_first": Row(lambda: recipes.all_to_first(2), lambda: recipes.all_to_first(1), UNET, images=2),
    "ditraj": Row(lambda: recipes.ditraj(TRACK), None, ("wan",)),
    "unifyedit": Row(
        lambda: recipes.unifyedit("first", LEFT, scale=2), None, UNET, PAIR, WORDS, maps="allow",
    ),
    "astar": Row(lambda: recipes.astar(("first", "second"), scale=2), None, UNET, (), WORDS),
    "bacon": Row(lambda: recipes.bacon({"first": (0, 0, 0.5, 1)}, scale=2), None, UNET, (), WORDS),
    "pfb_diff": Row(
        lambda: recipes.pfb_diff(LEFT, inside="first", outside="second", scales=(1, 2)),
        lambda: recipes.pfb_diff(torch.ones(6, 8)), UNET, PAIR, WORDS, source=False,
    ),
    "designedit": Row(lambda: recipes.designedit(LEFT), lambda: recipes.designedit(NONE, leak=True), UNET, PAIR),
    "spacetime": Row(
        lambda: recipes.spacetime(texts(), [(0.3, 0.5), (0.7, 0.5)]),
        lambda: recipes.spacetime(texts(), [(0.3, 0.5), (0.7, 0.5)], weights=0.0), UNET, needs_guidance=True,
    ),
    "ir_diffusion": Row(
        lambda: recipes.ir_diffusion({"subject": LEFT}, LEFT), lambda: recipes.ir_diffusion({"subject": NONE}, LEFT),
        UNET, ("subject", "target"),
    ),
    "parts2whole": Row(
        lambda: recipes.parts2whole({"part": LEFT}), lambda: recipes.parts2whole({"part": NONE}), UNET,
        ("part", "target"),
    ),
    "primecomposer": Row(lambda: recipes.primecomposer("first", LEFT, LEFT), None, UNET, PAIR, WORDS, source=False),
    "motionclr": Row(
        lambda: recipes.motionclr("first", emphasize=0.3, erase=0.5, replace_steps=2, style_steps=1),
        lambda: recipes.motionclr("first"), branches=PAIR, words=WORDS,
    ),
    "c_upscale": Row(lambda: recipes.c_upscale(texts(), HALVES), lambda: recipes.c_upscale(texts(), HALVES, weight=0.0),
                     UNET),
    "s2edit": Row(lambda: recipes.s2edit("first", LEFT), None, UNET, words=WORDS),
    "attention_modulation": Row(
        lambda: recipes.attention_modulation({"first": 2.0}, temperature=0.5),
        lambda: recipes.attention_modulation({"first": 1.0}), UNET, words=WORDS,
    ),
    "diffuhaul": Row(recipes.diffuhaul, lambda: recipes.diffuhaul(mix=0.0), UNET, PAIR),
}  # fmt: skip
ONLY_LATENTS = {"unifyedit", "astar", "bacon", "cut_and_paste"}  # the edits of one forward observe alone, or may
FUNCTIONS = {  # losses, masks and steps; what they compute is tested by their names
    "attencraft", "attention_regulation", "break_a_scene", "broadway", "creatidesign", "dreamvideo2", "foveated",
    "freecontrol", "fulldit", "grad_sam", "locatedit", "scaleweaver", "trajectory_attention", "ultra3d", "vimaedit",
}  # fmt: skip
CASES = [(name, toy, guided) for name, row in ROWS.items() for toy in row.toys for guided in (False, True)]


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
    scheduler = SimpleNamespace(timesteps=torch.linspace(900, 0, 10))
    return SimpleNamespace(
        components={"model": model}, do_classifier_free_guidance=guided, scheduler=scheduler, _num_timesteps=10
    )


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
        with Control(pipe, row.neutral(), **options):
            if name not in ONLY_LATENTS:
                assert torch.equal(run(model, inputs), plain)
    control = Control(pipe, row.active(), **options)
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
    mask = recipes.grad_sam((columns * weight).sum(-1), columns, (4, 4), blur=(1, 1.0), dilate=1)
    assert mask.nonzero().tolist() == [[1, 1]]
    assert edits.importance((columns * weight).sum(-1), columns, probes=2).nonzero()[:, 1].unique().tolist() == [5]


def test_the_table_of_the_documentation_is_up_to_date():
    page = (Path(__file__).parents[2] / "docs" / "steer.md").read_text(encoding="utf-8")
    assert table() in page, "run: python -m foveal.zoo.control.table docs/steer.md"
    assert all(f"`{name}`" in table() for name in RECIPES)
