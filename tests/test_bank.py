"""Layer choices and token coordinates."""

import re

import pytest

from hf_layerfusion import LayerFusionError, TokenBank, TokenCoordinate
from hf_layerfusion.bank import resolve_layers
from hf_layerfusion.layout import TapLayout, TokenLayout


def vit(num_layers, width=32):
    return TokenLayout.of_plain_vit(width, num_layers)


def maps(*widths):
    """Layers 0 to L of a convolutional backbone."""
    return TokenLayout({"block": TapLayout("channels_first", widths)})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("all", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("last", [12]),
        ("middle", [6]),
        (1, [12]),
        (3, [10, 11, 12]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ([0], [0]),
        ([-1], [12]),
        ([-12], [1]),
        ([3, 12, 0], [0, 3, 12]),
        ((-1, 6), [6, 12]),
        ("10:", [10, 11, 12]),
        (":2", [1, 2]),
        ("0:2", [0, 1, 2]),
        ("3:3", [3]),
        ("6,3", [3, 6]),
        ("-1,0", [0, 12]),
        ("7", [7]),
        ("spaced:1", [12]),
        ("spaced:2", [6, 12]),
        ("spaced:4", [3, 6, 9, 12]),
        ("spaced:12", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    ],
)
def test_resolve_layers(spec, expected):
    assert resolve_layers(spec, 12) == expected


def test_spaced_layers_are_distinct_and_end_with_the_last():
    for num_layers in (1, 5, 7, 12, 24, 27):
        for count in range(1, num_layers + 1):
            layers = resolve_layers(f"spaced:{count}", num_layers)
            assert len(set(layers)) == count
            assert layers[-1] == num_layers
            gaps = {b - a for a, b in zip([0, *layers], layers, strict=False)}
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (0, "layers=0 asks for the last 0 layers, but the backbone has 12 (1 to 12)"),
        (13, "layers=13 asks for the last 13 layers, but the backbone has 12 (1 to 12)"),
        (-1, "layers=-1 asks for the last -1 layers"),
        ([13], "layer 13 is out of range for a backbone of 12 layers: choose from 0 (the embedding output) to 12"),
        ([-13], "layer -13 is out of range for a backbone of 12 layers"),
        ([3, "x"], "layer 'x' is out of range"),
        ([2.5], "layer 2.5 is out of range"),
        ("13", "layer 13 is out of range"),
        ("10:13", "layer 13 is out of range"),
        ([], "layers=[] selects no layer: choose from 0 (the embedding output) to 12, or from -12 to -1"),
        ("5:3", "selects no layer"),
        ([3, 3], "layers=[3, 3] names a layer twice"),
        ([12, -1], "layers=[12, -1] names a layer twice"),
        ("4,4", "names a layer twice"),
        ("spaced:0", "layers='spaced:0' asks for 0 of 12 layers"),
        ("spaced:13", "layers='spaced:13' asks for 13 of 12 layers"),
        ("spaced:x", "layers='spaced:x' is not understood: use 'all', 'middle', 'last', 'a:b', 'spaced:n' or numbers"),
        ("spaced", "layers='spaced' is not understood"),
        ("first", "layers='first' is not understood"),
        ("", "layers='' is not understood"),
        ("2-4", "layers='2-4' is not understood"),
        ("a:b", "layers='a:b' is not understood"),
    ],
)
def test_resolve_layers_errors(spec, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        resolve_layers(spec, 12)


def test_build_orders_layers_then_modules_then_pools():
    bank = TokenBank.build([1, 3], ["ln2", "block"], ["cls", "mean"], vit(3))
    assert bank.coordinates == (
        TokenCoordinate(1, "ln2", "cls"),
        TokenCoordinate(1, "ln2", "mean"),
        TokenCoordinate(1, "block", "cls"),
        TokenCoordinate(1, "block", "mean"),
        TokenCoordinate(3, "ln2", "cls"),
        TokenCoordinate(3, "ln2", "mean"),
        TokenCoordinate(3, "block", "cls"),
        TokenCoordinate(3, "block", "mean"),
    )
    assert len(bank) == 8
    assert bank.taps == [(1, "ln2"), (1, "block"), (3, "ln2"), (3, "block")]
    assert bank.pools == ["cls", "mean"]


def test_build_leaves_out_what_does_not_exist():
    bank = TokenBank.build([0, 2, 3], ["block", "ln2", "final_norm"], ["mean"], vit(3))
    assert bank.taps == [(0, "block"), (2, "block"), (2, "ln2"), (3, "block"), (3, "ln2"), (3, "final_norm")]


def test_names_are_readable():
    bank = TokenBank.build([0, 7, 12], ["block", "final_norm"], ["mean"], vit(12))
    assert bank.names == [
        "layer 0 · embeddings · mean",
        "layer 7 · block · mean",
        "layer 12 · block · mean",
        "layer 12 · final_norm · mean",
    ]


def test_width_is_that_of_the_widest_tapped_layer():
    layout = maps(64, 8, 16, 128)
    bank = TokenBank.build([1, 2], ["block"], ["mean"], layout)
    assert bank.width(layout) == 16
    assert bank.widths(layout) == [8, 16]


def test_width_counts_the_tapped_module():
    layout = vit(3, width=8)
    assert TokenBank.build([2], ["ln2", "activation"], ["mean"], layout).widths(layout) == [8, 32]


def test_a_cls_token_in_the_last_layers_only():
    layout = TokenLayout({"block": TapLayout("tokens", (8, 8, 8))}, num_prefix_tokens=(0, 0, 1), cls_token=0)
    bank = TokenBank.build([1, 2], ["block"], ["cls", "mean"], layout)
    assert bank.names == ["layer 1 · block · mean", "layer 2 · block · cls", "layer 2 · block · mean"]


def test_no_embedding_output():
    assert len(TokenBank.build([0], ["block"], ["mean"], maps(0, 8, 16))) == 0


def test_the_model_s_own_pooler_is_one_token():
    taps = {"block": TapLayout("tokens", (8, 8)), "pooler": TapLayout("vector", (0, 12))}
    layout = TokenLayout(taps)
    bank = TokenBank.build([0, 1], ["block", "pooler"], ["cls", "mean"], layout)
    assert bank.names == ["layer 0 · embeddings · mean", "layer 1 · block · mean", "layer 1 · pooler"]
    assert bank.width(layout) == 12
    assert TokenBank.from_list(bank.to_list()) == bank


def test_round_trip_through_a_list():
    bank = TokenBank.build([0, 2], ["block", "ln2"], ["cls", "mean"], vit(4))
    rows = bank.to_list()
    assert rows[0] == [0, "block", "cls"]
    assert TokenBank.from_list(rows) == bank
    assert TokenBank.from_list([tuple(row) for row in rows]) == bank


def test_union_keeps_order_and_drops_doubles():
    first = TokenBank.build([2, 3], ["block"], ["mean"], vit(3))
    second = TokenBank.build([1, 2], ["block"], ["mean"], vit(3))
    assert [c.layer for c in (first | second).coordinates] == [2, 3, 1]
    assert first | first == first
    union = first | second
    assert [union.coordinates[i] for i in union.positions_of(second)] == list(second.coordinates)


def test_positions_follow_the_wanted_order():
    bank = TokenBank.build([1, 2, 3], ["block"], ["cls", "mean"], vit(3))
    wanted = TokenBank((TokenCoordinate(3, "block", "cls"), TokenCoordinate(1, "block", "mean")))
    assert bank.positions_of(wanted) == [4, 1]
    assert bank.positions_of(bank) == list(range(6))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], "the bank of 2 tokens lacks layer 3 · block · mean; extract the features again"),
        (
            [3, 4, 5, 6, 7, 8],
            "lacks layer 3 · block · mean, layer 4 · block · mean, layer 5 · block · mean, layer 6 · block · mean "
            "and 2 more; extract",
        ),
    ],
)
def test_positions_of_names_what_is_missing(layers, message):
    bank = TokenBank.build([1, 2], ["block"], ["mean"], vit(9))
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        bank.positions_of(TokenBank.build([1, *layers], ["block"], ["mean"], vit(9)))


SELECTABLE = TokenBank.build([0, 1, 2], ["block", "ln2"], ["cls", "mean"], vit(3))


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ({}, list(SELECTABLE.coordinates)),
        ({"layers": [0]}, [(0, "block", "cls"), (0, "block", "mean")]),
        ({"layers": [2, 1], "modules": ["ln2"], "pools": ["mean"]}, [(1, "ln2", "mean"), (2, "ln2", "mean")]),
        ({"pools": ["cls"], "modules": ["block"]}, [(0, "block", "cls"), (1, "block", "cls"), (2, "block", "cls")]),
    ],
)
def test_select(criteria, expected):
    assert list(SELECTABLE.select(**criteria).coordinates) == expected


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({"layers": [1, 3]}, "no token of the bank has layer 3; it has [0, 1, 2]"),
        ({"modules": ["final_norm"]}, "no token of the bank has module 'final_norm'; it has ['block', 'ln2']"),
        ({"pools": ["tokens"]}, "no token of the bank has pool 'tokens'; it has ['cls', 'mean']"),
        (
            {"layers": [0], "modules": ["ln2"]},
            "no token of the bank has layers=[0], modules=['ln2'] and pools=None at once",
        ),
        ({"layers": []}, "no token of the bank has layers=[]"),
    ],
)
def test_select_errors(criteria, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        SELECTABLE.select(**criteria)
