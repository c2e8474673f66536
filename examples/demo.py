"""The main job, end to end, on a real pretrained backbone and real images, without a model hub.

Extracts every layer once, fits four heads to the same features (linear on the last CLS token, linear on all layers,
least squares on all layers, Attentive Layer Fusion), compares them on held-out images, saves the ALF head, loads it back through `pipeline`,
classifies pictures with it and draws which layers it attends to.

    python examples/demo.py --backbone DIR [--dataset PATH_OR_HUB_ID] [--output_dir outputs/demo]

With a hub at hand the same road is `layerfusion train --backbone facebook/dinov2-small --dataset ...`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, PrinterCallback, pipeline, set_seed
from transformers.utils import logging

from hf_layerfusion import LayerFeatures, ViTForAttentiveLayerFusionClassification, extract_features, sweep
from hf_layerfusion.analysis import summarise_attentions
from hf_layerfusion.analysis.plots import plot_attention
from hf_layerfusion.data import label_options, open_dataset, open_digits, prepare_splits
from hf_layerfusion.hub.record import software_versions
from hf_layerfusion.training import build_trainer
from hf_layerfusion.training.evaluation import evaluate_head

# Three learning rates a recipe, a decade around its default; the largest comes last, so that ties go to a smaller one.
LEARNING_RATES = {
    "linear-last": (0.1, 0.3, 1.0),
    "linear-all": (0.003, 0.01, 0.03),
    "alf": (0.003, 0.01, 0.03),
}
SEEDS = (0, 1, 2)
EPOCHS = 80


def digits() -> DatasetDict:
    """scikit-learn's handwritten digits (1797 images of 8 x 8, BSD), 30 % held out, stratified."""
    rows = open_digits()["train"]
    train, test = train_test_split(np.arange(len(rows)), test_size=0.3, random_state=0, stratify=rows["label"][:])
    return DatasetDict({"train": rows.select(train), "test": rows.select(test)})


def train_head(
    model: ViTForAttentiveLayerFusionClassification,
    recipe: str,
    train: LayerFeatures,
    test: LayerFeatures,
    learning_rate: float,
    seed: int,
) -> tuple[ViTForAttentiveLayerFusionClassification, float, float]:
    """Train one head; returns it with its balanced accuracy on `test`, in percent, and the seconds it took."""
    set_seed(seed)
    head = ViTForAttentiveLayerFusionClassification.from_backbone(
        model.backbone,
        recipe=recipe,
        id2label=model.config.id2label,
        problem_type="single_label_classification",
        revision=model.config.backbone_revision,
        image_processor=model.image_processor,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            head,
            train,
            folder,
            eval_features=test,
            learning_rate=learning_rate,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            num_train_epochs=EPOCHS,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        accuracy = trainer.evaluate()["eval_balanced_accuracy"]
    return head, 100 * accuracy, time.perf_counter() - start


def fit_in_closed_form(recipe: str, train: LayerFeatures, test: LayerFeatures) -> dict[str, float | str]:
    """Choose a penalty on a fifth of the training rows and solve for all of them; the row of the table."""
    start = time.perf_counter()
    found = sweep(train, recipe=recipe, plot=False, progress=False)
    seconds = time.perf_counter() - start
    head = found.build_model()
    measured = evaluate_head(head, test.select_bank(head.config.bank))
    return {
        "recipe": recipe,
        "setting": f"penalty {found.best.ridge_penalty:g}",
        "balanced accuracy": 100 * measured["metrics"]["balanced_accuracy"],
        "seconds per head": seconds,
        "head MB": sum(parameter.numel() * parameter.element_size() for parameter in head.head.parameters()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="Hub id or folder of a vision model")
    parser.add_argument("--dataset", default="digits", help="'digits', a Hub id, an image folder or a saved dataset")
    parser.add_argument("--image_size", type=int, default=112, help="pixels")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()

    opened = digits() if arguments.dataset == "digits" else open_dataset(arguments.dataset)
    splits, image_column, label_column = prepare_splits(opened)

    # One model reads all the tokens that the four recipes need, in one pass over the images.
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        arguments.backbone,
        modules=["block", "final_norm"],
        image_size=arguments.image_size,
        **label_options(splits["train"], label_column),
    )
    features = {
        split: extract_features(
            model,
            splits[split],
            arguments.output_dir / "features" / split,
            image_column=image_column,
            label_column=label_column,
            overwrite=True,
        )
        for split in ("train", "test")
    }
    print(f"{len(features['train'])} training and {len(features['test'])} test images, ", end="")
    print(f"{len(features['train'].bank)} tokens each, after {time.perf_counter() - started:.0f} s")

    # The learning rate is chosen on a fifth of the training images; the test images are looked at once per head.
    fit, validation = features["train"].train_test_split(test_size=0.2, seed=0)
    table = []
    heads_in_all = sum(len(rates) + len(SEEDS) for rates in LEARNING_RATES.values())
    bar = tqdm(total=heads_in_all, desc="training heads", unit="head")
    for recipe, rates in LEARNING_RATES.items():
        on_validation = {}
        for rate in rates:
            on_validation[rate] = train_head(model, recipe, fit, validation, rate, SEEDS[0])[1]
            bar.update()
        rate = max(on_validation, key=on_validation.get)
        runs = []
        for seed in SEEDS:
            runs.append(train_head(model, recipe, features["train"], features["test"], rate, seed))
            bar.update()
        head = runs[0][0]
        accuracies = [run[1] for run in runs]
        size = sum(parameter.numel() * parameter.element_size() for parameter in head.head.parameters())
        table.append(
            {
                "recipe": recipe,
                "setting": f"lr {rate:g}",
                "balanced accuracy": float(np.mean(accuracies)),
                "spread over seeds": float(np.std(accuracies, ddof=1)),
                "seconds per head": float(np.mean([run[2] for run in runs])),
                "head MB": size / 1e6,
            }
        )
    bar.close()
    table.insert(2, fit_in_closed_form("ridge-all", features["train"], features["test"]))
    print(f"\n{'recipe':<14}{'balanced test accuracy':>24}{'setting':>16}{'s per head':>12}{'head MB':>9}")
    for row in table:
        spread = f" ± {row['spread over seeds']:.2f} %" if "spread over seeds" in row else " %       "
        accuracy = f"{row['balanced accuracy']:.2f}{spread}"
        print(
            f"{row['recipe']:<14}{accuracy:>24}{row['setting']:>16}"
            f"{row['seconds per head']:>12.1f}{row['head MB']:>9.2f}"
        )

    # Keep the ALF head, and load it back by name.
    measured = evaluate_head(head, features["test"])
    split = "test" if "test" in opened else "train, a fifth held out"
    if arguments.dataset == "digits":
        split = "30 % held out, stratified"
    source = Path(arguments.dataset)
    head.training_summary = {
        "dataset": source.resolve().name if source.exists() else arguments.dataset,  # a path means nothing elsewhere
        "split": split,
        "train_images": len(features["train"]),
        **measured,
        "hyperparameters": {
            "learning rate": rate,
            "epochs": EPOCHS,
            "image size": arguments.image_size,
            "seed": SEEDS[0],
            "chosen from": f"{len(LEARNING_RATES[recipe])} learning rates, on a fifth of the training images",
        },
        "environment": software_versions(),
    }
    folder = arguments.output_dir / "alf-head"
    shutil.rmtree(folder, ignore_errors=True)
    head.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    reloaded = AutoModelForImageClassification.from_pretrained(folder)
    pictures = splits["test"].select(range(8))
    pixel_values = model.image_processor(
        images=[picture.convert("RGB") for picture in pictures[image_column]], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        difference = (reloaded(pixel_values).logits - head.cpu().eval()(pixel_values).logits).abs().max().item()
    low, high = measured["confidence_intervals"]["balanced_accuracy"]
    print(
        f"\nbalanced accuracy of this head: {accuracies[0]:.2f} %, 95 % interval {100 * low:.2f} to {100 * high:.2f}"
    )
    print(f"saved to {folder}: {size:.1f} MB; logits of the reloaded head differ by at most {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("the reloaded head is not the one that was saved")

    classify = pipeline("image-classification", model=str(folder))
    names = splits["train"].features[label_column].names
    for picture, label in zip(pictures[image_column][:5], pictures[label_column][:5], strict=True):
        best = classify(picture, top_k=1)[0]
        print(f"a picture of {names[label]!r}: {best['label']!r} ({best['score']:.3f})")

    summary = summarise_attentions(head, features["test"].select_bank(head.config.bank).batches(256))
    plot_attention(summary, arguments.output_dir / "layer_attention.png", "Layer attention of the ALF head")
    summary.save_json(arguments.output_dir / "layer_attention.json")
    (arguments.output_dir / "results.json").write_text(json.dumps(table, indent=1))
    print(
        f"heatmap: {arguments.output_dir / 'layer_attention.png'}; all done in {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
