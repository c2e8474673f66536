"""Several heads of one shape as one head, whose logits are the mean of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import initialization as init

from ..errors import LayerFusionError


class EnsembleHead(nn.Module):
    """The mean of the logits, and of the attention weights, of K heads that were trained apart.

    An ensemble of networks that differ in nothing but their first weights and the order of the batches is the one of
    arXiv 1612.01474, which averages probabilities. Its tensors are those of the K members with a leading axis K, under
    the same names. It is not trained as a whole: `sweep` trains the members.

    Args:
        member: a head of the members' shape, with `reset_parameters` and `forward(tokens, True, ...)`, which gives
            `(logits, attentions)`. Its values are not used.
        num_members: K.
    """

    def __init__(self, member: nn.Module, num_members: int):
        super().__init__()
        self.num_members = num_members
        # In a tuple, so that it is no part of this module; it holds no memory.
        self._member = (deepcopy(member).to("meta").eval(),)
        for name, parameter in member.named_parameters():
            self._own(name).register_parameter(_leaf(name), nn.Parameter(_repeated(parameter, num_members)))
        for name, buffer in member.named_buffers():
            self._own(name).register_buffer(_leaf(name), _repeated(buffer, num_members))
        self.reset_parameters()

    def _own(self, name: str) -> nn.Module:
        """The part of this module that holds a tensor of this name."""
        module: nn.Module = self
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    @property
    def member(self) -> nn.Module:
        """A head of the members' shape, without values."""
        return self._member[0]

    @property
    def implementation(self) -> str:
        """`"fast"` or `"explicit"`, of all members."""
        return str(self.member.implementation)

    @implementation.setter
    def implementation(self, value: str) -> None:
        setattr(self.member, "implementation", value)  # noqa: B010 (`nn.Module` declares no such attribute)

    def reset_parameters(self) -> None:
        """First values of its own for every member."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        states = []
        for _ in range(self.num_members):
            member: Any = deepcopy(self.member).to_empty(device="cpu")
            member.reset_parameters()
            states.append(member.state_dict())
        stacked = stack_members(states)
        for name, tensor in self.state_dict(keep_vars=True).items():
            init.copy_(tensor, stacked[name])

    def forward(
        self, tokens: Tensor, output_attentions: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify a batch of banks.

        Args:
            tokens: `(B, N, D)`.
            output_attentions: also return the mean attention weights `(B, Q, H, N)`.
            options: of the members' forward.

        Returns:
            Logits `(B, C)`, or `(logits, attentions)`.

        Raises:
            LayerFusionError: in training mode.
        """
        if self.training:
            raise LayerFusionError(
                f"the {self.num_members} members of an ensemble are trained apart, each on batches of its own: use sweep "
                "(layerfusion sweep, or train --sweep), or train a single head with num_members=1"
            )
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        outputs = []
        for number in range(self.num_members):
            values = {name: tensor[number] for name, tensor in tensors.items()}
            outputs.append(functional_call(self.member, values, (tokens, True), options))
        logits, attentions = (torch.stack(parts).mean(dim=0) for parts in zip(*outputs, strict=True))
        return (logits, attentions) if output_attentions else logits


def stack_members(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict of an [`EnsembleHead`] of heads with these state dicts."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _repeated(tensor: Tensor, num_members: int) -> Tensor:
    return tensor.new_empty(num_members, *tensor.shape)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
