"""What a sweep hands back: its table, its numbers, its files, its figure, and a model."""

import csv
import hashlib
import itertools
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from modeling_helpers import IMAGE_SIZE, images, tiny_backbone
from picture_helpers import CLASSES, picture
from PIL import Image as PILImage
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_layerfusion import (
    LayerFeatures,
    LayerFusionConfig,
    LayerFusionError,
    ViTForAttentiveLayerFusionClassification,
    extract_features,
)
from hf_layerfusion.analysis.plots import plot_sweep
from hf_layerfusion.heads import build_head
from hf_layerfusion.layout import TokenLayout
from hf_layerfusion.sweeps import Setting, SweepResult, expand_grid, sweep
from hf_layerfusion.sweeps.selection import choose
from hf_layerfusion.sweeps.settings import FIELDS, merge_settings

EPOCHS = 6
LAYOUT = TokenLayout.of_plain_vit(16, 6).to_dict()


def made_up(
    grid,
    recipes=("alf",),
    *,
    seeds=(0,),
    folds=1,
    score=lambda setting, seed, fold: 0.9 - 0.01 * abs(math.log10(setting.learning_rate) + 2) + 0.001 * (seed - fold),
    stopped=lambda _: None,
    merged=False,
    metric="balanced_accuracy",
    heads=(),
):
    """A result as `sweep` would make it, without the training."""
    settings = expand_grid(grid, recipes)
    trained_as = list(range(len(settings)))
    if merged:
        trained_as = merge_settings(
            settings, {setting.learning_rate: 500 * setting.learning_rate for setting in settings}
        )
    trials, curves, scores = [], [], {}
    for number, setting in enumerate(settings):
        for seed in seeds:
            for fold in range(folds):
                why = stopped(number)
                epochs = EPOCHS if why is None else EPOCHS // 2
                value = score(settings[trained_as[number]], seed, fold)
                kept = None if why in ("diverged", "halving") else value
                if trained_as[number] == number:
                    curve = [value * epoch / EPOCHS for epoch in range(1, epochs)] + [
                        math.nan if why == "diverged" else value
                    ]
                    curves.append(
                        {"setting": number, "seed": seed, "fold": fold, "epochs": list(range(1, epochs + 1))}
                        | {"scores": curve, "losses": [1.0] * (epochs - 1) + [math.nan if why == "diverged" else 0.5]}
                    )
                trials.append(
                    {"setting": number, **setting.to_dict(), "seed": seed, "fold": fold, "score": kept}
                    | {
                        "best_epoch": epochs,
                        "epochs_trained": epochs,
                        "stopped": why,
                        "trained_as": trained_as[number],
                    }
                )
                scores.setdefault(setting, []).append(math.nan if kept is None else kept)
    best = choose({setting: scores[setting] for setting in (settings[number] for number in sorted(set(trained_as)))})
    config = LayerFusionConfig(id2label={0: "ant", 1: "bee", 2: "cat"}, token_layout=LAYOUT, **best.config_options)
    protocol = {"metric": metric, "overrides": {}, "features": {"backbone": None}, "identity": "0"}
    return SweepResult(trials, curves, best, protocol, config, {seed: head_state(config, seed) for seed in heads})


def head_state(config, seed):
    torch.manual_seed(seed)
    state = build_head(config).state_dict()
    return {name: torch.randn_like(v) if v.is_floating_point() else v + seed for name, v in state.items()}


SMALL = {"learning_rate": [0.1, 0.01], "weight_decay": [0.001, 0.1], "attention_dropout": 0.3}


@pytest.fixture(scope="module")
def result():
    """Two seeds and two folds; the last setting diverged."""
    return made_up(
        SMALL, seeds=(0, 3), folds=2, heads=(0, 3), stopped=lambda number: "diverged" if number == 3 else None
    )


@pytest.fixture(scope="module")
def saved_once(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    result.save(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "sweep")


@pytest.fixture
def no_figures(monkeypatch):
    """As if matplotlib were not installed: figures take longer than all else."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


# ---- what it says ------------------------------------------------------------------------------------------------


def test_the_chosen_settings_numbers(result):
    scores = [0.9, 0.899, 0.903, 0.902]  # setting 2, seeds 0 and 3, folds 0 and 1
    assert result.best == result.settings[2]
    assert result.scores() == result.scores(result.settings[2]) == pytest.approx(scores)
    assert result.best_score == pytest.approx(0.901)
    assert result.best_score_std == pytest.approx(np.std(scores, ddof=1))
    assert math.isnan(made_up(SMALL).best_score_std)


def test_scores_of_others(result):
    assert result.scores(result.settings[0]) == pytest.approx([0.89, 0.889, 0.893, 0.892])
    assert result.scores(result.settings[3]) == []
    with pytest.raises(LayerFusionError, match=r"Setting\(.*learning_rate=0.5.* is not in the grid of this sweep"):
        result.scores(Setting(learning_rate=0.5))


def test_settings_and_what_varies(result):
    assert result.settings == expand_grid(SMALL)
    assert result.varied == ["learning_rate", "weight_decay"]
    assert made_up({}).varied == []
    assert made_up("paper", ("alf", "linear-all")).varied == [
        *("recipe", "learning_rate", "weight_decay", "attention_dropout")
    ]


def test_summary_is_ranked_as_chosen():
    table = made_up("paper", seeds=(0, 1), merged=True, stopped=lambda number: "halving" if number % 5 == 3 else None)
    summary = table.summary()
    assert Setting(**{name: summary[0][name] for name in FIELDS}) == table.best
    assert sorted(row["setting"] for row in summary) == list(range(63))
    means = [row["mean"] for row in summary]
    assert [math.isnan(mean) for mean in means] == [False] * 51 + [True] * 12
    assert means[:51] == sorted(means[:51], reverse=True)
    assert all(row["std"] == pytest.approx(math.sqrt(0.5) * 1e-3) for row in summary[:51])
    assert all(math.isnan(row["std"]) for row in summary[51:])
    assert {row["trained_as"] for row in summary} == {trial["trained_as"] for trial in table.trials}


@pytest.mark.parametrize(
    ("best_rate", "best_decay", "expected"),
    [
        (0.1, 1e-3, {"learning_rate": "largest"}),
        (0.001, 1e-1, {"learning_rate": "smallest", "weight_decay": "largest"}),
        (0.01, 1e-5, {"weight_decay": "smallest"}),
        (0.01, 1e-3, {}),
        (None, 1e-3, {}),  # all rates do as well
    ],
)
def test_at_edge(best_rate, best_decay, expected):
    grid = {"learning_rate": [0.1, 0.01, 0.001], "weight_decay": [1e-1, 1e-3, 1e-5]}

    def score(setting, seed, fold):
        return (
            0.5
            + 0.2 * (setting.learning_rate == (best_rate or 0.01) or best_rate is None)
            + 0.1 * (setting.weight_decay == best_decay)
        )

    assert made_up(grid, score=score).at_edge == expected
    assert made_up({"learning_rate": 0.01}).at_edge == {}


def test_a_neighbour_that_diverged_is_no_edge():
    grid = {"learning_rate": [0.1, 0.01, 0.001]}
    found = made_up(grid, stopped=lambda number: "diverged" if number == 0 else None)
    assert found.best.learning_rate == 0.01
    assert found.at_edge == {}


@pytest.mark.parametrize(
    ("grid", "expected"),
    [({}, {}), ({"ridge_penalty": [0.01, 0.1, 1.0]}, {"ridge_penalty": "smallest"})],
)
def test_the_default_penalties_have_no_edge(grid, expected):
    found = made_up(grid, ("ridge-all",), score=lambda setting, *_: 1 - setting.ridge_penalty / 10)
    assert len(found.settings) == 3
    assert found.at_edge == expected


def test_table_and_dataset(result):
    table, dataset = result.table(), result.dataset
    assert len(table) == len(dataset) == 16
    assert list(table.columns) == dataset.column_names == list(result.trials[0])
    assert dataset.to_list() == result.trials
    assert table["score"].isna().sum() == 4
    best = table.groupby("setting")["score"].mean().idxmax()
    assert best == result.settings.index(result.best)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            lambda: made_up(SMALL, seeds=(0, 3), heads=(0, 3)),
            "SweepResult(best of 4 settings (4 trained): recipe=alf, learning_rate=0.01, weight_decay=0.1; "
            "balanced accuracy 0.9015 ± 0.0021 (validation); heads of seeds [0, 3])",
        ),
        (
            lambda: made_up({}, score=lambda *_: -2.5, metric="mse"),
            "SweepResult(best of 1 settings (1 trained): recipe=alf, learning_rate=0.01, weight_decay=0.01; "
            "negative mse -2.5000 (validation); heads of seeds [])",
        ),
    ],
    ids=["seeds", "errors"],
)
def test_repr(made, text):
    assert repr(made()) == text


def test_repr_says_how_long_it_took(result):
    timed = SweepResult(**{**vars(result), "protocol": {**result.protocol, "seconds": 61.7}})
    assert repr(timed).endswith("heads of seeds [0, 3]; 62 s)")


def test_head_state(result):
    assert result.head_state() is result.heads[0]
    assert result.head_state(3) is result.heads[3]
    with pytest.raises(LayerFusionError, match=r"no head was trained from seed 1, only from \[0, 3\]"):
        result.head_state(1)
    with pytest.raises(LayerFusionError, match="trained no head on all rows: run it with refit=True"):
        made_up(SMALL).head_state()


# ---- files -------------------------------------------------------------------------------------------------------


def same(first, second):
    """Equal, where NaN is NaN."""
    return repr(first) == repr(second)


def test_round_trip(result, saved, tmp_path):
    assert sorted(os.listdir(saved)) == [
        *("head-seed0.safetensors", "head-seed3.safetensors", "sweep.json", "sweep.png", "trials.csv")
    ]
    loaded = SweepResult.load(saved)
    assert (loaded.trials, loaded.best, loaded.protocol) == (result.trials, result.best, result.protocol)
    assert same(loaded.curves, result.curves)
    assert math.isnan(loaded.curves[-1]["scores"][-1])
    assert loaded.config.to_dict() == result.config.to_dict()
    assert loaded.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert list(loaded.heads) == [0, 3]
    for seed, state in result.heads.items():
        assert loaded.heads[seed].keys() == state.keys()
        for name, value in state.items():
            assert loaded.heads[seed][name].dtype == value.dtype
            assert torch.equal(loaded.heads[seed][name], value)
    assert same(loaded.summary(), result.summary())
    loaded.save(tmp_path / "again")
    for name in os.listdir(saved):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_json_is_strict_and_complete(result, saved, no_figures):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    content = json.loads((saved / "sweep.json").read_text(), parse_constant=refuse)
    assert content["best_score"] == {
        **{"mean": result.best_score, "std": result.best_score_std, "values": result.scores()}
    }
    assert [head["file"] for head in content["heads"]] == ["head-seed0.safetensors", "head-seed3.safetensors"]
    for head in content["heads"]:
        assert hashlib.sha256((saved / head["file"]).read_bytes()).hexdigest() == head["sha256"]
    assert content["curves"][-1]["scores"][-1] is None
    made_up(SMALL).save(saved)
    assert json.loads((saved / "sweep.json").read_text())["best_score"]["std"] is None


def test_csv_reads_back(result, saved):
    with (saved / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(trial) for trial in result.trials]
    for row, trial in zip(rows, result.trials, strict=True):
        for name, value in trial.items():
            read = (
                None
                if row[name] == ""
                else type(value)(row[name])
                if not isinstance(value, bool)
                else row[name] == "True"
            )
            assert read == value, name
    dataset = load_dataset("csv", data_files=str(saved / "trials.csv"), split="train", cache_dir=str(saved / "cache"))
    assert dataset["score"][:3] == result.dataset["score"][:3]


def test_saving_again_leaves_nothing_of_the_old(saved, no_figures):
    (saved / "notes.txt").write_text("mine")
    (saved / "head-seed0.safetensors.123.tmp").write_text("half")
    new = made_up(SMALL, seeds=(7,), heads=(7,))
    new.save(saved)
    assert sorted(os.listdir(saved)) == [
        "head-seed7.safetensors",
        "notes.txt",
        "sweep.json",
        "trials.csv",
    ]
    assert SweepResult.load(saved).trials == new.trials


def test_without_matplotlib(result, tmp_path, no_figures):
    result.save(tmp_path)
    assert not (tmp_path / "sweep.png").exists()
    assert SweepResult.load(tmp_path).trials == result.trials
    with pytest.raises(LayerFusionError, match=r"need matplotlib: pip install 'hf-layerfusion\[plots\]'"):
        result.plot(tmp_path / "own.png")


def test_a_figure_that_fails_costs_nothing_else(result, tmp_path, monkeypatch):
    def fail(result, path):
        raise RuntimeError("no font")

    monkeypatch.setattr("hf_layerfusion.analysis.plots.plot_sweep", fail)
    result.save(tmp_path)
    assert not (tmp_path / "sweep.png").exists()
    assert SweepResult.load(tmp_path).trials == result.trials


def test_a_result_that_is_not_whole_has_no_json(result, saved, monkeypatch, no_figures):
    """Killed at any moment, the folder never says of new files that they are the old result, or the reverse."""
    replace = type(saved).replace
    for moment in range(4):
        made_up(SMALL, heads=(0,)).save(saved)
        left = iter([None] * moment)

        def interrupted(self, target, left=left):
            if next(left, "none left") is not None:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(type(saved), "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                result.save(saved)
        with pytest.raises(LayerFusionError, match=r"holds no finished sweep: .*sweep.json is missing"):
            SweepResult.load(saved)


def edited(**changes):
    def edit(folder):
        content = json.loads((folder / "sweep.json").read_text())
        for path, value in changes.items():
            place = content
            *parents, last = path.split("__")
            for parent in parents:
                place = place[int(parent) if parent.isdigit() else parent]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        (folder / "sweep.json").write_text(json.dumps(content))

    return edit


def flip(name):
    def edit(folder):
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)

    return edit


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"holds no finished sweep: .*sweep.json is missing"),
        (lambda folder: (folder / "sweep.json").unlink(), r"holds no finished sweep: .*sweep.json is missing"),
        (
            lambda folder: (folder / "head-seed3.safetensors").unlink(),
            r"holds no finished sweep: .*head-seed3.safetensors is missing",
        ),
        (flip("head-seed0.safetensors"), "cannot be read: head-seed0.safetensors is damaged, or of another sweep"),
        (overwrite("head-seed0.safetensors", b""), "head-seed0.safetensors is damaged"),
        (
            lambda folder: shutil.copy(folder / "head-seed0.safetensors", folder / "head-seed3.safetensors"),
            "head-seed3.safetensors is damaged, or of another sweep",
        ),
        (overwrite("sweep.json", b""), "cannot be read: Expecting value"),
        (overwrite("sweep.json", bytes(range(256))), "cannot be read: 'utf-8' codec"),
        (overwrite("sweep.json", b'{"model_type": "vit"}'), "cannot be read: sweep.json has no 'format_version'"),
        (overwrite("sweep.json", b"[1, 2]"), "cannot be read: "),
        (overwrite("sweep.json", b"null"), "cannot be read: "),
        (edited(format_version=2), "cannot be read: it has format 2, this version reads 1"),
        (edited(trials=...), "sweep.json has no 'trials'"),
        (edited(trials=[]), "cannot be read: it has no trial"),
        (edited(trials="none"), "cannot be read: "),
        (edited(trials__0__stopped=...), "sweep.json has no 'stopped'"),
        (edited(trials__0__learning_rate="high"), "cannot be read: learning_rate='high'"),
        (edited(trials__0__setting=9), "the numbers of its settings have gaps"),
        (edited(best__learning_rate=0.5), "is not in the grid of this sweep"),
        (edited(best__speed=1), "unexpected keyword argument 'speed'"),
        (edited(best__learning_rate=0.01, best__weight_decay=0.001, best__recipe="none"), "recipe 'none' is unknown"),
        (edited(config__layers=[99]), "cannot be read: "),
        (edited(curves__0__scores=...), "sweep.json has no 'scores'"),
        (edited(protocol__metric=...), "sweep.json has no 'metric'"),
        (edited(protocol__identity=...), "sweep.json has no 'identity'"),
        (edited(heads__0__sha256=...), "sweep.json has no 'sha256'"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_damaged_and_foreign_files(saved, damage, message):
    damage(saved)
    with pytest.raises(LayerFusionError, match=message):
        SweepResult.load(saved)


def test_a_chosen_setting_without_a_score_is_damage(result, saved):
    edited(best=result.settings[3].to_dict())(saved)
    with pytest.raises(LayerFusionError, match="the chosen setting has no score"):
        SweepResult.load(saved)


# ---- figure ------------------------------------------------------------------------------------------------------

WIDE = {"weight_decay": [0, 1e-3], "num_queries": [1, 2, 4], "balance_classes": [True, False], "num_heads": [1, 2]}


@pytest.mark.parametrize(
    ("made", "panels", "chosen"),
    [
        (lambda: made_up("paper", merged=True), [""], "lr 0.01 · decay 1 · dropout 0.3"),
        (
            lambda: made_up("paper", ("linear-last", "alf", "alf-paper"), seeds=(0, 1)),
            ["linear-last", "alf", "alf-paper"],
            "alf · lr 0.01 · decay 1 · dropout 0.3",
        ),
        (
            lambda: made_up({"weight_decay": [0, 0.1], "noise_std": [0, 0.1]}),
            ["noise 0", "noise 0.1"],
            "decay 0.1 · noise 0.1",
        ),
        (lambda: made_up({"learning_rate": [0.1, 0.01]}, folds=3), [""], "lr 0.01"),
        (lambda: made_up({"attention_dropout": [0, 0.5]}, seeds=(0, 1)), None, "dropout 0.5"),
        (lambda: made_up(WIDE), None, "decay 0.001 · queries 1 · heads 1 · balanced classes"),
        (lambda: made_up({}), None, "alf · lr 0.01 · decay 0.01"),
        (lambda: made_up({}, ["linear-last"]), None, "linear-last · lr 0.3 · decay 0.0001"),
        (
            lambda: made_up([{"learning_rate": 0.1}, {"weight_decay": [0.5, 0.1], "learning_rate": 0.01}]),
            [""],
            "lr 0.01 · decay 0.5",
        ),
        (
            lambda: made_up({"learning_rate": np.logspace(-4, 0, 9), "weight_decay": np.logspace(-6, 1, 20)}),
            [""],
            "lr 0.01 · decay 10",
        ),
        (
            lambda: made_up("paper", stopped=lambda n: [None, "halving", "diverged"][min(n % 9, 2)]),
            [""],
            "lr 0.01 · decay 0.1 · dropout 0",
        ),
        (
            lambda: made_up(
                "fast", metric="mse", score=lambda s, *_: -1e12 if s.learning_rate > 0.02 else -20 - s.learning_rate
            ),
            [""],
            "lr 0.001 · decay 0.1 · dropout 0.3",
        ),
    ],
    ids=[
        *(
            "paper",
            "recipes",
            "noise",
            "rates",
            "dropout",
            "many fields",
            "one",
            "one linear",
            "irregular",
            "many values",
        ),
        *("stopped", "errors"),
    ],
)
def test_figure(made, panels, chosen, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: figures.append(self) or savefig(self, *args, **options)
    )
    result = made()
    plot_sweep(result, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    curves, *right = figure.axes
    score = f"{'negative mse' if result.metric == 'mse' else 'balanced accuracy'} (validation)"
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("epoch", score)
    assert curves.get_title().replace("\n", " ").replace("\u00a0", " ") == f"chosen: {chosen}"
    drawn = curves.get_lines()
    assert len(drawn) == len(result.curves)
    strong = {line.get_color() for line in drawn[-len(result.scores()) :]}
    assert len(strong) == 1
    assert strong.isdisjoint(line.get_color() for line in drawn[: -len(result.scores())])
    if panels is None:
        (strip,) = right
        assert strip.get_xlabel() == score
        names = [label.get_text().replace("\u00a0", " ") for label in strip.get_yticklabels()]
        assert names[0] == chosen
        assert len(names) == len(set(names)) == min(30, len(result.settings))
    else:
        assert [axis.get_title().replace("\u00a0", " ") for axis in right] == panels
        across = "weight decay" if "weight_decay" in result.varied else "learning rate"
        assert {axis.get_xlabel() for axis in right} == {across}
        assert {axis.get_ylabel() for axis in right} == {score}
        (ring,) = [line for axis in right for line in axis.get_lines() if line.get_markerfacecolor() == "none"]
        assert list(ring.get_ydata()) == [result.best_score]
        scored = [row["setting"] for row in result.summary() if not math.isnan(row["mean"])]
        markers = [line for axis in right for line in axis.get_lines() if line.get_markersize() == 5]
        assert sum(len(line.get_xdata()) for line in markers) == len(scored)
        hollow = sum(len(line.get_xdata()) for line in markers if line.get_markerfacecolor() == "white")
        assert hollow == len({t["setting"] for t in result.trials if t["trained_as"] != t["setting"]})
    for axis in figure.axes:
        for ruler in (axis.xaxis, axis.yaxis):
            low, high = sorted(ruler.get_view_interval())
            ticks = zip(ruler.get_ticklocs(), ruler.get_ticklabels(), strict=True)
            boxes = [label.get_window_extent() for place, label in ticks if low <= place <= high]
            assert not any(first.overlaps(second) for first, second in itertools.pairwise(boxes))
    # Nothing reaches the border, so nothing is cut off.
    with PILImage.open(tmp_path / "sweep.png") as image:
        grey = np.asarray(image.convert("L"))
    for edge in (grey[0], grey[-1], grey[:, 0], grey[:, -1]):
        assert (edge == 255).all()


# ---- model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("dinov2")


@pytest.fixture(scope="module")
def features(backbone, tmp_path_factory):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = BitImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        backbone, id2label=CLASSES, image_processor=processor
    )
    rows = [(picture(label, seed), label) for seed in range(8) for label in range(3)]
    columns = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    dataset = Dataset.from_dict(
        dict(zip(("image", "label"), map(list, zip(*rows, strict=True)), strict=True)), features=columns
    )
    folder = tmp_path_factory.mktemp("features")
    extract_features(model, dataset, folder, dtype="float32", progress=False)
    return LayerFeatures.open(folder)


@pytest.fixture(scope="module")
def swept(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    grid = {"learning_rate": [0.1, 0.01], "num_heads": 2, "num_queries": 2}
    sweep(features, grid=grid, seeds=(0, 5), num_epochs=3, layers=[1, 3], output_dir=folder, progress=False)
    return SweepResult.load(folder)


@pytest.mark.parametrize("seed", [None, 5])
def test_model_has_the_logits_of_the_saved_head(swept, backbone, features, tmp_path, seed):
    model = swept.build_model(backbone, seed=seed).eval()
    assert model.config.token_names == [
        f"layer {layer} · block · {pool}" for layer in (1, 3) for pool in ("cls", "mean")
    ]
    assert (model.config.num_heads, model.config.num_queries) == (2, 2)
    assert list(model.config.id2label.values()) == CLASSES
    head = build_head(swept.config).eval()
    head.load_state_dict(swept.heads[seed or 0])
    tokens = next(features.select_bank(model.config.bank).batches(24))["layer_features"]
    with torch.no_grad():
        expected = head(torch.nn.functional.normalize(tokens, dim=-1))
        torch.testing.assert_close(model(layer_features=tokens).logits, expected, rtol=0, atol=1e-6)
        pixels = images(4)
        live = model(layer_features=model.extract_layer_features(pixels)).logits
        torch.testing.assert_close(model(pixel_values=pixels).logits, live)
        model.save_pretrained(tmp_path)
        again = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path, backbone=backbone).eval()
        torch.testing.assert_close(again(layer_features=tokens).logits, expected, rtol=0, atol=1e-6)
    for name, value in again.head.state_dict().items():
        assert torch.equal(value, swept.heads[seed or 0][name]), name


def test_seeds_give_different_models(swept, backbone):
    first, second = (swept.build_model(backbone, seed=seed).head.state_dict() for seed in (0, 5))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_another_backbone_is_refused(swept, backbone):
    other = tiny_backbone("dinov2")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(
        LayerFusionError, match=r"came from a backbone with fingerprint .*: give the backbone they were"
    ):
        swept.build_model(other)
    with pytest.raises(LayerFusionError, match="no head was trained from seed 1"):
        swept.build_model(backbone, seed=1)
