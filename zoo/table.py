"""The model table of the documentation: `python -m foveal.zoo.table docs/models.md` writes it anew."""

import sys
from pathlib import Path

import timm
import torch
from timm.layers import Attention
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg_value, model_entrypoint
from torch import nn

from ..kernels.neighborhood import make_axes
from ..kernels.neighborhood.cost import forward_flops
from ..layers.neighborhood import NeighborhoodAttention2d
from ..layers.relative import RelativeAttention2d
from ..weights import bundled_manifest, lookup

TITLE = "# Image models\n"
INTRO = """Importing `foveal.zoo` adds these models to timm. Everything timm does with its own models works with them:

```python
import timm, torch
import foveal.zoo

model = timm.create_model("natten_dinat_s", pretrained=True).eval()  # official weights, fetched and verified
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

backbone = timm.create_model("natten_dinat_s", features_only=True)  # four maps, 1/4 to 1/32
maps = backbone(torch.randn(1, 3, 250, 333))  # any size; no padding to a multiple

small = timm.create_model("natten_dinat_pico", pretrained=True)  # handwritten digits; its weights ship inside the wheel
```

- A file with official parameter names needs no conversion:
  `timm.create_model("natten_dinat_s", pretrained=True, pretrained_cfg_overlay=dict(file="dinat_small_in1k_224.pth"))`.
  Nor do the `shi-labs/*` files of the Hugging Face hub, nor the backbones of detection and segmentation checkpoints
  (build the model with `stage_norms=True`). A file that does not fill the model is an error, but for the classifier.
- What `foveal-train` made loads by `checkpoint_path="RUN/checkpoints/last.ckpt"`, or as `local-dir:FOLDER` after
  `python -m foveal.zoo.tasks.export RUN FOLDER`: see [Training](training.md#use-what-you-trained).
- The ImageNet-22k heads are expected to have 21,841 classes; upstream does not say. Should a file hold another number,
  give it: `pretrained_cfg_overlay=dict(num_classes=...)`.
- Maps smaller than window times dilation are zero-padded inside the attention, as the official checkpoints expect.
  That happens below the size a model was designed for.
- Models with dense attention (`natten_vitrpb_*`) take one input size: `img_size=`, later `model.set_input_size(...)`.
- LITv2, BiFormer and L2ViT take any size, too. The windows of HiLo and L2ViT and BiFormer's regions are completed by
  zeros that take part in the attention, as in the official detection code. On the way down LITv2 and the STL models
  drop the last row or column of odd maps, also as in the official code. `timm.create_model("litv2_s", alpha=0.5)` sets
  the share of low-frequency heads.
- Agent, InLine and FLatten models learn positions for one input size, the checkpoint's, or `img_size=`. Images of other
  sizes go through with positions interpolated on the way; `model.set_input_size(...)` and loading interpolate them for
  good, by the authors' rule. Their repositories state no license: the links below lead to the authors' own files.
- ShiftViT, PartialNet, MoH-ViT, Flowformer, PPMA, residual attention networks and the triplet networks take any size,
  too, as do SPACH models with convolutions and attention. sMLPNet, NiNformer, Mega, Sparsifiner and SPACH models with
  MLPs along tokens take the one that `img_size=` says. iLLaMA, BinaryAttention-DeiT, minimal ViTs and SPA learn
  positions and interpolate them as Agent does.
- BinaryAttention-DeiT computes what 1-bit queries and keys and 8-bit weights and values would, by products of floats:
  it costs more than DeiT, and is there to have its results.
- Mega's weights are published for the base model alone, in an archive: unpack it and give the file's path.
- Sparsifiner masks the pairs that it leaves out, so it costs more than DeiT, too. Any training loop teaches its choice:
  first with `sparse=False`, which attends densely while the predictor learns, then without.
- `timm.create_model("spa_iso_s", pack=True)` projects and attends selected tokens alone, with the same results. Such a
  model waits for the device in each block. `foveal.layers.selection_loss` teaches gates where objects are.
- `timm.create_model("moh_vit_s_80", skip_heads=True)` computes heads for the tokens that take them alone: 4 % less time
  at 224x224 on one CPU core, 16 % at 448x448. Such a model waits for the device in each block; graphs cannot hold it.
- `impl=` chooses the attention kernels (see [Operations](operations.md)). A model takes the arguments of its layout
  (`Swin`, `NAT`, `PVT`, `PVTv2`, `CSWin`, `DeiT`, `Isotropic`, `Spach` in `foveal.zoo.hosts`) and of its family's
  attention (`foveal.zoo.backbones`), as in
  `timm.create_model("agent_swin_t", num_agents=(9, 9, 25, 25), drop_path_rate=0.1)`.
- `torch.compile(fullgraph=True)`, `torch.export` and `torch.onnx.export(dynamo=True)` work, the latter two with dynamic
  batches and image sizes: `dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},)`, `AUTO = torch.export.Dim.AUTO`. Logits of
  onnxruntime are tested. Programs of ViT-rpb, Mega, Sparsifiner and `biformer_stl_nchw` keep their size.
  TorchScript refuses (tracing takes `impl="reference"`).
- timm 1.0.31's own `tests/test_models.py`, but for TorchScript: 393 of 394 tests pass of the 21 `*_pico` models and of
  the smallest official model of each family. The other takes a map of `triplet_mobilenetv2` with as many rows as
  channels for one with its channels first. `tests/support/timm_own_tests.py` says how to run them.

A layout takes any attention on maps `[B, H, W, dim]`. `attn` gets the `Place` of every block, and returns a module, or
None where the layout's own attention stays:

```python
from foveal.layers import LinearAttention
from foveal.zoo.hosts import Swin


def linear_first(place):
    if place.stage < 2:
        return LinearAttention(place.dim, num_heads=place.num_heads, **place.options)


model = Swin(attn=linear_first, depths=(2, 2, 6, 2), num_classes=10)  # linear attention, then shifted windows
```

A row is a released checkpoint, created as `model.tag`; the first of a model is its default. Multiply-accumulates
(GMACs) are those of convolutions, linear layers and attention at the given size. ImageNet-1k accuracy is what the
authors report, not a measurement of ours; the digits model's is measured by the command that trains it.
"""
COLUMNS = ["model", "tag", "params (M)", "GMACs", "size", "top-1 (%)", "license", "source"]
ALIGNMENT = ["---", "---", "--:", "--:", "--:", "--:", "---", "---"]


def our_models() -> list[str]:
    """Names of the registered models that are defined in `foveal.zoo`."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(f"{__package__}.")]


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention for one image of `input_size` (C, H, W)."""
    total = 0

    def count(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, RelativeAttention2d):
            total += 2 * (out.shape[1] * out.shape[2]) ** 2 * out.shape[3]
        elif isinstance(module, Attention):
            total += 2 * out.shape[1] ** 2 * out.shape[2]
        elif isinstance(module, NeighborhoodAttention2d):
            spans = [w * d for w, d in zip(module.window, module.dilation, strict=True)]
            grid = [max(n, span) for n, span in zip(out.shape[1:3], spans, strict=True)]
            axes = make_axes(
                grid, window=module.window, stride=module.stride, dilation=module.dilation, causal=module.causal
            )
            total += forward_flops(axes, batch=1, heads=module.num_heads, head_dim=module.head_dim) // 2
        elif (attention_macs := getattr(module, "attention_macs", None)) is not None:
            total += attention_macs(tuple(out.shape[1:3]))

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


def row(name: str) -> list[str]:
    """Table cells of the checkpoint `name` ("architecture.tag")."""
    input_size = get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
    model = timm.create_model(name, device="meta")
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = count_macs(model, input_size)
    entry = lookup(name)
    top1 = f"{entry.metrics['top1']:.1f}" if "top1" in entry.metrics else ""
    size = "x".join(str(n) for n in input_size[1:])
    source = f"[source]({entry.source})"
    architecture, tag = (f"`{part}`" for part in name.split("."))
    return [architecture, tag, f"{params / 1e6:.2f}", f"{macs / 1e9:.2f}", size, top1, entry.license, source]


def rows_of(module: str) -> list[list[str]]:
    """Table rows of the checkpoints of one module of the zoo: layout by layout, small to large."""
    released, models = bundled_manifest().entries, sys.modules[module].MODELS
    layouts = [model.build for model in models.values()]
    rows = []
    for name, model in models.items():
        for checkpoint in get_arch_pretrained_cfgs(name):
            if checkpoint in released:
                cells = row(checkpoint)
                rows.append((layouts.index(model.build), float(cells[3]), cells))
    rows.sort(key=lambda ranked: ranked[:2])
    return [cells for *_, cells in rows]


def title_of(module: str) -> str:
    """First line of the docstring of a module, which is the heading of its models."""
    return (sys.modules[module].__doc__ or module).splitlines()[0].rstrip(".")


def family(module: str, rows: list[list[str]]) -> str:
    """Heading and table of the models of one module of the zoo."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ALIGNMENT, *rows)]
    if not rows:
        names = ", ".join(f"`{name}`" for name in sys.modules[module].MODELS if not name.startswith("test_"))
        lines = [f"No weights are published. Models: {names}."]
    return "\n".join([f"## {title_of(module)}", "", *lines, ""])


def _span(values: list[float], digits: int) -> str:
    """Least and greatest value of a column."""
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} – {most}"


def overview(tables: dict[str, list[list[str]]]) -> str:
    """A row a family that has released checkpoints: what it is, how many, their sizes, and accuracies on ImageNet."""
    lines = ["| family | models | checkpoints | params (M) | GMACs | ImageNet top-1 (%) |", "|---|---|--:|--:|--:|--:|"]
    for module, rows in tables.items():
        if rows:
            accuracies = [float(cells[5]) for cells in rows if cells[5] and "digits" not in cells[1]]
            params, macs = ([float(cells[i]) for cells in rows] for i in (2, 3))
            name, about = module.rpartition(".")[2], title_of(module).partition(": ")
            spans = [_span(params, 1), _span(macs, 1), _span(accuracies, 1) if accuracies else ""]
            text = f"**{about[0]}**: {about[2]}" if about[2] else about[0]
            lines.append(f"| {text} | `{name}_*` | {len(rows)} | {' | '.join(spans)} |")
    return "\n".join([*lines, ""])


def markdown() -> str:
    """The whole page."""
    modules = sorted({model_entrypoint(name).__module__ for name in our_models()})
    tables = {module: rows_of(module) for module in modules}
    return "\n".join([TITLE, overview(tables), INTRO, *(family(module, rows) for module, rows in tables.items())])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m foveal.zoo.table docs/models.md")
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
