"""What is learnt: data, a model cut in two, a loss and scores. `TASKS` is the list; nothing is imported too early."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hosfl.named import named

if TYPE_CHECKING:
    from hosfl.settings import Settings
    from hosfl.tasks.task import Task

_PICTURES = ("cifar10", "cifar100", "cifar10-noisy", "cifar10-inverted")
TASKS = {
    "digits": "hosfl.tasks.digits:digits_task",
    "digits-inverted": "hosfl.tasks.digits:inverted_task",
    "sentences": "hosfl.tasks.sentences:sentences_task",
    **dict.fromkeys(("sst2", "rte", "wsc"), "hosfl.tasks.text:text_task"),
    "squad": "hosfl.tasks.squad:squad_task",
    **dict.fromkeys(_PICTURES, "hosfl.tasks.vision:pictures_task"),
}


def task_maker(name: str) -> Callable[[Settings], Task]:
    """What makes a task, by its name in `TASKS`, or by "FILE.py:FUNCTION". Raises ValueError."""
    maker: Callable[[Settings], Task] = named(name, "task", TASKS)
    return maker
