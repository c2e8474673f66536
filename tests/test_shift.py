"""Shift estimates on tokens whose geometry is known, and the taps that are recommended."""

import itertools
import json

import numpy as np
import pytest
import torch
from sweep_helpers import LAYERS, WIDTH, write_features

from hf_layerfusion import LayerFusionError
from hf_layerfusion.analysis import estimate_shift, recommend_taps
from hf_layerfusion.analysis.shift import _effective_rank, _kernel_distance
from hf_layerfusion.layout import TapLayout, TokenLayout

ROWS = 80
BANK = [[layer, "block", "mean"] for layer in (1, 3, LAYERS)]
OPTIONS = {"subset_size": 60, "num_subsets": 3}


def rotation(rng):
    return np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]


def write(folder, last, seed=0, bank=BANK, rows=ROWS):
    """Layers 1 and 3 are rotations of each other; the last is what a function makes of layer 3."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(rows, WIDTH))
    middle = first @ rotation(rng)
    tokens = torch.from_numpy(np.stack([first, middle, last(middle, rng)], axis=1)).float()
    return write_features(folder, tokens=tokens, labels=np.arange(rows) % 3, bank=bank)


def kept(middle, rng):
    return middle @ rotation(rng)


def compressed(middle, rng):
    """Three directions of sixteen."""
    return np.concatenate([middle[:, :3], 1e-3 * middle[:, 3:]], axis=1)


def replaced(middle, rng):
    return rng.normal(size=middle.shape)


def moved(middle, rng):
    return middle @ rotation(rng) + 2


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_effective_rank_of_equal_directions(rank):
    axes = torch.eye(16, dtype=torch.float64)[:rank]
    assert _effective_rank(torch.cat([axes, -axes])) == pytest.approx(rank)


def test_effective_rank_of_unequal_directions():
    axes = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    shares = np.array([0.75, 0.25])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert _effective_rank(torch.cat([axes, -axes]) + 5) == pytest.approx(expected)  # an offset is not a direction


def test_kernel_distance_is_the_direct_computation():
    rng = np.random.default_rng(0)
    x, y = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(6, 4)), rng.normal(size=(9, 4)) + 1)
    )

    def mean(pairs):
        return np.mean([(a @ b + 1) ** 3 for a, b in pairs])

    expected = (
        mean(itertools.permutations(x, 2)) + mean(itertools.permutations(y, 2)) - 2 * mean(itertools.product(x, y))
    )
    assert _kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)


def test_kernel_distance_has_no_bias():
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    found = [
        _kernel_distance(
            *(unit(torch.randn(10, 8, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
        )
        for _ in range(400)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 400**0.5
    assert np.std(found) > 0.01  # so that a bias would have shown


def test_compression(tmp_path):
    plain = estimate_shift(write(tmp_path / "kept", kept), **OPTIONS)
    small = estimate_shift(write(tmp_path / "compressed", compressed), **OPTIONS)
    assert list(plain.effective_ranks) == [1, 3, LAYERS]
    assert plain.compression.mean == pytest.approx(0, abs=1e-3)
    assert small.effective_ranks[LAYERS].mean == pytest.approx(3, abs=0.2)
    expected = 1 - small.effective_ranks[LAYERS].mean / small.effective_ranks[3].mean
    assert small.compression.mean == pytest.approx(expected, abs=0.01)
    assert 0 < small.compression.std < 0.05


@pytest.mark.parametrize(("last", "low", "high"), [(kept, -1e-6, 1e-6), (compressed, 0.2, 0.9), (replaced, 0.9, 1.1)])
def test_drift(tmp_path, last, low, high):
    assert low < estimate_shift(write(tmp_path / "train", last), **OPTIONS).drift.mean < high


def test_distance_to_a_reference(tmp_path):
    features = write(tmp_path / "train", replaced, seed=0)
    alike, other = write(tmp_path / "alike", replaced, seed=1), write(tmp_path / "other", moved, seed=2)
    near, far = (estimate_shift(features, reference=reference, **OPTIONS) for reference in (alike, other))
    assert abs(near.distance.mean) < 0.1 < 1 < far.distance.mean
    assert near.compression == far.compression == estimate_shift(features, **OPTIONS).compression
    assert (near.num_images, near.num_reference_images) == (ROWS, ROWS)
    assert estimate_shift(features, **OPTIONS).distance is None


def test_the_order_of_the_bank_plays_no_part(tmp_path):
    features = write(tmp_path / "train", compressed)
    tokens = features.tensors()["layer_features"].flip(1)
    turned = write_features(tmp_path / "turned", tokens=tokens, labels=features.labels, bank=BANK[::-1])
    assert estimate_shift(turned, **OPTIONS) == estimate_shift(features, **OPTIONS)


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    features = write(tmp_path / "train", compressed)
    first, again, other = (estimate_shift(features, seed=seed, **OPTIONS) for seed in (0, 0, 1))
    assert first == again
    assert first.drift != other.drift


def test_json(tmp_path):
    shift = estimate_shift(write(tmp_path / "train", compressed), **OPTIONS)
    shift.save_json(tmp_path / "shift.json")
    values = json.loads((tmp_path / "shift.json").read_text(encoding="utf-8"))
    assert [row["layer"] for row in values["effective_ranks"]] == [1, 3, LAYERS]
    assert values["effective_ranks"][2]["mean"] == shift.effective_ranks[LAYERS].mean
    assert values["drift"] == {"mean": shift.drift.mean, "std": shift.drift.std}
    assert values["distance"] is None
    assert values["subset_size"] == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset_size": 81}, "the data set has 80 images, fewer than subset_size=81"),
        ({"subset_size": 3}, "subset_size=3 is too small"),
        ({"module": "ln2"}, "no token of the bank has module 'ln2'"),
        ({"pool": "cls"}, "no token of the bank has pool 'cls'"),
    ],
)
def test_what_cannot_be_estimated(tmp_path, options, message):
    with pytest.raises(LayerFusionError, match=message):
        estimate_shift(write(tmp_path / "train", kept), **OPTIONS | options)


def test_references_that_do_not_fit(tmp_path):
    features = write(tmp_path / "train", kept)
    few = write(tmp_path / "few", kept, rows=30)
    with pytest.raises(LayerFusionError, match="the reference has 30 images"):
        estimate_shift(features, reference=few, **OPTIONS)
    with pytest.raises(LayerFusionError, match="lacks layer 6"):
        estimate_shift(features, reference=features.select(layers=[1, 3]), **OPTIONS)
    with pytest.raises(LayerFusionError, match="have layer 3 only"):
        estimate_shift(features.select(layers=[3]), **OPTIONS)
    for name in ("backbone", "processor"):
        foreign = write(tmp_path / name, kept)
        foreign.fingerprint[name] = {"digest": "1"}
        with pytest.raises(LayerFusionError, match=f"with another {name}"):
            estimate_shift(features, reference=foreign, **OPTIONS)


LAYOUT = TokenLayout.of_plain_vit(WIDTH, 12)


@pytest.mark.parametrize(
    ("strength", "taps"),
    [
        ("strong", [(8, "activation"), (7, "activation"), (9, "activation"), (6, "activation")]),
        ("weak", [(12, "ln2"), (11, "ln2"), (10, "ln2"), (9, "ln2")]),
        (None, [(8, "ln2"), (8, "activation"), (7, "ln2"), (7, "activation")]),
    ],
)
def test_taps(strength, taps):
    found = recommend_taps(None, LAYOUT, strength=strength)
    assert found.taps == taps
    assert "2603.05280" in found.reason
    assert "validation" in found.confidence
    assert all(f"layer {layer} · {module}" in str(found) for layer, module in taps)
    assert recommend_taps(None, LAYOUT, strength=strength, num_taps=2).taps == taps[:2]


def test_every_tap_exists_once_in_short_backbones():
    found = recommend_taps(None, TokenLayout.of_plain_vit(WIDTH, 1), num_taps=9)
    assert found.taps == [(1, "ln2"), (1, "activation")]


@pytest.mark.parametrize("strength", ["strong", "weak", None])
def test_backbones_without_a_module_give_block_outputs(strength):
    stages = TokenLayout({"block": TapLayout("channels_first", (8, 8, 16, 32, 64))})
    found = recommend_taps(None, stages, strength=strength)
    assert {module for _, module in found.taps} == {"block"}
    assert len(found.taps) == len(set(found.taps)) == 4


def test_an_estimate_is_told_and_decides_nothing(tmp_path):
    features = write(tmp_path / "train", compressed)
    shift = estimate_shift(features, reference=write(tmp_path / "other", moved), **OPTIONS)
    found = recommend_taps(shift, LAYOUT)
    assert found.taps == recommend_taps(None, LAYOUT).taps
    for reading in (shift.compression, shift.drift, shift.distance):
        assert f"{reading.mean:.2f}" in found.reason


@pytest.mark.parametrize(
    ("options", "message"), [({"strength": "huge"}, "strength='huge' is unknown"), ({"num_taps": 0}, "num_taps=0")]
)
def test_what_cannot_be_recommended(options, message):
    with pytest.raises(LayerFusionError, match=message):
        recommend_taps(None, LAYOUT, **options)
