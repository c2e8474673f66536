"""What is saved, what comes back, and what is refused: files of heads and of the backbones they belong to."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


def build(backbone, **options):
    """A head in which no tensor, and no buffer of its BatchNorm, is what a new head would have."""
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, **{"num_labels": 3, **options})
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.train()(PIXELS)
    return model.eval()


def load(folder, **options):
    return ViTForAttentiveLayerFusionClassification.from_pretrained(folder, **options)


def logits_of(model):
    with torch.no_grad():
        return model(PIXELS.to(model.backbone.dtype)).logits


def assert_same_logits(found, expected):
    """Equal weights give logits that differ by how the weights happen to be aligned in memory, and by no more."""
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-6, rtol=0)


def keys_in(folder):
    with safe_open(Path(folder, "model.safetensors"), "pt") as file:
        return set(file.keys())


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def backbone(save_backbone, tmp_path):
    """A folder with a tiny ViT."""
    return save_backbone(tmp_path / "backbone")


@pytest.fixture
def model(backbone):
    return build(backbone, id2label=["cat", "dog", "owl"])


@pytest.fixture
def head(model, tmp_path):
    """A folder with a head on `backbone`."""
    model.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


# ---- the head alone ------------------------------------------------------------------------------------------------


def test_files_of_a_head(head, model):
    assert names_in(head) == FILES
    assert keys_in(head) == {f"head.{name}" for name in model.head.state_dict()}


def test_files_of_a_head_on_a_backbone_in_memory(make_vit, tmp_path):
    model = build(make_vit())
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == FILES - {"preprocessor_config.json"}
    with pytest.raises(LayerFusionError, match="does not say where its backbone is: pass it as backbone="):
        load(tmp_path)
    assert_same_logits(load(tmp_path, backbone=make_vit()), model)


def test_head_comes_back_with_its_backbone(head, model):
    loaded = load(head)
    assert_same_logits(loaded, model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert loaded.config.token_names == model.config.token_names
    assert loaded.image_processor.to_dict() == model.image_processor.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_loading_twice_and_saving_again(head, tmp_path):
    first = load(head)
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    assert_same_logits(second, first)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "README.md").read_text() == (head / "README.md").read_text()
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (head / "config.json").read_text()
    )


@pytest.mark.parametrize("opened_by", ["path", "instance"])
def test_relative_backbone_path_survives_a_change_of_folder(backbone, tmp_path, monkeypatch, opened_by):
    monkeypatch.chdir(tmp_path)
    given = "backbone" if opened_by == "path" else AutoModel.from_pretrained("backbone")
    model = build(given)
    model.save_pretrained("head")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same_logits(load("../head"), model)
    assert ModelCard.load(tmp_path / "head" / "README.md").data.base_model is None


def test_loading_report(head):
    model, report = load(head, output_loading_info=True)
    assert isinstance(model, ViTForAttentiveLayerFusionClassification)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_loading_is_quiet(head, caplog, capfd):
    load(head)
    assert not caplog.records
    assert "MISSING" not in capfd.readouterr().err


def test_missing_backbone_folder_is_named(head, backbone):
    shutil.rmtree(backbone)
    with pytest.raises(LayerFusionError) as raised:
        load(head)
    assert str(backbone) in str(raised.value)
    assert "neither a folder nor a Hub model" in str(raised.value)


# ---- the backbone handed in ----------------------------------------------------------------------------------------


def test_backbone_in_memory_is_shared(head, model, backbone):
    given = AutoModel.from_pretrained(backbone, add_pooling_layer=False)
    first, second = load(head, backbone=given), load(head, backbone=given)
    assert first.backbone is given
    assert second.backbone is given
    assert_same_logits(first, model)


def test_backbone_in_another_folder(head, model, backbone, tmp_path):
    moved = backbone.rename(tmp_path / "moved")
    assert_same_logits(load(head, backbone=moved), model)
    assert_same_logits(load(head, backbone=str(moved)), model)


def changed(backbone, name):
    with torch.no_grad():
        backbone.get_parameter(name).view(-1)[0] += 1
    return backbone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vit: changed(vit(), "layers.2.mlp.fc1.weight"), r"1 of 6 parts have other weights \(layers\.2\)"),
        (lambda vit: changed(vit(), "layernorm.bias"), r"1 of 6 parts have other weights \(layernorm\)"),
        (lambda vit: vit(seed=1), r"5 of 6 parts have other weights \(embeddings, layers\.0, layers\.1 and 2 more\)"),
        (lambda vit: vit(num_hidden_layers=3), r"parts missing: layers\.3"),
        (lambda vit: vit(num_hidden_layers=6), r"parts added: layers\.4, layers\.5"),
        (lambda vit: vit(hidden_size=32), r"6 of 6 parts have other weights"),
    ],
)
def test_wrong_backbone_is_refused(head, model, make_vit, make, message, caplog):
    wrong = make(make_vit)
    with pytest.raises(LayerFusionError, match=message) as raised:
        load(head, backbone=wrong)
    assert str(raised.value).startswith("this is not the backbone that the head was trained on")
    assert str(raised.value).endswith("pass the right one as backbone=, or verify_backbone=False")
    assert not caplog.records
    assert load(head, backbone=wrong, verify_backbone=False).backbone is wrong
    (record,) = caplog.records
    assert record.getMessage().startswith("this is not the backbone that the head was trained on")


def test_pinned_backbone_that_changed_is_refused(head, save_backbone, backbone):
    save_backbone(backbone, seed=1)
    with pytest.raises(LayerFusionError, match="this is not the backbone that the head was trained on"):
        load(head)


def test_file_names_do_not_matter_weights_do(head, model, backbone, make_vit, tmp_path):
    """The same weights from a model built by hand, with a pooler that no tap reads."""
    copy = AutoModel.from_pretrained(backbone, add_pooling_layer=True)
    assert hasattr(copy, "pooler")
    assert_same_logits(load(head, backbone=copy), model)


def test_backbone_in_another_dtype_is_a_warning(head, make_vit, caplog):
    loaded = load(head, backbone=make_vit().to(torch.bfloat16))
    (record,) = caplog.records
    assert record.getMessage() == (
        "this head was trained on a float32 backbone and is given a bfloat16 one: their weights cannot be compared"
    )
    assert loaded.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("include_backbone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "bfloat16", "auto"])
def test_other_dtypes(model, tmp_path, dtype, include_backbone, caplog):
    """The backbone's weights are compared as they were, then cast, so this is no mismatch."""
    model.save_pretrained(tmp_path / "head", include_backbone=include_backbone)
    loaded = load(tmp_path / "head", dtype=dtype)
    assert not caplog.records
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    # Eight bits of mantissa through four blocks: a few percent of logits of scale one.
    torch.testing.assert_close(logits_of(loaded).float(), logits_of(model), atol=0.05, rtol=0)


# ---- the backbone bundled ------------------------------------------------------------------------------------------


def test_bundle_stands_alone(model, backbone, tmp_path):
    model.save_pretrained(tmp_path / "bundle", include_backbone=True)
    expected = logits_of(model)
    shutil.rmtree(backbone)
    assert names_in(tmp_path / "bundle") == FILES
    assert keys_in(tmp_path / "bundle") == set(model.state_dict())
    loaded = load(tmp_path / "bundle")
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    loaded.save_pretrained(tmp_path / "head")
    assert keys_in(tmp_path / "head") == {f"head.{name}" for name in model.head.state_dict()}


def test_bundle_takes_another_copy_of_its_backbone(model, make_vit, tmp_path):
    model.save_pretrained(tmp_path / "bundle", include_backbone=True)
    given = make_vit()
    loaded = load(tmp_path / "bundle", backbone=given)
    assert loaded.backbone is given
    assert_same_logits(loaded, model)


def test_bundle_is_checked(model, tmp_path):
    model.save_pretrained(tmp_path, include_backbone=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.layernorm.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayerFusionError, match=r"parts have other weights \(layernorm\)"):
        load(tmp_path)


def test_bundle_without_a_backbone_tensor(model, tmp_path):
    model.save_pretrained(tmp_path, include_backbone=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["backbone.layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayerFusionError, match=r"backbone\.layernorm\.bias"):
        load(tmp_path)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_half_precision_backbone_comes_back_as_it_was(backbone, tmp_path, include_backbone, caplog):
    model = build(backbone, dtype=torch.bfloat16)
    assert (model.backbone.dtype, model.head.query.dtype) == (torch.bfloat16, torch.float32)
    model.save_pretrained(tmp_path / "head", include_backbone=include_backbone)
    loaded = load(tmp_path / "head")
    assert not caplog.records
    assert (loaded.backbone.dtype, loaded.head.query.dtype) == (torch.bfloat16, torch.float32)
    assert_same_logits(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_logits(load(tmp_path / "again"), model)


def test_fine_tuned_backbone_is_never_lost(backbone, tmp_path):
    model = build(backbone, freeze_backbone=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(PIXELS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    model.eval()
    with pytest.raises(LayerFusionError, match="fine-tuned: saving the head alone would lose it"):
        model.save_pretrained(tmp_path / "head", include_backbone=False)
    assert not (tmp_path / "head").exists()
    model.save_pretrained(tmp_path / "head")
    assert keys_in(tmp_path / "head") == set(model.state_dict())
    shutil.rmtree(backbone)
    loaded = load(tmp_path / "head")
    assert_same_logits(loaded, model)
    assert all(p.requires_grad for p in loaded.backbone.parameters())


# ---- broken checkpoints --------------------------------------------------------------------------------------------


def remove(tensors):
    del tensors["head.q_proj.weight"]


def rename(tensors):
    tensors["head.to_q.weight"] = tensors.pop("head.q_proj.weight")


def add(tensors):
    tensors["head.adapter.weight"] = torch.zeros(2)


def add_backbone(tensors):
    tensors["backbone.layernorm.bias"] = torch.zeros(16)


def reshape(tensors):
    tensors["head.classifier.weight"] = torch.zeros(5, 16)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"missing tensors: head\.q_proj\.weight$"),
        (rename, r"missing tensors: head\.q_proj\.weight; unknown tensors: head\.to_q\.weight$"),
        (add, r"unknown tensors: head\.adapter\.weight$"),
        (add_backbone, r"unknown tensors: backbone\.layernorm\.bias$"),
        (reshape, r"head\.classifier\.weight has shape \(5, 16\), but the config asks for \(3, 16\)$"),
    ],
)
def test_wrong_tensors_are_named(head, damage, message):
    tensors = load_file(head / "model.safetensors")
    damage(tensors)
    save_file(tensors, head / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayerFusionError, match=message) as raised:
        load(head)
    assert str(head) in str(raised.value)


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is not a whole safetensors file .* truncated, or a renamed pickle"),
        ("pytorch_model.bin", r"holds no model\.safetensors; heads are read from safetensors files only"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
def test_pickles_are_never_opened(head, tmp_path, name, message, options):
    (head / "model.safetensors").unlink()
    (head / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(LayerFusionError, match=message):
        load(head, **options)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((head / name).read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


@pytest.mark.parametrize("length", [0, 7, 300, -1])
def test_truncated_weights(head, length):
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(LayerFusionError, match="is not a whole safetensors file"):
        load(head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "alf-2"}, "recipe 'alf-2' is unknown: choose from linear-last, "),
        ({"layers": [1, 9]}, "layer 9 is out of range for a backbone of 4 layers: "),
        ({"modules": ["gelu"]}, "modules 'gelu' is unknown: choose from "),
        ({"head_type": "mlp"}, "head_type 'mlp' is unknown: choose from "),
        (
            {"num_queries": 2},
            " does not match its config: head.batch_norm.bias has shape (16,), but the config asks for (32,)",
        ),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, " does not match its config: head.class"),
    ],
)
def test_wrong_configs(head, changes, message):
    """The last two are legal by themselves, but not with these tensors."""
    edit_json(head / "config.json", **changes)
    with pytest.raises(LayerFusionError) as raised:
        load(head)
    assert message in str(raised.value)


def test_folder_without_config(head):
    (head / "config.json").unlink()
    with pytest.raises((OSError, LayerFusionError), match=r"config\.json"):
        load(head)


def test_folder_of_another_model(backbone):
    with pytest.raises(LayerFusionError, match=r"'vit'.*from_backbone"):
        load(backbone)


def test_folder_without_weights(head):
    (head / "model.safetensors").unlink()
    with pytest.raises(LayerFusionError, match=r"head holds no model\.safetensors"):
        load(head)


# ---- the card ------------------------------------------------------------------------------------------------------


def test_card(head, backbone):
    card = ModelCard.load(head / "README.md")
    assert card.data.library_name == "hf_layerfusion"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model is None
    assert {"layer-fusion", "alf"} <= set(card.data.tags)
    for fact in ("layer 1 · block · cls", "layer 4 · block · mean", "cat, dog, owl", "8 of width 16"):
        assert fact in card.text
    assert "$" not in card.text
    assert str(backbone.parent) not in card.content, "no path of this machine"


def test_card_of_a_trained_head(model, tmp_path):
    model.training_summary = {
        "repo_id": "me/head",
        "dataset": "me/digits",
        "split": "test",
        "metrics": {"accuracy": 0.87654},
        "hyperparameters": {"learning_rate": 0.01},
    }
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.8765, "test")
    assert (result.dataset_type, card.data.model_name) == ("me/digits", "me/head")
    for fact in ('model="me/head"', "| accuracy | 0.8765 |", "| learning_rate | 0.01 |", "`me/digits`, split `test`"):
        assert fact in card.text
