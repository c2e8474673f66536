"""Look after feature caches: describe, verify or prune them.

`info` says what a cache holds and what shaped it, finished or not. `verify` reads all of it, names every damaged shard,
and token statistics that do not fit the tokens, and ends with status 1 if there is one. `prune` removes what kills left
behind, and with --damaged the files that `verify` would name: the next run of the same extraction does exactly those
shards again, and statistics are taken again when they are next used.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import LayerFusionError
from ..features.manifest import MANIFEST_NAME, STATISTICS_NAME, Manifest, Shard, own_file, problem_of
from ..features.statistics import read_statistics, token_statistics
from ..features.store import FEATURES_COLUMN, LABEL_COLUMN, map_shard

# An extraction that is under way may be about to rename or to record a file younger than this.
_SETTLED_SECONDS = 60


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summaries = {
        "info": "what a cache holds, and what shaped it",
        "verify": "read every file and name the damaged ones",
        "prune": "remove what extraction left behind; not while it runs",
    }
    for name, summary in summaries.items():
        action = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        action.add_argument("folders", nargs="+", metavar="DIR", help="a feature cache, such as features/train")
        if name == "prune":
            action.add_argument("--damaged", action="store_true", help="also remove files that fail verification")
            action.add_argument("--dry_run", action="store_true", help="only say what would be removed")


def run(arguments: argparse.Namespace) -> None:
    # All of them before the long work: a folder that is no cache is refused at once.
    manifests = {Path(folder): Manifest.load(Path(folder)) for folder in arguments.folders}
    if arguments.action == "info":
        for folder, manifest in manifests.items():
            _describe(folder, manifest)
    elif arguments.action == "verify":
        _verify(manifests)
    else:
        for folder, manifest in manifests.items():
            _prune(folder, manifest, arguments.damaged, arguments.dry_run)


def _describe(folder: Path, manifest: Manifest) -> None:
    skipped, names = manifest.skipped, manifest.label_names
    print(f"{folder}: {_progress(manifest)}")
    views = f", {manifest.num_views} views of each image" if manifest.num_views > 1 else ""
    print(f"rows: {manifest.rows_done - len(skipped)}, and {len(skipped)} skipped{views}")
    for entry in skipped[:5]:
        print(f"  {entry['reason']}")
    if len(skipped) > 5:
        print(f"  and {len(skipped) - 5} more")
    print(f"bytes: {sum(shard.num_bytes for shard in manifest.shards):,}")
    print(f"token statistics: {_describe_statistics(folder, manifest)}")
    if names is not None:
        print(f"labels: {len(names)} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})")
    print(f"backbone weights: sha256 {str(_ingredient(manifest, 'backbone', 'digest'))[:16]}...")
    for field in ("size", "crop_size"):
        print(f"processor {field}: {_in_words(_ingredient(manifest, 'processor', field))}")
    print(f"dataset: {_in_words(_ingredient(manifest, 'dataset'))}")
    print(f"versions: {_in_words(_ingredient(manifest, 'versions'))}")
    print(f"tokens: {len(manifest.bank)} of width {manifest.hidden_size}, {manifest.dtype}")
    for name in manifest.token_bank.names:
        print(f"  {name}")


def _describe_statistics(folder: Path, manifest: Manifest) -> str:
    statistics, problem = _read_statistics(folder, manifest)
    if problem is not None:
        return problem
    return "not taken yet" if statistics is None else f"{(folder / STATISTICS_NAME).stat().st_size:,} bytes"


def _read_statistics(folder: Path, manifest: Manifest) -> tuple[Tensor | None, str | None]:
    """The kept token statistics, or what is wrong with them; neither if there are none."""
    try:
        return read_statistics(folder, manifest), None
    except LayerFusionError as error:
        return None, str(error)


def _progress(manifest: Manifest) -> str:
    state = "complete" if manifest.is_complete else "unfinished"
    return (
        f"{state}, {len(manifest.shards)} of {manifest.num_shards} shards, "
        f"{manifest.rows_done} of {manifest.num_rows} rows"
    )


def _ingredient(manifest: Manifest, *path: str) -> Any:
    value: Any = manifest.ingredients
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return "-" if value is None else str(value)


def _verify(manifests: dict[Path, Manifest]) -> None:
    with_shards, with_statistics = [], []
    for folder, manifest in manifests.items():
        problems, statistics_problem = _problems(folder, manifest)
        print(f"{folder}: {_progress(manifest)}, {len(problems) + (statistics_problem is not None)} damaged")
        if problems:
            with_shards.append(str(folder))
        if statistics_problem is not None:
            with_statistics.append(str(folder))
    remove = "remove them with `layerfusion cache prune --damaged DIR`"
    complaints = []
    if with_shards:
        complaints.append(
            f"damaged shards in {', '.join(with_shards)}: {remove}, and run the same extraction again, which redoes only "
            "these"
        )
    if with_statistics:
        complaints.append(
            f"token statistics that do not fit in {', '.join(with_statistics)}: {remove}; they are taken again when they "
            "are next used"
        )
    if complaints:
        raise LayerFusionError("; ".join(complaints))


def _problems(folder: Path, manifest: Manifest) -> tuple[dict[int, str], str | None]:
    """What is wrong with each damaged shard, by index, and with the token statistics; they are also printed."""
    problems: dict[int, str] = {}
    statistics, statistics_problem = _read_statistics(folder, manifest)
    label_type = None
    row = 0
    total = sum(shard.num_bytes for shard in manifest.shards)
    with tqdm(total=total, desc=f"verifying {folder}", unit="B", unit_scale=True, delay=2) as bar:
        for shard in manifest.shards:
            problem = problem_of(shard, folder, checksums=True)
            if problem is None:
                try:
                    label_type = _check_content(folder / shard.file, shard, manifest, label_type)
                except (LayerFusionError, pa.ArrowException) as error:
                    problem = f"shard {folder / shard.file} {' '.join(str(error).split())}"
            if problem is not None:
                problems[shard.index] = problem
                bar.set_postfix(damaged=len(problems), refresh=False)
            elif statistics is not None and statistics_problem is None:
                taken = torch.cat([token_statistics(chunk) for chunk in map_shard(folder, shard, manifest)])
                if not _fit(statistics[row : row + shard.rows], taken):
                    path = folder / STATISTICS_NAME
                    statistics_problem = f"the token statistics {path} are not those of the tokens in {shard.file}"
            row += shard.rows
            bar.update(shard.num_bytes)
    for line in [*problems.values(), *filter(None, [statistics_problem])]:
        print(f"damaged: {line}")
    return problems, statistics_problem


def _fit(kept: Tensor, taken: Tensor) -> bool:
    """Whether statistics `(rows, N, 2)` differ by no more than two machines' rounding does."""
    # Of a token that is nearly constant, the deviation is rounding itself.
    noise = 1e-9 * taken[..., :1]
    return bool(((kept - taken).abs() <= 1e-5 * taken + noise).all())


def _check_content(path: Path, shard: Shard, manifest: Manifest, label_type: pa.DataType | None) -> pa.DataType | None:
    """Compare an Arrow file with its manifest; returns the type of its labels, which all shards must share."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
        has_labels = _ingredient(manifest, "dataset", "label_column") is not None
        columns = [FEATURES_COLUMN, LABEL_COLUMN] if has_labels else [FEATURES_COLUMN]
        if table.column_names != columns:
            raise LayerFusionError(f"has columns {table.column_names} instead of {columns}")
        kind, length = table.schema.field(FEATURES_COLUMN).type, len(manifest.bank) * manifest.hidden_size
        expected = pa.list_(pa.type_for_alias(manifest.dtype), length)
        if not pa.types.is_fixed_size_list(kind) or (kind.value_type, kind.list_size) != (expected.value_type, length):
            raise LayerFusionError(f"has features of type {kind} instead of {expected}")
        rows, planned = len(table), manifest.rows_of(shard.index)
        if rows != shard.rows or rows + len(shard.skipped) != len(planned):
            raise LayerFusionError(
                f"holds {rows} rows, but its manifest says {shard.rows}, and {len(shard.skipped)} skipped of {len(planned)}"
            )
        if any(column.null_count for column in table.columns):
            raise LayerFusionError("has rows without values")
        start = 0
        for chunk in table.column(FEATURES_COLUMN).chunks:
            finite = np.isfinite(chunk.flatten().to_numpy(zero_copy_only=True)).reshape(len(chunk), length).all(axis=1)
            if not finite.all():
                raise LayerFusionError(f"holds NaN or infinite values in its row {start + int(finite.argmin())}")
            start += len(chunk)
        if not has_labels:
            return None
        found = table.schema.field(LABEL_COLUMN).type
        if label_type is not None and found != label_type:
            raise LayerFusionError(f"has labels of type {found}, but the shards before it have {label_type}")
        return found


def _prune(folder: Path, manifest: Manifest, damaged: bool, dry_run: bool) -> None:
    gathered = {shard["index"] for shard in json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["shards"]}
    problems, statistics_problem = _problems(folder, manifest) if damaged else ({}, None)
    if problems:
        manifest.shards = [shard for shard in manifest.shards if shard.index not in problems]
        gathered = {shard.index for shard in manifest.shards}
        if not dry_run:
            manifest.save(folder)  # before the files go: it never names a shard that was removed
    statistics_problem = statistics_problem or _read_statistics(folder, manifest)[1]
    verb, count, num_bytes = "would remove" if dry_run else "removed", 0, 0
    for file in sorted(folder.iterdir()):
        reason, may_be_in_use = _reason_to_remove(file, manifest, gathered, problems, statistics_problem)
        if reason is None:
            continue
        status = file.lstat()
        if may_be_in_use and time.time() - status.st_mtime < _SETTLED_SECONDS:
            print(f"kept {file}: {reason}, but younger than {_SETTLED_SECONDS} seconds")
            continue
        if not dry_run:
            file.unlink()
        print(f"{verb} {file}: {reason}, {status.st_size:,} bytes")
        count, num_bytes = count + 1, num_bytes + status.st_size
    print(f"{folder}: {verb} {count} files, {num_bytes:,} bytes; {_progress(manifest)}")


def _reason_to_remove(
    file: Path, manifest: Manifest, gathered: set[int], problems: dict[int, str], statistics_problem: str | None
) -> tuple[str | None, bool]:
    """Why a file may go, and whether a running extraction may hold it.

    `None` for a file that the cache needs, or that is not of its making.
    """
    own = own_file(file)
    if own is None:
        return None, False
    if own.is_staged:
        return "left by a write that did not finish", True
    if own.name == STATISTICS_NAME:
        return (None if statistics_problem is None else "token statistics that do not fit the shards"), False
    if own.index in problems:
        return "of a damaged shard", False
    if own.index is not None and all(shard.index != own.index for shard in manifest.shards):
        return "of a shard that the manifest does not name", True
    if file.suffix == ".json" and own.index in gathered:
        return "a record that the manifest holds", False
    return None, False
