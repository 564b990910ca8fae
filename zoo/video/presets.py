"""Sizes of `VideoDiT`: 12 dim^2 parameters a block, 16 dim^2 with cross-attention."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # pixels of small clips, on CPU
    "nano": {
        "in_channels": 1,
        "patch_size": (2, 4, 4),
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "rope_theta": 100.0,
    },
    "s": {"num_layers": 12, "num_attention_heads": 6},
    "b": {"num_layers": 12, "num_attention_heads": 12},
    "l": {"num_layers": 24, "num_attention_heads": 16, "mlp": "swiglu"},
    "xl": {"num_layers": 28, "num_attention_heads": 18, "mlp": "swiglu"},
    # Latte-XL/2 (arXiv:2401.03048): layers attend within frames and along time in turn
    "latte_xl": {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "attention": ["spatial", "temporal"],
    },
}
