"""Layer attentions over a dataset, as numbers, as JSON and as a picture."""

import json
import sys

import pytest
import torch
from modeling_helpers import NUM_LAYERS, images, tiny_backbone
from PIL import Image

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.analysis import AttentionSummary, summarise_attentions
from hf_layerfusion.analysis.plots import plot_attention
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.layout import TokenLayout

BATCHES = [{"pixel_values": images(size, seed=size), "labels": torch.zeros(size)} for size in (4, 3, 1)]


def build_model(**options):
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("dinov2"), num_labels=3, image_processor=object(), **options
    )
    with torch.no_grad():
        for parameter in model.head.parameters():  # far from uniform attention
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [
        ({}, 2 * NUM_LAYERS),
        ({"num_heads": 4, "num_queries": 3}, 12),
        ({"num_heads": 1}, 1),
        ({"recipe": "scalar-mix"}, 1),
    ],
)
def test_mean_and_spread_are_those_of_all_images_at_once(options, num_rows):
    model = build_model(**options)
    summary = summarise_attentions(model, BATCHES)
    with torch.no_grad():
        pixel_values = torch.cat([batch["pixel_values"] for batch in BATCHES])
        attentions = model(pixel_values, output_attentions=True).layer_attentions.double().flatten(1, 2)
    assert summary.mean.shape == (num_rows, 2 * NUM_LAYERS)
    torch.testing.assert_close(summary.mean, attentions.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summary.std, attentions.std(0, unbiased=False), rtol=1e-4, atol=1e-6)
    assert summary.num_images == 8
    assert summary.token_names == model.config.token_names
    torch.testing.assert_close(summary.token_weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    if options.get("recipe") != "scalar-mix":
        assert summary.std.max() > 1e-3


def test_features_give_the_same_as_pixels():
    model = build_model()
    with torch.no_grad():
        cached = [{"layer_features": model.extract_layer_features(batch["pixel_values"])} for batch in BATCHES]
    live, read = summarise_attentions(model, BATCHES), summarise_attentions(model, cached)
    torch.testing.assert_close(read.mean, live.mean, rtol=1e-5, atol=1e-6)


def test_dropout_plays_no_part():
    model = build_model(attention_dropout=0.5).train()
    first, second = (summarise_attentions(model, BATCHES).mean for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_to_explain():
    with pytest.raises(LayerFusionError, match="a 'linear' head has no layer attentions"):
        summarise_attentions(build_model(recipe="linear-all"), BATCHES)
    with pytest.raises(LayerFusionError, match="no images to explain"):
        summarise_attentions(build_model(), [])


def summary_of(num_heads, num_layers):
    bank = TokenBank.build(
        range(1, num_layers + 1), ["block"], ["cls", "mean"], TokenLayout.of_plain_vit(8, num_layers)
    )
    mean = torch.randn(num_heads, len(bank), dtype=torch.float64).softmax(-1)
    return AttentionSummary(bank.names, mean, mean / 4, 17)


def test_json(tmp_path):
    summary = summary_of(4, 2)
    summary.save_json(tmp_path / "attention.json")
    text = (tmp_path / "attention.json").read_text(encoding="utf-8")
    assert "layer 2 · block · mean" in text  # readable, not escaped
    values = json.loads(text)
    assert values["num_images"] == 17
    assert [token["name"] for token in values["tokens"]] == summary.token_names
    assert [token["weight"] for token in values["tokens"]] == pytest.approx(summary.token_weights.tolist(), abs=1e-6)
    assert len(values["heads"]) == 4
    assert torch.tensor([head["mean"] for head in values["heads"]]).sum(1).tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert values["heads"][3]["std"] == pytest.approx(summary.std[3].tolist(), abs=1e-6)


@pytest.mark.parametrize(("num_heads", "num_layers"), [(1, 1), (1, 12), (2, 1), (24, 12), (48, 24)])
def test_plot(tmp_path, num_heads, num_layers):
    plot_attention(summary_of(num_heads, num_layers), tmp_path / "attention.png", "A title")
    with Image.open(tmp_path / "attention.png") as image:
        assert image.format == "PNG"
        assert image.width >= 2 * num_layers * 50  # room for the name of each token
        # Nothing reaches the border, so nothing is cut off.
        grey = image.convert("L")
        border = [(0, 0, image.width, 1), (0, 0, 1, image.height)]
        border += [(0, image.height - 1, image.width, image.height), (image.width - 1, 0, image.width, image.height)]
        assert all(grey.crop(edge).getextrema() == (255, 255) for edge in border)
        assert grey.getextrema()[0] < 100


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LayerFusionError, match=r"need matplotlib: pip install 'hf-layerfusion\[plots\]'"):
        plot_attention(summary_of(2, 2), tmp_path / "attention.png")
    assert not list(tmp_path.iterdir())
