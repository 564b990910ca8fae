"""Sites: every attention of every generator is found, can be intercepted without a trace, and is given back."""

from math import prod
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from foveal.zoo import accelerate, sites
from foveal.zoo.sites.intercept import InterceptedProcessor
from foveal.zoo.sites.schedule import Clock, branch_rows, step_number
from generators import GENERATORS, build, run, wan
from torch import nn
from torch._dynamo.testing import CompileCounter

LAYERS = {  # main sites, other sites
    "wan": (2, 2), "wan i2v": (1, 1), "wan ti2v": (1, 1), "hunyuan": (2, 1), "hunyuan 1.5": (1, 1), "cogvideox": (2, 0),
    "cogvideox 1.5": (1, 0), "ltx": (2, 2), "ltx2": (1, 5), "mochi": (2, 0), "cosmos": (2, 2), "latte": (4, 2),
    "allegro": (1, 1), "flux": (3, 0), "flux kontext": (3, 0), "flux2": (2, 0), "sd3": (3, 0), "qwen": (2, 0),
    "hidream": (2, 0), "hidream wide": (2, 0), "z-image": (2, 2), "sd unet": (7, 7), "sdxl unet": (8, 8),
    "motion unet": (21, 7),
    "videodit": (2, 2), "videodit joint": (2, 0),
}  # fmt: skip


def same(call, following):
    return following(call)


def halve(call, following):
    return 0.5 * following(call)


def main_sites(model):
    return [site for site in sites.find(model) if site.operations[0].main and site.kind != "refine"]


@pytest.mark.parametrize("name", GENERATORS)
def test_generator(name):
    """Identity is bit-equal, a change shows, and what was there comes back, after an error and when nested, too."""
    model, inputs = build(name, batch=2)
    found = sites.find(model)
    mine = main_sites(model)
    assert (len(mine), len(found) - len(mine)) == LAYERS[name]
    layers = [site.layer for site in mine]
    assert layers == sorted(layers) and set(layers) == set(range(max(layers) + 1))
    processors, plain = [site.module.processor for site in found], run(model, inputs)
    seen, layouts = set(), {}

    def look(call, following):
        site, operation = call.site, call.operation
        assert call.query.shape[2:] == (site.heads, site.head_dim)
        for streams, x in ((operation.queries, call.query), (operation.keys, call.key)):
            spans = layouts[site.path].spans(site, streams, x.shape[1])
            assert list(spans) == list(streams) and list(spans.values())[-1][1] == x.shape[1]
        if operation.main and site.kind != "refine":
            first, end = layouts[site.path].spans(site, operation.queries, call.query.shape[1])[operation.main]
            assert end - first == prod(layouts[site.path].grid_of(site))
        seen.add(site.path)
        return following(call)

    def remember(site, layout, moment):
        layouts[site.path] = layout
        return True

    with sites.Interception(model, look, plan=remember):
        assert torch.equal(run(model, inputs), plain)
        with sites.Interception(model, halve, sites=mine):
            changed = run(model, inputs)
            assert (changed - plain).abs().max() > 1e-6 * plain.abs().max()
        assert torch.equal(run(model, inputs), plain)
    assert seen == {site.path for site in found}

    def fail(call, following):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), sites.Interception(model, fail):
        run(model, inputs)
    assert all(a is b.module.processor for a, b in zip(processors, found, strict=True))
    assert not model._forward_pre_hooks and "cache_context" not in vars(model)
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", ["flux", "sd unet", "cogvideox"])
def test_interceptions_leave_in_any_order(name):
    model, inputs = build(name)
    processors, plain = [s.module.processor for s in sites.find(model)], run(model, inputs)
    first, second = sites.Interception(model, halve), sites.Interception(model, halve)
    first.install()
    once = run(model, inputs)
    second.install()
    twice = run(model, inputs)
    first.remove()
    assert torch.equal(run(model, inputs), once) and not torch.equal(once, twice)
    second.remove()
    second.remove()
    assert torch.equal(run(model, inputs), plain)
    assert all(a is b.module.processor for a, b in zip(processors, sites.find(model), strict=True))


def test_owners_come_last_and_alone():
    model, inputs = build("wan")
    order = []

    def note(name):
        return lambda call, following: order.append(name) or following(call)

    chosen = sites.select(sites.find(model), kinds=["self"], layers=[0])
    with sites.Interception(model, note("owner"), sites=chosen, owner=True):
        with sites.Interception(model, note("edit"), sites=chosen):
            run(model, inputs)
        with pytest.raises(ValueError, match=r"blocks.0.attn1 is owned by another interception"):
            sites.Interception(model, same, owner=True).install()
        assert not isinstance(model.blocks[1].attn1.processor, InterceptedProcessor), "all or nothing"
    assert order == ["edit", "owner"]


def test_the_users_backend_computes_what_stays_dense(monkeypatch):
    from diffusers.models import attention_dispatch

    model, inputs = build("wan")
    used = []
    dispatch = attention_dispatch.dispatch_attention_fn
    monkeypatch.setattr(
        attention_dispatch,
        "dispatch_attention_fn",
        lambda *args, backend=None, **kwargs: used.append(backend) or dispatch(*args, backend=backend, **kwargs),
    )
    with sites.Interception(model, same):
        for block in model.blocks:
            block.attn1.set_attention_backend("_native_math")
        run(model, inputs)
    assert used.count("_native_math") == 2
    assert all(block.attn1.processor._attention_backend == "_native_math" for block in model.blocks)


def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    model, inputs = build("wan")
    for loaded_first in (True, False):
        plain = run(model, inputs)
        interception = sites.Interception(model, halve)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        if loaded_first:
            model.add_adapter(config, "a")
        interception.install()
        if not loaded_first:
            model.add_adapter(config, "a")
        assert not torch.equal(run(model, inputs), plain)
        interception.remove()
        adapted = run(model, inputs)
        assert not torch.equal(adapted, plain)
        model.delete_adapters("a")
        assert torch.equal(run(model, inputs), plain)


def test_offload_hooks_before_and_after():
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            counts.append(1)
            return args, kwargs

    counts = []
    model, inputs = build("wan")
    plain = run(model, inputs)
    for order in ("hook first", "interception first"):
        interception = sites.Interception(model, halve)
        steps = [lambda: hooks.add_hook_to_module(model, Count()), interception.install]
        for step in steps if order == "hook first" else steps[::-1]:
            step()
        assert not torch.equal(run(model, inputs), plain)
        undo = [interception.remove, lambda: hooks.remove_hook_from_module(model)]
        for step in undo if order == "hook first" else undo[::-1]:
            step()
            run(model, inputs)
        assert torch.equal(run(model, inputs), plain)
    assert len(counts) == 3


class Mine(WanAttnProcessor):
    pass


def test_what_cannot_be_intercepted_is_said():
    with pytest.raises(ValueError, match="AutoencoderTiny is not a generator with known attentions"):
        sites.find(diffusers.AutoencoderTiny())
    with pytest.raises(TypeError, match=r"pipe_or_model is a str; expected a pipeline or a model"):
        sites.find("wan")
    model, _ = build("wan")
    model.blocks[1].attn1.set_processor(Mine())
    with pytest.raises(ValueError, match=r"blocks.1.attn1 has Mine of .*neither diffusers' nor ours"):
        sites.Interception(model, same).install()
    assert not isinstance(model.blocks[0].attn1.processor, InterceptedProcessor)
    sites.Interception(model, same, sites=sites.select(sites.find(model), layers=[0])).install()
    with pytest.raises(ValueError, match=r"layers=\[2\] must be within the 2 layers"):
        sites.Interception(model, same, schedule=sites.Schedule(layers=[2]))
    with pytest.raises(ValueError, match=r"heads=\(5,\) must be within the 2 heads"):
        sites.Interception(model, same, schedule=sites.Schedule(heads=[5]))
    with pytest.raises(ValueError, match=r"kinds=\['selves'\] must be some of"):
        sites.select(sites.find(model), kinds=["selves"])


def test_processors_that_change_later_are_said():
    model, inputs = build("sd unet")
    with sites.Interception(model, same):
        model.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match=r"attn1 was given FusedAttnProcessor2_0 after the interception"):
            run(model, inputs)
    fused = run(model, inputs)
    with sites.Interception(model, same):
        assert torch.equal(run(model, inputs), fused), "fused before is fine"


def test_attention_that_is_not_the_operation_is_said():
    model, inputs = build("sd unet")
    model.set_default_attn_processor()
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with sites.Interception(model, same), pytest.raises(RuntimeError, match=r"AttnProcessor ran no scaled_dot_product"):
        run(model, inputs)


def test_rings_are_refused():
    model, _ = build("wan")
    config = diffusers.ContextParallelConfig(ring_degree=2)
    model.blocks[1].attn1.processor._parallel_config = diffusers.ParallelConfig(context_parallel_config=config)
    with pytest.raises(ValueError, match=r"blocks.1.attn1 attends in a ring of ring_degree=2"):
        sites.Interception(model, same).install()


def test_image_adapters_are_refused_where_they_are_and_left_alone_elsewhere():
    """IP-Adapters: of a UNet in cross-attention, of Flux in every attention of its double blocks."""
    model, inputs = build("sd unet")
    adapters = {}
    for name, processor in model.attn_processors.items():
        attention = model.get_submodule(name.removesuffix(".processor"))
        if ".attn2." in name:
            sizes = {"hidden_size": attention.inner_dim, "cross_attention_dim": attention.cross_attention_dim}
            processor = IPAdapterAttnProcessor2_0(**sizes, num_tokens=(2,)).double()
        adapters[name] = processor
    model.set_attn_processor(dict(adapters))  # which it empties
    project = nn.Linear(5, 2 * model.config.cross_attention_dim).double()
    model.encoder_hid_proj = lambda images: [project(image).unflatten(-1, (2, -1))[:, None] for image in images]
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(len(inputs["sample"]), 5, dtype=torch.float64)]}
    plain = run(model, inputs)
    with pytest.raises(ValueError, match=r"attn2 has IPAdapterAttnProcessor2_0, a processor with weights"):
        sites.Interception(model, same).install()
    chosen = sites.select(sites.find(model), kinds=["self"])
    with sites.Interception(model, same, sites=chosen):
        assert torch.equal(run(model, inputs), plain)
        assert model.attn_processors.keys() == adapters.keys()
        with sites.Interception(model, halve, sites=chosen):
            assert not torch.equal(run(model, inputs), plain)
    assert all(processor is adapters[name] for name, processor in model.attn_processors.items())

    model, _ = build("flux")
    adapter = FluxIPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=16)
    model.transformer_blocks[0].attn.processor = adapter
    with pytest.raises(ValueError, match=r"blocks.0.attn has FluxIPAdapterAttnProcessor, a processor with weights"):
        accelerate(model, {"window": 2})
    assert model.transformer_blocks[0].attn.processor is adapter
    assert not isinstance(model.single_transformer_blocks[0].attn.processor, InterceptedProcessor), "all or nothing"


def test_schedule_by_steps_noise_heads():
    model, inputs = build("wan")
    plain = run(model, inputs)
    start = inputs["timestep"]

    def changed(**options):
        total = options.pop("total_steps", None)
        with sites.Interception(model, halve, schedule=sites.Schedule(**options), total_steps=total):
            flags = []
            for k in (0, 0, 1, 2, 3, 0):  # two branches at step 0, then a second run
                inputs["timestep"] = start * (1 - k / 4)
                with_it = run(model, inputs)
                flags.append((with_it, inputs["timestep"].clone()))
        outs = []
        for out, timestep in flags:
            inputs["timestep"] = timestep
            outs.append(not torch.equal(out, run(model, inputs)))
        inputs["timestep"] = start
        return outs

    assert changed(steps=(1, 3)) == [False, False, True, True, False, False]
    assert changed(steps=(0.25, None), total_steps=4) == [False, False, True, True, True, False]
    assert changed(steps=(None, 0.01), total_steps=4) == [True, True, False, False, False, True]
    assert changed(steps=(None, -1), total_steps=4) == [True, True, True, True, False, True]
    assert changed(noise=(0.2, 0.4)) == [False, False, True, True, False, False]
    with pytest.raises(ValueError, match="total_steps="):
        changed(steps=(0.5, None))
    for wrong in (
        {"steps": (1.5, None)}, {"steps": (True, 2)}, {"noise": (0.5, 0.2)}, {"branches": ["both"]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            sites.Schedule(**wrong)
    assert torch.equal(run(model, inputs), plain)

    outs = {}
    for heads in ([0], [1], [0, 1]):
        with sites.Interception(model, halve, schedule=sites.Schedule(heads=heads)):
            outs[tuple(heads)] = run(model, inputs)
    with sites.Interception(model, halve):
        torch.testing.assert_close(outs[0, 1], run(model, inputs))
    assert not torch.equal(outs[0,], outs[1,])


def test_schedule_by_branches():
    model, inputs = build("wan", batch=2)
    plain = run(model, inputs)
    only = sites.Schedule(branches=["cond"])
    with sites.Interception(model, halve, schedule=only):
        with model.cache_context("uncond"):
            assert torch.equal(run(model, inputs), plain)
        with model.cache_context("cond"):
            assert not torch.equal(run(model, inputs), plain)
        with pytest.raises(ValueError, match=r"branches=\('cond',\) cannot be told apart"):
            run(model, inputs)

    guided = SimpleNamespace(components={"transformer": model}, do_classifier_free_guidance=True)
    with sites.Interception(guided, halve, schedule=only):
        out = run(model, inputs)
    torch.testing.assert_close(out[0], plain[0], rtol=1e-12, atol=1e-12)
    assert (out[1] - plain[1]).abs().max() > 1e-3
    assert branch_rows(None, 3, True) is None and branch_rows(None, 3, False) == {"cond": slice(0, 3)}


def test_clock_serves_both_transformers():
    class Pipe:
        def __init__(self):
            self.components = {"transformer": build("wan")[0], "transformer_2": build("wan")[0], "vae": nn.Identity()}
            self._num_timesteps = 4

    pipe = Pipe()
    inputs = wan()[1]
    assert {site.component for site in sites.find(pipe)} == {"transformer", "transformer_2"}
    steps = []
    schedule = sites.Schedule(steps=(0.5, None))

    def plan(site, layout, moment):
        steps.append((site.component, moment.step))
        return True

    chosen = sites.select(sites.find(pipe), kinds=["self"], layers=[0])
    with sites.Interception(pipe, same, schedule=schedule, plan=plan, sites=chosen):
        for k, name in enumerate(["transformer", "transformer", "transformer_2", "transformer_2"]):
            inputs["timestep"] = torch.tensor([900.0 - 200 * k], dtype=torch.float64)
            run(pipe.components[name], inputs)
    assert steps == [("transformer_2", 2), ("transformer_2", 3)]
    assert step_number(0.2, 4) == 1 and step_number(0.0, 4) == 0 and step_number(0.1, 4) == 1
    assert Clock(None, 7).total() == 7


def test_gradients_are_those_of_the_model():
    model, inputs = build("flux")
    model(**inputs).sample.square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with sites.Interception(model, same):
        model(**inputs).sample.square().mean().backward()
    assert expected and all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if n in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "qwen", "ltx", "videodit"])
def test_compiled_blocks(name):
    """One graph more a kind of block when a schedule switches; none for a step."""
    model, inputs = build(name)
    plain = run(model, inputs)
    with sites.Interception(model, halve):
        halved = run(model, inputs)
    torch._dynamo.reset()
    alone, counter = CompileCounter(), CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=alone)
    run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    start = inputs["timestep"]
    with sites.Interception(model, halve, schedule=sites.Schedule(steps=(2, None))):
        for k in range(6):
            inputs["timestep"] = start * (1 - k / 10)
            out = run(model, inputs)
    assert counter.frame_count <= 2 * alone.frame_count
    assert out.isfinite().all()
    inputs["timestep"] = start
    torch.testing.assert_close(run(model, inputs), plain)
    with sites.Interception(model, halve):
        torch.testing.assert_close(run(model, inputs), halved)
