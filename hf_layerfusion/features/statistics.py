"""Norm and spread of every token: what a head needs of the data alone, taken once per cache and kept beside it."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..errors import LayerFusionError
from .manifest import STATISTICS_NAME, Manifest

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
_KEY = "token_statistics"

# Numbers that are widened at a time: these and their centred copy fit a core's cache.
_BLOCK = 1 << 18


@torch.no_grad()
def token_statistics(tokens: Tensor) -> Tensor:
    """L2 norm and standard deviation of each token.

    In two passes and never as a difference of large numbers, so that a common offset far larger than the spread costs
    no digits: both are right to 1e-6 of their value in float32, from float16 too.

    Args:
        tokens: `(..., D)`; a float32 copy is made of a block at a time, not of all.

    Returns:
        `(..., 2)`, float64 for float64 tokens, else float32: `[..., 0]` is the norm, `[..., 1]` the population standard
        deviation over D.
    """
    width = tokens.shape[-1]
    flat = tokens.reshape(-1, width)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    statistics = torch.empty(len(flat), 2, dtype=wide, device=tokens.device)
    rows = max(1, _BLOCK // width)
    for block, result in zip(flat.split(rows), statistics.split(rows), strict=True):
        values = block.to(wide)
        # Norms, since `torch.var` is ten times slower on a CPU.
        result[:, 0] = torch.linalg.vector_norm(values, dim=-1)
        centred = values - values.mean(dim=-1, keepdim=True)
        centred -= centred.mean(dim=-1, keepdim=True)  # what rounding left of a large mean
        result[:, 1] = torch.linalg.vector_norm(centred, dim=-1) / width**0.5
    return statistics.view(*tokens.shape[:-1], 2)


def without_padding(statistics: Tensor, padded: int, width: int) -> Tensor:
    """The statistics of tokens whose last entries, zeros, are cut off.

    Args:
        statistics: `(..., 2)`, norm and standard deviation over `padded` entries.
        padded: how many entries the tokens have.
        width: how many are left.

    Returns:
        `(..., 2)`, in the dtype of `statistics`.
    """
    if width == padded:
        return statistics
    norm, std = statistics.double().unbind(dim=-1)
    # From the mean square and the square of the mean, whose sum over the entries zeros do not change.
    squared_mean = (norm.square() / padded - std.square()).clamp_min(0) * (padded / width) ** 2
    std = (norm.square() / width - squared_mean).clamp_min(0).sqrt()
    return torch.stack([norm, std], dim=-1).to(statistics.dtype)


def cache_statistics(chunks: Sequence[Tensor], manifest: Manifest, folder: Path | None) -> Tensor:
    """The statistics of all tokens of a cache: those that are kept beside it, else taken now and kept if that can be.

    Args:
        chunks: the tokens, each `(rows, N, D)`.
        manifest: of the cache.
        folder: of the cache; `None` if the tokens do not come from one.

    Returns:
        `(rows, N, 2)`, float32.
    """
    if folder is not None:
        try:
            kept = read_statistics(folder, manifest)
        except LayerFusionError as error:
            logger.warning(f"{error}: they are taken again")
        else:
            if kept is not None:
                return kept
    statistics = torch.empty(sum(map(len, chunks)), len(manifest.bank), 2)
    with tqdm(total=len(statistics), desc="token statistics", unit="row", delay=2) as bar:
        start = 0
        for chunk in chunks:
            statistics[start : start + len(chunk)] = token_statistics(chunk)
            start += len(chunk)
            bar.update(len(chunk))
    if folder is not None:
        _write(folder, manifest, statistics)
    return statistics


def read_statistics(folder: Path, manifest: Manifest) -> Tensor | None:
    """The statistics that are kept beside a cache's shards.

    Returns:
        `(rows, N, 2)`, float32, mapped from the file; `None` if there is no file.

    Raises:
        LayerFusionError: if the file is damaged, or belongs to other shards.
    """
    path = folder / STATISTICS_NAME
    if not path.exists():
        return None
    shape = [sum(shard.rows for shard in manifest.shards), len(manifest.bank), 2]
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != _metadata(manifest):
                raise LayerFusionError(f"the token statistics {path} belong to other shards, or have another format")
            headers = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: (header.get_dtype(), header.get_shape()) for name, header in headers.items()}
            if found != {_KEY: ("F32", shape)}:
                raise LayerFusionError(f"the token statistics {path} hold {found} instead of F32 of shape {shape}")
            return file.get_tensor(_KEY)
    except (OSError, SafetensorError) as error:
        raise LayerFusionError(f"the token statistics {path} cannot be read ({error})") from error


def _write(folder: Path, manifest: Manifest, statistics: Tensor) -> None:
    """Keep statistics beside the shards, if the folder can be written to."""
    # Several processes may be here at once, and those of containers often share an id.
    staged = folder / f"{STATISTICS_NAME}.{secrets.randbits(64)}.tmp"
    try:
        # Not by safetensors' own `save_file`, whose files no other user can read.
        with open(staged, "wb") as file:
            file.write(save({_KEY: statistics}, metadata=_metadata(manifest)))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(folder / STATISTICS_NAME)
    except OSError as error:
        logger.info(f"the token statistics of {folder} stay in memory: {error}")
        with suppress(OSError):
            staged.unlink()


def _metadata(manifest: Manifest) -> dict[str, str]:
    """What says which shards statistics belong to."""
    digest = hashlib.sha256("\n".join(shard.sha256 for shard in manifest.shards).encode())
    return {"format_version": str(FORMAT_VERSION), "shards_sha256": digest.hexdigest()}


__all__ = ["cache_statistics", "read_statistics", "token_statistics", "without_padding"]
