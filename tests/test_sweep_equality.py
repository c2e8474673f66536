"""A head in a sweep is the head that a plain loop trains, and the one that `Trainer` trains."""

import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.nn import functional as F

from hf_layerfusion import LayerFeatures, LayerFusionConfig, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.features.manifest import Manifest
from hf_layerfusion.heads import build_head
from hf_layerfusion.layout import TokenLayout
from hf_layerfusion.sweeps import Setting, sweep
from hf_layerfusion.sweeps.engine import Engine, Protocol, Rows
from hf_layerfusion.sweeps.stack import Trial, first_state
from hf_layerfusion.training import build_trainer, class_weights

WIDTH, LAYERS, CLASSES, ROWS = 24, 4, 5, 90
LAYOUT = TokenLayout.of_plain_vit(WIDTH, LAYERS).to_dict()
NAMES = [f"class {number}" for number in range(CLASSES)]
# Without a true gradient, only rounding moves them: `norm_k`'s bias cancels in the softmax, the other two in front of a
# training-mode BatchNorm (`norm_v`'s if no attention is dropped), whose running mean follows them. The logits do not.
STILL = ("norm_k.bias", "norm_v.bias", "out_proj.bias", "batch_norm.running_mean")


def make_features(dtype="float32", seed=0, rows=ROWS):
    """Rows whose class can be told from their tokens, unbalanced, as a cache in memory."""
    generator = np.random.default_rng(seed)
    bank = TokenBank.build(range(1, LAYERS + 1), ["block"], ["cls", "mean"], TokenLayout(**LAYOUT))
    labels = generator.choice(CLASSES, size=rows, p=[0.3, 0.3, 0.2, 0.1, 0.1])
    centres = generator.normal(size=(CLASSES, len(bank), WIDTH))
    tokens = (2 * generator.normal(size=(rows, len(bank), WIDTH)) + centres[labels]).astype(dtype)
    columns = {"layer_features": List(Value(dtype), length=len(bank) * WIDTH), "label": ClassLabel(names=NAMES)}
    dataset = Dataset.from_dict(
        {"layer_features": list(tokens.reshape(rows, -1)), "label": labels.tolist()}, features=Features(columns)
    )
    manifest = Manifest(
        bank=bank.to_list(),
        hidden_size=WIDTH,
        dtype=dtype,
        num_rows=rows,
        rows_per_shard=rows,
        label_names=NAMES,
        ingredients={"token_layout": LAYOUT, "backbone": {"digest": None}},
    )
    return LayerFeatures(dataset, manifest)


def settings_of(rates, decays=(1e-4, 1e-1), dropouts=(0.0,), **fields):
    return [
        Setting(learning_rate=rate, weight_decay=decay, attention_dropout=dropout, **fields)
        for rate in rates
        for decay in decays
        for dropout in dropouts
    ]


def config_of(setting, **options):
    return LayerFusionConfig(
        token_layout=LAYOUT,
        id2label=dict(enumerate(NAMES)),
        problem_type="single_label_classification",
        **setting.config_options,
        **options,
    )


def run_engine(
    features, settings, *, seeds=(0,), heads_at_once, epochs, batch_size=25, dtype=torch.float64, **options
):
    rows = [Rows(features, features, class_weights(features.labels, CLASSES))]
    protocol = Protocol(num_epochs=epochs, batch_size=batch_size, heads_at_once=heads_at_once, dtype=dtype)
    engine = Engine(
        [Trial(setting, seed) for setting in settings for seed in seeds],
        {setting: config_of(setting, **options) for setting in settings},
        rows,
        protocol,
        keep_states=True,
        progress=False,
    )
    engine.run()
    return engine


def train_plainly(features, setting, *, epochs, batch_size=25, seed=0, max_steps=None):
    """The textbook head in float64, `torch.optim.AdamW`, a loop: the reference's training, without noise and dropout."""
    from accelerate.data_loader import SeedableRandomSampler

    config = config_of(setting)
    config.head_implementation = "explicit"
    head = build_head(config).double().train()
    head.load_state_dict(first_state(config, seed))
    batch = features.tensors()
    tokens, labels = F.normalize(batch["layer_features"].double(), dim=-1), batch["labels"]
    weights = torch.tensor(class_weights(features.labels, CLASSES), dtype=torch.float64)
    optimizer = torch.optim.AdamW(head.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay)
    steps = math.ceil(len(features) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps, eta_min=1e-6)
    done = 0
    for epoch in range(epochs):
        sampler = SeedableRandomSampler(range(len(features)), data_seed=seed, generator=torch.Generator())
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), batch_size):
            if done == max_steps:
                return head.state_dict()
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            F.cross_entropy(head(tokens[rows]), labels[rows], weights).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            done += 1
    return head.state_dict()


def logits_of(setting, state):
    """On other rows than those trained on."""
    head = build_head(config_of(setting)).double().eval()
    head.load_state_dict(state)
    batch = make_features(seed=9).select_bank(config_of(setting).bank).tensors()
    with torch.no_grad():
        return head(F.normalize(batch["layer_features"].double(), dim=-1))


def largest_difference(setting, state, other):
    """Of all parameters and buffers, and of the logits, relative to the scale of each."""
    assert state.keys() == other.keys()
    pairs = [(state[name], other[name]) for name in state if name not in STILL and state[name].is_floating_point()]
    pairs.append((logits_of(setting, state), logits_of(setting, other)))
    return max(((one - two).abs().max() / two.abs().max().clamp_min(1e-12)).item() for one, two in pairs)


@pytest.mark.parametrize("heads_at_once", [1, 4])
def test_stacked_heads_equal_a_plain_loop(heads_at_once):
    """52 steps in float64 at the two smaller learning rates of the paper."""
    features = make_features()
    settings = settings_of((1e-2, 1e-3))
    engine = run_engine(features, settings, heads_at_once=heads_at_once, epochs=13)
    for setting in settings:
        plain = train_plainly(features, setting, epochs=13)
        start = first_state(config_of(setting), 0)
        trained = engine.states[Trial(setting)]
        assert largest_difference(setting, trained, plain) < 1e-9
        assert largest_difference(setting, start, plain) > 0.1, "nothing was trained"


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_the_largest_learning_rate_for_five_steps(heads_at_once):
    """Later it is chaotic: rounding alone parts two runs."""
    features = make_features()
    settings = settings_of((1e-1,))
    rows = [Rows(features, None, class_weights(features.labels, CLASSES))]
    protocol = Protocol(num_epochs=50, stop_after=5, batch_size=ROWS, heads_at_once=heads_at_once, dtype=torch.float64)
    engine = Engine(
        [Trial(setting) for setting in settings],
        {setting: config_of(setting) for setting in settings},
        rows,
        protocol,
        keep_states=True,
        progress=False,
    )
    engine.run()
    for setting in settings:
        plain = train_plainly(features, setting, epochs=50, batch_size=ROWS, max_steps=5)
        assert largest_difference(setting, engine.states[Trial(setting)], plain) < 1e-9


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"decays": (1e-1,), "dropouts": (0.0, 0.3)}, id="dropout"),
        pytest.param({"noise_std": 0.05}, id="noise"),
        pytest.param({"num_queries": 3, "decays": (1e-1,), "dropouts": (0.0, 0.3)}, id="three queries"),
        pytest.param({"num_heads": 2}, id="two heads, folded"),
        pytest.param({"balance_classes": False}, id="no class weights"),
        pytest.param({"recipe": "linear-all"}, id="linear"),
        pytest.param({"recipe": "scalar-mix"}, id="scalar mix"),
    ],
)
def test_a_head_in_a_stack_is_the_head_alone(fields):
    features = make_features()
    settings = settings_of((1e-2, 1e-3), **fields)
    together = run_engine(features, settings, heads_at_once=len(settings), epochs=13)
    for setting in settings:
        alone = run_engine(features, [setting], heads_at_once=1, epochs=13)
        assert largest_difference(setting, together.states[Trial(setting)], alone.states[Trial(setting)]) < 1e-9
        assert together.runs[Trial(setting)].scores == alone.runs[Trial(setting)].scores
        assert together.runs[Trial(setting)].losses == pytest.approx(alone.runs[Trial(setting)].losses, rel=1e-9)


def test_projection_dropout_in_a_stack():
    features = make_features()
    settings = settings_of((1e-2, 1e-3))
    options = {"projection_dropout": 0.4, "epochs": 5}
    together = run_engine(features, settings, heads_at_once=4, **options)
    without = run_engine(features, settings, heads_at_once=4, epochs=5)
    for setting in settings:
        alone = run_engine(features, [setting], heads_at_once=1, **options)
        assert largest_difference(setting, together.states[Trial(setting)], alone.states[Trial(setting)]) < 1e-9
        assert largest_difference(setting, together.states[Trial(setting)], without.states[Trial(setting)]) > 1e-3


def test_banks_and_seeds_in_one_sweep_do_not_disturb_each_other():
    features = make_features()
    settings = [
        *settings_of((1e-2,), recipe="alf"),
        *settings_of((1e-2,), recipe="alf-mid-last", noise_std=0.05, dropouts=(0.2,)),
        *settings_of((1e-2,), recipe="linear-all"),
    ]
    together = run_engine(features, settings, seeds=(0, 7), heads_at_once=3, epochs=4)
    assert len(together.bank) == 2 * LAYERS
    for setting in settings:
        for seed in (0, 7):
            alone = run_engine(features, [setting], seeds=(seed,), heads_at_once=1, epochs=4)
            trial = Trial(setting, seed)
            assert largest_difference(setting, together.states[trial], alone.states[trial]) < 1e-9


def test_different_seeds_give_different_heads():
    engine = run_engine(make_features(), settings_of((1e-2,), decays=(1e-4,)), seeds=(0, 1), heads_at_once=1, epochs=2)
    first, second = engine.states.values()
    assert largest_difference(next(iter(engine.configs)), first, second) > 1e-2


@pytest.mark.parametrize("recipe", ["alf", "alf-mid-last", "linear-all", "scalar-mix"])
def test_a_setting_of_a_sweep_equals_the_trainer(recipe, tmp_path):
    """60 steps with class weights and clipping: in float64 to 1e-9 of the logits' scale."""
    features = make_features(rows=120)
    setting = Setting(recipe=recipe, learning_rate=1e-2, weight_decay=1e-2, attention_dropout=0.0)
    options = {"num_epochs": 20, "batch_size": 50, "dtype": torch.float64, "progress": False}
    result = sweep(features, grid=setting.to_dict(), seeds=[3], **options)
    config = config_of(setting)
    config.attention_dropout = 0.0
    model = ViTForAttentiveLayerFusionClassification(config, with_backbone=False)
    model.head.double().load_state_dict(first_state(config, 3))
    trainer = build_trainer(
        model,
        features,
        tmp_path,
        learning_rate=1e-2,
        weight_decay=1e-2,
        num_train_epochs=20,
        batch_size=50,
        seed=3,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer.train()
    from_trainer = torch.from_numpy(trainer.predict(features.select_bank(config.bank)).predictions)
    head = build_head(config).double().eval()
    head.load_state_dict(result.head_state(3))
    tokens = F.normalize(features.select_bank(config.bank).tensors()["layer_features"].double(), dim=-1)
    with torch.no_grad():
        from_sweep = head(tokens)
    assert from_sweep.abs().max() > 1
    torch.testing.assert_close(from_sweep, from_trainer, rtol=0, atol=1e-9 * from_trainer.abs().max().item())


def test_a_sweep_and_solo_runs_choose_the_same_setting():
    features = make_features(rows=200)
    grid = {"learning_rate": [1e-2, 1e-3], "weight_decay": [1e-4, 1e-1], "attention_dropout": [0.0, 0.3]}
    options = {"num_epochs": 8, "batch_size": 40, "refit": False, "progress": False, "dtype": torch.float64}
    whole = sweep(features, grid=grid, strategy="full", heads_at_once=8, **options)
    scores = {}
    for row in whole.trials:
        setting = Setting(**{name: row[name] for name in whole.best.to_dict()})
        alone = sweep(features, grid=setting.to_dict(), strategy="full", **options)
        assert alone.trials[0]["score"] == row["score"]
        scores[setting] = row["score"]
    assert len(scores) == 8
    assert len(set(scores.values())) > 1, "all settings are alike, so the choice shows nothing"
    assert scores[whole.best] == max(scores.values())
