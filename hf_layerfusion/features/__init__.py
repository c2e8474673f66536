"""Tokens on disk: extracted once, read many times."""

from .extract import extract_features
from .statistics import token_statistics
from .store import LayerFeatures
from .views import EpochViews

__all__ = ["EpochViews", "LayerFeatures", "extract_features", "token_statistics"]
