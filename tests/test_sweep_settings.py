"""What a sweep varies: grids in all their forms, settings that are the same run, the choice, and the split."""

import json
import math

import numpy as np
import pytest

from hf_layerfusion import LayerFusionError
from hf_layerfusion.configuration_layer_fusion import ATTENDING_HEADS
from hf_layerfusion.recipes import RECIPES
from hf_layerfusion.sweeps import GRIDS, Setting, expand_grid
from hf_layerfusion.sweeps.engine import learning_rate_at
from hf_layerfusion.sweeps.selection import choose, split_rows, spread
from hf_layerfusion.sweeps.settings import FIELDS, LATER_FIELDS, merge_settings

RATES, DECAYS, DROPOUTS = [0.1, 0.01, 0.001], [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0], [0.0, 0.1, 0.3]
STEPPED = [name for name, recipe in RECIPES.items() if recipe.kind == "head" and recipe.solver == "steps"]
PAPER = [
    Setting(learning_rate=rate, weight_decay=decay, attention_dropout=dropout, noise_std=0.05)
    for rate in RATES
    for decay in DECAYS
    for dropout in DROPOUTS
]


# ---- grids -------------------------------------------------------------------------------------------------------


def test_paper_is_the_reference_grid_in_its_order():
    assert expand_grid("paper") == PAPER
    assert len(PAPER) == 63


def test_fast():
    settings = expand_grid("fast")
    assert len(settings) == len(set(settings)) == 12
    assert {setting.noise_std for setting in settings} == {0.0}


@pytest.mark.parametrize("head", ["linear", "scalar_mix"])
def test_a_head_without_attention_has_no_dropout_to_vary(head):
    for recipe in (name for name in STEPPED if RECIPES[name].head_type == head):
        settings = expand_grid({**GRIDS["paper"], "num_queries": [1, 2], "num_heads": [None, 2]}, [recipe])
        assert [(s.learning_rate, s.weight_decay) for s in settings] == [(r, d) for r in RATES for d in DECAYS]
        assert {(s.attention_dropout, s.num_queries, s.num_heads) for s in settings} == {(None, 1, None)}


def test_several_recipes_one_after_another():
    settings = expand_grid("paper", ["linear-last", "alf-paper"])
    assert [s.recipe for s in settings] == ["linear-last"] * 21 + ["alf-paper"] * 63
    assert expand_grid("paper", ("alf", "alf")) == PAPER


def test_a_recipe_in_the_grid_wins():
    assert [s.recipe for s in expand_grid({"recipe": "linear-all"}, ["alf"])] == ["linear-all"]


@pytest.mark.parametrize("recipe", STEPPED)
def test_what_the_grid_leaves_out_is_the_recipes(recipe):
    (setting,) = expand_grid({}, [recipe])
    values = RECIPES[recipe]
    assert (setting.learning_rate, setting.weight_decay) == (values.learning_rate, values.weight_decay)
    dropout = values.head_options.get("attention_dropout", 0.0) if values.head_type in ATTENDING_HEADS else None
    assert setting.attention_dropout == dropout
    noise = (values.head_options.get("noise_std", 0.0), values.head_options.get("noise_probability", 0.5))
    assert (setting.noise_std, setting.noise_probability) == noise


@pytest.mark.parametrize(("recipe", "tool"), [("knn-last", "fit_estimator"), ("fine-tune", "fine_tune")])
def test_what_is_no_head_is_not_swept(recipe, tool):
    with pytest.raises(LayerFusionError, match=f"recipe '{recipe}' is no head, so it cannot be swept: use {tool}"):
        expand_grid("fast", [recipe])


ONE = {"learning_rate": 0.01, "weight_decay": 0.1, "attention_dropout": 0.0}


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({"learning_rate": 0.01, "weight_decay": 0.1, "attention_dropout": 0}, [ONE]),
        ({**ONE, "num_queries": (1, 4)}, [{**ONE, "num_queries": 1}, {**ONE, "num_queries": 4}]),
        ({**ONE, "num_queries": range(1, 3)}, [{**ONE, "num_queries": 1}, {**ONE, "num_queries": 2}]),
        ({**ONE, "weight_decay": np.logspace(-2, 0, 2)}, [{**ONE, "weight_decay": w} for w in (0.01, 1.0)]),
        ({**ONE, "learning_rate": [np.float32(0.5)]}, [{**ONE, "learning_rate": 0.5}]),
        ({**ONE, "num_heads": np.int64(2)}, [{**ONE, "num_heads": 2}]),
        ([ONE, {**ONE, "weight_decay": [1, 0.1]}], [ONE, {**ONE, "weight_decay": 1.0}]),
        ({**ONE, "attention_dropout": [None, 0.3, 0.1]}, [{**ONE, "attention_dropout": d} for d in (0.3, 0.1)]),
        ({**ONE, "noise_std": 0, "noise_probability": [0.1, 0.9]}, [ONE]),
        ({**ONE, "noise_std": [0.05, 0.1], "noise_probability": 0}, [ONE]),
        (
            {**ONE, "noise_std": 0.1, "noise_probability": [0.1, 0.9]},
            [{**ONE, "noise_std": 0.1, "noise_probability": p} for p in (0.1, 0.9)],
        ),
        ({**ONE, "balance_classes": [True, False]}, [{**ONE, "balance_classes": b} for b in (True, False)]),
        ({**ONE, "learning_rate": ["1e-2", "0.01"]}, [ONE]),
    ],
    ids=lambda value: "" if isinstance(value, list) and value[0] is not ONE else str(value)[:60],
)
def test_values_of_all_kinds(grid, expected):
    settings = expand_grid(grid)
    assert settings == [Setting(**values) for values in expected]
    json.dumps([setting.to_dict() for setting in settings])
    for setting in settings:
        assert all(type(getattr(setting, name)) is float for name in ("learning_rate", "weight_decay", "noise_std"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("grid.yaml", "learning_rate: [1e-1, 1.0e-2]\nweight_decay: 1e-3\nattention_dropout: [0, .3]\n"),
        (
            "grid.yml",
            "# both\n- {learning_rate: 1e-1, weight_decay: 1E-3, attention_dropout: [0, '0.3']}\n"
            "- {learning_rate: 1e-2, weight_decay: 0.001, attention_dropout: [0, 3e-1]}\n",
        ),
        ("grid.txt", "\ufefflearning_rate: [0.1, 0.01]\nweight_decay: 1e-3\nattention_dropout:\n- 0.0\n- 0.3\n"),
        ("grid.json", '{"learning_rate": [1e-1, 1e-2], "weight_decay": 1e-3,\n\t"attention_dropout": [0, 0.3]}'),
        ("json.yaml", '{"learning_rate": [1e-1, 1e-2], "weight_decay": 1e-3, "attention_dropout": [0, 0.3]}'),
    ],
)
def test_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [
        Setting(learning_rate=rate, weight_decay=1e-3, attention_dropout=dropout)
        for rate in (0.1, 0.01)
        for dropout in (0.0, 0.3)
    ]
    assert expand_grid(tmp_path / name) == expand_grid(str(tmp_path / name)) == expected


def test_a_written_grid_is_the_grid(tmp_path):
    (tmp_path / "paper.json").write_text(json.dumps(GRIDS["paper"]))
    (tmp_path / "settings.json").write_text(json.dumps([setting.to_dict() for setting in PAPER]))
    assert expand_grid(tmp_path / "paper.json") == expand_grid(tmp_path / "settings.json") == PAPER


NUMBER = "of a sweep's setting: use 0 or a positive number"
SHAPE = "a grid is a mapping from fields to values, or a list of them, but this is "


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("papr", "grid 'papr' is neither paper nor fast nor a file"),
        ({"lr": 1}, "'lr' is no field of a sweep's grid: choose from recipe, learning_rate, "),
        ({1: 2}, "'1' is no field"),
        ({"learning_rate": []}, "the grid names no value for 'learning_rate': give one or leave it out"),
        ([], "the grid holds no setting: give at least one"),
        (None, f"{SHAPE}None"),
        (3, f"{SHAPE}3"),
        ([ONE, "alf"], SHAPE),
        ([[ONE]], SHAPE),
        ({"recipe": "alff"}, "recipe 'alff' is unknown: choose from linear-last, "),
        ({"recipe": [["alf"]]}, r"recipe ['alf'] is unknown"),
        ({"recipe": None}, "recipe None is unknown"),
        ({"recipe": True}, "recipe True is unknown"),
        ({"learning_rate": True}, f"learning_rate=True {NUMBER}"),
        ({"learning_rate": "fast"}, f"learning_rate='fast' {NUMBER}"),
        ({"learning_rate": [[0.1]]}, f"learning_rate=[0.1] {NUMBER}"),
        ({"learning_rate": {"from": 0.1}}, f"learning_rate={{'from': 0.1}} {NUMBER}"),
        ({"learning_rate": -0.1}, f"learning_rate=-0.1 {NUMBER}"),
        ({"learning_rate": math.nan}, f"learning_rate=nan {NUMBER}"),
        ({"learning_rate": "NaN"}, f"learning_rate=nan {NUMBER}"),
        ({"learning_rate": math.inf}, f"learning_rate=inf {NUMBER}"),
        ({"learning_rate": None}, f"learning_rate=None {NUMBER}"),
        ({"learning_rate": 0}, "learning_rate=0 of a sweep's setting trains nothing: use a positive number"),
        ({"learning_rate": 10**400}, "learning_rate=1000"),
        ({"weight_decay": [0.1, -1]}, f"weight_decay=-1.0 {NUMBER}"),
        ({"weight_decay": False}, f"weight_decay=False {NUMBER}"),
        ({"noise_std": -1}, f"noise_std=-1.0 {NUMBER}"),
        ({"noise_std": [None]}, f"noise_std=None {NUMBER}"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5 of a sweep's setting is no probability: use 0 to 1"),
        ({"attention_dropout": True}, "attention_dropout=True of a sweep's setting is no probability"),
        ({"noise_probability": None}, "noise_probability=None of a sweep's setting is no probability"),
        ({"noise_probability": -0.1}, "noise_probability=-0.1 of a sweep's setting is no probability"),
        ({"num_queries": 0}, "num_queries=0 of a sweep's setting: use a whole number from 1 up"),
        ({"num_queries": None}, "num_queries=None of a sweep's setting: use a whole number"),
        ({"num_queries": 1.0}, "num_queries=1.0 of a sweep's setting: use a whole number"),
        ({"num_queries": True}, "num_queries=True of a sweep's setting: use a whole number"),
        ({"num_heads": "2"}, "num_heads='2' of a sweep's setting: use a whole number from 1 up"),
        ({"balance_classes": 1}, "balance_classes=1 of a sweep's setting: use true or false"),
        ({"balance_classes": "yes"}, "balance_classes='yes' of a sweep's setting: use true or false"),
    ],
    ids=lambda value: "" if isinstance(value, str) and " " in value else str(value)[:40],
)
def test_grids_that_cannot_be_meant(grid, message):
    with pytest.raises(LayerFusionError) as caught:
        expand_grid(grid)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600  # the names of all recipes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.yaml", b"", f"{SHAPE}None"),
        ("scalar.yaml", b"paper", f"{SHAPE}'paper'"),
        ("empty-list.yaml", b"[]", "the grid holds no setting"),
        ("binary.yaml", bytes(range(256)) * 4, "is no YAML file: 'utf-8' codec can't decode"),
        ("zeros.yaml", bytes(64), "is no YAML file: unacceptable character #x0000"),
        ("broken.yaml", b"learning_rate: [1, 2", "is no YAML file: while parsing a flow sequence"),
        ("code.yaml", b"!!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("date.yaml", b"learning_rate: 2024-13-45", "is no YAML file: month must be in 1..12"),
        ("day.yaml", b"learning_rate: 2024-12-24", "learning_rate=datetime.date(2024, 12, 24) of a sweep's setting"),
        ("deep.yaml", b"[" * 500, "is no YAML file: "),
        ("cycle.yaml", b"&a [*a]", SHAPE),
        ("cyclic-value.yaml", b"learning_rate: &a [*a]", "learning_rate=[[["),
        (
            "laughs.yaml",
            b"a0: &a0 [x]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)),
            "'a0' is no field of a sweep's grid",
        ),
        ("digits.yaml", b"learning_rate: " + b"9" * 5000, "is no YAML file: Exceeds the limit"),
        ("hexadecimal.yaml", b"learning_rate: 0x" + b"f" * 20000, "learning_rate=a number of thousands of digits"),
        ("true.yaml", b"learning_rate: yes", "learning_rate=True of a sweep's setting"),
        ("broken.json", b'{"learning_rate": 1', "is no JSON file: "),
        ("binary.json", b"\xff\xfe\x00", "is no JSON file: "),
        ("deep.json", b"[" * 200_000, "is no JSON file: "),
        ("nan.json", b'{"learning_rate": NaN}', "learning_rate=nan of a sweep's setting"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:20] else "",
)
def test_files_that_hold_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LayerFusionError) as caught:
        expand_grid(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [(".", "is neither paper nor fast nor a file"), ("x" * 300, "cannot be read: File name too long")],
    ids=["folder", "name"],
)
def test_paths_that_are_no_file(tmp_path, path, message):
    with pytest.raises(LayerFusionError, match=message):
        expand_grid(tmp_path / path)


def test_a_setting_is_what_its_config_says():
    setting = Setting(recipe="alf-paper", attention_dropout=0.1, noise_std=0.05, num_queries=2)
    assert setting.config_options == {
        **{"recipe": "alf-paper", "attention_dropout": 0.1, "noise_std": 0.05, "noise_probability": 0.5},
        "num_queries": 2,
    }
    assert Setting(**setting.to_dict()) == setting
    assert tuple(setting.to_dict()) == tuple(name for name in FIELDS if name not in LATER_FIELDS)


# ---- settings that are the same run ------------------------------------------------------------------------------


def all_rates(steps, rate):
    return np.array([learning_rate_at(step, steps, rate) for step in range(steps)])


def merged(settings, steps):
    return merge_settings(settings, {s.learning_rate: all_rates(steps, s.learning_rate).sum() for s in settings})


@pytest.mark.parametrize(("steps", "distinct"), [(1000, 36), (80, 27), (1, 12)])
def test_distinct_settings_of_the_paper(steps, distinct):
    assert len(set(merged(PAPER, steps))) == distinct


@pytest.mark.parametrize("steps", [1, 7, 80, 1000, 4000])
def test_members_shrink_as_their_representative(steps):
    trained_as = merged(PAPER, steps)
    for position, representative in enumerate(trained_as):
        ours, theirs = PAPER[position], PAPER[representative]
        assert trained_as[representative] == representative
        assert theirs.weight_decay >= ours.weight_decay
        assert (ours.learning_rate, ours.attention_dropout) == (theirs.learning_rate, theirs.attention_dropout)
        rates = all_rates(steps, ours.learning_rate)
        factors = [np.prod(1 - rates * setting.weight_decay) for setting in (ours, theirs)]
        assert factors[0] >= factors[1] > factors[0] * 0.99


@pytest.mark.parametrize("steps", [7, 80, 1000, 4000])
def test_merging_equals_brute_force(steps):
    """From the strongest decay down, a setting joins the last one kept if the weights shrink as much to 1 %."""
    expected = {}
    for rate in RATES:
        rates, kept = all_rates(steps, rate), None
        for decay in sorted(DECAYS, reverse=True):
            shrinkage = np.log1p(-rates * decay).sum()
            if kept is None or shrinkage - kept[1] > 0.01:
                kept = (decay, shrinkage)
            expected[rate, decay] = kept[0]
    trained_as = merged(PAPER, steps)
    found = {(s.learning_rate, s.weight_decay): PAPER[n].weight_decay for s, n in zip(PAPER, trained_as, strict=True)}
    assert found == expected


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.02},
        {"recipe": "alf-paper"},
        {"attention_dropout": 0.2},
        {"noise_std": 0.02},
        {"noise_std": 0.01, "noise_probability": 0.6},
        {"num_queries": 2},
        {"num_heads": 2},
        {"balance_classes": False},
    ],
    ids=str,
)
def test_settings_that_differ_otherwise_are_different_runs(other):
    common = {"learning_rate": 0.01, "attention_dropout": 0.1, "noise_std": 0.01}
    settings = [Setting(**{**common, **more, "weight_decay": decay}) for more in ({}, other) for decay in (1e-6, 1e-5)]
    assert merged(settings, 100) == [1, 1, 3, 3]


def test_merging_does_not_depend_on_the_order():
    order = np.random.default_rng(0).permutation(len(PAPER))
    shuffled = merged([PAPER[number] for number in order], 1000)
    assert {PAPER[order[n]]: PAPER[order[to]] for n, to in enumerate(shuffled)} == {
        PAPER[n]: PAPER[to] for n, to in enumerate(merged(PAPER, 1000))
    }


# ---- choice ------------------------------------------------------------------------------------------------------

BASE = {"learning_rate": 0.01, "weight_decay": 0.01, "attention_dropout": 0.1, "noise_std": 0.1}


@pytest.mark.parametrize(
    ("stronger", "weaker"),
    [
        ({"weight_decay": 0.1, "attention_dropout": 0.0, "noise_std": 0.0, "learning_rate": 0.1}, {}),
        ({"attention_dropout": 0.3, "noise_std": 0.0, "learning_rate": 0.1}, {}),
        ({"noise_std": 0.2, "noise_probability": 0.1, "learning_rate": 0.1}, {}),
        ({"noise_probability": 0.9, "learning_rate": 0.1}, {}),
        ({"learning_rate": 0.001}, {}),
        ({}, {"recipe": "linear-all", "attention_dropout": None}),
    ],
    ids=["decay", "dropout", "noise", "noise probability", "learning rate", "no attention"],
)
def test_ties_go_to_the_stronger_regularisation(stronger, weaker):
    first, second = Setting(**{**BASE, **stronger}), Setting(**{**BASE, **weaker})
    # 0.1 + 0.2 is not 0.3 to a computer.
    for scores in ({first: [0.1, 0.2], second: [0.3, 0.0]}, {second: [0.2, 0.1], first: [0.3, 0.0]}):
        assert choose(scores) == first
    assert choose({first: [0.5, 0.5], second: [0.5, 0.501]}) == second


def test_diverged_settings_are_not_chosen():
    good, bad = Setting(weight_decay=0.1), Setting(weight_decay=1.0)
    for value in (math.nan, math.inf):
        assert choose({bad: [0.9, value], good: [0.1, 0.1]}) == good
    with pytest.raises(LayerFusionError, match=r"every setting of the sweep diverged.*smaller learning rates"):
        choose({bad: [math.nan], good: [math.nan]})


@pytest.mark.parametrize(("values", "expected"), [([1.0, 2.0, 4.0], 1.5275252316519465), ([3.0], math.nan)])
def test_spread_is_that_of_a_sample(values, expected):
    assert spread(values) == pytest.approx(expected, nan_ok=True)


# ---- split -------------------------------------------------------------------------------------------------------


class Labelled:
    """What a split reads of features."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


CLASSES = Labelled(np.repeat([0, 1, 2], [50, 30, 20]))
NUMBERS = Labelled(np.linspace(0, 1, 100))
TAGS = Labelled(np.eye(4, dtype=np.float32)[np.arange(100) % 4])
GROUPS = [f"patient {number // 5}" for number in range(100)]


def split(features, validation_size=0.2, num_folds=None, seed=0, **options):
    return split_rows(features, validation_size=validation_size, num_folds=num_folds, seed=seed, **options)


@pytest.mark.parametrize("features", [CLASSES, NUMBERS, TAGS], ids=["classes", "numbers", "tags"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["rows", "groups"])
@pytest.mark.parametrize("num_folds", [None, 2, 5])
def test_every_row_is_on_one_side(features, groups, num_folds):
    folds = split(features, num_folds=num_folds, groups=groups)
    assert len(folds) == (num_folds or 1)
    for train, held_out in folds:
        assert sorted([*train, *held_out]) == list(range(100))
        assert (np.diff(train) > 0).all()
        assert (np.diff(held_out) > 0).all()
        slack = 0 if groups is None else 5  # rows of a group
        assert abs(len(held_out) - 100 // (num_folds or 5)) <= slack
        if groups is not None:
            assert not {GROUPS[row] for row in train} & {GROUPS[row] for row in held_out}
    if num_folds:
        assert sorted(row for _, held_out in folds for row in held_out) == list(range(100))


@pytest.mark.parametrize(("options", "shares"), [({}, [10, 6, 4]), ({"num_folds": 10}, [5, 3, 2])])
def test_classes_are_stratified(options, shares):
    for _, held_out in split(CLASSES, **options):
        assert np.bincount(CLASSES.labels[held_out]).tolist() == shares
    counts = [
        np.bincount(CLASSES.labels[rows], minlength=3).tolist() for _, rows in split(CLASSES, stratified=False, seed=1)
    ]
    assert counts != [[10, 6, 4]]


def test_the_seed_decides():
    first, again, other = (split(CLASSES, seed=seed)[0][1].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_whole_numbers_that_are_no_classes():
    ages = Labelled(np.arange(100))
    with pytest.raises(LayerFusionError, match="cannot be split"):
        split(ages)
    assert len(split(ages, stratified=False)[0][1]) == 20


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (CLASSES, {"validation_size": 0}, "validation_size=0 is no share of the rows: use more than 0, less than 1"),
        (CLASSES, {"validation_size": 1.0}, "validation_size=1.0 is no share"),
        (CLASSES, {"validation_size": math.nan}, "validation_size=nan is no share"),
        (CLASSES, {"validation_size": "0.2"}, "validation_size='0.2' is no share"),
        (CLASSES, {"validation_size": None}, "validation_size=None is no share"),
        (CLASSES, {"num_folds": 1}, "num_folds=1: use 2 or more, or None for one validation split"),
        (CLASSES, {"num_folds": True}, "num_folds=True: use 2 or more"),
        (CLASSES, {"num_folds": 2.0}, "num_folds=2.0: use 2 or more"),
        (CLASSES, {"num_folds": 51}, "100 rows cannot be split for validation .*: add rows, or change"),
        (CLASSES, {"groups": GROUPS[:-1]}, "groups has 99 entries, but there are 100 rows: give one per row"),
        (CLASSES, {"groups": ["one"] * 100}, "100 rows cannot be split for validation"),
        (CLASSES, {"groups": [None, *GROUPS[1:]]}, "100 rows cannot be split for validation"),
        (Labelled(np.array([0, 0, 0, 1])), {}, r"4 rows cannot be split for validation \(The least populated class"),
        (Labelled(np.array([0])), {}, "1 rows cannot be split for validation"),
        (Labelled(np.array([0.5, 1.0])), {"num_folds": 3}, "2 rows cannot be split for validation"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_splits_that_cannot_be(features, options, message):
    with pytest.raises(LayerFusionError, match=message):
        split(features, **options)
