"""Attention in two stages: over the places of each layer, and over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..errors import LayerFusionError
from .attention import token_scales
from .attentive import AttentiveFusionHead
from .stack_inputs import StackInputs


class TwoStageHead(AttentiveFusionHead):
    """A learned query pools the patches or cells of each layer; `AttentiveFusionHead` reads what comes out.

    With the tokens x_n (D) of the patches or cells of a tap l, and LN a LayerNorm without parameters:

        p_n = softmax_n( q_l . LN(x_n) / sqrt(D) )
        s_l = sum_n p_n x_n

    There are no projections, as in efficient probing (arXiv 2506.10178), so that the first stage has D parameters for
    each query. The second stage is an attentive head over the summaries s_l and the tokens that stand for a layer as a
    whole, such as CLS and the mean, which remain as they are. All its options are those of that head, and H is by default
    the number of tokens that it reads.

    Queries of the first stage begin at zero: each s_l is then the mean, and the head is the one over pooled tokens. Nothing
    else is needed to tell queries apart, since a tap has only one, and each reads tokens of its own.

    The summaries differ from head to head and need a gradient, so that the second stage of a stack goes through the heads
    one by one, in whole batches.

    Args:
        hidden_size: D, the width of a token.
        num_tokens: N, tokens in the bank.
        num_labels: C.
        summarised: for each tap that has patches or cells, their positions among the N tokens.
        stage_queries: `"per_layer"` for a query for each of these taps, `"shared"` for one query.
        options: of the second stage, as `AttentiveFusionHead` takes them, but for `places`.

    Raises:
        LayerFusionError: without tokens to summarise, for positions that are not there or named twice, for embeddings of
            places, and for what `AttentiveFusionHead` refuses.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        num_labels: int,
        summarised: Sequence[Sequence[int]],
        stage_queries: str = "per_layer",
        **options: Any,
    ):
        if stage_queries not in ("per_layer", "shared"):
            raise LayerFusionError(f"stage_queries {stage_queries!r} is unknown: use 'per_layer' or 'shared'")
        if options.get("places") is not None:
            raise LayerFusionError("a head of two stages has no embeddings of its tokens' places: leave places out")
        if not summarised or not all(summarised):
            raise LayerFusionError(
                "a head of two stages pools patches or cells, and there are none: use an AttentiveFusionHead"
            )
        pooled = [position for positions in summarised for position in positions]
        if len(set(pooled)) < len(pooled) or not set(pooled) <= set(range(num_tokens)):
            raise LayerFusionError(
                f"summarised must name positions below {num_tokens}, each once, but is {summarised}"
            )
        # Before the parent's, which makes the parameters.
        self.summarised = [list(positions) for positions in summarised]
        self.stage_queries = stage_queries
        self.kept = sorted(set(range(num_tokens)) - set(pooled))
        # What the second stage reads: a summary is dropped as the first of its tokens is.
        self.sources = self.kept + [positions[0] for positions in self.summarised]
        self._order = sorted(range(num_tokens), key=(self.kept + pooled).__getitem__)
        super().__init__(hidden_size, len(self.sources), num_labels, **options)
        self.num_tokens = num_tokens

    def _add_classifier(self, width: int, num_labels: int) -> None:
        num_queries = 1 if self.stage_queries == "shared" else len(self.summarised)
        self.stage_query = nn.Parameter(torch.empty(num_queries, self.hidden_size))
        super()._add_classifier(width, num_labels)

    def reset_parameters(self) -> None:
        """Those of the second stage as in `AttendingHead`; queries of the first at zero, where a summary is a mean."""
        super().reset_parameters()
        init.zeros_(self.stage_query)

    def forward(
        self,
        tokens: Tensor,
        output_attentions: bool = False,
        *,
        normalize: bool = False,
        token_statistics: Tensor | None = None,
        token_keep: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify a batch of banks.

        Args:
            tokens: `(B, N, D)`, of any floating dtype.
            output_attentions: also return the weights of the bank's tokens, `(B, Q, H, N)`, before dropout. That of a patch
                or cell is p_n times the weight of the summary it is part of, so that they sum to one over all N.
            normalize: divide each token by its L2 norm first.
            token_statistics: not used here.
            token_keep: `(B, N)`, dropout of whole layers, as multipliers of the second stage's weights: the same for all
                tokens of a layer.

        Returns:
            Logits `(B, C)`, or `(logits, attentions)`.
        """
        tokens = tokens.to(self.query.dtype)
        tokens = F.normalize(tokens, dim=-1) if normalize else tokens
        scales = token_scales(tokens, False, self.eps)
        weights, summaries = self._summarise(self.stage_query[None], tokens, scales)
        result = super().forward(
            torch.cat([tokens[:, self.kept], summaries[:, 0]], dim=1),
            output_attentions,
            token_keep=None if token_keep is None else token_keep[:, self.sources],
        )
        if not isinstance(result, tuple):
            return result
        logits, attentions = result
        return logits, self._by_token(attentions, [of_tap[:, 0] for of_tap in weights])

    def run_stack(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: StackInputs
    ) -> Tensor:
        """As `AttendingHead.run_stack`; of the dropout of the N tokens, that of `sources` is used."""
        if inputs.attention_keep is not None:
            inputs = replace(inputs, attention_keep=inputs.attention_keep[:, self.sources])
        return super().run_stack(parameters, buffers, inputs)

    def _own_tokens(self, parameters: Mapping[str, Tensor], inputs: StackInputs) -> Iterator[Tensor]:
        tokens, scales = inputs.tokens, inputs.scales
        if scales is None:
            scales = token_scales(tokens, False, self.eps)
        _, summaries = self._summarise(parameters["stage_query"], tokens, scales)
        kept = tokens[:, self.kept]
        return (torch.cat([kept, of_head], dim=1) for of_head in summaries.unbind(dim=1))

    def _summarise(self, queries: Tensor, tokens: Tensor, scales: Tensor) -> tuple[list[Tensor], Tensor]:
        """The first stage of K heads.

        Args:
            queries: `(K, taps, D)`, or `(K, 1, D)` if taps share them.
            tokens: `(B, N, D)`.
            scales: `(B, N)`, one over the standard deviation of each token, as `token_scales` gives it.

        Returns:
            p of the tokens of each tap, `(B, K, M)` each, and the summaries `(B, K, taps, D)`.
        """
        # What a LayerNorm takes off a token, centring takes off the query.
        probes = (queries - queries.mean(dim=-1, keepdim=True)) * self.hidden_size**-0.5
        probes = probes.expand(-1, len(self.summarised), -1)
        weights, summaries = [], []
        for number, positions in enumerate(self.summarised):
            of_tap = tokens[:, positions]
            scores = (of_tap @ probes[:, number].mT) * scales[:, positions, None]  # (B, M, K)
            weights.append(scores.softmax(dim=1).mT)
            summaries.append(weights[-1].to(of_tap.dtype) @ of_tap)
        return weights, torch.stack(summaries, dim=2)

    def _by_token(self, attentions: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """`(B, Q, H, sources)` of the second stage and `(B, M)` of the first to `(B, Q, H, N)`, in the bank's order."""
        num_kept = len(self.kept)
        parts = [attentions[..., :num_kept]]
        for number, of_tap in enumerate(weights):
            parts.append(attentions[..., num_kept + number, None] * of_tap[:, None, None])
        return torch.cat(parts, dim=-1)[..., self._order]
