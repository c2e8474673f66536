"""Made-up study folders, written as a study writes them, without the training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf_layerfusion.study.results import RunKey

NUM_LAYERS = 12
MODULES = ("ln1", "attention", "residual", "ln2", "fc1", "activation", "fc2", "block")
BLOCKS = [[layer, "block", pool] for layer in range(1, NUM_LAYERS + 1) for pool in ("cls", "mean")]
LAST = [[NUM_LAYERS, "final_norm", "cls"]]


def bank_of(recipe: str) -> list[list]:
    """The tokens that a recipe reads from twelve blocks."""
    family, *values = recipe.split(":")
    if family.startswith("module-"):
        return [[int(values[0]), values[1], "mean"]]
    if family == "aat-layer":
        return [[int(values[0]), "block", "tokens"]]
    if family == "linear-layer":
        return [[int(values[0]), "block", pool] for pool in ("cls", "mean")]
    if family in ("linear-last", "knn-last", "fine-tune", "lora"):
        return LAST
    if family in ("alf-last", "linear-last-cls-mean"):
        return [*LAST, [NUM_LAYERS, "final_norm", "mean"]]
    if family.startswith("aat"):
        return [[NUM_LAYERS, "final_norm", "tokens"]]
    layers = {"mid-last": (6, 12), "quarterly": (3, 6, 9, 12)}.get(family.partition("-")[2])
    return [row for row in BLOCKS if layers is None or row[0] in layers]


def default_skill(backbone: str, dataset: str, recipe: str, split: int, seed: int) -> float:
    """The share of the items that a run gets right: more layers, more right; no two recipes or datasets alike."""
    layers = len({layer for layer, _, _ in bank_of(recipe)})
    tone = np.random.default_rng(sum(map(ord, backbone + dataset + recipe.partition(":")[0]))).uniform(-0.03, 0.03)
    depth = 0.0
    if ":" in recipe:
        parts = recipe.split(":")
        depth = -0.01 * abs(int(parts[1]) - 9) + 0.004 * (MODULES.index(parts[2]) if len(parts) > 2 else 0)
    chance = np.random.default_rng([split, seed, len(recipe)]).normal(0, 0.004)
    return float(np.clip(0.72 + 0.01 * layers + tone + depth + chance, 0.05, 0.99))


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def write_run(folder: Path, key: RunKey, rows: np.ndarray, labels: np.ndarray, predictions: np.ndarray, **fields):
    """The two files of one run; `fields` replace what its JSON file would say."""
    bank = bank_of(key.recipe)
    recalls = [np.mean(predictions[labels == label] == label) for label in np.unique(labels)]
    content: dict[str, Any] = {**key._asdict(), "num_labels": int(max(labels.max(), predictions.max())) + 1}
    content["metrics"] = {
        "balanced_accuracy": float(np.mean(recalls)),
        "accuracy": float(np.mean(predictions == labels)),
    }
    content |= {"validation_score": 0.8, "setting": {"learning_rate": 0.01, "weight_decay": 0.1}, "bank": bank}
    content |= {"num_parameters": 1000 * len(bank), "bytes_per_image": 768 * len(bank), "seconds": 1.5}
    content |= {"train_rows": 3 * len(rows), "test_rows": len(rows), "num_settings": 63}
    content |= {"attention": None, "depth": None, "protocol": "paper", "identity": "0" * 64}
    if key.recipe.startswith("alf") and len(bank) > 1:
        random = np.random.default_rng(sum(map(ord, key.dataset)))
        peak = random.uniform(0.3, 0.95) * NUM_LAYERS
        scores = [-(((layer - peak) / 4) ** 2) + 0.3 * (pool == "cls") for layer, _, pool in bank]
        noise = random.normal(0, 0.6, (len(bank), len(bank)))
        attention = np.exp(np.asarray(scores) + noise)
        attention /= attention.sum(axis=1, keepdims=True)
        depth = float(attention.mean(axis=0) @ [layer / NUM_LAYERS for layer, _, _ in bank])
        content |= {"attention": attention.tolist(), "depth": {"expected_depth": depth, "entropy": 2.5}}
    dump(folder / "runs" / f"{key.stem}.json", content | fields)
    tensors = {"rows": rows, "labels": labels, "predictions": predictions}
    save_file(
        {name: np.ascontiguousarray(values, dtype=np.int64) for name, values in tensors.items()},
        folder / "runs" / f"{key.stem}.safetensors",
    )


def write_study(
    folder: Path,
    *,
    backbones: Sequence[str] = ("tiny",),
    datasets: Sequence[str] = ("digits", "emoji", "textile"),
    recipes: Sequence[str] = ("linear-last", "linear-all", "alf"),
    seeds: Sequence[int] = (0, 1),
    splits: str | int = 2,
    test_rows: int = 120,
    num_labels: int = 4,
    skill: Callable[[str, str, str, int, int], float] = default_skill,
    similarity: bool = False,
) -> Path:
    """A finished study. All recipes find the same items hard; `skill` is the share that a run gets right."""
    config = {
        "name": "made up",
        "backbones": [{"name": name, "id": f"hub/{name}", "image_size": 112} for name in backbones],
        "datasets": [{"name": name, "id": f"hub/{name}", "domain": "test"} for name in datasets],
        "recipes": list(dict.fromkeys(_pattern(recipe) for recipe in recipes)),
        **{"protocol": "paper", "seeds": list(seeds), "splits": splits},
    }
    places = range(splits) if isinstance(splits, int) else range(1)
    keys = [RunKey(*key) for key in itertools.product(backbones, datasets, places, recipes, seeds)]
    study: dict[str, Any] = {"config": config, "expected": [key._asdict() for key in keys]}
    dump(folder / "study.json", study | {"versions": {"torch": "2.0"}, "machine": {"cores": 2}})
    for dataset in datasets:
        for split in places:
            random = np.random.default_rng([sum(map(ord, dataset)), split])
            rows = np.sort(random.choice(4 * test_rows, test_rows, replace=False))
            labels = (rows * 7919 % 1000003) % num_labels
            hard = np.random.default_rng(sum(map(ord, dataset))).uniform(size=4 * test_rows)[rows]
            for backbone in backbones:
                for recipe in recipes:
                    for seed in seeds:
                        share = skill(backbone, dataset, recipe, split, seed)
                        mood = np.random.default_rng([split, seed, len(recipe), len(dataset)]).normal(size=test_rows)
                        right = hard + 0.05 * mood < share
                        predictions = np.where(right, labels, (labels + 1) % num_labels)
                        key = RunKey(backbone, dataset, split, recipe, seed)
                        write_run(folder, key, rows, labels, predictions)
    if similarity:
        distance = np.array([[abs(a[0] - b[0]) + 3 * (a[2] != b[2]) for b in BLOCKS] for a in BLOCKS])
        names = [f"layer {layer} · {module} · {pool}" for layer, module, pool in BLOCKS]
        for backbone in backbones:
            for dataset in datasets:
                content = {"backbone": backbone, "dataset": dataset, "num_images": 500, "token_names": names}
                matrix = np.exp(-distance / (4 + len(dataset) % 5)).tolist()
                dump(folder / "similarity" / f"{backbone}--{dataset}.json", content | {"linear_cka": matrix})
    return folder


def _pattern(recipe: str) -> str:
    family, *values = recipe.split(":")
    return (
        ":".join([family, *("*" for _ in values)])
        if family in ("linear-layer", "aat-layer", "module-probe")
        else recipe
    )
