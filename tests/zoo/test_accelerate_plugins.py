"""Plug-ins keep the contracts of their sockets: vLLM-Omni's SPARSE_ATTN slot and ComfyUI's attention override."""

import asyncio
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from foveal.kernels.ops import na3d
from foveal.zoo.accelerate import Plan
from foveal.zoo.accelerate.comfyui import SparseOverride, comfy_entrypoint, parse_blocks
from sparse_plans import two_blocks
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]
GRID = (3, 4, 6)


def qkv(dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 72, 2, 16, generator=generator).to(dtype) for _ in range(3)]


def dense(query, key, value):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first).transpose(1, 2)


def windowed(query, key, value, window=3):
    return na3d(query, key, value, window=window, grid=GRID)


def slot():
    """The callable that the entry point names."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm_omni.sparse_attn"]
    ((name, place),) = points.items()
    assert name.startswith("foveal")
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


GEOMETRY = {"latent_shape": torch.tensor([[3, 8, 12]] * 2), "patch_size": torch.tensor([[1, 2, 2]] * 2)}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"window": [3, 3, 3]}, windowed),
        ({"window": 3, "denoise_step_idx": torch.tensor([5, 5]), "dense_steps": 5}, windowed),
        ({"window": 3, "denoise_step_idx": torch.tensor([4, 4]), "dense_steps": 5}, dense),
        ({"window": 3, "denoise_step_idx": 4, "total_denoise_steps": 20, "dense_steps": 0.25}, dense),
        ({"window": list(GRID)}, dense),
        ({"window": 3, "min_tokens": 73}, dense),
        ({"window": 3, "latent_shape": torch.tensor([[3, 8, 14]])}, dense),
        ({"window": 3, "latent_shape": None}, dense),
        ({"window": 3, "latent_shape": torch.tensor([[3, 8, 12], [3, 12, 8]])}, dense),
        ({"window": 3, "attn_mask": torch.ones(2, 72, dtype=torch.bool)}, dense),
    ],
)
def test_vllm_omni(params, expected):
    fn, (query, key, value) = slot(), qkv()
    assert fn.capabilities["supports_attention_mask"]
    out = fn(query, key, value, GEOMETRY | params, is_causal=False, softmax_scale=16**-0.5)
    torch.testing.assert_close(out, expected(query, key, value))


def test_vllm_omni_masks_and_errors():
    fn, (query, key, value) = slot(), qkv(torch.bfloat16)
    out = fn(query, key, value, GEOMETRY | {"mask": two_blocks}, is_causal=False, softmax_scale=0.25)
    assert out.shape == query.shape and not torch.allclose(out, dense(query, key, value), atol=0.05)
    hidden = torch.ones(2, 72, dtype=torch.bool)
    hidden[:, 40:] = False
    out = fn(query, key, value, {"window": 3, "attn_mask": hidden}, is_causal=False, softmax_scale=0.25)
    torch.testing.assert_close(out, dense(query, key[:, :40], value[:, :40]), atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="a plan has one of them"):
        fn(query, key, value, GEOMETRY, is_causal=False, softmax_scale=0.25)


def comfy_attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """ComfyUI's own, with its layouts."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("heads_first", [False, True])
def test_comfyui_layouts(heads_first):
    q, k, v = qkv()
    expected = windowed(q, k, v)
    shaped = [x.transpose(1, 2) if heads_first else x.flatten(-2) for x in (q, k, v)]
    options = {"grid_sizes": GRID, "sigmas": torch.tensor([0.5]), "block_index": 1}
    override = SparseOverride(Plan(window=3), (0.8, 0.0), {0})
    out = override(
        comfy_attention, *shaped, 2, skip_reshape=heads_first, skip_output_reshape=heads_first,
        transformer_options=options,
    )  # fmt: skip
    torch.testing.assert_close(out, expected.transpose(1, 2) if heads_first else expected.flatten(-2))


@pytest.mark.parametrize(
    "change",
    [
        {"grid_sizes": None}, {"grid_sizes": (3, 4, 7)}, {"sigmas": torch.tensor([0.9])}, {"block_index": 0},
        {"mask": torch.ones(1, 1, 1, 72, dtype=torch.bool)}, {"keys": 30}, {"min_tokens": 73}, {"window": 99},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_comfyui_declines(change, caplog):
    q, k, v = (x.flatten(-2) for x in qkv())
    k, v = (x[:, : change.get("keys", 72)] for x in (k, v))
    options = {"grid_sizes": GRID, "sigmas": torch.tensor([0.5]), "block_index": 1} | change
    plan = Plan(window=change.get("window", 3), min_tokens=change.get("min_tokens", 0))
    called = []

    def previous(func, *args, **kwargs):
        called.append(func)
        return func(*args, **kwargs)

    override = SparseOverride(plan, (0.8, 0.0), {0}, previous, verbose=True)
    with caplog.at_level("INFO"):
        for _ in range(2):
            out = override(comfy_attention, q, k, v, 2, mask=change.get("mask"), transformer_options=options)
    torch.testing.assert_close(out, comfy_attention(q, k, v, 2))
    assert called == [comfy_attention] * 2 and len(caplog.records) == 1, "a reason is told once per shape"


def test_comfyui_node(monkeypatch):
    class Field:
        class Input(SimpleNamespace):
            def __init__(self, id, **options):
                super().__init__(id=id, **options)

        class Output:
            pass

    io = SimpleNamespace(
        ComfyNode=object, Schema=SimpleNamespace, NodeOutput=lambda *x: x, Model=Field, Int=Field, Float=Field,
        String=Field, Boolean=Field,
    )  # fmt: skip
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    (node,) = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    inputs = node.define_schema().inputs
    values = {x.id: getattr(x, "default", None) for x in inputs}

    class Patcher:
        def __init__(self, options):
            self.model_options = options

        def clone(self):
            return Patcher(dict(self.model_options))

        def get_model_object(self, name):
            return SimpleNamespace(percent_to_sigma=lambda percent: 1 - percent)

    mine = Patcher({"transformer_options": {"optimized_attention_override": "before"}})
    (patched,) = node.execute(**values | {"model": mine, "dense_blocks": "0, 2-3"})
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    assert override.previous == "before" and override.dense_blocks == {0, 2, 3} and override.sigmas == (0.8, 0.0)
    assert override.plan.window == (6, 16, 16) and override.plan.min_tokens == 12288
    assert mine.model_options["transformer_options"]["optimized_attention_override"] == "before", "clones share nothing"


def test_numbers_of_blocks():
    assert parse_blocks("") == set() and parse_blocks("0, 1, 47-49") == {0, 1, 47, 48, 49}
    with pytest.raises(ValueError, match="dense_blocks='a' must be numbers"):
        parse_blocks("a")
