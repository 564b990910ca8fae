"""Linear attention: all keys and values through one matrix of state, without a softmax."""

from .api import linear_attention

__all__ = ["linear_attention"]
