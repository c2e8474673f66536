"""What pooling does with each token of an activation, and how the bank lines the pooled tokens up."""

import re

import numpy as np
import pytest
import torch
from modeling_helpers import (
    HIDDEN_SIZE,
    NUM_PATCHES,
    NUM_REGISTERS,
    OTHER_BACKBONES,
    TABLE_BACKBONES,
    ScriptedBackbone,
    build_attending_model,
    images,
    patchify,
    tiny_backbone,
)

from hf_layerfusion import LayerFusionConfig, LayerFusionError, TokenBank
from hf_layerfusion.layout import TapLayout, TokenLayout
from hf_layerfusion.pooling import pad_width, pool_activation, split_tokens
from hf_layerfusion.probe import describe_backbone
from hf_layerfusion.reader import read_bank
from hf_layerfusion.taps import read_taps

BLOCK = (1, "block")
WIDTH = 8


def layout_of(kind="tokens", widths=(0, WIDTH), **options):
    return TokenLayout({"block": TapLayout(kind, widths)}, **options)


# ---- one activation ----------------------------------------------------------------------------------------------

# Tokens before and after the patches, and which token is CLS.
SPECIAL_TOKENS = {
    "vit": (1, 0, 0),
    "distilled": (2, 0, 0),
    "registers": (5, 0, 0),
    "registers without CLS": (4, 0, None),
    "none": (0, 0, None),
    "CLS at the end": (0, 1, -1),
    "CLS first of three at the end": (0, 3, -3),
    "detection tokens at the end": (1, 3, 0),
}


def special_layout(case):
    prefix, suffix, cls_token = SPECIAL_TOKENS[case]
    return layout_of(num_prefix_tokens=prefix, num_suffix_tokens=suffix, cls_token=cls_token)


@pytest.mark.parametrize("case", SPECIAL_TOKENS)
def test_each_token_changes_what_it_should(case):
    prefix, suffix, cls_token = SPECIAL_TOKENS[case]
    layout, num_tokens = special_layout(case), prefix + NUM_PATCHES + suffix
    pools = ["mean"] if cls_token is None else ["cls", "mean"]
    tokens = torch.randn(2, num_tokens, WIDTH, dtype=torch.float64)
    before = pool_activation(tokens, layout, BLOCK, pools, batch_size=2)
    assert before.shape == (2, len(pools), WIDTH)
    for position in range(num_tokens):
        changed = tokens.clone()
        changed[1, position] += 1
        moved = pool_activation(changed, layout, BLOCK, pools, batch_size=2) - before
        assert torch.equal(moved[0], torch.zeros_like(moved[0]))  # the other image stays
        if cls_token is not None:
            expected = float(position == cls_token % num_tokens)
            torch.testing.assert_close(moved[1, 0], torch.full((WIDTH,), expected).double())
        share = 1 / NUM_PATCHES if prefix <= position < prefix + NUM_PATCHES else 0.0
        torch.testing.assert_close(moved[1, -1], torch.full((WIDTH,), share).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", SPECIAL_TOKENS)
def test_tokens_are_split_and_keep_their_order(case):
    prefix, suffix, _ = SPECIAL_TOKENS[case]
    tokens = torch.randn(2, prefix + NUM_PATCHES + suffix, WIDTH)
    patches, special = split_tokens(tokens, special_layout(case), BLOCK, batch_size=2)
    assert torch.equal(patches, tokens[:, prefix : prefix + NUM_PATCHES])
    assert torch.equal(special, torch.cat([tokens[:, :prefix], tokens[:, prefix + NUM_PATCHES :]], dim=1))


def test_special_tokens_are_counted_by_layer():
    # As in CvT: a CLS token joins in the last stage.
    layout = layout_of(widths=(WIDTH, WIDTH, WIDTH), num_prefix_tokens=(0, 0, 1), cls_token=0)
    tokens = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(pool_activation(tokens, layout, (1, "block"), ["mean"], 2)[:, 0], tokens.mean(dim=1))
    last = pool_activation(tokens, layout, (2, "block"), ["cls", "mean", "max"], 2)
    torch.testing.assert_close(
        last, torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1), tokens[:, 1:].amax(dim=1)], dim=1)
    )
    with pytest.raises(LayerFusionError, match="layer 1 of this backbone has no CLS token: use pools="):
        pool_activation(tokens, layout, (1, "block"), ["cls"], 2)


def test_pools_keep_their_order():
    tokens, layout = torch.randn(2, 17, WIDTH), special_layout("vit")
    forward, backward = (
        pool_activation(tokens, layout, BLOCK, pools, 2) for pools in (["cls", "mean"], ["mean", "cls"])
    )
    assert torch.equal(forward.flip(1), backward)


def test_the_cls_token_does_not_hold_its_activation():
    pooled = pool_activation(torch.randn(2, 17, WIDTH), special_layout("vit"), BLOCK, ["cls"], 2)
    assert pooled.untyped_storage().nbytes() == 2 * WIDTH * 4
    both = pool_activation(torch.randn(2, 17, WIDTH), special_layout("vit"), BLOCK, ["cls", "mean"], 2)
    assert pooled.is_contiguous()
    assert both.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pooling_keeps_the_dtype(dtype):
    tokens = torch.randn(2, 17, WIDTH).to(dtype)
    mask = torch.ones(2, NUM_PATCHES)
    for patch_mask in (None, mask):
        assert pool_activation(tokens, special_layout("vit"), BLOCK, ["cls", "mean"], 2, patch_mask).dtype == dtype


@pytest.mark.parametrize("kind", ["tokens", "channels_first", "channels_last"])
def test_no_cls_no_pooling_of_it(kind):
    activation = torch.randn(2, 16, WIDTH) if kind == "tokens" else torch.randn(2, 4, 4, WIDTH)
    with pytest.raises(LayerFusionError, match=re.escape("has no CLS token: use pools=['mean']")):
        pool_activation(activation, layout_of(kind), BLOCK, ["cls"], 2)


def test_unknown_pool():
    with pytest.raises(LayerFusionError, match=re.escape("pool 'min' is unknown: use one of cls, mean, max, tokens")):
        pool_activation(torch.randn(2, 17, WIDTH), special_layout("vit"), BLOCK, ["min"], 2)


# ---- other shapes ------------------------------------------------------------------------------------------------


def test_maps_pool_alike_in_both_orders():
    maps = torch.randn(2, 6, 4, 5)
    first = pool_activation(maps, layout_of("channels_first", (0, 6)), BLOCK, ["mean", "max"], 2)
    last = pool_activation(maps.permute(0, 2, 3, 1), layout_of("channels_last", (0, 6)), BLOCK, ["mean", "max"], 2)
    torch.testing.assert_close(first, torch.stack([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))
    torch.testing.assert_close(last, first)


def test_patches_of_maps_stand_in_raster_order():
    maps = torch.randn(2, 6, 4, 5)
    for kind, activation in (("channels_first", maps), ("channels_last", maps.permute(0, 2, 3, 1))):
        patches, special = split_tokens(activation, layout_of(kind, (0, 6)), BLOCK, 2)
        assert special.shape == (2, 0, 6)
        for row in range(4):
            for column in range(5):
                assert torch.equal(patches[:, 5 * row + column], maps[:, :, row, column])


def test_each_module_has_its_own_kind():
    # As in ConvNeXt: channels first outside a block, last inside.
    taps = {"block": TapLayout("channels_first", (6, 6)), "ln2": TapLayout("channels_last", (0, 6))}
    layout, maps = TokenLayout(taps), torch.randn(2, 6, 4, 4)
    outside = pool_activation(maps, layout, (1, "block"), ["mean"], 2)
    inside = pool_activation(maps.permute(0, 2, 3, 1), layout, (1, "ln2"), ["mean"], 2)
    torch.testing.assert_close(outside[:, 0], maps.mean(dim=(2, 3)))
    torch.testing.assert_close(inside, outside)


def test_windows_in_the_batch_axis_are_brought_together():
    # Three images of four windows, each with a CLS token of its own: (12, 1 + 5, D).
    layout = layout_of(num_prefix_tokens=1, batching="windows")
    tokens = torch.randn(3, 4, 6, WIDTH)
    patches, special = split_tokens(tokens.flatten(0, 1), layout, BLOCK, batch_size=3)
    assert torch.equal(patches, tokens[:, :, 1:].flatten(1, 2))
    assert torch.equal(special, tokens[:, :, 0])
    pooled = pool_activation(tokens.flatten(0, 1), layout, BLOCK, ["mean"], batch_size=3)
    torch.testing.assert_close(pooled[:, 0], tokens[:, :, 1:].mean(dim=(1, 2)))


def test_packed_images_are_taken_apart():
    tokens = torch.randn(3, NUM_PATCHES, WIDTH)
    packed, layout = tokens.flatten(0, 1).unsqueeze(0), layout_of(batching="packed")
    patches, _ = split_tokens(packed, layout, BLOCK, batch_size=3)
    assert torch.equal(patches, tokens)
    pooled = pool_activation(packed, layout, BLOCK, ["mean"], batch_size=3)
    torch.testing.assert_close(pooled[:, 0], tokens.mean(dim=1))


def test_the_batch_may_be_the_second_axis():
    layout, tokens = layout_of(num_prefix_tokens=1, cls_token=0, batching="sequence_first"), torch.randn(3, 17, WIDTH)
    pooled = pool_activation(tokens.transpose(0, 1), layout, BLOCK, ["cls", "mean"], batch_size=3)
    torch.testing.assert_close(pooled, torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (layout_of(), (4, 16, WIDTH)),
        (layout_of(), (2, 4, 4, WIDTH)),
        (layout_of(batching="sequence_first"), (2, 16, WIDTH)),
    ],
)
def test_an_activation_that_is_not_as_it_was_measured_is_refused(layout, shape):
    with pytest.raises(
        LayerFusionError, match=r"the activation of 'block' at layer 1 has shape .* not what was measured"
    ):
        pool_activation(torch.randn(shape), layout, BLOCK, ["mean"], batch_size=2)


def test_a_vector_is_one_token():
    layout = TokenLayout({"block": TapLayout("tokens", (6, 6)), "pooler": TapLayout("vector", (0, 6))})
    vector = torch.randn(2, 6)
    assert torch.equal(pool_activation(vector, layout, (1, "pooler"), ["pooler"], 2), vector[:, None])


# ---- patches that are not there ----------------------------------------------------------------------------------


def test_padded_patches_are_left_out():
    tokens = torch.randn(2, NUM_PATCHES, WIDTH)
    mask = torch.ones(2, NUM_PATCHES, dtype=torch.int32)
    mask[0, 10:] = 0
    tokens[0, 10:] = torch.nan
    tokens[:, :10] -= 5  # so that no largest value is the 0 of a masked product
    mean, largest = pool_activation(tokens, layout_of(), BLOCK, ["mean", "max"], 2, mask).unbind(dim=1)
    torch.testing.assert_close(mean, torch.stack([tokens[0, :10].mean(dim=0), tokens[1].mean(dim=0)]))
    assert torch.equal(largest, torch.stack([tokens[0, :10].amax(dim=0), tokens[1].amax(dim=0)]))


def test_a_mask_counts_patches_and_not_special_tokens():
    tokens, layout = torch.randn(2, 1 + NUM_PATCHES, WIDTH), special_layout("vit")
    mask = torch.arange(NUM_PATCHES).expand(2, -1) < 3
    cls, mean = pool_activation(tokens, layout, BLOCK, ["cls", "mean"], 2, mask).unbind(dim=1)
    assert torch.equal(cls, tokens[:, 0])
    torch.testing.assert_close(mean, tokens[:, 1:4].mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_full_mask_changes_nothing(dtype):
    tokens = torch.randn(2, NUM_PATCHES, WIDTH)
    mask = torch.ones(2, NUM_PATCHES).to(dtype)
    torch.testing.assert_close(
        pool_activation(tokens, layout_of(), BLOCK, ["mean", "max"], 2, mask),
        pool_activation(tokens, layout_of(), BLOCK, ["mean", "max"], 2),
    )


def test_an_image_without_patches_gives_zeros():
    pooled = pool_activation(
        torch.randn(2, 4, WIDTH), layout_of(), BLOCK, ["mean", "max"], 2, torch.tensor([[0] * 4, [1] * 4])
    )
    assert torch.equal(pooled[0], torch.zeros(2, WIDTH))


def test_a_mask_of_another_shape_is_refused():
    message = "the patch mask has shape (2, 9), but there are (2, 16) patches"
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        pool_activation(torch.randn(2, 16, WIDTH), layout_of(), BLOCK, ["mean"], 2, torch.ones(2, 9))


# ---- widths ------------------------------------------------------------------------------------------------------


def test_narrow_tokens_are_padded_with_zeros():
    tokens = torch.randn(2, 3, 4)
    padded = pad_width(tokens, 6)
    assert torch.equal(padded[..., :4], tokens)
    assert torch.equal(padded[..., 4:], torch.zeros(2, 3, 2))
    assert torch.equal(pad_width(tokens, 4), tokens)


def test_wide_tokens_are_not_cropped():
    with pytest.raises(LayerFusionError, match="4"):
        pad_width(torch.randn(2, 3, 6), 4)


# ---- the bank ----------------------------------------------------------------------------------------------------


def read(backbone, layout, bank, pixel_values, **kwargs):
    with torch.no_grad():
        return read_bank(backbone, layout, bank, pixel_values, **kwargs)


def activations_of(backbone, layout, bank, pixel_values):
    with torch.no_grad():
        return read_taps(backbone, layout, bank.taps, lambda _, activation: activation, pixel_values)


def test_bank_tokens_stand_at_their_coordinates():
    backbone = tiny_backbone("dinov2_with_registers")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([0, 2, 3], ["block", "ln2", "final_norm", "pooler"], ["cls", "mean"], layout)
    tokens = read(backbone, layout, bank, images())
    activations = activations_of(backbone, layout, bank, images())
    assert tokens.shape == (2, 13, HIDDEN_SIZE)
    for position, (layer, module, pool) in enumerate(bank.coordinates):
        activation = activations[layer, module]
        expected = {
            "cls": lambda a: a[:, 0],
            "mean": lambda a: a[:, 1 + NUM_REGISTERS :].mean(dim=1),
            "pooler": lambda a: a,
        }[pool](activation)
        torch.testing.assert_close(tokens[:, position], expected)


@pytest.mark.parametrize("model_type", [*TABLE_BACKBONES, *OTHER_BACKBONES])
def test_patches_and_special_tokens_of_a_real_forward(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    bank = TokenBank.build(range(layout.num_layers + 1), layout.modules, ["cls", "mean"], layout)
    tokens = read(backbone, layout, bank, images())
    assert tokens.shape == (2, len(bank), bank.width(layout))
    activations = activations_of(backbone, layout, bank, images())
    # The special tokens of all these families come first, CLS first of all.
    for position, (layer, module, pool) in enumerate(bank.coordinates):
        activation = activations[layer, module]
        if pool == "cls":
            expected = activation[:, 0]
        elif pool == "pooler":
            expected = activation
        elif activation.ndim == 4:
            expected = activation.mean(dim=(2, 3) if layout.kind(module) == "channels_first" else (1, 2))
        else:
            expected = activation[:, layout.num_prefix_tokens[layer] :].mean(dim=1)
        torch.testing.assert_close(tokens[:, position, : expected.shape[1]], expected)
        assert not tokens[:, position, expected.shape[1] :].any()


def test_a_bank_in_any_order_reads_in_that_order():
    backbone = tiny_backbone("vit")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([1, 2, 3], ["block"], ["cls", "mean"], layout)
    order = [5, 0, 3, 4, 1, 2]
    shuffled = TokenBank(tuple(bank.coordinates[i] for i in order))
    tokens = read(backbone, layout, bank, images())
    assert torch.equal(read(backbone, layout, shuffled, images()), tokens[:, order])


def test_narrow_layers_are_padded_to_the_widest_tapped():
    backbone = tiny_backbone("convnext")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([1, 2, 3], ["block"], ["mean"], layout)
    tokens = read(backbone, layout, bank, images())
    with torch.no_grad():
        hidden = backbone(images(), output_hidden_states=True).hidden_states
    assert tokens.shape == (2, 3, 24)
    for position, width in enumerate([8, 16, 24]):
        torch.testing.assert_close(tokens[:, position, :width], hidden[position + 1].mean(dim=(2, 3)))
        assert torch.equal(tokens[:, position, width:], torch.zeros(2, 24 - width))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_any_size(batch_size):
    pixel_values = images(5)[:batch_size]
    for model_type in ("dinov2", "swin", "convnext"):
        backbone = tiny_backbone(model_type)
        layout = describe_backbone(backbone)
        bank = TokenBank.build([1, 2], ["block", "ln2", "fc1"], ["mean"], layout)
        together = read(backbone, layout, bank, images(5))
        torch.testing.assert_close(read(backbone, layout, bank, pixel_values), together[:batch_size])


@pytest.mark.parametrize("batching", ["windows", "packed"])
def test_images_that_share_rows_are_told_apart(batching):
    def hidden_states(pixel_values):
        tokens = patchify(pixel_values)  # (B, 16, D)
        if batching == "packed":
            return [tokens.flatten(0, 1).unsqueeze(0)] * 2
        return [tokens.unflatten(1, (4, 4)).flatten(0, 1)] * 2

    layout = layout_of(widths=(192, 192), batching=batching, reading="hidden_states")
    bank = TokenBank.build([1], ["block"], ["mean"], layout)
    tokens = read(ScriptedBackbone(hidden_states), layout, bank, images(3))
    torch.testing.assert_close(tokens[:, 0], patchify(images(3)).mean(dim=1))


@pytest.mark.parametrize(
    ("name", "shape"), [("pixel_attention_mask", (NUM_PATCHES,)), ("patch_attention_mask", (4, 4))]
)
def test_the_backbone_s_own_patch_mask_reaches_pooling(name, shape):
    class Padded(ScriptedBackbone):
        def forward(self, pixel_values, pixel_attention_mask=None, patch_attention_mask=None, **kwargs):
            given = {"pixel_attention_mask": pixel_attention_mask, "patch_attention_mask": patch_attention_mask}
            assert given[name] is mask
            return super().forward(pixel_values, **kwargs)

    mask = torch.zeros(2, NUM_PATCHES, dtype=torch.bool)
    mask[0, :5], mask[1] = True, True
    mask = mask.unflatten(1, shape)
    layout = layout_of(widths=(192, 192), reading="hidden_states")
    bank = TokenBank.build([1], ["block"], ["mean"], layout)
    tokens = read(Padded(lambda x: [patchify(x)] * 2), layout, bank, images(), **{name: mask})[:, 0]
    patches = patchify(images())
    torch.testing.assert_close(tokens, torch.stack([patches[0, :5].mean(dim=0), patches[1].mean(dim=0)]))


def test_backbone_arguments_reach_its_forward():
    backbone = tiny_backbone("vit")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([2], ["block"], ["mean"], layout)
    backbone.embeddings.mask_token = torch.nn.Parameter(torch.ones(1, 1, HIDDEN_SIZE))
    masked = torch.zeros(2, NUM_PATCHES, dtype=torch.bool)
    masked[:, :3] = True
    plain = read(backbone, layout, bank, images())
    assert (plain - read(backbone, layout, bank, images(), bool_masked_pos=masked)).abs().max() > 1e-3


def test_gradients_flow_through_the_bank():
    backbone = tiny_backbone("dinov2")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([1], ["block"], ["cls", "mean"], layout)
    read_bank(backbone, layout, bank, images()).square().sum().backward()
    assert backbone.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    assert (
        backbone.encoder.layer[-1].norm2.weight.grad is None or not backbone.encoder.layer[-1].norm2.weight.grad.any()
    )


# ---- the patches that differ most from their mean ---------------------------------------------------------------


def test_top_patches_are_those_whose_direction_is_furthest_from_the_mean():
    tokens = torch.randn(3, 1 + NUM_PATCHES, WIDTH) + 1
    patches = tokens[:, 1:].double().numpy()
    mean = patches.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(patches, axis=-1) * np.linalg.norm(mean, axis=-1)
    order = ((patches * mean).sum(axis=-1) / norms).argsort(axis=1)
    pools = [f"top {rank}" for rank in range(5)]
    found = pool_activation(tokens, special_layout("vit"), BLOCK, ["cls", *pools], 3)
    assert torch.equal(found[:, 0], tokens[:, 0])
    for row in range(3):
        assert torch.equal(found[row, 1:], tokens[row, 1:][order[row, :5]])
    assert torch.equal(pool_activation(tokens, special_layout("vit"), BLOCK, ["top 3"], 3), found[:, 4:5])
    every = pool_activation(tokens, special_layout("vit"), BLOCK, [f"top {n}" for n in range(NUM_PATCHES)], 3)
    torch.testing.assert_close(every.sum(dim=1), tokens[:, 1:].sum(dim=1))


def test_top_patches_need_as_many_patches_as_there_were():
    with pytest.raises(
        LayerFusionError, match=r"the bank has 20 of the patches of 'block' at layer 1 .* give 16: they"
    ):
        pool_activation(torch.randn(2, 17, WIDTH), special_layout("vit"), BLOCK, ["top 19"], 2)
    mask = torch.ones(2, 16)
    with pytest.raises(LayerFusionError, match="16, some of which are padding"):
        pool_activation(torch.randn(2, 17, WIDTH), special_layout("vit"), BLOCK, ["top 0"], 2, mask)


def test_banks_of_top_patches():
    layout = TokenLayout.of_plain_vit(8, 5, image_size=32, patch_size=8)
    bank = TokenBank.build([1, 3, 5], ["block"], ["cls", "top:3@middle"], layout)
    assert bank.names[1:5] == ["layer 3 · block · cls", *(f"layer 3 · block · top {rank}" for rank in range(3))]
    assert len(bank) == 6
    assert bank.select(pools=["top:2"]).names == ["layer 3 · block · top 0", "layer 3 · block · top 1"]
    assert [group.pool for group in bank.groups] == ["cls", "cls", "top patches", "cls"]
    assert len(TokenBank.build([1], ["block"], ["top:99"], layout)) == 16, "all that there are"
    assert len(TokenBank.build([1], ["block"], ["top:99"], layout, [64, 64])) == 64
    with pytest.raises(LayerFusionError, match=re.escape("no token of the bank has pool 'top:2'; it has ['mean']")):
        TokenBank.build([1], ["block"], ["mean"], layout).select(pools=["top:2"])


@pytest.mark.parametrize("pool", ["top:0", "top:", "top:-1", "top:1.5", "top:02", "top:999999", "top 3", "top:٢"])
def test_other_names_stand_for_no_top_patches(pool):
    with pytest.raises(LayerFusionError, match=re.escape(f"pools {pool!r} is unknown: choose from")):
        LayerFusionConfig(pools=["cls", pool])


def test_a_head_reads_top_patches_live_as_from_the_bank():
    model = build_attending_model(pools=["cls", "mean", "top:3@middle"])
    assert model.config.token_names.count("layer 2 · block · top 2") == 1
    pixels = images()
    with torch.no_grad():
        live = model.eval()(pixel_values=pixels)
        tokens = model.extract_layer_features(pixels)
        torch.testing.assert_close(model(layer_features=tokens).logits, live.logits)
    assert live.logits.std() > 0
