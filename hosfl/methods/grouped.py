"""A server whose half takes the cuts of several clients in one pass: fewer and larger operations for small cuts.

The sum of the clients' own losses, each times the client's share of the aggregate, is backpropagated once. Its gradient
is the aggregate of the half; its gradient for a client's cut is that client's share times its multiplier.

Groups are the step's cuts in their order, whoever came first, so that they and the dropout in them are a function of
the run, like the sum of a step's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import evaluating
from hosfl.halves.split import dtype_of
from hosfl.methods.gathered import SHARES, RunningMean
from hosfl.methods.server import Server, copy_cut, refusing_failures
from hosfl.methods.tensors import all_true, usable
from hosfl.protocol.messages import Cut, Message, MessageError

TRIED = 4  # samples that a half is tried with


@dataclass
class GroupedServer(Server):
    """A `Server` that passes the cuts of several clients through the half together, up to `most` samples in a pass.

    These go one by one: a larger cut, texts of unequal length where the half does not ignore padding, and all cuts of a
    run's first step. Activations are kept for all samples of a pass.

    Multipliers, losses and the step are those of one cut after another within float32, and other numbers where the half
    has dropout. Where anything in a pass is infinite or NaN its cuts are learnt from one after another, so that those
    alone are refused that would have been; the others differ by rounding, and by dropout, from what they would be
    without these.

    Raises ValueError for a half whose samples affect each other, such as one with BatchNorm, or whose buffers move; for
    an aggregation that needs each client's gradient by itself; and for clipping, which needs its length.
    """

    most: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation not in SHARES or self.clip is not None:
            raise ValueError(
                "server_batch adds the clients' gradients up in one pass, and a median, a trimmed mean and server_clip"
                " need each by itself: leave out server_batch"
            )
        self._group: list[Cut] = []
        self._check_independent_samples()
        self._may_pad = self.cuts.masked and self._ignores_padding()

    def begin(self, round: int) -> None:
        super().begin(round)
        self._group = []

    def learn(self, message: Message) -> None:
        """Learn from one cut once its group is complete, or refuse it now or then."""
        with self._refusing(message):
            cut = self._check_cut(self._round, message)
            if any(waiting.client == cut.client for waiting in self._group):
                raise MessageError("a second cut in one round")
            if not self._fits_group(cut):
                self._learn_group()
            self._group.append(cut)

    def learnt_from(self) -> list[int]:
        self._learn_group()
        return super().learnt_from()

    def end(self) -> tuple[dict[int, Message], float]:
        self._learn_group()
        return super().end()

    def _fits_group(self, cut: Cut) -> bool:
        """Whether a cut may join the group: of equal sample shape unless padded, and within `most` samples."""
        alike = self._may_pad or all(waiting.cut.shape[1:] == cut.cut.shape[1:] for waiting in self._group)
        return alike and sum(len(waiting.labels) for waiting in self._group) + len(cut.labels) <= self.most

    def _learn_group(self) -> None:
        """Learn from the group's cuts: in one pass, or one by one where that fails."""
        group, self._group = self._group, []
        if len(group) > 1 and self._outliers.ready:  # the first step is held to the lengths of each client's gradient
            try:
                with self._dropout(), refusing_failures():
                    multipliers, losses = self._backward_together(group)
            except MessageError:
                pass  # and nothing was changed: one after another shows whose cut it is
            else:
                for cut, multiplier, loss in zip(group, multipliers, losses, strict=True):
                    self._record_cut(cut, self._multiplier(self._round, cut.client, multiplier), loss)
                return
        for cut in group:
            with self._refusing(cut):
                self._learn_checked(cut)

    def _backward_together(self, cuts: Sequence[Cut]) -> tuple[list[Tensor], list[float]]:
        """Each cut's multiplier and loss; adds the half's gradients to what is gathered.

        Raises where the half or the loss cannot take them, and MessageError where anything is infinite or NaN; then all
        is as before.
        """
        assert isinstance(self._gathered, RunningMean)
        device, dtype = next(self.half.parameters()).device, dtype_of(self.half)
        sizes, labels = [len(c.labels) for c in cuts], [c.labels for c in cuts]
        shares = [self._gathered.share(size / self.cuts.batch) for size in sizes]
        if self._may_pad and self.cuts.ignore_index is not None:  # labels are one for each token
            labels = _padded(labels, self.cuts.ignore_index)
        pad = _padded if self._may_pad else list
        # One copy to the device for all, and one leaf of the graph.
        cut = torch.cat(pad([c.cut for c in cuts])).to(device).requires_grad_()
        masks = self._masks(torch.cat(pad([c.mask for c in cuts]))) if self.cuts.masked else {}
        output = self.half(copy_cut(cut, dtype), **masks)
        own = [self.loss(o, self._labels(x)) for o, x in zip(output.split(sizes), labels, strict=True)]
        losses = torch.stack([loss.reshape(()) for loss in own])
        self.passes["server forward"] += len(cut)
        self.passes["server backward"] += len(cut)
        total = (losses * losses.new_tensor(shares)).sum()
        weights = torch.tensor([share / size for share, size in zip(shares, sizes, strict=True)])
        found, *gradients = self._gradients(total, output, cut, weights.repeat_interleave(torch.tensor(sizes)))
        multipliers = [m / share for m, share in zip(found.split(sizes), shares, strict=True)]
        if not (all_true(torch.isfinite(t).all() for t in (losses, *multipliers)) and usable(gradients)):
            raise MessageError("cuts of which a loss or a gradient is infinite or NaN, or too long")
        self._gathered.add_sum(gradients, sum(shares))
        if self._may_pad:
            multipliers = [m[:, : c.cut.shape[1]] for m, c in zip(multipliers, cuts, strict=True)]
        return [m.to(c.cut.dtype) for m, c in zip(multipliers, cuts, strict=True)], losses.detach().tolist()

    def _check_independent_samples(self) -> None:
        """Raise ValueError if samples affect each other in the half in train mode, or its buffers change.

        Tested by a forward and backward pass, since types do not tell: BatchNorm kept in eval mode mixes nothing.
        """
        cuts, masks = self._random_cuts(TRIED)
        modes = [(module, module.training) for module in self.half.modules()]
        buffers = [*self.half.buffers()]
        before = [b.detach().clone() for b in buffers]
        cuts.requires_grad_()
        self.half.train()
        with self._dropout():
            output = self.half(copy_cut(cuts, cuts.dtype), **self._masks(masks))[0]
            (gradient,) = torch.autograd.grad((output * torch.rand_like(output)).sum(), cuts)
        for module, training in modes:
            module.training = training
        still = all_true((b == was).all() for b, was in zip(buffers, before, strict=True))
        if gradient[1:].any() or not still:
            raise ValueError(
                "server_batch puts several clients' cuts through the server half in one pass, and in this half samples"
                " affect each other or move buffers, as with BatchNorm: leave out server_batch"
            )

    def _ignores_padding(self) -> bool:
        """Whether the half's outputs are the same for texts padded at their end, with zeros in the mask there.

        They are not where an output's size grows with the text, such as the logits of where an answer begins.
        """
        longest = self.cuts.shape[0]
        cuts, masks = self._random_cuts(TRIED)
        some = max(1, longest // 2)
        masks[:, some:] = 0
        with evaluating(self.half):
            whole = self.half(copy_cut(cuts, cuts.dtype), **self._masks(masks))
            alone = self.half(copy_cut(cuts[:, :some], cuts.dtype), **self._masks(masks[:, :some]))
        if self.cuts.ignore_index is not None:  # the loss counts no output there
            whole = whole[:, :some]
        return whole.shape == alone.shape and bool((whole - alone).abs().max() <= 0.01 * alone.abs().max())

    def _random_cuts(self, samples: int) -> tuple[Tensor, Tensor]:
        """Random cuts of full length in [0, 1), and masks of ones; the same in every run of a seed."""
        random = torch.Generator().manual_seed(self.seed % 2**63)
        cuts = torch.rand(samples, *self.cuts.shape, generator=random)
        parameter = next(self.half.parameters())
        return cuts.to(parameter.device, dtype_of(self.half)), torch.ones(samples, *self.cuts.shape[:1])


def _padded(texts: Sequence[Tensor], value: float = 0) -> list[Tensor]:
    """Pad tensors [n, length, ...] with `value` at the end to the longest length."""
    longest = max(x.shape[1] for x in texts)
    return [nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]), value=value) for x in texts]
