"""What a cheaper strategy of `sweep` loses: cost against regret on real datasets.

    python benchmarks/real_datasets.py --output_dir datasets
    layerfusion extract --backbone BACKBONE --dataset datasets/NAME --image_size 112 --output_dir features/NAME
    python benchmarks/strategies.py --features_dir features --output_dir outputs/strategies [--names digits,emoji]

Every setting of the grid is trained once (`strategy="full"`). A head's numbers do not depend on which others are trained
beside it, so what `merged` and every plan of halving would have chosen is read off the same learning curves; the tests
check that the engine does choose so. Cost is the share of the head steps of `full`; regret is what the choice of
`full` scores more: on the validation rows that chose it, and, of heads trained again on all training rows, on the test
rows, which nothing else ever reads.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from hf_layerfusion import LayerFeatures
from hf_layerfusion.heads import build_head
from hf_layerfusion.sweeps import Setting, SweepResult, expand_grid, sweep
from hf_layerfusion.sweeps.engine import CURVE_POINTS, RUNGS, better_settings, learning_rate_at
from hf_layerfusion.sweeps.selection import choose
from hf_layerfusion.sweeps.settings import merge_settings
from hf_layerfusion.training import BalancedAccuracy

# Points of the curve (of 20) and the share of settings that goes on from there.
PLANS = {
    "halving": RUNGS,
    "halving, early": ((1, 0.5), (2, 0.25), (5, 0.1)),
    "halving, late": ((6, 0.5), (10, 0.25), (14, 0.1)),
    "halving, gentle": ((5, 0.67), (10, 0.33), (15, 0.15)),
}


def curves_of(result: SweepResult, settings: list[Setting]) -> dict[Setting, list[float]]:
    """Validation scores at each point of the curve; constant after the end of a diverged one."""
    curves = {}
    for curve in result.curves:
        scores = [score if np.isfinite(score) else -1.0 for score in curve["scores"]]
        curves[settings[curve["setting"]]] = scores + [-1.0] * (CURVE_POINTS - len(scores))
    return curves


def halve(
    curves: dict[Setting, list[float]], plan: tuple[tuple[int, float], ...]
) -> tuple[dict[Setting, float], float]:
    """The survivors' final scores, and the points of curves that were trained."""
    alive, cost, before = list(curves), 0.0, 0
    for point, share in plan:
        cost += len(alive) * (point - before)
        before = point
        means = {setting: curves[setting][point - 1] if setting in alive else np.nan for setting in curves}
        alive = better_settings(means, share)
    cost += len(alive) * (CURVE_POINTS - before)
    return {setting: curves[setting][-1] for setting in alive}, cost


def evaluate(result: SweepResult, test: LayerFeatures) -> float:
    """Balanced accuracy of the head that was trained on all training rows."""
    head = build_head(result.config).eval()
    head.load_state_dict(result.head_state())
    rows = test.select_bank(result.config.bank).tensors()
    tokens = torch.nn.functional.normalize(rows["layer_features"].float(), dim=-1)
    with torch.no_grad():
        predictions = torch.cat([head(part).argmax(dim=-1) for part in tokens.split(1024)])
    metric = BalancedAccuracy().compute(predictions=predictions, references=rows["labels"])
    return metric["balanced_accuracy"]


def measure(name: str, arguments: argparse.Namespace) -> list[dict]:
    train, test = (LayerFeatures.open(arguments.features_dir / name / split) for split in ("train", "test"))
    settings = expand_grid(arguments.grid, [arguments.recipe])
    # One at a time: then a head's numbers do not depend on the others to the bit.
    options = {"recipe": arguments.recipe, "num_epochs": arguments.num_epochs, "heads_at_once": 1}
    folder = arguments.output_dir / name
    result = sweep(train, grid=arguments.grid, strategy="full", refit=False, output_dir=folder, **options)
    curves = curves_of(result, settings)
    rows_trained = len(train) - math.ceil(0.2 * len(train))
    steps = result.protocol["num_epochs"] * math.ceil(rows_trained / result.protocol["batch_size"])
    sums = {
        rate: sum(learning_rate_at(step, steps, rate) for step in range(steps))
        for rate in {setting.learning_rate for setting in settings}
    }
    distinct = [settings[number] for number in sorted(set(merge_settings(settings, sums)))]
    merged = {setting: curves[setting] for setting in distinct}
    choices = {"full": (settings, len(settings) * CURVE_POINTS), "merged": (distinct, len(distinct) * CURVE_POINTS)}
    for plan, rungs in PLANS.items():
        survivors, cost = halve(merged, rungs)
        choices[plan] = (list(survivors), cost)
    rows, tested = [], {}
    for strategy, (candidates, cost) in choices.items():
        best = choose({setting: [curves[setting][-1]] for setting in candidates})
        if best not in tested:
            # With one setting, all that is left of a sweep is the training on all rows.
            tested[best] = evaluate(sweep(train, grid=best.to_dict(), progress=False, **options), test)
        rows.append(
            {
                "dataset": name,
                "strategy": strategy,
                "cost": cost / (len(settings) * CURVE_POINTS),
                "validation": curves[best][-1],
                "test": tested[best],
                "learning_rate": best.learning_rate,
                "weight_decay": best.weight_decay,
                "attention_dropout": best.attention_dropout,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--features_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/strategies"))
    parser.add_argument("--names", help="default: all folders of --features_dir")
    parser.add_argument("--recipe", default="alf")
    parser.add_argument("--grid", default="paper")
    parser.add_argument("--num_epochs", type=int, help="default: the paper's protocol")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folders = (
        arguments.names.split(",") if arguments.names else sorted(p.name for p in arguments.features_dir.iterdir())
    )
    print("| dataset | strategy | cost | validation | regret | test | regret | chosen: rate, decay, dropout |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for name in folders:
        rows = measure(name, arguments)
        (arguments.output_dir / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        full = rows[0]
        for row in rows:
            print(
                f"| {name} | {row['strategy']} | {row['cost']:.2f} | {100 * row['validation']:.1f} | "
                f"{100 * (full['validation'] - row['validation']):.1f} | {100 * row['test']:.1f} | "
                f"{100 * (full['test'] - row['test']):.1f} | {row['learning_rate']:g}, {row['weight_decay']:g}, "
                f"{row['attention_dropout']:g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
