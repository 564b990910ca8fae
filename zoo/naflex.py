"""Images of unequal sizes, and batches of timm's NaFlex loader, for backbones on maps.

NaFlex (arXiv:2502.14786, section 2; `timm.data.create_naflex_loader`) hands out patches with coordinates. Backbones
with convolutions take images instead, of any size: patches are put together again, images of one size go through the
model as one batch, and nothing is padded or resized.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from ..kernels.ragged.layout import find_groups, take_members

Images = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Batches = list[tuple[tuple[int, ...], Tensor]]  # numbers of the images, and the images [b, C, H, W]


class NaFlexModel(nn.Module):
    """A backbone that takes images of unequal sizes, each as if it were alone.

    It costs as many passes as there are different sizes in a batch: a loader that groups sizes makes them few.

    Args:
        model: a backbone that takes `[B, in_chans, H, W]` of any H and W, such as the NAT, DiNAT, PVT or LITv2 models.
        in_chans: channels of an image.
        patch_size: height and width of a patch, or one number for both; None for square ones. Only for batches of
            patches.
        channels_last: whether a patch holds its channels last, `patchify_channels_last` of the loader.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] | None = None,
        channels_last: bool = True,
    ):
        super().__init__()
        self.model = model
        self.in_chans, self.channels_last = in_chans, channels_last
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size

    def forward(self, x: Images) -> Tensor:
        """The model's output for every image, such as logits `[B, num_classes]`.

        Args:
            x: the dict of timm's NaFlex loader: `patches [B, N, P * P * C]` or `[B, N, P, P, C]`, `patch_coord [B, N,
                2]` with (y, x), `patch_valid [B, N]`; or a list of images `[C, H, W]`; or images `[B, C, H, W]`.

        Raises:
            ValueError, TypeError: patches that are no whole images, or another form; outputs whose shape depends on the
                size of the image, which `forward_features` takes.
        """
        batches = self._batches(x)
        outs = [self.model(images) for _, images in batches]
        if any(out.shape[1:] != outs[0].shape[1:] for out in outs):
            raise ValueError(
                f"outputs {[tuple(out.shape) for out in outs]} depend on the size of the image: use forward_features"
            )
        members = torch.tensor([i for group, _ in batches for i in group], device=outs[0].device)
        return torch.cat(outs).index_select(0, members.argsort())

    def forward_features(self, x: Images) -> list[Tensor]:
        """The model's last map of every image, in the order of the images and each of its own size."""
        run: Callable[[Tensor], Tensor] = self.model.forward_features  # pyright: ignore[reportAssignmentType]
        found = {i: y for group, images in self._batches(x) for i, y in zip(group, run(images), strict=True)}
        return [found[i] for i in range(len(found))]

    def _batches(self, x: Images) -> Batches:
        if isinstance(x, Mapping):
            return self._of_patches(x)
        if isinstance(x, Tensor):
            if x.dim() != 4:
                raise ValueError(f"x.shape={tuple(x.shape)} must be [B, {self.in_chans}, H, W]")
            return [(tuple(range(len(x))), x)]
        if not isinstance(x, Sequence) or not x or not all(isinstance(t, Tensor) and t.dim() == 3 for t in x):
            raise TypeError("x must be a dict of patches, images [B, C, H, W], or a list of images [C, H, W]")
        sizes = tuple((t.shape[1], t.shape[2]) for t in x)
        return [(group.members, torch.stack([x[i] for i in group.members])) for group in find_groups(sizes, sizes)]

    def _of_patches(self, x: Mapping[str, Tensor]) -> Batches:
        patches, coord, valid = x["patches"], x["patch_coord"], x["patch_valid"]
        height, width = self._patch(patches)
        rows, columns = (coord.masked_fill(~valid[..., None], -1).amax(1) + 1).unbind(1)
        counts = torch.stack((rows, columns, valid.sum(1)), 1).tolist()  # the one thing that the host must know
        for i, (h, w, n) in enumerate(counts):
            if n != h * w or not n:
                raise ValueError(
                    f"image {i} has {n} patches of a grid of {h} x {w}: all of them are needed, so drop no patches and "
                    "give the loader a max_seq_len that holds them"
                )
        sizes = tuple((h, w) for h, w, _ in counts)
        found = []
        for group in find_groups(sizes, sizes):
            (h, w), members = group.size, group.members
            of_group, where, there = (take_members(t, members) for t in (patches.flatten(2), coord, valid))
            place = (where[..., 0] * w + where[..., 1]).masked_fill(~there, h * w)  # what is missing sorts to the end
            of_group = of_group.take_along_dim(place.argsort(1)[:, : h * w, None], 1)
            if self.channels_last:
                grid = of_group.unflatten(2, (height, width, self.in_chans)).permute(0, 1, 4, 2, 3)
            else:
                grid = of_group.unflatten(2, (self.in_chans, height, width))
            images = grid.unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5)  # [b, C, h, height, w, width]
            found.append((members, images.flatten(4, 5).flatten(2, 3)))
        return found

    def _patch(self, patches: Tensor) -> tuple[int, int]:
        """Height and width of a patch."""
        if patches.dim() == 5:
            shape = patches.shape[2:4] if self.channels_last else patches.shape[3:5]
            return shape[0], shape[1]
        if patches.dim() != 3 or patches.shape[2] % self.in_chans:
            raise ValueError(
                f"patches.shape={tuple(patches.shape)} must be [B, N, P * P * {self.in_chans}] or five-dimensional"
            )
        pixels = patches.shape[2] // self.in_chans
        height, width = self.patch_size or (isqrt(pixels), isqrt(pixels))
        if height * width != pixels:
            raise ValueError(f"patch_size={(height, width)} must hold the {pixels} pixels of a patch")
        return height, width
