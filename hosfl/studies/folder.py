"""A study's folder: its copy of the study's file, and its result files, which are validated when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hosfl.files import read_small, write_atomically
from hosfl.settings import decisive, differences
from hosfl.studies.study import QUANTITIES, Job, Result, Study, load_study

REMEDY = "delete it, and it is made again"

# The required shapes of JSON files, as far as they are read: a type or several; a mapping's keys, `str` for any key; a
# list with the shape of its items.
_NUMBER = (int, float)
_MACHINE = dict.fromkeys(("processor", "cores", "gpu", "threads", "system", "python"), object)
_EVALUATION = {
    **dict.fromkeys(("round", "bytes", "seconds"), _NUMBER),
    **dict.fromkeys(QUANTITIES, (*_NUMBER, type(None))),
}
_RUN: dict[Any, Any] = {
    **dict.fromkeys(("phase", "method"), str),
    "trial": int,
    "config": dict,
    "failure": (str, type(None)),
    "seconds": _NUMBER,
    "machine": _MACHINE,
    "evaluations": [_EVALUATION],
}
_SUCCESS: dict[Any, Any] = {  # in addition, in a run that did not fail
    **dict.fromkeys((*QUANTITIES, "forward_seconds", "answer_seconds"), _NUMBER),
    "scores": dict,
    "bytes_per_client_round": {str: _NUMBER},
    "replicas": {"equal": bool},
}
_PROVENANCE = {"data": str, "model": str}
_WAY = dict.fromkeys(("peak_extra", "cut", "of_bound"), _NUMBER)
_HALF = {"what": str, "batch": int, "ways": {"inference": _WAY, str: _WAY}}
_MEMORY = {"machine": _MACHINE, "device": str, "bound": _NUMBER, "halves": {str: _HALF}}


def _mismatches(value: Any, shape: Any, where: str = "it") -> Iterator[str]:
    """Yield the differences between a JSON value and the shape that it must have."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            if key is not str and key not in value:
                yield f"{where} has no {key}"
            for name in value if key is str else {key} & value.keys():
                yield from _mismatches(value[name], inner, f"its {name}" if where == "it" else f"{where}'s {name}")
    elif isinstance(shape, list) and isinstance(value, list):
        for item in value:
            yield from _mismatches(item, shape[0], f"one of {where}")
    elif not isinstance(value, type(shape) if isinstance(shape, (dict, list)) else shape):
        yield f"{where} cannot be {str(value)[:40]!r}"


def _read_json(path: Path, shape: Any) -> Any:
    """Read a JSON file; None if there is none. Raises ValueError if it is damaged or has another shape."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(read_small(path).decode(), parse_constant=refuse_constant)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from None
    _check_shape(path, value, shape)
    return value


def _check_shape(path: Path, value: Any, shape: Any) -> None:
    if (mismatch := next(_mismatches(value, shape), None)) is not None:
        raise ValueError(f"{path} is not what belongs there ({mismatch}): {REMEDY}")


def saved_result(job: Job, folder: Path) -> Result | None:
    """Read a job's result; None if there is none. Raises ValueError if its file is damaged or another run's."""
    path = folder / job.file
    result: Result | None = _read_json(path, _RUN)
    if result is None:
        return None
    if not result["failure"]:
        _check_shape(path, result, _SUCCESS)
    if "provenance" in result:  # earlier versions did not write it
        _check_shape(path, result, {"provenance": _PROVENANCE})
    if "lower_is_better" in result:
        _check_shape(path, result, {"lower_is_better": [str]})
    if "jobs" in result:  # nor this
        _check_shape(path, result, {"jobs": int})
    expected = {"phase": job.phase, "method": job.method, "trial": job.trial}
    actual = {**{key: result[key] for key in expected}, **decisive(result["config"])}
    changed = differences(actual, {**expected, **job.config.decisive()})
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): {REMEDY}, or take another folder")
    return result


def saved_memory(folder: Path) -> dict[str, Any] | None:
    """Read a study's client-memory.json; None if there is none. Raises ValueError if it is damaged."""
    memory: dict[str, Any] | None = _read_json(folder / "client-memory.json", _MEMORY)
    return memory


def claim_folder(study: Study, folder: Path) -> None:
    """Write the study's file into the folder. Raises ValueError if it holds another study, naming the keys that differ.

    A study may have more methods than the folder's copy, and other settings that no result depends on: results that are
    there remain valid.
    """
    from hosfl.studies.yaml12 import parse_yaml

    path = folder / "study.yaml"
    if not path.exists():
        write_atomically(path, study.text.encode())
        return
    try:
        saved = parse_yaml(load_study(path).text)
    except ValueError as error:
        raise ValueError(f"{error}. It is the folder's copy of the study's file: copy that over it") from None
    document = parse_yaml(study.text)
    shared = {name: method for name, method in document["methods"].items() if name in saved["methods"]}
    both = saved, {**document, "methods": shared}
    changed = differences(*(dict(_flatten(_without_neutral(either))) for either in both))
    if changed:
        raise ValueError(
            f"{folder} holds another study; what differs: {'; '.join(changed)}. Choose another folder, or put it back"
        )
    if document != saved:
        write_atomically(path, study.text.encode())


def _without_neutral(document: dict[str, Any]) -> dict[str, Any]:
    """Return a study's document without the settings that no result depends on."""
    methods = {name: m or {} for name, m in document["methods"].items()}
    methods = {name: {**m, "settings": decisive(m.get("settings") or {})} for name, m in methods.items()}
    return {**document, "base": decisive(document.get("base") or {}), "methods": methods}


def _flatten(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every leaf of nested mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value
