"""The synthetic weights and images with which the outputs in `goldens/` were recorded: functions of names and shapes.

Scheme "v1" draws everything small, so attention is nearly uniform and a wrong bias hardly shows; "v2" scales by fan-in,
with attention far from uniform, and is the real test. "hot" is like "v2", with other numbers, for later recordings.
"""

import json
import lzma
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn


def value(key: str, shape: tuple[int, ...], scheme: str) -> np.ndarray:
    """The recorded weights of one parameter or running statistic: float32, drawn from a seed that hashes its name."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    x = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
    hot = scheme != "v1"
    if leaf == "running_var":
        y = np.abs(x) * 0.2 + 0.5 if scheme == "v2" else np.abs(x) * 0.1 + 1
    elif leaf == "running_mean":
        y = (0.1 if hot else 0.02) * x
    elif leaf == "weight" and len(shape) == 1:
        y = 1 + (0.1 if hot else 0.02) * x
    elif leaf.startswith("gamma"):
        y = (0.5 if hot else 0.1) * (1 + 0.1 * x)
    elif not hot:
        y = 0.02 * x
    elif leaf == "weight":
        quiet = scheme == "v2" and len(shape) == 4 and shape[1] == 1  # depthwise
        y = x / np.sqrt(np.prod(shape[1:])) * (0.3 if quiet else 1.0)
    else:
        bias = leaf.endswith("bias") and len(shape) == 1 if scheme == "hot" else leaf == "bias"
        y = (0.1 if bias else 0.5 if scheme == "v2" else 0.2) * x
    return y.astype(np.float32)


def load_synthetic(model: nn.Module, scheme: str) -> nn.Module:
    """Give `model`, built with official names, the recorded weights; buffers but running statistics stay."""
    state, names = model.state_dict(), {name for name, _ in model.named_parameters()}
    drawn = [k for k in state if k in names or k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    state |= {k: torch.from_numpy(value(k, tuple(state[k].shape), scheme)).to(state[k].dtype) for k in drawn}
    model.load_state_dict(state)
    return model.eval()


def official_weights(shapes: dict[str, list[int]], scheme: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The recorded weights of a whole file, by official names."""
    return {key: torch.from_numpy(value(key, tuple(shape), scheme)).to(dtype) for key, shape in shapes.items()}


def image_a(shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise, float32."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal(shape).astype(np.float32))


def image_b(shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise on a strong low-frequency pattern that differs per channel and sample, float32."""
    batch, channels, height, width = shape
    x = np.random.RandomState(1).standard_normal(shape)
    y_grid, x_grid = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    for n in range(batch):
        for c in range(channels):
            wave = np.sin(2 * np.pi * ((c + 1) * y_grid + (n + 2) * x_grid + 0.1 * c))
            x[n, c] += 1.5 * wave + (x_grid - y_grid)
    return torch.from_numpy(x.astype(np.float32))


def record(
    models: dict[str, nn.Module], *, size: int = 224, slow: bool = True, hard: bool = False, logits_too: bool = True
) -> None:
    """Write recordings of official models, by the names of ours: names, shapes and logits of "hot" weights on image a.

    The files of a family are `goldens/FAMILY_keys.json.xz`, `goldens/FAMILY_outputs.json` and one `goldens/MODEL.npz`
    each; those of other models of the family are kept.

    Args:
        models: official models that return logits, by names such as "inline_swin_t".
        size: side of the images.
        slow: whether tests compare logits on request only.
        hard: whether the models select or round, which rounding noise flips: float64 logits alone are recorded, and
            held to 1e-6.
        logits_too: False for names and shapes alone.
    """
    folder = Path(__file__).parents[1] / "goldens"
    for name, model in models.items():
        keys, outputs = (folder / f"{name.split('_')[0]}_{file}" for file in ("keys.json.xz", "outputs.json"))
        shapes = json.loads(lzma.decompress(keys.read_bytes())) if keys.exists() else {}
        shapes[name] = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        keys.write_bytes(lzma.compress(json.dumps(shapes, separators=(",", ":")).encode()))
        if not logits_too:
            continue
        x = image_a((2, 3, size, size))
        with torch.inference_mode():
            exact = load_synthetic(model.double(), "hot")(x.double())
            logits = exact if hard else load_synthetic(model.float(), "hot")(x)
            noise = 5e-8 if hard else (exact - logits).abs().max().item()
        runs = json.loads(outputs.read_text()) if outputs.exists() else {}
        runs[name] = {"a_hot": {"input": list(x.shape), "fp64_max_abs_diff": noise, "slow": slow, "hard": hard}}
        outputs.write_text(json.dumps(runs, indent=1) + "\n")
        np.savez_compressed(folder / f"{name}.npz", logits=logits.numpy())
