"""What a head has learned, and what its tokens hold: attention over layers, similarity between tokens, shift."""

from .attention import AttentionSummary, summarise_attentions
from .shift import ShiftEstimate, TapRecommendation, estimate_shift, recommend_taps
from .similarity import TokenSimilarity, linear_cka, rbf_cka, rsa

__all__ = [
    "AttentionSummary",
    "ShiftEstimate",
    "TapRecommendation",
    "TokenSimilarity",
    "estimate_shift",
    "linear_cka",
    "rbf_cka",
    "recommend_taps",
    "rsa",
    "summarise_attentions",
]
