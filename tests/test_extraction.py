"""Extraction that is killed, spread over processes, fed broken images or given other ingredients; damaged shards."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_layerfusion import LayerFeatures, LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.features import extract as extraction
from hf_layerfusion.features.manifest import Manifest

NAMES = ["ant", "bee", "cat"]
ROWS, PER_SHARD, BATCH = 200, 16, 8
SHARDS = 13
# Processes must agree on these: batches of another size may give other bits.
OPTIONS = {"batch_size": BATCH, "rows_per_shard": PER_SHARD, "dtype": "float32", "progress": False}


def write_pictures(folder, rows):
    """Numbered PNG files of different sizes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for row in range(rows):
        pixels = generator.integers(0, 256, (20 + row % 5, 30 - row % 7, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(folder / f"{row:03d}.png")
    return folder


def dataset_of(folder, rows=ROWS):
    """The same in every process: what is not written yet is in it too."""
    files = [str(folder / f"{row:03d}.png") for row in range(rows)]
    labels = [row % len(NAMES) for row in range(rows)]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


def tiny_backbone(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    return Dinov2Model(Dinov2Config(**{**shape, "image_size": 16, **options}))


def tiny_processor(size=16, **options):
    return BitImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


def build_model(backbone=None, processor=None, **overrides):
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        backbone or tiny_backbone(), image_processor=processor or tiny_processor(), id2label=NAMES, **overrides
    )


def tokens_of(features):
    return features.tensors()["layer_features"]


def contents(folder):
    """Every file of a folder: that nothing is left over is part of what is compared."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def shard_path(folder, index):
    return folder / f"features-{index:05d}.arrow"


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("extraction") / "pictures", ROWS)


@pytest.fixture(scope="module")
def uninterrupted(processes, picture_folder, tmp_path_factory):
    """The cache of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "cache"
    assert processes.run(extract, picture_folder, folder) == 0
    assert sorted(contents(folder)) == [f"features-{index:05d}.arrow" for index in range(SHARDS)] + ["features.json"]
    return folder


# Extraction in processes of its own. They are forked from a server that has the libraries imported and has run nothing,
# because an import takes seconds, and a fork of this process could inherit locks of its threads.


class Processes:
    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hf_layerfusion.features", "transformers.models.dinov2.modeling_dinov2"])
        self.started = []

    def start(self, target, *arguments, **named):
        process = self.context.Process(target=target, args=arguments, kwargs=named, daemon=True)
        process.start()
        self.started.append(process)
        return process

    def run(self, target, *arguments, **named):
        """Run to the end; returns the exit code."""
        process = self.start(target, *arguments, **named)
        process.join(120)
        return process.exitcode


@pytest.fixture(scope="module")
def processes():
    processes = Processes()
    yield processes
    for process in processes.started:
        process.kill()


def extract(pictures, folder, *, rows=ROWS, pause=0.0, started=None, images=None, **options):
    """Extract with a model that every process builds alike.

    Args:
        pause: seconds that each image takes at least.
        started: event to set once the model is built.
        images: counter of the images that were reached.
    """
    torch.set_num_threads(1)
    model, dataset = build_model(), dataset_of(pictures, rows)
    process = BitImageProcessorPil.__call__

    def slow(*arguments, **named):
        if images is not None:
            images.value += 1
        time.sleep(pause)
        return process(*arguments, **named)

    BitImageProcessorPil.__call__ = slow
    if started is not None:
        started.set()
    extract_features(model, dataset, folder, **{**OPTIONS, **options})


def extract_until_operation(pictures, folder, last):
    """Extract two shards; SIGKILL strikes instead of the `last`-th operation on files."""
    done = 0

    def counted(operation):
        def run(*arguments, **named):
            nonlocal done
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **named)

        return run

    os.fsync = counted(os.fsync)
    for name in ("mkdir", "replace", "unlink"):
        setattr(Path, name, counted(getattr(Path, name)))
    extract(pictures, folder, rows=2 * PER_SHARD)


def wait_for(condition, pause=0.01):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)


# Kills


@pytest.mark.slow
def test_killed_at_20_random_moments(processes, picture_folder, uninterrupted, tmp_path):
    folder = tmp_path / "cache"
    generator, pause = random.Random(0), 0.003
    kills, shards = 0, []
    for attempt in range(20):
        # In progress, so that a busy machine gives the same moments: up to two shards far. Every fourth process is
        # struck while it looks at what there is.
        started, images = processes.context.Event(), processes.context.Value("i", 0)
        reach = 0 if attempt % 4 == 0 else generator.randrange(1, 2 * PER_SHARD)
        process = processes.start(extract, picture_folder, folder, pause=pause, started=started, images=images)
        assert started.wait(60)
        wait_for(lambda images=images, reach=reach: images.value >= reach, pause=0.001)
        time.sleep(generator.uniform(0, 0.05 if reach == 0 else pause))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        shards.append(len(list(folder.glob("features-*.arrow"))))
    assert kills == 20
    assert 3 <= shards[-1] < SHARDS  # there was something to keep, and something left to do
    assert len(set(shards)) > 3
    with pytest.raises(LayerFusionError, match=r"is unfinished: .* of 200 rows"):
        LayerFeatures.open(folder)
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("features-*.arrow")}
    assert processes.run(extract, picture_folder, folder) == 0
    # At most the shard that was renamed, but not recorded yet, is written again.
    again = [name for name, written in kept.items() if (folder / name).stat().st_mtime_ns != written]
    assert len(again) <= 1
    assert contents(folder) == contents(uninterrupted)
    resumed, whole = LayerFeatures.open(folder, verify=True), LayerFeatures.open(uninterrupted)
    assert torch.equal(tokens_of(resumed), tokens_of(whole))
    assert resumed.labels.tolist() == [row % len(NAMES) for row in range(ROWS)]


@pytest.mark.slow
def test_killed_at_every_operation_on_files(processes, picture_folder, tmp_path):
    assert processes.run(extract, picture_folder, tmp_path / "whole", rows=2 * PER_SHARD) == 0
    expected, kills = contents(tmp_path / "whole"), 0
    while True:
        folder = tmp_path / str(kills)
        status = processes.run(extract_until_operation, picture_folder, folder, kills + 1)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert processes.run(extract, picture_folder, folder, rows=2 * PER_SHARD) == 0
        assert contents(folder) == expected, f"killed at operation {kills}"
    assert kills >= 12  # two shards, their records, and the manifest twice: each is fsynced and renamed


# Processes


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(processes, picture_folder, uninterrupted, tmp_path, count):
    folder = tmp_path / "cache"
    ranks = [
        processes.start(extract, picture_folder, folder, process_index=index, num_processes=count, pause=0.002)
        for index in range(count)
    ]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * count
    assert contents(folder) == contents(uninterrupted)


@pytest.mark.slow
def test_a_process_that_starts_late_still_does_its_share(processes, picture_folder, uninterrupted, tmp_path):
    folder = tmp_path / "cache"
    first = processes.start(extract, picture_folder, folder, process_index=0, num_processes=2)
    wait_for(lambda: len(list(folder.glob("features-*.json"))) == 7)
    second = processes.start(extract, picture_folder, folder, process_index=1, num_processes=2)
    second.join(20)
    first.join(20)
    assert [first.exitcode, second.exitcode] == [0, 0]
    assert contents(folder) == contents(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_dies_loses_only_its_own_shard(processes, picture_folder, uninterrupted, tmp_path, count):
    folder = tmp_path / "cache"
    ranks = [
        processes.start(extract, picture_folder, folder, process_index=index, num_processes=3, pause=0.005)
        for index in range(3)
    ]

    def records():
        return {int(file.stem.split("-")[1]) for file in folder.glob("features-*.json")}

    wait_for(lambda: any(index % 3 == 1 for index in records()))
    ranks[1].kill()
    ranks[1].join()
    lost = {index for index in range(SHARDS) if index % 3 == 1} - records()
    assert lost
    # The others do all of their shards, and then wait for one that will not come.
    wait_for(lambda: records() == set(range(SHARDS)) - lost)
    for rank in (ranks[0], ranks[2]):
        assert rank.is_alive()
        rank.kill()
        rank.join()
    kept = {index: shard_path(folder, index).stat().st_mtime_ns for index in records()}
    ranks = [
        processes.start(extract, picture_folder, folder, process_index=index, num_processes=count)
        for index in range(count)
    ]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * count
    assert kept == {index: shard_path(folder, index).stat().st_mtime_ns for index in kept}
    assert contents(folder) == contents(uninterrupted)


def extract_as_launched(rank, *arguments, **named):
    """With what `accelerate launch` tells its processes, without the seconds that it takes to start."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    extract(*arguments, **named)


@pytest.mark.slow
def test_processes_of_accelerate_launch(processes, picture_folder, uninterrupted, tmp_path):
    images = [processes.context.Value("i", 0) for _ in range(2)]
    ranks = [
        processes.start(extract_as_launched, rank, picture_folder, tmp_path / "cache", images=images[rank])
        for rank in range(2)
    ]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert [count.value for count in images] == [ROWS - 6 * PER_SHARD, 6 * PER_SHARD]  # seven shards and six
    assert contents(tmp_path / "cache") == contents(uninterrupted)


def test_a_share_that_does_not_exist(picture_folder, tmp_path):
    with pytest.raises(LayerFusionError, match="process_index=2 is not one of num_processes=2"):
        extract_features(build_model(), dataset_of(picture_folder), tmp_path, process_index=2, num_processes=2)
    assert not list(tmp_path.iterdir())


# Broken images


BAD = {3: "is not a readable image", 17: "is not a readable image", 18: "there is no file", 40: "readable image"}


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    """48 pictures: row 3 is flipped in the middle, row 17 cut off, row 18 missing, row 40 a text."""
    folder = write_pictures(tmp_path_factory.mktemp("broken") / "pictures", 48)
    corrupt = bytearray((folder / "003.png").read_bytes())
    corrupt[len(corrupt) // 2 : len(corrupt) // 2 + 40] = bytes(40)
    (folder / "003.png").write_bytes(corrupt)
    (folder / "017.png").write_bytes((folder / "017.png").read_bytes()[:-200])
    (folder / "018.png").unlink()
    (folder / "040.png").write_text("<html>404</html>")
    return folder


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_named_and_the_others_stay_aligned(model, broken_folder, tmp_path, num_workers):
    dataset = dataset_of(broken_folder, 48)
    options = {**OPTIONS, "on_error": "skip", "max_skipped": 0.1, "num_workers": num_workers}
    features = extract_features(model, dataset, tmp_path / "cache", **options)
    skipped = json.loads((tmp_path / "cache" / "features.json").read_text())["shards"]
    skipped = [entry for shard in skipped for entry in shard["skipped"]]
    assert skipped == features.manifest.skipped
    assert [entry["row"] for entry in skipped] == list(BAD)
    for entry in skipped:
        path = str(broken_folder / f"{entry['row']:03d}.png")
        assert entry["path"] == path
        assert entry["reason"].startswith(f"row {entry['row']} ({path})")
        assert BAD[entry["row"]] in entry["reason"]
    good = [row for row in range(48) if row not in BAD]
    assert features.source_rows.tolist() == good
    assert [shard.rows for shard in features.manifest.shards] == [15, 14, 15]
    expected = extract_features(model, dataset.select(good), tmp_path / "good", **OPTIONS)
    # The batches are others, and so is the order of additions.
    torch.testing.assert_close(tokens_of(features), tokens_of(expected), rtol=1e-5, atol=1e-6)
    assert features.labels.tolist() == expected.labels.tolist() == [row % len(NAMES) for row in good]
    assert features.select_rows([30, 2, 3]).source_rows.tolist() == [good[30], 2, 4]


@pytest.mark.parametrize("kind", ["classes", "several labels"])
def test_skipped_images_of_a_stream(broken_folder, tmp_path, kind):
    """Batches of which nothing can be read have no labels, but a place in the shard."""
    dataset = dataset_of(broken_folder, 48).select(range(14, 22))
    options = {**OPTIONS, "batch_size": 1, "rows_per_shard": 4, "on_error": "skip", "max_skipped": 0.5}
    model = build_model()
    if kind == "several labels":
        model = build_model(problem_type="multi_label_classification")
        values = [[float(row % 2), 1.0, 0.0] for row in range(8)]
        dataset = dataset.remove_columns("label").add_column("label", values, feature=List(Value("float32")))
    table = extract_features(model, dataset, tmp_path / "table", **options)
    stream = dataset.to_iterable_dataset()
    streamed = extract_features(model, stream, tmp_path / "stream", num_rows=8, fingerprint="v1", **options)
    assert torch.equal(tokens_of(streamed), tokens_of(table))
    assert streamed.labels.dtype == table.labels.dtype
    assert streamed.labels.tolist() == table.labels.tolist()
    assert streamed.source_rows.tolist() == table.source_rows.tolist() == [0, 1, 2, 5, 6, 7]


def test_a_shard_of_broken_images_only(model, broken_folder, tmp_path):
    rows = [0, 1, *BAD, *BAD, 5, 6]
    dataset = dataset_of(broken_folder, 48).select(rows)
    options = {**OPTIONS, "rows_per_shard": 2, "on_error": "skip", "max_skipped": 1.0}
    features = extract_features(model, dataset, tmp_path / "cache", **options)
    assert [shard.rows for shard in features.manifest.shards] == [2, 0, 0, 0, 0, 2]
    assert features.source_rows.tolist() == [0, 1, 10, 11]
    expected = extract_features(model, dataset.select([0, 1, 10, 11]), tmp_path / "good", **OPTIONS)
    torch.testing.assert_close(tokens_of(features), tokens_of(expected), rtol=1e-5, atol=1e-6)
    assert features.labels.tolist() == [0, 1, 2, 0]
    assert features[2]["layer_features"].equal(tokens_of(features)[2])
    again = LayerFeatures.open(tmp_path / "cache", verify=True)
    assert torch.equal(tokens_of(again), tokens_of(features))


def test_no_image_can_be_read(model, broken_folder, tmp_path):
    dataset = dataset_of(broken_folder, 48).select(list(BAD))
    with pytest.raises(LayerFusionError, match=r"none of the 4 images can be read; the first: row 0 \(.*003\.png\)"):
        extract_features(model, dataset, tmp_path / "cache", on_error="skip", max_skipped=1.0)


def test_too_many_broken_images_stop_it_and_a_larger_limit_goes_on(model, broken_folder, tmp_path, monkeypatch):
    dataset, folder = dataset_of(broken_folder, 48), tmp_path / "cache"
    options = {**OPTIONS, "on_error": "skip"}
    message = r"3 of 48 images cannot be read, more than max_skipped=5.0%; the first: row 3 \(.*003\.png\) is not a "
    with pytest.raises(LayerFusionError, match=message + r"readable image .* shards finished so far are kept"):
        extract_features(model, dataset, folder, max_skipped=0.05, **options)
    first = shard_path(folder, 0).stat().st_mtime_ns
    assert not shard_path(folder, 1).exists()
    with pytest.raises(LayerFusionError, match="3 of 48 images cannot be read"):
        extract_features(model, dataset, folder, max_skipped=0.05, **options)
    features = extract_features(model, dataset, folder, max_skipped=4 / 48, **options)
    assert shard_path(folder, 0).stat().st_mtime_ns == first
    assert [entry["row"] for entry in features.manifest.skipped] == list(BAD)
    extract_features(model, dataset, tmp_path / "at once", max_skipped=4 / 48, **options)
    assert contents(folder) == contents(tmp_path / "at once")
    # A finished cache is held to the limit as well.
    with pytest.raises(LayerFusionError, match=r"4 of 48 images cannot be read, more than max_skipped=5\.0%"):
        extract_features(model, dataset, folder, max_skipped=0.05, **options)


@pytest.mark.slow
def test_the_limit_holds_for_all_processes_together(processes, broken_folder, tmp_path):
    """Each of the two skips two images."""
    options = {"rows": 48, "on_error": "skip", "max_skipped": 3 / 48, "num_processes": 2}
    ranks = [
        processes.start(extract, broken_folder, tmp_path / "cache", process_index=index, **options)
        for index in range(2)
    ]
    # The first to know stops: with its last shard if it started late, else once all shards are there.
    wait_for(lambda: any(rank.exitcode is not None for rank in ranks))
    time.sleep(0.5)
    assert {rank.exitcode for rank in ranks} <= {1, None}
    for rank in ranks:
        rank.kill()
        rank.join()
    # Alone: whoever was killed may have left shards to be done.
    alone = {**options, "max_skipped": 4 / 48, "num_processes": 1}
    assert processes.run(extract, broken_folder, tmp_path / "cache", **alone) == 0


def test_by_default_one_in_a_hundred_may_be_broken(model, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 200)
    for row in (0, 99):
        (folder / f"{row:03d}.png").unlink()
    features = extract_features(model, dataset_of(folder), tmp_path / "cache", on_error="skip", progress=False)
    assert len(features) == 198
    (folder / "100.png").unlink()
    with pytest.raises(LayerFusionError, match=r"3 of 200 images cannot be read, more than max_skipped=1.0%"):
        extract_features(model, dataset_of(folder), tmp_path / "other", on_error="skip", progress=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_that_break_off_are_found_before_or_during_the_work(model, tmp_path, num_workers):
    """A JPEG has no checksums: the check before the work reads its header only."""
    folder = write_pictures(tmp_path / "pictures", 48)
    picture = PILImage.open(folder / "020.png")
    picture.save(folder / "020.png", format="JPEG")
    (folder / "020.png").write_bytes((folder / "020.png").read_bytes()[:-300])
    with pytest.raises(LayerFusionError, match=r"row 20 \(.*020\.png\) is not a readable image"):
        extract_features(model, dataset_of(folder, 48), tmp_path / "cache", num_workers=num_workers, **OPTIONS)
    assert [shard.index for shard in Manifest.load(tmp_path / "cache").shards] == [0]


def test_another_word_for_on_error(model, picture_folder, tmp_path):
    with pytest.raises(LayerFusionError, match="on_error='ignore': use 'raise' or 'skip'"):
        extract_features(model, dataset_of(picture_folder), tmp_path / "cache", on_error="ignore")
    assert not (tmp_path / "cache").exists()


# Ingredients


def relabelled(folder):
    return dataset_of(folder, 24).rename_column("label", "kind")


def renamed(folder):
    return dataset_of(folder, 24).rename_column("image", "photo")


def one_more(folder):
    return dataset_of(folder, 25)


def two_swapped(folder):
    return dataset_of(folder, 24).select([1, 0, *range(2, 24)])


INGREDIENTS = {
    "backbone weights": ({"model": lambda _: build_model(tiny_backbone(1))}, r"backbone.digest \w+ -> \w+"),
    "backbone shape": ({"model": lambda _: build_model(tiny_backbone(mlp_ratio=3))}, "backbone.digest"),
    "processor size": (
        {"image_processor": lambda _: tiny_processor(24)},
        r"processor.crop_size.height 16 -> 24; .*processor.size.shortest_edge 16 -> 24",
    ),
    "processor mean": (
        {"image_processor": lambda _: tiny_processor(image_mean=[0.5, 0.5, 0.5])},
        r"processor.image_mean \[0.48.*\] -> \[0.5, 0.5, 0.5\]",
    ),
    "layers of the bank": ({"model": lambda _: build_model(layers=[1, 3])}, "bank .* -> "),
    "pools of the bank": ({"model": lambda _: build_model(pools=["cls"])}, "bank .* -> "),
    "dtype": ({"dtype": lambda _: "float16"}, "dtype float32 -> float16"),
    "rows": ({"dataset": one_more}, r"dataset.fingerprint \w+ -> \w+; dataset.rows 24 -> 25"),
    "order of rows": ({"dataset": two_swapped}, r"dataset.fingerprint \w+ -> \w+\)"),
    "image column": (
        {"dataset": renamed, "image_column": lambda _: "photo"},
        "dataset.image_column image -> photo",
    ),
    "label column": (
        {"dataset": relabelled, "label_column": lambda _: "kind"},
        "dataset.label_column label -> kind",
    ),
    "no labels": ({"label_column": lambda _: None}, "dataset.label_column label -> None"),
    "backbone_kwargs": (
        {"interpolate_pos_encoding": lambda _: True},
        "backbone_kwargs.interpolate_pos_encoding absent -> True",
    ),
    "on_error": ({"on_error": lambda _: "skip"}, "on_error raise -> skip"),
}


@cache
def shared_model():
    return build_model()


def accept_interpolation(monkeypatch):
    """Dinov2 interpolates always and has no such argument; this one takes it."""
    forward = Dinov2Model.forward

    def accepting(self, pixel_values=None, interpolate_pos_encoding=False, **named):
        return forward(self, pixel_values, **named)

    monkeypatch.setattr(Dinov2Model, "forward", accepting)


@pytest.fixture
def cached(picture_folder, tmp_path):
    options = {"dtype": "float32", "rows_per_shard": 10, "progress": False}
    return extract_features(shared_model(), dataset_of(picture_folder, 24), tmp_path / "cache", **options)


@pytest.mark.parametrize(("changed", "named"), INGREDIENTS.values(), ids=INGREDIENTS)
def test_another_ingredient_is_refused_and_named(cached, picture_folder, tmp_path, monkeypatch, changed, named):
    accept_interpolation(monkeypatch)
    arguments = {"model": shared_model(), "dataset": dataset_of(picture_folder, 24), "dtype": "float32"}
    arguments |= {name: build(picture_folder) for name, build in changed.items()}
    before = contents(tmp_path / "cache")
    with pytest.raises(LayerFusionError, match=f"made from something else .*{named}.*overwrite=True"):
        extract_features(output_dir=tmp_path / "cache", progress=False, **arguments)
    assert contents(tmp_path / "cache") == before
    rebuilt = extract_features(output_dir=tmp_path / "cache", progress=False, overwrite=True, **arguments)
    assert len(rebuilt) == len(arguments["dataset"])
    assert contents(tmp_path / "cache") != before


@pytest.mark.parametrize("package", ["transformers", "torch", "PIL"])
def test_other_library_versions_are_refused_and_named(cached, picture_folder, tmp_path, monkeypatch, package):
    major, minor, patch = sys.modules[package].__version__.split(".", 2)
    name = {"PIL": "Pillow"}.get(package, package)
    arguments = (shared_model(), dataset_of(picture_folder, 24), tmp_path / "cache")
    monkeypatch.setattr(f"{package}.__version__", f"{major}.{int(minor) + 1}.{patch}")
    with pytest.raises(LayerFusionError, match=rf"versions.{name} {major}\.{minor} -> {major}\.{int(minor) + 1}\b"):
        extract_features(*arguments, dtype="float32", progress=False)
    monkeypatch.setattr(f"{package}.__version__", f"{major}.{minor}.999")
    extract_features(*arguments, dtype="float32", progress=False)


def test_nothing_changed(cached, picture_folder, tmp_path, monkeypatch):
    """Neither a forward with hidden states nor how the work is done is an ingredient, nor is the folder's own past."""
    model = build_model()
    model.backbone(torch.randn(1, 3, 16, 16), output_hidden_states=True)
    monkeypatch.setattr(type(model), "extract_layer_features", None)
    before = contents(tmp_path / "cache")
    options = {"dtype": "float32", "batch_size": 5, "rows_per_shard": 7, "num_workers": 2, "progress": True}
    again = extract_features(model, dataset_of(picture_folder, 24), tmp_path / "cache", **options)
    assert torch.equal(tokens_of(again), tokens_of(cached))
    assert contents(tmp_path / "cache") == before


def test_a_finished_cache_may_be_read_only(cached, picture_folder, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError("read-only")

    for name in ("mkdir", "replace", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    again = extract_features(shared_model(), dataset_of(picture_folder, 24), tmp_path / "cache", dtype="float32")
    assert torch.equal(tokens_of(again), tokens_of(cached))


def reuse(pictures, folder):
    extraction._extract = None
    extract_features(build_model(), dataset_of(pictures, 24), folder, dtype="float32", progress=False)


@pytest.mark.slow
def test_nothing_changed_in_a_new_process(cached, processes, picture_folder, tmp_path):
    before = contents(tmp_path / "cache")
    assert processes.run(reuse, picture_folder, tmp_path / "cache") == 0
    assert contents(tmp_path / "cache") == before


def test_replacing_a_cache_keeps_its_manifest_to_the_last(model, picture_folder, tmp_path, monkeypatch):
    """A kill on the way must not leave records that the next cache would take for its own."""
    folder, dataset = tmp_path / "cache", dataset_of(picture_folder, 48)
    unfinished(build_model(tiny_backbone(1)), dataset, folder)
    iterdir, unlink, removed = Path.iterdir, Path.unlink, []

    def manifest_first(path):
        return iter(sorted(iterdir(path), key=lambda file: file.name != "features.json"))

    def recorded(path, **named):
        removed.append(path.name)
        unlink(path, **named)

    monkeypatch.setattr(Path, "iterdir", manifest_first)
    monkeypatch.setattr(Path, "unlink", recorded)
    extract_features(model, dataset, folder, overwrite=True, **OPTIONS)
    shards = {f"features-{index:05d}.{suffix}" for index in range(2) for suffix in ("arrow", "json")}
    assert set(removed[:4]) == shards
    assert removed[4] == "features.json"


def test_records_of_another_cache_are_refused(model, picture_folder, tmp_path):
    folder, dataset = tmp_path / "cache", dataset_of(picture_folder, 48)
    unfinished(build_model(tiny_backbone(1)), dataset, folder)
    (folder / "features.json").unlink()
    with pytest.raises(
        LayerFusionError, match=r"features-00000\.json belongs to a cache without features\.json: delete"
    ):
        extract_features(model, dataset, folder, **OPTIONS)


def unfinished(model, dataset, folder, num_shards=2):
    """Extract some shards only."""
    write, calls = extraction._write_shard, []

    def stop(*arguments):
        if len(calls) == num_shards:
            raise KeyboardInterrupt
        calls.append(arguments)
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "_write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_features(model, dataset, folder, **OPTIONS)


# Memory


def measure_memory(folder, rows, connection):
    """Extract tokens of 8 kB a row from one picture; sends the megabytes that were added, and the peak."""
    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 1, "patch_size": 16}
    model = build_model(tiny_backbone(**shape), modules=["ln1", "attention", "ln2", "block"])
    options = {"rows_per_shard": 256, "batch_size": 64, "progress": False, "label_column": None}
    picture = folder / "picture.png"
    PILImage.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(picture)

    def repeated(rows):
        return Dataset.from_dict({"image": [str(picture)] * rows}, features=Features({"image": Image()}))

    extract_features(model, repeated(512), folder / "warm-up", **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features = extract_features(model, repeated(rows), folder / "cache", **options)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(shard.num_bytes for shard in features.manifest.shards)
    connection.send((size / 1e6, (after - before) / 1024, after / 1024))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(processes, tmp_path):
    def measure(name, rows):
        receiver, sender = processes.context.Pipe(duplex=False)
        (tmp_path / name).mkdir()
        assert processes.run(measure_memory, tmp_path / name, rows, sender) == 0
        return receiver.recv()

    def has_grown(size, growth, peak):
        # Sharper than what was asked: a tenth of the tokens.
        return peak >= 1.1 * small or growth - small_growth >= 0.1 * size

    _, small_growth, small = measure("small", 2_000)
    measured = [measure("large", 20_000)]
    assert measured[0][0] > 0.2 * small  # tokens that were kept would show
    # What is kept shows in both of two, what allocators do beside other jobs does not.
    if has_grown(*measured[0]):
        measured.append(measure("large again", 20_000))
    assert not has_grown(*measured[-1]), (small_growth, small, measured)


# Damage


def flip(folder):
    path = shard_path(folder, 1)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def truncate(folder):
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-8])


def swap(folder):
    first, second = shard_path(folder, 0).read_bytes(), shard_path(folder, 1).read_bytes()
    shard_path(folder, 0).write_bytes(second)
    shard_path(folder, 1).write_bytes(first)


def remove(folder):
    shard_path(folder, 1).unlink()


def replace(folder):
    shard_path(folder, 1).write_text("not Arrow at all")


def replace_by_noise(folder):
    """Of the same size, which is no Arrow file."""
    path = shard_path(folder, 1)
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def replace_by_another_type(folder):
    """The same shape and the same size, but integers."""
    path = shard_path(folder, 1)
    table = pa.ipc.open_stream(pa.BufferReader(path.read_bytes())).read_all()
    index = table.schema.get_field_index("layer_features")
    width = table.schema.field(index).type.list_size
    integers = pa.array(np.zeros(len(table) * width, dtype=np.int32))
    table = table.set_column(index, "layer_features", pa.FixedSizeListArray.from_arrays(integers, width))
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    missing = Manifest.load(folder).shards[1].num_bytes - path.stat().st_size
    with open(path, "ab") as file:  # what follows the end of a stream is not read
        file.write(bytes(missing))


def of_shard(text, number=1):
    return rf"shard \S*features-{number:05d}\.arrow .*{text}"


@pytest.fixture
def finished(model, picture_folder, tmp_path):
    """A cache of 48 rows, and the folder it is in."""
    folder = tmp_path / "cache"
    return extract_features(model, dataset_of(picture_folder, 48), folder, **OPTIONS), folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, of_shard(r"has \d+ bytes instead of \d+: it is truncated or was changed")),
        (remove, of_shard("is missing")),
        (replace, of_shard(r"has 16 bytes instead of \d+")),
    ],
)
def test_damage_that_shows_by_its_size(finished, model, picture_folder, damage, message):
    """It is named at once; and extraction, which holds what is missing, mends it."""
    features, folder = finished
    before = contents(folder)
    tokens = tokens_of(features).clone()
    times = {index: shard_path(folder, index).stat().st_mtime_ns for index in (0, 2)}
    damage(folder)
    with pytest.raises(LayerFusionError, match=message):
        LayerFeatures.open(folder)
    mended = extract_features(model, dataset_of(picture_folder, 48), folder, **OPTIONS)
    assert torch.equal(tokens_of(mended), tokens)
    assert contents(folder) == before
    assert times == {index: shard_path(folder, index).stat().st_mtime_ns for index in (0, 2)}


@pytest.mark.parametrize(
    ("damage", "number"), [(flip, 1), (swap, 0), (replace_by_noise, 1), (replace_by_another_type, 1)]
)
def test_damage_that_only_a_checksum_shows(finished, model, picture_folder, damage, number):
    _, folder = finished
    before = contents(folder)
    damage(folder)
    assert {name: len(data) for name, data in contents(folder).items()} == {
        name: len(data) for name, data in before.items()
    }
    message = of_shard("does not have the checksum .* Delete the file and run the same extraction again", number)
    with pytest.raises(LayerFusionError, match=message):
        LayerFeatures.open(folder, verify=True)
    # What the message says to do.
    while True:
        try:
            LayerFeatures.open(folder, verify=True)
            break
        except LayerFusionError as error:
            name = str(error).split("features-")[1].split(".arrow")[0]
            shard_path(folder, int(name)).unlink()
            extract_features(model, dataset_of(picture_folder, 48), folder, **OPTIONS)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", [replace_by_noise, replace_by_another_type])
def test_a_foreign_file_of_the_right_size_is_named_without_checksums(finished, damage):
    _, folder = finished
    damage(folder)
    with pytest.raises(LayerFusionError, match=of_shard("")):
        LayerFeatures.open(folder)


def test_two_processes_mend_a_cache(processes, picture_folder, uninterrupted, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, data in contents(uninterrupted).items():
        (folder / name).write_bytes(data)
    for index in (2, 3, 4, 5):
        shard_path(folder, index).write_bytes(b"")
    ranks = [
        processes.start(extract, picture_folder, folder, process_index=index, num_processes=2, pause=0.002)
        for index in range(2)
    ]
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert contents(folder) == contents(uninterrupted)


def test_a_process_that_sees_damage_keeps_what_others_finish_meanwhile(model, picture_folder, tmp_path):
    folder, dataset = tmp_path / "cache", dataset_of(picture_folder, 48)
    unfinished(model, dataset, folder, num_shards=1)
    seen = Manifest.load(folder)
    with open(shard_path(folder, 0), "ab") as file:
        file.write(b"more")
    whole = extract_features(model, dataset, tmp_path / "whole", **OPTIONS).manifest.shards[1]
    shard_path(folder, 1).write_bytes(shard_path(tmp_path / "whole", 1).read_bytes())
    Manifest.load(folder).add(folder, whole)
    assert [problem.count("features-00000.arrow has") for problem in seen.drop_damaged(folder)] == [1]
    assert 1 in [shard.index for shard in Manifest.load(folder).shards]


def test_a_damaged_record(model, picture_folder, tmp_path):
    folder, dataset = tmp_path / "cache", dataset_of(picture_folder, 48)
    unfinished(model, dataset, folder)
    record = folder / "features-00001.json"
    record.write_text(record.read_text()[:20])
    with pytest.raises(LayerFusionError, match=r"features-00001\.json is damaged"):
        LayerFeatures.open(folder)
