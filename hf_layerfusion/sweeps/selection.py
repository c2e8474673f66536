"""Which rows are trained on and validated on, and which setting is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import LayerFusionError
from ..features import LayerFeatures
from .settings import Setting


def split_rows(
    features: LayerFeatures,
    *,
    validation_size: float,
    num_folds: int | None,
    seed: int,
    groups: Sequence[Any] | np.ndarray | None = None,
    stratified: bool = True,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and validation rows: of one split, or of each of `num_folds` folds.

    Stratified by class where the labels are classes; whole numbers are, unless `stratified` is false. Rows of one group
    stay together, so one split of groups holds out only about `validation_size`: one part of 2, 3, 4, ... equal ones.

    Raises:
        LayerFusionError: if the rows cannot be split so.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, train_test_split

    rows = np.arange(len(features))
    labels = features.labels
    is_classes = stratified and labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
    if groups is not None and len(groups) != len(rows):
        raise LayerFusionError(f"groups has {len(groups)} entries, but there are {len(rows)} rows: give one per row")
    if num_folds is None and (not isinstance(validation_size, int | float) or not 0 < validation_size < 1):
        raise LayerFusionError(
            f"validation_size={validation_size!r} is no share of the rows: use more than 0, less than 1"
        )
    if num_folds is not None and (type(num_folds) is not int or num_folds < 2):
        raise LayerFusionError(f"num_folds={num_folds!r}: use 2 or more, or None for one validation split")
    try:
        if num_folds is None and groups is None:
            stratify = labels if is_classes else None
            train, held_out = train_test_split(rows, test_size=validation_size, random_state=seed, stratify=stratify)
            return [(np.sort(train), np.sort(held_out))]
        count = num_folds or max(2, round(1 / validation_size))
        if groups is None:
            folder = (StratifiedKFold if is_classes else KFold)(count, shuffle=True, random_state=seed)
        elif is_classes:
            folder = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        else:
            folder = GroupKFold(count)
        folds = list(folder.split(rows, labels if is_classes else None, groups))
    except (ValueError, TypeError) as error:  # TypeError: groups that cannot be compared
        raise LayerFusionError(
            f"{len(rows)} rows cannot be split for validation ({error}): add rows, or change validation_size or num_folds"
        ) from error
    if any(not len(part) for fold in folds for part in fold):
        raise LayerFusionError(f"{len(rows)} rows cannot be split for validation: one side of a split would be empty")
    return folds if num_folds else folds[:1]


def choose(scores: Mapping[Setting, Sequence[float]]) -> Setting:
    """The setting with the best mean score; of equal ones, the one with the stronger regularisation.

    Stronger is: a larger penalty of a head in closed form, more weight decay, then more attention dropout, then more noise
    (its size, then its probability), then a smaller learning rate.

    Raises:
        LayerFusionError: if no setting has a finite score.
    """
    finite = {setting: float(np.mean(values)) for setting, values in scores.items() if np.isfinite(values).all()}
    if not finite:
        raise LayerFusionError(
            "every setting of the sweep diverged: its losses or logits are not finite; try smaller learning rates"
        )

    return max(finite, key=lambda setting: rank(setting, finite[setting]))


def choose_recipe(scores: Mapping[Setting, Sequence[float]], order: Sequence[str], standard_error: float) -> Setting:
    """The best setting of the first recipe, in an order of preference, that is within a standard error of the best score.

    The rule of one standard error (Breiman et al. 1984, section 3.4.3, for the size of a tree): where validation rows do
    not tell recipes apart, the preferred one is taken rather than the one that was lucky on them.

    Args:
        scores: as for `choose`.
        order: of recipes; settings of others are chosen only if no setting of these is near enough.
        standard_error: of the best score.

    Raises:
        LayerFusionError: if no setting has a finite score.
    """
    best = choose(scores)
    least = float(np.mean(scores[best])) - standard_error
    near = {setting: values for setting, values in scores.items() if float(np.mean(values)) >= least}
    for recipe in order:
        if own := {setting: values for setting, values in near.items() if setting.recipe == recipe}:
            return choose(own)
    return best


def share_error(share: float, num_rows: int) -> float:
    """Standard error of a share of so many rows, `sqrt(s (1 - s) / n)`, the binomial distribution's.

    For balanced accuracy and F1 it is an approximation, which is good where classes are of like sizes.
    """
    return math.sqrt(max(0.0, share * (1 - share)) / num_rows)


def rank(setting: Setting, score: float) -> tuple:
    """What `choose` takes the largest of."""
    noise = (setting.noise_std, setting.noise_probability)
    # Means of folds differ in their last digits where the scores are the same.
    penalty = setting.ridge_penalty or 0.0
    return (
        round(score, 9),
        penalty,
        setting.weight_decay,
        setting.attention_dropout or 0.0,
        *noise,
        -setting.learning_rate,
    )


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
