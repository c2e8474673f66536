"""The model card of a head, written from its config and its training run."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_layer_fusion import LayerFusionConfig
from ..recipes import find_recipe
from ..version import __version__


def build_card(config: LayerFusionConfig, training_summary: dict[str, Any], head_parameters: int) -> ModelCard:
    """Write the card.

    Args:
        config: of the head.
        training_summary: may hold `dataset` (a name), `metrics` (name to value, measured on `split`), `split`,
            `hyperparameters` and `repo_id`; `{}` for a head that was not trained by this library's commands.
        head_parameters: parameters of the head.
    """
    dataset = training_summary.get("dataset")
    metrics = training_summary.get("metrics", {})
    title = training_summary.get("repo_id") or f"{config.recipe} head" + (f" for {dataset}" if dataset else "")
    data = ModelCardData(
        library_name="hf_layerfusion",
        pipeline_tag="image-classification",
        base_model=_hub_id(config.backbone_name_or_path),
        tags=["layer-fusion", "image-classification", config.recipe],
        metrics=list(metrics) or None,
        model_name=title if metrics else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset or "unknown",
                dataset_name=dataset or "unknown",
                dataset_split=training_summary.get("split"),
                metric_type=name,
                metric_value=round(value, 4),
            )
            for name, value in metrics.items()
        ]
        or None,
    )
    recipe = find_recipe(config.recipe)
    names = config.token_names
    template = Template(files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"))
    body = template.substitute(
        title=title,
        summary=(
            f"A classification head over {'the frozen' if config.freeze_backbone else 'a fine-tuned'} backbone "
            f"`{_shown_backbone(config)}`, reading {len(names)} tokens from {len(set(config.layers))} layers."
        ),
        backbone=f"`{_shown_backbone(config)}`, revision `{config.backbone_revision or 'not on the Hub'}`",
        recipe=config.recipe,
        recipe_description=recipe.description,
        num_tokens=len(names),
        hidden_size=config.hidden_size,
        first_token=names[0],
        last_token=names[-1],
        head_type=config.head_type,
        parameters=f"{head_parameters:,}",
        labels=_shown_labels(config),
        repo=training_summary.get("repo_id", "path/or/name-of-this-head"),
        origin=_origin(config),
        results=_results(training_summary),
        version=__version__,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def write_card(
    folder: str | Path, config: LayerFusionConfig, training_summary: dict[str, Any], head_parameters: int
) -> None:
    """Write `README.md` into a head's folder."""
    Path(folder, "README.md").write_text(
        str(build_card(config, training_summary, head_parameters)), encoding="utf-8"
    )


def _hub_id(name_or_path: str | None) -> str | None:
    """A Hub id, or `None` for a folder: a path of one machine means nothing on another."""
    if not name_or_path or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path) or Path(name_or_path).is_dir():
        return None
    return name_or_path


def _shown_backbone(config: LayerFusionConfig) -> str:
    name = config.backbone_name_or_path or config.backbone_config.model_type
    return _hub_id(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _origin(config: LayerFusionConfig) -> str:
    """How whoever loads the head comes by its backbone."""
    if config.includes_backbone:
        return "The backbone's weights are in this repository."
    checked = "its weights are compared with the fingerprint in `config.json`"
    if _hub_id(config.backbone_name_or_path):
        return f"The backbone is fetched by name and revision, and {checked}."
    return (
        f"The backbone `{_shown_backbone(config)}` is not on the Hub. Where it cannot be found, load the head with "
        f'`AutoModelForImageClassification.from_pretrained(..., backbone="folder/of/the/backbone")`; {checked}.'
    )


def _shown_labels(config: LayerFusionConfig) -> str:
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    names = [" ".join(name.replace("|", "\\|").split()) for name in names]  # a table cell of one line
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{len(names)}: {shown}"


def _results(summary: dict[str, Any]) -> str:
    lines = []
    if summary.get("metrics"):
        where = f" on `{summary.get('dataset')}`, split `{summary.get('split')}`" if summary.get("dataset") else ""
        lines += ["", "## Results", "", f"Measured{where}.", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in summary["metrics"].items()]
    if summary.get("hyperparameters"):
        lines += ["", "## Training", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in summary["hyperparameters"].items()]
    return "\n".join([*lines, ""])
