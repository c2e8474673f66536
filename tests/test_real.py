"""A real pretrained backbone, real images, the real Trainer."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, set_seed

from hf_layerfusion import ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.images import resize_processor
from hf_layerfusion.training import ImageCollator, LayerFeatureCollator, adamw, build_compute_metrics

CLASSES = ["0", "1", "2", "3"]
TRAIN_ROWS, TEST_ROWS = 96, 60


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits 0 to 3, split once: the rows are independent pictures."""
    data = load_digits()
    rows = np.random.default_rng(0).permutation(np.flatnonzero(data.target < len(CLASSES)))
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})

    def take(index):
        pictures = [PILImage.fromarray(np.uint8(data.images[i] * 255 / 16)) for i in index]
        return Dataset.from_dict({"image": pictures, "label": data.target[index].tolist()}, features=features)

    return take(rows[:TRAIN_ROWS]), take(rows[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS])


def build_model(backbone_folder, image_size, **overrides):
    set_seed(0)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone_folder, id2label=CLASSES, **overrides)
    model.image_processor = resize_processor(model.image_processor, image_size)
    return model


def train(model, train_rows, test_rows, collator, folder, **arguments):
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=8,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=32,
        learning_rate=1e-3,
        seed=0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        data_collator=collator,
        compute_metrics=build_compute_metrics(model.config),
        optimizer_cls_and_kwargs=adamw(model, args),
    )
    trainer.train()
    return trainer.predict(test_rows)


@pytest.mark.slow
def test_trainer_from_pixels_and_from_cache_give_the_same_head(small_backbone_folder, digits, tmp_path):
    model = build_model(small_backbone_folder, 28)
    collator = ImageCollator(model.image_processor)
    from_pixels = train(model, *digits, collator, tmp_path, remove_unused_columns=False)
    # A quarter of the rows would be right by chance.
    assert from_pixels.metrics["test_accuracy"] > 0.8

    # Same seed, same batches. A float32 cache holds the very tokens; one in float16 rounds them to 11 bits, which may
    # tip a row on the edge between two classes, but not more than one.
    for dtype, noise, rows in (("float32", 1e-4, 0), ("float16", 5e-2, 1)):
        model = build_model(small_backbone_folder, 28)
        cached = [
            extract_features(model, part, tmp_path / dtype / name, dtype=dtype)
            for name, part in zip(("train", "test"), digits, strict=True)
        ]
        from_cache = train(model, *cached, LayerFeatureCollator(len(model.config.bank)), tmp_path)
        np.testing.assert_allclose(from_cache.predictions, from_pixels.predictions, atol=noise)
        difference = abs(from_cache.metrics["test_accuracy"] - from_pixels.metrics["test_accuracy"])
        assert difference * TEST_ROWS <= rows + 1e-6


def test_hooks_read_what_the_real_backbone_returns(backbone_folder):
    model = build_model(backbone_folder, 56, layers=[0, 1, 6, 12], modules=["block", "final_norm"])
    pixel_values = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        outputs = model.backbone(pixel_values, output_hidden_states=True)
    tokens = model.extract_layer_features(pixel_values)
    expected = [outputs.hidden_states[layer] for layer in (0, 1, 6, 12)] + [outputs.last_hidden_state]
    by_tap = torch.stack([pool for state in expected for pool in (state[:, 0], state[:, 1:].mean(dim=1))], dim=1)
    torch.testing.assert_close(tokens, by_tap, rtol=1e-5, atol=1e-5)
