"""Tokens of several widths share a cache, padded to the widest; what is selected from it is as wide as it needs to be."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import (
    LayerFeatures,
    LayerFusionConfig,
    ViTForAttentiveLayerFusionClassification,
    extract_features,
    sweep,
)
from hf_layerfusion.features import token_statistics
from hf_layerfusion.recipe_tokens import recipe_bank
from hf_layerfusion.training import build_trainer

NARROW, WIDE, ROWS = 16, 32, 40


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])})
    labels = [row % 2 for row in range(ROWS)]
    return Dataset.from_dict({"image": [PILImage.fromarray(p) for p in pixels], "label": labels}, features=features)


@pytest.fixture
def model(make_vit):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        make_vit(), num_labels=2, image_processor=processor, recipe="alf"
    )


@pytest.fixture
def caches(model, images, tmp_path):
    """The same tokens beside wide ones, and alone."""
    narrow = model.config.bank
    wide = recipe_bank("module-probe:2:activation", model.config.layout)
    options = {"dtype": "float32", "rows_per_shard": 16, "progress": False}
    both = extract_features(model, images, tmp_path / "both", bank=wide | narrow, **options)
    alone = extract_features(model, images, tmp_path / "alone", bank=narrow, **options)
    assert (both.hidden_size, alone.hidden_size) == (WIDE, NARROW)
    return both, alone


@pytest.mark.parametrize(
    "rows", [slice(3, 9), [1, 2, 20], [30, 2, 2, 17]], ids=["one chunk", "ascending", "any order"]
)
def test_narrow_tokens_beside_wide_ones(model, caches, rows):
    both, alone = (features.select_bank(model.config.bank) for features in caches)
    assert both.hidden_size == NARROW
    index = np.arange(ROWS)[rows]
    assert torch.equal(both.batch(index)["layer_features"], alone.batch(index)["layer_features"])
    expected = token_statistics(alone.batch(index)["layer_features"])
    torch.testing.assert_close(both.with_statistics().batch(index)["token_statistics"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        np.asarray(both.dataset[index.tolist()]["layer_features"]), alone.batch(index)["layer_features"].numpy()
    )


def test_selected_by_coordinate_and_wide_again(caches):
    both, _ = caches
    assert both.select(modules=["block"]).hidden_size == NARROW
    assert both.select(modules=["activation"]).hidden_size == WIDE
    assert torch.equal(
        both.select(modules=["activation"]).tensors()["layer_features"], both.tensors()["layer_features"][:, :1]
    )


def test_statistics_of_an_offset_far_larger_than_the_spread():
    tokens = torch.randn(5, 3, NARROW, dtype=torch.float64) + 1000
    padded = torch.nn.functional.pad(tokens, (0, WIDE - NARROW))
    from hf_layerfusion.features.statistics import without_padding

    found = without_padding(token_statistics(padded), WIDE, NARROW)
    torch.testing.assert_close(found, token_statistics(tokens), rtol=1e-7, atol=0)


def test_heads_train_alike_from_both(model, caches, tmp_path):
    predictions = []
    for features in caches:
        # Linear: the biases in front of a BatchNorm, which have no gradient, wander by rounding alone.
        torch.manual_seed(0)
        linear = ViTForAttentiveLayerFusionClassification.from_backbone(
            model.backbone, num_labels=2, image_processor=model.image_processor, recipe="linear-all"
        )
        trainer = build_trainer(
            linear, features, tmp_path, eval_features=features, num_train_epochs=2, use_cpu=True, disable_tqdm=True
        )
        trainer.train()
        predictions.append(trainer.predict(features.select_bank(linear.config.bank)).predictions)
    np.testing.assert_allclose(*predictions, rtol=0, atol=1e-5)


def test_sweeps_choose_alike_from_both(caches):
    grid = {"learning_rate": [0.1, 0.01]}
    results = [sweep(features, recipe="alf", grid=grid, num_epochs=3, progress=False) for features in caches]
    assert results[0].scores() == results[1].scores()
    for name, value in results[0].head_state().items():
        torch.testing.assert_close(value, results[1].head_state()[name], rtol=0, atol=1e-5)


def test_least_squares_over_layers_of_several_widths(model, images, tmp_path):
    """Layer 0 has narrow tokens alone; more coordinates than rows can be fitted nearly exactly."""
    options = {"layers": [0, 2], "modules": ["block", "activation"], "pools": ["mean"]}
    layout = model.config.token_layout
    config = LayerFusionConfig(recipe="ridge-all", token_layout=layout, num_labels=2, **options)
    assert config.bank.widths(config.layout) == [NARROW, NARROW, WIDE]
    features = extract_features(model, images, tmp_path, bank=config.bank, dtype="float32", progress=False)
    grid = {"ridge_penalty": 1e-4}
    result = sweep(features, recipe="ridge-all", grid=grid, progress=False, **options)
    logits = result.build_model()(**features.tensors()).logits / result.protocol["logit_scale"]
    torch.testing.assert_close(logits, torch.eye(2)[features.labels], rtol=0, atol=0.05)


def test_opened_again(caches):
    both, _ = caches
    again = LayerFeatures.open(both.folder).select(modules=["block"])
    assert torch.equal(again.tensors()["layer_features"], both.select(modules=["block"]).tensors()["layer_features"])
