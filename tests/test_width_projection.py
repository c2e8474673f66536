"""Tokens of several widths: padded, or brought to one width by learned projections."""

import pytest
import torch
from modeling_helpers import images, tiny_backbone
from transformers import Trainer, TrainingArguments

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.heads import WidthProjection
from hf_layerfusion.training import adamw


@pytest.fixture
def model():
    torch.manual_seed(3)
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("convnext"), num_labels=3, width_alignment="project"
    )


def move(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_each_width_has_its_own_map():
    widths = [4, 2, 6, 2]
    projection = WidthProjection(widths, 6)
    assert {name: tuple(linear.weight.shape) for name, linear in projection.maps.items()} == {"2": (6, 2), "4": (6, 4)}
    move(projection)
    tokens = torch.zeros(5, 4, 6)
    for position, width in enumerate(widths):
        tokens[:, position, :width] = torch.randn(5, width)
    before = tokens.clone()
    projected = projection(tokens)
    assert torch.equal(tokens, before)
    weights = {int(name): linear.weight for name, linear in projection.maps.items()}
    for position, width in enumerate(widths):
        expected = tokens[:, position] if width == 6 else tokens[:, position, :width] @ weights[width].T
        torch.testing.assert_close(projected[:, position], expected)


def test_training_starts_from_padding(model):
    padded = ViTForAttentiveLayerFusionClassification.from_backbone(tiny_backbone("convnext"), num_labels=3)
    # The textbook order: the fast one normalises tokens where they are pooled if no projection comes between.
    model.head.implementation = padded.head.implementation = "explicit"
    padded.head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images()).logits, padded(images()).logits)


def test_nothing_is_projected_where_all_widths_agree():
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("vit"), num_labels=3, width_alignment="project"
    )
    assert not list(model.token_projection.parameters())
    tokens = torch.randn(2, 6, 32)
    assert model.token_projection(tokens) is tokens


def test_live_and_cached_agree(model):
    move(model.token_projection)
    with torch.no_grad():
        cached = model.extract_layer_features(images())
        assert torch.equal(model(layer_features=cached).logits, model(images()).logits)


def test_projections_are_saved_and_checked(model, tmp_path):
    backbone = model.backbone
    move(model.token_projection)
    model.save_pretrained(tmp_path)
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path, backbone=backbone)
    for name, value in model.token_projection.state_dict().items():
        assert torch.equal(loaded.token_projection.state_dict()[name], value)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images()).logits, model(images()).logits)
    model.config.width_alignment = "pad"
    model.config.save_pretrained(tmp_path)
    with pytest.raises(LayerFusionError, match=r"unknown tensors: token_projection.maps.16.weight"):
        ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path, backbone=backbone)


def test_projections_train(model, tmp_path):
    with torch.no_grad():
        features = model.extract_layer_features(images(batch_size=8))
    rows = [{"layer_features": features[i], "labels": i % 3} for i in range(8)]
    before = {name: value.clone() for name, value in model.token_projection.named_parameters()}
    args = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.01, report_to="none", use_cpu=True)
    Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=adamw(model, args)).train()
    assert before
    for name, value in model.token_projection.named_parameters():
        assert not torch.equal(value, before[name])
