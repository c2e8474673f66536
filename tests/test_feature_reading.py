"""Ways to read a cache, and to carry it about: views, shuffling, devices, `datasets`, the Hub."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_from_disk
from modeling_helpers import tiny_backbone
from PIL import Image as PILImage
from transformers import Trainer, TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import LayerFeatures, LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.features import EpochViews
from hf_layerfusion.features import store as reading
from hf_layerfusion.images import augment_image
from hf_layerfusion.training import LayerFeatureCollator

ROWS = 20


@pytest.fixture(scope="module")
def model():
    return ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("vit"),
        id2label=["ant", "bee"],
        image_processor=ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    columns = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])})
    rows = [PILImage.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(ROWS)]
    return Dataset.from_dict({"image": rows, "label": [i % 2 for i in range(ROWS)]}, features=columns)


@pytest.fixture(scope="module")
def features(model, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return extract_features(model, pictures, folder, dtype="float32", rows_per_shard=3, batch_size=3, progress=False)


def tokens_of(features, **options):
    return torch.cat([batch["layer_features"] for batch in features.batches(4, **options)])


# ---- augmented views ---------------------------------------------------------------------------------------------


def test_views_are_augmented_seeded_and_keep_their_labels(model, pictures, features, tmp_path):
    options = {"views": 3, "dtype": "float32", "rows_per_shard": 7, "batch_size": 4, "progress": False}
    first = extract_features(model, pictures, tmp_path / "a", **options)
    again = extract_features(model, pictures, tmp_path / "b", **options)
    other = extract_features(model, pictures, tmp_path / "c", seed=1, **options)
    assert torch.equal(tokens_of(first), tokens_of(again))
    assert not torch.equal(tokens_of(first), tokens_of(other))
    assert (len(first), first.num_views) == (3 * ROWS, 3)
    assert first.source_rows.tolist() == [*range(ROWS)] * 3
    views = [tokens_of(first.view(number)) for number in range(3)]
    for i, view in enumerate(views):
        assert first.view(i).labels.tolist() == features.labels.tolist()
        assert all(not torch.equal(view, another) for another in views[i + 1 :])
    with pytest.raises(LayerFusionError, match="view 3 does not exist: this cache has views 0 to 2"):
        first.view(3)


def test_a_view_is_the_augmented_image(model, pictures, tmp_path):
    features = extract_features(model, pictures, tmp_path, views=2, seed=5, dtype="float32", progress=False)
    row = ROWS + 4
    picture = augment_image(pictures[4]["image"], np.random.default_rng([5, row]))
    live = model.extract_layer_features(model.image_processor(images=picture, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(features.view(1)[4]["layer_features"], live[0], rtol=1e-4, atol=1e-5)


def test_an_augmentation_of_one_s_own_is_an_ingredient(model, pictures, tmp_path):
    def mirror(image, generator):
        return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)

    features = extract_features(model, pictures, tmp_path, augment=mirror, dtype="float32", progress=False)
    picture = mirror(pictures[2]["image"], None)
    live = model.extract_layer_features(model.image_processor(images=picture, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(features[2]["layer_features"], live[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(LayerFusionError, match=r"made from something else .*augmentation"):
        extract_features(model, pictures, tmp_path, dtype="float32", progress=False)
    with pytest.raises(LayerFusionError, match="views=0: use 1 or more"):
        extract_features(model, pictures, tmp_path / "none", views=0)


def test_augmented_images_are_crops_of_the_original():
    picture = PILImage.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
    sizes, mirrored = set(), 0
    for seed in range(50):
        view = augment_image(picture, np.random.default_rng(seed))
        assert 0.45 * 60 * 80 <= view.width * view.height <= 60 * 80
        assert 0.7 <= view.width / view.height <= 1.4 or view.size == picture.size
        sizes.add(view.size)
        mirrored += np.asarray(view)[0, 0, 0] > np.asarray(view)[0, 1, 0]
    assert len(sizes) > 30
    assert 10 < mirrored < 40
    narrow = PILImage.new("RGB", (200, 2))
    assert augment_image(narrow, np.random.default_rng(0)).size == narrow.size  # no crop of it has a fit shape


def test_trainer_sees_one_view_per_epoch(model, pictures, tmp_path):
    features = extract_features(model, pictures, tmp_path / "cache", views=2, dtype="float32", progress=False)
    views = EpochViews(features)
    assert len(views) == ROWS
    seen = []
    collate = LayerFeatureCollator(len(model.config.bank))

    def note(rows):
        seen.extend(float(row["layer_features"].sum()) for row in rows)
        return collate(rows)

    args = TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=8, report_to="none", use_cpu=True
    )
    Trainer(model, args, train_dataset=views, data_collator=note).train()
    by_view = [sorted(tokens_of(features.view(number)).sum(dim=(1, 2)).tolist()) for number in range(2)]
    epochs = [sorted(seen[start : start + ROWS]) for start in range(0, 3 * ROWS, ROWS)]
    for epoch, view in enumerate([0, 1, 0]):
        assert epochs[epoch] == pytest.approx(by_view[view], rel=1e-4, abs=1e-3)


# ---- orders and devices ------------------------------------------------------------------------------------------


def test_chunk_order_shuffles_within_few_shards_at_a_time(features, monkeypatch):
    monkeypatch.setattr(reading, "CHUNKS_AT_ONCE", 2)
    order = features._chunk_order(np.random.default_rng(3))
    assert sorted(order.tolist()) == list(range(ROWS))
    shards = [[row // 3 for row in order[start : start + 6].tolist()] for start in range(0, 18, 6)]
    assert len({shard for group in shards for shard in group}) > 4
    assert sum(len(set(group)) <= 3 for group in shards) == len(shards)  # the last shard is shorter
    assert order.tolist() != sorted(order.tolist())
    one, same = (tokens_of(features, shuffle="chunks", seed=1) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, tokens_of(features, shuffle="chunks", seed=2))
    assert torch.equal(one.sum((1, 2)).sort().values, tokens_of(features).sum((1, 2)).sort().values)


def test_chunk_order_of_a_selection(features):
    some = features.select_rows([19, 3, 4, 11])
    labels = torch.cat([batch["labels"] for batch in some.batches(3, shuffle="chunks")])
    assert sorted(labels.tolist()) == sorted(some.labels.tolist())


def test_features_on_a_device_give_the_same_batches(features):
    # "meta" would hold no values, and there is no second real device here.
    moved = features.to("cpu").select(pools=["mean"]).select_rows(range(15))
    plain = features.select(pools=["mean"]).select_rows(range(15))
    for options in ({}, {"shuffle": True, "seed": 4}, {"shuffle": "chunks"}):
        assert torch.equal(tokens_of(moved, **options), tokens_of(plain, **options))
    batch = next(features.batches(4, shuffle=True, device="cpu"))
    assert {value.device.type for value in batch.values()} == {"cpu"}
    assert features.to("meta").select(pools=["cls"])._gather(np.array([3, 1])).device.type == "meta"


# ---- as a dataset ------------------------------------------------------------------------------------------------


def test_the_dataset_keeps_its_coordinates(features, tmp_path):
    dataset = features.dataset
    dataset.select([5, 2, 9]).save_to_disk(tmp_path / "saved")
    parts = dataset.train_test_split(test_size=6, seed=0)
    for view, rows in ((load_from_disk(str(tmp_path / "saved")), None), (parts["test"], None), (dataset, range(ROWS))):
        back = LayerFeatures.from_dataset(view)
        assert back.token_names == features.token_names
        assert len(back) == len(view)
        if rows is not None:
            assert torch.equal(tokens_of(back), tokens_of(features))
    back = LayerFeatures.from_dataset(load_from_disk(str(tmp_path / "saved")))
    assert torch.equal(tokens_of(back), tokens_of(features.select_rows([5, 2, 9])))
    assert back.labels.tolist() == features.labels[[5, 2, 9]].tolist()
    assert back.select(pools=["mean"])[1]["layer_features"].shape == (3, 32)


def test_a_dataset_that_lost_its_coordinates_needs_them_stated(features):
    bare = Dataset.from_dict(features.dataset.to_dict(), features=features.dataset.features)
    with pytest.raises(LayerFusionError, match="does not say which tokens it holds: pass the features it came from"):
        LayerFeatures.from_dataset(bare)
    assert torch.equal(tokens_of(LayerFeatures.from_dataset(bare, like=features)), tokens_of(features))
    with pytest.raises(LayerFusionError, match="no flat column 'layer_features'"):
        LayerFeatures.from_dataset(bare.remove_columns("layer_features"), like=features)
    with pytest.raises(LayerFusionError, match="no flat column 'layer_features' of a whole bank"):
        LayerFeatures.from_dataset(features.select(pools=["mean"]).dataset)


def test_to_the_hub_and_back(features, hub):
    address = features.push_to_hub("me/features")
    assert "me/features" in address
    back = LayerFeatures.open("me/features", verify=True)
    assert torch.equal(tokens_of(back), tokens_of(features))
    assert back.token_names == features.token_names
    assert back.fingerprint == json.loads(json.dumps(features.fingerprint))
    with pytest.raises(LayerFusionError, match="only a whole cache can be pushed"):
        features.select(pools=["mean"]).push_to_hub("me/part")
    with pytest.raises(LayerFusionError, match="'me/nothing' is neither a folder nor a dataset on the Hub"):
        LayerFeatures.open("me/nothing")


def test_autocast_is_used_and_named(model, pictures, tmp_path, features):
    lower = extract_features(
        model, pictures, tmp_path / "bf16", autocast="bfloat16", dtype="float32", batch_size=3, progress=False
    )
    difference = (tokens_of(lower) - tokens_of(features)).abs().max()
    assert 1e-4 < difference < 0.5
    with pytest.raises(LayerFusionError, match=r"autocast bfloat16 -> None"):
        extract_features(model, pictures, tmp_path / "bf16", dtype="float32", progress=False)
    with pytest.raises(LayerFusionError, match="autocast='int8': use 'bfloat16', 'float16' or None"):
        extract_features(model, pictures, tmp_path / "int8", autocast="int8")


@pytest.mark.slow
def test_a_compiled_backbone_hands_its_taps_over_too(pictures, features, tmp_path):
    compiled = ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("vit"),
        id2label=["ant", "bee"],
        image_processor=ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"batch_size": 10, "dtype": "float32", "progress": False}
    found = extract_features(compiled, pictures, tmp_path, torch_compile=True, **options)
    torch.testing.assert_close(tokens_of(found), tokens_of(features), rtol=1e-4, atol=1e-4)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] == 1  # one graph for both batches
    assert not torch._dynamo.utils.counters["graph_break"]
    with pytest.raises(LayerFusionError, match="torch_compile True -> False"):
        extract_features(compiled, pictures, tmp_path, **options)
