"""Train many heads at once: every batch is read once, and every head takes its step on it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..bank import TokenBank
from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..heads.attention import token_scales
from ..heads.standardizer import EPSILON, TokenStandardizer
from ..noise import Mixture, add_noise_
from ..training.run import MAX_GRADIENT_NORM, MIN_LEARNING_RATE
from .meter import Meter
from .selection import rank
from .settings import Setting
from .stack import Draws, HeadStack, Trial, shape_of, state_bytes
from .state import SweepState, TrialRun, load_state, save_state

logger = logging.get_logger(__name__)

EVALUATION_BATCH = 2048
# Points of a learning curve, where nothing depends on it: evaluation after every epoch costs a tenth of the training.
CURVE_POINTS = 20
# Heads that go through one stack: two are 7 % faster than one, and more push each other out of the cache.
HEADS_AT_ONCE_ON_CPU = 2
# Successive halving: at this point of the curve, this share of the settings goes on.
RUNGS = ((3, 0.5), (6, 0.25), (12, 0.1))
# What training needs beside the heads' states: batches, activations, and whatever else the machine does.
MEMORY_SHARE = 0.6
_LAYER_NORM_EPS = 1e-5


@dataclass
class Protocol:
    """What all trials of one run share.

    Attributes:
        num_epochs: of the cosine schedule.
        stop_after: epochs after which all heads stop; `None` to train to the schedule's end.
        batch_size: rows per step.
        metric: a name that `build_compute_metrics` gives.
        patience: epochs without a better score after which a head stops; `None` to train all to the end.
        halving: drop the worse settings at `RUNGS`.
        heads_at_once: heads per stack; `None` for what fits the device.
        max_memory: bytes for parameters, gradients and moments; `None` for a share of what is free.
        device: to train on.
        dtype: of the heads.
        autocast: of the products, such as `"bfloat16"`; `None` for none.
    """

    num_epochs: int
    batch_size: int
    stop_after: int | None = None
    metric: str = "balanced_accuracy"
    patience: int | None = None
    halving: bool = False
    heads_at_once: int | None = None
    max_memory: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    autocast: str | None = None

    def evaluation_epochs(self) -> list[int]:
        """Counted from 1; the last is always among them."""
        if self.patience is not None:
            return list(range(1, self.last_epoch + 1))
        return sorted({self._epoch_at(point) for point in range(1, CURVE_POINTS + 1)})

    def _epoch_at(self, point: int) -> int:
        return math.ceil(self.last_epoch * point / CURVE_POINTS)

    @property
    def last_epoch(self) -> int:
        return self.stop_after or self.num_epochs

    def rungs(self) -> dict[int, float]:
        """The share of the settings that goes on after an epoch."""
        return {self._epoch_at(point): share for point, share in RUNGS} if self.halving else {}


def learning_rate_at(step: int, num_steps: int, learning_rate: float) -> float:
    """Cosine from `learning_rate` to 1e-6 without warm-up, as the reference and `cosine_with_min_lr` of transformers."""
    lowest = min(MIN_LEARNING_RATE, learning_rate)
    return lowest + (learning_rate - lowest) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


@dataclass
class Rows:
    """The rows of one fold, and the class weights of its training rows."""

    train: LayerFeatures
    validation: LayerFeatures | None
    class_weights: list[float] | None


def _with_bank(rows: Rows, bank: TokenBank) -> Rows:
    validation = None if rows.validation is None else rows.validation.select_bank(bank)
    return Rows(rows.train.select_bank(bank), validation, rows.class_weights)


class _Workspace:
    """Large arrays that are used again: fresh memory costs more than what is written to it."""

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        array = self._arrays.get(name)
        if array is None or array.numel() < size or array.dtype != dtype or array.device != like.device:
            array = self._arrays[name] = torch.empty(size, dtype=dtype, device=like.device)
        return array[:size].view(shape)


@dataclass(frozen=True)
class _View:
    """How some heads see the batch: which tokens, how normalised, how mixed, with what noise."""

    tokens: tuple[int, ...]
    width: int
    normalization: str
    noise_std: float
    noise_probability: float
    mixup_alpha: float


@dataclass
class _Seen:
    """The batch in one view: tokens, what the attentive head's `token_scales` gives for them, and how they were mixed."""

    tokens: Tensor
    scales: Tensor
    mixture: Mixture | None


class Engine:
    """Trains trials and keeps what is needed to go on after a kill.

    Args:
        trials: what to train.
        configs: of the head of each setting.
        rows: of each fold.
        protocol: what they share.
        checkpoint: file that keeps the state; `None` to keep none.
        save_seconds: the state is saved after an epoch if this long has passed since the last time.
        keep_states: whether the trained heads are wanted.
        identity: of the sweep: a state of another one is refused, or with `overwrite` replaced.
        share: which of the processes this is: a state of another number of them is of no use.
        overwrite: see `identity`.
        name: of the bar.
        progress: show a bar.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        configs: Mapping[Setting, LayerFusionConfig],
        rows: Sequence[Rows],
        protocol: Protocol,
        *,
        checkpoint: Path | None = None,
        save_seconds: float = 120.0,
        keep_states: bool = False,
        identity: str = "",
        share: str = "0 of 1",
        overwrite: bool = False,
        name: str = "training",
        progress: bool = True,
    ):
        self.trials, self.configs, self.protocol = list(trials), dict(configs), protocol
        self.checkpoint, self.save_seconds, self.keep_states = checkpoint, save_seconds, keep_states
        self.progress = progress
        self.name = name
        self.identity, self.share, self.overwrite = identity, share, overwrite
        self.bank = TokenBank(())
        for config in self.configs.values():
            self.bank |= config.bank
        self.rows = [_with_bank(fold, self.bank) for fold in rows]
        self.runs = {trial: TrialRun() for trial in self.trials}
        self.states: dict[Trial, dict[str, Tensor]] = {}
        self._workspace = _Workspace()
        self._views = {setting: self._view(config) for setting, config in self.configs.items()}
        # Of each fold and view; taken when they are first asked for.
        self._standardizers: dict[tuple[int, _View], TokenStandardizer] = {}

    def run(self) -> dict[Trial, TrialRun]:
        """Train everything that is not finished."""
        if not self.trials:
            return self.runs
        state = self._load() or SweepState(self._waves(), self.runs, self.states)
        self.runs, self.states = state.runs, state.trained
        waves = state.waves
        if len(waves) > 1:
            logger.warning(
                f"{len(self.trials)} heads do not fit the memory at once: they are trained in {len(waves)} rounds of up "
                f"to {max(map(len, waves))}"
            )
        total = sum(self._steps_per_epoch(trial.fold) for trial in self.trials) * self.protocol.last_epoch
        with tqdm(
            total=total, desc=f"{self.name}: heads x steps", unit="step", unit_scale=True, disable=not self.progress
        ) as bar:
            for wave in waves[: state.wave]:
                bar.update(sum(self._steps_per_epoch(trial.fold) for trial in wave) * self.protocol.last_epoch)
            for wave in waves[state.wave :]:
                self._train(wave, state, bar)
                state.wave, state.epoch = state.wave + 1, 0
        self._save(state)
        return self.runs

    # ---- plan ----------------------------------------------------------------------------------------------------

    def _view(self, config: LayerFusionConfig) -> _View:
        noise = (config.noise_std, config.noise_probability) if config.noise_std else (0.0, 0.0)
        tokens = tuple(self.bank.positions_of(config.bank))
        return _View(tokens, config.hidden_size, config.token_normalization, *noise, config.mixup_alpha)

    def _waves(self) -> list[list[Trial]]:
        """Trials that are trained at the same time: as many as the memory holds."""
        limit = self.protocol.max_memory or int(MEMORY_SHARE * _free_memory(self.protocol.device))
        sizes = {setting: state_bytes(config, self.protocol.dtype) for setting, config in self.configs.items()}
        waves: list[list[Trial]] = [[]]
        used = 0
        for trial in self.trials:
            size = sizes[trial.setting]
            if size > limit:
                raise LayerFusionError(
                    f"one head needs {size / 1e9:.2f} GB while it is trained, but only {limit / 1e9:.2f} GB may be used: "
                    "raise max_memory, or choose fewer or narrower tokens"
                )
            if waves[-1] and used + size > limit:
                waves.append([])
                used = 0
            waves[-1].append(trial)
            used += size
        # Halving compares settings, so all of them must be there.
        if len(waves) > 1 and self.protocol.halving:
            raise LayerFusionError(
                f"strategy='halving' needs all {len(self.trials)} heads in memory at once, and they do not fit: "
                "raise max_memory, or use strategy='merged'"
            )
        return waves

    def _stacks(self, wave: Sequence[Trial]) -> list[HeadStack]:
        """The wave in stacks, cut the same way whoever has stopped since."""
        alike: dict[tuple, list[Trial]] = {}
        for trial in wave:
            config = self.configs[trial.setting]
            key = (trial.fold, trial.seed, shape_of(config), self._views[trial.setting])
            alike.setdefault(key, []).append(trial)
        at_once = self.protocol.heads_at_once
        if at_once is None:
            at_once = HEADS_AT_ONCE_ON_CPU if self.protocol.device.type == "cpu" else len(wave)
        dtype = torch.promote_types(self.protocol.dtype, torch.float32)
        stacks = []
        for trials in alike.values():
            for first in range(0, len(trials), at_once):
                part = [t for t in trials[first : first + at_once] if self.runs[t].stopped is None]
                if not part:
                    continue
                weights = self.rows[part[0].fold].class_weights
                stacks.append(
                    HeadStack(
                        part,
                        [self.configs[trial.setting] for trial in part],
                        None if weights is None else torch.tensor(weights, dtype=dtype, device=self.protocol.device),
                        self.protocol.device,
                        self.protocol.dtype,
                    )
                )
        return stacks

    def _steps_per_epoch(self, fold: int) -> int:
        return math.ceil(len(self.rows[fold].train) / self.protocol.batch_size)

    # ---- training ------------------------------------------------------------------------------------------------

    def _train(self, wave: Sequence[Trial], state: SweepState, bar: tqdm) -> None:
        stacks = self._stacks(wave)
        for stack in stacks:
            if state.epoch:
                step = state.epoch * self._steps_per_epoch(stack.trials[0].fold)
                stack.load_states([state.training[trial] for trial in stack.trials], step)
            else:
                stack.attach_optimizer(0)
        state.training.clear()
        bar.update(sum(self._steps_per_epoch(trial.fold) for trial in wave) * state.epoch)
        evaluation_epochs, rungs = set(self.protocol.evaluation_epochs()), self.protocol.rungs()
        saved = time.monotonic()
        for epoch in range(state.epoch, self.protocol.last_epoch):
            jobs: dict[tuple[int, int], list[HeadStack]] = {}
            for stack in stacks:
                jobs.setdefault((stack.trials[0].fold, stack.trials[0].seed), []).append(stack)
            losses: dict[Trial, float] = {}
            for (fold, seed), members in jobs.items():
                losses |= self._train_epoch(epoch, fold, seed, members, bar)
            done = epoch + 1
            for trial in losses:
                self.runs[trial].epochs_trained = done
            if done in evaluation_epochs:
                for (fold, _), members in jobs.items():
                    self._evaluate(done, fold, members, losses)
                stacks = self._drop(stacks, rungs.get(done), done)
            if not stacks:
                break
            if done < self.protocol.last_epoch and time.monotonic() - saved >= self.save_seconds:
                state.epoch = done
                self._save(state, stacks)
                saved = time.monotonic()
        if self.keep_states:
            for stack in stacks:
                self.states |= {
                    trial: {**stack.head_state(position), **self._statistics(trial)}
                    for position, trial in enumerate(stack.trials)
                }

    def _train_epoch(
        self, epoch: int, fold: int, seed: int, stacks: Sequence[HeadStack], bar: tqdm
    ) -> dict[Trial, float]:
        steps = self._steps_per_epoch(fold)
        num_steps = steps * self.protocol.num_epochs
        # Where they lie, so that reading the losses does not stall a GPU in each step.
        sums: list[Tensor | float] = [0.0] * len(stacks)
        for number, batch in enumerate(self._batches(self.rows[fold].train, epoch, seed)):
            step = epoch * steps + number
            draws = Draws(seed, step, self.protocol.device)
            seen: dict[_View, _Seen] = {}
            for position, stack in enumerate(stacks):
                view = self._views[stack.trials[0].setting]
                if view not in seen:
                    seen[view] = self._prepare(batch["layer_features"], view, fold, draws, len(seen))
                batch_seen = seen[view]
                rates = [learning_rate_at(step, num_steps, t.setting.learning_rate) for t in stack.trials]
                with self._autocast():
                    inputs = stack.inputs(batch_seen.tokens, batch_seen.scales, draws)
                    sums[position] += stack.train_step(
                        inputs, batch["labels"], rates, MAX_GRADIENT_NORM, batch_seen.mixture
                    )
                bar.update(len(stack))
        losses: dict[Trial, float] = {}
        for stack, total in zip(stacks, sums, strict=True):
            means = (torch.as_tensor(total) / steps).tolist()
            losses |= dict(zip(stack.trials, means, strict=True))
        return losses

    def _batches(self, features: LayerFeatures, epoch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """In the order in which `Trainer` goes through them."""
        sampler = SeedableRandomSampler(range(len(features)), data_seed=seed, generator=torch.Generator())
        sampler.set_epoch(epoch)
        order = np.fromiter(sampler, dtype=np.int64, count=len(features))
        for start in range(0, len(order), self.protocol.batch_size):
            # Which rows come together is random; in the file's order they are gathered without a second copy.
            index = np.sort(order[start : start + self.protocol.batch_size])
            yield features.batch(index, self.protocol.device)

    def _prepare(self, raw: Tensor, view: _View, fold: int, draws: Draws | None, number: int) -> _Seen:
        """Normalised tokens of one view, mixed and with noise where `draws` are given."""
        if len(view.tokens) < raw.shape[1] or view.tokens != tuple(range(raw.shape[1])):
            raw = raw[:, list(view.tokens)]
        raw = raw[..., : view.width]
        tokens = self._workspace.take(f"tokens {number}", tuple(raw.shape), raw, self.protocol.dtype)
        tokens.copy_(raw)
        if view.normalization == "l2":
            tokens.div_(torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min_(1e-12))
        elif view.normalization == "standardize":
            standardizer = self._standardizer(fold, view)
            tokens.sub_(standardizer.mean.to(tokens.dtype)).div_(standardizer.std.to(tokens.dtype) + EPSILON)
        mixture = None
        if draws is not None and view.mixup_alpha:
            mixture = draws.mixture(view.mixup_alpha, len(tokens))
            mixture.mix_(tokens)
        if draws is not None and view.noise_std:
            uniform = draws.uniform("noisy rows", (len(tokens),))
            add_noise_(tokens, view.noise_std, view.noise_probability, uniform, draws.generator("noise"))
        return _Seen(tokens, token_scales(tokens, False, _LAYER_NORM_EPS), mixture)

    def _standardizer(self, fold: int, view: _View) -> TokenStandardizer:
        """The statistics of a fold's training rows, for the tokens of a view."""
        key = (fold, replace(view, noise_std=0.0, noise_probability=0.0, mixup_alpha=0.0))
        if key not in self._standardizers:
            bank = TokenBank(tuple(self.bank.coordinates[token] for token in view.tokens))
            fitted = TokenStandardizer(len(bank), view.width).to(self.protocol.device)
            fitted.fit(self.rows[fold].train.select_bank(bank))
            self._standardizers[key] = fitted
        return self._standardizers[key]

    def _statistics(self, trial: Trial) -> dict[str, Tensor]:
        """What standardises the tokens of a trial's head, on the CPU; nothing where that is not done."""
        view = self._views[trial.setting]
        if view.normalization != "standardize":
            return {}
        state = self._standardizer(trial.fold, view).state_dict(prefix="token_standardizer.")
        return {name: value.cpu().clone() for name, value in state.items()}

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.protocol.autocast or "bfloat16")
        return torch.autocast(self.protocol.device.type, dtype, enabled=self.protocol.autocast is not None)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, epoch: int, fold: int, stacks: Sequence[HeadStack], losses: Mapping[Trial, float]) -> None:
        validation = self.rows[fold].validation
        scores = {} if validation is None else self._scores(validation, fold, stacks)
        for trial in (trial for stack in stacks for trial in stack.trials):
            run = self.runs[trial]
            run.epochs.append(epoch)
            run.losses.append(losses[trial])
            if validation is not None:
                run.scores.append(scores[trial])
            if not math.isfinite(losses[trial]) or (validation is not None and math.isnan(scores[trial])):
                run.stopped = "diverged"

    @torch.no_grad()
    def _scores(self, features: LayerFeatures, fold: int, stacks: Sequence[HeadStack]) -> dict[Trial, float]:
        meters = [Meter(self.protocol.metric, stack.configs[0], len(stack)) for stack in stacks]
        for start in range(0, len(features), EVALUATION_BATCH):
            index = np.arange(start, min(start + EVALUATION_BATCH, len(features)))
            batch = features.batch(index, self.protocol.device)
            seen: dict[_View, _Seen] = {}
            for stack, meter in zip(stacks, meters, strict=True):
                view = self._views[stack.trials[0].setting]
                if view not in seen:
                    seen[view] = self._prepare(batch["layer_features"], view, fold, None, len(seen))
                inputs = stack.evaluation_inputs(seen[view].tokens, seen[view].scales)
                with self._autocast():
                    meter.add(stack.logits(inputs), batch["labels"])
        return {
            trial: score
            for stack, meter in zip(stacks, meters, strict=True)
            for trial, score in zip(stack.trials, meter.scores(), strict=True)
        }

    def _drop(self, stacks: Sequence[HeadStack], share: float | None, epoch: int) -> list[HeadStack]:
        """The stacks without heads that diverged, stopped getting better, or belong to the worse settings."""
        patience = self.protocol.patience
        for trial in (trial for stack in stacks for trial in stack.trials):
            run = self.runs[trial]
            if patience is None or run.stopped is not None or not run.scores or epoch == self.protocol.last_epoch:
                continue
            if epoch - run.epochs[int(np.argmax(run.scores))] >= patience:
                run.stopped = "patience"
        if share is not None:
            self._halve(share)
        kept = []
        for stack in stacks:
            alive = [position for position, trial in enumerate(stack.trials) if self.runs[trial].stopped is None]
            if 0 < len(alive) < len(stack):
                stack.keep(alive, epoch * self._steps_per_epoch(stack.trials[0].fold))
            if alive:
                kept.append(stack)
        return kept

    def _halve(self, share: float) -> None:
        """Stop the settings whose mean score over seeds and folds is not among the best."""
        scores: dict[Setting, list[float]] = {}
        for trial, run in self.runs.items():
            scores.setdefault(trial.setting, []).append(run.scores[-1] if run.stopped is None else run.score)
        better = better_settings({setting: float(np.mean(values)) for setting, values in scores.items()}, share)
        for trial, run in self.runs.items():
            if run.stopped is None and trial.setting not in better:
                run.stopped = "halving"

    # ---- state ---------------------------------------------------------------------------------------------------

    def _save(self, state: SweepState, stacks: Sequence[HeadStack] = ()) -> None:
        if self.checkpoint is None:
            return
        training = {
            trial: values for stack in stacks for trial, values in zip(stack.trials, stack.states(), strict=True)
        }
        # A copy, so that the arrays of heads that are dropped later are not kept.
        whole = replace(state, training=training)
        save_state(self.checkpoint, whole, self.trials, identity=self.identity, share=self.share)

    def _load(self) -> SweepState | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        return load_state(
            self.checkpoint, self.trials, identity=self.identity, share=self.share, overwrite=self.overwrite
        )


def better_settings(means: Mapping[Setting, float], share: float) -> list[Setting]:
    """The best of those that are still trained (the others' mean is NaN): `share` of all settings, at least one."""
    alive = [setting for setting, mean in means.items() if not math.isnan(mean)]
    alive.sort(key=lambda setting: rank(setting, means[setting]), reverse=True)
    return alive[: max(1, math.ceil(share * len(means)))]


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
