"""Rows of every kind of dataset become batches; rows that cannot are named."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import LayerFusionError
from hf_layerfusion.training import ImageCollator, LayerFeatureCollator

TOKENS = torch.arange(4 * 3 * 5, dtype=torch.float32).view(4, 3, 5)  # B, N, D
SIZES = [(20, 16), (16, 31), (40, 40)]
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


def _rows(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _pictures():
    rng = np.random.default_rng(0)
    return [PILImage.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_feature_tensors_keep_their_dtype(dtype, flat):
    tokens = TOKENS.to(dtype)
    batch = LayerFeatureCollator(3, 4)(_rows(layer_features=tokens.flatten(1) if flat else tokens, labels=range(4)))
    assert set(batch) == {"layer_features", "labels"}
    assert batch["layer_features"].dtype == dtype
    assert torch.equal(batch["layer_features"], tokens)
    assert torch.equal(batch["labels"], torch.arange(4))
    assert batch["labels"].dtype == torch.int64


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("format_", [None, "numpy", "torch"])
def test_rows_of_a_datasets_dataset(dtype, format_):
    """Flat fixed-size lists, as the feature cache stores them."""
    features = Features({"layer_features": List(Value(dtype), length=15), "label": ClassLabel(names=list("abcd"))})
    columns = {"layer_features": TOKENS.flatten(1).numpy().astype(dtype), "label": [3, 0, 1, 2]}
    dataset = Dataset.from_dict(columns, features=features).with_format(format_)
    batch = LayerFeatureCollator(3, 4)([dataset[i] for i in range(4)])
    assert torch.equal(batch["layer_features"].float(), TOKENS)
    assert batch["labels"].tolist() == [3, 0, 1, 2]


@pytest.mark.filterwarnings("error")
def test_read_only_arrays():
    tokens = TOKENS.numpy().copy()
    tokens.flags.writeable = False
    batch = LayerFeatureCollator(3)(_rows(layer_features=tokens))
    assert torch.equal(batch["layer_features"], TOKENS)
    assert set(batch) == {"layer_features"}


@pytest.mark.parametrize("column", ["labels", "label", "label_ids"])
@pytest.mark.parametrize(
    ("labels", "num_labels", "expected"),
    [
        ([0, 1, 2, -100], 3, torch.tensor([0, 1, 2, -100])),
        ([0, 1, 2, 9], None, torch.tensor([0, 1, 2, 9])),
        ([torch.tensor(1)] * 4, 3, torch.tensor([1, 1, 1, 1])),
        ([np.int64(1)] * 4, 3, torch.tensor([1, 1, 1, 1])),
        ([0.5, -2.0, 7.0, 1.0], 1, torch.tensor([0.5, -2.0, 7.0, 1.0])),
        ([3, 40, -7, 0], 1, torch.tensor([3, 40, -7, 0])),
        ([[0, 1, 1]] * 4, 3, torch.tensor([[0.0, 1.0, 1.0]] * 4)),
        ([np.array([0.0, 1.5])] * 4, 2, torch.tensor([[0.0, 1.5]] * 4)),
    ],
)
def test_labels(column, labels, num_labels, expected):
    batch = LayerFeatureCollator(3, num_labels)(_rows(layer_features=TOKENS, **{column: labels}))
    assert batch["labels"].dtype == expected.dtype
    assert torch.equal(batch["labels"], expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_rows(layer_features=TOKENS, labels=[0, 1, 2, 3]), "label 3 is out of range: this head has 3 labels, 0 to 2"),
        (_rows(layer_features=TOKENS, label=[0, -1, 2, 1]), "label -1 is out of range"),
        (_rows(layer_features=TOKENS, label=[0, 1, None, 1]), "row 2 of the batch has no 'label'"),
        (_rows(layer_features=TOKENS, labels=[[0, 1]] * 4), "rows have 2 labels, but the head has num_labels=3"),
        (_rows(features=TOKENS, labels=range(4)), r"no column 'layer_features', only \['features', 'labels'\]"),
        (_rows(layer_features=TOKENS[:, :2]), r"shape \(2, 5\), which are not 3 tokens: select .*select_bank"),
        (_rows(layer_features=torch.zeros(4, 16)), r"shape \(16,\), which are not 3 tokens"),
        (_rows(layer_features=torch.zeros(4, 1, 3, 5)), r"shape \(1, 3, 5\), which are not 3 tokens"),
        (
            _rows(layer_features=[torch.zeros(3, 5), torch.zeros(3, 6)]),
            r"shapes \[\(3, 5\), \(3, 6\)\]: extract them with one backbone",
        ),
    ],
)
def test_bad_feature_rows(rows, message):
    with pytest.raises(LayerFusionError, match=message):
        LayerFeatureCollator(3, 3)(rows)


def test_images_of_different_sizes_and_kinds(tmp_path):
    pictures = _pictures()
    pictures[1].save(tmp_path / "1.png")
    values = [pictures[0], str(tmp_path / "1.png"), {"bytes": None, "path": str(tmp_path / "1.png")}]
    batch = ImageCollator(PROCESSOR, num_labels=2)(_rows(image=values, label=[0, 1, 1]))
    expected = PROCESSOR(images=[pictures[0], pictures[1], pictures[1]], return_tensors="pt")["pixel_values"]
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("decode", [True, False])
def test_images_of_a_datasets_dataset(decode):
    features = Features({"photo": Image(decode=decode), "kind": ClassLabel(names=["a", "b"])})
    dataset = Dataset.from_dict({"photo": _pictures(), "kind": [1, 0, 1]}, features=features)
    batch = ImageCollator(PROCESSOR, "photo", "kind", 2)([dataset[i] for i in range(3)])
    assert torch.equal(batch["pixel_values"], PROCESSOR(images=_pictures(), return_tensors="pt")["pixel_values"])
    assert batch["labels"].tolist() == [1, 0, 1]


def test_images_without_labels():
    assert set(ImageCollator(PROCESSOR)(_rows(image=_pictures()))) == {"pixel_values"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_rows(label=[0, 1]), r"no image column 'image', only \['label'\].*image_column.*remove_unused_columns=False"),
        (_rows(image=_pictures(), label=[0, 1, 2]), "label 2 is out of range: this head has 2 labels"),
        (
            _rows(image=[_pictures()[0], {"bytes": b"broken", "path": "cats/9.png"}], label=[0, 1]),
            r"^image 1 of the batch \(cats/9.png\) is not a readable image",
        ),
        (_rows(image=[b"broken"], label=[0]), "^image 0 of the batch is not a readable image"),
    ],
)
def test_bad_image_rows(rows, message):
    with pytest.raises(LayerFusionError, match=message):
        ImageCollator(PROCESSOR, num_labels=2)(rows)


def test_processors_must_give_one_size():
    collate = ImageCollator(ViTImageProcessorPil(do_resize=False))
    with pytest.raises(
        LayerFusionError, match=r"pictures at different sizes \(\[\(3, 16, 31\), .*do_center_crop=True"
    ):
        collate(_rows(image=_pictures()))


def test_a_missing_processor_is_refused_at_once():
    with pytest.raises(LayerFusionError, match="needs an image processor"):
        ImageCollator(None)
