"""Every tap by value, against activations computed by hand from each block's own submodules; and what hooks leave."""

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from modeling_helpers import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_PATCHES,
    OTHER_BACKBONES,
    TABLE_BACKBONES,
    TINY,
    ScriptedBackbone,
    images,
    patchify,
    randomise,
    tiny_backbone,
)
from torch.nn import functional as F
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SamVisionConfig,
    SamVisionModel,
    SwinConfig,
    SwinModel,
)

from hf_layerfusion import LayerFusionError
from hf_layerfusion.layout import TapLayout, TokenLayout
from hf_layerfusion.pooling import pool_activation
from hf_layerfusion.probe import describe_backbone
from hf_layerfusion.taps import read_taps

BLOCK_POINTS = ("ln1", "attention", "residual", "ln2", "fc1", "activation", "fc2", "block")
FINAL_NORM = (NUM_LAYERS, "final_norm")


def keep(tap, activation):
    return activation


def read(backbone, taps, pixel_values, layout=None, **kwargs):
    layout = layout or describe_backbone(backbone)
    with torch.no_grad():
        return read_taps(backbone, layout, taps, keep, pixel_values, **kwargs)


def taps_of(layout):
    """Every tap that exists."""
    layers = range(layout.num_layers + 1)
    return [(layer, module) for layer in layers for module in layout.modules if layout.width(layer, module)]


# ---- by hand -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vit:
    """How a family computes, written out here without looking at the library's table of names.

    `attend(model, block, h, x)` is the attention of normed tokens `h` for images `x`, `activate(block, normed, hidden)`
    what goes into FC2, `scale1` and `scale2` the layer scales.
    """

    embed: Callable = lambda model, x: model.embeddings(x)
    blocks: str = "layers"
    norm1: str = "layernorm_before"
    attend: Callable = lambda _, block, h, __: block.attention(h, None)[0]
    scale1: Callable = lambda _: 1.0
    norm2: str = "layernorm_after"
    fc1: str = "mlp.fc1"
    activate: Callable = lambda _, __, hidden: F.gelu(hidden)
    fc2: str = "mlp.fc2"
    scale2: Callable = lambda _: 1.0
    final_norm: str | None = "layernorm"
    pool: Callable | None = None

    def __call__(self, model, x):
        stream = self.embed(model, x)
        taps = {(0, "block"): stream}
        blocks = model.get_submodule(self.blocks)
        for layer, block in enumerate(blocks, start=1):
            ln1 = block.get_submodule(self.norm1)(stream)
            attention = self.attend(model, block, ln1, x)
            residual = stream + self.scale1(block) * attention
            ln2 = block.get_submodule(self.norm2)(residual)
            fc1 = block.get_submodule(self.fc1)(ln2)
            activation = self.activate(block, ln2, fc1)
            fc2 = block.get_submodule(self.fc2)(activation)
            stream = residual + self.scale2(block) * fc2
            values = (ln1, attention, residual, ln2, fc1, activation, fc2, stream)
            taps |= {(layer, point): value for point, value in zip(BLOCK_POINTS, values, strict=True)}
        if self.final_norm is not None:
            taps[len(blocks), "final_norm"] = model.get_submodule(self.final_norm)(stream)
        if self.pool is not None:
            taps[len(blocks), "pooler"] = self.pool(model, taps[len(blocks), "final_norm"])
        return taps


def _first_token(model, normed):
    return normed[:, 0]


def _lambdas(vit):
    return replace(vit, scale1=lambda block: block.lambda_1, scale2=lambda block: block.lambda_2)


def _beit_attention(model, block, h, x):
    bias = block.relative_position_bias((x.shape[-2] // 8, x.shape[-1] // 8), False, dim_size=h.shape[1])
    return block.attention(h, attention_mask=bias)[0]


def _mae_embeddings(model, x):
    """All patches, in the order in which they stand in the image."""
    embeddings, positions = model.embeddings, model.embeddings.position_embeddings
    patches = embeddings.patch_embeddings.projection(x).flatten(2).transpose(1, 2) + positions[:, 1:]
    cls = embeddings.cls_token + positions[:, :1]
    return torch.cat([cls.expand(len(x), -1, -1), patches], dim=1)


def _silu_gate(name):
    return lambda block, normed, gate: F.silu(gate) * block.get_submodule(name)(normed)


def _split_silu_gate(block, normed, both):
    gate, value = both.chunk(2, dim=-1)
    return F.silu(gate) * value


_DINOV2 = Vit(
    blocks="encoder.layer",
    norm1="norm1",
    attend=lambda _, block, h, __: _first(block.attention(h)),
    scale1=lambda block: block.layer_scale1.lambda1,
    norm2="norm2",
    scale2=lambda block: block.layer_scale2.lambda1,
    pool=_first_token,
)
_DINOV3 = replace(
    _DINOV2,
    blocks="model.layer",
    attend=lambda model, block, h, x: block.attention(
        h, attention_mask=None, position_embeddings=model.rope_embeddings(x)
    )[0],
    fc1="mlp.up_proj",
    fc2="mlp.down_proj",
    final_norm="norm",
)
_SIGLIP = Vit(
    blocks="encoder.layers",
    norm1="layer_norm1",
    attend=lambda _, block, h, __: block.self_attn(hidden_states=h, attention_mask=None)[0],
    norm2="layer_norm2",
    activate=lambda _, __, hidden: F.gelu(hidden, approximate="tanh"),
    final_norm="post_layernorm",
    pool=lambda model, normed: model.head(normed),
)
_SAM = Vit(
    embed=lambda model, x: model.vision_encoder.patch_embed(x) + model.vision_encoder.pos_embed,
    blocks="vision_encoder.layers",
    norm1="layer_norm1",
    attend=lambda _, block, h, __: block.attn(h)[0],
    norm2="layer_norm2",
    fc1="mlp.lin1",
    fc2="mlp.lin2",
    final_norm=None,
)


def _first(output):
    """The attention's output, alone or with the attention weights, depending on the version of transformers."""
    return output[0] if isinstance(output, tuple) else output


def partition(maps, size, shift):
    """Windows `(B * n, size^2, D)` of maps `(B, H, W, D)`, zero-padded at the right and at the bottom, then shifted."""
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, 0, -width % size, 0, -height % size)).roll((-shift, -shift), dims=(1, 2))
    return maps.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge(windows, size, shift, grid):
    """The maps that `partition` took apart."""
    rows, columns = (-(-length // size) for length in grid)
    maps = windows.unflatten(1, (size, size)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    maps = maps.flatten(3, 4).flatten(1, 2).roll((shift, shift), dims=(1, 2))
    return maps[:, : grid[0], : grid[1]]


def swin_attention(block, h, grid, size, shift):
    """Attention inside windows; of a shifted map, what has been rolled around the edge is hidden from the rest."""
    windows = partition(h.unflatten(1, grid), size, shift)
    mask = None
    if shift:
        height, width = (length + -length % size for length in grid)
        rolled = (torch.arange(height) >= height - shift)[:, None] * 2 + (torch.arange(width) >= width - shift)
        sides = partition(rolled.roll((shift, shift), dims=(0, 1))[None, :, :, None], size, shift).flatten(1)
        mask = -100.0 * (sides[:, :, None] != sides[:, None]).to(h.dtype)
    attended = block.attention(windows, mask)[0]
    return merge(attended, size, shift, grid).flatten(1, 2)


def swin_by_hand(model, x):
    """Layers are stages: `block` is a stage's output, behind the downsampling, the rest is the stage's last block."""
    stream, grid = model.embeddings(x)
    taps = {(0, "block"): stream}
    for layer, stage in enumerate(model.encoder.layers, start=1):
        for number, block in enumerate(stage.blocks):
            size = model.config.window_size
            shift = size // 2 if number % 2 == 1 and size < min(grid) else 0
            ln1 = block.layernorm_before(stream)
            residual = stream + swin_attention(block, ln1, grid, size, shift)
            attention = residual - stream
            ln2 = block.layernorm_after(residual)
            fc1 = block.mlp.fc1(ln2)
            activation = F.gelu(fc1)
            fc2 = block.mlp.fc2(activation)
            stream = residual + fc2
        if stage.downsample is not None:
            stream = stage.downsample(stream, grid)
            grid = (grid[0] // 2, grid[1] // 2)
        values = (ln1, attention, residual, ln2, fc1, activation, fc2, stream)
        taps |= {(layer, point): value for point, value in zip(BLOCK_POINTS, values, strict=True)}
    taps[layer, "final_norm"] = model.layernorm(stream)
    return taps


def convnext_by_hand(model, x):
    """No attention, no first residual; channels last inside a block, channels first outside."""
    stream = model.embeddings(x)
    taps = {(0, "block"): stream}
    for layer, stage in enumerate(model.encoder.stages, start=1):
        for step in stage.downsampling_layer:
            stream = step(stream)
        for block in stage.layers:
            ln2 = block.layernorm(block.dwconv(stream).permute(0, 2, 3, 1))
            fc1 = block.pwconv1(ln2)
            activation = F.gelu(fc1)
            fc2 = block.pwconv2(activation)
            stream = stream + (block.layer_scale_parameter * fc2).permute(0, 3, 1, 2)
        inside = {"ln2": ln2, "fc1": fc1, "activation": activation, "fc2": fc2, "block": stream}
        taps |= {(layer, point): value for point, value in inside.items()}
    taps[layer, "pooler"] = model.layernorm(stream.mean(dim=(2, 3)))
    return taps


def sam_windows_by_hand(model, x):
    """Blocks 0 and 2 attend inside windows of 3, block 1 over the whole map of 4 x 4."""

    def attend(model, block, h, x):
        if not block.window_size:
            return block.attn(h)[0]
        attended = block.attn(partition(h, 3, 0).unflatten(1, (3, 3)))[0]
        return merge(attended.flatten(1, 2), 3, 0, (4, 4))

    return replace(_SAM, attend=attend)(model, x)


BY_HAND = {
    "vit": Vit(),
    "deit": Vit(),
    "vit_msn": Vit(),
    "ijepa": Vit(),
    "vit_mae": Vit(embed=_mae_embeddings),
    "beit": replace(_lambdas(Vit()), attend=_beit_attention),
    "data2vec-vision": replace(
        _lambdas(Vit()),
        embed=lambda model, x: model.embeddings(x)[0],
        blocks="encoder.layer",
        attend=lambda _, block, h, x: block.attention(h, resolution=x.shape[-2:])[0],
        fc1="intermediate.dense",
        fc2="output.dense",
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _DINOV3,
    "siglip_vision_model": _SIGLIP,
    "clip_vision_model": replace(
        _SIGLIP,
        embed=lambda model, x: model.pre_layrnorm(model.embeddings(x)),
        activate=lambda _, __, hidden: hidden * torch.sigmoid(1.702 * hidden),
        pool=_first_token,
    ),
    "aimv2_vision_model": replace(
        _SIGLIP,
        norm1="rms_norm1",
        attend=lambda _, block, h, __: block.attention(hidden_states=h, attention_mask=None)[0],
        norm2="rms_norm2",
        fc1="ffn.gate_proj",
        activate=_silu_gate("ffn.up_proj"),
        fc2="ffn.down_proj",
        final_norm="rms_norm",
    ),
    "sam_vision_model": _SAM,
    "swin": swin_by_hand,
    "convnext": convnext_by_hand,
}

_TINY_RATIO = {name: value for name, value in TINY.items() if name != "intermediate_size"}


def _gated_dinov2():
    model = Dinov2Model(Dinov2Config(**_TINY_RATIO, mlp_ratio=2, use_swiglu_ffn=True))
    # One matrix for gate and values, or, in newer versions of transformers, one for each.
    if hasattr(model.encoder.layer[0].mlp, "weights_in"):
        return model, replace(_DINOV2, fc1="mlp.weights_in", activate=_split_silu_gate, fc2="mlp.weights_out")
    return model, replace(_DINOV2, fc1="mlp.gate_proj", activate=_silu_gate("mlp.up_proj"), fc2="mlp.down_proj")


# Configurations that change what a block computes.
VARIANTS = {
    "dinov2, gated": _gated_dinov2,
    "dinov3_vit, gated": lambda: (
        DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_register_tokens=1, use_gated_mlp=True, hidden_act="silu")),
        replace(_DINOV3, fc1="mlp.gate_proj", activate=_silu_gate("mlp.up_proj")),
    ),
    "sam_vision_model, windows": lambda: (
        SamVisionModel(SamVisionConfig(**_TINY_RATIO, mlp_dim=64, window_size=3, global_attn_indexes=[1])),
        sam_windows_by_hand,
    ),
    # Of the last stage, one window covers the map.
    "swin, windows of 4": lambda: (
        SwinModel(
            SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 1, 2], num_heads=[2, 2, 2], window_size=4)
        ),
        swin_by_hand,
    ),
}


def build(case):
    if case in VARIANTS:
        torch.manual_seed(1234)
        model, by_hand = VARIANTS[case]()
        return randomise(model).double().eval(), by_hand
    return tiny_backbone(case, torch.float64), BY_HAND[case]


@pytest.mark.parametrize("case", [*BY_HAND, *VARIANTS])
def test_every_tap_has_the_value_computed_by_hand(case):
    backbone, by_hand = build(case)
    pixel_values = images(dtype=torch.float64)
    layout = describe_backbone(backbone)
    with torch.no_grad():
        expected = by_hand(backbone, pixel_values)
    assert set(taps_of(layout)) == set(expected)
    found = read(backbone, expected, pixel_values, layout)
    assert found.keys() == expected.keys()
    for tap, activation in expected.items():
        torch.testing.assert_close(found[tap], activation, rtol=1e-10, atol=1e-10, msg=lambda m, t=tap: f"{t}: {m}")
        assert layout.width(*tap) == activation.shape[1 if layout.kind(tap[1]) == "channels_first" else -1]
    # All of them differ from one another, so that no tap can stand in for another.
    values = list(expected.values())
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            assert first.shape != second.shape or (first - second).abs().max() > 0.05


def test_every_vit_and_every_family_with_blocks_is_compared_by_value():
    without_by_value = {"resnet", "swinv2"}  # no blocks, no norms in the usual places
    assert set(BY_HAND) == {*TABLE_BACKBONES, *OTHER_BACKBONES} - without_by_value


# ---- which taps exist --------------------------------------------------------------------------------------------

ALL_POINTS = {*BLOCK_POINTS, "final_norm"}
MODULES_THERE = {
    "vit": ALL_POINTS,
    "dinov2": ALL_POINTS | {"pooler"},
    "clip_vision_model": ALL_POINTS | {"pooler"},
    "sam_vision_model": ALL_POINTS - {"final_norm"},
    "swin": ALL_POINTS,
    "swinv2": {"fc1", "activation", "fc2", "block", "final_norm"},  # post-norm: its norms stand behind the branches
    "convnext": {"ln2", "fc1", "activation", "fc2", "block", "pooler"},
    "resnet": {"block", "pooler"},
}


@pytest.mark.parametrize("model_type", MODULES_THERE)
def test_absent_taps_are_reported_and_refused(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    assert set(layout.modules) == MODULES_THERE[model_type]
    last, name = layout.num_layers, type(backbone).__name__
    for module in (ALL_POINTS | {"pooler"}) - MODULES_THERE[model_type]:
        assert [layout.width(layer, module) for layer in range(last + 1)] == [0] * (last + 1)
        here = [known for known in layout.modules if layout.width(last, known)]
        message = f"module '{module}' cannot be read at layer {last} of {name}: choose from {here}"
        with pytest.raises(LayerFusionError, match=re.escape(message)):
            read(backbone, [(1, "block"), (last, module)], images(), layout)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ((0, "ln1"), "module 'ln1' cannot be read at layer 0 of ViTModel: choose from ['block']"),
        ((1, "final_norm"), "module 'final_norm' cannot be read at layer 1 of ViTModel: choose from ['ln1', 'att"),
        ((2, "fc3"), "module 'fc3' cannot be read at layer 2 of ViTModel"),
        ((NUM_LAYERS + 1, "block"), "layer 4 cannot be read: ViTModel has layers 0 to 3"),
        ((-1, "block"), "layer -1 cannot be read: ViTModel has layers 0 to 3"),
    ],
)
def test_a_tap_that_does_not_exist_is_named(tap, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        read(tiny_backbone("vit"), [tap], images())


def test_a_beit_for_mean_pooling_has_no_final_norm():
    # Most published BEiT weights: the last norm is an identity, and another one stands in the pooler, after the mean.
    layout = describe_backbone(randomise(BeitModel(BeitConfig(**TINY, use_mean_pooling=True))).eval())
    assert layout.final_norm is None
    assert set(layout.modules) == ALL_POINTS - {"final_norm"}


# ---- against the models' own outputs -----------------------------------------------------------------------------

# Of hidden states, the first is the embedding output in all of these.
NUM_HIDDEN_STATES = dict.fromkeys([*TABLE_BACKBONES, *OTHER_BACKBONES], NUM_LAYERS + 1)
NUM_HIDDEN_STATES |= {"convnext": 5, "resnet": 5}


def whole_images(backbone, pixel_values):
    """Masked autoencoders hide patches by chance, in evaluation too: arguments and settings that do not."""
    if backbone.config.model_type != "vit_mae":
        return {}
    backbone.config.mask_ratio = 0.0
    patch = backbone.config.patch_size
    num_patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
    return {"noise": torch.linspace(0, 1, num_patches).expand(len(pixel_values), -1)}


def hidden_states_of(backbone, pixel_values, **kwargs):
    with torch.no_grad():
        outputs = backbone(pixel_values, output_hidden_states=True, **whole_images(backbone, pixel_values), **kwargs)
    return outputs.hidden_states


@pytest.mark.parametrize("model_type", NUM_HIDDEN_STATES)
def test_layers_are_numbered_as_hidden_states(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    layers = range(layout.num_layers + 1)
    found = read(backbone, [(layer, "block") for layer in layers], images(), layout)
    hidden_states = hidden_states_of(backbone, images())
    assert len(hidden_states) == len(layers) == NUM_HIDDEN_STATES[model_type]
    for layer in layers:
        assert torch.equal(found[layer, "block"], hidden_states[layer])


WITH_FINAL_NORM = [name for name in NUM_HIDDEN_STATES if name not in ("convnext", "resnet", "sam_vision_model")]


@pytest.mark.parametrize("model_type", WITH_FINAL_NORM)
def test_final_norm_is_the_model_s_own_output(model_type):
    backbone = tiny_backbone(model_type)
    final = read(backbone, [FINAL_NORM], images())[FINAL_NORM]
    with torch.no_grad():
        outputs = backbone(images(), **whole_images(backbone, images()))
    if model_type == "clip_vision_model":  # CLIP itself normalises the CLS token only
        torch.testing.assert_close(final[:, 0], outputs.pooler_output)
        assert not torch.allclose(final, outputs.last_hidden_state)
    else:
        torch.testing.assert_close(final, outputs.last_hidden_state)


# Those that take other sizes by themselves; of the rest all but AIMv2 and SAM interpolate their positions if asked.
ANY_SIZE = ("convnext", "dinov2", "dinov2_with_registers", "dinov3_vit", "resnet", "swin", "swinv2")
INTERPOLATING = [
    name for name in NUM_HIDDEN_STATES if name not in (*ANY_SIZE, "aimv2_vision_model", "sam_vision_model")
]


@pytest.mark.parametrize("size", [48, (32, 48), (64, 32)])
@pytest.mark.parametrize("model_type", [*ANY_SIZE, *INTERPOLATING])
def test_other_image_sizes_work_and_are_right(model_type, size):
    backbone = tiny_backbone(model_type)
    pixel_values = images(size=size)
    layout = describe_backbone(backbone)
    last = layout.num_layers
    found = read(backbone, [(0, "block"), (last, "block")], pixel_values, layout)
    options = {"interpolate_pos_encoding": True} if model_type in INTERPOLATING else {}
    hidden_states = hidden_states_of(backbone, pixel_values, **options)
    for layer in (0, last):
        assert torch.equal(found[layer, "block"], hidden_states[layer])
    if model_type in TABLE_BACKBONES:
        num_patches = (pixel_values.shape[-2] // 8) * (pixel_values.shape[-1] // 8)
        assert found[last, "block"].shape == (2, num_patches + layout.num_prefix_tokens[0], HIDDEN_SIZE)


def test_a_size_that_a_backbone_cannot_read_names_its_own_size():
    message = "Aimv2VisionModel cannot read images of 48 x 32 px: .*; its own size is 32 x 32 px"
    with pytest.raises(LayerFusionError, match=message):
        read(tiny_backbone("aimv2_vision_model"), [(1, "block")], images(size=(48, 32)))


@pytest.mark.parametrize("model_type", NUM_HIDDEN_STATES)
def test_pixels_are_cast_to_the_backbone_s_dtype(model_type):
    found = read(tiny_backbone(model_type, torch.bfloat16), [(1, "block")], images())
    assert found[1, "block"].dtype == torch.bfloat16


def test_backbone_arguments_reach_its_forward():
    backbone = tiny_backbone("vit")
    backbone.embeddings.mask_token = torch.nn.Parameter(torch.ones(1, 1, HIDDEN_SIZE))
    masked = torch.zeros(2, NUM_PATCHES, dtype=torch.bool)
    masked[:, :3] = True
    with torch.no_grad():
        hidden_states = backbone(images(), bool_masked_pos=masked, output_hidden_states=True).hidden_states
    found = read(backbone, [(0, "block"), (2, "block")], images(), bool_masked_pos=masked)
    for layer in (0, 2):
        assert torch.equal(found[layer, "block"], hidden_states[layer])
    assert not torch.equal(read(backbone, [(2, "block")], images())[2, "block"], hidden_states[2])


# ---- masked autoencoders -----------------------------------------------------------------------------------------


def test_a_masked_autoencoder_sees_whole_images_and_keeps_its_ratio():
    backbone = tiny_backbone("vit_mae")
    assert backbone.config.mask_ratio == 0.75
    layout = describe_backbone(backbone)
    first, second = (read(backbone, [(0, "block")], images(), layout)[0, "block"] for _ in range(2))
    assert first.shape == (2, 1 + NUM_PATCHES, HIDDEN_SIZE)
    assert torch.equal(first, second)
    assert backbone.config.mask_ratio == 0.75

    def fail(tap, activation):
        assert backbone.config.mask_ratio == 0.0
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        read_taps(backbone, layout, [(1, "block")], fail, images())
    assert backbone.config.mask_ratio == 0.75


def test_patches_of_a_masked_autoencoder_stand_in_raster_order():
    backbone = tiny_backbone("vit_mae")
    layout = describe_backbone(backbone)
    before = read(backbone, [(0, "block")], images(), layout)[0, "block"]
    for row, column in ((0, 0), (0, 3), (2, 1)):
        changed = images()
        changed[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        after = read(backbone, [(0, "block")], changed, layout)[0, "block"]
        moved = (after != before).any(dim=-1)
        assert moved.nonzero().tolist() == [[0, 1 + 4 * row + column]]


# ---- what cannot be read -----------------------------------------------------------------------------------------

SCRIPTED_LAYOUT = TokenLayout({"block": TapLayout("tokens", (192, 192))}, reading="hidden_states")


def test_no_hidden_states_is_an_error():
    message = "ScriptedBackbone returns no hidden states, so its layers cannot be read: use a backbone whose forward"
    with pytest.raises(LayerFusionError, match=message):
        read(ScriptedBackbone(None), [(1, "block")], images(), SCRIPTED_LAYOUT)


def test_a_forward_without_the_argument_is_an_error():
    class Deaf(ScriptedBackbone):
        def forward(self, pixel_values):
            return pixel_values

    message = "Deaf cannot be read from pixel_values, output_hidden_states: .*unexpected keyword argument"
    with pytest.raises(LayerFusionError, match=message):
        read(Deaf(None), [(1, "block")], images(), SCRIPTED_LAYOUT)


def test_another_type_error_is_not_disguised():
    def fail(pixel_values):
        return [*pixel_values, None + 1]

    with pytest.raises(TypeError, match="unsupported operand"):
        read(ScriptedBackbone(fail), [(1, "block")], images(), SCRIPTED_LAYOUT)


def test_a_model_without_pixels_is_an_error():
    class Blind(ScriptedBackbone):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(LayerFusionError, match="Blind takes no pixels: it is not a vision backbone"):
        read(Blind(None), [(1, "block")], images(), SCRIPTED_LAYOUT)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ((5, "block"), "the 5 blocks of ViTModel are not where they were when this head was made: use the version of"),
        ((5, "final_norm"), "ViTModel has no 'last_norm', the norm that this head was made with: use the version of"),
    ],
)
def test_a_backbone_that_has_moved_its_parts_is_an_error(tap, message):
    backbone = tiny_backbone("vit")
    layout = replace(TokenLayout.of_plain_vit(HIDDEN_SIZE, 5), final_norm="last_norm")
    if tap[1] == "final_norm":
        backbone.layers.extend(tiny_backbone("vit").layers[:2])
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        read(backbone, [tap], images(), layout)


# ---- hooks leave nothing behind ----------------------------------------------------------------------------------


def _hooks(model):
    return [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("model_type", BY_HAND)
def test_hooks_are_gone_after_a_forward(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    before = _hooks(backbone)
    seen = []

    def look(tap, activation):
        seen.append((tap, _hooks(backbone) != before))
        return activation

    # The pooler, and the stages' outputs, are read from what the model returns.
    inside = [tap for tap in taps_of(layout) if tap[1] not in ("pooler", "final_norm", "block")]
    with torch.no_grad():
        read_taps(backbone, layout, inside, look, images())
    assert sorted(seen) == sorted((tap, True) for tap in inside)  # each once, and from a hook
    assert _hooks(backbone) == before


def test_hooks_are_gone_after_a_forward_that_raises():
    backbone = tiny_backbone("vit")
    layout = describe_backbone(backbone)
    before = _hooks(backbone)
    blocks = [(layer, "block") for layer in range(NUM_LAYERS + 1)]
    with pytest.raises(RuntimeError):
        read(backbone, blocks, images()[:, :, :, :8].expand(2, 3, 5, 8), layout)

    def fail(tap, activation):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        read_taps(backbone, layout, blocks, fail, images())
    assert _hooks(backbone) == before


@pytest.mark.parametrize("model_type", ["vit", "dinov2", "clip_vision_model", "vit_mae", "sam_vision_model"])
def test_activations_are_not_kept(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    references, alive = [], []

    def pool(tap, activation):
        alive.append(sum(reference() is not None for reference in references))
        references.append(weakref.ref(activation))
        return pool_activation(activation, layout, tap, ["mean"], batch_size=2)

    blocks = [(layer, "block") for layer in range(NUM_LAYERS + 1)]
    with torch.no_grad():
        pooled = read_taps(backbone, layout, blocks, pool, images())
    assert len(references) == NUM_LAYERS + 1
    assert all(reference() is None for reference in references)
    assert max(alive) <= 2  # at most what the running block itself holds, however deep the model is
    for tokens in pooled.values():
        assert tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()


def test_attention_in_windows_keeps_no_stream():
    backbone = tiny_backbone("swin")
    layout = describe_backbone(backbone)
    entering, alive = [], []
    for stage in backbone.encoder.layers:
        stage.blocks[-1].register_forward_pre_hook(lambda _, args: entering.append(weakref.ref(args[0])))

    def look(tap, activation):
        alive.append(sum(reference() is not None for reference in entering))
        return activation.mean()

    with torch.no_grad():
        read_taps(backbone, layout, [(layer, "attention") for layer in (1, 2, 3)], look, images())
    assert alive == [1, 1, 1]  # what enters the running block, however many blocks there were before


@pytest.mark.parametrize(
    ("taps", "asked"), [([(1, "ln2"), (3, "fc1")], False), ([(1, "block")], True), ([FINAL_NORM], True)]
)
def test_hidden_states_are_asked_for_only_where_they_are_read(taps, asked):
    backbone = tiny_backbone("swin")
    layout = describe_backbone(backbone)
    returned = []
    backbone.register_forward_hook(lambda _, __, output: returned.append(output.hidden_states))
    read(backbone, taps, images(), layout)
    assert [states is not None for states in returned] == [asked]


@pytest.mark.parametrize("model_type", ["dinov2", "swin", "convnext"])
def test_one_forward_reads_every_tap(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    passes = []
    backbone.register_forward_pre_hook(lambda module, _: passes.append(module))
    found = read(backbone, taps_of(layout), images(), layout)
    assert len(passes) == 1
    assert found.keys() == set(taps_of(layout))


@pytest.mark.parametrize("model_type", ["dinov2", "swin"])
def test_gradients_flow_to_an_unfrozen_backbone(model_type):
    backbone = tiny_backbone(model_type)
    layout = describe_backbone(backbone)
    taps = [(1, "attention"), (NUM_LAYERS, "ln2"), FINAL_NORM]
    pooled = read_taps(backbone, layout, taps, keep, images())
    sum(value.square().sum() for value in pooled.values()).backward()
    assert backbone.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    assert backbone.layernorm.weight.grad.abs().max() > 0


def test_hidden_states_are_read_as_they_are():
    states = [patchify(images()), 2 * patchify(images())]
    found = read(ScriptedBackbone(lambda _: states), [(0, "block"), (1, "block")], images(), SCRIPTED_LAYOUT)
    assert found[0, "block"] is states[0]
    assert found[1, "block"] is states[1]
