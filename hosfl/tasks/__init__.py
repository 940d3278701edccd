"""What is learnt: a file for each task. `TASKS` is the list; nothing is imported before it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
    "lm": "hosfl.tasks.lm:lm_task",
    **dict.fromkeys(_PICTURES, "hosfl.tasks.vision:pictures_task"),
}
OWN = ("data", "model", "at")  # settings that a function of one's own reads if it has parameters of these names


def check_task(settings: Settings) -> None:
    """Raises ValueError for a task that is none, and for options that it has not."""
    if settings.task:
        _arguments(_maker(settings.task), settings)


def make_task(settings: Settings) -> Task:
    """The task of a run: one of `TASKS`, or what the function returns that "FILE.py:FUNCTION" names.

    Raises ValueError; TypeError where the function returns something else.
    """
    from hosfl.tasks.task import Task

    if not settings.task:
        raise ValueError("the run's task was an object, not a name: pass it to hosfl.train again")
    maker = _maker(settings.task)
    arguments = _arguments(maker, settings)
    made = maker(settings, **arguments) if settings.task in TASKS else maker(**arguments)
    if not isinstance(made, Task):
        raise TypeError(f"task {settings.task!r} returns a {type(made).__name__}: a hosfl.Task is needed")
    return made


def _maker(name: str) -> Callable[..., Any]:
    maker: Callable[..., Any] = named(name, "task", TASKS)
    if not callable(maker):
        raise ValueError(f"task {name!r} is a {type(maker).__name__}: a function that returns a hosfl.Task is needed")
    return maker


def _arguments(maker: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    """The options as the function takes them. Raises ValueError for unknown and missing ones."""
    parameters = dict(inspect.signature(maker, eval_str=True).parameters)
    told = dict(settings.options)
    if settings.task in TASKS:
        parameters.pop(next(iter(parameters)))  # the settings
    else:
        given = {name: getattr(settings, name) for name in OWN if getattr(settings, name)}
        strange = [name for name in given if name not in parameters]
        if strange:
            raise ValueError(f"task {settings.task!r} has its own {', '.join(strange)}: leave out {', '.join(strange)}")
        told |= given
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return told
    known = ", ".join(parameters) or "none"
    for name in told:
        if name not in parameters:
            raise ValueError(f"task {settings.task!r} has no option {name}; it has {known}")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in told]
    if missing:
        raise ValueError(f"task {settings.task!r} needs the option {missing[0]}: --option {missing[0]}=VALUE")
    return {name: _value(name, value, parameters[name]) for name, value in told.items()}


def _value(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """A value as the parameter's annotation says, or as its default is; text of a command line becomes that."""
    kind = parameter.annotation if parameter.annotation is not parameter.empty else type(parameter.default)
    called = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind not in called or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, str) or (kind is float and isinstance(value, int)):
            return kind(value)
    except (ValueError, KeyError):
        pass
    raise ValueError(f"option {name}: {called[kind]} is needed, got {value!r}")
