"""One recipe on one split: choose its setting, train it from every seed, and write what it gave."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save as save_tensors

from ..analysis.attention import AttentionSummary, summarise_attentions
from ..bank import TokenBank
from ..estimators import fit_estimator
from ..features import LayerFeatures
from ..files import write_file, write_json
from ..layout import TokenLayout
from ..recipes import find_recipe
from ..sweeps import Setting, SweepResult, sweep
from ..training.fine_tuning import MAX_BATCH_SIZE, fine_tune, predict_images
from ..training.metrics import Accuracy, BalancedAccuracy
from ..training.run import default_batch_size
from .config import BackboneEntry, DatasetEntry
from .data import Split, open_study_backbone, open_study_data
from .protocol import Protocol
from .results import RUNS_FOLDER, RunKey

_BATCH_SIZE = 1024
# The one setting of the reference's `end_2_end_eval_linear_probe_finetuning.py`; nothing is chosen.
PAPER_FINE_TUNING: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1, "noise_std": 0.05}


@dataclass(frozen=True)
class Job:
    """A recipe on a split, with all its seeds; it can be sent to another process.

    Attributes:
        folder: of the study.
        bank: the tokens that the recipe reads.
        groups: of all rows of the dataset.
        num_labels: classes of the dataset.
        seeds: those whose runs are missing.
        selection_seeds: those that the setting is chosen with.
        identities: of the run of each seed.
        features: folder of the cache; `None` for a recipe that reads images.
    """

    folder: Path
    backbone: BackboneEntry
    dataset: DatasetEntry
    recipe: str
    bank: TokenBank
    split_number: int
    split: Split
    groups: np.ndarray | None
    num_labels: int
    seeds: tuple[int, ...]
    selection_seeds: tuple[int, ...]
    identities: dict[int, str]
    protocol: Protocol
    device: str
    features: Path | None = None

    def key(self, seed: int) -> RunKey:
        return RunKey(self.backbone.name, self.dataset.name, self.split_number, self.recipe, seed)

    @property
    def name(self) -> str:
        """Of the job's files, and in messages."""
        return self.key(self.seeds[0]).stem.rsplit("--", 1)[0]


@dataclass
class Outcome:
    """What one seed of a job gave.

    Attributes:
        predictions: class indices of the test rows.
        attention: over the test images, where the head has any.
        setting: what was chosen.
    """

    predictions: np.ndarray
    setting: dict[str, Any] | None
    num_parameters: int
    validation_score: float | None = None
    num_settings: int = 1
    attention: AttentionSummary | None = None


def run_job(job: Job) -> None:
    """Do a job and write its runs, each under its final name when it is complete.

    Raises:
        LayerFusionError: if it cannot be done.
    """
    start = time.perf_counter()
    kind = find_recipe(job.recipe).kind
    if kind == "fine_tune":
        _fine_tune(job)
        return
    assert job.features is not None
    features = LayerFeatures.open(job.features).select_bank(job.bank)
    train, test = features.select_rows(job.split.train), features.select_rows(job.split.test)
    groups = None if job.groups is None else job.groups[job.split.train]
    outcomes = _fit(job, train, test, groups) if kind == "estimator" else _sweep(job, train, test, groups)
    seconds = (time.perf_counter() - start) / len(outcomes)
    if not PartialState().is_main_process:
        return
    assert test.labels is not None
    layout = TokenLayout(**features.fingerprint["token_layout"])
    size = sum(job.bank.widths(layout)) * np.dtype(features.manifest.dtype).itemsize
    for seed, outcome in outcomes.items():
        write_run(job, seed, outcome, test.labels, seconds, size)


def _sweep(job: Job, train: LayerFeatures, test: LayerFeatures, groups: np.ndarray | None) -> dict[int, Outcome]:
    scratch = job.folder / "running" / job.name
    result = sweep(
        train,
        recipe=job.recipe,
        groups=groups,
        split_seed=job.split_number,
        seeds=job.selection_seeds,
        refit_seeds=job.seeds,
        output_dir=scratch,
        overwrite=True,
        device=job.device,
        plot=False,
        progress=False,
        **job.protocol.sweep_options(len(train)),
    )
    outcomes = {seed: _test(result, seed, test, job.device) for seed in job.seeds}
    if PartialState().is_main_process:
        trials = job.folder / "sweeps" / f"{job.name}.csv"
        trials.parent.mkdir(exist_ok=True)
        result.table().to_csv(trials, index=False)
        shutil.rmtree(scratch, ignore_errors=True)
    return outcomes


def _test(result: SweepResult, seed: int, test: LayerFeatures, device: str) -> Outcome:
    """The one look at the test rows."""
    model: Any = result.build_model(seed=seed)
    model.to(device)
    test = test.select_bank(model.config.bank)
    predictions = []
    with torch.no_grad():
        for batch in test.batches(_BATCH_SIZE, device=device):
            logits = model(layer_features=batch["layer_features"]).logits
            predictions.append(logits.argmax(dim=-1).cpu())
    attends = model.config.head_type != "linear"
    return Outcome(
        predictions=torch.cat(predictions).numpy(),
        setting=_told(result.best),
        num_parameters=sum(parameter.numel() for parameter in model.head.parameters()),
        validation_score=result.best_score,
        num_settings=result.protocol["settings"],
        attention=summarise_attentions(model, test.batches(_BATCH_SIZE, device=device)) if attends else None,
    )


def _told(setting: Setting) -> dict[str, Any]:
    """A chosen setting, without what a head in closed form does not have."""
    if setting.ridge_penalty is None:
        return setting.to_dict()
    return {name: getattr(setting, name) for name in ("recipe", "ridge_penalty", "balance_classes")}


def _fit(job: Job, train: LayerFeatures, test: LayerFeatures, groups: np.ndarray | None) -> dict[int, Outcome]:
    name = find_recipe(job.recipe).estimator
    assert name is not None
    fitted = fit_estimator(name, train, groups=groups, split_seed=job.split_number, **job.protocol.validation)
    outcome = Outcome(
        predictions=fitted.predict(test),
        setting=fitted.setting,
        num_parameters=fitted.num_parameters,
        validation_score=fitted.validation_score,
        num_settings=max(1, len(fitted.validation_scores)),
    )
    return dict.fromkeys(job.seeds, outcome)


def _fine_tune(job: Job) -> None:
    """From images, a seed after the other: each takes as long as many heads."""
    data = open_study_data(job.dataset)
    train, test = data.images.select(job.split.train), data.images.select(job.split.test)
    batch_size = min(default_batch_size(len(train)), MAX_BATCH_SIZE)
    for seed in job.seeds:
        start = time.perf_counter()
        source = open_study_backbone(job.backbone)
        scratch = job.folder / "running" / job.key(seed).stem
        model = fine_tune(
            source.model,
            train,
            recipe=job.recipe,
            image_processor=source.image_processor,
            output_dir=scratch,
            # Of each process, of those that accelerate launched.
            batch_size=max(1, batch_size // PartialState().num_processes),
            num_train_epochs=job.protocol.num_epochs(len(train), batch_size),
            seed=seed,
            **(PAPER_FINE_TUNING if job.protocol.name == "paper" else {}),
            use_cpu=job.device == "cpu",
            progress=False,
            image_column=data.image_column,
            label_column=data.label_column,
            **data.label_options,
        )
        predictions = predict_images(model, test, image_column=data.image_column, progress=False)
        if PartialState().is_main_process:
            setting = {
                name.replace(" ", "_"): value for name, value in model.training_summary["hyperparameters"].items()
            }
            trained, seconds = setting.pop("trained_parameters"), time.perf_counter() - start
            setting["batch_size"] = batch_size
            write_run(job, seed, Outcome(predictions, setting, trained), data.labels[job.split.test], seconds, 0)
            shutil.rmtree(scratch, ignore_errors=True)


def write_run(job: Job, seed: int, outcome: Outcome, labels: np.ndarray, seconds: float, bytes_per_image: int) -> None:
    """Write a run's two files; the JSON comes last and makes it count."""
    folder = job.folder / RUNS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    stem = job.key(seed).stem
    metrics = {
        name: metric.compute(predictions=outcome.predictions, references=labels)[name]
        for name, metric in (("balanced_accuracy", BalancedAccuracy()), ("accuracy", Accuracy()))
    }
    attention = outcome.attention
    tensors = {"predictions": outcome.predictions, "labels": labels, "rows": job.split.test}
    write_file(
        folder / f"{stem}.safetensors",
        save_tensors({name: torch.from_numpy(np.array(value, dtype=np.int64)) for name, value in tensors.items()}),
    )
    run = {
        **job.key(seed)._asdict(),
        "num_labels": job.num_labels,
        "metrics": metrics,
        "validation_score": outcome.validation_score,
        "setting": outcome.setting,
        "bank": job.bank.to_list(),
        "num_parameters": outcome.num_parameters,
        "bytes_per_image": bytes_per_image,
        "seconds": round(seconds, 2),
        "train_rows": len(job.split.train),
        "test_rows": len(job.split.test),
        "num_settings": outcome.num_settings,
        "attention": None if attention is None else attention.mean.tolist(),
        "depth": _depth(attention),
        "protocol": job.protocol.name,
        "identity": job.identities[seed],
    }
    write_json(folder / f"{stem}.json", run)


def _depth(attention: AttentionSummary | None) -> dict[str, float | None] | None:
    if attention is None:
        return None
    return {"expected_depth": attention.expected_depth, "entropy": attention.mean_entropy}
