"""What a head is measured to be worth: metrics, their intervals, classes, confusions and attention."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from modeling_helpers import NUM_LAYERS, build_attending_model, images, tiny_backbone
from picture_helpers import CLASSES, save_tiny_backbone, write_pictures
from transformers import EvalPrediction

from hf_layerfusion import LayerFusionConfig, LayerFusionError
from hf_layerfusion.analysis import summarise_attentions
from hf_layerfusion.cli.main import main
from hf_layerfusion.hub.record import check_record, read_record
from hf_layerfusion.study.statistics import Predictions, bootstrap_mean
from hf_layerfusion.training import build_compute_metrics, evaluation
from hf_layerfusion.training.evaluation import (
    HeadOutputs,
    bootstrap_intervals,
    collect_outputs,
    evaluate_head,
    measure_outputs,
    weighted_metrics,
)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def build_config(problem, num_labels):
    return LayerFusionConfig(
        backbone_config=tiny_backbone("dinov2").config, problem_type=problem, num_labels=num_labels
    )


def outputs_of(problem, rows=60, num_labels=7, seed=0):
    """Random outputs with some skill; those of several labels have ties, and a label that no image has."""
    random = np.random.default_rng(seed)
    if problem == SINGLE:
        labels = random.integers(0, num_labels - 1, rows)  # the last class has no image
        logits = random.normal(size=(rows, num_labels)) + 1.5 * np.eye(num_labels)[labels]
    elif problem == MULTI:
        labels = (random.random((rows, num_labels)) < 0.3).astype(np.float32)
        labels[:, -1] = 0
        logits = np.round(random.normal(size=labels.shape) + labels, 1)
    else:
        labels = random.normal(size=(rows, num_labels))
        logits = labels + 0.5 * random.normal(size=labels.shape)
    return HeadOutputs(logits.astype(np.float32), labels, None)


PROBLEMS = [(SINGLE, 3), (SINGLE, 7), (MULTI, 4), (REGRESSION, 1), (REGRESSION, 2)]


@pytest.mark.parametrize(("problem", "num_labels"), PROBLEMS)
def test_a_weight_counts_as_so_many_images(problem, num_labels):
    """The metrics that are resampled are those that are reported, of rows that are there several times or not at all."""
    outputs = outputs_of(problem, num_labels=num_labels)
    compute = build_compute_metrics(build_config(problem, num_labels))
    metrics = weighted_metrics(problem, outputs.logits, outputs.labels)
    for weights in (np.ones(60, dtype=int), np.random.default_rng(1).integers(0, 4, 60)):
        rows = np.repeat(np.arange(60), weights)
        expected = compute(EvalPrediction(predictions=outputs.logits[rows], label_ids=outputs.labels[rows]))
        assert metrics(weights.astype(float)) == pytest.approx(expected, rel=1e-6)


def test_intervals_are_those_of_the_study():
    outputs = outputs_of(SINGLE, rows=300, num_labels=5)
    found = measure_outputs(build_config(SINGLE, 5), outputs)
    predictions = Predictions(np.arange(300), outputs.labels, outputs.logits.argmax(-1))
    estimate = bootstrap_mean({0: [predictions]})
    assert found["metrics"]["balanced_accuracy"] == pytest.approx(estimate.value)
    # Two bootstraps of 2000 resamples: the ends of an interval of 0.1 differ by chance, by 0.003 at most in ten seeds.
    assert found["confidence_intervals"]["balanced_accuracy"] == pytest.approx(
        [estimate.low, estimate.high], abs=0.004
    )


def test_interval_of_a_share_is_that_of_a_binomial():
    hit = np.arange(400) < 320
    intervals = bootstrap_intervals(lambda weights: {"share": float((weights * hit).sum() / weights.sum())}, 400)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert intervals["share"] == pytest.approx([0.8 - half, 0.8 + half], abs=0.005)


def test_intervals_depend_on_the_seed_alone():
    config, outputs = build_config(SINGLE, 7), outputs_of(SINGLE)
    first, again, other = (measure_outputs(config, outputs, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["confidence_intervals"] != other["confidence_intervals"]
    assert first["metrics"] == other["metrics"]


@pytest.mark.parametrize(("problem", "num_labels"), PROBLEMS)
def test_what_is_measured_is_a_training_record(problem, num_labels):
    measured = measure_outputs(build_config(problem, num_labels), outputs_of(problem, num_labels=num_labels))
    assert check_record(measured) == json.loads(json.dumps(measured)) == measured
    assert measured["test_images"] == 60
    assert measured["metrics"].keys() == measured["confidence_intervals"].keys()
    for name, (low, high) in measured["confidence_intervals"].items():
        assert low <= measured["metrics"][name] <= high
        assert high > low
    assert ("confusion_matrix" in measured) == (problem == SINGLE)
    assert ("per_class" in measured) == (problem != REGRESSION)
    assert "attention" not in measured


def test_classes_and_confusions_by_hand():
    labels = np.array([0, 0, 0, 1, 1, -100])
    logits = np.eye(4)[[0, 0, 1, 1, 1, 3]].astype(np.float32)
    config = build_config(SINGLE, 4)
    config.id2label = dict(enumerate(["ant", "bee", "cat", "dog"]))
    measured = measure_outputs(config, HeadOutputs(logits, labels, None))
    assert measured["test_images"] == 5, "a row without a label counts nowhere"
    assert measured["confusion_matrix"] == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    ant, bee, cat, dog = measured["per_class"]
    assert ant == {"label": "ant", "precision": 1, "recall": 2 / 3, "f1": pytest.approx(0.8), "support": 3}
    assert bee == {"label": "bee", "precision": 2 / 3, "recall": 1, "f1": pytest.approx(0.8), "support": 2}
    for row in (cat, dog):  # neither seen nor said: nothing is known, which is not 0
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == (None, None, None, 0)


def test_labels_of_several_per_image_by_hand():
    labels = np.array([[1, 0], [1, 0], [0, 0]])  # whole numbers, as some caches have them
    logits = np.array([[1, -1], [-1, -1], [1, -1]], dtype=np.float32)
    measured = measure_outputs(build_config(MULTI, 2), HeadOutputs(logits, labels, None))
    first, second = measured["per_class"]
    assert (first["precision"], first["recall"], first["support"]) == (0.5, 0.5, 2)
    assert (second["recall"], second["support"]) == (None, 0)
    assert measured["metrics"]["micro_f1"] == 0.5


def test_many_classes_have_no_matrix(monkeypatch):
    config, outputs = build_config(SINGLE, 7), outputs_of(SINGLE)
    assert len(measure_outputs(config, outputs)["confusion_matrix"]) == 7
    monkeypatch.setattr(evaluation, "MAX_CONFUSION_CLASSES", 6)
    measured = measure_outputs(config, outputs)
    assert "confusion_matrix" not in measured
    assert len(measured["per_class"]) == 7


def test_undefined_metrics_are_left_out():
    labels = np.zeros((4, 2), dtype=np.float32)  # no label is ever there, so no precision can be averaged
    measured = measure_outputs(build_config(MULTI, 2), HeadOutputs(np.ones_like(labels), labels, None))
    assert measured["metrics"].keys() == measured["confidence_intervals"].keys() == {"macro_f1", "micro_f1"}
    single = measure_outputs(build_config(SINGLE, 3), outputs_of(SINGLE, rows=1, num_labels=3))
    assert "confidence_intervals" not in single, "one image says nothing about others"


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.array([-100, -100]), "nothing to evaluate"), (np.array([0, 3]), "label 3 is out of range")],
)
def test_labels_that_say_nothing(labels, message):
    with pytest.raises(LayerFusionError, match=message):
        measure_outputs(build_config(SINGLE, 3), HeadOutputs(np.zeros((2, 3), dtype=np.float32), labels, None))


# ---- with a model --------------------------------------------------------------------------------------------------


class Cache:
    """What `evaluate_head` asks of cached features."""

    def __init__(self, tokens, labels):
        self.tokens, self.labels, self.bank = tokens, labels, None

    def select_bank(self, bank):
        self.bank = bank
        return self

    def batches(self, batch_size):
        for tokens, labels in zip(self.tokens.split(batch_size), self.labels.split(batch_size), strict=True):
            yield {"layer_features": tokens, "labels": labels}


@pytest.mark.parametrize("options", [{}, {"num_heads": 4, "num_queries": 3}, {"recipe": "scalar-mix"}])
def test_a_head_on_cached_features(options):
    model = build_attending_model(**options).train()
    pixel_values, labels = images(20), torch.arange(20) % 3
    cache = Cache(model.extract_layer_features(pixel_values), labels)
    measured = evaluate_head(model, cache, batch_size=7)
    assert not model.training
    assert cache.bank == model.config.bank
    with torch.no_grad():
        predictions = model(pixel_values).logits.argmax(-1)
    assert measured["metrics"]["accuracy"] == pytest.approx((predictions == labels).float().mean().item())
    assert np.array(measured["confusion_matrix"]).sum() == 20
    summary = summarise_attentions(model, cache.batches(7))
    attention = measured["attention"]
    assert attention["token_names"] == model.config.token_names
    assert attention["num_images"] == 20
    np.testing.assert_allclose(attention["mean"], summary.mean.numpy(), atol=1e-6)
    assert np.shape(attention["mean"])[1] == 2 * NUM_LAYERS
    assert evaluate_head(model, cache, batch_size=20)["metrics"] == measured["metrics"]


def test_a_linear_head_has_no_attention():
    model = build_attending_model(recipe="linear-all")
    cache = Cache(model.extract_layer_features(images(6)), torch.arange(6) % 3)
    assert "attention" not in evaluate_head(model, cache)


def test_nothing_to_measure():
    model = build_attending_model()
    with pytest.raises(LayerFusionError, match="no images to evaluate on"):
        collect_outputs(model, [])
    with pytest.raises(LayerFusionError, match="no labels to compare with"):
        collect_outputs(model, [{"pixel_values": images(2)}])


def test_pixels_and_tokens_give_the_same_outputs():
    model = build_attending_model()
    pixel_values, labels = images(6), torch.arange(6) % 3
    from_pixels = collect_outputs(model, [{"pixel_values": pixel_values, "labels": labels}])
    tokens = model.extract_layer_features(pixel_values)
    from_tokens = collect_outputs(model, [{"layer_features": tokens, "labels": labels}])
    np.testing.assert_allclose(from_pixels.logits, from_tokens.logits, atol=1e-5)
    np.testing.assert_allclose(from_pixels.attention, from_tokens.attention, atol=1e-6)


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a head that `layerfusion train` wrote and of its pictures."""
    folder = tmp_path_factory.mktemp("commands")
    backbone = save_tiny_backbone(folder / "backbone")
    pictures = write_pictures(folder / "pictures", 20)
    options = [
        "--num_train_epochs",
        "1",
        "--device",
        "cpu",
        "--license",
        "mit",
        "--note",
        "Noise.",
        "--note",
        "Tinted.",
    ]
    command = ["train", "--backbone", backbone, "--dataset", pictures, "--output_dir", folder / "head", *options]
    assert main([str(argument) for argument in command]) == 0
    return folder / "head", pictures


def test_train_writes_what_it_measured(trained):
    head, _ = trained
    record = read_record(head / "training_record.json")
    metrics = json.loads((head / "metrics.json").read_text())
    assert record["metrics"].keys() == record["confidence_intervals"].keys()
    assert record["metrics"] == pytest.approx({name: metrics[name] for name in record["metrics"]})
    assert (record["dataset"], record["split"]) == ("pictures", "train, a fifth held out")
    assert "dataset_id" not in record, "a folder is on no Hub"
    assert (record["train_images"], record["test_images"]) == (48, 12)
    assert [row["label"] for row in record["per_class"]] == CLASSES
    assert np.shape(record["confusion_matrix"]) == (3, 3)
    assert np.shape(record["attention"]["mean"]) == (2 * NUM_LAYERS, 2 * NUM_LAYERS)
    assert record["hyperparameters"]["image size"] == "32 x 32"
    assert torch.__version__.startswith(record["environment"]["torch"])
    assert record["notes"] == ["Noise.", "Tinted."]
    card = ModelCard.load(head / "README.md")
    assert card.data.license == "mit"
    assert "- Noise.\n- Tinted.\n" in card.text
    assert str(head.parent) not in card.content + (head / "training_record.json").read_text()


def test_evaluate_writes_what_it_measured(trained, tmp_path, capsys):
    head, pictures = trained
    capsys.readouterr()
    command = ["evaluate", "--model", head, "--dataset", pictures, "--split", "train", "--device", "cpu"]
    assert main([str(argument) for argument in [*command, "--output_dir", tmp_path / "out"]]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["split"], printed["images"]) == ("train", 48)
    record = read_record(tmp_path / "out" / "evaluation.json")
    assert printed["confidence_intervals"] == record["confidence_intervals"]
    assert {name: printed[name] for name in record["metrics"]} == record["metrics"]
    assert printed["loss"] > 0
    assert np.sum(record["confusion_matrix"]) == 48
    pytest.importorskip("matplotlib")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"evaluation.json", "confusion_matrix.png", "layer_attention.png"}
