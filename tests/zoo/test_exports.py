"""Exported programs serve other batches and sizes than those they were traced with."""

import foveal.zoo  # noqa: F401  registers the models
import pytest
import timm
import torch

# ViT-rpb, Mega, Sparsifiner and MLPs along tokens are made for one size. Regions of the nchw BiFormer depend on it in a
# way that binds the graph to it.
ONE_SIZE = (
    "test_mega",
    "test_sparsifiner",
    "test_mega_chela",
    "test_natten_vitrpb",
    "test_biformer_stl_nchw",
    "test_smlpnet",
    "test_spach_ms_mlp",
    "test_ninformer",
)
ANY_SIZE = sorted(
    name for name in timm.list_models("test_*")
    if timm.models.model_entrypoint(name).__module__.startswith("foveal.") and name not in ONE_SIZE
)  # fmt: skip
DEFAULT = ("test_agent_swin",)
TRANSLATED = (  # a model per layout of blocks, and those whose layers ONNX has failed at
    "test_agent_swin",
    "test_agent_pvt",
    "test_natten_dinat",
    "test_litv2",
    "test_biformer",
    "test_l2vit",
    "test_moh_vit",
    "test_partialnet",
)
AUTO = torch.export.Dim.AUTO


def test_every_family_is_asked():
    assert set(DEFAULT) <= set(ANY_SIZE) and len(ANY_SIZE) > 10


def untranslatable(graph: torch.fx.Graph) -> list[str]:
    """Nodes that ONNX refuses, remainders by a length of the inputs, or makes wrong, pooling to a grid."""
    refused = []
    for node in graph.nodes:
        pools = node.target in (torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten._adaptive_avg_pool2d.default)
        by_length = str(node.target).startswith("aten.remainder") and isinstance(node.args[1], torch.fx.Node)
        refused += [str(node)] if by_length or (pools and node.args[1] not in ([1, 1], 1)) else []
    return refused


def check(model: torch.nn.Module, traced: torch.Tensor, dynamic: dict, *others: torch.Tensor) -> None:
    program = torch.export.export(model.eval(), (traced,), dynamic_shapes=(dynamic,)).module()
    assert not untranslatable(program.graph)
    for images in (traced, *others):
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [
    name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ANY_SIZE
])  # fmt: skip
def test_batch_and_size_are_free(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    channels, side, _ = model.pretrained_cfg["input_size"]
    traced = torch.randn(2, channels, side, side)
    others = (torch.randn(3, channels, side + 32, side), torch.randn(1, channels, side, side + 64))
    check(model, traced, {0: AUTO, 2: AUTO, 3: AUTO}, *others)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in TRANSLATED else pytest.mark.exhaustive) for name in ANY_SIZE
])  # fmt: skip
def test_onnx_takes_other_batches_and_sizes(name, tmp_path):
    """The logits of onnxruntime at sizes that the graph was not traced with."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, side, _ = model.pretrained_cfg["input_size"]
    traced = torch.randn(2, channels, side, side)
    dynamic = ({0: AUTO, 2: AUTO, 3: AUTO},)
    torch.onnx.export(model, (traced,), dynamo=True, dynamic_shapes=dynamic, verbose=False).save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for shape in ((1, side, side), (3, side + 32, side), (1, side, side + 64)):
        images = torch.randn(shape[0], channels, *shape[1:])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


def test_batch_is_free_at_224():
    """Chunks of tiles depend on the batch in eager calls, and must not where a program is made."""
    torch.manual_seed(0)
    options = {"num_classes": 3, "embed_dim": 16, "depths": (2,), "num_heads": (1,), "dilations": (8,)}
    batch = torch.export.Dim("batch", min=2, max=64)
    images = torch.randn(5, 3, 224, 224)
    check(timm.create_model("natten_dinat_m", **options), images[:2], {0: batch}, images)
