"""The generated spatial tasks: labels are read off the pictures again, made of tiny objects and surfaces drawn here."""

import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from scipy import ndimage

from hf_layerfusion.data import open_dataset, prepare_splits
from hf_layerfusion.errors import LayerFusionError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import spatial_tasks
from spatial_tasks import asymmetry, build, cut_out, main, read_source

SIZES = {"train": 48, "test": 32}
CATEGORIES = ["Animals & Nature", "Objects"]
ARROW = [(32, 2), (50, 61), (14, 61)]  # points up: its tip is what lies farthest from its centre of mass
DISC, TWO_PIECES = "disc", "two pieces"


def drawn(shape, colour):
    picture = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(picture)
    if shape == DISC:
        draw.ellipse((4, 4, 59, 59), fill=colour)
    elif shape == TWO_PIECES:
        draw.rectangle((2, 2, 60, 28), fill=colour)
        draw.rectangle((2, 33, 60, 60), fill=colour)
    else:
        draw.polygon(shape, fill=colour)
    return picture


# Of each split: the kind, category and number of objects. The colour of an object is its own: red, its group, the shape.
OBJECTS = [(ARROW, 0, 6), (DISC, 0, 4), (ARROW, 1, 3), (TWO_PIECES, 1, 2)]
FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=CATEGORIES), "group": Value("int64")})


def sources():
    """Emoji of one colour each, `(200, group, kind)`, and surfaces `(0, group, 90)`; two pictures of every group."""
    emoji, materials = DatasetDict(), DatasetDict()
    group = 0
    for split in ("train", "test"):
        rows = {"image": [], "label": [], "group": []}
        for kind, (shape, label, count) in enumerate(OBJECTS):
            for _ in range(count):
                group += 1
                for copy in range(2):
                    rows["image"].append(drawn(shape, (200 + copy, group, 20 * kind)))
                    rows["label"].append(label)
                    rows["group"].append(group)
        emoji[split] = Dataset.from_dict(rows, features=FEATURES)
        surfaces = np.arange(8) // 2 + (10 if split == "train" else 20)
        materials[split] = Dataset.from_dict(
            {
                "image": [Image.new("RGB", (256, 240), (0, int(surface), 90)) for surface in surfaces],
                "label": [1] * 8,
                "group": surfaces,
            },
            features=FEATURES,
        )
    return emoji, materials


@pytest.fixture(scope="module")
def tasks():
    return {name: build(name, *sources(), SIZES, seed=0) for name in spatial_tasks.TASKS}


def most_common(colours):
    """The colour `(3,)` that most of the pixels `(N, 3)` have."""
    packed, counts = np.unique(colours @ [65536, 256, 1], return_counts=True)
    return np.array([packed[counts.argmax()] >> shift & 255 for shift in (16, 8, 0)])


def look(picture):
    """The surface's number, and of each object its number, kind, box (left, top, right, bottom) and pixels `(N, 2)`."""
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (224, 224, 3)
    surface = most_common(pixels.reshape(-1, 3))
    assert surface[0] == 0
    covered = np.abs(pixels - surface).max(axis=2) > 25  # what is less is the ringing of bicubic filters
    pieces, _ = ndimage.label(covered, np.ones((3, 3)))
    objects = []
    for piece, (height, width) in enumerate(ndimage.find_objects(pieces), 1):
        rows, columns = np.nonzero(pieces == piece)
        _, number, kind = most_common(pixels[rows, columns])
        box = np.array([width.start, height.start, width.stop, height.stop])
        objects.append((number, kind // 20, box, np.stack([columns, rows], axis=1)))
    return surface[1], objects


@pytest.fixture(scope="module")
def seen(tasks):
    """What the pictures show, by task and split."""
    return {
        name: {split: [look(picture) for picture in table["image"]] for split, table in splits.items()}
        for name, splits in tasks.items()
    }


def centre(box):
    return (box[:2] + box[2:]) / 2


def check_position(name, objects):
    row, column = map(int, re.fullmatch(r"row (\d) column (\d)", name).groups())
    ((*_, box, _),) = objects
    inside = centre(box) - 56 * np.array([column - 1, row - 1])
    assert (inside >= 5).all()
    assert (inside <= 51).all()


def check_count(name, objects):
    assert len(objects) == int(name)


def check_orientation(name, objects):
    ((_, kind, _, pixels),) = objects
    assert kind == 0, "only what has an up"
    arms = pixels - pixels.mean(axis=0)
    x, y = arms[np.hypot(*arms.T).argmax()]
    error = np.degrees(np.arctan2(-x, -y)) - int(name.removesuffix(" degrees"))  # anticlockwise, y pointing down
    assert abs((error + 180) % 360 - 180) <= 10 + 3  # and the width of the tip


def check_distance(name, objects):
    nearest, farthest = map(int, re.fullmatch(r"(\d+) to (\d+) px", name).groups())
    (*_, one, _), (*_, other, _) = objects
    assert nearest - 2 <= np.hypot(*(centre(one) - centre(other))) <= farthest + 2


@pytest.mark.parametrize(
    ("name", "check", "sides", "classes"),
    [
        ("position", check_position, (48, 64), 16),
        ("count", check_count, (28, 48), 6),
        ("orientation", check_orientation, None, 8),
        ("distance", check_distance, (32, 44), 5),
    ],
)
def test_labels_are_what_the_pictures_show(tasks, seen, name, check, sides, classes):
    for split, table in tasks[name].items():
        names = table.features["label"].names
        assert len(names) == classes
        for (_, objects), label in zip(seen[name][split], table["label"], strict=True):
            check(names[label], objects)
            for _, _, box, _ in objects if sides else ():
                assert sides[0] - 2 <= (box[2:] - box[:2]).max() <= sides[1] + 1
        counts = Counter(table["label"])
        assert len(table) == SIZES[split]
        assert set(counts) == set(range(classes))
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", spatial_tasks.TASKS)
def test_neither_splits_nor_groups_share_objects_or_surfaces(tasks, seen, name):
    emoji, materials = sources()
    groups_of = defaultdict(set)
    for split, table in tasks[name].items():
        for (surface, objects), group in zip(seen[name][split], table["group"], strict=True):
            assert surface in materials[split]["group"]
            groups_of["surface", surface].add(group)
            for number, kind, *_ in objects:
                assert number in emoji[split]["group"]
                assert kind < 3, "an object of two pieces"
                groups_of["object", number].add(group)
    assert all(len(groups) == 1 for groups in groups_of.values())
    train, test = (set(tasks[name][split]["group"]) for split in ("train", "test"))
    assert len(train) > 1
    assert not train & test


def encoded(table):
    return [image["bytes"] for image in table.cast_column("image", ImageFeature(decode=False))["image"]]


@pytest.mark.parametrize("name", spatial_tasks.TASKS)
def test_a_seed_gives_the_same_bytes_of_however_many_rows(tasks, name):
    again = build(name, *sources(), {"train": 20, "test": 16}, seed=0)
    other = build(name, *sources(), {"train": 20, "test": 16}, seed=1)
    for split, table in again.items():
        images = encoded(table)
        assert all(image.startswith(b"\x89PNG") for image in images)
        assert images == encoded(tasks[name][split])[: len(images)]
        assert not set(images) & set(encoded(other[split]))
    assert not set(encoded(tasks[name]["train"])) & set(encoded(tasks[name]["test"]))


def blended(colour, ground):
    """A ring with a white hole, its edges blended with the ground as drawing programs do: four times as large first."""
    large = Image.new("L", (256, 256))
    ImageDraw.Draw(large).ellipse((20, 20, 235, 215), fill=255)
    cover = large.resize((64, 64), Image.Resampling.BOX)
    picture = Image.composite(Image.new("RGB", (64, 64), colour), Image.new("RGB", (64, 64), ground), cover)
    ImageDraw.Draw(picture).ellipse((24, 24, 40, 36), fill="white")
    return picture, cover.getbbox()


@pytest.mark.parametrize("colour", [(250, 200, 30), (20, 20, 20), (90, 140, 250)])
def test_edges_are_freed_of_the_white_ground(colour):
    picture, box = blended(colour, "white")
    cut = cut_out(picture)
    assert cut.size == (box[2] - box[0], box[3] - box[1])
    for ground in ("white", "black", (30, 200, 30)):
        page = Image.new("RGBA", cut.size, ground)
        page.alpha_composite(cut)
        expected, _ = blended(colour, ground)
        np.testing.assert_allclose(
            np.asarray(page.convert("RGB")).astype(int), np.asarray(expected.crop(box)).astype(int), atol=3
        )


@pytest.mark.parametrize(
    "shape",
    [
        TWO_PIECES,
        [(20, 20), (50, 20), (50, 50), (20, 50)],  # small
        [(2, 2), (6, 2), (62, 62), (58, 62)],  # thin
        [(70, 70), (80, 70), (70, 80)],  # nothing
    ],
    ids=["two pieces", "small", "thin", "nothing"],
)
def test_what_is_no_whole_object_is_left_out(shape):
    assert cut_out(drawn(shape, (200, 0, 0))) is None


def test_only_what_looks_different_in_all_directions_has_an_up():
    bar = [(20, 2), (44, 2), (44, 61), (20, 61)]  # the same upside down
    square = [(4, 4), (59, 4), (59, 59), (4, 59)]
    for shape in (DISC, bar, square):
        assert asymmetry(cut_out(drawn(shape, (200, 0, 0)))) < spatial_tasks.MIN_ASYMMETRY
    assert asymmetry(cut_out(drawn(ARROW, (200, 0, 0)))) > 10 * spatial_tasks.MIN_ASYMMETRY


def without(column):
    return lambda emoji: DatasetDict({split: table.remove_columns(column) for split, table in emoji.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            None,
            r"there is no saved dataset at .*emoji: make it with `python benchmarks/real_datasets.py --names emoji",
        ),
        (without("group"), r"emoji has no \['group'\] in a split 'train'"),
        (
            lambda emoji: DatasetDict({"train": emoji["train"]}),
            r"has no \['group', 'image', 'label'\] in a split 'test'",
        ),
        (
            lambda emoji: DatasetDict({"train": emoji["train"], "test": emoji["train"]}),
            "15 groups of .* in both splits",
        ),
    ],
    ids=["missing", "no groups", "no test split", "shared groups"],
)
def test_unusable_sources_are_named(change, message, tmp_path):
    if change is not None:
        change(sources()[0]).save_to_disk(tmp_path / "emoji")
    with pytest.raises(LayerFusionError, match=message):
        read_source(tmp_path, "emoji")


def test_sources_without_objects_or_with_small_surfaces_are_refused():
    emoji, materials = sources()
    flat = emoji.filter(lambda label: label == 1, input_columns="label")
    with pytest.raises(LayerFusionError, match="of 10 emoji and 8 surfaces of a split, 0 objects and 8 surfaces can"):
        build("orientation", flat, materials, SIZES, 0)
    with pytest.raises(LayerFusionError, match="a surface has 64 x 64 pixels, less than 224 x 224"):
        build("count", emoji, emoji, SIZES, 0)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["spatial_tasks.py", *map(str, arguments)])
    main()


def test_tasks_end_to_end(tasks, tmp_path, monkeypatch, capsys):
    for name, splits in zip(("emoji", "materials"), sources(), strict=True):
        splits.save_to_disk(tmp_path / "sets" / name)
    arguments = ("--output_dir", tmp_path / "out", "--sets_dir", tmp_path / "sets", "--train", 12, "--test", 10)
    run_main(monkeypatch, *arguments, "--names", "count,distance")
    assert "count, train: 12 pictures of 26 objects, 4 groups" in capsys.readouterr().out
    splits, image_column, label_column = prepare_splits(open_dataset(tmp_path / "out" / "count"))
    assert (image_column, label_column) == ("image", "label")
    assert encoded(splits["test"]) == encoded(tasks["count"]["test"])[:10]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["count", "distance"]

    shutil.rmtree(tmp_path / "out" / "distance")
    run_main(monkeypatch, *arguments, "--names", "count,distance")
    assert f"count: is at {tmp_path / 'out' / 'count'}\ndistance, train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 1, "there is no saved dataset at"),
        (("--names", "count,size"), 2, "unknown ['size']; known are position,count,orientation,distance"),
        (("--names", "count,orientation", "--test", 7), 2, "--train and --test must be 8 or more"),
        (("--seed", -1), 2, "--seed 0 or more"),
    ],
)
def test_refusals_of_the_command(arguments, status, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--output_dir", tmp_path, *arguments)
    assert stopped.value.code == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
