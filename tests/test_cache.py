"""`layerfusion cache`: what it says of a cache, which damage it finds, and what it removes and leaves alone."""

import json
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from modeling_helpers import tiny_backbone
from picture_helpers import CLASSES, picture
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_layerfusion import ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.cli.main import main
from hf_layerfusion.features.manifest import Manifest, record_file, sha256_of, shard_file
from hf_layerfusion.files import write_json

ROWS, SHARD_ROWS = 25, 10


@pytest.fixture
def cli(capsys):
    """Run `layerfusion cache`; returns its exit status, and what it printed to standard output and standard error."""

    def run(*arguments):
        capsys.readouterr()
        status = main(["cache", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model():
    size = {"height": 32, "width": 32}
    processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=size)
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("dinov2"), image_processor=processor, id2label=CLASSES
    )


def pictures(rows=ROWS):
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    labels = [row % 3 for row in range(rows)]
    images = [picture(label, row) for row, label in enumerate(labels)]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def dataset():
    return pictures()


@pytest.fixture(scope="module")
def extract(model, dataset):
    def run(folder):
        return extract_features(model, dataset, folder, batch_size=4, rows_per_shard=SHARD_ROWS, progress=False)

    return run


@pytest.fixture(scope="module")
def whole(extract, tmp_path_factory):
    """A finished cache of three shards; tests take copies."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    extract(folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "train"))


def contents(folder):
    """The bytes of every file, and where links lead."""
    return {
        str(file.relative_to(folder)): os.readlink(file) if file.is_symlink() else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_symlink() or file.is_file()
    }


def place(file, text="left over"):
    """A file that is older than any write that may be under way."""
    file.write_text(text)
    os.utime(file, (time.time() - 3600,) * 2)
    return file


def unfinish(folder):
    """What a kill leaves: shards 0 and 2 with records of their own, an empty manifest, no shard 1."""
    manifest = Manifest.load(folder)
    for shard in manifest.shards:
        write_json(folder / record_file(shard.index), asdict(shard))
    for name in (shard_file(1), record_file(1)):
        (folder / name).unlink()
    manifest.shards = []
    manifest.save(folder)


# ---- info --------------------------------------------------------------------------------------------------------


def test_info(cli, cache, dataset, model):
    status, printed, _ = cli("info", cache)
    assert status == 0
    size = sum((cache / shard_file(index)).stat().st_size for index in range(3))
    for line in (
        f"{cache}: complete, 3 of 3 shards, 25 of 25 rows",
        "rows: 25, and 0 skipped",
        f"bytes: {size:,}",
        "labels: 3 (blue, green, red)",
        f"backbone weights: sha256 {model.config.backbone_fingerprint['digest'][:16]}...",
        "processor size: shortest_edge 36",
        "processor crop_size: height 32, width 32",
        f"dataset: fingerprint {dataset._fingerprint}, rows 25, image_column image, label_column label",
        "tokens: 6 of width 32, float16",
        "  layer 1 · block · cls",
    ):
        assert f"{line}\n" in printed
    assert "versions: transformers 5." in printed
    assert printed.endswith("  layer 3 · block · mean\n")


def test_info_of_an_unfinished_cache(cli, cache):
    unfinish(cache)
    status, printed, _ = cli("info", cache)
    assert status == 0
    assert printed.startswith(f"{cache}: unfinished, 2 of 3 shards, 15 of 25 rows\nrows: 15, and 0 skipped\n")


def test_info_names_skipped_images_and_views(cli, model, tmp_path):
    rows = [{"bytes": b"no picture", "path": f"{row}.png"} if row < 7 else None for row in range(20)]
    images = pictures(20).cast_column("image", Image(decode=False))["image"][:]
    broken = Dataset.from_dict({"image": [bad or image for bad, image in zip(rows, images, strict=True)]})
    broken = broken.cast_column("image", Image())
    options = {"label_column": None, "on_error": "skip", "max_skipped": 0.5, "views": 2, "rows_per_shard": 5}
    extract_features(model, broken, tmp_path / "cache", **options)
    status, printed, _ = cli("info", tmp_path / "cache")
    assert status == 0
    assert "rows: 26, and 14 skipped, 2 views of each image\n" in printed
    assert "row 0 (0.png)" in printed
    assert "\n  and 9 more\n" in printed
    assert "labels" not in printed.replace("label_column", "")
    assert cli("verify", tmp_path / "cache")[0] == 0


# ---- verify ------------------------------------------------------------------------------------------------------


def flip(folder):
    file = folder / shard_file(1)
    written = bytearray(file.read_bytes())
    written[len(written) // 2] ^= 1
    file.write_bytes(written)


def truncate(folder):
    file = folder / shard_file(1)
    file.write_bytes(file.read_bytes()[:-8])


def swap(folder):
    first, second = folder / shard_file(0), folder / shard_file(1)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def lose(folder):
    (folder / shard_file(1)).unlink()


def rewrite(folder, change):
    """Another table in place of shard 1, with a manifest that knows its size and checksum."""
    file, manifest = folder / shard_file(1), Manifest.load(folder)
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
        table = change(reader.read_all())
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    record(folder, manifest)


def record(folder, manifest):
    file = folder / shard_file(1)
    manifest.shards[1].num_bytes, manifest.shards[1].sha256 = file.stat().st_size, sha256_of(file)
    manifest.save(folder)


def features_as(values, width=6 * 32):
    values = np.ascontiguousarray(values)
    return lambda table: table.set_column(
        0, "layer_features", pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
    )


def with_nan():
    values = np.zeros((SHARD_ROWS, 6 * 32), np.float16)
    values[7, 40] = np.nan
    return values


def with_null(table):
    labels = [None, *table["label"].to_pylist()[1:]]
    return table.set_column(1, "label", pa.array(labels, pa.int64()))


def write_noise(folder):
    manifest = Manifest.load(folder)
    (folder / shard_file(1)).write_bytes(b"no Arrow file at all" * 20)
    record(folder, manifest)


def write_schema_only(folder):
    rewrite(folder, lambda table: table.slice(0, 0))


DAMAGE = {
    "flipped": (flip, [1], "does not have the checksum it was written with"),
    "truncated": (truncate, [1], "it is truncated or was changed"),
    "swapped": (swap, [0, 1], "does not have the checksum it was written with"),
    "missing": (lose, [1], "is missing"),
}
FOREIGN = {
    "noise": (write_noise, "shard .*00001.arrow "),
    "rows": (lambda f: rewrite(f, lambda t: t.slice(1)), "holds 9 rows, but its manifest says 10"),
    "no rows": (write_schema_only, "holds 0 rows, but its manifest says 10"),
    "no labels": (lambda f: rewrite(f, lambda t: t.drop_columns("label")), r"columns \['layer_features'\] instead of"),
    "float32": (
        lambda f: rewrite(f, features_as(np.zeros((SHARD_ROWS, 192), np.float32))),
        r"features of type .*float.*\[192\] instead of .*halffloat.*\[192\]",
    ),
    "width": (
        lambda f: rewrite(f, features_as(np.zeros((SHARD_ROWS, 96), np.float16), 96)),
        r"\[96\] instead of .*\[192\]",
    ),
    "no lists": (
        lambda f: rewrite(f, lambda t: t.set_column(0, "layer_features", pa.array(np.zeros(SHARD_ROWS, np.float16)))),
        r"features of type halffloat instead of",
    ),
    "label type": (
        lambda f: rewrite(f, lambda t: t.set_column(1, "label", t["label"].cast(pa.float32()))),
        "labels of type float, but the shards before it have int64",
    ),
    "null": (lambda f: rewrite(f, with_null), "has rows without values"),
    "not finite": (lambda f: rewrite(f, features_as(with_nan())), "NaN or infinite values in its row 7"),
}


def test_verify(cli, cache):
    assert cli("verify", cache) == (0, f"{cache}: complete, 3 of 3 shards, 25 of 25 rows, 0 damaged\n", "")
    unfinish(cache)
    assert cli("verify", cache) == (0, f"{cache}: unfinished, 2 of 3 shards, 15 of 25 rows, 0 damaged\n", "")


@pytest.mark.parametrize(("damage", "shards", "message"), DAMAGE.values(), ids=DAMAGE)
def test_verify_names_each_damaged_shard(cli, cache, damage, shards, message):
    damage(cache)
    status, printed, error = cli("verify", cache)
    *lines, summary = printed.splitlines()
    assert status == 1
    assert len(lines) == len(shards)
    for line, index in zip(lines, shards, strict=True):
        assert line.startswith("damaged: shard ")
        assert shard_file(index) in line
        assert message in line
    assert summary.endswith(f", {len(shards)} damaged")
    assert error.startswith(f"layerfusion cache: damaged shards in {cache}: remove them with `layerfusion cache prune")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("damage", "message"), FOREIGN.values(), ids=FOREIGN)
def test_verify_compares_content_with_the_manifest(cli, cache, damage, message):
    damage(cache)
    status, printed, _ = cli("verify", cache)
    assert status == 1
    line, summary = printed.splitlines()
    assert line.startswith(f"damaged: shard {cache / shard_file(1)} ")
    assert re.search(message, line)
    assert summary.endswith(", 1 damaged")


def test_several_caches(cli, cache, whole, tmp_path):
    flip(cache)
    status, printed, error = cli("verify", whole, cache)
    assert status == 1
    assert f"{whole}: complete, 3 of 3 shards, 25 of 25 rows, 0 damaged\n" in printed
    assert f"damaged shards in {cache}: " in error
    place(tmp_path / "thesis.txt")
    for action in ("info", "verify", "prune"):
        status, printed, error = cli(action, cache, tmp_path)
        assert (status, printed) == (1, "")  # before anything is read or removed
        assert error == f"layerfusion cache: {tmp_path} holds no features.json: it is not a feature cache\n"


@pytest.mark.parametrize("arguments", [[], ["info"], ["mend", "a"], ["verify", "--damaged", "a"]])
def test_wrong_options(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cache", *arguments])
    assert stopped.value.code == 2
    assert "usage: layerfusion" in capsys.readouterr().err


# ---- prune -------------------------------------------------------------------------------------------------------

LEFT_OVER = {
    "features-00001.arrow.77.tmp": "left by a write that did not finish",
    "features-00001.json": "a record that the manifest holds",
    "features-00007.arrow": "of a shard that the manifest does not name",
    "features-00007.json": "of a shard that the manifest does not name",
    "features.json.123.tmp": "left by a write that did not finish",
}
FOREIGN_NAMES = ("thesis.txt", "features.arrow", "features-000007.arrow", "features-00003.arrow.tmp", "x.1.tmp")


def test_prune_removes_what_extraction_left(cli, cache):
    before = contents(cache)
    for name in LEFT_OVER:
        place(cache / name)
    status, printed, error = cli("prune", cache)
    assert (status, error) == (0, "")
    removed = [f"removed {cache / name}: {reason}, 9 bytes" for name, reason in LEFT_OVER.items()]
    total = f"{cache}: removed 5 files, 45 bytes; complete, 3 of 3 shards, 25 of 25 rows"
    assert printed.splitlines() == [*removed, total]
    assert contents(cache) == before
    assert cli("prune", cache)[1] == total.replace("5 files, 45", "0 files, 0") + "\n"


def test_prune_touches_nothing_else(cli, cache, tmp_path):
    outside = place(tmp_path / "features-00008.arrow")
    for name in FOREIGN_NAMES:
        place(cache / name)
    (cache / "features-00006.arrow").mkdir()
    place(cache / "features-00006.arrow" / "features-00001.arrow.1.tmp")
    os.utime(cache / "features-00006.arrow", (time.time() - 3600,) * 2)
    (cache / "features-00008.arrow").symlink_to(outside)
    (cache / "features-00009.arrow.5.tmp").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    status, printed, _ = cli("prune", "--damaged", cache)
    assert status == 0
    assert "removed 0 files" in printed
    assert contents(tmp_path) == before


def test_dry_run_changes_nothing(cli, cache):
    flip(cache)
    for name in LEFT_OVER:
        place(cache / name)
    before = contents(cache)
    dry = cli("prune", "--damaged", "--dry_run", cache)[1]
    assert contents(cache) == before
    assert dry.replace("would remove", "removed") == cli("prune", "--damaged", cache)[1]
    assert set(before) - set(contents(cache)) == {*LEFT_OVER, shard_file(1)}


def test_prune_leaves_files_that_an_extraction_may_be_writing(cli, cache):
    young = cache / "features-00001.arrow.77.tmp"
    young.write_text("half a shard")
    status, printed, _ = cli("prune", cache)
    assert status == 0
    assert printed.startswith(f"kept {young}: left by a write that did not finish, but younger than 60 seconds\n")
    assert young.exists()


def test_prune_without_damaged_reads_no_shard(cli, cache):
    flip(cache)
    before = contents(cache)
    assert "removed 0 files, 0 bytes; complete" in cli("prune", cache)[1]
    assert contents(cache) == before


def test_prune_keeps_the_records_of_an_unfinished_cache(cli, cache, whole, extract):
    unfinish(cache)
    place(cache / shard_file(1))  # a kill between the file and its record
    for file in cache.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    printed = cli("prune", cache)[1]
    assert f"removed {cache / shard_file(1)}: of a shard that the manifest does not name" in printed
    assert sorted(contents(cache)) == [shard_file(0), record_file(0), shard_file(2), record_file(2), "features.json"]
    extract(cache)
    assert contents(cache) == contents(whole)


@pytest.mark.parametrize("unfinished", [False, True], ids=["complete", "unfinished"])
@pytest.mark.parametrize(
    ("damage", "shards"),
    [(damage, shards) for damage, shards, _ in DAMAGE.values()] + [(damage, [1]) for damage, _ in FOREIGN.values()],
    ids=[*DAMAGE, *FOREIGN],
)
def test_extraction_after_prune_redoes_the_damaged_shards_only(cli, cache, whole, extract, damage, shards, unfinished):
    damage(cache)
    if unfinished:
        manifest = Manifest.load(cache)
        for shard in manifest.shards:
            write_json(cache / record_file(shard.index), asdict(shard))
        manifest.shards = []
        manifest.save(cache)
    sound = {index: (cache / shard_file(index)).stat().st_mtime_ns for index in range(3) if index not in shards}
    status, printed, _ = cli("prune", "--damaged", cache)
    assert status == 0
    assert printed.count("damaged: ") == len(shards)
    assert printed.endswith(f"unfinished, {len(sound)} of 3 shards, {25 - 10 * len(shards)} of 25 rows\n")
    assert sorted(contents(cache)) == [*map(shard_file, sound), "features.json"]
    assert cli("verify", cache)[0] == 0
    extract(cache)
    assert contents(cache) == contents(whole)
    assert {index: (cache / shard_file(index)).stat().st_mtime_ns for index in sound} == sound


def test_a_damaged_shard_that_is_a_link(cli, cache, whole, extract, tmp_path):
    flip(cache)
    target = (cache / shard_file(1)).rename(tmp_path / "elsewhere.arrow")
    (cache / shard_file(1)).symlink_to(target)
    before = target.read_bytes()
    assert "removed 0 files" in cli("prune", "--damaged", cache)[1]
    extract(cache)  # renames its file over the link
    assert contents(cache) == contents(whole)
    assert target.read_bytes() == before


def test_a_damaged_manifest_is_refused(cli, cache):
    manifest = cache / "features.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "shards": "none"}))
    for action in ("info", "verify", "prune"):
        status, printed, error = cli(action, cache)
        assert (status, printed) == (1, "")
        assert f"{manifest} is damaged" in error
