"""`LayerFusionConfig`: what it fills in, what it refuses, and that files keep it."""

import copy
import json
import re

import pytest
import torch
from modeling_helpers import TINY, tiny_backbone
from transformers import AutoConfig, Dinov2Config, PreTrainedConfig, ViTConfig

from hf_layerfusion import RECIPES, LayerFusionConfig, LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.heads import build_head
from hf_layerfusion.layout import MODULES, TapLayout, TokenLayout

# Recipes that a config describes; the others are models of scikit-learn.
HEADS = [name for name, recipe in RECIPES.items() if recipe.kind in ("head", "fine_tune")]
VIT = {"model_type": "vit", **TINY}
DEEP_VIT = VIT | {"num_hidden_layers": 12}  # deep enough for every recipe


def layout_of(kind, *widths, **taps):
    grids = ((4, 4),) * len(widths)
    return TokenLayout({"block": TapLayout(kind, widths), **taps}, grids=grids, image_size=(32, 32)).to_dict()


NO_CLS = layout_of("tokens", 32, 32, 32, 32, final_norm=TapLayout("tokens", (0, 0, 0, 32)))
GROWING = layout_of("channels_first", 8, 8, 16, 32)


def test_defaults_are_a_plain_vit_and_alf():
    config = LayerFusionConfig()
    assert isinstance(config.backbone_config, ViTConfig)
    assert config.recipe == "alf"
    assert config.layers == list(range(1, 13))
    assert config.modules == ["block"]
    assert config.pools == ["cls", "mean"]
    assert config.head_type == "attentive"
    assert config.num_backbone_layers == 12
    assert config.hidden_size == 768
    assert len(config.bank) == 24
    assert config.freeze_backbone
    assert config.token_normalization == "l2"
    assert config.keys_to_ignore_at_inference == ["layer_attentions"]


# Of a backbone of twelve blocks: layers, modules, pools, head, number of tokens.
ALL = list(range(1, 13))
RECIPE_BANKS = {
    "linear-last": ([12], ["final_norm"], ["cls"], "linear", 1),
    "linear-last-cls-mean": ([12], ["final_norm"], ["cls", "mean"], "linear", 2),
    "linear-all": (ALL, ["block"], ["cls", "mean"], "linear", 24),
    "alf": (ALL, ["block"], ["cls", "mean"], "attentive", 24),
    "ridge-max": (ALL, ["block"], ["cls", "mean", "max@-8:", "grid:4@spaced:4"], "linear", 24 + 8 + 64),
    "alf-paper": (ALL[1:], ["ln2", "final_norm"], ["cls", "mean"], "attentive", 24),
    "alf-mid-last": ([6, 12], ["block"], ["cls", "mean"], "attentive", 4),
    "alf-quarterly": ([3, 6, 9, 12], ["block"], ["cls", "mean"], "attentive", 8),
    "scalar-mix": (ALL, ["block"], ["cls", "mean"], "scalar_mix", 24),
    "linear-mid-last": ([6, 12], ["block"], ["cls", "mean"], "linear", 4),
    "linear-quarterly": ([3, 6, 9, 12], ["block"], ["cls", "mean"], "linear", 8),
    "linear-all-paper": (ALL[1:], ["ln2", "final_norm"], ["cls", "mean"], "linear", 24),
    "alf-last": ([12], ["final_norm"], ["cls", "mean"], "attentive", 2),
    "alf-cls": (ALL, ["block"], ["cls"], "attentive", 12),
    "alf-mean": (ALL, ["block"], ["mean"], "attentive", 12),
    "aat": ([12], ["final_norm"], ["tokens"], "attentive", 17),
    "aat-quarterly": ([3, 6, 9, 12], ["block"], ["tokens"], "attentive", 4 * 17),
    "fine-tune": ([12], ["final_norm"], ["cls"], "linear", 1),
    "lora": ([12], ["final_norm"], ["cls"], "linear", 1),
    "linear-layer:7": ([7], ["block"], ["cls", "mean"], "linear", 2),
    "aat-layer:7": ([7], ["block"], ["tokens"], "attentive", 17),
    "alf-heads:8": (ALL, ["block"], ["cls", "mean"], "attentive", 24),
    "aat-heads:12": ([12], ["final_norm"], ["tokens"], "attentive", 17),
    "module-probe:7:activation": ([7], ["activation"], ["mean"], "linear", 1),
}


@pytest.mark.parametrize("recipe", RECIPE_BANKS)
def test_recipe_fills_the_bank(recipe):
    config = LayerFusionConfig(backbone_config=DEEP_VIT, recipe=recipe)
    layers, modules, pools, head_type, num_tokens = RECIPE_BANKS[recipe]
    assert (config.layers, config.modules, config.pools) == (layers, modules, pools)
    assert config.head_type == head_type
    assert len(config.bank) == num_tokens == len(config.token_names)


@pytest.mark.parametrize("recipe", HEADS)
def test_every_recipe_constructs_and_its_head_runs(recipe):
    config = LayerFusionConfig(backbone_config=DEEP_VIT, recipe=recipe, num_labels=5)
    tokens = torch.randn(4, len(config.bank), config.hidden_size)
    assert build_head(config).eval()(tokens).shape == (4, 5)


def test_alf_paper_tokens_are_those_of_the_reference():
    # LN2 of every block but the first, then the final norm.
    taps = [f"layer {layer} · ln2" for layer in range(2, 13)] + ["layer 12 · final_norm"]
    names = LayerFusionConfig(backbone_config=DEEP_VIT, recipe="alf-paper").token_names
    assert names == [f"{tap} · {pool}" for tap in taps for pool in ("cls", "mean")]


def test_overrides_win_over_the_recipe():
    config = LayerFusionConfig(
        backbone_config=VIT,
        recipe="linear-last",
        layers=[0, -1],
        modules=["block"],
        pools=["mean"],
        head_type="attentive",
        num_heads=4,
    )
    assert config.token_names == ["layer 0 · embeddings · mean", "layer 3 · block · mean"]
    assert (config.head_type, config.num_heads) == ("attentive", 4)


def test_hidden_size_is_the_widest_tapped_layer():
    config = {"backbone_config": VIT, "token_layout": GROWING}
    assert LayerFusionConfig(**config).hidden_size == 32
    assert LayerFusionConfig(**config, layers=[1, 2]).hidden_size == 16
    assert LayerFusionConfig(**config, layers=[0, 1]).hidden_size == 8


# Four layers, for the recipes that need them.
ADAPTED = {
    "tokens": layout_of("tokens", *[32] * 5, final_norm=TapLayout("tokens", (0, 0, 0, 0, 32))),
    "maps": layout_of("channels_first", 8, *[32] * 4),
}


@pytest.mark.parametrize(
    "recipe", [name for name in HEADS if name not in ("alf-paper", "linear-all-paper", "alf-cls")]
)
@pytest.mark.parametrize("case", ADAPTED)
def test_recipes_adapt_to_a_backbone_without_cls_or_final_norm(recipe, case):
    config = LayerFusionConfig(backbone_config=VIT, token_layout=ADAPTED[case], recipe=recipe)
    more = ["max"] if recipe == "ridge-max" else []  # of all layers, since there are fewer than eight
    more += ["top:64@middle"] if recipe == "alf-top" else []
    more += ["grid:4@spaced:4"] if recipe.endswith(("-grid", "-two-stage", "-max")) else []
    assert config.pools == (["tokens"] if recipe.startswith("aat") or recipe == "ep" else ["mean", *more])
    if recipe.startswith("linear-last"):
        assert config.token_names == [f"layer 4 · {'final_norm' if case == 'tokens' else 'block'} · mean"]


def test_the_paper_s_recipe_needs_the_paper_s_taps():
    with pytest.raises(LayerFusionError, match="this backbone has no 'ln2': its modules are block"):
        LayerFusionConfig(backbone_config=VIT, token_layout=ADAPTED["maps"], recipe="alf-paper")


LATE_CLS = TokenLayout({"block": TapLayout("tokens", (8, 8, 8))}, num_prefix_tokens=(0, 0, 1), cls_token=0).to_dict()


def test_scalar_mix_takes_the_pools_that_every_layer_has():
    config = LayerFusionConfig(backbone_config=VIT, token_layout=LATE_CLS, recipe="scalar-mix")
    assert config.token_names == ["layer 1 · block · mean", "layer 2 · block · mean"]
    with pytest.raises(LayerFusionError, match="a scalar_mix head needs the same pools in every layer"):
        LayerFusionConfig(backbone_config=VIT, token_layout=LATE_CLS, recipe="scalar-mix", pools=["cls", "mean"])


def test_a_pool_that_was_asked_for_is_not_dropped_silently():
    with pytest.raises(LayerFusionError, match=re.escape("pools=['cls']: this backbone has no CLS token")):
        LayerFusionConfig(backbone_config=VIT, token_layout=NO_CLS, pools=["cls"])


def test_the_live_backbone_config_is_not_shared():
    backbone_config = ViTConfig(**TINY)
    config = LayerFusionConfig(backbone_config=backbone_config)
    config.backbone_config.image_size = 999
    assert backbone_config.image_size == TINY["image_size"]


BAD_VALUES = {
    "recipe": ({"recipe": "alff"}, "recipe 'alff' is unknown: choose from linear-last, linear-last-cls-mean"),
    "problem_type": ({"problem_type": "multi"}, "problem_type 'multi' is unknown: choose from ('single_label"),
    "num_labels": ({"num_labels": 0}, "num_labels=0: use 1 or more"),
    "id2label gap": ({"id2label": {1: "a", 2: "b"}}, "id2label must number its labels 0 to 1, but has [1, 2]"),
    "id2label size": (
        {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
        "num_labels=3, but id2label names 2 labels: give one of them",
    ),
    "label2id size": (
        {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0}},
        "label2id has 1 labels, but id2label has 2",
    ),
    "backbone type": (
        {"backbone_config": {"model_type": "vitt"}},
        "backbone_config has model_type 'vitt', which this version of transformers does not know",
    ),
    "layout not derivable": (
        {"backbone_config": {"model_type": "resnet"}},
        "the token layout of a 'resnet' backbone cannot be read off its config: build the head with from_backbone",
    ),
    "layout kind": (
        {"token_layout": {"taps": {"block": {"kind": "grid", "widths": [8, 8]}}}},
        "token layout kind 'grid' is unknown",
    ),
    "layer range": ({"layers": [4]}, "layer 4 is out of range for a backbone of 3 layers"),
    "layer count": ({"layers": 4}, "layers=4 asks for the last 4 layers, but the backbone has 3"),
    "layer text": ({"layers": "early"}, "layers='early' is not understood"),
    "module": ({"modules": ["fc3"]}, f"modules 'fc3' is unknown: choose from {list(MODULES)}"),
    "no module": ({"modules": []}, f"modules is empty: choose from {list(MODULES)}"),
    "absent module": (
        {"token_layout": NO_CLS, "modules": ["block", "fc1"]},
        "this backbone has no 'fc1': its modules are block, final_norm",
    ),
    "width alignment": (
        {"width_alignment": "crop"},
        "width_alignment 'crop' is unknown: choose from ['pad', 'project']",
    ),
    "module twice": ({"modules": ["ln2", "ln2"]}, "modules=['ln2', 'ln2'] names a value twice"),
    "pool": ({"pools": ["min"]}, "pools 'min' is unknown: choose from ['cls', 'mean', 'max', 'tokens']"),
    "no pool": ({"pools": []}, "pools is empty"),
    "pool twice": ({"pools": ["cls", "cls"]}, "pools=['cls', 'cls'] names a value twice"),
    "head": (
        {"head_type": "mlp"},
        "head_type 'mlp' is unknown: choose from ['attentive', 'efficient', 'two_stage', 'linear', 'scalar_mix']",
    ),
    "normalization": (
        {"token_normalization": "l1"},
        "token_normalization 'l1' is unknown: choose from ['l2', 'none', 'standardize']",
    ),
    "implementation": (
        {"head_implementation": "slow"},
        "head_implementation 'slow' is unknown: choose from ['fast', 'explicit']",
    ),
    "no token": (
        {"layers": [1, 2], "modules": ["final_norm"]},
        "layers=[1, 2], modules=['final_norm'] and pools=['cls', 'mean'] select no token: layer 0 has only its "
        "'block' output, 'final_norm' and 'pooler' stand at layer 3",
    ),
    "no token at 0": (
        {"layers": [0], "modules": ["ln2"]},
        "layers=[0], modules=['ln2'] and pools=['cls', 'mean'] select no token",
    ),
    "attention dropout": ({"attention_dropout": 1.5}, "attention_dropout=1.5 is not a probability: use 0 to 1"),
    "projection dropout": ({"projection_dropout": -0.1}, "projection_dropout=-0.1 is not a probability"),
    "noise probability": ({"noise_probability": float("nan")}, "noise_probability=nan is not a probability"),
    "noise": ({"noise_std": -0.05}, "noise_std=-0.05: use 0 or a positive number"),
    "noise nan": ({"noise_std": float("nan")}, "noise_std=nan: use 0 or a positive number"),
    "queries not whole": ({"num_queries": 1.5}, "num_queries=1.5: use 1 or more"),
    "heads above width": ({"num_heads": 10_000}, "num_heads=10000 does not fit tokens of width"),
    "negative class weight": ({"num_labels": 2, "class_weights": [1.0, -1.0]}, "must be 0 or positive numbers"),
    "dropout text": ({"attention_dropout": "x"}, "attention_dropout='x' is not a probability: use 0 to 1"),
    "backbone lr": ({"backbone_lr_factor": -1.0}, "backbone_lr_factor=-1.0: use 0 or a positive number"),
    "queries": ({"num_queries": 0}, "num_queries=0: use 1 or more"),
    "head dim": ({"head_dim_multiplier": 0}, "head_dim_multiplier=0: use 1 or more"),
    "heads": ({"num_heads": 0}, "num_heads=0: use 1 or more"),
    "class weights": (
        {"num_labels": 3, "class_weights": [1.0, 2.0]},
        "class_weights has 2 entries, but num_labels is 3",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_named(case):
    values, message = BAD_VALUES[case]
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        LayerFusionConfig(**{"backbone_config": VIT} | values)


ROUND_TRIPS = {
    "defaults": {},
    "paper": {"recipe": "alf-paper", "noise_std": 0.05, "attention_dropout": 0.1},
    "linear": {"recipe": "linear-last", "id2label": {0: "cat", 1: "dog", 2: "hen"}, "class_weights": [1.0, 2.0, 0.0]},
    "layers": {"layers": [0, -1], "pools": ["mean"], "num_heads": 4, "num_queries": 2, "projection_dropout": 0.2},
    "no cls": {"token_layout": NO_CLS, "recipe": "linear-last", "problem_type": "multi_label_classification"},
    "maps": {"token_layout": GROWING, "head_implementation": "explicit", "token_normalization": "none"},
    "pinned": {
        "backbone_name_or_path": "me/tiny",
        "backbone_revision": "a" * 40,
        "backbone_fingerprint": {"dtype": "float32", "digest": "0", "parts": {"embeddings": "1"}},
        "freeze_backbone": False,
        "backbone_lr_factor": 0.1,
    },
}
COMPARED = (
    *(
        "recipe",
        "layers",
        "modules",
        "pools",
        "token_layout",
        "width_alignment",
        "token_normalization",
        "noise_std",
        "noise_probability",
    ),
    *("head_type", "num_heads", "num_queries", "head_dim_multiplier", "attention_dropout", "projection_dropout"),
    *("head_implementation", "freeze_backbone", "backbone_lr_factor", "class_weights", "num_labels", "id2label"),
    *("label2id", "problem_type", "backbone_name_or_path", "backbone_revision", "backbone_fingerprint"),
    *("includes_backbone", "token_names", "hidden_size", "num_backbone_layers"),
)


@pytest.mark.parametrize("case", ROUND_TRIPS)
@pytest.mark.parametrize("loader", [LayerFusionConfig, AutoConfig])
def test_round_trip_through_files(case, loader, tmp_path):
    config = LayerFusionConfig(backbone_config=Dinov2Config(**TINY, mlp_ratio=2), **ROUND_TRIPS[case])
    before = copy.deepcopy({name: getattr(config, name) for name in COMPARED})
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is LayerFusionConfig
    assert {name: getattr(loaded, name) for name in COMPARED} == before
    assert isinstance(loaded.backbone_config, Dinov2Config)
    assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
    assert {name: getattr(config, name) for name in COMPARED} == before  # saving changes nothing


def test_the_file_is_explicit(tmp_path):
    LayerFusionConfig(backbone_config=VIT, layers=2).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "layer_fusion"
    assert values["layers"] == [2, 3]
    assert values["pools"] == ["cls", "mean"]
    assert values["head_type"] == "attentive"
    layout = values["token_layout"]
    assert layout["taps"]["block"] == {"kind": "tokens", "widths": [32] * 4}
    assert layout["taps"]["fc1"] == {"kind": "tokens", "widths": [0, 64, 64, 64]}
    assert (layout["num_prefix_tokens"], layout["num_suffix_tokens"], layout["cls_token"]) == ([1] * 4, [0] * 4, 0)


def test_a_damaged_file_is_refused(tmp_path):
    LayerFusionConfig(backbone_config=VIT).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": [1, 7]}))
    with pytest.raises(LayerFusionError, match="layer 7 is out of range for a backbone of 3 layers"):
        LayerFusionConfig.from_pretrained(tmp_path)


def test_attention_implementation_reaches_the_backbone():
    backbone_config = ViTConfig(**TINY)
    backbone_config._attn_implementation = "eager"
    assert LayerFusionConfig(backbone_config=backbone_config).backbone_config._attn_implementation == "eager"


def test_auto_config_knows_the_type():
    config = AutoConfig.for_model("layer_fusion", backbone_config=VIT)
    assert isinstance(config, LayerFusionConfig)
    assert isinstance(config, PreTrainedConfig)


def test_classes_may_share_a_name():
    """As two of ImageNet do."""
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("vit"), id2label=["crane", "crane", "x"]
    )
    assert model.config.num_labels == 3
    assert model.config.label2id == {"crane": 1, "x": 2}
