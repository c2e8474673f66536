"""Files of strangers: read within limits, and checked before anything is made of what they say.

A head's repository is data: JSON and safetensors. These functions read the former so that no text can be two things at
once, tell from a few bytes whether the latter is what it says, and know what neither may ask for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LayerFusionError
from ..files import read_bounded

# As many labels as there may be take 20 MB. Lists of nothing take twenty times their text in memory.
MAX_JSON_BYTES = 24 * 2**20
MAX_JSON_DEPTH = 32
# Six times ImageNet-21k. transformers makes a dictionary of that length from one number.
MAX_LABELS = 2**17
# Of a backbone's config, in one number. A config may turn it into a list.
MAX_DEPTH = 10_000
_MAX_INTEGER = 2**31

# transformers can be told in a config to fetch a kernel and run it; these are computed by PyTorch itself.
ATTENTION_IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention")
FLOAT_TYPES = ("float64", "float32", "float16", "bfloat16")
_DTYPES = (None, *FLOAT_TYPES)

# Bytes per element of what PyTorch reads from safetensors.
_ELEMENT_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_FLOATS = ("F64", "F32", "F16", "BF16")


# ---- JSON ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LayerFusionError: if it is too large or nested too deep, no JSON, names a key twice, or holds a number that is
            not finite.
    """
    return _parse(read_bounded(path, MAX_JSON_BYTES, "file of a head"), str(path))


def _parse(content: bytes, source: str) -> dict[str, Any]:
    try:
        values = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:  # among them, text that is not UTF-8 and numbers of 5,000 digits
        raise LayerFusionError(f"{source} is not a valid JSON file: {error}") from error
    if not isinstance(values, dict):
        raise LayerFusionError(f"{source} holds {reprlib.repr(values)}, not a JSON object")
    layer: list[Any] = [values]
    for _ in range(MAX_JSON_DEPTH):
        layer = [child for parent in layer for child in _children(parent)]
        if not layer:
            return values
    raise LayerFusionError(f"{source} is nested more than {MAX_JSON_DEPTH} levels deep")


def _children(value: Any) -> Iterator[Any]:
    """The lists and objects in one."""
    inside = value.values() if isinstance(value, dict) else value
    return (child for child in inside if isinstance(child, dict | list))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{reprlib.repr(twice)} stands in it twice")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


# ---- safetensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor.

    Attributes:
        shape: of the tensor.
        dtype: as safetensors writes it, `"F32"` and the like.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file by name, without reading them.

    Raises:
        LayerFusionError: unless the header is whole and its tensors fill the rest of the file, each in its own place.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise _not_whole(path, f"{size} bytes cannot hold a header of {length}")
            content = file.read(length)
    except OSError as error:
        raise LayerFusionError(f"{path} cannot be read: {error}") from error
    try:
        header = _parse(content, "its header")
    except LayerFusionError as error:
        raise _not_whole(path, str(error)) from error
    header.pop("__metadata__", None)
    found, places = {}, []
    for name, entry in header.items():
        tensor, place = _stored(entry)
        if tensor is None:
            raise _not_whole(path, f"{reprlib.repr(name)} is described by {reprlib.repr(entry)}")
        found[name] = tensor
        places.append(place)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise _not_whole(path, f"tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != size - 8 - length:
        raise _not_whole(path, f"its tensors take {end} bytes, but there are {size - 8 - length}")
    return found


def _stored(entry: Any) -> tuple[StoredTensor | None, tuple[int, int]]:
    """A tensor of a header and its place, `None` unless it fits it."""
    nothing = None, (0, 0)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return nothing
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES or not _are_counts(shape) or not _are_counts(offsets):
        return nothing
    tensor = StoredTensor(tuple(shape), dtype)
    if len(offsets) != 2 or offsets[1] - offsets[0] != tensor.num_elements * _ELEMENT_BYTES[dtype]:
        return nothing
    return tensor, (offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list) and len(values) <= 16 and all(type(value) is int and value >= 0 for value in values)
    )


def _not_whole(path: Path, reason: str) -> LayerFusionError:
    return LayerFusionError(
        f"{path} is not a whole safetensors file ({reason}): it may be truncated, or a renamed pickle"
    )


# ---- paths ---------------------------------------------------------------------------------------------------------


def local_file(folder: Path, name: str) -> Path | None:
    """A file of a head's folder, `None` if there is none.

    Raises:
        LayerFusionError: if it is a link that leaves the folder, or no plain file. The cache of the Hub consists of
            links, which may lead to where it keeps files.
    """
    path = folder / name
    try:
        if not path.exists() and not path.is_symlink():
            return None
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link to nowhere, or in a circle
        raise LayerFusionError(f"{path} cannot be read: {error}") from error
    if not target.is_file():
        raise LayerFusionError(f"{path} is no plain file")
    allowed = [root, *([blobs] if (blobs := _blobs_of(root)) else [])]
    if not any(target.is_relative_to(place) for place in allowed):
        raise LayerFusionError(f"{path} is a link that leaves its folder, to {target}: put the file itself there")
    return path


def _blobs_of(folder: Path) -> Path | None:
    """Where the Hub's cache keeps the files of a snapshot, if `folder` lies in one."""
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return place.parent.parent / "blobs"
    return None


def is_from_the_hub(name_or_path: str) -> bool:
    """Whether a head comes from the Hub rather than from a folder that somebody keeps here."""
    path = Path(name_or_path)
    return not path.is_dir() or _blobs_of(path.resolve()) is not None


def is_plain_name(name: Any) -> bool:
    """Whether a file's name is one that transformers gives the parts of a large checkpoint."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name) is not None


# ---- configs -------------------------------------------------------------------------------------------------------


def check_backbone_values(values: Mapping[str, Any]) -> None:
    """Refuse what the nested config of a backbone may not ask for.

    Raises:
        LayerFusionError: naming code from elsewhere, an absurd size, or a value of the wrong kind.
    """
    pending: list[tuple[str, Any]] = [("backbone_config", values)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            for key, inside in value.items():
                if not isinstance(key, str | int) or str(key).startswith("__"):
                    raise LayerFusionError(f"backbone_config has a field {reprlib.repr(key)}, which no config has")
                pending.append((str(key), inside))
                _check_backbone_value(str(key), inside)
        elif isinstance(value, list | tuple):
            pending += [(name, inside) for inside in value]
        elif type(value) is int:
            limit = MAX_DEPTH if re.search("layer|depth|block|stage|level", name) else _MAX_INTEGER
            limit = MAX_LABELS if name in ("num_labels", "num_classes") else limit
            if abs(value) > limit:
                raise LayerFusionError(
                    f"backbone_config has {reprlib.repr(name)}={reprlib.repr(value)}: at most {limit}"
                )


def _check_backbone_value(key: str, value: Any) -> None:
    if key.endswith(("attn_implementation", "experts_implementation")):
        for implementation in value.values() if isinstance(value, Mapping) else [value]:
            if implementation not in ATTENTION_IMPLEMENTATIONS:
                raise LayerFusionError(
                    f"backbone_config has {key}={reprlib.repr(implementation)}, which may be code from elsewhere: pass "
                    f"attn_implementation= yourself"
                )
    if key in ("dtype", "torch_dtype"):
        check_dtype(f"backbone_config {key}", value)


def check_dtype(name: str, value: Any) -> None:
    """Refuse what is no type of floating-point numbers: any attribute of `torch` would be taken for one."""
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return
    if not (value is None or isinstance(value, str)) or value not in _DTYPES:
        raise LayerFusionError(f"{name}={reprlib.repr(value)}: use one of {', '.join(FLOAT_TYPES)}")


# Pixels. Settings of other names may be numbers of tokens or of pixels in all.
_SIDES = ("height", "width", "shortest_edge")
_MAX_SIDE = 2**14


def check_processor_values(source: str, values: Mapping[str, Any], runs_code: bool) -> None:
    """Refuse what the settings of an image processor may not ask for.

    Args:
        source: the file.
        values: what it holds.
        runs_code: whether the user trusts the code that comes with it.

    Raises:
        LayerFusionError: naming code from the repository, a type that is missing, or an absurd number.
    """
    if values.get("auto_map") is not None and not runs_code:
        raise LayerFusionError(
            f"{source} asks for code of its own to be run: pass trust_remote_code=True if you have read that code and "
            "trust it"
        )
    kind = values.get("image_processor_type")
    # transformers would open anything it has under that name.
    is_known = isinstance(kind, str) and re.fullmatch(r"(?!Auto)\w+ImageProcessor(Fast|Pil)?", kind)
    if not is_known and not runs_code:
        raise LayerFusionError(f"{source} has image_processor_type={reprlib.repr(kind)}, which is no image processor")
    pending = list(values.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, inside) for inside in value]
        elif isinstance(value, int | float):
            is_absurd = not 1 <= value <= _MAX_SIDE if name in _SIDES else abs(value) > _MAX_INTEGER
            # A single number for both sides.
            is_absurd |= name in ("size", "crop_size", "pad_size") and not 1 <= value <= _MAX_SIDE
            if is_absurd:
                raise LayerFusionError(
                    f"{source} has {reprlib.repr(name)}={reprlib.repr(value)}: no image is like that"
                )


# ---- checksums -----------------------------------------------------------------------------------------------------

# What may be changed by hand: names, and where the backbone lies, whose weights have their own fingerprint.
_UNSEALED = (
    *("checksums", "id2label", "label2id", "architectures", "transformers_version", "hf_layerfusion_version"),
    *("backbone_name_or_path", "backbone_revision", "_name_or_path"),
)


def settings_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 over a head's config as it stands in the file, without names and places.

    Of the file, since what is made of it depends on the version of transformers.
    """
    return json_digest({key: value for key, value in values.items() if key not in _UNSEALED})


def json_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 over values, however they are laid out in a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checksums(values: Mapping[str, Any]) -> dict[str, str]:
    """The checksums in a head's config, `{}` for one that was saved before there were any.

    Raises:
        LayerFusionError: if they are not as they should be.
    """
    found = values.get("checksums", {})
    names = {"settings", "head", "image_processor"}
    is_whole = isinstance(found, dict) and (not found or {"settings", "head"} <= found.keys() <= names)
    if not is_whole or not all(isinstance(value, str) for value in found.values()):
        raise LayerFusionError(
            f"checksums={reprlib.repr(found)} in config.json: expected one each for {sorted(names)}"
        )
    return found


def compare_checksum(checksums: Mapping[str, str], name: str, found: str, what: str) -> None:
    """Refuse what is not as it was when the head was saved.

    Raises:
        LayerFusionError: naming `what`.
    """
    if checksums.get(name, found) != found:
        raise LayerFusionError(
            f"{what} changed since the head was saved: the file is damaged, or was edited. If the change is meant, delete "
            f"'checksums' from config.json, or load the head where it is whole and save it with the change"
        )
