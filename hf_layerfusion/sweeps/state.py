"""What became of each trial, and the file that training goes on from after a kill."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..errors import LayerFusionError
from ..files import staged_file
from ..hub.safety import tensor_digest
from .stack import Trial

logger = logging.get_logger(__name__)

# In the file, what a trial's trained head is named by, behind the trial's number.
_TRAINED = "final/"


@dataclass
class TrialRun:
    """What became of one trial.

    Attributes:
        epochs: those after which it was evaluated, counted from 1.
        scores: the metric on the validation rows then, larger is better.
        losses: mean training loss of those epochs.
        epochs_trained: how many it was trained for.
        stopped: why it did not go on to the end: `"patience"`, `"halving"` or `"diverged"`.
        logit_factor: of a classifier in closed form, what its logits are to be multiplied by so that their log loss on
            the validation rows is least.
    """

    epochs: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    epochs_trained: int = 0
    stopped: str | None = None
    logit_factor: float = 1.0

    @property
    def score(self) -> float:
        """At the end; if training was stopped for want of a better one, the best. NaN if it diverged or was dropped."""
        if not self.scores or self.stopped in ("diverged", "halving"):
            return math.nan
        return max(self.scores) if self.stopped == "patience" else self.scores[-1]

    @property
    def best_epoch(self) -> int:
        """The epoch of `score`."""
        if self.stopped == "patience":
            return self.epochs[int(np.argmax(self.scores))]
        return self.epochs_trained


@dataclass
class SweepState:
    """Where training is, and everything it goes on from.

    Attributes:
        waves: trials that are trained at the same time.
        runs: what became of each trial so far.
        trained: state dicts of heads that are finished, on the CPU.
        wave: the first one that is not finished, counted from 0.
        epoch: how many epochs of it are done.
        training: of each of its heads that go on, what `HeadStack.states` gives; empty before the first epoch.
    """

    waves: list[list[Trial]]
    runs: dict[Trial, TrialRun]
    trained: dict[Trial, dict[str, Tensor]]
    wave: int = 0
    epoch: int = 0
    training: dict[Trial, dict[str, Tensor]] = field(default_factory=dict)


def save_state(path: Path, state: SweepState, trials: Sequence[Trial], *, identity: str, share: str) -> None:
    """Write the state; under its name there is always a whole file.

    Args:
        path: of the file; its folder is made.
        state: to be kept.
        trials: all of them, in an order that a later run has too.
        identity: of the sweep.
        share: which of the processes this is.
    """
    numbers = {trial: number for number, trial in enumerate(trials)}
    tensors: dict[str, Tensor] = {}
    for prefix, heads in (("", state.training), (_TRAINED, state.trained)):
        for trial, values in heads.items():
            tensors |= {f"{numbers[trial]}/{prefix}{name}": value.contiguous() for name, value in values.items()}
    record = json.dumps(
        {
            "identity": identity,
            "share": share,
            "waves": [[numbers[trial] for trial in wave] for wave in state.waves],
            "wave": state.wave,
            "epoch": state.epoch,
            "runs": [asdict(state.runs[trial]) for trial in trials],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staged:
        save_file(tensors, staged, metadata={"sweep": record, "sha256": _checksum(record, tensors)})


def load_state(
    path: Path, trials: Sequence[Trial], *, identity: str, share: str, overwrite: bool
) -> SweepState | None:
    """What `save_state` wrote; `None`, with a warning, where a file is of no use.

    Args:
        path: of the file.
        trials: as they were when it was written.
        identity: of the sweep.
        share: which of the processes this is: a state of another number of them is of no use.
        overwrite: begin anew, silently, if the state is of another sweep.

    Raises:
        LayerFusionError: if the state is of another sweep, unless `overwrite`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        record = json.loads(metadata["sweep"])
        if metadata.get("sha256") != _checksum(metadata["sweep"], tensors):
            raise ValueError("its content does not have the checksum it was written with")
        is_own = record["identity"] == identity
        if is_own and record["share"] != share:
            logger.warning(f"the state {path} is of process {record['share']}, not {share}: the sweep begins anew")
            return None
        if is_own:
            state = SweepState(
                waves=[[trials[number] for number in wave] for wave in record["waves"]],
                runs={trial: TrialRun(**run) for trial, run in zip(trials, record["runs"], strict=True)},
                trained={},
                wave=int(record["wave"]),
                epoch=int(record["epoch"]),
            )
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        logger.warning(f"the state {path} cannot be read ({error}): the sweep begins anew")
        return None
    if not is_own:
        if not overwrite:
            raise LayerFusionError(
                f"{path.parent.parent} holds an unfinished sweep of something else: give another folder, or "
                "replace it with overwrite=True (--overwrite_sweep)"
            )
        return None
    for key, value in tensors.items():
        number, name = key.split("/", 1)
        heads = state.trained if name.startswith(_TRAINED) else state.training
        heads.setdefault(trials[int(number)], {})[name.removeprefix(_TRAINED)] = value
    logger.info(f"the sweep goes on from {path}, after epoch {state.epoch}")
    return state


def _checksum(record: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything the file says: a flipped bit in a moment would train on without a sign."""
    return hashlib.sha256(f"{record}\n{tensor_digest(tensors)}".encode()).hexdigest()
