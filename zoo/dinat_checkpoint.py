"""State dicts of NAT, DiNAT and their relatives, from every place they are published in, to our parameter names."""

import re

import torch
from torch import Tensor, nn

from ..layers.relative import resize_bias_table
from .checkpoint import fit_stage_norms, unwrap

TRANSFORMERS_KEYS = (  # pattern in a `transformers` key -> official name, applied in order
    (r"^(nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names from those of `transformers`' Nat and Dinat: query, key and value joined, layer scales split."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in TRANSFORMERS_KEYS:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    out = {}
    for key, value in renamed.items():
        if ".attn.query." in key:
            parts = [renamed[key.replace(".query.", f".{name}.")] for name in ("query", "key", "value")]
            out[key.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif key.endswith(".layer_scale_parameters"):
            block = key.removesuffix("layer_scale_parameters")
            out[block + "gamma1"], out[block + "gamma2"] = value.unbind()
        elif ".attn.key." not in key and ".attn.value." not in key:
            out[key] = value
    return out


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Published state dict to the names and shapes of `model`.

    Takes official classification files, official dense-task files (`backbone.*`) and the hub's `transformers` files.
    Index buffers are dropped, bias tables of another window or grid are interpolated. A model with `stage_norms` keeps
    its own fresh ones when the file has the classifier's norm and head instead.
    """
    state_dict = unwrap(state_dict)
    if any(".attention.self." in key for key in state_dict):
        state_dict = from_transformers(state_dict)
    own = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        if key.endswith(".relative_position_index"):
            continue
        if key.endswith(".rpb") and key in own:
            value = resize_bias_table(value, own[key].shape[1:])
        out[key] = value
    return fit_stage_norms(out, model)
