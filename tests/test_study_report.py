"""The report of a study: tables, LaTeX, figures, and what it says about what is not there."""

import csv
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from PIL import Image
from study_helpers import BLOCKS, MODULES, dump, write_run, write_study

from hf_layerfusion import LayerFusionError
from hf_layerfusion.study import figures
from hf_layerfusion.study.report import write_report
from hf_layerfusion.study.results import RunKey, StudyResults
from hf_layerfusion.study.scores import ScoredStudy
from hf_layerfusion.study.statistics import Estimate, mean_estimate
from hf_layerfusion.study.tables import Bold, Table

MAIN = ["linear-last", "linear-last-cls-mean", "linear-all", "alf-last", "alf", "aat"]
DATASETS = ["digits", "emoji"]
FIGURES = {"attention-tiny", "depth-tiny", "gains-tiny", "layer-counts-tiny", "similarity-tiny", "taps-tiny"}


def report(folder, **options):
    return write_report(folder, **{"num_resamples": 200, "with_figures": False, **options})


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown_tables(text):
    """By heading, the cells of the tables below it."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not set("".join(cells)) <= set("-: "):
                found.setdefault(heading, []).append(cells)
    return found


def check_latex(text):
    """What makes LaTeX stop: unknown characters, unbalanced braces, another number of cells than columns."""
    assert text.isascii()
    plain = re.sub(r"\\[{}]", "", text)
    depth = np.cumsum([(c == "{") - (c == "}") for c in plain])
    assert depth.min() >= 0
    assert depth[-1] == 0
    columns = None
    for line in text.splitlines():
        if match := re.fullmatch(r"\\begin\{tabular\}\{(l?r*)\}", line):
            columns = len(match[1])
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
        assert not re.search(r"(?<!\\)[%#_$]", line.replace("$-$", "").replace(r"$\pm$", "").replace(r"$\cdot$", ""))
    starts = Counter(re.findall(r"\\begin\{(\w+)\}", text))
    assert starts == Counter(re.findall(r"\\end\{(\w+)\}", text))
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels)


def check_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width <= 1500
        grey = np.asarray(image.convert("L"))
        # Nothing reaches the border, so nothing is cut off.
        assert (grey[[0, -1]] == 255).all()
        assert (grey[:, [0, -1]] == 255).all()
        assert grey.min() < 100


@contextmanager
def without_painting():
    """Figures are put together but not painted, which takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", lambda _, path: path.touch())
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study with everything that a report can show."""
    recipes = [*MAIN, "linear-layer:3", "linear-layer:12"]
    recipes += [f"module-probe:{layer}:{module}" for layer in (6, 12) for module in ("ln2", "block")]
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, datasets=DATASETS, recipes=recipes, similarity=True, test_rows=80)
    with without_painting():
        report(folder, with_figures=True)
    return folder


def test_all_is_there(finished):
    written = {file.name for file in (finished / "report").iterdir()}
    pictures = {f"{name}.png" for name in FIGURES}
    pictures |= {f"attention-tiny-{dataset}.png" for dataset in DATASETS}
    texts = {"report.md", "results.csv", "gains.csv", "summary.tex", "accuracy.tex", "gains.tex", "tests.tex"}
    assert written == pictures | texts
    text = (finished / "report" / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == pictures
    assert text.endswith("## What is missing\n\nNothing.\n")
    assert "Unfinished" not in text
    for name in ("summary", "accuracy", "gains", "tests"):
        check_latex((finished / "report" / f"{name}.tex").read_text(encoding="utf-8"))


def test_header_says_what_was_run(finished):
    text = (finished / "report" / "report.md").read_text(encoding="utf-8")
    assert "# Study: made up" in text
    tables = markdown_tables(text)["What was run"]
    assert ["tiny", "hub/tiny", "–", "112", "pretrained"] in tables
    assert ["digits", "hub/digits", "test", "4", "240", "80"] in tables
    for words in ("protocol: paper", "2 new divisions", "training seeds: 0, 1", "torch 2.0", "cores 2"):
        assert words in text
    assert "- `alf`: Attentive Layer Fusion" in text
    assert "- `linear-layer:K`: linear probe" in text


def test_numbers_are_those_of_the_runs(finished):
    table = StudyResults.load(finished).table()
    means = table.groupby(["dataset", "recipe", "split"]).balanced_accuracy.mean()
    means = means.groupby(["dataset", "recipe"]).mean()
    rows = read_csv(finished / "report" / "gains.csv")
    assert len(rows) == len(means)
    for row in rows:
        mean = means[row["dataset"], row["recipe"]]
        assert float(row["balanced_accuracy"]) == pytest.approx(mean)
        if row["gain"]:
            assert float(row["gain"]) == pytest.approx(mean - means[row["dataset"], "linear-last"])
            assert float(row["gain_low"]) <= float(row["gain"]) <= float(row["gain_high"])
    text = (finished / "report" / "report.md").read_text(encoding="utf-8")
    tables = markdown_tables(text)
    # The first heading `tiny` is that of the summary, then of accuracies, gains, maps, attention.
    summary = {row[0]: row for row in tables["tiny"] if row[0] in MAIN and len(row) == 11}
    gains = [100 * (means[name, "alf"] - means[name, "linear-last"]) for name in DATASETS]
    assert [float(cell) for cell in (summary["alf"][4], *summary["alf"][6:9])] == pytest.approx(
        [np.mean(gains), np.median(gains), min(gains), max(gains)], abs=0.0501
    )
    assert summary["alf"][9] == f"{sum(gain > 0 for gain in gains)}, 0, {sum(gain < 0 for gain in gains)}"
    cell = next(row for row in tables["tiny"] if row[0] == "aat" and "±" in row[1])[1]
    parts = [float(number) for number in re.findall(r"[\d.]+", cell)]
    scores = StudyResults.load(finished).scores("tiny", "digits", "aat")
    assert parts[0] == pytest.approx(100 * means["digits", "aat"], abs=0.0501)
    assert parts[1] == pytest.approx(100 * np.sqrt(np.mean([np.var(s, ddof=1) for s in scores.values()])), abs=0.0501)
    assert parts[2] == pytest.approx(100 * np.std([np.mean(s) for s in scores.values()], ddof=1), abs=0.0501)
    assert len(read_csv(finished / "report" / "results.csv")) == len(table)


def test_tests_say_what_they_cannot_show(finished):
    text = (finished / "report" / "report.md").read_text(encoding="utf-8")
    assert text.count("**No test of this table can be significant**: over 2 datasets no p-value is below 0.250") == 2
    rows = markdown_tables(text)["The comparisons of arXiv 2601.09322"]
    pairs = [("alf", "alf-last"), ("alf", "linear-all"), ("alf", "aat"), ("linear-all", "linear-last-cls-mean")]
    assert [(row[1], row[2]) for row in rows[1:]] == pairs
    assert {row[-1] for row in rows[1:]} == {"0.250"}


def test_enough_datasets_can_be_significant(tmp_path):
    names = [f"set{number}" for number in range(8)]
    share = {"linear-last": 0.5, "linear-all": 0.7, "alf": 0.8}
    folder = write_study(tmp_path, datasets=names, seeds=[0], splits="own", skill=lambda *key: share[key[2]])
    text = report(folder).read_text(encoding="utf-8")
    assert "can be significant" not in text
    rows = markdown_tables(text)["Every recipe against linear-last"]
    assert [row[-3:] for row in rows[1:]] == [["0.004", "**0.004**", "0.004"]] * 2
    # Blocks of four datasets, all of them shown.
    headers = [row for row in markdown_tables(text)["tiny"] if row[0] == "recipe" and row[1] in names]
    assert [name for row in headers[:2] for name in row[1:]] == names
    assert "Rank correlation (Spearman)" in text


def test_the_best_tap_is_found(finished):
    text = (finished / "report" / "report.md").read_text(encoding="utf-8")
    rows = [row for row in markdown_tables(text)["tiny"] if ":" in row[1]]
    assert len(rows) == 2 * 2
    table = StudyResults.load(finished).table()
    for dataset, best, accuracy, _, last, difference, taps in rows:
        family = best.split(":")[0]
        found = table[(table.dataset == dataset) & table.recipe.str.startswith(f"{family}:")]
        means = found.groupby("recipe").balanced_accuracy.mean()
        assert (best, int(taps)) == (means.idxmax(), len(means))
        reference = means[f"{family}:12" + (":block" if family == "module-probe" else "")]
        assert [float(accuracy), float(last)] == pytest.approx([100 * means.max(), 100 * reference], abs=0.0501)
        if difference != "–":
            assert float(difference.split()[0]) == pytest.approx(100 * (means.max() - reference), abs=0.0501)


def test_same_folder_same_bytes(tmp_path):
    folder = write_study(tmp_path, datasets=["digits"], recipes=["linear-last", "alf"], seeds=[0])
    report(folder)
    first = {file.name: file.read_bytes() for file in (folder / "report").iterdir()}
    (folder / "report" / "taps-old.png").write_bytes(b"of a dataset that is gone")
    (folder / "report" / "notes.txt").write_text("mine")
    report(folder)
    second = {file.name: file.read_bytes() for file in (folder / "report").iterdir()}
    assert second.pop("notes.txt") == b"mine"
    assert second == first
    assert not list(folder.glob("*.tmp"))


def test_same_figure_same_bytes(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        figures.plot_attention_by_layer({"digits": {1: 0.4, 2: 0.6}}, path, title="x")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_settings_in_which_runs_differ_are_listed(tmp_path):
    folder = write_study(
        tmp_path, datasets=["digits"], recipes=["linear-last", "alf", "knn-last"], seeds=[0, 1, 2], splits="own"
    )
    for path in (folder / "runs").glob("*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        shared = {"recipe": run["recipe"], "noise_std": 0.0, "num_heads": None, "head_options": {}}
        run["setting"] = {
            "linear-last": {"learning_rate": 0.1, "attention_dropout": None, **shared},
            "alf": {"learning_rate": 0.01 if run["seed"] else 0.1, "attention_dropout": 0.3, **shared},
            "knn-last": {"k": 5},
        }[run["recipe"]]
        dump(path, run)
    text = report(folder).read_text(encoding="utf-8")
    rows = markdown_tables(text)["What recipes cost, and what was chosen"]
    assert {row[0]: row[-1] for row in rows[1:]} == {
        "linear-last": "learning rate 0.1 (100 %)",
        "alf": "learning rate 0.01 (67 %), attention dropout 0.3 (100 %)",
        "knn-last": "–",
    }
    assert "\nIn all runs that have them: noise std 0, k 5.\n" in text


def test_an_unfinished_study_says_so(tmp_path):
    folder = write_study(tmp_path, seeds=[0, 1, 2])
    gone = [RunKey("tiny", "emoji", split, "alf", seed) for split, seed in ((0, 1), (1, 1), (1, 2))]
    gone += [RunKey("tiny", "digits", split, "linear-last", seed) for split in (0, 1) for seed in range(3)]
    for key in gone:
        for suffix in (".json", ".safetensors"):
            (folder / "runs" / f"{key.stem}{suffix}").unlink()
    text = report(folder).read_text(encoding="utf-8")
    assert "**Unfinished: 45 of 54 planned runs are there.**" in text
    for line in ("- tiny, `alf`: emoji (3)\n", "- tiny, `linear-last`: digits (6)\n"):
        assert line in text
    gains = {(row["dataset"], row["recipe"]): row["gain"] for row in read_csv(folder / "report" / "gains.csv")}
    assert gains["digits", "alf"] == ""
    assert gains["emoji", "alf"] != ""
    summary = next(row for row in markdown_tables(text)["tiny"] if row[0] == "linear-last")
    assert summary[1] == "2"


def test_only_a_damaged_run_stops_the_report(tmp_path):
    folder = write_study(tmp_path)
    before = report(folder).read_bytes()
    path = folder / "runs" / "tiny--emoji--split0--alf--seed0.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LayerFusionError, match="split0--alf--seed0"):
        report(folder)
    assert (folder / "report" / "report.md").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def no_runs(folder):
    write_study(folder, datasets=[])


def one_of_each(folder):
    write_study(folder, datasets=["digits"], recipes=["linear-last"], seeds=[0], splits="own")


def one_recipe_that_is_no_baseline(folder):
    write_study(folder, datasets=["digits"], recipes=["alf"], seeds=[0], splits="own")


def no_baseline(folder):
    write_study(folder, recipes=["linear-all", "linear-last-cls-mean"], datasets=["a", "b"], seeds=[0])


def only_maps(folder):
    write_study(folder, recipes=[f"module-probe:{layer}:{module}" for layer in (1, 2) for module in MODULES])


def maps_without_a_last_block(folder):
    write_study(folder, recipes=["module-logistic:12:fc1", "module-logistic:3:block", "aat-layer:3"], seeds=[0])


def all_wrong(folder):
    write_study(folder, skill=lambda *_: -1.0)


def all_right(folder):
    write_study(folder, skill=lambda *_: 2.0)


def two_backbones(folder):
    write_study(folder, backbones=["small", "random"], similarity=True)


def long_and_foreign_names(folder):
    names = ["数据集_50%_&_#1 naïve|é", "a very long name of a dataset" + 8 * " with words" + " $x_1$ ~ ^2 {y}"]
    recipes = ["linear-last", "alf", "linear-last-cls-mean", "linear-all", "linear-layer:2"]
    options = {"seeds": [0], "splits": "own", "test_rows": 40, "similarity": True}
    write_study(folder, datasets=names, backbones=["β" * 20 + " 数 $"], recipes=recipes, **options)


def one_test_image(folder):
    write_study(folder, test_rows=1, num_labels=2, splits="own")


def diverged(folder):
    write_study(folder, datasets=["digits", "emoji"])
    for key in list(StudyResults.load(folder).runs):
        if key.recipe == "alf" and (key.dataset == "digits" or key.seed):
            rows = np.arange(120)
            metrics = {"balanced_accuracy": float("nan"), "accuracy": None}
            write_run(folder, key, rows, rows % 4, rows % 3, metrics=metrics, validation_score=None, depth=None)


def runs_of_an_older_config(folder):
    write_study(folder, recipes=["linear-last", "alf"], datasets=["digits", "emoji"])
    config = {"name": "x", "backbones": [{"name": "tiny"}], "datasets": [{"name": "emoji"}], "recipes": ["alf"]}
    dump(folder / "study.json", {"config": {**config, "seeds": [0]}})


def several_domains(folder):
    write_study(folder)
    results = StudyResults.load(folder)
    for entry, domain in zip(results.study["config"]["datasets"], ["photos", "drawings", "photos"], strict=True):
        entry["domain"] = domain
    dump(folder / "study.json", results.study)


HOSTILE = {
    no_runs: ["There is no finished run yet."],
    one_of_each: ["There is one run for each number, so there is no ±", "there is no recipe besides linear-last"],
    one_recipe_that_is_no_baseline: ["There is no run of `linear-last`, so there are no gains."],
    no_baseline: ["There is no run of `linear-last`", "layer-counts-tiny.png", "balanced accuracy (%) by dataset"],
    only_maps: ["## Single layers and modules", "module-probe:"],
    maps_without_a_last_block: ["module-logistic:", "aat-layer:3"],
    all_wrong: ["0.0 ± 0.0 ± 0.0"],
    all_right: ["100.0 ± 0.0 ± 0.0", "can be significant"],
    two_backbones: ["### small", "### random", "### All backbones"],
    long_and_foreign_names: [
        *["数据集\\_50%\\_&\\_#1 naïve\\|é", "$x\\_1$"],
        *[f"]({kind}-" for kind in ("gains", "layer-counts", "taps", "attention", "depth", "similarity")],
    ],
    one_test_image: ["How to read it"],
    diverged: ["Runs that diverged, and are in no mean", "- tiny, `alf`: digits (4), emoji (2)"],
    runs_of_an_older_config: ["digits"],
    several_domains: ["### Mean gain by domain", "(2)"],
}


# The first has every kind of figure, and the names that need the most room.
PAINTED = [long_and_foreign_names, maps_without_a_last_block]
# The others' figures are like those of these.
DRAWN = [*PAINTED, one_of_each, one_recipe_that_is_no_baseline, no_baseline]


def test_recipes_that_were_tested_on_other_rows(tmp_path):
    folder = write_study(tmp_path, recipes=["linear-last", "alf"], datasets=["digits"])
    for seed in (0, 1):
        rows = np.arange(120)
        write_run(folder, RunKey("tiny", "digits", 0, "mine", seed), rows, (rows * 7919 % 1000003) % 4, rows % 4)
    with pytest.raises(LayerFusionError, match="split 0 were tested on different rows"):
        report(folder)


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_studies(tmp_path, make):
    make(tmp_path)
    with nullcontext() if make in PAINTED else without_painting():
        path = report(tmp_path, with_figures=make in DRAWN)
    text = path.read_text(encoding="utf-8")
    for words in HOSTILE[make]:
        assert words in text
    assert " nan" not in text
    assert "-0.0" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    for file in path.parent.glob("*.tex"):
        check_latex(file.read_text(encoding="utf-8"))
    for file in path.parent.glob("*.png") if make in PAINTED else ():
        check_picture(file)
    read_csv(path.parent / "results.csv")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_study(tmp_path)
    text = report(folder, with_figures=True).read_text(encoding="utf-8")
    assert "- all of them: figures need matplotlib (pip install 'hf-layerfusion[plots]')\n" in text
    assert not list((folder / "report").glob("*.png"))
    with pytest.raises(LayerFusionError, match=r"need matplotlib: pip install 'hf-layerfusion\[plots\]'"):
        figures.plot_taps({"digits": {("linear-layer", 1): 1.0}}, folder / "x.png", title="x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 50% #1 $x$", r"a\_b \& 50\% \#1 \$x\$"),
        (r"\cmd{x}~^", r"\textbackslash{}cmd\{x\}\textasciitilde{}\textasciicircum{}"),
        ("±0.3 – -1.2 [+2, -3] alf-4 x-1", r"$\pm$0.3 -- $-$1.2 [+2, $-$3] alf-4 x-1"),
        ("naïve Ångström 数", r"na\"{i}ve \r{A}ngstr\"{o}m U+6570"),
        (Bold("1 < 2"), r"\textbf{1 \textless{} 2}"),
    ],
)
def test_latex_cells(text, expected):
    assert expected in Table(["a"], [[text]]).latex("caption", "name")


def test_markdown_cells():
    lines = Table(["name", "value"], [["a|b*_<i>", Bold("[1, 2]")], ["two\nlines", "`x`"]]).markdown()
    assert lines[0].replace(" ", "") == "|name|value|"
    assert lines[2].replace(" ", "") == r"|a\|b\*\_\<i\>|**[1,2]**|"
    assert lines[3].replace(" ", "") == r"|twolines|\`x\`|"
    assert len(set(map(len, lines[:4]))) == 1


def test_other_baseline(tmp_path):
    folder = write_study(tmp_path)
    scores = ScoredStudy.of(StudyResults.load(folder), "linear-all", num_resamples=50).scores
    assert scores["tiny"]["digits"]["linear-all"].gain is None
    assert scores["tiny"]["digits"]["linear-last"].gain.value < 0
    assert "## Gain over linear-all by dataset" in report(folder, baseline="linear-all").read_text(encoding="utf-8")


def test_tokens_are_shown_by_pool_and_depth(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: found.append(figure))
    names = ["12 · final_norm · cls", "12 · block · mean", "12 · block · cls", "2 · block · cls", "2 · block · mean"]
    matrix = np.arange(25.0).reshape(5, 5)
    figures.plot_similarity({"a": matrix}, [f"layer {name}" for name in names], tmp_path / "x.png", title="")
    axis = found[0].axes[0]
    shown = ["2 · cls", "12 · cls", "12 · final_norm · cls", "2 · mean", "12 · mean"]
    assert [text.get_text() for text in axis.get_yticklabels()] == shown
    order = [3, 2, 0, 4, 1]
    assert np.array_equal(axis.images[0].get_array(), matrix[np.ix_(order, order)])


def estimate(value):
    return Estimate(value, value - 0.02, value + 0.03, np.full(10, value))


def test_lines_by_number_of_layers():
    half = {"linear-last-cls-mean": estimate(0.1), "linear-all": estimate(0.3)}
    whole = {**half, "alf-last": estimate(0.2), "alf": estimate(0.4)}
    panels = figures.layer_count_panels({"a": whole, "b": half, "c": {"alf": estimate(0.1)}}, mean_estimate)
    assert list(panels) == ["mean of 2 datasets", "a", "b"]
    assert set(panels["mean of 2 datasets"]) == set(half)  # b has no attentive recipe
    assert figures.layer_count_panels({"c": {"alf": estimate(0.1)}}, mean_estimate) == {}


def test_token_labels():
    assert figures.token_labels(BLOCKS)[0][:2] == ["1 · cls", "1 · mean"]
    assert figures.token_labels(BLOCKS)[1] == "layer · pool (block)"
    names, parts = figures.token_labels([(11, "ln2", "cls"), (12, "final_norm", "cls"), (12, "pooler", "pooler")])
    assert names == ["11 · ln2 · cls", "12 · final_norm · cls", "12 · pooler"]
    assert parts == "layer · module · pool"


@pytest.mark.parametrize("name", ["short", "$a$", "x" * 100])
def test_labels(name):
    assert len(figures.label(name)) <= 32
    assert "$" not in figures.label(name).replace(r"\$", "")


@pytest.mark.parametrize("clustered", [False, True])
def test_names_of_points_do_not_overlap(tmp_path, monkeypatch, clustered):
    random = np.random.default_rng(0)
    scale = 0.02 if clustered else 0.5
    points = {f"dataset {n}": (0.5 + scale * random.random(), estimate(scale * random.random())) for n in range(20)}
    found = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: found.append(figure))
    figures.plot_depth(points, tmp_path / "depth.png", title="", quantity="gain")
    figure = found[0]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 20
    overlaps = [(a, b) for number, a in enumerate(boxes) for b in boxes[:number] if a.overlaps(b)]
    assert not overlaps
    frame = figure.axes[0].get_window_extent()
    assert all(
        frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes
    )


def test_lead_over_the_best_of_the_references(tmp_path):
    """The best reference of each dataset is another one, and is met on the same test images."""
    skills = {
        ("digits", "linear-all"): 0.8,
        ("digits", "alf"): 0.6,
        ("emoji", "linear-all"): 0.4,
        ("emoji", "alf"): 0.7,
        ("digits", "ridge-all"): 0.9,
        ("emoji", "ridge-all"): 0.65,
    }
    folder = write_study(
        tmp_path,
        datasets=DATASETS,
        recipes=("linear-all", "alf", "ridge-all"),
        skill=lambda *key: skills[key[1:3]],
    )
    content = json.loads((folder / "study.json").read_text())
    content["config"]["references"] = ["linear-all", "alf"]
    dump(folder / "study.json", content)
    text = report(folder).read_text(encoding="utf-8")
    section = text.split("## Lead over the best of linear-all, alf")[1].split("## Tests")[0]
    header, *rows = markdown_tables(section)["tiny"]
    assert header == ["recipe", "digits (linear-all)", "emoji (alf)", "mean", "least", "clear"]
    study = ScoredStudy.of(StudyResults.load(folder), "linear-all", num_resamples=200)
    expected = [
        100 * study.difference("tiny", dataset, "ridge-all", rival).value
        for dataset, rival in (("digits", "linear-all"), ("emoji", "alf"))
    ]
    assert expected[0] > 0 > expected[1]
    found = {row[0]: row[1:] for row in rows}
    assert [float(cell.replace("−", "-")) for cell in found["ridge-all"][:2]] == pytest.approx(expected, abs=0.051)
    assert float(found["ridge-all"][2].split()[0]) == pytest.approx(np.mean(expected), abs=0.051)
    assert float(found["ridge-all"][3]) == pytest.approx(min(expected), abs=0.051)
    assert found["alf"][1] == "0.0"
    assert "### Every recipe against alf" in text
    check_latex((folder / "report" / "references.tex").read_text(encoding="utf-8"))
