"""Every vision model type that the installed transformers knows, enumerated from its own mappings."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from backbone_support import SUPPORTED, UNSUPPORTED, num_layers_of, takes, write_table
from backbone_zoo import NOT_BUILT, build, inputs, vision_model_types

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.model_classes import pixel_argument
from hf_layerfusion.pooling import pool_activation
from hf_layerfusion.probe import describe_backbone
from hf_layerfusion.taps import first_tensor, read_taps


@cache
def head_on(model_type):
    """A head over all layers on a tiny backbone of this type; shared by the tests, which leave it as it is."""
    torch.manual_seed(0)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(build(model_type), num_labels=3, layers="all")
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(model, **options):
    """The backbone's inputs under the names that our forward gives them."""
    given = inputs(model.backbone, **options)
    given["pixel_values"] = given.pop(pixel_argument(model.backbone))
    if model.backbone.config.model_type == "xclip_vision_model":  # clips here, all of their frames in a row there
        given["pixel_values"] = given["pixel_values"].unflatten(0, (-1, model.backbone.config.num_frames))
    return given


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_forward_loss_and_backward_into_the_head_only(model_type):
    model = head_on(model_type)
    model.zero_grad()
    output = model(**pixels(model), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    assert torch.isfinite(output.loss)
    output.loss.backward()
    for name, parameter in model.head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.head.classifier.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_live_equals_cached(model_type):
    model = head_on(model_type)
    given = pixels(model)
    tokens = model.extract_layer_features(**given)
    assert tokens.shape == (2, len(model.config.bank), model.config.hidden_size)
    assert torch.isfinite(tokens).all()
    difference = (tokens[0] - tokens[1]).abs().amax(dim=-1)
    assert (difference > 0).all(), f"the same for two images: {model.config.token_names}"
    with torch.no_grad():
        torch.testing.assert_close(model(layer_features=tokens).logits, model(**given).logits, rtol=0, atol=1e-6)
        # Each image by itself gives what it gives in a batch.
        alone = model.extract_layer_features(**{name: value[1:] for name, value in given.items()})
    torch.testing.assert_close(alone[0], tokens[1], rtol=1e-3, atol=1e-4 * float(tokens.abs().max()))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_save_and_load(model_type, tmp_path):
    backbone = head_on(model_type).backbone
    backbone.save_pretrained(tmp_path / "backbone")
    model = ViTForAttentiveLayerFusionClassification.from_backbone(tmp_path / "backbone", num_labels=3)
    assert type(model.backbone) is type(backbone)
    assert model.config.token_layout["taps"]["block"] == head_on(model_type).config.token_layout["taps"]["block"]
    model.save_pretrained(tmp_path / "head")
    assert not any(name.startswith("backbone.") for name in _tensor_names(tmp_path / "head"))
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path / "head")
    given = pixels(model)
    with torch.no_grad():
        expected, found = model(**given).logits, loaded(**given).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _tensor_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


# ---- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_as_many_layers_are_read_as_the_model_has(model_type):
    model = head_on(model_type)
    expected = num_layers_of(model.backbone)
    assert model.config.num_backbone_layers == expected
    assert {coordinate.layer for coordinate in model.config.bank.coordinates} == set(range(1, expected + 1))


# ---- which tokens are averaged -----------------------------------------------------------------------------------

_SPECIAL_PARAMETERS = re.compile(
    r"cls_token|class_embed|class_token|class_pos|register|storage_token|distillation_token|detection_token|query_\d+"
)
# Where special tokens join in a later stage: positions in the last one, and the parameter they come from.
LATE_SPECIAL_TOKENS = {"pvt": [0]}


def read_layers(model_type, backbone, layers):
    """`(rows, T, D)` of each layer's output."""
    model = head_on(model_type)
    taps = [(layer, "block") for layer in layers]
    with torch.no_grad():
        return read_taps(backbone, model.config.layout, taps, lambda _, x: x.clone(), **pixels(model))


@cache
def all_layers(model_type):
    layout = head_on(model_type).config.layout
    layers = [layer for layer in range(layout.num_layers + 1) if layout.width(layer, "block")]
    return read_layers(model_type, head_on(model_type).backbone, layers)


def activation(model_type, layer):
    return all_layers(model_type)[layer, "block"]


@cache
def special_positions(model_type):
    """Positions, among the tokens of one image or window, that come from parameters: other parameters, other tokens."""
    layout = head_on(model_type).config.layout
    backbone = build(model_type)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if _SPECIAL_PARAMETERS.search(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    change = read_layers(model_type, backbone, [0])[0, "block"] - activation(model_type, 0)
    rows = {"sequence_first": lambda x: x.transpose(0, 1), "packed": lambda x: x.unflatten(1, (2, -1)).squeeze(0)}
    change = rows.get(layout.batching, lambda x: x)(change)
    return torch.nonzero(change.abs().amax(dim=(0, 2)) > 0).flatten().tolist()


def pooling_weights(tokens, layout, layer, pool):
    """How much each token counts in a pool, `(rows, T)`: the gradient of the pooled token."""
    tokens = tokens.detach().double().requires_grad_()
    pool_activation(tokens, layout, (layer, "block"), [pool], 2)[..., 0].sum().backward()
    return tokens.grad[..., 0]


def _check_maps(model_type, layout):
    """The channel axis is the one that the model's parameters count, and the mean is over the other two."""
    sizes = {size for parameter in head_on(model_type).backbone.parameters() for size in parameter.shape[:2]}
    for layer in range(1, layout.num_layers + 1):
        maps = activation(model_type, layer)
        axis = 1 if layout.kind("block") == "channels_first" else 3
        assert maps.shape[axis] == layout.widths[layer]
        assert layout.widths[layer] in sizes
        pooled = pool_activation(maps, layout, (layer, "block"), ["mean"], 2)[:, 0]
        torch.testing.assert_close(pooled, maps.mean(dim=(2, 3) if axis == 1 else (1, 2)))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_mean_leaves_special_tokens_out_and_takes_every_patch(model_type):
    layout = head_on(model_type).config.layout
    if layout.kind("block") != "tokens":
        _check_maps(model_type, layout)
        return
    for layer in (0, layout.num_layers):
        if not layout.width(layer, "block"):
            continue
        special = special_positions(model_type)
        if layer:
            special = LATE_SPECIAL_TOKENS.get(model_type, special)
        weights = pooling_weights(activation(model_type, layer), layout, layer, "mean")
        if layout.batching == "sequence_first":
            weights = weights.T
        if layout.batching == "packed":
            weights = weights.unflatten(1, (2, -1)).squeeze(0)
        expected = torch.ones(weights.shape[1], dtype=torch.double)
        expected[special] = 0
        windows = weights.shape[0] // 2
        torch.testing.assert_close(weights, (expected / expected.sum() / windows).expand_as(weights))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_cls_token_is_the_cls_token(model_type):
    """It is one token, comes from a parameter that is called so, and no picture changes it before the first block."""
    layout = head_on(model_type).config.layout
    if not any(layout.has_cls_at(layer) for layer in range(layout.num_layers + 1)):
        # Each window has its own CLS token, so there is none of the whole picture; of a CLS beside maps, no tap is told.
        if layout.kind("block") == "tokens" and layout.batching != "windows":
            assert 0 not in special_positions(model_type)
        return
    for layer in (0, layout.num_layers):
        if not layout.has_cls_at(layer):
            assert model_type in LATE_SPECIAL_TOKENS
            continue
        tokens = activation(model_type, layer)
        weights = pooling_weights(tokens, layout, layer, "cls")
        weights = weights.T if layout.batching == "sequence_first" else weights
        position = int(weights[0].argmax())
        assert torch.equal(weights, torch.eye(weights.shape[1], dtype=torch.double)[position].expand_as(weights))
        assert position in (special_positions(model_type) or LATE_SPECIAL_TOKENS[model_type])
        if layer == 0:
            states = tokens.transpose(0, 1) if layout.batching == "sequence_first" else tokens
            assert torch.equal(states[0, position], states[1, position])


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_layers_are_transformers_own_hidden_states(model_type):
    model = head_on(model_type)
    given, layout = inputs(model.backbone), model.config.layout
    options = {"noise": torch.arange(16.0).expand(2, -1)} if model_type == "vit_mae" else {}
    mask_ratio = getattr(model.backbone.config, "mask_ratio", None)
    if model_type == "vit_mae":
        model.backbone.config.mask_ratio = 0.0
    with torch.no_grad():
        outputs = model.backbone(**given, **options, output_hidden_states=True)
    if model_type == "vit_mae":
        model.backbone.config.mask_ratio = mask_ratio
    states = [first_tensor(state) for state in getattr(outputs, "hidden_states", None) or ()]
    if not states:
        assert model_type in WITHOUT_HIDDEN_STATES
        return
    # Some models put their last_hidden_state in the place of the last one: compared up to there.
    for layer in range(1, layout.num_layers):
        state = states[layer - 1 + layout.first_hidden_state]
        assert state.shape == activation(model_type, layer).shape
        torch.testing.assert_close(activation(model_type, layer), state, rtol=1e-4, atol=1e-4)


# Their layers are read all the same, by hooks.
WITHOUT_HIDDEN_STATES = {"bridgetower_vision_model"}


# ---- other sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_two_image_sizes_where_the_model_takes_them(model_type):
    model = head_on(model_type)
    native = model.config.layout.image_size
    if native is None:  # patches of any grid; see test_pooling.py
        return
    other = (native[0] * 2, native[1] * 2)
    given = pixels(model, size=other)
    by_stage = model.config.layout.reading == "hidden_states"
    if takes(model.backbone, inputs(model.backbone, size=other), by_stage):
        with torch.no_grad():
            logits = model(**given).logits
            assert torch.isfinite(logits).all()
            assert not torch.equal(logits, model(**pixels(model)).logits)
    else:
        with pytest.raises(LayerFusionError, match=r"cannot read images of \d+ x \d+ px: "):
            model(**given)


# ---- what does not work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [name for name in vision_model_types() if name in UNSUPPORTED])
def test_a_listed_type_does_not_work(model_type):
    backbone = build(model_type)
    with pytest.raises(LayerFusionError):
        describe_backbone(backbone)
    # What needs nothing but images must work.
    with pytest.raises(Exception):  # noqa: B017 (each model fails in its own way)
        assert backbone(torch.randn(2, 3, 64, 64), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("model_type", [name for name in vision_model_types() if name in NOT_BUILT])
def test_a_type_that_is_not_built_cannot_be_built(model_type):
    with pytest.raises((ImportError, OSError, ValueError)):
        build(model_type)


def test_lists_name_known_types_only():
    assert set(vision_model_types()) <= set(transformers.CONFIG_MAPPING)
    assert not set(UNSUPPORTED) & set(NOT_BUILT)


# ---- what the documents say --------------------------------------------------------------------------------------

PROJECT = Path(__file__).parent.parent
_IS_PINNED = f"transformers=={transformers.__version__}\n" in (PROJECT / "constraints.txt").read_text()


def test_count(capsys):
    with capsys.disabled():
        print(f"\n{len(SUPPORTED)} of {len(vision_model_types())} model types")
    assert len(SUPPORTED) + len(set(vision_model_types()) & {*UNSUPPORTED, *NOT_BUILT}) == len(vision_model_types())


@pytest.mark.skipif(not _IS_PINNED, reason="the documents count the types of the pinned transformers")
def test_the_documents_say_the_same(tmp_path):
    count = f"{len(SUPPORTED)} of {len(vision_model_types())} model types"
    assert count in (PROJECT / "README.md").read_text()
    write_table(
        tmp_path / "backbones.md", lambda model_type: (head_on(model_type).backbone, head_on(model_type).config.layout)
    )
    assert (tmp_path / "backbones.md").read_text() == (PROJECT / "docs/backbones.md").read_text()
