"""The head of two stages: against plain PyTorch, against the head over means, stacked, swept, saved and explained."""

import json

import pytest
import torch
from modeling_helpers import build_attending_model, images
from sweep_helpers import CLASSES, WIDTH, class_labels, learnable_tokens, write_features
from test_efficient_head import BATCH, LABELS, TOKENS, gradients, plainly
from test_efficient_head import WIDTH as HEAD_WIDTH
from torch.nn import functional as F

from hf_layerfusion import LayerFusionConfig, LayerFusionError, ViTForAttentiveLayerFusionClassification, load_heads
from hf_layerfusion.analysis import summarise_attentions
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.heads import AttentiveFusionHead, TwoStageHead, build_head
from hf_layerfusion.heads.stack_inputs import StackInputs
from hf_layerfusion.layout import TapLayout, TokenLayout
from hf_layerfusion.sweeps import Setting, expand_grid
from hf_layerfusion.sweeps.engine import Engine, Protocol, Rows
from hf_layerfusion.sweeps.stack import Draws, HeadStack, Trial, first_state, shape_of

# Two taps of three and four cells, among and behind other tokens; what is left are `TOKENS` for the second stage.
NUM_TOKENS = 11
SUMMARISED = [[5, 1, 8], [7, 9, 10, 2]]
KEPT = [0, 3, 4, 6]

HEADS = {
    "a query per layer": {},
    "one query for all": {"stage_queries": "shared", "num_heads": 2},
    "mean of queries": {"num_heads": 3, "num_queries": 2, "query_fusion": "mean"},
}


def make_head(name, seed=0, **options):
    """In float64, with every parameter away from its first value."""
    torch.manual_seed(seed)
    head = TwoStageHead(HEAD_WIDTH, NUM_TOKENS, LABELS, SUMMARISED, **{**HEADS[name], **options}).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        head.stage_query.mul_(5)
    return head


def make_tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, NUM_TOKENS, HEAD_WIDTH, generator=generator, dtype=torch.float64)


def first_stage(head, tokens):
    """p of every tap `(B, M)`, and what the second stage reads `(B, TOKENS, D)`, by the formulas, row by row."""
    weights, rows = [[] for _ in SUMMARISED], []
    for row in tokens:
        read = [row[position] for position in KEPT]
        for number, positions in enumerate(SUMMARISED):
            query = head.stage_query[0 if len(head.stage_query) == 1 else number]
            scores = []
            for position in positions:
                token = row[position]
                normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
                scores.append((query * normed).sum() / HEAD_WIDTH**0.5)
            weight = torch.softmax(torch.stack(scores), dim=0)
            weights[number].append(weight)
            read.append(sum(p * row[position] for p, position in zip(weight, positions, strict=True)))
        rows.append(torch.stack(read))
    return [torch.stack(weight) for weight in weights], torch.stack(rows)


def both_stages(head, tokens):
    """Logits and the weights of all tokens, from the parameters."""
    weights, read = first_stage(head, tokens)
    logits, attentions = plainly(head, read)
    by_token = [None] * NUM_TOKENS
    for number, position in enumerate(KEPT):
        by_token[position] = attentions[..., number]
    for number, positions in enumerate(SUMMARISED):
        for place, position in enumerate(positions):
            by_token[position] = attentions[..., len(KEPT) + number] * weights[number][:, place, None, None]
    return logits, torch.stack(by_token, dim=-1)


@pytest.mark.parametrize("implementation", ["fast", "explicit"])
@pytest.mark.parametrize("name", HEADS)
def test_logits_weights_and_gradients_are_those_of_the_formulas(name, implementation):
    head = make_head(name, implementation=implementation)
    tokens = make_tokens().requires_grad_()
    own, expected = head(tokens, output_attentions=True), both_stages(head, tokens)
    assert own[1].shape == (BATCH, head.num_queries, head.num_heads, NUM_TOKENS)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    torch.testing.assert_close(own[1].sum(dim=-1), torch.ones_like(own[1][..., 0]))
    assert min(weight.std() for weight in first_stage(head, tokens)[0]) > 0.05, "the first stage takes plain means"
    found, wanted = gradients(head, tokens, own), gradients(head, tokens, expected)
    names = ["tokens", *(key for key, _ in head.named_parameters())]
    assert "stage_query" in names
    for parameter, one, other in zip(names, found, wanted, strict=True):
        assert other.abs().max() > 1e-8 or parameter in ("norm_k.bias", "norm_v.bias", "out_proj.bias"), parameter
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1, other.abs().max().item()))


def test_the_second_stage_has_a_head_per_token_that_it_reads():
    assert make_head("a query per layer").num_heads == TOKENS
    assert make_head("a query per layer").stage_query.shape == (2, HEAD_WIDTH)
    assert make_head("one query for all").stage_query.shape == (1, HEAD_WIDTH)


@pytest.mark.parametrize("name", HEADS)
def test_tokens_are_normalised_inside(name):
    head, tokens = make_head(name), make_tokens()
    expected = head(F.normalize(tokens, dim=-1), output_attentions=True)
    found = head(tokens, output_attentions=True, normalize=True, token_statistics=torch.zeros(BATCH, NUM_TOKENS, 2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    half = head.float()(tokens.to(torch.bfloat16), normalize=True)
    assert half.dtype == torch.float32


def layer_keep(heads=1):
    """Dropout that hits all tokens of a tap alike: `(heads, B, N)`."""
    taps = torch.rand(heads, BATCH, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    taps = (taps > 0.4).double() / 0.6
    tap_of = [0] * NUM_TOKENS
    for number, positions in enumerate(SUMMARISED, 1):
        for position in positions:
            tap_of[position] = number
    return taps[..., tap_of]


@pytest.mark.parametrize("name", HEADS)
def test_both_orders_drop_the_same_and_summaries_go_with_their_layer(name):
    keep, results = layer_keep()[0], []
    for implementation in ("fast", "explicit"):
        head = make_head(name, implementation=implementation, attention_dropout=0.4)
        torch.manual_seed(2)
        results.append(head(make_tokens(), token_keep=keep))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)
    head = make_head(name)
    options = {key: value for key, value in HEADS[name].items() if key != "stage_queries"}
    second = AttentiveFusionHead(HEAD_WIDTH, TOKENS, LABELS, implementation="explicit", **options).double()
    second.load_state_dict({key: value for key, value in head.state_dict().items() if key != "stage_query"})
    _, read = first_stage(head, make_tokens())
    of_summaries = [keep[:, positions[0]] for positions in SUMMARISED]
    expected = second(read, token_keep=torch.stack([*(keep[:, n] for n in KEPT), *of_summaries], dim=1))
    torch.testing.assert_close(head(make_tokens(), token_keep=keep), expected, rtol=0, atol=1e-11)
    assert (expected - make_head(name)(make_tokens())).abs().max() > 1e-3


@pytest.mark.parametrize("knows_scales", [True, False])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_a_stack_gives_what_its_heads_give(name, training, knows_scales):
    heads = [make_head(name, seed).train(training) for seed in range(3)]
    tokens = make_tokens()
    parameters = {
        key: torch.stack([dict(head.named_parameters())[key] for head in heads])
        for key, _ in heads[0].named_parameters()
    }
    buffers = {
        key: torch.stack([dict(head.named_buffers())[key] for head in heads]) for key, _ in heads[0].named_buffers()
    }
    keep = layer_keep(3) if training else None
    num_probes = heads[0].num_queries * heads[0].num_heads
    inputs = StackInputs(
        tokens,
        training,
        scales=(tokens.var(dim=-1, unbiased=False) + 1e-5).rsqrt() if knows_scales else None,
        attention_keep=None if keep is None else keep.permute(1, 2, 0).repeat_interleave(num_probes, dim=2),
    )
    expected = [head(tokens, token_keep=None if keep is None else keep[number]) for number, head in enumerate(heads)]
    found = heads[0].run_stack(parameters, buffers, inputs)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-11)
    means = torch.stack([head.batch_norm.running_mean for head in heads])
    torch.testing.assert_close(buffers["batch_norm.running_mean"], means, rtol=0, atol=1e-12)


# ---- against the head over means ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage_queries", ["per_layer", "shared"])
def test_it_begins_as_the_head_over_means(stage_queries):
    torch.manual_seed(0)
    head = TwoStageHead(HEAD_WIDTH, NUM_TOKENS, LABELS, SUMMARISED, stage_queries=stage_queries)
    torch.manual_seed(0)
    pooled = AttentiveFusionHead(HEAD_WIDTH, TOKENS, LABELS)
    state = head.state_dict()
    assert not state.pop("stage_query").any()
    assert {key: value.tolist() for key, value in state.items()} == {
        key: value.tolist() for key, value in pooled.state_dict().items()
    }
    tokens = make_tokens()
    means = [tokens[:, positions].mean(dim=1) for positions in SUMMARISED]
    read = torch.stack([*(tokens[:, position] for position in KEPT), *means], dim=1)
    torch.testing.assert_close(head.double()(tokens), pooled.double()(read), rtol=0, atol=1e-12)


def test_from_pixels_the_mean_of_equal_cells_is_the_patch_mean():
    plain = {"num_heads": 2, "token_normalization": "none"}
    two = build_attending_model(head_type="two_stage", pools=["cls", "grid:2"], **plain).double().eval()
    one = build_attending_model(pools=["cls", "mean"], **plain).double().eval()
    with torch.no_grad():
        two.head.stage_query.zero_()
    # The second stage reads the CLS tokens of all layers first; attention knows no order.
    one.head.load_state_dict({key: value for key, value in two.head.state_dict().items() if key != "stage_query"})
    pixels = images(4).double()
    with torch.no_grad():
        torch.testing.assert_close(two(pixels).logits, one(pixels).logits, rtol=0, atol=1e-10)


def test_one_query_is_all_queries_alike():
    per_layer, shared = make_head("a query per layer"), make_head("a query per layer", stage_queries="shared")
    state = per_layer.state_dict()
    state["stage_query"] = shared.stage_query.detach().expand(2, -1)
    per_layer.load_state_dict(state)
    shared.load_state_dict({**state, "stage_query": shared.stage_query.detach()})
    results = [head(make_tokens()) for head in (per_layer, shared)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    of_each, of_one = (
        torch.autograd.grad(result.square().sum(), head.stage_query)[0]
        for head, result in zip((per_layer, shared), results, strict=True)
    )
    torch.testing.assert_close(of_each.sum(dim=0, keepdim=True), of_one, rtol=0, atol=1e-10)
    assert (of_each[0] - of_each[1]).abs().max() > 1e-3


# ---- from a config -------------------------------------------------------------------------------------------------

LAYOUT = TokenLayout.of_plain_vit(WIDTH, 3, image_size=32, patch_size=8).to_dict()
OPTIONS = {"head_type": "two_stage", "pools": ["cls", "grid:2", "mean"], "layers": [2, 3]}


def config(**options):
    return LayerFusionConfig(
        token_layout=LAYOUT, num_labels=CLASSES, problem_type="single_label_classification", **{**OPTIONS, **options}
    )


def test_patches_and_cells_of_a_layer_and_module_have_one_summary():
    head = build_head(config(modules=["block", "ln2"], layers=[1, 3], pools=["cls", "grid:2@3", "mean", "grid:1@3"]))
    # Layer 1 has CLS and mean of both modules; layer 3 has CLS, four cells, mean and one cell of each.
    assert head.summarised == [[5, 6, 7, 8, 10], [12, 13, 14, 15, 17]]
    assert head.kept == [0, 1, 2, 3, 4, 9, 11, 16]
    head = build_head(config(pools=["tokens", "mean"], num_heads=4))
    assert [len(positions) for positions in head.summarised] == [16, 16]
    assert [head.num_tokens, len(head.sources), head.num_heads] == [36, 6, 4]


def test_layers_of_several_sizes_and_widths():
    """Maps of a hierarchical backbone: every stage has another number of patches."""
    sizes = ((8, 8), (4, 4), (2, 2))
    layout = TokenLayout({"block": TapLayout("channels_first", (8, 8, 16))}, grids=sizes, image_size=(32, 32))
    one = LayerFusionConfig(
        token_layout=layout.to_dict(), num_labels=CLASSES, **{**OPTIONS, "layers": [1, 2], "pools": ["tokens"]}
    )
    head = build_head(one)
    assert [len(positions) for positions in head.summarised] == [16, 4]
    assert head.kept == []
    logits, attentions = head(torch.randn(3, 20, 16), output_attentions=True)
    assert logits.shape == (3, CLASSES)
    torch.testing.assert_close(attentions.sum(dim=-1), torch.ones(3, 1, 2))


def test_the_recipe_reads_the_grid():
    one = LayerFusionConfig(recipe="alf-two-stage", num_labels=CLASSES)
    assert one.bank == LayerFusionConfig(recipe="ridge-grid").bank
    assert (one.head_type, one.stage_queries, one.num_heads, one.attention_dropout) == (
        "two_stage",
        "per_layer",
        16,
        0.3,
    )
    assert build_head(one).stage_query.shape == (4, 768)


def test_other_heads_know_nothing_of_it():
    plain = LayerFusionConfig(token_layout=LAYOUT)
    assert plain.stage_queries is None
    assert "stage_queries" not in plain.to_dict()
    saved = config().to_dict()
    assert saved["stage_queries"] == "per_layer"
    assert LayerFusionConfig.from_dict(saved).to_dict() == saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pools": ["cls", "mean"]},
            r"pools=\['cls', 'mean'\] select none: add a pool such as 'grid:4'.*recipe 'alf'",
        ),
        ({"layers": [1, 2], "pools": ["mean", "grid:2@3"]}, "select none"),
        ({"token_embeddings": True}, "token_embeddings=True: a two_stage head has no embeddings"),
        ({"stage_queries": "each"}, r"stage_queries 'each' is unknown: choose from \['per_layer', 'shared'\]"),
        ({"stage_queries": ["shared"]}, "stage_queries .* is unknown"),
        ({"stage_queries": True}, "stage_queries True is unknown"),
        ({"head_type": "attentive", "stage_queries": "shared"}, "stage_queries='shared' is for head_type='two_stage'"),
    ],
)
def test_values_that_cannot_work_are_named(options, message):
    with pytest.raises(LayerFusionError, match=message):
        config(**options)
    with pytest.raises(LayerFusionError, match=message):
        LayerFusionConfig.from_dict({**config().to_dict(), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"summarised": []}, "there are none: use an AttentiveFusionHead"),
        ({"summarised": [[1], []]}, "there are none"),
        ({"summarised": [[1, 2], [2]]}, "positions below 4, each once"),
        ({"summarised": [[1, 4]]}, "positions below 4, each once"),
        ({"summarised": [[1]], "stage_queries": "all"}, "stage_queries 'all' is unknown"),
        ({"summarised": [[1]], "places": [(0, 0)] * 4}, "leave places out"),
        ({"summarised": [[1]], "num_heads": 9}, "num_heads=9 does not fit"),
    ],
)
def test_a_head_refuses_what_cannot_work(options, message):
    with pytest.raises(LayerFusionError, match=message):
        TwoStageHead(8, 4, 3, **options)


# ---- trained, saved, explained -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    bank = config().bank.to_list()
    tokens = learnable_tokens(class_labels(), bank=bank)
    return write_features(tmp_path_factory.mktemp("features"), tokens=tokens, bank=bank).select_bank(
        TokenBank.from_list(bank)
    )


def trained(features, settings, heads_at_once):
    """States by trial, and their scores, after three epochs in float64."""
    engine = Engine(
        [Trial(setting) for setting in settings],
        {setting: config(**setting.config_options) for setting in settings},
        [Rows(features, features, None)],
        Protocol(num_epochs=3, batch_size=25, heads_at_once=heads_at_once, dtype=torch.float64),
        keep_states=True,
        progress=False,
    )
    engine.run()
    return engine.states, {trial: run.scores for trial, run in engine.runs.items()}


def test_in_a_sweep_it_is_trained_as_alone_and_as_by_a_plain_loop(features):
    shared = {"recipe": "alf", "learning_rate": 1e-2, "num_heads": 2, "balance_classes": False}
    settings = [
        Setting(weight_decay=decay, attention_dropout=dropout, layer_dropout=layers, **shared)
        for decay, dropout, layers in ((1e-4, 0.0, 0.0), (1e-1, 0.3, 0.2), (1e-2, 0.0, 0.5))
    ]
    states, scores = trained(features, settings, heads_at_once=3)
    still = ("norm_k.bias", "norm_v.bias", "out_proj.bias", "batch_norm.running_mean")
    for setting in settings:
        alone, own_scores = trained(features, [setting], heads_at_once=1)
        trial = Trial(setting)
        for key in states[trial].keys() - set(still):
            torch.testing.assert_close(states[trial][key], alone[trial][key], rtol=0, atol=1e-9)
        assert scores[trial] == own_scores[trial]
        assert states[trial]["stage_query"].abs().max() > 1e-2
    plain = trained_plainly(features, settings[0])
    for key in plain.keys() - set(still):
        torch.testing.assert_close(states[Trial(settings[0])][key], plain[key], rtol=0, atol=1e-9)


def trained_plainly(features, setting):
    """One head by `torch.optim.AdamW`, with the explicit order in the second stage."""
    from accelerate.data_loader import SeedableRandomSampler

    one = config(**setting.config_options, head_implementation="explicit")
    head = build_head(one).double().train()
    head.load_state_dict(first_state(one, 0))
    batch = features.tensors()
    tokens, labels = batch["layer_features"].double(), batch["labels"]
    optimizer = torch.optim.AdamW(head.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 3, eta_min=1e-6)
    for epoch in range(3):
        sampler = SeedableRandomSampler(range(len(features)), data_seed=0, generator=torch.Generator())
        sampler.set_epoch(epoch)
        for rows in torch.tensor(list(sampler)).split(25):
            optimizer.zero_grad()
            F.cross_entropy(head(tokens[rows], normalize=True), labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return head.state_dict()


def test_dropout_of_all_layers_leaves_nothing():
    model = build_attending_model(head_type="two_stage", pools=["cls", "grid:2"], layer_dropout=1.0)
    logits = model.train()(images(4)).logits
    torch.testing.assert_close(logits, logits[:1].expand(4, -1))
    assert model.eval()(images(4)).logits.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("options", [{"pools": ["cls", "mean", "grid:2"]}, {"pools": ["grid:4"], "num_queries": 2}])
@pytest.mark.parametrize("stage_queries", ["per_layer", "shared"])
def test_saved_loaded_cached_shared_and_explained(options, stage_queries, tmp_path):
    torch.manual_seed(0)
    options = {**options, "head_type": "two_stage", "stage_queries": stage_queries, "num_heads": 4}
    model = build_attending_model(**options).eval()
    model.image_processor = None
    model.save_pretrained(tmp_path / "head", include_backbone=True)
    assert json.loads((tmp_path / "head" / "config.json").read_text())["stage_queries"] == stage_queries
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path / "head")
    pixels = images(4)
    with torch.no_grad():
        expected = model(pixels, output_attentions=True)
        found = loaded(pixels, output_attentions=True)
        cached = loaded(layer_features=loaded.extract_layer_features(pixels), output_attentions=True)
        shared = load_heads(model.backbone, {"one": tmp_path / "head"})(pixels, output_attentions=True)["one"]
    rows = 4 * model.config.num_queries
    assert expected.layer_attentions.shape == (4, rows // 4, 4, len(model.config.bank))
    for other in (found, cached, shared):
        torch.testing.assert_close(other.logits, expected.logits)
        torch.testing.assert_close(other.layer_attentions, expected.layer_attentions)
    summary = summarise_attentions(loaded, [{"pixel_values": pixels}])
    assert summary.mean.shape == (rows, len(model.config.bank))
    torch.testing.assert_close(summary.mean.sum(dim=1), torch.ones(rows, dtype=torch.float64))
    assert sum(summary.layer_weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stage_queries": "shared"}, r"head.stage_query has shape \(3, 32\), but the config asks for \(1, 32\)"),
        ({"head_type": "attentive", "stage_queries": None}, "unknown tensors: head.stage_query"),
    ],
)
def test_tensors_of_another_head_are_refused(asked, message, tmp_path):
    model = build_attending_model(head_type="two_stage", pools=["mean", "grid:2"], num_heads=2)
    model.image_processor = None
    model.save_pretrained(tmp_path, include_backbone=True)
    text = LayerFusionConfig.from_pretrained(tmp_path)
    for name, value in asked.items():
        setattr(text, name, value)
    text.save_pretrained(tmp_path)
    with pytest.raises(LayerFusionError, match=message):
        ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path)


def test_a_grid_varies_what_the_second_stage_has():
    grid = {"attention_dropout": [0.0, 0.1], "num_queries": [1, 2], "num_heads": 4}
    settings = expand_grid(grid, ["alf-two-stage"])
    assert [(s.attention_dropout, s.num_queries, s.num_heads) for s in settings] == [
        (0.0, 1, 4),
        (0.0, 2, 4),
        (0.1, 1, 4),
        (0.1, 2, 4),
    ]
    assert expand_grid({}, ["alf-two-stage"])[0].attention_dropout == 0.3


def test_a_stack_has_one_kind_of_queries_and_drops_what_is_projected():
    assert shape_of(config()) != shape_of(config(stage_queries="shared"))
    one = config(projection_dropout=0.5, num_heads=2)
    stack = HeadStack([Trial(Setting())], [one], None, torch.device("cpu"), torch.float64)
    inputs = stack.inputs(torch.randn(5, len(one.bank), WIDTH).double(), None, Draws(0, 0, torch.device("cpu")))
    assert inputs.projection_keep.shape == (1, 5, 1, WIDTH)
    assert set(inputs.projection_keep.unique().tolist()) == {0.0, 2.0}
    assert stack.logits(inputs).shape == (1, 5, CLASSES)
