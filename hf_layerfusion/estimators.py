"""Recipes that scikit-learn fits instead of a head: k nearest neighbours, PCA, and logistic regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bank import TokenBank
from .errors import LayerFusionError
from .features import LayerFeatures
from .layout import TokenLayout
from .sweeps.inputs import check_choice, checked_groups, labelled
from .sweeps.selection import split_rows
from .training.metrics import IGNORED_LABEL, Accuracy, BalancedAccuracy

# Weights exp(similarity / 0.07): arXiv 1805.01978, "Weighted k-Nearest Neighbor Classifier", and so in the evaluation
# of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).
TEMPERATURE = 0.07
# The reference of arXiv 2601.09322 keeps as many components (`PCAConcatFeatureCombiner`).
KEPT_VARIANCE = 0.99
# arXiv 2603.05280's `run_linear_probing`.
MAX_ITERATIONS = 5000

# The hyper-parameter of each estimator, and the values it is chosen from.
_PARAMETERS = {"knn": "k", "pca": "C", "logistic": "C"}
_VALUES: dict[str, tuple[float, ...]] = {
    "knn": (1, 5, 10, 20, 50),
    "pca": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "logistic": (1.0,),
}
ESTIMATORS = tuple(_PARAMETERS)

_BATCH_SIZE = 1024


@dataclass(frozen=True)
class FittedEstimator:
    """What `fit_estimator` returns.

    Attributes:
        name: `"knn"`, `"pca"` or `"logistic"`.
        bank: the tokens that it reads.
        setting: the chosen hyper-parameters.
        num_parameters: weights and biases of the classifier, which are fitted to labels; 0 for nearest neighbours. Means,
            scales and principal components are not counted.
        validation_score: balanced accuracy of the chosen value on the validation rows; `None` where there was one value.
        validation_scores: that of each value.
    """

    name: str
    bank: TokenBank
    setting: dict[str, Any]
    num_parameters: int
    validation_score: float | None
    validation_scores: dict[float, float]
    _pipeline: Any
    _fingerprint: dict[str, Any]

    def predict(self, features: LayerFeatures) -> np.ndarray:
        """Classify rows.

        Args:
            features: that hold the tokens of `bank`, and maybe others.

        Returns:
            `(T,)` int64, class indices.

        Raises:
            LayerFusionError: if tokens are missing or not finite, or came from another backbone or image processor.
        """
        features = features.select_bank(self.bank)
        for part, found in _fingerprint(features).items():
            if found != self._fingerprint[part]:
                raise LayerFusionError(
                    f"these features have another {part} than those that the estimator was fitted to: extract both with "
                    "the same backbone and image processor"
                )
        features.check()
        if not len(features):
            return np.empty(0, dtype=np.int64)
        return self._pipeline.predict(_read_tokens(features)).astype(np.int64)

    def score(self, features: LayerFeatures) -> dict[str, float]:
        """Predict and compare with the labels; rows with the label -100 do not count.

        Returns:
            `{"balanced_accuracy", "accuracy"}`, 0 to 1.

        Raises:
            LayerFusionError: if there are no labels, and as `predict`.
        """
        if features.labels is None:
            raise LayerFusionError("the features have no labels: extract them with label_column=")
        kept = np.flatnonzero(features.labels != IGNORED_LABEL)
        if not len(kept):
            raise LayerFusionError("the features hold no labelled row: there is nothing to compare predictions with")
        return _scores(features.labels[kept], self.predict(features.select_rows(kept)))


def fit_estimator(
    name: str,
    features: LayerFeatures,
    *,
    values: Sequence[float] | None = None,
    num_labels: int | None = None,
    validation_size: float = 0.2,
    num_folds: int | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    split_seed: int = 0,
    seed: int = 0,
) -> FittedEstimator:
    """Fit a scikit-learn model to cached tokens, each divided by its L2 norm, all of a row concatenated.

    - `"knn"`: k nearest neighbours by cosine similarity s, which vote with weights exp(s / 0.07): the protocol of DINO
      and DINOv2 (arXiv 2104.14294, 2304.07193; from arXiv 1805.01978). k is chosen from 1, 5, 10, 20 and 50.
    - `"pca"`: standardised, then the principal components with 99 % of the variance, as the reference of arXiv 2601.09322
      does (`PCAConcatFeatureCombiner`), then logistic regression with classes weighted by n / (C * count). That is the
      model and the loss of a linear probe; its L2 penalty, whose strength is chosen, stands in for AdamW's decay, and as
      the optimum is unique there are no learning rate, epochs or seeds to choose.
    - `"logistic"`: the pipeline of arXiv 2603.05280 (`run_linear_probing` of its code): standardised, then logistic
      regression with scikit-learn's defaults but for 5000 iterations. Nothing is chosen.

    Where there are several values, each is fitted to a part of the rows and judged by balanced accuracy on the others, the
    split that `sweep` makes with the same arguments; of equal ones the more regularised is taken (larger k, smaller C).
    Standardisation and components come from the fitted rows only. The chosen one is fitted again to all rows.

    The tokens are held in memory as `(rows, N * D)` float32, two to three times while fitting.

    Args:
        name: `"knn"`, `"pca"` or `"logistic"`.
        features: training rows, with exactly the tokens to read (`features.select(...)`). Rows with the label -100 are
            left out.
        values: what to choose from: k, or the inverse penalty C of the logistic regression. One value is taken as it is.
        num_labels: number of classes, if the features do not name them.
        validation_size: share of the rows held out to choose a value.
        num_folds: use so many folds instead of one split.
        groups: for each row, what it belongs to; rows of a group stay on one side.
        split_seed: of the split.
        seed: handed to scikit-learn. All three are solved to the end, so that seeds make no difference.

    Raises:
        LayerFusionError: for an unknown name, values that make no sense, missing labels, labels that are no classes or
            all the same, tokens that are not finite, or rows that cannot be split.
    """
    check_choice("estimator", name, ESTIMATORS)
    candidates = _checked_values(name, values)
    num_rows = len(features)
    features, kept, options = labelled(features, num_labels, None, "single_label_classification")
    num_labels = options["num_labels"] if "num_labels" in options else len(options["id2label"])
    features.check(num_labels)
    kept_groups = checked_groups(groups, kept, num_rows)
    tokens, labels = _read_tokens(features), features.labels
    assert labels is not None  # `labelled` refuses features without
    scores: dict[float, float] = {}
    chosen = candidates[0]
    if len(candidates) > 1:
        folds = split_rows(
            features, validation_size=validation_size, num_folds=num_folds, seed=split_seed, groups=kept_groups
        )
        scores = _validate(name, candidates, tokens, labels, folds, seed)
        # Means of folds differ in their last digits where the scores are the same.
        chosen = max(scores, key=lambda value: (round(scores[value], 9), value if name == "knn" else -value))
    elif name == "knn" and chosen > len(labels):
        raise LayerFusionError(f"k={chosen}, but there are {len(labels)} rows: use fewer neighbours")
    preparation, classifier = _build(name, chosen, tokens.shape, seed)
    prepared = _fit_preparation(name, preparation, tokens)
    classifier.fit(prepared, labels)
    setting: dict[str, Any] = {_PARAMETERS[name]: chosen}
    if name == "knn":
        setting["temperature"] = TEMPERATURE
    if name == "pca":
        setting |= {"components": int(prepared.shape[1]), "variance": KEPT_VARIANCE}
    return FittedEstimator(
        name=name,
        bank=features.bank,
        setting=setting,
        num_parameters=0 if name == "knn" else int(classifier.coef_.size + classifier.intercept_.size),
        validation_score=scores.get(chosen),
        validation_scores=scores,
        _pipeline=_Pipeline(preparation, classifier),
        _fingerprint=_fingerprint(features),
    )


@dataclass(frozen=True)
class _Pipeline:
    """What is fitted once per rows, and what once per value."""

    preparation: Any
    classifier: Any

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        prepared = tokens if self.preparation is None else self.preparation.transform(tokens)
        return self.classifier.predict(prepared)


def _checked_values(name: str, values: Sequence[float] | None) -> list[float]:
    if values is None:
        return list(_VALUES[name])
    listed = list(values) if isinstance(values, Sequence | np.ndarray) and not isinstance(values, str) else []
    parameter = _PARAMETERS[name]
    if not listed or len(set(listed)) != len(listed):
        raise LayerFusionError(f"values={values!r}: give a list of one or several different values of {parameter}")
    checked: list[float] = []
    for value in listed:
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise LayerFusionError(f"values={values!r}: {parameter}={value!r} is no number above 0")
        if name == "knn" and value != int(value):
            raise LayerFusionError(f"values={values!r}: k={value!r} is no whole number")
        checked.append(int(value) if name == "knn" else float(value))
    return checked


def _validate(
    name: str,
    values: Sequence[float],
    tokens: np.ndarray,
    labels: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    seed: int,
) -> dict[float, float]:
    """Mean balanced accuracy of each value over the folds."""
    fewest = min(len(train) for train, _ in folds)
    usable = [value for value in values if name != "knn" or value <= fewest]
    if not usable:
        raise LayerFusionError(
            f"k={min(values)} is the smallest value, but only {fewest} rows are fitted to: use fewer"
        )
    found: dict[float, list[float]] = {value: [] for value in usable}
    for train, held_out in folds:
        if len(np.unique(labels[train])) < 2:
            raise LayerFusionError(
                "the rows left after the validation split have one class: add rows, or change validation_size or "
                "num_folds"
            )
        fitted, judged = tokens[train], tokens[held_out]
        preparation, _ = _build(name, usable[0], fitted.shape, seed)
        fitted = _fit_preparation(name, preparation, fitted)
        if preparation is not None:
            judged = preparation.transform(judged)
        for value in usable:
            _, classifier = _build(name, value, fitted.shape, seed)
            predictions = classifier.fit(fitted, labels[train]).predict(judged)
            found[value].append(_scores(labels[held_out], predictions)["balanced_accuracy"])
    return {value: float(np.mean(scores)) for value, scores in found.items()}


def _build(name: str, value: float, shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """The preparation, which does not depend on the value, and the classifier."""
    # Here, because scikit-learn takes seconds to import.
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == "knn":
        options: dict[str, Any] = {"algorithm": "brute", "metric": "cosine", "weights": _neighbour_weights}
        return None, KNeighborsClassifier(n_neighbors=int(value), **options)
    if name == "logistic":
        return StandardScaler(), LogisticRegression(C=value, max_iter=MAX_ITERATIONS, random_state=seed)
    # The same components either way: of D x D numbers where there are more rows than columns, else of the rows.
    solver = "covariance_eigh" if shape[0] > shape[1] else "full"
    preparation = make_pipeline(StandardScaler(), PCA(KEPT_VARIANCE, svd_solver=solver, random_state=seed))
    return preparation, LogisticRegression(
        C=value, class_weight="balanced", max_iter=MAX_ITERATIONS, random_state=seed
    )


def _fit_preparation(name: str, preparation: Any, tokens: np.ndarray) -> np.ndarray:
    """Fit it, and return the rows as the classifier takes them."""
    if preparation is None:
        return tokens
    if name == "pca" and (tokens == tokens[0]).all():
        raise LayerFusionError("the tokens are the same in all rows, so they have no principal components")
    return preparation.fit_transform(tokens)


def _neighbour_weights(distances: np.ndarray) -> np.ndarray:
    """Votes `(T, k)` of neighbours at cosine distances `(T, k)`."""
    return np.exp((1 - distances) / TEMPERATURE)


def _read_tokens(features: LayerFeatures) -> np.ndarray:
    """Unit tokens, concatenated without the padding of narrow ones: `(rows, N * D)` float32."""
    layout = features.fingerprint.get("token_layout")
    widths = features.bank.widths(TokenLayout(**layout)) if layout else [features.hidden_size] * len(features.bank)
    ends = np.cumsum(widths)
    tokens = np.empty((len(features), ends[-1]), dtype=np.float32)
    for start, batch in zip(range(0, len(features), _BATCH_SIZE), features.batches(_BATCH_SIZE), strict=True):
        values = batch["layer_features"].float().cpu().numpy()
        for token, (end, width) in enumerate(zip(ends, widths, strict=True)):
            # As arXiv 2603.05280's code does it: lbfgs ends elsewhere, by a few test rows, if inputs differ in their
            # last bit. Module probes of narrow taps would take four times as long with the padding.
            kept = values[:, token, :width]
            norms = np.linalg.norm(kept, axis=-1, keepdims=True)
            tokens[start : start + len(values), end - width : end] = kept / np.where(norms > 0, norms, 1)
    return tokens


def _fingerprint(features: LayerFeatures) -> dict[str, Any]:
    """What two caches must share for a model of one to read the other."""
    backbone = features.fingerprint.get("backbone") or {}
    return {"backbone": backbone.get("digest"), "processor": features.fingerprint.get("processor")}


def _scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in (BalancedAccuracy(), Accuracy()):
        found |= metric.compute(predictions=predictions, references=labels)
    return found


__all__ = ["ESTIMATORS", "FittedEstimator", "fit_estimator"]
