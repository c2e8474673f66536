"""The model under `transformers.Trainer` as it is: training, checkpoints, resuming, precision, two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import hf_layerfusion
from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.training import (
    ImageCollator,
    LayerFeatureCollator,
    adamw,
    build_compute_metrics,
    class_weights,
    parameter_groups,
)

NUM_LABELS, NUM_TOKENS, WIDTH = 3, 6, 32
METRICS = ("test_accuracy", "test_balanced_accuracy", "test_macro_f1")
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


class FeatureRows(torch.utils.data.Dataset):
    """Noisy copies of one token set per class: easy to learn, but not in one step."""

    def __init__(self, num_rows=48, seed=1, spread=0.5):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(NUM_LABELS, NUM_TOKENS, WIDTH, generator=generator)
        generator.manual_seed(seed)
        self.labels = torch.arange(num_rows) % NUM_LABELS
        noise = torch.randn(num_rows, NUM_TOKENS, WIDTH, generator=generator)
        self.tokens = centres[self.labels] + spread * noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"layer_features": self.tokens[index], "labels": int(self.labels[index])}


def build_model(seed=0, **options):
    """A model on a random ViT that is always the same; `seed` is the head's."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    backbone = ViTModel(config, add_pooling_layer=False)
    torch.manual_seed(seed)
    options = {"num_labels": NUM_LABELS, "problem_type": "single_label_classification", **options}
    options.setdefault("attention_dropout", 0.0)  # two runs can be compared
    return ViTForAttentiveLayerFusionClassification.from_backbone(backbone, image_processor=PROCESSOR, **options)


def build_arguments(folder, **options):
    options = {
        "learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **options)


def build_trainer(model, folder, *, rows=None, collator=None, compute_metrics=None, callbacks=None, **options):
    arguments = build_arguments(folder, **options)
    rows = FeatureRows() if rows is None else rows
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator or LayerFeatureCollator(NUM_TOKENS, NUM_LABELS),
        compute_metrics=compute_metrics or build_compute_metrics(model.config),
        optimizer_cls_and_kwargs=adamw(model, arguments),
        callbacks=callbacks,
    )


def picture_rows(num_rows=24):
    """Pictures of several sizes, each in the colour of its class."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num_rows):
        pixels = rng.integers(0, 100, (16 + index % 3, 18, 3), dtype=np.uint8)
        pixels[..., index % NUM_LABELS] += 120
        rows.append({"image": PILImage.fromarray(pixels), "label": index % NUM_LABELS})
    return rows


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class KeepGradients(TrainerCallback):
    """The gradients that the first optimizer step uses."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_from_features_learns(tmp_path):
    model = build_model()
    trainer = build_trainer(model, tmp_path, num_train_epochs=4)
    before = trainer.evaluate()
    backbone = copy_of(model.backbone.state_dict())
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_balanced_accuracy"] > 0.9
    assert {"eval_accuracy", "eval_balanced_accuracy", "eval_macro_f1"} <= after.keys()
    assert_same(model.backbone.state_dict(), backbone)
    assert not model.backbone.training


@pytest.mark.parametrize("recipe", ["linear-all", "scalar-mix", "alf-quarterly"])
def test_other_recipes_learn(tmp_path, recipe):
    layers = {"layers": "spaced:3"} if recipe == "alf-quarterly" else {}
    trainer = build_trainer(build_model(recipe=recipe, **layers), tmp_path, num_train_epochs=8, learning_rate=3e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_training_from_pixels_learns(tmp_path):
    model = build_model()
    collator = ImageCollator(model.image_processor, num_labels=NUM_LABELS)
    options = {"remove_unused_columns": False, "num_train_epochs": 10}
    trainer = build_trainer(model, tmp_path, rows=picture_rows(), collator=collator, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.9


def test_pixels_and_their_features_train_the_same_head(tmp_path):
    rows, results = picture_rows(), []
    for from_pixels in (True, False):
        model = build_model()
        collator = ImageCollator(model.image_processor)
        data, options = rows, {"remove_unused_columns": False}
        if not from_pixels:
            tokens = model.extract_layer_features(collator(rows)["pixel_values"])
            data = [{"layer_features": t, "labels": row["label"]} for t, row in zip(tokens, rows, strict=True)]
            collator, options = LayerFeatureCollator(NUM_TOKENS), {}
        trainer = build_trainer(model, tmp_path, rows=data, collator=collator, **options)
        trainer.train()
        results.append(trainer.predict(data).predictions)
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


def test_dropped_columns_are_explained(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(NUM_LABELS)})
    rows = picture_rows(6)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    dataset = Dataset.from_dict(columns, features=features)
    model = build_model()
    trainer = build_trainer(model, tmp_path, rows=dataset, collator=ImageCollator(model.image_processor))
    with pytest.raises(LayerFusionError, match="remove_unused_columns=False"):
        trainer.train()


def test_prediction_without_labels(tmp_path):
    trainer = build_trainer(build_model(), tmp_path)
    rows = FeatureRows()
    unlabelled = [{"layer_features": tokens} for tokens in rows.tokens]
    expected = trainer.predict(rows).predictions
    found = trainer.predict(unlabelled)
    assert found.label_ids is None
    np.testing.assert_array_equal(found.predictions, expected)


def test_checkpoints_hold_the_head_only(tmp_path):
    model = build_model()
    build_trainer(model, tmp_path, save_strategy="epoch").train()
    checkpoint = tmp_path / "checkpoint-6"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert not [name for name in names if name.startswith("pytorch_model")]
    saved = load_file(checkpoint / "model.safetensors")
    assert_same(saved, {"head." + name: tensor for name, tensor in model.head.state_dict().items()})
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [len(group["params"]) for group in groups] == [len(list(model.head.parameters()))]
    again = ViTForAttentiveLayerFusionClassification.from_pretrained(checkpoint, backbone=model.backbone)
    assert_same(again.state_dict(), model.state_dict())


def test_best_head_comes_back(tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    model = build_model()
    heads = []

    class KeepHeads(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            heads.append(copy_of(model.head.state_dict()))

    trainer = build_trainer(
        model,
        tmp_path,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[KeepHeads()],
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    assert len(heads) == 4
    assert not torch.equal(heads[1]["classifier.weight"], heads[3]["classifier.weight"])
    assert_same(model.head.state_dict(), heads[1])


@pytest.mark.parametrize("stop", [4, 6], ids=["within an epoch", "between epochs"])
def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path, stop):
    """With attention dropout and token noise, so that the state of the random generators counts."""
    random_parts = {"attention_dropout": 0.3, "noise_std": 0.05}
    schedule = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": stop}
    whole = build_model(**random_parts)
    build_trainer(whole, tmp_path / "whole", **schedule).train()

    first = build_model(**random_parts)
    build_trainer(first, tmp_path / "parts", callbacks=[StopAt(stop)], **schedule).train()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"checkpoint-{stop}"]
    assert not torch.equal(first.head.classifier.weight, whole.head.classifier.weight)

    resumed = build_model(seed=9, **random_parts)  # another head, so that it must be loaded
    trainer = build_trainer(resumed, tmp_path / "parts", **schedule)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9
    assert_same(resumed.state_dict(), whole.state_dict())


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """A linear head, since BatchNorm sees each half of the batch alone."""
    found = []
    for batch_size, steps in ((16, 1), (8, 2)):
        keep = KeepGradients()
        model = build_model(recipe="linear-all")
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 1}
        rows = FeatureRows(16)
        build_trainer(model, tmp_path, rows=rows, callbacks=[keep], max_grad_norm=0.0, **options).train()
        found.append(keep.gradients)
    assert found[0].keys() == {"head.classifier.weight", "head.classifier.bias"}
    for name, expected in found[0].items():
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-7)


def test_attentions_stay_out_of_predictions(tmp_path):
    def collate(rows):
        return {**LayerFeatureCollator(NUM_TOKENS)(rows), "output_attentions": True}

    trainer = build_trainer(build_model(), tmp_path, collator=collate)
    rows = FeatureRows(20)
    logits = trainer.predict(rows).predictions
    assert logits.shape == (20, NUM_LABELS)
    everything = trainer.predict(rows, ignore_keys=[])  # they are there when asked for
    assert [array.shape for array in everything.predictions] == [(20, NUM_LABELS), (20, 1, NUM_TOKENS, NUM_TOKENS)]
    assert everything.metrics["test_accuracy"] == trainer.predict(rows).metrics["test_accuracy"]


def test_class_weights_shape_the_loss(tmp_path):
    rows = FeatureRows(16)
    weights = class_weights([0] * 10 + [1] * 6, NUM_LABELS)
    keep = KeepGradients()
    model = build_model(class_weights=weights)
    trainer = build_trainer(model, tmp_path, rows=rows, callbacks=[keep], max_steps=1)
    prediction = trainer.predict(rows)
    logits = torch.from_numpy(prediction.predictions)
    expected = F.cross_entropy(logits, rows.labels, torch.tensor(weights))
    assert prediction.metrics["test_loss"] == pytest.approx(float(expected), abs=1e-6)
    assert abs(float(expected) - float(F.cross_entropy(logits, rows.labels))) > 1e-3
    trainer.train()
    plain = KeepGradients()
    build_trainer(build_model(), tmp_path, rows=rows, callbacks=[plain], max_steps=1).train()
    assert not torch.allclose(keep.gradients["head.classifier.bias"], plain.gradients["head.classifier.bias"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_flags(tmp_path, precision):
    """On a CPU, accelerate runs bf16 under autocast and leaves fp16 off; both flags must train."""
    model = build_model()
    dtypes = set()
    model.head.classifier.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output.dtype))
    trainer = build_trainer(model, tmp_path, num_train_epochs=4, **{precision: True})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert trainer.predict(FeatureRows()).predictions.dtype == np.float32


def test_optimizer_groups():
    frozen, tuned = build_model(), build_model(freeze_backbone=False, backbone_lr_factor=0.1)
    head = {"lr": 0.5, "weight_decay": 0.2}
    (group,) = parameter_groups(frozen, learning_rate=0.5, weight_decay=0.2)
    assert group == {"params": list(frozen.head.parameters()), **head}
    groups = parameter_groups(tuned, learning_rate=0.5, weight_decay=0.2)
    assert groups == [
        {"params": list(tuned.head.parameters()), **head},
        {"params": list(tuned.backbone.parameters()), "lr": 0.05, "weight_decay": 1e-6},
    ]
    tuned.backbone.embeddings.requires_grad_(False)
    options = {"backbone_learning_rate": 1e-3, "backbone_weight_decay": 0.3}
    groups = parameter_groups(tuned, learning_rate=0.5, weight_decay=0.2, **options)
    assert (groups[1]["lr"], groups[1]["weight_decay"]) == (1e-3, 0.3)
    embeddings = {id(parameter) for parameter in tuned.backbone.embeddings.parameters()}
    assert not embeddings & {id(parameter) for parameter in groups[1]["params"]}


def test_trainer_uses_the_groups_and_the_schedule(tmp_path):
    """The `min_lr` of a schedule is measured against the optimizer's default learning rate."""
    model = build_model()
    trainer = build_trainer(
        model,
        tmp_path,
        adam_beta2=0.9,
        adam_epsilon=1e-7,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
    )
    trainer.train()
    (group,) = trainer.optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(p) for p in model.head.parameters()}
    assert (group["initial_lr"], group["weight_decay"]) == (1e-2, 1e-2)
    assert (group["betas"], group["eps"]) == ((0.9, 0.9), 1e-7)
    assert group["lr"] == pytest.approx(1e-4)


def test_fine_tuning(tmp_path):
    """An unfrozen backbone moves, but by less than the head, and its checkpoints hold it and resume."""
    pixels = {
        "rows": picture_rows(),
        "collator": ImageCollator(PROCESSOR),
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 8,
    }
    options = {"freeze_backbone": False, "backbone_lr_factor": 1e-2}
    start = copy_of(build_model(**options).state_dict())
    whole = build_model(**options)
    trainer = build_trainer(whole, tmp_path / "whole", **pixels)
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-2, pytest.approx(1e-4)]
    moved = {name: (p.detach() - start[name]).abs().mean().item() for name, p in whole.named_parameters()}
    del moved["backbone.layernorm.weight"], moved["backbone.layernorm.bias"]  # after the last block: not tapped
    backbone = [distance for name, distance in moved.items() if name.startswith("backbone.")]
    head = [distance for name, distance in moved.items() if name.startswith("head.")]
    assert min(backbone) > 0
    assert max(backbone) < 0.1 * np.mean(head)

    checkpoint = tmp_path / "parts" / "checkpoint-2"
    first = build_model(**options)
    build_trainer(first, tmp_path / "parts", callbacks=[StopAt(2)], **pixels).train()
    assert_same(load_file(checkpoint / "model.safetensors"), first.state_dict())
    resumed = build_model(seed=9, **options)
    build_trainer(resumed, tmp_path / "parts", **pixels).train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed.state_dict(), whole.state_dict())
    again = ViTForAttentiveLayerFusionClassification.from_pretrained(checkpoint)
    assert_same(again.state_dict(), first.state_dict())


TWO_PROCESSES = """
import json
import sys

import numpy as np

from test_trainer import DTYPES, train_and_predict

folder = sys.argv[1]
for dtype in DTYPES:
    logits, metrics, trainer = train_and_predict(folder, dtype, per_device_batch_size=8)
    if trainer.is_world_process_zero():
        np.save(f"{folder}/{dtype}.npy", logits)
        with open(f"{folder}/{dtype}.json", "w") as file:
            json.dump({"world_size": trainer.args.world_size, **metrics}, file)
"""
# BatchNorm takes the mean out, so the gradients of the biases before it are zero but for rounding, which AdamW turns
# into steps as long as any other. Its epsilon of 1e-8 is above the rounding of float64; in float32 those two biases
# are left alone.
DTYPES = {
    "float64": {"left_alone": (), "tolerance": 1e-9},
    "float32": {"left_alone": ("norm_v.bias", "out_proj.bias"), "tolerance": 1e-4},
}


def train_and_predict(folder, dtype, per_device_batch_size):
    """No dropout and no noise: each process would draw its own."""
    model = build_model().to(getattr(torch, dtype))
    for name in DTYPES[dtype]["left_alone"]:
        model.head.get_parameter(name).requires_grad_(False)
    trainer = build_trainer(
        model,
        folder,
        rows=FeatureRows(64),
        num_train_epochs=3,
        per_device_train_batch_size=per_device_batch_size,
        per_device_eval_batch_size=per_device_batch_size,
    )
    trainer.train()
    measured = {"eval_loss": trainer.evaluate()["eval_loss"]}
    prediction = trainer.predict(
        FeatureRows(37, seed=2, spread=5.0)
    )  # the last batch is uneven: padded rows must not count
    measured |= {name: value for name, value in prediction.metrics.items() if name in METRICS}
    return prediction.predictions, measured, trainer


@pytest.mark.slow
def test_two_processes_train_the_head_of_one(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    search = [str(Path(hf_layerfusion.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `torchrun` tells its processes, without the seconds that it takes to start.
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors[0][-4000:] + errors[1][-4000:]
    for dtype, options in DTYPES.items():
        found = json.loads((tmp_path / f"{dtype}.json").read_text())
        assert found.pop("world_size") == 2
        logits, expected, _ = train_and_predict(tmp_path / "one", dtype, per_device_batch_size=16)
        assert np.abs(logits).max() > 1
        assert 0.4 < expected["test_accuracy"] < 1
        np.testing.assert_allclose(np.load(tmp_path / f"{dtype}.npy"), logits, rtol=0, atol=options["tolerance"])
        assert found.keys() == {"eval_loss", *METRICS}
        assert found == pytest.approx(expected, abs=options["tolerance"])
