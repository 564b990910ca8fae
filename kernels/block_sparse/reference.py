"""Block-sparse attention by its definition: all logits, a dense mask made from the lists, a softmax. Any dtype."""

from math import log

import torch
from torch import Tensor

from .call import BlockSparseCall
from .mask import BlockMask, box_of_token, boxes, by_entry, by_head, listed


def dense_bias(mask: BlockMask, query_shape, key_shape, dtype: torch.dtype) -> Tensor:
    """Addend of the logits, `[B or 1, lists, queries, keys]`: the bias of the mask, and -inf where invisible."""
    device = mask.kv_idx.device
    count = 1
    for n in boxes(key_shape, mask.key_block):
        count *= n
    seen = listed(mask.kv_num, mask.kv_idx)
    values = torch.zeros(seen.shape, dtype=dtype, device=device) if mask.bias is None else mask.bias.to(dtype)
    values = values.expand(seen.shape) if mask.bias is None else values
    lead = torch.broadcast_shapes(seen.shape, values.shape)
    number = torch.where(seen, mask.kv_idx, count).long()  # ignored entries go to a block that is cut off again
    unseen = torch.full((*lead[:-1], count + 1), float("-inf"), dtype=dtype, device=device)
    by_box = unseen.scatter(-1, number.expand(lead), values.expand(lead))[..., :count]
    query_box, _ = box_of_token(query_shape, mask.query_block, device)
    key_box, key_place = box_of_token(key_shape, mask.key_block, device)
    bias = by_box.index_select(2, query_box).index_select(3, key_box)
    if mask.kv_len is not None:
        absent = key_place >= by_entry(mask.kv_len)[:, key_box]  # [B or 1, keys]
        bias = torch.where(absent[:, None, None], float("-inf"), bias)
    return bias


def skip(logits: Tensor, mask: BlockMask, query_shape, key_shape, threshold: float) -> Tensor:
    """Logits `[B, heads, queries, keys]` with -inf in the blocks that are skipped, list by list and place by place."""
    query_box, query_place = box_of_token(query_shape, mask.query_block, logits.device)
    key_box, _ = box_of_token(key_shape, mask.key_block, logits.device)
    exists = torch.ones_like(query_box, dtype=torch.bool)[None]
    if mask.q_len is not None:
        exists = query_place < by_entry(mask.q_len)[:, query_box]
    kv_num, kv_idx = (by_head(x, logits.shape[1]) for x in (mask.kv_num, mask.kv_idx))
    values, hidden = logits.detach(), torch.zeros_like(logits, dtype=torch.bool)
    for batch in range(logits.shape[0]):
        for head in range(logits.shape[1]):
            lists = kv_idx[batch % kv_idx.shape[0], head % kv_idx.shape[1]]
            numbers = kv_num[batch % kv_num.shape[0], head % kv_num.shape[1]]
            for box in range(lists.shape[0]):
                own = ((query_box == box) & exists[batch % exists.shape[0]]).nonzero()  # [queries, 1]
                largest = values.new_full((own.shape[0],), float("-inf"))
                for number in lists[box, : int(numbers[box])]:
                    keys = (key_box == number).nonzero()[:, 0]
                    highest = values[batch, head][own, keys].amax(1)
                    if (highest - largest < log(threshold)).all():
                        hidden[batch, head, own, keys] = True
                    else:
                        largest = largest.maximum(highest)
    return logits.masked_fill(hidden, float("-inf"))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: BlockSparseCall,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and natural log-sum-exp `[B, *spatial, heads]`; see `api`."""
    mask, scale = call.mask, call.scale
    additional_keys, additional_values, additional_mask = call.additional
    heads, query_shape, key_shape = query.shape[-2], query.shape[1:-2], key.shape[1:-2]
    accumulate = torch.promote_types(query.dtype, torch.float32)

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d], key heads repeated for their query heads
        return x.to(accumulate).flatten(1, -3).transpose(1, 2).repeat_interleave(heads // x.shape[-2], dim=1)

    q, k, v = flat(query), flat(key), flat(value)
    bias = by_head(dense_bias(mask, query_shape, key_shape, accumulate), heads)
    logits = (q @ k.transpose(-1, -2) * scale + bias).masked_fill(bias == float("-inf"), float("-inf"))
    if call.skip_threshold is not None:
        logits = skip(logits, mask, query_shape, key_shape, call.skip_threshold)
    if additional_keys is not None and additional_values is not None:
        visible = torch.ones(additional_keys.shape[:2], dtype=torch.bool, device=query.device)
        if additional_mask is not None:  # masked tokens may hold anything
            visible = additional_mask
        ek, ev = (x.masked_fill(~visible[..., None, None], 0) for x in (additional_keys, additional_values))
        to_additional = q @ flat(ek).transpose(-1, -2) * scale
        logits = torch.cat([logits, to_additional.masked_fill(~visible[:, None, None], float("-inf"))], dim=-1)
        v = torch.cat([v, flat(ev)], dim=2)
    if mask.q_len is not None:
        box, place = box_of_token(query_shape, mask.query_block, query.device)
        absent = place >= by_entry(mask.q_len)[:, box]  # [B or 1, queries]
        logits = logits.masked_fill(absent[:, None, :, None], float("-inf"))
    empty = (logits == float("-inf")).all(-1, keepdim=True)  # [B, heads, T, 1]
    logits = logits.masked_fill(empty, 0)  # any finite row: what comes of it is replaced
    out = (logits.softmax(-1) @ v).masked_fill(empty, 0)
    lse = logits.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    out, lse = (x.transpose(1, 2).unflatten(1, query_shape) for x in (out, lse))
    return out.to(query.dtype), lse
