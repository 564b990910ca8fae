"""Control: edits compose on the values, touch their rows, sites and steps alone, and leave without a trace."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from foveal.zoo import sites
from foveal.zoo.control import Control, Rows, Schedule, Where, edits, explain, recipes
from foveal.zoo.control.edit import Edit
from foveal.zoo.control.edits.word_mask import resize
from foveal.zoo.control.terms import apply_right, compose
from generators import build, run
from stub_tokenizer import StubTokenizer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

BRANCHES = ("source", "target")


class MapEdit(Edit):
    """Edits explicit maps, the formulation that the terms are checked against."""

    owner = True
    where = Where(kinds=("cross",))

    def __init__(self, change):
        self.change = change

    def attend(self, call, plan, rows, following):
        query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
        maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)  # [B, h, N, M]
        return (self.change(maps) @ call.value.transpose(1, 2)).transpose(1, 2)


def toy(name="sd unet", batch=2):
    return build(name, batch=batch)


def test_terms_equal_explicit_maps():
    """Refinement by a schedule of words, then reweighting: two rows more, the same as on the maps."""
    model, inputs = toy()
    tokens = inputs["encoder_hidden_states"].shape[1]
    generator = torch.Generator().manual_seed(1)
    right = torch.rand(tokens, tokens, generator=generator).double()
    alpha, times = torch.rand(2, tokens, generator=generator).double()
    weight = torch.ones(tokens).double()
    weight[2] = 3

    def change(maps):
        source, target = maps
        edited = times * (source @ right * alpha + (1 - alpha) * target) + (1 - times) * target
        return torch.stack([source, edited * weight])

    expected_edit = MapEdit(change)
    factor, keep = edits.alignment(right, alpha, times.expand(3, -1))
    mine = [edits.Transfer(factor, keep), edits.Reweight({"word": 3.0}, branch="target")]
    with Control(model, expected_edit, total_steps=2):
        expected = run(model, inputs)
    with Control(model, mine, branches=BRANCHES, words={"word": [2]}, total_steps=2) as control:
        out = run(model, inputs)
    assert (out - expected).abs().max() < 1e-12 * expected.abs().max()
    assert torch.equal(out[0], run(model, inputs)[0]) and "rows 2 → 3" in control.report()


@pytest.mark.parametrize("first", [None, torch.rand(4), torch.rand(4, 4)])
@pytest.mark.parametrize("second", [None, torch.rand(4), torch.rand(4, 4)])
def test_factors_compose(first, second):
    value = torch.rand(1, 4, 2, 3)
    together = apply_right(compose(first, second), value)
    assert torch.allclose(together, apply_right(first, apply_right(second, value)))


@pytest.mark.parametrize("name", ["sd unet", "sdxl unet", "sd3", "flux", "wan", "cogvideox", "videodit joint", "qwen"])
def test_equal_branches_share_and_source_rows_stay(name):
    model, inputs = toy(name)
    plain = run(model, inputs)
    with Control(model, edits.Share("qkv", "image"), branches=BRANCHES) as control:
        out = run(model, inputs)
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])
    assert control.seen and torch.equal(run(model, inputs), plain)


def test_steps_layers_and_scales_choose():
    model, inputs = toy()
    share = edits.Share("qk", where=Where(kinds=("self",), scales=(2,)), schedule=Schedule(steps=(1, 2)))
    with Control(model, share, branches=BRANCHES, total_steps=3) as control:
        for step in range(3):
            run(model, inputs | {"timestep": inputs["timestep"] - 100 * step})
    chosen = [s for s in sites.find(model) if s.kind == "self" and s.level == 1]
    assert set(control.seen) == {s.path for s in chosen} and chosen
    assert all(seen.edits == {str(share): {1}} for seen in control.seen.values())
    assert "steps (1, 2)" in explain(control) and "no map" in explain(control)


def test_steps_of_a_compiled_model_are_two_graphs():
    """One with the edit, one without; the step number is read outside."""
    model, inputs = toy("sd3")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in model.transformer_blocks:
        block.attn.compile(backend=counter)
    found = [edits.KeyMean("text", delta=1.2), edits.Share("q"), edits.Perturb(0.5)]
    for edit in found:
        edit.schedule = Schedule(steps=(0, 3))
    with Control(model, found, branches=BRANCHES, total_steps=6):
        outs = [run(model, inputs | {"timestep": inputs["timestep"] - 10 * step}) for step in range(6)]
    assert counter.frame_count <= 2 * len(model.transformer_blocks) and not torch.equal(outs[0], outs[4])


def test_rows_by_name():
    rows = Rows(8, ("a", "b"), {"uncond": slice(0, 4), "cond": slice(4, 8)})
    assert rows.of("b") == (6, 7) and rows.of("a", "both") == (0, 1, 4, 5) and rows.of(None, "uncond") == (0, 1, 2, 3)
    assert Rows(4, ("a", "b")).of("b") == (2, 3) and Rows(4, (), {"uncond": slice(0, 4)}).of() == ()
    with pytest.raises(ValueError, match="same number of rows"):
        Rows(3, ("a", "b"))
    with pytest.raises(ValueError, match="branch='c'"):
        rows.of("c")


def test_controls_stack_and_leave_after_errors():
    model, inputs = toy("flux kontext", 2)
    found = sites.find(model)
    before, plain = [site.module.processor for site in found], run(model, inputs)
    first, second = edits.KeyMean("reference", delta=1.3), edits.Share("qk", "image")
    with Control(model, first, second, branches=BRANCHES):
        listed = run(model, inputs)
    with Control(model, first), Control(model, second, branches=BRANCHES):
        nested = run(model, inputs)
    assert torch.equal(listed, nested) and not torch.equal(listed, plain)

    class Fails(Edit):
        def out(self, call, plan, out):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), Control(model, Fails()):
        run(model, inputs)
    assert all(a is b.module.processor for a, b in zip(before, found, strict=True))
    assert torch.equal(run(model, inputs), plain) and not model._forward_pre_hooks


BAD = {
    "unknown branch": (lambda: [edits.Share(source="a", to="target")], {}, "uses the branches"),
    "unknown word": (lambda: [edits.Reweight({"dog": 2.0})], {}, r"uses the words \['dog'\]"),
    "maps": (lambda: [edits.SelfMaps()], {}, "maps='allow'"),
    "two owners": (lambda: [edits.MergeTokens(0.2), edits.Extend()], {}, "both own the attention"),
    "no site": (lambda: [edits.Temperature(2.0, where=Where(kinds=("joint",)))], {}, "has no site"),
    "tokenizer": (lambda: [], {"words": {"dog": ("a dog", "dog")}}, "tokenizer of .* is not known"),
    "reference": (lambda: [edits.KeyMean("reference", delta=2.0)], {}, "keys of the stream 'reference'"),
    "twice": (lambda: [], {"branches": ("source", "source")}, "different names"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, options, message = BAD[case]
    model, inputs = toy()
    plain = run(model, inputs)
    with pytest.raises(ValueError, match=message):
        Control(model, make(), **({"branches": BRANCHES} | options)).install()
    assert torch.equal(run(model, inputs), plain)


def test_a_batch_without_the_branches_and_a_later_adapter_are_named():
    model, inputs = toy(batch=3)
    with (
        pytest.raises(ValueError, match="give the pipeline 2 prompts"),
        Control(model, edits.Share(), branches=BRANCHES),
    ):
        run(model, inputs)
    model, inputs = toy()
    with Control(model, edits.Share(), branches=BRANCHES):
        model.set_attn_processor(AttnProcessor2_0())
        with pytest.raises(RuntimeError, match="remove the interception first"):
            run(model, inputs)
    with pytest.raises(TypeError, match="edits must be edits"):
        Control(model, "share")


@pytest.mark.parametrize("name", ["sd unet", "sd3", "flux", "cogvideox", "wan"])
def test_observed_words_are_columns_of_the_map(name):
    model, inputs = toy(name)
    seen = []

    class Maps(Edit):
        def plan(self, context):
            return context

        def out(self, call, plan, out):
            text, image = plan.span(call, "text", keys=True), plan.span(call, "image", keys=False)
            if text is not None and image is not None:
                query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
                maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
                words = maps[:, :, image[0] : image[1], [text[0] + 1, text[0] + 3]].sum(-1).mean(1)
                grid = plan.layout.grid_of(plan.site)
                seen.append(words.unflatten(-1, grid))
            return out

    mask = edits.WordMask("word")
    with Control(model, Maps(), mask, words={"word": [1, 3]}):
        run(model, inputs)
    largest = max((x.shape for x in seen), key=lambda shape: shape.numel())
    expected = torch.stack([resize(x[:, None].float(), largest[1:])[:, 0] for x in seen]).mean(0)
    assert torch.allclose(mask.maps[:, 0], expected, atol=1e-6) and mask.value.dtype == torch.bool


def test_gradients_flow_into_observed_words():
    model, inputs = toy()
    mask = edits.WordMask("word")
    latents = inputs["sample"].clone().requires_grad_()
    with Control(model, mask, words={"word": [1]}):
        model(**inputs | {"sample": latents})
    (gradient,) = torch.autograd.grad(mask.maps.sum(), latents)
    assert gradient.abs().max() > 0


def test_every_mistake_is_one_sentence_and_leaves_the_generator():
    """Words, boxes, masks, guidance, a second owner, a later adapter: named before or at the first forward."""
    model, inputs = toy()
    plain, processors = run(model, inputs), [site.module.processor for site in sites.find(model)]
    pair, words = {"branches": BRANCHES}, {"words": {"word": [1]}}
    masks = torch.ones(2, 6, 8)
    unguided = {"pipe": SimpleNamespace(components={"unet": model}, do_classifier_free_guidance=False)}
    mistakes = {
        "has no word 'tiger'": lambda: {"words": {"x": ("a dog", "tiger", StubTokenizer())}},
        r"words\['x'\]=3 must be token numbers": lambda: {"words": {"x": 3}},
        "shares the token": lambda: {"words": {"x": ("a dog, cat", "dog", Glued())}},
        "inside of the image": lambda: {"edits": [recipes.bacon({"word": (0.5, 0, 1.5, 1)}, scale=2)]} | words,
        "one for each of the 2 regions": lambda: {"edits": [edits.Visible({}, masks, ("word",))]} | words,
        "must not overlap": lambda: {"edits": [edits.Sharpen(masks)]},
        r"must be \[regions, height, width\]": lambda: {"edits": [edits.Sharpen(torch.ones(6, 8))]},
        "have frames": lambda: {"edits": [edits.Sharpen(masks[:1, None])]},
        "guidance is off": lambda: {"edits": [edits.Contexts(torch.zeros(1, 7, 12), masks[:1], base="uncond")]},
        "uses the branches": lambda: {"edits": [edits.Share()]},
        r"must be \[\.\.\., height, width\]": lambda: {"edits": [edits.Share(where_tokens=torch.ones(48))]} | pair,
        "'uncond'; guidance is off": lambda: {"edits": [edits.Perturb(0.5, guidance="uncond")]} | unguided,
        "of their own, and guidance is off": lambda: (
            {"edits": [edits.RowGuidance({"source": 2.0})], "branches": BRANCHES} | unguided
        ),
        "give the pipeline 3 prompts": lambda: {"edits": [edits.Perturb(0.5)], "branches": ("a", "b", "c")},
    }
    for message, make in mistakes.items():
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            options = make()
            with Control(options.pop("pipe", model), *options.pop("edits", ()), **options):
                run(model, inputs)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300, message
        assert all(a is s.module.processor for a, s in zip(processors, sites.find(model), strict=True)), message
        assert torch.equal(run(model, inputs), plain), message
        assert not model._forward_pre_hooks and not model._forward_hooks, message
    second = Control(model, edits.MergeTokens(0.2))
    with Control(model, edits.Extend(), **pair):
        before = run(model, inputs)
        with pytest.raises(ValueError, match="owned by another interception already; remove that one first"):
            second.install()
        assert torch.equal(run(model, inputs), before) and not second.installed
    assert torch.equal(run(model, inputs), plain)


FAR = {
    "WordMask": lambda: edits.WordMask("far"),
    "Reweight": lambda: edits.Reweight({"far": 2.0}),
    "Emphasize": lambda: edits.Emphasize("far", 0.1),
    "RegionBias": lambda: edits.RegionBias(torch.ones(1, 6, 8), ("far",), strength=1.0),
    "Sharpen": lambda: edits.Sharpen(torch.ones(1, 6, 8), words=("far",)),
    "Visible": lambda: edits.Visible(
        {("image", "entity"): "region"}, torch.ones(1, 6, 8), ("far",), where=Where(kinds=("cross",))
    ),
    "Regulate": lambda: edits.Regulate("far", where=Where(kinds=("cross",))),
}


@pytest.mark.parametrize("name", FAR)
def test_words_past_the_end_of_the_text_are_named(name):
    model, inputs = toy()
    plain = run(model, inputs)
    control = Control(model, FAR[name](), words={"far": [99]}, maps="allow")
    with pytest.raises(ValueError, match=r"word 'far' is token 99 of 7 text tokens at \S+$"), control:
        run(model, inputs)
    assert torch.equal(run(model, inputs), plain) and not model._forward_pre_hooks


def test_an_adapter_that_is_loaded_later_is_named_and_one_before_is_refused():
    model, inputs = toy()
    site = next(site for site in sites.find(model) if site.kind == "cross")
    adapter = IPAdapterAttnProcessor2_0(hidden_size=site.heads * site.head_dim, cross_attention_dim=12)
    inner = site.module.processor
    control = Control(model, edits.Reweight({"word": 2.0}), words={"word": [1]})
    with control:
        site.module.set_processor(adapter)
        with pytest.raises(RuntimeError, match="IP-Adapter or set_attn_processor"):
            run(model, inputs)
    assert site.module.processor is adapter  # what came later stays
    with pytest.raises(ValueError, match="a processor with weights"):
        control.install()
    site.module.set_processor(inner)
    assert not control.installed and all(type(s.module.processor) is type(inner) for s in sites.find(model))


class Largest(TorchDispatchMode):
    """Notes whether anything of queries x keys is made."""

    def __init__(self, queries):
        super().__init__()
        self.queries, self.found = queries, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() >= 3 and tuple(x.shape[-2:]) in self.queries:
                self.found.add((func._schema.name, tuple(x.shape)))
        return out


def test_no_map_is_made_unless_the_report_says_so():
    """By dispatched operators: nothing has the shape of queries x keys, but for edits with `needs`."""
    model, inputs = build("sd unet", batch=2)
    right = torch.rand(7, 7).double()
    transfer = edits.Transfer(lambda step: right, lambda step: torch.ones(7).double())
    share, louder = edits.Share("qk", where=Where(kinds=("self",))), edits.Reweight({"word": 2.0}, branch="target")
    composed = [transfer, louder, share, edits.WordMask("word"), edits.Perturb(0.5)]
    regions = torch.stack([torch.cat([torch.ones(6, 4), torch.zeros(6, 4)], 1)] * 1)
    soft = [edits.RegionBias(regions, ("word",)), edits.Temperature(2.0), edits.Extend(), edits.Emphasize("word", 0.1)]
    options = {"branches": BRANCHES, "words": {"word": [2]}, "maps": "allow"}
    latents = inputs["sample"].shape[-2:]
    tokens = [latents[0] * latents[1], -(-latents[0] // 2) * -(-latents[1] // 2)]
    shapes = {(n, m) for n in tokens for m in (n, 7)}
    for found, expected in ((composed, False), (soft, False), ([edits.SelfMaps()], True)):
        with Control(model, found, **options) as control, torch.no_grad(), Largest(shapes) as seen:
            model(**inputs)
        assert bool(seen.found) == expected == ("makes maps" in control.report()), (found, seen.found)


class Glued(StubTokenizer):
    """Makes one token of "dog,"."""

    def encode(self, text):
        return [0, 3, 6, 1]

    def decode(self, ids):
        return {3: "a", 6: "dog,"}.get(ids[0], "")
