"""Error of rounding queries and keys: `python -m benchmarks.rounding` prints the tables of docs/numerics.md.

Errors are those of bfloat16 inputs on the plain PyTorch path, against float64 on the same inputs. Trained activations
come from the packaged DiNAT on its test digits.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import foveal.zoo  # noqa: F401  registers the model
import timm
import torch
from foveal.kernels.block_sparse.call import ONE_BIT
from foveal.kernels.neighborhood import quantized
from foveal.kernels.ops import block_sparse_attention, masks, na2d
from foveal.layers import NeighborhoodAttention2d
from foveal.zoo.data.digits import Digits
from torch import Tensor, nn

E4M3 = quantized.DTYPE
HEAD = (
    "| queries and keys | numbers | output, RMS | output, largest | log-sum-exp, largest |",
    "| --- | --- | --: | --: | --: |",
)


class Error(NamedTuple):
    """RMS and largest error of the output, relative to its RMS, and largest error of the log-sum-exp."""

    rms: float
    largest: float
    lse: float

    @classmethod
    def of(cls, got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> "Error":
        off, size = (got[0].double() - exact[0]), exact[0].square().mean().sqrt()
        rms, largest = off.square().mean().sqrt() / size, off.abs().max() / size
        return cls(rms.item(), largest.item(), (got[1] - exact[1]).abs().max().item())


def errors(query: Tensor, key: Tensor, value: Tensor, **options) -> dict[str, Error]:
    """Errors by format of queries and keys: bfloat16, e4m3, and e4m3 without subtracting the mean of the keys."""
    given = [x.bfloat16() for x in (query, key, value)]
    exact = na2d(*(x.double() for x in given), **options, return_lse=True)
    mirrored = quantized.quantize(given[0], given[1], -given[1].flatten(1, 2))  # whose mean is zero
    unshifted = quantized.restore(mirrored, torch.bfloat16)[:2]
    return {
        "bfloat16": Error.of(na2d(*given, **options, return_lse=True), exact),
        "e4m3": Error.of(na2d(*given, **options, qk_dtype=E4M3, return_lse=True), exact),
        "e4m3, mean not subtracted": Error.of(na2d(*unshifted, given[2], **options, return_lse=True), exact),
    }


def random_cases() -> Iterator[tuple[str, dict[str, Error]]]:
    draw = torch.Generator().manual_seed(0)
    for side, window, head_dim in ((56, 7, 32), (48, 21, 64), (48, 21, 128)):
        query, key, value = torch.randn(3, 1, side, side, 4, head_dim, generator=draw)
        yield f"normal, {window}×{window} keys, head dim {head_dim}", errors(query, key, value, window=window)
    shift = 8 * torch.randn(4, 128, generator=draw)
    yield "the last, every channel of keys shifted by 8 · normal", errors(query, key + shift, value, window=21)


def listed_cases() -> Iterator[tuple[str, dict[str, Error]]]:
    """Of block-sparse attention: a quarter of the cubes of 4×4×4 tokens, head dim 64."""
    formats = {"bfloat16": None, "int8": torch.int8, "e4m3": E4M3, "signs": ONE_BIT}
    draw = torch.Generator().manual_seed(0)
    for name, shift, scale in (
        ("normal", 0.0, 1.0),
        ("every channel of keys shifted by 5 · normal", 5.0, 1.0),
        ("logits three times as large", 0.0, 3**0.5),
    ):
        query, key, value = torch.randn(3, 1, 8, 16, 16, 4, 64, generator=draw)
        key = scale * key + shift * torch.randn(4, 64, generator=draw)
        query, key, value = (scale * query).bfloat16(), key.bfloat16(), value.bfloat16()
        mask = masks.vsa(query, key, sparsity=0.75, block=4)
        attend = partial(block_sparse_attention, mask=mask, return_lse=True)
        exact = attend(query.double(), key.double(), value.double())
        found = {numbers: attend(query, key, value, qk_dtype=dtype) for numbers, dtype in formats.items()}
        yield name, {numbers: Error.of(got, exact) for numbers, got in found.items()}


@torch.no_grad()
def trained() -> tuple[list[dict[str, Error]], list[float]]:
    """Errors of the layers of a trained DiNAT, and its test accuracy without and with e4m3."""
    model = timm.create_model("natten_dinat_pico", pretrained=True).eval()
    layers = [m for m in model.modules() if isinstance(m, NeighborhoodAttention2d)]
    found: list[dict[str, Error]] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, NeighborhoodAttention2d)
        query, key, value = layer._project(layer._pad(inputs[0]))
        found.append(errors(query, key, value, window=layer.window, dilation=layer.dilation, bias=layer.rpb))

    data = Digits(batch_size=360)
    data.setup("test")
    images, digits = next(iter(data.test_dataloader()))
    right = []
    for qk_dtype in (None, E4M3):
        for layer in layers:
            layer.qk_dtype = qk_dtype
        right.append((model(images).argmax(-1) == digits).float().mean().item())
    for layer in layers:
        layer.qk_dtype = None
        layer.register_forward_pre_hook(measure)
    model(images)
    return found, right


def rows(name: str, found: dict[str, Error]) -> Iterator[str]:
    for i, (numbers, error) in enumerate(found.items()):
        yield f"| {'' if i else name} | {numbers} | {error.rms:.2%} | {error.largest:.1%} | {error.lse:.2g} |"


def main() -> None:
    print(*HEAD, sep="\n")
    for name, found in random_cases():
        print(*rows(name, found), sep="\n")
    layers, right = trained()
    worst = {kind: Error(*map(max, zip(*(layer[kind] for layer in layers), strict=True))) for kind in layers[0]}
    print(*rows(f"a trained DiNAT, the worst of {len(layers)} layers", worst), sep="\n")
    print("", *HEAD, sep="\n")
    for name, found in listed_cases():
        print(*rows(name, found), sep="\n")
    print("\nImages named rightly without and with e4m3: {:.2%}, {:.2%}".format(*right))


if __name__ == "__main__":
    main()
