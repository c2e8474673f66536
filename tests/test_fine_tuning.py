"""Training the backbone too: fine-tuning and LoRA, with the real Trainer."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from transformers import Trainer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.backbones import open_image_processor
from hf_layerfusion.data import label_options
from hf_layerfusion.images import resize_processor
from hf_layerfusion.training import ImageCollator, fine_tune, fine_tuning, predict_images

CLASSES = ["red", "green", "blue"]
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})
QUICK = {"use_cpu": True, "progress": False, "batch_size": 8, "image_processor": PROCESSOR, "max_steps": 4}
RECIPES = ("fine-tune", "lora")


def pictures(rows=24, label_type=None, start=0):
    """Noise, and a little of the colour of its class."""
    rng = np.random.default_rng(start)
    labels = [(start + row) % 3 for row in range(rows)]
    images = []
    for label in labels:
        pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
        pixels[..., label] += 60
        images.append(PILImage.fromarray(pixels))
    label_type = label_type or ClassLabel(names=CLASSES)
    values = [CLASSES[label] for label in labels] if label_type == Value("string") else labels
    return Dataset.from_dict({"image": images, "label": values}, Features({"image": Image(), "label": label_type}))


@pytest.fixture(scope="module")
def rows():
    return pictures()


@pytest.fixture
def folder(save_backbone, tmp_path):
    return str(save_backbone(tmp_path / "backbone"))


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def logits_of(model, rows):
    batch = ImageCollator(PROCESSOR)(list(rows))
    with torch.no_grad():
        return model.eval()(batch["pixel_values"]).logits


def test_fine_tuning_changes_the_whole_backbone(make_vit, rows):
    backbone = make_vit()
    before = state_of(backbone)
    model = fine_tune(backbone, rows, learning_rate=1e-2, weight_decay=0.3, **QUICK)
    assert not changed(before, backbone.state_dict())  # the caller's
    assert changed(before, model.backbone.state_dict()) == before.keys()
    assert not model.training
    assert not model.backbone.training
    config = model.config
    assert (config.recipe, config.freeze_backbone, config.backbone_lr_factor) == ("fine-tune", False, 1e-3)
    assert list(config.id2label.values()) == CLASSES
    assert config.token_names == ["layer 4 · final_norm · cls"]
    assert config.class_weights == [1.0, 1.0, 1.0]
    summary = model.training_summary["hyperparameters"]
    assert summary["trained parameters"] == sum(p.numel() for p in model.parameters())
    assert (summary["learning rate"], summary["backbone learning rate"]) == (1e-2, pytest.approx(1e-5))


def test_lora_leaves_the_weights_alone(folder, make_vit, rows):
    before = make_vit().state_dict()
    model = fine_tune(folder, rows, recipe="lora", merge_adapters=False, lora_rank=2, lora_alpha=6, **QUICK)
    state = {name.replace(".base_layer", ""): value for name, value in model.backbone.state_dict().items()}
    adapters = {name: state.pop(name) for name in list(state) if "lora_" in name}
    assert not changed(before, state)
    # Four projections of the attention and two layers of the MLP, in each of four blocks.
    assert len(adapters) == 2 * 6 * 4
    assert all(adapters[name].abs().max() > 0 for name in adapters)  # B begins at zero
    trained = sum(value.numel() for value in adapters.values()) + 3 * 16 + 3
    assert model.training_summary["hyperparameters"]["trained parameters"] == trained
    layer = model.backbone.get_submodule("layers.0.mlp.fc1")
    assert (layer.r["default"], layer.scaling["default"]) == (2, 3.0)


def test_merged_adapters_compute_the_same(folder, rows):
    apart, merged = (
        fine_tune(folder, rows, recipe="lora", merge_adapters=merge, learning_rate=0.5, **QUICK)
        for merge in (False, True)
    )
    assert not any("lora_" in name for name in merged.state_dict())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(logits_of(merged, rows), logits_of(apart, rows), rtol=1e-4, atol=1e-5)
    assert (logits_of(merged, rows) - logits_of(apart, rows).mean(dim=0)).abs().max() > 1e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_models_come_back(folder, rows, tmp_path, recipe):
    model = fine_tune(folder, rows, recipe=recipe, **QUICK)
    assert model.config.backbone_name_or_path == folder
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    again = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(again, rows), logits_of(model, rows), rtol=0, atol=0)
    assert f"| trained parameters | {model.training_summary['hyperparameters']['trained parameters']}" in (
        tmp_path / "saved" / "README.md"
    ).read_text().replace(",", "")


def test_adapters_and_head_come_back_apart(folder, rows, tmp_path):
    options = {"recipe": "lora", "merge_adapters": False, "output_dir": tmp_path / "run"}
    model = fine_tune(folder, rows, **options, **QUICK)
    model.save_pretrained(tmp_path / "head", include_backbone=False)
    again = ViTForAttentiveLayerFusionClassification.from_pretrained(
        tmp_path / "head", backbone=tmp_path / "run" / "adapter"
    )
    torch.testing.assert_close(logits_of(again, rows), logits_of(model, rows), rtol=0, atol=0)


class Killed(BaseException):
    """As `kill -9` comes: nothing of ours runs after it."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_training_goes_on(folder, rows, tmp_path, monkeypatch, recipe):
    """With noise and dropout, so that the state of the random generators counts."""
    options = {"recipe": recipe, "noise_std": 0.05, "save_steps": 2, "dataloader_num_workers": 0, "seed": 3}
    options |= {"lora_dropout": 0.2, "backbone_lr_factor": 0.1, **QUICK}
    whole = fine_tune(folder, rows, **options)

    save = Trainer._save_optimizer_and_scheduler

    def die(trainer, output_dir):
        if trainer.state.global_step == 4:
            raise Killed
        save(trainer, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", die)
        with pytest.raises(Killed):
            fine_tune(folder, rows, output_dir=tmp_path / "run", **options)
    # The first one whole, the second without its optimizer.
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}

    begun = []
    monkeypatch.setattr(
        fine_tuning, "_begin", lambda *given, begin=fine_tuning._begin: begun.append(begin(*given)) or begun[-1]
    )
    resumed = fine_tune(folder, rows, output_dir=tmp_path / "run", **options)
    assert not changed(whole.state_dict(), resumed.state_dict())
    # A finished run is not trained again.
    finished = fine_tune(folder, rows, output_dir=tmp_path / "run", **options)
    assert not changed(whole.state_dict(), finished.state_dict())
    assert [(checkpoint.path.name, checkpoint.is_finished) for checkpoint in begun] == [
        ("checkpoint-2", False),
        ("checkpoint-4", True),
    ]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "arguments.seed 0 -> 1"),
        ({"weight_decay": 0.7}, "arguments.weight_decay .* -> 0.7"),
        ({"recipe": "lora"}, "recipe fine-tune -> lora"),
        ({"image_processor": resize_processor(PROCESSOR, 32)}, "processor.size.height 16 -> 32"),
        ({"train": pictures(30)}, "dataset.rows 24 -> 30"),
        ({"train": pictures(start=3)}, "dataset.fingerprint"),
        ({"seed_of_backbone": 1}, "backbone .* -> "),
    ],
    ids=["seed", "decay", "recipe", "processor", "rows", "images", "backbone"],
)
def test_another_run_in_the_folder_is_left_alone(make_vit, rows, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: None)
    fine_tune(make_vit(), rows, output_dir=tmp_path, **QUICK)
    before = (tmp_path / "fine_tuning.json").read_bytes()
    backbone = make_vit(change.pop("seed_of_backbone", 0))
    options = {"backbone": backbone, "train": rows, **QUICK, **change}
    with pytest.raises(LayerFusionError, match=f"holds another run .*{message}.*choose another output_dir"):
        fine_tune(output_dir=tmp_path, **options)
    assert (tmp_path / "fine_tuning.json").read_bytes() == before


def test_checkpoints_of_something_else_are_left_alone(make_vit, rows, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(LayerFusionError, match="does not say what it trained"):
        fine_tune(make_vit(), rows, output_dir=tmp_path, **QUICK)
    (tmp_path / "file").touch()
    with pytest.raises(LayerFusionError, match=r"output_dir=.*cannot be used"):
        fine_tune(make_vit(), rows, output_dir=tmp_path / "file", **QUICK)


def test_protocol_of_the_reference(make_vit, rows, monkeypatch):
    """Optimizer groups, schedule, batches, class weights: what the docstring says, seen in the trainer."""
    seen = []
    monkeypatch.setattr(Trainer, "train", lambda self, **_: seen.append(self))
    unbalanced = rows.select([0, 1, 2, 3, 6, 9])
    options = {"image_processor": PROCESSOR, "use_cpu": True, "progress": False}
    model = fine_tune(make_vit(), unbalanced, **options)
    assert model.config.class_weights == pytest.approx([6 / (3 * 4), 6 / 3, 6 / 3])
    assert fine_tune(make_vit(), unbalanced, balance_classes=False, **options).config.class_weights is None
    (trainer, _) = seen
    args = trainer.args
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.max_grad_norm) == (2, 334, 5.0)
    trainer.create_optimizer_and_scheduler(1000)
    head, backbone = trainer.optimizer.param_groups
    assert (head["lr"], backbone["lr"]) == (args.learning_rate, pytest.approx(1e-3 * args.learning_rate))
    assert (head["weight_decay"], backbone["weight_decay"]) == (args.weight_decay, 1e-6)
    assert len(backbone["params"]) == len(list(model.backbone.parameters()))
    for _ in range(1000):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [head["lr"], backbone["lr"]] == pytest.approx([1e-6, 1e-9])


@pytest.mark.parametrize("factor", [1.0, 0.0], ids=["backbone", "head"])
def test_divergence_is_named(make_vit, rows, factor):
    with pytest.raises(LayerFusionError, match=r"training diverged with learning_rate=1e\+30.*use smaller ones"):
        fine_tune(make_vit(), rows, learning_rate=1e30, backbone_lr_factor=factor, **{**QUICK, "weight_decay": 10.0})


def test_half_precision_weights_are_trained_in_float32(make_vit, rows):
    model = fine_tune(make_vit().to(torch.bfloat16), rows, **label_options(rows, "label"), **QUICK)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_frozen_backbone_can_be_handed_in(make_vit, rows):
    """`from_backbone` freezes the model that it is given, and runs it, which installs hooks."""
    backbone = make_vit()
    ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=3)
    model = fine_tune(backbone, rows, **QUICK)
    assert changed(backbone.state_dict(), model.backbone.state_dict())


def test_predictions_are_those_of_the_logits(make_vit, rows):
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        make_vit(), id2label=CLASSES, image_processor=PROCESSOR
    )
    expected = logits_of(model, rows).argmax(dim=1).numpy()
    assert len(set(expected)) > 1
    model.train()
    found = predict_images(model, rows, batch_size=7, progress=False)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(predict_images(model, rows.remove_columns("label"), progress=False), expected)
    assert predict_images(model, rows.select([]), progress=False).shape == (0,)
    with pytest.raises(LayerFusionError, match=r"predict_images takes one datasets.Dataset, not a list"):
        predict_images(model, list(rows))
    with pytest.raises(LayerFusionError, match="image_column='picture' is not in the dataset"):
        predict_images(model, rows, image_column="picture")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "linear-last"}, "'linear-last' does not train the backbone: choose from fine-tune, lora"),
        ({"recipe": "LoRA"}, "choose from fine-tune, lora"),
        ({"train": {"image": []}}, "one datasets.Dataset, not a dict"),
        ({"train": pictures().to_iterable_dataset()}, "not a IterableDataset.*stream"),
        ({"train": pictures().select([])}, "the dataset is empty"),
        ({"train": pictures().select([0, 3, 6])}, "all rows have one class"),
        ({"train": pictures(label_type=Value("string"))}, "one class index per row .*numbers text labels"),
        ({"train": pictures(label_type=Value("float32"))}, "holds Value.*float32.*one class index per row"),
        ({"train": pictures(label_type=Value("int64")), "num_labels": 2}, "row 2 has label 2, but num_labels=2"),
        ({"num_labels": 2, "id2label": CLASSES}, "num_labels=2, but id2label names 3 labels"),
        ({"problem_type": "regression"}, "problem_type='regression': fine_tune trains classifiers"),
        ({"label_column": "species"}, "label_column='species' is not in the dataset"),
        ({"image_column": "label"}, "neither images nor paths"),
        ({"recipe": "lora", "lora_rank": 0}, "lora_rank=0: use a whole number from 1 up"),
        ({"recipe": "lora", "lora_rank": 2.5}, "lora_rank=2.5"),
        ({"recipe": "lora", "lora_alpha": -1}, "lora_alpha=-1: use a number above 0"),
        ({"recipe": "lora", "lora_dropout": 1.0}, "lora_dropout=1.0: use 0 or more, less than 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1: use a whole number from 0 up"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"backbone_lr_factor": -0.1}, "backbone_lr_factor"),
        ({"backbone": "no/such-model"}, "no/such-model"),
        ({"backbone": torch.nn.Linear(2, 2)}, "backbone is a Linear"),
        ({"image_processor": None}, "needs an image processor"),
        ({"epochs": 3}, "'epochs' is no option of fine_tune"),
    ],
)
def test_bad_input_is_explained(make_vit, rows, options, message):
    with pytest.raises(LayerFusionError, match=message):
        fine_tune(**{"backbone": make_vit(), "train": rows, **QUICK, **options})


def test_bad_rows_are_named(make_vit, rows, tmp_path):
    """Before anything is trained: a row without a label, and a file that is no picture."""
    labels = [0, 1, None, 2]
    features = Features({"image": Image(), "label": Value("int64")})
    lacking = Dataset.from_dict({"image": rows[:4]["image"], "label": labels}, features=features)
    with pytest.raises(LayerFusionError, match="and rows without a label"):
        fine_tune(make_vit(), lacking, **QUICK)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[0]["image"].save(tmp_path / "fine.png")
    files = [str(tmp_path / name) for name in ("fine.png", "broken.png")]
    broken = Dataset.from_dict({"image": files, "label": [0, 1]}, features=features)
    with pytest.raises(LayerFusionError, match=r"row 1 .*broken.png"):
        fine_tune(make_vit(), broken, **QUICK)


def test_lora_needs_peft_and_linear_layers(make_vit, rows, monkeypatch):
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(LayerFusionError, match="no linear layer was found"):
        fine_tuning._add_adapters(convolutions, 2, 4, 0.0)
    monkeypatch.setattr(fine_tuning, "is_peft_available", lambda: False)
    with pytest.raises(LayerFusionError, match=r"needs the package peft: pip install 'hf-layerfusion\[peft\]'"):
        fine_tune(make_vit(), rows, recipe="lora", **QUICK)
    assert fine_tune(make_vit(), rows, **QUICK).config.recipe == "fine-tune"


def test_adapted_backbones_are_fine_tuned_as_they_are(make_vit, rows):
    """A PEFT model of the caller's is copied with its adapters, which are trained like all else."""
    adapted = peft.get_peft_model(make_vit(), peft.LoraConfig(r=2, target_modules=["fc1"]))
    model = fine_tune(adapted, rows, **QUICK)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_both_learn_on_a_real_backbone(small_backbone_folder):
    """Handwritten digits 0 to 3 at 28 pixels: more than the frozen last CLS token gives a linear probe in 18 steps."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(np.flatnonzero(data.target < 4))
    images = [PILImage.fromarray(np.uint8(data.images[row] * 255 / 16)) for row in order[:160]]
    features = Features({"image": Image(), "label": ClassLabel(4)})
    digits = Dataset.from_dict({"image": images, "label": data.target[order[:160]].tolist()}, features=features)
    train, test = digits.select(range(96)), digits.select(range(96, 160))
    processor = resize_processor(open_image_processor(small_backbone_folder, {}), 28)
    options = {"image_processor": processor, "use_cpu": True, "progress": False, "batch_size": 16, "max_steps": 18}
    for recipe, factor in (("lora", None), ("fine-tune", 1e-4)):
        model = fine_tune(small_backbone_folder, train, recipe=recipe, backbone_lr_factor=factor, **options)
        predictions = predict_images(model, test, progress=False)
        # By chance 0.25.
        assert balanced_accuracy_score(test["label"][:], predictions) > 0.8, recipe
    assert json.dumps(model.training_summary)
