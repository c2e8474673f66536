"""BatchNorm whose training statistics span all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce with a gradient: every process's loss depends on every process's term."""

    @staticmethod
    def forward(ctx: Any, term: Tensor) -> Tensor:
        total = term.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over `(B, D)` that sees the global batch under data parallel training, on any device.

    Two processes with half a batch each then train the same head as one process with all of it;
    `nn.SyncBatchNorm` does this on GPUs only. A training batch of one row, such as the rest of an epoch, is normalised
    with the running statistics, since it has no variance of its own.
    """

    # Always there: this norm tracks running statistics, with a fixed momentum.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            if self.training and input.shape[0] == 1:
                return F.batch_norm(
                    input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
                )
            return super().forward(input)
        wide = input if input.dtype == torch.float64 else input.float()
        count = wide.new_full((1,), wide.shape[0])
        total = _SumOverProcesses.apply(torch.cat([wide.sum(dim=0), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        variance = _SumOverProcesses.apply((wide - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        normalised = (wide - mean) * (variance + self.eps).rsqrt()
        return (normalised * self.weight + self.bias).to(input.dtype)
