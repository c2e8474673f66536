"""Ensembles: the mean of the logits of heads that a sweep trains from different seeds, on every road."""

import argparse
import copy
import json
import pickle

import pytest
import torch
from modeling_helpers import images, randomise
from picture_helpers import save_tiny_backbone
from sweep_helpers import CLASSES, LAYERS, WIDTH, class_labels, learnable_tokens, write_features
from torch import nn

from hf_layerfusion import (
    LayerFusionConfig,
    LayerFusionError,
    SweepResult,
    ViTForAttentiveLayerFusionClassification,
    load_heads,
    sweep,
)
from hf_layerfusion.analysis.attention import summarise_attentions
from hf_layerfusion.cli import info
from hf_layerfusion.cli.sweep import SEARCH_OPTIONS, add_search_options, hyperparameters
from hf_layerfusion.export import _trace
from hf_layerfusion.features import token_statistics
from hf_layerfusion.heads import EnsembleHead, build_head, build_member
from hf_layerfusion.hub.cards import build_card
from hf_layerfusion.layout import TokenLayout
from hf_layerfusion.recipes import RECIPES
from hf_layerfusion.sweeps.run import member_seeds
from hf_layerfusion.training import build_trainer

LAYOUT = TokenLayout.of_plain_vit(WIDTH, LAYERS, image_size=32, patch_size=8).to_dict()
LABELS = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
MEMBERS = 3
# One of every type that can be a member, with what makes its arithmetic differ.
HEADS = {
    "attentive": {},
    "explicit order": {"head_implementation": "explicit"},
    "standardised, squared loss": {"loss": "squared", "token_normalization": "standardize"},
    "embeddings, several queries": {"token_embeddings": True, "num_queries": 2},
    "efficient": {"head_type": "efficient", "num_queries": 4},
    "two stages": {"head_type": "two_stage", "pools": ["cls", "grid:2"]},
}


def config_of(**options):
    return LayerFusionConfig(**{"token_layout": LAYOUT, "recipe": "alf", **LABELS, **options})


def ensemble_of(**options):
    """An ensemble with random values, and models of its members alone, all in float64."""
    torch.manual_seed(3)
    model = ViTForAttentiveLayerFusionClassification(
        config_of(num_members=MEMBERS, **options), with_backbone=False
    ).double()
    randomise(model.head)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_var", "std")):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("mean"):
            buffer.normal_()
        elif name.endswith("count"):
            buffer.fill_(1)
    alone = []
    for number in range(MEMBERS):
        single = ViTForAttentiveLayerFusionClassification(config_of(**options), with_backbone=False).double().eval()
        single.head.load_state_dict({name: value[number] for name, value in model.head.state_dict().items()})
        single.token_standardizer.load_state_dict(model.token_standardizer.state_dict())
        alone.append(single)
    return model.eval(), alone


def tokens_of(config, rows=7):
    return learnable_tokens(class_labels(rows), bank=list(config.bank.coordinates)).double()


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_logits_and_attentions_are_the_members_mean(options):
    model, alone = ensemble_of(**options)
    tokens = tokens_of(model.config)
    with torch.no_grad():
        found = model(layer_features=tokens, output_attentions=True)
        expected = [single(layer_features=tokens, output_attentions=True) for single in alone]
    logits = torch.stack([output.logits for output in expected])
    attentions = torch.stack([output.layer_attentions for output in expected])
    torch.testing.assert_close(found.logits, logits.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.layer_attentions, attentions.mean(0), rtol=1e-12, atol=1e-12)
    heads = model.config.num_heads or found.layer_attentions.shape[2]
    assert found.layer_attentions.shape == (7, model.config.num_queries, heads, len(model.config.bank))
    assert logits.std(dim=0).min() > 1e-3  # members that agreed would make this test say nothing
    assert model(layer_features=tokens).layer_attentions is None


def test_statistics_of_tokens_save_a_pass_here_too():
    model, _ = ensemble_of()
    model = model.float()
    tokens = tokens_of(model.config).float()
    with torch.no_grad():
        plain = model(layer_features=tokens).logits
        quick = model(layer_features=tokens, token_statistics=token_statistics(tokens)).logits
    torch.testing.assert_close(quick, plain)


def test_members_begin_apart_and_as_single_heads_do():
    config = config_of(num_members=MEMBERS)
    head, single = build_head(config), build_member(config)
    assert isinstance(head, EnsembleHead)
    assert not isinstance(single, EnsembleHead)
    expected = {name: (MEMBERS, *value.shape) for name, value in single.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == expected
    assert {name for name, _ in head.named_parameters()} == {name for name, _ in single.named_parameters()}
    torch.manual_seed(0)
    head.reset_parameters()
    torch.manual_seed(0)
    for number in range(MEMBERS):
        single.reset_parameters()
        for name, value in single.state_dict().items():
            assert torch.equal(head.state_dict()[name][number], value), name
    assert not torch.equal(head.state_dict()["query"][0], head.state_dict()["query"][1])


def test_it_is_copied_moved_and_pickled():
    model, _ = ensemble_of()
    tokens = tokens_of(model.config)
    expected = model(layer_features=tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.float().double()):
        assert torch.allclose(twin(layer_features=tokens).logits, expected, atol=1e-5)
    other = copy.deepcopy(model.head)
    with torch.no_grad():
        other.get_parameter("classifier.bias").add_(1.0)
    assert torch.allclose(model(layer_features=tokens).logits, expected, atol=1e-5)
    torch.testing.assert_close(other(tokens, normalize=True), model.head(tokens, normalize=True) + 1.0)


def test_gradients_reach_every_member():
    model, _ = ensemble_of()
    model(layer_features=tokens_of(model.config)).logits.square().sum().backward()
    gradient = model.head.get_parameter("v_proj.weight").grad
    assert gradient.shape[0] == MEMBERS
    assert all(one.abs().max() > 1e-6 for one in gradient)


# ---- config ----------------------------------------------------------------------------------------------------


def test_a_config_of_a_single_head_is_as_it_was():
    single = config_of()
    assert single.num_members == 1
    assert "num_members" not in single.to_dict()
    assert "num_members" not in single.to_json_string()
    assert LayerFusionConfig.from_dict(single.to_dict()).num_members == 1
    assert config_of(num_members=1).to_dict() == single.to_dict()
    several = config_of(num_members=4)
    assert LayerFusionConfig.from_dict(json.loads(several.to_json_string())).num_members == 4


def test_the_recipe():
    config = config_of(recipe="alf-ensemble")
    assert (config.num_members, config.attention_dropout) == (5, config_of().attention_dropout)
    # Against the recipe's word, a single head is written down.
    single = config_of(recipe="alf-ensemble", num_members=1)
    assert LayerFusionConfig.from_dict(json.loads(single.to_json_string())).num_members == 1
    same = ("layers", "modules", "pools", "learning_rate", "weight_decay", "solver", "kind")
    assert all(getattr(RECIPES["alf-ensemble"], name) == getattr(RECIPES["alf"], name) for name in same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_members": 0}, "num_members=0: use 1 or more"),
        ({"num_members": 2.0}, r"num_members=2\.0: use 1 or more"),
        ({"num_members": True}, "num_members=True: use 1 or more"),
        ({"num_members": 65}, "num_members=65: use at most 64"),
        ({"num_members": 2, "recipe": "linear-all"}, "again one linear head"),
        ({"num_members": 2, "recipe": "scalar-mix"}, "again one linear head"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(LayerFusionError, match=message):
        config_of(**options)


# ---- sweeps ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features"))


def swept(features, **options):
    grid = {"learning_rate": [1e-2, 1e-3], "weight_decay": 1e-2}
    fixed = {"num_epochs": 3, "batch_size": 30, "dtype": torch.float64, "progress": False, "plot": False}
    return sweep(features, **{"grid": grid, **fixed, **options})


def head_logits(result, tokens, seed=None):
    model = ViTForAttentiveLayerFusionClassification(result.config, with_backbone=False).double().eval()
    model.load_head_state(result.head_state(seed))
    with torch.no_grad():
        return model(layer_features=tokens).logits


def test_members_are_what_single_sweeps_train(features, tmp_path):
    """Chosen as single heads are; trained on all rows from seeds that no other ensemble has."""
    options = {"token_normalization": "standardize", "loss": "squared", "num_epochs": 2}
    result = swept(features, num_members=2, refit_seeds=(0, 2), output_dir=tmp_path / "ensemble", **options)
    single = swept(features, refit_seeds=[0, 1, 4, 5], **options)
    assert (result.best, result.trials) == (single.best, single.trials)
    assert [member_seeds(seed, 2) for seed in (0, 2)] == [[0, 1], [4, 5]]
    assert list(result.heads) == [0, 2]
    tokens = features.select_bank(result.config.bank).tensors()["layer_features"].double()
    for seed, members in ((0, (0, 1)), (2, (4, 5))):
        expected = torch.stack([head_logits(single, tokens, member) for member in members])
        assert expected.std(dim=0).min() > 1e-6
        torch.testing.assert_close(head_logits(result, tokens, seed), expected.mean(0), rtol=1e-9, atol=1e-9)
    loaded = SweepResult.load(tmp_path / "ensemble")
    assert torch.equal(head_logits(loaded, tokens, 2), head_logits(result, tokens, 2))
    assert hyperparameters(result)["members"] == "2, of seeds 0 to 1"
    assert "members" not in hyperparameters(single)
    # Finished: the same call finds it, and another number of members is another sweep.
    again = swept(features, num_members=2, refit_seeds=(0, 2), output_dir=tmp_path / "ensemble", **options)
    assert again.protocol == loaded.protocol
    with pytest.raises(LayerFusionError, match="a sweep of something else"):
        swept(features, refit_seeds=(0, 2), output_dir=tmp_path / "ensemble", **options)


def test_the_recipe_in_a_sweep(features):
    """By itself, and beside others: the number of members is the recipe's."""
    settings = {"grid": {"learning_rate": 1e-2}, "num_epochs": 1}
    result = swept(features, recipe="alf-ensemble", **settings)
    assert result.head_state()["query"].shape == (5, 1, 1, WIDTH)
    beside = swept(features, recipe=["linear-all", "alf-ensemble"], refit=False, **settings)
    assert {setting.recipe for setting in beside.settings} == {"linear-all", "alf-ensemble"}
    assert "num_members" not in json.dumps(swept(features, refit=False, **settings).protocol)


@pytest.mark.parametrize("recipe", ["ridge-all", "linear-all", "auto"])
def test_linear_heads_have_no_members(features, recipe):
    with pytest.raises(LayerFusionError, match="again one linear head"):
        swept(features, recipe=recipe, num_members=2)


def test_option_of_the_command_line():
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    assert parser.parse_args(["--num_members", "4"]).num_members == 4
    assert parser.parse_args([]).num_members is None
    assert "num_members" in SEARCH_OPTIONS
    with pytest.raises(SystemExit):
        parser.parse_args(["--num_members", "0"])


def test_it_is_not_trained_as_a_whole(features, tmp_path):
    model = ViTForAttentiveLayerFusionClassification(config_of(num_members=2), with_backbone=False)
    trainer = build_trainer(model, features, tmp_path, num_train_epochs=1, use_cpu=True, disable_tqdm=True)
    with pytest.raises(LayerFusionError, match=r"2 members of an ensemble are trained apart.*use sweep"):
        trainer.train()
    predicted = trainer.predict(features.select_bank(model.config.bank)).predictions
    assert predicted.shape == (len(features), CLASSES)


# ---- files, programs, cards ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A backbone, an ensemble and a single head on it, saved; and the ensemble."""
    root = tmp_path_factory.mktemp("heads")
    backbone = save_tiny_backbone(root / "backbone")
    torch.manual_seed(5)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        backbone, recipe="alf-ensemble", num_members=MEMBERS, num_labels=CLASSES
    )
    randomise(model.head)
    model.save_pretrained(root / "ensemble")
    ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=2).save_pretrained(root / "single")
    return root, model


def test_saved_loaded_and_beside_another_head(saved):
    root, model = saved
    with torch.no_grad():
        expected = model(images(), output_attentions=True)
        loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(root / "ensemble")
        found = loaded(images(), output_attentions=True)
        both = load_heads(root / "backbone", {name: root / name for name in ("ensemble", "single")})
        beside = both(images(), output_attentions=True)
    assert isinstance(loaded.head, EnsembleHead)
    for output in (found, beside["ensemble"]):
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.layer_attentions, expected.layer_attentions, rtol=1e-6, atol=1e-6)
    assert beside["single"].logits.shape == (2, 2)


def test_a_head_of_another_number_of_members_is_refused(saved, tmp_path):
    root, _ = saved
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((root / "ensemble" / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_members"] == MEMBERS
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_members": 2}))
    with pytest.raises(LayerFusionError, match=r"has shape .* but the config asks for"):
        ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path, backbone=root / "backbone")


def test_programs_give_its_logits(saved):
    """The one that all files are made of."""
    _, model = saved
    program = _trace(model, images(), True).module()
    assert model.head.implementation == "fast"
    with torch.no_grad():
        torch.testing.assert_close(program(images(3)), model(images(3)).logits, rtol=0, atol=1e-5)


def test_what_is_said_of_it(saved, capsys):
    root, model = saved
    card = (root / "ensemble" / "README.md").read_text(encoding="utf-8")
    size = sum(parameter.numel() for parameter in model.head.parameters())
    assert f"ensemble, the mean of the logits of 3 heads: attentive, {size:,} parameters" in card
    assert "ensemble" not in str(build_card(config_of(), {}, 1))
    info.run(argparse.Namespace(name=str(root / "ensemble"), revision=None))
    assert f"recipe alf-ensemble, attentive x 3 (an ensemble), {size:,} parameters" in capsys.readouterr().out
    flops = [info._flops_per_image(config_of(num_members=number)) for number in (1, MEMBERS)]
    assert flops[1] == MEMBERS * flops[0] > 0


def test_its_layers_are_summarised(saved):
    _, model = saved
    summary = summarise_attentions(model, [{"pixel_values": images()}])
    with torch.no_grad():
        attentions = model(images(), output_attentions=True).layer_attentions
    torch.testing.assert_close(summary.mean, attentions.flatten(1, 2).double().mean(0))
    assert sum(summary.layer_weights.values()) == pytest.approx(1.0)


def test_a_member_needs_nothing_but_its_tensors():
    """The shape that an ensemble keeps of its members holds no memory."""
    head = EnsembleHead(build_member(config_of()), 2)
    assert all(parameter.is_meta for parameter in head.member.parameters())
    assert not any(isinstance(module, nn.Linear) for module in head.modules())
