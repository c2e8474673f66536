"""Run a study: one extraction per backbone and dataset, then every recipe on it, and the report."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import operator
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.utils import logging

from ..analysis.similarity import linear_cka
from ..bank import TokenBank, is_local
from ..errors import LayerFusionError
from ..features import LayerFeatures, extract_features
from ..features.manifest import plain_values
from ..files import write_json
from ..images import processed_size
from ..layout import TokenLayout
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..recipe_tokens import recipe_bank
from ..recipes import expand_recipes, find_recipe
from ..version import __version__
from .config import BackboneEntry, DatasetEntry, StudyConfig
from .data import Split, StudyBackbone, StudyData, dataset_revision, make_split, open_study_backbone, open_study_data
from .jobs import Job, run_job
from .report import write_report
from .results import RUNS_FOLDER, SIMILARITY_FOLDER, STUDY_NAME, RunKey

logger = logging.get_logger(__name__)

# Tokens are padded to the widest of their cache, so one cache for all recipes may waste most of itself on padding. From
# this size on, if two caches take half of it or less, narrow and wide tokens are extracted by a pass each.
LARGE_CACHE = 4e9
# Rows that the similarity between layers is taken over: its estimate is unbiased at any number.
SIMILARITY_ROWS = 2000


@dataclass(frozen=True)
class ComputeOptions:
    """What decides how fast a study runs, and nothing else.

    Attributes:
        device: to compute on; with several processes on GPUs, they take turns over all of them.
        num_processes: run so many recipes side by side.
        batch_size: images per forward pass.
        num_workers: processes that decode images.
        cache_dtype: of the stored tokens. This one does change the last digits.
    """

    device: str = "cpu"
    num_processes: int = 1
    batch_size: int = 32
    num_workers: int = 0
    cache_dtype: str = "float16"


def run_study(
    config: StudyConfig,
    output_dir: str | Path,
    *,
    compute: ComputeOptions | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Run what is missing of a study, and write its report.

    Finished runs are never repeated: each has a file of its own, which appears when it is complete. Recipes may be added
    to a study later; a run that was made with another protocol, backbone or dataset is refused.

    Under `accelerate launch` every process goes through all runs, and the heads of each sweep are shared out.

    Args:
        config: the study.
        output_dir: its folder: `study.json`, `features/`, `runs/`, `sweeps/` (every trial), `similarity/`, `report/`.
        compute: where and how fast.
        overwrite: replace runs and features that were made from something else.
        progress: show bars.

    Returns:
        The report.

    Raises:
        LayerFusionError: before anything is computed for what cannot be opened or run; after everything else is done, for
            runs that failed.
    """
    compute = compute or ComputeOptions()
    folder = Path(output_dir)
    state = PartialState(cpu=torch.device(compute.device).type == "cpu")
    if state.num_processes > 1 and compute.num_processes > 1:
        raise LayerFusionError("either accelerate launches several processes, or num_processes does: choose one")
    _check_extras(config)
    opened = {entry.name: open_study_data(entry) for entry in config.datasets}
    splits = {
        entry.name: [
            make_split(opened[entry.name], number, own=config.splits == "own", shots=config.protocol.shots)
            for number in range(1 if config.splits == "own" else int(config.splits))
        ]
        for entry in config.datasets
    }
    resolved: dict[str, dict[str, str | None]] = {
        "backbones": {},
        "datasets": {entry.name: dataset_revision(entry) for entry in config.datasets},
    }
    _check_folder(folder, config, overwrite)
    failures: list[str] = []
    expected: list[RunKey] = []
    parts: list[_Part] = []
    for backbone in config.backbones:
        source = open_study_backbone(backbone)
        resolved["backbones"][backbone.name] = source.revision
        for dataset in config.datasets:
            part = _Part(folder, config, backbone, dataset, opened[dataset.name], splits[dataset.name], compute)
            expected += part.plan(source, overwrite)
            parts.append(part)
    if state.is_main_process:
        for part in parts:
            part.remove_stale(overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STUDY_NAME, {**_describe(config, expected), "resolved": resolved})
    state.wait_for_everyone()
    # Opened again, one at a time: all backbones of a study together may not fit into memory.
    open_backbone = functools.lru_cache(maxsize=1)(open_study_backbone)
    for part in parts:
        failures += part.run(open_backbone, overwrite, progress and state.is_main_process)
        state.wait_for_everyone()
    report = folder / "report" / "report.md"
    if state.is_main_process:
        report = write_report(folder)
    state.wait_for_everyone()
    if failures:
        raise LayerFusionError(
            f"{len(failures)} of {len(expected)} runs failed, all others are done and reported in {report}: "
            + "; ".join(failures[:5])
        )
    return report


class _Part:
    """What a study does with one backbone and one dataset."""

    def __init__(
        self,
        folder: Path,
        config: StudyConfig,
        backbone: BackboneEntry,
        dataset: DatasetEntry,
        data: StudyData,
        splits: Sequence[Split],
        compute: ComputeOptions,
    ):
        self.folder, self.config, self.backbone, self.dataset = folder, config, backbone, dataset
        self.data, self.splits, self.compute = data, splits, compute
        self.recipes: list[str] = []
        self.jobs: list[Job] = []

    @property
    def name(self) -> str:
        return f"{self.backbone.name}--{self.dataset.name}"

    def plan(self, source: StudyBackbone, overwrite: bool) -> list[RunKey]:
        """Open the model, and find out which runs are missing; returns all that belong to this part.

        Raises:
            LayerFusionError: for recipes that this backbone cannot serve, and runs that were made from something else.
        """
        self.model_config = self._build(source).config
        self.processor: Any = source.image_processor
        layout = self.model_config.layout
        self.image_size = processed_size(source.image_processor)
        self.recipes = expand_recipes(self.config.recipes, layout)
        self.banks = {recipe: recipe_bank(recipe, layout, self.image_size) for recipe in self.recipes}
        seeds = self.config.seeds
        keys: list[RunKey] = []
        for number, split in enumerate(self.splits):
            for recipe in self.recipes:
                # What scikit-learn fits does not depend on a seed.
                wanted = seeds[:1] if find_recipe(recipe).kind == "estimator" else seeds
                identities = {seed: self._identity(split, recipe, seed) for seed in wanted}
                runs = {seed: self._key(number, recipe, seed) for seed in wanted}
                keys += runs.values()
                missing = [seed for seed in wanted if not self._is_there(runs[seed], identities[seed], overwrite)]
                if missing:
                    self.jobs.append(self._job(number, split, recipe, missing, identities))
        self.keys = keys
        return keys

    def _build(self, source: StudyBackbone) -> ViTForAttentiveLayerFusionClassification:
        return ViTForAttentiveLayerFusionClassification.from_backbone(
            source.model,
            recipe="linear-last",
            image_processor=source.image_processor,
            **self.data.label_options,
        )

    def remove_stale(self, overwrite: bool) -> None:
        """With `overwrite`, delete what is to be made again and what is not planned any more: a failure leaves a gap."""
        if not overwrite:
            return
        again = {job.key(seed) for job in self.jobs for seed in job.seeds}
        kept = {key.stem for key in self.keys if key not in again}
        for path in (self.folder / RUNS_FOLDER).glob(f"{glob.escape(self.name)}--*.json"):
            if path.stem not in kept:
                path.unlink()
        if self.jobs:
            self._similarity.unlink(missing_ok=True)

    @property
    def _similarity(self) -> Path:
        return self.folder / SIMILARITY_FOLDER / f"{self.name}.json"

    def run(
        self, open_backbone: Callable[[BackboneEntry], StudyBackbone], overwrite: bool, progress: bool
    ) -> list[str]:
        """Extract what is missing, run the jobs, and return what failed."""
        if not self.jobs and (self._similarity.exists() or not self._compared_tokens()):
            return []
        try:
            caches = self._extract(open_backbone(self.backbone), overwrite, progress)
        except LayerFusionError as error:
            return [f"{job.name}: {error}" for job in self.jobs] or [f"{self.name}: {error}"]
        jobs = [replace(job, features=self._cache_of(job.recipe, caches)) for job in self.jobs]
        failures: list[str] = []
        with tqdm(total=len(jobs), desc=self.name, unit="recipe", disable=not progress) as bar:
            for job, problem in _run_all(jobs, self.compute):
                bar.update()
                if problem is not None:
                    logger.warning(f"{job.name}: {problem}")
                    failures.append(f"{job.name}: {problem}")
        if PartialState().is_main_process and not self._similarity.exists():
            self._measure_similarity(caches)
        return failures

    def _key(self, split: int, recipe: str, seed: int) -> RunKey:
        return RunKey(self.backbone.name, self.dataset.name, split, recipe, seed)

    def _identity(self, split: Split, recipe: str, seed: int) -> str:
        """Of everything that a run depends on."""
        digest = hashlib.sha256()
        for rows in (split.train, split.test, *([] if self.data.groups is None else [self.data.groups])):
            digest.update(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
        values = {
            "backbone": (self.model_config.backbone_fingerprint or {}).get("digest"),
            "processor": plain_values(self.processor.to_dict()),
            "images": self.data.images._fingerprint,
            "rows": digest.hexdigest(),
            "recipe": recipe,
            "protocol": self.config.protocol.of(recipe).to_dict(),
            "selection_seeds": self.config.seeds[: self.config.protocol.selection_seeds],
            "seed": seed,
            "cache_dtype": self.compute.cache_dtype,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()

    def _is_there(self, key: RunKey, identity: str, overwrite: bool) -> bool:
        path = self.folder / RUNS_FOLDER / f"{key.stem}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("identity")
        except FileNotFoundError:
            return False
        except (OSError, ValueError, AttributeError) as error:
            raise LayerFusionError(f"{path} cannot be read ({error}): delete it, and the run is made again") from error
        if found != identity and not overwrite:
            raise LayerFusionError(
                f"{path} was made with another protocol, backbone, dataset or split: give another output folder, or "
                "replace such runs with overwrite=True (--overwrite)"
            )
        return found == identity

    def _job(self, number: int, split: Split, recipe: str, seeds: Sequence[int], identities: dict[int, str]) -> Job:
        return Job(
            folder=self.folder,
            backbone=self.backbone,
            dataset=self.dataset,
            recipe=recipe,
            bank=self.banks[recipe],
            split_number=number,
            split=split,
            groups=self.data.groups,
            num_labels=self.model_config.num_labels,
            seeds=tuple(seeds),
            selection_seeds=tuple(self.config.seeds[: self.config.protocol.selection_seeds]),
            identities=identities,
            protocol=self.config.protocol.of(recipe),
            device=self.compute.device,
        )

    def _extract(self, source: StudyBackbone, overwrite: bool, progress: bool) -> list[LayerFeatures]:
        """Caches that hold the tokens of all recipes, also of those that are done, so that the next study finds them."""
        model: Any = self._build(source)
        model.to(self.compute.device)
        config = model.config
        config.image_size = self.image_size
        banks = [bank for recipe, bank in self.banks.items() if find_recipe(recipe).kind != "fine_tune"]
        caches = []
        for bank in group_banks(banks, config.layout, len(self.data.images)):
            name = hashlib.sha256(json.dumps(bank.to_list()).encode()).hexdigest()[:12]
            caches.append(
                extract_features(
                    model,
                    self.data.images,
                    self.folder / "features" / self.name / name,
                    image_column=self.data.image_column,
                    label_column=self.data.label_column,
                    bank=bank,
                    batch_size=self.compute.batch_size,
                    num_workers=self.compute.num_workers,
                    dtype=self.compute.cache_dtype,
                    overwrite=overwrite,
                    progress=progress,
                )
            )
        return caches

    def _cache_of(self, recipe: str, caches: Sequence[LayerFeatures]) -> Path | None:
        wanted = set(self.banks[recipe].coordinates)
        holding = [cache for cache in caches if wanted <= set(cache.bank.coordinates)]
        return min(holding, key=lambda cache: cache.hidden_size).folder if holding else None

    def _measure_similarity(self, caches: Sequence[LayerFeatures]) -> None:
        """Between the pooled tokens of the residual stream, over test images of the first split."""
        bank = self._compared_tokens()
        if not bank:
            return
        cache = next(cache for cache in caches if set(bank.coordinates) <= set(cache.bank.coordinates))
        found = linear_cka(cache.select_bank(bank).select_rows(self.splits[0].test[:SIMILARITY_ROWS]))
        self._similarity.parent.mkdir(exist_ok=True)
        write_json(self._similarity, {"backbone": self.backbone.name, "dataset": self.dataset.name, **found.to_dict()})

    def _compared_tokens(self) -> TokenBank | None:
        """The pooled block outputs that the recipes read; nothing, if those are of one layer."""
        banks = [bank for recipe, bank in self.banks.items() if find_recipe(recipe).kind != "fine_tune"]
        tokens = dict.fromkeys(c for bank in banks for c in bank.coordinates)
        kept = [c for c in tokens if c.module in ("block", "final_norm") and not is_local(c.pool)]
        return TokenBank(tuple(sorted(kept))) if len({c.layer for c in kept}) > 1 else None


def group_banks(banks: Sequence[TokenBank], layout: TokenLayout, num_rows: int) -> list[TokenBank]:
    """The unions of banks that are extracted by a pass each: one, or two where one would mostly hold padding."""
    if not banks:
        return []
    everything: TokenBank = functools.reduce(operator.or_, banks)
    widest = everything.width(layout)
    narrow, wide = (
        [bank for bank in banks if (2 * bank.width(layout) > widest) == is_wide] for is_wide in (False, True)
    )
    if not narrow:
        return [everything]
    parts: list[TokenBank] = [functools.reduce(operator.or_, part) for part in (narrow, wide)]
    size, parted = (2 * num_rows * sum(len(b) * b.width(layout) for b in group) for group in ([everything], parts))
    return parts if size >= LARGE_CACHE and parted <= size / 2 else [everything]


def _run_all(jobs: Sequence[Job], compute: ComputeOptions) -> Iterable[tuple[Job, LayerFusionError | None]]:
    """Each job when it is done, with what was wrong if it failed."""
    if compute.num_processes == 1:
        for job in jobs:
            yield job, _attempt(job)
        return
    devices = [compute.device]
    if compute.device == "cuda":
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    threads = max(1, (os.cpu_count() or 1) // compute.num_processes)
    pool = ProcessPoolExecutor(
        compute.num_processes, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(threads,)
    )
    done = False
    try:
        waiting = {
            pool.submit(_attempt, replace(job, device=devices[number % len(devices)])): job
            for number, job in enumerate(jobs)
        }
        for future in as_completed(waiting):
            yield waiting[future], future.result()
        done = True
    except BrokenProcessPool as error:
        raise LayerFusionError(
            "a process of the study was killed, maybe for want of memory: finished runs are kept; start it again, with "
            "fewer processes (num_processes)"
        ) from error
    finally:
        if not done:
            # An interrupt ends only the job that a worker is at: it would go on with the next one, for hours.
            for worker in active_children():
                worker.kill()
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed study would wait for jobs for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _attempt(job: Job) -> LayerFusionError | None:
    """Do a job; whatever goes wrong in it (no memory left, a full disk) concerns the others only if it happens there too."""
    try:
        run_job(job)
    except LayerFusionError as error:
        return error
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        logger.warning(f"{job.name}:", exc_info=True)
        return LayerFusionError(f"{type(error).__name__}: {error}")
    return None


def _check_folder(folder: Path, config: StudyConfig, overwrite: bool) -> None:
    """Another study's runs would be in this one's report."""
    try:
        found = json.loads((folder / STUDY_NAME).read_text(encoding="utf-8"))["config"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if found != config.name and not overwrite:
        raise LayerFusionError(
            f"{folder} holds the study {found!r}, and this one is {config.name!r}: give another folder"
        )


def _check_extras(config: StudyConfig) -> None:
    """Hours before they are needed."""
    if "lora" in config.recipes:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise LayerFusionError("recipe 'lora' needs PEFT: pip install 'hf-layerfusion[peft]'") from error


def _describe(config: StudyConfig, expected: Sequence[RunKey]) -> dict[str, Any]:
    libraries = {"torch": torch, "transformers": transformers, "datasets": datasets, "numpy": np}
    versions = {name: library.__version__ for name, library in libraries.items()}
    return {
        "config": config.to_dict(),
        "expected": [key._asdict() for key in expected],
        "versions": {"hf_layerfusion": __version__, "python": platform.python_version(), **versions},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    }
