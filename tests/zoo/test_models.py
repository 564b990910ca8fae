"""What timm asks of its own models, asked of every model of the zoo. The list comes from the registry.

Structure is checked on the meta device for every checkpoint, values on the small models called `test_*`, of which every
family has one per layout, on small sizes with `-m slow` and on all with `-m exhaustive`.
"""

import copy
import importlib
import math
import operator
import pkgutil
import subprocess
import sys

import foveal.zoo
import pytest
import timm
import torch
from foveal.zoo.table import our_models
from meta_models import create_without_data
from timm.models import (
    get_arch_pretrained_cfgs,
    get_model_input_config,
    get_notrace_functions,
    get_notrace_modules,
)
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

MODELS = our_models()
FIXED_WORDS = ("vitrpb", "mlp", "ninformer", "mega", "sparsifiner")
SMALL = [name for name in MODELS if name.startswith("test_")]
LARGE = [name for name in MODELS if name not in SMALL]
CHECKPOINTS = [name for model in MODELS for name in get_arch_pretrained_cfgs(model)]
FIXED = [name for name in SMALL if any(word in name for word in FIXED_WORDS)]  # take one input size only
FLEXIBLE = [name for name in SMALL if name not in FIXED]
COMPILED = {  # the others with `-m slow`
    "test_agent_deit",
    "test_flatten_pvtv2",
    "test_litv2",
    "test_natten_dinats",
}
SOME_COMPILED = [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]


def create(name: str, **kwargs) -> torch.nn.Module:
    """A model whose weights follow a fixed seed."""
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def image(model: torch.nn.Module, side: int = 64, batch: int = 1) -> torch.Tensor:
    fixed = any(word in model.pretrained_cfg["architecture"] for word in FIXED_WORDS)
    size = model.pretrained_cfg["input_size"][1:] if fixed else (side, side)
    return torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(1))


def side_of(name: str, n: int, reduction: int) -> int:
    """Rows of a map from `n` of the image; official LITv2 and STL models round down."""
    if "litv2" in name or "biformer_stl" in name:
        stem = math.ceil(n / 4) if "litv2" in name else n // 4
        return max(stem // (reduction // 4), 1)
    return math.ceil(n / reduction)


def as_map(features: torch.Tensor) -> torch.Tensor:
    """`[B, H, W, C]` of features, whose class token is dropped if they are the tokens of a square map."""
    side = math.isqrt(features.shape[1])
    return features[:, 1:].unflatten(1, (side, side)) if features.dim() == 3 else features


def test_every_family_is_a_file_and_has_a_small_model():
    files = [module.name for module in pkgutil.iter_modules(foveal.zoo.backbones.__path__)]
    assert files == foveal.zoo.backbones.FAMILIES
    for file in files:
        models = importlib.import_module(f"foveal.zoo.backbones.{file}").MODELS
        assert {name.removeprefix("test_").split("_")[0] for name in models} == {file}
        assert any(name.startswith("test_") for name in models), file
        assert models.keys() <= set(MODELS)


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_gradient_checkpointing(name):
    model = create(name).eval()
    x = image(model)
    out = model(x)
    assert out.shape == (1, model.num_classes) and out.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.exhaustive if {"m", "b", "l"} & {*name.split("_")} else pytest.mark.slow)
    for name in LARGE
])  # fmt: skip
def test_forward_at_full_size(name):
    model = create(name).eval()
    with torch.inference_mode():
        out = model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    assert out.shape == (1, model.num_classes) and out.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    model = create(name, num_classes=42, drop_path_rate=0.1, proj_drop_rate=0.1, drop_rate=0.1).train()
    out = model(image(model, batch=2))
    assert out.shape == (2, 42)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_checkpointed_gradients_are_the_same(name):
    gradients = []
    for enable in (False, True):
        model = create(name, num_classes=5).train()
        model.set_grad_checkpointing(enable)
        model(image(model, batch=2)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_configuration_describes_the_model(name):
    model = create_without_data(name).eval()
    cfg, keys = model.pretrained_cfg, model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in keys and f"{cfg['first_conv']}.weight" in keys
    assert (model.in_chans, model.num_classes) == (cfg["input_size"][0], cfg["num_classes"])
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms
    assert all(name.endswith(statistics) for name, _ in model.named_buffers())
    if any(word in name for word in FIXED_WORDS):
        assert cfg["fixed_input_size"], "timm draws images of other sizes otherwise"
    assert len(model.feature_info) >= (2 if name.startswith("test_") else 3), "timm's features_only asks for three maps"
    side = cfg["input_size"][1]
    assert cfg["pool_size"] == (math.ceil(side / model.feature_info[-1]["reduction"]),) * 2
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    assert all(model.get_submodule(info["module"]) for info in model.feature_info)


@pytest.mark.parametrize("name", SMALL)
def test_heads_and_pooling(name):
    model = create(name).eval()
    x = image(model)
    features = model.forward_features(x)
    side = math.ceil(x.shape[-1] / model.feature_info[-1]["reduction"])
    assert model.output_fmt == ("NHWC" if features.dim() == 4 else "NLC")
    assert as_map(features).shape == (1, side, side, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(2)  # on every place of the map
    assert model.num_classes == 2 and model(x).shape == (*features.shape[:-1], 2)
    one_width = model.output_fmt == "NLC" or hasattr(model, "pre_head")
    pool, times = ("avgmax", 1) if one_width else ("catavgmax", 2)
    model.reset_classifier(7, pool)
    assert model(x).shape == (1, 7) and model.head_hidden_size == times * pooled.shape[1]
    assert model.get_classifier().out_features == 7
    assert create(name, num_classes=0).eval()(x).shape == pooled.shape
    assert create(name, num_classes=0, global_pool="").eval()(x).shape == features.shape


@pytest.mark.parametrize("name", SMALL)
def test_new_head_keeps_pooling_device_dtype_mode_and_frozen_trunk(name):
    model = create(name, global_pool="max").to(device="meta", dtype=torch.float64).eval()
    model.requires_grad_(False)
    model.reset_classifier(0)
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(3)
    assert getattr(model.global_pool, "pool_type", model.global_pool) == "max"
    assert {(p.device.type, p.dtype) for p in model.head.parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())
    model.reset_classifier(3, "")
    assert {(p.device.type, p.dtype) for p in model.head.parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", SMALL)
def test_intermediates(name):
    model = create(name).eval()
    x = image(model, side=96)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x), rtol=1e-5, atol=1e-8)
    assert len(maps) == len(model.feature_info)
    for info, nchw in zip(model.feature_info, maps, strict=True):
        assert list(nchw.shape) == [1, info["num_chs"], *(math.ceil(n / info["reduction"]) for n in x.shape[2:])]
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, nhwc, strict=True))
    *_, last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last.permute(0, 2, 3, 1), as_map(features))
    with pytest.raises(ValueError, match="NCL"):
        model.forward_intermediates(x, output_fmt="NCL")


@pytest.mark.parametrize("name", SMALL)
def test_pruning_keeps_the_maps_and_leaves_nothing_unused(name):
    model = create(name).eval()
    x = image(model)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for i in range(len(maps)):
        (early,) = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, maps[i])
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i], prune_norm=True) == [i]
        (kept,) = pruned.forward_intermediates(x, indices=[i], intermediates_only=True)
        torch.testing.assert_close(kept, maps[i])
        assert pruned.num_features == maps[i].shape[1]
        kept.square().sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    model = create(name, features_only=True).eval()
    x = image(model, side=96)
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [m.shape[2] for m in maps] == [math.ceil(x.shape[2] / r) for r in model.feature_info.reduction()]
    assert len(create(name, features_only=True, out_indices=(0, 1)).eval()(x)) == 2


@pytest.mark.parametrize("name", FLEXIBLE)
def test_hooks_and_fx_extract_the_same_features(name):
    getter, hooks, graph = (create(name, features_only=True, out_indices=(0, 1), feature_cls=cls).eval()
                            for cls in ("getter", "hook", "fx"))  # fmt: skip
    x = image(getter)
    for a, b, c in zip(getter(x), hooks(x), graph(x), strict=True):
        assert torch.equal(a.permute(0, 2, 3, 1), as_map(b)) and torch.equal(b, c)


@pytest.mark.parametrize("name", SMALL)
def test_fx_trace_computes_exactly_the_same(name):
    model = create(name).eval()
    kwargs = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=kwargs)
    assert eval_nodes == train_nodes
    traced = create_feature_extractor(model, return_nodes=[eval_nodes[-1]], tracer_kwargs=kwargs)
    (out,) = traced(x := image(model)).values()
    assert torch.equal(out, model(x))
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(61, 34), (15, 15)])
@pytest.mark.parametrize("name", FLEXIBLE)
def test_any_size(name, size):
    model = create(name).eval()
    x = torch.randn(2, model.in_chans, *size)
    (features,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    reduction = model.feature_info[-1]["reduction"]
    assert list(features.shape[2:]) == [side_of(name, n, reduction) for n in size]
    assert model(x).isfinite().all()
    torch.testing.assert_close(model(x[1:]), model(x)[1:], rtol=1e-4, atol=1e-5)


def test_fixed_input_size_can_be_chosen_and_changed():
    model = create("test_natten_vitrpb", img_size=(96, 64)).eval()
    assert get_model_input_config(model)["input_size"] == (3, 96, 64)
    out = model(torch.zeros(1, 3, 96, 64))
    with pytest.raises((ValueError, AssertionError)):
        model(torch.zeros(1, 3, 64, 64))
    model.set_input_size((128, 128))
    assert model.layers[0].attn.rpb.shape == (2, 15, 15)
    assert get_model_input_config(model)["input_size"] == (3, 128, 128)
    assert model(torch.zeros(1, 3, 128, 128)).shape == out.shape
    with pytest.raises(ValueError, match=r"img_size=\(100, 128\)"):
        model.set_input_size((100, 128))


@pytest.mark.parametrize("name", SMALL)
def test_parameter_groups(name):
    model = create(name)
    names = {n for n, _ in model.named_parameters()}
    tables = model.no_weight_decay()
    positions = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith((".weight", ".bias"))}
    assert tables == positions
    stem = model.pretrained_cfg["first_conv"] + ".weight"
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert groups.keys() == names
        assert groups[stem] == 0
        assert groups["head.weight"] == max(groups.values())
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert all(decay[id(parameters[n])] == 0 for n in tables)
    assert decay[id(parameters["head.weight"])] == 0.05
    assert scale[id(parameters["head.weight"])] == 1 > scale[id(parameters[stem])]


@pytest.mark.parametrize("name", SOME_COMPILED)
def test_compiles_without_graph_break(name):
    model = create(name).eval()
    x = image(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def when_exported(name: str) -> list:
    """`tests/zoo/test_exports.py` exports more of models that take any size."""
    return [] if name in COMPILED else [pytest.mark.slow if name in FIXED else pytest.mark.exhaustive]


@pytest.mark.parametrize("name", [pytest.param(name, marks=when_exported(name)) for name in SMALL])
def test_exports(name):
    model = create(name).eval()
    x = image(model)
    exported = torch.export.export(model, (x,))
    calls = {node.target for node in exported.graph.nodes if node.op == "call_function"} - {operator.getitem}
    chosen = {"higher_order"}  # a choice without gradient
    foreign = {"litv2": {"torchvision"}, "biformer": chosen, "sparsifiner": chosen}  # deformable convolution
    assert {call.namespace for call in calls} - foreign.get(name.split("_")[1], set()) == {"aten"}
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("name", SMALL)
def test_scripting_is_refused_in_one_sentence(name):
    with pytest.raises(NotImplementedError, match=r"^TorchScript cannot compile \w+; use torch\.export"):
        torch.jit.script(create(name).eval())


def test_tracing_takes_the_reference_only():
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace takes .* impl='reference' only"):
        torch.jit.trace(create("test_natten_dinats").eval(), x, check_trace=False)
    model = create("test_natten_dinats", impl="reference").eval()
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))


@pytest.mark.parametrize("name", SMALL)
def test_materialises_from_the_meta_device(name):
    model = create(name, device="meta")
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.init_weights()
    assert model.eval()(image(model)).isfinite().all()
    expected = create(name).state_dict()
    for key, value in model.state_dict().items():
        spread, wanted = value.float().std(correction=0), expected[key].float().std(correction=0)
        assert torch.isclose(spread, wanted, rtol=0.5, atol=0.02), key


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_stays_bfloat16(name):
    model = create(name, dtype=torch.bfloat16).eval()
    assert model(image(model).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SMALL)
def test_autocast_computes_nearly_the_same(name):
    model = create(name).eval()
    x = image(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05 * model(x).abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)


@pytest.mark.parametrize("name, dilations", [
    ("test_natten_dinat", ((1, 2, 3), 1)), ("test_natten_dinat", (1, 1, 1)), ("test_natten_dinat_iso", (1, 2)),
])  # fmt: skip
def test_contradictory_dilations_are_refused(name, dilations):
    with pytest.raises(ValueError, match="dilations="):
        create(name, device="meta", dilations=dilations)


def test_dilations_can_be_given_block_by_block():
    model = create("natten_dinat_pico", dilations=((1, 3), 2, 1))
    assert [[b.attn.dilation[0] for b in stage.blocks] for stage in model.levels] == [[1, 3], [1, 2], [1]]


def test_drop_path_grows_to_its_rate():
    model = create("natten_dinat_pico", drop_path_rate=0.5)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in model.levels for b in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.5, 5))


def test_registration_is_quiet_light_and_takes_no_name_of_timm():
    code = (
        "import sys, timm; names, modules = set(timm.list_models()), set(timm.list_modules()); import foveal.zoo;"
        "ours = set(timm.list_models()) - names; assert len(ours) >= 45, ours;"
        "assert set(timm.list_modules()) - modules >= {'agent', 'biformer', 'natten', 'litv2'};"
        "from timm.models import model_entrypoint as e;"
        "assert all(e(n).__module__.startswith('foveal.zoo.') for n in ours);"
        "assert not any(e(n).__module__.startswith('foveal') for n in names);"
        "heavy = {'lightning', 'hydra', 'diffusers', 'sklearn', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)
