"""K heads of one shape that are trained side by side on the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.random import SeedSequence, default_rng
from torch import Tensor, nn

from ..configuration_layer_fusion import ATTENDING_HEADS, MULTI_HEAD_TYPES, LayerFusionConfig
from ..heads import build_member
from ..heads.stack_inputs import StackInputs
from ..losses import scaled_logits, stacked_loss
from ..noise import Mixture, layer_positions
from .settings import Setting

# The reference's optimizer is `torch.optim.AdamW` with its defaults.
BETAS, EPSILON = (0.9, 0.999), 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trial:
    """One head to train: a setting, from one seed, on one choice of rows.

    Attributes:
        setting: of the head.
        seed: of first weights, order of the rows, dropout and noise.
        fold: which choice of training rows.
    """

    setting: Setting
    seed: int = 0
    fold: int = 0


def shape_of(config: LayerFusionConfig) -> tuple:
    """What heads must have in common to be stacked."""
    return (
        *(config.head_type, config.hidden_size, tuple(config.bank.coordinates), config.num_labels),
        *(config.num_heads, config.num_queries, config.head_dim_multiplier, config.loss),
        *(config.query_fusion, config.token_embeddings, config.stage_queries),
    )


def state_bytes(config: LayerFusionConfig, dtype: torch.dtype) -> int:
    """Memory of one head while it is trained: parameters, gradients and two moments."""
    with torch.device("meta"):
        head = build_member(config)
    return 4 * dtype.itemsize * sum(parameter.numel() for parameter in head.parameters())


class HeadStack:
    """Heads of one shape, each with its own setting: stacked parameters, and an AdamW over each head's slice.

    A head's numbers do not depend on which others it is stacked with, up to rounding.

    Args:
        trials: one per head, of one seed and fold.
        configs: one per head, of one shape.
        class_weights: for those that balance their classes.
        device: to train on.
        dtype: of the parameters.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        configs: Sequence[LayerFusionConfig],
        class_weights: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.trials, self.configs = list(trials), list(configs)
        config = configs[0]
        self.problem_type = str(config.problem_type)
        self.loss = config.loss
        self.layers = layer_positions(config.bank)
        with torch.device("meta"):
            self.head: Any = build_member(config)  # for its shape alone
        states = [first_state(config, trial.seed) for trial, config in zip(trials, configs, strict=True)]
        stacked = {
            name: torch.stack([state[name] for state in states]).to(
                device=device, dtype=dtype if value.is_floating_point() else value.dtype
            )
            for name, value in states[0].items()
        }
        names = [name for name, _ in self.head.named_parameters()]
        self.parameters = {name: stacked.pop(name).requires_grad_() for name in names}
        self.buffers = stacked
        self.moments = {
            moment: {name: torch.zeros_like(value) for name, value in self.parameters.items()} for moment in MOMENTS
        }
        self.class_weights = class_weights
        self._prepare()

    def _prepare(self) -> None:
        """Everything that depends on which heads are in the stack."""
        settings = [trial.setting for trial in self.trials]
        device = next(iter(self.parameters.values())).device
        self.weights = None
        if self.class_weights is not None and any(setting.balance_classes for setting in settings):
            plain = torch.ones_like(self.class_weights)
            self.weights = torch.stack([self.class_weights if s.balance_classes else plain for s in settings])
        self.attention_dropout = torch.tensor([config.attention_dropout for config in self.configs], device=device)
        self.projection_dropout = torch.tensor([config.projection_dropout for config in self.configs], device=device)
        self.layer_dropout = torch.tensor([config.layer_dropout for config in self.configs], device=device)
        groups, self.slices = [], []
        for position, setting in enumerate(settings):
            # Slices share their memory with the stack, so a step of the optimizer is a step of the stack.
            slices = {name: nn.Parameter(value.detach()[position]) for name, value in self.parameters.items()}
            groups.append({"params": list(slices.values()), "weight_decay": setting.weight_decay})
            self.slices.append(slices)
        # Fused: one pass over the memory instead of ten.
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)

    def attach_optimizer(self, step: int) -> None:
        """Give the optimizer the moments of all heads after `step` steps."""
        for position, slices in enumerate(self.slices):
            for name, parameter in slices.items():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    **{moment: self.moments[moment][name][position] for moment in MOMENTS},
                }

    def __len__(self) -> int:
        return len(self.trials)

    def keep(self, positions: Sequence[int], step: int) -> None:
        """Go on with some of the heads only."""
        index = torch.tensor(list(positions), device=self.attention_dropout.device)
        self.trials = [self.trials[position] for position in positions]
        self.configs = [self.configs[position] for position in positions]
        self.parameters = {k: v.detach().index_select(0, index).requires_grad_() for k, v in self.parameters.items()}
        self.buffers = {name: value.index_select(0, index) for name, value in self.buffers.items()}
        self.moments = {
            moment: {name: value.index_select(0, index) for name, value in tensors.items()}
            for moment, tensors in self.moments.items()
        }
        self._prepare()
        self.attach_optimizer(step)

    def logits(self, inputs: StackInputs) -> Tensor:
        """`(K, B, C)`."""
        return scaled_logits(self.head.run_stack(self.parameters, self.buffers, inputs), self.loss)

    def train_step(
        self,
        inputs: StackInputs,
        labels: Tensor,
        learning_rates: Sequence[float],
        max_gradient_norm: float,
        mixture: Mixture | None = None,
    ) -> Tensor:
        """One step of every head; returns their losses `(K,)`. `mixture` is that of the inputs' tokens."""
        for parameter in self.parameters.values():
            parameter.grad = None
        logits = self.logits(inputs)

        def losses_of(labels: Tensor) -> Tensor:
            return stacked_loss(self.problem_type, logits, labels, self.weights, self.loss)

        losses = losses_of(labels) if mixture is None else mixture.loss(losses_of, labels)
        losses.sum().backward()
        if len(inputs.tokens) > 1:  # as `GlobalBatchNorm1d`, which has no statistics of one row
            for counter in [name for name in self.buffers if name.endswith("num_batches_tracked")]:
                self.buffers[counter] += 1
        gradients = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)  # (K,)
        factors = (max_gradient_norm / (norms + 1e-6)).clamp(max=1.0)  # as `clip_grad_norm_`
        # Reading the factors back would stall a GPU for less than the pass over the gradients costs there.
        if factors.device.type != "cpu" or (factors < 1).any():
            for gradient in gradients.values():
                gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
        for position, (group, rate) in enumerate(zip(self.optimizer.param_groups, learning_rates, strict=True)):
            group["lr"] = rate
            for name, parameter in self.slices[position].items():
                parameter.grad = gradients[name][position]
        self.optimizer.step()
        return losses.detach()

    def inputs(self, tokens: Tensor, scales: Tensor | None, draws: Draws) -> StackInputs:
        """One training batch, with the dropout of each head: heads of one seed and rate drop the same."""
        inputs = StackInputs(tokens, training=True, scales=scales)
        rows, num_tokens, width = tokens.shape
        token_keep = None
        if (self.layer_dropout > 0).any():
            uniform = draws.uniform("layers", (rows, max(self.layers) + 1))
            keep = _keep(uniform, self.layer_dropout[:, None, None])  # (K, B, layers)
            token_keep = keep[..., self.layers].to(self.dtype)  # (K, B, N)
        if self.configs[0].head_type not in ATTENDING_HEADS:
            return replace(inputs, token_keep=token_keep)
        queries, heads = self.head.num_queries, self.head.num_heads
        if (self.attention_dropout > 0).any():
            uniform = draws.uniform("attention", (rows, num_tokens, queries * heads))
            keep = _keep(uniform[:, :, None], self.attention_dropout[:, None])  # (B, N, K, Q * H)
            inputs = replace(inputs, attention_keep=keep.flatten(2).to(self.dtype))
        if token_keep is not None:
            of_probes = token_keep.permute(1, 2, 0).repeat_interleave(queries * heads, dim=2)  # (B, N, K * Q * H)
            kept = inputs.attention_keep
            inputs = replace(inputs, attention_keep=of_probes if kept is None else kept * of_probes)
        if self.configs[0].head_type in MULTI_HEAD_TYPES and (self.projection_dropout > 0).any():
            uniform = draws.uniform("projection", (rows, queries, width))
            keep = _keep(uniform, self.projection_dropout[:, None, None, None])  # (K, B, Q, D)
            inputs = replace(inputs, projection_keep=keep.to(self.dtype))
        return inputs

    def evaluation_inputs(self, tokens: Tensor, scales: Tensor | None) -> StackInputs:
        """One batch without dropout."""
        return StackInputs(tokens, training=False, scales=scales)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def head_state(self, position: int) -> dict[str, Tensor]:
        """The state dict of one head, on the CPU."""
        state = {**self.parameters, **self.buffers}
        return {name: value.detach()[position].cpu().clone() for name, value in state.items()}

    def states(self) -> list[dict[str, Tensor]]:
        """Of each head everything that training goes on from, in the stack's own memory."""
        tensors = {f"parameters/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"buffers/{name}": value for name, value in self.buffers.items()}
        for moment, values in self.moments.items():
            tensors |= {f"{moment}/{name}": value for name, value in values.items()}
        return [{name: value[position] for name, value in tensors.items()} for position in range(len(self))]

    @torch.no_grad()
    def load_states(self, states: Sequence[Mapping[str, Tensor]], step: int) -> None:
        """Go on from what `states` gave after `step` steps."""
        for own, given in zip(self.states(), states, strict=True):
            for name, value in own.items():
                value.copy_(given[name])
        self.attach_optimizer(step)


def first_state(config: LayerFusionConfig, seed: int) -> dict[str, Tensor]:
    """The state dict of the head that a sweep starts from: the same for one shape and seed, whatever the rest."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_member(config).state_dict()
    finally:
        torch.set_default_dtype(before)


def _keep(uniform: Tensor, rates: Tensor) -> Tensor:
    """Dropout as multipliers: 0 with probability `rates`, else one over the rest."""
    # A rate of one would divide by zero, and drops all there is.
    return (uniform >= rates) / (1 - rates).clamp_min(1e-12)


class Draws:
    """Random numbers of one seed and step, the same whoever asks, in whatever order, after however many restarts."""

    def __init__(self, seed: int, step: int, device: torch.device):
        self.seed, self.step, self.device = seed, step, device
        self._uniform: dict[tuple, Tensor] = {}

    def _sequence(self, purpose: str) -> SeedSequence:
        return SeedSequence([self.seed, self.step, *purpose.encode()])

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for each purpose."""
        words = self._sequence(purpose).generate_state(2)
        return torch.Generator(self.device).manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Numbers in [0, 1), drawn once and shared."""
        key = (purpose, shape)
        if key not in self._uniform:
            self._uniform[key] = torch.rand(shape, generator=self.generator(purpose), device=self.device)
        return self._uniform[key]

    def mixture(self, alpha: float, num_rows: int) -> Mixture:
        """How rows are mixed: the same partners for every alpha."""
        partners = torch.randperm(num_rows, generator=self.generator("partners"), device=self.device)
        return Mixture(float(default_rng(self._sequence("mixture")).beta(alpha, alpha)), partners)
