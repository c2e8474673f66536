"""What `transformers.Trainer` needs to train a head: collators, metrics, class weights, the optimizer."""

from .class_weights import class_weights
from .collators import ImageCollator, LayerFeatureCollator
from .fine_tuning import fine_tune, predict_images
from .metrics import Accuracy, BalancedAccuracy, MacroF1, TopKAccuracy, build_compute_metrics
from .optimization import adamw, parameter_groups
from .run import build_trainer
from .trainer import LayerFusionTrainer

__all__ = [
    "Accuracy",
    "BalancedAccuracy",
    "ImageCollator",
    "LayerFeatureCollator",
    "LayerFusionTrainer",
    "MacroF1",
    "TopKAccuracy",
    "adamw",
    "build_compute_metrics",
    "build_trainer",
    "class_weights",
    "fine_tune",
    "parameter_groups",
    "predict_images",
]
