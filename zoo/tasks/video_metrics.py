"""Measures of generated clips: a judge trained on the data, Fréchet distance, change from frame to frame, likeness to a
reference, kept attention.

A Fréchet distance means something only with the features it is measured in, the number of clips and their size: all
three stand in its name and title. FVD proper needs the I3D network trained on Kinetics-400, which nobody may bundle;
whoever has it passes it as `extractor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from ...kernels.common.calling import resolve_scale
from ...kernels.ops import BlockMask, block_sparse_attention, na1d, na2d, na3d


class ClipJudge(nn.Module):
    """A small 3-D CNN that names the class of a clip and whose last features serve the Fréchet distance.

    Three convolutions of 3×3×3, each with group norm and SiLU; the second halves space, the third space and time.
    Nothing in it depends on the batch or on training mode.

    Args:
        in_channels: of the clips.
        num_classes: at least 2.
        width: channels of the first convolution, a multiple of 8; features are four times as many.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 16):
        super().__init__()
        self.num_features = 4 * width

        def stage(inputs: int, outputs: int, stride: tuple[int, int, int]) -> nn.Sequential:
            conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.SiLU())

        self.stages = nn.Sequential(
            stage(in_channels, width, (1, 1, 1)),
            stage(width, 2 * width, (1, 2, 2)),
            stage(2 * width, 4 * width, (2, 2, 2)),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def features(self, clips: Tensor) -> Tensor:
        """`[N, C, T, H, W]` → `[N, 4 * width]`: mean over time and space before the class head."""
        return self.stages(clips).mean(dim=(2, 3, 4))

    def forward(self, clips: Tensor) -> Tensor:
        """`[N, C, T, H, W]` → logits `[N, num_classes]`."""
        return self.head(self.features(clips))


def fit_judge(
    clips: Tensor,
    labels: Tensor,
    *,
    steps: int = 300,
    seed: int = 0,
    batch_size: int = 64,
    lr: float = 4e-3,
    num_classes: int | None = None,
) -> ClipJudge:
    """Trains a `ClipJudge` with AdamW and a one-cycle schedule; the same arguments give the same judge.

    Args:
        clips: `[N, C, T, H, W]`, normalised as generated clips will be.
        labels: `[N]` int64.
        steps: batches; 0 leaves the judge untrained.
        seed: of the initial weights and the batches. The global generator is left as it was.
        num_classes: None: the largest label plus one.

    Returns:
        The judge in eval mode, its parameters frozen, on the device of `clips`.

    Raises:
        ValueError: clips are not 5-D or differ from labels in number.
    """
    if clips.ndim != 5 or len(clips) != len(labels):
        raise ValueError(
            f"clips must be [N, C, T, H, W] with a label each, got {tuple(clips.shape)} and {len(labels)} labels"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        judge = ClipJudge(clips.shape[1], num_classes or int(labels.max()) + 1)
    judge.to(clips.device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1))
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(clips), (batch_size,), generator=generator).to(clips.device)
            loss = F.cross_entropy(judge(clips[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def conditional_accuracy(
    clips: Tensor, labels: Tensor, *, judge: Callable[[Tensor], Tensor], batch_size: int = 256
) -> float:
    """Share of clips `[N, C, T, H, W]` in which `judge` (clips → logits) sees the class `labels` `[N]`."""
    hits = [
        judge(some).argmax(dim=-1) == wanted
        for some, wanted in zip(clips.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.cat(hits).float().mean().item()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and unbiased covariance `[D, D]` of features `[N, D]`."""
    return features.mean(dim=0), torch.atleast_2d(features.T.cov())


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of features `[N, D]`, `[M, D]`.

    `|μa - μb|² + tr(Σa + Σb - 2 (Σa^½ Σb Σa^½)^½)` in float64, with unbiased covariances (Heusel et al. 2017, eq. 6).
    The root is taken of a symmetric matrix, so that rounding cannot make it complex. With fewer than D samples the
    distance is defined but far too large; compare only distances of equal N and M.

    Raises:
        ValueError: not two matrices of equal D, or fewer than two rows.
    """
    if (
        features_a.ndim != 2
        or features_a.shape[1:] != features_b.shape[1:]
        or min(len(features_a), len(features_b)) < 2
    ):
        shapes = tuple(features_a.shape), tuple(features_b.shape)
        raise ValueError(f"features must be [N, D] and [M, D] with N, M >= 2, got {shapes[0]} and {shapes[1]}")
    mean_a, cov_a = _moments(features_a.double())
    mean_b, cov_b = _moments(features_b.double())
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # Σa^½
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


class _Frozen(nn.Module):
    """An extractor that no `train()` of the modules around it reaches."""

    def __init__(self, extractor: Callable[[Tensor], Tensor], num_features: int):
        super().__init__()
        self.extractor, self.num_features = extractor, num_features
        if isinstance(extractor, nn.Module):
            extractor.eval()

    def train(self, mode: bool = True) -> _Frozen:
        return self

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        return self.extractor(clips)


class FrechetVideoDistance(FrechetInceptionDistance):
    """Fréchet distance of clips, accumulated over batches and devices: torchmetrics' FID on features of whole clips.

    `update(clips, real=True)` and `update(clips, real=False)`, then `compute()`.

    Args:
        extractor: clips as `update` receives them (`[N, C, T, H, W]`) → features `[N, D]`: `judge.features`, or I3D.
        num_features: D.
        name: of the extractor; it becomes part of the metric's: `fvd[digits3d]`.
        reset_real_features: False keeps the real clips' sums over `reset()`.
    """

    def __init__(
        self,
        extractor: Callable[[Tensor], Tensor],
        *,
        num_features: int,
        name: str,
        reset_real_features: bool = True,
    ):
        super().__init__(_Frozen(extractor, num_features), reset_real_features=reset_real_features, normalize=True)
        self.name, self.size = f"fvd[{name}]", ""

    def update(self, clips: Tensor, real: bool) -> None:
        """Adds clips `[N, C, T, H, W]`."""
        self.size = "x".join(map(str, clips.shape[2:]))
        super().update(clips, real=real)

    @property
    def title(self) -> str:
        """Name of the metric with what its value depends on: `fvd[digits3d], 100 of 1000 clips of 6x12x12`."""
        made, real = int(self.fake_features_num_samples), int(self.real_features_num_samples)
        return f"{self.name}, {made} generated and {real} real clips of {self.size}"


@torch.no_grad()
def change_beyond_shift(clips: Tensor, *, shift: int = 2) -> Tensor:
    """Share of a frame that no shift of the frame before it explains, averaged over a clip.

    Of consecutive frames, `sum |next - shifted|` over `sum |next - background|`, with the shift of at most `shift`
    pixels along height and width that explains the next frame best. The background is each channel's median over the
    clip; it also fills what a shift uncovers. Things that keep their form and move by whole pixels score 0, unrelated
    frames about 1. A judge of classes and distances of its features hardly see it.

    Args:
        clips: `[N, C, T, H, W]` of at least two frames, in any units.
        shift: largest number of pixels, less than H and W.

    Returns:
        `[N]` float32, the mean over frames; 0 for a clip of one colour.

    Raises:
        ValueError: clips of another shape.
    """
    if clips.ndim != 5 or clips.shape[2] < 2 or not 0 <= shift < min(clips.shape[3:]):
        raise ValueError(
            f"clips must be [N, C, T, H, W] with T >= 2 and H, W > shift={shift}, got {tuple(clips.shape)}"
        )
    height, width = clips.shape[3:]
    flat = clips.float().flatten(2)
    clips = clips.float() - flat.median(dim=2).values[:, :, None, None, None]
    following = clips[:, :, 1:]
    shown = following.abs().sum(dim=(1, 3, 4))  # [N, T - 1]
    padded = F.pad(clips[:, :, :-1], (shift,) * 4)
    least = torch.full_like(shown, torch.inf)
    for y in range(2 * shift + 1):
        for x in range(2 * shift + 1):
            shifted = padded[..., y : y + height, x : x + width]
            least = torch.minimum(least, (following - shifted).abs().sum(dim=(1, 3, 4)))
    return torch.where(shown > 0, least / shown.clamp_min(torch.finfo(shown.dtype).tiny), 0.0).mean(dim=1)


def _same_shape(clips: Tensor, reference: Tensor) -> None:
    if clips.ndim != 5 or clips.shape != reference.shape:
        raise ValueError(
            "clips and reference must be [N, C, T, H, W] of equal shape, "
            f"got {tuple(clips.shape)} and {tuple(reference.shape)}"
        )


def video_psnr(clips: Tensor, reference: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip `[N, C, T, H, W]` → `[N]`; `data_range` is white minus black."""
    _same_shape(clips, reference)
    return peak_signal_noise_ratio(
        clips.float(), reference.float(), data_range=data_range, reduction="none", dim=(1, 2, 3, 4)
    )


def video_ssim(clips: Tensor, reference: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each clip `[N, C, T, H, W]` → `[N]`: the mean over its frames (11×11 Gaussian)."""
    _same_shape(clips, reference)
    frames, wanted = (video.transpose(1, 2).flatten(0, 1).float() for video in (clips, reference))  # [N*T, C, H, W]
    scores = structural_similarity_index_measure(frames, wanted, data_range=data_range, reduction="none")
    assert isinstance(scores, Tensor)
    return scores.view(len(clips), -1).mean(dim=1)


def attention_mass_recall(
    query: Tensor, key: Tensor, *, mask: Tensor | BlockMask, scale: float | None = None, chunk: int = 1024
) -> Tensor:
    """Share of the dense softmax mass that a mask keeps, averaged over queries.

    1 means that the mask loses nothing, the density of the mask that it selects no better than chance.

    Args:
        query, key: `[B, S, heads, d]`, `[B, S', heads, d]`; with a `BlockMask` `[B, *spatial, heads, d]` on its grids.
        mask: bool, broadcasts to `[B, heads, S, S']`; True is kept. Or a `BlockMask` without bias: then the share of a
            query is `exp(lse of its lists - lse of all keys)`, and nothing has the size S × S'.
        scale: of the logits; None: `d ** -0.5`.
        chunk: queries at a time of a bool mask; memory is `B * heads * chunk * S'`.

    Returns:
        `[B, heads]` float32.

    Raises:
        TypeError: a mask of another kind.
        ValueError: a `BlockMask` with a bias, which is not about shares.
    """
    if isinstance(mask, BlockMask):
        return _block_mass_recall(query, key, mask, scale)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor or a BlockMask, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True is kept), got {mask.dtype}")
    factor = resolve_scale(query, scale)
    queries, keys = query.float().transpose(1, 2) * factor, key.float().transpose(1, 2)  # [B, heads, S, d]
    mask = mask.expand(*queries.shape[:3], keys.shape[2])
    kept = queries.new_zeros(queries.shape[:2])
    for some, allowed in zip(queries.split(chunk, dim=2), mask.split(chunk, dim=2), strict=True):
        probabilities = (some @ keys.mT).softmax(dim=-1)
        kept += (probabilities * allowed).sum(dim=(-2, -1))
    return kept / queries.shape[2]


def _block_mass_recall(query: Tensor, key: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    if mask.bias is not None:
        raise ValueError(f"mask.bias of shape {tuple(mask.bias.shape)} must be None: kept keys are counted as they are")
    kept = block_sparse_attention(query, key, key, mask=mask, scale=scale, return_lse=True)[1]
    grid, key_grid = query.shape[1:-2], key.shape[1:-2]
    if grid == key_grid:
        dense = (na1d, na2d, na3d)[len(grid) - 1]
        everything = dense(query, key, key, window=tuple(grid), scale=scale, return_lse=True)[1]
    else:
        count = math.prod([-(-n // b) for n, b in zip(key_grid, mask.key_block, strict=True)])
        lists = torch.arange(count, dtype=torch.int32, device=query.device).expand(*mask.kv_idx.shape[:3], count)
        full = mask._replace(kv_num=torch.full_like(mask.kv_num, count), kv_idx=lists, inverse=None)
        everything = block_sparse_attention(query, key, key, mask=full, scale=scale, return_lse=True)[1]
    return (kept - everything).float().exp().flatten(1, -2).mean(dim=1)


def window_mass_recall(
    query: Tensor,
    key: Tensor,
    *,
    window: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    causal: bool | tuple[bool, bool, bool] = False,
    scale: float | None = None,
) -> Tensor:
    """`attention_mass_recall` of a 3-D neighborhood on `[B, T, H, W, heads, d]` → `[B, heads]`, without any S×S tensor.

    The kept share of a query is `exp(lse_window - lse_all)`, with the log-sum-exps that `na3d` returns. `causal`
    axes are causal in the dense attention too.
    """
    grid = tuple(query.shape[1:4])
    lse = [
        na3d(query, key, key, window=size, stride=steps, dilation=gaps, causal=causal, scale=scale, return_lse=True)[1]
        for size, steps, gaps in ((window, stride, dilation), (grid, 1, 1))
    ]
    return (lse[0] - lse[1]).float().exp().mean(dim=(1, 2, 3))
