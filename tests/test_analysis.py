"""Layer attentions over a dataset, as numbers, as JSON and as a picture."""

import json
import math
import sys

import pytest
import torch
from modeling_helpers import NUM_LAYERS, build_attending_model, images
from PIL import Image

from hf_layerfusion import LayerFusionError
from hf_layerfusion.analysis import AttentionSummary, summarise_attentions
from hf_layerfusion.analysis.plots import plot_attention
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.layout import TokenLayout

BATCHES = [{"pixel_values": images(size, seed=size), "labels": torch.zeros(size)} for size in (4, 3, 1)]


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
    model = build_attending_model(**options)
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


def attentions_of(model):
    with torch.no_grad():
        pixel_values = torch.cat([batch["pixel_values"] for batch in BATCHES])
        return model(pixel_values, output_attentions=True).layer_attentions.double().flatten(1, 2)


@pytest.mark.parametrize("options", [{}, {"num_heads": 4, "num_queries": 3}, {"recipe": "scalar-mix"}])
def test_entropy_and_depth_are_those_of_all_images_at_once(options):
    model = build_attending_model(**options)
    summary = summarise_attentions(model, BATCHES)
    attentions = attentions_of(model)
    entropy = -(attentions * attentions.log()).sum(-1)  # (B, H)
    torch.testing.assert_close(summary.entropy, entropy.mean(0), rtol=1e-5, atol=1e-6)
    assert summary.mean_entropy == pytest.approx(float(entropy.mean()), abs=1e-6)
    assert summary.relative_entropy == pytest.approx(float(entropy.mean()) / math.log(2 * NUM_LAYERS), abs=1e-6)
    # CLS and mean of layer 1, then of layer 2, ...
    by_layer = attentions.mean((0, 1)).view(NUM_LAYERS, 2).sum(1)
    assert list(summary.layer_weights) == list(range(1, NUM_LAYERS + 1))
    assert list(summary.layer_weights.values()) == pytest.approx(by_layer.tolist(), abs=1e-6)
    depths = torch.arange(1, NUM_LAYERS + 1, dtype=torch.float64) / NUM_LAYERS
    assert summary.expected_depth == pytest.approx(float(by_layer @ depths), abs=1e-6)
    assert summary.depth_by_head.mean() == pytest.approx(summary.expected_depth, abs=1e-9)
    assert summary.depth_by_head.shape == summary.entropy.shape == summary.mean.shape[:1]


@pytest.mark.parametrize("column", ["label", "labels", "label_ids"])
def test_means_by_class(column):
    model = build_attending_model(id2label={0: "ant", 1: "bee", 2: "cat"})
    labels = torch.tensor([0, 2, 2, 0, 2, 2, 0, 2])
    parts = labels.split([4, 3, 1])
    batches = [
        {"pixel_values": batch["pixel_values"], column: part} for batch, part in zip(BATCHES, parts, strict=True)
    ]
    summary = summarise_attentions(model, batches)
    attentions = attentions_of(model)
    assert summary.class_counts == {0: 3, 2: 5}  # nothing of a class that was not seen
    for number, mean in summary.class_means.items():
        torch.testing.assert_close(mean, attentions[labels == number].mean(0), rtol=1e-5, atol=1e-6)
    assert (summary.class_means[0] - summary.class_means[2]).abs().max() > 1e-4
    classes = summary.to_dict()["classes"]
    assert [(row["label"], row["num_images"]) for row in classes] == [("ant", 3), ("cat", 5)]
    assert classes[1]["weights"] == pytest.approx(summary.class_means[2].mean(0).tolist(), abs=1e-6)


@pytest.mark.parametrize("labels", [torch.rand(4), torch.ones(4, 3, dtype=torch.long), None])
def test_labels_that_are_no_classes_give_no_means(labels):
    batch = {"pixel_values": BATCHES[0]["pixel_values"]} | ({} if labels is None else {"labels": labels})
    summary = summarise_attentions(build_attending_model(), [batch])
    assert summary.num_images == 4
    assert summary.class_means == summary.class_counts == {}
    assert "classes" not in summary.to_dict()


def test_features_give_the_same_as_pixels():
    model = build_attending_model()
    with torch.no_grad():
        cached = [{"layer_features": model.extract_layer_features(batch["pixel_values"])} for batch in BATCHES]
    live, read = summarise_attentions(model, BATCHES), summarise_attentions(model, cached)
    torch.testing.assert_close(read.mean, live.mean, rtol=1e-5, atol=1e-6)


def test_dropout_plays_no_part():
    model = build_attending_model(attention_dropout=0.5).train()
    first, second = (summarise_attentions(model, BATCHES).mean for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_to_explain():
    with pytest.raises(LayerFusionError, match="a 'linear' head has no layer attentions"):
        summarise_attentions(build_attending_model(recipe="linear-all"), BATCHES)
    with pytest.raises(LayerFusionError, match="no images to explain"):
        summarise_attentions(build_attending_model(), [])


def summary_of(num_heads, num_layers):
    bank = TokenBank.build(
        range(1, num_layers + 1), ["block"], ["cls", "mean"], TokenLayout.of_plain_vit(8, num_layers)
    )
    mean = torch.randn(num_heads, len(bank), dtype=torch.float64).softmax(-1)
    return AttentionSummary(bank.names, mean, mean / 4, 17, bank=bank, num_layers=num_layers)


@pytest.mark.parametrize(
    ("weights", "entropy", "depth"),
    [
        ([1 / 8] * 8, math.log(8), (1 + 2 + 3 + 4) / 4 / 4),
        ([0, 0, 0, 0, 0, 0, 0, 1], 0.0, 1.0),
        ([0.5, 0.5, 0, 0, 0, 0, 0, 0], math.log(2), 1 / 4),
    ],
)
def test_entropy_and_depth_of_what_is_known(weights, entropy, depth):
    summary = summary_of(3, 4)
    summary.mean = torch.tensor([weights] * 3, dtype=torch.float64)
    summary.entropy = torch.special.entr(summary.mean).sum(-1)
    assert summary.mean_entropy == pytest.approx(entropy)
    assert summary.relative_entropy == pytest.approx(entropy / math.log(8))
    assert summary.expected_depth == pytest.approx(depth)
    assert sum(summary.layer_weights.values()) == pytest.approx(1)


def test_a_summary_without_coordinates_has_no_depth():
    summary = AttentionSummary(["a"], torch.ones(1, 1), torch.zeros(1, 1), 2)
    assert summary.mean_entropy is summary.relative_entropy is None
    assert set(summary.to_dict()) == {"num_images", "tokens", "heads"}
    with pytest.raises(LayerFusionError, match="does not know its tokens' layers"):
        summary.expected_depth  # noqa: B018


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
    assert [row["layer"] for row in values["layers"]] == [1, 2]
    assert values["depth"]["expected"] == pytest.approx(summary.expected_depth)


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
