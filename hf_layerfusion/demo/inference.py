"""From a file that somebody dropped to what the page shows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import LayerFusionError
from ..images import decode_image, process_image, stack_images
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

# A picture of this size takes 200 MB once it is decoded, and a page may have many visitors.
MOST_MEGAPIXELS = 64
_SHOWN_BY_BROWSERS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "MPO", "PNG", "WEBP")


@dataclass
class Reading:
    """What a head says about one picture.

    Attributes:
        scores: `(label, value)`, the highest first.
        kind: what the values are: `"probability"` (they sum to one), `"independent"` (probabilities of labels that may
            hold together), `"value"` (of a regression).
        attentions: `(H, N)`, the weight of each token in each attention head, queries below each other; `None` for a
            head without attention.
        notes: what somebody should know about how the picture was read.
    """

    scores: list[tuple[str, float]]
    kind: str
    attentions: Tensor | None
    notes: list[str] = field(default_factory=list)


def open_picture(path: str | Path, name: str) -> tuple[Image.Image, list[str]]:
    """Decode an upload.

    Args:
        path: the file.
        name: what it is called in messages.

    Returns:
        The RGB picture, and notes on what was left out of it.

    Raises:
        LayerFusionError: if it is no picture, damaged, or too large; written for people who do not know this library.
    """
    try:
        with Image.open(path) as image:  # the header alone
            notes = _check_header(image, name)
        return decode_image(path, name), notes
    except Image.DecompressionBombError:
        raise LayerFusionError(_too_large(name)) from None
    except UnidentifiedImageError:
        raise LayerFusionError(
            f"{name} is not a picture, or of a format that is not known here. Try a JPEG, PNG, WebP or GIF file."
        ) from None
    except LayerFusionError as error:
        # Behind the errors of `decode_image` stands what is wrong with the pixels, or what Pillow says.
        if error.__cause__ is None or isinstance(error.__cause__, LayerFusionError):
            raise LayerFusionError(str(error.__cause__ or error)) from error
        raise LayerFusionError(_damaged(name, error.__cause__)) from error
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on broken data
        raise LayerFusionError(_damaged(name, error)) from error


def _check_header(image: Image.Image, name: str) -> list[str]:
    """Refuse a picture that is too large before it is decoded; returns what else should be said about it."""
    if image.width * image.height > MOST_MEGAPIXELS * 1e6:
        raise LayerFusionError(_too_large(name, image.width, image.height))
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # telephones write those, with a preview as the second picture
        notes.append(f"This file has {frames} pictures; the first one was classified.")
    if image.format not in _SHOWN_BY_BROWSERS:
        notes.append(f"Most browsers cannot show {image.format} pictures, but it was read.")
    return notes


def classify_picture(model: ViTForAttentiveLayerFusionClassification, picture: Image.Image) -> Reading:
    """Run one picture through the model.

    Args:
        model: in eval mode, with its image processor.
        picture: in RGB.
    """
    inputs: dict[str, Any] = stack_images([process_image(model.image_processor, picture)])
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    with torch.inference_mode():
        output = model(**inputs, output_attentions=True)
    logits = output.logits[0].float().cpu()
    kind = _kind_of(model)
    values = {"probability": logits.softmax(dim=-1), "independent": logits.sigmoid(), "value": logits}[kind]
    # Two classes may have the same name, so this is no dict.
    scores = [(str(model.config.id2label[i]), float(values[i])) for i in values.argsort(descending=True).tolist()]
    attentions = output.layer_attentions
    return Reading(scores, kind, None if attentions is None else attentions[0].flatten(0, 1).float().cpu())


def _kind_of(model: ViTForAttentiveLayerFusionClassification) -> str:
    problem_type = model.config.problem_type
    if problem_type == "multi_label_classification":
        return "independent"
    if problem_type == "regression" or (problem_type is None and model.config.num_labels == 1):
        return "value"
    return "probability"


def _too_large(name: str, width: int = 0, height: int = 0) -> str:
    size = f" ({width:,} x {height:,} pixels)" if width else ""
    return f"{name} is too large{size}. Scale it down to at most {MOST_MEGAPIXELS} megapixels."


def _damaged(name: str, error: BaseException) -> str:
    return f"{name} is damaged or cut off and cannot be read ({str(error) or type(error).__name__}). Save or download it again."
