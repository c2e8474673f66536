"""Options that several commands share, and what they open."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import Trainer

from ..bank import TokenBank
from ..configuration_layer_fusion import LOSSES, NORMALIZATIONS, WIDTH_ALIGNMENTS
from ..data import label_options, open_dataset, prepare_splits
from ..errors import LayerFusionError
from ..features import LayerFeatures, extract_features
from ..features.manifest import STORAGE_DTYPES
from ..files import staged_file
from ..images import process_image, stack_images
from ..layout import MODULES
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..pooling import POOL_FAMILIES, POOLS
from ..recipes import RECIPES
from ..training.collators import ImageCollator
from ..training.metrics import without_timings

DTYPES = ("float32", "bfloat16", "float16")
# Options of the head's training that hold for all settings of a sweep, by the names of the config's fields.
TRAINING_OPTIONS = ("loss", "token_normalization", "mixup_alpha", "layer_dropout")


class OptionsError(LayerFusionError):
    """Options that do not go together: exit status 2, as for those that argparse refuses."""


def number(
    kind: type[int | float], *, at_least: float | None = None, above: float | None = None
) -> Callable[[str], float]:
    """An argparse type: a finite number with a lower bound."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        whole = "a whole number" if kind is int else "a number"
        if at_least is not None and not at_least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} from {at_least} up")
        if above is not None and not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} above {above}")
        return value

    return parse


def whole_numbers(text: str) -> list[int]:
    """An argparse type: whole numbers from 0 up, separated by commas."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2")
    return [int(part) for part in parts]


def given_options(arguments: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the options that were given, of such whose default is `None` or `False`; 0 is a value."""
    return [name for name in names if (value := getattr(arguments, name)) is not None and value is not False]


def is_main_process() -> bool:
    """Whether this is the process that speaks for all under `accelerate launch`."""
    return int(os.environ.get("RANK", 0)) == 0


def add_dataset_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--dataset",
        required=required,
        help="Hub id, folder of images (folder/class/picture.png, or with train/ and test/ above), or saved dataset; "
        "without a test split, a fifth of the training images is held out, always the same ones",
    )
    group.add_argument("--dataset_name", help="configuration of a Hub dataset")
    group.add_argument("--image_column", help="default: the only image column")
    group.add_argument("--label_column", help="default: 'label', or the only column of classes")
    add_batch_option(group)
    group.add_argument(
        "--num_workers", type=number(int, at_least=0), default=0, help="processes that decode images (default: 0)"
    )


def add_batch_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--batch_size", type=number(int, at_least=1), default=32, help="images per forward pass (default: 32)"
    )


def add_backbone_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("backbone and tokens")
    group.add_argument("--backbone", required=required, help="Hub id or folder of a vision model")
    group.add_argument("--revision", help="branch, tag or commit of the backbone; the commit is pinned in the head")
    group.add_argument(
        "--recipe",
        default="alf",
        metavar="NAME",
        help=f"one of {', '.join(RECIPES)}; a sweep takes several, with commas between them (default: alf)",
    )
    group.add_argument(
        "--layers",
        help="all, last, a:b, spaced:n, or numbers such as 3,6,12 (0: embeddings; negative numbers count from the end "
        "and need an equals sign: --layers=-1,-2)",
    )
    group.add_argument("--modules", help=f"comma-separated, from {', '.join(MODULES)}")
    group.add_argument("--pools", help=f"comma-separated, from {', '.join(POOLS)}, {POOL_FAMILIES}")
    group.add_argument(
        "--image_size", type=number(int, at_least=1), help="pixels, if other than the backbone's processor says"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone (default: float32)")
    group.add_argument(
        "--width_alignment",
        choices=WIDTH_ALIGNMENTS,
        help="how layers of several widths come to one: padded with zeros, or by learned projections (default: pad)",
    )
    add_layout_options(group)


def add_layout_options(group: argparse._ActionsContainer) -> None:
    """What a user may state of a backbone whose tokens cannot be told by measuring."""
    group.add_argument(
        "--num_prefix_tokens",
        type=number(int, at_least=0),
        help="tokens before the patches (CLS, registers), where they cannot be measured",
    )
    group.add_argument(
        "--grid_size",
        type=number(int, at_least=1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the patch grid, where it cannot be measured",
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "for small data (default: the recipe's; a sweep trains all its settings with them)"
    )
    group.add_argument("--loss", choices=LOSSES, help="squared: the squared distance from 0 and 1, for classes alone")
    group.add_argument(
        "--token_normalization",
        choices=NORMALIZATIONS,
        help="l2: by the norm of each token; standardize: each coordinate by mean and deviation of the training images",
    )
    group.add_argument(
        "--mixup_alpha", type=float, help="mix training images by pairs, in shares from Beta(alpha, alpha)"
    )
    group.add_argument("--layer_dropout", type=float, help="probability that a training image goes without a layer")


def training_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of the head's training, by the names of the config's fields."""
    given = {name: getattr(arguments, name, None) for name in TRAINING_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--feature_dtype", choices=STORAGE_DTYPES, default="float16", help="of the cached tokens (default: float16)"
    )
    parser.add_argument(
        "--autocast", choices=("bfloat16", "float16"), help="compute in this dtype under torch.autocast"
    )
    parser.add_argument("--torch_compile", action="store_true", help="compile the backbone: worth it for many images")
    parser.add_argument(
        "--on_error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about an image that cannot be read: stop, or leave it out and note it (default: raise)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace caches that were made from something else")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("head")
    group.add_argument("--model", required=True, help="Hub id or folder of a head")
    group.add_argument("--backbone", help="use this backbone instead of the pinned one (its weights are compared)")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    # Under `accelerate launch`, each process has a device of its own.
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="such as cpu or cuda (default: %(default)s)")


def open_splits(arguments: argparse.Namespace) -> tuple[DatasetDict, str, str]:
    """The dataset's splits, with a test split, and its image and label columns."""
    opened = open_dataset(arguments.dataset, name=arguments.dataset_name)
    return prepare_splits(opened, arguments.image_column, arguments.label_column)


def open_split(arguments: argparse.Namespace) -> tuple[Dataset, str, str]:
    """One split, the one named by `--split`; its images are files or bytes, for [`ImageCollator`]."""
    splits, image_column, label_column = open_splits(arguments)
    if arguments.split not in splits:
        raise LayerFusionError(f"the dataset has no split {arguments.split!r}, only {list(splits)}")
    return splits[arguments.split].cast_column(image_column, Image(decode=False)), image_column, label_column


def token_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of the tokens, where it is not the recipe's to say."""
    options: dict[str, Any] = {}
    for option in ("modules", "pools"):
        if value := getattr(arguments, option):
            options[option] = [part.strip() for part in value.split(",")]
    for option in ("layers", "width_alignment"):
        if value := getattr(arguments, option):
            options[option] = value
    return options


def build_model(
    arguments: argparse.Namespace, labels: Dataset, label_column: str, *, recipe: str | None = None, **overrides: Any
) -> ViTForAttentiveLayerFusionClassification:
    """A new head for the dataset's labels on the backbone that was asked for; `recipe` overrules the one asked for."""
    check_device(arguments.device)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        arguments.backbone,
        recipe=recipe or arguments.recipe,
        revision=arguments.revision,
        dtype=getattr(torch, arguments.dtype),
        num_prefix_tokens=arguments.num_prefix_tokens,
        grid_size=arguments.grid_size,
        **({"image_size": arguments.image_size} if arguments.image_size else {}),
        **label_options(labels, label_column),
        **token_options(arguments),
        **training_options(arguments),
        **overrides,
    )
    if arguments.image_size:
        _check_image_size(model, arguments.image_size)
    return model.to(arguments.device)


def _check_image_size(model: ViTForAttentiveLayerFusionClassification, image_size: int) -> None:
    name = model.config.backbone_name_or_path
    blank = PILImage.new("RGB", (image_size, image_size))
    try:
        inputs: Any = stack_images([process_image(model.image_processor, blank)])
        model.extract_layer_features(**inputs)
    except (RuntimeError, ValueError) as error:
        raise LayerFusionError(f"--image_size {image_size} is no size that {name} can read: {error}") from error


def extract_splits(
    arguments: argparse.Namespace,
    model: ViTForAttentiveLayerFusionClassification,
    splits: Mapping[str, Dataset],
    folder: Path,
    image_column: str,
    label_column: str,
    bank: TokenBank | None = None,
) -> dict[str, LayerFeatures]:
    """One feature cache per split, in folders named after them; small splits first, so that bad ones show early.

    They hold the model's tokens, or those of `bank`.
    """
    return {
        split: extract_features(
            model,
            splits[split],
            folder / split,
            image_column=image_column,
            label_column=label_column,
            bank=bank,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            dtype=arguments.feature_dtype,
            autocast=arguments.autocast,
            torch_compile=arguments.torch_compile,
            on_error=arguments.on_error,
            overwrite=arguments.overwrite,
        )
        for split in sorted(splits, key=lambda name: len(splits[name]))
    }


def open_model(arguments: argparse.Namespace) -> ViTForAttentiveLayerFusionClassification:
    """The saved head that was asked for, with its backbone."""
    check_device(arguments.device)
    try:
        model = ViTForAttentiveLayerFusionClassification.from_pretrained(
            arguments.model, **({"backbone": arguments.backbone} if arguments.backbone else {})
        )
    except OSError as error:
        raise LayerFusionError(f"no head can be loaded from {arguments.model!r}: {error}") from error
    if model.image_processor is None:
        raise LayerFusionError(
            f"{arguments.model} holds no preprocessor_config.json: save the head with its processor"
        )
    return model.to(arguments.device)


def check_device(name: str) -> None:
    """Refuse a device that this machine lacks, before the long work."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown name; build without support for it
        reason = str(error).split("\n", 1)[0]
        raise LayerFusionError(f"--device {name!r} cannot be used on this machine: {reason}") from error


def image_batches(rows: Dataset, arguments: argparse.Namespace, collator: ImageCollator) -> DataLoader:
    """Batches of pixel values."""
    # `Dataset` of datasets is one that a `DataLoader` reads, without being a subclass of torch's.
    return DataLoader(rows, arguments.batch_size, num_workers=arguments.num_workers, collate_fn=collator)  # type: ignore[arg-type]


def measure(trainer: Trainer) -> dict[str, float]:
    """Loss and metrics on the trainer's evaluation rows, without its timings."""
    model: Any = trainer.model
    config = model.config
    # With class weights, the mean over a batch depends on which images share it.
    weights, config.class_weights = config.class_weights, None
    try:
        measured = trainer.evaluate()
    finally:
        config.class_weights = weights
    return without_timings(measured)


def output_folder(option: str, path: str) -> Path:
    """A folder that can be written to. It is created by whoever writes the first file into it."""
    folder = Path(path)
    existing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not existing.is_dir():
        raise LayerFusionError(f"{option} {folder}: {existing} is a file, give a folder")
    if not os.access(existing, os.W_OK):
        raise LayerFusionError(f"{option} {folder}: {existing} cannot be written to, give another folder")
    return folder


@contextmanager
def output_file(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears under its name when it is complete."""
    if path is None:
        yield sys.stdout
        return
    if Path(path).is_dir():
        raise LayerFusionError(f"--output {path} is a folder: give a file")
    with staged_file(Path(path)) as staged, open(staged, "w", encoding="utf-8") as file:
        yield file
