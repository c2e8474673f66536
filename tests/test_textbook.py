"""What the benchmarks measure against does the same work as the library: the same head, the same training."""

import copy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from task import build_task
from textbook import CachedRows, TextbookHead, train_textbook

from hf_layerfusion import AttentiveFusionHead, ViTForAttentiveLayerFusionClassification, extract_features, sweep
from hf_layerfusion.data import open_digits
from hf_layerfusion.sweeps.stack import first_state
from hf_layerfusion.training import build_trainer, class_weights
from hf_layerfusion.training.metrics import BalancedAccuracy

NUM_LABELS, BATCH_SIZE, WIDTH = 7, 12, 64
SHAPES = {"alf": (24, 24), "all-tokens": (257, 8), "few": (2, 2)}  # tokens, heads


def randomised(head):
    """The head in float64, with no parameter or buffer at a value that could be right by being trivial."""
    head = head.double()
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_v.weight", "batch_norm.weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return head


def unit_tokens(num_tokens, rows=BATCH_SIZE):
    return F.normalize(torch.randn(rows, num_tokens, WIDTH, dtype=torch.float64) + 0.2, dim=-1)


@pytest.mark.parametrize("mode", ["train", "train-dropout", "eval"])
@pytest.mark.parametrize("expands_query", [False, True], ids=["one query", "query per row"])
@pytest.mark.parametrize("use_sdpa", [False, True], ids=["products", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_textbook_head_is_the_library_s(shape, use_sdpa, expands_query, mode):
    num_tokens, num_heads = SHAPES[shape]
    dropout = 0.3 if mode == "train-dropout" else 0.0
    textbook = randomised(TextbookHead(WIDTH, num_tokens, NUM_LABELS, num_heads, dropout, use_sdpa, expands_query))
    own = AttentiveFusionHead(WIDTH, num_tokens, NUM_LABELS, num_heads=num_heads, attention_dropout=dropout).double()
    own.load_state_dict(textbook.state_dict())
    tokens, coefficients = unit_tokens(num_tokens), torch.randn(BATCH_SIZE, NUM_LABELS, dtype=torch.float64)
    results = []
    for head in (textbook, own):
        torch.manual_seed(5)  # of the dropout mask
        logits = head.train(mode != "eval")(tokens)
        (logits * coefficients).sum().backward()
        gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
        statistics = {name: head.get_buffer(f"batch_norm.{name}") for name in ("running_mean", "running_var")}
        results.append({"logits": logits, **gradients, **statistics})
    expected, found = results
    assert expected.keys() == found.keys()
    zeros = {"norm_k.bias"}  # gradients that are exactly zero: rounding is all there is to compare
    if mode != "eval":
        zeros |= {"out_proj.bias"} | ({"norm_v.bias"} if not dropout else set())
    for name in expected.keys() - zeros:
        scale = expected[name].abs().max().item()
        assert scale > 1e-6, f"{name} vanishes, so comparing it would show nothing"
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10 * scale, msg=name)


def test_heads_are_as_many_as_tokens_by_default():
    assert TextbookHead(WIDTH, 6, NUM_LABELS).load_state_dict(AttentiveFusionHead(WIDTH, 6, NUM_LABELS).state_dict())
    assert TextbookHead(WIDTH, 6, NUM_LABELS).num_heads == 6


def test_a_row_is_normalised_and_in_float32():
    tokens = 3 * unit_tokens(4).half()
    rows = CachedRows(tokens, torch.arange(BATCH_SIZE))
    assert len(rows) == BATCH_SIZE
    row, label = rows[5]
    assert (row.dtype, row.shape, label) == (torch.float32, (4, WIDTH), 5)
    torch.testing.assert_close(row, F.normalize(tokens[5].float(), dim=-1))


class Recorder(nn.Module):
    """A head that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(WIDTH, NUM_LABELS)
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens.clone())
        return self.classifier(tokens.mean(dim=1))


TRAINING = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "epochs": 3,
    "batch_size": 100,
    "noise_std": 0.05,
    "noise_probability": 0.5,
    "class_weights": None,
    "seed": 3,
}


def recorded(num_rows, **options):
    """What a head sees, and the seconds of each step."""
    tokens = torch.ones(num_rows, 2, WIDTH)
    rows = CachedRows(tokens, torch.arange(num_rows) % NUM_LABELS)
    head = Recorder()
    seconds = train_textbook(head, rows, **{**TRAINING, **options})
    return head.seen, seconds


@pytest.mark.parametrize(("max_steps", "batches"), [(None, [100, 100, 30] * 3), (4, [100, 100, 30, 100])])
def test_every_step_is_timed(max_steps, batches):
    seen, seconds = recorded(230, max_steps=max_steps)
    assert [len(tokens) for tokens in seen] == batches
    assert len(seconds) == len(batches)
    assert min(seconds) > 0


@pytest.mark.parametrize(("probability", "share"), [(0.0, (0, 0)), (0.5, (0.4, 0.6)), (1.0, (1, 1))])
def test_noise_falls_on_whole_rows(probability, share):
    seen, _ = recorded(400, noise_probability=probability, batch_size=400, epochs=1)
    noise = seen[0] - WIDTH**-0.5  # every entry of a normalised row of equal numbers
    noisy = noise.abs().amax(dim=(1, 2)) > 1e-6
    assert share[0] <= noisy.float().mean() <= share[1]
    if probability:
        assert noise[noisy].std().item() == pytest.approx(TRAINING["noise_std"], rel=0.03)
        for axis in range(3):  # no two rows, tokens or entries have the same
            difference = noise[noisy].diff(dim=axis).std().item()
            assert difference == pytest.approx(2**0.5 * TRAINING["noise_std"], rel=0.03)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    sizes = {"rows": 60, "layers": 2, "width": 48, "classes": 5, "batch_size": 60}
    return build_task(tmp_path_factory.mktemp("task"), Namespace(**sizes, clock="wall"))


def test_the_textbook_loop_trains_the_head_that_trainer_trains(task, tmp_path):
    """With one batch an epoch and no noise, nothing is drawn, and both must come to the same head."""
    own = task.model.head
    own.reset_parameters()
    with torch.no_grad():
        own.classifier.weight.mul_(50)  # gradients large enough to be clipped
    textbook = TextbookHead(task.features.hidden_size, len(task.features.bank), task.num_labels)
    textbook.load_state_dict(own.state_dict())
    untrained = copy.deepcopy(textbook)
    shared = {"learning_rate": 1e-2, "weight_decay": 0.1, "batch_size": len(task.rows)}
    options = {**TRAINING, **shared, "epochs": 8, "noise_std": 0.0, "class_weights": torch.tensor(task.class_weights)}
    train_textbook(textbook, task.rows, **options)
    task.model.config.noise_std = 0.0
    trainer = build_trainer(
        task.model, task.features, tmp_path, num_train_epochs=8, use_cpu=True, disable_tqdm=True, **shared
    )
    trainer.train()
    tokens = torch.stack([row for row, _ in task.rows])
    # In training mode: rounding moves biases whose gradient is exactly zero, and running statistics lag behind those.
    with torch.no_grad():
        before, expected, found = (head.train()(tokens) for head in (untrained, textbook, own))
    assert (expected - before).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_alf_paper_on_real_features_is_as_good_as_the_textbook(small_backbone_folder, tmp_path):
    """The same features and protocol, the reference's loop against the sweep's road, six seeds.

    With six tokens: the textbook's time grows with them, and that the two heads agree for many is shown above.
    """
    # Mixed, since the digits come by writer.
    rows = open_digits()["train"].select(np.random.default_rng(0).permutation(1797))
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        small_backbone_folder,
        recipe="alf-paper",
        layers=[6, 12],
        id2label=[str(number) for number in range(10)],
        image_size=28,
    )
    features = extract_features(model, rows, tmp_path, progress=False)
    train, test = features.select_rows(range(400)), features.select_rows(range(400, 1797))
    options = {"learning_rate": 1e-3, "weight_decay": 1e-2, "noise_std": 0.05, "noise_probability": 0.5}
    epochs, seeds = 15, range(6)
    found = sweep(
        train,
        recipe="alf-paper",
        layers=[6, 12],
        grid={**options, "attention_dropout": 0.0},
        num_epochs=epochs,
        batch_size=80,
        refit_seeds=seeds,
        progress=False,
    )
    held_out = test.tensors()
    weights = torch.tensor(class_weights(train.labels, 10))
    scores = {"textbook": [], "own": []}
    for seed in seeds:
        textbook = TextbookHead(features.hidden_size, len(features.bank), 10)
        textbook.load_state_dict(first_state(found.config, seed))  # what is left to chance are batches and noise
        data = CachedRows(train.tensors()["layer_features"], torch.from_numpy(train.labels))
        train_textbook(textbook, data, epochs=epochs, batch_size=80, class_weights=weights, seed=seed, **options)
        tokens = held_out["layer_features"].float()
        with torch.no_grad():
            logits = {
                "textbook": textbook.eval()(F.normalize(tokens, dim=-1)),
                "own": found.build_model(seed=seed)(layer_features=tokens).logits,
            }
        for name, values in logits.items():
            metric = BalancedAccuracy().compute(predictions=values.argmax(dim=-1), references=held_out["labels"])
            scores[name].append(100 * metric["balanced_accuracy"])
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    assert means["textbook"] > 90, scores
    assert abs(means["own"] - means["textbook"]) <= 0.3, scores
