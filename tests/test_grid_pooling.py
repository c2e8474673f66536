"""Pools that keep a little of the place: means over the cells of a grid, as tokens, in heads and in figures."""

import json
import math
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from modeling_helpers import NUM_REGISTERS, TINY, images, tiny_backbone
from picture_helpers import picture, save_tiny_backbone
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

from hf_layerfusion import LayerFusionConfig, LayerFusionError, TokenBank, extract_features
from hf_layerfusion import ViTForAttentiveLayerFusionClassification as Model
from hf_layerfusion.analysis import estimate_shift, summarise_attentions
from hf_layerfusion.analysis.plots import plot_attention
from hf_layerfusion.bank import MAX_TOKENS, TokenCoordinate, cell_place, grid_cells, is_grid, pool_group
from hf_layerfusion.cli import info
from hf_layerfusion.demo import page
from hf_layerfusion.export import export_onnx
from hf_layerfusion.layout import MODULES, TapLayout, TokenLayout
from hf_layerfusion.pooling import pool_activation
from hf_layerfusion.probe import describe_backbone
from hf_layerfusion.reader import read_bank
from hf_layerfusion.study import figures
from hf_layerfusion.taps import read_taps

WIDTH = 6
BLOCK = (1, "block")
VIT = TokenLayout.of_plain_vit(32, 3, image_size=32, patch_size=8)


def cell_means(maps, size):
    """`(B, H, W, D)` to `(B, size * size, D)`: cells from floor(i h / k) to ceil((i + 1) h / k), row by row."""
    maps = np.asarray(maps, dtype=np.float64)
    edges = [[(i * side // size, math.ceil((i + 1) * side / size)) for i in range(size)] for side in maps.shape[1:3]]
    return np.stack([maps[:, a:b, c:d].mean(axis=(1, 2)) for a, b in edges[0] for c, d in edges[1]], axis=1)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["grid:1", "grid:2", "grid:9", "grid:10", "grid:16"])
def test_names_of_grids_and_their_cells(pool):
    size = int(pool[5:])
    assert is_grid(pool)
    cells = grid_cells(pool)
    assert [cell_place(cell) for cell in cells] == [(size, number) for number in range(size**2)]
    assert {pool_group(cell) for cell in cells} == {pool}


BAD_GRIDS = ["grid:0", "grid:17", "grid:02", "grid:-1", "grid:", "grid:2.0", "grid:٢", "grid:2\n", "grid: 2", "Grid:2"]
BAD_GRIDS += ["grid:999999999", "grid:" + "9" * 5000, "grid:2 cell 0", "grid"]


@pytest.mark.parametrize("pool", BAD_GRIDS)
def test_other_names_are_no_grids(pool):
    assert not is_grid(pool)
    with pytest.raises(LayerFusionError, match="is no grid: use 'grid:k' with k from 1 to 16"):
        grid_cells(pool)


@pytest.mark.parametrize(
    "pool", ["grid:2", "grid:2 cell 4", "grid:2 cell 00", "grid:17 cell 0", "grid:2 cell -1", "grid:2 cell ١"]
)
def test_other_names_are_no_cells(pool):
    with pytest.raises(LayerFusionError, match="is no cell of a grid"):
        cell_place(pool)
    with pytest.raises(LayerFusionError, match="is no cell of a grid"):
        pool_activation(torch.randn(2, 17, 32), VIT, BLOCK, [pool], 2)


def test_readable_names():
    assert TokenCoordinate(7, "block", grid_cells("grid:2")[3]).name == "layer 7 · block · grid:2 cell 3"


# ---- one activation ----------------------------------------------------------------------------------------------


def activation_of(kind, maps, special=(0, 0), batching="plain"):
    """An activation whose patches are the maps `(B, H, W, D)`, and its layout; native images have 10 pixels a patch."""
    height, width = maps.shape[1:3]
    options = {"grids": (None, (height, width)), "image_size": (10 * height, 10 * width), "batching": batching}
    if kind == "channels_first":
        return maps.permute(0, 3, 1, 2), TokenLayout({"block": TapLayout(kind, (0, WIDTH))}, **options)
    if kind == "channels_last":
        return maps, TokenLayout({"block": TapLayout(kind, (0, WIDTH))}, **options)
    before, after = (torch.randn(len(maps), count, WIDTH).to(maps.dtype) for count in special)
    tokens = torch.cat([before, maps.flatten(1, 2), after], dim=1)
    if batching == "sequence_first":
        tokens = tokens.transpose(0, 1)
    if batching == "packed":
        tokens = tokens.flatten(0, 1).unsqueeze(0)
    options |= {"num_prefix_tokens": special[0], "num_suffix_tokens": special[1]}
    return tokens, TokenLayout({"block": TapLayout(kind, (0, WIDTH))}, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(4, 4), (6, 4), (5, 7)])
@pytest.mark.parametrize(
    ("kind", "special", "batching"),
    [
        ("tokens", (0, 0), "plain"),
        ("tokens", (5, 0), "plain"),
        ("tokens", (1, 3), "plain"),
        ("tokens", (1, 0), "sequence_first"),
        ("tokens", (0, 0), "packed"),
        ("channels_first", (0, 0), "plain"),
        ("channels_last", (0, 0), "plain"),
    ],
)
def test_cells_are_means_of_their_patches(kind, special, batching, grid, size):
    maps = torch.randn(3, *grid, WIDTH, dtype=torch.float64)
    activation, layout = activation_of(kind, maps, special, batching)
    found = pool_activation(activation, layout, BLOCK, grid_cells(f"grid:{size}"), batch_size=3)
    assert found.is_contiguous()
    close(found, cell_means(maps, size), 1e-12)
    if grid[0] % size == grid[1] % size == 0:
        mean = pool_activation(activation, layout, BLOCK, ["mean"], batch_size=3)
        close(found.mean(dim=1, keepdim=True), mean, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float(dtype):
    maps = (100 + torch.randn(2, 12, 12, WIDTH)).to(dtype)
    activation, layout = activation_of("tokens", maps)
    found = pool_activation(activation, layout, BLOCK, grid_cells("grid:2"), 2)
    assert found.dtype == dtype
    exact = torch.as_tensor(cell_means(maps.double(), 2))
    half_a_step = 32 * torch.finfo(dtype).eps  # of numbers from 64 to 128
    assert (found.double() - exact).abs().max() <= 1.01 * half_a_step


def test_pools_in_any_order_and_in_part():
    maps = torch.randn(2, 4, 6, WIDTH)
    activation, layout = activation_of("tokens", maps, special=(1, 0))
    pools = ["grid:3 cell 8", "mean", "grid:2 cell 1", "grid:3 cell 0"]
    found = pool_activation(activation, layout, BLOCK, pools, 2)
    expected = [cell_means(maps, 3)[:, 8], maps.mean(dim=(1, 2)).numpy(), cell_means(maps, 2)[:, 1]]
    close(found, np.stack([*expected, cell_means(maps, 3)[:, 0]], axis=1))


def test_a_vector_stays_one_token():
    layout = TokenLayout(
        {"block": TapLayout("tokens", (6, 6)), "pooler": TapLayout("vector", (0, 6))},
        grids=((4, 4),) * 2,
        image_size=(8, 8),
    )
    bank = TokenBank.build([1], ["block", "pooler"], ["grid:2"], layout)
    assert [c.pool for c in bank.coordinates] == [*grid_cells("grid:2"), "pooler"]


@pytest.mark.parametrize(
    ("maps", "pools", "options", "message"),
    [
        (
            torch.randn(2, 3, 5, WIDTH),
            "grid:4",
            {},
            "asks for 4 cells a side, but layer 1 is 3 patches high and 5 wide for images of 30 x 50 px: use 'grid:3'",
        ),
        (torch.randn(2, 4, 4, WIDTH), "grid:2", {"patch_mask": torch.ones(2, 16)}, "needs images of one size"),
        (
            torch.randn(2, 4, 4, WIDTH),
            "grid:2",
            {"image_size": (80, 80)},
            "the 16 patches of layer 1 for images of 80 x 80 px are not the 8 x 8 that were expected",
        ),
    ],
)
def test_what_has_no_cells_is_refused(maps, pools, options, message):
    activation, layout = activation_of("tokens", maps)
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        pool_activation(activation, layout, BLOCK, grid_cells(pools), 2, **options)


# ---- the grid of an image ----------------------------------------------------------------------------------------


def layout_with(*grids, image_size, reading="blocks"):
    return TokenLayout(
        {"block": TapLayout("tokens", (WIDTH,) * len(grids))}, grids=grids, image_size=image_size, reading=reading
    )


SIGLIP = layout_with((27, 27), (27, 27), image_size=(384, 384))  # 14 pixels a patch, 6 left over
STAGES = layout_with((16, 16), (8, 8), (4, 4), image_size=(64, 64), reading="hidden_states")


@pytest.mark.parametrize(
    ("layout", "layer", "image_size", "num_patches", "expected"),
    [
        (VIT, 1, None, 16, (4, 4)),
        (VIT, 1, (64, 32), 32, (8, 4)),
        (VIT, 1, (35, 70), 32, (4, 8)),  # a rest is left out
        (SIGLIP, 1, (448, 448), 32 * 32, (32, 32)),  # neither scaled down nor up: 31.5
        (SIGLIP, 1, (896, 448), 64 * 32, (64, 32)),
        (STAGES, 2, (72, 40), 5 * 3, (5, 3)),  # a rest is padded
        (STAGES, 2, (64, 64), 8 * 8, (8, 8)),  # in front of the downsampling
        (STAGES, 1, (72, 40), 18 * 10, (18, 10)),
    ],
)
def test_grid_of_an_image(layout, layer, image_size, num_patches, expected):
    assert layout.grid_of(layer, num_patches, image_size) == expected


@pytest.mark.parametrize(("layout", "num_patches"), [(VIT, 17), (VIT, 36), (SIGLIP, 16)])
def test_no_grid_is_guessed(layout, num_patches):
    with pytest.raises(LayerFusionError, match="use images whose sides the backbone's strides divide"):
        layout.grid_of(1, num_patches)


def test_the_number_of_patches_is_that_of_the_grid():
    assert VIT.grid(2) == (4, 4)
    assert VIT.grid(2, (64, 35)) == (8, 4)
    assert VIT.num_patches(2, (64, 35)) == 32


# ---- backbones ---------------------------------------------------------------------------------------------------


def hidden_maps(model_type, outputs, layer, image_size):
    """`(B, H, W, D)` by the backbone's own account."""
    if model_type == "swin":
        return outputs.reshaped_hidden_states[layer].permute(0, 2, 3, 1)
    state = outputs.hidden_states[layer]
    if state.ndim == 4:
        return state.permute(0, 2, 3, 1)
    return state[:, 1 + NUM_REGISTERS :].unflatten(1, (image_size[0] // 8, image_size[1] // 8))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("dinov2_with_registers", [(32, 32), (64, 64), (48, 72), (24, 40)]),
        ("convnext", [(32, 32), (48, 64)]),
        ("resnet", [(64, 64), (96, 70)]),
        ("swin", [(32, 32), (48, 40), (44, 36)]),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_one_head_reads_images_of_several_sizes(model_type, sizes, size):
    model = Model.from_backbone(
        tiny_backbone(model_type), num_labels=3, layers=[1, 2], pools=["mean", f"grid:{size}"], num_heads=4
    )
    assert model.config.image_size is None
    for image_size in sizes:
        pixels = images(size=image_size)
        tokens = model.extract_layer_features(pixels)
        with torch.no_grad():
            outputs = model.backbone(pixels, output_hidden_states=True)
            assert model(pixels).logits.shape == (2, 3)
        for number, layer in enumerate(model.config.layers):
            maps = hidden_maps(model_type, outputs, layer, image_size)
            own = tokens[:, number * (1 + size**2) :][:, : 1 + size**2, : maps.shape[-1]]
            close(own[:, 1:], cell_means(maps, size))
            close(own[:, 0], maps.mean(dim=(1, 2)))
            if maps.shape[1] % size == maps.shape[2] % size == 0:
                close(own[:, 1:].mean(dim=1), own[:, 0])


def test_the_last_block_of_a_stage_stands_before_its_downsampling():
    backbone = tiny_backbone("swin")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([1], ["residual"], ["grid:3"], layout)
    with torch.no_grad():
        tokens = read_bank(backbone, layout, bank, images())
        found = read_taps(backbone, layout, bank.taps, lambda _, activation: activation, images())[1, "residual"]
    assert (found.shape[1], layout.grids[1]) == (256, (8, 8))
    close(tokens, cell_means(found.unflatten(1, (16, 16)), 3))


def test_a_layer_that_is_too_small():
    model = Model.from_backbone(tiny_backbone("convnext"), num_labels=3, pools=["grid:2"], num_heads=2)
    message = (
        "asks for 2 cells a side, but layer 4 is 1 patches high and 1 wide for images of 32 x 32 px: use 'grid:1'"
    )
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        model(images())
    with torch.no_grad():
        assert torch.isfinite(model(images(size=64)).logits).all()


# ---- the bank ----------------------------------------------------------------------------------------------------

BANK = TokenBank.build([0, 2], ["block"], ["cls", "grid:2", "mean"], VIT)


def test_building_a_bank():
    assert BANK.names[:6] == [
        "layer 0 · embeddings · cls",
        *(f"layer 0 · embeddings · grid:2 cell {number}" for number in range(4)),
        "layer 0 · embeddings · mean",
    ]
    assert BANK.pools == ["cls", *grid_cells("grid:2"), "mean"]
    assert TokenBank.from_list(BANK.to_list()) == BANK
    assert len(TokenBank.build([1], ["block"], ["tokens", "grid:16"], VIT)) == 1 + 16 + 256
    assert list(BANK.groups.values()) == [[0], [1, 2, 3, 4], [5], [6], [7, 8, 9, 10], [11]]
    assert [group.name for group in BANK.groups][4] == "layer 2 · block · grid:2"


def test_choosing_from_a_bank():
    assert BANK.select(pools=["grid:2"]).coordinates == BANK.coordinates[1:5] + BANK.coordinates[7:11]
    assert BANK.select(layers=[2], pools=["grid:2 cell 3", "cls"]).names == [
        "layer 2 · block · cls",
        "layer 2 · block · grid:2 cell 3",
    ]
    assert BANK.positions_of(TokenBank.build([2], ["block"], ["grid:2"], VIT)) == [7, 8, 9, 10]
    assert BANK.positions_of(BANK.select(pools=["grid:2"])) == [1, 2, 3, 4, 7, 8, 9, 10]
    with pytest.raises(
        LayerFusionError, match=re.escape("has pool 'grid:3 cell 0'; it has ['cls', 'grid:2', 'mean']")
    ):
        BANK.select(pools=["grid:3"])
    with pytest.raises(LayerFusionError, match=r"lacks layer 2 · block · grid:3 cell 0, .* and 5 more"):
        BANK.positions_of(TokenBank.build([2], ["block"], ["grid:3"], VIT))


def test_a_bank_is_never_larger_than_it_may_be():
    num_layers = 400
    taps = {name: TapLayout("channels_first", (8,) * (num_layers + 1)) for name in MODULES[:8]}
    layout = TokenLayout(taps, grids=((64, 64),) * (num_layers + 1), image_size=(64, 64))
    with pytest.raises(
        LayerFusionError, match=f"gives more than {MAX_TOKENS} tokens at layer .*: choose fewer layers"
    ):
        TokenBank.build(range(num_layers + 1), MODULES[:8], [f"grid:{k}" for k in range(1, 17)], layout)


@pytest.mark.parametrize(
    "layout", [TokenLayout({"block": TapLayout("tokens", (8, 8))}), TokenLayout.of_plain_vit(8, 1)]
)
def test_patches_without_a_grid(layout):
    with pytest.raises(LayerFusionError, match=re.escape("pools=['grid:2'] needs a grid of patches, which layer 1")):
        TokenBank.build([1], ["block"], ["grid:2"], layout)


# ---- the config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [*BAD_GRIDS, None, 2, ["grid:2"]])
def test_a_stranger_s_config(pool):
    values = LayerFusionConfig(backbone_config={"model_type": "vit", **TINY}).to_dict() | {"pools": ["cls", pool]}
    with pytest.raises(
        LayerFusionError, match=r"pools .* is unknown: choose from .*'tokens'\], 'grid:k' .* 1 to 16, or"
    ):
        LayerFusionConfig.from_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pools": ["grid:2", "mean", "grid:2"]}, "names a value twice"),
        ({"pools": ["grid:6"], "layers": "all"}, "num_heads=108 does not fit tokens of width 32"),
        (
            {"pools": ["grid:2"], "backbone_config": {"model_type": "hiera"}, "token_layout": VIT.to_dict()},
            "do not stand row by row",
        ),
        (
            {"pools": ["cls", "grid:2"], "head_type": "scalar_mix", "token_layout": "pooler"},
            "the same pools in every layer",
        ),
    ],
)
def test_what_a_config_refuses(options, message):
    if options.get("token_layout") == "pooler":
        layout = VIT.to_dict()
        layout["taps"]["pooler"] = {"kind": "vector", "widths": [0, 0, 0, 32]}
        options = {**options, "token_layout": layout, "modules": ["block", "pooler"]}
    options = {"backbone_config": {"model_type": "vit", **TINY}, **options}
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        Model(LayerFusionConfig(**options), with_backbone=False)


def test_a_scalar_mix_weighs_layers_and_not_cells():
    config = LayerFusionConfig(
        backbone_config={"model_type": "vit", **TINY}, recipe="scalar-mix", pools=["cls", "mean", "grid:2"]
    )
    head = Model(config, with_backbone=False).head
    assert (head.num_pools, len(head.layer_logits)) == (6, 3)


# ---- live, cached, saved, exported -------------------------------------------------------------------------------


def far_from_uniform(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny")
    return far_from_uniform(
        Model.from_backbone(folder, id2label=["a", "b", "c"], pools=["cls", "mean", "grid:2"], num_heads=4)
    )


def test_live_cached_and_saved_tokens_are_the_same(model, tmp_path):
    pictures = [picture(number % 3, number) for number in range(5)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2, 0, 1]}, features=columns)
    features = extract_features(model, rows, tmp_path / "cache", dtype="float32", batch_size=5, progress=False)
    pixels = model.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        live = model(pixels).logits
        cached = features.batch(range(5))["layer_features"]
        close(cached, model.extract_layer_features(pixels))
        close(model(layer_features=cached).logits, live)
    cells = features.select(layers=[2], pools=["grid:2"])
    close(cells.batch(range(5))["layer_features"], cached[:, 8:12])
    with pytest.raises(LayerFusionError, match="pool='grid:2' has several"):
        estimate_shift(features, pool="grid:2", subset_size=4)

    model.save_pretrained(tmp_path / "head")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "head")
    assert (loaded.config.pools, loaded.config.image_size) == (["cls", "mean", "grid:2"], None)
    assert "from `layer 1 · block · cls` to `layer 3 · block · grid:2 cell 3`" in (
        tmp_path / "head" / "README.md"
    ).read_text(encoding="utf-8")
    with torch.no_grad():
        close(loaded(pixels).logits, live)
        close(loaded(images(size=48)).logits, model(images(size=48)).logits)


def shallow(backbone):
    torch.manual_seed(0)
    head = Model.from_backbone(
        backbone.eval(), num_labels=3, layers=[1], pools=["mean", "grid:3"], num_heads=2, image_processor=None
    )
    return far_from_uniform(head)


@pytest.mark.slow
def test_an_onnx_program_has_the_same_cells(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    backbone = ViTModel(ViTConfig(**TINY | {"num_hidden_layers": 1}), add_pooling_layer=False).eval()
    model = far_from_uniform(Model.from_backbone(backbone, num_labels=3, pools=["mean", "grid:3"], num_heads=2))
    # Cells of different sizes. The check runs batches of 1, 2 and 5 pictures, and allows differences of 1e-4.
    export_onnx(model, tmp_path / "model.onnx", image_size=32)
    check = json.loads((tmp_path / "model.onnx.json").read_text(encoding="utf-8"))["check"]
    assert check["max_abs_difference"] < 1e-4
    assert check["max_abs_logit"] > 0.1


# ---- what people see ---------------------------------------------------------------------------------------------


def test_figures_show_the_cells_of_a_grid_as_one(model, tmp_path, monkeypatch):
    pixels = images(6)
    summary = summarise_attentions(model, [{"pixel_values": pixels[:4]}, {"pixel_values": pixels[4:]}])
    with torch.no_grad():
        attentions = model(pixels, output_attentions=True).layer_attentions[:, 0].double()  # (B, H, N)
    names, mean, std, sizes = summary.grouped
    assert names[:3] == ["layer 1 · block · cls", "layer 1 · block · mean", "layer 1 · block · grid:2"]
    assert sizes == [1, 1, 4] * 3
    together = attentions.unflatten(2, (3, 6))
    together = torch.cat([together[..., :2], together[..., 2:].sum(-1, keepdim=True)], dim=-1).flatten(2)  # (B, H, 9)
    close(mean, together.mean(0))
    close(std, together.std(0, unbiased=False))
    assert std[:, 2].max() > 1e-3
    plot_attention(summary, tmp_path / "attention.png")
    assert Image.open(tmp_path / "attention.png").width == 150 * 7  # 18 columns would take more

    drawn = {}
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.update({path: figure}))
    bank = tuple(tuple(coordinate) for coordinate in model.config.bank.coordinates)
    run = SimpleNamespace(attention=summary.mean.numpy(), bank=bank, key=SimpleNamespace(split=0, seed=0))
    figures.plot_attention_heads([run], "heads", title="cells")
    bars = drawn["heads"].axes[0].patches[:9]
    np.testing.assert_allclose([bar.get_height() for bar in bars], 100 * mean.mean(0), rtol=1e-5)
    labels = [label.get_text() for label in drawn["heads"].axes[-2].get_xticklabels()]
    assert labels[:3] == ["1 · cls", "1 · mean", "1 · grid:2"]


def test_pages_and_lists_show_the_cells_of_a_grid_as_one(model, capsys):
    weights = torch.zeros(4, 18)
    weights[:, 11] = 1  # the last cell of layer 2
    shown = page.render_layers(model.config, weights, None)
    assert "layer 2 · block · grid:2 (4 cells)" in shown
    assert "grid:2 cell" not in shown
    assert "Map of layer 2 · block · grid:2 (4 cells): most weight in row 2 of 2 from the top, column 2 of 2" in shown
    assert shown.count('lf-map"') == 3
    info._describe_head(model.config)
    lines = capsys.readouterr().out.splitlines()
    assert "tokens: 18 of width 32" in lines
    assert lines[-1] == "  layer 3 · block · grid:2 (4 cells)"
    assert len([line for line in lines if "layer" in line and "·" in line]) == 9
