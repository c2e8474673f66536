"""`sweep`: the road from features and a grid to a chosen setting and heads trained with it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import operator
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..heads.ensemble import stack_members
from ..layout import TokenLayout
from ..losses import LOGIT_SCALE
from ..recipes import find_recipe
from ..training.class_weights import class_weights
from ..training.run import default_batch_size, default_epochs
from ..version import __version__
from .engine import Engine, Protocol, Rows, learning_rate_at
from .inputs import (
    check_choice,
    check_metric,
    checked_device,
    checked_groups,
    checked_seeds,
    config_of,
    describe_features,
    labelled,
    settings_of,
    within_budget,
    writable_folder,
)
from .result import RESULT_NAME, SweepResult
from .ridge import scaled_head, solvable, solve_trials
from .selection import choose, choose_recipe, share_error, split_rows
from .settings import FIELDS, Grid, Setting, merge_settings
from .stack import Trial
from .state import TrialRun

logger = logging.get_logger(__name__)

STRATEGIES = ("full", "merged", "halving")
DEFAULT_METRICS = {
    "single_label_classification": "balanced_accuracy",
    "multi_label_classification": "mean_average_precision",
    "regression": "mse",
}
STATE_FOLDER = "sweep-state"


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
    groups: Sequence[Any] | np.ndarray | None = None,
    split_seed: int = 0,
    seeds: Sequence[int] = (0,),
    refit_seeds: Sequence[int] | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    patience: int | None = None,
    refit: bool = True,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    save_seconds: float = 120.0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: str | None = None,
    heads_at_once: int | None = None,
    max_memory: int | None = None,
    max_bytes_per_image: int | None = None,
    plot: bool = True,
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
        recipe: one or several names from `RECIPES`; those whose tokens the features hold. With `"auto"`, of classifiers,
            the first of its candidates within one standard error of the best on the validation rows (`choose_recipe`).
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
        refit: train the chosen setting on all rows, from every one of `refit_seeds`.
        refit_seeds: by default `seeds`. The reference chooses with one seed, and then trains several.
        output_dir: keep the state here after epochs, so that a killed sweep goes on where it was, and write the result.
        overwrite: replace another sweep in `output_dir`.
        save_seconds: least time between two saves of the state.
        device: to train on; by default the GPU of this process if there is one.
        dtype: of the heads.
        autocast: compute products in this dtype, such as `"bfloat16"`.
        heads_at_once: heads stacked in one pass; by default two on a CPU, all on a GPU. With 1, a head's numbers do not
            depend on which others are trained, to the bit; else up to rounding.
        max_memory: bytes for the heads' parameters, gradients and moments; by default a share of what is free. Grids
            that do not fit are trained in rounds.
        max_bytes_per_image: leave out recipes whose tokens take more of a cache of the features' dtype, such as those of
            `recipe="auto"` that one cannot afford.
        plot: write `sweep.png` beside the result.
        progress: show a bar.
        overrides: further fields of [`LayerFusionConfig`], for all settings. With `num_members=K` single heads choose the
            setting, and the head of a refit seed s is the ensemble of K heads trained from the seeds s * K to s * K + K - 1.

    Raises:
        LayerFusionError: for features without labels or with bad values, tokens that they do not hold, a bad option,
            another sweep in `output_dir`, or if every setting diverged or is a head in closed form that the rows are too
            many for; where some are left, a warning names those left out.
    """
    started = time.monotonic()
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("dtype", dtype, (torch.float32, torch.float64))
    check_choice("autocast", autocast, (None, "bfloat16", "float16"))
    counts = {"num_epochs": num_epochs, "batch_size": batch_size, "patience": patience}
    for name, value in {**counts, "heads_at_once": heads_at_once, "max_memory": max_memory}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise LayerFusionError(f"{name}={value!r}: use a whole number from 1 up, or None")
    if not isinstance(save_seconds, int | float) or save_seconds < 0:
        raise LayerFusionError(f"save_seconds={save_seconds!r}: use 0 or a positive number")
    folder = writable_folder(output_dir)
    wanted_device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    state = PartialState(cpu=checked_device(wanted_device).type == "cpu")
    device = state.device if device is None else torch.device(device)
    seeds = checked_seeds(seeds)
    refit_seeds = seeds if refit_seeds is None else checked_seeds(refit_seeds)
    settings = settings_of(grid, recipe, overrides)
    overrides = {name: value for name, value in overrides.items() if name not in FIELDS}
    given = len(features)
    if groups is None and features.num_views > 1:
        groups = features.source_rows  # views of one image belong together
    features, kept, options = labelled(features, num_labels, id2label, problem_type)
    labels = features.labels
    assert labels is not None
    groups = checked_groups(groups, kept, given)
    if max_bytes_per_image is not None:
        layout = TokenLayout.from_dict(features.fingerprint["token_layout"])
        banks = {s.recipe: config_of(features, s, options, overrides, check=False).bank for s in settings}
        settings = within_budget(settings, banks, layout, features.manifest.dtype, max_bytes_per_image)
    configs = {setting: config_of(features, setting, options, overrides) for setting in settings}
    settings = solvable(settings, configs, len(features))
    config = configs[settings[0]]
    bank = functools.reduce(operator.or_, (configs[setting].bank for setting in settings))
    features = features.select_bank(bank)  # what nobody reads need not be finite
    features.check(config.num_labels if config.problem_type == "single_label_classification" else None)
    folds = split_rows(
        features,
        validation_size=validation_size,
        num_folds=num_folds,
        seed=split_seed,
        groups=groups,
        stratified=config.problem_type != "regression",
    )
    num_rows = min(len(train) for train, _ in folds)
    protocol = _protocol(num_rows, num_epochs, batch_size, config, metric)
    check_metric(protocol.metric, config, labels)
    protocol.patience, protocol.halving = patience, strategy == "halving"
    protocol.heads_at_once, protocol.max_memory = heads_at_once, max_memory
    protocol.device, protocol.dtype, protocol.autocast = device, dtype, autocast
    if protocol.halving and state.num_processes > 1:
        raise LayerFusionError("strategy='halving' compares heads on the way, so it runs in one process: use 'merged'")
    trained_as = list(range(len(settings)))
    if strategy != "full":
        trained_as = merge_settings(settings, _learning_rate_sums(settings, protocol, num_rows))
    names = [recipe] if isinstance(recipe, str) else list(recipe)
    order = list(find_recipe(names[0]).candidates) if len(names) == 1 else []
    record = {
        "recipe": names,
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
        # Only where it says something, so that results of earlier versions are found again.
        **({"refit_seeds": refit_seeds} if refit_seeds != seeds else {}),
        **({"preference": order} if order else {}),
        "features": describe_features(features, folds),
        "versions": {"hf_layerfusion": __version__, "torch": torch.__version__},
    }
    try:
        record = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LayerFusionError(
            f"the options of a sweep must be plain numbers, texts and lists of them: {error}"
        ) from error
    identity = _digest([record, [setting.to_dict() for setting in settings]])
    if folder is not None and (done := _finished(folder, identity, overwrite)) is not None:
        if state.is_main_process:  # what a kill at the very end left
            shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
        return done
    if _fits(features, device):
        features = features.to(device)
    rows = [
        Rows(features.select_rows(train), features.select_rows(held_out), _weights(labels[train], config))
        for train, held_out in folds
    ]

    def train(
        name: str, trials: Sequence[Trial], rows: Sequence[Rows], protocol: Protocol, keep: bool
    ) -> tuple[dict[Trial, TrialRun], dict[Trial, dict[str, torch.Tensor]]]:
        own = trials[state.process_index :: state.num_processes]
        in_steps = [trial for trial in own if trial.setting.ridge_penalty is None]
        engine = Engine(
            in_steps,
            configs,
            rows,
            protocol,
            checkpoint=folder and folder / STATE_FOLDER / f"{name}-{state.process_index}.safetensors",
            save_seconds=save_seconds,
            keep_states=keep,
            identity=identity,
            share=f"{state.process_index} of {state.num_processes}",
            overwrite=overwrite,
            name=name,
            progress=progress and state.is_main_process,
        )
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
            engine.run()
        solved, heads = solve_trials([trial for trial in own if trial not in engine.runs], configs, rows, protocol)
        return {**engine.runs, **solved}, {**engine.states, **heads}

    wanted = [settings[number] for number in sorted(set(trained_as))]
    trials = [Trial(setting, seed, fold) for fold in range(len(folds)) for seed in seeds for setting in wanted]
    runs = _gathered(train("selection", trials, rows, protocol, False)[0], state)
    scores = {s: [runs[Trial(s, seed, fold)].score for seed in seeds for fold in range(len(folds))] for s in wanted}
    best = choose(scores)
    if order and config.problem_type == "single_label_classification":
        # Their metrics are shares of rows; what else there is has no such error.
        record["standard_error"] = share_error(
            float(np.mean(scores[best])), sum(len(held_out) for _, held_out in folds)
        )
        best = choose_recipe(scores, order, record["standard_error"])
    heads: dict[int, dict[str, torch.Tensor]] = {}
    if refit:
        epochs = [runs[Trial(best, seed, fold)].best_epoch for seed in seeds for fold in range(len(folds))]
        final = _protocol(len(features), num_epochs, batch_size, config, protocol.metric)
        for name in ("heads_at_once", "max_memory", "device", "dtype", "autocast"):
            setattr(final, name, getattr(protocol, name))
        if patience is not None:
            final.stop_after = max(1, round(float(np.mean(epochs)) / protocol.num_epochs * final.num_epochs))
        everything = [Rows(features, None, _weights(labels, config))]
        members = {
            seed: [Trial(best, one) for one in member_seeds(seed, configs[best].num_members)] for seed in refit_seeds
        }
        _, trained = train("refit", list(itertools.chain(*members.values())), everything, final, True)
        states = _gathered(trained, state)
        if lost := [trial.seed for trial in itertools.chain(*members.values()) if trial not in states]:
            raise LayerFusionError(f"training on all rows diverged from seed {lost[0]}: use smaller learning rates")
        heads = {seed: _one_state([states[trial] for trial in trials]) for seed, trials in members.items()}
        if best.ridge_penalty is not None and config.problem_type == "single_label_classification":
            factors = [runs[Trial(best, seed, fold)].logit_factor for seed in seeds for fold in range(len(folds))]
            factor = float(np.exp(np.log(factors).mean()))
            record["logit_scale"] = factor * LOGIT_SCALE
            heads = {seed: scaled_head(state, factor) for seed, state in heads.items()}
        record["refit_epochs"], record["refit_batch_size"] = final.last_epoch, final.batch_size
    if best.balance_classes:
        configs[best].class_weights = _weights(labels, config)
    record["identity"], record["seconds"] = identity, round(time.monotonic() - started, 1)
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
            result.save(folder, plot=plot)
            shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
        state.wait_for_everyone()
    return result


def _protocol(
    num_rows: int, num_epochs: int | None, batch_size: int | None, config: LayerFusionConfig, metric: str | None
) -> Protocol:
    batch_size = batch_size or default_batch_size(num_rows)
    return Protocol(
        num_epochs=num_epochs or default_epochs(num_rows, batch_size),
        batch_size=batch_size,
        metric=metric or DEFAULT_METRICS[str(config.problem_type)],
    )


def member_seeds(seed: int, num_members: int) -> list[int]:
    """What the members of the ensemble of a seed are trained from: no two ensembles of a size share one."""
    return [seed * num_members + number for number in range(num_members)]


def _one_state(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of one head, or of the ensemble of several, which read the same tokens."""
    if len(states) == 1:
        return states[0]
    prefix = "token_standardizer."
    of_heads = [{name: value for name, value in state.items() if not name.startswith(prefix)} for state in states]
    return {**stack_members(of_heads), **{name: states[0][name] for name in states[0] if name.startswith(prefix)}}


def _learning_rate_sums(settings: Sequence[Setting], protocol: Protocol, num_rows: int) -> dict[float, float]:
    steps = protocol.num_epochs * math.ceil(num_rows / protocol.batch_size)
    rates = {setting.learning_rate for setting in settings}
    return {rate: sum(learning_rate_at(step, steps, rate) for step in range(steps)) for rate in rates}


def _weights(labels: np.ndarray, config: LayerFusionConfig) -> list[float] | None:
    if config.problem_type != "single_label_classification":
        return None
    return class_weights(labels, config.num_labels)


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
            "(--overwrite_sweep)"
        )
    return None


def _fits(features: LayerFeatures, device: torch.device) -> bool:
    """Whether all rows go into the device's memory, beside what training needs."""
    if device.type != "cuda":
        return False
    manifest = features.manifest
    size = len(manifest.token_bank) * manifest.hidden_size * len(features.dataset)
    return size * np.dtype(manifest.dtype).itemsize < 0.3 * torch.cuda.mem_get_info(device)[0]


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
    named = [name for name in FIELDS if any(name in setting.to_dict() for setting in settings)]
    for number, setting in enumerate(settings):
        for seed in seeds:
            for fold in range(num_folds):
                run = runs[Trial(settings[trained_as[number]], seed, fold)]
                table.append(
                    {"setting": number, **{name: getattr(setting, name) for name in named}, "seed": seed, "fold": fold}
                    | {"score": run.score if math.isfinite(run.score) else None, "best_epoch": run.best_epoch}
                    | {"epochs_trained": run.epochs_trained, "stopped": run.stopped, "trained_as": trained_as[number]}
                )
    return table
