"""VideoDiT keeps diffusers' conventions: what their model tests ask of a transformer."""

import copy
import json

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.training_utils import EMAModel
from foveal.zoo.video import KVCache, VideoDiT
from foveal.zoo.video.attention import VideoAttnProcessor
from foveal.zoo.video.blocks import JointVideoDiTBlock, VideoDiTBlock
from torch._dynamo.testing import CompileCounter
from video_helpers import CONDITIONS, LAYERS, call, inputs, make

every_condition = pytest.mark.parametrize("conditioning", CONDITIONS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_condition
def test_saves_loads_and_rebuilds_from_config(conditioning, tmp_path):
    model = make(attention=LAYERS, num_layers=4, **CONDITIONS[conditioning])
    model.save_pretrained(tmp_path)
    loaded = VideoDiT.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert not loaded.training
    torch.testing.assert_close(call(loaded), call(model), rtol=1e-12, atol=1e-12)  # sums depend on alignment
    rebuilt = VideoDiT.from_config(VideoDiT.load_config(tmp_path)).double().eval()
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(call(rebuilt), call(model), rtol=1e-12, atol=1e-12)
    assert json.loads((tmp_path / "config.json").read_text())["attention"] == LAYERS


def test_saves_shards_and_variants_and_loads_in_half(tmp_path):
    model = make().float()
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(".fp16" in path.name for path in shards)
    assert torch.equal(call(VideoDiT.from_pretrained(tmp_path, variant="fp16")), call(model))
    half = VideoDiT.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert call(half).dtype == torch.bfloat16
    torch.testing.assert_close(call(half).float(), call(model), rtol=0.1, atol=0.1 * call(model).std().item())
    with pytest.raises(OSError, match="no file named"):
        VideoDiT.from_pretrained(tmp_path)


def test_returns_the_same_twice_and_as_a_tuple():
    model = make(attention=LAYERS, num_layers=4)
    assert torch.equal(call(model), call(model))
    assert torch.equal(model(**inputs(model), return_dict=False)[0], call(model))


@every_condition
def test_gradient_checkpointing_changes_no_gradient(conditioning):
    model = make(attention=LAYERS, num_layers=4, **CONDITIONS[conditioning]).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        runs = []
        handle = model.blocks[1].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        call(model).square().mean().backward()
        handle.remove()
        found.append(([p.grad.clone() for p in model.parameters()], len(runs)))
    (plain, once), (again, twice) = found
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


def test_layerwise_casting_keeps_norms_and_embeddings():
    model = make(**CONDITIONS["class"]).float()
    expected = call(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    kept = ("patch_embed", "time_embed", "class_embed", "modulation", "norm_q")
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            assert parameter.dtype == torch.float32, name
    out = call(model)
    assert out.isfinite().all()
    assert (out - expected).norm() < 0.5 * expected.norm()


@every_condition
def test_a_training_step_lowers_the_loss_and_ema_follows(conditioning):
    model = VideoDiT(
        in_channels=2, num_layers=2, num_attention_heads=2, attention_head_dim=12, **CONDITIONS[conditioning]
    )
    ema = EMAModel(model.parameters(), decay=0.5)
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(**given).sample - given["hidden_states"].flip(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.step(model.parameters())
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged.parameters())
    assert not torch.equal(averaged.proj_out.weight, model.proj_out.weight)


class Halved(VideoAttnProcessor):
    """A processor of a user's: half of what attention gives, times what the caller says."""

    def __call__(self, *args, strength: float = 1.0, **options):
        out, text = super().__call__(*args, **options)
        return out * 0.5 * strength, text


@every_condition
def test_attention_processors_can_be_replaced(conditioning):
    model = make(**CONDITIONS[conditioning])
    name = "attn" if conditioning == "joint" else "attn1"
    assert f"blocks.0.{name}.processor" in model.attn_processors
    out = call(model)
    model.set_attn_processor(Halved())
    assert not torch.allclose(call(model), out, rtol=1e-3)
    twice = model(**inputs(model), attention_kwargs={"strength": 2.0}).sample
    torch.testing.assert_close(twice, out, rtol=1e-10, atol=1e-10)
    model.set_attn_processor(dict.fromkeys(model.attn_processors, VideoAttnProcessor()))
    assert torch.equal(call(model), out)


@every_condition
def test_window_layers_sample_with_queries_and_keys_in_e4m3(conditioning):
    window = {"type": "window", "window": (3, 3, 3)}
    model = make(**CONDITIONS[conditioning], attention=[window, "dense"])
    with torch.no_grad():
        exact = call(model)
        model.set_attn_processor(VideoAttnProcessor(qk_dtype=torch.float8_e4m3fn))
        rounded = call(model)
    assert 1e-6 < (rounded - exact).abs().max() / exact.abs().max() < 0.1
    with pytest.raises(NotImplementedError, match="qk_dtype"):
        call(model)


def test_dense_layers_take_the_attention_backend_of_diffusers():
    model = make(attention=["dense", {"type": "dense", "causal": True}, "spatial"], num_layers=3).float()
    out = call(model)
    model.set_attention_backend("_native_math")
    assert all(p._attention_backend == "_native_math" for p in model.attn_processors.values())
    torch.testing.assert_close(call(model), out, rtol=1e-4, atol=1e-4)
    try:
        model.set_attention_backend("_native_cudnn")  # cannot do float32 on CPU: proof that the backend is asked
        with pytest.raises(RuntimeError, match="No viable backend"):
            call(model)
    finally:
        model.set_attention_backend("native")  # of the process, too


@every_condition
def test_fused_projections_give_the_same(conditioning):
    model = make(**CONDITIONS[conditioning])
    out = call(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(call(model), out, rtol=1e-10, atol=1e-10)
    model.unfuse_qkv_projections()
    assert torch.equal(call(model), out)


@every_condition
def test_first_block_cache_skips_the_other_blocks(conditioning):
    model = make(num_layers=3, **CONDITIONS[conditioning])
    out = call(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    runs = []
    model.blocks[2].mlp.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), model.cache_context("cond"):
        torch.testing.assert_close(call(model), out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(call(model), out, rtol=1e-8, atol=1e-8)
    assert len(runs) == 1
    model.disable_cache()
    assert torch.equal(call(model), out)


def test_pyramid_attention_broadcast_finds_the_layers():
    model = make(**CONDITIONS["cross"])
    out, runs = call(model), []
    model.blocks[1].attn1.to_out[0].register_forward_hook(lambda *_: runs.append(1))
    options = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
    model.enable_cache(PyramidAttentionBroadcastConfig(**options, current_timestep_callback=lambda: 500))
    with torch.no_grad(), model.cache_context("cond"):
        torch.testing.assert_close(call(model), out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(call(model), out, rtol=1e-10, atol=1e-10)
    assert len(runs) == 1


@pytest.mark.parametrize("conditioning", ["class", "joint"])
def test_mag_cache_skips_and_a_taylor_series_goes_on(conditioning):
    model = make(num_layers=3, **CONDITIONS[conditioning])
    out, runs = call(model), []
    model.blocks[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    steps = {"num_inference_steps": 6}
    model.enable_cache(
        MagCacheConfig(threshold=10.0, retention_ratio=0.2, mag_ratios=[1.0] * 6, max_skip_steps=2, **steps)
    )
    with torch.no_grad(), model.cache_context("cond"):
        for _ in range(6):
            torch.testing.assert_close(call(model), out, rtol=1e-8, atol=1e-8)
    assert len(runs) < 6
    model.disable_cache()
    runs.clear()
    model.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, use_lite_mode=True, taylor_factors_dtype=torch.float64
        )
    )
    with torch.no_grad(), model.cache_context("cond"):
        for _ in range(6):
            torch.testing.assert_close(call(model), out, rtol=1e-8, atol=1e-8)
    assert len(runs) < 6


def check_one_graph(conditioning: str, attention: list, backend: str) -> None:
    model = make(attention=attention, num_layers=len(attention), gated_attention=True, **CONDITIONS[conditioning])
    given = inputs(model)
    if model.config.text_dim:
        given["encoder_attention_mask"] = torch.tensor([[True] * 4, [True, False, True, False]])
    expected = model(**given).sample
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(**given).sample, expected, rtol=1e-9, atol=1e-10)


def test_compiles_into_one_graph():
    check_one_graph("class", LAYERS, "eager")


@pytest.mark.slow
@every_condition
def test_compiles_into_one_graph_under_every_condition(conditioning):
    check_one_graph(conditioning, LAYERS, "aot_eager")


class ExactTimesteps(torch.nn.Module):
    """The sinusoids of `diffusers.models.embeddings.Timesteps(256, True, 0)` in float64."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.double()[:, None] * 10000 ** -(torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


@pytest.mark.slow
@every_condition
def test_inductor_is_as_near_to_float64_as_eager(conditioning):
    """All that separates compiled and eager is the sinusoid of the timestep.

    diffusers computes it in float32 even in float64 models: at angles up to 1,000 the last bit of a frequency is worth
    6e-5, and inductor rounds `exp` another way. Below timestep 1 nothing of it is left; above, both must be about as
    near to the sinusoid in float64.
    """
    model = make(attention=LAYERS, num_layers=4, gated_attention=True, **CONDITIONS[conditioning])
    given, exact = inputs(model), copy.deepcopy(model)
    exact.time_frequencies = ExactTimesteps()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for largest, bound in ((1.0, 1e-6), (1000.0, 2e-4)):
            call_with = given | {"timestep": given["timestep"] * largest / 1000}
            expected = exact(**call_with).sample
            errors = [
                float((found(**call_with).sample - expected).abs().max() / expected.abs().max())
                for found in (model, compiled)
            ]
            assert max(errors) < bound and errors[1] <= 2 * errors[0] + 1e-6


def test_another_resolution_compiles_once_more_at_most():
    model = make(attention=["dense", {"type": "window", "window": [2, 2, 3]}])
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in ((3, 6, 8), (3, 10, 12), (3, 16, 22)):
        given = inputs(model, size=size)
        torch.testing.assert_close(compiled(**given).sample, model(**given).sample, rtol=1e-9, atol=1e-10)
    assert counter.frame_count <= 2


def test_repeated_blocks_compile_by_themselves():
    for conditioning, block in (("class", VideoDiTBlock), ("joint", JointVideoDiTBlock)):
        torch._dynamo.reset()
        model = make(attention=["dense", {"type": "window", "window": 3}], num_layers=6, **CONDITIONS[conditioning])
        expected, counter = call(model), CompileCounter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(call(model), expected, rtol=1e-9, atol=1e-10)
        assert all(type(x) is block for x in model.blocks)
        assert counter.frame_count <= 3  # one a pattern, and the last joint block


def test_rollout_needs_no_gradient_and_moves_no_parameters():
    model = make(attention=[{"type": "dense", "causal": True}]).train()
    cache = KVCache()
    call_with = inputs(model) | {"kv_cache": cache}
    model(**call_with)
    assert not cache.layer(0).key.requires_grad


def tuned(model: VideoDiT, *, rank: int = 2, seed: int = 1) -> VideoDiT:
    """The model with random LoRA layers in every linear layer of its blocks that a user would choose."""
    peft = pytest.importorskip("peft")
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out", "mlp.up", "mlp.down"]
    ends = tuple(f".{name}" for name in names)
    targets = [name for name, _ in model.named_modules() if name.startswith("blocks.") and name.endswith(ends)]
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    return model


@every_condition
def test_lora_layers_come_and_go(conditioning):
    model = make(**CONDITIONS[conditioning])
    out, names = call(model), set(model.state_dict())
    tuned(model)
    with_lora = call(model)
    assert not torch.allclose(with_lora, out, rtol=1e-3)
    off = model(**inputs(model), attention_kwargs={"scale": 0.0}).sample
    torch.testing.assert_close(off, out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(call(model), with_lora, rtol=1e-10, atol=1e-10)
    model.fuse_lora()
    torch.testing.assert_close(call(model), with_lora, rtol=1e-10, atol=1e-10)
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(call(model), out, rtol=1e-10, atol=1e-10)
    model.unload_lora()
    assert set(model.state_dict()) == names
    torch.testing.assert_close(call(model), out, rtol=1e-10, atol=1e-10)


def test_lora_files_keep_their_configuration(tmp_path):
    model = tuned(make(**CONDITIONS["class"]))
    config = model.peft_config["default"].to_dict()
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    model.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None, adapter_name="style")
    assert model.peft_config["style"].to_dict() == config | {"init_lora_weights": True}  # of layers that get weights


def test_lora_files_load_and_swap(tmp_path):
    outs = []
    for seed in (1, 2):
        model = tuned(make(**CONDITIONS["class"]), rank=2 * seed, seed=seed)
        model.save_lora_adapter(tmp_path / str(seed))
        outs.append(call(model))
    files = [path / "pytorch_lora_weights.safetensors" for path in (tmp_path / "1", tmp_path / "2")]
    assert all(file.stat().st_size < 100_000 for file in files)
    model = make(**CONDITIONS["class"])
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(files[0], prefix=None, adapter_name="style")
    torch.testing.assert_close(call(model), outs[0], rtol=1e-10, atol=1e-10)
    layers = [id(module) for module in model.modules()]
    model.load_lora_adapter(files[1], prefix=None, adapter_name="style", hotswap=True)
    torch.testing.assert_close(call(model), outs[1], rtol=1e-10, atol=1e-10)
    assert [id(module) for module in model.modules()] == layers
    with pytest.raises(ValueError, match="Adapter name other not found"):
        model.save_lora_adapter(tmp_path, adapter_name="other")


def test_only_lora_layers_are_tuned():
    model = tuned(make(**CONDITIONS["class"]))
    model.enable_gradient_checkpointing()
    call(model.train()).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.slow
def test_swapped_lora_layers_need_no_other_graph(tmp_path):
    outs = []
    for seed in (1, 2):
        model = tuned(make(**CONDITIONS["class"]), rank=2 * seed, seed=seed)
        model.save_lora_adapter(tmp_path / str(seed))
        outs.append(call(model))
    model, counter = make(**CONDITIONS["class"]), CompileCounter()
    model.enable_lora_hotswap(target_rank=4)
    for seed in (1, 2):
        file = tmp_path / str(seed) / "pytorch_lora_weights.safetensors"
        model.load_lora_adapter(file, prefix=None, adapter_name="style", hotswap=seed == 2)
        if seed == 1:
            model.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(call(model), outs[seed - 1], rtol=1e-9, atol=1e-9)
        assert counter.frame_count == 1


@pytest.mark.slow
def test_lora_layers_compile_into_the_same_graph():
    model = tuned(make(**CONDITIONS["class"]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs(model)).sample, call(model), rtol=1e-9, atol=1e-10)
