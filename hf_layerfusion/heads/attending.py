"""What heads share whose learned queries attend over the bank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..errors import LayerFusionError
from .attention import FoldedParameters, attend, token_scales
from .batch_norm import GlobalBatchNorm1d
from .stack_inputs import StackInputs


class AttendingHead(nn.Module):
    """Everything but how scores and values come about.

    `places` gives every token an embedding of its place, as vision transformers give their patches: a learned vector
    for its layer and module plus one for its pool or cell, added to the (normalised) token before anything else reads
    it. Neither paper has it. The embedded tokens differ from head to head and need a gradient, so that a stack goes
    through them head by head, in whole batches.

    Args:
        hidden_size: D, the width of a token.
        num_tokens: N, tokens in the bank.
        num_heads: H.
        num_queries: Q.
        attention_dropout: on the attention weights.
        projection_dropout: on what is read out of the tokens.
        implementation: `"fast"` or `"explicit"`.
        places: for each token, which tap and which pool it is of, counted from 0; `None` for no embeddings.

    Raises:
        LayerFusionError: for an unknown implementation, or places of another number of tokens.
    """

    eps = 1e-5  # of the LayerNorms

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        num_heads: int,
        num_queries: int,
        attention_dropout: float,
        projection_dropout: float,
        implementation: str,
        places: Sequence[tuple[int, int]] | None,
    ):
        super().__init__()
        if implementation not in ("fast", "explicit"):
            raise LayerFusionError(f"head implementation {implementation!r} is unknown: use 'fast' or 'explicit'")
        if places is not None and len(places) != num_tokens:
            raise LayerFusionError(f"places are those of {len(places)} tokens, but the bank has {num_tokens}")
        self.hidden_size, self.num_tokens = hidden_size, num_tokens
        self.num_heads, self.num_queries = num_heads, num_queries
        self.implementation = implementation
        self.query = nn.Parameter(torch.empty(1, num_queries, hidden_size))
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.projection_dropout = nn.Dropout(projection_dropout)
        self.taps = [tap for tap, _ in places or ()]
        self.pools = [pool for _, pool in places or ()]

    def _add_classifier(self, width: int, num_labels: int) -> None:
        """What comes last, for whatever of this width is read out of the tokens, and first values for everything.

        Optimizers number parameters in this order.
        """
        self.batch_norm = GlobalBatchNorm1d(width)
        self.classifier = nn.Linear(width, num_labels)
        if self.taps:
            self.tap_embedding = nn.Parameter(torch.empty(max(self.taps) + 1, self.hidden_size))
            self.pool_embedding = nn.Parameter(torch.empty(max(self.pools) + 1, self.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Query and embeddings N(0, 0.02^2); norms at identity; linear layers at PyTorch's default."""
        init.normal_(self.query, std=0.02)
        init.zeros_(self.batch_norm.running_mean)
        init.ones_(self.batch_norm.running_var)
        init.zeros_(self.batch_norm.num_batches_tracked)
        for module in self.children():
            if isinstance(module, nn.LayerNorm | GlobalBatchNorm1d):
                init.ones_(module.weight)
                init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    init.uniform_(module.bias, -bound, bound)
        if self.taps:
            init.normal_(self.tap_embedding, std=0.02)
            init.normal_(self.pool_embedding, std=0.02)

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
            tokens: `(B, N, D)`, of any floating dtype: cached tokens need no copy in that of the head.
            output_attentions: also return the attention weights `(B, Q, H, N)`, before dropout.
            normalize: divide each token by its L2 norm first. In the fast order this costs nothing.
            token_statistics: `(B, N, 2)`, the L2 norm and the standard deviation of each token as given, as
                `hf_layerfusion.features.token_statistics` computes them; they save the fast order one pass. Not used
                where tokens get embeddings.
            token_keep: `(B, N)`, dropout of whole tokens, as multipliers of their attention weights.

        Returns:
            Logits `(B, C)`, or `(logits, attentions)`.
        """
        if self.taps:
            tokens = tokens.to(self.query.dtype)
            tokens = F.normalize(tokens, dim=-1) if normalize else tokens
            tokens = tokens + self._embeddings(dict(self.named_parameters()))
            normalize, token_statistics = False, None
        if self.implementation == "fast":
            projected, attentions = self._attend_fast(tokens, normalize, token_statistics, token_keep)
        else:
            tokens = tokens.to(self.query.dtype)
            normed = F.normalize(tokens, dim=-1) if normalize else tokens
            projected, attentions = self._attend_explicit(normed, token_keep)
        logits = self.classifier(self.batch_norm(self._fuse(self.projection_dropout(projected))))
        return (logits, attentions) if output_attentions else logits

    def _embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """`(N, D)` of one head's parameters, or `(K, N, D)` of stacked ones."""
        return parameters["tap_embedding"][..., self.taps, :] + parameters["pool_embedding"][..., self.pools, :]

    def _fold(self, parameters: Mapping[str, Tensor], num_rows: int) -> FoldedParameters:
        """What is left of K heads' parameters for batches of `num_rows` rows."""
        raise NotImplementedError

    def _attend_explicit(self, tokens: Tensor, token_keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The textbook order: what the queries read `(B, outputs, width)`, and the attention weights `(B, Q, H, N)`."""
        raise NotImplementedError

    @property
    def _num_outputs(self) -> int:
        """Vectors that are read out of the tokens of a row."""
        return self.num_queries

    def _fuse(self, projected: Tensor) -> Tensor:
        """`(..., outputs, width)` to what the classifier reads."""
        return projected.flatten(-2)

    def _attend_fast(
        self, tokens: Tensor, normalize: bool, statistics: Tensor | None, token_keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        folded = self._fold({name: value.unsqueeze(0) for name, value in self.named_parameters()}, len(tokens))
        scales = token_scales(tokens, normalize, self.eps, statistics)
        keep = None
        # In the shape of the explicit order, whose draws these are.
        shape = (len(tokens), self.num_queries, self.num_heads, tokens.shape[1])
        if self.training and self.attention_dropout.p:
            keep = self.attention_dropout(scales.new_ones(shape)).flatten(1, 2).mT
        if token_keep is not None:
            of_tokens = token_keep.to(scales.dtype)[..., None]
            keep = of_tokens.expand(-1, -1, shape[1] * shape[2]) if keep is None else keep * of_tokens
        projected, attentions = attend(folded, tokens, scales, self._num_outputs, keep)
        return projected.squeeze(0), attentions.mT.unflatten(1, (self.num_queries, self.num_heads))

    def run_stack(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: StackInputs
    ) -> Tensor:
        """K heads of this shape over one batch, in the fast order: logits `(K, B, C)`.

        Args:
            parameters: of all heads, by name, with a leading axis K.
            buffers: likewise; running statistics are updated in place when training.
            inputs: the batch.
        """
        own_tokens = self._own_tokens(parameters, inputs)
        if own_tokens is not None:
            projected = self._attend_own(own_tokens, parameters, inputs)
        else:
            tokens, scales = inputs.tokens, inputs.scales
            if scales is None:
                scales = token_scales(tokens, False, self.eps)
            folded = self._fold(parameters, len(tokens))
            projected, _ = attend(folded, tokens, scales, self._num_outputs, inputs.attention_keep)  # (K, B, Q, D)
        if inputs.projection_keep is not None:
            projected = projected * inputs.projection_keep
        # K heads with a norm each are one norm over K times as many channels.
        channels = self._fuse(projected).transpose(0, 1).flatten(1)  # (B, K * width)
        normed = F.batch_norm(
            channels,
            buffers["batch_norm.running_mean"].view(-1),
            buffers["batch_norm.running_var"].view(-1),
            parameters["batch_norm.weight"].flatten(),
            parameters["batch_norm.bias"].flatten(),
            training=inputs.training and len(channels) > 1,  # as `GlobalBatchNorm1d`
            momentum=self.batch_norm.momentum,
            eps=self.batch_norm.eps,
        )
        normed = normed.unflatten(1, (len(projected), -1)).transpose(0, 1)  # (K, B, width)
        bias = parameters["classifier.bias"][:, None]
        return torch.baddbmm(bias, normed, parameters["classifier.weight"].mT)

    def _own_tokens(self, parameters: Mapping[str, Tensor], inputs: StackInputs) -> Iterator[Tensor] | None:
        """What each of K heads attends over, `(B, N', D)`, one head after the other; `None` where all read the batch."""
        if not self.taps:
            return None
        return (inputs.tokens + embedding for embedding in self._embeddings(parameters))

    def _attend_own(
        self, own_tokens: Iterator[Tensor], parameters: Mapping[str, Tensor], inputs: StackInputs
    ) -> Tensor:
        """What K heads, each with tokens of its own, read out of one batch, `(K, B, outputs, width)`."""
        num_probes = self.num_queries * self.num_heads
        projected = []
        for head, tokens in enumerate(own_tokens):
            folded = self._fold({name: value[head : head + 1] for name, value in parameters.items()}, len(tokens))
            keep = inputs.attention_keep
            if keep is not None:
                keep = keep[..., head * num_probes : (head + 1) * num_probes]
            scales = token_scales(tokens, False, self.eps)
            projected.append(attend(folded, tokens, scales, self._num_outputs, keep)[0])
        return torch.cat(projected)
