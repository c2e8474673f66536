"""Small labelled pictures and a tiny backbone as folders, as people have them on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from modeling_helpers import IMAGE_SIZE, tiny_backbone
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

CLASSES = ["blue", "green", "red"]


def picture(label: int, seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    """Noise with a tint that tells the class; width and height are `size`."""
    pixels = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3))
    pixels[:, :, 2 - label] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def write_pictures(folder: Path, per_class: int, first_seed: int = 0) -> Path:
    """`folder/class/number.png`, of different sizes."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            seed = first_seed + label * per_class + number
            picture(label, seed, (20 + seed % 5, 30 - seed % 7)).save(folder / name / f"{number:02d}.png")
    return folder


def save_tiny_backbone(folder: Path, model_type: str = "dinov2") -> Path:
    """A random backbone with its image processor."""
    tiny_backbone(model_type).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    BitImageProcessorPil(size={"shortest_edge": IMAGE_SIZE + 4}, crop_size=size).save_pretrained(folder)
    return folder
