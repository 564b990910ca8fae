"""accelerate: every generator attends to what its plan says, text whole, and is itself again without it."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from foveal.kernels.masks.named import density, mask_names
from foveal.zoo import accelerate, decelerate, sites
from foveal.zoo.accelerate import PRESETS, Plan, load_gates, read_plan
from foveal.zoo.accelerate.presets import as_plan
from foveal.zoo.video import Segments, perturbed_heads
from foveal.zoo.video.segments import segmented
from generators import GENERATORS, build, run, wan
from sparse_plans import block_pairs, two_blocks, window_pairs
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faster-video.md"
SUPPORT = Path(__file__).resolve().parents[1] / "support"


def masked(pairs_of):
    """An interception that attends with a dense mask: what a plan computes, made the plain way."""

    def attend(call, following):
        layout, grid = call.plan
        operation, main = call.operation, call.operation.main
        queries = layout.spans(call.site, operation.queries, call.query.shape[1])
        keys = layout.spans(call.site, operation.keys, call.key.shape[1])
        if main is None:
            return following(call)
        pairs = pairs_of(grid, call.site.heads)
        seen = torch.ones(call.site.heads, call.query.shape[1], call.key.shape[1], dtype=torch.bool)
        seen[:, slice(*queries[main]), slice(*keys[main])] = pairs
        if call.mask is not None:
            seen = seen & (call.mask if call.mask.dtype == torch.bool else call.mask > -1)
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        if seen.dim() == 3:
            seen = seen[None]
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=call.scale)
        return out.transpose(1, 2)

    return attend


def reference(model, inputs, pairs_of):
    mine = [s for s in sites.find(model) if s.operations[0].main and s.kind in ("self", "joint")]
    plan = lambda site, layout, moment: (layout, layout.grid_of(site))  # noqa: E731
    with sites.Interception(model, masked(pairs_of), sites=mine, plan=plan):
        return run(model, inputs)


@pytest.mark.parametrize("name", GENERATORS)
def test_generator(name):
    model, inputs = build(name, batch=2)
    plain = run(model, inputs)
    with accelerate(model, {"window": 99}) as whole:
        assert torch.equal(run(model, inputs), plain), "everything is the model itself, bit for bit"
        assert set(whole.dense.values()) == {"the window covers the grid"} and not whole.sparse
    for plan, pairs_of in (
        ({"window": 3}, lambda grid, heads: window_pairs(grid, 3)),
        ({"mask": two_blocks}, block_pairs),
    ):
        expected = reference(model, inputs, pairs_of)
        assert (expected - plain).abs().max() > 1e-6 * plain.abs().max()
        with accelerate(model, plan) as acceleration:
            torch.testing.assert_close(run(model, inputs), expected, rtol=1e-9, atol=1e-9)
            assert set(acceleration.dense.values()) <= {"the window covers the grid"}, "Latte has three frames"
            assert len(acceleration.sparse) >= (len(acceleration.sites) + 1) // 2
    assert torch.equal(run(model, inputs), plain) and not model._forward_pre_hooks


@pytest.mark.parametrize("grid", [(1, 5, 7), (5, 3, 4), (2, 1, 1)])
def test_odd_grids(grid):
    model, _ = build("wan")
    inputs = wan(grid=grid)[1]
    expected = reference(model, inputs, lambda shape, heads: window_pairs(shape, 2))
    with accelerate(model, {"window": 2}):
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-9, atol=1e-9)


def test_windows_per_head_layer_and_axis():
    model, inputs = build("wan")
    per_head = reference(model, inputs, lambda grid, heads: torch.stack([window_pairs(grid, 1), window_pairs(grid, 3)]))
    with accelerate(model, {"window": [(1, 1, 1), (3, 3, 3)]}):
        torch.testing.assert_close(run(model, inputs), per_head, rtol=1e-9, atol=1e-9)
    with accelerate(model, {"window": (None, 2, 2), "layers": {0: "dense", 1: {"window": 1}}}) as mixed:
        run(model, inputs)
        assert mixed.sparse == {"blocks.1.attn1": "window 1"}
        assert mixed.dense == {"blocks.0.attn1": 'layers[0] is "dense"'}
    with accelerate(model, {"layers": {0: {"window": 2, "stride": 2}}}) as only:
        run(model, inputs)
        assert list(only.sparse) == ["blocks.0.attn1"] and list(only.dense) == ["blocks.1.attn1"]


def test_dense_steps_layers_and_small_grids():
    model, inputs = build("wan")
    plain, start = run(model, inputs), inputs["timestep"]
    with accelerate(model, {"window": 1}, dense_steps=(0.25, 1), dense_layers=[-1], total_steps=4) as acceleration:
        assert "nothing has run yet" in str(acceleration)
        outs, sparse = [], []
        for k in range(4):
            inputs["timestep"] = start * (1 - k / 4)
            outs.append(run(model, inputs))
            sparse.append(dict(acceleration.sparse))
        text = str(acceleration)
    assert [list(x) for x in sparse] == [[], ["blocks.0.attn1"], ["blocks.0.attn1"], []]
    assert torch.equal(outs[0], plain)
    assert "step 3" in text and "dense_layers=(-1,)" in text
    inputs["timestep"] = start
    with accelerate(model, {"window": 1}, noise=(0.0, 0.4)):
        assert torch.equal(run(model, inputs), plain)
        inputs["timestep"] = start * 0.7
        assert not torch.equal(run(model, inputs), plain)
    inputs["timestep"] = start
    with accelerate(model, {"window": 1}, min_tokens=49) as small:
        assert torch.equal(run(model, inputs), plain)
        assert small.dense["blocks.0.attn1"] == "48 tokens < min_tokens=49"
    with accelerate(model, {"window": 1}, dense_steps=0.5), pytest.raises(ValueError, match="total_steps="):
        run(model, inputs)


def test_reasons_of_the_model_itself():
    model, inputs = build("allegro")
    inputs["attention_mask"] = torch.ones(1, 3, 8, 8)
    with accelerate(model, {"window": 1}) as acceleration:
        run(model, inputs)
    assert set(acceleration.dense.values()) == {"the model was given attention_mask"}
    model, inputs = build("ltx")
    del inputs["num_frames"]
    inputs["video_coords"] = torch.zeros(1, 3, 48)
    with accelerate(model, {"window": 1}) as acceleration:
        run(model, inputs)
    assert set(acceleration.dense.values()) == {"the model was not given num_frames, height and width"}


def test_a_new_plan_replaces_the_old_one():
    model, inputs = build("flux")
    plain = run(model, inputs)
    first = accelerate(model, {"window": 1})
    second = accelerate(model, {"window": 3})
    assert not first.interception.installed and second.interception.installed
    with pytest.raises(ValueError, match=r"window has entries for 3 heads; transformer_blocks.0.attn has 2"):
        accelerate(model, {"window": [(1, 1), (2, 2), (3, 3)]})
    assert second.interception.installed, "nothing changes when a plan is refused"
    decelerate(model)
    decelerate(model)
    assert torch.equal(run(model, inputs), plain)


def test_gradients():
    model, inputs = build("wan")
    with accelerate(model, {"window": 2}):
        model(**inputs).sample.square().mean().backward()
    for block in model.blocks:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.attn1.parameters())
        assert block.attn1.to_q.weight.grad.abs().sum() > 0


def test_checkpointing_recomputes_the_same():
    model, inputs = build("wan")
    grads = []
    with accelerate(model, {"window": 2}):
        for checkpointing in (False, True):
            if checkpointing:
                model.train().enable_gradient_checkpointing()
            model(**inputs).sample.square().mean().backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_caches_across_steps_stay_usable():
    model, inputs = build("wan")
    with accelerate(model, {"window": 3}):
        expected = run(model, inputs)
    plain = run(model, inputs)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with accelerate(model, {"window": 3}), model.cache_context("cond"):
        assert torch.equal(run(model, inputs), expected)
    model.disable_cache()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", ["videodit", "videodit joint"])
def test_guidance_and_segments_of_videodit_go_along(name):
    model, inputs = build(name)
    processors = dict(model.attn_processors)
    with accelerate(model, {"window": 3}):
        expected = run(model, inputs)
        with perturbed_heads(model, {1: [0]}, strength=0.0):
            torch.testing.assert_close(run(model, inputs), expected)
        with perturbed_heads(model, {1: [0]}, strength=0.7):
            assert not torch.allclose(run(model, inputs), expected)
        with segmented(model, Segments((3,), (5,))):
            torch.testing.assert_close(run(model, inputs), run(model, inputs))
        assert torch.equal(run(model, inputs), expected)
    with segmented(model, Segments((1, 2), (2, 3))):
        plain = run(model, inputs)
        with accelerate(model, {"window": 99}):
            torch.testing.assert_close(run(model, inputs), plain)
    assert all(a is b for a, b in zip(processors.values(), model.attn_processors.values(), strict=True))


@pytest.mark.slow
def test_ulysses():
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(SUPPORT / "ulysses_ranks.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout.count("equal") == 2, done.stderr[-2000:]


def test_plans_are_files(tmp_path):
    plan = Plan(window=(6, None, 16), stride=(1, 8, 8), dense_steps=(0.2, 1), layers={3: "dense"}, name="mine")
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.yaml").write_text("window: [6, null, 16]\nstride: [1, 8, 8]\ndense_steps: 4\n")
    again = read_plan(tmp_path / "plan.json")
    assert again.words == plan.words and again.layers == {3: "dense"} and tuple(again.dense_steps) == (0.2, 1)
    assert as_plan(tmp_path / "plan.yaml", min_tokens=5).min_tokens == 5
    assert as_plan(str(tmp_path / "plan.yaml")).dense_steps == 4
    Plan(mask=density).save(tmp_path / "function.json")
    assert read_plan(tmp_path / "function.json").mask == "foveal.kernels.masks.named:density"
    with pytest.raises(TypeError, match="not in a module"):
        Plan(mask=lambda query, key, grid: None).save(tmp_path / "no.json")


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    plan = as_plan(name)
    assert plan.name == name and "arXiv:" in plan.source
    assert f"`{name}`" in PAGE.read_text(), "documented"
    assert plan.mask is None or plan.mask in mask_names()


WRONG = {
    "neither": ({}, "a plan has one of them"),
    "both": ({"window": 3, "mask": two_blocks}, "a plan has one of them"),
    "window": ({"window": 0}, "window=0 must be"),
    "four axes": ({"window": (1, 1, 1, 1)}, "must be an integer from 1 on, or one per axis"),
    "budget": ({"mask": two_blocks, "budget": 0.0}, r"budget=0.0 must be in \(0, 1\]"),
    "dense_steps": ({"window": 3, "dense_steps": 1.5}, "dense_steps=1.5 must be"),
    "dense_steps negative": ({"window": 3, "dense_steps": -2}, "dense_steps=-2 must be"),
    "dense_layers": ({"window": 3, "dense_layers": 2}, "dense_layers=2 must be a list"),
    "unknown layer": ({"window": 3, "dense_layers": [2]}, r"layers=\[2\] must be within the 2 layers"),
    "min_tokens": ({"window": 3, "min_tokens": -1}, "min_tokens=-1 must be"),
    "noise": ({"window": 3, "noise": (1, 0)}, "noise="),
    "skip of a window": ({"window": 3, "skip_threshold": 0.1}, "skip_threshold=0.1 must be in .*, with a mask"),
    "skip_threshold": ({"mask": two_blocks, "skip_threshold": 0}, r"skip_threshold=0 must be in \(0, 1\]"),
    "field": ({"windows": 3}, r"a plan has no \['windows'\]"),
    "layer entry": ({"window": 3, "layers": {0: {"steps": 3}}}, r"layers\[0\]="),
    "mask name": ({"mask": "nobody"}, "mask='nobody' must be one of"),
    "gates": ({"mask": two_blocks, "gated": True}, "blocks.0.attn1 has no to_gate_compress"),
}


@pytest.mark.parametrize(("plan", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_plan(plan, message):
    model, _ = build("wan")
    with pytest.raises(ValueError, match=message):
        accelerate(model, plan)
    assert not model._forward_pre_hooks


def test_unknown_plan_names_what_is_known():
    with pytest.raises(ValueError, match=r"plan='fast' must be a Plan, a mapping, a file, or one of .*radial_wan21"):
        accelerate(build("wan")[0], "fast")


def test_gates_are_loaded(tmp_path):
    from safetensors.torch import save_file

    model, _ = build("wan")
    dim = model.blocks[0].attn1.to_q.in_features
    shapes = (("weight", (dim, dim)), ("bias", (dim,)))
    state = {f"blocks.{i}.to_gate_compress.{n}": torch.randn(*s) for i in range(2) for n, s in shapes}
    save_file(state | {"blocks.0.other": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert load_gates(model, tmp_path) == 2
    gate = model.blocks[1].attn1.to_gate_compress
    assert torch.equal(gate.weight.float(), state["blocks.1.to_gate_compress.weight"])
    assert gate.weight.dtype is torch.float64
    with pytest.raises(ValueError, match="it was not trained with VSA"):
        load_gates(model, {"blocks.0.attn1.to_q.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"gates for layers \[0\]; the model has layers \[0, 1\]"):
        load_gates(model, {"blocks.0.to_gate_compress.weight": torch.zeros(dim, dim)})
    with pytest.raises(ValueError, match=r"blocks.0.to_gate_compress.weight has shape \(3, 3\); the model needs"):
        load_gates(model, {f"blocks.{i}.to_gate_compress.weight": torch.zeros(3, 3) for i in range(2)})


def test_gated_vsa_adds_the_coarse_branch():
    model, inputs = build("wan")
    dim = model.blocks[0].attn1.to_q.in_features
    load_gates(model, {f"blocks.{i}.to_gate_compress.weight": torch.zeros(dim, dim) for i in range(2)})
    options = {"sparsity": 0.5, "block": 2}
    with accelerate(model, {"mask": "vsa", "options": options}):
        alone = run(model, inputs)
    with accelerate(model, {"mask": "vsa", "options": options, "gated": True}):
        assert torch.equal(run(model, inputs), alone), "gates of zero are the sparse branch"
        for block in model.blocks:
            torch.nn.init.eye_(block.attn1.to_gate_compress.weight)
        assert not torch.equal(run(model, inputs), alone)


def test_blocks_of_a_mask_are_skipped():
    model, inputs = build("wan")
    plan = {"mask": "vsa", "options": {"block": 2, "sparsity": 0.3}}
    with accelerate(model, plan):
        masked_only = run(model, inputs)
    with accelerate(model, plan | {"skip_threshold": 1e-30}):
        torch.testing.assert_close(run(model, inputs), masked_only)
    with accelerate(model, plan | {"skip_threshold": 1.0}):
        assert not torch.allclose(run(model, inputs), masked_only)
    assert Plan(**plan, skip_threshold=0.5, layers={0: {"window": 3}}).of_layer(0).skip_threshold is None


@pytest.mark.parametrize(
    ("mask", "options"),
    [("sta", {"tile": 2, "window": 1}), ("clear", {"radius": 1, "block": 2}), ("vsa", {"block": 2, "sparsity": 0.6})],
)
def test_masks_by_name(mask, options):
    model, inputs = build("wan", batch=2)
    plain = run(model, inputs)
    with accelerate(model, {"mask": mask, "options": options}) as acceleration:
        assert not torch.equal(run(model, inputs), plain)
        assert len(acceleration.sparse) == 2
    with pytest.raises(ValueError, match=rf"mask '{mask}' has no \['radii'\]"):
        accelerate(model, {"mask": mask, "options": {"radii": 3}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
@pytest.mark.parametrize("plan", [{"window": 3}, {"mask": two_blocks}], ids=["window", "mask"])
def test_compiled_blocks(name, plan):
    model, inputs = build(name)
    start = inputs["timestep"]
    with accelerate(model, plan):
        expected = run(model, inputs)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager")
    with accelerate(whole, plan), torch.no_grad():
        torch.testing.assert_close(whole(**inputs, return_dict=False)[0], expected)
    torch._dynamo.reset()
    alone, counter = CompileCounter(), CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=alone)
    run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with accelerate(model, plan, dense_steps=2):
        for k in range(6):
            inputs["timestep"] = start * (1 - k / 10)
            run(model, inputs)
    assert counter.frame_count <= 2 * alone.frame_count
    inputs["timestep"] = start
    with accelerate(model, plan):
        torch.testing.assert_close(run(model, inputs), expected)
