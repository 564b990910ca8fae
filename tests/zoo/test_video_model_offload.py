"""VideoDiT from files, piece by piece and in other dtypes, and with weights that are elsewhere until they are needed:
what diffusers' model tests ask that goes without an accelerator."""

import json

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.utils import constants
from foveal.zoo.video import VideoDiT
from foveal.zoo.video.attention import VideoAttnProcessor
from video_helpers import CONDITIONS, LAYERS, call, inputs, make

every_condition = pytest.mark.parametrize("conditioning", CONDITIONS)
CPU = torch.device("cpu")


def single(**options) -> VideoDiT:
    return make(attention=LAYERS, num_layers=4, **options).float()


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loads_in_a_dtype_with_and_without_a_copy(tmp_path, dtype, low_cpu_mem_usage):
    model = single(**CONDITIONS["joint"])
    model.save_pretrained(tmp_path)
    loaded, info = VideoDiT.from_pretrained(
        tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage, output_loading_info=True
    )
    assert not any(info.values()), info
    assert loaded.dtype == dtype and {p.dtype for p in loaded.parameters()} == {dtype}  # nothing is kept in float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(dtype)), name


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_have_an_index_and_load_in_parallel(tmp_path, monkeypatch, variant, parallel):
    model = single()
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    name = "diffusion_pytorch_model.safetensors.index" + (f".{variant}.json" if variant else ".json")
    index = json.loads((tmp_path / name).read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", parallel)
    assert torch.equal(call(VideoDiT.from_pretrained(tmp_path, variant=variant)), call(model))


def test_a_compiled_model_saves_what_an_eager_one_loads(tmp_path):
    model = single()
    compiled = torch.compile(model, backend="eager")
    compiled.save_pretrained(tmp_path)
    assert torch.equal(call(VideoDiT.from_pretrained(tmp_path)), call(model))


def test_attributes_are_found_and_those_of_the_config_warned_about():
    model = single()
    model.note = 5
    model.register_to_config(further=7)
    assert model.note == 5 and model.config.further == 7
    with pytest.warns(FutureWarning, match="further"):
        assert model.further == 7
    with pytest.raises(AttributeError, match="'VideoDiT' object has no attribute 'nothing'"):
        _ = model.nothing


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # a parameter of the model itself, says accelerate
@every_condition
def test_weights_on_the_disk_are_fetched_when_they_are_needed(tmp_path, conditioning):
    model = single(**CONDITIONS[conditioning])
    model.save_pretrained(tmp_path / "model")
    names = [name for name, _ in model.named_children() if name != "blocks"]
    places = dict.fromkeys([*names, "output_modulation", "blocks.0", "blocks.2"], "cpu")
    places |= {"blocks.1": "disk", "blocks.3": "disk"}
    loaded = VideoDiT.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights")
    assert loaded.hf_device_map == places
    for name, parameter in loaded.named_parameters():
        assert parameter.is_meta == name.startswith(("blocks.1.", "blocks.3.")), name
    with torch.no_grad():
        torch.testing.assert_close(call(loaded), call(model))


@pytest.mark.filterwarnings("ignore:Device 0 is not available")
@pytest.mark.parametrize("conditioning", ["class", "joint"])
def test_blocks_are_not_split(conditioning):
    """Accelerate puts whole blocks on a device: inside one, tokens are added to what they were."""
    from accelerate import infer_auto_device_map

    model = make(num_layers=8, **CONDITIONS[conditioning]).float()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    memory = {0: int(0.7 * size), "cpu": size}
    whole, split = (
        infer_auto_device_map(model, max_memory=memory, no_split_module_classes=kinds)
        for kinds in (list(model._no_split_modules), [])
    )
    assert {place for name, place in whole.items() if name.startswith("blocks.")} == {0, "cpu"}
    assert not any(name.startswith("blocks.") and name.count(".") > 1 for name in whole)
    assert any(name.startswith("blocks.") and name.count(".") > 1 for name in split)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@pytest.mark.parametrize("conditioning", ["class", "joint"])
def test_group_offloading_changes_nothing(tmp_path, conditioning, kind, where):
    model = single(**CONDITIONS[conditioning])
    expected = call(model)
    path = {"offload_to_disk_path": str(tmp_path)} if where == "disk" else {}
    model.enable_group_offload(CPU, offload_device=CPU, **kind, **path)
    hooked = [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
    assert all(HookRegistry.check_if_exists_or_initialize(m).get_hook("group_offloading") for m in hooked)
    assert len(hooked) >= 4 and bool(list(tmp_path.glob("*.safetensors"))) == (where == "disk")
    with torch.no_grad():
        torch.testing.assert_close(call(model), expected)
        torch.testing.assert_close(call(model), expected)


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting_stores_less_and_trains(storage):
    model = single(**CONDITIONS["class"])
    before = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert model.get_memory_footprint() < (0.7 if storage == torch.float16 else 0.5) * before
    call(model.train()).square().mean().backward()
    kept = [p for p in model.parameters() if p.dtype == torch.float32]
    assert kept and all(p.grad is not None and p.grad.isfinite().all() for p in kept)


def test_gradient_checkpointing_goes_on_and_off():
    model = single()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing and model.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_attention_backends_come_from_the_model_or_the_context():
    model = single()
    out = call(model)
    before = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        with attention_backend("_native_math"):
            assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName._NATIVE_MATH
            by_context = call(model)
        assert _AttentionBackendRegistry.get_active_backend()[0] == before
        model.set_attention_backend("_native_math")
        assert torch.equal(call(model), by_context)
        model.reset_attention_backend()
        assert all(processor._attention_backend is None for processor in model.attn_processors.values())
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
    assert torch.equal(call(model), out)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("flash_attention")


def test_wrong_numbers_of_processors_are_refused():
    model = single()
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"blocks.0.attn1.processor": VideoAttnProcessor()})
    for module in model.modules():
        if hasattr(module, "get_processor"):
            processor = VideoAttnProcessor()
            module.set_processor(processor)
            assert module.get_processor() is processor


@pytest.mark.parametrize(
    "conditioning", ["class", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "cross", "joint"))]
)
def test_exports_and_the_program_takes_other_values(conditioning):
    model = single(**CONDITIONS[conditioning])
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(model).items()}
    program = torch.export.export(model, args=(), kwargs=given)
    other = given | {"hidden_states": given["hidden_states"].flip(0), "timestep": given["timestep"].flip(0)}
    torch.testing.assert_close(program.module()(**other).sample, model(**other).sample)


@pytest.mark.slow
def test_a_compiled_package_runs_without_the_model(tmp_path):
    model = single(**CONDITIONS["class"])
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(model).items()}
    given["timestep"] /= 1000  # the sinusoid of larger ones is rounded differently
    with torch.no_grad():
        program = torch.export.export(model, args=(), kwargs=given | {"return_dict": False})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        (out,) = torch._inductor.aoti_load_package(path)(**given, return_dict=False)
        torch.testing.assert_close(out, model(**given).sample, rtol=1e-4, atol=1e-4)
