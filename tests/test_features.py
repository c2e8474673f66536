"""The feature cache: what is written, what is reused, what is refused, and how it is read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_layerfusion import LayerFeatures, LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.features import extract as extraction

ROWS, CLASSES = 23, 3


def pictures(rows=ROWS, seed=0):
    """Pictures of different sizes and modes."""
    generator = np.random.default_rng(seed)
    modes = ("RGB", "L", "RGBA", "P")
    for row in range(rows):
        shape = (20 + row % 5, 30 - row % 7, 3)
        yield PILImage.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).convert(modes[row % 4])


def picture_dataset(rows=ROWS, seed=0):
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    labels = [row % CLASSES for row in range(rows)]
    return Dataset.from_dict({"image": list(pictures(rows, seed)), "label": labels}, features=features)


def tiny_backbone(seed=0):
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8, mlp_ratio=2
    )
    return Dinov2Model(config)


def tiny_processor(size=16):
    return BitImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def build_model(backbone=None, processor=None, **overrides):
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        backbone or tiny_backbone(),
        image_processor=processor or tiny_processor(),
        **{"id2label": ["ant", "bee", "cat"], **overrides},
    )


@pytest.fixture(scope="module")
def dataset():
    return picture_dataset()


@pytest.fixture(scope="module")
def model():
    return build_model(modules=["block", "ln2", "final_norm"])


@pytest.fixture
def features(model, dataset, tmp_path):
    return extract_features(model, dataset, tmp_path / "cache", batch_size=4, rows_per_shard=10, dtype="float32")


def all_tokens(features):
    return torch.cat([batch["layer_features"] for batch in features.batches(7)])


def test_cached_tokens_are_the_live_tokens(model, dataset, features):
    for row in (0, 5, ROWS - 1):
        picture = dataset[row]["image"].convert("RGB")
        pixel_values = model.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        live = model.extract_layer_features(pixel_values)[0]
        torch.testing.assert_close(features[row]["layer_features"], live, rtol=1e-5, atol=1e-5)
        assert features[row]["labels"] == row % CLASSES


def test_float16_keeps_the_logits(model, dataset, tmp_path, features):
    half = extract_features(model, dataset, tmp_path / "half", dtype="float16")
    assert half[0]["layer_features"].dtype == torch.float16
    with torch.no_grad():
        wide, narrow = (model(layer_features=all_tokens(cache)).logits for cache in (features, half))
    torch.testing.assert_close(narrow, wide, rtol=0, atol=2e-3)


def test_files_and_manifest(features, tmp_path, model):
    folder = tmp_path / "cache"
    assert sorted(file.name for file in folder.iterdir()) == [
        "features-00000.arrow",
        "features-00001.arrow",
        "features-00002.arrow",
        "features.json",
    ]
    manifest = json.loads((folder / "features.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 10, 3]
    assert manifest["bank"] == model.config.bank.to_list()
    assert manifest["label_names"] == ["ant", "bee", "cat"]
    assert manifest["ingredients"]["processor"]["size"] == {"shortest_edge": 16}
    assert manifest["ingredients"]["backbone"]["digest"] == model.config.backbone_fingerprint["digest"]


def test_second_run_reuses_without_a_forward(model, dataset, features, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the backbone was run again")

    monkeypatch.setattr(type(model), "extract_layer_features", refuse)
    again = extract_features(model, dataset, tmp_path / "cache", dtype="float32", batch_size=9)
    assert torch.equal(all_tokens(again), all_tokens(features))


def test_reused_after_a_forward_with_hidden_states(model, dataset, features, tmp_path, monkeypatch):
    model.backbone(torch.randn(1, 3, 16, 16), output_hidden_states=True)
    monkeypatch.setattr(extraction, "_write_shard", None)
    assert len(extract_features(model, dataset, tmp_path / "cache", dtype="float32")) == ROWS


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": lambda: build_model(tiny_backbone(seed=1), modules=["block", "ln2", "final_norm"])}, "backbone"),
        ({"model": lambda: build_model(modules=["block"])}, "bank"),
        (
            {"model": lambda: build_model(processor=tiny_processor(24), modules=["block", "ln2", "final_norm"])},
            r"processor.crop_size.height 16 -> 24",
        ),
        ({"dataset": lambda: picture_dataset(seed=1)}, "dataset.fingerprint"),
        ({"dtype": lambda: "float16"}, "dtype float32 -> float16"),
        ({"label_column": lambda: None}, "dataset.label_column label -> None"),
    ],
    ids=["backbone", "bank", "processor", "dataset", "dtype", "labels"],
)
def test_any_other_ingredient_is_refused_and_named(model, dataset, features, tmp_path, changed, named):
    arguments = {"model": model, "dataset": dataset, "dtype": "float32"}
    arguments |= {key: value() for key, value in changed.items()}
    with pytest.raises(LayerFusionError, match=f"made from something else .*{named}"):
        extract_features(output_dir=tmp_path / "cache", **arguments)
    assert torch.equal(all_tokens(LayerFeatures.open(tmp_path / "cache")), all_tokens(features))
    replaced = extract_features(output_dir=tmp_path / "cache", overwrite=True, **arguments)
    assert len(replaced) == ROWS
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_extraction_goes_on_after_the_last_whole_shard(model, dataset, features, tmp_path, monkeypatch):
    folder = tmp_path / "interrupted"
    write, calls = extraction._write_shard, []

    def die_in_second_shard(*args):
        if calls:
            raise RuntimeError("killed")
        calls.append(args)
        return write(*args)

    monkeypatch.setattr(extraction, "_write_shard", die_in_second_shard)
    arguments = {"batch_size": 4, "rows_per_shard": 10, "dtype": "float32"}
    with pytest.raises(RuntimeError, match="killed"):
        extract_features(model, dataset, folder, **arguments)
    monkeypatch.setattr(extraction, "_write_shard", write)
    with pytest.raises(LayerFusionError, match="unfinished: 10 of 23 rows"):
        LayerFeatures.open(folder)
    first = (folder / "features-00000.arrow").stat().st_mtime_ns
    resumed = extract_features(model, dataset, folder, **arguments)
    assert (folder / "features-00000.arrow").stat().st_mtime_ns == first
    assert torch.equal(all_tokens(resumed), all_tokens(features))
    assert resumed.labels.tolist() == [row % CLASSES for row in range(ROWS)]


def test_worker_processes_give_the_same_tokens(model, dataset, features, tmp_path):
    arguments = {"batch_size": 4, "rows_per_shard": 10, "dtype": "float32"}
    workers = extract_features(model, dataset, tmp_path / "w", num_workers=2, **arguments)
    assert torch.equal(all_tokens(workers), all_tokens(features))


def test_select_by_coordinate(features, model):
    few = features.select(layers=[2, 3], modules=["ln2"], pools=["mean"])
    assert few.token_names == ["layer 2 · ln2 · mean", "layer 3 · ln2 · mean"]
    names = model.config.token_names
    columns = [names.index(name) for name in few.token_names]
    assert torch.equal(all_tokens(few), all_tokens(features)[:, columns])
    assert torch.equal(few[4]["layer_features"], features[4]["layer_features"][columns])
    shuffled = next(few.batches(5, shuffle=True, seed=3))["layer_features"]
    assert torch.equal(shuffled, next(features.batches(5, shuffle=True, seed=3))["layer_features"][:, columns])
    with pytest.raises(LayerFusionError, match="no token of the bank has layer 9"):
        features.select(layers=[9])


def test_one_extraction_serves_another_recipe(features, model):
    other = build_model(model.backbone, recipe="linear-last")
    served = features.select_bank(other.config.bank)
    assert served.token_names == ["layer 3 · final_norm · cls"]
    pixel_values = torch.randn(2, 3, 16, 16)
    live = model.extract_layer_features(pixel_values, bank=other.config.bank)
    assert torch.equal(live, other.extract_layer_features(pixel_values))
    with pytest.raises(LayerFusionError, match="lacks layer 1 · block · cls"):
        served.select_bank(build_model(model.backbone, layers=[1]).config.bank)


def test_batches_cover_every_row_once(features):
    plain = [batch["labels"] for batch in features.batches(4)]
    assert [len(labels) for labels in plain] == [4, 4, 4, 4, 4, 3]
    assert torch.cat(plain).tolist() == features.labels.tolist()
    one, same, other = (
        torch.cat([batch["layer_features"] for batch in features.batches(4, shuffle=True, seed=seed)])
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(one.flatten(1).sum(1).sort().values, all_tokens(features).flatten(1).sum(1).sort().values)
    assert sum(1 for _ in features.batches(4, drop_last=True)) == 5


def test_unshuffled_batches_are_views_of_the_file(features):
    batch = next(features.batches(4))["layer_features"]
    chunk = features._chunks[0]
    assert batch.untyped_storage().data_ptr() == chunk.untyped_storage().data_ptr()


def test_rows_can_be_chosen_and_split(features):
    reordered = features.select_rows([20, 3, 11])
    assert reordered.labels.tolist() == [20 % 3, 0, 11 % 3]
    assert torch.equal(reordered[0]["layer_features"], features[20]["layer_features"])
    assert torch.equal(next(reordered.batches(3))["layer_features"][2], features[11]["layer_features"])
    train, test = features.train_test_split(test_size=6, seed=1)
    assert (len(train), len(test)) == (17, 6)
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert not set(train._rows) & set(test._rows)
    with pytest.raises(LayerFusionError, match="3 rows cannot be split"):
        reordered.train_test_split(test_size=1)


def test_it_is_a_map_style_dataset(features):
    loader = DataLoader(features, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert sum(len(batch["labels"]) for batch in batches) == ROWS
    assert batches[0]["layer_features"].shape == (6, len(features.bank), 16)


def test_dataset_is_an_ordinary_dataset(features):
    dataset = features.dataset
    assert isinstance(dataset, Dataset)
    assert dataset.features["label"].names == ["ant", "bee", "cat"]
    row = torch.tensor(dataset[2]["layer_features"]).view(len(features.bank), 16)
    assert torch.equal(row, features[2]["layer_features"])
    selected = features.select(pools=["cls"]).select_rows([5, 6])
    assert torch.equal(selected.dataset[1]["layer_features"], selected[1]["layer_features"])


def test_a_truncated_or_changed_shard_is_found(features, tmp_path):
    shard = tmp_path / "cache" / "features-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(LayerFusionError, match=r"features-00001.arrow has \d+ bytes instead of \d+: it is truncated"):
        LayerFeatures.open(tmp_path / "cache")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(LayerFusionError, match=r"features-00001.arrow does not have the checksum"):
        LayerFeatures.open(tmp_path / "cache", verify=True)
    shard.unlink()
    with pytest.raises(LayerFusionError, match=r"features-00001.arrow .* is missing"):
        LayerFeatures.open(tmp_path / "cache")


def test_a_damaged_manifest_or_a_foreign_folder(features, tmp_path, model, dataset):
    manifest = tmp_path / "cache" / "features.json"
    text = manifest.read_text()
    manifest.write_text(text[:100])
    with pytest.raises(LayerFusionError, match=r"features\.json is damaged"):
        LayerFeatures.open(tmp_path / "cache")
    manifest.write_text(text.replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(LayerFusionError, match="has format 99"):
        LayerFeatures.open(tmp_path / "cache")
    for index in ("7", "1", '"../0"'):
        manifest.write_text(text.replace('"index": 0', f'"index": {index}'))
        with pytest.raises(LayerFusionError, match=r"features\.json is damaged"):
            LayerFeatures.open(tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(LayerFusionError, match="is not empty and holds no feature cache"):
        extract_features(model, dataset, tmp_path / "mine")
    with pytest.raises(LayerFusionError, match=r"holds no features\.json"):
        LayerFeatures.open(tmp_path / "mine")


def bad_labels(labels, feature):
    rows = len(labels)
    return Dataset.from_dict(
        {"image": list(pictures(rows)), "label": labels}, features=Features({"image": Image(), "label": feature})
    )


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (picture_dataset, {"image_column": "img"}, r"image_column='img' is not in the dataset: .*'image', 'label'"),
        (picture_dataset, {"image_column": "label"}, "image_column='label'"),
        (picture_dataset, {"label_column": "y"}, r"label_column='y' is not in the dataset"),
        (picture_dataset, {"dtype": "int8"}, r"dtype 'int8' cannot be stored"),
        (lambda: picture_dataset().select([]), {}, "the dataset is empty"),
        (lambda: bad_labels([0, 1, 7], Value("int64")), {}, "row 2 has label 7, but the head has num_labels=3"),
        (lambda: bad_labels([0, -1], Value("int64")), {}, "row 1 has label -1"),
        (lambda: bad_labels([0, 1], ClassLabel(names=["a", "b"])), {}, "2 classes, but the head has num_labels=3"),
        (lambda: bad_labels(["a", "b"], Value("string")), {}, r"class_encode_column\('label'\)"),
        (lambda: bad_labels([[1.0, 0.0]], List(Value("float32"))), {}, "rows have 2 labels, but .* num_labels=3"),
    ],
)
def test_bad_requests_fail_before_anything_is_written(model, tmp_path, build, arguments, message):
    with pytest.raises(LayerFusionError, match=message):
        extract_features(model, build(), tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_a_whole_dataset_dict_is_not_one_split(model, tmp_path):
    with pytest.raises(LayerFusionError, match=r"not a DatasetDict: choose a split"):
        extract_features(model, DatasetDict({"train": picture_dataset()}), tmp_path / "cache")


def test_a_processor_that_leaves_sizes_apart(tmp_path, dataset):
    processor = BitImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    with pytest.raises(LayerFusionError, match=r"leaves pictures at different sizes .*do_center_crop=True"):
        extract_features(build_model(processor=processor), dataset, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_corrupt_image_is_named_before_the_backbone_runs(model, tmp_path, monkeypatch):
    files = []
    for row, picture in enumerate(pictures(6)):
        files.append(str(tmp_path / f"{row}.png"))
        picture.save(files[-1])
    broken = Path(files[4])
    broken.write_bytes(broken.read_bytes()[:60])
    monkeypatch.setattr(type(model), "extract_layer_features", None)
    dataset = Dataset.from_dict({"image": files, "label": [0] * 6}).cast_column("image", Image())
    with pytest.raises(LayerFusionError, match=r"row 4 .*4\.png"):
        extract_features(model, dataset, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_features_that_are_not_finite_name_row_token_and_cure(dataset, tmp_path):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.layernorm.bias[0] = 1e6
    model = build_model(backbone, modules=["block", "final_norm"])
    with pytest.raises(LayerFusionError, match=r"row 0 .* layer 3 · final_norm · cls; they do not fit float16: .*32"):
        extract_features(model, dataset, tmp_path / "a")
    extract_features(model, dataset, tmp_path / "b", dtype="float32").check(CLASSES)
    with torch.no_grad():
        backbone.layernorm.bias[0] = float("nan")
    with pytest.raises(LayerFusionError, match="the backbone itself computes them"):
        extract_features(model, dataset, tmp_path / "c", dtype="float32")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["b"]


def test_check_finds_bad_rows_of_a_cache(features):
    features._chunks = [chunk.clone() for chunk in features._chunks]
    features._chunks[1][2, 4, 0] = float("inf")
    with pytest.raises(LayerFusionError, match=r"row 12 of the features holds NaN .* \(layer 2 · block · cls"):
        features.check()
    features._chunks[1][2, 4, 0] = 0
    with pytest.raises(LayerFusionError, match="row 2 has label 2, but there are 2 labels"):
        features.check(num_labels=2)


def test_multi_label_and_regression_labels(tmp_path):
    rows = bad_labels([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], List(Value("float32")))
    multi = build_model(problem_type="multi_label_classification")
    features = extract_features(multi, rows, tmp_path / "multi")
    assert next(features.batches(2))["labels"].tolist() == [[1, 0, 1], [0, 0, 1]]
    regression = build_model(problem_type="regression", id2label=None, num_labels=1)
    features = extract_features(regression, bad_labels([3, 5], Value("int64")), tmp_path / "regression")
    assert features.labels.dtype == np.float32
    assert features.labels.tolist() == [3.0, 5.0]


def test_no_labels(model, dataset, tmp_path):
    features = extract_features(model, dataset, tmp_path / "cache", label_column=None)
    assert features.labels is None
    assert set(features[0]) == {"layer_features"}
