"""How far a data set may be from what a backbone was pre-trained on, and which taps the literature would read then."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bank import TokenBank
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..features.store import FEATURES_COLUMN
from ..layout import TokenLayout
from .similarity import linear_cka

# The middle, as a share of all layers. The paper gives a range; on six small sets through one backbone of 12 layers the
# best activation was that of layers 9, 9, 6, 10, 8 and 7.
_MIDDLE = 2 / 3

# What that check said; it is not evidence for other backbones.
_CHECK = (
    "In our own check (six small sets, one DINOv2-S-derived backbone, patch means, logistic regression) the activation "
    "was ahead of the block output on five sets, by 0.9 to 3.2 points as a mean over layers, and LN2 on none. Much of "
    "that lead is width: in layers 7 to 9, where it was 0.3 to 8.2 points, as many of its units as the block output has "
    "were between 1.0 point behind and 2.4 ahead. No shift estimate told on which set it would be large: with six sets, "
    "none of the rank correlations could be told from chance."
)
_CONFIDENCE = {
    "strong": f"Low to moderate: a finding of one paper, about shift that its authors knew of. {_CHECK} Compare these "
    "taps with block outputs on validation rows.",
    "weak": f"Low: a finding of one paper, about shift that its authors knew of. {_CHECK} Compare these taps with the "
    "activation of middle layers on validation rows.",
    None: f"Low: what is not known about the shift cannot be estimated well enough to choose. {_CHECK} Compare all of "
    "these taps, and block outputs, on validation rows.",
}


@dataclass
class Reading:
    """One number with its spread: mean and standard deviation over random subsets of the images."""

    mean: float
    std: float


@dataclass
class ShiftEstimate:
    """What `estimate_shift` measured.

    Attributes:
        effective_ranks: by layer, the effective rank of the tokens.
        compression: 1 - effective rank of the last layer / highest effective rank of any layer.
        drift: 1 - linear CKA between the middle and the last layer.
        distance: squared kernel distance to the reference images at the last layer; `None` without a reference.
        module: of the tokens that were read.
        pool: likewise.
        subset_size: images in each subset.
        num_subsets: how many subsets were drawn.
        num_images: images they were drawn from.
        num_reference_images: likewise for the reference; 0 without one.
    """

    effective_ranks: dict[int, Reading]
    compression: Reading
    drift: Reading
    distance: Reading | None
    module: str
    pool: str
    subset_size: int
    num_subsets: int
    num_images: int
    num_reference_images: int = 0

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        ranks = values.pop("effective_ranks")
        return values | {"effective_ranks": [{"layer": layer, **rank} for layer, rank in ranks.items()]}

    def save_json(self, path: str | Path) -> None:
        """Write what `to_dict` gives."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")


def estimate_shift(
    features: LayerFeatures,
    *,
    reference: LayerFeatures | None = None,
    module: str = "block",
    pool: str = "mean",
    subset_size: int = 200,
    num_subsets: int = 5,
    seed: int = 0,
) -> ShiftEstimate:
    """Measure, without labels and without the pre-training data, what is known to go along with distribution shift.

    Of the tokens alone:

    - `compression`: how much the last layers shrink the data's effective rank, exp of the entropy of the normalised
      singular values (Roy and Vetterli 2007; RankMe, arXiv 2210.02885, eq. 1; here of centred, L2-normalised tokens).
      Late layers that compress representations degrade them most out of distribution (tunnel effect, arXiv 2305.19753).
    - `drift`: how little of the middle layer's geometry is left in the last layer, by unbiased linear CKA.

    With `reference`, the features of images like those of the pre-training:

    - `distance`: squared maximum mean discrepancy to it at the last layer, in the unbiased form and with the polynomial
      kernel of degree 3 of the Kernel Inception Distance (arXiv 1801.01401), of L2-normalised tokens, so that the
      kernel is (cosine + 1)^3. 0 within its spread means that the two cannot be told apart. Unlike a Fréchet distance,
      it has no bias with few images.

    None of them is a measure of the shift itself, and none tells which module wins; see `recommend_taps`. The first two
    depend on the data's own variety as much as on where it comes from (few classes or repeated images have a low rank
    everywhere); the last one depends on what was taken for the pre-training data. They compare data sets seen through
    one backbone at one image size, never backbones.

    How they did when the shift was known (photographs with noise, low contrast or few pixels, one DINOv2-S-derived
    backbone): compression rose with the strength of each corruption but the weakest noise, drift went either way, and the
    distance to other photographs rose under the strongest only, and fell under weaker ones. With random weights,
    compression and drift are 0. Over six small sets, compression ranked them
    as the points that the last block's probe is behind those of layers 6 to 9 do (Spearman 0.89, one of 32 correlations
    that were tried).

    Effective ranks depend on the number of images, so all of it is measured on subsets of one size. The spread is that
    over random subsets, which overlap if the data set is small, and says nothing about another data set of the same kind.

    Args:
        features: with one pool and module at two layers at least; labels are not read.
        reference: of the same backbone, with the same token of the last layer.
        module: whose tokens are read.
        pool: likewise.
        subset_size: images per subset; numbers of different sizes cannot be compared.
        num_subsets: how many are drawn.
        seed: of the draws.

    Raises:
        LayerFusionError: for fewer images than `subset_size`, tokens that are not in the features, or a reference that
            another backbone or image processor made.
    """
    selected = features.bank.select(modules=[module], pools=[pool])
    features = features.select_bank(TokenBank(tuple(sorted(selected.coordinates))))
    layers = [coordinate.layer for coordinate in features.bank.coordinates]
    if len(set(layers)) < len(layers):
        raise LayerFusionError(
            f"shift is estimated from one token of each layer, but pool={pool!r} has several: name one"
        )
    if len(layers) < 2:
        raise LayerFusionError(f"shift is estimated between layers, but the features have layer {layers[0]} only")
    _check_size(features, subset_size, "data set has")
    last = features.select(layers=layers[-1:])
    if reference is not None:
        for name in ("backbone", "processor"):
            if reference.fingerprint.get(name) != features.fingerprint.get(name):
                raise LayerFusionError(
                    f"the reference was extracted with another {name}: extract it with the same one"
                )
        reference = reference.select_bank(last.bank)
        _check_size(reference, subset_size, "reference has")
    middle = min(layers, key=lambda layer: abs(layer - layers[-1] / 2))
    between = features.select(layers=[middle, layers[-1]])
    # Of their own, so that a reference changes none of the other numbers.
    generator, reference_generator = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    ranks, drifts, distances = [], [], []
    for _ in range(num_subsets):
        rows = np.sort(generator.choice(len(features), subset_size, replace=False))
        ranks.append([_effective_rank(tokens) for tokens in _unit_tokens(features, rows)])
        drifts.append(1 - float(linear_cka(between.select_rows(rows)).matrix[0, 1]))
        if reference is not None:
            others = np.sort(reference_generator.choice(len(reference), subset_size, replace=False))
            distances.append(_kernel_distance(_unit_tokens(last, rows)[0], _unit_tokens(reference, others)[0]))
    return ShiftEstimate(
        effective_ranks={layer: _reading([row[n] for row in ranks]) for n, layer in enumerate(layers)},
        compression=_reading([1 - row[-1] / max(row) for row in ranks]),
        drift=_reading(drifts),
        distance=_reading(distances) if distances else None,
        module=module,
        pool=pool,
        subset_size=subset_size,
        num_subsets=num_subsets,
        num_images=len(features),
        num_reference_images=0 if reference is None else len(reference),
    )


def _check_size(features: LayerFeatures, subset_size: int, who: str) -> None:
    if subset_size < 4:
        raise LayerFusionError(f"subset_size={subset_size} is too small: use 4 or more, better hundreds")
    if len(features) < subset_size:
        raise LayerFusionError(
            f"the {who} {len(features)} images, fewer than subset_size={subset_size}: give more images, or a smaller "
            "subset_size for all that are to be compared"
        )


def _unit_tokens(features: LayerFeatures, rows: np.ndarray) -> Tensor:
    """`(N, n, D)`, float64, each of length one."""
    tokens = features.batch(rows)[FEATURES_COLUMN].transpose(0, 1).to("cpu", torch.float64)
    return torch.nn.functional.normalize(tokens, dim=-1)


def _effective_rank(tokens: Tensor) -> float:
    """Of `(n, D)` tokens."""
    values = torch.linalg.svdvals(tokens - tokens.mean(dim=0))
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _kernel_distance(tokens: Tensor, others: Tensor) -> float:
    """Unbiased squared MMD (Gretton et al. 2012, JMLR 13, lemma 6) between `(n, D)` and `(m, D)` unit vectors."""

    def within(values: Tensor) -> Tensor:
        kernel = (values @ values.mT + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (len(values) * (len(values) - 1))

    between = ((tokens @ others.mT + 1) ** 3).mean()
    return float(within(tokens) + within(others) - 2 * between)


def _reading(values: list[float]) -> Reading:
    return Reading(float(np.mean(values)), float(np.std(values)))


@dataclass
class TapRecommendation:
    """Which taps to compare, the most promising one first.

    Attributes:
        taps: `(layer, module)`.
        reason: why, in words.
        confidence: how far to trust it, in words.
    """

    taps: list[tuple[int, str]]
    reason: str
    confidence: str

    def __str__(self) -> str:
        taps = ", ".join(f"layer {layer} · {module}" for layer, module in self.taps)
        return f"{taps}\n{self.reason}\n{self.confidence}"


def recommend_taps(
    shift: ShiftEstimate | None, layout: TokenLayout, *, strength: str | None = None, num_taps: int = 4
) -> TapRecommendation:
    """Name the taps that arXiv 2603.05280 found best for linear probes, as candidates to compare on validation rows.

    No estimate chooses between them: no threshold is known, and none could be measured. Only `strength` does.

    Under strong shift between pre-training and task that is the activation inside the feed-forward network of a middle
    layer; under weak shift the output of the norm before it (LN2), of the last layers. If the strength is not known,
    LN2 comes first and the activation second, both of the middle. The paper has no number that separates strong from
    weak; for it, shift is strong between ImageNet-21k and corrupted pictures, clip art or sketches, and weak on what
    the backbone was fine-tuned on.

    Args:
        shift: from `estimate_shift`, or `None`; its numbers are repeated in the reason, and decide nothing.
        layout: of the backbone (`model.config.layout`).
        strength: `"strong"` or `"weak"`, if it is known from elsewhere; `None` if not.
        num_taps: how many taps to name, at most.

    Returns:
        The taps; where the backbone's blocks lack the module, block outputs of the same layers.

    Raises:
        LayerFusionError: for another strength, or less than one tap.
    """
    if strength not in ("strong", "weak", None):
        raise LayerFusionError(f"strength={strength!r} is unknown: use 'strong', 'weak' or None")
    if num_taps < 1:
        raise LayerFusionError(f"num_taps={num_taps} names no tap: use 1 or more")
    last = layout.num_layers
    middle = sorted(range(1, last + 1), key=lambda layer: (abs(layer - _MIDDLE * last), layer))
    if strength == "strong":
        taps = [(layer, "activation") for layer in middle]
    elif strength == "weak":
        taps = [(layer, "ln2") for layer in range(last, 0, -1)]
    else:
        taps = [(layer, module) for layer in middle for module in ("ln2", "activation")]
    # A family without the module (Swin V2 has no LN2, convolutional blocks may have no activation) has block outputs.
    there = [(layer, module if layout.width(layer, module) else "block") for layer, module in taps]
    return TapRecommendation(list(dict.fromkeys(there))[:num_taps], _reason(shift, strength), _CONFIDENCE[strength])


def _reason(shift: ShiftEstimate | None, strength: str | None) -> str:
    rules = {
        "strong": "Strong shift was stated: the feed-forward activation of middle layers (arXiv 2603.05280).",
        "weak": "Weak shift was stated: the output of the norm before the feed-forward network (LN2) of late layers "
        "(arXiv 2603.05280).",
        None: "The strength of the shift is not known: LN2 first, as arXiv 2603.05280 advises then, and the "
        "activation beside it.",
    }
    if shift is None:
        return rules[strength]
    measured = f"compression {shift.compression.mean:.2f}, drift {shift.drift.mean:.2f}"
    if shift.distance is not None:
        measured += f", distance {shift.distance.mean:.2f} to the reference"
    return f"{rules[strength]} Measured, and not used: {measured}."
