"""Who lists a block of keys, by counting: without a sort, a wait for the host or a number per pair of blocks.

Blocks of queries are cut into chunks. `count_kernel` counts per chunk how often each block of keys is listed; sums over
chunks say where the entries of a chunk belong, and `place_kernel` puts them there, one list after the other. Counts are
integers, so the order of their additions does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launching import cdiv, tile_length

CHUNKS = 64  # of the blocks of queries: as many programs a row of lists
MOST_ENTRIES = 1024  # of a list at a time


@triton.jit
def listed_entries(idx_ptr, num, j, most, key_boxes, box, ENTRIES: tl.constexpr):
    """Numbers of `ENTRIES` blocks of keys from place `j` of the list of a block of queries, and which of them count."""
    place = j + tl.arange(0, ENTRIES)
    number = tl.load(idx_ptr + box * most + place, mask=place < num, other=-1)
    return place, number, (number >= 0) & (number < key_boxes)


@triton.jit(do_not_specialize=["boxes", "most", "key_boxes", "chunk"])
def count_kernel(num_ptr, idx_ptr, count_ptr, boxes, most, key_boxes, chunk, ENTRIES: tl.constexpr):
    """Add to zeros `[rows, chunks, key boxes]` how often the lists of a chunk of blocks of queries name each block."""
    row, part = tl.program_id(0), tl.program_id(1)
    num_ptr += row.to(tl.int64) * boxes
    idx_ptr += row.to(tl.int64) * boxes * most
    count_ptr += (row.to(tl.int64) * tl.num_programs(1) + part) * key_boxes
    for box in tl.range(part * chunk, tl.minimum(part * chunk + chunk, boxes), num_stages=1):
        num = tl.load(num_ptr + box)
        for j in tl.range(0, num, ENTRIES, num_stages=1):
            _, number, counts = listed_entries(idx_ptr, num, j, most, key_boxes, box, ENTRIES)
            tl.atomic_add(count_ptr + number, 1, mask=counts, sem="relaxed")


@triton.jit(do_not_specialize=["boxes", "most", "key_boxes", "chunk"])
def place_kernel(num_ptr, idx_ptr, next_ptr, order_ptr, boxes, most, key_boxes, chunk, ENTRIES: tl.constexpr):
    """Put the entries of a chunk of blocks of queries where `next_ptr`, `[rows, chunks, key boxes]`, says.

    A list names a block once, so a number of `next_ptr` is taken once until the barrier, and entries come in order.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    num_ptr += row.to(tl.int64) * boxes
    idx_ptr += row.to(tl.int64) * boxes * most
    order_ptr += row.to(tl.int64) * boxes * most
    next_ptr += (row.to(tl.int64) * tl.num_programs(1) + part) * key_boxes
    for box in tl.range(part * chunk, tl.minimum(part * chunk + chunk, boxes), num_stages=1):
        num = tl.load(num_ptr + box)
        for j in tl.range(0, num, ENTRIES, num_stages=1):
            place, number, counts = listed_entries(idx_ptr, num, j, most, key_boxes, box, ENTRIES)
            at = tl.atomic_add(next_ptr + number, 1, mask=counts, sem="relaxed")
            tl.store(order_ptr + at, box * most + place, mask=counts)
        tl.debug_barrier()


def invert(kv_num: Tensor, kv_idx: Tensor, key_boxes: int) -> tuple[Tensor, Tensor]:
    """`mask.invert` on a device; entries of `order` past the last of `starts` hold anything."""
    lists, (boxes, most) = kv_idx.shape[:2], kv_idx.shape[2:]
    rows, chunk = lists.numel(), cdiv(boxes, CHUNKS)
    grid, entries = (rows, cdiv(boxes, chunk)), tile_length(most, MOST_ENTRIES)
    num, idx, sizes = kv_num.contiguous(), kv_idx.contiguous(), (boxes, most, key_boxes, chunk)
    counts = kv_num.new_zeros(*grid, key_boxes)
    order = kv_idx.new_empty(*lists, boxes * most)
    if order.numel():
        count_kernel[grid](num, idx, counts, *sizes, ENTRIES=entries)
    starts = torch.nn.functional.pad(counts.sum(1).cumsum(-1), (1, 0)).to(torch.int32)  # [rows, key blocks + 1]
    after = (starts[:, None, :-1] + counts.cumsum(1, dtype=torch.int32) - counts).contiguous()
    if order.numel():
        place_kernel[grid](num, idx, after, order, *sizes, ENTRIES=entries)
    return starts.view(*lists, -1), order
