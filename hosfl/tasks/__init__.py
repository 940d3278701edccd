"""What is learnt: a file for each task. `TASKS` is the list; nothing is imported before it is asked for."""

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
TUNED = ("digits", "digits-inverted")  # tasks with rates of their own; the others' have to be given
# How a task reads the files of one client's own samples: (settings, path, tokens that the half reads) -> Dataset.
READERS = {
    "sentences": "hosfl.tasks.sentences:own_sentences",
    **dict.fromkeys(("sst2", "rte", "wsc"), "hosfl.tasks.text:own_texts"),
    "squad": "hosfl.tasks.squad:own_questions",
    "lm": "hosfl.tasks.lm:own_completions",
    **dict.fromkeys(_PICTURES, "hosfl.tasks.vision:own_pictures"),
}
OWN = ("data", "model", "at")  # settings that a function of one's own reads if it has parameters of these names


def options_of(settings: Settings) -> dict[str, Any]:
    """A run's options as its task's function takes them, as far as JSON can hold them: "8" is 8 where it takes numbers.

    Raises ValueError for a task that is none, and for options that it has not.
    """
    if not settings.task:
        return settings.options
    taken = _arguments(_maker(settings.task), settings)
    plain = (bool, int, float, str, type(None))
    return {name: taken[name] if isinstance(taken[name], plain) else given for name, given in settings.options.items()}


def make_task(settings: Settings, own: Dataset | Items | None = None) -> Task:
    """The task of a run: one of `TASKS`, or what the function returns that "FILE.py:FUNCTION" names.

    The function is called with the same random numbers in force, whatever the run's seed: what it draws is the same in
    every run. own: the samples of the one client that it is made for; a task of `READERS` then reads nothing itself.
    Raises ValueError; TaskError where the function returns something else.
    """
    from hosfl.tasks.items import global_seed
    from hosfl.tasks.task import Task, TaskError

    if not settings.task:
        raise ValueError("the run's task was an object, not a name: pass it to hosfl.train again")
    maker = _maker(settings.task)
    arguments = _arguments(maker, settings)
    with global_seed(0):
        if own is not None and settings.task in READERS:
            arguments["own"] = own
        made = maker(settings, **arguments) if settings.task in TASKS else maker(**arguments)
    if not isinstance(made, Task):
        raise TaskError(f"task {settings.task!r} returns a {type(made).__name__}: a hosfl.Task is needed")
    return made if own is not None else made.with_public(settings.public)


def _maker(name: str) -> Callable[..., Any]:
    maker: Callable[..., Any] = load_object(name, "task", TASKS)
    if not callable(maker):
        raise ValueError(f"task {name!r} is a {type(maker).__name__}: a function that returns a hosfl.Task is needed")
    return maker


def _arguments(maker: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    """The options as the function takes them. Raises ValueError for unknown and missing ones."""
    parameters = _parameters(maker)
    options = dict(settings.options)
    if settings.task in TASKS:
        parameters.pop(next(iter(parameters)))  # the settings
        parameters.pop("own", None)
    else:
        given = {name: getattr(settings, name) for name in OWN if getattr(settings, name)}
        strange = [name for name in given if name not in parameters]
        if strange:
            raise ValueError(f"task {settings.task!r} has its own {', '.join(strange)}: leave out {', '.join(strange)}")
        options |= given
    more = [name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD]
    known = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name in options:
        if name not in known and not more:
            raise ValueError(f"task {settings.task!r} has no option {name}; it has {', '.join(known) or 'none'}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        how = f"--{missing[0]}" if missing[0] in OWN else f"--option {missing[0]}=VALUE"
        raise ValueError(f"task {settings.task!r} needs the option {missing[0]}: {how}")
    return {name: _value(name, value, known[name]) if name in known else value for name, value in options.items()}


def _parameters(maker: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(maker, eval_str=True).parameters)
    except NameError:  # of an annotation that is there for type checkers alone
        return dict(inspect.signature(maker).parameters)


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _value(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """A value as the parameter's annotation says, or as its default is; text of a command line becomes that.

    An annotation that is none of `KINDS`, or one of them or None, says nothing: the value stays as it is.
    """
    annotation = parameter.annotation
    kind = type(parameter.default) if annotation is parameter.empty else annotation
    either = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds, optional = [one for one in either if one is not NoneType], NoneType in either
    if len(kinds) != 1 or (kind := kinds[0]) not in KINDS or (optional and value is None):
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
    raise ValueError(f"option {name}: {KINDS[kind]}{' or none' * optional} is needed, got {value!r}")
