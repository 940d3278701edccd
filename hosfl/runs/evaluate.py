"""`evaluate`: a model's scores and its loss on a data set."""

from __future__ import annotations

import math

import torch

from hosfl.halves.split import SplitModel, dtype_of
from hosfl.tasks.data import Dataset, evaluation_batch_size
from hosfl.tasks.items import Items, read
from hosfl.tasks.task import Scores, Task


def evaluate(model: SplitModel, data: Dataset | Items, task: Task) -> tuple[Scores, float]:
    """Evaluate a model on a data set, both halves in eval mode: (the task's scores, mean loss)."""
    modes = model.client.training, model.server.training
    model.eval()
    device, dtype = next(model.server.parameters()).device, dtype_of(model.client)
    first = data[:1] if isinstance(data, Dataset) else read(data[:1])
    metrics, keeps_outputs = task.reset_streaming_metrics(first.labels), task.keeps_outputs(first.labels)
    # Texts are sorted by length, unless outputs per token are kept, which must have one length to be concatenated.
    by_length = isinstance(data, Dataset) and (not keeps_outputs if task.per_token else data.labels.dim() == 1)
    order = data.lengths.argsort(stable=True) if by_length else torch.arange(len(data))
    batch = evaluation_batch_size(first.length, task.classes or 1 if task.per_token else 1)
    if isinstance(data, Items):
        batch = min(batch, 64)
    outputs, labels, loss, terms = [], [], 0.0, 0
    with torch.no_grad():
        for chosen in order.split(batch):
            part = read(data[chosen].to(device, dtype))
            if by_length:
                part = part.trimmed(task.per_token)
            output, count = model(part.inputs), task.count_terms(part.labels)
            if count:
                loss += float(task.loss(output, part.labels)) * count
                terms += count
            for metric in metrics:
                metric.update(output, part.labels)
            if keeps_outputs:
                outputs.append(output)
            if isinstance(data, Items):
                labels.append(part.labels)
        generated = {} if task.generated is None else task.generated(model, data)
    model.client.train(modes[0]), model.server.train(modes[1])
    mean = loss / terms if terms else math.nan
    evaluated = data if isinstance(data, Dataset) else Dataset({}, torch.cat(labels))
    all_outputs = torch.cat(outputs)[order.argsort()] if keeps_outputs else torch.empty(0)
    scores = task.score(all_outputs, evaluated, mean) | generated
    task.select_lower_is_better(scores)  # raises for an unknown name already at the first evaluation
    return scores, mean
