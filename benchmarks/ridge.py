"""Heads in closed form: a whole path of penalties against scikit-learn's, and against a sweep of heads trained in steps.

    python benchmarks/ridge.py [--rows 1000] [--layers 12] [--width 384] [--classes 10] [--threads 1] [--rounds 3]

Tokens are noise from the cache: what is timed does not depend on their values. scikit-learn standardises the same matrix
and fits one `Ridge` per penalty. The sweep is of `linear-all` with three learning rates and 1000 steps, without the fit of
the chosen one. Solutions are compared with scikit-learn's before anything is timed. The contenders take turns; ratios are
medians over rounds, with the worst round beside them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import seconds_of, speedup, take_turns
from sklearn.linear_model import Ridge
from task import extract_noise

from hf_layerfusion import LayerFeatures, LayerFusionConfig, sweep
from hf_layerfusion.losses import LOGIT_SCALE
from hf_layerfusion.sweeps import solve_ridge

Weights = list[np.ndarray]
PENALTIES = tuple(float(f"{10 ** (exponent / 2):.3g}") for exponent in range(-8, 4))


def fit_by_scikit_learn(features: LayerFeatures, classes: int) -> Weights:
    """The weights `(C, N * D)` of all penalties, in terms of the tokens."""
    tokens = torch.cat([batch["layer_features"].float() for batch in features.batches(1024)])
    flat = torch.nn.functional.normalize(tokens, dim=-1).flatten(1).numpy()
    mean, spread = flat.mean(axis=0), flat.std(axis=0)
    # As many tokens as groups, of which each has as many coordinates as are wide: |z|^2 has mean one.
    scale = 1 / (spread * np.sqrt(flat.shape[1]))
    inputs, targets = (flat - mean) * scale, np.eye(classes)[features.labels]
    return [Ridge(alpha=penalty).fit(inputs, targets).coef_ * scale for penalty in PENALTIES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    classes = arguments.classes
    with tempfile.TemporaryDirectory() as folder:
        _, features = extract_noise(
            Path(folder), rows=arguments.rows, layers=arguments.layers, width=arguments.width, classes=classes
        )
        config = LayerFusionConfig(
            recipe="ridge-all",
            token_layout=features.fingerprint["token_layout"],
            num_labels=classes,
            problem_type="single_label_classification",
        )
        ours = [state["classifier.weight"].numpy() / LOGIT_SCALE for state in solve_ridge(features, config, PENALTIES)]
        theirs = fit_by_scikit_learn(features, classes)
        worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))
        print(
            f"{len(features)} rows of {ours[0].shape[1]} coordinates, {len(PENALTIES)} penalties; weights differ by at "
            f"most {worst:.1e} of the largest"
        )
        grid = {"learning_rate": [1.0, 0.1, 0.03], "weight_decay": 1e-4}
        contenders = {
            "`solve_ridge`": lambda: seconds_of(lambda: solve_ridge(features, config, PENALTIES)),
            "scikit-learn's `Ridge`": lambda: seconds_of(lambda: fit_by_scikit_learn(features, classes)),
            "`linear-all`, 3 settings of 1000 steps": lambda: seconds_of(
                lambda: sweep(features, recipe="linear-all", grid=grid, refit=False, progress=False)
            ),
        }
        seconds = take_turns(contenders, arguments.rounds)
    print("\n| seconds | times `solve_ridge` (least) | |\n|---:|---:|---|")
    own = seconds["`solve_ridge`"]
    for name, taken in seconds.items():
        print(f"| {np.median(taken):.2f} | {speedup(taken, own)} | {name} |")


if __name__ == "__main__":
    main()
