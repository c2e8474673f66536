"""Heads in closed form: the least-squares solution, its place in sweeps, and `recipe="auto"`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sweep_helpers import CLASSES, LAYERS, ROWS, WIDTH, class_labels, learnable_tokens, write_features

from hf_layerfusion import LayerFusionConfig, LayerFusionError, SweepResult, sweep
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.cli.sweep import Found, describe
from hf_layerfusion.losses import LOGIT_SCALE
from hf_layerfusion.recipe_tokens import recipe_bank
from hf_layerfusion.recipes import RECIPES, find_recipe
from hf_layerfusion.sweeps import Setting, expand_grid, ridge, solve_ridge
from hf_layerfusion.sweeps.meter import Meter
from hf_layerfusion.sweeps.selection import choose_recipe, share_error
from hf_layerfusion.sweeps.settings import RIDGE_PENALTIES
from hf_layerfusion.training import build_trainer

GRID_BANK = [[layer, "block", pool] for layer in (1, 2) for pool in ("cls", "grid:2 cell 0", "grid:2 cell 1")]


def config_for(features, **options):
    options = {"num_labels": CLASSES, "problem_type": "single_label_classification", **options}
    return LayerFusionConfig(recipe="ridge-all", token_layout=features.fingerprint["token_layout"], **options)


def expected_logits(train, test, targets, weights, penalty, groups, normalize=True):
    """By scikit-learn, from tokens `(rows, N, D)`; `groups` are positions of tokens that count as one."""

    def flat(tokens):
        tokens = tokens.double().numpy()
        return (tokens / np.linalg.norm(tokens, axis=-1, keepdims=True) if normalize else tokens).reshape(
            len(tokens), -1
        )

    rows, others = flat(train), flat(test)
    share = weights / weights.sum()
    mean = share @ rows
    spread = np.sqrt(share @ (rows - mean) ** 2)
    scale = np.zeros(rows.shape[1]).reshape(train.shape[1:])
    for group in groups:
        scale[group] = 1 / np.sqrt(scale[group].size * len(groups))
    factor = scale.ravel() / spread
    model = Ridge(alpha=penalty, solver="svd").fit((rows - mean) * factor, targets, sample_weight=weights)
    return model.predict((others - mean) * factor)


@pytest.mark.parametrize("rows", [40, ROWS * 6])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("normalization", ["l2", "none"])
def test_solution_is_that_of_scikit_learn(tmp_path, rows, penalty, normalization):
    """With fewer rows than coordinates and with more, classes weighted."""
    labels = np.random.default_rng(1).integers(CLASSES, size=rows)
    tokens = learnable_tokens(labels) + 3  # an offset that centring must take away
    features = write_features(tmp_path, labels, tokens)
    config = config_for(features, token_normalization=normalization)
    features = features.select_bank(config.bank)
    class_weights = [0.5, 1.0, 2.0]
    state = solve_ridge(features, config, [1.0, penalty], class_weights)[1]
    held = next(iter(features.batches(rows)))["layer_features"]
    inputs = torch.nn.functional.normalize(held, dim=-1) if normalization == "l2" else held
    logits = inputs.flatten(1).double() @ state["classifier.weight"].double().T + state["classifier.bias"].double()
    weights = np.asarray(class_weights)[labels]
    expected = expected_logits(
        held,
        held,
        np.eye(CLASSES)[labels],
        weights / weights.mean(),
        penalty,
        [[n] for n in range(len(config.bank))],
        normalization == "l2",
    )
    np.testing.assert_allclose(logits.numpy() / LOGIT_SCALE, expected, atol=2e-5)


def test_cells_of_a_grid_count_as_one_token():
    assert list(TokenBank.from_list(GRID_BANK).groups.values()) == [[0], [1, 2], [3], [4, 5]]


def test_coordinates_that_do_not_vary_are_left_out(tmp_path):
    labels = class_labels()
    tokens = learnable_tokens(labels)
    tokens[..., -4:] = 0.25  # such as the zeros that narrow tokens are padded with
    features = write_features(tmp_path, labels, tokens)
    config = config_for(features, token_normalization="none")
    state = solve_ridge(features, config, [0.1])[0]
    weight = state["classifier.weight"].view(CLASSES, -1, WIDTH)
    assert not weight[..., -4:].any()
    assert weight[..., :-4].all()
    with pytest.raises(LayerFusionError, match="no coordinate of these tokens varies"):
        solve_ridge(write_features(tmp_path / "same", labels, torch.ones_like(tokens)), config, [0.1])


@pytest.mark.parametrize("best", [0.3, 1.0, 2.5])
def test_logit_factor_is_the_one_that_labels_are_drawn_with(best):
    logits = 3 * torch.randn(20_000, CLASSES, generator=torch.manual_seed(0))
    labels = torch.multinomial((best * logits).softmax(dim=-1), 1, generator=torch.manual_seed(1)).squeeze(1)
    assert ridge.logit_factor(logits, labels) == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("rows", [30, 3000])
def test_rows_that_are_all_right_do_not_make_a_head_sure_of_everything(rows):
    """The more of them, the surer: with n of n rows right, a head is wrong once in about n + 2 (spread over classes)."""
    labels = torch.arange(rows) % CLASSES
    factor = ridge.logit_factor(5 * torch.eye(CLASSES)[labels], labels)
    probability = (factor * 5 * torch.eye(CLASSES)[0]).softmax(dim=-1)[0]
    assert 1 - float(probability) == pytest.approx((1 - 1 / CLASSES) / (rows + 2), rel=1e-3)


def test_logits_have_the_scale_that_suits_the_validation_rows(tmp_path):
    """The predictions are those of `solve_ridge`; where labels are half noise, probabilities are no longer near 1."""
    generator = np.random.default_rng(0)
    labels = class_labels()
    noisy = np.where(generator.random(ROWS) < 0.5, generator.integers(CLASSES, size=ROWS), labels)
    scales = []
    for name, found in {"clean": labels, "noisy": noisy}.items():
        features = write_features(tmp_path / name, found, learnable_tokens(labels))
        result = sweep(features, recipe="ridge-all", grid={"ridge_penalty": 0.1}, num_folds=3, progress=False)
        scales.append(result.protocol["logit_scale"])
        expected = solve_ridge(features, result.config, [0.1], result.config.class_weights)[0]
        for key, value in result.head_state().items():
            torch.testing.assert_close(value, expected[key] * scales[-1] / LOGIT_SCALE)
    assert scales[0] > 2 * scales[1]


def test_too_large_a_system_is_refused(tmp_path, monkeypatch):
    features = write_features(tmp_path)
    monkeypatch.setattr(ridge, "MAX_SYSTEM", 50)
    with pytest.raises(LayerFusionError, match=r"75 rows of 192 coordinates: .* up to 50 .*'alf'"):
        solve_ridge(features, config_for(features), [0.1])


def test_sweep_leaves_out_what_cannot_be_solved_before_it_trains(tmp_path, monkeypatch, caplog):
    """Of a choice between recipes; asked for alone, it is refused before any training."""
    features = write_features(tmp_path)
    monkeypatch.setattr(ridge, "MAX_SYSTEM", 50)
    options = {"num_epochs": 1, "refit": False, "progress": False}
    with pytest.raises(LayerFusionError, match=r"recipe 'ridge-all': 75 rows of 192 coordinates"):
        sweep(features, recipe="ridge-all", **options)
    grid = {"learning_rate": 1e-2, "weight_decay": 0}
    result = sweep(features, recipe=["ridge-all", "ridge-last", "alf"], grid=grid, **options)
    assert {setting.recipe for setting in result.settings} == {"ridge-last", "alf"}
    assert "recipe 'ridge-all' is left out: 75 rows" in caplog.text


@pytest.mark.parametrize(
    ("labels", "options", "shift"),
    [
        (np.linspace(-1, 1, ROWS, dtype=np.float32), {"num_labels": 1, "problem_type": "regression"}, None),
        (
            (np.random.default_rng(0).random((ROWS, CLASSES)) < 0.4).astype(np.float32),
            {"problem_type": "multi_label_classification"},
            LOGIT_SCALE / 2,
        ),
    ],
)
def test_other_problems(tmp_path, labels, options, shift):
    """Regression gives values, and several labels at once logits that are 0 halfway between 0 and 1."""
    features = write_features(tmp_path, labels, learnable_tokens(class_labels()), label_names=None)
    config = config_for(features, **options)
    state = solve_ridge(features, config, [0.1])[0]
    held = next(iter(features.select_bank(config.bank).batches(ROWS)))["layer_features"]
    groups = [[n] for n in range(len(config.bank))]
    expected = expected_logits(held, held, labels.reshape(ROWS, -1), np.ones(ROWS), 0.1, groups)
    flat = torch.nn.functional.normalize(held, dim=-1).flatten(1)
    logits = (flat @ state["classifier.weight"].T + state["classifier.bias"]).numpy()
    if shift is not None:
        logits = (logits + shift) / LOGIT_SCALE
    np.testing.assert_allclose(logits, expected.reshape(ROWS, -1), atol=1e-4)


def test_grids_hold_penalties_for_heads_in_closed_form():
    settings = expand_grid("paper", ["ridge-all"])
    assert [setting.ridge_penalty for setting in settings] == list(RIDGE_PENALTIES)
    assert [s.ridge_penalty for s in expand_grid({"ridge_penalty": [0.1, "1e-2"]}, ["ridge-all"])] == [0.1, 0.01]
    mixed = expand_grid({"learning_rate": [0.1, 0.01], "ridge_penalty": [0.1, 1.0]}, ["linear-all", "ridge-all"])
    assert [(s.recipe, s.learning_rate, s.ridge_penalty) for s in mixed] == [
        ("linear-all", 0.1, None),
        ("linear-all", 0.01, None),
        ("ridge-all", 0.01, 0.1),
        ("ridge-all", 0.01, 1.0),
    ]
    with pytest.raises(LayerFusionError, match=r"ridge_penalty=0\.0 of a sweep's setting: use a positive number"):
        expand_grid({"ridge_penalty": 0}, ["ridge-all"])


def test_sweep_chooses_a_penalty_and_builds_an_ordinary_head(tmp_path):
    features = write_features(tmp_path / "features")
    folder = tmp_path / "sweep"
    result = sweep(features, recipe="ridge-all", seeds=(0, 1), output_dir=folder, progress=False, plot=False)
    assert len(result.settings) == len(RIDGE_PENALTIES)
    assert result.best_score == max(row["mean"] for row in result.summary())
    assert result.config.head_type == "linear"
    model = result.build_model()
    expected = solve_ridge(features, result.config, [result.best.ridge_penalty], result.config.class_weights)[0]
    factor = result.protocol["logit_scale"] / LOGIT_SCALE
    for name, value in model.head.state_dict().items():
        torch.testing.assert_close(value, expected[name] * factor)
    again = SweepResult.load(folder)
    assert again.best == result.best
    assert again.trials == result.trials
    assert "ridge_penalty=" in repr(again)
    assert sweep(features, recipe="ridge-all", seeds=(0, 1), output_dir=folder, progress=False).trials == result.trials


@pytest.mark.parametrize("recipe", ["ridge-all", ["ridge-all", "ridge-last"], "auto"])
def test_figures(tmp_path, recipe, caplog):
    features = write_features(tmp_path / "features")
    sweep(
        features, recipe=recipe, grid={"learning_rate": [0.1, 0.01]}, num_epochs=2, output_dir=tmp_path, progress=False
    )
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert "is not written" not in caplog.text


def test_validation_rows_are_not_solved_for(tmp_path):
    """Labels of the validation rows make no difference to the scores' heads, only to the scores."""
    labels = np.random.default_rng(0).integers(CLASSES, size=ROWS)  # nothing to learn but by heart
    features = write_features(tmp_path, labels, torch.randn(ROWS, 14, WIDTH, generator=torch.manual_seed(0)))
    result = sweep(features, recipe="ridge-all", grid={"ridge_penalty": 1e-4}, progress=False)
    assert result.best_score < 0.7


def test_auto_stands_for_its_candidates(tmp_path):
    features = write_features(tmp_path)
    candidates = RECIPES["auto"].candidates
    result = sweep(features, recipe="auto", grid="fast", num_epochs=2, progress=False)
    assert {setting.recipe for setting in result.settings} == set(candidates)
    assert result.best.recipe in candidates
    assert result.build_model().config.recipe == result.best.recipe
    layout = LayerFusionConfig().layout
    assert set(recipe_bank("auto", layout).coordinates) == {
        coordinate for name in candidates for coordinate in recipe_bank(name, layout).coordinates
    }
    with pytest.raises(LayerFusionError, match="recipe 'auto' chooses among ridge-grid, ridge-all, alf-top, alf"):
        LayerFusionConfig(recipe="auto")


@pytest.mark.parametrize(
    ("scores", "error", "expected"),
    [
        ({"ridge-grid": 0.80, "ridge-all": 0.81, "alf": 0.82}, 0.0, "alf"),
        ({"ridge-grid": 0.80, "ridge-all": 0.81, "alf": 0.82}, 0.01, "ridge-all"),
        ({"ridge-grid": 0.80, "ridge-all": 0.81, "alf": 0.82}, 0.02, "ridge-grid"),
        ({"ridge-grid": math.nan, "ridge-all": 0.81, "alf": 0.82}, 0.5, "ridge-all"),
        ({"linear-all": 0.82, "alf": 0.60}, 0.1, "linear-all"),  # which is not among the preferred, but far better
    ],
)
def test_of_recipes_that_are_hard_to_tell_apart_the_first_is_chosen(scores, error, expected):
    by_setting = {Setting(recipe=name, learning_rate=0.1, weight_decay=0.0): [score] for name, score in scores.items()}
    worse = {replace(setting, weight_decay=1.0): [score - 1e-3] for setting, (score,) in by_setting.items()}
    chosen = choose_recipe({**worse, **by_setting}, RECIPES["auto"].candidates, error + 1e-9)
    assert (chosen.recipe, chosen.weight_decay) == (expected, 0.0)


@pytest.mark.parametrize(("share", "rows", "expected"), [(0.5, 100, 0.05), (0.9, 400, 0.015), (1 + 2e-16, 9, 0.0)])
def test_error_of_a_share(share, rows, expected):
    assert share_error(share, rows) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("rows", [60, 600])
def test_auto_takes_attention_only_where_it_is_ahead_for_sure(tmp_path, monkeypatch, rows):
    """The same scores from few rows and from many: of least squares 0.80, of attention 0.84."""
    labels = np.arange(rows) % CLASSES
    features = write_features(tmp_path, labels, torch.randn(rows, 14, WIDTH, generator=torch.manual_seed(0)))
    monkeypatch.setattr(
        Meter, "scores", lambda self: [0.84 if self.config.recipe == "alf" else 0.80] * len(self.is_finite)
    )
    result = sweep(features, recipe="auto", grid="fast", num_epochs=1, num_folds=5, progress=False)
    error = math.sqrt(0.84 * 0.16 / rows)
    assert result.protocol["standard_error"] == pytest.approx(error)
    expected, score = ("alf", 0.84) if rows == 600 else ("ridge-grid", 0.80)
    assert result.best.recipe == result.summary()[0]["recipe"] == result.build_model().config.recipe == expected
    assert result.best_score == pytest.approx(score)
    result.save(tmp_path / "sweep", plot=False)
    assert SweepResult.load(tmp_path / "sweep").summary()[0]["recipe"] == expected
    named = sweep(features, recipe=RECIPES["auto"].candidates, grid="fast", num_epochs=1, num_folds=5, progress=False)
    assert named.best.recipe == "alf"  # who names recipes compares them
    notes = [line for line in describe(Found(result, 1.0)).splitlines() if line.startswith("note: ")]
    assert notes == (
        []
        if rows == 600
        else [
            f"note: alf scored higher by less than the standard error ({error:.3f}), so ridge-grid, which comes before it "
            "in auto, is taken"
        ]
    )


def test_budget_leaves_out_what_takes_more(tmp_path):
    features = write_features(tmp_path)
    size = 2 * LAYERS * WIDTH * 4
    options = {"grid": {"learning_rate": 0.01}, "num_epochs": 1, "refit": False, "progress": False}
    recipes = ["linear-all", "linear-last", "ridge-last"]
    chosen = sweep(features, recipe=recipes, max_bytes_per_image=size - 1, **options)
    assert {setting.recipe for setting in chosen.settings} == {"linear-last", "ridge-last"}
    assert {s.recipe for s in sweep(features, recipe=recipes, max_bytes_per_image=size, **options).settings} == {
        *recipes
    }
    with pytest.raises(
        LayerFusionError, match=r"max_bytes_per_image=63 leaves no recipe; .* linear-last 64, ridge-last 64"
    ):
        sweep(features, recipe=recipes, max_bytes_per_image=63, **options)
    with pytest.raises(LayerFusionError, match="max_bytes_per_image=0: use a whole number from 1 up"):
        sweep(features, recipe=recipes, max_bytes_per_image=0, **options)


def test_steps_are_refused(tmp_path):
    features = write_features(tmp_path / "features")
    model = sweep(features, recipe="ridge-all", progress=False).build_model()
    trainer = build_trainer(model, features, tmp_path / "out", use_cpu=True)
    with pytest.raises(LayerFusionError, match="'ridge-all' is solved in closed form"):
        trainer.train()


@pytest.mark.parametrize(("name", "size"), [("ridge-grid", 4), ("ridge-grid:2", 2), ("alf-grid:3", 3)])
def test_banks_with_grids(name, size):
    """Cells at four equally spaced layers beside CLS and means of all; none where a backbone's tokens form no grid."""
    config = LayerFusionConfig(recipe=name)
    assert len(config.bank) == 24 + 4 * size**2
    assert {c.layer for c in config.bank.coordinates if "cell" in c.pool} == {3, 6, 9, 12}
    layout = {**config.token_layout, "grids": [None] * 13}
    assert config.bank.pools[:2] == LayerFusionConfig(recipe=name, token_layout=layout).bank.pools == ["cls", "mean"]
    assert find_recipe(name).pools[-1] == f"grid:{size}@spaced:4"
