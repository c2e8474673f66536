"""What a sweep found: every trial, the chosen setting, and the heads trained with it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from .settings import Setting

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset
    from transformers import PreTrainedModel

RESULT_NAME = "sweep.json"
TABLE_NAME = "trials.csv"
FIGURE_NAME = "sweep.png"
FORMAT_VERSION = 1


def head_file(seed: int) -> str:
    return f"head-seed{seed}.safetensors"


@dataclass
class SweepResult:
    """What a sweep found.

    Attributes:
        trials: one row per setting, seed and fold: the setting's fields, `seed`, `fold`, `score` on the validation rows
            (larger is better; `None` if it diverged or was dropped), `best_epoch`, `epochs_trained`, `stopped`, and
            `trained_as`, the number of the setting that was trained in its place (its own, if it was).
        curves: for each trained trial `setting`, `seed`, `fold`, and lists `epochs`, `scores`, `losses`.
        best: the chosen setting.
        protocol: everything else that the numbers depend on.
        config: of the chosen head, without a backbone.
        heads: for each seed, the state dict of the head trained with the chosen setting on all rows.
    """

    trials: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    best: Setting
    protocol: dict[str, Any]
    config: LayerFusionConfig
    heads: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return self.protocol["metric"]

    def table(self) -> pandas.DataFrame:
        """All trials, one per row."""
        import pandas

        return pandas.DataFrame(self.trials)

    @property
    def dataset(self) -> Dataset:
        """All trials, one per row."""
        from datasets import Dataset

        return Dataset.from_list(self.trials)

    def summary(self) -> list[dict[str, Any]]:
        """One row per setting, best first: its fields, `mean` and `std` of the score over seeds and folds, `trained_as`."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for trial in self.trials:
            groups.setdefault(trial["setting"], []).append(trial)
        rows = []
        for number, members in groups.items():
            scores = [math.nan if trial["score"] is None else trial["score"] for trial in members]
            row = {name: members[0][name] for name in self.best.to_dict()}
            row |= {"setting": number, "mean": float(np.mean(scores)), "trained_as": members[0]["trained_as"]}
            row["std"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
            rows.append(row)
        return sorted(rows, key=lambda row: (math.isnan(row["mean"]), -row["mean"], row["setting"]))

    def scores(self, setting: Setting | None = None) -> list[float]:
        """The validation scores of one setting (by default the chosen one), over seeds and folds."""
        wanted = (setting or self.best).to_dict()
        return [
            trial["score"]
            for trial in self.trials
            if all(trial[name] == value for name, value in wanted.items()) and trial["score"] is not None
        ]

    def build_model(
        self, backbone: str | Path | PreTrainedModel, *, seed: int | None = None, **options: Any
    ) -> ViTForAttentiveLayerFusionClassification:
        """The chosen head on its backbone, ready for `save_pretrained`, `pipeline` or an evaluation.

        Args:
            backbone: the one that the features came from; its weights are compared.
            seed: which of the trained heads; by default the first.
            options: for `from_backbone` (`revision`, `dtype`, `image_processor`, ...).

        Raises:
            LayerFusionError: if no head was trained on all rows, or the backbone is another one.
        """
        state = self.head_state(seed)
        model = ViTForAttentiveLayerFusionClassification.from_backbone(
            backbone, id2label=self.config.id2label, **self.head_options, **options
        )
        expected, found = (
            self.protocol["features"]["backbone"],
            (model.config.backbone_fingerprint or {}).get("digest"),
        )
        if expected is not None and found != expected:
            raise LayerFusionError(
                f"the features of this sweep came from a backbone with fingerprint {str(expected)[:12]}, but "
                f"{model.config.backbone_name_or_path} has {str(found)[:12]}: give the backbone they were extracted with"
            )
        model.head.load_state_dict(state)
        return model

    def head_state(self, seed: int | None = None) -> dict[str, Tensor]:
        """The state dict of one trained head.

        Raises:
            LayerFusionError: if there is none of that seed.
        """
        if not self.heads:
            raise LayerFusionError("this sweep trained no head on all rows: run it with refit=True")
        seed = next(iter(self.heads)) if seed is None else seed
        if seed not in self.heads:
            raise LayerFusionError(f"no head was trained from seed {seed}, only from {sorted(self.heads)}")
        return self.heads[seed]

    @property
    def head_options(self) -> dict[str, Any]:
        """What `from_backbone` builds the chosen head from, besides labels."""
        return {**self.protocol["overrides"], **self.best.config_options, "problem_type": self.config.problem_type}

    def plot(self, path: str | Path) -> None:
        """Write learning curves and scores by setting, as PNG.

        Raises:
            LayerFusionError: if matplotlib is not installed.
        """
        from ..analysis.plots import plot_sweep

        plot_sweep(self, path)

    def save(self, folder: str | Path) -> None:
        """Write `sweep.json`, `trials.csv` and a `head-seed*.safetensors` per trained head."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for seed, state in self.heads.items():
            staged = folder / f"{head_file(seed)}.{os.getpid()}.tmp"
            save_file({name: value.contiguous() for name, value in state.items()}, staged, metadata={"format": "pt"})
            staged.replace(folder / head_file(seed))
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(self.trials[0]))
        writer.writeheader()
        writer.writerows(self.trials)
        _write(folder / TABLE_NAME, table.getvalue())
        # The last: where it stands, the rest is complete.
        _write(folder / RESULT_NAME, json.dumps(self._to_dict(), indent=1, allow_nan=False) + "\n")

    def _to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "best": self.best.to_dict(),
            "best_score": {"mean": float(np.mean(self.scores())), "values": self.scores()},
            "protocol": self.protocol,
            "config": self.config.to_dict(),
            "seeds": list(self.heads),
            "trials": self.trials,
            "curves": [
                {**curve, **{key: [_finite(value) for value in curve[key]] for key in ("scores", "losses")}}
                for curve in self.curves
            ],
        }

    @classmethod
    def load(cls, folder: str | Path) -> SweepResult:
        """Read what `save` wrote.

        Raises:
            LayerFusionError: if the folder holds no finished sweep, or a file of it is damaged.
        """
        path = Path(folder) / RESULT_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise LayerFusionError(
                    f"{path} has format {content['format_version']}, this version reads {FORMAT_VERSION}"
                )
            config = LayerFusionConfig.from_dict(content["config"])
            heads = {seed: _read_head(path.parent / head_file(seed)) for seed in content["seeds"]}
            curves = [
                {**curve, **{key: [_number(value) for value in curve[key]] for key in ("scores", "losses")}}
                for curve in content["curves"]
            ]
            return cls(content["trials"], curves, Setting(**content["best"]), content["protocol"], config, heads)
        except FileNotFoundError as error:
            raise LayerFusionError(f"{folder} holds no finished sweep: {error.filename} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise LayerFusionError(f"the sweep in {folder} cannot be read: {error}") from error

    def __repr__(self) -> str:
        settings = len({trial["setting"] for trial in self.trials})
        shown = ", ".join(f"{name}={value}" for name, value in asdict(self.best).items() if value is not None)
        return (
            f"SweepResult({settings} settings, best {self.metric} {np.mean(self.scores()):.4f} with {shown}, "
            f"heads of seeds {list(self.heads)})"
        )


def _read_head(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
