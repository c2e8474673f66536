"""Spatial tasks made of real pictures, in the manner of the structured group of VTAB (arXiv 1910.04867).

    python benchmarks/real_datasets.py --names emoji,materials --output_dir SETS
    python benchmarks/spatial_tasks.py --sets_dir SETS --output_dir DIR [--names position,count] [--train 1000]

Emoji, cut out of their white ground, lie on photographs of surfaces, 224 x 224 pixels in all. What a picture shows says
nothing about its class; only where, how many, how turned or how far apart things are does:

| task | classes | picture |
| --- | --- | --- |
| position | 16: the cell of a 4 x 4 grid (rows from the top) that holds the object's centre | one object, 48 to 64 px |
| count | 6: the number of objects, 1 to 6 | objects of 28 to 48 px that do not overlap |
| orientation | 8: degrees by which the object is turned anticlockwise, in steps of 45 | one object, 72 to 96 px, anywhere |
| distance | 5: pixels between the centres of two objects, in five ranges | two objects of 32 to 44 px, not overlapping |

Objects are measured along the longer side, before they are turned; centres are those of bounding boxes. No label is a
matter of a pixel: centres keep 6 px from the borders of cells, angles keep within 10 degrees of their class, and the
ranges of distances, about the quintiles of two objects put anywhere, are 10 px apart.

Each task becomes `DIR/NAME`, a saved `DatasetDict` with splits `train` and `test` and columns `image` (PNG), `label` and
`group`, its classes balanced to one row. Objects and surfaces of a split come from the same split of the sources, so
neither is ever on both sides; this holds for orientation too, whose test asks which way up a new object belongs.
Within a split, the sources' groups are dealt out to up to 50 groups, and a picture takes all that it shows from one of
them: a validation set of other groups has other objects on other surfaces. The same sources, seed and version of Pillow
give the same bytes, and a row's bytes do not depend on how many rows are made.

Objects are pictures of one piece (two notes side by side would count as two), large enough to be recognised. For
orientation they come from categories whose things have a usual way up (people, faces, animals and plants), and must
look different in all eight directions (`asymmetry`); fingers that point, crawling insects and the upside-down face
remain, and are label noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from real_datasets import to_png
from scipy import ndimage

from hf_layerfusion.errors import LayerFusionError

SIDE = 224
GROUPS = 50  # of a split, at most
GAP = 4  # pixels between the bounding boxes of objects, at least
WHITE = 254  # of all channels; the ground is exactly white, and a picture has few such pixels of its own at its rim
EDGE = 1.5  # pixels of an object that blend with the ground
MIN_OBJECT_SIDE = 32  # the longer one, in the source; smaller ones would be blown up
MIN_FILLED = 0.4  # share of the bounding box; less is wire, of which little is seen on a rough surface
UPRIGHT = ("Animals & Nature", "People & Body", "Smileys & Emotion")
MIN_ASYMMETRY = 0.026  # above daisies and cobwebs, below plain faces
CELLS, CELL_MARGIN = 4, 6
ANGLES, ANGLE_JITTER = 8, 10.0  # degrees; no angle is exact, or right angles would be told by their sharpness
DISTANCES = ((40, 68), (78, 90), (100, 113), (123, 140), (150, 220))


@dataclass(frozen=True)
class Task:
    """What a picture of a class holds.

    `classes` gives the number of objects by class; `fits` says whether centres `(objects, 2)`, x and y in pixels, belong
    to the class of that number; `turned`, whether the class is an angle.
    """

    classes: dict[str, int]
    sides: tuple[float, float]  # of objects, in pixels
    fits: Callable[[int, np.ndarray], bool] | None = None
    turned: bool = False


def in_cell(label: int, centres: np.ndarray) -> bool:
    size = SIDE / CELLS
    corner = np.array([label % CELLS, label // CELLS]) * size
    inside = centres[0] - corner
    return bool(inside.min() >= CELL_MARGIN and inside.max() <= size - CELL_MARGIN)


def at_distance(label: int, centres: np.ndarray) -> bool:
    nearest, farthest = DISTANCES[label]
    return bool(nearest <= np.hypot(*(centres[0] - centres[1])) <= farthest)


CELL_NAMES = [f"row {cell // CELLS + 1} column {cell % CELLS + 1}" for cell in range(CELLS**2)]
ANGLE_NAMES = [f"{turn * 360 // ANGLES} degrees" for turn in range(ANGLES)]
DISTANCE_NAMES = [f"{nearest} to {farthest} px" for nearest, farthest in DISTANCES]
TASKS = {
    "position": Task(dict.fromkeys(CELL_NAMES, 1), (48, 64), fits=in_cell),
    "count": Task({str(count): count for count in range(1, 7)}, (28, 48)),
    "orientation": Task(dict.fromkeys(ANGLE_NAMES, 1), (72, 96), turned=True),
    "distance": Task(dict.fromkeys(DISTANCE_NAMES, 2), (32, 44), fits=at_distance),
}


def cut_out(picture: Image.Image) -> Image.Image | None:
    """The object of a picture on white: RGBA, cropped to its bounding box; None if not of one piece, or too slight.

    White that touches the rim of the picture, directly or through other white, is ground; white inside stays. Pixels at
    the edge are a blend of object and ground: with the object's colour taken from the nearest pixel inside, the blend
    is undone (laid on white, the object looks as it did).
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    white = np.pad(pixels.min(axis=2) >= WHITE, 1, constant_values=True)
    ground, _ = ndimage.label(white)
    depth = ndimage.distance_transform_edt(ground != ground[0, 0])[1:-1, 1:-1]  # in pixels, from the nearest ground
    pieces, count = ndimage.label(depth > EDGE, np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=2)[1:]
    if not count or sizes.max() < 0.99 * sizes.sum():
        return None
    inside = pieces == sizes.argmax() + 1
    whole, _ = ndimage.label(depth > 0, np.ones((3, 3)))
    (rows, columns), *_ = ndimage.find_objects(inside.astype(int))
    if max(rows.stop - rows.start, columns.stop - columns.start) < MIN_OBJECT_SIDE:
        return None
    if inside[rows, columns].mean() < MIN_FILLED:
        return None

    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    dark, dark_inside = 255 - pixels, 255 - pixels[tuple(nearest)]  # (height, width, 3)
    strength = (dark_inside**2).sum(axis=2)
    alpha = np.clip((dark * dark_inside).sum(axis=2) / np.maximum(strength, 1), 0, 1)
    alpha[inside | (strength < 3 * 20**2)] = 1  # of white on white nothing can be told
    alpha[whole != whole[inside][0]] = 0
    colours = 255 - np.clip(dark / np.maximum(alpha, 1e-3)[..., None], 0, 255)
    cut = Image.fromarray(np.dstack([colours, 255 * alpha]).round().astype(np.uint8))
    return cut.crop(cut.getchannel("A").getbbox())


def asymmetry(cut: Image.Image) -> float:
    """How much an object differs from itself turned by another class's angle, where it differs least.

    Returns:
        The squared difference as a share of the object's own variance, on 12 x 12 cells: what is finer, such as the
        petals of a blossom, tells nobody which way up it is.
    """
    side = int(np.ceil(np.hypot(*cut.size)))
    upright = Image.new("RGBA", (side, side))
    upright.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    views = []
    for turn in range(ANGLES):
        view = upright.rotate(turn * 360 / ANGLES, Image.Resampling.BICUBIC).resize((12, 12), Image.Resampling.BOX)
        pixels = np.asarray(view, dtype=np.float32) / 255
        views.append(np.dstack([pixels[..., :3] * pixels[..., 3:], pixels[..., 3]]))
    first, *others = views
    variance = ((first - first.mean(axis=(0, 1))) ** 2).sum()
    return float(min(((first - view) ** 2).sum() for view in others) / variance)


@dataclass(frozen=True)
class Material:
    """A split's objects and surfaces by group: `objects[group]` are cut out, `surfaces[group]` rows of `pictures`."""

    objects: list[list[Image.Image]]
    surfaces: list[list[int]]
    pictures: Dataset


def read_source(sets_dir: Path, name: str) -> DatasetDict:
    """One of the saved datasets that `real_datasets.py` writes.

    Raises:
        LayerFusionError: if it is not there, lacks splits or columns, or has groups on both sides of its split.
    """
    folder = sets_dir / name
    cure = f"make it with `python benchmarks/real_datasets.py --names {name} --output_dir {sets_dir}`"
    if not (folder / "dataset_dict.json").is_file():
        raise LayerFusionError(f"there is no saved dataset at {folder}: {cure}, or name its folder with --sets_dir")
    splits = load_from_disk(str(folder))
    for split in ("train", "test"):
        columns = splits[split].column_names if split in splits else []
        if missing := {"image", "label", "group"} - set(columns):
            raise LayerFusionError(f"{folder} has no {sorted(missing)} in a split {split!r}: {cure} in another folder")
    if shared := set(splits["train"]["group"]) & set(splits["test"]["group"]):
        raise LayerFusionError(f"{len(shared)} groups of {folder} are in both splits: {cure} in another folder")
    return splits


def deal(groups: list[int], hands: int, generator: np.random.Generator) -> list[list[int]]:
    """Rows by hand, the rows of a group in the same."""
    hand_of = {group: turn % hands for turn, group in enumerate(generator.permutation(np.unique(groups)).tolist())}
    rows: list[list[int]] = [[] for _ in range(hands)]
    for row, group in enumerate(groups):
        rows[hand_of[group]].append(row)
    return rows


def read_material(emoji: Dataset, materials: Dataset, upright: bool, generator: np.random.Generator) -> Material:
    """The objects of a split that can be used, and its surfaces, dealt out to groups.

    Raises:
        LayerFusionError: if no object can be used.
    """
    categories = emoji.features["label"].names
    objects, groups = [], []
    for picture, label, group in zip(emoji["image"], emoji["label"], emoji["group"], strict=True):
        if upright and categories[label] not in UPRIGHT:
            continue
        cut = cut_out(picture)
        if cut is not None and (not upright or asymmetry(cut) >= MIN_ASYMMETRY):
            objects.append(cut)
            groups.append(group)
    surfaces = list(materials["group"])
    hands = min(GROUPS, len(set(groups)), len(set(surfaces)))
    if not hands:
        raise LayerFusionError(
            f"of {len(emoji)} emoji and {len(materials)} surfaces of a split, {len(objects)} objects and "
            f"{len(surfaces)} surfaces can be used: both are needed, so make the datasets anew with real_datasets.py"
        )
    dealt = deal(groups, hands, generator)
    return Material([[objects[row] for row in hand] for hand in dealt], deal(surfaces, hands, generator), materials)


def draw_surface(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    if min(picture.size) < SIDE:
        raise LayerFusionError(
            f"a surface has {picture.width} x {picture.height} pixels, less than {SIDE} x {SIDE}: make the dataset "
            "'materials' anew with real_datasets.py"
        )
    left, top = (int(generator.integers(size - SIDE + 1)) for size in picture.size)
    crop = picture.convert("RGB").crop((left, top, left + SIDE, top + SIDE))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop


def place(task: Task, label: int, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Corners `(objects, 2)` of boxes of these sizes (width and height), uniform over all places the class allows.

    All are drawn anew until they fit: placed one after another, the last would lie where the others leave room.
    """
    first, second = np.triu_indices(len(sizes), 1)
    while True:
        corners = generator.integers(0, SIDE - sizes + 1)
        centres = corners + sizes / 2
        apart = np.abs(centres[first] - centres[second]) - (sizes[first] + sizes[second]) / 2
        if (apart.max(axis=1) >= GAP).all() and (task.fits is None or task.fits(label, centres)):
            return corners


def compose(
    task: Task, label: int, objects: list[Image.Image], surface: Image.Image, generator: np.random.Generator
) -> Image.Image:
    """A picture of a class, of objects drawn with replacement (two of a kind may lie side by side)."""
    shown = []
    for number in generator.integers(len(objects), size=list(task.classes.values())[label]):
        view = objects[number]
        scale = generator.uniform(*task.sides) / max(view.size)
        width, height = (max(1, round(side * scale)) for side in view.size)
        view = view.resize((width, height), Image.Resampling.BICUBIC)
        if task.turned:
            angle = label * 360 / ANGLES + generator.uniform(-ANGLE_JITTER, ANGLE_JITTER)
            view = view.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            view = view.crop(view.getchannel("A").getbbox())
        shown.append(view)
    picture = draw_surface(surface, generator).convert("RGBA")
    corners = place(task, label, np.array([view.size for view in shown]), generator)
    for view, (left, top) in zip(shown, corners.tolist(), strict=True):
        picture.alpha_composite(view, (left, top))
    return picture.convert("RGB")


def draw_rows(task: Task, material: Material, number: int, seed: list[int]) -> Iterator[tuple[bytes, int, int]]:
    """Images, labels and groups of a split. Classes take turns, and so do groups, once per round of the classes."""
    for row in range(number):
        generator = np.random.default_rng([*seed, row])
        turn, label = divmod(row, len(task.classes))
        group = turn % len(material.objects)
        surfaces = material.surfaces[group]
        surface = material.pictures[surfaces[generator.integers(len(surfaces))]]["image"]
        yield to_png(compose(task, label, material.objects[group], surface, generator)), label, group


def build(name: str, emoji: DatasetDict, materials: DatasetDict, sizes: dict[str, int], seed: int) -> DatasetDict:
    """Splits of a task with as many rows as `sizes` says.

    Raises:
        LayerFusionError: if the sources hold nothing that can be used.
    """
    task = TASKS[name]
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=list(task.classes)), "group": Value("int64")}
    )
    splits = DatasetDict()
    first_group = 0
    for number, (split, size) in enumerate(sizes.items()):
        stream = [seed, zlib.crc32(name.encode()), number]
        material = read_material(emoji[split], materials[split], task.turned, np.random.default_rng(stream))
        columns: dict[str, list[Any]] = {"image": [], "label": [], "group": []}
        for image, label, group in draw_rows(task, material, size, stream):
            columns["image"].append({"bytes": image, "path": None})
            columns["label"].append(label)
            columns["group"].append(first_group + group)
        first_group += len(material.objects)
        splits[split] = Dataset.from_dict(columns, features=features)
        objects = sum(len(hand) for hand in material.objects)
        print(f"{name}, {split}: {size} pictures of {objects} objects, {len(material.objects)} groups", flush=True)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sets_dir", type=Path, help="where real_datasets.py put its datasets; default: --output_dir")
    parser.add_argument("--names", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--train", type=int, default=1000, help="pictures; default: %(default)s")
    parser.add_argument("--test", type=int, default=500, help="pictures; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    names = arguments.names.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        parser.error(f"--names: unknown {unknown}; known are {','.join(TASKS)}")
    sizes = {"train": arguments.train, "test": arguments.test}
    most = max(len(TASKS[name].classes) for name in names)
    if min(sizes.values()) < most or arguments.seed < 0:
        parser.error(f"--train and --test must be {most} or more, one picture per class, and --seed 0 or more")
    try:
        emoji, materials = (
            read_source(arguments.sets_dir or arguments.output_dir, source) for source in ("emoji", "materials")
        )
        for name in names:
            folder = arguments.output_dir / name
            if folder.exists():
                print(f"{name}: is at {folder}")
                continue
            splits = build(name, emoji, materials, sizes, arguments.seed)
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=arguments.output_dir) as staged:
                splits.save_to_disk(str(Path(staged, name)))
                Path(staged, name).rename(folder)  # complete or absent
            print(f"{name}: saved to {folder}", flush=True)
    except LayerFusionError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
