"""Efficient probing, several queries in one, and embeddings of place: against plain PyTorch, stacked, saved and shown."""

import pytest
import torch
from modeling_helpers import build_attending_model, images
from test_sweep_equality import CLASSES, LAYOUT, config_of, make_features, run_engine, settings_of
from torch.nn import functional as F

from hf_layerfusion import (
    LayerFusionConfig,
    LayerFusionError,
    ViTForAttentiveLayerFusionClassification,
    load_heads,
)
from hf_layerfusion.analysis import summarise_attentions
from hf_layerfusion.heads import AttentiveFusionHead, EfficientHead, build_head
from hf_layerfusion.heads.stack_inputs import StackInputs
from hf_layerfusion.sweeps.stack import Trial, shape_of

BATCH, TOKENS, WIDTH, LABELS = 11, 6, 20, 3
# Two taps of three pools.
PLACES = [(tap, pool) for tap in range(2) for pool in range(3)]

HEADS = {
    "efficient": {"kind": EfficientHead, "num_queries": 3},
    "efficient, one query": {"kind": EfficientHead, "num_queries": 1},
    "efficient, embeddings": {"kind": EfficientHead, "num_queries": 4, "places": PLACES},
    "mean of queries": {"kind": AttentiveFusionHead, "num_heads": 2, "num_queries": 3, "query_fusion": "mean"},
    "embeddings": {"kind": AttentiveFusionHead, "num_heads": 4, "places": PLACES},
    "embeddings, mean of queries": {
        "kind": AttentiveFusionHead,
        "num_queries": 2,
        "query_fusion": "mean",
        "places": PLACES,
    },
}


def make_head(name, seed=0, **options):
    """In float64, with every parameter away from its first value."""
    torch.manual_seed(seed)
    options = {**HEADS[name], **options}
    head = options.pop("kind")(WIDTH, TOKENS, LABELS, **options).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def make_tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def plainly(head, tokens):
    """Logits and attention weights from the parameters, one row, query and attention head at a time."""
    state = dict(head.named_parameters())
    if head.taps:
        tokens = tokens + torch.stack(
            [state["tap_embedding"][tap] + state["pool_embedding"][pool] for tap, pool in PLACES]
        )
    efficient = isinstance(head, EfficientHead)
    layer_norm = torch.nn.LayerNorm(WIDTH, elementwise_affine=False).double()
    norm_q, norm_k, norm_v = (layer_norm,) * 3 if efficient else (head.norm_q, head.norm_k, head.norm_v)
    queries, values = state["query"][0], norm_v(tokens) @ state["v_proj.weight"].T
    if not efficient:
        queries = norm_q(queries) @ state["q_proj.weight"].T
    keys = norm_k(tokens) if efficient else norm_k(tokens) @ state["k_proj.weight"].T
    rows, weights = [], []
    for key, value in zip(keys, values, strict=True):
        outputs = []
        for number, query in enumerate(queries):
            parts = []
            for head_number in range(head.num_heads):
                if efficient:
                    width = WIDTH // len(queries)
                    scored, read = slice(None), slice(number * width, (number + 1) * width)
                else:
                    scored = read = slice(head_number * head.head_dim, (head_number + 1) * head.head_dim)
                scale = key[:, scored].shape[1] ** -0.5
                weight = torch.softmax(key[:, scored] @ query[scored] * scale, dim=0)
                weights.append(weight)
                parts.append(weight @ value[:, read])
            outputs.append(torch.cat(parts))
        if not efficient:
            outputs = [head.out_proj(output) for output in outputs]
        is_mean = not efficient and head.query_fusion == "mean"
        rows.append(sum(outputs) / len(outputs) if is_mean else torch.cat(outputs))
    read = torch.stack(rows)
    normed = (read - read.mean(0)) / (read.var(0, unbiased=False) + 1e-5).sqrt()
    logits = head.classifier(normed * state["batch_norm.weight"] + state["batch_norm.bias"])
    return logits, torch.stack(weights).view(len(tokens), head.num_queries, head.num_heads, TOKENS)


def gradients(head, tokens, result):
    coefficients = torch.randn(BATCH, LABELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits, attentions = result
    total = (logits * coefficients).sum() + attentions.square().sum()
    return torch.autograd.grad(total, [tokens, *head.parameters()], allow_unused=False)


@pytest.mark.parametrize("implementation", ["fast", "explicit"])
@pytest.mark.parametrize("name", HEADS)
def test_logits_weights_and_gradients_are_those_of_the_textbook(name, implementation):
    head = make_head(name, implementation=implementation)
    tokens = make_tokens().requires_grad_()
    own, expected = head(tokens, output_attentions=True), plainly(head, tokens)
    assert own[1].shape == (BATCH, head.num_queries, head.num_heads, TOKENS)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert own[1].std() > 0.01, "the attention is uniform, and equal weights show nothing"
    found, wanted = gradients(head, tokens, own), gradients(head, tokens, expected)
    names = ["tokens", *(name for name, _ in head.named_parameters())]
    for parameter, one, other in zip(names, found, wanted, strict=True):
        assert other.abs().max() > 1e-8 or parameter in ("norm_k.bias", "norm_v.bias", "out_proj.bias"), parameter
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1, other.abs().max().item()))


@pytest.mark.parametrize("name", HEADS)
def test_tokens_without_a_gradient_are_read_alike_and_normalised_inside(name):
    """Cached tokens go through in blocks where no embedding needs a gradient; `normalize` is `F.normalize` before."""
    head, tokens = make_head(name), make_tokens()
    expected = head(F.normalize(tokens, dim=-1).requires_grad_(), output_attentions=True)
    found = head(tokens, output_attentions=True, normalize=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    wanted = torch.autograd.grad(expected[0].square().sum(), list(head.parameters()))
    for one, other in zip(torch.autograd.grad(found[0].square().sum(), list(head.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_both_orders_drop_the_same(name):
    keep = (torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(4)) > 0.3).double() / 0.7
    results = []
    for implementation in ("fast", "explicit"):
        head = make_head(name, implementation=implementation, attention_dropout=0.4)
        torch.manual_seed(2)
        results.append(head(make_tokens(), token_keep=keep))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)
    undropped = make_head(name)(make_tokens())
    assert (results[0] - undropped).abs().max() > 1e-3


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_a_stack_gives_what_its_heads_give(name, training):
    heads = [make_head(name, seed).train(training) for seed in range(3)]
    tokens = F.normalize(make_tokens(), dim=-1)
    parameters = {
        key: torch.stack([dict(head.named_parameters())[key] for head in heads])
        for key, _ in heads[0].named_parameters()
    }
    buffers = {
        key: torch.stack([dict(head.named_buffers())[key] for head in heads]) for key, _ in heads[0].named_buffers()
    }
    keep = torch.rand(3, BATCH, TOKENS, generator=torch.Generator().manual_seed(4)).double() if training else None
    num_probes = heads[0].num_queries * heads[0].num_heads
    inputs = StackInputs(
        tokens,
        training,
        attention_keep=None if keep is None else keep.permute(1, 2, 0).repeat_interleave(num_probes, dim=2),
    )
    expected = [head(tokens, token_keep=None if keep is None else keep[number]) for number, head in enumerate(heads)]
    found = heads[0].run_stack(parameters, buffers, inputs)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-11)
    means = torch.stack([head.batch_norm.running_mean for head in heads])
    torch.testing.assert_close(buffers["batch_norm.running_mean"], means, rtol=0, atol=1e-12)


OPTIONS = {
    "efficient": {"head_type": "efficient"},
    "efficient, embeddings": {"head_type": "efficient", "token_embeddings": True},
    "mean of queries": {"query_fusion": "mean"},
    "embeddings": {"token_embeddings": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_in_a_sweep_they_are_trained_as_alone(name):
    features = make_features()
    settings = settings_of((1e-2,), dropouts=(0.0, 0.3), num_queries=3, layer_dropout=0.2)
    together = run_engine(features, settings, heads_at_once=4, epochs=3, **OPTIONS[name])
    plain = run_engine(features, settings[:1], heads_at_once=1, epochs=3)
    for setting in settings:
        alone = run_engine(features, [setting], heads_at_once=1, epochs=3, **OPTIONS[name])
        state, other = together.states[Trial(setting)], alone.states[Trial(setting)]
        assert state.keys() == other.keys()
        assert state.keys() == build_head(config_of(setting, **OPTIONS[name])).state_dict().keys()
        still = ("norm_k.bias", "norm_v.bias", "out_proj.bias", "batch_norm.running_mean")
        for key in state.keys() - set(still):
            torch.testing.assert_close(state[key].double(), other[key].double(), rtol=0, atol=1e-9)
        assert together.runs[Trial(setting)].scores == alone.runs[Trial(setting)].scores
    assert {key: value.shape for key, value in state.items()} != {
        key: value.shape for key, value in plain.states[Trial(settings[0])].items()
    }


def test_heads_of_other_kinds_are_not_stacked():
    setting = settings_of((1e-2,), num_queries=2)[0]
    shapes = [shape_of(config_of(setting, **options)) for options in ({}, *OPTIONS.values())]
    assert len(set(shapes)) == len(shapes)


def config(**options):
    return LayerFusionConfig(token_layout=LAYOUT, num_labels=CLASSES, **options)


def test_what_is_not_named_is_as_before():
    plain = config()
    assert (plain.num_queries, plain.query_fusion, plain.token_embeddings) == (1, "concat", False)
    old = {key: value for key, value in plain.to_dict().items() if key not in ("query_fusion", "token_embeddings")}
    assert LayerFusionConfig.from_dict(old).to_dict() == plain.to_dict()
    named = config(num_queries=None, query_fusion=None, token_embeddings=None)
    assert named.to_dict() == plain.to_dict()
    head = build_head(plain)
    assert not head.taps
    assert not [name for name in head.state_dict() if "embedding" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_fusion": "sum"}, r"query_fusion 'sum' is unknown: choose from \['concat', 'mean'\]"),
        ({"query_fusion": ["mean"]}, "query_fusion .* is unknown"),
        ({"query_fusion": True}, "query_fusion True is unknown"),
        ({"token_embeddings": "yes"}, "token_embeddings='yes': use True or False"),
        ({"token_embeddings": 1}, "token_embeddings=1: use True or False"),
        ({"head_type": "efficient", "num_queries": 25}, "num_queries=25 does not fit tokens of width 24"),
        ({"head_type": "efficient", "num_queries": 0}, "num_queries=0: use 1 or more"),
        ({"head_type": "efficient", "num_queries": 10**9}, "num_queries=1000000000: use at most 4096"),
        ({"head_type": "efficient", "num_queries": 2.0}, "num_queries=2.0: use 1 or more"),
        ({"head_type": "Efficient"}, "head_type 'Efficient' is unknown"),
    ],
)
def test_values_that_cannot_work_are_named(options, message):
    with pytest.raises(LayerFusionError, match=message):
        config(**options)
    with pytest.raises(LayerFusionError, match=message):
        LayerFusionConfig.from_dict({**config().to_dict(), **options})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EfficientHead(8, 2, 3, num_queries=9), "num_queries=9 does not fit tokens of width 8"),
        (lambda: EfficientHead(8, 2, 3, implementation="quick"), "'quick' is unknown"),
        (lambda: EfficientHead(8, 2, 3, places=[(0, 0)]), "those of 1 tokens, but the bank has 2"),
        (lambda: AttentiveFusionHead(8, 2, 3, query_fusion="max"), "query_fusion 'max' is unknown"),
    ],
)
def test_heads_refuse_what_cannot_work(build, message):
    with pytest.raises(LayerFusionError, match=message):
        build()


def test_the_slices_of_an_efficient_head_need_not_fill_the_width():
    head = EfficientHead(20, 6, 3, num_queries=3)
    assert head.v_proj.weight.shape == (18, 20)
    assert head.classifier.in_features == 18


def test_a_token_s_place_is_its_tap_and_its_pool():
    head = build_head(config(pools=["cls", "mean"], layers=[1, 3], token_embeddings=True))
    assert (head.taps, head.pools) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert head.tap_embedding.shape == head.pool_embedding.shape == (2, 24)
    torch.manual_seed(0)
    head.reset_parameters()
    assert 0.01 < head.tap_embedding.std() < 0.03


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_loaded_shared_and_explained(name, tmp_path):
    torch.manual_seed(0)
    model = build_attending_model(num_queries=2, **OPTIONS[name]).eval()
    model.image_processor = None
    model.save_pretrained(tmp_path / "head", include_backbone=True)
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path / "head")
    pixels = images(4)
    with torch.no_grad():
        expected = model(pixels, output_attentions=True)
        found = loaded(pixels, output_attentions=True)
        shared = load_heads(model.backbone, {"one": tmp_path / "head"})(pixels)["one"]
    heads = 1 if model.config.head_type == "efficient" else len(model.config.bank)
    assert expected.layer_attentions.shape == (4, 2, heads, len(model.config.bank))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.layer_attentions, expected.layer_attentions)
    torch.testing.assert_close(shared.logits, expected.logits)
    summary = summarise_attentions(loaded, [{"pixel_values": pixels}])
    assert summary.mean.shape == (2 * heads, len(model.config.bank))
    torch.testing.assert_close(summary.mean.sum(dim=1), torch.ones(2 * heads, dtype=torch.float64))


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ({"token_embeddings": True}, {"token_embeddings": False}, "unknown tensors: head.pool_embedding"),
        ({}, {"token_embeddings": True}, "missing tensors: head.pool_embedding, head.tap_embedding"),
        ({}, {"head_type": "efficient"}, "unknown tensors: head.k_proj.weight"),
        ({"num_queries": 2}, {"query_fusion": "mean"}, "head.batch_norm.bias has shape"),
        ({"head_type": "efficient", "num_queries": 2}, {"num_queries": 4}, "head.query has shape"),
    ],
)
def test_tensors_of_another_head_are_refused(saved, asked, message, tmp_path):
    model = build_attending_model(**saved)
    model.image_processor = None
    model.save_pretrained(tmp_path, include_backbone=True)
    text = LayerFusionConfig.from_pretrained(tmp_path)
    for name, value in asked.items():
        setattr(text, name, value)
    text.save_pretrained(tmp_path)
    with pytest.raises(LayerFusionError, match=message):
        ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_traced_program_computes_the_same(name):
    """As `export_program` traces a head: on tokens of any number of rows."""
    head = build_head(config(num_queries=2, head_implementation="explicit", **OPTIONS[name])).eval()
    tokens = torch.randn(3, head.num_tokens, head.hidden_size)
    program = torch.export.export(
        head,
        (tokens,),
        {"normalize": True},
        dynamic_shapes={"tokens": {0: torch.export.Dim("rows")}, "normalize": None},
    )
    more = torch.randn(5, head.num_tokens, head.hidden_size)
    torch.testing.assert_close(program.module()(more, normalize=True), head(more, normalize=True))
