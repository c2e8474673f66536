"""SigLIP 2 takes patches of any grid, padded to one number of them: their masks go the whole way."""

import datasets
import numpy as np
import pytest
import torch
from backbone_zoo import build
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from hf_layerfusion import ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.training import ImageCollator

SIZES = [(32, 32), (64, 24), (24, 64), (16, 48)]  # width and height
PATCHES = 32


@pytest.fixture(scope="module")
def model():
    backbone = build("siglip2_vision_model")
    processor = Siglip2ImageProcessorPil(patch_size=backbone.config.patch_size, max_num_patches=PATCHES)
    return ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=2, image_processor=processor)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    rows = [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features=columns)


def by_hand(model, picture):
    """The mean over the patches of one picture, without padding."""
    given = model.image_processor(images=picture, return_tensors="pt")
    count = int(given["pixel_attention_mask"].sum())
    with torch.no_grad():
        states = model.backbone(**given, output_hidden_states=True).hidden_states[1:]
    return torch.stack([state[0, :count].mean(dim=0) for state in states]), count


def test_pictures_of_several_shapes_are_pooled_over_their_own_patches(model, pictures, tmp_path):
    features = extract_features(model, pictures, tmp_path, batch_size=3, dtype="float32", progress=False)
    counts = set()
    for row, picture in enumerate(pictures["image"]):
        expected, count = by_hand(model, picture)
        counts.add(count)
        found = torch.as_tensor(features.dataset[row]["layer_features"]).view_as(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(counts) > 1  # some pictures were padded


def test_the_collator_s_batches_give_what_the_cache_gives(model, pictures, tmp_path):
    batch = ImageCollator(model.image_processor)([pictures[i] for i in range(4)])
    assert set(batch) == {"pixel_values", "pixel_attention_mask", "spatial_shapes", "labels"}
    features = extract_features(model, pictures, tmp_path, dtype="float32", progress=False)
    cached = torch.stack([torch.as_tensor(row["layer_features"]) for row in features.dataset])
    with torch.no_grad():
        live = model(**batch)
        found = model(layer_features=cached.view(4, len(model.config.bank), -1), labels=batch["labels"])
    torch.testing.assert_close(found.logits, live.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, live.loss, rtol=1e-4, atol=1e-5)
