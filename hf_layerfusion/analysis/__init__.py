"""What a head has learned: which layers it attends to."""

from .attention import AttentionSummary, summarise_attentions

__all__ = ["AttentionSummary", "summarise_attentions"]
