"""Recipes by name: the fixed ones, the families, and the tokens that each reads from a backbone."""

import re

import pytest
import torch
from modeling_helpers import HIDDEN_SIZE, NUM_LAYERS, NUM_PATCHES, images, tiny_backbone
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import RECIPES, LayerFusionConfig, LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.layout import BLOCK_MODULES, TapLayout, TokenLayout
from hf_layerfusion.recipe_tokens import recipe_bank
from hf_layerfusion.recipes import FAMILIES, KINDS, expand_recipes, find_recipe

PLAIN = TokenLayout.of_plain_vit(16, 12, image_size=32, patch_size=8)


@pytest.mark.parametrize("name", RECIPES)
def test_fixed_recipes_are_whole(name):
    recipe = find_recipe(name)
    assert recipe is RECIPES[name]
    assert recipe.description
    assert recipe.kind in KINDS
    assert (recipe.estimator is not None) == (recipe.kind == "estimator")
    assert len(recipe_bank(name, PLAIN))


@pytest.mark.parametrize(
    ("name", "layers", "modules", "pools", "head_type", "num_heads"),
    [
        ("linear-layer:7", [7], ("block",), ("cls", "mean"), "linear", None),
        ("aat-layer:12", [12], ("block",), ("tokens",), "attentive", 8),
        ("aat-heads:32", "last", ("final_norm",), ("tokens",), "attentive", 32),
        ("alf-heads:4", "all", ("block",), ("cls", "mean"), "attentive", 4),
        ("module-probe:3:activation", [3], ("activation",), ("mean",), "linear", None),
        ("module-logistic:3:ln2", [3], ("ln2",), ("mean",), "linear", None),
    ],
)
def test_families(name, layers, modules, pools, head_type, num_heads):
    recipe = find_recipe(name)
    assert (recipe.layers, recipe.modules, recipe.pools) == (layers, modules, pools)
    assert (recipe.head_type, recipe.head_options.get("num_heads")) == (head_type, num_heads)
    assert recipe.estimator == ("logistic" if name.startswith("module-logistic") else None)
    assert f" {name.split(':')[1]}" in recipe.description


def test_number_of_heads_keeps_the_rest_of_a_recipe():
    assert find_recipe("alf-heads:8").head_options == {**RECIPES["alf"].head_options, "num_heads": 8}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alff", "did you mean 'alf'?"),
        ("", "recipe '' is unknown: choose from linear-last"),
        (7, "recipe 7 is unknown"),
        (["alf"], "recipe ['alf'] is unknown"),
        ("alf:3", "recipe 'alf:3' is unknown: families are linear-layer:K"),
        ("linear-layer", "recipe 'linear-layer' is unknown"),
        ("linear-layer:", "'' is no number, as in 'linear-layer:7'"),
        ("linear-layer:-1", "'-1' is no number"),
        ("linear-layer:07", "'07' is no number"),
        ("linear-layer:٣", "is no number"),
        ("linear-layer:3:block", "recipe 'linear-layer:3:block' is unknown"),
        ("module-probe:3", "recipe 'module-probe:3' is unknown"),
        ("module-probe:3:mlp", "'mlp' is no module; choose from ln1, attention"),
        ("aat-heads:0", "has no attention head"),
    ],
)
def test_unknown_names_say_what_is_known(name, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        find_recipe(name)


def test_stars_stand_for_every_layer_and_module():
    assert expand_recipes(["alf", "linear-layer:*", "alf"], PLAIN) == [
        "alf",
        *(f"linear-layer:{layer}" for layer in range(1, 13)),
    ]
    assert expand_recipes(["module-probe:2:*"], PLAIN) == [f"module-probe:2:{module}" for module in BLOCK_MODULES]
    assert len(expand_recipes(["module-logistic:*:*"], PLAIN)) == 12 * 8
    assert expand_recipes(["module-probe:*:ln2"], PLAIN)[-1] == "module-probe:12:ln2"


def test_stars_leave_out_what_a_backbone_lacks():
    taps = {"block": TapLayout("tokens", (8, 8, 8)), "fc1": TapLayout("tokens", (0, 0, 32))}
    layout = TokenLayout(taps)
    assert expand_recipes(["module-probe:*:*"], layout) == [
        "module-probe:1:block",
        "module-probe:2:fc1",
        "module-probe:2:block",
    ]


def test_stars_of_a_layer_that_is_not_there():
    with pytest.raises(
        LayerFusionError, match=r"'module-probe:99:\*' finds none of its tokens: this backbone has layers 1 to 12"
    ):
        expand_recipes(["module-probe:99:*"], PLAIN)


@pytest.mark.parametrize("name", ["alf-heads:*", "aat-heads:*"])
def test_numbers_of_heads_are_named(name):
    with pytest.raises(LayerFusionError, match="name the numbers of heads, such as a"):
        expand_recipes([name], PLAIN)


@pytest.mark.parametrize("name", ["nothing:*", "module-probe:*:*:*", "linear-layer:*:block"])
def test_stars_of_unknown_families(name):
    with pytest.raises(LayerFusionError, match="is unknown"):
        expand_recipes([name], PLAIN)


def test_every_family_has_an_example():
    values = {"K": "7", "H": "4", "MODULE": "ln2"}
    for pattern in FAMILIES:
        family, *places = pattern.split(":")
        assert find_recipe(":".join([family, *(values[place] for place in places)]))


def test_the_bank_of_a_missing_module():
    layout = TokenLayout({"block": TapLayout("tokens", (8, 8, 8))})
    with pytest.raises(
        LayerFusionError, match="recipe 'module-probe:1:ln2' reads 'ln2', which this backbone does not"
    ):
        recipe_bank("module-probe:1:ln2", layout)
    with pytest.raises(LayerFusionError, match="out of range for a backbone of 2 layers"):
        recipe_bank("linear-layer:3", layout)


def test_an_estimator_is_no_head():
    with pytest.raises(LayerFusionError, match="recipe 'knn-last' is a model of scikit-learn and no head"):
        LayerFusionConfig(recipe="knn-last")


@pytest.mark.parametrize("recipe", ["fine-tune", "lora"])
def test_fine_tuning_recipes_unfreeze(recipe):
    assert not LayerFusionConfig(recipe=recipe).freeze_backbone
    assert LayerFusionConfig(recipe=recipe, freeze_backbone=True).freeze_backbone


# ---- all tokens --------------------------------------------------------------------------------------------------


def build(model_type="vit", **options):
    size = {"height": 32, "width": 32}
    options = {"image_processor": ViTImageProcessorPil(size=size), "num_labels": 3, **options}
    return ViTForAttentiveLayerFusionClassification.from_backbone(tiny_backbone(model_type), **options)


def test_all_tokens_are_those_of_the_hidden_states():
    model = build(recipe="aat-quarterly", layers=[1, NUM_LAYERS])
    tokens = model.extract_layer_features(images())
    with torch.no_grad():
        hidden_states = model.backbone(images(), output_hidden_states=True).hidden_states
    assert tokens.shape == (2, 2 * (1 + NUM_PATCHES), HIDDEN_SIZE)
    torch.testing.assert_close(tokens, torch.cat([hidden_states[1], hidden_states[NUM_LAYERS]], dim=1))
    assert model.config.token_names[:2] == ["layer 1 · block · cls", "layer 1 · block · patch 0"]


def test_registers_are_no_patches():
    model = build("dinov2_with_registers", recipe="aat-layer:2")
    names = [coordinate.pool for coordinate in model.config.bank.coordinates]
    assert names == ["cls", *(f"patch {number}" for number in range(NUM_PATCHES))]
    with torch.no_grad():
        hidden = model.backbone(images(), output_hidden_states=True).hidden_states[2]
    expected = torch.cat([hidden[:, :1], hidden[:, -NUM_PATCHES:]], dim=1)
    torch.testing.assert_close(model.extract_layer_features(images()), expected)


def test_maps_have_patches_and_no_cls():
    model = build("swin", recipe="aat-layer:1")
    with torch.no_grad():
        stage = model.backbone(images(), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(model.extract_layer_features(images()), stage)


def test_means_and_patches_side_by_side_in_any_order():
    model = build(layers=[2], pools=["mean", "tokens"])
    tokens = model.extract_layer_features(images())
    torch.testing.assert_close(tokens[:, 0], tokens[:, 2:].mean(dim=1))
    bank = type(model.config.bank)(tuple(reversed(model.config.bank.coordinates)))
    torch.testing.assert_close(model.extract_layer_features(images(), bank=bank), tokens.flip(1))


def test_the_image_size_is_that_of_the_processor_or_the_one_asked_for():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    options = {"recipe": "aat", "image_processor": processor}
    assert build("dinov2", **options).config.image_size == [16, 16]
    resized = build("dinov2", image_size=24, **options)
    assert resized.config.image_size == [24, 24]
    assert resized.image_processor.size["height"] == 24
    assert len(resized.config.bank) == 1 + 9
    assert build("dinov2", recipe="alf", image_processor=processor).config.image_size is None


def test_images_of_another_size_are_refused():
    model = build("dinov2", recipe="aat")
    message = f"the bank has {NUM_PATCHES} patches of 'final_norm' at layer {NUM_LAYERS}, but these images give 4"
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        model(images()[:, :, :16, :16])


def test_a_saved_head_knows_its_image_size(tmp_path):
    model = build("dinov2", recipe="aat", image_size=24)
    model.save_pretrained(tmp_path / "head")
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path / "head", backbone=model.backbone)
    assert loaded.config.image_size == [24, 24]
    pixels = images()[:, :, :24, :24]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("image_size", [0, -8, 2.5, "32", [32, 32], True])
def test_bad_image_sizes(image_size):
    with pytest.raises(LayerFusionError, match="give a number of pixels"):
        build(image_size=image_size)


@pytest.mark.parametrize("image_size", [0, [8], [8, "8"], [8, -8], "8"])
def test_bad_image_sizes_in_a_config(image_size):
    with pytest.raises(LayerFusionError, match="give height and width in pixels"):
        LayerFusionConfig(image_size=image_size)


def test_tokens_need_a_known_grid():
    layout = TokenLayout({"block": TapLayout("tokens", (8, 8))}, num_prefix_tokens=1, cls_token=0).to_dict()
    with pytest.raises(LayerFusionError, match=re.escape("pools=['tokens'] needs a grid of patches")):
        LayerFusionConfig(token_layout=layout, recipe="aat-layer:1")
