"""Checks, by passes of a few samples before the first round, that a task, its data and a split model fit each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hosfl.halves.adapters import refuse_idle_adapters
from hosfl.halves.inputs import Inputs, call, clone_tensors, describe_inputs, evaluating, mask_of, outputs_match
from hosfl.halves.split import SplitModel, dtype_of
from hosfl.tasks.data import Dataset, digest
from hosfl.tasks.items import Items, read
from hosfl.tasks.reading import DataError
from hosfl.tasks.task import Task, TaskError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MISMATCH_ERRORS = (RuntimeError, IndexError, ValueError)  # torch raises them for shapes and classes that do not fit


def check_compatibility(task: Task, model: SplitModel, data: Dataset | Items) -> tuple[tuple[int, ...], Dataset]:
    """Run both halves on a few samples. Returns the shape of one sample's cut, and the samples.

    Raises:
        TaskError: the output or the loss is not a tensor of the right shape.
        ValueError: the client half is not a function of its inputs and weights; the cut has no gradient, or would be
            rounded to the server half's dtype; adapters do nothing.
        DataError: model or loss do not take a data set.
    """
    sample = read(data[torch.arange(min(2, len(data)))])  # a copy; two samples, so that a loss per sample is noticed
    inputs = clone_tensors(sample.inputs)
    before = _weights_state(model.client)
    with evaluating(model):
        with _naming("train", sample.inputs):
            # A copy, since the next pass may write into the same tensor.
            cut = clone_tensors(call(model.client, inputs))
        if _weights_state(model.client) != before:
            raise ValueError(
                "the client half writes its weights in a forward pass, and they are then no longer everybody's: leave"
                " out max_norm of an embedding, and let a layer compute with a copy, such as self.weight.clamp(0)"
            )
        if isinstance(cut, Tensor) and not cut.is_floating_point():
            raise ValueError(
                f"the cut is {cut.dtype}, and both halves learn from a gradient there, which only real numbers have:"
                " cut elsewhere"
            )
        with _naming("train", sample.inputs):
            second_cut, output = call(model.client, inputs), model(clone_tensors(sample.inputs))
        for name, value in (("the cut", cut), ("the output", output)):
            if not isinstance(value, Tensor) or value.shape[:1] != (len(sample),):
                raise TaskError(
                    f"{name} of {len(sample)} samples is {_describe(value)}: a tensor is needed, whose first dimension"
                    " is the samples"
                )
        loss = _loss_of(task, "train", output, sample.labels)
    if not outputs_match(cut, second_cut):
        if digest(inputs) != digest(sample.inputs):
            raise ValueError(
                "the client half writes into its inputs, so that the next pass of a batch sees another: let it compute"
                " on a copy, such as x = x - 1 in place of x -= 1"
            )
        raise ValueError(
            "the client half in eval mode makes two outputs of the same inputs, and it is by such passes that clients"
            " learn: let it draw random numbers in train mode only, and keep nothing from one pass to the next"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(
            f"the loss of a batch is {_describe(loss)}: a tensor of one element, the mean over the batch, is needed"
        )
    _refuse_sum(task, output, sample.labels, loss)
    _check_dtype(model, sample.inputs, cut, output)
    refuse_idle_adapters(model.client, sample.inputs)
    task.check_default_metric(output, sample.labels)
    shape = tuple(cut.shape[1:])
    _check_mask(sample, cut)
    if (short := _shortest(task, data, sample)).length < sample.length:  # a batch may consist of short texts
        try:
            cut = _try_samples(task, model, "train", short)
        except DataError as error:
            if short.labels.shape[1:2] != (sample.length,):
                raise
            raise DataError(f"{error}; is there a label for each token? Then give the task ignore_index") from error
        _check_mask(short, cut)
    _check_sets(task, model, sample.labels.device)
    _check_integers(task, model, sample.labels.device)
    return shape, sample


def _weights_state(half: nn.Module) -> list[Any]:
    """Return a list that changes when weights are written or replaced: versions, addresses, and a digest of all values.

    The digest is for writes that do not increment a tensor's version.
    """
    weights = list(half.parameters())
    return [digest(weights), *((p._version, p.data_ptr()) for p in weights)]


def _refuse_sum(task: Task, output: Tensor, labels: Tensor, loss: Tensor) -> None:
    """Raises TaskError for a loss that is the sum over the batch: of every sample three times it is three times it."""
    with torch.no_grad():
        repeated = _loss_of(task, "train", torch.cat([output] * 3), torch.cat([labels] * 3))
    once, thrice = float(loss), float(repeated)
    if once and math.isclose(thrice, 3 * once, rel_tol=1e-3):
        raise TaskError(
            f"the loss of a batch is a sum: with every sample three times it is {thrice:g}, and with each once"
            f' {once:g}. The mean over the batch is needed, such as with reduction="mean"'
        )


def _check_integers(task: Task, model: SplitModel, device: torch.device) -> None:
    """Raises DataError for a data set in memory with integers that the model does not take, such as unknown tokens.

    Tries the samples with the smallest and the largest number of each input of integers. Of the clients' data sets it
    tries those whose numbers lie outside the range so far.
    """
    tried: dict[str, tuple[int, int]] = {}
    for name, data in task.sets():
        if not isinstance(data, Dataset):
            continue
        inputs, chosen = data.inputs if isinstance(data.inputs, Mapping) else {"": data.inputs}, []
        for key, values in inputs.items():
            if values.dtype not in INTEGERS or not values.numel():
                continue
            rows = values.reshape(len(data), -1)
            (low, first), (high, last) = (map(int, end) for end in (rows.amin(1).min(0), rows.amax(1).max(0)))
            lowest, highest = tried.get(key, (low + 1, high))
            if name in ("test", "validation") or low < lowest or high > highest:
                tried[key] = min(lowest, low), max(highest, high)
                chosen += [first, last]
        if chosen:
            _try_samples(task, model, name, read(data[torch.tensor(chosen)].to(device, dtype_of(model.client))))


def _check_sets(task: Task, model: SplitModel, device: torch.device) -> None:
    """Raises DataError for a data set with labels that model and loss do not take, such as a class without an output.

    Tries the samples with the smallest and the largest label, or the first two if not all labels are in memory. Of the
    clients' data sets it tries the first, and those whose labels lie outside the range so far.
    """
    lowest, highest = math.inf, -math.inf
    for name, data in task.sets():
        low, high, chosen = lowest, highest, torch.arange(min(2, len(data)))
        if isinstance(data, Dataset) and data.labels.numel():
            rows = data.labels.reshape(len(data), -1)
            # Without labels that the loss ignores: they are often negative, and no class.
            lows = rows if task.ignore_index is None else rows.masked_fill(rows == task.ignore_index, int(rows.max()))
            (low, first), (high, last) = (map(float, end) for end in (lows.amin(1).min(0), rows.amax(1).max(0)))
            chosen = torch.tensor([int(first), int(last)])
        if name in ("test", "validation") or low < lowest or high > highest:
            lowest, highest = min(lowest, low), max(highest, high)
            _try_samples(task, model, name, read(data[chosen].to(device, dtype_of(model.client))))


def _try_samples(task: Task, model: SplitModel, name: str, sample: Dataset) -> Tensor:
    """Return the cut of samples. Raises DataError if model or loss do not take them. name: the data set's."""
    with evaluating(model):
        with _naming(name, sample.inputs):
            cut: Tensor = call(model.client, clone_tensors(sample.inputs))
            output = model(clone_tensors(sample.inputs))
        _loss_of(task, name, output, sample.labels)
    return cut


@contextmanager
def _naming(name: str, inputs: Inputs) -> Iterator[None]:
    """Context manager: of errors about inputs that do not fit the model, make DataErrors with the data set's name."""
    try:
        yield
    except (*MISMATCH_ERRORS, TypeError) as error:  # TypeError: of names that are no arguments of the half
        samples = describe_inputs(inputs) + _ranges(inputs)
        raise DataError(f"{name}: the model does not take samples of {samples} ({_first_line(error)})") from error


def _loss_of(task: Task, name: str, output: Tensor, labels: Tensor) -> Any:
    """Return the task's loss. Raises DataError if it does not take the labels. name: the data set's."""
    try:
        loss = task.loss(output, labels)
        if isinstance(loss, Tensor):
            loss.tolist()  # waits for a GPU, which reports a class without an output only then
    except MISMATCH_ERRORS as error:
        limits = f" from {labels.min():g} to {labels.max():g}" if labels.numel() else ""
        raise DataError(
            f"{name}: the loss does not take labels {tuple(labels.shape)}{limits} with outputs {tuple(output.shape)}"
            f" ({_first_line(error)})"
        ) from error
    return loss


def _ranges(inputs: Inputs) -> str:
    """The ranges of inputs of integers, for error messages: ", from 0 to 20"."""
    integers = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dtype in INTEGERS and x.numel()]
    return "".join(f", from {x.min():g} to {x.max():g}" for x in integers)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _shortest(task: Task, data: Dataset | Items, sample: Dataset) -> Dataset:
    """Return the two shortest texts of the data, without padding; `sample` if the data's lengths are unknown."""
    if isinstance(data, Dataset):
        order = data.lengths.argsort(stable=True)
        order = order[data.lengths[order] > 0][:2]
        sample = data[order] if len(order) else sample
    return sample.trimmed(task.per_token)


def _check_mask(sample: Dataset, cut: Tensor) -> None:
    """Raises TaskError for an attention mask without a value for every position of the cut."""
    mask = mask_of(sample.inputs)
    if mask is not None and mask.shape != cut.shape[:2]:
        raise TaskError(
            f"the cut of {len(sample)} samples is {_describe(cut)}, and their attention_mask {_describe(mask)}: the"
            " server half gets the mask beside the cut, so that their first two dimensions must be the same. Cut the"
            " model earlier; or, where the client half pools its tokens, give the mask another name"
        )


def _check_dtype(model: SplitModel, inputs: Inputs, cut: Tensor, output: Tensor) -> None:
    """Raises ValueError if rounding the cut to the server half's dtype, as a run does, changes the output."""
    dtype = dtype_of(model.server)
    if torch.finfo(cut.dtype).bits <= torch.finfo(dtype).bits:
        return
    with evaluating(model):
        try:
            unrounded = SplitModel(model.client, model.server)(clone_tensors(inputs))
        except (RuntimeError, TypeError, ValueError):  # such as for a product of two dtypes
            return
    if not outputs_match(unrounded, output):
        raise ValueError(
            f"the cut is {cut.dtype}, and the first weights of the server half are {dtype}, to which a run would round"
            f" it: that makes another output. Cut elsewhere, or make the server half {cut.dtype}"
        )


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
