"""The linear head in closed form: weighted least squares with an L2 penalty, exact, for many penalties at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..bank import TokenBank
from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..heads import build_head
from ..heads.stack_inputs import StackInputs
from ..losses import LOGIT_SCALE
from ..pooling import pad_width
from .engine import Protocol, Rows
from .meter import Meter
from .settings import Setting
from .stack import Trial
from .state import TrialRun

logger = logging.get_logger(__name__)

# Unknowns of the largest system that is solved: 3 GiB in float64, and minutes on a CPU.
MAX_SYSTEM = 20_000
_BATCH_SIZE = 1024
# Coordinates that hardly vary over the training rows are left out: dividing by their spread would blow noise up.
_LEAST_SPREAD = 1e-6
_MOST_FACTOR = 20.0


def solve_ridge(
    rows: LayerFeatures,
    config: LayerFusionConfig,
    penalties: Sequence[float],
    class_weights: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Tensor]]:
    """Linear heads that minimise

        sum_i w_i |y_i - b - W z_i|^2 + penalty * |W|^2,

    with weights w_i of mean one and features z_i: normalised tokens, each coordinate minus its mean and over its standard
    deviation, and scaled so that all (layer, module, pool) count the same and |z|^2 has mean one. Standardisation is then
    folded into W and b, so that what comes out is an ordinary linear head. Of classes, y is one-hot, and the outputs are
    multiplied by `LOGIT_SCALE`, which changes no prediction and lets a softmax say something; `sweep` puts a measured
    scale in its place.

    Squared loss is on a par with cross-entropy or better where it has been compared (arXiv 2006.07322). The solution is
    that of the normal equations of whichever is fewer, coordinates or rows, by one Cholesky factor per penalty in float64.

    Args:
        rows: training rows, with labels.
        config: of the linear head.
        penalties: each greater than 0.
        class_weights: `(C,)`, for class indices.
        device: to compute on.

    Returns:
        The state dict of a [`LinearHead`] for each penalty, float32, on the CPU.

    Raises:
        LayerFusionError: if rows and coordinates are both too many, nothing varies, or tokens are normalised otherwise.
    """
    if config.token_normalization not in ("l2", "none"):
        raise LayerFusionError(
            f"token_normalization={config.token_normalization!r}: a least-squares head standardises by itself, use 'l2' or "
            "'none'"
        )
    rows = rows.select_bank(config.bank)
    device = torch.device(device)
    targets, weights = _targets(rows, config, class_weights, device)
    mean, scale = _standardisation(rows, config, weights, device)
    centre = (weights[:, None] * targets).sum(dim=0) / weights.sum()
    root = weights.sqrt()[:, None]
    wanted = root * (targets - centre)
    num_rows, num_coordinates = len(rows), int((scale > 0).sum())
    if not num_coordinates:
        raise LayerFusionError(
            "no coordinate of these tokens varies over the training rows: there is nothing to learn"
        )
    if refusal := _refusal(num_rows, num_coordinates):
        raise LayerFusionError(refusal)
    problem = _Problem(rows, config, mean, scale, root, wanted, device)
    solve = problem.solve_by_rows if num_rows <= num_coordinates else problem.solve_by_coordinates
    heads = []
    for solution in solve(penalties):  # (N * D, C), of standardised coordinates
        weight = (solution * scale.flatten()[:, None]).T
        bias = centre - weight @ mean.flatten()
        if config.problem_type != "regression":
            weight, bias = LOGIT_SCALE * weight, LOGIT_SCALE * bias
        if config.problem_type == "multi_label_classification":  # where a logit of 0 is undecided
            bias = bias - LOGIT_SCALE / 2
        state = {"classifier.weight": weight, "classifier.bias": bias}
        heads.append({name: value.float().cpu().contiguous() for name, value in state.items()})
    return heads


def _refusal(num_rows: int, num_coordinates: int) -> str | None:
    if min(num_rows, num_coordinates) <= MAX_SYSTEM:
        return None
    return (
        f"{num_rows} rows of {num_coordinates} coordinates: a least-squares head solves a system of up to {MAX_SYSTEM} "
        "rows or coordinates; choose fewer layers or pools, or a recipe that is trained in steps, such as 'alf'"
    )


def solvable(
    settings: Sequence[Setting], configs: Mapping[Setting, LayerFusionConfig], num_rows: int
) -> list[Setting]:
    """The settings without those in closed form that this many rows are too many for, which a warning names.

    Raises:
        LayerFusionError: if none is left.
    """
    refusals: dict[str, str] = {}
    for setting in settings:
        if setting.ridge_penalty is not None:
            config = configs[setting]
            if refusal := _refusal(num_rows, sum(config.bank.widths(config.layout))):
                refusals[setting.recipe] = refusal
    kept = [setting for setting in settings if setting.recipe not in refusals]
    for recipe, refusal in refusals.items():
        if not kept:
            raise LayerFusionError(f"recipe {recipe!r}: {refusal}")
        logger.warning(f"recipe {recipe!r} is left out: {refusal}")
    return kept


def solve_trials(
    trials: Sequence[Trial],
    configs: Mapping[Setting, LayerFusionConfig],
    rows: Sequence[Rows],
    protocol: Protocol,
) -> tuple[dict[Trial, TrialRun], dict[Trial, dict[str, Tensor]]]:
    """What became of trials of heads in closed form, and their state dicts: penalties of one bank are solved together.

    Seeds make no difference to these heads.

    Raises:
        LayerFusionError: see [`solve_ridge`].
    """
    runs: dict[Trial, TrialRun] = {}
    heads: dict[Trial, dict[str, Tensor]] = {}
    groups: dict[tuple[int, Setting], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.fold, replace(trial.setting, ridge_penalty=None)), []).append(trial)
    for (fold, setting), members in groups.items():
        config = configs[members[0].setting]
        penalties = list(dict.fromkeys(float(trial.setting.ridge_penalty or 0) for trial in members))
        class_weights = rows[fold].class_weights if setting.balance_classes else None
        with torch.no_grad():
            states = solve_ridge(rows[fold].train, config, penalties, class_weights, protocol.device)
            scores, factors = _scores(rows[fold].validation, config, states, protocol)
        for trial in members:
            number = penalties.index(float(trial.setting.ridge_penalty or 0))
            runs[trial] = TrialRun(
                epochs=[1],
                scores=[scores[number]],
                losses=[math.nan],
                epochs_trained=1,
                logit_factor=factors[number],
            )
            heads[trial] = states[number]
    return runs, heads


def _scores(
    rows: LayerFeatures | None, config: LayerFusionConfig, states: Sequence[dict[str, Tensor]], protocol: Protocol
) -> tuple[list[float], list[float]]:
    """Of each head the metric, and what `TrialRun.logit_factor` says."""
    if rows is None:
        return [math.nan] * len(states), [1.0] * len(states)
    head: Any = build_head(config)
    parameters = {name: torch.stack([state[name] for state in states]).to(protocol.device) for name in states[0]}
    meter = Meter(protocol.metric, config, len(states))
    rows = rows.select_bank(config.bank)
    labels = torch.as_tensor(rows.labels).to(protocol.device)
    outputs = []
    for part, tokens in _batches(rows, config, protocol.device):
        outputs.append(head.run_stack(parameters, {}, StackInputs(tokens, training=False)))
        meter.add(outputs[-1], labels[part])
    factors = [1.0] * len(states)
    if config.problem_type == "single_label_classification":
        factors = [logit_factor(logits, labels) for logits in torch.cat(outputs, dim=1)]
    return meter.scores(), factors


def logit_factor(logits: Tensor, labels: Tensor) -> float:
    """What to multiply logits by so that their mean log loss is least: temperature scaling (arXiv 1706.04599).

    Labels are smoothed by 1 / (n + 2), as in Platt (1999), without which the factor would grow without end where all rows
    are right.

    Args:
        logits: `(n, C)`, of rows that the head was not fitted to.
        labels: `(n,)`.

    Returns:
        A factor between 1/20 and 20.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()

    def loss(factor: float) -> float:
        return float(F.cross_entropy(factor * logits, labels, label_smoothing=1 / (len(labels) + 2)))

    return float(minimize_scalar(loss, bounds=(1 / _MOST_FACTOR, _MOST_FACTOR), method="bounded").x)


def scaled_head(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A linear head with other logits, and the same predictions."""
    return {name: factor * value for name, value in state.items()}


def _targets(
    rows: LayerFeatures, config: LayerFusionConfig, class_weights: Sequence[float] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """y `(n, C)` and w `(n,)`, float64."""
    labels = torch.as_tensor(rows.labels).to(device)
    if config.problem_type != "single_label_classification":
        return labels.double().view(len(rows), -1), torch.ones(len(rows), dtype=torch.float64, device=device)
    weights = torch.ones(config.num_labels, dtype=torch.float64, device=device)
    if class_weights is not None:
        weights = torch.as_tensor(class_weights, dtype=torch.float64, device=device)
    of_rows = weights[labels]
    return F.one_hot(labels, config.num_labels).double(), of_rows / of_rows.mean()


def _batches(rows: LayerFeatures, config: LayerFusionConfig, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Normalised tokens `(b, N, D)`, float32, and which rows they are."""
    start = 0
    for batch in rows.batches(_BATCH_SIZE, device=device):
        tokens = batch["layer_features"].float()
        if config.token_normalization == "l2":
            tokens = F.normalize(tokens, dim=-1)
        yield slice(start, start + len(tokens)), tokens
        start += len(tokens)


def _standardisation(
    rows: LayerFeatures, config: LayerFusionConfig, weights: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and scale of every coordinate, `(N, D)` float64; the scale of one that does not vary is 0."""
    total = squares = torch.zeros((), dtype=torch.float64, device=device)
    for part, tokens in _batches(rows, config, device):
        share = (weights[part] / weights.sum())[:, None, None]
        total = total + (share * tokens).sum(dim=0)
        squares = squares + (share * tokens.double().square()).sum(dim=0)
    spread = (squares - total.square()).clamp(min=0).sqrt()
    varies = spread > _LEAST_SPREAD
    scale = torch.where(varies, 1 / spread.clamp(min=_LEAST_SPREAD), 0.0)
    groups = config.bank.groups.values()  # all cells of a grid together
    for positions in groups:
        scale[positions] /= (varies[positions].sum().clamp(min=1) * len(groups)).sqrt()
    return total, scale


@dataclass
class _Problem:
    """What is solved for every penalty.

    Attributes:
        rows: training rows, with the head's tokens.
        config: of the head.
        mean: of every coordinate, `(N, D)` float64.
        scale: likewise, 0 where nothing varies.
        root: square roots of the rows' weights, `(n, 1)` float64.
        wanted: centred targets times those, `(n, C)` float64.
        device: to compute on.
    """

    rows: LayerFeatures
    config: LayerFusionConfig
    mean: Tensor
    scale: Tensor
    root: Tensor
    wanted: Tensor
    device: torch.device

    def solve_by_rows(self, penalties: Sequence[float]) -> list[Tensor]:
        """With a matrix of rows by rows: W = Z' a, (Z Z' + penalty) a = y. Holds the features of one layer at a time."""
        parts = self._layers()
        gram = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64, device=self.device)
        for positions in parts:
            features = self._features(positions)
            gram += features @ features.T
        duals = torch.cat([_solved(gram, self.wanted, penalty) for penalty in penalties], dim=1).float()  # (n, P * C)
        solution = torch.empty(*self.mean.shape, duals.shape[1], dtype=torch.float64, device=self.device)
        for positions in parts:
            product = self._features(positions).T @ duals
            solution[positions] = product.double().view(len(positions), self.mean.shape[1], -1)
        return list(solution.flatten(0, 1).split(self.wanted.shape[1], dim=1))

    def solve_by_coordinates(self, penalties: Sequence[float]) -> list[Tensor]:
        """With a matrix of coordinates by coordinates: (Z' Z + penalty) W = Z' y. Holds one batch of features at a time."""
        kept = self.scale.flatten() > 0
        count = int(kept.sum())
        gram = torch.zeros(count, count, dtype=torch.float64, device=self.device)
        product = torch.zeros(count, self.wanted.shape[1], dtype=torch.float64, device=self.device)
        for part, tokens in _batches(self.rows, self.config, self.device):
            features = self._standardised(tokens, part, slice(None))[:, kept]
            gram += features.T @ features
            product += features.T.double() @ self.wanted[part]
        solutions = []
        for penalty in penalties:
            solution = torch.zeros(len(kept), self.wanted.shape[1], dtype=torch.float64, device=self.device)
            solution[kept] = _solved(gram, product, penalty)
            solutions.append(solution)
        return solutions

    def _layers(self) -> list[list[int]]:
        """Positions of the tokens of each layer."""
        layers: dict[int, list[int]] = {}
        for position, coordinate in enumerate(self.config.bank.coordinates):
            layers.setdefault(coordinate.layer, []).append(position)
        return list(layers.values())

    def _features(self, positions: list[int]) -> Tensor:
        """Weighted standardised coordinates of some tokens, `(n, T * D)` float32."""
        bank = TokenBank(tuple(self.config.bank.coordinates[position] for position in positions))
        features = torch.empty(len(self.rows), len(positions) * self.mean.shape[1], device=self.device)
        for part, tokens in _batches(self.rows.select_bank(bank), self.config, self.device):
            # A selection is as wide as its widest token.
            features[part] = self._standardised(pad_width(tokens, self.mean.shape[1]), part, positions)
        return features

    def _standardised(self, tokens: Tensor, part: slice, positions: list[int] | slice) -> Tensor:
        shift, factor = self.mean[positions].float(), self.scale[positions].float()
        return ((tokens - shift) * factor).flatten(1) * self.root[part].float()


def _solved(gram: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    """`(gram + penalty)^-1 wanted`."""
    system = gram.clone()
    system.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise LayerFusionError(
            f"ridge_penalty={penalty:g} is too small for these features: rounding makes the system singular"
        )
    return torch.cholesky_solve(wanted, factor)


__all__ = ["MAX_SYSTEM", "logit_factor", "scaled_head", "solvable", "solve_ridge", "solve_trials"]
