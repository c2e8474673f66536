"""What one would write without this library: the paper's head, a `Dataset` of cached rows, a training loop.

Nothing here is slow on purpose: the query is projected once for the whole batch, noise is drawn only where it falls, and
`head.py` prints how near to the machine's matrix rate the head comes. What makes it a textbook head is its order: every
token is normalised and projected, and only then attended to.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

MIN_LEARNING_RATE = 1e-6
MAX_GRADIENT_NORM = 5.0


class TextbookHead(nn.Module):
    """The head of arXiv 2601.09322, for one query. Its state dict is one of `AttentiveFusionHead`'s.

    Args:
        hidden_size: D.
        num_tokens: N.
        num_labels: C.
        num_heads: H; `None` for one head per token. A head is `d = 2 * (D // H)` wide.
        attention_dropout: on the attention weights.
        use_sdpa: attend with `F.scaled_dot_product_attention` instead of two products and a softmax.
        expands_query: normalise and project the query once per row, as attention pooling is often written (the
            paper's code does), instead of once.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        num_labels: int,
        num_heads: int | None = None,
        attention_dropout: float = 0.0,
        use_sdpa: bool = False,
        expands_query: bool = False,
    ):
        super().__init__()
        self.num_heads = num_tokens if num_heads is None else num_heads
        self.head_dim = 2 * (hidden_size // self.num_heads)
        self.attention_dropout, self.use_sdpa, self.expands_query = attention_dropout, use_sdpa, expands_query
        inner = self.num_heads * self.head_dim
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, hidden_size))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, hidden_size)
        self.batch_norm = nn.BatchNorm1d(hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(B, C)` of tokens `(B, N, D)`."""
        heads = (self.num_heads, self.head_dim)
        query = self.query.expand(len(tokens), -1, -1) if self.expands_query else self.query
        query = self.q_proj(self.norm_q(query)).view(-1, *heads)  # (B, H, d), or (1, H, d) for all rows
        keys = self.k_proj(self.norm_k(tokens)).unflatten(-1, heads)  # (B, N, H, d)
        values = self.v_proj(self.norm_v(tokens)).unflatten(-1, heads)  # (B, N, H, d)
        attend = self._attend_sdpa if self.use_sdpa else self._attend_products
        gathered = attend(query, keys, values)  # (B, H, d)
        return self.classifier(self.batch_norm(self.out_proj(gathered.flatten(1))))

    def _attend_products(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query = (query * self.head_dim**-0.5).expand(len(keys), -1, -1)
        scores = torch.einsum("bhd,bnhd->bhn", query, keys)
        attentions = F.dropout(scores.softmax(dim=-1), self.attention_dropout, self.training)  # (B, H, N)
        return torch.einsum("bhn,bnhd->bhd", attentions, values)

    def _attend_sdpa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        gathered = F.scaled_dot_product_attention(
            query.expand(len(keys), -1, -1).unsqueeze(2),  # (B, H, 1, d)
            keys.transpose(1, 2),  # (B, H, N, d)
            values.transpose(1, 2),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return gathered.squeeze(2)


class CachedRows(Dataset):
    """Cached tokens `(rows, N, D)` of any float dtype, held in memory and read by row.

    Rows are L2-normalised float32 tokens `(N, D)` and a class index.
    """

    def __init__(self, tokens: Tensor, labels: Tensor):
        self.tokens, self.labels = tokens, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return F.normalize(self.tokens[index].float(), dim=-1), self.labels[index]


def train_textbook(
    head: nn.Module,
    rows: Dataset,
    *,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
    batch_size: int,
    noise_std: float,
    noise_probability: float,
    class_weights: Tensor | None,
    seed: int,
    max_steps: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Train a head with the protocol of arXiv 2601.09322, on the device it is on.

    Args:
        head: tokens `(B, N, D)` to logits `(B, C)`.
        rows: of `(tokens, class index)`, such as [`CachedRows`].
        learning_rate: at the start; a cosine takes it to 1e-6 over `epochs`, by step.
        weight_decay: on all parameters.
        noise_std: of Gaussian noise on all tokens of a row.
        noise_probability: share of the rows that get noise.
        class_weights: `(C,)`, for the cross-entropy.
        seed: of the order of the rows, noise and dropout.
        max_steps: stop after so many steps; the cosine stays that of all `epochs`.
        clock: what tells the seconds.

    Returns:
        Seconds of each step, reading its rows included.
    """
    torch.manual_seed(seed)
    device = next(head.parameters()).device
    loader = DataLoader(rows, batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader), MIN_LEARNING_RATE)
    head.train()
    seconds: list[float] = []
    start = clock()
    for _ in range(epochs):
        for tokens, labels in loader:
            tokens, labels = tokens.to(device), labels.to(device)
            if noise_std > 0:
                # Only for the rows that get it: to draw for all and mask takes twice as long.
                noisy = (torch.rand(len(tokens), device=device) < noise_probability).nonzero().squeeze(1)
                tokens[noisy] += noise_std * torch.randn(len(noisy), *tokens.shape[1:], device=device)
            loss = F.cross_entropy(head(tokens), labels, class_weights)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = clock()
            seconds.append(now - start)
            start = now
            if len(seconds) == max_steps:
                return seconds
    return seconds
