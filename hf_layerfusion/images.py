"""Decode pictures of any mode into the RGB pixels that transformers' pipelines see."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from .errors import LayerFusionError

# The outputs of an image processor that a backbone's forward takes; others (original sizes, ...) are for later steps.
_BACKBONE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")

Result = TypeVar("Result")


def decode_image(value: Any, where: str) -> Image.Image:
    """Decode one picture.

    Modes of 8 bits (grey, palette, alpha, CMYK, ...) go the way of `transformers.image_utils.load_image`: turned
    upright by their EXIF tag, then converted to RGB. Modes of 16 bits are scaled to 8 first, because Pillow's own
    conversion cuts every value off at 255, which leaves an all but white picture.

    Args:
        value: a `PIL` image, a path, bytes, or the `{"bytes": ..., "path": ...}` of `datasets.Image(decode=False)`.
        where: names the picture in errors, such as `row 17 (cats/17.png)`.

    Raises:
        LayerFusionError: if there is no picture, or it is corrupt or truncated.
    """

    def decode(image: Image.Image) -> Image.Image:
        return _to_8_bits(ImageOps.exif_transpose(image)).convert("RGB")

    return _read(value, where, decode)


def check_image(value: Any, where: str) -> None:
    """Read a picture's header, and of formats with checksums all of it, without decoding pixels.

    A `PIL` image has been opened already and is taken as it is.

    Args:
        value: as for [`decode_image`].
        where: names the picture in errors.

    Raises:
        LayerFusionError: if there is no picture, or it is visibly corrupt.
    """
    if not isinstance(value, Image.Image):
        _read(value, where, lambda image: image.verify())


def describe_row(row: int, value: Any) -> str:
    """Name a dataset's row in errors: `row 17`, or `row 17 (cats/17.png)` where the file is known."""
    path = value.get("path") if isinstance(value, dict) else None
    return f"row {row} ({path})" if path else f"row {row}"


def check_images(values: Iterable[Any], *, rows: Iterable[int] | None = None, progress: bool = True) -> None:
    """Check the images of a dataset before long work starts on them, with a progress bar.

    Args:
        values: as for [`decode_image`].
        rows: their numbers, for errors; by default from 0.
        progress: show the bar.

    Raises:
        LayerFusionError: naming the first image that cannot be read.
    """
    bar = tqdm(values, desc="checking images", unit="image", delay=2, disable=not progress)
    for row, value in zip(count() if rows is None else rows, bar, strict=False):
        check_image(value, describe_row(row, value))


def process_image(image_processor: Any, image: Image.Image) -> dict[str, Tensor]:
    """What a backbone reads of one picture, without batch axis: `pixel_values` `(3, H, W)`.

    Processors that keep the picture's shape (SigLIP 2) give patches, which of them are there, and their grid.
    """
    features = image_processor(images=image, return_tensors="pt")
    return {name: features[name][0] for name in _BACKBONE_INPUTS if name in features}


def resize_processor(processor: Any, image_size: int) -> Any:
    """A copy of an image processor that gives `image_size` x `image_size` pixels.

    Where it resizes and then crops, both change by the same factor.

    Raises:
        LayerFusionError: for a processor without a size, such as timm's, and one that does not give what was asked for.
    """
    name = type(processor).__name__
    cure = "leave image_size out, or pass another image_processor="
    if getattr(processor, "size", None) is None:
        raise LayerFusionError(f"a {name} has no size to set: {cure}")
    resized = deepcopy(processor)
    crop = getattr(processor, "crop_size", None)
    old = dict(processor.size)
    candidates: list[dict[str, int]] = [{"height": image_size, "width": image_size}, {"shortest_edge": image_size}]
    if getattr(processor, "do_center_crop", False) and crop:
        factor = image_size / dict(crop)["height"]
        resized.crop_size = type(crop)(height=image_size, width=image_size)
        candidates = [{key: round(value * factor) for key, value in old.items() if isinstance(value, int)}]
    # Processors read their size in ways of their own, so the outcome decides.
    wide = Image.new("RGB", (128, 64))
    for size in candidates:
        resized.size = type(processor.size)(**size)
        try:
            if process_image(resized, wide)["pixel_values"].shape[1:] == (image_size, image_size):
                return resized
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            continue
    raise LayerFusionError(f"a {name} cannot be made to give {image_size} x {image_size} pixels: {cure}")


def processed_size(processor: Any) -> list[int] | None:
    """Height and width of what an image processor gives for a square picture; `None` if it gives patches instead."""
    pixels = process_image(processor, Image.new("RGB", (64, 64)))["pixel_values"]
    return [int(side) for side in pixels.shape[-2:]] if pixels.ndim == 3 else None


def stack_images(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Processed pictures to one batch, `pixel_values` `(B, 3, H, W)`.

    Raises:
        LayerFusionError: if the image processor left them at different sizes.
    """
    if len({image["pixel_values"].shape for image in images}) > 1:
        sizes = sorted({tuple(image["pixel_values"].shape) for image in images})
        raise LayerFusionError(
            f"the image processor leaves pictures at different sizes ({sizes}): let it resize to a fixed height and "
            "width, or crop (do_center_crop=True)"
        )
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}


def augment_image(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random crop of half to all of the picture at an aspect ratio of 3/4 to 4/3, mirrored every other time.

    The random resized crop of arXiv 1409.4842, section 6, with milder crops; the image processor resizes it.
    """
    for _ in range(10):
        area = image.width * image.height * generator.uniform(0.5, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(generator.integers(image.width - width + 1))
            top = int(generator.integers(image.height - height + 1))
            image = image.crop((left, top, left + width, top + height))
            break
    return ImageOps.mirror(image) if generator.random() < 0.5 else image


def find_images(folder: str | Path) -> list[Path]:
    """All pictures in a folder and the folders below it, sorted, told by the extensions that Pillow can read.

    Hidden files are left out: macOS leaves `._picture.jpg` beside each picture on foreign disks.

    Raises:
        LayerFusionError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LayerFusionError(f"no such folder: {folder}")
    readable = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in readable
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _read(value: Any, where: str, use: Callable[[Image.Image], Result]) -> Result:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    try:
        with _opened(value) as image:
            return use(image)
    except LayerFusionError as error:
        raise LayerFusionError(f"{where}: {error}") from error
    except FileNotFoundError as error:
        raise LayerFusionError(f"{where}: there is no file {value}: check the path") from error
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on broken data
        reason = str(error) or type(error).__name__
        raise LayerFusionError(f"{where} is not a readable image ({reason}): remove or replace the file") from error


@contextmanager
def _opened(value: Any) -> Iterator[Image.Image]:
    if isinstance(value, Image.Image):
        yield value  # the caller's, so it stays open
    elif isinstance(value, str | Path | bytes):
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            yield image
    else:
        raise LayerFusionError(
            f"found {type(value).__name__} instead of an image: give a PIL image, a path, bytes, or a dict of them"
        )


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale modes of more than 8 bits to `L`; other images come back as they are.

    The high byte (`>> 8`) is what Pillow keeps of 16-bit RGB files too. It gives an 8-bit picture back exactly,
    whether it was widened by repeating its byte (x 257) or by a shift (x 256), which division by 257 would not.
    Modes `I` and `F` do not say their range, so it is read off the values.
    """
    if not (image.mode.startswith("I;16") or image.mode in ("I", "F")):
        return image
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (low >= 0 and high <= 65535):  # so written, NaN is refused too
        raise LayerFusionError(
            f"pixels of mode {image.mode} range from {low} to {high}, which is no 8-bit or 16-bit picture: "
            "rescale it to 0 to 255"
        )
    if image.mode == "F" and high <= 1:
        values = values * 255
    elif image.mode.startswith("I;16") or high > 255:
        values = values.astype(np.uint16) >> 8
    return Image.fromarray(values.astype(np.uint8))


__all__ = [
    "augment_image",
    "check_image",
    "check_images",
    "decode_image",
    "describe_row",
    "find_images",
    "process_image",
    "processed_size",
    "resize_processor",
    "stack_images",
]
