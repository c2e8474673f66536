"""The heads: against a plain textbook implementation, with files in the reference's names, and across processes."""

import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from hf_layerfusion import AttentiveFusionHead, LayerFusionError, LinearHead, ScalarMixHead
from hf_layerfusion.features import token_statistics
from hf_layerfusion.heads import attention
from hf_layerfusion.heads.batch_norm import GlobalBatchNorm1d

NUM_LABELS = 7
BATCH_SIZE = 12

# The tensors of the reference's `AttentiveProbeModel`, and what this library calls them.
REFERENCE_TO_OWN = {
    "query_token": "query",
    "attn_block.norm_q.weight": "norm_q.weight",
    "attn_block.norm_q.bias": "norm_q.bias",
    "attn_block.norm_k.weight": "norm_k.weight",
    "attn_block.norm_k.bias": "norm_k.bias",
    "attn_block.norm_v.weight": "norm_v.weight",
    "attn_block.norm_v.bias": "norm_v.bias",
    "attn_block.cross_attn.q.weight": "q_proj.weight",
    "attn_block.cross_attn.k.weight": "k_proj.weight",
    "attn_block.cross_attn.v.weight": "v_proj.weight",
    "attn_block.cross_attn.proj.weight": "out_proj.weight",
    "attn_block.cross_attn.proj.bias": "out_proj.bias",
    "bn.weight": "batch_norm.weight",
    "bn.bias": "batch_norm.bias",
    "bn.running_mean": "batch_norm.running_mean",
    "bn.running_var": "batch_norm.running_var",
    "bn.num_batches_tracked": "batch_norm.num_batches_tracked",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}
BUFFERS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def random_reference_head(hidden_size, num_heads, num_queries=1, seed=1):
    """Tensors of a float64 head in the reference's names, all of them far from their initial values."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def linear(rows, columns):
        return randn(rows, columns) * columns**-0.5

    inner, wide = num_heads * 2 * (hidden_size // num_heads), num_queries * hidden_size
    tensors = {"query_token": 0.5 * randn(1, num_queries, hidden_size)}
    for name in ("q", "k", "v"):
        tensors[f"attn_block.norm_{name}.weight"] = 1 + 0.3 * randn(hidden_size)
        tensors[f"attn_block.norm_{name}.bias"] = 0.3 * randn(hidden_size)
        tensors[f"attn_block.cross_attn.{name}.weight"] = linear(inner, hidden_size)
    tensors["attn_block.cross_attn.proj.weight"] = linear(hidden_size, inner)
    tensors["attn_block.cross_attn.proj.bias"] = 0.3 * randn(hidden_size)
    tensors["bn.weight"] = 1 + 0.3 * randn(wide)
    tensors["bn.bias"] = 0.3 * randn(wide)
    tensors["bn.running_mean"] = 0.3 * randn(wide)
    tensors["bn.running_var"] = 0.5 + randn(wide).abs()
    tensors["bn.num_batches_tracked"] = torch.tensor(17)
    tensors["classifier.weight"] = linear(NUM_LABELS, wide)
    tensors["classifier.bias"] = 0.3 * randn(NUM_LABELS)
    return tensors


def plain_head(tensors, tokens, num_heads, training=False, attention_dropout=0.0):
    """The reference's head as a textbook has it: every token is normalised and projected.

    Returns:
        Logits `(B, C)` and attention weights `(B, Q, H, N)`; running statistics are updated in place when training.
    """
    block = {name.removeprefix("attn_block."): tensor for name, tensor in tensors.items()}
    batch_size, _, hidden_size = tokens.shape
    num_queries = tensors["query_token"].shape[1]

    def split_heads(values, name):
        normed = F.layer_norm(values, (hidden_size,), block[f"norm_{name}.weight"], block[f"norm_{name}.bias"], 1e-5)
        projected = normed @ block[f"cross_attn.{name}.weight"].t()  # (B, T, H * d)
        return projected.reshape(batch_size, values.shape[1], num_heads, -1).transpose(1, 2)  # (B, H, T, d)

    queries = split_heads(tensors["query_token"].expand(batch_size, -1, -1), "q")
    keys, values = split_heads(tokens, "k"), split_heads(tokens, "v")
    scores = queries @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5  # (B, H, Q, N)
    attentions = scores.softmax(dim=-1).transpose(1, 2).contiguous()  # (B, Q, H, N): the order the mask is drawn in
    dropped = F.dropout(attentions, attention_dropout, training)
    gathered = (dropped.transpose(1, 2) @ values).transpose(1, 2)  # (B, Q, H, d)
    projected = F.linear(gathered.flatten(2), block["cross_attn.proj.weight"], block["cross_attn.proj.bias"])
    normed = F.batch_norm(
        projected.reshape(batch_size, num_queries * hidden_size),
        tensors["bn.running_mean"],
        tensors["bn.running_var"],
        tensors["bn.weight"],
        tensors["bn.bias"],
        training=training,
        momentum=0.1,
        eps=1e-5,
    )
    return F.linear(normed, tensors["classifier.weight"], tensors["classifier.bias"]), attentions


def unit_tokens(num_tokens, hidden_size, dtype=torch.float64, batch_size=BATCH_SIZE):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(batch_size, num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    return F.normalize(tokens + 0.2, dim=-1).to(dtype)


def build_pair(shape, implementation, num_queries, attention_dropout, dtype, training):
    """The tensors of a plain head, and the library's head with the same values."""
    num_tokens, hidden_size, num_heads = shape
    tensors = random_reference_head(hidden_size, num_heads, num_queries)
    head = AttentiveFusionHead(
        hidden_size,
        num_tokens,
        NUM_LABELS,
        num_heads=num_heads,
        num_queries=num_queries,
        attention_dropout=attention_dropout,
        implementation=implementation,
    )
    head.to(torch.float64).load_state_dict({REFERENCE_TO_OWN[name]: value for name, value in tensors.items()})
    return tensors, head.to(dtype).train(training)


def run_both(tensors, head, tokens, training, attention_dropout, needs_token_gradient=True):
    """Forward and backward of both, with the same dropout mask.

    Of cached tokens nobody needs the gradient: the fast head then works through blocks of rows.

    Returns:
        Two dicts of results with the same keys: logits, attentions, running statistics, and every gradient.
    """
    coefficients = torch.randn(
        tokens.shape[0], NUM_LABELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    own_tokens = tokens.clone().requires_grad_(needs_token_gradient)
    torch.manual_seed(11)
    logits, attentions = head(own_tokens, output_attentions=True)
    ((logits * coefficients.to(logits.dtype)).sum() + attentions.square().sum()).backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []
    own = {"logits": logits, "attentions": attentions}
    if needs_token_gradient:
        own["grad of tokens"] = own_tokens.grad
    own |= {f"grad of {name}": parameter.grad for name, parameter in head.named_parameters()}
    own |= {name: head.state_dict()[REFERENCE_TO_OWN[name]] for name in BUFFERS[:2]}

    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in tensors.keys() - set(BUFFERS):
        tensors[name].requires_grad_()
    plain_tokens = tokens.to(torch.float64).requires_grad_()
    torch.manual_seed(11)
    logits, attentions = plain_head(tensors, plain_tokens, head.num_heads, training, attention_dropout)
    ((logits * coefficients).sum() + attentions.square().sum()).backward()
    plain = {"logits": logits, "attentions": attentions}
    if needs_token_gradient:
        plain["grad of tokens"] = plain_tokens.grad
    plain |= {f"grad of {REFERENCE_TO_OWN[name]}": tensors[name].grad for name in tensors.keys() - set(BUFFERS)}
    plain |= {name: tensors[name] for name in BUFFERS[:2]}
    return own, plain


def exactly_zero_gradients(training, attention_dropout):
    """Parameters that cannot change the loss: what they add is constant over the softmax, or over the batch norm."""
    names = {"grad of norm_k.bias"}
    if training:
        names.add("grad of out_proj.bias")
        if attention_dropout == 0:
            names.add("grad of norm_v.bias")
    return names


def assert_same(own, plain, tolerance, zeros):
    assert own.keys() == plain.keys()
    gradient_scale = max(value.abs().max() for name, value in plain.items() if name.startswith("grad"))
    for name, expected in plain.items():
        assert own[name].shape == expected.shape, name
        error = (own[name].double() - expected).abs().max().item()
        scale = expected.abs().max()
        if name in zeros:
            assert scale <= 1e-12 * gradient_scale, f"{name} was expected to vanish"
            scale = gradient_scale
        else:
            assert scale > 1e-6, f"{name} vanishes, so comparing it would show nothing"
        assert error <= tolerance * scale, f"{name}: off by {error:.3g} at a scale of {scale:.3g}"


# Tokens, width, heads: as many heads as tokens for layer fusion, 8 over all tokens of a layer.
SHAPES = [(2, 64, 2), (24, 64, 24), (48, 64, 48), (257, 64, 8), (24, 384, 24), (257, 384, 8)]
MODES = {"train": (True, 0.0), "train-dropout": (True, 0.3), "eval": (False, 0.3)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("implementation", ["fast", "explicit"])
def test_attentive_head_equals_the_plain_implementation(implementation, shape, num_queries, mode):
    training, dropout = MODES[mode]
    tensors, head = build_pair(shape, implementation, num_queries, dropout, torch.float64, training)
    own, plain = run_both(tensors, head, unit_tokens(*shape[:2]), training, dropout)
    assert_same(own, plain, 1e-10, exactly_zero_gradients(training, dropout))


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of few rows, and the sizes of those that were worked on."""
    sizes = []
    split = attention._blocks

    def note(tokens, probes):
        found = split(tokens, probes)
        sizes.append([[part.stop - part.start for part in parts] for _, parts in found])
        return found

    monkeypatch.setattr(attention, "_blocks", note)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 60_000)
    return sizes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attentive_head_in_blocks_equals_the_plain_implementation(shape, num_queries, mode, blocks):
    training, dropout = MODES[mode]
    tensors, head = build_pair(shape, "fast", num_queries, dropout, torch.float64, training)
    tokens = unit_tokens(*shape[:2])
    own, plain = run_both(tensors, head, tokens, training, dropout, needs_token_gradient=False)
    assert len(blocks) == 2, "the forward and the backward pass each go through the blocks once"
    assert blocks[0] == blocks[1]
    assert sum(sum(parts) for parts in blocks[0]) == BATCH_SIZE
    assert sum(map(len, blocks[0])) > 1 or shape[0] == 2, "nothing was learned about several blocks"
    assert_same(own, plain, 1e-10, exactly_zero_gradients(training, dropout))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs_token_gradient", [True, False])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize(("num_heads", "folds"), [(1, True), (2, True), (3, True), (4, False)])
def test_few_heads_fold_the_output_projection(num_heads, folds, num_queries, needs_token_gradient, mode, blocks):
    training, dropout = MODES[mode]
    tensors, head = build_pair((4, 48, num_heads), "fast", num_queries, dropout, torch.float64, training)
    tokens = unit_tokens(4, 48, batch_size=150)
    parameters = {name: parameter[None] for name, parameter in head.named_parameters()}
    folded = attention.fold_parameters(parameters, num_heads, len(tokens) * num_queries, 1e-5)
    assert (folded.output is None) == folds
    own, plain = run_both(tensors, head, tokens, training, dropout, needs_token_gradient)
    assert_same(own, plain, 1e-10, exactly_zero_gradients(training, dropout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["statistics given", "taken"])
def test_normalisation_inside_the_head(dtype, given):
    """Raw tokens, as they are cached, with their statistics or without, equal tokens that were normalised before."""
    _, head = build_pair((24, 64, 24), "fast", 1, 0.0, torch.float32, training=False)
    tokens = (unit_tokens(24, 64) * torch.linspace(0.1, 40, 24)[:, None]).to(dtype)
    tokens[0, 0] = 0
    statistics = token_statistics(tokens) if given else None
    for normalize in (True, False):
        expected_from = F.normalize(tokens.float(), dim=-1) if normalize else tokens.float()
        expected = head(expected_from)
        found = head(tokens, normalize=normalize, token_statistics=statistics)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        head.implementation = "explicit"
        torch.testing.assert_close(head(tokens, normalize=normalize), expected, rtol=1e-4, atol=1e-4)
        head.implementation = "fast"


def test_no_gradient_of_a_second_order_is_given_silently():
    head = AttentiveFusionHead(16, 4, NUM_LABELS)
    loss = head(unit_tokens(4, 16, torch.float32)).square().sum()
    (gradient,) = torch.autograd.grad(loss, head.v_proj.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("num_heads", [2, 24])
def test_half_precision(num_heads, autocast):
    """Under autocast and as a bfloat16 head: products in bfloat16, softmax and statistics in float32."""
    _, head = build_pair((24, 64, num_heads), "fast", 1, 0.3, torch.float32, training=True)
    tokens = unit_tokens(24, 64, torch.float16, batch_size=100)
    torch.manual_seed(3)
    expected = head(tokens, normalize=True)
    if not autocast:
        head = head.bfloat16()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, attentions = head(tokens, normalize=True, output_attentions=True)
    assert attentions.dtype == torch.float32
    assert 1e-4 < (logits.float() - expected).norm() / expected.norm() < 3e-2
    logits.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training):
    _, head = build_pair((24, 64, 24), "fast", 1, 0.0, torch.float32, training)
    tokens = unit_tokens(24, 64, torch.float32)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    results = []
    for run in (head, compiled):
        head.zero_grad()
        logits = run(tokens, normalize=True)
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in head.parameters())])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4 * max(1.0, eager.abs().max().item()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("implementation", ["fast", "explicit"])
def test_attentive_head_in_float32(implementation, shape, mode):
    training, dropout = MODES[mode]
    tensors, head = build_pair(shape, implementation, 1, dropout, torch.float32, training)
    # The same rounded numbers for both, so that only the arithmetic is compared.
    tensors = {name: tensor.float().to(tensor.dtype) for name, tensor in tensors.items()}
    own, plain = run_both(tensors, head, unit_tokens(*shape[:2], torch.float32), training, dropout)
    assert_same(own, plain, 1e-4, exactly_zero_gradients(training, dropout))


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_attention_weights(training, num_queries):
    weights = {}
    for implementation in ("fast", "explicit"):
        _, head = build_pair((24, 64, 8), implementation, num_queries, 0.5, torch.float64, training)
        logits, weights[implementation] = head(unit_tokens(24, 64), output_attentions=True)
        assert logits.shape == (BATCH_SIZE, NUM_LABELS)
        assert weights[implementation].shape == (BATCH_SIZE, num_queries, 8, 24)
        # Before dropout, so they are a distribution in training too.
        torch.testing.assert_close(
            weights[implementation].sum(-1), torch.ones(BATCH_SIZE, num_queries, 8).double(), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(weights["fast"], weights["explicit"], rtol=1e-10, atol=0)
    assert weights["fast"].std() > 1e-3  # neither of them uniform


def test_both_implementations_draw_the_same_dropout_mask():
    tokens = unit_tokens(24, 64)
    logits = []
    for implementation in ("fast", "explicit"):
        _, head = build_pair((24, 64, 24), implementation, 3, 0.4, torch.float64, training=True)
        torch.manual_seed(5)
        logits.append(head(tokens))
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)


def test_projection_dropout_follows_the_output_projection():
    head = AttentiveFusionHead(64, 4, NUM_LABELS, projection_dropout=0.5)
    seen = {}

    def keep(_, args, output):
        seen.update(before=args[0], after=output)

    head.projection_dropout.register_forward_hook(keep)
    head.train()(unit_tokens(4, 64, torch.float32))
    kept = seen["after"] != 0
    assert seen["after"].shape == (BATCH_SIZE, 1, 64)
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen["after"][kept], 2 * seen["before"][kept])


@pytest.mark.parametrize("implementation", ["fast", "explicit"])
def test_a_constant_added_to_every_entry_of_a_token_changes_nothing(implementation):
    _, head = build_pair((24, 64, 24), implementation, 1, 0.0, torch.float64, training=False)
    tokens = unit_tokens(24, 64)
    torch.testing.assert_close(head(tokens + 0.3), head(tokens), rtol=1e-9, atol=1e-9)


# ---- files of the paper's code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("implementation", ["fast", "explicit"])
def test_reference_state_dict_gives_the_plain_logits(implementation, num_queries):
    tensors = random_reference_head(64, 24, num_queries)
    head = AttentiveFusionHead(64, 24, NUM_LABELS, num_queries=num_queries, implementation=implementation)
    head.to(torch.float64).load_reference_state_dict(tensors)
    tokens = unit_tokens(24, 64)
    expected, _ = plain_head(tensors, tokens, 24)
    torch.testing.assert_close(head.eval()(tokens), expected, rtol=1e-10, atol=1e-10)
    assert head.batch_norm.num_batches_tracked == 17


def _without_classifier_bias(tensors):
    del tensors["classifier.bias"]


def _without_attention(tensors):
    del tensors["attn_block.cross_attn.k.weight"], tensors["bn.running_var"]


def _with_mlp(tensors):
    tensors["attn_block.mlp.weight"] = torch.zeros(3)


def _renamed(tensors):
    tensors["query"] = tensors.pop("query_token")


def _narrow_projection(tensors):
    tensors["attn_block.cross_attn.q.weight"] = torch.zeros(40, 64)


def _more_labels(tensors):
    tensors["classifier.weight"] = torch.zeros(NUM_LABELS + 1, 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_classifier_bias, "missing tensors ['classifier.bias'], unknown tensors []"),
        (_without_attention, "missing tensors ['attn_block.cross_attn.k.weight', 'bn.running_var']"),
        (_with_mlp, "missing tensors [], unknown tensors ['attn_block.mlp.weight']"),
        (_renamed, "missing tensors ['query_token'], unknown tensors ['query']"),
        (
            _narrow_projection,
            "attn_block.cross_attn.q.weight has shape (40, 64), but this head expects (96, 64): check hidden_size",
        ),
        (_more_labels, "classifier.weight has shape (8, 64), but this head expects (7, 64)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(damage, message):
    head = AttentiveFusionHead(64, 24, NUM_LABELS)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    tensors = random_reference_head(64, 24)
    damage(tensors)
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        head.load_reference_state_dict(tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


# ---- the other heads ---------------------------------------------------------------------------------------------


def test_linear_head_value():
    head = LinearHead(hidden_size=4, num_tokens=3, num_labels=2).double()
    tokens = torch.randn(5, 3, 4, dtype=torch.float64)
    by_hand = torch.stack(
        [
            torch.stack(
                [(head.classifier.weight[c] * row.reshape(-1)).sum() + head.classifier.bias[c] for c in (0, 1)]
            )
            for row in tokens
        ]
    )
    torch.testing.assert_close(head(tokens), by_hand, rtol=1e-12, atol=1e-12)
    assert head(tokens, output_attentions=True)[1] is None


def test_scalar_mix_head_value():
    head = ScalarMixHead(hidden_size=4, num_tokens=6, num_labels=2, num_pools=2).double()
    with torch.no_grad():
        head.layer_logits.copy_(torch.tensor([0.5, -1.0, 2.0]))
        head.gamma.fill_(1.7)
    tokens = torch.randn(5, 6, 4, dtype=torch.float64)
    shares = [0.5, -1.0, 2.0]
    total = sum(torch.tensor(share).double().exp() for share in shares)
    weights = [torch.tensor(share).double().exp() / total for share in shares]
    # Tokens come layer by layer, the pools of a layer side by side.
    cls = sum(weight * tokens[:, 2 * layer] for layer, weight in enumerate(weights))
    mean = sum(weight * tokens[:, 2 * layer + 1] for layer, weight in enumerate(weights))
    by_hand = 1.7 * torch.cat([cls, mean], dim=1) @ head.classifier.weight.t() + head.classifier.bias
    logits, attentions = head(tokens, output_attentions=True)
    torch.testing.assert_close(logits, by_hand, rtol=1e-12, atol=1e-12)
    assert attentions.shape == (5, 1, 1, 6)
    torch.testing.assert_close(attentions.sum(-1), torch.ones(5, 1, 1).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(attentions[0, 0, 0, 0::2], torch.stack(weights) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(attentions[..., 0::2], attentions[..., 1::2], rtol=0, atol=0)


# ---- what every head keeps to ------------------------------------------------------------------------------------

HEADS = {
    "attentive": (AttentiveFusionHead, {}),
    "attentive-explicit": (AttentiveFusionHead, {"implementation": "explicit"}),
    "attentive-dropout": (AttentiveFusionHead, {"attention_dropout": 0.2, "projection_dropout": 0.2}),
    "attentive-3-queries": (AttentiveFusionHead, {"num_queries": 3, "num_heads": 4, "head_dim_multiplier": 1}),
    "linear": (LinearHead, {}),
    "scalar-mix": (ScalarMixHead, {}),
    "scalar-mix-2-pools": (ScalarMixHead, {"num_pools": 2}),
}


@pytest.fixture(params=HEADS)
def make_head(request):
    head_class, options = HEADS[request.param]
    return lambda: head_class(hidden_size=32, num_tokens=6, num_labels=NUM_LABELS, **options)


class TestEveryHead:
    def test_shapes(self, make_head):
        head, tokens = make_head().eval(), torch.randn(5, 6, 32)
        logits, weights = head(tokens, output_attentions=True)
        assert logits.shape == (5, NUM_LABELS)
        assert torch.equal(head(tokens), logits)
        if weights is not None:
            assert (weights.shape[0], weights.shape[-1], weights.ndim) == (5, 6, 4)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))

    @pytest.mark.parametrize("training", [True, False])
    def test_every_parameter_has_a_gradient(self, make_head, training):
        head = make_head().train(training)
        head(torch.randn(8, 6, 32)).square().sum().backward()
        assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []
        zeros = {name.removeprefix("grad of ") for name in exactly_zero_gradients(training, 0.0)}
        idle = {name for name, parameter in head.named_parameters() if not parameter.grad.abs().max() > 0}
        assert idle <= zeros

    def test_state_dict_is_the_whole_head(self, make_head):
        torch.manual_seed(1)
        head = make_head()
        torch.manual_seed(2)
        other = make_head()
        tokens = torch.randn(5, 6, 32)
        head.train()(tokens)  # moves the running statistics
        assert not torch.equal(head.eval()(tokens), other.eval()(tokens))
        other.load_state_dict(head.state_dict())
        assert torch.equal(head(tokens), other(tokens))

    def test_one_image_does_not_depend_on_the_others_in_eval(self, make_head):
        head = make_head().double().eval()
        tokens = torch.randn(5, 6, 32, dtype=torch.float64)
        one_by_one = torch.cat([head(row) for row in tokens.split(1)])
        torch.testing.assert_close(head(tokens), one_by_one, rtol=1e-12, atol=1e-12)

    def test_reset_parameters_is_what_the_constructor_does(self, make_head):
        torch.manual_seed(1)
        fresh = make_head()
        used = make_head()
        with torch.no_grad():
            for tensor in used.state_dict().values():
                tensor.fill_(3)
        used.reset_parameters()
        for name, tensor in fresh.state_dict().items():
            reset = used.state_dict()[name]
            # Alike in distribution: constants are equal, random tensors have about the same spread, and no 3 is left.
            assert not (reset == 3).any(), name
            if tensor.numel() == 1 or (tensor == tensor.flatten()[0]).all():
                assert torch.equal(reset, tensor), name
            else:
                assert 0.4 < reset.std() / tensor.std() < 2.5, name

    def test_one_row_can_be_trained_on(self, make_head):
        head = make_head().train()
        logits = head(torch.randn(1, 6, 32))
        logits.square().sum().backward()
        assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, make_head, dtype):
        head, tokens = make_head().eval(), torch.randn(5, 6, 32)
        with torch.autocast("cpu", dtype):
            logits = head(tokens)
        torch.testing.assert_close(logits.float(), head(tokens), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_heads": 33},
            "num_heads=33 does not fit tokens of width 32: set num_heads to something from 1 to 32",
        ),
        ({"num_tokens": 40}, "num_heads=40 does not fit tokens of width 32"),
        ({"num_heads": 0}, "num_heads=0 does not fit"),
        ({"num_heads": -2}, "num_heads=-2 does not fit"),
        ({"implementation": "quick"}, "head implementation 'quick' is unknown: use 'fast' or 'explicit'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        AttentiveFusionHead(**{"hidden_size": 32, "num_tokens": 6, "num_labels": 3} | arguments)


def test_head_width_rounds_down_where_heads_do_not_divide_the_width():
    head = AttentiveFusionHead(hidden_size=64, num_tokens=24, num_labels=3)
    assert (head.num_heads, head.head_dim) == (24, 4)
    assert head.q_proj.weight.shape == (96, 64)
    assert head.out_proj.weight.shape == (64, 96)


@pytest.mark.parametrize(
    ("hidden_size", "num_tokens", "millions"), [(384, 24, 1.22), (768, 24, 4.80), (1024, 48, 8.37)]
)
def test_size_is_that_of_the_reference(hidden_size, num_tokens, millions):
    with torch.device("meta"):
        head = AttentiveFusionHead(hidden_size, num_tokens, num_labels=100)
    assert sum(parameter.numel() for parameter in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


# ---- batch norm over processes -----------------------------------------------------------------------------------


def _filled_batch_norm(norm_class):
    norm = norm_class(6).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(6, generator=generator) + 0.5)
    return norm


def _batches():
    """Two training batches of eight rows with the gradient of their outputs, far from zero mean and unit variance."""
    generator = torch.Generator().manual_seed(5)
    rows, gradients = torch.randn(2, 2, 8, 6, generator=generator, dtype=torch.float64)
    return list(zip(rows * 3 + 2, gradients, strict=True))


def _train_batch_norm(norm, batches):
    results = {"outputs": [], "input gradients": []}
    for rows, gradients in batches:
        rows = rows.clone().requires_grad_()
        outputs = norm.train()(rows)
        (outputs * gradients).sum().backward()
        results["outputs"].append(outputs.detach())
        results["input gradients"].append(rows.grad)
    statistics = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    return results | {"state": statistics, "weight gradient": norm.weight.grad, "bias gradient": norm.bias.grad}


SPLITS = {"halves": (4, 4), "uneven": (7, 1)}


def _train_one_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=3)
    )
    try:
        for name, sizes in SPLITS.items():
            shard = [tuple(tensor.split(sizes)[rank] for tensor in batch) for batch in _batches()]
            norm = _filled_batch_norm(GlobalBatchNorm1d)
            torch.save(_train_batch_norm(norm, shard), f"{folder}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_normalise_as_one(tmp_path):
    # This process is rank 0: importing everything once more takes long enough.
    other = mp.get_context("spawn").Process(target=_train_one_rank, args=(1, str(tmp_path)))
    other.start()
    _train_one_rank(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    expected = _train_batch_norm(_filled_batch_norm(nn.BatchNorm1d), _batches())
    for split in SPLITS:
        ranks = [torch.load(tmp_path / f"{split}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for key in ("outputs", "input gradients"):
            for step in (0, 1):
                whole = torch.cat([rank[key][step] for rank in ranks])
                torch.testing.assert_close(whole, expected[key][step], rtol=1e-10, atol=1e-12)
        for key in ("weight gradient", "bias gradient"):
            torch.testing.assert_close(ranks[0][key] + ranks[1][key], expected[key], rtol=1e-10, atol=1e-12)
        for rank in ranks:
            torch.testing.assert_close(rank["state"], expected["state"], rtol=1e-10, atol=1e-12)


def test_one_process_normalises_as_pytorch_does():
    own, expected = (_filled_batch_norm(norm_class) for norm_class in (GlobalBatchNorm1d, nn.BatchNorm1d))
    torch.testing.assert_close(_train_batch_norm(own, _batches()), _train_batch_norm(expected, _batches()))
    rows = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(own.eval()(rows), expected.eval()(rows))


def test_one_row_is_normalised_with_the_running_statistics():
    norm = _filled_batch_norm(GlobalBatchNorm1d)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    row = torch.randn(1, 6, dtype=torch.float64)
    output = norm.train()(row)
    by_hand = (row - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(output, by_hand)
    torch.testing.assert_close(norm.state_dict(), before)
