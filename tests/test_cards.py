"""The model card that `save_pretrained` writes."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from modeling_helpers import tiny_backbone
from picture_helpers import CLASSES, picture, save_tiny_backbone
from transformers import AutoModelForImageClassification

from hf_layerfusion import LayerFusionConfig, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.hub.cards import build_card

TRAINED = {
    "dataset": "pictures",
    "split": "test",
    "metrics": {"accuracy": 0.91234, "balanced_accuracy": 0.87},
    "hyperparameters": {"learning rate": 0.01, "seed": 3},
}
PLACEHOLDER = "path/or/name-of-this-head"


def build_config(**options):
    return LayerFusionConfig(
        **{
            "backbone_config": tiny_backbone("dinov2").config,
            "backbone_name_or_path": "facebook/dinov2-small",
            "backbone_revision": "0123abc",
            "id2label": dict(enumerate(CLASSES)),
            **options,
        }
    )


def parse(card):
    """The card as the Hub reads it: from its text."""
    return ModelCard(str(card))


def test_card_of_a_trained_head():
    card = parse(build_card(build_config(), TRAINED, 1234567))
    assert card.data.library_name == "hf_layerfusion"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == "facebook/dinov2-small"
    assert card.data.metrics == ["accuracy", "balanced_accuracy"]
    assert {"layer-fusion", "alf"} <= set(card.data.tags)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "accuracy": 0.9123,
        "balanced_accuracy": 0.87,
    }
    for result in results.values():
        assert (result.task_type, result.dataset_name, result.dataset_split) == (
            "image-classification",
            "pictures",
            "test",
        )
    text = card.text
    assert "# alf head for pictures" in text
    assert "`facebook/dinov2-small`, revision `0123abc`" in text
    assert "| head | attentive, 1,234,567 parameters |" in text
    assert "| labels | 3: blue, green, red |" in text
    assert "from `layer 1 · block · cls` to `layer 3 · block · mean`" in text
    assert "Measured on `pictures`, split `test`." in text
    assert "| accuracy | 0.9123 |" in text
    assert "| learning rate | 0.01 |" in text
    assert "fetched by name and revision" in text
    assert PLACEHOLDER in text


def test_card_of_an_untrained_head():
    card = parse(build_card(build_config(), {}, 10))
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "model-index" not in card.content
    assert "## Results" not in card.text
    assert "## Training" not in card.text
    assert "# alf head\n" in card.text


def test_card_of_a_repository_names_it():
    card = parse(build_card(build_config(), {**TRAINED, "repo_id": "me/my-head"}, 10))
    assert "# me/my-head" in card.text
    assert 'model="me/my-head"' in card.text
    assert card.data.model_name == "me/my-head"


@pytest.mark.parametrize(
    ("name", "base_model", "shown"),
    [
        ("facebook/dinov2-small", "facebook/dinov2-small", "facebook/dinov2-small"),
        ("bert-base-uncased", "bert-base-uncased", "bert-base-uncased"),
        ("/home/someone/models/my-vit/", None, "my-vit"),
        ("./models/my-vit", None, "my-vit"),
        ("models/of/mine/my-vit", None, "my-vit"),
        ("~/my-vit", None, "my-vit"),
        (r"C:\models\my-vit", None, "my-vit"),
        (None, None, "dinov2"),
    ],
)
def test_only_names_from_the_hub_are_base_models(name, base_model, shown):
    card = parse(build_card(build_config(backbone_name_or_path=name, backbone_revision=None), {}, 10))
    assert card.data.base_model == base_model
    assert f"| backbone | `{shown}`, revision `not on the Hub` |" in card.text
    if base_model is None:
        assert f"The backbone `{shown}` is not on the Hub" in card.text
        assert name is None or name not in card.content


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models", "my-vit").mkdir(parents=True)
    config = build_config(backbone_name_or_path="models/my-vit", backbone_revision=None)
    assert parse(build_card(config, {}, 10)).data.base_model is None


def test_a_bundled_backbone_is_not_fetched():
    text = parse(build_card(build_config(includes_backbone=True), {}, 10)).text
    assert "The backbone's weights are in this repository." in text
    assert "fetched" not in text


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([f"class {i}" for i in range(12)], "12: " + ", ".join(f"class {i}" for i in range(10)) + " and 2 more"),
        (["a|b", "two\nlines", "$5 ${x}"], r"3: a\|b, two lines, $5 ${x}"),
    ],
)
def test_labels_stay_in_their_cell(labels, shown):
    text = parse(build_card(build_config(id2label=dict(enumerate(labels))), {}, 10)).text
    assert f"| labels | {shown} |\n" in text


@pytest.fixture
def saved(tmp_path):
    """A head on disk, with a backbone that is on disk too."""
    backbone = save_tiny_backbone(tmp_path / "secret place" / "backbone")
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, id2label=CLASSES)
    model.training_summary = TRAINED
    model.save_pretrained(tmp_path / "head")
    return model, tmp_path / "head"


def test_no_path_of_this_machine(saved, tmp_path):
    content = (saved[1] / "README.md").read_text()
    assert str(tmp_path) not in content
    assert "secret place" not in content


def test_what_the_card_says_works(saved, tmp_path):
    model, head = saved
    picture(2, 0).save(tmp_path / "image.png")
    text = ModelCard.load(head / "README.md").text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = code.replace(PLACEHOLDER, str(head)).replace("image.png", str(tmp_path / "image.png"))
    names = {}
    exec(code.replace("\nclassify(", "\nresult = classify("), names)
    pixel_values = model.image_processor(images=picture(2, 0), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = model(pixel_values).logits[0].softmax(-1)
    assert {entry["label"]: entry["score"] for entry in names["result"]} == pytest.approx(
        {name: scores[index].item() for index, name in enumerate(CLASSES)}, abs=1e-5
    )


def test_what_the_card_says_about_a_lost_backbone_works(saved, tmp_path):
    _, head = saved
    moved = (tmp_path / "secret place" / "backbone").rename(tmp_path / "moved")
    text = ModelCard.load(head / "README.md").text
    (call,) = re.findall(r"`(AutoModelForImageClassification.*?)`", text)
    call = call.replace("...", "head").replace("folder/of/the/backbone", str(moved))
    loaded = eval(call, {"AutoModelForImageClassification": AutoModelForImageClassification, "head": head})
    assert loaded.config.id2label == dict(enumerate(CLASSES))
