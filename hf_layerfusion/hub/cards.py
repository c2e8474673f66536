"""The model card of a head, written from its config and its training record.

Names of classes, datasets and the like come from strangers: each is one line of limited length, and what Markdown, HTML
or the Hub's formulas would read as markup is written as a character reference. Metadata follow the Hub's specification
(https://github.com/huggingface/hub-docs/blob/main/modelcard.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_layer_fusion import ATTENDING_HEADS, MULTI_HEAD_TYPES, LayerFusionConfig
from ..files import write_file
from ..recipes import find_recipe
from ..version import __version__
from .card_figures import ATTENTION_NAME, CONFUSION_NAME, can_draw, draw_attention, draw_confusion_matrix
from .push import hub_id, public_name
from .record import RECORD_NAME, check_record, plain_text, write_record

CARD_NAME = "README.md"
PLACEHOLDER = "path/or/name-of-this-head"
_BACKBONE_PLACEHOLDER = "folder/of/the/backbone"
# Longer tables nobody reads: of more classes, as many worst and best ones.
_MOST_CLASSES, _WORST_CLASSES, _BEST_CLASSES = 20, 10, 5
# Rows of mappings that a stranger may have filled.
_MOST_ROWS = 50
# Test sets below it are called small, and so are classes.
_SMALL_TEST_SET, _SMALL_CLASS = 1000, 30

_METRICS = {
    "accuracy": "share of the images whose class is predicted",
    "balanced_accuracy": "mean over classes of the share of their images that are recognised",
    "macro_f1": "mean over classes of F1",
    "micro_f1": "F1 of all decisions together",
    "top5_accuracy": "share of the images whose class is among the five highest scores",
    "mean_average_precision": "mean over labels of the area under precision and recall",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "r2": "share of the variance that is explained",
}
# The metrics that a reader wants first, in the order of preference.
_HEADLINES = ("balanced_accuracy", "accuracy", "mean_average_precision", "macro_f1", "r2", "mae")

# What Markdown may read as markup; at the start of a line also the marks of a list, of `1.` the point. An underscore
# between letters is none.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])|^[-+=]|^\d{1,9}[.)](?= |$)")


def write_card(
    folder: str | Path, config: LayerFusionConfig, training_summary: Mapping[str, Any], head_parameters: int
) -> None:
    """Write a head's card into its folder: `README.md`, `training_record.json` and, with matplotlib, its figures.

    A record and figures of an earlier head in the same folder go.

    Args:
        folder: of the head.
        config: of the head.
        training_summary: as `build_card` takes it.
        head_parameters: parameters of the head.

    Raises:
        LayerFusionError: if the summary is not as it should be, naming the field.
    """
    record = check_record(training_summary)
    figures = write_figures(folder, config, record)
    content = str(build_card(config, record, head_parameters, figures=figures))
    if record:
        write_record(Path(folder, RECORD_NAME), record)
    else:
        Path(folder, RECORD_NAME).unlink(missing_ok=True)
    write_file(Path(folder, CARD_NAME), content.encode())


def write_figures(folder: str | Path, config: LayerFusionConfig, record: Mapping[str, Any]) -> list[str]:
    """Draw what a record has of `confusion_matrix` and `attention`, if matplotlib is installed.

    Args:
        folder: exists. Figures of the same names that do not belong to this record go.
        config: of the head.
        record: checked.

    Returns:
        The names of the files.
    """
    draw: dict[str, Callable[[Path], None]] = {}
    if "confusion_matrix" in record and can_draw():
        names = _class_names(config, record)
        draw[CONFUSION_NAME] = lambda path: draw_confusion_matrix(record["confusion_matrix"], names, path)
    if "attention" in record and can_draw():
        draw[ATTENTION_NAME] = lambda path: draw_attention(record["attention"], path)
    for name in (CONFUSION_NAME, ATTENTION_NAME):
        if name in draw:
            draw[name](Path(folder, name))
        else:
            Path(folder, name).unlink(missing_ok=True)
    return list(draw)


def build_card(
    config: LayerFusionConfig,
    training_summary: Mapping[str, Any],
    head_parameters: int,
    *,
    figures: Collection[str] = (),
) -> ModelCard:
    """Write the card.

    Args:
        config: of the head.
        training_summary: what is known of the training, `{}` for a head that was not trained by this library's
            commands. All fields are optional: `dataset` (a name), `dataset_id` (on the Hub), `split`, `train_images`,
            `test_images`; what `evaluate_head` measured (`metrics`, `confidence_intervals`, `per_class`,
            `confusion_matrix`, `attention`); `hyperparameters`, `environment`, `seconds`, `repo_id`, `license` (the
            Hub's identifier) and `notes` (sentences on data or backbone that stand among the limits).
        head_parameters: parameters of the head.
        figures: names of the figures that lie beside the card.

    Raises:
        LayerFusionError: if the summary is not as it should be, naming the field.
    """
    record = check_record(training_summary)
    repo = _repo_id(record.get("repo_id", ""))
    template = Template(files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"))
    body = template.substitute(
        title=escape(_title(config, record), 200),
        summary=_summary(config, record),
        facts=_facts(config, record, head_parameters),
        code=_code(repo or PLACEHOLDER),
        origin=_origin(config),
        many_heads=_many_heads(config, repo or PLACEHOLDER),
        training=_training(config, record),
        results=_results(config, record, figures),
        limits="\n".join(f"- {sentence}" for sentence in _limits(config, record)),
        environment=_environment(record),
    )
    return ModelCard(f"---\n{_metadata(config, record).to_yaml()}\n---\n\n{body}")


# ---- text of strangers ---------------------------------------------------------------------------------------------


def escape(text: Any, limit: int = 80) -> str:
    """A stranger's text for Markdown, in a line or a table's cell: it shows as it is and marks nothing up.

    Character references rather than backslashes, because the Hub reads formulas before it reads Markdown, and some
    renderers know fewer escapes than CommonMark does.
    """
    line = plain_text(text, limit) or "(empty)"
    return _MARKUP.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", line)


def code(text: Any, limit: int = 120) -> str:
    """A stranger's text as code, where nothing in it could end the code; else as text."""
    line = plain_text(text, limit)
    return f"`{line}`" if re.fullmatch(r"[\w./:·,+=()@% -]+", line) else escape(line, limit)


def _repo_id(text: str) -> str | None:
    """A repository's id as the Hub allows it, or `None`: what is in a record may be anything."""
    return text if re.fullmatch(r"\w[\w.-]{0,95}(/[\w.-]{1,96})?", text, flags=re.ASCII) else None


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- metadata ------------------------------------------------------------------------------------------------------


def _metadata(config: LayerFusionConfig, record: dict[str, Any]) -> ModelCardData:
    base_model = hub_id(config.backbone_name_or_path)
    metrics = dict(list(record.get("metrics", {}).items())[:_MOST_ROWS])
    name = plain_text(record.get("dataset") or record.get("dataset_id") or "") or "unknown"
    dataset_id = _repo_id(record.get("dataset_id", ""))
    license = record.get("license", "")
    tags = ["layer-fusion", "image-classification", plain_text(config.recipe)]
    return ModelCardData(
        library_name="hf_layerfusion",
        pipeline_tag="image-classification",
        license=license if re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,40}", license) else None,
        base_model=base_model,
        # Of the Hub's four relations: a head beside an unchanged backbone is an adapter.
        base_model_relation=base_model and ("adapter" if config.freeze_backbone else "finetune"),
        datasets=[dataset_id] if dataset_id else None,
        tags=tags,
        metrics=[plain_text(metric) for metric in metrics] or None,
        model_name=plain_text(_title(config, record), 200) if metrics else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                dataset_type=dataset_id or name,
                dataset_name=name,
                dataset_split=plain_text(record.get("split", "")) or None,
                metric_type=plain_text(metric),
                metric_name=plain_text(metric).replace("_", " "),
                metric_value=_rounded(value),
                # The only place of the format that takes values of one's own.
                metric_args=_interval_args(record.get("confidence_intervals", {}).get(metric)),
            )
            for metric, value in metrics.items()
        ]
        or None,
    )


def _interval_args(interval: list[float] | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {
        "confidence_interval": [_rounded(end) for end in interval],
        "confidence_level": 0.95,
        "method": "percentile bootstrap over test images",
    }


def _rounded(value: float) -> float:
    return round(value, 4) if abs(value) >= 0.001 else float(f"{value:.4g}")


# ---- what it is, and how to use it ---------------------------------------------------------------------------------


def _title(config: LayerFusionConfig, record: dict[str, Any]) -> str:
    dataset = record.get("dataset")
    return record.get("repo_id") or f"{config.recipe} head" + (f" for {dataset}" if dataset else "")


def _summary(config: LayerFusionConfig, record: dict[str, Any]) -> str:
    count = config.num_labels
    does = {
        "regression": f"predicts {_counted(count, 'number')} for a picture",
        "multi_label_classification": f"says which of {count} labels a picture has",
    }.get(config.problem_type or "", f"tells {_counted(count, 'class', 'classes')} of pictures apart")
    which = "the frozen" if config.freeze_backbone else "a fine-tuned"
    layers = len(set(config.layers))
    text = (
        f"A classification head that {does}, over {which} backbone {code(_shown_backbone(config))}, of which it reads "
        f"{_counted(len(config.token_names), 'token')} from {_counted(layers, 'layer')}."
    )
    metric = next((name for name in _HEADLINES if name in record.get("metrics", {})), None)
    if metric is None:
        return text
    value = _number(record["metrics"][metric])
    interval = record.get("confidence_intervals", {}).get(metric)
    sure = f" (95 % interval {_range(interval)})" if interval else ""
    return f"{text} On {_test_images(record)} its {metric.replace('_', ' ')} is **{value}**{sure}."


def _facts(config: LayerFusionConfig, record: dict[str, Any], head_parameters: int) -> str:
    names = config.token_names
    tokens = f"{len(names)} of width {config.hidden_size}, "
    tokens += f"from `{names[0]}` to `{names[-1]}`" if len(names) > 1 else f"`{names[0]}`"
    revision = config.backbone_revision or "not on the Hub"
    recipe = f"{code(config.recipe)}: {find_recipe(config.recipe).description}"
    rows = [
        ("backbone", f"{code(_shown_backbone(config))}, revision {code(revision)}"),
        ("recipe", recipe),
        ("tokens", tokens),
        ("head", f"{_head_kind(config)}{_head_parts(config)}, {head_parameters:,} parameters"),
        ("labels", _shown_labels(config)),
    ]
    if "dataset" in record:
        images = f", {record['train_images']:,} training images" if "train_images" in record else ""
        rows.append(("trained on", f"{code(record['dataset'])}{images}"))
    return _table(("", ""), rows)


def _head_kind(config: LayerFusionConfig) -> str:
    if config.num_members == 1:
        return config.head_type
    return f"ensemble, the mean of the logits of {config.num_members} heads: {config.head_type}"


def _head_parts(config: LayerFusionConfig) -> str:
    """Of a head with several queries or with embeddings, what its kind does not say."""
    if config.head_type not in ATTENDING_HEADS:
        return ""
    parts = f", {config.num_queries} queries" if config.num_queries > 1 else ""
    if parts and config.head_type in MULTI_HEAD_TYPES:
        parts += " whose outputs are averaged" if config.query_fusion == "mean" else " side by side"
    return f"{parts}, embeddings of the tokens' places" if config.token_embeddings else parts


def _shown_labels(config: LayerFusionConfig) -> str:
    names = [escape(config.id2label[index]) for index in range(min(10, config.num_labels))]
    more = f" and {config.num_labels - 10:,} more" if config.num_labels > 10 else ""
    return f"{config.num_labels:,}: {', '.join(names)}{more}"


def _shown_backbone(config: LayerFusionConfig) -> str:
    name = config.backbone_name_or_path or config.backbone_config.model_type
    return public_name(name)


def _code(repo: str) -> str:
    return (
        "import hf_layerfusion\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model="{repo}")\nprint(classify("image.png"))'
    )


def _origin(config: LayerFusionConfig) -> str:
    """How whoever loads the head comes by its backbone."""
    if config.includes_backbone:
        return "The backbone's weights are in this repository."
    checked = "its weights are compared with the fingerprint in `config.json`"
    if hub_id(config.backbone_name_or_path):
        return f"The backbone is fetched by name and revision, and {checked}."
    return (
        f"The backbone {code(_shown_backbone(config))} is not on the Hub. Where it cannot be found, load the head with "
        f'`AutoModelForImageClassification.from_pretrained(..., backbone="{_BACKBONE_PLACEHOLDER}")`; {checked}.'
    )


def _many_heads(config: LayerFusionConfig, repo: str) -> str:
    """How several heads share one pass of the backbone; nothing for a backbone that was changed for this head."""
    if config.includes_backbone or not config.freeze_backbone:
        return ""
    backbone = hub_id(config.backbone_name_or_path) or _BACKBONE_PLACEHOLDER
    return (
        "\nSeveral heads on this backbone need one pass of it per image:\n\n```python\nfrom hf_layerfusion import load_heads"
        f'\n\nheads = load_heads("{backbone}", ["{repo}", "another/head"])\n```\n'
    )


# ---- training ------------------------------------------------------------------------------------------------------


def _training(config: LayerFusionConfig, record: dict[str, Any]) -> str:
    settings = dict(list(record.get("hyperparameters", {}).items())[:_MOST_ROWS])
    if "train_images" in record:
        settings.setdefault("training images", record["train_images"])
    if "seconds" in record:
        settings["seconds"] = round(record["seconds"], 1)
    if not settings:
        return ""
    frozen = "The backbone was frozen: the head alone was trained."
    sentences = [frozen if config.freeze_backbone else "The backbone was trained together with the head."]
    if "chosen from" in settings:
        sentences.append("How the settings were chosen stands in the table; test images took no part in it.")
    rows = [(escape(name), escape(_shown_value(value), 200)) for name, value in settings.items()]
    return f"\n## Training\n\n{' '.join(sentences)}\n\n{_table(('setting', 'value'), rows)}\n"


def _shown_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- results -------------------------------------------------------------------------------------------------------


def _results(config: LayerFusionConfig, record: dict[str, Any], figures: Collection[str]) -> str:
    parts = [_metrics_table(record), _classes_table(record), _confusion(config, record, figures)]
    parts.append(_attention(record, figures))
    if ("confusion_matrix" in record or "attention" in record) and not figures:
        parts.append(
            f"The figures were left out, because matplotlib was not installed; their numbers are in `{RECORD_NAME}`."
        )
    text = "\n\n".join(part for part in parts if part)
    return f"\n## Results\n\n{text}\n" if text else ""


def _metrics_table(record: dict[str, Any]) -> str:
    metrics = dict(list(record.get("metrics", {}).items())[:_MOST_ROWS])
    if not metrics:
        return ""
    where = f" on {code(record['dataset'])}" if record.get("dataset") else ""
    where += f", split {code(record['split'])}" if where and record.get("split") else ""
    where += f": {_counted(record['test_images'], 'image')}" if where and "test_images" in record else ""
    intervals = record.get("confidence_intervals", {})
    header = ["metric", "value", *(["95 % interval"] if intervals else []), "what it is"]
    rows = []
    for name, value in metrics.items():
        interval = [_range(intervals[name]) if name in intervals else ""] if intervals else []
        rows.append([escape(name), _number(value), *interval, _METRICS.get(name, "")])
    how = " Intervals are 95 % percentile intervals of a bootstrap over test images." if intervals else ""
    return f"Measured{where}.{how}\n\n{_table(header, rows)}"


def _classes_table(record: dict[str, Any]) -> str:
    rows: list[dict[str, Any]] = record.get("per_class", [])
    if not rows:
        return ""
    if len(rows) <= _MOST_CLASSES:
        return f"### Classes\n\n{_rows_table(rows)}"
    tested = sorted((row for row in rows if row["f1"] is not None), key=lambda row: row["f1"])
    untested = len(rows) - len(tested)
    without = f", {untested:,} of them without a test image" if untested else ""
    worst, best = tested[:_WORST_CLASSES], tested[_WORST_CLASSES:][-_BEST_CLASSES:][::-1]
    parts = [f"### Classes\n\nThere are {len(rows):,} classes{without}; `{RECORD_NAME}` has a row for each."]
    for which, part in (("lowest", worst), ("highest", best)):
        if part:
            parts.append(f"The {_counted(len(part), 'class', 'classes')} with the {which} F1:\n\n{_rows_table(part)}")
    return "\n\n".join(parts)


def _rows_table(rows: Iterable[dict[str, Any]]) -> str:
    cells = (
        (escape(row["label"]), *(_share(row[name]) for name in ("precision", "recall", "f1")), f"{row['support']:,}")
        for row in rows
    )
    return _table(("class", "precision", "recall", "F1", "test images"), cells)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _class_names(config: LayerFusionConfig, record: Mapping[str, Any]) -> list[str]:
    """Names for the rows of the confusion matrix."""
    size = len(record["confusion_matrix"])
    listed = [row["label"] for row in record.get("per_class", [])]
    known = listed if len(listed) == size else [str(name) for _, name in sorted(config.id2label.items())]
    return known if len(known) == size else [str(number) for number in range(size)]


def _confusion(config: LayerFusionConfig, record: dict[str, Any], figures: Collection[str]) -> str:
    if "confusion_matrix" not in record:
        return ""
    matrix, names = record["confusion_matrix"], _class_names(config, record)
    pairs = [
        (count, sum(row), names[true], names[predicted])
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count and predicted != true
    ]
    pairs.sort(key=lambda pair: -pair[0])
    shown = [
        f"{escape(true, 40)} taken for {escape(predicted, 40)} ({count:,} of {total:,} images)"
        for count, total, true, predicted in pairs[:3]
    ]
    text = f"Most often confused: {'; '.join(shown)}." if shown else "No test image was put into a wrong class."
    if CONFUSION_NAME not in figures:
        return f"### Confusions\n\n{text}"
    images = sum(map(sum, matrix))
    alt = f"Confusion matrix of {len(matrix):,} classes on {images:,} test images, true classes in rows. {text}"
    return f"### Confusions\n\n![{alt}]({CONFUSION_NAME})\n\n{text}"


def _attention(record: dict[str, Any], figures: Collection[str]) -> str:
    if "attention" not in record:
        return ""
    attention = record["attention"]
    rows, names = attention["mean"], attention["token_names"]
    weights = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    order = sorted(range(len(names)), key=lambda token: -weights[token])[:3]
    shown = ", ".join(f"{escape(names[token])} ({_percent(weights[token])})" for token in order)
    heads = _counted(len(rows), "attention head")
    text = f"Averaged over {heads}, most weight goes to {shown}; equal weights would be {_percent(1 / len(names))}."
    if ATTENTION_NAME not in figures:
        return f"### What the head attends to\n\n{text}"
    alt = f"Weight of each of {len(names):,} tokens, and heatmap of {heads} by token. {text}"
    return f"### What the head attends to\n\n![{alt}]({ATTENTION_NAME})\n\n{text}"


# ---- limits --------------------------------------------------------------------------------------------------------


def _limits(config: LayerFusionConfig, record: dict[str, Any]) -> list[str]:
    metrics = record.get("metrics", {})
    backbone = hub_id(config.backbone_name_or_path)
    limits = [escape(note, 500) for note in record.get("notes", [])[:_MOST_ROWS]]
    if not metrics:
        limits.append("No test result is recorded: nothing is known here about how well it works.")
    else:
        limits.append(
            f"It was tested on {_test_images(record)} and on nothing else: not on pictures from other sources, of other "
            "quality or from another time, and not for differences between groups of people."
        )
    limits += _test_set_limits(record)
    if config.problem_type == "regression":
        limits.append("It gives a number for every picture, also for one that has nothing to do with its task.")
    elif config.problem_type == "multi_label_classification":
        limits.append("It knows no other labels. A label counts as present above a probability of one half.")
    else:
        limits.append("Every picture gets one of its classes, also one that shows none of them.")
    limits.append("Whether its scores are right as probabilities was not measured.")
    if backbone:
        link = f"[{escape(backbone)}](https://huggingface.co/{backbone})"
        limits.append(f"What its backbone was trained on, and the limits that come from there, stand at {link}.")
    else:
        limits.append(
            f"Its backbone {code(_shown_backbone(config))} is not on the Hub, and what that was trained on is not "
            "recorded here: test pictures may have been among it."
        )
    return limits


def _test_set_limits(record: dict[str, Any]) -> list[str]:
    """What the size of the test set says about the results."""
    limits = []
    intervals, images = record.get("confidence_intervals", {}), record.get("test_images", 0)
    if intervals:
        limits.append(
            "The intervals are those of one trained head and one division into training and test images; another seed or "
            "division adds to them. They take test images as independent: where several come from one source, they are "
            "too narrow."
        )
    if 0 < images < _SMALL_TEST_SET:
        limits.append(f"The test set is small ({_counted(images, 'image')}).")
    certain = [name for name, ends in intervals.items() if ends == [1, 1]]
    if certain and images > 3:
        # No event in n trials: 3 / n is the upper end of the 95 % interval (Hanley and Lippman-Hand 1983).
        limits.append(
            f"Where no test image is wrong ({', '.join(map(escape, certain[:_MOST_ROWS]))}), a bootstrap cannot see how "
            f"many others would be: a share of up to {_percent(3 / images)} would go with that too."
        )
    supports = [row["support"] for row in record.get("per_class", [])]
    few = sum(support < _SMALL_CLASS for support in supports)
    if few:
        limits.append(
            f"{few:,} of {_counted(len(supports), 'class', 'classes')} had fewer than {_SMALL_CLASS} test images: what is "
            "said of each of these is rough."
        )
    return limits


def _environment(record: dict[str, Any]) -> str:
    versions = dict(list(record.get("environment", {}).items())[:_MOST_ROWS])
    if not versions:
        return f"Card written by hf_layerfusion {__version__}."
    return _table(("", ""), [(escape(name), escape(value)) for name, value in versions.items()])


# ---- numbers -------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(interval: Sequence[float]) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}"


def _counted(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def _test_images(record: dict[str, Any]) -> str:
    images = _counted(record["test_images"], "image") if "test_images" in record else "images"
    split = f"split {code(record['split'])} of " if record.get("split") and record.get("dataset") else ""
    return f"{images} of {split}{code(record['dataset'])}" if record.get("dataset") else images


__all__ = ["build_card", "escape", "write_card", "write_figures"]
