"""`Task`: a model to split, data, a loss and scores. Built-in tasks and users' tasks are made in the same way."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.split import SplitModel, dtype_of, split
from hosfl.settings import Rates, Settings
from hosfl.tasks.data import Dataset, Splits, digest
from hosfl.tasks.items import Items, as_dataset, as_datasets, as_inputs, global_seed, read
from hosfl.tasks.reading import DataError

Scores = dict[str, float]
Model = nn.Module | tuple[nn.Module, nn.Module] | Callable[..., Any]


def adamw(half: nn.Module, decay: float) -> torch.optim.Optimizer:
    """Make the default optimizer of the server half."""
    return torch.optim.AdamW(half.parameters(), betas=(0.9, 0.99), weight_decay=decay)


class TaskError(TypeError):
    """An argument of a task, or the result of one of its functions, has the wrong type; says what is needed."""


@dataclass(frozen=True)
class Task:
    """A model and where to cut it, data, a loss and metrics. `hosfl.train(task, ...)` trains it.

        task = hosfl.Task(
            model=lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)),
            at=2,
            train=(x[:500], y[:500]),  # float32 [500, 16], int64 [500]
            test=(x[500:], y[500:]),
            loss=nn.functional.cross_entropy,
        )

    Args:
        model: a module, which is copied and cut at `at`; two halves, as `hosfl.split` returns them or as a pair, where
            shared weights become two copies; or a function without arguments that returns a new one of these each time.
            It is called under the run's seed, so that runs with other seeds start from other weights.
        train: a pair of arrays or tensors (inputs, labels), a mapping of them with "labels" among its names, a torch
            `Dataset`, or a Hugging Face data set; or a list of these, one for each client. Labels are integers within
            int32 or floating-point numbers, [samples, ...]; all samples have one shape. Data sets with numbered items
            are read batch by batch, and once for all labels where they are divided by class.
        test: likewise, one.
        loss: (outputs, labels) -> the mean loss over the batch, a tensor of one element.
        at: where to cut a whole model: see `hosfl.split`.
        validation: likewise, for choosing rates; may be left out.
        metrics: name -> (outputs, labels) of the whole set -> a number; tables show the first. None: accuracy where
            labels are classes, else the negative loss, as "score". A metric may also be an object with reset(),
            update(outputs, labels) for every batch, and compute(), such as torchmetrics'; if all are, the outputs of
            the whole set are never in memory together.
        lower_is_better: names of scores that studies minimise, such as errors. Metrics whose `higher_is_better` is
            False, as in torchmetrics, need no mention.
        optimizer: (server half, weight decay) -> its optimizer; default: AdamW with betas 0.9 and 0.99. The run sets
            its rate; of several groups the largest gets the run's, and the ratios between them stay.
        classes: all labels are below it, which the server checks; None: no check.
        ignore_index: a label that the loss ignores, as in torch's cross_entropy. Labels are then one for each token,
            [samples, length], and end with their text; the loss is the mean over those that count. None: all count.
        groups: int [training samples], by which `partition` "dirichlet" divides data; None: by labels.
        public: about a hundred unlabelled samples that are no client's and no secret, as inputs like those of `train`;
            adapters "act:..." are made from them. None: there are none, and "act" is refused.
        rates: (server rate, client rate) or (server rate, client rate, weight decay), by a method's name or by
            `Method.tuned`.
        scores: in place of metrics, (outputs, data set) -> scores by name, where a score needs more than labels.
        generated: further scores, (the halves in eval mode, data set) -> scores by name, of what a model writes.

    Raises:
        DataError: data that are none; it is a ValueError.
        TaskError: an argument of another kind than is needed; it is a TypeError.
        ValueError: arguments that do not go together.
    """

    model: Model
    train: Any
    test: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    at: int | str | None = None
    validation: Any = None
    metrics: Mapping[str, Any] | None = None
    lower_is_better: Sequence[str] = ()
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw
    classes: int | None = None
    ignore_index: int | None = None
    groups: Any = None
    public: Any = None
    rates: Mapping[Any, tuple[float, ...]] = field(default_factory=dict)
    scores: Callable[[Tensor, Dataset], Scores] | None = None
    generated: Callable[[SplitModel, Any], Scores] | None = None
    _last_model: list[weakref.ref[nn.Module]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("train", as_datasets(self.train, "train"))
        put("test", as_dataset(self.test, "test"))
        if self.validation is not None:
            put("validation", as_dataset(self.validation, "validation"))
        if self.public is not None:
            put("public", as_inputs(self.public, "public"))
        if not callable(self.model) and not isinstance(self.model, tuple):
            raise TaskError(f"model is a {type(self.model).__name__}: a module, two halves or a function is needed")
        for name, arguments in (("loss", "outputs and labels"), ("optimizer", "a half and its weight decay")):
            if not callable(value := getattr(self, name)):
                raise TaskError(f"{name} is a {type(value).__name__}: a function of {arguments} is needed")
        _check_metrics(self)
        _check_lower_is_better(self)
        for key, tuned in _require_mapping(self.rates, "rates", "rates by a method's name").items():
            _check_rates(key, tuned)
        if self.classes is not None:
            for name, data in self.sets():
                _check_classes(name, data, self.classes, self.ignore_index)
        if self.groups is not None:
            put("groups", self._checked_groups())

    def with_public(self, count: int) -> Task:
        """Return the task with `count` training samples, evenly spread and without labels, as its public samples.

        They are no training samples any more. 0: the task as it is. Raises ValueError if the data are already divided
        over clients, or no training sample would be left.
        """
        if not count:
            return self
        if isinstance(self.train, list):
            raise ValueError(
                "public samples cannot be set aside of clients' own data: give the task some, Task(public=...)"
            )
        if count >= len(self.train):
            raise ValueError(f"public = {count} leaves none of {len(self.train)} training samples: set fewer aside")
        chosen = torch.arange(count) * len(self.train) // count
        rest = torch.ones(len(self.train), dtype=torch.bool).index_fill(0, chosen, False).nonzero().flatten()
        public = read(self.train[chosen]).trimmed(self.per_token).inputs
        groups = None if self.groups is None else self.groups[rest]
        return replace(self, train=self.train[rest], public=public, groups=groups)

    def sets(self) -> Iterator[tuple[str, Dataset | Items]]:
        """Yield (name for errors, data set) for every data set; where each client has its own, for each of these."""
        sets = self.train if isinstance(self.train, list) else [self.train]
        yield from (("train" if len(sets) == 1 else f"train of client {n}", data) for n, data in enumerate(sets))
        yield "test", self.test
        if self.validation is not None:
            yield "validation", self.validation

    def _checked_groups(self) -> Tensor:
        if isinstance(self.train, list):
            raise ValueError("groups say how train is divided, and a list of sets is divided already: leave out groups")
        try:
            groups = torch.as_tensor(self.groups)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"groups: no array of integers ({error}): number them") from None
        if groups.shape != (len(self.train),) or groups.is_floating_point() or groups.is_complex():
            raise DataError(
                f"groups of shape {tuple(groups.shape)}, {groups.dtype}: one integer for each training sample is needed"
            )
        return groups

    @classmethod
    def of(cls, data: Splits | Dataset | Items, **arguments: Any) -> Task:
        """Make a task of checked data, see `Splits`; or of one client's own samples, which then are every part."""
        if not isinstance(data, Splits):
            return cls(train=data, test=data, **arguments)
        return cls(train=data.train, validation=data.validation, test=data.test, **arguments)

    def data(self, part: str) -> Dataset | Items:
        """Return the data set "test" or "validation". Raises ValueError if there is none."""
        data: Dataset | Items | None = getattr(self, part)
        if data is None:
            raise ValueError(f"the task has no {part} data: give some, or choose another evaluate_on")
        return data

    def halves(self, seed: int, at: str = "") -> SplitModel:
        """Make the model and split it. seed: of the random numbers in making it. at: where to cut; "": the task's `at`.

        Raises what `hosfl.split` raises; ValueError if no place to cut is known; TaskError for what is no model.
        """
        with global_seed(seed):
            is_module = isinstance(self.model, (nn.Module, tuple))  # a module is callable as well
            model: Any = copy.deepcopy(self.model) if is_module else self._call_model()
            if isinstance(model, tuple) and len(model) == 2 and all(isinstance(half, nn.Module) for half in model):
                model = SplitModel(*model)
            if isinstance(model, nn.Module):
                _check_has_weights(model)
            if isinstance(model, SplitModel):
                if at or self.at is not None:
                    raise ValueError(f"the task's model is cut already: leave out at = {at or self.at!r}")
                return _untie(model)
            if not isinstance(model, nn.Module):
                raise TaskError(f"the task's model is a {type(model).__name__}: a module or two halves are needed")
            place = (int(at) if at.isdecimal() else at) if at else self.at
            if place is None:
                raise ValueError("where is the model to be cut? Give the task at=, such as a layer's name or number")
            first = self.train[0] if isinstance(self.train, list) else self.train
            return split(model, place, example=read(first[:2].to("cpu", dtype_of(model))).inputs)

    def _call_model(self) -> Any:
        """Call the function `model`. Raises ValueError for the same module again: a run has changed its weights."""
        assert callable(self.model)
        model: Any = self.model()
        first = model[0] if isinstance(model, tuple) and model else model
        if isinstance(first, nn.Module):
            if self._last_model and self._last_model[0]() is first:
                raise ValueError(
                    "the task's function gives the same module again, which a run has changed: let it make a new one,"
                    " or give the module itself, which is copied"
                )
            self._last_model[:] = [weakref.ref(first)]
        return model

    @property
    def per_token(self) -> bool:
        """Whether there is a label for each token."""
        return self.ignore_index is not None

    def count_terms(self, labels: Tensor) -> int:
        """Return the number of terms whose mean is a batch's loss: of samples, or of labels that are not ignored."""
        return len(labels) if self.ignore_index is None else int((labels != self.ignore_index).sum())

    def reset_streaming_metrics(self, labels: Tensor) -> list[Any]:
        """Reset the metrics that take one batch after another, and return them. labels: of any samples."""
        metrics = [metric for metric in self._metrics(labels).values() if _is_streaming_metric(metric)]
        for metric in metrics:
            metric.reset()
        return metrics

    def keeps_outputs(self, labels: Tensor) -> bool:
        """Whether any score needs the outputs of the whole data set at once. labels: of any samples."""
        return self.scores is not None or not all(map(_is_streaming_metric, self._metrics(labels).values()))

    def score(self, outputs: Tensor, data: Dataset, loss: float) -> Scores:
        """Return the scores of a data set, by name. The streaming metrics must have seen all its batches.

        outputs: of the whole set, or empty unless `keeps_outputs`. loss: the set's mean loss.
        """
        if self.scores is not None:
            scores = self.scores(outputs, data)
            if not isinstance(scores, Mapping) or not scores:
                raise TaskError(f"the task's scores are {scores!r}: numbers by name are needed")
            return {name: _as_number(value, name) for name, value in scores.items()}
        metrics = self._metrics(data.labels)
        if not metrics and self.generated is None:
            return {"score": -loss}
        return {
            name: _as_number(metric.compute() if _is_streaming_metric(metric) else metric(outputs, data.labels), name)
            for name, metric in metrics.items()
        }

    def _metrics(self, labels: Tensor) -> Mapping[str, Any]:
        if self.metrics is not None:
            return self.metrics
        return {} if labels.is_floating_point() or labels.dim() > 1 else {"accuracy": accuracy}

    def check_default_metric(self, outputs: Tensor, labels: Tensor) -> None:
        """Raises TaskError if the default metric, accuracy, does not fit these outputs."""
        default = self.metrics is None and self.scores is None and "accuracy" in self._metrics(labels)
        if default and not (outputs.dim() == 2 and outputs.shape[1] > 1):
            raise TaskError(
                f"labels that are integers are scored by the accuracy, for which {len(labels)} samples need outputs"
                f" ({len(labels)}, classes), and not {tuple(outputs.shape)}: give metrics=, or real labels"
            )

    def select_lower_is_better(self, scores: Iterable[str]) -> list[str]:
        """Return those of these scores' names whose values are better when lower.

        Raises TaskError for a name in `lower_is_better` that no score has.
        """
        names = list(scores)
        _check_known_scores(self.lower_is_better, names)
        by_metric = [
            name for name, metric in (self.metrics or {}).items() if getattr(metric, "higher_is_better", None) is False
        ]
        return [name for name in names if name in self.lower_is_better or name in by_metric]

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of the data and of `groups`, but not of where the data lie.

        Of a set that is read item by item it covers the length and up to 1,024 items: see `Items.digest`.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return digest({"splits": parts, "groups": self.groups})

    def rates_of(self, key: tuple[str, ...], settings: Settings) -> Rates:
        """Return the rates of the settings, or else the task's. Raises ValueError if there are neither.

        key: `Method.tuned`; `rates` may have it, or its first part alone. A method without a client rate has the key
        ("frozen",).
        """
        return lookup_rates(self.rates, key, settings)


def lookup_rates(rates: Mapping[Any, tuple[float, ...]], key: tuple[str, ...], settings: Settings) -> Rates:
    """Return what `Task.rates_of` returns for these rates."""
    rate, frozen = rates.get(key, rates.get(key[0])), key == ("frozen",)
    if rate is None:
        client_rate = 1.0 if frozen else settings.client_rate
        if not settings.server_rate or not client_rate:
            needed = "server_rate" if frozen else "server_rate and client_rate"
            known = f", only for {', '.join(map(str, rates))}" if rates else ""
            raise ValueError(f"no rates are tuned for {' '.join(key)}{known}: give {needed}")
        rate = (settings.server_rate, client_rate, 0.0)
    tuned = Rates(*rate, *(0.0,) * (3 - len(rate)))
    return Rates(
        server=settings.server_rate or tuned.server,
        client=settings.client_rate or tuned.client,
        decay=tuned.decay if settings.server_decay is None else settings.server_decay,
    )


def _check_has_weights(model: nn.Module) -> None:
    """Raises TaskError for weights on the device "meta", which have no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise TaskError(
                f"the task's model has no numbers for {name}, which is on the device meta: load its weights"
            )


def _untie(halves: SplitModel) -> SplitModel:
    """Give the server half its own copy of every parameter and buffer that both halves have, as `split` does.

    `split` copies only the modules above such a weight. These halves may have any structure, so all of the server's
    modules are copied, with references among them preserved.
    """
    client = {*halves.client.parameters(), *halves.client.buffers()}
    server = {*halves.server.parameters(), *halves.server.buffers()}
    if client & server:
        halves.server = copy.deepcopy(halves.server, {id(tensor): tensor for tensor in server - client})
    return halves


def _require_mapping(value: Any, name: str, content: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"{name} is a {type(value).__name__}: a mapping is needed, {content}")
    return value


def _check_metrics(task: Task) -> None:
    for name, arguments in (("scores", "outputs and a data set"), ("generated", "halves and a data set")):
        value = getattr(task, name)
        if value is not None and not callable(value):
            raise TaskError(f"{name} is a {type(value).__name__}: a function of {arguments} is needed")
    if task.metrics is None:
        return
    if task.scores is not None:
        raise ValueError("metrics and scores: give one of them")
    if (
        not _require_mapping(task.metrics, "metrics", "functions of outputs and labels by name")
        and task.generated is None
    ):
        raise ValueError("metrics is empty: name one, or leave it out")
    for name, metric in task.metrics.items():
        if not isinstance(name, str) or not (callable(metric) or _is_streaming_metric(metric)):
            raise TaskError(f"the metric {name!r} is a {type(metric).__name__}: a function, by a name, is needed")


def _check_lower_is_better(task: Task) -> None:
    names = task.lower_is_better
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TaskError(f"lower_is_better is {names!r}: a tuple of names of metrics is needed")
    if task.scores is None and task.generated is None:  # whose names are unknown before the first evaluation
        _check_known_scores(names, task.metrics or ())


def _check_known_scores(names: Sequence[str], scores: Iterable[str]) -> None:
    known = list(scores)
    for name in names:
        if name not in known:
            raise TaskError(
                f"lower_is_better has {name!r}, and the task's metrics are {', '.join(known) or 'left out'}"
            )


def _check_rates(key: Any, tuned: Any) -> None:
    try:
        server, client, decay = (float(rate) for rate in (*tuned, 0.0)[:3])
        valid = (
            len(tuned) in (2, 3) and min(server, client) > 0 and decay >= 0 and math.isfinite(server + client + decay)
        )
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"rates of {key!r} are {tuned!r}: a server rate and a client rate are needed, positive, and a weight decay"
            " where there is one"
        )


def _check_classes(name: str, data: Dataset | Items, classes: int, ignored: int | None) -> None:
    """Raises DataError for labels that are no classes. Checks only labels in memory; the server checks the others."""
    if isinstance(data, Items):
        return
    counted = data.labels if ignored is None else data.labels[data.labels != ignored]
    low, high = (float(counted.min()), float(counted.max())) if len(counted) else (0.0, 0.0)
    if data.labels.is_floating_point() or low < 0 or high >= classes:
        raise DataError(
            f"{name} has labels from {low:g} to {high:g}, {data.labels.dtype}: with classes = {classes} they are"
            f" integers from 0 to {classes - 1}"
        )


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the fraction of samples whose largest output is that of their class."""
    return float((outputs.argmax(-1) == labels).double().mean())


def _is_streaming_metric(metric: Any) -> bool:
    """Whether a metric takes one batch after another."""
    return all(callable(getattr(metric, name, None)) for name in ("reset", "update", "compute"))


def _as_number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(f"the metric {name} gives a {type(value).__name__} that is no number: {error}") from None
    return number if math.isfinite(number) else math.nan
