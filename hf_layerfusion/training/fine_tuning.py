"""Train the backbone too: the fine-tuning baseline of arXiv 2601.09322, and low-rank adapters (LoRA)."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.utils import is_peft_available, logging

from ..anatomy import find_blocks
from ..backbones import OpenedBackbone, open_backbone, quantization_of, unwrap_backbone
from ..data import find_image_column, find_label_column, label_options
from ..errors import LayerFusionError
from ..features.manifest import describe_difference, plain_values
from ..files import write_json
from ..images import check_images
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..recipes import find_recipe
from ..version import __version__
from .class_weights import class_weights
from .collators import ImageCollator
from .optimization import adamw
from .run import MAX_GRADIENT_NORM, MIN_LEARNING_RATE, default_batch_size, default_epochs

logger = logging.get_logger(__name__)

# The reference's `scripts/end_2_end_eval_linear_probe_finetuning.py`.
MAX_BATCH_SIZE = 256
# Learning rate of what is trained in the backbone, relative to the head's. The first is the reference's
# (`LinearProbe._get_optimizer`); adapters begin at zero and must go further than weights that are trained already.
BACKBONE_LR_FACTORS = {"fine-tune": 1e-3, "lora": 1e-2}
RECIPES = tuple(BACKBONE_LR_FACTORS)

RUN_NAME = "fine_tuning.json"
ADAPTER_FOLDER = "adapter"
# Share of the steps between two checkpoints.
_SAVE_STEPS = 0.1


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    is_finished: bool


def fine_tune(
    backbone: str | Path | PreTrainedModel,
    train: Dataset,
    *,
    recipe: str = "fine-tune",
    output_dir: str | Path | None = None,
    image_processor: Any | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_labels: int | None = None,
    id2label: dict[int, str] | Sequence[str] | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    learning_rate: float | None = None,
    backbone_lr_factor: float | None = None,
    weight_decay: float | None = None,
    noise_std: float | None = None,
    num_train_epochs: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    balance_classes: bool = True,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    merge_adapters: bool = True,
    progress: bool = True,
    **training_arguments: Any,
) -> ViTForAttentiveLayerFusionClassification:
    """Train a linear head on the last CLS token together with the backbone, or with low-rank adapters in it.

    The protocol is that of the reference (arXiv 2601.09322, appendix, and its `linear_probe.py`): AdamW, the backbone's
    learning rate a fixed fraction of the head's and its weight decay 1e-6, cosine per step to 1e-6 (for the backbone the
    same fraction of it), gradients clipped at a norm of 5, classes weighted by n / (C * count), batches of up to 256
    images, at least 40 epochs and 1000 steps. Images are decoded and processed anew in every epoch, without
    augmentation.

    `"lora"` (arXiv 2106.09685) puts adapters on every linear layer of the blocks, as arXiv 2305.14314 advises, and trains
    them and the head; it needs the package peft.

    Args:
        backbone: Hub id, folder, or a model in memory, of which a copy is trained. Weights are trained in float32;
            `bf16=True` computes in bfloat16.
        train: training images with class indices.
        recipe: `"fine-tune"` or `"lora"`.
        output_dir: folder of the checkpoints. The same call goes on from the last one that is whole. `None` to keep
            nothing.
        image_processor: by default the one stored beside the backbone.
        image_column: by default the only column of images.
        label_column: by default `label` or `labels`.
        num_labels: number of classes; by default read off the labels.
        id2label: their names, likewise.
        problem_type: `"single_label_classification"`, the only one there is here, so that what
            `hf_layerfusion.data.label_options` gives can be passed on.
        revision: of a backbone on the Hub.
        learning_rate: of the head; by default the recipe's.
        backbone_lr_factor: learning rate of the backbone or its adapters, relative to the head's; by default
            `BACKBONE_LR_FACTORS`.
        weight_decay: of the head; by default the recipe's.
        noise_std: of Gaussian noise on the normalised token, for half of the images (the reference: 0.05); off by
            default.
        num_train_epochs: by default 40, or as many as make 1000 steps.
        batch_size: images per step and process; by default up to 256, and at least five batches an epoch.
        seed: of the head's and the adapters' first weights, the order of the images, dropout and noise.
        balance_classes: weight the classes in the loss.
        lora_rank: of the adapters.
        lora_alpha: adapters are scaled by `lora_alpha / lora_rank`.
        lora_dropout: on the adapters' inputs.
        merge_adapters: add the trained adapters to the weights, so that the model is a plain one that `save_pretrained`
            writes whole. Otherwise they stay in the backbone: save the model with `include_backbone=False`, and load it
            with `backbone=OUTPUT_DIR/adapter`. That folder is written in both cases.
        progress: show progress bars.
        training_arguments: for `transformers.TrainingArguments`, such as `use_cpu`, `bf16`, `max_steps`,
            `dataloader_num_workers`, `gradient_accumulation_steps`.

    Returns:
        The trained model, in eval mode. `training_summary` has the hyper-parameters and the number of trained parameters.

    Raises:
        LayerFusionError: for an unknown recipe, rows without images or classes, images that cannot be read, a backbone
            that cannot be trained, peft missing, bad numbers, or an `output_dir` that holds another run.
    """
    if recipe not in RECIPES:
        raise LayerFusionError(f"recipe {recipe!r} does not train the backbone: choose from {', '.join(RECIPES)}")
    _check_numbers(
        lora_rank=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, batch_size=batch_size, seed=seed
    )
    _check_numbers(learning_rate=learning_rate, weight_decay=weight_decay, num_train_epochs=num_train_epochs)
    _check_numbers(backbone_lr_factor=backbone_lr_factor)
    if problem_type not in (None, "single_label_classification"):
        raise LayerFusionError(f"problem_type={problem_type!r}: fine_tune trains classifiers of one class per image")
    if unknown := sorted(training_arguments.keys() - {field.name for field in fields(TrainingArguments)}):
        raise LayerFusionError(f"{unknown[0]!r} is no option of fine_tune or of transformers.TrainingArguments")
    if recipe == "lora" and not is_peft_available():
        raise LayerFusionError("recipe 'lora' needs the package peft: pip install 'hf-layerfusion[peft]'")
    rows, image_column, label_column, labels, options = _checked_rows(
        train, image_column, label_column, num_labels, id2label, progress
    )
    defaults = find_recipe(recipe)
    factor = BACKBONE_LR_FACTORS[recipe] if backbone_lr_factor is None else backbone_lr_factor
    # Before the first weights of the head and the adapters are drawn.
    set_seed(seed)
    opened = _open_for_training(backbone, revision, image_processor)
    adapted: Any = None
    if recipe == "lora":
        adapted = _add_adapters(opened.model, lora_rank, lora_alpha, lora_dropout)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        adapted or opened.model,
        recipe=recipe,
        image_processor=opened.image_processor,
        backbone_lr_factor=factor,
        noise_std=noise_std,
        freeze_backbone=False,
        **options,
    )
    if adapted is None or merge_adapters:
        # What the weights began as; `from_backbone` was given a model in memory.
        model.config.backbone_name_or_path, model.config.backbone_revision = opened.name_or_path, opened.revision
    weights = class_weights(labels, model.config.num_labels)  # which also refuses labels out of range
    model.config.class_weights = weights if balance_classes else None
    batch_size = batch_size or min(MAX_BATCH_SIZE, default_batch_size(len(rows)))
    collator = ImageCollator(model.image_processor, image_column, label_column, model.config.num_labels)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            **{
                "output_dir": scratch if output_dir is None else str(output_dir),
                "learning_rate": defaults.learning_rate if learning_rate is None else learning_rate,
                "weight_decay": defaults.weight_decay if weight_decay is None else weight_decay,
                "num_train_epochs": num_train_epochs or default_epochs(len(rows), batch_size),
                "per_device_train_batch_size": batch_size,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": MIN_LEARNING_RATE},
                "max_grad_norm": MAX_GRADIENT_NORM,
                "seed": seed,
                "save_strategy": "no" if output_dir is None else "steps",
                "save_steps": _SAVE_STEPS,
                "save_total_limit": 1,
                "report_to": "none",
                "disable_tqdm": not progress,
                # The collator needs the images, which `forward` does not name.
                "remove_unused_columns": False,
                **training_arguments,
            }
        )
        checkpoint = None
        if output_dir is not None:
            run = _describe_run(model, recipe, train, image_column, label_column, arguments)
            run["adapters"] = [lora_rank, lora_alpha, lora_dropout] if adapted else None
            checkpoint = _begin(Path(output_dir), run, arguments.process_index == 0)
        if checkpoint is not None and checkpoint.is_finished:
            # Trainer would take one step more.
            model.load_state_dict(load_file(checkpoint.path / "model.safetensors"), strict=False)
        else:
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                data_collator=collator,
                optimizer_cls_and_kwargs=adamw(model, arguments),
            )
            _train(trainer, checkpoint)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if adapted is not None:
        if output_dir is not None and arguments.process_index == 0:
            adapted.save_pretrained(Path(output_dir, ADAPTER_FOLDER))
        if merge_adapters:
            adapted.merge_and_unload()
            model.backbone.requires_grad_(True)
    model.training_summary = {
        "hyperparameters": {
            "learning rate": arguments.learning_rate,
            "backbone learning rate": factor * arguments.learning_rate,
            "weight decay": arguments.weight_decay,
            "epochs": arguments.num_train_epochs,
            "batch size": batch_size,
            "training images": len(rows),
            "trained parameters": trained,
            "seed": seed,
        }
    }
    return model.eval()


@torch.no_grad()
def predict_images(
    model: ViTForAttentiveLayerFusionClassification,
    dataset: Dataset,
    *,
    image_column: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Classify the images of a dataset.

    Args:
        model: with its image processor; it is left in eval mode.
        dataset: whose labels, if any, are not looked at.
        image_column: by default the only column of images.
        batch_size: images per forward pass.
        num_workers: processes that decode and process images.
        progress: show a progress bar.

    Returns:
        `(T,)` int64, class indices.

    Raises:
        LayerFusionError: if the dataset has no such column, or an image cannot be read.
    """
    _check_dataset(dataset, "predict_images")
    image_column = find_image_column(dataset, image_column)
    images = dataset.select_columns([image_column]).with_format(None).cast_column(image_column, Image(decode=False))
    collator = ImageCollator(model.image_processor, image_column)
    loader = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=collator)  # type: ignore[arg-type]
    model.eval()
    found = [
        model(**{name: value.to(model.device) for name, value in batch.items()}).logits.argmax(dim=-1).cpu()
        for batch in tqdm(loader, desc="predicting", unit="batch", delay=2, disable=not progress)
    ]
    return torch.cat(found).numpy() if found else np.empty(0, dtype=np.int64)


def _train(trainer: Trainer, checkpoint: _Checkpoint | None) -> None:
    cause: LayerFusionError | None = None
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
    except LayerFusionError as error:
        # On a CPU, `forward` refuses what a diverged backbone gives. Before the first step, nothing has diverged.
        if "NaN or infinite" not in str(error) or not trainer.state.global_step:
            raise
        cause = error
    model: Any = trainer.model
    if cause is not None or not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise LayerFusionError(
            f"training diverged with learning_rate={trainer.args.learning_rate:g} and "
            f"backbone_lr_factor={model.config.backbone_lr_factor:g}: use smaller ones"
        ) from cause


def _check_dataset(dataset: Any, function: str) -> None:
    if not isinstance(dataset, Dataset):
        raise LayerFusionError(
            f"{function} takes one datasets.Dataset, not a {type(dataset).__name__}: "
            "choose a split, such as dataset['train']; a stream has no rows to shuffle"
        )


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is None:  # for a default
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name in ("lora_rank", "batch_size"):
            fits, cure = type(value) is int and value > 0, "use a whole number from 1 up"
        elif name == "seed":
            fits, cure = type(value) is int and 0 <= value < 2**32, "use a whole number from 0 up"
        elif name == "lora_dropout":
            fits, cure = is_number and 0 <= value < 1, "use 0 or more, less than 1"
        elif name in ("weight_decay", "backbone_lr_factor"):
            fits, cure = is_number and value >= 0, "use 0 or a number above it"
        else:
            fits, cure = is_number and value > 0, "use a number above 0"
        if not fits:
            raise LayerFusionError(f"{name}={value!r}: {cure}")


def _checked_rows(
    train: Dataset,
    image_column: str | None,
    label_column: str | None,
    num_labels: int | None,
    id2label: Any,
    progress: bool,
) -> tuple[Dataset, str, str, np.ndarray, dict[str, Any]]:
    """The rows as the collator reads them, their columns and labels, and what the config needs to know of those."""
    _check_dataset(train, "fine_tune")
    if not len(train):
        raise LayerFusionError("the dataset is empty: there is nothing to train on")
    image_column, label_column = find_image_column(train, image_column), find_label_column(train, label_column)
    plain = train.select_columns([image_column, label_column]).with_format(None)
    column = plain.select_columns([label_column])[label_column][:]
    labels = np.asarray(column)
    if None in column or labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise LayerFusionError(
            f"label column {label_column!r} holds {train.features[label_column]}"
            f"{' and rows without a label' if None in column else ''}: fine_tune needs one class index per row "
            "(hf_layerfusion.data.prepare_splits numbers text labels)"
        )
    if len(np.unique(labels)) < 2:
        raise LayerFusionError("all rows have one class: there is nothing to tell apart")
    options = label_options(plain, label_column)
    if num_labels is not None or id2label is not None:
        options = {"num_labels": num_labels, "id2label": id2label, "problem_type": "single_label_classification"}
    # Undecoded, so that unreadable files are named.
    rows = plain.cast_column(image_column, Image(decode=False))
    check_images(rows[image_column], progress=progress)
    return rows, image_column, label_column, labels.astype(np.int64), options


def _open_for_training(
    backbone: str | Path | PreTrainedModel, revision: str | None, image_processor: Any | None
) -> OpenedBackbone:
    """A backbone that is the caller's no more, in float32, every weight trainable."""
    if isinstance(backbone, str | Path):
        opened = open_backbone(backbone, revision=revision, image_processor=image_processor, dtype=torch.float32)
    else:
        model = unwrap_backbone(backbone)
        if method := quantization_of(model):
            raise LayerFusionError(
                f"a {method}-quantised backbone cannot be fine-tuned: load it without quantization_config"
            )
        opened = open_backbone(deepcopy(model), revision=revision, image_processor=image_processor)
        opened.model.float()
    opened.model.requires_grad_(True)
    return opened


def _add_adapters(backbone: PreTrainedModel, rank: int, alpha: float, dropout: float) -> Any:
    """A PEFT model around the backbone, with LoRA on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model

    targets = [
        path
        for block in find_blocks(backbone)
        for path, module in backbone.get_submodule(block.path).named_modules(prefix=block.path)
        if isinstance(module, nn.Linear)
    ]
    if not targets:
        raise LayerFusionError(
            f"no linear layer was found in the blocks of this {type(backbone).__name__}, so there is no place for "
            "adapters: use recipe='fine-tune'"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)  # type: ignore[arg-type]
    return get_peft_model(backbone, config)  # type: ignore[arg-type]


def _describe_run(
    model: ViTForAttentiveLayerFusionClassification,
    recipe: str,
    train: Dataset,
    image_column: str,
    label_column: str,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """All that the numbers depend on, as JSON gives it back."""
    names = (
        *("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "max_grad_norm", "seed", "data_seed", "bf16", "fp16", "optim"),
    )
    config = model.config
    return plain_values(
        {
            "version": __version__,
            "recipe": recipe,
            "backbone": (config.backbone_fingerprint or {}).get("digest"),
            "processor": None if model.image_processor is None else model.image_processor.to_dict(),
            "dataset": {
                "fingerprint": train._fingerprint,
                "rows": len(train),
                "image_column": image_column,
                "label_column": label_column,
            },
            "num_labels": config.num_labels,
            "class_weights": config.class_weights,
            "noise_std": config.noise_std,
            "backbone_lr_factor": config.backbone_lr_factor,
            "arguments": {name: getattr(arguments, name) for name in names},
        }
    )


def _begin(folder: Path, run: dict[str, Any], is_main_process: bool) -> _Checkpoint | None:
    """Note in a folder what is trained there, and find the checkpoint to go on from.

    Raises:
        LayerFusionError: if the folder holds another run, or cannot be written to.
    """
    note = folder / RUN_NAME
    run = plain_values(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        steps = sorted(
            (int(path.name.removeprefix("checkpoint-")), path)
            for path in folder.glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdigit()
        )
        if note.is_file():
            difference = describe_difference(json.loads(note.read_text(encoding="utf-8")), run)
        else:
            difference = "it does not say what it trained" if steps else None
        if difference is not None:
            raise LayerFusionError(
                f"{folder} holds another run ({difference}): choose another output_dir, or remove that one"
            )
        if is_main_process and not note.is_file():
            write_json(note, run)
    except LayerFusionError:
        raise
    except (OSError, ValueError) as error:
        raise LayerFusionError(f"output_dir={str(folder)!r} cannot be used: {error}") from error
    for _, path in reversed(steps):
        try:
            # Trainer writes its state last.
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return _Checkpoint(path, is_finished=state["global_step"] >= state["max_steps"])
        except (OSError, ValueError, KeyError):
            logger.warning(f"{path} is unfinished, so training goes on from an earlier checkpoint or begins anew")
    return None


__all__ = ["BACKBONE_LR_FACTORS", "fine_tune", "predict_images"]
