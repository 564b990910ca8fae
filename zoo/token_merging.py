"""Bipartite soft matching of tokens on a grid (ToMe for Stable Diffusion, arXiv:2303.17604)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def random_destinations(shape: tuple[int, int], cell: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Mask of destination tokens, bool `[H * W]` on the CPU: one random token per whole cell of the grid."""
    (height, width), (rows, columns) = shape, cell
    cells = (height // rows, width // columns)
    device = "cpu" if generator is None else generator.device
    chosen = torch.randint(rows * columns, cells, generator=generator, device=device).cpu()
    grid = torch.zeros(height, width, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(cells[0]) * rows, torch.arange(cells[1]) * columns, indexing="ij")
    grid[y + chosen // columns, x + chosen % columns] = True
    return grid.flatten()


class Matching:
    """Every source token with the most similar destination token, the most similar pairs first.

    One matching serves any number of merged tokens: `merging(count)` merges the first `count` pairs.

    Args:
        tokens: `[B, N, C]`, compared by cosine similarity.
        destination: `[N]`, which tokens are destinations, the same in every batch entry; at least one is.
    """

    def __init__(self, tokens: Tensor, destination: Tensor):
        self.tokens = tokens.shape[1]
        self.destinations = destination.nonzero().flatten().to(tokens.device)  # [D]
        self.sources = (~destination).nonzero().flatten().to(tokens.device)  # [S]
        unit = normalize(tokens.detach(), dim=-1)
        similarity, nearest = (unit[:, self.sources] @ unit[:, self.destinations].mT).max(dim=-1)  # [B, S]
        self.order = similarity.argsort(dim=-1, descending=True, stable=True)
        self.nearest = nearest.gather(1, self.order)

    def merging(self, count: int) -> "Merging":
        """Merge the `count` most similar sources, or all sources if there are fewer."""
        return Merging(self, min(count, len(self.sources)))


class Merging:
    """Merged sources are averaged into their destinations; what is left are kept sources, then destinations."""

    def __init__(self, matching: Matching, count: int):
        sources = matching.sources[matching.order]  # [B, S], as indices of tokens
        self.tokens, self.count = matching.tokens, count
        self.merged, self.kept = sources[:, :count], sources[:, count:]
        self.target = matching.nearest[:, :count]  # which destination each merged source joins
        self.destinations = matching.destinations.expand(len(sources), -1)

    def __len__(self) -> int:
        """Number of tokens left."""
        return self.tokens - self.count

    def merge(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, len(self), C]`."""
        kept, merged, destinations = (_take(x, i) for i in (self.kept, self.merged, self.destinations))
        index = self.target[..., None].expand_as(merged)
        return torch.cat([kept, destinations.scatter_reduce(1, index, merged, reduce="mean")], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """`[B, len(self), C]` to `[B, N, C]`: a merged source gets what its destination has."""
        kept, destinations = x.split([self.kept.shape[1], self.destinations.shape[1]], dim=1)
        values = torch.cat([kept, destinations, _take(destinations, self.target)], dim=1)
        index = torch.cat([self.kept, self.destinations, self.merged], dim=1)
        return torch.empty_like(values).scatter(1, index[..., None].expand_as(values), values)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, n, C]` of `x [B, N, C]` at `index [B, n]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
