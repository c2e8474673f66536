"""The model: what goes in, what comes out, what trains, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    pipeline,
)

from hf_layerfusion import RECIPES, LayerFusionConfig, LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.images import decode_image

NUM_LABELS, NUM_TOKENS, WIDTH = 3, 8, 16


@pytest.fixture
def vit(make_vit):
    """Dropout is far too strong to miss if it were active."""
    return make_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)


@pytest.fixture
def dinov2():
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        drop_path_rate=0.9,
        initializer_range=0.3,
    )
    return Dinov2Model(config)


@pytest.fixture
def resnet():
    """A backbone with BatchNorm, channels-first maps, and layers of different width."""
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def features():
    return torch.randn(4, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(vit):
    return build(vit)


def build(backbone, **options):
    options = {"num_labels": NUM_LABELS, **options}
    return ViTForAttentiveLayerFusionClassification.from_backbone(backbone, **options)


# ---- one road from pixels to logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit", "dinov2", "resnet"])
def test_pixels_and_their_cached_tokens_give_the_same_logits(backbone, pixels, request):
    model = build(request.getfixturevalue(backbone))
    live = model(pixel_values=pixels).logits
    tokens = model.extract_layer_features(pixels)
    assert tokens.shape == (4, len(model.config.token_names), model.config.hidden_size)
    assert torch.equal(model(layer_features=tokens).logits, live)
    # Rounding a token to float16 moves it by 2^-11 of its size, so logits of scale 0.1 by about 1e-4.
    torch.testing.assert_close(model(layer_features=tokens.half()).logits, live, atol=2e-4, rtol=0)
    assert live.std(dim=0).min() > 5e-3, "logits that are the same for all images would prove nothing"


def test_extraction_with_another_bank(model, pixels):
    bank = TokenBank.from_list([[4, "block", "mean"], [1, "block", "cls"], [4, "final_norm", "cls"]])
    tokens = model.extract_layer_features(pixels, bank=bank)
    whole = model.extract_layer_features(pixels)
    assert torch.equal(tokens[:, :2], whole[:, model.config.bank.positions_of(TokenBank(bank.coordinates[:2]))])
    assert torch.equal(tokens[:, 2], model.backbone(pixels).last_hidden_state[:, 0])


def test_backbone_arguments_reach_the_backbone(model):
    """Twice the size it was made for, which a ViT takes only if told to interpolate its positions."""
    large = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="size"):
        model(large, interpolate_pos_encoding=False)
    assert model(large, interpolate_pos_encoding=True).logits.shape == (2, NUM_LABELS)


def test_real_backbone(backbone_folder):
    model = build(backbone_folder)
    assert len(model.config.token_names) == 24
    pixels = torch.rand(2, 3, 112, 112)
    tokens = model.extract_layer_features(pixels)
    hidden = model.backbone(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[1:]
    expected = torch.stack([token for h in hidden for token in (h[:, 0], h[:, 1:].mean(dim=1))], dim=1)
    torch.testing.assert_close(tokens, expected)
    live = model(pixels).logits
    assert torch.equal(model(layer_features=tokens).logits, live)
    torch.testing.assert_close(model(layer_features=tokens.half()).logits, live, atol=2e-4, rtol=0)


# ---- frozen, or not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit", "dinov2", "resnet"])
def test_frozen_backbone_stays_as_it_is(backbone, pixels, request):
    model = build(request.getfixturevalue(backbone))
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    expected = model.extract_layer_features(pixels)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.head.training is mode
        assert not any(module.training for module in model.backbone.modules())
        assert torch.equal(model.extract_layer_features(pixels), expected)
    assert not model.extract_layer_features(pixels).requires_grad
    model(pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert model.head.classifier.weight.grad is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


def test_no_activation_graph_is_kept_for_a_frozen_backbone(model, pixels):
    """Every tensor that autograd keeps for the backward pass is the head's: none is as large as an activation."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        model.train()(pixels.requires_grad_(), labels=torch.tensor([0, 1, 2, 0]))
    num_patches_and_cls = 5
    assert saved
    assert not any(num_patches_and_cls in shape for shape in saved)


@pytest.mark.parametrize("backbone", ["vit", "dinov2", "resnet"])
def test_unfrozen_backbone_trains(backbone, pixels, request):
    model = build(request.getfixturevalue(backbone), freeze_backbone=False)
    assert not any(module.training for module in model.backbone.modules()), "from_backbone returns an eval model"
    model.train()
    assert model.backbone.training
    outputs = [model.extract_layer_features(pixels) for _ in range(2)]
    assert outputs[0].requires_grad
    if backbone == "resnet":
        assert model.backbone.embedder.embedder.normalization.num_batches_tracked == 2
    else:
        assert not torch.equal(*outputs), "dropout and drop path are active"
    model(pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = [name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("embed" in name for name in trained), "the gradient reaches the first layer"


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_single_label_loss(vit, features, weights, problem_type):
    model = build(vit, class_weights=weights, problem_type=problem_type)
    labels = torch.tensor([0, 2, 1, -100])
    output = model(layer_features=features, labels=labels)
    expected = F.cross_entropy(output.logits, labels, weight=None if weights is None else torch.tensor(weights))
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_multi_label_loss(vit, features, problem_type):
    model = build(vit, problem_type=problem_type)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    output = model(layer_features=features, labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "shape"),
    [(None, 1, (4,)), (None, 1, (4, 1)), ("regression", 1, (4,)), ("regression", 2, (4, 2))],
)
def test_regression_loss(vit, features, problem_type, num_labels, shape):
    model = build(vit, problem_type=problem_type, num_labels=num_labels)
    labels = torch.arange(4.0 * num_labels).view(shape)
    output = model(layer_features=features, labels=labels)
    torch.testing.assert_close(output.loss, ((output.logits - labels.view(4, num_labels)) ** 2).mean())


# ---- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"num_heads": 4, "num_queries": 3}])
def test_attentions(vit, features, options):
    model = build(vit, **options)
    attentions = model(layer_features=features, output_attentions=True).layer_attentions
    assert attentions.shape == (4, options.get("num_queries", 1), options.get("num_heads", NUM_TOKENS), NUM_TOKENS)
    torch.testing.assert_close(attentions.sum(dim=-1), torch.ones_like(attentions[..., 0]))
    assert model(layer_features=features).layer_attentions is None


def test_tuple_output(model, features):
    labels = torch.tensor([0, 1, 2, 0])
    output = model(layer_features=features, labels=labels, output_attentions=True)
    as_tuple = model(layer_features=features, labels=labels, output_attentions=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for found, expected in zip(as_tuple, (output.loss, output.logits, output.layer_attentions), strict=True):
        assert torch.equal(found, expected)
    (logits,) = model(layer_features=features, return_dict=False)
    assert torch.equal(logits, output.logits)


# ---- what reaches the head -----------------------------------------------------------------------------------------


class Spy(torch.nn.Module):
    """Stands in for the head and keeps the tokens it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens, output_attentions):
        self.tokens = tokens
        return tokens.new_zeros(len(tokens), NUM_LABELS), None


@pytest.fixture
def tokens_seen():
    def see(model, features):
        model.head = Spy().train(model.training)
        model(layer_features=features)
        return model.head.tokens

    return see


def test_tokens_are_normalised(vit, features, tokens_seen):
    features = features * torch.tensor([1e-3, 1.0, 100.0, 7.0]).view(4, 1, 1)
    expected = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(tokens_seen(build(vit), features), expected)
    assert torch.equal(tokens_seen(build(vit, token_normalization="none"), features), features)


def test_scale_of_a_token_does_not_matter_unless_asked_for(vit, features):
    for normalization, same in (("l2", True), ("none", False)):
        model = build(vit, recipe="linear-all", token_normalization=normalization)
        logits = [model(layer_features=scale * features).logits for scale in (1.0, 3.0)]
        assert torch.allclose(*logits, atol=1e-5) is same


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_noise_hits_whole_samples_in_training_only(vit, tokens_seen, share):
    model = build(vit, noise_std=0.05, noise_probability=share)
    features = torch.randn(2000, NUM_TOKENS, WIDTH)
    clean = tokens_seen(model.eval(), features)
    torch.testing.assert_close(clean, F.normalize(features, dim=-1))
    noise = tokens_seen(model.train(), features) - clean
    noisy = noise.abs().amax(dim=(1, 2)) > 0
    # Four standard deviations of a share measured on 2000 samples.
    assert abs(noisy.float().mean().item() - share) <= 4 * (share * (1 - share) / 2000) ** 0.5
    if share > 0:
        # A noisy sample is noisy in all its tokens, each with the noise that was asked for.
        std = noise[noisy].std(dim=(0, 2))
        torch.testing.assert_close(std, torch.full_like(std, 0.05), rtol=0.05, atol=0)


def test_no_noise_by_default(model, features, tokens_seen):
    torch.testing.assert_close(tokens_seen(model.train(), features), F.normalize(features, dim=-1))


# ---- bad input -----------------------------------------------------------------------------------------------------


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor[2, 5, 3] = value
    return tensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either pixel_values or layer_features, not both and not neither"),
        (
            {"pixel_values": torch.zeros(4, 3, 16, 16), "layer_features": torch.zeros(4, 8, 16)},
            "give either pixel_values or layer_features, not both and not neither",
        ),
        (
            {"layer_features": torch.zeros(4, 8, 12)},
            "layer_features has shape (4, 8, 12), but this head reads (batch, 8, 16): 8 tokens of width 16",
        ),
        (
            {"layer_features": torch.zeros(4, 6, 16)},
            "layer_features has shape (4, 6, 16), but this head reads (batch, 8, 16): 8 tokens of width 16",
        ),
        ({"layer_features": torch.zeros(8, 16)}, "layer_features has shape (8, 16), but this head reads"),
    ],
)
def test_bad_inputs(model, arguments, message):
    with pytest.raises(LayerFusionError) as raised:
        model(**arguments)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recipe", ["alf", "linear-all", "scalar-mix"])
@pytest.mark.parametrize("normalization", ["l2", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_named(vit, features, value, normalization, recipe, training):
    model = build(vit, recipe=recipe, token_normalization=normalization).train(training)
    with pytest.raises(LayerFusionError) as raised:
        model(layer_features=with_value(features, value))
    assert str(raised.value).startswith(
        "layer_features holds NaN or infinite values: row 2 of the batch, layer 3 · block · mean;"
    )


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_label_out_of_range(model, features, label):
    with pytest.raises(LayerFusionError) as raised:
        model(layer_features=features, labels=torch.tensor([0, 1, label, 2]))
    assert str(raised.value) == f"label {label} is out of range: this head has 3 labels, 0 to 2"


@pytest.mark.parametrize(
    ("problem_type", "shape"),
    [("multi_label_classification", (4,)), ("multi_label_classification", (4, 2)), ("regression", (4,))],
)
def test_labels_of_the_wrong_shape(vit, features, problem_type, shape):
    model = build(vit, problem_type=problem_type)
    with pytest.raises(LayerFusionError, match=r"^labels of shape .* do not fit logits of \(4, 3\)"):
        model(layer_features=features, labels=torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "alff"}, "recipe 'alff' is unknown: choose from linear-last, "),
        ({"atention_dropout": 0.1}, "'atention_dropout' is no option of from_backbone; "),
        ({"backbone_revision": "v1"}, "'backbone_revision' is no option of from_backbone; "),
        ({"layers": [2, 5]}, "layer 5 is out of range for a backbone of 4 layers: choose from 0 "),
        ({"layers": [-5]}, "layer -5 is out of range for a backbone of 4 layers: choose from 0 "),
        ({"layers": 5}, "layers=5 asks for the last 5 layers, but the backbone has 4 (1 to 4)"),
        ({"num_labels": 4, "id2label": ["a", "b"]}, "num_labels=4, but id2label names 2 labels: give one of them"),
        ({"num_labels": None, "id2label": {1: "a", 2: "b"}}, "id2label must number its labels 0 to 1, but has [1, 2]"),
        ({"num_labels": 0}, "num_labels=0: use 1 or more"),
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 entries, but num_labels is 3"),
        ({"num_heads": 17}, "num_heads=17 does not fit tokens of width 16"),
        ({"dtype": torch.float16}, "['dtype'] can only be given when the backbone is a Hub id or a folder"),
    ],
)
def test_bad_options(vit, options, message):
    with pytest.raises(LayerFusionError) as raised:
        build(vit, **options)
    assert str(raised.value).startswith(message)


def test_spelling_mistakes_are_found_before_the_backbone_is_opened():
    for options in ({"recipe": "alff"}, {"leyers": 2}, {"num_labels": 0}):
        with pytest.raises(LayerFusionError, match=r"alff|leyers|num_labels"):
            build("no/such-backbone", **options)


@pytest.mark.parametrize("name", ["no/such-backbone", "./no-such-folder", "/no/such/folder"])
def test_missing_backbone(name):
    with pytest.raises(LayerFusionError) as raised:
        build(name)
    assert f"backbone {name!r} is neither a folder nor a Hub model that can be reached" in str(raised.value)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(LayerFusionError, match=r"holds no config\.json: is it a saved transformers model\?"):
        build(tmp_path)


def test_backbone_whose_checkpoint_lacks_weights(save_backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = save_backbone(tmp_path / "backbone") / "model.safetensors"
    tensors = load_file(weights)
    gone = sorted(name for name in tensors if ".1." in name)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, weights, {"format": "pt"})
    with pytest.raises(LayerFusionError, match=r"lacks or misshapes 1 tensors of ViTModel .* they would be random"):
        build(tmp_path / "backbone")


class Blind(PreTrainedModel):
    """Knows nothing of hidden states."""

    config_class = ViTConfig

    def __init__(self, config, takes_argument):
        super().__init__(config)
        self.takes_argument = takes_argument
        self.scale = torch.nn.Parameter(torch.ones(()))
        config.model_type = "blind"
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        if kwargs and not self.takes_argument:
            raise TypeError(f"unexpected {sorted(kwargs)}")
        return {"last_hidden_state": self.scale * pixel_values}


@pytest.mark.parametrize("takes_argument", [True, False])
def test_backbone_without_hidden_states(takes_argument):
    with pytest.raises(LayerFusionError, match=r"^Blind .*hidden.states"):
        build(Blind(ViTConfig(image_size=16), takes_argument))


# ---- construction --------------------------------------------------------------------------------------------------


def test_label_names_as_a_sequence(vit):
    model = build(vit, num_labels=None, id2label=["cat", "dog"])
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    assert model.config.num_labels == 2


@pytest.mark.parametrize(
    "recipe",
    [name for name, recipe in RECIPES.items() if recipe.kind == "head" and "num_members" not in recipe.head_options],
)
def test_every_recipe_runs_and_trains(vit, pixels, recipe):
    fits = {"num_heads": 4} if RECIPES[recipe].head_options.get("num_heads", 0) > vit.config.hidden_size else {}
    if RECIPES[recipe].head_type == "two_stage":
        fits["pools"] = ["cls", "grid:2"]  # all that 2 x 2 patches have
    model = build(vit, recipe=recipe, **fits).train()
    output = model(pixels, labels=torch.tensor([0, 1, 2, 0]))
    assert output.logits.shape == (4, NUM_LABELS)
    output.loss.backward()
    for name, parameter in model.head.named_parameters():
        if name == "norm_k.bias":
            continue  # adds the same to every token's score, which the softmax takes away again
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_new_heads_differ_by_seed_only(vit):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(vit).head.state_dict()["classifier.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_config_of_the_backbone_is_not_shared(model, vit):
    model.config.backbone_config.hidden_dropout_prob = 0.125
    assert vit.config.hidden_dropout_prob == 0.5


# ---- Auto classes and pipelines ------------------------------------------------------------------------------------


def test_auto_from_config(vit, pixels):
    config = build(vit).config
    model = AutoModelForImageClassification.from_config(config)
    assert type(model) is ViTForAttentiveLayerFusionClassification
    assert torch.isfinite(model.eval()(pixels).logits).all()
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_auto_from_pretrained(save_backbone, pixels, tmp_path):
    model = build(save_backbone(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "head")
    assert type(AutoConfig.from_pretrained(tmp_path / "head")) is LayerFusionConfig
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "head")
    assert type(loaded) is ViTForAttentiveLayerFusionClassification
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, atol=1e-6, rtol=0)


def test_pipeline_says_what_the_model_says(small_backbone_folder, tmp_path):
    """Pipelines drop the alpha channel before the processor sees it; `decode_image`, our own road, does the same."""
    model = build(small_backbone_folder, id2label=["one", "two", "three"])
    model.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    images = [picture.convert("RGB"), picture, picture.convert("L"), picture.convert("RGB").quantize(16)]
    assert [image.mode for image in images] == ["RGB", "RGBA", "L", "P"]
    images[-1].save(tmp_path / "palette.png")
    images.append(str(tmp_path / "palette.png"))

    processor = model.image_processor
    decoded = [decode_image(image, "the picture") for image in images]
    with torch.no_grad():
        expected = [model(**processor(image, return_tensors="pt")).logits[0].softmax(-1) for image in decoded]
    results = pipeline("image-classification", model=str(tmp_path))(images)
    for result, row in zip(results, expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        assert scores.keys() == {"one", "two", "three"}
        found = torch.tensor([scores[name] for name in ("one", "two", "three")])
        torch.testing.assert_close(found, row, atol=1e-5, rtol=0)
    assert not torch.allclose(expected[0], expected[2], atol=1e-4)
