"""Train a head over all layers of a frozen vision backbone with `transformers.Trainer`.

    python examples/run_layer_fusion.py \
        --backbone facebook/dinov2-small --dataset beans --output_dir outputs/beans \
        --do_train --do_eval --learning_rate 1e-2 --num_train_epochs 40

Features are extracted once and cached; `--train_from_pixels` runs the backbone in every step instead, which an unfrozen
backbone (`--freeze_backbone False`) needs. Works under `accelerate launch`; for two processes on CPUs:

    accelerate launch --multi_gpu --num_processes 2 examples/run_layer_fusion.py ... --use_cpu --ddp_backend gloo

(`accelerate launch --cpu --num_processes 2` starts one process unless MPI is installed.) A second run with the same
output folder goes on from the last checkpoint. All arguments may stand in a JSON file:
`python examples/run_layer_fusion.py arguments.json`.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from datasets import Image
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_layerfusion import RECIPES, LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.data import label_options, open_dataset, prepare_splits
from hf_layerfusion.training import (
    ImageCollator,
    LayerFeatureCollator,
    LayerFusionTrainer,
    adamw,
    build_compute_metrics,
    class_weights,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The backbone and the head."""

    backbone: str = field(metadata={"help": "Hub id or folder of a vision model."})
    backbone_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the backbone."})
    recipe: str = field(default="alf", metadata={"help": f"One of {', '.join(RECIPES)}."})
    layers: str | None = field(
        default=None, metadata={"help": "all, last, a:b, spaced:n, 3,6,12, or, with an equals sign, --layers=-1,-2."}
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "Dropout on the layer attentions; default: the recipe's."}
    )
    noise_std: float = field(default=0.0, metadata={"help": "Gaussian noise on the tokens; the paper uses 0.05."})
    freeze_backbone: bool = field(default=True, metadata={"help": "False fine-tunes the backbone too."})
    backbone_lr_factor: float = field(
        default=1e-3, metadata={"help": "Learning rate of an unfrozen backbone, relative to the head's."}
    )


@dataclass
class DataArguments:
    """The images."""

    dataset: str = field(metadata={"help": "Hub id, folder of images, or saved dataset."})
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the only image column."})
    label_column: str | None = field(default=None, metadata={"help": "Default: 'label'."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels, if other than the processor says."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use fewer training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use fewer test images."})
    features_dir: str | None = field(default=None, metadata={"help": "Default: OUTPUT_DIR/features."})
    extraction_batch_size: int = field(default=32, metadata={"help": "Images per forward pass of the backbone."})
    train_from_pixels: bool = field(default=False, metadata={"help": "Run the backbone in every step."})
    balance_classes: bool = field(default=False, metadata={"help": "Weight the classes by n / (C * count)."})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    try:
        if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
            model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
        else:
            model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    except (OSError, TypeError, ValueError) as error:  # no such file, unknown arguments, arguments that lack
        raise LayerFusionError(f"the arguments cannot be used: {error}") from error
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        level=logging.INFO if training_args.should_log else logging.WARNING,
    )
    if not training_args.do_train:
        raise LayerFusionError(
            "there is nothing to do without --do_train; `layerfusion evaluate` measures a saved head"
        )
    if not model_args.freeze_backbone:
        data_args.train_from_pixels = True  # tokens of a backbone that learns cannot be cached
    set_seed(training_args.seed)

    # The images.
    opened = open_dataset(data_args.dataset, name=data_args.dataset_name)
    splits, image_column, label_column = prepare_splits(opened, data_args.image_column, data_args.label_column)
    for split, limit in (("train", data_args.max_train_samples), ("test", data_args.max_eval_samples)):
        if limit is not None:
            rows = splits[split].shuffle(seed=0)
            splits[split] = rows.select(range(min(limit, len(rows))))

    # The model.
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        model_args.backbone,
        revision=model_args.backbone_revision,
        recipe=model_args.recipe,
        layers=model_args.layers,
        attention_dropout=model_args.attention_dropout,
        noise_std=model_args.noise_std,
        freeze_backbone=model_args.freeze_backbone,
        backbone_lr_factor=model_args.backbone_lr_factor,
        **({"image_size": data_args.image_size} if data_args.image_size else {}),
        **label_options(splits["train"], label_column),
    )
    if data_args.balance_classes:
        model.config.class_weights = class_weights(splits["train"][label_column][:], model.config.num_labels)

    # From pixels, or from features, of which each process extracts its share.
    if data_args.train_from_pixels:
        training_args.remove_unused_columns = False
        datasets = {split: rows.cast_column(image_column, Image(decode=False)) for split, rows in splits.items()}
        collator = ImageCollator(model.image_processor, image_column, label_column, model.config.num_labels)
    else:
        folder = Path(data_args.features_dir or Path(training_args.output_dir, "features"))
        datasets = {
            split: extract_features(
                model.to(training_args.device),
                splits[split],
                folder / split,
                image_column=image_column,
                label_column=label_column,
                batch_size=data_args.extraction_batch_size,
                progress=training_args.should_log,
            )
            for split in ("train", "test")
        }
        collator = LayerFeatureCollator(len(model.config.bank), model.config.num_labels)

    if training_args.should_log:
        transformers.utils.logging.set_verbosity_info()
    trainer = LayerFusionTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["test"],
        data_collator=collator,
        compute_metrics=build_compute_metrics(model.config),
        processing_class=model.image_processor,
        optimizer_cls_and_kwargs=adamw(model, training_args),
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and os.path.isdir(training_args.output_dir):
        checkpoint = get_last_checkpoint(training_args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        names = ("accuracy", "balanced_accuracy", "macro_f1")
        model.training_summary = {
            "dataset": Path(data_args.dataset).name if os.path.exists(data_args.dataset) else data_args.dataset,
            "split": "test",
            "metrics": {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics},
        }

    trainer.save_model()  # and pushes, with --push_to_hub


if __name__ == "__main__":
    try:
        main()
    except LayerFusionError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
