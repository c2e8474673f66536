"""Squared loss, dropout of whole layers, standardised tokens and mixup: by value, and the same on every road."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modeling_helpers import images, tiny_backbone
from sweep_helpers import CLASSES, LAYERS, WIDTH, class_labels, learnable_tokens, write_features
from torch.nn import functional as F

from hf_layerfusion import (
    LayerFusionConfig,
    LayerFusionError,
    SweepResult,
    ViTForAttentiveLayerFusionClassification,
    load_heads,
    sweep,
)
from hf_layerfusion.cli.options import training_options
from hf_layerfusion.export import _PixelsToLogits, _twin
from hf_layerfusion.heads import TokenStandardizer, build_head
from hf_layerfusion.layout import TokenLayout
from hf_layerfusion.losses import classification_loss, stacked_loss
from hf_layerfusion.noise import Mixture, layer_positions
from hf_layerfusion.sweeps import Setting, expand_grid
from hf_layerfusion.sweeps.engine import Engine, Protocol, Rows
from hf_layerfusion.sweeps.stack import Draws, HeadStack, Trial, first_state
from hf_layerfusion.training import build_trainer

LAYOUT = TokenLayout.of_plain_vit(WIDTH, LAYERS).to_dict()
LABELS = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
WEIGHTS = [0.5, 1.0, 2.0]
ROWS = 12


def config_of(**options):
    return LayerFusionConfig(
        **{"token_layout": LAYOUT, "recipe": "alf", "attention_dropout": 0.0, **LABELS, **options}
    )


def model_of(**options):
    torch.manual_seed(1)
    return ViTForAttentiveLayerFusionClassification(config_of(**options), with_backbone=False).double()


def batch_of(config, rows=ROWS, seed=0):
    labels = class_labels(rows)
    tokens = learnable_tokens(labels, bank=list(config.bank.coordinates), seed=seed).double()
    return tokens, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features"))


# ---- squared loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_squared_loss_by_value(weights):
    config = config_of(loss="squared", class_weights=weights)
    logits = 10 * torch.randn(5, CLASSES, dtype=torch.float64)
    labels = torch.tensor([0, 2, -100, 1, 2])
    total = share = 0.0
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        weight = 1.0 if weights is None else weights[label]
        total += weight * sum((logits[row, c].item() / 10 - (c == label)) ** 2 for c in range(CLASSES))
        share += weight
    assert classification_loss(config, logits, labels).item() == pytest.approx(total / share, rel=1e-12)
    kept = labels != -100
    stacked = stacked_loss(
        "single_label_classification",
        torch.stack([logits[kept], 2 * logits[kept]]),
        labels[kept],
        None if weights is None else torch.tensor([weights, weights], dtype=torch.float64),
        "squared",
    )
    for number, loss in enumerate(stacked):
        alone = classification_loss(config, (number + 1) * logits[kept], labels[kept])
        torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0)


def test_logits_are_ten_times_what_the_head_learns():
    squared, plain = model_of(loss="squared").eval(), model_of().eval()
    tokens, labels = batch_of(squared.config)
    with torch.no_grad():
        found, outputs = squared(layer_features=tokens, labels=labels), plain(layer_features=tokens).logits
    torch.testing.assert_close(found.logits, 10 * outputs, rtol=1e-12, atol=0)
    expected = (outputs - F.one_hot(labels, CLASSES)).square().sum(dim=1).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options", [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}, {"num_labels": 1}]
)
def test_squared_loss_is_for_classes(options):
    with pytest.raises(LayerFusionError, match="loss='squared' is for single-label classification"):
        config_of(**{"loss": "squared", "problem_type": None, **options})


def test_squared_loss_is_refused_where_labels_turn_out_to_be_numbers():
    config = config_of(loss="squared", problem_type=None)
    with pytest.raises(LayerFusionError, match="these labels say multi_label_classification"):
        classification_loss(config, torch.zeros(2, CLASSES), torch.zeros(2, CLASSES))
    with pytest.raises(LayerFusionError, match="and this is regression"):
        config.problem_type = "regression"


# ---- dropout of layers -----------------------------------------------------------------------------------------


def textbook(head, tokens, keep):
    """Logits of an attentive head in training mode, from its parameters alone, with the weights of some tokens scaled."""
    heads = (head.num_heads, head.head_dim)
    query = F.linear(head.norm_q(head.query[0]), head.q_proj.weight).unflatten(-1, heads)
    key = F.linear(head.norm_k(tokens), head.k_proj.weight).unflatten(-1, heads)
    value = F.linear(head.norm_v(tokens), head.v_proj.weight).unflatten(-1, heads)
    weights = torch.einsum("qhd,bnhd->bqhn", query * head.head_dim**-0.5, key).softmax(dim=-1)
    pooled = torch.einsum("bqhn,bnhd->bqhd", weights * keep[:, None, None], value).flatten(2)
    out = F.linear(pooled, head.out_proj.weight, head.out_proj.bias).flatten(1)
    normed = (out - out.mean(dim=0)) / (out.var(dim=0, unbiased=False) + head.batch_norm.eps).sqrt()
    normed = normed * head.batch_norm.weight + head.batch_norm.bias
    return F.linear(normed, head.classifier.weight, head.classifier.bias)


def test_layers_are_dropped_together():
    bank = config_of(recipe="alf-paper").bank
    positions = layer_positions(bank)
    layers = [coordinate.layer for coordinate in bank.coordinates]
    assert sorted(set(positions)) == list(range(len(set(layers))))
    assert len({*zip(layers, positions, strict=True)}) == len(set(layers))
    model = model_of(recipe="alf-paper", layer_dropout=0.4)
    torch.manual_seed(0)
    keep = model.train()._token_keep(torch.zeros(500, len(bank), WIDTH))
    assert ((keep == 0) | (keep - 1 / 0.6).abs().lt(1e-6)).all()
    for layer in set(layers):
        own = keep[:, [number for number, other in enumerate(layers) if other == layer]]
        assert (own == own[:, :1]).all()
        assert 0.3 < (own == 0).double().mean() < 0.5
    assert model.eval()._token_keep(torch.zeros(5, len(bank), WIDTH)) is None


@pytest.mark.parametrize("implementation", ["fast", "explicit"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_layer_dropout_of_an_attentive_head(implementation, attention_dropout):
    model = model_of(layer_dropout=0.5, attention_dropout=attention_dropout, num_queries=2, num_heads=4).train()
    model.head.implementation = implementation
    tokens, _ = batch_of(model.config)
    positions = layer_positions(model.config.bank)
    torch.manual_seed(3)
    keep = F.dropout(torch.ones(ROWS, max(positions) + 1), 0.5)[:, positions].double()
    normed = F.normalize(tokens, dim=-1)
    if attention_dropout:
        other = copy.deepcopy(model.head)
        other.implementation = "explicit" if implementation == "fast" else "fast"
        expected = other(normed, token_keep=keep)
    else:
        expected = textbook(model.head, normed, keep)
    torch.manual_seed(3)
    found = model(layer_features=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, textbook(model.head, normed, torch.ones_like(keep)), atol=1e-3)


@pytest.mark.parametrize("recipe", ["linear-all", "scalar-mix"])
def test_layer_dropout_of_other_heads(recipe):
    model = model_of(recipe=recipe, layer_dropout=0.5).train()
    tokens, _ = batch_of(model.config)
    positions = layer_positions(model.config.bank)
    torch.manual_seed(3)
    keep = F.dropout(torch.ones(ROWS, max(positions) + 1), 0.5)[:, positions].double()
    expected = model.head(F.normalize(tokens, dim=-1) * keep[..., None])
    torch.manual_seed(3)
    torch.testing.assert_close(model(layer_features=tokens).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recipe", ["alf", "linear-all", "scalar-mix"])
def test_heads_of_one_stack_drop_layers_at_their_own_rates(recipe):
    rates = (0.0, 0.3, 1.0)
    configs = [config_of(recipe=recipe, layer_dropout=rate) for rate in rates]
    trials = [Trial(Setting(recipe=recipe, layer_dropout=rate)) for rate in rates]
    stack = HeadStack(trials, configs, None, torch.device("cpu"), torch.float64)
    tokens, _ = batch_of(configs[0])
    draws = Draws(5, 7, torch.device("cpu"))
    logits = stack.logits(stack.inputs(tokens, None, draws))
    positions = layer_positions(configs[0].bank)
    uniform = draws.uniform("layers", (ROWS, max(positions) + 1))
    for number, rate in enumerate(rates):
        head = build_head(configs[number]).double().train()
        head.load_state_dict(stack.head_state(number), strict=False)
        dropped = (uniform < rate)[:, positions]
        keep = torch.where(dropped, 0.0, 1 / max(1 - rate, 1e-12)).double()
        expected = textbook(head, tokens, keep) if recipe == "alf" else head(tokens * keep[..., None])
        # Without any token, BatchNorm divides rounding by the root of its epsilon.
        torch.testing.assert_close(logits[number], expected, rtol=1e-6, atol=1e-6)


# ---- standardised tokens ---------------------------------------------------------------------------------------


def statistics_of(features, bank, rows=None):
    tokens = features.select_bank(bank).tensors()["layer_features"].double().numpy()
    tokens = tokens if rows is None else tokens[rows]
    return tokens.mean(axis=0), tokens.std(axis=0)


def test_statistics_are_exact(tmp_path):
    labels = class_labels(300)
    tokens = learnable_tokens(labels) + 1000  # where a difference of large sums would lose all digits in float32
    tokens[:, 3, 5] = 7.0
    features = write_features(tmp_path, labels, tokens)
    standardizer = TokenStandardizer(len(features.bank), WIDTH)
    assert not standardizer.is_fitted
    standardizer.fit(SimpleNamespace(batches=lambda _, device: features.batches(64, device=device)))
    mean, std = statistics_of(features, features.bank)
    assert std[3, 5] == 0
    std[3, 5] = 1
    np.testing.assert_allclose(standardizer.mean.numpy(), mean, rtol=1e-7)
    np.testing.assert_allclose(standardizer.std.numpy(), std, rtol=1e-6)
    assert (standardizer.is_fitted, standardizer.count.item()) == (True, 300)
    found = standardizer(tokens.double()).numpy()
    np.testing.assert_allclose(
        found, (tokens.double().numpy() - np.float32(mean)) / (np.float32(std) + 1e-6), rtol=1e-5, atol=1e-9
    )


def test_every_fold_has_the_statistics_of_its_own_training_rows(features):
    settings = [Setting(recipe=recipe, attention_dropout=0.0) for recipe in ("alf", "alf-mid-last")]
    parts = [(np.arange(0, 40), np.arange(40, 75)), (np.arange(30, 75), np.arange(0, 30))]
    engine = Engine(
        [Trial(setting, fold=fold) for setting in settings for fold in range(2)],
        {s: config_of(recipe=s.recipe, token_normalization="standardize") for s in settings},
        [Rows(features.select_rows(train), features.select_rows(held_out), None) for train, held_out in parts],
        Protocol(num_epochs=1, batch_size=20),
        keep_states=True,
        progress=False,
    )
    engine.run()
    for trial, state in engine.states.items():
        mean, std = statistics_of(features, engine.configs[trial.setting].bank, parts[trial.fold][0])
        np.testing.assert_allclose(state["token_standardizer.mean"].numpy(), mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state["token_standardizer.std"].numpy(), std, rtol=1e-6)
        assert state["token_standardizer.count"] == len(parts[trial.fold][0])


def test_without_statistics_nothing_is_computed(features, tmp_path):
    model = model_of(token_normalization="standardize")
    tokens, labels = batch_of(model.config)
    with pytest.raises(LayerFusionError, match=re.escape("call model.fit_token_statistics(features)")):
        model(layer_features=tokens, labels=labels)
    model.fit_token_statistics(features)
    assert torch.isfinite(model(layer_features=tokens, labels=labels).loss)
    bad = learnable_tokens(features.labels)
    bad[5, 4, 0] = float("nan")  # of a token that the head reads
    other = model_of(token_normalization="standardize")
    with pytest.raises(LayerFusionError, match="row 5 of the features holds NaN"):
        other.fit_token_statistics(write_features(tmp_path, features.labels, bad))
    assert not other.token_standardizer.is_fitted
    with pytest.raises(LayerFusionError, match="the features hold no row"):
        model.fit_token_statistics(features.select_rows([]))
    with pytest.raises(LayerFusionError, match="token_normalization='l2' needs no statistics"):
        model_of().fit_token_statistics(features)


@pytest.mark.parametrize("recipe", ["alf", "linear-all"])
def test_logits_of_standardised_tokens(features, recipe):
    model = model_of(recipe=recipe, token_normalization="standardize").eval()
    model.fit_token_statistics(features)
    tokens, _ = batch_of(model.config, seed=4)
    mean, std = (torch.from_numpy(part) for part in statistics_of(features, model.config.bank))
    with torch.no_grad():
        expected = model.head((tokens - mean) / (std + 1e-6))
        torch.testing.assert_close(model(layer_features=tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_saved_loaded_and_exported(tmp_path):
    torch.manual_seed(2)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("vit"), num_labels=3, token_normalization="standardize", loss="squared"
    )
    with torch.no_grad():
        cached = model.extract_layer_features(images())
    rows = [{"layer_features": cached + 0.1}]
    model.token_standardizer.fit(SimpleNamespace(batches=lambda *_, **__: rows))
    with torch.no_grad():
        expected = model(layer_features=cached).logits
        torch.testing.assert_close(model(images()).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path, backbone=model.backbone)
    assert (loaded.config.loss, loaded.config.token_normalization) == ("squared", "standardize")
    heads = load_heads(model.backbone, {"one": tmp_path})
    traced = _PixelsToLogits(_twin(loaded))
    with torch.no_grad():
        for logits in (loaded(images()).logits, heads(images())["one"].logits, traced(images())):
            torch.testing.assert_close(logits, expected)
    half = ViTForAttentiveLayerFusionClassification.from_pretrained(
        tmp_path, backbone=model.backbone, dtype=torch.bfloat16
    )
    assert half.token_standardizer.mean.dtype == torch.float32
    assert torch.equal(half.token_standardizer.mean, model.token_standardizer.mean)
    values = json.loads((tmp_path / "config.json").read_text())
    values["token_normalization"] = "l2"
    values.pop("checksums")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(LayerFusionError, match=r"unknown tensors: token_standardizer\.count"):
        ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path, backbone=model.backbone)


# ---- mixup -----------------------------------------------------------------------------------------------------


def test_mixup_by_value():
    model = model_of(mixup_alpha=0.4, class_weights=WEIGHTS).train()
    tokens, labels = batch_of(model.config)
    before = tokens.clone()
    torch.manual_seed(6)
    alpha = torch.tensor(0.4, dtype=torch.float64)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partners = torch.randperm(ROWS)
    assert 0.01 < share < 0.99
    normed = F.normalize(tokens, dim=-1)
    logits = textbook(model.head, share * normed + (1 - share) * normed[partners], torch.ones(ROWS, len(normed[0])))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    loss = share * F.cross_entropy(logits, labels, weights)
    loss += (1 - share) * F.cross_entropy(logits, labels[partners], weights)
    torch.manual_seed(6)
    found = model(layer_features=tokens, labels=labels)
    torch.testing.assert_close(found.logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=1e-9)
    assert torch.equal(tokens, before)
    with torch.no_grad():  # without training there is none
        found = model.eval()(layer_features=tokens, labels=labels).logits
        torch.testing.assert_close(found, model.head(normed), rtol=1e-9, atol=1e-9)


def test_a_step_of_the_stack_on_mixed_rows():
    config = config_of(mixup_alpha=0.4)
    stack = HeadStack([Trial(Setting())], [config], None, torch.device("cpu"), torch.float64)
    head = build_head(config).double().train()
    head.load_state_dict(stack.head_state(0))
    tokens, labels = batch_of(config)
    mixture = Draws(1, 2, torch.device("cpu")).mixture(0.4, ROWS)
    again = Draws(1, 2, torch.device("cpu")).mixture(2.0, ROWS)
    assert torch.equal(mixture.partners, again.partners)
    assert mixture.share != again.share
    mixed = mixture.share * tokens + (1 - mixture.share) * tokens[mixture.partners]
    assert torch.equal(mixture.mix_(tokens.clone()), torch.lerp(tokens, tokens[mixture.partners], 1 - mixture.share))
    logits = head(mixed)
    expected = mixture.share * F.cross_entropy(logits, labels)
    expected += (1 - mixture.share) * F.cross_entropy(logits, labels[mixture.partners])
    inputs = stack.inputs(mixed, None, Draws(1, 2, torch.device("cpu")))
    losses = stack.train_step(inputs, labels, [1e-2], 5.0, mixture)
    torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1000.0])
def test_shares_are_shares(alpha):
    for share in (Mixture.draw(alpha, 2, torch.device("cpu")).share, Draws(0, 0, "cpu").mixture(alpha, 2).share):
        assert 0 <= share <= 1


# ---- sweeps ----------------------------------------------------------------------------------------------------


def swept(features, **options):
    grid = {"learning_rate": [1e-2, 1e-3], "attention_dropout": 0.0, **options.pop("grid", {})}
    fixed = {"num_epochs": 3, "batch_size": 30, "dtype": torch.float64, "progress": False}
    return sweep(features, grid=grid, **{**fixed, **options})


@pytest.mark.parametrize(
    ("recipe", "grid", "options"),
    [
        ("alf", {"layer_dropout": [0.0, 0.3]}, {}),
        ("linear-all", {"layer_dropout": [0.0, 0.3]}, {"loss": "squared"}),
        ("scalar-mix", {"layer_dropout": [0.0, 0.3]}, {}),
        ("alf", {"mixup_alpha": [0.0, 0.2]}, {"token_normalization": "standardize", "loss": "squared"}),
    ],
)
def test_a_head_in_a_sweep_is_the_head_alone(features, recipe, grid, options):
    options = {"recipe": recipe, "refit": False, "strategy": "full", **options}
    together = swept(features, grid=grid, heads_at_once=4, **options)
    losses = set()
    for number, setting in enumerate(together.settings):
        alone = swept(features, grid=setting.to_dict(), heads_at_once=1, **options)
        curve, own = together.curves[number], alone.curves[0]
        assert curve["losses"] == pytest.approx(own["losses"], rel=1e-9)
        assert curve["scores"] == own["scores"]
        losses.add(round(curve["losses"][-1], 6))
    assert len(losses) == len(together.settings) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "squared", "token_normalization": "standardize"},
        {"loss": "squared", "recipe": "linear-all"},
        {"token_normalization": "standardize", "recipe": "scalar-mix"},
    ],
)
def test_a_sweep_trains_what_the_trainer_trains(features, options, tmp_path):
    """And what it saves is a model that gives the logits of the trained head."""
    result = swept(
        features, grid={"learning_rate": 1e-2, "weight_decay": 1e-2}, output_dir=tmp_path / "sweep", **options
    )
    model = model_of(**options)
    model.head.load_state_dict({name: value.double() for name, value in first_state(result.config, 0).items()})
    trainer = build_trainer(
        model,
        features,
        tmp_path / "trainer",
        learning_rate=1e-2,
        weight_decay=1e-2,
        num_train_epochs=3,
        batch_size=30,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer.train()
    expected = torch.from_numpy(trainer.predict(features.select_bank(model.config.bank)).predictions)
    found = ViTForAttentiveLayerFusionClassification(result.config, with_backbone=False).double().eval()
    found.load_head_state(SweepResult.load(tmp_path / "sweep").head_state())
    tokens = features.select_bank(result.config.bank).tensors()["layer_features"]
    with torch.no_grad():
        logits = found(layer_features=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())
    assert result.config.loss == options.get("loss", "cross_entropy")


def test_a_sweep_without_them_is_the_sweep_that_it_was(features):
    """Its record, and with it its identity, names none of them."""
    result = swept(features, refit=False)
    names = {"loss", "token_normalization", "mixup_alpha", "layer_dropout"}
    assert not names & {name for trial in result.trials for name in trial}
    assert not names & set(re.findall(r"\w+", json.dumps(result.protocol)))
    old = ("recipe", "learning_rate", "weight_decay", "attention_dropout", "noise_std", "noise_probability")
    assert tuple(Setting().to_dict()) == (*old, "num_queries", "num_heads", "balance_classes")
    assert Setting(mixup_alpha=0.2).to_dict()["mixup_alpha"] == 0.2
    assert expand_grid({"mixup_alpha": [0, None], "layer_dropout": [0.0], "learning_rate": 0.1}) == expand_grid(
        {"learning_rate": 0.1}
    )
    assert not names & Setting().config_options.keys()


# ---- bad values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is unknown: choose from ['cross_entropy', 'squared']"),
        ({"loss": ["squared"]}, "loss ['squared'] is unknown"),
        ({"token_normalization": "l1"}, "token_normalization 'l1' is unknown"),
        ({"layer_dropout": 1.5}, "layer_dropout=1.5 is not a probability"),
        ({"layer_dropout": float("nan")}, "layer_dropout=nan is not a probability"),
        ({"layer_dropout": "0.1"}, "layer_dropout='0.1' is not a probability"),
        ({"mixup_alpha": -1}, "mixup_alpha=-1: use 0 for no mixup"),
        ({"mixup_alpha": float("inf")}, "mixup_alpha=inf: use 0 for no mixup"),
        ({"mixup_alpha": True}, "mixup_alpha=True: use 0 for no mixup"),
        ({"mixup_alpha": [1] * 10**6}, "mixup_alpha=[1, 1, 1, 1, 1, 1, ...]"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        config_of(**options)
    name, value = next(iter(options.items()))
    if name in ("layer_dropout", "mixup_alpha") and not isinstance(value, str | list):
        with pytest.raises(LayerFusionError, match=f"^{name}="):
            Setting(**options)


@pytest.mark.parametrize("options", [{"token_normalization": "standardize"}, {"loss": "squared"}])
def test_heads_in_closed_form_have_neither(features, options):
    with pytest.raises(LayerFusionError, match="recipe 'ridge-last' does so by itself, leave it out"):
        sweep(features, recipe="ridge-last", progress=False, **options)


def test_options_of_the_command_line():
    import argparse

    from hf_layerfusion.cli import sweep as sweep_command
    from hf_layerfusion.cli import train as train_command

    given = [
        "--loss",
        "squared",
        "--token_normalization",
        "standardize",
        "--mixup_alpha",
        "0.2",
        "--layer_dropout",
        "0.1",
    ]
    expected = {"loss": "squared", "token_normalization": "standardize", "mixup_alpha": 0.2, "layer_dropout": 0.1}
    for command, needed in ((sweep_command, []), (train_command, ["--backbone", "b", "--dataset", "d"])):
        parser = argparse.ArgumentParser()
        command.add_options(parser)
        assert training_options(parser.parse_args(["--output_dir", "o", *needed, *given])) == expected
        assert training_options(parser.parse_args(["--output_dir", "o", *needed])) == {}
