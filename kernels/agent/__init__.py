"""Agent attention: softmax attention through a few agent tokens."""

from .api import agent_attention

__all__ = ["agent_attention"]
