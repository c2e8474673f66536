"""What benchmarks read and train on: a feature cache made of noise, and the textbook's training on its rows."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from measure import CLOCKS, Clock
from PIL import Image
from textbook import CachedRows, TextbookHead, train_textbook
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_layerfusion import LayerFeatures, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.training import class_weights

IMAGE_SIZE = 8
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-2
NOISE_STD, NOISE_PROBABILITY = 0.05, 0.5

Model = ViTForAttentiveLayerFusionClassification


def extract_noise(
    folder: Path, *, rows: int, layers: int, width: int, classes: int = 10, rows_per_shard: int = 1024, **options: Any
) -> tuple[Model, LayerFeatures]:
    """A cache of `(2 * layers, width)` tokens in float16, written by the library itself.

    The pictures are noise, and the backbone is only as wide and deep as one needs for such rows.

    Args:
        folder: of the cache.
        options: further fields of the model's config.
    """
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=6,
        mlp_ratio=1,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE,
    )
    processor = BitImageProcessorPil(do_resize=False, do_center_crop=False)
    model = Model.from_backbone(Dinov2Model(config), num_labels=classes, image_processor=processor, **options)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (rows, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = generator.integers(0, classes, rows)
    dataset = Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()})
    features = extract_features(model, dataset, folder, batch_size=256, rows_per_shard=rows_per_shard, progress=False)
    return model, features


@dataclass
class Task:
    """What every contender trains on: the same rows, as a cache and as tensors in memory."""

    model: Model
    features: LayerFeatures
    rows: CachedRows
    batch_size: int
    folder: Path
    clock: Clock

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def class_weights(self) -> list[float]:
        return class_weights(self.rows.labels, self.num_labels)


def build_task(folder: Path, arguments: argparse.Namespace) -> Task:
    """The task that `--rows`, `--layers`, `--width`, `--classes`, `--batch_size` and `--clock` describe."""
    model, features = extract_noise(
        folder / "cache",
        rows=arguments.rows,
        layers=arguments.layers,
        width=arguments.width,
        classes=arguments.classes,
        attention_dropout=0.0,
        noise_std=NOISE_STD,
        noise_probability=NOISE_PROBABILITY,
    )
    whole = features.tensors()
    rows = CachedRows(whole["layer_features"].clone(), whole["labels"])  # the clone is in memory, not in the file
    return Task(model, features, rows, arguments.batch_size, folder, CLOCKS[arguments.clock])


def textbook_steps(task: Task, *, epochs: int, max_steps: int | None = None) -> list[float]:
    """Seconds of each step of the textbook: `Dataset.__getitem__` per row, `DataLoader`, the head in textbook order."""
    torch.manual_seed(0)
    return train_textbook(
        TextbookHead(task.features.hidden_size, len(task.features.bank), task.num_labels),
        task.rows,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        epochs=epochs,
        batch_size=task.batch_size,
        noise_std=NOISE_STD,
        noise_probability=NOISE_PROBABILITY,
        class_weights=torch.tensor(task.class_weights),
        seed=0,
        max_steps=max_steps,
        clock=task.clock,
    )
