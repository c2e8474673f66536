"""Extraction from streams: WebDataset archives through `datasets`, and any other `IterableDataset`."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from modeling_helpers import tiny_backbone
from PIL import Image as PILImage
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features

ROWS = 22
OPTIONS = {"dtype": "float32", "rows_per_shard": 6, "batch_size": 4, "progress": False}
STREAM = {"num_rows": ROWS, "fingerprint": "pictures, version 1", **OPTIONS}


@pytest.fixture(scope="module")
def model():
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("vit"),
        id2label=["ant", "bee", "cat"],
        image_processor=ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    columns = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    rows = [PILImage.fromarray(rng.integers(0, 255, (20 + i, 36, 3), dtype=np.uint8)) for i in range(ROWS)]
    return Dataset.from_dict({"image": rows, "label": [i % 3 for i in range(ROWS)]}, features=columns)


@pytest.fixture(scope="module")
def table(model, pictures, tmp_path_factory):
    return extract_features(model, pictures, tmp_path_factory.mktemp("table"), **OPTIONS)


def shard_bytes(features):
    return [(features.folder / shard.file).read_bytes() for shard in features.manifest.shards]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_what_a_table_gives(model, pictures, table, tmp_path, num_workers):
    stream = pictures.to_iterable_dataset(num_shards=4)
    streamed = extract_features(model, stream, tmp_path, num_workers=num_workers, **STREAM)
    assert shard_bytes(streamed) == shard_bytes(table)
    assert streamed.labels.tolist() == table.labels.tolist()
    assert streamed.label_names == ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def archives(pictures, tmp_path_factory):
    """Two WebDataset archives."""
    folder = tmp_path_factory.mktemp("archives")
    for part, rows in enumerate((range(12), range(12, ROWS))):
        with tarfile.open(folder / f"part-{part}.tar", "w") as archive:
            for row in rows:
                picture = io.BytesIO()
                pictures[row]["image"].save(picture, "png")
                for name, data in (("png", picture.getvalue()), ("cls", str(row % 3).encode())):
                    entry = tarfile.TarInfo(f"{row:04d}.{name}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return [str(folder / f"part-{part}.tar") for part in range(2)]


def test_webdataset_archives(model, archives, table, tmp_path):
    stream = load_dataset("webdataset", data_files={"train": archives}, split="train", streaming=True)
    streamed = extract_features(model, stream, tmp_path, image_column="png", label_column="cls", **STREAM)
    torch.testing.assert_close(streamed.tensors()["layer_features"], table.tensors()["layer_features"])
    assert streamed.labels.tolist() == table.labels.tolist()


def test_a_stream_is_resumed_and_shared(model, pictures, table, tmp_path, monkeypatch):
    stream = pictures.to_iterable_dataset()
    read, seen = ViTForAttentiveLayerFusionClassification.extract_layer_features, []

    def die(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 4:
            raise RuntimeError("killed")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(ViTForAttentiveLayerFusionClassification, "extract_layer_features", die)
    with pytest.raises(RuntimeError, match="killed"):
        extract_features(model, stream, tmp_path, **STREAM)
    assert len(list(tmp_path.glob("features-*.arrow"))) == 1
    resumed = extract_features(model, stream, tmp_path, **STREAM)
    assert len(seen) == 4 + 5  # the three shards that were missing: two batches each, and one in the last
    assert shard_bytes(resumed) == shard_bytes(table)


def test_a_corrupt_image_of_a_stream_is_skipped(model, pictures, table, tmp_path):
    rows = list(pictures.cast_column("image", Image(decode=False)))
    rows[7]["image"] = {"bytes": rows[7]["image"]["bytes"][:40], "path": None}
    stream = Dataset.from_list(rows).cast_column("image", Image()).to_iterable_dataset()
    with pytest.raises(LayerFusionError, match="row 7 is not a readable image"):
        extract_features(model, stream, tmp_path / "raise", **STREAM)
    features = extract_features(model, stream, tmp_path / "skip", on_error="skip", max_skipped=0.1, **STREAM)
    assert [entry["row"] for entry in features.manifest.skipped] == [7]
    assert features.source_rows.tolist() == [row for row in range(ROWS) if row != 7]
    assert features.labels.tolist() == [row % 3 for row in range(ROWS) if row != 7]
    torch.testing.assert_close(features[7]["layer_features"], table[8]["layer_features"], rtol=1e-4, atol=1e-5)


def test_a_whole_shard_that_cannot_be_read(model, pictures, tmp_path):
    rows = list(pictures.cast_column("image", Image(decode=False)))
    for row in range(6, 12):
        rows[row]["image"] = {"bytes": b"no picture", "path": f"{row}.png"}
    stream = Dataset.from_list(rows).cast_column("image", Image()).to_iterable_dataset()
    features = extract_features(model, stream, tmp_path, on_error="skip", max_skipped=0.5, num_workers=2, **STREAM)
    assert [shard.rows for shard in features.manifest.shards] == [6, 0, 6, 4]
    assert features.labels.tolist() == [row % 3 for row in range(ROWS) if not 6 <= row < 12]
    assert features.manifest.skipped[2]["path"] == "8.png"
    assert "row 8 (8.png) is not a readable image" in features.manifest.skipped[2]["reason"]


REFUSED = {
    "no length": ({"num_rows": None}, "a stream knows neither its length nor its version: pass num_rows="),
    "no name": ({"fingerprint": None}, "and fingerprint="),
    "column": ({"image_column": "img"}, "column 'img' is not in the stream: it has"),
    "too long": ({"num_rows": ROWS + 1}, f"the stream ended before row {ROWS}, but num_rows={ROWS + 1}"),
    "views": ({"views": 2}, "a stream is read once: several views need a datasets.Dataset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stream_cannot_do_is_said(model, pictures, tmp_path, case):
    options, message = REFUSED[case]
    with pytest.raises(LayerFusionError, match=message):
        extract_features(model, pictures.to_iterable_dataset(), tmp_path, **STREAM | options)


def test_a_label_out_of_range_is_named(model, pictures, tmp_path):
    rows = [{"image": row["image"], "label": 7 if i == 9 else 0} for i, row in enumerate(pictures)]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(LayerFusionError, match="row 9 has label 7, but the head has num_labels=3"):
        extract_features(model, stream, tmp_path, **STREAM)


def test_another_version_of_the_data_is_another_cache(model, pictures, tmp_path):
    stream = pictures.to_iterable_dataset()
    extract_features(model, stream, tmp_path, **STREAM)
    changed = "dataset.fingerprint pictures, version 1 -> pictures, version 2"
    with pytest.raises(LayerFusionError, match=changed):
        extract_features(model, stream, tmp_path, **STREAM | {"fingerprint": "pictures, version 2"})
    assert json.loads((tmp_path / "features.json").read_text())["num_rows"] == ROWS
