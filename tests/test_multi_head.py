"""Many heads on one backbone."""

import pytest
import torch
from modeling_helpers import randomise
from picture_helpers import picture, save_tiny_backbone

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification, load_heads
from hf_layerfusion import checkpoints as checkpoints_module
from hf_layerfusion import multi_head as multi_head_module

PIXELS = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()

# Banks that overlap in part, of several widths, heads of every kind.
HEADS = {
    "alf": {"recipe": "alf", "num_labels": 3},
    "again": {"recipe": "alf", "num_labels": 3},
    "linear": {"recipe": "linear-all", "num_labels": 5},
    "last": {"recipe": "linear-last", "num_labels": 2},
    "mix": {"recipe": "scalar-mix", "num_labels": 4},
    "wide": {"recipe": "alf", "modules": ["activation", "ln2"], "num_labels": 3},
    "projected": {"recipe": "alf", "modules": ["fc1", "block"], "width_alignment": "project", "num_labels": 3},
    "patches": {"recipe": "aat", "num_heads": 4, "num_labels": 3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved backbone, and heads on it by name."""
    root = tmp_path_factory.mktemp("heads")
    backbone = save_tiny_backbone(root / "backbone")
    paths = {}
    for name, options in HEADS.items():
        model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, **options)
        randomise(model.head)
        randomise(model.token_projection)
        model.save_pretrained(root / name)
        paths[name] = str(root / name)
    return str(backbone), paths


@pytest.fixture
def forward_passes(monkeypatch):
    """Counts how often the backbone is read."""
    passes = []
    read = multi_head_module.read_bank
    monkeypatch.setattr(
        multi_head_module, "read_bank", lambda *args, **kwargs: passes.append(1) or read(*args, **kwargs)
    )
    return passes


def test_every_head_as_if_alone(folders, forward_passes):
    backbone, paths = folders
    heads = load_heads(backbone, paths)
    outputs = heads(PIXELS, output_attentions=True)
    assert len(forward_passes) == 1
    assert list(heads) == list(outputs) == list(HEADS)
    for name, path in paths.items():
        alone = ViTForAttentiveLayerFusionClassification.from_pretrained(path)
        with torch.no_grad():
            expected = alone(PIXELS, output_attentions=True)
        torch.testing.assert_close(outputs[name].logits, expected.logits, atol=1e-6, rtol=1e-6)
        assert (outputs[name].layer_attentions is None) == (expected.layer_attentions is None)
        if expected.layer_attentions is not None:
            torch.testing.assert_close(outputs[name].layer_attentions, expected.layer_attentions, atol=1e-6, rtol=0)


def test_one_backbone_in_memory(folders):
    backbone, paths = folders
    heads = load_heads(backbone, paths)
    assert {id(heads[name].backbone) for name in heads} == {id(heads.backbone)}
    assert heads.image_processor is not None
    assert len(heads.bank) == len(set(heads.bank.coordinates)), "each token is read once"


def test_weights_are_hashed_once(folders, monkeypatch):
    """A fingerprint of a large backbone takes seconds."""
    backbone, paths = folders
    hashed = []
    of = checkpoints_module.WeightFingerprint.of
    monkeypatch.setattr(
        checkpoints_module.WeightFingerprint, "of", lambda model: hashed.append(1) or of(model), raising=True
    )
    load_heads(backbone, paths)
    assert len(hashed) == 1


def test_an_instance_and_a_list_of_names(folders):
    _, paths = folders
    model = ViTForAttentiveLayerFusionClassification.from_pretrained(paths["alf"]).backbone
    heads = load_heads(model, [paths["alf"], paths["linear"]])
    assert list(heads) == [paths["alf"], paths["linear"]]
    assert heads.backbone is model
    assert load_heads(None, [paths["alf"]]).backbone is not None, "the backbone that the first head names"


def test_moving_all_heads(folders):
    heads = load_heads(*folders).to(torch.float64)
    outputs = heads(PIXELS.double())
    assert {output.logits.dtype for output in outputs.values()} == {torch.float64}


def test_heads_do_not_carry_gradients_into_the_backbone(folders):
    heads = load_heads(*folders)
    heads(PIXELS)["alf"].logits.sum().backward()
    assert all(parameter.grad is None for parameter in heads.backbone.parameters())
    assert heads["alf"].head.classifier.weight.grad is not None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one head"),
        ("me/head", "one name: give a list"),
        (["a", "a"], "a head twice"),
    ],
)
def test_names_that_cannot_be(names, message):
    with pytest.raises(LayerFusionError, match=message):
        load_heads(None, names)


def test_head_of_another_backbone(folders, tmp_path, caplog):
    backbone, paths = folders
    other = save_tiny_backbone(tmp_path / "other", "vit")
    stranger = ViTForAttentiveLayerFusionClassification.from_backbone(other, num_labels=3)
    stranger.save_pretrained(tmp_path / "stranger")
    with pytest.raises(LayerFusionError, match=r"stranger: this is not the backbone that the head was trained on"):
        load_heads(backbone, [paths["alf"], tmp_path / "stranger"])


def test_head_for_other_images(folders, tmp_path):
    backbone, paths = folders
    model = ViTForAttentiveLayerFusionClassification.from_pretrained(paths["alf"])
    model.image_processor.image_mean = [0.1, 0.2, 0.3]
    model.save_pretrained(tmp_path / "other-mean")
    with pytest.raises(LayerFusionError, match=r"want images prepared differently \(image_mean"):
        load_heads(backbone, [paths["alf"], tmp_path / "other-mean"])


def test_from_a_picture_to_classes(folders):
    heads = load_heads(*folders)
    pixels = heads.image_processor(images=[picture(0, 0)], return_tensors="pt")["pixel_values"]
    assert {name: output.logits.shape for name, output in heads(pixels).items()} == {
        name: (1, options["num_labels"]) for name, options in HEADS.items()
    }
