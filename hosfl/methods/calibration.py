"""Running statistics of the client half's normalisations, estimated anew for inputs with another distribution.

Forward passes are enough: Li et al., "Revisiting batch normalization for practical domain adaptation", 2016. A client's
statistics are means over its batches of the batch's mean and unbiased variance, as torch.optim.swa_utils.update_bn
computes them. The run's are the aggregate of the clients'; the spread of the clients' means is not part of the
variances.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hosfl.halves.inputs import Batch, call, evaluating
from hosfl.protocol.aggregate import Aggregation
from hosfl.protocol.messages import MessageError, Statistics


def running(half: nn.Module) -> dict[str, Tensor]:
    """The half's running statistics by their names in its state dict: each normalisation's mean, then its variance."""
    return {
        f"{path}.{name}" if path else name: getattr(norm, name)
        for path, norm in _norms(half).items()
        for name in ("running_mean", "running_var")
    }


def flat(half: nn.Module) -> Tensor:
    """The running statistics concatenated, as messages carry them: a copy, float32 [n] on the CPU; two per channel."""
    return torch.cat([t.detach().float().cpu() for t in running(half).values()])


def load(half: nn.Module, values: Tensor) -> None:
    """Load the statistics of `flat` into a half. Raises MessageError, with nothing changed, if they do not fit."""
    tensors = list(running(half).values())
    sizes = [len(t) for t in tensors]
    check(values, sizes, tensors[0].dtype)
    with torch.no_grad():
        for tensor, part in zip(tensors, values.split(sizes), strict=True):
            tensor.copy_(part)


def initial_half(base: nn.Module, statistics: RunningStatistics | None) -> nn.Module:
    """A copy of the base for a new client: it has the model's statistics until it gets the run's."""
    half = copy.deepcopy(base)
    if statistics is not None:
        load(half, statistics.model)
    return half


def check(values: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> None:
    """Raises MessageError unless values are alternating means and variances of these sizes, finite in the dtype."""
    if len(values) != sum(sizes):
        raise MessageError(f"{len(values)} statistics where normalisations have {sum(sizes)}")
    if not torch.isfinite(values.to(dtype)).all():
        raise MessageError("infinite or NaN statistics")
    if any((variances < 0).any() for variances in values.split(list(sizes))[1::2]):
        raise MessageError("negative variances")


def estimate_statistics(half: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, int]:
    """(statistics of a half on some batches, in the form of `flat`; the number of samples).

    One forward pass per batch, without a graph. Normalisations with running statistics normalise by the batch; all else
    is in eval mode. The half stays as it is.

    Raises ValueError, as BatchNorm does, for a batch of one value per channel.
    """
    norms, samples = list(_norms(half).values()), 0
    sums = [torch.zeros(2, len(norm.running_mean), dtype=torch.float64) for norm in norms]  # type: ignore[arg-type]
    calls = [0] * len(norms)

    def hook_of(number: int) -> Callable[..., None]:
        def add(norm: _NormBase, *_: object) -> None:
            sums[number] += torch.stack([norm.running_mean, norm.running_var]).double().cpu()  # type: ignore[list-item]
            calls[number] += 1

        return add

    with evaluating(half), _batch_statistics(norms):
        hooks = [norm.register_forward_hook(hook_of(number)) for number, norm in enumerate(norms)]
        try:
            for inputs, labels in batches:
                call(half, inputs)
                samples += len(labels)
        finally:
            for hook in hooks:
                hook.remove()
    before = flat(half).split([s.numel() for s in sums])  # for normalisations that were not called
    means = [(s / n).float().flatten() if n else old for s, n, old in zip(sums, calls, before, strict=True)]
    return torch.cat(means), samples


@contextmanager
def _batch_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within the block, running statistics are those of the last batch alone. Restores all but the modules' modes."""
    momenta = [norm.momentum for norm in norms]
    buffers = [b for norm in norms for b in norm.buffers()]
    before = [b.clone() for b in buffers]
    try:
        for norm in norms:
            norm.momentum, norm.training = 1.0, True
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        with torch.no_grad():
            for buffer, was in zip(buffers, before, strict=True):
                buffer.copy_(was)


def _norms(half: nn.Module) -> dict[str, _NormBase]:
    """The modules with running statistics, by name."""
    return {
        name: module
        for name, module in half.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None
    }


@dataclass
class RunningStatistics:
    """The client half's running statistics on the server.

    values: the committed ones, float32 [n]; at first the model's. model: the model's, with which every client begins.
    sizes: of the means and variances of each normalisation. dtype: of the half's statistics. most: the most samples
    that one client's statistics may be of.
    """

    values: Tensor
    model: Tensor
    sizes: Sequence[int]
    dtype: torch.dtype
    most: int

    @classmethod
    def of(cls, half: nn.Module, most: int) -> RunningStatistics:
        """The running statistics of a half that has some."""
        tensors = list(running(half).values())
        return cls(flat(half), flat(half), [len(t) for t in tensors], tensors[0].dtype, most)

    def samples(self, message: Statistics) -> int:
        """The number of samples of a client's statistics. Raises MessageError if they cannot be aggregated."""
        check(message.statistics, self.sizes, self.dtype)
        count = int(message.samples[0]) if len(message.samples) == 1 else 0
        if not 0 < count <= self.most:
            raise MessageError(f"statistics of {message.samples.tolist()} samples: from 1 to {self.most} are possible")
        return count

    def commit(self, found: Sequence[Statistics], aggregation: Aggregation) -> None:
        """Commit the clients' aggregate, weighted by their samples; nothing changes without clients."""
        if found:
            weights = [self.samples(message) for message in found]
            self.values = aggregation([message.statistics for message in found], weights).float()
