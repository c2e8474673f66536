"""`sweep`: the road from features and a grid to a chosen setting and heads trained with it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from ..configuration_layer_fusion import HEAD_OPTIONS, LayerFusionConfig
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..losses import problem_type_of
from ..training.class_weights import class_weights
from ..training.metrics import IGNORED_LABEL
from ..training.run import default_batch_size, default_epochs
from ..version import __version__
from .engine import Engine, Protocol, Rows, TrialRun, learning_rate_at
from .result import RESULT_NAME, SweepResult
from .selection import choose, split_rows
from .settings import FIELDS, Grid, Setting, expand_grid, merge_settings
from .stack import Trial

logger = logging.get_logger(__name__)

STRATEGIES = ("full", "merged", "halving")
DEFAULT_METRICS = {
    "single_label_classification": "balanced_accuracy",
    "multi_label_classification": "mean_average_precision",
    "regression": "mse",
}
STATE_FOLDER = "sweep-state"
# Fields of the config that mean nothing to a sweep.
_NOT_SWEPT = ("class_weights", "freeze_backbone", "backbone_lr_factor")


def sweep(
    features: LayerFeatures,
    *,
    recipe: str | Sequence[str] = "alf",
    grid: Grid = "paper",
    strategy: str = "merged",
    num_labels: int | None = None,
    id2label: dict[int, str] | Sequence[str] | None = None,
    problem_type: str | None = None,
    metric: str | None = None,
    validation_size: float = 0.2,
    num_folds: int | None = None,
    groups: Sequence[Any] | None = None,
    split_seed: int = 0,
    seeds: Sequence[int] = (0,),
    num_epochs: int | None = None,
    batch_size: int | None = None,
    patience: int | None = None,
    refit: bool = True,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    save_seconds: float = 60.0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: str | None = None,
    heads_at_once: int | None = None,
    max_memory: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> SweepResult:
    """Train every setting of a grid in one pass, choose one on validation rows, and train it again on all rows.

    The protocol is the reference's (arXiv 2601.09322, appendix): a stratified fifth for validation, balanced accuracy
    after the last epoch, AdamW with decay on every parameter, a cosine per step to 1e-6, gradients clipped at a norm of
    5. Settings of one seed see the same batches, noise and dropout. Rows with the label -100 are left out.

    Give this function training rows only: it has no argument for a test split.

    Under `accelerate launch` the heads are shared out over the processes; every process returns the whole result.

    Args:
        features: training rows.
        recipe: one or several names from `RECIPES`; those whose tokens the features hold.
        grid: `"paper"` (63 settings), `"fast"`, a YAML or JSON file, a mapping from fields of [`Setting`] to values, or a
            list of mappings.
        strategy: `"full"` trains every setting; `"merged"` trains one of those that weight decay makes the same to 1 %
            (see `merge_settings`); `"halving"` merges, and drops the worse settings on the way.
        num_labels: number of classes; by default what the features say.
        id2label: class names; by default the features'.
        problem_type: by default what the labels suggest.
        metric: a name that `build_compute_metrics` gives; by default balanced accuracy.
        validation_size: share of the rows held out for the choice.
        num_folds: use this many folds instead.
        groups: for each row, what it belongs to: rows of a group are never on both sides of a split.
        split_seed: of the split.
        seeds: train every setting from each of these.
        num_epochs: by default the protocol's, at least 40 and as many as make 1000 steps.
        batch_size: by default the protocol's.
        patience: epochs without a better score after which a head stops; its score is then its best.
        refit: train the chosen setting on all rows, from every seed.
        output_dir: keep the state here after epochs, so that a killed sweep goes on where it was, and write the result.
        overwrite: replace another sweep in `output_dir`.
        save_seconds: least time between two saves of the state.
        device: to train on; by default the GPU of this process if there is one.
        dtype: of the heads.
        autocast: compute products in this dtype, such as `"bfloat16"`.
        heads_at_once: heads stacked in one pass; by default one on a CPU, all on a GPU.
        max_memory: bytes for the heads' parameters, gradients and moments; by default a share of what is free. Grids
            that do not fit are trained in rounds.
        progress: show a bar.
        overrides: further fields of [`LayerFusionConfig`], for all settings.

    Raises:
        LayerFusionError: for features without labels or with bad values, tokens that they do not hold, a bad option,
            another sweep in `output_dir`, or if every setting diverged.
    """
    _check_choice("strategy", strategy, STRATEGIES)
    _check_choice("dtype", dtype, (torch.float32, torch.float64))
    _check_choice("autocast", autocast, (None, "bfloat16", "float16"))
    counts = {"num_epochs": num_epochs, "batch_size": batch_size, "patience": patience}
    for name, value in {**counts, "heads_at_once": heads_at_once, "max_memory": max_memory}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise LayerFusionError(f"{name}={value!r}: use a whole number from 1 up, or None")
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        try:  # now, not after hours of training
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LayerFusionError(f"output_dir={str(folder)!r} cannot be written to: {error}") from error
    state = PartialState()
    device = torch.device(device or state.device)
    seeds = _checked_seeds(seeds)
    settings = _settings(grid, recipe, overrides)
    overrides = {name: value for name, value in overrides.items() if name not in FIELDS}
    given = len(features)
    features, kept, options = _labelled(features, num_labels, id2label, problem_type)
    labels = features.labels
    assert labels is not None
    if groups is not None:
        if len(groups) != given:
            raise LayerFusionError(f"groups has {len(groups)} entries, but there are {given} rows: give one per row")
        groups = [groups[row] for row in kept]
    configs = {setting: _config(features, setting, options, overrides) for setting in settings}
    config = configs[settings[0]]
    features.check(config.num_labels if config.problem_type == "single_label_classification" else None)
    folds = split_rows(features, validation_size=validation_size, num_folds=num_folds, seed=split_seed, groups=groups)
    num_rows = min(len(train) for train, _ in folds)
    protocol = _protocol(num_rows, num_epochs, batch_size, config, metric)
    protocol.patience, protocol.halving = patience, strategy == "halving"
    protocol.heads_at_once, protocol.max_memory = heads_at_once, max_memory
    protocol.device, protocol.dtype, protocol.autocast = device, dtype, autocast
    if protocol.halving and state.num_processes > 1:
        raise LayerFusionError("strategy='halving' compares heads on the way, so it runs in one process: use 'merged'")
    trained_as = list(range(len(settings)))
    if strategy != "full":
        trained_as = merge_settings(settings, _learning_rate_sums(settings, protocol, num_rows))
    record = {
        "recipe": [recipe] if isinstance(recipe, str) else list(recipe),
        "settings": len(settings),
        "trained_settings": len(set(trained_as)),
        "strategy": strategy,
        "metric": protocol.metric,
        "labels": list(config.id2label.values()),
        "problem_type": config.problem_type,
        "validation": {"num_folds": num_folds} if num_folds else {"validation_size": validation_size},
        "split_seed": split_seed,
        "grouped": groups is not None,
        "seeds": seeds,
        "num_epochs": protocol.num_epochs,
        "batch_size": protocol.batch_size,
        "patience": patience,
        "overrides": overrides,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": autocast,
        "heads_at_once": heads_at_once,
        "refit": refit,
        "features": _describe_features(features, folds),
        "versions": {"hf_layerfusion": __version__, "torch": torch.__version__},
    }
    identity = _digest([record, [setting.to_dict() for setting in settings]])
    if folder is not None and (done := _finished(folder, identity, overwrite)) is not None:
        return done
    if _fits(features, device):
        features = features.to(device)
    rows = [
        Rows(features.select_rows(train), features.select_rows(held_out), _weights(labels[train], config))
        for train, held_out in folds
    ]

    def train(name: str, trials: Sequence[Trial], rows: Sequence[Rows], protocol: Protocol, keep: bool) -> Engine:
        engine = Engine(
            trials[state.process_index :: state.num_processes],
            configs,
            rows,
            protocol,
            checkpoint=folder and folder / STATE_FOLDER / f"{name}-{state.process_index}.safetensors",
            save_seconds=save_seconds,
            keep_states=keep,
            identity=f"{identity}-{state.num_processes}",  # each process has a state of its own
            overwrite=overwrite,
            progress=progress and state.is_main_process,
        )
        engine.run()
        return engine

    wanted = [settings[number] for number in sorted(set(trained_as))]
    trials = [Trial(setting, seed, fold) for fold in range(len(folds)) for seed in seeds for setting in wanted]
    runs = _gathered(train("selection", trials, rows, protocol, False).runs, state)
    scores = {s: [runs[Trial(s, seed, fold)].score for seed in seeds for fold in range(len(folds))] for s in wanted}
    best = choose(scores)
    heads: dict[int, dict[str, torch.Tensor]] = {}
    if refit:
        epochs = [runs[Trial(best, seed, fold)].best_epoch for seed in seeds for fold in range(len(folds))]
        final = _protocol(len(features), num_epochs, batch_size, config, protocol.metric)
        for name in ("heads_at_once", "max_memory", "device", "dtype", "autocast"):
            setattr(final, name, getattr(protocol, name))
        if patience is not None:
            final.stop_after = max(1, round(float(np.mean(epochs)) / protocol.num_epochs * final.num_epochs))
        everything = [Rows(features, None, _weights(labels, config))]
        engine = train("refit", [Trial(best, seed) for seed in seeds], everything, final, True)
        states = _gathered(engine.states, state)
        if lost := [seed for seed in seeds if Trial(best, seed) not in states]:
            raise LayerFusionError(f"training on all rows diverged from seed {lost[0]}: use smaller learning rates")
        heads = {seed: states[Trial(best, seed)] for seed in seeds}
        record["refit_epochs"], record["refit_batch_size"] = final.last_epoch, final.batch_size
    record["identity"] = identity
    result = SweepResult(
        trials=_table(settings, trained_as, seeds, len(folds), runs),
        curves=[
            {"setting": settings.index(trial.setting), "seed": trial.seed, "fold": trial.fold}
            | {key: value for key, value in asdict(run).items() if key in ("epochs", "scores", "losses")}
            for trial, run in ((trial, runs[trial]) for trial in trials)
        ],
        best=best,
        protocol=record,
        config=configs[best],
        heads=heads,
    )
    if folder is not None:
        if state.is_main_process:
            result.save(folder)
            shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
        state.wait_for_everyone()
    return result


def _check_choice(name: str, value: Any, legal: Sequence[Any]) -> None:
    if value not in legal:
        raise LayerFusionError(f"{name} {value!r} is unknown: choose from {', '.join(map(str, legal))}")


def _settings(grid: Grid, recipe: str | Sequence[str], overrides: dict[str, Any]) -> list[Setting]:
    """The grid's settings; an option that a grid may vary, given by itself, is the same in all of them."""
    recipes = [recipe] if isinstance(recipe, str) else list(recipe)
    settings = expand_grid(grid, recipes)
    if not settings:
        raise LayerFusionError("the grid holds no setting: give at least one")
    fixed = {name: overrides[name] for name in FIELDS if name in overrides}
    if not fixed:
        return settings
    return list(dict.fromkeys(expand_grid([{**setting.to_dict(), **fixed} for setting in settings])))


def _labelled(
    features: LayerFeatures, num_labels: int | None, id2label: Any, problem_type: str | None
) -> tuple[LayerFeatures, np.ndarray, dict[str, Any]]:
    """The rows that have a label, their numbers, and what the config needs to know of the labels."""
    labels = features.labels
    if labels is None:
        raise LayerFusionError("the features have no labels: extract them with label_column=")
    is_classes = labels.ndim == 1 and labels.dtype.kind in "iu"
    kept = np.flatnonzero(labels != IGNORED_LABEL) if is_classes else np.arange(len(labels))
    if len(kept) < len(labels):
        features, labels = features.select_rows(kept), labels[kept]
    if not len(features):
        raise LayerFusionError("the features hold no labelled row: there is nothing to train on")
    names = id2label if id2label is not None else features.label_names
    if names is not None:
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        options: dict[str, Any] = {"id2label": {int(number): str(name) for number, name in pairs}}
        if num_labels is not None and num_labels != len(options["id2label"]):
            raise LayerFusionError(f"num_labels={num_labels}, but there are {len(options['id2label'])} class names")
    elif num_labels is not None:
        options = {"num_labels": num_labels}
    elif labels.ndim > 1:
        options = {"num_labels": labels.shape[1]}
    else:
        options = {"num_labels": int(labels.max()) + 1 if is_classes and problem_type != "regression" else 1}
    if problem_type in ("regression", "multi_label_classification"):
        width = labels.shape[1] if labels.ndim > 1 else 1
        found = options["num_labels"] if "num_labels" in options else len(options["id2label"])
        if found != width:
            raise LayerFusionError(
                f"problem_type={problem_type!r} needs one number per row and output, but the labels have {width} and the "
                f"head {found}: leave problem_type out, or extract other labels"
            )
    return features, kept, {**options, "problem_type": problem_type}


def _config(
    features: LayerFeatures, setting: Setting, options: dict[str, Any], overrides: dict[str, Any]
) -> LayerFusionConfig:
    if unknown := sorted(overrides.keys() - set(HEAD_OPTIONS)):
        raise LayerFusionError(
            f"{unknown[0]!r} is no option of sweep or of a head; heads take {', '.join(HEAD_OPTIONS)}"
        )
    if idle := [name for name in _NOT_SWEPT if name in overrides]:
        raise LayerFusionError(
            f"{idle[0]!r} is no option of sweep: classes are weighted by the grid's balance_classes, and a backbone is "
            "fine-tuned with Trainer"
        )
    if overrides.get("width_alignment") == "project":
        raise LayerFusionError(
            "width_alignment='project' gives every head tokens of its own, which a sweep cannot share: "
            "train it with build_trainer"
        )
    layout = features.fingerprint["token_layout"]
    config = LayerFusionConfig(token_layout=layout, **options, **overrides, **setting.config_options)
    if config.problem_type is None:
        problem: Any = problem_type_of(config, torch.as_tensor(features.select_rows([0]).labels))
        config.problem_type = problem
    features.bank.positions_of(config.bank)  # says which tokens are missing
    return config


def _protocol(
    num_rows: int, num_epochs: int | None, batch_size: int | None, config: LayerFusionConfig, metric: str | None
) -> Protocol:
    batch_size = batch_size or default_batch_size(num_rows)
    return Protocol(
        num_epochs=num_epochs or default_epochs(num_rows, batch_size),
        batch_size=batch_size,
        metric=metric or DEFAULT_METRICS[str(config.problem_type)],
    )


def _learning_rate_sums(settings: Sequence[Setting], protocol: Protocol, num_rows: int) -> dict[float, float]:
    steps = protocol.num_epochs * math.ceil(num_rows / protocol.batch_size)
    rates = {setting.learning_rate for setting in settings}
    return {rate: sum(learning_rate_at(step, steps, rate) for step in range(steps)) for rate in rates}


def _weights(labels: np.ndarray, config: LayerFusionConfig) -> list[float] | None:
    if config.problem_type != "single_label_classification":
        return None
    return class_weights(labels, config.num_labels)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    is_list = isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str)
    checked = [int(seed) for seed in seeds if isinstance(seed, Integral)] if is_list else []
    if not checked or len(set(checked)) != len(seeds) or not all(0 <= seed < 2**32 for seed in checked):
        raise LayerFusionError(f"seeds={seeds!r}: give a list of one or several different whole numbers from 0 up")
    return checked


def _describe_features(features: LayerFeatures, folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """What tells these rows and tokens, and how they are split, from any others."""
    digest = hashlib.sha256()
    for shard in features.manifest.shards:
        digest.update(shard.sha256.encode())
    for array in (features.cache_rows, features.labels, *(part for fold in folds for part in fold)):
        digest.update(np.ascontiguousarray(array).tobytes())
    backbone = features.fingerprint.get("backbone") or {}
    return {"rows": len(features), "digest": digest.hexdigest(), "backbone": backbone.get("digest")}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _finished(folder: Path, identity: str, overwrite: bool) -> SweepResult | None:
    """The result in the folder, if it is this sweep's.

    Raises:
        LayerFusionError: if it is another one's.
    """
    if not (folder / RESULT_NAME).exists():
        return None
    try:
        found = SweepResult.load(folder)
    except LayerFusionError as error:
        if not overwrite:
            raise LayerFusionError(f"{error}; give another folder, or replace it with overwrite=True") from error
        return None
    if found.protocol["identity"] == identity:
        logger.info(f"{folder} holds this sweep already, finished")
        return found
    if not overwrite:
        raise LayerFusionError(
            f"{folder} holds a sweep of something else: give another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )
    return None


def _fits(features: LayerFeatures, device: torch.device) -> bool:
    """Whether all rows go into the device's memory, beside what training needs."""
    if device.type != "cuda":
        return False
    size = len(features.manifest.token_bank) * features.hidden_size * len(features.dataset)
    return size * np.dtype(features.manifest.dtype).itemsize < 0.3 * torch.cuda.mem_get_info(device)[0]


def _gathered(found: dict[Trial, Any], state: PartialState) -> dict[Trial, Any]:
    """What all processes found, in each of them."""
    if state.num_processes == 1:
        return found
    return dict(gather_object(list(found.items())))


def _table(
    settings: Sequence[Setting],
    trained_as: Sequence[int],
    seeds: Sequence[int],
    num_folds: int,
    runs: dict[Trial, TrialRun],
) -> list[dict[str, Any]]:
    table = []
    for number, setting in enumerate(settings):
        for seed in seeds:
            for fold in range(num_folds):
                run = runs[Trial(settings[trained_as[number]], seed, fold)]
                table.append(
                    {"setting": number, **setting.to_dict(), "seed": seed, "fold": fold}
                    | {"score": run.score if math.isfinite(run.score) else None, "best_epoch": run.best_epoch}
                    | {"epochs_trained": run.epochs_trained, "stopped": run.stopped, "trained_as": trained_as[number]}
                )
    return table
