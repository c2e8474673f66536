"""Taps by value, what is a special token, and what pooling does with each token."""

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from modeling_helpers import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_PATCHES,
    NUM_REGISTERS,
    OTHER_BACKBONES,
    TABLE_BACKBONES,
    TINY,
    ScriptedBackbone,
    images,
    patchify,
    randomise,
    tiny_backbone,
)
from torch import nn
from transformers import BeitConfig, BeitModel

from hf_layerfusion import LayerFusionError, TokenBank
from hf_layerfusion.backbones import describe_backbone
from hf_layerfusion.pooling import TokenLayout, pad_width, pool_activation
from hf_layerfusion.reader import read_bank
from hf_layerfusion.taps import FAMILIES, available_modules, count_layers, read_taps

ALL_BLOCKS = [(layer, "block") for layer in range(NUM_LAYERS + 1)]
ALL_LN2 = [(layer, "ln2") for layer in range(1, NUM_LAYERS + 1)]
FINAL_NORM = (NUM_LAYERS, "final_norm")


def keep(tap, activation):
    return activation


def read(backbone, taps, pixel_values, **kwargs):
    with torch.no_grad():
        return read_taps(backbone, taps, keep, pixel_values, **kwargs)


# ---- by hand: every block from its own submodules ----------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """How a family computes, written out here without looking at the tap table."""

    embed: Callable
    blocks: Callable
    norm1: str
    norm2: str
    attend: Callable
    scale1: Callable
    scale2: Callable
    final_norm: Callable


def _identity(block):
    return 1.0


def _layer_scale(number):
    return lambda block: getattr(block, f"layer_scale{number}").lambda1


_VIT = Arithmetic(
    embed=lambda model, x: model.embeddings(x),
    blocks=lambda model: model.layers,
    norm1="layernorm_before",
    norm2="layernorm_after",
    attend=lambda _, block, h, __: block.attention(h, None),
    scale1=_identity,
    scale2=_identity,
    final_norm=lambda model: model.layernorm,
)
_DINOV2 = Arithmetic(
    embed=lambda model, x: model.embeddings(x),
    blocks=lambda model: model.encoder.layer,
    norm1="norm1",
    norm2="norm2",
    attend=lambda _, block, h, __: block.attention(h),
    scale1=_layer_scale(1),
    scale2=_layer_scale(2),
    final_norm=lambda model: model.layernorm,
)
_SIGLIP = Arithmetic(
    embed=lambda model, x: model.embeddings(x),
    blocks=lambda model: model.encoder.layers,
    norm1="layer_norm1",
    norm2="layer_norm2",
    attend=lambda _, block, h, __: block.self_attn(hidden_states=h, attention_mask=None),
    scale1=_identity,
    scale2=_identity,
    final_norm=lambda model: model.post_layernorm,
)


def _replaced(base, **changes):
    return Arithmetic(**{**base.__dict__, **changes})


def _beit_attention(model, block, h, x):
    grid = (x.shape[-2] // model.config.patch_size, x.shape[-1] // model.config.patch_size)
    bias = block.relative_position_bias(grid, x.shape[-1] != model.config.image_size, dim_size=h.shape[1])
    return block.attention(h, attention_mask=bias)


BY_HAND = {
    "vit": _VIT,
    "deit": _VIT,
    "beit": _replaced(
        _VIT, attend=_beit_attention, scale1=lambda block: block.lambda_1, scale2=lambda block: block.lambda_2
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _replaced(
        _DINOV2,
        blocks=lambda model: model.model.layer,
        attend=lambda model, block, h, x: block.attention(
            h, attention_mask=None, position_embeddings=model.rope_embeddings(x)
        ),
        final_norm=lambda model: model.norm,
    ),
    "siglip_vision_model": _SIGLIP,
    "clip_vision_model": _replaced(_SIGLIP, embed=lambda model, x: model.pre_layrnorm(model.embeddings(x))),
}


def activations_by_hand(model, pixel_values):
    """Every tap of a model, from its submodules: attention, residual, LN2, MLP, residual, final norm."""
    rules = BY_HAND[model.config.model_type]
    with torch.no_grad():
        hidden = rules.embed(model, pixel_values)
        taps = {(0, "block"): hidden}
        for layer, block in enumerate(rules.blocks(model), start=1):
            attended = rules.attend(model, block, block.get_submodule(rules.norm1)(hidden), pixel_values)
            if isinstance(attended, tuple):  # with the attention weights, depending on family and version
                attended = attended[0]
            hidden = hidden + rules.scale1(block) * attended
            taps[layer, "ln2"] = block.get_submodule(rules.norm2)(hidden)
            hidden = hidden + rules.scale2(block) * block.mlp(taps[layer, "ln2"])
            taps[layer, "block"] = hidden
        taps[layer, "final_norm"] = rules.final_norm(model)(hidden)
    return taps


def test_every_family_of_the_table_is_compared_by_value():
    assert set(FAMILIES) == set(BY_HAND) == set(TABLE_BACKBONES)


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_every_tap_has_the_value_computed_by_hand(model_type):
    backbone = tiny_backbone(model_type, torch.float64)
    pixel_values = images(dtype=torch.float64)
    expected = activations_by_hand(backbone, pixel_values)
    assert set(expected) == {*ALL_BLOCKS, *ALL_LN2, FINAL_NORM}
    read_out = read(backbone, expected, pixel_values)
    for tap, activation in expected.items():
        torch.testing.assert_close(read_out[tap], activation, rtol=1e-10, atol=1e-10, msg=lambda m, t=tap: f"{t}: {m}")
    # All of them differ from one another, so that no tap can stand in for another.
    values = list(expected.values())
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            assert (first - second).abs().max() > 0.05


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_hooks_equal_output_hidden_states(model_type):
    backbone = tiny_backbone(model_type)
    with torch.no_grad():
        outputs = backbone(images(), output_hidden_states=True)
    hidden = read(backbone, ALL_BLOCKS, images())
    assert len(outputs.hidden_states) == NUM_LAYERS + 1
    for layer, expected in enumerate(outputs.hidden_states):
        torch.testing.assert_close(hidden[layer, "block"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_final_norm_is_the_model_s_own_output(model_type):
    backbone = tiny_backbone(model_type)
    with torch.no_grad():
        outputs = backbone(images())
    final = read(backbone, [FINAL_NORM], images())[FINAL_NORM]
    if model_type == "clip_vision_model":  # CLIP itself normalises the CLS token only
        torch.testing.assert_close(final[:, 0], outputs.pooler_output, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(final, outputs.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_beit_for_mean_pooling_has_no_final_norm():
    # Most published BEiT weights: the last norm is an identity, and another one stands in the pooler, after the mean.
    backbone = randomise(BeitModel(BeitConfig(**TINY, use_mean_pooling=True))).eval()
    hidden = read(backbone, [(NUM_LAYERS, "block"), FINAL_NORM], images())
    with torch.no_grad():
        expected = backbone(images()).last_hidden_state
    assert torch.equal(hidden[FINAL_NORM], expected)
    assert torch.equal(hidden[FINAL_NORM], hidden[NUM_LAYERS, "block"])


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_other_image_sizes_work_and_are_right(model_type):
    backbone = tiny_backbone(model_type)
    pixel_values = images(size=48)
    options = {} if model_type.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = backbone(pixel_values, output_hidden_states=True, **options).hidden_states
    num_special = len(describe_backbone(backbone).special_tokens)
    hidden = read(backbone, [(0, "block"), (NUM_LAYERS, "block")], pixel_values)
    assert hidden[0, "block"].shape == (2, 36 + num_special, HIDDEN_SIZE)
    for layer in (0, NUM_LAYERS):
        torch.testing.assert_close(hidden[layer, "block"], expected[layer], rtol=1e-5, atol=1e-5)


def test_other_image_sizes_work_without_a_table_row():
    backbone = tiny_backbone("vit_msn")
    with torch.no_grad():
        expected = backbone(images(size=48), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    hidden = read(backbone, [(2, "block")], images(size=48))
    torch.testing.assert_close(hidden[2, "block"], expected[2])


def test_pixels_are_cast_to_the_backbone_s_dtype():
    hidden = read(tiny_backbone("vit", torch.bfloat16), [(1, "block")], images())
    assert hidden[1, "block"].dtype == torch.bfloat16


# ---- backbones that are read through output_hidden_states --------------------------------------------------------


@pytest.mark.parametrize("model_type", OTHER_BACKBONES)
def test_hidden_states_road(model_type):
    backbone = tiny_backbone(model_type)
    with torch.no_grad():
        outputs = backbone(images(), output_hidden_states=True)
    num_layers = len(outputs.hidden_states) - 1
    assert count_layers(backbone, images()) == num_layers
    hidden = read(backbone, [(layer, "block") for layer in range(num_layers + 1)], images())
    for layer, expected in enumerate(outputs.hidden_states):
        assert torch.equal(hidden[layer, "block"], expected)


@pytest.mark.parametrize("model_type", sorted(OTHER_BACKBONES.keys() - {"sam_vision_model"}))
def test_final_norm_without_a_table_row_is_the_last_hidden_state(model_type):
    backbone = tiny_backbone(model_type)
    last = count_layers(backbone, images())
    with torch.no_grad():
        expected = backbone(images()).last_hidden_state
    assert torch.equal(read(backbone, [(last, "final_norm")], images())[last, "final_norm"], expected)


def test_a_last_hidden_state_of_another_shape_is_refused():
    # SAM's neck turns (B, H, W, D) into (B, D', H, W).
    message = (
        "SamVisionModel returns a last_hidden_state of shape (2, 16, 4, 4) beside hidden states of (2, 4, 4, 32): "
        "use modules=['block'] with this backbone"
    )
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        read(tiny_backbone("sam_vision_model"), [FINAL_NORM], images())


def test_available_modules():
    assert available_modules(tiny_backbone("dinov2")) == ("block", "ln2", "final_norm")
    assert available_modules(tiny_backbone("convnext")) == ("block", "final_norm")


@pytest.mark.parametrize(
    ("model_type", "module"), [("vit_msn", "ln2"), ("convnext", "ln2"), ("vit", "fc1"), ("resnet", "fc1")]
)
def test_a_module_that_cannot_be_read_is_named(model_type, module):
    backbone = tiny_backbone(model_type)
    message = (
        f"module '{module}' cannot be read in a '{model_type}' backbone: choose from {available_modules(backbone)}"
    )
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        read(backbone, [(1, "block"), (1, module)], images())


def test_no_hidden_states_is_an_error():
    with pytest.raises(LayerFusionError, match="ScriptedBackbone returns no hidden states, so its layers cannot be"):
        read(ScriptedBackbone(None), [(1, "block")], images())


def test_a_forward_without_the_argument_is_an_error():
    class Deaf(ScriptedBackbone):
        def forward(self, pixel_values):
            return pixel_values

    message = "Deaf cannot be read from pixel_values with output_hidden_states=True: .*unexpected keyword argument"
    with pytest.raises(LayerFusionError, match=message):
        read(Deaf(None), [(1, "block")], images())


# ---- hooks leave nothing behind ----------------------------------------------------------------------------------


def _hooks(model):
    return [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_hooks_are_gone_after_a_forward(model_type):
    backbone = tiny_backbone(model_type)
    before = _hooks(backbone)
    seen = []

    def count_hooks(tap, activation):
        seen.append(_hooks(backbone) != before)
        return activation

    with torch.no_grad():
        read_taps(backbone, [*ALL_BLOCKS, *ALL_LN2, FINAL_NORM], count_hooks, images())
    assert seen == [True] * (2 * NUM_LAYERS + 2)  # they were there
    assert _hooks(backbone) == before


def test_hooks_are_gone_after_a_forward_that_raises():
    backbone = tiny_backbone("vit")
    before = _hooks(backbone)
    with pytest.raises(RuntimeError):
        read(backbone, ALL_BLOCKS, images()[:, :, :, :8].expand(2, 3, 5, 8))

    def fail(tap, activation):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        read_taps(backbone, ALL_BLOCKS, fail, images())
    with pytest.raises(LayerFusionError, match=f"layer {NUM_LAYERS + 1} cannot be read"):
        read(backbone, [(1, "block"), (NUM_LAYERS + 1, "block")], images())
    assert _hooks(backbone) == before


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_activations_are_not_kept(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    references, alive = [], []

    def pool(tap, activation):
        alive.append(sum(reference() is not None for reference in references))
        references.append(weakref.ref(activation))
        return pool_activation(activation, layout, ["mean"])

    with torch.no_grad():
        pooled = read_taps(backbone, ALL_BLOCKS, pool, images())
    assert len(references) == NUM_LAYERS + 1
    assert all(reference() is None for reference in references)
    assert max(alive) <= 2  # at most what the running block itself holds, however deep the model is
    for tokens in pooled.values():
        assert tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()


def test_the_cls_token_does_not_hold_its_activation():
    activation = torch.randn(2, 17, 8)
    pooled = pool_activation(activation, TokenLayout("tokens", [8, 8], [0]), ["cls"])
    assert pooled.untyped_storage().nbytes() == 2 * 8 * 4
    assert pooled.is_contiguous()


def test_gradients_flow_to_an_unfrozen_backbone():
    backbone = tiny_backbone("dinov2")
    pooled = read_taps(backbone, [(1, "block"), (NUM_LAYERS, "ln2")], keep, images())
    sum(value.square().sum() for value in pooled.values()).backward()
    assert backbone.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    assert backbone.encoder.layer[-1].norm2.weight.grad.abs().max() > 0


# ---- which tokens are special ------------------------------------------------------------------------------------

LAYOUTS = {
    "vit": ("tokens", [32] * 4, [0]),
    "beit": ("tokens", [32] * 4, [0]),
    "clip_vision_model": ("tokens", [32] * 4, [0]),
    "deit": ("tokens", [32] * 4, [0, 1]),  # CLS and distillation
    "dinov2": ("tokens", [32] * 4, [0]),
    "dinov2_with_registers": ("tokens", [32] * 4, list(range(1 + NUM_REGISTERS))),
    "dinov3_vit": ("tokens", [32] * 4, list(range(1 + NUM_REGISTERS))),
    "siglip_vision_model": ("tokens", [32] * 4, []),
    "vit_msn": ("tokens", [32] * 4, [0]),
    "swin": ("tokens", [8, 16, 16], []),
    "convnext": ("channels_first", [8, 8, 16, 24, 32], []),
    "resnet": ("channels_first", [8, 8, 16, 24, 32], []),
    "sam_vision_model": ("channels_last", [32] * 4, []),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_describe_backbone(model_type, dtype):
    layout = describe_backbone(tiny_backbone(model_type, dtype))
    kind, widths, special_tokens = LAYOUTS[model_type]
    assert layout == TokenLayout(kind, widths, special_tokens)
    assert layout.num_layers == len(widths) - 1
    assert layout.has_cls == bool(special_tokens)
    assert TokenLayout(**layout.to_dict()) == layout


def test_every_tiny_backbone_is_described():
    assert LAYOUTS.keys() == TABLE_BACKBONES.keys() | OTHER_BACKBONES.keys()


def test_describing_leaves_the_model_as_it_was():
    backbone = tiny_backbone("resnet").train()  # BatchNorm would move in training mode
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    state = torch.get_rng_state()
    describe_backbone(backbone)
    assert backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def _special_at_the_end(pixel_values):
    tokens = patchify(pixel_values)
    constant = torch.arange(3.0)[None, :, None].expand(tokens.shape[0], 3, tokens.shape[2])
    return [torch.cat([tokens, constant], dim=1)] * 3


def test_special_tokens_are_found_wherever_they_stand():
    backbone = ScriptedBackbone(_special_at_the_end, image_size=32, patch_size=8)
    layout = describe_backbone(backbone)
    assert layout == TokenLayout("tokens", [192] * 3, [16, 17, 18])


UNSUPPORTED = {
    "token count does not fit the patches": (
        lambda x: [torch.cat([patchify(x), patchify(x)[:, :3]], dim=1)] * 2,
        "cannot tell the patch tokens of ScriptedBackbone: its hidden states have shapes "
        "[(2, 19, 192), (2, 19, 192)] and 0 special tokens",
    ),
    "windows in the batch axis": (
        lambda x: [patchify(x).repeat(4, 1, 1)] * 2,
        "cannot tell the patch tokens of ScriptedBackbone: its hidden states have shapes [(8, 16, 192)",
    ),
    "the same for every image": (lambda _: [torch.ones(2, 16, 8)] * 2, "and 16 special tokens"),
    "no grid": (lambda _: [torch.randn(2, 16, 8), torch.randn(2, 7, 8)], "(2, 16, 8), (2, 7, 8)] and 0 special"),
    "vectors": (
        lambda x: [x.flatten(1)] * 2,
        "the hidden states of ScriptedBackbone have shapes [(2, 3072)], neither tokens (B, T, D) nor maps",
    ),
    "mixed": (lambda x: [patchify(x), x], "neither tokens (B, T, D) nor maps: this backbone is not supported yet"),
    "none": (None, "ScriptedBackbone returns no hidden states"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_layout_that_cannot_be_told_is_refused(case):
    hidden_states, message = UNSUPPORTED[case]
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        describe_backbone(ScriptedBackbone(hidden_states, image_size=32, patch_size=8))


# ---- pooling -----------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = {
    "vit": (0,),
    "deit": (0, 1),
    "registers": (0, 1, 2, 3, 4),
    "none": (),
    "at the end": (16, 17),
    "around": (2, 5, 9),
}


@pytest.mark.parametrize("case", SPECIAL_TOKENS)
def test_each_token_changes_what_it_should(case):
    special = SPECIAL_TOKENS[case]
    num_tokens = NUM_PATCHES + len(special)
    layout = TokenLayout("tokens", [8], special)
    pools = ["cls", "mean"] if special else ["mean"]
    tokens = torch.randn(2, num_tokens, 8, dtype=torch.float64)
    before = pool_activation(tokens, layout, pools)
    assert before.shape == (2, len(pools), 8)
    if special:
        assert torch.equal(before[:, 0], tokens[:, special[0]])
    for position in range(num_tokens):
        changed = tokens.clone()
        changed[1, position] += 1
        moved = pool_activation(changed, layout, pools) - before
        assert torch.equal(moved[0], torch.zeros_like(moved[0]))  # the other image stays
        if special:
            expected = float(position == special[0])
            torch.testing.assert_close(moved[1, 0], torch.full((8,), expected).double())
        share = 0.0 if position in special else 1 / NUM_PATCHES
        torch.testing.assert_close(moved[1, -1], torch.full((8,), share).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_type", TABLE_BACKBONES)
def test_pools_of_a_real_forward(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    hidden = read(backbone, [(2, "block")], images())[2, "block"]
    assert hidden.shape[1] == NUM_PATCHES + len(layout.special_tokens)
    # Special tokens come first in all of these families.
    torch.testing.assert_close(pool_activation(hidden, layout, ["mean"])[:, 0], hidden[:, -NUM_PATCHES:].mean(dim=1))
    if layout.has_cls:
        assert torch.equal(pool_activation(hidden, layout, ["cls"])[:, 0], hidden[:, 0])


def test_maps_pool_alike_in_both_orders():
    maps = torch.randn(2, 6, 4, 5)
    first = pool_activation(maps, TokenLayout("channels_first", [6]), ["mean"])
    last = pool_activation(maps.permute(0, 2, 3, 1), TokenLayout("channels_last", [6]), ["mean"])
    assert first.shape == (2, 1, 6)
    torch.testing.assert_close(first[:, 0], maps.mean(dim=(2, 3)))
    torch.testing.assert_close(last, first)


def test_pools_keep_their_order():
    tokens, layout = torch.randn(2, 17, 8), TokenLayout("tokens", [8], [0])
    forward, backward = (pool_activation(tokens, layout, pools) for pools in (["cls", "mean"], ["mean", "cls"]))
    assert torch.equal(forward.flip(1), backward)


@pytest.mark.parametrize("kind", ["tokens", "channels_first", "channels_last"])
def test_no_cls_no_pooling_of_it(kind):
    activation = torch.randn(2, 16, 8) if kind == "tokens" else torch.randn(2, 4, 4, 8)
    with pytest.raises(LayerFusionError, match=re.escape("this backbone has no CLS token: use pools=['mean']")):
        pool_activation(activation, TokenLayout(kind, [8]), ["cls"])


def test_unknown_pool():
    with pytest.raises(LayerFusionError, match=re.escape("pool 'max' is unknown: use 'cls' or 'mean'")):
        pool_activation(torch.randn(2, 17, 8), TokenLayout("tokens", [8], [0]), ["max"])


def test_unknown_layout():
    with pytest.raises(LayerFusionError, match="token layout kind 'grid' is unknown: use 'tokens', 'channels_first'"):
        TokenLayout("grid", [8])


def test_pad_width():
    tokens = torch.randn(2, 3, 4)
    padded = pad_width(tokens, 6)
    assert torch.equal(padded[..., :4], tokens)
    assert torch.equal(padded[..., 4:], torch.zeros(2, 3, 2))


# ---- the bank ----------------------------------------------------------------------------------------------------


def test_bank_tokens_stand_at_their_coordinates():
    backbone = tiny_backbone("dinov2_with_registers", torch.float64)
    pixel_values, layout = images(dtype=torch.float64), describe_backbone(backbone)
    bank = TokenBank.build([0, 2, 3], ["block", "ln2", "final_norm"], ["cls", "mean"], NUM_LAYERS)
    with torch.no_grad():
        tokens = read_bank(backbone, layout, bank, pixel_values)
    by_hand = activations_by_hand(backbone, pixel_values)
    assert tokens.shape == (2, 12, HIDDEN_SIZE)
    for position, (layer, module, pool) in enumerate(bank.coordinates):
        activation = by_hand[layer, module]
        expected = activation[:, 0] if pool == "cls" else activation[:, 1 + NUM_REGISTERS :].mean(dim=1)
        torch.testing.assert_close(tokens[:, position], expected, rtol=1e-10, atol=1e-10)


def test_a_bank_in_any_order_reads_in_that_order():
    backbone = tiny_backbone("vit")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([1, 2, 3], ["block"], ["cls", "mean"], NUM_LAYERS)
    order = [5, 0, 3, 4, 1, 2]
    shuffled = TokenBank(tuple(bank.coordinates[i] for i in order))
    with torch.no_grad():
        tokens = read_bank(backbone, layout, bank, images())
        assert torch.equal(read_bank(backbone, layout, shuffled, images()), tokens[:, order])


def test_narrow_layers_are_padded_to_the_widest_tapped():
    backbone = tiny_backbone("convnext")
    layout = describe_backbone(backbone)
    bank = TokenBank.build([1, 2, 3], ["block"], ["mean"], layout.num_layers)
    with torch.no_grad():
        tokens = read_bank(backbone, layout, bank, images())
        hidden = backbone(images(), output_hidden_states=True).hidden_states
    assert tokens.shape == (2, 3, 24)
    for position, width in enumerate([8, 16, 24]):
        torch.testing.assert_close(tokens[:, position, :width], hidden[position + 1].mean(dim=(2, 3)))
        assert torch.equal(tokens[:, position, width:], torch.zeros(2, 24 - width))


def test_backbone_arguments_reach_its_forward():
    backbone = tiny_backbone("vit")
    bank = TokenBank.build([NUM_LAYERS], ["block"], ["mean"], NUM_LAYERS)
    layout = describe_backbone(backbone)
    masked = torch.zeros(2, NUM_PATCHES, dtype=torch.bool)
    masked[:, :3] = True
    backbone.embeddings.mask_token = nn.Parameter(torch.ones(1, 1, HIDDEN_SIZE))
    with torch.no_grad():
        plain = read_bank(backbone, layout, bank, images())
        with_mask = read_bank(backbone, layout, bank, images(), bool_masked_pos=masked)
    assert (plain - with_mask).abs().max() > 1e-3
