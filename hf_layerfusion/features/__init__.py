"""Tokens on disk: extracted once, read many times."""

from .extract import extract_features
from .store import LayerFeatures

__all__ = ["LayerFeatures", "extract_features"]
