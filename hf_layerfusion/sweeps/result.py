"""What a sweep found: every trial, the chosen setting, and the heads trained with it."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers.utils import logging

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..features.manifest import describe_difference, plain_values
from ..files import write_file
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from .meter import LOSSES
from .selection import rank, spread
from .settings import FIELDS, LATER_FIELDS, RIDGE_PENALTIES, Setting

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset
    from transformers import PreTrainedModel

RESULT_NAME = "sweep.json"
TABLE_NAME = "trials.csv"
FIGURE_NAME = "sweep.png"
FORMAT_VERSION = 1
# What every row of the table has; a version may add to it.
SINCE_FIRST = tuple(name for name in FIELDS if name not in LATER_FIELDS)
TRIAL_FIELDS = (
    "setting",
    *SINCE_FIRST,
    "seed",
    "fold",
    "score",
    "best_epoch",
    "epochs_trained",
    "stopped",
    "trained_as",
)
# What the methods read of the protocol, and what tells this sweep from others.
PROTOCOL_FIELDS = ("metric", "overrides", "features", "identity")

logger = logging.get_logger(__name__)

# Every file of a result, also under the name that it has until it is whole.
_OWN_NAME = re.compile(r"(head-seed[0-9]+\.safetensors|sweep\.json|sweep\.png|trials\.csv)(\.[0-9]+\.tmp)?")


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
        heads: for each seed, the state dict of the head trained with the chosen setting on all rows; of an ensemble, its
            members' tensors, stacked.
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

    @property
    def score_name(self) -> str:
        """What scores are, in words; of two, the larger is better, so errors have their sign changed."""
        name = self.metric.replace("_", " ")
        return f"negative {name}" if self.metric in LOSSES else name

    @property
    def settings(self) -> list[Setting]:
        """All settings of the grid; the column `setting` of the table counts them from 0."""
        found = {
            trial["setting"]: Setting(**{name: trial[name] for name in FIELDS if name in trial})
            for trial in self.trials
        }
        return [found[number] for number in sorted(found)]

    @property
    def varied(self) -> list[str]:
        """The fields in which the grid's settings differ."""
        return [name for name in FIELDS if len({trial.get(name) for trial in self.trials}) > 1]

    @property
    def best_score(self) -> float:
        """Mean score of the chosen setting on the validation rows, over seeds and folds."""
        return float(np.mean(self.scores()))

    @property
    def best_score_std(self) -> float:
        """Standard deviation of that; NaN of a single run."""
        return spread(self.scores())

    @property
    def at_edge(self) -> dict[str, str]:
        """Where the grid may be too narrow: `"smallest"` or `"largest"` for a learning rate, decay or penalty at its end.

        Only where no other value of the field, with the same recipe, does as well; and not for the default penalties, which
        are few because choosing among more was measured to be worse (docs/beyond.md).
        """
        rows = [row for row in self.summary() if row["recipe"] == self.best.recipe]
        found = {}
        for name in ("learning_rate", "weight_decay", "ridge_penalty"):
            chosen = getattr(self.best, name)
            if name == "ridge_penalty" and {row[name] for row in rows} == set(RIDGE_PENALTIES):
                continue
            others = [row for row in rows if row[name] != chosen]
            if not others or any(row["mean"] >= self.best_score for row in others):
                continue
            if all(chosen < row[name] for row in others):
                found[name] = "smallest"
            elif all(chosen > row[name] for row in others):
                found[name] = "largest"
        return found

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
        """One row per setting, the chosen one first: its fields, `mean` and `std` of the score, `trained_as`.

        The others are ordered as `choose` ranks them; settings without a score come last.
        """
        groups: dict[int, list[dict[str, Any]]] = {}
        for trial in self.trials:
            groups.setdefault(trial["setting"], []).append(trial)
        rows = []
        for number, members in groups.items():
            scores = [_number(trial["score"]) for trial in members]
            row: dict[str, Any] = {"setting": number, **{name: members[0].get(name) for name in FIELDS}}
            row |= {"mean": float(np.mean(scores)), "std": spread(scores), "trained_as": members[0]["trained_as"]}
            rows.append(row)
        settings = self.settings
        ranked = [row for row in rows if not math.isnan(row["mean"])]
        # The chosen one may not have the highest score: a choice of recipes prefers some.
        ranked.sort(
            key=lambda row: (settings[row["setting"]] == self.best, *rank(settings[row["setting"]], row["mean"])),
            reverse=True,
        )
        return ranked + [row for row in rows if math.isnan(row["mean"])]

    def scores(self, setting: Setting | None = None) -> list[float]:
        """The validation scores of one setting (by default the chosen one), over seeds and folds.

        Where it diverged or was dropped, there is none.

        Raises:
            LayerFusionError: if the grid has no such setting.
        """
        wanted = setting or self.best
        if wanted not in (settings := self.settings):
            raise LayerFusionError(f"{wanted} is not in the grid of this sweep: take one of `settings`")
        number = settings.index(wanted)
        return [t["score"] for t in self.trials if t["setting"] == number and t["score"] is not None]

    def build_model(
        self, backbone: str | Path | PreTrainedModel | None = None, *, seed: int | None = None, **options: Any
    ) -> ViTForAttentiveLayerFusionClassification:
        """The chosen head on its backbone, ready for `save_pretrained`, `pipeline` or an evaluation.

        Args:
            backbone: the one that the features came from; its weights are compared. `None` for the head alone, which
                reads `layer_features`.
            seed: which of the trained heads; by default the first.
            options: for `from_backbone` (`revision`, `dtype`, `image_processor`, ...).

        Raises:
            LayerFusionError: if no head was trained on all rows, or the backbone or its image processor is another one.
        """
        state = self.head_state(seed)
        if backbone is None:
            head = ViTForAttentiveLayerFusionClassification(self.config, with_backbone=False)
            head.load_head_state(state)
            return head.eval()
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
        extracted_with = self.protocol["features"]["processor"]
        if extracted_with is not None and model.image_processor is not None:
            difference = describe_difference(extracted_with, plain_values(model.image_processor.to_dict()))
            if difference is not None:
                raise LayerFusionError(
                    f"the features of this sweep were extracted with another image processor ({difference}): pass the "
                    "same one as image_processor="
                )
        model.config.class_weights = self.config.class_weights
        model.load_head_state(state)
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

    def plot(self, path: str | Path | BinaryIO) -> None:
        """Write learning curves and scores by setting, as PNG.

        Raises:
            LayerFusionError: if matplotlib is not installed.
        """
        from ..analysis.plots import plot_sweep

        plot_sweep(self, path)

    def save(self, folder: str | Path, *, plot: bool = True) -> None:
        """Write `sweep.json`, `trials.csv`, a `head-seed*.safetensors` per trained head, and `sweep.png` with matplotlib.

        A sweep that is there already is replaced. `plot=False` leaves the figure out.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The first to go and the last to come: where it stands, the rest belongs to it.
        (folder / RESULT_NAME).unlink(missing_ok=True)
        for file in list(folder.iterdir()):
            if _OWN_NAME.fullmatch(file.name):
                file.unlink()
        digests = {}
        for seed, state in self.heads.items():
            # Not by safetensors' own `save_file`, whose files no other user can read.
            content = save_tensors({name: value.contiguous() for name, value in state.items()}, {"format": "pt"})
            digests[seed] = hashlib.sha256(content).hexdigest()
            write_file(folder / head_file(seed), content)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(self.trials[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.trials)
        write_file(folder / TABLE_NAME, table.getvalue().encode())
        if plot:
            self._write_figure(folder / FIGURE_NAME)
        text = json.dumps(self._to_dict(digests), indent=1, allow_nan=False) + "\n"
        write_file(folder / RESULT_NAME, text.encode())

    def _write_figure(self, path: Path) -> None:
        figure = io.BytesIO()
        try:
            self.plot(figure)
        except Exception as error:  # whatever it is, hours of training must not be lost for a figure
            logger.warning(f"{path} is not written: {error}")
        else:
            write_file(path, figure.getvalue())

    def _to_dict(self, digests: dict[int, str]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "best": self.best.to_dict(),
            "best_score": {
                **{"mean": self.best_score, "std": _finite(self.best_score_std)},
                "values": self.scores(),
            },
            "protocol": self.protocol,
            "config": self.config.to_dict(),
            "heads": [{"seed": seed, "file": head_file(seed), "sha256": digest} for seed, digest in digests.items()],
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
                raise ValueError(f"it has format {content['format_version']!r}, this version reads {FORMAT_VERSION}")
            trials = content["trials"]
            if not trials:
                raise ValueError("it has no trial")
            for trial, name in itertools.product(trials, TRIAL_FIELDS):
                trial[name]
            curves = [
                {**curve, **{key: [_number(value) for value in curve[key]] for key in ("scores", "losses")}}
                for curve in content["curves"]
            ]
            config = LayerFusionConfig.from_dict(content["config"])
            heads = {
                head["seed"]: _read_head(path.parent / head_file(head["seed"]), head["sha256"])
                for head in content["heads"]
            }
            for name in PROTOCOL_FIELDS:
                content["protocol"][name]
            result = cls(trials, curves, Setting(**content["best"]), content["protocol"], config, heads)
            if {trial["setting"] for trial in trials} != set(range(len(result.settings))):
                raise ValueError("the numbers of its settings have gaps")
            if not result.scores():
                raise ValueError("the chosen setting has no score")
            return result
        except FileNotFoundError as error:
            raise LayerFusionError(f"{folder} holds no finished sweep: {error.filename} is missing") from error
        except KeyError as error:
            raise LayerFusionError(f"the sweep in {folder} cannot be read: {RESULT_NAME} has no {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise LayerFusionError(f"the sweep in {folder} cannot be read: {error}") from error

    def __repr__(self) -> str:
        always = (
            ("recipe", "ridge_penalty") if self.best.ridge_penalty else ("recipe", "learning_rate", "weight_decay")
        )
        names = [name for name in FIELDS if name in always or name in self.varied]
        chosen = ", ".join(f"{name}={getattr(self.best, name)}" for name in names)
        spread_shown = "" if math.isnan(self.best_score_std) else f" ± {self.best_score_std:.4f}"
        trained = len({trial["trained_as"] for trial in self.trials})
        seconds = self.protocol.get("seconds")
        return (
            f"SweepResult(best of {len(self.settings)} settings ({trained} trained): {chosen}; "
            f"{self.score_name} {self.best_score:.4f}{spread_shown} (validation); "
            f"heads of seeds {list(self.heads)}{'' if seconds is None else f'; {seconds:.0f} s'})"
        )


def _read_head(path: Path, sha256: str) -> dict[str, Tensor]:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path.name} is damaged, or of another sweep")
    return load_tensors(content)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
