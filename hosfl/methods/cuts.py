"""The specification of a run's cuts and labels, against which the server checks what clients send."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hosfl.methods.travel import unpacked
from hosfl.protocol.messages import Cut, MessageError


@dataclass(frozen=True)
class CutSpec:
    """The cuts and labels that the server of a run accepts.

    Args:
        shape: of one sample's cut, without the batch; of texts, of the longest.
        classes: labels are integers below it; None: any will do.
        batch: the most samples that one client sends.
        masked: whether the half takes an attention mask beside the cut. Texts may then be shorter than the longest.
        label_shape: of one sample's labels, without the batch.
        real: whether labels are floating-point numbers.
        ignore_index: a label that the loss ignores, such as -100 in torch's cross_entropy; there is then one label for
            each token. None: every label counts.
        wire: dtype of cuts and multipliers on the wire: "float32", "bfloat16", "float16" or "int8".
    """

    shape: tuple[int, ...]
    classes: int | None
    batch: int
    masked: bool = False
    label_shape: tuple[int, ...] = ()
    real: bool = False
    ignore_index: int | None = None
    wire: str = "float32"

    @property
    def elements(self) -> int:
        """The elements of the largest cut."""
        return self.batch * torch.Size(self.shape).numel()

    @property
    def largest(self) -> int:
        """The bytes of the largest cut's arrays, four for each number: cut, labels and mask."""
        numbers = self.elements + self.batch * torch.Size(self.label_shape).numel()
        return 4 * (numbers + (self.batch * self.shape[0] if self.masked else 0))

    def check(self, message: Cut) -> Cut:
        """The message with its cut unpacked. Raises MessageError for one that cannot be learnt from."""
        shape, labels = tuple(message.cut.shape), message.labels
        sample, label, classes = shape[1:], self.label_shape, self.classes
        if self.masked and sample[:1] and 0 < sample[0] < self.shape[0]:  # its texts are shorter than the longest
            sample = self.shape[:1] + sample[1:]
            if self.ignore_index is not None:  # one for each token
                label = shape[1:2] + label[1:]
            elif label and classes == self.shape[0]:  # labels are places in a text
                classes = shape[1]
        right = sample == self.shape and tuple(labels.shape) == shape[:1] + label
        if not shape or not right or not len(labels):
            raise MessageError(f"a cut of shape {shape}, labels {tuple(labels.shape)}; samples are {self.shape}")
        if len(labels) > self.batch:
            raise MessageError(f"{len(labels)} samples; the most is {self.batch}")
        if labels.is_floating_point() != self.real:
            takes = "floating-point numbers" if self.real else "integers"
            raise MessageError(f"labels that are {labels.dtype}; this run's are {takes}")
        if not torch.isfinite(labels).all():
            raise MessageError("infinite or NaN labels")
        if self.ignore_index is not None:
            labels = labels[labels != self.ignore_index]
            if not len(labels):
                raise MessageError(f"a cut whose labels are all {self.ignore_index}: there is nothing to learn from it")
        if classes is not None and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            raise MessageError(f"labels from {int(labels.min())} to {int(labels.max())} for {classes} classes")
        message = replace(message, cut=unpacked(message.cut, message.scales, self.wire))
        if not torch.isfinite(message.cut).all():
            raise MessageError("infinite or NaN elements in the cut")
        expected = shape[:2] if self.masked else (0, 0)
        if tuple(message.mask.shape) != expected:
            raise MessageError(f"a mask of shape {tuple(message.mask.shape)}, not {expected}")
        if not ((message.mask == 0) | (message.mask == 1)).all():
            raise MessageError("a mask with other numbers than 0 and 1")
        return message
