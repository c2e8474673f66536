"""What `describe_backbone` measures, what it refuses, and the description that it returns."""

import json
import re

import pytest
import torch
from modeling_helpers import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_REGISTERS,
    OTHER_BACKBONES,
    TABLE_BACKBONES,
    TINY,
    ScriptedBackbone,
    ScriptedConfig,
    images,
    patchify,
    randomise,
    tiny_backbone,
)
from torch import nn
from transformers import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    Llama4VisionConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    YolosConfig,
    YolosModel,
)
from transformers.models.llama4.modeling_llama4 import Llama4VisionModel
from transformers.utils import ModelOutput

from hf_layerfusion import LayerFusionError
from hf_layerfusion.layout import BLOCK_MODULES, TapLayout, TokenLayout
from hf_layerfusion.probe import describe_backbone
from hf_layerfusion.taps import read_taps

WIDTH = 192  # of `patchify`


def scripted(hidden_states, **config):
    return ScriptedBackbone(hidden_states, **{"image_size": 32, "patch_size": 8, **config})


def constant(number, like):
    """Special tokens: the same for every image."""
    return torch.arange(1.0, number + 1)[None, :, None].expand(len(like), number, like.shape[2])


def tokens_with(before=0, after=0):
    def hidden_states(pixel_values):
        patches = patchify(pixel_values)
        tokens = torch.cat([constant(before, patches), patches, constant(after, patches)], dim=1)
        return [tokens, 2 * tokens, 3 * tokens]

    return hidden_states


# ---- special tokens ----------------------------------------------------------------------------------------------

# Tokens before and after the patches, what the config says of them, and the CLS token.
SPECIAL = {
    "none": (0, 0, {}, None),
    "CLS": (1, 0, {}, 0),
    "CLS and distillation": (2, 0, {}, 0),
    "CLS and registers": (5, 0, {"num_register_tokens": 4}, 0),
    "registers without CLS": (4, 0, {"num_register_tokens": 4}, None),
    "CLS behind the patches": (0, 1, {}, -1),
    "a register behind the patches": (0, 1, {"num_register_tokens": 1}, None),
    "queries behind the patches": (0, 7, {}, None),
    "CLS, and queries behind the patches": (1, 7, {}, 0),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_tokens_are_found_wherever_they_stand(case):
    before, after, config, cls_token = SPECIAL[case]
    layout = describe_backbone(scripted(tokens_with(before, after), **config))
    assert layout.num_prefix_tokens == (before,) * 3
    assert layout.num_suffix_tokens == (after,) * 3
    assert layout.cls_token == cls_token
    assert layout.has_cls == (cls_token is not None)
    assert layout.taps == {"block": TapLayout("tokens", (WIDTH,) * 3)}
    assert layout.grids == ((4, 4),) * 3
    assert layout.image_size == (32, 32)
    assert (layout.reading, layout.first_hidden_state, layout.batching) == ("hidden_states", 1, "plain")
    assert layout.final_norm is None
    assert not layout.attention_in_windows


def test_a_token_that_joins_later_counts_from_there():
    def hidden_states(pixel_values):
        patches = patchify(pixel_values)
        later = patches[:, :4]
        return [patches, later, torch.cat([constant(1, later), later], dim=1)]

    layout = describe_backbone(scripted(hidden_states))
    assert layout.num_prefix_tokens == (0, 0, 1)
    assert layout.cls_token == 0
    assert [layout.has_cls_at(layer) for layer in range(3)] == [False, False, True]
    assert layout.grids == ((4, 4), (2, 2), (2, 2))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: Llama4VisionModel(
                Llama4VisionConfig(
                    **TINY | {"intermediate_size": 128}, projector_input_dim=64, projector_output_dim=64
                )
            ),
            (0, 1, -1),
        ),
        (lambda: YolosModel(YolosConfig(**{**TINY, "image_size": [32, 48]}, num_detection_tokens=5)), (1, 5, 0)),
    ],
    ids=["llama4", "yolos"],
)
def test_special_tokens_behind_the_patches_of_real_models(build, expected):
    layout = describe_backbone(randomise(build()).eval())
    prefix, suffix, cls_token = expected
    assert layout.num_prefix_tokens == (prefix,) * (NUM_LAYERS + 1)
    assert layout.num_suffix_tokens == (suffix,) * (NUM_LAYERS + 1)
    assert layout.cls_token == cls_token


# ---- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "patch_size", "unfold", "grid"),
    [
        ((32, 64), 8, (8, 8), (4, 8)),
        ([64, 24], 8, (8, 8), (8, 3)),
        ((32, 32), (8, 16), (8, 16), (4, 2)),
        ((32, 64), None, (8, 8), (4, 8)),  # a config that does not say: the only grid of the image's shape
        ((32, 64), 4, (8, 8), (4, 8)),  # patches that have been merged two by two
        ({"height": 32, "width": 64}, 8, (8, 8), (4, 8)),
    ],
)
def test_grids_of_images_and_patches_that_are_not_square(image_size, patch_size, unfold, grid):
    backbone = scripted(lambda x: [patchify(x, unfold)] * 2, image_size=image_size, patch_size=patch_size)
    layout = describe_backbone(backbone)
    height, width = image_size.values() if isinstance(image_size, dict) else image_size
    assert layout.image_size == (height, width)
    assert layout.grids == (grid,) * 2


@pytest.mark.parametrize(("axes", "kind"), [((0, 1, 2, 3), "channels_first"), ((0, 2, 3, 1), "channels_last")])
def test_grids_of_maps(axes, kind):
    def hidden_states(pixel_values):
        maps = pixel_values.repeat(1, 2, 1, 1)  # 6 channels
        pooled = [nn.functional.avg_pool2d(maps, stride) for stride in (4, 8, 16)]
        pooled[-1] = pooled[-1].repeat(1, 2, 1, 1)
        return [layer.permute(axes) for layer in pooled]

    layout = describe_backbone(scripted(hidden_states, image_size=(32, 64)))
    assert layout.taps == {"block": TapLayout(kind, (6, 6, 12))}
    assert layout.grids == ((8, 16), (4, 8), (2, 4))
    assert layout.num_prefix_tokens == layout.num_suffix_tokens == (0, 0, 0)
    assert layout.cls_token is None


# ---- which axis holds the channels -------------------------------------------------------------------------------


def maps_of(channels, stride, axes):
    def hidden_states(pixel_values):
        pooled = nn.functional.avg_pool2d(pixel_values, stride)
        return [torch.cat([pooled] * channels, dim=1)[:, :channels].permute(axes)] * 2

    return hidden_states


@pytest.mark.parametrize("image_size", [(32, 32), (32, 64), (64, 32)])
@pytest.mark.parametrize("channels", [4, 8, 16])
@pytest.mark.parametrize(("axes", "kind"), [((0, 1, 2, 3), "channels_first"), ((0, 2, 3, 1), "channels_last")])
def test_channels_are_told_from_rows_and_columns(image_size, channels, axes, kind):
    # Maps of 8 x 8, 8 x 16 and 16 x 8: with as many channels as rows or columns a second size has to tell.
    backbone = scripted(maps_of(channels, 4, axes), image_size=image_size)
    assert describe_backbone(backbone).taps == {"block": TapLayout(kind, (channels, channels))}


def test_channels_that_cannot_be_told_are_refused():
    def one_size_only(pixel_values):
        if pixel_values.shape[-1] != 32:
            raise ValueError("only 32")
        return maps_of(8, 4, (0, 1, 2, 3))(pixel_values)

    def one_map_only(pixel_values):
        return [nn.functional.adaptive_avg_pool2d(pixel_values, 8).repeat(1, 3, 1, 1)[:, :8]] * 2

    for hidden_states in (one_size_only, one_map_only):
        with pytest.raises(
            LayerFusionError, match=re.escape("(2, 8, 8, 8): it is not clear which axis holds the cha")
        ):
            describe_backbone(scripted(hidden_states))


# ---- images that share rows --------------------------------------------------------------------------------------

BATCHINGS = {
    "packed": lambda tokens: tokens.flatten(0, 1).unsqueeze(0),
    "windows": lambda tokens: tokens.unflatten(1, (4, 4)).flatten(0, 1),
    "sequence_first": lambda tokens: tokens.transpose(0, 1),
}


@pytest.mark.parametrize("batching", BATCHINGS)
def test_images_that_share_rows_are_told(batching):
    layout = describe_backbone(scripted(lambda x: [BATCHINGS[batching](patchify(x))] * 2))
    assert layout.batching == batching
    assert layout.widths == (WIDTH, WIDTH)
    assert layout.num_prefix_tokens == (0, 0)
    assert layout.grids == ((None,) * 2 if batching == "windows" else ((4, 4),) * 2)


def test_a_special_token_in_every_window():
    def hidden_states(pixel_values):
        windows = BATCHINGS["windows"](patchify(pixel_values))
        return [torch.cat([constant(1, windows), windows], dim=1)] * 2

    layout = describe_backbone(scripted(hidden_states))
    assert layout.batching == "windows"
    assert layout.num_prefix_tokens == (1, 1)
    assert layout.cls_token is None  # none of them stands for the image


@pytest.mark.parametrize(
    "mix",
    [
        lambda tokens: tokens.unflatten(1, (4, 4)).transpose(0, 1).flatten(0, 1),  # window by window
        lambda tokens: tokens.transpose(0, 1).flatten(0, 1).unsqueeze(0),  # token by token
        lambda tokens: torch.cat([tokens[:1], 2 * tokens[1:]], dim=1),  # the second image in another way
    ],
    ids=["windows", "packed", "unlike"],
)
def test_images_that_do_not_stand_together_are_refused(mix):
    with pytest.raises(LayerFusionError, match="it is not clear where the 2 images stand"):
        describe_backbone(scripted(lambda x: [mix(patchify(x))] * 2))


# ---- what cannot be told -----------------------------------------------------------------------------------------

ADVICE = (
    "; if you know the layout, state it with num_prefix_tokens= (tokens before the patches) and "
    "grid_size=(height, width)"
)


def _special_in_the_middle(pixel_values):
    patches = patchify(pixel_values)
    return [torch.cat([patches[:, :8], constant(2, patches), patches[:, 8:]], dim=1)] * 2


UNCLEAR = {
    "special tokens in the middle": (
        _special_in_the_middle,
        "special tokens of ScriptedBackbone stand among its patches (positions [8, 9]): this layout is not supported",
    ),
    "the same for every image": (
        lambda _: [torch.ones(2, 16, 8)] * 2,
        "the tokens of ScriptedBackbone are the same for two different images: is it a vision backbone",
    ),
    "no grid": (
        lambda x: [torch.cat([patchify(x), patchify(x)[:, :3]], dim=1)] * 2,
        "the activations of ScriptedBackbone have shapes (2, 19, 192): 19 patch tokens beside 0 special ones form no "
        "grid of the image's shape" + ADVICE,
    ),
    "no grid beside special tokens": (
        lambda x: [state[:, :-1] for state in tokens_with(before=2)(x)],
        "have shapes (2, 17, 192): 15 patch tokens beside 2 special ones form no grid",
    ),
    "a CLS token that has seen the image": (
        lambda x: [torch.cat([patchify(x).mean(dim=1, keepdim=True), patchify(x)], dim=1)] * 2,
        "have shapes (2, 17, 192): 17 patch tokens beside 0 special ones form no grid of the image's shape" + ADVICE,
    ),
    "no grid in a later layer": (
        lambda x: [patchify(x), patchify(x)[:, :7]],
        "have shapes (2, 16, 192), (2, 7, 192): 7 patch tokens beside 0 special ones form no grid",
    ),
    "another number of rows": (
        lambda x: [patchify(x)[:1, :15].repeat(5, 1, 1)] * 2,
        "have shapes (5, 15, 192): it is not clear where the 2 images stand" + ADVICE,
    ),
    "vectors": (
        lambda x: [x.flatten(1)] * 2,
        "the activations of ScriptedBackbone have shapes (2, 3072): neither tokens (B, T, D) nor maps" + ADVICE,
    ),
    "tokens and maps": (
        lambda x: [patchify(x), x[:, :, ::2, ::2]],
        "have shapes (2, 16, 192), (2, 3, 16, 16): neither tokens (B, T, D) nor maps" + ADVICE,
    ),
    "one hidden state": (lambda x: [patchify(x)], "ScriptedBackbone returns one hidden state only: it has no layers"),
    "no hidden states": (
        None,
        "ScriptedBackbone returns no hidden states, and its blocks could not be told, so its layers cannot be read: "
        "use a backbone whose forward supports output_hidden_states",
    ),
    "no numbers": (lambda x: [patchify(x) * torch.nan] * 2, "finite"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_a_layout_that_cannot_be_told_is_refused(case):
    hidden_states, message = UNCLEAR[case]
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        describe_backbone(scripted(hidden_states))


@pytest.mark.parametrize("model_type", ["dinov2", "siglip_vision_model", "swin", "resnet"])
def test_weights_that_are_not_finite_are_named(model_type):
    backbone = tiny_backbone(model_type)
    with torch.no_grad():
        next(parameter for parameter in backbone.parameters() if parameter.ndim == 4).fill_(torch.nan)
    with pytest.raises(LayerFusionError, match="finite"):
        describe_backbone(backbone)


def test_an_error_of_the_model_names_the_model_and_the_pixels():
    def fail(pixel_values):
        raise RuntimeError("no kernel")

    message = "ScriptedBackbone cannot be read from pixel_values of shape (2, 3, 32, 32): no kernel"
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        describe_backbone(scripted(fail))


# ---- statements --------------------------------------------------------------------------------------------------


def test_a_stated_number_of_prefix_tokens_helps():
    hidden_states, _ = UNCLEAR["a CLS token that has seen the image"]
    layout = describe_backbone(scripted(hidden_states), num_prefix_tokens=1)
    assert layout.num_prefix_tokens == (1, 1)
    assert layout.cls_token == 0
    assert layout.grids == ((4, 4),) * 2


def test_a_stated_grid_helps():
    hidden_states, _ = UNCLEAR["no grid beside special tokens"]
    layout = describe_backbone(scripted(hidden_states), grid_size=(3, 5))
    assert layout.grids == ((3, 5),) * 3
    assert layout.num_prefix_tokens == (2, 2, 2)


def test_both_may_be_stated():
    def hidden_states(pixel_values):
        return [patchify(pixel_values)[:, :13]] * 2

    layout = describe_backbone(scripted(hidden_states), num_prefix_tokens=3, grid_size=[2, 5])
    assert layout.grids == ((2, 5),) * 2
    assert layout.num_prefix_tokens == (3, 3)


def test_a_statement_that_agrees_changes_nothing():
    backbone = tiny_backbone("dinov2_with_registers")
    stated = describe_backbone(backbone, num_prefix_tokens=1 + NUM_REGISTERS, grid_size=(4, 4))
    assert stated == describe_backbone(backbone)
    backbone = tiny_backbone("resnet")
    assert describe_backbone(backbone, num_prefix_tokens=0) == describe_backbone(backbone)


CONTRADICTIONS = {
    "fewer prefix tokens than measured": (
        "dinov2_with_registers",
        {"num_prefix_tokens": 1},
        "num_prefix_tokens=1, but the first 3 tokens of Dinov2WithRegistersModel are the same for every image",
    ),
    "more prefix tokens than measured": ("dinov2", {"num_prefix_tokens": 2}, "num_prefix_tokens=2, but"),
    "prefix tokens that leave another grid": ("dinov2", {"num_prefix_tokens": 8}, "num_prefix_tokens=8, but"),
    "another grid": ("dinov2", {"grid_size": (4, 5)}, "grid_size=(4, 5) has 20 places, but Dinov2Model has 16 patch"),
    "another grid in a later stage": ("swin", {"grid_size": (16, 16)}, "has 256 places, but SwinModel has 64 patch"),
    "prefix tokens of maps": ("resnet", {"num_prefix_tokens": 1}, "num_prefix_tokens=1, but"),
    "another grid of maps": ("sam_vision_model", {"grid_size": (3, 3)}, "grid_size=(3, 3), but"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_statement_that_contradicts_the_measurement_is_refused(case):
    model_type, statement, message = CONTRADICTIONS[case]
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        describe_backbone(tiny_backbone(model_type), **statement)


# ---- which hidden state is which layer ---------------------------------------------------------------------------


class Stages(PreTrainedModel):
    """Stages in a list, and hidden states of which the embedding output may be one."""

    config_class = ScriptedConfig
    main_input_name = "pixel_values"

    def __init__(self, with_embeddings):
        super().__init__(ScriptedConfig(image_size=32))
        self.with_embeddings = with_embeddings
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.stages = nn.ModuleList([nn.Conv2d(6, 10, 2, stride=2), nn.Conv2d(10, 12, 2, stride=2)])

    def forward(self, pixel_values, output_hidden_states=False):
        states = [self.stem(pixel_values)]
        for stage in self.stages:
            states.append(stage(states[-1]))
        shown = tuple(states if self.with_embeddings else states[1:])
        return ModelOutput(last_hidden_state=states[-1], hidden_states=shown if output_hidden_states else None)


@pytest.mark.parametrize("with_embeddings", [True, False])
def test_an_embedding_output_is_told_from_a_stage(with_embeddings):
    backbone = randomise(Stages(with_embeddings)).eval()
    layout = describe_backbone(backbone)
    assert layout.num_layers == 2
    assert layout.widths == (6 if with_embeddings else 0, 10, 12)
    assert layout.grids == ((16, 16) if with_embeddings else None, (8, 8), (4, 4))
    assert layout.first_hidden_state == int(with_embeddings)
    with torch.no_grad():
        found = read_taps(backbone, layout, [(1, "block"), (2, "block")], lambda _, value: value, images())
        first = backbone.stages[0](backbone.stem(images()))
    assert torch.equal(found[1, "block"], first)
    assert torch.equal(found[2, "block"], backbone.stages[1](first))
    if not with_embeddings:
        with pytest.raises(LayerFusionError, match="module 'block' cannot be read at layer 0 of Stages"):
            read_taps(backbone, layout, [(0, "block")], lambda _, value: value, images())


def test_an_image_is_no_embedding_output():
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], image_size=32)
    backbone = randomise(DINOv3ConvNextModel(config)).eval()
    with torch.no_grad():
        hidden_states = backbone(images(), output_hidden_states=True).hidden_states
    assert torch.equal(hidden_states[0], images())
    layout = describe_backbone(backbone)
    assert layout.widths == (0, 8, 16, 24, 32)
    assert layout.grids == (None, (8, 8), (4, 4), (2, 2), (1, 1))
    with torch.no_grad():
        found = read_taps(backbone, layout, [(1, "block"), (4, "block")], lambda _, value: value, images())
    assert torch.equal(found[1, "block"], hidden_states[1])
    assert torch.equal(found[4, "block"], hidden_states[4])


# ---- blocks: names suggest, values decide ------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, hidden_states):
        return self.proj(hidden_states + hidden_states.mean(dim=1, keepdim=True))


class Block(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order
        self.norm1, self.norm2, self.attn = nn.LayerNorm(16), nn.LayerNorm(16), Attention()
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(16, 40), nn.Linear(40, 16)
        self.gamma = nn.Parameter(torch.ones(16))

    def feed_forward(self, x):
        return self.mlp.fc2(self.mlp.fc1(x).relu())

    def forward(self, x):
        if self.order == "pre-norm":
            x = x + self.attn(self.norm1(x))
            return x + self.feed_forward(self.norm2(x))
        if self.order == "layer scale":
            x = x + self.gamma * self.attn(self.norm1(x))
            return x + self.gamma * self.feed_forward(self.norm2(x))
        if self.order == "parallel":
            return x + self.attn(self.norm1(x)) + self.feed_forward(self.norm2(x))
        if self.order == "names the other way round":
            x = x + self.attn(self.norm2(x))
            return x + self.feed_forward(self.norm1(x))
        if self.order == "MLP without a norm":
            x = x + self.norm2(self.attn(self.norm1(x)))
            return x + self.feed_forward(x)
        x = self.norm1(x + self.attn(x))  # post-norm
        return self.norm2(x + self.feed_forward(x))


class Tower(PreTrainedModel):
    config_class = ScriptedConfig
    main_input_name = "pixel_values"

    def __init__(self, order="pre-norm", depth=3, shows=slice(None), calls=1):
        super().__init__(ScriptedConfig(image_size=32, patch_size=8))
        self.shows, self.calls = shows, calls
        self.cls = nn.Parameter(torch.ones(1, 1, 16))
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.layers = nn.ModuleList([Block(order) for _ in range(depth)])
        self.norm = nn.LayerNorm(16)

    def forward(self, pixel_values, output_hidden_states=False):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        states = [torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1)]
        for block in self.layers:
            for _ in range(self.calls):
                states.append(block(states[-1]))
        shown = None if self.shows is None or not output_hidden_states else tuple(states[self.shows])
        return ModelOutput(last_hidden_state=self.norm(states[-1]), hidden_states=shown)


BLOCKS = {
    "pre-norm": set(BLOCK_MODULES),
    "layer scale": set(BLOCK_MODULES),
    "post-norm": {"attention", "fc1", "activation", "fc2", "block"},
    "parallel": {"ln1", "attention", "ln2", "fc1", "activation", "fc2", "block"},
    "names the other way round": {"attention", "fc1", "activation", "fc2", "block"},
    "MLP without a norm": {"ln1", "attention", "fc1", "activation", "fc2", "block"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", BLOCKS)
def test_a_part_counts_only_if_it_does_what_its_name_says(order, dtype):
    layout = describe_backbone(randomise(Tower(order)).to(dtype).eval())
    assert set(layout.modules) == BLOCKS[order] | {"final_norm"}
    assert layout.reading == "blocks"
    assert layout.final_norm == "norm"
    assert layout.num_prefix_tokens == (1,) * 4
    for module in BLOCKS[order] - {"block"}:
        width = 40 if module in ("fc1", "activation") else 16
        assert layout.taps[module] == TapLayout("tokens", (0, width, width, width))


@pytest.mark.parametrize(
    ("shows", "first"), [(None, 1), (slice(None), 1), (slice(1, None), 0)], ids=["none", "all", "no embeddings"]
)
def test_blocks_are_read_whatever_hidden_states_there_are(shows, first):
    backbone = randomise(Tower(shows=shows)).eval()
    layout = describe_backbone(backbone)
    assert layout.num_layers == 3
    assert layout.widths == (16,) * 4
    assert (layout.reading, layout.first_hidden_state) == ("blocks", first)
    with torch.no_grad():
        found = read_taps(backbone, layout, [(0, "block"), (1, "block")], lambda _, value: value, images())
    assert torch.equal(found[0, "block"][:, :1], backbone.cls.expand(2, -1, -1))
    assert torch.equal(backbone.layers[0](found[0, "block"]), found[1, "block"])


def test_blocks_that_run_twice_are_no_layers():
    backbone = randomise(Tower(depth=2, calls=2)).eval()
    layout = describe_backbone(backbone)
    assert layout.reading == "hidden_states"
    assert layout.num_layers == 4
    assert layout.modules == ("block", "final_norm")
    with pytest.raises(LayerFusionError, match="returns no hidden states, and its blocks could not be told"):
        describe_backbone(randomise(Tower(depth=2, calls=2, shows=None)).eval())


def test_of_two_towers_the_one_whose_hidden_states_are_returned_is_read():
    class TwoTowers(Tower):
        def __init__(self):
            super().__init__(depth=2)
            self.early = nn.ModuleList([Block("pre-norm")])

        def forward(self, pixel_values, output_hidden_states=False):
            patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
            states = [self.early[0](torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1))]
            for block in self.layers:
                states.append(block(states[-1]))
            return ModelOutput(hidden_states=tuple(states) if output_hidden_states else None)

    backbone = randomise(TwoTowers()).eval()
    layout = describe_backbone(backbone, num_prefix_tokens=1)
    assert (layout.num_layers, layout.tower) == (2, "layers.")
    with torch.no_grad():
        found = read_taps(backbone, layout, [(0, "block"), (1, "ln1")], lambda _, value: value, images())
        hidden_states = backbone(images(), output_hidden_states=True).hidden_states
    assert torch.equal(found[0, "block"], hidden_states[0])
    assert torch.equal(found[1, "ln1"], backbone.layers[0].norm1(hidden_states[0]))


# ---- real backbones ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "vit": ("tokens", [32] * 4, 1),
    "beit": ("tokens", [32] * 4, 1),
    "data2vec-vision": ("tokens", [32] * 4, 1),
    "clip_vision_model": ("tokens", [32] * 4, 1),
    "deit": ("tokens", [32] * 4, 2),  # CLS and distillation
    "dinov2": ("tokens", [32] * 4, 1),
    "dinov2_with_registers": ("tokens", [32] * 4, 1 + NUM_REGISTERS),
    "dinov3_vit": ("tokens", [32] * 4, 1 + NUM_REGISTERS),
    "ijepa": ("tokens", [32] * 4, 0),
    "siglip_vision_model": ("tokens", [32] * 4, 0),
    "aimv2_vision_model": ("tokens", [32] * 4, 0),
    "vit_mae": ("tokens", [32] * 4, 1),
    "vit_msn": ("tokens", [32] * 4, 1),
    "swin": ("tokens", [8, 16, 32, 32], 0),
    "swinv2": ("tokens", [8, 16, 32, 32], 0),
    "convnext": ("channels_first", [8, 8, 16, 24, 32], 0),
    "resnet": ("channels_first", [8, 8, 16, 24, 32], 0),
    "sam_vision_model": ("channels_last", [32] * 4, 0),
}
GRIDS = {
    "swin": ((16, 16), (8, 8), (4, 4), (4, 4)),
    "swinv2": ((16, 16), (8, 8), (4, 4), (4, 4)),
    "convnext": ((8, 8), (8, 8), (4, 4), (2, 2), (1, 1)),
    "resnet": ((56, 56), (56, 56), (28, 28), (14, 14), (7, 7)),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_describe_backbone(model_type):
    layout = describe_backbone(tiny_backbone(model_type))
    kind, widths, num_prefix_tokens = LAYOUTS[model_type]
    assert layout.taps["block"] == TapLayout(kind, widths)
    assert layout.num_layers == len(widths) - 1
    assert layout.num_prefix_tokens == (num_prefix_tokens,) * len(widths)
    assert layout.num_suffix_tokens == (0,) * len(widths)
    assert layout.cls_token == (0 if num_prefix_tokens else None)
    assert layout.grids == GRIDS.get(model_type, ((4, 4),) * len(widths))
    assert layout.image_size == ((224, 224) if model_type == "resnet" else (32, 32))  # its config does not say
    assert layout.reading == ("blocks" if len(set(widths)) == 1 else "hidden_states")
    assert layout.attention_in_windows == (model_type == "swin")
    assert layout.batching == "plain"


def test_every_tiny_backbone_is_described():
    assert LAYOUTS.keys() == TABLE_BACKBONES.keys() | OTHER_BACKBONES.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_the_dtype_changes_nothing(model_type, dtype):
    assert describe_backbone(tiny_backbone(model_type, dtype)) == describe_backbone(tiny_backbone(model_type))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["vit", "dinov2", "clip_vision_model", "swin"])
def test_a_few_huge_activations_change_nothing(model_type, dtype):
    # Large ViTs carry some values of the stream that are hundreds of times larger than all others.
    backbone = tiny_backbone(model_type)
    expected = describe_backbone(backbone)
    with torch.no_grad():
        if model_type == "clip_vision_model":
            backbone.pre_layrnorm.bias[0] += 500
        elif model_type == "swin":
            backbone.embeddings.norm.bias[0] += 500
        else:
            backbone.embeddings.patch_embeddings.projection.bias[0] += 500
    assert describe_backbone(backbone.to(dtype)) == expected


def test_a_non_square_vit():
    config = ViTConfig(**{**TINY, "image_size": (32, 48)})
    layout = describe_backbone(randomise(ViTModel(config)).eval())
    assert layout.image_size == (32, 48)
    assert layout.grids == ((4, 6),) * (NUM_LAYERS + 1)


@pytest.mark.parametrize("model_type", ["resnet", "dinov2", "vit_mae"])
def test_describing_leaves_the_model_as_it_was(model_type):
    backbone = tiny_backbone(model_type).train()  # BatchNorm would move in training mode
    next(backbone.children()).eval()
    modes = [module.training for module in backbone.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in backbone.modules()]
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    config = backbone.config.to_dict()
    state = torch.get_rng_state()
    describe_backbone(backbone)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert backbone.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    # transformers installs hooks of its own at the first forward with hidden states; they stay the same after that.
    hooks_now = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in backbone.modules()]
    describe_backbone(backbone)
    hooks_then = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in backbone.modules()]
    assert hooks_then == hooks_now
    assert all(before[1] == now[1] for before, now in zip(hooks, hooks_now, strict=True))


def test_describing_restores_the_mode_after_an_error():
    backbone = scripted(None).train()
    with pytest.raises(LayerFusionError):
        describe_backbone(backbone)
    assert backbone.training


# ---- the description ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_round_trip_through_json(model_type):
    layout = describe_backbone(tiny_backbone(model_type))
    assert TokenLayout(**json.loads(json.dumps(layout.to_dict()))) == layout


def test_round_trip_of_everything_unusual():
    layout = TokenLayout(
        {"block": TapLayout("tokens", (0, 8, 16)), "pooler": TapLayout("vector", (0, 0, 4))},
        num_prefix_tokens=(0, 0, 1),
        num_suffix_tokens=2,
        cls_token=-1,
        grids=(None, (2, 3), (1, 1)),
        image_size=(32, 48),
        reading="hidden_states",
        tower="vision",
        first_hidden_state=0,
        final_norm="encoder.norm",
        attention_in_windows=True,
        batching="windows",
    )
    assert TokenLayout(**json.loads(json.dumps(layout.to_dict()))) == layout
    assert layout.num_suffix_tokens == (2, 2, 2)
    assert layout.grids == (None, (2, 3), (1, 1))


def test_what_a_description_answers():
    layout = describe_backbone(tiny_backbone("convnext"))
    assert layout.num_layers == 4
    assert layout.widths == (8, 8, 16, 24, 32)
    assert layout.modules == ("ln2", "fc1", "activation", "fc2", "block", "pooler")  # in the order of the data flow
    assert [layout.width(layer, "fc1") for layer in range(5)] == [0, 32, 64, 96, 128]
    assert [layout.width(*tap) for tap in ((5, "block"), (-1, "block"), (1, "attention"), (1, "fc3"))] == [0] * 4
    assert (layout.kind("block"), layout.kind("fc1"), layout.kind("pooler")) == (
        "channels_first",
        "channels_last",
        "vector",
    )


def test_the_plain_vit_is_what_a_vit_measures():
    measured = describe_backbone(tiny_backbone("vit"))
    plain = TokenLayout.of_plain_vit(HIDDEN_SIZE, NUM_LAYERS, 64)
    assert plain.taps == measured.taps
    assert plain.num_prefix_tokens == measured.num_prefix_tokens
    assert plain.cls_token == measured.cls_token
    assert plain.reading == measured.reading
    assert TokenLayout.of_plain_vit(HIDDEN_SIZE, NUM_LAYERS).width(1, "fc1") == 4 * HIDDEN_SIZE


BLOCK = {"block": TapLayout("tokens", (8, 8))}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: TapLayout("grid", (8,)),
            "token layout kind 'grid' is unknown: use one of ('tokens', 'channels_first'",
        ),
        (lambda: TokenLayout({"block": {"kind": "map", "widths": [8]}}), "token layout kind 'map' is unknown"),
        (
            lambda: TokenLayout({"ln2": TapLayout("tokens", (0, 8))}),
            "the token layout describes ['ln2'], but not the blocks' output",
        ),
        (
            lambda: TokenLayout({**BLOCK, "mlp": BLOCK["block"]}),
            "token layout module 'mlp' is unknown: use one of ('ln",
        ),
        (
            lambda: TokenLayout(BLOCK, reading="layers"),
            "token layout reading 'layers' is unknown: use one of ('blocks'",
        ),
        (lambda: TokenLayout(BLOCK, batching="rows"), "token layout batching 'rows' is unknown: use one of ('plain'"),
        (
            lambda: TokenLayout(BLOCK, num_prefix_tokens=(1, 1, 1)),
            "token layout num_prefix_tokens is (1, 1, 1), but there are 2 hidden states",
        ),
        (lambda: TokenLayout(BLOCK, num_suffix_tokens=-1), "token layout num_suffix_tokens is (-1, -1)"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(build, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"grids": ((4, 4),)}, "grids"),
        ({"taps": {**BLOCK, "ln2": TapLayout("tokens", (0, 8, 8))}}, "ln2"),
        ({"num_prefix_tokens": 1, "cls_token": 1}, "cls_token"),
        ({"num_suffix_tokens": 1, "cls_token": -2}, "cls_token"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(options, name):
    with pytest.raises(LayerFusionError, match=name):
        TokenLayout(**{"taps": BLOCK, **options})
