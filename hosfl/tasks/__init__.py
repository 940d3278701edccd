"""The built-in tasks, a file for each. `TASKS` lists them; a task's file is imported when the task is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from hosfl.references import load_object

if TYPE_CHECKING:
    from hosfl.settings import Settings
    from hosfl.tasks.data import Dataset
    from hosfl.tasks.items import Items
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
TUNED = ("digits", "digits-inverted")  # tasks with tuned rates; for the others rates have to be given
# The function of each task that reads one client's own samples: (settings, path, tokens that the half reads) ->
# Dataset.
READERS = {
    "sentences": "hosfl.tasks.sentences:read_client_sentences",
    **dict.fromkeys(("sst2", "rte", "wsc"), "hosfl.tasks.text:read_client_texts"),
    "squad": "hosfl.tasks.squad:read_client_questions",
    "lm": "hosfl.tasks.lm:read_client_completions",
    **dict.fromkeys(_PICTURES, "hosfl.tasks.vision:read_client_pictures"),
}
USER_TASK_SETTINGS = ("data", "model", "at")  # settings that a user's function gets if it has parameters of these names


def options_of(settings: Settings) -> dict[str, Any]:
    """Return a run's options, converted to the types that its task's function takes: "8" becomes 8 for an int.

    An option whose converted value JSON cannot hold stays as it is. Raises ValueError for an unknown task, and for
    options that it does not have.
    """
    if not settings.task:
        return settings.options
    converted = _call_arguments(_load_function(settings.task), settings)
    plain = (bool, int, float, str, type(None))
    return {
        name: converted[name] if isinstance(converted[name], plain) else value
        for name, value in settings.options.items()
    }


def make_task(settings: Settings, samples: Dataset | Items | None = None) -> Task:
    """Make the task of a run: one of `TASKS`, or what the function "FILE.py:FUNCTION" returns.

    The function is called under a fixed seed, so that what it draws is the same in every run. samples: the samples of
    one client, if the task is made for that client alone; a task of `READERS` then reads no data itself. Raises
    ValueError; TaskError if the function returns something else.
    """
    from hosfl.tasks.items import global_seed
    from hosfl.tasks.task import Task, TaskError

    if not settings.task:
        raise ValueError("the run's task was an object, not a name: pass it to hosfl.train again")
    function = _load_function(settings.task)
    arguments = _call_arguments(function, settings)
    with global_seed(0):
        if samples is not None and settings.task in READERS:
            arguments["samples"] = samples
        task = function(settings, **arguments) if settings.task in TASKS else function(**arguments)
    if not isinstance(task, Task):
        raise TaskError(f"task {settings.task!r} returns a {type(task).__name__}: a hosfl.Task is needed")
    return task if samples is not None else task.with_public(settings.public)


def _load_function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = load_object(name, "task", TASKS)
    if not callable(function):
        raise ValueError(
            f"task {name!r} is a {type(function).__name__}: a function that returns a hosfl.Task is needed"
        )
    return function


def _call_arguments(function: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    """Return the options, converted for the task's function. Raises ValueError for unknown and missing ones."""
    parameters = _parameters(function)
    options = dict(settings.options)
    if settings.task in TASKS:
        parameters.pop(next(iter(parameters)))  # the settings
        parameters.pop("samples", None)
    else:
        from_settings = {name: getattr(settings, name) for name in USER_TASK_SETTINGS if getattr(settings, name)}
        unused = [name for name in from_settings if name not in parameters]
        if unused:
            raise ValueError(f"task {settings.task!r} has its own {', '.join(unused)}: leave out {', '.join(unused)}")
        options |= from_settings
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name in options:
        if name not in known and not takes_any:
            raise ValueError(f"task {settings.task!r} has no option {name}; it has {', '.join(known) or 'none'}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        usage = f"--{missing[0]}" if missing[0] in USER_TASK_SETTINGS else f"--option {missing[0]}=VALUE"
        raise ValueError(f"task {settings.task!r} needs the option {missing[0]}: {usage}")
    return {name: _convert(name, value, known[name]) if name in known else value for name, value in options.items()}


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function, eval_str=True).parameters)
    except NameError:  # an annotation that exists for type checkers only
        return dict(inspect.signature(function).parameters)


TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _convert(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Convert an option's value, such as text from a command line, to the type of the parameter.

    The type is that of its annotation or default. Only the types in `TYPE_NAMES` are converted to, alone or in a union
    with None; for others the value stays as it is. Raises ValueError for a value that cannot be converted.
    """
    annotation = parameter.annotation
    kind = type(parameter.default) if annotation is parameter.empty else annotation
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds, optional = [member for member in members if member is not NoneType], NoneType in members
    if len(kinds) != 1 or (kind := kinds[0]) not in TYPE_NAMES or (optional and value is None):
        return value
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if isinstance(value, str):
            if optional and value.lower() == "none":
                return None
            return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    except (ValueError, KeyError):
        pass
    raise ValueError(f"option {name}: {TYPE_NAMES[kind]}{' or none' * optional} is needed, got {value!r}")
