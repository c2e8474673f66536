"""hf_layerfusion: classify with every layer of a frozen vision backbone."""

from transformers import AutoConfig, AutoModelForImageClassification

from .bank import TokenBank, TokenCoordinate
from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError
from .features import LayerFeatures, extract_features
from .heads import AttentiveFusionHead, LinearHead, ScalarMixHead
from .modeling_layer_fusion import LayerFusionOutput, ViTForAttentiveLayerFusionClassification
from .multi_head import LayerFusionHeads, load_heads
from .recipes import RECIPES, Recipe
from .sweeps import SweepResult, sweep
from .version import __version__

AutoConfig.register(LayerFusionConfig.model_type, LayerFusionConfig, exist_ok=True)
AutoModelForImageClassification.register(LayerFusionConfig, ViTForAttentiveLayerFusionClassification, exist_ok=True)

__all__ = [
    "RECIPES",
    "AttentiveFusionHead",
    "LayerFeatures",
    "LayerFusionConfig",
    "LayerFusionError",
    "LayerFusionHeads",
    "LayerFusionOutput",
    "LinearHead",
    "Recipe",
    "ScalarMixHead",
    "SweepResult",
    "TokenBank",
    "TokenCoordinate",
    "ViTForAttentiveLayerFusionClassification",
    "__version__",
    "extract_features",
    "load_heads",
    "sweep",
]
